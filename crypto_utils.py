"""The secure-chat/1 protocol, from the bottom up: three steps, frames and hellos, records, the handshake.

    Bob                                                               Alice
    hello_bob = "secure-chat/1", nonce_B, p, g, B = g^b, RSA_bob  ---->
                <----  hello_alice = "secure-chat/1", nonce_A, A = g^a, RSA_alice
    both: Z = g^ab, th, two AES keys; is the peer's key the pinned one?
                <----  record 0: READY, sealed by Alice (sent together with her hello)
    record 0: READY, sealed by Bob, once hers is verified and decrypted  ---->
                <----  record n: TEXT, the request
    record n: TEXT, the reply  ---->
    either side, whenever it leaves: CLOSE

    symbol    here             bytes         what it is, and where it comes from
    p, q, g   Group            256 to 512    safe prime p = 2q + 1, generator g of the subgroup of order q
    a, b      Offer.exponent   len(p) / 8    private exponent, for one session (SP 800-56A, 5.6.1.1)
    A, B      public_value     len(p)        g^a, g^b mod p, left-padded
    Z         z                len(p)        shared secret g^ab mod p, left-padded (SP 800-56A, 5.7.1.1)
    th        th               32            transcript hash: SHA-256 over both hello frames
    K         key              32            AES-256 key of one direction (SP 800-56C, 4.1)
    C         commitment       32            commits to K; never sent, in every signature
    n         number           12            record number in its direction: the GCM nonce (SP 800-38D, 8.2.1)
              answers          32            in each record: what the last signature received was made over

Bytes go in, bytes come out: a socket is only something to read from and to write to, and nothing
here prints or asks. Secrets come from the system's CSPRNG, and secret Diffie-Hellman exponents are
used in one function, `power`. What a peer sends is either a value that passed every check or an exception.
"""

from __future__ import annotations

import base64
import contextlib
import enum
import errno
import functools
import hmac
import logging
import math
import os
import re
import secrets
import shlex
import socket
import stat
import sys
import time
from array import array
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Callable, NamedTuple, TypeVar, Union
from unicodedata import east_asian_width

from Crypto import IncorrectPassphraseError, PassphraseRequiredError
from Crypto.Cipher import AES
from Crypto.Hash import SHA256
from Crypto.Hash.SHA256 import SHA256Hash
from Crypto.IO import PEM
from Crypto.Math.Numbers import Integer, _implementation
from Crypto.Math.Primality import test_probable_prime
from Crypto.PublicKey import RSA
from Crypto.PublicKey.RSA import RsaKey as RsaKey
from Crypto.Signature import pss
from Crypto.Util.asn1 import DerBitString, DerObject, DerSequence
from Crypto.Util.Padding import unpad
from Crypto.Util.RFC1751 import key_to_english

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

log = logging.getLogger("secure_chat")  # tells the steps as they happen; never a secret

VERSION = b"secure-chat/1"
PORT = 65432

# Sizes in bytes unless the name says bits; every limit holds before anything is allocated or computed.
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
FILE_LIMIT = 1024 * 1024
# How a file is opened: through no symbolic link, and without waiting for a pipe.
NO_TRICKS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)

HANDSHAKE_SECONDS = 10.0  # for the whole handshake, from its first byte
FIRST_BYTE_SECONDS = 120.0  # Alice's patience with a Bob who is still making his parameters
STALL_SECONDS = 30.0  # for the next bytes of a frame that has begun
GOODBYE_SECONDS = 2.0  # for a CLOSE to reach the other side before we hang up

# A record is one write, sent at once; a dead line is noticed after 30 s, idle (seconds) or sending (ms).
TCP_OPTIONS = {
    "TCP_NODELAY": 1,
    "TCP_KEEPIDLE": 15,
    "TCP_KEEPALIVE": 15,  # macOS's name for it
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 30_000,
}

Buffer = Union[bytes, bytearray, memoryview]
Random = Callable[[int], bytes]
UNPARSABLE = (ValueError, IndexError, TypeError, ArithmeticError)  # what the library raises for damaged keys


class ProtocolError(Exception):
    """The peer, or somebody on the line, broke the protocol. The connection is over."""


class TrustError(Exception):
    """The peer holds a key that is not the one to be trusted: a person has to decide."""


class ConnectionCut(Exception):
    """There is no connection, or it ended or stalled without a goodbye."""


class FileError(Exception):
    """A file, a folder or the terminal cannot be used as it is. Files were left as they were."""


class MessageError(ValueError):
    """The text cannot be sent as it is. Nothing was sent, and the conversation can go on."""


def require(condition: bool, reason: str) -> None:
    """Raise ProtocolError(reason) unless `condition` holds."""
    if not condition:
        raise ProtocolError(reason)


def narrate(where: str, what: str, public: Mapping[str, int | bytes | RsaKey]) -> None:
    """Log a step with its public values: shortened at level INFO, whole at DEBUG."""
    if not log.isEnabledFor(logging.INFO):
        return
    lines = [where, "    " + what]
    for name, value in public.items():
        if isinstance(value, int):
            value = to_bytes(value)
        shown = value.hex() if isinstance(value, bytes) else fingerprint(value)
        if len(shown) > 64 and not log.isEnabledFor(logging.DEBUG):
            shown = f"{shown[:24]}...{shown[-24:]} ({len(shown) // 2} bytes)"
        lines.append(f"    {name:10} {shown}")
    log.info("\n".join(lines))


class Role(enum.Enum):
    """Who one is: it orders the transcript and labels the keys."""

    BOB = "bob"
    ALICE = "alice"

    @property
    def peer(self) -> Role:
        return Role.ALICE if self is Role.BOB else Role.BOB

    @property
    def label(self) -> bytes:
        """The label of what this role sends, for example b"bob->alice"."""
        return f"{self.value}->{self.peer.value}".encode()

    @property
    def symbol(self) -> str:
        """The name of this role's public value."""
        return self.value[0].upper()

    @property
    def tag(self) -> bytes:
        """What marks this role's records in a transcript."""
        return self.symbol.encode()


# ---------------------------------------------------------------- Diffie-Hellman parameters and step 1


