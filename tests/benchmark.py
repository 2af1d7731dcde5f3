"""What things cost, beside what they are made of, and beside OpenSSL.

A time alone says more about the machine than about the code. So every figure is a ratio of two times, taken
in turns in one run (A B A B ...): the median of all turns, and their quartiles. Only what has a limit of its
own is in ms or MB. The garbage collector is off. All but the search with two threads runs on one core, both
ends of a connection too: nothing hides behind anything else.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import importlib.metadata
import math
import os
import platform
import resource
import secrets
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any, Callable
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from conftest import GROUP, RFC_GROUPS, Background, loopback  # noqa: E402

import crypto_utils as chat  # noqa: E402
from crypto_utils import AES, RSA, SHA256, DerSequence, Home, Integer, KnownPeer, Line, RsaKey, pss  # noqa: E402

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
OPENSSL = shutil.which("openssl") or ""
Seconds = Callable[[], float]  # does something, and tells how long the part of it that counts took
Handshake = Callable[[socket.socket, socket.socket], "tuple[Any, Any]"]  # of Bob's socket and Alice's

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--quick", action="store_true", help="see whether all works, and judge no time")
parser.add_argument("--cpu", action="store_true", help="take processor time, but for the search")


def clock() -> float:
    """Elapsed time; or processor time of this process, all its threads, and its children that have ended."""
    if not options.cpu:
        return time.perf_counter()
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def timed(call: Callable[..., object], *arguments: object) -> Seconds:
    def seconds() -> float:
        begun = clock()
        call(*arguments)
        return clock() - begun

    return seconds


def in_turns(rounds: int, *subjects: Seconds) -> list[list[float]]:
    """Return each subject's times, taken in turns. A first turn does not count: it fills the caches."""
    turns = [[subject() for subject in subjects] for _ in range(2 if options.quick else rounds + 1)]
    gc.collect()
    return [list(times) for times in zip(*turns[1:])]


def row(label: str, a: list[float], b: list[float] | None = None, target: str = "", unit: str = "") -> None:
    """Print a row: a / b, turn by turn, or a alone where it has a unit."""
    values = [x / y for x, y in zip(a, b)] if b else a
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if values[1:] else values * 3
    verdict = ""
    if target and not options.quick:
        sign, limit = target.split()
        verdict = "met" if (middle >= float(limit) if sign == ">=" else middle <= float(limit)) else "MISSED"
    print(f"{label:56} {middle:8.2f} {low:8.2f} - {high:<8.2f} {unit:3} {target:8} {verdict}", flush=True)


def pin(cores: int) -> None:
    if CORES:
        os.sched_setaffinity(0, CORES[:cores])


# -------------------------------------------------------------------------------- parameters, and their check


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
            moments, mark = [], b" "
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
        chat.test_probable_prime(secrets.randbits(bits - 1) | 1 | 1 << (bits - 2))
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


def parameters() -> None:
    """Print the rows on making parameters, and on checking somebody else's."""
    tests = 100 if options.quick else 500
    for bits, rounds in ((2048, 9), (3072, 5))[: 1 if options.quick else 2]:
        for threads, target in ((1, ">= 3.0"), (2, ">= 5.0")):
            pin(threads)
            searches = [lambda: our_search(bits, threads, tests), lambda: library_search(bits, tests)]  # noqa: B023
            searches += [lambda: openssl_search(bits, tests)] if OPENSSL else []  # noqa: B023
            ours, library, *openssl = in_turns(rounds, *searches)
            name = f"search for {bits} bits, {threads} thread{'s' * (threads - 1)}"
            row(f"{name}: pycryptodome / ours", library, ours)
            for theirs in openssl:
                row(f"{name}: openssl dhparam / ours", theirs, ours, target)
    pin(1)
    q = GROUP.q - 4
    powers = timed(pow, Integer(2), Integer(q - 1), Integer(q)), timed(chat._fermat, q)
    row("rate of tests: _fermat / pow of pycryptodome", *in_turns(50, *powers), ">= 0.95")
    for bits in (2048, 3072):
        row(f"peak memory of a search for {bits} bits", [peak_memory(bits)], None, "<= 64", "MB")
    library = timed(lambda: [chat.test_probable_prime(n) for n in (GROUP.p, GROUP.q)])
    with mock.patch.object(chat, "KNOWN_PRIMES", frozenset()):
        times = in_turns(15, timed(chat.check_group, GROUP), library)
    row("check_group, unknown p / test_probable_prime of p and q", *times, "<= 0.60")


