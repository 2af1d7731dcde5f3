"""Faults: either program dies, or the line does, at every step; terminals, pipes and clocks that fail.

Real processes, with a wire of ours between them that stops at the exact step. What both say and how both
end is checked, and that Bob can be started again on the same port at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, NamedTuple

import pytest
from conftest import (
    DEADLINE,
    Background,
    Keys,
    Program,
    Start,
    StartBob,
    exhaustive,
    one_round,
    patched,
    pin_each_other,
    start_both,
    store_with_group,
)
from mallory import HELLO, READY, TEXT, Last, Wire

import crypto_utils as chat
from crypto_utils import FrameSocket, PinnedPeer, Role

NO_ANSWER = 2.0  # seconds of patience in a handshake, where a test is about losing it
LARGE = "x" * 500_000

# A program in whose standard error a line says so when it begins to wait.
WAITS = r"^\(waits\)\n"
TELLING = (
    "next_line = chat.Console.next_line",
    "def tell(console, channel):",
    "    console.notice('(waits)')",
    "    return next_line(console, channel)",
    "chat.Console.next_line = tell",
)


def visit(port: str, keys: Keys, homes: Path) -> None:
    """Be Alice, connect to Bob, say something, and say goodbye."""
    connected = socket.create_connection(("127.0.0.1", int(port)), timeout=DEADLINE)
    home = store_with_group(homes / "visitor")
    channel = chat.alice_handshake(
        FrameSocket(connected), keys.alice, home, PinnedPeer(home, "[bob.example]:1")
    )
    channel.send("it is me")
    channel.close()


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
    store_with_group(homes / "alice")
    with contextlib.ExitStack() as stack:

        def run(step: Step, *, bob: tuple[str, ...], alice: tuple[str, ...]) -> Meeting:
            server = start("bob_server.py", "--host", "127.0.0.1", "--port", "0", "--once", python=bob)
            with socket.create_server(("127.0.0.1", 0)) as door:
                door.settimeout(DEADLINE)
                client = start(
                    "alice_client.py", "127.0.0.1", "--port", str(door.getsockname()[1]), python=alice
                )
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
CUT_EARLY = End(1, "^Cut off: the connection ended without a goodbye, during the handshake")
SERVES_ON = End(None, r"^127\.0\.0\.1: Cut off: the connection ended without a goodbye, during the handshake")
LOST_PATIENCE = End(1, "^Cut off: the other side did not answer in time, during the handshake")
SERVES_ON_LATER = End(
    None, r"^127\.0\.0\.1: Cut off: the other side did not answer in time, during the handshake"
)
GOODBYE_SEEN = r"(Bob|Alice) left\."


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
    return LEFT, told(step not in (BOB_READY, CLOSING))


def check_end(program: Program, end: End, meeting: Meeting, keys: Keys) -> None:
    if end.status is None:
        program.expect(end.says, "stderr")
        visit(meeting.port, keys, program.home)
        end = told(True)
    assert program.wait() == end.status, program.stderr
    if end.says:
        program.expect(end.says, "stderr")


PLAIN_SIGNALS = [(Role.BOB, signal.SIGKILL, HALF), (Role.ALICE, signal.SIGTERM, BOB_TURN)]
PATIENT = patched(f"chat.GOODBYE_SECONDS = {DEADLINE}", *TELLING)


@pytest.mark.parametrize(
    ("victim", "number", "step"),
    [
        pytest.param(
            *(victim, number, step),
            id=f"{victim.name}-{number.name}-{step.name.replace(' ', '-')}",
            marks=() if (victim, number, step.name) in PLAIN_SIGNALS else pytest.mark.exhaustive,
        )
        for victim in Role
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
        for step in STEPS
    ],
)
def test_a_signal_at_every_step(
    meet: Callable[..., Meeting],
    start: Start,
    keys: Keys,
    homes: Path,
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
    ending = Background(lambda: check_end(meeting.of(victim), end, meeting, keys))
    check_end(meeting.of(victim.peer), other_end, meeting, keys)
    ending.result()
    assert meeting.client.stdout == ("Bob: reply\n" if step.name == ALICE_TURN else "")
    if victim is Role.BOB:
        again = start("bob_server.py", "--host", "127.0.0.1", "--port", meeting.port, "--once")
        again.expect(rf"^Listening on port {meeting.port}\.", "stderr")
        visit(meeting.port, keys, homes)
        assert again.wait() == 0, again.stderr
        again.expect(GOODBYE_SEEN, "stderr")


@pytest.mark.exhaustive
@pytest.mark.parametrize("step", [pytest.param(step, id=step.name.replace(" ", "-")) for step in STEPS])
def test_silence_at_every_step(meet: Callable[..., Meeting], keys: Keys, step: Step) -> None:
    """In the handshake both lose patience; in a conversation both people can leave in spite of it."""
    hasty = patched(
        f"chat.HANDSHAKE_SECONDS = chat.FIRST_BYTE_SECONDS = {NO_ANSWER}",
        "chat.GOODBYE_SECONDS = 0.1",
        *TELLING,
    )
    relaxed = patched("chat.GOODBYE_SECONDS = 0.1", *TELLING)
    reached = NAMES.index(step.name)
    in_conversation = {
        Role.BOB: reached >= NAMES.index(ALICE_READY),
        Role.ALICE: reached >= NAMES.index(BOB_READY),
    }
    meeting = meet(
        step,
        bob=relaxed if in_conversation[Role.BOB] else hasty,
        alice=relaxed if in_conversation[Role.ALICE] else hasty,
    )
    meeting.bring_to(step)
    meeting.wire.fall_silent()
    if not in_conversation[Role.ALICE]:
        check_end(meeting.client, LOST_PATIENCE, meeting, keys)
    elif step.name == CLOSING:
        check_end(meeting.client, LEFT, meeting, keys)
    else:
        meeting.client.process.terminate()
        check_end(meeting.client, LEFT, meeting, keys)
    if not in_conversation[Role.BOB]:
        check_end(meeting.server, SERVES_ON_LATER, meeting, keys)
    else:
        meeting.server.process.terminate()
        check_end(meeting.server, LEFT, meeting, keys)


# ---------------------------------------------------------------------------------- at any moment at all


def signalled(calls: int, numbers: list[signal.Signals], report: Path) -> tuple[str, ...]:
    """Return a command that runs a program which gets these signals when it makes its n-th call.

    How many calls were left then, or at the end, is reported; it is not positive if the signals were sent.
    """
    return patched(
        "import atexit, os, signal",
        f"left, numbers, start = [{calls}], {[int(number) for number in numbers]}, chat.start",
        "def count(frame, event, argument):",
        "    left[0] -= event in ('call', 'c_call')",
        "    if left[0] <= 0 and frame.f_code.co_name != '__del__':",
        "        sys.setprofile(None)",
        "        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # so that all of them come at once",
        "        for number in numbers: os.kill(os.getpid(), number)",
        "        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)",
        "def start_counting(*arguments):",
        "    sys.setprofile(count)",
        "    try: return start(*arguments)",
        "    finally: sys.setprofile(None)",
        "chat.start = start_counting",
        f"atexit.register(lambda: Path({str(report)!r}).write_text(str(left[0])))",
    )


SIGNALS = [[signal.SIGINT], [signal.SIGTERM], [signal.SIGINT, signal.SIGTERM]]


@pytest.mark.exhaustive
@pytest.mark.parametrize("moments", [100])
def test_signals_at_any_moment(
    bob: StartBob, start: Start, homes: Path, keys: Keys, tmp_path: Path, moments: int
) -> None:
    """Alice ends as one who left or was interrupted, her terminal is as it was, and Bob serves on."""
    report, lots = tmp_path / "report", 10**9
    server, port = bob()
    pin_each_other(homes, keys, port)

    def come(calls: int, numbers: list[signal.Signals]) -> int:
        client = start(
            *("alice_client.py", "127.0.0.1", "--port", port),
            terminal=True,
            python=signalled(calls, numbers, report),
        )
        before = termios.tcgetattr(client.terminal)
        with contextlib.suppress(AssertionError):  # she may have gone
            client.expect("Alice: ", patience=DEADLINE)
            client.write("request\n")
            client.expect("reply", patience=DEADLINE)
            client.expect("Alice: ", patience=DEADLINE)
            client.write("/quit\n")
        status = client.wait()
        assert termios.tcgetattr(client.terminal) == before
        return status

    server.write("reply\n" * 1000)  # in advance: each is sent when it is his turn
    assert come(lots, []) == 0
    all_calls = lots - int(report.read_text())
    for moment in range(moments):
        calls = 1 + all_calls * moment // moments * 3 // 4  # their number depends on the clock, too
        assert come(calls, SIGNALS[moment % len(SIGNALS)]) in (0, 130), f"after {calls} calls"
        assert int(report.read_text()) <= 0, "no signal was sent"
    visit(port, keys, homes)
    server.expect("^Alice: it is me\n")
    assert "Broken off" not in server.stderr, "half a record was taken for a forged one"
    server.process.terminate()
    assert server.wait() in (0, 130)


# Where Python loses an exception, or another one takes its place: the signal must still count.
IN_THE_HANDLER = patched(
    "import os, signal",
    "def arrive(frame, event, argument):",
    "    if event == 'call' and frame.f_code.co_name == 'on_signal':",
    "        sys.setprofile(None)",
    "        frame.f_locals['self'].inbox.put('(something else arrives)')",
    "        os.kill(os.getpid(), signal.SIGALRM)",
    "sys.setprofile(arrive)",
)
AS_THE_LINE_BEGINS = patched(
    "import os, signal",
    "def arrive(frame, event, argument):",
    "    if event == 'call' and frame.f_code.co_name == 'begin':",
    "        if frame.f_back.f_back.f_locals['channel'].texts == 2:",
    "            sys.setprofile(None)",
    "            os.kill(os.getpid(), signal.SIGTERM)",
    "            for _ in range(1000): pass",
    "sys.setprofile(arrive)",
)
IN_A_FINALIZER = patched(
    "import os, signal",
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


@pytest.mark.parametrize(
    ("terminal", "python"),
    [
        pytest.param(True, IN_THE_HANDLER, id="in the handler, at the prompt"),
        pytest.param(True, AS_THE_LINE_BEGINS, id="as the line begins"),
        pytest.param(True, IN_A_FINALIZER, id="in a finalizer, at the prompt"),
        pytest.param(False, IN_A_FINALIZER, id="in a finalizer, on a pipe", marks=pytest.mark.exhaustive),
    ],
)
def test_no_signal_is_lost(
    bob: StartBob, start: Start, homes: Path, keys: Keys, terminal: bool, python: tuple[str, ...]
) -> None:
    server, port = bob("--once")
    pin_each_other(homes, keys, port)
    client = start("alice_client.py", "127.0.0.1", "--port", port, terminal=terminal, python=python)
    client.expect("Alice: " if terminal else "You speak first", "stdout" if terminal else "stderr")
    client.write("request\n")
    server.expect("^Alice: request\n")
    server.write("reply\n")
    client.expect("reply\r?\n")
    if terminal:
        client.expect("Alice: ")
    if python is IN_THE_HANDLER:
        client.process.send_signal(signal.SIGTERM)
    server.expect(GOODBYE_SEEN, "stderr")
    assert (client.wait(), server.wait()) == (0, 0)


# ------------------------------------------------------------------------- terminals, pipes and clocks


def hang_up_terminal(program: Program) -> None:
    """Close the window in which a program runs."""
    program._sources.clear()
    os.dup2(nowhere := os.open(os.devnull, os.O_RDWR), program.terminal)  # which closes it
    os.close(nowhere)


def talk_at_terminals(
    bob: StartBob, start: Start, homes: Path, keys: Keys, known: bool = True, **options: object
) -> dict[Role, Program]:
    """Start both at terminals; let them meet, as acquaintances or to be asked about each other's keys."""
    server, port = bob("--once", terminal=True, **options)
    if known:
        pin_each_other(homes, keys, port)
    client = start("alice_client.py", "127.0.0.1", "--port", port, terminal=True, **options)
    client.expect("Alice: " if known else "yes or no")
    server.expect(r"\(Alice's turn\) " if known else "yes or no")
    return {Role.BOB: server, Role.ALICE: client}


