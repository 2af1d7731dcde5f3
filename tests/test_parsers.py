"""Whatever bytes come in, and however they are split: a value, or the one documented error.

The invariant and what checks it are in fuzz.py. Here hypothesis looks for what breaks it, valid values come
back as they were, frames cross a real socket in pieces, and what was found once is tried every time.
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
from hypothesis import example, given, settings
from hypothesis import strategies as st

import crypto_utils as chat
from crypto_utils import ConnectionCut, Group, Hello, Kind, Line, MessageError, ProtocolError, Role

SEEDS = fuzz.seeds()
REGRESSIONS = [  # a target, and the input in hex that broke the invariant once
    ("text", "00e280a8e2808dc3a9"),  # a joiner was left beside an escaped character, as if that were a letter
]


def for_all(
    *values: st.SearchStrategy[Any], examples: int = 100
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return lambda test: settings(deadline=None, database=None, max_examples=examples)(given(*values)(test))


# -------------------------------------------------------------------------------------- any bytes at all


@pytest.mark.parametrize(("name", "data"), REGRESSIONS)
def test_what_was_found_once_holds(name: str, data: str) -> None:
    fuzz.TARGETS[name](bytes.fromhex(data))


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_the_inputs_to_start_from_hold_and_the_first_is_taken(name: str) -> None:
    values = [fuzz.TARGETS[name](seed) for seed in SEEDS[name]]
    assert values[0] is not None


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_any_bytes_hold(name: str) -> None:
    @for_all(
        st.sampled_from(SEEDS[name]), st.integers(0, 2000), st.integers(0, 2000), st.binary(max_size=300)
    )
    def holds(seed: bytes, at: int, cut: int, new: bytes) -> None:
        at %= len(seed) + 1
        fuzz.TARGETS[name](seed[:at] + new + seed[at + cut :])
        fuzz.TARGETS[name](new)

    holds()


@for_all(st.integers(0, 9), st.binary(max_size=600))
def test_an_insider_cannot_break_the_parser_of_plaintexts(number: int, plaintext: bytes) -> None:
    for padded in (plaintext, fuzz.pad(plaintext, chat.PADDING, "iso7816"), plaintext.ljust(768, b"\0")):
        fuzz.insider(number, padded)


@for_all(st.text(st.characters()), st.integers(8, 200))
@example("\U0001f468\u200d\U0001f469\u200d\U0001f467 \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", 8)
@example("\t" * 99 + "\u6f22" * 99, 9)
def test_any_text_is_shown_safely(text: str, columns: int) -> None:
    fuzz.check_text(text, columns)


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


@for_all(st.integers(0, 2**2049) | st.integers(GROUP.p - 9, GROUP.p + 9) | st.integers(0, 9), examples=40)
def test_check_group_takes_the_generators_and_no_other_g(g: int) -> None:
    taken = fuzz.value_or(ProtocolError, lambda: chat.check_group(Group(GROUP.p, g)) or True)
    assert bool(taken) == (1 < g < GROUP.p - 1 and jacobi(g, GROUP.p) == 1)


@for_all(st.integers(0, 2047), st.sampled_from([2, 4, 2**2046]), examples=40)
def test_check_group_refuses_p_with_any_bit_changed(bit: int, g: int) -> None:
    with pytest.raises(ProtocolError):
        chat.check_group(Group(GROUP.p ^ 1 << bit, g), checked_before=GROUP)


# -------------------------------------------------------------------------------- there and back again


@for_all(st.lists(st.binary(max_size=300)))
@example([bytes(65535), b"", b"\xff" * 65535])
def test_fields_come_back(fields: list[bytes]) -> None:
    assert chat.decode_fields(chat.encode_fields(*fields)) == fields


NUMBERS = st.integers(0, 2**4096 - 1) | st.integers(0, 300)
GROUPS = st.builds(Group, NUMBERS, NUMBERS)
NONCES = st.binary(min_size=32, max_size=32)


@pytest.mark.parametrize(
    ("sender", "groups"), [(Role.BOB, GROUPS), (Role.ALICE, st.none())], ids=["bob", "alice"]
)
def test_hellos_come_back_and_are_one_senders_alone(sender: Role, groups: st.SearchStrategy[Any]) -> None:
    @for_all(st.builds(Hello, groups, NONCES, st.binary(max_size=600), st.binary(max_size=1100)))
    def comes_back(hello: Hello) -> None:
        assert Hello.decode(sender, hello.encode()) == hello
        with pytest.raises(ProtocolError, match="too many or too few fields"):
            Hello.decode(sender.peer, hello.encode())

    comes_back()


@for_all(st.lists(st.binary(max_size=300)), st.lists(st.integers(1, 99)))
def test_frames_come_back_whatever_the_pieces(payloads: list[bytes], sizes: list[int]) -> None:
    assert fuzz.check_frames(b"".join(map(chat.frame, payloads)), 300, sizes) == payloads


@for_all(st.lists(st.text(max_size=600), max_size=4), st.text())
def test_records_come_back(texts: list[str], goodbye: str) -> None:
    sealer = chat.Sealer(Role.BOB, fuzz.KEYS, fuzz.TH, fuzz.OWN)
    opener = fuzz.opener_at(0)
    messages = [(Kind.READY, ""), *((Kind.TEXT, text) for text in texts), (Kind.CLOSE, goodbye)]
    for kind, text in messages:
        record = sealer.seal(kind, text)
        assert opener.open(record) == (kind, text, bytes(32))
        length = (33 + len(text.encode())) // 256 + 1
        assert len(record) == 12 + 256 * length + 16 + 256, "the length tells more than its class"
    assert not sealer.is_open
    assert not opener.is_open


@pytest.mark.parametrize("size", [chat.TEXT_LIMIT - 1, chat.TEXT_LIMIT])
@pytest.mark.parametrize("char", ["a", "\U0001f600"])
def test_the_longest_texts_come_back_and_fit_into_a_frame(size: int, char: str) -> None:
    text = char * (size // len(char.encode()))
    sealer, opener = chat.Sealer(Role.BOB, fuzz.KEYS, fuzz.TH, fuzz.OWN), fuzz.opener_at(1)
    sealer._next = 1
    record = sealer.seal(Kind.TEXT, text)
    assert len(record) <= chat.RECORD_LIMIT
    assert opener.open(record).text == text


@for_all(st.text(), st.characters(categories=["Cs"]), st.text())
def test_a_lone_surrogate_is_refused_at_home_and_costs_nothing(
    before: str, surrogate: str, after: str
) -> None:
    sealer = chat.Sealer(Role.BOB, fuzz.KEYS, fuzz.TH, fuzz.OWN)
    with pytest.raises(MessageError, match=r"^the text is not valid Unicode$"):
        sealer.seal(Kind.TEXT, before + surrogate + after)
    assert sealer.number == 0


@for_all(GROUPS)
def test_groups_come_back(group: Group) -> None:
    assert Group.load(group.export()) == Group.load(group.export().replace(b"\n", b"\r\n")) == group


NAMES = st.text(st.characters(categories=["L", "N", "P", "S"], exclude_characters="#"), min_size=1)


@for_all(
    st.lists(NAMES, unique=True, max_size=6), st.lists(st.text(st.characters(exclude_categories=["C", "Z"])))
)
def test_pins_come_back_after_the_comments(names: list[str], comments: list[str]) -> None:
    disk = fuzz.Disk("".join(f"#{comment}\n" for comment in comments).encode())
    for name in names:
        assert chat.KnownPeer(disk, name).pin(fuzz.OWN) is True
    lines = [f"#{comment}" for comment in comments] + [f"{name} {chat.ssh_line(fuzz.OWN)}" for name in names]
    for name in names:
        assert chat.KnownPeer(disk, name)._lines() == list(enumerate(lines, 1))
        assert chat.KnownPeer(disk, name).pin(fuzz.OWN) is False
        with pytest.raises(chat.TrustError):
            chat.KnownPeer(disk, name).check(fuzz.STRANGER)


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
        line = Line(connected)
        with pytest.raises(ConnectionCut, match=r"^the connection ended without a goodbye$"):
            while True:
                frames.append(line.receive(limit))
    return frames


@for_all(st.lists(st.binary(max_size=200), max_size=8), st.lists(st.integers(1, 64), max_size=30))
def test_a_real_socket_may_split_frames_anywhere(payloads: list[bytes], sizes: list[int]) -> None:
    assert receive_all(split(b"".join(map(chat.frame, payloads)), sizes), 200) == payloads


def test_a_handshake_and_a_conversation_come_in_byte_by_byte() -> None:
    payloads = [SEEDS["hello"][0][1:], *fuzz.RECORDS]
    stream = b"".join(map(chat.frame, payloads))
    assert receive_all([stream[at : at + 1] for at in range(len(stream))], chat.HELLO_LIMIT) == payloads


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
            line = Line(connected)
            tracemalloc.start()
            try:
                with pytest.raises(error):
                    line.receive(limit)
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
    done = run_fuzzer("--runs", "20000", "--seconds", "15")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("driver: ")
    count, rest = done.stdout.splitlines()[-1].split(" ", 1)
    assert rest == "inputs, 0 findings"
    assert int(count) > 100


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
