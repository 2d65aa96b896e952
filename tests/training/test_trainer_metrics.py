"""metrics.jsonl of the real trainer: the metrics of each step, norms of the single terms, and a chat stage resumed."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nld_train.objective.losses import NUM_BUCKETS
from nld_train.testing.jobs import BATCH, LENGTH, ON_CPU, ROOT, SMALL, last_checkpoint, last_step, records

CHAT_LENGTH = 128
STEPS = {"ar": 2, "joint": 4, "sft": 14}
CHAT_BEGINS = STEPS["ar"] + STEPS["joint"]  # its first step is the next one
CHECKPOINT_INTERVAL = 4
KILL_AFTER_STEP = 10
TERM_NORMS = {"ar_grad_norm", "diffusion_grad_norm"}

OVERRIDES = [
    "model.num_layers=2",
    *SMALL,
    "data.num_workers=1",
    "train.micro_batch_size=2",
    "train.validation_interval=5",
    "train.validation_samples=4",
    f"stages.ar.tokens={STEPS['ar'] * BATCH * LENGTH}",
    f"stages.joint.tokens={STEPS['joint'] * BATCH * LENGTH}",
    "+stage@stages.sft=sft",
    "stages.sft.chat=stdlib_chat",
    f"stages.sft.tokens={STEPS['sft'] * BATCH * CHAT_LENGTH}",
    f"stages.sft.sequence_length={CHAT_LENGTH}",
    "stages.sft.chat_validation_samples=2",
    "stages.sft.lr=1e-3",
    "stages.sft.min_lr=1e-4",
    f"checkpoint.interval_steps={CHECKPOINT_INTERVAL}",
    "checkpoint.interval_seconds=0",
    "export.enabled=false",
]


def start(run_dir: Path, cache: Path, *extra: str) -> subprocess.Popen[str]:
    """Output goes to a file: a pipe that nobody reads would stop the run."""
    with run_dir.with_suffix(".log").open("w") as file:
        return subprocess.Popen(
            [sys.executable, "train.py", f"run.dir={run_dir}", f"data.cache_dir={cache}", *OVERRIDES, *extra],
            cwd=ROOT, env=ON_CPU, stdout=file, stderr=file, text=True, start_new_session=True,
        )  # fmt: skip


def finish(process: subprocess.Popen[str], run_dir: Path) -> None:
    assert process.wait(timeout=240) == 0, run_dir.with_suffix(".log").read_text()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> list[dict[str, Any]]:
    """Without interruption and without norms of the single terms."""
    run_dir = tmp_path_factory.mktemp("runs") / "plain"
    finish(start(run_dir, cache), run_dir)
    return records(run_dir)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, cache: Path, plain: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With norms of the single terms every 2 steps, killed in the middle of the chat stage and started again.

    After ``plain``: the corpus is prepared, and the chat's conversations are.
    """
    run_dir = tmp_path_factory.mktemp("runs") / "resumed"
    process = start(run_dir, cache, "train.term_norm_interval=2")
    deadline = time.monotonic() + 200
    while last_step(run_dir) < KILL_AFTER_STEP or last_checkpoint(run_dir) <= CHAT_BEGINS:
        assert process.poll() is None, run_dir.with_suffix(".log").read_text()
        assert time.monotonic() < deadline, run_dir.with_suffix(".log").read_text()
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL, run_dir.with_suffix(".log").read_text()
    saved = last_checkpoint(run_dir)
    assert CHAT_BEGINS < saved < sum(STEPS.values())
    finish(start(run_dir, cache, "train.term_norm_interval=2"), run_dir)
    assert f"step {saved}" in run_dir.with_suffix(".log").read_text()
    return records(run_dir)


def steps_of(found: list[dict[str, Any]], *stages: str) -> list[dict[str, Any]]:
    return [record for record in found if "loss" in record and record["stage"] in stages]


def test_a_joint_step_reports_what_was_masked_and_what_it_cost(plain: list[dict[str, Any]]) -> None:
    steps = steps_of(plain, "joint", "sft")
    assert [record["step"] for record in steps] == list(range(STEPS["ar"] + 1, sum(STEPS.values()) + 1))
    for record in steps:
        assert 0 <= record["ar_accuracy"] <= 1
        assert 0 <= record["diffusion_accuracy"] <= 1
        assert 0 < record["masked_share"] <= 1
        assert 0 < record["mask_ratio_std"] <= 0.5
        assert record["largest_weight"] >= 1
        for percent in range(100 // NUM_BUCKETS, 101, 100 // NUM_BUCKETS):
            loss, accuracy = (record[f"diffusion_{name}_at_{percent}"] for name in ("loss", "accuracy"))
            assert (loss is None) == (accuracy is None)
            assert loss is None or 0 < loss < 20
        assert any(record[f"diffusion_loss_at_{percent}"] for percent in range(10, 101, 10))
    # The largest weight is that of a block with one masked token: the same in most steps.
    for name in ("ar_accuracy", "masked_share", "mask_ratio_std"):
        assert len({record[name] for record in steps}) > len(steps) // 2, f"{name} hardly changes"
    for record in steps_of(plain, "ar"):
        assert 0 <= record["ar_accuracy"] <= 1
        assert not {"masked_share", "largest_weight", "diffusion_loss_at_10"} & record.keys()


def test_a_chat_stage_is_validated_on_both_kinds_of_text(plain: list[dict[str, Any]]) -> None:
    validations = [record for record in plain if "val_ar_loss" in record]
    assert [record["step"] for record in validations] == [1, 2, 3, 5, 6, 7, 10, 15, 20]
    for record in validations:
        assert record["val_diffusion_loss"] > 0
        names = {"val_chat_ar_loss", "val_chat_diffusion_loss"}
        assert names & record.keys() == (names if record["stage"] == "sft" else set())
        assert all(record[name] > 0 for name in names & record.keys())


def test_norms_of_the_terms_come_at_their_interval_and_change_nothing(
    plain: list[dict[str, Any]], resumed: list[dict[str, Any]]
) -> None:
    """The other run was also killed and resumed: every number but the norms is that of ``plain``, to the last bit."""
    for record in resumed:
        is_due = "loss" in record and record["stage"] != "ar" and record["step"] % 2 == 0
        assert TERM_NORMS & record.keys() == (TERM_NORMS if is_due else set()), record["step"]
        if is_due:
            both = record["ar_grad_norm"] + record["diffusion_grad_norm"]
            assert record["ar_grad_norm"] > 0
            assert record["diffusion_grad_norm"] > 0
            # The gradients add up, so their norms keep the triangle inequalities (rounding aside).
            assert record["grad_norm"] <= both * (1 + 1e-5)
            assert record["grad_norm"] >= abs(record["ar_grad_norm"] - record["diffusion_grad_norm"]) * (1 - 1e-5)
    assert [{k: v for k, v in record.items() if k not in TERM_NORMS} for record in resumed] == plain
    assert not any(TERM_NORMS & record.keys() for record in plain)


def test_a_chat_stage_killed_and_resumed_goes_on_with_the_samples_it_would_have_seen(
    plain: list[dict[str, Any]], resumed: list[dict[str, Any]]
) -> None:
    found, expected = ([record for record in run if record["stage"] == "sft"] for run in (resumed, plain))
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for record, other in zip(found, expected, strict=True):
        assert {name: record[name] for name in other} == other
