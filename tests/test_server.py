"""Bob among strangers: who gives way, what he holds, and that the one Alice he talks to is left in peace.

Most is seen from outside: a real process over loopback, its threads, memory and descriptors counted.
"""

from __future__ import annotations

import collections
import contextlib
import heapq
import itertools
import json
import os
import queue
import re
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, NamedTuple

import pytest
from conftest import (
    DEADLINE,
    GROUP,
    ROOT,
    Background,
    Keys,
    Program,
    Start,
    StartBob,
    exhaustive,
    loopback,
    one_round,
    patched,
    store_with_group,
)

import bob_server
import crypto_utils as chat
from crypto_utils import Channel, FrameSocket, KeyStore, Offer, PinnedPeer, RecordType, Role

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
many_addresses = pytest.mark.skipif(
    sys.platform != "linux", reason="this machine has one loopback address only, not 127.0.0.0/8"
)


def few_or(few: int, lots: int, name: str = "count") -> pytest.MarkDecorator:
    """Run a test with few of something, and with lots among the exhaustive tests."""
    return pytest.mark.parametrize(name, [few, pytest.param(lots, marks=pytest.mark.exhaustive)])


Call = Callable[..., Channel]


@pytest.fixture
def call(homes: Path, keys: Keys) -> Iterator[Call]:
    """Return a function that connects to Bob's port and returns Alice's end of a conversation.

    What she does then must be over within DEADLINE, unless the test gives her more. With a `window`, no more
    than about so many bytes are on their way to her while she does not read.
    """
    with contextlib.ExitStack() as stack:

        def run(port: int | str, key: chat.RsaKey = keys.alice, *, window: int | None = None) -> Channel:
            connected = stack.enter_context(socket.socket())
            connected.settimeout(DEADLINE)
            if window:
                connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
            connected.connect(("127.0.0.1", int(port)))
            home = store_with_group(homes / chat.fingerprint(key)[7:15].replace("/", "-"))
            peer = PinnedPeer(home, "[bob.example]:1")
            channel = chat.alice_handshake(FrameSocket(connected), key, home, peer)
            channel.frames.deadline = time.monotonic() + DEADLINE
            return channel

        yield run


def is_dropped(connected: socket.socket) -> bool:
    """Whether the other side of a non-blocking socket has ended the connection."""
    try:
        return not connected.recv(65536)
    except BlockingIOError:
        return False
    except OSError:
        return True


# ----------------------------------------------------------------------------------------- who gives way


@pytest.mark.parametrize(
    ("address", "where"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
    ],
)
def test_what_counts_as_one_address(address: str, where: str) -> None:
    assert bob_server.source(address) == where


class Arrivals:
    """A listener whose connections come from where the test says."""

    def __init__(self) -> None:
        self._connections: queue.Queue[tuple[socket.socket, tuple[str, int]]] = queue.Queue()

    def accept(self) -> tuple[socket.socket, tuple[str, int]]:
        return self._connections.get()

    def come(self, address: str) -> socket.socket:
        ours, theirs = loopback()
        self._connections.put((theirs, (address, 1)))
        return ours


class Hall(NamedTuple):
    """A server of which no handshake ends by itself."""

    server: bob_server.Server
    arrivals: Arrivals
    begun: queue.Queue[FrameSocket]
    inbox: chat.Inbox

    def enter(self, address: str) -> socket.socket:
        """Connect from an address; return the stranger's end once the handshake has begun."""
        stranger = self.arrivals.come(address)
        self.begun.get(timeout=DEADLINE)
        return stranger


@pytest.fixture
def hall(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Hall]]:
    """Return a function that makes such a server, in which so many handshakes may run side by side."""
    strangers: list[socket.socket] = []

    def make(limit: int) -> Hall:
        arrivals, inbox = Arrivals(), chat.Inbox()
        begun: queue.Queue[FrameSocket] = queue.Queue()

        def wait(frames: FrameSocket, _: object) -> None:
            begun.put(frames)
            frames.receive(1)

        monkeypatch.setattr(bob_server, "HANDSHAKES", limit)
        server = bob_server.Server(arrivals, inbox, wait)  # a listener in name
        come = arrivals.come
        monkeypatch.setattr(
            arrivals, "come", lambda address: strangers.append(come(address)) or strangers[-1]
        )
        server.start()
        return Hall(server, arrivals, begun, inbox)

    yield make
    for stranger in strangers:
        stranger.close()


