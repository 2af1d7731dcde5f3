"""Make the three files of vectors, the same to the byte every time: `python tests/vectors/make.py`.

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
from types import SimpleNamespace
from typing import Any, Callable, NamedTuple
from unittest import mock

sys.path.extend(map(str, list(Path(__file__).resolve().parents)[1:3]))  # where conftest and crypto_utils are

from conftest import RFC_GROUPS
from Crypto.Cipher import AES
from Crypto.Hash import SHA1, SHA256
from Crypto.PublicKey import ECC, RSA
from Crypto.Signature import pkcs1_15, pss

import crypto_utils as chat
from crypto_utils import Group, RecordType, Role, RsaKey, Sealer, encode_fields, frame

BOB, ALICE = Role.BOB, Role.ALICE
READY, TEXT, CLOSE = RecordType

Json = dict[str, Any]
ABOUT_CONVERSATIONS = {
    "what": "Whole conversations in secure-chat/1, with all that is secret in them. Bytes are in "
    "hexadecimal, as they are on the wire or in a hash, leading zero bytes included.",
    "name": "What is special about it; refused.json refers to it by this name.",
    "p, g": "The group, in minimal encoding.",
    "bob, alice": "What each side brings.",
    "private_key": "An RSA key, PEM of PKCS#8.",
    "public_key": "Its public half, DER of SubjectPublicKeyInfo.",
    "nonce": 'In a side: 32 bytes; Bob\'s is SHA-256 of "secure-chat/1 commit " || r. In a record: its '
    "number, in 12 bytes.",
    "r": "What Bob's nonce commits to, and the body of his READY.",
    "exponent": "The secret a or b.",
    "public_value": "A or B.",
    "hello": "The payload, without the frame's length.",
    "th": "The transcript hash.",
    "words": "The six words, of th and r: three are Bob's to read out, three Alice's. (Of a Bob who is busy, "
    "nobody sees them.)",
    "z": "The shared secret Z.",
    "bob->alice, alice->bob": "What is derived for each direction.",
    "key, commitment": "K and C.",
    "records": "In the order in which they were sent, each one before the other side's next. On the wire, a "
    "record is nonce || ciphertext || tag || signature.",
    "sender, number, type, text": "Who says what, in their record of this number. Only a TEXT has a text: "
    "the body of Bob's READY is r, and those of Alice's and of a CLOSE are empty.",
    "in_reply_to": "signed of the last record that the sender had received; 32 zero bytes in Alice's READY. "
    "A CLOSE may have crossed the other side's last record: then it is that of the one before.",
    "plaintext, ciphertext, tag": "What is encrypted, padding and all, and what comes of it.",
    "signed": "SHA-256 of what the signature covers.",
    "salt, signature": "The salt of PSS, and what comes of it.",
}
ABOUT_REFUSED = {
    "what": "Hellos and records that a receiver must refuse, and which check refuses them. Where several "
    "checks would, it is the first of them; of a hello, in the order of crypto_utils.py, which nobody need "
    "follow. Not here, for their size: frames over their limit, and a text over 1 MiB. Nor are pinned keys, "
    "which are no matter of bytes.",
    "name": "What is wrong with it.",
    "case": "The conversation, in conversations.json, in which it happens.",
    "receiver": "Who receives it, with their own RSA key, exponent and nonce of that conversation. Bob has "
    "its p and g; Alice takes p and g from the hello.",
    "after": "How many of that conversation's records were exchanged before, in their order; then comes "
    "this one.",
    "hello, record": "One of them: the payload that is received, without the frame's length. A hello takes "
    "the place of the peer's, and after is 0.",
    "check": "The check that fails. In their order, of a hello: fields, version, field count, nonce length, "
    "integer length, integer encoding, p size, p even, p safe prime, g subgroup, rsa size of DER, rsa type, "
    "rsa parse, rsa bits, rsa exponent, rsa encoding, public value length, public value subgroup, one key. "
    "Of a record: record length, number, signature, tag, padding, too short, type, ready, body length, "
    "utf-8, turn, in_reply_to, commitment.",
    "message": "The reason that crypto_utils.py gives.",
}
ABOUT_TRANSCRIPTS = {
    "what": "Transcript files, whole: those that a reader takes, and those that they must refuse. Where "
    "several checks would, it is the first of them. Not here, for their size: whole entries over a limit.",
    "valid, refused": "Each a list of files.",
    "name": "What is special about it.",
    "file": "Its bytes, in hexadecimal.",
    "words": "The six words of the conversation.",
    "messages": "What it proves, in its order.",
    "from, type, text": "Who says what. Only a TEXT has a text here.",
    "crossed": "Whether the other side's latest record had not been opened when it was made.",
    "reason": "The reason that crypto_utils.py gives.",
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
    "one key": "both sides present the same key: a reflection",
    "record length": "the record has an impossible length",
    "number": "record {} where record {} should be: replayed, dropped or reordered",
    "signature": "the record's signature is not valid",
    "tag": "the record's authentication tag is not valid",
    "padding": "the record's padding is not valid",
    "too short": "the record is too short",
    "type": "the record is of no known type",
    "ready": "READY is record 0, and no other",
    "body length": "the record's body has a wrong length",
    "utf-8": "the record's text is not valid UTF-8",
    "turn": "the other side spoke out of turn",
    "in_reply_to": "the record replies to another record than the last one",
    "commitment": "Bob's r does not fit his nonce",
    # of a transcript
    "beginning": "this is no transcript of secure-chat",
    "order": "a transcript begins with both hellos, Z and both READY",
    "z length": "Z is not as long as p",
    "entry": "an entry is of no known kind, or not where it belongs",
    "entry length": "an entry of {} bytes, over the limit of {}",
    "entry cut": "the transcript ends in the middle of an entry",
    "after CLOSE": "something follows the goodbye",
}


# ------------------------------------------------------------------------------ what is drawn, and from what


def draw(label: str, length: int) -> bytes:
    """Return the first bytes of SHA-256(label || 0) || SHA-256(label || 1) || ..."""
    start = f"secure-chat/1 test vectors: {label}".encode()
    return b"".join(sha256(start + i.to_bytes(4, "big")).digest() for i in range(-(-length // 32)))[:length]


def hexadecimal(value: int) -> str:
    return chat.to_bytes(value).hex()


def drawing(*labels: str) -> Callable[[int], bytes]:
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
    type: RecordType
    text: str = ""
    crossed: bool = False  # the other side's latest record


class Plan(NamedTuple):
    name: str
    says: tuple[Says, ...]
    tries: tuple[tuple[str, int], ...] = ()  # what was drawn before, by its label
    group: Group = RFC_GROUPS["ffdhe2048"]
    bits: tuple[int, int] = (2048, 2048)  # of Bob's RSA key and Alice's


GOODBYE = Says(ALICE, CLOSE)


def talk(*texts: str, close: Says | None = GOODBYE) -> tuple[Says, ...]:
    """Both READYs, requests and replies, and a goodbye."""
    ready = (Says(ALICE, READY), Says(BOB, READY))
    said = tuple(Says(BOB if n % 2 else ALICE, TEXT, text) for n, text in enumerate(texts))
    return (*ready, *said, close) if close else (*ready, *said)


PLAIN = Plan(
    "ffdhe2048",
    talk("hello Bob", "hello Alice", "how are you?", "well, and you?", "well too", "glad to hear it"),
)
OTHER = Plan(
    "modp 2048, both keys begin with a zero byte, never closed",
    talk("hello Bob", "hello Alice", "hello?", "yes?", "bye", close=None),
    (("bob r", 19719),),
    RFC_GROUPS["modp_2048"],
)
ZEROS = Plan(
    "public values that begin with a zero byte", talk(), (("bob exponent", 824), ("alice exponent", 0))
)
SHORT = Plan(
    "Z and signatures begin with a zero byte",
    talk("hello Bob", "hello Alice"),
    (("alice exponent", 388), ("salt 2", 143), ("salt 3", 34)),
)
BOB_LEAVES = Plan(
    "ffdhe3072, RSA keys of 2048 and 3072 bits; Bob's CLOSE, out of turn",
    talk("3072", "bits", close=Says(BOB, CLOSE)),
    group=RFC_GROUPS["ffdhe3072"],
    bits=(2048, 3072),
)
ODD = Plan(
    "p and an RSA modulus of 2049 bits, which take 257 bytes",
    talk("257", "bytes"),
    group=safe_prime(2049, 272237),
    bits=(2049, 2048),
)
NOT_ASCII = Plan(
    "texts that are not ASCII",
    talk(
        *("Grüße aus Łódź, 你好, здравствуй", "\U0001f44b\U0001f3fd \U0001f469\u200d\U0001f52c"),
        *("one\ntwo\r\nthree\n", "\ufeffa byte order mark, which stays"),
        *("\x7f\x80\u07ff\u0800\ud7ff\ue000\uffff\U00010000\U0010ffff", "é is not e\u0301"),
    ),
)
BUSY = Plan("Bob is busy: his record 0 is CLOSE", (Says(ALICE, READY), Says(BOB, CLOSE)))
PLANS = (
    PLAIN,
    OTHER,
    ZEROS,
    SHORT,
    Plan(
        "exponents and nonces that begin with a zero byte",
        talk(),
        (("bob exponent", 154), ("alice exponent", 336), ("bob r", 4752), ("alice nonce", 37)),
    ),
    BOB_LEAVES,
    Plan(
        "ffdhe4096, RSA keys of 4096 and 3072 bits",
        talk("4096"),
        group=RFC_GROUPS["ffdhe4096"],
        bits=(4096, 3072),
    ),
    Plan(
        "a group that nobody knows, g as long as p; Alice's CLOSE, out of turn",
        talk("which p?", close=Says(ALICE, CLOSE)),
        group=safe_prime(2048, 290893),
    ),
    ODD,
    Plan(
        "texts about the padding",
        talk(
            *("", "x" * 221, "x" * 222, "x" * 223, "x" * 478),
            *("ends like padding: \u00c0", "ends like padding: \u00c0\0\0", "\0" * 222),
        ),
    ),
    NOT_ASCII,
    BUSY,
    Plan("Bob's CLOSE, which crossed the first request", talk("hello?", close=Says(BOB, CLOSE, "", True))),
    Plan(
        "Alice's CLOSE, which crossed the second reply",
        talk("hello", "hello", "never mind", "what?", close=Says(ALICE, CLOSE, "", True)),
    ),
)


def converse(plan: Plan) -> Json:
    """Let crypto_utils have the conversation, and return it as it is in conversations.json."""

    def labels(*names: str) -> list[str]:
        return [f"{plan.name}: {name} {dict(plan.tries).get(name, 0)}" for name in names]

    hellos, exponents, r = {}, {}, b""
    for role, bits in zip(Role, plan.bits):
        drawn = labels(f"{role.value} exponent", "bob r" if role is BOB else "alice nonce")
        with mock.patch("secrets.token_bytes", drawing(*drawn)):
            hellos[role], exponents[role], made = chat.make_hello(role, rsa_key(role.value, bits), plan.group)
        r = r or made
    case: Json = {"name": plan.name, "p": hexadecimal(plan.group.p), "g": hexadecimal(plan.group.g)}
    sealers: dict[Role, Sealer] = {}
    _, th = chat.settle(hellos[BOB], hellos[ALICE])
    for (role, hello), bits in zip(hellos.items(), plan.bits):
        identity = rsa_key(role.value, bits)
        case[role.value] = {
            "private_key": identity.export_key("PEM", pkcs=8).decode(),
            "public_key": hello.rsa.hex(),
            "nonce": hello.nonce.hex(),
            "exponent": exponents[role].hex(),
            "public_value": hello.public_value.hex(),
            "hello": hello.encode().hex(),
        }
        z = chat.shared_secret(exponents[role], hellos[role.peer])
        sealers[role] = Sealer(role, identity, z, th)
    case |= {"r": r.hex(), "th": th.hex(), "z": z.hex()}
    for role in Role:
        key, commitment = chat.derive_keys(z, role.label, th)
        case[role.label.decode()] = {"key": key.hex(), "commitment": commitment.hex()}
    case |= {"words": " ".join(chat.make_words(th, chat.commit(r), r)), "records": []}
    for at, (sender, record_type, text, crossed) in enumerate(plan.says):
        sealer, other = sealers[sender], sealers[sender.peer]
        heard = SimpleNamespace(number=other.number, latest=other.before if crossed else other.latest)
        (salt,) = labels(f"salt {at}")
        body = r if (sender, record_type) == (BOB, READY) else text.encode()
        with mock.patch("secrets.token_bytes", drawing(salt)):
            record = sealer.seal(record_type, body, heard)
        end = len(record) - sealer.signer.size_in_bytes()
        nonce, ciphertext, tag = record[:12], record[12 : end - 16], record[end - 16 : end]
        key = bytes.fromhex(case[sender.label.decode()]["key"])
        case["records"].append(
            {
                "sender": sender.value,
                "number": int.from_bytes(nonce, "big"),
                "type": record_type.name,
                "text": text,
                "in_reply_to": heard.latest.hex(),
                "plaintext": chat.decrypt(key, nonce, ciphertext, tag).hex(),
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
    needed = length_bytes or (0 if len(body) < 128 else len(chat.to_bytes(len(body))))
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
            ("p prime, q even", 3 * 2**2208 + 1),
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
    yield Refusal("the receiver's own key", "one key", hello(rsa=own_key))


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
    """Says what they like in the place of a sender's next record, with all their keys."""

    def __init__(self, case: Json, after: int, sender: Role) -> None:
        said: dict[str, list[bytes]] = {role.value: [bytes(32)] * 3 for role in Role}
        for record in case["records"][:after]:
            said[record["sender"]].append(bytes.fromhex(record["signed"]))
        self.own, self.number = said[sender.value][-1], len(said[sender.value]) - 3
        self.two_before, self.before, self.latest = said[sender.peer.value][-3:]
        self.ready = bytes.fromhex(case["r"]) if sender is BOB else b""
        keys = case[sender.label.decode()]
        self.key = bytes.fromhex(keys["key"])
        self.context = context(case, sender, case["th"], keys["commitment"])
        self.signer = rsa_key(sender.value, 2048)

    def says(self, record_type: int, body: bytes | None = None, in_reply_to: bytes | None = None) -> bytes:
        """A record that is right but for what it says."""
        if body is None:
            body = b"" if record_type == CLOSE else b"x"
        return self.seal(padded(bytes([record_type]) + (in_reply_to or self.latest) + body))

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
    for unknown in (3, 128, 255):
        yield Refusal(f"type {unknown}", "type", by.says(unknown))
    yield Refusal("READY", "ready", by.says(READY, b""))
    for name, text in UTF8.items():
        yield Refusal(name, "utf-8", by.says(TEXT, text))
    yield Refusal("CLOSE with a text", "body length", by.says(CLOSE, b"x"))
    yield Refusal("in reply to the one before", "in_reply_to", by.says(TEXT, in_reply_to=by.before))
    yield Refusal("in reply to nothing", "in_reply_to", by.says(TEXT, in_reply_to=bytes(32)))
    yield Refusal(
        "in reply to what was never said", "in_reply_to", by.says(TEXT, in_reply_to=bytes(31) + b"\1")
    )
    yield Refusal("in reply to the sender's own", "in_reply_to", by.says(TEXT, in_reply_to=by.own))
    yield Refusal("CLOSE, in reply to the sender's own", "in_reply_to", by.says(CLOSE, in_reply_to=by.own))
    yield Refusal("CLOSE, in reply to two before", "in_reply_to", by.says(CLOSE, in_reply_to=by.two_before))
    # Where two are wrong, the first is told.
    yield Refusal("type 3, not UTF-8", "type", by.says(3, b"\xff"))
    yield Refusal("READY, not UTF-8", "ready", by.says(READY, b"\xff"))
    yield Refusal("CLOSE, not UTF-8", "body length", by.says(CLOSE, b"\xff"))
    yield Refusal("CLOSE with a text, in reply to nothing", "body length", by.says(CLOSE, b"x", bytes(32)))
    yield Refusal("not UTF-8, in reply to nothing", "utf-8", by.says(TEXT, b"\xff", bytes(32)))


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
    yield Refusal(
        "number 1", "number", by.seal(padded(bytes([READY]) + by.latest + by.ready), shown=1), (1, 0)
    )
    yield Refusal("that of another session", "signature", wire(other["records"][after]))
    yield Refusal("signed by Mallory", "signature", by.sign(body, rsa_key("mallory", 2048)))
    yield Refusal("TEXT", "ready", by.says(TEXT))
    if sender is ALICE:
        yield Refusal("CLOSE", "ready", by.says(CLOSE))
        yield Refusal("with a body", "body length", by.says(READY))
        yield Refusal("with the byte ff", "body length", by.says(READY, b"\xff"))
        yield Refusal("with an r", "body length", by.says(READY, draw("an r of Alice's", 32)))
    else:
        yield Refusal("without r", "body length", by.says(READY, b""))
        yield Refusal("r one byte shorter", "body length", by.says(READY, by.ready[:-1]))
        yield Refusal("r and a zero byte", "body length", by.says(READY, by.ready + b"\0"))
        yield Refusal("r with a bit changed", "commitment", by.says(READY, flip(by.ready, -1)))
        yield Refusal(
            "nonce_B in the place of r", "commitment", by.says(READY, bytes.fromhex(case["bob"]["nonce"]))
        )
        yield Refusal("the r of another session", "commitment", by.says(READY, bytes.fromhex(other["r"])))
    in_reply_to = b"\1" * 32 if sender is ALICE else bytes(32)
    yield Refusal("in reply to something else", "in_reply_to", by.says(READY, by.ready, in_reply_to))
    if sender is BOB:
        wrong = by.says(READY, flip(by.ready, 0), in_reply_to)
        yield Refusal("in reply to something else, another r", "in_reply_to", wrong)
        yield Refusal("CLOSE with r", "body length", by.says(CLOSE, by.ready))
        yield Refusal("CLOSE, in reply to nothing", "in_reply_to", by.says(CLOSE, in_reply_to=bytes(32)))
        never = by.says(CLOSE, in_reply_to=bytes(31) + b"\1")
        yield Refusal("CLOSE, in reply to what was never said", "in_reply_to", never)


