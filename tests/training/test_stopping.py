"""Signals, heartbeat, lost peers: alone, and in runs of one and two ranks, which the watchdog may end."""

import contextlib
import errno
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from nld_train.checkpoint.manager import complete_checkpoints
from nld_train.config.schema import Config, RunConfig, TrainConfig
from nld_train.errors import EXIT_RESTART, TrainingError
from nld_train.platform.failures import is_of_the_machine
from nld_train.testing.jobs import (
    ON_CPU,
    ROOT,
    Job,
    command,
    group_is_alive,
    last_step,
    records,
    same_export,
    steps,
    train,
)
from nld_train.training.callbacks.heartbeat import Heartbeat, read_heartbeat
from nld_train.training.stopping import StopSignals
from nld_train.training.supervision import Supervisor

ENDLESS = (steps("joint", 10**6), "export.enabled=false")


# --- alone ------------------------------------------------------------------------------------------------------------


def _in_child(body: Callable[[], None]) -> Any:
    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    return process


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _blocked(tmp_path: Path, *, deferred: bool, stop_timeout: float = 100.0, agrees: bool = False) -> Any:
    """A process whose main thread waits for ever, as in a collective of a rank that is gone."""

    def body() -> None:
        signals = StopSignals(
            stop_timeout, lambda reason: (tmp_path / "end").write_text(reason) and os._exit(75), lambda: 0.0
        )
        with signals, signals.deferred() if deferred else contextlib.nullcontext():
            (tmp_path / "ready").touch()
            while signals.requested is None:
                time.sleep(0.01)
            if agrees:
                signals.agreed()
            (tmp_path / "requested").write_text(signals.requested)
            threading.Event().wait()

    process = _in_child(body)
    _wait_for(tmp_path / "ready")
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_the_second_signal_ends_the_process_at_once(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StopSignals, "SAME_SIGNAL_SECONDS", 3.0)  # a slow machine may need one between the first two
    process = _blocked(tmp_path, deferred=True)
    os.kill(process.pid, number)
    _wait_for(tmp_path / "requested")
    os.kill(process.pid, number)  # the same request, passed on by a launcher
    time.sleep(StopSignals.SAME_SIGNAL_SECONDS + 0.2)
    assert process.is_alive()
    assert (tmp_path / "requested").read_text() == number.name
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == 128 + number
    assert not (tmp_path / "end").exists()


def test_a_signal_ends_a_process_that_has_nothing_to_save(tmp_path: Path) -> None:
    process = _blocked(tmp_path, deferred=False)
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == EXIT_RESTART
    assert "SIGTERM while there was nothing to save" in (tmp_path / "end").read_text()


@pytest.mark.parametrize("agrees", [False, True])
def test_a_step_that_does_not_end_is_not_waited_for(tmp_path: Path, agrees: bool) -> None:
    process = _blocked(tmp_path, deferred=True, stop_timeout=2.0, agrees=agrees)
    os.kill(process.pid, signal.SIGUSR1)
    process.join(3 if agrees else 30)
    if agrees:  # it saves, which takes what it takes
        assert process.is_alive()
        process.kill()
        process.join()
        return
    assert process.exitcode == EXIT_RESTART
    assert "after SIGUSR1, and no progress for 2 s" in (tmp_path / "end").read_text()


def test_a_validation_is_waited_for_as_long_as_it_gets_on(tmp_path: Path) -> None:
    """Also a blocking save: both come before the next step's end, and mark what they have done."""

    def body() -> None:
        supervisor = Supervisor(Config(run=RunConfig(dir=str(tmp_path)), train=TrainConfig(stop_timeout=2.0)), 0, 1)
        with supervisor, supervisor.signals.deferred():
            os.kill(os.getpid(), signal.SIGUSR1)
            until = time.monotonic() + 4
            while time.monotonic() < until:
                supervisor.watchdog.mark()
                time.sleep(0.02)
            (tmp_path / "validated").touch()
            threading.Event().wait()  # a step that hangs

    process = _in_child(body)
    process.join(30)
    assert process.exitcode == EXIT_RESTART
    assert (tmp_path / "validated").exists()


