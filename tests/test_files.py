"""Keys on disk: the home folder, the identity, the parameters and the pins.

What is found there is a value, or a FileError that names the file and says what is wrong; the file stays as
it was. Whatever happens while one is written, the old or the new content is there, whole.
"""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import stat
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Callable

import pytest
from conftest import DEADLINE, GROUP, ROOT, Keys
from Crypto.IO import PEM, PKCS8
from Crypto.PublicKey import ECC
from Crypto.PublicKey.RSA import generate
from Crypto.Util.asn1 import DerNull, DerSequence
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import crypto_utils as chat
from crypto_utils import FileError, Group, Home, KnownPeer, RsaKey, TrustError, fingerprint, ssh_line

ADDRESS = "[127.0.0.1]:65432"
Use = Callable[[Home, Keys], object]
FILES: dict[str, tuple[Use, Use]] = {  # name: what reads it, and what writes it
    "identity.pem": (lambda home, _: home.load_identity(never), lambda home, _: home.make_identity()),
    "dh_parameters.pem": (lambda home, _: home.load_group(), lambda home, _: home.save_group(GROUP)),
    "known_peers": (lambda home, keys: bob(home).check(keys.bob), lambda home, keys: bob(home).pin(keys.bob)),
}
posix = pytest.mark.skipif(os.name != "posix", reason="owners, modes and FIFOs are POSIX's")
root = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give files away")


def needs(tool: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} is not installed")


def run(*words: object) -> str:
    command = [str(word) for word in words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=DEADLINE).stdout


def never(prompt: str) -> str:
    pytest.fail(f"asked without a need: {prompt}")


def bob(home: Home, only: RsaKey | None = None) -> KnownPeer:
    return KnownPeer(home, "bob", only and fingerprint(only))


def pem_of(key: RsaKey) -> bytes:
    return key.export_key("PEM", pkcs=8) + b"\n"


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def refusal(path: Path, reason: str) -> AbstractContextManager:
    """The claim that what follows raises a FileError that names the path and matches the reason."""
    return pytest.raises(FileError, match=f"{re.escape(str(path))}.*(?:{reason})")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def known(home: Home) -> Path:
    return home.folder / "known_peers"


