"""Sums, counts and the one division, against loops over tokens."""

import math

import pytest
import torch
from torch import Tensor

from nld_train.errors import DataError
from nld_train.objective.losses import NUM_BUCKETS, LossTerms, loss_terms
from nld_train.objective.noise import Corruption, NoiseSpec, corrupt
from nld_train.objective.normalize import CONTRIBUTING, SEQUENCE, TOKENS, means, num_tokens, row_weights, shares
from nld_train.objective.sequence import JointBatch, build_joint_batch

ALPHA = 0.3
MASK = 100
SPEC = NoiseSpec(mask_token_id=MASK, eps=1e-3, seed=3, block_size=4)
NORMALIZATIONS = (TOKENS, CONTRIBUTING, SEQUENCE)


def make_batch(num_sequences: int, *, joint: bool = True, first_position: int = 0) -> tuple[JointBatch, Tensor, Tensor]:
    """A batch with some unsupervised rows, a cross-entropy for each of its rows, and which rows are right."""
    generator = torch.Generator().manual_seed(first_position)
    stream = torch.randint(1000, 2000, (num_sequences, 13), generator=generator)
    tokens, labels = stream[:, :-1], stream[:, 1:]
    loss_mask = (torch.rand(tokens.shape, generator=generator) < 0.8).float()
    is_supervised = torch.rand(tokens.shape, generator=generator) < 0.9
    positions = torch.arange(first_position, first_position + num_sequences)
    corruption = corrupt(tokens, positions, SPEC) if joint else None
    batch = build_joint_batch(tokens, labels, loss_mask, corruption, block_size=4, is_supervised=is_supervised)
    losses = torch.rand(batch.tokens.shape, generator=generator) * 9
    return batch, losses, torch.rand(batch.tokens.shape, generator=generator) < 0.4


def terms_of(
    batch: JointBatch, losses: Tensor, is_correct: Tensor, normalization: str = TOKENS, alpha: float = ALPHA
) -> LossTerms:
    return loss_terms(
        losses,
        is_correct,
        batch,
        loss_sum=(losses.detach().double() * row_weights(batch, normalization, alpha)).sum(),
        divisor=num_tokens(batch, normalization),
    )


def by_hand(batch: JointBatch, losses: Tensor, is_correct: Tensor) -> dict[str, float]:
    names = ["ar_sum", "ar_count", "ar_correct", "diffusion_sum", "num_masked", "num_clean"]
    terms = dict.fromkeys(names, 0.0)
    length, num_noisy = batch.layout.clean_length, batch.layout.num_noisy_rows
    for sequence in range(batch.tokens.shape[0]):
        for position in range(length):
            if batch.ar_weights[sequence, position] > 0:
                terms["ar_sum"] += losses[sequence, num_noisy + position].item()
                terms["ar_count"] += 1
                terms["ar_correct"] += is_correct[sequence, num_noisy + position].item()
            terms["num_clean"] += batch.is_supervised[sequence, position].item()
            if batch.diffusion_weights is not None and batch.tokens[sequence, position] == MASK:
                weight = batch.diffusion_weights[sequence, position].item()
                terms["diffusion_sum"] += weight * losses[sequence, position].item()
                terms["num_masked"] += 1
    return terms


@pytest.mark.parametrize("joint", [True, False])
def test_terms_are_the_sums_over_tokens(joint: bool) -> None:
    batch, losses, is_correct = make_batch(5, joint=joint)
    terms = terms_of(batch, losses.requires_grad_(), is_correct)
    for name, expected in by_hand(batch, losses.detach(), is_correct).items():
        value = getattr(terms, name)
        assert value.dtype == torch.float64
        assert not value.requires_grad
        assert value.shape == ()
        assert value.item() == pytest.approx(expected, rel=1e-13), name
    assert (terms.num_masked > 0) == joint


