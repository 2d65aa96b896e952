"""The main job through its own command: both stages, kill and resume, layouts, export."""

import fcntl
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nld_train.checkpoint.convert import exported_step
from nld_train.checkpoint.manager import complete_checkpoints
from nld_train.errors import EXIT_RESTART
from nld_train.testing.fixtures import needs_compiler
from nld_train.testing.jobs import (
    BATCH,
    LENGTH,
    STEPS,
    Job,
    group_is_alive,
    last_step,
    records,
    same_export,
    train,
)
from nld_train.training.callbacks.heartbeat import read_heartbeat


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    result = train(run_dir, cache)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Warning" not in result.stderr, result.stderr
    return run_dir


def test_a_run_leaves_what_others_rely_on(undisturbed: Path) -> None:
    total = sum(STEPS.values())
    found = records(undisturbed)
    steps = [record for record in found if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, total + 1))
    for record in steps:
        is_joint = record["step"] > STEPS["ar"]
        assert record["stage"] == ("joint" if is_joint else "ar")
        assert record["tokens"] == record["step"] * BATCH * LENGTH
        assert record["grad_norm"] > 0
        if is_joint:
            assert record["loss"] == pytest.approx(record["ar_loss"] + 0.3 * record["diffusion_loss"], rel=1e-12)
        else:
            assert record["diffusion_loss"] is None
            assert record["loss"] == record["ar_loss"]
    validations = {record["step"] for record in found if "val_ar_loss" in record}
    assert validations == {1, 4, 6, 7, 8, 12, 16}
    assert all(record["val_diffusion_loss"] > 0 for record in found if "val_ar_loss" in record)
    for name in (
        "config.yaml",
        "train.log",
        "tokenizer/tokenizer.json",
        "hf/config.json",
        "hf/tokenizer.json",
        "hf/README.md",
    ):
        assert (undisturbed / name).is_file(), name
    log = (undisturbed / "train.log").read_text()
    for mode in ("[ar]", "[diffusion]", "[linear]", "[quadratic]"):
        assert mode in log


def test_the_snippet_of_the_model_card_runs(undisturbed: Path) -> None:
    """As a user pastes it: outside the project, nobody there to answer a question."""
    card = (undisturbed / "hf/README.md").read_text()
    snippet = card.split("```python\n")[1].split("```")[0].replace("this folder", str(undisturbed / "hf"))
    program = snippet + "\nprint(output_ids.shape[1] - prompt_ids.shape[1], num_forwards)"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=undisturbed, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    num_tokens, num_forwards = map(int, result.stdout.split()[-2:])
    assert num_tokens == 64
    assert num_forwards <= 2 * num_tokens + 1
    assert "y/N" not in result.stdout + result.stderr


def test_starting_a_finished_run_says_so(undisturbed: Path, cache: Path) -> None:
    before = (undisturbed / "metrics.jsonl").read_bytes()
    result = train(undisturbed, cache)
    assert result.returncode == 0, result.stderr
    assert "finished" in result.stdout + result.stderr
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("kill_after_step", [4, pytest.param(11, marks=pytest.mark.long)])
def test_kill_and_resume_is_bit_exact(undisturbed: Path, cache: Path, tmp_path: Path, kill_after_step: int) -> None:
    """kill -9 in the middle of a stage, after a checkpoint; then the same command again."""
    run_dir = tmp_path / "killed"
    with Job(run_dir, cache, "checkpoint.asynchronous=false", output=tmp_path / "output") as job:
        job.wait_for_step(kill_after_step)
        job.processes[0].kill()  # alone: its loader workers end with it
        job.processes[0].wait()
        deadline = time.monotonic() + 10
        while group_is_alive(job.processes[0].pid):
            assert time.monotonic() < deadline, "a process of the killed run stays behind"
            time.sleep(0.05)
    assert list((run_dir / "checkpoints").glob("step_*"))
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # the torn line of a process that died while it wrote
    result = train(run_dir, cache)
    assert result.returncode == 0, result.stdout + result.stderr
    assert records(run_dir) == records(undisturbed)
    same_export(run_dir, undisturbed)


@needs_compiler
@pytest.mark.long
def test_a_compiled_run_is_bit_exact_too(undisturbed: Path, cache: Path, tmp_path: Path) -> None:
    """Stopped and gone on with; from the folder of a run that is not compiled it would go on as well."""
    compiled = "model.compile_pointwise=always"
    whole, run_dir = tmp_path / "whole", tmp_path / "stopped"
    result = train(whole, cache, compiled)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Warning" not in result.stderr, result.stderr
    log = (whole / "train.log").read_text()
    assert re.search(r"norm and SwiGLU +compiled", log), log
    assert re.search(r"norm and SwiGLU +eager", (undisturbed / "train.log").read_text())
    with Job(run_dir, cache, compiled, output=tmp_path / "output") as job:
        job.wait_for_step(3)
        job.processes[0].send_signal(signal.SIGUSR1)
        assert job.statuses(timeout=200) == [EXIT_RESTART], job.output.read_text()
    result = train(run_dir, cache, compiled)
    assert result.returncode == 0, result.stdout + result.stderr
    assert records(run_dir) == records(whole)
    same_export(run_dir, whole)
    losses, eager = ([record["loss"] for record in records(of) if "loss" in record] for of in (whole, undisturbed))
    assert losses == pytest.approx(eager, rel=1e-4)


