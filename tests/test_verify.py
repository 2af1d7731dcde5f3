"""A kept conversation, checked and replayed: what --verify says of it, and every value that -v and -vv show.

The values are recomputed here with hashlib and the library's AES, from the bytes of the file alone.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from conftest import GROUP, ROOT, Keys, Program, Start, entries, exhaustive, patched, pin_each_other
from Crypto.Cipher import AES
from Crypto.PublicKey import RSA
from Crypto.Signature import pss
from Crypto.Util.number import bytes_to_long
from Crypto.Util.RFC1751 import key_to_english

import crypto_utils as chat
from crypto_utils import KeyStore, PinnedPeer

SCRIPTS = {"bob": "bob_server.py", "alice": "alice_client.py"}


# Tests p once, not 64 times: that is not what is tested here.
ONE_ROUND = patched("test = chat.is_safe_prime", "chat.is_safe_prime = lambda p, rounds: test(p, 1)")


@pytest.fixture
def start(start: Start) -> Start:
    return lambda script, *arguments, **options: start(script, *arguments, **{"python": ONE_ROUND, **options})


class Kept(NamedTuple):
    """One conversation with a goodbye, as both kept it, and what both screens showed with -vv."""

    files: dict[str, Path]
    screens: dict[str, str]
    home: Path  # where both have pinned each other


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, keys: Keys) -> Iterator[Kept]:
    """No test changes it."""
    home = tmp_path_factory.mktemp("homes")
    for name, key in (("bob", keys.bob), ("alice", keys.alice)):
        KeyStore(home / name).write(KeyStore.IDENTITY, functools.partial(key.export_key, "PEM", pkcs=8))
        KeyStore(home / name).write(KeyStore.GROUP, GROUP.export)
    folders = {name: home / f"kept by {name}" for name in SCRIPTS}
    with contextlib.ExitStack() as stack:
        server = Program(
            "bob_server.py", "--port", "0", "--once", "-vv", "--transcript", str(folders["bob"]), home=home
        )
        stack.callback(server.close)
        port = server.expect(r"Listening on port (\d+)\.", "stderr")[1]
        pin_each_other(home, port)
        client = Program(
            *("alice_client.py", "--port", port, "-vv", "--transcript", str(folders["alice"])), home=home
        )
        stack.callback(client.close)
        client.write("hello Bob\n")
        server.expect("^Alice: hello Bob\n")
        server.write("hello Alice\n")
        client.end_input()
        assert (client.wait(), server.wait()) == (0, 0)
        files = {name: next(folder.iterdir()) for name, folder in folders.items()}
        yield Kept(files, {"bob": server.stderr, "alice": client.stderr}, home)


def values(told: str) -> list[tuple[str, str]]:
    """Return the names and values of the steps that were told: hexadecimal, whole or shortened."""
    found: list[tuple[str, str]] = []
    for line in told.split("\n"):
        row = re.fullmatch(
            r"  (\w*) +(?:([0-9a-f]+(?:\.\.\. \(\d+ bytes\))?)|(\d+) zero bytes|\(empty\)|\".*\")", line
        )
        if row:
            name, value = row[1], row[2] or "00" * int(row[3] or 0)
            if name:
                found.append((name, value))
            else:
                found[-1] = (found[-1][0], found[-1][1] + value)
    return found


def fields(hello: bytes) -> list[bytes]:
    found = []
    while hello:
        (length,) = struct.unpack(">H", hello[:2])
        found.append(hello[2 : 2 + length])
        hello = hello[2 + length :]
    return found


def sha256(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def recomputed(file: Path) -> list[tuple[str, bytes]]:
    """Return what a replay shows, in its order, from the README's section on the protocol."""
    bob, alice, z, *records = entries(file.read_bytes())
    bob, alice, z = bob[1:], alice[1:], z[1:]
    _, nonce_b, p, g, b, rsa_bob = fields(bob)
    _, nonce_a, a, rsa_alice = fields(alice)
    th = sha256(*(struct.pack(">I", len(hello)) + hello for hello in (bob, alice)))
    version = ("version", b"secure-chat/1")
    shown = [version, ("p", p), ("g", g), ("nonce_B", nonce_b), ("B", b), ("RSA_bob", rsa_bob)]
    shown += [version, ("nonce_A", nonce_a), ("A", a), ("RSA_alice", rsa_alice), ("th", th), ("Z", z)]
    sides = {}
    for tag, label, rsa in (("B", b"bob->alice", rsa_bob), ("A", b"alice->bob", rsa_alice)):
        info = b"secure-chat/1 key " + label + th
        key, commitment = (sha256(struct.pack(">I", n), z, info) for n in (1, 2))
        shown += [("K", key), ("C", commitment)]
        sides[tag] = key, b"secure-chat/1 signature " + label + th + commitment, RSA.import_key(rsa)
    numbers, latest = {"A": 0, "B": 0}, {"A": bytes(32), "B": bytes(32)}
    for entry in records:
        tag, record = chr(entry[0]), entry[1:]
        key, context, rsa_key = sides[tag]
        split = len(record) - rsa_key.size_in_bytes()
        signed, signature = record[:split], record[split:]
        nonce, ciphertext, gcm_tag = signed[:12], signed[12:-16], signed[-16:]
        assert bytes_to_long(nonce) == numbers[tag]
        digest = chat.SHA256.new(context + signed)
        pss.new(rsa_key, salt_bytes=32).verify(digest, signature)
        plaintext = AES.new(key, AES.MODE_GCM, nonce=nonce).decrypt_and_verify(ciphertext, gcm_tag)
        assert plaintext[1:33] == latest["A" if tag == "B" else "B"]
        shown += [("nonce", nonce), ("hash", digest.digest()), ("signature", signature)]
        shown += [("ciphertext", ciphertext), ("tag", gcm_tag)]
        if (tag, numbers[tag]) == ("B", 0):
            shown.append(("r", plaintext[33:65]))
        else:
            end = plaintext.rindex(b"\x80")
            shown += [("type", plaintext[:1]), ("in_reply_to", plaintext[1:33]), ("body", plaintext[33:end])]
            shown.append(("padding", plaintext[end:]))
        latest[tag] = digest.digest()
        numbers[tag] += 1
    return shown


