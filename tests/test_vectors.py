"""Whole conversations, and what is to be refused: by the product, and by a reading of the README beside it.

The reading is slow and plain, and shares nothing with crypto_utils, so that tests/vectors/ is not only the
product's opinion of itself. Whoever writes another peer has the same files to check it with.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from conftest import loopback
from Crypto.Cipher import AES
from Crypto.PublicKey import RSA
from vectors import make

import crypto_utils as chat
from crypto_utils import Agreement, Group, Hello, Home, Kind, KnownPeer, Line, Offer, Opener, Role, Sealer

Json = dict[str, Any]
FOLDER = Path(__file__).with_name("vectors")
CONVERSATIONS, REFUSED = (
    json.loads((FOLDER / name).read_text(encoding="ascii")) for name in ("conversations.json", "refused.json")
)
CASES: dict[str, Json] = {case["name"]: case for case in CONVERSATIONS["cases"]}
REFUSALS: dict[str, Json] = {case["name"]: case for case in REFUSED["cases"]}
CHECKS_OF_A_HELLO = (
    *("fields", "version", "field count", "nonce length", "integer length", "integer encoding"),
    *("p size", "p even", "p safe prime", "g subgroup"),
    *("rsa size of DER", "rsa type", "rsa parse", "rsa bits", "rsa exponent", "rsa encoding"),
    *("public value length", "public value subgroup", "own key"),
)
CHECKS_OF_A_RECORD = (
    *("record length", "number", "signature", "tag"),
    *("padding", "too short", "type", "ready", "text length", "utf-8", "turn", "answers"),
)
unhex = bytes.fromhex


# ------------------------------------------------------------------------------------------- the files


def test_both_files_are_whole_and_say_what_is_in_them() -> None:
    assert len(CONVERSATIONS["cases"]) == len(CASES) == 14
    assert len(REFUSED["cases"]) == len(REFUSALS) == 202
    for field, checks in (("hello", CHECKS_OF_A_HELLO), ("record", CHECKS_OF_A_RECORD)):
        assert {case["check"] for case in REFUSALS.values() if field in case} == set(checks)
        assert ", ".join(checks) in REFUSED["about"]["check"]
    for file in (CONVERSATIONS, REFUSED):
        explained = {name for names in file["about"] for name in names.split(", ")}
        assert set(every_key(file["cases"])) <= explained


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
    zeros = [z["z"], keys["bob->alice"]["key"], keys["alice->bob"]["key"]]
    for side in ("bob", "alice"):
        zeros += [values[side]["public_value"], exponents[side]["exponent"], exponents[side]["nonce"]]
        zeros.append(min(record["signature"] for record in z["records"] if record["sender"] == side))
    assert len(zeros) == 11
    assert {value[:2] for value in zeros} == {"00"}
    lengths = {len(record["text"].encode()) for case in CASES.values() for record in case["records"]}
    assert {0, 221, 222, 223, 478} <= lengths
    goodbyes = {
        (record["sender"], in_turn, crossed)
        for case in CASES.values()
        for record, in_turn, crossed in with_turns(case)
        if record["kind"] == "CLOSE"
    }
    assert goodbyes == {
        *(("alice", True, False), ("alice", False, False), ("alice", True, True)),
        *(("bob", True, True), ("bob", False, False)),
    }


def with_turns(case: Json) -> Iterator[tuple[Json, bool, bool]]:
    """Each record, whether it was its sender's turn, and whether it crossed the other side's latest."""
    said = {"alice": [NOTHING], "bob": [NOTHING]}
    for record in case["records"]:
        mine, others = said[record["sender"]], said[PEER[record["sender"]]]
        in_turn = len(mine) - len(others) == (0 if record["sender"] == "alice" else -1)
        yield record, in_turn, unhex(record["answers"]) != others[-1]
        mine.append(unhex(record["signed"]))


# ------------------------------------------------------------------------------------------- a plain reading

PEER = {"bob": "alice", "alice": "bob"}
NOTHING = bytes(32)
KINDS = ("READY", "TEXT", "CLOSE")
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


@functools.cache
def private_key(pem: str) -> RSA.RsaKey:
    return RSA.import_key(pem)


def read(case: Json) -> Json:
    """The whole conversation again, from what was drawn and what was said."""
    p, g = int(case["p"], 16), int(case["g"], 16)
    size = len(minimal(p))
    made: Json = {"name": case["name"], "p": minimal(p).hex(), "g": minimal(g).hex()}
    for side in ("bob", "alice"):
        nonce, exponent = (unhex(case[side][drawn]) for drawn in ("nonce", "exponent"))
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
    made |= {"th": th.hex(), "z": z.hex()}
    for direction in ("bob->alice", "alice->bob"):
        info = b"secure-chat/1 key " + direction.encode() + th
        k, c = (digest(bytes([0, 0, 0, block]), z, info) for block in (1, 2))
        made[direction] = {"key": k.hex(), "commitment": c.hex()}
    made["records"] = []
    said = {"alice": [NOTHING], "bob": [NOTHING]}
    for record, _, crossed in with_turns(case):
        sender, kind = record["sender"], KINDS.index(record["kind"])
        direction = f"{sender}->{PEER[sender]}"
        k, c = (unhex(made[direction][name]) for name in ("key", "commitment"))
        assert not crossed or kind == KINDS.index("CLOSE")
        answers = said[PEER[sender]][-2 if crossed else -1]
        plaintext = bytes([kind]) + answers + record["text"].encode() + b"\x80"
        plaintext += bytes(-len(plaintext) % 256)
        nonce = (len(said[sender]) - 1).to_bytes(12, "big")
        ciphertext, tag = AES.new(k, AES.MODE_GCM, nonce=nonce).encrypt_and_digest(plaintext)
        signed = digest(b"secure-chat/1 signature ", direction.encode(), th, c, nonce, ciphertext, tag)
        said[sender].append(signed)
        n, signature = private_key(case[sender]["private_key"]).n, unhex(record["signature"])
        assert len(signature) == len(minimal(n))
        assert number(signature) < n  # and no other such number has this power
        assert pow(number(signature), 65537, n) == emsa_pss(signed, unhex(record["salt"]), n.bit_length() - 1)
        made["records"].append(
            {
                "sender": sender,
                "number": number(nonce),
                "kind": record["kind"],
                "text": record["text"],
                "answers": answers.hex(),
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


@pytest.mark.parametrize("name", CASES)
def test_the_specification_read_plainly_makes_the_same(name: str) -> None:
    assert read(CASES[name]) == CASES[name]


@functools.cache
def passes_fermat(n: int) -> bool:
    return pow(3, n - 1, n) == 1


@functools.cache
def is_member(y: int, p: int) -> bool:
    return 2 <= y <= p - 2 and pow(y, (p - 1) // 2, p) == 1


def hello_refused(case: Json, receiver: str, hello: bytes) -> str | None:
    """The first check that fails, in the README's order."""
    fields = []
    while hello:
        length = number(hello[:2])
        if len(hello) < 2 + length:
            return "fields"
        fields.append(hello[2 : 2 + length])
        hello = hello[2 + length :]
    if fields[:1] != [b"secure-chat/1"]:
        return "version"
    if len(fields) != (6 if receiver == "alice" else 4):
        return "field count"
    _, nonce, *group, y, rsa = fields
    if len(nonce) != 32:
        return "nonce length"
    if max(map(len, group), default=0) > 512:
        return "integer length"
    if any(data[:1] == b"\0" for data in group):
        return "integer encoding"
    p, g = map(number, group) if group else (int(case["p"], 16), int(case["g"], 16))
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
    return "own key" if rsa == unhex(case[receiver]["public_key"]) else None


