#!/usr/bin/env python3
"""Bob waits for Alice, and talks to her: `handshake` is his column of the picture in crypto_utils.py."""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends it without a traceback

import argparse
import contextlib
import errno
import functools
import ipaddress
import queue
import re
import socket
import threading
import time
from collections import Counter
from typing import Callable

import crypto_utils as chat
from crypto_utils import RecordType, Role

HANDSHAKES = 64  # at most, side by side


def handshake(
    frames: chat.FrameSocket,
    identity: chat.RsaKey,
    group: chat.Group,
    alice: chat.PinnedPeer,
    place: threading.Lock,
    transcript: chat.Transcript,
) -> chat.Channel:
    """Bob's side. He signs nothing until Alice's key may be trusted and her READY has been opened.

    Whoever gets this far takes the one `place`. Raises NoConversation if it is taken, ProtocolError,
    TrustError, ConnectionCut, and FileError for known_peers.
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
        raise chat.NoConversation("you are busy")
    try:
        his = sealer.seal(RecordType.READY, r, opener, frames.send)  # READY -->
        for tag, entry in zip((b"b", b"a", b"z", b"A", b"B"), (mine.encode(), theirs.encode(), z, hers, his)):
            transcript.add(tag, entry)
        return chat.Channel(frames, sealer, opener, trust, chat.make_words(th, mine.nonce, r), transcript)
    except BaseException:
        place.release()
        raise


def run(console: chat.Console, options: argparse.Namespace) -> int:
    """Bob's side, from his port to the exit status."""
    listen(options.host, options.port).close()  # a port that is taken is told at once
    store, identity = chat.open_home(console, options)
    group = load_group(console, store, options.dh_bits)
    alice = chat.PinnedPeer(store, "alice", options.peer, console.can_ask)

    def let_in(frames: chat.FrameSocket, place: threading.Lock) -> chat.Channel:
        return handshake(frames, identity, group, alice, place, chat.Transcript(options.transcript))

    listener = listen(options.host, options.port)
    number = listener.getsockname()[1]
    command = f"alice_client.py {own_address(listener)} --port {number} --peer {chat.fingerprint(identity)}"
    console.notice(f"Send this command to Alice. It has your fingerprint in it.\n\n  python3 {command}\n")
    console.notice(f"Listening on port {number}.")
    door = Door(listener, console, let_in)
    with listener:  # closed in the end: who comes then finds nobody, and its descriptor is free
        while True:
            called, status = door.called, None
            guest = door.guest()
            try:
                status = chat.talk(console, guest, alice)
            except (chat.TrustError, chat.NoConversation) as error:
                console.notice(chat.explain(error, "Alice"))
            except (chat.ConnectionCut, chat.ProtocolError) as error:
                console.notice(chat.explain(error, "Alice"))
                status = error.status
            finally:
                if door.called > called:
                    console.notice(f"Meanwhile others called: {door.called - called}.")
            if options.once and status is not None:
                return status
            with contextlib.suppress(queue.Empty):
                while True:
                    console.queue.get_nowait()  # steps of others' handshakes, which -v shows
            door.place.release()


