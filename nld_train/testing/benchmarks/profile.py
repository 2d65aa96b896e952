"""Where the time of a training step goes: python -m nld_train.testing.benchmarks.profile [--help].

On a GPU: steps at the shape of the 3B, with as many layers as fit, each kind beside the public recipe's way: time,
needed operations by the peak (MFU), memory, and the share of each part. On a CPU: the step of the default run.

Steps are whole ones: layout, forward, backward, clipping, optimizer. Kinds are measured one after another, since two
models of this size do not fit; the time is the median of some steps without the profiler, the shares are those of some
steps with it.
"""

import argparse
import gc
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from nld_train.config.compose import compose_unlaunched
from nld_train.config.memory import estimate_memory, largest
from nld_train.config.schema import Config, Device, LayerSpec, ObjectiveConfig, ParallelConfig, Precision
from nld_train.config.workload import flops_per_token, workload
from nld_train.model.build import build_chunks
from nld_train.platform.cpu import keep_freed_memory
from nld_train.platform.device import Platform, initialize_device, peak_tflops
from nld_train.platform.topology import topology_of
from nld_train.testing.benchmarks.results import machine
from nld_train.testing.benchmarks.step import STEP_RECIPE, loader_batch
from nld_train.testing.peers import PublicRecipeModel
from nld_train.training.optimizer import build_optimizer, set_hyperparameters, step_with_norm
from nld_train.training.run import DTYPES, chosen_kernels, connect, overlap, wrap_data_parallel
from nld_train.training.step import LossWeights, StepShape, run_microbatches

PARTS = (
    "attention",
    "matrix products",
    "head's products",
    "head, the rest",
    "rotary embedding",
    "pointwise",
    "optimizer",
    "communication",
    "copies",
    "unknown",
    "idle",
)
"""``unknown``: kernels of which the profiler does not say what launched them. ``idle``: of a GPU, no kernel runs; of a
CPU, no operator of torch does: Python, and the autograd engine."""

_COUNTED = ("attention", "matrix products", "head's products", "optimizer")  # the rest is what an engine adds

_STEP, _OPTIMIZER = "training step", "optimizer step"
_PRODUCT = re.compile(r"gemm|nvjet|cutlass|xmma|splitk", re.IGNORECASE)
_PRODUCT_OPERATORS = {
    "aten::mm",
    "aten::addmm",
    "aten::addmm_",
    "aten::bmm",
    "aten::baddbmm",
    "mkldnn::_linear_pointwise",
}
_ATTENTION = re.compile(r"attention|attn|flash|fmha", re.IGNORECASE)
_HEAD, _ROTATION = re.compile("FusedLinearCrossEntropy"), re.compile(r"_Rotate|_rotate_row")
_COPY = re.compile(r"^mem(cpy|set)|^aten::copy_$|^aten::(zero|fill)_$", re.IGNORECASE)


def part_of(name: str, around: Sequence[str]) -> str:
    """One of :data:`PARTS`.

    Args:
        name: of the kernel, or of the operator itself on a CPU.
        around: the operator that launched it (on a CPU, that it is), and those around it, innermost first.
    """
    if _OPTIMIZER in around:
        return "optimizer"
    if "nccl" in name.lower() or any(other.startswith(("c10d::", "nccl:", "gloo:")) for other in around[:1]):
        return "communication"
    names = (name, *around)
    is_product = bool(_PRODUCT.search(name)) or name in _PRODUCT_OPERATORS
    if any(_HEAD.search(other) for other in names):
        return "head's products" if is_product else "head, the rest"
    if any(_ATTENTION.search(other) for other in names):
        return "attention"
    if is_product:
        return "matrix products"
    if _COPY.search(name):
        return "copies"
    return "rotary embedding" if any(_ROTATION.search(other) for other in names) else "pointwise"


