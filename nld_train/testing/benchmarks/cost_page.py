"""docs/step_cost.md: what a step costs on paper, by part, and how far measured parts agree."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nld_train.config.compose import compose_unlaunched
from nld_train.config.memory import num_parameters
from nld_train.config.plan import ring_bandwidth
from nld_train.config.schema import Config, ParallelConfig
from nld_train.config.step_cost import FORMULAS, OURS, OURS_SPLIT, PUBLIC, Kernels, Machine, PartCost, step_cost
from nld_train.config.workload import Workload, public_workload, workload
from nld_train.errors import DataError
from nld_train.testing.benchmarks.comparison import Row
from nld_train.testing.benchmarks.parts import (
    COPIED_ELEMENTS,
    COPY,
    PRODUCT,
    PRODUCT_SIZE,
    WHOLE,
    PartsCase,
    parts_cases,
)
from nld_train.testing.benchmarks.results import PAGE, RESULTS, Measurement, read_results

COST_PAGE = PAGE.with_name("step_cost.md")
SIZES = ("3b", "8b", "14b")
NUM_GPUS = 256  # of the technical report's runs
H100 = Machine(name="H100", flops_per_s=989e12, bytes_per_s=3.35e12)
H200 = Machine(name="H200", flops_per_s=989e12, bytes_per_s=4.8e12)
MACHINES = (H100, H200)
_REDUCTION = "gradient reduction"
_LAYER_PRODUCTS = ("qkv", "output projection", "MLP products")
_DEFAULT_OBJECTIVE = (
    "objective.sampler=power_count",
    "objective.stratify=batch",
    "objective.noisy_fraction=0.5",
)

Costs = Mapping[str, PartCost]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One way to train at one size: what a sequence of it costs, part by part."""

    name: str
    work: Workload
    parts: Costs

    @property
    def gflop_per_token(self) -> float:
        return sum(part.flops for part in self.parts.values()) / self.work.length / 1e9

    def seconds(self, machine: Machine) -> float:
        """Of one sequence, all parts one after the other; the gradients' reduction is hidden."""
        return sum(part.seconds(machine) for name, part in self.parts.items() if name != _REDUCTION)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A model size under the published recipe.

    Args:
        kernels: ours.
        steps: AR, joint as the recipe has it, joint by default, and the public recipe's joint step, by name.
        cost: of a workload computed by other kernels.
    """

    name: str
    config: Config
    data_parallel_size: int
    machines: Sequence[Machine]
    kernels: Kernels
    steps: Mapping[str, Step]
    cost: Callable[[Workload, Kernels], Costs]


def size_costs(name: str) -> Size:
    """The steps of a model size on :data:`NUM_GPUS` GPUs with the experiment's tensor parallelism.

    Args:
        name: of :data:`SIZES`.
    """
    config = compose_unlaunched([f"experiment=nld_{name}"])
    default = compose_unlaunched([f"experiment=nld_{name}", *_DEFAULT_OBJECTIVE])
    tensor = config.parallel.tensor_model_parallel_size
    shards = NUM_GPUS // tensor
    ours = OURS if tensor == 1 else OURS_SPLIT

    def cost(work: Workload, kernels: Kernels) -> Costs:
        return step_cost(
            config.model,
            work,
            kernels,
            data_parallel_size=shards,
            sequences_per_micro_batch=config.train.micro_batch_size,
            sequences_per_step=config.train.global_batch_size,
        )

    joint = workload(config, "joint")
    works: dict[str, tuple[Workload, Kernels]] = {
        "AR": (workload(config, "ar"), ours),
        "joint, recipe": (joint, ours),
        "joint, default": (workload(default, "joint"), ours),
        "public recipe": (public_workload(joint.length, joint.block_size), PUBLIC),
    }
    steps = {key: Step(name=key, work=work, parts=cost(work, kernels)) for key, (work, kernels) in works.items()}
    bandwidth = ring_bandwidth(config, tensor, shards)
    machines = [replace(machine, network_bytes_per_s=bandwidth) for machine in MACHINES]
    return Size(
        name=name,
        config=config,
        data_parallel_size=shards,
        machines=machines,
        kernels=ours,
        steps=steps,
        cost=cost,
    )


def public_shares(size: Size) -> dict[str, float]:
    """Shares of the public recipe's operations, and of its head's on noisy rows that are not masked."""
    step = size.steps["public recipe"]
    total = sum(part.flops for part in step.parts.values())
    shares = {
        "attention": step.parts["attention"].flops,
        "qkv and output projection": step.parts["qkv"].flops + step.parts["output projection"].flops,
        "MLP": step.parts["MLP products"].flops,
        "head": step.parts["head"].flops,
        "head on noisy rows that are not masked": step.parts["head"].flops / 4,
    }
    return {name: flops / total for name, flops in shares.items()}


def saved_of_public(size: Size, machine: Machine) -> dict[str, float]:
    """What our joint step saves, part by part, as shares of the public recipe's modelled step."""
    public, ours = size.steps["public recipe"], size.steps["joint, recipe"]
    total = public.seconds(machine)
    return {
        name: (part.seconds(machine) - ours.parts[name].seconds(machine)) / total for name, part in public.parts.items()
    }


