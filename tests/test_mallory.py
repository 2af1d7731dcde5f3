"""Mallory against the two programs: each attack is refused by the check that her table names, by the next one
when that is taken away, and succeeds without all of them.
"""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, NamedTuple

import pytest
from conftest import ROOT, Keys, Program, Start
from mallory import ATTACKS, BOB, EARLIER, REPLY, REQUEST, Attack

import crypto_utils as chat

MALLORY = ROOT / "tests" / "mallory.py"
QUICK = ("mitm", "ciphertext")  # plain pytest tries the first check of these
STAGES = [(name, n) for name, attack in ATTACKS.items() for n in range(len(attack.checks) + 1)]

Statuses = tuple["int | None", "int | None"]


class Scene(NamedTuple):
    """Mallory and Bob, both waiting, and how an Alice is started who connects to Mallory."""

    mallory: Program
    bob: Program
    new_alice: Start


@pytest.fixture
def scene(start: Start, homes: Path, keys: Keys) -> Iterator[Callable[..., Scene]]:
    """Return a function that prepares an attack on programs without some checks; copies are removed."""
    copies: list[Path] = []

    def run(attack: Attack | None, without: tuple[str, ...] = ()) -> Scene:
        with socket.socket() as reserved:  # bound, not listening: Bob's port, before his copy is there
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reserved.bind(("127.0.0.1", 0))
            bobs_port = str(reserved.getsockname()[1])
            options = ["--listen", "0", "--bob", f"127.0.0.1:{bobs_port}"]
            options += ["--without", ",".join(without)] if without else []
            mallory = start("tests/mallory.py", *options, *([attack.name] if attack else []))
            port = mallory.expect(r"\AListening on 127\.0\.0\.1 port (\d+)$")[1]
            folder = ""
            if without:
                folder = mallory.expect(r"^  cd (\S+) && python3 bob_server\.py")[1] + "/"
                copies.append(Path(folder))
                shutil.copytree(homes, copies[-1] / "home")
            once = ("--once",) if attack and not attack.needs_earlier else ()
            bob = start(f"{folder}bob_server.py", "--host", "127.0.0.1", "--port", bobs_port, *once)
            bob.expect("Waiting for Alice", "stderr")
            if without:
                assert bob.stderr.startswith("A broken copy, for a lesson.")
        peer = ("--peer", chat.fingerprint(keys.bob)) if attack and attack.needs_peer else ()
        alice = f"{folder}alice_client.py", f"127.0.0.1:{port}", *peer
        return Scene(mallory, bob, lambda **options: start(*alice, **options))

    yield run
    for copy in copies:
        shutil.rmtree(copy)


def say(program: Program, text: str) -> None:
    program.write(f"{text}\n")


def attacked(scene: Scene, attack: Attack, shown: tuple[str, ...]) -> Program:
    """Hold the conversation that is attacked, and the one before if it needs one. Return Alice."""
    mallory, bob, new_alice = scene
    if attack.needs_earlier:
        alice = new_alice()
        say(alice, EARLIER)
        say(bob, REPLY)
        alice.end_input()
        assert alice.wait() == 0
        mallory.expect("Start Alice again")
    if attack.leaves_early:  # at a terminal, where it can be seen that her message is on its way
        alice = new_alice(terminal=True)
        alice.expect("yes or no")
        alice.write("yes\r")
        alice.expect("Alice: ")
        alice.write(f"{REQUEST}\r")
        mallory.expect(r"^\*\*\* ")
        if chat.ALWAYS_PROMPT:
            alice.expect(r"\(Bob's turn\) ")
        alice.write("\x03")
        return alice
    alice = new_alice()
    say(alice, REQUEST)
    for text in shown:
        bob.expect(f"^Alice: {text}$")
    say(bob, REPLY)
    alice.end_input()
    return alice


def statuses(scene: Scene, alice: Program, expected: Statuses) -> Statuses:
    """Return the exit statuses of Bob and Alice, None for a Bob who waits for the next Alice."""
    status = alice.wait()
    if expected[0] is not None:
        return scene.bob.wait(), status
    assert scene.bob.process.poll() is None
    scene.bob.process.terminate()
    assert scene.bob.wait() == 130
    return None, status


def was_shown(scene: Scene, alice: Program, attack: Attack, shown: tuple[tuple[str, ...], ...]) -> bool:
    """Whether Bob and Alice have this on standard output."""
    at_bob = (EARLIER, *shown[0]) if attack.needs_earlier else shown[0]
    return scene.bob.stdout == "".join(f"Alice: {text}\n" for text in at_bob) and (
        attack.leaves_early or alice.stdout == "".join(f"Bob: {text}\n" for text in shown[1])
    )


