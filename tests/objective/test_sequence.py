"""The doubled sequence: what each row reads, predicts and weighs."""

import pytest
import torch

from nld_train.objective.noise import Corruption
from nld_train.objective.normalize import TOKENS as TOKENS_NORMALIZATION
from nld_train.objective.normalize import row_weights
from nld_train.objective.sequence import SequenceLayout, build_joint_batch

TOKENS = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]])
LABELS = torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24]])
LOSS_MASK = torch.tensor([[1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])


def corruption() -> Corruption:
    is_masked = torch.tensor([[True, False, False, True], [False, True, False, False]])
    places = torch.arange(4).repeat(2, 1)
    return Corruption(
        noisy_tokens=torch.where(is_masked, 100, TOKENS),
        places=places,
        blocks=places // 2,
        weights=is_masked / torch.tensor([[0.5], [0.25]], dtype=torch.float64),
        mask_ratios=torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.0, 0.0]]),
        sequence_ratios=torch.tensor([0.5, 0.25], dtype=torch.float64),
    )


def test_joint_batch_row_by_row():
    batch = build_joint_batch(TOKENS, LABELS, LOSS_MASK, corruption(), block_size=2)
    assert batch.layout == SequenceLayout(4, 2, has_noisy_half=True)
    assert batch.tokens.tolist() == [[100, 11, 12, 100, 10, 11, 12, 13], [20, 100, 22, 23, 20, 21, 22, 23]]
    # no shift on noisy rows, shift by one on clean rows
    assert batch.targets.tolist() == [[10, 11, 12, 13, 11, 12, 13, 14], [20, 21, 22, 23, 21, 22, 23, 24]]
    expected = [[0.6, 0, 0, 0.6, 1, 1, 0, 1], [0, 1.2, 0, 0, 1, 1, 1, 1]]
    weights = row_weights(batch, TOKENS_NORMALIZATION, 0.3)
    assert weights.dtype == torch.float64
    assert torch.allclose(weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=0)
    assert batch.layout.position_ids().tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_without_corruption_the_clean_tokens_run_alone():
    batch = build_joint_batch(TOKENS, LABELS, LOSS_MASK, None, block_size=2)
    assert batch.layout == SequenceLayout(4, 2, has_noisy_half=False)
    assert torch.equal(batch.tokens, TOKENS)
    assert torch.equal(batch.targets, LABELS)
    assert batch.diffusion_weights is None
    assert torch.equal(row_weights(batch, TOKENS_NORMALIZATION, 0.3), LOSS_MASK.double())
    assert batch.layout.position_ids().tolist() == [0, 1, 2, 3]


def test_a_block_size_that_does_not_divide_the_sequence_is_refused():
    with pytest.raises(ValueError, match=r"block_size 3 .* 4"):
        build_joint_batch(TOKENS, LABELS, LOSS_MASK, None, block_size=3)


def test_a_table_says_what_each_row_is() -> None:
    """Two documents of 5 and 3 tokens in blocks of 2; one sequence with blocks 0 and 4 twice, one with block 2."""
    tokens = torch.arange(10, 26).reshape(2, 8)
    starts = torch.tensor([[0, 0, 0, 0, 0, 5, 5, 5], [0] * 8])
    places = torch.tensor([[0, 1, 4, 7, 0, 1, 4, 7], [4, 5, -1, -1, -1, -1, -1, -1]])
    blocks = torch.tensor([[0, 0, 2, 4, 5, 5, 7, 9], [2, 2, -1, -1, -1, -1, -1, -1]])
    noise = Corruption(
        noisy_tokens=torch.full((2, 8), 100),
        places=places,
        blocks=blocks,
        weights=torch.ones(2, 8, dtype=torch.float64),
        mask_ratios=torch.ones(2, 8),
        sequence_ratios=torch.ones(2, dtype=torch.float64),
    )
    batch = build_joint_batch(tokens, tokens + 1, torch.ones(2, 8), noise, block_size=2, document_starts=starts)
    assert batch.targets[:, :8].tolist() == [[10, 11, 14, 17] * 2, [22, 23] + [18] * 6]
    layout, table = batch.layout, batch.layout.table
    assert table is not None
    assert (layout.num_noisy_rows, layout.num_rows) == (8, 16)
    assert torch.equal(layout.position_ids(), table.position_ids)
    assert table.position_ids.tolist() == [
        [0, 1, 4, 2, 0, 1, 4, 2, 0, 1, 2, 3, 4, 0, 1, 2],
        [4, 5, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7],
    ]
    assert table.first_keys.tolist() == [[0, 0, 0, 5, 0, 0, 0, 5, 0, 0, 0, 0, 0, 5, 5, 5], [0] * 16]
    assert table.end_keys.tolist() == [
        [0, 0, 4, 7, 0, 0, 4, 7, 1, 2, 3, 4, 5, 6, 7, 8],
        [4, 4, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8],
    ]
    assert table.blocks[0].tolist() == [0, 0, 2, 4, 5, 5, 7, 9] + [-1] * 8
    padding = table.blocks[1, 2:8]
    assert (padding < -1).all()
    assert len(padding.unique()) == 6
    assert layout != SequenceLayout(8, 2, has_noisy_half=True, table=None)


def test_documents_without_noise_have_a_table_too() -> None:
    starts = torch.tensor([[0, 0, 2, 2], [0, 1, 1, 1]])
    layout = build_joint_batch(TOKENS, LABELS, LOSS_MASK, None, block_size=3, document_starts=starts).layout
    assert layout.table is not None
    assert (layout.num_noisy_rows, layout.num_rows) == (0, 4)
    assert layout.position_ids().tolist() == [[0, 1, 0, 1], [0, 0, 1, 2]]
    assert layout.table.first_keys.tolist() == starts.tolist()