def test_a_stopped_run_goes_on_also_from_the_checkpoint_before(undisturbed: Path, cache: Path, tmp_path: Path) -> None:
    """Stopped by Slurm's warning; then the newest checkpoint rots, and the one before is used: the same end."""
    run_dir = tmp_path / "stopped"
    with Job(run_dir, cache, output=tmp_path / "output") as job:
        job.wait_for_step(3)
        job.processes[0].send_signal(signal.SIGUSR1)
        assert job.statuses(timeout=200) == [EXIT_RESTART], job.output.read_text()
    assert heartbeat(run_dir)["state"] == "stopped"
    older, newest = complete_checkpoints(run_dir / "checkpoints")
    assert newest.name == f"step_{last_step(run_dir):08d}"
    assert not list((run_dir / "checkpoints").glob(".incomplete*"))
    data = bytearray((newest / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 16
    (newest / "__0_0.distcp").write_bytes(data)

    result = train(run_dir, cache)
    assert result.returncode == 0, result.stderr
    assert f"{newest} is damaged and not used" in result.stdout
    assert "__0_0.distcp has another checksum" in result.stdout
    assert f"resumes after step {int(older.name[5:])} of" in result.stdout
    assert (heartbeat(run_dir)["state"], heartbeat(run_dir)["restarts"]) == ("finished", 1)
    assert records(run_dir) == records(undisturbed)
    same_export(run_dir, undisturbed)


def heartbeat(run_dir: Path) -> dict[str, Any]:
    found = read_heartbeat(run_dir)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param((), id="dp2", marks=pytest.mark.long),
        pytest.param(("parallel=tp2_sp", "parallel.recompute_granularity=full"), id="tp2 + sp"),
        pytest.param(
            ("parallel=pp2_interleaved", "parallel.recompute_granularity=selective"),
            id="pp2 x 2 virtual",
            marks=pytest.mark.long,
        ),
        pytest.param(("parallel=cp2",), id="cp2"),
    ],
)
def test_two_ranks_train_both_stages(undisturbed: Path, cache: Path, tmp_path: Path, layout: tuple[str, ...]) -> None:
    """Through torchrun; losses agree with one process, and the export of any layout is the same model."""
    result = train(tmp_path, cache, *layout, ranks=2)
    assert result.returncode == 0, result.stdout + result.stderr
    for found, expected in zip(records(tmp_path), records(undisturbed), strict=True):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == (pytest.approx(value, rel=2e-4) if isinstance(value, float) else value), (
                key,
                expected,
            )
    tensors, others = load_file(tmp_path / "hf/model.safetensors"), load_file(undisturbed / "hf/model.safetensors")
    assert set(tensors) == set(others)
    for name, tensor in tensors.items():
        assert (tensor - others[name]).norm() < 2e-2 * others[name].norm(), name


def test_resume_refuses_what_would_change_the_run(undisturbed: Path, cache: Path) -> None:
    """Every difference at once: data order, objective, and stages that are over or end before the checkpoint."""
    before = (undisturbed / "config.yaml").read_bytes()
    result = train(
        undisturbed, cache, "run.seed=5", "data.sequence_length=64", "objective.eps=0.5", "stages.ar.tokens=512"
    )
    assert result.returncode == 2
    for key in ("run.seed", "data.sequence_length", "objective.eps", "stages"):
        assert key in result.stderr
    assert "remedy" in result.stderr
    assert "Traceback" not in result.stderr
    assert (undisturbed / "config.yaml").read_bytes() == before

    result = train(undisturbed, cache, "stages.joint.tokens=256")
    assert result.returncode == 2
    assert "of step 16" in result.stderr


def test_an_extended_run_exports_its_own_end(undisturbed: Path, cache: Path, tmp_path: Path) -> None:
    """Killed between the last checkpoint and the export, the next start exports what was trained last."""
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    longer = f"stages.joint.tokens={12 * BATCH * LENGTH}"
    result = train(run_dir, cache, longer, "export.enabled=false")
    assert result.returncode == 0, result.stderr
    assert exported_step(run_dir / "hf") == 16
    result = train(run_dir, cache, longer)
    assert result.returncode == 0, result.stderr
    assert "finished" in result.stdout + result.stderr
    assert exported_step(run_dir / "hf") == 18
    old, new = (load_file(folder / "hf/model.safetensors") for folder in (undisturbed, run_dir))
    assert not torch.equal(old["encoder.norm.weight"], new["encoder.norm.weight"])


def test_two_runs_in_one_folder_are_refused(cache: Path, tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as held:
        fcntl.lockf(held, fcntl.LOCK_EX)
        result = train(tmp_path, cache)
    assert result.returncode == 2
    assert "run.dir" in result.stderr
    assert "in use by another run" in result.stderr
    assert not (tmp_path / "config.yaml").exists()


def test_a_diverged_run_stops_before_it_saves(cache: Path, tmp_path: Path) -> None:
    result = train(tmp_path, cache, "stages.ar.lr=1e30", "stages.ar.min_lr=0", "checkpoint.interval_steps=1")
    assert result.returncode == 1
    assert "remedy" in result.stderr
    assert "Traceback" not in result.stderr
    last = records(tmp_path)[-1]
    assert last["loss"] is None or last["grad_norm"] is None
    saved = [int(path.name[5:]) for path in (tmp_path / "checkpoints").glob("step_*")]
    assert all(step < last["step"] for step in saved)
    assert heartbeat(tmp_path)["state"] == "failed"
    assert "TrainingError" in heartbeat(tmp_path)["message"]
