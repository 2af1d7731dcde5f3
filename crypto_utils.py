"""Secure chat: the protocol secure-chat/1 and what its two programs share, in the order in which it runs.

    Bob                                                               Alice
    hello_bob = "secure-chat/1", nonce_B, p, g, B = g^b, RSA_bob  ---->
                <----  hello_alice = "secure-chat/1", nonce_A, A = g^a, RSA_alice
    both: may the peer's key be trusted? Z = g^ab, th, two AES keys
                <----  record 0: READY, sealed by Alice (sent together with her hello)
    record 0: READY, sealed by Bob, after he verified and decrypted hers  ---->    (or CLOSE: he is busy)
                <----  record n: TEXT, the request
    record n: TEXT, the reply  ---->
    either side, when it leaves: CLOSE

    symbol    here             bytes         what it is, and where it is defined
    p, g      Group            256 to 512    safe prime p = 2q + 1; g generates the subgroup of order q
    a, b      exponent         len(p) / 8    private exponent, for one session (SP 800-56A, 5.6.1.1)
    A, B      public_value     len(p)        g^a, g^b mod p, left-padded
    Z         z                len(p)        shared secret g^ab mod p, left-padded (SP 800-56A, 5.7.1.1)
    th        th               32            transcript hash: SHA-256 over both hello frames
    K         key              32            AES-256 key of one direction (SP 800-56C, 4.1)
    C         commitment       32            commits to K; never sent, covered by every signature
    n         number           12            number of a record, and its GCM nonce (SP 800-38D, 8.2.1)
              in_reply_to      32            in each record: what was signed of the last record received

The two columns are `handshake` in bob_server.py and in alice_client.py. Up to the banner, bytes go in and
bytes come out, and nothing prints or asks; below it is what both need for a person. Whatever a peer sends
becomes a value that passed every check, or an exception.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 9):
    sys.exit(f"Cannot start: Python 3.9 or newer is needed, not {sys.version.split()[0]}")

import argparse
import base64
import bisect
import contextlib
import enum
import errno
import functools
import getpass
import io
import itertools
import locale
import logging
import math
import os
import queue
import re
import secrets
import select
import shlex
import signal
import socket
import stat
import textwrap
import threading
import time
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Callable, NamedTuple, NoReturn, TextIO

if sys.platform == "win32":
    import _winapi
    import msvcrt

    PYTHON, VENV = r".venv\Scripts\python", "py -m venv .venv"
else:
    import fcntl
    import termios

    PYTHON, VENV = "python3", "python3 -m venv .venv && . .venv/bin/activate"

try:
    from Crypto import IncorrectPassphraseError, PassphraseRequiredError
    from Crypto.Cipher import AES
    from Crypto.Hash import SHA256
    from Crypto.IO import PEM
    from Crypto.Math.Numbers import Integer
    from Crypto.Math.Primality import miller_rabin_test
    from Crypto.PublicKey import RSA
    from Crypto.PublicKey.RSA import RsaKey as RsaKey
    from Crypto.Signature import pss
    from Crypto.Util.asn1 import DerSequence
    from Crypto.Util.Padding import pad, unpad
    from Crypto.Util.RFC1751 import key_to_english
except ImportError as missing:
    install = f"  {VENV}\n  {PYTHON} -m pip install -r requirements.txt"
    sys.exit(f"Cannot start: {missing}. Run this, in {Path(__file__).resolve().parent}:\n{install}")

if Integer.__name__ != "IntegerNat":
    sys.exit("Cannot start: pycryptodome has no constant-time arithmetic; unset PYCRYPTODOME_INTEGER")

VERSION = b"secure-chat/1"
PORT = 65432

# Sizes in bytes, unless the name says bits. Each limit is checked before anything is allocated or computed.
NONCE_BYTES = 32
GROUP_BITS = RSA_BITS = range(2048, 4096 + 1)
RSA_EXPONENT = 65537
NEW_RSA_BITS = 3072
HELLO_LIMIT = 8 * 1024
READY_LIMIT = 4 * 1024
TEXT_LIMIT = 1024 * 1024
PADDING = 256
GCM_NONCE, GCM_TAG = 12, 16
RECORD_LIMIT = GCM_NONCE + (TEXT_LIMIT // PADDING + 1) * PADDING + GCM_TAG + RSA_BITS[-1] // 8
FILE_LIMIT = 1024 * 1024  # of a file in a home folder

TESTED = b"Diffie-Hellman parameters that secure-chat has tested:\n"  # first line of a file that we wrote
NOTHING = bytes(32)  # what Alice's READY replies to: she has received no record yet
PATIENCE = 30.0  # seconds: for the whole handshake; without progress in a frame; without a byte going out
GOODBYE_SECONDS = 2.0  # for a CLOSE to reach the other side before we hang up
SIGNAL_NAMES = "SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGCONT"
SIGNALS = [number for number in signal.Signals if number.name in SIGNAL_NAMES]  # those that are handled

# What is sent leaves at once. A dead line is noticed after 30 s: idle (seconds), or sending (milliseconds).
TCP_OPTIONS = {
    "TCP_NODELAY": 1,
    "TCP_KEEPIDLE": 15,
    "TCP_KEEPALIVE": 15,  # the same option on macOS
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 30_000,
}

UNPARSABLE = (ValueError, IndexError, TypeError, ArithmeticError)  # what the library raises for damaged keys
log = logging.getLogger("secure_chat")


class ChatError(Exception):
    """What ends a conversation or a program: `told` before its text, and `status`, the exit status."""

    told, status = "Stopped", 1


class ProtocolError(ChatError):
    """The peer, or somebody in between, broke the protocol. The connection is over."""

    told, status = "Broken off", 3


class TrustError(ChatError):
    """The key with the fingerprint `presented` is not trusted. `expected`: those that are, and why."""

    told, status = "Refused", 3

    def __init__(self, reason: str, presented: str, expected: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(reason)
        self.presented, self.expected = presented, expected


class ConnectionCut(ChatError):
    """The connection ended or stalled without a goodbye."""

    told = "Cut off"


class FileError(ChatError):
    """A file or folder cannot be used as it is, and was left as it was. The text says what to do."""


class MessageError(ChatError):
    """This text cannot be sent, but the conversation can go on."""

    told = "Not sent"


def require(condition: bool, reason: str) -> None:
    """Raise ProtocolError(reason) unless `condition` holds."""
    if not condition:
        raise ProtocolError(reason)


def trace(step: str, **values: bytes | int) -> None:
    """Log a step of the calling function, with values. Of live sessions, no secrets but texts and words."""
    log.info(step, extra={"values": values}, stacklevel=2)


class Role(enum.Enum):
    """Which of the two sides. Everything that is derived for one direction is labelled with its sender."""

    BOB = "bob"
    ALICE = "alice"

    @property
    def peer(self) -> Role:
        return Role.ALICE if self is Role.BOB else Role.BOB

    @property
    def label(self) -> bytes:
        """The direction of what this role sends, for example b"bob->alice"."""
        return f"{self.value}->{self.peer.value}".encode()

    @property
    def tag(self) -> bytes:
        """The byte that marks this role's records in a transcript."""
        return self.name[0].encode()


# ------------------------------------------------------------------------- step 1: Diffie-Hellman


def modexp(base: int, exponent: bytes, modulus: int) -> bytes:
    """Return base^exponent mod modulus, left-padded to the length of the modulus.

    The time depends on the lengths alone: the exponent is bytes, and the library's Integer is constant-time
    (which is checked above, at the import). Nothing else computes with a secret exponent.
    """
    power = pow(Integer(base), Integer.from_bytes(exponent), Integer(modulus))
    return power.to_bytes(len(to_bytes(modulus)))


def is_power_one(base: int, exponent: int, modulus: int) -> bool:
    """Whether base^exponent = 1 mod modulus. All three are public, so the time may depend on them."""
    return pow(Integer(base), Integer(exponent, public=True), Integer(modulus)) == 1


