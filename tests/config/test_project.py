"""The project's own files: what is installed, and that a broken installation is never taken for a complete one."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Stands for an interpreter: counts what is asked of it, and fails where it is told to.
INTERPRETER = """#!/bin/bash
here={here}
case "$*" in
  *version_info\\ \\<*) [ ! -e $here/old ] ;;
  *version_info*) echo 3.12 ;;
  --version) echo Python 3.9.1 ;;
  *print*) echo 1 ;;
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip install "*) echo x >> $here/installs; [ ! -e $here/broken ] ;;
  *) echo "runs $*" ;;
esac
"""


class Checkout:
    """A folder with the Makefile and an interpreter that only pretends to install."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "check out"  # a path with a space
        self.root.mkdir()
        self.switches = folder / "switches"
        self.switches.mkdir()
        shutil.copy(ROOT / "Makefile", self.root)
        (self.root / "pyproject.toml").write_text("")
        self.python = folder / "python3.12"
        self.python.write_text(INTERPRETER.format(here=self.switches))
        self.python.chmod(0o755)
        self.stamp = self.root / ".venv-3.12" / ".complete"

    def make(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["make", *arguments, f"PYTHON={self.python}"],
            cwd=self.root,
            # These tests may themselves have been started by make.
            env={name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    def change_project_file(self) -> None:
        # The installation is moved into the past: two writes within one tick of the file system's clock look alike.
        os.utime(self.stamp, (1_000_000_000, 1_000_000_000))

    @property
    def installs(self) -> int:
        log = self.switches / "installs"
        return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    return Checkout(tmp_path)


def test_the_first_target_installs_and_the_second_does_not(checkout: Checkout):
    first = checkout.make("train", "ARGS=run.seed=3")
    assert first.returncode == 0, first.stderr
    assert "runs train.py run.seed=3" in first.stdout
    assert checkout.installs == 1
    assert "runs -m pytest -q" in checkout.make("test").stdout
    assert checkout.installs == 1


def test_a_changed_project_file_installs_again(checkout: Checkout):
    checkout.make("test")
    checkout.change_project_file()
    assert checkout.make("test").returncode == 0
    assert checkout.installs == 2


def test_a_failed_installation_leaves_no_stamp(checkout: Checkout):
    (checkout.switches / "broken").touch()
    failed = checkout.make("test")
    assert failed.returncode != 0
    assert "runs" not in failed.stdout
    assert not checkout.stamp.exists()
    half_made = checkout.stamp.parent / "half-made"
    half_made.touch()
    (checkout.switches / "broken").unlink()
    assert checkout.make("test").returncode == 0
    assert checkout.stamp.exists()
    assert not half_made.exists()  # built anew


def test_a_failed_update_leaves_no_stamp(checkout: Checkout):
    checkout.make("test")
    (checkout.switches / "broken").touch()
    checkout.change_project_file()
    assert checkout.make("test").returncode != 0
    assert not checkout.stamp.exists()


def test_an_old_interpreter_is_refused(checkout: Checkout):
    (checkout.switches / "old").touch()
    refused = checkout.make("check")
    assert refused.returncode != 0
    assert "Python 3.11 or newer is needed" in refused.stderr
    assert "is Python 3.9.1" in refused.stderr
    assert "make check PYTHON=" in refused.stderr
    assert checkout.installs == 0


def test_an_environment_whose_interpreter_is_gone_is_built_anew(checkout: Checkout):
    checkout.make("test")
    (checkout.stamp.parent / "bin" / "python").unlink()
    assert checkout.make("test").returncode == 0
    assert checkout.installs == 2


def test_help_lists_every_target(checkout: Checkout):
    listed = {line.split()[1] for line in checkout.make("help").stdout.splitlines()}
    assert listed >= {"train", "test", "test-long", "check", "bench", "clean", "help"}


def test_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    everything = [*project["dependencies"], *extras["gpu"], *extras["dev"]]
    # NVIDIA Apex is built from source; the package of that name on PyPI is something else.
    assert not [line for line in everything if line.lower().startswith("apex")]
    assert "torch>=2.11,<2.14" in everything
    assert "megatron-core>=0.16.1,<0.20" in everything
    assert project["requires-python"] == ">=3.11"


@pytest.mark.long
def test_a_start_imports_nothing_that_only_its_end_needs() -> None:
    """Of the packages that take seconds; what Megatron imports by itself is not ours to choose."""
    program = (
        "import sys, nld_train.training.run; print(*{name.partition('.')[0] for name in sys.modules} & "
        "{'transformers', 'datasets', 'matplotlib', 'sklearn', 'pandas', 'lm_eval', 'peft'})"
    )
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == []
