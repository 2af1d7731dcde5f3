#!/usr/bin/env python3
"""Mallory: she owns the wire between Bob and Alice. Attack their conversation yourself, and see what refuses.

    python3 tests/mallory.py                                   listen only
    python3 tests/mallory.py --list                            the attacks, and the checks that refuse them
    python3 tests/mallory.py ciphertext                        attack
    python3 tests/mallory.py --without signature ciphertext    attack two programs that lack a check

Alice connects to her port instead of Bob's; both use a home folder made for this, and a port of their own.
`Wire` carries the frames, and does with each what a `Tamper` says. ATTACKS is the one table of attacks: this
program, the tests in one process and the tests of the two programs all take them from there; the names of the
checks are those of weakenings.py. `exchange` is for the tests alone: it runs the real handshake and a short
conversation over such a wire.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import functools
import os
import secrets
import shlex
import shutil
import signal
import socket
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Callable, NamedTuple

from weakenings import WEAKENINGS, broken_copy

ROOT = Path(__file__).resolve().parent.parent


def address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not (host and port.isdecimal() and int(port) < 65536):
        raise argparse.ArgumentTypeError("an address is HOST:PORT")
    return host.strip("[]"), int(port)


def checks(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in WEAKENINGS:
            raise argparse.ArgumentTypeError(f"there is no check named {name}; --list shows them")
    return names


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Mallory sits between Alice and Bob. Without an attack, she listens.",
        epilog="She says which commands start Bob and Alice.",
    )
    parser.add_argument("attack", nargs="?", metavar="ATTACK", help="what to do; --list shows what there is")
    help_listen = "port that Alice connects to (default: %(default)s; 0: any free one)"
    parser.add_argument("--listen", type=int, default=65433, metavar="PORT", help=help_listen)
    help_bob = "where Bob is (default: 127.0.0.1:65434)"
    parser.add_argument(
        "--bob", type=address, default=("127.0.0.1", 65434), metavar="HOST:PORT", help=help_bob
    )
    help_home = "where Bob and Alice have their keys for this (default: %(default)s)"
    parser.add_argument("--home", default="~/lesson", metavar="DIR", help=help_home)
    help_list = "show the attacks, and the checks that refuse them, and end"
    parser.add_argument("--list", action="store_true", help=help_list)
    help_without = "make a copy of the programs without these checks, and attack that"
    parser.add_argument("--without", type=checks, default=(), metavar="CHECK[,CHECK...]", help=help_without)
    return parser


# She speaks the protocol as the programs do that she attacks: from a broken copy, if there is one.
OPTIONS = command_line().parse_args() if __name__ == "__main__" else command_line().parse_args([])
try:
    COPY = broken_copy(ROOT, OPTIONS.without) if OPTIONS.without else None
except ValueError as problem:
    command_line().error(f"these checks cannot be taken away together: {problem}")
if COPY:
    atexit.register(shutil.rmtree, COPY, ignore_errors=True)
sys.path.insert(0, str(COPY or ROOT))

import crypto_utils as chat

if TYPE_CHECKING:
    from conftest import Keys

Role, ProtocolError, RSA = chat.Role, chat.ProtocolError, chat.RSA
BOB, ALICE = Role.BOB, Role.ALICE

# ---------------------------------------------------------------------------------------- the wire


class Last(bytes):
    """The last bytes that Mallory lets through: then she cuts the wire."""


class Held(bytes):
    """Bytes after which Mallory holds the line open, even if their sender hangs up."""


class Slowly(bytes):
    """Bytes that Mallory lets through one at a time."""


SLOW_SECONDS = 0.06  # from one of them to the next

# What goes on the wire in the place of a sender's n-th frame (length and payload).
Tamper = Callable[["chat.Role", int, bytes], bytes]
HELLO, READY, TEXT, CLOSE = range(4)  # a sender's frames, if one request is made; the last one is Alice's


def honest(sender: chat.Role, number: int, data: bytes) -> bytes:
    return data


def only(sender: chat.Role, number: int, change: Callable[[bytes], bytes]) -> Tamper:
    """Tamper with one frame, and pass on all others."""
    return lambda who, n, data: change(data) if (who, n) == (sender, number) else data


class Wire:
    """Carries frames both ways, in two threads, until either side ends or Mallory cuts."""

    def __init__(self, bob: socket.socket, alice: socket.socket, tamper: Tamper) -> None:
        self.frames: dict[chat.Role, list[bytes]] = {BOB: [], ALICE: []}  # as they were sent
        self._tamper = tamper
        self._one_at_a_time = threading.Lock()
        self._ends = {BOB: bob, ALICE: alice}
        self._threads = [threading.Thread(target=self._carry, args=(role,), daemon=True) for role in Role]
        for thread in self._threads:
            thread.start()

    def _carry(self, sender: chat.Role) -> None:
        source, sink, held = self._ends[sender], self._ends[sender.peer], False
        with contextlib.suppress(OSError):
            while True:
                data = self._frame(source)
                if not data:
                    break
                self.frames[sender].append(data)
                with self._one_at_a_time:
                    passed_on = self._tamper(sender, len(self.frames[sender]) - 1, data)
                if isinstance(passed_on, Slowly):
                    for at in range(len(passed_on)):
                        sink.sendall(passed_on[at : at + 1])
                        time.sleep(SLOW_SECONDS)
                else:
                    sink.sendall(passed_on)
                held = held or isinstance(passed_on, Held)
                if isinstance(passed_on, Last):
                    self._end(source)
                    break
        if not held:
            self._end(sink)

    @staticmethod
    def _end(connected: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connected.shutdown(socket.SHUT_WR)

    @staticmethod
    def _frame(source: socket.socket) -> bytes:
        """Return the next frame, or what there was of it when the sender ended."""
        data = b""
        while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "big"):
            missing = 4 - len(data) if len(data) < 4 else 4 + int.from_bytes(data[:4], "big") - len(data)
            more = source.recv(missing)
            if not more:
                break
            data += more
        return data

    def close(self, seconds: float | None = None) -> None:
        """Wait until both sides have ended, at most so many seconds, and close."""
        for thread in self._threads:
            thread.join(seconds)
            assert not thread.is_alive()
        for end in self._ends.values():
            end.close()


# ------------------------------------------------------------------------------- what she does on it

Tell = Callable[[str], None]  # says what she does, when she does it
Frames = dict["chat.Role", list[bytes]]
Plan = Callable[[Tell, Frames], Tamper]  # for one conversation; the frames are those of the one before

VERSION, NONCE = 0, 1  # fields of both hellos
P, G, B, BOB_RSA = 2, 3, 4, 5
A, ALICE_RSA = 2, 3
TEXT_AT = 4 + 12 + 1 + 32  # where the text begins in a frame: after length, nonce, type and reply


def flip(data: bytes, at: int, bit: int = 1) -> bytes:
    at %= len(data)
    return data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]


def hello_with(index: int, value: bytes) -> Callable[[bytes], bytes]:
    """Replace one field of a hello."""

    def change(data: bytes) -> bytes:
        fields = chat.decode_fields(data[4:])
        fields[index] = value
        return chat.frame(chat.encode_fields(*fields))

    return change


@functools.cache
def own_key() -> chat.RsaKey:
    return RSA.generate(2048)


def once(sender: chat.Role, number: int, change: Callable[[bytes], bytes], told: str) -> Plan:
    """Change one frame, whatever it holds."""

    def plan(tell: Tell, earlier: Frames) -> Tamper:
        def change_and_tell(data: bytes) -> bytes:
            tell(told)
            return change(data)

        return only(sender, number, change_and_tell)

    return plan


class Conversation:
    """A plan that needs what has passed before: the frames of this conversation, and of the one before."""

    def __init__(self, tell: Tell, earlier: Frames) -> None:
        self.tell, self.earlier = tell, earlier
        self.seen: Frames = {BOB: [], ALICE: []}

    def __call__(self, sender: chat.Role, number: int, data: bytes) -> bytes:
        self.seen[sender].append(data)
        return self.tamper(sender, number, data)

    def tamper(self, sender: chat.Role, number: int, data: bytes) -> bytes:
        raise NotImplementedError


class ChangeTheTag(Conversation):
    def tamper(self, sender: chat.Role, number: int, data: bytes) -> bytes:
        if (sender, number) != (ALICE, TEXT):
            return data
        self.tell("I flip one bit of the tag of Alice's message.")
        rsa = RSA.import_key(chat.decode_fields(self.seen[ALICE][HELLO][4:])[ALICE_RSA])
        return flip(data, -rsa.size_in_bytes() - 1)


class SwapTwo(Conversation):
    def tamper(self, sender: chat.Role, number: int, data: bytes) -> bytes:
        if (sender, number) == (ALICE, TEXT):
            self.tell("I hold Alice's message back. What she sends next goes first.")
            return b""
        return data + self.seen[ALICE][TEXT] if (sender, number) == (ALICE, CLOSE) else data


class Replay(Conversation):
    def tamper(self, sender: chat.Role, number: int, data: bytes) -> bytes:
        if (sender, number) != (ALICE, CLOSE):
            return data
        self.tell("Before Alice's next record, I send her first message once more.")
        return self.seen[ALICE][TEXT] + data


class Reflect(Conversation):
    def tamper(self, sender: chat.Role, number: int, data: bytes) -> bytes:
        if (sender, number) != (BOB, TEXT):
            return data
        self.tell("In the place of Bob's answer, I send Alice her own message.")
        return self.seen[ALICE][TEXT]


class ReplayAnEarlierOne(Conversation):
    def tamper(self, sender: chat.Role, number: int, data: bytes) -> bytes:
        if (sender, number) != (ALICE, TEXT):
            return data
        self.tell("In the place of Alice's message, I send her message from the earlier conversation.")
        return self.earlier[ALICE][TEXT]


class PresentBobsKey(Conversation):
    def tamper(self, sender: chat.Role, number: int, data: bytes) -> bytes:
        if (sender, number) != (ALICE, HELLO):
            return data
        self.tell("In Alice's hello, I put Bob's own RSA key in the place of hers.")
        return hello_with(ALICE_RSA, chat.decode_fields(self.seen[BOB][HELLO][4:])[BOB_RSA])(data)


def transcript_hash(hello_bob: bytes, hello_alice: bytes) -> bytes:
    """Return th as the programs compute it that she attacks."""
    bob = chat.Hello.decode(hello_bob)
    _, th = chat.settle(bob, chat.Hello.decode(hello_alice, bob.group))
    return th


def read(tell: Tell, message: chat.Message, sender: chat.Role) -> None:
    """Tell what she has read."""
    name = sender.value.title()
    if message.type is chat.RecordType.TEXT:
        tell(f"I can read it. {name}: {chat.printable(message.text)}")
    elif message.type is chat.RecordType.READY:
        tell(f"I have the key with which {name} encrypts.")


class Zeros(Conversation):
    """A and B become 0, and so does Z, whatever the exponents are: she computes all keys, and listens."""

    def tamper(self, sender: chat.Role, number: int, data: bytes) -> bytes:
        if number == HELLO:
            index, symbol = (B, "B") if sender is BOB else (A, "A")
            value = chat.decode_fields(data[4:])[index]
            self.tell(f"I replace {symbol} by 0. Whatever the exponents are, Z is 0 then.")
            changed = hello_with(index, bytes(len(value)))(data)
            if sender is ALICE:
                self._prepare(data, changed)
            return changed
        read(self.tell, self._openers[sender].open(data[4:], self._openers[sender.peer]), sender)
        return data

    def _prepare(self, hello_alice: bytes, changed: bytes) -> None:
        hello_bob = chat.Hello.decode(self.seen[BOB][HELLO][4:])
        z = bytes(len(hello_bob.public_value))
        hers = hello_with(B, z)(self.seen[BOB][HELLO])[4:], hello_alice[4:]  # the hellos that Alice knows
        his = self.seen[BOB][HELLO][4:], changed[4:]
        rsa = chat.decode_fields(hello_alice[4:])[ALICE_RSA]
        self._openers = {
            ALICE: chat.Opener(ALICE, RSA.import_key(rsa), z, transcript_hash(*hers)),
            BOB: chat.Opener(BOB, RSA.import_key(hello_bob.rsa), z, transcript_hash(*his)),
        }


class Between(Conversation):
    """A man in the middle: she shakes hands with both, opens every record, and seals it anew.

    Without a key of her own to present she presents theirs, and has no signature that fits. `group` is what
    she offers Alice in the place of Bob's; then she finds Alice's exponent instead of choosing one.
    """

    offer: str
    group: chat.Group | None = None
    own: chat.RsaKey | None = None

    def tamper(self, sender: chat.Role, number: int, data: bytes) -> bytes:
        payload = data[4:]
        if number == HELLO:
            return chat.frame(self._to_alice(payload) if sender is BOB else self._to_bob(payload))
        opener, back = self._from[sender], self._to[sender]
        message = opener.open(payload, back)
        read(self.tell, message, sender)
        on = self._to[sender.peer]
        ready = message.type is chat.RecordType.READY
        body = self._r if ready and sender is BOB else message.body
        record = on.seal(message.type, body, self._from[sender.peer])
        if not self.own:
            record = record[: -on.signer.size_in_bytes()] + secrets.token_bytes(opener.signer.size_in_bytes())
        return chat.frame(record)

    def find_exponent(self, public_value: int) -> int:
        raise NotImplementedError

    def _to_alice(self, hello: bytes) -> bytes:
        self._bob = chat.Hello.decode(hello)
        self._her_group = self.group or self._bob.group
        self._exponent, self._r = secrets.token_bytes(32), secrets.token_bytes(32)
        value = chat.modexp(self._her_group.g, self._exponent, self._her_group.p)
        rsa = self.own.public_key().export_key("DER") if self.own else self._bob.rsa
        self.tell(self.offer)
        self._hello_to_alice = self._bob._replace(
            group=self._her_group, nonce=chat.commit(self._r), public_value=value, rsa=rsa
        )
        return self._hello_to_alice.encode()

    def _to_bob(self, hello: bytes) -> bytes:
        p, g = self._bob.group
        alice = chat.Hello.decode(hello, self._bob.group)
        y = int.from_bytes(alice.public_value, "big")
        z_alice = chat.modexp(y, self._exponent, self._her_group.p)
        if self.group:
            b = int.from_bytes(self._hello_to_alice.public_value, "big")
            z_alice = pow(b, self.find_exponent(y), self._her_group.p).to_bytes(len(z_alice), "big")
        exponent = secrets.token_bytes(32)
        z_bob = chat.modexp(int.from_bytes(self._bob.public_value, "big"), exponent, p)
        rsa = self.own.public_key().export_key("DER") if self.own else alice.rsa
        value = chat.modexp(g, exponent, p)
        to_bob = alice._replace(nonce=secrets.token_bytes(32), public_value=value, rsa=rsa).encode()
        th_alice = transcript_hash(self._hello_to_alice.encode(), hello)
        th_bob = transcript_hash(self.seen[BOB][HELLO][4:], to_bob)
        signer = self.own or own_key()
        self._to = {
            ALICE: chat.Sealer(BOB, signer, z_alice, th_alice),
            BOB: chat.Sealer(ALICE, signer, z_bob, th_bob),
        }
        self._from = {
            ALICE: chat.Opener(ALICE, RSA.import_key(alice.rsa), z_alice, th_alice),
            BOB: chat.Opener(BOB, RSA.import_key(self._bob.rsa), z_bob, th_bob),
        }
        return to_bob


class WithKeysOfHerOwn(Between):
    offer = "I answer Alice as if I were Bob, and Bob as if I were Alice, with my own RSA key."

    def __init__(self, tell: Tell, earlier: Frames) -> None:
        super().__init__(tell, earlier)
        self.own = own_key()


class WithASmallP(Between):
    """Alice's exponent has an eighth of the bits of p: for 64 bits, there are 256 exponents to try."""

    offer = "I offer Alice a p of 64 bits in the place of Bob's. I can try all the exponents that fit it."
    group = chat.Group(2**64 - 1469, 4)

    def find_exponent(self, public_value: int) -> int:
        g, p = self._her_group.g, self._her_group.p
        a = next(a for a in range(256) if pow(g, a, p) == public_value)
        self.tell(f"I tried them all: Alice's secret exponent a is {a}.")
        return a