def around(event: Any) -> list[str]:
    """The event's name and those of the events that it is part of."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


def shares(events: Iterable[Any], wall_us: float, *, is_cuda: bool) -> dict[str, float]:
    """Share of each part in the wall time of the profiled steps; together 1 (on a GPU more, where kernels overlap)."""
    events = list(events)
    spent = dict.fromkeys(PARTS, 0.0)
    on_device = [event for event in events if event.device_type != DeviceType.CPU]
    # Ranges that record_function marks are drawn on the device as well, around the kernels that are counted.
    marks = {event.name for event in on_device if event.is_user_annotation}
    busy = [(e.time_range.start, e.time_range.end) for e in on_device if not e.is_user_annotation]
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        names = around(event)
        if is_cuda:
            for kernel in event.kernels:
                if kernel.name not in marks:
                    spent[part_of(kernel.name, names)] += kernel.duration
        elif _STEP in names:
            is_engine = event.name == _STEP or event.name.startswith("autograd::engine")
            spent["idle" if is_engine else part_of(event.name, names)] += event.self_cpu_time_total
    if is_cuda:
        spent["unknown"] = max(0.0, sum(end - start for start, end in busy) - sum(spent.values()))
        spent["idle"] = max(0.0, wall_us - _length_of_union(busy))
    else:
        spent["idle"] += max(0.0, wall_us - sum(spent.values()))
    return {part: spent[part] / wall_us for part in PARTS}


def _length_of_union(ranges: Iterable[tuple[float, float]]) -> float:
    total, end = 0.0, float("-inf")
    for start, stop in sorted(ranges):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


@dataclass(slots=True, kw_only=True)
class Kind:
    """A kind of step.

    Args:
        config: model, objective and the stage ``stage``.
        is_public: the public recipe's way of computing it.
    """

    name: str
    config: Config
    stage: str
    is_public: bool = False


@dataclass(slots=True, kw_only=True)
class Profile:
    """What was measured of a kind; memory of a GPU is torch's count of allocated bytes, 2^30 each."""

    name: str
    layers: int
    kernels: dict[str, str]
    milliseconds: float
    quartiles: tuple[float, float]
    tokens_per_second: float
    teraflops: float
    mfu: float | None
    memory_gb: float | None
    shares: dict[str, float]

    @property
    def outside(self) -> float:
        """Share outside of matrix products, attention and the optimizer."""
        return 1 - sum(self.shares[part] for part in _COUNTED)


