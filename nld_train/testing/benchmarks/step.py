"""Whole steps: against the public recipe, transformers, and other sizes of themselves."""

import gc
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from nld_train.config.rules import missing_for_compilation
from nld_train.config.schema import (
    CompilePointwise,
    Device,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    ParallelConfig,
    RopeConfig,
    Sampler,
    Stratify,
)
from nld_train.config.workload import flops_per_token, public_workload
from nld_train.data.loader import LoaderBatch
from nld_train.model.build import NLDModel, build_model
from nld_train.objective.noise import corrupt
from nld_train.platform.device import initialize_device
from nld_train.platform.topology import topology_of
from nld_train.testing.benchmarks.comparison import Comparison, Work
from nld_train.testing.benchmarks.conversion import Conversion, anonymous_bytes, without_results
from nld_train.testing.peers import PublicRecipeModel
from nld_train.testing.reference import transformers_model
from nld_train.training.optimizer import build_optimizer, set_hyperparameters, step_with_norm
from nld_train.training.run import connect, wrap_data_parallel
from nld_train.training.step import LossWeights, StepShape, noise_spec, run_microbatches

StepSize = tuple[int, int, int, int, int, int, int, int]
"""hidden, layers, ffn, heads, key-value heads, vocabulary, L, B"""


STEP_SHAPES: dict[str, list[StepSize]] = {  # on the CPU and on a GPU
    "cpu": [(256, 4, 768, 4, 2, 8192, 512, 2), (384, 6, 1152, 6, 2, 32768, 1024, 1)],
    "cuda": [(2048, 8, 6144, 16, 4, 131072, 4096, 1)],
}


_REQUIRED_RATIO = {"cpu": {torch.bfloat16: 1.6, torch.float32: 1.4}, "cuda": {torch.bfloat16: 1.2}}
"""Of the public recipe's time to ours."""


def loader_batch(text: Tensor, objective: ObjectiveConfig | None, is_supervised: Tensor) -> LoaderBatch:
    """A micro-batch of tokens int64 [B, L + 1]; ``objective`` None: an AR step."""
    tokens, positions = text[:, :-1].contiguous(), torch.arange(len(text))
    corruption = None
    if objective is not None:
        # One draw must stand for many: the recipe masks anything from nothing to everything. Of these, the one whose
        # masked share is nearest to their mean.
        specs = (noise_spec(objective, seed=seed, global_batch_size=len(text)) for seed in range(64))
        draws = [corrupt(tokens, positions, spec, is_supervised) for spec in specs]
        num_masked = torch.tensor([(draw.weights > 0).sum().item() for draw in draws])
        corruption = draws[int((num_masked - num_masked.float().mean()).abs().argmin())]
    return LoaderBatch(
        tokens=tokens,
        labels=text[:, 1:].contiguous(),
        loss_mask=is_supervised.float(),
        is_supervised=is_supervised,
        document_starts=None,
        stream_positions=positions,
        corruption=corruption,
    )


def step_model(size: StepSize) -> ModelConfig:
    hidden, layers, ffn, heads, kv_heads, vocab, _, _ = size
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        vocab_size=vocab,
        rope=RopeConfig(),
    )


def step_text(size: StepSize) -> Tensor:
    """int64 [B, L + 1]"""
    vocab, length, batch = size[5:]
    return torch.randint(1000, vocab, (batch, length + 1), generator=torch.Generator().manual_seed(0))


def step_title(size: StepSize, dtype: torch.dtype, device: torch.device) -> str:
    hidden, layers, _, _, _, vocab, length, batch = size
    name = str(dtype).removeprefix("torch.")
    return f"{name}, hidden {hidden}, {layers} layers, V {vocab}, L {length}, batch {batch}, on {device.type}"


STEP_RECIPE = ObjectiveConfig(sampler=Sampler.bernoulli, stratify=Stratify.none, noisy_fraction=1.0)


OURS, EAGER = "ours", "ours, not compiled"


def compiled_where_possible(shape: ModelConfig, device: torch.device) -> ModelConfig:
    """With norm, SwiGLU and rotary embedding compiled, on the CPU if there is a C++ compiler."""
    can_compile = device.type == "cuda" or missing_for_compilation() is None
    return replace(shape, compile_pointwise=CompilePointwise.always if can_compile else CompilePointwise.never)


