"""What is on disk: the home folder, the identity, the parameters, the pins, and kept conversations.

What is found there is a value, or a FileError that names the file and says what is wrong; the file stays as
it was. Whatever happens while one is written, the old or the new content is there, whole.
"""

from __future__ import annotations

import errno
import io
import os
import random
import re
import shutil
import socket
import stat
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Callable

import pytest
from conftest import (
    DEADLINE,
    GROUP,
    ROOT,
    Keys,
    Start,
    StartBob,
    patched,
    start_both,
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
both = pytest.mark.parametrize("role", Role)
bob_mostly, alice_mostly = (  # with the other one among the exhaustive tests
    pytest.mark.parametrize("role", [role, pytest.param(role.peer, marks=pytest.mark.exhaustive)])
    for role in Role
)


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
    return pytest.raises(FileError, match=f"{re.escape(str(path))}.*(?:{reason})")


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files but locks, which are empty."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
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


# --------------------------------------------------------------------------- the folder and its parents


@posix
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077], ids=oct)
def test_home_is_private_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    folder = tmp_path / "a" / "b" / "home" / "alice"
    before = os.umask(umask)
    try:
        KeyStore(folder).write("file", b"")
    finally:
        os.umask(before)
    assert (mode_of(folder.parent), mode_of(folder), mode_of(folder / "file")) == (0o700, 0o700, 0o600)
    KeyStore(folder)  # a second time is no mistake


def test_home_is_refused_where_a_file_is_in_the_way(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"mine")
    for folder in (file, file / "home"):
        with refusal(file, ": (File exists|Not a directory)"):
            KeyStore(folder)
    assert file.read_bytes() == b"mine"


