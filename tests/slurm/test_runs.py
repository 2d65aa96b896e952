"""Runs of two stages on two nodes of a Slurm cluster, up to two ranks each, that are interrupted in every way there is.

Each ends with the metrics (all but times and rates) and the exported tensors of a run that nobody has disturbed.
"""

import json
import sys
import time
from pathlib import Path

import pytest

from nld_train.testing.jobs import ROOT, SMALL, last_step, records, same_export
from nld_train.testing.jobs import steps as steps_of
from nld_train.testing.slurm import Cluster

OVERRIDES = [
    "train.device=cpu",
    "model.num_layers=2",
    *SMALL,
    "data.num_workers=1",
    "train.micro_batch_size=1",
    "train.validation_interval=10",
    "train.validation_samples=4",
    "checkpoint.interval_seconds=0",
    "export.prompt=null",
]
STEPS = (8, 32)  # of the stages: more than a run makes before a signal has come through Slurm
UP = 180.0  # seconds that a job of four ranks may take to start and to end, on two cores that do other things as well


class Runs:
    """Submits runs, and looks at them."""

    def __init__(self, cluster: Cluster, folder: Path, cache: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.cache = cache
        self._undisturbed: dict[int, Path] = {}

    def command(self, run_dir: Path, *settings: str, ranks_per_node: int = 2) -> list[str]:
        return [
            *(sys.executable, str(ROOT / "slurm/submit.py"), "nodes=2", f"gpus_per_node={ranks_per_node}"),
            *(f"run.dir='{run_dir}'", f"data.cache_dir={self.cache}", "checkpoint.interval_steps=1000", *OVERRIDES),
            *settings,
        ]

    def submit(
        self, name: str, *settings: str, steps: tuple[int, int] = STEPS, ranks_per_node: int = 2
    ) -> tuple[Path, list[str]]:
        """Submit a run of ``steps`` in each stage. Returns its folder, and its jobs."""
        run_dir = self.folder / f"{name}, 100% of it"  # a name that has to be quoted everywhere
        tokens = [steps_of(stage, number) for stage, number in zip(("ar", "joint"), steps, strict=True)]
        command = self.command(run_dir, *tokens, *settings, ranks_per_node=ranks_per_node)
        found = self.cluster.run(command, PYTHONPATH=str(ROOT))
        assert found.returncode == 0, found.stderr
        submissions = sorted(run_dir.glob("slurm/[0-9][0-9][0-9]"))
        return run_dir, (submissions[-1] / "jobs").read_text().split()

    def undisturbed(self, ranks_per_node: int) -> Path:
        """The run that nobody has disturbed, trained when it is first asked for."""
        if ranks_per_node not in self._undisturbed:
            name = f"undisturbed, {ranks_per_node} per node"
            run_dir, (job,) = self.submit(name, "launcher=task", ranks_per_node=ranks_per_node)  # makes no difference
            self.finish(run_dir, job)
            assert [start[-1] for start in starts(run_dir)] == ["0"]
            assert last_step(run_dir) == sum(STEPS)
            self._undisturbed[ranks_per_node] = run_dir
        return self._undisturbed[ranks_per_node]

    def wait_for_step(self, run_dir: Path, job: str, step: int) -> None:
        """Until the run has reported ``step``, in this job."""

        def reached(found: dict[str, str]) -> bool:
            return found["JobState"] == "RUNNING" and last_step(run_dir) >= step

        self.cluster.wait(job, reached, timeout=UP)

    def preempt(self, job: str) -> None:
        """What Slurm's --signal=B:USR1@... does, at once."""
        self.cluster.run(["scancel", "--signal=USR1", "--batch", job])

    def finish(self, run_dir: Path, job: str, *, state: str = "COMPLETED", timeout: float = 2 * UP) -> dict[str, str]:
        found = self.cluster.wait(job, timeout=timeout)
        assert found["JobState"] == state, log(run_dir)
        return found


def log(run_dir: Path) -> str:
    return "".join(path.read_text(errors="replace") for path in sorted(run_dir.glob("slurm/*.log")))


def starts(run_dir: Path) -> list[list[str]]:
    """Of every submission: date, time, job, restarts, nodes, step of the newest checkpoint."""
    return [line.split() for path in sorted(run_dir.glob("slurm/*/starts")) for line in path.read_text().splitlines()]


def same_end(run_dir: Path, other: Path) -> None:
    assert records(run_dir) == records(other)
    same_export(run_dir, other)


@pytest.fixture(scope="module")
def runs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Runs:
    return Runs(cluster, tmp_path_factory.mktemp("runs"), cache)


@pytest.fixture(scope="module")
def undisturbed(runs: Runs) -> Path:
    return runs.undisturbed(2)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks_per_node", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_preempted_run_goes_on_by_itself(runs: Runs, ranks_per_node: int) -> None:
    undisturbed = runs.undisturbed(ranks_per_node)
    run_dir, (job,) = runs.submit(f"preempted, {ranks_per_node} per node", ranks_per_node=ranks_per_node)
    runs.wait_for_step(run_dir, job, 3)
    runs.preempt(job)
    found = runs.finish(run_dir, job)
    assert found["Restarts"] == "1", log(run_dir)
    first, second = starts(run_dir)
    assert (first[-1], second[3]) == ("0", "1")
    assert 3 <= int(second[-1]) < sum(STEPS), log(run_dir)  # nothing but the stop has saved
    messages = (run_dir / f"slurm/{job}.log").read_text()
    assert f"job {job}, start 0: stopped" in messages
    assert f"job {job}, start 1: the run is finished" in messages
    same_end(run_dir, undisturbed)

    command = runs.command(run_dir, "run.seed=5", ranks_per_node=ranks_per_node)
    other = runs.cluster.run(command, PYTHONPATH=str(ROOT))
    assert other.returncode == 2
    assert "run.seed: is 5, but the run in" in other.stderr
    assert not (run_dir / "slurm/002").exists()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_one_task_for_each_rank(runs: Runs, undisturbed: Path) -> None:
    """Without torchrun; preempted in the second stage."""
    run_dir, (job,) = runs.submit("tasks", "launcher=task")
    runs.wait_for_step(run_dir, job, 9)
    runs.preempt(job)
    assert runs.finish(run_dir, job)["Restarts"] == "1", log(run_dir)
    same_end(run_dir, undisturbed)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_chain_of_three_jobs(runs: Runs, undisturbed: Path) -> None:
    run_dir, jobs = runs.submit("chain", "chain=3")
    step = 0
    for job in jobs[:2]:
        runs.wait_for_step(run_dir, job, step + 3)
        runs.preempt(job)
        assert runs.finish(run_dir, job)["Restarts"] == "0", log(run_dir)
        step = last_step(run_dir)
        assert step < sum(STEPS)
    runs.finish(run_dir, jobs[2])
    assert [start[2] for start in starts(run_dir)] == jobs
    assert all(f"job {job}, start 0" in (run_dir / f"slurm/{job}.log").read_text() for job in jobs)
    same_end(run_dir, undisturbed)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_that_is_finished_early_ends_its_chain(runs: Runs, undisturbed: Path) -> None:
    run_dir, jobs = runs.submit("early", "chain=3")
    runs.finish(run_dir, jobs[0])
    for job in jobs[1:]:
        assert runs.cluster.wait(job, timeout=30)["JobState"] == "CANCELLED"
    same_end(run_dir, undisturbed)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", ["asked to end", "cancelled"])
def test_what_an_operator_ends_stays_ended_until_it_is_submitted_again(runs: Runs, undisturbed: Path, how: str) -> None:
    run_dir, jobs = runs.submit(how, "chain=2")
    runs.wait_for_step(run_dir, jobs[0], 3)
    runs.cluster.run(["scancel", *(["--signal=TERM", "--batch"] if how == "asked to end" else []), jobs[0]])
    runs.finish(run_dir, jobs[0], state="FAILED" if how == "asked to end" else "CANCELLED", timeout=60)
    assert runs.cluster.wait(jobs[1], timeout=60)["JobState"] == "CANCELLED"
    time.sleep(10)  # longer than Slurm waits before it starts a requeued job
    assert runs.cluster.job(jobs[0])["JobState"] in ("FAILED", "CANCELLED")
    if how == "asked to end":
        assert list(run_dir.glob("checkpoints/step_*")), log(run_dir)
    run_dir, (again,) = runs.submit(how)
    runs.finish(run_dir, again)
    same_end(run_dir, undisturbed)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_more_important_job_comes_first(runs: Runs, undisturbed: Path) -> None:
    """Preempted by Slurm itself, which asks the ranks with SIGTERM and gives them the partition's grace time."""
    run_dir, (job,) = runs.submit("less important")
    runs.wait_for_step(run_dir, job, 3)
    command = ["sbatch", "--parsable", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 5"]
    urgent = runs.cluster.slurm(*command).strip()
    assert runs.cluster.wait(urgent, timeout=UP)["JobState"] == "COMPLETED"
    assert runs.finish(run_dir, job)["Restarts"] == "1", log(run_dir)
    assert 3 <= int(starts(run_dir)[1][-1]) < sum(STEPS), log(run_dir)
    same_end(run_dir, undisturbed)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_killed_node_is_replaced(runs: Runs, undisturbed: Path) -> None:
    """Of a cluster of three, in the middle of a run that has saved; the job goes on on the two that are left."""
    run_dir, (job,) = runs.submit("node", "checkpoint.interval_steps=3")
    runs.wait_for_step(run_dir, job, 5)
    cluster = runs.cluster
    nodes = starts(run_dir)[0][4]
    victim = next(i for i, name in reversed(list(enumerate(cluster.names, 1))) if name in expand(cluster, nodes))
    cluster.kill_node(victim)
    try:
        assert int(runs.finish(run_dir, job, timeout=3 * UP)["Restarts"]) >= 1, log(run_dir)
        assert cluster.names[victim - 1] not in expand(cluster, starts(run_dir)[-1][4])
        assert int(starts(run_dir)[-1][-1]) >= 3
        same_end(run_dir, undisturbed)
    finally:
        cluster.start_node(victim)


def expand(cluster: Cluster, nodes: str) -> list[str]:
    return cluster.slurm("scontrol", "show", "hostnames", nodes).split()


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_time_limit(runs: Runs) -> None:
    """Slurm's own warning. Limits are whole minutes, and it may come half a minute early: so the run has to be long."""
    probe, (job,) = runs.submit("probe", steps=(8, 60))
    runs.finish(probe, job)
    seconds = sorted(
        json.loads(line).get("step_seconds", 0) for line in (probe / "metrics.jsonl").read_text().splitlines()
    )
    steps = (8, int(90 / seconds[len(seconds) // 2]))  # longer than the two minutes less the warning and the start
    whole, (job,) = runs.submit("whole", steps=steps)
    runs.finish(whole, job, timeout=900)
    run_dir, (job,) = runs.submit("limited", "time=2", "warning=30", steps=steps)
    found = runs.finish(run_dir, job, timeout=900)
    assert int(found["Restarts"]) >= 1, log(run_dir)
    assert "asked to make room (SIGUSR1)" in log(run_dir)
    same_end(run_dir, whole)
