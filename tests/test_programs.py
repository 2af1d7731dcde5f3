"""Both programs as real processes, over loopback: what goes in, what both screens show, how they end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest
from conftest import DEADLINE, GROUP, RFC_GROUPS, ROOT, Background, Keys, Program, patched

import crypto_utils as chat
from crypto_utils import Home, KnownPeer

Start = Callable[..., Program]
StartBob = Callable[..., "tuple[Program, str]"]

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # man, woman, girl, joined
ENGLAND = "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"  # a flag, and tags
TEXTS = [
    "plain",
    "",
    "  spaces around  ",
    "\ttab",
    f"emoji {FAMILY} \U0001f44d\U0001f3fd {ENGLAND}",
    "שלום, مرحبا",
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    "e\u0301 n\u0303 한국어 日本語",
    "/quit",
    "Bob: not a forgery, only a text",
]


def talk(bob: tuple[Program, str], start: Start, host: str = "127.0.0.1") -> tuple[Program, Program]:
    alice = start("alice_client.py", host, "--port", bob[1])
    alice.expect("You speak first", "stderr")
    return bob[0], alice


def test_every_message_is_shown_once_in_order_and_both_leave_with_0(bob: StartBob, start: Start) -> None:
    server, client = talk(bob("--once"), start)
    for number, text in enumerate(TEXTS):
        client.write(f"{text}\n")
        server.expect(rf"^Alice: {text}\n\Z")
        server.write(f"{number} {text}\n")
        client.expect(f"^Bob: {number} {text}\n\\Z")
    client.end_input()
    assert client.wait() == 0
    assert server.wait() == 0
    assert server.stdout == "".join(f"Alice: {text}\n" for text in TEXTS)
    assert client.stdout == "".join(f"Bob: {number} {text}\n" for number, text in enumerate(TEXTS))
    assert client.stderr.endswith("You left.\n")
    assert server.stderr.endswith("Alice left.\n")


def test_a_file_of_1000_lines_piped_into_each_side(bob: StartBob, start: Start) -> None:
    server, client = talk(bob("--once"), start)
    writers = [
        Background(lambda: [server.write("".join(f"reply {n}\n" for n in range(1000)))]),
        Background(
            lambda: [client.write("".join(f"request {n}\n" for n in range(1000))), client.end_input()]
        ),
    ]
    assert (client.wait(), server.wait()) == (0, 0)
    for writer in writers:
        writer.result()
    assert client.stdout == "".join(f"Bob: reply {n}\n" for n in range(1000))
    assert server.stdout == "".join(f"Alice: request {n}\n" for n in range(1000))


def test_a_text_of_the_limit_goes_through_and_one_byte_more_is_refused_at_home(
    bob: StartBob, start: Start
) -> None:
    server, client = talk(bob("--once"), start)
    longest = "x" * (chat.TEXT_LIMIT - 2) + "é"
    lines = Background(
        lambda: client.write(f"{longest}x\n{longest}\r\nnot UTF-8: ".encode() + b"\xff\nend\n")
    )
    client.expect(
        f"Not sent: the text is {chat.TEXT_LIMIT + 1} bytes long, over the limit of {chat.TEXT_LIMIT}",
        "stderr",
    )
    server.expect(f"^Alice: {longest}\n")
    server.write("reply\n")
    client.expect("Not sent: the text is not valid Unicode", "stderr")
    server.expect("^Alice: end\n")
    lines.result()
    server.end_input()
    assert (server.wait(), client.wait()) == (0, 0)
    assert client.stderr.endswith("Bob left.\n")


def test_the_end_of_bobs_input_ends_him_after_a_goodbye(bob: StartBob, start: Start) -> None:
    server, client = talk(bob(), start)
    server.end_input()
    client.write("anybody there?\n")
    client.expect("Bob left", "stderr")
    assert (server.wait(), client.wait()) == (0, 0)
    assert server.stdout == "Alice: anybody there?\n"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_alice_reaches_bob_by_address_and_by_name(bob: StartBob, start: Start, host: str) -> None:
    if host == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    server, client = talk(bob("--once"), start, host)
    client.write("hello\n")
    server.expect("^Alice: hello\n")
    server.write("hello\n")
    client.end_input()
    assert client.wait() == 0
    (pinned,) = (client_home(client) / Home.KNOWN_PEERS).read_text().splitlines()
    assert pinned.startswith(f"[{host}]:")


def client_home(client: Program) -> Path:
    return Path(client.home) / "alice"


def test_bobs_invitation_can_be_run_as_it_is(bob: StartBob, homes: Path, keys: Keys) -> None:
    server, port = bob("--host", "127.0.0.1", "--once")
    (command,) = (line for line in server.stderr.splitlines() if line.startswith("  python3"))
    assert command == f"  python3 alice_client.py 127.0.0.1 --port {port} --peer {chat.fingerprint(keys.bob)}"
    result = subprocess.run(
        command.replace("python3", sys.executable, 1),
        shell=True,
        cwd=ROOT,
        env={**os.environ, "SECURE_CHAT_HOME": str(homes)},
        input="",
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert result.returncode == 0, result.stderr
    assert server.wait() == 0


def test_what_the_first_run_makes_the_second_one_uses(start: Start, tmp_path: Path) -> None:
    """A fresh home on both sides: identities and parameters are made, pinned, and used again."""
    home = tmp_path / "fresh"
    found = patched(f"chat.generate_group = lambda bits, _: chat.Group({GROUP.p}, 2)")  # without a search
    server = start("bob_server.py", "--port", "0", home=home, python=found)
    port = server.expect(r"\AListening on port (\d+)\.\n", "stderr")[1]
    client = start("alice_client.py", "--port", port, home=home)
    server.expect(r"Making your RSA key \(3072 bits\)", "stderr")
    server.expect(r"Making Diffie-Hellman parameters \(2048 bits\)", "stderr")
    server.expect(r"Found after [\d.]+ s", "stderr")
    client.write("hello\n")
    server.expect("^Alice: hello\n")
    server.write("hello\n")
    client.end_input()
    assert client.wait() == 0
    assert "This key is new, and pinned now in" in client.stderr
    server.expect("Waiting for Alice", "stderr")
    again = start("alice_client.py", "--port", port, home=home)
    again.end_input()
    assert again.wait() == 0
    assert "This key is new" not in again.stderr
    assert "Making" not in again.stderr
    assert Home(home / "alice").load_group() == Home(home / "bob").load_group()


@pytest.fixture
def hosts() -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Two hosts of our own: network namespaces with a cable between them. Their commands' prefixes."""
    names = [f"secure-chat-{os.getpid()}-{n}" for n in (1, 2)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, timeout=DEADLINE)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "address", "add", f"192.0.2.{number}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine does not let us make network namespaces ({error})")
    try:
        yield tuple(("ip", "netns", "exec", name, sys.executable) for name in names)  # type: ignore[misc]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, timeout=DEADLINE)


