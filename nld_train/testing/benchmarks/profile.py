"""Where the time of a training step goes: python -m nld_train.testing.benchmarks.profile [--help].

On a GPU: steps at the shape of the 3B, with as many layers as fit, each kind beside the public recipe's way: time,
needed operations by the peak (MFU), memory, and the share of each part. On a CPU: the step of the default run.

Steps are whole ones: layout, forward, backward, clipping, optimizer. Kinds are measured one after another, since two
models of this size do not fit; the time is the median of some steps without the profiler, the shares are those of some
steps with it.

A kind that fails ends the process, because an error of CUDA spoils all that follows: what is measured is in the file of
results, and the same command with ``--go-on`` takes the kinds that are left (scripts/gpu_check.sh does so).
"""

import argparse
import json
import os
import re
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from nld_train.config.compose import compose_unlaunched
from nld_train.config.memory import estimate_memory, largest
from nld_train.config.schema import Config, Device, LayerSpec, ObjectiveConfig, ParallelConfig, Precision
from nld_train.config.workload import flops_per_token, workload
from nld_train.model.build import NLDModel, build_chunks
from nld_train.platform.cpu import keep_freed_memory
from nld_train.platform.device import Platform, initialize_device, missing_libraries, peak_tflops
from nld_train.platform.topology import topology_of
from nld_train.testing.benchmarks.results import machine
from nld_train.testing.benchmarks.step import OPTIMIZER_MARK, STEP_RECIPE, TrainingStep, loader_batch
from nld_train.testing.peers import PublicRecipeModel
from nld_train.training.run import DTYPES, chosen_kernels, overlap
from nld_train.training.step import LossWeights

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

_STEP = "training step"
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
    if OPTIMIZER_MARK in around:
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
    """What was measured of a kind.

    ``memory_gb`` of a GPU is torch's count of allocated bytes, 2^30 each, at most; ``above_resident_gb`` what of it is
    there during a step alone: not weights, gradients and the optimizer's state. ``mfu`` is of the bf16 peak.
    """

    name: str
    layers: int
    kernels: dict[str, str]
    milliseconds: float
    quartiles: tuple[float, float]
    tokens_per_second: float
    teraflops: float
    mfu: float | None
    memory_gb: float | None
    above_resident_gb: float | None
    shares: dict[str, float]

    @property
    def outside(self) -> float:
        """Share outside of matrix products, attention and the optimizer."""
        return 1 - sum(self.shares[part] for part in _COUNTED)


def training_step(kind: Kind, platform: Platform) -> TrainingStep:
    """A whole step of one rank, on samples of random tokens."""
    config, device = kind.config, platform.device
    train, shape = config.train, config.model
    alpha = config.stages[kind.stage].diffusion_loss_weight
    length, micro = config.data.sequence_length, train.micro_batch_size
    dtype = DTYPES[train.precision]
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(1000, shape.vocab_size, (train.global_batch_size, length + 1), generator=generator)
    everything = torch.ones(micro, length, dtype=torch.bool)
    samples = [loader_batch(part, config.objective if alpha else None, everything) for part in text.split(micro)]
    if kind.is_public:
        model: NLDModel = PublicRecipeModel(shape, dtype=dtype, device=device, seed=0)
    else:
        is_fp8 = train.precision is Precision.fp8
        (model,) = build_chunks(shape, ParallelConfig(), dtype=dtype, device=device, seed=0, is_fp8=is_fp8)
    return TrainingStep(
        model,
        samples,
        objective=config.objective,
        weights=LossWeights(diffusion=alpha),
        optim=config.optim,
        lr=1e-5,
        overlapped=overlap(config.parallel, platform),
    )


def measure(kind: Kind, platform: Platform, *, warmup: int, rounds: int, profiled: int) -> Profile:
    """Build the kind's model, time its steps, profile some, and let go of it."""
    is_cuda = platform.is_cuda
    resident = 0

    def wait() -> None:
        if is_cuda:
            torch.cuda.synchronize()

    step = training_step(kind, platform)
    for _ in range(warmup):
        step()
    wait()
    if is_cuda:  # weights, gradients, the optimizer's state: all made by now
        resident = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        wait()
        seconds.append(time.perf_counter() - start)
    peak_bytes = torch.cuda.max_memory_allocated() if is_cuda else None
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
    step.release()
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
        memory_gb=None if peak_bytes is None else peak_bytes / 2**30,
        above_resident_gb=None if peak_bytes is None else (peak_bytes - resident) / 2**30,
        shares=shares(events, 1e6 * wall, is_cuda=is_cuda),
    )


_PUBLIC, _OURS = "joint, public recipe", "joint, recipe's noise"
_REQUIRED_SPEED, _REQUIRED_MFU, _REQUIRED_MEMORY = 1.2, 0.45, 0.6
"""Of our joint step; speed and memory beside the public recipe's."""
_PUBLIC_GB = 24.0
"""What the public recipe's way needs beyond ours at L = 4096: all logits, several times; repeated keys."""


