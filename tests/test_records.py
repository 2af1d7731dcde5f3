"""Records: each is opened once, in its turn, after every check; and nothing is left to a second try.

The tables name the reason that the receiver gives: another check that refuses first would hide that the one
meant for the attack is gone.
"""

from __future__ import annotations

import itertools
from hashlib import sha256
from typing import Any, Callable, NamedTuple
from unittest import mock

import pytest
from conftest import Keys
from Crypto.Cipher import AES
from Crypto.Hash import SHA256
from Crypto.Signature import pss
from Crypto.Util.Padding import pad
from mallory import flip
from vectors import make

import crypto_utils as chat
from crypto_utils import NOTHING, Message, Opener, ProtocolError, RecordType, Role, RsaKey, Sealer

BOB, ALICE = Role
READY, TEXT, CLOSE = RecordType
Z, TH, R = b"z" * 256, b"t" * 32, b"r" * 32
SIGNATURE, TAG, LENGTH, REPLY, BODY, CLOSED = (
    "the record's signature is not valid",
    "the record's authentication tag is not valid",
    "the record has an impossible length",
    "the record replies to another record than the last one",
    "the record's body has a wrong length",
    "this direction is closed",
)


class Side(NamedTuple):
    sealer: Sealer
    opener: Opener


class Conversation:
    """What Bob and Alice have of a session, without a wire between them."""

    def __init__(self, keys: Keys, z: bytes = Z, th: bytes = TH) -> None:
        own = {BOB: keys.bob, ALICE: keys.alice}
        self.sides = {
            role: Side(Sealer(role, own[role], z, th), Opener(role.peer, own[role.peer].public_key(), z, th))
            for role in Role
        }

    def seal(self, sender: Role, record_type: RecordType, body: bytes = b"") -> bytes:
        sealer, opener = self.sides[sender]
        return sealer.seal(record_type, body, opener)

    def open(self, sender: Role, record: bytes, **options: Any) -> Message:
        """Open what the sender has sent, at the other side."""
        sealer, opener = self.sides[sender.peer]
        return opener.open(record, sealer, **options)

    def say(self, sender: Role, record_type: RecordType, body: bytes = b"") -> Message:
        return self.open(sender, self.seal(sender, record_type, body))

    def begin(self, records: int = 2) -> Conversation:
        """Exchange both READY, and then texts in turn, so many records in all."""
        for number in range(records):
            sender = ALICE if number % 2 == 0 else BOB
            body = (R if sender is BOB else b"") if number < 2 else b"text %d" % number
            self.say(sender, READY if number < 2 else TEXT, body)
        return self


@pytest.fixture
def begun(keys: Keys) -> Conversation:
    return Conversation(keys).begin()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let signatures be hashes: for tests that make thousands, of what is not about them."""
    monkeypatch.setattr(chat, "sign", lambda key, signed, *_: signed.digest() * 8)
    monkeypatch.setattr(chat, "verify", lambda key, signed, signature: signature == signed.digest() * 8)


# --------------------------------------------------------------------------- what is refused, and why


def derived(sender: Role, block: int) -> bytes:
    """K (block 1) or C (block 2) of a direction of this session."""
    return sha256(bytes([0, 0, 0, block]) + Z + b"secure-chat/1 key " + sender.label + TH).digest()


def hash_of(sender: Role, body: bytes) -> Any:
    """What is signed of a record whose body is nonce || ciphertext || tag."""
    return SHA256.new(b"secure-chat/1 signature " + sender.label + TH + derived(sender, 2) + body)


def resigned(sealer: Sealer, body: bytes, key: RsaKey | None = None) -> bytes:
    """Sign a record's body as its sender would: an insider who holds their RSA key."""
    return body + chat.sign(key or sealer.signer, hash_of(sealer.sender, body))


def by_insider(sealer: Sealer, plaintext: bytes) -> bytes:
    """A record with any plaintext, everything else being right: an insider who holds all keys."""
    nonce = sealer.number.to_bytes(12, "big")
    return resigned(sealer, nonce + b"".join(chat.encrypt(sealer._key, nonce, plaintext)))


def says(sealer: Sealer, record_type: int, body: bytes, in_reply_to: bytes) -> bytes:
    return by_insider(sealer, padded(bytes([record_type]) + in_reply_to + body))


