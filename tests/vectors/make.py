"""Make conversations.json and refused.json, the same to the byte every time: `python tests/vectors/make.py`.

Whatever is drawn at random elsewhere, RSA keys included, comes out of SHA-256 over a label here. A number
beside a label is how often something else was drawn before it fitted: a prime, or a value that begins with
a zero byte. Conversations are made by crypto_utils; what is to be refused is made from them by somebody who
holds all keys and keeps no rules.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

sys.path.extend(map(str, list(Path(__file__).resolve().parents)[1:3]))  # where conftest and crypto_utils are

from conftest import RFC_GROUPS
from Crypto.Cipher import AES
from Crypto.Hash import SHA1, SHA256
from Crypto.PublicKey import ECC, RSA
from Crypto.Signature import pkcs1_15, pss

import crypto_utils as chat
from crypto_utils import Group, Kind, Offer, Role, RsaKey, Sealer, encode_fields

BOB, ALICE = Role.BOB, Role.ALICE
READY, TEXT, CLOSE = Kind

Json = dict[str, Any]
ABOUT_CONVERSATIONS = {
    "what": "Whole conversations in secure-chat/1, with all that is secret in them. Bytes are in "
    "hexadecimal, as they are on the wire or in a hash, leading zero bytes included.",
    "name": "What is special about it; refused.json refers to it by this name.",
    "p, g": "The group, in minimal encoding.",
    "bob, alice": "What each side brings.",
    "private_key": "An RSA key, PEM of PKCS#8.",
    "public_key": "Its public half, DER of SubjectPublicKeyInfo.",
    "nonce": "In a side: 32 bytes. In a record: its number, in 12 bytes.",
    "exponent": "The secret a or b.",
    "public_value": "A or B.",
    "hello": "The payload, without the frame's length.",
    "th": "The transcript hash.",
    "z": "The shared secret Z.",
    "bob->alice, alice->bob": "What is derived for each direction.",
    "key, commitment": "K and C.",
    "records": "In the order in which they were sent, each one before the other side's next. On the wire, a "
    "record is nonce || ciphertext || tag || signature.",
    "sender, number, kind, text": "Who says what, in his record of this number.",
    "answers": "signed of the last record that the sender had received, or 32 zero bytes. A CLOSE may have "
    "crossed the other side's last record: then it is that of the one before.",
    "plaintext, ciphertext, tag": "What is encrypted, padding and all, and what comes of it.",
    "signed": "SHA-256 of what the signature covers.",
    "salt, signature": "The salt of PSS, and what comes of it.",
}
ABOUT_REFUSED = {
    "what": "Hellos and records that a receiver must refuse, and which check refuses them. Where several "
    "checks would, it is the first of them. Not here, for their size: frames over their limit, and a text "
    "over 1 MiB. Nor are pinned keys, which are no matter of bytes.",
    "name": "What is wrong with it.",
    "case": "The conversation, in conversations.json, in which it happens.",
    "receiver": "Who receives it, with his own RSA key, exponent and nonce of that conversation. Bob has "
    "its p and g; Alice takes p and g from the hello.",
    "after": "How many of that conversation's records were exchanged before, in their order; then comes "
    "this one.",
    "hello, record": "One of them: the payload that is received, without the frame's length. A hello takes "
    "the place of the peer's, and after is 0.",
    "check": "The check that fails. In their order, of a hello: fields, version, field count, nonce length, "
    "integer length, integer encoding, p size, p even, p safe prime, g subgroup, rsa size of DER, rsa type, "
    "rsa parse, rsa bits, rsa exponent, rsa encoding, public value length, public value subgroup, own key. "
    "Of a record: record length, number, signature, tag, padding, too short, type, ready, text length, "
    "utf-8, turn, answers. (Which of rsa type, rsa parse and rsa encoding refuses what is not quite such a "
    "key depends on the parser of the DER.)",
    "message": "The reason that crypto_utils.py gives.",
}
MESSAGES = {
    "fields": "a field of the hello is cut short",
    "version": "the other side does not speak secure-chat/1",
    "field count": "the hello has too many or too few fields",
    "nonce length": "the nonce is not 32 bytes long",
    "integer length": "p or g is over 4096 bits long",
    "integer encoding": "p or g is not in its minimal encoding",
    "p size": "p has {} bits, not 2048 to 4096",
    "p even": "p is even",
    "p safe prime": "p is not a safe prime",
    "g subgroup": "g does not generate the subgroup of order q",
    "rsa size of DER": "the RSA key is larger than 1 KiB",
    "rsa type": "the key is not an RSA SubjectPublicKeyInfo",
    "rsa parse": "the RSA key cannot be parsed",
    "rsa bits": "the RSA key has {} bits, not 2048 to 4096",
    "rsa exponent": "the RSA key's public exponent is not 65537",
    "rsa encoding": "the RSA key is not in its canonical encoding",
    "public value length": "the public value is not as long as p",
    "public value subgroup": "the public value is not in the subgroup of order q",
    "own key": "the other side presents our own key: a reflection",
    "record length": "the record has an impossible length",
    "number": "record {} where record {} should be: replayed, dropped or reordered",
    "signature": "the record's signature is not valid",
    "tag": "the record's authentication tag is not valid",
    "padding": "the record's padding is not valid",
    "too short": "the record is too short",
    "type": "the record is of no known type",
    "ready": "READY is record 0, and no other",
    "text length": "the record's text is too long",
    "utf-8": "the record's text is not valid UTF-8",
    "turn": "the other side spoke out of turn",
    "answers": "the record answers something else than what was said last",
}


# ------------------------------------------------------------------------------ what is drawn, and from what


def draw(label: str, length: int) -> bytes:
    """Return the first bytes of SHA-256(label || 0) || SHA-256(label || 1) || ..."""
    start = f"secure-chat/1 test vectors: {label}".encode()
    return b"".join(sha256(start + i.to_bytes(4, "big")).digest() for i in range(-(-length // 32)))[:length]


def drawing(*labels: str) -> chat.Random:
    """Return what draws by one label after the other."""
    rest = iter(labels)
    return lambda length: draw(next(rest), length)


def number(label: str, bits: int) -> int:
    """Draw a number of at most so many bits."""
    return int.from_bytes(draw(label, -(-bits // 8)), "big") >> -bits % 8


def safe_prime(bits: int, skipped: int) -> Group:
    """The first safe prime p = 23 mod 24 after a start that was drawn, and a square for g, as long as p."""
    start = 1 << bits - 1 | number(f"p {bits}", bits - 2)
    p = 24 * (start // 24 + skipped) - 1
    return Group(p, pow(number(f"g {bits}", bits), 2, p))


SKIPPED = {  # how many odd numbers, before p and before q
    ("bob", 2048): (402, 45),
    ("bob", 2049): (7, 71),
    ("bob", 4096): (95, 636),
    ("alice", 2048): (174, 281),
    ("alice", 3072): (874, 321),
    ("mallory", 2048): (311, 435),
}


@functools.cache
def rsa_key(name: str, bits: int) -> RsaKey:
    """The first primes after starts that were drawn (and e = 65537 divides neither p - 1 nor q - 1)."""
    halves = zip("pq", (bits - bits // 2, bits // 2), SKIPPED[name, bits])
    p, q = (
        (3 << n - 2 | number(f"{name} {bits} {pq}", n - 2) | 1) + 2 * skipped for pq, n, skipped in halves
    )
    return RSA.construct((p * q, 65537, pow(65537, -1, math.lcm(p - 1, q - 1)), p, q))


# --------------------------------------------------------------------------------------------- conversations


class Says(NamedTuple):
    sender: Role
    kind: Kind
    text: str = ""
    crossed: bool = False  # the other side's latest record


class Plan(NamedTuple):
    name: str
    says: tuple[Says, ...]  # after both READY
    tries: tuple[tuple[str, int], ...] = ()  # what was drawn before, by its label
    group: Group = RFC_GROUPS["ffdhe2048"]
    bits: tuple[int, int] = (2048, 2048)  # of Bob's RSA key and Alice's


GOODBYE = Says(ALICE, CLOSE)


def talk(*texts: str, close: Says | None = GOODBYE) -> tuple[Says, ...]:
    """Requests and replies, and a goodbye."""
    said = tuple(Says(BOB if n % 2 else ALICE, TEXT, text) for n, text in enumerate(texts))
    return (*said, close) if close else said


PLAIN = Plan(
    "ffdhe2048",
    talk("hello Bob", "hello Alice", "how are you?", "well, and you?", "well too", "glad to hear it"),
)
OTHER = Plan(
    "modp 2048, both keys begin with a zero byte, never closed",
    talk("hello Bob", "hello Alice", "hello?", "yes?", "bye", close=None),
    (("bob nonce", 333),),
    RFC_GROUPS["modp_2048"],
)
ZEROS = Plan(
    "public values that begin with a zero byte", talk(), (("bob exponent", 824), ("alice exponent", 0))
)
PLANS = (
    PLAIN,
    OTHER,
    ZEROS,
    Plan(
        "Z and signatures begin with a zero byte",
        talk("hello Bob", "hello Alice"),
        (("alice exponent", 388), ("salt 2", 161), ("salt 3", 1137)),
    ),
    Plan(
        "exponents and nonces that begin with a zero byte",
        talk(),
        (("bob exponent", 154), ("alice exponent", 336), ("bob nonce", 263), ("alice nonce", 37)),
    ),
    Plan(
        "ffdhe3072, RSA keys of 2048 and 3072 bits; Bob's CLOSE, out of turn",
        talk("3072", "bits", close=Says(BOB, CLOSE, "I have to go")),
        group=RFC_GROUPS["ffdhe3072"],
        bits=(2048, 3072),
    ),
    Plan(
        "ffdhe4096, RSA keys of 4096 and 3072 bits",
        talk("4096"),
        group=RFC_GROUPS["ffdhe4096"],
        bits=(4096, 3072),
    ),
    Plan(
        "a group that nobody knows, g as long as p; Alice's CLOSE, out of turn",
        talk("which p?", close=Says(ALICE, CLOSE, "too slow")),
        group=safe_prime(2048, 290893),
    ),
    Plan(
        "p and an RSA modulus of 2049 bits, which take 257 bytes",
        talk("257", "bytes"),
        group=safe_prime(2049, 272237),
        bits=(2049, 2048),
    ),
    Plan(
        "texts about the padding",
        talk(
            *("", "x" * 221, "x" * 222, "x" * 223, "x" * 478),
            *("ends like padding: \u00c0", "ends like padding: \u00c0\0\0", "\0" * 222),
            close=Says(ALICE, CLOSE, "x" * 223),
        ),
    ),
    Plan(
        "texts that are not ASCII",
        talk(
            *("Grüße aus Łódź, 你好, здравствуй", "\U0001f44b\U0001f3fd \U0001f469\u200d\U0001f52c"),
            *("one\ntwo\r\nthree\n", "\ufeffa byte order mark, which stays"),
            *("\x7f\x80\u07ff\u0800\ud7ff\ue000\uffff\U00010000\U0010ffff", "é is not e\u0301"),
            close=Says(ALICE, CLOSE, "tschüß \U0001f44b"),
        ),
    ),
    Plan("Alice's CLOSE, which crossed Bob's READY", talk(close=Says(ALICE, CLOSE, "", True))),
    Plan("Bob's CLOSE, which crossed the first request", talk("hello?", close=Says(BOB, CLOSE, "", True))),
    Plan(
        "Alice's CLOSE, which crossed the second reply",
        talk("hello", "hello", "never mind", "what?", close=Says(ALICE, CLOSE, "sorry", True)),
    ),
)


def converse(plan: Plan) -> Json:
    """Let crypto_utils have the conversation, and return it as it is in conversations.json."""

    def labels(*names: str) -> list[str]:
        return [f"{plan.name}: {name} {dict(plan.tries).get(name, 0)}" for name in names]

    offers = {
        role: Offer.make(
            role,
            rsa_key(role.value, bits),
            plan.group,
            drawing(*labels(f"{role.value} exponent", f"{role.value} nonce")),
        )
        for role, bits in zip(Role, plan.bits)
    }
    case: Json = {
        "name": plan.name,
        "p": chat.to_bytes(plan.group.p).hex(),
        "g": chat.to_bytes(plan.group.g).hex(),
    }
    for role, offer in offers.items():
        hello = chat.Hello.decode(role, offer.hello)
        case[role.value] = {
            "private_key": offer.identity.export_key("PEM", pkcs=8).decode(),
            "public_key": hello.rsa.hex(),
            "nonce": hello.nonce.hex(),
            "exponent": offer.exponent.hex(),
            "public_value": hello.public_value.hex(),
            "hello": offer.hello.hex(),
        }
    sealers: dict[Role, Sealer] = {}
    for role, offer in offers.items():
        sealers[role], _, agreement = offer.agree(offers[role.peer].hello)
    case |= {"th": agreement.th.hex(), "z": agreement.z.hex()}
    keys = {role: chat.derive_keys(agreement.z, role.label, agreement.th) for role in Role}
    for role, made in keys.items():
        case[role.label.decode()] = {"key": made.key.hex(), "commitment": made.commitment.hex()}
    case["records"] = []
    for at, (sender, kind, text, crossed) in enumerate((Says(ALICE, READY), Says(BOB, READY), *plan.says)):
        sealer, other = sealers[sender], sealers[sender.peer]
        answers = other.before if crossed else other.latest
        (salt,) = labels(f"salt {at}")
        record = sealer.seal(kind, text, answers, drawing(salt))
        end = len(record) - sealer.signer.size_in_bytes()
        nonce, ciphertext, tag = record[:12], record[12 : end - 16], record[end - 16 : end]
        cipher = AES.new(keys[sender].key, AES.MODE_GCM, nonce=nonce)
        case["records"].append(
            {
                "sender": sender.value,
                "number": int.from_bytes(nonce, "big"),
                "kind": kind.name,
                "text": text,
                "answers": answers.hex(),
                "plaintext": cipher.decrypt_and_verify(ciphertext, tag).hex(),
                "nonce": nonce.hex(),
                "ciphertext": ciphertext.hex(),
                "tag": tag.hex(),
                "signed": sealer.latest.hex(),
                "salt": draw(salt, 32).hex(),
                "signature": record[end:].hex(),
            }
        )
    return case


# -------------------------------------------------------------------------------------- hellos to be refused


class Refusal(NamedTuple):
    name: str
    check: str
    data: bytes
    told: tuple[int, ...] = ()  # in the message

    def describe(self, case: Json, receiver: Role, after: int, what: str, prefix: str) -> Json:
        """The case as it is in refused.json."""
        return {
            "name": f"{prefix}: {self.name}",
            "case": case["name"],
            "receiver": receiver.value,
            "after": after,
            what: self.data.hex(),
            "check": self.check,
            "message": MESSAGES[self.check].format(*self.told),
        }


def one_a_check(refusals: Iterable[Refusal]) -> list[Refusal]:
    """The first of each check: not everything needs to be there for both receivers."""
    first: dict[str, Refusal] = {}
    for refusal in refusals:
        first.setdefault(refusal.check, refusal)
    return list(first.values())


def der(tag: int, *contents: bytes, length_bytes: int = 0) -> bytes:
    """Encode in DER; with length_bytes, in BER: a length that is longer than it need be."""
    body = b"".join(contents)
    needed = length_bytes or (0 if len(body) < 128 else chat.byte_length(len(body)))
    length = bytes([0x80 | needed]) + len(body).to_bytes(needed, "big") if needed else bytes([len(body)])
    return bytes([tag]) + length + body


def integer(value: int, zeros: int = 0) -> bytes:
    return der(2, bytes(zeros) + value.to_bytes(value.bit_length() // 8 + 1, "big"))


def spki(
    *integers: bytes, oid: str = "2a864886f70d010101", null: bytes = b"\5\0", length_bytes: int = 0
) -> bytes:
    """SubjectPublicKeyInfo of an RSA key with these INTEGERs."""
    key = der(3, b"\0", der(0x30, *integers), length_bytes=length_bytes)
    return der(0x30, der(0x30, der(6, bytes.fromhex(oid)), null), key)


P256 = ECC.construct(curve="P-256", d=1).public_key().export_key(format="DER")


def refused_keys() -> Iterator[Refusal]:
    """What anybody refuses in place of a public key."""
    n, e = rsa_key("mallory", 2048).n, integer(65537)
    good = spki(integer(n), e)

    def any_key(bits: int) -> bytes:  # who signs nothing needs no primes
        return spki(integer((1 << bits) - (1 << 99) + 1), e)

    yield Refusal("an RSA key of 8192 bits", "rsa size of DER", any_key(8192))
    yield Refusal("an RSA key and 1 KiB", "rsa size of DER", good + bytes(1024))
    yield Refusal("a P-256 key", "rsa type", P256)
    yield Refusal("an empty key", "rsa type", b"")
    yield Refusal("an RSAPublicKey without its type", "rsa type", der(0x30, integer(n), e))
    yield Refusal("a key for RSASSA-PSS only", "rsa type", spki(integer(n), e, oid="2a864886f70d01010a"))
    yield Refusal("no NULL parameters", "rsa type", spki(integer(n), e, null=b""))
    yield Refusal("a key cut short", "rsa parse", good[:-1])
    yield Refusal("a type and no key", "rsa parse", good[:19])
    yield Refusal("a modulus and no exponent", "rsa parse", spki(integer(n)))
    yield Refusal("a byte after the key", "rsa parse", good + b"\0")
    yield Refusal("a length in three bytes", "rsa parse", spki(integer(n), e, length_bytes=3))
    for bits in (2047, 1024, 4097):
        yield Refusal(f"an RSA key of {bits} bits", "rsa bits", any_key(bits), (bits,))
    yield Refusal("e = 3", "rsa exponent", spki(integer(n), integer(3)))
    yield Refusal("e = 65539", "rsa exponent", spki(integer(n), integer(65539)))
    yield Refusal("e of 1025 bits", "rsa exponent", spki(integer(n), integer(2**1024 + 1)))
    yield Refusal("a modulus with a zero byte more", "rsa encoding", spki(integer(n, 1), e))
    yield Refusal("an exponent with a zero byte more", "rsa encoding", spki(integer(n), integer(65537, 1)))


def refused_hellos(case: Json, sender: Role) -> Iterator[Refusal]:
    """What its receiver refuses in place of a hello."""
    genuine = bytes.fromhex(case[sender.value]["hello"])
    names = ("version", "nonce", *(("p", "g") if sender is BOB else ()), "y", "rsa")
    fields = dict(zip(names, chat.decode_fields(genuine)))
    own_key = bytes.fromhex(case[sender.peer.value]["public_key"])
    p, y = int(case["p"], 16), fields["y"]

    def hello(**changes: bytes) -> bytes:
        return encode_fields(*{**fields, **changes}.values())

    forms = [
        Refusal("a byte more", "fields", genuine + b"\0"),
        Refusal("a byte less", "fields", genuine[:-1]),
        Refusal("nothing", "version", b""),
        Refusal("no version", "version", hello(version=b"")),
        Refusal("another version", "version", hello(version=b"secure-chat/2")),
        Refusal("a longer version", "version", hello(version=b"secure-chat/1\0")),
        Refusal("the receiver's own", "field count", bytes.fromhex(case[sender.peer.value]["hello"])),
        Refusal("a field more", "field count", genuine + b"\0\0"),
        Refusal("a field less", "field count", encode_fields(*list(fields.values())[:-1])),
        Refusal("a nonce of 31 bytes", "nonce length", hello(nonce=fields["nonce"][1:])),
        Refusal("a nonce of 33 bytes", "nonce length", hello(nonce=fields["nonce"] + b"\0")),
    ]
    yield from forms if sender is ALICE else one_a_check(forms)
    if sender is BOB:
        yield Refusal("p of 513 bytes", "integer length", hello(p=b"\1" + bytes(511) + b"\1"))
        yield Refusal("g of 513 bytes", "integer length", hello(g=bytes(512) + b"\2"))
        yield Refusal("p with a zero byte", "integer encoding", hello(p=b"\0" + fields["p"]))
        yield Refusal("g with a zero byte", "integer encoding", hello(g=b"\0\2"))
        yield Refusal("g = 0 as a zero byte", "integer encoding", hello(g=b"\0"))
        for value in (0, 23, p >> 1):
            bits = value.bit_length()
            yield Refusal(f"p of {bits} bits", "p size", hello(p=chat.to_bytes(value)), (bits,))
        yield Refusal("p even", "p even", hello(p=chat.to_bytes(p - 1)))
        for name, value in (
            ("p without small factors, composite", rsa_key("mallory", 2048).n),
            ("p composite, 2^(p-1) = 1", 2**2053 - 1),
            ("p prime, q composite", 2**2203 - 1),
            ("q prime, p composite", 2**2204 - 1),
        ):
            yield Refusal(name, "p safe prime", hello(p=chat.to_bytes(value)))
        outside = (("0", 0), ("1", 1), ("p-1", p - 1), ("p", p), ("p+1", p + 1), ("p+2, a square", p + 2))
        for name, value in (*outside, ("p-2, no square", p - 2)):
            yield Refusal(f"g = {name}", "g subgroup", hello(g=chat.to_bytes(value)))
    keys = refused_keys() if sender is ALICE else one_a_check(refused_keys())
    yield from (key._replace(data=hello(rsa=key.data)) for key in keys)
    yield Refusal("no public value", "public value length", hello(y=b""))
    yield Refusal("a public value one byte shorter", "public value length", hello(y=y[1:]))
    yield Refusal("a public value one byte longer", "public value length", hello(y=b"\0" + y))
    outside = (("0", 0), ("1", 1), ("p-1", p - 1), ("p", p), ("p+1", p + 1), ("p+4, a square", p + 4))
    negated = p - int.from_bytes(y, "big")
    for name, value in (*outside, ("p-4, no square", p - 4), ("negated, no square", negated)):
        data = hello(y=value.to_bytes(len(y), "big"))
        yield Refusal(f"public value {name}", "public value subgroup", data)
    yield Refusal("the receiver's own key", "own key", hello(rsa=own_key))
    # Where two are wrong, the first is told.
    yield Refusal("another version, cut short", "fields", hello(version=b"secure-chat/2")[:-1])
    yield Refusal("another version, one field", "version", encode_fields(b"secure-chat/2"))
    yield Refusal("a P-256 key, public value 0", "rsa type", hello(rsa=P256, y=bytes(len(y))))
    yield Refusal("own key, public value 0", "public value subgroup", hello(rsa=own_key, y=bytes(len(y))))
    if sender is BOB:
        yield Refusal("p even, g = 0", "p even", hello(p=chat.to_bytes(p - 1), g=b""))
        yield Refusal("g = 1, a P-256 key", "g subgroup", hello(g=b"\1", rsa=P256))


def without_zero_byte(case: Json, sender: Role) -> Refusal:
    fields = chat.decode_fields(bytes.fromhex(case[sender.value]["hello"]))
    fields[-2] = fields[-2].lstrip(b"\0")
    return Refusal("a public value without its zero byte", "public value length", encode_fields(*fields))


# ------------------------------------------------------------------------------------- records to be refused


def wire(record: Json) -> bytes:
    return bytes.fromhex("".join(record[part] for part in ("nonce", "ciphertext", "tag", "signature")))


def context(case: Json, sender: Role, th: str, commitment: str) -> bytes:
    """What a signature covers before the record."""
    return b"secure-chat/1 signature " + sender.label + bytes.fromhex(th + commitment)


class Insider:
    """Says what he likes in the place of a sender's next record, after so many records, with all his keys."""

    def __init__(self, case: Json, after: int, sender: Role) -> None:
        said: dict[str, list[bytes]] = {role.value: [bytes(32)] * 3 for role in Role}
        for record in case["records"][:after]:
            said[record["sender"]].append(bytes.fromhex(record["signed"]))
        self.own, self.number = said[sender.value][-1], len(said[sender.value]) - 3
        self.two_before, self.before, self.latest = said[sender.peer.value][-3:]
        keys = case[sender.label.decode()]
        self.key = bytes.fromhex(keys["key"])
        self.context = context(case, sender, case["th"], keys["commitment"])
        self.signer = rsa_key(sender.value, 2048)

    def says(self, kind: int, text: bytes = b"x", answers: bytes | None = None) -> bytes:
        """A record that is right but for what it says."""
        return self.seal(padded(bytes([kind]) + (self.latest if answers is None else answers) + text))

    def seal(
        self,
        plaintext: bytes,
        key: bytes = b"",
        gcm: bytes = b"",
        data: bytes = b"",
        shown: int | None = None,
    ) -> bytes:
        """Encrypt, by another key or nonce, with associated data, under another number if need be; sign."""
        nonce = (self.number if shown is None else shown).to_bytes(12, "big")
        cipher = AES.new(key or self.key, AES.MODE_GCM, nonce=gcm or nonce)
        cipher.update(data)
        return self.sign(nonce + b"".join(cipher.encrypt_and_digest(plaintext)))

    def sign(
        self, body: bytes, key: RsaKey | None = None, context: bytes = b"", salt: int = 32, tries: int = 0
    ) -> bytes:
        """The body with a signature: by another key, over another context, with another salt if need be."""
        drawn = drawing(f"salt {tries} over {body.hex()}")
        signed = SHA256.new((context or self.context) + body)
        return body + pss.new(key or self.signer, salt_bytes=salt, rand_func=drawn).sign(signed)


