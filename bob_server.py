#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["pycryptodome>=4.4,<4.5"]
# ///
"""Bob: waits for Alice (alice_client.py) and talks to her."""

from __future__ import annotations

import signal
import sys

if sys.version_info < (3, 9):
    sys.exit(f"Python 3.9 or newer is needed; this is {sys.version.split()[0]}. Is there a python3.12, say?")
if __name__ == "__main__":  # Ctrl-C during the imports: end without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import errno
import getpass
import ipaddress
import logging
import os
import queue
import re
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, TextIO

try:
    import crypto_utils as chat
except ImportError as missing:
    sys.exit(f"{missing}; activate .venv (see README.md), or: python3 -m pip install -r requirements.txt")
CLEVER = os.environ.get("TERM", "dumb") != "dumb"  # whether the terminal knows more than letters
try:
    import readline
    import termios

    if CLEVER:  # lines that are pasted together are one message
        readline.parse_and_bind("set enable-bracketed-paste on")
except ImportError:  # Windows: no line editing but the terminal's own
    readline = termios = None  # type: ignore[assignment]

ME, PEER = "Bob", "Alice"
PASTES = "\x1b[?2004h", "\x1b[?2004l"  # a terminal marks what is pasted, from here on and no more
PASTE_SECONDS = 1.0  # for the rest of what is being pasted
LINE_LIMIT = chat.TEXT_LIMIT + 3  # characters: the longest text, and the end of its line
NO_SUCH_ADDRESS = "this machine has no such address"
HANDSHAKES = 64  # at most, side by side
NOTES = 100  # at most, about strangers during a conversation


class NoConnection(Exception):
    """There was none to begin with."""


# What can end a conversation, or prevent it: how it is told, and the exit status.
FAILURES: dict[type[Exception], tuple[str, int]] = {
    NoConnection: ("No connection", 1),
    chat.ConnectionCut: ("Cut off", 1),
    chat.FileError: ("Stopped", 1),
    chat.ProtocolError: ("Broken off", 3),
    chat.TrustError: ("Refused", 3),
}


# What a person sees. The conversation goes to stdout, everything else to stderr. Only what the program
# itself says begins a line with anything but "Alice: " or the bar of a line that goes on.


def at_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def say(text: object) -> None:
    """Tell the person something that is not part of the conversation."""
    with contextlib.suppress(OSError):
        sys.stderr.write("\n".join(chat.screen_lines(str(text))) + "\n")
        sys.stderr.flush()


def tell(error: Exception) -> int:
    """Tell the person of a failure; return its exit status."""
    what, status = FAILURES[type(error)]
    say(f"{what}: {error}")
    return status


def marked(mark: str, text: str, stream: TextIO) -> str:
    """Put a mark before the peer's text and a bar before each further line: none passes for the program's."""
    text = text.encode(stream.encoding, "backslashreplace").decode(stream.encoding)  # as it will be printed
    columns = (os.get_terminal_size(stream.fileno()).columns or 80) - len(mark) if stream.isatty() else None
    return mark + f"\n{'|':>{len(mark) - 1}} ".join(chat.screen_lines(text, columns))


def say_left(who: str, reason: str, unread: bool) -> None:
    say(marked(f"{who} left: ", reason, sys.stderr) if reason else f"{who} left.")
    if unread:
        say("That goodbye says that the last message had not arrived.")


def show(text: str, name: str = PEER) -> None:
    """Show a message, the peer's unless another name is given. At a terminal, it is marked as verified."""
    if not at_terminal():
        print(marked(f"{name}: ", text, sys.stdout), flush=True)
        return
    mark = f"{name} \N{CHECK MARK} " if "utf" in sys.stdout.encoding.lower() else f"{name} + "
    lines = marked(mark, text, sys.stdout)
    if "NO_COLOR" not in os.environ and CLEVER:
        lines = f"\x1b[32m{mark}\x1b[0m" + lines[len(mark) :]
    print(lines, flush=True)