def training_step(kind: Kind, platform: Platform) -> tuple[Callable[[], None], Callable[[], None]]:
    """A whole step of one rank, on samples of random tokens; and what lets go of its model."""
    config, device = kind.config, platform.device
    train, shape, objective = config.train, config.model, config.objective
    alpha = config.stages[kind.stage].diffusion_loss_weight
    length, micro = config.data.sequence_length, train.micro_batch_size
    dtype = DTYPES[train.precision]
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(1000, shape.vocab_size, (train.global_batch_size, length + 1), generator=generator)
    everything = torch.ones(micro, length, dtype=torch.bool)
    samples = [loader_batch(part, objective if alpha else None, everything) for part in text.split(micro)]
    if kind.is_public:
        model: Any = PublicRecipeModel(shape, dtype=dtype, device=device, seed=0)
    else:
        is_fp8 = train.precision is Precision.fp8
        (model,) = build_chunks(shape, ParallelConfig(), dtype=dtype, device=device, seed=0, is_fp8=is_fp8)
    wrapped = wrap_data_parallel(model, **overlap(config.parallel, platform))
    optimizer = build_optimizer(config.optim, [wrapped], dtype)
    connect([wrapped], optimizer)
    step_shape = StepShape(num_microbatches=len(samples), micro_batch_size=micro, num_rows=None)

    def step() -> None:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        set_hyperparameters(optimizer, config.optim, 1e-5)
        run_microbatches(
            iter(samples),
            [wrapped],
            step_shape,
            objective=objective,
            weights=LossWeights(diffusion=alpha),
            device=device,
        )
        with record_function(_OPTIMIZER):
            step_with_norm(optimizer, config.optim)

    def release() -> None:
        # Hooks on nodes of autograd, which Python does not see into, keep Megatron's wrapper, and so the model and the
        # optimizer: their memory is given back by hand.
        tensors = [tensor for parameter in wrapped.parameters() for tensor in (parameter, parameter.main_grad)]
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            tensors += [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
            tensors += [value for state in part.optimizer.state.values() for value in state.values()]
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                tensor.untyped_storage().resize_(0)

    return step, release


def measure(kind: Kind, platform: Platform, *, warmup: int, rounds: int, profiled: int) -> Profile:
    """Build the kind's model, time its steps, profile some, and let go of it."""
    is_cuda = platform.is_cuda

    def wait() -> None:
        if is_cuda:
            torch.cuda.synchronize()

    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    step, release = training_step(kind, platform)
    seconds = []
    for turn in range(warmup + rounds):
        wait()
        start = time.perf_counter()
        step()
        wait()
        if turn >= warmup:
            seconds.append(time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated() / 2**30 if is_cuda else None
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as profiler:
        wait()
        start = time.perf_counter()
        for _ in range(profiled):
            with record_function(_STEP):
                step()
        wait()
        wall = time.perf_counter() - start
    events = profiler.events()
    assert events is not None
    release()
    del step, release
    gc.collect()
    if is_cuda:
        torch.cuda.empty_cache()

    config, median = kind.config, statistics.median(seconds)
    tokens_per_second = config.train.global_batch_size * config.data.sequence_length / median
    flops = flops_per_token(config.model, workload(config, kind.stage)) * tokens_per_second
    peak = peak_tflops(torch.cuda.get_device_name()) if is_cuda else None
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if rounds > 1 else (median,) * 3
    return Profile(
        name=kind.name,
        layers=config.model.num_layers,
        kernels=chosen_kernels(config, platform),
        milliseconds=1e3 * median,
        quartiles=(1e3 * low, 1e3 * high),
        tokens_per_second=tokens_per_second,
        teraflops=flops / 1e12,
        mfu=None if peak is None or config.train.precision is Precision.fp32 else flops / (peak * 1e12),
        memory_gb=memory,
        shares=shares(events, 1e6 * wall, is_cuda=is_cuda),
    )


_PUBLIC_GB = 24.0
"""What the public recipe's way needs beyond ours at L = 4096: all logits, several times; repeated keys."""


def gpu_kinds(platform: Platform, limit_gb: float) -> list[Kind]:
    """Steps at the 3B's shape, one sequence of 4096 clean tokens, with as many layers as fit in ``limit_gb``."""
    config = compose_unlaunched(["experiment=nld_3b", "train.global_batch_size=1", "train.micro_batch_size=1"])
    joint = next(name for name, stage in config.stages.items() if stage.diffusion_loss_weight and not stage.chat)
    ar = next(name for name, stage in config.stages.items() if not stage.diffusion_loss_weight)
    recipe = replace(config, objective=replace(STEP_RECIPE, block_size=config.objective.block_size))

    def needed_gb(layers: int) -> float:
        shape = replace(recipe.model, num_layers=layers)
        work = workload(recipe, joint)
        ranks = estimate_memory(shape, ParallelConfig(), Precision.bf16, work, micro_batch_size=1, data_parallel_size=1)
        return largest(ranks).total / 2**30 + _PUBLIC_GB

    layers = max((n for n in range(1, config.model.num_layers + 1) if needed_gb(n) <= limit_gb), default=1)

    def kind(name: str, stage: str, objective: ObjectiveConfig, *, is_public: bool = False, **model: Any) -> Kind:
        precision = model.pop("precision", Precision.bf16)
        return Kind(
            name=name,
            stage=stage,
            is_public=is_public,
            config=replace(
                config,
                objective=objective,
                model=replace(config.model, num_layers=layers, **model),
                train=replace(config.train, precision=precision),
            ),
        )

    ours = ObjectiveConfig(mask_token_id=config.objective.mask_token_id)
    kinds = [
        kind("joint, public recipe", joint, recipe.objective, is_public=True),
        kind("joint, recipe's noise", joint, recipe.objective),
        kind(f"joint, default noise ({ours.noisy_fraction:g} of the blocks)", joint, ours),
        kind("AR", ar, recipe.objective),
    ]
    if platform.has_transformer_engine:
        engine: dict[str, Any] = {"layer_spec": LayerSpec.transformer_engine}
        kinds += [
            kind("joint, Transformer Engine", joint, recipe.objective, **engine),
            kind("AR, Transformer Engine", ar, recipe.objective, **engine),
        ]
        if torch.cuda.get_device_capability() >= (8, 9):
            kinds += [
                kind("joint, Transformer Engine, FP8", joint, recipe.objective, precision=Precision.fp8, **engine),
                kind("AR, Transformer Engine, FP8", ar, recipe.objective, precision=Precision.fp8, **engine),
            ]
    return kinds


def cpu_kinds(overrides: Sequence[str]) -> list[Kind]:
    """The default run's stages, as ``make train`` runs them."""
    config = compose_unlaunched(overrides)
    names = {True: "joint", False: "AR"}
    return [
        Kind(name=f"{names[stage.diffusion_loss_weight > 0]} step of the default run", config=config, stage=name)
        for name, stage in config.stages.items()
        if stage.chat is None
    ]


def table(profiles: Sequence[Profile]) -> list[str]:
    """One line a kind; speed, and on a GPU memory, beside the first kind's."""
    first = profiles[0]
    head = ["step", "layers", "ms", "x first", "clean tokens/s", "Tflop/s", "MFU", "GB", "x first", *PARTS, "outside"]
    rows = [head]
    for found in profiles:
        memory = "-" if found.memory_gb is None else f"{found.memory_gb:.1f}"
        ratio = "-" if not found.memory_gb or not first.memory_gb else f"{found.memory_gb / first.memory_gb:.2f}"
        rows.append(
            [
                found.name,
                str(found.layers),
                f"{found.milliseconds:.1f}",
                f"{first.milliseconds / found.milliseconds:.2f}",
                f"{found.tokens_per_second:.0f}",
                f"{found.teraflops:.3g}",
                "-" if found.mfu is None else f"{found.mfu:.1%}",
                memory,
                ratio,
                *(f"{found.shares[part]:.1%}" for part in PARTS),
                f"{found.outside:.1%}",
            ]
        )
    # A column a kind: there are more parts than kinds.
    columns = [list(column) for column in zip(*rows, strict=True)]
    widths = [max(len(column[number]) for column in columns) for number in range(len(rows))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(column, widths, strict=True)) for column in columns]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print one table, and store it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where a GPU is visible")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each kind (default 5)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (default 3)")
    parser.add_argument("--profiled", type=int, default=2, help="profiled steps after them (default 2)")
    parser.add_argument("--memory-gb", type=float, help="of the GPU, to choose the layers by (default: 90%% of it)")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmark/profile.json"), help="result file")
    parser.add_argument("overrides", nargs="*", help="of the default run's configuration, on a CPU")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.profiled) < 1 or options.warmup < 1:
        parser.error("--rounds, --profiled and --warmup must be at least 1: what is built once is built in the first")
    platform = initialize_device(Device(options.device or "auto"))
    description = machine(not platform.is_cuda and keep_freed_memory())
    print("\n".join(f"{key}: {value}" for key, value in description.items()))
    if platform.is_cuda:
        total = torch.cuda.get_device_properties(platform.device).total_memory / 2**30
        kinds = gpu_kinds(platform, options.memory_gb or 0.9 * total)
    else:
        kinds = cpu_kinds(options.overrides)
    profiles = []
    with topology_of(ParallelConfig(), platform, seed=0):
        for kind in kinds:
            found = measure(kind, platform, warmup=options.warmup, rounds=options.rounds, profiled=options.profiled)
            print(f"\n{found.name}: {found.milliseconds:.1f} ms", flush=True)
            for what, value in found.kernels.items():
                print(f"  {what}: {value}")
            profiles.append(found)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.json.with_name(options.json.name + ".tmp")
    temporary.write_text(
        json.dumps({"machine": description, "profiles": [asdict(found) for found in profiles]}, indent=2) + "\n"
    )
    temporary.replace(options.json)
    print("\nshares of the step's wall time; outside: of matrix products, attention and the optimizer\n")
    print("\n".join(table(profiles)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
