"""What is on disk: the home folder, the identity, the parameters, the pins, and kept conversations.

What is found there is a value, or a FileError that names the file and says what is wrong; the file stays as
it was. Whatever happens while one is written, the old or the new content is there, whole.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import random
import re
import shutil
import stat
import subprocess
import sys
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Callable

import pytest
from conftest import (
    DEADLINE,
    GROUP,
    ROOT,
    Background,
    Keys,
    Program,
    Start,
    StartBob,
    exhaustive,
    fails,
    patched,
    store_with_group,
)
from Crypto.IO import PEM, PKCS8
from Crypto.PublicKey import ECC
from Crypto.PublicKey.RSA import generate
from Crypto.Util.asn1 import DerNull, DerSequence

import crypto_utils as chat
from crypto_utils import (
    FileError,
    Group,
    KeyStore,
    PinnedPeer,
    Role,
    RsaKey,
    Transcript,
    Trust,
    TrustError,
    fingerprint,
    ssh_line,
)

Use = Callable[[KeyStore, Keys], object]

BOB, CAROL = "[bob.example]:65432", "[carol.example]:65432"
FILES: dict[str, tuple[Use, Use]] = {  # name: what reads it, and what writes it
    "identity.pem": (lambda store, _: store.load_identity(never), lambda store, _: store.make_identity()),
    "dh_parameters.pem": (lambda store, _: store.load_group(), lambda store, _: store.accept_group(GROUP)),
    "known_peers": (
        lambda store, keys: PinnedPeer(store, BOB).check(keys.bob),
        lambda store, keys: PinnedPeer(store, BOB).pin(keys.bob),
    ),
}
SCRIPTS = {Role.BOB: ("bob_server.py", "--port", "0"), Role.ALICE: ("alice_client.py", "127.0.0.1:1")}
posix = pytest.mark.skipif(os.name != "posix", reason="owners, modes and FIFOs are POSIX's")
root = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give files away")
alice_mostly = pytest.mark.parametrize("role", [Role.ALICE, *exhaustive(Role.BOB)])


def needs(tool: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} is not installed")


def run(*words: object) -> str:
    command = [str(word) for word in words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=DEADLINE).stdout


def never(prompt: str) -> str:
    pytest.fail(f"asked without a need: {prompt}")


def pem_of(key: RsaKey) -> bytes:
    return key.export_key("PEM", pkcs=8) + b"\n"


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def refusal(path: Path, reason: str) -> AbstractContextManager[object]:
    """The claim that what follows raises a FileError that names the path and matches the reason."""
    return pytest.raises(FileError, match=f"{re.escape(str(path))}(?s:.)*(?:{reason})")


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    (tmp_path / "home" / "alice").mkdir(mode=0o700, parents=True)
    return KeyStore(tmp_path / "home" / "alice")


@pytest.fixture
def known(store: KeyStore) -> Path:
    return store.folder / "known_peers"


@pytest.fixture
def refuses(store: KeyStore, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Return a check that neither reading nor writing gets past what stands there, and that it stays."""
    monkeypatch.setattr(chat.RSA, "generate", lambda *_, **__: keys.bob)

    def check(name: str, reason: str) -> None:
        path = store.folder / name
        before, content = os.lstat(path), path.read_bytes() if path.is_file() else b""
        for use in FILES[name]:
            with refusal(path, reason):
                use(store, keys)
        assert os.lstat(path)[:-3] == before[:-3], "something but the times has changed"
        assert content == (path.read_bytes() if path.is_file() else b"")
        assert not list(store.folder.glob(f".{name}.*")), "a temporary file is left"

    return check


# ------------------------------------------------------------------------------------------ the folder

WAY_OUT = "name a folder on another disk with --home$"


@posix
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077], ids=oct)
def test_home_is_private_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    folder = tmp_path / "a" / "b" / "home" / "alice"
    before = os.umask(umask)
    try:
        KeyStore(folder).write("file", lambda: b"")
    finally:
        os.umask(before)
    assert (mode_of(folder.parent), mode_of(folder), mode_of(folder / "file")) == (0o700, 0o700, 0o600)
    KeyStore(folder).write("file", lambda: b"")  # a second time is no mistake


@posix
@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777], ids=oct)
def test_home_is_refused_when_others_can_write_to_it(tmp_path: Path, mode: int) -> None:
    """The command that helps stands on a row of its own; who may write above the home is not looked at."""
    tmp_path.chmod(0o777)
    folder = tmp_path / "my home"
    folder.mkdir()
    folder.chmod(mode)
    with refusal(
        folder, re.escape(f", mode 0{mode:o}); run:\n  chmod go-rwx '{folder}'\n") + "If that .*--home.$"
    ):
        KeyStore(folder).read("file")
    assert mode_of(folder) == mode
    assert not list(folder.iterdir())
    folder.chmod(mode & ~0o077)
    assert KeyStore(folder).read("file") is None


@pytest.mark.parametrize("error", [FileExistsError, FileNotFoundError])
def test_on_windows_what_no_waiting_can_change_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    tries = []

    def act() -> None:
        tries.append("a try")
        raise error

    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(error):
        chat._insist(act)
    assert len(tries) == 1


@posix
@pytest.mark.parametrize("link", [False, True], ids=["a file", "a link"])
def test_what_a_program_that_was_killed_has_left_is_not_used(store: KeyStore, link: bool) -> None:
    left, elsewhere = store.folder / ".file.new", store.folder / "elsewhere"
    elsewhere.touch(0o644)
    left.symlink_to(elsewhere) if link else left.touch(0o644)
    store.write("file", lambda: b"data")
    assert (store.read("file"), mode_of(store.folder / "file")) == (b"data", 0o600)
    assert (left.exists(), elsewhere.read_bytes()) == (False, b"")


