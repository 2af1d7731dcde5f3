"""What the tests share: groups from their RFCs, three keys, two connected ends, and programs.

Everything goes over loopback sockets with ports the system chose, and waits for an event, never for a
while. A wait that is not rewarded within DEADLINE is a failure.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any, Callable, NamedTuple

import pytest

import alice_client
import bob_server
import crypto_utils as chat
from crypto_utils import Channel, FrameSocket, Group, KeyStore, PinnedPeer, Role, RsaKey, Transcript

ROOT = Path(chat.__file__).parent
DEADLINE = float(os.environ.get("TEST_DEADLINE", 60))  # seconds, for a loaded machine
PYTHON = os.environ.get("TEST_PYTHON", sys.executable)  # what the programs under test run on
for _number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(_number) is signal.SIG_IGN:  # by who runs the tests; the programs would ignore it too
        signal.signal(_number, signal.SIG_DFL)


def ffdhe(bits: int, x: int) -> Group:
    """RFC 7919, appendix A: p = 2^b - 2^(b-64) + (floor(2^(b-130) e) + X) 2^64 - 1."""
    one = 1 << (bits + 64)
    e = term = one
    for n in range(1, 1000):
        term //= n
        e += term
    return Group(2**bits - 2 ** (bits - 64) + ((e >> 194) + x) * 2**64 - 1, 2)


def modp(bits: int, x: int) -> Group:
    """RFC 3526: p = 2^b - 2^(b-64) - 1 + 2^64 (floor(2^(b-130) pi) + X)."""
    one = 1 << (bits + 64)

    def arctan_of_inverse(n: int) -> int:
        total = power = one // n
        for k in range(3, 10_000, 2):
            power //= -n * n
            total += power // k
            if power in (0, -1):
                break
        return total

    pi = 4 * (4 * arctan_of_inverse(5) - arctan_of_inverse(239))
    return Group(2**bits - 2 ** (bits - 64) - 1 + ((pi >> 194) + x) * 2**64, 2)


RFC_GROUPS = {
    "ffdhe2048": ffdhe(2048, 560316),
    "ffdhe3072": ffdhe(3072, 2625351),
    "ffdhe4096": ffdhe(4096, 5736041),
    "modp_2048": modp(2048, 124476),
    "modp_3072": modp(3072, 1690314),
    "modp_4096": modp(4096, 240904),
}
GROUP = RFC_GROUPS["ffdhe2048"]
Q = (GROUP.p - 1) // 2


class Keys(NamedTuple):
    bob: RsaKey
    alice: RsaKey
    mallory: RsaKey


@pytest.fixture(scope="session")
def keys() -> Keys:
    """Three people's RSA keys of 2048 bits, the same in each run, because making keys takes long."""
    vectors = json.loads((ROOT / "tests" / "vectors" / "conversations.json").read_text())["cases"][0]
    bob, alice = (chat.RSA.import_key(vectors[name]["private_key"]) for name in ("bob", "alice"))
    p, q, e = 3 * 2**1022 + 1037, 7 * 2**1021 + 309, chat.RSA_EXPONENT  # primes that anybody could guess
    mallory = chat.RSA.construct((p * q, e, pow(e, -1, (p - 1) * (q - 1)), p, q))
    return Keys(bob, alice, mallory)


@pytest.fixture(scope="session", autouse=True)
def each_prime_is_tested_once() -> None:
    """64 rounds take half a second, and nearly all tests use the same prime."""
    chat.miller_rabin_test = functools.cache(chat.miller_rabin_test)


@pytest.fixture
def homes(tmp_path: Path, keys: Keys) -> Path:
    """Return a SECURE_CHAT_HOME in which both have their keys and know Bob's parameters; nobody is pinned."""
    for name, key in (("bob", keys.bob), ("alice", keys.alice)):
        store = KeyStore(tmp_path / name)
        store.write(KeyStore.IDENTITY, functools.partial(key.export_key, "PEM", pkcs=8))
        store.write(KeyStore.GROUP, GROUP.export)
    return tmp_path


def loopback() -> tuple[socket.socket, socket.socket]:
    """Return two connected TCP sockets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    for end in (near, far):
        end.settimeout(DEADLINE)
    return near, far


class Background:
    """A call in a thread of its own; `result` waits for it, and raises what it raised."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._value: object = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error

    def result(self) -> object:
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive(), "still running"
        if self._error is not None:
            raise self._error
        return self._value


