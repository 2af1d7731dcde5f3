"""A newcomer's first hour: what both screens show from nothing to the goodbye, and what is told if it fails.

A screen is what a terminal makes of all that a program prints; the README shows both.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, NamedTuple

import pyte
import pytest
from conftest import DEADLINE, ROOT, Keys, Program, patched

import bob_server
import crypto_utils as chat
from crypto_utils import Home, KnownPeer

README = (ROOT / "README.md").read_text(encoding="utf-8")
COLUMNS, ROWS = 110, 40


def screen(program: Program) -> str:
    """What a person sees of a program at its terminal."""
    terminal = pyte.Screen(COLUMNS, ROWS)
    pyte.Stream(terminal).feed(program.stdout)
    return "\n".join(line.rstrip() for line in terminal.display).rstrip() + "\n"


def recorded(script: str) -> tuple[str, str]:
    """What the README shows of a program's screen: the command, and what stands below."""
    (found,) = re.findall(rf"```\n\$ (python3 {script}[^\n]*)\n(.*?)```", README, re.DOTALL)
    return found


def told_alike(*screens: str) -> list[str]:
    """Replace what differs from one run to the next; the same is replaced by the same."""
    text = "\0".join(screens)
    for pattern, name in (
        (r" --port \d+", ""),  # not said of the usual port
        (r"(?<=port )\d+", "PORT"),
        (r"SHA256:[\w+/]{43}", "KEY {}"),
        (r"(?<=telephone: )(?:[a-z]+ ){11}[a-z]+", "WORDS {}"),
        (r"\S*/(?=(?:bob|alice)/\w)", "HOME/"),
        (r"(?<=after )[\d.]+", "SECONDS"),
        (r"(?<=alice_client.py )\S+", "ADDRESS"),
    ):
        names = {found: name.format(n) for n, found in enumerate(dict.fromkeys(re.findall(pattern, text)))}
        text = re.sub(pattern, lambda found, names=names: names[found[0]], text)  # type: ignore[misc]
    return text.split("\0")


@pytest.mark.timeout(6 * DEADLINE)
def test_from_nothing_to_the_goodbye_both_screens_are_what_the_readme_shows(
    start: Callable[..., Program],
) -> None:
    home = Path(tempfile.mkdtemp())  # a short name, which no screen breaks

    def at_terminal(script: str, *arguments: str) -> Program:
        return start(script, *arguments, home=home, terminal=True, size=(ROWS, COLUMNS), TERM="xterm")

    bob = at_terminal("bob_server.py", "--port", "0", "--host", "127.0.0.1")
    bob.expect("Waiting for Alice", patience=5 * DEADLINE)  # parameters are found by chance
    (invitation,) = re.findall(r"^  python3 alice_client.py (.*)$", screen(bob), re.MULTILINE)
    alice = at_terminal("alice_client.py", *invitation.split())
    alice.expect("Alice: ")
    alice.write("hello Bob\r")
    bob.expect("hello Bob")
    bob.expect("Bob: ")
    bob.write("hello Alice\r")
    alice.expect("hello Alice")
    alice.expect("Alice: ")
    alice.write("/quit\r")
    assert alice.wait() == 0
    bob.expect("Waiting for Alice")
    bob.write("\x03")
    assert bob.wait() == 130

    (_, bobs), (command, alices) = recorded("bob_server.py"), recorded("alice_client.py")
    ran = f"python3 alice_client.py {invitation}"
    assert told_alike(screen(bob), screen(alice), ran) == told_alike(bobs, alices, command)


# ------------------------------------------------------------------------------- what can go wrong


class World(NamedTuple):
    """Where it goes wrong: two people with keys who have never met, and things that are undone afterwards."""

    start: Callable[..., Program]
    bob: Callable[..., tuple[Program, str]]
    homes: Path
    keys: Keys
    stack: contextlib.ExitStack

    def listener(self, backlog: int = 1) -> socket.socket:
        return self.stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=backlog))

    def alice(self, *arguments: str, **options: object) -> Program:
        return self.start("alice_client.py", *arguments, **options)

    def to_bob(self, *arguments: str) -> Program:
        return self.alice("127.0.0.1", "--port", self.bob()[1], *arguments)


def port_of(listener: socket.socket) -> str:
    return str(listener.getsockname()[1])


def nobody(world: World) -> Program:
    with world.listener() as listener:
        port = port_of(listener)
    return world.alice("127.0.0.1", "--port", port)


