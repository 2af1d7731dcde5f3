#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["pycryptodome>=4.0.1,<5"]
# ///
"""Bob: waits for Alice (alice_client.py) and talks to her.

`handshake` is his column of the picture that opens crypto_utils.py; `run` is the whole story: his port, his
key and the Diffie-Hellman parameters, then one Alice after the other. `Door` deals with whoever calls.
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    # Ctrl-C during the imports ends the program without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import errno
import ipaddress
import queue
import re
import socket
import threading
import time
from collections import Counter
from typing import Callable

try:
    import crypto_utils as chat
except ImportError as problem:
    sys.exit(f"Cannot start: {problem}")

from crypto_utils import RecordType, Role

HANDSHAKES = 64  # at most, side by side
NO_SUCH_ADDRESS = "this machine has no such address"


def handshake(
    frames: chat.FrameSocket,
    identity: chat.RsaKey,
    group: chat.Group,
    alice: chat.PinnedPeer,
    place: threading.Lock,
    transcript: chat.Transcript,
) -> chat.Channel | None:
    """Bob's side. He signs nothing until Alice's key may be trusted and her READY has been opened.

    Whoever gets this far takes the one `place`; without it, Bob is busy, and there is no channel (the caller
    hangs up). Raises ProtocolError, TrustError, ConnectionCut, and FileError for known_peers.
    """
    mine = chat.Offer.make(Role.BOB, identity, group)
    frames.send(mine.hello)  # hello_bob -->
    hello = frames.receive(chat.HELLO_LIMIT)  # <-- hello_alice
    chat.Hello.decode(Role.ALICE, hello).trace(Role.ALICE, "came")
    settled = chat.settle(mine.hello, hello, group)
    key = settled.keys[Role.ALICE]
    trust = alice.check(key)
    z = mine.shared_secret(settled)
    sealer = chat.Sealer(Role.BOB, identity, z, settled.th)
    opener = chat.Opener(Role.ALICE, key, z, settled.th)
    hers = frames.receive(chat.READY_LIMIT)  # <-- READY
    opener.open(hers, sealer)
    if not place.acquire(blocking=False):
        sealer.seal(RecordType.CLOSE, b"", opener, frames.send)  # CLOSE -->
        return None
    try:
        his = sealer.seal(RecordType.READY, mine.r, opener, frames.send)  # READY -->
    except BaseException:
        place.release()
        raise
    for tag, entry in ((b"b", mine.hello), (b"a", hello), (b"z", z), (b"A", hers), (b"B", his)):
        transcript.add(tag, entry)
    return chat.Channel(frames, sealer, opener, trust, chat.make_words(settled.th, mine.r), transcript)


def run(console: chat.Console, options: argparse.Namespace) -> int:
    """Bob's side, from his port to the exit status."""
    listen(options.host, options.port).close()  # a port that is taken is told at once
    store, identity = chat.open_home(console, options)
    group = load_group(console, store, options.dh_bits)
    alice = chat.PinnedPeer(store, "alice", options.peer, console.can_ask)
    place = threading.Lock()  # who holds it talks to Bob, or Bob is asked about their key

    def let_in(frames: chat.FrameSocket) -> chat.Channel | None:
        transcript = chat.Transcript(options.transcript)
        return handshake(frames, identity, group, alice, place, transcript)

    listener = listen(options.host, options.port)
    number = listener.getsockname()[1]
    at = "" if number == chat.PORT else f" --port {number}"
    address, advice = own_address(listener)
    command = f"  python3 alice_client.py {address}{at} --peer {chat.fingerprint(identity)}"
    advice = rf"On Windows, .venv\Scripts\python takes the place of python3.{advice}"
    console.notice(f"Send this command to Alice. It has your fingerprint in it. {advice}\n\n{command}\n")
    console.notice(f"Listening on port {number}.")
    door = Door(listener, console, place, let_in)
    try:
        while True:
            console.notice("Waiting for Alice; Ctrl-C ends.")
            guest = door.next_guest()
            try:
                status = entertain(console, guest, alice)
            finally:
                door.guest_has_left()
            if options.once and status is not None:
                return status
    finally:
        door.close()


def entertain(console: chat.Console, guest: chat.Channel, alice: chat.PinnedPeer) -> int | None:
    """Meet a guest and talk; return the status of a conversation, None if none began."""
    status = None
    try:
        with chat.hanging_up(console, guest):
            chat.meet(console, guest, alice)
            status = 0
            return chat.converse(console, guest)
    except (chat.ConnectionCut, chat.ProtocolError, chat.TrustError, chat.NoConversation) as error:
        console.notice(chat.explain(error, "Alice"))
        return None if status is None else error.status