def power(base: int, exponent: bytes, modulus: int) -> bytes:
    """Return base^exponent mod modulus, left-padded to the length of the modulus.

    The running time depends on the lengths alone: the exponent is taken as bytes and stays so. This
    is the one place that touches the library's internal big integers, and it insists on the
    constant-time ones (the library silently falls back to others where its C code cannot be loaded).
    """
    if _implementation.get("library") != "nat":
        raise RuntimeError("this installation of pycryptodome has no constant-time arithmetic")
    result = pow(Integer(base), Integer.from_bytes(exponent), Integer(modulus))
    return result.to_bytes(byte_length(modulus))


def is_square(y: int, p: int) -> bool:
    """Whether y is a square modulo the odd prime p: the Jacobi symbol, for public values."""
    return Integer.jacobi_symbol(y, p) == 1


def is_power_one(base: int, exponent: int, modulus: int) -> bool:
    """Whether base^exponent = 1 mod modulus, all of them public."""
    return pow(Integer(base), Integer(exponent, public=True), Integer(modulus)) == 1


def byte_length(number: int) -> int:
    return (number.bit_length() + 7) // 8


def to_bytes(number: int) -> bytes:
    """Return the minimal unsigned big-endian encoding."""
    return number.to_bytes(byte_length(number), "big")


