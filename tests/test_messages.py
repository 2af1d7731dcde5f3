"""What the programs say, to the letter, and the exit status: the one place where their wording is pinned."""

from __future__ import annotations

import ast
import contextlib
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, NamedTuple

import pytest
from conftest import (
    DEADLINE,
    RFC_GROUPS,
    ROOT,
    Keys,
    Program,
    Start,
    StartBob,
    Stranger,
    exhaustive,
    patched,
    screen,
    talk,
)

import crypto_utils as chat
from crypto_utils import KeyStore, PinnedPeer


class World(NamedTuple):
    """Where it goes wrong: two people with keys who have never met, and things that are undone afterwards."""

    start: Start
    bob: StartBob
    stranger: Stranger
    homes: Path
    keys: Keys
    stack: contextlib.ExitStack

    def listener(self, backlog: int = 1) -> socket.socket:
        return self.stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=backlog))

    def alice(self, *arguments: str, **options: object) -> Program:
        return self.start("alice_client.py", *arguments, **options)

    def to_bob(self, *arguments: str) -> Program:
        return self.alice("127.0.0.1", "--port", self.bob()[1], *arguments)

    def to(self, listener: socket.socket, **options: object) -> Program:
        return self.alice("127.0.0.1", "--port", port_of(listener), **options)


@pytest.fixture
def world(start: Start, bob: StartBob, stranger: Stranger, homes: Path, keys: Keys) -> Iterator[World]:
    with contextlib.ExitStack() as stack:
        yield World(start, bob, stranger, homes, keys, stack)


def port_of(listener: socket.socket) -> str:
    return str(listener.getsockname()[1])


def nobody(world: World) -> Program:
    with world.listener() as listener:
        port = port_of(listener)
    return world.alice("127.0.0.1", "--port", port)


def firewall(world: World) -> Program:
    """A listener whose queue is full lets new connections wait in silence, as a firewall does."""
    listener = world.listener(backlog=0)
    world.stack.enter_context(socket.create_connection(listener.getsockname(), timeout=DEADLINE))
    return world.to(listener, python=patched("script.CONNECT_SECONDS = 1"))


def other_network(world: World) -> Program:
    alone = ("unshare", "--map-root-user", "--net")
    try:
        subprocess.run([*alone, "true"], check=True, capture_output=True, timeout=DEADLINE)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine does not let us make a network namespace ({error})")
    return world.alice("192.0.2.7", python=(*alone, sys.executable))


def service(banner: bytes) -> Callable[[World], Program]:
    """Return what makes Alice meet another service, which says this and ends."""

    def run(world: World) -> Program:
        listener = world.listener()
        alice = world.to(listener)
        connected = world.stack.enter_context(listener.accept()[0])
        connected.sendall(banner)
        with contextlib.suppress(OSError):  # she has gone already
            connected.shutdown(socket.SHUT_WR)
        return alice

    return run


def silence(world: World) -> Program:
    return world.to(world.listener(), python=patched("chat.FIRST_BYTE_SECONDS = 1.5"))


def bob_killed(world: World) -> Program:
    bob, alice = talk(world.bob(), world.start)
    bob.process.kill()
    return alice


def half_a_message(world: World) -> Program:
    bob, port = world.bob("--once", python=patched("chat.STALL_SECONDS = 0.5"))
    alice = world.stranger(port, world.keys.alice)
    bob.expect("Alice speaks first", "stderr")
    alice.frames.socket.sendall(b"\0")
    return bob


def forged(world: World) -> Program:
    bob, port = world.bob("--once")
    alice = world.stranger(port, world.keys.alice)
    bob.expect("Alice speaks first", "stderr")
    alice.frames.send(bytes(11) + b"\1" + bytes(272 + 256))
    return bob


def bobs_key_changed(world: World) -> Program:
    _, port = world.bob()
    PinnedPeer(KeyStore(world.homes / "alice"), f"[127.0.0.1]:{port}").pin(world.keys.mallory)
    return world.alice("127.0.0.1", "--port", port)


