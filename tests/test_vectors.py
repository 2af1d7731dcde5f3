"""Whole conversations and transcripts, and what is to be refused: by the programs, and by a second reading.

The second reading of the README is slow and plain, and shares nothing with crypto_utils, so that the vectors
are not only the programs' opinion of themselves. Whoever writes another peer can check it with them.
"""

from __future__ import annotations

import functools
import io
import json
import re
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from conftest import ROOT, loopback
from Crypto.Cipher import AES
from Crypto.PublicKey import RSA
from Crypto.Util.RFC1751 import wordlist
from vectors import make

import alice_client
import bob_server
import crypto_utils as chat
from crypto_utils import (
    FrameSocket,
    Group,
    KeyStore,
    Offer,
    Opener,
    PinnedPeer,
    RecordType,
    Role,
    Sealer,
    Transcript,
)

Json = dict[str, Any]
FOLDER = Path(__file__).with_name("vectors")
CONVERSATIONS, REFUSED, TRANSCRIPTS = (
    json.loads((FOLDER / f"{name}.json").read_text(encoding="ascii"))
    for name in ("conversations", "refused", "transcripts")
)
CASES: dict[str, Json] = {case["name"]: case for case in CONVERSATIONS["cases"]}
REFUSALS: dict[str, Json] = {case["name"]: case for case in REFUSED["cases"]}
VALID: dict[str, Json] = {case["name"]: case for case in TRANSCRIPTS["valid"]}
INVALID: dict[str, Json] = {case["name"]: case for case in TRANSCRIPTS["refused"]}
LARGE = ("ffdhe3072", "ffdhe4096", "ended by Bob, out of turn", "p and an RSA key of 257 bytes")
CHECKS_OF_A_HELLO = (
    *("fields", "version", "field count", "nonce length", "integer length", "integer encoding"),
    *("p size", "p even", "p safe prime", "g subgroup"),
    *("rsa size of DER", "rsa type", "rsa parse", "rsa bits", "rsa exponent", "rsa encoding"),
    *("public value length", "public value subgroup", "one key"),
)
CHECKS_OF_A_RECORD = (
    *("record length", "number", "signature", "tag"),
    *("padding", "too short", "type", "ready", "body length", "utf-8", "turn", "in_reply_to", "commitment"),
)
unhex = bytes.fromhex