@posix
@pytest.mark.parametrize("mode", [0o770, 0o720, 0o702, 0o777], ids=oct)
def test_home_is_refused_when_others_can_write_to_it(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "my home"
    folder.mkdir()
    folder.chmod(mode)
    with refusal(folder, re.escape(f"(mode 0{mode:o}); run: chmod go-rwx '{folder}'")):
        KeyStore(folder)
    assert mode_of(folder) == mode


@root
def test_home_of_another_user_is_refused(store: KeyStore) -> None:
    os.chown(store.folder, 1, 1)
    with refusal(store.folder, "belongs to another user"):
        KeyStore(store.folder)


def a_parent(path: Path, mode: int, owner: int = -1, group: int = -1) -> Path:
    path.mkdir()
    os.chown(path, owner, group)
    path.chmod(mode)
    return path


# The owner of the parent, its group, its mode, and the chmod that helps, if it is refused.
PARENTS = {
    "private": (-1, -1, 0o700, ""),
    "others_read": (-1, -1, 0o755, ""),
    "others_write": (-1, -1, 0o777, "o-w"),
    "others_write_only": (-1, -1, 0o702, "o-w"),
    "sticky": (-1, -1, 0o1777, ""),
    "group_writes": (1, 1, 0o775, "g-w"),
    "group_writes_and_is_sticky": (1, 1, 0o1775, ""),
    "group_of_ones_own_writes": (1, 0, 0o775, ""),
}


@posix
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize(
    "what", [pytest.param(name, marks=root if row[0] == 1 else ()) for name, row in PARENTS.items()]
)
def test_a_parent_in_which_others_could_move_the_home_is_refused(
    tmp_path: Path, what: str, depth: int
) -> None:
    """Otherwise another user moves the folder away, and the next run makes a new key and pins anybody."""
    owner, group, mode, advice = PARENTS[what]
    parent = a_parent(tmp_path / "shared folder", mode, owner, group)
    folder = parent.joinpath(*"abc"[:depth])
    if not advice:
        KeyStore(folder)
        return
    with refusal(parent, re.escape(f"(mode {mode:04o}); run: chmod {advice} '{parent}'")):
        KeyStore(folder)
    parent.chmod(0o755)  # as the advice says
    KeyStore(folder)


@posix
def test_the_parents_behind_a_symbolic_link_are_looked_at_too(tmp_path: Path) -> None:
    parent = a_parent(tmp_path / "shared", 0o777)
    (parent / "home").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(parent / "home")
    with refusal(parent, "run: chmod o-w"):
        KeyStore(tmp_path / "link" / "alice")


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
    "group_writes": (a_file(0o620), r"is open to other users \(mode 0620\); run: chmod go-rwx"),
    "all_write": (a_file(0o602), r"is open to other users \(mode 0602\); run: chmod go-rwx"),
    "stranger": (a_file(owner=1), "belongs to another user; move it away, or take it over with chown"),
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
    store.save_group(GROUP)
    (store.folder / "dh_parameters.pem").chmod(mode)
    assert store.load_group() == GROUP
    a_file(mode)(store.folder / "identity.pem")
    refuses("identity.pem", rf"is open to other users \(mode 0{mode:o}\)")


# ----------------------------------------------------------------------------------------- the identity


@pytest.fixture(params=["ready", pytest.param("new", marks=pytest.mark.exhaustive)])
def made(
    request: pytest.FixtureRequest, store: KeyStore, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, RsaKey]:
    """An identity as the programs make it, of a key that is new or was ready."""

    def ready(bits: int, e: int) -> RsaKey:
        assert (bits, e) == (3072, 65537)
        return keys.alice

    if request.param == "ready":
        monkeypatch.setattr(chat.RSA, "generate", ready)
    key = store.make_identity()
    assert (key.size_in_bits(), key.e) == (3072 if request.param == "new" else 2048, 65537)
    return store.folder / "identity.pem", key


def test_identity_is_made_once(made: tuple[Path, RsaKey]) -> None:
    path, key = made
    assert path.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----\n")
    assert os.name != "posix" or mode_of(path) == 0o600
    assert KeyStore(path.parent).load_identity(never) == key
    assert {file.name for file in path.parent.iterdir()} == {".lock", "identity.pem"}


@needs("openssl")
def test_openssl_reads_the_identity(made: tuple[Path, RsaKey]) -> None:
    path, key = made
    assert "Key is valid" in run("openssl", "pkey", "-in", path, "-noout", "-check")
    assert chat.RSA.import_key(run("openssl", "pkey", "-in", path, "-pubout")) == key.public_key()


@needs("ssh-keygen")
def test_ssh_keygen_reads_the_identity_and_shows_the_same_fingerprint(made: tuple[Path, RsaKey]) -> None:
    path, key = made
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


DAMAGED = "is damaged, or no RSA key; restore it, or move it away"
UNSUITABLE = "is no private RSA key of 2048 to 4096 bits with exponent 65537"
BAD_IDENTITIES: dict[str, tuple[Callable[[RsaKey], bytes], str]] = {
    "empty": (lambda _: b"", DAMAGED),
    "garbage": (lambda _: b"not a key\n", DAMAGED),
    "not_ascii": (lambda key: pem_of(key).replace(b"A", b"\xc3\xa4"), DAMAGED),
    **{f"cut_at_{n}": (lambda key, n=n: pem_of(key)[:n], DAMAGED) for n in (1, 27, 28, 900, -2, -27)},
    **{f"flipped_at_{n}": (lambda key, n=n: flip(pem_of(key), n), DAMAGED) for n in (0, 50, 300, 400, 800)},
    "no_prime": (zero_q, DAMAGED),
    "elliptic": (lambda _: ECC.generate(curve="P-256").export_key(format="PEM").encode(), DAMAGED),
    "public": (lambda key: key.public_key().export_key("PEM"), UNSUITABLE),
    "1024_bits": (lambda _: pem_of(generate(1024)), UNSUITABLE),
    "exponent_3": (lambda _: pem_of(generate(2048, e=3)), UNSUITABLE),
}


@pytest.mark.parametrize("bad", BAD_IDENTITIES)
def test_bad_identity_is_refused_and_kept(
    store: KeyStore, refuses: Callable[..., None], keys: Keys, bad: str
) -> None:
    make, reason = BAD_IDENTITIES[bad]
    store.write("identity.pem", make(keys.bob))
    refuses("identity.pem", reason)


# ------------------------------------------------------------------------------------------- passphrases


def by_library(key: RsaKey, path: Path, secret: str) -> None:
    path.write_bytes(key.export_key("PEM", pkcs=8, passphrase=secret.encode()))


def by_openssl(key: RsaKey, path: Path, secret: str) -> None:
    plain = path.with_name("plain.pem")
    plain.write_bytes(pem_of(key))
    command = ["openssl", "pkcs8", "-topk8", "-v2", "aes256", "-passout", f"pass:{secret}"]
    run(*command, "-in", plain, "-out", path)


def by_ssh_keygen(key: RsaKey, path: Path, secret: str) -> None:
    path.write_bytes(pem_of(key))
    path.chmod(0o600)
    run("ssh-keygen", "-q", "-p", "-P", "", "-N", secret, "-f", path)
    assert path.read_bytes().startswith(b"-----BEGIN OPENSSH PRIVATE KEY")


WRITERS: dict[Callable[[RsaKey, Path, str], None], list[pytest.MarkDecorator]] = {
    by_library: [],
    by_openssl: [needs("openssl")],
    by_ssh_keygen: [needs("ssh-keygen")],
}


ANSWERS = [
    *(("correct horse", True), ("gr\u00fcn \u20ac", True)),
    *(("another", False), ("", False), ("\udcff", False)),
]


@pytest.mark.parametrize(
    ("write", "answer", "right"),
    [
        pytest.param(
            *(write, *row), marks=[*marks, *[pytest.mark.exhaustive][: at if write is not by_library else 0]]
        )
        for write, marks in WRITERS.items()
        for at, row in enumerate(ANSWERS)
    ],
)
def test_encrypted_identity_is_asked_for(
    store: KeyStore, keys: Keys, write: Callable[..., None], answer: str, right: bool
) -> None:
    path = store.folder / "identity.pem"
    write(keys.bob, path, answer if right else "correct horse")
    path.chmod(0o600)
    before = path.read_bytes()
    prompts: list[str] = []

    def ask(prompt: str) -> str:
        prompts.append(prompt)
        return answer

    if right:
        assert store.load_identity(ask) == keys.bob
    else:
        with pytest.raises(FileError, match=f"not the passphrase of {re.escape(str(path))}$"):
            store.load_identity(ask)
    assert prompts == [f"Passphrase of {path}: "]
    assert path.read_bytes() == before


@needs("ssh-keygen")
def test_identity_in_the_format_of_openssh_is_accepted(store: KeyStore, keys: Keys) -> None:
    by_ssh_keygen(keys.bob, store.folder / "identity.pem", "")
    assert store.load_identity(never) == keys.bob


SECRET = "correct horse"


@pytest.fixture
def with_passphrase(homes: Path, keys: Keys) -> None:
    for role, key in ((Role.BOB, keys.bob), (Role.ALICE, keys.alice)):
        by_library(key, homes / role.value / "identity.pem", SECRET)


@alice_mostly
def test_without_a_terminal_no_line_is_taken_for_a_passphrase(
    start: Start, with_passphrase: None, role: Role
) -> None:
    """Standard input holds messages, and its first line may be the passphrase by chance: it is not used."""
    program = start(*SCRIPTS[role])
    program.write(f"{SECRET}\n")
    assert program.wait() == 1
    program.expect("^Stopped: .*passphrase.*terminal", "stderr")
    assert program.stdout == ""


@pytest.mark.parametrize(
    ("role", "typed"),
    [
        (Role.BOB, SECRET),
        (Role.ALICE, "wrong horse"),
        pytest.param(Role.ALICE, SECRET, marks=pytest.mark.exhaustive),
        pytest.param(Role.BOB, "wrong horse", marks=pytest.mark.exhaustive),
    ],
)
def test_a_passphrase_is_typed_at_a_terminal_and_not_shown(
    start: Start, with_passphrase: None, role: Role, typed: str
) -> None:
    program = start(*SCRIPTS[role], terminal=True)
    program.expect("Passphrase of .*: ")
    program.write(f"{typed}\n")
    if typed == SECRET:
        program.expect("The fingerprint of your key is\r\n  SHA256:")
        program.process.terminate()
        assert program.wait() == 130
    else:
        assert program.wait() == 1
        program.expect("not the passphrase of")
    assert "horse" not in program.stdout


# --------------------------------------------------------------------------------- two programs at once


def race(code: str, *arguments: tuple[object, ...]) -> list[str]:
    """Run the code once for each tuple of arguments, all let go when all are ready; return what they say."""
    code = "import os, sys\nfrom pathlib import Path\nimport crypto_utils as chat\n" + code
    commands = [[sys.executable, "-c", code, *map(str, words)] for words in arguments]
    pipe = subprocess.PIPE
    racers = [subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) for command in commands]
    try:
        assert [racer.stdout and racer.stdout.readline() for racer in racers] == ["ready\n"] * len(racers)
        for racer in racers:
            assert racer.stdin
            racer.stdin.write("go\n")
            racer.stdin.flush()
        said = [racer.communicate(timeout=DEADLINE)[0].strip() for racer in racers]
        assert [racer.returncode for racer in racers] == [0] * len(racers)
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
    return said


