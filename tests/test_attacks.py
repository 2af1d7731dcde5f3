"""Every attack on the wire, and the check that must refuse it.

The tables name the reason that the victim gives: another check refusing first would hide that the one
meant for the attack is gone. Whoever is not the victim sees the connection cut, and neither shows a thing.
"""

from __future__ import annotations

import functools
import secrets
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import DEADLINE, GROUP, Keys
from Crypto.PublicKey import ECC
from mallory import (
    ALICE,
    ALICE_RSA,
    ATTACKS,
    BOB,
    BOB_RSA,
    CLOSE,
    HELLO,
    READY,
    REPLY,
    REQUEST,
    SIGNATURE,
    SUBGROUP,
    TEXT,
    A,
    B,
    Exchange,
    G,
    Last,
    P,
    exchange,
    flip,
    hello_with,
    only,
)

import crypto_utils as chat
from crypto_utils import Role


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


def test_without_mallory_everything_arrives(keys: Keys, tmp_path: Path) -> None:
    assert exchange(keys, tmp_path).went_well()


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The first check refuses it; test_mallory.py takes one check away after the other."""
    attack, check = ATTACKS[name], ATTACKS[name].checks[0]
    if check.name == "deadline":
        monkeypatch.setattr(chat, "PATIENCE", 2.0)
    earlier = exchange(keys, tmp_path).frames if attack.needs_earlier else {}
    told: list[str] = []
    result = exchange(
        keys,
        tmp_path,
        attack.plan(told.append, earlier),
        alice_pins=chat.fingerprint(keys.bob) if attack.needs_peer else None,
        leaves_early=attack.leaves_early,
    )
    assert told
    assert check.reason in str(result.of(check.side).error), result
    assert not result.bob.goodbye
    assert not result.alice.goodbye
    assert (tuple(result.bob.shown), tuple(result.alice.shown)) == attack.before


# ------------------------------------------------------------------------ values in the two hellos


def number(value: int, length: int = 0) -> bytes:
    return value.to_bytes(max(length, len(chat.to_bytes(value))), "big")


def rsa_der(bits: int, e: int = 65537, even: bool = False) -> bytes:
    """A public key of any size, made without looking for primes."""
    n = 3 * 2 ** (bits - 2) + 45 * 2**64 + 1 - even
    return chat.RSA.construct((n, e), consistency_check=False).export_key("DER")


p = GROUP.p
PUBLIC_VALUES = {
    "1": (1, SUBGROUP),
    "p+1": (p + 1, SUBGROUP),
    "outside the subgroup": (p - 4, SUBGROUP),  # 4 is a square, -1 is none
}


@pytest.mark.parametrize("name", PUBLIC_VALUES)
@pytest.mark.parametrize("sender", Role)
def test_public_value(keys: Keys, tmp_path: Path, sender: Role, name: str) -> None:
    value, reason = PUBLIC_VALUES[name]
    change = hello_with(B if sender is BOB else A, number(value, 256))
    refused(exchange(keys, tmp_path, only(sender, HELLO, change)), sender.peer, reason)


PRIME_WITHOUT_SAFETY = 2**2203 - 1  # a Mersenne prime: (p - 1) / 2 is divisible by 3
BOTH_RULES = {
    "p even": (P, number(p - 1), "p is even"),
    "p of 2047 bits": (P, number(p >> 1), "p has 2047 bits, not 2048 to 4096"),
    "p of 4097 bits": (P, number(1 << 4096 | 1), "p or g is over 4096 bits long"),
    "p composite": (P, number(p - 2), "p is not a safe prime"),
    "p prime, q composite": (P, number(PRIME_WITHOUT_SAFETY), "p is not a safe prime"),
    "p padded": (P, b"\0" + number(p), "p or g is not in its minimal encoding"),
    "g padded": (G, b"\0\2", "p or g is not in its minimal encoding"),
    "g = 1": (G, b"\1", "g does not generate the subgroup of order q"),
    "g outside the subgroup": (G, number(p - 2), "g does not generate the subgroup of order q"),
}


@pytest.mark.parametrize("name", BOTH_RULES)
def test_parameters(keys: Keys, tmp_path: Path, name: str) -> None:
    field, value, reason = BOTH_RULES[name]
    refused(exchange(keys, tmp_path, only(BOB, HELLO, hello_with(field, value))), ALICE, reason)


RSA_KEYS: dict[str, tuple[Callable[[Keys], bytes], str]] = {
    "2047 bits": (lambda _: rsa_der(2047), "the RSA key has 2047 bits, not 2048 to 4096"),
    "4097 bits": (lambda _: rsa_der(4097), "the RSA key has 4097 bits, not 2048 to 4096"),
    "8192 bits": (lambda _: rsa_der(8192), "the RSA key is larger than 1 KiB"),
    "even n": (lambda _: rsa_der(2048, even=True), "the RSA key cannot be parsed"),
    "e = 3": (lambda _: rsa_der(2048, 3), "the RSA key's public exponent is not 65537"),
    "another type": (
        lambda _: ECC.generate(curve="P-256").public_key().export_key(format="DER"),
        "the key is not an RSA SubjectPublicKeyInfo",
    ),
}


@pytest.mark.parametrize("name", RSA_KEYS)
@pytest.mark.parametrize("sender", Role)
def test_rsa_key(keys: Keys, tmp_path: Path, sender: Role, name: str) -> None:
    make, reason = RSA_KEYS[name]
    change = hello_with(BOB_RSA if sender is BOB else ALICE_RSA, make(keys))
    refused(exchange(keys, tmp_path, only(sender, HELLO, change)), sender.peer, reason)


LIMITS = {  # of a frame, and what both have been shown by then
    (BOB, HELLO): (8192, ([], [])),
    (ALICE, HELLO): (8192, ([], [])),
    (ALICE, READY): (4096, ([], [])),
    (BOB, READY): (4096, ([], [])),
    (ALICE, TEXT): (12 + 4097 * 256 + 16 + 512, ([], [])),
    (BOB, TEXT): (12 + 4097 * 256 + 16 + 512, ([REQUEST], [])),
}


@pytest.mark.parametrize(("sender", "n"), LIMITS)
def test_a_frame_over_its_limit_is_refused(keys: Keys, tmp_path: Path, sender: Role, n: int) -> None:
    limit, shown = LIMITS[sender, n]
    result = exchange(keys, tmp_path, only(sender, n, lambda _: chat.frame(bytes(limit + 1))))
    refused(result, sender.peer, f"a frame of {limit + 1} bytes, over the limit of {limit}", shown=shown)


# --------------------------------------------------------------------------------- who is at the other end


@pytest.mark.parametrize("impostor", Role)
def test_man_in_the_middle_with_her_own_key_is_refused_by_the_pin(
    keys: Keys, tmp_path: Path, impostor: Role
) -> None:
    assert exchange(keys, tmp_path).went_well()
    result = exchange(keys, tmp_path, **{f"{impostor.value}_key": keys.mallory})
    refused(result, impostor.peer, "is not the pinned one", chat.TrustError)
    assert len(result.frames[impostor.peer]) == (1 if impostor is ALICE else 0)  # nothing of his was signed


@pytest.mark.parametrize("impostor", Role)
def test_man_in_the_middle_at_first_contact_is_refused_by_the_fingerprint(
    keys: Keys, tmp_path: Path, impostor: Role
) -> None:
    genuine = chat.fingerprint(keys.bob if impostor is BOB else keys.alice)
    options = {f"{impostor.value}_key": keys.mallory, f"{impostor.peer.value}_pins": genuine}
    result = exchange(keys, tmp_path, **options)
    refused(result, impostor.peer, "is not the one asked for", chat.TrustError)
    assert not (tmp_path / impostor.peer.value / "known_peers").exists()


@pytest.mark.parametrize("thief", Role)
def test_a_stolen_key_does_not_pose_as_the_peer_to_its_owner(keys: Keys, tmp_path: Path, thief: Role) -> None:
    stolen = hello_with(BOB_RSA, keys.alice.public_key().export_key("DER"))
    if thief is ALICE:
        stolen = hello_with(ALICE_RSA, keys.bob.public_key().export_key("DER"))
    result = exchange(keys, tmp_path, only(thief, HELLO, stolen))
    refused(result, thief.peer, "both sides present the same key: a reflection")


def test_a_key_is_pinned_only_after_its_owner_has_proven_to_hold_it(keys: Keys, tmp_path: Path) -> None:
    """Mallory presents Alice's key, which is public, and cannot sign with it."""

    def swap(data: bytes) -> bytes:
        return hello_with(ALICE_RSA, keys.alice.public_key().export_key("DER"))(data)

    result = exchange(keys, tmp_path, only(ALICE, HELLO, swap), alice_key=keys.mallory)
    refused(result, BOB, "the record's signature is not valid")
    assert not (tmp_path / "bob" / "known_peers").exists()
    assert not (tmp_path / "alice" / "known_peers").exists()


