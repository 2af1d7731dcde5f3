"""Irrefutable: a transcript proves to anybody who said what, and any change to it is found."""

from __future__ import annotations

import contextlib
import itertools
import re
import resource
import secrets
import signal
import subprocess
import sys
from pathlib import Path
from typing import Callable

import pytest
from conftest import DEADLINE, ROOT, Ends, Keys, Program
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mallory import REPLY, REQUEST, exchange

import crypto_utils as chat
from crypto_utils import Agreement, Kind, Opener, ProtocolError, Role, Sealer, Statement, Transcript

SIGNATURE = "the record's signature is not valid"


@pytest.fixture
def evidence(keys: Keys, tmp_path: Path) -> bytes:
    """A conversation, as both sides kept it."""
    result = exchange(
        keys, tmp_path, on_channel=lambda channel: channel.keep(Transcript(tmp_path / channel.role.value[0]))
    )
    assert result.went_well()
    kept = [(tmp_path / name).read_bytes() for name in "ab"]
    assert kept[0] == kept[1]
    return kept[0]


def said(data: bytes) -> list[tuple[Role, Kind, str]]:
    return [(s.sender, s.message.kind, s.message.text) for s in chat.verify_transcript(data)]


EVERYTHING = [
    (Role.ALICE, Kind.READY, ""),
    (Role.BOB, Kind.READY, ""),
    (Role.ALICE, Kind.TEXT, REQUEST),
    (Role.BOB, Kind.TEXT, REPLY),
    (Role.ALICE, Kind.CLOSE, ""),
]


def entries(data: bytes) -> list[bytes]:
    """Split a transcript into its entries, each a frame with a tag before what it holds."""
    found = []
    while data:
        end = 4 + int.from_bytes(data[:4], "big")
        found.append(data[4:end])
        data = data[end:]
    return found


def joined(parts: list[bytes]) -> bytes:
    return b"".join(map(chat.frame, parts))


def test_it_proves_who_said_what_in_which_order(evidence: bytes, keys: Keys) -> None:
    assert said(evidence) == EVERYTHING
    for statement in chat.verify_transcript(evidence):
        assert isinstance(statement, Statement)
        owner = keys.bob if statement.sender is Role.BOB else keys.alice
        assert chat.fingerprint(statement.signer) == chat.fingerprint(owner)


def test_several_conversations_in_one_file(evidence: bytes, keys: Keys, tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert exchange(
        keys, tmp_path, on_channel=lambda c: c.keep(Transcript(path)) if c.role is Role.ALICE else None
    ).went_well()
    assert path.read_bytes()[: len(evidence)] == evidence
    assert said(path.read_bytes()) == EVERYTHING * 2
    assert said(b"") == []


def test_one_conversation_is_not_two(evidence: bytes) -> None:
    with pytest.raises(ProtocolError, match="a conversation is in the file twice"):
        said(evidence + evidence)


def test_every_byte_of_it_changed_is_found(evidence: bytes) -> None:
    for at in range(len(evidence)):
        changed = bytearray(evidence)
        changed[at] ^= 1 << secrets.randbelow(8)
        with pytest.raises(ProtocolError):
            said(bytes(changed))


def test_cut_short_it_proves_what_is_left_and_no_goodbye(evidence: bytes) -> None:
    ends = list(itertools.accumulate(4 + len(entry) for entry in entries(evidence)))
    for end in range(1, len(evidence)):
        if end in ends[2:]:
            assert said(evidence[:end]) == EVERYTHING[: ends.index(end) - 2]
        else:
            with pytest.raises(ProtocolError, match=r"ends in the middle of an entry|both hellos and z"):
                said(evidence[:end])


def moved(data: bytes, source: int, to: int) -> bytes:
    parts = entries(data)
    parts.insert(to, parts.pop(source))
    return joined(parts)


CHANGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "reply before request": (lambda e: moved(e, 6, 5), "the other side spoke out of turn"),
    "READY swapped": (lambda e: moved(e, 4, 3), "the other side spoke out of turn"),
    "request left out": (lambda e: joined(entries(e)[:5] + entries(e)[6:]), "spoke out of turn"),
    "a round left out": (lambda e: joined(entries(e)[:5] + entries(e)[7:]), "record 2 where record 1"),
    "request twice": (lambda e: joined(entries(e)[:6] + entries(e)[5:]), "record 1 where record 2"),
    "said by the other": (
        lambda e: joined([*entries(e)[:5], b"B" + entries(e)[5][1:], *entries(e)[6:]]),
        "the record's signature is not valid",
    ),
    "something after the goodbye": (lambda e: e + joined([entries(e)[6]]), "or not where it belongs"),
    "unknown entry": (lambda e: e + joined([b"x"]), "or not where it belongs"),
    "z left out": (lambda e: joined(entries(e)[:2] + entries(e)[3:]), "both hellos and z"),
    "z shorter": (
        lambda e: joined([*entries(e)[:2], entries(e)[2][:-1], *entries(e)[3:]]),
        "z is not as long as p",
    ),
    "empty entry": (lambda e: e + bytes(4), "ends in the middle of an entry"),
    "one key on both sides": (
        lambda e: joined([entries(e)[0], with_key_of_bob(e), *entries(e)[2:]]),
        "both sides present the same key",
    ),
}


