"""A run of two ranks that is killed again and again ends like one that never was."""

import os
import time
from pathlib import Path
from random import Random

import pytest

from nld_train.testing.jobs import Job, last_checkpoint, last_step, records, same_export, steps
from nld_train.training.callbacks.heartbeat import read_heartbeat

KILLS = 50
LONGER = (steps("ar", 100), steps("joint", 400), "train.validation_interval=20", "export.prompt=null")


def reported(run_dir: Path) -> int:
    """The last checkpoint that the run said to be complete."""
    path = run_dir / "train.log"
    lines = path.read_text().splitlines() if path.exists() else []
    return max(
        (int(line.split("checkpoint of step ")[1].split(":")[0]) for line in lines if "  checkpoint of" in line),
        default=0,
    )


def is_running(run_dir: Path, pid: int) -> bool:
    heartbeat = read_heartbeat(run_dir)
    return heartbeat is not None and (heartbeat["pid"], heartbeat["state"]) == (pid, "running")


def wait(job: Job, seconds: float, last: int) -> None:
    """Or until a step is done: a machine that is faster than before would come to the end of the run."""
    moment = time.monotonic() + seconds
    job.wait_until(lambda: time.monotonic() > moment or last_step(job.run_dir) >= last)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_random_kills_lose_nothing(tmp_path: Path) -> None:
    """kill -9 of all processes at random moments: while it starts, between two steps, and in the middle of a save."""
    seed = int.from_bytes(os.urandom(4), "little")
    random = Random(seed)
    print(f"seed {seed}")
    cache, output, run_dir = tmp_path / "cache", tmp_path / "output", tmp_path / "killed"
    with Job(tmp_path / "undisturbed", cache, *LONGER, output=output, ranks=2) as job:
        started = time.monotonic()
        job.wait_for_step(1)
        start_seconds = time.monotonic() - started
        assert job.statuses(timeout=600) == [0, 0], output.read_text()
    kills = {"start": 0, "step": 0, "save": 0}
    while sum(kills.values()) < KILLS:
        how = random.choice(["start", "step", "save", "save"])
        begun = last_step(run_dir)
        with Job(run_dir, cache, *LONGER, output=output, ranks=2) as job:
            if how == "start":
                wait(job, random.uniform(0, start_seconds), begun + 1)
            elif how == "step":
                job.wait_until(lambda job=job: is_running(run_dir, job.processes[0].pid))
                wait(job, random.uniform(0, start_seconds / 4), begun + 12)
            else:
                old = set((run_dir / "checkpoints").glob(".incomplete*"))
                job.wait_until(
                    lambda old=old: set((run_dir / "checkpoints").glob(".incomplete*")) - old != set(), pause=0.0005
                )
                time.sleep(random.choice([0.02, 0.3]) * random.random())
            assert not job.is_over(), "it came to its end before all kills: make it longer"
            job.kill()
        kills[how] += 1
        newest = last_checkpoint(run_dir)
        print(
            f"kill {sum(kills.values())} in a {how}: step {begun} -> {last_step(run_dir)}, checkpoint {newest}",
            flush=True,
        )
        assert newest >= reported(run_dir)
    print(kills)
    with Job(run_dir, cache, *LONGER, output=output, ranks=2) as job:
        assert job.statuses(timeout=600) == [0, 0], output.read_text()
    assert records(run_dir) == records(tmp_path / "undisturbed")
    same_export(run_dir, tmp_path / "undisturbed")
    assert "is damaged" not in output.read_text()
