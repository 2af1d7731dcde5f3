"""Bob under load: a real process over loopback, its threads, memory and descriptors counted from outside."""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import re
import selectors
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, NamedTuple

import pytest
from conftest import DEADLINE, GROUP, ROOT, Background, Keys, Program

import bob_server
import crypto_utils as chat
from crypto_utils import Home, KnownPeer, Line, Offer, Role

Start = Callable[..., Program]

CROWD = 200
KINDS = ("says nothing", "drips", "sends rubbish", "closes", "stops inside its hello", "stops before READY")
TRIES = int(os.environ.get("LOAD_TRIES", 5))  # of a real Alice to get past the crowd
MESSAGES = int(os.environ.get("LOAD_MESSAGES", 20_000))  # in the long conversation: 100 a second and core
THREADS = 2 * bob_server.HANDSHAKES  # at most; some that were cut off have not noticed yet
DESCRIPTORS = THREADS + 16  # a socket a thread; the streams, the listener, files open for a moment
MEMORY = 32 * 1024  # KiB more than at rest, at most: stacks, hellos, and what the allocator keeps
GROWTH = 4 * 1024  # KiB more after the whole of a long test than after its first part: it does not grow

WAITING, HERE, LEFT, CUT, REQUEST = (
    "Waiting for Alice",
    "Alice is here",
    "Alice left",
    "Cut off: ",
    "Alice: request",
)
PHRASES = (WAITING, HERE, LEFT, CUT, REQUEST, "Traceback")
BEGINNINGS = (WAITING, HERE, LEFT, "127.0.0.1: ")

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="no /proc to count another process's descriptors in"
)


class Use(NamedTuple):
    """What a process holds at one moment."""

    threads: int
    descriptors: int
    memory: int  # resident, KiB


class LoadedBob:
    """Bob as a process. A thread reads what he says all the time, so that he never waits for a reader."""

    def __init__(self, homes: Path, *arguments: str) -> None:
        self.homes = homes
        self._news = threading.Condition()
        self._said: collections.Counter[str] = collections.Counter()
        self._last: collections.deque[str] = collections.deque(maxlen=50)
        self.torn: list[str] = []  # lines that ran into each other
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "bob_server.py"), "--host", "127.0.0.1", "--port", "0", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Not counted by coverage, which takes memory and time of its own.
            env={**{k: v for k, v in os.environ.items() if "COV" not in k}, "SECURE_CHAT_HOME": str(homes)},
            text=True,
            start_new_session=True,
        )
        assert self.process.stdin
        self.stdin = self.process.stdin
        self._readers = [
            Background(lambda: self._read("stdout")),
            Background(lambda: self._read("stderr")),
        ]
        self.port = 0
        self.wait_for(lambda: self.port != 0)
        self.wait_for(lambda: self.said(WAITING) == 1)
        self.torn.clear()  # his invitation has blank lines around it

    def _read(self, name: str) -> None:
        stream = getattr(self.process, name)
        with stream:
            for line in stream:
                with self._news:
                    listening = re.match(r"Listening on port (\d+)\.", line)
                    self.port = int(listening[1]) if listening else self.port
                    for phrase in PHRASES:
                        self._said[phrase] += line.count(phrase)
                    if sum(map(line.count, BEGINNINGS)) > 1 or not line.strip():
                        self.torn.append(line)
                    self._last.append(line)
                    self._news.notify_all()

    def said(self, phrase: str) -> int:
        """How often he said one of the PHRASES."""
        return self._said[phrase]

    def wait_for(self, come_true: Callable[[], bool]) -> None:
        with self._news:
            assert self._news.wait_for(come_true, DEADLINE), "".join(self._last)

    def use(self) -> Use:
        proc = Path("/proc") / str(self.process.pid)
        status = (proc / "status").read_text()
        memory = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
        threads = re.search(r"^Threads:\s+(\d+)", status, re.MULTILINE)
        assert memory
        assert threads
        return Use(int(threads[1]), len(list((proc / "fd").iterdir())), int(memory[1]))

    def comes_back_to(self, before: Use) -> Use:
        """Wait until he holds no more threads and descriptors than before; return what he holds then."""
        deadline, pause = time.monotonic() + DEADLINE, threading.Event()
        while True:
            now = self.use()
            if now.threads <= before.threads and now.descriptors <= before.descriptors:
                return now
            assert time.monotonic() < deadline, f"{before} before, still {now}"
            pause.wait(0.05)

    def ends(self) -> int:
        """Tell him to go; return the exit status."""
        self.process.terminate()
        status = self.process.wait(DEADLINE)
        for reader in self._readers:
            reader.result()
        with contextlib.suppress(OSError):
            self.stdin.close()
        assert not self.said("Traceback"), "".join(self._last)
        return status


