"""What people wait for: the two programs, as processes, beside what they are made of.

    python3 tests/benchmark.py            the whole table, on a machine that does nothing else
    python3 tests/benchmark.py --quick    see whether all of it works, and judge no time

A time alone says more about the machine than about the code. So most rows are ratios of two times, taken in
turns in one run (A B A B ...): the median of all turns, the quartiles, and how long our side of it took.
"Bare" are a Bob and an Alice that have nothing but the library's own calls, pipes and a socket: they encrypt,
sign, verify and decrypt, and check nothing else but public values. They are two processes that take turns,
as ours do. RSA keys have 3072 bits, parameters 2048. A limit leaves some room: where one is missed on an
idle machine, something has become slower.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import re
import secrets
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import Crypto
from conftest import AT_TERMINAL, DEADLINE, GROUP, WAITING, Program, pin_each_other
from Crypto.Cipher import AES
from Crypto.Hash import SHA256
from Crypto.Math.Numbers import Integer
from Crypto.PublicKey import RSA
from Crypto.Signature import pss

import alice_client
import crypto_utils as chat

OPENSSL = shutil.which("openssl")
Seconds = Callable[[], float]  # does something, and tells how long the part of it that counts took

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--quick", action="store_true", help="see whether all works, and judge no time")


def row(label: str, values: list[float], limit: float, takes: list[float] | None = None) -> None:
    """Print the median, the quartiles, how long our side took if that is something else, and the limit."""
    low, median, high = statistics.quantiles(values * 2, n=4, method="inclusive")
    ours = f"{1000 * statistics.median(takes):8.1f} ms" if takes else ""
    verdict = "" if options.quick else "met" if median <= limit else "MISSED"
    print(f"{label:60} {median:7.2f} {low:7.2f} - {high:<7.2f} {ours:11} {limit:6.2f} {verdict}", flush=True)


def ratio(label: str, limit: float, rounds: int, ours: Seconds, other: Seconds) -> None:
    """Take two times in turns, and print the row on their ratio. A first turn only fills the caches."""
    turns = [(ours(), other()) for _ in range(1 if options.quick else 1 + rounds)][-rounds:]
    row(label, [a / b for a, b in turns], limit, [turn[0] for turn in turns])


class Bare:
    """One side of a conversation, with the library's own calls alone: what cannot be done without."""

    def __init__(self, connected: socket.socket, mine: chat.RsaKey, peer: chat.RsaKey) -> None:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.mine, self.peer = connected, mine, peer

    def send(self, text: bytes, before: bytes = b"") -> None:
        ciphertext, tag = AES.new(bytes(32), AES.MODE_GCM, nonce=bytes(12)).encrypt_and_digest(text)
        signature = pss.new(self.mine, salt_bytes=32).sign(SHA256.new(ciphertext))
        self.socket.sendall(before + b"".join((len(text).to_bytes(4, "big"), ciphertext, tag, signature)))

    def receive(self) -> bytes:
        length = int.from_bytes(self._exactly(4), "big")
        received = memoryview(self._exactly(length + 16 + 384))
        ciphertext, tag, signature = received[:length], received[length:-384], bytes(received[-384:])
        pss.new(self.peer, salt_bytes=32).verify(SHA256.new(ciphertext), signature)
        return AES.new(bytes(32), AES.MODE_GCM, nonce=bytes(12)).decrypt_and_verify(ciphertext, tag)

    def shake_hands(self, bob: bool = False) -> None:
        exponent = Integer.from_bytes(secrets.token_bytes(32))
        theirs = b"" if bob else self._exactly(256)  # with the group: before it is here, Alice cannot begin
        public_value = pow(Integer(GROUP.g), exponent, Integer(GROUP.p)).to_bytes(256)
        if bob:
            self.socket.sendall(public_value)
            theirs = self._exactly(256)
        assert Integer.jacobi_symbol(Integer.from_bytes(theirs), GROUP.p) == 1
        pow(Integer.from_bytes(theirs), exponent, Integer(GROUP.p))
        if bob:
            self.receive()
        self.send(bytes(chat.PADDING), before=b"" if bob else public_value)
        if not bob:
            self.receive()

    def _exactly(self, size: int) -> bytes:
        data = self.socket.recv(size, socket.MSG_WAITALL)
        if len(data) < size:
            raise EOFError
        return data


def read_keys(folder: str, *people: str) -> list[chat.RsaKey]:
    return [RSA.import_key(Path(folder, who, "identity.pem").read_bytes()) for who in people]


def bare(folder: str, port: int) -> None:
    """Be Alice, in a process of its own; or Bob, if there is no port, for one Alice after the other."""
    lines = os.fdopen(0, "rb", 65536)
    if port:
        side = Bare(socket.create_connection(("127.0.0.1", port)), *read_keys(folder, "alice", "bob"))
        side.shake_hands()
        while True:
            side.send(lines.readline() or sys.exit())
            os.write(1, side.receive())
    keys, listener = read_keys(folder, "bob", "alice"), socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], file=sys.stderr, flush=True)
    while True:
        side = Bare(listener.accept()[0], *keys)
        with contextlib.suppress(EOFError):
            side.shake_hands(bob=True)
            while True:
                os.write(1, side.receive())
                side.send(lines.readline() or sys.exit())