@pytest.mark.parametrize(
    ("victim", "at"),
    [
        (Role.BOB, "in one's turn"),
        (Role.ALICE, "at the question"),
        pytest.param(Role.BOB, "out of turn", marks=pytest.mark.exhaustive),
        pytest.param(Role.BOB, "at the question", marks=pytest.mark.exhaustive),
        pytest.param(Role.ALICE, "in one's turn", marks=pytest.mark.exhaustive),
        pytest.param(Role.ALICE, "out of turn", marks=pytest.mark.exhaustive),
    ],
)
def test_a_closed_terminal(
    bob: StartBob, start: Start, homes: Path, keys: Keys, victim: Role, at: str
) -> None:
    programs = talk_at_terminals(bob, start, homes, keys, known=at != "at the question")
    said = (victim is Role.ALICE) == (at == "out of turn") and at != "at the question"
    if said:
        programs[Role.ALICE].write("hello\n")
        programs[Role.BOB].expect("hello\r\nBob: ")
    hang_up_terminal(programs[victim])
    other = programs[victim.peer]
    if at == "at the question":
        other.expect("left before you answered; nothing is pinned")
        assert not list(homes.glob("*/known_peers"))
        other.process.terminate()
    else:
        other.expect(GOODBYE_SEEN)
    status = other.wait()
    assert status == (0 if said else 1) or at == "at the question"
    # What comes first there is not settled: the signal, or the end of the input and an error of the output.
    assert programs[victim].wait() in (0, 1)


