"""A transcript proves to anybody who said what in one conversation, and any change to it is found.

Here are the file and its reader. Files that are valid, or refused, are in tests/vectors/ too.
"""

from __future__ import annotations

import io
import itertools
import socket
import stat
import time
import tracemalloc
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import pytest
from conftest import (
    DEADLINE,
    GROUP,
    Background,
    Ends,
    Keys,
    StartBob,
    Stranger,
    entries,
    one_round,
    pin_each_other,
    shake_hands,
    store_with_group,
)

import crypto_utils as chat
from crypto_utils import (
    Channel,
    ConnectionCut,
    FileError,
    Group,
    KeyStore,
    Message,
    Opener,
    ProtocolError,
    RecordType,
    Role,
    Sealer,
    Transcript,
)

BOB, ALICE = Role
READY, TEXT, CLOSE = RecordType
REQUEST, REPLY = "the request, which nobody else may read", "the reply, which nobody else may read"


@pytest.fixture(autouse=True)
def files_are_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close the file of each transcript with the test that made it."""
    made: list[Transcript] = []
    make = Transcript.__init__

    def noted(transcript: Transcript, *arguments: Any) -> None:
        made.append(transcript)
        make(transcript, *arguments)

    monkeypatch.setattr(Transcript, "__init__", noted)
    yield
    for transcript in made:
        transcript._file.close()


@pytest.fixture
def kept(tmp_path: Path, keys: Keys) -> Iterator[Ends]:
    """Both channels at Alice's first turn, each with a transcript that has begun."""
    (tmp_path / "kept").mkdir()
    stores = KeyStore(tmp_path / "bob"), store_with_group(tmp_path / "alice")
    ends = shake_hands(*stores, keys, tmp_path / "kept")
    yield ends
    for channel in ends:
        channel.frames.socket.close()


def path_of(channel: Channel) -> Path:
    assert channel.transcript.path
    return channel.transcript.path


def file_of(channel: Channel) -> bytes:
    return path_of(channel).read_bytes()


def talk(ends: Ends) -> None:
    ends.alice.send(REQUEST)
    assert ends.bob.receive().text == REQUEST
    ends.bob.send(REPLY)
    assert ends.alice.receive().text == REPLY


def leave(leaving: Channel, staying: Channel) -> Message:
    """Let one side leave; return the goodbye as the other one received it."""
    staying.frames.deadline = time.monotonic() + DEADLINE
    left = Background(leaving.close)
    message = staying.receive()
    staying.close()
    left.result()
    return message


@pytest.fixture
def evidence(kept: Ends) -> bytes:
    """A conversation as both sides kept it: both READY, request, reply, and Alice's goodbye."""
    talk(kept)
    leave(kept.alice, kept.bob)
    assert file_of(kept.alice) == file_of(kept.bob)
    return file_of(kept.bob)


def said(data: bytes) -> list[tuple[Role, RecordType, str]]:
    return [
        (opener.sender, message.type, "" if message.type is READY else message.text)
        for opener, message in chat.verify_transcript(io.BytesIO(data))
    ]


EVERYTHING = [
    (ALICE, READY, ""),
    (BOB, READY, ""),
    (ALICE, TEXT, REQUEST),
    (BOB, TEXT, REPLY),
    (ALICE, CLOSE, ""),
]


def joined(parts: list[bytes]) -> bytes:
    return b"".join(map(chat.frame, parts))


def ends_after(parts: list[bytes], keys: Keys, role: Role = ALICE) -> tuple[Sealer, Opener]:
    """What one side has after these entries. Whoever keeps a file, and has their own RSA key, has it too."""
    z, th = parts[2][1:], sha256(joined([parts[0][1:], parts[1][1:]])).digest()
    own, other = (Opener(who, getattr(keys, who.value).public_key(), z, th) for who in (role, role.peer))
    for part in parts[3:]:
        opener, back = (own, other) if part[:1] == role.tag else (other, own)
        opener.open(part[1:], back)
    sealer = Sealer(role, getattr(keys, role.value), z, th)
    sealer.number, sealer.latest, sealer.before = own.number, own.latest, own.before
    return sealer, other


