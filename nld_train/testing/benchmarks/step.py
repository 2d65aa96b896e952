"""Whole steps: against the public recipe, transformers, a plain loop, and other sizes of themselves."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nld_train.config.compose import compose_unlaunched
from nld_train.config.schema import (
    Device,
    ModelConfig,
    ObjectiveConfig,
    ParallelConfig,
    RopeConfig,
    Sampler,
    Stratify,
)
from nld_train.config.workload import flops_per_token, public_workload
from nld_train.data.loader import LoaderBatch
from nld_train.model.attention import resolve_backend
from nld_train.model.build import NLDModel, build_model
from nld_train.model.head import select_weighted_rows
from nld_train.objective.noise import corrupt
from nld_train.objective.normalize import num_tokens, row_weights
from nld_train.platform.device import initialize_device
from nld_train.platform.topology import topology_of
from nld_train.testing.benchmarks.comparison import Comparison, Work
from nld_train.testing.benchmarks.conversion import Conversion, anonymous_bytes
from nld_train.testing.peers import PlainModel, PublicRecipeModel
from nld_train.testing.reference import transformers_model
from nld_train.training.optimizer import build_optimizer, set_hyperparameters, step_with_norm
from nld_train.training.run import connect, wrap_data_parallel
from nld_train.training.step import LossWeights, StepShape, lay_out, noise_spec, run_microbatches

StepSize = tuple[int, int, int, int, int, int, int, int]
"""hidden, layers, ffn, heads, key-value heads, vocabulary, L, B"""


STEP_SHAPES: dict[str, list[StepSize]] = {  # on the CPU and on a GPU
    "cpu": [(256, 4, 768, 4, 2, 8192, 512, 2), (384, 6, 1152, 6, 2, 32768, 1024, 1)],
    "cuda": [(2048, 8, 6144, 16, 4, 131072, 4096, 1)],
}


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


class EngineStep:
    """Forward and backward of one micro-batch through Megatron's schedule.

    Args:
        is_compared: losses and gradients are returned.
    """

    def __init__(self, model: NLDModel, device: torch.device, *, is_compared: bool = False) -> None:
        self.wrapped = wrap_data_parallel(model, use_distributed_optimizer=False)
        connect([self.wrapped], None)
        self.device, self.is_compared = device, is_compared

    def __call__(self, sample: LoaderBatch) -> Sequence[Tensor]:
        self.wrapped.zero_grad_buffer()
        shape = StepShape(num_microbatches=1, micro_batch_size=len(sample.tokens), num_rows=None)
        weights = LossWeights(diffusion=0.3)
        terms = run_microbatches(
            iter([sample]), [self.wrapped], shape, objective=STEP_RECIPE, weights=weights, device=self.device
        )
        if not self.is_compared:
            return []
        gradients = {name: parameter.main_grad for name, parameter in self.wrapped.module.named_parameters()}
        return [terms.ar_sum, terms.diffusion_sum, *(gradients[name].clone() for name in sorted(gradients))]


def step_suite(device: torch.device) -> Iterator[Comparison]:
    """Forward and backward of a whole step. Against the public recipe's way, which gives the same loss and gradients; a
    fraction of the blocks against all of them; a supervised step whose sequences are 90% prompt against its AR part
    (their losses differ by construction; tests compare them); and an AR step against transformers'."""
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
                shape, title = step_model(size), step_title(size, dtype, device)
                model = build_model(shape, ParallelConfig(), dtype=dtype, device=device, seed=0)
                step, compared = EngineStep(model, device), EngineStep(model, device, is_compared=True)
                public = EngineStep(
                    PublicRecipeModel(shape, dtype=dtype, device=device, seed=0), device, is_compared=True
                )
                is_bf16 = dtype is torch.bfloat16
                yield Comparison(
                    title=f"joint step, {title}, against the public recipe's",
                    variants={
                        "public recipe": partial(public, batches["recipe"]),
                        "ours": partial(compared, batches["recipe"]),
                    },
                    tolerance=3e-2 if is_bf16 else 1e-4,
                    required={"ours": 1.6 if is_bf16 else 1.4},
                )
                yield Comparison(
                    title=f"joint step, {title}",
                    variants={key: partial(step, sample) for key, sample in batches.items()},
                    tolerance=0.0,
                    required={"fraction 0.5": 2 / (1.1 * 1.5), "fraction 0.25": 2 / (1.1 * 1.25)},
                )
                yield Comparison(
                    title=f"AR step and the joint steps, {title}",
                    variants={key: partial(step, batches[key]) for key in ("AR", "recipe", "fraction 0.5")},
                    tolerance=0.0,
                    required={"recipe": 1 / 2.0, "fraction 0.5": 1 / 1.55},
                )
                yield Comparison(
                    title=f"supervised step at 90% prompt, {title}",
                    variants={key: partial(step, sample) for key, sample in supervised.items()},
                    tolerance=0.0,
                    required={"joint": 1 / 1.25},
                )
                theirs = transformers_step(shape, model, dtype, text.to(device))
                yield Comparison(
                    title=f"AR step, {title}, against transformers' Ministral3",
                    variants={"transformers": theirs, "ours": partial(step, batches["AR"])},
                    tolerance=0.0,
                    required={"ours": 1.0},
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
    """Peak anonymous memory of a joint step's forward and backward above what stands before it (weights, gradients),
    ours and the public recipe's, each in a process of its own, on the CPU."""
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
        step = EngineStep(model, device, is_compared=False)
        sample = loader_batch(text, STEP_RECIPE, torch.ones(text.shape[0], text.shape[1] - 1, dtype=torch.bool))
        step.wrapped.zero_grad_buffer()  # its pages are there from now on
        for parameter in step.wrapped.parameters():
            parameter.main_grad.zero_()
        resident = anonymous_bytes(os.getpid())
        step(sample)
        gradients = [parameter.main_grad.flatten()[::64].clone() for parameter in step.wrapped.parameters()]
    out.mkdir()
    torch.save([torch.tensor(float(resident)), *gradients], out / "result.pt")


def engine_suite(device: torch.device) -> Iterator[Comparison]:
    """Training steps of the default run's joint stage (forward, backward, clipping, optimizer): Megatron's engine
    against a loop in plain PyTorch with the same attention and head."""
    config = compose_unlaunched([])
    shape, train, objective = config.model, config.train, config.objective
    backend = resolve_backend(shape.attention_backend, device)
    length, batch = config.data.sequence_length, train.micro_batch_size
    num_microbatches = train.global_batch_size // batch
    text = torch.randint(
        1000, shape.vocab_size, (train.global_batch_size, length + 1), generator=torch.Generator().manual_seed(0)
    )
    everything = torch.ones(batch, length, dtype=torch.bool)
    samples = [loader_batch(part, objective, everything) for part in text.split(batch)]
    lr, weights = 1e-3, LossWeights(diffusion=objective.diffusion_loss_weight)
    with topology_of(ParallelConfig(), initialize_device(Device(device.type)), seed=0):
        for dtype in (torch.float32, torch.bfloat16):
            model = build_model(shape, ParallelConfig(), dtype=dtype, device=device, seed=0)
            plain = PlainModel(shape, dict(model.named_parameters()), backend).to(device)
            wrapped = wrap_data_parallel(model)
            optimizer = build_optimizer(config.optim, [wrapped], dtype)
            connect([wrapped], optimizer)
            step_shape = StepShape(num_microbatches=num_microbatches, micro_batch_size=batch, num_rows=None)
            adam = torch.optim.AdamW(
                plain.parameters(),
                lr=lr,
                betas=(config.optim.beta1, config.optim.beta2),
                eps=config.optim.eps,
                weight_decay=config.optim.weight_decay,
                fused=True,
            )

            def engine(
                wrapped: Any = wrapped, optimizer: Any = optimizer, shape: StepShape = step_shape
            ) -> Sequence[Tensor]:
                wrapped.zero_grad_buffer()
                optimizer.zero_grad()
                set_hyperparameters(optimizer, config.optim, lr)
                terms = run_microbatches(
                    iter(samples), [wrapped], shape, objective=objective, weights=weights, device=device
                )
                norm = step_with_norm(optimizer, config.optim)
                return [terms.loss_sum / terms.divisor, torch.tensor(norm)]

            def loop(plain: Any = plain, adam: Any = adam) -> Sequence[Tensor]:
                adam.zero_grad(set_to_none=True)
                total, divisor = torch.zeros(()), 0.0
                laid_out = [lay_out(sample, objective.block_size) for sample in samples]
                for joint in laid_out:
                    of_rows = row_weights(joint, objective.normalization.value, weights.diffusion, weights.ar)
                    loss = plain(joint.tokens, joint.layout, select_weighted_rows(joint, of_rows))
                    loss.backward()
                    total += loss.detach()
                    divisor += float(num_tokens(joint, objective.normalization.value))
                for parameter in plain.parameters():
                    parameter.grad /= divisor
                norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), config.optim.clip_grad)
                adam.step()
                return [total / divisor, norm]

            yield Comparison(
                title=f"training step of the default run, {str(dtype).removeprefix('torch.')}, on {device.type}",
                variants={"plain PyTorch": loop, "Megatron's engine": engine},
                tolerance=1e-2 if dtype is torch.bfloat16 else 1e-4,
                required={"Megatron's engine": 1 / 1.15},
            )