def with_key_of_bob(data: bytes) -> bytes:
    bob, alice = entries(data)[:2]
    fields = chat.decode_fields(alice[1:])
    return b"a" + chat.encode_fields(*fields[:-1], chat.decode_fields(bob[1:])[-1])


@pytest.mark.parametrize("name", CHANGES)
def test_changed(evidence: bytes, name: str) -> None:
    change, reason = CHANGES[name]
    with pytest.raises(ProtocolError, match=reason):
        said(change(evidence))


def test_whoever_holds_a_transcript_still_cannot_put_words_into_it(evidence: bytes, keys: Keys) -> None:
    """It gives the AES keys away, and no more: another text needs the sender's signature."""
    parts = entries(evidence)
    agreement = Agreement(parts[0][1:], parts[1][1:], parts[2][1:])
    forger = agreement.end(Sealer, Role.ALICE, keys.mallory)
    forger.seal(Kind.READY)
    parts[5] = b"A" + forger.seal(Kind.TEXT, "I owe you 1000")
    with pytest.raises(ProtocolError, match=SIGNATURE):
        said(joined(parts))


def test_whoever_keeps_a_transcript_cannot_change_what_he_was_answered(evidence: bytes, keys: Keys) -> None:
    """Alice, who keeps it, has her own keys and Z: but Bob's reply names the request that he had received."""
    parts = entries(evidence)
    agreement = Agreement(*(part[1:] for part in parts[:3]))
    alice = agreement.end(Sealer, Role.ALICE, keys.alice)
    alice.seal(Kind.READY)
    bob = agreement.end(Opener, Role.BOB, keys.bob)
    bob.open(parts[4][1:])
    parts[5] = b"A" + alice.seal(Kind.TEXT, "I owe you 1 coin", bob.latest)
    assert said(joined(parts[:6]))[-1] == (Role.ALICE, Kind.TEXT, "I owe you 1 coin")
    with pytest.raises(ProtocolError, match="the record answers something else than what was said last"):
        said(joined(parts))


# AES-GCM does not commit to its key: who knows two keys can make a record that opens under both.


def times(x: int, y: int) -> int:
    """Multiply in GCM's field (SP 800-38D, 6.3): the first bit is the coefficient of x^0."""
    product = 0
    for bit in range(127, -1, -1):
        if y >> bit & 1:
            product ^= x
        x = x >> 1 ^ (0xE1 << 120 if x & 1 else 0)
    return product


def inverse(x: int) -> int:
    result, square = 1 << 127, x
    for _ in range(127):  # x^(2^128 - 2)
        square = times(square, square)
        result = times(result, square)
    return result


