#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["pycryptodome>=4.4,<4.5"]
# ///
"""Bob: waits for Alice (alice_client.py) and talks to her."""

from __future__ import annotations

import argparse
import collections
import contextlib
import errno
import getpass
import ipaddress
import logging
import os
import queue
import re
import select
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

try:
    import crypto_utils as chat
except ImportError as missing:
    sys.exit(f"{missing}; what is needed comes with: python3 -m pip install -r requirements.txt")
except KeyboardInterrupt:
    sys.exit(130)

ME, PEER = "Bob", "Alice"
HANDSHAKES = 64  # at most, side by side


# What can end a conversation, or prevent it: how it is told, and the exit status.
FAILURES: dict[type[Exception], tuple[str, int]] = {
    chat.ConnectionCut: ("Cut off", 1),
    chat.FileError: ("Stopped", 1),
    chat.ProtocolError: ("Broken off", 3),
    chat.TrustError: ("Refused", 3),
}


# What a person sees. The conversation goes to stdout, everything else to stderr. Only what the program
# itself says begins a line with anything but "Alice: " or the bar of a line that goes on.


def at_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def say(text: object) -> None:
    """Tell the person something that is not part of the conversation."""
    with contextlib.suppress(OSError):
        print("\n".join(chat.screen_lines(str(text))), file=sys.stderr, flush=True)


def tell(error: Exception) -> int:
    """Tell the person of a failure; return its exit status."""
    what, status = FAILURES[type(error)]
    say(f"{what}: {error}")
    return status


def show(text: str, name: str = PEER) -> None:
    """Show a message, the peer's unless another name is given."""
    mark, bar = f"{name}: ", f"{'|':>{len(name) + 1}} "
    columns = shutil.get_terminal_size().columns - len(mark) if at_terminal() else None
    print(mark + f"\n{bar}".join(chat.screen_lines(text, columns)), flush=True)


class PeerSpoke(Exception):
    """Something arrived from the peer while the person was being waited for."""


@contextlib.contextmanager
def interrupted_by(channel: chat.Channel) -> Iterator[None]:
    """Raise PeerSpoke in the body, which waits for a person, once there is something to receive."""
    if not hasattr(signal, "pthread_kill"):  # Windows: it will be noticed after the person pressed Enter
        yield
        return
    body, peer, waiting = threading.main_thread(), channel.line.socket, True

    def interrupt(*_: object) -> None:
        nonlocal waiting
        if waiting:
            waiting = False
            raise PeerSpoke

    def watch() -> None:
        arrived = peer in select.select([peer, stopped], [], [])[0]
        while arrived:  # again and again: a signal just before the body falls asleep would not wake it
            signal.pthread_kill(body.ident or 0, signal.SIGUSR1)
            arrived = not select.select([stopped], [], [], 0.1)[0]

    signal.signal(signal.SIGUSR1, interrupt)
    stopped, stop = socket.socketpair()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        waiting = False
        stop.close()
        watcher.join()
        stopped.close()


def next_line(channel: chat.Channel) -> str | None:
    """Return what the person says next, None when he leaves."""
    try:
        with interrupted_by(channel):
            if at_terminal():
                line = input(f"{ME}: ")
                return None if line.strip() == "/quit" else line
            line = sys.stdin.readline()
            return line.removesuffix("\n").removesuffix("\r") if line else None
    except EOFError:
        print()
        return None
    except PeerSpoke:
        if at_terminal():
            print()
        raise


def converse(channel: chat.Channel) -> bool:
    """Talk until somebody leaves; return whether it was the peer who did."""
    while True:
        if channel.my_turn:
            try:
                text = next_line(channel)
                if text is None:
                    channel.close()
                    return False
                channel.send(text)
            except chat.MessageError as error:
                say(f"Not sent: {error}")
                continue
            except (PeerSpoke, chat.ConnectionCut):
                pass  # he may have said goodbye: what there is to receive will tell
        message = channel.receive()
        if message.kind is chat.Kind.CLOSE:
            say(f"{PEER} left" + (f": {message.text}" if message.text else "."))
            return True
        show(message.text)


