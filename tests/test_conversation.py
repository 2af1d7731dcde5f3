"""Both programs on pipes, as a script uses them: what goes in, what comes out, and how they end."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import (
    DEADLINE,
    ROOT,
    Background,
    Keys,
    Start,
    StartBob,
    Stranger,
    exhaustive,
    fails,
    pin_each_other,
    talk,
)

import alice_client
import crypto_utils as chat
from crypto_utils import KeyStore, Role

ENGLAND = "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"  # a flag, and tags
TEXTS = [
    "plain",
    "",
    "  spaces around  ",
    "\ttab",
    ENGLAND,
    "e\u0301 n\u0303 \u05e9 \u65e5",
    "/quit",
    "Bob: only a text",
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


@pytest.mark.parametrize(
    ("killed", "spoke"),
    [(Role.ALICE, True), *exhaustive((Role.ALICE, False), *((Role.BOB, x) for x in (True, False)))],
)
def test_a_killed_program_is_told_from_a_goodbye(
    bob: StartBob, start: Start, killed: Role, spoke: bool
) -> None:
    """Whoever spoke last is told also that this may not have arrived."""
    server, client = talk(bob("--once"), start)
    if spoke:
        client.write("hello\n")
        server.expect("^Alice: hello\n")
    if spoke and killed is Role.ALICE:
        server.write("hello\n")
        client.expect("^Bob: hello\n")
    dead, other = (server, client) if killed is Role.BOB else (client, server)
    dead.process.kill()
    more = r"\. Your last message may not have arrived" if spoke else ""
    other.expect(rf"^Cut off: [^.]*{more}\.\n\Z", "stderr")
    assert other.wait() == 1


def test_lines_that_were_not_sent_before_the_other_side_left_count(bob: StartBob, start: Start) -> None:
    server, client = talk(bob("--once"), start)
    client.write("one\ntwo\n")
    server.expect("^Alice: one\n")
    server.end_input()
    assert (client.wait(), server.wait()) == (1, 0)


def test_half_a_line_that_a_goodbye_interrupts_goes_to_the_next_guest_whole(
    bob: StartBob, stranger: Stranger, keys: Keys
) -> None:
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
    ["[::1]:PORT", "LOCALHOST", *exhaustive("127.0.0.1", "::1", "[::1]", "127.0.0.1:PORT")],
)
def test_alice_reaches_bob_by_address_and_by_name(
    bob: StartBob, start: Start, homes: Path, keys: Keys, host: str
) -> None:
    if ":1" in host and "." not in host and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    server, port = bob("--once", "--peer", chat.fingerprint(keys.alice))
    where = (host.replace("PORT", port),) if "PORT" in host else (host, "--port", port)
    client = start("alice_client.py", *where, "--peer", chat.fingerprint(keys.bob))
    client.write("hello\n")
    server.expect("^Alice: hello\n")
    server.write("hello\n")
    client.end_input()
    assert client.wait() == 0
    (pinned,) = (homes / "alice" / KeyStore.KNOWN_PEERS).read_text().splitlines()
    assert pinned.startswith(f"[{host.replace(':PORT', '').strip('[]').lower()}]:{port} ")


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("Example.ORG", "Example.ORG", 1),  # a pin's name is in lower case, and a zone keeps its capitals
        ("example.org:2", "example.org", 2),
        ("192.0.2.7", "192.0.2.7", 1),
        ("::1", "::1", 1),
        ("fe80::1%eth0", "fe80::1%eth0", 1),
        ("fe80::1%br-lan", "fe80::1%br-lan", 1),
        ("[fe80::1%LAN0.100]:2", "fe80::1%LAN0.100", 2),
        ("[2001:DB8::7]:2", "2001:DB8::7", 2),
    ],
)
def test_what_an_address_is(text: str, host: str, port: int) -> None:
    assert alice_client.parse_address(text, 1) == (host, port)


@pytest.mark.parametrize(
    "text",
    [
        *(f"host:{port}" for port in ("65536", "port", 5000 * "9")),
        *("a host", "host,other", "192.0.2.2\u00a0--peer", "alice@host", "[::1]x", "*", ""),
        *("65432", ":65432", "1:2", "http://host", "[host", "host]", "::1]:5", "[[host]]:5"),
    ],
)
def test_what_is_no_address_is_a_mistake_in_usage(text: str) -> None:
    with pytest.raises(chat.UsageError, match=re.escape(f"{text} is no address like 192.0.2.7, ")):
        alice_client.parse_address(text, 1)


@pytest.mark.parametrize("address", [":65432", ""])
def test_a_mistake_in_usage_is_told_before_a_key_is_made(start: Start, tmp_path: Path, address: str) -> None:
    client = start("alice_client.py", address, home=tmp_path / "fresh")
    fails(client, 2, f"^Usage: {address} is no address like 192")
    assert not (tmp_path / "fresh").exists()


@pytest.mark.parametrize(
    "argument", ["\u2014peer", "\u2013v", "192.0.2.2\u00a0--peer", "--peer\u00a0SHA256:"]
)
def test_a_command_that_a_messenger_has_changed(start: Start, argument: str) -> None:
    fails(start("alice_client.py", argument), 2, "a messenger changed a dash or a space; type it with --")


def test_the_address_is_asked_for_once(start: Start) -> None:
    """Enter is this machine; an error ends the program."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        nobody = str(listener.getsockname()[1])
    for answer, told, status in (
        ("", rf"127\.0\.0\.1\s+port\s+{nobody}:\s+nobody\s+is\s+listening", 1),
        ("a b", r"a b is no address\s+like", 2),
        ("no-such-host.invalid", r"there\s+is\s+no\s+such\s+host", 1),
    ):
        client = start("alice_client.py", "--port", nobody, terminal=True, size=(24, 80), TERM="xterm")
        client.expect("Bob's address .*: ")
        client.write(f"{answer}\r")
        client.expect(told)
        assert client.wait() == status


@pytest.mark.parametrize("form", ["{}.", *exhaustive("{}", "{}=", " {} ", "no SHA256:")])
def test_a_fingerprint_is_taken_as_people_copy_it(keys: Keys, form: str) -> None:
    whole = chat.fingerprint(keys.bob)
    assert chat.a_fingerprint(form.format(whole) if "{}" in form else whole.split(":")[1]) == whole


# ------------------------------------------------------------------------------- keys and parameters


def test_a_passphrase_is_edited_also_after_the_address(start: Start, homes: Path, keys: Keys) -> None:
    locked = keys.alice.export_key("PEM", passphrase="correct horse", pkcs=8)
    KeyStore(homes / "alice").write(KeyStore.IDENTITY, lambda: locked)
    client = start("alice_client.py", terminal=True, size=(24, 80), TERM="xterm")
    client.expect("Bob's address .*: ")
    client.write("127.0.0.1:1\r")
    client.expect("Passphrase of ")
    client.write("correct house\x7f\x7f\x7frse\r")
    client.expect("You are Alice")
    client.wait()