def key_refused(key: bytes) -> str | None:
    if len(key) > 1024:
        return "rsa size of DER"
    if ALGORITHM not in key[:19]:
        return "rsa type"
    try:
        info, nothing = take(0x30, key)
        bits, nothing_more = take(3, info[len(ALGORITHM) :])
        pair, nothing_at_all = take(0x30, bits[1:])
        n, rest = take(2, pair)
        e, trailing = take(2, rest)
    except (ValueError, IndexError):
        return "rsa parse"
    if nothing + nothing_more + nothing_at_all + trailing or bits[0]:
        return "rsa parse"
    if not 2048 <= number(n).bit_length() <= 4096:
        return "rsa bits"
    if number(e) != 65537:
        return "rsa exponent"
    return "rsa encoding" if key != spki(number(n)) else None


def take(tag: int, data: bytes) -> tuple[bytes, bytes]:
    """The contents of a DER value, and what follows it."""
    length, start = data[1], 2
    if length > 127:
        start += length - 128
        length = number(data[2:start])
    if data[: start + length] != der(tag, data[start : start + length]):
        raise ValueError
    return data[start : start + length], data[start + length :]


def record_refused(case: Json, receiver: str, after: int, data: bytes) -> str | None:
    """The first check that fails, in the README's order, when so many records were exchanged before."""
    sender = PEER[receiver]
    said = {"alice": [NOTHING, NOTHING], "bob": [NOTHING, NOTHING]}
    for record in case["records"][:after]:
        said[record["sender"]].append(unhex(record["signed"]))
    expected, n = len(said[sender]) - 2, private_key(case[sender]["private_key"]).n
    split = len(data) - len(minimal(n))
    if split < 12 + 256 + 16 or (split - 12 - 16) % 256:
        return "record length"
    body, signature = data[:split], data[split:]
    if number(body[:12]) != expected:
        return "number"
    direction = f"{sender}->{receiver}"
    k, c = (unhex(case[direction][name]) for name in ("key", "commitment"))
    signed = digest(b"secure-chat/1 signature ", direction.encode(), unhex(case["th"]), c, body)
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
    kind, answers, text = marked[0], marked[1:33], marked[33:-1]
    if kind >= len(KINDS):
        return "type"
    if (KINDS[kind] == "READY") != (expected == 0):
        return "ready"
    if len(text) > (0 if KINDS[kind] == "READY" else 1 << 20):
        return "text length"
    try:
        text.decode()
    except UnicodeDecodeError:
        return "utf-8"
    in_turn = len(said[sender]) - len(said[receiver]) == (0 if sender == "alice" else -1)
    if not in_turn and KINDS[kind] != "CLOSE":
        return "turn"
    may_have_crossed = in_turn and KINDS[kind] == "CLOSE"
    return None if answers in said[receiver][-2 if may_have_crossed else -1 :] else "answers"


