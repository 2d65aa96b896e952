"""The preparing command as a user calls it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "scripts/prepare_data.py", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"},
    )  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"body": f"text number {number} of some words " * 5}) for number in range(200)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_prepare_inspect_and_index(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    command = (
        "prepare", out, "--input", source, "--text-field", "body", "--tokenizer", "train:300", "--workers", 2,
        "--shard-mb", 0.01, "--validation-fraction", 0.1,
    )  # fmt: skip
    first = run(*command)
    assert (first.returncode, first.stderr.count("Traceback")) == (0, 0), first.stderr
    assert "2 workers" in first.stderr
    assert f"data=prepared data.corpus={out}" in first.stdout
    again = run(*command)
    assert again.returncode == 0
    assert "is complete: nothing to do" in again.stderr

    for flag in ("inspect", "--inspect"):
        shown = run(flag, out, "--samples", 1, "--verify")
        assert shown.returncode == 0, shown.stderr
        for text in ("out: 1 file", "text_field: body", "input x.jsonl", "text number", "have the sha256", "</s>"):
            assert text in shown.stdout
    (out / "train-00001.bin").write_bytes(b"")
    damaged = run("inspect", out)
    assert damaged.returncode == 1
    assert "train-00001.bin: holds 0 bytes" in damaged.stderr
    assert "remedy:" in damaged.stderr


def test_index_is_built_ahead(tmp_path: Path, source: Path) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    assert run(
        "prepare", out, "--input", source, "--text-field", "body", "--tokenizer", "train:300", "--workers", 1,
        "--validation-fraction", 0.1,
    ).returncode == 0  # fmt: skip
    result = run(
        "index", "data=prepared", f"data.corpus={out}", f"data.cache_dir={cache}", "data.sequence_length=64",
        "stages.ar.tokens=31936", "stages.joint.tokens=1000",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "stage ar: samples 0 to 503 are indexed" in result.stderr  # 499 in whole steps of 8
    assert "stage joint: samples 504 to 519 are indexed" in result.stderr
    assert len([path for path in (cache / "index").iterdir() if path.is_dir()]) > 1


def test_conversations(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "How? 日本"}, {"role": "assistant", "content": "So."}]
    source = tmp_path / "x.jsonl"
    source.write_text("\n".join(json.dumps({"turns": messages, "id": n}) for n in range(3)), encoding="utf-8")
    out = tmp_path / "out.jsonl"
    result = run("prepare", out, "--input", source, "--messages-field", "turns")
    assert result.returncode == 0, result.stderr
    assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == [{"messages": messages}] * 3
    with source.open("a") as stream:
        stream.write("\n" + json.dumps({"turns": messages[:1]}))
    result = run("prepare", tmp_path / "bad.jsonl", "--input", source, "--messages-field", "turns")
    assert result.returncode == 1
    assert "x.jsonl: line 4: has no answer" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "x.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        (("prepare", "OUT", "--input", "x.jsonl"), 2, "--tokenizer is needed"),
        (("prepare", "OUT", "--input", "nobody/nothing", "--tokenizer", "train:300"), 1, "cannot be found on the Hub"),
        (("prepare", "OUT", "--input", "README.md", "--tokenizer", "nowhere"), 1, "--tokenizer: 'nowhere' is neither"),
        (("inspect", "docs"), 1, "docs: is not a prepared corpus"),
        (("index", "data=prepared", "data.corpus=nowhere"), 1, "data.corpus: nowhere is neither"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, arguments: tuple[str, ...], status: int, named: str) -> None:
    out = tmp_path / "out"
    result = run(*(out if argument == "OUT" else argument for argument in arguments))
    assert result.returncode == status
    assert named in result.stderr
    assert "Traceback" not in result.stderr
    assert not out.exists()


def test_help_has_examples_and_every_option() -> None:
    shown = run("--help").stdout
    assert "prepare_data.py prepare data/books --input" in shown
    options = run("prepare", "--help").stdout
    for option in ("--input", "--format", "--text-field", "--messages-field", "--source-field", "--tokenizer",
                   "--workers", "--shard-mb", "--validation-fraction", "--name", "--split"):  # fmt: skip
        assert option in options
