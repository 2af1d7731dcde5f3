"""At the keyboard: the prompt, commands, pasting, leaving, and what a screen of any size shows.

With TEST_PYTHON=/path/to/python3 the programs run on that interpreter: one whose readline is libedit, or that
has none. What only GNU readline can do is skipped there.
"""

from __future__ import annotations

import io
import itertools
import os
import pty
import re
import signal
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest
from conftest import (
    AT_TERMINAL,
    DEADLINE,
    PYTHON,
    ROOT,
    WAITING,
    Keys,
    Program,
    Start,
    StartBob,
    Stranger,
    exhaustive,
    patched,
    pin_each_other,
    rests,
    screen,
    talk,
)

import crypto_utils as chat
from crypto_utils import KeyStore, Role

Terminals = Callable[..., "tuple[Program, Program]"]
QUESTION = r"Type the words that \w+ reads, or no:"
HIS_TURN = r"\(Bob's turn; Ctrl-C leaves\)"
WITHOUT_READLINE = (
    PYTHON,
    "-c",
    "import os, runpy, sys; del sys.argv[0]; sys.modules['readline'] = None\n"
    "sys.path.insert(0, os.path.dirname(sys.argv[0])); runpy.run_path(sys.argv[0], run_name='__main__')",
)
TEE = ("bash", "-c", f'{PYTHON} "$0" "$@" | tee')
EDITOR = subprocess.run(
    [PYTHON, "-c", "import readline; print(readline.__doc__)"], capture_output=True, text=True, check=False
).stdout
edits = pytest.mark.skipif(not EDITOR, reason="this Python has no readline")
marks_pastes = pytest.mark.skipif(not EDITOR or "libedit" in EDITOR, reason="this is not GNU readline")
WAYS = [pytest.param((PYTHON,), marks=edits), WITHOUT_READLINE, TEE]
NAMES = ["readline", "without the module", "| tee"]


@pytest.fixture
def start(start: Start) -> Iterator[Start]:
    """Find each terminal, in the end, as it was at the start."""
    programs: list[Program] = []

    def run(*arguments: str, **options: object) -> Program:
        programs.append(start(*arguments, **options))
        return programs[-1]

    yield run
    ours, theirs = pty.openpty()
    for program in (program for program in programs if hasattr(program, "terminal")):
        program.process.terminate()
        program.wait()
        assert termios.tcgetattr(program.terminal) == termios.tcgetattr(theirs)
    os.close(ours)
    os.close(theirs)


# -------------------------------------------------------------------------------------- the prompt


@pytest.mark.parametrize("python", WAYS, ids=NAMES)
def test_a_whole_conversation(bob: StartBob, start: Start, python: tuple[str, ...]) -> None:
    """From the first meeting to the goodbye, at two terminals. With each message a bell rings."""
    options = {**AT_TERMINAL, "NO_COLOR": "1", "python": python}
    server, port = bob("--once", **options)
    client = start("alice_client.py", "127.0.0.1", "--port", port, **options)
    words = {}
    for program in (server, client):
        words[program] = program.expect(r"in person:  (\w+ \w+ \w+)\r\n")[1]
        program.expect(QUESTION)
    for program, other in ((server, client), (client, server)):
        program.write(f"{words[other]}\r")
        program.expect("The key is pinned")
    mark = ":" if python is TEE else " \u2713"
    client.expect("Alice: ")
    for number in range(3):
        client.write(f"hello Bob {number}\r")
        server.expect(f"Alice{mark} hello Bob {number}\r\n")
        server.expect("Bob: ")
        server.write(f"hello Alice {number}\r")
        client.expect(f"Bob{mark} hello Alice {number}\r\n")
        client.expect("Alice: ")
    client.write("/quit\r")
    client.expect("You left")
    server.expect("Alice left")
    assert (client.wait(), server.wait()) == (0, 0)
    assert (client.stdout.count("\a"), server.stdout.count("\a")) == (3, 3)


@pytest.mark.parametrize("python", [WITHOUT_READLINE, TEE], ids=NAMES[1:])
def test_a_nul_in_a_line_is_no_end_of_it(terminals: Terminals, python: tuple[str, ...]) -> None:
    server, client = terminals("--once", python=python, NO_COLOR="1")
    client.write("one\0two\r")
    server.expect(r"Alice.* one\\x00two\r\n")


