"""Take the checks away, one at a time: the test meant for each must go red.

Weakened copies of the programs run in a process of their own. That the same tests are green without a
weakening, each run of all tests shows. A test that goes red because the patch itself is wrong says nothing
about the check: an error of that kind, anywhere in pytest's output, is no red.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from mallory import ATTACKS
from weakenings import LIST, PROGRAMS, SESSION, WEAKENINGS, Weakening, weaken

TESTS_FAILED, TESTS_PASSED = 1, 0  # pytest's exit statuses; from 2 on, tests could not be run
# An exception that only a wrong patch raises, as pytest, or a program's own traceback, tells it.
OF_THE_PATCH = re.compile(
    r"^(?:E\s+)?\s*((?:Type|Name|UnboundLocal|Attribute|Import|ModuleNotFound|Syntax|Indentation)Error)(?::|$)",
    re.MULTILINE,
)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a copy of the programs and their tests, with the tests as pytest has compiled them already."""
    folder = tmp_path / "copy"
    half_written = shutil.ignore_patterns("*.pyc.*")
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=half_written)
    for name in (*PROGRAMS, ".pytest.ini"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest without plug-ins, exhaustive tests included, and without what depends on how we were run."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", *arguments]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("COV", "PYTEST"))}
    return subprocess.run(
        command,
        cwd=folder,
        env={"TEST_DEADLINE": "10", **inherited, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("weakening", LIST, ids=lambda weakening: weakening.name)
def test_the_test_meant_for_it_goes_red(copy: Path, weakening: Weakening) -> None:
    weaken(copy, weakening)
    done = run(copy, "-x", f"tests/{weakening.test}")
    if done.returncode == TESTS_PASSED and " skipped" in done.stdout:
        pytest.skip(f"the test meant for it cannot run here: {done.stdout}")
    assert done.returncode == TESTS_FAILED, done.stdout
    assert not OF_THE_PATCH.search(done.stdout), done.stdout


@pytest.mark.parametrize(
    ("test", "error", "body"),
    [
        (SESSION + "[ffdhe2048]", "TypeError", "return original(z)"),
        (SESSION + "[ffdhe2048]", "NameError", "return no_such_name"),
        (SESSION + "[ffdhe2048]", "AttributeError", "return z.no_such_method()"),
        (WEAKENINGS["cut reported as success"].test, "NameError", "return no_such_name"),
    ],
    ids=["TypeError", "NameError", "AttributeError", "in a program"],
)
def test_a_red_of_the_patch_itself_is_none(copy: Path, test: str, error: str, body: str) -> None:
    patch = f"def derive_keys(z, direction, th, original=derive_keys): {body}"
    weaken(copy, Weakening("wrong", test, patch))
    done = run(copy, "-x", f"tests/{test}")
    assert done.returncode == TESTS_FAILED, done.stdout
    assert set(OF_THE_PATCH.findall(done.stdout)) == {error}, done.stdout


def test_every_patch_fits_and_is_python(tmp_path: Path) -> None:
    for weakening in LIST:
        for name in PROGRAMS:
            shutil.copy(ROOT / name, tmp_path)
        weaken(tmp_path, weakening)
        weakened = (tmp_path / weakening.file).read_text()
        assert weakened != (ROOT / weakening.file).read_text(), weakening.name
        compile(weakened, weakening.name, "exec")


def test_every_weakening_is_there_once() -> None:
    assert len(WEAKENINGS) == len(LIST)
    patches = {(weakening.file, weakening.edits, weakening.statements) for weakening in LIST}
    assert len(patches) == len(LIST)


def test_every_check_that_mallory_meets_is_in_the_list() -> None:
    assert {check.name for attack in ATTACKS.values() for check in attack.checks} <= set(WEAKENINGS)
