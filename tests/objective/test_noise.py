"""The noise: a pure function of (seed, stream position) with the published distribution."""

import math

import numpy as np
import torch

from nld_train.objective.noise import NoiseSpec, corrupt, uniforms

SPEC = NoiseSpec(mask_token_id=100, eps=1e-3, seed=1234)


def tokens_of(num_sequences: int, length: int) -> torch.Tensor:
    return 1000 + torch.arange(num_sequences * length).reshape(num_sequences, length)


def test_uniforms_are_pinned():
    """A resumed run may live under another numpy: these numbers are part of the format."""
    expected = [0.5762450189723225, 0.31977111332753083, 0.47519711552752286]
    assert uniforms(1234, 5, 3).tolist() == expected
    assert uniforms(1234, 5, 2).tolist() == expected[:2]
    assert uniforms(1234, 6, 3).tolist() != expected
    assert uniforms(1235, 5, 3).tolist() != expected


def test_a_sequence_is_corrupted_alike_wherever_it_stands_in_a_batch():
    tokens, positions = tokens_of(6, 32), torch.tensor([40, 7, 10**12, 0, 3, 41])
    whole = corrupt(tokens, positions, SPEC)
    for rows in ([2, 0], [5], [1, 3, 4]):
        part = corrupt(tokens[rows], positions[rows], SPEC)
        assert torch.equal(part.noisy_tokens, whole.noisy_tokens[rows])
        assert torch.equal(part.is_noised, whole.is_noised[rows])
        assert torch.equal(part.p_mask, whole.p_mask[rows])


def test_corruption_ignores_and_leaves_alone_the_global_generators():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state()
    first = corrupt(tokens_of(2, 16), torch.tensor([1, 2]), SPEC)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(corrupt(tokens_of(2, 16), torch.tensor([1, 2]), SPEC).is_noised, first.is_noised)


def test_noised_tokens_and_only_they_become_the_mask_token():
    tokens = tokens_of(8, 64)
    corruption = corrupt(tokens, torch.arange(8), SPEC)
    assert corruption.is_noised.any()
    assert (~corruption.is_noised).any()
    assert torch.equal(corruption.noisy_tokens == SPEC.mask_token_id, corruption.is_noised)
    assert torch.equal(corruption.noisy_tokens[~corruption.is_noised], tokens[~corruption.is_noised])
    assert corruption.noisy_tokens.dtype == torch.int64
    assert corruption.p_mask.dtype == torch.float64


def test_distribution_of_the_recipe():
    """One p per sequence, uniform on [eps, 1); tokens masked with chance p; 1/p weights are unbiased."""
    spec = NoiseSpec(mask_token_id=100, eps=0.1, seed=7)
    num_sequences, length = 4096, 64
    corruption = corrupt(tokens_of(num_sequences, length), torch.arange(num_sequences), spec)
    p = corruption.p_mask[:, 0]
    assert torch.equal(corruption.p_mask, p[:, None].expand(-1, length))
    assert 0.1 <= p.min() < 0.101
    assert 0.999 < p.max() <= 1.0
    standard_error = 0.9 / math.sqrt(12 * num_sequences)
    assert abs(p.mean() - 0.55) < 4 * standard_error
    # Given p, counts are binomial: the standardised deviations have mean 0 and variance 1.
    deviations = (corruption.is_noised.sum(1) - length * p) / (length * p * (1 - p)).clamp_min(1e-9).sqrt()
    deviations = deviations[p < 0.98]
    assert abs(deviations.mean()) < 4 / math.sqrt(len(deviations))
    assert abs(deviations.var() - 1) < 4 * math.sqrt(2 / len(deviations))
    weights = corruption.is_noised / corruption.p_mask
    standard_error = (weights.mean(1).std() / math.sqrt(num_sequences)).item()
    assert abs(weights.mean() - 1) < 4 * standard_error