@pytest.fixture(autouse=True, scope="module")
def primes_are_tested_once() -> Iterator[None]:
    """The vectors have few primes, and 64 rounds take a while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "is_safe_prime", functools.cache(chat.is_safe_prime))
        yield


# ------------------------------------------------------------------------------------------- the files


def plain(names: Iterable[str]) -> list[Any]:
    """Let plain pytest pass over those of the names whose numbers take long."""
    return [
        pytest.param(name, marks=pytest.mark.exhaustive) if name.startswith(LARGE) else name for name in names
    ]


def test_the_files_are_whole_and_say_what_is_in_them() -> None:
    assert len(CONVERSATIONS["cases"]) == len(CASES) == 14
    assert len(REFUSED["cases"]) == len(REFUSALS) == 208
    assert len(TRANSCRIPTS["valid"]) == len(VALID) == 12
    assert len(TRANSCRIPTS["refused"]) == len(INVALID) == 63
    for field, checks in (("hello", CHECKS_OF_A_HELLO), ("record", CHECKS_OF_A_RECORD)):
        assert {case["check"] for case in REFUSALS.values() if field in case} == set(checks)
        assert ", ".join(checks) in REFUSED["about"]["check"]
    for file, cases in (
        (CONVERSATIONS, CONVERSATIONS["cases"]),
        (REFUSED, REFUSED["cases"]),
        (TRANSCRIPTS, TRANSCRIPTS["valid"] + TRANSCRIPTS["refused"]),
    ):
        explained = {name for names in file["about"] for name in names.split(", ")}
        assert set(every_key(cases)) <= explained


def every_key(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from every_key(part)


def test_the_program_that_made_them_makes_them_again() -> None:
    for name, text in make.files().items():
        assert (FOLDER / name).read_bytes() == text.encode(), name


def test_the_rare_cases_are_there() -> None:
    """A zero byte where it is easily lost, texts about the padding, and every way to say goodbye."""
    values, exponents = (
        CASES[f"{what} that begin with a zero byte"] for what in ("public values", "exponents and nonces")
    )
    keys = CASES["modp 2048, both keys begin with a zero byte, never closed"]
    z = CASES["Z and signatures begin with a zero byte"]
    zeros = [z["z"], keys["bob->alice"]["key"], keys["alice->bob"]["key"], exponents["r"]]
    for side in ("bob", "alice"):
        zeros += [values[side]["public_value"], exponents[side]["exponent"], exponents[side]["nonce"]]
        zeros.append(min(record["signature"] for record in z["records"] if record["sender"] == side))
    assert len(zeros) == 12
    assert {value[:2] for value in zeros} == {"00"}
    lengths = {len(record["text"].encode()) for case in CASES.values() for record in case["records"]}
    assert {0, 221, 222, 223, 478} <= lengths
    goodbyes = {
        (record["sender"], in_turn, crossed)
        for case in CASES.values()
        for record, in_turn, crossed in with_turns(case)
        if record["type"] == "CLOSE"
    }
    assert goodbyes == {
        *(("alice", True, False), ("alice", False, False), ("alice", True, True)),
        *(("bob", True, True), ("bob", False, False), ("bob", True, False)),  # the last one: he is busy
    }


def with_turns(case: Json) -> Iterator[tuple[Json, bool, bool]]:
    """Each record, whether it was its sender's turn, and whether it crossed the other side's latest."""
    said = {"alice": [NOTHING], "bob": [NOTHING]}
    for record in case["records"]:
        mine, others = said[record["sender"]], said[PEER[record["sender"]]]
        in_turn = len(mine) - len(others) == (0 if record["sender"] == "alice" else -1)
        yield record, in_turn, unhex(record["in_reply_to"]) != others[-1]
        mine.append(unhex(record["signed"]))


# ------------------------------------------------------------------------------------------- a plain reading

PEER = {"bob": "alice", "alice": "bob"}
NOTHING = bytes(32)
TYPES = ("READY", "TEXT", "CLOSE")
ALGORITHM = unhex("300d06092a864886f70d0101010500")  # rsaEncryption, NULL


def number(data: bytes) -> int:
    return int.from_bytes(data, "big")


def minimal(value: int) -> bytes:
    return value.to_bytes((value.bit_length() + 7) // 8, "big")


def digest(*parts: bytes) -> bytes:
    return sha256(b"".join(parts)).digest()


def field(data: bytes) -> bytes:
    return len(data).to_bytes(2, "big") + data


def framed(payload: bytes) -> bytes:
    return len(payload).to_bytes(4, "big") + payload


def der(tag: int, *contents: bytes) -> bytes:
    body = b"".join(contents)
    length = minimal(len(body))
    return bytes([tag]) + (length if len(body) < 128 else bytes([128 + len(length)]) + length) + body


def spki(n: int) -> bytes:
    """SubjectPublicKeyInfo of an RSA key with e = 65537 (RFC 8017, A.1): a zero byte before a set top bit."""
    integers = (der(2, value.to_bytes(value.bit_length() // 8 + 1, "big")) for value in (n, 65537))
    return der(0x30, ALGORITHM, der(3, b"\0", der(0x30, *integers)))


def emsa_pss(signed: bytes, salt: bytes, bits: int) -> int:
    """RFC 8017, 9.1.1, with SHA-256 and a 32-byte salt."""
    length = (bits + 7) // 8
    h = digest(bytes(8), signed, salt)
    block = bytes(length - 66) + b"\1" + salt
    masked = number(block) ^ mgf1(h, length - 33)
    return (masked << 264 | number(h) << 8 | 0xBC) & (1 << bits) - 1


def mgf1(seed: bytes, length: int) -> int:
    return number(b"".join(digest(seed, i.to_bytes(4, "big")) for i in range(length))[:length])


def is_pss(em: int, signed: bytes, bits: int) -> bool:
    """Take the salt out, and encode again."""
    h, masked = (em >> 8) % (1 << 256), em >> 264
    salt = (masked ^ mgf1(minimal(h).rjust(32, b"\0"), (bits + 7) // 8 - 33)) % (1 << 256)
    return em == emsa_pss(signed, salt.to_bytes(32, "big"), bits)


def direction(sender: str) -> str:
    return f"{sender}->{PEER[sender]}"


def derived(sender: str, z: bytes, th: bytes) -> tuple[bytes, bytes]:
    """K and C of a direction."""
    info = b"secure-chat/1 key " + direction(sender).encode() + th
    return digest(bytes([0, 0, 0, 1]), z, info), digest(bytes([0, 0, 0, 2]), z, info)


def commitment(r: bytes) -> bytes:
    return digest(b"secure-chat/1 commit ", r)


def words(th: bytes, r: bytes) -> str:
    """RFC 1751 of 64 bits: with the sum of their pairs behind them, six numbers of 11 bits."""
    bits = f"{number(digest(b'secure-chat/1 words ', th, r)[:8]):064b}"
    parity = sum(int(bits[at : at + 2], 2) for at in range(0, 64, 2)) % 4
    bits += f"{parity:02b}"
    return " ".join(wordlist[int(bits[at : at + 11], 2)].lower() for at in range(0, 66, 11))


@functools.cache
def private_key(pem: str) -> RSA.RsaKey:
    return RSA.import_key(pem)


def read(case: Json) -> Json:
    """The whole conversation again, from what was drawn and what was said."""
    p, g = int(case["p"], 16), int(case["g"], 16)
    size = len(minimal(p))
    made: Json = {"name": case["name"], "p": minimal(p).hex(), "g": minimal(g).hex()}
    for side in ("bob", "alice"):
        exponent, nonce = unhex(case[side]["exponent"]), unhex(case[side]["nonce"])
        if side == "bob":
            nonce = commitment(unhex(case["r"]))
        public_key = spki(private_key(case[side]["private_key"]).n)
        public_value = pow(g, number(exponent), p).to_bytes(size, "big")
        group = (minimal(p), minimal(g)) if side == "bob" else ()
        hello = b"".join(map(field, (b"secure-chat/1", nonce, *group, public_value, public_key)))
        made[side] = {
            "private_key": case[side]["private_key"],
            "public_key": public_key.hex(),
            "nonce": nonce.hex(),
            "exponent": exponent.hex(),
            "public_value": public_value.hex(),
            "hello": hello.hex(),
        }
        assert (len(nonce), len(exponent)) == (32, size // 8)
    th = digest(framed(unhex(made["bob"]["hello"])), framed(unhex(made["alice"]["hello"])))
    a, b = (number(unhex(case[side]["exponent"])) for side in ("alice", "bob"))
    z = pow(int(made["bob"]["public_value"], 16), a, p).to_bytes(size, "big")
    assert z == pow(int(made["alice"]["public_value"], 16), b, p).to_bytes(size, "big")
    made |= {
        "r": case["r"],
        "th": th.hex(),
        "z": z.hex(),
        "words": words(th, unhex(case["r"])),
        "records": [],
    }
    for sender in PEER:
        k, c = derived(sender, z, th)
        made[direction(sender)] = {"key": k.hex(), "commitment": c.hex()}
    said = {"alice": [NOTHING], "bob": [NOTHING]}
    for record, _, crossed in with_turns(case):
        sender = record["sender"]
        k, c = derived(sender, z, th)
        assert not crossed or record["type"] == "CLOSE"
        in_reply_to = said[PEER[sender]][-2 if crossed else -1]
        body = unhex(case["r"]) if (sender, record["type"]) == ("bob", "READY") else record["text"].encode()
        plaintext = bytes([TYPES.index(record["type"])]) + in_reply_to + body + b"\x80"
        plaintext += bytes(-len(plaintext) % 256)
        nonce = (len(said[sender]) - 1).to_bytes(12, "big")
        ciphertext, tag = AES.new(k, AES.MODE_GCM, nonce=nonce).encrypt_and_digest(plaintext)
        signed = digest(
            b"secure-chat/1 signature ", direction(sender).encode(), th, c, nonce, ciphertext, tag
        )
        said[sender].append(signed)
        n, signature = private_key(case[sender]["private_key"]).n, unhex(record["signature"])
        assert len(signature) == len(minimal(n))
        assert number(signature) < n  # and no other such number has this power
        assert pow(number(signature), 65537, n) == emsa_pss(signed, unhex(record["salt"]), n.bit_length() - 1)
        made["records"].append(
            {
                "sender": sender,
                "number": number(nonce),
                "type": record["type"],
                "text": record["text"],
                "in_reply_to": in_reply_to.hex(),
                "plaintext": plaintext.hex(),
                "nonce": nonce.hex(),
                "ciphertext": ciphertext.hex(),
                "tag": tag.hex(),
                "signed": signed.hex(),
                "salt": record["salt"],
                "signature": signature.hex(),
            }
        )
    return made


@pytest.mark.parametrize("name", plain(CASES))
def test_the_specification_read_plainly_makes_the_same(name: str) -> None:
    assert read(CASES[name]) == CASES[name]


def test_the_examples_in_the_readme_are_right() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    th, r = digest(framed(b"bob"), framed(b"alice")), b"\1" * 32
    keys = {
        f"{direction(side)}, {name}": k for side in PEER for name, k in zip("KC", derived(side, b"\2\3", th))
    }
    assert len(keys) == 4
    rows = {
        **{name: value.hex() for name, value in keys.items()},
        "th = SHA-256(00000003 626f62 00000005 616c696365)\n": f"{th.hex():>80}",
        "nonce_B ": commitment(r).hex(),
        "SHA-256(...)": digest(b"secure-chat/1 words ", NOTHING, r).hex(),
        "words ": words(NOTHING, r),
    }
    for name, value in rows.items():
        assert re.search(rf"^    {re.escape(name)} *{value.strip()}$", readme, re.MULTILINE), name


@functools.cache
def passes_fermat(n: int) -> bool:
    return pow(3, n - 1, n) == 1


@functools.cache
def is_member(y: int, p: int) -> bool:
    return 2 <= y <= p - 2 and pow(y, (p - 1) // 2, p) == 1


class PlainHello(NamedTuple):
    nonce: bytes
    p: int
    n: int
    public_key: bytes


def hello_refused(sender: str, hello: bytes, p: int = 0, own_key: bytes = b"") -> str | PlainHello:
    """The first check that fails, in crypto_utils.py's order, or what is in it. For Alice's, `p` is Bob's."""
    fields = []
    while hello:
        length = number(hello[:2])
        if len(hello) < 2 + length:
            return "fields"
        fields.append(hello[2 : 2 + length])
        hello = hello[2 + length :]
    if fields[:1] != [b"secure-chat/1"]:
        return "version"
    if len(fields) != (6 if sender == "bob" else 4):
        return "field count"
    _, nonce, *group, y, rsa = fields
    if len(nonce) != 32:
        return "nonce length"
    if max(map(len, group), default=0) > 512:
        return "integer length"
    if any(data[:1] == b"\0" for data in group):
        return "integer encoding"
    p, g = map(number, group) if group else (p, 4)
    if not 2048 <= p.bit_length() <= 4096:
        return "p size"
    if p % 2 == 0:
        return "p even"
    if not (passes_fermat(p) and passes_fermat((p - 1) // 2)):
        return "p safe prime"
    if not is_member(g, p):
        return "g subgroup"
    if check := key_refused(rsa):
        return check
    if len(y) != len(minimal(p)):
        return "public value length"
    if not is_member(number(y), p):
        return "public value subgroup"
    if rsa == own_key:
        return "one key"
    return PlainHello(nonce, p, modulus_of(rsa), rsa)


def modulus_of(key: bytes) -> int:
    """The modulus in SubjectPublicKeyInfo, or an exception."""
    info, nothing = take(0x30, key)
    bits, nothing_more = take(3, info[len(ALGORITHM) :])
    pair, nothing_at_all = take(0x30, bits[1:])
    n, rest = take(2, pair)
    e, trailing = take(2, rest)
    if nothing + nothing_more + nothing_at_all + trailing or bits[0]:
        raise ValueError
    if number(e) != 65537:
        raise OverflowError
    return number(n)


def key_refused(key: bytes) -> str | None:
    if len(key) > 1024:
        return "rsa size of DER"
    if ALGORITHM not in key[:19]:
        return "rsa type"
    try:
        n = modulus_of(key)
    except OverflowError:
        return "rsa exponent"
    except (ValueError, IndexError):
        return "rsa parse"
    if not 2048 <= n.bit_length() <= 4096:
        return "rsa bits"
    return "rsa encoding" if key != spki(n) else None


def take(tag: int, data: bytes) -> tuple[bytes, bytes]:
    """The contents of a DER value, and what follows it."""
    length, start = data[1], 2
    if length > 127:
        start += length - 128
        length = number(data[2:start])
    if data[: start + length] != der(tag, data[start : start + length]):
        raise ValueError
    return data[start : start + length], data[start + length :]


class Conversation:
    """What a reader knows of a conversation, and the hashes of what was signed in it so far."""

    def __init__(self, moduli: dict[str, int], z: bytes, th: bytes, nonce_b: bytes) -> None:
        self.moduli, self.z, self.th, self.nonce_b = moduli, z, th, nonce_b
        self.said = {"alice": [NOTHING, NOTHING], "bob": [NOTHING, NOTHING]}
        self.words = ""

    @classmethod
    def of(cls, case: Json, after: int) -> Conversation:
        """One of the vectors, when so many records have been exchanged."""
        moduli = {side: private_key(case[side]["private_key"]).n for side in PEER}
        self = cls(moduli, unhex(case["z"]), unhex(case["th"]), unhex(case["bob"]["nonce"]))
        for record in case["records"][:after]:
            self.said[record["sender"]].append(unhex(record["signed"]))
        return self

    def opened(self, sender: str, data: bytes) -> str | Json:
        """The first check that fails, in the README's order, or what the record says."""
        mine, others = self.said[sender], self.said[PEER[sender]]
        expected, n = len(mine) - 2, self.moduli[sender]
        split = len(data) - len(minimal(n))
        if split < 12 + 256 + 16 or (split - 12 - 16) % 256:
            return "record length"
        body, signature = data[:split], data[split:]
        if number(body[:12]) != expected:
            return "number"
        k, c = derived(sender, self.z, self.th)
        signed = digest(b"secure-chat/1 signature ", direction(sender).encode(), self.th, c, body)
        if number(signature) >= n or not is_pss(pow(number(signature), 65537, n), signed, n.bit_length() - 1):
            return "signature"
        try:
            plaintext = AES.new(k, AES.MODE_GCM, nonce=body[:12]).decrypt_and_verify(body[12:-16], body[-16:])
        except ValueError:
            return "tag"
        marked = plaintext.rstrip(b"\0")
        if marked[-1:] != b"\x80" or len(plaintext) - len(marked) > 255:
            return "padding"
        if len(marked) - 1 < 33:
            return "too short"
        in_reply_to, body = marked[1:33], marked[33:-1]
        if marked[0] >= len(TYPES):
            return "type"
        what = TYPES[marked[0]]
        first = ("READY", "CLOSE") if sender == "bob" else ("READY",)
        if what not in (("TEXT", "CLOSE") if expected else first):
            return "ready"
        shortest = 32 if (sender, what) == ("bob", "READY") else 0
        if not shortest <= len(body) <= (1 << 20 if what == "TEXT" else shortest):
            return "body length"
        try:
            text = body.decode() if what == "TEXT" else ""
        except UnicodeDecodeError:
            return "utf-8"
        in_turn = len(mine) - len(others) == (0 if sender == "alice" else -1)
        if not in_turn and what != "CLOSE":
            return "turn"
        crossed = in_reply_to != others[-1]
        if crossed and not (in_turn and what == "CLOSE" and in_reply_to == others[-2] != NOTHING):
            return "in_reply_to"
        if (sender, what) == ("bob", "READY"):
            if commitment(body) != self.nonce_b:
                return "commitment"
            self.words = words(self.th, body)
        mine.append(signed)
        return {"from": sender, "type": what, "text": text, "crossed": crossed}


@pytest.mark.parametrize("name", plain(CASES))
def test_the_specification_read_plainly_refuses_nothing_of_a_conversation(name: str) -> None:
    case = CASES[name]
    hellos = {side: hello_refused(side, unhex(case[side]["hello"]), int(case["p"], 16)) for side in PEER}
    assert not any(isinstance(hello, str) for hello in hellos.values())
    conversation = Conversation.of(case, 0)
    for record in case["records"]:
        opened = conversation.opened(record["sender"], wire(record))
        assert (opened["type"], opened["text"]) == (record["type"], record["text"])
    assert conversation.words == ("" if case["name"] == make.BUSY.name else case["words"])


@pytest.mark.parametrize("name", REFUSALS)
def test_the_specification_read_plainly_refuses_it_by_that_check(name: str) -> None:
    refusal = REFUSALS[name]
    case, receiver = CASES[refusal["case"]], refusal["receiver"]
    if "hello" in refusal:
        own_key = unhex(case[receiver]["public_key"])
        found = hello_refused(PEER[receiver], unhex(refusal["hello"]), int(case["p"], 16), own_key)
    else:
        found = Conversation.of(case, refusal["after"]).opened(PEER[receiver], unhex(refusal["record"]))
    assert found == refusal["check"]


def wire(record: Json) -> bytes:
    return unhex("".join(record[part] for part in ("nonce", "ciphertext", "tag", "signature")))


def transcript_refused(data: bytes) -> str | tuple[str, list[Json]]:
    """The first check that fails, or the words of the file and what it proves."""
    beginning = [("b", 8192), ("a", 8192), ("z", 512), ("A", 4096), ("B", 4096)]
    found: dict[str, bytes] = {}
    conversation, messages = None, []
    while data or beginning:
        length, tag = number(data[:4]), data[4:5].decode("latin-1")
        expected, limit = beginning.pop(0) if beginning else ("AB", 1049372)
        if not tag or tag not in expected:
            return {"b": "beginning", "AB": "entry"}.get(expected, "order")
        if length - 1 > limit:
            return "entry length"
        if len(data) < 4 + length:
            return "entry cut"
        found[tag], data = data[5 : 4 + length], data[4 + length :]
        if tag in "baz":
            continue
        conversation = conversation or begun(found)
        if isinstance(conversation, str):
            return conversation
        message = conversation.opened("alice" if tag == "A" else "bob", found[tag])
        if isinstance(message, str):
            return message
        if expected == "B" and message["type"] == "CLOSE":
            return "order"
        messages.append(message)
        if message["type"] == "CLOSE" and data:
            return "after CLOSE"
    assert isinstance(conversation, Conversation)
    return conversation.words, messages


def begun(found: dict[str, bytes]) -> str | Conversation:
    """The first check of both hellos and Z that fails, or the conversation."""
    bob = hello_refused("bob", found["b"])
    alice = bob if isinstance(bob, str) else hello_refused("alice", found["a"], bob.p, bob.public_key)
    if isinstance(bob, str) or isinstance(alice, str):
        return str(alice)
    if len(found["z"]) != len(minimal(bob.p)):
        return "z length"
    th = digest(framed(found["b"]), framed(found["a"]))
    return Conversation({"bob": bob.n, "alice": alice.n}, found["z"], th, bob.nonce)


@pytest.mark.parametrize("name", plain(VALID))
def test_the_specification_read_plainly_takes_the_transcript(name: str) -> None:
    case = VALID[name]
    assert transcript_refused(unhex(case["file"])) == (case["words"], case["messages"])


@pytest.mark.parametrize("name", INVALID)
def test_the_specification_read_plainly_refuses_the_transcript_for_that_reason(name: str) -> None:
    found = transcript_refused(unhex(INVALID[name]["file"]))
    assert isinstance(found, str)
    if "{" in make.MESSAGES[found]:
        assert INVALID[name]["reason"].startswith(make.MESSAGES[found].split("{")[0])
    else:
        assert INVALID[name]["reason"] == make.MESSAGES[found]


# ------------------------------------------------------------------------------------------ the programs


class Session:
    """Both ends of a conversation, as crypto_utils makes them from what was drawn."""

    def __init__(self, case: Json) -> None:
        self.case = case
        self.group = Group(int(case["p"], 16), int(case["g"], 16))
        self.identity = {role: private_key(case[role.value]["private_key"]) for role in Role}
        self.offers: dict[Role, Offer] = {}
        for role, key in self.identity.items():
            random = drawn(
                case[role.value]["exponent"], case["r"] if role is Role.BOB else case["alice"]["nonce"]
            )
            self.offers[role] = Offer.make(role, key, self.group, random)
        self.sealers: dict[Role, Sealer] = {}
        self.openers: dict[Role, Opener] = {}  # by who receives
        settled = chat.settle(*(offer.hello for offer in self.offers.values()), self.group)
        for role, offer in self.offers.items():
            key, z = settled.keys[role.peer], offer.shared_secret(settled)
            assert (z.hex(), settled.th.hex()) == (case["z"], case["th"])
            assert chat.public_der(key).hex() == case[role.peer.value]["public_key"]
            self.sealers[role] = Sealer(role, self.identity[role], z, settled.th)
            self.openers[role] = Opener(role.peer, key, z, settled.th)

    def exchange(self, records: int | None = None) -> None:
        """Seal and open the first so many records, or all of them, each as it is in the file."""
        for record in self.case["records"][:records]:
            sender, record_type = Role(record["sender"]), RecordType[record["type"]]
            sealer, opener = self.sealers[sender], self.openers[sender.peer]
            assert sealer.number == opener.number == record["number"]
            in_reply_to = unhex(record["in_reply_to"])
            heard = SimpleNamespace(number=self.openers[sender].number, latest=in_reply_to)
            r = record_type is RecordType.READY and sender is Role.BOB
            body = unhex(self.case["r"]) if r else record["text"].encode()
            made = sealer.seal(record_type, body, heard, random=drawn(record["salt"]))
            assert made == wire(record)
            assert sealer.latest.hex() == record["signed"]
            said = opener.open(wire(record), self.sealers[sender.peer])
            assert said[:3] == (record_type, body, in_reply_to)
            assert opener.latest.hex() == record["signed"]


def drawn(*values: str) -> chat.Random:
    """What draws these, one after the other, and nothing else."""
    rest = [unhex(value) for value in reversed(values)]

    def draw(length: int) -> bytes:
        value = rest.pop()
        assert len(value) == length
        return value

    return draw


@pytest.mark.parametrize("name", plain(CASES))
def test_crypto_utils_makes_the_same_and_opens_it_on_both_sides(name: str) -> None:
    case = CASES[name]
    session = Session(case)
    chat.check_group(session.group, rounds=1)
    for role, offer in session.offers.items():
        side = case[role.value]
        assert (offer.hello.hex(), offer.exponent.hex()) == (side["hello"], side["exponent"])
        hello = chat.Hello.decode(role, offer.hello)
        assert hello.group == (session.group if role is Role.BOB else None)
        values = (hello.nonce.hex(), hello.public_value.hex(), hello.rsa.hex())
        assert values == (side["nonce"], side["public_value"], side["public_key"])
    assert chat.commit(unhex(case["r"])).hex() == case["bob"]["nonce"]
    assert " ".join(chat.make_words(unhex(case["th"]), unhex(case["r"]))) == case["words"]
    for role in Role:
        key, commitment = chat.derive_keys(unhex(case["z"]), role.label, unhex(case["th"]))
        assert case[role.label.decode()] == {"key": key.hex(), "commitment": commitment.hex()}
    session.exchange()


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, KeyStore]:
    """A store for each p of the conversations, which remembers it: its prime is not tested again."""
    made = {}
    for case in CASES.values():
        made[case["p"]] = KeyStore(tmp_path_factory.mktemp("store") / "alice")
        made[case["p"]].save_group(Group(int(case["p"], 16), int(case["g"], 16)))
    return made


@pytest.mark.parametrize("name", [name for name, case in REFUSALS.items() if "hello" in case])
def test_crypto_utils_refuses_the_hello_for_that_reason(name: str, stores: dict[str, KeyStore]) -> None:
    refusal = REFUSALS[name]
    case = CASES[refusal["case"]]
    identity, store = private_key(case[refusal["receiver"]]["private_key"]), stores[case["p"]]
    near, far = loopback()
    with near, far:
        far.sendall(framed(unhex(refusal["hello"])))
        with pytest.raises(chat.ProtocolError) as refused:
            if refusal["receiver"] == "bob":
                group = Group(int(case["p"], 16), int(case["g"], 16))
                peer = PinnedPeer(store, "alice")
                bob_server.handshake(FrameSocket(near), identity, group, peer, Lock(), Transcript())
            else:
                peer = PinnedPeer(store, "[bob]:65432")
                alice_client.handshake(FrameSocket(near), identity, store, peer, Transcript())
    assert str(refused.value) == refusal["message"]


@pytest.mark.parametrize("name", [name for name, case in REFUSALS.items() if "record" in case])
def test_crypto_utils_refuses_the_record_for_that_reason(name: str) -> None:
    refusal = REFUSALS[name]
    case, receiver = CASES[refusal["case"]], Role(refusal["receiver"])
    session = Session(case)
    session.exchange(refusal["after"])
    with pytest.raises(chat.ProtocolError) as refused:
        message = session.openers[receiver].open(unhex(refusal["record"]), session.sealers[receiver])
        chat.check_commitment(unhex(case["bob"]["nonce"]), message.body)
    assert str(refused.value) == refusal["message"]


def proven(file: bytes) -> list[Json]:
    """What crypto_utils says that a transcript proves."""
    return [
        {
            "from": opener.sender.value,
            "type": message.type.name,
            "text": "" if message.type is RecordType.READY else message.text,
            "crossed": message.crossed,
        }
        for opener, message in chat.verify_transcript(io.BytesIO(file))
    ]


@pytest.mark.parametrize("name", plain(VALID))
def test_crypto_utils_takes_the_transcript(name: str) -> None:
    assert proven(unhex(VALID[name]["file"])) == VALID[name]["messages"]


@pytest.mark.parametrize("name", INVALID)
def test_crypto_utils_refuses_the_transcript_for_that_reason(name: str) -> None:
    with pytest.raises(chat.ProtocolError) as refused:
        proven(unhex(INVALID[name]["file"]))
    assert str(refused.value) == INVALID[name]["reason"]
