"""From two hellos to a channel: fresh values, nothing signed too soon, one deadline, and the same words.

And the channel: what interrupts it, how it ends, and what it must not keep.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import DEADLINE, GROUP, Background, Ends, Keys, loopback, shake_hands, store_with_group
from Crypto.Cipher import AES
from Crypto.Hash import SHA256
from Crypto.Signature import pss
from vectors import make

import crypto_utils as chat
from crypto_utils import (
    NOTHING,
    Channel,
    ConnectionCut,
    FrameSocket,
    Group,
    Hello,
    KeyStore,
    Offer,
    Opener,
    PinnedPeer,
    ProtocolError,
    RecordType,
    Role,
    Sealer,
    TrustError,
)

BOB, ALICE = Role
READY, TEXT, CLOSE = RecordType
REQUEST, REPLY = "the request, which nobody else may read", "the reply, which nobody else may read"
OTHER_GROUP = make.safe_prime(2048, 290893)


def number(value: int, length: int = 256) -> bytes:
    return value.to_bytes(length, "big")


def drawing(*values: bytes) -> chat.Random:
    """Return what draws these, one after the other."""
    left = list(values)
    return lambda _: left.pop(0)


# ------------------------------------------------------------------------------------- byte by byte


def test_a_session_is_what_the_specification_says_byte_by_byte(keys: Keys) -> None:
    """Computed once more without the functions under test. A = 2, B = Z = 2^100: zeros lead, and count."""
    a, b, nonce_a, r, salt = bytes(31) + b"\1", bytes(31) + b"\x64", b"A" * 32, b"r" * 32, b"s" * 32

    def framed(*fields: bytes) -> bytes:
        hello = b"".join(len(data).to_bytes(2, "big") + data for data in fields)
        return len(hello).to_bytes(4, "big") + hello

    bob = Offer.make(BOB, keys.bob, GROUP, drawing(b, r))
    alice = Offer.make(ALICE, keys.alice, GROUP, drawing(a, nonce_a))
    ders = {role: getattr(keys, role.value).public_key().export_key("DER") for role in Role}
    z, nonce_b = number(2**100), hashlib.sha256(b"secure-chat/1 commit " + r).digest()
    hello_bob = framed(b"secure-chat/1", nonce_b, number(GROUP.p), b"\2", z, ders[BOB])
    hello_alice = framed(b"secure-chat/1", nonce_a, number(2), ders[ALICE])
    assert (chat.frame(bob.payload), chat.frame(alice.payload)) == (hello_bob, hello_alice)
    assert (bob.r, alice.r) == (r, b"")

    th = hashlib.sha256(hello_bob + hello_alice).digest()
    agreed = {BOB: bob.agree(alice.payload), ALICE: alice.agree(bob.payload)}
    assert agreed[BOB] == (keys.alice.public_key(), z, th)
    assert agreed[ALICE] == (keys.bob.public_key(), z, th)
    sealers = {role: Sealer(role, getattr(keys, role.value), z, th) for role in Role}
    openers = {role: Opener(role, getattr(keys, role.value).public_key(), z, th) for role in Role}
    said = {BOB: NOTHING, ALICE: NOTHING}
    bodies = [(READY, b""), (READY, r), (TEXT, b"x" * 222), (TEXT, b"x" * 223), (CLOSE, b"")]
    for n, (record_type, body) in enumerate(bodies):
        role = ALICE if n % 2 == 0 else BOB
        fixed = z + b"secure-chat/1 key " + role.label + th
        key, commitment = (hashlib.sha256(bytes([0, 0, 0, block]) + fixed).digest() for block in (1, 2))
        nonce = bytes(11) + bytes([n // 2])
        plaintext = bytes([n // 2]) + said[role.peer] + body + b"\x80"
        plaintext += bytes(-len(plaintext) % 256)
        cipher = AES.new(key, AES.MODE_GCM, nonce=nonce)
        sealed = nonce + b"".join(cipher.encrypt_and_digest(plaintext))
        signed = SHA256.new(b"secure-chat/1 signature " + role.label + th + commitment + sealed)
        signer = pss.new(getattr(keys, role.value), salt_bytes=32, rand_func=lambda _: salt)
        record = sealers[role].seal(record_type, body, openers[role.peer], random=lambda _: salt)
        assert record == sealed + signer.sign(signed)
        assert openers[role].open(record, sealers[role.peer]) == (record_type, body, said[role.peer], False)
        said[role] = signed.digest()


class ByteByByte(socket.socket):
    """A connected socket that takes and gives a byte at a time."""

    def recv_into(self, buffer: Any, *_: int) -> int:
        return super().recv_into(buffer[:1])

    def send(self, data: Any, *_: int) -> int:
        return super().send(data[:1])


def meet(
    bob: socket.socket, alice: socket.socket, keys: Keys, folder: Path, **options: Any
) -> dict[Role, Channel | Exception | None]:
    """Both sides' handshakes over these sockets, and what came of them. Whoever fails hangs up."""

    def side(role: Role, connected: socket.socket) -> Channel | Exception | None:
        frames, store = FrameSocket(connected), store_with_group(folder / role.value)
        try:
            if role is BOB:
                return chat.bob_handshake(frames, keys.bob, GROUP, PinnedPeer(store, "alice"), **options)
            return chat.alice_handshake(frames, keys.alice, store, PinnedPeer(store, "[bob]:65432"))
        except (ProtocolError, TrustError, ConnectionCut) as error:
            frames.hang_up()
            return error

    bobs = Background(lambda: side(BOB, bob))
    hers = side(ALICE, alice)
    return {BOB: bobs.result(), ALICE: hers}