def test_buckets_hold_each_masked_token_once_by_the_ratio_of_its_block() -> None:
    batch, losses, is_correct = make_batch(8)
    assert batch.mask_ratios is not None
    found = terms_of(batch, losses, is_correct)
    sums, correct, counts = [0.0] * NUM_BUCKETS, [0.0] * NUM_BUCKETS, [0] * NUM_BUCKETS
    for sequence in range(8):
        for block in range(3):
            rows = [row for row in range(4 * block, 4 * block + 4) if batch.tokens[sequence, row] == MASK]
            ratio = len(rows) / 4
            for row in rows:
                assert batch.mask_ratios[sequence, row].item() == ratio
                bucket = {0.25: 2, 0.5: 4, 0.75: 7, 1.0: 9}[ratio]  # (0.2, 0.3], (0.4, 0.5], (0.7, 0.8], (0.9, 1]
                sums[bucket] += losses[sequence, row].item()
                correct[bucket] += is_correct[sequence, row].item()
                counts[bucket] += 1
    assert found.bucket_count.tolist() == counts
    assert found.bucket_correct.tolist() == correct
    assert found.bucket_sum.tolist() == pytest.approx(sums, rel=1e-12)
    reported = shares(found)
    assert reported["diffusion_loss_at_50"] == pytest.approx(sums[4] / counts[4])
    assert reported["diffusion_accuracy_at_100"] == pytest.approx(correct[9] / counts[9])
    assert reported["diffusion_loss_at_10"] is None
    assert reported["diffusion_accuracy"] == pytest.approx(sum(correct) / sum(counts))


@pytest.mark.parametrize("count", range(1, 33))
def test_every_ratio_of_a_block_of_32_lands_in_the_bucket_that_contains_it(count: int) -> None:
    batch, losses, is_correct = make_batch(1)
    assert batch.mask_ratios is not None
    assert batch.diffusion_weights is not None
    batch.mask_ratios.fill_(count / 32)
    batch.diffusion_weights.fill_(1.0)
    [bucket] = terms_of(batch, losses, is_correct).bucket_count.nonzero().flatten().tolist()
    assert bucket / 10 < count / 32 <= (bucket + 1) / 10
    batch.mask_ratios.fill_(torch.tensor(0.3, dtype=torch.float32).item())  # 3 of 10, rounded up in float32
    assert terms_of(batch, losses, is_correct).bucket_count[2] > 0


def test_spread_of_ratios_and_largest_weight() -> None:
    batch, losses, is_correct = make_batch(6)
    assert batch.diffusion_weights is not None
    ratios = [(batch.tokens[row, :12] == MASK).double().mean().item() for row in range(6)]
    reported = shares(terms_of(batch, losses, is_correct))
    mean = sum(ratios) / 6
    assert reported["mask_ratio_std"] == pytest.approx(math.sqrt(sum((r - mean) ** 2 for r in ratios) / 6))
    assert reported["largest_weight"] == batch.diffusion_weights.max().item()
    hand = by_hand(batch, losses, is_correct)
    assert reported["masked_share"] == pytest.approx(hand["num_masked"] / hand["num_clean"])
    assert reported["ar_accuracy"] == pytest.approx(hand["ar_correct"] / hand["ar_count"])
    batch, losses, is_correct = make_batch(2, joint=False)
    assert set(shares(terms_of(batch, losses, is_correct, alpha=0.0))) == {"ar_accuracy"}


def test_terms_add_up_over_micro_batches_and_travel_as_a_vector() -> None:
    parts = [make_batch(2, first_position=position) for position in (0, 2, 4)]
    total = LossTerms.zeros()
    for part in parts:
        total = total + terms_of(*part)
    expected = [by_hand(*part) for part in parts]
    for name in expected[0]:
        assert getattr(total, name).item() == pytest.approx(sum(part[name] for part in expected), rel=1e-13), name
    weights = [batch.diffusion_weights.max().item() for batch, _, _ in parts if batch.diffusion_weights is not None]
    assert total.largest_weight.item() == max(weights)
    vector = total.to_vector()
    assert vector.dtype == torch.float64
    again = LossTerms.from_vector(vector, total.largest_weight)
    for name in LossTerms.__dataclass_fields__:
        assert torch.equal(getattr(again, name), getattr(total, name)), name