M = "203.0.113.1"  # an address of somebody who connects again and again


@pytest.mark.parametrize(
    ("there", "comes", "gives_way"),
    [
        ([M, M, M, M], M, 0),
        (["192.0.2.7", M, M, M], M, 1),
        ([M, M, "192.0.2.7", M], "192.0.2.7", 0),
        (["192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4"], "192.0.2.5", 0),
        (["192.0.2.1", M, "192.0.2.1", M], "192.0.2.5", 0),
        (["192.0.2.1", f"::ffff:{M}", "192.0.2.2", M], "192.0.2.5", 1),
        (["2001:db8::1", "2001:db8:0:1::1", "2001:db8:0:2::1", "2001:db8:0:1:ffff::"], "192.0.2.5", 1),
        (["2001:db8:0:1::1", "2001:db8:0:2::1", "192.0.2.1", "192.0.2.1"], "2001:db8:0:3::1", 2),
    ],
)
def test_the_oldest_of_the_address_that_has_the_most_gives_way(
    hall: Callable[[int], Hall], there: list[str], comes: str, gives_way: int
) -> None:
    bob = hall(4)
    strangers = [bob.enter(address) for address in there]
    newcomer = bob.enter(comes)
    assert strangers[gives_way].recv(1) == b"", "dropped without a word"
    rest = [stranger for number, stranger in enumerate(strangers) if number != gives_way] + [newcomer]
    for stranger in rest:
        stranger.setblocking(False)
        assert not is_dropped(stranger)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
@pytest.mark.parametrize(
    ("descriptors", "handshakes"),
    [(16, 1), (34, 1), (64, 16), (128, 48), (1024, 64), (bob_server.resource.RLIM_INFINITY, 64)],
)
def test_strangers_leave_descriptors_for_the_conversation(
    monkeypatch: pytest.MonkeyPatch, descriptors: int, handshakes: int
) -> None:
    monkeypatch.setattr(bob_server.resource, "getrlimit", lambda _: (descriptors, descriptors))
    assert bob_server.handshake_limit() == handshakes


