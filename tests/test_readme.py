"""What the README says is so: its commands are whole, its tests exist, its numbers are the code's."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEADLINE, ROOT
from test_attacks import FRAMES
from test_weakenings import WEAKENINGS

import crypto_utils as chat

README = (ROOT / "README.md").read_text(encoding="utf-8")
TESTS = Path(__file__).parent


def test_every_test_that_it_names_exists() -> None:
    names = set(re.findall(r"`(test_\w+)`", README))
    assert len(names) > 15
    defined = {
        name for file in TESTS.glob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    assert names <= defined


def test_every_file_that_it_names_exists() -> None:
    for name in re.findall(r"`(tests/\w+\.\w+)`", README):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("script", ["bob_server.py", "alice_client.py"])
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
    assert len(shown.stdout.splitlines()) <= 26


def test_its_diagrams_hold_no_sign_that_ends_a_statement() -> None:
    diagrams = re.findall("```mermaid\n(.*?)```", README, re.DOTALL)
    assert len(diagrams) == 2
    assert not any(";" in diagram for diagram in diagrams)


def test_its_numbers_are_the_codes() -> None:
    assert f"each of the {sum(FRAMES.values())} bytes" in README
    assert f"each of {sum(FRAMES.values())} points" in README
    assert f"weakens the code in {len(WEAKENINGS)} ways" in README
    assert str(chat.RECORD_LIMIT) in README
    assert f"port {chat.PORT}" in README
    assert f"refuses a length over its limit before it\nreads on: {chat.HELLO_LIMIT} for a hello" in README
    assert f"{chat.READY_LIMIT} for record 0" in README
    assert f"most {chat.TEXT_LIMIT}\nbytes" in README


def test_both_set_up_commands_differ_in_what_they_install_and_run() -> None:
    run, test = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    prefix = "python3 -m venv .venv && . .venv/bin/activate && python3 -m pip install -q -r "
    assert run == prefix + "requirements.txt && python3 bob_server.py"
    assert test == prefix + "tests/requirements.txt && python3 -m pytest --cov -n auto"
    for name in ("requirements.txt", "tests/requirements.txt"):
        assert (ROOT / name).exists()


def test_the_scripts_say_what_they_need_as_requirements_txt_does() -> None:
    (needed,) = (ROOT / "requirements.txt").read_text().split()
    for script in ("bob_server.py", "alice_client.py"):
        assert f'# dependencies = ["{needed}"]' in (ROOT / script).read_text()


def test_what_both_scripts_share_is_the_same_to_the_letter() -> None:
    """They differ in their names, in what they import, and in how they come to a connection."""

    def definitions(script: str) -> dict[str, str]:
        tree = ast.parse((ROOT / script).read_text())
        return {
            part.name: ast.dump(part)
            for part in tree.body
            if isinstance(part, (ast.FunctionDef, ast.ClassDef))
        }

    bob, alice = definitions("bob_server.py"), definitions("alice_client.py")
    own = {"parse", "run"}
    shared = (bob.keys() & alice.keys()) - own
    assert len(shared) > 15
    assert {name for name in shared if bob[name] != alice[name]} == set()
    assert alice.keys() - bob.keys() == {"ask_host", "connect"}
    assert bob.keys() - alice.keys() == {"group_bits", "listen", "own_address", "load_group", "Door"}


def test_crypto_utils_neither_prints_nor_asks_nor_opens_sockets() -> None:
    source = (ROOT / "crypto_utils.py").read_text()
    for word in (
        r"\bprint\(",
        r"\binput\(",
        "argparse",
        r"socket\.socket\(",
        "create_connection",
        r"\.accept\(",
    ):
        assert not re.search(word, source), word
    for script in ("bob_server.py", "alice_client.py"):
        assert not re.search(r"^(?:from|import) Crypto\b", (ROOT / script).read_text(), re.MULTILINE)