def test_a_signal_in_the_last_validation_does_not_end_the_export(tmp_path: Path) -> None:
    """No step is left at whose end ranks could agree on it."""

    def body() -> None:
        signals = StopSignals(2.0, lambda reason: os._exit(EXIT_RESTART), lambda: 0.0)
        with signals:
            with signals.deferred():
                os.kill(os.getpid(), signal.SIGUSR1)
                while signals.requested is None:
                    time.sleep(0.01)
            time.sleep(3)

    process = _in_child(body)
    process.join(30)
    assert process.exitcode == 0


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals(1.0, lambda reason: None, time.monotonic):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_heartbeat_tells_state_restarts_and_warnings(tmp_path: Path) -> None:
    for restarts in range(2):
        heartbeat = Heartbeat(tmp_path, 0, 2)
        heartbeat.state("failed", "the folder is not ours yet")
        found = read_heartbeat(tmp_path)
        assert found is None or found["state"] == "running"
        heartbeat.start(num_steps=9)
        heartbeat.step(4, "ar")  # within a second of the last one
        found = json.loads((tmp_path / "heartbeat.json").read_text())
        assert (found["state"], found["restarts"], found["pid"]) == ("starting", restarts, os.getpid())
        heartbeat.warn("disk full")
        heartbeat.state("running")
        found = read_heartbeat(tmp_path)
        assert found is not None
        assert (found["state"], found["step"], found["stage"], found["num_steps"]) == ("running", 4, "ar", 9)
        assert (found["warning"], found["world_size"], found["message"]) == ("disk full", 2, "")
    Heartbeat(tmp_path, 1, 2).state("stalled", "rank 1")  # rank 0 hangs
    found = read_heartbeat(tmp_path)
    assert found is not None
    assert (found["state"], found["message"], found["step"], found["restarts"]) == ("stalled", "rank 1", 4, 1)
    assert not list(tmp_path.glob(".heartbeat*"))


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_left_of_a_run_says_that_a_rank_is_lost(tmp_path: Path, rank: int) -> None:
    """Rank 0, or another one where that is the lost one; not over what somebody has said of the end."""

    def end() -> str:
        ended = _in_child(lambda: supervisor._lost(1 - rank))
        ended.join(30)
        assert ended.exitcode == EXIT_RESTART
        found = read_heartbeat(tmp_path)
        assert found is not None
        return f"{found['state']}: {found['message']}"

    Heartbeat(tmp_path, 0, 2).start(10)
    supervisor = Supervisor(Config(run=RunConfig(dir=str(tmp_path))), rank, 2)
    if rank == 0:
        supervisor.heartbeat.start(10)
    supervisor.heartbeat.step(3, "ar")
    expected = f"lost: rank {1 - rank} is gone: ended without saving"
    assert end() == expected
    for state in ("stalled", "stopped", "failed", "finished"):
        (tmp_path / "heartbeat.json").write_text(json.dumps({"state": state, "message": "as it was"}))
        assert end() == f"{state}: as it was"