def test_a_thread_that_cannot_be_started_costs_one_connection(
    hall: Callable[[int], Hall], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it cost a place: as many as before may come afterwards, and more than there are places."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    bob = hall(2)
    with monkeypatch.context() as tight:
        tight.setattr(threading.Thread, "start", refuse)
        for _ in range(5):
            assert bob.arrivals.come(M).recv(1) == b""
    strangers = [bob.enter(M) for _ in range(5)]
    assert [stranger.recv(1) for stranger in strangers[:3]] == [b""] * 3
    assert bob.begun.empty()


# --------------------------------------------------------------------------------- Bob, seen from outside


class Use(NamedTuple):
    """What a process holds at one moment."""

    threads: int
    descriptors: int
    memory: int  # resident, KiB


def use_of(process: int) -> Use:
    proc = Path("/proc") / str(process)
    status = (proc / "status").read_text()
    memory = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
    threads = re.search(r"^Threads:\s+(\d+)", status, re.MULTILINE)
    assert memory
    assert threads
    return Use(int(threads[1]), len(list((proc / "fd").iterdir())), int(memory[1]))


def comes_back_to(before: Use, process: int) -> Use:
    """Wait until a process holds no more threads and descriptors than before; return what it holds then."""
    deadline, pause = time.monotonic() + DEADLINE, threading.Event()
    while True:
        now = use_of(process)
        if now.threads <= before.threads and now.descriptors <= before.descriptors:
            return now
        assert time.monotonic() < deadline, f"{before} before, still {now}"
        pause.wait(0.05)


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
        return use_of(self.process.pid)

    def comes_back_to(self, before: Use) -> Use:
        return comes_back_to(before, self.process.pid)

    def says(self, text: str) -> None:
        self.stdin.write(f"{text}\n")
        self.stdin.flush()

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
    """Return a function that starts Bob and waits until he is waiting. Alice need not test his group."""
    started: list[LoadedBob] = []
    store_with_group(homes / "alice")

    def run(*arguments: str) -> LoadedBob:
        started.append(LoadedBob(homes, *arguments))
        return started[-1]

    yield run
    for server in started:
        if server.process.poll() is None:
            server.ends()


# ------------------------------------------------------------------------------------- past a slow crowd


CROWD = 200
AT_ONCE = (
    300  # strangers that a crowd with a rate holds at most: more than fit into Bob's hands and his queue
)
KINDS = ("says nothing", "drips", "sends rubbish", "closes", "stops inside its hello", "stops before READY")
THREADS = 2 * bob_server.HANDSHAKES  # at most; some that were cut off have not noticed yet
DESCRIPTORS = THREADS + 20  # a socket a thread; the streams, the listener, files open for a moment
MEMORY = 32 * 1024  # KiB more than at rest, at most: stacks, hellos, and what the allocator keeps
GROWTH = 4 * 1024  # KiB more after the whole of a long test than after its first part: it does not grow


class Stranger:
    """One of a crowd: it connects, does the one thing it does, and waits to be dropped."""

    def __init__(self, kind: str, port: int, hello: bytes, source: str = "127.0.0.1") -> None:
        self.kind = kind
        self.socket = socket.socket()
        self.socket.setblocking(False)
        if source != "127.0.0.1":
            self.socket.bind((source, 0))
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


class Crowd:
    """Strangers at Bob's door, all in one thread: so many, each replaced as soon as he drops it.

    With a `rate`, so many new ones come in each second, silent, whether he has dropped others or not.
    """

    def __init__(self, port: int, hello: bytes = b"", rate: float = 0.0, source: str = "127.0.0.1") -> None:
        self.dropped: collections.Counter[str] = collections.Counter()
        self._port, self._hello, self._rate, self._source = port, hello, rate, source
        self._selector = selectors.DefaultSelector()
        self._stopped = threading.Event()
        self._in_full_swing = threading.Event()
        self._begun = time.monotonic()
        self._thread = Background(self._run)

    def __enter__(self) -> Crowd:
        """Wait until so many were dropped that all is in full swing."""
        assert self._in_full_swing.wait(DEADLINE), f"only {self.dropped}"
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.result()

    @property
    def dropped_in_a_second(self) -> float:
        return sum(self.dropped.values()) / (time.monotonic() - self._begun)

    def _come(self, kind: str) -> None:
        stranger = Stranger(kind, self._port, self._hello, self._source)
        self._selector.register(stranger.socket, selectors.EVENT_WRITE, stranger)

    def _leave(self, stranger: Stranger) -> None:
        self._selector.unregister(stranger.socket)
        stranger.socket.close()

    def _run(self) -> None:
        try:
            kinds = itertools.cycle(KINDS)
            for kind in itertools.islice(kinds, 0 if self._rate else CROWD):
                self._come(kind)
            due, next_drip = self._begun, self._begun + 1
            while not self._stopped.is_set():
                for key, _ in self._selector.select(1 / self._rate if self._rate else 0.1):
                    self._serve(key.data)
                due = max(due, time.monotonic() - 0.1)  # what a busy machine missed is not made up for
                while self._rate and due < time.monotonic() and len(self._there()) < AT_ONCE:
                    due += 1 / self._rate
                    self._come("says nothing")
                if time.monotonic() > next_drip:
                    next_drip += 1
                    for stranger in self._there():
                        if stranger.kind == "drips" and stranger.connected:
                            stranger.drip()
                if sum(self.dropped.values()) >= CROWD:
                    self._in_full_swing.set()
        finally:
            for stranger in self._there():
                self._leave(stranger)
            self._selector.close()

    def _there(self) -> list[Stranger]:
        return [key.data for key in self._selector.get_map().values()]

    def _serve(self, stranger: Stranger) -> None:
        if not stranger.connected:
            self._selector.modify(stranger.socket, selectors.EVENT_READ, stranger)
            with contextlib.suppress(OSError):
                stranger.act()
        elif is_dropped(stranger.socket):
            self._leave(stranger)
            self.dropped[stranger.kind] += 1
            if not self._rate:
                self._come(stranger.kind)


class SlowLine:
    """Carries the bytes of any number of connections to a port, each way so many seconds late."""

    def __init__(self, port: int | str, seconds: float) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._goal, self._seconds = ("127.0.0.1", int(port)), seconds
        self._stop, self._stopped = socket.socketpair()
        self._thread = Background(self._carry)

    def __enter__(self) -> SlowLine:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.close()
        self._thread.result()

    def _carry(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._listener)
            stack.enter_context(self._stopped)
            selector = stack.enter_context(selectors.DefaultSelector())
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._stopped, selectors.EVENT_READ)
            late: list[tuple[float, int, Callable[[], object]]] = []
            count = itertools.count()

            def later(action: Callable[[], object]) -> None:
                heapq.heappush(late, (time.monotonic() + self._seconds, next(count), action))

            def connect(near: socket.socket) -> None:
                far = stack.enter_context(socket.create_connection(self._goal))
                selector.register(near, selectors.EVENT_READ, far)
                selector.register(far, selectors.EVENT_READ, near)

            def deliver(sink: socket.socket, data: bytes) -> None:
                with contextlib.suppress(OSError):
                    sink.sendall(data) if data else sink.shutdown(socket.SHUT_WR)

            while True:
                wait = max(0.0, late[0][0] - time.monotonic()) if late else None
                for key, _ in selector.select(wait):
                    if key.fileobj is self._stopped:
                        return
                    if key.fileobj is self._listener:
                        near = stack.enter_context(self._listener.accept()[0])
                        later(lambda near=near: connect(near))
                        continue
                    source, data = key.fileobj, b""
                    assert isinstance(source, socket.socket)
                    with contextlib.suppress(OSError):
                        data = source.recv(65536)
                    if not data:
                        selector.unregister(source)
                    later(lambda sink=key.data, data=data: deliver(sink, data))
                while late and late[0][0] <= time.monotonic():
                    heapq.heappop(late)[2]()


