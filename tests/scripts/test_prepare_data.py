"""The preparing command as a user calls it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.prepare_data import main

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


# Those below need no process of their own, which would begin with seconds of imports.
def test_conversations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    messages = [{"role": "user", "content": "How? 日本"}, {"role": "assistant", "content": "So."}]
    source = tmp_path / "x.jsonl"
    source.write_text("\n".join(json.dumps({"turns": messages, "id": n}) for n in range(3)), encoding="utf-8")
    out = tmp_path / "out.jsonl"
    assert main(["prepare", str(out), "--input", str(source), "--messages-field", "turns"]) == 0
    assert f"3 conversations in {out}" in capsys.readouterr().out
    assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == [{"messages": messages}] * 3
    with source.open("a") as stream:
        stream.write("\n" + json.dumps({"turns": messages[:1]}))
    bad = str(tmp_path / "bad.jsonl")
    assert main(["prepare", bad, "--input", str(source), "--messages-field", "turns"]) == 1
    assert "x.jsonl: line 4: has no answer" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "x.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("prepare", "OUT", "--input", "nobody/nothing", "--tokenizer", "train:300"), "cannot be found on the Hub"),
        (("prepare", "OUT", "--input", "README.md", "--tokenizer", "nowhere"), "--tokenizer: 'nowhere' is neither"),
        (("inspect", "docs"), "docs: is not a prepared corpus"),
        (("index", "data=prepared", "data.corpus=nowhere"), "data.corpus: nowhere is neither"),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    named: str,
) -> None:
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    assert main([str(out) if argument == "OUT" else argument for argument in arguments]) == 1
    assert named in capsys.readouterr().err
    assert not out.exists()


def test_a_missing_option_is_asked_for(tmp_path: Path) -> None:
    result = run("prepare", tmp_path / "out", "--input", "x.jsonl")
    assert result.returncode == 2
    assert "--tokenizer is needed" in result.stderr
    assert not (tmp_path / "out").exists()


def test_help_has_examples_and_every_option() -> None:
    shown = run("--help").stdout
    assert "prepare_data.py prepare data/books --input" in shown
    options = run("prepare", "--help").stdout
    for option in ("--input", "--format", "--text-field", "--messages-field", "--source-field", "--tokenizer",
                   "--workers", "--shard-mb", "--validation-fraction", "--name", "--split"):  # fmt: skip
        assert option in options