def refused_turns(by: Insider) -> Iterator[Refusal]:
    """What its receiver refuses out of turn."""
    yield Refusal("TEXT", "turn", by.says(TEXT))
    yield Refusal(
        "TEXT, in reply to what was never said", "turn", by.says(TEXT, in_reply_to=bytes(31) + b"\1")
    )
    yield Refusal("TEXT, not UTF-8", "utf-8", by.says(TEXT, b"\xff"))
    yield Refusal(
        "CLOSE, in reply to what was never said", "in_reply_to", by.says(CLOSE, in_reply_to=bytes(31) + b"\1")
    )
    yield Refusal("CLOSE, in reply to the one before", "in_reply_to", by.says(CLOSE, in_reply_to=by.before))
    yield Refusal("CLOSE, in reply to two before", "in_reply_to", by.says(CLOSE, in_reply_to=by.two_before))


def refused_first_goodbyes(by: Insider) -> Iterator[Refusal]:
    """What its receiver refuses when there is no record before his latest that a CLOSE could name."""
    yield Refusal("CLOSE, in reply to nothing", "in_reply_to", by.says(CLOSE, in_reply_to=bytes(32)))
    yield Refusal("CLOSE, in reply to the sender's own", "in_reply_to", by.says(CLOSE, in_reply_to=by.own))


