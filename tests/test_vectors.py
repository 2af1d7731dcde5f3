"""Whole conversations and transcripts, and what is to be refused: the programs agree with each.

So does the second implementation, which shares nothing with crypto_utils: see test_interop.py. Whoever writes
another peer can check it with them.
"""

from __future__ import annotations

import functools
import io
import json
import re
import socket
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any, Callable
from unittest import mock

import pytest
from conftest import ROOT, loopback
from Crypto.PublicKey import RSA
from vectors import make

import alice_client
import bob_server
import crypto_utils as chat
from crypto_utils import (
    FrameSocket,
    Group,
    Hello,
    KeyStore,
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


def test_the_files_are_whole_and_say_what_is_in_them() -> None:
    assert len(CONVERSATIONS["cases"]) == len(CASES) == 14
    assert len(REFUSED["cases"]) == len(REFUSALS) == 208
    assert len(TRANSCRIPTS["valid"]) == len(VALID) == 12
    assert len(TRANSCRIPTS["refused"]) == len(INVALID) == 63
    for field, checks in (("hello", CHECKS_OF_A_HELLO), ("record", CHECKS_OF_A_RECORD)):
        assert {case["check"] for case in REFUSALS.values() if field in case} == set(checks)
        assert ", ".join(checks) in REFUSED["about"]["check"]


def test_the_program_that_made_them_makes_them_again() -> None:
    for name, text in make.files().items():
        assert (FOLDER / name).read_bytes() == text.encode(), name


def test_the_examples_in_the_readme_are_right() -> None:
    """Those of th, K and C, and of the words."""
    readme, r = (ROOT / "README.md").read_text(encoding="utf-8"), b"\1" * 32
    th = sha256(framed(b"bob") + framed(b"alice")).digest()
    hashed = sha256(b"secure-chat/1 words " + bytes(32) + r)
    rows = [
        ("th = SHA-256(00000003 626f62 00000005 616c696365)\n", th.hex()),
        ("nonce_B", chat.commit(r).hex()),
        ("SHA-256(...)", hashed.hexdigest()),
        ("first 8 bytes", f"{hashed.hexdigest()[:16]}, parity 0"),
        ("words", " ".join(chat.make_words(bytes(32), chat.commit(r), r))),
    ]
    for role in Role:
        values = zip("KC", chat.derive_keys(b"\2\3", role.label, th))
        rows += [(f"{role.label.decode()}, {name}", value.hex()) for name, value in values]
    for name, value in rows:
        assert re.search(rf"^    {re.escape(name)} +{value}$", readme, re.MULTILINE), name


def framed(payload: bytes) -> bytes:
    return len(payload).to_bytes(4, "big") + payload


def wire(record: Json) -> bytes:
    return unhex("".join(record[part] for part in ("nonce", "ciphertext", "tag", "signature")))


# ------------------------------------------------------------------------------------------ the programs


class Session:
    """Both ends of a conversation, as crypto_utils makes them from what was drawn."""

    def __init__(self, case: Json) -> None:
        self.case = case
        self.group = Group(int(case["p"], 16), int(case["g"], 16))
        self.identity = {role: private_key(case[role.value]["private_key"]) for role in Role}
        self.hellos: dict[Role, Hello] = {}
        self.exponents: dict[Role, bytes] = {}
        for role, key in self.identity.items():
            random = drawn(
                case[role.value]["exponent"], case["r"] if role is Role.BOB else case["alice"]["nonce"]
            )
            with mock.patch("secrets.token_bytes", random):
                self.hellos[role], self.exponents[role], _ = chat.make_hello(role, key, self.group)
        self.sealers: dict[Role, Sealer] = {}
        self.openers: dict[Role, Opener] = {}  # by who receives
        keys, th = chat.settle(*self.hellos.values())
        for role, exponent in self.exponents.items():
            key, z = keys[role.peer], chat.shared_secret(exponent, self.hellos[role.peer])
            assert (z.hex(), th.hex()) == (case["z"], case["th"])
            assert key.public_key().export_key("DER").hex() == case[role.peer.value]["public_key"]
            self.sealers[role] = Sealer(role, self.identity[role], z, th)
            self.openers[role] = Opener(role.peer, key, z, th)

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
            with mock.patch("secrets.token_bytes", drawn(record["salt"])):
                made = sealer.seal(record_type, body, heard)
            assert made == wire(record)
            assert sealer.latest.hex() == record["signed"]
            said = opener.open(wire(record), self.sealers[sender.peer])
            assert said[:3] == (record_type, body, in_reply_to)
            assert opener.latest.hex() == record["signed"]


@functools.cache
def private_key(pem: str) -> RSA.RsaKey:
    return RSA.import_key(pem)


def drawn(*values: str) -> Callable[[int], bytes]:
    """What draws these, one after the other, and nothing else."""
    rest = [unhex(value) for value in reversed(values)]

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
    for role, hello in session.hellos.items():
        side = case[role.value]
        assert (hello.encode().hex(), session.exponents[role].hex()) == (side["hello"], side["exponent"])
        assert chat.Hello.decode(hello.encode(), None if role is Role.BOB else session.group) == hello
        values = (hello.nonce.hex(), hello.public_value.hex(), hello.rsa.hex())
        assert values == (side["nonce"], side["public_value"], side["public_key"])
    assert chat.commit(unhex(case["r"])).hex() == case["bob"]["nonce"]
    th, nonce, r = (unhex(value) for value in (case["th"], case["bob"]["nonce"], case["r"]))
    assert " ".join(chat.make_words(th, nonce, r)) == case["words"]
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
        made[case["p"]].write(KeyStore.GROUP, Group(int(case["p"], 16), int(case["g"], 16)).export)
    return made


@pytest.mark.parametrize("name", [name for name, case in REFUSALS.items() if "hello" in case])
def test_crypto_utils_refuses_the_hello_for_that_reason(name: str, stores: dict[str, KeyStore]) -> None:
    refusal = REFUSALS[name]
    case = CASES[refusal["case"]]
    identity, store = private_key(case[refusal["receiver"]]["private_key"]), stores[case["p"]]
    near, far = loopback()
    with near, far:
        far.sendall(framed(unhex(refusal["hello"])))
        far.shutdown(socket.SHUT_WR)
        with pytest.raises(chat.ProtocolError) as refused:
            if refusal["receiver"] == "bob":
                group = Group(int(case["p"], 16), int(case["g"], 16))
                peer = PinnedPeer(store, "alice")
                bob_server.handshake(FrameSocket(near), identity, group, peer, Lock(), Transcript())
            else:
                peer = PinnedPeer(store, "[bob]:65432")
                alice_client.handshake(FrameSocket(near), identity, peer, Transcript())
    assert str(refused.value) == refusal["message"]


@pytest.mark.parametrize("name", [name for name, case in REFUSALS.items() if "record" in case])
def test_crypto_utils_refuses_the_record_for_that_reason(name: str) -> None:
    refusal = REFUSALS[name]
    case, receiver = CASES[refusal["case"]], Role(refusal["receiver"])
    session = Session(case)
    session.exchange(refusal["after"])
    with pytest.raises(chat.ProtocolError) as refused:
        message = session.openers[receiver].open(unhex(refusal["record"]), session.sealers[receiver])
        chat.make_words(b"", unhex(case["bob"]["nonce"]), message.body)
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


@pytest.mark.parametrize("name", VALID)
def test_crypto_utils_takes_the_transcript(name: str) -> None:
    assert proven(unhex(VALID[name]["file"])) == VALID[name]["messages"]


@pytest.mark.parametrize("name", INVALID)
def test_crypto_utils_refuses_the_transcript_for_that_reason(name: str) -> None:
    with pytest.raises(chat.ProtocolError) as refused:
        proven(unhex(INVALID[name]["file"]))
    assert str(refused.value) == INVALID[name]["reason"]
