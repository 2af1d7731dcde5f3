"""Mallory against the two programs: each attack is refused by the check that her table names, by the next one
when that is taken away, and succeeds without all of them.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Callable, NamedTuple

import pytest
from conftest import AT_TERMINAL, DEADLINE, ROOT, Keys, Program, Start, exhaustive, pin_each_other
from mallory import ATTACKS, BOB, EARLIER, LATE, REPLY, REQUEST, WORDS, Attack, Check

import crypto_utils as chat

MALLORY = ROOT / "tests" / "mallory.py"
QUICK = (("mitm", 0), ("mitm", 1), ("ciphertext", 0))  # what plain pytest tries
STAGES = [(name, n) for name, attack in ATTACKS.items() for n in range(len(attack.checks) + 1)]

Statuses = tuple["int | None", "int | None"]


class Scene(NamedTuple):
    """Mallory and Bob, both waiting, and how an Alice is started who connects to Mallory."""

    mallory: Program
    bob: Program
    new_alice: Start
    copy: Path | None


TERMINAL = {**AT_TERMINAL, "NO_COLOR": "1"}


def asks(attack: Attack, without: tuple[str, ...]) -> bool:
    """Whether somebody is asked about a key, so that both are at terminals."""
    return attack.first_meeting or "pin" in without


def a_port() -> socket.socket:
    """Return a socket that is bound and does not listen: a program can have its port, and nobody else."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


@pytest.fixture
def scene(start: Start, homes: Path, keys: Keys) -> Callable[..., Scene]:
    """Return a function that prepares an attack on programs without some checks."""

    def run(attack: Attack | None, without: tuple[str, ...] = ()) -> Scene:
        with a_port() as reserved:  # before Bob's copy is there
            bobs_port = str(reserved.getsockname()[1])
            options = ["--listen", "0", "--bob", f"127.0.0.1:{bobs_port}", "--home", str(homes)]
            options += ["--without", ",".join(without)] if without else []
            mallory = start("tests/mallory.py", *options, *([attack.name] if attack else []))
            port = mallory.expect(r"\AListening on 127\.0\.0\.1 port (\d+)$")[1]
            home, folder, copy = homes, "", None
            if without:
                folder = mallory.expect(r"^  python3 (\S+/)bob_server\.py")[1]
                copy = Path(folder)
                home = copy / "home"
            if not (attack and attack.first_meeting):
                pin_each_other(home, port)
            options = TERMINAL if attack and asks(attack, without) else {}
            once = ("--once",) if attack and not attack.needs_recording else ()
            bob = start(
                f"{folder}bob_server.py", "--host", "127.0.0.1", "--port", bobs_port, *once, **options
            )
            bob.expect("Waiting for Alice", "stdout" if options else "stderr")
            if without:
                assert (bob.stderr or bob.stdout).startswith("A broken copy, for a lesson.")
        peer = ("--peer", chat.fingerprint(keys.bob)) if attack and attack.needs_peer else ()
        alice = f"{folder}alice_client.py", f"127.0.0.1:{port}", *peer
        return Scene(mallory, bob, lambda **more: start(*alice, **{**options, **more}), copy)

    return run


def say(program: Program, text: str) -> None:
    """Say something on a pipe, if anybody still listens."""
    with contextlib.suppress(BrokenPipeError):
        program.write(f"{text}\n")


def attacked(scene: Scene, attack: Attack, shown: tuple[str, ...]) -> Program:
    """Hold the conversation that is attacked, and the one before if it needs one. Return Alice."""
    mallory, bob, new_alice, _ = scene
    if attack.needs_recording:
        alice = new_alice()
        say(alice, EARLIER)
        say(bob, REPLY)
        alice.end_input()
        assert alice.wait() == 0
        mallory.expect("Start\\s+Alice\\s+again")
    if attack.leaves_early:  # at a terminal, where it can be seen that her message is on its way
        alice = new_alice(**TERMINAL)
        alice.expect("Alice: ")
        alice.write(f"{REQUEST}\r")
        mallory.expect(r"^\*\*\* ")
        alice.expect("Bob's turn")
        alice.write("\x03")
        return alice
    alice = new_alice()
    say(alice, REQUEST)
    for text in shown:
        bob.expect(f"^Alice: {text}$")
    say(bob, REPLY)
    alice.end_input()
    return alice


