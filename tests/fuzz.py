"""Throw bytes at every parser: valid encodings, in which parts are replaced at random.

test_parsers.py does it. An input that breaks the invariant is printed, and can be put into its REGRESSIONS.
"""

# The invariant: any bytes, split anywhere, give a value or the one documented error (ProtocolError, and
# ConnectionCut where the line ended), and never anything else. To decode and encode again changes nothing,
# where there is an encoder. What `printable` returns holds no unsafe character, and no line of `screen_lines`
# is wider than it may be. (Of files, test_disk.py has the same.)

from __future__ import annotations

import collections
import contextlib
import errno
import itertools
import traceback
import unicodedata
from collections.abc import Iterable, Iterator
from random import Random
from typing import Any, Callable
from unittest import mock

from conftest import GROUP
from Crypto.PublicKey import RSA
from Crypto.Util.asn1 import DerBitString, DerSequence
from Crypto.Util.Padding import pad

import crypto_utils as chat
from crypto_utils import ConnectionCut, Group, Hello, ProtocolError, RecordType, Role

LONGEST = 4096  # bytes of an input
RSA_ENCRYPTION = bytes.fromhex("300d06092a864886f70d0101010500")

# The same in every run, so that an input found in one breaks the invariant in the next: nobody's secrets.
OWN = RSA.generate(2048, randfunc=Random(1).randbytes)
STRANGER = RSA.construct((2**2047 + 2**2046 + 45 * 2**64 + 1, chat.RSA_EXPONENT))
SMALL = Group(0xFFFFFFFFFFFFDED7, 2)  # the exponentiations of a handshake, in microseconds
with mock.patch("secrets.token_bytes", Random(2).randbytes):
    HELLOS = {role: chat.make_hello(role, OWN, SMALL)[0] for role in Role}
Z, TH, R, LATEST = bytes(range(8)), bytes(range(32, 64)), bytes(range(32)), b"latest" * 5 + b"!!"

Target = Callable[[bytes], object]  # returns the value, or None for what is refused
TARGETS: dict[str, Target] = {}


def target(check: Target) -> Target:
    TARGETS[check.__name__] = check
    return check


def value_or(
    error: type[Exception] | tuple[type[Exception], ...], call: Callable[..., Any], *arguments: Any
) -> Any:
    """Return what the call returns, or None if it raises the error that is documented."""
    try:
        return call(*arguments)
    except error:
        return None


@contextlib.contextmanager
def replaced(module: Any, **names: Any) -> Iterator[None]:
    """Give names in a module other values for a while."""
    before = {name: vars(module)[name] for name in names}
    vars(module).update(names)
    try:
        yield
    finally:
        vars(module).update(before)


# --------------------------------------------------------------------------------------------- the wire


class Stream:
    """A socket that hands out bytes in pieces of the given sizes, over and over; a piece of 0 breaks it."""

    def __init__(self, data: bytes, sizes: bytes | list[int]) -> None:
        self.data = data
        self.read = 0
        self.largest = 0  # buffer that was to be filled
        self.broken = False
        self._sizes = itertools.cycle(sizes or [len(data) + 1])

    def setsockopt(self, *_: int) -> None:
        pass

    def settimeout(self, _: float | None) -> None:
        pass

    def recv_into(self, buffer: memoryview) -> int:
        self.largest = max(self.largest, len(buffer))
        size = next(self._sizes)
        if not size:
            self.broken = True
            raise OSError(errno.ECONNRESET, "Connection reset by peer")
        piece = self.data[self.read : self.read + min(size, len(buffer))]
        buffer[: len(piece)] = piece
        self.read += len(piece)
        return len(piece)


def split_frames(data: bytes, limit: int) -> tuple[list[bytes], type[Exception], int]:
    """Return the whole frames, what ends them, and how many bytes that takes: FrameSocket, naively."""
    frames, at = [], 0
    while len(data) >= at + 4:
        end = at + 4 + int.from_bytes(data[at : at + 4], "big")
        if end > at + 4 + limit:
            return frames, ProtocolError, at + 4
        if end > len(data):
            break
        frames.append(data[at + 4 : end])
        at = end
    return frames, ConnectionCut, len(data)