# ----------------------------------------------------------------------------------------------- transcripts


def entries(case: Json, records: int | None = None) -> list[bytes]:
    """The entries of a transcript of the first so many records, or of all of them."""
    hellos = [side[:1].encode() + bytes.fromhex(case[side]["hello"]) for side in ("bob", "alice")]
    said = (Role(record["sender"]).tag + wire(record) for record in case["records"][:records])
    return [*hellos, b"z" + bytes.fromhex(case["z"]), *said]


def joined(parts: Iterable[bytes]) -> str:
    return b"".join(map(frame, parts)).hex()


def valid_transcripts(cases: dict[str, Json]) -> Iterator[Json]:
    """Files that a reader takes, by who kept them."""
    crossed, by = [name for name in cases if "crossed" in name], Insider(cases[PLAIN.name], 2, BOB)
    no: Json = {"sender": "bob", "type": "CLOSE", "text": ""}
    rows: list[tuple[str, str, int | None, int | None, bytes]] = [
        ("ended by Alice", PLAIN.name, None, None, b""),
        ("ended by Bob, out of turn", BOB_LEAVES.name, None, None, b""),
        ("cut in Alice's turn, without a goodbye", PLAIN.name, 4, None, b""),
        ("cut in Bob's turn, without a goodbye", OTHER.name, None, None, b""),
        ("cut before anything was said", PLAIN.name, 2, None, b""),
        ("Bob says no: his CLOSE is record 1, out of turn", PLAIN.name, 2, None, by.says(CLOSE)),
        ("p and an RSA key of 257 bytes", ODD.name, None, None, b""),
        ("not ASCII", NOT_ASCII.name, None, None, b""),
        *((f"{name}: in the other's file", name, None, None, b"") for name in crossed),
        *((f"{name}: in the leaver's own file", name, None, -2, b"") for name in crossed),
    ]
    for name, of, records, left_out, last in rows:
        case = cases[of]
        said, parts = case["records"][:records], entries(case, records)
        if left_out:
            said, parts = [*said[:-2], said[-1]], [*parts[:-2], parts[-1]]
        if last:
            said, parts = [*said, no], [*parts, b"B" + last]
        messages = [
            {"from": each["sender"], "type": each["type"], "text": each["text"], "crossed": False}
            for each in said
        ]
        messages[-1]["crossed"] = "other's file" in name
        yield {"name": name, "file": joined(parts), "words": case["words"], "messages": messages}


