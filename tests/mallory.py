"""Mallory: she owns the wire between Bob and Alice, and sometimes one of their keys.

`Wire` carries frames between two sockets and does with each what `tamper` says. `exchange` runs the
real handshake and a short conversation over such a wire, and tells what came of it on both sides.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

from conftest import DEADLINE, GROUP, Background, Keys, loopback, store_with_group

import crypto_utils as chat
from crypto_utils import Channel, FrameSocket, Group, PinnedPeer, RecordType, Role, RsaKey

# What goes on the wire in the place of a sender's n-th frame (length and payload).
Tamper = Callable[[Role, int, bytes], bytes]


class Last(bytes):
    """The last bytes that Mallory lets through: then she cuts the wire."""


REQUEST, REPLY = "the request, which nobody else may read", "the reply, which nobody else may read"

# A sender's frames in `exchange`. The last two are Alice's alone.
HELLO, READY, TEXT, CLOSE = range(4)


def honest(sender: Role, number: int, data: bytes) -> bytes:
    return data


def only(sender: Role, number: int, change: Callable[[bytes], bytes]) -> Tamper:
    """Tamper with one frame, and pass on all others."""
    return lambda who, n, data: change(data) if (who, n) == (sender, number) else data


class Wire:
    """Carries frames both ways, in two threads, until either side ends or Mallory cuts."""

    def __init__(self, bob: socket.socket, alice: socket.socket, tamper: Tamper) -> None:
        self.frames: dict[Role, list[bytes]] = {Role.BOB: [], Role.ALICE: []}  # as they were sent
        self._tamper = tamper
        self._ends = {Role.BOB: bob, Role.ALICE: alice}
        self._threads = [threading.Thread(target=self._carry, args=(role,), daemon=True) for role in Role]
        for thread in self._threads:
            thread.start()

    def _carry(self, sender: Role) -> None:
        source, sink = self._ends[sender], self._ends[sender.peer]
        with contextlib.suppress(OSError):
            while True:
                data = self._frame(source)
                if not data:
                    break
                self.frames[sender].append(data)
                passed_on = self._tamper(sender, len(self.frames[sender]) - 1, data)
                sink.sendall(passed_on)
                if isinstance(passed_on, Last):
                    self._end(source)
                    break
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

    def close(self) -> None:
        for thread in self._threads:
            thread.join(DEADLINE)
            assert not thread.is_alive()
        for end in self._ends.values():
            end.close()


@dataclass
class Outcome:
    """What came of an exchange on one side: what was shown, how it ended, and its channel, if any."""

    shown: list[str] = field(default_factory=list)
    error: Exception | None = None
    goodbye: bool = False
    channel: Channel | None = None


@dataclass
class Exchange:
    bob: Outcome
    alice: Outcome
    frames: dict[Role, list[bytes]]

    def of(self, role: Role) -> Outcome:
        return self.bob if role is Role.BOB else self.alice

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
    group: Group = GROUP,
    bob_key: RsaKey | None = None,
    alice_key: RsaKey | None = None,
    bob_pins: str | None = None,
    alice_pins: str | None = None,
    on_channel: Callable[[Channel], None] = lambda _: None,
) -> Exchange:
    """Run handshake, request, reply and Alice's goodbye over a wire of Mallory's.

    Each role uses its own key unless another one is given, and pins what it meets under `homes`.
    """
    outcomes = {role: Outcome() for role in Role}

    def side(role: Role, connected: socket.socket) -> None:
        outcome, frames = outcomes[role], FrameSocket(connected)
        store, name = store_with_group(homes / role.value), "alice" if role is Role.BOB else "[bob]:65432"
        try:
            peer = PinnedPeer(store, name, bob_pins if role is Role.BOB else alice_pins)
            channel: Channel | None
            if role is Role.BOB:
                channel = chat.bob_handshake(frames, bob_key or keys.bob, group, peer)
            else:
                channel = chat.alice_handshake(frames, alice_key or keys.alice, store, peer)
            assert channel is not None
            if not channel.trust.known:
                peer.pin(channel.peer_key)
            outcome.channel = channel
            frames.deadline = None
            connected.settimeout(DEADLINE)
            on_channel(channel)
            while True:
                if channel.my_turn:
                    if role is Role.ALICE and outcome.shown:
                        channel.close()
                        break
                    channel.send(REPLY if role is Role.BOB else REQUEST)
                message = channel.receive()
                if message.type is RecordType.CLOSE:
                    outcome.goodbye = True
                    break
                outcome.shown.append(message.text)
        except (chat.ProtocolError, chat.TrustError, chat.ConnectionCut) as error:
            outcome.error = error
        finally:
            frames.hang_up()

    bob, at_bob = loopback()
    alice, at_alice = loopback()
    wire = Wire(at_bob, at_alice, tamper)
    sides = [Background(lambda: side(Role.BOB, bob)), Background(lambda: side(Role.ALICE, alice))]
    for running in sides:
        running.result()
    wire.close()
    return Exchange(outcomes[Role.BOB], outcomes[Role.ALICE], wire.frames)
