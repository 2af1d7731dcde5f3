"""What the programs say, to the letter, and the exit status: the one place where their wording is pinned."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, NamedTuple

import pytest
from conftest import (
    AT_TERMINAL,
    DEADLINE,
    RFC_GROUPS,
    ROOT,
    WAITING,
    Keys,
    Program,
    Start,
    StartBob,
    Stranger,
    patched,
    screen,
    talk,
)

import crypto_utils as chat
from crypto_utils import KeyStore, PinnedPeer

BOB, ALICE = "bob_server.py", "alice_client.py"


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

    def to(self, port: str, *arguments: str, **options: object) -> Program:
        return self.start(ALICE, "127.0.0.1", "--port", port, *arguments, **options)

    def to_bob(self, *arguments: str) -> Program:
        return self.to(self.bob()[1], *arguments)


Cause = Callable[[World], Program]


@pytest.fixture
def world(start: Start, bob: StartBob, stranger: Stranger, homes: Path, keys: Keys) -> Iterator[World]:
    with contextlib.ExitStack() as stack:
        yield World(start, bob, stranger, homes, keys, stack)


def port_of(listener: socket.socket) -> str:
    return str(listener.getsockname()[1])


def started(script: str, *arguments: str, **options: object) -> Cause:
    """Return what starts a program with these arguments."""
    return lambda world: world.start(script, *(a.format(homes=world.homes) for a in arguments), **options)


def nobody(world: World) -> Program:
    with world.listener() as listener:
        port = port_of(listener)
    return world.to(port)


def firewall(world: World) -> Program:
    """A listener whose queue is full lets new connections wait in silence, as a firewall does."""
    listener = world.listener(backlog=0)
    world.stack.enter_context(socket.create_connection(listener.getsockname(), timeout=DEADLINE))
    return world.to(port_of(listener), python=patched("script.CONNECT_SECONDS = 1"))


def service(banner: bytes) -> Cause:
    """Return what makes Alice meet another service, which says this and ends."""

    def run(world: World) -> Program:
        listener = world.listener()
        alice = world.to(port_of(listener))
        connected = world.stack.enter_context(listener.accept()[0])
        connected.sendall(banner)
        with contextlib.suppress(OSError):  # she has gone already
            connected.shutdown(socket.SHUT_WR)
        return alice

    return run


def guest(act: Callable[[chat.Channel], object]) -> Cause:
    """Return what makes a guest of Bob's, whom he knows, do something in her turn."""

    def run(world: World) -> Program:
        bob, port = world.bob("--once", python=patched("chat.PATIENCE = 2"))
        PinnedPeer(KeyStore(world.homes / "bob"), "alice").pin(world.keys.alice)
        act(world.stranger(port, world.keys.alice))
        return bob

    return run


def bob_killed(world: World) -> Program:
    bob, alice = talk(world.bob(), world.start)
    alice.write("request\n")
    bob.expect("^Alice: request\n")
    bob.process.kill()
    return alice


def declined(world: World) -> Program:
    bob, port = world.bob(**AT_TERMINAL)
    alice = world.to(port, "--peer", chat.fingerprint(world.keys.bob))
    bob.expect("Type the words")
    alice.expect("You speak first", "stderr")
    bob.write("no\r")
    return alice


def busy(world: World) -> Program:
    bob, port = world.bob(**AT_TERMINAL)
    world.stranger(port, world.keys.mallory)
    bob.expect("Type the words")
    return world.to(port, "--peer", chat.fingerprint(world.keys.bob))


def left_at_once(world: World) -> Program:
    _, alice = talk(world.bob(), world.start)
    alice.end_input()
    return alice


def bobs_key_changed(world: World) -> Program:
    _, port = world.bob()
    PinnedPeer(KeyStore(world.homes / "alice"), f"[127.0.0.1]:{port}").pin(world.keys.mallory)
    PinnedPeer(KeyStore(world.homes / "alice"), "[192.0.2.7]:65432").pin(world.keys.bob)
    return world.to(port)