def measured(text: str) -> None:
    """Say it to who runs pytest with -s, and in the report of a test that failed."""
    print(f"\n    {text}")


def visit(server: LoadedBob, start: Start, port: int) -> float:
    """Let Alice come, say a word, get a reply, and leave; return how many seconds it took."""
    begun = time.monotonic()
    client = start("alice_client.py", "127.0.0.1", "--port", str(port))
    client.write("it is me\n")
    server.says("welcome")
    client.expect("^Bob: welcome\n")
    client.end_input()
    assert client.wait() == 0, client.stderr
    client.close()
    return time.monotonic() - begun


def visits_in_a_row(server: LoadedBob, start: Start, port: int, count: int) -> list[float]:
    times = []
    for _ in range(count):
        left = server.said(LEFT)
        times.append(visit(server, start, port))
        server.wait_for(lambda left=left: server.said(LEFT) == left + 1)
    return times


@pytest.mark.exhaustive
@pytest.mark.parametrize("count", [5])
@needs_proc
def test_alice_gets_past_a_crowd_that_stalls_drips_and_rants(
    loaded_bob: Callable[..., LoadedBob], start: Start, keys: Keys, count: int
) -> None:
    server = loaded_bob()
    offer = Offer.make(Role.ALICE, keys.alice, GROUP)  # Alice's own hello, as anybody on the line knows it
    visits_in_a_row(server, start, server.port, 1)
    before, during, times = server.use(), [], []
    with Crowd(server.port, chat.frame(offer.payload)) as crowd:
        for _ in range(count):
            times += visits_in_a_row(server, start, server.port, 1)
            during.append(server.use())
        rate = crowd.dropped_in_a_second
    most = Use(*map(max, zip(*during)))
    after = server.comes_back_to(before)
    measured(f"Alice: median {statistics.median(times):.2f} s of {count}, longest {max(times):.2f} s,")
    measured(f"with {rate:.0f} strangers a second. Before: {before}; most: {most}; after: {after}")
    assert set(crowd.dropped) >= set(KINDS), "not all of them were dropped once"
    assert most.threads <= THREADS
    assert most.descriptors <= DESCRIPTORS
    assert most.memory <= before.memory + MEMORY
    assert after.memory <= before.memory + MEMORY
    assert server.torn == [], "what is said of many strangers at once is said in whole lines"
    assert server.ends() == 130