def padded(data: bytes) -> bytes:
    return data + b"\x80" + bytes(-(len(data) + 1) % 256)


def flip(data: bytes, at: int) -> bytes:
    at %= len(data)
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


UTF8 = {
    "the byte ff": b"\xff",
    "a continuation byte alone": b"\x80",
    "a sequence cut short": b"\xe2\x82",
    "an overlong slash": b"\xc0\xaf",
    "an overlong zero": b"\xe0\x80\x80",
    "a surrogate": b"\xed\xa0\x80",
    "two surrogates": b"\xed\xa0\xbd\xed\xb1\x8b",
    "beyond U+10FFFF": b"\xf4\x90\x80\x80",
    "good but for the last byte": b"x" * 200 + b"\xc3",
}


def refused_texts(by: Insider) -> Iterator[Refusal]:
    """What its receiver refuses to be told, by records that are signed and encrypted as they should be."""
    said = bytes([TEXT]) + by.latest
    yield Refusal("no padding", "padding", by.seal(said + b"x" * 223))
    yield Refusal("zeros only", "padding", by.seal(bytes(256)))
    yield Refusal("a block of padding too much", "padding", by.seal(padded(said + b"x") + bytes(256)))
    yield Refusal("padding that ends in 1", "padding", by.seal(flip(padded(said + b"x"), -1)))
    yield Refusal("PKCS #7", "padding", by.seal(said + b"x" + bytes([222]) * 222))
    for length in (32, 1, 0):
        yield Refusal(f"length {length}", "too short", by.seal(padded(said[:length])))
    for kind in (3, 128, 255):
        yield Refusal(f"type {kind}", "type", by.says(kind))
    yield Refusal("READY", "ready", by.says(READY, b""))
    for name, text in UTF8.items():
        yield Refusal(name, "utf-8", by.says(TEXT, text))
    yield Refusal("CLOSE with the byte ff", "utf-8", by.says(CLOSE, b"\xff"))
    yield Refusal("answers the one before", "answers", by.says(TEXT, answers=by.before))
    yield Refusal("answers nothing", "answers", by.says(TEXT, answers=bytes(32)))
    yield Refusal("answers what was never said", "answers", by.says(TEXT, answers=bytes(31) + b"\1"))
    yield Refusal("answers the sender's own", "answers", by.says(TEXT, answers=by.own))
    yield Refusal("CLOSE, answers the sender's own", "answers", by.says(CLOSE, answers=by.own))
    yield Refusal("CLOSE, answers two before", "answers", by.says(CLOSE, answers=by.two_before))
    # Where two are wrong, the first is told.
    yield Refusal("type 3, not UTF-8", "type", by.says(3, b"\xff"))
    yield Refusal("READY, not UTF-8", "ready", by.says(READY, b"\xff"))
    yield Refusal("not UTF-8, answers nothing", "utf-8", by.says(TEXT, b"\xff", bytes(32)))