@root
def test_home_of_another_user_is_refused(store: KeyStore) -> None:
    os.chown(store.folder, 1, 1)
    with refusal(store.folder, r"must be yours alone, and is not \(owner 1, mode 0700\)"):
        store.read("file")


@posix
@pytest.mark.parametrize("where", ["lock", "close"])
def test_a_disk_without_locks_or_room_for_one_is_told_with_the_way_out(
    store: KeyStore, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    class ClosesBadly(io.FileIO):
        def close(self) -> None:
            if not self.closed:
                super().close()
                raise OSError(errno.EDQUOT, "Disk quota exceeded")

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if where == "lock":
        monkeypatch.setattr(chat.fcntl, "flock", no_locks)
    else:
        monkeypatch.setattr(chat, "open", ClosesBadly, raising=False)
    with refusal(store.folder / "file", f"(No locks available|Disk quota exceeded); {WAY_OUT}"):
        store.write("file", lambda: None)


def test_a_home_that_nobody_has_is_a_mistake_in_usage(start: Start) -> None:
    homeless = patched(
        "import os, pwd",
        "def nobody(_): raise KeyError",
        "pwd.getpwuid = nobody; os.environ.pop('HOME')",
    )
    client = start("alice_client.py", "127.0.0.1", python=homeless, SECURE_CHAT_HOME="")
    fails(client, 2, "error: argument --home: cannot tell which folder ~/.secure-chat is; give its full path")


# ------------------------------------------------------------------ what may stand in the place of a file


def a_file(mode: int = 0o600, size: int = 1, owner: int = -1) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.touch()
        os.truncate(path, size)
        os.chown(path, owner, -1)
        path.chmod(mode)

    return make


def a_link(path: Path) -> None:
    path.with_name("elsewhere").write_bytes(b"theirs")
    path.symlink_to("elsewhere")


IN_THE_WAY: dict[str, tuple[Callable[[Path], object], str]] = {
    "link": (a_link, ": it is a symbolic link"),
    "dangling": (lambda path: path.symlink_to("nothing"), ": it is a symbolic link"),
    "directory": (Path.mkdir, ": Is a directory"),
    "fifo": (lambda path: os.mkfifo(path, 0o600), "is not a regular file; move it"),
    "huge": (a_file(size=chat.FILE_LIMIT + 1), "is larger than 1048576 bytes; move it"),
    "group_writes": (a_file(0o620), r"must be yours alone, .*, mode 0620\); run:\n  chmod go-rwx"),
    "all_write": (a_file(0o602), r"must be yours alone, .*, mode 0602\); run:\n  chmod go-rwx"),
    "stranger": (a_file(owner=1), r"must be yours alone, and is not \(owner 1, "),
}


@posix
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("what", [pytest.param(x, marks=root if x == "stranger" else ()) for x in IN_THE_WAY])
def test_what_is_no_file_of_ones_own_is_refused(
    store: KeyStore, refuses: Callable[..., None], name: str, what: str
) -> None:
    make, reason = IN_THE_WAY[what]
    make(store.folder / name)
    refuses(name, reason)
    assert what != "link" or (store.folder / "elsewhere").read_bytes() == b"theirs"


@posix
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604], ids=oct)
def test_only_the_identity_must_not_be_readable(
    store: KeyStore, refuses: Callable[..., None], mode: int
) -> None:
    store.write(KeyStore.GROUP, GROUP.export)
    (store.folder / "dh_parameters.pem").chmod(mode)
    assert store.load_group() == GROUP
    a_file(mode)(store.folder / "identity.pem")
    refuses("identity.pem", rf"must be yours alone, .*, mode 0{mode:o}\)")


# ----------------------------------------------------------------------------------------- the identity