@pytest.mark.exhaustive
def test_a_closed_terminal_while_bob_is_alone(bob: StartBob, start: Start) -> None:
    server, port = bob(terminal=True)
    hang_up_terminal(server)
    assert server.wait() == 130
    again = start("bob_server.py", "--port", port)
    again.expect(rf"^Listening on port {port}\.", "stderr")


def test_a_signal_that_comes_together_with_a_message(
    bob: StartBob, start: Start, homes: Path, keys: Keys
) -> None:
    """Both wake who is at the prompt, and the exception for the one must not hide the other's."""
    programs = talk_at_terminals(bob, start, homes, keys)
    server, client = programs[Role.BOB], programs[Role.ALICE]
    client.write("hello\n")
    server.expect("hello\r\nBob: ")
    client.expect(r"\(Bob's turn\) ")
    client.process.send_signal(signal.SIGSTOP)
    server.write("reply\n")
    server.expect("Bob: reply\r\n")
    client.process.send_signal(signal.SIGTERM)
    client.process.send_signal(signal.SIGCONT)
    server.expect(GOODBYE_SEEN)
    assert (client.wait(), server.wait()) == (0, 0)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc to reach another's terminal through")
@pytest.mark.parametrize(
    ("victim", "number"), [(Role.BOB, signal.SIGINT), (Role.ALICE, signal.SIGTERM)], ids=["bob", "alice"]
)
def test_a_signal_ends_who_waits_for_a_stopped_screen(
    bob: StartBob, start: Start, homes: Path, keys: Keys, victim: Role, number: signal.Signals
) -> None:
    programs = talk_at_terminals(bob, start, homes, keys)
    if victim is Role.ALICE:
        programs[Role.ALICE].write("hello\n")
        programs[Role.BOB].expect("hello\r\nBob: ")
    screen = os.open(f"/proc/{programs[victim].process.pid}/fd/1", os.O_WRONLY | os.O_NOCTTY)
    termios.tcflow(screen, termios.TCOOFF)
    programs[victim.peer].write("can you read this?\n")
    programs[victim.peer].expect("read this")
    programs[victim].process.send_signal(number)
    programs[victim.peer].expect(GOODBYE_SEEN)
    assert programs[victim].process.wait(DEADLINE) == 0
    os.close(screen)
    programs[victim.peer].wait()


