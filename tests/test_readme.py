"""What the README says is so: its screens, its commands, its options and its numbers are the programs'."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import mallory
import pytest
from conftest import (
    AT_TERMINAL,
    DEADLINE,
    ROOT,
    Program,
    Start,
    StartBob,
    exhaustive,
    loopback,
    pin_each_other,
    screen,
)
from test_attacks import FRAMES
from weakenings import WEAKENINGS

import crypto_utils as chat

README = (ROOT / "README.md").read_text(encoding="utf-8")
TESTS = Path(__file__).parent
SCRIPTS = pytest.mark.parametrize("script", ["bob_server.py", "alice_client.py"])


# What differs from one run to the next, and what the README has in its place.
NAMED = (
    (
        r"SHA256:[\w+/]{43}",
        (
            "SHA256:oLxJTIyBG1fl86TD4dhuvzOXMe4mBz0ATqKl54jI2Tw",
            "SHA256:T6VD8bbpObQNGhon3+LuB+QUlJ8YNjGIp8GDpOTjsiA",
        ),
    ),
    (r"(?:person|out):  ([a-z]+ [a-z]+ [a-z]+)", ("avis mug wino", "curd hank shaw")),
)


def vectors(name: str) -> Any:
    return json.loads((TESTS / "vectors" / f"{name}.json").read_text(encoding="utf-8"))


def as_in_the_readme(*screens: str) -> list[str]:
    """Replace what differs from one run to the next by the README's examples; the same by the same."""
    text = "\0".join(screens)
    for pattern, examples in NAMED:
        found = list(dict.fromkeys(re.findall(pattern, text)))
        assert len(found) <= len(examples), found
        for n, value in enumerate(found):
            text = text.replace(value, f"\1{n}\1")
        for n, example in enumerate(examples):
            text = text.replace(f"\1{n}\1", example)
    return text.split("\0")


def whole_lines(program: Program) -> str:
    """Return a program's screen; what the edge of the terminal has broken is whole again."""
    columns = program.size[1]
    rows = screen(program).split("\n")
    return "".join(row if len(row) == columns and row.count(" ") < 9 else row + "\n" for row in rows)