def firewall(world: World) -> Program:
    """A listener whose queue is full lets new connections wait in silence, as a firewall does."""
    listener = world.listener(backlog=0)
    world.stack.enter_context(socket.create_connection(listener.getsockname(), timeout=DEADLINE))
    impatient = patched("__import__('alice_client').CONNECT_SECONDS = 1")
    return world.alice("127.0.0.1", "--port", port_of(listener), python=impatient)


def other_network(world: World) -> Program:
    alone = ("unshare", "--map-root-user", "--net")
    try:
        subprocess.run([*alone, "true"], check=True, capture_output=True, timeout=DEADLINE)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine does not let us make a network namespace ({error})")
    return world.alice("192.0.2.7", python=(*alone, sys.executable))


def another_service(world: World) -> Program:
    listener = world.listener()
    alice = world.alice("127.0.0.1", "--port", port_of(listener))
    connected = world.stack.enter_context(listener.accept()[0])
    connected.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    return alice


def silence(world: World) -> Program:
    port = port_of(world.listener())
    return world.alice("127.0.0.1", "--port", port, python=patched("chat.FIRST_BYTE_SECONDS = 1.5"))


def bob_stopped(world: World) -> Program:
    bob, port = world.bob()
    alice = world.alice("127.0.0.1", "--port", port)
    alice.expect("You speak first", "stderr")
    bob.process.kill()
    return alice


def bobs_key_changed(world: World) -> Program:
    _, port = world.bob()
    KnownPeer(Home(world.homes / "alice"), f"[127.0.0.1]:{port}").pin(world.keys.mallory)
    return world.alice("127.0.0.1", "--port", port)


def alices_key_changed(world: World) -> Program:
    KnownPeer(Home(world.homes / "bob"), "alice").pin(world.keys.mallory)
    bob, port = world.bob()
    world.alice("127.0.0.1", "--port", port)
    bob.expect("--peer SHA256:.*\\n", "stderr")
    bob.process.kill()
    return bob


def open_identity(world: World) -> Program:
    (world.homes / "alice" / "identity.pem").chmod(0o644)
    return world.alice("127.0.0.1")


def damaged_identity(world: World) -> Program:
    path = world.homes / "alice" / "identity.pem"
    path.write_bytes(path.read_bytes()[:-100])
    return world.alice("127.0.0.1")


def no_folder(world: World) -> Program:
    (world.homes / "file").touch()
    return world.alice(home=world.homes / "file")


def old_python(world: World) -> Program:
    old = ("import sys, runpy", "sys.version_info, sys.version = (3, 8, 10), '3.8.10 (default)'")
    run = "runpy.run_path(sys.argv[1], run_name='__main__')"
    return world.alice(python=(sys.executable, "-c", "; ".join((*old, run))))