class Ends(NamedTuple):
    bob: Channel
    alice: Channel


def shake_hands(bob_store: KeyStore, alice_store: KeyStore, keys: Keys, folder: Path | None = None) -> Ends:
    """Return both channels, connected over loopback, at Alice's first turn. Nothing is pinned by that.

    With a folder, both transcripts are kept in it.
    """
    near, far = loopback()
    bob = Background(
        lambda: bob_server.handshake(
            FrameSocket(far), keys.bob, GROUP, PinnedPeer(bob_store, "alice"), Lock(), Transcript(folder)
        )
    )
    peer = PinnedPeer(alice_store, "[bob]:65432")
    alice = alice_client.handshake(FrameSocket(near), keys.alice, peer, Transcript(folder))
    channel = bob.result()
    assert isinstance(channel, Channel)
    if folder:
        for end in (channel, alice):
            end.transcript.begin(end.sealer.sender)
    return Ends(channel, alice)


def store_with_group(folder: Path) -> KeyStore:
    """Return a store that knows GROUP: its prime is not tested again."""
    store = KeyStore(folder)
    if store.read(KeyStore.GROUP) is None:
        store.write(KeyStore.GROUP, GROUP.export)
    return store


def entries(data: bytes) -> list[bytes]:
    """Split a transcript into its entries, each a tag and what it marks."""
    found = []
    while data:
        end = 4 + int.from_bytes(data[:4], "big")
        found.append(data[4:end])
        data = data[end:]
    return found


@pytest.fixture
def ends(tmp_path: Path, keys: Keys) -> Iterator[Ends]:
    """Both channels, connected over loopback, at Alice's first turn."""
    ends = shake_hands(KeyStore(tmp_path / "bob"), store_with_group(tmp_path / "alice"), keys)
    yield ends
    for channel in ends:
        channel.frames.socket.close()


WAITING = r"\(Alice's turn; Ctrl-C leaves\)"  # what stands at Bob's then
AT_TERMINAL = {"terminal": True, "size": (24, 80), "TERM": "xterm"}  # options of a Program