def check_frames(data: bytes, limit: int, sizes: bytes | list[int]) -> list[bytes]:
    """Receive all there is, in pieces of these sizes, and return the frames."""
    expected, end, read = split_frames(data, limit)
    stream = Stream(data, sizes)
    connected = chat.FrameSocket(stream)
    frames = []
    try:
        while True:
            frames.append(connected.receive(limit))
    except (ProtocolError, ConnectionCut) as error:
        refusal = error
    if stream.broken:
        assert frames == expected[: len(frames)], "the frames before the line broke"
        assert isinstance(refusal, ConnectionCut)
    else:
        assert (frames, type(refusal), stream.read) == (expected, end, read)
        at_an_end = end is ConnectionCut and read == sum(4 + len(payload) for payload in frames)
        assert at_an_end == ("without a goodbye" in str(refusal)), "cut between two frames, or inside one"
    assert stream.largest <= max(4, limit), "allocated before the limit was looked at"
    return frames


@target
def frames(data: bytes) -> object:
    """A limit, the number of sizes, the sizes, and the stream."""
    limit, count = (*data[:2], 0, 0)[:2]
    return check_frames(data[2 + count % 8 :], 16 * limit, data[2 : 2 + count % 8])


@target
def fields(data: bytes) -> object:
    decoded = value_or(ProtocolError, chat.decode_fields, data)
    assert decoded is None or chat.encode_fields(*decoded) == data
    return decoded


