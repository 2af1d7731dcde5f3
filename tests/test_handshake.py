"""From two hellos to a channel: fresh values, nothing signed too soon, one deadline, and the same words.

And the channel: what interrupts it, how it ends, and what it must not keep.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import random
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any, Callable, NamedTuple, Union
from unittest import mock

import pytest
from conftest import GROUP, Background, Ends, Keys, loopback, shake_hands, store_with_group
from vectors import make

import alice_client
import bob_server
import crypto_utils as chat
from crypto_utils import (
    NOTHING,
    Channel,
    ConnectionCut,
    FrameSocket,
    Group,
    Hello,
    KeyStore,
    NoConversation,
    Opener,
    PinnedPeer,
    ProtocolError,
    RecordType,
    Role,
    Sealer,
    Transcript,
    TrustError,
)

BOB, ALICE = Role
READY, TEXT, CLOSE = RecordType
REQUEST, REPLY = "the request, which nobody else may read", "the reply, which nobody else may read"
OTHER_GROUP = make.safe_prime(2048, 290893)


def number(value: int, length: int = 256) -> bytes:
    return value.to_bytes(length, "big")


def drawing(*values: bytes) -> Callable[[int], bytes]:
    """Return what draws these, one after the other."""
    left = list(values)
    return lambda _: left.pop(0)


class Offer(NamedTuple):
    """What make_hello returns."""

    hello: Hello
    exponent: bytes
    r: bytes


def offer_of(role: Role, keys: Keys, *values: bytes) -> Offer:
    """An offer in GROUP; `values` are the exponent, and r or Alice's nonce."""
    with mock.patch("secrets.token_bytes", drawing(*values) if values else secrets.token_bytes):
        return Offer(*chat.make_hello(role, getattr(keys, role.value), GROUP))


def shake(
    role: Role,
    connected: Any,
    keys: Keys,
    folder: Path,
    *,
    place: Any = None,
    transcript: Transcript | None = None,
    **told: Any,
) -> Channel:
    """One side's handshake over a socket. `told` is what its PinnedPeer is told."""
    frames, store = FrameSocket(connected), store_with_group(folder / role.value)
    transcript = transcript or Transcript()
    peer = PinnedPeer(store, "alice" if role is BOB else "[bob]:65432", **told)
    if role is ALICE:
        return alice_client.handshake(frames, keys.alice, peer, transcript)
    return bob_server.handshake(frames, keys.bob, GROUP, peer, place or Lock(), transcript)


Met = dict[Role, Union[Channel, Exception]]


@pytest.fixture
def meet(keys: Keys, tmp_path: Path) -> Iterator[Callable[..., Met]]:
    """Return a function that lets both shake hands, and returns what came of it. Whoever fails hangs up."""
    with contextlib.ExitStack() as stack:

        def run(
            near: socket.socket | None = None, far: socket.socket | None = None, **options: dict[str, Any]
        ) -> Met:
            if near is None or far is None:
                near, far = loopback()
            ends = {BOB: stack.enter_context(far), ALICE: stack.enter_context(near)}

            def side(role: Role) -> Channel | Exception:
                try:
                    return shake(role, ends[role], keys, tmp_path, **options.get(role.value, {}))
                except chat.ChatError as error:
                    ends[role].close()
                    return error

            bobs = Background(lambda: side(BOB))
            return {ALICE: side(ALICE), BOB: bobs.result()}

        yield run


def met_with(role: Role, hello: bytes, keys: Keys, folder: Path) -> None:
    """One side's handshake with somebody who sends this hello, and is gone."""
    near, far = loopback()
    with near, far:
        far.sendall(chat.frame(hello))
        far.shutdown(socket.SHUT_WR)
        shake(role, near, keys, folder)


# ------------------------------------------------------------------------------------- byte by byte