# ----------------------------------------------------------------------------------- what it proves


def test_it_proves_who_said_what_in_which_order(evidence: bytes, keys: Keys) -> None:
    assert said(evidence) == EVERYTHING
    for opener, _ in chat.verify_transcript(io.BytesIO(evidence)):
        owner = keys.bob if opener.sender is BOB else keys.alice
        assert opener.signer == owner.public_key()


def near_an_end(evidence: bytes) -> set[int]:
    """Places in a transcript: the length, the tag and the first bytes of each entry, and its last two."""
    ends = itertools.accumulate(4 + len(entry) for entry in entries(evidence))
    return {end + n for end in (0, *ends) for n in range(-2, 7)} & {*range(len(evidence))}


def test_every_byte_of_it_counts(evidence: bytes) -> None:
    """Each 31st, and those where an entry ends: the code is that which test_attacks.py tries with each."""
    random = Random(1)
    for at in sorted({*range(0, len(evidence), 31)} | near_an_end(evidence)):
        changed = bytearray(evidence)
        changed[at] ^= 1 << random.randrange(8)
        with pytest.raises(ProtocolError):
            said(bytes(changed))


def test_cut_anywhere_it_proves_what_is_left_and_no_goodbye(evidence: bytes) -> None:
    ends = list(itertools.accumulate(4 + len(entry) for entry in entries(evidence)))
    for end in sorted({*range(0, len(evidence), 31)} | near_an_end(evidence)):
        if end in ends[4:]:
            assert said(evidence[:end]) == EVERYTHING[: ends.index(end) - 2]
        else:
            reason = "ends in the middle of an entry|both hellos, Z and both READY"
            with pytest.raises(ProtocolError, match="no transcript" if end < 5 else reason):
                said(evidence[:end])


def test_whoever_keeps_it_cannot_put_words_into_the_others_mouth(evidence: bytes, keys: Keys) -> None:
    """It gives the AES keys away, and no more: another text needs the sender's signature."""
    parts = entries(evidence)
    sealer, heard = ends_after(parts[:5], keys)
    sealer.signer = keys.mallory
    parts[5] = b"A" + sealer.seal(TEXT, b"I owe you 1000", heard)
    with pytest.raises(ProtocolError, match="the record's signature is not valid"):
        said(joined(parts))


def changed_by_alice(evidence: bytes, keys: Keys, text: bytes) -> list[bytes]:
    """The entries, with another request of Alice's in the place of hers: she has all her keys."""
    parts = entries(evidence)
    sealer, heard = ends_after(parts[:5], keys)
    return [*parts[:5], b"A" + sealer.seal(TEXT, text, heard), *parts[6:]]


def test_whoever_keeps_it_cannot_change_what_was_replied_to(evidence: bytes, keys: Keys) -> None:
    """Bob's reply names the request that he had received."""
    parts = changed_by_alice(evidence, keys, b"I owe you 1 coin")
    assert said(joined(parts[:6]))[-1] == (ALICE, TEXT, "I owe you 1 coin")
    with pytest.raises(ProtocolError, match="replies to another record"):
        said(joined(parts))


def test_whoever_keeps_it_can_change_their_last_words_and_it_says_so(kept: Ends, keys: Keys) -> None:
    """What a file does not prove: words that the other side says it had not received."""
    kept.alice.send(REQUEST)
    leave(kept.bob, kept.alice)
    hers, his = (
        list(chat.verify_transcript(io.BytesIO(file_of(channel)))) for channel in (kept.alice, kept.bob)
    )
    assert [message.type for _, message in hers] == [READY, READY, TEXT, CLOSE]
    assert [message.type for _, message in his] == [READY, READY, CLOSE]
    assert [message.crossed for _, message in hers] == [False, False, False, True]
    assert not his[-1][1].crossed
    changed = changed_by_alice(file_of(kept.alice), keys, b"I sent you 1000 on Monday")
    last = list(chat.verify_transcript(io.BytesIO(joined(changed))))[-1][1]
    assert (last.type, last.crossed) == (CLOSE, True)


