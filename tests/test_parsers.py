"""Whatever bytes come in, and however they are split: a value, or the one documented error.

The invariant and what checks it are in fuzz.py. Frames also cross a real socket in pieces here, and an input
that broke the invariant once is tried every time.
"""

from __future__ import annotations

import fuzz
import pytest

import crypto_utils as chat

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


@pytest.mark.parametrize("name", ["decode_fields", "to_bytes", "printable", "unpad"])
def test_the_fuzzer_finds_a_planted_bug_and_reports_it(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = getattr(chat, name)
    monkeypatch.setattr(chat, name, lambda *arguments, **named: good(*arguments, **named)[:-1])
    assert fuzz.run(fuzz.inputs(list(fuzz.TARGETS), 1000, seed=1)) == 1
    found, _, last = capsys.readouterr().out.splitlines()[-3:]
    assert found.startswith("the invariant does not hold: (")
    assert last.endswith(" inputs, 1 findings")


# ------------------------------------------------------------------------------------- on a real socket


def test_a_stream_cut_anywhere_is_cut_in_a_message_or_between_two() -> None:
    stream = chat.frame(b"hello") + chat.frame(b"") + chat.frame(b"world")
    for end in range(len(stream) + 1):
        for size in (1, 3, len(stream)):
            fuzz.check_frames(stream[:end], 5, [size])