@pytest.fixture
def connect(keys: Keys, tmp_path: Path) -> Iterator[Callable[..., Ends]]:
    """Return a function that makes a pair of channels, as `ends` is; all are closed with the test."""
    made: list[Ends] = []

    def run(folder: Path | None = None) -> Ends:
        stores = KeyStore(tmp_path / "bob"), store_with_group(tmp_path / "alice")
        made.append(shake_hands(*stores, keys, folder))
        return made[-1]

    yield run
    for channel in (channel for ends in made for channel in ends):
        channel.frames.socket.close()
        if channel.transcript._file:
            channel.transcript._file.close()


# --------------------------------------------------------------------------------------- fresh values


def test_every_session_has_fresh_values(keys: Keys) -> None:
    """So that nobody can replay a session, and stolen RSA keys open no recording."""
    offers = [offer_of(role, keys) for role in Role for _ in range(8)]
    for values in (
        {offer.exponent for offer in offers},
        {offer.hello.nonce for offer in offers},
        {offer.hello.public_value for offer in offers},
    ):
        assert len(values) == 16
    assert len({offer.r for offer in offers if offer.hello.sender is BOB}) == 8


def test_no_secret_comes_from_a_generator_that_can_be_seeded(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exponent, r and nonce are what the operating system draws for them, all bits of it and unchanged.

    So they hold as much chance as they have bits, and depend on nothing that anybody sees.
    """
    drawn: list[bytes] = []
    urandom = random._urandom  # of which secrets.token_bytes takes all that it returns
    monkeypatch.setattr(random, "_urandom", lambda length: drawn.append(urandom(length)) or drawn[-1])
    for role in Role:
        offer = offer_of(role, keys)
        assert drawn == [offer.exponent, offer.r or offer.hello.nonce]
        assert list(map(len, drawn)) == [32, 32]
        drawn.clear()
    monkeypatch.undo()
    salted = set()
    for _ in range(2):
        random.seed(1)
        sealer, opener = Sealer(ALICE, keys.alice, NOTHING, NOTHING), Opener(BOB, keys.bob, NOTHING, NOTHING)
        salted.add(sealer.seal(READY, b"", opener)[-256:])
    assert len(salted) == 2


# ----------------------------------------------------------------------------------- words and commitment


def words_of(th: bytes, r: bytes) -> list[str]:
    """The words of these two, had Bob committed to that r."""
    return chat.make_words(th, chat.commit(r), r)


@pytest.mark.parametrize("changed", ["nonce_A", "r"])
def test_with_somebody_in_between_the_words_differ(keys: Keys, changed: str) -> None:
    """Two sessions that agree in all but one value have no words in common."""
    bob = offer_of(BOB, keys, b"b" * 32, b"r" * 32)
    shown = []
    for value in (b"1" * 32, b"2" * 32):
        hers = offer_of(ALICE, keys, b"a" * 32, value if changed == "nonce_A" else b"n" * 32)
        _, th = chat.settle(bob.hello, hers.hello)
        shown.append(words_of(th, value if changed == "r" else bob.r))
    assert all(one != two for one, two in zip(*shown))


def hash_of(bob: Hello, alice: Hello) -> bytes:
    """The transcript hash, of hellos that nobody has checked."""
    return hashlib.sha256(chat.frame(bob.encode()) + chat.frame(alice.encode())).digest()


class Grinding:
    """Mallory in the middle, with a session on each side. She wants one word to be the same on both screens.

    A word is 11 bits, so it takes her 2,048 tries on average; two take 2^22, which are seconds. She gives up
    after 60,000 tries, before which she would have found a word but for a chance of 2^-42.
    """

    TRIES = 60_000

    def __init__(self, keys: Keys, seed: int) -> None:
        self.random = random.Random(seed)
        with mock.patch("secrets.token_bytes", self.random.randbytes):
            self.bob = Offer(*chat.make_hello(BOB, keys.bob, GROUP))  # what Bob offers, to Mallory
            self.alice = Offer(*chat.make_hello(ALICE, keys.alice, GROUP))  # what Alice offers, to Mallory
            self.to_bob = Offer(*chat.make_hello(ALICE, keys.mallory, GROUP))
            self.to_alice = Offer(*chat.make_hello(BOB, keys.mallory, GROUP))
        self.at_alice = words_of(self.th_at_alice, self.to_alice.r)[0]

    @property
    def th_at_alice(self) -> bytes:
        return hash_of(self.to_alice.hello, self.alice.hello)

    def search(self, word: str, words_of: Callable[[bytes], list[str]]) -> tuple[bytes, int]:
        """Return a value of hers that makes this word the first, and how many tries it took."""
        for tries in range(1, self.TRIES):
            value = self.random.randbytes(32)
            if words_of(value)[0] == word:
                return value, tries
        pytest.fail("no word was found")

    def words_at_bob(self, nonce: bytes, r: bytes) -> list[str]:
        """The words on Bob's screen, if she sends that nonce and his r is this one."""
        hello = self.to_bob.hello._replace(nonce=nonce)
        return words_of(hash_of(self.bob.hello, hello), r)

    def search_with_r(self, r: bytes) -> tuple[bytes, int]:
        """The nonce for Bob that gives the word on Alice's screen, if Bob's r is this one."""
        return self.search(self.at_alice, lambda nonce: self.words_at_bob(nonce, r))


def test_before_bobs_ready_no_number_of_tries_helps_towards_bob(keys: Keys) -> None:
    """She does not know r, and what she finds for any other r is right for that one alone."""
    equal = 0
    for seed in range(3):
        mallory = Grinding(keys, seed)
        nonce, _ = mallory.search_with_r(mallory.random.randbytes(32))
        equal += mallory.words_at_bob(nonce, mallory.bob.r)[0] == mallory.at_alice
    assert equal == 0  # each is equal by chance once in 2,048


def test_towards_alice_she_has_one_r_to_show(keys: Keys) -> None:
    """She speaks last to Alice, and so she could choose r by its words, had she not committed to it."""
    mallory = Grinding(keys, 3)
    wanted = mallory.words_at_bob(mallory.to_bob.hello.nonce, mallory.bob.r)[0]
    assert wanted != mallory.at_alice
    r, _ = mallory.search(wanted, lambda r: words_of(mallory.th_at_alice, r))
    _, th = chat.settle(mallory.to_alice.hello, mallory.alice.hello)
    assert th == mallory.th_at_alice
    with pytest.raises(ProtocolError, match="r does not fit"):
        chat.make_words(th, mallory.to_alice.hello.nonce, r)


def test_alice_has_no_channel_with_an_r_that_does_not_fit(
    meet: Callable[..., Met], monkeypatch: pytest.MonkeyPatch
) -> None:
    """She refuses before there are words to show; Bob finds the line cut."""
    seal = Sealer.seal

    def seal_another_r(sealer: Sealer, kind: RecordType, body: bytes, *rest: Any) -> bytes:
        return seal(sealer, kind, body and b"another r".ljust(32), *rest)

    monkeypatch.setattr(Sealer, "seal", seal_another_r)
    met = meet()
    assert isinstance(met[ALICE], ProtocolError)
    assert "r does not fit" in str(met[ALICE])
    assert isinstance(met[BOB], Channel)


# -------------------------------------------------------------------------------- what happens before what


@pytest.mark.parametrize("role", Role)
def test_public_values_are_checked_before_a_secret_exponent_meets_them(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: Role
) -> None:
    """Each side raises its own g to its exponent, and then nothing any more."""
    genuine = offer_of(role.peer, keys).hello
    bases: list[int] = []
    modexp = chat.modexp
    monkeypatch.setattr(chat, "modexp", lambda base, *rest: (bases.append(base), modexp(base, *rest))[1])
    for y in (0, 1, GROUP.p - 1, GROUP.p, GROUP.p - 4):
        with pytest.raises(ProtocolError, match="not in the subgroup"):
            met_with(role, genuine._replace(public_value=number(y)).encode(), keys, tmp_path)
    with pytest.raises(ProtocolError, match="not as long as p"):
        met_with(role, genuine._replace(public_value=b"\2").encode(), keys, tmp_path)
    assert bases == [GROUP.g] * 6


def test_misbinding_bob_does_not_take_alices_words_for_mallorys(keys: Keys) -> None:
    """Mallory puts her key into Alice's hello, and signs Alice's READY anew, with all she could know.

    She is given even the commitment. Both RSA keys are in th, so Bob's AES key is not the one of Alice's.
    """
    bob, alice = offer_of(BOB, keys), offer_of(ALICE, keys)
    swapped = alice.hello._replace(rsa=keys.mallory.public_key().export_key("DER"))
    known, th_at_alice = chat.settle(bob.hello, alice.hello)
    shown, th_at_bob = chat.settle(bob.hello, swapped)
    z = chat.shared_secret(bob.exponent, swapped)
    assert z == chat.shared_secret(alice.exponent, bob.hello)
    record = Sealer(ALICE, keys.alice, z, th_at_alice).seal(
        READY, b"", Opener(BOB, known[BOB], z, th_at_alice)
    )
    assert shown[ALICE] == keys.mallory.public_key()
    opener = Opener(ALICE, shown[ALICE], z, th_at_bob)
    signed = opener._hash(record[:-256])
    with pytest.raises(ProtocolError, match="authentication tag"):
        opener.open(record[:-256] + chat.sign(keys.mallory, signed), Sealer(BOB, keys.bob, z, th_at_bob))


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


class Place:
    """Bob's one place, as a lock has it; it notes when it is asked for."""

    def __init__(self, calls: list[str]) -> None:
        self._calls, self._lock = calls, Lock()

    def acquire(self, blocking: bool) -> bool:
        self._calls.append("place")
        return self._lock.acquire(blocking)

    def release(self) -> None:
        self._lock.release()


def test_nothing_is_signed_before_the_other_key_is_acceptable_and_by_bob_before_alice_has_proven_hers(
    meet: Callable[..., Met], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And Bob gives the one place away only then: before, anybody could keep him busy."""
    watched = {"group": (KeyStore, "accept_group"), "trust": (PinnedPeer, "check"), "sign": (chat, "sign")}
    with order_of(monkeypatch, open=(Opener, "open"), **watched) as calls:
        meet(bob={"place": Place(calls)})
    alice, bob = ["group", "trust", "sign"], ["trust", "open", "place", "sign"]
    assert calls == [*alice, *bob, "open"]


@pytest.mark.parametrize("role", Role)
def test_nothing_is_signed_for_a_new_key_with_nobody_to_ask(
    meet: Callable[..., Met], keys: Keys, monkeypatch: pytest.MonkeyPatch, role: Role
) -> None:
    """Bob has then sent his hello, and Alice nothing at all."""
    signers: list[chat.RsaKey] = []
    sign = chat.sign
    monkeypatch.setattr(chat, "sign", lambda key, *rest: (signers.append(key), sign(key, *rest))[1])
    met = meet(**{role.value: {"can_ask": False}})
    assert signers == ([keys.alice] if role is BOB else [])
    error = met[role]
    assert isinstance(error, TrustError)
    assert "is new, and there is no terminal to ask at" in str(error)
    assert error.presented == chat.fingerprint(getattr(keys, role.peer.value))
    assert isinstance(met[role.peer], ConnectionCut)


# -------------------------------------------------------------------------------------------- the group


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rounds each test of a q had. Each passes."""
    asked: list[int] = []
    monkeypatch.setattr(chat, "miller_rabin_test", lambda _, n: not asked.append(n))
    return asked


def test_a_group_is_tested_with_64_rounds_and_remembered_as_soon_as_it_passed(
    keys: Keys, tmp_path: Path, rounds: list[int]
) -> None:
    """Even if the handshake fails then: a slow machine would otherwise fail at every try."""
    hello, _, _ = chat.make_hello(BOB, keys.bob, OTHER_GROUP)
    bad = hello._replace(public_value=bytes(256))
    store = store_with_group(tmp_path / "alice")
    with pytest.raises(ProtocolError, match="not in the subgroup"):
        met_with(ALICE, bad.encode(), keys, tmp_path)
    assert rounds == [64]
    assert store.read(KeyStore.GROUP) == OTHER_GROUP.export()
    for again in (bad, hello):
        with pytest.raises((ProtocolError, ConnectionCut)):
            met_with(ALICE, again.encode(), keys, tmp_path)
    assert rounds == [64]


def test_a_group_that_failed_is_not_remembered(keys: Keys, tmp_path: Path) -> None:
    store = store_with_group(tmp_path / "alice")
    hello = offer_of(BOB, keys).hello
    for group in (Group(GROUP.p - 8, 2), Group(GROUP.p, GROUP.p - 2), Group(GROUP.p, 1)):
        with pytest.raises(ProtocolError, match=r"safe prime|does not generate"):
            met_with(ALICE, hello._replace(group=group).encode(), keys, tmp_path)
        assert store.read(KeyStore.GROUP) == GROUP.export()


def test_a_group_that_passed_is_tested_anew_when_p_or_g_changes(tmp_path: Path, rounds: list[int]) -> None:
    store = KeyStore(tmp_path)
    for group, tested in ((GROUP, 1), (GROUP, 1), (Group(GROUP.p, 4), 2), (OTHER_GROUP, 3), (GROUP, 4)):
        store.accept_group(group)
        assert rounds == [64] * tested
        assert store.read(KeyStore.GROUP) == group.export()


# ------------------------------------------------------------------------------------------------ busy


@pytest.mark.parametrize("whoever", ["Bob", "whoever answered"])
def test_a_busy_bob_says_so_in_the_place_of_ready(
    meet: Callable[..., Met], keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whoever: str
) -> None:
    """Alice pins nothing and keeps nothing, and there is nothing to ask her; r does not leave Bob."""
    place, kept = Lock(), Transcript(tmp_path)
    place.acquire()
    told = {"only": chat.fingerprint(keys.bob)} if whoever == "Bob" else {}
    sealed: list[tuple[Role, RecordType]] = []
    seal = Sealer.seal

    def noted(sealer: Sealer, record_type: RecordType, *rest: Any) -> bytes:
        sealed.append((sealer.sender, record_type))
        return seal(sealer, record_type, *rest)

    monkeypatch.setattr(Sealer, "seal", noted)
    met = meet(bob={"place": place, "transcript": kept}, alice={"transcript": kept, **told})
    assert isinstance(met[BOB], NoConversation)
    assert isinstance(met[ALICE], NoConversation)
    assert str(met[ALICE]) == f"{whoever} cannot talk now; try again later"
    assert met[ALICE].status == 1
    assert sealed == [(ALICE, READY), (BOB, CLOSE)]
    assert kept._file.getvalue() == b""
    assert not list(tmp_path.rglob("known_peers"))
    assert place.locked()


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
        elif isinstance(held, io.BytesIO):
            todo.append(held.getvalue())
        elif hasattr(held, "__dict__"):
            todo.append(vars(held))


def secrets_of(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[bytes]]:
    """Take note of Z, of each direction's keys, of both exponents, and of r, as they are made."""
    made: dict[str, set[bytes]] = {name: set() for name in ("z", "key", "commitment", "exponent", "r")}
    derive, make_hello = chat.derive_keys, chat.make_hello

    def derive_and_note(z: bytes, direction: bytes, th: bytes) -> tuple[bytes, bytes]:
        key, commitment = derive(z, direction, th)
        made["z"].add(z)
        made["key"].add(key)
        made["commitment"].add(commitment)
        return key, commitment

    def make_and_note(*arguments: Any) -> Any:
        hello, exponent, r = make_hello(*arguments)
        made["exponent"].add(exponent)
        made["r"] |= {r} - {b""}
        return hello, exponent, r

    monkeypatch.setattr(chat, "derive_keys", derive_and_note)
    monkeypatch.setattr(chat, "make_hello", make_and_note)
    return made


@pytest.mark.parametrize("evidence", [False, True], ids=["without evidence", "with evidence"])
def test_z_and_the_exponents_are_gone_after_the_handshake(
    connect: Callable[..., Ends], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, evidence: bool
) -> None:
    """With evidence, Z is in the file as soon as there is one, and nowhere in memory any more."""
    made = secrets_of(monkeypatch)
    ends = connect(tmp_path if evidence else None)
    (z,) = made["z"]
    assert len(made["exponent"]) == 2
    kept = [value for value in vars(chat).values() if isinstance(value, (dict, list, set, tuple))]
    for channel in ends:
        held = [bytes(thing) for thing in reachable([channel, kept]) if isinstance(thing, (bytes, bytearray))]
        assert made["key"] <= set(held), "what is held would be found"
        for thing in held:
            assert not any(secret in thing for secret in {z, *made["exponent"]})
        path = channel.transcript.path
        assert (path is not None and z in path.read_bytes()) == evidence


def test_no_secret_in_any_representation(
    keys: Keys, connect: Callable[..., Ends], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = secrets_of(monkeypatch)
    bob, _ = connect()
    secrets = set().union(*made.values())
    assert len(secrets) == 1 + 2 + 2 + 2 + 1
    for thing in (bob, bob.sealer, bob.opener, bob.frames, bob.trust, bob.transcript):
        for text in (repr(thing), str(thing), f"{[thing]}"):
            assert str(keys.bob.d) not in text
            for secret in secrets:
                assert repr(secret)[2:20] not in text
                assert secret.hex()[:16] not in text


# ------------------------------------------------------------------------------------------- deadlines


class Dripping:
    """A socket whose other side sends one byte in each second, and never stops. It keeps the time."""

    def __init__(self, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.sent, self.limits = 1000.0, sent, list[Union[float, None]]()
        monkeypatch.setattr(chat, "time", SimpleNamespace(monotonic=lambda: self.now))

    def setsockopt(self, *_: int) -> None:
        pass

    def settimeout(self, limit: float | None) -> None:
        self.limits.append(limit)

    def send(self, data: bytes) -> int:
        return len(data)

    def recv_into(self, buffer: memoryview) -> int:
        self.now += 1
        buffer[:1], self.sent = self.sent[:1], self.sent[1:] + b"x"
        return 1


@pytest.mark.parametrize("role", Role)
def test_the_handshake_has_one_deadline(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: Role
) -> None:
    """A peer that sends a byte from time to time has no more time than one that sends nothing: 30 s."""
    dripping = Dripping((8192).to_bytes(4, "big"), monkeypatch)
    with pytest.raises(ConnectionCut, match="did not answer in time"):
        shake(role, dripping, keys, tmp_path)
    assert dripping.now == 1030
    assert dripping.limits == [*([30] if role is BOB else []), *range(30, 0, -1)]


def test_who_was_too_slow_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """When Alice has tested a new group, on a small machine, it may be too late to answer."""
    dripping = Dripping(b"", monkeypatch)
    frames = FrameSocket(dripping)
    dripping.now += 31
    with pytest.raises(ConnectionCut, match="this machine was too slow for the handshake"):
        frames.send(b"hello")


def test_after_the_handshake_only_a_frame_that_has_begun_has_a_limit(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [channel.frames.deadline for channel in ends] == [None, None]
    dripping = Dripping(b"\0\0\0\4", monkeypatch)
    frames = FrameSocket(dripping)
    frames.deadline = None
    assert frames.receive(4) == b"xxxx"
    assert dripping.limits == [None, *[chat.PATIENCE] * 7]


def test_a_frame_that_has_begun_may_not_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "PATIENCE", 0.2)
    for data in (b"\0", b"\0\0\2", b"\0\0\2\x1c" + bytes(100)):
        near, far = loopback()
        with near, far:
            far.sendall(data)
            frames = FrameSocket(near)
            frames.deadline = None
            waits = Background(functools.partial(frames.receive, 1000))
            with pytest.raises(ConnectionCut, match="did not answer in time"):
                waits.result()


def test_a_send_may_not_stall_and_nothing_follows_it(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other side reads nothing: part of the record is on its way, and so no goodbye can follow."""
    monkeypatch.setattr(chat, "PATIENCE", 0.2)
    ends.alice.frames.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    ends.bob.frames.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

    def send() -> None:
        for _ in range(100):
            ends.alice.send("x" * chat.TEXT_LIMIT)
            ends.alice.opener.number += 1  # as if Bob had replied

    with pytest.raises(ConnectionCut, match="did not answer in time"):
        Background(send).result()
    assert not ends.alice.close(wait=0)
    received = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while piece := ends.bob.frames.socket.recv(1 << 20):
            received += piece
    length = 4 + 12 + (chat.TEXT_LIMIT // 256 + 1) * 256 + 16 + 256
    assert len(received) < (ends.alice.sealer.number - 1) * length, "half a record, and nothing after it"


# ---------------------------------------------------------------------------------------- the channel


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
        staying.sealer.seal(CLOSE, b"", staying.opener, staying._send)
    staying.close()
    left.result()


class Interrupted(socket.socket):
    """A socket that sends, or receives, so many bytes at the most, and then raises this."""

    @classmethod
    def of(cls, channel: Channel, passed: int, error: type[BaseException] | BaseException) -> None:
        interrupted = channel.frames.socket = cls(fileno=channel.frames.socket.detach())
        interrupted.passed, interrupted.error = passed, error

    def send(self, data: Any, *_: int) -> int:
        super().sendall(data[: self.passed])
        raise self.error

    def recv_into(self, buffer: Any, *_: int) -> int:
        super().recv_into(buffer[: self.passed])
        raise self.error


def test_after_a_send_that_failed_the_goodbye_that_crossed_it_is_told(ends: Ends) -> None:
    """Bob has left and hung up. A message counts from when its sending begins: he says that he missed it."""
    ends.bob.close(wait=0.1)
    Interrupted.of(ends.alice, 0, OSError(errno.EPIPE, "Broken pipe"))
    with pytest.raises(ConnectionCut, match="Broken pipe"):
        ends.alice.send(REQUEST)
    ends.alice.frames.socket = socket.socket(fileno=ends.alice.frames.socket.detach())
    message = ends.alice.receive()
    assert (message.type, message.crossed, ends.alice.texts) == (CLOSE, True, 1)


def test_after_a_send_that_failed_nothing_more_is_sent(ends: Ends) -> None:
    Interrupted.of(ends.alice, 0, OSError(errno.EPIPE, "Broken pipe"))
    with pytest.raises(ConnectionCut, match="Broken pipe"):
        ends.alice.send(REQUEST)
    with pytest.raises(ConnectionCut, match="broke while the last message was sent"):
        ends.alice.send(REQUEST)


@pytest.mark.parametrize(("politely", "words"), [(True, 0), (False, 0), (True, 1), (False, 1)])
def test_who_leaves_after_the_other_side_is_told_whether_it_said_goodbye(
    ends: Ends, politely: bool, words: int
) -> None:
    """What the other side said before is read, and not answered."""
    if words:
        ends.alice.send(REQUEST)
        ends.bob.receive()
        ends.bob.send(REPLY)
    if politely:
        ends.bob.close(wait=0.1)
    ends.bob.frames.hang_up()
    assert ends.alice.close() is politely


def test_leaving_takes_no_longer_than_it_may(ends: Ends) -> None:
    """Bob neither reads nor hangs up. What was sent arrives all the same."""
    assert Background(lambda: ends.alice.close(wait=0.2)).result() is True
    assert ends.bob.receive().type is CLOSE


def test_unread_bytes_do_not_destroy_a_goodbye(ends: Ends) -> None:
    """A socket that is closed with unread bytes is reset, and the peer loses what it has not read yet."""
    ends.alice.send("x" * 100_000)
    ends.bob.opener.number += 1  # Bob leaves without reading it
    left = Background(ends.bob.close)
    assert len(ends.alice.frames.receive(chat.RECORD_LIMIT)) == 12 + 256 + 16 + 256
    ends.alice.frames.hang_up()
    left.result()


def test_a_line_is_watched_while_it_is_idle(ends: Ends) -> None:
    for channel in ends:
        connected = channel.frames.socket
        assert connected.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        for option, value in chat.TCP_OPTIONS.items():
            if hasattr(socket, option):
                got = connected.getsockopt(socket.IPPROTO_TCP, getattr(socket, option))
                assert got in (value, int(value > 0))
