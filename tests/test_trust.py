"""Whose key is it? The other side's words, --peer, changed keys, nobody to ask, and ways around them."""

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
    WAITING,
    Ends,
    Keys,
    Program,
    Start,
    StartBob,
    Stranger,
    exhaustive,
    rests,
)

import crypto_utils as chat
from crypto_utils import FrameSocket, KeyStore, PinnedPeer, RecordType, Role, TrustError

WITHOUT_COLOURS = {**AT_TERMINAL, "NO_COLOR": "1"}
QUESTION = r"Type the words that (Alice|Bob) reads, or no: "
OTHER_WORDS = r"do not belong to this\s+connection"
THREE_WORDS = r"These are not three words"

Strangers = Callable[..., "tuple[Program, Program, str]"]


@pytest.fixture
def strangers(bob: StartBob, start: Start) -> Strangers:
    """Return a function that starts both at terminals, where both are asked; it returns the port too."""

    def run(*arguments: str, both: tuple[str, ...] = ()) -> tuple[Program, Program, str]:
        server, port = bob(*arguments, *both, **WITHOUT_COLOURS)
        client = start("alice_client.py", "127.0.0.1", "--port", port, *both, **WITHOUT_COLOURS)
        server.expect(QUESTION)
        client.expect(QUESTION)
        return server, client, port

    return run


def is_pinned(homes: Path, role: Role) -> bool:
    path = homes / role.value / KeyStore.KNOWN_PEERS
    return path.exists() and path.read_text() != ""


def words_of(program: Program) -> str:
    """Return the words that a program gives to read out."""
    return re.findall(
        r"(?:Read these words to|for your words, read)[^:]*:\s+([a-z]+ [a-z]+ [a-z]+)\r", program.stdout
    )[-1]


def same(told: str) -> str:
    """Return a text in one line, without the rows of a screen."""
    return " ".join(told.split())


# ---------------------------------------------------------------------- the words that are the yes


class Person:
    """In the place of the console: what a person answers, one after the other, and what they are told."""

    peer = "Alice"

    def __init__(self, *answers: str | None) -> None:
        self._answers = list(answers)
        self.told: list[str] = []

    def drop_typed(self) -> None:
        pass

    def prompt(self, question: str, *connections: socket.socket) -> str | None:
        return self._answers.pop(0)

    def notice(self, text: str) -> None:
        self.told.append(text)


@pytest.mark.parametrize(
    "form",
    [
        "{0} {1} {2}",
        "{0}, {1}, {2}.",
        "1. {0} 2. {1} 3. {2}",
        "\u201c{0}\u201d \u2018{1}\u2019 '{2}'!",
        "{0}-{1}\u2014{2}",
        "\u00a0{0}\u00a0{1}\u202f{2}\t",
        "\ufeff{0};{1} / ({2})",
    ],
)
@pytest.mark.parametrize("case", [str.lower, str.upper, str.title])
def test_the_right_words_are_the_right_words_however_they_are_written(
    ends: Ends, form: str, case: Callable[[str], str]
) -> None:
    person = Person(case(form.format(*ends.alice.own_words)))
    chat.ask_for_words(person, ends.bob)
    assert person.told == []


def test_a_goodbye_at_alices_question_ends_it_whether_or_not_the_line_ends(ends: Ends) -> None:
    """The rest of the line's end may come late, or never."""
    ends.bob.sealer.seal(RecordType.CLOSE, b"", ends.bob.opener, ends.bob.frames.send)
    with pytest.raises(chat.NoConversation, match="left, or said no, before you answered; nothing is pinned"):
        chat.ask_for_words(Person(None, " ".join(ends.bob.own_words)), ends.alice)


