"""At the keyboard: the prompt, drafts, commands, pasting, leaving, and what a screen of any size shows."""

from __future__ import annotations

import contextlib
import itertools
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Callable

import pytest
from conftest import (
    AT_TERMINAL,
    DEADLINE,
    ROOT,
    Background,
    Keys,
    Program,
    Start,
    StartBob,
    Stranger,
    exhaustive,
    patched,
    pin_each_other,
    screen,
    talk,
)

import crypto_utils as chat
from crypto_utils import KeyStore, Role

Terminals = Callable[..., "tuple[Program, Program]"]
HIS_TURN, HER_TURN = r"\(Bob's turn\) ", r"\(Alice's turn\) "


def without_escapes(text: str) -> str:
    return re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", text)


# ------------------------------------------------------------------------------ the prompt and drafts


@pytest.mark.parametrize("always", [True, *exhaustive(False)], ids=["GNU readline", "libedit"])
def test_two_people_talk(
    terminals: Terminals, bob: StartBob, start: Start, homes: Path, keys: Keys, always: bool
) -> None:
    """Without the prompt that is always there, it appears in one's own turn."""
    if always:
        server, client = terminals("--once")
    else:
        options = {**AT_TERMINAL, "python": patched("chat.ALWAYS_PROMPT = False")}
        server, port = bob("--once", **options)
        pin_each_other(homes, keys, port)
        client = start("alice_client.py", "127.0.0.1", "--port", port, **options)
        client.expect("Alice: ")
    for number in range(3):
        client.write(f"hello Bob {number}\r")
        server.shows(f"^Alice \u2713 hello Bob {number}\nBob:\\Z")
        server.write(f"hello Alice {number}\r")
        client.shows(f"^Bob \u2713 hello Alice {number}\nAlice:\\Z")
    client.write("/quit\r")
    server.expect("Alice left")
    assert (client.wait(), server.wait()) == (0, 0)
    assert screen(client).endswith("\nAlice: /quit\nYou left.")
    assert ("turn)" in client.stdout) == always


@pytest.mark.parametrize("count", [100, *exhaustive(1000)])
def test_every_key_that_is_typed_is_seen(terminals: Terminals, count: int) -> None:
    """However often the program looks for a message in between."""
    _, client = terminals(python=patched("chat.TICK = 0.0005"))
    before = len(client.stdout)
    for number in range(count):
        client.write("x" if number % 50 else "\x15x")  # Ctrl-U begins a line again
        client.read(0.02)
    client.write("\x15end")
    client.expect("end")
    assert client.stdout[before:].count("x") >= count


def test_what_is_typed_stays_when_a_message_comes(terminals: Terminals) -> None:
    server, client = terminals()
    client.write("hello\r")
    server.expect("Bob: ")
    client.expect(HIS_TURN)
    client.write("half a thought")
    client.shows("half a thought$")
    server.write("hello Alice\r")
    client.shows(r"^Bob \u2713 hello Alice\nAlice: half a thought\Z")
    client.write(", and the rest\r")
    server.expect("half a thought, and the rest\r\n")


def test_enter_out_of_turn_sends_nothing_and_keeps_the_line(terminals: Terminals) -> None:
    server, client = terminals()
    server.write("too early\r")
    server.shows(r"^Not sent: it is Alice's turn.*\n\(Alice's turn\) too early\Z")
    client.write("hello\r")
    server.shows(r"Alice \u2713 hello\nBob: too early\Z")
    assert "too early" not in client.stdout
    server.write(" after all\r")
    client.shows(r"^Bob \u2713 too early after all\n")


@pytest.mark.exhaustive
def test_a_draft_can_be_copied_when_the_other_side_leaves(terminals: Terminals) -> None:
    server, client = terminals("--once")
    server.write("what I was about to say")
    server.shows("about to say$")
    client.write("hello\r")
    server.shows("Bob: what I was about to say$")
    client.write("\x03")
    server.shows("^  what I was about to say\\Z")
    assert (client.wait(), server.wait()) == (0, 0)


