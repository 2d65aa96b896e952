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


OPTIONS = {
    "import": ("--hf", "--out", "--dtype", "--overwrite"),
    "export": ("--checkpoint", "--out", "--dtype", "--max-shard-size", "--tokenizer", "--overwrite"),
    "verify": ("--checkpoint", "--hf", "--no-logits"),
    "inspect": ("folder",),
}


@pytest.mark.parametrize("command", OPTIONS)
def test_help_names_every_option(command: str) -> None:
    result = convert(command, "--help")
    assert result.returncode == 0
    for option in OPTIONS[command]:
        assert option in result.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(("import", "--hf", "{}", "--out", "{}/out"), "config.json"), (("inspect", "{}"), "config.json")],
)
def test_a_folder_of_no_known_form_is_named(arguments: tuple[str, ...], named: str, tmp_path: Path) -> None:
    result = convert(*(argument.format(tmp_path) for argument in arguments))
    assert result.returncode == 1
    assert str(tmp_path) in result.stderr
    assert named in result.stderr
    assert "remedy" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


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