# ------------------------------------------------------------------------------- other sessions


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


# ----------------------------------------------------------------------------------- what is on the screen


def test_a_text_neither_drives_the_terminal_nor_imitates_the_program(
    capfd: pytest.CaptureFixture[str],
) -> None:
    console = chat.Console(BOB)
    console.show("Alice", "\x1b[2J\u202e\nRefused: no")
    assert capfd.readouterr() == ("Alice: \\x1b[2J\\u202e\n     | Refused: no\n", "")
    console.notice("\x1b]52;c;cm0gLXJm\x07")
    assert capfd.readouterr() == ("", "\\x1b]52;c;cm0gLXJm\\x07\n")


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


@pytest.fixture
def same_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let both sides send the same bytes in each exchange, and compute each power and signature once."""
    made: dict[object, Any] = {}

    def once(original: Callable[..., Any], key: Callable[..., object]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if key(*arguments) not in made:
                made[key(*arguments)] = original(*arguments)
            return made[key(*arguments)]

        return call

    monkeypatch.setattr(chat, "make_hello", once(chat.make_hello, lambda role, *_: role))
    monkeypatch.setattr(chat, "modexp", once(chat.modexp, lambda *numbers: numbers))
    monkeypatch.setattr(chat, "sign", once(chat.sign, lambda key, message: message.digest()))


@pytest.mark.exhaustive
@pytest.mark.usefixtures("same_session")
@pytest.mark.parametrize(("sender", "n"), FRAMES)
def test_every_byte_changed(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sender: Role, n: int
) -> None:
    """Alone, each ends in one error on one side, a cut on the other, and shows nothing of the message.

    A changed length (the first four bytes) may starve the victim: then the stall is what ends it. All are
    tried, because which check a byte meets depends on where it is.
    """
    for at in range(FRAMES[sender, n]):
        monkeypatch.setattr(chat, "PATIENCE", 1.0 if at < 4 else DEADLINE)
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


def cut(data: bytes, at: int) -> Last:
    return Last(data[:at])


@pytest.mark.exhaustive
@pytest.mark.usefixtures("same_session")
@pytest.mark.parametrize(("sender", "n"), FRAMES)
def test_every_point_to_cut_at(keys: Keys, tmp_path: Path, sender: Role, n: int) -> None:
    """A cut is told from a goodbye, and inside a message from between two, wherever it is: at each byte."""
    for at in range(FRAMES[sender, n]):
        result = exchange(keys, tmp_path, only(sender, n, functools.partial(cut, at=at)))
        victim = result.of(sender.peer)
        assert isinstance(victim.error, chat.ConnectionCut), (at, victim)
        expected = "without a goodbye" if at == 0 else "in the middle of a message"
        assert expected in str(victim.error), at
        assert not result.bob.goodbye
        assert not result.alice.goodbye
        assert (result.bob.shown, result.alice.shown) == NOBODY_WAS_SHOWN.get((sender, n), ([], [])), at
