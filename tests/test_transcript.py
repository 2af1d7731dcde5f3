"""A transcript proves to anybody who said what in one conversation, and any change to it is found.

Here are the file and its reader. Files that are valid, or refused, are in tests/vectors/ too.
"""

from __future__ import annotations

import io
import itertools
import os
import resource
import signal
import stat
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from conftest import (
    DEADLINE,
    ROOT,
    Background,
    Ends,
    Keys,
    Program,
    Start,
    StartBob,
    entries,
    exhaustive,
    patched,
    shake_hands,
    store_with_group,
)

import crypto_utils as chat
from crypto_utils import (
    Channel,
    ConnectionCut,
    FileError,
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
        if hasattr(transcript, "_file"):
            transcript._file.close()


@pytest.fixture
def kept(tmp_path: Path, keys: Keys) -> Iterator[Ends]:
    """Both channels at Alice's first turn, each with a transcript, in folders of their own."""
    stores = KeyStore(tmp_path / "bob"), store_with_group(tmp_path / "alice")
    ends = shake_hands(*stores, keys, evidence=True)
    for channel in ends:
        folder = tmp_path / f"{channel.role.value}'s transcripts"
        folder.mkdir()
        channel.transcript = Transcript(folder, channel.role, channel.beginning)
    yield ends
    for channel in ends:
        channel.frames.socket.close()


def file_of(channel: Channel) -> bytes:
    assert channel.transcript
    return channel.transcript.path.read_bytes()


def talk(ends: Ends, rounds: int = 1) -> None:
    for _ in range(rounds):
        ends.alice.send(REQUEST)
        assert ends.bob.receive().text == REQUEST
        ends.bob.send(REPLY)
        assert ends.alice.receive().text == REPLY


def leave(leaving: Channel, staying: Channel, reason: str = "") -> Message:
    """Let one side leave; return the goodbye as the other one received it."""

    def stay() -> Message:
        message = staying.receive()
        staying.close()
        return message

    left = Background(stay)
    leaving.close(reason)
    message = left.result()
    assert isinstance(message, Message)
    return message


@pytest.fixture
def evidence(kept: Ends) -> bytes:
    """A conversation as both sides kept it: both READY, request, reply, and Alice's goodbye."""
    talk(kept)
    leave(kept.alice, kept.bob)
    assert file_of(kept.alice) == file_of(kept.bob)
    return file_of(kept.bob)


@pytest.fixture(autouse=True)
def quick_primes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not test the same prime over and over: that a composite p is refused is in the vectors."""
    monkeypatch.setattr(chat, "is_safe_prime", lambda *_: True)


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


# ----------------------------------------------------------------------------------- what it proves


def test_it_proves_who_said_what_in_which_order(evidence: bytes, keys: Keys) -> None:
    assert said(evidence) == EVERYTHING
    for opener, _ in chat.verify_transcript(io.BytesIO(evidence)):
        owner = keys.bob if opener.sender is BOB else keys.alice
        assert opener.signer == owner.public_key()


STEPS = [pytest.param(1, marks=pytest.mark.exhaustive), 53]  # from one byte to the next that is tried


@pytest.mark.parametrize("step", STEPS)
def test_every_byte_of_it_counts(evidence: bytes, step: int) -> None:
    random = Random(1)
    for at in range(0, len(evidence), step):
        changed = bytearray(evidence)
        changed[at] ^= 1 << random.randrange(8)
        with pytest.raises(ProtocolError):
            said(bytes(changed))


@pytest.mark.parametrize("step", STEPS)
def test_cut_anywhere_it_proves_what_is_left_and_no_goodbye(evidence: bytes, step: int) -> None:
    ends = list(itertools.accumulate(4 + len(entry) for entry in entries(evidence)))
    near_an_end = {end + n for end in (0, *ends) for n in range(-2, 7)}
    for end in sorted({*range(0, len(evidence), step), *near_an_end} & {*range(len(evidence))}):
        if end in ends[4:]:
            assert said(evidence[:end]) == EVERYTHING[: ends.index(end) - 2]
        else:
            reason = "ends in the middle of an entry|both hellos, Z and both READY"
            with pytest.raises(ProtocolError, match="no transcript" if end < 5 else reason):
                said(evidence[:end])


def test_whoever_keeps_it_cannot_put_words_into_the_others_mouth(evidence: bytes, keys: Keys) -> None:
    """It gives the AES keys away, and no more: another text needs the sender's signature."""
    parts = entries(evidence)
    z, th = parts[2][1:], chat.transcript_hash(parts[0][1:], parts[1][1:])
    sealer, opener = Sealer(ALICE, keys.mallory, z, th), Opener(BOB, keys.bob.public_key(), z, th)
    sealer.seal(READY, b"", opener)
    opener.open(parts[4][1:], sealer)
    parts[5] = b"A" + sealer.seal(TEXT, b"I owe you 1000", opener)
    with pytest.raises(ProtocolError, match="the record's signature is not valid"):
        said(joined(parts))


def changed_by_alice(evidence: bytes, keys: Keys, text: bytes) -> list[bytes]:
    """The entries, with another request of Alice's in the place of hers: she has all her keys."""
    parts = entries(evidence)
    z, th = parts[2][1:], chat.transcript_hash(parts[0][1:], parts[1][1:])
    sealer, opener = Sealer(ALICE, keys.alice, z, th), Opener(BOB, keys.bob.public_key(), z, th)
    sealer.seal(READY, b"", opener)
    sealer.latest = Opener(ALICE, keys.alice, z, th).latest  # as the READY in the file is named below
    reader = Opener(ALICE, keys.alice.public_key(), z, th)
    reader.open(parts[3][1:], Sealer(BOB, keys.bob, z, th))
    sealer.latest = reader.latest
    opener.open(parts[4][1:], sealer)
    parts[5] = b"A" + sealer.seal(TEXT, text, opener)
    return parts


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


def test_nobody_speaks_for_whoever_signed_nothing(evidence: bytes) -> None:
    """A hello that carries a key proves nothing about its owner."""
    parts = entries(evidence)
    for left_out in (3, 4):
        with pytest.raises(ProtocolError, match="both hellos, Z and both READY"):
            said(joined(parts[:left_out] + parts[left_out + 1 :]))


# -------------------------------------------------------------------------------------- how it is kept


def test_it_begins_at_once_and_holds_each_record_as_soon_as_it_is_sent_or_received(kept: Ends) -> None:
    assert said(file_of(kept.bob)) == said(file_of(kept.alice)) == EVERYTHING[:2]
    kept.alice.send(REQUEST)
    assert said(file_of(kept.alice)) == EVERYTHING[:3]
    assert said(file_of(kept.bob)) == EVERYTHING[:2]
    kept.bob.receive()
    assert said(file_of(kept.bob)) == EVERYTHING[:3]


def test_without_evidence_nothing_is_kept(ends: Ends) -> None:
    assert [channel.beginning for channel in ends] == [(), ()]
    assert [channel.transcript for channel in ends] == [None, None]


def test_a_conversation_has_a_new_file_that_nobody_else_may_read(
    evidence: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named after the time and the role. No file that is there is touched, whoever made it."""
    monkeypatch.setattr(time, "gmtime", lambda: time.struct_time((2026, 1, 2, 3, 4, 5, 0, 0, 0)))
    name = "2026-01-02T03-04-05Z-bob"
    (tmp_path / f"{name}.transcript").write_text("what somebody wrote, and wants to keep")
    (tmp_path / f"{name}-2.transcript").symlink_to(tmp_path / "elsewhere")
    beginning = tuple(entries(evidence)[:5])
    made = [Transcript(tmp_path, role, beginning).path for role in (BOB, BOB, ALICE)]
    assert [path.name for path in made] == [
        f"{name}-3.transcript",
        f"{name}-4.transcript",
        "2026-01-02T03-04-05Z-alice.transcript",
    ]
    assert [stat.S_IMODE(path.stat().st_mode) for path in made] == [0o600] * 3
    assert {path.read_bytes() for path in made} == {joined(list(beginning))}
    assert (tmp_path / f"{name}.transcript").read_text() == "what somebody wrote, and wants to keep"
    assert not (tmp_path / "elsewhere").exists()


def test_programs_that_start_at_once_have_a_file_each(evidence: bytes, tmp_path: Path) -> None:
    beginning = tuple(entries(evidence)[:5])
    makers = [Background(lambda: Transcript(tmp_path, BOB, beginning).path) for _ in range(8)]
    paths = {maker.result() for maker in makers}
    assert len(paths) == 8
    assert {path.read_bytes() for path in tmp_path.glob("*.transcript")} == {joined(list(beginning))}


@pytest.mark.parametrize("folder", ["missing", "file", "x" * 300])
def test_a_folder_that_cannot_be_used_is_told_with_its_name(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match=f"cannot write .*{folder}/"):
        Transcript(tmp_path / folder, BOB, (b"b",))


def limited(path: Path, more: int) -> Any:
    """Let no file grow beyond so much more than this one."""

    class Limit:
        def __enter__(self) -> None:
            self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
            self.handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + more, self.before[1]))

        def __exit__(self, *_: object) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
            signal.signal(signal.SIGXFSZ, self.handler)

    return Limit()


def test_a_full_disk_leaves_whole_entries_and_no_goodbye_that_looks_like_an_attack(kept: Ends) -> None:
    """What was not kept was not sent either, and nothing follows in its place."""
    assert kept.alice.transcript
    before = file_of(kept.alice)
    with (
        limited(kept.alice.transcript.path, 100),
        pytest.raises(FileError, match=r"cannot write .*transcript"),
    ):
        kept.alice.send(REQUEST)
    assert file_of(kept.alice) == before
    kept.alice.close(wait=0.1)
    with pytest.raises(ConnectionCut, match="without a goodbye"):
        kept.bob.receive()
    assert said(file_of(kept.alice)) == EVERYTHING[:2]


def test_after_a_full_disk_the_goodbye_follows_whole_entries(kept: Ends) -> None:
    """A long message does not fit any more, and a goodbye still does."""
    assert kept.bob.transcript
    kept.alice.transcript = None
    kept.alice.send("x" * 10_000)
    with limited(kept.bob.transcript.path, 5_000):
        with pytest.raises(FileError, match=r"cannot write .*transcript"):
            kept.bob.receive()
        message = leave(kept.bob, kept.alice, "my disk is full")
    assert (message.type, message.crossed) == (CLOSE, True)
    assert said(file_of(kept.bob)) == [*EVERYTHING[:2], (BOB, CLOSE, "my disk is full")]


def test_a_goodbye_that_cannot_be_kept_is_said_all_the_same(kept: Ends) -> None:
    """The other side is not left to think that somebody has cut the connection."""
    assert kept.bob.transcript
    before = file_of(kept.bob)
    kept.alice.transcript = None  # the limit is for all files
    kept.alice.frames.deadline = time.monotonic() + DEADLINE
    with limited(kept.bob.transcript.path, 0):
        left = Background(kept.bob.close)
        assert kept.alice.receive().type is CLOSE
        kept.alice.close()
        left.result()
    assert file_of(kept.bob) == before


@pytest.mark.parametrize(
    "interrupted", ["before it is written", pytest.param("after it is written", marks=pytest.mark.exhaustive)]
)
def test_the_goodbye_fits_the_file_whatever_interrupts_the_keeping(
    kept: Ends, monkeypatch: pytest.MonkeyPatch, interrupted: str
) -> None:
    """Ctrl-C between opening a record and keeping it: it is missing from the file, or named as missed."""
    add = Transcript.add

    def adding(transcript: Transcript, tag: bytes, record: chat.Buffer) -> None:
        if interrupted.startswith("after"):
            add(transcript, tag, record)
        raise KeyboardInterrupt

    kept.alice.send(REQUEST)
    monkeypatch.setattr(Transcript, "add", adding)
    with pytest.raises(KeyboardInterrupt):
        kept.bob.receive()
    monkeypatch.undo()
    message = leave(kept.bob, kept.alice)
    assert (message.type, message.crossed) == (CLOSE, True)
    missed = [] if interrupted.startswith("before") else [EVERYTHING[2]]
    assert said(file_of(kept.bob)) == [*EVERYTHING[:2], *missed, (BOB, CLOSE, "")]
    assert said(file_of(kept.alice)) == [*EVERYTHING[:3], (BOB, CLOSE, "")]


class Slow(io.FileIO):
    """A file that takes a few bytes at a time, and is interrupted at one of them."""

    def __init__(self, path: Path, stop: int) -> None:
        super().__init__(path, "r+")
        self.left = stop
        self.seek(0, os.SEEK_END)

    def write(self, data: Any) -> int:
        if self.left <= 0:
            self.left = 1 << 30
            raise KeyboardInterrupt
        written = super().write(data[: min(self.left, 100)])
        self.left -= written
        return written


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 5, 100, 544, 1 << 20])
def test_an_entry_is_written_whole_or_not_at_all(kept: Ends, stop: int) -> None:
    assert kept.alice.transcript
    before = len(file_of(kept.alice))
    kept.alice.transcript._file.close()
    with Slow(kept.alice.transcript.path, stop) as kept.alice.transcript._file:
        if stop < 1 << 20:
            with pytest.raises(KeyboardInterrupt):
                kept.alice.send(REQUEST)
            assert len(file_of(kept.alice)) == before
        else:
            kept.alice.send(REQUEST)
            assert said(file_of(kept.alice)) == EVERYTHING[:3]


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
    z, th = parts[2][1:], chat.transcript_hash(parts[0][1:], parts[1][1:])
    sides = {
        role: (Sealer(role, getattr(keys, role.value), z, th), Opener(role, getattr(keys, role.value), z, th))
        for role in Role
    }
    sides[BOB][0].seal(CLOSE, b"", sides[ALICE][1])  # to have the numbers of both READY
    sides[ALICE][0].seal(CLOSE, b"", sides[BOB][1])
    sides[ALICE][1].open(parts[3][1:], sides[BOB][1])
    sides[BOB][1].open(parts[4][1:], sides[ALICE][1])
    for sealer, opener in sides.values():
        sealer.closed, sealer.latest, sealer.number = False, opener.latest, 1

    def texts() -> Iterator[bytes]:
        for number in itertools.count():
            role = ALICE if number % 2 == 0 else BOB
            sealer, opener = sides[role]
            record = sealer.seal(TEXT, bytes(100_000), sides[role.peer][1])
            opener.open(record, sides[role.peer][0])
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


# ----------------------------------------------------------------------------------------- the programs


def verify(start: Start, path: Path, *options: str, script: str = "bob_server.py") -> Program:
    return start(script, "--verify", str(path), *options)


def test_both_programs_keep_and_verify(bob: StartBob, start: Start, tmp_path: Path, keys: Keys) -> None:
    folders = tmp_path / "of bob", tmp_path / "of alice"
    server, port = bob("--once", "--transcript", str(folders[0]))
    client = start("alice_client.py", "127.0.0.1", "--port", port, "--transcript", str(folders[1]))
    client.write("I owe you one coin\n")
    server.expect("^Alice: I owe you one coin\n")
    server.write("thank you\n")
    client.expect("^Bob: thank you\n")
    client.end_input()
    assert (client.wait(), server.wait()) == (0, 0)
    files = [path for folder in folders for path in folder.iterdir()]
    assert [path.stem.split("-")[-1] for path in files] == ["bob", "alice"]
    assert files[0].read_bytes() == files[1].read_bytes()

    verified = verify(start, files[0], "--peer", chat.fingerprint(keys.alice))
    assert verified.wait() == 0
    assert verified.stdout == "Alice: I owe you one coin\nBob: thank you\n"
    for key in (keys.bob, keys.alice):
        assert chat.fingerprint(key) in verified.stderr

    other = verify(start, files[1], "--peer", chat.fingerprint(keys.mallory), script="alice_client.py")
    assert other.wait() == 3
    assert other.stdout == ""


@pytest.mark.exhaustive
def test_a_conversation_each_in_a_file_of_its_own(bob: StartBob, start: Start, tmp_path: Path) -> None:
    """Bob talks twice in one run; neither file is the worse for the other."""
    server, port = bob("--transcript", str(tmp_path / "kept"))
    for text in ("one", "two"):
        client = start("alice_client.py", "127.0.0.1", "--port", port)
        client.write(f"{text}\n")
        server.expect(f"^Alice: {text}\n")
        server.write(f"{text} to you\n")
        client.expect(f"^Bob: {text} to you\n")
        client.end_input()
        assert client.wait() == 0
        server.expect("Waiting for Alice", "stderr")
    texts = sorted(
        [text for _, record_type, text in said(path.read_bytes()) if record_type is TEXT]
        for path in (tmp_path / "kept").iterdir()
    )
    assert texts == [["one", "one to you"], ["two", "two to you"]]


@pytest.mark.exhaustive
def test_a_cut_transcript_is_told_from_a_whole_one_and_from_a_damaged_one(
    start: Start, tmp_path: Path, evidence: bytes
) -> None:
    statuses, outputs = [], []
    for data in (evidence, joined(entries(evidence)[:-1]), evidence[:-1], b""):
        (tmp_path / "file").write_bytes(data)
        verified = verify(start, tmp_path / "file")
        statuses.append(verified.wait())
        outputs.append(verified)
    assert statuses == [0, 0, 3, 3]
    whole, cut, damaged, empty = outputs
    assert whole.stdout == cut.stdout == damaged.stdout == f"Alice: {REQUEST}\nBob: {REPLY}\n"
    assert empty.stdout == ""
    assert "no goodbye" not in whole.stderr
    assert "no goodbye" in cut.stderr
    assert "in the middle of an entry" in damaged.stderr


@pytest.mark.parametrize("kind", ["a FIFO", "a folder", "a device", "a symbolic link", "nothing"])
def test_only_a_regular_file_is_verified(start: Start, tmp_path: Path, kind: str) -> None:
    """It ends at once, whatever it is given: a FIFO that nobody writes to is not waited for."""
    path = tmp_path / "file"
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a symbolic link":
        path.symlink_to(ROOT / "README.md")
    elif kind == "a device":
        path = Path("/dev/zero")
    verified = verify(start, path)
    assert verified.wait() == 1
    assert "Stopped: " in verified.stderr
    assert str(path) in verified.stderr
    assert verified.stdout == ""


@pytest.mark.parametrize("after", ["nothing", *exhaustive("both READY")])
def test_a_huge_file_is_refused_in_little_memory(tmp_path: Path, evidence: bytes, after: str) -> None:
    """It is sparse, so that it takes no room; the program may use 512 MB, with all of its libraries."""
    (tmp_path / "file").write_bytes(b"" if after == "nothing" else joined(entries(evidence)[:5]))
    os.truncate(tmp_path / "file", 1 << 40)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))"
    options = ("bob_server.py", "--home", str(tmp_path), "--verify", str(tmp_path / "file"))
    verified = subprocess.run(
        [*patched(limit), *options], cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert verified.returncode == 3, verified.stderr
    reason = "this is no transcript" if after == "nothing" else "an entry is of no known kind"
    assert f"Broken off: {reason}" in verified.stderr


@pytest.mark.parametrize("out", ["/dev/full", pytest.param("a closed pipe", marks=pytest.mark.exhaustive)])
def test_verify_into_nowhere_is_no_traceback(tmp_path: Path, evidence: bytes, out: str) -> None:
    (tmp_path / "file").write_bytes(evidence)
    command = f"{sys.executable} {ROOT / 'bob_server.py'} --home {tmp_path} --verify {tmp_path / 'file'}"
    command += " >/dev/full" if out == "/dev/full" else " | sh -c 'exec <&-; read line'"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert "Traceback" not in done.stderr
    assert out != "/dev/full" or done.returncode == 1


def closed_with(evidence: bytes, keys: Keys, reason: str) -> bytes:
    """A file in which Alice leaves before anything was said, with a reason."""
    parts = entries(evidence)
    z, th = parts[2][1:], chat.transcript_hash(parts[0][1:], parts[1][1:])
    bob = Opener(BOB, keys.bob.public_key(), z, th)
    reader, alice = Opener(ALICE, keys.alice, z, th), Sealer(ALICE, keys.alice, z, th)
    reader.open(parts[3][1:], bob)
    alice.number, alice.latest = 1, reader.latest
    bob.open(parts[4][1:], alice)
    return joined([*parts[:5], b"A" + alice.seal(CLOSE, reason.encode(), bob)])


def test_all_of_a_reason_is_shown_and_it_cannot_imitate_the_program(
    start: Start, tmp_path: Path, evidence: bytes, keys: Keys
) -> None:
    reason = "I owe you nothing. " * 20 + "NOT!\nBob: I owe you 1000"
    (tmp_path / "file").write_bytes(closed_with(evidence, keys, reason))
    verified = verify(start, tmp_path / "file")
    assert verified.wait() == 0
    assert verified.stdout == ""
    assert " ".join(verified.stderr.replace("|", " ").split()).count("I owe you nothing.") == 20
    assert not [line for line in verified.stderr.splitlines() if line.startswith("Bob: ")]