# What is done, the exit status, and the end of what is told: all of it, to the letter.
ERRORS: dict[str, tuple[Callable[[World], Program], int, str]] = {
    "nobody listens": (
        nobody,
        1,
        "No connection: cannot connect to 127.0.0.1 port {port}: nobody is listening there; "
        "is bob_server.py running?",
    ),
    "a firewall drops it": (
        firewall,
        1,
        "No connection: cannot connect to 127.0.0.1 port {port}: no answer within 1 s; "
        "is the address right, does a firewall drop the port?",
    ),
    "another network": (
        other_network,
        1,
        "No connection: cannot connect to 192.0.2.7 port 65432: Network is unreachable; "
        "is the address right, and is this machine on that network?",
    ),
    "no such name": (
        lambda world: world.alice("no-such-host.invalid"),
        1,
        "No connection: cannot connect to no-such-host.invalid port 65432: there is no such host; "
        "check the address",
    ),
    "no such address": (
        lambda world: world.alice("1.2.3.4.5"),
        1,
        "No connection: cannot connect to 1.2.3.4.5 port 65432: there is no such host; check the address",
    ),
    "another service": (
        another_service,
        3,
        "Broken off: a frame of 1213486160 bytes, over the limit of 8192: is this secure-chat?",
    ),
    "silence": (
        silence,
        1,
        "Connected. Waiting for Bob's first word, up to 2 minutes: he may be making his parameters ...\n"
        "Cut off: the other side did not answer in time, during the handshake. Is bob_server.py there, "
        "and does Bob accept your key? It is {alice}",
    ),
    "Bob is stopped": (bob_stopped, 1, "Cut off: the connection ended without a goodbye"),
    "the port is taken": (
        lambda world: world.start("bob_server.py", "--port", port_of(world.listener())),
        1,
        "No connection: cannot listen on any address port {port}: the port is taken; "
        "is another Bob there already? (--port 0 finds a free one)",
    ),
    "an address of another machine": (
        lambda world: world.start("bob_server.py", "--host", "192.0.2.77"),
        1,
        "No connection: cannot listen on 192.0.2.77 port 65432: this machine has no such address",
    ),
    "Bob's key has changed": (
        bobs_key_changed,
        3,
        "Refused: the key of [127.0.0.1]:{port} is not the one pinned\n"
        "  pinned:       {mallory}  ({homes}/alice/known_peers, line 1)\n"
        "  presented:    {bob}\n"
        "  by telephone: {words}\n"
        "Either somebody is in between, or the other side has a new key. Ask for the fingerprint in\n"
        "person or by telephone. Only if it is the one presented, run this program again with\n"
        "  --peer {bob}",
    ),
    "Alice's key has changed": (
        alices_key_changed,
        -9,
        "Waiting for Alice; Ctrl-C ends.\n"
        "127.0.0.1: Refused: the key of alice is not the one pinned; if this is hers (ask her), "
        "restart with --peer {alice}",
    ),
    "not the key that was asked for": (
        lambda world: world.to_bob("--peer", chat.fingerprint(world.keys.mallory)),
        3,
        "Refused: the key of [127.0.0.1]:{port} is not the one asked for\n"
        "  asked for: {mallory}\n"
        "  presented: {bob}\n"
        "Somebody may be in between; or the fingerprint was not copied whole, or is an older one.",
    ),
    "a fingerprint that was not copied whole": (
        lambda world: world.alice("--peer", "SHA256:oLxJTIyBG1fl86TD4"),
        2,
        "usage: alice_client.py [options] [HOST]\n"
        "alice_client.py: error: argument --peer: a fingerprint is SHA256: and 43 characters",
    ),
    "no port": (
        lambda world: world.start("bob_server.py", "--port", "65536"),
        2,
        "usage: bob_server.py [options]\n"
        "bob_server.py: error: argument --port: a port is a number up to 65535",
    ),
    "too small": (
        lambda world: world.start("bob_server.py", "--dh-bits", "1024"),
        2,
        "usage: bob_server.py [options]\n"
        "bob_server.py: error: argument --dh-bits: Diffie-Hellman parameters have 2048 to 4096 bits",
    ),
    "a key that others can read": (
        open_identity,
        1,
        "Stopped: {homes}/alice/identity.pem is open to other users (mode 0644); "
        "run: chmod go-rwx {homes}/alice/identity.pem",
    ),
    "a damaged key": (
        damaged_identity,
        1,
        "Stopped: {homes}/alice/identity.pem is damaged, or no RSA key; restore it, or move it away "
        "for a new one",
    ),
    "a home that is a file": (no_folder, 1, "Stopped: cannot make {homes}/file: File exists"),
    "an old Python": (
        old_python,
        1,
        "Python 3.9 or newer is needed; this is 3.8.10. Is there a python3.12, say?",
    ),
    "no pycryptodome": (
        lambda world: world.start("bob_server.py", python=(sys.executable, "-S")),
        1,
        "No module named 'Crypto'; activate .venv (see README.md), or: "
        "python3 -m pip install -r requirements.txt",
    ),
}


@pytest.fixture
def world(
    start: Callable[..., Program], bob: Callable[..., tuple[Program, str]], homes: Path, keys: Keys
) -> Iterator[World]:
    with contextlib.ExitStack() as stack:
        yield World(start, bob, homes, keys, stack)


@pytest.mark.parametrize("name", ERRORS)
def test_what_goes_wrong_for_newcomers_is_told_in_one_way(world: World, name: str) -> None:
    cause, status, told = ERRORS[name]
    program = cause(world)
    assert program.wait() == status
    assert program.stdout == ""
    people = {name: chat.fingerprint(key) for name, key in world.keys._asdict().items()}
    words = chat.spoken(world.keys.bob)
    port = re.search(r"--port=?(?:', ')?(\d+)", str(program.process.args))
    expected = told.format(port=port and port[1], homes=world.homes, words=words, **people) + "\n"
    assert program.stderr.endswith(expected)
    before = program.stderr[: -len(expected)]
    assert re.fullmatch(r"(Listening on .*\n)?(You are [^!]*)?", before), before


@pytest.mark.parametrize("script", ["bob_server.py", "alice_client.py"])
def test_an_old_python_understands_enough_of_it_to_say_so(script: str) -> None:
    ast.parse((ROOT / script).read_text(encoding="utf-8"), feature_version=(3, 7))


