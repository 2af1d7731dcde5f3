"""Every attack on the wire, and the check that must refuse it.

The tables name the reason that the victim gives: another check refusing first would hide that the one
meant for the attack is gone. Whoever is not the victim sees the connection cut, and neither shows a thing.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import random
import re
import secrets
import socket
from pathlib import Path
from typing import Callable

import pytest
from conftest import DEADLINE, GROUP, RFC_GROUPS, Ends, Keys, Program, loopback
from Crypto.Cipher import AES
from Crypto.Hash import SHA256
from Crypto.PublicKey import ECC
from Crypto.Signature import pss
from Crypto.Util.Padding import pad
from mallory import CLOSE, HELLO, READY, REPLY, REQUEST, TEXT, Exchange, Last, Wire, exchange, only

import crypto_utils as chat
from crypto_utils import (
    Direction,
    DirectionKeys,
    Group,
    Home,
    Kind,
    KnownPeer,
    Line,
    Offer,
    Opener,
    Role,
    RsaKey,
    Sealer,
)

BOB, ALICE = Role.BOB, Role.ALICE


def refused(
    result: Exchange,
    victim: Role,
    reason: str,
    error: type[Exception] = chat.ProtocolError,
    shown: tuple[list[str], list[str]] = ([], []),
) -> None:
    """Assert that `victim` gave this reason, that the other side was cut, and what each had been shown."""
    assert type(result.of(victim).error) is error, result
    assert reason in str(result.of(victim).error)
    other = result.of(victim.peer)
    assert isinstance(other.error, chat.ConnectionCut), result
    assert not other.goodbye
    assert not result.of(victim).goodbye
    assert (result.bob.shown, result.alice.shown) == shown


@pytest.mark.parametrize("name", ["ffdhe2048", "modp_3072", "ffdhe4096"])
def test_without_mallory_everything_arrives(keys: Keys, tmp_path: Path, name: str) -> None:
    assert exchange(keys, tmp_path, group=RFC_GROUPS[name]).went_well()


# ------------------------------------------------------------------------ values in the two hellos

VERSION, NONCE = 0, 1
P, G, B, BOB_RSA = 2, 3, 4, 5
A, ALICE_RSA = 2, 3


def hello_with(index: int, value: bytes) -> Callable[[bytes], bytes]:
    """Replace one field of a hello."""

    def change(data: bytes) -> bytes:
        fields = chat.decode_fields(data[4:])
        fields[index] = value
        return chat.frame(chat.encode_fields(*fields))

    return change


def number(value: int, length: int = 0) -> bytes:
    return value.to_bytes(max(length, chat.byte_length(value)), "big")


def rsa_der(bits: int, e: int = 65537) -> bytes:
    """A public key of any size, made without looking for primes."""
    n = 3
    while n % 3 == 0:
        n = secrets.randbits(bits) | 1 << (bits - 1) | 1
    return chat.RSA.construct((n, e), consistency_check=False).export_key("DER")


p = GROUP.p
SUBGROUP = "the public value is not in the subgroup of order q"
PUBLIC_VALUES = {
    "0": (0, SUBGROUP),
    "1": (1, SUBGROUP),
    "p-1": (p - 1, SUBGROUP),
    "p": (p, SUBGROUP),
    "p+1": (p + 1, SUBGROUP),
    "outside the subgroup": (p - 4, SUBGROUP),  # 4 is a square, -1 is none
}


@pytest.mark.parametrize("name", PUBLIC_VALUES)
@pytest.mark.parametrize("sender", Role)
def test_public_value(keys: Keys, tmp_path: Path, sender: Role, name: str) -> None:
    value, reason = PUBLIC_VALUES[name]
    change = hello_with(B if sender is BOB else A, number(value, 256))
    refused(exchange(keys, tmp_path, only(sender, HELLO, change)), sender.peer, reason)


@pytest.mark.parametrize("modulus", [11, 23, 47, 59, 83])
def test_the_subgroup_is_the_squares_but_1(modulus: int) -> None:
    """Exhaustively: p - 2 is one of them where p = 3 mod 8."""
    members = {y for y in range(-1, 2 * modulus) if Group(modulus, 4).contains(y)}
    assert members == {y * y % modulus for y in range(1, modulus)} - {1}


def test_the_search_for_p_begins_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can tell, or choose, which p will be found."""
    starts: list[int] = []

    def stop(start: int, *_: object) -> None:
        starts.append(start)
        raise InterruptedError

    monkeypatch.setattr(chat, "_small_primes", lambda _: [])
    monkeypatch.setattr(chat, "_survivors", stop)
    for _ in range(100):
        with pytest.raises(InterruptedError):
            chat.generate_group(2048)
    low, high = 2**2047 // 24, 2**2048 // 24
    quarters = {4 * (start - low) // (high - low) for start in starts}
    assert quarters == {0, 1, 2, 3}  # or else by a chance of less than 2^-39


@pytest.mark.parametrize("length", [0, 1, 255, 257])
@pytest.mark.parametrize("sender", Role)
def test_public_value_of_another_length(keys: Keys, tmp_path: Path, sender: Role, length: int) -> None:
    change = hello_with(B if sender is BOB else A, b"\0" * (length - 1) + b"\4" if length else b"")
    reason = "the public value is not as long as p"
    refused(exchange(keys, tmp_path, only(sender, HELLO, change)), sender.peer, reason)


PRIME_WITHOUT_SAFETY = 2**2203 - 1  # a Mersenne prime: (p - 1) / 2 is divisible by 3
BOTH_RULES = {
    "p even": (P, number(p - 1), "p is even"),
    "p tiny": (P, number(23), "p has 5 bits, not 2048 to 4096"),
    "p zero": (P, b"", "p has 0 bits, not 2048 to 4096"),
    "p of 2047 bits": (P, number(p >> 1), "p has 2047 bits, not 2048 to 4096"),
    "p of 4097 bits": (P, number(1 << 4096 | 1), "p or g is over 4096 bits long"),
    "p composite": (P, number(p - 2), "p is not a safe prime"),
    "p smooth": (P, number(3**1300), "p is not a safe prime"),
    "p prime, q composite": (P, number(PRIME_WITHOUT_SAFETY), "p is not a safe prime"),
    "q prime, p composite": (P, number(2 * (2**2203 - 1) + 1), "p is not a safe prime"),
    "p padded": (P, b"\0" + number(p), "p or g is not in its minimal encoding"),
    "g padded": (G, b"\0\2", "p or g is not in its minimal encoding"),
    "g = 0": (G, b"", "g does not generate the subgroup of order q"),
    "g = 1": (G, b"\1", "g does not generate the subgroup of order q"),
    "g = p-1": (G, number(p - 1), "g does not generate the subgroup of order q"),
    "g = p": (G, number(p), "g does not generate the subgroup of order q"),
    "g outside the subgroup": (G, number(p - 2), "g does not generate the subgroup of order q"),
}


@pytest.mark.parametrize("name", BOTH_RULES)
def test_parameters(keys: Keys, tmp_path: Path, name: str) -> None:
    field, value, reason = BOTH_RULES[name]
    refused(exchange(keys, tmp_path, only(BOB, HELLO, hello_with(field, value))), ALICE, reason)


RSA_KEYS: dict[str, tuple[Callable[[Keys], bytes], str]] = {
    "512 bits": (lambda _: rsa_der(512), "the RSA key has 512 bits, not 2048 to 4096"),
    "1024 bits": (lambda _: rsa_der(1024), "the RSA key has 1024 bits, not 2048 to 4096"),
    "2047 bits": (lambda _: rsa_der(2047), "the RSA key has 2047 bits, not 2048 to 4096"),
    "4097 bits": (lambda _: rsa_der(4097), "the RSA key has 4097 bits, not 2048 to 4096"),
    "8192 bits": (lambda _: rsa_der(8192), "the RSA key is larger than 1 KiB"),
    "e = 3": (lambda _: rsa_der(2048, 3), "the RSA key's public exponent is not 65537"),
    "e huge": (lambda _: rsa_der(2048, 2**2000 + 1), "the RSA key's public exponent is not 65537"),
    "trailing byte": (lambda keys: chat.public_der(keys.mallory) + b"\0", "the RSA key "),
    "another type": (
        lambda _: ECC.generate(curve="P-256").public_key().export_key(format="DER"),
        "the key is not an RSA SubjectPublicKeyInfo",
    ),
    "nothing": (lambda _: b"", "the key is not an RSA SubjectPublicKeyInfo"),
    "even modulus": (
        lambda keys: chat.RSA.construct((keys.bob.n - 1, 65537), consistency_check=False).export_key("DER"),
        "the RSA key cannot be parsed",
    ),
}


@pytest.mark.parametrize("name", RSA_KEYS)
@pytest.mark.parametrize("sender", Role)
def test_rsa_key(keys: Keys, tmp_path: Path, sender: Role, name: str) -> None:
    make, reason = RSA_KEYS[name]
    change = hello_with(BOB_RSA if sender is BOB else ALICE_RSA, make(keys))
    refused(exchange(keys, tmp_path, only(sender, HELLO, change)), sender.peer, reason)


def add_field(data: bytes) -> bytes:
    return chat.frame(data[4:] + b"\0\0")


def drop_field(data: bytes) -> bytes:
    return chat.frame(chat.encode_fields(*chat.decode_fields(data[4:])[:-1]))


FORMS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "another version": (
        hello_with(VERSION, b"secure-chat/2"),
        "the other side does not speak secure-chat/1",
    ),
    "no version": (hello_with(VERSION, b""), "the other side does not speak secure-chat/1"),
    "short nonce": (hello_with(NONCE, b"n" * 31), "the nonce is not 32 bytes long"),
    "long nonce": (hello_with(NONCE, b"n" * 33), "the nonce is not 32 bytes long"),
    "one field more": (add_field, "the hello has too many or too few fields"),
    "one field less": (drop_field, "the hello has too many or too few fields"),
    "a byte more": (lambda data: chat.frame(data[4:] + b"\0"), "a field of the hello is cut short"),
    "a byte less": (lambda data: chat.frame(data[4:-1]), "a field of the hello is cut short"),
    "nothing": (lambda _: chat.frame(b""), "the other side does not speak secure-chat/1"),
    "too long": (lambda _: chat.frame(b"x" * 8193), "a frame of 8193 bytes, over the limit of 8192"),
    "4 GiB": (lambda _: b"\xff" * 100, "a frame of 4294967295 bytes, over the limit of 8192"),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("sender", Role)
def test_form_of_a_hello(keys: Keys, tmp_path: Path, sender: Role, name: str) -> None:
    change, reason = FORMS[name]
    refused(exchange(keys, tmp_path, only(sender, HELLO, change)), sender.peer, reason)


def test_a_ready_over_4_kib_is_refused_before_it_is_read(keys: Keys, tmp_path: Path) -> None:
    result = exchange(keys, tmp_path, only(ALICE, READY, lambda _: (4097).to_bytes(4, "big")))
    refused(result, BOB, "a frame of 4097 bytes, over the limit of 4096")


LIMITS = {  # of a frame, and what both have been shown by then
    (ALICE, READY): (4096, ([], [])),
    (BOB, READY): (4096, ([], [])),
    (ALICE, TEXT): (12 + 4097 * 256 + 16 + 512, ([], [])),
    (BOB, TEXT): (12 + 4097 * 256 + 16 + 512, ([REQUEST], [])),
}


@pytest.mark.parametrize(("sender", "n"), LIMITS)
def test_a_record_over_its_limit_is_refused(keys: Keys, tmp_path: Path, sender: Role, n: int) -> None:
    limit, shown = LIMITS[sender, n]
    result = exchange(keys, tmp_path, only(sender, n, lambda _: chat.frame(bytes(limit + 1))))
    refused(result, sender.peer, f"a frame of {limit + 1} bytes, over the limit of {limit}", shown=shown)


@pytest.mark.parametrize("role", Role)
def test_the_handshake_has_one_deadline(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: Role
) -> None:
    """It is over before it begins; who does not notice finds a line that was cut."""
    monkeypatch.setattr(chat, "HANDSHAKE_SECONDS", 0.0)
    near, far = loopback()
    far.sendall(b"\0")
    far.shutdown(socket.SHUT_WR)
    peer = KnownPeer(Home(tmp_path), "somebody")
    with near, far, pytest.raises(chat.ConnectionCut, match="the other side did not answer in time"):
        if role is BOB:
            chat.bob_handshake(Line(near), keys.bob, GROUP, peer)
        else:
            chat.alice_handshake(Line(near), keys.alice, None, peer)


# --------------------------------------------------------------------------------- who is at the other end


@pytest.mark.parametrize("impostor", Role)
def test_man_in_the_middle_with_his_own_key_is_refused_by_the_pin(
    keys: Keys, tmp_path: Path, impostor: Role
) -> None:
    assert exchange(keys, tmp_path).went_well()
    result = exchange(keys, tmp_path, **{f"{impostor.value}_key": keys.mallory})
    refused(result, impostor.peer, f"the key of {impostor.value} is not the one pinned", chat.TrustError)
    assert len(result.frames[impostor.peer]) == (1 if impostor is ALICE else 0)  # nothing of his was signed


@pytest.mark.parametrize("impostor", Role)
def test_man_in_the_middle_at_first_contact_is_refused_by_the_fingerprint(
    keys: Keys, tmp_path: Path, impostor: Role
) -> None:
    genuine = chat.fingerprint(keys.bob if impostor is BOB else keys.alice)
    options = {f"{impostor.value}_key": keys.mallory, f"{impostor.peer.value}_pins": genuine}
    result = exchange(keys, tmp_path, **options)  # type: ignore[arg-type]
    refused(result, impostor.peer, f"the key of {impostor.value} is not the one asked for", chat.TrustError)
    assert not (tmp_path / impostor.peer.value / "known_peers").exists()


@pytest.mark.parametrize("thief", Role)
def test_a_stolen_key_does_not_pose_as_the_peer_to_its_owner(keys: Keys, tmp_path: Path, thief: Role) -> None:
    stolen = hello_with(BOB_RSA, chat.public_der(keys.alice))
    if thief is ALICE:
        stolen = hello_with(ALICE_RSA, chat.public_der(keys.bob))
    result = exchange(keys, tmp_path, only(thief, HELLO, stolen))
    refused(result, thief.peer, "the other side presents our own key: a reflection")


def test_a_key_is_pinned_only_after_its_owner_has_proven_to_hold_it(keys: Keys, tmp_path: Path) -> None:
    """Mallory presents Alice's key, which is public, and cannot sign with it."""

    def swap(data: bytes) -> bytes:
        return hello_with(ALICE_RSA, chat.public_der(keys.alice))(data)

    result = exchange(keys, tmp_path, only(ALICE, HELLO, swap), alice_key=keys.mallory)
    refused(result, BOB, "the record's signature is not valid")
    assert not (tmp_path / "bob" / "known_peers").exists()
    assert not (tmp_path / "alice" / "known_peers").exists()


def test_bob_signs_nothing_before_he_opened_alices_ready(keys: Keys, tmp_path: Path) -> None:
    result = exchange(keys, tmp_path, only(ALICE, READY, lambda data: flip(data, -1)))
    refused(result, BOB, SIGNATURE)
    assert len(result.frames[BOB]) == 1


def test_alice_neither_pins_nor_speaks_before_she_opened_bobs_ready(keys: Keys, tmp_path: Path) -> None:
    result = exchange(keys, tmp_path, only(BOB, READY, lambda data: flip(data, -1)))
    refused(result, ALICE, SIGNATURE)
    assert len(result.frames[ALICE]) == 2
    assert not (tmp_path / "alice" / "known_peers").exists()


@pytest.mark.parametrize("script", ["bob_server.py", "alice_client.py"])
def test_the_option_peer_accepts_no_other_key(
    bob: Callable[..., tuple[Program, str]], start: Callable[..., Program], keys: Keys, script: str
) -> None:
    only_mallory = ("--peer", chat.fingerprint(keys.mallory))
    server, port = bob("--once", *only_mallory if script == "bob_server.py" else ())
    client = start(
        "alice_client.py", "127.0.0.1", "--port", port, *only_mallory if script == "alice_client.py" else ()
    )
    client.end_input()
    victim = server if script == "bob_server.py" else client
    victim.expect("Refused: the key of .* is not the one asked for", "stderr")


@pytest.mark.parametrize(
    ("sender", "index"), [(BOB, NONCE), (BOB, BOB_RSA), (ALICE, NONCE)], ids=["nonce_B", "RSA_bob", "nonce_A"]
)
def test_a_field_that_makes_no_other_secret_is_in_the_transcript_hash(
    keys: Keys, tmp_path: Path, sender: Role, index: int
) -> None:
    """What is in Alice's RSA field, Bob verifies with: see misbinding, below."""
    value = b"n" * 32 if index == NONCE else chat.public_der(keys.mallory)
    refused(exchange(keys, tmp_path, only(sender, HELLO, hello_with(index, value))), BOB, SIGNATURE)


def test_misbinding_bob_does_not_take_alices_words_for_mallorys(keys: Keys, tmp_path: Path) -> None:
    """Mallory puts her own key into Alice's hello, and signs Alice's READY anew, with all she could know.

    She is given even the commitment. Both identities are in the transcript hash, so Bob's AES key is
    not the one that Alice encrypted with.
    """
    seen: list[bytes] = []
    offers: list[Offer] = []
    make = Offer.make

    def spy(*arguments: object, **options: object) -> Offer:
        offers.append(make(*arguments, **options))  # type: ignore[arg-type]
        return offers[-1]

    def swap(sender: Role, n: int, data: bytes) -> bytes:
        if sender is ALICE and n == HELLO:
            data = hello_with(ALICE_RSA, chat.public_der(keys.mallory))(data)
            seen.append(data)
        if sender is ALICE and n == READY:
            (bob,) = (offer for offer in offers if offer.role is BOB)
            signed = bob.agree(seen[0][4:])[1].signed
            body = data[4:-256]
            data = chat.frame(body + chat.sign(keys.mallory, signed(body)))
        return data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Offer, "make", spy)
        result = exchange(keys, tmp_path, swap)
    refused(result, BOB, "the record's authentication tag is not valid")