@pytest.mark.parametrize("python", [WITHOUT_READLINE, TEE], ids=NAMES[1:])
def test_an_answer_that_is_too_long_is_a_wrong_one(
    bob: StartBob, keys: Keys, stranger: Stranger, python: tuple[str, ...]
) -> None:
    server, port = bob(python=python, **AT_TERMINAL)
    guest = stranger(port, keys.alice)
    server.expect(QUESTION)
    server.write(5000 * "x" + "\r")
    server.expect("These are not three words")
    guest.close()


@pytest.mark.parametrize("count", [10, *exhaustive(150)])
def test_every_line_that_is_typed_in_ones_turn_arrives_whole(terminals: Terminals, count: int) -> None:
    """All keys come at once: the first of them is waited for, and the line editor reads it.

    150 rounds are 300 lines: what is lost once in a hundred times is found, but for one time in twenty.
    """
    at_once = patched("chat.Console.drop_typed.__defaults__ = (0.02,)")
    server, client = terminals("--once", python=at_once, NO_COLOR="1")
    for number in range(count):
        for speaker, name, other in ((client, "Alice", server), (server, "Bob", client)):
            speaker.write(f"{number} {name} says it in one go\r")
            other.expect(f"{name} \u2713 {number} {name} says it in one go\r\n")
            other.expect("Bob: " if other is server else "Alice: ")


@pytest.mark.parametrize("python", WAYS, ids=NAMES)
def test_what_is_typed_in_the_other_sides_turn_is_told_once_and_not_kept(
    terminals: Terminals, python: tuple[str, ...]
) -> None:
    server, client = terminals("--once", python=python, NO_COLOR="1")
    client.write("hello\r")
    server.expect("Bob: ")
    client.expect(HIS_TURN)
    client.write("too early\r")
    client.expect(r"\(It is Bob's turn; this is not kept\)")
    client.write("again\rand /quit\r\x04")  # no command either, and no end
    server.write("reply\r")
    client.shows(r"^Bob.* reply\nAlice:\Z")
    client.write("an answer\r")
    server.shows(r"^Alice.* an answer\nBob:\Z")
    assert "early" not in client.stdout
    assert client.stdout.count("not kept") == 1
    assert "turn; " not in screen(client)  # each row of that kind is erased


@pytest.mark.parametrize("when", ["script.connect", "chat.Console.show"])
def test_what_was_typed_before_the_prompt_is_not_sent(
    bob: StartBob, start: Start, homes: Path, when: str
) -> None:
    """Neither before it was clear to whom, nor right after a message, which nobody can have read yet."""
    server, port = bob("--once")
    pin_each_other(homes, port)
    goes_on_when_something_was_typed = patched(
        f"call = {when}",
        f"{when} = lambda *a: (call(*a), print('now'), __import__('select').select([0], [], []))[0]",
    )
    python = goes_on_when_something_was_typed
    client = start("alice_client.py", "127.0.0.1", "--port", port, python=python, **AT_TERMINAL)
    if when == "chat.Console.show":
        client.expect("Alice: ")
        client.write("hello\r")
        server.expect("^Alice: hello\n")
        server.write("really?\n")
    client.expect("now")
    client.write("yes\rye")
    client.expect("Alice: ")
    client.write("no\r")
    server.expect("^Alice: no\n")
    assert server.stdout.count("Alice: ") == (2 if when == "chat.Console.show" else 1)


@pytest.mark.parametrize("python", WAYS[:2], ids=NAMES[:2])
def test_a_line_that_was_begun_when_the_other_side_left_is_shown_and_not_sent(
    terminals: Terminals, python: tuple[str, ...]
) -> None:
    server, client = terminals("--once", python=python)
    client.write("what I was about to say")
    client.expect("about to say")
    server.write("\x03")
    assert server.wait() == 0
    client.write(", and more\r")
    client.shows(
        r"^Not sent: Bob is no longer there\. Your line was:\n  what I was about to say, and more\nBob left"
    )
    assert client.wait() == 1


