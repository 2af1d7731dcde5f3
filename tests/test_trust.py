"""Whose key is it? The question about a new key, --peer, changed keys, and ways around them."""

from __future__ import annotations

import re
import socket
import struct
import sys
from pathlib import Path
from typing import Callable

import pytest
from conftest import (
    AT_TERMINAL,
    DEADLINE,
    GROUP,
    Keys,
    Program,
    Start,
    StartBob,
    Stranger,
    exhaustive,
    fails,
    patched,
    talk,
)

import crypto_utils as chat
from crypto_utils import FrameSocket, KeyStore, PinnedPeer, RecordType, Role

WITHOUT_COLOURS = {**AT_TERMINAL, "NO_COLOR": "1"}
QUESTION = r"yes or no\? "


@pytest.fixture
def strangers(bob: StartBob, start: Start) -> Callable[..., tuple[Program, Program, str]]:
    """Return a function that starts both at terminals, where both are asked; it returns the port too."""

    def run(*arguments: str, **options: object) -> tuple[Program, Program, str]:
        server, port = bob(*arguments, **WITHOUT_COLOURS, **options)
        client = start("alice_client.py", "127.0.0.1", "--port", port, **WITHOUT_COLOURS)
        server.expect(QUESTION)
        client.expect(QUESTION)
        return server, client, port

    return run


def is_pinned(homes: Path, role: Role) -> bool:
    path = homes / role.value / KeyStore.KNOWN_PEERS
    return path.exists() and path.read_text() != ""


def words_of(program: Program) -> str:
    return re.findall(r"^Words: ([a-z ]+)", program.stdout, re.MULTILINE)[-1]


# ------------------------------------------------------------------------------------ the question


def test_both_see_the_same_words_say_yes_and_are_not_asked_again(
    strangers: Callable[..., tuple[Program, Program, str]], start: Start, homes: Path, keys: Keys
) -> None:
    server, client, port = strangers()
    assert words_of(server) == words_of(client)
    assert len(words_of(server).split()) == 6
    assert chat.fingerprint(keys.alice) in server.stdout
    assert chat.fingerprint(keys.bob) in client.stdout
    for program, role in ((client, Role.ALICE), (server, Role.BOB)):
        assert not is_pinned(homes, role)
        program.write("yes\r")
        program.expect("is pinned")
        assert is_pinned(homes, role)
    client.expect("Alice: ")
    client.write("/quit\r")
    assert client.wait() == 0
    server.expect("Waiting for Alice")
    again = start("alice_client.py", "127.0.0.1", "--port", port, **WITHOUT_COLOURS)
    again.expect("with the key you know")
    again.expect("Alice: ")
    server.expect("with the key you know")
    server.expect(r"\(Alice's turn\) ")
    assert words_of(server) == words_of(again) != words_of(client)


@pytest.mark.parametrize("answer", ["words", *exhaustive("YES", "fingerprint")])
def test_what_accepts_a_key(
    strangers: Callable[..., tuple[Program, Program, str]], homes: Path, keys: Keys, answer: str
) -> None:
    server, client, _ = strangers()
    typed = {"words": words_of(client).upper(), "fingerprint": chat.fingerprint(keys.alice)}.get(
        answer, answer
    )
    server.write(f"  {typed} \r")
    server.expect("is pinned")
    assert is_pinned(homes, Role.BOB)


def test_what_neither_accepts_nor_refuses_is_asked_again(
    strangers: Callable[..., tuple[Program, Program, str]], homes: Path, keys: Keys
) -> None:
    server, client, _ = strangers()
    right = words_of(client).split()
    wrong = "abed" if right[2] != "abed" else "able"
    for answer, told in (
        ("", "Please answer yes or no"),
        ("y", "Please answer yes or no"),
        ("yes please", "Please answer yes or no"),
        (" ".join([*right[:2], wrong, *right[3:]]), f"word 3 is {right[2]} here"),
        (" ".join(right[:5]), "Please answer yes or no"),
        (" ".join(reversed(right)), "These are other words"),
        (chat.fingerprint(keys.bob), "another fingerprint"),
        (chat.fingerprint(keys.alice)[:-1], "another fingerprint"),
    ):
        server.write(f"{answer}\r")
        server.expect(re.escape(told))
        server.expect(QUESTION)
        assert not is_pinned(homes, Role.BOB)
    server.write("no\r")
    server.expect("nothing is pinned")


