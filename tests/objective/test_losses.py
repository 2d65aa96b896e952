"""Sums, counts and the one division, against loops over tokens."""

import pytest
import torch

from nld_train.errors import DataError
from nld_train.objective.losses import LossTerms, loss_terms
from nld_train.objective.noise import Corruption, NoiseSpec, corrupt
from nld_train.objective.normalize import CONTRIBUTING, TOKENS, means, num_tokens
from nld_train.objective.sequence import JointBatch, build_joint_batch

ALPHA = 0.3
SPEC = NoiseSpec(mask_token_id=100, eps=1e-3, seed=3)


def make_batch(num_sequences: int, *, joint: bool = True, first_position: int = 0) -> tuple[JointBatch, torch.Tensor]:
    """A batch with some unsupervised rows, and a cross-entropy for each of its rows."""
    generator = torch.Generator().manual_seed(first_position)
    stream = torch.randint(1000, 2000, (num_sequences, 13), generator=generator)
    tokens, labels = stream[:, :-1], stream[:, 1:]
    loss_mask = (torch.rand(tokens.shape, generator=generator) < 0.8).float()
    positions = torch.arange(first_position, first_position + num_sequences)
    corruption = corrupt(tokens, positions, SPEC) if joint else None
    batch = build_joint_batch(tokens, labels, loss_mask, corruption, block_size=4)
    return batch, torch.rand(batch.tokens.shape, generator=generator) * 9


def by_hand(batch: JointBatch, token_losses: torch.Tensor) -> dict[str, float]:
    terms = dict.fromkeys(["ar_sum", "ar_count", "diffusion_sum", "num_masked", "num_clean"], 0.0)
    length = batch.layout.clean_length
    first_clean = batch.layout.num_rows - length
    for sequence in range(batch.tokens.shape[0]):
        for position in range(length):
            if batch.ar_weights[sequence, position] > 0:
                terms["ar_sum"] += token_losses[sequence, first_clean + position].item()
                terms["ar_count"] += 1
                terms["num_clean"] += 1
            if batch.diffusion_weights is not None and batch.tokens[sequence, position] == SPEC.mask_token_id:
                weight = batch.diffusion_weights[sequence, position].item()
                terms["diffusion_sum"] += weight * token_losses[sequence, position].item()
                terms["num_masked"] += 1
    return terms


@pytest.mark.parametrize("joint", [True, False])
def test_terms_are_the_sums_over_tokens(joint: bool):
    batch, token_losses = make_batch(5, joint=joint)
    terms = loss_terms(token_losses.requires_grad_(), batch)
    for name, expected in by_hand(batch, token_losses.detach()).items():
        value = getattr(terms, name)
        assert value.dtype == torch.float64
        assert not value.requires_grad
        assert value.shape == ()
        assert value.item() == pytest.approx(expected, rel=1e-13), name
    assert (terms.num_masked > 0) == joint


def test_terms_add_up_over_micro_batches_and_travel_as_a_vector():
    parts = [make_batch(2, first_position=position) for position in (0, 2, 4)]
    total = LossTerms.zeros()
    for batch, token_losses in parts:
        total = total + loss_terms(token_losses, batch)
    expected = [by_hand(batch, token_losses) for batch, token_losses in parts]
    for name in expected[0]:
        assert getattr(total, name).item() == pytest.approx(sum(part[name] for part in expected), rel=1e-13), name
    vector = total.to_vector()
    assert vector.dtype == torch.float64
    again = LossTerms.from_vector(vector)
    for name in expected[0]:
        assert getattr(again, name).item() == getattr(total, name).item(), name


def test_vector_and_losses_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"torch\.float32"):
        LossTerms.from_vector(torch.zeros(5))
    with pytest.raises(ValueError, match="4"):
        LossTerms.from_vector(torch.zeros(4, dtype=torch.float64))
    batch, token_losses = make_batch(2)
    with pytest.raises(ValueError, match=r"\[2, 23\].*\[2, 24\]"):
        loss_terms(token_losses[:, 1:], batch)