@edits
def test_keys_of_the_editor(terminals: Terminals) -> None:
    server, client = terminals()
    for typed, sent in (
        ("helo\x7f\x7fllo", "hello"),
        ("two words\x17lines", "two lines"),  # Ctrl-W
        ("\x1b[A\x1b[A!", "hello!"),  # what was sent before that
    ):
        client.write(f"{typed}\r")
        server.expect(re.escape(f"\u2713 \x1b[0m{sent}\r\n"))
        server.expect("Bob: ")
        server.write("\r")
        client.expect("Bob \u2713 ")
        client.expect("Alice: ")


@edits
@pytest.mark.parametrize("name", ["C", *exhaustive("POSIX", "xx_XX.UTF-8", "C.UTF-8")])
def test_backspace_takes_a_letter_in_any_locale(terminals: Terminals, name: str) -> None:
    """Also where the locale is not installed, as in many containers."""
    server, client = terminals("--once", LC_ALL=name, PYTHONIOENCODING="utf-8")
    client.write("gr\u00fc\x7f\u00fcn \u65e5\x7f\U0001f600\x7f!\r")
    server.expect(re.escape("\u2713 \x1b[0mgr\u00fcn !\r\n"))


@pytest.mark.parametrize("python", [WITHOUT_READLINE, *exhaustive((TEE,))], ids=NAMES[1:])
def test_a_line_that_a_terminal_may_have_cut_is_not_sent(
    terminals: Terminals, python: tuple[str, ...]
) -> None:
    """Without readline, a terminal hands over 4,095 bytes, and drops what follows."""
    server, client = terminals("--once", python=python)
    client.write("x")  # before the rest, the terminal has to be in line mode
    client.expect("x")
    client.write("y" * 5000)
    client.write("\r")
    client.expect(r"Not sent: the line is too long for this\s+terminal")
    client.expect("Alice: ")
    client.write("z" * 4094 + "\r")
    server.expect("z" * 60)
    assert "yyy" not in server.stdout


def test_commands_are_not_sent(terminals: Terminals) -> None:
    """What they say, test_messages.py pins."""
    server, client = terminals("--once", NO_COLOR="1")
    client.write("/WORDS \r")
    client.expect(r"Your words: \w+ \w+ \w+\r\n")
    client.shows(r"^Alice:\Z")  # the line is gone
    client.write(" /quti\r")  # with a space before it, it is a message
    server.shows("Alice \u2713  /quti\nBob:\\Z")
    assert server.stdout.count("\u2713") == 1
    server.write("/QUIT \r")
    client.expect("Bob left")
    assert (client.wait(), server.wait()) == (0, 0)


@marks_pastes
@pytest.mark.parametrize("first", [True, *exhaustive(False)], ids=["first key", "later"])
def test_lines_that_are_pasted_together_are_one_message(terminals: Terminals, first: bool) -> None:
    server, client = terminals("--once", NO_COLOR="1")
    client.expect(r"\x1b\[\?2004h")  # the terminal is asked to mark what is pasted
    if not first:
        client.write("x\x7f")
        client.expect("x")
    client.write("\x1b[200~one\rtwo\rthree\r\x1b[201~")  # copied with the end of the last line
    client.expect("three")
    client.write("\r")
    server.shows(r"^Alice \u2713 one\n +\| two\n +\| three\nBob:\Z")


# ------------------------------------------------------------------------ leaving, from anywhere


@pytest.mark.parametrize(
    ("turn", "leaver", "leave"),
    [
        (Role.BOB, Role.ALICE, "\x03"),
        *exhaustive(
            *((turn, leaver, "\x03") for turn, leaver in ((Role.ALICE, Role.BOB), *zip(Role, Role))),
            *((role, role, leave) for role in Role for leave in ("\x04", "/quit\r", "half a line\x03")),
        ),
    ],
)
def test_leaving_in_turn_and_out_of_turn(terminals: Terminals, leaver: Role, turn: Role, leave: str) -> None:
    server, client = terminals("--once")
    client.write("hello\r")
    server.expect("Bob: ")
    client.expect(HIS_TURN)
    if turn is Role.ALICE:
        server.write("hello\r")
        server.expect(WAITING)
        client.expect("Alice: ")
    leaving, other = (server, client) if leaver is Role.BOB else (client, server)
    if leave.startswith("half"):
        leaving.write("half a line")
        leaving.expect("half a line")
    rests(leaving)
    leaving.write(leave.replace("half a line", ""))
    leaving.expect("You left")
    other.expect(f"{leaver.value.title()} left")
    assert (client.wait(), server.wait()) == (0, 0)
    assert screen(leaving).endswith("\nYou left.")