def alices_key_changed(world: World) -> Program:
    PinnedPeer(KeyStore(world.homes / "bob"), "alice").pin(world.keys.mallory)
    bob, port = world.bob()
    world.alice("127.0.0.1", "--port", port)
    bob.expect("--peer SHA256:.*\\n", "stderr")
    bob.process.kill()
    return bob


def bob_does_not_accept(world: World) -> Program:
    PinnedPeer(KeyStore(world.homes / "bob"), "alice").pin(world.keys.mallory)
    return world.to_bob()


def busy(world: World) -> Program:
    keys = (world.keys.alice, world.keys.mallory)
    known = "".join(f"alice {chat.ssh_line(key)}\n" for key in keys)
    (world.homes / "bob" / "known_peers").write_text(known)
    bob, port = world.bob()
    world.stranger(port, world.keys.mallory)
    bob.expect("speaks first", "stderr")
    return world.alice("127.0.0.1", "--port", port)


def declined(world: World) -> Program:
    bob, port = world.bob(terminal=True, size=(24, 80))
    alice = world.alice("127.0.0.1", "--port", port)
    bob.expect(r"yes or no\? ")
    alice.expect("You speak first", "stderr")
    bob.write("no\r")
    return alice


def taken_over(world: World) -> Program:
    bob, alice = talk(bob_and_port := world.bob(), world.start)
    alice.write("hello\n")
    bob.expect("^Alice: hello\n")
    talk(bob_and_port, world.start)
    return alice


def left_at_once(world: World) -> Program:
    _, alice = talk(world.bob(), world.start)
    alice.end_input()
    return alice


def identity(change: Callable[[Path], object]) -> Callable[[World], Program]:
    def run(world: World) -> Program:
        change(world.homes / "alice" / KeyStore.IDENTITY)
        return world.alice("127.0.0.1")

    return run


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def locked(world: World) -> Program:
    pem = world.keys.alice.export_key("PEM", passphrase="open", pkcs=8)
    KeyStore(world.homes / "alice").write(KeyStore.IDENTITY, pem)
    alice = world.alice("127.0.0.1")
    alice.write("a message\n")
    return alice


def no_folder(world: World) -> Program:
    (world.homes / "file").touch()
    return world.alice(home=world.homes / "file")


def known_peers(text: str) -> Callable[[World], Program]:
    def run(world: World) -> Program:
        (world.homes / "alice" / KeyStore.KNOWN_PEERS).write_text(text)
        return world.to_bob()

    return run


def parameters(content: bytes) -> Callable[[World], Program]:
    def run(world: World) -> Program:
        file = world.homes / "dh.pem"
        file.write_bytes(content)
        return world.start("bob_server.py", "--port", "0", "--dh-parameters", str(file))

    return run


def verified(content: bytes | None) -> Callable[[World], Program]:
    def run(world: World) -> Program:
        file = world.homes / "file"
        if content is not None:
            file.write_bytes(content)
        return world.alice("--verify", str(file))

    return run


def unwritable_transcripts(world: World) -> Program:
    (world.homes / "file").touch()
    return world.alice("127.0.0.1", "--transcript", str(world.homes / "file" / "kept"))


def old_python(world: World) -> Program:
    old = ("import sys, runpy", "sys.version_info, sys.version = (3, 8, 10), '3.8.10 (default)'")
    run = "runpy.run_path(sys.argv[1], run_name='__main__')"
    return world.alice(python=(sys.executable, "-c", "; ".join((*old, run))))


USAGE = {
    "alice": "usage: alice_client.py [options] [HOST]\nalice_client.py: error: ",
    "bob": "usage: bob_server.py [options]\nbob_server.py: error: ",
}
TO_ALICE = "No connection: cannot connect to 127.0.0.1 port {port}: "
NO_BOB = ", during the handshake. Is bob_server.py there, and does Bob accept your key? It is\n  {alice}"
NO_GROUP = "Stopped: {homes}/dh.pem holds no usable Diffie-Hellman parameters ("