def scaling_suite(device: torch.device) -> Iterator[Comparison]:
    """How a joint step grows with layers, batch and length; in brackets what counting operations says."""
    small = STEP_SHAPES[device.type][0]
    hidden, layers, ffn, heads, kv_heads, vocab, length, batch = small
    sizes: dict[str, dict[str, StepSize]] = {
        "layers": {f"{n} layers": (hidden, n, ffn, heads, kv_heads, vocab, length, batch) for n in (2, 4, 8, 16)},
        "batch": {f"batch {n}": (hidden, layers, ffn, heads, kv_heads, vocab, length, n) for n in (1, 2, 4, 8)},
        "length": {f"L {n}": (hidden, layers, ffn, heads, kv_heads, vocab, n, 1) for n in (512, 1024, 2048, 4096)},
    }

    def operations(size: StepSize) -> float:
        length = size[6]
        work = replace(public_workload(length, STEP_RECIPE.block_size), weighted_rows=length * 3 // 2)
        return flops_per_token(step_model(size), work) * length * size[7]

    with topology_of(ParallelConfig(), initialize_device(Device(device.type)), seed=0):
        for what, by_name in sizes.items():
            first = operations(next(iter(by_name.values())))
            variants: dict[str, Work] = {}
            for name, size in by_name.items():
                model = build_model(step_model(size), ParallelConfig(), dtype=torch.float32, device=device, seed=0)
                text = step_text(size)
                sample = loader_batch(text, STEP_RECIPE, torch.ones(size[7], size[6], dtype=torch.bool))
                variants[f"{name} ({first / operations(size):.2f})"] = partial(EngineStep(model, device), sample)
            yield Comparison(
                title=f"joint step by {what}, {step_title(small, torch.float32, device)}",
                variants=variants,
                tolerance=0.0,
            )
