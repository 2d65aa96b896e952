"""scripts/gpu_check.sh: what it starts, and what it says of parts that fail. (What it starts needs a GPU.)"""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]

# In place of Python: the check of the machine, tests of one file that fail, and a profile whose second kind fails.
PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in
"-W ignore -") cat >/dev/null; exit "$MACHINE" ;;
*pytest*test_step.py*) echo "1 failed, 7 passed in 3.21s (0:00:03)"; exit 1 ;;
*pytest*) echo "2 passed, 1 skipped in 1.0s" ;;
*profile*--go-on*) printf 'kind 3: 4 ms\\nshares of the step, all kinds\\nspeed, required 1.20: NO\\n'; exit 1 ;;
*profile*) printf 'kind 1: 4 ms\\nshares of the step, one kind\\n'; exit "$FIRST" ;;
esac
"""


def gpu_check(tmp_path: Path, *parts: str, machine: int = 0, first: int = 3) -> tuple[int, list[str], list[str]]:
    """Exit status, lines of the output, and the calls of Python."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    (tmp_path / "programs").mkdir()
    shutil.copy(ROOT / "scripts" / "gpu_check.sh", tmp_path / "scripts")
    for test in (ROOT / "tests" / "gpu").glob("test_*.py"):
        (tmp_path / "tests" / "gpu" / test.name).touch()
    python, calls = tmp_path / "programs" / "python", tmp_path / "calls"
    python.write_text(PYTHON)
    python.chmod(0o755)
    refuses = tmp_path / "programs" / "nvidia-smi"
    refuses.write_text("#!/bin/sh\nexit 9\n")
    refuses.chmod(0o755)
    environment = os.environ | {"CALLS": str(calls), "MACHINE": str(machine), "FIRST": str(first)}
    environment["PATH"] = f"{tmp_path / 'programs'}:{environment['PATH']}"
    finished = subprocess.run(
        [str(tmp_path / "scripts" / "gpu_check.sh"), str(python), *parts],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return finished.returncode, finished.stdout.splitlines(), calls.read_text().splitlines()


def test_a_part_that_fails_is_named_and_the_others_are_run(tmp_path: Path) -> None:
    status, lines, calls = gpu_check(tmp_path)
    assert status == 1
    assert lines[0].startswith("nvidia-smi does not answer")
    end = lines[max(i for i, line in enumerate(lines) if line.startswith("shares of")) :]
    assert end[0] == "shares of the step, all kinds"
    assert sum("one kind" in line for line in lines) == 1  # while it was measured, not again at the end
    found = {line.split()[0]: " ".join(line.split()[1:]).rpartition(",")[0] for line in end[3:-1]}
    assert found == {
        "test_attention": "passed, 2 passed, 1 skipped",
        "test_kernels": "passed, 2 passed, 1 skipped",
        "test_main_job": "passed, 2 passed, 1 skipped",
        "test_step": "FAILED (exit 1), 1 failed, 7 passed",
        "profile": "FAILED (exit 1), 1 required figures missed",
    }
    assert end[-1] == "gpu_check: FAILED"
    assert ["--go-on" in call for call in calls if "profile" in call] == [False, True]
    assert any("-n 8 " in call for call in calls if "test_step" in call)


def test_all_parts_pass(tmp_path: Path) -> None:
    status, lines, calls = gpu_check(tmp_path, "profile", "attention", first=0)
    assert status == 0
    assert lines[-1] == "gpu_check: passed"
    assert sum("profile" in call for call in calls) == 1
    assert not any("pytest" in call for call in calls)


def test_without_a_gpu_nothing_is_run(tmp_path: Path) -> None:
    status, lines, calls = gpu_check(tmp_path, machine=1)
    assert status == 1
    assert "FAILED: no GPU that torch can use" in lines[-1]
    assert len(calls) == 1
