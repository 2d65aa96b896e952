"""Steps that are skipped, samples that are named, spikes, and a step that is replayed."""

import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nld_train.config.schema import Config, RunConfig, TrainConfig
from nld_train.errors import EXIT_RESTART, ConfigError
from nld_train.platform.device import Platform
from nld_train.platform.topology import Topology
from nld_train.testing import jobs
from nld_train.testing.jobs import BATCH, LENGTH, ON_CPU, ROOT, SMALL, importing_project, same_export
from nld_train.testing.ranks import RankPool
from nld_train.training.faults import MIN_SPIKE_RECORDS, SKIP_WINDOW, SPIKE_WINDOW, FaultHistory, skip_message
from nld_train.training.metrics import encode_record, records_of

STEPS = {"ar": 4, "joint": 6}
FAULT_STEP = 7
BAD_SAMPLE = (FAULT_STEP - 1) * BATCH + 2
OVERRIDES = [
    "model.num_layers=4",
    *SMALL,
    "data.num_workers=1",
    "train.micro_batch_size=2",
    "train.validation_interval=5",
    "train.validation_samples=4",
    *(f"stages.{name}.tokens={steps * BATCH * LENGTH}" for name, steps in STEPS.items()),
    f"checkpoint.interval_steps={FAULT_STEP}",
    "checkpoint.interval_seconds=0",
    "checkpoint.keep_last=9",
    "export.prompt=null",
]


def step_record(step: int, loss: float | None, stage: str = "a", **more: Any) -> dict[str, Any]:
    return {"step": step, "stage": stage, "loss": loss, **more}


def history_of(losses: list[float], stage: str = "a") -> FaultHistory:
    records = [step_record(step, loss, stage) for step, loss in enumerate(losses, start=1)]
    return FaultHistory.of_records(records, last_step=len(losses))


# --- spikes -----------------------------------------------------------------------------------------------------------


