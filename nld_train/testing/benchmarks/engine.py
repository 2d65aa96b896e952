"""What Megatron's engine, and a whole run around it, cost beside a loop in plain PyTorch."""

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nld_train.config.compose import compose_unlaunched
from nld_train.config.schema import Device, ParallelConfig
from nld_train.model.attention import resolve_backend
from nld_train.model.build import build_model
from nld_train.model.head import select_weighted_rows
from nld_train.objective.normalize import num_tokens, row_weights
from nld_train.platform.device import initialize_device
from nld_train.platform.topology import topology_of
from nld_train.testing.benchmarks.comparison import Comparison, Work, seconds
from nld_train.testing.benchmarks.conversion import without_results
from nld_train.testing.benchmarks.step import TrainingStep, loader_batch
from nld_train.testing.jobs import ROOT, importing_project
from nld_train.testing.peers import PlainModel
from nld_train.training.metrics import read_metrics
from nld_train.training.step import LossWeights, lay_out

LR = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class DefaultStep:
    """A training step of the default run's joint stage, in two ways that return the loss and the gradient's norm.

    Args:
        engine: Megatron's schedule, data parallelism and distributed optimizer, as a run has them.
        loop: the same model and samples in plain PyTorch.
    """

    engine: Work
    loop: Work


def default_step(device: torch.device, dtype: torch.dtype) -> DefaultStep:
    """Both start from the same weights. Inside :func:`nld_train.platform.topology.topology_of`."""
    config = compose_unlaunched([])
    shape, train, objective, optim = config.model, config.train, config.objective, config.optim
    length, batch = config.data.sequence_length, train.micro_batch_size
    sizes = (train.global_batch_size, length + 1)
    text = torch.randint(1000, shape.vocab_size, sizes, generator=torch.Generator().manual_seed(0))
    everything = torch.ones(batch, length, dtype=torch.bool)
    samples = [loader_batch(part, objective, everything) for part in text.split(batch)]
    weights = LossWeights(diffusion=objective.diffusion_loss_weight)

    model = build_model(shape, ParallelConfig(), dtype=dtype, device=device, seed=0)
    plain = PlainModel(shape, dict(model.named_parameters()), resolve_backend(shape.attention_backend, device))
    plain.to(device)
    adam = torch.optim.AdamW(
        plain.parameters(),
        lr=LR,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=True,
    )
    engine = TrainingStep(model, samples, objective=objective, weights=weights, optim=optim, lr=LR)

    def loop() -> Sequence[Tensor]:
        adam.zero_grad(set_to_none=True)
        total, divisor = torch.zeros((), device=device), 0.0
        for sample in samples:
            joint = lay_out(sample, objective.block_size)
            of_rows = row_weights(joint, objective.normalization.value, weights.diffusion, weights.ar)
            divisor += float(num_tokens(joint, objective.normalization.value))
            selected = select_weighted_rows(joint, of_rows).to(device)
            joint = joint.to(device)
            loss = plain(joint.tokens, joint.layout, selected)
            loss.backward()
            total += loss.detach()
        for parameter in plain.parameters():
            assert parameter.grad is not None
            parameter.grad /= divisor
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), optim.clip_grad)
        adam.step()
        return [total / divisor, norm]

    return DefaultStep(engine=engine, loop=loop)


@dataclass(slots=True, kw_only=True)
class TrainRun:
    """``train.py`` with the default configuration, the joint stage alone, in a process of its own.

    Args:
        device: where it runs.
        num_steps: of them the first ``NUM_SKIPPED`` do not count.
    """

    NUM_SKIPPED = 5

    device: torch.device
    num_steps: int = 35
    step_seconds: float = field(default=0.0, init=False)
    """Median over the steps of the last run, everything between two steps included, but for validation and saves."""

    def __call__(self) -> Sequence[Tensor]:
        config = compose_unlaunched([])
        tokens = self.num_steps * config.train.global_batch_size * config.data.sequence_length
        with tempfile.TemporaryDirectory(prefix="benchmark_engine_") as folder:
            command = [sys.executable, str(ROOT / "train.py"), f"run.dir={folder}/run", "~stages.ar"]
            command += [f"stages.joint.tokens={tokens}", "export.enabled=false", "train.validation_samples=8"]
            command += ["train.log_interval=1", "checkpoint.interval_steps=1000000", "checkpoint.interval_seconds=0"]
            command += [f"train.device={self.device.type}"]
            environment = importing_project() | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
            finished = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
            )  # fmt: skip
            if finished.returncode != 0:
                raise RuntimeError(f"train.py failed:\n{finished.stdout}{finished.stderr}")
            steps = read_metrics(Path(folder) / "run" / "metrics.jsonl").steps
        self.step_seconds = statistics.median(record["step_seconds"] for record in steps[self.NUM_SKIPPED :])
        return []


def engine_suite(device: torch.device) -> Iterator[Comparison]:
    """A training step of the default run's joint stage (forward, backward, clipping, optimizer) against a loop in plain
    PyTorch of the same model, with this project's attention and head, on samples that are in memory
    (`testing.peers.PlainModel`).

    - Megatron's engine on the same samples: loss and gradient norm are compared before anything is timed. In bf16 the
      loop does less: it has no fp32 weights, moments and sums of gradients.
    - `train.py`, which reads, noises, watches, and writes its records besides: the median of 30 steps of a run in a
      process of its own, one in each round, between validation and saves."""
    with topology_of(ParallelConfig(), initialize_device(Device(device.type)), seed=0):
        for dtype in (torch.float32, torch.bfloat16):
            step = default_step(device, dtype)
            yield Comparison(
                title=f"training step of the default run, {str(dtype).removeprefix('torch.')}, on {device.type}",
                variants={"plain PyTorch": step.loop, "Megatron's engine": step.engine},
                tolerance=1e-2 if dtype is torch.bfloat16 else 1e-4,
                required={"Megatron's engine": 1 / 1.15},
            )
        loop, run = default_step(device, torch.float32).loop, TrainRun(device=device)
        works: dict[str, Work] = {
            "plain PyTorch": lambda: [tensor for _ in range(10) for tensor in without_results(loop)],
            "train.py": run,
        }

        def measured(work: Work) -> float:
            if work is run:
                work()
                return run.step_seconds
            return seconds(work) / 10

        yield Comparison(
            title=f"step of train.py, float32, on {device.type}",
            variants=works,
            tolerance=0.0,
            required={"train.py": 1 / 1.15},
            measure=measured,
        )