@pytest.fixture
def loaded_bob(homes: Path) -> Iterator[Callable[..., LoadedBob]]:
    """Return a function that starts Bob and waits until he is waiting."""
    started: list[LoadedBob] = []

    def run(*arguments: str) -> LoadedBob:
        started.append(LoadedBob(homes, *arguments))
        return started[-1]

    yield run
    for server in started:
        if server.process.poll() is None:
            server.ends()


class Stranger:
    """One of the crowd: it connects, does the one thing it does, and waits to be dropped."""

    def __init__(self, kind: str, port: int, hello: bytes) -> None:
        self.kind = kind
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.socket.connect_ex(("127.0.0.1", port))
        self.connected = False
        self._drips = iter(hello)
        self._hello = hello

    def act(self) -> None:
        """Do what it does once it is connected. May raise OSError."""
        self.connected = True
        if self.kind == "sends rubbish":
            self.socket.send(b"\xff" * 100)
        elif self.kind == "closes":
            self.socket.shutdown(socket.SHUT_WR)
        elif self.kind == "stops inside its hello":
            self.socket.send(self._hello[: len(self._hello) // 2])
        elif self.kind == "stops before READY":
            self.socket.send(self._hello)

    def drip(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.send(bytes([next(self._drips)]))

    def is_dropped(self) -> bool:
        try:
            return not self.socket.recv(65536)
        except BlockingIOError:
            return False
        except OSError:
            return True


class Crowd:
    """So many strangers at Bob's door, each replaced as soon as he drops it. All of them in one thread."""

    def __init__(self, port: int, hello: bytes) -> None:
        self.renewed: collections.Counter[str] = collections.Counter()
        self._port, self._hello = port, hello
        self._selector = selectors.DefaultSelector()
        self._stopped = threading.Event()
        self._in_full_swing = threading.Event()
        self._thread = Background(self._run)

    def __enter__(self) -> Crowd:
        """Wait until so many were dropped and replaced that all is in full swing."""
        assert self._in_full_swing.wait(DEADLINE), f"only {self.renewed}"
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.result()

    def _come(self, kind: str) -> None:
        stranger = Stranger(kind, self._port, self._hello)
        self._selector.register(stranger.socket, selectors.EVENT_WRITE, stranger)

    def _leave(self, stranger: Stranger) -> None:
        self._selector.unregister(stranger.socket)
        stranger.socket.close()

    def _run(self) -> None:
        try:
            for _, kind in zip(range(CROWD), itertools.cycle(KINDS)):
                self._come(kind)
            next_drip = time.monotonic() + 1
            while not self._stopped.is_set():
                for key, _ in self._selector.select(0.1):
                    self._serve(key.data)
                if time.monotonic() > next_drip:
                    next_drip += 1
                    for key in list(self._selector.get_map().values()):
                        if key.data.kind == "drips" and key.data.connected:
                            key.data.drip()
                if sum(self.renewed.values()) >= CROWD:
                    self._in_full_swing.set()
        finally:
            for key in list(self._selector.get_map().values()):
                self._leave(key.data)
            self._selector.close()

    def _serve(self, stranger: Stranger) -> None:
        if not stranger.connected:
            self._selector.modify(stranger.socket, selectors.EVENT_READ, stranger)
            with contextlib.suppress(OSError):
                stranger.act()
        elif stranger.is_dropped():
            self._leave(stranger)
            self.renewed[stranger.kind] += 1
            self._come(stranger.kind)


def knock(server: LoadedBob, key: chat.RsaKey, home: Path) -> chat.Channel:
    """Return Alice's end of a conversation that she has in this process."""
    line = Line(socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE))
    channel, _ = chat.alice_handshake(line, key, GROUP, KnownPeer(Home(home), "bob"))
    return channel


def measured(text: str) -> None:
    """Say it to who runs pytest with -s, and in the report of a test that failed."""
    print(f"\n    {text}")


@needs_proc
def test_alice_gets_past_a_crowd_that_stalls_drips_and_rants(
    loaded_bob: Callable[..., LoadedBob], start: Start, keys: Keys
) -> None:
    server = loaded_bob()
    offer = Offer.make(Role.ALICE, keys.alice, GROUP)  # Alice's own hello, as anybody on the line knows it

    def visit() -> float:
        begun = time.monotonic()
        client = start("alice_client.py", "127.0.0.1", "--port", str(server.port))
        client.write("it is me\n")
        server.stdin.write("welcome\n")
        server.stdin.flush()
        client.expect("^Bob: welcome\n")
        client.end_input()
        assert client.wait() == 0, client.stderr
        assert client.stderr.endswith("You left.\n")
        client.close()
        return time.monotonic() - begun

    visit()
    server.wait_for(lambda: server.said(WAITING) == 2)
    before, during, times = server.use(), [], []
    with Crowd(server.port, chat.frame(offer.hello)) as crowd:
        begun = time.monotonic()
        for number in range(TRIES):
            times.append(visit())
            server.wait_for(lambda number=number: server.said(LEFT) == number + 2)  # type: ignore[misc]
            during.append(server.use())
        rate = sum(crowd.renewed.values()) / (time.monotonic() - begun)
    most = Use(*map(max, zip(*during)))
    after = server.comes_back_to(before)
    measured(f"Alice: median {statistics.median(times):.2f} s of {TRIES}, longest {max(times):.2f} s,")
    measured(f"with {rate:.0f} strangers a second. Before: {before}; most: {most}; after: {after}")
    assert set(crowd.renewed) >= set(KINDS), "not all of them were dropped once"
    assert most.threads <= THREADS
    assert most.descriptors <= DESCRIPTORS
    assert most.memory <= before.memory + MEMORY
    assert after.memory <= before.memory + MEMORY
    assert server.ends() == 130


def test_what_is_said_of_many_strangers_at_once_is_said_in_whole_lines(
    loaded_bob: Callable[..., LoadedBob], keys: Keys
) -> None:
    server = loaded_bob()
    with Crowd(server.port, chat.frame(Offer.make(Role.ALICE, keys.alice, GROUP).hello)):
        for number in range(5):
            knock(server, keys.alice, server.homes / "alice").close()
            server.wait_for(lambda number=number: server.said(LEFT) == number + 1)  # type: ignore[misc]
    server.ends()
    assert server.torn == []


def many(few: int, lots: int) -> pytest.MarkDecorator:
    """Run a test with few of something, and again with lots where there is time."""
    slow = pytest.param(lots, marks=[pytest.mark.slow, pytest.mark.timeout(600)])
    return pytest.mark.parametrize("count", [few, slow])


@needs_proc
@many(500, 10_000)
def test_connect_and_close_again_and_again(
    loaded_bob: Callable[..., LoadedBob], keys: Keys, count: int
) -> None:
    server = loaded_bob()
    knock(server, keys.alice, server.homes / "alice").close()
    server.wait_for(lambda: server.said(WAITING) == 2)
    before = server.use()
    for _ in range(count):
        socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE).close()
    after = server.comes_back_to(before)
    measured(f"{count} times connected and closed. Before: {before}; after: {after}")
    assert after.memory <= before.memory + MEMORY
    knock(server, keys.alice, server.homes / "alice").close()
    server.wait_for(lambda: server.said(LEFT) == 2)
    assert 0 < server.said(CUT) <= count  # a line each, at most
    assert server.ends() == 130


@needs_proc
@many(50, 1000)
def test_one_conversation_after_another(loaded_bob: Callable[..., LoadedBob], keys: Keys, count: int) -> None:
    server = loaded_bob()

    def converse(number: int) -> None:
        channel = knock(server, keys.alice, server.homes / "alice")
        channel.send(f"request {number}")
        server.stdin.write(f"reply {number}\n")
        server.stdin.flush()
        assert channel.receive().text == f"reply {number}"
        channel.close()

    warm_up = count // 10
    for number in range(warm_up):
        converse(number)
    server.wait_for(lambda: server.said(WAITING) == warm_up + 1)
    before = server.use()
    for number in range(warm_up, count):
        converse(number)
    server.wait_for(lambda: server.said(WAITING) == count + 1)
    after = server.comes_back_to(before)
    measured(f"{count} conversations. Before: {before}; after: {after}")
    assert server.said(HERE) == server.said(LEFT) == count
    assert server.said(REQUEST) == count
    assert after.memory <= before.memory + GROWTH
    assert server.ends() == 130


@needs_proc
@many(2000, MESSAGES)
def test_one_long_conversation(loaded_bob: Callable[..., LoadedBob], keys: Keys, count: int) -> None:
    server = loaded_bob()
    channel = knock(server, keys.alice, server.homes / "alice")
    rounds, before, most = count // 2, server.use(), 0
    for number in range(rounds):
        channel.send(f"request {number}")
        server.stdin.write(f"reply {number}\n")
        server.stdin.flush()
        assert channel.receive().text == f"reply {number}"
        if number == rounds // 10:
            before = server.use()
        if number % 100 == 99:
            most = max(most, server.use().memory)
    during = server.use()
    channel.close()
    server.wait_for(lambda: server.said(LEFT) == 1 and server.said(REQUEST) == rounds)
    after = server.comes_back_to(before)
    measured(f"{count} messages. At a tenth: {before}; most: {most} KiB; last: {during}; after: {after}")
    assert most <= before.memory + GROWTH
    assert during.descriptors <= before.descriptors + 4  # a watcher and its pair of sockets, while he types
    assert server.ends() == 130
