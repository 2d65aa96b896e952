"""Packed documents and supervised sequences: the same sums and gradients as the plain layouts they stand for."""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from nld_train.config.schema import ObjectiveConfig, ParallelConfig, Sampler, Stratify
from nld_train.objective.noise import Corruption, corrupt
from nld_train.testing.ranks import RankPool
from nld_train.testing.steps import StepCase, StepResult, run_step, tiny_model, tiny_recipe
from nld_train.training.step import noise_spec

BLOCK, MASK = 4, 3
RECIPE = tiny_recipe(block_size=BLOCK, mask_token_id=MASK)
ALL_OPTIONS = replace(
    RECIPE, sampler=Sampler.power_count, stratify=Stratify.batch, complementary=True, noisy_fraction=0.5
)


def random_samples(num_sequences: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(4, tiny_model().vocab_size, (num_sequences, length + 1), generator=generator)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def row_part(corruption: Corruption, sequence: int, first: int, stop: int) -> Corruption:
    """The noisy rows of places [first, stop) of one sequence, counted from there."""
    places = corruption.places[sequence]
    rows = ((places >= first) & (places < stop)).nonzero().squeeze(1)
    part = {item.name: getattr(corruption, item.name)[sequence : sequence + 1] for item in fields(Corruption)}
    part = {name: value if value.dim() == 1 else value[:, rows] for name, value in part.items()}
    part["places"] = part["places"] - first
    return Corruption(**part)


@pytest.mark.parametrize("objective", [RECIPE, ALL_OPTIONS], ids=["recipe", "all_options"])
def test_packed_documents_are_the_documents_alone(one_rank: RankPool, objective: ObjectiveConfig) -> None:
    """Documents of 9, 1 and 14 tokens: losses, blocks, positions (the query scaling steps at 8) and gradients."""
    samples = random_samples(1, 24)
    bounds = [(0, 9), (9, 10), (10, 24)]
    starts = torch.cat([torch.full((stop - first,), first) for first, stop in bounds])[None]
    tokens = samples[:, :-1]
    spec = noise_spec(objective, seed=11, global_batch_size=1)
    corruption = corrupt(tokens, torch.tensor([5]), spec, None, starts)
    case = StepCase(samples=samples, objective=objective, corruption=corruption, document_starts=starts)
    packed: StepResult = one_rank.run(run_step, case, ParallelConfig())
    assert packed.terms.num_clean == 24
    assert packed.terms.ar_count == 24 - len(bounds)
    ar_sum = diffusion_sum = torch.zeros((), dtype=torch.float64)
    gradients = {name: torch.zeros_like(gradient) for name, gradient in packed.gradients.items()}
    for first, stop in bounds:
        alone: StepResult = one_rank.run(
            run_step,
            StepCase(
                samples=samples[:, first : stop + 1],
                objective=objective,
                corruption=row_part(corruption, 0, first, stop),
                document_starts=torch.zeros(1, stop - first, dtype=torch.int64),
            ),
            ParallelConfig(),
        )
        ar_sum = ar_sum + alone.terms.ar_sum
        diffusion_sum = diffusion_sum + alone.terms.diffusion_sum
        for name, gradient in alone.gradients.items():
            gradients[name] += gradient * alone.terms.divisor
    torch.testing.assert_close(packed.terms.ar_sum, ar_sum, rtol=1e-12, atol=0)
    torch.testing.assert_close(packed.terms.diffusion_sum, diffusion_sum, rtol=1e-12, atol=0)
    assert packed.terms.diffusion_sum > 0
    for name, gradient in gradients.items():
        # Megatron multiplies by the reciprocal of the token count in fp32.
        assert relative_error(packed.gradients[name] * packed.terms.divisor, gradient) < 2e-7, name


def with_all_blocks(corruption: Corruption, tokens: Tensor) -> Corruption:
    """The symmetric layout of the same noise: every token has a noisy row."""
    places = torch.arange(tokens.shape[1]).repeat(len(tokens), 1)
    whole = Corruption(
        noisy_tokens=tokens.clone(),
        places=places,
        blocks=places // BLOCK,
        weights=torch.zeros(tokens.shape, dtype=torch.float64),
        mask_ratios=torch.zeros(tokens.shape),
        sequence_ratios=corruption.sequence_ratios,
    )
    for sequence, row in (corruption.places >= 0).nonzero().tolist():
        place = corruption.places[sequence, row]
        for name in ("noisy_tokens", "weights", "mask_ratios"):
            getattr(whole, name)[sequence, place] = getattr(corruption, name)[sequence, row]
    return whole


@pytest.mark.parametrize("sampler", [Sampler.bernoulli, Sampler.power_count])
def test_the_asymmetric_layout_equals_the_symmetric_one(one_rank: RankPool, sampler: Sampler) -> None:
    """Answers at other places in each sequence; one sequence has none, and padding rows only."""
    samples = random_samples(4, 32)
    is_supervised = torch.zeros(4, 32, dtype=torch.bool)
    is_supervised[0, 27:] = True
    is_supervised[1, 5:7] = True
    is_supervised[1, 30] = True
    is_supervised[2] = True
    objective = replace(RECIPE, sampler=sampler)
    tokens = samples[:, :-1]
    corruption = corrupt(
        tokens, torch.arange(4), noise_spec(objective, seed=2, global_batch_size=4), is_supervised, None
    )
    assert (corruption.places[3] == -1).all()
    assert not corruption.weights[:, :].isnan().any()
    masked_places = corruption.places[corruption.weights > 0]
    assert is_supervised[(corruption.weights > 0).nonzero()[:, 0], masked_places].all()
    case = StepCase(
        samples=samples, objective=objective, is_supervised=is_supervised, corruption=corruption, micro_batch_size=2
    )
    asymmetric: StepResult = one_rank.run(run_step, case, ParallelConfig())
    symmetric: StepResult = one_rank.run(
        run_step, replace(case, corruption=with_all_blocks(corruption, tokens)), ParallelConfig()
    )
    for name in ("ar_sum", "diffusion_sum", "num_masked", "num_clean", "loss_sum", "divisor"):
        torch.testing.assert_close(
            getattr(asymmetric.terms, name), getattr(symmetric.terms, name), rtol=1e-12, atol=0, msg=name
        )
    assert asymmetric.terms.num_clean == is_supervised.sum()
    for name, gradient in symmetric.gradients.items():
        assert relative_error(asymmetric.gradients[name], gradient) < 1e-12, name


@pytest.mark.parametrize(
    ("parallel", "size"),
    [
        (ParallelConfig(), 1),
        (ParallelConfig(), 2),
        (ParallelConfig(tensor_model_parallel_size=2), 2),
        (ParallelConfig(pipeline_model_parallel_size=2), 2),
    ],
    ids=["dp2_mbs1", "dp2_mbs2", "tp2", "pp2"],
)
def test_every_layout_takes_the_same_step(
    one_rank: RankPool, two_ranks: RankPool, parallel: ParallelConfig, size: int
) -> None:
    """Documents, gaps, counts, copies and a fraction together; micro-batches have different numbers of rows."""
    samples = random_samples(4, 320)
    starts = torch.zeros(4, 320, dtype=torch.int64)
    starts[1, 100:] = 100
    starts[2, 33:] = 33
    is_supervised = torch.ones(4, 320, dtype=torch.bool)
    is_supervised[0, :290] = False
    is_supervised[3, 7:300] = False
    case = StepCase(
        samples=samples,
        objective=ALL_OPTIONS,
        is_supervised=is_supervised,
        document_starts=starts,
        micro_batch_size=4,
        first_position=40,
    )
    expected: StepResult = one_rank.run(run_step, case, ParallelConfig())
    found: StepResult = two_ranks.run(run_step, replace(case, micro_batch_size=size), parallel, parallel=parallel)
    torch.testing.assert_close(found.terms.to_vector(), expected.terms.to_vector(), rtol=1e-11, atol=0)
    torch.testing.assert_close(found.terms.largest_weight, expected.terms.largest_weight, rtol=0, atol=0)
    for name, gradient in expected.gradients.items():
        assert relative_error(found.gradients[name], gradient) < 1e-6, name
