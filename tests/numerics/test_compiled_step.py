"""A whole step with norm, SwiGLU and rotary embedding compiled is the step without, at any layout."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nld_train.config.schema import CompilePointwise, ParallelConfig, Recompute
from nld_train.platform.device import Platform
from nld_train.platform.topology import Topology
from nld_train.testing.fixtures import needs_compiler
from nld_train.testing.ranks import RankPool
from nld_train.testing.steps import StepCase, StepResult, run_step, tiny_model, tiny_recipe

pytestmark = needs_compiler
COMPILED = tiny_model(compile_pointwise=CompilePointwise.always)
FULL = Recompute.full
LAYOUTS = {
    "one rank": ParallelConfig(),
    "recomputed": ParallelConfig(recompute_granularity=FULL),
    "tp2": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, recompute_granularity=FULL),
    "pp2": ParallelConfig(pipeline_model_parallel_size=2),
}


def step_case(dtype: torch.dtype = torch.float64) -> StepCase:
    """Micro-batches of two sequences, of which half of the blocks get a noisy copy: other rows in each."""
    samples = torch.randint(4, COMPILED.vocab_size, (4, 33), generator=torch.Generator().manual_seed(3))
    objective = tiny_recipe(block_size=8, noisy_fraction=0.5)
    return StepCase(samples=samples, objective=objective, micro_batch_size=2, dtype=dtype)


def differences(found: StepResult, expected: StepResult) -> dict[str, float]:
    pairs = {name: (found.gradients[name], gradient) for name, gradient in expected.gradients.items()}
    pairs["losses"] = (found.terms.to_vector(), expected.terms.to_vector())
    return {name: ((a - b).double().norm() / b.double().norm()).item() for name, (a, b) in pairs.items()}


@pytest.mark.parametrize(
    "layout", [name if name == "recomputed" else pytest.param(name, marks=pytest.mark.long) for name in LAYOUTS]
)
def test_compiled_equals_eager(one_rank: RankPool, two_ranks: RankPool, layout: str) -> None:
    parallel = LAYOUTS[layout]
    ranks = two_ranks if layout in ("tp2", "pp2") else one_rank
    expected = ranks.run(run_step, step_case(), parallel, parallel=parallel)
    found = ranks.run(run_step, replace(step_case(), model=COMPILED), parallel, parallel=parallel)
    off = {name: value for name, value in differences(found, expected).items() if value >= 1e-12}
    assert not off
    assert any(not torch.equal(found.gradients[name], x) for name, x in expected.gradients.items()), "not compiled"


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
def test_other_dtypes(one_rank: RankPool, dtype: torch.dtype, limit: float) -> None:
    expected, found = (
        one_rank.run(run_step, replace(step_case(dtype), model=model), ParallelConfig())
        for model in (tiny_model(), COMPILED)
    )
    assert max(differences(found, expected).values()) < limit


def compiled_graphs(topology: Topology, platform: Platform, case: StepCase) -> list[int]:
    """So far in this process, after each of five steps: the first with all blocks, an AR step, then other rows."""
    counts = []
    for fraction, alpha, seed in ((1.0, 0.3, 1), (1.0, 0.0, 1), (0.5, 0.3, 2), (0.25, 0.3, 3), (0.25, 0.3, 4)):
        objective = replace(case.objective, noisy_fraction=fraction)
        run_step(
            topology,
            platform,
            replace(case, objective=objective, diffusion_loss_weight=alpha, seed=seed),
            ParallelConfig(),
        )
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return counts


@pytest.mark.long
def test_a_run_compiles_in_its_first_step_alone(one_rank: RankPool) -> None:
    model = replace(COMPILED, hidden_size=64, ffn_hidden_size=112, head_dim=8)  # nobody else's
    counts = one_rank.run(compiled_graphs, replace(step_case(torch.float32), model=model))
    assert counts == counts[:1] * 5
    assert counts[0] >= 5


def two_steps(topology: Topology, platform: Platform, case: StepCase) -> dict[str, Tensor]:
    return run_step(topology, platform, replace(case, num_optimizer_steps=2), ParallelConfig()).parameters


@pytest.mark.long
def test_again_bit_for_bit(one_rank: RankPool) -> None:
    case = replace(step_case(torch.bfloat16), model=COMPILED)
    first, second = (one_rank.run(two_steps, case) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
