"""Every parallel layout, with and without recomputation, equals one process in everything that is trained.

`UPDATE_MATRIX=1 make test-long` writes what was seen into the table of docs/numerics.md.
"""

import os
from pathlib import Path

import pytest
import torch

from nld_train.config.schema import ParallelConfig, Recompute
from nld_train.testing.matrix import (
    GRADIENT_LIMIT,
    MATRIX,
    PARAMETER_LIMIT,
    gradient_difference,
    read_table,
    recomputing,
    row_name,
    row_names,
    run_gradients,
    run_training,
    tasks,
    worst_difference,
    write_row,
)
from nld_train.testing.ranks import RankPool, RankProcesses
from nld_train.testing.steps import StepResult

NUMERICS = Path(__file__).parents[2] / "docs" / "numerics.md"

Results = dict[str, StepResult]


@pytest.fixture(scope="module")
def gradients(one_rank: RankPool) -> Results:
    """One process."""
    return one_rank.run(run_gradients, tasks(), ParallelConfig())


@pytest.fixture(scope="module")
def trained(one_rank: RankPool, gradients: Results) -> Results:
    """One process; every matrix has moved by much more than what layouts may differ by."""
    results: Results = one_rank.run(run_training, tasks(), ParallelConfig())
    for task, result in results.items():
        for name, parameter in result.parameters.items():
            start = gradients[task].parameters[name]
            if parameter.dim() == 2:
                moved = ((parameter - start).norm() / start.norm()).item()
                assert moved > 30 * PARAMETER_LIMIT, f"{task}, {name}: {moved:.1e}"
    return results


def test_the_micro_batches_of_the_supervised_task_differ_in_their_rows(gradients: Results) -> None:
    """Pipeline stages have to tell each other how many rows are coming."""
    from nld_train.objective.noise import corrupt
    from nld_train.training.step import noise_spec

    case = tasks()["supervised"]
    spec = noise_spec(case.objective, seed=case.seed, global_batch_size=8)
    assert case.is_supervised is not None
    widths = [
        corrupt(case.samples[i : i + 2, :-1], torch.arange(i, i + 2), spec, case.is_supervised[i : i + 2]).places.shape[
            1
        ]
        for i in range(0, 8, 2)
    ]
    assert widths == [192, 192, 128, 128]


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [
        ("DP 4", "none"),
        ("TP 2 + SP", "selective"),
        ("PP 2 x 2 virtual", "full"),
        ("TP 2 + SP x PP 2 x 2 virtual", "none"),
    ],
)
def test_gradients_equal_one_process(
    rank_processes: RankProcesses, gradients: Results, layout: str, recompute: str
) -> None:
    num_ranks, parallel = MATRIX[layout]
    parallel = recomputing(parallel, recompute)
    found = RankPool(num_ranks, rank_processes).run(run_gradients, tasks(), parallel, parallel=parallel)
    for task, expected in gradients.items():
        assert gradient_difference(found[task], expected) < GRADIENT_LIMIT, task


@pytest.mark.long
@pytest.mark.parametrize("recompute", [kind.value for kind in Recompute])
@pytest.mark.parametrize("layout", MATRIX)
def test_everything_equals_one_process(
    rank_processes: RankProcesses, gradients: Results, trained: Results, layout: str, recompute: str
) -> None:
    num_ranks, parallel = MATRIX[layout]
    parallel = recomputing(parallel, recompute)
    pool = RankPool(num_ranks, rank_processes)
    found = pool.run(run_gradients, tasks(), parallel, parallel=parallel)
    moved = pool.run(run_training, tasks(), parallel, parallel=parallel)
    row = {
        task: (
            gradient_difference(found[task], expected),
            worst_difference(moved[task].parameters, trained[task].parameters),
        )
        for task, expected in gradients.items()
    }
    for task, (of_gradients, of_parameters) in row.items():
        assert of_gradients < GRADIENT_LIMIT, f"{task}: {of_gradients:.1e}"
        assert of_parameters < PARAMETER_LIMIT, f"{task}: {of_parameters:.1e}"
    if os.environ.get("UPDATE_MATRIX"):
        write_row(NUMERICS, row_name(layout, recompute), row)


def test_the_table_is_complete_and_within_its_limits() -> None:
    table = read_table(NUMERICS)
    assert list(table) == row_names(), "run the long tests with UPDATE_MATRIX=1"
    for name, row in table.items():
        assert list(row) == list(tasks()), name
        for task, (of_gradients, of_parameters) in row.items():
            assert 0 <= of_gradients < GRADIENT_LIMIT, f"{name}: {task}"
            assert 0 <= of_parameters < PARAMETER_LIMIT, f"{name}: {task}"