def test_who_types_other_words_is_told_so_and_never_a_right_one(ends: Ends) -> None:
    right, own = ends.alice.own_words, ends.bob.own_words
    wrong = ["zeta" if word != "zeta" else "yoga" for word in right]
    other = [*right[:2], wrong[2]]
    misheard = (
        "These words do not belong to this connection. A word was misheard, or somebody is in between. "
        "Let Alice read them once more. If they are the same again, answer no."
    )
    usage = "These are not three words (/words shows yours, /quit leaves)."
    asked = [
        *((words, misheard) for words in (other, [wrong[0], *right[1:]], [right[0], wrong[1], right[2]])),
        (right[::-1], misheard),
        (own, f"Those are your words, to read to Alice:  {' '.join(own)}"),
        (["/WORDS"], f"Those are your words, to read to Alice:  {' '.join(own)}"),
        *(([answer], usage) for answer in ("", "yes", "YES", "y", "/help", "SHA256:abc", "1 2 3")),
        (right[:2], usage),
        ([*right, right[0]], usage),
        ([*own, *right], usage),
    ]
    person = Person(*(" ".join(words) for words, _ in asked), " ".join(right))
    chat.ask_for_words(person, ends.bob)
    assert person.told == [told for _, told in asked]
    told = re.findall("[a-z]+", " ".join(person.told))
    assert not set(told) & (set(right) - set(own) - set(re.findall("[a-z]+", misheard + usage)))


def test_typing_the_other_half_of_the_words_pins_and_the_next_time_nobody_is_asked(
    strangers: Strangers, start: Start, homes: Path
) -> None:
    server, client, port = strangers()
    bobs, alices = words_of(server), words_of(client)
    for program, role, others in ((client, Role.ALICE, bobs), (server, Role.BOB, alices)):
        assert not is_pinned(homes, role)
        program.write(f" {others.upper()}, \r")
        program.expect(r"The key is pinned\.")
        assert is_pinned(homes, role)
    client.expect("Alice: ")
    client.write("/quit\r")
    server.expect("Waiting for Alice")
    again = start("alice_client.py", "127.0.0.1", "--port", port, **WITHOUT_COLOURS)
    for program in (again, server):
        program.expect("with the key you know")
    again.expect("Alice: ")
    server.expect(WAITING)  # the other side may be asked, so one's own words are there all the same
    assert len({bobs, alices, words_of(server), words_of(again)}) == 4