@needs("openssl")
@needs("ssh-keygen")
def test_identity_is_made_once_and_other_tools_read_it(
    store: KeyStore, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ready(bits: int, e: int) -> RsaKey:
        assert (bits, e) == (3072, 65537)
        return keys.alice

    monkeypatch.setattr(chat.RSA, "generate", ready)
    key = store.make_identity()
    path = store.folder / "identity.pem"
    assert path.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----\n")
    assert store.load_identity(never) == store.make_identity() == key
    assert (key.size_in_bits(), key.e) == (2048, 65537)
    assert {file.name for file in path.parent.iterdir()} == {".lock", "identity.pem"}
    assert "Key is valid" in run("openssl", "pkey", "-in", path, "-noout", "-check")
    assert run("ssh-keygen", "-lf", path).split()[:2] == [str(key.size_in_bits()), fingerprint(key)]
    assert run("ssh-keygen", "-yf", path).split()[:2] == ssh_line(key).split()


def flip(data: bytes, at: int) -> bytes:
    """Return PEM with one base64 character of its body (or the one after a line's end) changed."""
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    at += data.index(b"\n") + 1
    at += data[at] == ord("\n")
    return data[:at] + bytes([alphabet[alphabet.index(data[at]) ^ 32]]) + data[at + 1 :]


def zero_q(key: RsaKey) -> bytes:
    """Return a well-formed private key whose second prime is 0."""
    der = DerSequence([0, key.n, key.e, key.d, key.p, 0, 1, 1, 1]).encode()
    return PEM.encode(PKCS8.wrap(der, chat.RSA.oid, key_params=DerNull()), "PRIVATE KEY").encode()


UNUSABLE = (
    r"is not supported: no RSA key .* that can be read, or not whole\. Keep a copy\. .*:\n"
    r"  puttygen KEY\.ppk -O private-openssh -o identity\.pem\n  ssh-keygen -p -m PKCS8 -f .*$"
)
BAD_IDENTITIES: dict[str, Callable[[RsaKey], bytes]] = {
    "empty": lambda _: b"",
    "garbage": lambda _: b"not a key\n",
    "not_ascii": lambda key: pem_of(key).replace(b"A", b"\xc3\xa4"),
    **{f"cut_at_{n}": (lambda key, n=n: pem_of(key)[:n]) for n in (1, 28, 900, -2, -27)},
    **{f"flipped_at_{n}": (lambda key, n=n: flip(pem_of(key), n)) for n in (0, 50, 400, 800)},
    "no_prime": zero_q,
    "elliptic": lambda _: ECC.generate(curve="P-256").export_key(format="PEM").encode(),
    "ed25519": lambda _: ECC.generate(curve="Ed25519").export_key(format="PEM").encode(),
    "x25519": lambda _: ECC.generate(curve="Curve25519").export_key(format="PEM").encode(),
    "putty": lambda _: b"PuTTY-User-Key-File-3: ssh-rsa\nEncryption: none\n",
    "public": lambda key: key.public_key().export_key("PEM"),
    "1024_bits": lambda _: pem_of(generate(1024)),
    "exponent_3": lambda _: pem_of(generate(2048, e=3)),
}


@pytest.mark.parametrize("bad", BAD_IDENTITIES)
def test_bad_identity_is_refused_and_kept(
    store: KeyStore, refuses: Callable[..., None], keys: Keys, bad: str
) -> None:
    store.write("identity.pem", lambda: BAD_IDENTITIES[bad](keys.bob))
    refuses("identity.pem", UNUSABLE)


# ------------------------------------------------------------------------------ keys made by other tools

SECRET = "gr\u00fcn \u20ac"
CERTIFICATE = b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
AROUND: dict[str, Callable[[bytes], bytes]] = {
    "a comment before": lambda pem: b"# made in May\n" + pem,
    "attributes before": lambda pem: (
        b"Bag Attributes\n    friendlyName: bob\nKey Attributes: <No ...>\n" + pem
    ),
    "a blank line before": lambda pem: b"\n" + pem,
    "a byte order mark": lambda pem: b"\xef\xbb\xbf" + pem,
    "a certificate before": lambda pem: CERTIFICATE + pem,
    "a certificate after": lambda pem: pem + CERTIFICATE,
    "lines of Windows": lambda pem: pem.replace(b"\n", b"\r\n"),
}


@pytest.mark.parametrize("what", AROUND)
def test_what_stands_around_a_key_is_passed_over(store: KeyStore, keys: Keys, what: str) -> None:
    """As RFC 7468, section 2, has it, and as OpenSSL and OpenSSH do."""
    for pem in (pem_of(keys.bob), keys.bob.export_key("PEM")):  # PKCS#8, PKCS#1
        store.write("identity.pem", functools.partial(AROUND[what], pem))
        assert store.load_identity(never) == keys.bob


def by_openssl(*command: str) -> Callable[[Path], object]:
    """Return what replaces a key file by what OpenSSL makes of it, with the passphrase in the environment."""

    def make(path: Path) -> None:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("SECRET", SECRET)
            made = run("openssl", *command, "-in", path, "-passout", "env:SECRET")
        path.write_text(made)

    return make


def by_ssh_keygen(cipher: str, secret: str = SECRET) -> Callable[[Path], object]:
    return lambda path: run("ssh-keygen", "-qp", "-P", "", "-N", secret, "-Z", cipher, "-f", path)


PKCS8_BY = ("pkcs8", "-topk8")
READ: dict[str, Callable[[Path], object]] = {
    "openssl, AES": by_openssl(*PKCS8_BY, "-v2", "aes256"),
    "openssl, 3DES": by_openssl(*PKCS8_BY, "-v2", "des3"),
    "openssl, traditional": by_openssl("rsa", "-aes256", "-traditional"),
    "ssh-keygen": by_ssh_keygen("aes256-ctr"),
}
CONVERTED: dict[str, Callable[[Path], object]] = {
    "openssl, Camellia": by_openssl(*PKCS8_BY, "-v2", "camellia-256-cbc"),
    "openssl, ARIA": by_openssl(*PKCS8_BY, "-v2", "aria-256-cbc"),
    "openssl, PBES1": by_openssl(*PKCS8_BY, "-v1", "PBE-SHA1-3DES"),
    "openssl, traditional Camellia": by_openssl("rsa", "-camellia256", "-traditional"),
    "ssh-keygen, AES-GCM": by_ssh_keygen("aes256-gcm@openssh.com"),
    "ssh-keygen, ChaCha20": by_ssh_keygen("chacha20-poly1305@openssh.com"),
}


def made_by(make: Callable[[Path], object], store: KeyStore, key: RsaKey) -> Path:
    """Keep a key as another tool writes it; return its path."""
    store.write("identity.pem", lambda: pem_of(key))
    path = store.folder / "identity.pem"
    try:
        make(path)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this one cannot make such a key: {error.stderr}")
    path.chmod(0o600)
    return path


@needs("openssl")
@needs("ssh-keygen")
@pytest.mark.parametrize("what", READ)
def test_the_passphrase_of_another_tools_key_may_be_typed_three_times(
    store: KeyStore, keys: Keys, what: str
) -> None:
    path = made_by(READ[what], store, keys.bob)
    before = path.read_bytes()
    asked: list[str] = []
    answers = iter(["another", "\udcff", SECRET, "a", "b", "", "a fourth", "a fifth"])
    question = f"Passphrase of {path}: "
    questions = [question, f"That was not it. {question}", f"That was not it. {question}"]

    def ask(prompt: str) -> str:
        asked.append(prompt)
        return next(answers)

    assert store.load_identity(ask) == keys.bob
    assert asked == questions
    asked.clear()
    with pytest.raises(FileError, match=f"^that is not the passphrase of {re.escape(str(path))}$"):
        store.load_identity(ask)
    assert asked == questions
    assert path.read_bytes() == before


@needs("openssl")
@needs("ssh-keygen")
@pytest.mark.parametrize("what", CONVERTED)
def test_what_cannot_be_read_is_called_that_and_the_advice_helps(
    store: KeyStore, keys: Keys, what: str
) -> None:
    """ "Damaged, move it away" would throw away a key that others have pinned."""
    path = made_by(CONVERTED[what], store, keys.bob)
    with refusal(path, UNUSABLE) as refused:
        store.load_identity(lambda _: SECRET)
    assert "move it away" not in str(refused.value)
    advice = str(refused.value).rpartition("\n  ")[2]
    assert advice == f"ssh-keygen -p -m PKCS8 -f {path}"
    run(*advice.split(), "-P", SECRET, "-N", "")
    assert store.load_identity(never) == keys.bob


@pytest.mark.parametrize("terminal", [True, False])
def test_a_passphrase_is_typed_at_a_terminal_alone_and_not_shown(
    start: Start, homes: Path, keys: Keys, terminal: bool
) -> None:
    """Standard input holds messages, and its first line may be the passphrase by chance: it is not used."""
    pem = keys.alice.export_key("PEM", pkcs=8, passphrase=b"correct horse")
    KeyStore(homes / "alice").write("identity.pem", lambda: pem)
    client = start("alice_client.py", "127.0.0.1:1", terminal=terminal)
    if not terminal:
        client.write("correct horse\n")
        fails(client, 1, "^Stopped: your key has a passphrase, which can only be typed at a terminal")
        return
    for typed in ("wrong horse", "correct horse"):
        client.expect("Passphrase of .*: ")
        client.write(f"{typed}\n")
    client.expect("The fingerprint of your key is\r\n  SHA256:")
    client.wait()
    assert "horse" not in client.stdout


# --------------------------------------------------------------------------------- two programs at once


def test_programs_started_at_once_end_with_one_identity(
    tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates, all_ready = iter(keys), threading.Barrier(len(keys))

    def generate(*_: object, **__: object) -> RsaKey:
        key = next(candidates)
        all_ready.wait(DEADLINE)
        return key

    monkeypatch.setattr(chat.RSA, "generate", generate)
    racers = [Background(KeyStore(tmp_path / "home").make_identity) for _ in keys]
    made = [racer.result() for racer in racers]
    assert made == [KeyStore(tmp_path / "home").load_identity(never)] * len(keys)


def test_no_pin_is_lost_when_many_are_made_at_once(tmp_path: Path, known: Path, keys: Keys) -> None:
    all_ready = threading.Barrier(4)

    def pin(who: int) -> None:
        store = KeyStore(known.parent)
        all_ready.wait(DEADLINE)
        for number in range(6):
            PinnedPeer(store, f"[{who}]:{number}").pin(keys.bob)

    for racer in [Background(lambda who=who: pin(who)) for who in range(4)]:
        racer.result()
    expected = (f"[{who}]:{n} {ssh_line(keys.bob)}" for who in range(4) for n in range(6))
    assert sorted(known.read_text().splitlines()) == list(expected)


# ------------------------------------------------------------------------------- old or new, but whole


class HalfWritten(io.FileIO):
    """A file that takes a part of what it is given, and then fails."""

    error: BaseException | None = None

    def write(self, data: bytes) -> int:  # a buffer of any kind
        if self.error is None:
            return super().write(data)
        super().write(bytes(data)[:3])
        raise self.error


FULL = OSError(errno.ENOSPC, "No space left on device")
failing = pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["full", "ctrl_c"])


def failure(error: BaseException, path: Path) -> AbstractContextManager[object]:
    if not isinstance(error, OSError):
        return pytest.raises(KeyboardInterrupt)
    return pytest.raises(
        FileError, match=f"^{re.escape(f'cannot write {path}: {error.strerror}')}($|; name )"
    )


@pytest.mark.parametrize("old", [b"the old content", None])
@pytest.mark.parametrize("step", ["open", "write", "fsync", "replace"])
@failing
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    store: KeyStore, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException, old: bytes | None
) -> None:
    def fail(*_: object, **__: object) -> object:
        raise error

    def half_written(path: Path, _: str, opener: Callable[[str, int], int]) -> HalfWritten:
        file = HalfWritten(path, "a", opener=opener)
        file.error = error
        return file

    if old is not None:
        store.write("file", lambda: old)
    with monkeypatch.context() as broken:
        if step in ("open", "write"):
            broken.setattr(chat, "open", half_written if step == "write" else fail, raising=False)
        else:
            broken.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), fail)
        with failure(error, store.folder / "file"):
            store.write("file", lambda: b"the new content")
    left = {file.name for file in store.folder.iterdir()} - {".lock"}
    assert left == ({"file"} if old is not None else set())
    assert store.read("file") == old