@pytest.fixture
def refuses(home: Home, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Return a check that neither reading nor writing gets past what stands there, and that it stays."""
    monkeypatch.setattr(chat.RSA, "generate", lambda *_, **__: keys.bob)

    def check(name: str, reason: str) -> None:
        path = home.folder / name
        before, content = os.lstat(path), path.read_bytes() if path.is_file() else b""
        for use in FILES[name]:
            with refusal(path, reason):
                use(home, keys)
        assert os.lstat(path)[:-3] == before[:-3], "something but the times has changed"
        assert content == (path.read_bytes() if path.is_file() else b"")
        assert not list(home.folder.glob(f".{name}.*")), "a temporary file is left"

    return check


# ------------------------------------------------------- the folder, and what may stand in a file's place


@posix
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077], ids=oct)
def test_home_is_private_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    folder = tmp_path / "a" / "b" / "home"
    before = os.umask(umask)
    try:
        Home(folder).write("file", b"")
    finally:
        os.umask(before)
    assert (mode_of(folder), mode_of(folder / "file")) == (0o700, 0o600)
    Home(folder)  # a second time is no mistake


def test_home_is_refused_where_a_file_is_in_the_way(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"mine")
    with refusal(file, ": File exists"):
        Home(file)
    with refusal(file, ": File exists"):
        Home(file / "home")
    assert file.read_bytes() == b"mine"


@posix
@pytest.mark.parametrize("mode", [0o770, 0o720, 0o702, 0o777], ids=oct)
def test_home_is_refused_when_others_can_write_to_it(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "my home"
    folder.mkdir()
    folder.chmod(mode)
    advice = re.escape(f"(mode 0{mode:o}); run: chmod go-rwx '{folder}'")
    with refusal(folder, f" is open to other users {advice}"):
        Home(folder)
    assert mode_of(folder) == mode


@root
def test_home_of_another_user_is_refused(home: Home) -> None:
    os.chown(home.folder, 1, 1)
    with refusal(home.folder, "belongs to another user"):
        Home(home.folder)


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


IN_THE_WAY: dict[str, tuple[Callable, str]] = {
    "link": (a_link, ": it is a symbolic link"),
    "dangling": (lambda path: path.symlink_to("nothing"), ": it is a symbolic link"),
    "directory": (Path.mkdir, ": Is a directory| is not a regular file"),
    "fifo": (lambda path: os.mkfifo(path, 0o600), " is not a regular file of at most 1048576 bytes; move it"),
    "huge": (a_file(size=chat.FILE_LIMIT + 1), " is not a regular file of at most 1048576 bytes; move it"),
    "group_writes": (a_file(0o620), r" is open to other users \(mode 0620\); run: chmod go-rwx"),
    "all_write": (a_file(0o602), r" is open to other users \(mode 0602\); run: chmod go-rwx"),
    "stranger": (a_file(owner=1), " belongs to another user; move it away, or take it over with chown"),
}


@posix
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("what", [pytest.param(x, marks=root if x == "stranger" else ()) for x in IN_THE_WAY])
def test_what_is_no_file_of_ones_own_is_refused(home: Home, refuses: Callable, name: str, what: str) -> None:
    make, reason = IN_THE_WAY[what]
    make(home.folder / name)
    refuses(name, reason)
    assert what != "link" or (home.folder / "elsewhere").read_bytes() == b"theirs"


@posix
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604], ids=oct)
def test_only_the_identity_must_not_be_readable(home: Home, refuses: Callable, mode: int) -> None:
    home.write("dh_parameters.pem", GROUP.export())
    (home.folder / "dh_parameters.pem").chmod(mode)
    assert home.load_group() == GROUP
    a_file(mode)(home.folder / "identity.pem")
    refuses("identity.pem", rf"is open to other users \(mode 0{mode:o}\)")


# ----------------------------------------------------------------------------------------- the identity


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RsaKey]:
    """An identity as the programs make it: the one key of full size in this file."""
    home = Home(tmp_path_factory.mktemp("made") / "home")
    return home.folder / "identity.pem", home.make_identity()


def test_identity_is_made_once(made: tuple[Path, RsaKey]) -> None:
    path, key = made
    assert (key.size_in_bits(), key.e) == (3072, 65537)
    assert path.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----\n")
    assert os.name != "posix" or mode_of(path) == 0o600
    assert Home(path.parent).load_identity(never) == key
    assert {file.name for file in path.parent.iterdir()} == {".lock", "identity.pem"}


@needs("openssl")
def test_openssl_reads_the_identity(made: tuple[Path, RsaKey]) -> None:
    path, key = made
    assert "Key is valid" in run("openssl", "pkey", "-in", path, "-noout", "-check")
    assert chat.RSA.import_key(run("openssl", "pkey", "-in", path, "-pubout")) == key.public_key()


@needs("ssh-keygen")
def test_ssh_keygen_reads_the_identity_and_shows_the_same_fingerprint(made: tuple[Path, RsaKey]) -> None:
    path, key = made
    assert run("ssh-keygen", "-lf", path).split()[:2] == ["3072", fingerprint(key)]
    assert run("ssh-keygen", "-yf", path).split()[:2] == ssh_line(key).split()


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


WRITERS = [
    by_library,
    pytest.param(by_openssl, marks=needs("openssl")),
    pytest.param(by_ssh_keygen, marks=needs("ssh-keygen")),
]


@pytest.mark.parametrize(
    ("answer", "right"),
    [("correct horse", True), ("gr\u00fcn \u20ac", True), ("another", False), ("", False), ("\udcff", False)],
)
@pytest.mark.parametrize("write", WRITERS)
def test_encrypted_identity_is_asked_for(
    home: Home, keys: Keys, write: Callable, answer: str, right: bool
) -> None:
    path = home.folder / "identity.pem"
    write(keys.bob, path, answer if right else "correct horse")
    path.chmod(0o600)
    before = path.read_bytes()
    prompts: list[str] = []

    def ask(prompt: str) -> str:
        prompts.append(prompt)
        return answer

    if right:
        assert home.load_identity(ask) == keys.bob
    else:
        with pytest.raises(FileError, match=f"^that is not the passphrase of {re.escape(str(path))}$"):
            home.load_identity(ask)
    assert prompts == [f"Passphrase of {path}: "]
    assert path.read_bytes() == before


@needs("ssh-keygen")
def test_identity_in_the_format_of_openssh_is_accepted(home: Home, keys: Keys) -> None:
    by_ssh_keygen(keys.bob, home.folder / "identity.pem", "")
    assert home.load_identity(never) == keys.bob


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


DAMAGED = "is damaged, or no RSA key; restore it, or move it away for a new one"
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
def test_bad_identity_is_refused_and_kept(home: Home, refuses: Callable, keys: Keys, bad: str) -> None:
    make, reason = BAD_IDENTITIES[bad]
    home.write("identity.pem", make(keys.bob))
    refuses("identity.pem", reason)


def test_identity_made_by_another_program_meanwhile_is_taken(
    home: Home, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_late(*_: object, **__: object) -> RsaKey:
        home.write("identity.pem", pem_of(keys.alice))
        return keys.bob

    monkeypatch.setattr(chat.RSA, "generate", too_late)
    assert home.make_identity() == keys.alice
    assert home.read("identity.pem") == pem_of(keys.alice)


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
home, key = chat.Home(Path(sys.argv[1])), chat.RSA.import_key(Path(sys.argv[2]).read_bytes())
def generate(*_, **__):
    print("ready", flush=True)
    sys.stdin.readline()
    return key
chat.RSA.generate = generate
assert home.load_identity(str) is None
print(chat.fingerprint(home.make_identity()))
"""
    candidates = [tmp_path / name for name in Keys._fields]
    for path, key in zip(candidates, keys):
        path.write_bytes(pem_of(key))
    said = race(code, *((tmp_path / "a" / "home", path) for path in candidates))
    kept = Home(tmp_path / "a" / "home").load_identity(never)
    assert kept is not None
    assert said == [fingerprint(kept)] * len(candidates)


def test_no_pin_is_lost_when_many_are_made_at_once(home: Home, known: Path, keys: Keys) -> None:
    code = """
home, key = chat.Home(Path(sys.argv[1])), chat.RSA.import_key(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for number in range(20):
    assert chat.KnownPeer(home, f"{sys.argv[3]}-{number}").pin(key)
"""
    race(code, *((home.folder, ssh_line(keys.bob), who) for who in range(4)))
    lines = known.read_text().splitlines()
    assert sorted(lines) == sorted(f"{who}-{n} {ssh_line(keys.bob)}" for who in range(4) for n in range(20))


# ------------------------------------------------------------------------------- old or new, but whole


class HalfWritten(io.BufferedWriter):
    """A file that takes a part of what it is given, and then fails."""

    error: BaseException

    def write(self, data: bytes) -> int:  # type: ignore[override]
        super().write(data[:3])
        self.flush()
        raise self.error


FAILURES = [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EROFS, "Read-only file system")]


