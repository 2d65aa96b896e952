"""Every sampler's mean loss and gradient on a model, against its expectation enumerated over all masked sets."""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from nld_train.config.schema import ObjectiveConfig, Sampler, Stratify
from nld_train.objective.noise import Corruption
from nld_train.testing.enumeration import enumerate_masked_sets
from nld_train.testing.ranks import RankPool
from nld_train.testing.steps import StepCase, run_many_draws, tiny_model, tiny_recipe
from nld_train.training.step import noise_spec

BLOCK, LENGTH, MASK = 4, 8, 3
NUM_SEQUENCES, NUM_DRAWS = 64, 24
PLAIN = tiny_recipe(block_size=BLOCK, mask_token_id=MASK, eps=0.05)
OBJECTIVES = {
    "recipe": PLAIN,
    "bernoulli_per_block": replace(PLAIN, sampler=Sampler.bernoulli_per_block, stratify=Stratify.batch),
    "uniform_count": replace(PLAIN, sampler=Sampler.uniform_count, stratify=Stratify.batch),
    "power_count": replace(PLAIN, sampler=Sampler.power_count),
    "power_count_stratified": replace(PLAIN, sampler=Sampler.power_count, stratify=Stratify.batch),
    "position_weighted": replace(PLAIN, sampler=Sampler.position_weighted),
    "complementary_bernoulli": replace(PLAIN, complementary=True),
    "complementary_count": replace(
        PLAIN, sampler=Sampler.power_count, stratify=Stratify.batch, complementary=True, noisy_fraction=0.5
    ),
    "fraction_of_recipe": replace(PLAIN, noisy_fraction=0.5),
    "fraction_of_counts": replace(PLAIN, sampler=Sampler.power_count, stratify=Stratify.batch, noisy_fraction=0.25),
}


def text() -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(4, tiny_model().vocab_size, (1, LENGTH + 1), generator=generator)


def expectation(one_rank: RankPool, objective: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Loss and gradient of one sequence: every masked set of every block, each as a sequence with one noisy block,
    weighted by its probability and its weight."""
    tokens = text()[:, :-1]
    spec = noise_spec(replace(objective, noisy_fraction=1.0), seed=0, global_batch_size=1)
    rows: dict[str, list[Tensor]] = {item.name: [] for item in fields(Corruption)}
    for block in range(LENGTH // BLOCK):
        places = torch.arange(block * BLOCK, (block + 1) * BLOCK)
        for masked in enumerate_masked_sets(spec, range(BLOCK)):
            is_masked = torch.zeros(BLOCK, dtype=torch.bool)
            is_masked[list(masked.masked)] = True
            rows["noisy_tokens"].append(torch.where(is_masked, MASK, tokens[0, places]))
            rows["places"].append(places)
            rows["blocks"].append(torch.full((BLOCK,), block))
            rows["weights"].append(is_masked * (masked.probability * masked.weight))
            rows["mask_ratios"].append(torch.ones(BLOCK))
            rows["sequence_ratios"].append(torch.tensor(0.5, dtype=torch.float64))
    corruption = Corruption(**{name: torch.stack(values) for name, values in rows.items()})
    num_sets = len(corruption.places)
    case = StepCase(
        samples=text().expand(num_sets, -1),
        objective=objective,
        corruption=corruption,
        micro_batch_size=num_sets,
        dtype=torch.float64,
    )
    losses, gradients = one_rank.run(run_many_draws, case, 1)
    return losses[0] * num_sets, gradients[0] * num_sets


@pytest.mark.parametrize("name", OBJECTIVES)
def test_mean_loss_and_gradient_equal_the_enumerated_expectation(one_rank: RankPool, name: str) -> None:
    objective = OBJECTIVES[name]
    loss, gradient = expectation(one_rank, objective)
    case = StepCase(
        samples=text().expand(NUM_SEQUENCES, -1),
        objective=objective,
        micro_batch_size=NUM_SEQUENCES,
        dtype=torch.float64,
    )
    losses, gradients = one_rank.run(run_many_draws, case, NUM_DRAWS)
    # The loss, the gradient along its own expectation, and along random directions.
    directions = torch.randn(20, gradient.numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    directions = torch.cat([gradient[None] / gradient.norm(), directions])
    found = torch.cat([losses[:, None], gradients @ directions.t()], dim=1)
    expected = torch.cat([loss[None], directions @ gradient])
    error = found.std(dim=0) / NUM_DRAWS**0.5
    deviation = (found.mean(dim=0) - expected).abs() / error
    assert deviation.max() < 4.5, f"{name}: {deviation.max():.1f} standard errors, {deviation.tolist()}"
    # The test would notice a loss or gradient that is wrong by a tenth.
    assert error[0] < 0.02 * loss
    assert error[1] < 0.03 * gradient.norm()


def test_without_eps_bernoulli_and_the_counts_have_the_same_expectation(one_rank: RankPool) -> None:
    recipe = replace(PLAIN, eps=1e-300)
    loss, gradient = expectation(one_rank, recipe)
    for other in (
        replace(recipe, sampler=Sampler.uniform_count),
        replace(recipe, sampler=Sampler.power_count),
        replace(recipe, sampler=Sampler.power_count, complementary=True),
        replace(recipe, complementary=True),
    ):
        other_loss, other_gradient = expectation(one_rank, other)
        torch.testing.assert_close(other_loss, loss, rtol=1e-9, atol=0)
        torch.testing.assert_close(other_gradient, gradient, rtol=1e-7, atol=1e-9 * gradient.abs().max().item())