def levers(size: Size, machine: Machine) -> dict[str, float]:
    """What could still be saved of the default joint step, each alone, as shares of its modelled time."""
    step, ours = size.steps["joint, default"], size.kernels
    total = step.seconds(machine)

    def saved(kernels: Kernels) -> float:
        changed = size.cost(step.work, kernels)
        return 1 - sum(part.seconds(machine) for name, part in changed.items() if name != _REDUCTION) / total

    faster = replace(machine, flops_per_s=2 * machine.flops_per_s)
    fp8 = sum(step.parts[name].seconds(machine) - step.parts[name].seconds(faster) for name in _LAYER_PRODUCTS)
    fused = 3 * ours.element_bytes  # a logit is read for the sum and again for its gradient, which is written
    return {
        "layers' products in FP8, at twice the peak": fp8 / total,
        "layers' gradients added to their sums by the products": saved(replace(ours, adds_in_products=True)),
        "cross-entropy in one kernel": saved(replace(ours, logit_bytes=fused)),
        "head in one chunk": saved(replace(ours, head_chunk_rows=None)),
        "head's gradient added to its sum by the product": saved(replace(ours, head_product_bytes=None)),
        "all three of the head": saved(replace(ours, logit_bytes=fused, head_chunk_rows=None, head_product_bytes=None)),
    }


# The page ------------------------------------------------------------------------------------------------------------

_HEAD = """# What a step costs

On paper, part by part, for the published model sizes; then beside what was measured. `scripts/benchmark.py
--write-docs` writes this page from the formulas in `nld_train/config/step_cost.py` and the results of the suite
`parts`. **Figures of H100 and H200 are a model**: the longer of computing at {tflops:.0f} TFLOP/s (dense bf16) and
moving at {bandwidths} TB/s, part after part. No kernel reaches its peak, so times are lower bounds; shares and
differences are what the page is for.

L = {length}, blocks of {block}, bf16, micro-batches of one sequence, {gpus} GPUs, {batch} sequences a step. *AR* and
*joint, recipe* are the two stages; *joint, default* is `objective=default` (noisy copies of half of the blocks, counts
∝ k^−½); *public recipe* is the joint step as the public Megatron recipe computes it. Operations count what is needed,
forward and backward; a kernel that computes the attention's scores again in the backward pass executes 7/6 of them.
"""
_FORMULAS = f"""## Formulas

Of one sequence and one layer, forward and backward, where nothing else is said. S rows of the model's input (L clean
and N noisy ones), R that enter the loss, S' = S, but R in the last layer, h hidden size, F width of the MLP, H and K
heads of dimension D, V vocabulary, e = {OURS.element_bytes} bytes, c = R / {OURS.head_chunk_rows} chunks of the head,
d data-parallel ranks, P parameters, batch sequences a step. a = e + 8 bytes add a weight's gradient to its fp32 sum;
kernels that only move (these, and the repetition of keys and values) are counted after the products, not beside them.
"""
_SHARES = """
Shares of the public recipe's operations. Its step is two AR steps. Ours leaves out what its head and the end of its
last layer do for noisy rows that are not masked; with noisy copies of half of the blocks it is three quarters of that.
"""
_SAVINGS = """
## Against the public recipe, on paper

What the recipe's joint step saves when we compute it, in percent of the public recipe's modelled step on an H100: rope
in one kernel, keys and values not repeated, the head and the end of the last layer for rows that count, logits in
chunks.
"""
_PRUNE = """
The last layer's prune is in what products and norms save. A negative number is a cost: each chunk of the head reads the
weight twice and the sum of its gradient once. What chunks are for is memory.

## The next lever

What could still be saved of the default joint step on an H100, each alone, in percent of its modelled time:
"""
_MEASURED = f"""
## Measured beside modelled

The suite `parts` measures a step and each part of it alone. Its model takes the rates that the same process reached in
a product of {PRODUCT_SIZE} cubed and in a copy of {COPIED_ELEMENTS >> 20} M elements. A part far above its model is
far from those rates; *rest* is what the parts do not add up to (residuals, the layout of the rows, the engine)."""