class Door:
    """Where strangers come in: a thread accepts connections, and each handshake has a thread of its own.

    Each has its time-out; when there are too many, the oldest of those from the address that has the most
    gives way. The one guest at a time, and lines about others while nobody is here, go to the main thread
    through the console's queue. During a conversation the others are only counted.
    """

    def __init__(
        self,
        listener: socket.socket,
        console: chat.Console,
        place: threading.Lock,
        let_in: Callable[[chat.FrameSocket], chat.Channel | None],
    ) -> None:
        self._listener = listener
        self._console = console
        self._place = place
        self._handshake = let_in
        self._threads = threading.Semaphore(HANDSHAKES + HANDSHAKES // 4)  # with those that are giving way
        self._lock = threading.Lock()  # for what follows
        self._handshaking: dict[chat.FrameSocket, str] = {}  # and where from; in the order in which they came
        self._others = 0  # who called during a conversation
        threading.Thread(target=self._accept_connections, daemon=True).start()

    def next_guest(self) -> chat.Channel:
        """Wait for Alice; show meanwhile what else happens."""
        while True:
            with contextlib.suppress(queue.Empty):  # in slices: Windows tells of Ctrl-C only between them
                item = self._console.queue.get(timeout=0.5)
                if isinstance(item, chat.Channel):
                    return item
                self._console.notice(item)

    def guest_has_left(self) -> None:
        """Make room for the next one, and say how many others called."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._console.queue.get_nowait()  # steps of others' handshakes, shown by -v
        with self._lock:
            others, self._others = self._others, 0
        if others:
            self._console.notice(f"Meanwhile others called: {others}.")
        self._place.release()

    def close(self) -> None:
        """Say goodbye to a guest whom nobody has greeted yet, also to one who has just been sent READY."""
        self._listener.close()
        with contextlib.suppress(queue.Empty):
            while self._place.locked():
                item = self._console.queue.get(timeout=chat.GOODBYE_SECONDS)
                if isinstance(item, chat.Channel):
                    item.close()
                    self._place.release()

    def _accept_connections(self) -> None:
        while True:
            try:
                connected, address = self._listener.accept()
            except OSError:
                if self._listener.fileno() < 0:  # Bob has left
                    return
                # Whoever called is gone; or no descriptor is free. Until one is, accept() fails at once:
                # without this pause, the loop would take a whole core.
                time.sleep(0.05)
                continue
            self._make_room()
            self._threads.acquire()
            try:
                frames = chat.FrameSocket(connected)
                with self._lock:
                    self._handshaking[frames] = source(address[0])
                threading.Thread(target=self._meet_stranger, args=(frames, address[0]), daemon=True).start()
            except (RuntimeError, chat.ConnectionCut):  # no thread is free now; or whoever called is gone
                connected.close()
                self._forget(connected)

    def _make_room(self) -> None:
        """End one handshake if there are as many as may be: the oldest from the address that has the most."""
        with self._lock:
            if len(self._handshaking) < HANDSHAKES:
                return
            (most, _), *_ = Counter(self._handshaking.values()).most_common(1)
            oldest = next(frames for frames, where in self._handshaking.items() if where == most)
            del self._handshaking[oldest]
        oldest.abort()

    def _forget(self, connected: socket.socket) -> None:
        with self._lock:
            for frames in [frames for frames in self._handshaking if frames.socket is connected]:
                del self._handshaking[frames]
        self._threads.release()

    def _meet_stranger(self, frames: chat.FrameSocket, address: str) -> None:
        """Hold the handshake with one stranger; hand over the channel, or say what came of it."""
        where = address.removeprefix("::ffff:")
        try:
            channel = self._handshake(frames)
            if channel is None:
                with self._lock:
                    self._others += 1
                frames.hang_up(chat.GOODBYE_SECONDS)
            else:
                self._console.queue.put(channel)
        except chat.ChatError as error:
            frames.hang_up()
            line = f"{where}: {error.told}: {error}"
            if isinstance(error, chat.TrustError):
                line += (
                    f". It showed {error.presented}. If this was Alice, let her read you the fingerprint "
                    "on her screen, and restart with --peer SHA256:... (in the place of a pinned key; to "
                    "keep both, add a line to known_peers). Yours, for her --peer, is shown at the start"
                )
            elif isinstance(error, chat.ConnectionCut):
                line += ", during the handshake; if this was Alice, her screen says why"
            self._tell(line)
        except MemoryError:
            frames.hang_up()
        finally:
            self._forget(frames.socket)

    def _tell(self, line: str) -> None:
        if self._place.locked():
            with self._lock:
                self._others += 1
        else:
            self._console.tell(line)


def source(address: str) -> str:
    """Return what counts as one address: an IPv4 address, or an IPv6 network of 64 bits."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        return str(ip.ipv4_mapped or ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)


def listen(host: str | None, number: int) -> socket.socket:
    """Listen on one address, or on all of IPv4 and IPv6. Raises NoConnection, which says why it cannot be."""
    try:
        if host is not None:
            family, _, _, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
            return socket.create_server(address, family=family, backlog=128)
        if socket.has_dualstack_ipv6():
            with contextlib.suppress(OSError):  # IPv6 may be switched off
                return socket.create_server(
                    ("", number), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128
                )
        return socket.create_server(("", number), backlog=128)
    except (socket.gaierror, UnicodeError):
        reason = NO_SUCH_ADDRESS
    except OSError as error:
        reason = {
            errno.EADDRINUSE: "the port is taken; is another Bob there already? (--port 0 finds a free one)",
            errno.EADDRNOTAVAIL: NO_SUCH_ADDRESS,
            errno.EACCES: "the system does not allow it; try another port, from 1024 on, with --port",
        }.get(error.errno or 0, f"{error.strerror or error}")
    raise chat.NoConnection(f"cannot listen on {host or 'any address'} port {number}: {reason}")


def own_address(listener: socket.socket) -> tuple[str, str]:
    """Return where others reach this machine, and what to say of it.

    Connecting a datagram socket tells the address, and sends nothing.
    """
    bound = str(listener.getsockname()[0])
    if not ipaddress.ip_address(bound.partition("%")[0]).is_unspecified:
        return (f"[{bound}]" if ":" in bound else bound), ""
    for family, anywhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((anywhere, 9))
            return str(probe.getsockname()[0]), ""
    return "YOUR-ADDRESS", " Put the address of this machine in the place of YOUR-ADDRESS."


def load_group(console: chat.Console, store: chat.KeyStore, bits: int | None) -> chat.Group:
    """Return Bob's Diffie-Hellman parameters: as kept, or new."""
    kept = store.load_group()
    if kept is not None and bits in (None, kept.p.bit_length()):
        return kept
    size, begun = bits or 2048, time.monotonic()
    console.notice(f"Searching for Diffie-Hellman parameters ({size} bits); this is done once.")
    shown = begun

    def progress() -> None:
        nonlocal shown
        if console.leaving:  # here, outside of every lock of the search
            raise KeyboardInterrupt
        if time.monotonic() - shown > 0.5:
            shown = time.monotonic()
            console.show_row(f"{shown - begun:.0f} s; it may take a minute.")

    try:
        with console.to_its_end():
            group = chat.generate_group(size, progress)
    except RuntimeError:  # from starting a thread
        raise chat.NoConnection("this machine allows no further thread") from None
    console.notice(f"Found after {time.monotonic() - begun:.1f} s.")
    store.save_group(group)
    return group


def group_bits(text: str) -> int:
    if not re.fullmatch("[0-9]{4}", text) or int(text) not in chat.GROUP_BITS:
        raise argparse.ArgumentTypeError("Diffie-Hellman parameters have 2048 to 4096 bits")
    return int(text)


def main() -> None:
    parser = chat.common_options(
        Role.BOB,
        "Wait for Alice (alice_client.py) and talk to her so that nobody can listen in.",
        """\
  python3 bob_server.py                      for Alice, here or elsewhere
  python3 bob_server.py --peer SHA256:...    for one Alice, whose key is known
  python3 bob_server.py --verify FILE        what was said? see --transcript""",
    )
    parser.add_argument("--host", metavar="ADDR", help="address to listen on (default: all, IPv4 and IPv6)")
    help_port = "port to listen on (default: %(default)s; 0: any free one)"
    parser.add_argument("--port", type=chat.a_port, default=chat.PORT, metavar="N", help=help_port)
    parser.add_argument("--once", action="store_true", help="end after the first conversation")
    help_bits = "bits of p, 2048 to 4096 (default: as kept, or 2048)"
    parser.add_argument("--dh-bits", type=group_bits, metavar="N", help=help_bits)
    chat.run_program(parser, run)


if __name__ == "__main__":
    main()