def test_two_hosts(bob: StartBob, start: Start, hosts: tuple[tuple[str, ...], tuple[str, ...]]) -> None:
    server, port = bob("--once", python=hosts[0])
    assert f"  python3 alice_client.py 192.0.2.1 --port {port} --peer SHA256:" in server.stderr
    client = start("alice_client.py", "192.0.2.1", "--port", port, python=hosts[1])
    client.write("over the cable\n")
    server.expect("^Alice: over the cable\n")
    server.write("so it is\n")
    client.end_input()
    assert (client.wait(), server.wait()) == (0, 0)


# ------------------------------------------------------------------------------------------ terminals


def at_terminals(bob: StartBob, start: Start, *arguments: str) -> tuple[Program, Program]:
    server, port = bob(*arguments, terminal=True)
    client = start("alice_client.py", "--port", port, terminal=True)
    client.expect(r"Bob's address \(Enter for this machine\): ")
    client.write("\n")
    client.expect("Alice: ")
    return server, client


def test_two_people_talk_at_two_terminals(bob: StartBob, start: Start) -> None:
    server, client = at_terminals(bob, start, "--once")
    client.write("hello Bob\n")
    server.expect("Alice \u2713 hello Bob\r\n")
    server.expect("Bob: ")
    server.write("hello Alice\n")
    client.expect("Bob \u2713 hello Alice\r\n")
    client.expect("Alice: ")
    client.write("/quit\n")
    client.expect("You left")
    server.expect("Alice left")
    assert (client.wait(), server.wait()) == (0, 0)


@pytest.mark.parametrize("leave", ["\x03", "\x04"], ids=["Ctrl-C", "Ctrl-D"])
def test_alice_leaves_at_her_prompt_and_bob_waits_for_the_next(
    bob: StartBob, start: Start, leave: str
) -> None:
    server, client = at_terminals(bob, start)
    client.write(leave)
    client.expect("You left")
    assert client.wait() == 0
    server.expect("Alice left")
    server.expect("Waiting for Alice")
    server.write("\x03")
    assert server.wait() == 130


