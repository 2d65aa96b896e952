"""Sums and counts of the two losses. Nothing here divides: see :mod:`nld_train.objective.normalize`.

Dimensions: B sequences, L clean tokens per sequence, N noisy rows, S = N + L rows of the model's input.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from nld_train.objective.sequence import JointBatch

NUM_BUCKETS = 10
"""Masked tokens are also summed by the masked share of their block: (0, 0.1], (0.1, 0.2] ... (0.9, 1]."""


@dataclass(slots=True)
class LossTerms:
    """What one micro-batch, or any sum of them, contributes to the losses and metrics.

    All are detached float64 tensors on one device, scalars but for the three [10] of the buckets; counts are whole
    numbers, exact up to 2**53. Terms add up over micro-batches with ``+``, and over ranks as the vector of
    :meth:`to_vector`; only ``largest_weight`` is a maximum, which the vector leaves out.

    Args:
        loss_sum: sum of row weight x cross-entropy in nats: the number whose gradient is computed.
        divisor: what Megatron divides it by.
        ar_sum: cross-entropy in nats, summed over supervised clean rows.
        ar_count: clean rows that carry an AR loss.
        ar_correct: of those, the rows whose most probable token is the next one.
        diffusion_sum: cross-entropy in nats x the estimator's weight, over masked tokens (alpha is not included).
        num_masked: masked tokens that carry a diffusion loss.
        num_clean: supervised clean tokens, N of the technical report's Eq. 5.
        ratio_sum: masked share of a sequence's noised tokens, summed over sequences.
        ratio_square_sum: the same squared.
        num_sequences: sequences that have supervised tokens, so that some could be masked.
        bucket_sum: cross-entropy of masked tokens, unweighted.
        bucket_correct: masked tokens whose most probable token is the clean one.
        bucket_count: masked tokens.
        largest_weight: the largest diffusion weight.
    """

    loss_sum: Tensor
    divisor: Tensor
    ar_sum: Tensor
    ar_count: Tensor
    ar_correct: Tensor
    diffusion_sum: Tensor
    num_masked: Tensor
    num_clean: Tensor
    ratio_sum: Tensor
    ratio_square_sum: Tensor
    num_sequences: Tensor
    bucket_sum: Tensor
    bucket_correct: Tensor
    bucket_count: Tensor
    largest_weight: Tensor

    @classmethod
    def zeros(cls, device: torch.device | str = "cpu") -> "LossTerms":
        """The neutral element of ``+``."""
        vector = torch.zeros(sum(_WIDTHS), dtype=torch.float64, device=device)
        return cls.from_vector(vector, vector.new_zeros(()))

    @classmethod
    def from_vector(cls, vector: Tensor, largest_weight: Tensor) -> "LossTerms":
        """Inverse of :meth:`to_vector`."""
        if vector.dtype != torch.float64 or vector.shape != (sum(_WIDTHS),):
            raise ValueError(f"expected float64 [{sum(_WIDTHS)}], got {vector.dtype} {list(vector.shape)}")
        parts = (part if len(part) > 1 else part[0] for part in vector.split(_WIDTHS))
        return cls(**dict(zip(_SUMS, parts, strict=True)), largest_weight=largest_weight)

    def to_vector(self) -> Tensor:
        """float64 [41]: every sum, in the order of the fields, for one all-reduce."""
        return torch.cat([getattr(self, name).reshape(-1) for name in _SUMS])

    def __add__(self, other: "LossTerms") -> "LossTerms":
        return LossTerms.from_vector(
            self.to_vector() + other.to_vector(), torch.maximum(self.largest_weight, other.largest_weight)
        )


_SUMS = [item.name for item in fields(LossTerms) if item.name != "largest_weight"]
_WIDTHS = [NUM_BUCKETS if name.startswith("bucket_") else 1 for name in _SUMS]


@torch.no_grad()
def loss_terms(
    token_losses: Tensor, is_correct: Tensor, batch: JointBatch, *, loss_sum: Tensor, divisor: Tensor
) -> LossTerms:
    """Sum one micro-batch by kind.

    Args:
        token_losses: float [B, S], each row's cross-entropy in nats, unweighted; a row of weight zero may hold any
            finite number.
        is_correct: bool [B, S], the row's most probable token is its target; rows of weight zero may hold anything.
        batch: the micro-batch that the losses belong to.
        loss_sum: float scalar, sum of row weight x cross-entropy.
        divisor: integer scalar, from :func:`nld_train.objective.normalize.num_tokens`.
    """
    for name, tensor in (("token_losses", token_losses), ("is_correct", is_correct)):
        if tensor.shape != batch.tokens.shape:
            raise ValueError(
                f"{name} {list(tensor.shape)} must have the shape of batch.tokens {list(batch.tokens.shape)}"
            )
    num_noisy = batch.layout.num_noisy_rows
    losses = token_losses.to(torch.float64)
    terms = LossTerms.zeros(losses.device)
    terms.loss_sum, terms.divisor = loss_sum.to(torch.float64), divisor.to(torch.float64)
    terms.ar_sum = (losses[:, num_noisy:] * batch.ar_weights).sum()
    terms.ar_count = count_ar_tokens(batch).to(torch.float64)
    terms.ar_correct = (is_correct[:, num_noisy:] & (batch.ar_weights != 0)).sum().to(torch.float64)
    terms.num_clean = count_clean_tokens(batch).to(torch.float64)
    if not num_noisy or batch.diffusion_weights is None or batch.mask_ratios is None or batch.sequence_ratios is None:
        return terms
    noisy_losses = losses[:, :num_noisy]
    is_masked = batch.diffusion_weights != 0
    terms.diffusion_sum = (noisy_losses * batch.diffusion_weights).sum()
    terms.num_masked = is_masked.sum().to(torch.float64)
    terms.largest_weight = batch.diffusion_weights.max()
    terms.ratio_sum = batch.sequence_ratios.sum()
    terms.ratio_square_sum = batch.sequence_ratios.square().sum()
    terms.num_sequences = batch.is_counted.sum().to(torch.float64)
    buckets = (batch.mask_ratios * NUM_BUCKETS).ceil().sub(1).clamp(0, NUM_BUCKETS - 1).to(torch.int64)
    counted = is_masked.to(torch.float64)
    for total, values in (
        (terms.bucket_sum, noisy_losses * counted),
        (terms.bucket_correct, is_correct[:, :num_noisy] * counted),
        (terms.bucket_count, counted),
    ):
        total.scatter_add_(0, buckets.reshape(-1), values.reshape(-1))
    return terms


def count_ar_tokens(batch: JointBatch) -> Tensor:
    """int64 scalar: clean rows with an AR loss."""
    return torch.count_nonzero(batch.ar_weights)


def count_masked_tokens(batch: JointBatch) -> Tensor:
    """int64 scalar: noisy rows with a diffusion loss; 0 without a noisy part."""
    if batch.diffusion_weights is None:
        return torch.zeros((), dtype=torch.int64, device=batch.ar_weights.device)
    return torch.count_nonzero(batch.diffusion_weights)


def count_clean_tokens(batch: JointBatch) -> Tensor:
    """int64 scalar: supervised clean tokens. The first token of a document is one, though no row predicts it."""
    return torch.count_nonzero(batch.is_supervised)