def talk(channel: chat.Channel, transcript: chat.Transcript | None) -> bool:
    """Converse, and hang up whatever happens; return whether it was the peer who left."""
    try:
        if transcript:
            channel.keep(transcript)
        return converse(channel)
    except KeyboardInterrupt:
        channel.close()
        return False
    except chat.FileError:
        channel.close()
        raise
    except OSError as error:
        channel.close()
        with contextlib.suppress(
            OSError
        ):  # nobody reads on: what is still buffered must not fail again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise chat.FileError(f"cannot read or write the conversation: {error.strerror}") from None
    finally:
        channel.line.hang_up()


def load_identity(home: chat.Home) -> chat.RsaKey:
    """Return one's own key, made on the first run."""
    identity = home.load_identity(getpass.getpass)
    if identity is None:
        say(f"Making your RSA key ({chat.NEW_RSA_BITS} bits) ...")
        identity = home.make_identity()
        say(f"It is in {home.folder / home.IDENTITY}: who has that file can pose as you.")
    return identity


def introduce(channel: chat.Channel, home: chat.Home) -> None:
    """Say who is there, and how that is known."""
    known = f"pinned now in {home.folder / home.KNOWN_PEERS}" if channel.first_contact else "the pinned key"
    say(f"{PEER} is here: {chat.fingerprint(channel.peer_key)}, {known}.")


def fingerprint(text: str) -> str:
    if not re.fullmatch("SHA256:[A-Za-z0-9+/]{43}", text):
        raise argparse.ArgumentTypeError("a fingerprint is SHA256: and 43 characters")
    return text


def port(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError("a port is a number up to 65535")
    return int(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Wait for Alice (alice_client.py) and talk to her so that nobody can listen in."
    )
    parser.add_argument(
        "--host", metavar="ADDR", help="the address to listen on (default: all, IPv4 and IPv6)"
    )
    parser.add_argument(
        "--port",
        type=port,
        default=chat.PORT,
        metavar="N",
        help="the port to listen on (default: %(default)s; 0: any free one)",
    )
    parser.add_argument(
        "--home",
        type=Path,
        default=os.environ.get("SECURE_CHAT_HOME", "~/.secure-chat"),
        metavar="DIR",
        help="where keys are kept (default: $SECURE_CHAT_HOME or ~/.secure-chat)",
    )
    parser.add_argument(
        "--peer",
        type=fingerprint,
        metavar="FINGERPRINT",
        help=f"accept {PEER}'s key with this fingerprint, and no other",
    )
    parser.add_argument("--once", action="store_true", help="end after the first conversation")
    parameters = parser.add_mutually_exclusive_group()
    parameters.add_argument(
        "--dh-bits",
        type=group_bits,
        metavar="N",
        help="size of the Diffie-Hellman parameters, 2048 to 4096 (default: those kept, or 2048)",
    )
    parameters.add_argument(
        "--dh-parameters", type=Path, metavar="FILE", help="take and keep those that `openssl dhparam` wrote"
    )
    parser.add_argument(
        "--transcript",
        type=Path,
        metavar="FILE",
        help="add the conversation to FILE, as evidence of who said what",
    )
    parser.add_argument("--verify", type=Path, metavar="FILE", help="check and show a transcript, and end")
    parser.add_argument(
        "-v", "--verbose", action="count", default=0, help="show the steps as they happen; -vv whole values"
    )
    return parser.parse_args()


def group_bits(text: str) -> int:
    if not re.fullmatch("[0-9]{4}", text) or int(text) not in chat.GROUP_BITS:
        raise argparse.ArgumentTypeError("Diffie-Hellman parameters have 2048 to 4096 bits")
    return int(text)


def listen(host: str | None, number: int) -> socket.socket:
    """Listen on one address, or on all of IPv4 and IPv6. Raises ConnectionCut that says why it cannot be."""
    try:
        if host is not None:
            family, _, _, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
            return socket.create_server(address[:2], family=family, backlog=128)
        try:
            return socket.create_server(
                ("", number), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128
            )
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) == errno.EADDRINUSE:
                raise
            return socket.create_server(("", number), backlog=128)  # a machine without IPv6
    except (socket.gaierror, UnicodeError):
        reason = "this machine has no such address"
    except OSError as error:
        taken = "the port is taken; is another bob_server.py running? (--port 0 finds a free one)"
        reason = taken if error.errno == errno.EADDRINUSE else f"{error.strerror or error}"
    raise chat.ConnectionCut(f"cannot listen on {host or 'any address'} port {number}: {reason}")