PLACES = {
    "the address": ("alice_client.py", (), r"Bob's address .*: "),
    "the search": ("bob_server.py", ("--port", "0", "--dh-bits", "4096"), "Searching"),
    "waiting for Alice": ("bob_server.py", ("--port", "0"), "Ctrl-C ends"),
    "the passphrase": ("alice_client.py", ("127.0.0.1",), "Passphrase .*: "),
}


@pytest.mark.parametrize(
    ("place", "key"),
    [
        *itertools.product(("the address", "waiting for Alice", "the passphrase"), ["\x03"]),
        *exhaustive(("the search", "\x03"), ("the address", "\x04"), ("the passphrase", "\x04")),
    ],
)
def test_ctrl_c_and_ctrl_d_outside_of_a_conversation(
    start: Start, homes: Path, keys: Keys, place: str, key: str
) -> None:
    script, arguments, pattern = PLACES[place]
    locked = keys.alice.export_key("PEM", passphrase="open", pkcs=8)
    KeyStore(homes / "alice").write(KeyStore.IDENTITY, lambda: locked)
    program = start(script, *arguments, **AT_TERMINAL)
    program.expect(pattern)
    rests(program)
    program.write(key)
    assert program.wait() == (1 if (place, key) == ("the passphrase", "\x04") else 130)
    assert re.search(r"[\r\n](\x1b\[\?2004l)?\Z", program.stdout)  # the shell's prompt begins a row


def test_ctrl_c_right_after_a_prompt_is_shown_ends_its_row(start: Start) -> None:
    interrupted = patched(
        "import os",
        "show = chat.Console.show_row",
        "chat.Console.show_row = lambda console, text: (show(console, text), os.kill(os.getpid(), 2))",
    )
    program = start("alice_client.py", python=interrupted, **AT_TERMINAL)
    assert program.wait() == 130
    assert re.search(r"[\r\n](\x1b\[\?2004l)?\Z", program.stdout)


def test_ctrl_c_in_the_search_ends_it_wherever_it_comes(start: Start) -> None:
    """Here it comes when the main thread has just taken a lock for which the other threads wait."""
    interrupted = patched(
        "import os, threading",
        "enter, seen = threading.Condition.__enter__, []",
        "def interrupt(condition):",
        "    value = enter(condition)",
        "    if sys._getframe(1).f_code.co_name == 'acquire':  # of the semaphore, when work is handed out",
        "        seen.append(condition)",
        "        if len(seen) == 9:  # then there are threads",
        "            os.kill(os.getpid(), 2)",
        "    return value",
        "threading.Condition.__enter__ = interrupt",
    )
    program = start("bob_server.py", "--port", "0", "--dh-bits", "3072", python=interrupted)
    program.expect("Searching", "stderr")
    assert program.wait() == 130


@pytest.mark.parametrize("number", [signal.SIGHUP, *exhaustive(signal.SIGTERM, signal.SIGQUIT)])
def test_a_signal_ends_a_conversation_with_a_goodbye(terminals: Terminals, number: int) -> None:
    server, client = terminals()
    rests(server)
    server.process.send_signal(number)
    assert (client.wait(), server.wait()) == (1, 0)  # nothing had been said
    # The goodbye has taken the place of the prompt.
    assert re.search(r"can type\.\n?Bob left before anything was said\.\Z", screen(client))


def test_a_second_signal_ends_at_once_and_puts_the_terminal_back(
    bob: StartBob, stranger: Stranger, homes: Path, keys: Keys
) -> None:
    """The first one's goodbye has no end here: the other side does not hang up."""
    server, port = bob(python=patched(f"chat.Channel.close.__defaults__ = ({DEADLINE},)"), **AT_TERMINAL)
    pin_each_other(homes, port)
    alice = stranger(port, keys.alice)
    server.expect(WAITING)
    rests(server)
    server.process.send_signal(signal.SIGINT)
    assert alice.receive().type is chat.RecordType.CLOSE
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 128 + signal.SIGTERM
    assert "You left" not in server.stdout