class WithACompositeP(Between):
    """p = 2^2048 - 1 and g = 4: then g^a is 1 followed by zeros, and their number tells a."""

    offer = "I offer Alice p = 2^2048 - 1, which is no prime, and g = 4. Then A is a power of 2."
    group = chat.Group(2**2048 - 1, 4)

    def find_exponent(self, public_value: int) -> int:
        twice = public_value.bit_length() - 1
        self.tell(f"A is 2^{twice}: Alice's secret exponent a is {twice // 2}, modulo 1024.")
        return twice // 2


# ------------------------------------------------------------------------------------ the attacks

NUMBER = "record {} where record {} should be"
SIGNATURE = "the record's signature is not valid"
TAG = "the record's authentication tag is not valid"
LENGTH = "the record's body has a wrong length"
REPLIES = "the record replies to another record"
WORDS = "These words do not belong to this connection"
SUBGROUP = "the public value is not in the subgroup of order q"
LATE = "the other side did not answer in time"
WAITS = None  # the exit status of Bob, who goes on waiting for Alice

REQUEST, REPLY = "pay 100 to Carol, and tell nobody", "it is done, and nobody knows"
FORGED = "pay 900 to Carol, and tell nobody"  # with one bit changed
AMOUNT, ONE_TO_NINE = REQUEST.index("1"), ord("1") ^ ord("9")
SAMPLE = "pay 100 to Carol"
EARLIER = "what was said in an earlier conversation"


