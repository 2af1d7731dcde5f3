"""What people wait for: the two programs, as processes, beside what they are made of.

A time alone says more about the machine than about the code. So most rows are ratios of two times, taken in
turns in one run (A B A B ...): the median over all turns, and the quartiles. What has a limit of its own is
in milliseconds or megabytes, and says so. `takes` is how long our side of it took. A terminal is a pty that
is made here. RSA keys have 3072 bits, parameters 2048.

    python3 tests/benchmark.py            the whole table, on a machine that does nothing else
    python3 tests/benchmark.py --quick    see whether all of it works, and judge no time

What the rows are measured against, and what cannot be reached:

- **Bare** is a Bob or an Alice that has nothing but the library's own calls, pipes and a socket (`Bare`): it
  encrypts, signs, verifies and decrypts, and checks nothing else. Two of them are two processes that take
  turns, as ours do. That matters: a core that has slept while the other side worked signs more slowly when it
  wakes, so two processes are never as fast as one that does the work of both.
- **At a terminal**, a program looks 50 times a second for what has arrived (`TICK`): a message waits for 10
  ms on average and for 20 ms at most, beside its primitives.
- **Imports** are the import statements of both files, in one `python -c`, up to the same sign of life on the
  same kind of stream. A program that talks also reads its RSA key, which the library checks (38 ms, and it
  should: a signature by a damaged key gives the key away). What is ours after that: Python compiles a script
  anew at every start; the classes and options are made; Bob's parameters are read. "Alice: " comes after the
  handshake, so that a bare one is added.
- **A handshake** has four powers, two looks at a public value, and two records, all one after the other: each
  side waits for the other all the time, so it is the same on one core and on two. What is ours beside that is
  2 to 3 ms a side: the peer's RSA key is parsed and encoded again, pins and the kept group are read from
  disk, each stranger has a thread. A handshake runs once, with cold caches.
- **TLS 1.2** with the same kind of exchange and the same keys signs in C. Its `limit` is the ratio that a
  handshake as fast as a bare one would have: nothing that signs with the library can be further ahead. TLS
  1.3 exchanges keys over X25519, which is cheaper than any group modulo a prime.
- **Search.** Our sieve leaves 4.2 times fewer numbers to test than OpenSSL's (it takes primes up to
  10,000,000 for 2048 bits, and not 2,657), and one test takes the library about 1.4 times as long as
  OpenSSL. So one thread can at best be 3 times as fast, and two threads, which OpenSSL does not use, 6
  times.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import gc
import importlib.metadata
import math
import os
import platform
import pty
import random
import re
import secrets
import select
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any, BinaryIO, Callable
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from conftest import DEADLINE, GROUP, Background, Program, loopback
from Crypto.Cipher import AES
from Crypto.Hash import SHA256
from Crypto.Math.Numbers import Integer
from Crypto.Math.Primality import test_probable_prime
from Crypto.PublicKey import RSA
from Crypto.Signature import pss

import crypto_utils as chat
from crypto_utils import FrameSocket, KeyStore, PinnedPeer, RsaKey

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
OPENSSL = shutil.which("openssl") or ""
Seconds = Callable[[], float]  # does something, and tells how long the part of it that counts took

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--quick", action="store_true", help="see whether all works, and judge no time")


def timed(call: Callable[..., object], *arguments: object) -> Seconds:
    def seconds() -> float:
        begun = time.perf_counter()
        call(*arguments)
        return time.perf_counter() - begun

    return seconds


def in_turns(rounds: int, *subjects: Seconds) -> list[list[float]]:
    """Return each subject's times, taken in turns. A first turn does not count: it fills the caches."""
    turns = [[subject() for subject in subjects] for _ in range(1 if options.quick else 1 + rounds)]
    gc.collect()
    return [list(times) for times in zip(*turns[-rounds:])]


def ratios(a: list[float], b: list[float]) -> list[float]:
    return [x / y for x, y in zip(a, b)]