class Door:
    """Where strangers come in: a thread accepts connections, and each handshake has a thread of its own."""

    def __init__(
        self, listener: socket.socket, console: chat.Console, let_in: Callable[..., chat.Channel]
    ) -> None:
        self._listener = listener
        self._console = console
        self._let_in = let_in
        self.place = threading.Lock()  # who holds it talks to Bob, or Bob is asked about their key
        self.called = 0  # strangers whose handshake ended while the place was taken
        self._counting = threading.Lock()
        threading.Thread(target=self._accept_connections, daemon=True).start()

    def guest(self) -> chat.Channel:
        """Wait for whoever gets the place, and show meanwhile what else happens."""
        try:
            self._console.notice("Waiting for Alice; Ctrl-C ends.")
            while not self._console.leaving:
                with contextlib.suppress(queue.Empty):  # in slices: Windows tells of Ctrl-C only between them
                    item = self._console.queue.get(timeout=0.5)
                    if isinstance(item, chat.Channel):
                        return item
                    self._console.notice(item)
            raise KeyboardInterrupt  # a signal whose exception was lost
        except BaseException:  # say goodbye to a guest in the queue, or on the way there
            with contextlib.suppress(queue.Empty):
                while not self.place.acquire(blocking=False):  # once we have it, nobody is sent READY
                    item = self._console.queue.get(timeout=chat.GOODBYE_SECONDS)
                    if isinstance(item, chat.Channel):
                        item.close()
                        break
            raise

    def _accept_connections(self) -> None:
        if sys.platform != "win32":  # a signal has to interrupt the main thread, whatever that waits for
            signal.pthread_sigmask(signal.SIG_BLOCK, chat.SIGNALS)
        handshakes: dict[threading.Thread, socket.socket] = {}  # the oldest first; a name is a `source`
        while True:
            try:
                connected, (address, *_) = self._listener.accept()
            except OSError:
                time.sleep(0.05)  # accept() fails at once, until a descriptor is free or Bob has ended
                continue
            handshakes = {thread: end for thread, end in handshakes.items() if thread.is_alive()}
            if len(handshakes) >= HANDSHAKES:
                # The oldest of the address that has the most gives way: it finds its line cut.
                most, _ = Counter(thread.name for thread in handshakes).most_common(1)[0]
                oldest = next(thread for thread in handshakes if thread.name == most)
                with contextlib.suppress(OSError):
                    handshakes[oldest].shutdown(socket.SHUT_RDWR)
                oldest.join()
            thread = threading.Thread(target=self._greet, args=(connected, address), daemon=True)
            thread.name = source(address)
            try:
                thread.start()
                handshakes[thread] = connected
            except RuntimeError:  # no thread is free now
                connected.close()

    def _greet(self, connected: socket.socket, address: str) -> None:
        """Hold the handshake with one stranger; hand over the channel, or say what came of it."""
        frames, where = chat.FrameSocket(connected), address.removeprefix("::ffff:")
        try:
            self._console.queue.put(self._let_in(frames, self.place))
        except (chat.ChatError, MemoryError) as error:
            with self._counting:
                busy = self.place.locked()
                self.called += busy
            told = chat.explain(error, "Alice")
            if isinstance(error, chat.ConnectionCut):
                told += " If this was Alice, her screen says why."
            if not busy:  # during a conversation strangers are only counted; at other times each costs a line
                sentences = re.sub(r"\.?\n\b", ". ", told)
                self._console.notice(f"{where}: {' '.join(sentences.split())}")
            frames.hang_up(chat.GOODBYE_SECONDS if isinstance(error, chat.NoConversation) else 0.0)


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


def own_address(listener: socket.socket) -> str:
    """Return where others reach this machine, or words in capitals to be replaced."""
    bound = str(listener.getsockname()[0])
    if not ipaddress.ip_address(bound.partition("%")[0]).is_unspecified:
        return bound
    for family, anywhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((anywhere, 9))  # which sends nothing
            return str(probe.getsockname()[0])
    return "ADDRESS-OF-THIS-MACHINE"


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
    store.write(store.GROUP, group.export)
    return group


def main() -> None:
    parser = chat.common_options(Role.BOB, "[options]", "Wait for Alice, and talk to her.")
    option, bits = parser.add_argument, functools.partial(chat.a_number, allowed=chat.GROUP_BITS)
    option("--host", metavar="ADDR", help="address to listen on (default: all, IPv4 and IPv6)")
    option("--once", action="store_true", help="end after the first conversation")
    option("--dh-bits", type=bits, metavar="N", help="bits of p, 2048 to 4096 (default: as kept, or 2048)")
    chat.run_program(parser, run)


if __name__ == "__main__":
    main()
