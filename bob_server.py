#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["pycryptodome>=4.0.1,<5"]
# ///
"""Bob: waits for Alice (alice_client.py) and talks to her.

`handshake` is his column of the picture that opens crypto_utils.py, `run` the whole story.
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
import functools
import ipaddress
import queue
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Callable, Optional

try:
    import crypto_utils as chat
except ImportError as problem:
    sys.exit(f"Cannot start: {problem}")

from crypto_utils import RecordType, Role

HANDSHAKES = 64  # at most, side by side
REFUSED = """\
It showed {}. If this was Alice, let her read you the fingerprint on her screen, and restart with --peer and \
that one: it takes the place of a pinned key (to keep both, add a line to known_peers). Yours is shown at \
the start"""


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
    mine, exponent, r = chat.make_hello(Role.BOB, identity, group)
    frames.send(mine.encode())  # hello_bob -->
    theirs = chat.Hello.decode(frames.receive(chat.HELLO_LIMIT), group)  # <-- hello_alice
    keys, th = chat.settle(mine, theirs)
    trust = alice.check(keys[Role.ALICE])
    z = chat.shared_secret(exponent, theirs)
    sealer = chat.Sealer(Role.BOB, identity, z, th)
    opener = chat.Opener(Role.ALICE, keys[Role.ALICE], z, th)
    hers = frames.receive(chat.READY_LIMIT)  # <-- READY
    opener.open(hers, sealer)
    if not place.acquire(blocking=False):
        sealer.seal(RecordType.CLOSE, b"", opener, frames.send)  # CLOSE -->
        return None
    try:
        his = sealer.seal(RecordType.READY, r, opener, frames.send)  # READY -->
        for tag, entry in zip((b"b", b"a", b"z", b"A", b"B"), (mine.encode(), theirs.encode(), z, hers, his)):
            transcript.add(tag, entry)
        return chat.Channel(frames, sealer, opener, trust, chat.make_words(th, mine.nonce, r), transcript)
    except BaseException:
        place.release()
        raise


Handshake = Callable[[chat.FrameSocket, threading.Lock], Optional[chat.Channel]]


def run(console: chat.Console, options: argparse.Namespace) -> int:
    """Bob's side, from his port to the exit status."""
    listen(options.host, options.port).close()  # a port that is taken is told at once
    store, identity = chat.open_home(console, options)
    group = load_group(console, store, options.dh_bits)
    alice = chat.PinnedPeer(store, "alice", options.peer, console.can_ask)

    def let_in(frames: chat.FrameSocket, place: threading.Lock) -> chat.Channel | None:
        transcript = chat.Transcript(options.transcript)
        return handshake(frames, identity, group, alice, place, transcript)

    listener = listen(options.host, options.port)
    number = listener.getsockname()[1]
    at = "" if number == chat.PORT else f" --port {number}"
    address, advice = own_address(listener)
    command = f"  python3 alice_client.py {address}{at} --peer {chat.fingerprint(identity)}"
    console.notice(f"Send this command to Alice. It has your fingerprint in it.{advice}\n\n{command}\n")
    console.notice(f"Listening on port {number}.")
    door = Door(listener, console, let_in)
    try:
        while True:
            console.notice("Waiting for Alice; Ctrl-C ends.")
            with door.guest() as guest:
                status = entertain(console, guest, alice)
            if options.once and status is not None:
                return status
    finally:
        door.close()


def entertain(console: chat.Console, guest: chat.Channel, alice: chat.PinnedPeer) -> int | None:
    """Meet a guest and talk; return the status of a conversation, None if none began."""
    began = False
    try:
        with chat.hanging_up(console, guest):
            chat.meet(console, guest, alice)
            began = True
            return chat.converse(console, guest)
    except (chat.ConnectionCut, chat.ProtocolError, chat.TrustError, chat.NoConversation) as error:
        console.notice(chat.explain(error, "Alice"))
        return error.status if began else None