@pytest.mark.skipif(os.name != "posix", reason="owners are POSIX's")
@pytest.mark.parametrize("other", [-1, 1])
def test_files_of_another_user_are_refused_whoever_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: int
) -> None:
    me = os.geteuid()
    Home(tmp_path / "home").write("file", b"")
    monkeypatch.setattr(os, "geteuid", lambda: me + other)
    with pytest.raises(chat.FileError, match="belongs to another user"):
        Home(tmp_path / "home")


# ------------------------------------------------------------------------------------------- records


def resigned(sealer: Sealer, body: bytes, key: RsaKey | None = None) -> bytes:
    """Sign a record's body as its sender would: an insider who holds his RSA key."""
    return body + chat.sign(key or sealer.signer, sealer.signed(body))


def sealed_by_insider(sealer: Sealer, plaintext: bytes) -> bytes:
    """A record with any plaintext, everything else being right: an insider who holds all keys."""
    nonce = sealer.number.to_bytes(12, "big")
    return resigned(sealer, nonce + b"".join(chat.encrypt(sealer._keys.key, nonce, plaintext)))


def reflected(sealer: Sealer, other: Sealer) -> bytes:
    """What the victim said, or will say, under the number that he expects."""
    other._next = sealer.number
    return other.seal(Kind.TEXT, "x")