class People:
    """Bob and Alice, who have RSA keys and parameters, and know each other."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        for who in ("bob", "alice"):
            store = chat.KeyStore(self.folder / who)
            store.make_identity()
            store.write(chat.KeyStore.GROUP, GROUP.export)

    def program(self, *command: str, code: str = "", terminal: bool = False) -> contextlib.closing[Program]:
        """Run a program, or some code in its place."""
        python = (sys.executable, *(("-c", code) if code else ()))
        options = AT_TERMINAL if terminal else {}
        return contextlib.closing(Program(*command, home=self.folder, python=python, **options))

    @contextlib.contextmanager
    def waiting_bob(self, terminal: bool = False) -> Iterator[tuple[Program, int]]:
        """Run Bob until he waits; yield also his port, under which Alice has pinned him, and no other."""
        stream = "stdout" if terminal else "stderr"
        with self.program("bob_server.py", "--host", "127.0.0.1", "--port", "0", terminal=terminal) as bob:
            port = bob.expect(r"Listening on port (\d+)\.", stream)[1]
            bob.expect("Waiting for Alice", stream)
            (self.folder / "alice" / "known_peers").unlink(missing_ok=True)
            pin_each_other(self.folder, port)
            yield bob, int(port)

    @contextlib.contextmanager
    def waiting_bare_bob(self) -> Iterator[tuple[Program, int]]:
        with self.bare() as bob:
            yield bob, int(bob.expect(r"(\d+)\n", "stderr")[1])

    def bare(self, port: int = 0) -> contextlib.closing[Program]:
        path = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import benchmark"
        return self.program("-", code=f"{path}; benchmark.bare({str(self.folder)!r}, {port})")

    def alice(self, port: int, terminal: bool = False) -> contextlib.closing[Program]:
        return self.program("alice_client.py", "127.0.0.1", "--port", str(port), terminal=terminal)


def there_and_back(text: bytes, times: int, alice: Program, bob: Program) -> float:
    """Return the seconds that a text and its reply take, from pipe to pipe."""
    begun = time.perf_counter()
    for _ in range(times):
        for sender, receiver in ((alice, bob), (bob, alice)):
            sender.write(text)
            data = b""
            while not data.endswith(b"\n"):
                assert receiver.process.stdout is not None
                assert select.select([receiver.process.stdout], [], [], DEADLINE)[0]
                data = os.read(receiver.process.stdout.fileno(), 1 << 20)
                assert data
    return (time.perf_counter() - begun) / times


def pipes(people: People) -> None:
    """Print the rows on messages that come from a pipe and go into a pipe."""
    with (
        people.waiting_bob() as (bob, port),
        people.alice(port) as alice,
        people.waiting_bare_bob() as (bare_bob, bare_port),
        people.bare(bare_port) as bare_alice,
    ):
        alice.expect("You speak first", "stderr")
        for label, limit, size, times in (
            ("a short message and its reply / bare", 1.15, 64, 5 if options.quick else 100),
            ("1 MiB there and back / bare", 2.0, chat.TEXT_LIMIT, 1),
        ):
            exchange = functools.partial(there_and_back, b"x" * size + b"\n", times)
            bare = functools.partial(exchange, bare_alice, bare_bob)
            ratio(label, limit, 10, functools.partial(exchange, alice, bob), bare)


def handshakes(people: People) -> None:
    """Print the row on handshakes: Bob is a process, and Alice's side of it is done here."""
    keys = read_keys(str(people.folder), "alice", "bob")
    store = chat.KeyStore(people.folder / "alice")
    with people.waiting_bob() as (bob, port), people.waiting_bare_bob() as (_, bare_port):
        pinned = chat.PinnedPeer(store, f"[127.0.0.1]:{port}")

        def ours() -> float:
            begun = time.perf_counter()
            frames = chat.FrameSocket(socket.create_connection(("127.0.0.1", port)))
            channel = alice_client.handshake(frames, keys[0], pinned, chat.Transcript())
            took = time.perf_counter() - begun
            channel.close()
            bob.expect("Waiting for Alice", "stderr")
            return took

        def bare() -> float:
            begun = time.perf_counter()
            with socket.create_connection(("127.0.0.1", bare_port)) as connected:
                Bare(connected, *keys).shake_hands()
                return time.perf_counter() - begun

        ratio("a handshake / bare", 1.75, 60, ours, bare)


def starts(people: People) -> None:
    """Print the row on starting: Bob, when he has his key and his parameters."""
    sources = "".join((ROOT / name).read_text("utf-8") for name in ("crypto_utils.py", "bob_server.py"))
    imports = re.findall(r"^ *((?:from [A-Z\w.]+ )?import [\w, .]+)$", sources, re.MULTILINE)
    least = [line for line in imports if not re.search("__future__|crypto_utils|msvcrt|_winapi", line)]
    key = people.folder / "bob" / "identity.pem"
    least += [f"RSA.import_key(open({str(key)!r}).read())", "print('done', file=sys.stderr)"]

    def until(pattern: str, *command: str, code: str = "") -> float:
        begun = time.perf_counter()
        with people.program(*command, code=code) as program:
            program.expect(pattern, "stderr")
            return time.perf_counter() - begun

    ours = functools.partial(until, "Waiting for Alice", "bob_server.py", "--port", "0")
    bare = functools.partial(until, "done", "-", code="\n".join(least))
    ratio("a start of Bob's / the same imports, and his key", 1.25, 30, ours, bare)


