"""Faults: either program dies, or the line does, at every step; signals, terminals, pipes and clocks.

Real processes, with a wire of ours between them that stops at the exact step. What both say and how both
end is checked, and that Bob can be started again on the same port at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, NamedTuple

import pytest
from conftest import (
    AT_TERMINAL,
    DEADLINE,
    WAITING,
    Background,
    Keys,
    Program,
    Start,
    StartBob,
    Stranger,
    exhaustive,
    ip,
    one_round,
    patched,
    pin_each_other,
    start_both,
    talk,
)
from mallory import HELLO, READY, TEXT, Last, Wire

import crypto_utils as chat
from crypto_utils import Role

NO_ANSWER = 2.0  # seconds of patience in a handshake, where a test is about losing it
LARGE = "x" * 500_000

# A program in whose standard error a line says so when it begins to wait.
WAITS = r"^\(waits\)\n"
TELLING = (
    "def telling(wait):",
    "    def tell(console, *arguments):",
    "        console.notice('(waits)')",
    "        return wait(console, *arguments)",
    "    return tell",
    "chat.Console.next_line = telling(chat.Console.next_line)",
    "chat.Console.wait_for_peer = telling(chat.Console.wait_for_peer)",
)


# ------------------------------------------------------------------------------- at every single step


class Step(NamedTuple):
    """Where the wire stops: before this frame of this sender (or in the middle of it), if at any."""

    name: str
    sender: Role | None = None
    number: int = 0
    half: bool = False


STEPS = [
    Step("before the first byte", Role.BOB, HELLO),
    Step("after Bob's hello", Role.ALICE, HELLO),
    Step("after Alice's hello", Role.ALICE, READY),
    Step("after Alice's READY", Role.BOB, READY),
    Step("after Bob's READY"),
    Step("at Alice's turn"),
    Step("at Bob's turn"),
    Step("after a text", Role.ALICE, TEXT),
    Step("in the middle of a large text", Role.ALICE, TEXT, half=True),
    Step("after CLOSE", Role.ALICE, TEXT),
]
NAMES = [step.name for step in STEPS]
FIRST_BYTE, BOB_HELLO, ALICE_HELLO, ALICE_READY, BOB_READY, ALICE_TURN, BOB_TURN, SENT, HALF, CLOSING = NAMES


class StoppingWire(Wire):
    """A wire that stops at a step; then it goes on, is cut, or stays silent and hides that an end is gone."""

    def __init__(self, bob: socket.socket, alice: socket.socket, step: Step) -> None:
        self.stopped = threading.Event()
        self._step = step
        self._decided = threading.Event()
        self._is_cut = self._is_silent = False
        super().__init__(bob, alice, self._carry_on)

    def _carry_on(self, sender: Role, number: int, data: bytes) -> bytes:
        if self._is_silent:
            return b""
        if (sender, number) != (self._step.sender, self._step.number):
            return data
        passed = data[: len(data) // 2] if self._step.half else b""
        self._ends[sender.peer].sendall(passed)
        self.stopped.set()
        self._decided.wait(DEADLINE)
        return Last(b"") if self._is_cut else data[len(passed) :]

    def _end(self, connected: socket.socket) -> None:
        if self._is_silent:
            self._decided.wait(DEADLINE)
        super()._end(connected)

    def go_on(self) -> None:
        self._decided.set()

    def fall_silent(self) -> None:
        self._is_silent = True

    def cut(self) -> None:
        self._is_cut = True
        self._decided.set()


class Meeting(NamedTuple):
    server: Program
    client: Program
    wire: StoppingWire
    port: str

    def of(self, role: Role) -> Program:
        return self.server if role is Role.BOB else self.client

    def _wait_for(self, role: Role) -> None:
        """Wait until this program waits: whatever it was to do before is done."""
        self.of(role).expect(WAITS, "stderr")

    def _say(self, role: Role, text: str) -> None:
        self.of(role).write(f"{text}\n")
        self._wait_for(role)

    def bring_to(self, step: Step) -> None:
        """Let them talk until they have come to that step."""
        if step.name == ALICE_READY or NAMES.index(step.name) >= NAMES.index(BOB_READY):
            self.server.expect("^Alice is here", "stderr")
            self._wait_for(Role.BOB)
        if NAMES.index(step.name) >= NAMES.index(BOB_READY):
            self.client.expect("^You speak first", "stderr")
            self._wait_for(Role.ALICE)
        if step.name in (ALICE_TURN, BOB_TURN, SENT):
            self._say(Role.ALICE, "request")
        if step.name in (ALICE_TURN, BOB_TURN):
            self.server.expect("^Alice: request\n")
            self._wait_for(Role.BOB)
        if step.name == ALICE_TURN:
            self._say(Role.BOB, "reply")
            self.client.expect("^Bob: reply\n")
            self._wait_for(Role.ALICE)
        if step.name == HALF:
            self._say(Role.ALICE, LARGE)
        if step.name == CLOSING:
            self.client.end_input()
        if step.sender is not None:
            assert self.wire.stopped.wait(DEADLINE)


@pytest.fixture
def meet(start: Start, homes: Path) -> Iterator[Callable[..., Meeting]]:
    """Return a function that starts both, with a wire between them that stops at a step."""
    with contextlib.ExitStack() as stack:

        def run(step: Step, *, bob: tuple[str, ...], alice: tuple[str, ...]) -> Meeting:
            server = start("bob_server.py", "--host", "127.0.0.1", "--port", "0", "--once", python=bob)
            with socket.create_server(("127.0.0.1", 0)) as door:
                door.settimeout(DEADLINE)
                at = str(door.getsockname()[1])
                pin_each_other(homes, at)
                client = start("alice_client.py", "127.0.0.1", "--port", at, python=alice)
                port = server.expect(r"^Listening on port (\d+)\.", "stderr")[1]
                server.expect("^Waiting for Alice", "stderr")
                at_alice, _ = door.accept()
            at_bob = socket.create_connection(("127.0.0.1", int(port)))
            wire = StoppingWire(at_bob, at_alice, step)
            stack.callback(wire.close)
            stack.callback(wire.cut)
            return Meeting(server, client, wire, port)

        yield run


class End(NamedTuple):
    """How a program must end: exit status (None: Bob serves on) and what it must have said, if anything."""

    status: int | None
    says: str = ""


LEFT = End(0, r"^You left\.\n\Z")
CUT = End(1, "^Cut off: the connection ended without a goodbye")
CUT_INSIDE = End(1, "^Cut off: the connection ended in the middle of a message")
CUT_EARLY = End(1, r"^Cut off: the connection ended without a goodbye\. Is bob_server\.py there")
SERVES_ON = End(None, r"^127\.0\.0\.1: Cut off: the connection ended without a goodbye\.")
LOST_PATIENCE = End(1, r"^Cut off: the other side did not answer in time\. Is bob_server\.py there")
SERVES_ON_LATER = End(None, r"^127\.0\.0\.1: Cut off: the other side did not answer in time\.")
GOODBYE_SEEN = r"(Bob|Alice) left( before .*)?\."


def told(anything_was_said: bool) -> End:
    """Return how the one ends who is told goodbye."""
    return End(0 if anything_was_said else 1, f"^{GOODBYE_SEEN}")


def ends_after(step: str, victim: Role, number: signal.Signals) -> tuple[End, End]:
    """Return how the victim of a signal must end, and the other one."""
    reached = NAMES.index(step)
    if number is signal.SIGKILL:  # and the line dies with it: what was held is lost
        killed = End(-signal.SIGKILL)
        if victim is Role.BOB:
            if step == CLOSING:
                return killed, LEFT
            return killed, CUT if reached >= NAMES.index(BOB_READY) else CUT_EARLY
        if reached < NAMES.index(ALICE_READY):
            return killed, SERVES_ON
        return killed, CUT_INSIDE if step == HALF else CUT
    if victim is Role.BOB:
        if reached < NAMES.index(ALICE_READY):
            return End(130), CUT_EARLY
        return LEFT, LEFT if step == CLOSING else told(step in (ALICE_TURN, BOB_TURN))
    if step == FIRST_BYTE:
        return End(130), SERVES_ON
    if reached < NAMES.index(BOB_READY):
        return End(130), CUT  # her hello and READY are on their way: Bob has let her in
    if step == CLOSING:  # she has left already, and waits for Bob to hang up: then this is the second time
        return End(130), told(False)
    return LEFT, told(step != BOB_READY)


def visit(channel: chat.Channel) -> None:
    channel.send("it is me")
    channel.close()


def check_end(program: Program, end: End, meeting: Meeting, keys: Keys, stranger: Stranger) -> None:
    if end.status is None:
        program.expect(end.says, "stderr")
        visit(stranger(meeting.port, keys.alice))
        end = told(True)
    assert program.wait() == end.status, program.stderr
    if end.says:
        program.expect(end.says, "stderr")


PLAIN = [(Role.BOB, signal.SIGKILL, HALF), (Role.ALICE, signal.SIGTERM, BOB_TURN)]
PATIENT = patched(f"chat.GOODBYE_SECONDS = {DEADLINE}", *TELLING)


@pytest.mark.parametrize(
    ("victim", "number", "step"),
    [
        pytest.param(
            *(victim, number, step),
            id=f"{victim.name}-{number.name}-{step.name.replace(' ', '-')}",
            marks=() if (victim, number, step.name) in PLAIN else pytest.mark.exhaustive,
        )
        for victim in Role
        for number in (signal.SIGKILL, signal.SIGTERM)
        for step in STEPS
    ],
)
def test_a_signal_at_every_step(
    meet: Callable[..., Meeting],
    start: Start,
    keys: Keys,
    stranger: Stranger,
    step: Step,
    victim: Role,
    number: signal.Signals,
) -> None:
    meeting = meet(step, bob=PATIENT, alice=PATIENT)
    meeting.bring_to(step)
    end, other_end = ends_after(step.name, victim, number)
    meeting.of(victim).process.send_signal(number)
    if end.status != 0:
        meeting.of(victim).process.wait(DEADLINE)
    if number is signal.SIGKILL:
        meeting.wire.cut()
    else:
        meeting.wire.go_on()
    ending = Background(lambda: check_end(meeting.of(victim), end, meeting, keys, stranger))
    check_end(meeting.of(victim.peer), other_end, meeting, keys, stranger)
    ending.result()
    assert meeting.client.stdout == ("Bob: reply\n" if step.name == ALICE_TURN else "")
    if victim is Role.BOB:
        again = start("bob_server.py", "--host", "127.0.0.1", "--port", meeting.port, "--once")
        again.expect(rf"^Listening on port {meeting.port}\.", "stderr")
        visit(stranger(meeting.port, keys.alice))
        assert again.wait() == 0, again.stderr


@pytest.mark.exhaustive
@pytest.mark.parametrize("step", [pytest.param(step, id=step.name.replace(" ", "-")) for step in STEPS])
def test_silence_at_every_step(
    meet: Callable[..., Meeting], keys: Keys, stranger: Stranger, step: Step
) -> None:
    """In the handshake both lose patience; in a conversation both people can leave in spite of it."""
    commands = {
        role: patched(
            f"chat.PATIENCE = {NO_ANSWER if NAMES.index(step.name) < NAMES.index(first) else DEADLINE}",
            "chat.GOODBYE_SECONDS = 0.1",
            *TELLING,
        )
        for role, first in ((Role.BOB, ALICE_READY), (Role.ALICE, BOB_READY))
    }
    meeting = meet(step, bob=commands[Role.BOB], alice=commands[Role.ALICE])
    meeting.bring_to(step)
    meeting.wire.fall_silent()
    in_conversation = [role for role in Role if f"{DEADLINE}" in commands[role][2]]
    for role, lost in ((Role.ALICE, LOST_PATIENCE), (Role.BOB, SERVES_ON_LATER)):
        if role in in_conversation and (role, step.name) != (Role.ALICE, CLOSING):
            meeting.of(role).process.terminate()
        end = LEFT if role in in_conversation else lost
        check_end(meeting.of(role), end, meeting, keys, stranger)


# -------------------------------------------------------------------------------------------- signals


def signalled(calls: int, numbers: list[signal.Signals], report: Path) -> tuple[str, ...]:
    """Return a command that runs a program which gets these signals at the n-th call of a conversation.

    How many calls were left then, or at the end, is reported; it is not positive if the signals were sent.
    """
    return patched(
        "import atexit, os, signal",
        f"left, numbers, meet = [{calls}], {[int(number) for number in numbers]}, chat.meet",
        f"report = lambda: Path({str(report)!r}).write_text(str(left[0]))",
        "def count(frame, event, argument):",
        "    left[0] -= event in ('call', 'c_call')",
        "    if left[0] <= 0 and frame.f_code.co_name != '__del__':",
        "        sys.setprofile(None)",
        "        report()",
        "        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # so that all of them come at once",
        "        for number in numbers: os.kill(os.getpid(), number)",
        "        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)",
        "def start_counting(*arguments):",
        "    sys.setprofile(count)",
        "    return meet(*arguments)",
        "chat.meet = start_counting",
        "atexit.register(report)",
    )


SIGNALS = [[signal.SIGINT], [signal.SIGTERM], [signal.SIGHUP], [signal.SIGINT, signal.SIGTERM]]


@pytest.mark.parametrize("moments", [4, *exhaustive(40)])
def test_signals_at_any_moment(
    bob: StartBob, start: Start, homes: Path, keys: Keys, stranger: Stranger, tmp_path: Path, moments: int
) -> None:
    """Nobody is told "You left." with status 0 where the other side sees a cut, nor the reverse.

    The terminal is as it was, and Bob serves on. A visit has some 2,000 calls: 40 moments are every 50th.
    """
    report, lots = tmp_path / "report", 10**9
    server, port = bob()
    pin_each_other(homes, port)
    server.write("reply\n" * 1000)  # in advance: each is sent when it is his turn

    def come(calls: int, numbers: list[signal.Signals]) -> tuple[int, str, str]:
        """Let Alice come; return her exit status, what she was told last, and what Bob was."""
        command = signalled(calls, numbers, report)
        client = start("alice_client.py", "127.0.0.1", "--port", port, python=command, **AT_TERMINAL)
        before = termios.tcgetattr(client.terminal)
        with contextlib.suppress(AssertionError, OSError):  # she may have gone
            client.expect("Alice: ")
            client.write("request\n")
            client.expect("reply")
            client.expect("Alice: ")
            client.write("/quit\n")
        status = client.wait()
        assert termios.tcgetattr(client.terminal) == before
        bobs = server.expect(r"^(Alice left|Cut off|Broken off)", "stderr")[1]
        server.expect("^Waiting for Alice", "stderr")
        return status, client.stdout, bobs

    assert come(lots, [])[0] == 0
    all_calls = lots - int(report.read_text())
    for moment in range(moments):
        calls = 1 + all_calls * moment // moments * 9 // 10  # their number depends on the clock, too
        numbers = SIGNALS[moment % len(SIGNALS)]
        status, hers, bobs = come(calls, numbers)
        at = f"{numbers} after {calls} of {all_calls} calls: {status}, {hers!r}, {bobs}"
        assert int(report.read_text()) <= 0, f"no signal was sent: {at}"
        assert bobs != "Broken off", f"half a record was taken for a forged one: {at}"
        assert ("You left." in hers) == (status == 0), at
        assert status != 0 or bobs == "Alice left", at
        assert ("could not be sent" in hers) <= (bobs == "Cut off"), at
        assert status in (0, 1, 130, *(128 + number for number in numbers[1:])), at
    visit(stranger(port, keys.alice))
    server.expect("^Alice: it is me\n")


INTERRUPTED = "def {0}(*arguments, real=chat.{0}, left=[{1}], **more):\n" + (
    "    left[0] -= 1\n"
    "    if left[0] == 0: import os; os.kill(os.getpid(), 15); [None for _ in range(1000)]\n"
    "    return real(*arguments, **more)\n"
    "chat.{0} = {0}"
)


@pytest.mark.parametrize(
    ("at", "number", "bob_is_told"),
    [
        ("sign", 2, r"\AAlice: request\n\Z"),  # READY comes first
        ("verify", 2, r"\AAlice: request\n\Z"),
    ],
)
def test_a_signal_while_a_record_is_made_or_opened(
    bob: StartBob, start: Start, at: str, number: int, bob_is_told: str
) -> None:
    """What has begun to be sent is sent to its end; what is being opened is not received. Then a goodbye."""
    programs = start_both(bob, start, {Role.ALICE: patched(INTERRUPTED.format(at, number))})
    server, client = programs[Role.BOB], programs[Role.ALICE]
    client.write("request\n")
    server.expect("^Alice: request\n")
    server.write("reply\n")
    assert (client.wait(), server.wait()) == (0, 0)
    client.expect(LEFT.says, "stderr")
    server.expect(r"^Alice left( before your last message had arrived)?\.", "stderr")
    assert client.stdout == ""


def test_a_signal_that_was_held_counts_as_soon_as_it_may() -> None:
    console = chat.Console(Role.ALICE)
    with pytest.raises(KeyboardInterrupt), console.to_its_end():
        console.on_signal(signal.SIGINT, None)


def test_the_end_needs_no_free_descriptor(bob: StartBob, start: Start) -> None:
    python = patched(
        "def refuse(*_):",
        "    raise OSError(24, 'Too many open files')",
        "Path.open = refuse",
    )
    server, client = talk(bob("--once"), start, python=python)
    client.write("request\n")
    server.expect("^Alice: request\n")
    server.end_input()
    assert (client.wait(), server.wait()) == (0, 0)
    assert "Traceback" not in client.stderr


def test_a_signal_while_the_library_makes_a_cipher(bob: StartBob, start: Start) -> None:
    """What it raised there would leave two owners of one memory, and the program would abort at its end."""
    python = patched(
        "import os",
        "def look(frame, event, argument):",
        "    if event == 'call' and frame.f_code.co_name == 'release':",
        "        sys.setprofile(None)",
        "        os.kill(os.getpid(), 15)",
        "receive = chat.Channel.receive",
        "chat.Channel.receive = lambda channel: (sys.setprofile(look), receive(channel))[1]",
    )
    server, client = talk(bob("--once"), start, python=python)
    client.write("request\n")
    server.expect("^Alice: request\n")
    server.write("reply\n")
    assert (client.wait(), server.wait()) == (0, 0)
    server.expect(GOODBYE_SEEN, "stderr")


def test_a_signal_whose_exception_is_lost_counts_all_the_same(bob: StartBob, start: Start) -> None:
    """Python drops what is raised in a finalizer."""
    python = patched(
        "import os, signal",
        "sys.unraisablehook = lambda _: None  # it would be shown",
        "class Finalized:",
        "    def __del__(self):",
        "        os.kill(os.getpid(), signal.SIGTERM)",
        "        for _ in range(1000): pass",
        "next_line = chat.Console.next_line",
        "signals = [Finalized]  # one signal, which must not be lost",
        "def finalize(console, channel):",
        "    if channel.texts == 2 and signals: signals.pop()()",
        "    return next_line(console, channel)",
        "chat.Console.next_line = finalize",
    )
    server, client = talk(bob("--once"), start, python=python)
    one_round(server, client)
    assert (client.wait(), server.wait()) == (0, 0)
    server.expect(GOODBYE_SEEN, "stderr")


def test_nor_is_one_lost_while_bob_waits(start: Start) -> None:
    lost = patched(
        "import os, queue, signal",
        "class Finalized:",
        "    def __del__(self):",
        "        os.kill(os.getpid(), signal.SIGTERM)",
        "        for _ in range(1000): pass",
        "notice = chat.Console.notice",
        "chat.Console.notice = lambda *said: (notice(*said), 'Waiting' in said[1] and Finalized())",
    )
    assert start("bob_server.py", "--port", "0", python=lost).wait() == 130


def test_who_leaves_is_told_when_the_goodbye_cannot_be_sent(bob: StartBob, start: Start) -> None:
    broken = patched(
        "def seal(sealer, kind, *rest, real=chat.Sealer.seal):",
        "    if kind is chat.RecordType.CLOSE: raise chat.ConnectionCut('the connection broke')",
        "    return real(sealer, kind, *rest)",
        "chat.Sealer.seal = seal",
        *TELLING,
    )
    server, client = talk(bob("--once"), start, python=broken)
    client.expect(WAITS, "stderr")
    client.process.terminate()
    assert client.wait() == 1
    client.expect("^Stopped: the goodbye could not be sent; Bob sees that the line was cut", "stderr")
    assert server.wait() == 1
    server.expect(CUT.says, "stderr")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(
    bob: StartBob, start: Start, number: signal.Signals
) -> None:
    """As under nohup, and in a script that starts it with &."""
    ignoring = ("sh", "-c", f"trap '' {number.name[3:]}; exec \"$@\"", "sh", sys.executable)
    server, client = talk(bob("--once", python=ignoring), start)
    server.process.send_signal(number)
    one_round(server, client)
    client.end_input()
    assert (client.wait(), server.wait()) == (0, 0)


# ------------------------------------------------------------------------- terminals, pipes and clocks


def hang_up_terminal(program: Program) -> None:
    """Close the window in which a program runs."""
    program._sources.clear()
    os.dup2(nowhere := os.open(os.devnull, os.O_RDWR), program.terminal)  # which closes it
    os.close(nowhere)


@pytest.mark.parametrize(
    ("victim", "at"),
    [
        (Role.BOB, "in one's turn"),
        (Role.ALICE, "at the question"),
        *exhaustive(
            (Role.BOB, "out of turn"),
            (Role.BOB, "alone"),
            (Role.ALICE, "in one's turn"),
            (Role.ALICE, "out of turn"),
        ),
    ],
)
def test_a_closed_terminal(bob: StartBob, start: Start, homes: Path, victim: Role, at: str) -> None:
    server, port = bob("--once", **AT_TERMINAL)
    if at == "alone":
        hang_up_terminal(server)
        assert server.wait() in (1, 130)
        again = start("bob_server.py", "--port", port)
        again.expect(rf"^Listening on port {port}\.", "stderr")
        return
    if at != "at the question":
        pin_each_other(homes, port)
    client = start("alice_client.py", "127.0.0.1", "--port", port, **AT_TERMINAL)
    programs = {Role.BOB: server, Role.ALICE: client}
    said = (victim is Role.ALICE) == (at == "out of turn")
    if at == "at the question":
        client.expect("reads, or no: ")
        server.expect("reads, or no: ")
    else:
        client.expect("Alice: ")
        server.expect(WAITING)
        if said:
            client.write("hello\n")
            server.expect("hello")
            server.expect("Bob: ")
    hang_up_terminal(programs[victim])
    if at == "at the question":
        server.expect("Alice left, or said no, before you answered; nothing is\\s+pinned")
        assert not list(homes.glob("*/known_peers"))
    else:
        programs[victim.peer].expect(GOODBYE_SEEN)
        assert programs[victim.peer].wait() == (0 if said else 1)
    # What comes first there is not settled: the signal, or the end of the input and an error of the output.
    assert programs[victim].wait() in (0, 1, 130)


needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this machine")


@pytest.mark.parametrize("reason", [pytest.param("No space left on device", marks=needs_full), "Broken pipe"])
@pytest.mark.parametrize("victim", [Role.ALICE, *exhaustive(Role.BOB)])
def test_standard_output_that_cannot_be_written(
    bob: StartBob, start: Start, victim: Role, reason: str
) -> None:
    full = reason != "Broken pipe"
    command = (
        patched("import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)") if full else (sys.executable,)
    )
    programs = start_both(bob, start, {victim: command})
    programs[Role.ALICE].expect("^You speak first", "stderr")
    if not full:
        programs[victim].forget_stdout()
    programs[Role.ALICE].write("request\n")
    programs[Role.BOB].write("reply\n")
    assert programs[victim].wait() == 1
    programs[victim].expect(f"^Stopped: .*{reason}", "stderr")
    assert programs[victim.peer].wait() == 0
    programs[victim.peer].expect(GOODBYE_SEEN, "stderr")


# ------------------------------------------------------------------------------------------------ lines


# ETIMEDOUT is a socket.timeout since Python 3.10.


@pytest.mark.exhaustive
@pytest.mark.parametrize("turn", Role)
@pytest.mark.parametrize("speaks", [True, False])
def test_a_dead_line_is_noticed_by_both_whether_anything_is_said_or_not(
    hosts: list[str], bob: StartBob, start: Start, keys: Keys, turn: Role, speaks: bool
) -> None:
    """From one moment on, packets go to cards that do not exist: nobody at either end is told."""
    impatient = patched(
        "chat.TCP_OPTIONS.update(TCP_KEEPIDLE=1, TCP_KEEPINTVL=1, TCP_KEEPCNT=2, TCP_USER_TIMEOUT=2000)"
    )
    there = [("ip", "netns", "exec", host, *impatient) for host in hosts]
    server, port = bob("--once", "--peer", chat.fingerprint(keys.alice), python=there[0])
    assert f"  python3 alice_client.py 192.0.2.1 --port {port} --peer SHA256:" in server.stderr
    at = ("192.0.2.1", "--port", port, "--peer", chat.fingerprint(keys.bob))
    client = start("alice_client.py", *at, python=there[1])
    client.expect("^You speak first", "stderr")
    server.expect("^Alice is here", "stderr")
    if turn is Role.BOB:
        client.write("request\n")
        server.expect("^Alice: request\n")
    for host, other in zip(hosts, ("192.0.2.2", "192.0.2.1")):
        ip("-n", host, "neigh", "replace", other, "lladdr", "02:00:00:00:00:99", "dev", "cable")
    if speaks:
        (server if turn is Role.BOB else client).write("into the void\n")
    for program in (server, client):
        assert program.wait() == 1
        # ETIMEDOUT is a socket.timeout since Python 3.10.
        cut = r"^Cut off: .*(?:did not answer in time|timed out)(.*Your last message may not have arrived)?"
        said = program.expect(cut, "stderr")
        is_unanswered = (speaks or turn is Role.BOB) if program is client else speaks and turn is Role.BOB
        assert (said[1] is not None) == is_unanswered
        assert "into the void" not in program.stdout