def cost_page(results: Path = RESULTS) -> str:
    """The page.

    Args:
        results: folder with ``parts.json`` (of the CPU) and ``parts-*.json`` (of GPUs).
    """
    sizes = [size_costs(name) for name in SIZES]
    config, work = sizes[0].config, sizes[0].steps["AR"].work
    lines = [
        _HEAD.format(
            tflops=H100.flops_per_s / 1e12,
            bandwidths=" or ".join(f"{machine.bytes_per_s / 1e12:g}" for machine in MACHINES),
            length=work.length,
            block=work.block_size,
            gpus=NUM_GPUS,
            batch=config.train.global_batch_size,
        ),
        _FORMULAS,
        *_markdown(["part", "operations", "bytes"], [[name, *texts] for name, texts in FORMULAS.items()]),
        "",
        "## Operations\n",
        "GFLOP per clean token, forward and backward:\n",
        *_markdown(
            ["", *sizes[0].steps],
            [[size.name.upper(), *(f"{step.gflop_per_token:.1f}" for step in size.steps.values())] for size in sizes],
        ),
        _SHARES,
        *_markdown(
            ["", *public_shares(sizes[0])],
            [[size.name.upper(), *(_percent(share) for share in public_shares(size).values())] for size in sizes],
        ),
    ]
    for size in sizes:
        lines += ["", *_size_section(size)]
    lines += [*_savings_section(sizes), *_measured_section(results)]
    return "\n".join(lines).rstrip() + "\n"


def _size_section(size: Size) -> list[str]:
    model, tensor = size.config.model, size.config.parallel.tensor_model_parallel_size
    parameters = num_parameters(model, ParallelConfig(), 0)
    names = list(size.steps)
    lines = [
        f"## {size.name.upper()}\n",
        f"{parameters / 1e9:.2f}e9 parameters, {model.num_layers} layers, tensor parallel {tensor}, data parallel "
        f"{size.data_parallel_size}. GFLOP and MB through the memory, per clean token, of all ranks of a sequence:\n",
    ]
    rows = []
    for part in FORMULAS:
        cells = [part]
        for name in names:
            cost, length = size.steps[name].parts[part], size.steps[name].work.length
            moved = cost.bytes + cost.network_bytes
            cells.append(f"{cost.flops / length / 1e9:.2f}" if cost.flops else "")
            cells.append(f"{moved / length / 1e6:.2f}")
        rows.append(cells)
    head = [""] + [f"{name}: {unit}" for name in names for unit in ("GFLOP", "MB")]
    lines += [*_markdown(head, rows), "", "Modelled GPU milliseconds of one sequence, and the share of the step:\n"]
    rows = []
    for part in FORMULAS:
        cells = [part]
        for name in names:
            for machine in size.machines:
                seconds = size.steps[name].parts[part].seconds(machine)
                share = _percent(seconds / size.steps[name].seconds(machine))
                cells.append(f"({1e3 * seconds:.1f})" if part == _REDUCTION else f"{1e3 * seconds:.1f}, {share}")
        rows.append(cells)
    totals = [f"{1e3 * size.steps[name].seconds(machine):.0f}" for name in names for machine in size.machines]
    rows.append(["all", *totals])
    head = [""] + [f"{name}, {machine.name}" for name in names for machine in size.machines]
    lines += [*_markdown(head, rows), ""]
    lines.append("In brackets what the reduction takes if nothing hides it; it is not in the sum.")
    return lines