def test_vector_and_losses_of_another_shape_are_refused() -> None:
    good = LossTerms.zeros().to_vector()
    with pytest.raises(ValueError, match=r"torch\.float32"):
        LossTerms.from_vector(good.float(), good[0])
    with pytest.raises(ValueError, match="4"):
        LossTerms.from_vector(torch.zeros(4, dtype=torch.float64), good[0])
    batch, losses, is_correct = make_batch(2)
    zero = torch.zeros(())
    with pytest.raises(ValueError, match=r"token_losses \[2, 23\].*\[2, 24\]"):
        loss_terms(losses[:, 1:], is_correct, batch, loss_sum=zero, divisor=zero)
    with pytest.raises(ValueError, match=r"is_correct \[2, 23\].*\[2, 24\]"):
        loss_terms(losses, is_correct[:, 1:], batch, loss_sum=zero, divisor=zero)


@pytest.mark.parametrize("joint", [True, False])
def test_num_tokens_and_means_of_each_normalization(joint: bool) -> None:
    batch, losses, is_correct = make_batch(4, joint=joint)
    hand = by_hand(batch, losses, is_correct)
    alpha = ALPHA if joint else 0.0
    weighted_sum = hand["ar_sum"] + alpha * hand["diffusion_sum"]
    per_sequence = 0.0
    for row in range(4):
        alone = JointBatch(
            layout=batch.layout,
            tokens=batch.tokens[row : row + 1],
            targets=batch.targets[row : row + 1],
            ar_weights=batch.ar_weights[row : row + 1],
            is_supervised=batch.is_supervised[row : row + 1],
            is_counted=batch.is_counted[row : row + 1],
            diffusion_weights=None if batch.diffusion_weights is None else batch.diffusion_weights[row : row + 1],
            mask_ratios=batch.mask_ratios,
            sequence_ratios=batch.sequence_ratios,
        )
        own = by_hand(alone, losses[row : row + 1], is_correct[row : row + 1])
        per_sequence += own["ar_sum"] / own["ar_count"]
        per_sequence += alpha * own["diffusion_sum"] / max(own["num_masked"], 1)
    for normalization, total, divisor in (
        (TOKENS, weighted_sum, hand["num_clean"]),
        (CONTRIBUTING, weighted_sum, hand["ar_count"] + hand["num_masked"]),
        (SEQUENCE, per_sequence, 4),
    ):
        count = num_tokens(batch, normalization)
        assert count.dtype == torch.int32
        assert count.shape == ()
        assert count.item() == divisor
        reported = means(terms_of(batch, losses, is_correct, normalization, alpha), alpha)
        assert reported["loss"] == pytest.approx(total / divisor, rel=1e-13)
        assert reported["ar_loss"] == pytest.approx(hand["ar_sum"] / hand["num_clean"], rel=1e-13)
        if joint:
            assert reported["diffusion_loss"] == pytest.approx(hand["diffusion_sum"] / hand["num_clean"], rel=1e-13)
        else:
            assert reported["diffusion_loss"] is None
    if joint:
        literal = means(terms_of(batch, losses, is_correct), ALPHA)
        assert literal["ar_loss"] is not None
        assert literal["diffusion_loss"] is not None
        assert literal["loss"] == pytest.approx(literal["ar_loss"] + ALPHA * literal["diffusion_loss"], rel=1e-14)


def test_the_ar_term_can_be_left_out() -> None:
    batch, _, _ = make_batch(2)
    weights = row_weights(batch, TOKENS, 1.0, ar_loss_weight=0.0)
    assert batch.diffusion_weights is not None
    assert torch.equal(weights[:, :12], batch.diffusion_weights)
    assert not weights[:, 12:].any()


def test_an_ar_term_of_weight_zero_is_not_reported_as_zero() -> None:
    """Its rows never reach the head: nobody knows their loss."""
    batch, losses, is_correct = make_batch(2)
    terms = terms_of(batch, losses, is_correct)
    assert means(terms, ALPHA, ar_loss_weight=0.0)["ar_loss"] is None
    assert shares(terms, ar_loss_weight=0.0)["ar_accuracy"] is None
    assert means(terms, ALPHA)["ar_loss"] is not None
    assert shares(terms)["ar_accuracy"] is not None


