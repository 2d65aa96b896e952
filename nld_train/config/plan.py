"""Which parallel layout: what each would take in memory and time, and the best one that fits.

A model on paper. Memory is that of :mod:`nld_train.config.memory`, which is compared with counted tensors. Time is
arithmetic: operations over an assumed rate, bytes over assumed bandwidths (``machine``), what Megatron overlaps taken
as overlapped. It ranks layouts; it is no promise of seconds.

Places of ranks as Megatron gives them: tensor, context, data, pipeline, the first next to each other.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from functools import cached_property
from typing import Any

from nld_train.config.layouts import layout_problems
from nld_train.config.memory import RankMemory, estimate_memory, largest, layers_of_stages, num_parameters
from nld_train.config.schema import Config, ParallelConfig, Precision, Recompute
from nld_train.config.workload import Workload, forward_flops, workloads
from nld_train.errors import ConfigError, Problem

_GB = 2**30
_CHOSEN = tuple(
    item.name
    for item in fields(ParallelConfig)
    if item.name not in ("auto", "memory_gb") and "overlap" not in item.name
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step on the slowest pipeline rank, by what is waited for.

    ``compute``: forward, backward and what is computed again. ``tensor``, ``context``: messages inside a layer.
    ``bubble``: while the pipeline fills and drains. ``pipeline``: messages between stages. ``data``: gradients and
    weights, as far as no computation hides them. ``optimizer``: its memory traffic.
    """

    compute: float
    tensor: float
    context: float
    bubble: float
    pipeline: float
    data: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One layout.

    Args:
        parallel: it, complete.
        data_parallel_size: ranks with other samples.
        problems: why the configuration refuses it; nothing else is known then.
        memory: of the rank and the stage that take most.
        memory_stage: the stage's name.
        needed_gb: memory with the allocator's losses and what is reserved, in 2^30 bytes.
        limit_gb: what a GPU has.
        times: of one step, by stage.
        run_seconds: all steps of all stages.
    """

    parallel: ParallelConfig
    data_parallel_size: int
    problems: Sequence[Problem] = ()
    memory: RankMemory | None = None
    memory_stage: str = ""
    needed_gb: float = math.inf
    limit_gb: float = 0.0
    times: Mapping[str, StepTime] | None = None
    run_seconds: float = math.inf

    @property
    def fits(self) -> bool:
        return not self.problems and self.needed_gb <= self.limit_gb

    @property
    def refusal(self) -> str:
        """Why it cannot be used, in words; empty if it can."""
        if self.problems:
            return "; ".join(f"{problem.location}: {problem.message}" for problem in self.problems)
        if self.fits:
            return ""
        part, number = self.largest_part
        return f"needs {self.needed_gb:.1f} GB of {self.limit_gb:.1f}; most of it: {part}, {number / _GB:.1f} GB"

    @property
    def largest_part(self) -> tuple[str, int]:
        """Of weights, gradients, optimizer and activations the one that takes most."""
        assert self.memory is not None
        bytes_of = self.memory.bytes_of
        parts = {name: bytes_of[name] for name in ("parameters", "gradients", "optimizer", "workspace")}
        parts["activations"] = self.memory.activations - bytes_of["workspace"]
        name = max(parts, key=lambda part: parts[part])
        return name, parts[name]

    @cached_property
    def overrides(self) -> list[str]:
        """What chooses this layout on the command line of train.py, on top of any ``parallel=...``."""
        default = ParallelConfig()
        lines = ["parallel=single"]
        for name in _CHOSEN:
            value = getattr(self.parallel, name)
            if value != getattr(default, name):
                text = value.value if isinstance(value, Enum) else str(value)
                lines.append(f"parallel.{name}={text.lower() if isinstance(value, bool) else text}")
        return lines


def plan_layouts(config: Config, num_gpus: int, memory_gb: float) -> list[Plan]:
    """The best variant of every (tensor, pipeline, context) size: those that fit by time, then the others by memory.

    Variants are what is computed again, sequence parallelism, interleaved stages, and how layers fall to stages. The
    micro-batch stays ``train.micro_batch_size``: what a larger one gains is a matter of kernels, which nobody has
    measured here.

    Args:
        config: its ``parallel`` section is not read.
        num_gpus: ranks.
        memory_gb: of each, in 2^30 bytes.
    """
    works = workloads(config)
    plans = []
    for tensor, pipeline, context in _sizes(config, num_gpus):
        variants = [
            evaluate(config, works, parallel, num_gpus, memory_gb)
            for parallel in _variants(config, works, tensor, pipeline, context)
        ]
        plans.append(min(variants, key=_rank))
    return sorted(plans, key=_rank)


def _rank(plan: Plan) -> tuple[Any, ...]:
    """Those that fit by time, simple ones first where it is the same; then those that do not by memory."""
    sizes = [getattr(plan.parallel, name) for name in _CHOSEN if name.endswith("parallel_size")]
    if plan.fits:
        return 0, float(f"{plan.run_seconds:.3g}"), plan.needed_gb
    if plan.problems:
        return 2, sum(size or 1 for size in sizes), len(plan.problems)
    return 1, plan.needed_gb, plan.run_seconds


def choose_layout(config: Config, num_gpus: int, memory_gb: float) -> Plan:
    """The best layout that fits.

    Raises:
        ConfigError: none does; names the nearest, what takes most of its memory, and what to change.
    """
    plans = plan_layouts(config, num_gpus, memory_gb)
    if plans[0].fits:
        return plans[0]
    raise ConfigError(nothing_fits(plans[0], num_gpus, memory_gb))


def nothing_fits(nearest: Plan, num_gpus: int, memory_gb: float) -> list[Problem]:
    """What to say where no layout can be used.

    Args:
        nearest: the first of :func:`plan_layouts`.
    """
    ranks = f"{num_gpus} {'rank' if num_gpus == 1 else 'ranks'}"
    if nearest.problems:
        return [
            Problem(problem.location, f"{problem.message}; no layout of {ranks} is possible", problem.remedy)
            for problem in nearest.problems
        ]
    part, _ = nearest.largest_part
    remedies = {
        "parameters": "more GPUs, or ones with more memory",
        "gradients": "more GPUs, or ones with more memory",
        "optimizer": "more GPUs: data-parallel ranks share the optimizer's state",
        "activations": "a shorter data.sequence_length, a smaller train.micro_batch_size, or more GPUs",
        "workspace": "a shorter data.sequence_length, a smaller train.micro_batch_size, or more GPUs",
    }
    message = (
        f"no layout of {ranks} with {memory_gb:.1f} GB fits; the nearest, {' '.join(nearest.overrides)}, "
        f"{nearest.refusal}"
    )
    return [Problem("parallel.auto", message, f"use {remedies[part]}")]


def _sizes(config: Config, num_gpus: int) -> Iterator[tuple[int, int, int]]:
    """Sizes whose product divides the ranks; tensor-parallel ranks inside a node."""
    divisors = [size for size in range(1, num_gpus + 1) if num_gpus % size == 0]
    for tensor in divisors:
        if tensor > config.machine.gpus_per_node or config.machine.gpus_per_node % tensor:
            continue
        for pipeline in divisors:
            if pipeline > config.model.num_layers:
                continue
            for context in divisors:
                if num_gpus % (tensor * pipeline * context) == 0:
                    yield tensor, pipeline, context


def _variants(
    config: Config, works: Sequence[Workload], tensor: int, pipeline: int, context: int
) -> Iterator[ParallelConfig]:
    splits: list[dict[str, Any]] = [{}]
    if pipeline > 1:
        splits.append(_balanced_split(config, works, pipeline))
        splits += [{"virtual_pipeline_model_parallel_size": chunks} for chunks in (2, 4)]
    for recompute in Recompute:
        for split in splits:
            for sequence_parallel in (True, False) if tensor > 1 else (False,):
                yield ParallelConfig(
                    memory_gb=config.parallel.memory_gb,
                    overlap_grad_reduce=config.parallel.overlap_grad_reduce,
                    overlap_param_gather=config.parallel.overlap_param_gather,
                    tensor_model_parallel_size=tensor,
                    sequence_parallel=sequence_parallel,
                    pipeline_model_parallel_size=pipeline,
                    context_parallel_size=context,
                    recompute_granularity=recompute,
                    **split,
                )


def _balanced_split(config: Config, works: Sequence[Workload], pipeline: int) -> dict[str, int]:
    """Layers of the first and the last stage so that the slowest stage is as fast as can be; the last has the head."""
    total = config.model.num_layers
    flops = [forward_flops(config.model, work) for work in works]
    extra = max((of["head"] + of["last_layer"]) / of["layer"] - 1 for of in flops)  # of the last stage, in layers
    best: tuple[float, int, int] | None = None
    for middle in range(1, total // max(1, pipeline - 2) + 1) if pipeline > 2 else [0]:
        for last in range(1, total):
            first = total - middle * (pipeline - 2) - last
            if first >= 1:
                slowest = max(first, middle, last + extra)
                best = min(best or (math.inf, 0, 0), (slowest, first, last))
    if best is None:
        return {}
    return {"num_layers_in_first_pipeline_stage": best[1], "num_layers_in_last_pipeline_stage": best[2]}


def evaluate(
    config: Config, works: Sequence[Workload], parallel: ParallelConfig, num_gpus: int, memory_gb: float
) -> Plan:
    """Memory and time of one layout."""
    model_parallel = (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    )
    data = num_gpus // model_parallel
    problems = layout_problems(replace(config, parallel=parallel), num_gpus)
    if problems:
        return Plan(parallel=parallel, data_parallel_size=data, problems=problems)
    micro = config.train.micro_batch_size
    of_stages = [
        (
            largest(
                estimate_memory(
                    config.model,
                    parallel,
                    config.train.precision,
                    work,
                    micro_batch_size=micro,
                    data_parallel_size=data,
                )
            ),
            work.stage,
        )
        for work in works
    ]
    memory, stage = max(of_stages, key=lambda item: item[0].total)
    times = {work.stage: step_time(config, parallel, work, data) for work in works}
    num_steps = {
        work.stage: math.ceil(config.stages[work.stage].tokens / (work.global_batch_size * work.length))
        for work in works
    }
    machine = config.machine
    return Plan(
        parallel=parallel,
        data_parallel_size=data,
        memory=memory,
        memory_stage=stage,
        needed_gb=memory.total * (1 + machine.fragmentation) / _GB + machine.reserved_gb,
        limit_gb=memory_gb,
        times=times,
        run_seconds=sum(times[name].total * num_steps[name] for name in times),
    )


def step_time(config: Config, parallel: ParallelConfig, work: Workload, data_parallel_size: int) -> StepTime:
    """Of one optimizer step of a stage, on paper."""
    model, machine = config.model, config.machine
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    pipeline, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    micro = config.train.micro_batch_size
    num_micro_batches = work.global_batch_size / (micro * data_parallel_size)
    size = 4 if config.train.precision is Precision.fp32 else 2

    # The slowest pipeline rank, one micro-batch.
    flops = forward_flops(model, work)
    again = {Recompute.none: 0.0, Recompute.selective: flops["attention"], Recompute.full: flops["layer"]}
    of_layer = 3 * flops["layer"] + again[parallel.recompute_granularity]
    layers = layers_of_stages(model.num_layers, parallel)
    of_ranks = [number * of_layer for number in layers]
    of_ranks[-1] += 3 * (flops["last_layer"] - flops["layer"] + flops["head"])
    slowest = max(range(pipeline), key=lambda rank: of_ranks[rank])
    rate = machine.peak_tflops * 1e12 * machine.mfu / (1 + machine.split_cost * math.log2(tensor * context))
    compute = of_ranks[slowest] * micro / (tensor * context) / rate

    # Four all-reduces of the rows in a layer (with sequence parallelism as many bytes, in two halves); a forward
    # pass that is done again has two of them.
    row_bytes = size * model.hidden_size * work.rows * micro / context
    reductions = 4 + (2 if parallel.recompute_granularity is Recompute.full else 0)
    tensor_time = layers[slowest] * reductions * 2 * (tensor - 1) / tensor * row_bytes / (machine.nvlink_gb_per_s * 1e9)

    # Clean keys and values there, their gradients back. Half of it is hidden: heads travel in two groups.
    gather = (
        (context - 1) / context * 2 * model.num_key_value_heads / tensor * model.head_dim * work.length * micro * size
    )
    passes = 2 + (1 if parallel.recompute_granularity is not Recompute.none else 0)
    context_time = layers[slowest] * passes * gather / ring_bandwidth(config, tensor, context) / 2

    busy = compute + tensor_time + context_time
    bubble = (pipeline - 1) / chunks * busy

    # Each micro-batch waits for a message before its forward and before its backward pass; interleaved stages send
    # while they compute, and wait only while the pipeline fills.
    message = row_bytes / (tensor if parallel.sequence_parallel else 1)
    across = tensor * context * data_parallel_size >= machine.gpus_per_node
    message_time = message / ((machine.network_gb_per_s if across else machine.nvlink_gb_per_s) * 1e9)
    waits = (pipeline - 1) * 2 + (2 * num_micro_batches if chunks == 1 else 0)
    pipeline_time = waits * message_time if pipeline > 1 else 0.0

    # Gradients are reduced under the last micro-batch's backward pass, weights gathered under the first one's forward.
    parameters = max(num_parameters(model, parallel, rank) for rank in range(pipeline))
    shards = data_parallel_size * context
    bandwidth = ring_bandwidth(config, tensor, shards)
    share = (shards - 1) / shards * parameters / bandwidth
    data_time = max(0.0, 4 * share - busy * 2 / 3) + max(0.0, size * share - busy / 3)
    optimizer = 30 * parameters / shards / (machine.hbm_gb_per_s * 1e9)
    return StepTime(
        compute=compute * num_micro_batches,
        tensor=tensor_time * num_micro_batches,
        context=context_time * num_micro_batches,
        bubble=bubble,
        pipeline=pipeline_time,
        data=data_time,
        optimizer=optimizer,
    )


def ring_bandwidth(config: Config, tensor: int, group: int) -> float:
    """Bytes per second that each of a group's ranks moves in a ring; they stand ``tensor`` ranks apart.

    Inside a node over NVLink. Across nodes the rings of all adapters run side by side: those of the group's ranks in
    a node.
    """
    machine = config.machine
    if tensor * group <= machine.gpus_per_node:
        return machine.nvlink_gb_per_s * 1e9
    in_node = max(1, machine.gpus_per_node // tensor)
    return min(machine.nvlink_gb_per_s, machine.network_gb_per_s * min(in_node, group)) * 1e9


# Text ----------------------------------------------------------------------------------------------------------------


def describe(plan: Plan) -> list[str]:
    """The estimate of one layout in a few lines."""
    assert plan.memory is not None
    assert plan.times is not None
    parts = ", ".join(
        f"{name} {number / _GB:.2f}" for name, number in plan.memory.bytes_of.items() if number / _GB >= 0.005
    )
    seconds = ", ".join(f"{name} {time.total:.3g} s" for name, time in plan.times.items())
    return [
        f"layout: {' '.join(plan.overrides)}",
        f"estimated memory: {plan.needed_gb:.2f} of {plan.limit_gb:.2f} GB on pipeline rank "
        f"{plan.memory.pipeline_rank} in stage {plan.memory_stage} ({parts}; the rest is reserved)",
        f"estimated time of a step, on paper: {seconds}",
    ]


def table(plans: Sequence[Plan], most: int = 0) -> list[str]:
    """Layouts, one line each, as :func:`plan_layouts` sorts them; then what the configuration refuses, by reason.

    Args:
        most: lines of layouts; 0: all.
    """
    possible = [plan for plan in plans if not plan.problems]
    shown = possible[:most] if most > 0 else possible
    stages = list(shown[0].times or {}) if shown else []
    head = ["", "TP", "SP", "PP", "CP", "DP", "recompute", "weights", "grads", "optim", "activ.", "work", "needs GB"]
    rows = [[*head, *(f"{name} s" for name in stages), ""]]
    rows += [_row(number, plan) for number, plan in enumerate(shown, start=1)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = [
        "  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    ]
    if len(shown) < len(possible):
        lines.append(f"and {len(possible) - len(shown)} more")
    reasons: dict[str, list[Plan]] = {}
    for plan in plans:
        if plan.problems:
            reasons.setdefault(f"{plan.problems[0].location}: {plan.problems[0].message}", []).append(plan)
    for reason, refused in sorted(reasons.items(), key=lambda item: -len(item[1])):
        count = f"{len(refused)} layout{'s' if len(refused) > 1 else ''} refused"
        lines.append(f"{count} (such as {_sizes_of(refused[0])}): {reason}")
    return lines


def _sizes_of(plan: Plan) -> str:
    parallel = plan.parallel
    return (
        f"TP {parallel.tensor_model_parallel_size} PP {parallel.pipeline_model_parallel_size} "
        f"CP {parallel.context_parallel_size} DP {plan.data_parallel_size}"
    )


def _row(number: int, plan: Plan) -> list[str]:
    parallel, memory, times = plan.parallel, plan.memory, plan.times
    assert memory is not None
    assert times is not None
    pipeline = str(parallel.pipeline_model_parallel_size)
    if parallel.virtual_pipeline_model_parallel_size is not None:
        pipeline += f"x{parallel.virtual_pipeline_model_parallel_size}"
    if parallel.num_layers_in_last_pipeline_stage is not None:
        pipeline += f" ({parallel.num_layers_in_first_pipeline_stage}..{parallel.num_layers_in_last_pipeline_stage})"
    columns = [memory.bytes_of[part] for part in ("parameters", "gradients", "optimizer")]
    columns += [memory.activations - memory.bytes_of["workspace"], memory.bytes_of["workspace"]]
    return [
        str(number),
        str(parallel.tensor_model_parallel_size),
        "yes" if parallel.sequence_parallel else "-",
        pipeline,
        str(parallel.context_parallel_size),
        str(plan.data_parallel_size),
        parallel.recompute_granularity.value,
        *(f"{column / _GB:.1f}" for column in columns),
        f"{plan.needed_gb:.1f}",
        *(f"{time.total:.2f}" for time in times.values()),
        "" if plan.fits else plan.refusal,
    ]


def to_dict(plan: Plan) -> dict[str, Any]:
    """For JSON: sizes in bytes, times in seconds."""
    result: dict[str, Any] = {
        "overrides": plan.overrides,
        "data_parallel_size": plan.data_parallel_size,
        "fits": plan.fits,
        "refusal": plan.refusal or None,
    }
    if plan.memory is not None and plan.times is not None:
        result |= {
            "needed_gb": plan.needed_gb,
            "limit_gb": plan.limit_gb,
            "memory_stage": plan.memory_stage,
            "pipeline_rank": plan.memory.pipeline_rank,
            "micro_batches_alive": plan.memory.micro_batches,
            "bytes": plan.memory.bytes_of,
            "step_seconds": {name: asdict(time) | {"total": time.total} for name, time in plan.times.items()},
            "run_seconds": plan.run_seconds,
        }
    return result
