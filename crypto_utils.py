"""Secure chat: the protocol secure-chat/1 and what its two programs share, in the order in which it runs.

    Bob                                                               Alice
    hello_bob = "secure-chat/1", nonce_B, p, g, B = g^b, RSA_bob  ---->
                <----  hello_alice = "secure-chat/1", nonce_A, A = g^a, RSA_alice
    both: may the peer's key be trusted? Z = g^ab, th, two AES keys
                <----  record 0: READY, sealed by Alice (sent together with her hello)
    record 0: READY, sealed by Bob, after he verified and decrypted hers  ---->
                <----  record n: TEXT, the request
    record n: TEXT, the reply  ---->
    either side, when it leaves: CLOSE

    symbol    here             bytes         what it is, and where it is defined
    p, q, g   Group            256 to 512    safe prime p = 2q + 1; g generates the subgroup of order q
    a, b      Offer.exponent   len(p) / 8    private exponent, for one session (SP 800-56A, 5.6.1.1)
    A, B      public_value     len(p)        g^a, g^b mod p, left-padded
    Z         z                len(p)        shared secret g^ab mod p, left-padded (SP 800-56A, 5.7.1.1)
    th        th               32            transcript hash: SHA-256 over both hello frames
    K         key              32            AES-256 key of one direction (SP 800-56C, 4.1)
    C         commitment       32            commits to K; never sent, covered by every signature
    n         number           12            number of a record, and its GCM nonce (SP 800-38D, 8.2.1)
              in_reply_to      32            in each record: what was signed of the last record received

The three steps are Diffie-Hellman, AES-GCM and RSA-PSS. They are followed by hellos, records, the handshake,
evidence, and keys on disk. Up to the banner, bytes go in and bytes come out: a socket is something to read
from and to write to, and nothing prints or asks. Below the banner is what both programs need for a person at
a terminal. Whatever a peer sends becomes a value that passed every check, or an exception.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 9):
    raise ImportError(
        f"Python 3.9 or newer is needed, not {sys.version.split()[0]}; is there a python3.12, say?"
    )

import argparse
import base64
import contextlib
import enum
import errno
import getpass
import io
import itertools
import logging
import math
import os
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import stat
import textwrap
import threading
import time
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import BinaryIO, Callable, NamedTuple, NoReturn, TextIO, Union

try:
    from Crypto import IncorrectPassphraseError, PassphraseRequiredError
    from Crypto.Cipher import AES
    from Crypto.Hash import SHA256
    from Crypto.Hash.SHA256 import SHA256Hash
    from Crypto.IO import PEM
    from Crypto.Math.Numbers import Integer, _implementation
    from Crypto.Math.Primality import miller_rabin_test
    from Crypto.PublicKey import RSA
    from Crypto.PublicKey.RSA import RsaKey as RsaKey
    from Crypto.Signature import pss
    from Crypto.Util.asn1 import DerBitString, DerObject, DerSequence
    from Crypto.Util.Padding import unpad
    from Crypto.Util.RFC1751 import key_to_english
except ImportError as missing:
    raise ImportError(
        f"{missing}. Is the virtual environment active? In this folder:\n"
        "  python3 -m venv .venv && . .venv/bin/activate && python3 -m pip install -r requirements.txt"
    ) from None

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl
    import grp
    import pwd
    import termios

if _implementation.get("library") != "nat":
    raise ImportError(
        "pycryptodome has no constant-time arithmetic here; unset PYCRYPTODOME_INTEGER or install it anew"
    )

VERSION = b"secure-chat/1"
PORT = 65432

# Sizes in bytes, unless the name says bits. Each limit is checked before anything is allocated or computed.
NONCE_BYTES = 32
GROUP_BITS = range(2048, 4096 + 1)
RSA_BITS = range(2048, 4096 + 1)
RSA_EXPONENT = 65537
RSA_DER_LIMIT = 1024
NEW_RSA_BITS = 3072
HELLO_LIMIT = 8 * 1024
READY_LIMIT = 4 * 1024
TEXT_LIMIT = 1024 * 1024
PADDING = 256
GCM_NONCE, GCM_TAG = 12, 16
RECORD_LIMIT = GCM_NONCE + (TEXT_LIMIT // PADDING + 1) * PADDING + GCM_TAG + RSA_BITS[-1] // 8
FILE_LIMIT = 1024 * 1024  # of a file in a home folder

HANDSHAKE_SECONDS = 10.0  # for the whole handshake, from its first byte
FIRST_BYTE_SECONDS = 120.0  # that Alice waits for Bob, who may still be searching for parameters
STALL_SECONDS = 30.0  # without progress in the middle of a frame, sent or received
GOODBYE_SECONDS = 2.0  # for a CLOSE to reach the other side before we hang up

# A record is sent at once, in one segment where it fits. A dead line is noticed after 30 s: while idle, by
# keep-alive (in seconds); while sending, by the time-out (in milliseconds).
TCP_OPTIONS = {
    "TCP_NODELAY": 1,
    "TCP_KEEPIDLE": 15,
    "TCP_KEEPALIVE": 15,  # the same option on macOS
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 30_000,
}

Buffer = Union[bytes, bytearray, memoryview]
Waitable = Union[socket.socket, "Inbox", "select.epoll"]
Random = Callable[[int], bytes]
UNPARSABLE = (ValueError, IndexError, TypeError, ArithmeticError)  # what the library raises for damaged keys


class ProtocolError(Exception):
    """The peer, or somebody in between, broke the protocol. The connection is over."""


class TrustError(Exception):
    """The peer's key is not the one to be trusted: a person has to decide.

    `presented` and `expected` are fingerprints; several keys may be expected.
    """

    def __init__(self, reason: str, presented: str = "", expected: tuple[str, ...] = ()) -> None:
        super().__init__(reason)
        self.presented = presented
        self.expected = expected


class ConnectionCut(Exception):
    """The connection ended or stalled without a goodbye."""


class FileError(Exception):
    """A file or folder cannot be used as it is, and was left as it was. The text says what to do."""


class MessageError(ValueError):
    """The text cannot be sent as it is. Nothing was sent, and the conversation can go on."""


def require(condition: bool, reason: str) -> None:
    """Raise ProtocolError(reason) unless `condition` holds."""
    if not condition:
        raise ProtocolError(reason)


log = logging.getLogger("secure_chat")


def trace(step: str, **values: Buffer | int) -> None:
    """Log a step of the protocol with its values: in a conversation, no secrets but our own texts."""
    log.info(step, extra={"values": values})


class Role(enum.Enum):
    """Which side one is. It orders the hellos and labels the keys."""

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
    def symbol(self) -> str:
        """The name of this role's public value, A or B."""
        return self.value[0].upper()

    @property
    def tag(self) -> bytes:
        """The byte that marks this role's records in a transcript."""
        return self.symbol.encode()


# ------------------------------------------------------------------------- step 1: Diffie-Hellman


def modexp(base: int, exponent: bytes, modulus: int) -> bytes:
    """Return base^exponent mod modulus, left-padded to the length of the modulus.

    The running time depends on the lengths alone: the exponent is kept as bytes, and the library's
    Integer is constant-time (this module cannot be imported where it is not). No other function
    sees a secret Diffie-Hellman exponent.
    """
    result = pow(Integer(base), Integer.from_bytes(exponent), Integer(modulus))
    return result.to_bytes(byte_length(modulus))


def is_power_one(base: int, exponent: int, modulus: int) -> bool:
    """Whether base^exponent = 1 mod modulus. All three are public, so the time may depend on them."""
    return pow(Integer(base), Integer(exponent, public=True), Integer(modulus)) == 1


def byte_length(number: int) -> int:
    return (number.bit_length() + 7) // 8


def to_bytes(number: int) -> bytes:
    """Return the shortest unsigned big-endian encoding; 0 has none (b"")."""
    return number.to_bytes(byte_length(number), "big")