def test_programs_started_at_once_end_with_one_identity(tmp_path: Path, keys: Keys) -> None:
    code = """
store, key = chat.KeyStore(Path(sys.argv[1])), chat.RSA.import_key(Path(sys.argv[2]).read_bytes())
def generate(*_, **__):
    print("ready", flush=True)
    sys.stdin.readline()
    return key
chat.RSA.generate = generate
assert store.load_identity(str) is None
print(chat.fingerprint(store.make_identity()))
"""
    candidates = [tmp_path / name for name in Keys._fields]
    for path, key in zip(candidates, keys):
        path.write_bytes(pem_of(key))
    said = race(code, *((tmp_path / "a" / "home", path) for path in candidates))
    kept = KeyStore(tmp_path / "a" / "home").load_identity(never)
    assert kept is not None
    assert said == [fingerprint(kept)] * len(candidates)


@pytest.mark.exhaustive
def test_no_pin_is_lost_when_many_are_made_at_once(store: KeyStore, known: Path, keys: Keys) -> None:
    code = """
store, key = chat.KeyStore(Path(sys.argv[1])), chat.RSA.import_key(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for number in range(6):
    assert chat.PinnedPeer(store, f"[{sys.argv[3]}]:{number}").pin(key)
"""
    race(code, *((store.folder, ssh_line(keys.bob), who) for who in range(4)))
    lines = known.read_text().splitlines()
    assert sorted(lines) == sorted(f"[{who}]:{n} {ssh_line(keys.bob)}" for who in range(4) for n in range(6))