def in_ms(seconds: list[float]) -> list[float]:
    return [1000 * each for each in seconds]


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles([*values] * 2, n=100, method="inclusive")[percent - 1]


def row(
    label: str,
    values: list[float],
    target: str = "",
    takes: list[float] | None = None,
    percent: int = 50,  # the percentile that is judged
) -> None:
    """Print what is judged, the quartiles, how long our side took if that is something else, the target."""
    judged, low, high = (percentile(values, each) for each in (percent, 25, 75))
    verdict = ""
    sign, _, limit = target.partition(" ")
    if sign in ("<=", ">=") and not options.quick:
        verdict = "met" if (judged >= float(limit) if sign == ">=" else judged <= float(limit)) else "MISSED"
    ours = f"{1000 * statistics.median(takes):8.1f} ms" if takes else ""
    print(f"{label:62} {judged:7.2f} {low:7.2f} - {high:<7.2f} {ours:11}  {target:10} {verdict}", flush=True)


def pin(cores: int) -> None:
    if CORES:
        os.sched_setaffinity(0, CORES[:cores])


# ------------------------------------------------------------------------ what cannot be done without


class Bare:
    """One side of a conversation, with the library's own calls alone: what cannot be done without."""

    def __init__(self, connected: socket.socket, mine: RsaKey, peer: RsaKey) -> None:
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

    def shake_hands_as_bob(self) -> None:
        exponent = Integer.from_bytes(secrets.token_bytes(32))
        self.socket.sendall(pow(Integer(GROUP.g), exponent, Integer(GROUP.p)).to_bytes(256))
        self._agree(exponent)
        self.receive()
        self.send(bytes(chat.PADDING))

    def shake_hands_as_alice(self) -> None:
        exponent = Integer.from_bytes(secrets.token_bytes(32))
        self._agree(exponent)
        public_value = pow(Integer(GROUP.g), exponent, Integer(GROUP.p)).to_bytes(256)
        self.send(bytes(chat.PADDING), before=public_value)
        self.receive()

    def _agree(self, exponent: Integer) -> None:
        theirs = Integer.from_bytes(self._exactly(256))
        assert Integer.jacobi_symbol(theirs, GROUP.p) == 1
        pow(theirs, exponent, Integer(GROUP.p))

    def _exactly(self, size: int) -> bytes:
        data = self.socket.recv(size, socket.MSG_WAITALL)
        if len(data) < size:
            raise EOFError
        return data

    def pass_on(self, lines: BinaryIO) -> None:
        """Send the next line; after the last, end the process."""
        self.send(lines.readline() or sys.exit())

    def show(self) -> None:
        os.write(1, self.receive())


def read_key(folder: str, who: str) -> RsaKey:
    return RSA.import_key(Path(folder, who, "identity.pem").read_bytes())


def bare_bob(folder: str) -> None:
    """Be Bob for one Alice after the other, in a process of its own."""
    keys = read_key(folder, "bob"), read_key(folder, "alice").public_key()
    with socket.create_server(("127.0.0.1", 0)) as listener, open(0, "rb", buffering=65536) as lines:
        print(listener.getsockname()[1], file=sys.stderr, flush=True)
        while True:
            side = Bare(listener.accept()[0], *keys)
            side.shake_hands_as_bob()
            with contextlib.suppress(EOFError):
                while True:
                    side.show()
                    side.pass_on(lines)


def bare_alice(folder: str, port: int) -> None:
    """Be Alice, in a process of its own."""
    keys = read_key(folder, "alice"), read_key(folder, "bob").public_key()
    side = Bare(socket.create_connection(("127.0.0.1", port)), *keys)
    side.shake_hands_as_alice()
    with open(0, "rb", buffering=65536) as lines:
        while True:
            side.pass_on(lines)
            side.show()