def flip(data: bytes, at: int, bit: int = 1) -> bytes:
    at %= len(data)
    return data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]


def padded(data: bytes) -> bytes:
    return pad(data, 256, style="iso7816")


Forgery = Callable[[Keys, Sealer, Sealer], bytes]
SIGNATURE, TAG, LENGTH, ANSWERS = (
    "the record's signature is not valid",
    "the record's authentication tag is not valid",
    "the record has an impossible length",
    "the record answers something else than what was said last",
)
RECORDS: dict[str, tuple[Forgery, str]] = {
    # the wire alone
    "number changed": (lambda k, s, t: flip(s.seal(Kind.TEXT, "x"), 11), "record 0 where record 1 should be"),
    "ciphertext changed": (lambda k, s, t: flip(s.seal(Kind.TEXT, "x"), 12), SIGNATURE),
    "tag changed": (lambda k, s, t: flip(s.seal(Kind.TEXT, "x"), -257), SIGNATURE),
    "signature changed": (lambda k, s, t: flip(s.seal(Kind.TEXT, "x"), -1), SIGNATURE),
    "signature stripped": (lambda k, s, t: s.seal(Kind.TEXT, "x")[:-256], LENGTH),
    "signature shortened": (lambda k, s, t: s.seal(Kind.TEXT, "x")[:-1], LENGTH),
    "byte added": (lambda k, s, t: s.seal(Kind.TEXT, "x") + b"\0", LENGTH),
    "empty": (lambda k, s, t: b"", LENGTH),
    "block taken out": (lambda k, s, t: (r := s.seal(Kind.TEXT, "x" * 300))[:12] + r[268:], SIGNATURE),
    "dropped": (
        lambda k, s, t: (s.seal(Kind.TEXT, "x"), s.seal(Kind.TEXT, "y"))[1],
        "record 2 where record 1",
    ),
    "dropped, the next one in its place": (
        lambda k, s, t: s.seal(Kind.TEXT, "x")[:12] + s.seal(Kind.TEXT, "y")[12:],
        SIGNATURE,
    ),
    "reflected": (lambda k, s, t: reflected(s, t), SIGNATURE),
    "signed by Mallory": (
        lambda k, s, t: resigned(s, s.seal(Kind.TEXT, "x")[:-256], k.mallory),
        SIGNATURE,
    ),
    # an insider who holds the AES key, but not the RSA key
    "encrypted anew": (
        lambda k, s, t: (
            (r := s.seal(Kind.TEXT, "x"))[:12]
            + b"".join(chat.encrypt(s._keys.key, r[:12], padded(b"\1" + bytes(32) + b"y")))
            + r[-256:]
        ),
        SIGNATURE,
    ),
    # an insider who holds the RSA key, but not the AES key
    "ciphertext changed and signed": (
        lambda k, s, t: resigned(s, flip(s.seal(Kind.TEXT, "x")[:-256], 12)),
        TAG,
    ),
    "tag changed and signed": (lambda k, s, t: resigned(s, flip(s.seal(Kind.TEXT, "x")[:-256], -1)), TAG),
    "number changed and signed": (
        lambda k, s, t: resigned(s, flip(s.seal(Kind.TEXT, "x")[:-256], 10)),
        "record 257 where record 1 should be",
    ),
    # the peer himself, breaking the rules with all of his keys
    "no padding": (
        lambda k, s, t: sealed_by_insider(s, b"\1" + b"x" * 255),
        "the record's padding is not valid",
    ),
    "padding of zeros": (
        lambda k, s, t: sealed_by_insider(s, b"\0" * 256),
        "the record's padding is not valid",
    ),
    "padding too long": (
        lambda k, s, t: sealed_by_insider(s, b"\1x\x80" + b"\0" * 509),
        "the record's padding is not valid",
    ),
    "not a whole block": (lambda k, s, t: sealed_by_insider(s, b"\1x\x80"), LENGTH),
    "no type": (lambda k, s, t: sealed_by_insider(s, padded(b"")), "the record is too short"),
    "too short": (lambda k, s, t: sealed_by_insider(s, padded(b"\1" + bytes(31))), "the record is too short"),
    "unknown type": (
        lambda k, s, t: sealed_by_insider(s, padded(b"\3" + t.latest)),
        "the record is of no known type",
    ),
    "READY again": (lambda k, s, t: s.seal(Kind.READY), "READY is record 0, and no other"),
    "not UTF-8": (
        lambda k, s, t: sealed_by_insider(s, padded(b"\1" + t.latest + b"\xff")),
        "the record's text is not valid UTF-8",
    ),
    "a surrogate": (
        lambda k, s, t: sealed_by_insider(s, padded(b"\1" + t.latest + b"\xed\xa0\x80")),
        "the record's text is not valid UTF-8",
    ),
    "a byte over the limit": (
        lambda k, s, t: sealed_by_insider(s, padded(b"\1" + t.latest + b"x" * (chat.TEXT_LIMIT + 1))),
        "the record's text is too long",
    ),
    "answers nothing": (lambda k, s, t: s.seal(Kind.TEXT, "x", bytes(31) + b"\1"), ANSWERS),
    "answers the one before": (lambda k, s, t: s.seal(Kind.TEXT, "x", t.before), ANSWERS),
    "answers itself": (lambda k, s, t: s.seal(Kind.TEXT, "x", s.latest), ANSWERS),
    "a CLOSE that answers nothing": (lambda k, s, t: s.seal(Kind.CLOSE, "", bytes(31) + b"\1"), ANSWERS),
}


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("sender", Role)
def test_record(ends: Ends, keys: Keys, sender: Role, name: str) -> None:
    forge, reason = RECORDS[name]
    if sender is BOB:  # after a request, so that it is his turn
        ends.alice.send(REQUEST)
        assert ends.bob.receive().text == REQUEST
    near, far = (ends.alice, ends.bob) if sender is ALICE else (ends.bob, ends.alice)
    near.line.send(forge(keys, near._sealer, far._sealer))
    with pytest.raises(chat.ProtocolError, match=reason):
        far.receive()
    with pytest.raises(ValueError, match="this direction is closed"):
        far.receive()