def test_a_session_may_come_in_byte_by_byte(keys: Keys, tmp_path: Path) -> None:
    near, far = (ByteByByte(fileno=end.detach()) for end in loopback())
    with near, far:
        bob, alice = meet(far, near, keys, tmp_path).values()
        assert isinstance(bob, Channel)
        assert isinstance(alice, Channel)
        for text in ("one", "two"):
            alice.send(text)
            assert bob.receive().text == text
            bob.send(text)
            assert alice.receive().text == text
        leaving = Background(bob.close)
        assert alice.receive().type is CLOSE
        alice.close()
        leaving.result()


@pytest.fixture
def connect(keys: Keys, tmp_path: Path) -> Iterator[Callable[..., Ends]]:
    """Return a function that makes a pair of channels, as `ends` is; all are closed with the test."""
    made: list[Ends] = []

    def shake(**options: bool) -> Ends:
        stores = KeyStore(tmp_path / "bob"), store_with_group(tmp_path / "alice")
        made.append(shake_hands(*stores, keys, **options))
        return made[-1]

    yield shake
    for ends in made:
        for channel in ends:
            channel.frames.socket.close()


# --------------------------------------------------------------------------------------- fresh values


def test_every_session_has_fresh_values(keys: Keys) -> None:
    """So that nobody can replay a session, and stolen RSA keys open no recording."""
    offers = [Offer.make(role, getattr(keys, role.value), GROUP) for role in Role for _ in range(8)]
    for values in (
        {offer.exponent for offer in offers},
        {offer.hello.nonce for offer in offers},
        {offer.hello.public_value for offer in offers},
    ):
        assert len(values) == 16
    assert len({offer.r for offer in offers if offer.role is BOB}) == 8
    assert {offer.r for offer in offers if offer.role is ALICE} == {b""}


def test_no_secret_comes_from_a_generator_that_can_be_seeded(keys: Keys) -> None:
    seen = set()
    for _ in range(2):
        random.seed(1)
        offer = Offer.make(BOB, keys.bob, GROUP)
        sealer, opener = Sealer(ALICE, keys.alice, NOTHING, NOTHING), Opener(BOB, keys.bob, NOTHING, NOTHING)
        salted = sealer.seal(READY, b"", opener)[-256:]
        seen |= {GROUP.private_exponent(), offer.exponent, offer.r, offer.hello.nonce, salted}
    assert len(seen) == 2 * 5


def test_the_hello_tells_nothing_of_r_but_its_commitment(keys: Keys) -> None:
    offer = Offer.make(BOB, keys.bob, GROUP)
    assert offer.hello.nonce == chat.commit(offer.r)
    assert offer.r not in offer.payload


# ----------------------------------------------------------------------------------- words and commitment


def test_both_screens_show_the_same_words(connect: Callable[..., Ends]) -> None:
    seen = set()
    for _ in range(3):
        ends = connect()
        assert ends.bob.words == ends.alice.words
        assert len(ends.bob.words.split()) == 6
        seen.add(ends.bob.words)
    assert len(seen) == 3


@pytest.mark.parametrize("changed", ["nonce_A", "r"])
def test_with_somebody_in_between_the_words_differ(keys: Keys, changed: str) -> None:
    """Two sessions that agree in all but one value have no words in common."""
    bob = Offer.make(BOB, keys.bob, GROUP, drawing(b"b" * 32, b"r" * 32))
    shown = []
    for value in (b"1" * 32, b"2" * 32):
        nonce = value if changed == "nonce_A" else b"n" * 32
        hers = Offer.make(ALICE, keys.alice, GROUP, drawing(b"a" * 32, nonce))
        shown.append(chat.make_words(bob.agree(hers.payload)[2], value if changed == "r" else bob.r).split())
    assert all(one != two for one, two in zip(*shown))