def to_bytes(number: int) -> bytes:
    """Return the shortest unsigned big-endian encoding; 0 has none (b"")."""
    return number.to_bytes((number.bit_length() + 7) // 8, "big")


class Group(NamedTuple):
    """Diffie-Hellman parameters: a safe prime p = 2q + 1, and a generator g of the subgroup of order q."""

    p: int
    g: int

    def contains(self, y: int) -> bool:
        """Whether y, which is public, is in the subgroup of order q and not 1 (SP 800-56A, 5.6.2.3.1)."""
        # The subgroup consists of the squares. This tells them six times faster than y^q = 1.
        return 2 <= y <= self.p - 2 and Integer.jacobi_symbol(y, self.p) == 1

    def export(self) -> bytes:
        """Return the group as PKCS#3 PEM, as `openssl dhparam` reads it, after a line that says: tested."""
        pem = PEM.encode(DerSequence([self.p, self.g]).encode(), "DH PARAMETERS")
        return TESTED + pem.encode() + b"\n"

    @classmethod
    def load(cls, data: bytes) -> Group:
        """Read PKCS#3 PEM, unchecked (a private value length in it is ignored). Raises ValueError."""
        blocks = re.findall(rb"-----BEGIN DH PARAMETERS-----.*?-----END DH PARAMETERS-----", data, re.DOTALL)
        try:
            der = PEM.decode(blocks[0].decode("ascii"))[0]
            sequence = DerSequence().decode(der, strict=True, nr_elements=(2, 3), only_ints_expected=True)
            return cls(sequence[0], sequence[1])
        except UNPARSABLE:
            raise ValueError("these are not DH PARAMETERS") from None


def check_group(group: Group, rounds: int = 64) -> None:
    """Raise ProtocolError unless p is a safe prime of 2048 to 4096 bits and g generates the subgroup.

    A p that has passed once and was kept needs no `rounds`: if the file is damaged, `4^q = 1 mod p` fails.
    """
    p, g = group.p, group.g
    require(p.bit_length() in GROUP_BITS, f"p has {p.bit_length()} bits, not 2048 to 4096")
    require(p % 2 == 1, "p is even")
    require(is_safe_prime(p, rounds), "p is not a safe prime")
    require(group.contains(g), "g does not generate the subgroup of order q")


def is_safe_prime(p: int, rounds: int = 64) -> bool:
    """Whether the odd number p and q = (p - 1) / 2 are both prime.

    A composite q passes a round of Miller-Rabin (random base) with probability 1/4 at most. Then p is proven
    prime: with q > sqrt(p) prime, 4^q = 1 mod p and gcd(4 - 1, p) = 1 suffice (Pocklington).
    """
    q = (p - 1) // 2
    return p % 3 != 0 and is_power_one(4, q, p) and bool(miller_rabin_test(q, rounds))


def generate_group(bits: int = 2048, progress: Callable[[], None] = lambda: None) -> Group:
    """Make new parameters: the first safe prime p of exactly `bits` bits after a random start; g = 2.

    Every p here is 24k - 1. Then q = 12k - 1, neither is divisible by 2 or 3, and 2 is a square mod p
    (p = 7 mod 8). Of each four million k, those with a small factor of p or q are sieved out. What is left is
    tested, one thread per core (the library's arithmetic releases the interpreter lock). `progress` is called
    after each test. Raises RuntimeError if no thread can be started.
    """
    pool = ThreadPoolExecutor(max_workers=os.cpu_count())
    try:
        while True:
            start = (secrets.randbits(bits) | 1 << (bits - 1)) // 24
            survivors = [q for q in _survivors(start, 1 << 22) if q.bit_length() == bits - 1]
            # First Fermat's test, 2^(q-1) = 1 mod q: nearly no composite q passes it.
            tests = pool.map(lambda q: is_power_one(2, q - 1, q), survivors)
            for q, passed in zip(survivors, tests):
                progress()
                if passed and is_safe_prime(2 * q + 1):
                    return Group(2 * q + 1, 2)
    finally:
        pool.shutdown(cancel_futures=True)


def _survivors(start: int, run: int) -> Iterator[int]:
    """Yield q = 12k - 1 for each k of a run from `start`, unless a prime below `run` divides q or 2q + 1."""
    is_prime, alive = bytearray([1]) * run, bytearray([1]) * run
    for r in range(2, run):
        if is_prime[r]:  # no smaller prime has struck it (sieve of Eratosthenes)
            is_prime[r * r :: r] = bytes(len(range(r * r, run, r)))
            for n in (12, 24) if r > 3 else ():  # r divides nk - 1 where k is the inverse of n
                first = (pow(n, -1, r) - start) % r
                alive[first::r] = bytes(len(range(first, run, r)))
    return (12 * (start + i) - 1 for i in itertools.compress(range(run), alive))


# --------------------------------------------------------------------- step 2: SHA-256 and AES-GCM


def derive_keys(z: bytes, direction: bytes, th: bytes) -> tuple[bytes, bytes]:
    """Return K and C of one direction, 32 bytes each (SP 800-56C, 4.1: one-step, SHA-256, two blocks)."""
    fixed_info = VERSION + b" key " + direction + th
    key, commitment = (SHA256.new(block.to_bytes(4, "big") + z + fixed_info).digest() for block in (1, 2))
    return key, commitment


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Hold signals back: an exception while the library makes a cipher would let it free memory twice."""
    if sys.platform != "win32":
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        if sys.platform != "win32":
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@signals_wait()
def encrypt(key: bytes, nonce: bytes, plaintext: bytes) -> tuple[bytes, bytes]:
    """AES-256-GCM: return the ciphertext and its 16-byte tag, for a 12-byte nonce (SP 800-38D, 7.1)."""
    return AES.new(key, AES.MODE_GCM, nonce=nonce, mac_len=GCM_TAG).encrypt_and_digest(plaintext)


@signals_wait()
def decrypt(key: bytes, nonce: bytes, ciphertext: bytes, tag: bytes) -> bytes:
    """Undo `encrypt` (SP 800-38D, 7.2). Raises ValueError, and returns nothing, if the tag is not valid."""
    return AES.new(key, AES.MODE_GCM, nonce=nonce, mac_len=GCM_TAG).decrypt_and_verify(ciphertext, tag)


# ------------------------------------------------------------------------------- step 3: RSA-PSS


def sign(key: RsaKey, message: SHA256.SHA256Hash) -> bytes:
    """RSASSA-PSS with MGF1-SHA-256 and a 32-byte salt (RFC 8017, 8.1.1): as many bytes as the modulus has."""
    return pss.new(key, salt_bytes=32, rand_func=secrets.token_bytes).sign(message)


def verify(key: RsaKey, message: SHA256.SHA256Hash, signature: bytes) -> bool:
    """Whether `signature` was made with `key` over this hashed message (RFC 8017, 8.1.2)."""
    with contextlib.suppress(ValueError):
        pss.new(key, salt_bytes=32).verify(message, signature)
        return True
    return False


def load_public_key(der: bytes) -> RsaKey:
    """Parse and check a peer's RSA key, a SubjectPublicKeyInfo (RFC 8017, A.1). Raises ProtocolError."""
    require(len(der) <= 1024, "the RSA key is larger than 1 KiB")  # 131 KB took 25 s to parse
    rsa_encryption = bytes.fromhex("300d06092a864886f70d0101010500")  # AlgorithmIdentifier, with NULL
    require(rsa_encryption in der[:19], "the key is not an RSA SubjectPublicKeyInfo")
    try:
        key = RSA.import_key(der)  # which refuses an n that is even, or a multiple of e
    except UNPARSABLE:
        raise ProtocolError("the RSA key cannot be parsed") from None
    require(key.size_in_bits() in RSA_BITS, f"the RSA key has {key.size_in_bits()} bits, not 2048 to 4096")
    require(key.e == RSA_EXPONENT, "the RSA key's public exponent is not 65537")
    require(key.export_key("DER") == der, "the RSA key is not in its canonical encoding")
    return key


def ssh_line(key: RsaKey) -> str:
    """Return the public half as OpenSSH writes it: "ssh-rsa AAAA..."."""
    return key.public_key().export_key("OpenSSH").decode()


def fingerprint(key: RsaKey) -> str:
    """Return what `ssh-keygen -lf` prints: "SHA256:" and 43 base64 characters."""
    blob = base64.b64decode(ssh_line(key).split()[1])
    return "SHA256:" + base64.b64encode(SHA256.new(blob).digest()).decode().rstrip("=")


# ------------------------------------------------------------------------------ frames and hellos


def frame(payload: bytes) -> bytes:
    """Return uint32 length || payload, big-endian."""
    return len(payload).to_bytes(4, "big") + payload


class FrameSocket:
    """Frames over a connected stream socket. Nothing is read ahead of the frame that is asked for.

    `deadline` (of time.monotonic) bounds whatever is done: at first, the handshake. Once it is None, a frame
    that has begun may not stall for 30 seconds. Whatever the network does ends in ConnectionCut.
    """

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.deadline: float | None = time.monotonic() + PATIENCE
        with contextlib.suppress(OSError):  # then whatever comes next tells why
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in TCP_OPTIONS.items():
            with contextlib.suppress(AttributeError, OSError):  # not every system has each
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, *payloads: bytes) -> None:
        """Send each payload as a frame, all in one write."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise ConnectionCut("this machine was too slow for the handshake; connect again")
        unsent = memoryview(b"".join(map(frame, payloads)))
        while unsent:
            unsent = unsent[self._bounded(PATIENCE, self.socket.send, unsent) :]

    def receive(self, limit: int) -> bytes:
        """Return the payload of the next frame, at most `limit` bytes long. Raises ProtocolError."""
        length = int.from_bytes(self._exactly(4), "big")
        too_long = f"a frame of {length} bytes, over the limit of {limit}: is this secure-chat?"
        require(length <= limit, too_long)
        return self._exactly(length, begun=True)

    def _exactly(self, count: int, begun: bool = False) -> bytes:
        received = bytearray(count)
        missing = memoryview(received)
        while missing:
            got = self._bounded(PATIENCE if begun else None, self.socket.recv_into, missing)
            if got == 0:
                where = "in the middle of a message" if begun else "without a goodbye"
                raise ConnectionCut(f"the connection ended {where}")
            missing, begun = missing[got:], True
        return bytes(received)

    def has_ended(self, seconds: float = 0.0) -> bool:
        """Whether the peer has hung up. Linux waits up to `seconds`, and sees it behind unread bytes."""
        if sys.platform == "linux":
            poll = select.poll()
            poll.register(self.socket, select.POLLRDHUP)
            return bool(poll.poll(1000 * seconds))
        with contextlib.suppress(OSError):  # here, this is called when something has come: else it would wait
            return self.socket.recv(1, socket.MSG_PEEK) == b""
        return True  # it was reset

    def hang_up(self, wait: float = 0.0) -> None:
        """Tell the peer that nothing follows, read on for `wait` seconds until it hangs up too, and close."""
        self.deadline = time.monotonic() + wait
        with contextlib.suppress(OSError, ConnectionCut):
            self.socket.shutdown(socket.SHUT_WR)
            while wait and self._bounded(None, self.socket.recv, 65536):
                pass  # to close with unread bytes would reset the connection, and destroy what is on its way
        self.socket.close()

    def _bounded(self, limit: float | None, act: Callable[..., Any], *arguments: Any) -> Any:
        """Do this with the socket, bounded by `limit` in seconds and by the deadline; translate errors."""
        if self.deadline is not None:
            limit = min(limit or math.inf, self.deadline - time.monotonic())
        try:
            if limit is not None and limit <= 0:
                raise socket.timeout
            self.socket.settimeout(limit)
            return act(*arguments)
        except socket.timeout:
            raise ConnectionCut("the other side did not answer in time") from None
        except OSError as error:
            raise ConnectionCut(f"the connection broke ({error.strerror or error})") from None


def encode_fields(*fields: bytes) -> bytes:
    """Return each field as uint16 length || bytes, big-endian, one after the other."""
    return b"".join(len(data).to_bytes(2, "big") + data for data in fields)


def decode_fields(data: bytes) -> list[bytes]:
    """Undo `encode_fields`. Raises ProtocolError if the last field is cut short."""
    fields = []
    while data:
        end = 2 + int.from_bytes(data[:2], "big")
        require(end <= len(data), "a field of the hello is cut short")
        fields.append(data[2:end])
        data = data[end:]
    return fields


class Hello(NamedTuple):
    """The first message of each side. Bob's carries the group; in Alice's, `group` is the one he sent."""

    sender: Role
    group: Group
    nonce: bytes  # 32 bytes
    public_value: bytes  # A or B, as many bytes as p
    rsa: bytes  # the public key, a DER SubjectPublicKeyInfo
    received: bytes = b""  # the payload as it came, if it did: so th covers each bit of it

    def encode(self) -> bytes:
        group = map(to_bytes, self.group) if self.sender is Role.BOB else ()
        return self.received or encode_fields(VERSION, self.nonce, *group, self.public_value, self.rsa)

    @classmethod
    def decode(cls, data: bytes, group: Group | None = None) -> Hello:
        """Undo `encode`: Bob's hello, or Alice's to his `group`. Checks no values. Raises ProtocolError."""
        fields = decode_fields(data)
        require(fields[:1] == [VERSION], "the other side does not speak secure-chat/1")
        require(len(fields) == (4 if group else 6), "the hello has too many or too few fields")
        _, nonce, *integers, public_value, rsa = fields
        require(len(nonce) == NONCE_BYTES, "the nonce is not 32 bytes long")
        require(all(len(n) <= GROUP_BITS[-1] // 8 for n in integers), "p or g is over 4096 bits long")
        require(all(n[:1] != b"\0" for n in integers), "p or g is not in its minimal encoding")
        sender = Role.ALICE if group else Role.BOB
        group = group or Group(*(int.from_bytes(n, "big") for n in integers))
        hello = cls(sender, group, nonce, public_value, rsa, data)
        hello.trace("came")
        return hello

    def trace(self, what: str) -> None:
        """Log it as a step of the calling function."""
        name, symbol = self.sender.value, self.sender.name[0]
        shown = {"version": VERSION, **(self.group._asdict() if self.sender is Role.BOB else {})}
        shown |= {f"nonce_{symbol}": self.nonce, symbol: self.public_value, f"RSA_{name}": self.rsa}
        log.info(f"hello_{name} {what}", extra={"values": shown}, stacklevel=2)


def commit(r: bytes) -> bytes:
    """Return nonce_B, 32 bytes. With it, Bob commits to r before he sees Alice's hello."""
    return SHA256.new(VERSION + b" commit " + r).digest()


