"""Both programs on pipes, as a script uses them: what goes in, what comes out, and how they end."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import (
    AT_TERMINAL,
    DEADLINE,
    ROOT,
    Background,
    Keys,
    Start,
    StartBob,
    Stranger,
    exhaustive,
    pin_each_other,
    talk,
)

import alice_client
import crypto_utils as chat
from crypto_utils import KeyStore, PinnedPeer, Role

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


def test_every_message_comes_once_in_order_and_both_leave_with_0(bob: StartBob, start: Start) -> None:
    server, client = talk(bob("--once"), start)
    for number, text in enumerate(TEXTS):
        client.write(f"{text}\n")
        server.expect(rf"^Alice: {text}\n\Z")
        server.write(f"{number} {text}\n")
        client.expect(f"^Bob: {number} {text}\n\\Z")
    client.end_input()
    assert (client.wait(), server.wait()) == (0, 0)
    assert server.stdout == "".join(f"Alice: {text}\n" for text in TEXTS)
    assert client.stdout == "".join(f"Bob: {number} {text}\n" for number, text in enumerate(TEXTS))


@pytest.mark.parametrize("lines", [20, pytest.param(1000, marks=pytest.mark.exhaustive)])
def test_a_file_piped_into_each_side(bob: StartBob, start: Start, lines: int) -> None:
    server, client = talk(bob("--once"), start)
    writers = [
        Background(lambda: server.write("".join(f"reply {n}\n" for n in range(lines)))),
        Background(
            lambda: [client.write("".join(f"request {n}\n" for n in range(lines))), client.end_input()]
        ),
    ]
    assert (client.wait(), server.wait()) == (0, 0)
    for writer in writers:
        writer.result()
    assert client.stdout == "".join(f"Bob: reply {n}\n" for n in range(lines))
    assert server.stdout == "".join(f"Alice: request {n}\n" for n in range(lines))


@pytest.mark.exhaustive
def test_a_text_of_the_limit_goes_through_and_one_byte_more_is_refused_at_home(
    bob: StartBob, start: Start
) -> None:
    server, client = talk(bob("--once"), start)
    longest = "x" * (chat.TEXT_LIMIT - 2) + "é"
    lines = Background(
        lambda: client.write(f"{longest}x\n{longest}\r\nnot UTF-8: ".encode() + b"\xff\nend\n")
    )
    client.expect("^Not sent: ", "stderr")
    server.expect(f"^Alice: {longest}\n")
    server.write("reply\n")
    client.expect("^Not sent: ", "stderr")
    server.expect("^Alice: end\n")
    lines.result()
    server.end_input()
    assert (server.wait(), client.wait()) == (0, 1)  # not all of Alice's lines were sent


def test_a_line_without_end_is_too_long_and_no_more(bob: StartBob, start: Start) -> None:
    server, client = talk(bob("--once"), start)
    endless = Background(lambda: client.write("x" * (3 * chat.TEXT_LIMIT) + "\nafterwards\n"))
    client.expect("^Not sent: ", "stderr")
    server.expect("^Alice: afterwards\n")
    endless.result()


@pytest.mark.exhaustive
def test_a_last_line_without_an_end_is_sent(bob: StartBob, start: Start) -> None:
    server, client = talk(bob("--once"), start)
    client.write("no newline")
    client.end_input()
    server.expect("^Alice: no newline\n")


def test_the_end_of_bobs_input_ends_him_after_a_goodbye(bob: StartBob, start: Start) -> None:
    server, client = talk(bob(), start)
    server.end_input()
    client.write("anybody there?\n")
    client.expect("^Bob left", "stderr")
    assert (server.wait(), client.wait()) == (0, 0)
    assert server.stdout == "Alice: anybody there?\n"


def test_a_line_that_a_goodbye_interrupts_goes_to_the_next_guest_whole(
    bob: StartBob, start: Start, stranger: Stranger, keys: Keys
) -> None:
    """Bob has been given half a line when Alice leaves: who gets it gets all of it."""
    server, port = bob()
    pin_each_other(server.home, port)
    first = stranger(port, keys.alice)
    first.send("hello")
    server.expect("^Alice: hello\n")
    server.write("pay 1")
    first.close()
    server.expect("Alice left", "stderr")
    server.expect("Waiting for Alice", "stderr")
    second = stranger(port, keys.alice)
    second.send("how much?")
    server.expect(r"^Alice: how much\?\n")
    server.write("00 euros\n")
    assert second.receive().text == "pay 100 euros"


@pytest.mark.exhaustive
@pytest.mark.parametrize("killed", Role)
def test_a_killed_program_is_told_from_a_goodbye(bob: StartBob, start: Start, killed: Role) -> None:
    server, client = talk(bob("--once"), start)
    dead, other = (server, client) if killed is Role.BOB else (client, server)
    dead.process.kill()
    other.expect("^Cut off: ", "stderr")
    assert other.wait() == 1
    assert "may not have arrived" not in other.stderr


@pytest.mark.parametrize("killed", [Role.BOB, *exhaustive(Role.ALICE)])
def test_after_a_cut_one_is_told_that_ones_last_message_may_not_have_arrived(
    bob: StartBob, start: Start, killed: Role
) -> None:
    server, client = talk(bob("--once"), start)
    client.write("hello\n")
    server.expect("^Alice: hello\n")
    if killed is Role.ALICE:
        server.write("hello\n")
        client.expect("^Bob: hello\n")
    dead, other = (server, client) if killed is Role.BOB else (client, server)
    dead.process.kill()
    other.expect(r"^Cut off: .*\. Your last message may not have arrived\.$", "stderr")
    assert other.wait() == 1


@pytest.mark.exhaustive
def test_bob_serves_on_after_rubbish_and_a_cut(bob: StartBob, start: Start) -> None:
    server, port = bob()
    for rubbish in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\x04abcd", b"\xff" * 100):
        with socket.create_connection(("127.0.0.1", int(port)), timeout=DEADLINE) as someone:
            with contextlib.suppress(OSError):  # Bob may have hung up already
                someone.sendall(rubbish)
                someone.shutdown(socket.SHUT_WR)
            server.expect("127.0.0.1: (Cut|Broken) off: ", "stderr")
    _, client = talk((server, port), start)
    client.process.kill()
    server.expect("^Cut off: ", "stderr")
    server.expect("Waiting for Alice", "stderr")
    _, client = talk((server, port), start)
    client.write("hello\n")
    server.expect("^Alice: hello\n")


@pytest.mark.exhaustive
def test_closed_standard_streams(bob: StartBob, homes: Path) -> None:
    server, port = bob("--once")
    pin_each_other(homes, port)
    command = f'exec "{sys.executable}" alice_client.py 127.0.0.1 --port {port} 0<&- 1>&- 2>&-'
    environment = {**os.environ, "SECURE_CHAT_HOME": str(homes)}
    assert subprocess.run(command, shell=True, cwd=ROOT, env=environment, timeout=DEADLINE).returncode == 0
    server.expect("^Alice left", "stderr")
    assert server.wait() == 1  # nothing was said


# ------------------------------------------------------------------------------- finding each other


@pytest.mark.parametrize(
    "host",
    ["[::1]:PORT", *exhaustive("localhost", "127.0.0.1", "::1", "[::1]", "127.0.0.1:PORT")],
)
def test_alice_reaches_bob_by_address_and_by_name(
    bob: StartBob, start: Start, homes: Path, keys: Keys, host: str
) -> None:
    if ":1" in host and "." not in host and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    server, port = bob("--once")
    where = (host.replace("PORT", port),) if "PORT" in host else (host, "--port", port)
    PinnedPeer(KeyStore(homes / "bob"), "alice").pin(keys.alice)
    client = start("alice_client.py", *where, "--peer", chat.fingerprint(keys.bob))
    client.write("hello\n")
    server.expect("^Alice: hello\n")
    server.write("hello\n")
    client.end_input()
    assert client.wait() == 0
    (pinned,) = (homes / "alice" / KeyStore.KNOWN_PEERS).read_text().splitlines()
    assert pinned.startswith(f"[{host.replace(':PORT', '').strip('[]')}]:{port} ")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Example.ORG", ("example.org", 1)),
        ("example.org:2", ("example.org", 2)),
        ("192.0.2.7:2", ("192.0.2.7", 2)),
        ("[2001:DB8::7]:2", ("2001:db8::7", 2)),
        ("::1", ("::1", 1)),
        *((f"fe80::1%{zone}", (f"fe80::1%{zone}", 1)) for zone in ("eth0", "br-lan", "eth0.100", "LAN0")),
        *((f"[fe80::1%{zone}]:2", (f"fe80::1%{zone}", 2)) for zone in ("eth0", "br-lan", "eth0.100", "LAN0")),
        *((text, None) for text in ("host:65536", "host:port", "a host", "[::1]x", "*", "host,other", "")),
        *((text, None) for text in ("65432", ":65432", ":1", "1:2", "alice@192.0.2.7")),
    ],
)
def test_what_an_address_is(text: str, found: tuple[str, int] | None) -> None:
    if found is None:
        with pytest.raises(chat.UsageError, match=r"cannot be an address; examples: |leave out alice@"):
            alice_client.parse_address(text, 1)
    else:
        host, port = alice_client.parse_address(text, 1)
        assert (
            host if "%" in host else host.lower(),
            port,
        ) == found  # an interface is named in its own capitals


@pytest.mark.parametrize(
    ("answer", "told", "status"),
    [
        ("", "nobody is listening", 1),
        ("a b", "cannot be an address", 2),
        ("no-such-host.invalid", "there is no such", 1),
    ],
)
def test_the_address_is_asked_for_once(start: Start, answer: str, told: str, status: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        nobody = str(listener.getsockname()[1])
    client = start("alice_client.py", "--port", nobody, **{**AT_TERMINAL, "size": (24, 200)})
    client.expect("Bob's address .*: ")
    client.write(f"{answer}\r")
    client.expect(told)
    assert client.wait() == status


@pytest.mark.parametrize(
    ("script", "arguments", "told"),
    [
        ("alice_client.py", ("192.0.2.7", "\u2014peer", "SHA256:x"), "type it anew"),
        ("alice_client.py", ("192.0.2.7\u00a0--peer",), "type it anew"),
        ("alice_client.py", (":65432",), "cannot be an address"),
        ("alice_client.py", ("alice@192.0.2.7",), "leave out alice@"),
        ("bob_server.py", ("--port", "65536"), "a port is a number up to 65535"),
        ("bob_server.py", ("--peer", "SHA256:short"), "a fingerprint is SHA256: and 43 characters"),
    ],
)
def test_a_usage_error_is_told_before_a_key_is_made(
    start: Start, tmp_path: Path, script: str, arguments: tuple[str, ...], told: str
) -> None:
    home = tmp_path / "fresh"
    program = start(script, *arguments, home=home)
    assert program.wait() == 2
    assert told in program.stderr
    assert not home.exists()


@pytest.mark.parametrize("form", ["{}", *exhaustive("{}.", "{}=", " {} ", "no SHA256:")])
def test_a_fingerprint_is_taken_as_people_copy_it(keys: Keys, form: str) -> None:
    whole = chat.fingerprint(keys.bob)
    assert chat.a_fingerprint(form.format(whole) if "{}" in form else whole.split(":")[1]) == whole


@pytest.mark.exhaustive
def test_bobs_invitation_can_be_run_as_it_is(bob: StartBob, homes: Path, keys: Keys) -> None:
    server, _ = bob("--host", "127.0.0.1", "--once", "--peer", chat.fingerprint(keys.alice))
    server.end_input()  # he says goodbye after the first message
    (command,) = (line for line in server.stderr.splitlines() if line.startswith("  python3"))
    result = subprocess.run(
        command.replace("python3", sys.executable, 1),
        shell=True,
        cwd=ROOT,
        env={**os.environ, "SECURE_CHAT_HOME": str(homes)},
        input="hello\n",
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert result.returncode == 0, result.stderr
    assert server.wait() == 0
    assert server.stdout == "Alice: hello\n"


@pytest.fixture
def hosts() -> Iterator[list[tuple[str, ...]]]:
    """Make two hosts of our own: network namespaces with a cable between them. Return their prefixes."""
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
        yield [("ip", "netns", "exec", name, sys.executable) for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, timeout=DEADLINE)


@pytest.mark.exhaustive
def test_two_hosts(bob: StartBob, start: Start, keys: Keys, hosts: list[tuple[str, ...]]) -> None:
    server, port = bob("--once", "--peer", chat.fingerprint(keys.alice), python=hosts[0])
    assert f"  python3 alice_client.py 192.0.2.1 --port {port} --peer SHA256:" in server.stderr
    peer = ("--peer", chat.fingerprint(keys.bob))
    client = start("alice_client.py", "192.0.2.1", "--port", port, *peer, python=hosts[1])
    client.write("over the cable\n")
    server.expect("^Alice: over the cable\n")
    server.write("so it is\n")
    client.end_input()
    assert (client.wait(), server.wait()) == (0, 0)