class EngineStep:
    """Forward and backward of one micro-batch through Megatron's schedule. One for each model: the model's gradients go
    to the buffer of the wrapper that was made last.

    Returns both loss sums, then every gradient as Megatron holds it, by name; the next call writes over them.
    """

    def __init__(self, model: NLDModel, device: torch.device) -> None:
        self.wrapped = wrap_data_parallel(model, use_distributed_optimizer=False)
        connect([self.wrapped], None)
        self.device = device
        parameters = dict(model.named_parameters())
        self.gradients: list[Tensor] = [parameters[name].main_grad for name in sorted(parameters)]  # type: ignore[attr-defined]

    def __call__(self, sample: LoaderBatch) -> Sequence[Tensor]:
        self.wrapped.zero_grad_buffer()
        shape = StepShape(num_microbatches=1, micro_batch_size=len(sample.tokens), num_rows=None)
        weights = LossWeights(diffusion=0.3)
        terms = run_microbatches(
            iter([sample]), [self.wrapped], shape, objective=STEP_RECIPE, weights=weights, device=self.device
        )
        return [terms.ar_sum, terms.diffusion_sum, *self.gradients]


OPTIMIZER_MARK = "optimizer step"
"""What the profiler calls clipping and the update of a :class:`TrainingStep`."""


class TrainingStep:
    """A whole training step of one rank as a run takes it: forward and backward of every micro-batch through Megatron's
    schedule, clipping, the optimizer's update.

    Returns the loss per token, and the gradient's norm before clipping.

    Args:
        model: its data-parallel wrapper and optimizer are made here; one step for each model.
        samples: the micro-batches of each step, of one size.
        overlapped: see :func:`nld_train.training.run.overlap`.
    """

    def __init__(
        self,
        model: NLDModel,
        samples: Sequence[LoaderBatch],
        *,
        objective: ObjectiveConfig,
        weights: LossWeights,
        optim: OptimConfig,
        lr: float,
        overlapped: Mapping[str, bool] | None = None,
    ) -> None:
        parameter = next(model.parameters())
        self.samples, self.objective, self.weights, self.device = samples, objective, weights, parameter.device
        self.optim, self.lr = optim, lr
        self.wrapped = wrap_data_parallel(model, **(overlapped or {}))
        self.optimizer = build_optimizer(optim, [self.wrapped], parameter.dtype)
        connect([self.wrapped], self.optimizer)

    def zero_gradients(self) -> None:
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()

    def update(self) -> float:
        """The optimizer's part; the gradient's norm."""
        set_hyperparameters(self.optimizer, self.optim, self.lr)
        with record_function(OPTIMIZER_MARK):
            return step_with_norm(self.optimizer, self.optim)

    def __call__(self) -> Sequence[Tensor]:
        self.zero_gradients()
        size = len(self.samples[0].tokens)
        terms = run_microbatches(
            iter(self.samples),
            [self.wrapped],
            StepShape(num_microbatches=len(self.samples), micro_batch_size=size, num_rows=None),
            objective=self.objective,
            weights=self.weights,
            device=self.device,
        )
        norm = self.update()
        return [terms.loss_sum / terms.divisor, torch.tensor(norm)]

    def release(self) -> None:
        """Give back the memory of model, gradients and optimizer, for a model that does not fit beside this one."""
        del self.wrapped, self.optimizer
        gc.collect()  # Megatron's hooks and its wrapper hold each other