NO = pytest.mark.parametrize("no", ["\x03", *exhaustive("no\r", "NO\r", "/quit\r", "\x04")])


@NO
def test_alice_says_no(strangers: Callable[..., tuple[Program, Program, str]], homes: Path, no: str) -> None:
    server, client, _ = strangers("--once")
    client.write(no)
    client.expect("you did not accept Bob's key; nothing is pinned")
    assert client.wait() == 3
    server.expect("Alice left before you answered; nothing is pinned")
    server.expect("Waiting for Alice")  # a question is no conversation, so --once still waits for one
    assert not is_pinned(homes, Role.ALICE)
    assert not is_pinned(homes, Role.BOB)


@NO
def test_bob_says_no_to_an_alice_who_has_spoken(
    strangers: Callable[..., tuple[Program, Program, str]], start: Start, homes: Path, no: str
) -> None:
    server, client, port = strangers("--once")
    client.write("yes\r")
    client.expect("Alice: ")
    client.write("a first message\r")
    client.expect(r"\(Bob's turn\) ")
    server.write(no)
    server.expect("you did not accept Alice's key; nothing is pinned")
    client.expect("Bob left: your key was not accepted")
    client.expect("before the last message had arrived")
    assert client.wait() == 1
    assert "a first message" not in server.stdout
    assert not is_pinned(homes, Role.BOB)
    server.expect("Waiting for Alice")
    again = start("alice_client.py", "127.0.0.1", "--port", port)
    again.expect("Bob left: your key was not accepted", "stderr")
    assert again.wait() == 1
    server.expect("Another Alice called")
    assert len(re.findall(QUESTION, server.stdout)) == 1  # nobody is asked about that key again


@pytest.mark.parametrize("refuser", exhaustive(*Role))
def test_a_no_is_told_to_who_is_asked_too(
    strangers: Callable[..., tuple[Program, Program, str]], homes: Path, refuser: Role
) -> None:
    server, client, _ = strangers()
    refusing, other = (server, client) if refuser is Role.BOB else (client, server)
    refusing.write("no\r")
    other.expect("your key was not accepted")
    other.expect("nothing is pinned")
    if other is client:
        assert client.wait() == 1
    assert not is_pinned(homes, Role.BOB)
    assert not is_pinned(homes, Role.ALICE)


def test_a_first_message_waits_behind_the_question(
    strangers: Callable[..., tuple[Program, Program, str]],
) -> None:
    server, client, _ = strangers()
    client.write("yes\r")
    client.expect("Bob may still be deciding")
    client.expect("Alice: ")
    client.write("a first message\r")
    client.expect(r"\(Bob's turn\) ")
    assert "a first message" not in server.stdout
    server.write("yes\r")
    server.expect("Alice \u2713 a first message")
    server.expect("Bob: ")


def test_bob_is_asked_where_only_standard_output_is_no_terminal(
    bob: StartBob, stranger: Stranger, homes: Path, keys: Keys
) -> None:
    server, port = bob(**WITHOUT_COLOURS, python=("bash", "-c", f'{sys.executable} "$0" "$@" | cat'))
    alice = stranger(port, keys.alice)
    server.expect(QUESTION)
    assert not is_pinned(homes, Role.BOB)
    server.write("yes\r")
    server.expect("is pinned")
    alice.send("hello")
    server.expect("^Alice: hello")


def test_a_new_key_is_refused_where_standard_error_is_no_terminal_to_ask_at(
    bob: StartBob, start: Start, homes: Path
) -> None:
    _, port = bob()
    shell = ("bash", "-c", f'{sys.executable} "$0" "$@" 2> {homes}/errors')
    client = start("alice_client.py", "127.0.0.1", "--port", port, python=shell, **WITHOUT_COLOURS)
    assert client.wait() == 3
    assert "Refused: this key is new" in (homes / "errors").read_text()
    assert not is_pinned(homes, Role.ALICE)


@pytest.mark.parametrize(("reason", "shown"), [("the words of a stranger", False), (chat.NOT_ACCEPTED, True)])
def test_of_who_is_not_accepted_only_the_programs_own_reasons_are_shown(
    bob: StartBob, stranger: Stranger, keys: Keys, reason: str, shown: bool
) -> None:
    server, port = bob(**WITHOUT_COLOURS)
    alice = stranger(port, keys.alice)
    server.expect(QUESTION)
    alice.close(reason)
    server.expect("Alice left before you answered")
    assert (f"Alice left: {reason}" in server.stdout) == shown
    assert (reason in server.stdout) == shown