class Door:
    """Where strangers come in: a thread accepts connections, and each handshake has a thread of its own."""

    def __init__(self, listener: socket.socket, console: chat.Console, let_in: Handshake) -> None:
        self._listener = listener
        self._console = console
        self._let_in = let_in
        self._place = threading.Lock()  # who holds it talks to Bob, or Bob is asked about their key
        self._change = threading.Condition()  # of what follows
        self._handshaking: dict[socket.socket, str] = {}  # and where from; in the order in which they came
        self._others = 0  # who called while the place was taken
        threading.Thread(target=self._accept_connections, daemon=True).start()

    @contextlib.contextmanager
    def guest(self) -> Iterator[chat.Channel]:
        """Wait for whoever gets the place, and show meanwhile what else happens; free it in the end."""
        while True:
            if self._console.leaving:  # a signal whose exception was lost
                raise KeyboardInterrupt
            with contextlib.suppress(queue.Empty):  # in slices: Windows tells of Ctrl-C only between them
                guest = self._console.queue.get(timeout=0.5)
                if isinstance(guest, chat.Channel):
                    break
                self._console.notice(guest)
        try:
            yield guest
        finally:
            with contextlib.suppress(queue.Empty):
                while True:
                    self._console.queue.get_nowait()  # steps of others' handshakes, shown by -v
            with self._change:
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
        if sys.platform != "win32":  # a signal has to interrupt the main thread, whatever that waits for
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            try:
                connected, (address, *_) = self._listener.accept()
            except OSError:
                if self._listener.fileno() < 0:  # Bob has left
                    return
                time.sleep(0.05)  # until a descriptor is free, accept() fails at once
                continue
            with self._change:
                if len(self._handshaking) >= HANDSHAKES:
                    self._end_one()
                    self._change.wait_for(lambda: len(self._handshaking) < HANDSHAKES)
                self._handshaking[connected] = source(address)
            try:
                threading.Thread(target=self._meet, args=(connected, address), daemon=True).start()
            except RuntimeError:  # no thread is free now
                connected.close()
                self._forget(connected)

    def _end_one(self) -> None:
        """End the oldest handshake from the address that has the most: its thread finds the line cut."""
        most, _ = Counter(self._handshaking.values()).most_common(1)[0]
        oldest = next(one for one, where in self._handshaking.items() if where == most)
        with contextlib.suppress(OSError):
            oldest.shutdown(socket.SHUT_RDWR)

    def _forget(self, connected: socket.socket) -> None:
        with self._change:
            del self._handshaking[connected]
            self._change.notify()

    def _meet(self, connected: socket.socket, address: str) -> None:
        """Hold the handshake with one stranger; hand over the channel, or say what came of it."""
        where, frames, channel = address.removeprefix("::ffff:"), chat.FrameSocket(connected), None
        told, wait = f"{where} called, and was told that you are busy.", chat.GOODBYE_SECONDS
        with contextlib.ExitStack() as at_the_end:
            at_the_end.callback(self._forget, connected)
            try:
                channel = self._let_in(frames, self._place)
            except (chat.ChatError, MemoryError) as error:
                if isinstance(error, chat.TrustError):
                    error = chat.TrustError(f"{error}. {REFUSED.format(error.presented)}", "")
                elif isinstance(error, chat.ConnectionCut):
                    hint = "if this was Alice, her screen says why"
                    error = chat.ConnectionCut(f"{error}, during the handshake; {hint}")
                told, wait = f"{where}: {chat.explain(error, 'Alice')}", 0.0
            if channel:
                self._console.queue.put(channel)
                return
            with self._change:
                busy = self._place.locked()
                self._others += busy  # during a conversation, they are only counted
            if not busy:
                self._console.notice(told)
            frames.hang_up(wait)


def source(address: str) -> str:
    """Return what counts as one address: an IPv4 address, or an IPv6 network of 64 bits."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        return str(ip.ipv4_mapped or ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)


def listen(host: str | None, number: int) -> socket.socket:
    """Listen on one address, or on all of IPv4 and IPv6. Raises ChatError, which says why it cannot be."""
    try:
        if host is not None:
            family, _, _, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
            return socket.create_server(address, family=family)
        with contextlib.suppress(OSError, ValueError):  # IPv6 may be missing, or switched off
            return socket.create_server(("", number), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", number))
    except (socket.gaierror, UnicodeError):
        reason = "there is no such address"
    except OSError as error:
        reason = {
            errno.EADDRINUSE: "the port is taken; is another Bob there already? (--port 0 finds a free one)",
            errno.EADDRNOTAVAIL: "this machine has no such address",
            errno.EACCES: "the system does not allow it; try another port, from 1024 on, with --port",
        }.get(error.errno or 0, str(error.strerror))
    raise chat.ChatError(f"cannot listen on {host or 'any address'} port {number}: {reason}")


def own_address(listener: socket.socket) -> tuple[str, str]:
    """Return where others reach this machine, and what to say of it."""
    bound = str(listener.getsockname()[0])
    if not ipaddress.ip_address(bound.partition("%")[0]).is_unspecified:
        return bound, ""
    for family, anywhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((anywhere, 9))  # which sends nothing
            return str(probe.getsockname()[0]), ""
    return "YOUR-ADDRESS", " Put the address of this machine in the place of YOUR-ADDRESS."


def load_group(console: chat.Console, store: chat.KeyStore, bits: int | None) -> chat.Group:
    """Return Bob's Diffie-Hellman parameters: as kept, or new."""
    kept = store.load_group()
    if kept is not None and bits in (None, kept.p.bit_length()):
        return kept
    size, begun = bits or 2048, time.monotonic()
    console.notice(f"Searching for Diffie-Hellman parameters ({size} bits); this is done once.")

    def progress() -> None:
        if console.leaving:  # here, outside of every lock of the search
            raise KeyboardInterrupt
        console.show_row(f"{time.monotonic() - begun:.0f} s; it may take a minute.")

    try:
        with console.to_its_end():
            group = chat.generate_group(size, progress)
    except RuntimeError:  # from starting a thread
        raise chat.ChatError("this machine allows no further thread") from None
    console.notice(f"Found after {time.monotonic() - begun:.1f} s.")
    store.save_group(group)
    return group


def main() -> None:
    parser = chat.common_options(Role.BOB, "Wait for Alice, and talk to her.")
    option, bits = parser.add_argument, functools.partial(chat.a_number, allowed=chat.GROUP_BITS)
    option("--host", metavar="ADDR", help="address to listen on (default: all, IPv4 and IPv6)")
    option("--once", action="store_true", help="end after the first conversation")
    option("--dh-bits", type=bits, metavar="N", help="bits of p, 2048 to 4096 (default: as kept, or 2048)")
    chat.run_program(parser, run)


if __name__ == "__main__":
    main()
