"""Sums and counts of the two losses. Nothing here divides: see :mod:`nld_train.objective.normalize`.

Dimensions: B sequences, L clean tokens per sequence, S rows of the model's input (L, or 2L with a noisy half).
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from nld_train.objective.sequence import JointBatch


@dataclass(slots=True)
class LossTerms:
    """What one micro-batch, or any sum of them, contributes to the losses.

    All are detached float64 scalar tensors on one device; counts are whole numbers, exact up to 2**53. Terms add up
    over micro-batches with ``+`` and over ranks as the float64 vector of :meth:`to_vector`.

    Args:
        ar_sum: cross-entropy in nats, summed over supervised clean rows.
        ar_count: clean rows that carry an AR loss.
        diffusion_sum: cross-entropy in nats divided by p_mask, summed over masked tokens (alpha is not included).
        num_masked: masked tokens that carry a diffusion loss.
        num_clean: supervised clean tokens, N of the technical report's Eq. 5.
    """

    ar_sum: Tensor
    ar_count: Tensor
    diffusion_sum: Tensor
    num_masked: Tensor
    num_clean: Tensor

    @classmethod
    def zeros(cls, device: torch.device | str = "cpu") -> "LossTerms":
        """The neutral element of ``+``."""
        return cls.from_vector(torch.zeros(len(fields(cls)), dtype=torch.float64, device=device))

    @classmethod
    def from_vector(cls, vector: Tensor) -> "LossTerms":
        """Inverse of :meth:`to_vector`."""
        if vector.dtype != torch.float64 or vector.shape != (len(fields(cls)),):
            raise ValueError(f"expected float64 [{len(fields(cls))}], got {vector.dtype} {list(vector.shape)}")
        return cls(*vector.unbind())

    def to_vector(self) -> Tensor:
        """float64 [5] in the order of the fields, for one all-reduce."""
        return torch.stack([self.ar_sum, self.ar_count, self.diffusion_sum, self.num_masked, self.num_clean])

    def __add__(self, other: "LossTerms") -> "LossTerms":
        return LossTerms.from_vector(self.to_vector() + other.to_vector())


@torch.no_grad()
def loss_terms(token_losses: Tensor, batch: JointBatch) -> LossTerms:
    """Sum the cross-entropy of one micro-batch by kind.

    Args:
        token_losses: float [B, S], each row's cross-entropy in nats, unweighted; a row of weight zero may hold any
            finite number.
        batch: the micro-batch that the losses belong to.
    """
    if token_losses.shape != batch.tokens.shape:
        raise ValueError(
            f"token_losses {list(token_losses.shape)} must have the shape of batch.tokens {list(batch.tokens.shape)}"
        )
    length = batch.layout.clean_length
    losses = token_losses.to(torch.float64)
    zero = losses.new_zeros(())
    ar_sum = (losses[:, -length:] * batch.ar_weights).sum()
    diffusion_sum = zero
    if batch.diffusion_weights is not None:
        diffusion_sum = (losses[:, :length] * batch.diffusion_weights).sum()
    return LossTerms(
        ar_sum=ar_sum,
        ar_count=count_ar_tokens(batch).to(torch.float64),
        diffusion_sum=diffusion_sum,
        num_masked=count_masked_tokens(batch).to(torch.float64),
        num_clean=count_clean_tokens(batch).to(torch.float64),
    )


def count_ar_tokens(batch: JointBatch) -> Tensor:
    """int64 scalar: clean rows with an AR loss."""
    return torch.count_nonzero(batch.ar_weights)


def count_masked_tokens(batch: JointBatch) -> Tensor:
    """int64 scalar: noisy rows with a diffusion loss; 0 without a noisy half."""
    if batch.diffusion_weights is None:
        return torch.zeros((), dtype=torch.int64, device=batch.ar_weights.device)
    return torch.count_nonzero(batch.diffusion_weights)


def count_clean_tokens(batch: JointBatch) -> Tensor:
    """int64 scalar: supervised clean tokens.

    In a packed sequence every supervised token is the AR target of the row before it, so they are the rows with an AR
    loss.
    """
    return count_ar_tokens(batch)