def talk(
    bob: StartBob, start: Start, commands: dict[Role, tuple[str, ...]] | None = None
) -> tuple[Program, Program]:
    """Start both, and let them meet."""
    both = start_both(bob, start, commands or {})
    both[Role.ALICE].expect("^You speak first", "stderr")
    both[Role.BOB].expect("^Alice is here", "stderr")
    return both[Role.BOB], both[Role.ALICE]


@pytest.mark.exhaustive
@pytest.mark.parametrize("victim", Role)
def test_standard_output_that_nobody_reads(bob: StartBob, start: Start, victim: Role) -> None:
    server, client = talk(bob, start)
    dying, other = (server, client) if victim is Role.BOB else (client, server)
    dying.forget_stdout()
    client.write("request\n")
    server.write("reply\n")
    assert dying.wait() == 1
    dying.expect("^Stopped: .*Broken pipe", "stderr")
    assert other.wait() == 0
    other.expect(GOODBYE_SEEN, "stderr")


needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this machine")


@needs_full
@pytest.mark.parametrize("victim", [Role.ALICE, *exhaustive(Role.BOB)])
def test_standard_output_on_a_full_disk(bob: StartBob, start: Start, victim: Role) -> None:
    full = patched("import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)")
    server, client = talk(bob, start, {victim: full})
    dying, other = (server, client) if victim is Role.BOB else (client, server)
    client.write("request\n")
    server.write("reply\n")
    assert dying.wait() == 1
    dying.expect("^Stopped: .*No space left on device", "stderr")
    assert other.wait() == 0
    other.expect(GOODBYE_SEEN, "stderr")