def test_a_draft_can_be_copied_when_the_same_alice_takes_over(
    terminals: Terminals, stranger: Stranger, keys: Keys
) -> None:
    server, client = terminals()
    server.write("a draft")
    server.shows("a draft$")
    port = re.search(r"port (\d+)", server.stdout)
    assert port
    again = stranger(port[1], keys.alice)
    client.expect("you connected again")
    assert client.wait() == 1  # nothing had been said
    server.shows(r"^This was not sent:\n  a draft\nAlice is here")
    again.send("here I am")
    server.shows(r"Alice \u2713 here I am\nBob:\Z")


def test_keys_of_the_editor(terminals: Terminals) -> None:
    server, client = terminals()
    for typed, sent in (
        ("helo\x7f\x7fllo", "hello"),
        ("ello\x01h\x05!", "hello!"),  # Ctrl-A, Ctrl-E
        ("two words\x17lines", "two lines"),  # Ctrl-W
        ("gr\u00fcn \U0001f600\x7f", "gr\u00fcn "),
        ("\x1b[A\x1b[A!", "two lines!"),  # what was sent before that
        ("", ""),
    ):
        client.write(typed)
        client.write("\r")
        server.expect(re.escape(f"\u2713 \x1b[0m{sent}\r\n"))
        server.expect("Bob: ")
        server.write("\r")
        client.expect("Bob \u2713 ")
        client.expect("Alice: ")