def terminals(people: People) -> None:
    """Print the rows on what is shown at a terminal."""
    taken = []
    with people.waiting_bob(terminal=True) as (bob, port), people.alice(port, terminal=True) as alice:
        bob.expect(WAITING)
        for number in range(2 if options.quick else 50):
            for sender, receiver, prompt in ((alice, bob, "Alice: "), (bob, alice, "Bob: ")):
                text = f"message {number} at {prompt}"
                sender.expect(prompt)  # 0.3 s after the last message at the earliest
                sender.write(text)
                sender.expect(text)
                begun = time.perf_counter()
                sender.write("\r")
                receiver.expect(text)
                taken.append(1000 * (time.perf_counter() - begun))
    row("from Enter at one terminal to the text at the other, ms", taken, 50)

    kinds = "x", "two words ", "x" * 63 + "\n", "λόγος ", "中", "e\u0301", "\t", "é\t", "\0"
    taken_by: dict[str, list[float]] = {kind: [] for kind in kinds}
    for kind in kinds * (1 if options.quick else 5):
        text = kind * (chat.TEXT_LIMIT // len(kind.encode()))
        begun = time.perf_counter()
        chat.screen_lines(text, 80 - len("Alice + "))
        taken_by[kind].append(1000 * (time.perf_counter() - begun))
    slowest, times = max(taken_by.items(), key=lambda item: statistics.median(item[1]))
    row(f"1 MiB laid out at 80 columns, ms (the slowest is {slowest!a})", times, 300)


def chance(bits: int, bound: int) -> float:
    """Return for how many p, of those where neither p nor q has a factor below `bound`, both are prime.

    (Mertens: of the numbers without such factors, one in ln(q) / (e^gamma ln(bound)) is prime.)
    """
    return float((1.781 * math.log(bound) / (bits * math.log(2))) ** 2)


def our_search(bits: int, tests: int) -> float:
    """Return the expected seconds of `generate_group`, having watched so many tests.

    How long one search takes is luck: even the mean of ten spreads by a third. But no luck are the time
    before the first test, the time of a test, and the number of tests to be expected.
    """
    moments: list[float] = []

    def progress() -> None:
        moments.append(time.perf_counter())
        if len(moments) == tests:
            raise TimeoutError

    begun = time.perf_counter()
    watched = mock.patch.object(chat, "_survivors", wraps=chat._survivors)
    finds_none = mock.patch.object(chat, "is_safe_prime", return_value=False)
    with watched as sieve, finds_none, contextlib.suppress(TimeoutError):
        chat.generate_group(bits, progress)
    half = tests // 2  # the threads are ahead at first: they test while the tests are still being handed out
    test = (moments[-1] - moments[half]) / (tests - 1 - half)
    return moments[-1] - begun - tests * test + test / chance(bits, sieve.call_args[0][1])


def openssl_search(bits: int, tests: int) -> float:
    """Return the expected seconds of `openssl dhparam BITS`, in the same way.

    OpenSSL 3 divides p and q by its first 384 primes (1024 over 2048 bits), prints a dot for what is left,
    and tests that.
    """
    moments: list[float] = []
    while len(moments) < tests:  # again, if this search was over sooner than that
        moments.clear()
        command = [str(OPENSSL), "dhparam", "-2", str(bits)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, bufsize=0) as child:
            assert child.stderr is not None
            while len(moments) < tests and (mark := child.stderr.read(1)):
                moments += [time.perf_counter()] * (mark == b".")
            child.kill()
    return (moments[-1] - moments[0]) / (tests - 1) / chance(bits, 2657 if bits <= 2048 else 8161)


def searches() -> None:
    """Print the rows on making parameters."""
    for bits in (2048, 3072)[: 1 if options.quick else 2]:
        tests = 40 if options.quick else 300
        ours, other = (functools.partial(search, bits, tests) for search in (our_search, openssl_search))
        ratio(f"a search for {bits} bits, {os.cpu_count()} threads / OpenSSL's", 0.35, 5, ours, other)


def main() -> None:
    openssl = subprocess.check_output([OPENSSL, "version"], text=True).split("(")[0] if OPENSSL else ""
    cores, python = f"{os.cpu_count()} cores (load {os.getloadavg()[0]:.1f})", sys.version.split()[0]
    print(f"{cores}, Python {python}, pycryptodome {Crypto.__version__}, {openssl}")
    print(f"{'':60} {'median':>7} {'quartiles':^17} {'takes':>11}  limit", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        people = People(folder)
        for part in (pipes, handshakes, starts, terminals):
            part(people)
    if OPENSSL:
        searches()


if __name__ == "__main__":
    options = parser.parse_args()
    main()