@pytest.mark.exhaustive
@pytest.mark.parametrize("count", [10])
@many_addresses
def test_alice_on_a_slow_line_gets_past_silent_strangers_from_another_address(
    loaded_bob: Callable[..., LoadedBob], start: Start, count: int
) -> None:
    """With 150 ms each way, her handshake takes 0.6 s: 120 strangers come, and there is room for 64."""
    server = loaded_bob()
    with SlowLine(server.port, 0.15) as line, Crowd(server.port, rate=200, source="127.0.0.2") as crowd:
        times = visits_in_a_row(server, start, line.port, count)
        rate = crowd.dropped_in_a_second
    measured(f"{count} of {count}, median {statistics.median(times):.2f} s, {rate:.0f} dropped a second")
    assert server.ends() == 130


@pytest.mark.exhaustive
@pytest.mark.parametrize("count", [10])
def test_alice_on_a_fast_line_gets_past_silent_strangers_from_her_own_address(
    loaded_bob: Callable[..., LoadedBob], start: Start, count: int
) -> None:
    server = loaded_bob()
    with Crowd(server.port, rate=60) as crowd:
        times = visits_in_a_row(server, start, server.port, count)
        rate = crowd.dropped_in_a_second
    measured(f"{count} of {count}, median {statistics.median(times):.2f} s, {rate:.0f} dropped a second")
    assert server.ends() == 130


# ------------------------------------------------------------------------------------------ again and again


@needs_proc
@few_or(100, 10_000)
def test_connect_and_close_again_and_again(
    loaded_bob: Callable[..., LoadedBob], count: int, call: Call
) -> None:
    server = loaded_bob()
    call(server.port).close()
    server.wait_for(lambda: server.said(WAITING) == 2)
    before = server.use()
    for _ in range(count):
        socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE).close()
    after = server.comes_back_to(before)
    measured(f"{count} times connected and closed. Before: {before}; after: {after}")
    assert after.memory <= before.memory + MEMORY
    call(server.port).close()
    server.wait_for(lambda: server.said(LEFT) == 2)
    assert 0 < server.said(CUT) <= count  # a line each, at most
    assert server.ends() == 130


@needs_proc
@few_or(10, 1000)
def test_one_conversation_after_another(loaded_bob: Callable[..., LoadedBob], count: int, call: Call) -> None:
    server = loaded_bob()
    warm_up = count // 10
    before = server.use()
    for number in range(count):
        if number == warm_up:
            server.wait_for(lambda: server.said(LEFT) == warm_up)
            before = server.use()
        channel = call(server.port)
        channel.send(f"request {number}")
        server.says(f"reply {number}")
        assert channel.receive().text == f"reply {number}"
        channel.close()
    server.wait_for(lambda: server.said(LEFT) == count)
    after = server.comes_back_to(before)
    measured(f"{count} conversations. Before: {before}; after: {after}")
    assert server.said(HERE) == server.said(LEFT) == count
    assert server.said(REQUEST) == count
    assert after.memory <= before.memory + GROWTH
    assert server.ends() == 130


@needs_proc
@pytest.mark.exhaustive
@pytest.mark.parametrize("count", [20_000])
def test_one_long_conversation(loaded_bob: Callable[..., LoadedBob], count: int, call: Call) -> None:
    server = loaded_bob()
    channel = call(server.port)
    channel.frames.deadline = None  # it takes longer
    rounds, before, most = count // 2, server.use(), 0
    for number in range(rounds):
        channel.send(f"request {number}")
        server.says(f"reply {number}")
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
    assert during.descriptors <= before.descriptors
    assert server.ends() == 130


# ---------------------------------------------------------------------- tight limits, and a stopped screen