@pytest.mark.exhaustive
def test_a_message_of_a_mebibyte_is_shown_whole(bob: StartBob, start: Start, homes: Path) -> None:
    server, port = bob(**AT_TERMINAL, NO_COLOR="1")
    _, client = talk((server, port), start)
    server.expect(r"yes or no\? ")
    server.write("yes\r")
    text = "word " * (chat.TEXT_LIMIT // 5)
    writer = Background(lambda: client.write(text + "\n"))
    server.expect("Bob: ")
    writer.result()
    shown = without_escapes(server.stdout).split("Alice \u2713 ")[1]
    assert shown.count("word ") == chat.TEXT_LIMIT // 5


# --------------------------------------------------------------------------------------- commands


def test_commands_are_not_sent(terminals: Terminals) -> None:
    server, client = terminals("--once")
    (words,) = re.findall(r"^Words: ([a-z ]+)", client.stdout, re.MULTILINE)
    for program in (client, server):  # in turn, and out of turn
        program.write("/words\r")
        program.expect(f"Words: {words}")
        program.write("/HELP\r")
        for command in ("/words", "/help", "/quit"):
            program.expect(f"^  {command} ")
        program.write("/etc/passwd\r")
        program.expect("Not sent: .* command")
        program.shows(r"\W /etc/passwd\Z")
    client.write("\x01 \x05\r")  # a space before it
    server.shows("Alice \u2713  /etc/passwd\n")
    assert server.stdout.count("\u2713") == 1
    server.write("\x15 /QUIT \r")
    client.expect("Bob left")
    assert (client.wait(), server.wait()) == (0, 0)


# ---------------------------------------------------------------------------------------- pasting


def test_lines_that_are_pasted_together_are_one_message(terminals: Terminals) -> None:
    server, client = terminals("--once")
    assert "\x1b[?2004h" in client.stdout  # the terminal is asked to mark what is pasted
    client.write("\x1b[200~one\rtwo\rthree\r\x1b[201~")  # copied with the end of the last line
    client.expect("three")
    client.write("\r")
    server.shows(r"^Alice \u2713 one\n +\| two\n +\| three\nBob:\Z")


def test_what_is_pasted_out_of_turn_waits_for_enter(terminals: Terminals) -> None:
    """Its first half comes before the reply, its second half after it."""
    server, client = terminals()
    client.write("hello\r")
    server.expect("Bob: ")
    client.expect(HIS_TURN)
    client.write("\x1b[200~first line\rsecret")
    server.write("reply\r")
    client.write(" half\rmore\x1b[201~")
    client.shows(r"^Bob \u2713 reply\n(.*\n)*.*more\Z")
    client.write(", with Enter\r")
    server.shows(r"Alice \u2713 first line\n +\| secret half\n +\| more, with Enter\nBob:\Z")


@pytest.mark.parametrize("reply", ["late", *exhaustive("early")])
def test_of_a_paste_without_marks_only_what_was_seen_is_sent(
    bob: StartBob, start: Start, homes: Path, keys: Keys, reply: str
) -> None:
    """The reply to the first line may come at any time: no further line of the paste answers it."""
    server, port = bob("--once")
    pin_each_other(homes, keys, port)
    client = start("alice_client.py", "127.0.0.1", "--port", port, **AT_TERMINAL)
    client.expect("Alice: ")
    lines = ["one", *(f"line{n}" for n in range(60 if reply == "early" else 4))]
    if reply == "early":
        server.write("a reply\n" * 60)
    client.write("".join(line + "\r" for line in lines))
    client.shows(f"{lines[-1]}$")
    if reply == "late":
        server.write("a reply\n")
    client.shows(r"\u2713 a reply$")
    client.shows(f"^(Alice:|<).*{lines[-1]}\\Z")
    client.write(" and Enter\r")
    server.expect(r"^Alice: .* and Enter$")
    assert server.stdout.startswith("Alice: one\n")
    assert server.stdout.count("Alice: ") == 2


def test_what_was_typed_before_it_was_clear_to_whom_is_not_sent(
    bob: StartBob, start: Start, homes: Path, keys: Keys
) -> None:
    server, port = bob("--once")
    pin_each_other(homes, keys, port)
    slow = patched(
        "connect = script.connect",
        "script.connect = lambda *a: (print('connecting', flush=True), input(), connect(*a))[-1]",
    )
    client = start("alice_client.py", "127.0.0.1", "--port", port, python=slow, **AT_TERMINAL)
    client.expect("connecting")
    client.write("\rsecret\r")
    client.expect("Alice: ")
    client.write("hello\r")
    server.expect(r"^Alice: .*hello$")
    assert server.stdout.count("Alice: ") == 1


# ------------------------------------------------------------------------ leaving, from anywhere


@pytest.mark.parametrize(
    ("turn", "leaver", "leave"),
    [
        (Role.BOB, Role.ALICE, "\x03"),
        *exhaustive(*itertools.product(Role, Role, ("\x03", "\x04", "/quit\r"))),
    ],
)
def test_leaving_in_turn_and_out_of_turn(terminals: Terminals, leaver: Role, turn: Role, leave: str) -> None:
    server, client = terminals("--once")
    client.write("hello\r")
    server.expect("Bob: ")
    client.expect(HIS_TURN)
    if turn is Role.ALICE:
        server.write("hello\r")
        server.expect(HER_TURN)
        client.expect("Alice: ")
    leaving, other = (server, client) if leaver is Role.BOB else (client, server)
    leaving.write(leave)
    leaving.expect("You left")
    other.expect(f"{leaver.value.title()} left")
    assert (client.wait(), server.wait()) == (0, 0)


@pytest.mark.exhaustive
def test_ctrl_c_in_half_a_line_leaves_that_line_on_the_screen(terminals: Terminals) -> None:
    _, client = terminals("--once")
    client.write("a thought that is longer than that")
    client.expect("than that")
    client.write("\x03")
    assert client.wait() == 0
    assert re.search(r"Alice: a thought that is longer than that(\^C)?\nYou left\.\Z", screen(client))


@pytest.mark.exhaustive
def test_ctrl_d_in_half_a_line_does_not_leave(terminals: Terminals) -> None:
    server, client = terminals("--once")
    client.write("half a line\x04 and the rest\r")
    server.expect("half a line and the rest\r\n")


PLACES = {
    "the address": ("alice_client.py", (), r"Bob's address .*: "),
    "the search": ("bob_server.py", ("--port", "0", "--dh-bits", "2056"), r"\d+ s; \d+% of all searches"),
    "waiting for Alice": ("bob_server.py", ("--port", "0"), "Ctrl-C ends"),
    "the passphrase": ("alice_client.py", ("--home", "locked"), "Passphrase .*: "),
}


@pytest.mark.parametrize(
    "place", [*exhaustive("the search"), *(place for place in PLACES if place != "the search")]
)
@pytest.mark.parametrize("key", ["\x03", "\x04"], ids=["Ctrl-C", "Ctrl-D"])
def test_ctrl_c_and_ctrl_d_outside_of_a_conversation(
    start: Start, homes: Path, keys: Keys, place: str, key: str
) -> None:
    script, arguments, pattern = PLACES[place]
    if key == "\x04" and script == "bob_server.py":
        pytest.skip("Bob reads nothing here")
    locked = KeyStore(homes / "locked" / "alice")
    locked.write(KeyStore.IDENTITY, keys.alice.export_key("PEM", passphrase="open", pkcs=8))
    arguments = tuple(str(homes / "locked") if part == "locked" else part for part in arguments)
    program = start(script, *arguments, **AT_TERMINAL)
    before = termios.tcgetattr(program.terminal)
    program.expect(pattern)
    program.write(key)
    assert program.wait() == (1 if (place, key) == ("the passphrase", "\x04") else 130)
    assert program.stdout.endswith("\r\n")  # the shell's next prompt has a row of its own
    assert termios.tcgetattr(program.terminal) == before


def insist(program: Program, *numbers: int) -> None:
    """Send signals, one right after the other, until the program ends.

    Those that come just before getpass or readline waits for the terminal do not end its wait.
    """
    deadline = time.monotonic() + DEADLINE
    while program.process.poll() is None:
        assert time.monotonic() < deadline
        for number in numbers:
            program.process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.process.wait(1)


@pytest.mark.parametrize("place", ["the passphrase", *exhaustive("the prompt")])
def test_the_terminal_is_as_it_was_after_two_signals_at_once(
    terminals: Terminals, start: Start, homes: Path, keys: Keys, place: str
) -> None:
    if place == "the prompt":
        _, program = terminals()
    else:
        locked = keys.alice.export_key("PEM", passphrase="open", pkcs=8)
        KeyStore(homes / "alice").write(KeyStore.IDENTITY, locked)
        program = start("alice_client.py", "127.0.0.1", **AT_TERMINAL)
        program.expect("Passphrase .*: ")
    insist(program, signal.SIGINT, signal.SIGTERM, signal.SIGINT)
    assert program.wait() == (0 if place == "the prompt" else 130)
    settings = termios.tcgetattr(program.terminal)[3]
    assert settings & termios.ECHO
    assert settings & termios.ICANON


@pytest.mark.parametrize(
    ("victim", "function", "status"),
    [(Role.ALICE, "meet", 0), (Role.BOB, "meet", 0), (Role.BOB, "hanging_up", 130)],
)
def test_ctrl_c_right_after_the_handshake_is_a_goodbye(
    bob: StartBob, start: Start, stranger: Stranger, keys: Keys, victim: Role, function: str, status: int
) -> None:
    interrupted = patched(
        "def interrupt(*_): __import__('os').kill(0, 2); __import__('time').sleep(60)",
        f"chat.{function} = interrupt",
    )
    server, port = bob("--once", **({"python": interrupted} if victim is Role.BOB else {}))
    if victim is Role.BOB:
        alice = stranger(port, keys.alice)
        assert alice.receive().type is chat.RecordType.CLOSE
        alice.frames.hang_up()
        assert server.wait() == status
    else:
        client = start("alice_client.py", "127.0.0.1", "--port", port, python=interrupted)
        server.expect("^Alice left\\.", "stderr")
        assert client.wait() == status


@pytest.mark.parametrize(
    ("terminal", "number"),
    [
        (True, signal.SIGHUP),
        *exhaustive(*itertools.product((False, True), (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))),
    ],
)
def test_a_signal_ends_a_conversation_with_a_goodbye(
    terminals: Terminals, bob: StartBob, start: Start, number: int, terminal: bool
) -> None:
    server, client = terminals() if terminal else talk(bob(), start)
    server.process.send_signal(number)
    client.expect("Bob left", "stdout" if terminal else "stderr")
    assert (client.wait(), server.wait()) == (1, 0)


@pytest.mark.parametrize("number", [signal.SIGINT, *exhaustive(signal.SIGTERM)])
@pytest.mark.parametrize("at", ["a new key", *exhaustive("a message")])
def test_a_stopped_screen_holds_up_nothing(
    bob: StartBob, stranger: Stranger, homes: Path, keys: Keys, number: int, at: str
) -> None:
    """Ctrl-S stops the screen. What comes then is never seen: so nothing is pinned, and a signal ends Bob."""
    if at == "a message":
        (homes / "bob" / "known_peers").write_text(f"alice {chat.ssh_line(keys.alice)}\n")
    server, port = bob(**AT_TERMINAL)
    if at == "a message":
        alice = stranger(port, keys.alice)
        server.expect(HER_TURN)
    server.write("\x13")
    if at == "a message":
        alice.send("line\n" * 10_000)
    else:
        alice = stranger(port, keys.alice)
    insisting = Background(lambda: insist(server, number, number))
    if at == "a message":
        assert alice.receive().type is chat.RecordType.CLOSE
    else:
        with contextlib.suppress(chat.ConnectionCut):  # Bob had not seen yet that she is there
            assert alice.receive().type is chat.RecordType.CLOSE
    alice.frames.hang_up()
    insisting.result()
    if at == "a new key":
        assert not (homes / "bob" / "known_peers").exists()


# ------------------------------------------------------------------- what else a terminal does


def test_ctrl_z_and_fg_bring_the_prompt_and_the_draft_back(
    bob: StartBob, start: Start, homes: Path, keys: Keys
) -> None:
    server, port = bob("--once")
    pin_each_other(homes, keys, port)
    job = '"$0" "$@"; echo "the shell"; sleep 1.5; fg; echo "status $?"'
    client = start(
        "alice_client.py",
        *("127.0.0.1", "--port", port),
        python=("bash", "--norc", "--noprofile", "-ic", job, sys.executable),
        **AT_TERMINAL,
    )
    client.expect("Alice: ")
    client.write("a draft")
    client.shows("Alice: a draft$")
    client.write("\x1a")
    client.expect("the shell")
    client.shows(r"^the shell\n(.*\n)+Alice: a draft\Z")
    client.write(" and more\r")
    server.expect("^Alice: a draft and more\n")
    server.write("reply\n")
    client.expect("reply")
    client.write("/quit\r")
    client.expect("status 0")


@pytest.mark.exhaustive
def test_the_prompt_is_whole_after_a_resize(terminals: Terminals) -> None:
    server, client = terminals()
    client.write("some words of a draft")
    client.shows("of a draft$")
    for columns in (40, 120):
        client.resize(24, columns)
        client.write("!")
        client.shows("Alice: some words of a draft!+$")
    client.write("\r")
    server.expect("some words of a draft!!\r\n")


@pytest.mark.parametrize("size", [(10, 20), *exhaustive(((24, 40),), ((50, 300),))])
def test_no_word_of_a_message_is_lost_in_windows_of_any_size(
    bob: StartBob, start: Start, homes: Path, keys: Keys, size: tuple[int, int]
) -> None:
    """Every further row of a message begins with the bar, whatever COLUMNS says."""
    options = {**AT_TERMINAL, "size": size, "NO_COLOR": "1", "COLUMNS": "200"}
    server, port = bob("--once", **options)
    pin_each_other(homes, keys, port)
    _, client = talk((server, port), start)
    words = [f"word{n}" for n in range(30)]
    client.write(" ".join(words) + "\n")
    server.expect("Bob: ")
    shown = screen(server, 500).split("\n")
    first = next(n for n, row in enumerate(shown) if row.startswith("Alice \u2713"))
    last = next(n for n, row in enumerate(shown) if n > first and row.startswith("Bob:"))
    assert all(row.startswith("      |") for row in shown[first + 1 : last])
    assert [word for row in shown[first:last] for word in row[7:].split()] == words


def is_broken_at_words(program: Program) -> bool:
    """Whether no row is wider than the terminal but for fingerprints, paths and commands."""
    rows = without_escapes(program.stdout).replace("\r", "\n").split("\n")
    wide = [row for row in rows if len(row) > program.size[1]]
    assert all(
        re.match(r"  (SHA256:|/\S+(, line \d+)?$|python3 |pinned:|presented:|asked for:|--peer| +\()", row)
        for row in wide
    ), wide
    return True


@pytest.mark.parametrize("columns", [40, *exhaustive(60)])
def test_what_the_programs_say_is_broken_at_words(
    bob: StartBob, start: Start, homes: Path, keys: Keys, columns: int
) -> None:
    options = {**AT_TERMINAL, "size": (24, columns)}
    server, port = bob("--transcript", str(homes / "kept"), **options)
    client = start("alice_client.py", "127.0.0.1", "--port", port, **options)
    client.expect(r"yes or no\? ")
    client.write("maybe\r")
    client.expect("Please answer")
    client.expect(r"yes or no\? ")
    client.write("yes\r")
    client.expect("Alice: ")
    server.expect(r"yes or no\? ")
    server.write("yes\r")
    server.expect(HER_TURN)
    server.write("/help\r")
    server.expect("/quit")
    server.write("too early\r")
    server.expect("Not sent")
    client.write("hello\r")
    client.expect(HIS_TURN)
    server.expect("Bob: ")
    client.write("\x03")
    assert client.wait() == 0
    server.expect("This was not sent")
    server.expect("Waiting for Alice")
    assert is_broken_at_words(server)
    assert is_broken_at_words(client)


@pytest.mark.parametrize("script", ["bob_server.py", *exhaustive("alice_client.py")])
@pytest.mark.parametrize("columns", [40, *exhaustive(80)])
def test_help_fits_the_screen(start: Start, script: str, columns: int) -> None:
    program = start(script, "--help", terminal=True, size=(24, columns), COLUMNS="")
    assert program.wait() == 0
    assert is_broken_at_words(program)


@pytest.mark.exhaustive
def test_a_changed_key_and_a_verdict_are_broken_at_words(
    bob: StartBob, start: Start, homes: Path, keys: Keys
) -> None:
    options = {**AT_TERMINAL, "size": (24, 40)}
    _, port = bob()
    name = f"[127.0.0.1]:{port}"
    chat.PinnedPeer(KeyStore(homes / "alice"), name).pin(keys.mallory)
    refused = start("alice_client.py", "127.0.0.1", "--port", port, **options)
    assert refused.wait() == 3
    assert is_broken_at_words(refused)
    (homes / "alice" / "known_peers").unlink()
    kept = homes / "kept"
    talker = start("alice_client.py", "127.0.0.1", "--port", port, "--transcript", str(kept))
    talker.expect("You speak first", "stderr")
    talker.write("hello\n")
    talker.process.send_signal(signal.SIGTERM)
    talker.wait()
    (file,) = kept.iterdir()
    verdict = start("alice_client.py", "--verify", str(file), **options)
    assert verdict.wait() == 0
    assert is_broken_at_words(verdict)


# --------------------------------------------------------------------- colours, marks, encodings


@pytest.mark.parametrize(
    ("environment", "mark"),
    [
        ({"TERM": "xterm"}, "\x1b[32mAlice \u2713 \x1b[0mhello"),
        *exhaustive(
            ({"TERM": "xterm", "NO_COLOR": "1"}, "Alice \u2713 hello"),
            ({"TERM": "dumb"}, "Alice \u2713 hello"),
        ),
        ({"TERM": "dumb", "PYTHONIOENCODING": "ascii"}, r"Alice + hello"),
    ],
)
def test_colour_and_check_mark(
    bob: StartBob, stranger: Stranger, homes: Path, keys: Keys, environment: dict[str, str], mark: str
) -> None:
    (homes / "bob" / "known_peers").write_text(f"alice {chat.ssh_line(keys.alice)}\n")
    server, port = bob("--once", terminal=True, **environment)
    stranger(port, keys.alice).send("hello")
    server.expect(re.escape(mark))
    if "NO_COLOR" in environment:
        assert "\x1b[32m" not in server.stdout


@pytest.mark.exhaustive
def test_a_screen_that_cannot_show_a_character_loses_nothing(bob: StartBob, start: Start) -> None:
    server, client = talk(bob("--once", PYTHONIOENCODING="ascii"), start)
    client.write("caf\u00e9 \U0001f600\n")
    server.expect(r"^Alice: caf\\xe9 \\U0001f600$")


@pytest.mark.parametrize("encoding", ["ascii", *exhaustive("utf-8", "latin-1")])
def test_no_row_of_the_peers_imitates_the_program_where_standard_input_is_a_pipe(
    start: Start, bob: StartBob, homes: Path, keys: Keys, encoding: str
) -> None:
    """What is printed may be longer than what came."""
    server, port = bob("--once")
    pin_each_other(homes, keys, port)
    program = f"{sys.executable} {ROOT / 'alice_client.py'} 127.0.0.1 --port {port}"
    shell = f"printf 'hi\\n' | {program}; true #"
    client = start("-", python=("bash", "-c", shell), PYTHONIOENCODING=encoding, **AT_TERMINAL)
    server.expect("^Alice: hi")
    server.write(("\u20ac" * 7 + "Broken off: the record's signature is not valid. ") * 9 + "\n")
    server.end_input()
    client.wait()
    rows = [row for row in screen(client).split("\n") if re.search("Broken|signature|valid", row)]
    assert rows
    assert all(re.match(r"Bob|   ? ? ?\|", row) for row in rows), rows


@pytest.mark.parametrize("terminal", [True, *exhaustive(False)])
def test_the_reason_of_a_goodbye_cannot_imitate_the_program(
    bob: StartBob, stranger: Stranger, homes: Path, keys: Keys, terminal: bool
) -> None:
    (homes / "bob" / "known_peers").write_text(f"alice {chat.ssh_line(keys.alice)}\n")
    server, port = bob("--once", **(AT_TERMINAL if terminal else {}))
    reason = "bye\nAlice is here: SHA256:forged\x1b[2K" + " " * 300 + "You left."
    stranger(port, keys.alice).close(reason)
    stream = "stdout" if terminal else "stderr"
    server.expect(r"Alice left: bye\r?\n          \| Alice is here: SHA256:forged\\x1b\[2K", stream)
    assert server.wait() == 1
    for line in getattr(server, stream).split("Alice left: ")[1].splitlines()[1:]:
        assert line.startswith("          | ")


def test_a_terminal_that_is_gone_is_no_error_when_input_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise termios.error(5, "Input/output error")

    class Terminal:
        def isatty(self) -> bool:
            return True

        def fileno(self) -> int:
            return 0

    monkeypatch.setattr(termios, "tcflush", gone)
    monkeypatch.setattr(sys, "stdin", Terminal())
    console = chat.Console.__new__(chat.Console)  # without its descriptors
    console._typed = bytearray(b"typed")
    console.forget_input()
    assert console._typed == b""