class Grinding:
    """Mallory in the middle, with a session on each side. She wants one word to be the same on both screens.

    A word is 11 bits, so it takes her 2,048 tries on average; two take 2^22, which are seconds. She gives up
    after 60,000 tries, before which she would have found a word but for a chance of 2^-42.
    """

    TRIES = 60_000

    def __init__(self, keys: Keys, seed: int) -> None:
        self.random = random.Random(seed)
        draw = self.random.randbytes
        self.keys = keys
        self.bob = Offer.make(BOB, keys.bob, GROUP, draw)  # what Bob offers, to Mallory
        self.alice = Offer.make(ALICE, keys.alice, GROUP, draw)  # what Alice offers, to Mallory
        self.to_bob = Offer.make(ALICE, keys.mallory, GROUP, draw)
        self.to_alice = Offer.make(BOB, keys.mallory, GROUP, draw)
        self.th_at_alice = chat.transcript_hash(self.to_alice.payload, self.alice.payload)
        self.at_alice = chat.make_words(self.th_at_alice, self.to_alice.r).split()[0]

    def search(self, word: str, words_of: Callable[[bytes], str]) -> tuple[bytes, int]:
        """Return a value of hers that makes this word the first, and how many tries it took."""
        for tries in range(1, self.TRIES):
            value = self.random.randbytes(32)
            if words_of(value).split()[0] == word:
                return value, tries
        pytest.fail("no word was found")

    def with_nonce(self, nonce: bytes) -> bytes:
        """Her hello to Bob, with another nonce."""
        hello = self.to_bob.hello
        return Hello(None, nonce, hello.public_value, hello.rsa).encode()

    def search_with_r(self, r: bytes) -> tuple[bytes, int]:
        """The nonce for Bob that gives the word on Alice's screen, if Bob's r is this one."""
        bob = self.bob.payload
        return self.search(
            self.at_alice, lambda nonce: chat.make_words(chat.transcript_hash(bob, self.with_nonce(nonce)), r)
        )

    def at_bob(self, nonce: bytes) -> str:
        """The first word on Bob's screen, once she has sent that nonce and he has opened his r."""
        return chat.make_words(self.bob.agree(self.with_nonce(nonce))[2], self.bob.r).split()[0]


def test_whoever_knew_r_would_make_equal_words(keys: Keys) -> None:
    """Were r known before Alice's hello is due, as without a commitment, a word would be found at once."""
    mallory = Grinding(keys, 1)
    nonce, tries = mallory.search_with_r(mallory.bob.r)
    assert mallory.at_bob(nonce) == mallory.at_alice
    assert tries < mallory.TRIES


def test_before_bobs_ready_no_number_of_tries_helps_towards_bob(keys: Keys) -> None:
    """She does not know r, and what she finds for any other r is right for that one alone."""
    equal = 0
    for seed in range(6):
        mallory = Grinding(keys, seed)
        guessed = mallory.random.randbytes(32)
        nonce, _ = mallory.search_with_r(guessed)
        equal += mallory.at_bob(nonce) == mallory.at_alice
    assert equal == 0  # each is equal by chance once in 2,048


def test_towards_alice_she_has_one_r_to_show(keys: Keys) -> None:
    """She speaks last to Alice, and so she could choose r by its words, had she not committed to it."""
    mallory = Grinding(keys, 3)
    wanted = mallory.at_bob(mallory.to_bob.hello.nonce)
    assert wanted != mallory.at_alice
    r, _ = mallory.search(wanted, lambda r: chat.make_words(mallory.th_at_alice, r))
    key, z, th = mallory.alice.agree(mallory.to_alice.payload)
    hers, his = Sealer(ALICE, keys.alice, z, th), Opener(BOB, key, z, th)
    mallorys, opened = Sealer(BOB, keys.mallory, z, th), Opener(ALICE, keys.alice, z, th)
    opened.open(hers.seal(READY, b"", his), mallorys)
    message = his.open(mallorys.seal(READY, r, opened), hers)
    assert chat.make_words(th, message.body).split()[0] == wanted
    with pytest.raises(ProtocolError, match="r does not fit"):
        chat.check_commitment(mallory.to_alice.hello.nonce, message.body)