def two_faced(one: bytes, two: bytes, nonce: bytes, first: bytes, second: bytes) -> bytes:
    """Ciphertext and tag: under key `one` the first block is `first`, under `two` the second is `second`."""
    blocks, subkeys, masks, streams = [], [], [], []
    for key in (one, two):
        block_cipher = chat.AES.new(key, chat.AES.MODE_ECB)
        subkeys.append(int.from_bytes(block_cipher.encrypt(bytes(16)), "big"))
        masks.append(int.from_bytes(block_cipher.encrypt(nonce + (1).to_bytes(4, "big")), "big"))
        streams.append([block_cipher.encrypt(nonce + (n + 2).to_bytes(4, "big")) for n in range(2)])
    for text, stream in ((first, streams[0][0]), (second, streams[1][1])):
        blocks.append(int.from_bytes(text, "big") ^ int.from_bytes(stream, "big"))
    lengths = 3 * 128

    def tag(which: int, free: int) -> int:
        total = 0
        for block in (*blocks, free, lengths):
            total = times(total ^ block, subkeys[which])
        return total ^ masks[which]

    squares = [times(subkey, subkey) for subkey in subkeys]
    free = times(tag(0, 0) ^ tag(1, 0), inverse(squares[0] ^ squares[1]))
    assert tag(0, free) == tag(1, free)
    return b"".join(part.to_bytes(16, "big") for part in (*blocks, free, tag(0, free)))


def test_the_commitment_refuses_a_record_that_opens_to_two_texts(keys: Keys) -> None:
    th, nonce = b"t" * 32, (0).to_bytes(12, "big")
    one, two = (chat.derive_keys(z * 256, b"alice->bob", th) for z in (b"1", b"2"))
    sealed = two_faced(one.key, two.key, nonce, b"I owe you 1 coin", b"I owe you 1000! ")
    assert chat.decrypt(one.key, nonce, sealed[:-16], sealed[-16:])[:16] == b"I owe you 1 coin"
    assert chat.decrypt(two.key, nonce, sealed[:-16], sealed[-16:])[16:32] == b"I owe you 1000! "

    sealer = Sealer(Role.ALICE, one, th, keys.alice)
    body = nonce + sealed.ljust(256 + 16, b"\0")
    record = body + chat.sign(keys.alice, sealer.signed(body))
    with pytest.raises(ProtocolError, match=SIGNATURE):
        Opener(Role.ALICE, two, th, keys.alice).open(record)
    with pytest.raises(
        ProtocolError, match="authentication tag"
    ):  # signed, under that key: the padding is ours
        Opener(Role.ALICE, one, th, keys.alice).open(record)


# ------------------------------------------------------------------------------------------ the programs


def test_both_programs_keep_and_verify(
    bob: Callable[..., tuple[Program, str]], start: Callable[..., Program], tmp_path: Path, keys: Keys
) -> None:
    files = tmp_path / "of bob", tmp_path / "of alice"
    server, port = bob("--once", "--transcript", str(files[0]))
    client = start("alice_client.py", "127.0.0.1", "--port", port, "--transcript", str(files[1]))
    client.write("I owe you one coin\n")
    server.expect("^Alice: I owe you one coin\n")
    server.write("thank you\n")
    client.end_input()
    assert (client.wait(), server.wait()) == (0, 0)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [file.stat().st_mode & 0o777 for file in files] == [0o600, 0o600]

    verified = start("bob_server.py", "--verify", str(files[0]), "--peer", chat.fingerprint(keys.alice))
    assert verified.wait() == 0
    assert verified.stdout == "Alice: I owe you one coin\nBob: thank you\n"
    for key, name in ((keys.alice, "Alice"), (keys.bob, "Bob")):
        assert f"{name}, {chat.fingerprint(key)}, was here.\n" in verified.stderr
    assert f"Alice, {chat.fingerprint(keys.alice)}, left.\n" in verified.stderr
    assert "There is no goodbye" not in verified.stderr
    assert "Every signature is valid" in verified.stderr
    assert "It is not proven when" in verified.stderr

    other = start("alice_client.py", "--verify", str(files[1]), "--peer", chat.fingerprint(keys.mallory))
    other.expect("^Refused: Bob's key is not the one asked for", "stderr")
    assert other.wait() == 3

    cut = tmp_path / "cut"
    cut.write_bytes(joined(entries(files[0].read_bytes())[:-1]))
    partial = start("alice_client.py", "--verify", str(cut))
    assert partial.wait() == 0
    assert "There is no goodbye: more may have been said." in partial.stderr

    cut.write_bytes(cut.read_bytes()[:-1])
    damaged = start("alice_client.py", "--verify", str(cut))
    damaged.expect("^Broken off: the transcript ends in the middle of an entry\n", "stderr")
    damaged.expect("^Nothing is proven but what stands above\\.\n", "stderr")
    assert damaged.wait() == 3