# ------------------------------------------------------------------------------------- between Bob and Alice


def sign(key: RsaKey, message: bytes) -> bytes:
    return pss.new(key, salt_bytes=32).sign(SHA256.new(message))


def verify(key: RsaKey, message: bytes, signature: bytes) -> None:
    pss.new(key, salt_bytes=32).verify(SHA256.new(message), signature)


def record(key: RsaKey, text: bytes) -> None:
    """Do what a record cannot do without: encrypt, sign; verify, decrypt."""
    ciphertext, tag = AES.new(bytes(32), AES.MODE_GCM, nonce=bytes(12)).encrypt_and_digest(text)
    verify(key, ciphertext, sign(key, ciphertext))
    AES.new(bytes(32), AES.MODE_GCM, nonce=bytes(12)).decrypt_and_verify(ciphertext, tag)


def both(far: Callable[[], Any], near: Callable[[], Any]) -> tuple[Any, Any]:
    """Do both at once, the first in a thread of its own; return what they return."""
    background = Background(far)
    result = near()
    return background.result(), result


class Pair:
    """Bob and Alice, with RSA keys of 3072 bits, who know each other: by their pins, and by certificates."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bob, self.alice = self.keys = RSA.generate(3072), RSA.generate(3072)
        self.knows_alice = KnownPeer(Home(folder / "bob"), "alice")
        self.knows_bob = KnownPeer(Home(folder / "alice"), "bob")
        self.knows_alice.pin(self.alice)
        self.knows_bob.pin(self.bob)
        (folder / "dh.pem").write_bytes(GROUP.export())
        for name, key in zip(("bob", "alice"), self.keys):
            (folder / f"{name}.key").write_bytes(key.export_key("PEM", pkcs=8))
            command = f"req -x509 -new -subj /CN={name} -key {name}.key -out {name}.crt"
            if OPENSSL:
                subprocess.run([OPENSSL, *command.split()], cwd=folder, check=True)

    def chat(self, far: socket.socket, near: socket.socket) -> tuple[Any, Any]:
        """Shake hands; return Bob's end and Alice's."""
        return both(
            lambda: chat.bob_handshake(Line(far), self.bob, GROUP, self.knows_alice),
            lambda: chat.alice_handshake(Line(near), self.alice, GROUP, self.knows_bob)[0],
        )

    def tls(self, version: ssl.TLSVersion) -> Handshake:
        """Return the same with TLS, certificates on both sides, and no tickets for another time."""
        bob, alice = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        for context, name, peer in ((bob, "bob", "alice"), (alice, "alice", "bob")):
            context.minimum_version = context.maximum_version = version
            context.check_hostname, context.verify_mode = False, ssl.CERT_REQUIRED
            context.set_ciphers("DHE-RSA-AES256-GCM-SHA384")  # of TLS 1.2; 1.3 takes AES-256-GCM anyway
            context.load_cert_chain(self.folder / f"{name}.crt", self.folder / f"{name}.key")
            context.load_verify_locations(self.folder / f"{peer}.crt")
        bob.load_dh_params(str(self.folder / "dh.pem"))
        bob.num_tickets = 0
        return lambda far, near: both(lambda: bob.wrap_socket(far, True), lambda: alice.wrap_socket(near))

    def critical_path(self) -> None:
        """Do what a handshake cannot do without, and not at once, with the library alone."""
        p, g = Integer(GROUP.p), Integer(GROUP.g)
        a, b = (Integer.from_bytes(secrets.token_bytes(32)) for _ in range(2))
        public = pow(g, b, p)
        for secret in (a, b):  # Alice looks at B, Bob at A, which is as good as B here
            assert Integer.jacobi_symbol(public, p) == 1
            pow(public, secret, p)
        pow(g, a, p)
        for key in self.keys:  # the two READY
            record(key, bytes(chat.PADDING))


@contextlib.contextmanager
def connected(shake_hands: Handshake) -> Iterator[tuple[Any, Any, float]]:
    """Yield Bob's end, Alice's, and how long their handshake took."""
    near, far = loopback()
    for end in (near, far):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    begun = clock()
    bob, alice = shake_hands(far, near)
    took = clock() - begun
    try:
        yield bob, alice, took
    finally:
        for end in (bob, alice):
            (end if isinstance(end, ssl.SSLSocket) else end.line.socket).close()


def connections(pair: Pair) -> None:
    """Print the rows on a handshake, a round trip, and a big message."""

    def handshake(of: Handshake) -> Seconds:
        def seconds() -> float:
            with connected(of) as (_, _, took):
                return took

        return seconds

    versions = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
    tls12, tls13 = (pair.tls(version) if OPENSSL else pair.chat for version in versions)
    subjects = [handshake(pair.chat), timed(pair.critical_path), handshake(tls12), handshake(tls13)]
    ours, path, *tls = in_turns(60, *subjects[: 4 if OPENSSL else 2])
    row("handshake / its critical path in primitives", ours, path, "<= 1.20")
    for name, theirs, target in zip(("1.2 with DHE-2048", "1.3 with X25519"), tls, (">= 2.0", "")):
        row(f"handshake of TLS {name} / ours", theirs, ours, target)

    with connected(pair.chat) as (bob, alice, _), connected(tls13) as tls_ends:

        def send_signed(sender: int, text: bytes) -> None:
            """Through TLS, with a signature of the same library; Bob is 0, Alice 1."""
            tls_ends[sender].sendall(text + sign(pair.keys[sender], text))

        def receive_signed(sender: int, length: int) -> None:
            received = bytearray(length + 384)
            missing = memoryview(received)
            while missing:
                missing = missing[tls_ends[1 - sender].recv_into(missing) :]
            verify(pair.keys[sender], bytes(received[:length]), bytes(received[length:]))

        def our_round_trip() -> None:
            for sender, receiver in ((alice, bob), (bob, alice)):
                sender.send("x" * 64)
                receiver.receive()

        def tls_round_trip() -> None:
            for sender in (1, 0):
                send_signed(sender, b"x" * 64)
                receive_signed(sender, 64)

        def our_big_message() -> float:
            took = timed(both, lambda: alice.send(big), bob.receive)()
            bob.send("")  # and it is Alice's turn again
            alice.receive()
            return took

        def tls_big_message() -> None:
            both(lambda: send_signed(1, big.encode()), lambda: receive_signed(1, len(big)))

        big = "x" * chat.TEXT_LIMIT
        records = timed(lambda: [record(key, b"x" * 64) for key in pair.keys])
        round_trip = timed(our_round_trip), records, timed(tls_round_trip)
        one_way = our_big_message, timed(lambda: record(pair.alice, big.encode())), timed(tls_big_message)
        names = ("64 bytes and back", "<= 1.08"), ("1 MiB", "<= 1.15")
        for (name, target), trio in zip(names, (round_trip, one_way)):
            ours, primitives, *tls = in_turns(60, *trio[: 3 if OPENSSL else 2])
            row(f"{name} / primitives", ours, primitives, target)
            for theirs in tls:
                row(f"{name} through TLS 1.3 with PSS / ours", theirs, ours)


# -------------------------------------------------------------------------------- hostile strangers, start-up


def strangers(pair: Pair) -> None:
    """Print what the costliest of several hostile hellos costs until it is refused, all included."""
    nonce, good, rsa = chat.decode_fields(chat.Offer.make(chat.Role.ALICE, pair.alice, GROUP).hello)[1:]
    known = RFC_GROUPS["ffdhe4096"].p

    def hello(*fields: bytes) -> bytes:
        return chat.frame(chat.encode_fields(chat.VERSION, nonce, *fields))

    def rsa_key(bits: int, e: int) -> bytes:
        key = b"\0" + DerSequence([(1 << bits) - 1, e]).encode()
        return DerSequence([chat._RSA_ENCRYPTION, b"\3\x82" + len(key).to_bytes(2, "big") + key]).encode()

    def group(p: int, g: int = 4, b: int = 16) -> bytes:
        return hello(chat.to_bytes(p), chat.to_bytes(g), b.to_bytes(512, "big"), rsa)

    to_bob = {
        "garbage": chat.frame(secrets.token_bytes(chat.HELLO_LIMIT)),
        "a frame that is too long": b"\xff" * 9000,
        "nothing but empty fields": chat.frame(bytes(chat.HELLO_LIMIT)),
        "A outside the subgroup": hello((GROUP.p - 4).to_bytes(256, "big"), rsa),
        "A = p - 1": hello((GROUP.p - 1).to_bytes(256, "big"), rsa),
        "an RSA modulus of 1 KiB": hello(good, rsa_key(7900, 65537)),
        "an RSA exponent as long as the modulus": hello(good, rsa_key(3900, (1 << 3899) + 1)),
        "a stolen hello, and a READY of nonsense": hello(good, rsa) + chat.frame(bytes(12 + 256 + 16 + 384)),
    }
    to_alice = {  # p and q of the second and the third have no factor below 2,000,000
        "p = rs of 4096 bits": group(GROUP.p * RFC_GROUPS["modp_2048"].p),
        "p prime, q composite": group((1 << 4095) + 270135),
        "q prime, p composite": group((1 << 4095) + 229071),
        "g of order 2": group(known, known - 1),
        "B outside the subgroup": group(known, 4, known - 4),
    }

    def refused(handshake: Callable[[Line], Any], attack: bytes) -> Seconds:
        def seconds() -> float:
            near, far = loopback()
            with near, far:
                near.sendall(attack)
                begun = clock()
                with contextlib.suppress(chat.ProtocolError):
                    handshake(Line(far))
                    raise AssertionError("it was not refused")
                return 1000 * (clock() - begun)

        return seconds

    for name, handshake, attacks in (
        ("Bob", lambda line: chat.bob_handshake(line, pair.bob, GROUP, pair.knows_alice), to_bob),
        ("Alice", lambda line: chat.alice_handshake(line, pair.alice, None, pair.knows_bob), to_alice),
    ):
        times = in_turns(20, *(refused(handshake, attack) for attack in attacks.values()))
        cost, what = max(zip(times, attacks), key=lambda each: statistics.median(each[0]))
        row(f"{name} refuses {what}", cost, None, "<= 100", "ms")


def imports(*scripts: str) -> str:
    """Return the import statements at the top of the scripts: all that they need but one another."""
    nodes = [node for script in scripts for node in ast.parse((ROOT / script).read_text("utf-8")).body]
    wanted = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    return "\n".join(ast.unparse(node) for node in wanted if getattr(node, "module", "") != "__future__")


def start_up(cache: Path) -> None:
    """Print the rows on starting, with modules compiled already, as they are from the second time on."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(cache)}

    def python(*arguments: str) -> Seconds:
        command = [sys.executable, *arguments]
        return timed(lambda: subprocess.run(command, cwd=ROOT, env=environment, stdout=DEVNULL, check=True))

    for script in ("bob_server.py", "alice_client.py"):
        times = in_turns(30, python(script, "--help"), python("-c", imports("crypto_utils.py", script)))
        row(f"{script} --help / its imports alone", *times, "<= 1.15")
    times = in_turns(30, python("-c", "import crypto_utils"), python("-c", imports("crypto_utils.py")))
    row("import crypto_utils / its imports alone", *times, "<= 1.15")