class Program:
    """One of the two programs as a real process, on pipes, or at a terminal of its own.

    What it prints is collected as it comes: `stdout` and `stderr` from pipes, all in `stdout` at a terminal.
    """

    def __init__(
        self,
        script: str,
        *arguments: str,
        home: Path,
        terminal: bool = False,
        size: tuple[int, int] = (0, 0),  # rows and columns of the terminal, if it is to know
        python: tuple[str, ...] = (PYTHON,),
        **environment: str,
    ) -> None:
        self.home = home
        self.size = size
        self.stdout = self.stderr = ""
        self._seen = {"stdout": 0, "stderr": 0}
        self._partial = {"stdout": b"", "stderr": b""}
        self._sources: dict[int, str] = {}
        ours = {"SECURE_CHAT_HOME": str(home), "TERM": "dumb", "PYTHONDONTWRITEBYTECODE": ""}
        ours["PYTHONUNBUFFERED"] = ""  # it would hide what goes wrong with what is buffered
        environment = {**os.environ, **ours, **environment}
        command = [*python, str(ROOT / script), *arguments]
        if terminal:
            self.terminal, theirs = pty.openpty()
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", *size, 0, 0))
            self._sources[self.terminal] = "stdout"
            self.process = subprocess.Popen(
                command,
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                env=environment,
                start_new_session=True,
                preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            )
            os.close(theirs)
            self._input = self.terminal
        else:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                start_new_session=True,
            )
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            assert self.process.stderr is not None
            self._input = self.process.stdin.fileno()
            self._sources = {self.process.stdout.fileno(): "stdout", self.process.stderr.fileno(): "stderr"}

    def write(self, text: str | bytes) -> None:
        data = text.encode() if isinstance(text, str) else text
        while data:
            data = data[os.write(self._input, data) :]

    def end_input(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()

    def forget_stdout(self) -> None:
        """Stop reading what it prints: it finds the pipe broken."""
        assert self.process.stdout
        del self._sources[self.process.stdout.fileno()]
        self.process.stdout.close()

    def expect(self, pattern: str, stream: str = "stdout", patience: float = DEADLINE) -> re.Match[str]:
        """Wait until what was printed since the last `expect` on this stream matches; return the match."""
        deadline = time.monotonic() + patience
        while True:
            seen: str = getattr(self, stream)
            start = self._seen[stream]
            found = re.compile(pattern, re.MULTILINE).search(seen, start)
            if found:
                self._seen[stream] = found.end()
                return found
            assert self._read(deadline), f"{pattern!r} never came in:\n{self.stdout}\n--\n{self.stderr}"

    def read(self, patience: float) -> None:
        """Take in what it prints next, if that comes soon."""
        self._read(time.monotonic() + patience)

    def shows(self, pattern: str) -> re.Match[str]:
        """Wait until what its terminal shows matches; return the match."""
        deadline = time.monotonic() + DEADLINE
        while True:
            found = re.compile(pattern, re.MULTILINE).search(screen(self))
            if found:
                return found
            assert self._read(deadline), f"{pattern!r} never came on this screen:\n{screen(self)}"

    def wait(self) -> int:
        """Wait for the end; return the exit status."""
        deadline = time.monotonic() + DEADLINE
        while self._read(deadline):
            pass
        status = self.process.wait(max(0.1, deadline - time.monotonic()))
        assert "Traceback" not in self.stdout + self.stderr, self.stdout + self.stderr
        return status

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        if self.process.stdin is None:
            os.close(self.terminal)

    def _read(self, deadline: float) -> bool:
        """Take in what is there, or comes before the deadline; False when there is nothing more to come."""
        if not self._sources:
            return False
        ready, _, _ = select.select(list(self._sources), [], [], max(0, deadline - time.monotonic()))
        for source in ready:
            try:
                data = os.read(source, 65536)
            except OSError:  # a terminal whose other side is gone
                data = b""
            name = self._sources[source]
            if data:
                self._partial[name] += data
                setattr(self, name, self._partial[name].decode(errors="replace"))
            else:
                del self._sources[source]
        return bool(ready)


def screen(program: Program, rows: int = 200) -> str:
    """Return what a person sees of a program at its terminal, and what has scrolled away of it."""
    pyte = pytest.importorskip("pyte", reason="python3 -m pip install pyte")
    terminal = pyte.Screen(program.size[1], rows)
    pyte.Stream(terminal).feed(program.stdout)
    return "\n".join(row.rstrip() for row in terminal.display).rstrip("\n")


def patched(*statements: str) -> tuple[str, ...]:
    """Return a command that runs a program after statements about `chat`, crypto_utils, and `script`."""
    lines = (
        "import sys",
        "from pathlib import Path",
        "del sys.argv[0]",
        "sys.path.insert(0, str(Path(sys.argv[0]).parent))",
        "import crypto_utils as chat",
        "script = __import__(Path(sys.argv[0]).stem)",
        *statements,
        "script.main()",
    )
    return (PYTHON, "-c", "\n".join(lines))


def rests(program: Program) -> None:
    """Wait until it waits for the next key, where the system tells that: a signal then interrupts it."""
    stat = Path(f"/proc/{program.process.pid}/stat")
    while stat.exists() and ") S " not in stat.read_text():
        program.read(0.01)


Start = Callable[..., Program]
StartBob = Callable[..., "tuple[Program, str]"]
Stranger = Callable[[str, RsaKey], Channel]


@pytest.fixture
def start(homes: Path) -> Iterator[Start]:
    """Return a function that starts a program with `homes` as its home; all are ended with the test."""
    programs: list[Program] = []

    def run(script: str, *arguments: str, **options: Any) -> Program:
        program = Program(script, *arguments, **{"home": homes, **options})
        programs.append(program)
        return program

    yield run
    for program in programs:
        program.close()


@pytest.fixture
def bob(start: Start) -> StartBob:
    """Return a function that starts Bob on a free port and returns him and the port, once he is waiting."""

    def run(*arguments: str, **options: object) -> tuple[Program, str]:
        program = start("bob_server.py", "--port", "0", *arguments, **options)
        stream = "stdout" if options.get("terminal") else "stderr"
        port = program.expect(r"Listening on port\s+(\d+)\.", stream)[1]
        program.expect(r"Waiting\s+for\s+Alice", stream)
        return program, port

    return run


def exhaustive(*values: object) -> list[object]:
    """Mark these of a test's parameters: what they show, others show too."""
    return [
        pytest.param(*(value if type(value) is tuple else (value,)), marks=pytest.mark.exhaustive)
        for value in values
    ]


def pin_each_other(homes: Path, port: str) -> None:
    """Let both, with the keys in these homes, know each other already, so that nobody need be asked."""
    bob, alice = KeyStore(homes / "bob"), KeyStore(homes / "alice")
    for store, name, other in ((bob, "alice", alice), (alice, f"[127.0.0.1]:{port}", bob)):
        key = other.load_identity(lambda _: "")
        assert key is not None
        PinnedPeer(store, name).pin(key)


def talk(
    bob: tuple[Program, str], start: Start, *arguments: str, **options: object
) -> tuple[Program, Program]:
    """Start an Alice on pipes who talks to this Bob; return both programs, at her first turn.

    They know each other, or there would be nobody to ask about their keys.
    """
    pin_each_other(bob[0].home, bob[1])
    alice = start("alice_client.py", "127.0.0.1", "--port", bob[1], *arguments, **options)
    alice.expect("You speak first", "stderr")
    return bob[0], alice


def start_both(bob: StartBob, start: Start, commands: dict[Role, tuple[str, ...]]) -> dict[Role, Program]:
    """Start both on pipes, one or both by a command of its own; they know each other, and meet."""
    python = {**dict.fromkeys(Role, (PYTHON,)), **commands}
    server, port = bob("--once", python=python[Role.BOB])
    pin_each_other(server.home, port)
    client = start("alice_client.py", "127.0.0.1", "--port", port, python=python[Role.ALICE])
    return {Role.BOB: server, Role.ALICE: client}


def one_round(server: Program, client: Program | Channel, name: str = "request") -> None:
    """Let Alice say something, and Bob reply."""
    if isinstance(client, Channel):
        client.send(name)
    else:
        client.write(f"{name}\n")
    server.expect(f"^Alice: {name}\n")
    server.write(f"reply to {name}\n")
    if isinstance(client, Channel):
        assert client.receive().text == f"reply to {name}"
    else:
        client.expect(f"^Bob: reply to {name}\n")


def fails(program: Program, status: int, pattern: str) -> None:
    """Wait until a program on pipes has told what is wrong, and has ended with this status."""
    program.expect(pattern, "stderr")
    assert program.wait() == status
    assert program.stdout == ""


@pytest.fixture
def terminals(bob: StartBob, start: Start) -> Callable[..., tuple[Program, Program]]:
    """Return a function that starts both programs at terminals; they know each other. It is Alice's turn."""

    def run(*arguments: str, size: tuple[int, int] = (24, 80), **options: object) -> tuple[Program, Program]:
        options = {**AT_TERMINAL, "size": size, **options}
        server, port = bob(*arguments, **options)
        pin_each_other(server.home, port)
        client = start("alice_client.py", "127.0.0.1", "--port", port, **options)
        client.expect("Alice: ")
        server.expect(WAITING)
        return server, client

    return run


@pytest.fixture
def stranger(tmp_path: Path) -> Iterator[Stranger]:
    """Return a function that makes an Alice with a key and a mind of her own; it returns her channel.

    What she does then must be over within DEADLINE.
    """
    with contextlib.ExitStack() as stack:

        def connect(port: str, key: RsaKey) -> Channel:
            connected = socket.create_connection(("127.0.0.1", int(port)), timeout=DEADLINE)
            stack.enter_context(connected)
            store = store_with_group(tmp_path / "stranger")
            peer = PinnedPeer(store, f"[127.0.0.1]:{port}")
            channel = alice_client.handshake(FrameSocket(connected), key, peer, Transcript())
            channel.frames.deadline = time.monotonic() + DEADLINE
            return channel

        yield connect


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=DEADLINE)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Make two hosts of our own: network namespaces with a cable between them. Return their names."""
    names = [f"secure-chat-{os.getpid()}-{n}" for n in (1, 2)]
    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "delete", name)
            ip(*f"-n {names[0]} link add cable type veth peer name cable netns {names[1]}".split())
            for number, name in enumerate(names, 1):
                ip(*f"-n {name} address add 192.0.2.{number}/24 dev cable".split())
                ip(*f"-n {name} link set lo up".split())
                ip(*f"-n {name} link set cable up".split())
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this machine does not let us make network namespaces ({error})")
        yield names