def test_a_forged_record_leaves_the_number_as_it_was(ends: Ends) -> None:
    """And dead is dead: not even the genuine record opens in a direction in which one has failed."""
    record = ends.alice._sealer.seal(Kind.TEXT, "x")
    opener = ends.bob._opener
    with pytest.raises(chat.ProtocolError, match=SIGNATURE):
        opener.open(flip(record, 100))
    with pytest.raises(ValueError, match="this direction is closed"):
        opener.open(record)


def test_nothing_is_decrypted_before_it_is_verified(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    record = flip(ends.alice._sealer.seal(Kind.TEXT, "x"), -1)
    monkeypatch.setattr(chat, "decrypt", lambda *_: pytest.fail("decrypted, though not verified"))
    with pytest.raises(chat.ProtocolError, match=SIGNATURE):
        ends.bob._opener.open(record)


def test_no_second_record_under_a_number_of_which_the_first_failed(keys: Keys) -> None:
    """What was encrypted, or even sent, before it failed must not meet the same key and nonce again."""

    def broken(_: int) -> bytes:
        raise OSError

    sealer = Sealer(BOB, DirectionKeys(b"k" * 32, b"c" * 32), b"t" * 32, keys.bob)
    with pytest.raises(OSError):
        sealer.seal(Kind.READY, random=broken)
    with pytest.raises(ValueError, match="this direction is closed"):
        sealer.seal(Kind.READY)


def test_nothing_follows_a_goodbye(keys: Keys) -> None:
    th, same = b"t" * 32, DirectionKeys(b"k" * 32, b"c" * 32)
    sealer, opener = Sealer(BOB, same, th, keys.bob), Opener(BOB, same, th, keys.bob)
    opener.open(sealer.seal(Kind.READY))
    assert opener.open(sealer.seal(Kind.CLOSE)).kind is Kind.CLOSE
    for more in (lambda: sealer.seal(Kind.TEXT, "x"), lambda: opener.open(b"")):
        with pytest.raises(ValueError, match="this direction is closed"):
            more()


def test_a_cut_in_the_place_of_a_goodbye_is_none(keys: Keys, tmp_path: Path) -> None:
    result = exchange(keys, tmp_path, only(ALICE, CLOSE, lambda _: Last(b"")))
    assert isinstance(result.bob.error, chat.ConnectionCut)
    assert "without a goodbye" in str(result.bob.error)
    assert not result.bob.goodbye


UNFIT = {
    "too long": ("x" * (chat.TEXT_LIMIT - 1) + "\xe9", "the text is 1048577 bytes long"),
    "a surrogate": ("\ud800", "the text is not valid Unicode"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_an_unfit_text_is_refused_at_home_and_the_chat_goes_on(ends: Ends, name: str) -> None:
    text, reason = UNFIT[name]
    with pytest.raises(chat.MessageError, match=reason):
        ends.alice.send(text)
    ends.alice.send(REQUEST)
    assert ends.bob.receive().text == REQUEST


@pytest.mark.parametrize("n", [READY, TEXT, CLOSE])
def test_a_record_of_another_session_is_refused(keys: Keys, tmp_path: Path, n: int) -> None:
    earlier = exchange(keys, tmp_path)
    result = exchange(keys, tmp_path, only(ALICE, n, lambda _: earlier.frames[ALICE][n]))
    shown = ([REQUEST], [REPLY]) if n == CLOSE else ([], [])
    assert isinstance(result.bob.error, chat.ProtocolError)
    assert SIGNATURE in str(result.bob.error)
    assert (result.bob.shown, result.alice.shown) == shown


def test_a_whole_session_replayed_to_bob_is_refused(keys: Keys, tmp_path: Path) -> None:
    earlier = exchange(keys, tmp_path)

    def replay(sender: Role, n: int, data: bytes) -> bytes:
        return earlier.frames[ALICE][n] if sender is ALICE else data

    refused(exchange(keys, tmp_path, replay), BOB, SIGNATURE)


def test_a_record_repeated_is_refused(keys: Keys, tmp_path: Path) -> None:
    result = exchange(keys, tmp_path, only(ALICE, TEXT, lambda data: data + data))
    assert str(result.bob.error).startswith("record 1 where record 2 should be")
    assert result.bob.shown == [REQUEST]


def test_a_record_of_the_other_direction_is_refused_even_if_all_keys_were_the_same(keys: Keys) -> None:
    th, same = b"t" * 32, DirectionKeys(b"k" * 32, b"c" * 32)
    record = Sealer(BOB, same, th, keys.bob).seal(Kind.READY)
    with pytest.raises(chat.ProtocolError, match=SIGNATURE):
        Opener(ALICE, same, th, keys.bob).open(record)
    assert Opener(BOB, same, th, keys.bob).open(record).kind is Kind.READY


@pytest.mark.parametrize("part", ["th", "commitment"])
def test_the_signature_covers_what_is_never_sent(keys: Keys, part: str) -> None:
    th, same = b"t" * 32, DirectionKeys(b"k" * 32, b"c" * 32)
    record = Sealer(BOB, same, th, keys.bob).seal(Kind.READY)
    opener = (
        Opener(BOB, same, b"T" * 32, keys.bob)
        if part == "th"
        else Opener(BOB, DirectionKeys(same.key, b"C" * 32), th, keys.bob)
    )
    with pytest.raises(chat.ProtocolError, match=SIGNATURE):
        opener.open(record)


@pytest.mark.parametrize("role", Role)
def test_the_first_record_is_ready_and_nothing_else(keys: Keys, role: Role) -> None:
    th, same = b"t" * 32, DirectionKeys(b"k" * 32, b"c" * 32)
    for kind in (Kind.TEXT, Kind.CLOSE):
        record = Sealer(role, same, th, keys.bob).seal(kind, "too soon")
        with pytest.raises(chat.ProtocolError, match="READY is record 0, and no other"):
            Opener(role, same, th, keys.bob).open(record)
    record = sealed_by_insider(Sealer(role, same, th, keys.bob), padded(b"\0" + bytes(32) + b"text"))
    with pytest.raises(chat.ProtocolError, match="the record's text is too long"):
        Opener(role, same, th, keys.bob).open(record)


def test_speaking_out_of_turn_is_refused(ends: Ends) -> None:
    ends.bob.line.send(ends.bob._sealer.seal(Kind.TEXT, "before Alice said anything"))
    with pytest.raises(chat.ProtocolError, match="the other side spoke out of turn"):
        ends.alice.receive()


@pytest.mark.parametrize("leaver", Role)
def test_a_goodbye_that_crossed_a_record_tells_that_it_was_not_received(ends: Ends, leaver: Role) -> None:
    """It answers the record before; and when there is one, it is that and no older one."""
    ends.alice.send(REQUEST)
    if leaver is ALICE:
        assert ends.bob.receive().text == REQUEST
        ends.bob.send(REPLY)
    leaving, staying = (ends.alice, ends.bob) if leaver is ALICE else (ends.bob, ends.alice)
    leaving._send(Kind.CLOSE, "sorry")
    assert not staying.unread
    assert staying.receive()[:2] == (Kind.CLOSE, "sorry")
    assert staying.unread


@pytest.mark.parametrize("leaver", Role)
def test_a_goodbye_cannot_deny_what_its_sender_answered(ends: Ends, leaver: Role) -> None:
    ends.alice.send(REQUEST)
    assert ends.bob.receive().text == REQUEST
    ends.bob.send(REPLY)
    assert ends.alice.receive().text == REPLY
    if leaver is ALICE:
        ends.alice.send(REQUEST)
        assert ends.bob.receive().text == REQUEST
    leaving, staying = (ends.alice, ends.bob) if leaver is ALICE else (ends.bob, ends.alice)
    leaving.line.send(leaving._sealer.seal(Kind.CLOSE, "", staying._sealer.before))
    with pytest.raises(chat.ProtocolError, match=ANSWERS):
        staying.receive()


def test_a_goodbye_after_a_record_tells_that_it_was_received(ends: Ends) -> None:
    ends.alice.send(REQUEST)
    assert ends.bob.receive().text == REQUEST
    ends.bob._send(Kind.CLOSE, "")
    assert ends.alice.receive().kind is Kind.CLOSE
    assert not ends.alice.unread


def test_one_cannot_speak_out_of_turn(ends: Ends) -> None:
    with pytest.raises(ValueError, match="it is the other side's turn"):
        ends.bob.send("before Alice said anything")
    ends.alice.send(REQUEST)
    with pytest.raises(ValueError, match="it is the other side's turn"):
        ends.alice.send("once more")


# ------------------------------------------------------------------------------- what is on the wire


def test_nothing_on_the_wire_depends_on_the_text_but_its_length_class(keys: Keys) -> None:
    """Same keys, number and salt: texts of one class differ in ciphertext, and in what follows from it."""
    th, same = b"t" * 32, DirectionKeys(b"k" * 32, b"c" * 32)

    def salt(length: int) -> bytes:
        return b"s" * length

    records = [
        Sealer(BOB, same, th, keys.bob).seal(Kind.TEXT, text, random=salt)
        for text in ("yes", "no", "", "x" * 222)
    ]
    assert len({len(record) for record in records}) == 1
    assert (
        len(Sealer(BOB, same, th, keys.bob).seal(Kind.TEXT, "x" * 223, random=salt)) == len(records[0]) + 256
    )
    for (
        record
    ) in records:  # who guesses the text cannot test the guess: what is signed is what is on the wire
        body, signature = record[:-256], record[-256:]
        assert chat.verify(keys.bob, Direction(BOB, same, th, keys.bob).signed(body), signature)


def test_a_session_is_what_the_design_says_byte_by_byte(keys: Keys) -> None:
    """Computed once more without the functions under test. A = 2, B = Z = 2^100: zeros lead, and count."""
    a, b, nonce_a, nonce_b, salt = bytes(31) + b"\1", bytes(31) + b"\x64", b"A" * 32, b"B" * 32, b"s" * 32

    def framed(*fields: bytes) -> bytes:
        hello = b"".join(len(data).to_bytes(2, "big") + data for data in fields)
        return len(hello).to_bytes(4, "big") + hello

    def random_from(*values: bytes) -> chat.Random:
        return lambda _, left=list(values): left.pop(0)  # type: ignore[misc]

    bob = Offer.make(BOB, keys.bob, GROUP, random_from(b, nonce_b))
    alice = Offer.make(ALICE, keys.alice, GROUP, random_from(a, nonce_a))
    ders = {role: getattr(keys, role.value).public_key().export_key("DER") for role in Role}
    z = number(2**100, 256)
    hello_bob = framed(b"secure-chat/1", nonce_b, number(p), b"\2", z, ders[BOB])
    hello_alice = framed(b"secure-chat/1", nonce_a, number(2, 256), ders[ALICE])
    assert (chat.frame(bob.hello), chat.frame(alice.hello)) == (hello_bob, hello_alice)

    th = hashlib.sha256(hello_bob + hello_alice).digest()
    bob_sealer, bob_opener, _ = bob.agree(alice.hello)
    alice_sealer, alice_opener, _ = alice.agree(bob.hello)
    for label, sealer, opener in (
        (b"bob->alice", bob_sealer, alice_opener),
        (b"alice->bob", alice_sealer, bob_opener),
    ):
        fixed = z + b"secure-chat/1 key " + label + th
        key, commitment = (hashlib.sha256(bytes([0, 0, 0, block]) + fixed).digest() for block in (1, 2))
        answers = bytes(32)
        for n, text in enumerate([b"", b"x" * 223]):
            record = sealer.seal(Kind(n), text.decode(), answers, lambda _: salt)
            nonce, body, signature = bytes(11) + bytes([n]), record[:-256], record[-256:]
            plaintext = bytes([n]) + answers + text + b"\x80" + bytes(222 if n == 0 else 255)
            cipher = AES.new(key, AES.MODE_GCM, nonce=nonce)
            assert body == nonce + b"".join(cipher.encrypt_and_digest(plaintext))
            signed = SHA256.new(b"secure-chat/1 signature " + label + th + commitment + body)
            assert signature == pss.new(sealer.signer, salt_bytes=32, rand_func=lambda _: salt).sign(signed)
            assert opener.open(record) == (Kind(n), text.decode(), answers)
            answers = opener.latest
            assert answers == sealer.latest == signed.digest()


def test_no_two_records_share_a_nonce_and_a_key(keys: Keys, tmp_path: Path) -> None:
    used: set[tuple[bytes, bytes]] = set()
    encrypt = chat.encrypt

    def spy(key: bytes, nonce: bytes, plaintext: bytes) -> tuple[bytes, bytes]:
        assert (key, nonce) not in used
        used.add((key, nonce))
        return encrypt(key, nonce, plaintext)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "encrypt", spy)
        for _ in range(3):
            assert exchange(keys, tmp_path).went_well()
    assert len(used) == 3 * 5  # READY and TEXT each way, and Alice's CLOSE


def test_every_session_has_fresh_values_so_that_stolen_keys_open_no_recording(
    keys: Keys, tmp_path: Path
) -> None:
    hellos = [exchange(keys, tmp_path).frames for _ in range(2)]
    for sender, secret_fields in ((BOB, (NONCE, B)), (ALICE, (NONCE, A))):
        first, second = (chat.decode_fields(frames[sender][HELLO][4:]) for frames in hellos)
        for index in secret_fields:
            assert first[index] != second[index]


def test_no_secret_comes_from_a_generator_that_can_be_seeded(keys: Keys) -> None:
    seen = set()
    for _ in range(2):
        random.seed(1)
        offer = Offer.make(BOB, keys.bob, GROUP)
        record = Sealer(BOB, DirectionKeys(b"k" * 32, b"c" * 32), b"t" * 32, keys.bob).seal(Kind.READY)
        nonce = chat.decode_fields(offer.hello)[NONCE]
        seen |= {GROUP.private_exponent(), offer.exponent, nonce, record[-256:]}
    assert len(seen) == 2 * 4


def test_public_values_are_checked_before_a_secret_exponent_meets_them(keys: Keys) -> None:
    offer = Offer.make(ALICE, keys.alice, GROUP)
    hello = hello_with(B, number(p - 4, 256))(chat.frame(Offer.make(BOB, keys.bob, GROUP).hello))[4:]
    power = chat.power

    def spy(base: int, exponent: bytes, modulus: int) -> bytes:
        assert exponent != offer.exponent, "a secret exponent met an unchecked value"
        return power(base, exponent, modulus)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "power", spy)
        with pytest.raises(chat.ProtocolError, match=SUBGROUP):
            offer.agree(hello)


def test_no_secret_in_any_representation(keys: Keys, ends: Ends) -> None:
    offer = Offer.make(BOB, keys.bob, GROUP)
    agreement = offer.agree(Offer.make(ALICE, keys.alice, GROUP).hello)[2]
    keys_of_direction = ends.bob._sealer._keys
    objects = (ends.bob, ends.bob._sealer, ends.bob._opener, ends.bob.line)
    for thing in (offer, agreement, keys_of_direction, *objects):
        for text in (repr(thing), str(thing), f"{[thing]}"):
            assert str(keys.bob.d) not in text
            for secret in (offer.exponent, agreement.z, *keys_of_direction):
                assert repr(secret)[2:20] not in text
                assert secret.hex()[:16] not in text


def test_no_secret_in_what_is_narrated(
    keys: Keys, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = {REQUEST.encode(), REPLY.encode()}
    derive, draw = chat.derive_keys, Group.private_exponent

    def derive_and_tell(z: bytes, direction: bytes, th: bytes) -> DirectionKeys:
        made = derive(z, direction, th)
        hidden.update((z, *made))
        return made

    def draw_and_tell(group: Group, source: chat.Random) -> bytes:
        exponent = draw(group, source)
        hidden.add(exponent)
        return exponent

    monkeypatch.setattr(chat, "derive_keys", derive_and_tell)
    monkeypatch.setattr(Group, "private_exponent", draw_and_tell)
    caplog.set_level("DEBUG", "secure_chat")
    result = exchange(keys, tmp_path)
    assert result.went_well()
    assert len(hidden) == 2 + 1 + 4 + 2  # both texts, Z, K and C of each direction, a and b
    for record in (*result.frames[ALICE][READY:], *result.frames[BOB][READY:]):
        for part in (record[4:16], record[16:-272], record[-272:-256], record[-256:]):
            assert caplog.text.count(f" {part.hex()}\n") >= 2  # where it was sealed, and where it was opened
    for secret in hidden:
        assert secret.hex() not in caplog.text
        assert repr(secret)[2:20] not in caplog.text


# ----------------------------------------------------------------------------------- what is on the screen


@pytest.mark.parametrize("script", ["bob_server", "alice_client"])
def test_a_text_of_the_peers_neither_drives_the_terminal_nor_imitates_the_program(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    program = importlib.import_module(script)
    monkeypatch.setattr(program, "at_terminal", lambda: False)
    program.show("\x1b[2J\u202e\nRefused: no")
    mark = program.PEER + ": "
    shown, told = capsys.readouterr()
    assert shown == f"{mark}\\x1b[2J\\u202e\n{'| ':>{len(mark)}}Refused: no\n"
    program.say("\x1b]52;c;cm0gLXJm\x07")
    shown, told = capsys.readouterr()
    assert (shown, told) == ("", "\\x1b]52;c;cm0gLXJm\\x07\n")


# ---------------------------------------------------------------------- every byte, every point to cut at


# Bytes of each frame, with its length, for the RSA keys of 2048 bits that the tests use.
FRAMES = {
    (BOB, HELLO): 868,
    (ALICE, HELLO): 607,
    (ALICE, READY): 544,
    (BOB, READY): 544,
    (ALICE, TEXT): 544,
    (BOB, TEXT): 544,
    (ALICE, CLOSE): 544,
}
NOBODY_WAS_SHOWN = {
    (ALICE, TEXT): ([], []),
    (BOB, TEXT): ([REQUEST], []),
    (ALICE, CLOSE): ([REQUEST], [REPLY]),
}


def test_the_frames_are_as_long_as_that(keys: Keys, tmp_path: Path) -> None:
    frames = exchange(keys, tmp_path).frames
    assert {(role, n): len(data) for role in Role for n, data in enumerate(frames[role])} == FRAMES


@pytest.mark.parametrize(("sender", "n"), FRAMES)
def test_every_byte_changed(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sender: Role, n: int
) -> None:
    """Alone, each ends in one error on one side, a cut on the other, and shows nothing of the message.

    A changed length (the first four bytes) may starve the victim: then the stall is what ends it.
    """
    monkeypatch.setattr(chat, "STALL_SECONDS", 0.5)
    for at in range(FRAMES[sender, n]):
        bit = 1 << secrets.randbelow(8)
        result = exchange(keys, tmp_path, only(sender, n, functools.partial(flip, at=at, bit=bit)))
        assert (result.bob.shown, result.alice.shown) == NOBODY_WAS_SHOWN.get((sender, n), ([], [])), at
        errors = {type(result.bob.error), type(result.alice.error)} - {type(None)}
        assert errors <= {chat.ProtocolError, chat.ConnectionCut}, (at, result.bob.error, result.alice.error)
        assert result.of(sender.peer).error is not None, at
        assert result.of(sender).error is not None or n == CLOSE, at  # who said goodbye is gone already
        if at >= 4:
            assert chat.ProtocolError in errors, (at, result.bob.error, result.alice.error)
        assert not result.bob.goodbye


@pytest.mark.parametrize(("sender", "n"), FRAMES)
def test_every_point_to_cut_at(keys: Keys, tmp_path: Path, sender: Role, n: int) -> None:
    """A cut is told from a goodbye, and inside a message from between two."""
    for at in range(FRAMES[sender, n]):
        result = exchange(keys, tmp_path, only(sender, n, lambda data: Last(data[:at])))  # noqa: B023
        victim = result.of(sender.peer)
        assert isinstance(victim.error, chat.ConnectionCut), (at, victim)
        expected = "without a goodbye" if at == 0 else "in the middle of a message"
        assert expected in str(victim.error), at
        assert not result.bob.goodbye
        assert not result.alice.goodbye
        assert (result.bob.shown, result.alice.shown) == NOBODY_WAS_SHOWN.get((sender, n), ([], [])), at


# ------------------------------------------------------------------- the same attacks, as two people see them

BROKEN, CUT = "Broken off: ", "Cut off: the connection ended"
# What is done to which frame, which side refuses it, its exit status and line, and those of the other side.
SCREENS: dict[str, tuple[Role, int, Callable[[bytes], bytes], Role, int, str, int, str]] = {
    "B = 0": (BOB, HELLO, hello_with(B, bytes(256)), ALICE, 3, BROKEN + SUBGROUP, 0, f": {CUT}"),
    "p composite": (
        BOB,
        HELLO,
        hello_with(P, number(p - 2)),
        ALICE,
        3,
        BROKEN + "p is not a safe prime",
        0,
        f": {CUT}",
    ),
    "A = 1": (ALICE, HELLO, hello_with(A, number(1, 256)), BOB, 0, f": {BROKEN}{SUBGROUP}", 1, CUT),
    "READY forged": (ALICE, READY, lambda d: flip(d, -1), BOB, 0, f": {BROKEN}{SIGNATURE}", 1, CUT),
    "his READY forged": (BOB, READY, lambda d: flip(d, -1), ALICE, 3, BROKEN + SIGNATURE, 1, CUT),
    "text forged": (ALICE, TEXT, lambda d: flip(d, 100), BOB, 3, BROKEN + SIGNATURE, 1, CUT),
    "reply forged": (BOB, TEXT, lambda d: flip(d, 100), ALICE, 3, BROKEN + SIGNATURE, 1, CUT),
    "text cut": (ALICE, TEXT, lambda d: Last(d[:99]), BOB, 1, CUT + " in the middle of a message", 1, CUT),
    "goodbye cut": (ALICE, CLOSE, lambda d: Last(b""), BOB, 1, CUT + " without a goodbye", 0, "You left."),
}


@pytest.mark.parametrize("name", SCREENS)
def test_what_both_see_of_it(
    bob: Callable[..., tuple[Program, str]], start: Callable[..., Program], name: str
) -> None:
    sender, n, change, victim, status, line, other_status, other_line = SCREENS[name]
    server, port = bob("--once")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = start("alice_client.py", "127.0.0.1", "--port", str(listener.getsockname()[1]))
        at_alice, _ = listener.accept()
    at_bob = socket.create_connection(("127.0.0.1", int(port)), timeout=DEADLINE)
    wire = Wire(at_bob, at_alice, only(sender, n, change))
    client.write(f"{REQUEST}\n")
    client.end_input()
    server.write(f"{REPLY}\n")
    programs = {ALICE: client, BOB: server}
    programs[victim].expect(re.escape(line), "stderr")
    programs[victim.peer].expect(re.escape(other_line), "stderr")
    if (sender, n) in (
        (BOB, HELLO),
        (ALICE, HELLO),
        (ALICE, READY),
    ):  # no conversation came of it: Bob waits for the next
        server.process.terminate()
        assert (client.wait(), server.wait()) == (status if victim is ALICE else other_status, 130)
    else:
        assert programs[victim].wait() == status
        assert programs[victim.peer].wait() == other_status
    shown = NOBODY_WAS_SHOWN.get((sender, n), ([], []))
    assert [server.stdout, client.stdout] == [
        "".join(f"{who}: {text}\n" for text in texts) for who, texts in zip(("Alice", "Bob"), shown)
    ]
    wire.close()