def a_line_at_bobs(pinned: bool) -> Cause:
    """Return what makes Bob, on a pipe, meet an Alice whose key he does not accept."""

    def run(world: World) -> Program:
        if pinned:
            PinnedPeer(KeyStore(world.homes / "bob"), "alice").pin(world.keys.mallory)
        bob, port = world.bob()
        with pytest.raises(chat.ConnectionCut):
            world.stranger(port, world.keys.alice)
        bob.expect("^127.0.0.1: .*\n", "stderr")
        bob.process.kill()
        return bob

    return run


def known_peers(text: str) -> Cause:
    def run(world: World) -> Program:
        (world.homes / "alice" / KeyStore.KNOWN_PEERS).write_text(text)
        return world.to_bob()

    return run


def in_place_of(name: str, content: bytes | None, *start: str, mode: int = 0o600) -> Cause:
    """Return what starts a program with a file in the homes that has this content (None: as it is)."""

    def run(world: World) -> Program:
        path = world.homes / name
        if content is not None:
            path.write_bytes(content)
        path.chmod(mode)
        return started(*start)(world)

    return run


OLD = "sys.version_info, sys.version = (3, 7, 10), '3.7.10 (default)'"
OLD_PYTHON = (
    sys.executable,
    "-c",
    f"import sys, runpy; {OLD}; runpy.run_path(sys.argv[1], run_name='__main__')",
)
IDENTITY, PARAMETERS = "alice/identity.pem", "bob/dh_parameters.pem"
AS_BOB, AS_ALICE = (BOB, "--port", "0"), (ALICE, "127.0.0.1")

USAGE = {
    "alice": "usage: alice_client.py [options] [HOST]\nalice_client.py: error: ",
    "bob": "usage: bob_server.py [options]\nbob_server.py: error: ",
}
TO_ALICE = "Stopped: cannot connect to 127.0.0.1 port {port}: "
NO_BOB = ". Is bob_server.py there, and does Bob accept your key?"
NO_ADDRESS = " is no address like 192.0.2.7, 192.0.2.7:65432, [2001:db8::7]:65432 (without alice@)"
NO_GROUP = "Stopped: {homes}/bob/dh_parameters.pem holds no usable Diffie-Hellman parameters ("
NO_TRANSCRIPT = "Broken off: this is no transcript of secure-chat.\nNothing is proven."
ADVICE = (
    "Let Bob read you the fingerprint on Bob's own screen, in person or by telephone (yours is shown at the "
    "start). If it is this one, start again with --peer and that one: it takes the place of a pinned key (to "
    "keep both, add a line to known_peers). If not, somebody is in between."
)
OF_ALICE = f"The key that was presented: {{alice}}. {ADVICE.replace('Bob', 'Alice')}"

