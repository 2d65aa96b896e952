"""How many noisy rows there are, and one noise level for a step."""

from dataclasses import replace

import pytest
import torch

from nld_train.objective.noise import corrupt, num_noisy_rows
from nld_train.objective.samplers import NoiseSpec

SPEC = NoiseSpec(mask_token_id=100, eps=1e-3, seed=1234, block_size=8)


def tokens_of(num_sequences: int, length: int) -> torch.Tensor:
    return 1000 + torch.arange(num_sequences * length).reshape(num_sequences, length)


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.3, 0.07, 0.001])
@pytest.mark.parametrize("complementary", [False, True])
def test_the_announced_number_of_rows_is_what_is_laid_out(fraction: float, complementary: bool) -> None:
    spec = replace(SPEC, noisy_fraction=fraction, complementary=complementary)
    tokens, positions = tokens_of(3, 400), torch.arange(3)
    starts = torch.zeros_like(tokens)
    starts[:, 7:] = 7
    gaps = torch.ones_like(tokens, dtype=torch.bool)
    gaps[:, :9] = False
    for document_starts, is_supervised in ((None, None), (starts, None), (None, gaps), (starts, gaps)):
        announced = num_noisy_rows(
            spec, 400, has_documents=document_starts is not None, has_gaps=is_supervised is not None
        )
        found = corrupt(tokens, positions, spec, is_supervised, document_starts).places.shape[1]
        if announced is None:
            assert found % 128 == 0 or found == spec.num_copies * 400
        else:
            assert found == announced


def test_a_shared_noise_level_is_one_for_the_global_batch() -> None:
    spec = replace(SPEC, shared_noise_level=True, global_batch_size=4)
    largest = [
        corrupt(tokens_of(1, 400), torch.tensor([position]), spec).weights.max().item() for position in range(12)
    ]
    assert [len(set(largest[first : first + 4])) for first in (0, 4, 8)] == [1, 1, 1]
    assert len(set(largest)) == 3
    with pytest.raises(ValueError, match="shared_noise_level"):
        replace(SPEC, shared_noise_level=True)
    with pytest.raises(ValueError, match="shared_noise_level"):
        replace(spec, sampler="power_count")