def make_hello(role: Role, identity: RsaKey, group: Group) -> tuple[Hello, bytes, bytes]:
    """Return a hello for one session, the private exponent, and r, to which Bob's nonce commits (Alice: b"").

    The exponent has 256 bits for a 2048-bit group, over twice its strength. (0, which SP 800-56A, 5.6.1.1
    excludes, has a chance of 2^-256, and the peer would refuse g^0 = 1.)
    """
    exponent = secrets.token_bytes(len(to_bytes(group.p)) // 8)
    drawn = secrets.token_bytes(NONCE_BYTES)
    r, nonce = (drawn, commit(drawn)) if role is Role.BOB else (b"", drawn)
    rsa = identity.public_key().export_key("DER")
    hello = Hello(role, group, nonce, modexp(group.g, exponent, group.p), rsa)
    hello.trace(f"is made. Not shown: the exponent {role.value[0]}, {8 * len(exponent)} random bits")
    return hello, exponent, r


def settle(bob: Hello, alice: Hello) -> tuple[dict[Role, RsaKey], bytes]:
    """Check the keys and public values of both hellos, whose group has passed `check_group`.

    Return both keys, and th, the transcript hash: SHA-256 over both hello frames, 32 bytes. That a peer holds
    the private half of its key is shown only by the first record that opens. Raises ProtocolError.
    """
    keys: dict[Role, RsaKey] = {}
    for hello in (bob, alice):
        keys[hello.sender] = load_public_key(hello.rsa)
        require(len(hello.public_value) == len(to_bytes(bob.group.p)), "the public value is not as long as p")
        y = int.from_bytes(hello.public_value, "big")
        require(bob.group.contains(y), "the public value is not in the subgroup of order q")
    require(bob.rsa != alice.rsa, "both sides present the same key: a reflection")
    th = SHA256.new(frame(bob.encode()) + frame(alice.encode())).digest()
    trace("Both hellos are sound. th is SHA-256 over both frames", th=th)
    return keys, th


def shared_secret(exponent: bytes, theirs: Hello) -> bytes:
    """Return Z = g^ab, as long as p (SP 800-56A, 5.7.1.1). The other side's hello has passed `settle`."""
    z = modexp(int.from_bytes(theirs.public_value, "big"), exponent, theirs.group.p)
    power = f"{theirs.sender.name[0]}^{theirs.sender.peer.value[0]} mod p"
    trace(f"Z = {power}. SHA-256 over Z and th gives K and C. Not shown: whoever has Z can read everything")
    return z


def make_words(th: bytes, nonce_b: bytes, r: bytes) -> list[str]:
    """Return six words (RFC 1751) of th and the r in Bob's READY: the first three are his to read out.

    Raises ProtocolError unless his hello commits to r. So whoever is in between chose both hellos before: one
    try in each handshake, 2^-33 for his words, 2^-31 for hers, which hold two parity bits.
    """
    require(commit(r) == nonce_b, "Bob's r does not fit his nonce")
    return key_to_english(SHA256.new(VERSION + b" words " + th + r).digest()[:8]).lower().split()


# ------------------------------------------------------------ records: one object for each direction


class RecordType(enum.IntEnum):
    """What a record is for; the first byte of its plaintext."""

    READY = 0
    TEXT = 1
    CLOSE = 2


Use = Callable[[bytes], None]  # of a record: to send it, or to keep it


class Message(NamedTuple):
    """What a record says, once it has passed every check."""

    type: RecordType
    body: bytes
    in_reply_to: bytes
    text: str = ""  # the body of a TEXT
    crossed: bool = False  # of a CLOSE: its sender had not received our latest record yet


class Direction:
    """The records of one direction: who sends and signs them, their keys, and how far they have come.

    `number` is that of the next record; `latest` and `before` are the hashes that were signed of the last
    two. `closed` is set before any work on a record begins, and cleared when all of it has succeeded: no
    nonce is used twice, and nothing follows a failure or a CLOSE.
    """

    def __init__(self, sender: Role, signer: RsaKey, z: bytes, th: bytes) -> None:
        self.sender = sender
        self.signer = signer
        self._key, commitment = derive_keys(z, sender.label, th)
        self._context = VERSION + b" signature " + sender.label + th + commitment
        self.number = 0
        self.closed = False
        self.latest = self.before = NOTHING

    def has_the_turn(self, other: Direction) -> bool:
        """Whether READY or TEXT may come next: from Alice at equal numbers, from Bob if hers is one ahead."""
        return self.number - other.number == (0 if self.sender is Role.ALICE else -1)

    def _begin(self) -> bytes:
        """Close the direction until a record has succeeded; return its nonce (SP 800-38D, 8.2.1)."""
        if self.closed:
            raise ValueError("this direction is closed")
        self.closed = True
        return self.number.to_bytes(GCM_NONCE, "big")

    def _hash(self, encrypted: bytes) -> SHA256.SHA256Hash:
        """Hash what is signed: label, direction, th and C, then nonce || ciphertext || tag."""
        return SHA256.new(self._context + encrypted)

    def _count(self, signed: bytes) -> None:
        """Count a record: one that passed every check, or one of our own from when its sending begins."""
        self.latest, self.before = signed, self.latest
        self.number += 1

    def _trace(self, kind: RecordType, what: str, **values: bytes) -> None:
        if kind is RecordType.READY and self.sender is Role.BOB and values.pop("plaintext", b""):
            what += ". Not shown here: r, of which the words are made"
        step = f"Record {self.number}, {self.sender.label.decode()}, {kind.name}: {what}"
        log.info(step, extra={"values": values}, stacklevel=2)


class Sealer(Direction):
    """Makes records: nonce[12] || ciphertext || tag[16] || signature. `signer` is a private key."""

    def seal(self, kind: RecordType, body: bytes, other: Direction, send: Use = lambda _: None) -> bytes:
        """Make the next record, in reply to the latest of the `other` direction, and `send` it.

        The direction stays closed if `send` fails or is interrupted: part of the record may be on its way.
        Raises ValueError out of turn, in a direction that is closed, and for a CLOSE that would name nothing.
        """
        closing = kind is RecordType.CLOSE
        allowed = other.latest != NOTHING if closing else self.has_the_turn(other)
        if not allowed:
            raise ValueError("it is the other side's turn")
        nonce = self._begin()
        plaintext = pad(bytes([kind]) + other.latest + body, PADDING, style="iso7816")
        ciphertext, tag = encrypt(self._key, nonce, plaintext)
        self._trace(kind, "is encrypted", plaintext=plaintext, nonce=nonce, ciphertext=ciphertext, tag=tag)
        encrypted = nonce + ciphertext + tag
        signed = self._hash(encrypted)
        signature = sign(self.signer, signed)
        self._trace(kind, "is signed, and sent", hash=signed.digest(), signature=signature)
        self._count(signed.digest())
        send(encrypted + signature)
        self.closed = closing
        return encrypted + signature


class Opener(Direction):
    """Opens records: verifies, then decrypts, then looks inside. `signer` is the sender's public key."""

    def open(self, record: bytes, other: Direction, keep: Use = lambda _: None) -> Message:
        """Return what the next record says in reply to the `other` direction, and `keep` the record.

        Only a CLOSE may come out of turn. One that comes in turn may have crossed our latest record on the
        way: then it replies to the one before. Raises ProtocolError, and the direction stays closed.
        """
        nonce = self._begin()
        split = len(record) - self.signer.size_in_bytes()
        padded = split - GCM_NONCE - GCM_TAG
        require(padded >= PADDING and padded % PADDING == 0, "the record has an impossible length")
        encrypted, signature = record[:split], record[split:]
        ciphertext, tag = encrypted[GCM_NONCE:-GCM_TAG], encrypted[-GCM_TAG:]
        number = int.from_bytes(record[:GCM_NONCE], "big")
        expected = f"record {self.number} should be: replayed, dropped or reordered"
        require(number == self.number, f"record {number} where {expected}")
        signed = self._hash(encrypted)
        require(verify(self.signer, signed, signature), "the record's signature is not valid")
        try:
            plaintext = decrypt(self._key, nonce, ciphertext, tag)
        except ValueError:
            raise ProtocolError("the record's authentication tag is not valid") from None
        message = self._parse(plaintext)
        closing, in_turn = message.type is RecordType.CLOSE, self.has_the_turn(other)
        require(closing or in_turn, "the other side spoke out of turn")
        may_name = {other.latest, other.before} - {NOTHING} if closing and in_turn else {other.latest}
        require(message.in_reply_to in may_name, "the record replies to another record than the last one")
        what = "came. Its number is the next one, and the signature of this hash is valid"
        self._trace(message.type, what, nonce=nonce, hash=signed.digest(), signature=signature)
        what = "is decrypted: its tag is valid, and so are padding, type, text, turn and in_reply_to"
        self._trace(message.type, what, ciphertext=ciphertext, tag=tag, plaintext=plaintext)
        keep(record)
        self._count(signed.digest())
        self.closed = closing
        return message._replace(crossed=message.in_reply_to != other.latest)

    def _parse(self, plaintext: bytes) -> Message:
        """Take a plaintext apart: type[1] || in_reply_to[32] || body || padding. Raises ProtocolError."""
        try:
            content = unpad(plaintext, PADDING, style="iso7816")
        except ValueError:
            raise ProtocolError("the record's padding is not valid") from None
        require(len(content) >= 33, "the record is too short")
        require(content[0] in list(RecordType), "the record is of no known type")
        kind, body, is_bob = RecordType(content[0]), content[33:], self.sender is Role.BOB
        busy = kind is RecordType.CLOSE and is_bob  # Bob may say it in the place of READY
        require((kind is RecordType.READY) == (self.number == 0) or busy, "READY is record 0, and no other")
        lengths = {RecordType.READY: [NONCE_BYTES if is_bob else 0], RecordType.TEXT: range(TEXT_LIMIT + 1)}
        require(len(body) in lengths.get(kind, [0]), "the record's body has a wrong length")
        try:
            text = body.decode() if kind is RecordType.TEXT else ""
        except UnicodeDecodeError:
            raise ProtocolError("the record's text is not valid UTF-8") from None
        return Message(kind, body, content[1:33], text)


# ------------------------------------------------------------------------------------------ channel


@dataclass(repr=False)
class Channel:
    """An authenticated conversation: Alice sends, Bob replies, and so on, until somebody leaves."""

    frames: FrameSocket
    sealer: Sealer
    opener: Opener
    trust: Trust  # what is known of the peer's key
    words: list[str]
    transcript: Transcript
    over: bool = False  # with a goodbye, so both sides know it

    def __post_init__(self) -> None:
        self.frames.deadline = None  # the handshake is over
        bobs, alices = self.words[:3], self.words[3:]
        is_bob = self.sealer.sender is Role.BOB
        self.own_words, self.other_words = (bobs, alices) if is_bob else (alices, bobs)

    @property
    def my_turn(self) -> bool:
        """Whether the next TEXT is ours."""
        return self.sealer.has_the_turn(self.opener)

    @property
    def texts(self) -> int:
        """How many TEXTs have been sent and received. Read it before `close`, which counts as one more."""
        return self.sealer.number + self.opener.number - 2 - self.opener.closed  # both READY, a goodbye

    @property
    def has_something(self) -> bool:
        """Whether there is something to receive, or the connection has ended."""
        return bool(select.select([self.frames.socket], [], [], 0)[0])

    def send(self, text: str) -> None:
        """Send a text of at most 1 MiB in UTF-8. Raises MessageError if it cannot be sent as it is."""
        try:
            body = text.encode()
        except UnicodeEncodeError:
            raise MessageError("the text is not valid Unicode") from None
        if len(body) > TEXT_LIMIT:
            raise MessageError(f"the text is longer than {TEXT_LIMIT} bytes")
        if self.sealer.closed:
            raise ConnectionCut("the connection broke while the last message was sent")
        self.sealer.seal(RecordType.TEXT, body, self.opener, self._send)

    def receive(self) -> Message:
        """Return the peer's next TEXT, or its CLOSE, which may come at any time and ends the conversation."""
        record = self.frames.receive(RECORD_LIMIT)
        keep = functools.partial(self.transcript.add, self.opener.sender.tag)
        message = self.opener.open(record, self.sealer, keep)
        if message.type is RecordType.CLOSE:
            self.sealer.closed = self.over = True
        return message

    def close(self, wait: float = GOODBYE_SECONDS) -> bool:
        """Say goodbye if possible, and hang up, within 2 * `wait` seconds; return whether both know of it."""
        self.frames.deadline = time.monotonic() + wait
        with contextlib.suppress(ConnectionCut, ProtocolError):
            while not self.opener.closed and self.has_something and self.frames.has_ended():
                self.receive()  # up to a goodbye, or to where the line was cut: nobody would read ours
            if not self.sealer.closed:
                goodbye = self.sealer.seal(RecordType.CLOSE, b"", self.opener)
                with contextlib.suppress(FileError):  # a full disk is no reason to leave without a word
                    self.transcript.add(self.sealer.sender.tag, goodbye)
                self.frames.send(goodbye)
                self.over = True
        self.frames.hang_up(wait)
        return self.over

    def _send(self, record: bytes) -> None:
        self.transcript.add(self.sealer.sender.tag, record)
        self.frames.send(record)


# ---------------------------------------------------------------------------------------- evidence


class Transcript:
    """Proves who said what in one conversation: its frames, and Z to open them with.

    An entry is a frame. Its payload begins with a tag: Bob's hello (`b`), Alice's (`a`), Z (`z`), a record of
    his (`B`) or of hers (`A`). Every signature covers C, and C commits to the key that Z makes, so nobody can
    claim another text for a record. All is in memory until the conversation begins; without a folder, nothing
    is kept at all. Whatever cannot be written raises FileError.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._file: io.BytesIO | io.FileIO = io.BytesIO()
        self.path: Path | None = None  # once there is a file

    def add(self, tag: bytes, payload: bytes) -> None:
        """Add an entry; to the file, at once: a crash loses at most the one in flight."""
        if self._folder:
            self._write(frame(tag + payload))

    def begin(self, role: Role) -> None:
        """Make a new file (mode 0600), named after the time and the role."""
        if not self._folder:
            return
        self._file.seek(0)
        held = self._file.read()
        name = time.strftime("%Y-%m-%dT%H-%M-%SZ-", time.gmtime()) + role.value
        for suffix in itertools.count(1):
            path = self._folder / (f"{name}.transcript" if suffix == 1 else f"{name}-{suffix}.transcript")
            with disk("write", path), contextlib.suppress(FileExistsError):
                self._file, self.path = io.FileIO(path, "x", opener=_open_private), path  # without a buffer
                break
        self._write(held)

    def _write(self, data: bytes) -> None:
        with disk("write", self.path):
            whole = self._file.tell()
            try:
                while data:
                    data = data[self._file.write(data) :]
            except BaseException:
                self._file.seek(self._file.truncate(whole))  # no file ends inside an entry
                raise


BEGINNING = "a transcript begins with both hellos, Z and both READY"


def verify_transcript(file: BinaryIO) -> Iterator[tuple[Opener, Message]]:
    """Yield what a transcript proves, trusting nobody: who signed (`sender`, `signer`), and what.

    Holds one entry at a time. Raises ProtocolError at the first that is not right.
    """
    entries = _entries(file)
    hello_bob, hello_alice, z = (next(entries)[1] for _ in range(3))
    bob = Hello.decode(hello_bob)
    check_group(bob.group)
    keys, th = settle(bob, Hello.decode(hello_alice, bob.group))
    require(len(z) == len(to_bytes(bob.group.p)), "Z is not as long as p")
    trace("Z = g^ab, the shared secret, as the file has it", Z=z)
    for role in Role:
        key, commitment = derive_keys(z, role.label, th)
        trace(f"The key K, and C, of {role.label.decode()}: SHA-256 over Z and th", K=key, C=commitment)
    openers = {role: Opener(role, keys[role], z, th) for role in Role}
    for number, (tag, record) in enumerate(entries):
        sender = Role.BOB if tag == Role.BOB.tag else Role.ALICE
        message = openers[sender].open(record, openers[sender.peer])
        require(message.type is RecordType.READY or number > 1, BEGINNING)
        if message.type is RecordType.READY and sender is Role.BOB:
            words = " ".join(make_words(th, bob.nonce, message.body))
            trace(f"The words, of th and r: {words}", r=message.body)
        yield openers[sender], message
        if message.type is RecordType.CLOSE:
            require(not file.read(1), "something follows the goodbye")
            return


def _entries(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Yield the tag of each entry, which must be one that may stand there, and what it marks."""
    first = [(b"b", HELLO_LIMIT), (b"a", HELLO_LIMIT), (b"z", GROUP_BITS[-1] // 8)]
    first += [(b"A", READY_LIMIT), (b"B", READY_LIMIT)]
    cut = "the transcript ends in the middle of an entry"
    for number in itertools.count():
        header = file.read(5)
        tag, limit = header[4:], RECORD_LIMIT
        if number < len(first):
            expected, limit = first[number]
            require(tag == expected, BEGINNING if number else "this is no transcript of secure-chat")
        elif not header:
            return
        else:
            require(len(header) == 5 or header == bytes(4), cut)  # four zeros: an empty frame, with no tag
            require(tag in (b"A", b"B"), "an entry is of no known kind, or not where it belongs")
        length = int.from_bytes(header[:4], "big") - 1  # without the tag
        require(length <= limit, f"an entry of {length} bytes, over the limit of {limit}")
        payload = file.read(max(length, 0))
        require(len(payload) == length, cut)
        yield tag, payload


# ------------------------------------------------------------------------------------- keys on disk

SLICE = 0.05  # seconds between two tries, where Windows does not let us wait
ELSEWHERE = "name a folder on another disk with --home"


@dataclass
class KeyStore:
    """One person's own folder. Every method may raise FileError, which says what to do."""

    folder: Path
    IDENTITY, GROUP, KNOWN_PEERS = "identity.pem", "dh_parameters.pem", "known_peers"

    def load_identity(self, ask_passphrase: Callable[[str], str]) -> RsaKey | None:
        """Return the private RSA key, or None if there is none. A passphrase may be typed three times."""
        path, data = self.folder / self.IDENTITY, self.read(self.IDENTITY, forbidden=0o077)
        if data is None:
            return None
        # What stands around the key is passed over (RFC 7468, section 2).
        pem = re.search(rb"-----BEGIN ([A-Z ]*PRIVATE KEY)-----\s[\s!-~]+?-----END \1-----", data) or [b""]
        passphrase = None
        for question in ("", "That was not it. ", "That was not it. ", None):
            try:
                key = RSA.import_key(pem[0], passphrase)
                if key.has_private() and key.size_in_bits() in RSA_BITS and key.e == RSA_EXPONENT:
                    return key
                break
            except (PassphraseRequiredError, IncorrectPassphraseError):
                if question is None:
                    raise FileError(f"that is not the passphrase of {path}") from None
                passphrase = os.fsencode(ask_passphrase(f"{question}Passphrase of {path}: "))
            except UNPARSABLE:
                break
        raise FileError(
            f"{path} is not supported: no RSA key of two primes, 2048 to 4096 bits and exponent 65537, in a "
            "form and cipher that can be read, or not whole. Keep a copy. (Without this file, the next start "
            "makes a new key.) These convert keys, the first one those of PuTTY:\n"
            "  puttygen KEY.ppk -O private-openssh -o identity.pem\n"
            f"  ssh-keygen -p -m PKCS8 -f {quoted(path)}"
        )

    def make_identity(self) -> RsaKey:
        """Make an RSA key of 3072 bits and keep it; return it, or the one another program just made."""
        key = RSA.generate(NEW_RSA_BITS, e=RSA_EXPONENT)
        pem = key.export_key("PEM", pkcs=8) + b"\n"
        self.write(self.IDENTITY, lambda: None if self.load_identity(lambda _: "") else pem)
        return self.load_identity(lambda _: "") or key

    def load_group(self) -> Group | None:
        """Return the group that is kept here, if any; what `openssl dhparam` made is tested, and kept."""
        pem = self.read(self.GROUP)
        if pem is None:
            return None
        try:
            group = Group.load(pem)
            if pem != group.export():
                return self.accept_group(group._replace(g=4))  # g may be no square; 4 is one, whatever p is
            check_group(group, rounds=0)
        except (ValueError, ProtocolError) as error:
            reason = f"holds no usable Diffie-Hellman parameters ({error}); move it away"
            raise FileError(f"{self.folder / self.GROUP} {reason}") from None
        return group

    def accept_group(self, group: Group) -> Group:
        """Check a group that is not the one kept, and keep it if it passes. Else raises ProtocolError."""
        if self.read(self.GROUP) != group.export():
            check_group(group)
            with contextlib.suppress(FileError):  # then it is tested again the next time
                self.write(self.GROUP, group.export)
        return group

    def read(self, name: str, forbidden: int = 0o022) -> bytes | None:
        """Return a file's bytes, or None. No others may have `forbidden` rights to it (default: to write)."""
        path, missing = self.folder / name, contextlib.suppress(FileNotFoundError)
        with disk("read", path, "move it away, or name another --home"), missing:
            _check_owner(self.folder, self.folder.stat(), 0o022)
            with open_regular(path) as file:
                info = os.fstat(file.fileno())
                _check_owner(path, info, forbidden)
                if info.st_size > FILE_LIMIT:
                    raise FileError(f"{path} is larger than {FILE_LIMIT} bytes; move it away")
                return file.read(FILE_LIMIT)
        return None

    def write(self, name: str, make: Callable[[], bytes | None]) -> None:
        """Replace a file (mode 0600), whole or not at all, by what `make` returns, unless that is None.

        From before `make` looks at the old one, every other program that uses this folder is kept out.
        """
        path, temporary = self.folder / name, self.folder / f".{name}.new"
        with disk("make", self.folder, ELSEWHERE):
            self.folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700, exist_ok=True)
        with disk("write", path, ELSEWHERE), open(self.folder / ".lock", "ab", opener=_open_private) as lock:
            if sys.platform == "win32":
                _insist(lambda: msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1))
            else:
                fcntl.flock(lock, fcntl.LOCK_EX)
            data = make()
            if data is None:
                return
            temporary.unlink(missing_ok=True)  # left by a program that was killed here
            try:
                with open(temporary, "xb", opener=_open_private) as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                _insist(lambda: temporary.replace(path))
            finally:
                temporary.unlink(missing_ok=True)


def _insist(act: Callable[[], Any]) -> Any:
    """Try again for 3 s on Windows, which refuses where others wait: a lock, a file that is in use."""
    for _ in range(60 if sys.platform == "win32" else 0):
        try:
            return act()
        except (FileNotFoundError, FileExistsError):
            raise
        except OSError:  # it need not be a PermissionError
            time.sleep(SLICE)
    return act()


def _open_private(path: str, flags: int) -> int:
    """For `open`: follow no symbolic link, wait for no pipe; a new file is for its owner alone (0600)."""
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    return int(_insist(lambda: os.open(path, flags, 0o600)))


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file to read, not through a link. Raises OSError, and FileError."""
    with open(path, "rb", opener=_open_private) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise FileError(f"{path} is not a regular file; move it away, or name another one")
        yield file


@contextlib.contextmanager
def disk(what: str, path: Path | None, way_out: str = "") -> Iterator[None]:
    """Turn an error of the disk into a FileError that names the file, and a way out."""
    try:
        yield
    except OSError as error:
        reason = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror or str(error)
        raise FileError(f"cannot {what} {path}: {reason}" + (f"; {way_out}" if way_out else "")) from None


def quoted(path: Path) -> str:
    """Return a path as a shell takes it."""
    return f'"{path}"' if sys.platform == "win32" else shlex.quote(str(path))


def _check_owner(path: Path, info: os.stat_result, forbidden: int) -> None:
    """Raise FileError where a file or folder is another user's, or others have `forbidden` rights to it."""
    if sys.platform != "win32" and (info.st_uid != os.geteuid() or info.st_mode & forbidden):
        rights = f"owner {info.st_uid}, mode {stat.S_IMODE(info.st_mode):04o}"
        told = f"{path} must be yours alone, and is not ({rights}); run:\n  chmod go-rwx {quoted(path)}"
        raise FileError(f"{told}\nIf that does not help (some disks keep no permissions), {ELSEWHERE}.")


class Trust(NamedTuple):
    """What is known of a key that was presented, when it is not refused."""

    known: bool  # it is pinned under this name
    settled: bool  # it is the one of --peer, or, without --peer, it is known: nobody need be asked
    also: tuple[str, ...] = ()  # other names under which this key is pinned


class Pin(NamedTuple):
    """A line of known_peers, and where it stands. A comment, or a blank line, pins nothing."""

    line: bytes
    where: str
    name: str = ""
    fingerprint: str = ""


@dataclass
class PinnedPeer:
    """Whether a peer's key is to be trusted: trust on first use, in the manner of OpenSSH's known_hosts.

    A line is: name, "ssh-rsa", base64. A name may have several. It is "alice" in Bob's file, "[host]:port" in
    Alice's, in upper or lower case. With `only`, the one key with that fingerprint is accepted, and takes the
    place of what was pinned. A new key is refused unless the program `can_ask` a person.
    """

    store: KeyStore
    name: str  # in lower case
    only: str | None = None
    can_ask: bool = True

    def check(self, key: RsaKey) -> Trust:
        """Return what is known of a key, before anything is signed. Raises TrustError for a wrong key."""
        presented, pins = fingerprint(key), self.pins()
        pinned = tuple((pin.fingerprint, pin.where) for pin in pins if pin.name == self.name)
        also = tuple(pin.name for pin in pins if pin.fingerprint == presented and pin.name != self.name)
        which, expected = "pinned one", pinned
        if self.only is not None:
            which, expected = "one asked for", ((self.only, "asked for"),)
        settled = presented in dict(expected)
        if expected and not settled:
            elsewhere = f", but the one you know as {', '.join(also)}" if also else ""
            raise TrustError(f"the key of {self.name} is not the {which}{elsewhere}", presented, expected)
        if not (settled or self.can_ask):
            raise TrustError(f"the key of {self.name} is new, and there is no terminal to ask at", presented)
        return Trust(presented in dict(pinned), settled, also)

    def pin(self, key: RsaKey) -> None:
        """Remember a key that its owner holds and a person accepted. It is checked again, under the lock."""

        def with_the_pin() -> bytes | None:
            if self.check(key).known:
                return None
            # With another pin of that name, only --peer comes here, and takes its place.
            lines = [pin.line.rstrip(b"\n") for pin in self.pins() if pin.name != self.name]
            return b"\n".join([*lines, f"{self.name} {ssh_line(key)}\n".encode()])

        self.store.write(KeyStore.KNOWN_PEERS, with_the_pin)

    def pins(self) -> list[Pin]:
        """Return every line of known_peers. One that is not understood is refused, not passed over."""
        form, pattern = "[HOST]:PORT", r"\[[^][,*?\s\ufffd]+\]:(0|[1-9][0-9]{0,4})"
        if self.name == "alice":
            form = pattern = "alice"
        pins = []
        for number, line in enumerate(io.BytesIO(self.store.read(KeyStore.KNOWN_PEERS) or b""), 1):
            where = f"{self.store.folder / KeyStore.KNOWN_PEERS}, line {number}"
            name, *words = line.decode("utf-8-sig", "replace").split()[:3] or ["#"]  # blank: as a comment
            if name.startswith("#"):
                pins.append(Pin(line, where))
                continue
            try:
                key = RSA.import_key(" ".join(words))
                if not re.fullmatch(pattern, name.lower()) or ssh_line(key) != " ".join(words):
                    raise ValueError
            except UNPARSABLE:
                raise FileError(f"{where}: not {form} ssh-rsa BASE64; mend or delete the line") from None
            pins.append(Pin(line, where, name.lower(), fingerprint(key)))
        return pins


# ==================================================================================================
# Above this line, bytes go in and bytes come out. Below it is a person at a terminal, for both programs.
# ==================================================================================================

# ------------------------------------------------------------------------------ text for a screen

# Unicode's classes Cc but for the tab, Cf, Cs, Zl, Zp, and the unassigned that are ignored by default.
_UNSAFE = (
    r"\0-\x08\x0a-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff"
    r"\ufff0-\ufffb\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e00ff"
    r"\U000e01f0-\U000e0fff"
)
# What may stand all the same: a joiner beside a letter that is not ASCII, as in emoji and in the words of
# many scripts, and the tags of a flag. (Arabic number signs, of class Cf too, are visible.)
_LETTER = rf"[^\0-\x7f{_UNSAFE}]"
_JOINER = rf"(?<={_LETTER})[\u200c\u200d]|[\u200c\u200d](?={_LETTER})"
_FLAG = r"(?<=\U0001f3f4)[\U000e0030-\U000e0039\U000e0061-\U000e007a]{1,6}\U000e007f"
_ESCAPE = f"(?P<harmless>{_JOINER}|{_FLAG})|[{_UNSAFE}]+"  # compiled when it is first needed


def printable(text: str) -> str:
    """Return text that cannot drive a terminal: controls, bidi and other format characters are escaped."""
    if text.isprintable():
        return text
    return re.sub(_ESCAPE, lambda m: m[0] if m["harmless"] else m[0].encode("unicode_escape").decode(), text)


# Two characters that no row parts: of one emoji (joined, or with a colour or a skin's), or of a flag.
_ONE = "\u200d[^\0-\x7f]|.[\ufe0f\U0001f3fb-\U0001f3ff]|[\U0001f1e6-\U0001f1ff]{2}"
# Two columns in Unicode 16, the C library or (a flag's letter alone) some terminals, though not in Python.
_WIDE = "[\u2630-\u2637\u268a-\u268f\u3248-\u324f\u4dc0-\u4dff\U0001d300-\U0001d376\U0001f1e6-\U0001f1ff]"


@functools.lru_cache(maxsize=4096)
def _width(character: str) -> int:
    """Return how many columns a character takes at the most."""
    if character == "\t":
        return 8
    category, wide = unicodedata.category(character), unicodedata.east_asian_width(character)
    joins = character in "\u200c\u200d" or "\U000e0000" <= character <= "\U000e007f"
    if category in ("Mn", "Me") or joins:  # but U+FE0F makes an emoji of what it follows
        return int(character == "\ufe0f")
    ambiguous = wide == "A" and locale.setlocale(locale.LC_CTYPE)[:2] in ("zh", "ja", "ko")
    return 2 if wide in ("W", "F") or category == "Cn" or ambiguous or re.match(_WIDE, character) else 1


def screen_lines(text: str, columns: int | None = None) -> list[str]:
    """Return the printable lines of a text; given `columns`, in rows that end after a space if they can."""
    lines = [printable(line) for line in text.split("\n")]
    if columns is None:
        return lines
    rows, one = [], re.compile(_ONE)
    for line in lines:
        at, plain = 0, line.isascii()
        line = line.expandtabs() if plain else line
        # How many columns each character has before it.
        taken = range(len(line) + 1) if plain else [0, *itertools.accumulate(map(_width, line))]
        while at < len(line) - 1 and taken[-1] - taken[at] > columns:
            fits = at + columns if plain else bisect.bisect(taken, taken[at] + columns, at) - 1
            full = end = max(fits, at + 1)
            # No row ends inside a letter, an emoji or a flag that fits in it.
            while end > at and (taken[end] == taken[end + 1] or one.match(line, end - 1, end + 1)):
                end -= 1
            end = line.rfind(" ", at, end) + 1 or (end if end > at else full)
            rows.append(line[at:end].expandtabs())
            at = end
        rows.append(line[at:].expandtabs())
    return rows


def is_terminal(stream: TextIO) -> bool:
    """Whether this is a terminal. (Of Windows' NUL, isatty() is true.)"""
    raw = getattr(stream.buffer, "raw", stream.buffer)  # of `python -u`, there is no buffer
    return stream.isatty() and (sys.platform != "win32" or type(raw).__name__ == "_WindowsConsoleIO")


def columns(stream: TextIO) -> int | None:
    """Return the width of a terminal, None of anything else."""
    with contextlib.suppress(OSError):
        return os.get_terminal_size(stream.fileno()).columns or 80
    return None


if sys.platform == "win32":

    def can_be_read(source: TextIO | socket.socket) -> bool:
        """What `select` tells elsewhere; here it knows sockets alone."""
        if isinstance(source, socket.socket):
            return bool(select.select([source], [], [], 0)[0])
        if is_terminal(sys.stdin):
            return msvcrt.kbhit()
        try:
            return bool(_winapi.PeekNamedPipe(msvcrt.get_osfhandle(sys.stdin.fileno()), 0)[0])
        except OSError:  # a file, or the end
            return True


# -------------------------------------------------------------------------------------- console

# Another module of that name (of PyPy, or for Windows) is not taken for readline.
HAS_READLINE, PASTE_ON, PASTE_OFF = False, "", ""
CAN_DRAW = os.environ.get("TERM", "dumb") != "dumb"
if sys.platform != "win32" and sys.implementation.name == "cpython":
    with contextlib.suppress(ImportError, locale.Error):
        if locale.setlocale(locale.LC_CTYPE) in ("C", "POSIX"):  # also if the one asked for is not installed
            os.environ["LC_ALL"] = "C.UTF-8"  # or readline edits bytes, not letters
            locale.setlocale(locale.LC_CTYPE, "")
        import readline

        HAS_READLINE = True
        readline.parse_and_bind("set disable-completion on")
        # Lines that are pasted together are one message, also if the paste is what the prompt waits for.
        if CAN_DRAW and "libedit" not in (readline.__doc__ or ""):
            readline.parse_and_bind("set enable-bracketed-paste on")
            PASTE_ON, PASTE_OFF = "\x1b[?2004h", "\x1b[?2004l"
QUIET = 0.3  # seconds without a key, after which what was typed ahead is over
TERMINAL_LINE = 4095  # bytes that a terminal without readline hands over at most: the rest may be lost
QUEUE_LIMIT = 100  # lines of other threads that wait for the screen
HELP = """\
Type a line and press Enter to send it, when it is your turn.
  /words   show your three words
  /help    show this
  /quit    leave and end this program
Ctrl-C leaves at any moment. To send a line that begins with /, put a space before it."""


class UsageError(ChatError):  # the command line asks for what cannot be
    told, status = "Usage", 2


class NoConversation(ChatError):  # Bob is busy, or the other side left while its key was asked about
    told = "No conversation"


class PersonLeft(ChatError):  # this side's user ended the conversation
    told, status = "You left", 0


class Console:
    """What one person sees and types. Only the main thread uses it, except for `notice` and the queue."""

    def __init__(self, role: Role) -> None:
        self.me, self.peer = role.value.title(), role.peer.value.title()
        self.screen = sys.stdout if is_terminal(sys.stdout) else sys.stderr  # where the prompt is
        self.has_prompt = is_terminal(sys.stdin) and is_terminal(self.screen)
        self.can_ask = is_terminal(sys.stdin) and is_terminal(sys.stderr)
        self.queue: queue.SimpleQueue[str | Channel] = queue.SimpleQueue()  # from other threads
        self._edits = self.screen is sys.stdout and (HAS_READLINE or os.name == "nt")  # input() edits lines
        self._editing = False  # it does so now
        self._row = ""  # a prompt, or progress, that stands in the last row of the screen
        self.typed = bytearray()  # read from a pipe, and not used yet
        self.lost_a_line = False  # whether one from a pipe could not be sent: then the exit status is not 0
        self.leaving = False
        self._holds_signals = False
        self._quiet = False  # whether the terminal hands over single keys, and shows none
        if sys.platform != "win32":
            self._flags = termios.tcgetattr(sys.stdin)[3] if is_terminal(sys.stdin) else None  # as found

    def write(self, text: str, stream: TextIO) -> None:
        """Write in one go, in the place of a prompt or of progress. Raises OSError."""
        self.show_row("")
        stream.write(text)
        stream.flush()

    def show_row(self, text: str) -> None:
        """Show a row that whatever is written next takes the place of, on a terminal only."""
        row = text[: (columns(self.screen) or 1) - 1]
        if row != self._row:
            self.screen.write(f"\r{' ' * len(self._row)}\r")
            self.screen.flush()
            self._row = row  # before it can be seen: so it is erased
            self.screen.write(row)
            self.screen.flush()

    def notice(self, text: str) -> None:
        """Tell the person something, broken at words; indented lines stay whole. Raises OSError."""
        if threading.current_thread() is not threading.main_thread():
            if self.queue.qsize() < QUEUE_LIMIT:
                self.queue.put(text)
            return
        width = max(columns(sys.stderr) or sys.maxsize, 20)
        fill = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False).fill
        rows = [line if line.startswith("  ") else fill(line) for line in map(printable, text.split("\n"))]
        self.write("\n".join(rows) + "\n", sys.stderr)

    def show(self, name: str, text: str) -> None:
        """Show a message of the peer's. At a terminal, a check mark says that it was verified."""
        mark, form, width = f"{name}: ", "{}", columns(sys.stdout)
        if width:
            mark = f"{name} \N{CHECK MARK} " if "utf" in sys.stdout.encoding.lower() else f"{name} + "
            form = "\x1b[32m{}\x1b[0m" if CAN_DRAW and "NO_COLOR" not in os.environ else "{}"
        elif stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode) and is_terminal(sys.stdin):
            width = columns(sys.stderr) or columns(sys.stdin)  # as with `| tee`
        text = text.encode(sys.stdout.encoding, "backslashreplace").decode(sys.stdout.encoding)  # as printed
        rows = screen_lines(text, width and max(width - len(mark), 2))
        bar = f"\n{'|':>{len(mark) - 1}} "  # no row passes for one of the program's
        self.write(form.format(mark) + bar.join(rows) + "\n", sys.stdout)

    def prompt(self, question: str, *connections: socket.socket) -> str | None:
        """Return the line that a person types, or None as soon as a connection has something first.

        The first key is waited for, and left unread for input(), which does all the editing. (Without
        readline, it would be lost: then input() alone waits, and no connection is watched.) The end of the
        input is a KeyboardInterrupt.
        """
        self.set_quiet(self._edits)
        self.show_row(question)
        if self._edits:
            try:
                self.screen.write(PASTE_ON)
                self.screen.flush()
                ready = self._wait(sys.stdin, *connections)
            finally:
                self.write(PASTE_OFF, self.screen)
            if sys.stdin not in ready:
                return None
            self._row, self._editing = question, True
        self.set_quiet(False)
        try:
            line = input(question) if self._edits else sys.stdin.readline()
            if not (line or self._edits):
                raise EOFError
        except (EOFError, SystemError):  # this one if a second handler runs in input() after one has raised
            self.screen.write("\n")  # keep what stands in this row
            raise KeyboardInterrupt from None
        finally:
            self._editing, self._row = False, ""
            self.set_quiet(True)
        return line.rstrip("\n")  # a paste may end with one, too

    def next_line(self, channel: Channel) -> str | None:
        """Return what the person says, in their own turn, or None if the connection has something first."""
        if not self.has_prompt:
            return self._line_from_pipe(channel)
        while True:
            self.drop_typed()  # it was no answer to what the screen shows now
            line = self.prompt(f"{self.me}: ", channel.frames.socket)
            if not self._edits and len(os.fsencode(line or "")) >= TERMINAL_LINE:
                raise MessageError("the line is too long for this terminal; its end may be lost. Use a pipe")
            if line is None or not line.startswith("/"):
                return line
            command = line.strip().lower()
            if command == "/quit":
                raise KeyboardInterrupt
            told = f"Not sent: {command} is no command; /help lists them. To send it, put a space before it."
            known = {"/help": HELP, "/words": f"Your words: {' '.join(channel.own_words)}"}
            self.notice(known.get(command, told))

    def wait_for_peer(self, connection: socket.socket) -> None:
        """Wait, in the other side's turn, until the connection has something. What is typed is not kept."""
        keys = [sys.stdin] if self.has_prompt else []
        self.set_quiet(self.has_prompt)
        self.show_row(f"({self.peer}'s turn; Ctrl-C leaves)")
        while connection not in self._wait(connection, *keys):
            self.drop_typed(0.0)
            self.show_row(f"(It is {self.peer}'s turn; this is not kept)")
        self.show_row("")

    def drop_typed(self, quiet: float = QUIET) -> None:
        """Drop what was typed until now, and until no key has come for `quiet` seconds."""
        self.set_quiet(True)
        while self._wait(sys.stdin, seconds=quiet):
            if sys.platform == "win32":
                msvcrt.getwch()
            elif not os.read(sys.stdin.fileno(), 65536):
                raise KeyboardInterrupt

    def set_quiet(self, quiet: bool) -> None:
        """Let the terminal hand over single keys and show none, or put it back as it was found."""
        if sys.platform != "win32" and self._flags is not None and quiet != self._quiet:
            self._quiet = True  # until it is done: a second signal puts the terminal back
            with contextlib.suppress(termios.error):  # the terminal is gone
                mode = termios.tcgetattr(sys.stdin)
                mode[3] = self._flags & ~(termios.ICANON | termios.ECHO) if quiet else self._flags
                termios.tcsetattr(sys.stdin, termios.TCSANOW, mode)
        self._quiet = quiet

    def _wait(self, *sources: TextIO | socket.socket, seconds: float | None = None) -> list[Any]:
        """Return which of these can be read, as soon as there is one, or after so many seconds."""
        if self.leaving:  # a signal whose exception was lost
            raise KeyboardInterrupt
        if sys.platform == "win32":
            end = math.inf if seconds is None else time.monotonic() + seconds
            while not any(map(can_be_read, sources)) and time.monotonic() < end:
                time.sleep(SLICE)
            return [source for source in sources if can_be_read(source)]
        return select.select(sources, [], [], seconds)[0]

    def _line_from_pipe(self, channel: Channel) -> str | None:
        """Return the next line of standard input, or None if the connection has something first."""
        while not channel.has_something:
            if b"\n" in self.typed:
                line, _, self.typed = self.typed.partition(b"\n")
                return line.removesuffix(b"\r").decode(sys.stdin.encoding, "surrogateescape")
            if channel.frames.socket not in self._wait(sys.stdin, channel.frames.socket):
                data = os.read(sys.stdin.fileno(), 65536)
                if not (data or self.typed):
                    raise KeyboardInterrupt
                self.typed += data or b"\n"  # the last line may have no end
        return None

    def on_signal(self, number: int, _: object) -> None:
        """Leave at the first signal; at the second, put the terminal back and end at once."""
        if self.leaving:
            self.set_quiet(False)
            os._exit(128 + number)
        self.leaving = True
        row, self._row = self._row, ""
        # A row is erased, but not where the terminal has shown ^C, or something was typed.
        end = f"\r{' ' * len(row)}\r" if self._quiet else "\n"
        with contextlib.suppress(OSError, ValueError):
            # Not on a stopped screen, which Windows cannot tell.
            if is_terminal(self.screen) and (os.name == "nt" or select.select([], [self.screen], [], 0)[1]):
                os.write(self.screen.fileno(), end.encode())
        if not self._holds_signals:
            raise KeyboardInterrupt

    def on_continue(self, *_: object) -> None:
        """After Ctrl-Z and fg: the terminal as it was, and the prompt again."""
        if sys.platform != "win32" and self._row and self.has_prompt:
            quiet, self._quiet = self._quiet, False
            self.set_quiet(quiet or self._editing)  # readline takes single keys too
            self._quiet = quiet
            typed = readline.get_line_buffer() if self._editing else ""
            with contextlib.suppress(OSError):  # not through the stream, which may be writing
                os.write(self.screen.fileno(), os.fsencode(f"\r{self._row}{typed}"))

    @contextlib.contextmanager
    def to_its_end(self) -> Iterator[None]:
        """A signal waits until this is done: without a second one, no record is left half sent."""
        self._holds_signals = True
        try:
            yield
        finally:
            self._holds_signals = False
        if self.leaving:
            raise KeyboardInterrupt