def own_address(listener: socket.socket) -> str:
    """Return where others reach this machine: a datagram socket tells without sending anything."""
    bound = str(listener.getsockname()[0])
    if not ipaddress.ip_address(bound.partition("%")[0]).is_unspecified:
        return bound
    for family, anywhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((anywhere, 9))
            return str(probe.getsockname()[0])
    return "127.0.0.1"


def load_group(home: chat.Home, bits: int | None, file: Path | None) -> chat.Group:
    """Return Bob's Diffie-Hellman parameters, made on the first run, or when he asks for others."""
    group = home.load_group()
    if file is not None:
        group = chat.load_group_file(file, group)
        home.save_group(group)
        return group
    if group is not None and bits in (None, group.p.bit_length()):
        return group
    size = bits or 2048
    say(f"Making Diffie-Hellman parameters ({size} bits), found by chance ...")
    begun = last = time.monotonic()

    def progress(done: float) -> None:
        nonlocal last
        if time.monotonic() - last > 0.5 and sys.stderr.isatty():
            last = time.monotonic()
            print(f"\r{done:4.0%} of all searches have ended by now ", end="", file=sys.stderr, flush=True)

    group = chat.generate_group(size, progress)
    if last > begun:
        print(file=sys.stderr)
    say(f"Found after {time.monotonic() - begun:.1f} s, and kept in {home.folder / home.GROUP}.")
    home.save_group(group)
    return group


class Door:
    """Lets Alice in: handshakes side by side, one conversation at a time."""

    def __init__(self, listener: socket.socket, handshake: Callable[[chat.Line], chat.Channel]) -> None:
        self.guests: queue.Queue[chat.Channel] = queue.Queue()
        self._listener = listener
        self._handshake = handshake
        self._lock = threading.Lock()
        self._current: chat.Channel | None = None
        self._knocking: dict[chat.Line, None] = {}  # in the order in which they came
        self._notes: collections.deque[str] = collections.deque(maxlen=100)

    def serve(self) -> None:
        """Accept connections for ever, a thread each; the longest handshake gives way to one too many."""
        while True:
            try:
                connected, address = self._listener.accept()
                line = chat.Line(connected)
            except (OSError, chat.ConnectionCut):  # gone already, or no descriptor is free for it
                time.sleep(0.05)
                continue
            with self._lock:
                if len(self._knocking) >= HANDSHAKES:
                    next(iter(self._knocking)).abort()
                self._knocking[line] = None
            threading.Thread(target=self._let_in, args=(line, address[0]), daemon=True).start()

    def _let_in(self, line: chat.Line, address: str) -> None:
        try:
            channel = self._handshake(line)
        except tuple(FAILURES) as error:
            line.hang_up()
            self.note(f"{address.removeprefix('::ffff:')}: {FAILURES[type(error)][0]}: {error}")
            return
        finally:
            with self._lock:
                self._knocking.pop(line, None)
        with self._lock:
            same = self._current is not None and self._current.peer_key == channel.peer_key
            if self._current is None or same:
                if self._current is not None:
                    self._current.line.abort()  # Alice's line died, and she is back
                self._current = channel
                self.guests.put(channel)
                return
        self.note(f"Another Alice, {chat.fingerprint(channel.peer_key)}, was told that you are busy.")
        channel.close("Bob is talking to somebody else; try again later")

    def note(self, text: str) -> None:
        """Say something about a stranger; at a terminal, not in the middle of a conversation."""
        with self._lock:
            if self._current is None or not at_terminal():
                say(text)
            else:
                self._notes.append(text)

    def done(self, channel: chat.Channel) -> bool:
        """Make room for the next guest; return whether this one has already come back."""
        with self._lock:
            while self._notes:
                say(self._notes.popleft())
            if self._current is not channel:
                return True
            self._current = None
            return False