@pytest.mark.exhaustive
def test_transcripts_begun_at_once_are_files_of_their_own(tmp_path: Path) -> None:
    code = """
chat.time.strftime = lambda *_: "one-moment-"
print("ready", flush=True)
sys.stdin.readline()
for number in range(6):
    beginning = f"{sys.argv[2]} {number}".encode()
    chat.Transcript(Path(sys.argv[1]), chat.Role.BOB, (beginning,)).add(b"B", b"more")
"""
    race(code, *((tmp_path, who) for who in range(4)))
    kept = sorted(path.read_bytes() for path in tmp_path.iterdir())
    beginnings = [f"{who} {n}".encode() for who in range(4) for n in range(6)]
    assert kept == sorted(chat.frame(beginning) + chat.frame(b"Bmore") for beginning in beginnings)


# ------------------------------------------------------------------------------- old or new, but whole


class HalfWritten(io.FileIO):
    """A file that takes a part of what it is given, and then fails."""

    error: BaseException | None = None

    def write(self, data: bytes) -> int:  # a buffer of any kind
        if self.error is None:
            return super().write(data)
        super().write(bytes(data)[:3])
        raise self.error


FAILURES = [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EROFS, "Read-only file system")]
failing = pytest.mark.parametrize(
    "error", [*FAILURES, KeyboardInterrupt()], ids=["full", "read_only", "ctrl_c"]
)


def failure(error: BaseException, path: Path) -> AbstractContextManager[object]:
    if not isinstance(error, OSError):
        return pytest.raises(KeyboardInterrupt)
    return pytest.raises(FileError, match=f"^{re.escape(f'cannot write {path}: {error.strerror}')}$")


@pytest.mark.parametrize("old", [b"the old content", None])
@pytest.mark.parametrize("step", ["open", "write", "fsync", "replace"])
@failing
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    store: KeyStore, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException, old: bytes | None
) -> None:
    def fail(*_: object, **__: object) -> object:
        raise error

    def half_written(path: Path, _: str, opener: Callable[[str, int], int]) -> HalfWritten:
        file = HalfWritten(path, "x", opener=opener)
        file.error = error
        return file

    if old is not None:
        store.write("file", old)
    with monkeypatch.context() as broken:
        if step in ("open", "write"):
            broken.setattr(chat, "open", half_written if step == "write" else fail, raising=False)
        else:
            broken.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), fail)
        with failure(error, store.folder / "file"):
            store.write("file", b"the new content")
    assert [file.name for file in store.folder.iterdir()] == ["file"] * (old is not None)
    assert store.read("file") == old


@failing
def test_a_transcript_that_cannot_go_on_ends_with_its_last_whole_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(io, "FileIO", HalfWritten)
    kept = Transcript(tmp_path, Role.BOB, (b"the beginning",))
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
    store.write("file", b"content")
    assert steps == [len(b"content"), "replace"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_crash_at_any_moment_leaves_the_old_file_or_the_new(store: KeyStore) -> None:
    code = """
print("ready", flush=True)
store, status, calls = chat.KeyStore(Path(sys.argv[1])), 1, 0
while status:
    store.write("file", b"old" * 10_000)
    child = os.fork()
    if not child:
        left = calls
        def die_at_the_nth_call_of_c(frame, event, function):
            global left
            left -= event == "c_call"
            if left < 0:
                os._exit(1)
        sys.setprofile(die_at_the_nth_call_of_c)
        with store.locked():
            store.write("file", b"new" * 10_000)
        sys.setprofile(None)
        os._exit(0)
    status, calls = os.waitpid(child, 0)[1], calls + 1
    content = store.read("file")
    assert content in (b"old" * 10_000, b"new" * 10_000)
    print(content[:3].decode(), end=" ")
"""
    (said,) = race(code, (store.folder,))
    assert re.fullmatch("(old ){10,}(new ?){4,}", said), "old before it is replaced, new ever after"
    assert not list(store.folder.glob(".file.*")), "what a dead program left went with the next write"


# --------------------------------------------------------------------------------------- the parameters


def dh_pem(p: int, g: int, marker: str = "DH PARAMETERS") -> bytes:
    return PEM.encode(DerSequence([p, g]).encode(), marker).encode()


def test_parameters_come_back_as_they_were_saved(store: KeyStore) -> None:
    assert store.load_group() is None
    store.accept_group(GROUP)
    before = (store.folder / "dh_parameters.pem").stat().st_ino
    assert store.load_group() == GROUP
    store.accept_group(GROUP)
    assert (store.folder / "dh_parameters.pem").stat().st_ino == before, "written without a need"


PARAMETERS = GROUP.export()
BAD_GROUPS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", ""),
    "garbage": (b"\x00\xff" * 99, ""),
    "cut": (PARAMETERS[:200], ""),
    "cut_before_the_end": (PARAMETERS[:-20], ""),
    "not_ascii": (PARAMETERS.replace(b"A", b"\xc3\xa4"), ""),
    "another_type": (dh_pem(GROUP.p, GROUP.g, "X9.42 DH PARAMETERS"), "these are not DH PARAMETERS"),
    "negative_p": (dh_pem(-GROUP.p, GROUP.g), ""),
    "zero": (dh_pem(0, 0), "p has 0 bits, not 2048 to 4096"),
    "small": (dh_pem(2**1023 + 9, 2), "p has 1024 bits, not 2048 to 4096"),
    "bad_generator": (dh_pem(GROUP.p, GROUP.p - 1), "g does not generate the subgroup"),
    # One character changed, and p is a prime again of which 2 is a square; but (p - 1) / 2 is none.
    "no_safe_prime": (PARAMETERS[:67] + b"5" + PARAMETERS[68:], "p is not a safe prime"),
    # Not the last two of the 358 characters: they may make g another generator, or change nothing at all.
    **{f"flipped_at_{n}": (flip(PARAMETERS, n), "") for n in range(0, 360, 36)},
}