def show_step(console: Console, whole: bool, record: logging.LogRecord) -> bool:
    """Show a step of the protocol, values short or whole. A filter of `log`: a handler would hold a lock."""
    rows = [f"{record.getMessage()}. [{record.filename}: {record.funcName}]"]
    for name, value in getattr(record, "values", {}).items():
        data = to_bytes(value) if isinstance(value, int) else value
        parts = {name: data}
        if name == "plaintext":
            end = data.rindex(b"\x80")
            parts = {"type": data[:1], "in_reply_to": data[1:33], "body": data[33:end], "padding": data[end:]}
        for part, shown in parts.items():
            first, *more = value_rows(part, shown, whole)
            rows += [f"  {part:11}  {first}", *(f"{'':15}{row}" for row in more)]
    if not console.leaving:  # a stopped screen must not hold up the goodbye
        console.notice("\n".join(rows))
    return False


def value_rows(name: str, data: bytes, whole: bool) -> list[str]:
    """Return hexadecimal rows of an even width; a text below its bytes, a run of zeros counted."""
    width = (max(columns(sys.stderr) or 100, 40) - 15) // 16 * 8  # in bytes
    shown = data.rstrip(b"\0") if data.endswith(bytes(9)) else data
    rows = [shown[at : at + width].hex() for at in range(0, len(shown), width)]
    is_text = shown and name in ("version", "body", "words")
    texts = screen_lines(shown.decode(), 2 * width - 2) if is_text else []
    if len(rows) > 1 and not whole:
        rows, texts = [f"{shown[: width - 8].hex()}... ({len(data)} bytes)"], texts[:1]
    rows += [f'"{text}"' for text in texts]
    if data != shown:
        rows.append(f"{len(data) - len(shown)} zero bytes")
    return rows or ["(empty)"]