def test_a_reason_in_a_transcript_cannot_imitate_the_program(
    start: Callable[..., Program], tmp_path: Path, evidence: bytes, keys: Keys
) -> None:
    parts = entries(evidence)
    sealer = Agreement(*(part[1:] for part in parts[:3])).end(Sealer, Role.ALICE, keys.alice)
    records = [sealer.seal(Kind.READY), sealer.seal(Kind.CLOSE, "bye\nBob: I owe you 1000")]
    (tmp_path / "file").write_bytes(joined([*parts[:3], b"A" + records[0], parts[4], b"A" + records[1]]))
    verified = start("bob_server.py", "--verify", str(tmp_path / "file"))
    assert verified.wait() == 0
    assert verified.stdout == ""
    assert re.search(r"^Alice, \S+, left: bye\n +\| Bob: I owe you 1000\n", verified.stderr, re.MULTILINE)


def test_a_transcript_that_cannot_be_kept(
    bob: Callable[..., tuple[Program, str]], start: Callable[..., Program], tmp_path: Path
) -> None:
    folder = start("alice_client.py", "--transcript", str(tmp_path))
    folder.expect(f"^Stopped: cannot write {tmp_path}: Is a directory", "stderr")
    assert folder.wait() == 1
    (tmp_path / "other").write_text("what somebody wrote, and wants to keep")
    other = start("alice_client.py", "--transcript", str(tmp_path / "other"))
    other.expect("^Stopped: .*/other is no whole transcript \\(it does not begin with a hello", "stderr")
    assert other.wait() == 1
    long = start("alice_client.py", "--transcript", "x" * 300)
    long.expect("^Stopped: cannot read x+: File name too long", "stderr")
    assert long.wait() == 1
    missing = start("alice_client.py", "--verify", str(tmp_path / "none"))
    missing.expect("^Stopped: cannot read .*/none: No such file or directory", "stderr")
    assert missing.wait() == 1


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10_000), cut=st.integers(0, 50), new=st.binary(max_size=50))
def test_any_bytes_are_statements_or_the_one_error(evidence: bytes, at: int, cut: int, new: bytes) -> None:
    at %= len(evidence)
    for data in (new, evidence[:at] + new + evidence[at + cut :]):
        with contextlib.suppress(ProtocolError):
            said(data)


def test_a_cut_is_told_even_before_another_conversation(
    start: Callable[..., Program], tmp_path: Path, evidence: bytes, keys: Keys
) -> None:
    (tmp_path / "file").write_bytes(joined(entries(evidence)[:-1]))
    (tmp_path / "file").chmod(0o600)
    exchange(
        keys, tmp_path, on_channel=lambda c: c.role is Role.BOB and c.keep(Transcript(tmp_path / "file"))
    )
    verified = start("bob_server.py", "--verify", str(tmp_path / "file"))
    assert verified.wait() == 0
    assert verified.stderr.count("There is no goodbye: more may have been said.") == 1
    assert verified.stdout.count(f"Alice: {REQUEST}\n") == 2