def test_a_second_signal_while_the_terminal_is_put_back(bob: StartBob, start: Start, homes: Path) -> None:
    _, port = bob("--once")
    pin_each_other(homes, port)
    interrupted = patched(
        "import os, termios",
        "put, sent = termios.tcsetattr, []",
        "second = lambda: (sent.append(1), os.kill(os.getpid(), 15))",
        "termios.tcsetattr = lambda *a: (sent or not a[2][3] & termios.ECHO or second(), put(*a))",
    )
    client = start("alice_client.py", "127.0.0.1", "--port", port, python=interrupted, **AT_TERMINAL)
    client.expect("Alice: ")
    rests(client)
    client.write("\x03")
    assert client.wait() == 128 + signal.SIGTERM


# ------------------------------------------------------------------- what else a terminal does


@edits
def test_a_signal_and_fg_in_one_moment_while_a_line_is_edited(terminals: Terminals) -> None:
    server, client = terminals("--once")
    client.write("half a line")
    client.expect("half a line")
    rests(client)
    for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGCONT):
        client.process.send_signal(number)
    client.expect("You left")
    assert (client.wait(), server.wait()) == (0, 1)


def test_fg_while_something_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A screen that was stopped is written to when the program goes on, and again by the prompt's handler."""
    ours, theirs = pty.openpty()

    class Stopped(io.FileIO):
        def write(self, data: bytes) -> int:
            console.on_continue()
            return super().write(data)

    console = chat.Console(Role.ALICE)
    console.screen = io.TextIOWrapper(io.BufferedWriter(Stopped(theirs, "w")), "utf-8")
    console.has_prompt, console._row = True, "Alice: "
    console.write("Bob left.\n", console.screen)
    shown = b""
    while not shown.endswith(b"\n"):
        shown += os.read(ours, 1000)
    assert shown == b"\rAlice: \r       \rBob left.\r\n"
    os.close(ours)
    console.screen.close()


@pytest.mark.parametrize("turn", [Role.ALICE, *exhaustive(Role.BOB)])
def test_ctrl_z_and_fg_bring_the_prompt_and_the_line_back(
    bob: StartBob, start: Start, homes: Path, turn: Role
) -> None:
    pytest.importorskip("pyte", reason="python3 -m pip install pyte")  # before there is a shell to be left
    server, port = bob("--once")
    pin_each_other(homes, port)
    job = '"$0" "$@"; echo "the shell"; read; fg; echo "status $?"'
    shell = ("bash", "--norc", "--noprofile", "-ic", job, PYTHON)
    client = start("alice_client.py", "127.0.0.1", "--port", port, python=shell, **AT_TERMINAL)
    client.expect("Alice: ")
    if turn is Role.BOB:
        client.write("hello\r")
        client.expect(HIS_TURN)
    else:
        client.write("a line")
        client.shows("Alice: a line$")
    client.write("\x1a")
    client.expect("the shell")
    client.write("\r")
    if turn is Role.BOB:
        client.shows(r"^the shell\n(.*\n)*\(Bob's turn; Ctrl-C leaves\)\Z")
    else:
        client.shows(r"^the shell\n(.*\n)*Alice: a line\Z")
        client.write("\x15another line and more\x17\x17\r")  # what is rubbed out is not sent
    server.expect("^Alice: (hello|another line ?)$")
    server.write("reply\n")
    client.shows(r"^Bob \u2713 reply\nAlice:\Z")
    client.write("/quit\r")
    client.expect("status 0")