def machine() -> str:
    """Say what this was measured on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), model)
    cores = f"pinned to 1 core of {len(CORES)} (2 threads: to 2)" if CORES else "not pinned"
    openssl = subprocess.run([OPENSSL, "version"], stdout=PIPE).stdout.decode() if OPENSSL else "no openssl"
    pycryptodome, openssl = importlib.metadata.version("pycryptodome"), openssl.split(" (")[0].strip()
    return (
        f"{model}, {cores}, {'processor' if options.cpu else 'elapsed'} time, "
        f"Python {platform.python_version()}, pycryptodome {pycryptodome}, "
        f"{openssl} (Python's: {ssl.OPENSSL_VERSION})"
    )


def main() -> None:
    print(f"{machine()}\n{'':56} {'median':>8} {'quartiles':^19}     target", flush=True)
    gc.disable()
    pin(1)
    with tempfile.TemporaryDirectory() as folder:
        pair = Pair(Path(folder))
        connections(pair)
        strangers(pair)
        start_up(Path(folder) / "cache")
    parameters()
    if not options.quick:
        load()


def load() -> None:
    """What the tests of Bob under load measure while they run: seconds, strangers, threads, memory."""
    tests = Path(__file__).with_name("test_load.py")
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:randomly", str(tests)]
    said = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LOAD_TRIES": "20"})
    print("\nBob under load:")
    print("\n".join(line for line in said.stdout.splitlines() if line.startswith("    ")))
    said.check_returncode()


if __name__ == "__main__":
    options = parser.parse_args()
    main()