@pytest.mark.parametrize("name", CASES)
def test_the_specification_read_plainly_refuses_nothing_of_a_conversation(name: str) -> None:
    case = CASES[name]
    for receiver, sender in PEER.items():
        assert hello_refused(case, receiver, unhex(case[sender]["hello"])) is None
    for after, record in enumerate(case["records"]):
        assert record_refused(case, PEER[record["sender"]], after, wire(record)) is None


@pytest.mark.parametrize("name", REFUSALS)
def test_the_specification_read_plainly_refuses_it_by_that_check(name: str) -> None:
    refusal = REFUSALS[name]
    case, receiver = CASES[refusal["case"]], refusal["receiver"]
    if "hello" in refusal:
        assert hello_refused(case, receiver, unhex(refusal["hello"])) == refusal["check"]
    else:
        found = record_refused(case, receiver, refusal["after"], unhex(refusal["record"]))
        assert found == refusal["check"]


def wire(record: Json) -> bytes:
    return unhex("".join(record[part] for part in ("nonce", "ciphertext", "tag", "signature")))


# ------------------------------------------------------------------------------------------- the product


class Session:
    """Both ends of a conversation, as crypto_utils makes them from what was drawn."""

    def __init__(self, case: Json) -> None:
        self.case = case
        self.group = Group(int(case["p"], 16), int(case["g"], 16))
        self.identity = {role: private_key(case[role.value]["private_key"]) for role in Role}
        self.offers = {
            role: Offer.make(role, key, self.group, drawn(case[role.value], "exponent", "nonce"))
            for role, key in self.identity.items()
        }
        self.sealers: dict[Role, Sealer] = {}
        self.openers: dict[Role, Opener] = {}  # by who receives
        self.agreements: list[Agreement] = []
        for role, offer in self.offers.items():
            sealer, opener, agreement = offer.agree(self.offers[role.peer].hello)
            self.sealers[role], self.openers[role] = sealer, opener
            self.agreements.append(agreement)

    def exchange(self, records: int | None = None) -> None:
        """Seal and open the first so many records, or all of them, each as it is in the file."""
        for record in self.case["records"][:records]:
            sender, kind = Role(record["sender"]), Kind[record["kind"]]
            sealer, opener = self.sealers[sender], self.openers[sender.peer]
            assert sealer.number == opener.number == record["number"]
            answers = unhex(record["answers"])
            assert sealer.seal(kind, record["text"], answers, drawn(record, "salt")) == wire(record)
            assert sealer.latest.hex() == record["signed"]
            said = opener.open_in_order(wire(record), self.sealers[sender.peer])
            assert said == (kind, record["text"], answers)
            assert opener.latest.hex() == record["signed"]


