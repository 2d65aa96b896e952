"""Every parallel layout equals one process: loss sums, gradients, and parameters after optimizer steps."""

from dataclasses import replace

import psutil
import pytest
import torch

from nld_train.config.schema import ParallelConfig
from nld_train.platform.device import Platform
from nld_train.platform.topology import Topology
from nld_train.testing.ranks import RankPool
from nld_train.testing.steps import StepCase, StepResult, run_step, tiny_model, tiny_recipe

OBJECTIVE = tiny_recipe(block_size=8)
LAYOUTS = {
    "dp2": ParallelConfig(),
    "tp2": ParallelConfig(tensor_model_parallel_size=2),
    "pp2": ParallelConfig(pipeline_model_parallel_size=2),
}


def step_case(**changes: object) -> StepCase:
    generator = torch.Generator().manual_seed(3)
    samples = torch.randint(4, tiny_model().vocab_size, (4, 33), generator=generator)
    return StepCase(samples=samples, objective=OBJECTIVE, **changes)  # type: ignore[arg-type]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("alpha", [0.0, 0.3], ids=["ar", "joint"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_equal_one_process(one_rank: RankPool, two_ranks: RankPool, layout: str, alpha: float) -> None:
    case = step_case(diffusion_loss_weight=alpha)
    expected: StepResult = one_rank.run(run_step, case, ParallelConfig())
    found: StepResult = two_ranks.run(run_step, case, LAYOUTS[layout], parallel=LAYOUTS[layout])
    torch.testing.assert_close(found.terms.to_vector(), expected.terms.to_vector(), rtol=1e-10, atol=0)
    assert set(found.gradients) == set(expected.gradients)
    for name, gradient in expected.gradients.items():
        assert torch.equal(found.parameters[name], expected.parameters[name]), f"{name} starts differently"
        assert relative_error(found.gradients[name], gradient) < 1e-9, name


def num_threads(topology: Topology, platform: Platform) -> int:
    return psutil.Process().num_threads()


def test_a_case_gives_its_process_groups_back(one_rank: RankPool) -> None:
    """Each has threads. Rank processes with too many are started anew, which takes longer than most cases."""
    case = step_case(dtype=torch.float32, num_optimizer_steps=1)
    one_rank.run(run_step, case, ParallelConfig())
    before = one_rank.run(num_threads)
    one_rank.run(run_step, case, ParallelConfig())
    assert one_rank.run(num_threads) == before


OVERLAPPED = LAYOUTS | {
    "cp2": ParallelConfig(context_parallel_size=2),
    "pp2 x 2 virtual": ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
}


@pytest.mark.parametrize("layout", OVERLAPPED)
def test_overlapped_communication_changes_nothing(two_ranks: RankPool, layout: str) -> None:
    """The settings of GPUs: gradients reduced during the backward pass, weights gathered during the next forward."""
    case = step_case(dtype=torch.float32, num_optimizer_steps=3, model=tiny_model(num_layers=4))
    layouts = [
        replace(OVERLAPPED[layout], overlap_grad_reduce=overlap, overlap_param_gather=overlap)
        for overlap in (False, True)
    ]
    expected, found = (two_ranks.run(run_step, case, parallel, parallel=parallel) for parallel in layouts)
    for name, parameter in expected.parameters.items():
        assert torch.equal(found.parameters[name], parameter), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_after_three_steps_equal_one_process(
    one_rank: RankPool, two_ranks: RankPool, layout: str, dtype: torch.dtype
) -> None:
    """Through the distributed optimizer, whose state is sharded over data-parallel ranks."""
    case = step_case(dtype=dtype, num_optimizer_steps=3)
    expected: StepResult = one_rank.run(run_step, case, ParallelConfig())
    found: StepResult = two_ranks.run(run_step, case, LAYOUTS[layout], parallel=LAYOUTS[layout])
    start: StepResult = one_rank.run(run_step, step_case(dtype=dtype), ParallelConfig())
    # bf16 parameters move in steps of 2^-8 of their size, so one flipped rounding is visible, and norms do not move.
    tolerance = 1e-5 if dtype is torch.float32 else 2e-3
    for name, parameter in expected.parameters.items():
        moved = relative_error(parameter.float(), start.parameters[name].float())
        difference = relative_error(found.parameters[name].float(), parameter.float())
        assert difference < tolerance, f"{name}: {difference:.1e}"
        if not name.endswith("layernorm.weight"):
            assert moved > 4 * tolerance, f"{name} moved only {moved:.1e}"