def noisy(count: int, seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [4.0 + 0.1 * generator.gauss(0, 1) for _ in range(count)]


def test_a_loss_that_stands_out_is_a_spike() -> None:
    history = history_of(noisy(SPIKE_WINDOW))
    assert history.is_spike("a", 5.0, 8.0)
    assert not history.is_spike("a", 4.6, 8.0)
    assert history.is_spike("a", 4.6, 4.0)
    assert not history.is_spike("a", 3.0, 8.0)  # a fall is none
    assert not history.is_spike("a", math.nan, 8.0)
    assert not history.is_spike("a", 5.0, 0.0)  # turned off


def test_normal_noise_and_a_falling_loss_have_no_spikes() -> None:
    for losses in (noisy(2000, seed=1), [4 + 4 * math.exp(-step / 100) + 0.02 * math.sin(step) for step in range(600)]):
        history = FaultHistory()
        found = 0
        for step, loss in enumerate(losses, start=1):
            found += history.is_spike("a", loss, 8.0)
            history.add(step_record(step, loss))
        assert found == 0


def test_spikes_do_not_hide_the_next_one() -> None:
    """A mean and a standard deviation would be moved by the first ones."""
    history = history_of(noisy(SPIKE_WINDOW))
    for step in range(SPIKE_WINDOW + 1, SPIKE_WINDOW + 20):
        assert history.is_spike("a", 9.0, 8.0), step
        history.add(step_record(step, 9.0))


def test_a_stage_begins_without_spikes_and_equal_losses_make_none() -> None:
    history = history_of(noisy(SPIKE_WINDOW))
    assert not history.is_spike("b", 9.0, 8.0)
    for step in range(MIN_SPIKE_RECORDS):
        assert not history.is_spike("b", 9.0, 8.0), step
        history.add(step_record(SPIKE_WINDOW + step, 4.0, stage="b"))
    assert history.is_spike("b", 9.0, 8.0)
    assert not history.is_spike("b", 4.001, 8.0)  # all the same so far: no spread


def test_a_resumed_run_marks_what_it_would_have_marked(tmp_path: Path) -> None:
    """The history is a function of the records on file up to the checkpoint, validations and nulls included."""
    path, losses = tmp_path / "metrics.jsonl", noisy(300, seed=3)
    whole = FaultHistory()
    with path.open("wb") as file:
        for step, loss in enumerate(losses, start=1):
            is_skipped = step % 7 == 0
            record = step_record(step, math.nan if is_skipped else loss, "a" if step <= 100 else "b")
            record |= {"is_skipped": True} if is_skipped else {}
            file.write(encode_record(record) + encode_record({"step": step, "stage": "a", "val_ar_loss": 1.0}))
            if step <= 200:
                whole.add(record)
    assert FaultHistory.of_records(records_of(path), last_step=200) == whole
    assert whole.num_skipped == 28
    assert len(whole.losses) == 100 - 14
    assert FaultHistory.of_records(records_of(tmp_path / "none"), last_step=200) == FaultHistory()


# --- skipped steps ----------------------------------------------------------------------------------------------------


def skip(*steps: int) -> FaultHistory:
    records = [step_record(step, None, is_skipped=True) for step in steps]
    return FaultHistory.of_records(records, last_step=max(steps))


def test_too_many_skipped_steps_end_the_run() -> None:
    assert not skip(5, 6, 7).skips_too_much(3)
    assert skip(5, 6, 7).skips_too_much(2)
    assert skip(5).skips_too_much(0)
    config = Config(run=RunConfig(dir="runs/x"), train=TrainConfig(max_skipped_steps=2))
    text = str(skip(5, 6, 7).error(config, None))
    for words in ("runs/x, step 7: ", "3 of the last 1000", "5, 6, 7)", "max_skipped_steps=2; nothing is saved yet"):
        assert words in text
    assert "the last checkpoint, c/step_4, is from before" in str(skip(5).error(config, Path("c/step_4")))


def test_skipped_steps_are_forgotten_after_a_while() -> None:
    assert not skip(5, 6, 5 + SKIP_WINDOW).skips_too_much(2)
    assert skip(5, 6, 4 + SKIP_WINDOW).skips_too_much(2)
    assert skip(5, 6, 5 + SKIP_WINDOW).num_skipped == 3


def test_the_message_names_samples_by_rank() -> None:
    record = step_record(
        9, math.nan, grad_norm=math.nan, suspect_samples=[3, 4, 5, 9, 7], suspect_ranks=[1, 1, 1, 1, 0]
    )
    assert skip_message(record) == (
        "step 9 skipped, nothing was updated: the loss is nan, from samples 3..5, 9 (rank 1); sample 7 (rank 0)"
    )
    record = step_record(9, 4.0, grad_norm=math.inf, suspect_samples=[3], suspect_ranks=[0])
    assert "the gradient's norm is inf and every loss is finite; in the step are sample 3 (rank 0)" in skip_message(
        record
    )


def run(run_dir: Path, cache: Path, fault: str, step: int, sample: int, *extra: str, ranks: int = 1) -> Any:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    program = ["-m", "nld_train.testing.faulty_train", fault, str(step), str(sample)]  # torchrun knows -m, too
    return subprocess.run(
        [*launcher, *program, f"run.dir={run_dir}", f"data.cache_dir={cache}", *OVERRIDES, *extra],
        cwd=ROOT, env=importing_project(ON_CPU), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def records(run_dir: Path) -> list[dict[str, Any]]:
    """Also without the count that a run without the fault has not."""
    return [{k: v for k, v in record.items() if k != "num_skipped_steps"} for record in jobs.records(run_dir)]


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A run in which the embedding of one token of one sample is NaN in one step, with what it printed."""
    run_dir = tmp_path_factory.mktemp("runs") / "spoiled"
    result = run(run_dir, cache, "embedding", FAULT_STEP, BAD_SAMPLE)
    assert result.returncode == 0, result.stdout + result.stderr
    return run_dir


def compare(spoiled: Path, without: Path, rank: int) -> None:
    """Step for step and to the last bit the run in which only that update was left out, and its sample is named."""
    for record, other in zip(records(spoiled), records(without), strict=True):
        if record["step"] != FAULT_STEP or "loss" not in record:
            assert record == other
            continue
        assert record["is_skipped"]
        assert (record["suspect_samples"], record["suspect_ranks"]) == ([BAD_SAMPLE], [rank])
        assert record["loss"] is None
        assert record["non_finite"]["loss"] == "nan"
        assert record["lr"] == other["lr"]
        assert record["tokens"] == other["tokens"]
    counts = [record["num_skipped_steps"] for record in records_of(spoiled / "metrics.jsonl") if "loss" in record]
    assert counts == [0] * (FAULT_STEP - 1) + [1] * (sum(STEPS.values()) - FAULT_STEP + 1)
    same_export(spoiled, without)
    log = (spoiled / "train.log").read_text()
    expected = (
        f"step {FAULT_STEP} skipped, nothing was updated: the loss is nan, from sample {BAD_SAMPLE} (rank {rank})"
    )
    assert expected in log


def test_a_sample_with_a_nan_is_named_and_its_step_left_out(spoiled: Path, cache: Path, tmp_path: Path) -> None:
    result = run(tmp_path, cache, "skip", FAULT_STEP, BAD_SAMPLE)
    assert result.returncode == 0, result.stdout + result.stderr
    compare(spoiled, tmp_path, rank=0)
    # The checkpoint that was due at the skipped step waited for one that was not.
    assert [path.name for path in sorted((spoiled / "checkpoints").iterdir())] == ["step_00000008", "step_00000010"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("layout", "rank"),
    [
        (("parallel=single",), 1),
        (("parallel=tp2_sp",), 0),
        (("parallel=pp2_interleaved",), 1),
        (("parallel=cp2",), 0),
        (("train.precision=bf16", "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"), 1),
    ],
    ids=["dp2", "tp2 + sp", "pp2 x 2 virtual", "cp2", "dp2 overlapped"],
)
def test_two_ranks_agree_on_what_is_left_out(cache: Path, tmp_path: Path, layout: tuple[str, ...], rank: int) -> None:
    runs = tmp_path / "spoiled", tmp_path / "without"
    for run_dir, fault in zip(runs, ("embedding", "skip"), strict=True):
        result = run(run_dir, cache, fault, FAULT_STEP, BAD_SAMPLE, *layout, ranks=2)
        assert result.returncode == 0, result.stdout + result.stderr
    compare(*runs, rank=rank)


@pytest.mark.long
def test_a_stop_waits_for_a_step_that_is_not_skipped(spoiled: Path, cache: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "stopped"
    stopped = run(run_dir, cache, "stopped", FAULT_STEP, BAD_SAMPLE)
    assert stopped.returncode == EXIT_RESTART, stopped.stderr
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step_{FAULT_STEP + 1:08d}"]
    assert [record["step"] for record in records(run_dir) if record.get("is_skipped")] == [FAULT_STEP]
    finished = run(run_dir, cache, "skip", 99, 0)
    assert finished.returncode == 0, finished.stderr
    same_export(run_dir, spoiled)


@pytest.mark.long
def test_a_gradient_alone_blames_the_whole_step(cache: Path, tmp_path: Path) -> None:
    result = run(tmp_path, cache, "gradient", FAULT_STEP, 0)
    assert result.returncode == 0, result.stdout + result.stderr
    record = next(record for record in records(tmp_path) if record["step"] == FAULT_STEP)
    first = (FAULT_STEP - 1) * BATCH
    assert record["suspect_samples"] == list(range(first, first + BATCH))
    assert record["loss"] > 0
    assert record["non_finite"] == {"grad_norm": "inf"}


@pytest.mark.long
def test_a_run_that_skips_everything_ends_with_a_checkpoint_from_before(cache: Path, tmp_path: Path) -> None:
    """Checkpoints were due at every step."""
    overrides = ("checkpoint.interval_steps=1", "train.max_skipped_steps=2")
    result = run(tmp_path, cache, "always", FAULT_STEP, 0, *overrides)
    assert result.returncode == 1
    assert f"step {FAULT_STEP + 2}: loss or gradient was not finite in 3 of the last 1000 steps" in result.stderr
    newest = max((tmp_path / "checkpoints").iterdir())
    assert newest.name == f"step_{FAULT_STEP - 1:08d}"
    assert f"{newest}, is from before" in result.stderr
    # Started again without the fault, it goes on from there, and has forgotten nothing and invented nothing.
    result = run(tmp_path, cache, "skip", 99, 0, *overrides)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not any("is_skipped" in record for record in records(tmp_path))


@pytest.mark.long
@pytest.mark.parametrize("lost", [False, True])
def test_the_last_step_is_saved_if_the_model_is_good(cache: Path, tmp_path: Path, lost: bool) -> None:
    """Skipped at the very end, only the validation can say whether the model is lost."""
    last = sum(STEPS.values())
    result = run(tmp_path, cache, "lost" if lost else "always", last, 0)
    saved = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert (f"step_{last:08d}" in saved) == (not lost)
    assert result.returncode == (1 if lost else 0)
    assert ("val_ar_loss, val_diffusion_loss of the model is not finite" in result.stderr) == lost


# --- replay -----------------------------------------------------------------------------------------------------------


def contents(run_dir: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def test_a_replayed_step_is_the_recorded_one(spoiled: Path, cache: Path) -> None:
    """From the checkpoint of step 8 to the last step; nothing in the folder changes."""
    before = contents(spoiled)
    result = run(spoiled, cache, "skip", 99, 0, "debug.replay_step=10")
    assert result.returncode == 0, result.stdout + result.stderr
    assert contents(spoiled) == before
    text = result.stdout
    assert "step 10 (joint)" in text
    assert "step_00000008" in text
    assert "the replayed record equals the recorded one, to the last bit" in text
    recorded = next(record for record in records(spoiled) if record["step"] == 10)
    norm = float(next(line for line in text.splitlines() if line.startswith("  the model")).split()[4])
    assert norm == pytest.approx(recorded["grad_norm"], rel=1e-5)
    losses = [float(line.split()[3]) for line in text.splitlines() if line.startswith("     sample ")]
    samples = [int(line.split()[1][:-1]) for line in text.splitlines() if line.startswith("     sample ")]
    assert samples == list(range(9 * BATCH, 10 * BATCH))
    assert sum(losses) / (BATCH * LENGTH) == pytest.approx(recorded["loss"], rel=1e-12)
    assert "decoder.layers.3.mlp.linear_fc2.weight" in text


@pytest.mark.long
def test_a_replay_that_differs_says_where(spoiled: Path, cache: Path) -> None:
    result = run(spoiled, cache, "embedding", 9, 8 * BATCH, "debug.replay_step=10")
    assert result.returncode == 0, result.stdout + result.stderr
    assert (
        "the replayed record DIFFERS from the recorded one in loss, ar_loss, diffusion_loss, grad_norm" in result.stdout
    )


@pytest.mark.long
def test_a_skipped_step_is_replayed_at_another_layout(spoiled: Path, cache: Path, tmp_path: Path) -> None:
    """The steps before it, too, are run again; sums over shards are those of whole parameters."""
    assert run(tmp_path, cache, "skip", 99, 0, "checkpoint.interval_steps=5").returncode == 0
    texts = {}
    for layout, ranks in (("single", 1), ("tp2_sp", 2), ("pp2_interleaved", 2)):
        fault = ("embedding", FAULT_STEP, BAD_SAMPLE, f"debug.replay_step={FAULT_STEP}", f"parallel={layout}")
        result = run(tmp_path, cache, *fault, ranks=ranks)
        assert result.returncode == 0, result.stdout + result.stderr
        texts[layout] = result.stdout
    assert f"[{BAD_SAMPLE}]" in texts["single"]

    def rows(text: str) -> dict[str, list[float]]:
        """Elements, weight norm and update norm of every parameter."""
        lines = text.split("\nparameters\n")[1].split("\nparameters added up\n")[0].splitlines()[1:]
        values = {line.split()[0]: [float(word) for word in line.split()[1:]] for line in lines if line.strip()}
        return {name: [row[0], row[1], row[5]] for name, row in values.items()}

    expected = rows(texts["single"])
    assert len(expected) == 3 + 4 * 6
    assert all(row[2] == 0 for row in expected.values()), "nothing is updated in a step that is skipped"
    for text in texts.values():
        found = rows(text)
        assert found.keys() == expected.keys()
        for name, row in found.items():
            assert row == pytest.approx(expected[name], rel=1e-5), name


def replay_point_case(topology: Topology, platform: Platform, run_dir: str, step: int) -> str:
    """Where a replay would begin, or why it does not."""
    from nld_train.checkpoint.manager import CheckpointManager
    from nld_train.config.compose import load_resolved
    from nld_train.training.replay import find_replay_point
    from nld_train.training.stages import plan_stages

    config = load_resolved(Path(run_dir) / "config.yaml")
    config.debug.replay_step = step
    manager = CheckpointManager(Path(run_dir) / "checkpoints", config.checkpoint)
    try:
        resume, _ = find_replay_point(manager, config, plan_stages(config))
    except ConfigError as error:
        return str(error)
    assert resume is not None
    return resume.checkpoint.name


def test_where_a_replay_begins(spoiled: Path, one_rank: RankPool) -> None:
    """At the nearest checkpoint before the step; there are those of steps 8 and 10."""
    assert one_rank.run(replay_point_case, str(spoiled), 9) == "step_00000008"
    assert one_rank.run(replay_point_case, str(spoiled), 10) == "step_00000008"
    text = one_rank.run(replay_point_case, str(spoiled), 8)
    assert "debug.replay_step: 8, but there is no checkpoint from before it" in text
    assert "steps [8, 10]" in text
    assert "use debug.replay_step=9 or later" in text
    assert "the run ends with step 10" in one_rank.run(replay_point_case, str(spoiled), 11)
