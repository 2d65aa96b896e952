"""How long training waits for a checkpoint."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nld_train.checkpoint.checksums import read_checksums
from nld_train.checkpoint.manager import CheckpointInfo, CheckpointManager
from nld_train.config.schema import (
    CheckpointConfig,
    Device,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
)
from nld_train.model.build import build_model
from nld_train.platform.device import initialize_device
from nld_train.platform.topology import topology_of
from nld_train.testing.benchmarks.comparison import Comparison, Work
from nld_train.training.optimizer import build_optimizer, set_hyperparameters
from nld_train.training.run import connect, wrap_data_parallel


@dataclass(slots=True)
class Save:
    """A checkpoint of one state; ``seconds`` is how long the training waits for it, ``folder`` where it is."""

    manager: CheckpointManager
    begin: Callable[[], None]
    seconds: float = 0.0

    def __call__(self) -> Sequence[Tensor]:
        start = time.perf_counter()
        self.begin()
        waited = time.perf_counter() - start
        while self.manager.is_writing:
            time.sleep(0.01)  # the steps in between
        start = time.perf_counter()
        result = self.manager.finish()
        self.seconds = waited + time.perf_counter() - start
        assert result.error is None, result.error
        checksums = read_checksums(result.folder)
        return [torch.tensor(checksums["__0_0.distcp"].crc32, dtype=torch.float64)]


def checkpoint_suite(device: torch.device) -> Iterator[Comparison]:
    """How long the training waits for a save of one rank with 84M bf16 parameters and their optimizer state, with and
    without `checkpoint.asynchronous`: until everything is on disk, or until the state is copied. What it waits for at
    both ends counts: the copy, and later the common files, syncs and the rename."""
    model = ModelConfig(
        num_layers=3, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=8, num_key_value_heads=8,
        head_dim=128, vocab_size=16384,
    )  # fmt: skip
    platform = initialize_device(Device(device.type))
    parent = Path("runs/benchmark")
    parent.mkdir(parents=True, exist_ok=True)
    with (
        topology_of(ParallelConfig(), platform, seed=1),
        tempfile.TemporaryDirectory(dir=parent) as folder,
    ):
        built = build_model(model, ParallelConfig(), dtype=torch.bfloat16, device=device, seed=1)
        chunks = [wrap_data_parallel(built)]
        optimizer = build_optimizer(OptimConfig(), chunks, torch.bfloat16)
        connect(chunks, optimizer)
        for parameter in built.parameters():
            parameter.main_grad.normal_()  # type: ignore[attr-defined]
        set_hyperparameters(optimizer, OptimConfig(), 1e-3)
        optimizer.step()
        info = CheckpointInfo(
            step=1, tokens=0, stage="", samples=0, dtype="bfloat16", model=model, parallel={}, config={}, metrics={},
            tokenizer="",
        )  # fmt: skip
        variants = {}
        for name in ("synchronous", "asynchronous"):
            config = CheckpointConfig(asynchronous=name == "asynchronous")
            manager = CheckpointManager(Path(folder) / name, config)
            variants[name] = Save(manager, partial(manager.begin, chunks, optimizer, info))
        variants["synchronous"]()
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.distcp")) / 1e9

        def measured(work: Work) -> float:
            work()
            assert isinstance(work, Save)
            return work.seconds

        yield Comparison(
            title=f"the training waits for a checkpoint of {size:.2f} GB, one rank",
            variants=dict(variants),
            tolerance=0.0,
            required={"asynchronous": 5.0},
            measure=measured,
            unit="s",
            unit_scale=1.0,
        )