@pytest.mark.parametrize("size", [(10, 20), *exhaustive(((24, 40),), ((50, 300),), ((3, 2),))])
def test_no_word_of_a_message_is_lost_in_windows_of_any_size(
    bob: StartBob, start: Start, size: tuple[int, int]
) -> None:
    """Every further row of a message begins with the bar, whatever COLUMNS says."""
    options = {**AT_TERMINAL, "size": size, "NO_COLOR": "1", "COLUMNS": "200"}
    server, client = talk(bob("--once", **options), start)
    words = [f"word{n}" for n in range(30)]
    client.write(" ".join(words) + "\n")
    if size[1] < 20:  # no room for a word
        server.expect("29")
        return
    server.expect("Bob: ")
    shown = screen(server, 500).split("\n")
    first = next(n for n, row in enumerate(shown) if row.startswith("Alice \u2713"))
    last = next(n for n, row in enumerate(shown) if n > first and row.startswith("Bob:"))
    assert all(row.startswith("      |") for row in shown[first + 1 : last])
    assert [word for row in shown[first:last] for word in row[7:].split()] == words


def test_through_tee_every_further_row_has_its_bar_though_the_steps_go_elsewhere(
    bob: StartBob, start: Start, homes: Path
) -> None:
    server, port = bob("--once")
    pin_each_other(homes, port)
    python = ("bash", "-c", f'{PYTHON} "$0" "$@" 2> /dev/null | tee')
    client = start("alice_client.py", "127.0.0.1", "--port", port, python=python, **AT_TERMINAL)
    client.write("hello\r")
    server.expect("^Alice: hello$")
    server.write(20 * "Bob says " + "\n")
    client.expect(r"Bob: (Bob says )+\r\n   \| Bob says ")