def _savings_section(sizes: Sequence[Size]) -> list[str]:
    saved = [saved_of_public(size, size.machines[0]) for size in sizes]
    parts = [part for part in saved[0] if any(abs(of_size[part]) > 5e-4 for of_size in saved)]
    rows = [
        [
            size.name.upper(),
            *(f"{100 * of_size[part]:.1f}" for part in parts),
            f"{100 * sum(of_size.values()):.1f}",
            f"×{1 / (1 - sum(of_size.values())):.2f}",
        ]
        for size, of_size in zip(sizes, saved, strict=True)
    ]
    found = [levers(size, size.machines[0]) for size in sizes]
    ordered = sorted(found[0], key=lambda name: -found[0][name])
    return [
        _SAVINGS,
        *_markdown(["", *parts, "all", "speed"], rows),
        _PRUNE,
        *_markdown(
            ["", *(size.name.upper() for size in sizes)],
            [[name, *(f"{100 * of_size[name]:.1f}" for of_size in found)] for name in ordered],
        ),
    ]


def _measured_section(results: Path) -> list[str]:
    cases = {case.title: case for device in ("cpu", "cuda") for case in parts_cases(torch.device(device))}
    tables = []
    for path in sorted(results.glob("parts*.json")):
        for measurement in read_results(path):
            for title in dict.fromkeys(row.title for row in measurement.rows):
                if title not in cases:
                    raise DataError(str(path), f"no such case: {title}", "remove its rows and measure again")
                rows = {row.variant: row for row in measurement.rows if row.title == title}
                tables += ["", *_measured_table(cases[title], rows, measurement)]
    return [_MEASURED, *(tables or ["", "Not measured yet."])]


def measured_machine(case: PartsCase, rows: Mapping[str, Row]) -> Machine:
    """The rates of the product and of the copy."""
    return Machine(
        name="measured",
        flops_per_s=2 * PRODUCT_SIZE**3 / _seconds(rows[PRODUCT]),
        bytes_per_s=2 * COPIED_ELEMENTS * case.dtype.itemsize / _seconds(rows[COPY]),
    )


def _seconds(row: Row) -> float:
    assert row.unit in ("ms", "CPU ms")
    return row.median / 1e3


def modelled_parts(case: PartsCase, machine: Machine) -> dict[str, float]:
    """Seconds of each measured part on paper."""
    count = case.num_sequences
    costs = step_cost(
        case.model, case.work, case.kernels, sequences_per_micro_batch=count, sequences_per_step=count
    )  # fmt: skip
    seconds = {name: count * cost.seconds(machine) for name, cost in costs.items()}
    return {
        "embedding": seconds["embedding"],
        "norms": seconds["norms, residuals"],
        "qkv": seconds["qkv"],
        "rope": seconds["rope"],
        "attention": seconds["attention"],
        "output projection": seconds["output projection"],
        "MLP": seconds["MLP products"] + seconds["SwiGLU"],
        "head and cross-entropy": seconds["head"] + seconds["cross-entropy"],
        "optimizer": seconds["optimizer"],
    }


def _measured_table(case: PartsCase, rows: Mapping[str, Row], measurement: Measurement) -> list[str]:
    machine = measured_machine(case, rows)
    modelled = modelled_parts(case, machine)
    whole, total = _seconds(rows[WHOLE]), math.fsum(modelled.values())
    cells = []
    measured = {name: _seconds(rows[name]) for name in modelled}
    for name, seconds in modelled.items():
        cells.append(
            [
                name,
                f"{1e3 * measured[name]:.1f}",
                _percent(measured[name] / whole),
                f"{1e3 * seconds:.1f}",
                _percent(seconds / total),
                f"{measured[name] / seconds:.1f}",
            ]
        )
    rest = whole - sum(measured.values())
    cells.append(["rest", f"{1e3 * rest:.1f}", _percent(rest / whole), "", "", ""])
    cells.append(["all", f"{1e3 * whole:.1f}", "", f"{1e3 * total:.1f}", "", f"{whole / total:.1f}"])
    where = measurement.machine.get("gpu", measurement.machine["cpu"])
    return [
        f"{case.title[0].upper()}{case.title[1:]} ({where}, {str(measurement.machine['date'])[:10]}): "
        f"{machine.flops_per_s / 1e9:.0f} GFLOP/s, {machine.bytes_per_s / 1e9:.0f} GB/s.\n",
        *_markdown(["", f"measured {rows[WHOLE].unit}", "share", "modelled ms", "share", "measured / modelled"], cells),
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%" if share < 0.0995 else f"{100 * share:.0f}%"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