# ---------------------------------------------------- a conversation, from the question to the goodbye


def talk(console: Console, channel: Channel, peer: PinnedPeer) -> int:
    """Meet, converse, and return the exit status; hang up in any case, after a goodbye if the line holds.

    Raises PersonLeft when this side's user leaves. TrustError and NoConversation: none began. Any other
    ChatError may come at any time.
    """
    try:
        meet(console, channel, peer)
        return converse(console, channel)
    except (ProtocolError, ConnectionCut):
        raise
    except BaseException as reason:
        if not channel.close() and isinstance(reason, (PersonLeft, KeyboardInterrupt)):
            told = f"the goodbye could not be sent; {console.peer} sees that the line was cut"
            raise ChatError(told) from None
        raise
    finally:
        channel.frames.hang_up()
        console.set_quiet(False)
        if channel.transcript.path:
            command = f"{PYTHON} {quoted(Path(sys.argv[0]))} --verify {quoted(channel.transcript.path)}"
            told = "Whoever has this file can read the conversation. To check who said what:"
            console.notice(f"{told}\n  {command}")


def meet(console: Console, channel: Channel, peer: PinnedPeer) -> None:
    """Settle who is at the other end, pin a new key, and say how to begin. Raises as `ask_for_words`."""
    trust, name = channel.trust, console.peer
    key = f"a key that you know as {', '.join(trust.also)}" if trust.also else "a key that is new to you"
    read = f"Read these words to {name}, by telephone or in person:"
    if trust.settled:
        key = f"the key you {'know' if trust.known else 'asked for'}"
        read = f"If {name} asks for your words, read them out:"
    console.notice(f"{name} is here, with {key}:\n  {fingerprint(channel.opener.signer)}")
    console.notice(f"{read}  {' '.join(channel.own_words)}")
    if not trust.settled:
        ask_for_words(console, channel)
    trace("The words are made of th and r", words=" ".join(channel.words).encode())
    if not trust.known:
        peer.pin(channel.opener.signer)
        console.notice("The key is pinned.")
    channel.transcript.begin(channel.sealer.sender)
    first = "You speak first." if channel.my_turn else f"{name} speaks first."
    deciding = "" if trust.known else f" {name} may still be deciding about your key."
    commands = " /help lists what you can type." if console.has_prompt else ""
    console.notice(first + deciding + commands)