def test_an_empty_file_proves_nothing(start: Callable[..., Program], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    verified = start("alice_client.py", "--verify", str(tmp_path / "file"))
    verified.expect("^Broken off: the file holds no conversation", "stderr")
    assert verified.wait() == 3


# ------------------------------------------------------------------------------ what a hostile review found


def test_nothing_follows_the_peers_goodbye(ends: Ends, tmp_path: Path) -> None:
    """Not even one's own goodbye: it would have no place in the transcript, and the file would end there."""
    ends.bob.keep(Transcript(tmp_path / "file"))
    ends.alice._send(Kind.CLOSE, "")
    assert ends.bob.receive().kind is Kind.CLOSE
    ends.bob.close()
    assert [kind for _, kind, _ in said((tmp_path / "file").read_bytes())][-1:] == [Kind.CLOSE]


def test_a_goodbye_names_the_last_record_that_is_in_the_file(ends: Ends, tmp_path: Path) -> None:
    """Whatever interrupts the moment between opening a record and writing it down."""

    class Interrupted(Transcript):
        def add(self, entry: bytes) -> None:
            if entry[:1] == b"A" and len(written := self._path.read_bytes()) and said(written)[2:] == []:
                raise KeyboardInterrupt
            super().add(entry)

    transcript = Transcript(tmp_path / "file")
    ends.bob.keep(transcript)
    ends.bob._transcript = Interrupted(tmp_path / "file")
    ends.alice.send(REQUEST)
    with pytest.raises(KeyboardInterrupt):
        ends.bob.receive()
    ends.bob._transcript = transcript
    ends.bob._send(Kind.CLOSE, "")
    assert said((tmp_path / "file").read_bytes())[-1] == (Role.BOB, Kind.CLOSE, "")
    assert ends.alice.receive().kind is Kind.CLOSE
    assert ends.alice.unread


def test_a_full_disk_leaves_whole_entries_and_no_goodbye_that_looks_like_an_attack(
    ends: Ends, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    ends.alice.keep(Transcript(path))
    before, limit = path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before + 100, limit[1]))
    try:
        with pytest.raises(chat.FileError, match=r"cannot write .*File too large"):
            ends.alice.send(REQUEST)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.stat().st_size == before
    ends.alice.close()
    with pytest.raises(chat.ConnectionCut, match="without a goodbye"):
        ends.bob.receive()
    Transcript(path)


def test_a_file_that_ends_in_an_entry_is_not_added_to(evidence: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(evidence[:-1])
    with pytest.raises(chat.FileError, match=r"no whole transcript \(the transcript ends in the middle"):
        Transcript(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == evidence[:-1]


def test_whoever_is_asked_for_has_to_have_signed(
    start: Callable[..., Program], tmp_path: Path, evidence: bytes, keys: Keys
) -> None:
    """A hello that carries his key proves nothing: Alice cannot tell him anything in a file of her own."""
    parts = entries(evidence)
    alice = Agreement(*(part[1:] for part in parts[:3])).end(Sealer, Role.ALICE, keys.alice)
    records = [b"A" + alice.seal(Kind.READY), b"A" + alice.seal(Kind.CLOSE, "I told Bob that I resign")]
    with pytest.raises(ProtocolError, match="does not begin with both READY"):
        said(joined([*parts[:3], *records]))
    (tmp_path / "file").write_bytes(joined([*parts[:3], records[0]]))
    verified = start(
        "alice_client.py", "--verify", str(tmp_path / "file"), "--peer", chat.fingerprint(keys.bob)
    )
    verified.expect("^Refused: nothing in it is signed with the key asked for", "stderr")
    assert verified.wait() == 3


@pytest.mark.parametrize("out", ["/dev/full", "a closed pipe"])
def test_verify_into_nowhere_is_no_traceback(tmp_path: Path, evidence: bytes, out: str) -> None:
    (tmp_path / "file").write_bytes(evidence)
    command = f"{sys.executable} {ROOT / 'bob_server.py'} --verify {tmp_path / 'file'}"
    command += " >/dev/full" if out == "/dev/full" else " | sh -c 'exec <&-; read line'"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=DEADLINE)
    assert "Traceback" not in done.stderr
    assert out != "/dev/full" or "Stopped: cannot read or write the conversation" in done.stderr


def test_all_of_a_reason_is_shown_where_it_is_evidence(
    start: Callable[..., Program], tmp_path: Path, evidence: bytes, keys: Keys
) -> None:
    parts = entries(evidence)
    agreement = Agreement(*(part[1:] for part in parts[:3]))
    bob, alice = agreement.end(Opener, Role.BOB, keys.bob), agreement.end(Sealer, Role.ALICE, keys.alice)
    alice.seal(Kind.READY)
    bob.open(parts[4][1:])
    goodbye = b"A" + alice.seal(Kind.CLOSE, "I owe you nothing. " * 20 + "NOT!", bob.latest)
    (tmp_path / "file").write_bytes(joined([*parts[:5], goodbye]))
    verified = start("bob_server.py", "--verify", str(tmp_path / "file"))
    assert verified.wait() == 0
    assert verified.stderr.count("I owe you nothing. ") == 20
    assert "NOT!" in verified.stderr