# Ctrl-C and its kin.
LEAVING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
leaving = putting_off = put_off = False
typed_ahead = ""


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Tell at a terminal that it is the peer's turn; keep what is typed meanwhile for the next prompt."""
    global typed_ahead
    if not at_terminal() or termios is None:
        yield
        return
    keyboard, notice = sys.stdin.fileno(), f"({PEER}'s turn; Ctrl-C leaves)"
    if chat.log.isEnabledFor(logging.INFO):  # the steps are shown: there is enough to see
        notice = ""
    begin_paste, end_paste = PASTES if CLEVER else ("", "")
    try:
        usual, quiet = termios.tcgetattr(keyboard), termios.tcgetattr(keyboard)
        quiet[3] &= ~(termios.ECHO | termios.ICANON)
        termios.tcsetattr(keyboard, termios.TCSANOW, quiet)
    except termios.error as gone:
        raise OSError(*gone.args) from None
    print(begin_paste + notice, end="", flush=True)
    try:
        yield
    finally:
        typed, pasting = b"", False
        with contextlib.suppress(OSError, termios.error):  # the terminal may have been closed
            while select.select([keyboard], [], [], PASTE_SECONDS if pasting else 0)[0]:
                more = os.read(keyboard, 4096)
                if not more:
                    break
                typed += more
                pasting = typed.rfind(b"\x1b[200~") > typed.rfind(b"\x1b[201~")
            typed_ahead = edited(typed_ahead, typed.decode(errors="ignore"))
            termios.tcsetattr(keyboard, termios.TCSANOW, usual)
            print(end_paste + "\r" + " " * len(notice) + "\r", end="", flush=True)


def edited(line: str, typed: str) -> str:
    """Return the line after what was typed unseen: Backspace deletes, other keys that edit do nothing."""
    for char in re.sub(r"\x1b(\[[0-?]*[ -/]*[@-~]|O.|)", "", typed).replace("\r", "\n"):
        if char in "\b\x7f":
            line = line[:-1]
        elif char.isprintable() or char == "\n":
            line += char
    return line


def ask(prompt: str) -> str:
    """Return a line typed at the terminal, which begins as what was typed ahead. Raises EOFError."""
    global typed_ahead
    if readline is not None:
        begin, typed_ahead = typed_ahead.rstrip("\n"), ""
        # Only where there is something: a Ctrl-C that comes while a hook runs is lost in it.
        readline.set_startup_hook((lambda: readline.insert_text(begin)) if begin else None)
    return input(prompt)


class PeerSpoke(Exception):
    """Something arrived from the peer while the person was being waited for."""


@contextlib.contextmanager
def interrupted_by(channel: chat.Channel) -> Iterator[None]:
    """Raise PeerSpoke in the body, which waits for a person, once there is something to receive."""
    if not hasattr(signal, "pthread_kill"):  # Windows: it will be noticed after the person pressed Enter
        yield
        return
    global leaving
    leaving = False
    body, peer, spoke, armed = threading.main_thread(), channel.line.socket, False, True
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    def interrupt(*_: object) -> None:
        nonlocal armed
        if spoke and armed:
            armed = False
            raise PeerSpoke

    def watch() -> None:
        nonlocal spoke
        events = select.poll()
        events.register(peer, select.POLLIN)
        events.register(ours, select.POLLIN)
        again: int | None = None
        while True:
            ready = dict(events.poll(None if again is None else 0))
            if ours.fileno() in ready:
                numbers = ours.recv(4096)
                if not numbers:
                    return
                again = next((number for number in numbers if number in LEAVING), again)
            if peer.fileno() in ready:
                spoke, again = True, signal.SIGUSR1
            # A signal that comes just before the body falls asleep does not wake it; the next one does. But
            # none may come once its handler has run: input() in Python 3.9 does not survive that.
            if again == signal.SIGUSR1:
                if armed:
                    signal.pthread_kill(body.ident or 0, again)
                time.sleep(0.01)  # until it has woken, but not as fast as the machine can
            elif again is not None:
                time.sleep(0.05)  # it was most likely awake: time for its handler to run
                if not leaving:
                    signal.pthread_kill(body.ident or 0, again)

    watcher = threading.Thread(target=watch, daemon=True)
    signal.signal(signal.SIGUSR1, interrupt)
    signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    try:
        with uninterrupted():  # a signal in the middle of start() would leave a thread that is not joined
            watcher.start()
        yield
    finally:
        armed = False
        signal.set_wakeup_fd(-1)
        theirs.close()
        if watcher.ident is not None:
            watcher.join()
        ours.close()


# Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt: at once, but for the moments in which a record is on its
# way, then right afterwards. The second one is not put off.