def words_of(shown: dict[str, bytes]) -> list[str]:
    return key_to_english(sha256(b"secure-chat/1 words ", shown["th"], shown["r"])[:8]).lower().split()


# ------------------------------------------------------------------------------------ the verdict


@pytest.mark.parametrize(("keeper", "reader"), [("bob", "alice"), ("alice", "bob")])
def test_it_says_who_said_what_and_what_that_proves(
    kept: Kept, start: Start, keys: Keys, keeper: str, reader: str
) -> None:
    program = start(SCRIPTS[reader], "--verify", str(kept.files[keeper]), home=kept.home)
    assert program.wait() == 0
    assert program.stdout == "Alice: hello Bob\nBob: hello Alice\n"
    for name, key in (("bob", keys.bob), ("alice", keys.alice)):
        mine = "is you" if name == reader else rf"is the {name.title()} you pinned as \S+"
        assert re.search(
            rf"^{name.title()} {mine}:\n  {re.escape(chat.fingerprint(key))}\n", program.stderr, re.MULTILINE
        )
    assert "\nAlice left.\n" in program.stderr
    verdict = program.stderr.split("\nAlice left.\n")[1]
    assert all(part in verdict for part in ("is sound", "does not show when", "signed", "stole"))
    assert "More may have been said than is in the file" in verdict
    assert "A goodbye of their own proves nothing" in verdict


def test_it_needs_no_home_and_makes_none(kept: Kept, start: Start, tmp_path: Path, keys: Keys) -> None:
    program = start("alice_client.py", "--verify", str(kept.files["bob"]), home=tmp_path / "none")
    assert program.wait() == 0
    assert "Bob is not known here" in program.stderr
    assert not (tmp_path / "none").exists()


def test_every_name_under_which_a_key_is_pinned_is_told(
    kept: Kept, start: Start, homes: Path, keys: Keys
) -> None:
    names = ["[192.0.2.1]:1", "[192.0.2.2]:2", "[192.0.2.3]:3"]
    for name in names:
        PinnedPeer(KeyStore(homes / "alice"), name).pin(keys.bob)
    program = start("alice_client.py", "--verify", str(kept.files["bob"]))
    assert program.wait() == 0
    assert f"Bob is the Bob you pinned as {' and '.join(names)}:" in program.stderr