def refused_bodies(case: Json, other: Json, after: int, sender: Role, by: Insider) -> Iterator[Refusal]:
    """What its receiver refuses before he looks inside. `other` is a conversation with the same RSA keys."""
    records, n, mallory = [wire(record) for record in case["records"]], by.number, rsa_key("mallory", 2048)
    genuine, reflected = records[after], records[after - 1]
    body, plaintext = genuine[:-256], padded(bytes([TEXT]) + by.latest + b"x")
    yield Refusal("nothing", "record length", b"")
    yield Refusal("a byte more", "record length", genuine + b"\0")
    yield Refusal("a byte less", "record length", genuine[:-1])
    yield Refusal("without a signature", "record length", body)
    yield Refusal("without a ciphertext", "record length", by.seal(b""))
    yield Refusal("a ciphertext of 255 bytes", "record length", by.seal(plaintext[:-1]))
    yield Refusal("the one before, replayed", "number", records[after - 2], (n - 1, n))
    yield Refusal("the one after it, reordered", "number", records[after + 2], (n + 1, n))
    far = 1 << 88 | n
    yield Refusal("its number's first byte is 1", "number", by.seal(plaintext, shown=far), (far, n))
    if sender is ALICE:  # what she says first under each number, Bob has not said yet
        yield Refusal("the receiver's own, reflected", "number", reflected, (n - 1, n))
    else:
        yield Refusal("the receiver's own, reflected", "signature", reflected)
    for name, at in (("ciphertext", 12), ("tag", -257), ("signature", -1)):
        yield Refusal(f"{name} changed", "signature", flip(genuine, at))
    yield Refusal("that of another session", "signature", wire(other["records"][after]))
    yield Refusal("signed by Mallory", "signature", by.sign(body, mallory))
    yield Refusal("signed by its receiver", "signature", by.sign(body, rsa_key(sender.peer.value, 2048)))
    mine, reverse = case[sender.label.decode()], case[sender.peer.label.decode()]
    for name, signed in (
        ("the other direction", context(case, sender.peer, case["th"], mine["commitment"])),
        ("the other direction's commitment", context(case, sender, case["th"], reverse["commitment"])),
        ("another transcript hash", context(case, sender, other["th"], mine["commitment"])),
        ("no commitment", context(case, sender, case["th"], "")),
    ):
        yield Refusal(f"signed for {name}", "signature", by.sign(body, context=signed))
    for salt in (0, 20, 222):
        yield Refusal(f"a salt of {salt} bytes", "signature", by.sign(body, salt=salt))
    digest = SHA256.new(by.context + body)
    yield Refusal("PKCS #1 v1.5", "signature", body + pkcs1_15.new(by.signer).sign(digest))
    mgf1 = pss.new(
        by.signer,
        mask_func=lambda seed, length: pss.MGF1(seed, length, SHA1),
        salt_bytes=32,
        rand_func=drawing("salt for MGF1"),
    )
    yield Refusal("MGF1 with SHA-1", "signature", body + mgf1.sign(digest))
    yield Refusal("signature 0", "signature", body + bytes(256))
    yield Refusal("signature 1", "signature", body + bytes(255) + b"\1")
    sums = (int.from_bytes(by.sign(body, tries=k)[-256:], "big") + by.signer.n for k in count())
    large = next(value for value in sums if value < 1 << 2048)
    yield Refusal("signature s + n", "signature", body + large.to_bytes(256, "big"))
    yield Refusal("ciphertext changed, then signed", "tag", by.sign(flip(body, 12)))
    yield Refusal("tag changed, then signed", "tag", by.sign(flip(body, -1)))
    yield Refusal("the other direction's key", "tag", by.seal(plaintext, key=bytes.fromhex(reverse["key"])))
    yield Refusal("another nonce in GCM", "tag", by.seal(plaintext, gcm=bytes(12)))
    yield Refusal("associated data", "tag", by.seal(plaintext, data=b"secure-chat/1"))
    # Where two are wrong, the first is told.
    yield Refusal("replayed, a byte less", "record length", records[after - 2][:-1])
    yield Refusal("replayed, signature changed", "number", flip(records[after - 2], -1), (n - 1, n))
    yield Refusal("ciphertext changed, signed by Mallory", "signature", by.sign(flip(body, 12), mallory))


