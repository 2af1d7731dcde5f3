#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["pycryptodome>=4.4,<4.5"]
# ///
"""Bob: waits for Alice (alice_client.py) and talks to her.

`run` is the whole story: listen, load or make the key and the Diffie-Hellman parameters, let Alice in
(`Server`), and talk. The protocol is in crypto_utils.py: Bob's side of the handshake is `bob_handshake`.
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":  # Ctrl-C during the imports ends the program without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import errno
import ipaddress
import re
import select
import socket
import threading
import time
from collections import Counter, deque
from pathlib import Path
from typing import Callable

try:
    import crypto_utils as chat
except ImportError as problem:
    sys.exit(f"Cannot start: {problem}")

if sys.platform != "win32":
    import resource

HANDSHAKES = 64  # at most, side by side
RESERVE = 32  # file descriptors that strangers leave for the conversation
NOTES = 100  # at most, about strangers, that wait for the end of a conversation
NO_SUCH_ADDRESS = "this machine has no such address"


def run(console: chat.Console, options: argparse.Namespace) -> int:
    """Bob's side, from listening to the exit status."""
    listener = listen(options.host, options.port)
    number = listener.getsockname()[1]
    console.notice(f"Listening on port {number}.")
    store, identity = chat.open_home(console, options)
    at = "" if number == chat.PORT else f" --port {number}"
    command = f"  python3 alice_client.py {own_address(listener)}{at} --peer {chat.fingerprint(identity)}"
    invitation = f"Send this command to Alice. It has your address and your fingerprint in it:\n\n{command}\n"
    quick = options.dh_bits in (None, 2048)  # else the search may take longer than Alice waits
    if quick:
        console.notice(invitation)
    group = load_group(console, store, options.dh_bits, options.dh_parameters)
    if not quick:
        console.notice(invitation)
    alice = chat.PinnedPeer(store, "alice", options.peer)
    evidence = options.transcript is not None

    def handshake(frames: chat.FrameSocket, refusal: Refusal) -> chat.Channel | None:
        return chat.bob_handshake(frames, identity, group, alice, refusal, evidence)

    server = Server(listener, console.inbox, handshake)
    console.post = server.note
    server.start()
    try:
        return serve(console, server, alice, options)
    finally:
        server.close()


def serve(console: chat.Console, server: Server, alice: chat.PinnedPeer, options: argparse.Namespace) -> int:
    """Talk to one Alice after the other. Raises PersonLeft when Bob leaves."""
    guest: chat.Channel | None = None
    while True:
        if guest is None:
            console.notice("Waiting for Alice; Ctrl-C ends.")
            guest = next_guest(console)
        accepted, status = False, 0
        try:
            with chat.hanging_up(console, guest):
                chat.meet(console, guest, alice, options.transcript)
                server.key_accepted()
                accepted = True
                status = chat.converse(console, guest)
        except chat.Replaced as replaced:
            guest = replaced.channel
            continue  # at once: for the others, the conversation goes on
        except (chat.ConnectionCut, chat.ProtocolError, chat.TrustError) as error:
            told, status = chat.describe(error)
            console.notice(told)
            if isinstance(error, chat.NotAccepted):
                console.notice("This key will not be let in again, until you restart.")
                server.decline(guest.peer_key)
        was_replaced = server.part(guest)
        guest = chat.take_inbox(console, None)  # the next guest, perhaps, and notes that have waited
        if options.once and accepted and not was_replaced:
            if guest is not None:
                guest.close(chat.BUSY)
            return status


def next_guest(console: chat.Console) -> chat.Channel:
    """Wait for Alice; show meanwhile what else happens."""
    guest = None
    while guest is None:
        select.select([console.inbox], [], [])
        guest = chat.take_inbox(console, None)
    return guest


Refusal = Callable[[chat.RsaKey, chat.Trust], str]


