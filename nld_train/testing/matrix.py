"""The matrix of parallel layouts: what is run at each of them, how it is compared with one process, and its table.

A row of the table in docs/numerics.md is a layout with one kind of recomputation, a column is what is trained. A cell
holds two worst differences from one process: of the loss sums and of every parameter's gradient (float64), and of every
parameter after three optimizer steps (fp32, since Megatron's optimizer takes no float64).
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from nld_train.config.schema import ParallelConfig, Recompute, Sampler
from nld_train.platform.device import Platform
from nld_train.platform.topology import Topology
from nld_train.testing.steps import StepCase, StepResult, run_step, tiny_model, tiny_recipe

GRADIENT_LIMIT, PARAMETER_LIMIT = 1e-9, 1e-5

LAYOUTS: dict[str, tuple[int, ParallelConfig]] = {
    "DP 2": (2, ParallelConfig()),
    "DP 4": (4, ParallelConfig()),
    "TP 2": (2, ParallelConfig(tensor_model_parallel_size=2)),
    "TP 2 + SP": (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
    "PP 2": (2, ParallelConfig(pipeline_model_parallel_size=2)),
    "PP 2, 1 + 3 layers": (2, ParallelConfig(pipeline_model_parallel_size=2, num_layers_in_first_pipeline_stage=1)),
    "PP 2 x 2 virtual": (2, ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)),
    "TP 2 x PP 2": (4, ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
    "TP 2 + SP x PP 2 x 2 virtual": (
        4,
        ParallelConfig(
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            pipeline_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=2,
        ),
    ),
}
CONTEXT_LAYOUTS: dict[str, tuple[int, ParallelConfig]] = {
    "CP 2": (2, ParallelConfig(context_parallel_size=2)),
    "CP 4": (4, ParallelConfig(context_parallel_size=4)),
    "TP 2 x CP 2": (4, ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2)),
    "CP 2 x DP 2": (4, ParallelConfig(context_parallel_size=2)),
    "PP 2 x CP 2": (4, ParallelConfig(pipeline_model_parallel_size=2, context_parallel_size=2)),
    "TP 2 + SP x CP 2": (
        4,
        ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2),
    ),
}
MATRIX = LAYOUTS | CONTEXT_LAYOUTS
"""Number of ranks and layout of each row."""

_BLOCK, _SEQUENCES = 8, 8


def tasks() -> dict[str, StepCase]:
    """What is trained, by the name of its column: gradients in float64."""
    generator = torch.Generator().manual_seed(3)
    model = tiny_model(num_layers=4)
    text = torch.randint(4, model.vocab_size, (_SEQUENCES, 193), generator=generator)
    short = text[:, :65]
    power = tiny_recipe(block_size=_BLOCK, sampler=Sampler.power_count)
    joint = StepCase(samples=short, model=model, objective=tiny_recipe(block_size=_BLOCK))
    # Four documents in each sequence, cut at places of its own.
    cuts = torch.rand(_SEQUENCES, 3, generator=generator).mul(62).long().sort(dim=1).values + 1
    places = torch.arange(64)
    starts = torch.stack([torch.where(places >= cut[:, None], cut[:, None], 0).amax(dim=0) for cut in cuts])
    # Micro-batches with many and with few supervised tokens: 192 and 128 noisy rows.
    answers = torch.rand(_SEQUENCES, 192, generator=generator) < 0.9
    answers[4:, :120] = False
    return {
        "AR": replace(joint, diffusion_loss_weight=0.0),
        "joint": joint,
        "joint, fraction 0.5": replace(joint, objective=replace(power, noisy_fraction=0.5)),
        "documents": replace(joint, objective=power, document_starts=starts, micro_batch_size=2),
        "supervised": replace(joint, samples=text, is_supervised=answers, micro_batch_size=2),
    }


def recomputing(parallel: ParallelConfig, recompute: str) -> ParallelConfig:
    return replace(parallel, recompute_granularity=Recompute(recompute))


def run_gradients(
    topology: Topology, platform: Platform, cases: dict[str, StepCase], parallel: ParallelConfig
) -> dict[str, StepResult]:
    """A case for a pool: one step of every task."""
    return {name: run_step(topology, platform, case, parallel) for name, case in cases.items()}


def run_training(
    topology: Topology, platform: Platform, cases: dict[str, StepCase], parallel: ParallelConfig
) -> dict[str, StepResult]:
    """A case for a pool: three optimizer steps of every task."""
    trained = {name: replace(case, dtype=torch.float32, num_optimizer_steps=3) for name, case in cases.items()}
    return run_gradients(topology, platform, trained, parallel)


def worst_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest of ||found - expected|| / ||expected|| over the tensors; of a tensor of zeros the norm itself.

    Raises:
        ValueError: other names, or something is not finite.
    """
    if set(found) != set(expected):
        raise ValueError(f"other tensors than expected: {sorted(set(found) ^ set(expected))}")
    norms = {name: tensor.norm().item() for name, tensor in expected.items()}
    worst = max((found[name] - expected[name]).norm().item() / (norms[name] or 1.0) for name in expected)
    if not torch.tensor([worst, *(tensor.sum() for tensor in found.values())]).isfinite().all():
        raise ValueError("a tensor is not finite")
    return worst


def gradient_difference(found: StepResult, expected: StepResult) -> float:
    """Of the loss sums, each on its own, and of the gradients."""

    def tensors(result: StepResult) -> dict[str, Tensor]:
        return result.gradients | {f"term {i}": value for i, value in enumerate(result.terms.to_vector())}

    return worst_difference(tensors(found), tensors(expected))


# The table -----------------------------------------------------------------------------------------------------------

_BEGIN, _END = "<!-- matrix: written by tests/distributed/test_matrix.py -->", "<!-- end of matrix -->"


def row_name(layout: str, recompute: str) -> str:
    return layout if recompute == Recompute.none.value else f"{layout}, {recompute} recomputation"


def row_names() -> list[str]:
    """In the order of the table."""
    return [row_name(layout, kind.value) for layout in MATRIX for kind in Recompute]


def read_table(path: Path) -> dict[str, dict[str, tuple[float, float]]]:
    """Differences by row and column; empty where the table has not been written."""
    lines = path.read_text().partition(_BEGIN)[2].partition(_END)[0].strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    table = {}
    for name, *values in cells[2:]:
        pairs = [tuple(float(number) for number in value.split("/")) for value in values]
        table[name] = dict(zip(cells[0][1:], pairs, strict=True))
    return table  # type: ignore[return-value]


def write_row(path: Path, name: str, row: dict[str, tuple[float, float]]) -> None:
    """Put one row into the table; rows that the matrix no longer has go."""
    table = read_table(path) | {name: row}
    lines = ["| layout | " + " | ".join(row) + " |", "|" + "---|" * (1 + len(row))]
    lines += [
        f"| {known} | " + " | ".join(f"{g:.0e} / {p:.0e}" for g, p in table[known].values()) + " |"
        for known in row_names()
        if known in table
    ]
    before, begin, rest = path.read_text().partition(_BEGIN)
    after = rest.partition(_END)[2]
    temporary = path.with_suffix(".incomplete")
    temporary.write_text(f"{before}{begin}\n" + "\n".join(lines) + f"\n{_END}{after}")
    temporary.rename(path)