def test_without_a_terminal_a_new_key_is_shown_and_then_pinned(
    bob: StartBob, start: Start, homes: Path, keys: Keys
) -> None:
    server, client = talk(bob("--once"), start)
    client.end_input()
    assert (client.wait(), server.wait()) == (0, 1)  # nothing was said
    for program, key, role in ((server, keys.alice, Role.BOB), (client, keys.bob, Role.ALICE)):
        told = program.stderr
        assert told.index("This key is new") < told.index(f"  {chat.fingerprint(key)}\nWords: ")
        assert told.index("\nWords: ") < told.index("is pinned")
        assert chat.ssh_line(key) in (homes / role.value / KeyStore.KNOWN_PEERS).read_text()
    (words,) = {re.findall("^Words: (.*)$", told, re.MULTILINE)[0] for told in (server.stderr, client.stderr)}
    assert len(words.split()) == 6


# ----------------------------------------------------------------- what a hostile Alice may try


def test_a_yes_from_before_the_question_is_no_answer(
    bob: StartBob, stranger: Stranger, homes: Path, keys: Keys
) -> None:
    server, port = bob(**WITHOUT_COLOURS)
    server.write("yes\ryes\ryes")
    server.expect("yes\r\nyes\r\nyes")  # the terminal has it
    stranger(port, keys.alice)
    server.expect(QUESTION)
    server.write("\r")  # what stands before this Enter would be the answer
    server.expect("Please answer yes or no")
    assert not is_pinned(homes, Role.BOB)


def test_half_an_answer_to_one_connection_is_none_to_the_next(
    bob: StartBob, stranger: Stranger, homes: Path, keys: Keys
) -> None:
    server, port = bob(**WITHOUT_COLOURS)
    first = stranger(port, keys.alice)
    server.expect(QUESTION)
    server.write("ye")
    server.expect("ye")
    second = stranger(port, keys.alice)
    assert first.receive().text == "you connected again, and go on there"
    server.expect(f"Words: {second.words}")
    server.expect(QUESTION)
    server.write("s\r")
    server.expect("Please answer yes or no")
    assert not is_pinned(homes, Role.BOB)
    server.expect(QUESTION)
    server.write(f"{first.words}\r")
    server.expect("These are other words")
    server.write(f"{second.words}\r")
    server.expect("is pinned")


def test_a_stranger_who_is_asked_about_keeps_other_strangers_out_but_not_a_pinned_alice(
    bob: StartBob, stranger: Stranger, homes: Path, keys: Keys
) -> None:
    server, port = bob(**WITHOUT_COLOURS)
    asked_about = stranger(port, keys.mallory)
    server.expect(QUESTION)
    assert stranger(port, chat.RSA.generate(2048)).receive().text == chat.BUSY
    server.write("yes")
    PinnedPeer(KeyStore(homes / "bob"), "alice").pin(keys.alice)  # in another window
    alice = stranger(port, keys.alice)
    assert asked_about.receive().text == chat.BUSY
    server.expect("with the key you know")
    alice.send("hello")
    server.expect("Alice \u2713 hello")
    server.expect("Bob: ")
    server.write("hello Alice\r")
    assert alice.receive().text == "hello Alice"  # without the "yes" that was meant for the question


def test_who_calls_while_bob_answers_does_not_disturb_him(
    bob: StartBob, stranger: Stranger, homes: Path, keys: Keys
) -> None:
    server, port = bob(**WITHOUT_COLOURS)
    alice = stranger(port, keys.alice)
    server.expect(QUESTION)
    for letter in "yes":
        server.write(letter)
        server.expect(letter)
        caller = stranger(port, keys.mallory)
        assert caller.receive().text == chat.BUSY
        caller.frames.hang_up(DEADLINE)  # and Bob has hung up too
    server.write("\r")
    server.expect("is pinned")
    alice.send("hello")
    server.expect("Alice \u2713 hello")


def test_a_question_is_void_after_some_time_and_asked_again(
    bob: StartBob, stranger: Stranger, homes: Path, keys: Keys
) -> None:
    """Bob was away. That is no answer to the key."""
    server, port = bob(**WITHOUT_COLOURS, python=patched("chat.QUESTION_SECONDS = 1"))
    for _ in range(2):
        alice = stranger(port, keys.alice)
        server.expect(QUESTION)
        assert alice.receive().type is RecordType.CLOSE
        alice.frames.hang_up()
        server.expect("not answered; nothing is pinned")
        server.expect("Waiting for Alice")
    assert not is_pinned(homes, Role.BOB)