@pytest.mark.parametrize("bad", BAD_GROUPS)
def test_bad_parameters_are_refused_and_kept(store: KeyStore, bad: str) -> None:
    content, reason = BAD_GROUPS[bad]
    store.write("dh_parameters.pem", content)
    path = store.folder / "dh_parameters.pem"
    for named in (path,) if bad == "no_safe_prime" else (path, None):  # and as Bob's own
        with refusal(path, rf"holds no usable Diffie-Hellman parameters \({reason}"):
            store.load_group(named)
    assert store.read("dh_parameters.pem") == content


def test_parameters_that_are_not_there_are_told_as_such(store: KeyStore, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=f"^there is no file {re.escape(str(tmp_path))}/nothing$"):
        store.load_group(tmp_path / "nothing")


# ---------------------------------------------------------------------------------------------- the pins


def pin_of(name: str, key: RsaKey) -> str:
    return f"{name} {ssh_line(key)}\n"


def bob(store: KeyStore, only: RsaKey | None = None) -> PinnedPeer:
    return PinnedPeer(store, BOB, only and fingerprint(only))


def test_a_key_is_new_until_it_is_pinned(store: KeyStore, keys: Keys, known: Path) -> None:
    peer = bob(store)
    assert peer.check(keys.bob) == peer.check(keys.bob) == Trust(known=False)
    assert not known.exists(), "checking pins nothing"
    assert peer.pin(keys.bob) == 1
    before = known.stat().st_ino
    assert peer.check(keys.bob) == Trust(known=True)
    assert peer.pin(keys.bob) == 1
    assert known.stat().st_ino == before, "written without a need"
    assert known.read_text() == pin_of(BOB, keys.bob)


def test_what_is_known_under_other_names_is_told(store: KeyStore, keys: Keys, known: Path) -> None:
    known.write_text(pin_of(CAROL, keys.bob) + pin_of("[dave]:1", keys.alice) + pin_of(BOB[:-1], keys.bob))
    assert bob(store).check(keys.bob) == Trust(False, False, (CAROL, BOB[:-1]), ("[dave]:1",))
    assert bob(store).pin(keys.bob) == 4


def test_another_key_is_refused_and_nothing_is_changed(store: KeyStore, keys: Keys, known: Path) -> None:
    before = "# friends\n\n" + pin_of(CAROL, keys.alice) + pin_of(BOB, keys.bob)
    known.write_text(before)
    for use in (bob(store).check, bob(store).pin):
        with pytest.raises(TrustError) as refused:
            use(keys.mallory)
        assert (refused.value.presented, refused.value.expected) == (
            fingerprint(keys.mallory),
            (fingerprint(keys.bob),),
        )
        assert f"{known}, line 4" in str(refused.value)
        assert fingerprint(keys.alice) not in str(refused.value)
    assert known.read_text() == before


def test_each_of_several_pinned_keys_is_accepted(store: KeyStore, keys: Keys, known: Path) -> None:
    known.write_text(pin_of(BOB, keys.bob) + pin_of(BOB, keys.alice))
    assert (bob(store).pin(keys.bob), bob(store).pin(keys.alice)) == (1, 2)
    with pytest.raises(TrustError) as refused:
        bob(store).check(keys.mallory)
    assert refused.value.expected == (fingerprint(keys.bob), fingerprint(keys.alice))


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
@pytest.mark.parametrize("comment", ["# \u00e4", "  # indented", "# one\x0b\x0c\x1c\x85\u2028line"])
def test_what_others_wrote_survives_byte_for_byte(
    store: KeyStore, keys: Keys, known: Path, end: str, comment: str
) -> None:
    lines = [comment, "", " \t", f"  {CAROL}\t{ssh_line(keys.alice)}  a comment", pin_of(BOB[:-1], keys.bob)]
    before = "".join(line.rstrip("\n") + end for line in lines).encode()
    for written in (before, before[: -len(end)]):  # a last line without an end gets one
        known.write_bytes(written)
        assert bob(store).pin(keys.bob) == 6
        kept, _, added = known.read_bytes().rpartition(b"\n" + BOB.encode() + b" ")
        assert kept + b"\n" in (before, written + b"\n")
        assert added == ssh_line(keys.bob).encode() + b"\n"


