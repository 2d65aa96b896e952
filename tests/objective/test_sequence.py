"""The doubled sequence: what each row reads, predicts and weighs."""

import itertools

import pytest
import torch

from nld_train.objective.losses import LossTerms, loss_terms
from nld_train.objective.masks import dense_block_mask
from nld_train.objective.noise import Corruption, NoiseSpec, corrupt
from nld_train.objective.normalize import CONTRIBUTING, SEQUENCE, means, num_tokens, row_weights, shares
from nld_train.objective.normalize import TOKENS as TOKENS_NORMALIZATION
from nld_train.objective.sequence import JointBatch, SequenceLayout, Shard, build_joint_batch, shard_batch, share_blocks

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


# ----------------------------------------------------------------------------------------------- context-parallel ranks


def test_a_shard_row_by_row() -> None:
    """Two documents of 5 and 3 tokens in blocks of 2 on two ranks: clean [0, 1 | 6, 7] and [2, 3 | 4, 5]. The blocks
    {0, 1}, {4}, {5, 6} and two copies of {7} see 4, 5, 4, 3 and 3 pairs: the first two are nearest to a half of the
    work, and the first rank takes them from the front."""
    tokens = torch.arange(10, 18).reshape(1, 8)
    places = torch.tensor([[0, 1, 4, 5, 6, 7, 7, -1]])
    noise = Corruption(
        noisy_tokens=torch.where(places < 0, 100, 10 + places),
        places=places,
        blocks=torch.tensor([[0, 0, 1, 2, 2, 3, 4, -1]]),
        weights=torch.arange(1.0, 9.0, dtype=torch.float64).reshape(1, 8),
        mask_ratios=torch.arange(1.0, 9.0).reshape(1, 8),
        sequence_ratios=torch.tensor([0.5], dtype=torch.float64),
    )
    starts = torch.tensor([[0, 0, 0, 0, 0, 5, 5, 5]])
    supervised = torch.tensor([[True, False, True, True, True, True, True, True]])
    batch = build_joint_batch(
        tokens, tokens + 50, torch.ones(1, 8), noise, block_size=2, is_supervised=supervised, document_starts=starts
    )
    weights = row_weights(batch, TOKENS_NORMALIZATION, 10.0)
    assert shard_batch(batch, weights, Shard()) == (batch, weights)
    (first, of_first), (second, of_second) = (shard_batch(batch, weights, Shard(rank, 2)) for rank in range(2))
    table, other = first.layout.table, second.layout.table
    assert table is not None
    assert other is not None
    # Padded to the rows of the whole, 8, and so are those of the second rank.
    assert (first.layout.num_noisy_rows, first.layout.num_rows, first.layout.num_keys) == (8, 12, 16)
    assert first.tokens[0, [0, 1, 2, 8, 9, 10, 11]].tolist() == [10, 11, 14, 10, 11, 16, 17]
    assert first.targets[0, [0, 1, 2, 8, 9, 10, 11]].tolist() == [10, 11, 14, 60, 61, 66, 67]
    assert of_first.tolist() == [[10, 20, 30, 0, 0, 0, 0, 0, 1, 1, 1, 1]]
    assert table.blocks[0, :3].tolist() == [0, 0, 1]
    assert (table.blocks[0, 3:8] < -1).all()
    assert len(table.blocks[0, 3:8].unique()) == 5
    assert table.blocks[0, 8:].tolist() == [-1] * 4
    assert table.position_ids.tolist() == [[0, 1, 4, 0, 0, 0, 0, 0, 0, 1, 1, 2]]
    assert table.first_keys.tolist() == [[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5, 5]]
    assert table.end_keys.tolist() == [[0, 0, 4, 0, 0, 0, 0, 0, 1, 2, 7, 8]]
    assert second.tokens[0, [0, 1, 2, 3, 8, 9, 10, 11]].tolist() == [15, 16, 17, 17, 12, 13, 14, 15]
    assert of_second.tolist() == [[40, 50, 60, 70, 0, 0, 0, 0, 1, 1, 1, 1]]
    assert other.blocks[0, :4].tolist() == [2, 2, 3, 4]
    assert other.first_keys[0, :4].tolist() == [5, 5, 5, 5]
    assert other.end_keys[0, :4].tolist() == [5, 5, 7, 7]
    assert first.is_supervised.tolist() == [[True, False, True, True]]
    assert second.diffusion_weights is not None
    assert second.mask_ratios is not None
    assert second.diffusion_weights.tolist() == [[4, 5, 6, 7, 0, 0, 0, 0]]
    assert second.mask_ratios.tolist() == [[4, 5, 6, 7, 0, 0, 0, 0]]
    # What belongs to a sequence is counted once.
    assert [batch.sequence_ratios.tolist() for batch in (first, second)] == [[0.5], [0]]
    assert [batch.is_counted.tolist() for batch in (first, second)] == [[True], [False]]


def test_sequences_that_cannot_be_cut_are_refused() -> None:
    batch = build_joint_batch(TOKENS, LABELS, LOSS_MASK, corruption(), block_size=2)
    with pytest.raises(ValueError, match="4 clean tokens cannot be cut into 2 x 3"):
        shard_batch(batch, row_weights(batch, TOKENS_NORMALIZATION, 0.3), Shard(0, 3))
    with pytest.raises(ValueError, match="needs a table"):
        SequenceLayout(4, 2, has_noisy_half=True, shard=Shard(0, 2))