# What is done, the exit status, and the end of what is told: all of it, to the letter.
ERRORS: dict[str, tuple[Cause, int, str]] = {
    # reaching Bob
    "nobody listens": (nobody, 1, TO_ALICE + "nobody is listening there; is bob_server.py running?"),
    "a firewall drops it": (
        firewall,
        1,
        TO_ALICE + "no answer within 1 s; is the address right, does a firewall drop the port?",
    ),
    "no such name": (
        started(ALICE, "no-such-host.invalid"),
        1,
        "Stopped: cannot connect to no-such-host.invalid port 65432: there is no such host; "
        "check the address.",
    ),
    "no address": (started(ALICE, "192.0.2.7:port"), 2, "Usage: 192.0.2.7:port" + NO_ADDRESS),
    "another service": (
        service(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        3,
        "Broken off: a frame of 1213486160 bytes, over the limit of 8192: is this secure-chat?",
    ),
    "another protocol": (service(b"\0\0\0\x05hello"), 3, "Broken off: a field of the hello is cut short."),
    "a service that says nothing": (
        service(b""),
        1,
        "Cut off: the connection ended without a goodbye" + NO_BOB,
    ),
    "silence": (
        lambda world: world.to(port_of(world.listener()), python=patched("chat.PATIENCE = 1.5")),
        1,
        "Cut off: the other side did not answer in time" + NO_BOB,
    ),
    # listening
    "the port is taken": (
        lambda world: world.start(BOB, "--port", port_of(world.listener())),
        1,
        "Stopped: cannot listen on any address port {port}: the port is taken; "
        "is another Bob there already? (--port 0 finds a free one)",
    ),
    "an address of another machine": (
        started(BOB, "--host", "192.0.2.77"),
        1,
        "Stopped: cannot listen on 192.0.2.77 port 65432: this machine has no such address.",
    ),
    # how a conversation may end
    "Bob is killed": (
        bob_killed,
        1,
        "Cut off: the connection ended without a goodbye. Your last message may not have arrived.",
    ),
    "half a message": (
        guest(lambda alice: alice.frames.socket.sendall(b"\0")),
        1,
        "Cut off: the other side did not answer in time.",
    ),
    "a forged record": (
        guest(lambda alice: alice.frames.send(bytes(11) + b"\1" + bytes(272 + 256))),
        3,
        "Broken off: the record's signature is not valid.",
    ),
    "Bob does not accept the key": (
        declined,
        1,
        "Bob left before accepting your key, or before anything was said.",
    ),
    "Bob is busy": (busy, 1, "No conversation: Bob cannot talk now; try again later."),
    "one leaves": (left_at_once, 0, "You left."),
    # whose key it is
    "Bob's key has changed": (
        bobs_key_changed,
        3,
        "Refused: the key of [127.0.0.1]:{port} is not the pinned one, but the one you know as "
        "[192.0.2.7]:65432.\n"
        "  {mallory}\n    ({homes}/alice/known_peers, line 1)\n"
        f"The key that was presented:\n  {{bob}}\n{ADVICE}",
    ),
    "not the key that was asked for": (
        lambda world: world.to_bob("--peer", chat.fingerprint(world.keys.mallory)),
        3,
        "Refused: the key of [127.0.0.1]:{port} is not the one asked for.\n  {mallory}\n    (asked for)\n"
        f"The key that was presented:\n  {{bob}}\n{ADVICE}",
    ),
    "a new key and nobody to ask": (
        World.to_bob,
        3,
        "Refused: the key of [127.0.0.1]:{port} is new, and there is no terminal to ask at.\n"
        f"The key that was presented:\n  {{bob}}\n{ADVICE}",
    ),
    "Alice's key has changed": (
        a_line_at_bobs(pinned=True),
        -9,
        "127.0.0.1: Refused: the key of alice is not the pinned one. "
        "{mallory} ({homes}/bob/known_peers, line 1). " + OF_ALICE,
    ),
    "Alice's key is new and nobody to ask": (
        a_line_at_bobs(pinned=False),
        -9,
        "127.0.0.1: Refused: the key of alice is new, and there is no terminal to ask at. " + OF_ALICE,
    ),
    "a line of known_peers that is not understood": (
        known_peers("# mine\nalice ssh-rsa AAAA\n"),
        1,
        "Stopped: {homes}/alice/known_peers, line 2: not [HOST]:PORT ssh-rsa BASE64; "
        "mend or delete the line.",
    ),
    "no memory": (
        started(*AS_ALICE, python=patched("chat.open_home = lambda *_: bytes(1 << 60)")),
        1,
        "Stopped: there is not enough memory",
    ),
    # usage
    "one's own fingerprint": (
        lambda world: world.start(ALICE, "--peer", chat.fingerprint(world.keys.alice)),
        2,
        "Usage: this is your own fingerprint; ask Bob for theirs.",
    ),
    "a fingerprint that was not copied whole": (
        started(ALICE, "--peer", "SHA256:oLxJTIyBG1fl86TD4"),
        2,
        USAGE["alice"] + "argument --peer: a fingerprint is SHA256: and 43 characters",
    ),
    "no port": (
        started(BOB, "--port", "65536"),
        2,
        USAGE["bob"] + "argument --port: this is no number from 0 to 65535",
    ),
    "too small": (
        started(BOB, "--dh-bits", "1024"),
        2,
        USAGE["bob"] + "argument --dh-bits: this is no number from 2048 to 4096",
    ),
    # files
    "a key that others can read": (
        in_place_of(IDENTITY, None, *AS_ALICE, mode=0o644),
        1,
        "Stopped: {homes}/alice/identity.pem must be yours alone, and is not (owner {uid}, mode 0644); run:\n"
        "  chmod go-rwx {homes}/alice/identity.pem\n"
        "If that does not help (some disks keep no permissions), name a folder on another disk with --home.",
    ),
    "a damaged key": (
        in_place_of(IDENTITY, b"-----BEGIN PRIVATE KEY-----\n", *AS_ALICE),
        1,
        "Stopped: {homes}/alice/identity.pem is not supported: no RSA key of two primes, 2048 to 4096 bits "
        "and exponent 65537, in a form and cipher that can be read, or not whole. Keep a copy. (Without this "
        "file, the next start makes a new key.) These convert keys, the first one those of PuTTY:\n"
        "  puttygen KEY.ppk -O private-openssh -o identity.pem\n"
        "  ssh-keygen -p -m PKCS8 -f {homes}/alice/identity.pem",
    ),
    "a home that is a file": (
        in_place_of("file", b"", *AS_ALICE, "--home", "{homes}/file"),
        1,
        "Stopped: cannot read {homes}/file/alice/identity.pem: Not a directory; move it away, or name "
        "another --home.",
    ),
    "parameters of no safe prime": (
        in_place_of(PARAMETERS, chat.Group(RFC_GROUPS["ffdhe2048"].p - 2, 4).export(), *AS_BOB),
        1,
        NO_GROUP + "p is not a safe prime); move it away.",
    ),
    "transcripts that cannot be written": (
        in_place_of("file", b"", *AS_ALICE, "--transcript", "{homes}/file/kept"),
        1,
        "Stopped: cannot make {homes}/file/kept: Not a directory; name another folder.",
    ),
    "no transcript": (in_place_of("file", b"hello\n", ALICE, "--verify", "{homes}/file"), 3, NO_TRANSCRIPT),
    "no such file": (
        started(ALICE, "--verify", "{homes}/file"),
        1,
        "Stopped: cannot read {homes}/file: No such file or directory.",
    ),
    "a device": (
        started(ALICE, "--verify", "/dev/zero"),
        1,
        "Stopped: /dev/zero is not a regular file; move it away, or name another one.",
    ),
    # where it runs
    "an old Python": (
        started(ALICE, python=OLD_PYTHON),
        1,
        "Cannot start: Python 3.9 or newer is needed, not 3.7.10",
    ),
    "no pycryptodome": (
        started(BOB, python=(sys.executable, "-S")),
        1,
        f"Cannot start: No module named 'Crypto'. Run this, in {ROOT}:\n"
        "  python3 -m venv .venv && . .venv/bin/activate\n  python3 -m pip install -r requirements.txt",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_goes_wrong_is_told_in_one_way(world: World, name: str) -> None:
    cause, status, told = ERRORS[name]
    program = cause(world)
    assert program.wait() == status, program.stderr
    assert program.stdout == ""
    people = {name: chat.fingerprint(key) for name, key in world.keys._asdict().items()}
    port = re.search(r"--port=?(?:', ')?(\d+)", str(program.process.args))
    expected = told.format(port=port and port[1], homes=world.homes, uid=os.geteuid(), **people) + "\n"
    assert program.stderr.endswith(expected), program.stderr


# --------------------------------------------------------------------------- what goes right


def test_a_conversation_at_terminals_to_the_letter(
    bob: StartBob, start: Start, homes: Path, keys: Keys
) -> None:
    """What both screens show from the question to the goodbye, on a screen on which each line fits."""
    options = {**AT_TERMINAL, "size": (24, 400)}
    server, port = bob("--host", "127.0.0.1", "--transcript", str(homes / "kept"), **options)
    client = start(ALICE, "127.0.0.1", "--port", port, **options)
    own = {}
    for program in (server, client):
        own[program] = program.expect(r"in person:  (\w+ \w+ \w+)\r\n")[1]
    for typed in ("perhaps", "abed able abut", own[client], f"1. {own[server].upper()}!"):
        answer(client, "reads, or no: ", typed)
    for typed in ("/help", "/quti", "/words"):
        answer(client, "Alice: ", typed)
    client.expect("Alice: ")
    answer(server, "reads, or no: ", own[client])
    server.expect(WAITING)
    server.write("too early")
    server.expect(r"\(It is Alice's turn; this is not kept\)")
    client.write("\x03")
    assert client.wait() == 0
    server.expect("Waiting for Alice")
    (kept,) = (homes / "kept").iterdir()
    assert told_by(client).endswith(
        single_spaced(
            f"Bob is here, with a key that is new to you:\n  {chat.fingerprint(keys.bob)}\n"
            f"Read these words to Bob, by telephone or in person:  {own[client]}\n"
            "Type the words that Bob reads, or no: perhaps\n"
            "These are not three words (/words shows yours, /quit leaves).\n"
            "Type the words that Bob reads, or no: abed able abut\n"
            "These words do not belong to this connection. A word was misheard, or somebody is in between. "
            "Let Bob read them once more. If they are the same again, answer no.\n"
            f"Type the words that Bob reads, or no: {own[client]}\n"
            f"Those are your words, to read to Bob:  {own[client]}\n"
            f"Type the words that Bob reads, or no: 1. {own[server].upper()}!\n"
            "The key is pinned.\n"
            "You speak first. Bob may still be deciding about your key. /help lists what you can type.\n"
            f"Alice: /help\n{chat.HELP}\n"
            "Alice: /quti\n"
            "Not sent: /quti is no command; /help lists them. To send it, put a space before it.\n"
            f"Alice: /words\nYour words: {own[client]}\nYou left."
        )
    )
    assert single_spaced(
        f"Alice is here, with a key that is new to you:\n  {chat.fingerprint(keys.alice)}\n"
        f"Read these words to Alice, by telephone or in person:  {own[server]}\n"
        f"Type the words that Alice reads, or no: {own[client]}\n"
        "The key is pinned.\n"
        "Alice speaks first. Alice may still be deciding about your key. /help lists what you can type.\n"
        "Alice left before accepting your key, or before anything was said.\n"
        "Whoever has this file can read the conversation. To check who said what:\n"
        f"  python3 {ROOT}/bob_server.py --verify {kept}\n"
    ) in told_by(server)


def answer(program: Program, question: str, typed: str) -> None:
    """Type a line at a prompt, and wait until it stands there."""
    program.expect(question)
    program.write(f"{typed}\r")
    program.expect(re.escape(question + typed))


def told_by(program: Program) -> str:
    """Return a screen in one line."""
    return single_spaced(screen(program).replace("^C", ""))


def single_spaced(text: str) -> str:
    return " ".join(text.split())


def test_what_bob_says_before_anybody_comes(bob: StartBob, keys: Keys) -> None:
    server, port = bob("--host", "127.0.0.1")
    assert server.stderr == (
        f"You are Bob. The fingerprint of your key is\n  {chat.fingerprint(keys.bob)}\n"
        "Send this command to Alice. It has your fingerprint in it.\n\n"
        f"  python3 alice_client.py 127.0.0.1 --port {port} --peer {chat.fingerprint(keys.bob)}\n\n"
        f"Listening on port {port}.\n"
        "Waiting for Alice; Ctrl-C ends.\n"
    )


def test_what_cannot_be_sent_is_told_and_counts(bob: StartBob, start: Start) -> None:
    _, client = talk(bob("--once"), start)
    client.write(b"x" * (chat.TEXT_LIMIT + 1) + b"\nnot UTF-8: \xff\n")
    client.end_input()
    assert client.wait() == 1
    assert client.stderr.endswith(
        f"Not sent: the text is longer than {chat.TEXT_LIMIT} bytes.\n"
        "Not sent: the text is not valid Unicode.\nYou left.\n"
    )


@pytest.mark.parametrize("script", [BOB, ALICE, "crypto_utils.py"])
def test_an_old_python_understands_enough_of_it_to_say_so(script: str) -> None:
    ast.parse((ROOT / script).read_text(encoding="utf-8"), feature_version=(3, 7))