class Server:
    """Accepts connections, and hands those whose handshake succeeds to the main thread, one guest at a time.

    Each handshake has a thread. Handshakes run side by side, and each has its time-out; when there are too
    many, the oldest of those from the address that has the most gives way.
    """

    def __init__(
        self,
        listener: socket.socket,
        inbox: chat.Inbox,
        handshake: Callable[[chat.FrameSocket, Refusal], chat.Channel | None],
    ) -> None:
        self._listener = listener
        self._inbox = inbox
        self._handshake = handshake
        self._limit = handshake_limit()
        self._threads = threading.Semaphore(self._limit + self._limit // 4)  # with those that are giving way
        self._lock = threading.Lock()  # for all that follows
        self._handshaking: dict[chat.FrameSocket, str] = {}  # and where from; in the order in which they came
        self._guest: chat.Channel | None = None  # whom Bob talks to, or is asked about
        self._accepted = False  # whether the guest's key is
        self._declined: set[str] = set()  # fingerprints
        self._notes: deque[str] = deque(maxlen=NOTES)
        self._closed = False

    def start(self) -> None:
        try:
            threading.Thread(target=self._accept_connections, daemon=True).start()
        except RuntimeError:
            raise chat.NoConnection("this machine allows no further thread") from None

    def _accept_connections(self) -> None:
        while True:
            try:
                connected, address = self._listener.accept()
                frames = chat.FrameSocket(connected)
            except (OSError, chat.ConnectionCut):
                # Whoever called is gone; or no descriptor is free. Until one is, accept() fails at once:
                # without this pause, the loop would take a whole core.
                time.sleep(0.05)
                continue
            self._make_room()
            self._threads.acquire()
            with self._lock:
                self._handshaking[frames] = source(address[0])
            try:
                threading.Thread(target=self._let_in, args=(frames, address[0]), daemon=True).start()
            except RuntimeError:  # no thread is free, now
                self._forget(frames)
                frames.hang_up()

    def _make_room(self) -> None:
        """End one handshake if there are as many as may be: the oldest from the address that has the most."""
        with self._lock:
            if len(self._handshaking) < self._limit:
                return
            (most, _), *_ = Counter(self._handshaking.values()).most_common(1)
            oldest = next(frames for frames, where in self._handshaking.items() if where == most)
            del self._handshaking[oldest]
        oldest.abort()

    def _forget(self, frames: chat.FrameSocket) -> None:
        with self._lock:
            self._handshaking.pop(frames, None)
        self._threads.release()

    def _let_in(self, frames: chat.FrameSocket, address: str) -> None:
        """Hold the handshake with one stranger; hand over the channel, or leave a note."""
        where = address.removeprefix("::ffff:")
        try:
            channel = self._handshake(frames, self._refusal)
            if channel is None:
                self.note(f"Another Alice called from {where}, and was not let in.")
            elif not self._hand_over(channel):
                channel.close(chat.BUSY)
        except tuple(chat.FAILURES) as error:
            frames.hang_up()
            told, _ = chat.describe(error)
            first_line = told.partition("\n")[0]
            if isinstance(error, chat.TrustError):
                first_line += f"; if this is hers (ask her), restart with --peer {error.presented}"
            elif isinstance(error, chat.ConnectionCut):
                first_line += ", during the handshake; if that was Alice, her screen says why"
            self.note(f"{where}: {first_line}")
        finally:
            self._forget(frames)

    def _refusal(self, key: chat.RsaKey, trust: chat.Trust) -> str:
        """Return why somebody is not let in now, "" if they are."""
        with self._lock:
            if chat.fingerprint(key) in self._declined:
                return chat.NOT_ACCEPTED
            return "" if self._is_free_for(key, trust) else chat.BUSY

    def _is_free_for(self, key: chat.RsaKey, trust: chat.Trust) -> bool:
        if self._guest is None:
            return True
        asked = not (self._accepted or self._guest.trust.known)
        # Alice is back; or a pinned one goes first.
        return self._guest.peer_key == key or (asked and trust.known)

    def _hand_over(self, channel: chat.Channel) -> bool:
        with self._lock:
            previous = self._guest
            if self._closed or not self._is_free_for(channel.peer_key, channel.trust):
                return False
            if not self._inbox.put(channel):
                return False
            self._guest, self._accepted = channel, False
        if previous is not None:
            # If the main thread waits for the rest of a record, this ends the wait, and it says goodbye.
            previous.frames.abort(socket.SHUT_RD)
            # If it is sending to somebody who does not read, only the end of both directions ends that. A
            # goodbye must have time to leave first. This thread can wait for it, as its handshake is over.
            time.sleep(chat.GOODBYE_SECONDS)
            previous.frames.abort()
        return True

    def note(self, text: str) -> None:
        """Tell of a stranger: at once, or else after the conversation."""
        with self._lock:
            if self._guest is None:
                self._inbox.put(text)
            else:
                self._notes.append(text)

    def key_accepted(self) -> None:
        """The guest's key has been accepted: from now on this is a conversation."""
        with self._lock:
            self._accepted = True

    def decline(self, key: chat.RsaKey) -> None:
        """Do not let this key in again."""
        with self._lock:
            self._declined.add(chat.fingerprint(key))

    def part(self, guest: chat.Channel) -> bool:
        """Make room for the next guest; return whether there is one, who took the place of this one."""
        with self._lock:
            for note in self._notes:
                self._inbox.put(note)
            self._notes.clear()
            was_replaced = self._guest is not guest
            if not was_replaced:
                self._guest = None
            return was_replaced

    def close(self) -> None:
        """Let nobody in any more, and say goodbye to who was let in, if nobody has done so yet."""
        with self._lock:
            self._closed = True
        for item in (*self._inbox.take(), self._guest):
            if isinstance(item, chat.Channel):
                item.close()


def handshake_limit() -> int:
    """Return how many handshakes may run side by side: each needs a socket and, for a moment, a file."""
    if sys.platform == "win32":
        return HANDSHAKES
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (
        HANDSHAKES
        if descriptors == resource.RLIM_INFINITY
        else max(1, min(HANDSHAKES, (descriptors - RESERVE) // 2))
    )


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
        try:
            return socket.create_server(
                ("", number), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128
            )
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) == errno.EADDRINUSE:
                raise
            return socket.create_server(("", number), backlog=128)  # a machine without IPv6
    except (socket.gaierror, UnicodeError):
        reason = NO_SUCH_ADDRESS
    except OSError as error:
        reason = {
            errno.EADDRINUSE: "the port is taken; is another Bob there already? (--port 0 finds a free one)",
            errno.EADDRNOTAVAIL: NO_SUCH_ADDRESS,
            errno.EACCES: "this is not allowed; ports from 1024 on are for everybody",
        }.get(error.errno or 0, f"{error.strerror or error}")
    raise chat.NoConnection(f"cannot listen on {host or 'any address'} port {number}: {reason}")


def own_address(listener: socket.socket) -> str:
    """Return where others reach this machine. (Connecting a datagram socket tells, and sends nothing.)"""
    bound = str(listener.getsockname()[0])
    if not ipaddress.ip_address(bound.partition("%")[0]).is_unspecified:
        return f"[{bound}]" if ":" in bound else bound
    for family, anywhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((anywhere, 9))
            return str(probe.getsockname()[0])
    return "127.0.0.1"


def load_group(
    console: chat.Console, store: chat.KeyStore, bits: int | None, file: Path | None
) -> chat.Group:
    """Return Bob's Diffie-Hellman parameters: from a file, as kept, or new."""
    if file is not None:
        group = store.load_group(file)
        assert group is not None  # of a file that is named
        store.save_group(group)
        return group
    kept = store.load_group()
    if kept is not None and bits in (None, kept.p.bit_length()):
        return kept
    size, begun = bits or 2048, time.monotonic()
    console.notice(f"Searching for Diffie-Hellman parameters ({size} bits); this is done once.")
    shown = begun

    def progress(share: float) -> None:
        nonlocal shown
        if time.monotonic() - shown > 0.5:
            shown = time.monotonic()
            console.progress(
                f"{shown - begun:.0f} s; {share:.0%} of all searches end by now, some take a minute. "
            )

    try:
        group = chat.generate_group(size, progress)
    except RuntimeError:  # from starting a thread
        raise chat.FileError("this machine allows no further thread") from None
    console.notice(f"Found after {time.monotonic() - begun:.1f} s.")
    store.save_group(group)
    return group


def group_bits(text: str) -> int:
    if not re.fullmatch("[0-9]{4}", text) or int(text) not in chat.GROUP_BITS:
        raise argparse.ArgumentTypeError("Diffie-Hellman parameters have 2048 to 4096 bits")
    return int(text)


def command_line() -> argparse.ArgumentParser:
    parser = chat.common_options(
        chat.Role.BOB,
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
    parameters = parser.add_mutually_exclusive_group()
    help_bits = "bits of p, 2048 to 4096 (default: as kept, or 2048)"
    parameters.add_argument("--dh-bits", type=group_bits, metavar="N", help=help_bits)
    help_file = "take and keep parameters that openssl dhparam wrote"
    parameters.add_argument("--dh-parameters", type=Path, metavar="FILE", help=help_file)
    return parser


def main() -> None:
    chat.run_program(command_line(), run)


if __name__ == "__main__":
    main()