def typed(program: Program, name: str, words: str) -> None:
    """Type three words at the question about the key of `name`."""
    program.expect(f"Type the words that {name} reads, or no: ")
    program.write(f"{words}\r")


def types(program: Program, name: str, text: str) -> None:
    """Type a line at the prompt."""
    program.expect(f"{name}: ")
    program.write(f"{text}\r")


def words_of(program: Program) -> str:
    """Return the three words that stand on a screen."""
    return program.expect(r"(?:in person|read them out):\s+([a-z]+ [a-z]+ [a-z]+)\s")[1]


def attacked_at_terminals(scene: Scene, attack: Attack, check: Check | None) -> Program:
    """Meet at terminals. Whoever is asked types the words of the other screen; then both talk if they may."""
    _, bob, new_alice, _ = scene
    alice = new_alice()
    if check is not None and check.name != "words":  # refused before anybody is asked
        return alice
    bobs, alices = words_of(bob), words_of(alice)
    asked = {bob: ("Alice", alices), alice: ("Bob", bobs)}
    if attack.needs_peer:
        del asked[alice]
    for program, (name, words) in asked.items():
        typed(program, name, words)
    if check is None:
        types(alice, "Alice", REQUEST)
        bob.expect(rf"Alice [✓+] {REQUEST}")
        types(bob, "Bob", REPLY)
        alice.expect(rf"Bob [✓+] {REPLY}")
        types(alice, "Alice", "/quit")
        return alice
    for program in asked:
        program.expect(re.escape(check.reason))
    program, (name, _) = asked.popitem()  # who leaves now has answered for both
    typed(program, name, "no")
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


def texts(program: Program, name: str) -> tuple[str, ...]:
    """Return what was shown as said by `name`."""
    mark = " [✓+] " if program.process.stdin is None else ": "
    return tuple(re.findall(f"^{name}{mark}(.*)$", program.stdout.replace("\r", "\n"), re.MULTILINE))


def was_shown(scene: Scene, alice: Program, attack: Attack, shown: tuple[tuple[str, ...], ...]) -> bool:
    """Whether Bob and Alice were shown this as the words of the other."""
    at_bob = (EARLIER, *shown[0]) if attack.needs_recording else shown[0]
    return texts(scene.bob, "Alice") == at_bob and (attack.leaves_early or texts(alice, "Bob") == shown[1])


def check_stage(scene: Callable[..., Scene], name: str, n: int) -> None:
    """Attack programs that lack the first n checks."""
    attack = ATTACKS[name]
    without = tuple(check.name for check in attack.checks[:n])
    there = scene(attack, without)
    mallory, bob, _, copy = there
    check = attack.checks[n] if n < len(attack.checks) else None
    succeeds = check is None and not attack.still_refused
    at_terminals = asks(attack, without)
    if at_terminals:
        alice = attacked_at_terminals(there, attack, check)
    else:
        before_the_reply = attack.shown[0][:1] if attack.before[1] else attack.shown[0]
        alice = attacked(there, attack, before_the_reply if succeeds else ())
    if check is not None:
        if check.name != "words":
            victim = bob if check.side is BOB else alice
            victim.expect(refusal(check.reason), "stdout" if at_terminals else "stderr")
        assert statuses(there, alice, check.statuses) == check.statuses
        assert n > 0 or was_shown(there, alice, attack, attack.before)
        assert not attack.silent or was_shown(there, alice, attack, ((), ()))
        both = check.name == "words" and not attack.needs_peer
        screens = "both screens" if both else f"{check.side.value.title()}'s screen"
        look = f"Look at {screens}. The check {check.name} refuses"
    elif succeeds:
        assert statuses(there, alice, attack.statuses) == attack.statuses
        assert was_shown(there, alice, attack, attack.shown)
        look = f"Nothing refuses it. {attack.success}"
    else:
        victim = bob if attack.checks[-1].side is BOB else alice
        victim.expect("Broken off: |Cut off: |: Cut off", "stderr")
        assert (victim.stdout, alice.wait()) == ("", 1)
        look = attack.still_refused
    assert mallory.wait() == 0
    assert copy is None or not copy.exists()
    told = " ".join(mallory.stdout.split())
    assert look in told
    assert "I end here" in told
    refused_in_silence = attack.silent and check is not None
    assert ("Alice says something" not in told) == ("can say anything" in told) == refused_in_silence
    if attack.reads and succeeds:
        assert f"I can read it. Alice: {REQUEST}" in told
        assert f"I can read it. Bob: {REPLY}" in told