def test_a_clock_that_jumps(bob: StartBob, start: Start) -> None:
    jumping = patched(
        "import itertools, time",
        "time.time = lambda jumps=itertools.cycle([0.0, 4e9, 1e9, 3e9]): next(jumps)",
    )
    server, client = talk(bob, start, dict.fromkeys(Role, jumping))
    one_round(server, client)
    one_round(server, client)
    client.end_input()
    assert (client.wait(), server.wait()) == (0, 0)
    client.expect(LEFT.says, "stderr")
    server.expect(GOODBYE_SEEN, "stderr")


# ------------------------------------------------------------------------------------------------ lines


class Cable:
    """A cable between two network namespaces: two TUN devices, and a thread that carries packets.

    It can be slow, lose packets, or be cut without anybody at its ends being told.
    """

    ADDRESSES = ("192.0.2.1", "192.0.2.2")  # TEST-NET-1

    def __init__(self, namespaces: list[str]) -> None:
        self.seconds = 0.0
        self.loss = 0.0
        self.is_cut = False
        self.swallowed = threading.Semaphore(0)  # released for each packet that was lost
        self.prefixes = [("ip", "netns", "exec", name) for name in namespaces]
        self._ends = [self._plug_in(name) for name in namespaces]
        self._stop, self._stopped = socket.socketpair()
        for name, address in zip(namespaces, self.ADDRESSES):
            for words in (f"address add {address}/24 dev cable", "link set lo up", "link set cable up"):
                ip("-n", name, *words.split())
        self._thread = Background(self._carry)

    @staticmethod
    def _plug_in(namespace: str) -> int:
        """Make a TUN device in a namespace. A thread moves there, and ends."""

        def make() -> int:
            with Path("/run/netns", namespace).open() as there:
                if ctypes.CDLL(None, use_errno=True).setns(there.fileno(), 0x40000000):  # CLONE_NEWNET
                    raise OSError(ctypes.get_errno(), "setns")
            end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            # TUNSETIFF, with IFF_TUN and IFF_NO_PI: a device of bare IP packets
            fcntl.ioctl(end, 0x400454CA, struct.pack("16sH22x", b"cable", 0x1001))
            return end

        end = Background(make).result()
        assert isinstance(end, int)
        return end

    def _carry(self) -> None:
        chance = random.Random(1)
        on_their_way: list[tuple[float, int, int, bytes]] = []
        for count in range(10**9):
            wait = max(0.0, on_their_way[0][0] - time.monotonic()) if on_their_way else None
            ready, _, _ = select.select([*self._ends, self._stopped], [], [], wait)
            if self._stopped in ready:
                break
            for end in ready:
                packet = os.read(end, 65536)
                if self.is_cut or chance.random() < self.loss:
                    self.swallowed.release()
                else:
                    other = self._ends[1 - self._ends.index(end)]
                    heapq.heappush(on_their_way, (time.monotonic() + self.seconds, count, other, packet))
            while on_their_way and on_their_way[0][0] <= time.monotonic():
                _, _, end, packet = heapq.heappop(on_their_way)
                with contextlib.suppress(OSError):
                    os.write(end, packet)

    def close(self) -> None:
        self._stop.close()
        self._thread.result()
        self._stopped.close()
        for end in self._ends:
            os.close(end)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=DEADLINE)


