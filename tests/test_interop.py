"""A second implementation, on another language's own cryptography, that was written from the README alone.

It checks the vectors, and talks to both programs in either part.
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
from conftest import DEADLINE, GROUP, Keys, Program

import crypto_utils as chat
from crypto_utils import RsaKey

TESTS = Path(__file__).parent
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(not NODE, reason="there is no node here")
Events = list[dict[str, Any]]

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

    def listening(self) -> str:
        assert self.process.stdout
        return str(json.loads(self.process.stdout.readline())["port"])

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


def test_it_agrees_with_every_vector() -> None:
    assert NODE
    files = [str(TESTS / "vectors" / name) for name in ("conversations.json", "refused.json")]
    command = [NODE, str(TESTS / "interop_peer.mjs"), "vectors", *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [json.loads(line)["cases"] for line in done.stdout.splitlines()] == [14, 202]


@pytest.mark.parametrize("seed", range(50))
def test_it_is_alice(
    start: Callable[..., Program], peer: Callable[..., Peer], keys: Keys, tmp_path: Path, seed: int
) -> None:
    """It leaves, or Bob does, whose input has ended; his transcript tells it the same as it told Bob."""
    random = Random(seed)
    rounds, bob_leaves = random.randrange(5), random.random() < 0.3
    replies = [random_text(random, SIGNS) for _ in range(rounds)]
    requests = [random_text(random, SIGNS + BREAKS) for _ in range(rounds + bob_leaves)]
    file = tmp_path / "transcript"
    bob = start("bob_server.py", "--port", "0", "--once", "--transcript", str(file))
    port = bob.expect(r"port (\d+)", "stderr")[1]
    bob.write("".join(f"{reply}\n" for reply in replies))
    bob.end_input()
    alice = peer("alice", keys.alice, "--port", port, "--peer", chat.fingerprint(keys.bob))
    status, events = alice.say(requests)

    assert (status, bob.wait()) == (0, 0), (events, bob.stderr)
    assert [event["text"] for event in events if event["event"] == "text"] == replies
    assert bob.stdout == shown("Alice", requests)
    assert NODE
    command = [NODE, str(TESTS / "interop_peer.mjs"), "verify", str(file)]
    verified = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    told = [json.loads(line) for line in verified.stdout.splitlines()]
    in_turn = [text for pair in zip(requests, [*replies, None]) for text in pair if text is not None]
    assert [event["text"] for event in told if event["event"] == "text"] == in_turn


@pytest.mark.parametrize("seed", range(50))
def test_it_is_bob(start: Callable[..., Program], peer: Callable[..., Peer], keys: Keys, seed: int) -> None:
    """Alice leaves, whose input has ended, or it does, and then her last message has arrived."""
    random = Random(1000 + seed)
    rounds, it_leaves = random.randrange(5), random.random() < 0.3
    requests = [random_text(random, SIGNS) for _ in range(rounds + it_leaves)]
    replies = [random_text(random, SIGNS + BREAKS) for _ in range(rounds)]
    bob = peer("bob", keys.bob, "--port", "0", "--peer", chat.fingerprint(keys.alice))
    port, fingerprint = bob.listening(), chat.fingerprint(keys.bob)
    alice = start("alice_client.py", "127.0.0.1", "--port", port, "--peer", fingerprint)
    alice.write("".join(f"{request}\n" for request in requests))
    alice.end_input()
    status, events = bob.say(replies)

    assert (status, alice.wait()) == (0, 0), (events, alice.stderr)
    assert [event["text"] for event in events if event["event"] == "text"] == requests
    assert alice.stdout == shown("Bob", replies)
    assert alice.stderr.endswith("Bob left.\n" if it_leaves else "You left.\n")