def test_whoever_keeps_it_can_leave_out_the_end_and_put_a_goodbye_there(kept: Ends, keys: Keys) -> None:
    """What a file does not prove: that this was all. What came after the other's last record here is gone."""
    talk(kept)
    talk(kept)
    parts = entries(file_of(kept.alice))[:7]
    sealer, heard = ends_after(parts, keys)
    assert said(joined([*parts, b"A" + sealer.seal(CLOSE, b"", heard)])) == EVERYTHING


# q is composite, and yet p is prime and 4^q = 1 mod p.
UNSAFE = Group(2**2203 - 1, 4)


def test_a_group_is_tested_in_full_whoever_vouches_for_it(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides have taken these parameters, and all else is right."""

    def fixed(length: int) -> bytes:  # 4 has the order 2203 in UNSAFE: one exponent in so many would give 1
        return b"\7" * length

    tested: list[tuple[int, int]] = []
    miller_rabin = chat.miller_rabin_test
    monkeypatch.setattr(chat, "miller_rabin_test", lambda *q_n: (tested.append(q_n), miller_rabin(*q_n))[1])
    for group in (GROUP, UNSAFE):
        with mock.patch("secrets.token_bytes", fixed):
            bob, exponent, r = chat.make_hello(BOB, keys.bob, group)
            alice, _, _ = chat.make_hello(ALICE, keys.alice, group)
        z = chat.shared_secret(exponent, alice)
        parts = [b"b" + bob.encode(), b"a" + alice.encode(), b"z" + z]
        for role, body in ((ALICE, b""), (BOB, r)):
            sealer, heard = ends_after(parts, keys, role)
            parts.append(role.tag + sealer.seal(READY, body, heard))
        if group == GROUP:
            assert said(joined(parts)) == EVERYTHING[:2]
        else:
            with pytest.raises(ProtocolError, match="p is not a safe prime"):
                said(joined(parts))
    assert tested == [((group.p - 1) // 2, 64) for group in (GROUP, UNSAFE)]


# -------------------------------------------------------------------------------------- how it is kept


def test_it_holds_each_record_as_soon_as_it_is_sent_or_received(kept: Ends) -> None:
    assert said(file_of(kept.bob)) == said(file_of(kept.alice)) == EVERYTHING[:2]
    kept.alice.send(REQUEST)
    assert said(file_of(kept.alice)) == EVERYTHING[:3]
    assert said(file_of(kept.bob)) == EVERYTHING[:2]
    kept.bob.receive()
    assert said(file_of(kept.bob)) == EVERYTHING[:3]


def test_a_text_whose_sending_failed_is_in_it(kept: Ends) -> None:
    """It may have arrived; a goodbye that comes after all tells whether it has."""
    kept.alice.frames.socket.shutdown(socket.SHUT_RDWR)
    with pytest.raises(ConnectionCut, match="the connection broke"):
        kept.alice.send(REQUEST)
    assert said(file_of(kept.alice)) == EVERYTHING[:3]


def test_without_a_folder_nothing_is_kept(ends: Ends) -> None:
    ends.alice.send(REQUEST)
    for channel in ends:
        channel.transcript.begin(channel.sealer.sender)
        assert (channel.transcript.path, channel.transcript._file.getvalue()) == (None, b"")


def test_a_conversation_has_a_new_file_that_nobody_else_may_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named after the time and the role. No file that is there is touched, whoever made it."""
    monkeypatch.setattr(time, "gmtime", lambda: time.struct_time((2026, 1, 2, 3, 4, 5, 0, 0, 0)))
    name = "2026-01-02T03-04-05Z-bob"
    (tmp_path / f"{name}.transcript").write_text("what somebody wrote, and wants to keep")
    (tmp_path / f"{name}-2.transcript").symlink_to(tmp_path / "elsewhere")
    made = []
    for role in (BOB, BOB, ALICE):
        transcript = Transcript(tmp_path)
        transcript.add(b"b", b"hello")
        transcript.begin(role)
        assert transcript.path
        made.append(transcript.path)
    assert [path.name for path in made] == [
        f"{name}-3.transcript",
        f"{name}-4.transcript",
        "2026-01-02T03-04-05Z-alice.transcript",
    ]
    assert [stat.S_IMODE(path.stat().st_mode) for path in made] == [0o600] * 3
    assert {path.read_bytes() for path in made} == {chat.frame(b"bhello")}
    assert (tmp_path / f"{name}.transcript").read_text() == "what somebody wrote, and wants to keep"
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("folder", ["missing", "file", "x" * 300])
def test_a_folder_that_cannot_be_used_is_told_with_its_name(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match=f"cannot write .*{folder}/"):
        Transcript(tmp_path / folder).begin(BOB)


def test_a_goodbye_that_cannot_be_kept_is_said_all_the_same(
    kept: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other side is not left to think that somebody has cut the connection."""

    def full(*_: bytes) -> None:
        raise FileError("cannot write it: No space left on device")

    monkeypatch.setattr(kept.bob.transcript, "add", full)
    assert leave(kept.bob, kept.alice).type is CLOSE


# -------------------------------------------------------------------------------------- how it is read


class Counted(io.RawIOBase):
    """A file that is not there: both READY, then texts without end. It counts what is read at once."""

    def __init__(self, beginning: bytes, rest: Iterator[bytes]) -> None:
        self.data, self.rest, self.largest, self.total = beginning, rest, 0, 0

    def read(self, size: int = -1) -> bytes:
        assert size >= 0, "read to its end"
        while len(self.data) < size:
            self.data += next(self.rest)
        self.largest, self.total = max(self.largest, size), self.total + size
        piece, self.data = self.data[:size], self.data[size:]
        return piece


def test_it_is_read_as_a_stream(keys: Keys, evidence: bytes) -> None:
    """However long the conversation is, there is one entry of it in memory."""
    parts = entries(evidence)[:5]
    sides = {role: ends_after(parts, keys, role) for role in Role}

    def texts() -> Iterator[bytes]:
        for role in itertools.cycle((ALICE, BOB)):
            record = sides[role][0].seal(TEXT, bytes(100_000), sides[role][1])
            sides[role.peer][1].open(record, sides[role.peer][0])
            yield chat.frame(role.tag + record)

    file = Counted(joined(parts), texts())
    tracemalloc.start()
    try:
        for number, (_, message) in enumerate(chat.verify_transcript(file)):
            assert message.type is (READY if number < 2 else TEXT)
            if file.total > 5_000_000:
                break
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()
    assert file.largest < 101_000


@pytest.mark.parametrize("place", range(6))
def test_an_entry_over_its_limit_is_refused_before_it_is_read(evidence: bytes, place: int) -> None:
    limit = (8192, 8192, 512, 4096, 4096, chat.RECORD_LIMIT)[place]
    parts = entries(evidence)
    for length in (limit + 2, 2**31, 2**32 - 1):  # with the tag
        file = Counted(joined(parts[:place]) + length.to_bytes(4, "big") + parts[place][:1], iter(()))
        with pytest.raises(ProtocolError, match=f"an entry of {length - 1} bytes, over the limit of {limit}"):
            list(chat.verify_transcript(file))
        assert file.largest <= 8192


# -------------------------------------------------------------------------------------------- the program


def test_bob_keeps_each_conversation_of_a_run_in_a_file_of_its_own(
    bob: StartBob, homes: Path, tmp_path: Path, keys: Keys, stranger: Stranger
) -> None:
    server, port = bob("--transcript", str(tmp_path / "kept"))
    pin_each_other(homes, port)
    for number in range(2):
        guest = stranger(port, keys.alice)
        one_round(server, guest, f"request {number}")
        guest.close()
        server.expect("Waiting for Alice", "stderr")
    texts = {
        tuple(text for _, _, text in said(path.read_bytes()) if text)
        for path in (tmp_path / "kept").iterdir()
    }
    assert texts == {(f"request {n}", f"reply to request {n}") for n in range(2)}
