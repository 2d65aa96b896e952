"""scripts/inspect_batch.py: the batch that a run would read there, in plain text where there is no terminal."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nld_train.testing.jobs import ROOT, importing_project
from scripts.inspect_batch import main

Inspect = Callable[..., tuple[int, str, str]]
SHORT = ("data.sequence_length=64", "objective.block_size=16", "train.validation_samples=8", "model.vocab_size=512")


@pytest.fixture
def inspect(cache: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Exit status, output and errors."""

    def call(*arguments: str) -> tuple[int, str, str]:
        status = main([*arguments, f"data.cache_dir={cache}"])
        return (status, *capsys.readouterr())

    return call


def test_a_joint_batch_is_written_out(inspect: Inspect) -> None:
    options = (*SHORT, "data.document_mask=boundary", "objective.noisy_fraction=1", "model.num_layers=1")
    status, text, errors = inspect("--stage", "joint", "--step", "2", "--sequences", "4", "--blocks", "4", *options)
    assert status == 0, errors
    assert "\x1b[" not in text
    assert "(2 of 640), rank 0 of 1, micro-batch 0 of 2" in text
    assert "4 sequences of 64 clean tokens and 64 noisy rows: 128 rows, with a row table; blocks of 16" in text
    first = 960 * 8 + 8  # 960 steps of the AR stage, one of this
    found = re.findall(r"sample (\d+), sample \d+ of (code|prose), noise key (\d+)", text)
    assert [(int(sample), int(key)) for sample, _, key in found] == [(first + j, first + j) for j in range(4)]
    assert [corpus for _, corpus, _ in found].count("code") in (2, 3)  # 0.7 of 4
    # What a line says of a block is what its text shows.
    lines = re.findall(r"block \d+: tokens (\d+)\.\.(\d+), (\d+) masked, weight (\S+)  (.*)", text)
    assert len(lines) >= 16
    for begin, end, num_masked, weight, shown in lines:
        assert shown.count("⟦") == shown.count("⟧") == int(num_masked)
        assert 1 <= int(num_masked) <= int(end) - int(begin) + 1
        assert float(weight) > 0
    assert len(re.findall(r"\d+\.\.\d+ noisy block \d+: positions", text)) == len(lines)
    for document, end in re.findall(r"clean tokens (\d+)\.\.(\d+): positions 0\.\.", text):
        assert 0 <= int(document) <= int(end) < 64


def test_ranks_and_micro_batches_are_parts_of_one_step(inspect: Inspect) -> None:
    found = []
    for rank, micro_batch in ((0, 0), (1, 0), (0, 1)):
        status, text, errors = inspect(
            "--step", "3", "--rank", str(rank), "--ranks", "2", "--micro-batch", str(micro_batch),
            "--sequences", "2", *SHORT, "train.micro_batch_size=2",
        )  # fmt: skip
        assert status == 0, errors
        assert "plain layout" in text  # a stage without the diffusion loss
        assert "masked, weight" not in text
        found.append([int(number) for number in re.findall(r"sample (\d+),", text)])
    assert found == [[16, 17], [18, 19], [20, 21]]


def test_what_is_not_there_is_refused(inspect: Inspect) -> None:
    for arguments, words in (
        (("--stage", "third"), ["--stage: there is no third", "ar, joint"]),
        (("--step", "0"), ["--step: there is no 0", "steps 1.."]),
        (("--rank", "1"), ["--rank: there is no 1"]),
        (("data=prepared", "data.corpus=nowhere"), ["data.corpus: nowhere is neither"]),
    ):
        status, text, errors = inspect(*SHORT, *arguments)
        assert (status, text) == (2, "")
        for word in words:
            assert word in errors


def test_help_is_quick_and_says_what_to_type() -> None:
    command = [sys.executable, "-X", "importtime", str(ROOT / "scripts" / "inspect_batch.py"), "--help"]
    result = subprocess.run(command, env=importing_project(), capture_output=True, text=True, check=True)
    assert "--stage" in result.stdout
    assert "data.document_mask=boundary" in result.stdout
    assert not re.search(r"\|\s+torch$", result.stderr, re.MULTILINE)