def refused_transcripts(cases: dict[str, Json]) -> Iterator[Json]:
    """Files that a reader refuses."""
    short, plain, other = (cases[plan.name] for plan in (SHORT, PLAIN, OTHER))
    bob, alice, z, ready_alice, ready_bob, request, reply, goodbye = whole = entries(short)
    long = entries(plain)

    def row(name: str, check: str, *parts: bytes, tail: bytes = b"", told: tuple[int, ...] = ()) -> Json:
        return {"name": name, "file": joined(parts) + tail.hex(), "reason": MESSAGES[check].format(*told)}

    def hello(entry: bytes, at: int, value: bytes) -> bytes:
        """A hello with another value in one field."""
        fields = chat.decode_fields(entry[1:])
        fields[at] = value
        return entry[:1] + encode_fields(*fields)

    def says(after: int, sender: Role, *arguments: Any) -> bytes:
        return sender.tag + Insider(short, after, sender).says(*arguments)

    yield row("empty", "beginning")
    yield row("a text file", "beginning", tail=b"Bob: I owe you 1000\n")
    yield row("an empty frame", "beginning", b"")
    yield row("Bob's hello is missing", "beginning", *whole[1:])
    yield row("Alice's hello is missing", "order", bob, z, ready_alice, ready_bob)
    yield row("the hellos the other way round", "beginning", alice, bob, *whole[2:])
    yield row("Z is missing", "order", bob, alice, ready_alice, ready_bob)
    yield row("records 0 the other way round", "order", bob, alice, z, ready_bob, ready_alice)
    yield row("Alice's READY is missing", "order", bob, alice, z, ready_bob)
    yield row("a request in the place of Bob's READY", "order", bob, alice, z, ready_alice, request)
    for parts, what in enumerate(("Bob's hello", "both hellos", "Z", "Alice's READY"), 1):
        yield row(f"it ends after {what}", "order", *whole[:parts])
    yield row("an empty frame after Bob's hello", "order", bob, b"", alice)
    yield row("a frame of no tag after the READYs", "entry", *whole[:5], b"", request)
    yield row("an unknown tag", "entry", *whole[:5], b"x" + request[1:])
    yield row("a tag in lower case", "entry", *whole[:5], b"b" + reply[1:])
    yield row("Z again", "entry", *whole[:5], z)
    yield row("another conversation without a goodbye before it", "entry", *entries(other), *whole)
    yield row("another conversation after the goodbye", "after CLOSE", *whole, *whole)
    yield row("the goodbye again", "after CLOSE", *whole, goodbye)
    yield row("an empty frame after the goodbye", "after CLOSE", *whole, b"")
    yield row("a byte after the goodbye", "after CLOSE", *whole, tail=b"\0")
    yield row("it ends inside Bob's hello", "entry cut", tail=frame(bob)[:-1])
    yield row("it ends inside Z", "entry cut", bob, alice, tail=frame(z)[:5])
    yield row("it ends inside Alice's READY", "entry cut", bob, alice, z, tail=frame(ready_alice)[:-1])
    yield row("it ends inside a request", "entry cut", *whole[:5], tail=frame(request)[:99])
    yield row("it ends inside the goodbye", "entry cut", *whole[:7], tail=frame(goodbye)[:-1])
    for what, before, tag, limit in (
        ("Bob's hello", [], b"b", 8192),
        ("Alice's hello", [bob], b"a", 8192),
        ("Z", [bob, alice], b"z", 512),
        ("Alice's READY", [bob, alice, z], b"A", 4096),
        ("Bob's READY", [bob, alice, z, ready_alice], b"B", 4096),
        ("a request", whole[:5], b"A", 1049372),
    ):
        tail = (limit + 2).to_bytes(4, "big") + tag
        yield row(f"{what} over the limit", "entry length", *before, tail=tail, told=(limit + 1, limit))
    composite, one, minus_one = rsa_key("mallory", 2048).n, bytes(255) + b"\1", int(short["p"], 16) - 1
    bob_key = bytes.fromhex(short["bob"]["public_key"])
    yield row("p composite", "p safe prime", hello(bob, 2, chat.to_bytes(composite)), *whole[1:4])
    yield row("B = 1", "public value subgroup", hello(bob, -2, one), *whole[1:4])
    yield row(
        "A = p - 1", "public value subgroup", bob, hello(alice, -2, chat.to_bytes(minus_one)), *whole[2:4]
    )
    yield row("a P-256 key", "rsa type", bob, hello(alice, -1, P256), *whole[2:4])
    yield row("both keys the same", "one key", bob, hello(alice, -1, bob_key), *whole[2:4])
    yield row("Z without its zero byte", "z length", bob, alice, b"z" + z[1:].lstrip(b"\0"), ready_alice)
    yield row("Z and a zero byte", "z length", bob, alice, b"z\0" + z[1:], ready_alice)
    yield row("another Z", "signature", bob, alice, flip(z, -1), ready_alice)
    yield row("another nonce_A", "signature", bob, hello(alice, 1, bytes(32)), z, ready_alice)
    yield row("another conversation's READY", "signature", bob, alice, z, long[3])
    yield row("Alice's CLOSE in the place of her READY", "ready", bob, alice, z, says(0, ALICE, CLOSE))
    yield row("Bob was busy", "order", bob, alice, z, ready_alice, says(1, BOB, CLOSE))
    yield row("Alice's READY with a body", "body length", bob, alice, z, says(0, ALICE, READY, b"x"))
    yield row("Bob's READY without r", "body length", bob, alice, z, ready_alice, says(1, BOB, READY, b""))
    other_r = flip(bytes.fromhex(short["r"]), 0)
    yield row("another r", "commitment", bob, alice, z, ready_alice, says(1, BOB, READY, other_r))
    yield row("a reply tagged as a request", "signature", *whole[:5], b"A" + reply[1:])
    yield row("the reply before the request", "turn", *whole[:5], reply, request)
    yield row("a request is missing", "turn", *long[:7], long[8])
    yield row("a reply is missing", "turn", *whole[:6], says(3, ALICE, TEXT))
    yield row("a round is missing", "number", *long[:5], *long[7:8], told=(2, 1))
    yield row("a request twice", "number", *whole[:6], request, told=(1, 2))
    changed = says(2, ALICE, TEXT, b"I owe you 1 coin")
    yield row("a request that its sender changed later", "in_reply_to", *whole[:5], changed, reply)
    nothing, own = bytes(32), bytes.fromhex(short["records"][0]["signed"])
    for what, after, sender, in_reply_to in (
        ("nothing, as Alice's record 1", 2, ALICE, nothing),
        ("nothing, as Bob's record 1", 2, BOB, nothing),
        ("nothing, out of turn", 3, ALICE, nothing),
        ("two before", 4, ALICE, nothing),
        ("the sender's own record", 4, ALICE, own),
    ):
        goodbye = says(after, sender, CLOSE, b"", in_reply_to)
        yield row(f"a goodbye to {what}", "in_reply_to", *whole[: after + 3], goodbye)
    yield row("a goodbye with a text", "body length", *whole[:7], says(4, ALICE, CLOSE, b"x"))