def test_what_another_machine_may_survive_is_no_failure_of_the_run() -> None:
    """An error that the run would meet again is told apart from one of the machine, whatever words are in its text."""
    assert is_of_the_machine(RuntimeError("CUDA error: uncorrectable ECC error encountered"))
    assert is_of_the_machine(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."))
    assert is_of_the_machine(RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"))
    for number in (errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.ESHUTDOWN, errno.ECONNRESET, errno.ETIMEDOUT):
        assert is_of_the_machine(OSError(number, "a file server is gone"))
    assert is_of_the_machine(TimeoutError("no answer"))
    assert not is_of_the_machine(RuntimeError("expected gloomy"))
    assert not is_of_the_machine(RuntimeError("CUDA error: device-side assert triggered"))
    assert not is_of_the_machine(TrainingError("runs/gloo", "the gradient is nan", "lower lr"))
    assert not is_of_the_machine(OSError(errno.ENOSPC, "No space left on device"))
    assert not is_of_the_machine(RuntimeError("shape mismatch"))
    assert not is_of_the_machine(torch.OutOfMemoryError("CUDA out of memory"))


def test_an_end_does_not_wait_for_a_folder_that_hangs(tmp_path: Path) -> None:
    """The heartbeat's temporary name is a pipe that nobody reads."""

    def body() -> None:
        Supervisor.END_SECONDS = 1.0
        supervisor = Supervisor(Config(run=RunConfig(dir=str(tmp_path))), 0, 1)
        supervisor.heartbeat.start(10)
        os.mkfifo(tmp_path / ".heartbeat.json.0.tmp")
        supervisor._lost(1)

    ended = _in_child(body)
    ended.join(30)
    assert ended.exitcode == EXIT_RESTART


# --- runs -------------------------------------------------------------------------------------------------------------


def state(run_dir: Path) -> str:
    heartbeat = read_heartbeat(run_dir)
    return "" if heartbeat is None else heartbeat["state"]


def children(pid: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(pid).children() if "python" in child.name()]


def test_when_a_rank_is_killed_the_other_goes_without_saving(cache: Path, tmp_path: Path) -> None:
    """Started one by one, as by srun: nobody but the rank itself looks after its peers."""
    run_dir = tmp_path / "run"
    with Job(run_dir, cache, *ENDLESS, output=tmp_path / "output", ranks=2) as job:
        job.wait_for_step(10)
        for worker in children(job.processes[0].pid):  # what a launcher sends to all processes of a job
            worker.send_signal(signal.SIGTERM)
            worker.send_signal(signal.SIGUSR1)
        job.wait_for_step(last_step(run_dir) + 20)
        job.processes[1].kill()
        killed = time.monotonic()
        job.processes[1].wait()
        assert job.processes[0].wait(15) == EXIT_RESTART
        assert time.monotonic() - killed < 15
        saved = {path.name for path in complete_checkpoints(run_dir / "checkpoints")}
        while group_is_alive(job.processes[0].pid):  # the loader's workers go, too
            assert time.monotonic() - killed < 15
            time.sleep(0.1)
    assert "rank 1 is gone: ended without saving" in job.output.read_text()
    assert state(run_dir) == "lost"
    assert "rank 1 is gone" in (read_heartbeat(run_dir) or {})["message"]
    assert saved == {path.name for path in complete_checkpoints(run_dir / "checkpoints")}
    assert last_step(run_dir) % 3 == 0 or f"step_{last_step(run_dir):08d}" not in saved


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_stands_still_ends_the_run(cache: Path, tmp_path: Path, victim: int) -> None:
    run_dir = tmp_path / "run"
    with Job(run_dir, cache, *ENDLESS, "train.stall_timeout=20", output=tmp_path / "output", ranks=2) as job:
        job.wait_for_step(10)
        job.processes[victim].send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        assert job.processes[1 - victim].wait(60) == EXIT_RESTART
        assert 15 < time.monotonic() - stopped < 30
    assert state(run_dir) == "stalled"
    (dump,) = (run_dir / "stacks").iterdir()
    assert dump.name.endswith(f"rank{1 - victim}.txt")
    assert "in train" in dump.read_text()


HANGS = """
import sys, time
from nld_train.training.supervision import Supervisor
import nld_train.training.run as run
Supervisor.FILE_SECONDS = 3.0
run.export_checkpoint = lambda *arguments, **more: time.sleep(1000)
from nld_train.config.compose import main
sys.exit(main(sys.argv[1:], run.run))
"""


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("where", ["start", "end"])
def test_a_file_server_that_hangs_ends_a_start_and_an_export(cache: Path, tmp_path: Path, where: str) -> None:
    """Of the start: a file of the newest checkpoint is a pipe into which nobody writes."""
    run_dir = tmp_path / "run"
    if where == "start":
        (run_dir / "checkpoints/step_00000001").mkdir(parents=True)
        os.mkfifo(run_dir / "checkpoints/step_00000001/checksums.txt")
    _, _, *overrides = command(run_dir, cache, "train.stall_timeout=2")
    ended = subprocess.run(
        [sys.executable, "-c", HANGS, *overrides], cwd=ROOT, env=ON_CPU, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert ended.returncode == EXIT_RESTART, ended.stderr
    assert state(run_dir) == "stalled"
    assert "no progress for 3 s (the limit while a run starts or ends)" in ended.stderr
    (dump,) = (run_dir / "stacks").iterdir()
    assert ("in read_checksums" if where == "start" else "in finish") in dump.read_text()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_torchrun_stops_and_loses_ranks(cache: Path, tmp_path: Path) -> None:
    """torchrun passes SIGTERM on, and sends it by itself when a rank has died: only the first is a reason to save."""
    run_dir = tmp_path / "run"
    with Job(run_dir, cache, output=tmp_path / "output", ranks=2, torchrun=True) as job:
        job.wait_for_step(8)
        job.processes[0].send_signal(signal.SIGTERM)
        assert job.statuses(timeout=200) != [0]
    assert state(run_dir) == "stopped", job.output.read_text()
    stopped_at = last_step(run_dir)
    assert (run_dir / f"checkpoints/step_{stopped_at:08d}").is_dir()
    result = train(run_dir, cache, ranks=2)
    assert result.returncode == 0, result.stderr
    undisturbed = train(tmp_path / "undisturbed", cache, ranks=2)
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert records(run_dir) == records(tmp_path / "undisturbed")
    same_export(run_dir, tmp_path / "undisturbed")

    lost = tmp_path / "lost"
    with Job(
        lost, cache, *ENDLESS, "checkpoint.interval_steps=1000000", output=tmp_path / "output", ranks=2, torchrun=True
    ) as job:
        job.wait_for_step(10)
        ranks = children(job.processes[0].pid)
        ranks[-1].kill()
        killed = time.monotonic()
        job.statuses(timeout=200)
        assert time.monotonic() - killed < 15
        assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    assert not complete_checkpoints(lost / "checkpoints")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_goes_on_while_the_disk_is_full(cache: Path, tmp_path: Path) -> None:
    """No file may grow above 64 KB for a while: a checkpoint does not fit, what a step writes does."""
    run_dir = tmp_path / "run"
    longer = (steps("joint", 300), "train.validation_interval=1000")
    assert train(tmp_path / "undisturbed", cache, *longer).returncode == 0
    with Job(run_dir, cache, *longer, output=tmp_path / "output") as job:
        job.wait_for_step(30)
        pid = job.processes[0].pid
        limit = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (65536, limit[1]))
        job.wait_until(lambda: "WARNING: the checkpoint of step" in (run_dir / "train.log").read_text())
        kept = complete_checkpoints(run_dir / "checkpoints")
        assert kept
        job.wait_for_step(last_step(run_dir) + 5)
        assert set(kept) <= set(complete_checkpoints(run_dir / "checkpoints"))
        assert "could not be written" in (read_heartbeat(run_dir) or {}).get("warning", "")
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)
        assert job.statuses(timeout=200) == [0], job.output.read_text()
    assert records(run_dir) == records(tmp_path / "undisturbed")
    same_export(run_dir, tmp_path / "undisturbed")