def refusal(reason: str) -> str:
    """Return a pattern for a refusal, however a terminal has broken its lines."""
    words = r"\s+".join(map(re.escape, reason.split()))
    return words if reason != LATE else f"{words}|the time for this was over"


@pytest.mark.parametrize(("name", "n"), QUICK)
def test_an_attack_is_refused(scene: Callable[..., Scene], name: str, n: int) -> None:
    check_stage(scene, name, n)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "n"), STAGES)
def test_an_attack_is_refused_by_one_check_after_the_other_and_then_succeeds(
    scene: Callable[..., Scene], name: str, n: int
) -> None:
    check_stage(scene, name, n)


@pytest.mark.parametrize("prepared", [True, *exhaustive(False)], ids=["keys are there", "from nothing"])
def test_the_exercises_of_the_readme_one_after_the_other(
    start: Start, homes: Path, tmp_path: Path, prepared: bool
) -> None:
    """As they stand there, but for the ports. Nothing but ~/lesson is made or changed."""
    home = tmp_path / "home"
    home.mkdir()
    if prepared:
        (home / "lesson").mkdir(mode=0o700)
        for name in ("bob", "alice"):
            (homes / name).rename(home / "lesson" / name)
    _, _, section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Meet Mallory\n")
    commands = iter(re.findall("`(python3 [^`]*)`", section.partition("\n## ")[0]))
    with contextlib.ExitStack() as reserved:
        listen, bobs = (str(reserved.enter_context(a_port()).getsockname()[1]) for _ in range(2))

        def run(command: str, **options: object) -> Program:
            _, script, *arguments = shlex.split(command.replace("65433", listen).replace("65434", bobs))
            return start(script, *arguments, HOME=str(home), SECURE_CHAT_HOME="", **options)

        def mallory() -> Program:
            program = run(f"{next(commands)} --listen 65433 --bob 127.0.0.1:65434")
            program.expect("Listening")
            return program

        def bob(command: str) -> Program:
            program = run(command, **TERMINAL)
            program.expect("Waiting for Alice", patience=5 * DEADLINE)  # parameters are found by chance
            return program

        def alice(she: Program) -> Program:
            return run(she.expect(r"^  (python3 \S*alice_client\.py .*)$")[1], **TERMINAL)

        def both(she: Program) -> tuple[Program, Program]:
            his = bob(she.expect(r"^  (python3 \S*bob_server\.py .*)$")[1])
            return his, alice(she)

        def leaves(program: Program) -> None:
            program.write("\x03")
            assert program.wait() == 130

        # 1. Listen.
        she = mallory()
        his, hers = both(she)
        words = words_of(his)
        typed(his, "Alice", words_of(hers))
        typed(hers, "Bob", words)
        types(hers, "Alice", "hello Bob")
        types(his, "Bob", "hello Alice")
        hers.expect("Bob [✓+] hello Alice")
        types(hers, "Alice", "/quit")
        assert hers.wait() == 0
        she.expect("I wait for the next one; Ctrl-C ends")
        she.process.send_signal(signal.SIGINT)
        assert she.wait() == 0
        assert "hello" not in she.stdout.replace("hello, ", "")
        # 2. Change one bit.
        she = mallory()
        hers = alice(she)
        types(hers, "Alice", "pay 100 to Carol")
        his.expect("Broken off: the record's signature is not valid")
        assert (she.wait(), hers.wait()) == (0, 1)
        leaves(his)
        # 3. Take two checks away.
        she = mallory()
        his, hers = both(she)
        types(hers, "Alice", "pay 100 to Carol")
        his.expect("Alice [✓+] pay 900 to Carol")
        types(his, "Bob", "done")
        hers.expect("the record replies to another record than the last one")
        assert (she.wait(), hers.wait()) == (0, 3)
        leaves(his)
        # 4. Take the third away.
        she = mallory()
        his, hers = both(she)
        types(hers, "Alice", "pay 100 to Carol")
        his.expect("Alice [✓+] pay 900 to Carol")
        types(his, "Bob", "done")
        hers.expect("Bob [✓+] done")
        types(hers, "Alice", "/quit")
        assert (she.wait(), hers.wait()) == (0, 0)
        leaves(his)
        # 5. Be in the middle.
        she = mallory()
        his, hers = both(she)
        hers.expect("is not the pinned one")
        assert (she.wait(), hers.wait()) == (0, 3)
        leaves(his)
        # 6. Meet as strangers.
        she = mallory()
        his, hers = both(she)
        words = words_of(his)
        typed(his, "Alice", words_of(hers))
        typed(hers, "Bob", words)
        his.expect(WORDS)
        hers.expect(WORDS)
        typed(his, "Alice", "no")
        his.expect("nothing is pinned")
        hers.expect("Bob\\s+left,\\s+or\\s+said\\s+no,\\s+before\\s+you\\s+answered")
        assert (she.wait(), hers.wait()) == (0, 1)
        leaves(his)
        # 7. Do not compare.
        she = mallory()
        his, hers = both(she)
        typed(his, "Alice", "any three words")
        typed(hers, "Bob", "will do here")
        types(hers, "Alice", "pay 100 to Carol")
        his.expect("Alice [✓+] pay 100 to Carol")
        types(his, "Bob", "done")
        hers.expect("Bob [✓+] done")
        she.expect("I can read it. Alice: pay 100 to Carol")
        she.expect("I can read it. Bob: done")
        types(hers, "Alice", "/quit")
        assert (she.wait(), hers.wait()) == (0, 0)
        leaves(his)
        # 8. Try the others.
        assert run(next(commands)).wait() == 0
        assert next(commands, None) is None
    assert [path.name for path in home.iterdir()] == ["lesson"]