def on_signal(*_: object) -> None:
    global put_off, leaving
    if putting_off and not put_off:
        put_off = True
    else:
        leaving = True
        raise KeyboardInterrupt


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off the first signal until the body is done."""
    global putting_off, put_off
    putting_off = True
    try:
        yield
    finally:
        asked, putting_off, put_off = put_off, False, False
    if asked:
        raise KeyboardInterrupt


def next_line(channel: chat.Channel) -> str | None:
    """Return what the person says next, None when he leaves."""
    try:
        with interrupted_by(channel):
            if at_terminal():
                line = ask(f"{ME}: ").rstrip("\n")  # what was pasted often ends with one
                return None if line.strip() == "/quit" else line
            line = part = sys.stdin.readline(LINE_LIMIT)
            while len(part) == LINE_LIMIT and not part.endswith("\n"):
                part = sys.stdin.readline(LINE_LIMIT)  # without end: too long to be sent, whatever follows
            return line.removesuffix("\n").removesuffix("\r") if line else None
    except EOFError:
        print()
        return None
    except (PeerSpoke, KeyboardInterrupt):
        if at_terminal():  # leave the line that was being typed
            print()
        raise


def converse(channel: chat.Channel) -> bool:
    """Talk until somebody leaves; return whether it was the peer who did."""
    global typed_ahead
    typed_ahead = ""
    if at_terminal() and termios is not None:  # nothing is sent that was typed before it was clear to whom
        termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)
    while True:
        if channel.my_turn:
            try:
                text = next_line(channel)
                if text is None:
                    channel.close()
                    return False
                with uninterrupted():
                    channel.send(text)
            except chat.MessageError as error:
                say(f"Not sent: {error}")
                continue
            except (PeerSpoke, chat.ConnectionCut):
                pass  # he may have said goodbye: what there is to receive will tell
        with waiting():
            message = channel.receive()
        if message.kind is chat.Kind.CLOSE:
            say_left(PEER, message.text[:200], channel.unread)
            return True
        show(message.text)


def talk(channel: chat.Channel, home: chat.Home, transcript: chat.Transcript | None) -> bool:
    """Say who is there, converse, and hang up whatever happens; return whether it was the peer who left."""
    try:
        introduce(channel, home)
        if transcript:
            channel.keep(transcript)
        return converse(channel)
    except KeyboardInterrupt:
        with uninterrupted():
            channel.close()
        return False
    except chat.FileError:
        channel.close()
        raise
    except OSError as error:
        channel.close()
        raise no_screen(error) from None
    finally:
        channel.line.hang_up()


def no_screen(error: OSError) -> chat.FileError:
    """Return what to tell of an error at standard input or output, of which nothing more is expected."""
    with contextlib.suppress(OSError):  # what is still buffered must not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return chat.FileError(f"cannot read or write the conversation: {error.strerror}")


def open_home(folder: Path, name: str) -> chat.Home:
    try:
        return chat.Home(folder.expanduser() / name)
    except RuntimeError:
        raise chat.FileError(f"cannot tell which folder {folder} is; say where with --home DIR") from None


def ask_passphrase(prompt: str) -> str:
    try:
        return getpass.getpass(prompt)
    except (EOFError, UnicodeError):
        raise chat.FileError("no passphrase was given for the key") from None


def load_identity(home: chat.Home) -> chat.RsaKey:
    """Return one's own key, made on the first run."""
    identity = home.load_identity(ask_passphrase)
    if identity is None:
        say(f"Making your RSA key ({chat.NEW_RSA_BITS} bits) ...")
        identity = home.make_identity()
        say(f"It is in {home.folder / home.IDENTITY}: who has that file can pose as you.")
    return identity


def present(identity: chat.RsaKey) -> None:
    """Say who one is oneself, for the other side to compare."""
    say(f"You are {ME}, {chat.fingerprint(identity)}")
    say(f"  By telephone: {chat.spoken(identity)}")


def introduce(channel: chat.Channel, home: chat.Home) -> None:
    """Say who is there, and how that is known."""
    say(f"{PEER} is here: {chat.fingerprint(channel.peer_key)}")
    if channel.first_contact:
        say(f"  This key is new, and pinned now in {home.folder / home.KNOWN_PEERS}.")
        say(f"  Compare by telephone: {chat.spoken(channel.peer_key)}")
    say(f"{'You speak' if ME == 'Alice' else f'{PEER} speaks'} first.")
    say("Ctrl-C leaves; so does /quit or Ctrl-D, when it is your turn.")