def padded(data: bytes) -> bytes:
    return pad(data, 256, style="iso7816")


def forged_with_the_aes_key(keys: Keys, sealer: Sealer, opener: Opener) -> bytes:
    record = sealer.seal(TEXT, b"x", opener)
    other = chat.encrypt(sealer._key, record[:12], padded(b"\1" + opener.latest + b"y"))
    return record[:12] + b"".join(other) + record[-256:]


def block_taken_out(keys: Keys, sealer: Sealer, opener: Opener) -> bytes:
    record = sealer.seal(TEXT, b"x" * 300, opener)
    return record[:12] + record[268:]


Forgery = Callable[[Keys, Sealer, Opener], bytes]  # by a sender, who has opened so much
# What the next record of a sender is changed to, and why it is refused. tests/vectors/refused.json has more.
FORGERIES: dict[str, tuple[Forgery, str]] = {
    # the wire alone
    "signature changed": (lambda k, s, o: flip(s.seal(TEXT, b"x", o), -1), SIGNATURE),
    "block taken out": (block_taken_out, SIGNATURE),
    "dropped, the next one under its number": (
        lambda k, s, o: s.seal(TEXT, b"x", o)[:12] + s.seal(CLOSE, b"", o)[12:],
        SIGNATURE,
    ),
    "signed by Mallory": (lambda k, s, o: resigned(s, s.seal(TEXT, b"x", o)[:-256], k.mallory), SIGNATURE),
    # an insider who holds the AES key, but not the RSA key
    "encrypted anew": (forged_with_the_aes_key, SIGNATURE),
    # an insider who holds the RSA key, but not the AES key
    "ciphertext changed and signed": (
        lambda k, s, o: resigned(s, flip(s.seal(TEXT, b"x", o)[:-256], 12)),
        TAG,
    ),
    # the peer, who breaks the rules with all of their keys
    "no padding": (lambda k, s, o: by_insider(s, b"\1" + b"x" * 255), "padding is not valid"),
    "too short": (lambda k, s, o: by_insider(s, padded(b"\1" + bytes(31))), "the record is too short"),
    "unknown type": (lambda k, s, o: says(s, 3, b"", o.latest), "the record is of no known type"),
    "not UTF-8": (lambda k, s, o: says(s, TEXT, b"\xff", o.latest), "not valid UTF-8"),
    "a text over the limit": (lambda k, s, o: says(s, TEXT, bytes(chat.TEXT_LIMIT + 1), o.latest), BODY),
    "a CLOSE with a body": (lambda k, s, o: says(s, CLOSE, b"x", o.latest), BODY),
    "in reply to the one before": (lambda k, s, o: says(s, TEXT, b"x", o.before), REPLY),
    "a CLOSE in reply to nothing": (lambda k, s, o: says(s, CLOSE, b"", bytes(31) + b"\1"), REPLY),
    "a CLOSE that names 32 zero bytes": (lambda k, s, o: says(s, CLOSE, b"", NOTHING), REPLY),
}


@pytest.mark.parametrize("name", FORGERIES)
@pytest.mark.parametrize("sender", Role)
def test_a_forged_record_is_refused_and_so_is_all_that_follows(keys: Keys, sender: Role, name: str) -> None:
    """The state is as it was, but dead is dead: not even the genuine record opens after one that failed."""
    forge, reason = FORGERIES[name]
    conversation = Conversation(keys).begin(2 if sender is ALICE else 3)
    sealer, _ = conversation.sides[sender.peer]
    opener = conversation.sides[sender.peer].opener
    before = (opener.number, opener.latest, opener.before)
    kept: list[bytes] = []
    with pytest.raises(ProtocolError, match=reason):
        conversation.open(sender, forge(keys, *conversation.sides[sender]), keep=kept.append)
    assert (opener.number, opener.latest, opener.before) == before
    genuine = Conversation(keys).begin(2 if sender is ALICE else 3).seal(sender, TEXT, b"genuine")
    with pytest.raises(ValueError, match=CLOSED):
        conversation.open(sender, genuine, keep=kept.append)
    assert kept == []
    assert not sealer.closed, "the other direction is another matter"