class Check(NamedTuple):
    """A check that refuses an attack: its name in weakenings.py, on whose side, and with which words.

    Then come the exit statuses of Bob and Alice, and what is to be seen before it refuses.
    """

    name: str
    side: chat.Role
    reason: str
    statuses: tuple[int | None, int | None]
    until_then: str = ""


class Attack(NamedTuple):
    """What Mallory does, the checks in the order in which they refuse it, and what comes of it without them.

    `shown` is what both are shown then as the other's words, if REQUEST is answered by REPLY.
    """

    name: str
    sentence: str
    plan: Plan
    checks: tuple[Check, ...]
    success: str
    shown: tuple[tuple[str, ...], tuple[str, ...]] = ((REQUEST,), (REPLY,))
    before: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())  # what was shown when the first check refused
    statuses: tuple[int | None, int | None] = (0, 0)  # without the checks
    reads: bool = False  # whether Mallory reads what both say, without the checks
    leaves_early: bool = False  # Alice leaves before Bob has answered
    needs_peer: bool = False  # Alice was started with --peer and Bob's fingerprint
    needs_earlier: bool = False  # they have talked before
    needs_recording: bool = False  # ... through Mallory, who has recorded it
    first_meeting: bool = False  # they do not know each other
    silent: bool = False  # its checks refuse it in the handshake, before anybody can say anything
    still_refused: str = ""  # why it does not succeed even without these checks

    @property
    def in_the_middle(self) -> bool:
        """Whether she shakes hands with both, so that they have no words in common."""
        return isinstance(self.plan, type) and issubclass(self.plan, Between)