def imports(*scripts: str) -> str:
    """Return the import statements of the scripts, but for those of one another, and of Windows."""

    def statements(nodes: list[Any]) -> Iterator[ast.stmt]:
        for node in nodes:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                yield node
            elif isinstance(node, (ast.If, ast.Try)):
                yield from statements(node.body + node.orelse)

    trees = [ast.parse((ROOT / script).read_text("utf-8")) for script in scripts]
    lines = [ast.unparse(line) for tree in trees for line in statements(tree.body)]
    return "\n".join(line for line in lines if not re.search("__future__|crypto_utils|msvcrt", line))


# ----------------------------------------------------------------------------------- the two programs


class People:
    """Bob and Alice, with RSA keys of 3072 bits, who have met."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bob, self.alice = self.keys = RSA.generate(3072), RSA.generate(3072)
        self.at_bobs, self.at_alices = KeyStore(folder / "bob"), KeyStore(folder / "alice")
        for store, key in zip((self.at_bobs, self.at_alices), self.keys):
            store.write(store.IDENTITY, key.export_key("PEM", pkcs=8))
            store.save_group(GROUP)
        PinnedPeer(self.at_bobs, "alice").pin(self.alice)
        for who in ("bob", "alice") if OPENSSL else ():
            command = f"req -x509 -new -subj /CN={who} -key {who}/identity.pem -out {who}.crt"
            subprocess.run([OPENSSL, *command.split()], cwd=folder, check=True)

    @contextlib.contextmanager
    def program(self, *command: str, terminal: bool = False, code: str = "") -> Iterator[Program]:
        """Run a program, or some code in its place. From the second time on, modules are compiled already."""
        program = Program(
            *command,
            home=self.folder,
            terminal=terminal,
            size=(24, 80),
            python=(sys.executable, *(("-c", code) if code else ())),
            TERM="xterm",
            PYTHONPYCACHEPREFIX=str(self.folder / "cache"),
        )
        try:
            yield program
        finally:
            program.close()

    @contextlib.contextmanager
    def waiting_bob(self, terminal: bool = False) -> Iterator[tuple[Program, tuple[str, ...]]]:
        """Run Bob until he waits; yield also Alice's command."""
        stream = "stdout" if terminal else "stderr"
        with self.program("bob_server.py", "--host", "127.0.0.1", "--port", "0", terminal=terminal) as bob:
            port = bob.expect(r"Listening on port (\d+)\.", stream)[1]
            bob.expect("Waiting for Alice", stream)
            address = "127.0.0.1", "--port", port, "--peer", chat.fingerprint(self.bob)
            yield bob, ("alice_client.py", *address)

    @contextlib.contextmanager
    def conversation(self, terminal: bool = False) -> Iterator[tuple[Program, Program]]:
        """Run both until Alice may speak; yield her first."""
        with self.waiting_bob(terminal) as (bob, command), self.program(*command, terminal=terminal) as alice:
            alice.expect("You speak first", "stdout" if terminal else "stderr")
            yield alice, bob

    def bare(self, side: str, *port: int) -> contextlib.AbstractContextManager[Program]:
        """Run `bare_bob` or `bare_alice`."""
        path = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import benchmark"
        return self.program("-", code=f"{path}; benchmark.bare_{side}{(str(self.folder), *port)}")

    @contextlib.contextmanager
    def waiting_bare_bob(self) -> Iterator[tuple[Program, int]]:
        with self.bare("bob") as bob:
            yield bob, int(bob.expect(r"(\d+)\n", "stderr")[1])

    @contextlib.contextmanager
    def bare_conversation(self) -> Iterator[tuple[Program, Program]]:
        with self.waiting_bare_bob() as (bob, port), self.bare("alice", port) as alice:
            yield alice, bob


def take_lines(program: Program, count: int) -> None:
    """Wait until so many lines have come out of a pipe."""
    assert program.process.stdout is not None
    out = program.process.stdout.fileno()
    while count > 0:
        assert select.select([out], [], [], DEADLINE)[0], f"{count} lines never came"
        data = os.read(out, 1 << 20)
        assert data, f"it ended before {count} lines"
        count -= data.count(b"\n")