def test_a_byte_order_mark_does_not_hide_a_pin(store: KeyStore, keys: Keys, known: Path) -> None:
    known.write_text(pin_of(BOB, keys.bob), encoding="utf-8-sig")
    assert bob(store).check(keys.bob).known
    with pytest.raises(TrustError):
        bob(store).check(keys.mallory)


@pytest.mark.parametrize("name", ["ALICE", "Alice", "alice"])
def test_names_are_compared_without_case(store: KeyStore, keys: Keys, known: Path, name: str) -> None:
    known.write_text(pin_of(name, keys.alice))
    assert PinnedPeer(store, "alice").check(keys.alice).known
    with pytest.raises(TrustError):
        PinnedPeer(store, "alice").check(keys.mallory)
    known.write_text(pin_of(f"[{name}.Example]:1", keys.alice))
    assert PinnedPeer(store, f"[{name}.example]:1").check(keys.alice).known


def test_the_key_asked_for_takes_the_place_of_the_old_ones(store: KeyStore, keys: Keys, known: Path) -> None:
    carol = pin_of(CAROL, keys.bob)
    known.write_text(f"# a\n{pin_of(BOB, keys.bob)}{carol}{pin_of(BOB.upper(), keys.mallory)}\n")
    assert bob(store, only=keys.alice).check(keys.alice) == Trust(known=False, asked_for=True)
    assert bob(store, only=keys.alice).pin(keys.alice) == 4
    assert known.read_text() == f"# a\n{carol}\n{pin_of(BOB, keys.alice)}"
    assert bob(store, only=keys.alice).check(keys.alice) == Trust(known=True, asked_for=True)
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
        assert (refused.value.presented, refused.value.expected) == (
            fingerprint(keys.bob),
            (fingerprint(keys.alice),),
        )
    assert known.read_text() == before


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


def test_known_peers_that_is_no_text_is_refused(store: KeyStore, refuses: Callable[..., None]) -> None:
    store.write("known_peers", b"# caf\xe9\n")
    refuses("known_peers", "is damaged: it is not UTF-8 text")


@needs("ssh-keygen")
@pytest.mark.parametrize("name", ["alice", BOB])
def test_ssh_keygen_reads_known_peers(store: KeyStore, keys: Keys, known: Path, name: str) -> None:
    PinnedPeer(store, name).pin(keys.bob)
    assert run("ssh-keygen", "-lf", known).split()[1:3] == [fingerprint(keys.bob), name]
    assert run("ssh-keygen", "-F", name, "-f", known).endswith(pin_of(name, keys.bob))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.exhaustive)], ids=["few", "many"])
def test_any_bytes_are_a_value_or_a_file_error(store: KeyStore, keys: Keys, name: str, count: int) -> None:
    pins = pin_of(CAROL, keys.alice) + pin_of(BOB, keys.bob)
    files = {"identity.pem": pem_of(keys.bob), "dh_parameters.pem": PARAMETERS, "known_peers": pins.encode()}
    good, chance = files[name], random.Random(f"{name} {count}")
    for _ in range(count):
        start, end = sorted(chance.choices(range(len(good) + 1), k=2))
        new = bytes(chance.choices(good if chance.random() < 0.5 else range(256), k=chance.randrange(100)))
        content = chance.choice([new, good[:start] + new + good[end:], good[:start] + new])
        store.write(name, content)
        expected = (FileError, TrustError) if name == "known_peers" else FileError
        try:
            value = FILES[name][0](store, keys)
        except expected as error:
            value = error
        if isinstance(value, Exception):
            assert str(store.folder / name) in str(value)
        else:
            assert isinstance(value, (RsaKey, Group, Trust, type(None)))
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


def other_pin(role: Role) -> str:
    """Return a line of known_peers that has nothing to do with the peer of these tests."""
    return "# nobody yet\n" if role is Role.BOB else "# Bob is at 192.0.2.7\n"