AS_BOB_BREAKS_OFF, AS_ALICE_BREAKS_OFF = (3, 1), (1, 3)
IN_BOBS_HANDSHAKE, IN_ALICES_HANDSHAKE = (WAITS, 1), (WAITS, 3)

ATTACKS = {
    attack.name: attack
    for attack in (
        # ------------------------------------------------------------------------- the hellos
        Attack(
            "hello",
            "One bit of a hello is changed, in Bob's nonce.",
            once(
                BOB,
                HELLO,
                lambda data: flip(data, 4 + 2 + len(chat.VERSION) + 2),
                "I flip one bit of the nonce in Bob's hello.",
            ),
            (
                Check("th", BOB, SIGNATURE, IN_BOBS_HANDSHAKE),
                Check("commitment", ALICE, "Bob's r does not fit his nonce", AS_ALICE_BREAKS_OFF),
            ),
            "Both talk, and neither notices that they have read different hellos.",
            silent=True,
        ),
        Attack(
            "version",
            "Bob's hello says that he speaks another version of the protocol.",
            once(
                BOB,
                HELLO,
                hello_with(VERSION, b"secure-chat/0"),
                "I change the version in Bob's hello to secure-chat/0.",
            ),
            (
                Check("version", ALICE, "the other side does not speak secure-chat/1", IN_ALICES_HANDSHAKE),
                Check("th", BOB, SIGNATURE, IN_BOBS_HANDSHAKE),
            ),
            "Both talk. Somebody could make them use an old and weak version.",
            silent=True,
        ),
        Attack(
            "zero",
            "A and B are replaced by 0.",
            Zeros,
            (
                Check("subgroup", ALICE, SUBGROUP, IN_ALICES_HANDSHAKE),
                Check("th", BOB, SIGNATURE, IN_BOBS_HANDSHAKE),
            ),
            "Z is 0, and Mallory reads everything.",
            reads=True,
            silent=True,
        ),
        Attack(
            "small-p",
            "Alice is offered a p of 64 bits, and both get signatures that fit nothing.",
            WithASmallP,
            (
                Check("size-of-p", ALICE, "p has 64 bits, not 2048 to 4096", IN_ALICES_HANDSHAKE),
                Check("signature", BOB, SIGNATURE, IN_BOBS_HANDSHAKE),
            ),
            "Mallory finds Alice's exponent by trying them all, and reads everything.",
            reads=True,
            silent=True,
        ),
        Attack(
            "composite-p",
            "Alice is offered a p that is no prime, and both get signatures that fit nothing.",
            WithACompositeP,
            (
                Check("safe-prime", ALICE, "p is not a safe prime", IN_ALICES_HANDSHAKE),
                Check("signature", BOB, SIGNATURE, IN_BOBS_HANDSHAKE),
            ),
            "Mallory sees from A what Alice's exponent is, and reads everything.",
            reads=True,
            silent=True,
        ),
        Attack(
            "mitm",
            "Mallory is in the middle, with keys of her own. Both have talked before.",
            WithKeysOfHerOwn,
            (
                Check("pin", ALICE, "is not the pinned one", IN_ALICES_HANDSHAKE),
                Check(
                    "words",
                    ALICE,
                    WORDS,
                    IN_ALICES_HANDSHAKE,
                    "Both screens ask about a new key, and it is mine. Type on each the words that stand on "
                    "the other one: they differ, since neither has shaken hands with the other.",
                ),
            ),
            "Mallory reads everything that both say.",
            reads=True,
            needs_earlier=True,
            silent=True,
        ),
        Attack(
            "mitm-peer",
            "Mallory is in the middle, with keys of her own. Alice was told Bob's fingerprint.",
            WithKeysOfHerOwn,
            (
                Check("peer", ALICE, "is not the one asked for", IN_ALICES_HANDSHAKE),
                Check(
                    "words",
                    BOB,
                    WORDS,
                    (WAITS, 1),
                    "Alice is not asked, because she was told a fingerprint, but Bob is. Type on his screen "
                    "the words that stand on hers.",
                ),
            ),
            "Mallory reads everything that both say.",
            reads=True,
            needs_peer=True,
            first_meeting=True,
            silent=True,
        ),
        Attack(
            "bobs-own-key",
            "Alice's RSA key is replaced by Bob's own.",
            PresentBobsKey,
            (
                Check("reflection", BOB, "both sides present the same key", IN_BOBS_HANDSHAKE),
                Check("signature", BOB, SIGNATURE, IN_BOBS_HANDSHAKE),
                Check("th", BOB, TAG, IN_BOBS_HANDSHAKE),
            ),
            "Bob takes Alice's words for those of somebody who has his own key.",
            first_meeting=True,
            silent=True,
        ),
        Attack(
            "busy",
            "Bob's READY is turned into a goodbye: then it says that he is busy.",
            once(
                BOB,
                READY,
                lambda data: flip(data, 4 + 12, chat.RecordType.READY ^ chat.RecordType.CLOSE),
                "I change the first byte of the ciphertext of Bob's READY: it becomes a CLOSE.",
            ),
            (
                Check("signature", ALICE, SIGNATURE, AS_ALICE_BREAKS_OFF),
                Check("tag", ALICE, TAG, AS_ALICE_BREAKS_OFF),
                Check("empty-close", ALICE, LENGTH, AS_ALICE_BREAKS_OFF),
            ),
            "Alice is told that Bob cannot talk now. He is waiting for her.",
            shown=((), ()),
            statuses=(1, 1),
            silent=True,
        ),
        Attack(
            "length",
            "A frame claims to be 64 MiB long, and nothing follows.",
            once(
                ALICE,
                READY,
                lambda _: Held((1 << 26).to_bytes(4, "big")),
                "In the place of Alice's READY, I announce 64 MiB, and send nothing.",
            ),
            (
                Check("limit", BOB, "a frame of 67108864 bytes, over the limit", IN_BOBS_HANDSHAKE),
                Check("deadline", BOB, LATE, IN_BOBS_HANDSHAKE),
            ),
            "",
            still_refused="A frame that has begun may not stall for 30 seconds either.",
            silent=True,
        ),
        Attack(
            "slow",
            "Alice's hello arrives one byte at a time.",
            once(ALICE, HELLO, Slowly, "I send Alice's hello to Bob one byte at a time."),
            (Check("deadline", BOB, LATE, IN_BOBS_HANDSHAKE),),
            "Bob is patient. Whoever does this many times side by side keeps others away from him.",
            silent=True,
        ),
        # ------------------------------------------------------------------------- one record
        Attack(
            "number",
            "One bit of a record's number is changed, which is its nonce.",
            once(
                ALICE,
                TEXT,
                lambda data: flip(data, 4 + 11, 128),
                "I flip one bit of the number of Alice's message.",
            ),
            (
                Check("number", BOB, NUMBER.format(129, 1), AS_BOB_BREAKS_OFF),
                Check("signature", BOB, SIGNATURE, AS_BOB_BREAKS_OFF),
                Check("tag", BOB, TAG, AS_BOB_BREAKS_OFF),
            ),
            "",
            still_refused="What is decrypted with another nonce is noise, and noise has no valid padding.",
        ),
        Attack(
            "ciphertext",
            "One bit of the ciphertext is changed: pay 100 becomes pay 900.",
            once(
                ALICE,
                TEXT,
                lambda data: flip(data, TEXT_AT + AMOUNT, ONE_TO_NINE),
                "I flip one bit of the ciphertext of Alice's message. The key is not needed for that: if "
                "she begins with pay 100, a 1 becomes a 9.",
            ),
            (
                Check("signature", BOB, SIGNATURE, AS_BOB_BREAKS_OFF),
                Check("tag", BOB, TAG, AS_BOB_BREAKS_OFF),
                Check(
                    "reply",
                    ALICE,
                    REPLIES,
                    AS_ALICE_BREAKS_OFF,
                    "Bob is shown another text than Alice typed, as if it were verified. Then he answers.",
                ),
            ),
            "Bob is shown another text than Alice typed, as if it were verified.",
            shown=((FORGED,), (REPLY,)),
        ),
        Attack(
            "tag",
            "One bit of an authentication tag is changed.",
            ChangeTheTag,
            (
                Check("signature", BOB, SIGNATURE, AS_BOB_BREAKS_OFF),
                Check("tag", BOB, TAG, AS_BOB_BREAKS_OFF),
                Check(
                    "reply",
                    ALICE,
                    REPLIES,
                    AS_ALICE_BREAKS_OFF,
                    "Bob takes a record whose tag is wrong. Then he answers.",
                ),
            ),
            "Bob takes a record whose tag is wrong.",
        ),
        Attack(
            "signature",
            "One bit of a signature is changed.",
            once(
                ALICE,
                TEXT,
                lambda data: flip(data, -1),
                "I flip one bit of the signature of Alice's message.",
            ),
            (Check("signature", BOB, SIGNATURE, AS_BOB_BREAKS_OFF),),
            "Bob is shown as verified what nobody has signed.",
        ),
        Attack(
            "goodbye",
            "Alice's message is turned into a goodbye: two bits of its ciphertext say what it is for.",
            once(
                ALICE,
                TEXT,
                lambda data: flip(data, 4 + 12, chat.RecordType.TEXT ^ chat.RecordType.CLOSE),
                "I change the first byte of the ciphertext of Alice's message: a TEXT becomes a CLOSE.",
            ),
            (
                Check("signature", BOB, SIGNATURE, AS_BOB_BREAKS_OFF),
                Check("tag", BOB, TAG, AS_BOB_BREAKS_OFF),
                Check("empty-close", BOB, LENGTH, AS_BOB_BREAKS_OFF),
            ),
            "Bob is told that Alice left. She is still there.",
            shown=((), ()),
            statuses=(1, 1),
        ),
        # ------------------------------------------------------------------- the order of records
        Attack(
            "drop",
            "Alice's message is dropped, and what she sends next takes its place.",
            once(ALICE, TEXT, lambda _: b"", "I drop Alice's message."),
            (Check("number", BOB, NUMBER.format(2, 1), (3, 0)),),
            "Bob is told that Alice left, and nothing tells him that a message is missing.",
            shown=((), ()),
            leaves_early=True,
        ),
        Attack(
            "swap",
            "Alice's message is held back, and sent after the next record.",
            SwapTwo,
            (Check("number", BOB, NUMBER.format(2, 1), (3, 0)),),
            "Bob is told that Alice left before he has seen her last message.",
            shown=((), ()),
            leaves_early=True,
        ),
        Attack(
            "repeat",
            "Alice's message is sent twice.",
            once(ALICE, TEXT, lambda data: data + data, "I send Alice's message twice."),
            (Check("number", BOB, NUMBER.format(1, 2), AS_BOB_BREAKS_OFF),),
            "Bob is shown Alice's message twice. She said it once.",
            shown=((REQUEST, REQUEST), (REPLY,)),
            before=((REQUEST,), ()),
        ),
        Attack(
            "replay",
            "Alice's first message is sent again after Bob has answered it.",
            Replay,
            (
                Check("number", BOB, NUMBER.format(1, 2), (3, 0)),
                Check("turn", BOB, "the other side spoke out of turn", (3, 0)),
                Check("reply", BOB, REPLIES, (3, 0)),
            ),
            "Bob is shown Alice's message once more, as her answer to what he said.",
            shown=((REQUEST, REQUEST), (REPLY,)),
            before=((REQUEST,), (REPLY,)),
        ),
        Attack(
            "reflect",
            "Alice gets her own message in the place of Bob's answer.",
            Reflect,
            (
                Check("signature", ALICE, SIGNATURE, AS_ALICE_BREAKS_OFF),
                Check("direction", ALICE, TAG, AS_ALICE_BREAKS_OFF),
                Check("reply", ALICE, REPLIES, AS_ALICE_BREAKS_OFF),
            ),
            "Alice is shown her own words as Bob's.",
            shown=((REQUEST,), (REQUEST,)),
            before=((REQUEST,), ()),
        ),
        Attack(
            "earlier",
            "Alice's message is replaced by one of an earlier conversation.",
            ReplayAnEarlierOne,
            (
                Check("fresh-exponent", BOB, SIGNATURE, IN_BOBS_HANDSHAKE),
                Check("fresh-nonce", BOB, SIGNATURE, IN_BOBS_HANDSHAKE),
                Check(
                    "reply",
                    ALICE,
                    REPLIES,
                    (WAITS, 3),
                    "Bob is shown what Alice said another time. Then he answers.",
                ),
            ),
            "Bob is shown what Alice said another time.",
            shown=((EARLIER,), (REPLY,)),
            needs_earlier=True,
            needs_recording=True,
            statuses=(WAITS, 0),
        ),
        Attack(
            "cut",
            "The line is cut before Alice's goodbye.",
            once(ALICE, CLOSE, lambda _: Last(b""), "I cut the line in the place of Alice's goodbye."),
            (Check("cut", BOB, "the connection ended without a goodbye", (1, 0)),),
            "Bob is told that Alice left. She might have had more to say.",
            before=((REQUEST,), (REPLY,)),
        ),
    )
}