def test_a_reader_of_the_list_may_leave(start: Start) -> None:
    listing = start("tests/mallory.py", "--list")
    listing.forget_stdout()
    assert listing.wait() == 0
    assert listing.stderr == ""


def test_a_broken_copy_is_gone_however_she_ends(start: Start, homes: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        mallory = start("tests/mallory.py", "--listen", "0", "--home", str(homes), "--without", "tag", "tag")
        copy = Path(mallory.expect(r"^  python3 (\S+)/bob_server\.py")[1])
        assert (copy / "home" / "bob" / "identity.pem").exists()
        mallory.expect("Alice says something")
        mallory.process.send_signal(number)
        assert mallory.wait() == 1
        assert not copy.exists()


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
    mallory, bob, new_alice, _ = there
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
    for seen in (r"Alice -> Bob +hello", "nonce_A", "A  ", r"RSA_alice +SHA256:", "I cannot see"):
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
            ("--without", "words,two of three words compared", "tag"),
            "taken away together",
        ),
        (("--bob", "65432"), "an address is HOST:PORT"),
    ],
)
def test_what_she_does_not_know(start: Start, arguments: tuple[str, ...], told: str) -> None:
    mallory = start("tests/mallory.py", *arguments)
    mallory.expect(told, "stderr")
    assert mallory.wait() == 2


def test_she_speaks_of_words_and_of_a_first_meeting_only_before_they_have_met(
    start: Start, homes: Path
) -> None:
    with a_port() as reserved:
        port = str(reserved.getsockname()[1])
        for met in (False, True):
            if met:
                pin_each_other(homes, port)
            for attack, told in (
                ("drop", "If a screen asks for words"),
                ("mitm", "If they have not met yet"),
            ):
                mallory = start("tests/mallory.py", "--listen", port, "--home", str(homes), attack)
                mallory.expect("Alice says something|can say anything")
                assert (told in " ".join(mallory.stdout.split())) == (not met)
                mallory.process.send_signal(signal.SIGINT)
                assert mallory.wait() == 1


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