@pytest.mark.parametrize("invited", [False, True])
def test_bobs_screen_ends_as_the_readme_shows(start: Start, homes: Path, invited: bool) -> None:
    """Alice is asked about his key too, unless she uses the command that he shows."""
    at_terminal = {"terminal": True, "size": (24, 80), "TERM": "xterm"}
    bob = start("bob_server.py", "--port", "0", "--host", "127.0.0.1", **at_terminal)
    bob.expect("Waiting for Alice")
    (invitation,) = re.findall(r"^  python3 alice_client.py (.*)$", whole_lines(bob), re.MULTILINE)
    address, option, port, peer, fingerprint = invitation.split()
    assert (option, peer) == ("--port", "--peer")
    if invited:
        alice = start("alice_client.py", address, option, port, peer, fingerprint, **at_terminal)
    else:
        alice = start("alice_client.py", option, port, **at_terminal)
        alice.expect("Enter: this machine")
        alice.write("\r")
    shown = r"(?:in person|read them out):\s+([a-z]+ [a-z]+ [a-z]+)\s"
    bobs, alices = bob.expect(shown)[1], alice.expect(shown)[1]
    for program, words in ((bob, alices),) if invited else ((bob, alices), (alice, bobs)):
        program.expect("Type the words")
        program.write(f"{words}\r")
    bob.expect("Alice's turn")
    alice.expect("Alice: ")
    alice.write("hello Bob\r")
    bob.expect("hello Bob")
    bob.expect("Bob: ")
    bob.write("hello Alice\r")
    alice.expect("hello Alice")
    alice.expect("Alice: ")
    alice.write("/quit\r")
    assert alice.wait() == 0
    bob.expect("Alice left")
    his, hers = as_in_the_readme(whole_lines(bob), whole_lines(alice))
    print(his, hers, sep="\n")  # shown with pytest -s, and where they differ
    (recorded,) = re.findall(r"^```\n(Alice is.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert " ".join(recorded.split()) in " ".join(his.split())
    assert ("Type the words" in hers) == (not invited)


def test_what_is_computed_on_paper_is_right() -> None:
    p, q, g, b, a = 23, 11, 2, 5, 7
    group = chat.Group(p, g)
    assert (group.p - 1) // 2 == q
    for text in (f"`p = {p}`", f"`q = {q}`", f"`g = {g}`", f"`b = {b}`", f"`a = {a}`"):
        assert text in README
    assert f"`B = {g}^{b} mod {p} = {pow(g, b, p)}`" in README
    assert f"`A = {g}^{a} mod {p} = {pow(g, a, p)}`" in README
    z = pow(g, a * b, p)
    assert f"`{pow(g, a, p)}^{b} mod {p} = {z}`" in README
    assert f"`{pow(g, b, p)}^{a} mod {p} = {z}`" in README


# ------------------------------------------------------------------------------------ its commands

# Each is run here, in Bob's folder, with what follows it; or by the test, or the script, that is named.
COMMANDS = {
    "printf 'hello\\n' | python3 alice_client.py 192.0.2.7": "",
    "ssh-keygen -p -f identity.pem": " -P '' -N secret",
    "ssh-keygen -y -f identity.pem": " | grep '^ssh-rsa AAAA'",
    "openssl dhparam -out dh_parameters.pem 2048": "test_parameters_that_openssl_wrote",
    "python3 alice_client.py --verify FILE -vv 2> steps.txt": "test_a_record_is_decrypted_as_it_says",
    "python3 tests/illustrate.py talks/*.transcript -o page.html": " && grep -qi doctype page.html",
    "python3 tests/vectors/make.py": "test_the_program_that_made_them_makes_them_again",
    "python3 -m pytest -m exhaustive": ".ci/run",
    "python3 tests/benchmark.py": ".ci/run",
    "ruff check .": ".ci/run",
    "ruff format --check .": ".ci/run",
    "mypy": ".ci/run",
    "bash .ci/run": ".ci/run",
}
RUN_HERE = [command for command, rest in COMMANDS.items() if rest[:1] in ("", " ")]


def test_every_command_of_it_is_run_somewhere() -> None:
    found = re.findall(r"`((?:printf|python3|ssh-keygen|openssl|ruff|mypy|bash)(?: [^`]*)?)`", README)
    hers = {command for command in found if command.startswith("python3 tests/mallory.py")}
    assert set(found) - hers == set(COMMANDS)
    sources = "".join(file.read_text() for file in TESTS.glob("test_*.py"))
    gate = (ROOT / ".ci" / "run").read_text()
    for command, where in COMMANDS.items():
        if where.startswith("test_"):
            assert f"def {where}(" in sources
        elif where == ".ci/run":
            run = re.escape(command.replace("python3", "python"))
            assert command.startswith("bash") or re.search(f"(^| ){run}", gate, re.MULTILINE)


@pytest.mark.parametrize(
    "command",
    [*exhaustive(*(c for c in RUN_HERE if "pytest" in c)), *(c for c in RUN_HERE if "pytest" not in c)],
)
def test_a_command_of_it_does_what_it_says(bob: StartBob, homes: Path, command: str) -> None:
    if not shutil.which(command.split()[0]):
        pytest.skip(f"there is no {command.split()[0]} here")
    port = ""
    if "talks/" in command:
        (homes / "bob" / "talks").mkdir()
        file = bytes.fromhex(vectors("transcripts")["valid"][0]["file"])
        (homes / "bob" / "talks" / "one.transcript").write_bytes(file)
    if "192.0.2.7" in command:
        server, port = bob("--once")
        server.end_input()  # he says goodbye after the first message
        pin_each_other(homes, port)
    here = command.replace("python3", sys.executable)
    for name in ("alice_client", "tests/"):
        here = here.replace(name, str(ROOT / name) + "/" * name.endswith("/"))
    done = subprocess.run(
        here.replace("192.0.2.7", f"127.0.0.1 --port {port}") + COMMANDS[command],
        shell=True,
        cwd=homes / "bob",
        env={**os.environ, "SECURE_CHAT_HOME": str(homes)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stderr


def test_a_record_is_decrypted_as_it_says(start: Start, tmp_path: Path) -> None:
    """A TEXT record of Alice's, with the rows of a screen between quotes."""
    case = vectors("transcripts")["valid"][0]
    file = tmp_path / "one.transcript"
    file.write_bytes(bytes.fromhex(case["file"]))
    program = start("alice_client.py", "--verify", str(file), "-vv")
    assert program.wait() == 0
    keys = re.split(r"alice->bob\b[^\n]*(?=\n +K )", program.stderr)[1]
    _, _, record = program.stderr.partition("alice->bob, TEXT")

    def copied(text: str, name: str) -> str:
        (value,) = re.findall(rf"^  {name} +([0-9a-f]+\n(?: +[0-9a-f]+\n)*)", text, re.MULTILINE)[:1]
        return str(value)

    values = {"K": copied(keys, "K")}
    values.update((name, copied(record, name)) for name in ("nonce", "ciphertext", "tag"))
    assert values["ciphertext"].count("\n") > 1
    typed = "".join(f'export {name}="{value}"\n' for name, value in values.items())
    (block,) = re.findall(r"<!-- recompute -->\n +```sh\n(.*?) +```", README, re.DOTALL)
    done = subprocess.run(
        typed + textwrap.dedent(block).replace("python3", sys.executable),
        shell=True,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    text = next(message["text"] for message in case["messages"] if message["type"] == "TEXT")
    assert text in done.stdout, done.stderr


def test_what_it_says_to_mallory_she_understands() -> None:
    commands = re.findall(r"`python3 tests/mallory.py ?([^`]*)`", README)
    assert len(commands) == 8
    for arguments in commands:
        options = mallory.command_line().parse_args(arguments.split())
        if options.attack:
            checks = [check.name for check in mallory.ATTACKS[options.attack].checks]
            assert list(options.without) == checks[: len(options.without)]
    defaults = mallory.command_line().parse_args([])
    assert f"(`{defaults.home}`, {defaults.listen} and {defaults.bob[1]})" in README


def test_the_set_up_commands_differ_in_what_they_install_and_run() -> None:
    bob, alice, test = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    prefix = "python3 -m venv .venv && . .venv/bin/activate && python3 -m pip install -q -r "
    assert bob == prefix + "requirements.txt && python3 bob_server.py"
    assert alice == prefix + "requirements.txt && python3 alice_client.py"
    assert test.startswith(prefix + "tests/requirements.txt && python3 -m pytest ")


# ------------------------------------------------------------------------------ what it refers to


def test_every_test_and_every_file_that_it_names_exists() -> None:
    defined = {
        name for file in TESTS.glob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    named = set(re.findall(r"`(test_\w+)`", README))
    assert len(named) > 15
    assert named <= defined
    for name in re.findall(r"`((?:tests/)?\w+\.(?:py|mjs|txt|json|md))`", README):
        made_by_the_reader = f" 2> {name}`" in README
        folders = (ROOT, TESTS, TESTS / "vectors")
        assert made_by_the_reader or any((folder / name).exists() for folder in folders), name


def test_every_function_that_it_names_exists() -> None:
    sources = "".join(
        (ROOT / name).read_text() for name in ("crypto_utils.py", "bob_server.py", "alice_client.py")
    )
    explained, _, _ = README.partition("## Meet Mallory")
    for name in re.findall(r"`(?:[A-Z]\w+\.)?([a-z_]{4,})`", explained):
        assert f"def {name}(" in sources or name in ("ciphertext", "nonce"), name


def test_the_steps_go_into_a_file_and_it_names_their_functions(
    bob: StartBob, start: Start, homes: Path, tmp_path: Path
) -> None:
    """Bob's steps are on his screen, Alice's in a file, once they know each other: as the lesson says."""
    assert "Once the two know each other, `2> steps.txt` at the end of a command" in " ".join(README.split())
    steps = tmp_path / "steps.txt"
    server, port = bob("--once", "-v", **AT_TERMINAL)
    pin_each_other(homes, port)
    into_a_file = ("sh", "-c", f'exec "$0" "$@" 2> {steps}', sys.executable)
    client = start("alice_client.py", "127.0.0.1", "--port", port, "-v", python=into_a_file, **AT_TERMINAL)
    client.expect("Alice: ")
    client.write("hello\r")
    server.expect("Bob: ")
    server.write("/quit\r")
    assert (server.wait(), client.wait()) == (0, 0)
    assert "is encrypted" not in client.stdout
    functions = re.findall(r"\[\w+\.py:\s(\w+)\]", server.stdout + steps.read_text())
    assert {"settle", "shared_secret", "seal", "open"} <= set(functions)
    explained, _, _ = README.partition("## The lesson")
    for name in functions:
        assert re.search(rf"`(?:[A-Z]\w+\.)?{name}`", explained), name


@SCRIPTS
def test_it_tells_every_option_and_no_other(script: str) -> None:
    shown = subprocess.run(
        [sys.executable, ROOT / script, "--help"], capture_output=True, text=True, timeout=DEADLINE
    )
    whose = "Bob" if "bob" in script else "Alice"
    told = {
        option
        for options, who in re.findall(r"^\| (`.*?) \| (Bob|Alice|both) \|", README, re.MULTILINE)
        for option in re.findall(r"--[a-z-]+", options)
        if who in (whose, "both")
    }
    assert set(re.findall(r"--[a-z-]+", shown.stdout)) - {"--help", "--verbose"} == told


def test_what_it_counts() -> None:
    bytes_sent = sum(FRAMES.values())
    transcripts = vectors("transcripts")
    for pattern, number in (
        (r"each of the (\d+) bytes", bytes_sent),
        (r"each of (\d+) points", bytes_sent),
        (r"in (\d+) ways", len(WEAKENINGS)),
        (r"(\d+) conversations with every value", len(vectors("conversations")["cases"])),
        (r"(\d+) refusals", len(vectors("refused")["cases"])),
        (r"(\d+) transcripts and \d+ refused", len(transcripts["valid"])),
        (r"transcripts and (\d+) refused", len(transcripts["refused"])),
    ):
        assert re.findall(pattern, " ".join(README.split())) == [str(number)], pattern


def test_its_numbers_are_the_codes() -> None:
    """Thousands may be set apart by a comma."""
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", README)
    limits = (chat.PORT, chat.HELLO_LIMIT, chat.READY_LIMIT, chat.TEXT_LIMIT, chat.RECORD_LIMIT)
    for number in limits:
        assert re.search(rf"\b{number}\b", text), number


@pytest.mark.parametrize("linux", [True, False])
def test_a_goodbye_while_bob_is_asked_is_seen_at_once_only_on_linux(
    monkeypatch: pytest.MonkeyPatch, linux: bool
) -> None:
    """That the line is cut is seen everywhere."""
    if linux and sys.platform != "linux":
        pytest.skip("this is no Linux")
    monkeypatch.setattr(sys, "platform", "linux" if linux else "darwin")
    for said in (b"a goodbye", b""):
        bob, alice = loopback()
        with bob, alice:
            alice.sendall(said)
            alice.shutdown(socket.SHUT_WR)
            assert chat.FrameSocket(bob).has_ended() == (linux or not said)
    bob, alice = loopback()
    with bob:
        alice.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        alice.close()  # which resets the connection
        assert chat.FrameSocket(bob).has_ended()


def test_above_the_banner_bytes_go_in_and_bytes_come_out() -> None:
    """Nothing there prints, asks, parses options, or opens or accepts sockets."""
    above, _, below = (ROOT / "crypto_utils.py").read_text().partition("# " + 98 * "=")
    assert below
    for word in (
        r"\bprint\(",
        r"\binput\(",
        r"argparse\.",
        r"socket\.socket\(",
        "create_connection",
        r"\.accept\(",
    ):
        assert not re.search(word, above), word
    for script in ("bob_server.py", "alice_client.py"):
        assert not re.search(r"^(?:from|import) Crypto\b", (ROOT / script).read_text(), re.MULTILINE)