@pytest.mark.parametrize("joint", [True, False])
def test_num_tokens_and_means_of_each_normalization(joint: bool):
    batch, token_losses = make_batch(4, joint=joint)
    hand = by_hand(batch, token_losses)
    terms, alpha = loss_terms(token_losses, batch), ALPHA if joint else 0.0
    weighted_sum = hand["ar_sum"] + alpha * hand["diffusion_sum"]
    for normalization, divisor in (
        (TOKENS, hand["num_clean"]),
        (CONTRIBUTING, hand["ar_count"] + hand["num_masked"]),
    ):
        count = num_tokens(batch, normalization)
        assert count.dtype == torch.int32
        assert count.shape == ()
        assert count.item() == divisor
        reported = means(terms, normalization, alpha)
        assert reported["loss"] == pytest.approx(weighted_sum / divisor, rel=1e-13)
        assert reported["ar_loss"] == pytest.approx(hand["ar_sum"] / hand["num_clean"], rel=1e-13)
        if joint:
            assert reported["diffusion_loss"] == pytest.approx(hand["diffusion_sum"] / hand["num_clean"], rel=1e-13)
        else:
            assert reported["diffusion_loss"] is None
    if joint:
        literal = means(terms, TOKENS, alpha)
        assert literal["ar_loss"] is not None
        assert literal["diffusion_loss"] is not None
        assert literal["loss"] == literal["ar_loss"] + alpha * literal["diffusion_loss"]


def test_the_reported_loss_is_what_the_weighted_rows_sum_to():
    """The head sums losses times row_weights; its sum over num_tokens must be the reported loss."""
    batch, token_losses = make_batch(4)
    for normalization in (TOKENS, CONTRIBUTING):
        trained = (token_losses.double() * batch.row_weights(ALPHA)).sum() / num_tokens(batch, normalization)
        reported = means(loss_terms(token_losses, batch), normalization, ALPHA)["loss"]
        assert reported == pytest.approx(trained.item(), rel=1e-13)


def test_global_averaging_does_not_depend_on_the_split_into_micro_batches():
    """One sequence nearly clean (few, heavy tokens), one nearly all masked: averages of averages would differ."""
    tokens = torch.arange(1000, 1024).reshape(2, 12)
    labels, loss_mask = tokens + 1, torch.ones(2, 12)
    is_noised = torch.zeros(2, 12, dtype=torch.bool)
    is_noised[0, 5] = True
    is_noised[1, :11] = True
    p_mask = torch.tensor([[0.05], [0.9]], dtype=torch.float64).expand(2, 12).contiguous()
    losses = torch.rand(2, 24, generator=torch.Generator().manual_seed(1)) * 9

    def batch_of(rows: slice) -> JointBatch:
        part = Corruption(torch.where(is_noised, 100, tokens)[rows], is_noised[rows], p_mask[rows])
        return build_joint_batch(tokens[rows], labels[rows], loss_mask[rows], part, block_size=4)

    whole = loss_terms(losses, batch_of(slice(0, 2)))
    parts = [loss_terms(losses[i : i + 1], batch_of(slice(i, i + 1))) for i in range(2)]
    for normalization in (TOKENS, CONTRIBUTING):
        assert means(parts[0] + parts[1], normalization, ALPHA) == pytest.approx(means(whole, normalization, ALPHA))
        split = sum(num_tokens(batch_of(slice(i, i + 1)), normalization).item() for i in range(2))
        assert num_tokens(batch_of(slice(0, 2)), normalization).item() == split
    averaged = [means(part, CONTRIBUTING, ALPHA)["loss"] or 0.0 for part in parts]
    together = means(whole, CONTRIBUTING, ALPHA)["loss"] or 0.0
    assert abs(sum(averaged) / 2 - together) > 0.1 * together


def test_validation_of_an_ar_stage_reports_the_diffusion_loss():
    batch, token_losses = make_batch(3)
    reported = means(loss_terms(token_losses, batch), TOKENS, 0.0)
    assert reported["loss"] == reported["ar_loss"]
    assert reported["diffusion_loss"] is not None
    assert reported["diffusion_loss"] > 0


def test_a_joint_step_that_masked_nothing_reports_zero():
    batch, token_losses = make_batch(2)
    assert batch.diffusion_weights is not None
    batch.diffusion_weights.zero_()
    assert means(loss_terms(token_losses, batch), TOKENS, ALPHA)["diffusion_loss"] == 0.0


def test_unknown_normalization_and_empty_batch_are_refused():
    batch, token_losses = make_batch(2)
    with pytest.raises(ValueError, match=r"'sequences'.*'tokens'.*'contributing'"):
        num_tokens(batch, "sequences")
    with pytest.raises(ValueError, match="'sequences'"):
        means(loss_terms(token_losses, batch), "sequences", ALPHA)
    with pytest.raises(DataError, match="0 supervised tokens"):
        means(LossTerms.zeros(), TOKENS, ALPHA)