def pipes(people: People) -> None:
    """Print the rows on messages that come from a pipe and go into a pipe."""

    lot = 10 if options.quick else 100
    short, long = b"x" * 64 + b"\n", b"x" * chat.TEXT_LIMIT + b"\n"

    def replies(alice: Program, bob: Program) -> None:
        for program in (alice, bob):
            program.write(lot * short)
        for program in (alice, bob):
            take_lines(program, lot)

    def there_and_back(alice: Program, bob: Program) -> None:
        for sender, receiver in ((alice, bob), (bob, alice)):
            sender.write(long)
            take_lines(receiver, 1)

    with people.conversation() as ours, people.bare_conversation() as bare:
        times = in_turns(10, timed(replies, *ours), timed(replies, *bare))
        takes = [each / lot for each in times[0]]
        row("a short request and its reply, through pipes / bare", ratios(*times), "<= 1.15", takes)
        times = in_turns(10, timed(there_and_back, *ours), timed(there_and_back, *bare))
        row("1 MiB there and back, through pipes / bare", ratios(*times), "<= 2.0", times[0])


def terminals(people: People) -> None:
    """Print the rows on what is shown at a terminal."""
    texts = {
        "in one line": "x" * chat.TEXT_LIMIT,
        "in 10,000 lines": ("x" * 103 + "\n") * 10_000,
        "of wide characters": "\u4e2d" * (chat.TEXT_LIMIT // 3),
    }
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w", encoding="utf-8") as stream:
        for name, text in texts.items():
            (times,) = in_turns(10, timed(chat.marked, "Alice + ", text, stream))
            row(f"1 MiB {name} is laid out for a terminal, ms", in_ms(times), "<= 50")
    os.close(ours)

    taken = []
    with people.conversation(terminal=True) as (alice, bob):
        for number in range(2 if options.quick else 100):
            for sender, receiver in ((alice, bob), (bob, alice)):
                text = f"message {number} of {'AB'[sender is bob]}"
                sender.write(text)
                sender.expect(text)  # it stands at the prompt
                # So that Enter comes at any moment between two ticks, and not always right after one.
                time.sleep(random.uniform(0, 2 * chat.TICK))
                begun = time.perf_counter()
                sender.write("\r")
                receiver.expect(text)
                taken.append(time.perf_counter() - begun)
                receiver.expect(r"(Alice|Bob): ")
    row("Enter at one terminal to text at the other, 95th percentile, ms", in_ms(taken), "<= 50", percent=95)


def starts(people: People) -> None:
    """Print the rows on starting."""

    def shows(pattern: str, *command: str, stream: str = "stderr", code: str = "") -> Seconds:
        """Start a program, at a terminal if it is to show something on `stdout`, until it shows something."""

        def seconds() -> float:
            begun = time.perf_counter()
            with people.program(*command, terminal=stream == "stdout", code=code) as program:
                program.expect(pattern, stream)
                return time.perf_counter() - begun

        return seconds

    def ends(*command: str, code: str = "") -> Seconds:
        def seconds() -> float:
            begun = time.perf_counter()
            with people.program(*command, code=code) as program:
                program.wait()
                return time.perf_counter() - begun

        return seconds

    def compare(label: str, target: str, *both: Seconds) -> None:
        times = in_turns(30, *both)
        row(label, ratios(*times), target, times[0])

    def imports_and_key(script: str, stream: str, role: str) -> Seconds:
        """Do what a program that talks cannot do without: its imports, and the reading of its key."""
        key = people.folder / role / "identity.pem"
        code = f"RSA.import_key(open({str(key)!r}).read())\nprint('imported', file=sys.{stream})"
        code = f"{imports('crypto_utils.py', script)}\n{code}"
        return shows("imported", script, stream=stream, code=code)

    bob, alice = "bob_server.py", "alice_client.py"
    only_imports = ends(bob, code=imports("crypto_utils.py", bob))
    compare("--help of Bob / imports", "<= 1.10", ends(bob, "--help"), only_imports)
    waits, least = shows("Waiting for Alice", bob, "--port", "0"), imports_and_key(bob, "stderr", "bob")
    compare('Bob\'s second start to "Waiting" / imports, and his key', "<= 1.15", waits, least)
    asks, least = shows("Bob's address", alice, stream="stdout"), imports_and_key(alice, "stdout", "alice")
    compare("Alice's start to the question for an address / the same", "<= 1.15", asks, least)
    with people.waiting_bob() as (waiting, command), people.waiting_bare_bob() as (_, port):
        speaks, handshake = shows("Alice: ", *command, stream="stdout"), bare_handshake(people, port)

        def first_prompt() -> float:
            took = speaks()
            waiting.expect("Waiting for Alice", "stderr")
            return took

        label = 'Alice\'s start to "Alice: " / the same, and a bare handshake'
        compare(label, "<= 1.15", first_prompt, lambda: handshake() + least())


# -------------------------------------------------------------------------------------- the handshake


def tls(people: People, version: ssl.TLSVersion) -> Seconds:
    """Return a handshake of TLS with the same group and keys, certificates on both sides, and no tickets."""
    bob, alice = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for context, name, peer in ((bob, "bob", "alice"), (alice, "alice", "bob")):
        context.minimum_version = context.maximum_version = version
        context.check_hostname, context.verify_mode = False, ssl.CERT_REQUIRED
        context.set_ciphers("DHE-RSA-AES256-GCM-SHA384")  # of TLS 1.2; 1.3 takes AES-256-GCM anyway
        context.load_cert_chain(people.folder / f"{name}.crt", people.folder / name / "identity.pem")
        context.load_verify_locations(people.folder / f"{peer}.crt")
    bob.load_dh_params(str(people.folder / "bob" / "dh_parameters.pem"))
    bob.num_tickets = 0

    def seconds() -> float:
        near, far = loopback()
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        begun = time.perf_counter()
        background = Background(lambda: bob.wrap_socket(far, server_side=True).close())
        alice_end = alice.wrap_socket(near)
        background.result()
        took = time.perf_counter() - begun
        alice_end.close()
        return took

    return seconds


def bare_handshake(people: People, port: int) -> Seconds:
    """Return Alice's side of a handshake with a bare Bob."""

    def seconds() -> float:
        begun = time.perf_counter()
        with socket.create_connection(("127.0.0.1", port)) as connected:
            Bare(connected, people.alice, people.bob).shake_hands_as_alice()
            return time.perf_counter() - begun

    return seconds


def our_handshake(people: People, bob: Program, host: str, port: int) -> Seconds:
    """Return Alice's side of a handshake with our Bob."""
    pinned = PinnedPeer(people.at_alices, f"[{host}]:{port}")

    def seconds() -> float:
        begun = time.perf_counter()
        frames = FrameSocket(socket.create_connection((host, port)))
        channel = chat.alice_handshake(frames, people.alice, people.at_alices, pinned)
        took = time.perf_counter() - begun
        channel.close()
        bob.expect("Waiting for Alice", "stderr")
        return took

    return seconds


def handshakes(people: People) -> None:
    """Print the rows on handshakes: Bob is a process, and Alice's side of it is done here."""
    for cores, where in ((2, "on two cores"), (1, "on one core")):
        pin(cores)
        with (
            people.waiting_bob() as (bob, (_, host, _, port, *_)),
            people.waiting_bare_bob() as (_, bare_port),
        ):
            ours, bare = our_handshake(people, bob, host, int(port)), bare_handshake(people, bare_port)
            versions = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
            others = [tls(people, version) for version in versions] if OPENSSL and cores == 1 else []
            mine, least, *theirs = in_turns(60, ours, bare, *others)
            label = f"handshake of two processes {where} / bare"
            row(label, ratios(mine, least), "<= 1.20", mine)
    for name, their in zip(("1.2 with DHE-2048", "1.3 with X25519"), theirs):
        limit = f"limit {statistics.median(ratios(their, least)):.2f}"
        row(f"handshake of TLS {name}, and the same keys / ours", ratios(their, mine), limit, mine)


def strangers(people: People) -> None:
    """Print what the costliest hostile hellos cost until they are refused."""
    offer = chat.Offer.make(chat.Role.ALICE, people.alice, GROUP)
    big = b"\x80" + bytes(508) + (270135).to_bytes(3, "big")  # 2^4095 + 270135 is prime, and its q is not
    bobs = chat.encode_fields(chat.VERSION, bytes(32), big, b"\4", bytes(511) + b"\x10", offer.hello.rsa)
    stolen = chat.frame(offer.payload) + chat.frame(bytes(12 + 256 + 16 + 384))

    def refused(attack: bytes, handshake: Callable[..., object], *arguments: object) -> Seconds:
        def seconds() -> float:
            near, far = loopback()
            with near, far:
                near.sendall(attack)
                begun = time.perf_counter()
                with contextlib.suppress(chat.ProtocolError):
                    handshake(FrameSocket(far), *arguments)
                    raise AssertionError("it was not refused")
                return time.perf_counter() - begun

        return seconds

    by_bob = refused(stolen, chat.bob_handshake, people.bob, GROUP, PinnedPeer(people.at_bobs, "alice"))
    bob = PinnedPeer(people.at_alices, "[bob]:1")
    by_alice = refused(chat.frame(bobs), chat.alice_handshake, people.alice, people.at_alices, bob)
    for label, attack in (
        ("Bob refuses a stolen hello, and a READY of nonsense, ms", by_bob),
        ("Alice refuses p of 4096 bits, prime, with q composite, ms", by_alice),
    ):
        row(label, in_ms(in_turns(20, attack)[0]), "<= 100")


# ----------------------------------------------------------------------------- a search for parameters


class SeenEnough(Exception):
    """A search was watched for as long as was wanted."""


def our_search(bits: int, threads: int, tests: int) -> float:
    """Return the expected seconds of `generate_group`, having watched the beginning of one search.

    How long one search takes is luck, distributed exponentially: even the mean of ten spreads by a third. But
    no luck are the time before the first test, the time of a test, and the number of tests to be expected:
    one in `chance`, as the search tells its `progress`, when a run of the sieve is long enough.
    """
    moments: list[float] = []
    chance, survivors, sieve = 0.0, 0, chat._survivors

    def progress(done: float) -> None:
        nonlocal chance
        chance = chance or done
        moments.append(time.perf_counter())
        if len(moments) == tests:
            raise SeenEnough

    def counted(*arguments: Any) -> Iterator[int]:
        nonlocal survivors
        for i in sieve(*arguments):
            survivors += 1
            yield i

    while len(moments) < tests:  # again, if this search was over sooner than that
        moments.clear()
        chance, survivors, begun = 0.0, 0, time.perf_counter()
        cores = mock.patch("os.cpu_count", return_value=threads)
        with cores, mock.patch.object(chat, "_survivors", counted), contextlib.suppress(SeenEnough):
            chat.generate_group(bits, progress)
    half = tests // 2  # the threads are ahead at first: they test while the tests are still being handed out
    test = (moments[-1] - moments[half]) / (tests - 1 - half)
    return (moments[-1] - begun - tests * test) / (1 - math.exp(-chance * survivors)) + test / chance


def openssl_search(bits: int, tests: int) -> float:
    """Return the expected seconds of `openssl dhparam BITS`, in the same way.

    OpenSSL 3 walks over p = 23 mod 24 as well, divides p and q by its first 384 primes (1024 over 2048 bits),
    prints a dot for what is left, and tests that: so its chance is ours, with another bound. (p should be
    prime, and a "+" follow, for one in sqrt(chance): of the 8,022 dots of two whole runs it was for 73; 79
    were expected.) Left out, in its favour: 64 more rounds for the prime that it found, some 0.4 s.
    """
    chance = (1.781 * math.log(2657 if bits <= 2048 else 8161) / (bits * math.log(2))) ** 2
    command = [OPENSSL, "dhparam", "-2", str(bits)]
    while True:
        with subprocess.Popen(command, stdout=DEVNULL, stderr=PIPE, bufsize=0) as child:
            moments: list[float] = []
            mark = b" "
            while child.stderr and len(moments) < tests and mark not in (b"*", b""):
                mark = child.stderr.read(1)
                if mark == b".":
                    moments.append(time.perf_counter())
            child.kill()
        if len(moments) == tests:
            return (moments[-1] - moments[0]) / (tests - 1) / chance


def library_search(bits: int, tests: int) -> float:
    """Return the expected seconds of the library's `generate_probable_safe_prime`.

    It tests random odd numbers: one in ln(q) / 2 is a prime, and one in ln(p) / 1.32 of those has a prime p.
    """
    begun = time.perf_counter()
    for _ in range(tests):
        test_probable_prime(secrets.randbits(bits - 1) | 1 | 1 << (bits - 2))
    log_p = bits * math.log(2)
    return (time.perf_counter() - begun) / tests * (log_p / 2) * (log_p / 1.3203)


def peak_memory(bits: int) -> float:
    """Return the peak memory of a search in MB. It does not grow after the sieve, so a few tests will do.

    In the child of a shell: a child begins with the peak of its parent, and a shell's is small.
    """
    code = (
        "import crypto_utils, itertools, os, resource; count = itertools.count(1)\n"
        f"def progress(_):\n    if next(count) == 20:\n"
        "        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True); os._exit(0)\n"
        f"while True: crypto_utils.generate_group({bits}, progress)"
    )
    shell = ["sh", "-c", '"$0" -c "$1"; exit $?', sys.executable, code]
    out = subprocess.run(shell, cwd=ROOT, stdout=PIPE, check=True).stdout
    return int(out) / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def searches() -> None:
    """Print the rows on making parameters, with two threads."""
    pin(2)
    for bits, rounds, tests in ((2048, 5, 300), (3072, 3, 200))[: 1 if options.quick else 2]:
        tests = 40 if options.quick else tests
        subjects = {"ours": functools.partial(our_search, bits, 2, tests)}
        if OPENSSL:
            subjects["openssl dhparam"] = functools.partial(openssl_search, bits, tests)
        if bits == 2048:
            subjects["pycryptodome"] = functools.partial(library_search, bits, tests)
        ours, *others = in_turns(rounds, *subjects.values())
        for name, theirs in zip(list(subjects)[1:], others):
            target = ">= 5.0" if name.startswith("openssl") else ""
            row(f"search for {bits} bits: {name} / ours", ratios(theirs, ours), target, ours)
    bits = 2048 if options.quick else 3072
    row(f"peak memory of a search for {bits} bits, MB", [peak_memory(bits)], "<= 64")


def machine() -> str:
    """Say what this was measured on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), model)
    openssl = subprocess.run([OPENSSL, "version"], stdout=PIPE).stdout.decode() if OPENSSL else "no openssl"
    pycryptodome, openssl = importlib.metadata.version("pycryptodome"), openssl.split(" (")[0].strip()
    cores = f"{len(CORES) or os.cpu_count()} cores (load {os.getloadavg()[0]:.1f})"
    python = f"Python {platform.python_version()}, pycryptodome {pycryptodome}, {openssl}"
    return f"{time.strftime('%Y-%m-%d')}, {model}, {cores}, {python}"


def main() -> None:
    print(f"{machine()}\n{'':62} {'median':>7} {'quartiles':^17} {'takes':>11}  target", flush=True)
    gc.disable()
    with tempfile.TemporaryDirectory() as folder:
        people = People(Path(folder))
        pin(2)
        for part in (pipes, terminals, starts, handshakes, strangers):
            part(people)
    searches()


if __name__ == "__main__":
    options = parser.parse_args()
    main()