def refused_ready(case: Json, other: Json, after: int, sender: Role, by: Insider) -> Iterator[Refusal]:
    """What its receiver refuses in the place of record 0."""
    body = wire(case["records"][after])[:-256]
    yield Refusal("number 1", "number", by.seal(padded(bytes([READY]) + by.latest), shown=1), (1, 0))
    yield Refusal("that of another session", "signature", wire(other["records"][after]))
    yield Refusal("signed by Mallory", "signature", by.sign(body, rsa_key("mallory", 2048)))
    yield Refusal("TEXT", "ready", by.says(TEXT))
    yield Refusal("CLOSE", "ready", by.says(CLOSE))
    yield Refusal("with a text", "text length", by.says(READY))
    yield Refusal("with the byte ff", "text length", by.says(READY, b"\xff"))
    answers = bytes(32) if sender is BOB else bytes.fromhex(case["records"][1]["signed"])
    yield Refusal("answers something else", "answers", by.says(READY, b"", answers))


def refused_turns(by: Insider) -> Iterator[Refusal]:
    """What its receiver refuses out of turn."""
    yield Refusal("TEXT", "turn", by.says(TEXT))
    yield Refusal("TEXT, answers what was never said", "turn", by.says(TEXT, answers=bytes(31) + b"\1"))
    yield Refusal("TEXT, not UTF-8", "utf-8", by.says(TEXT, b"\xff"))
    yield Refusal("CLOSE, answers what was never said", "answers", by.says(CLOSE, answers=bytes(31) + b"\1"))
    yield Refusal("CLOSE, answers the one before", "answers", by.says(CLOSE, answers=by.before))
    yield Refusal("CLOSE, answers two before", "answers", by.says(CLOSE, answers=by.two_before))


