"""The conversion command as a user calls it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def convert(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "scripts/convert_checkpoint.py", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_help_names_every_option() -> None:
    result = convert("export", "--help")
    assert result.returncode == 0
    for option in ("--checkpoint", "--out", "--dtype", "--max-shard-size", "--tokenizer", "--overwrite"):
        assert option in result.stdout


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    result = convert("export", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "out"))
    assert result.returncode == 1
    assert str(tmp_path / "checkpoint.json") in result.stderr
    assert "remedy" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["0", "5XB", "-1GB"])
def test_a_bad_size_is_refused(size: str, tmp_path: Path) -> None:
    result = convert("export", "--checkpoint", str(tmp_path), "--out", "x", f"--max-shard-size={size}")
    assert result.returncode == 2
    assert size in result.stderr