@pytest.mark.parametrize("old", [b"the old content", None])
@pytest.mark.parametrize("step", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("error", [*FAILURES, KeyboardInterrupt()], ids=["full", "read_only", "ctrl_c"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    home: Home, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException, old: bytes | None
) -> None:
    def fail(*_: object, **__: object) -> object:
        raise error

    def half_written(path: Path, _: str, opener: Callable[[str, int], int]) -> HalfWritten:
        file = HalfWritten(io.FileIO(path, "x", opener=opener))  # type: ignore[arg-type]
        file.error = error
        return file

    if old is not None:
        home.write("file", old)
    with monkeypatch.context() as broken:
        if step in ("open", "write"):
            broken.setattr(chat, "open", half_written if step == "write" else fail, raising=False)
        else:
            broken.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), fail)
        if isinstance(error, OSError):
            reason = f"^{re.escape(f'cannot write {home.folder}/file: {error.strerror}')}$"
            with pytest.raises(FileError, match=reason):
                home.write("file", b"the new content")
        else:
            with pytest.raises(KeyboardInterrupt):
                home.write("file", b"the new content")
    assert [file.name for file in home.folder.iterdir()] == ["file"] * (old is not None)
    assert home.read("file") == old


@posix
def test_a_write_is_on_the_disk_before_it_takes_the_old_ones_place(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[object] = []
    replace = Path.replace

    def fsync(descriptor: int) -> None:
        info = os.fstat(descriptor)
        steps.append("folder" if stat.S_ISDIR(info.st_mode) else info.st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", lambda *paths: steps.append("replace") or replace(*paths))
    home.write("file", b"content")
    assert steps == [len(b"content"), "replace", "folder"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_crash_at_any_moment_leaves_the_old_file_or_the_new(home: Home) -> None:
    code = """
print("ready", flush=True)
home, status, calls = chat.Home(Path(sys.argv[1])), 1, 0
while status:
    home.write("file", b"old" * 10_000)
    child = os.fork()
    if not child:
        left = calls
        def die_at_the_nth_call_of_c(frame, event, function):
            global left
            left -= event == "c_call"
            if left < 0:
                os._exit(1)
        sys.setprofile(die_at_the_nth_call_of_c)
        with home.locked():
            home.write("file", b"new" * 10_000)
        sys.setprofile(None)
        os._exit(0)
    status, calls = os.waitpid(child, 0)[1], calls + 1
    content = home.read("file")
    assert content in (b"old" * 10_000, b"new" * 10_000)
    print(content[:3].decode(), end=" ")
"""
    (said,) = race(code, (home.folder,))
    assert re.fullmatch("(old ){10,}(new ?){4,}", said), "old before it is replaced, new ever after"
    assert not list(home.folder.glob(".file.*")), "what a dead program left went with the next write"


# --------------------------------------------------------------------------------------- the parameters


def dh_pem(p: int, g: int, marker: str = "DH PARAMETERS") -> bytes:
    return PEM.encode(DerSequence([p, g]).encode(), marker).encode()


def test_parameters_come_back_as_they_were_saved(home: Home) -> None:
    assert home.load_group() is None
    home.save_group(GROUP)
    before = (home.folder / "dh_parameters.pem").stat().st_ino
    assert home.load_group() == GROUP
    home.save_group(GROUP)
    assert (home.folder / "dh_parameters.pem").stat().st_ino == before, "written without a need"


PARAMETERS = GROUP.export()
NO_GROUP = "holds no Diffie-Hellman parameters; move it away for new ones"
BAD_GROUPS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", NO_GROUP),
    "garbage": (b"\x00\xff" * 99, NO_GROUP),
    "cut": (PARAMETERS[:200], NO_GROUP),
    "cut_before_the_end": (PARAMETERS[:-20], NO_GROUP),
    "not_ascii": (PARAMETERS.replace(b"A", b"\xc3\xa4"), NO_GROUP),
    "another_type": (dh_pem(GROUP.p, GROUP.g, "X9.42 DH PARAMETERS"), NO_GROUP),
    "negative_p": (dh_pem(-GROUP.p, GROUP.g), NO_GROUP),
    "zero": (dh_pem(0, 0), r"is damaged \(p has 0 bits, not 2048 to 4096\)"),
    "small": (dh_pem(2**1023 + 9, 2), r"is damaged \(p has 1024 bits, not 2048 to 4096\)"),
    "bad_generator": (dh_pem(GROUP.p, GROUP.p - 1), r"is damaged \(g does not generate the subgroup"),
    # One character changed, and p is a prime again of which 2 is a square; but (p - 1) / 2 is none.
    "no_safe_prime": (PARAMETERS[:67] + b"5" + PARAMETERS[68:], "is damaged"),
    # Not the last two of the 358 characters: they may make g another generator, or change nothing at all.
    **{f"flipped_at_{n}": (flip(PARAMETERS, n), f"{NO_GROUP}|is damaged") for n in range(0, 360, 12)},
}


@pytest.mark.parametrize("bad", BAD_GROUPS)
def test_bad_parameters_are_refused_and_kept(home: Home, refuses: Callable, bad: str) -> None:
    content, reason = BAD_GROUPS[bad]
    home.write("dh_parameters.pem", content)
    refuses("dh_parameters.pem", reason)


# ---------------------------------------------------------------------------------------------- the pins


def pin_of(name: str, key: RsaKey) -> str:
    return f"{name} {ssh_line(key)}\n"


def test_the_first_key_is_pinned_and_then_accepted_in_silence(home: Home, keys: Keys, known: Path) -> None:
    peer = KnownPeer(home, ADDRESS)
    peer.check(keys.bob)
    assert not known.exists(), "pinned before its owner has proven that he holds it"
    assert peer.pin(keys.bob) is True
    before = known.stat().st_ino
    peer.check(keys.bob)
    assert peer.pin(keys.bob) is False
    assert known.stat().st_ino == before, "written without a need"
    assert KnownPeer(home, ADDRESS[:-1]).pin(keys.mallory) is True, "another name is another peer"
    assert known.read_text() == pin_of(ADDRESS, keys.bob) + pin_of(ADDRESS[:-1], keys.mallory)


def test_another_key_is_refused_and_the_refusal_says_what_to_do(home: Home, keys: Keys, known: Path) -> None:
    before = "# friends\n\n" + pin_of("carol", keys.alice) + pin_of("bob", keys.bob)
    known.write_text(before)
    for use in (bob(home).check, bob(home).pin):
        with pytest.raises(TrustError, match="the key of bob is not the one pinned") as refused:
            use(keys.mallory)
        assert f"pinned:       {fingerprint(keys.bob)}  ({known}, line 4)\n" in str(refused.value)
        assert f"presented:    {fingerprint(keys.mallory)}\n" in str(refused.value)
        assert str(refused.value).endswith(f"--peer {fingerprint(keys.mallory)}")
        assert fingerprint(keys.alice) not in str(refused.value)
    assert known.read_text() == before


def test_each_of_several_pinned_keys_is_accepted(home: Home, keys: Keys, known: Path) -> None:
    known.write_text(pin_of("bob", keys.bob) + pin_of("bob", keys.alice))
    assert (bob(home).pin(keys.bob), bob(home).pin(keys.alice)) == (False, False)
    with pytest.raises(TrustError, match=r"line 1\)\n.*line 2\)\n  presented"):
        bob(home).check(keys.mallory)


def test_a_key_pinned_by_somebody_else_after_the_check_is_found(home: Home, keys: Keys, known: Path) -> None:
    peer = bob(home)
    peer.check(keys.mallory)
    known.write_text(pin_of("bob", keys.bob))
    with pytest.raises(TrustError, match="the key of bob is not the one pinned"):
        peer.pin(keys.mallory)
    assert known.read_text() == pin_of("bob", keys.bob)


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("comment", ["# \u00e4", "  # indented", "# one\x0b\x0c\x1c\x85\u2028line"])
def test_what_others_wrote_survives_byte_for_byte(
    home: Home, keys: Keys, known: Path, end: str, comment: str
) -> None:
    lines = [comment, "", " \t", f"  carol\t{ssh_line(keys.alice)}  a comment", f"bobby {ssh_line(keys.bob)}"]
    before = "".join(line + end for line in lines).encode()
    for written in (before, before[:-1]):  # a last line without an end gets one
        known.write_bytes(written)
        assert bob(home).pin(keys.bob) is True
        assert known.read_bytes() == before + pin_of("bob", keys.bob).encode()


def test_a_byte_order_mark_does_not_hide_a_pin(home: Home, keys: Keys, known: Path) -> None:
    known.write_text(pin_of("bob", keys.bob), encoding="utf-8-sig")
    bob(home).check(keys.bob)
    with pytest.raises(TrustError, match="the key of bob is not the one pinned"):
        bob(home).check(keys.mallory)


def test_the_key_asked_for_takes_the_place_of_the_old_ones(home: Home, keys: Keys, known: Path) -> None:
    carol = pin_of("carol", keys.bob)
    known.write_text(f"# a\n{pin_of('bob', keys.bob)}{carol}{pin_of('bob', keys.mallory)}\n")
    assert bob(home, only=keys.alice).pin(keys.alice) is True
    assert known.read_text() == f"# a\n{carol}\n{pin_of('bob', keys.alice)}"
    assert bob(home, only=keys.alice).pin(keys.alice) is False
    assert bob(home).pin(keys.alice) is False


@pytest.mark.parametrize("pinned", [True, False])
def test_any_key_but_the_one_asked_for_is_refused(home: Home, keys: Keys, known: Path, pinned: bool) -> None:
    before = pin_of("bob", keys.bob) if pinned else ""
    known.write_text(before)
    both = f": {fingerprint(keys.alice)}\n  presented: {fingerprint(keys.bob)}\n"
    for use in (bob(home, only=keys.alice).check, bob(home, only=keys.alice).pin):
        with pytest.raises(TrustError, match=f"(?s)not the one asked for.*{re.escape(both)}"):
            use(keys.bob)
    assert known.read_text() == before


BAD_LINES: dict[str, Callable[[str], str]] = {
    "another_type": lambda line: line.replace("ssh-rsa", "ssh-dss"),
    "ecdsa": lambda _: f"bob {ECC.generate(curve='P-256').public_key().export_key(format='OpenSSH')}",
    "no_key": lambda line: line.rsplit(" ", 1)[0],
    "no_name": lambda line: line.split(" ", 1)[1],
    "name_alone": lambda _: "bob",
    "marker": lambda line: "@revoked " + line,
    "no_base64": lambda line: line[:-1],
    "cut": lambda line: line[:-8],
    "a_character_too_many": lambda line: line[:60] + "!" + line[60:],
    "zeros": lambda _: "bob ssh-rsa " + "AAAA" * 90,
    "der": lambda _: "bob 0\x7f\x01",
}


@pytest.mark.parametrize("only", [True, False])
@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_malformed_line_is_refused_by_its_number(
    home: Home, keys: Keys, known: Path, bad: str, only: bool
) -> None:
    line = BAD_LINES[bad](pin_of("bob", keys.bob).rstrip())
    before = f"# friends\n{pin_of('carol', keys.alice)}{line}\n"
    known.write_text(before)
    with refusal(known, ", line 3: not NAME ssh-rsa BASE64; mend or delete it"):
        bob(home, only=keys.bob if only else None).pin(keys.bob)
    assert known.read_text() == before


def test_known_peers_that_is_no_text_is_refused(home: Home, refuses: Callable) -> None:
    home.write("known_peers", b"# caf\xe9\n")
    refuses("known_peers", "is damaged: it is not UTF-8 text")


@needs("ssh-keygen")
def test_ssh_keygen_reads_known_peers(home: Home, keys: Keys, known: Path) -> None:
    KnownPeer(home, "alice").pin(keys.alice)
    KnownPeer(home, ADDRESS).pin(keys.bob)
    shown = [line.split()[1:3] for line in run("ssh-keygen", "-lf", known).splitlines()]
    assert shown == [[fingerprint(keys.alice), "alice"], [fingerprint(keys.bob), ADDRESS]]
    assert run("ssh-keygen", "-F", ADDRESS, "-f", known).endswith(pin_of(ADDRESS, keys.bob))


# --------------------------------------------------------------------------------------------- any bytes


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(list(FILES)),
    cut=st.tuples(st.integers(0, 1800), st.integers(0, 1800)).map(sorted),
    whole=st.sampled_from(["replaced", "changed", "cut"]),
    new=st.binary(max_size=100),
)
def test_any_bytes_are_a_value_or_a_file_error(
    home: Home, keys: Keys, name: str, cut: list[int], whole: str, new: bytes
) -> None:
    pins = pin_of("carol", keys.alice) + pin_of("bob", keys.bob)
    good = {"identity.pem": pem_of(keys.bob), "dh_parameters.pem": PARAMETERS, "known_peers": pins.encode()}[
        name
    ]
    changed = good[: cut[0]] + new + good[cut[1] :]
    content = {"replaced": new, "changed": changed, "cut": good[: cut[0]] + new}[whole]
    home.write(name, content)
    try:
        value = FILES[name][0](home, keys)
    except (FileError, TrustError) as error:
        allowed = FileError if name != "known_peers" else (FileError, TrustError)
        assert isinstance(error, allowed)  # noqa: PT017 (most of the time there is none)
        assert str(home.folder / name) in str(error)  # noqa: PT017
    else:
        assert isinstance(value, (RsaKey, Group, type(None)))
    assert home.read(name) == content
