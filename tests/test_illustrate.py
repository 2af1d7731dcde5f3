"""The page that tests/illustrate.py makes, in a real browser: one for all tests, driven over HTTP."""

from __future__ import annotations

import ast
import base64
import contextlib
import functools
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import illustrate
import pytest
from conftest import DEADLINE
from Crypto.Cipher import AES
from Crypto.Hash import SHA256
from Crypto.PublicKey import RSA
from Crypto.Signature import pss

import crypto_utils as chat

TESTS = Path(__file__).parent
VECTORS = TESTS / "vectors"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="there is no chromium here, or no chromedriver"
)
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]


class Browser:
    """Chromium, driven over HTTP on this machine."""

    def __init__(self, folder: Path) -> None:
        self._driver = subprocess.Popen(
            [DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert self._driver.stdout
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        said = iter(self._driver.stdout.readline, b"")
        ready = (re.search(rb"successfully on port (\d+)", line) for line in said)
        port = next(found[1] for found in ready if found)
        self._url = f"http://127.0.0.1:{int(port)}/session"
        try:
            self._begin(folder)
        except BaseException:
            self.close()
            raise

    def _begin(self, folder: Path) -> None:
        chrome = {"binary": BROWSER, "args": [*OPTIONS, f"--user-data-dir={folder}"]}
        wanted = {"goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        session = self._call("", {"capabilities": {"alwaysMatch": wanted}})
        self._url += f"/{session['sessionId']}"
        self._call("/timeouts", {"script": int(DEADLINE * 1000)})

    def _call(self, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> Any:
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(self._url + path, data, method=method)
        with self._open(request, timeout=2 * DEADLINE) as answer:
            return json.load(answer)["value"]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._call("", method="DELETE")
        self._driver.terminate()
        self._driver.communicate()

    def run(self, script: str, *arguments: Any) -> Any:
        """Run the body of an async function in the page; return what it returns."""
        wrapped = f"""const done = arguments[arguments.length - 1];
            (async (...given) => {{ {script} }})(...arguments)
                .then(done, (error) => done('failed: ' + error.stack));"""
        result = self._call("/execute/async", {"script": wrapped, "args": list(arguments)})
        assert not str(result).startswith("failed: "), result
        return result

    def command(self, name: str, **parameters: Any) -> Any:
        """Give Chromium a command of its own protocol."""
        return self._call("/goog/cdp/execute", {"cmd": name, "params": parameters})

    def log(self, kind: str) -> list[dict[str, Any]]:
        """What has been logged since the last time: `browser` is the console, `performance` the requests."""
        return list(self._call("/se/log", {"type": kind}))

    def open(self, page: Path) -> None:
        """Open a page, and wait until it has checked itself."""
        self._call("/url", {"url": page.as_uri()})
        self.wait(1)

    def wait(self, runs: int) -> None:
        """Wait until the page has made its checks that often."""
        self.run(
            """const root = document.documentElement;
            const enough = () => Number(root.dataset.checked ?? 0) >= given[0];
            if (enough()) return;
            await new Promise((resolve) => {
                new MutationObserver(() => enough() && resolve()).observe(root, { attributes: true });
            });""",
            runs,
        )


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests of this module, which has asked nobody for anything when it ends."""
    one = Browser(tmp_path_factory.mktemp("browser"))
    try:
        yield one
    finally:
        one.close()


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Any]:
    """Return a function that opens the page of a transcript. No page makes a request, or an error."""
    browser.command("Emulation.clearDeviceMetricsOverride")
    browser.log("performance")
    browser.log("browser")
    pages = []

    def opened(data: bytes, *, verified: bool = True) -> Browser:
        page = tmp_path / f"{len(pages)}.html"
        program = illustrate.values_of(data) if verified else None
        page.write_text(illustrate.make_page(data, program), "utf-8")
        pages.append(page.as_uri())
        browser.open(page)
        return browser

    yield opened
    assert [entry for entry in browser.log("browser") if entry["level"] != "INFO"] == []
    events = [json.loads(entry["message"])["message"] for entry in browser.log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert set(asked) <= set(pages)


def transcripts(kind: str) -> list[dict[str, Any]]:
    return list(json.loads((VECTORS / "transcripts.json").read_text("utf-8"))[kind])


def conversations() -> list[dict[str, Any]]:
    return list(json.loads((VECTORS / "conversations.json").read_text("utf-8"))["cases"])


def frame(tag: str, payload: str) -> bytes:
    data = tag.encode() + bytes.fromhex(payload)
    return len(data).to_bytes(4, "big") + data


def transcript_of(case: dict[str, Any], records: int | None = None, **hellos: str) -> bytes:
    """The transcript of one of the conversations, or of its first records, perhaps with other hellos."""
    parts = [frame("b", hellos.get("bob", case["bob"]["hello"]))]
    parts += [frame("a", hellos.get("alice", case["alice"]["hello"])), frame("z", case["z"])]
    for record in case["records"][:records]:
        payload = "".join(record[name] for name in ("nonce", "ciphertext", "tag", "signature"))
        parts.append(frame(record["sender"][0].upper(), payload))
    return b"".join(parts)


def keeps_the_order(case: dict[str, Any]) -> bool:
    """Whether a conversation's records begin as a transcript does."""
    return [(r["sender"], r["type"]) for r in case["records"][:2]] == [("alice", "READY"), ("bob", "READY")]


TALK = conversations()[0]
ROOT = TESTS.parent
TEXTS = ["Please pay 100 to Carol.", "It is done. Anything else?", "No, thank you.", "Goodbye, then."]
READ_ALL = """const found = [];
    for (const file of given[0]) found.push((await readFile(file)).refused);
    return found;"""


READY, TEXT, CLOSE = range(3)


class Writer:
    """Writes a transcript with the keys of a conversation of the vectors, and keeps no rules."""

    def __init__(self, case: dict[str, Any] = TALK) -> None:
        self.case = case
        self.data = transcript_of(case, 0)
        self.signed: dict[str, list[bytes]] = {"alice": [], "bob": []}  # the hash of each record
        self._keys = {who: RSA.import_key(case[who]["private_key"]) for who in self.signed}

    def latest(self, sender: str, back: int = 1) -> bytes:
        """What the record of a sender is called, so far back; 32 zero bytes if there is none."""
        return self.signed[sender][-back] if len(self.signed[sender]) >= back else bytes(32)

    def record(self, sender: str, kind: int, body: bytes = b"", in_reply_to: bytes | None = None) -> bytes:
        """Make the next record of a sender, as an entry; add nothing."""
        other = {"alice": "bob", "bob": "alice"}[sender]
        derived = self.case[f"{sender}->{other}"]
        plaintext = (
            bytes([kind]) + (self.latest(other) if in_reply_to is None else in_reply_to) + body + b"\x80"
        )
        plaintext += bytes(-len(plaintext) % 256)
        nonce = len(self.signed[sender]).to_bytes(12, "big")
        aes = AES.new(bytes.fromhex(derived["key"]), AES.MODE_GCM, nonce=nonce)
        encrypted = nonce + b"".join(aes.encrypt_and_digest(plaintext))
        context = f"secure-chat/1 signature {sender}->{other}".encode()
        self._hash = SHA256.new(context + bytes.fromhex(self.case["th"] + derived["commitment"]) + encrypted)
        signature = pss.new(self._keys[sender], salt_bytes=32).sign(self._hash)
        return frame(sender[0].upper(), (encrypted + signature).hex())

    def say(self, sender: str, kind: int, body: bytes = b"") -> None:
        self.data += self.record(sender, kind, body)
        self.signed[sender].append(self._hash.digest())


def begun(texts: list[str], case: dict[str, Any] = TALK) -> Writer:
    """A transcript in which these texts are said in turn, without a goodbye."""
    writer = Writer(case)
    writer.say("alice", READY)
    writer.say("bob", READY, bytes.fromhex(case["r"]))
    for place, text in enumerate(texts):
        writer.say("alice" if place % 2 == 0 else "bob", TEXT, text.encode())
    return writer


def conversation(texts: list[str], case: dict[str, Any] = TALK) -> bytes:
    """... and then the next one leaves."""
    writer = begun(texts, case)
    writer.say("alice" if len(texts) % 2 == 0 else "bob", CLOSE)
    return writer.data


VERDICT = """return {
    verdict: document.getElementById('verdict').innerText,
    refused: state.reading.refused?.words ?? null,
    same: [...state.same],
    words: state.reading.words?.join(' '),
    messages: state.reading.messages,
    cards: document.querySelectorAll('.card').length,
};"""


@needs_browser
@pytest.mark.parametrize(
    "vector",
    [
        *({"name": v["name"], "file": v["file"], "words": v["words"]} for v in transcripts("valid")),
        *(
            {"name": c["name"], "file": transcript_of(c).hex(), "words": c["words"]}
            for c in conversations()
            if keeps_the_order(c)
        ),
    ],
    ids=lambda vector: vector["name"],
)
def test_the_browser_agrees_with_every_value_of_a_sound_transcript(show: Any, vector: dict[str, str]) -> None:
    found = show(bytes.fromhex(vector["file"])).run(VERDICT)
    assert found["refused"] is None
    assert found["words"] == vector["words"]
    assert "checks passed in your browser" in found["verdict"]
    assert len(found["same"]) == 9 + 2 * (found["cards"] - 3)
    assert all(same for _, same in found["same"]), found["same"]


@needs_browser
def test_it_names_the_reason_for_which_a_transcript_is_refused(show: Any) -> None:
    browser = show(transcript_of(TALK))
    vectors = transcripts("refused")
    files = [base64.b64encode(bytes.fromhex(vector["file"])).decode() for vector in vectors]
    script = "const found = []; for (const file of given[0]) found.push(await readFile(file)); return found;"
    found = browser.run(script, files)
    assert [(v["name"], v["reason"]) for v in vectors] == [
        (v["name"], f["refused"]) for v, f in zip(vectors, found)
    ]


@needs_browser
def test_a_transcript_proves_the_same_messages_here(show: Any) -> None:
    vectors = transcripts("valid")
    files = [base64.b64encode(bytes.fromhex(vector["file"])).decode() for vector in vectors]
    script = "const found = []; for (const file of given[0]) found.push(await readFile(file)); return found;"
    found = show(transcript_of(TALK)).run(script, files)
    for vector, one in zip(vectors, found):
        assert one["messages"] == [
            {**m, "text": m.get("text", ""), "crossed": m.get("crossed", False)} for m in vector["messages"]
        ], vector["name"]


@needs_browser
def test_it_refuses_what_a_receiver_refuses_and_in_the_same_words(show: Any) -> None:
    """The hellos and records of refused.json, each put in its place in a transcript."""
    cases = {case["name"]: case for case in conversations()}
    files, expected = [], []
    for vector in json.loads((VECTORS / "refused.json").read_text("utf-8"))["cases"]:
        case, sender = cases[vector["case"]], {"bob": "alice", "alice": "bob"}[vector["receiver"]]
        if "hello" in vector:
            data = transcript_of(case, **{sender: vector["hello"]})
        elif not keeps_the_order(case) or (vector["after"], sender) in ((0, "bob"), (1, "alice")):
            continue  # no transcript is like this
        else:
            data = transcript_of(case, vector["after"]) + frame(sender[0].upper(), vector["record"])
        files.append(base64.b64encode(data).decode())
        expected.append((vector["name"], vector["check"], vector["message"]))
    script = "const found = []; for (const file of given[0]) found.push(await readFile(file)); return found;"
    found = show(transcript_of(TALK)).run(script, files)
    different = [
        (name, words, one["refused"])
        for (name, check, words), one in zip(expected, found)
        if words != one["refused"]
        # Which fault of a key is found first does not matter.
        and not (check.startswith("rsa ") and (one["check"] or "").startswith("rsa "))
    ]
    assert different == []
    assert len(expected) > 150


def frames_of(data: bytes) -> list[bytes]:
    """The frames of a transcript file."""
    frames = []
    while data:
        end = 4 + int.from_bytes(data[:4], "big")
        frames.append(data[:end])
        data = data[end:]
    return frames


def damaged(data: bytes, random: Random) -> bytes:
    """A transcript with a byte changed, cut short, or with entries dropped, repeated, swapped."""
    frames, changed = frames_of(data), bytearray(data)
    kind = random.choice(["a bit", "near a beginning", "cut", "entries"])
    if kind == "a bit":
        changed[random.randrange(len(data))] ^= 1 << random.randrange(8)
    elif kind == "near a beginning":
        start = len(b"".join(frames[: random.randrange(len(frames))]))
        changed[start + random.randrange(80)] = random.choice([0, 1, 2, 0x7F, 0x80, 0xFF])
    elif kind == "cut":
        del changed[random.randrange(len(data)) :]
    else:
        one, other = random.sample(range(len(frames)), 2)
        what = random.choice(["drop", "repeat", "swap"])
        if what == "drop":
            del frames[one]
        elif what == "repeat":
            frames.insert(other, frames[one])
        else:
            frames[one], frames[other] = frames[other], frames[one]
        return b"".join(frames)
    return bytes(changed)


@needs_browser
def test_the_program_and_the_page_say_the_same_of_damaged_files(
    show: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file has one p or nearly so: that it is prime is found out once."""
    monkeypatch.setattr(chat, "is_safe_prime", functools.cache(chat.is_safe_prime))
    data = conversation(TEXTS)
    files = [damaged(data, Random(seed)) for seed in range(300)]
    said = [reason(file) for file in files]
    assert len(set(said)) > 15
    assert show(data).run(READ_ALL, [base64.b64encode(file).decode() for file in files]) == said


def reason(data: bytes) -> str | None:
    """Why the program refuses a transcript; None if it does not."""
    try:
        list(chat.verify_transcript(io.BytesIO(data)))
    except chat.ProtocolError as error:
        return str(error)
    return None


@needs_browser
def test_the_program_and_the_page_say_the_same_of_every_record_in_every_state(
    show: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every type, body and reply that is right or wrong, of both senders, at four places."""
    monkeypatch.setattr(chat, "is_safe_prime", functools.cache(chat.is_safe_prime))
    starts = [Writer(), *(begun(TEXTS[:count]) for count in range(3))]
    starts[0].say("alice", READY)
    files = []
    for writer, (sender, other), kind in itertools.product(
        starts, (("alice", "bob"), ("bob", "alice")), (READY, TEXT, CLOSE, 3)
    ):
        names = {writer.latest(who, back) for who in (sender, other) for back in (1, 2, 3)} | {bytes(32)}
        for name in sorted(names):
            files.append(writer.data + writer.record(sender, kind, b"", name))
        for body in (bytes.fromhex(TALK["r"]), b"\xff", b"text"):
            files.append(writer.data + writer.record(sender, kind, body))
    said = [reason(file) for file in files]
    assert None in said
    assert len(set(said)) >= 8
    browser = show(conversation(TEXTS))
    assert browser.run(READ_ALL, [base64.b64encode(file).decode() for file in files]) == said


# ------------------------------------------------------------------------------------- changing the bytes

HELLO_BOB, HELLO_ALICE, Z, READY_ALICE, READY_BOB, FIRST, REPLY = range(7)

CHANGE = """const [place, name, at, value] = given;
    const card = document.getElementById(`frame-${place}`);
    const part = place + '-' + name.replace(/[^A-Za-z0-9_-]/g, '_');
    const row = [...card.querySelectorAll('.field')].find((one) => one.id === part);
    const cells = row.querySelectorAll('.byte');
    cells[at < 0 ? cells.length + at : at].click();
    const input = document.querySelector('.editor input');
    const old = parseInt(input.value, 16);
    input.value = (value < 0 ? old ^ -value : value).toString(16).padStart(2, '0');
    input.dispatchEvent(new Event('input'));"""
FOUND = """const refused = document.querySelector('tr.refused:not(.unreached)');
    return {
        check: refused?.dataset.check ?? null,
        card: refused?.closest('.card').id ?? null,
        story: document.getElementById('story').textContent,
        refusal: refused?.closest('.card').querySelector('.refusal').textContent ?? '',
        verdict: document.getElementById('verdict').textContent,
    };"""


def runs(browser: Browser) -> int:
    return int(browser.run("return state.run"))


def change(browser: Browser, place: int, name: str, at: int, value: int) -> dict[str, Any]:
    """Give a byte another value; a negative one tells which bits to flip. Return what is seen then."""
    before = runs(browser)
    browser.run(CHANGE, place, name, at, value)
    browser.wait(before + 1)
    return dict(browser.run(FOUND))


def press(browser: Browser, selector: str, label: str) -> dict[str, Any]:
    before = runs(browser)
    browser.run(
        "const buttons = [...document.querySelectorAll(given[0])];"
        "buttons.find((one) => one.textContent.startsWith(given[1])).click()",
        selector,
        label,
    )
    browser.wait(before + 1)
    return dict(browser.run(FOUND))


SIGNATURE, TAG = "the record's signature is not valid", "the record's authentication tag is not valid"
ANOTHER = "the record replies to another record than the last one"
CHANGES = [
    # where, which byte, what it becomes; the check, on whose screen, its words, and those of the next one
    (HELLO_BOB, "length", 2, 0xFF, "limit", "Alice", "a frame of 65376 bytes, over the limit of 8192", ""),
    (
        HELLO_BOB,
        "version",
        -1,
        0x32,
        "version",
        "Alice",
        "the other side does not speak secure-chat/1",
        SIGNATURE,
    ),
    (HELLO_BOB, "version", 1, 0xFF, "fields", "Alice", "a field of the hello is cut short", ""),
    (HELLO_BOB, "nonce_B", 5, -1, "signature", "Bob", SIGNATURE, TAG),
    (HELLO_BOB, "p", 2, 0, "integer encoding", "Alice", "p or g is not in its minimal encoding", "p has 204"),
    (HELLO_BOB, "p", -1, -2, "p safe prime", "Alice", "p is not a safe prime", ""),
    (HELLO_BOB, "g", 2, 1, "g subgroup", "Alice", "g does not generate the subgroup of order q", SIGNATURE),
    (HELLO_BOB, "RSA_key", -1, 3, "rsa exponent", "Alice", "public exponent is not 65537", SIGNATURE),
    (HELLO_ALICE, "A", 0, 2, "fields", "Bob", "a field of the hello is cut short", ""),
    (Z, "Z", 7, -128, "signature", "Bob", SIGNATURE, TAG),
    (READY_ALICE, "nonce", -1, 9, "number", "Bob", "record 9 where record 0 should be", ""),
    (FIRST, "length", 3, -1, "cut", "Bob", "the other side did not answer in time", ""),
    (FIRST, "length", 2, 0, "record length", "Bob", "the record has an impossible length", ""),
    (FIRST, "tag", 0, -1, "signature", "Bob", SIGNATURE, TAG),
    (FIRST, "signature", 0, -1, "signature", "Bob", SIGNATURE, ""),
    (REPLY, "ciphertext", 0, -3, "signature", "Alice", SIGNATURE, TAG),
]


@needs_browser
def test_a_reader_changes_a_byte_and_sees_which_check_refuses(show: Any) -> None:
    browser = show(conversation(TEXTS))
    browser.run("document.getElementById('open-all').click()")
    whole = browser.run("return document.getElementById('cards').innerHTML")
    for place, name, at, value, check, who, words, following in CHANGES:
        found = change(browser, place, name, at, value)
        told = "Cut off" if check == "cut" else "Broken off"
        assert found["check"] == check, (place, name, at, found)
        assert f"1 byte changed. ✗ {who}'s screen says “{told}: " in found["story"]
        assert words in found["story"]
        assert words in found["verdict"]
        assert following in found["refusal"].partition("If that check were not there")[2]
        back = press(browser, "#restore", "Put everything back")
        assert back["check"] is None
        assert "checks passed in your browser" in back["verdict"]
        assert back["story"] == ""
    assert browser.run("return document.getElementById('cards').innerHTML") == whole


@needs_browser
def test_one_bit_makes_900_of_100_and_the_riddle_is_solved(show: Any) -> None:
    browser = show(conversation(TEXTS))
    before = runs(browser)
    browser.run(  # the byte of the plaintext: the one that encrypts it is opened
        "document.querySelectorAll('[id=\"5-body\"] .byte')[11].click();"
        "document.querySelector('.bit[aria-label^=\"bit 3,\"]').click();"
    )
    browser.wait(before + 1)
    found = browser.run(FOUND)
    assert found["check"] == "signature"
    assert f"Bob's screen says “Broken off: {SIGNATURE}.” The connection ends" in found["refusal"]
    assert f"Bob's screen would say “Broken off: {TAG}.”" in found["refusal"]
    assert f"Alice's screen would say “Broken off: {ANOTHER}.” about Bob's record 1" in found["refusal"]
    assert found["refusal"].endswith("screen would show:Please pay 900 to Carol.")
    assert browser.run("return document.querySelector('#question-bit .answer').innerText").startswith(
        "✓ Right"
    )


@needs_browser
def test_whole_records_are_dropped_repeated_and_swapped(show: Any) -> None:
    browser = show(conversation(TEXTS))
    browser.run("document.getElementById('open-all').click()")
    found = press(browser, "#frame-5 button", "Drop it")
    assert (found["check"], found["card"]) == ("turn", "frame-5")
    assert "1 record dropped" in found["story"]
    press(browser, "#restore", "Put")
    found = press(browser, "#frame-6 button", "Repeat it")
    assert (found["check"], found["card"]) == ("number", "frame-7")
    assert "Alice's screen says “Broken off: record 1 where record 2 should be: replayed" in found["story"]
    press(browser, "#restore", "Put")
    found = press(browser, "#frame-5 button", "Swap with Alice's next")
    assert (found["check"], found["card"]) == ("number", "frame-5")
    assert "Bob's screen says “Broken off: record 2 where record 1 should be: replayed" in found["story"]
    assert "records swapped" in found["story"]
    press(browser, "#restore", "Put")
    found = press(browser, "#frame-3 button", "Drop it")
    assert chat_order() in found["verdict"]
    press(browser, "#restore", "Put")
    found = press(browser, "#frame-9 button", "Repeat it")
    assert "something follows the goodbye" in found["story"]
    press(browser, "#restore", "Put")
    found = press(browser, "#frame-9 button", "Drop it")
    assert "Nobody refuses it." in found["story"]
    assert browser.run("return document.querySelector('#question-drop .answer').innerText").startswith(
        "✓ Right"
    )


def chat_order() -> str:
    return "a transcript begins with both hellos, Z and both READY"


@needs_browser
def test_the_questions_know_their_answers(show: Any) -> None:
    browser = show(conversation(TEXTS))
    answer = """const [id, value] = given;
        const form = document.querySelector(`#question-${id} form`);
        if (Array.isArray(value)) value.forEach((name) => (form.elements[name].checked = true));
        else form.querySelector('input').value = value;
        form.requestSubmit();
        return document.querySelector(`#question-${id} .answer`).innerText;"""
    for question, wrong, right in (
        ("nonce", "3", "4"),
        ("length", "256", "222"),
        ("forge", ["key"], ["key", "z"]),
    ):
        assert browser.run(answer, question, wrong).startswith("– No")
        assert browser.run(answer, question, right).startswith("✓ Right")


@needs_browser
def test_the_keyboard_alone_is_enough(show: Any) -> None:
    browser = show(conversation(TEXTS))

    def key(name: str, text: str = "") -> None:
        code = {"Tab": 9, "Enter": 13, "End": 35, "ArrowRight": 39, "ArrowDown": 40, "ArrowUp": 38}.get(
            name, 0
        )
        down = {"key": name, "windowsVirtualKeyCode": code, **({"text": text} if text else {})}
        browser.command("Input.dispatchKeyEvent", type="keyDown", **down)
        browser.command("Input.dispatchKeyEvent", type="keyUp", key=name, windowsVirtualKeyCode=code)

    browser.run("document.querySelector('#frame-0 h3 button').focus()")
    key("Tab")
    for name in ("ArrowRight", "ArrowDown", "ArrowDown", "ArrowUp"):
        key(name)
    said = browser.run("return document.querySelector('#frame-0 .pointed').innerText")
    assert re.fullmatch(r"(length of )?version, byte \d+ of \d+: [0-9a-f]{2} = \d+(, “.” in ASCII)?", said)
    before = runs(browser)
    key("Enter", "\r")
    assert browser.run("return document.activeElement.ariaLabel") == "value, two hexadecimal digits"
    browser.run("document.activeElement.select()")
    key("f", "f")
    key("e", "e")
    browser.wait(before + 1)
    assert browser.run("return document.activeElement.value") == "fe"
    assert "1 byte changed" in browser.run(FOUND)["story"]


# ------------------------------------------------------------------------------- commands, texts and sizes

LONG_TEXT = "a line of a long text\n" * 1000


@needs_browser
def test_every_command_that_the_page_offers_prints_what_the_page_shows(show: Any, tmp_path: Path) -> None:
    data = conversation([*TEXTS[:2], LONG_TEXT])
    file = tmp_path / "some file.transcript"
    file.write_bytes(data)
    offered = show(data).run("return allCommands()")
    assert len(offered) == 3 + 3 + 4 + 3 * 6 + 2

    def outcome(one: dict[str, str]) -> str:
        command = re.sub("^python3", shlex.quote(sys.executable), one["command"])
        command = re.sub("FILE$", shlex.quote(str(file)), command)
        return subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=True).stdout

    with ThreadPoolExecutor(2) as pool:
        for one, printed in zip(offered, pool.map(outcome, offered)):
            assert printed == one["prints"] + "\n", one["id"]
    assert sum(one["command"].endswith(" FILE") for one in offered) == 3
    assert all(re.fullmatch('python3 -c "[^"$`\\\\!]*"( FILE)?', one["command"]) for one in offered)


HOSTILE = [
    "</script><script>document.title = 'hacked'</script>",
    "<img src=x onerror=\"document.title = 'hacked'\"><svg onload=alert(1)>",
    "a\u2028b\u2029c\x00d\x1be\x85",
    "\u202eright to left \u2066 and not ended",
    "<!-- <script> ]]> {{7*7}} ${7*7} @DATA@ @SCRIPT@ &lt;b&gt;",
    "w" * 5000,
    "\u0301" * 200 + "Z\u0351\u036b\u0343",
    "\ud7ff\ue000\uffff\U0010ffff\ufeff",
]


@needs_browser
def test_hostile_texts_are_shown_as_text(show: Any) -> None:
    browser = show(conversation(HOSTILE))
    browser.run("document.getElementById('open-all').click()")
    assert browser.run("return document.title") == "A conversation in secure-chat/1, illustrated"
    assert (
        browser.run("return document.querySelectorAll('img, svg, iframe, main script, main style').length")
        == 0
    )
    boxes = browser.run(
        "return [...document.querySelectorAll('.bubble .text')].map((box) => box.textContent)"
    )
    assert boxes[0] == HOSTILE[0]
    assert boxes[1] == HOSTILE[1]
    assert boxes[2] == "aU+2028bU+2029cU+0000dU+001BeU+0085"
    assert boxes[3] == "U+202Eright to left U+2066 and not ended"
    assert boxes[4] == HOSTILE[4]
    assert browser.run("return state.reading.messages.slice(2, -1).map(({ text }) => text)") == HOSTILE


@needs_browser
@pytest.mark.parametrize("width", [360, 390, 1280])
def test_nothing_runs_over_the_edge(show: Any, width: int) -> None:
    browser = show(conversation([*HOSTILE, LONG_TEXT]))
    browser.command(
        "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False
    )
    browser.run("document.getElementById('open-all').click()")
    change(browser, FIRST, "ciphertext", 3, -1)
    over = browser.run("""
        document.querySelectorAll('details').forEach((one) => (one.open = true));
        const lazy = document.querySelectorAll('.card, .bubble');
        lazy.forEach((one) => (one.style.contentVisibility = 'visible'));
        const wide = document.documentElement.clientWidth;
        const names = [...document.querySelectorAll('body *')].filter((one) =>
            one.getBoundingClientRect().right > wide + 1 || one.getBoundingClientRect().left < -1)
            .map((one) => one.outerHTML.slice(0, 200));
        return [document.documentElement.scrollWidth - wide, names.slice(0, 5)];""")
    assert over == [0, []]
    left, right = (
        browser.run("""const cards = ['frame-0', 'frame-1'].map((id) => document.getElementById(id));
        return cards.map((card) => card.getBoundingClientRect().left);""")
    )
    assert (left < right) == (width > 600)  # each on the side of its sender, where there is room


@needs_browser
def test_a_text_of_a_megabyte_is_folded(show: Any) -> None:
    text = "".join(f"{n:07} \n" for n in range(1 << 20))[: 1 << 20]
    browser = show(conversation([text, "short"]))
    found = browser.run(VERDICT)
    assert found["refused"] is None
    assert found["messages"][2]["text"] == text
    assert browser.run("return document.querySelectorAll('*').length") < 10_000
    assert browser.run("return document.body.innerText.length") < 50_000
    change(browser, FIRST, "ciphertext", 20, -1)
    assert browser.run(FOUND)["check"] == "signature"


@needs_browser
def test_three_thousand_messages(show: Any) -> None:
    browser = show(conversation([f"message {n}" for n in range(3000)]))
    found = browser.run(VERDICT)
    assert found["refused"] is None
    assert found["cards"] == 3006
    assert all(same for _, same in found["same"])
    assert browser.run("return document.querySelectorAll('*').length") < 60_000
    assert change(browser, FIRST, "tag", 0, -1)["check"] == "signature"


# -------------------------------------------------------------------------------------- the page and the file


@needs_browser
def test_the_policy_lets_nothing_else_run_and_nothing_be_asked_for(show: Any) -> None:
    browser = show(conversation(TEXTS))
    ran = browser.run("""
        const script = document.createElement('script');
        script.textContent = 'document.title = "hacked"';
        document.body.append(script);
        const bold = '<b style="color: red" onclick="document.title = 1">x</b>';
        document.body.insertAdjacentHTML('beforeend', bold);
        document.body.lastElementChild.click();
        const answer = await fetch('https://127.0.0.1:1/').catch(() => 'refused');
        return [document.title, answer, document.body.lastElementChild.style.color];""")
    assert ran == ["A conversation in secure-chat/1, illustrated", "refused", ""]
    refused = [entry["message"] for entry in browser.log("browser")]
    assert sum("Content Security Policy" in message for message in refused) >= 3


@needs_browser
def test_headings_and_names_are_there_for_a_screen_reader(show: Any) -> None:
    browser = show(conversation(TEXTS))
    levels = browser.run(
        "return [...document.querySelectorAll('h1,h2,h3,h4,h5')].map((h) => Number(h.tagName[1]))"
    )
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:]))
    assert (
        browser.run("""return [...document.querySelectorAll('button, input, a')].filter((one) =>
        !(one.textContent || one.ariaLabel || one.closest('label')) && !one.hidden).length""")
        == 0
    )
    assert browser.run(
        "return new Set([...document.querySelectorAll('[id]')].map((e) => e.id)).size"
    ) == browser.run("return document.querySelectorAll('[id]').length")


@needs_browser
def test_a_file_that_nobody_could_read_is_told_of(show: Any) -> None:
    for data in (b"", b"nothing of the kind", transcript_of(TALK, 1), transcript_of(TALK)[:-1]):
        browser = show(data, verified=False)
        assert "✗ Refused." in browser.run("return document.getElementById('verdict').innerText")


def illustrated(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TESTS / "illustrate.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_program_writes_one_private_file(tmp_path: Path) -> None:
    file = tmp_path / "a.transcript"
    file.write_bytes(conversation(TEXTS))
    done = illustrated(str(file))
    page = tmp_path / "a.transcript.html"
    assert (done.returncode, done.stderr) == (0, "")
    assert str(page) in done.stdout
    assert sorted(tmp_path.iterdir()) == [file, page]
    if os.name == "posix":
        assert page.stat().st_mode & 0o777 == 0o600
    text = page.read_text("utf-8")
    assert "default-src 'none'" in text
    assert not re.search(r"https?://|@[A-Z]+@", text)
    assert illustrated(str(file), "-o", str(tmp_path / "b.html")).returncode == 0
    assert (tmp_path / "b.html").read_text("utf-8") == text


def test_of_a_file_that_is_not_sound_there_is_no_page(tmp_path: Path) -> None:
    file = tmp_path / "a.transcript"
    data = bytearray(conversation(TEXTS))
    data[-1] ^= 1
    file.write_bytes(data)
    done = illustrated(str(file))
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == f"Broken off: {SIGNATURE}.\n"
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_cannot_be_used_is_told_of(tmp_path: Path) -> None:
    missing = illustrated(str(tmp_path / "missing"))
    assert missing.returncode == 1
    assert "No such file" in missing.stderr
    folder = illustrated(str(tmp_path))
    assert folder.returncode == 1
    file = tmp_path / "a.transcript"
    file.write_bytes(conversation(TEXTS))
    nowhere = illustrated(str(file), "-o", str(tmp_path / "no" / "page.html"))
    assert nowhere.returncode == 1
    assert "Traceback" not in missing.stderr + folder.stderr + nowhere.stderr


def functions_of(name: str) -> set[str]:
    """The functions of a file, those of classes with the name of the class before them."""
    found = set()
    for node in ast.parse((ROOT / name).read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def test_the_page_names_functions_that_exist() -> None:
    for check, where in illustrate.WHERE.items():
        name, function = where.split(": ")
        assert function in functions_of(name), f"{check}: {where}; see WHERE in tests/illustrate.py"


def test_every_check_is_described_and_has_a_place() -> None:
    source = "".join((TESTS / "page" / name).read_text("utf-8") for name in illustrate.SCRIPTS)
    made = set(re.findall(r"this\.check\(\s*frame, '([^']+)'", source)) | set(
        re.findall(r"'(rsa [a-zA-Z ]+)'", source)
    )
    described = set(
        re.findall(
            r"^  (?:'([^']+)'|(\w+)): ",
            source.partition("const CHECKS = {")[2].partition("};")[0],
            re.MULTILINE,
        )
    )
    names = {quoted or plain for quoted, plain in described}
    assert made | {"trust"} == names
    assert names | {"handshake bob", "handshake alice"} == set(illustrate.WHERE)
