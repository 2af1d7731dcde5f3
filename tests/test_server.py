"""Bob among strangers: who gives way, what he holds, and that the one Alice he talks to is left in peace.

Most is seen from outside: a real process over loopback, its threads, memory and descriptors counted.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import itertools
import json
import os
import queue
import re
import signal
import socket
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, NamedTuple

import pytest
from conftest import (
    AT_TERMINAL,
    DEADLINE,
    GROUP,
    WAITING,
    Background,
    Keys,
    Program,
    Start,
    StartBob,
    Stranger,
    exhaustive,
    loopback,
    one_round,
    patched,
    pin_each_other,
    store_with_group,
)

import alice_client
import bob_server
import crypto_utils as chat
from crypto_utils import (
    Channel,
    ConnectionCut,
    FrameSocket,
    KeyStore,
    NoConversation,
    PinnedPeer,
    RecordType,
    Role,
    RsaKey,
    Transcript,
)

BUSY = "^whoever answered cannot talk now; try again later$"
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="no /proc to count another process's descriptors in"
)
many_addresses = pytest.mark.skipif(
    sys.platform != "linux", reason="this machine has one loopback address only, not 127.0.0.0/8"
)


def known_to_bob(homes: Path, *keys: RsaKey) -> None:
    """Let Bob know an Alice, or several of that name: nobody is asked."""
    lines = "".join(f"alice {chat.ssh_line(key)}\n" for key in keys)
    KeyStore(homes / "bob").write("known_peers", lambda: lines.encode())


def is_dropped(connected: socket.socket) -> bool:
    """Whether the other side of a non-blocking socket has ended the connection."""
    try:
        return not connected.recv(65536)
    except BlockingIOError:
        return False
    except OSError:
        return True


# ---------------------------------------------------------------------------------- one guest at a time


def test_another_alice_is_told_that_bob_is_busy(
    bob: StartBob, homes: Path, keys: Keys, stranger: Stranger
) -> None:
    """And nothing of her is ever shown, also with -v; afterwards, Bob is told how many called."""
    server, port = bob("-v")
    known_to_bob(homes, keys.alice, keys.mallory)
    first = stranger(port, keys.alice)
    one_round(server, first, "first")
    for key in (keys.mallory, keys.alice):  # the same Alice, too: her other program may be open still
        with pytest.raises(NoConversation, match=BUSY):
            stranger(port, key)
    rubbish = socket.create_connection(("127.0.0.1", int(port)), timeout=DEADLINE)
    rubbish.sendall(b"\xff" * 8)
    FrameSocket(rubbish).receive(chat.HELLO_LIMIT)
    assert rubbish.recv(1) == b""
    rubbish.close()
    one_round(server, first, "second")
    assert "127.0.0.1" not in server.stderr
    first.close()
    server.expect(r"^Alice left\.\nMeanwhile others called: 3\.\nWaiting for Alice", "stderr")
    one_round(server, stranger(port, keys.mallory), "third")
    assert server.stderr.count("hello_bob is made") == 2  # for those two with whom he talked


def test_a_stranger_is_counted_or_told_of_by_when_the_handshake_ends(
    bob: StartBob, homes: Path, keys: Keys, stranger: Stranger
) -> None:
    server, port = bob()
    known_to_bob(homes, keys.alice)

    def connect() -> socket.socket:
        connected = socket.create_connection(("127.0.0.1", int(port)), timeout=DEADLINE)
        FrameSocket(connected).receive(chat.HELLO_LIMIT)
        return connected

    with connect() as before:
        guest = stranger(port, keys.alice)
        one_round(server, guest, "hello")
        before.sendall(b"\xff" * 8)
        assert before.recv(1) == b""
        with connect() as during:
            guest.close()
            server.expect(r"^Alice left\.\nMeanwhile others called: 1\.\nWaiting for Alice", "stderr")
            during.sendall(b"\xff" * 8)
            server.expect(r"^127\.0\.0\.1: Broken off: ", "stderr")


@pytest.mark.parametrize("at", ["the question", "his turn"])
def test_who_calls_meanwhile_does_not_touch_what_is_half_typed(
    bob: StartBob, homes: Path, keys: Keys, stranger: Stranger, at: str
) -> None:
    server, port = bob(**AT_TERMINAL)
    if at == "his turn":
        known_to_bob(homes, keys.alice)
    first = stranger(port, keys.alice)
    if at == "the question":
        server.expect("Type the words that Alice reads, or no: ")
        answer = " ".join(first.own_words)
    else:
        server.expect(WAITING)
        first.send("well?")
        server.expect("Bob: ")
        answer = "a reply that takes its time"
    server.write(answer[:7])
    server.expect(answer[:7])  # echoed
    before = len(server.stdout)
    for _ in range(20):
        with pytest.raises(NoConversation, match="cannot talk now"):
            stranger(port, keys.alice if at == "his turn" else keys.mallory)
    assert "127.0.0.1" not in server.stdout[before:]
    server.write(answer[7:] + "\r")
    if at == "the question":
        server.expect("The key is pinned")
        server.expect(WAITING)
    else:
        assert first.receive().text == answer
    first.close()
    server.expect(r"Meanwhile others called: 20\.")


def test_after_every_end_of_a_guest_the_next_one_gets_in(
    bob: StartBob, homes: Path, keys: Keys, stranger: Stranger
) -> None:
    def reset(guest: Channel) -> None:
        guest.frames.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        guest.frames.socket.close()

    def stop_inside_a_record(guest: Channel) -> None:
        guest.frames.socket.sendall(b"\0")
        guest.frames.hang_up()

    forged = bytes(11) + b"\1" + bytes(256 + 16 + 256)
    server, port = bob()
    known_to_bob(homes, keys.alice)
    for end, said in (
        (Channel.close, "Alice left before anything was said"),
        (lambda guest: guest.frames.hang_up(), "Cut off: the connection ended without a goodbye"),
        (reset, "Cut off: the connection broke"),
        (lambda guest: guest.frames.send(forged), "Broken off: the record's signature is not valid"),
        (stop_inside_a_record, "Cut off: the connection ended in the middle of a message"),
        (lambda guest: (one_round(server, guest), guest.close()), r"Alice left\."),
    ):
        end(stranger(port, keys.alice))
        server.expect(f"^{said}", "stderr")
        server.expect("^Waiting for Alice", "stderr")
    one_round(server, stranger(port, keys.alice), "at last")
    assert "Meanwhile" not in server.stderr


@pytest.mark.parametrize("at", ["send", "keep"])
@pytest.mark.parametrize("error", [ConnectionCut("broken"), MemoryError()], ids=["cut", "memory"])
def test_the_place_is_free_again_when_no_conversation_comes_of_it(
    tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch, error: BaseException, at: str
) -> None:
    near, far = loopback()
    place = threading.Lock()
    frames = FrameSocket(far)
    send, sent = frames.send, []

    def fail_the_second_time(*payloads: bytes) -> None:
        sent.append(payloads)
        if len(sent) == 2:
            assert place.locked(), "it is taken before READY is on its way"
            if at == "send":
                raise error
        send(*payloads)

    def fail(*_: object) -> None:
        raise error

    transcript = Transcript()
    monkeypatch.setattr(transcript, "add", fail)
    monkeypatch.setattr(frames, "send", fail_the_second_time)
    home = store_with_group(tmp_path / "alice")
    alice = Background(
        lambda: alice_client.handshake(
            FrameSocket(near), keys.alice, PinnedPeer(home, "[bob]:1"), Transcript()
        )
    )
    store = KeyStore(tmp_path / "bob")
    with pytest.raises(type(error)):
        bob_server.handshake(frames, keys.bob, GROUP, PinnedPeer(store, "alice"), place, transcript)
    assert not place.locked()
    far.close()
    with pytest.raises(ConnectionCut) if at == "send" else contextlib.nullcontext():
        alice.result()
    near.close()


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
    bob: StartBob, homes: Path, keys: Keys, tmp_path: Path, stranger: Stranger
) -> None:
    """A handshake's thread seals until it hands over, then the main thread alone; nobody goes back."""
    report = tmp_path / "report"
    write = f"Path({str(report)!r}).write_text(json.dumps([[s for _, s in log.values()], faults]))"
    server, port = bob(python=patched(*SPY, f"atexit.register(lambda: {write})"))
    known_to_bob(homes, keys.alice)
    visits = 5
    for number in range(visits):
        channel = stranger(port, keys.alice)
        one_round(server, channel, f"request {number}")
        with pytest.raises(NoConversation):
            stranger(port, keys.alice)
        channel.close()
        server.expect("^Waiting for Alice", "stderr")
    server.process.terminate()
    server.wait()
    sealed, faults = json.loads(report.read_text())
    assert faults == []
    assert len(sealed) == 2 * visits
    assert sorted(len(threads) for threads in sealed) == [1] * visits + [2] * visits  # READY, and a reply
    for threads in sealed:
        assert threads[0] != "main"
        assert set(threads[1:]) <= {"main"}


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


