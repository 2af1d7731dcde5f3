#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["pycryptodome>=4.4,<4.5"]
# ///
"""Alice: connects to Bob (bob_server.py) and talks to him."""

from __future__ import annotations

import argparse
import contextlib
import getpass
import logging
import os
import re
import select
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

try:
    import crypto_utils as chat
except ImportError as missing:
    sys.exit(f"{missing}; what is needed comes with: python3 -m pip install -r requirements.txt")
except KeyboardInterrupt:
    sys.exit(130)

ME, PEER = "Alice", "Bob"
CONNECT_SECONDS = 20


# What can end a conversation, or prevent it: how it is told, and the exit status.
FAILURES: dict[type[Exception], tuple[str, int]] = {
    chat.ConnectionCut: ("Cut off", 1),
    chat.FileError: ("Stopped", 1),
    chat.ProtocolError: ("Broken off", 3),
    chat.TrustError: ("Refused", 3),
}


# What a person sees. The conversation goes to stdout, everything else to stderr. Only what the program
# itself says begins a line with anything but "Bob: " or the bar of a line that goes on.


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
    parser = argparse.ArgumentParser(description="Talk to Bob (bob_server.py) so that nobody can listen in.")
    parser.add_argument("host", nargs="?", metavar="HOST", help="Bob's address or host name")
    parser.add_argument(
        "--port", type=port, default=chat.PORT, metavar="N", help="his port (default: %(default)s)"
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


def ask_host() -> str:
    if not at_terminal():
        return "127.0.0.1"
    try:
        return input("Bob's address (Enter for this machine): ").strip() or "127.0.0.1"
    except EOFError:
        print()
        raise KeyboardInterrupt from None


def connect(host: str, number: int) -> chat.Line:
    """Connect to Bob. Raises ConnectionCut that says why it was not possible."""
    try:
        connected = socket.create_connection((host, number), timeout=CONNECT_SECONDS)
    except (socket.gaierror, UnicodeError):
        reason = "there is no such host; check the address"
    except socket.timeout:
        reason = (
            f"no answer within {CONNECT_SECONDS:.0f} s; is the address right, does a firewall drop the port?"
        )
    except ConnectionRefusedError:
        reason = "nobody is listening there; is bob_server.py running?"
    except OSError as error:
        reason = f"{error.strerror or error}"
    else:
        return chat.Line(connected)
    raise chat.ConnectionCut(f"cannot connect to {host} port {number}: {reason}")


def run(options: argparse.Namespace) -> int:
    transcript = chat.Transcript(options.transcript) if options.transcript else None
    home = chat.Home(options.home.expanduser() / "alice")
    identity = load_identity(home)
    host = options.host or ask_host()
    line = connect(host, options.port)
    if not select.select([line.socket], [], [], 1.0)[0]:
        say("Connected. Waiting for Bob's first word, up to 2 minutes: he may be making his parameters ...")
    checked_before = home.load_group()
    bob = chat.KnownPeer(home, f"[{host.lower()}]:{options.port}", options.peer)
    try:
        channel, group = chat.alice_handshake(line, identity, checked_before, bob)
        home.save_group(group)
    except chat.ConnectionCut as cut:
        line.hang_up()
        hint = f"Is bob_server.py there, and does Bob accept your key? It is {chat.fingerprint(identity)}"
        raise chat.ConnectionCut(f"{cut}, during the handshake. {hint}") from None
    except BaseException:
        line.hang_up()
        raise
    introduce(channel, home)
    say("You speak first. /quit or Ctrl-D to leave.")
    if not talk(channel, transcript):
        say("You left.")
    return 0


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