def ask_for_words(console: Console, channel: Channel) -> None:
    """Ask until the other side's words are typed. Raises TrustError for a no, NoConversation if it left."""
    name, watched = console.peer, [channel.frames.socket]
    console.drop_typed()  # it was no answer to this question
    while True:
        answer = console.prompt(f"Type the words that {name} reads, or no: ", *watched)
        if answer is None:
            if channel.my_turn:
                channel.receive()  # a goodbye, or else an error
            if channel.over or channel.frames.has_ended(1.0):  # a goodbye is followed by the end at once
                raise NoConversation(f"{name} left, or said no, before you answered; nothing is pinned")
            watched = []  # what it is waits until the question is answered
            console.notice(f"{name} has said something, or has left. You see it after your answer.")
            continue
        words = re.findall(r"[a-z]+", answer.lower())
        if words == channel.other_words:
            return
        if words == ["no"]:
            reason = f"you did not accept {name}'s key; nothing is pinned"
            raise TrustError(reason, fingerprint(channel.opener.signer))
        if words == ["quit"]:
            raise KeyboardInterrupt
        told = (
            "These words do not belong to this connection. A word was misheard, or somebody is in between. "
            f"Let {name} read them once more. If they are the same again, answer no."
        )
        if words in (channel.own_words, ["words"]):
            told = f"Those are your words, to read to {name}:  {' '.join(channel.own_words)}"
        elif len(words) != 3:
            told = "These are not three words (/words shows yours, /quit leaves)."
        console.notice(told)