def gpu_kinds(platform: Platform, limit_gb: float) -> list[Kind]:
    """Steps at the 3B's shape with as many layers as fit in ``limit_gb``: two sequences of 4096 clean tokens, one after
    the other, which is what each of 256 GPUs has of the published 512."""
    config = compose_unlaunched(["experiment=nld_3b", "train.global_batch_size=2", "train.micro_batch_size=1"])
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
        kind(_PUBLIC, joint, recipe.objective, is_public=True),
        kind(_OURS, joint, recipe.objective),
        kind(f"joint, default noise ({ours.noisy_fraction:g} of the blocks)", joint, ours),
        kind("AR", ar, recipe.objective),
    ]
    if platform.has_transformer_engine:
        spec: dict[str, Any] = {"layer_spec": LayerSpec.transformer_engine}
        fp8: dict[str, Any] = {"precision": Precision.fp8}
        has_fp8 = torch.cuda.get_device_capability() >= (8, 9)
        for name, stage in (("joint", joint), ("AR", ar)):
            kinds.append(kind(f"{name}, Transformer Engine", stage, recipe.objective, **spec))
            if has_fp8:
                kinds.append(kind(f"{name}, Transformer Engine, FP8", stage, recipe.objective, **spec, **fp8))
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


def table(profiles: Sequence[Profile], first: str) -> list[str]:
    """One column a kind; speed, and on a GPU memory, beside those of the kind ``first``, where it was measured."""
    base = next((found for found in profiles if found.name == first), None)

    def ratio(found: Profile, quantity: Callable[[Profile], float | None]) -> str:
        value, of_base = quantity(found), None if base is None else quantity(base)
        return f"{value / of_base:.2f}" if value and of_base else "-"

    head = ["step", "layers", "ms", "x first", "clean tokens/s", "Tflop/s", "MFU", "GB", "GB above resident", "x first"]
    rows = [[*head, *PARTS, "outside"]]
    for found in profiles:
        rows.append(
            [
                found.name,
                str(found.layers),
                f"{found.milliseconds:.1f}",
                ratio(found, lambda kind: kind.tokens_per_second),
                f"{found.tokens_per_second:.0f}",
                f"{found.teraflops:.3g}",
                "-" if found.mfu is None else f"{found.mfu:.1%}",
                "-" if found.memory_gb is None else f"{found.memory_gb:.1f}",
                "-" if found.above_resident_gb is None else f"{found.above_resident_gb:.1f}",
                ratio(found, lambda kind: kind.above_resident_gb),
                *(f"{found.shares[part]:.1%}" for part in PARTS),
                f"{found.outside:.1%}",
            ]
        )
    # A column a kind: there are more parts than kinds.
    columns = [list(column) for column in zip(*rows, strict=True)]
    widths = [max(len(column[number]) for column in columns) for number in range(len(rows))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(column, widths, strict=True)) for column in columns]


def verdicts(profiles: Sequence[Profile]) -> list[str]:
    """What is asked of our step on a GPU, beside what was measured; nothing where either step was not."""
    by_name = {found.name: found for found in profiles}
    if _PUBLIC not in by_name or _OURS not in by_name:
        return []
    public, ours = by_name[_PUBLIC], by_name[_OURS]
    lines = []

    def ask(what: str, value: float, limit: float, *, is_met: bool) -> None:
        lines.append(f"{_OURS}: {what} {value:.2f}, required {limit:.2f}: {'yes' if is_met else 'NO'}")

    speed = ours.tokens_per_second / public.tokens_per_second
    ask("speed by the public recipe's", speed, _REQUIRED_SPEED, is_met=speed >= _REQUIRED_SPEED)
    if ours.mfu is not None:
        ask("MFU", ours.mfu, _REQUIRED_MFU, is_met=ours.mfu >= _REQUIRED_MFU)
    if ours.above_resident_gb is not None and public.above_resident_gb:
        memory = ours.above_resident_gb / public.above_resident_gb
        what = "memory above resident by the public recipe's"
        ask(what, memory, _REQUIRED_MEMORY, is_met=memory <= _REQUIRED_MEMORY)
    return lines


EXIT_SOME_FAILED, EXIT_SOME_LEFT = 1, 3
_LEFT_BYTES = 2**30  # tables and masks of a layout may stay on the GPU


