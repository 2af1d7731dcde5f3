"""Whatever bytes come in, and however they are split: a value, or the one documented error.

The invariant and what checks it are in fuzz.py. Here hypothesis looks for what breaks it, valid values come
back as they were, frames cross a real socket in pieces, and an input that broke it once is tried every time.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from typing import Any, Callable

import fuzz
import pytest
from conftest import DEADLINE, GROUP, ROOT, loopback

import crypto_utils as chat
from crypto_utils import ConnectionCut, FrameSocket, Group, Hello, ProtocolError, RecordType, Role

SEEDS = fuzz.seeds()
REGRESSIONS = [  # a target, and an input in hex that is easily taken for another
    ("text", "00e280a8e2808dc3a9"),  # a joiner was left beside an escaped character, as if that were a letter
    ("text", b"\x90".hex() + ("\u0600" * 90).encode().hex()),  # number signs were no columns wide
]


@pytest.fixture
def st() -> Any:
    """Hypothesis' strategies, where it is installed."""
    return pytest.importorskip("hypothesis.strategies", reason="python3 -m pip install hypothesis")


def for_all(test: Callable[..., None], *values: Any, examples: int = 100, also: tuple[Any, ...] = ()) -> None:
    """Let hypothesis look for values that fail the test. `also` are tried every time."""
    from hypothesis import example, given, settings

    given_values = given(*values)(test)
    for arguments in also:
        given_values = example(*arguments)(given_values)
    settings(deadline=None, database=None, max_examples=examples)(given_values)()


# -------------------------------------------------------------------------------------- any bytes at all


@pytest.mark.parametrize(("name", "data"), REGRESSIONS)
def test_an_input_that_broke_the_invariant_holds(name: str, data: str) -> None:
    fuzz.TARGETS[name](bytes.fromhex(data))


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_the_inputs_to_start_from_hold_and_the_first_is_taken(name: str) -> None:
    values = [fuzz.TARGETS[name](seed) for seed in SEEDS[name]]
    assert values[0] is not None


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_any_bytes_hold(st: Any, name: str) -> None:
    def holds(seed: bytes, at: int, cut: int, new: bytes) -> None:
        at %= len(seed) + 1
        fuzz.TARGETS[name](seed[:at] + new + seed[at + cut :])
        fuzz.TARGETS[name](new)

    numbers = st.integers(0, 2000)
    for_all(holds, st.sampled_from(SEEDS[name]), numbers, numbers, st.binary(max_size=300), examples=30)


def test_any_text_is_shown_safely(st: Any) -> None:
    family, persian = (
        "\U0001f468\u200d\U0001f469\u200d\U0001f467 ",
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    )
    also = ((family + persian, 8), ("\t" * 99 + "\u6f22" * 99, 9), ("\u4dc0" * 99, 9))

    def is_safe(text: str, columns: int) -> None:
        fuzz.check_text(text, columns)

    for_all(is_safe, st.text(st.characters()), st.integers(8, 200), also=also)


def jacobi(a: int, n: int) -> int:
    """Return the Jacobi symbol: for a prime n, whether a is a square (1), not one (-1), or 0 mod n."""
    a, sign = a % n, 1
    while a:
        while a % 2 == 0:
            a //= 2
            sign *= -1 if n % 8 in (3, 5) else 1
        a, n, sign = n, a, -sign if a % 4 == n % 4 == 3 else sign
        a %= n
    return sign if n == 1 else 0


def test_check_group_takes_the_generators_and_no_other_g(st: Any) -> None:
    def decides(g: int) -> None:
        taken = fuzz.value_or(ProtocolError, lambda: chat.check_group(Group(GROUP.p, g), rounds=1) or True)
        assert bool(taken) == (1 < g < GROUP.p - 1 and jacobi(g, GROUP.p) == 1)

    near = st.integers(GROUP.p - 9, GROUP.p + 9) | st.integers(0, 9)
    for_all(decides, st.integers(0, 2**2049) | near, examples=40)


# -------------------------------------------------------------------------------- there and back again


@pytest.mark.parametrize("sender", Role)
def test_hellos_come_back_and_are_one_senders_alone(st: Any, sender: Role) -> None:
    def comes_back(hello: Hello) -> None:
        assert Hello.decode(sender, hello.encode()) == hello
        with pytest.raises(ProtocolError, match="too many or too few fields"):
            Hello.decode(sender.peer, hello.encode())

    nonces = st.binary(min_size=32, max_size=32)
    numbers = st.integers(0, 2**4096 - 1) | st.integers(0, 300)
    group = st.builds(Group, numbers, numbers) if sender is Role.BOB else st.none()
    for_all(comes_back, st.builds(Hello, group, nonces, st.binary(max_size=600), st.binary(max_size=1100)))


def test_records_come_back(st: Any) -> None:
    def come_back(texts: list[str]) -> None:
        sides = {role: fuzz.opener_at(0, role.peer) for role in Role}  # what each has: opener, sealer
        for opener, sealer in sides.values():
            opener.number = sealer.number = 0
            sealer.latest = chat.NOTHING
        said = [(RecordType.READY, b""), (RecordType.READY, fuzz.R)]
        said += [(RecordType.TEXT, text.encode()) for text in texts]
        for number, (record_type, body) in enumerate([*said, (RecordType.CLOSE, b"")]):
            sender = list(Role)[(number + 1) % 2]
            record = sides[sender][1].seal(record_type, body, sides[sender][0])
            opener, sealer = sides[sender.peer]
            assert opener.open(record, sealer)[:2] == (record_type, body)

    for_all(come_back, st.lists(st.text(max_size=600), max_size=4), examples=30)


