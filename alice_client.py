#!/usr/bin/env python3
"""Alice connects to Bob, and talks to him: `handshake` is her column of the picture in crypto_utils.py."""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends it without a traceback

import argparse
import re
import socket

import crypto_utils as chat
from crypto_utils import RecordType, Role

CONNECT_SECONDS = 20


def handshake(
    frames: chat.FrameSocket, identity: chat.RsaKey, bob: chat.PinnedPeer, transcript: chat.Transcript
) -> chat.Channel:
    """Alice's side. She signs nothing until Bob's parameters have passed and his key may be trusted.

    Raises ProtocolError, TrustError, ConnectionCut, FileError for what is in her folder, and NoConversation
    if Bob is busy.
    """
    theirs = chat.Hello.decode(frames.receive(chat.HELLO_LIMIT))  # --> hello_bob
    group = bob.store.accept_group(theirs.group)  # before it meets a secret exponent
    mine, exponent, _ = chat.make_hello(Role.ALICE, identity, group)
    keys, th = chat.settle(theirs, mine)
    trust = bob.check(keys[Role.BOB])
    z = chat.shared_secret(exponent, theirs)
    sealer = chat.Sealer(Role.ALICE, identity, z, th)
    opener = chat.Opener(Role.BOB, keys[Role.BOB], z, th)
    # <-- hello_alice and READY
    hers = sealer.seal(RecordType.READY, b"", opener, lambda ready: frames.send(mine.encode(), ready))
    his = frames.receive(chat.READY_LIMIT)  # --> READY, or CLOSE
    message = opener.open(his, sealer)
    if message.type is RecordType.CLOSE:
        whoever = "Bob" if trust.settled else "whoever answered"
        raise chat.NoConversation(f"{whoever} cannot talk now; try again later")
    words = chat.make_words(th, theirs.nonce, message.body)
    for tag, entry in zip((b"b", b"a", b"z", b"A", b"B"), (theirs.encode(), mine.encode(), z, hers, his)):
        transcript.add(tag, entry)
    return chat.Channel(frames, sealer, opener, trust, words, transcript)


def run(console: chat.Console, options: argparse.Namespace) -> int:
    """Alice's side, from Bob's address to the exit status."""
    address = options.host
    if address is None:
        asked = console.prompt("Bob's address (Enter: this machine): ") if console.has_prompt else None
        address = (asked or "").strip() or "127.0.0.1"
        console.set_quiet(False)
    host, port = parse_address(address, options.port)
    store, identity = chat.open_home(console, options)
    bob = chat.PinnedPeer(store, f"[{host}]:{port}".lower(), options.peer, console.can_ask)
    console.show_row(f"Connecting to {host} port {port} ...")
    if sys.platform == "win32":  # where Ctrl-C would be noticed only after these waits, it ends them
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    frames = connect(host, port)
    try:
        channel = handshake(frames, identity, bob, chat.Transcript(options.transcript))
    except chat.ConnectionCut as cut:
        raise chat.ConnectionCut(f"{cut}. Is bob_server.py there, and does Bob accept your key?") from None
    if sys.platform == "win32":
        signal.signal(signal.SIGINT, console.on_signal)
    return chat.talk(console, channel, bob)


def parse_address(text: str, port: int) -> tuple[str, int]:
    """Return host and port of HOST, HOST:PORT, IPV6, [IPV6] or [IPV6]:PORT. Raises UsageError."""
    host, number = text, str(port)
    if text.count(":") == 1 or "]:" in text:
        host, _, number = text.rpartition(":")
    host = re.sub(r"^\[(.*)\]$", r"\1", host)
    if host.isdigit() or not re.fullmatch(r"[\w.:%-]+", host) or number not in map(str, range(65536)):
        examples = "192.0.2.7, 192.0.2.7:65432, [2001:db8::7]:65432 (without alice@)"
        raise chat.UsageError(f"{text} is no address like {examples}")
    return host, int(number)


def connect(host: str, port: int) -> chat.FrameSocket:
    """Connect to Bob. Raises ChatError, which says why it was not possible."""
    try:
        return chat.FrameSocket(socket.create_connection((host, port), timeout=CONNECT_SECONDS))
    except (socket.gaierror, UnicodeError):
        reason = "there is no such host; check the address"
    except socket.timeout:
        reason = f"no answer within {CONNECT_SECONDS} s; is the address right, does a firewall drop the port?"
    except ConnectionRefusedError:
        reason = "nobody is listening there; is bob_server.py running?"
    except OSError as error:
        reason = f"{error.strerror or error}; is the address right, and is this machine on that network?"
    raise chat.ChatError(f"cannot connect to {host} port {port}: {reason}")


def main() -> None:
    parser = chat.common_options(Role.ALICE, "[options] [HOST]", "Connect to Bob, and talk to him.")
    parser.add_argument("host", nargs="?", metavar="HOST", help="Bob's address, or HOST:PORT (default: asks)")
    chat.run_program(parser, run)


if __name__ == "__main__":
    main()