def strangers(port: int | str, count: int) -> list[socket.socket]:
    return [socket.create_connection(("127.0.0.1", int(port)), timeout=DEADLINE) for _ in range(count)]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
@pytest.mark.exhaustive
@pytest.mark.parametrize("descriptors", [40, 64])
def test_strangers_do_not_end_a_conversation_for_want_of_descriptors(
    bob: StartBob, start: Start, homes: Path, descriptors: int
) -> None:
    tight = patched("import resource as r", f"r.setrlimit(r.RLIMIT_NOFILE, ({descriptors}, {descriptors}))")
    server, port = bob("--transcript", str(homes / "kept"), python=tight)
    store_with_group(homes / "alice")
    early = strangers(port, 100)
    client = start("alice_client.py", "127.0.0.1", "--port", port)
    one_round(server, client, "before")
    late = strangers(port, 100)
    one_round(server, client, "after")
    client.end_input()
    assert client.wait() == 0, client.stderr
    server.expect("^Alice left", "stderr")
    again = start("alice_client.py", "127.0.0.1", "--port", port)
    one_round(server, again, "again")
    for stranger in early + late:
        stranger.close()
    again.end_input()
    assert again.wait() == 0, again.stderr


@pytest.mark.exhaustive
def test_strangers_do_not_end_a_conversation_for_want_of_threads(
    bob: StartBob, start: Start, tmp_path: Path
) -> None:
    tight = tmp_path / "tight"
    server, port = bob(
        python=patched(
            "import threading",
            "begin = threading.Thread.start",
            "def start(thread):",
            f"    if Path({str(tight)!r}).exists():",
            '        raise RuntimeError("can\'t start new thread")',
            "    begin(thread)",
            "threading.Thread.start = start",
        )
    )
    client = start("alice_client.py", "127.0.0.1", "--port", port)
    one_round(server, client, "before")
    tight.touch()
    for stranger in strangers(port, 100):
        assert stranger.recv(1) == b""
        stranger.close()
    one_round(server, client, "after")
    client.end_input()
    assert client.wait() == 0, client.stderr
    server.expect("^Waiting for Alice", "stderr")
    tight.unlink()
    one_round(server, start("alice_client.py", "127.0.0.1", "--port", port), "again")


def stop_screen(server: Program) -> None:
    """Let nothing more be written to what stands for a program's screen: it waits."""
    screen = os.open(f"/proc/{server.process.pid}/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    if os.isatty(screen):
        termios.tcflow(screen, termios.TCOOFF)  # as Ctrl-S does
    else:
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(screen, b"\n" * 4096)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(screen, b"\n")
    os.close(screen)


@pytest.mark.exhaustive
@needs_proc
@pytest.mark.parametrize(
    ("terminal", "verbose", "number"),
    [
        *(
            pytest.param(*case, id=f"{number}")
            for number, case in enumerate(
                3 * list(itertools.product([True, False], [[], ["-v"]], [signal.SIGINT, signal.SIGTERM]))
            )
        ),
    ],
)
def test_a_stopped_screen_holds_up_neither_strangers_nor_the_end(
    bob: StartBob, terminal: bool, verbose: list[str], number: signal.Signals
) -> None:
    server, port = bob(*verbose, terminal=terminal)
    for stranger in strangers(port, 20):  # what is kept from now on, such as stacks
        stranger.close()
    server.expect("127.0.0.1: Cut off", "stdout" if terminal else "stderr")
    before = use_of(server.process.pid)._replace(threads=2)  # the main one, and the one that accepts
    stop_screen(server)
    for _ in range(25):
        for stranger in strangers(port, 20):
            stranger.close()
    comes_back_to(before, server.process.pid)
    server.process.send_signal(number)
    assert server.process.wait(DEADLINE) == 130


@needs_proc
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.exhaustive)], ids=str
)
def test_a_stopped_screen_in_a_conversation(
    bob: StartBob, keys: Keys, homes: Path, number: signal.Signals, call: Call
) -> None:
    """A signal ends Bob, and Alice is told in a goodbye."""
    server, port = bob("-v", terminal=True)
    PinnedPeer(KeyStore(homes / "bob"), "alice").pin(keys.alice)
    client = call(port)
    server.expect("Alice is here")
    server.expect(r"\(Alice's turn\) ")
    before = use_of(server.process.pid)
    stop_screen(server)
    client.send("hello")
    for _ in range(10):
        for stranger in strangers(port, 20):
            stranger.close()
    comes_back_to(before, server.process.pid)
    server.process.send_signal(number)
    assert client.receive().type is RecordType.CLOSE
    client.frames.hang_up()
    assert server.process.wait(DEADLINE) == 0