def test_alice_has_no_channel_with_an_r_that_does_not_fit(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """She refuses before there are words to show; Bob finds the line cut."""
    monkeypatch.setattr(chat, "commit", lambda r: hashlib.sha256(b"another " + r).digest())
    offer = Offer.make(BOB, keys.bob, GROUP)
    monkeypatch.undo()
    monkeypatch.setattr(Offer, "make", lambda role, *rest: offer if role is BOB else make_offer(role, *rest))
    near, far = loopback()
    with near, far:
        bob, alice = meet(far, near, keys, tmp_path).values()
    assert isinstance(alice, ProtocolError)
    assert "r does not fit" in str(alice)
    assert isinstance(bob, Channel)


make_offer = Offer.make


# -------------------------------------------------------------------------------- what happens before what


def test_public_values_are_checked_before_a_secret_exponent_meets_them(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer = Offer.make(ALICE, keys.alice, GROUP)
    genuine = Offer.make(BOB, keys.bob, GROUP).hello
    monkeypatch.setattr(chat, "modexp", lambda *_: pytest.fail("a secret exponent met an unchecked value"))
    for y in (0, 1, GROUP.p - 1, GROUP.p, GROUP.p - 4):
        with pytest.raises(ProtocolError, match="not in the subgroup"):
            offer.agree(Hello(GROUP, genuine.nonce, number(y), genuine.rsa).encode())
    with pytest.raises(ProtocolError, match="not as long as p"):
        offer.agree(Hello(GROUP, genuine.nonce, genuine.public_value[1:], genuine.rsa).encode())


@pytest.mark.parametrize("role", Role)
def test_ones_own_key_is_no_peers(keys: Keys, role: Role) -> None:
    """A stolen key, or a reflection, does not pose as the peer to its owner."""
    own = getattr(keys, role.value)
    with pytest.raises(ProtocolError, match="our own key"):
        Offer.make(role, own, GROUP).agree(Offer.make(role.peer, own, GROUP).payload)


def test_misbinding_bob_does_not_take_alices_words_for_mallorys(keys: Keys) -> None:
    """Mallory puts her key into Alice's hello, and signs Alice's READY anew, with all she could know.

    She is given even the commitment. Both RSA keys are in th, so Bob's AES key is not the one of Alice's.
    """
    bob, alice = Offer.make(BOB, keys.bob, GROUP), Offer.make(ALICE, keys.alice, GROUP)
    swapped = Hello(None, alice.hello.nonce, alice.hello.public_value, chat.public_der(keys.mallory))
    key, z, th = alice.agree(bob.payload)
    hers = Sealer(ALICE, keys.alice, z, th)
    record = hers.seal(READY, b"", Opener(BOB, key, z, th))
    key, z, th = bob.agree(swapped.encode())
    assert key == keys.mallory.public_key()
    his, opener = Sealer(BOB, keys.bob, z, th), Opener(ALICE, key, z, th)
    signed = opener._hash(record[:-256])
    with pytest.raises(ProtocolError, match="authentication tag"):
        opener.open(record[:-256] + chat.sign(keys.mallory, signed), his)


@contextlib.contextmanager
def order_of(monkeypatch: pytest.MonkeyPatch, **watched: tuple[Any, str]) -> Iterator[list[str]]:
    """Note when these functions are called, by their names here."""
    calls: list[str] = []

    def noting(name: str, function: Any) -> Any:
        def noted(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return function(*arguments, **options)

        return noted

    with monkeypatch.context() as patch:
        for name, (owner, attribute) in watched.items():
            patch.setattr(owner, attribute, noting(name, getattr(owner, attribute)))
        yield calls


def test_nothing_is_signed_before_the_other_key_is_acceptable_and_by_bob_before_alice_has_proven_hers(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = {"group": (KeyStore, "accept_group"), "trust": (PinnedPeer, "check"), "sign": (chat, "sign")}
    with order_of(monkeypatch, open=(Opener, "open"), **watched) as calls:
        near, far = loopback()
        with near, far:
            meet(far, near, keys, tmp_path)
    assert calls == [*("group", "trust", "sign"), *("trust", "open", "sign"), "open"]  # Alice, Bob, Alice


@pytest.mark.parametrize("role", Role)
def test_nothing_is_signed_for_a_key_that_contradicts(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: Role
) -> None:
    """Who refuses signs nothing. Bob has then sent his hello, and Alice nothing at all."""
    victim = tmp_path / role.value
    store = store_with_group(victim)
    PinnedPeer(store, "alice" if role is BOB else "[bob]:65432").pin(keys.mallory)
    signers: list[chat.RsaKey] = []
    sign = chat.sign
    monkeypatch.setattr(chat, "sign", lambda key, *rest: (signers.append(key), sign(key, *rest))[1])
    near, far = loopback()
    with near, far:
        met = meet(far, near, keys, tmp_path)
    assert signers == ([keys.alice] if role is BOB else [])
    error = met[role]
    assert isinstance(error, TrustError)
    presented = chat.fingerprint(getattr(keys, role.peer.value))
    assert (error.presented, error.expected) == (presented, (chat.fingerprint(keys.mallory),))
    assert isinstance(met[role.peer], ConnectionCut)


# -------------------------------------------------------------------------------------------- the group


def alice_meets(hello: bytes, keys: Keys, store: KeyStore) -> None:
    """Alice's handshake with somebody who sends this hello, and is gone."""
    near, far = loopback()
    with near, far:
        far.sendall(chat.frame(hello))
        far.shutdown(socket.SHUT_WR)
        chat.alice_handshake(FrameSocket(near), keys.alice, store, PinnedPeer(store, "[bob]:65432"))


def test_a_group_is_tested_with_64_rounds_and_remembered_as_soon_as_it_passed(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the handshake fails then: a slow machine would otherwise fail at every try."""
    rounds: list[int] = []
    monkeypatch.setattr(chat, "miller_rabin_test", lambda _, n: not rounds.append(n))
    store = KeyStore(tmp_path)
    hello = Offer.make(BOB, keys.bob, OTHER_GROUP).hello
    bad = Hello(OTHER_GROUP, hello.nonce, bytes(256), hello.rsa).encode()
    with pytest.raises(ProtocolError, match="not in the subgroup"):
        alice_meets(bad, keys, store)
    assert rounds == [64]
    assert store.read(KeyStore.GROUP) == OTHER_GROUP.export()
    for payload in (bad, hello.encode()):
        with pytest.raises((ProtocolError, ConnectionCut)):
            alice_meets(payload, keys, store)
    assert rounds == [64]


def test_a_group_that_failed_is_not_remembered(keys: Keys, tmp_path: Path) -> None:
    store = store_with_group(tmp_path)
    hello = Offer.make(BOB, keys.bob, GROUP).hello
    for group in (Group(GROUP.p - 8, 2), Group(GROUP.p, GROUP.p - 2), Group(GROUP.p, 1)):
        with pytest.raises(ProtocolError, match=r"safe prime|does not generate"):
            alice_meets(Hello(group, hello.nonce, hello.public_value, hello.rsa).encode(), keys, store)
        assert store.read(KeyStore.GROUP) == GROUP.export()


def test_a_group_that_passed_is_tested_anew_when_p_or_g_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[int] = []
    monkeypatch.setattr(chat, "miller_rabin_test", lambda _, n: not rounds.append(n))
    store = KeyStore(tmp_path)
    for group, tested in ((GROUP, 1), (GROUP, 1), (Group(GROUP.p, 4), 2), (OTHER_GROUP, 3), (GROUP, 4)):
        store.accept_group(group)
        assert rounds == [64] * tested
        assert store.read(KeyStore.GROUP) == group.export()


# ------------------------------------------------------------------------------------------------ busy


def test_busy_is_told_in_one_write(keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """READY and CLOSE come together, so that Alice knows before she is told to speak."""
    near, far = loopback()
    sent: list[int] = []
    send = FrameSocket.send

    def spy(frames: FrameSocket, *payloads: bytes) -> None:
        if frames.socket is far:
            sent.append(len(payloads))
        send(frames, *payloads)

    monkeypatch.setattr(FrameSocket, "send", spy)
    asked: list[Any] = []

    def refusal(key: chat.RsaKey, trust: chat.Trust) -> str:
        asked.append((key, trust.known))
        return "I am talking to somebody else"

    store = store_with_group(tmp_path / "alice")
    peer = PinnedPeer(KeyStore(tmp_path / "bob"), "alice")
    with near, far:
        bob = Background(
            lambda: chat.bob_handshake(FrameSocket(far), keys.bob, GROUP, peer, refusal, evidence=True)
        )
        alice = chat.alice_handshake(
            FrameSocket(near), keys.alice, store, PinnedPeer(store, "[bob]:65432"), evidence=True
        )
        near.settimeout(DEADLINE)
        message = alice.receive()
        assert (message.type, message.text) == (CLOSE, "I am talking to somebody else")
        assert not message.crossed
        assert alice.texts == 0
        alice.close()
        assert bob.result() is None
    assert sent == [1, 2]
    assert asked == [(keys.alice.public_key(), False)]


# ------------------------------------------------------------------------------------- what must not be kept


def reachable(thing: object) -> Iterator[object]:
    """Everything that an object holds, directly or not, but for modules, classes and functions."""
    seen: dict[int, object] = {}
    todo = [thing]
    while todo:
        held = todo.pop()
        if id(held) in seen or isinstance(held, type):
            continue
        seen[id(held)] = held
        yield held
        if isinstance(held, dict):
            todo += [*held.keys(), *held.values()]
        elif isinstance(held, (list, tuple, set, frozenset)):
            todo += held
        elif hasattr(held, "__dict__"):
            todo.append(vars(held))


def secrets_of(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[bytes]]:
    """Take note of Z, of each direction's keys, of both exponents, and of r, as they are made."""
    made: dict[str, set[bytes]] = {name: set() for name in ("z", "key", "commitment", "exponent", "r")}
    derive, offer = chat.derive_keys, Offer.make

    def derive_and_note(z: bytes, direction: bytes, th: bytes) -> tuple[bytes, bytes]:
        key, commitment = derive(z, direction, th)
        made["z"].add(z)
        made["key"].add(key)
        made["commitment"].add(commitment)
        return key, commitment

    def offer_and_note(*arguments: Any) -> Offer:
        new = offer(*arguments)
        made["exponent"].add(new.exponent)
        made["r"] |= {new.r} - {b""}
        return new

    monkeypatch.setattr(chat, "derive_keys", derive_and_note)
    monkeypatch.setattr(Offer, "make", offer_and_note)
    return made


@pytest.mark.parametrize("evidence", [False, True], ids=["without evidence", "with evidence"])
def test_z_and_the_exponents_are_gone_after_the_handshake(
    connect: Callable[..., Ends], monkeypatch: pytest.MonkeyPatch, evidence: bool
) -> None:
    """With evidence, Z is in the beginning of the transcript, and nowhere else."""
    made = secrets_of(monkeypatch)
    ends = connect(evidence=evidence)
    (z,) = made["z"]
    assert len(made["exponent"]) == 2
    for channel in ends:
        assert [entry[:1] for entry in channel.beginning] == [b"b", b"a", b"z", b"A", b"B"][: 5 * evidence]
        held = [thing for thing in reachable(channel) if isinstance(thing, (bytes, bytearray))]
        assert made["key"] <= set(map(bytes, held)), "what is held would be found"
        for thing in held:
            assert not any(exponent in thing for exponent in made["exponent"])
            assert z not in thing or (evidence and thing == b"z" + z)


def test_no_secret_in_any_representation(
    keys: Keys, connect: Callable[..., Ends], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = secrets_of(monkeypatch)
    ends = connect()
    offer = Offer.make(BOB, keys.bob, GROUP)
    secrets = set().union(*made.values())
    assert len(secrets) == 1 + 2 + 2 + 3 + 2
    bob = ends.bob
    for thing in (offer, bob, bob._sealer, bob._opener, bob.frames, bob.trust):
        for text in (repr(thing), str(thing), f"{[thing]}"):
            assert str(keys.bob.d) not in text
            for secret in secrets:
                assert repr(secret)[2:20] not in text
                assert secret.hex()[:16] not in text


def test_what_is_traced(
    keys: Keys,
    connect: Callable[..., Ends],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Every value that is on the wire, the plaintexts of records, and no key, exponent, Z or C."""
    made = secrets_of(monkeypatch)
    caplog.set_level("DEBUG", "secure_chat")
    ends = connect()
    ends.alice.send(REQUEST)
    ends.bob.receive()
    ends.bob.send(REPLY)
    ends.alice.receive()
    traced = [value for record in caplog.records for value in record.values.values()]
    seen = {bytes(value) for value in traced if isinstance(value, (bytes, bytearray, memoryview))}
    hidden = made["z"] | made["key"] | made["commitment"] | made["exponent"]
    assert len(hidden) == 1 + 2 + 2 + 2
    everything = b"\0".join(seen) + repr(traced).encode() + caplog.text.encode()
    for secret in hidden:
        assert secret not in everything
        assert secret.hex().encode() not in everything
        assert repr(secret)[2:20].encode() not in everything
    for secret_number in (keys.bob.d, keys.alice.d, keys.bob.p, keys.alice.p):
        assert int(secret_number) not in [value for value in traced if isinstance(value, int)]
    for text in (REQUEST, REPLY):
        padded = [value for value in seen if text.encode() in value]
        assert [len(value) for value in padded] == [256], "sealed and opened, it is the same"
        assert sum(bytes(value) == padded[0] for value in traced if not isinstance(value, (int, str))) == 2
    (r,) = made["r"]
    assert [value[33:65] for value in seen if r in value] == [r], "in Bob's READY alone"
    assert {GROUP.p, GROUP.g} <= {value for value in traced if isinstance(value, int)}
    for channel in ends:
        assert {channel._sealer.latest, channel._opener.latest} <= seen


# ------------------------------------------------------------------------------------------- deadlines


def handshake(role: Role, connected: socket.socket, keys: Keys, folder: Path) -> object:
    store = store_with_group(folder)
    if role is BOB:
        return chat.bob_handshake(FrameSocket(connected), keys.bob, GROUP, PinnedPeer(store, "alice"))
    peer = PinnedPeer(store, "[bob]:65432")
    return chat.alice_handshake(FrameSocket(connected), keys.alice, store, peer)


@pytest.mark.parametrize("role", Role)
def test_the_handshake_has_one_deadline(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: Role
) -> None:
    """A peer that sends a byte from time to time has no more time than one that sends nothing."""
    monkeypatch.setattr(chat, "HANDSHAKE_SECONDS", 0.3)
    near, far = loopback()
    with near, far:
        shaking = Background(lambda: handshake(role, near, keys, tmp_path))
        began = time.monotonic()
        with contextlib.suppress(OSError):
            far.sendall((8192).to_bytes(4, "big"))
            while time.monotonic() - began < DEADLINE:
                far.sendall(b"x")
                far.settimeout(0.01)
                with contextlib.suppress(socket.timeout):
                    if not far.recv(9000):
                        break
                if not shaking._thread.is_alive():
                    break
        with pytest.raises(ConnectionCut, match="did not answer in time"):
            shaking.result()
        assert time.monotonic() - began < DEADLINE / 2


def test_alice_waits_for_bobs_first_byte_and_no_longer(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """He may still be searching for parameters; the ten seconds begin with his first byte."""
    monkeypatch.setattr(chat, "FIRST_BYTE_SECONDS", 0.2)
    near, far = loopback()
    with near, far, pytest.raises(ConnectionCut, match="did not answer in time"):
        handshake(ALICE, near, keys, tmp_path)
    monkeypatch.setattr(chat, "FIRST_BYTE_SECONDS", DEADLINE)
    monkeypatch.setattr(chat, "HANDSHAKE_SECONDS", 0.0)
    near, far = loopback()
    with near, far:
        far.sendall(b"\0")
        with pytest.raises(ConnectionCut, match="did not answer in time"):
            handshake(ALICE, near, keys, tmp_path)


def test_after_the_handshake_there_is_no_deadline(ends: Ends) -> None:
    assert [channel.frames.deadline for channel in ends] == [None, None]
    ends.alice.send(REQUEST)
    ends.bob.receive()
    assert ends.bob.frames.socket.gettimeout() == chat.STALL_SECONDS  # of the frame that had begun


def test_a_frame_that_has_begun_may_not_stall(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "STALL_SECONDS", 0.2)
    for data in (b"\0", b"\0\0\2", b"\0\0\2\x1c" + bytes(100)):
        near, far = loopback()
        with near, far:
            far.sendall(data)
            waits = Background(functools.partial(FrameSocket(near).receive, 1000))
            with pytest.raises(ConnectionCut, match="did not answer in time"):
                waits.result()


def test_a_send_may_not_stall_and_nothing_follows_it(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other side reads nothing: part of the record is on its way, and so no goodbye can follow."""
    monkeypatch.setattr(chat, "STALL_SECONDS", 0.2)
    ends.alice.frames.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    ends.bob.frames.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

    def send() -> None:
        for _ in range(100):
            ends.alice.send("x" * chat.TEXT_LIMIT)
            ends.alice._opener.number += 1  # as if Bob had replied

    with pytest.raises(ConnectionCut, match="did not answer in time"):
        Background(send).result()
    assert ends.alice._sealer.closed
    assert ends.alice._sealer.number < 100
    ends.alice.close(wait=0)
    received = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while piece := ends.bob.frames.socket.recv(1 << 20):
            received += piece
    length = 4 + 12 + (chat.TEXT_LIMIT // 256 + 1) * 256 + 16 + 256
    assert len(received) < (ends.alice._sealer.number) * length, "half a record, and nothing after it"


# ---------------------------------------------------------------------------------------- the channel


def test_a_conversation_its_turns_and_its_goodbye(ends: Ends) -> None:
    assert (ends.alice.my_turn, ends.bob.my_turn) == (True, False)
    for n in range(3):
        ends.alice.send(f"{REQUEST} {n}")
        assert (ends.alice.my_turn, ends.bob.my_turn) == (False, False)
        message = ends.bob.receive()
        assert (message.type, message.text, message.crossed) == (TEXT, f"{REQUEST} {n}", False)
        assert ends.bob.my_turn
        assert not ends.alice.has_something
        ends.bob.send(f"{REPLY} {n}")
        assert ends.alice.receive().text == f"{REPLY} {n}"
    leaving = Background(lambda: ends.bob.close("it is late"))
    message = ends.alice.receive()
    assert (message.type, message.text, message.crossed) == (CLOSE, "it is late", False)
    assert ends.alice.texts == 6
    ends.alice.close()
    leaving.result()


UNFIT = {
    "too long": ("x" * (chat.TEXT_LIMIT - 1) + "\xe9", "longer than 1048576 bytes"),
    "a surrogate": ("\ud800", "the text is not valid Unicode"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_an_unfit_text_is_refused_at_home_and_the_chat_goes_on(ends: Ends, name: str) -> None:
    text, reason = UNFIT[name]
    with pytest.raises(chat.MessageError, match=reason):
        ends.alice.send(text)
    ends.alice.send(REQUEST)
    assert ends.bob.receive().text == REQUEST


@pytest.mark.parametrize("leaver", Role)
def test_nothing_is_sent_after_the_peers_goodbye(ends: Ends, leaver: Role) -> None:
    """Not even one's own goodbye, though it would be one's turn."""
    leaving, staying = (ends.alice, ends.bob) if leaver is ALICE else (ends.bob, ends.alice)
    if leaver is BOB:
        ends.alice.send(REQUEST)
        ends.bob.receive()
    left = Background(leaving.close)
    assert staying.receive().type is CLOSE
    with pytest.raises(ValueError, match="this direction is closed"):
        staying._sealer.seal(CLOSE, b"", staying._opener, staying._send)
    staying.close()
    left.result()


def test_a_goodbye_that_crossed_is_told(ends: Ends) -> None:
    ends.alice.send(REQUEST)
    left = Background(ends.bob.close)
    message = ends.alice.receive()
    assert (message.type, message.crossed, ends.alice.texts) == (CLOSE, True, 1)
    ends.alice.close()
    left.result()


@pytest.mark.parametrize("sent", [0, 1, 3, 4, 100, 543])
def test_ctrl_c_in_the_middle_of_a_send_is_a_cut_for_the_other_side(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, sent: int
) -> None:
    """No goodbye follows half a frame: that would be taken for the rest of it."""

    class Interrupted(socket.socket):
        def send(self, data: Any, *_: int) -> int:
            super().sendall(data[:sent])
            raise KeyboardInterrupt

    socket_of_alice = ends.alice.frames.socket
    ends.alice.frames.socket = Interrupted(fileno=socket_of_alice.detach())
    with pytest.raises(KeyboardInterrupt):
        ends.alice.send(REQUEST)
    ends.alice.close(wait=0)
    where = "in the middle of a message" if sent else "without a goodbye"
    with pytest.raises(ConnectionCut, match=where):
        ends.bob.receive()


def test_ctrl_c_in_the_middle_of_a_receive_leaves_a_goodbye_possible(ends: Ends) -> None:
    class Interrupted(socket.socket):
        def recv_into(self, buffer: Any, *_: int) -> int:
            super().recv_into(buffer[:100])
            raise KeyboardInterrupt

    ends.alice.send(REQUEST)
    ends.bob.frames.socket = Interrupted(fileno=ends.bob.frames.socket.detach())
    with pytest.raises(KeyboardInterrupt):
        ends.bob.receive()
    left = Background(lambda: ends.bob.close("interrupted"))
    message = ends.alice.receive()
    assert (message.type, message.text, message.crossed) == (CLOSE, "interrupted", True)
    ends.alice.close()
    left.result()


def test_leaving_takes_no_longer_than_it_may(ends: Ends) -> None:
    """Bob neither reads nor hangs up. What was sent arrives all the same."""
    began = time.monotonic()
    ends.alice.close(wait=0.2)
    assert 0.2 <= time.monotonic() - began < DEADLINE / 2
    assert ends.bob.receive().type is CLOSE


def test_unread_bytes_do_not_destroy_a_goodbye(ends: Ends) -> None:
    """A socket that is closed with unread bytes is reset, and the peer loses what it has not read yet."""
    ends.alice.send("x" * 100_000)
    ends.bob._opener.number += 1  # Bob leaves without reading it
    left = Background(lambda: ends.bob.close("not now"))
    assert ends.alice.frames.receive(chat.RECORD_LIMIT)[-256:]
    ends.alice.frames.hang_up()
    left.result()


def test_a_line_that_is_gone_is_a_cut(ends: Ends) -> None:
    ends.bob.frames.abort()
    with pytest.raises(ConnectionCut, match="without a goodbye"):
        ends.alice.receive()
    with pytest.raises(ConnectionCut, match="the connection"):
        for _ in range(100):
            ends.alice.send("x" * chat.TEXT_LIMIT)
            ends.alice._opener.number += 1
    ends.alice.close()
    ends.alice.frames.abort()


def test_a_line_is_watched_while_it_is_idle(ends: Ends) -> None:
    for channel in ends:
        connected = channel.frames.socket
        assert connected.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        for option, value in chat.TCP_OPTIONS.items():
            if hasattr(socket, option):
                assert connected.getsockopt(socket.IPPROTO_TCP, getattr(socket, option)) in (
                    value,
                    int(value > 0),
                )
