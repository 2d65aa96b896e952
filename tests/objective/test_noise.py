"""The recipe's noise: a pure function of (seed, stream position) with the published distribution."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import nld_train.objective.noise as noise_module
from nld_train.objective.noise import NoiseSpec, corrupt, num_noisy_rows, uniforms

SPEC = NoiseSpec(mask_token_id=100, eps=1e-3, seed=1234, block_size=8)


def tokens_of(num_sequences: int, length: int) -> torch.Tensor:
    return 1000 + torch.arange(num_sequences * length).reshape(num_sequences, length)


def test_a_sum_that_rounds_up_chooses_no_block_too_many(monkeypatch: pytest.MonkeyPatch):
    """2050 and the largest fraction that is drawn, 1 - 2^-53, add up to 2051 in float64: a block the layout lacks."""
    largest = 1.0 - 2.0**-53

    def draws(_seed: int, _position: int, count: int, *_stream: int) -> np.ndarray:
        return np.full(count, largest)

    monkeypatch.setattr(noise_module, "uniforms", draws)
    spec = NoiseSpec(mask_token_id=9, eps=1e-3, seed=1, block_size=2, noisy_fraction=0.5)
    corruption = corrupt(torch.zeros(1, 8200, dtype=torch.int64), torch.tensor([0]), spec)
    assert (corruption.places >= 0).sum() == 4100  # rows of 2050 of the 4100 blocks


def test_uniforms_are_pinned():
    """A resumed run may live under another numpy: these numbers are part of the format."""
    expected = [0.5762450189723225, 0.31977111332753083, 0.47519711552752286]
    assert uniforms(1234, 5, 3).tolist() == expected
    assert uniforms(1234, 5, 2).tolist() == expected[:2]
    assert uniforms(1234, 6, 3).tolist() != expected
    assert uniforms(1235, 5, 3).tolist() != expected
    assert uniforms(1234, 5, 3, stream=1).tolist() == [0.9913560683607907, 0.31946336435798206, 0.6386179306152384]
    assert uniforms(1234, 5, 3, part=1).tolist() == [0.7565066189935946, 0.13240868118282378, 0.561919378276319]


def test_a_sequence_is_corrupted_alike_wherever_it_stands_in_a_batch():
    tokens, positions = tokens_of(6, 32), torch.tensor([40, 7, 10**12, 0, 3, 41])
    whole = corrupt(tokens, positions, SPEC)
    for rows in ([2, 0], [5], [1, 3, 4]):
        part = corrupt(tokens[rows], positions[rows], SPEC)
        assert torch.equal(part.noisy_tokens, whole.noisy_tokens[rows])
        assert torch.equal(part.weights, whole.weights[rows])
        assert torch.equal(part.mask_ratios, whole.mask_ratios[rows])
        assert torch.equal(part.sequence_ratios, whole.sequence_ratios[rows])


def test_corruption_ignores_and_leaves_alone_the_global_generators():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state()
    first = corrupt(tokens_of(2, 16), torch.tensor([1, 2]), SPEC)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(corrupt(tokens_of(2, 16), torch.tensor([1, 2]), SPEC).weights, first.weights)


def test_the_recipe_token_by_token():
    """One t, then a draw for each token: masked where it is below p = (1 - eps) * t + eps, with weight 1/p."""
    tokens = tokens_of(8, 64)
    corruption = corrupt(tokens, torch.arange(8), SPEC)
    for sequence in range(8):
        t, *draws = uniforms(SPEC.seed, sequence, 65).tolist()
        p = (1.0 - SPEC.eps) * t + SPEC.eps
        is_masked = [draw < p for draw in draws]
        noisy_tokens = [100 if masked else 1000 + 64 * sequence + place for place, masked in enumerate(is_masked)]
        assert corruption.noisy_tokens[sequence].tolist() == noisy_tokens
        assert corruption.weights[sequence].tolist() == [1.0 / p if masked else 0.0 for masked in is_masked]
        blocks = [is_masked[start : start + 8] for start in range(0, 64, 8)]
        assert corruption.mask_ratios[sequence].tolist() == [sum(block) / 8 for block in blocks for _ in block]
        assert corruption.sequence_ratios[sequence] == sum(is_masked) / 64
    assert 0 < (corruption.weights > 0).sum() < 512
    assert corruption.is_whole(64, 8)
    assert torch.equal(corruption.places, torch.arange(64).expand(8, -1))
    assert torch.equal(corruption.blocks, (torch.arange(64) // 8).expand(8, -1))
    int64s, float64s = ("noisy_tokens", "places", "blocks"), ("weights", "sequence_ratios")
    assert {getattr(corruption, name).dtype for name in int64s} == {torch.int64}
    assert {getattr(corruption, name).dtype for name in float64s} == {torch.float64}
    assert corruption.mask_ratios.dtype == torch.float32


def test_distribution_of_the_recipe():
    """One p per sequence, uniform on [eps, 1); tokens masked with chance p; 1/p weights are unbiased."""
    spec = NoiseSpec(mask_token_id=100, eps=0.1, seed=7, block_size=64)
    num_sequences, length = 4096, 64
    weights = corrupt(tokens_of(num_sequences, length), torch.arange(num_sequences), spec).weights
    # The largest weight of a sequence is 1/p; where nothing is masked (p is then near eps) p is not to be seen.
    has_masks = weights.any(dim=1)
    assert has_masks.float().mean() > 0.99
    p = 1.0 / weights[has_masks].amax(dim=1)
    counts = (weights[has_masks] > 0).sum(1)
    assert torch.allclose(weights[has_masks].sum(1), counts / p, rtol=1e-12)
    assert 0.1 <= p.min() < 0.101
    assert 0.999 < p.max() <= 1.0
    standard_error = 0.9 / math.sqrt(12 * num_sequences)
    assert abs(p.mean() - 0.55) < 4 * standard_error
    # Given p, counts are binomial: the standardised deviations have mean 0 and variance 1.
    deviations = (counts - length * p) / (length * p * (1 - p)).clamp_min(1e-9).sqrt()
    deviations = deviations[p < 0.98]
    assert abs(deviations.mean()) < 4 / math.sqrt(len(deviations))
    assert abs(deviations.var() - 1) < 4 * math.sqrt(2 / len(deviations))
    standard_error = (weights.mean(1).std() / math.sqrt(num_sequences)).item()
    assert abs(weights.mean() - 1) < 4 * standard_error


def test_rows_are_padded_to_a_multiple() -> None:
    """Of 11 noisy blocks of 3 tokens, to what four tensor-parallel ranks share equally; nothing else changes."""
    tokens = torch.arange(66).expand(2, -1) + 1000
    spec = NoiseSpec(mask_token_id=100, eps=1e-3, seed=5, block_size=3, noisy_fraction=0.5)
    plain, padded = (corrupt(tokens, torch.arange(2), replace(spec, row_multiple=m)) for m in (1, 4))
    assert plain.places.shape == (2, 33)
    assert padded.places.shape == (2, 36)
    assert num_noisy_rows(replace(spec, row_multiple=4), 66, has_documents=False, has_gaps=False) == 36
    for name in ("noisy_tokens", "places", "blocks", "weights"):
        assert torch.equal(getattr(padded, name)[:, :33], getattr(plain, name)), name
    assert padded.places[:, 33:].eq(-1).all()
    assert padded.weights[:, 33:].eq(0).all()