@pytest.fixture
def cable() -> Iterator[Cable]:
    """Two hosts of our own with a cable between them."""
    names = [f"secure-chat-fault-{os.getpid()}-{n}" for n in (1, 2)]
    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "delete", name)
            made = Cable(names)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this machine does not let us make network namespaces and TUN devices ({error})")
        stack.callback(made.close)
        yield made


IMPATIENT = patched(
    "chat.TCP_OPTIONS.update(TCP_KEEPIDLE=1, TCP_KEEPINTVL=1, TCP_KEEPCNT=2, TCP_USER_TIMEOUT=2000)"
)
# ETIMEDOUT is a socket.timeout since Python 3.10.
CUT_BY_TIME = End(1, r"^Cut off: .*(did not answer in time|timed out)")


def talk_over(
    cable: Cable, bob: StartBob, start: Start, command: tuple[str, ...] = (sys.executable,)
) -> tuple[Program, Program]:
    server, port = bob("--once", python=(*cable.prefixes[0], *command))
    store_with_group(server.home / "alice")
    client = start(
        "alice_client.py", cable.ADDRESSES[0], "--port", port, python=(*cable.prefixes[1], *command)
    )
    client.expect("^You speak first", "stderr")
    server.expect("^Alice is here", "stderr")
    return server, client


@pytest.mark.exhaustive
@pytest.mark.parametrize("turn", Role)
def test_a_dead_line_is_noticed_while_nobody_says_anything(
    cable: Cable, bob: StartBob, start: Start, turn: Role
) -> None:
    server, client = talk_over(cable, bob, start, IMPATIENT)
    if turn is Role.BOB:
        client.write("request\n")
        server.expect("^Alice: request\n")
    cable.is_cut = True
    for program in (server, client):
        assert program.wait() == CUT_BY_TIME.status
        program.expect(CUT_BY_TIME.says, "stderr")


@pytest.mark.exhaustive
@pytest.mark.parametrize("sender", Role)
def test_a_dead_line_is_noticed_by_who_sends_and_by_who_waits(
    cable: Cable, bob: StartBob, start: Start, sender: Role
) -> None:
    server, client = talk_over(cable, bob, start, IMPATIENT)
    if sender is Role.BOB:
        client.write("request\n")
        server.expect("^Alice: request\n")
    cable.is_cut = True
    (server if sender is Role.BOB else client).write("into the void\n")
    for program in (server, client):
        assert program.wait() == CUT_BY_TIME.status
        program.expect(CUT_BY_TIME.says, "stderr")
        assert "into the void" not in program.stdout


@pytest.mark.exhaustive
def test_a_cable_that_is_plugged_in_again(cable: Cable, bob: StartBob, start: Start) -> None:
    server, client = talk_over(cable, bob, start)
    cable.is_cut = True
    client.write("request\n")
    assert cable.swallowed.acquire(timeout=DEADLINE)
    cable.is_cut = False
    server.expect("^Alice: request\n")
    server.write("reply\n")
    client.expect("^Bob: reply\n")
    client.end_input()
    assert (client.wait(), server.wait()) == (0, 0)
    client.expect(LEFT.says, "stderr")
    server.expect(GOODBYE_SEEN, "stderr")


@pytest.mark.exhaustive
def test_a_slow_line_that_loses_packets(cable: Cable, bob: StartBob, start: Start) -> None:
    cable.seconds, cable.loss = 0.1, 0.07
    server, client = talk_over(cable, bob, start)
    for _ in range(2):
        one_round(server, client)
    client.write(f"{LARGE[:10_000]}\n")
    server.expect(f"^Alice: {LARGE[:10_000]}\n")
    server.end_input()
    assert (client.wait(), server.wait()) == (0, 0)
    client.expect(GOODBYE_SEEN, "stderr")
    server.expect(LEFT.says, "stderr")
    assert cable.swallowed.acquire(blocking=False), "no packet was lost"