def test_pins_come_back_after_the_comments(st: Any) -> None:
    def come_back(names: list[str], comments: list[str]) -> None:
        disk = fuzz.Disk("".join(f"#{comment}\n" for comment in comments).encode())
        for name in (*names, *names):
            chat.PinnedPeer(disk, name).pin(fuzz.OWN)
        lines = [f"#{comment}" for comment in comments]
        lines += [f"{name.lower()} {chat.ssh_line(fuzz.OWN)}" for name in names]
        assert disk.content.decode() == "".join(line + "\n" for line in lines)
        for name in names:
            trust = chat.PinnedPeer(disk, name).check(fuzz.OWN)
            others = {other.lower() for other in names} - {name.lower()}
            assert (trust.known, set(trust.also)) == (True, others)
            with pytest.raises(chat.TrustError):
                chat.PinnedPeer(disk, name).check(fuzz.STRANGER)

    hosts = st.from_regex(r"[A-Za-z0-9.:_-]{1,30}", fullmatch=True)
    names = st.builds("[{}]:{}".format, hosts, st.integers(0, 65535))
    comments = st.lists(st.text(st.characters(exclude_categories=["C", "Z"])))
    for_all(come_back, st.lists(names, unique_by=str.lower, max_size=6), comments, examples=20)


# ------------------------------------------------------------------------------------- on a real socket


class InPieces(socket.socket):
    """A connected socket whose peer sends the next piece when all before it has been read, and then ends."""

    @classmethod
    @contextlib.contextmanager
    def of(cls, pieces: list[bytes]) -> Iterator[InPieces]:
        near, far = loopback()
        with cls(fileno=near.detach()) as self, far:
            self._pieces, self._far, self._unread = iter(pieces), far, 0
            yield self

    def recv_into(self, buffer: Any, *_: int) -> int:
        if not self._unread:
            piece = next(self._pieces, b"")
            self._unread = len(piece)
            if piece:
                self._far.sendall(piece)
            else:
                self._far.shutdown(socket.SHUT_WR)
        got = super().recv_into(buffer)
        self._unread -= got
        return got


def split(data: bytes, sizes: list[int]) -> list[bytes]:
    """Cut data into pieces of these sizes, and what is left."""
    pieces = []
    for size in sizes:
        pieces.append(data[:size])
        data = data[size:]
    return [piece for piece in (*pieces, data) if piece]


def receive_all(pieces: list[bytes], limit: int) -> list[bytes]:
    """Return the frames that come in up to the end between two of them."""
    frames = []
    with InPieces.of(pieces) as connected:
        incoming = FrameSocket(connected)
        with pytest.raises(ConnectionCut, match="without a goodbye"):
            while True:
                frames.append(incoming.receive(limit))
    return frames


def test_a_real_socket_may_split_frames_anywhere(st: Any) -> None:
    def come_in(payloads: list[bytes], sizes: list[int]) -> None:
        assert receive_all(split(b"".join(map(chat.frame, payloads)), sizes), 200) == payloads

    sizes = st.lists(st.integers(1, 64), max_size=30)
    for_all(come_in, st.lists(st.binary(max_size=200), max_size=8), sizes, examples=50)


def test_a_stream_cut_anywhere_is_cut_in_a_message_or_between_two() -> None:
    stream = chat.frame(b"hello") + chat.frame(b"") + chat.frame(b"world")
    for end in range(len(stream) + 1):
        for size in (1, 3, len(stream)):
            fuzz.check_frames(stream[:end], 5, [size])


@pytest.mark.parametrize("limit", [chat.HELLO_LIMIT, chat.READY_LIMIT, chat.RECORD_LIMIT])
def test_a_frame_over_the_limit_allocates_nothing(limit: int) -> None:
    def peak(length: int, error: type[Exception]) -> int:
        """Return how much was allocated at most when a frame of this length is announced, and no more."""
        with InPieces.of([length.to_bytes(4, "big")]) as connected:
            incoming = FrameSocket(connected)
            tracemalloc.start()
            try:
                with pytest.raises(error):
                    incoming.receive(limit)
                return tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()

    for length in (limit + 1, 2**31, 2**32 - 1):
        assert peak(length, ProtocolError) < 2**20
    assert peak(limit, ConnectionCut) >= limit, "what is allocated would be seen"


# ------------------------------------------------------------------------------------------- the fuzzer


def run_fuzzer(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tests" / "fuzz.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)


def test_the_fuzzer_finds_nothing() -> None:
    done = run_fuzzer("--runs", "300", "--seconds", "5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("driver: ")
    count, rest = done.stdout.splitlines()[-1].split(" ", 1)
    assert rest == "inputs, 0 findings"
    assert int(count) > 100


@pytest.mark.exhaustive
def test_the_fuzzer_runs_one_input_again() -> None:
    done = run_fuzzer("--input", fuzz.corpus(["frames"])[0].hex())
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "1 inputs, 0 findings"), done.stderr


@pytest.mark.parametrize("name", ["decode_fields", "to_bytes", "printable", "unpad", "ssh_line"])
def test_the_fuzzer_finds_a_planted_bug_and_reports_it(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = getattr(chat, name)
    monkeypatch.setattr(chat, name, lambda *arguments, **named: good(*arguments, **named)[1:])
    session = fuzz.Session(argparse.Namespace(target=None))
    session.by_chance(argparse.Namespace(runs=1000, seconds=math.inf, seed=1))
    assert session.finding is not None
    assert session.report() == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2].endswith(f"--input {session.finding.hex()}")
    assert printed[-1].endswith(" inputs, 1 findings")