@pytest.mark.parametrize("leave", ["\x03", "\x04"], ids=["Ctrl-C", "Ctrl-D"])
def test_bob_leaves_at_his_prompt_while_alice_waits(bob: StartBob, start: Start, leave: str) -> None:
    server, client = at_terminals(bob, start)
    client.write("hello\n")
    server.expect("Alice \u2713 hello\r\nBob: ")
    server.write(leave)
    client.expect("Bob left")
    assert (client.wait(), server.wait()) == (0, 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_conversation_with_a_goodbye(bob: StartBob, start: Start, number: int) -> None:
    server, client = talk(bob("--once"), start)
    server.process.send_signal(number)  # while he waits for her, and she for her person
    client.expect("Bob left", "stderr")
    assert (client.wait(), server.wait()) == (0, 0)


def test_who_is_typing_learns_at_once_that_the_other_left(bob: StartBob, start: Start) -> None:
    server, client = at_terminals(bob, start, "--once")
    client.write("half a lin")
    client.expect("half a lin")
    server.write("\x03")
    client.expect("Bob left")
    assert (client.wait(), server.wait()) == (0, 0)


def test_ctrl_d_at_the_address(start: Start) -> None:
    client = start("alice_client.py", terminal=True)
    client.expect("Bob's address")
    client.write("\x04")
    assert client.wait() == 130


# --------------------------------------------------------------------------------- what can go wrong


def fails(program: Program, status: int, pattern: str) -> None:
    program.expect(pattern, "stderr")
    assert program.wait() == status
    assert program.stdout == ""


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return str(listener.getsockname()[1])


@pytest.mark.parametrize("host", ["a..b", "x" * 300])
def test_wrong_host_name(start: Start, host: str) -> None:
    fails(start("alice_client.py", host), 1, "^No connection: cannot connect to .*: there is no such host")


@pytest.mark.parametrize(
    ("banner", "status", "pattern"),
    [
        (
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
            3,
            "^Broken off: a frame of 1213486160 bytes, over the limit of 8192",
        ),
        (b"\0\0\0\x05hello", 3, "^Broken off: a field of the hello is cut short"),
        (
            b"",
            1,
            "^Cut off: the connection ended without a goodbye, during the handshake. Is bob_server.py there",
        ),
        (b"\0", 1, "^Cut off: the connection ended in the middle of a message, during the handshake"),
    ],
)
def test_something_else_listens_there(start: Start, banner: bytes, status: int, pattern: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = start("alice_client.py", "127.0.0.1", "--port", str(listener.getsockname()[1]))
        connected, _ = listener.accept()
        with connected, contextlib.suppress(OSError):  # Alice may have hung up before all of it is said
            connected.sendall(banner)
            connected.shutdown(socket.SHUT_WR)
            connected.settimeout(DEADLINE)
            connected.recv(1)
        fails(client, status, pattern)


def test_bobs_key_has_changed(bob: StartBob, start: Start, homes: Path, keys: Keys) -> None:
    _, port = bob()
    KnownPeer(Home(homes / "alice"), f"[127.0.0.1]:{port}").pin(keys.mallory)
    before = (homes / "alice" / "known_peers").read_bytes()
    client = start("alice_client.py", "127.0.0.1", "--port", port)
    fails(client, 3, rf"^Refused: the key of \[127.0.0.1\]:{port} is not the one pinned")
    for part in (
        f"pinned:       {chat.fingerprint(keys.mallory)}  ({homes}/alice/known_peers, line 1)",
        f"presented:    {chat.fingerprint(keys.bob)}",
        f"--peer {chat.fingerprint(keys.bob)}",
    ):
        assert part in client.stderr
    assert (homes / "alice" / "known_peers").read_bytes() == before
    meant = start("alice_client.py", "127.0.0.1", "--port", port, "--peer", chat.fingerprint(keys.bob))
    meant.end_input()
    assert meant.wait() == 0
    again = start("alice_client.py", "127.0.0.1", "--port", port)
    again.end_input()
    assert again.wait() == 0


def test_alices_key_has_changed(bob: StartBob, start: Start, homes: Path, keys: Keys) -> None:
    KnownPeer(Home(homes / "bob"), "alice").pin(keys.mallory)
    server, port = bob()
    client = start("alice_client.py", "127.0.0.1", "--port", port)
    fails(client, 1, f"does Bob accept your key\\? It is {chat.fingerprint(keys.alice)}".replace("+", r"\+"))
    server.expect("127.0.0.1: Refused: the key of alice is not the one pinned", "stderr")
    assert chat.fingerprint(keys.alice) in server.stderr


def test_peer_option_accepts_no_other_key(bob: StartBob, start: Start, homes: Path, keys: Keys) -> None:
    _, port = bob()
    client = start("alice_client.py", "127.0.0.1", "--port", port, "--peer", chat.fingerprint(keys.mallory))
    fails(client, 3, "^Refused: the key of .* is not the one asked for")
    assert not (homes / "alice" / "known_peers").exists()


@pytest.mark.parametrize("script", ["bob_server.py", "alice_client.py"])
def test_damaged_identity_is_reported_and_kept(start: Start, homes: Path, script: str) -> None:
    path = homes / script.split("_")[0] / "identity.pem"
    path.write_bytes(path.read_bytes()[:-100])
    before = path.read_bytes()
    fails(start(script, "--port", "0" if "bob" in script else "1"), 1, f"^Stopped: {path} is damaged")
    assert path.read_bytes() == before


@pytest.mark.parametrize("script", ["bob_server.py", "alice_client.py"])
def test_identity_that_others_can_read_is_refused(start: Start, homes: Path, script: str) -> None:
    path = homes / script.split("_")[0] / "identity.pem"
    path.chmod(0o644)
    fails(
        start(script, "--port", "0" if "bob" in script else "1"),
        1,
        rf"^Stopped: {path} is open to other users \(mode 0644\)",
    )


def test_encrypted_identity_is_asked_for_at_the_terminal(start: Start, homes: Path, keys: Keys) -> None:
    Home(homes / "alice").write("identity.pem", keys.alice.export_key("PEM", passphrase="open", pkcs=8))
    client = start("alice_client.py", "127.0.0.1", "--port", free_port(), terminal=True)
    client.expect("Passphrase of .*identity.pem: ")
    client.write("open\n")
    client.expect("nobody is listening there")
    assert client.wait() == 1


@pytest.mark.parametrize("killed", ["bob", "alice"])
def test_a_killed_program_is_told_from_a_goodbye(bob: StartBob, start: Start, killed: str) -> None:
    server, client = talk(bob("--once"), start)
    dead, other = (server, client) if killed == "bob" else (client, server)
    dead.process.kill()
    other.expect("^Cut off: the connection ended without a goodbye", "stderr")
    assert other.wait() == 1


def test_bob_serves_on_after_rubbish_and_a_cut(bob: StartBob, start: Start) -> None:
    server, port = bob()
    for rubbish in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\x04abcd", b"\xff" * 100):
        with socket.create_connection(("127.0.0.1", int(port)), timeout=DEADLINE) as stranger:
            stranger.sendall(rubbish)
            stranger.shutdown(socket.SHUT_WR)
            server.expect("127.0.0.1: (Cut|Broken) off: ", "stderr")
    _, client = talk((server, port), start)
    client.process.kill()
    server.expect("^Cut off: ", "stderr")
    server.expect("Waiting for Alice", "stderr")
    _, client = talk((server, port), start)
    client.end_input()
    assert client.wait() == 0


def test_a_second_alice_is_told_that_bob_is_busy(
    bob: StartBob, start: Start, homes: Path, keys: Keys
) -> None:
    for key in (keys.alice, keys.mallory):  # Bob knows two people as alice
        line = f"alice {chat.ssh_line(key)}\n"
        with (homes / "bob" / "known_peers").open("a") as known:
            known.write(line)
    server, first = talk(server_and_port := bob(), start)
    Home(homes / "other" / "alice").write("identity.pem", keys.mallory.export_key("PEM", pkcs=8))
    second = start("alice_client.py", "127.0.0.1", "--port", server_and_port[1], home=homes / "other")
    second.expect("Bob left: Bob is talking to somebody else; try again later", "stderr")
    assert second.wait() == 0
    first.write("still here\n")
    server.expect("^Alice: still here\n")


def test_the_same_alice_takes_over_from_her_dead_connection(bob: StartBob, start: Start) -> None:
    server, first = talk(server_and_port := bob(), start)
    _, second = talk(server_and_port, start)
    first.expect("^Cut off: ", "stderr")
    assert first.wait() == 1
    second.write("back again\n")
    server.expect("^Alice: back again\n")


def test_standard_output_that_nobody_reads(bob: StartBob, start: Start) -> None:
    server, client = talk(bob("--once"), start)
    assert client.process.stdout
    client.forget_stdout()
    client.write("hello\n")
    server.expect("^Alice: hello\n")
    server.write("hello\n")
    client.expect("^Stopped: cannot read or write the conversation: Broken pipe", "stderr")
    assert client.wait() == 1
    server.expect("Alice left", "stderr")
    assert server.wait() == 0


def test_closed_standard_streams(bob: StartBob, homes: Path) -> None:
    server, port = bob("--once")
    command = f'exec "{sys.executable}" alice_client.py 127.0.0.1 --port {port} 0<&- 1>&- 2>&-'
    environment = {**os.environ, "SECURE_CHAT_HOME": str(homes)}
    assert subprocess.run(command, shell=True, cwd=ROOT, env=environment, timeout=DEADLINE).returncode == 0
    assert server.wait() == 0


# ------------------------------------------------------------------------------- what a hostile review found


def hostile_alice(port: str, homes: Path, keys: Keys) -> chat.Channel:
    """An Alice with valid keys and a mind of her own."""
    line = chat.Line(socket.create_connection(("127.0.0.1", int(port)), timeout=DEADLINE))
    channel, _ = chat.alice_handshake(line, keys.alice, None, KnownPeer(Home(homes / "hostile"), "bob"))
    return channel


@pytest.mark.parametrize("terminal", [False, True])
def test_the_reason_of_a_goodbye_cannot_imitate_the_program(
    bob: StartBob, homes: Path, keys: Keys, terminal: bool
) -> None:
    server, port = bob("--once", terminal=terminal)
    hostile_alice(port, homes, keys).close(
        "bye\nAlice is here: SHA256:forged\x1b[2K" + " " * 300 + "You left."
    )
    stream = "stdout" if terminal else "stderr"
    server.expect(r"Alice left: bye\r?\n          \| Alice is here: SHA256:forged\\x1b\[2K", stream)
    assert server.wait() == 0
    for line in getattr(server, stream).split("Alice left: ")[1].splitlines()[1:]:
        assert line.startswith("          | ")


def test_ctrl_c_before_bob_has_turned_to_his_guest_is_a_goodbye_too(bob: StartBob, start: Start) -> None:
    interrupted = patched("def talk(*_): raise KeyboardInterrupt", "__import__('bob_server').talk = talk")
    server, port = bob(python=interrupted)
    client = start("alice_client.py", "127.0.0.1", "--port", port)
    client.expect("^Bob left\\.\n\\Z", "stderr")
    assert (client.wait(), server.wait()) == (0, 130)


def test_a_text_and_a_goodbye_at_once_do_not_leave_bob_at_his_prompt(
    bob: StartBob, homes: Path, keys: Keys
) -> None:
    """Both records are there before Bob's prompt is: the signal that is to wake it must not be lost."""
    server, port = bob(terminal=True)
    for number in range(10):
        alice = hostile_alice(port, homes, keys)
        alice.send(f"and gone {number}")
        alice.close()
        server.expect(f"and gone {number}")
        server.expect("Alice left")
        server.expect("Waiting for Alice")


def test_half_a_message_does_not_hang_the_one_who_waits(start: Start, homes: Path, keys: Keys) -> None:
    impatient = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv.pop(0); import crypto_utils, bob_server\n"
    )
    impatient += "crypto_utils.STALL_SECONDS = 0.5; bob_server.main()"
    server = start("bob_server.py", "--port", "0", "--once", python=(sys.executable, "-c", impatient))
    port = server.expect(r"Listening on port (\d+)\.", "stderr")[1]
    alice = hostile_alice(port, homes, keys)
    alice.line.socket.sendall(b"\0")
    server.expect("^Cut off: the other side did not answer in time", "stderr")
    assert server.wait() == 1
    alice.line.hang_up()


def test_a_line_without_end_is_too_long_and_no_more(bob: StartBob, start: Start) -> None:
    server, client = talk(bob("--once"), start)
    endless = Background(lambda: client.write("x" * (3 * chat.TEXT_LIMIT) + "\nafterwards\n"))
    client.expect("Not sent: the text is .* bytes long", "stderr")
    server.expect("^Alice: afterwards\n")
    endless.result()


def test_no_passphrase(start: Start, homes: Path, keys: Keys) -> None:
    Home(homes / "alice").write("identity.pem", keys.alice.export_key("PEM", passphrase="open", pkcs=8))
    client = start("alice_client.py", "127.0.0.1", terminal=True)
    client.expect("Passphrase of .*identity.pem: ")
    client.write("\x04")
    client.expect("Stopped: no passphrase was given for the key")
    assert client.wait() == 1


def test_a_home_that_nobody_has(start: Start) -> None:
    client = start("alice_client.py", "--home", "~no-such-user/x")
    fails(client, 1, "^Stopped: cannot tell which folder ~no-such-user/x is; say where with --home DIR")


def test_parameters_that_openssl_wrote(bob: StartBob, start: Start, homes: Path, tmp_path: Path) -> None:
    file = tmp_path / "dh.pem"
    file.write_bytes(RFC_GROUPS["ffdhe3072"].export())
    server, port = bob("--once", "--dh-parameters", str(file))
    _, client = talk((server, port), start)
    client.end_input()
    assert (client.wait(), server.wait()) == (0, 0)
    assert Home(homes / "bob").load_group() == RFC_GROUPS["ffdhe3072"] == Home(homes / "alice").load_group()
    for content, reason in (
        (b"", "no usable Diffie-Hellman parameters"),
        (chat.Group(RFC_GROUPS["ffdhe2048"].p - 2, 2).export(), "p is not a safe prime"),
        (chat.Group(23, 2).export(), "p has 5 bits"),
    ):
        file.write_bytes(content)
        fails(
            start("bob_server.py", "--port", "0", "--dh-parameters", str(file)),
            1,
            f"^Stopped: {file} .*{reason}",
        )
    assert Home(homes / "bob").load_group() == RFC_GROUPS["ffdhe3072"]
    fails(
        start("bob_server.py", "--dh-parameters", f"{file}", "--dh-bits", "2048"),
        2,
        "not allowed with argument",
    )


# ------------------------------------------------------------------------------------------------- people


def test_what_is_typed_ahead_waits_for_the_prompt_and_for_enter(bob: StartBob, start: Start) -> None:
    server, client = at_terminals(bob, start, "--once")
    client.write("hello\n")
    server.expect("hello\r\nBob: ")
    client.expect(r"\(Bob's turn; Ctrl-C leaves\)")
    client.write("typed ahead\nwith Enter")
    server.write("reply\n")
    client.expect("Bob \u2713 reply\r\n")
    client.expect("typed ahead")
    client.expect("with Enter")
    client.write(", and more\n")
    server.expect("Alice \u2713 typed ahead\r\n      | with Enter, and more\r\n")


def test_the_steps_are_told_with_the_same_public_values_on_both_sides(bob: StartBob, start: Start) -> None:
    server, port = bob("--once", "-vv")
    client = start("alice_client.py", "127.0.0.1", "--port", port, "-vv")
    client.write("a secret word\n")
    server.expect("^Alice: a secret word\n")
    server.write("another one\n")
    client.end_input()
    assert (client.wait(), server.wait()) == (0, 0)
    values = [
        sorted(
            re.findall(
                r"^    (p|g|A|B|RSA|nonce_A|nonce_B|nonce|th|ciphertext|tag|signature) +(\S+)$",
                said,
                re.MULTILINE,
            )
        )
        for said in (server.stderr, client.stderr)
    ]
    assert values[0] == values[1]
    names = {name for name, _ in values[0]}
    hellos, records = {"RSA", "nonce_A", "nonce_B"}, {"nonce", "ciphertext", "tag", "signature"}
    assert names == {"p", "g", "A", "B", "th"} | hellos | records
    for said in (server.stderr, client.stderr):
        steps = [said.index(step) for step in ("step 1, key", "step 2, encryption", "steps 2 and 3")]
        assert steps == sorted(steps)
        for secret in (b"a secret word".hex(), b"another one".hex()):
            assert secret not in said


def test_colour_is_for_terminals_that_want_it(bob: StartBob, start: Start) -> None:
    for environment, mark in (
        ({}, "\x1b[32mAlice \u2713 \x1b[0mhello"),
        ({"NO_COLOR": "1"}, "Alice \u2713 hello"),
    ):
        server, port = bob("--once", terminal=True, TERM="xterm", **environment)
        client = start("alice_client.py", "127.0.0.1", "--port", port)
        client.write("hello\n")
        server.expect(re.escape(mark))


def test_a_screen_that_cannot_show_a_character_loses_nothing(bob: StartBob, start: Start) -> None:
    server, port = bob("--once", PYTHONIOENCODING="ascii")
    client = start("alice_client.py", "127.0.0.1", "--port", port)
    client.write("caf\u00e9 \U0001f600\n")
    server.expect(r"^Alice: caf\\xe9 \\U0001f600$")