@alice_mostly
def test_no_room_to_pin(bob: StartBob, start: Start, homes: Path, role: Role) -> None:
    """The person has seen the key, but it is not pinned, and so it will be new again the next time."""
    KeyStore(homes / role.value).write("known_peers", other_pin(role).encode())
    KeyStore(homes / "alice").save_group(GROUP)
    before = contents(homes / role.value)
    programs = start_both(bob, start, {role: limited(64)})
    assert programs[role].wait() == 1
    programs[role].expect("This key is new to you", "stderr")
    programs[role].expect(rf"^Stopped: cannot write {homes}/{role.value}/known_peers: File too", "stderr")
    assert contents(homes / role.value) == before
    assert programs[role.peer].wait() == 1
    programs[role.peer].expect(rf"^{role.value.title()} left", "stderr")


@pytest.mark.exhaustive
@both
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this machine")
def test_a_key_that_could_not_be_shown_is_not_pinned(
    bob: StartBob, start: Start, homes: Path, role: Role
) -> None:
    full = patched(
        "import os",
        "check = chat.PinnedPeer.check",
        "def fill(*arguments):",
        "    os.dup2(os.open('/dev/full', os.O_WRONLY), 2)",
        "    return check(*arguments)",
        "chat.PinnedPeer.check = fill",
    )
    programs = start_both(bob, start, {role: full})
    assert programs[role].wait() != 0  # 120 where Python has something to say to the full disk at its end
    assert "known_peers" not in contents(homes / role.value)
    assert programs[role.peer].wait() == 1


@bob_mostly
def test_no_room_for_a_new_identity(start: Start, tmp_path: Path, role: Role) -> None:
    home = tmp_path / "fresh"
    program = start(*SCRIPTS[role], home=home, python=limited(64))
    folder = home / role.value
    assert program.wait() == 1
    program.expect(rf"^Stopped: cannot write {folder}/identity\.pem: File too large\n\Z", "stderr")
    assert contents(folder) == {}


def mounts(script: str) -> tuple[str, ...]:
    """Return a command that runs a program among mounts of its own, which the shell script makes."""
    for rights in ((), ("--map-root-user",)):
        command = ("unshare", *rights, "--mount", "sh", "-c")
        try:
            subprocess.run(
                [*command, "mount -t tmpfs tmpfs /tmp"], check=True, capture_output=True, timeout=DEADLINE
            )
        except (OSError, subprocess.CalledProcessError):
            continue
        return (*command, f"set -e\n{script}", "sh", sys.executable)
    pytest.skip("this machine does not let us mount anything")


@pytest.mark.exhaustive
def test_a_full_disk(bob: StartBob, start: Start, homes: Path) -> None:
    KeyStore(homes / "alice").write("known_peers", other_pin(Role.ALICE).encode())
    KeyStore(homes / "alice").save_group(GROUP)
    before = contents(homes / "alice")
    shutil.copytree(homes / "alice", homes / "seed")
    full = mounts(
        'cd "$SECURE_CHAT_HOME"; mount -t tmpfs -o size=64k,mode=0700 tmpfs alice; cp -a seed/. alice\n'
        "cat /dev/zero > alice/all_the_rest 2> /dev/null || true\n"
        'status=0; "$@" || status=$?; rm alice/all_the_rest; cp -a alice after; exit $status'
    )
    client = start_both(bob, start, {Role.ALICE: full})[Role.ALICE]
    assert client.wait() == 1
    client.expect(rf"^Stopped: cannot write {homes}/alice/known_peers: No space left on device\n\Z", "stderr")
    assert contents(homes / "after") == before


READ_ONLY = (
    'mount --bind "$SECURE_CHAT_HOME" "$SECURE_CHAT_HOME"\n'
    'mount -o remount,bind,ro "$SECURE_CHAT_HOME"; exec "$@"'
)


@bob_mostly
def test_a_new_key_on_a_read_only_disk(bob: StartBob, start: Start, homes: Path, role: Role) -> None:
    KeyStore(homes / "alice").save_group(GROUP)
    before = contents(homes / role.value)
    program = start_both(bob, start, {role: mounts(READ_ONLY)})[role]
    assert program.wait() == 1
    program.expect(rf"^Stopped: cannot lock {homes}/{role.value}/\.lock: Read-only file system\n\Z", "stderr")
    assert contents(homes / role.value) == before