# ------------------------------------------------------------------------------ what she shows


class Screen:
    """What Mallory shows: what passes, what she does, and where to look."""

    def __init__(self, attack: Attack | None, without: tuple[str, ...]) -> None:
        self.attack = attack
        self.carried_out = False
        self._without = without
        self._begun = time.monotonic()

    def say(self, text: str, indent: str = "") -> None:
        """Show a text, its lines broken between words."""
        width = max(shutil.get_terminal_size().columns, 40)
        for line in text.split("\n"):
            if not line.startswith("  "):  # else it is a command
                line = textwrap.fill(
                    line, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
                )
            print(line)
        sys.stdout.flush()

    def begin(self) -> None:
        self._begun = time.monotonic()
        self.say("\nAlice connects.")

    def tell(self, text: str) -> None:
        """Say what she does; the first time, also where to look."""
        self.say(f"*** {text}")
        if self.attack and not self.carried_out:
            self.carried_out = True
            self.say(where_to_look(self.attack, self._without), "    ")

    def watch(self, tamper: Tamper) -> Tamper:
        """Show each frame, and then tamper with it."""

        def show(sender: chat.Role, number: int, data: bytes) -> bytes:
            whole = len(data) >= 4 and len(data) == 4 + int.from_bytes(data[:4], "big")
            what = "hello" if number == HELLO else f"record {number - 1}" if whole else "part of a frame"
            who = f"{sender.value.title()} -> {sender.peer.value.title()}"
            self.say(f"{time.monotonic() - self._begun:7.2f} s  {who:14}  {what}, {len(data)} bytes")
            if self.attack is None and whole:
                self._show_values(sender, number, data[4:])
            try:
                return tamper(sender, number, data)
            except (ProtocolError, ValueError, LookupError, AttributeError, StopIteration) as error:
                self.say(f"I cannot go on with this conversation: {error}")
                return Last(b"")

        return show

    def _show_values(self, sender: chat.Role, number: int, payload: bytes) -> None:
        rows: list[tuple[str, str]] = []
        if number == HELLO:
            try:
                hello = chat.Hello.decode(payload, None if sender is BOB else chat.Group(23, 2))  # any group
                key = chat.fingerprint(chat.load_public_key(hello.rsa))
            except ProtocolError as error:
                self.say(f"This is not secure-chat/1: {error}.", " " * 11)
                return
            numbers = hello.group._asdict().items() if sender is BOB else ()
            symbol, secret = sender.name[0], sender.value[0]
            rows = [(f"nonce_{symbol}", short(hello.nonce))]
            rows += [(name, short(chat.to_bytes(value))) for name, value in numbers]
            rows += [(symbol, short(hello.public_value)), (f"RSA_{sender.value}", key)]
            unseen = f"the exponent {secret} of {symbol} = g^{secret} mod p; so I have neither Z nor any key"
        elif len(payload) < chat.GCM_NONCE:
            return
        else:
            rows = [("number", str(int.from_bytes(payload[: chat.GCM_NONCE], "big")))]
            rows += [("the rest", short(payload[chat.GCM_NONCE :]))]
            blocks = (len(payload) - chat.GCM_NONCE - chat.GCM_TAG - 256) // chat.PADDING
            unseen = (
                "anything else"
                if number == READY
                else "whether it is a message or a goodbye, or what it says"
            )
            if number > READY and blocks > 0:  # the type, the reply and a byte of padding are in there too
                unseen += f"; only that this is not over {blocks * chat.PADDING - 34} bytes long"
        for name, value in rows:
            print(f"{'':11}{name:9} {value}")
        self.say(f"I cannot see {unseen}.", " " * 11)