def test_nothing_shows_the_words_or_r_before_the_answer(
    strangers: Strangers, homes: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "kept"
    server, client, _ = strangers(both=("-vv", "--transcript", str(folder)))
    before = {program: "".join(program.stdout.split()) for program in (server, client)}
    bobs, alices = words_of(server), words_of(client)
    client.write(f"{bobs}\r")
    client.expect("Alice: ")
    server.write(f"{alices}\r")
    server.expect(WAITING)
    (file,) = folder.glob("*-alice.transcript")
    with file.open("rb") as kept:
        shown = chat.verify_transcript(kept)
        r = next(message.body for opener, message in shown if opener.sender is Role.BOB)
    assert len(r) == 32
    for program, others in ((server, alices), (client, bobs)):
        assert "hello_alice" in before[program]
        assert r.hex() not in before[program]
        for encoded in (others.replace(" ", ""), others.encode().hex()):
            assert encoded not in before[program]


# ------------------------------------------------------------------------------------------- a no

NO = pytest.mark.parametrize(
    ("no", "refuses"),  # what is typed, and whether it is a no; if not, it leaves
    [("no\r", True), *exhaustive((" No.\r", True), ("\x03", False), ("\x04", False), ("/quit\r", False))],
    ids=lambda value: value if type(value) is str else "",
)


@NO
def test_alice_says_no(strangers: Strangers, homes: Path, no: str, refuses: bool) -> None:
    server, client, _ = strangers("--once")
    rests(client)
    client.write(no)
    if refuses:
        client.expect("you did not accept Bob's key; nothing is pinned")
        client.expect(r"on\s+Bob's\s+own\s+screen")
        client.expect(r"start\s+again\s+with\s+--peer\s+and\s+that\s+one")
    assert client.wait() == (3 if refuses else 130)
    assert re.search(r"[\r\n](\x1b\[\?2004[hl]\r?)*\Z", client.stdout)  # at the start of a row
    server.expect("Alice left, or said no, before you answered; nothing is\\s+pinned")
    server.expect("Waiting for Alice")  # a question is no conversation, so --once still waits for one
    assert not is_pinned(homes, Role.ALICE)
    assert not is_pinned(homes, Role.BOB)


@pytest.mark.parametrize("accepts", [False, True], ids=["no", "the words"])
def test_a_first_message_waits_until_bob_has_answered(
    strangers: Strangers, homes: Path, accepts: bool
) -> None:
    server, client, _ = strangers("--once", "--transcript", str(homes / "kept"))
    client.write(f"{words_of(server)}\r")
    client.expect("Bob may still be deciding")
    client.expect("Alice: ")
    client.write("a first message\r")
    client.expect(r"\(Bob's turn")
    server.expect(QUESTION)  # once more: her message waits until it is answered
    assert "a first message" not in server.stdout
    server.write(f"{words_of(client)}\r" if accepts else "no\r")
    if accepts:
        server.expect("Alice \u2713 a first message")
        return
    server.expect("you did not accept Alice's key; nothing is pinned")
    client.expect(r"Bob left before accepting your key, or before\s+anything was said")
    assert client.wait() == 1
    assert "a first message" not in server.stdout
    assert not is_pinned(homes, Role.BOB)
    assert list((homes / "kept").iterdir()) == []
    server.expect("Waiting for Alice")


def test_bob_leaves_while_alice_is_asked(strangers: Strangers, homes: Path) -> None:
    """His goodbye ends her question at once, and the terminal is as it was."""
    server, client, _ = strangers()
    server.write("no\r")
    client.expect("Bob left, or said no, before you answered; nothing is\\s+pinned")
    assert client.wait() == 1
    assert not is_pinned(homes, Role.ALICE)


def test_other_names_of_the_same_key_are_told(start: Start, bob: StartBob, homes: Path, keys: Keys) -> None:
    _, port = bob(**WITHOUT_COLOURS)
    store = KeyStore(homes / "alice")
    PinnedPeer(store, "[192.0.2.2]:65432").pin(keys.bob)
    PinnedPeer(store, "[192.0.2.3]:65432").pin(keys.mallory)
    client = start("alice_client.py", "127.0.0.1", "--port", port, **WITHOUT_COLOURS)
    client.expect(r"Bob is here, with a key that you know as \[192\.0\.2\.2\]:65432:")
    client.expect(QUESTION)
    assert "new to you" not in client.stdout
    assert "192.0.2.3" not in client.stdout


# ----------------------------------------------------------------- what a hostile Alice may try


def test_a_yes_from_before_the_question_is_no_answer(
    bob: StartBob, stranger: Stranger, homes: Path, keys: Keys
) -> None:
    """A no is none either: whatever was typed, it was no answer to what the screen shows now."""
    server, port = bob(**WITHOUT_COLOURS)
    server.write("no\rno\ryes")
    server.expect("no\r\nno\r\nyes")  # the terminal has it
    alice = stranger(port, keys.alice)
    server.expect(QUESTION)
    server.write(f"{' '.join(alice.own_words)}\r")  # what stood before it would spoil it
    server.expect(r"The key is pinned\.")
    assert THREE_WORDS not in server.stdout
    assert "did not accept" not in server.stdout


def test_the_words_of_one_connection_are_none_of_the_next(
    bob: StartBob, stranger: Stranger, homes: Path, keys: Keys
) -> None:
    """Whoever calls at the moment at which Alice is cut off gets neither her place nor her yes."""
    server, port = bob(**WITHOUT_COLOURS)
    first = stranger(port, keys.alice)
    server.expect(QUESTION)
    reset(first.frames.socket)
    server.expect("Alice left, or said no, before you answered")
    server.expect("Waiting for Alice")
    server.write(f"{' '.join(first.own_words)}\r")  # a moment too late
    second = stranger(port, keys.mallory)
    server.expect(QUESTION)
    server.write(f"{' '.join(first.own_words)}\r")
    server.expect(OTHER_WORDS)
    assert not is_pinned(homes, Role.BOB)
    server.expect(QUESTION)
    server.write(f"{' '.join(second.own_words)}\r")
    server.expect(r"The key is pinned\.")


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
        hello = chat.Hello.decode(frames.receive(chat.HELLO_LIMIT))
        hers, exponent, _ = chat.make_hello(Role.ALICE, keys.mallory, GROUP)
        _, th = chat.settle(hello, hers)
        z = chat.shared_secret(exponent, hello)
        opener = chat.Opener(Role.BOB, keys.bob, z, th)
        ready = chat.Sealer(Role.ALICE, keys.mallory, z, th).seal(RecordType.READY, b"", opener)
        frames.send(hers.encode(), ready)
        reset(frames.socket)
        server.expect("Cut off|Alice left, or said no, before you answered")
    stranger(port, keys.mallory)
    server.expect("a key that is new to you")
    server.expect(QUESTION)
    assert not is_pinned(homes, Role.BOB)


# ------------------------------------------------------------------------------- nobody to ask


@pytest.mark.parametrize(
    "redirected", ["< /dev/null", *exhaustive("2> errors")], ids=["standard input", "standard error"]
)
def test_a_terminal_of_which_a_part_is_redirected_is_none_to_ask_at(
    bob: StartBob, start: Start, homes: Path, redirected: str
) -> None:
    _, port = bob(**WITHOUT_COLOURS)
    shell = ("bash", "-c", f'{sys.executable} "$0" "$@" {redirected}'.replace("errors", f"{homes}/errors"))
    client = start("alice_client.py", "127.0.0.1", "--port", port, python=shell, **WITHOUT_COLOURS)
    assert client.wait() == 3
    told = (homes / "errors").read_text() if "errors" in redirected else same(client.stdout)
    assert "is new, and there is no terminal to ask at" in told
    assert not is_pinned(homes, Role.ALICE)


def test_bob_is_asked_where_only_standard_output_is_no_terminal(
    bob: StartBob, stranger: Stranger, homes: Path, keys: Keys
) -> None:
    server, port = bob(**WITHOUT_COLOURS, python=("bash", "-c", f'{sys.executable} "$0" "$@" | cat'))
    alice = stranger(port, keys.alice)
    server.expect(QUESTION)
    assert not is_pinned(homes, Role.BOB)
    server.write(f"{' '.join(alice.own_words)}\r")
    server.expect(r"The key is pinned\.")
    alice.send("hello")
    server.expect("[\r\a]Alice: hello")


# ------------------------------------------------------------------------- --peer, and changed keys


@pytest.mark.parametrize("pinned", [True, *exhaustive(False)])
def test_the_key_that_was_asked_for_is_pinned_unasked_in_place_of_another(
    bob: StartBob, start: Start, homes: Path, keys: Keys, pinned: bool
) -> None:
    server, port = bob("--peer", chat.fingerprint(keys.alice))
    name = f"[127.0.0.1]:{port}"
    if pinned:
        PinnedPeer(KeyStore(homes / "bob"), "alice").pin(keys.mallory)
        PinnedPeer(KeyStore(homes / "alice"), name).pin(keys.mallory)
    client = start("alice_client.py", "127.0.0.1", "--port", port, "--peer", chat.fingerprint(keys.bob))
    for program in (server, client):
        program.expect("with the key you asked for", "stderr")
        program.expect(r"The key is pinned\.", "stderr")
    assert (homes / "bob" / "known_peers").read_text() == f"alice {chat.ssh_line(keys.alice)}\n"
    assert (homes / "alice" / "known_peers").read_text() == f"{name} {chat.ssh_line(keys.bob)}\n"


def test_a_key_that_was_pinned_while_one_was_asked_is_not_replaced(
    strangers: Strangers, homes: Path, keys: Keys
) -> None:
    server, client, _ = strangers()
    other = PinnedPeer(KeyStore(homes / "bob"), "alice")
    other.pin(keys.mallory)
    before = other.pins()
    server.write(f"{words_of(client)}\r")
    server.expect("the key of alice is not the pinned one")
    assert other.pins() == before
    with pytest.raises(TrustError, match="is not the pinned one"):
        other.check(keys.alice)