def is_broken_at_words(program: Program) -> bool:
    """Whether no row is wider than the terminal but for fingerprints, paths, commands and what was typed."""
    rows = re.split(r"[\r\n]", re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", program.stdout))
    wide = [row for row in rows if len(row) > program.size[1]]
    allowed = rf"  (SHA256:|/\S+$|python3 |--peer| +\(/\S+, line \d+\)$)|(Alice|Bob): |{QUESTION} "
    assert all(re.match(allowed, row) for row in wide), wide
    return True


def test_what_the_programs_say_is_broken_at_words_from_40_columns_on(
    bob: StartBob, start: Start, homes: Path, keys: Keys
) -> None:
    options = {**AT_TERMINAL, "size": (24, 40), "NO_COLOR": "1"}
    server, port = bob("--transcript", str(homes / "kept"), **options)
    client = start("alice_client.py", "127.0.0.1", "--port", port, **options)
    words = {}
    for program in (server, client):
        found = program.expect(rf"in\s+person:\s+(\w+)\s+(\w+)\s+(\w+)\s+{QUESTION}")
        words[program] = " ".join(found.groups())
    for typed, told in (("may be not", "do not"), (words[server], "key is pinned")):
        client.write(f"{typed}\r")
        client.expect(told)
        client.expect(f"{QUESTION}|Alice: ")
    server.write(f"{words[client]}\r")
    server.expect(WAITING)
    server.write("too early\r")
    server.expect("not kept")
    client.write("/help\r")
    client.expect("space\\s+before")
    client.expect("Alice: ")
    client.write("hello\r")
    client.expect(HIS_TURN)
    server.expect("Bob: ")
    client.write("\x03")
    assert client.wait() == 0
    server.expect("Waiting for Alice")
    (file,) = (homes / "kept").iterdir()
    verdict = start("alice_client.py", "--verify", str(file), **options)
    assert verdict.wait() == 0
    (homes / "alice" / "known_peers").write_text(f"[127.0.0.1]:{port} {chat.ssh_line(keys.mallory)}\n")
    refused = start("alice_client.py", "127.0.0.1", "--port", port, **options)
    assert refused.wait() == 3
    assert all(map(is_broken_at_words, (server, client, verdict, refused)))


@pytest.mark.parametrize("script", ["bob_server.py", *exhaustive("alice_client.py")])
@pytest.mark.parametrize("columns", [40, *exhaustive(80, 2)])
def test_help_fits_the_screen(start: Start, script: str, columns: int) -> None:
    program = start(script, "--help", terminal=True, size=(24, columns), COLUMNS="")
    assert program.wait() == 0
    rows = [row for row in program.stdout.split("\r\n") if not row.startswith("  python3 ")]
    assert columns < 40 or max(map(len, rows)) <= columns


# ------------------------------------------------------------------------------ scripts of the world

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # man, woman, girl, joined


@pytest.mark.parametrize(
    ("locale", "text", "width"),
    [
        ("en_US", "plain", 5),
        ("en_US", "\u043f\u0440\u0438\u0432\u0435\u0442", 6),  # Russian
        ("en_US", "\u03b3\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5", 8),  # Greek
        ("en_US", "\u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd", 4),  # Hebrew, with points
        ("en_US", "\u0645\u06cc\u200c\u0631\u0648\u0645", 5),  # Persian, with a joiner
        ("en_US", "\u00fcber n\u0303 e\u0301t\u00e9", 10),
        ("en_US", "\u6f22\u5b57\u3000\uff01\ud55c\U0001f600", 12),
        ("en_US", "\u0939\u093f", 2),  # Hindi: a letter, and a vowel that takes a column of its own
        ("en_US", "\U0001f1e9.", 3),  # half a flag
        *((locale, "\u00b1\u03b1\u042f\u2460x", 9) for locale in ("ja_JP.UTF-8", "zh_TW.UTF-8", "ko_KR")),
        ("de_DE", "\u00b1\u03b1\u042f\u2460x", 5),
    ],
)
def test_how_many_columns_a_text_takes(
    monkeypatch: pytest.MonkeyPatch, locale: str, text: str, width: int
) -> None:
    """What is ambiguous is wide in Chinese, Japanese and Korean only."""
    monkeypatch.setattr(chat.locale, "setlocale", lambda *_: locale)
    monkeypatch.setattr(chat, "_width", chat._width.__wrapped__)
    line = text * (40 // width)
    assert chat.screen_lines(line, width * (40 // width)) == [line]
    assert len(chat.screen_lines(line, width * (40 // width) - 1)) == 2


@pytest.mark.parametrize(
    "unit",
    [
        FAMILY,
        "\U0001f44d\U0001f3fd",
        "\U0001f1e9\U0001f1ea",
        "e\u0301\u0308",
        "\u2764\ufe0f",
        "\u0915\u094d\u200d",
    ],
    ids=["a family", "a skin colour", "a flag", "two accents", "a heart", "Hindi"],
)
def test_what_is_one_letter_or_emoji_stays_whole_at_the_end_of_a_row(unit: str) -> None:
    for offset in range(9):
        rows = chat.screen_lines("x" * offset + unit * 50, 20)
        assert len(rows) > 1
        assert "".join(rows) == "x" * offset + unit * 50
        assert all(row.lstrip("x").replace(unit, "") == "" for row in rows)


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
def test_colour_and_check_mark(bob: StartBob, start: Start, environment: dict[str, str], mark: str) -> None:
    server, client = talk(bob("--once", terminal=True, **environment), start)
    client.write("hello\n")
    server.expect(re.escape(mark))
    assert mark.startswith("\x1b") or "\x1b[32m" not in server.stdout


@pytest.mark.parametrize("encoding", ["ascii", *exhaustive("utf-8", "latin-1")])
@pytest.mark.parametrize("pipes", ["printf 'hi\\n' | {}", "{} | cat"])
def test_no_row_of_the_peers_imitates_the_program_where_one_end_is_a_pipe(
    start: Start, bob: StartBob, homes: Path, pipes: str, encoding: str
) -> None:
    """What is printed may be longer than what came."""
    server, port = bob("--once")
    pin_each_other(homes, port)
    program = f"{PYTHON} {ROOT / 'alice_client.py'} 127.0.0.1 --port {port}"
    shell = f"{pipes.format(program)}; true #"
    client = start("-", python=("bash", "-c", shell), PYTHONIOENCODING=encoding, **AT_TERMINAL)
    if pipes.startswith("{}"):
        client.expect("Alice: ")
        client.write("hi\r")
    server.expect("^Alice: hi")
    server.write(("\u20ac" * 7 + "Broken off: the record's signature is not valid. ") * 9 + "\n")
    server.end_input()
    if pipes.startswith("{}"):
        client.expect("Alice: ")
        client.write("\r")
    client.wait()
    rows = [row for row in screen(client).split("\n") if re.search("Broken|signature|valid", row)]
    assert rows
    assert all(re.match(r"Bob|   ? ? ?\|", row) for row in rows), rows