# -------------------------------------------------------------------------------- two who want to talk


def test_another_alice_is_told_that_bob_is_busy(bob: StartBob, keys: Keys, homes: Path, call: Call) -> None:
    server, port = bob()
    first = call(port)
    one_round(server, first, "first")
    (homes / "bob" / "known_peers").unlink()  # or any other key would be refused
    other = call(port, keys.mallory)
    goodbye = other.receive()
    assert (goodbye.type, goodbye.text) == (RecordType.CLOSE, chat.BUSY)
    other.close()
    one_round(server, first, "second")
    first.close()
    server.expect("^Alice left", "stderr")
    server.expect("^Another Alice called from 127.0.0.1", "stderr")  # no sooner
    server.process.terminate()
    assert server.wait() == 130


def test_notes_about_strangers_wait_for_the_end_of_the_conversation(bob: StartBob, call: Call) -> None:
    """And there are never more of them than NOTES."""
    server, port = bob()
    channel = call(port)
    one_round(server, channel, "before")
    for _ in range(3):
        for stranger in strangers(port, bob_server.NOTES // 2):
            stranger.sendall(b"\xff" * 8)
            assert stranger.recv(65536)  # his hello
            with contextlib.suppress(OSError):
                while stranger.recv(65536):  # until he is done with it
                    pass
            stranger.close()
    one_round(server, channel, "after")
    assert "127.0.0.1: " not in server.stderr
    channel.close()
    server.expect("^Waiting for Alice", "stderr")
    assert server.stderr.count("127.0.0.1: Broken off: ") == bob_server.NOTES
    server.process.terminate()
    assert server.wait() == 130


def half_a_frame(channel: Channel) -> None:
    """Let Alice send a record but for its end."""
    record = channel._sealer.seal(RecordType.TEXT, b"half of this", channel._opener)
    channel.frames.socket.sendall(chat.frame(record)[:-100])


# Not at a terminal: it takes no line that would fill the buffers of a connection.
AT_TAKEOVER = [
    (True, "inside a frame"),
    *exhaustive(
        (False, "not reading"),
        (False, "inside a frame"),
        *itertools.product([True, False], ["at Alice's turn", "at Bob's turn"]),
    ),
]


@pytest.mark.parametrize(("terminal", "when"), AT_TAKEOVER)
def test_the_same_alice_takes_over(
    bob: StartBob, keys: Keys, homes: Path, terminal: bool, when: str, call: Call
) -> None:
    """Her older connection is told so in a goodbye, where it reads at all; the new one goes on at once."""
    PinnedPeer(KeyStore(homes / "bob"), "alice").pin(keys.alice)
    server, port = bob(
        terminal=terminal,
        python=patched(
            f"chat.STALL_SECONDS = {10 * DEADLINE}; chat.TCP_OPTIONS['TCP_USER_TIMEOUT'] = 10**6",
            "import socket",
            "make = chat.FrameSocket.__init__",
            "def make_small(frames, connected):",
            "    connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # as on a slow line",
            "    make(frames, connected)",
            "chat.FrameSocket.__init__ = make_small",
        ),
    )
    stdout, stderr = "stdout", "stdout" if terminal else "stderr"
    first = call(port, window=4096 if when == "not reading" else None)
    server.expect("Alice speaks first", stderr)
    if when in ("at Bob's turn", "not reading"):
        first.send("hello")
        server.expect("hello\r?\n", stdout)
    if when == "inside a frame":
        half_a_frame(first)
    if when == "not reading":
        for _ in range(8):  # a line is as long as a message may be; only one is sent, and that not whole
            server.write(b"x" * (chat.TEXT_LIMIT // 8))
        server.write("\n")
        first.frames.socket.recv(1)  # some of it is on its way
    second = call(port)
    server.expect("Alice is here", stderr)
    second.send("here I am")
    server.expect("here I am\r?\n", stdout)
    if when == "not reading":
        first.frames.socket.close()
    else:
        goodbye = first.receive()
        assert goodbye.type is RecordType.CLOSE
        assert "connected again" in goodbye.text
    if terminal:
        server.expect("Bob: ")  # what is typed before its prompt is not sent
    server.write("welcome back\n")
    assert second.receive().text == "welcome back"
    first.frames.socket.close()
    second.close()
    server.expect("Waiting for Alice", stderr)
    server.process.terminate()
    assert server.wait() == 130


def test_who_was_replaced_before_anybody_looked_is_told_too(keys: Keys, homes: Path) -> None:
    """Both stand in the inbox: the earlier one of the same Alice gets a goodbye."""
    console = chat.Console(Role.BOB)
    store = KeyStore(homes / "bob")
    channels: list[tuple[Channel, Channel]] = []
    for _ in range(2):
        near, far = loopback()
        his = Background(
            lambda far=far: chat.bob_handshake(FrameSocket(far), keys.bob, GROUP, PinnedPeer(store, "alice"))
        )
        home = store_with_group(homes / "alice")
        hers = chat.alice_handshake(FrameSocket(near), keys.alice, home, PinnedPeer(home, "[bob]:1"))
        channel = his.result()
        assert isinstance(channel, Channel)
        channels.append((channel, hers))
        console.inbox.put(channel)
    guest = bob_server.next_guest(console)
    assert guest is channels[1][0]
    goodbye = channels[0][1].receive()
    assert goodbye.type is RecordType.CLOSE
    for end in itertools.chain(*channels):
        end.frames.socket.close()
    for pipe in (console.inbox._ours, console.inbox._theirs):
        pipe.close()
    os.close(console.nowhere)


SPY = (
    "import atexit, json, threading, time",
    "log, inside, faults = {}, {}, []",
    "seal = chat.Sealer.seal",
    "def spy(sealer, *arguments, **options):",
    "    me = 'main' if threading.current_thread() is threading.main_thread() else threading.get_ident()",
    "    if inside.setdefault(id(sealer), me) != me: faults.append('two threads at once')",
    "    log.setdefault(id(sealer), (sealer, []))[1].append(me)",
    "    try: return seal(sealer, *arguments, **options)",
    "    finally: inside.pop(id(sealer), None)",
    "chat.Sealer.seal = spy",
    "sys.setswitchinterval(1e-6)",
)


def test_one_thread_at_a_time_has_the_keys_of_a_conversation(
    start: Start, tmp_path: Path, call: Call
) -> None:
    """A handshake's thread seals until it hands over, then the main thread alone; nobody goes back."""
    report = tmp_path / "report"
    write = f"Path({str(report)!r}).write_text(json.dumps([[s for _, s in log.values()], faults]))"
    server = start("bob_server.py", "--port", "0", python=patched(*SPY, f"atexit.register(lambda: {write})"))
    port = server.expect(r"^Listening on port (\d+)\.", "stderr")[1]
    visits = 12
    channel = call(port)
    for number in range(visits):
        channel.send(f"request {number}")
        if number % 3 == 0:
            server.write(f"reply {number}\n")  # it is on its way, or not, when she comes again
        again = call(port)
        channel.frames.hang_up()
        channel = again
    other = call(port)
    channel.frames.hang_up()
    other.close()
    server.process.terminate()
    assert server.wait() in (0, 130)
    sealed, faults = json.loads(report.read_text())
    assert faults == []
    assert len(sealed) == visits + 2
    for threads in sealed:
        by_main = [thread == "main" for thread in threads]
        assert by_main == sorted(by_main), "a handshake's thread came back"
        assert len(set(threads) - {"main"}) == 1
    assert any("main" in threads for threads in sealed), "nobody was told"