def test_it_asks_for_no_passphrase(kept: Kept, start: Start, homes: Path, keys: Keys) -> None:
    locked = keys.alice.export_key("PEM", passphrase="open", pkcs=8)
    KeyStore(homes / "alice").write(KeyStore.IDENTITY, lambda: locked)
    program = start("alice_client.py", "--verify", str(kept.files["bob"]), terminal=True, size=(24, 80))
    assert program.wait() == 0


@pytest.mark.parametrize("right", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_peer_insists_on_a_key(kept: Kept, start: Start, keys: Keys, right: bool) -> None:
    only = chat.fingerprint(keys.bob if right else keys.mallory)
    program = start("alice_client.py", "--verify", str(kept.files["bob"]), "--peer", only)
    assert program.wait() == (0 if right else 3)
    assert program.stdout == ("Alice: hello Bob\nBob: hello Alice\n" if right else "")


@pytest.mark.parametrize("left_out", [1, *exhaustive(2, 3)])
def test_whatever_was_left_out_at_the_end_the_verdict_says_that_it_may_have_been(
    kept: Kept, start: Start, tmp_path: Path, left_out: int
) -> None:
    """A keeper can leave out the goodbye, a reply, a request: what is left is sound."""
    whole = kept.files["bob"].read_bytes()
    cut = tmp_path / "cut"
    cut.write_bytes(whole[: -sum(4 + len(entry) for entry in entries(whole)[-left_out:])])
    program = start("bob_server.py", "--verify", str(cut))
    assert program.wait() == 0
    assert program.stdout == "".join(["Alice: hello Bob\n", "Bob: hello Alice\n"][: 3 - left_out])
    assert "left." not in program.stderr
    assert "More may have been said than is in the file" in program.stderr


def test_it_follows_a_symbolic_link(kept: Kept, start: Start, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(kept.files["bob"])
    program = start("bob_server.py", "--verify", str(link))
    assert program.wait() == 0
    assert program.stdout == "Alice: hello Bob\nBob: hello Alice\n"


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("/proc/self/mem", "Stopped: cannot read /proc/self/mem: .*error"),
        (str(ROOT), "Stopped: cannot read .*: Is a directory"),
        ("fifo", "Stopped: .*fifo is not a regular file"),  # which nobody writes to
    ],
    ids=["memory", "a folder", "a FIFO"],
)
def test_what_is_no_transcript_is_called_that(start: Start, tmp_path: Path, file: str, told: str) -> None:
    if file.startswith("/proc") and not Path(file).exists():
        pytest.skip("there is no /proc here")
    os.mkfifo(tmp_path / "fifo")
    program = start("alice_client.py", "--verify", str(tmp_path / file))
    assert program.wait() == 1
    assert re.match(told, program.stderr)
    assert program.stdout == ""


def test_what_is_wrong_ends_it_after_what_is_right(kept: Kept, start: Start, tmp_path: Path) -> None:
    goodbye = entries(kept.files["bob"].read_bytes())[-1]
    damaged = bytearray(kept.files["bob"].read_bytes())
    damaged[-len(goodbye) - 9] ^= 1  # in Bob's reply
    file = tmp_path / "damaged"
    file.write_bytes(damaged)
    program = start("bob_server.py", "--verify", str(file))
    assert program.wait() == 3
    assert program.stdout == "Alice: hello Bob\n"
    assert "Broken off: the record's signature is not valid." in program.stderr
    assert "Nothing is proven but what stands above" in program.stderr
    assert "is sound" not in program.stderr


# ------------------------------------------------------------------------------------- the replay