def check_stage(scene: Callable[..., Scene], name: str, n: int) -> None:
    """Attack programs that lack the first n checks."""
    attack = ATTACKS[name]
    there = scene(attack, tuple(check.name for check in attack.checks[:n]))
    mallory, bob, _ = there
    refused = n < len(attack.checks)
    succeeds = not refused and not attack.still_refused
    before_the_reply = attack.shown[0][:1] if attack.before[1] else attack.shown[0]
    alice = attacked(there, attack, before_the_reply if succeeds else ())
    if refused:
        check = attack.checks[n]
        victim = bob if check.side is BOB else alice
        victim.expect(re.escape(check.reason), "stderr")
        assert statuses(there, alice, check.statuses) == check.statuses
        assert n > 0 or was_shown(there, alice, attack, attack.before)
        look = f"{check.side.value.title()}'s screen. The check {check.name} refuses"
    elif succeeds:
        assert statuses(there, alice, attack.statuses) == attack.statuses
        assert was_shown(there, alice, attack, attack.shown)
        look = f"Nothing refuses it. {attack.success}"
    else:
        victim = bob if attack.checks[-1].side is BOB else alice
        victim.expect("Broken off: |Cut off: ", "stderr")
        assert (victim.stdout, alice.wait()) == ("", 1)
        look = attack.still_refused
    assert mallory.wait() == 0
    told = " ".join(mallory.stdout.split())
    assert look in told
    if attack.reads and succeeds:
        assert f"I can read it. Alice: {REQUEST}" in told
        assert f"I can read it. Bob: {REPLY}" in told


@pytest.mark.parametrize("name", QUICK)
def test_an_attack_is_refused(scene: Callable[..., Scene], name: str) -> None:
    check_stage(scene, name, 0)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "n"), STAGES)
def test_an_attack_is_refused_by_one_check_after_the_other_and_then_succeeds(
    scene: Callable[..., Scene], name: str, n: int
) -> None:
    check_stage(scene, name, n)


def test_the_list_names_every_attack_and_every_check_within_80_columns() -> None:
    """And neither pytest nor what belongs to the tests is needed for that."""
    without_tests = (
        "import runpy, sys; sys.modules['pytest'] = sys.modules['conftest'] = None; "
        f"sys.argv = ['mallory.py', '--list']; sys.path.insert(0, {str(MALLORY.parent)!r}); "
        f"runpy.run_path({str(MALLORY)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", without_tests], capture_output=True, text=True, check=True)
    assert max(map(len, done.stdout.splitlines())) <= 80
    for attack in ATTACKS.values():
        _, _, described = done.stdout.partition(f"\n{attack.name}\n    ")
        described, _, _ = described.partition("\n\n")
        assert attack.sentence in " ".join(described.split())
        assert re.findall(r"^    \d\. (\S+)", described, re.MULTILINE) == [c.name for c in attack.checks]


def test_without_an_attack_she_listens(scene: Callable[..., Scene]) -> None:
    """She sees both hellos, and how long the rest is; everything arrives, and she waits for the next one."""
    there = scene(None)
    mallory, bob, new_alice = there
    for _ in range(2):
        alice = new_alice()
        say(alice, REQUEST)
        alice.end_input()
        say(bob, REPLY)
        assert alice.wait() == 0
        assert alice.stdout == f"Bob: {REPLY}\n"
        bob.expect(f"^Alice: {REQUEST}$")
        mallory.expect("The connection is over")
    for seen in (r"Bob -> Alice +hello", "nonce_B", "p  ", "g  ", "B  ", r"RSA_bob +SHA256:"):
        assert re.search(seen, mallory.stdout)
    for seen in (r"Alice -> Bob +hello", "nonce_A", "A  ", r"RSA_alice +SHA256:", "Not to be seen"):
        assert re.search(seen, mallory.stdout)
    assert len(re.findall(r"record \d, 544 bytes", mallory.stdout)) == 2 * 5
    mallory.process.send_signal(signal.SIGINT)
    assert mallory.wait() == 0
    assert REQUEST not in mallory.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("no-such-attack",), "no attack named no-such-attack"),
        (("--without", "tag,no-such-check", "tag"), "no check named no-such-check"),
        (
            ("--without", "what a CLOSE replies to,a CLOSE that crossed a record", "tag"),
            "taken away together",
        ),
        (("--bob", "65432"), "an address is HOST:PORT"),
    ],
)
def test_what_she_does_not_know(start: Start, arguments: tuple[str, ...], told: str) -> None:
    mallory = start("tests/mallory.py", *arguments)
    mallory.expect(told, "stderr")
    assert mallory.wait() == 2


def test_bob_is_not_there(start: Start) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        mallory = start("tests/mallory.py", "--listen", "0", "--bob", f"127.0.0.1:{port}", "tag")
        found = mallory.expect(r"\AListening on 127\.0\.0\.1 port (\d+)$")
        alice = start("alice_client.py", f"127.0.0.1:{found[1]}")
        mallory.expect(f"Bob is not at 127.0.0.1 port {port}")
        assert alice.wait() == 1
    mallory.process.send_signal(signal.SIGINT)
    assert mallory.wait() == 1