def drawn(source: Json, *names: str) -> chat.Random:
    """What draws these, one after the other, and nothing else."""
    rest = [unhex(source[name]) for name in reversed(names)]

    def draw(length: int) -> bytes:
        value = rest.pop()
        assert len(value) == length
        return value

    return draw


@pytest.mark.parametrize("name", CASES)
def test_crypto_utils_makes_the_same_and_opens_it_on_both_sides(name: str) -> None:
    case = CASES[name]
    session = Session(case)
    chat.check_group(session.group)
    for role, offer in session.offers.items():
        side = case[role.value]
        assert (offer.hello.hex(), offer.exponent.hex()) == (side["hello"], side["exponent"])
        hello = Hello.decode(role, offer.hello)
        assert hello.group == (session.group if role is Role.BOB else None)
        values = (hello.nonce.hex(), hello.public_value.hex(), hello.rsa.hex())
        assert values == (side["nonce"], side["public_value"], side["public_key"])
    for agreement in session.agreements:
        assert (agreement.th.hex(), agreement.z.hex()) == (case["th"], case["z"])
    keys = {role: chat.derive_keys(unhex(case["z"]), role.label, unhex(case["th"])) for role in Role}
    for role, made in keys.items():
        expected = {"key": made.key.hex(), "commitment": made.commitment.hex()}
        assert case[role.label.decode()] == expected
    for record in case["records"]:
        sender = Role(record["sender"])
        nonce, ciphertext, tag = (unhex(record[part]) for part in ("nonce", "ciphertext", "tag"))
        assert chat.decrypt(keys[sender].key, nonce, ciphertext, tag).hex() == record["plaintext"]
        assert session.sealers[sender].signed(nonce, ciphertext, tag).hexdigest() == record["signed"]
    session.exchange()


@pytest.mark.parametrize("name", CASES)
def test_crypto_utils_verifies_a_transcript_of_it(name: str) -> None:
    case = CASES[name]
    entries = [
        b"b" + unhex(case["bob"]["hello"]),
        b"a" + unhex(case["alice"]["hello"]),
        b"z" + unhex(case["z"]),
    ]
    entries += (Role(record["sender"]).tag + wire(record) for record in case["records"])
    said = [
        (statement.sender.value, statement.message.kind.name, statement.message.text, statement.unread)
        for statement in chat.verify_transcript(b"".join(map(framed, entries)))
    ]
    missed = "which crossed" in name and "READY" not in name  # a READY has nothing to miss
    assert said == [
        (r["sender"], r["kind"], r["text"], crossed and missed) for r, _, crossed in with_turns(case)
    ]


@pytest.mark.parametrize("name", [name for name, case in REFUSALS.items() if "hello" in case])
def test_crypto_utils_refuses_the_hello_for_that_reason(name: str, tmp_path: Path) -> None:
    refusal = REFUSALS[name]
    case = CASES[refusal["case"]]
    identity = private_key(case[refusal["receiver"]]["private_key"])
    peer = KnownPeer(Home(tmp_path), "peer")
    near, far = loopback()
    with near, far:
        far.sendall(framed(unhex(refusal["hello"])))
        with pytest.raises(chat.ProtocolError) as refused:
            if refusal["receiver"] == "bob":
                chat.bob_handshake(Line(near), identity, Group(int(case["p"], 16), int(case["g"], 16)), peer)
            else:
                chat.alice_handshake(Line(near), identity, None, peer)
    assert str(refused.value) == refusal["message"]


@pytest.mark.parametrize("name", [name for name, case in REFUSALS.items() if "record" in case])
def test_crypto_utils_refuses_the_record_for_that_reason(name: str) -> None:
    refusal = REFUSALS[name]
    session = Session(CASES[refusal["case"]])
    session.exchange(refusal["after"])
    receiver = Role(refusal["receiver"])
    with pytest.raises(chat.ProtocolError) as refused:
        session.openers[receiver].open_in_order(unhex(refusal["record"]), session.sealers[receiver])
    assert str(refused.value) == refusal["message"]