# ------------------------------------------------------------------------------------------------- all files


def files() -> dict[str, str]:
    """Return what is in the files, by their names."""
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
    for after, sender in (
        *((0, ALICE), (1, BOB), (2, ALICE), (2, BOB)),
        *((5, BOB), (6, ALICE), (5, ALICE), (6, BOB)),
    ):
        by = Insider(plain, after, sender)
        whose = f"{sender.value.title()}'s record {by.number}"
        in_turn = plain["records"][after]["sender"] == sender.value
        whose += "" if in_turn else ", out of turn"
        if after == 2:
            refusals = list(refused_first_goodbyes(by))
        elif not in_turn:
            refusals = list(refused_turns(by))
        elif after < 2:
            refusals = list(refused_ready(plain, other, after, sender, by))
        else:
            refusals = [*refused_bodies(plain, other, after, sender, by), *refused_texts(by)]
            refusals = refusals if sender is ALICE else one_a_check(refusals)
        refused += (each.describe(plain, sender.peer, after, "record", whose) for each in refusals)
    transcripts = {"valid": list(valid_transcripts(cases)), "refused": list(refused_transcripts(cases))}
    contents: dict[str, Json] = {
        "conversations.json": {"about": ABOUT_CONVERSATIONS, "cases": list(cases.values())},
        "refused.json": {"about": ABOUT_REFUSED, "cases": refused},
        "transcripts.json": {"about": ABOUT_TRANSCRIPTS, **transcripts},
    }
    return {name: json.dumps(content, indent=1) + "\n" for name, content in contents.items()}


if __name__ == "__main__":
    for name, text in files().items():
        Path(__file__).with_name(name).write_bytes(text.encode("ascii"))
