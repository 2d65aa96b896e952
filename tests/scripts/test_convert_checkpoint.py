"""The conversion command as a user calls it."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.convert_checkpoint import main

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


# Here, not in a process of their own, which would begin with seconds of imports.
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("import", "--hf", "{}", "--out", "{}/out"), "config.json"),
        (("inspect", "{}"), "config.json"),
        (("export", "--checkpoint", "{}", "--out", "{}/out"), "{}/checkpoint.json"),
    ],
)
def test_a_folder_of_no_known_form_is_named(
    arguments: tuple[str, ...], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.format(tmp_path) for argument in arguments]) == 1
    errors = capsys.readouterr().err
    assert str(tmp_path) in errors
    assert named.format(tmp_path) in errors
    assert "remedy" in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["0", "5XB", "-1GB"])
def test_a_bad_size_is_refused(size: str, tmp_path: Path) -> None:
    result = convert("export", "--checkpoint", str(tmp_path), "--out", "x", f"--max-shard-size={size}")
    assert result.returncode == 2
    assert size in result.stderr