def test_a_question_is_void_when_the_connection_is_cut(
    bob: StartBob, stranger: Stranger, homes: Path, keys: Keys
) -> None:
    server, port = bob(**WITHOUT_COLOURS)
    alice = stranger(port, keys.alice)
    server.expect(QUESTION)
    server.write("yes")
    server.expect("yes")
    reset(alice.frames.socket)
    server.expect("Alice left before you answered; nothing is pinned")
    server.expect("Waiting for Alice")
    server.write("\r")
    stranger(port, keys.alice)
    server.expect(QUESTION)
    assert not is_pinned(homes, Role.BOB)


def reset(connected: socket.socket) -> None:
    """Close a connection so that the other side finds it reset."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connected.close()


def test_a_stranger_who_is_gone_at_once_is_never_pinned(
    bob: StartBob, stranger: Stranger, homes: Path, keys: Keys
) -> None:
    """They send hello and READY, as an Alice does, and reset the connection before they hear anything."""
    server, port = bob(**WITHOUT_COLOURS)
    for _ in range(6):
        frames = FrameSocket(socket.create_connection(("127.0.0.1", int(port)), timeout=DEADLINE))
        hello = bytes(frames.receive(chat.HELLO_LIMIT))
        offer = chat.Offer.make(Role.ALICE, keys.mallory, GROUP)
        key, z, th = offer.agree(hello)
        opener = chat.Opener(Role.BOB, key, z, th)
        ready = chat.Sealer(Role.ALICE, keys.mallory, z, th).seal(RecordType.READY, b"", opener)
        frames.send(offer.payload, ready)
        reset(frames.socket)
        server.expect("127.0.0.1: Cut off|Alice left before you answered")
    stranger(port, keys.mallory)
    server.expect("This key is new")
    server.expect(QUESTION)
    assert not is_pinned(homes, Role.BOB)


@pytest.mark.exhaustive
def test_what_is_typed_in_one_burst_with_the_answer_is_not_sent(
    strangers: Callable[..., tuple[Program, Program, str]],
) -> None:
    server, client, _ = strangers()
    server.write("yes\r")
    server.expect("is pinned")
    client.write("yes\rhello\r")
    client.expect("Alice: ")
    client.write("and now\r")
    server.expect("Alice \u2713 (hello)?and now")  # kept or dropped, but not sent


def test_a_no_leaves_no_transcript_and_a_yes_begins_one(
    bob: StartBob, stranger: Stranger, homes: Path, keys: Keys, tmp_path: Path
) -> None:
    folder = tmp_path / "kept"
    server, port = bob("--transcript", str(folder), **WITHOUT_COLOURS)
    mallory = stranger(port, keys.mallory)
    server.expect(QUESTION)
    server.write("no\r")
    assert mallory.receive().text == chat.NOT_ACCEPTED
    mallory.frames.hang_up()
    server.expect("Waiting for Alice")
    assert list(folder.iterdir()) == []
    stranger(port, keys.alice)
    server.expect(QUESTION)
    server.write("yes\r")
    server.expect("Whoever has this file can read the conversation")
    server.expect(r"\(Alice's turn\) ")
    (kept,) = folder.iterdir()
    assert str(kept) in server.stdout.replace("\r\n", "")


@pytest.mark.exhaustive
def test_other_names_of_the_same_key_are_told(start: Start, bob: StartBob, homes: Path, keys: Keys) -> None:
    _, port = bob()
    store = KeyStore(homes / "alice")
    PinnedPeer(store, "[192.0.2.2]:65432").pin(keys.bob)
    PinnedPeer(store, "[192.0.2.3]:65432").pin(keys.mallory)
    client = start("alice_client.py", "127.0.0.1", "--port", port, **WITHOUT_COLOURS)
    client.expect(r"You know the same key as: \[192.0.2.2\]:65432\.")
    client.expect(r"You know other keys as: \[192.0.2.3\]:65432\.")
    client.expect(QUESTION)


# ------------------------------------------------------------------------- --peer, and changed keys


@pytest.mark.parametrize("pinned", [True, *exhaustive(False)])
def test_the_key_that_was_asked_for_is_pinned_unasked_in_place_of_another(
    bob: StartBob, start: Start, homes: Path, keys: Keys, pinned: bool
) -> None:
    server, port = bob("--peer", chat.fingerprint(keys.alice), **WITHOUT_COLOURS)
    name = f"[127.0.0.1]:{port}"
    if pinned:
        PinnedPeer(KeyStore(homes / "bob"), "alice").pin(keys.mallory)
        PinnedPeer(KeyStore(homes / "alice"), name).pin(keys.mallory)
    client = start(
        "alice_client.py", "127.0.0.1", "--port", port, "--peer", chat.fingerprint(keys.bob), **AT_TERMINAL
    )
    for program in (server, client):
        program.expect("with the key you asked for")
    client.expect("Alice: ")
    server.expect(r"\(Alice's turn\) ")
    assert (homes / "bob" / "known_peers").read_text() == f"alice {chat.ssh_line(keys.alice)}\n"
    assert (homes / "alice" / "known_peers").read_text() == f"{name} {chat.ssh_line(keys.bob)}\n"
    client.write("/quit\r")
    assert client.wait() == 0


@pytest.mark.parametrize("how", ["pinned", *exhaustive("asked for")])
def test_no_other_key_is_accepted_by_alice(
    bob: StartBob, start: Start, homes: Path, keys: Keys, how: str
) -> None:
    server, port = bob(**WITHOUT_COLOURS)
    peer = PinnedPeer(KeyStore(homes / "alice"), f"[127.0.0.1]:{port}")
    only = ("--peer", chat.fingerprint(keys.mallory)) if how == "asked for" else ()
    if not only:
        peer.pin(keys.mallory)
    before = peer.pins()
    fails(start("alice_client.py", "127.0.0.1", "--port", port, *only), 3, "^Refused: ")
    assert peer.pins() == before
    server.expect("127.0.0.1: Cut off")
    assert "Alice is here" not in server.stdout


def test_no_other_key_is_accepted_by_bob(bob: StartBob, start: Start, homes: Path, keys: Keys) -> None:
    peer = PinnedPeer(KeyStore(homes / "bob"), "alice")
    peer.pin(keys.mallory)
    before = peer.pins()
    server, port = bob(**WITHOUT_COLOURS)
    client = start("alice_client.py", "127.0.0.1", "--port", port)
    fails(client, 1, "does Bob accept your key")
    assert chat.fingerprint(keys.alice) in client.stderr
    server.expect("127.0.0.1: Refused: ")
    server.expect(re.escape(chat.fingerprint(keys.alice)))
    assert "Alice is here" not in server.stdout
    assert peer.pins() == before


# --------------------------------------------------------------- who comes while somebody is there


def test_another_alice_is_told_that_bob_is_busy_and_bob_afterwards_that_she_called(
    bob: StartBob, start: Start, homes: Path, keys: Keys
) -> None:
    KeyStore(homes / "bob").write(
        KeyStore.KNOWN_PEERS,
        "".join(f"alice {chat.ssh_line(key)}\n" for key in (keys.alice, keys.mallory)).encode(),
    )
    server, first = talk(server_and_port := bob(**WITHOUT_COLOURS), start)
    server.expect(r"\(Alice's turn\) ")
    server.write("a draft")
    server.expect("a draft")
    KeyStore(homes / "other" / "alice").write(KeyStore.IDENTITY, keys.mallory.export_key("PEM", pkcs=8))
    second = start("alice_client.py", "127.0.0.1", "--port", server_and_port[1], home=homes / "other")
    second.expect(chat.BUSY, "stderr")
    assert second.wait() == 1
    assert "You speak first" not in second.stderr
    first.write("still here\n")
    server.expect("Alice \u2713 still here")
    server.expect("Bob: a draft")
    server.write("\r")
    first.expect("^Bob: a draft\n")
    assert "Another Alice" not in server.stdout  # it would come in between what the two say
    first.end_input()
    server.expect("Alice left")
    server.expect("Another Alice called from 127.0.0.1")


@pytest.mark.exhaustive
def test_the_same_alice_who_connects_again_takes_over(bob: StartBob, start: Start) -> None:
    server, first = talk(server_and_port := bob("--once"), start)
    first.write("hello\n")
    server.expect("^Alice: hello\n")
    _, second = talk(server_and_port, start)
    first.expect("^Bob left: you connected again, and go on there", "stderr")
    assert first.wait() == 0
    second.write("back again\n")
    server.expect("^Alice: back again\n")
    second.end_input()
    server.write("good to see you\n")
    assert (second.wait(), server.wait()) == (0, 0)