def test_a_sequence_without_supervision_counts_for_nothing() -> None:
    batch, _, _ = make_batch(3)
    batch.is_supervised[1] = batch.is_counted[1] = False
    batch.ar_weights[1] = 0
    assert num_tokens(batch, SEQUENCE).item() == 2
    assert torch.isfinite(row_weights(batch, SEQUENCE, ALPHA)).all()
    terms = terms_of(batch, torch.ones(batch.tokens.shape), torch.ones(batch.tokens.shape, dtype=torch.bool), SEQUENCE)
    assert terms.num_sequences == 2  # of those over which the masked share spreads


def test_global_averaging_does_not_depend_on_the_split_into_micro_batches() -> None:
    """One sequence nearly clean (few, heavy tokens), one nearly all masked: averages of averages would differ."""
    tokens = torch.arange(1000, 1024).reshape(2, 12)
    labels, loss_mask = tokens + 1, torch.ones(2, 12)
    is_masked = torch.zeros(2, 12, dtype=torch.bool)
    is_masked[0, 5] = True
    is_masked[1, :11] = True
    p_mask = torch.tensor([[0.05], [0.9]], dtype=torch.float64)
    losses = torch.rand(2, 24, generator=torch.Generator().manual_seed(1)) * 9
    places = torch.arange(12).repeat(2, 1)

    def batch_of(rows: slice) -> JointBatch:
        part = Corruption(
            noisy_tokens=torch.where(is_masked, MASK, tokens)[rows],
            places=places[rows],
            blocks=places[rows] // 4,
            weights=(is_masked / p_mask)[rows],
            mask_ratios=p_mask.float().expand(2, 12)[rows],
            sequence_ratios=p_mask[rows, 0],
        )
        return build_joint_batch(tokens[rows], labels[rows], loss_mask[rows], part, block_size=4)

    def reported(rows: slice, normalization: str) -> LossTerms:
        return terms_of(batch_of(rows), losses[rows], losses[rows] > 5, normalization)

    for normalization in NORMALIZATIONS:
        whole = reported(slice(0, 2), normalization)
        parts = [reported(slice(i, i + 1), normalization) for i in range(2)]
        assert means(parts[0] + parts[1], ALPHA) == pytest.approx(means(whole, ALPHA))
        split = sum(num_tokens(batch_of(slice(i, i + 1)), normalization).item() for i in range(2))
        assert num_tokens(batch_of(slice(0, 2)), normalization).item() == split
        averaged = sum(means(part, ALPHA)["loss"] or 0.0 for part in parts) / 2
        together = means(whole, ALPHA)["loss"] or 0.0
        if normalization == CONTRIBUTING:
            assert abs(averaged - together) > 0.1 * together
        if normalization == SEQUENCE:
            assert averaged == pytest.approx(together)


def test_validation_of_an_ar_stage_reports_the_diffusion_loss() -> None:
    batch, losses, is_correct = make_batch(3)
    reported = means(terms_of(batch, losses, is_correct, alpha=0.0), 0.0)
    assert reported["loss"] == pytest.approx(reported["ar_loss"], rel=1e-14)
    assert reported["diffusion_loss"] is not None
    assert reported["diffusion_loss"] > 0


def test_a_joint_step_that_masked_nothing_reports_zero() -> None:
    batch, losses, is_correct = make_batch(2)
    assert batch.diffusion_weights is not None
    batch.diffusion_weights.zero_()
    assert means(terms_of(batch, losses, is_correct), ALPHA)["diffusion_loss"] == 0.0


def test_unknown_normalization_and_empty_batch_are_refused() -> None:
    batch, _, _ = make_batch(2)
    for call in (num_tokens, lambda batch, name: row_weights(batch, name, ALPHA)):
        with pytest.raises(ValueError, match=r"'sequences'.*tokens, contributing, sequence"):
            call(batch, "sequences")
    with pytest.raises(DataError, match="0 supervised tokens"):
        means(LossTerms.zeros(), ALPHA)