class Hall:
    """A door behind which no handshake ends by itself; connections come from where the test says."""

    def __init__(self) -> None:
        self.console = chat.Console(Role.BOB)
        self.begun: queue.Queue[FrameSocket] = queue.Queue()
        self.strangers: list[socket.socket] = []
        self._arrivals: queue.Queue[tuple[socket.socket, tuple[str, int]]] = queue.Queue()
        self.accept = self._arrivals.get
        self.door = bob_server.Door(self, self.console, self._wait)  # a listener in name

    def _wait(self, frames: FrameSocket, _: threading.Lock) -> None:
        self.begun.put(frames)
        frames.receive(1)

    def come(self, address: str) -> socket.socket:
        ours, theirs = loopback()
        self.strangers.append(ours)
        self._arrivals.put((theirs, (address, 1)))
        return ours

    def enter(self, address: str) -> socket.socket:
        """Connect from an address; return the stranger's end once the handshake has begun."""
        stranger = self.come(address)
        self.begun.get(timeout=DEADLINE)
        return stranger


@pytest.fixture
def hall(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Hall]]:
    """Return a function that makes one in which so many handshakes may run side by side."""
    halls: list[Hall] = []

    def make(limit: int) -> Hall:
        monkeypatch.setattr(bob_server, "HANDSHAKES", limit)
        halls.append(Hall())
        return halls[-1]

    yield make
    for stranger in itertools.chain(*(hall.strangers for hall in halls)):
        stranger.close()


