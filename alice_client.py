#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["pycryptodome>=4.4,<4.5"]
# ///
"""Alice: connects to Bob (bob_server.py) and talks to him.

`run` is the whole story: load or make the key, connect, shake hands, and talk. The protocol is in
crypto_utils.py: Alice's side of the handshake is `alice_handshake`.
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":  # Ctrl-C during the imports ends the program without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import re
import select
import shlex
import socket
import time

try:
    import crypto_utils as chat
except ImportError as problem:
    sys.exit(f"Cannot start: {problem}")

CONNECT_SECONDS = 20


def run(console: chat.Console, options: argparse.Namespace) -> int:
    """Alice's side, from her key to the exit status."""
    store, identity = chat.open_home(console, options)
    frames, name = reach_bob(console, options)
    bob = chat.PinnedPeer(store, name, options.peer)
    channel = None
    try:
        if not select.select([frames.socket], [], [], 1.0)[0]:
            console.notice(
                "Connected. Bob may still be searching for his parameters: waiting up to 2 minutes ..."
            )
        channel = chat.alice_handshake(frames, identity, store, bob, evidence=options.transcript is not None)
    except chat.ConnectionCut as cut:
        hint = f"Is bob_server.py there, and does Bob accept your key? It is\n  {chat.fingerprint(identity)}"
        raise chat.ConnectionCut(f"{cut}, during the handshake. {hint}") from None
    finally:
        if channel is None:
            frames.hang_up()
    with chat.hanging_up(console, channel):
        if channel.has_something:  # at our turn, a goodbye: Bob is busy, for example
            channel.frames.deadline = time.monotonic() + chat.HANDSHAKE_SECONDS
            return chat.peer_left(console, channel, channel.receive(), trusted=channel.trust.settled)
        chat.meet(console, channel, bob, options.transcript)
        return chat.converse(console, channel)


def reach_bob(console: chat.Console, options: argparse.Namespace) -> tuple[chat.FrameSocket, str]:
    """Connect to the address that was given, or is asked for; return also Bob's name in known_peers."""
    host, port, peer = options.host, options.port, options.peer
    if host is None and not console.has_prompt:
        host = "127.0.0.1"
    while True:
        try:
            if host is None:
                host, port, peer = ask_address(console, options)
            host, port = parse_address(host, port)
            frames = connect(host, port)
            options.peer = peer
            return frames, f"[{host}]:{port}"
        except chat.NoConnection as error:
            if not console.has_prompt:
                raise
            console.notice(chat.describe(error)[0])
            host = None


def ask_address(console: chat.Console, options: argparse.Namespace) -> tuple[str, int, str | None]:
    """Ask where Bob is. The answer may be the whole command from his screen: then its --peer counts too."""
    answer = console.ask("Bob's address (Enter: this machine): ")
    try:
        words = shlex.split(answer)
    except ValueError:
        words = []
    for at, word in enumerate(words, 1):
        if word.endswith("alice_client.py"):
            try:
                pasted = command_line().parse_args(words[at:])
            except SystemExit:  # argparse has said what is wrong
                raise chat.NoConnection("this command cannot be used here; type the address alone") from None
            return pasted.host or "127.0.0.1", pasted.port, pasted.peer or options.peer
    return answer or "127.0.0.1", options.port, options.peer


def parse_address(text: str, port: int) -> tuple[str, int]:
    """Return host and port of HOST, HOST:PORT, [IPV6] or [IPV6]:PORT. Raises NoConnection."""
    bracketed = re.fullmatch(r"\[([^][]+)\](?::([0-9]{1,5}))?", text)
    named = re.fullmatch(r"([^][:,*?\s]+)(?::([0-9]{1,5}))?", text)
    found = bracketed or named or re.fullmatch(r"([0-9a-fA-F:.]+(?:%\w+)?)()", text)
    if found is None or int(found[2] or port) > 65535:
        raise chat.NoConnection(
            f"{text} cannot be an address; examples: 192.0.2.7, 192.0.2.7:65432, [2001:db8::7]:65432"
        )
    return found[1].lower(), int(found[2] or port)


def connect(host: str, port: int) -> chat.FrameSocket:
    """Connect to Bob. Raises NoConnection, which says why it was not possible."""
    try:
        return chat.FrameSocket(socket.create_connection((host, port), timeout=CONNECT_SECONDS))
    except (socket.gaierror, UnicodeError):
        reason = "there is no such host; check the address"
    except socket.timeout:
        reason = (
            f"no answer within {CONNECT_SECONDS:.0f} s; is the address right, does a firewall drop the port?"
        )
    except ConnectionRefusedError:
        reason = "nobody is listening there; is bob_server.py running?"
    except OSError as error:
        reason = f"{error.strerror or error}; is the address right, and is this machine on that network?"
    raise chat.NoConnection(f"cannot connect to {host} port {port}: {reason}")


def command_line() -> argparse.ArgumentParser:
    parser = chat.common_options(
        chat.Role.ALICE,
        "Talk to Bob (bob_server.py) so that nobody can listen in.",
        """\
  python3 alice_client.py                    asks where Bob is
  python3 alice_client.py 192.0.2.7 --peer SHA256:...    as Bob's screen shows it
  python3 alice_client.py --verify FILE      what was said? see --transcript""",
    )
    help_host = "Bob's address or name, also HOST:PORT (default: asks; from a pipe, 127.0.0.1)"
    parser.add_argument("host", nargs="?", metavar="HOST", help=help_host)
    help_port = "his port (default: %(default)s)"
    parser.add_argument("--port", type=chat.a_port, default=chat.PORT, metavar="N", help=help_port)
    return parser


def main() -> None:
    chat.run_program(command_line(), run)


if __name__ == "__main__":
    main()