def run(options: argparse.Namespace) -> int:
    listener = listen(options.host, options.port)
    number = listener.getsockname()[1]
    say(f"Listening on port {number}.")
    transcript = chat.Transcript(options.transcript) if options.transcript else None
    home = chat.Home(options.home.expanduser() / "bob")
    identity = load_identity(home)
    group = load_group(home, options.dh_bits, options.dh_parameters)
    at = "" if number == chat.PORT else f" --port {number}"
    say(f"You are Bob, {chat.fingerprint(identity)}. Alice runs:\n")
    say(f"  python3 alice_client.py {own_address(listener)}{at} --peer {chat.fingerprint(identity)}\n")
    alice = chat.KnownPeer(home, "alice", options.peer)
    door = Door(listener, lambda line: chat.bob_handshake(line, identity, group, alice))
    threading.Thread(target=door.serve, daemon=True).start()
    while True:
        say("Waiting for Alice; Ctrl-C ends.")
        channel = door.guests.get()
        introduce(channel, home)
        status, bob_left = 0, False
        try:
            bob_left = not talk(channel, transcript)
        except (chat.ConnectionCut, chat.ProtocolError) as error:
            status = tell(error)
        back = door.done(channel)
        if bob_left:
            say("You left.")
        if bob_left or (options.once and not back):
            return status


def tell_steps(verbosity: int) -> None:
    """Show the steps of the protocol as they happen, once or twice as much of them."""

    class Teller(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(record.getMessage())

    chat.log.addHandler(Teller())
    chat.log.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbosity, 2)])


def verify(file: Path, expected: str | None) -> int:
    """Show what a transcript proves. Raises what is wrong with it."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise chat.FileError(f"cannot read {file}: {error.strerror}") from None
    goodbye = True
    for sender, signer, message in chat.verify_transcript(data):
        name, key = sender.value.title(), chat.fingerprint(signer)
        goodbye = message.kind is chat.Kind.CLOSE
        if message.kind is chat.Kind.TEXT:
            show(message.text, name)
        else:
            say(f"{name}, {key}, {'left' if goodbye else 'is here'}." + (" " + message.text).rstrip())
        if name == PEER and expected not in (None, key):
            raise chat.TrustError(f"{PEER}'s key is not the one asked for, {expected}")
    if not goodbye:
        say("There is no goodbye: more may have been said.")
    say("Every signature is valid: the owners of these keys said this to each other, in this order.")
    say("It is not proven when, who they are, or that nothing was said after the last line.")
    return 0


def main() -> None:
    """Run the program and exit. What a user, a peer or the disk can cause gets a line, never a traceback."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the program was started with that stream closed
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
        getattr(sys, name).reconfigure(errors="surrogateescape" if mode == "r" else "backslashreplace")
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    try:
        options = parse()
        tell_steps(options.verbose)
        sys.exit(verify(options.verify, options.peer) if options.verify else run(options))
    except KeyboardInterrupt:
        sys.exit(130)
    except tuple(FAILURES) as error:
        sys.exit(tell(error))


if __name__ == "__main__":
    main()