def converse(console: Console, channel: Channel) -> int:
    """Talk until somebody leaves; return the exit status, 1 if no text had arrived. Raises PersonLeft."""
    name, message = console.peer, None
    try:
        while message is None or message.type is RecordType.TEXT:
            if channel.my_turn:
                speak(console, channel)
            else:
                console.wait_for_peer(channel.frames.socket)
            if channel.has_something:
                message = channel.receive()
                if message.type is RecordType.TEXT:
                    console.show(name, message.text)
                    if console.has_prompt:
                        console.write("\a", console.screen)
    except ConnectionCut as cut:
        lost = ". Your last message may not have arrived" if channel.texts and not channel.my_turn else ""
        raise ConnectionCut(f"{cut}{lost}") from None
    except KeyboardInterrupt:
        raise PersonLeft from None
    unread = " before your last message had arrived" if message.crossed else ""
    if channel.texts - message.crossed > 0:  # a text has arrived; one that crossed the goodbye has not
        console.notice(f"{name} left{unread}.")
        return 0
    deciding = "" if channel.trust.known else "before accepting your key, or "
    console.notice(f"{name} left {deciding}before anything was said.")
    return 1


def speak(console: Console, channel: Channel) -> None:
    """Let the person speak, unless there is something to receive."""
    try:
        text = console.next_line(channel)
        if text is None:
            return
        if channel.has_something:
            raise MessageError(f"{console.peer} is no longer there. Your line was:\n  {text}")
        with console.to_its_end():
            channel.send(text)
        return
    except MessageError as error:
        console.notice(explain(error, console.peer))
    except ConnectionCut:
        if not channel.has_something:  # a goodbye may have come before the cut
            raise
    console.lost_a_line = not console.has_prompt