def short(value: bytes) -> str:
    text = value.hex()
    return text if len(text) <= 32 else f"{text[:32]}... ({len(value)} bytes)"


def first_check(attack: Attack, without: tuple[str, ...]) -> Check | None:
    """Return the check that refuses the attack: the first one that is in its place."""
    return next((check for check in attack.checks if check.name not in without), None)


def where_to_look(attack: Attack, without: tuple[str, ...]) -> str:
    check = first_check(attack, without)
    if check:
        screens, end = f"{check.side.value.title()}'s screen", ""
        if check.name == "words":
            end = " Then answer no."
            if not attack.needs_peer:
                screens, end = "both screens", " Then answer no on one of them."
        where = f"Look at {screens}. The check {check.name} refuses this there:"
        return f'{check.until_then} {where} "... {check.reason}".{end}'.strip()
    return f"Nothing refuses it. {attack.success}" if attack.success else attack.still_refused


def what_is_refused(check: Check) -> str:
    """Return what to do where nobody gets as far as a conversation."""
    if check.name == "words":
        return "Start Alice. Nobody can say anything before the words have been typed."
    who = check.side.value.title() if check.side is BOB else "she"
    when = "within half a minute" if check.reason == LATE else "at once"
    return f"Start Alice: {who} refuses {when}, before anybody can say anything."