class Group(NamedTuple):
    """Diffie-Hellman parameters: a safe prime p = 2q + 1, and a generator g of the subgroup of order q."""

    p: int
    g: int

    @property
    def q(self) -> int:
        return (self.p - 1) // 2

    def contains(self, y: int) -> bool:
        """Whether y is in the subgroup of order q and not 1 (SP 800-56A, 5.6.2.3.1).

        Modulo a safe prime, that subgroup consists of the squares (Euler's criterion), and the Jacobi
        symbol tells a square six times faster than y^q does. All values are public.
        """
        return 2 <= y <= self.p - 2 and Integer.jacobi_symbol(y, self.p) == 1

    def private_exponent(self, random: Random = secrets.token_bytes) -> bytes:
        """Return len(p) / 8 random bytes: 256 bits for a 2048-bit group, over twice its strength.

        (SP 800-56A, 5.6.1.1.3 excludes 0. It has probability 2^-256, and the peer would refuse g^0 = 1.)
        """
        return random(byte_length(self.p) // 8)

    def export(self) -> bytes:
        """Return the group as PKCS#3 PEM, as `openssl dhparam` reads and writes it."""
        return PEM.encode(DerSequence([self.p, self.g]).encode(), "DH PARAMETERS").encode() + b"\n"

    @classmethod
    def load(cls, pem: bytes) -> Group:
        """Read PKCS#3 PEM, unchecked (a private value length in it is ignored). Raises ValueError."""
        try:
            der, marker, _ = PEM.decode(pem.decode("ascii"))
            sequence = DerSequence().decode(der, strict=True, nr_elements=(2, 3), only_ints_expected=True)
        except (IndexError, TypeError):
            raise ValueError("this is not DER") from None
        if marker != "DH PARAMETERS":
            raise ValueError("these are not DH PARAMETERS")
        return cls(sequence[0], sequence[1])


def check_group(group: Group, rounds: int = 64) -> None:
    """Raise ProtocolError unless p is a safe prime of 2048 to 4096 bits and g generates the subgroup.

    `rounds` of Miller-Rabin test q: 64 for a p that somebody else chose (an error below 2^-128), none for
    a p that has passed and was kept: `4^q = 1 mod p` shows that its file is damaged, unless p is still prime.
    """
    p, g = group.p, group.g
    require(p.bit_length() in GROUP_BITS, f"p has {p.bit_length()} bits, not 2048 to 4096")
    require(p % 2 == 1, "p is even")
    require(is_safe_prime(p, rounds), "p is not a safe prime")
    require(group.contains(g), "g does not generate the subgroup of order q")


def is_safe_prime(p: int, rounds: int = 64) -> bool:
    """Whether the odd number p and q = (p - 1) / 2 are both prime.

    q passes `rounds` of Miller-Rabin with random bases; a composite q passes one with probability 1/4 at
    most. Then p is proven prime: with q > sqrt(p) prime, 4^q = 1 mod p and gcd(4 - 1, p) = 1 suffice
    (Pocklington's theorem).
    """
    q = (p - 1) // 2
    return p % 3 != 0 and is_power_one(4, q, p) and bool(miller_rabin_test(q, rounds))


def generate_group(bits: int = 2048, progress: Callable[[float], None] = lambda _: None) -> Group:
    """Make new parameters: the first safe prime p of exactly `bits` bits after a random start; g = 2.

    Every p here is 24k - 1. Then q = 12k - 1, neither is divisible by 2 or 3, and 2 is a square mod p
    (p = 7 mod 8), so it has order q. A million numbers k from a random start are sieved of small factors
    of p and q. What is left is tested, one thread per core (the library's arithmetic releases the
    interpreter lock). `progress` is called after every test with the share of all searches that end by then.
    """
    bound, run = 10_000_000 if bits < 2560 else 24_000_000, 1 << 20
    small_primes = _small_primes(bound)
    # Mertens: of the numbers without factors below `bound`, one in ln(q) / (e^gamma ln(bound)) is prime.
    chance = (1.781 * math.log(bound) / (bits * math.log(2))) ** 2
    tested = 0
    pool = ThreadPoolExecutor(max_workers=os.cpu_count())
    try:
        while True:
            start = (secrets.randbelow(1 << (bits - 1)) + (1 << (bits - 1))) // 24
            candidates = (12 * (start + i) - 1 for i in _survivors(start, run, small_primes))
            survivors = [q for q in candidates if q.bit_length() == bits - 1]
            for q, passed in zip(survivors, pool.map(_passes_fermat, survivors)):
                tested += 1
                progress(1 - (1 - chance) ** tested)
                if passed and is_safe_prime(2 * q + 1):
                    return Group(2 * q + 1, 2)
    finally:
        pool.shutdown(cancel_futures=True)


def _passes_fermat(q: int) -> bool:
    """Whether 2^(q-1) = 1 mod q, which is nearly always false for a composite q."""
    return is_power_one(2, q - 1, q)


def _small_primes(bound: int) -> array[int]:
    """Return the primes from 5 up to, not including, `bound` (sieve of Eratosthenes)."""
    is_prime = bytearray([1]) * bound
    for n in range(2, int(bound**0.5) + 1):
        if is_prime[n]:
            is_prime[n * n :: n] = bytes(len(range(n * n, bound, n)))
    is_prime[:5] = bytes(5)
    return array("I", itertools.compress(range(bound), is_prime))


def _survivors(start: int, run: int, small_primes: array[int]) -> Iterator[int]:
    """Yield each i < run for which neither 12(start + i) - 1 nor 24(start + i) - 1 has a small factor."""
    alive = bytearray([1]) * run
    for at in range(0, len(small_primes), 16):
        primes = small_primes[at : at + 16]
        rest = start % math.prod(primes)  # one long division for sixteen primes
        for r in primes:
            inverse = (1 + r * (24 - r % 24)) // 24  # of 24 mod r, since r^2 = 1 mod 24
            for k in (inverse, 2 * inverse):  # r divides p where 24k = 1 mod r, and q where 12k = 1 mod r
                first = (k - rest) % r
                if r < run:
                    alive[first::r] = bytes(len(range(first, run, r)))
                elif first < run:
                    alive[first] = 0
    return itertools.compress(range(run), alive)


# --------------------------------------------------------------------- step 2: SHA-256 and AES-GCM


def derive_keys(z: bytes, direction: bytes, th: bytes) -> tuple[bytes, bytes]:
    """Return K and C of one direction, 32 bytes each (SP 800-56C, 4.1: one-step, SHA-256, two blocks)."""
    fixed_info = VERSION + b" key " + direction + th
    key, commitment = (SHA256.new(block.to_bytes(4, "big") + z + fixed_info).digest() for block in (1, 2))
    return key, commitment


def encrypt(key: bytes, nonce: bytes, plaintext: bytes) -> tuple[bytes, bytes]:
    """AES-256-GCM: return the ciphertext and its 16-byte tag, for a 12-byte nonce (SP 800-38D, 7.1)."""
    return AES.new(key, AES.MODE_GCM, nonce=nonce, mac_len=GCM_TAG).encrypt_and_digest(plaintext)


def decrypt(key: bytes, nonce: bytes, ciphertext: Buffer, tag: Buffer) -> bytes:
    """Undo `encrypt` (SP 800-38D, 7.2). Raises ValueError, and returns nothing, if the tag is not valid."""
    return AES.new(key, AES.MODE_GCM, nonce=nonce, mac_len=GCM_TAG).decrypt_and_verify(ciphertext, tag)


# ------------------------------------------------------------------------------- step 3: RSA-PSS


def sign(key: RsaKey, message: SHA256Hash, random: Random = secrets.token_bytes) -> bytes:
    """RSASSA-PSS with SHA-256, MGF1-SHA-256 and a 32-byte salt, over a hashed message (RFC 8017, 8.1.1).

    The signature is as long as the modulus: 256 to 512 bytes.
    """
    return pss.new(key, salt_bytes=32, rand_func=random).sign(message)


def verify(key: RsaKey, message: SHA256Hash, signature: bytes) -> bool:
    """Whether `signature` was made with `key` over this hashed message (RFC 8017, 8.1.2)."""
    try:
        pss.new(key, salt_bytes=32).verify(message, signature)
    except ValueError:
        return False
    return True


# DER of AlgorithmIdentifier { rsaEncryption, NULL }: the first part of a public key.
_RSA_ENCRYPTION = bytes.fromhex("300d06092a864886f70d0101010500")


def public_der(key: RsaKey) -> bytes:
    """Return the public half in its one canonical encoding, DER SubjectPublicKeyInfo (RFC 8017, A.1).

    (The library's own export of it takes ten times as long, a fifteenth of a whole handshake.)
    """
    numbers = [DerObject(0x02, n.to_bytes(n.bit_length() // 8 + 1, "big")).encode() for n in (key.n, key.e)]
    return DerSequence([_RSA_ENCRYPTION, DerBitString(DerSequence(numbers).encode()).encode()]).encode()


def load_public_key(der: bytes) -> RsaKey:
    """Parse and check a peer's RSA public key: DER SubjectPublicKeyInfo of at most 1 KiB.

    The size is checked first, because the library needs 25 s to parse a key of 131 KB. (The
    library refuses an n that is even or a multiple of e.) Raises ProtocolError.
    """
    require(len(der) <= RSA_DER_LIMIT, "the RSA key is larger than 1 KiB")
    require(_RSA_ENCRYPTION in der[:19], "the key is not an RSA SubjectPublicKeyInfo")
    try:
        key = RSA.import_key(der)
    except UNPARSABLE:
        raise ProtocolError("the RSA key cannot be parsed") from None
    require(key.size_in_bits() in RSA_BITS, f"the RSA key has {key.size_in_bits()} bits, not 2048 to 4096")
    require(key.e == RSA_EXPONENT, "the RSA key's public exponent is not 65537")
    require(public_der(key) == der, "the RSA key is not in its canonical encoding")
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

    Until it is None again, `deadline` (of time.monotonic) bounds whatever is done. Without one, a frame
    that has begun may not stall for 30 seconds. Whatever the network does ends in ConnectionCut; a peer
    that announces too long a frame, in ProtocolError.
    """

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.deadline: float | None = None
        with self._network():
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in TCP_OPTIONS.items():
                if hasattr(socket, option):
                    connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, *payloads: bytes) -> None:
        """Send each payload as a frame, all in one write."""
        unsent = memoryview(b"".join(map(frame, payloads)))
        while unsent:
            with self._network(STALL_SECONDS):
                unsent = unsent[self.socket.send(unsent) :]

    def receive(self, limit: int) -> bytearray:
        """Return the payload of the next frame, at most `limit` bytes long."""
        length = int.from_bytes(self._exactly(4), "big")
        require(
            length <= limit, f"a frame of {length} bytes, over the limit of {limit}: is this secure-chat?"
        )
        return self._exactly(length, begun=True)

    def _exactly(self, count: int, begun: bool = False) -> bytearray:
        received = bytearray(count)
        missing = memoryview(received)
        while missing:
            with self._network(STALL_SECONDS if begun else None):
                got = self.socket.recv_into(missing)
            if got == 0:
                where = "in the middle of a message" if begun else "without a goodbye"
                raise ConnectionCut(f"the connection ended {where}")
            missing, begun = missing[got:], True
        return received

    def wait_for_first_byte(self, seconds: float) -> None:
        """Return as soon as there is something to receive, or the connection has ended."""
        self.deadline = time.monotonic() + seconds
        with self._network():
            self.socket.recv(1, socket.MSG_PEEK)

    def hang_up(self, wait: float = 0.0) -> None:
        """Tell the peer that nothing follows, wait at most `wait` seconds for it to hang up, and close.

        A socket that is closed with unread bytes resets the connection, and the reset destroys what the
        peer has not read yet. So we read on until the peer hangs up too.
        """
        self.deadline = time.monotonic() + wait
        with contextlib.suppress(OSError, ConnectionCut):
            self.socket.shutdown(socket.SHUT_WR)
            while wait:
                with self._network():
                    if not self.socket.recv(65536):
                        break
        self.socket.close()

    def abort(self, how: int = socket.SHUT_RDWR) -> None:
        """End the connection, or one direction of it, from another thread: its user finds it cut."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(how)

    @contextlib.contextmanager
    def _network(self, limit: float | None = None) -> Iterator[None]:
        """Bound what is done with the socket by the deadline, and by a limit in seconds; translate errors."""
        if self.deadline is not None:
            limit = min(limit or math.inf, self.deadline - time.monotonic())
        try:
            if limit is not None and limit <= 0:
                raise socket.timeout
            self.socket.settimeout(limit)
            yield
        except socket.timeout:
            raise ConnectionCut("the other side did not answer in time") from None
        except OSError as error:
            raise ConnectionCut(f"the connection broke ({error.strerror or error})") from None


def encode_fields(*fields: bytes) -> bytes:
    """Return each field as uint16 length || bytes, big-endian, one after the other."""
    return b"".join(len(data).to_bytes(2, "big") + data for data in fields)


def decode_fields(data: bytes) -> list[bytes]:
    """Undo `encode_fields`. Raises ProtocolError if the last field is cut short."""
    fields, at = [], 0
    while at < len(data):
        end = at + 2 + int.from_bytes(data[at : at + 2], "big")
        require(end <= len(data), "a field of the hello is cut short")
        fields.append(data[at + 2 : end])
        at = end
    return fields


class Hello(NamedTuple):
    """The first message of each side. Only Bob's carries the group."""

    group: Group | None
    nonce: bytes
    public_value: bytes
    rsa: bytes

    def encode(self) -> bytes:
        group = (to_bytes(self.group.p), to_bytes(self.group.g)) if self.group else ()
        return encode_fields(VERSION, self.nonce, *group, self.public_value, self.rsa)

    @classmethod
    def decode(cls, sender: Role, data: bytes) -> Hello:
        """Undo `encode`. Sizes and encodings are checked here, values in `check`. Raises ProtocolError."""
        fields = decode_fields(data)
        require(fields[:1] == [VERSION], "the other side does not speak secure-chat/1")
        require(len(fields) == (6 if sender is Role.BOB else 4), "the hello has too many or too few fields")
        _, nonce, *integers, public_value, rsa = fields
        require(len(nonce) == NONCE_BYTES, "the nonce is not 32 bytes long")
        require(all(len(n) <= GROUP_BITS[-1] // 8 for n in integers), "p or g is over 4096 bits long")
        require(all(n[:1] != b"\0" for n in integers), "p or g is not in its minimal encoding")
        group = Group(*(int.from_bytes(n, "big") for n in integers)) if integers else None
        return cls(group, nonce, public_value, rsa)

    def check(self, group: Group) -> tuple[RsaKey, int]:
        """Check the RSA key, and the public value against `group`; return both. Raises ProtocolError."""
        key = load_public_key(self.rsa)
        require(len(self.public_value) == byte_length(group.p), "the public value is not as long as p")
        y = int.from_bytes(self.public_value, "big")
        require(group.contains(y), "the public value is not in the subgroup of order q")
        return key, y

    def trace(self, sender: Role, what: str) -> None:
        group = {"p": self.group.p, "g": self.group.g} if self.group else {}
        names = f"nonce_{sender.symbol}", sender.symbol, f"RSA_{sender.value}"
        values = self.nonce, self.public_value, self.rsa
        trace(f"step 1, Diffie-Hellman: {what}", **group, **dict(zip(names, values)))


# ------------------------------------------------------------ records: one object for each direction


class RecordType(enum.IntEnum):
    """What a record is for; the first byte of its plaintext."""

    READY = 0
    TEXT = 1
    CLOSE = 2


NOTHING = bytes(32)  # what a record replies to whose sender has received none


class Message(NamedTuple):
    """What a record says, once it has passed every check."""

    type: RecordType
    body: bytes
    in_reply_to: bytes
    crossed: bool = False  # of a CLOSE: its sender had not received our latest record yet

    @property
    def text(self) -> str:
        """The body of a TEXT, or the reason in a CLOSE."""
        return self.body.decode()


class Direction:
    """The records of one direction: who sends and signs them, their keys, and how far they have come.

    `number` is that of the next record. `latest` and `before` are the hashes that were signed of the last
    record and of the one before it. `closed` is set before any work on a record begins, and taken back only
    when all of it has succeeded: no nonce is used twice, and nothing follows a failure or a CLOSE.
    """

    def __init__(self, sender: Role, signer: RsaKey, z: bytes, th: bytes) -> None:
        self.sender = sender
        self.signer = signer
        self._key, commitment = derive_keys(z, sender.label, th)
        self._context = SHA256.new(VERSION + b" signature " + sender.label + th + commitment)
        self.number = 0
        self.closed = False
        self.latest = self.before = NOTHING

    def has_the_turn(self, other: Direction) -> bool:
        """Whether READY or TEXT may come next. Alice's record n is a request, Bob's record n the reply."""
        return self.number - other.number == (0 if self.sender is Role.ALICE else -1)

    def _begin(self) -> bytes:
        """Close the direction while a record is worked on; return that record's nonce."""
        if self.closed:
            raise ValueError("this direction is closed")
        self.closed = True
        return self.number.to_bytes(GCM_NONCE, "big")

    def _succeed(self, record_type: RecordType, signed: bytes) -> None:
        self.latest, self.before = signed, self.latest
        self.number += 1
        self.closed = record_type is RecordType.CLOSE

    def _hash(self, *parts: Buffer) -> SHA256Hash:
        """Hash what is signed: label, direction, th and C, then nonce || ciphertext || tag."""
        message = self._context.copy()
        for part in parts:
            message.update(part)
        return message

    def _trace(self, step: str, record_type: RecordType, what: str, **values: Buffer) -> None:
        trace(
            f"{step}: record {self.number}, {self.sender.label.decode()}, {record_type.name}. {what}",
            **values,
        )


class Sealer(Direction):
    """Makes records: nonce[12] || ciphertext || tag[16] || signature. `signer` is a private key."""

    def seal(
        self,
        record_type: RecordType,
        body: bytes,
        other: Direction,
        send: Callable[[bytes], None] = lambda _: None,
        random: Random = secrets.token_bytes,
    ) -> bytes:
        """Make the next record, in reply to the latest of the `other` direction, and `send` it.

        The direction stays closed if `send` fails or is interrupted: part of the record may be on its way.
        Raises ValueError out of turn, and in a direction that is closed.
        """
        if not (record_type is RecordType.CLOSE or self.has_the_turn(other)):
            raise ValueError("it is the other side's turn")
        nonce = self._begin()
        plaintext = bytes([record_type]) + other.latest + body + b"\x80"
        plaintext += bytes(-len(plaintext) % PADDING)  # ISO 7816-4
        ciphertext, tag = encrypt(self._key, nonce, plaintext)
        encrypted = {"nonce": nonce, "ciphertext": ciphertext, "tag": tag}
        self._trace(
            "step 2, AES-GCM", record_type, "The padded text is encrypted", plaintext=plaintext, **encrypted
        )
        signed = self._hash(nonce, ciphertext, tag)
        signature = sign(self.signer, signed, random)
        what = "The hash of direction, th, C, nonce, ciphertext and tag is signed"
        self._trace("step 3, RSA-PSS", record_type, what, hash=signed.digest(), signature=signature)
        record = b"".join((nonce, ciphertext, tag, signature))
        send(record)
        self._succeed(record_type, signed.digest())
        return record


class Opener(Direction):
    """Opens records: verifies, then decrypts, then looks inside. `signer` is the sender's public key."""

    def open(
        self, record: Buffer, other: Direction, keep: Callable[[Buffer], None] = lambda _: None
    ) -> Message:
        """Return what the next record says in reply to the `other` direction, and `keep` the record.

        Only a CLOSE may come out of turn. One that comes in turn may have crossed our latest record on the
        way: then it replies to the one before. Raises ProtocolError, and the direction stays closed.
        """
        nonce = self._begin()
        split = len(record) - self.signer.size_in_bytes()
        padded = split - GCM_NONCE - GCM_TAG
        require(padded >= PADDING and padded % PADDING == 0, "the record has an impossible length")
        parts, signature = memoryview(record)[:split], bytes(record[split:])
        received, ciphertext, tag = parts[:GCM_NONCE], parts[GCM_NONCE:-GCM_TAG], parts[-GCM_TAG:]
        require(
            received == nonce,
            f"record {int.from_bytes(received, 'big')} where record {self.number} should be: "
            "replayed, dropped or reordered",
        )
        signed = self._hash(nonce, ciphertext, tag)
        require(verify(self.signer, signed, signature), "the record's signature is not valid")
        try:
            plaintext = decrypt(self._key, nonce, ciphertext, tag)
        except ValueError:
            raise ProtocolError("the record's authentication tag is not valid") from None
        message = self._parse(plaintext)
        closing, in_turn = message.type is RecordType.CLOSE, self.has_the_turn(other)
        require(closing or in_turn, "the other side spoke out of turn")
        crossed = message.in_reply_to != other.latest
        require(
            not crossed or (closing and in_turn and message.in_reply_to == other.before),
            "the record replies to another record than the last one",
        )
        what = "The number is the next one, and the signature of this hash is valid"
        checked = {"nonce": nonce, "hash": signed.digest(), "signature": signature}
        self._trace("step 3, RSA-PSS", message.type, what, **checked)
        what = "The tag is valid, so it was decrypted; padding, type, text, turn and in_reply_to are right"
        self._trace(
            "step 2, AES-GCM", message.type, what, ciphertext=ciphertext, tag=tag, plaintext=plaintext
        )
        keep(record)
        self._succeed(message.type, signed.digest())
        # A READY that had not arrived says nothing: nobody need be told.
        return message._replace(crossed=crossed and other.number > 1)

    def _parse(self, plaintext: bytes) -> Message:
        try:
            end = len(plaintext) - PADDING + len(unpad(plaintext[-PADDING:], PADDING, style="iso7816"))
        except ValueError:
            raise ProtocolError("the record's padding is not valid") from None
        require(end > len(NOTHING), "the record is too short")
        require(plaintext[0] in list(RecordType), "the record is of no known type")
        record_type, in_reply_to, body = RecordType(plaintext[0]), plaintext[1:33], plaintext[33:end]
        ready = record_type is RecordType.READY
        require(ready == (self.number == 0), "READY is record 0, and no other")
        if ready:
            right_length = len(body) == (NONCE_BYTES if self.sender is Role.BOB else 0)
        else:
            right_length = len(body) <= TEXT_LIMIT
        require(right_length, "the record's body has a wrong length")
        if not ready:
            try:
                body.decode()
            except UnicodeDecodeError:
                raise ProtocolError("the record's text is not valid UTF-8") from None
        return Message(record_type, body, in_reply_to)


# -------------------------------------------------------------------------- handshake and channel


def transcript_hash(hello_bob: bytes, hello_alice: bytes) -> bytes:
    """Return th, 32 bytes: both sides mean the same hellos if they have the same th."""
    return SHA256.new(frame(hello_bob) + frame(hello_alice)).digest()


def commit(r: bytes) -> bytes:
    """Return nonce_B, 32 bytes. With it, Bob commits to r before he sees Alice's hello."""
    return SHA256.new(VERSION + b" commit " + r).digest()


def check_commitment(nonce_b: bytes, r: bytes) -> None:
    """Raise ProtocolError unless r, the body of Bob's READY, is what he committed to in his hello."""
    require(commit(r) == nonce_b, "Bob's r does not fit his nonce")


def make_words(th: bytes, r: bytes) -> str:
    """Return six words (RFC 1751) for two people to compare, from the first 8 bytes of a hash over th and r.

    Somebody in between has chosen both hellos before Bob opens r, and so has one try in each handshake:
    six equal words have a chance of 2^-64, and each word that is compared counts for 11 bits.
    """
    return key_to_english(SHA256.new(VERSION + b" words " + th + r).digest()[:8]).lower()


class Offer(NamedTuple):
    """One side's half of the key exchange: its hello, and the private exponent that belongs to it."""

    role: Role
    group: Group
    hello: Hello
    payload: bytes  # the hello, encoded
    exponent: bytes
    r: bytes  # what Bob's nonce commits to; Alice has none

    def __repr__(self) -> str:
        return f"Offer({self.hello})"  # and no secret

    @classmethod
    def make(cls, role: Role, identity: RsaKey, group: Group, random: Random = secrets.token_bytes) -> Offer:
        """Make an offer for one session, with a nonce and a private exponent of its own."""
        exponent, drawn = group.private_exponent(random), random(NONCE_BYTES)
        r, nonce = (drawn, commit(drawn)) if role is Role.BOB else (b"", drawn)
        public_value = modexp(group.g, exponent, group.p)
        hello = Hello(group if role is Role.BOB else None, nonce, public_value, public_der(identity))
        secret = f"{role.symbol.lower()}, {8 * len(exponent)} random bits, stays secret"
        hello.trace(role, f"our hello. Everybody may read it; {secret}")
        return cls(role, group, hello, hello.encode(), exponent, r)

    def agree(self, hello: bytes) -> tuple[RsaKey, bytes, bytes]:
        """Check the peer's hello against this offer; return the peer's RSA key, Z, and th.

        Every value of the peer is checked before the secret exponent meets it. That the peer holds the
        private half of its key is shown only by the first record that opens. Raises ProtocolError.
        """
        peer = Hello.decode(self.role.peer, hello)
        key, y = peer.check(self.group)
        require(peer.rsa != self.hello.rsa, "the other side presents our own key: a reflection")
        peer.trace(self.role.peer, "the other hello. Every value in it passed its checks")
        z = modexp(y, self.exponent, self.group.p)
        th = transcript_hash(*((self.payload, hello) if self.role is Role.BOB else (hello, self.payload)))
        trace(
            "step 2, SHA-256: Z = g^ab, and th, the hash of both hellos, give a key for each direction", th=th
        )
        return key, z, th


class Channel:
    """An authenticated conversation: Alice sends, Bob replies, and so on, until somebody leaves."""

    def __init__(
        self,
        frames: FrameSocket,
        sealer: Sealer,
        opener: Opener,
        trust: Trust,
        words: str,
        beginning: tuple[bytes, ...],
    ) -> None:
        self.frames = frames
        self.role = sealer.sender
        self.peer_key = opener.signer
        self.trust = trust  # what is known of the peer's key
        self.words = words
        self.beginning = beginning  # of its transcript; empty if there is to be none
        self.transcript: Transcript | None = None
        self._sealer = sealer
        self._opener = opener

    @property
    def my_turn(self) -> bool:
        """Whether the next TEXT is ours."""
        return self._sealer.has_the_turn(self._opener)

    @property
    def texts(self) -> int:
        """How many TEXTs have been sent and received."""
        ready_and_goodbye = 2 + self._opener.closed
        return self._sealer.number + self._opener.number - ready_and_goodbye

    @property
    def has_something(self) -> bool:
        """Whether there is something to receive, or the connection has ended."""
        return bool(select.select([self.frames.socket], [], [], 0)[0])

    def send(self, text: str) -> None:
        """Send a text of at most 1 MiB in UTF-8. Raises MessageError if it cannot be sent as it is."""
        body = text.encode(errors="surrogatepass")
        if len(body) > TEXT_LIMIT:
            raise MessageError(f"the text is longer than {TEXT_LIMIT} bytes")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise MessageError("the text is not valid Unicode") from None
        self._sealer.seal(RecordType.TEXT, body, self._opener, self._send)

    def receive(self) -> Message:
        """Return the peer's next TEXT, or its CLOSE, which may come at any time and ends the conversation."""
        record = self.frames.receive(RECORD_LIMIT)
        message = self._opener.open(record, self._sealer, self._keep)
        if message.type is RecordType.CLOSE:
            self._sealer.closed = True
        return message

    def close(self, reason: str = "", wait: float = GOODBYE_SECONDS) -> None:
        """Say goodbye if that is still possible, and hang up, all within two times `wait` seconds."""
        self.frames.deadline = time.monotonic() + wait
        with contextlib.suppress(ConnectionCut):
            if not self._sealer.closed:
                self._sealer.seal(RecordType.CLOSE, reason.encode(), self._opener, self._send_goodbye)
        self.frames.hang_up(wait)

    def _send(self, record: bytes) -> None:
        if self.transcript:
            self.transcript.add(self.role.tag, record)
        self.frames.send(record)

    def _send_goodbye(self, record: bytes) -> None:
        try:
            self._send(record)
        except FileError:  # a full disk is no reason to leave without a word
            self.frames.send(record)

    def _keep(self, record: Buffer) -> None:
        if self.transcript:
            self.transcript.add(self.role.peer.tag, record)


def bob_handshake(
    frames: FrameSocket,
    identity: RsaKey,
    group: Group,
    peer: PinnedPeer,
    refusal: Callable[[RsaKey, Trust], str] = lambda *_: "",
    evidence: bool = False,
) -> Channel | None:
    """Bob's side. He signs nothing until Alice's key is acceptable and her READY has been opened.

    `refusal` returns a reason to send her away with. Then a CLOSE follows READY in the same write, and
    there is no channel. With `evidence`, Z is kept for a transcript; otherwise it ends here. Raises
    ProtocolError, TrustError, ConnectionCut, and FileError for known_peers.
    """
    frames.deadline = time.monotonic() + HANDSHAKE_SECONDS
    offer = Offer.make(Role.BOB, identity, group)
    frames.send(offer.payload)
    hello = bytes(frames.receive(HELLO_LIMIT))
    key, z, th = offer.agree(hello)
    trust = peer.check(key)
    sealer, opener = Sealer(Role.BOB, identity, z, th), Opener(Role.ALICE, key, z, th)
    hers = bytes(frames.receive(READY_LIMIT))
    opener.open(hers, sealer)
    reason = refusal(key, trust)
    if reason:
        his = sealer.seal(RecordType.READY, offer.r, opener)
        frames.send(his, sealer.seal(RecordType.CLOSE, reason.encode(), opener))
        frames.hang_up(GOODBYE_SECONDS)
        return None
    his = sealer.seal(RecordType.READY, offer.r, opener, frames.send)
    frames.deadline = None
    beginning = transcript_beginning(offer.payload, hello, z, hers, his) if evidence else ()
    return Channel(frames, sealer, opener, trust, make_words(th, offer.r), beginning)


def alice_handshake(
    frames: FrameSocket, identity: RsaKey, groups: KeyStore, peer: PinnedPeer, evidence: bool = False
) -> Channel:
    """Alice's side. She signs nothing until Bob's parameters and his key are acceptable.

    A group that passed is remembered in `groups` at once, and not tested again. `evidence` and what is
    raised are as in `bob_handshake`.
    """
    frames.wait_for_first_byte(FIRST_BYTE_SECONDS)
    frames.deadline = time.monotonic() + HANDSHAKE_SECONDS
    hello = bytes(frames.receive(HELLO_LIMIT))
    bob = Hello.decode(Role.BOB, hello)
    assert bob.group is not None  # Bob's hello has one
    groups.accept_group(bob.group)
    offer = Offer.make(Role.ALICE, identity, bob.group)
    key, z, th = offer.agree(hello)
    trust = peer.check(key)
    sealer, opener = Sealer(Role.ALICE, identity, z, th), Opener(Role.BOB, key, z, th)
    hers = sealer.seal(RecordType.READY, b"", opener, lambda record: frames.send(offer.payload, record))
    his = bytes(frames.receive(READY_LIMIT))
    r = opener.open(his, sealer).body
    check_commitment(bob.nonce, r)
    frames.deadline = None
    beginning = transcript_beginning(hello, offer.payload, z, hers, his) if evidence else ()
    return Channel(frames, sealer, opener, trust, make_words(th, r), beginning)


# ---------------------------------------------------------------------------------------- evidence


def transcript_beginning(
    hello_bob: bytes, hello_alice: bytes, z: bytes, ready_alice: bytes, ready_bob: bytes
) -> tuple[bytes, ...]:
    """Return the first entries of a transcript."""
    return b"b" + hello_bob, b"a" + hello_alice, b"z" + z, b"A" + ready_alice, b"B" + ready_bob


class Transcript:
    """A file that proves who said what in one conversation: its frames, and Z to open them with.

    An entry is a frame that begins with a tag: the hello of Bob (`b`) or Alice (`a`), Z (`z`), a record of
    his (`B`) or hers (`A`). Every signature covers C, and C commits to the key that Z makes, so nobody can
    claim another text for a record.
    """

    def __init__(self, folder: Path, role: Role, beginning: tuple[bytes, ...]) -> None:
        """Make a new file (mode 0600), named after the time and the role. Raises FileError."""
        name = time.strftime("%Y-%m-%dT%H-%M-%SZ-", time.gmtime()) + role.value
        for suffix in itertools.count(1):
            self.path = folder / (f"{name}.transcript" if suffix == 1 else f"{name}-{suffix}.transcript")
            with disk("write", self.path), contextlib.suppress(FileExistsError):
                self._file = io.FileIO(self.path, "x", opener=_private)  # without a buffer
                break
        self._append(b"".join(map(frame, beginning)))

    def add(self, tag: bytes, record: Buffer) -> None:
        """Add a record, at once: a crash loses at most the one in flight. Raises FileError."""
        self._append(frame(tag + record))

    def _append(self, data: bytes) -> None:
        with disk("write", self.path):
            whole = self._file.tell()
            try:
                while data:
                    data = data[self._file.write(data) :]
            except BaseException:
                self._file.seek(self._file.truncate(whole))  # no file ends inside an entry
                raise


def verify_transcript(file: BinaryIO) -> Iterator[tuple[Opener, Message]]:
    """Yield what a transcript proves, trusting nobody: who signed (`sender`, `signer`), and what.

    Reads no more than one entry at a time. Raises ProtocolError at the first entry that is not right.
    """
    hello_bob = _entry(file, HELLO_LIMIT, b"b", "this is no transcript of secure-chat")
    order = "a transcript begins with both hellos, Z and both READY"
    hello_alice = _entry(file, HELLO_LIMIT, b"a", order)
    z = _entry(file, GROUP_BITS[-1] // 8, b"z", order)
    bob, alice = Hello.decode(Role.BOB, hello_bob), Hello.decode(Role.ALICE, hello_alice)
    assert bob.group is not None  # Bob's hello has one
    check_group(bob.group)
    (bob_key, _), (alice_key, _) = bob.check(bob.group), alice.check(bob.group)
    require(bob.rsa != alice.rsa, "both sides present the same key: a reflection")
    require(len(z) == len(bob.public_value), "Z is not as long as p")
    th = transcript_hash(hello_bob, hello_alice)
    bob.trace(Role.BOB, "Bob's hello. p = 2q + 1 is a safe prime, and g generates the subgroup of order q")
    alice.trace(Role.ALICE, "Alice's hello. A and B are in the subgroup of order q")
    trace("step 2, SHA-256: Z = g^ab, and th, over both hello frames", Z=z, b=hello_bob, a=hello_alice, th=th)
    for role in Role:
        key, commitment = derive_keys(z, role.label, th)
        trace(f"step 2, SHA-256: the key K, and C, of {role.label.decode()}", K=key, C=commitment)
    openers = Opener(Role.ALICE, alice_key, z, th), Opener(Role.BOB, bob_key, z, th)
    for opener, other in (openers, openers[::-1]):
        message = opener.open(_entry(file, READY_LIMIT, opener.sender.tag, order), other)
        if opener.sender is Role.BOB:
            check_commitment(bob.nonce, message.body)
            trace(f"the words, of th and r: {make_words(th, message.body)}", r=message.body)
        yield opener, message
    for header in iter(lambda: file.read(5), b""):
        require(len(header) == 5 or header == bytes(4), "the transcript ends in the middle of an entry")
        speaks = [opener.sender.tag == header[4:] for opener in openers]
        require(any(speaks), "an entry is of no known kind, or not where it belongs")
        opener, other = openers if speaks[0] else openers[::-1]
        message = opener.open(_payload(file, RECORD_LIMIT, header), other)
        yield opener, message
        if message.type is RecordType.CLOSE:
            require(not file.read(1), "something follows the goodbye")
            return


def _entry(file: BinaryIO, limit: int, tag: bytes, reason: str) -> bytes:
    """Read the next entry, which must have this tag; return what it marks."""
    header = file.read(5)
    require(header[4:] == tag, reason)
    return _payload(file, limit, header)


def _payload(file: BinaryIO, limit: int, header: bytes) -> bytes:
    length = int.from_bytes(header[:4], "big") - 1  # without the tag
    require(length <= limit, f"an entry of {length} bytes, over the limit of {limit}")
    payload = file.read(max(length, 0))
    require(len(payload) == length, "the transcript ends in the middle of an entry")
    return payload


# ------------------------------------------------------------------------------------- keys on disk

# How files are opened: not through a symbolic link, and without waiting for a pipe.
_OPEN_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


class KeyStore:
    """One person's own folder: `identity.pem`, `dh_parameters.pem`, `known_peers`.

    Files are replaced whole or not at all, and never read through a symbolic link or where another user
    could have written them. Every method may raise FileError, which says what to do.
    """

    IDENTITY, GROUP, KNOWN_PEERS = "identity.pem", "dh_parameters.pem", "known_peers"

    def __init__(self, folder: Path) -> None:
        """Open the folder, made (mode 0700) where it is missing."""
        self.folder = folder
        for part in (*folder.absolute().parents[::-1], folder):
            with disk("make", part):
                part.mkdir(mode=0o700, exist_ok=True)
        with disk("read", folder):
            _check_owner(folder, folder.stat(), 0o022)
            _check_parents(folder)

    def load_identity(self, ask_passphrase: Callable[[str], str]) -> RsaKey | None:
        """Return the private RSA key, or None if there is none yet."""
        path = self.folder / self.IDENTITY
        pem = self.read(self.IDENTITY, forbidden=0o077)
        if pem is None:
            return None
        try:
            try:
                key = RSA.import_key(pem)
            except PassphraseRequiredError:
                key = RSA.import_key(pem, os.fsencode(ask_passphrase(f"Passphrase of {path}: ")))
        except (PassphraseRequiredError, IncorrectPassphraseError):
            raise FileError(f"that is not the passphrase of {path}") from None
        except UNPARSABLE:
            raise FileError(
                f"{path} is damaged, or no RSA key; restore it, or move it away for a new one"
            ) from None
        if not (key.has_private() and key.size_in_bits() in RSA_BITS and key.e == RSA_EXPONENT):
            raise FileError(f"{path} is no private RSA key of 2048 to 4096 bits with exponent 65537")
        return key

    def make_identity(self) -> RsaKey:
        """Make an RSA key of 3072 bits and keep it; return it, or the one another program just made."""
        key = RSA.generate(NEW_RSA_BITS, e=RSA_EXPONENT)
        with self.locked():
            made = self.load_identity(lambda _: "")
            if made is None:
                self.write(self.IDENTITY, key.export_key("PEM", pkcs=8) + b"\n")
        return made or key

    def load_group(self, named: Path | None = None) -> Group | None:
        """Return the group in a file that is named, tested as a peer's is; or the one kept here, if any."""
        path = named or self.folder / self.GROUP
        pem = read_file(path, forbidden=0) if named else self.read(self.GROUP)
        if pem is None and named:
            raise FileError(f"there is no file {path}")
        if pem is None:
            return None
        try:
            group = Group.load(pem)
            check_group(group, rounds=64 if named else 0)
        except (ValueError, ProtocolError) as error:
            raise FileError(
                f"{path} holds no usable Diffie-Hellman parameters ({error}); move it away"
            ) from None
        return group

    def save_group(self, group: Group) -> None:
        with self.locked():
            self.write(self.GROUP, group.export())

    def accept_group(self, group: Group) -> None:
        """Check a peer's group, and keep it once it has passed: a p that is kept is not tested again."""
        pem = group.export()
        if self.read(self.GROUP) == pem:
            return
        check_group(group)
        with contextlib.suppress(FileError):  # then it is tested again the next time
            self.save_group(group)

    def read(self, name: str, forbidden: int = 0o022) -> bytes | None:
        """Return a file's bytes, None if there is none. By default, nobody else may be able to write it."""
        return read_file(self.folder / name, forbidden)

    def write(self, name: str, data: bytes) -> None:
        """Replace a file (mode 0600): whatever happens, the old or the new one is there. Needs the lock."""
        path = self.folder / name
        temporary = self.folder / f".{name}.new"
        with disk("write", path):
            temporary.unlink(missing_ok=True)  # left by a program that was killed here
            try:
                with open(temporary, "xb", opener=_private) as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other program that uses this folder out while something is read and then written."""
        with contextlib.ExitStack() as stack:
            path = self.folder / ".lock"
            with disk("lock", path):
                file = stack.enter_context(open(path, "ab", opener=_private))
                if sys.platform == "win32":
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                else:
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file to read, not through a symbolic link. Raises OSError, and FileError."""
    with open(path, "rb", opener=_private) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise FileError(f"{path} is not a regular file; move it away, or name another one")
        yield file


def read_file(path: Path, forbidden: int) -> bytes | None:
    """Return a regular file's bytes, or None. Nobody else may have the `forbidden` rights to it."""
    with disk("read", path), contextlib.suppress(FileNotFoundError), open_regular(path) as file:
        info = os.fstat(file.fileno())
        if forbidden:
            _check_owner(path, info, forbidden)
        if info.st_size > FILE_LIMIT:
            raise FileError(f"{path} is larger than {FILE_LIMIT} bytes; move it away")
        return file.read(FILE_LIMIT)
    return None


def _private(file: str, flags: int) -> int:
    return os.open(file, flags | _OPEN_FLAGS, 0o600)


@contextlib.contextmanager
def disk(what: str, path: Path) -> Iterator[None]:
    """Turn an error of the disk into a FileError that names the file."""
    try:
        yield
    except OSError as error:
        reason = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror or str(error)
        raise FileError(f"cannot {what} {path}: {reason}") from None


def _check_owner(path: Path, info: os.stat_result, forbidden: int) -> None:
    if os.name != "posix":
        return
    if info.st_uid != os.geteuid():
        raise FileError(f"{path} belongs to another user; move it away, or take it over with chown")
    if info.st_mode & forbidden:
        raise FileError(
            f"{path} is open to other users (mode {stat.S_IMODE(info.st_mode):04o}); "
            f"run: chmod go-rwx {shlex.quote(str(path))}"
        )


def _check_parents(folder: Path) -> None:
    """Refuse a folder in which another user could put a folder of theirs in the place of `folder`."""
    if sys.platform == "win32":
        return
    for parent in (*folder.absolute().parents, *folder.resolve().parents):  # also behind a symbolic link
        info = parent.stat()
        if os.geteuid() not in (0, info.st_uid) and info.st_uid != 0:
            raise FileError(f"{parent} belongs to another user, who can move what is in it; see --home")
        others = info.st_mode & stat.S_IWOTH
        group = info.st_mode & stat.S_IWGRP and not _is_own_group(info.st_gid)
        if (
            others or group
        ) and not info.st_mode & stat.S_ISVTX:  # sticky: as in /tmp, only owners move files
            raise FileError(
                f"other users can move what is in {parent} (mode {stat.S_IMODE(info.st_mode):04o}); "
                f"run: chmod {'o' if others else 'g'}-w {shlex.quote(str(parent))}"
            )


def _is_own_group(gid: int) -> bool:
    """Whether this is the group that many systems make for each user, with nobody else in it."""
    with contextlib.suppress(KeyError):
        group = grp.getgrgid(gid)
        user = pwd.getpwuid(os.geteuid()).pw_name
        return group.gr_name == user and set(group.gr_mem) <= {user}
    return False


class Trust(NamedTuple):
    """What is known of a key that was presented, when it is not refused."""

    known: bool  # it is the pinned one
    asked_for: bool = False  # it is the one of --peer
    also: tuple[str, ...] = ()  # other names under which this key is pinned
    others: tuple[str, ...] = ()  # names under which another key is pinned

    @property
    def settled(self) -> bool:
        """Whether nobody need be asked about it."""
        return self.known or self.asked_for


class PinnedPeer:
    """Whether a peer's key is to be trusted: trust on first use, in the manner of OpenSSH's known_hosts.

    `known_peers` is text, a line for each key: name, "ssh-rsa", base64. A name may have several lines.
    The name is "alice" in Bob's file, and "[host]:port" in Alice's, in upper or lower case. With `only`, the
    one key with that fingerprint is accepted, and takes the place of what was pinned.
    """

    def __init__(self, store: KeyStore, name: str, only: str | None = None) -> None:
        self.name = name.lower()
        self.only = only
        self.path = store.folder / KeyStore.KNOWN_PEERS
        self._store = store

    def check(self, key: RsaKey) -> Trust:
        """Return what is known of a key, before anything is signed. Raises TrustError for a wrong key."""
        return self._judge(key, self.pins())

    def _judge(self, key: RsaKey, pins: list[Pin]) -> Trust:
        presented, line = fingerprint(key), ssh_line(key)
        mine = [pin for pin in pins if pin.name == self.name]
        known = line in (pin.key for pin in mine)
        if self.only is not None:
            if presented != self.only:
                raise TrustError(
                    f"the key of {self.name} is not the one asked for\n"
                    f"  asked for: {self.only}\n"
                    f"  presented: {presented}\n"
                    "Somebody may be in between. Or the fingerprint was not copied whole, or is an old one.",
                    presented,
                    (self.only,),
                )
            return Trust(known, asked_for=True)
        if mine and not known:
            expected = tuple(fingerprint(RSA.import_key(pin.key)) for pin in mine)
            raise TrustError(
                f"the key of {self.name} is not the pinned one\n"
                + "".join(
                    f"  pinned:    {known_as}\n             ({self.path}, line {pin.number})\n"
                    for pin, known_as in zip(mine, expected)
                )
                + f"  presented: {presented}\n"
                "Nothing was sent. Either somebody is in between, or the other side has a new key. Ask them "
                "for their fingerprint, in person or by telephone. If it is the one presented, start again "
                f"with this option, and the new key takes the old one's place:\n  --peer {presented}\n"
                "If it is any other, do not connect.",
                presented,
                expected,
            )
        return Trust(
            known,
            also=tuple(pin.name for pin in pins if pin.key == line and pin.name != self.name),
            others=tuple(pin.name for pin in pins if pin.key != line),
        )

    def pin(self, key: RsaKey) -> int:
        """Remember a key that `check` found new; return its line in known_peers.

        Call it once the key's owner has proven to hold it and, at a terminal, a person has accepted it. It
        checks again, under the lock: another program may have pinned another key since.
        """
        with self._store.locked():
            lines = self._lines()
            pins = self._pins(lines)
            if not self._judge(key, pins).known:
                replaced = {pin.number for pin in pins if pin.name == self.name}  # only --peer replaces a pin
                lines = [line for number, line in enumerate(lines, 1) if number not in replaced]
                lines.append(f"{self.name} {ssh_line(key)}")
                self._store.write(KeyStore.KNOWN_PEERS, "".join(line + "\n" for line in lines).encode())
                pins = self._pins(lines)
            return next(pin.number for pin in pins if (pin.name, pin.key) == (self.name, ssh_line(key)))

    def pins(self) -> list[Pin]:
        return self._pins(self._lines())

    def _lines(self) -> list[str]:
        try:
            lines = (self._store.read(KeyStore.KNOWN_PEERS) or b"").decode("utf-8-sig").split("\n")
        except UnicodeDecodeError:
            raise FileError(f"{self.path} is damaged: it is not UTF-8 text") from None
        return lines[:-1] if lines[-1] == "" else lines

    def _pins(self, lines: list[str]) -> list[Pin]:
        """Return what the lines pin. A line that is not understood is refused, not passed over."""
        form, pattern = "[HOST]:PORT", r"\[[^][,*?\s]+\]:(0|[1-9][0-9]{0,4})"
        if self.name == "alice":
            form = pattern = "alice"
        pins = []
        for number, line in enumerate(lines, 1):
            name, *key = line.split()[:3] or ["#"]
            if name.startswith("#"):
                continue
            pin = Pin(number, name.lower(), " ".join(key))
            if not (re.fullmatch(pattern, pin.name) and _is_ssh_line(pin.key)):
                problem = f"not {form} ssh-rsa BASE64; mend or delete the line"
                raise FileError(f"{self.path}, line {number}: {problem}")
            pins.append(pin)
        return pins


class Pin(NamedTuple):
    """A line of known_peers."""

    number: int  # from 1
    name: str
    key: str  # as `ssh_line` returns it


def _is_ssh_line(line: str) -> bool:
    """Whether `line` is "ssh-rsa AAAA..." in its canonical encoding."""
    try:
        return ssh_line(RSA.import_key(line)) == line
    except UNPARSABLE:
        return False


# ------------------------------------------------------------------------------ text from the peer

# Unicode's classes Cc but for the tab, Cf, Cs, Zl, Zp, and the unassigned that are ignored by default.
_UNSAFE = (
    r"\0-\x08\x0a-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff"
    r"\ufff0-\ufffb\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e00ff"
    r"\U000e01f0-\U000e0fff"
)
# What may stand all the same: a joiner inside an emoji, or in a word of a script that needs it, and the tags
# of a flag. (Arabic number signs, of class Cf too, are not in the list above: they are visible.)
_JOINER = rf"(?<=[^\0-\x7f{_UNSAFE}])[\u200c\u200d](?=[^\0-\x7f{_UNSAFE}])"
_FLAG = r"(?<=\U0001f3f4)[\U000e0030-\U000e0039\U000e0061-\U000e007a]{1,6}\U000e007f"
_ESCAPE = f"(?P<harmless>{_JOINER}|{_FLAG})|[{_UNSAFE}]+"  # compiled when it is first needed


def printable(text: str) -> str:
    """Return text that cannot drive a terminal: controls, bidi and other format characters are escaped."""
    if text.isprintable():
        return text
    return re.sub(_ESCAPE, lambda m: m[0] if m["harmless"] else m[0].encode("unicode_escape").decode(), text)


def screen_lines(text: str, columns: int | None = None) -> list[str]:
    """Return the printable lines of a text, broken to `columns`, after a space where possible.

    What is not ASCII counts as two columns wide, which is never too little; a tab counts as eight. If each
    line is printed behind a mark, none can imitate a line of the program.
    """
    lines = text.split("\n")
    if not text.replace("\n", "").isprintable():
        lines = list(map(printable, lines))
    if columns is None:
        return lines
    columns, rows = max(columns, 8), []
    for line in lines:
        if len(line) <= columns and line.isascii() and "\t" not in line:
            rows.append(line)
            continue
        at = 0
        while True:
            row = line[at : at + columns]
            while (over := _width(row) - columns) > 0:
                row = row[: -over // (8 if "\t" in row else 2)]
            if at + len(row) < len(line):
                row = row[: row.rfind(" ") + 1] or row
            rows.append(row)
            at += len(row)
            if at >= len(line):
                break
    return rows


def _width(text: str) -> int:
    """Return how many columns a text takes, or more."""
    return 2 * len(text) - len(text.encode("ascii", "ignore")) + 7 * text.count("\t")


# ==================================================================================================
# Above this line, bytes go in and bytes come out. Below it is a person at a terminal, for both programs.
# ==================================================================================================

# Whether the prompt is there all the time. It needs GNU readline (libedit never calls the hook) and timers;
# elsewhere it is there in one's own turn. (On Windows, the terminal itself edits lines.)
try:
    import readline

    ALWAYS_PROMPT = "libedit" not in (readline.__doc__ or "")
except ImportError:
    ALWAYS_PROMPT = False
OBEYS_ESCAPES = os.environ.get("TERM", "dumb") != "dumb"  # whether the terminal knows more than letters
ERASE_ROW, ERASE_ROW_ABOVE = ("\r\x1b[K", "\x1b[A\r\x1b[K") if OBEYS_ESCAPES else ("\n", "")
TICK = 0.02  # seconds between two looks for something that arrived, while a person types
LINE_LIMIT = TEXT_LIMIT + 2  # bytes of a line from a pipe: the longest text, and its end
INBOX_LIMIT = 100
READLINE_SETTINGS = ["disable-completion on", "horizontal-scroll-mode on"]  # the prompt is always one row
if OBEYS_ESCAPES:
    READLINE_SETTINGS.append("enable-bracketed-paste on")  # lines that are pasted together are one message
BUSY = "Bob is talking to somebody else; try again later"
CONNECTED_AGAIN = "you connected again, and go on there"
NOT_ACCEPTED = "your key was not accepted"
NOT_NOW = "the question about your key was not answered; try again later"
QUESTION_SECONDS = 600.0  # that a question may keep others away from Bob
TAKEOVER_SECONDS = 0.05  # for a goodbye to a connection that was replaced by another
LEAVING_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)
]
HELP = """\
Type a line and press Enter to send it, when it is your turn. Lines that you paste together are one message.
  /words   show the six words
  /help    show this
  /quit    leave, as Ctrl-D and Ctrl-C"""


class NoConnection(Exception):
    """There is no connection, or none can be waited for."""


class PersonLeft(Exception):
    """The person at this terminal leaves the conversation."""


class NotAccepted(TrustError):
    """The person does not accept the peer's key."""


class Replaced(Exception):
    """Another connection, `channel`, takes the place of this one."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self.channel = channel


class Woken(Exception):
    """Something has arrived while a person was typing."""


# How each failure is told, and the exit status. An OSError that is none of the others comes from standard
# input or output: the network's errors become ConnectionCut or NoConnection, the disk's FileError.
FAILURES: dict[type[Exception], tuple[str, int]] = {
    argparse.ArgumentTypeError: ("Usage", 2),
    NoConnection: ("No connection", 1),
    ConnectionCut: ("Cut off", 1),
    FileError: ("Stopped", 1),
    OSError: ("Stopped: cannot use the terminal, or the pipe in its place", 1),
    MemoryError: ("Stopped: there is not enough memory", 1),
    ProtocolError: ("Broken off", 3),
    TrustError: ("Refused", 3),
}


def describe(error: Exception) -> tuple[str, int]:
    """Return how a failure is told, and the exit status that goes with it."""
    told, status = next(FAILURES[kind] for kind in type(error).__mro__ if kind in FAILURES)
    return (f"{told}: {error}" if str(error) else told), status


class Inbox:
    """What other threads hand to the main thread: lines to show, and channels. No thread ever waits for it.

    It has a file descriptor, which is ready to be read while there is something in it.
    """

    def __init__(self) -> None:
        self._items: deque[str | Channel] = deque()
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._theirs.setblocking(False)

    def fileno(self) -> int:
        return self._ours.fileno()

    def wake_on_signals(self, wake: bool) -> None:
        """Let each signal end a `select` for this inbox, also one that comes just before it."""
        signal.set_wakeup_fd(self._theirs.fileno() if wake else -1, warn_on_full_buffer=False)

    def put(self, item: str | Channel) -> bool:
        """Add an item; return False, and drop it, where there is no room."""
        if len(self._items) >= INBOX_LIMIT:
            return False
        self._items.append(item)
        with contextlib.suppress(BlockingIOError):
            self._theirs.send(b"!")
        return True

    def take(self) -> list[str | Channel]:
        """Return and remove all items."""
        with contextlib.suppress(BlockingIOError):
            while self._ours.recv(4096):
                pass
        return [self._items.popleft() for _ in range(len(self._items))]


def columns(stream: TextIO) -> int | None:
    """Return the width of a terminal, None of anything else."""
    return (os.get_terminal_size(stream.fileno()).columns or 80) if stream.isatty() else None


def marked(mark: str, text: str, stream: TextIO) -> str:
    """Put a mark before the peer's text and a bar before each further row: none passes for the program's."""
    if stream.encoding.lower() != "utf-8":  # the text as it will be printed
        text = text.encode(stream.encoding, "backslashreplace").decode(stream.encoding)
    width = columns(stream)
    return mark + f"\n{'|':>{len(mark) - 1}} ".join(screen_lines(text, width and width - len(mark)))


class Console:
    """What one person sees and types. Only the main thread uses it, except for the inbox.

    The conversation goes to standard output, everything else to standard error. At a terminal, lines are
    typed at a prompt; from a pipe, each line is a message.
    """

    def __init__(self, role: Role) -> None:
        self.me, self.peer = role.value.title(), role.peer.value.title()
        self.has_person = sys.stdin.isatty()
        self.has_prompt = self.has_person and sys.stdout.isatty()
        self.can_ask = self.has_person and sys.stderr.isatty()
        self.inbox = Inbox()
        self.post: Callable[[str], object] = self.inbox.put  # shows a line of another thread
        self.status = 0  # the exit status after a goodbye: 1 if a line from a pipe could not be sent
        self.draft = ""  # typed at the prompt, and not sent yet
        self.leaving = 0  # the signal that asked the program to end
        self._screen_is_gone = False  # whether a stopped screen was given up then
        self._leaves_by = 0.0
        self._erase = ""  # what takes a prompt, or progress, away that stands in the last row of the screen
        self._ahead = False  # whether something had been typed already when the prompt came
        self._lines: list[str] = []  # typed at the prompt, and not used yet
        self._typed = bytearray()  # read from standard input without a prompt, and not used yet
        self._ended = False  # whether standard input has ended
        self.nowhere = os.open(os.devnull, os.O_RDWR)

    # What a person sees.

    def write(self, text: str, stream: TextIO) -> None:
        """Write in one go, in the place of a prompt or of progress. Raises OSError."""
        erase, self._erase = self._erase, ""
        if erase and not stream.isatty():
            (sys.stdout if sys.stdout.isatty() else sys.stderr).write(erase)
            erase = ""
        if sys.platform != "win32":
            while not select.select([], [stream], [], 1.0)[1]:
                pass  # a stopped screen: a signal always ends this wait, but not always a write
        stream.write(erase + text)
        stream.flush()

    def notice(self, text: str) -> None:
        """Tell the person something that is not part of the conversation. Raises OSError.

        Lines are broken between words for a terminal, but not those that are indented: fingerprints, paths
        and commands stay whole.
        """
        width, rows = columns(sys.stderr), []
        for line in map(printable, text.split("\n")):
            if width is None or not line or line.startswith("  "):
                rows.append(line)
            else:
                rows += textwrap.wrap(line, max(width, 20), break_long_words=False, break_on_hyphens=False)
        self.write("".join(row + "\n" for row in rows), sys.stderr)

    def progress(self, text: str) -> None:
        """Show a row that the next one takes the place of, on a terminal only."""
        if sys.stderr.isatty():
            self.write(text[: (columns(sys.stderr) or 80) - 1], sys.stderr)
            self._erase = ERASE_ROW

    def show(self, name: str, text: str) -> None:
        """Show a message of the peer's. At a terminal, a check mark says that it was verified."""
        mark = f"{name}: "
        if sys.stdout.isatty():
            mark = f"{name} \N{CHECK MARK} " if "utf" in sys.stdout.encoding.lower() else f"{name} + "
        rows = marked(mark, text, sys.stdout)
        if sys.stdout.isatty() and OBEYS_ESCAPES and "NO_COLOR" not in os.environ:
            rows = f"\x1b[32m{mark}\x1b[0m" + rows[len(mark) :]
        self.write(rows + "\n", sys.stdout)

    def show_own(self, text: str) -> None:
        """Show a message that was sent, in the place of the row in which it was typed."""
        self.draft = ""
        if self.has_prompt:
            self.write(marked(f"{self.me}: ", text, sys.stdout) + "\n", sys.stdout)

    def show_goodbye(self, name: str, goodbye: Message, *, trusted: bool = True) -> None:
        """Show who left. From somebody who is not trusted yet, only this program's own reasons are shown."""
        known = trusted or goodbye.text in (BUSY, CONNECTED_AGAIN, NOT_ACCEPTED, NOT_NOW)
        reason = goodbye.text if known else ""
        told = marked(f"{name} left: ", reason, sys.stderr) if reason else f"{name} left."
        self.write(told + "\n", sys.stderr)
        if goodbye.crossed:
            self.notice(f"{name} left before the last message had arrived.")

    def finish_row(self) -> None:
        """Keep what stands in the last row of the screen, and begin the next row."""
        unfinished, self._erase = self._erase == ERASE_ROW, ""
        if unfinished:
            with contextlib.suppress(OSError):
                self.write("\n", sys.stdout if sys.stdout.isatty() else sys.stderr)

    # What a person types.

    def ask(self, question: str) -> str:
        """Return the answer to a question outside of a conversation. Ctrl-D and /quit are as Ctrl-C."""
        answer = None
        try:
            while answer is None:
                answer = self._prompted_line(question, lambda: False)
        except PersonLeft:
            raise KeyboardInterrupt from None
        self.draft = self._erase = ""
        if answer.strip().lower() == "/quit":
            raise KeyboardInterrupt
        return answer.strip()

    def next_line(self, channel: Channel) -> str | None:
        """Return what the person says next, or None when something may have arrived. Raises PersonLeft."""
        others: list[Waitable] = [channel.frames.socket, self.inbox]
        if not channel.my_turn and not (self.has_prompt and ALWAYS_PROMPT):
            select.select(others, [], [])
            return None
        if not self.has_prompt:
            data = self.read_line(others)
            if data == b"":
                raise PersonLeft
            line = data and data.removesuffix(b"\n").removesuffix(b"\r")
            return line if line is None else line.decode(sys.stdin.encoding, "surrogateescape")
        self._ahead = sys.platform != "win32" and bool(select.select([sys.stdin], [], [], 0)[0])
        prompt = f"{self.me}: " if channel.my_turn else f"({self.peer}'s turn) "
        typed = self._prompted_line(prompt, lambda: bool(select.select(others, [], [], 0)[0]))
        return typed if typed is None else self._obey(typed, channel)

    def _obey(self, line: str, channel: Channel) -> str | None:
        """Return a line that can be sent now; do what a command asks for. Other lines stay the draft."""
        command = line.strip().lower()
        answers = {"/help": HELP, "/words": f"Words: {channel.words}"}
        if command == "/quit" or command in answers:
            self.draft = ""
        if command == "/quit":
            raise PersonLeft
        if command in answers:
            self.notice(answers[command])
        elif line.startswith("/"):
            self.notice(
                "Not sent: a line that begins with / is a command. To send it, put a space before it."
            )
        elif not channel.my_turn:
            self.notice(f"Not sent: it is {self.peer}'s turn. Your line is kept.")
        elif self._ahead:
            self.notice("Not sent: you typed this before you could see what it answers. Enter sends it.")
        else:
            return line
        return None

    def _prompted_line(self, prompt: str, ready: Callable[[], bool]) -> str | None:
        """Return a line that was typed at the prompt, or None as soon as `ready` or continued after Ctrl-Z.

        `readline` does all the editing. A timer looks again and again whether something is ready. Then an
        exception ends input(), and what has been typed becomes the draft, with which the next line begins.
        """
        begun = False
        last = time.monotonic()

        def begin() -> None:
            nonlocal begun
            readline.insert_text(self.draft)
            begun = True

        def tick(_: int, frame: FrameType | None) -> None:
            nonlocal last
            now = time.monotonic()
            was_stopped, last = now - last > 10 * TICK, now
            # Not in begin(), where an exception is lost: so may a signal's have been, before the line began.
            in_input = frame is not None and frame.f_code is Console._prompted_line.__code__
            if in_input and (self.leaving or (begun and (was_stopped or ready()))):
                signal.setitimer(signal.ITIMER_REAL, 0)
                if begun:
                    self.draft = readline.get_line_buffer()
                raise Woken

        if self._erase:  # the prompt of before
            self.write("", sys.stdout)
        self._erase = ERASE_ROW
        try:
            if ALWAYS_PROMPT:
                self.inbox.wake_on_signals(False)  # the timer is one
                readline.set_startup_hook(begin)
                signal.signal(signal.SIGALRM, tick)
                signal.siginterrupt(signal.SIGALRM, False)  # or else what readline writes then would be lost
                signal.setitimer(signal.ITIMER_REAL, TICK, TICK)
            try:
                # All of it in C: no exception comes between the end of input() and the line being kept.
                self._lines.extend(map(input, [prompt]))
            finally:
                if ALWAYS_PROMPT:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    self.inbox.wake_on_signals(True)
        except EOFError:
            self.finish_row()
            raise PersonLeft from None
        except (Woken, SystemError):  # CPython raises SystemError where two signals raise at once
            pass
        if self.leaving:
            self._leave()
        if not self._lines:
            return None
        self._erase, self.draft = ERASE_ROW_ABOVE, self._lines.pop(0).rstrip("\n")  # a paste may end with one
        return self.draft

    def read_line(self, others: Sequence[Waitable], seconds: float | None = None) -> bytes | None:
        """Return a line of standard input with its end, b"" after the last; None if `others` are ready.

        What was read of a line is kept, whatever interrupts the reading: a line is returned whole. (What is
        too long to be sent is returned too long, but not to its end.) Raises TimeoutError after `seconds`.
        """
        stdin = sys.stdin.fileno()
        while True:
            whole = self._ended or b"\n" in self._typed
            if sys.platform != "win32":
                waiting = [*others] if whole else [*others, stdin]
                ready = select.select(waiting, [], [], 0 if whole else seconds)[0]
                if ready not in ([], [stdin]):
                    return None
                if not (ready or whole):
                    raise TimeoutError
            if whole:
                line, end, self._typed = self._typed.partition(b"\n")
                return bytes(line + end)
            data = os.read(stdin, 65536)
            self._ended = not data
            begin, newline, rest = data.partition(b"\n")
            self._typed += begin[: max(0, LINE_LIMIT + 1 - len(self._typed))] + newline + rest

    def begin_answer(self, question: str) -> None:
        """Ask; `read_answer` tells what is answered."""
        self.write(question, sys.stderr)
        self._erase = ERASE_ROW

    def read_answer(self, others: Sequence[Waitable], seconds: float | None) -> str | None:
        """Return an answer, "" for Ctrl-D; None as soon as one of `others` is ready. Raises TimeoutError."""
        data = self.read_line(others, seconds)
        if data is None:
            return None
        if data:
            self._erase = ""
        self.finish_row()
        self._ended = False  # Ctrl-D ends the answer, not the terminal
        return data.decode(errors="replace")

    def takes_back_ctrl_c(self) -> bool:
        """Whether Ctrl-C was an answer only: then the program goes on, if there is still a screen."""
        if self.leaving != signal.SIGINT or self._screen_is_gone:
            return False
        self.leaving = 0
        self.finish_row()
        return True

    def forget_input(self) -> None:
        """Drop what was typed at a terminal until now: it was not an answer to what comes next."""
        self.draft = ""
        if sys.stdin.isatty():
            self._typed.clear()
            if sys.platform != "win32":
                with contextlib.suppress(termios.error):
                    termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)

    def on_signal(self, number: int, _: object) -> None:
        """End what is being done, by KeyboardInterrupt; from now on, a stopped screen holds up nothing.

        Further signals are ignored for as long as a goodbye may take.
        """
        # Before any call: calls fail where another exception (Woken) is on its way. The signal must count.
        earlier, self.leaving = self.leaving, number
        if earlier and time.monotonic() < self._leaves_by:
            self.leaving = earlier
            return
        self._leave()

    def _leave(self) -> NoReturn:
        self._leaves_by = time.monotonic() + 3 * GOODBYE_SECONDS
        if self.leaving == signal.SIGINT and sys.stderr.isatty():
            self._erase = self._erase or ERASE_ROW  # the terminal shows ^C in the last row
        if sys.platform != "win32":
            for stream in (sys.stdout, sys.stderr):
                if not select.select([], [stream], [], 0)[1]:
                    os.dup2(self.nowhere, stream.fileno())
                    self._screen_is_gone = True
        raise KeyboardInterrupt

    def on_lost_exception(self, lost: sys.UnraisableHookArgs) -> None:
        """A signal that came in a finalizer, where its exception is lost, comes once more."""
        if lost.exc_type is not KeyboardInterrupt:
            sys.__unraisablehook__(lost)
            return

        def come_again(number: int = self.leaving) -> None:
            self.leaving = 0  # not sooner: another signal would be raised in here
            os.kill(os.getpid(), number)

        threading.Timer(TICK, come_again).start()


class StepHandler(logging.Handler):
    """Shows the steps of the protocol, shortened or whole. It has no lock that a thread could wait for."""

    def __init__(self, console: Console, whole: bool) -> None:
        super().__init__()
        self._console = console
        self._whole = whole

    def handle(self, record: logging.LogRecord) -> bool:
        rows = [record.getMessage()[:1].upper() + record.getMessage()[1:] + "."]
        width = max(columns(sys.stderr) or 100, 40) - 15
        for name, value in self._parts(getattr(record, "values", {})):
            text = (to_bytes(value) if isinstance(value, int) else bytes(value)).hex()
            if len(text) > width and not self._whole:
                size = f"... ({len(text) // 2} bytes)"
                text = text[: width - len(size)] + size
            parts = [text[at : at + width] for at in range(0, len(text), width)] or [""]
            rows += [f"  {name:11}  {parts[0]}", *(f"  {'':11}  {part}" for part in parts[1:])]
        if threading.current_thread() is threading.main_thread():
            self._console.notice("\n".join(rows))
        else:
            self._console.post("\n".join(rows))
        return True

    @staticmethod
    def _parts(values: dict[str, Buffer | int]) -> Iterator[tuple[str, Buffer | int]]:
        """Yield the values, with a plaintext taken apart."""
        for name, value in values.items():
            if name == "plaintext" and isinstance(value, bytes):
                end = value.rindex(b"\x80")
                yield from (("type", value[:1]), ("in_reply_to", value[1:33]), ("body", value[33:end]))
                yield "padding", value[end:]
            else:
                yield name, value


# A conversation, from the question of trust to the goodbye.


@contextlib.contextmanager
def hanging_up(console: Console, channel: Channel) -> Iterator[None]:
    """Hang up at the end, after a goodbye unless the line is broken. Ctrl-C becomes PersonLeft."""
    try:
        yield
    except (KeyboardInterrupt, PersonLeft):
        for step in (console.finish_row, channel.close):
            with contextlib.suppress(KeyboardInterrupt):  # a second one cuts the goodbye short
                step()
        raise PersonLeft from None
    except TrustError as error:
        channel.close(NOT_ACCEPTED if isinstance(error, NotAccepted) else NOT_NOW)
        raise
    except (ConnectionCut, ProtocolError, Replaced):
        raise
    except BaseException:
        channel.close()
        raise
    finally:
        channel.frames.hang_up()
        if console.draft:
            console.notice(f"This was not sent:\n  {console.draft}")
            console.draft = ""
        if channel.transcript:
            script = "bob_server.py" if channel.role is Role.BOB else "alice_client.py"
            path = shlex.quote(str(channel.transcript.path))
            console.notice(f"To check what was said:\n  python3 {script} --verify {path}")


def take_inbox(console: Console, current: Channel | None) -> Channel | None:
    """Show what other threads told; return the channel that takes the place of the current one, if any."""
    latest = current
    for item in console.inbox.take():
        if isinstance(item, str):
            console.notice(item)
            continue
        if latest is not None:
            same = latest.peer_key == item.peer_key
            console.notice(
                f"{console.peer} {'connected again' if same else 'is here, with a key that you know'}."
            )
            latest.close(CONNECTED_AGAIN if same else BUSY, TAKEOVER_SECONDS)
        latest = item
    return None if latest is current else latest


def meet(console: Console, channel: Channel, peer: PinnedPeer, transcripts: Path | None) -> None:
    """Settle who is at the other end, pin a new key, and say how to begin. Raises TrustError for a no."""
    key, name = channel.peer_key, console.peer
    trust = peer.check(key)  # once more: it may have been pinned since the handshake
    if trust.settled:
        console.notice(f"{name} is here, with the key you {'know' if trust.known else 'asked for'}.")
        console.notice(f"  {fingerprint(key)}")
        asked = False
    else:
        console.notice(f"{name} is here. This key is new to you:")
        console.notice(f"  {fingerprint(key)}")
        if trust.also:
            console.notice(f"You know the same key as: {', '.join(trust.also)}.")
        if trust.others:
            console.notice(f"You know other keys as: {', '.join(trust.others)}.")
        asked = console.has_person
    console.notice(f"Words: {channel.words}")
    if asked:
        ask_about_key(console, channel)
    if not trust.known:
        line = peer.pin(key)
        console.notice(f"The key is pinned. If {name} finds other words, leave, and delete this line:")
        console.notice(f"  {peer.path}, line {line}")
    if transcripts:
        channel.transcript = Transcript(transcripts, channel.role, channel.beginning)
        console.notice("Whoever has this file can read the conversation, and check who said what:")
        console.notice(f"  {channel.transcript.path}")
    console.forget_input()
    first = "You speak" if channel.role is Role.ALICE else f"{name} speaks"
    console.notice(
        f"{first} first. {name} may still be deciding about your key. /help lists what you can type."
    )


def ask_about_key(console: Console, channel: Channel) -> None:
    """Ask until the person has accepted the key. Raises TrustError for a no.

    The question is about this connection alone: input from before is dropped, and no record is opened
    while it stands. It is void when the connection ends (ConnectionCut) or is replaced (Replaced).
    """
    name, presented = console.peer, fingerprint(channel.peer_key)
    no = NotAccepted(f"you did not accept {name}'s key; nothing is pinned", presented)
    if not console.can_ask:
        raise TrustError(
            "this key is new, and standard error is no terminal to ask about it at; see --peer", presented
        )
    console.notice(
        f"Compare the words with {name}, by telephone or in person: the same six must stand on both screens. "
        f"If they differ, somebody is in between: answer no. Instead of yes, you can type the words or the "
        f"fingerprint that {name} reads to you."
    )
    deadline = time.monotonic() + QUESTION_SECONDS if channel.role is Role.BOB else math.inf
    others: list[Waitable] = [console.inbox]
    with contextlib.ExitStack() as stack:
        if hasattr(select, "EPOLLRDHUP"):  # Linux; elsewhere, a cut is noticed after the answer
            cut = stack.enter_context(select.epoll())
            cut.register(channel.frames.socket, select.EPOLLRDHUP)
            others.append(cut)
        try:
            console.forget_input()  # what was typed before was no answer to this
            console.begin_answer(f"Is this {name}'s key, yes or no? ")
            while True:
                left = None if deadline == math.inf else max(deadline - time.monotonic(), 0.0)
                answer = console.read_answer(others, left)
                if answer is None:
                    successor = take_inbox(console, channel)
                    if successor:
                        raise Replaced(successor)
                    if select.select(others[1:], [], [], 0)[0]:
                        raise question_is_void(console, channel)
                    continue
                verdict = interpret(answer, channel.words, presented)
                if verdict is True:
                    return
                if verdict is False:
                    raise no
                console.notice(verdict)
                console.begin_answer(f"Is this {name}'s key, yes or no? ")
        except TimeoutError:
            raise TrustError("the question was not answered; nothing is pinned", presented) from None
        except KeyboardInterrupt:
            if not console.takes_back_ctrl_c():
                raise
            raise no from None


def question_is_void(console: Console, channel: Channel) -> ConnectionCut:
    """Show the goodbye of a peer who is gone already, if there is one; return what to raise."""
    with contextlib.suppress(ConnectionCut, ProtocolError):
        message = channel.receive()
        if message.type is RecordType.TEXT:  # to whom, has not been settled: it is not shown
            message = channel.receive()
        console.show_goodbye(console.peer, message, trusted=False)
    return ConnectionCut(f"{console.peer} left before you answered; nothing is pinned")


def interpret(answer: str, words: str, presented: str) -> bool | str:
    """Return whether an answer accepts the key, or what to say to an answer that does neither."""
    typed = answer.lower().split()
    if not answer or typed in (["no"], ["/quit"]):
        return False
    if typed == ["yes"] or typed == words.split() or answer.strip() == presented:
        return True
    if len(typed) == 6:
        wrong = [
            f"word {n} is {mine} here"
            for n, (mine, word) in enumerate(zip(words.split(), typed), 1)
            if mine != word
        ]
        return f"These are other words: {', '.join(wrong)}. If no word was misheard, answer no."
    if typed and typed[0].startswith("sha256:"):
        return "This is another fingerprint. If it was copied whole and without a mistake, answer no."
    return "Please answer yes or no, or type the six words, or the fingerprint that begins with SHA256:."


def converse(console: Console, channel: Channel) -> int:
    """Talk until the peer leaves; return the exit status. Raises PersonLeft and Replaced."""
    while True:
        text = console.next_line(channel)
        try:
            if text is not None:
                channel.send(text)
                console.show_own(text)
                continue
        except MessageError as error:
            if not console.has_prompt:
                console.status = 1
            console.notice(f"Not sent: {error}")
            continue
        except ConnectionCut:  # a goodbye may have come before the cut
            if not console.has_prompt:
                console.status = 1
        else:
            successor = take_inbox(console, channel)
            if successor:
                raise Replaced(successor)
            if not channel.has_something:
                continue
        try:
            message = channel.receive()
        except ConnectionCut:
            successor = take_inbox(console, channel)
            if successor:  # that is why it was cut
                raise Replaced(successor) from None
            raise
        if message.type is RecordType.CLOSE:
            return peer_left(console, channel, message)
        console.show(console.peer, message.text)


def peer_left(console: Console, channel: Channel, goodbye: Message, *, trusted: bool = True) -> int:
    """Show the peer's goodbye; return the exit status, 1 if no text had arrived on either side."""
    console.show_goodbye(console.peer, goodbye, trusted=trusted)
    arrived = channel.texts - goodbye.crossed
    return console.status if arrived else 1


# From the command line to the exit status.


def a_fingerprint(text: str) -> str:
    if not re.fullmatch("SHA256:[A-Za-z0-9+/]{43}", text):
        raise argparse.ArgumentTypeError("a fingerprint is SHA256: and 43 characters")
    return text


def a_port(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError("a port is a number up to 65535")
    return int(text)


def common_options(role: Role, description: str, examples: str) -> argparse.ArgumentParser:
    """Return a parser for the options that both programs have."""
    peer = role.peer.value.title()
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]" + ("" if role is Role.BOB else " [HOST]"),
        description=textwrap.fill(description, shutil.get_terminal_size().columns - 2),
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(role=role)
    home = os.environ.get("SECURE_CHAT_HOME") or "~/.secure-chat"
    help_home = "where keys are ($SECURE_CHAT_HOME, or ~/.secure-chat)"
    parser.add_argument("--home", type=Path, default=home, metavar="DIR", help=help_home)
    help_peer = f"accept the key of {peer} with this fingerprint only"
    parser.add_argument("--peer", type=a_fingerprint, metavar="FINGERPRINT", help=help_peer)
    help_transcript = "keep each conversation in a file there, as evidence"
    parser.add_argument("--transcript", type=Path, metavar="DIR", help=help_transcript)
    help_verify = "check and show such a file, and end"
    parser.add_argument("--verify", type=Path, metavar="FILE", help=help_verify)
    help_steps = "show each step as it happens; -vv: whole values"
    parser.add_argument("-v", "--verbose", action="count", default=0, help=help_steps)
    return parser


def home_folder(options: argparse.Namespace) -> Path:
    try:
        return Path(options.home).expanduser() / str(options.role.value)
    except RuntimeError:
        raise FileError(f"cannot tell which folder {options.home} is; say where with --home DIR") from None


def open_home(console: Console, options: argparse.Namespace) -> tuple[KeyStore, RsaKey]:
    """Return one's own folder and key; both are made on the first run. Look at --peer and --transcript."""
    store = KeyStore(home_folder(options))
    identity = store.load_identity(ask_passphrase)
    if identity is None:
        console.notice(f"Making your RSA key ({NEW_RSA_BITS} bits) ...")
        identity = store.make_identity()
        console.notice("Your key is in this file. Keep it secret: with it, anybody can pretend to be you.")
        console.notice(f"  {store.folder / store.IDENTITY}")
    if options.peer == fingerprint(identity):
        raise argparse.ArgumentTypeError(f"this is your own fingerprint; ask {console.peer} for theirs")
    if options.transcript:
        with disk("make", options.transcript):
            options.transcript.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(options.transcript, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    console.notice(f"You are {console.me}. The fingerprint of your key is")
    console.notice(f"  {fingerprint(identity)}")
    return store, identity


def ask_passphrase(prompt: str) -> str:
    if not sys.stdin.isatty():
        raise FileError(
            "your key has a passphrase, which can only be typed at a terminal; start this program there"
        )
    try:
        return getpass.getpass(prompt)
    except (EOFError, UnicodeError):
        raise FileError("no passphrase was given for the key") from None


VERDICT = """\

The transcript is sound. Whoever has the key shown for a sender signed these messages, in this \
conversation, in this order, and each in reply to what stands before it.
It does not show when this was said, who kept the file, or whose a key is: compare the fingerprints with \
their owners.
The last messages of a side, if the other side had not received them when it last spoke or left, prove \
little: whoever kept the file, or stole that side's key, can have added, changed or left them out.
Whoever has both keys can have made all of it."""


def verify_file(console: Console, options: argparse.Namespace) -> int:
    """Show what a transcript proves. Raises what is wrong with it."""
    known = known_keys(console, options)
    shown: dict[Role, RsaKey] = {}
    goodbye = None
    with contextlib.ExitStack() as stack:
        with disk("read", options.verify):
            file = stack.enter_context(open_regular(options.verify))
        try:
            for opener, message in verify_transcript(file):
                name, key = opener.sender.value.title(), fingerprint(opener.signer)
                if opener.sender not in shown:
                    shown[opener.sender] = opener.signer
                    console.notice(f"{name} is {known.get(key, 'not known here')}:\n  {key}")
                    if name == console.peer and options.peer not in (None, key):
                        raise TrustError(f"{name}'s key is not the one asked for, {options.peer}", key)
                elif message.type is RecordType.TEXT:
                    console.show(name, message.text)
                else:
                    goodbye = message
                    console.show_goodbye(name, message)
        except ProtocolError as error:
            raise ProtocolError(f"{error}.\nNothing is proven but what stands above.") from None
    if goodbye is None:
        console.notice("There is no goodbye: the connection was cut, or more was said than is in the file.")
    console.notice(VERDICT)
    return 0


def known_keys(console: Console, options: argparse.Namespace) -> dict[str, str]:
    """Return what is known of keys in the home folder, if there is one, by their fingerprints."""
    with disk("read", home_folder(options)):
        if not home_folder(options).is_dir():
            return {}
    store = KeyStore(home_folder(options))
    known = {
        fingerprint(RSA.import_key(pin.key)): f"the {console.peer} you pinned as {pin.name}"
        for pin in PinnedPeer(store, options.role.peer.value).pins()
    }
    with contextlib.suppress(FileError):  # with a passphrase, it is not worth asking for it
        identity = store.load_identity(lambda _: "")
        if identity is not None:
            known[fingerprint(identity)] = "you"
    return known


def run_program(
    parser: argparse.ArgumentParser, run: Callable[[Console, argparse.Namespace], int]
) -> NoReturn:
    """Run a program and exit. What a user, a peer or the disk can cause ends in a line, not a traceback."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the program was started with that stream closed
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
        getattr(sys, name).reconfigure(errors="surrogateescape" if mode == "r" else "backslashreplace")
    console = Console(parser.get_default("role"))
    try:
        for number in LEAVING_SIGNALS:
            signal.signal(number, console.on_signal)
        sys.unraisablehook = console.on_lost_exception
        console.inbox.wake_on_signals(True)
        status = start(console, parser.parse_args(), run)
        ignore_signals()
    except KeyboardInterrupt:
        status = 130
        ignore_signals()
    console.finish_row()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    sys.exit(status)


def start(
    console: Console, options: argparse.Namespace, run: Callable[[Console, argparse.Namespace], int]
) -> int:
    """Run the program for these options; return the exit status. Raises KeyboardInterrupt."""
    log.addHandler(StepHandler(console, whole=options.verbose > 1))
    log.setLevel(logging.INFO if options.verbose else logging.WARNING)
    try:
        if ALWAYS_PROMPT:
            for setting in READLINE_SETTINGS:
                readline.parse_and_bind(f"set {setting}")
        return (verify_file if options.verify else run)(console, options)
    except PersonLeft:
        with contextlib.suppress(OSError):
            console.notice("You left.")
        return console.status
    except tuple(FAILURES) as error:
        told, status = describe(error)
        if not isinstance(error, (ConnectionCut, ProtocolError, TrustError, FileError, NoConnection)):
            os.dup2(console.nowhere, sys.stdout.fileno())  # what is left in its buffer must not fail again
        with contextlib.suppress(OSError):
            console.notice(told)
        return status


def ignore_signals() -> None:
    for number in LEAVING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