def step_suite(device: torch.device) -> Iterator[Comparison]:
    """Forward and backward of a whole step through Megatron's schedule, against

    - the public recipe's way of computing the same step (`testing.peers.PublicRecipeModel`: one attention under a dense
      mask with repeated keys and values, the head on every row, all logits). The losses and every gradient are compared
      before anything is timed;
    - the recipe's joint step and the AR step: what a fraction of the blocks and another sampler save, and what a joint
      step costs in AR steps;
    - the AR part of a supervised step whose sequences are 90% prompt;
    - an AR training step of transformers' Ministral3 with the same weights.

    On the CPU norm, SwiGLU and rotary embedding of ours are compiled (`model.compile_pointwise=always`) where a C++
    compiler is there; "ours, not compiled" is the default. The public recipe has Megatron's own there.

    The noise is the draw whose masked share is nearest to the mean of 64 draws."""
    platform_ = initialize_device(Device(device.type))
    with topology_of(ParallelConfig(), platform_, seed=0):
        for size in STEP_SHAPES[device.type]:
            text = step_text(size)
            batch, length = size[7], size[6]
            everything = torch.ones(batch, length, dtype=torch.bool)
            answers = everything.clone()
            answers[:, : length * 9 // 10] = False
            batches = {
                "recipe": loader_batch(text, STEP_RECIPE, everything),
                "fraction 0.5": loader_batch(text, replace(STEP_RECIPE, noisy_fraction=0.5), everything),
                "fraction 0.25": loader_batch(text, replace(STEP_RECIPE, noisy_fraction=0.25), everything),
                "power count": loader_batch(text, replace(STEP_RECIPE, sampler=Sampler.power_count), everything),
                "AR": loader_batch(text, None, everything),
            }
            supervised = {"AR": loader_batch(text, None, answers), "joint": loader_batch(text, STEP_RECIPE, answers)}
            for dtype in (torch.float32, torch.bfloat16):
                shape, title = compiled_where_possible(step_model(size), device), step_title(size, dtype, device)
                model = build_model(shape, ParallelConfig(), dtype=dtype, device=device, seed=0)
                step = EngineStep(model, device)
                others: dict[str, EngineStep] = {}
                if device.type == "cpu" and shape.compile_pointwise is CompilePointwise.always:
                    eager = build_model(step_model(size), ParallelConfig(), dtype=dtype, device=device, seed=0)
                    others[EAGER] = EngineStep(eager, device)
                public = EngineStep(PublicRecipeModel(shape, dtype=dtype, device=device, seed=0), device)
                # The others compute different things: nothing of theirs is compared.
                works: dict[str, Work] = {
                    key: partial(without_results, partial(step, sample)) for key, sample in batches.items()
                }
                is_bf16 = dtype is torch.bfloat16
                required = _REQUIRED_RATIO[device.type].get(dtype)
                yield Comparison(
                    title=f"joint step, {title}, against the public recipe's",
                    variants={
                        "public recipe": partial(public, batches["recipe"]),
                        OURS: partial(step, batches["recipe"]),
                        **{name: partial(other, batches["recipe"]) for name, other in others.items()},
                    },
                    tolerance=3e-2 if is_bf16 else 1e-4,
                    required={} if required is None else {OURS: required},
                )
                yield Comparison(
                    title=f"joint step, {title}",
                    variants=works,
                    tolerance=0.0,
                    required={"fraction 0.5": 2 / (1.1 * 1.5), "fraction 0.25": 2 / (1.1 * 1.25)},
                )
                yield Comparison(
                    title=f"AR step and the joint steps, {title}",
                    variants={key: works[key] for key in ("AR", "recipe", "fraction 0.5")},
                    tolerance=0.0,
                    required={"recipe": 1 / 2.0, "fraction 0.5": 1 / 1.55},
                )
                yield Comparison(
                    title=f"supervised step at 90% prompt, {title}",
                    variants={
                        key: partial(without_results, partial(step, sample)) for key, sample in supervised.items()
                    },
                    tolerance=0.0,
                    required={"joint": 1 / 1.25},
                )
                theirs = transformers_step(shape, model, dtype, text.to(device))
                yield Comparison(
                    title=f"AR step, {title}, against transformers' Ministral3",
                    variants={
                        "transformers": theirs,
                        OURS: works["AR"],
                        **{
                            name: partial(without_results, partial(other, batches["AR"]))
                            for name, other in others.items()
                        },
                    },
                    tolerance=0.0,
                    required={OURS: 1.0},
                )


def transformers_step(shape: ModelConfig, model: NLDModel, dtype: torch.dtype, text: Tensor) -> Work:
    """An AR training step of transformers' Ministral3 with the weights of ``model``."""
    theirs: Any = transformers_model(shape, dict(model.named_parameters()), dtype)
    theirs.to(text.device)
    tokens, labels = text[:, :-1], text[:, 1:]

    def work() -> Sequence[Tensor]:
        theirs.zero_grad(set_to_none=True)
        logits = theirs(input_ids=tokens, use_cache=False).logits
        F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum").backward()
        return []

    return work


def memory_suite(device: torch.device) -> Iterator[Comparison]:
    """Peak anonymous memory (`RssAnon`, polled every 5 ms) of a joint step's forward and backward above what stands
    before it (weights, gradients), ours and the public recipe's, each in a process of its own, on the CPU. The ratio is
    the public recipe's memory to ours."""
    if device.type != "cpu":
        raise SystemExit("the memory suite reads the memory of processes: use --device cpu")
    for number, size in enumerate(STEP_SHAPES["cpu"]):
        for dtype, limit in ((torch.float32, 0.55), (torch.bfloat16, 0.45)):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                runs = {
                    variant: Conversion(
                        partial(step_for_memory, is_public=variant != "ours", number=number, dtype=dtype),
                        folder,
                        folder / "out",
                    )
                    for variant in ("public recipe", "ours")
                }

                def work(run: Conversion) -> Sequence[Tensor]:
                    run.peak_bytes = 0
                    run()
                    results: list[Tensor] = torch.load(run.out / "result.pt")
                    return results[1:]

                works: dict[str, Work] = {variant: partial(work, run) for variant, run in runs.items()}
                by_work = {id(works[variant]): run for variant, run in runs.items()}

                def peak(work: Work, by_work: dict[int, Conversion] = by_work) -> float:
                    work()
                    run = by_work[id(work)]
                    return run.peak_bytes - float(torch.load(run.out / "result.pt")[0])

                yield Comparison(
                    title=f"peak anonymous memory above resident, {step_title(size, dtype, device)}",
                    variants=works,
                    tolerance=3e-2,
                    required={"ours": 1 / limit},
                    measure=peak,
                    unit="MB",
                    unit_scale=1e-6,
                )


def step_for_memory(_source: Path, out: Path, *, is_public: bool, number: int, dtype: torch.dtype) -> None:
    """One joint step in a fresh process; writes what was resident before it, the losses and some gradients."""
    device, size = torch.device("cpu"), STEP_SHAPES["cpu"][number]
    with topology_of(ParallelConfig(), initialize_device(Device.cpu), seed=0):
        shape, text = step_model(size), step_text(size)
        model: NLDModel
        if is_public:
            model = PublicRecipeModel(shape, dtype=dtype, device=device, seed=0)
        else:
            model = build_model(shape, ParallelConfig(), dtype=dtype, device=device, seed=0)
        step = EngineStep(model, device)
        sample = loader_batch(text, STEP_RECIPE, torch.ones(text.shape[0], text.shape[1] - 1, dtype=torch.bool))
        step.wrapped.zero_grad_buffer()  # its pages are there from now on
        for parameter in step.wrapped.parameters():
            parameter.main_grad.zero_()
        resident = anonymous_bytes(os.getpid())
        step(sample)
        gradients = [parameter.main_grad.flatten()[::64].clone() for parameter in step.wrapped.parameters()]
    out.mkdir()
    torch.save([torch.tensor(float(resident)), *gradients], out / "result.pt")


def scaling_suite(device: torch.device) -> Iterator[Comparison]:
    """How a joint step (forward and backward, the recipe's objective) grows with layers, batch and length. Beside each
    ratio stands the one that counting operations gives (`config.workload.flops_per_token`): linear in layers and batch;
    in L, what attention adds. A step may take 1.15 times what they say, at most; it may grow by less, where a small
    step is slowed by what does not depend on its size."""
    small = STEP_SHAPES[device.type][0]
    hidden, layers, ffn, heads, kv_heads, vocab, length, batch = small
    sizes: dict[str, dict[str, StepSize]] = {
        "layers": {f"{n} layers": (hidden, n, ffn, heads, kv_heads, vocab, length, batch) for n in (2, 4, 8, 16)},
        "batch": {f"batch {n}": (hidden, layers, ffn, heads, kv_heads, vocab, length, n) for n in (1, 2, 4, 8)},
        "length": {
            f"L {length * n}, batch 1": (hidden, layers, ffn, heads, kv_heads, vocab, length * n, 1)
            for n in (1, 2, 4, 8)
        },
        "length at the same tokens": {
            f"L {length * n}, batch {8 // n}": (hidden, layers, ffn, heads, kv_heads, vocab, length * n, 8 // n)
            for n in (1, 2, 4, 8)
        },
    }

    def operations(size: StepSize, sample: LoaderBatch) -> float:
        length, batch = size[6:]
        assert sample.corruption is not None
        num_masked = (sample.corruption.weights > 0).sum().item()
        work = replace(public_workload(length, STEP_RECIPE.block_size), weighted_rows=length + num_masked / batch)
        return flops_per_token(step_model(size), work) * length * batch

    with topology_of(ParallelConfig(), initialize_device(Device(device.type)), seed=0):
        for what, by_name in sizes.items():
            for dtype in (torch.float32, torch.bfloat16):
                works: dict[str, Work] = {}
                counted: dict[str, float] = {}
                for name, size in by_name.items():
                    model = build_model(step_model(size), ParallelConfig(), dtype=dtype, device=device, seed=0)
                    sample = loader_batch(step_text(size), STEP_RECIPE, torch.ones(size[7], size[6], dtype=torch.bool))
                    works[name] = partial(without_results, partial(EngineStep(model, device), sample))
                    counted[name] = operations(size, sample)
                first = next(iter(counted))
                modelled = {name: counted[first] / count for name, count in counted.items()}
                yield Comparison(
                    title=f"joint step by {what}, {step_title(small, dtype, device)}",
                    variants=works,
                    tolerance=0.0,
                    required={name: ratio / 1.15 for name, ratio in modelled.items() if name != first},
                    modelled=modelled,
                )
