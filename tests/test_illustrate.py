"""The page that tests/illustrate.py makes, in a real browser: one for all tests, driven by WebDriver's own protocol."""

from __future__ import annotations

import ast
import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import DEADLINE

import illustrate

TESTS = Path(__file__).parent
VECTORS = TESTS / "vectors"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(not (BROWSER and DRIVER), reason="there is no chromium here, or no chromedriver")
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
).split()


class Browser:
    """Chromium, driven over HTTP on this machine."""

    def __init__(self, folder: Path) -> None:
        self._driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert self._driver.stdout
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        said = iter(self._driver.stdout.readline, b"")
        port = next(found[1] for found in (re.search(rb"successfully on port (\d+)", line) for line in said) if found)
        self._url = f"http://127.0.0.1:{int(port)}/session"
        chrome = {"binary": BROWSER, "args": [*OPTIONS, f"--user-data-dir={folder}"]}
        wanted = {"goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        session = self._call("", {"capabilities": {"alwaysMatch": wanted}})
        self._url += f"/{session['sessionId']}"
        self._call("/timeouts", {"script": DEADLINE * 1000})

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
            (async (...given) => {{ {script} }})(...arguments).then(done, (e) => done('failed: ' + e.stack));"""
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
        words = vector["message"]
        if vector["check"] == "own key":
            words = "both sides present the same key: a reflection"
        expected.append((vector["name"], vector["check"], words))
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