def random_batch(length: int, block_size: int, *, has_documents: bool, **noise: object) -> JointBatch:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(4, 90, (3, length), generator=generator)
    begins = torch.rand(tokens.shape, generator=generator) < 0.05
    starts = torch.where(begins, torch.arange(length), 0).cummax(dim=1).values if has_documents else None
    supervised = torch.rand(tokens.shape, generator=generator) < 0.7 if has_documents else None
    values = {"sampler": "uniform_count", "stratify": "none", "noisy_fraction": 1.0, "complementary": False}
    spec = NoiseSpec(
        mask_token_id=3,
        eps=1e-3,
        seed=1,
        block_size=block_size,
        shared_noise_level=False,
        half_life_ratio=0.25,
        global_batch_size=3,
        **(values | noise),  # type: ignore[arg-type]
    )
    noisy = corrupt(tokens, torch.arange(3), spec, supervised, starts)
    mask = torch.rand(tokens.shape, generator=generator) < 0.8
    return build_joint_batch(tokens, tokens, mask, noisy, block_size, is_supervised=supervised, document_starts=starts)


@pytest.mark.parametrize("normalization", [TOKENS_NORMALIZATION, CONTRIBUTING, SEQUENCE])
@pytest.mark.parametrize("has_documents", [False, True])
def test_losses_and_metrics_of_the_shards_add_up(has_documents: bool, normalization: str) -> None:
    batch = random_batch(192, 16, has_documents=has_documents, noisy_fraction=0.5, complementary=True)
    weights = row_weights(batch, normalization, 0.3)
    losses = torch.rand(batch.tokens.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def terms(part: JointBatch, of_rows: torch.Tensor, of_part: torch.Tensor) -> LossTerms:
        return loss_terms(
            of_part, of_part > 0.5, part, loss_sum=(of_rows * of_part).sum(), divisor=num_tokens(part, normalization)
        )

    expected = terms(batch, weights, losses)
    # Losses travel as targets do.
    numbered = JointBatch(**{name: getattr(batch, name) for name in JointBatch.__slots__})
    numbered.targets = torch.arange(losses.numel()).view_as(losses)
    for size in (2, 3, 6):
        total = LossTerms.zeros()
        for rank in range(size):
            part, of_rows = shard_batch(numbered, weights, Shard(rank, size))
            total += terms(part, of_rows, losses.flatten()[part.targets])
        torch.testing.assert_close(total.to_vector(), expected.to_vector(), rtol=1e-12, atol=0)
        assert total.largest_weight == expected.largest_weight
        assert means(total, 0.3) == pytest.approx(means(expected, 0.3), rel=1e-12)
        found, counted = shares(total), shares(expected)
        assert {name for name, value in found.items() if value is None} == {n for n, x in counted.items() if x is None}
        assert [x for x in found.values() if x is not None] == pytest.approx(
            [x for x in counted.values() if x is not None], rel=1e-12
        )


def test_zigzag_shares_out_the_work() -> None:
    """Pairs of a row and a key that the attention computes, at 8 ranks: the table of docs/numerics.md."""
    size, length = 8, 4096

    def pairs(batch: JointBatch) -> float:
        """Of the first sequence, whose padding sees nothing."""
        table = batch.layout.table
        assert table is not None
        blocks, keys = table.blocks[0], (table.end_keys - table.first_keys)[0]
        is_noisy = blocks >= 0
        own = (blocks[is_noisy][:, None] == blocks[is_noisy]).sum()
        return float(keys[blocks >= -1].sum() + own)

    def excess(of_ranks: list[float]) -> float:
        return max(of_ranks) / (sum(of_ranks) / len(of_ranks)) - 1

    ar = build_joint_batch(*[torch.zeros(1, length, dtype=torch.int64)] * 3, None, 32)
    halves = [(random_batch(length, 32, has_documents=False, noisy_fraction=x), x) for x in (1.0, 0.5, 0.25, 0.55)]
    for batch, fraction in [(ar, 0.0), *halves]:
        weights = row_weights(batch, TOKENS_NORMALIZATION, 0.3)
        shards = [shard_batch(batch, weights, Shard(rank, size))[0] for rank in range(size)]
        assert excess([pairs(part) for part in shards]) < (0.05 if fraction % 1 else 1e-12)
        mask = dense_block_mask(batch.layout, torch.device("cpu"))
        of_rows = mask[0].sum(-1).squeeze() if fraction % 1 else mask.squeeze().sum(-1)
        in_rows = torch.arange(len(of_rows)) >= 0 if batch.layout.table is None else batch.layout.table.blocks[0] >= -1
        assert sum(pairs(part) for part in shards) == of_rows[in_rows].sum()
        assert shards[0].layout.num_noisy_rows <= batch.layout.num_noisy_rows / size + 128
        if not fraction % 1:
            assert excess(of_rows.view(-1, size, length // size).sum((0, 2)).tolist()) > 0.8  # contiguous


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_blocks_are_shared_out_in_two_runs(num_ranks: int) -> None:
    """Numbers of blocks differ by one at most, the runs mirror each other, and where all blocks are there a rank has
    those of its clean tokens."""
    generator = torch.Generator().manual_seed(num_ranks)
    assert share_blocks([], num_ranks) == []
    for _ in range(50):
        work = torch.randint(1, 100, (int(torch.randint(1, 70, (1,), generator=generator)),), generator=generator)
        ranks = share_blocks(work.sort().values.tolist(), num_ranks)
        runs = [rank for rank, _ in itertools.groupby(ranks)]
        half = runs.index(max(runs)) + 1
        assert runs[:half] == sorted(runs[:half])
        assert runs[half:] == sorted(runs[half:], reverse=True)
        counts = [ranks.count(rank) for rank in range(num_ranks)]
        assert max(counts) - min(counts) <= 1
    whole = share_blocks([32 * (32 * i + 32) for i in range(8 * num_ranks)], num_ranks)
    assert whole == [min(i // 4, 2 * num_ranks - 1 - i // 4) for i in range(8 * num_ranks)]