# --------------------------------------------------------------------------------------- at the keyboard


def test_lines_that_are_pasted_together_are_one_message(
    bob: Callable[..., tuple[Program, str]], start: Callable[..., Program]
) -> None:
    server, port = bob("--once")
    client = start("alice_client.py", "127.0.0.1", "--port", port, terminal=True, TERM="xterm")
    client.expect("Alice: ")
    if "\x1b[?2004h" not in client.stdout:
        pytest.skip("this readline does not tell what is pasted from what is typed")
    client.write("\x1b[200~one\rtwo\rthree\r\x1b[201~")  # copied with the end of the last line
    client.expect("three")
    client.write("\r")
    client.expect("turn; Ctrl-C leaves")
    server.expect(r"^Alice: one\n {5}\| two\n {5}\| three\n\Z")


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("helo\x7f\x7fllo", "hello"),
        ("\x1b[A\x1bOAhello\x1b[D\x1b[3~\x1b[1;5C!", "hello!"),  # arrows, Delete, Ctrl-arrow
        ("\x7f\x08x", "x"),
        ("one\rtwo", "one\ntwo"),
        ("\t\x01\x1bno secret", "no secret"),
        ("gr\u00fcn \U0001f600\x7f", "gr\u00fcn "),
    ],
)
def test_what_is_typed_unseen_is_edited_as_far_as_that_goes(typed: str, shown: str) -> None:
    assert bob_server.edited("", typed) == shown


@pytest.mark.parametrize("leaver", ["Alice", "Bob"])
def test_ctrl_c_in_half_a_line_leaves_that_line(
    bob: Callable[..., tuple[Program, str]], start: Callable[..., Program], leaver: str
) -> None:
    server, port = bob("--once", terminal=True, TERM="xterm", size=(ROWS, COLUMNS))
    client = start(
        "alice_client.py", "127.0.0.1", "--port", port, terminal=True, TERM="xterm", size=(ROWS, COLUMNS)
    )
    client.expect("Alice: ")
    if leaver == "Bob":
        client.write("hello\r")
        server.expect("Bob: ")
    leaving = client if leaver == "Alice" else server
    leaving.write("a thought that is longer than that")
    leaving.expect("than that")
    leaving.write("\x03")
    assert (client.wait(), server.wait()) == (0, 0)
    lines = screen(leaving).splitlines()
    assert lines[-1] == "You left."
    assert f"{leaver}: a thought that is longer than that" in lines[-3:]


@pytest.mark.parametrize("size", [(10, 20), (24, 40), (50, 300)])
def test_windows_of_any_size(
    bob: Callable[..., tuple[Program, str]], start: Callable[..., Program], size: tuple[int, int]
) -> None:
    """No word is lost, and every further row of a message begins with the bar, whatever COLUMNS says."""
    server, port = bob("--once", terminal=True, size=size, TERM="xterm", NO_COLOR="1", COLUMNS="200")
    client = start("alice_client.py", "127.0.0.1", "--port", port)
    words = [f"word{n}" for n in range(30)]
    client.write(" ".join(words) + "\n")
    server.expect("Bob: ")
    terminal = pyte.Screen(size[1], 500)
    pyte.Stream(terminal).feed(server.stdout)
    shown = [line.rstrip() for line in terminal.display]
    first = next(n for n, line in enumerate(shown) if line.startswith("Alice \u2713"))
    last = next(n for n, line in enumerate(shown) if n > first and line.startswith("Bob:"))
    assert all(line.startswith("      |") for line in shown[first + 1 : last])
    assert [word for line in shown[first:last] for word in line[7:].split()] == words


# ------------------------------------------------------------------------------------ the README's commands

# Each is run here, in Bob's folder; or by the test, or the script, that is named.
COMMANDS = {
    "printf 'hello\\n' | python3 alice_client.py 192.0.2.7": "",
    "ssh-keygen -p -f identity.pem": " -P '' -N secret",
    "ssh-keygen -y -f identity.pem": " | grep '^ssh-rsa AAAA'",
    "openssl dhparam -in dh_parameters.pem -noout -text": " | grep -q 'DH Parameters: (2048 bit)'",
    "openssl dhparam -out FILE 2048": "test_parameters_that_openssl_wrote",
    "uv run bob_server.py": "test_the_scripts_say_what_they_need_as_requirements_txt_does",
    "pipx run bob_server.py": "test_the_scripts_say_what_they_need_as_requirements_txt_does",
    "python3 tests/benchmark.py": ".ci/run",
    "ruff check .": ".ci/run",
    "ruff format --check .": ".ci/run",
    "mypy": ".ci/run",
    "bash .ci/run": ".ci/run",
}