@pytest.mark.parametrize(
    ("role", "group"),
    [
        (Role.ALICE, "a_new_group"),
        pytest.param(Role.ALICE, "a_known_group", marks=pytest.mark.exhaustive),
        pytest.param(Role.BOB, "a_known_group", marks=pytest.mark.exhaustive),
    ],
)
def test_what_need_not_be_written_is_not(
    start: Start, homes: Path, keys: Keys, role: Role, group: str
) -> None:
    """A read-only disk is enough to talk to somebody whose key is pinned, with --peer too."""
    command = mounts(READ_ONLY)
    if group == "a_known_group":
        KeyStore(homes / "alice").save_group(GROUP)
    server = start("bob_server.py", "--port", "0", "--once", "--peer", fingerprint(keys.alice))
    port = server.expect(r"^Listening on port (\d+)\.", "stderr")[1]
    PinnedPeer(KeyStore(homes / "bob"), "alice").pin(keys.alice)
    PinnedPeer(KeyStore(homes / "alice"), f"[127.0.0.1]:{port}").pin(keys.bob)
    if role is Role.BOB:
        server.close()
        server = start(
            *("bob_server.py", "--port", port, "--once", "--peer", fingerprint(keys.alice)), python=command
        )
    server.expect("^Waiting for Alice", "stderr")
    client = start(
        *("alice_client.py", f"127.0.0.1:{port}", "--peer", fingerprint(keys.bob)),
        python=command if role is Role.ALICE else (sys.executable,),
    )
    client.write("request\n")
    server.expect("^Alice: request\n")
    server.end_input()
    assert (client.wait(), server.wait()) == (0, 0), client.stderr + server.stderr


@alice_mostly
def test_a_new_home_cannot_be_made_on_a_read_only_disk(start: Start, tmp_path: Path, role: Role) -> None:
    home = tmp_path / "fresh"
    home.mkdir()
    program = start(*SCRIPTS[role], home=home, python=mounts(READ_ONLY))
    assert program.wait() == 1
    program.expect(rf"^Stopped: cannot make {home}/{role.value}: Read-only file system\n\Z", "stderr")


# ------------------------------------------------------------------------------------ kept conversations


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_dangling(path: Path) -> None:
    path.symlink_to("nothing")


@pytest.mark.parametrize(
    ("role", "make"),
    [
        pytest.param(role, make, marks=() if plain is role else pytest.mark.exhaustive)
        for make, plain in ((Path.touch, Role.BOB), (make_fifo, Role.ALICE), (make_dangling, None))
        for role in Role
    ],
)
def test_a_transcript_that_cannot_be_kept_is_told_before_anybody_is_met(
    start: Start, tmp_path: Path, role: Role, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "kept")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0)
        at = str(listener.getsockname()[1]) if role is Role.ALICE else "0"
        program = start(SCRIPTS[role][0], "--port", at, "--transcript", str(tmp_path / "kept"))
        assert program.wait() == 1
        program.expect(f"^Stopped: cannot make {tmp_path}/kept: File exists", "stderr")
        assert "Waiting" not in program.stderr
        with pytest.raises(BlockingIOError):
            listener.accept()


@bob_mostly
def test_a_transcript_without_room_is_told_before_the_first_word(
    bob: StartBob, start: Start, homes: Path, keys: Keys, role: Role
) -> None:
    KeyStore(homes / "alice").save_group(GROUP)
    server, port = bob("--once", "--transcript", str(homes / "bobs"), python=limited(1500))
    PinnedPeer(KeyStore(homes / "bob"), "alice").pin(keys.alice)
    if role is Role.ALICE:
        server.close()
        server, port = bob("--once")
    client = start(
        *("alice_client.py", f"127.0.0.1:{port}"),
        *(("--transcript", str(homes / "hers")) if role is Role.ALICE else ()),
        python=limited(1500) if role is Role.ALICE else (sys.executable,),
    )
    failed, other = (server, client) if role is Role.BOB else (client, server)
    assert failed.wait() == 1
    failed.expect("^Stopped: cannot write .*transcript: File too large", "stderr")
    assert "first" not in failed.stderr, "a conversation began"
    assert other.wait() == 1
    other.expect(rf"^{role.value.title()} left", "stderr")


@alice_mostly
def test_no_room_for_what_the_other_side_says(bob: StartBob, start: Start, homes: Path, role: Role) -> None:
    """It is not shown, since it could not be kept; the other side is told in a goodbye that it missed."""
    KeyStore(homes / "alice").save_group(GROUP)
    roomy = limited(16_000)
    server, port = bob(
        *("--once", "--transcript", str(homes / "bobs")),
        python=roomy if role is Role.BOB else (sys.executable,),
    )
    client = start(
        *("alice_client.py", f"127.0.0.1:{port}", "--transcript", str(homes / "hers")),
        python=roomy if role is Role.ALICE else (sys.executable,),
    )
    large = "x" * 20_000
    if role is Role.BOB:
        client.write(f"{large}\n")
    else:
        client.write("request\n")
        server.write(f"{large}\n")
    failed, other = (server, client) if role is Role.BOB else (client, server)
    assert failed.wait() == 1
    failed.expect("^Stopped: cannot write .*transcript: File too large", "stderr")
    assert "xxx" not in failed.stdout
    other.expect(rf"^{role.value.title()} left", "stderr")
    (kept,) = (homes / ("bobs" if role is Role.BOB else "hers")).iterdir()
    with kept.open("rb") as file:
        messages = [message for _, message in chat.verify_transcript(file)]
    texts = ["TEXT"] if role is Role.ALICE else []
    assert [message.type.name for message in messages] == ["READY", "READY", *texts, "CLOSE"]
