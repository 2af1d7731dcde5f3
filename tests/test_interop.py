"""A second implementation, on another language's own cryptography, that was written from the README alone.

It checks the vectors and reads transcripts, and talks to both programs in either part.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, Callable

import pytest
from conftest import DEADLINE, GROUP, Keys, Start, StartBob, exhaustive, fails, store_with_group

import crypto_utils as chat
from crypto_utils import RsaKey

TESTS = Path(__file__).parent
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(not NODE, reason="there is no node here")
Events = list[dict[str, Any]]
# In eight conversations each side says some sixteen texts: every special length, and each sign many times.
SEEDS = [0, *exhaustive(*range(1, 8))]

# What people write, and what parsers trip over; a line of standard input cannot hold the last four.
SIGNS = [*"aZ 0'\"\\/\0\t\x1b\x7f", "\u00e4", "\u6f22", "\u202e", "\ufeff", "\U0001f600", "\U0010ffff"]
BREAKS = ["\n", "\r", "\u2028", "\x85"]


def random_text(random: Random, signs: list[str]) -> str:
    length = random.choice([0, 1, 5, 221, 222, 223, 300, random.randrange(5000)])
    return "".join(random.choices(signs, k=length))


class Peer:
    """The other implementation as a process: messages go in and events come out, in JSON, a line each."""

    def __init__(self, *arguments: str) -> None:
        assert NODE
        command = [NODE, str(TESTS / "interop_peer.mjs"), *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def event(self) -> dict[str, Any]:
        """Wait for the next one."""
        assert self.process.stdout
        return dict(json.loads(self.process.stdout.readline()))

    def say(self, texts: list[str]) -> tuple[int, Events]:
        """Say all that, then goodbye; return the exit status and what happened."""
        said, _ = self.process.communicate("".join(json.dumps(t) + "\n" for t in texts).encode(), DEADLINE)
        return self.process.returncode, [json.loads(line) for line in said.splitlines()]


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Callable[..., Peer]]:
    """Return a function that starts the other implementation with a key of its own."""
    started = []

    def run(part: str, key: RsaKey, *arguments: str) -> Peer:
        (tmp_path / "key.pem").write_bytes(key.export_key("PEM", pkcs=8))
        (tmp_path / "group.pem").write_bytes(GROUP.export())
        arguments += ("--dh", str(tmp_path / "group.pem")) if part == "bob" else ()
        started.append(Peer(part, "--host", "127.0.0.1", "--key", str(tmp_path / "key.pem"), *arguments))
        return started[-1]

    yield run
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


def shown(name: str, texts: list[str]) -> str:
    bar = "\n" + "|".rjust(len(name) + 1) + " "
    return "".join(f"{name}: {bar.join(chat.screen_lines(text))}\n" for text in texts)


def node(*arguments: object) -> Events:
    """Run the other implementation to its end, which must be a good one; return what it says."""
    assert NODE
    command = [NODE, str(TESTS / "interop_peer.mjs"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("name", "count"), [*exhaustive(("conversations", 14)), ("refused", 208), ("transcripts", 75)]
)
def test_it_agrees_with_every_vector(name: str, count: int) -> None:
    assert [event["cases"] for event in node("vectors", TESTS / "vectors" / f"{name}.json")] == [count]


def texts_of(events: Events) -> list[str]:
    return [event["text"] for event in events if event["event"] == "text"]


@pytest.mark.parametrize("seed", SEEDS)
def test_it_is_alice(bob: StartBob, peer: Callable[..., Peer], keys: Keys, tmp_path: Path, seed: int) -> None:
    """It leaves, or Bob does, whose input has ended; his transcript tells it the same as it told Bob."""
    random = Random(seed)
    rounds, bob_leaves = random.randrange(5), random.random() < 0.3
    replies = [random_text(random, SIGNS) for _ in range(rounds)]
    requests = [random_text(random, SIGNS + BREAKS) for _ in range(rounds + bob_leaves)]
    folder = tmp_path / "transcripts"
    options = ("--peer", chat.fingerprint(keys.alice), "--transcript", str(folder))
    program, port = bob("--once", *options)
    program.write("".join(f"{reply}\n" for reply in replies))
    program.end_input()
    alice = peer("alice", keys.alice, "--port", port, "--peer", chat.fingerprint(keys.bob))
    status, events = alice.say(requests)

    assert status == 0, (events, program.stderr)
    assert program.wait() == (0 if requests else 1), "nothing was said"
    assert texts_of(events) == replies
    assert program.stdout == shown("Alice", requests)
    (words,) = (event["words"] for event in events if event["event"] == "connected")
    assert f"read them out: {' '.join(words.split()[:3])}" in " ".join(program.stderr.split())
    told = node("verify", next(folder.iterdir()))
    in_turn = [text for pair in zip(requests, [*replies, None]) for text in pair if text is not None]
    assert texts_of(told) == in_turn
    assert [event["words"] for event in told if event["event"] == "conversation"] == [words]


@pytest.mark.parametrize("seed", SEEDS)
def test_it_is_bob(start: Start, peer: Callable[..., Peer], keys: Keys, tmp_path: Path, seed: int) -> None:
    """Alice leaves, whose input has ended, or it does. The program verifies the transcript it kept."""
    random = Random(1000 + seed)
    rounds, it_leaves = random.randrange(5), random.random() < 0.3
    requests = [random_text(random, SIGNS) for _ in range(rounds + it_leaves)]
    replies = [random_text(random, SIGNS + BREAKS) for _ in range(rounds)]
    kept = tmp_path / "kept"
    options = ("--peer", chat.fingerprint(keys.alice), "--transcript", str(kept))
    bob = peer("bob", keys.bob, "--port", "0", *options)
    port, fingerprint = str(bob.event()["port"]), chat.fingerprint(keys.bob)
    store_with_group(tmp_path / "alice")
    alice = start("alice_client.py", "127.0.0.1", "--port", port, "--peer", fingerprint)
    alice.write("".join(f"{request}\n" for request in requests))
    alice.end_input()
    status, events = bob.say(replies)

    assert (status, alice.wait()) == (0, 0), (events, alice.stderr)
    assert texts_of(events) == requests
    assert alice.stdout == shown("Bob", replies)
    (words,) = (event["words"] for event in events if event["event"] == "connected")
    assert f"read them out: {' '.join(words.split()[3:])}" in " ".join(alice.stderr.split())
    verified = start("bob_server.py", "--verify", str(kept))
    assert verified.wait() == 0
    assert verified.stdout == "".join(
        shown("Alice", [request]) + (shown("Bob", replies[n : n + 1])) for n, request in enumerate(requests)
    )


def test_it_is_a_busy_bob(start: Start, peer: Callable[..., Peer], keys: Keys, tmp_path: Path) -> None:
    """Alice is told in the place of READY, and pins nothing."""
    bob, folder = peer("bob", keys.bob, "--port", "0", "--busy"), tmp_path / "transcripts"
    port, fingerprint = str(bob.event()["port"]), chat.fingerprint(keys.bob)
    options = ("--peer", fingerprint, "--transcript", str(folder))
    alice = start("alice_client.py", "127.0.0.1", "--port", port, *options)
    fails(alice, 1, "Bob cannot talk now")
    assert bob.say([]) == (0, [{"event": "closed"}])
    assert list(folder.iterdir()) == []
    assert not (tmp_path / "alice" / "known_peers").exists()


def test_it_is_an_alice_who_finds_bob_busy(bob: StartBob, peer: Callable[..., Peer], keys: Keys) -> None:
    program, port = bob("--once", "--peer", chat.fingerprint(keys.alice))
    options = ("alice", keys.alice, "--port", port, "--peer", chat.fingerprint(keys.bob))
    first = peer(*options)
    assert first.event()["event"] == "connected"
    assert peer(*options).say(["hello?"]) == (1, [{"event": "cut", "why": "Bob is busy"}])
    program.write("hello\n")
    status, events = first.say(["hello"])
    assert (status, texts_of(events), program.wait()) == (0, ["hello"], 0)
