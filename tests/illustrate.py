#!/usr/bin/env python3
"""Make a page of a conversation: every byte of a transcript, what was checked, and what was computed.

    python3 tests/illustrate.py FILE [-o PAGE]

The page is one file for a browser, and needs no network. Its script, in tests/page/, reads the frames again,
makes every check again, and lets the reader change any byte. The page discloses the conversation, as the
transcript does.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))

import crypto_utils as chat

SCRIPTS = ("protocol.js", "lesson.js", "page.js")
LIMIT = 64 * 1024 * 1024  # of a transcript: a browser has to hold all of it

# Where each check is done, and the handshake. The names of the checks are those of tests/page/lesson.js.
UTILS = "crypto_utils.py: "
WHERE = {
    **dict.fromkeys(("file", "after CLOSE"), UTILS + "verify_transcript"),
    "limit": UTILS + "FrameSocket.receive",
    "cut": UTILS + "FrameSocket.receive",
    "fields": UTILS + "decode_fields",
    **dict.fromkeys(
        ("version", "field count", "nonce length", "integer length", "integer encoding"),
        UTILS + "Hello.decode",
    ),
    **dict.fromkeys(("p size", "p even"), UTILS + "check_group"),
    "p safe prime": UTILS + "is_safe_prime",
    "g subgroup": UTILS + "Group.contains",
    **dict.fromkeys(
        ("rsa size of DER", "rsa type", "rsa parse", "rsa bits", "rsa exponent", "rsa encoding"),
        UTILS + "load_public_key",
    ),
    "public value length": UTILS + "settle",
    "public value subgroup": UTILS + "Group.contains",
    "own key": UTILS + "settle",
    "trust": UTILS + "PinnedPeer.check",
    "z length": UTILS + "verify_transcript",
    **dict.fromkeys(("record length", "number", "turn", "in_reply_to"), UTILS + "Opener.open"),
    "signature": UTILS + "verify",
    "tag": UTILS + "decrypt",
    **dict.fromkeys(
        ("padding", "too short", "type", "ready", "body length", "utf-8"),
        UTILS + "Opener._parse",
    ),
    "commitment": UTILS + "make_words",
    "handshake bob": "bob_server.py: handshake",
    "handshake alice": "alice_client.py: handshake",
}


def values_of(data: bytes) -> dict[str, str]:
    """Return what the program finds in a transcript, by the names of the page. Raises ProtocolError."""
    payloads = []
    file = io.BytesIO(data)
    for header in iter(lambda: file.read(4), b""):
        payloads.append(file.read(int.from_bytes(header, "big")))
    # (a file that is not sound is refused here, whatever was read above)
    records = list(chat.verify_transcript(io.BytesIO(data)))
    bob, alice, z = (payload[1:] for payload in payloads[:3])
    th = sha256(chat.frame(bob) + chat.frame(alice)).digest()
    values = {"th": th.hex()}
    commitments = {}
    for role in chat.Role:
        key, commitments[role] = chat.derive_keys(z, role.label, th)
        values[f"K-{role.value}"], values[f"C-{role.value}"] = key.hex(), commitments[role].hex()
    for index, (payload, (opener, message)) in enumerate(zip(payloads[3:], records), 3):
        role, record = opener.sender, payload[1:]
        signed = b"secure-chat/1 signature " + role.label + th + commitments[role]
        signed += record[: -opener.signer.size_in_bytes()]
        values[f"fingerprint-{role.value}"] = chat.fingerprint(opener.signer)
        values[f"signed-{index}"] = sha256(signed).hexdigest()
        body = sha256(message.body).hexdigest()
        values[f"plaintext-{index}"] = f"{message.type.name} {message.in_reply_to.hex()} {body}"
        if role is chat.Role.BOB and message.type is chat.RecordType.READY:
            values["words"] = " ".join(chat.make_words(th, chat.commit(message.body), message.body))
            values["commitment"] = sha256(b"secure-chat/1 commit " + message.body).hexdigest()
    return values


def make_page(data: bytes, program: dict[str, str] | None) -> str:
    """Return the page of a transcript. `program` is what the program found, None if it looked for nothing.

    The transcript goes in as base64, everything else as JSON without "<": nothing of it can end the element
    that holds it. The policy allows this script and this style, and no network.
    """
    template, style, *scripts = (
        (TESTS / "page" / name).read_text("utf-8") for name in ("page.html", "page.css", *SCRIPTS)
    )
    script = "\n'use strict';\n" + "\n".join(scripts)
    style = "\n" + style
    given: dict[str, Any] = {
        "file": base64.b64encode(data).decode(),
        "where": WHERE,
        "program": program,
        "words": (TESTS / "rfc1751.txt").read_text("ascii").split(),
        "verdict": chat.VERDICT.strip().splitlines(),
    }
    parts = {
        "POLICY": "default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"script-src '{_source_hash(script)}'; style-src '{_source_hash(style)}'",
        "STYLE": style,
        "SCRIPT": script,
        "DATA": json.dumps(given).replace("<", "\\u003c"),
    }
    for name, part in parts.items():
        before, found, after = template.partition(f"@{name}@")
        assert found
        template = before + part + after
    return template


def _source_hash(source: str) -> str:
    """Return what a Content-Security-Policy calls a script or a style."""
    return "sha256-" + base64.b64encode(sha256(source.encode()).digest()).decode()


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Make a page of a transcript that a browser shows, checks, and lets you change.",
        epilog="The page discloses the conversation.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a file that --transcript kept")
    help_page = "where to write the page (default: beside FILE, with .html at the end)"
    parser.add_argument("-o", "--output", type=Path, metavar="PAGE", help=help_page)
    options = parser.parse_args()
    page = options.output or options.file.with_name(options.file.name + ".html")
    try:
        path = Path(os.path.realpath(options.file))  # through a link too, as --verify does
        with chat.disk("read", options.file), chat.open_regular(path) as file:
            data = file.read(LIMIT + 1)
        if len(data) > LIMIT:
            raise chat.FileError(f"{options.file} is larger than {LIMIT} bytes, too large for a page")
        text = make_page(data, values_of(data))
        with chat.disk("write", page):
            _write_private(page, text.encode())
    except chat.ChatError as error:
        print(chat.explain(error, ""), file=sys.stderr)
        return error.status
    print(f"The page is {page}. Open it in a browser. It discloses the conversation.")
    return 0


def _write_private(path: Path, data: bytes) -> None:
    """Write a file that its owner alone can read, whole or not at all."""
    unfinished = path.with_name(f".{path.name}.new")
    try:
        with contextlib.suppress(FileNotFoundError):
            unfinished.unlink()
        with open(unfinished, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(data)
        unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


if __name__ == "__main__":
    sys.exit(main())
