"""The main job, started as a user or a cluster starts it, at a size that takes seconds."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors.torch import load_file

from nld_train.checkpoint.manager import latest_checkpoint
from nld_train.training.metrics import TIMING_FIELDS

ROOT = Path(__file__).parents[2]
ON_CPU = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # the layouts need more ranks than a machine may have GPUs
BATCH, LENGTH = 4, 32
STEPS = {"ar": 6, "joint": 10}

SMALL = [
    "model.hidden_size=32",
    "model.ffn_hidden_size=48",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=2",
    "model.head_dim=16",
    "model.vocab_size=512",
    f"data.sequence_length={LENGTH}",
    "objective.block_size=8",
    f"train.global_batch_size={BATCH}",
]
"""What all runs of the tests have; layers, stages and intervals are their own."""

OVERRIDES = [
    *SMALL,
    "model.num_layers=4",
    "train.micro_batch_size=2",
    "train.validation_interval=4",
    "train.validation_samples=8",
    *(f"stages.{name}.tokens={steps * BATCH * LENGTH}" for name, steps in STEPS.items()),
    "checkpoint.interval_steps=3",
    "checkpoint.interval_seconds=0",
    "export.max_new_tokens=8",
]


def importing_project(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables of a program that lies elsewhere: it imports this checkout, and else what it would import anyway."""
    folders = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(folders)}


def steps(stage: str, number: int) -> str:
    """The override that makes a stage ``number`` steps long."""
    return f"stages.{stage}.tokens={number * BATCH * LENGTH}"


def command(run_dir: Path, cache: Path, *extra: str, ranks: int = 1) -> list[str]:
    """``train.py``, through torchrun if it has several ranks."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launcher, "train.py", f"run.dir={run_dir}", f"data.cache_dir={cache}", *OVERRIDES, *extra]


def train(run_dir: Path, cache: Path, *extra: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Run the job to its end."""
    return subprocess.run(
        command(run_dir, cache, *extra, ranks=ranks),
        cwd=ROOT,
        env=ON_CPU,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


class Job:
    """A job under way; as a context manager it leaves no process behind.

    Args:
        output: file that takes what all ranks print.
        ranks: processes, started one by one as srun does, in one process group; with ``torchrun`` by it.
    """

    def __init__(
        self, run_dir: Path, cache: Path, *extra: str, output: Path, ranks: int = 1, torchrun: bool = False
    ) -> None:
        self.run_dir = run_dir
        self.output = output
        self.processes: list[subprocess.Popen[bytes]] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with output.open("ab") as file:
            for rank in range(1 if torchrun else ranks):
                environment = ON_CPU
                if ranks > 1 and not torchrun:
                    environment = ON_CPU | {
                        "RANK": str(rank),
                        "LOCAL_RANK": str(rank),
                        "WORLD_SIZE": str(ranks),
                        "LOCAL_WORLD_SIZE": str(ranks),
                        "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(port),
                    }
                self.processes.append(
                    subprocess.Popen(
                        command(run_dir, cache, *extra, ranks=ranks if torchrun else 1),
                        cwd=ROOT,
                        env=environment,
                        stdout=file,
                        stderr=file,
                        process_group=self.processes[0].pid if self.processes else 0,
                    )
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """kill -9 of all processes at once, loader workers too (torchrun's ranks have groups of their own)."""
        if group_is_alive(self.processes[0].pid):
            os.killpg(self.processes[0].pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def is_over(self) -> bool:
        """All ranks have ended."""
        return all(process.poll() is not None for process in self.processes)

    def wait_until(self, is_time: Callable[[], bool], timeout: float = 200.0, pause: float = 0.02) -> None:
        """Raises AssertionError where the job ends, or the time passes, before."""
        deadline = time.monotonic() + timeout
        while not is_time():
            assert not self.is_over(), f"the job ended before:\n{self.output.read_text()}"
            assert time.monotonic() < deadline, f"waited {timeout:g} s:\n{self.output.read_text()}"
            time.sleep(pause)

    def wait_for_step(self, step: int) -> None:
        """Until the record of a step is on file."""
        self.wait_until(lambda: last_step(self.run_dir) >= step)

    def statuses(self, timeout: float) -> list[int]:
        """Exit statuses of all processes."""
        deadline = time.monotonic() + timeout
        return [process.wait(max(0.0, deadline - time.monotonic())) for process in self.processes]


def last_step(run_dir: Path) -> int:
    """Of the records on file; a torn last line does not count."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def last_checkpoint(run_dir: Path) -> int:
    """Its step. Checkpoints are written beside the training: some steps may be done before one has its name."""
    newest = latest_checkpoint(run_dir / "checkpoints")
    return 0 if newest is None else int(newest.name.removeprefix("step_"))


def group_is_alive(group: int) -> bool:
    """A process of this group is there."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def records(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run without times and rates."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING_FIELDS} for line in lines]


def same_export(one: Path, other: Path) -> None:
    """Bit by bit."""
    tensors, others = load_file(one / "hf/model.safetensors"), load_file(other / "hf/model.safetensors")
    assert set(tensors) == set(others)
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype
        assert torch.equal(tensor, others[name]), name