def explain(error: ChatError | MemoryError | OSError, name: str) -> str:
    """Return how a failure is told; for a key of `name` that is not trusted, with what a person can do."""
    if isinstance(error, MemoryError):
        return "Stopped: there is not enough memory"
    if isinstance(error, OSError):  # the network and the disk have errors of their own
        return f"Stopped: cannot use the terminal, or the pipe in its place: {error.strerror}"
    text = f"{error.told}: {error}" if str(error) else error.told
    if not text.endswith((".", "?", ")")) and "\n  " not in text:  # a command, or a fingerprint, ends it
        text += "."
    if isinstance(error, TrustError) and error.presented:
        text += "".join(f"\n  {known}\n    ({where})" for known, where in error.expected)
        text += (
            f"\nThe key that was presented:\n  {error.presented}\nLet {name} read you the fingerprint on "
            f"{name}'s own screen, in person or by telephone (yours is shown at the start). If it is this "
            "one, start again with --peer and that one: it takes the place of a pinned key (to keep both, "
            "add a line to known_peers). If not, somebody is in between."
        )
    return text


# ------------------------------------------------------- from the command line to the exit status


def a_fingerprint(text: str) -> str:
    found = re.fullmatch(r"(?:SHA256:)?([A-Za-z0-9+/]{43})[.,;=]*", text.strip())
    if not found:
        raise argparse.ArgumentTypeError("a fingerprint is SHA256: and 43 characters")
    return f"SHA256:{found[1]}"


def a_number(text: str, allowed: range) -> int:
    if text not in map(str, allowed):
        raise argparse.ArgumentTypeError(f"this is no number from {allowed[0]} to {allowed[-1]}")
    return int(text)


def a_path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except (RuntimeError, KeyError):  # of Python 3.9
        raise argparse.ArgumentTypeError(f"cannot tell which folder {text} is; give its full path") from None


def common_options(role: Role, usage: str, description: str) -> argparse.ArgumentParser:
    """Return a parser for the options that both programs have."""
    parser = argparse.ArgumentParser(usage=f"%(prog)s {usage}", description=description)
    parser.set_defaults(role=role)
    option, peer = parser.add_argument, role.peer.value.title()
    home = os.environ.get("SECURE_CHAT_HOME") or "~/.secure-chat"
    option("--home", type=a_path, default=home, metavar="DIR", help="where keys are (default: %(default)s)")
    option("--peer", type=a_fingerprint, metavar="FINGERPRINT", help=f"accept this key of {peer}'s only")
    option("--transcript", type=a_path, metavar="DIR", help="keep each conversation in a file there")
    option("--verify", type=a_path, metavar="FILE", help="check and show such a file, and end")
    option("-v", "--verbose", action="count", default=0, help="show each step; -vv: whole values")
    port = functools.partial(a_number, allowed=range(65536))
    option("--port", type=port, default=PORT, metavar="N", help="Bob's port (default: %(default)s)")
    return parser


def open_home(console: Console, options: argparse.Namespace) -> tuple[KeyStore, RsaKey]:
    """Return one's own folder and key; both are made on the first run. Checks --peer and --transcript."""
    store = KeyStore(options.home / str(options.role.value))
    identity = store.load_identity(ask_passphrase)
    if identity is None:
        console.notice(f"Making your RSA key ({NEW_RSA_BITS} bits) ...")
        identity = store.make_identity()
        console.notice("Your key is in this file. Keep it secret: with it, anybody can pretend to be you.")
        console.notice(f"  {store.folder / store.IDENTITY}")
    if options.peer == fingerprint(identity):
        raise UsageError(f"this is your own fingerprint; ask {console.peer} for theirs")
    if options.transcript:
        with disk("make", options.transcript, "name another folder"):
            options.transcript.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(options.transcript, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    console.notice(f"You are {console.me}. The fingerprint of your key is\n  {fingerprint(identity)}")
    return store, identity


def ask_passphrase(prompt: str) -> str:
    if not is_terminal(sys.stdin):
        raise FileError("your key has a passphrase, which can only be typed at a terminal")
    try:
        return getpass.getpass(prompt)
    except (EOFError, UnicodeError):
        raise FileError("no passphrase was given for the key") from None


VERDICT = """\

The transcript is sound. Whoever has the key shown for a sender signed these messages, in this conversation \
and order, each in reply to what stands before it.
It does not show when this was said, who kept the file, or whose a key is: compare the fingerprints with \
their owners. A message proves little until the other side has answered it. More may have been said than is \
in the file: whoever kept it, or stole that side's key, can have left out what came after the other side's \
last record, and messages of their own that the other side had not received. A goodbye of their own proves \
nothing. Whoever has both keys can have made all of it."""


def verify_file(console: Console, options: argparse.Namespace) -> int:
    """Show what a transcript proves. Raises ProtocolError if it is not sound, TrustError for --peer."""
    proven = "Nothing is proven"
    try:
        for opener, message in read_transcript(options.verify):
            name, key = opener.sender.value.title(), fingerprint(opener.signer)
            if message.type is RecordType.READY:  # the first of each
                proven = "Nothing is proven but what stands above"
                console.notice(f"{name} is {owner(key, console.peer, options)}:\n  {key}")
                if name == console.peer and options.peer not in (None, key):
                    raise TrustError(f"{name}'s key is not the one asked for, {options.peer}", "")
            elif message.type is RecordType.TEXT:
                console.show(name, message.text)
            else:
                unread = " before the last message had arrived" if message.crossed else ""
                console.notice(f"{name} left{unread}.")
    except ProtocolError as error:
        raise ProtocolError(f"{error}.\n{proven}") from None
    console.notice(VERDICT)
    return 0


def read_transcript(path: Path) -> Iterator[tuple[Opener, Message]]:
    with disk("read", path), open_regular(Path(os.path.realpath(path))) as file:
        yield from verify_transcript(file)


def owner(key: str, peer: str, options: argparse.Namespace) -> str:
    """Return whose key that is, by its fingerprint and what is in the home folder, if it is there."""
    store = KeyStore(options.home / str(options.role.value))
    with contextlib.suppress(FileError):  # with a passphrase, it is not worth asking for it
        identity = store.load_identity(lambda _: "")
        if identity is not None and fingerprint(identity) == key:
            return "you"
    pins = PinnedPeer(store, options.role.peer.value).pins()
    names = [pin.name for pin in pins if pin.fingerprint == key]
    return f"the {peer} you pinned as {' and '.join(names)}" if names else "not known here"


def run_program(parser: argparse.ArgumentParser, run: Callable[..., int]) -> NoReturn:
    """Run a program and exit. What a user, a peer or the disk can cause ends in a line, not a traceback."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the program was started with that stream closed
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
        if sys.platform == "win32":
            getattr(sys, name).reconfigure(encoding="utf-8")  # of pipes and files: no code page
        getattr(sys, name).reconfigure(errors="surrogateescape" if mode == "r" else "backslashreplace")
    console = Console(parser.get_default("role"))
    sys.unraisablehook = lambda _: None  # Ctrl-C in a finalizer: `leaving` is set all the same
    try:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, console.on_continue if number.name == "SIGCONT" else console.on_signal)
        for argument in sys.argv[1:]:
            if re.match(r"[\u2010-\u2015\u2212]|.*\s--|--[a-z]+\s", argument):
                parser.error(f"{printable(argument)}: a messenger changed a dash or a space; type it with --")
        try:
            options = parser.parse_args()
            log.addFilter(functools.partial(show_step, console, options.verbose > 1))
            log.setLevel(logging.INFO if options.verbose else logging.WARNING)
            status = (verify_file if options.verify else run)(console, options)
        except (ChatError, MemoryError, OSError) as error:
            status = error.status if isinstance(error, ChatError) else 1
            with contextlib.suppress(OSError):
                console.notice(explain(error, console.peer))
    except KeyboardInterrupt:
        status = 130
    finally:
        console.set_quiet(False)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            if not console.leaving:  # a stopped screen must not hold up the end
                stream.flush()
        with contextlib.suppress(OSError), Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())  # Python flushes once more, at its end
    sys.exit(status or int(console.lost_a_line or b"\n" in console.typed))