def test_every_command_of_the_readme_is_run_somewhere() -> None:
    found = re.findall(r"`((?:printf|python3|ssh-keygen|openssl|uv|pipx|ruff|mypy|bash)(?: [^`]*)?)`", README)
    assert set(found) == set(COMMANDS)
    sources = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    gate = (ROOT / ".ci" / "run").read_text()
    for command, where in COMMANDS.items():
        if where.startswith("test_"):
            assert f"def {where}(" in sources
        elif where == ".ci/run":
            assert command.startswith("bash") or f"\n{command}".replace("python3", "python") in gate


@pytest.mark.parametrize("command", [command for command, rest in COMMANDS.items() if rest[:1] in ("", " ")])
def test_a_command_of_the_readme_does_what_it_says(
    bob: Callable[..., tuple[Program, str]], homes: Path, command: str
) -> None:
    if not shutil.which(command.split()[0]):
        pytest.skip(f"there is no {command.split()[0]} here")
    rest = COMMANDS[command]
    server, port = bob("--once")
    server.end_input()  # he says goodbye after the first message
    command = command.replace("python3", sys.executable).replace("alice_client", str(ROOT / "alice_client"))
    done = subprocess.run(
        command.replace("192.0.2.7", f"127.0.0.1 --port {port}") + rest,
        shell=True,
        cwd=homes / "bob",
        env={**os.environ, "SECURE_CHAT_HOME": str(homes)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------ what a hostile review found


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_no_row_of_the_peers_imitates_the_program_where_only_the_output_is_a_terminal(
    homes: Path, bob: Callable[..., tuple[Program, str]], encoding: str
) -> None:
    """With a pipe at its input, as in the README; and where what is printed is longer than what came."""
    server, port = bob("--once")
    shell = f"printf 'hi\\n' | {sys.executable} {ROOT / 'alice_client.py'} 127.0.0.1 --port {port}"
    command = ("sh", "-c", f"{shell}; true #")
    client = Program(
        "-", home=homes, terminal=True, size=(ROWS, 80), python=command, PYTHONIOENCODING=encoding
    )
    try:
        server.expect("^Alice: hi")
        server.write(("\u20ac" * 7 + "Broken off: the record's signature is not valid. ") * 9 + "\n")
        server.end_input()
        client.wait()
    finally:
        client.close()
    terminal = pyte.Screen(80, 500)
    pyte.Stream(terminal).feed(client.stdout)
    rows = [
        row.rstrip() for row in terminal.display if "Broken" in row or "signature" in row or "valid" in row
    ]
    assert rows
    assert all(row.startswith(("Bob", "   |", "    |", "     |")) for row in rows), rows


def test_what_is_pasted_while_the_other_has_the_turn_is_not_sent_by_itself(
    bob: Callable[..., tuple[Program, str]], start: Callable[..., Program]
) -> None:
    """The first half comes before the reply, the second half after it, and each has the end of a line."""
    server, port = bob("--once")
    patient = patched(f"__import__('alice_client').PASTE_SECONDS = {DEADLINE}")
    client = start(
        "alice_client.py", "127.0.0.1", "--port", port, "-v", terminal=True, TERM="xterm", python=patient
    )
    client.expect("Alice: ")
    client.write("hello\r")
    server.expect("^Alice: hello\n")
    client.expect(r"\x1b\[\?2004h")  # the terminal is asked to tell what is pasted
    client.write("\x1b[200~first line\rsecret")
    server.write("reply\n")
    client.expect("was verified, then decrypted")
    client.write(" half\rmore\x1b[201~")
    client.expect("more")
    client.write(", with Enter\r")
    server.expect(r"^Alice: first line\n {5}\| secret half\n {5}\| more, with Enter\n")


def test_what_was_typed_before_it_was_clear_to_whom_is_not_sent(
    bob: Callable[..., tuple[Program, str]], start: Callable[..., Program]
) -> None:
    server, port = bob("--once")
    slow = patched(
        "import sys",
        "__import__('alice_client').connect = lambda *a, old="
        "__import__('alice_client').connect: (sys.stdout.write('now'), sys.stdout.flush(), "
        "input(), old(*a))[-1]",
    )
    client = start("alice_client.py", "127.0.0.1", "--port", port, terminal=True, python=slow)
    client.expect("now")
    client.write("\nsecret\n")
    client.expect("Alice: ")
    client.write("hello\n")
    server.expect(r"^Alice: hello\n")