M = "203.0.113.1"  # an address of somebody who connects again and again


@pytest.mark.parametrize(
    ("there", "comes", "gives_way"),
    [
        ([M, M, M, M], M, 0),
        (["192.0.2.7", M, M, M], M, 1),
        ([M, M, "192.0.2.7", M], "192.0.2.7", 0),
        (["192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4"], "192.0.2.5", 0),
        (["192.0.2.1", f"::ffff:{M}", "192.0.2.2", M], "192.0.2.5", 1),
        (["2001:db8::1", "2001:db8:0:1::1", "2001:db8:0:2::1", "2001:db8:0:1:ffff::"], "192.0.2.5", 1),
    ],
)
def test_the_oldest_of_the_address_that_has_the_most_gives_way(
    hall: Callable[[int], Hall], there: list[str], comes: str, gives_way: int
) -> None:
    bob = hall(4)
    strangers = [bob.enter(address) for address in there]
    strangers.append(bob.enter(comes))
    assert strangers.pop(gives_way).recv(1) == b"", "dropped without a word"
    for stranger in strangers:
        stranger.setblocking(False)
        assert not is_dropped(stranger)


def test_when_bob_leaves_nobody_is_sent_ready_any_more(hall: Callable[[int], Hall]) -> None:
    """Nobody would say goodbye to them."""
    bob = hall(4)
    bob.enter(M)
    bob.console.leaving = True
    with pytest.raises(KeyboardInterrupt):
        bob.door.guest()
    assert bob.door.place.locked()


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
            assert bob.come(M).recv(1) == b""
    strangers = [bob.enter(M) for _ in range(5)]
    assert [stranger.recv(1) for stranger in strangers[:3]] == [b""] * 3
    assert bob.begun.empty()