def test_a_record_has_its_length_or_none(begun: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every length up to three blocks. What is not whole blocks is refused before anything is computed."""
    bob = begun.sides[BOB]
    monkeypatch.setattr(chat, "verify", lambda *_: False)
    possible = set()
    for length in range(12 + 3 * 256 + 16 + 256 + 1):
        with pytest.raises(ProtocolError) as refused:
            bob.opener.open((1).to_bytes(12, "big").ljust(length, b"\0")[:length], bob.sealer)
        bob.opener.closed = False
        if str(refused.value) != LENGTH:
            assert str(refused.value) == SIGNATURE
            possible.add(length)
    assert possible == {284 + blocks * 256 for blocks in (1, 2, 3)}


@pytest.mark.parametrize("sender", Role)
def test_nobody_says_goodbye_before_a_record_has_come_that_it_can_name(keys: Keys, sender: Role) -> None:
    """Whoever leaves then hangs up. Nothing has happened by that: READY is sealed as if it were not tried."""
    conversation = Conversation(keys)
    if sender is ALICE:
        conversation.seal(ALICE, READY)
    with pytest.raises(ValueError, match="it is the other side's turn"):
        conversation.seal(sender, CLOSE)
    assert not conversation.sides[sender].sealer.closed


# ----------------------------------------------------------------------------- order, turns and goodbyes


def allowed(turn: Role, sender: Role, record_type: RecordType, age: int) -> bool:
    """Whether this may come next, in reply to the receiver's latest record (age 0) or the one before (1)."""
    return (sender is turn or record_type is CLOSE) and (
        age == 0 or (age == 1 and sender is turn and record_type is CLOSE)
    )


def replies(sender: Side, receiver: Side) -> list[bytes]:
    """What a record could say that it replies to: the receiver's latest, the one before, and other things."""
    return [receiver.sealer.latest, receiver.sealer.before, sender.sealer.latest, b"\1" * 32]


def test_every_record_in_every_state(keys: Keys, quick: None) -> None:
    """After two to seven records, all that can be said next is taken or refused as the rules have it."""
    counts = {True: 0, False: 0}
    for length, sender, record_type, age in itertools.product(range(2, 8), Role, (TEXT, CLOSE), range(4)):
        conversation = Conversation(keys).begin(length)
        turn = ALICE if length % 2 == 0 else BOB
        near, far = conversation.sides[sender], conversation.sides[sender.peer]
        in_reply_to = replies(near, far)[age]
        body = b"x" if record_type is TEXT else b""
        record = says(near.sealer, record_type, body, in_reply_to)
        taken = allowed(turn, sender, record_type, age) and in_reply_to != NOTHING
        counts[taken] += 1
        if taken:
            message = conversation.open(sender, record)
            assert message == (record_type, body, in_reply_to, body.decode(), age == 1)
            assert far.opener.closed == (record_type is CLOSE)
        else:
            reason = REPLY if record_type is CLOSE or sender is turn else "spoke out of turn"
            with pytest.raises(ProtocolError, match=reason):
                conversation.open(sender, record)
    assert counts == {True: 23, False: 73}


def test_nobody_seals_out_of_turn(keys: Keys) -> None:
    """And nothing has happened then: what comes in turn is sealed as if it had not been tried."""
    conversation = Conversation(keys).begin()
    for number in range(4):
        turn = ALICE if number % 2 == 0 else BOB
        with pytest.raises(ValueError, match="it is the other side's turn"):
            conversation.seal(turn.peer, TEXT, b"me first")
        assert conversation.say(turn, TEXT, b"in turn").text == "in turn"


@pytest.mark.parametrize("leaver", Role)
def test_nothing_follows_a_goodbye(keys: Keys, leaver: Role) -> None:
    conversation = Conversation(keys).begin(4)
    assert conversation.say(leaver, CLOSE).type is CLOSE
    sealer, opener = conversation.sides[leaver].sealer, conversation.sides[leaver.peer].opener
    for more in (lambda: sealer.seal(CLOSE, b"", opener), lambda: opener.open(b"", sealer)):
        with pytest.raises(ValueError, match=CLOSED):
            more()


# --------------------------------------------------------------------------- what happens before what


def test_nothing_is_decrypted_before_it_is_verified(
    begun: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = flip(begun.seal(ALICE, TEXT, b"x"), -1)
    monkeypatch.setattr(chat, "decrypt", lambda *_: pytest.fail("decrypted, though not verified"))
    with pytest.raises(ProtocolError, match=SIGNATURE):
        begun.open(ALICE, record)


class Interrupted(KeyboardInterrupt):
    """Stands for Ctrl-C, a full disk, a broken line: anything, at any moment."""


def interrupting(call: Callable[..., Any], after: bool) -> Callable[..., Any]:
    def interrupted(*arguments: Any, **options: Any) -> Any:
        if after:
            call(*arguments, **options)
        raise Interrupted

    return interrupted


@pytest.mark.parametrize("after", [False, True], ids=["before it", "after it"])
@pytest.mark.parametrize("step", ["encrypt", "sign", "_trace", "send"])
def test_no_second_record_under_a_number_whatever_interrupted_the_first(
    begun: Conversation, monkeypatch: pytest.MonkeyPatch, step: str, after: bool
) -> None:
    """What was encrypted, or even sent, must not meet the same key and nonce again."""
    sealer, opener = begun.sides[ALICE]
    sent: list[bytes] = []
    send: Callable[[bytes], Any] = sent.append
    if step == "send":
        send = interrupting(send, after)
    else:
        place = Sealer if hasattr(Sealer, step) else chat
        monkeypatch.setattr(place, step, interrupting(getattr(place, step), after))
    with pytest.raises(Interrupted):
        sealer.seal(TEXT, b"once", opener, send)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=CLOSED):
        sealer.seal(CLOSE, b"", opener, sent.append)
    assert len(sent) == (step == "send" and after)
    # It counts from when its sending began: a goodbye that comes now and names another one has crossed it.
    assert begun.say(BOB, CLOSE).crossed == (step == "send")


@pytest.mark.parametrize("step", ["verify", "decrypt", "_trace", "keep"])
def test_a_record_counts_when_it_is_kept_and_not_before(
    begun: Conversation, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A goodbye names the last record that was kept, whatever interrupts the opening of the next."""
    record = begun.seal(ALICE, TEXT, b"x")
    bob = begun.sides[BOB]
    ready, options = bob.opener.latest, {}
    if step == "keep":
        options["keep"] = interrupting(len, after=False)
    else:
        place = Opener if hasattr(Opener, step) else chat
        monkeypatch.setattr(place, step, interrupting(getattr(place, step), after=True))
    with pytest.raises(Interrupted):
        begun.open(ALICE, record, **options)
    monkeypatch.undo()
    assert (bob.opener.number, bob.opener.latest, bob.opener.closed) == (1, ready, True)
    message = begun.say(BOB, CLOSE)
    assert message.in_reply_to == ready
    assert message.crossed


def test_no_nonce_meets_a_key_twice(keys: Keys, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    used: set[tuple[bytes, bytes]] = set()
    encrypt = chat.encrypt

    def spy(key: bytes, nonce: bytes, plaintext: bytes) -> tuple[bytes, bytes]:
        assert (key, nonce) not in used
        used.add((key, nonce))
        return encrypt(key, nonce, plaintext)

    monkeypatch.setattr(chat, "encrypt", spy)
    conversation = Conversation(keys).begin(600)
    conversation.say(BOB, CLOSE)
    assert {nonce for _, nonce in used} == {n.to_bytes(12, "big") for n in range(301)}
    assert len(used) == 601
    assert len({key for key, _ in used}) == 2


# ----------------------------------------------------------------------------- what a signature covers


def test_a_record_of_the_other_direction_is_refused_even_if_all_keys_were_the_same(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "derive_keys", lambda *_: (b"k" * 32, b"c" * 32))
    conversation = Conversation(Keys(keys.bob, keys.bob, keys.bob))
    record = conversation.seal(ALICE, READY)
    with pytest.raises(ProtocolError, match=SIGNATURE):
        Opener(BOB, keys.bob, Z, TH).open(record, conversation.sides[ALICE].sealer)
    assert conversation.open(ALICE, record).type is READY


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


def two_faced(keys: tuple[bytes, bytes], nonce: bytes, texts: tuple[bytes, bytes]) -> bytes:
    """Ciphertext and tag, valid under both keys: the first block under one key, the second under the other.

    AES-GCM does not commit to its key. Two blocks are chosen freely, and a third makes the tags equal.
    """
    ciphers = [chat.AES.new(key, chat.AES.MODE_ECB) for key in keys]
    subkeys = [int.from_bytes(cipher.encrypt(bytes(16)), "big") for cipher in ciphers]
    masks = [int.from_bytes(cipher.encrypt(nonce + (1).to_bytes(4, "big")), "big") for cipher in ciphers]
    streams = [cipher.encrypt(nonce + (n + 2).to_bytes(4, "big")) for n, cipher in enumerate(ciphers)]
    blocks = [
        int.from_bytes(text, "big") ^ int.from_bytes(stream, "big") for text, stream in zip(texts, streams)
    ]

    def tag(which: int, free: int) -> int:
        total = 0
        for block in (*blocks, free, 3 * 128):  # the last is the length in bits
            total = times(total ^ block, subkeys[which])
        return total ^ masks[which]

    squares = [times(subkey, subkey) for subkey in subkeys]
    free = times(tag(0, 0) ^ tag(1, 0), inverse(squares[0] ^ squares[1]))
    assert tag(0, free) == tag(1, free)
    return b"".join(part.to_bytes(16, "big") for part in (*blocks, free, tag(0, free)))


def test_a_record_that_opens_to_two_texts_is_signed_for_one_of_them(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mallory shows a judge another Z, and with it another K. C, which is signed, is another one then too."""
    nonce, texts = bytes(12), (b"I owe you 1 coin", b"I owe you 1000! ")
    other_z = b"y" * 256
    pairs = [chat.derive_keys(z, ALICE.label, TH)[0] for z in (Z, other_z)]
    sealed = two_faced((pairs[0], pairs[1]), nonce, texts)
    for key, text, at in zip(pairs, texts, (0, 16)):
        assert chat.decrypt(key, nonce, sealed[:-16], sealed[-16:])[at : at + 16] == text
    monkeypatch.setattr(chat, "PADDING", 16)  # so short a record is a whole one
    record = resigned(Conversation(keys).sides[ALICE].sealer, nonce + sealed)
    with pytest.raises(ProtocolError, match=SIGNATURE):
        Conversation(keys, other_z).open(ALICE, record)
    with pytest.raises(ProtocolError, match="padding"):  # signed and sealed under that key
        Conversation(keys).open(ALICE, record)


# ------------------------------------------------------------------------------- what is on the wire


def test_nothing_on_the_wire_depends_on_the_text_but_its_length_class(keys: Keys) -> None:
    """A record is a number, what AES-GCM makes of the padded text, and a signature of that and no more.

    All of it is computed here once more, without the functions under test. So whoever guesses a text cannot
    test the guess: number, ciphertext and tag are all that the signature depends on.
    """
    salt, lengths = b"s" * 32, set()
    for text in (b"yes", b"no", b"", b"x" * 222, b"x" * 223, b"y" * 478, b"x" * 479):
        conversation = Conversation(keys)
        conversation.say(ALICE, READY)
        ready = conversation.seal(BOB, READY, R)
        conversation.open(BOB, ready)
        sealer, opener = conversation.sides[ALICE]
        with mock.patch("secrets.token_bytes", return_value=salt):
            record = sealer.seal(TEXT, text, opener)
        plaintext = b"\1" + hash_of(BOB, ready[:-256]).digest() + text + b"\x80"
        plaintext += bytes(-len(plaintext) % 256)
        number = bytes(11) + b"\1"
        cipher = AES.new(derived(ALICE, 1), AES.MODE_GCM, nonce=number)
        body = number + b"".join(cipher.encrypt_and_digest(plaintext))
        signer = pss.new(keys.alice, salt_bytes=32, rand_func=lambda _: salt)
        assert record == body + signer.sign(hash_of(ALICE, body))
        lengths.add(((len(text) + 34 + 255) // 256, len(record)))
    assert lengths == {(blocks, 12 + blocks * 256 + 16 + 256) for blocks in (1, 2, 3)}


def test_the_longest_text_with_the_longest_signature_fits_into_a_frame_and_comes_back(keys: Keys) -> None:
    conversation = Conversation(keys._replace(alice=make.rsa_key("bob", 4096))).begin()
    text = "\U0001f600" * (chat.TEXT_LIMIT // 4)
    record = conversation.seal(ALICE, TEXT, text.encode())
    assert len(record) == chat.RECORD_LIMIT
    assert conversation.open(ALICE, record).text == text