@dataclass(frozen=True)
class Group:
    """Diffie-Hellman parameters: a safe prime p = 2q + 1, and a generator g of the subgroup of order q."""

    p: int
    g: int

    @property
    def q(self) -> int:
        return (self.p - 1) // 2

    def contains(self, y: int) -> bool:
        """Whether y is in the subgroup of order q and not 1 (SP 800-56A, 5.6.2.3.1).

        Modulo a safe prime, that subgroup is the squares: y^q = 1 by Euler's criterion.
        """
        return 2 <= y <= self.p - 2 and is_square(y, self.p)

    def private_exponent(self, random: Random = secrets.token_bytes) -> bytes:
        """Return len(p) / 8 random bytes: 256 bits for a 2048-bit group, well over twice its strength.

        (SP 800-56A, 5.6.1.1.3 excludes 0. A zero has probability 2^-256, and the peer would refuse g^0.)
        """
        return random(byte_length(self.p) // 8)

    def export(self) -> bytes:
        """Return the group as PKCS#3 PEM, as `openssl dhparam` reads and writes it."""
        return PEM.encode(DerSequence([self.p, self.g]).encode(), "DH PARAMETERS").encode() + b"\n"

    @classmethod
    def load(cls, pem: bytes) -> Group:
        """Read PKCS#3 PEM (an optional private value length is ignored), unchecked.

        Raises ValueError if it is anything else.
        """
        try:
            der, marker, _ = PEM.decode(pem.decode("ascii"))
            sequence = DerSequence().decode(der, strict=True, nr_elements=(2, 3), only_ints_expected=True)
        except (IndexError, TypeError):
            raise ValueError("this is not DER") from None
        if marker != "DH PARAMETERS":
            raise ValueError("these are not DH PARAMETERS")
        return cls(sequence[0], sequence[1])


# SHA-256 over p of the groups in RFC 7919 (ffdhe) and RFC 3526 (modp): safe primes, known to everybody.
KNOWN_PRIMES = frozenset(
    bytes.fromhex(digest)
    for digest in (
        "9cd3b7f336872f46c09428d1bbc19877a4d440512cda8d1c1cf0cd6e33698966",  # ffdhe2048
        "0eaf67db3a839156d5013494a5318a772b5697d270d721f37f092efc69ea5a17",  # ffdhe3072
        "4648414224ac881b3d0dc59b466f96d06a558278776807797ecf1f66ff397b3e",  # ffdhe4096
        "d66436f79bbd6b2e38c0ffbd079be904d2641415e2e67140e09448be9a60890e",  # modp 2048
        "48cf8b092fbce4359d9871abf74f98e25b6163379eaa15cd9087e800c6d1c55c",  # modp 3072
        "4ee95187682bcb230ad26a95205f6920e84708f6251b3894329b09ec23919e33",  # modp 4096
    )
)


def check_group(group: Group, checked_before: Group | None = None) -> None:
    """Raise ProtocolError unless p is a safe prime of 2048 to 4096 bits and g generates the subgroup.

    A p that passed before, or that everybody knows, is not tested again.
    """
    p, g = group.p, group.g
    require(p.bit_length() in GROUP_BITS, f"p has {p.bit_length()} bits, not 2048 to 4096")
    require(p % 2 == 1, "p is even")
    known = SHA256.new(to_bytes(p)).digest() in KNOWN_PRIMES
    if not known and (checked_before is None or p != checked_before.p):
        require(is_safe_prime(p), "p is not a safe prime")
    require(group.contains(g), "g does not generate the subgroup of order q")


def is_safe_prime(p: int) -> bool:
    """Whether the odd number p and q = (p - 1) / 2 are both prime.

    q gets the library's test (Miller-Rabin with random bases, and Lucas). For p that settles it:
    with q > sqrt(p) prime, 4^q = 1 and gcd(4 - 1, p) = 1 prove p prime (Pocklington's theorem).
    """
    q = (p - 1) // 2
    return p % 3 != 0 and is_power_one(4, q, p) and bool(test_probable_prime(q))


def generate_group(bits: int = 2048, progress: Callable[[float], None] = lambda _: None) -> Group:
    """Make fresh parameters: p of exactly `bits` bits, the first p = 23 mod 24 after a random start; g = 2.

    p = 24k - 1 makes q = 12k - 1, and 2 a square mod p (p = 7 mod 8), so that it has order q. A run
    of k from a random start is sieved of small factors of p and q; what survives is tested, a thread
    a core (the library's arithmetic releases the interpreter lock). `progress` is told after every
    test what part of all such searches would have ended by then.
    """
    bound, run = 10_000_000 if bits < 2560 else 24_000_000, 1 << 20
    small_primes = _small_primes(bound)
    # Mertens: among numbers without factors below B, one in ln(q) / (e^gamma ln(B)) is prime.
    chance = (1.781 * math.log(bound) / (bits * math.log(2))) ** 2
    tested = 0
    pool = ThreadPoolExecutor(max_workers=os.cpu_count())
    try:
        while True:
            start = (secrets.randbelow(1 << (bits - 1)) + (1 << (bits - 1))) // 24
            candidates = (12 * (start + i) - 1 for i in _survivors(start, run, small_primes))
            survivors = [q for q in candidates if q.bit_length() == bits - 1]
            for q, passed in zip(survivors, pool.map(_fermat, survivors)):
                tested += 1
                progress(1 - (1 - chance) ** tested)
                if passed and is_safe_prime(2 * q + 1):
                    return Group(2 * q + 1, 2)
    finally:
        pool.shutdown(cancel_futures=True)


def _fermat(q: int) -> bool:
    """Whether 2^(q-1) = 1 mod q: nearly always false for a composite q."""
    return is_power_one(2, q - 1, q)


def _small_primes(bound: int) -> array[int]:
    """Return the primes from 5 up to, not including, `bound` (sieve of Eratosthenes)."""
    is_prime = bytearray([1]) * bound
    for n in range(2, int(bound**0.5) + 1):
        if is_prime[n]:
            is_prime[n * n :: n] = bytes(len(range(n * n, bound, n)))
    is_prime[:5] = bytes(5)
    return array("I", compress(range(bound), is_prime))


def _survivors(start: int, run: int, small_primes: array[int]) -> Iterator[int]:
    """Yield each i < run for which neither 12(start + i) - 1 nor 24(start + i) - 1 has a small factor."""
    alive = bytearray([1]) * run
    for at in range(0, len(small_primes), 16):
        primes = small_primes[at : at + 16]
        rest = start % math.prod(primes)  # one long division for sixteen primes
        for r in primes:
            inverse = (1 + r * (24 - r % 24)) // 24  # of 24 mod r, since r^2 = 1 mod 24
            for k in (inverse, 2 * inverse):  # 24k = 1 strikes p, 12k = 1 strikes q
                first = (k - rest) % r
                if r < run:
                    alive[first::r] = bytes(len(range(first, run, r)))
                elif first < run:
                    alive[first] = 0
    return compress(range(run), alive)


# ------------------------------------------------------------------------ step 2: symmetric encryption


class DirectionKeys(NamedTuple):
    """What SHA-256 makes of the shared secret for one direction: K encrypts, C is signed."""

    key: bytes
    commitment: bytes

    def __repr__(self) -> str:
        return "DirectionKeys(...)"


def derive_keys(z: bytes, direction: bytes, th: bytes) -> DirectionKeys:
    """Derive K and C, 32 bytes each (SP 800-56C, 4.1: one-step with SHA-256, two blocks)."""
    fixed_info = VERSION + b" key " + direction + th
    key, commitment = (SHA256.new(block.to_bytes(4, "big") + z + fixed_info).digest() for block in (1, 2))
    return DirectionKeys(key, commitment)


def encrypt(key: bytes, nonce: bytes, plaintext: bytes) -> tuple[bytes, bytes]:
    """AES-256-GCM: return ciphertext and tag[16] for a 12-byte nonce (SP 800-38D)."""
    return AES.new(key, AES.MODE_GCM, nonce=nonce, mac_len=GCM_TAG).encrypt_and_digest(plaintext)


def decrypt(key: bytes, nonce: bytes, ciphertext: Buffer, tag: Buffer) -> bytes:
    """Undo `encrypt`. Raises ValueError if the tag is not valid: then nothing is returned."""
    return AES.new(key, AES.MODE_GCM, nonce=nonce, mac_len=GCM_TAG).decrypt_and_verify(ciphertext, tag)


# ------------------------------------------------------------------------------ step 3: authentication


def sign(key: RsaKey, message: SHA256Hash, random: Random = secrets.token_bytes) -> bytes:
    """RSASSA-PSS with SHA-256, MGF1-SHA-256 and a 32-byte salt over a hashed message (RFC 8017, 8.1.1)."""
    return pss.new(key, salt_bytes=32, rand_func=random).sign(message)


def verify(key: RsaKey, message: SHA256Hash, signature: bytes) -> bool:
    """Whether `signature` is `key`'s over a hashed message (RFC 8017, 8.1.2)."""
    try:
        pss.new(key, salt_bytes=32).verify(message, signature)
    except ValueError:
        return False
    return True


# DER of AlgorithmIdentifier { rsaEncryption, NULL } (RFC 8017, A.1): the first part of a public key.
_RSA_ENCRYPTION = bytes.fromhex("300d06092a864886f70d0101010500")


def public_der(key: RsaKey) -> bytes:
    """Return the public half as DER SubjectPublicKeyInfo, in its one canonical encoding.

    (The library's own export takes ten times as long, and a handshake needs this six times.)
    """
    numbers = [DerObject(0x02, n.to_bytes(n.bit_length() // 8 + 1, "big")).encode() for n in (key.n, key.e)]
    return DerSequence([_RSA_ENCRYPTION, DerBitString(DerSequence(numbers).encode()).encode()]).encode()


def load_public_key(der: bytes) -> RsaKey:
    """Parse and check an RSA public key from a peer: DER SubjectPublicKeyInfo, at most 1 KiB.

    Size first: the library needs 25 s for a key of 131 KB. (It refuses an n that is even or a multiple
    of e.) Raises ProtocolError.
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
    """Return OpenSSH's fingerprint, as `ssh-keygen -lf` prints it: "SHA256:" and 43 base64 characters."""
    blob = base64.b64decode(ssh_line(key).split()[1])
    return "SHA256:" + base64.b64encode(SHA256.new(blob).digest()).decode().rstrip("=")


def spoken(key: RsaKey) -> str:
    """Return half of the fingerprint, 128 bits, as twelve English words (RFC 1751)."""
    digest = base64.b64decode(fingerprint(key).partition(":")[2] + "=")
    return key_to_english(digest[:16]).lower()


# ------------------------------------------------------------------------------------ frames and hellos


def frame(payload: bytes) -> bytes:
    """Return uint32 length || payload, big-endian."""
    return _length(payload) + payload


def _length(payload: bytes) -> bytes:
    return len(payload).to_bytes(4, "big")


class Line:
    """Frames over a connected stream socket. One write a frame, and nothing is read ahead.

    A `deadline` (of time.monotonic) bounds everything until it is set to None again, and a frame that
    has begun may not stall. Whatever the network does ends in ConnectionCut; a peer that announces too
    long a frame, in ProtocolError.
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
        """Send each payload as a frame, in a single write."""
        with self._network():
            self.socket.sendall(b"".join(part for data in payloads for part in (_length(data), data)))

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
        """End the connection, at most `wait` seconds after telling the peer that nothing follows.

        Whoever closes a socket with unread bytes resets the connection, and the reset destroys what
        the peer has not read yet: so read on until he hangs up too.
        """
        self.deadline = time.monotonic() + wait
        with contextlib.suppress(OSError, ConnectionCut):
            self.socket.shutdown(socket.SHUT_WR)
            while wait:
                with self._network():
                    if not self.socket.recv(65536):
                        break
        self.socket.close()

    def abort(self) -> None:
        """End the connection from another thread: whoever uses it finds it cut."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

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


@dataclass(frozen=True)
class Hello:
    """The first message of either side. Bob's carries the group, Alice's takes his for granted."""

    group: Group | None
    nonce: bytes
    public_value: bytes
    rsa: bytes

    def encode(self) -> bytes:
        group = (to_bytes(self.group.p), to_bytes(self.group.g)) if self.group else ()
        return encode_fields(VERSION, self.nonce, *group, self.public_value, self.rsa)

    @classmethod
    def decode(cls, sender: Role, data: bytes) -> Hello:
        """Undo `encode`: sizes and encodings are checked, values not yet. Raises ProtocolError."""
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
        """Check the RSA key, and the public value against `group`; return them. Raises ProtocolError."""
        key = load_public_key(self.rsa)
        require(len(self.public_value) == byte_length(group.p), "the public value is not as long as p")
        y = int.from_bytes(self.public_value, "big")
        require(group.contains(y), "the public value is not in the subgroup of order q")
        return key, y


# -------------------------------------------------------------------------- records, one object a direction


class Kind(enum.IntEnum):
    """What a record carries."""

    READY = 0
    TEXT = 1
    CLOSE = 2


NOTHING = bytes(32)  # what the first record answers


class Message(NamedTuple):
    kind: Kind
    text: str
    answers: bytes


class Direction:
    """What both ends of one direction know: its keys, the signer's key (private in a Sealer), its records.

    `latest` is the hash that its latest signature was made over, `before` the one before that. A record
    names the one it answers by this hash, so that every signature covers the conversation up to there.
    The number is taken out while a record is being worked on, and put back, one higher, only when
    that has succeeded: a direction in which anything failed is dead, and no nonce is used twice.
    """

    def __init__(self, sender: Role, keys: DirectionKeys, th: bytes, signer: RsaKey) -> None:
        self.sender = sender
        self.signer = signer
        self._keys = keys
        self._context = SHA256.new(VERSION + b" signature " + sender.label + th + keys.commitment)
        self._next: int | None = 0
        self.latest = self.before = NOTHING

    @property
    def number(self) -> int:
        """The number of the next record. Raises ValueError in a direction that is closed."""
        if self._next is None:
            raise ValueError("this direction is closed")
        return self._next

    @property
    def is_open(self) -> bool:
        return self._next is not None

    def end(self) -> None:
        """Let nothing follow."""
        self._next = None

    def signed(self, *body: Buffer) -> SHA256Hash:
        """Hash what a signature covers: the direction, th and C, then nonce || ciphertext || tag."""
        message = self._context.copy()
        for part in body:
            message.update(part)
        return message

    def missed(self, answer: Message) -> bool:
        """Whether an answer was made before the latest text of this direction had arrived."""
        return answer.answers != self.latest and self.number > 1

    def _advance(self, number: int, kind: Kind, signed: SHA256Hash) -> None:
        self.latest, self.before = signed.digest(), self.latest
        if kind is not Kind.CLOSE:
            self._next = number + 1

    def _narrate(self, number: int, kind: Kind, what: str, record: Buffer) -> None:
        if not log.isEnabledFor(logging.INFO):
            return
        record, split = bytes(record), len(record) - self.signer.size_in_bytes()
        nonce, ciphertext = record[:GCM_NONCE], record[GCM_NONCE : split - GCM_TAG]
        narrate(
            f"steps 2 and 3, encryption and authentication ({type(self).__name__})",
            f"Record {number} {self.sender.label.decode()}, {kind.name}, was {what}. On the wire it is:",
            {
                "nonce": nonce,
                "ciphertext": ciphertext,
                "tag": record[:split][-GCM_TAG:],
                "signature": record[split:],
            },
        )


def may_speak(one: Direction, other: Direction) -> bool:
    """Whether it is `one`'s turn: Alice's record n is a request, and Bob's record n the reply."""
    return one.number - other.number == (0 if one.sender is Role.ALICE else -1)


End = TypeVar("End", bound=Direction)


class Sealer(Direction):
    """Makes the records of one direction: nonce[12] || ciphertext || tag[16] || signature."""

    def seal(
        self, kind: Kind, text: str = "", answers: bytes = NOTHING, random: Random = secrets.token_bytes
    ) -> bytes:
        """Return the next record, which answers what is `latest` in the other direction.

        Raises MessageError, and nothing has changed, for an unfit text.
        """
        try:
            encoded = text.encode()
        except UnicodeEncodeError:
            raise MessageError("the text is not valid Unicode") from None
        if len(encoded) > TEXT_LIMIT:
            raise MessageError(f"the text is {len(encoded)} bytes long, over the limit of {TEXT_LIMIT}")
        number, self._next = self.number, None
        nonce = number.to_bytes(GCM_NONCE, "big")
        padding = b"\x80" + bytes(-(2 + len(answers) + len(encoded)) % PADDING)  # ISO 7816-4
        plaintext = b"".join((bytes([kind]), answers, encoded, padding))
        body = nonce, *encrypt(self._keys.key, nonce, plaintext)
        signed = self.signed(*body)
        record = b"".join((*body, sign(self.signer, signed, random)))
        self._narrate(number, kind, "encrypted, then signed", record)
        self._advance(number, kind, signed)
        return record


class Opener(Direction):
    """Opens the records of one direction: verifies, then decrypts, then looks inside."""

    def open(self, record: Buffer) -> Message:
        """Verify and decrypt the next record, whoever's turn it is. A ProtocolError closes the direction."""
        number, self._next = self.number, None
        nonce = number.to_bytes(GCM_NONCE, "big")
        split = len(record) - self.signer.size_in_bytes()
        padded = split - GCM_NONCE - GCM_TAG
        require(padded >= PADDING and padded % PADDING == 0, "the record has an impossible length")
        body, signature = memoryview(record)[:split], bytes(record[split:])
        received = int.from_bytes(body[:GCM_NONCE], "big")
        require(
            received == number,
            f"record {received} where record {number} should be: replayed, dropped or reordered",
        )
        signed = self.signed(body)
        require(verify(self.signer, signed, signature), "the record's signature is not valid")
        try:
            plaintext = decrypt(self._keys.key, nonce, body[GCM_NONCE:-GCM_TAG], body[-GCM_TAG:])
        except ValueError:
            raise ProtocolError("the record's authentication tag is not valid") from None
        message = self._parse(number, plaintext)
        self._narrate(number, message.kind, "verified, then decrypted", record)
        self._advance(number, message.kind, signed)
        return message

    def open_in_order(self, record: Buffer, other: Direction) -> Message:
        """Return what the next record says in answer to the `other` direction. Raises ProtocolError.

        Only a CLOSE may come out of turn; or in turn, having crossed the other's latest record on the way.
        """
        in_turn = may_speak(self, other)
        message = self.open(record)
        following, self._next = self._next, None
        closing = message.kind is Kind.CLOSE
        require(in_turn or closing, "the other side spoke out of turn")
        require(
            message.answers == other.latest or (closing and in_turn and message.answers == other.before),
            "the record answers something else than what was said last",
        )
        self._next = following
        return message

    @staticmethod
    def _parse(number: int, plaintext: bytes) -> Message:
        try:
            last = unpad(plaintext[-PADDING:], PADDING, style="iso7816")
        except ValueError:
            raise ProtocolError("the record's padding is not valid") from None
        unpadded = memoryview(plaintext)[: len(plaintext) - PADDING + len(last)]
        require(len(unpadded) > len(NOTHING), "the record is too short")
        require(unpadded[0] in list(Kind), "the record is of no known type")
        kind, answers, encoded = Kind(unpadded[0]), bytes(unpadded[1:33]), unpadded[33:]
        require((kind is Kind.READY) == (number == 0), "READY is record 0, and no other")
        require(len(encoded) <= (0 if kind is Kind.READY else TEXT_LIMIT), "the record's text is too long")
        try:
            return Message(kind, str(encoded, "utf-8"), answers)
        except UnicodeDecodeError:
            raise ProtocolError("the record's text is not valid UTF-8") from None


# ------------------------------------------------------------------------------------------- handshake


@dataclass(frozen=True)
class Agreement:
    """What both sides know once their hellos are exchanged: the hellos, and the secret z."""

    hello_bob: bytes
    hello_alice: bytes
    z: bytes = field(repr=False)

    @property
    def th(self) -> bytes:
        return SHA256.new(frame(self.hello_bob) + frame(self.hello_alice)).digest()

    def first_entries(self, ready_alice: bytes, ready_bob: bytes) -> list[bytes]:
        """Return how a transcript of the conversation begins."""
        hellos = [b"b" + self.hello_bob, b"a" + self.hello_alice]
        return [*hellos, b"z" + self.z, Role.ALICE.tag + ready_alice, Role.BOB.tag + ready_bob]

    def end(self, kind: type[End], sender: Role, signer: RsaKey) -> End:
        """Return the sealing or the opening end of what `sender` sends, and `signer` signs."""
        return kind(sender, derive_keys(self.z, sender.label, self.th), self.th, signer)


@dataclass(frozen=True)
class Offer:
    """One side's half of the key exchange: its hello, and the private exponent that goes with it."""

    role: Role
    group: Group
    hello: bytes
    identity: RsaKey = field(repr=False)
    exponent: bytes = field(repr=False)

    @classmethod
    def make(cls, role: Role, identity: RsaKey, group: Group, random: Random = secrets.token_bytes) -> Offer:
        """Make an offer for one session, with a nonce and a private exponent of its own."""
        exponent = group.private_exponent(random)
        public_value = power(group.g, exponent, group.p)
        mine = Hello(
            group if role is Role.BOB else None, random(NONCE_BYTES), public_value, public_der(identity)
        )
        hello, symbol = mine.encode(), role.symbol
        narrate(
            "step 1, key exchange (Offer.make)",
            f"{symbol.lower()} is drawn, {8 * len(exponent)} secret bits. The rest is for everybody to read:",
            {
                **({"p": group.p, "g": group.g} if role is Role.BOB else {}),
                symbol: public_value,
                "RSA": identity,
                f"nonce_{symbol}": mine.nonce,
            },
        )
        return cls(role, group, hello, identity, exponent)

    def agree(self, hello: bytes) -> tuple[Sealer, Opener, Agreement]:
        """Check the peer's hello against this offer, and return both directions.

        The peer's values are checked before the secret exponent meets them. That the peer holds his
        keys is proven only by the first record that opens. Raises ProtocolError.
        """
        peer = Hello.decode(self.role.peer, hello)
        key, y = peer.check(self.group)
        require(peer.rsa != public_der(self.identity), "the other side presents our own key: a reflection")
        symbol = self.role.peer.symbol
        narrate(
            "step 1, key exchange (Offer.agree)",
            f"The other hello is here: {symbol} is in the subgroup of order q, the RSA key is sound.",
            {symbol: peer.public_value, "RSA": key, f"nonce_{symbol}": peer.nonce},
        )
        z = power(y, self.exponent, self.group.p)
        hellos = (self.hello, hello) if self.role is Role.BOB else (hello, self.hello)
        agreement = Agreement(*hellos, z)
        narrate(
            "step 2, encryption (derive_keys)",
            "Z = g^ab, which nobody can compute who only listened (whose hello that was, step 3 will tell),\n"
            "    and th, SHA-256 over both hellos, make an AES-256 key for each direction.",
            {"th": agreement.th},
        )
        return (
            agreement.end(Sealer, self.role, self.identity),
            agreement.end(Opener, self.role.peer, key),
            agreement,
        )


class Channel:
    """An authenticated conversation: Alice sends, Bob replies, and so on, until somebody closes."""

    def __init__(
        self, line: Line, sealer: Sealer, opener: Opener, first_contact: bool, first_entries: list[bytes]
    ) -> None:
        self.role = sealer.sender
        self.first_contact = first_contact  # whether the peer's key was taken on trust
        self.line = line
        self.peer_key = opener.signer
        self._sealer = sealer
        self._opener = opener
        self._first_entries = first_entries
        self._transcript: Transcript | None = None
        self.unread = False  # whether the peer, who left, says that our latest text had not reached him
        self._received = opener.latest  # what our next record answers

    def keep(self, transcript: Transcript) -> None:
        """From here on, add to a transcript everything that is said, and what proves it."""
        for entry in self._first_entries:
            transcript.add(entry)
        self._transcript = transcript

    @property
    def my_turn(self) -> bool:
        """Whether the next TEXT is ours."""
        return may_speak(self._sealer, self._opener)

    def send(self, text: str) -> None:
        """Send a text. Raises MessageError if it cannot be sent as it is, and the turn is still ours."""
        if not self.my_turn:
            raise ValueError("it is the other side's turn")
        self._send(Kind.TEXT, text)

    def receive(self) -> Message:
        """Return the peer's next TEXT, or his CLOSE, which may come at any time."""
        if not self._opener.is_open:
            raise ValueError("this direction is closed")
        record = self.line.receive(RECORD_LIMIT)
        message = self._opener.open_in_order(record, self._sealer)
        self.unread = self._sealer.missed(message)
        if message.kind is Kind.CLOSE:
            self._sealer.end()
        if self._transcript:
            self._transcript.add(self.role.peer.tag + record)
        self._received = self._opener.latest
        return message

    def close(self, reason: str = "") -> None:
        """Say goodbye, if that is still possible, and hang up."""
        self.line.deadline = time.monotonic() + GOODBYE_SECONDS
        with contextlib.suppress(ConnectionCut):
            if self._sealer.is_open:
                self._send(Kind.CLOSE, reason)
        self.line.hang_up(wait=GOODBYE_SECONDS)

    def _send(self, kind: Kind, text: str) -> None:
        record = self._sealer.seal(kind, text, self._received)
        if self._transcript:
            try:
                self._transcript.add(self.role.tag + record)
            except FileError:
                self._sealer.end()  # a goodbye under the next number would look like an attack
                raise
        self.line.send(record)


def bob_handshake(line: Line, identity: RsaKey, group: Group, peer: KnownPeer) -> Channel:
    """Bob's side: he signs nothing until Alice's key is acceptable and her READY has been opened."""
    line.deadline = time.monotonic() + HANDSHAKE_SECONDS
    offer = Offer.make(Role.BOB, identity, group)
    line.send(offer.hello)
    sealer, opener, agreement = offer.agree(bytes(line.receive(HELLO_LIMIT)))
    peer.check(opener.signer)
    hers = bytes(line.receive(READY_LIMIT))
    opener.open_in_order(hers, sealer)
    first_contact = peer.pin(opener.signer) and peer.only is None
    his = sealer.seal(Kind.READY, "", opener.latest)
    line.send(his)
    line.deadline = None
    return Channel(line, sealer, opener, first_contact, agreement.first_entries(hers, his))


def alice_handshake(
    line: Line, identity: RsaKey, checked_before: Group | None, peer: KnownPeer
) -> tuple[Channel, Group]:
    """Alice's side: she signs nothing until Bob's parameters and his key are acceptable.

    Also returns his group, for her to remember: it need not be tested again.
    """
    line.wait_for_first_byte(FIRST_BYTE_SECONDS)
    line.deadline = time.monotonic() + HANDSHAKE_SECONDS
    hello = bytes(line.receive(HELLO_LIMIT))
    group = Hello.decode(Role.BOB, hello).group
    assert group is not None  # Bob's hello has one
    if group != checked_before:
        check_group(group, checked_before)
    narrate(
        "step 1, key exchange (check_group)",
        "Bob's hello is here: p = 2q + 1 is a safe prime, and g generates the subgroup of order q.",
        {"p": group.p, "g": group.g},
    )
    offer = Offer.make(Role.ALICE, identity, group)
    sealer, opener, agreement = offer.agree(hello)
    peer.check(opener.signer)
    hers = sealer.seal(Kind.READY)
    line.send(offer.hello, hers)
    his = bytes(line.receive(READY_LIMIT))
    opener.open_in_order(his, sealer)
    first_contact = peer.pin(opener.signer) and peer.only is None
    line.deadline = None
    return Channel(line, sealer, opener, first_contact, agreement.first_entries(hers, his)), group


# ------------------------------------------------------------------------------------------- evidence


class Transcript:
    """A file that proves who said what: the frames as they were on the wire, and z to open them with.

    An entry is a frame that begins with a tag: the hello of Bob (`b`) or of Alice (`a`), z (`z`), a record
    of his (`B`) or hers (`A`). Every signature covers C, which commits to the key that z makes, so that no
    other text can be claimed. A file may hold several conversations, one after the other. Mode 0600.
    """

    def __init__(self, path: Path) -> None:
        """Take a transcript to append to, made if it is not there. Raises FileError."""
        self._path = path
        with _disk("read", path):
            data = path.read_bytes() if path.is_file() else b""
        try:
            require(
                data[4:5] in (b"", b"b") and all(_entries(data)), "it does not begin with a hello of Bob's"
            )
        except ProtocolError as error:
            raise FileError(f"{path} is no whole transcript ({error}); name another file") from None
        self._append(b"")

    def add(self, entry: bytes) -> None:
        """Add an entry, at once: a crash loses at most the record in flight. Raises FileError."""
        self._append(frame(entry))

    def _append(self, data: bytes) -> None:
        with _disk("write", self._path), open(self._path, "ab", opener=_private, buffering=0) as file:
            whole = os.fstat(file.fileno())
            _check_owner(self._path, whole, 0o077)
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(whole.st_size)  # half an entry would spoil what follows
                raise


class Statement(NamedTuple):
    """What a transcript proves: the owner of the RSA key signed this, in answer to what stands before."""

    sender: Role
    signer: RsaKey
    message: Message
    unread: bool  # of a CLOSE: whether its sender says that the other side's latest text had not reached him


def verify_transcript(data: bytes) -> Iterator[Statement]:
    """Yield what a transcript proves, trusting nobody; READY begins a conversation. Raises ProtocolError."""
    entries = _entries(data)
    ends: dict[bytes, Opener] = {}
    seen = set()
    for tag, payload in entries:
        if tag == b"b":
            (tag_a, hello_alice), (tag_z, z) = next(entries, (b"", b"")), next(entries, (b"", b""))
            require((tag_a, tag_z) == (b"a", b"z"), "a conversation does not begin with both hellos and z")
            agreement = Agreement(payload, hello_alice, z)
            require(agreement.th not in seen, "a conversation is in the file twice")
            seen.add(agreement.th)
            ends = _openers(agreement)
            continue
        require(tag in ends, "an entry is of no known kind, or not where it belongs")
        opener, other = ends[tag], ends[b"B" if tag == b"A" else b"A"]
        require(opener.number == 0 or other.number > 0, "a conversation does not begin with both READY")
        message = opener.open_in_order(payload, other)
        yield Statement(opener.sender, opener.signer, message, other.missed(message))
        if message.kind is Kind.CLOSE:
            ends = {}


def _entries(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at < len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4], "big")
        require(at + 4 < end <= len(data), "the transcript ends in the middle of an entry")
        yield data[at + 4 : at + 5], data[at + 5 : end]
        at = end


def _openers(agreement: Agreement) -> dict[bytes, Opener]:
    """Check both hellos as their receivers did, and return the opening end of each direction by its tag."""
    bob = Hello.decode(Role.BOB, agreement.hello_bob)
    alice = Hello.decode(Role.ALICE, agreement.hello_alice)
    assert bob.group is not None
    check_group(bob.group)
    (bob_key, _), (alice_key, _) = bob.check(bob.group), alice.check(bob.group)
    require(bob.rsa != alice.rsa, "both sides present the same key: a reflection")
    require(len(agreement.z) == len(bob.public_value), "z is not as long as p")
    ends = agreement.end(Opener, Role.BOB, bob_key), agreement.end(Opener, Role.ALICE, alice_key)
    return {end.sender.tag: end for end in ends}


# ---------------------------------------------------------------------------------------- keys on disk


class Home:
    """A person's own folder: `identity.pem`, `dh_parameters.pem`, `known_peers`.

    Files are replaced whole or not at all, and never read through a symbolic link or when somebody
    else could have written them. Every method may raise FileError, which says what to do.
    """

    IDENTITY, GROUP, KNOWN_PEERS = "identity.pem", "dh_parameters.pem", "known_peers"

    def __init__(self, folder: Path) -> None:
        """Open the folder, making it (mode 0700) if it is not there."""
        self.folder = folder
        for part in (folder.parent, folder):
            with _disk("make", part):
                part.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_owner(folder, folder.stat(), 0o022)

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
        """Make an RSA key of 3072 bits and keep it, or take the one that another program just made."""
        key = RSA.generate(NEW_RSA_BITS, e=RSA_EXPONENT)
        with self.locked():
            made = self.load_identity(lambda _: "")
            if made is None:
                self.write(self.IDENTITY, key.export_key("PEM", pkcs=8) + b"\n")
        return made or key

    def load_group(self) -> Group | None:
        """Return the Diffie-Hellman parameters kept here, None if there are none.

        They passed `check_group` when they were saved, and pass the part of it that is quick again.
        """
        pem = self.read(self.GROUP)
        if pem is None:
            return None
        path = self.folder / self.GROUP
        try:
            group = Group.load(pem)
            check_group(group, checked_before=group)
            require(is_power_one(4, group.q, group.p) and _fermat(group.q), "p is not a safe prime")
        except ValueError:
            raise FileError(f"{path} holds no Diffie-Hellman parameters; move it away for new ones") from None
        except ProtocolError as error:
            raise FileError(f"{path} is damaged ({error}); move it away for new parameters") from None
        return group

    def save_group(self, group: Group) -> None:
        if group != self.load_group():
            with self.locked():
                self.write(self.GROUP, group.export())

    def read(self, name: str, forbidden: int = 0o022) -> bytes | None:
        """Return a file's bytes, None if there is none. By default, nobody else may have written it."""
        return read_file(self.folder / name, forbidden)

    def write(self, name: str, data: bytes) -> None:
        """Replace a file (mode 0600): whatever happens, the old or the new one is there. Needs the lock."""
        path = self.folder / name
        temporary = self.folder / f".{name}.new"
        with _disk("write", path):
            temporary.unlink(missing_ok=True)  # of a program that crashed here
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
        with contextlib.suppress(OSError):  # not every system can do that to a folder
            folder = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other program that uses this folder out while something is read and then written."""
        with contextlib.ExitStack() as stack:
            path = self.folder / ".lock"
            with _disk("lock", path):
                file = stack.enter_context(open(path, "ab", opener=_private))
                if sys.platform == "win32":
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                else:
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _private(file: str, flags: int) -> int:
    return os.open(file, flags | NO_TRICKS, 0o600)


def read_file(path: Path, forbidden: int) -> bytes | None:
    """Return the bytes of a regular file to which nobody else has `forbidden` rights, or None."""
    with _disk("read", path):
        try:
            with open(path, "rb", opener=_private) as file:
                info = os.fstat(file.fileno())
                if not stat.S_ISREG(info.st_mode) or info.st_size > FILE_LIMIT:
                    raise FileError(
                        f"{path} is not a regular file of at most {FILE_LIMIT} bytes; move it away"
                    )
                if forbidden:
                    _check_owner(path, info, forbidden)
                return file.read()
        except FileNotFoundError:
            return None


def load_group_file(path: Path, checked_before: Group | None) -> Group:
    """Return the group in a file from anywhere, checked as a peer's would be. Raises FileError."""
    pem = read_file(path, 0)
    if pem is None:
        raise FileError(f"cannot read {path}: No such file or directory")
    try:
        group = Group.load(pem)
        check_group(group, checked_before)
    except (ValueError, ProtocolError) as error:
        raise FileError(f"{path} holds no usable Diffie-Hellman parameters: {error}") from None
    return group


@contextlib.contextmanager
def _disk(what: str, path: Path) -> Iterator[None]:
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
        mode = stat.S_IMODE(info.st_mode)
        raise FileError(
            f"{path} is open to other users (mode {mode:04o}); run: chmod go-rwx {shlex.quote(str(path))}"
        )


class KnownPeer:
    """Whether a peer's key is to be trusted: trust on first use, in the manner of OpenSSH's known_hosts.

    `known_peers` is text, a line a key: name, "ssh-rsa", base64. A name may have several lines. With
    `only`, that one fingerprint is accepted and no other, and takes the place of what was pinned.
    """

    def __init__(self, home: Home, name: str, only: str | None = None) -> None:
        self.home = home
        self.name = name
        self.only = only

    def check(self, key: RsaKey) -> None:
        """Raise TrustError if the key is not acceptable. Called before anything is signed."""
        presented = fingerprint(key)
        if self.only is not None:
            if not hmac.compare_digest(presented, self.only):
                raise TrustError(
                    f"the key of {self.name} is not the one asked for\n"
                    f"  asked for: {self.only}\n"
                    f"  presented: {presented}\n"
                    "Somebody may be in between; or the fingerprint was not copied whole, or is an older one."
                )
            return
        pinned = [(number, line) for number, line in self._lines() if self._is_mine(line)]
        if pinned and ssh_line(key) not in (_pinned_key(line) for _, line in pinned):
            known = "".join(
                f"  pinned:       {fingerprint(RSA.import_key(_pinned_key(line)))}"
                f"  ({self.home.folder / Home.KNOWN_PEERS}, line {number})\n"
                for number, line in pinned
            )
            raise TrustError(
                f"the key of {self.name} is not the one pinned\n"
                f"{known}"
                f"  presented:    {presented}\n"
                f"  by telephone: {spoken(key)}\n"
                "Either somebody is in between, or the other side has a new key. Ask for the fingerprint in\n"
                "person or by telephone. Only if it is the one presented, run this program again with\n"
                f"  --peer {presented}"
            )

    def pin(self, key: RsaKey) -> bool:
        """Remember the key, once its owner has proven that he holds it; return whether it was new.

        Checks again, under the lock: somebody else may have been pinned since.
        """
        wanted = f"{self.name} {ssh_line(key)}"
        if self.only is None and wanted in (line for _, line in self._lines()):
            return False
        with self.home.locked():
            self.check(key)
            lines = [line for _, line in self._lines()]
            mine = [line for line in lines if self._is_mine(line)]
            if self.only is not None and any(_pinned_key(line) != ssh_line(key) for line in mine):
                lines, mine = [line for line in lines if line not in mine], []
            if not mine:
                text = "".join(line + "\n" for line in [*lines, wanted])
                self.home.write(Home.KNOWN_PEERS, text.encode())
            return not mine

    def _is_mine(self, line: str) -> bool:
        return line.split()[:1] == [self.name]

    def _lines(self) -> list[tuple[int, str]]:
        """Return the file's lines, numbered from 1; each is blank, a comment or a well-formed pin."""
        path = self.home.folder / Home.KNOWN_PEERS
        try:
            lines = (self.home.read(Home.KNOWN_PEERS) or b"").decode("utf-8-sig").split("\n")
        except UnicodeDecodeError:
            raise FileError(f"{path} is damaged: it is not UTF-8 text") from None
        for number, line in enumerate(lines, 1):
            blank = not line.strip() or line.lstrip().startswith("#")
            if not (blank or _is_ssh_line(_pinned_key(line))):
                raise FileError(f"{path}, line {number}: not NAME ssh-rsa BASE64; mend or delete it")
        return list(enumerate(lines[:-1] if lines[-1] == "" else lines, 1))


@functools.lru_cache(maxsize=256)
def _is_ssh_line(line: str) -> bool:
    """Whether `line` is "ssh-rsa AAAA..." in its canonical encoding (remembered: it is asked often)."""
    try:
        return ssh_line(RSA.import_key(line)) == line
    except UNPARSABLE:
        return False


def _pinned_key(line: str) -> str:
    """Return "ssh-rsa AAAA..." of a line in known_peers, as `ssh_line` does of a key."""
    return " ".join(line.split()[1:3])


# --------------------------------------------------------------------------------- text from the peer

# Unicode's classes Cc but for the tab, Cf, Cs, Zl, Zp, and the unassigned that are ignored by default.
_UNSAFE = (
    r"\0-\x08\x0a-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff"
    r"\ufff0-\ufffb\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e00ff"
    r"\U000e01f0-\U000e0fff"
)
# What may stand all the same: a joiner inside an emoji, or a word of a script that needs it, and the tags
# of a flag. (Arabic's number signs, of class Cf too, are not in the list above: they are visible.)
_JOINER = rf"(?<=[^\0-\x7f{_UNSAFE}])[\u200c\u200d](?=[^\0-\x7f{_UNSAFE}])"
_FLAG = r"(?<=\U0001f3f4)[\U000e0030-\U000e0039\U000e0061-\U000e007a]{1,6}\U000e007f"
_ESCAPE = re.compile(f"(?P<harmless>{_JOINER}|{_FLAG})|[{_UNSAFE}]")


def printable(text: str) -> str:
    """Return text that cannot drive a terminal: controls, bidi and other format characters escaped."""
    return _ESCAPE.sub(lambda m: m[0] if m["harmless"] else m[0].encode("unicode_escape").decode(), text)


def screen_lines(text: str, columns: int | None = None) -> list[str]:
    """Return the printable lines of a text, each at most `columns` wide: what may be wide counts as wide.

    Whoever prints them behind a mark of its own leaves no way to imitate a line that has none.
    """
    lines = []
    for line in map(printable, text.split("\n")):
        width = start = space = before = (
            0  # `space`: where the last word begins; `before`: the width before it
        )
        for at, char in enumerate(line):
            wide = 8 if char == "\t" else 2 if char >= "\u2600" or east_asian_width(char) in "WFA" else 1
            width += wide
            while columns is not None and width > columns and at > start:
                end, gone = (space, before) if space > start else (at, width - wide)
                lines.append(line[start:end])
                start, width = end, width - gone
            if char == " ":
                space, before = at + 1, width
        lines.append(line[start:])
    return lines