@failing
def test_a_transcript_that_cannot_go_on_ends_with_its_last_whole_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(io, "FileIO", HalfWritten)
    kept = Transcript(tmp_path)
    kept.add(b"b", b"the beginning")
    kept.begin(Role.BOB)
    kept.add(b"A", b"a record")
    whole = kept.path.read_bytes()
    kept._file.error = error
    with failure(error, kept.path):
        kept.add(b"B", b"another record")
    assert kept.path.read_bytes() == whole
    kept._file.error = None
    kept.add(b"B", b"it goes on")
    kept._file.close()
    assert kept.path.read_bytes() == whole + chat.frame(b"Bit goes on")


@posix
def test_a_write_is_on_the_disk_before_it_takes_the_old_ones_place(
    store: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[object] = []
    replace = Path.replace

    def fsync(descriptor: int) -> None:
        info = os.fstat(descriptor)
        steps.append("folder" if stat.S_ISDIR(info.st_mode) else info.st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", lambda *paths: steps.append("replace") or replace(*paths))
    store.write("file", lambda: b"content")
    assert steps == [len(b"content"), "replace"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_crash_at_any_moment_leaves_the_old_file_or_the_new(store: KeyStore) -> None:
    code = """
import os, sys, pathlib
import crypto_utils as chat
store, status, calls = chat.KeyStore(pathlib.Path(sys.argv[1])), 1, 0
while status:
    store.write("file", lambda: b"old" * 10_000)
    child = os.fork()
    if not child:
        left = calls
        def die_at_the_nth_call_of_c(frame, event, function):
            global left
            left -= event == "c_call"
            if left < 0:
                os._exit(1)
        sys.setprofile(die_at_the_nth_call_of_c)
        store.write("file", lambda: b"new" * 10_000)
        sys.setprofile(None)
        os._exit(0)
    status, calls = os.waitpid(child, 0)[1], calls + 1
    content = store.read("file")
    assert content in (b"old" * 10_000, b"new" * 10_000)
    print(content[:3].decode(), end=" ")
"""
    said = run("env", f"PYTHONPATH={ROOT}", sys.executable, "-c", code, store.folder).strip()
    assert re.fullmatch("(old ){10,}(new ?){4,}", said), "old before it is replaced, new ever after"
    assert not list(store.folder.glob(".file.*")), "what a dead program left went with the next write"


# --------------------------------------------------------------------------------------- the parameters


def dh_pem(*numbers: int, marker: str = "DH PARAMETERS") -> bytes:
    return PEM.encode(DerSequence(numbers).encode(), marker).encode()


FOREIGN = {
    "as openssl dhparam writes it": dh_pem(GROUP.p, 2),
    "text around it": b"    DH Parameters: (2048 bit)\n" + dh_pem(GROUP.p, 2) + CERTIFICATE,
    "with the length of an exponent": dh_pem(GROUP.p, 2, 225),
    "a generator of all": dh_pem(GROUP.p, GROUP.p - 2),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_parameters_that_openssl_wrote(store: KeyStore, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """They are tested in full, and then remembered. A g may be no square mod p; 4 is one for any p."""
    store.write("dh_parameters.pem", lambda: FOREIGN[what])
    rounds: list[int] = []
    monkeypatch.setattr(chat, "miller_rabin_test", lambda _, count: rounds.append(count) or True)
    for _ in range(2):
        assert store.load_group() == Group(GROUP.p, 4)
    assert rounds == [64, 0]
    assert store.read("dh_parameters.pem") == Group(GROUP.p, 4).export()


PARAMETERS = dh_pem(GROUP.p, GROUP.g)
BAD_GROUPS: dict[str, tuple[bytes, str]] = {
    "garbage": (b"\x00\xff" * 99, "these are not DH PARAMETERS"),
    "even_p": (dh_pem(GROUP.p - 1, GROUP.g), "p is even"),
    "zero": (dh_pem(0, 0), "p has 0 bits, not 2048 to 4096"),
    "small": (dh_pem(2**1023 + 9, 2), "p has 1024 bits, not 2048 to 4096"),
    "bad_generator": (chat.TESTED + dh_pem(GROUP.p, GROUP.p - 1) + b"\n", "g does not generate the subgroup"),
    # One character changed, and p is a prime again of which 2 is a square; but (p - 1) / 2 is none.
    "no_safe_prime": (PARAMETERS[:67] + b"5" + PARAMETERS[68:], "p is not a safe prime"),
    # Of a file of ours, which has passed once, but for the last two of its 358 characters: they may make
    # g another generator, or change nothing at all.
    **{f"flipped_at_{n}": (chat.TESTED + flip(PARAMETERS, n) + b"\n", "") for n in range(0, 360, 36)},
}


@pytest.mark.parametrize("bad", BAD_GROUPS)
def test_bad_parameters_are_refused_and_kept(store: KeyStore, bad: str) -> None:
    content, reason = BAD_GROUPS[bad]
    store.write("dh_parameters.pem", lambda: content)
    path = store.folder / "dh_parameters.pem"
    with refusal(path, rf"holds no usable Diffie-Hellman parameters \(({reason}).*\); move it away$"):
        store.load_group()
    assert store.read("dh_parameters.pem") == content


# ---------------------------------------------------------------------------------------------- the pins


def pin_of(name: str, key: RsaKey) -> str:
    return f"{name} {ssh_line(key)}\n"


def bob(store: KeyStore, only: RsaKey | None = None) -> PinnedPeer:
    return PinnedPeer(store, BOB, only and fingerprint(only))


def test_a_key_is_new_until_it_is_pinned(store: KeyStore, keys: Keys, known: Path) -> None:
    peer = bob(store)
    assert peer.check(keys.bob) == peer.check(keys.bob) == Trust(known=False, settled=False)
    assert not known.exists(), "checking pins nothing"
    peer.pin(keys.bob)
    before = known.stat().st_ino
    assert peer.check(keys.bob) == Trust(known=True, settled=True)
    peer.pin(keys.bob)
    assert known.stat().st_ino == before, "written without a need"
    assert known.read_text() == pin_of(BOB, keys.bob)


def test_what_is_known_under_other_names_is_told(store: KeyStore, keys: Keys, known: Path) -> None:
    known.write_text(pin_of(CAROL, keys.bob) + pin_of("[dave]:1", keys.alice) + pin_of(BOB[:-1], keys.bob))
    assert bob(store).check(keys.bob) == Trust(False, False, (CAROL, BOB[:-1]))


def test_another_key_is_refused_and_nothing_is_changed(store: KeyStore, keys: Keys, known: Path) -> None:
    before = "# friends\n\n" + pin_of(CAROL, keys.alice) + pin_of(BOB, keys.bob)
    known.write_text(before)
    for use in (bob(store).check, bob(store).pin):
        with pytest.raises(TrustError) as refused:
            use(keys.mallory)
        assert refused.value.presented == fingerprint(keys.mallory)
        assert refused.value.expected == ((fingerprint(keys.bob), f"{known}, line 4"),)
    assert known.read_text() == before


def test_each_of_several_pinned_keys_is_accepted(store: KeyStore, keys: Keys, known: Path) -> None:
    known.write_text(pin_of(BOB, keys.bob) + pin_of(BOB, keys.alice))
    for key in (keys.bob, keys.alice):
        bob(store).pin(key)
    assert known.read_text() == pin_of(BOB, keys.bob) + pin_of(BOB, keys.alice)
    with pytest.raises(TrustError) as refused:
        bob(store).check(keys.mallory)
    assert [right for right, _ in refused.value.expected] == [fingerprint(keys.bob), fingerprint(keys.alice)]


def test_a_key_pinned_by_another_program_after_the_check_is_found(
    store: KeyStore, keys: Keys, known: Path
) -> None:
    peer = bob(store)
    peer.check(keys.mallory)
    known.write_text(pin_of(BOB, keys.bob))
    with pytest.raises(TrustError):
        peer.pin(keys.mallory)
    assert known.read_text() == pin_of(BOB, keys.bob)


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize(
    "comment", ["# \u00e4", "  # indented", "# one\x0b\x0c\x1c\x85\u2028line", "# \udce4"]
)
def test_what_others_wrote_survives_byte_for_byte(
    store: KeyStore, keys: Keys, known: Path, end: str, comment: str
) -> None:
    lines = [comment, "", " \t", f"  {CAROL}\t{ssh_line(keys.alice)}  a comment", pin_of(BOB[:-1], keys.bob)]
    before = "".join(line.rstrip("\n") + end for line in lines).encode(errors="surrogateescape")
    for written in (before, before[: -len(end)]):  # a last line without an end gets one
        known.write_bytes(written)
        bob(store).pin(keys.bob)
        kept, _, added = known.read_bytes().rpartition(b"\n" + BOB.encode() + b" ")
        assert kept + b"\n" in (before, written + b"\n")
        assert added == ssh_line(keys.bob).encode() + b"\n"


@pytest.mark.parametrize("name", ["ALICE", "Alice"])
def test_names_are_compared_without_case(store: KeyStore, keys: Keys, known: Path, name: str) -> None:
    known.write_text(pin_of(name, keys.alice), encoding="utf-8-sig")  # nor does its mark hide a pin
    assert PinnedPeer(store, "alice").check(keys.alice).known
    with pytest.raises(TrustError):
        PinnedPeer(store, "alice").check(keys.mallory)
    known.write_text(pin_of(f"[{name}.Example]:1", keys.alice))
    assert PinnedPeer(store, "[alice.example]:1").check(keys.alice).known


def test_the_key_asked_for_takes_the_place_of_the_old_ones(store: KeyStore, keys: Keys, known: Path) -> None:
    carol = pin_of(CAROL, keys.bob)
    known.write_text(f"# a\n{pin_of(BOB, keys.bob)}{carol}{pin_of(BOB.upper(), keys.mallory)}\n")
    assert bob(store, only=keys.alice).check(keys.alice) == Trust(known=False, settled=True)
    bob(store, only=keys.alice).pin(keys.alice)
    assert known.read_text() == f"# a\n{carol}\n{pin_of(BOB, keys.alice)}"
    assert bob(store, only=keys.alice).check(keys.alice) == Trust(known=True, settled=True)
    assert bob(store).check(keys.alice).known


@pytest.mark.parametrize("pinned", [True, False])
def test_any_key_but_the_one_asked_for_is_refused(
    store: KeyStore, keys: Keys, known: Path, pinned: bool
) -> None:
    before = pin_of(BOB, keys.bob) if pinned else ""
    known.write_text(before)
    for use in (bob(store, only=keys.alice).check, bob(store, only=keys.alice).pin):
        with pytest.raises(TrustError, match="asked for") as refused:
            use(keys.bob)
        assert refused.value.presented == fingerprint(keys.bob)
        assert refused.value.expected == ((fingerprint(keys.alice), "asked for"),)
    assert known.read_text() == before


def test_the_whole_fingerprint_is_compared(store: KeyStore, keys: Keys) -> None:
    asked_for = fingerprint(keys.bob)
    assert PinnedPeer(store, BOB, asked_for).check(keys.bob).settled
    for at in range(len("SHA256:"), len(asked_for)):
        other = "A" if asked_for[at] != "A" else "B"
        with pytest.raises(TrustError, match="asked for"):
            PinnedPeer(store, BOB, asked_for[:at] + other + asked_for[at + 1 :]).check(keys.bob)


BAD_KEYS: dict[str, Callable[[str], str]] = {
    "another_type": lambda line: line.replace("ssh-rsa", "ssh-dss"),
    "ecdsa": lambda _: f"{BOB} {ECC.generate(curve='P-256').public_key().export_key(format='OpenSSH')}",
    "no_key": lambda line: line.rsplit(" ", 1)[0],
    "no_name": lambda line: line.split(" ", 1)[1],
    "name_alone": lambda _: BOB,
    "marker": lambda line: "@revoked " + line,
    "no_base64": lambda line: line[:-1],
    "cut": lambda line: line[:-8],
    "a_character_too_many": lambda line: line[:80] + "!" + line[80:],
    "zeros": lambda _: f"{BOB} ssh-rsa " + "AAAA" * 90,
    "der": lambda _: f"{BOB} 0\x7f\x01",
}
BAD_NAMES = {
    BOB: [
        *("bob", "alice", "*", "bob.example", "bob.example:65432", "[bob.example]", "[bob.example]:"),
        *("[*]:65432", "[bob.?xample]:65432", "[a,b]:65432", f"{BOB},{CAROL}", "[bob.example]:654321"),
        *("[bob.example]:065432", "[bob.example]:0443", "[]:65432", f"!{BOB}"),
        "|1|F1E1KeoE/eEWhi10WpGv4OdiO6Y=|3988QV0VE8wmZL7suNrYQLITLCg=",
    ],
    "alice": ["alice,bob", "*", "bob", BOB, "alice:1", "alic\u0435", '"alice"', "alice."],
}


@pytest.mark.parametrize("only", [True, False], ids=["asked_for", "any"])
@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *((BOB, change) for change in BAD_KEYS),
        *((name, bad) for name, all_bad in BAD_NAMES.items() for bad in all_bad),
    ],
)
def test_a_line_that_is_not_understood_is_refused_by_its_number(
    store: KeyStore, keys: Keys, known: Path, name: str, bad: str, only: bool
) -> None:
    """A pin that matches nothing would be passed over, and the next stranger trusted."""
    change = BAD_KEYS.get(bad, lambda line: line.replace(BOB, bad))
    good = pin_of(CAROL if name == BOB else name, keys.alice)
    before = f"# friends\n{good}{change(pin_of(BOB, keys.bob).rstrip())}\n"
    known.write_text(before, encoding="utf-8")
    peer = PinnedPeer(store, name, fingerprint(keys.alice) if only else None)
    for use in (peer.check, peer.pin):
        with refusal(known, ", line 3: not .* ssh-rsa BASE64; mend or delete the line"):
            use(keys.alice)
    assert known.read_text(encoding="utf-8") == before


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_known_peers_that_is_not_utf_8_is_refused(
    store: KeyStore, keys: Keys, refuses: Callable[..., None], encoding: str
) -> None:
    """No name of another encoding is the one that is typed."""
    store.write("known_peers", lambda: pin_of("[caf\xe9.example]:1", keys.alice).encode(encoding))
    refuses("known_peers", ", line 1: not .* ssh-rsa BASE64")


@needs("ssh-keygen")
@pytest.mark.parametrize("name", ["alice", BOB])
def test_ssh_keygen_reads_known_peers(store: KeyStore, keys: Keys, known: Path, name: str) -> None:
    PinnedPeer(store, name).pin(keys.bob)
    assert run("ssh-keygen", "-lf", known).split()[1:3] == [fingerprint(keys.bob), name]
    assert run("ssh-keygen", "-F", name, "-f", known).endswith(pin_of(name, keys.bob))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("count", [20, *exhaustive(200)])
def test_any_bytes_are_a_value_or_a_file_error(store: KeyStore, keys: Keys, name: str, count: int) -> None:
    pins = pin_of(CAROL, keys.alice) + pin_of(BOB, keys.bob)
    files = {"identity.pem": pem_of(keys.bob), "dh_parameters.pem": PARAMETERS, "known_peers": pins.encode()}
    good, chance = files[name], random.Random(f"{name} {count}")
    for _ in range(count):
        start, end = sorted(chance.choices(range(len(good) + 1), k=2))
        new = bytes(chance.choices(good if chance.random() < 0.5 else range(256), k=chance.randrange(100)))
        content = chance.choice([new, good[:start] + new + good[end:], good[:start] + new])
        store.write(name, lambda content=content: content)
        try:
            value = FILES[name][0](store, keys)
        except (FileError, TrustError) as error:
            value = error
        if isinstance(value, FileError):
            assert str(store.folder / name) in str(value)
        else:
            assert isinstance(value, (RsaKey, Group, Trust, TrustError))
        assert store.read(name) == content


# ------------------------------------------------------------------ the programs on disks that are full


def limited(size: int) -> tuple[str, ...]:
    """Return a command that runs a program which can write no file of more than `size` bytes.

    The limit does not hold for who runs at the very end, such as a measurement of coverage.
    """
    return patched(
        "import atexit, resource as r",
        "hard = r.getrlimit(r.RLIMIT_FSIZE)[1]",
        "atexit.register(r.setrlimit, r.RLIMIT_FSIZE, (hard, hard))",
        f"r.setrlimit(r.RLIMIT_FSIZE, ({size}, hard))",
        "chat.NEW_RSA_BITS = 2048",
    )


Met = dict[Role, Program]
Meet = Callable[..., Met]


@pytest.fixture
def meet(bob: StartBob, start: Start, homes: Path, keys: Keys) -> Meet:
    """Return a function that starts both on pipes, with --peer, one of them by a command of its own."""

    def run(role: Role, command: tuple[str, ...], *options: str) -> Met:
        ours = {role: {"python": command}, role.peer: {}}
        more = {role: options, role.peer: ()}
        server, port = bob(*("--once", "--peer", fingerprint(keys.alice), *more[Role.BOB]), **ours[Role.BOB])
        client = start(
            *("alice_client.py", f"127.0.0.1:{port}", "--peer", fingerprint(keys.bob), *more[Role.ALICE]),
            **ours[Role.ALICE],
        )
        return {Role.BOB: server, Role.ALICE: client}

    return run


@alice_mostly
def test_no_room_to_pin(meet: Meet, homes: Path, role: Role) -> None:
    """The person has named the key, but it is not pinned, and so it will be new again the next time."""
    KeyStore(homes / role.value).write("known_peers", lambda: b"# nobody yet\n")
    programs = meet(role, limited(64))
    assert programs[role].wait() == 1
    reason = rf"^Stopped: cannot write {homes}/{role.value}/known_peers: File too large; {WAY_OUT[:-1]}"
    programs[role].expect(reason, "stderr")
    assert (homes / role.value / "known_peers").read_bytes() == b"# nobody yet\n"
    programs[role.peer].expect(rf"^{role.value.title()} left", "stderr")


@pytest.mark.parametrize(
    ("role", "group"), [(Role.ALICE, "new"), *exhaustive((Role.ALICE, "known"), (Role.BOB, "foreign"))]
)
def test_what_need_not_be_written_is_not(
    start: Start, bob: StartBob, homes: Path, keys: Keys, role: Role, group: str
) -> None:
    """A read-only disk is enough to talk to somebody whose key is pinned, with --peer too."""
    read_only = patched("def fail(*_): raise chat.FileError('read-only')", "chat.KeyStore.write = fail")
    if group == "new":
        (homes / "alice" / "dh_parameters.pem").unlink()
    if group == "foreign":
        KeyStore(homes / "bob").write("dh_parameters.pem", lambda: PARAMETERS)
    PinnedPeer(KeyStore(homes / "bob"), "alice").pin(keys.alice)
    commands = {role: {"python": read_only}, role.peer: {}}
    server, port = bob("--once", "--peer", fingerprint(keys.alice), **commands[Role.BOB])
    PinnedPeer(KeyStore(homes / "alice"), f"[127.0.0.1]:{port}").pin(keys.bob)
    client = start(
        *("alice_client.py", f"127.0.0.1:{port}", "--peer", fingerprint(keys.bob)), **commands[Role.ALICE]
    )
    client.write("request\n")
    server.expect("^Alice: request\n")
    server.end_input()
    assert (client.wait(), server.wait()) == (0, 0), client.stderr + server.stderr


# ------------------------------------------------------------------------------------ kept conversations


def test_a_tilde_is_a_home_in_every_path(start: Start, tmp_path: Path, keys: Keys) -> None:
    """With `--transcript=~/x`, the shell leaves it as it is."""
    store_with_group(tmp_path / "chat" / "alice").write("identity.pem", lambda: pem_of(keys.alice))
    arguments = ("127.0.0.1:1", "--home=~/chat", "--transcript=~/talks")
    client = start("alice_client.py", *arguments, HOME=str(tmp_path))
    fails(client, 1, "^Stopped: cannot connect")
    assert {path.name for path in tmp_path.iterdir()} >= {"chat", "talks"}
    fails(
        start("alice_client.py", "--verify=~/chat/alice/identity.pem", HOME=str(tmp_path)), 3, "no transcript"
    )
    assert not Path("~").exists()


@alice_mostly
def test_no_room_for_what_the_other_side_says(meet: Meet, homes: Path, role: Role) -> None:
    """It is not shown, since it could not be kept; the other side is told in a goodbye that it missed."""
    programs = meet(role, limited(16_000), "--transcript", str(homes / "kept"))
    large = "x" * 20_000
    if role is Role.BOB:
        programs[Role.ALICE].write(f"{large}\n")
    else:
        programs[Role.ALICE].write("request\n")
        programs[Role.BOB].write(f"{large}\n")
    fails(programs[role], 1, "^Stopped: cannot write .*transcript: File too large")
    programs[role.peer].expect(rf"^{role.value.title()} left before", "stderr")
    (kept,) = (homes / "kept").iterdir()
    with kept.open("rb") as file:
        messages = [message.type.name for _, message in chat.verify_transcript(file)]
    assert messages == ["READY", "READY", *(["TEXT"] if role is Role.ALICE else []), "CLOSE"]