@target
def hello(data: bytes) -> object:
    """The sender, and their hello: decoded, and settled with ours in a group that is quick."""
    sender, data = list(Role)[data[0] % 2 if data else 0], data[1:]
    peer = value_or(ProtocolError, Hello.decode, data, None if sender is Role.BOB else SMALL)
    if peer is None:
        return None
    assert (peer.encode(), peer.sender) == (data, sender)
    if peer.group != SMALL:  # it has not passed its checks
        return None
    own = HELLOS[sender.peer]
    hellos = (peer, own) if sender is Role.BOB else (own, peer)
    settled = value_or(ProtocolError, chat.settle, *hellos)
    if settled is not None:
        y = int.from_bytes(peer.public_value, "big")
        assert peer.public_value == y.to_bytes(8, "big"), "Z would not be as long as p"
        assert 1 < y < SMALL.p - 1
        assert pow(y, (SMALL.p - 1) // 2, SMALL.p) == 1
        keys, _ = settled
        assert keys[sender].public_key().export_key("DER") == peer.rsa != OWN.public_key().export_key("DER")
    return settled


@target
def public_key(data: bytes) -> object:
    key = value_or(ProtocolError, chat.load_public_key, data)
    if key is not None:
        assert key.public_key().export_key("DER") == data
        assert (key.e, key.has_private()) == (65537, False)
        assert 2048 <= key.size_in_bits() <= 4096
    return key


# ------------------------------------------------------------------------------------------- the records


def opener_at(number: int, sender: Role = Role.BOB) -> tuple[chat.Opener, chat.Sealer]:
    """The receiver's ends, where record `number` of the sender comes next, in turn, in reply to LATEST."""
    opener, sealer = chat.Opener(sender, OWN.public_key(), Z, TH), chat.Sealer(sender.peer, OWN, Z, TH)
    opener.number, sealer.number = number, number + (sender is Role.BOB)
    sealer.latest = LATEST if sealer.number else chat.NOTHING
    return opener, sealer


def check_open(number: int, record: bytes, sender: Role = Role.BOB) -> chat.Message | None:
    opener, sealer = opener_at(number, sender)
    message = value_or(ProtocolError, opener.open, record, sealer)
    assert opener.closed == (message is None or message.type is RecordType.CLOSE)
    assert opener.number == number + (message is not None)
    return message


def insider(number: int, plaintext: bytes, sender: Role = Role.BOB) -> chat.Message | None:
    """Open a plaintext as if its owner had encrypted and signed it."""
    body = number.to_bytes(12, "big") + plaintext + bytes(16)
    with replaced(chat, verify=lambda *_: True, decrypt=lambda *arguments: bytes(arguments[2])):
        message = check_open(number, body + bytes(OWN.size_in_bytes()), sender)
    if message is not None:
        assert pad(bytes([message.type]) + message.in_reply_to + message.body, 256, "iso7816") == plaintext
        busy = (message.type, number, sender) == (RecordType.CLOSE, 0, Role.BOB)
        assert busy or (message.type is RecordType.READY) == (number == 0)
        if message.type is RecordType.TEXT:
            assert len(message.text.encode()) <= chat.TEXT_LIMIT
        else:
            ready_of_bob = (message.type, sender) == (RecordType.READY, Role.BOB)
            assert len(message.body) == (32 if ready_of_bob else 0)
    return message


@target
def plaintext(data: bytes) -> object:
    """A record's number, how to pad it (right, with zeros, or not), and its sender; and what is in it."""
    first, data = (data[0], data[1:]) if data else (0, b"")
    sender = list(Role)[first // 9 % 2]
    padded = (pad(data, 256, "iso7816"), data + bytes(-len(data) % 256), data)[first // 3 % 3]
    return insider(first % 3, padded, sender)


# ----------------------------------------------------------------------------------------------- the text

NUMBER_SIGNS = "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"
JOINERS = "\u200c\u200d"


def is_hidden(char: str) -> bool:
    """Whether a character is of a class that drives a terminal, or cannot be seen."""
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in NUMBER_SIGNS


def is_unsafe(text: str, at: int) -> bool:
    """Whether a character can drive a terminal or hide, by its class and by what is beside it."""
    char = text[at]
    if char == "\t" or not is_hidden(char):
        return False
    if char in JOINERS:  # which may stand beside a letter that is not ASCII
        beside = text[max(0, at - 1) : at] + text[at + 1 : at + 2]
        return not any(near > "\x7f" and not is_hidden(near) for near in beside)
    return not ("\U000e0030" <= char <= "\U000e007f" and "\U0001f3f4" in text[max(0, at - 7) : at])


# What Unicode 16, or glibc, has made wide; an older unicodedata does not know it yet.
NEWLY_WIDE = (
    ("\u2630", "\u2637"),
    ("\u268a", "\u268f"),
    ("\u3248", "\u324f"),
    ("\u4dc0", "\u4dff"),
    ("\U0001d300", "\U0001d356"),
    ("\U0001d360", "\U0001d376"),
)


def columns_of(char: str) -> int:
    """Return how many columns a character takes at most."""
    category = unicodedata.category(char)
    if category in ("Mn", "Me") or char in JOINERS or "\U000e0000" < char < "\U000e0080":
        return int(char == "\ufe0f")  # which makes an emoji of what it follows
    wide = category == "Cn" or any(first <= char <= last for first, last in NEWLY_WIDE)
    return 2 if wide or unicodedata.east_asian_width(char) in "WF" else 1


def check_text(received: str, columns: int) -> str:
    shown = chat.printable(received)
    assert not any(is_unsafe(shown, at) for at in range(len(shown))), f"unsafe: {shown!a}"
    assert chat.printable(shown) == shown, f"escaped twice: {shown!a}"
    lines = chat.screen_lines(received, columns)
    assert all(sum(map(columns_of, line)) <= columns for line in lines), "wider than the screen"
    joined, written = "".join(lines), "".join(chat.screen_lines(received))
    assert joined == written or ("\t" in written and joined.split() == written.split()), "lost"
    assert chat.screen_lines(received) == list(map(chat.printable, received.split("\n")))
    return shown


@target
def text(data: bytes) -> object:
    """The width, what it is encoded in, and a text."""
    columns, data = data[0] if data else 0, data[1:]
    utf16 = data[: len(data) // 2 * 2].decode("utf-16-le", "surrogatepass") if columns % 2 else None
    return check_text(data.decode("utf-8", "surrogateescape") if utf16 is None else utf16, 8 + columns // 2)


# ---------------------------------------------------------------------------------- valid, to start from


def seeds() -> dict[str, list[bytes]]:
    """Return inputs of each target: the first is valid, and others are but for one thing."""
    value = pow(2, 99, SMALL.p).to_bytes(8, "big")
    loose_der = DerSequence([STRANGER.n, b"\2\4\0\1\0\1"]).encode()  # a zero that need not be there
    loose_spki = DerSequence([RSA_ENCRYPTION, DerBitString(loose_der)]).encode()
    alice, bob, large = (
        Hello(sender, group, bytes(32), value, STRANGER.public_key().export_key("DER")).encode()
        for sender, group in ((Role.ALICE, SMALL), (Role.BOB, SMALL), (Role.BOB, GROUP))
    )
    texts = [
        "a\tb\n\u6f22\x1b[2J \u202e\u05d0",
        "\u0645\u06cc\u200c\u062e \U0001f468\u200d\U0001f469 \u0600\u0661",
    ]
    texts.append("\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f\u2028")
    stream = chat.frame(b"hello") + chat.frame(b"") + chat.frame(bytes(20))
    return {
        "frames": [b"\x02\0" + stream, b"\x02\3\1\7\2" + stream, b"\1\1\5" + stream, b"\2\3\4\5\0" + stream],
        "fields": [chat.encode_fields(b"a", b"", b"b" * 300), bob],
        "hello": [
            *(b"\0" + bob, b"\1" + alice, b"\0" + alice, b"\1" + bob, b"\0" + large),
            b"\0" + HELLOS[Role.BOB].encode(),
            b"\0" + bob.replace(b"\0\x08" + chat.to_bytes(SMALL.p), b"\0\x09\0" + chat.to_bytes(SMALL.p)),
            b"\1" + alice.replace(b"\0\x08" + value, b"\0\1\4"),
        ],
        "public_key": [
            STRANGER.public_key().export_key("DER"),
            OWN.public_key().export_key("DER"),
            loose_spki,
        ],
        "plaintext": [
            b"\0\0" + LATEST + R,
            b"\0\2" + LATEST,  # Bob is busy
            b"\x09\0" + chat.NOTHING,
            b"\x09\2" + chat.NOTHING,
            b"\1\1" + LATEST + texts[1].encode(),
            b"\x0b\2" + LATEST,
            b"\x0b\2" + LATEST + b"a body",
            b"\7" + pad(b"\1" + LATEST + b"a", 256, "iso7816"),
        ],
        "text": [
            *(b"\0" + each.encode() for each in texts),
            *(b"\1" + each.encode("utf-16-le") for each in texts),
        ],
    }


# --------------------------------------------------------------------------------------------- the driver


def mutated(random: Random, valid: list[bytes]) -> bytes:
    """Return a seed in which some parts are replaced: cut, repeated, overwritten, or taken from another."""
    seed = random.choice(valid)
    others = [other for other in valid if other[0] == seed[0]]
    data = bytearray(seed)
    for _ in range(random.choice((1, 1, 2, 4, 8))):
        at, cut, new = random.randrange(1, len(data) + 1), *random.choices((0, 1, 2, 4, 8, 32), k=2)
        other = random.choice(others)
        start = random.randrange(len(other))
        data[at : at + cut] = random.choice(
            (
                random.randbytes(cut),
                random.randbytes(new),
                other[start : start + new],
                bytes([random.choice((0, 1, 0x7F, 0x80, 0xFF))]) * cut,
                bytes(byte ^ 1 << random.randrange(8) for byte in data[at : at + cut]),
            )
        )
    return bytes(data[:LONGEST])


def inputs(names: list[str], runs: int, seed: int) -> Iterator[bytes]:
    """Yield the seeds of these targets, and then mutations of them. The first byte is the target's number."""
    made, random = seeds(), Random(seed)
    valid = [bytes([list(TARGETS).index(name)]) + data for name in names for data in made[name]]
    for number in range(runs):
        yield valid[number] if number < len(valid) else mutated(random, valid)


def run(tried: Iterable[bytes]) -> int:
    """Run inputs until one breaks the invariant: whatever else is raised does. Return how many did."""
    counts: collections.Counter[str] = collections.Counter()
    found = 0
    for data in tried:
        name = list(TARGETS)[data[0] % len(TARGETS) if data else 0]
        counts[name] += 1
        try:
            TARGETS[name](data[1:])
        except Exception:  # whatever it is: that is the finding
            traceback.print_exc()
            print(f"the invariant does not hold: {(name, data[1:].hex())}")
            found = 1
            break
    print(*(f"{name} {count}" for name, count in counts.items()), sep=", ")
    print(f"{sum(counts.values())} inputs, {found} findings", flush=True)
    return found