# What is done, the exit status, and the end of what is told: all of it, to the letter.
ERRORS: dict[str, tuple[Callable[[World], Program], int, str]] = {
    # reaching Bob
    "nobody listens": (nobody, 1, TO_ALICE + "nobody is listening there; is bob_server.py running?"),
    "a firewall drops it": (
        firewall,
        1,
        TO_ALICE + "no answer within 1 s; is the address right, does a firewall drop the port?",
    ),
    "another network": (
        other_network,
        1,
        "No connection: cannot connect to 192.0.2.7 port 65432: Network is unreachable; "
        "is the address right, and is this machine on that network?",
    ),
    "no such name": (
        lambda world: world.alice("no-such-host.invalid"),
        1,
        "No connection: cannot connect to no-such-host.invalid port 65432: there is no such host; "
        "check the address",
    ),
    "no address": (
        lambda world: world.alice("192.0.2.7:port"),
        1,
        "No connection: 192.0.2.7:port cannot be an address; "
        "examples: 192.0.2.7, 192.0.2.7:65432, [2001:db8::7]:65432",
    ),
    "another service": (
        service(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        3,
        "Broken off: a frame of 1213486160 bytes, over the limit of 8192: is this secure-chat?",
    ),
    "another protocol": (
        service(b"\0\0\0\x05hello"),
        3,
        "Broken off: a field of the hello is cut short",
    ),
    "a service that says nothing": (
        service(b""),
        1,
        "Cut off: the connection ended without a goodbye" + NO_BOB,
    ),
    "a service that breaks off": (
        service(b"\0"),
        1,
        "Cut off: the connection ended in the middle of a message" + NO_BOB,
    ),
    "silence": (
        silence,
        1,
        "Connected. Bob may still be searching for his parameters: waiting up to 2 minutes ...\n"
        "Cut off: the other side did not answer in time" + NO_BOB,
    ),
    # listening
    "the port is taken": (
        lambda world: world.start("bob_server.py", "--port", port_of(world.listener())),
        1,
        "No connection: cannot listen on any address port {port}: the port is taken; "
        "is another Bob there already? (--port 0 finds a free one)",
    ),
    "an address of another machine": (
        lambda world: world.start("bob_server.py", "--host", "192.0.2.77"),
        1,
        "No connection: cannot listen on 192.0.2.77 port 65432: this machine has no such address",
    ),
    # how a conversation may end
    "Bob is killed": (bob_killed, 1, "Cut off: the connection ended without a goodbye"),
    "half a message": (half_a_message, 1, "Cut off: the other side did not answer in time"),
    "a forged record": (forged, 3, "Broken off: the record's signature is not valid"),
    "Bob is busy": (busy, 1, "Bob left: Bob is talking to somebody else; try again later"),
    "Bob does not accept the key": (
        declined,
        1,
        "Bob left: your key was not accepted",
    ),
    "the same Alice again": (taken_over, 0, "Bob left: you connected again, and go on there"),
    "one leaves": (left_at_once, 0, "You left."),
    # whose key it is
    "Bob's key has changed": (
        bobs_key_changed,
        3,
        "Refused: the key of [127.0.0.1]:{port} is not the pinned one\n"
        "  pinned:    {mallory}\n"
        "             ({homes}/alice/known_peers, line 1)\n"
        "  presented: {bob}\n"
        "Nothing was sent. Either somebody is in between, or the other side has a new key. Ask them "
        "for their fingerprint, in person or by telephone. If it is the one presented, start again "
        "with this option, and the new key takes the old one's place:\n"
        "  --peer {bob}\n"
        "If it is any other, do not connect.",
    ),
    "Alice's key has changed": (
        alices_key_changed,
        -9,
        "Waiting for Alice; Ctrl-C ends.\n"
        "127.0.0.1: Refused: the key of alice is not the pinned one; if this is hers (ask her), "
        "restart with --peer {alice}",
    ),
    "Bob has pinned another key": (
        bob_does_not_accept,
        1,
        "Cut off: the connection ended without a goodbye" + NO_BOB,
    ),
    "not the key that was asked for": (
        lambda world: world.to_bob("--peer", chat.fingerprint(world.keys.mallory)),
        3,
        "Refused: the key of [127.0.0.1]:{port} is not the one asked for\n"
        "  asked for: {mallory}\n"
        "  presented: {bob}\n"
        "Somebody may be in between. Or the fingerprint was not copied whole, or is an old one.",
    ),
    "a line of known_peers that is not understood": (
        known_peers("# mine\nalice ssh-rsa AAAA\n"),
        1,
        "Stopped: {homes}/alice/known_peers, line 2: not [HOST]:PORT ssh-rsa BASE64; mend or delete the line",
    ),
    "no memory": (
        lambda world: world.alice(python=patched("chat.open_home = lambda *_: bytes(1 << 60)")),
        1,
        "Stopped: there is not enough memory",
    ),
    # usage
    "one's own fingerprint": (
        lambda world: world.alice("--peer", chat.fingerprint(world.keys.alice)),
        2,
        "Usage: this is your own fingerprint; ask Bob for theirs",
    ),
    "a fingerprint that was not copied whole": (
        lambda world: world.alice("--peer", "SHA256:oLxJTIyBG1fl86TD4"),
        2,
        USAGE["alice"] + "argument --peer: a fingerprint is SHA256: and 43 characters",
    ),
    "no port": (
        lambda world: world.start("bob_server.py", "--port", "65536"),
        2,
        USAGE["bob"] + "argument --port: a port is a number up to 65535",
    ),
    "too small": (
        lambda world: world.start("bob_server.py", "--dh-bits", "1024"),
        2,
        USAGE["bob"] + "argument --dh-bits: Diffie-Hellman parameters have 2048 to 4096 bits",
    ),
    "both sizes and a file": (
        lambda world: world.start("bob_server.py", "--dh-parameters", "x", "--dh-bits", "2048"),
        2,
        USAGE["bob"] + "argument --dh-bits: not allowed with argument --dh-parameters",
    ),
    # files
    "a key that others can read": (
        identity(lambda path: path.chmod(0o644)),
        1,
        "Stopped: {homes}/alice/identity.pem is open to other users (mode 0644); "
        "run: chmod go-rwx {homes}/alice/identity.pem",
    ),
    "a damaged key": (
        identity(damage),
        1,
        "Stopped: {homes}/alice/identity.pem is damaged, or no RSA key; restore it, or move it away "
        "for a new one",
    ),
    "a passphrase without a terminal": (
        locked,
        1,
        "Stopped: your key has a passphrase, which can only be typed at a terminal; start this program there",
    ),
    "a home that is a file": (no_folder, 1, "Stopped: cannot make {homes}/file: File exists"),
    "a home that nobody has": (
        lambda world: world.alice("--home", "~no-such-user/x"),
        1,
        "Stopped: cannot tell which folder ~no-such-user/x is; say where with --home DIR",
    ),
    "no parameters": (parameters(b""), 1, NO_GROUP + "Not a valid PEM pre boundary); move it away"),
    "parameters of no safe prime": (
        parameters(chat.Group(RFC_GROUPS["ffdhe2048"].p - 2, 2).export()),
        1,
        NO_GROUP + "p is not a safe prime); move it away",
    ),
    "parameters that are too small": (
        parameters(chat.Group(23, 2).export()),
        1,
        NO_GROUP + "p has 5 bits, not 2048 to 4096); move it away",
    ),
    "transcripts that cannot be written": (
        unwritable_transcripts,
        1,
        "Stopped: cannot make {homes}/file/kept: Not a directory",
    ),
    "no transcript": (
        verified(b"hello\n"),
        3,
        "Broken off: this is no transcript of secure-chat.\nNothing is proven but what stands above.",
    ),
    "an empty file": (
        verified(b""),
        3,
        "Broken off: this is no transcript of secure-chat.\nNothing is proven but what stands above.",
    ),
    "no such file": (verified(None), 1, "Stopped: cannot read {homes}/file: No such file or directory"),
    "a device": (
        lambda world: world.alice("--verify", "/dev/zero"),
        1,
        "Stopped: /dev/zero is not a regular file; move it away, or name another one",
    ),
    # where it runs
    "an old Python": (
        old_python,
        1,
        "Cannot start: Python 3.9 or newer is needed, not 3.8.10; is there a python3.12, say?",
    ),
    "no pycryptodome": (
        lambda world: world.start("bob_server.py", python=(sys.executable, "-S")),
        1,
        "Cannot start: No module named 'Crypto'. Is the virtual environment active? In this folder:\n"
        "  python3 -m venv .venv && . .venv/bin/activate && python3 -m pip install -r requirements.txt",
    ),
    "arithmetic that is not constant-time": (
        lambda world: world.start("bob_server.py", PYCRYPTODOME_INTEGER="native"),
        1,
        "Cannot start: pycryptodome has no constant-time arithmetic here; "
        "unset PYCRYPTODOME_INTEGER or install it anew",
    ),
}


# What other tests bring about too, without the words.
BROUGHT_ABOUT_ELSEWHERE = [
    *("another protocol", "a service that breaks off", "Bob is killed", "half a message", "a forged record"),
    *("Bob is busy", "Bob does not accept the key", "the same Alice again", "one leaves"),
    *("Alice's key has changed", "Bob has pinned another key", "an address of another machine"),
    *("not the key that was asked for", "too small", "an empty file", "parameters that are too small"),
    *("both sizes and a file", "silence", "Bob's key has changed", "another network", "a device"),
    *("a line of known_peers that is not understood", "a home that is a file", "no such file"),
    *("no such name", "no address", "no port", "a home that nobody has", "a damaged key"),
    *("no parameters", "transcripts that cannot be written", "a passphrase without a terminal"),
]


@pytest.mark.parametrize(
    "name",
    [name for name in ERRORS if name not in BROUGHT_ABOUT_ELSEWHERE]
    + [*exhaustive(*BROUGHT_ABOUT_ELSEWHERE)],
)
def test_what_goes_wrong_is_told_in_one_way(world: World, name: str) -> None:
    cause, status, told = ERRORS[name]
    program = cause(world)
    assert program.wait() == status
    assert program.stdout == ""
    people = {name: chat.fingerprint(key) for name, key in world.keys._asdict().items()}
    port = re.search(r"--port=?(?:', ')?(\d+)", str(program.process.args))
    expected = told.format(port=port and port[1], homes=world.homes, **people) + "\n"
    assert program.stderr.endswith(expected), program.stderr


# --------------------------------------------------------------------------- what goes right


def test_a_conversation_at_terminals_to_the_letter(
    bob: StartBob, start: Start, homes: Path, keys: Keys
) -> None:
    """What both screens show from the question to the goodbye; lines are broken at 80 columns."""
    options = {"terminal": True, "size": (24, 80), "TERM": "xterm"}
    server, port = bob("--host", "127.0.0.1", "--transcript", str(homes / "kept"), **options)
    client = start("alice_client.py", "127.0.0.1", "--port", port, **options)
    client.expect(r"yes or no\? ")
    client.write("perhaps\r")
    client.expect(r"yes or no\? ")
    client.write("abed able abut ace aces ache\r")
    client.expect(r"yes or no\? ")
    client.write("yes\r")
    client.expect("Alice: ")
    client.write("/help\r")
    client.expect("Alice: ")
    client.write("/etc\r")
    client.expect("Alice: /etc")
    client.write("\x15/words\r")
    client.expect("Words: ")
    client.expect("Alice: ")
    server.expect(r"yes or no\? ")
    server.write("yes\r")
    server.expect(r"turn\) ")
    server.write("too early\r")
    server.expect("Your line is kept.")
    server.expect("too early")
    client.write("\x03")
    assert client.wait() == 0
    server.expect("Waiting for Alice")
    (kept,) = (homes / "kept").iterdir()
    (words,) = set(re.findall(r"^Words: ([a-z ]+)$", screen(client), re.MULTILINE))
    wrong = ", ".join(f"word {n} is {word} here" for n, word in enumerate(words.split(), 1))

    def expected(me: str, peer: str, hers: str) -> str:
        return (
            f"{peer} is here. This key is new to you:\n  {hers}\nWords: {words}\n"
            f"Compare the words with {peer}, by telephone or in person: the same six must stand on both "
            f"screens. If they differ, somebody is in between: answer no. Instead of yes, you can type "
            f"the words or the fingerprint that {peer} reads to you.\n"
        )

    pinned = (
        "The key is pinned. If {} finds other words, leave, and delete this line:\n  {}/known_peers, line 1\n"
    )
    assert told_by(client).endswith(
        single_spaced(
            expected("Alice", "Bob", chat.fingerprint(keys.bob))
            + "Is this Bob's key, yes or no? perhaps\n"
            + "Please answer yes or no, or type the six words, or the fingerprint that begins with SHA256:.\n"
            + "Is this Bob's key, yes or no? abed able abut ace aces ache\n"
            + f"These are other words: {wrong}. If no word was misheard, answer no.\n"
            + "Is this Bob's key, yes or no? yes\n"
            + pinned.format("Bob", homes / "alice")
            + "You speak first. Bob may still be deciding about your key. /help lists what you can type.\n"
            + chat.HELP
            + "\n"
            + "Not sent: a line that begins with / is a command. To send it, put a space before it.\n"
            + f"Words: {words}\nAlice:\nYou left."
        )
    )
    assert single_spaced(
        expected("Bob", "Alice", chat.fingerprint(keys.alice))
        + "Is this Alice's key, yes or no? yes\n"
        + pinned.format("Alice", homes / "bob")
        + f"Whoever has this file can read the conversation, and check who said what:\n  {kept}\n"
        + "Alice speaks first. Alice may still be deciding about your key. /help lists what you can type.\n"
        + "Not sent: it is Alice's turn. Your line is kept.\n"
        + "Alice left.\nThis was not sent:\n  too early\n"
    ) in told_by(server)


def told_by(program: Program) -> str:
    """Return a screen in one line; what the edge of the terminal has broken is whole again."""
    columns = program.size[1]
    rows = screen(program).split("\n")
    text = "".join(row if len(row) == columns and row.startswith("  ") else row + "\n" for row in rows)
    return single_spaced(text.replace("^C", ""))


def single_spaced(text: str) -> str:
    return " ".join(text.split())


def test_what_bob_says_before_anybody_comes(bob: StartBob, homes: Path, keys: Keys) -> None:
    server, port = bob("--host", "127.0.0.1")
    assert server.stderr == (
        f"Listening on port {port}.\n"
        f"You are Bob. The fingerprint of your key is\n  {chat.fingerprint(keys.bob)}\n"
        "Send this command to Alice. It has your address and your fingerprint in it:\n\n"
        f"  python3 alice_client.py 127.0.0.1 --port {port} --peer {chat.fingerprint(keys.bob)}\n\n"
        "Waiting for Alice; Ctrl-C ends.\n"
    )


@pytest.mark.exhaustive
def test_what_cannot_be_sent_is_told_and_counts(bob: StartBob, start: Start) -> None:
    _, client = talk(bob("--once"), start)
    client.write(b"x" * (chat.TEXT_LIMIT + 1) + b"\nnot UTF-8: \xff\n")
    client.end_input()
    assert client.wait() == 1
    assert client.stderr.endswith(
        f"Not sent: the text is longer than {chat.TEXT_LIMIT} bytes\n"
        "Not sent: the text is not valid Unicode\nYou left.\n"
    )


@pytest.mark.parametrize("script", ["bob_server.py", "alice_client.py"])
def test_an_old_python_understands_enough_of_it_to_say_so(script: str) -> None:
    for name in (script, "crypto_utils.py"):
        ast.parse((ROOT / name).read_text(encoding="utf-8"), feature_version=(3, 8))