def fingerprint(text: str) -> str:
    if not re.fullmatch("SHA256:[A-Za-z0-9+/]{43}", text):
        raise argparse.ArgumentTypeError("a fingerprint is SHA256: and 43 characters")
    return text


def port(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError("a port is a number up to 65535")
    return int(text)


def command_line(description: str, examples: str) -> argparse.ArgumentParser:
    """Return a parser for the options that both programs have."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]" + ("" if ME == "Bob" else " [HOST]"),
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    home = os.environ.get("SECURE_CHAT_HOME") or "~/.secure-chat"
    help_home = "where keys are ($SECURE_CHAT_HOME, or ~/.secure-chat)"
    parser.add_argument("--home", type=Path, default=home, metavar="DIR", help=help_home)
    help_peer = f"accept and pin {PEER}'s key with this fingerprint only"
    parser.add_argument("--peer", type=fingerprint, metavar="FINGERPRINT", help=help_peer)
    help_transcript = "add the conversation to FILE, as evidence"
    parser.add_argument("--transcript", type=Path, metavar="FILE", help=help_transcript)
    help_verify = "check and show such a file, and end"
    parser.add_argument("--verify", type=Path, metavar="FILE", help=help_verify)
    help_steps = "show the steps as they happen; -vv: whole values"
    parser.add_argument("-v", "--verbose", action="count", default=0, help=help_steps)
    return parser


def parse() -> argparse.Namespace:
    parser = command_line(
        "Wait for Alice (alice_client.py) and talk to her so that nobody can listen in.",
        """\
  python3 bob_server.py                      for Alice, here or elsewhere
  python3 bob_server.py --peer SHA256:...    for one Alice, whose key is known
  python3 bob_server.py --verify FILE        what was said? see --transcript""",
    )
    parser.add_argument("--host", metavar="ADDR", help="address to listen on (default: all, IPv4 and IPv6)")
    help_port = "port to listen on (default: %(default)s; 0: any free one)"
    parser.add_argument("--port", type=port, default=chat.PORT, metavar="N", help=help_port)
    parser.add_argument("--once", action="store_true", help="end after the first conversation")
    parameters = parser.add_mutually_exclusive_group()
    help_bits = "bits of p, 2048 to 4096 (default: as kept, or 2048)"
    parameters.add_argument("--dh-bits", type=group_bits, metavar="N", help=help_bits)
    help_file = "take and keep parameters that openssl dhparam wrote"
    parameters.add_argument("--dh-parameters", type=Path, metavar="FILE", help=help_file)
    return parser.parse_args()


def group_bits(text: str) -> int:
    if not re.fullmatch("[0-9]{4}", text) or int(text) not in chat.GROUP_BITS:
        raise argparse.ArgumentTypeError("Diffie-Hellman parameters have 2048 to 4096 bits")
    return int(text)


def listen(host: str | None, number: int) -> socket.socket:
    """Listen on one address, or on all of IPv4 and IPv6. Raises NoConnection that says why it cannot be."""
    try:
        if host is not None:
            family, _, _, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
            return socket.create_server(address[:2], family=family, backlog=128)
        try:
            return socket.create_server(
                ("", number), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128
            )
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) == errno.EADDRINUSE:
                raise
            return socket.create_server(("", number), backlog=128)  # a machine without IPv6
    except (socket.gaierror, UnicodeError):
        reason = NO_SUCH_ADDRESS
    except OSError as error:
        reason = {
            errno.EADDRINUSE: "the port is taken; is another Bob there already? (--port 0 finds a free one)",
            errno.EADDRNOTAVAIL: NO_SUCH_ADDRESS,
            errno.EACCES: "not allowed; ports from 1024 on are for everybody",
        }.get(error.errno or 0, f"{error.strerror or error}")
    raise NoConnection(f"cannot listen on {host or 'any address'} port {number}: {reason}")


def own_address(listener: socket.socket) -> str:
    """Return where others reach this machine: a datagram socket tells without sending anything."""
    bound = str(listener.getsockname()[0])
    if not ipaddress.ip_address(bound.partition("%")[0]).is_unspecified:
        return bound
    for family, anywhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((anywhere, 9))
            return str(probe.getsockname()[0])
    return "127.0.0.1"


def load_group(home: chat.Home, bits: int | None, file: Path | None) -> chat.Group:
    """Return Bob's Diffie-Hellman parameters, made on the first run, or when he asks for others."""
    group = home.load_group()
    if file is not None:
        group = chat.load_group_file(file, group)
        home.save_group(group)
        return group
    if group is not None and bits in (None, group.p.bit_length()):
        return group
    size = bits or 2048
    say(f"Making Diffie-Hellman parameters ({size} bits), found by chance ...")
    begun = last = time.monotonic()

    def progress(done: float) -> None:
        nonlocal last
        if time.monotonic() - last > 0.5 and sys.stderr.isatty():
            last = time.monotonic()
            text = f"\rSearching for {last - begun:.0f} s; {done:.0%} of all searches are over by now. "
            print(text, end="", file=sys.stderr, flush=True)

    group = chat.generate_group(size, progress)
    if last > begun:
        print("\r" + " " * 70 + "\r", end="", file=sys.stderr)
    say(f"Found after {time.monotonic() - begun:.1f} s, and kept in {home.folder / home.GROUP}.")
    home.save_group(group)
    return group


class Door:
    """Lets Alice in: handshakes side by side, one conversation at a time."""

    def __init__(self, listener: socket.socket, handshake: Callable[[chat.Line], chat.Channel]) -> None:
        self.events: queue.Queue[chat.Channel | str] = queue.Queue()  # guests, and notes about strangers
        self._listener = listener
        self._handshake = handshake
        self._lock = threading.Lock()
        self._current: chat.Channel | None = None
        self._closed = False
        self._knocking: dict[chat.Line, None] = {}  # in the order in which they came

    def serve(self) -> None:
        """Accept connections for ever, a thread each; the longest handshake gives way to one too many."""
        while True:
            try:
                connected, address = self._listener.accept()
                line = chat.Line(connected)
            except (OSError, chat.ConnectionCut):  # gone already, or no descriptor is free for it
                time.sleep(0.05)  # accept() would fail again at once
                continue
            with self._lock:
                if len(self._knocking) >= HANDSHAKES:
                    oldest = next(iter(self._knocking))
                    del self._knocking[oldest]
                    oldest.abort()
                self._knocking[line] = None
            try:
                threading.Thread(target=self._let_in, args=(line, address[0]), daemon=True).start()
            except RuntimeError:  # no thread is to be had
                with self._lock:
                    self._knocking.pop(line, None)
                line.hang_up()

    def _let_in(self, line: chat.Line, address: str) -> None:
        try:
            channel = self._handshake(line)
        except tuple(FAILURES) as error:
            line.hang_up()
            reason, _, rest = str(error).partition("\n")
            key = re.search("presented: +(.*)", rest)
            hint = f"; if this is hers (ask her), restart with --peer {key[1]}" if key else ""
            if isinstance(error, chat.ConnectionCut):
                hint = ", during the handshake; if that was Alice, her screen says why"
            what = f"{FAILURES[type(error)][0]}: {reason}{hint}"
            self._note(f"{address.removeprefix('::ffff:')}: {what}")
            return
        finally:
            with self._lock:
                self._knocking.pop(line, None)
        with self._lock:
            same = self._current is not None and self._current.peer_key == channel.peer_key
            if not self._closed and (self._current is None or same):
                if self._current is not None:
                    self._current.line.abort()  # Alice's line died, and she is back
                self._current = channel
                self.events.put(channel)
                return
        self._note(f"Another Alice, {chat.fingerprint(channel.peer_key)}, was told that you are busy.")
        channel.close("" if self._closed else "Bob is talking to somebody else; try again later")

    def _note(self, text: str) -> None:
        """Leave a line about a stranger, to be read between two conversations; a flood is cut short."""
        if self.events.qsize() < NOTES:
            self.events.put(text)

    def close(self) -> None:
        """Say goodbye to a guest who came in just now, and to whom nobody has talked yet."""
        with self._lock:
            guest, self._current, self._closed = self._current, None, True
        if guest is not None:
            guest.close()

    def done(self, channel: chat.Channel) -> bool:
        """Make room for the next guest; return whether this one has already come back."""
        with self._lock:
            if self._current is not channel:
                return True
            self._current = None
            return False


def run(options: argparse.Namespace) -> int:
    listener = listen(options.host, options.port)
    number = listener.getsockname()[1]
    say(f"Listening on port {number}.")
    transcript = chat.Transcript(options.transcript) if options.transcript else None
    home = open_home(options.home, "bob")
    identity = load_identity(home)
    group = load_group(home, options.dh_bits, options.dh_parameters)
    at = "" if number == chat.PORT else f" --port {number}"
    present(identity)
    say("Alice runs:\n")
    say(f"  python3 alice_client.py {own_address(listener)}{at} --peer {chat.fingerprint(identity)}\n")
    alice = chat.KnownPeer(home, "alice", options.peer)
    door = Door(listener, lambda line: chat.bob_handshake(line, identity, group, alice))
    threading.Thread(target=door.serve, daemon=True).start()
    say("Waiting for Alice; Ctrl-C ends.")
    try:
        while True:
            channel = door.events.get()
            if isinstance(channel, str):
                say(channel)
                continue
            status, bob_left = 0, False
            try:
                bob_left = not talk(channel, home, transcript)
            except (chat.ConnectionCut, chat.ProtocolError) as error:
                status = tell(error)
            back = door.done(channel)
            if bob_left:
                say("You left.")
            if bob_left or (options.once and not back):
                return status
            say("Waiting for Alice; Ctrl-C ends.")
    finally:
        door.close()


def tell_steps(verbosity: int) -> None:
    """Show the steps of the protocol as they happen, once or twice as much of them."""

    class Teller(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(record.getMessage())

    chat.log.addHandler(Teller())
    chat.log.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbosity, 2)])