@pytest.mark.parametrize(("reader", "verbose"), [("bob", "-v"), ("alice", "-vv")])
def test_a_replay_shows_every_value_and_each_can_be_recomputed(
    kept: Kept, start: Start, reader: str, verbose: str
) -> None:
    program = start(SCRIPTS[reader], "--verify", str(kept.files["bob"]), verbose)
    assert program.wait() == 0
    shown, expected = values(program.stderr), recomputed(kept.files["bob"])
    assert [name for name, _ in shown] == [name for name, _ in expected]
    for (name, text), (_, value) in zip(shown, expected):
        if text.endswith(" bytes)"):
            assert verbose == "-v"
            beginning, size = re.fullmatch(r"([0-9a-f]+)\.\.\. \((\d+) bytes\)", text).groups()
            assert (value.hex().startswith(beginning), len(value)) == (True, int(size)), name
        else:
            assert text == value.hex(), name


def test_a_replay_shows_the_words_that_both_saw(kept: Kept, start: Start) -> None:
    """The words are made of th and r, and r fits nonce_B."""
    program = start("bob_server.py", "--verify", str(kept.files["alice"]), "-v")
    assert program.wait() == 0
    shown = dict(recomputed(kept.files["alice"]))
    assert shown["nonce_B"] == sha256(b"secure-chat/1 commit ", shown["r"])
    words = words_of(shown)
    assert f": {' '.join(words)}. " in program.stderr
    for (name, told), own in zip(kept.screens.items(), (words[:3], words[3:])):
        assert f"read them out:  {' '.join(own)}\n" in told, name


# ------------------------------------------------------------------------------ the lesson as it happens


def test_both_screens_show_the_same_values_and_no_secret(kept: Kept) -> None:
    lessons = {name: values(told) for name, told in kept.screens.items()}
    assert sorted(lessons["bob"]) == sorted(lessons["alice"])
    expected = recomputed(kept.files["bob"])
    live = [(name, value.hex()) for name, value in expected if name not in {"Z", "K", "C", "r"}]
    words = " ".join(words_of(dict(expected)))
    assert sorted(lessons["bob"]) == sorted([*live, ("words", words.encode().hex())])
    for told in kept.screens.values():
        for name, value in expected:
            if name in {"Z", "K", "C", "r"}:
                assert value.hex() not in told.replace(" ", "").replace("\n", "")


def test_each_side_tells_its_steps_in_the_order_in_which_they_are_done(kept: Kept) -> None:
    """Who sends, encrypts and then signs; who receives, verifies, and only then decrypts."""
    for name, told in kept.screens.items():
        steps = re.findall(
            r"^Record (\d), (\w+)->\w+, (\w+): (is encrypted|is signed|came|is decrypted)",
            told,
            re.MULTILINE,
        )
        assert len(steps) == 10  # two READYs, a request, a reply, a goodbye
        for first, second in zip(steps[::2], steps[1::2]):
            assert first[:3] == second[:3]
            assert (first[3], second[3]) == (
                ("is encrypted", "is signed") if first[1] == name else ("came", "is decrypted")
            )
        hellos = (
            ("hello_bob is made", "hello_alice came")
            if name == "bob"
            else ("hello_bob came", "hello_alice is made")
        )
        assert told.index(hellos[0]) < told.index(hellos[1]) < told.index("Both hellos are sound")
        assert told.index("Both hellos are sound") < told.index("Z = ") < told.index("Record 0")


def test_quotes_stand_around_texts_only() -> None:
    """Not around a value of a hello that nobody has checked, though it may look like a text."""
    told: list[str] = []
    record = logging.LogRecord("", logging.INFO, "", 0, "", (), None)
    record.values = {"nonce_B": b"The key is pinned", "plaintext": b"\1" + bytes(32) + b"one\ntwo\x80\0"}
    chat.show_step(SimpleNamespace(leaving=False, notice=told.append), True, record)
    assert re.findall(r'"(.*)"', told[0]) == ["one", "two"]


@pytest.mark.exhaustive
def test_whole_values_are_indented_and_fit_the_screen(kept: Kept, start: Start) -> None:
    program = start(
        "bob_server.py", "--verify", str(kept.files["bob"]), "-vv", terminal=True, size=(24, 80), TERM="xterm"
    )
    assert program.wait() == 0
    rows = re.sub(r"\x1b\[\d*[mK]", "", program.stdout).split("\r\n")
    assert all(len(row) <= 80 for row in rows)
    assert all(row.startswith("  ") for row in rows if re.search("[0-9a-f]{30}", row))
