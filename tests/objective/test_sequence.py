"""The doubled sequence: what each row reads, predicts and weighs."""

import pytest
import torch

from nld_train.objective.noise import Corruption
from nld_train.objective.sequence import SequenceLayout, build_joint_batch

TOKENS = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]])
LABELS = torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24]])
LOSS_MASK = torch.tensor([[1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])


def corruption() -> Corruption:
    is_noised = torch.tensor([[True, False, False, True], [False, True, False, False]])
    p_mask = torch.tensor([[0.5], [0.25]], dtype=torch.float64).expand(2, 4).contiguous()
    return Corruption(torch.where(is_noised, 100, TOKENS), is_noised, p_mask)


def test_joint_batch_row_by_row():
    batch = build_joint_batch(TOKENS, LABELS, LOSS_MASK, corruption(), block_size=2)
    assert batch.layout == SequenceLayout(4, 2, has_noisy_half=True)
    assert batch.tokens.tolist() == [[100, 11, 12, 100, 10, 11, 12, 13], [20, 100, 22, 23, 20, 21, 22, 23]]
    # no shift on noisy rows, shift by one on clean rows
    assert batch.targets.tolist() == [[10, 11, 12, 13, 11, 12, 13, 14], [20, 21, 22, 23, 21, 22, 23, 24]]
    expected = [[0.6, 0, 0, 0.6, 1, 1, 0, 1], [0, 1.2, 0, 0, 1, 1, 1, 1]]
    weights = batch.row_weights(0.3)
    assert weights.dtype == torch.float64
    assert torch.allclose(weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=0)
    assert batch.layout.position_ids().tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_without_corruption_the_clean_tokens_run_alone():
    batch = build_joint_batch(TOKENS, LABELS, LOSS_MASK, None, block_size=2)
    assert batch.layout == SequenceLayout(4, 2, has_noisy_half=False)
    assert torch.equal(batch.tokens, TOKENS)
    assert torch.equal(batch.targets, LABELS)
    assert batch.diffusion_weights is None
    assert torch.equal(batch.row_weights(0.3), LOSS_MASK.double())
    assert batch.layout.position_ids().tolist() == [0, 1, 2, 3]


def test_a_block_size_that_does_not_divide_the_sequence_is_refused():
    with pytest.raises(ValueError, match=r"block_size 3 .* 4"):
        build_joint_batch(TOKENS, LABELS, LOSS_MASK, None, block_size=3)