def proven(statements: Iterator[chat.Statement]) -> Iterator[chat.Statement]:
    """Yield the statements; where a transcript breaks off, tell what those before are worth."""
    try:
        yield from statements
    except chat.ProtocolError as error:
        raise chat.ProtocolError(f"{error}\nNothing is proven but what stands above.") from None


def verify(file: Path, expected: str | None) -> int:
    """Show what a transcript proves. Raises what is wrong with it."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise chat.FileError(f"cannot read {file}: {error.strerror}") from None
    try:
        return tell_what_is_proven(data, expected)
    except OSError as error:
        raise no_screen(error) from None


def tell_what_is_proven(data: bytes, expected: str | None) -> int:
    """Show who said what, and what that proves; `expected` is the fingerprint that the peer has to have."""
    goodbye: bool | None = None
    peers = set()
    for sender, signer, message, unread in proven(chat.verify_transcript(data)):
        name, key = sender.value.title(), chat.fingerprint(signer)
        if message.kind is chat.Kind.READY and goodbye is False and name == "Alice":
            say("There is no goodbye: more may have been said.")
        goodbye = message.kind is chat.Kind.CLOSE
        if message.kind is chat.Kind.TEXT:
            show(message.text, name)
        elif goodbye:
            say_left(f"{name}, {key},", message.text, unread)
        else:
            say(f"{name}, {key}, was here.")
        peers |= {key} if name == PEER else set()
        if expected is not None and not peers <= {expected}:
            raise chat.TrustError(f"{PEER}'s key is not the one asked for, {expected}")
    if goodbye is None:
        raise chat.ProtocolError("the file holds no conversation")
    if expected is not None and not peers:
        raise chat.TrustError(f"nothing in it is signed with the key asked for, {expected}")
    if not goodbye:
        say("There is no goodbye: more may have been said.")
    say("Every signature is valid: the owner of each key signed these words, in answer to what stands before")
    say(
        "in the same conversation. It is not proven when, who they are, that no conversation is missing or in"
    )
    say("another place, and what the keeper of the file said after the last words of the other side.")
    return 0


def main() -> None:
    """Run the program and exit. What a user, a peer or the disk can cause gets a line, never a traceback."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the program was started with that stream closed
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
        getattr(sys, name).reconfigure(errors="surrogateescape" if mode == "r" else "backslashreplace")
    try:
        for number in LEAVING:
            signal.signal(number, on_signal)
        options = parse()
        tell_steps(options.verbose)
        status = verify(options.verify, options.peer) if options.verify else run(options)
    except KeyboardInterrupt:
        status = 130
    except tuple(FAILURES) as error:
        status = tell(error)
    for number in LEAVING:  # what is left to do takes no time
        signal.signal(number, signal.SIG_IGN)
    sys.exit(status)


if __name__ == "__main__":
    main()