# ------------------------------------------------------------------------------------------------ both files


def files() -> dict[str, str]:
    """Return what is in both files, by their names."""
    cases = {plan.name: converse(plan) for plan in PLANS}
    plain, other = cases[PLAIN.name], cases[OTHER.name]
    refused: list[Json] = []
    for sender in Role:
        whose = f"{sender.value.title()}'s hello"
        refused += (
            each.describe(plain, sender.peer, 0, "hello", whose) for each in refused_hellos(plain, sender)
        )
        zeros = cases[ZEROS.name]
        refused.append(without_zero_byte(zeros, sender).describe(zeros, sender.peer, 0, "hello", whose))
    for after, sender in ((0, ALICE), (1, BOB), (5, BOB), (6, ALICE), (5, ALICE), (6, BOB)):
        by = Insider(plain, after, sender)
        whose = f"{sender.value.title()}'s record {by.number}"
        if plain["records"][after]["sender"] != sender.value:
            whose, refusals = f"{whose}, out of turn", list(refused_turns(by))
        elif after < 2:
            refusals = list(refused_ready(plain, other, after, sender, by))
        else:
            refusals = [*refused_bodies(plain, other, after, sender, by), *refused_texts(by)]
            refusals = refusals if sender is ALICE else one_a_check(refusals)
        refused += (each.describe(plain, sender.peer, after, "record", whose) for each in refusals)
    return {
        "conversations.json": dump(ABOUT_CONVERSATIONS, list(cases.values())),
        "refused.json": dump(ABOUT_REFUSED, refused),
    }


def dump(about: dict[str, str], cases: list[Json]) -> str:
    return json.dumps({"about": about, "cases": cases}, indent=1) + "\n"


if __name__ == "__main__":
    for name, text in files().items():
        Path(__file__).with_name(name).write_bytes(text.encode("ascii"))