# ----------------------------------------------------------------------------- where Bob can be reached


def invitation(program: Program) -> str:
    return program.expect(r"^  python3 alice_client.py (\S+)", "stderr")[1]


def test_parameters_first_then_listening(start: Start, homes: Path) -> None:
    """While he searches, nobody is let wait at a closed door; a port that is taken is told before that."""
    (homes / "bob" / "dh_parameters.pem").unlink()
    slow = patched(
        "import socket",
        "def search(bits, progress):",
        "    print('(searching)', file=sys.stderr, flush=True)",
        "    input()",
        f"    return chat.Group({GROUP.p}, {GROUP.g})",
        "chat.generate_group = search",
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        taken = start("bob_server.py", "--host", "127.0.0.1", "--port", port, python=slow)
        assert taken.wait() == 1
        taken.expect(r"\AStopped: cannot listen on 127.0.0.1 port \d+: the port is taken", "stderr")
    server = start("bob_server.py", "--host", "127.0.0.1", "--port", port, python=slow)
    server.expect("^\\(searching\\)", "stderr")
    with socket.socket() as early:
        assert early.connect_ex(("127.0.0.1", int(port))) == errno.ECONNREFUSED
    server.write("\n")
    assert invitation(server) == "127.0.0.1"
    server.expect("^Listening on port", "stderr")


def test_bobs_command_never_sends_alice_to_herself(start: Start) -> None:
    """Where no route tells his address, words in capitals say what is missing."""
    no_route = patched(
        "import socket",
        "def connect(self, address): raise OSError(101, 'Network is unreachable')",
        "script.socket.socket = type('socket', (socket.socket,), {'connect': connect})",
    )
    server = start("bob_server.py", "--port", "0", python=no_route)
    assert invitation(server) == "ADDRESS-OF-THIS-MACHINE"


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


class LoadedBob(Program):
    """Bob, who knows Alice, and waits. A thread reads what he says, so that he never waits for a reader.

    He is not measured by coverage, which takes memory and time of its own.
    """

    def __init__(self, homes: Path) -> None:
        self._news = threading.Condition()
        self._came = self._looked_at = 0  # pieces of what he says
        alone = ("env", *(f"--unset={name}" for name in os.environ if "COV" in name), sys.executable)
        super().__init__("bob_server.py", "--host", "127.0.0.1", "--port", "0", home=homes, python=alone)
        self._reader = Background(self._take_in)
        self.port = self.expect(r"Listening on port (\d+)\.", "stderr")[1]
        self.expect("Waiting for Alice", "stderr")

    def _take_in(self) -> None:
        while more := super()._read(time.monotonic() + 10**6):
            with self._news:
                self._came += more
                self._news.notify_all()

    def _read(self, deadline: float) -> bool:
        with self._news:
            seconds = max(0, deadline - time.monotonic())
            self._news.wait_for(lambda: self._came > self._looked_at or not self._sources, seconds)
            before, self._looked_at = self._looked_at, self._came
        return self._came > before

    def close(self) -> None:
        self.process.terminate()
        assert self.wait() == 130
        self._reader.result()
        super().close()


@pytest.fixture
def loaded_bob(homes: Path, keys: Keys) -> Iterator[LoadedBob]:
    known_to_bob(homes, keys.alice)
    with contextlib.closing(LoadedBob(homes)) as server:
        pin_each_other(homes, server.port)
        yield server


# ------------------------------------------------------------------------------------- past a slow crowd


CROWD = 200
AT_ONCE = 300  # strangers that a crowd with a rate holds at most: more than fit into Bob's hands and queue
KINDS = ("says nothing", "drips", "sends rubbish", "closes", "stops inside its hello", "stops before READY")
THREADS = 2 * bob_server.HANDSHAKES  # at most, with some that are ending
DESCRIPTORS = THREADS + 20  # a socket a thread; the streams, the listener, files open for a moment
MEMORY = 32 * 1024  # KiB more than at rest, at most: stacks, hellos, and what the allocator keeps
GROWTH = 1024  # KiB more after the whole of a long test than after its first part: it does not grow


class Meanwhile:
    """Runs `_run` in an event loop of a thread of its own, until the end of a with statement."""

    def __init__(self) -> None:
        self.ready = threading.Event()
        self._thread = Background(lambda: asyncio.run(self._begin()))

    def __enter__(self) -> Meanwhile:
        assert self.ready.wait(DEADLINE), vars(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.result()

    async def _begin(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        await self._run()

    async def _run(self) -> None:
        raise NotImplementedError


class Crowd(Meanwhile):
    """Strangers at Bob's door: so many, of all kinds, each replaced as soon as he drops it.

    With a `rate`, so many new ones come in each second, silent, whether he has dropped others or not.
    """

    def __init__(self, port: str, hello: bytes = b"", rate: int = 0, source: str = "127.0.0.1") -> None:
        self.dropped: collections.Counter[str] = collections.Counter()
        self._port, self._hello, self._rate, self._source = port, hello, rate, source
        self._begun = time.monotonic()
        super().__init__()

    @property
    def dropped_in_a_second(self) -> float:
        return sum(self.dropped.values()) / (time.monotonic() - self._begun)

    async def _run(self) -> None:
        there = set()
        for kind in itertools.cycle(KINDS):
            if self._stop.is_set():
                break
            if len(there) < (AT_ONCE if self._rate else CROWD):
                there.add(asyncio.ensure_future(self._come("says nothing" if self._rate else kind)))
                await asyncio.sleep(1 / self._rate if self._rate else 0)
            else:
                await asyncio.wait(there, return_when=asyncio.FIRST_COMPLETED)
            there = {one for one in there if not one.done()}
            if sum(self.dropped.values()) >= CROWD:  # all is in full swing
                self.ready.set()
        for one in there:
            one.cancel()
        await asyncio.gather(*there, return_exceptions=True)

    async def _come(self, kind: str) -> None:
        """Be one of the crowd: connect, do the one thing that its kind does, and wait to be dropped."""
        with contextlib.suppress(OSError):
            at = ("127.0.0.1", int(self._port))
            reader, writer = await asyncio.open_connection(*at, local_addr=(self._source, 0))
            drip = None
            try:
                if kind == "sends rubbish":
                    writer.write(b"\xff" * 100)
                elif kind == "closes":
                    writer.write_eof()
                elif kind == "stops inside its hello":
                    writer.write(self._hello[: len(self._hello) // 2])
                elif kind == "stops before READY":
                    writer.write(self._hello)
                elif kind == "drips":
                    drip = asyncio.ensure_future(self._drip(writer))
                while await reader.read(65536):
                    pass
            finally:
                self.dropped[kind] += 1
                writer.close()
                if drip:
                    drip.cancel()

    async def _drip(self, writer: asyncio.StreamWriter) -> None:
        for byte in self._hello:
            writer.write(bytes([byte]))
            await asyncio.sleep(1)


class SlowLine(Meanwhile):
    """Carries the bytes of any number of connections to a port, each way so many seconds late."""

    def __init__(self, port: str, seconds: float) -> None:
        self._goal, self._seconds = port, seconds
        super().__init__()

    async def _run(self) -> None:
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        async with server:
            self.port = str(server.sockets[0].getsockname()[1])
            self.ready.set()
            await self._stop.wait()

    async def _connect(self, near: asyncio.StreamReader, to_near: asyncio.StreamWriter) -> None:
        await asyncio.sleep(self._seconds)
        far, to_far = await asyncio.open_connection("127.0.0.1", int(self._goal))
        await asyncio.gather(self._carry(near, to_far), self._carry(far, to_near))

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                self._loop.call_later(self._seconds, sink.write, data)
        await asyncio.sleep(self._seconds)
        sink.close()


def measured(text: str) -> None:
    """Say it to who runs pytest with -s, and in the report of a test that failed."""
    print(f"\n    {text}")


def visit(server: LoadedBob, start: Start, port: str) -> float:
    """Let Alice come, say a word, get a reply, and leave; return how many seconds it took."""
    begun = time.monotonic()
    client = start("alice_client.py", "127.0.0.1", "--port", port)
    one_round(server, client)
    client.end_input()
    assert client.wait() == 0, client.stderr
    took = time.monotonic() - begun
    server.expect("Alice left", "stderr")
    server.expect("Waiting for Alice", "stderr")
    return took


@pytest.mark.exhaustive
@needs_proc
def test_alice_gets_past_a_crowd_that_stalls_drips_and_rants(
    loaded_bob: LoadedBob, start: Start, keys: Keys
) -> None:
    server, process = loaded_bob, loaded_bob.process.pid
    hello, *_ = chat.make_hello(Role.ALICE, keys.alice, GROUP)  # as anybody on the line knows it
    visit(server, start, server.port)
    before, during, times = use_of(process), [], []
    with Crowd(server.port, chat.frame(hello.encode()), source="127.0.0.2") as crowd:
        for _ in range(5):
            times.append(visit(server, start, server.port))
            during.append(use_of(process))
        rate = crowd.dropped_in_a_second
    most = Use(*map(max, zip(*during)))
    after = comes_back_to(before, process)
    measured(f"Alice: {sorted(times)} s, with {rate:.0f} strangers a second. {before}; {most}; {after}")
    assert set(crowd.dropped) >= set(KINDS), "not all of them were dropped once"
    assert most.threads <= THREADS
    assert most.descriptors <= DESCRIPTORS
    assert max(most.memory, after.memory) <= before.memory + MEMORY


@pytest.mark.exhaustive
@many_addresses
def test_alice_on_a_slow_line_gets_past_silent_strangers_from_another_address(
    loaded_bob: LoadedBob, start: Start, homes: Path
) -> None:
    """With 150 ms each way, her handshake takes 0.6 s: 300 strangers come, and there is room for 64."""
    with (
        SlowLine(loaded_bob.port, 0.15) as line,
        Crowd(loaded_bob.port, rate=800, source="127.0.0.2") as crowd,
    ):
        pin_each_other(homes, line.port)
        times = [visit(loaded_bob, start, line.port) for _ in range(5)]
        measured(f"Alice: {sorted(times)} s, {crowd.dropped_in_a_second:.0f} dropped a second")


# ------------------------------------------------------------------------------------------ again and again


@needs_proc
@pytest.mark.parametrize(
    ("who", "count"),
    [
        ("who hangs up", 100),
        ("guests", 10),
        *exhaustive(("who hangs up", 2000), ("guests", 200), ("one guest", 2000)),
    ],
)
def test_bob_holds_no_more_after_many_than_after_a_few(
    loaded_bob: LoadedBob, keys: Keys, stranger: Stranger, who: str, count: int
) -> None:
    """So many that GROWTH is half a KiB of each who hangs up, or of each round, and 5 KiB of each guest."""
    server, process = loaded_bob, loaded_bob.process.pid
    rest = tenth = use_of(process)
    channel = stranger(server.port, keys.alice)
    channel.frames.deadline = None  # it takes longer
    for number in range(count):
        if number == count // 10:
            tenth = use_of(process)
        if who == "who hangs up":
            socket.create_connection(("127.0.0.1", int(server.port)), timeout=DEADLINE).close()
            continue
        one_round(server, channel, f"request {number}")
        if who == "guests":
            channel.close()
            server.expect("Waiting for Alice", "stderr")
            channel = stranger(server.port, keys.alice)
    channel.close()
    server.expect("Waiting for Alice", "stderr")
    after = comes_back_to(rest, process)
    measured(f"{count} times {who}. At rest: {rest}; at a tenth: {tenth}; after: {after}")
    assert after.memory <= tenth.memory + GROWTH
    assert server.stderr.count("Cut off") <= count  # a line each, at most
    assert server.stderr.count("Alice left") == 1 + (count if who == "guests" else 0)


# ---------------------------------------------------------------------- tight limits, and a stopped screen


def strangers(port: int | str, count: int) -> list[socket.socket]:
    return [socket.create_connection(("127.0.0.1", int(port)), timeout=DEADLINE) for _ in range(count)]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
@pytest.mark.exhaustive
def test_strangers_do_not_end_a_conversation_for_want_of_descriptors(
    bob: StartBob, start: Start, homes: Path, keys: Keys, stranger: Stranger
) -> None:
    server, port = bob(
        "--transcript",
        str(homes / "kept"),
        python=patched("import resource as r", "r.setrlimit(r.RLIMIT_NOFILE, (40, 40))"),
    )
    known_to_bob(homes, keys.alice)
    guest = stranger(port, keys.alice)
    one_round(server, guest, "before")
    crowd = strangers(port, 100)
    one_round(server, guest, "after")
    guest.close()
    server.expect("^Alice left", "stderr")
    for one in crowd:
        one.close()
    one_round(server, stranger(port, keys.alice), "again")


def stop_screen(server: Program) -> None:
    """Let nothing more be written to what stands for a program's screen: it waits."""
    screen = os.open(f"/proc/{server.process.pid}/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    if os.isatty(screen):
        termios.tcflow(screen, termios.TCOOFF)  # as Ctrl-S does
    else:
        for size in (4096, 1):
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(screen, b"\n" * size)
    os.close(screen)


@needs_proc
@pytest.mark.parametrize(
    ("terminal", "number"),
    [
        (True, signal.SIGINT),
        *exhaustive((True, signal.SIGTERM), (False, signal.SIGINT), (False, signal.SIGTERM)),
    ],
)
def test_a_stopped_screen_holds_up_neither_strangers_nor_the_end(
    bob: StartBob, terminal: bool, number: signal.Signals
) -> None:
    server, port = bob("-v", **(AT_TERMINAL if terminal else {}))
    for one in strangers(port, 20):  # what is kept from now on, such as stacks
        one.close()
    server.expect("127.0.0.1: Cut off", "stdout" if terminal else "stderr")
    before = use_of(server.process.pid)._replace(threads=2)  # the main one, and the one that accepts
    stop_screen(server)
    for _ in range(25):
        for one in strangers(port, 20):
            one.close()
    comes_back_to(before, server.process.pid)
    server.process.send_signal(number)
    assert server.process.wait(DEADLINE) == 130


@needs_proc
def test_no_thread_but_the_main_one_is_handed_a_signal(bob: StartBob) -> None:
    """Else the main thread would not notice it while it waits for a screen."""
    server, port = bob()
    with socket.create_connection(("127.0.0.1", int(port)), timeout=DEADLINE) as stranger:
        FrameSocket(stranger).receive(chat.HELLO_LIMIT)  # so there is a thread for the handshake
        masks = {
            task.name: int(re.findall(r"SigBlk:\t(\w+)", (task / "status").read_text())[0], 16)
            for task in Path(f"/proc/{server.process.pid}/task").iterdir()
        }
    bits = sum(1 << (number - 1) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    assert masks.pop(str(server.process.pid)) & bits == 0
    assert len(masks) == 2
    assert all(mask & bits == bits for mask in masks.values())


@needs_proc
def test_a_stopped_screen_in_a_conversation(
    bob: StartBob, keys: Keys, homes: Path, stranger: Stranger
) -> None:
    """At the first signal, Alice is told in a goodbye; at the second, Bob waits for the screen no longer."""
    server, port = bob(**AT_TERMINAL)
    known_to_bob(homes, keys.alice)
    guest = stranger(port, keys.alice)
    server.expect(WAITING)
    before = use_of(server.process.pid)
    stop_screen(server)
    guest.send("hello")
    for _ in range(10):
        for one in strangers(port, 20):
            one.close()
    comes_back_to(before, server.process.pid)
    server.process.send_signal(signal.SIGTERM)
    assert guest.receive().type is RecordType.CLOSE
    guest.frames.hang_up()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(DEADLINE) in (0, 128 + signal.SIGTERM)
