"""Context parallelism equals one process: sums, gradients, parameters after steps; what travels is counted."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nld_train.config.schema import Normalization, ParallelConfig, Recompute, Sampler, Stratify
from nld_train.model import attention
from nld_train.model.context_parallel import count_traffic, gather_keys
from nld_train.platform.device import Platform
from nld_train.platform.topology import Topology
from nld_train.testing.ranks import RankPool
from nld_train.testing.steps import StepCase, StepResult, run_step, tiny_model, tiny_recipe

LENGTH, BLOCK = 64, 8


def parallel(**sizes: int) -> ParallelConfig:
    return ParallelConfig(**{f"{name}_parallel_size": size for name, size in sizes.items()})


FOUR_RANKS = {
    "cp4": parallel(context=4),
    "tp2_cp2": parallel(tensor_model=2, context=2),
    "cp2_dp2": parallel(context=2),
    "pp2_cp2": parallel(pipeline_model=2, context=2),
}


def document_starts(*lengths: list[int]) -> Tensor:
    """int64 [sequences, L] of documents with these lengths."""
    return torch.tensor([[sum(d[:i]) for i, n in enumerate(d) for _ in range(n)] for d in lengths])


# Ends of documents fall before, onto and behind the cuts of 2 and of 4 ranks (every 16 and 8 tokens): blocks stick out.
DOCUMENTS = document_starts([64], [13, 30, 21], [31, 2, 31], [5, 3, 22, 4, 30])
# All but one answer of a few tokens: most ranks have no row with weight in that sequence.
ANSWERS = torch.zeros(4, LENGTH, dtype=torch.bool)
ANSWERS[0, 40:], ANSWERS[1, 2:5], ANSWERS[2, 15:18], ANSWERS[3, 10:60] = True, True, True, True

JOINT = tiny_recipe(block_size=BLOCK)
CASES: dict[str, dict[str, object]] = {
    "ar": {"diffusion_loss_weight": 0.0},
    "joint": {},
    "fraction": {"objective": tiny_recipe(block_size=BLOCK, noisy_fraction=0.5)},
    "documents": {"document_starts": DOCUMENTS},
    "ar_documents": {"document_starts": DOCUMENTS, "diffusion_loss_weight": 0.0},
    "answers": {"is_supervised": ANSWERS, "document_starts": DOCUMENTS},
    "complementary": {
        "objective": tiny_recipe(block_size=BLOCK, complementary=True, sampler=Sampler.power_count),
    },
    "everything": {
        "objective": tiny_recipe(
            block_size=BLOCK,
            complementary=True,
            sampler=Sampler.uniform_count,
            stratify=Stratify.batch,
            noisy_fraction=0.5,
            normalization=Normalization.sequence,
        ),
        "is_supervised": ANSWERS,
        "document_starts": DOCUMENTS,
        "micro_batch_size": 2,
    },
    "contributing": {"objective": tiny_recipe(block_size=BLOCK, normalization=Normalization.contributing)},
}


def step_case(name: str, **changes: object) -> StepCase:
    samples = torch.randint(4, tiny_model().vocab_size, (4, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    values: dict[str, object] = {"samples": samples, "objective": JOINT}
    return StepCase(**(values | CASES[name] | changes))  # type: ignore[arg-type]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def assert_takes_the_same_step(one: RankPool, several: RankPool, layout: ParallelConfig, name: str) -> None:
    """Every sum and count that is reported, the gradient of every parameter (float64), and where three steps lead."""
    case = step_case(name)
    expected: StepResult = one.run(run_step, case, ParallelConfig())
    found: StepResult = several.run(run_step, case, layout, parallel=layout)
    torch.testing.assert_close(found.terms.to_vector(), expected.terms.to_vector(), rtol=1e-11, atol=1e-12)
    assert found.terms.largest_weight == expected.terms.largest_weight
    assert set(found.gradients) == set(expected.gradients)
    for parameter, gradient in expected.gradients.items():
        error = relative_error(found.gradients[parameter], gradient)
        assert error < 1e-9, f"{parameter}: {error:.1e}"

    # Megatron's optimizer does not take float64.
    steps = step_case(name, dtype=torch.float32, num_optimizer_steps=3)
    trained: StepResult = one.run(run_step, steps, ParallelConfig())
    found = several.run(run_step, steps, layout, parallel=layout)
    for parameter, values in trained.parameters.items():
        error = relative_error(found.parameters[parameter], values)
        assert error < 1e-5, f"{parameter}: {error:.1e}"
        assert relative_error(values, expected.parameters[parameter].float()) > 4e-5 or "layernorm" in parameter


IN_SHORT = ("ar", "joint", "fraction", "answers", "everything")


@pytest.mark.parametrize(
    "name", [name if name in IN_SHORT else pytest.param(name, marks=pytest.mark.long) for name in CASES]
)
def test_two_context_ranks_equal_one_process(one_rank: RankPool, two_ranks: RankPool, name: str) -> None:
    assert_takes_the_same_step(one_rank, two_ranks, parallel(context=2), name)


@pytest.mark.long
@pytest.mark.parametrize("name", ["ar_documents", "complementary", "everything", "contributing"])  # not in the matrix
@pytest.mark.parametrize("layout", FOUR_RANKS)
def test_four_ranks_equal_one_process(one_rank: RankPool, four_ranks: RankPool, layout: str, name: str) -> None:
    assert_takes_the_same_step(one_rank, four_ranks, FOUR_RANKS[layout], name)


@pytest.mark.parametrize("recompute", [Recompute.selective, Recompute.full])
def test_recomputation_changes_nothing(two_ranks: RankPool, recompute: Recompute) -> None:
    layout, case = parallel(context=2), step_case("everything")
    stored: StepResult = two_ranks.run(run_step, case, layout, parallel=layout)
    recomputing = replace(layout, recompute_granularity=recompute)
    recomputed: StepResult = two_ranks.run(run_step, case, recomputing, parallel=recomputing)
    for parameter, gradient in stored.gradients.items():
        assert relative_error(recomputed.gradients[parameter], gradient) < 1e-13, parameter


def traffic_of_a_step(
    topology: Topology, platform: Platform, case: StepCase, layout: ParallelConfig
) -> tuple[int, int, int]:
    """Bytes that a rank sends in a step: gathered keys and values, their gradients; and what gathering keys and values
    of all rows would send (done beside it, by an all-gather as it is)."""
    naive = 0

    def gather_both_halves(
        key: Tensor, value: Tensor, row_layout: Any, group: dist.ProcessGroup
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        nonlocal naive
        for x in (key.detach().contiguous(), value.detach().contiguous()):
            dist.all_gather([torch.empty_like(x) for _ in range(group.size())], x, group=group)
            naive += (group.size() - 1) * x.nbytes
        return gather_keys(key, value, row_layout, group)

    attention.gather_keys = gather_both_halves
    try:
        with count_traffic() as traffic:
            run_step(topology, platform, case, layout)
    finally:
        attention.gather_keys = gather_keys
    return traffic.gathered, traffic.scattered, naive


def test_a_joint_step_sends_what_an_ar_step_sends(two_ranks: RankPool) -> None:
    layout = parallel(context=2)
    of_step = {
        name: two_ranks.run(traffic_of_a_step, step_case(name), layout, parallel=layout) for name in ("ar", "joint")
    }
    model, num_sequences, num_float64 = tiny_model(), 4, 8
    # To one other rank: keys and values of this rank's half of the clean tokens; and gradients of the other's.
    per_layer = 2 * num_sequences * (LENGTH // 2) * model.num_key_value_heads * model.head_dim * num_float64
    assert of_step["ar"] == (model.num_layers * per_layer,) * 3
    assert of_step["joint"][:2] == of_step["ar"][:2]
    assert of_step["joint"][2] == 2 * of_step["joint"][0]