def list_attacks() -> None:
    screen = Screen(None, ())
    stay = [name for name, attack in ATTACKS.items() if attack.still_refused]
    screen.say(
        "What Mallory can do, and the checks that refuse it, in their order: on whose screen, and with "
        "which words. Take the first check away (--without CHECK), and the next one refuses. Take all away "
        "(--without CHECK,CHECK), and see what they are for. These attacks are refused even then: "
        f"{' and '.join(stay)}."
    )
    for attack in ATTACKS.values():
        screen.say(f"\n{attack.name}")
        screen.say(attack.sentence, "    ")
        for n, check in enumerate(attack.checks, 1):
            print(f"    {n}. {check.name:14} {check.side.value.title():5}  {check.reason}")
        if attack.success:
            screen.say(f"Without these checks: {attack.success}", "    ")
        else:
            screen.say(f"It is refused without these checks too: {attack.still_refused}", "    ")


def how_to_begin(
    attack: Attack | None, port: int, bob: tuple[str, int], without: tuple[str, ...], home: str
) -> str:
    """Return the commands to run, and what to do then."""
    folder = f"~/{shlex.quote(home[2:])}" if home.startswith("~/") else shlex.quote(home)
    programs, option = (f"{COPY}/", "") if COPY else ("", f" --home {folder}")
    here = bob[0] in ("127.0.0.1", "localhost", "::1")
    at = "" if bob[1] == chat.PORT else f" --port {bob[1]}"
    alice = f"  python3 {programs}alice_client.py{option} 127.0.0.1:{port}"
    if attack and attack.needs_peer:
        alice += " --peer SHA256:..."
    lines = []
    if attack:
        lines += [f"The attack: {attack.sentence}"]
    if COPY:
        lines += [
            "These commands start a broken copy of the programs. What it does not check: "
            f"{', '.join(without)}. It has copies of the keys in {home}, and is removed when I end."
        ]
        if not (COPY / "home" / "bob").is_dir():
            lines += [f"{home} has no keys yet: the copy makes its own, which may take a minute."]
    if_there = "if one runs there, end him first, with Ctrl-C"
    if not COPY:
        if_there = "if he runs already, let him; but end a broken one first, with Ctrl-C"
    lines += [f"Bob, in a second terminal ({if_there}):" if here else f"Bob, at {bob[0]}:"]
    lines += [f"  python3 {programs}bob_server.py{option}{at}"]
    lines += ["Alice, in a third one (not with the command on Bob's screen: that goes past me):", alice]
    if attack and attack.needs_peer:
        lines += ["Her command needs the fingerprint from Bob's screen."]
    check = first_check(attack, without) if attack else None
    refused = check is not None and attack is not None and attack.silent
    met = not (attack and attack.first_meeting) and have_met(Path(home).expanduser(), port)
    if not (met or refused or (attack and attack.in_the_middle)):
        lines += [
            "If a screen asks for words, type those that stand on the other screen. They fit, because I have "
            "changed nothing by then: I only pass on what both send."
        ]
    elif attack and attack.needs_earlier and not met and "pin" not in without:
        lines += [
            "If they have not met yet, end me (Ctrl-C), start me without an attack, and let them talk once."
        ]
    if attack is None:
        lines += ["Then let them talk. Ctrl-C ends."]
    elif check and attack.silent:
        lines += [what_is_refused(check)]
    else:
        if attack.needs_recording:
            lines += ["First let them talk and leave (/quit); I only listen. Then start Alice again."]
        what_follows = "Bob answers, and Alice leaves (/quit)"
        if attack.leaves_early:
            what_follows = "and leaves (Ctrl-C) before Bob answers"
        lines += [f"Alice says something (for example: {SAMPLE}), {what_follows}."]
    return "\n".join(lines)


def have_met(home: Path, port: int) -> bool:
    """Whether both have pinned each other, Alice under my port: then nobody is asked for words."""
    with contextlib.suppress(OSError):
        bobs, alices = ((home / name / "known_peers").read_text("utf-8") for name in ("bob", "alice"))
        return "alice ssh-rsa" in bobs and f"[127.0.0.1]:{port} ssh-rsa" in alices
    return False


def copy_home(home: Path, copy: Path, attack: Attack | None) -> None:
    """Give a broken copy the keys and the parameters, and what is pinned unless they are to meet anew."""
    for name in ("bob", "alice"):
        if (home / name).is_dir():
            shutil.copytree(home / name, copy / name)
            if attack and attack.first_meeting:
                (copy / name / "known_peers").unlink(missing_ok=True)


