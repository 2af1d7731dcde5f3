"""Whatever bytes come in, and however they are split: a value, or the one documented error.

The invariant and what checks it are in fuzz.py. Frames also cross a real socket in pieces here, and an input
that broke the invariant once is tried every time.
"""

from __future__ import annotations

import contextlib
import socket
import tracemalloc
from collections.abc import Iterator
from random import Random
from typing import Any

import fuzz
import pytest
from conftest import loopback

import crypto_utils as chat
from crypto_utils import ConnectionCut, FrameSocket, ProtocolError

REGRESSIONS = [  # a target, and an input in hex that is easily taken for another
    ("text", "00e280a8e2808dc3a9"),  # a joiner was left beside an escaped character, as if that were a letter
    ("text", b"\x90".hex() + ("\u0600" * 90).encode().hex()),  # number signs were no columns wide
    ("text", b"\x02".hex() + ("\u4dc0" * 90).encode().hex()),  # these were one column wide
]


# -------------------------------------------------------------------------------------- any bytes at all


@pytest.mark.parametrize(("name", "data"), REGRESSIONS)
def test_an_input_that_broke_the_invariant_holds(name: str, data: str) -> None:
    fuzz.TARGETS[name](bytes.fromhex(data))


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_any_bytes_hold(name: str) -> None:
    """As many as take a tenth of a second. The first is valid; the planted bugs below are found by fewer."""
    assert fuzz.TARGETS[name](fuzz.seeds()[name][0]) is not None
    assert fuzz.run(fuzz.inputs([name], 300, seed=1)) == 0


@pytest.mark.exhaustive
def test_the_fuzzer_finds_nothing() -> None:
    """Other inputs, fifteen times as many as find each of the planted bugs below."""
    assert fuzz.run(fuzz.inputs(list(fuzz.TARGETS), 15_000, seed=2)) == 0


@pytest.mark.parametrize("name", ["decode_fields", "to_bytes", "printable", "unpad", "ssh_line"])
def test_the_fuzzer_finds_a_planted_bug_and_reports_it(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = getattr(chat, name)
    monkeypatch.setattr(chat, name, lambda *arguments, **named: good(*arguments, **named)[1:])
    assert fuzz.run(fuzz.inputs(list(fuzz.TARGETS), 1000, seed=1)) == 1
    found, _, last = capsys.readouterr().out.splitlines()[-3:]
    assert found.startswith("the invariant does not hold: (")
    assert last.endswith(" inputs, 1 findings")


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


def test_a_real_socket_may_split_frames_anywhere() -> None:
    random = Random(1)
    for _ in range(20):
        payloads = [random.randbytes(random.choice((0, 1, 20, 200))) for _ in range(random.randrange(6))]
        data, pieces, received = b"".join(map(chat.frame, payloads)), [], []
        while data:
            size = random.choice((1, 2, 3, 4, 5, 60, 300))
            pieces.append(data[:size])
            data = data[size:]
        with InPieces.of(pieces) as connected:
            incoming = FrameSocket(connected)
            with pytest.raises(ConnectionCut, match="without a goodbye"):
                while True:
                    received.append(incoming.receive(200))
        assert received == payloads


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