@dataclass(slots=True, kw_only=True)
class Results:
    """What is known so far, also to a process that comes after one that has died: of each kind its profile, or why it
    has none.

    Args:
        path: the file of results.
        names: all kinds, in their order.
        machine: of :func:`nld_train.testing.benchmarks.results.machine`.
        notes: what could not be looked at here.
    """

    path: Path
    names: Sequence[str]
    machine: Mapping[str, str | int]
    notes: Sequence[str] = ()
    profiles: list[Profile] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def go_on(self) -> None:
        """Take over what another process has found."""
        if self.path.is_file():
            content = json.loads(self.path.read_text())
            self.profiles = [Profile(**found) for found in content["profiles"]]
            self.failed = content["failed"]

    @property
    def left(self) -> list[str]:
        known = {found.name for found in self.profiles} | self.failed.keys()
        return [name for name in self.names if name not in known]

    @property
    def status(self) -> int:
        """Of the process that ends now."""
        return EXIT_SOME_LEFT if self.left else EXIT_SOME_FAILED if self.failed else 0

    def fails(self, name: str, why: str) -> None:
        self.failed[name] = why
        self.write()

    def succeeds(self, found: Profile) -> None:
        self.failed.pop(found.name, None)
        self.profiles.append(found)
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".tmp")
        content = {
            "machine": self.machine,
            "profiles": [asdict(found) for found in self.profiles],
            "failed": self.failed,
            "notes": self.notes,
        }
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        temporary.replace(self.path)

    def report(self) -> str:
        """The table, and everything that is not in it."""
        lines = ["", "shares of the step's wall time; outside: of matrix products, attention and the optimizer", ""]
        lines += table(self.profiles, self.names[0]) if self.profiles else ["nothing was measured"]
        lines += ["", *verdicts(self.profiles), *self.notes]
        lines += [f"{name}: FAILED: {why}" for name, why in self.failed.items()]
        lines += [f"{name}: not measured yet" for name in self.left]
        return "\n".join(lines).rstrip()


def measure_all(
    results: Results,
    measured: Mapping[str, Callable[[], Profile]],
    *,
    until: float | None = None,
    is_released: Callable[[], bool] = lambda: True,
) -> int:
    """Measure the kinds that are left, until one fails, and print the report. Returns the exit status.

    Args:
        measured: name -> what measures it.
        until: time.time() at which the process ends, with the report of what it has.
        is_released: of the kind before nothing is left on the device; otherwise the next one wants another process.
    """
    under_way: list[str] = []

    def out_of_time() -> None:
        for name in [*under_way, *results.left]:
            results.fails(name, "out of time")
        _end_now(results)

    timer = threading.Timer(max(0.0, until - time.time()) if until else 0.0, out_of_time)
    timer.daemon = True
    if until:
        timer.start()
    for name in results.left:
        under_way = [name]
        results.fails(name, "the process ended while it was measured")  # unless somebody says otherwise
        try:
            found = measured[name]()
        except Exception as error:
            timer.cancel()
            traceback.print_exc()
            first_line = (str(error).splitlines() or [""])[0]
            results.fails(name, f"{type(error).__name__}: {first_line}")
            _end_now(results)
        results.succeeds(found)
        under_way = []
        print(f"\n{found.name}: {found.milliseconds:.1f} ms", flush=True)
        for what, value in found.kernels.items():
            print(f"  {what}: {value}", flush=True)
        if results.left and not is_released():
            print(f"{name} has left memory behind: the other kinds want a process of their own")
            break
    timer.cancel()
    print(results.report(), flush=True)
    return results.status


def _end_now(results: Results) -> NoReturn:
    """Without taking leave of libraries that may wait for a device which has failed."""
    print(results.report(), flush=True)
    sys.stderr.flush()
    os._exit(results.status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print one table, and store it."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog=f"Exit status: {EXIT_SOME_FAILED} where a kind has failed, {EXIT_SOME_LEFT} where some are left.",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where a GPU is visible")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each kind (default 5)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (default 3)")
    parser.add_argument("--profiled", type=int, default=2, help="profiled steps after them (default 2)")
    parser.add_argument(
        "--memory-gb", type=float, help="of the GPU, to choose the layers by (default: 90%% of what is free)"
    )
    parser.add_argument("--json", type=Path, default=Path("runs/benchmark/profile.json"), help="result file")
    parser.add_argument("--go-on", action="store_true", help="with the kinds that the result file does not have")
    parser.add_argument(
        "--until", type=float, help="end then, with what there is: seconds since 1970, as date +%%s gives"
    )
    parser.add_argument("overrides", nargs="*", help="of the default run's configuration, on a CPU")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.profiled) < 1 or options.warmup < 1:
        parser.error("--rounds, --profiled and --warmup must be at least 1: what is built once is built in the first")
    platform = initialize_device(Device(options.device or "auto"))
    description = machine(not platform.is_cuda and keep_freed_memory())
    print("\n".join(f"{key}: {value}" for key, value in description.items()), flush=True)
    notes = missing_libraries(platform) if platform.is_cuda else []
    if platform.is_cuda:
        kinds = gpu_kinds(platform, options.memory_gb or 0.9 * torch.cuda.mem_get_info(platform.device)[0] / 2**30)
    else:
        kinds = cpu_kinds(options.overrides)
    results = Results(path=options.json, names=[kind.name for kind in kinds], machine=description, notes=notes)
    if options.go_on:
        results.go_on()
    sizes = {"warmup": options.warmup, "rounds": options.rounds, "profiled": options.profiled}
    with topology_of(ParallelConfig(), platform, seed=0):
        works = {kind.name: partial(measure, kind, platform, **sizes) for kind in kinds}
        return measure_all(
            results,
            works,
            until=options.until,
            is_released=lambda: not platform.is_cuda or torch.cuda.memory_allocated() < _LEFT_BYTES,
        )


if __name__ == "__main__":
    sys.exit(main())