def connections(
    listener: socket.socket, bob: tuple[str, int], screen: Screen
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield a socket to Bob and one to Alice for each Alice who comes."""
    while True:
        at_alice, _ = listener.accept()
        screen.begin()
        try:
            at_bob = socket.create_connection(bob)
        except OSError as error:
            screen.say(f"Bob is not at {bob[0]} port {bob[1]}: {error.strerror or error}.")
            at_alice.close()
        else:
            yield at_bob, at_alice


def main() -> int:
    options = OPTIONS
    sys.stdout.reconfigure(errors="backslashreplace")
    if options.list:
        try:
            list_attacks()
        except BrokenPipeError:  # | head
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left must not fail again
        return 0
    attack = ATTACKS.get(options.attack)
    if options.attack and attack is None:
        command_line().error(f"there is no attack named {options.attack}; --list shows what there is")
    screen = Screen(attack, options.without)
    try:
        listener = socket.create_server(("127.0.0.1", options.listen))
    except OSError as error:
        command_line().error(f"cannot listen on port {options.listen}: {error.strerror or error}")
    port = listener.getsockname()[1]
    screen.say(f"Listening on 127.0.0.1 port {port}")
    if COPY:
        copy_home(Path(options.home).expanduser(), COPY / "home", attack)
    screen.say(how_to_begin(attack, port, options.bob, options.without, options.home))
    earlier: Frames = {}
    if attack and attack.in_the_middle:
        own_key()  # now, so that nobody has to wait for it
    try:
        for at_bob, at_alice in connections(listener, options.bob, screen):
            ready = attack and (earlier or not attack.needs_recording)
            plan = attack.plan(screen.tell, earlier) if attack and ready else honest
            wire = Wire(at_bob, at_alice, screen.watch(plan))
            wire.close()
            screen.say("The connection is over.")
            if screen.carried_out:
                bob_is = "Bob goes on until Ctrl-C."
                if COPY:
                    bob_is = "End the broken Bob too, with Ctrl-C."
                screen.say(f"My attack is over too: I end here. {bob_is}")
                return 0
            if len(wire.frames[ALICE]) > TEXT:
                earlier = wire.frames
            if attack is None:
                screen.say("I wait for the next one; Ctrl-C ends.")
            elif earlier:
                screen.say("I have recorded it. Start Alice again, for the attack.")
            else:
                screen.say("It ended before I could do anything. I wait for the next one; Ctrl-C ends.")
    except KeyboardInterrupt:
        print()
        return 1 if attack and not screen.carried_out else 0
    raise AssertionError("connections never end")


# --------------------------------------------------------------------------------- for the tests


@dataclass
class Outcome:
    """What came of an exchange on one side: what was shown, how it ended, and its channel, if any."""

    shown: list[str] = field(default_factory=list)
    error: Exception | None = None
    goodbye: bool = False
    channel: chat.Channel | None = None


@dataclass
class Exchange:
    bob: Outcome
    alice: Outcome
    frames: Frames

    def of(self, role: chat.Role) -> Outcome:
        return self.bob if role is BOB else self.alice

    def went_well(self) -> bool:
        return (
            (self.bob.shown, self.alice.shown) == ([REQUEST], [REPLY])
            and self.bob.goodbye
            and self.bob.error is self.alice.error is None
        )


def exchange(
    keys: Keys,
    homes: Path,
    tamper: Tamper = honest,
    *,
    group: chat.Group | None = None,
    bob_key: chat.RsaKey | None = None,
    alice_key: chat.RsaKey | None = None,
    bob_pins: str | None = None,
    alice_pins: str | None = None,
    leaves_early: bool = False,
    on_channel: Callable[[chat.Channel], None] = lambda _: None,
) -> Exchange:
    """Run handshake, request, reply and Alice's goodbye over a wire of Mallory's.

    Each role uses its own key unless another one is given, and pins what it meets under `homes`.
    """
    from conftest import DEADLINE, GROUP, Background, loopback, store_with_group

    import alice_client
    import bob_server

    outcomes = {role: Outcome() for role in Role}

    def side(role: chat.Role, connected: socket.socket) -> None:
        outcome, frames = outcomes[role], chat.FrameSocket(connected)
        store, name = store_with_group(homes / role.value), "alice" if role is BOB else "[bob]:65432"
        try:
            peer = chat.PinnedPeer(store, name, bob_pins if role is BOB else alice_pins)
            if role is BOB:
                channel = bob_server.handshake(
                    frames, bob_key or keys.bob, group or GROUP, peer, threading.Lock(), chat.Transcript()
                )
            else:
                channel = alice_client.handshake(frames, alice_key or keys.alice, peer, chat.Transcript())
            if not channel.trust.known:
                peer.pin(channel.opener.signer)
            outcome.channel = channel
            connected.settimeout(DEADLINE)
            on_channel(channel)
            while True:
                if channel.my_turn and not channel.has_something:
                    if role is ALICE and outcome.shown:
                        channel.close()
                        break
                    channel.send(REPLY if role is BOB else REQUEST)
                    if role is ALICE and leaves_early:
                        channel.close()
                        break
                message = channel.receive()
                if message.type is chat.RecordType.CLOSE:
                    outcome.goodbye = True
                    break
                outcome.shown.append(message.text)
        except (ProtocolError, chat.TrustError, chat.ConnectionCut, chat.NoConversation) as error:
            outcome.error = error
        finally:
            frames.hang_up()

    bob, at_bob = loopback()
    alice, at_alice = loopback()
    wire = Wire(at_bob, at_alice, tamper)
    sides = [Background(lambda: side(BOB, bob)), Background(lambda: side(ALICE, alice))]
    for running in sides:
        running.result()
    wire.close(DEADLINE)
    return Exchange(outcomes[BOB], outcomes[ALICE], wire.frames)


if __name__ == "__main__":
    for name in ("SIGTERM", "SIGHUP"):  # then her copy is removed, too
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: sys.exit(1))
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before she waits for Alice
        sys.exit(1)
