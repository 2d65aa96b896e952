"""The only place that divides.

Losses are sums over the *global* batch, divided once: Megatron adds up :func:`num_tokens` over micro-batches and ranks
and divides the gradients by it; :func:`means` divides the reported sums by the same number. Averaging per micro-batch
or per sequence first would give other weights to tokens of sequences with few masks.
"""

import torch
from torch import Tensor

from nld_train.errors import DataError
from nld_train.objective.losses import LossTerms, count_ar_tokens, count_clean_tokens, count_masked_tokens
from nld_train.objective.sequence import JointBatch

TOKENS = "tokens"
"""Both terms by the number of supervised clean tokens (technical report, Eq. 5)."""
CONTRIBUTING = "contributing"
"""Both terms by the number of AR tokens plus the number of masked tokens (public Megatron recipe)."""


def num_tokens(batch: JointBatch, normalization: str) -> Tensor:
    """int32 scalar on the batch's device: what this micro-batch adds to the one divisor of the global batch.

    int32 because Megatron accumulates it in an int32 tensor. ``contributing`` without a noisy half (alpha = 0) is the
    number of AR tokens.

    Args:
        batch: the micro-batch.
        normalization: :data:`TOKENS` or :data:`CONTRIBUTING`.
    """
    if normalization == TOKENS:
        count = count_clean_tokens(batch)
    elif normalization == CONTRIBUTING:
        count = count_ar_tokens(batch) + count_masked_tokens(batch)
    else:
        raise _unknown(normalization)
    return count.to(torch.int32)


def means(terms: LossTerms, normalization: str, diffusion_loss_weight: float) -> dict[str, float | None]:
    """Reported means, in nats per token, of terms already summed over micro-batches and ranks.

    ``ar_loss`` and ``diffusion_loss`` are sums divided by the number of supervised clean tokens under *both*
    normalizations, so that curves of runs can be laid over each other. ``diffusion_loss`` is None where alpha = 0 and
    nothing is masked (an AR step); validation of an AR stage has masked tokens and reports it.
    ``loss`` is the number whose gradient is followed: under ``tokens`` it is
    ``ar_loss + diffusion_loss_weight * diffusion_loss`` literally, under ``contributing`` the same weighted sum over
    AR tokens + masked tokens (so it is smaller than what the two means add up to).

    Args:
        terms: sums and counts of a global batch (or of a validation set).
        normalization: :data:`TOKENS` or :data:`CONTRIBUTING`.
        diffusion_loss_weight: alpha.

    Raises:
        DataError: no token is supervised.
    """
    ar_sum, ar_count, diffusion_sum, num_masked, num_clean = terms.to_vector().tolist()
    if num_clean == 0:
        raise DataError(
            "loss_mask", "0 supervised tokens in the whole batch, so its loss has no mean", "check the data's loss mask"
        )
    ar_loss = ar_sum / num_clean
    diffusion_loss = diffusion_sum / num_clean if diffusion_loss_weight or num_masked else None
    loss = ar_loss if diffusion_loss is None else ar_loss + diffusion_loss_weight * diffusion_loss
    if normalization == CONTRIBUTING:
        loss *= num_clean / (ar_count + num_masked)
    elif normalization != TOKENS:
        raise _unknown(normalization)
    return {"loss": loss, "ar_loss": ar_loss, "diffusion_loss": diffusion_loss}


def _unknown(normalization: str) -> ValueError:
    return ValueError(f"normalization {normalization!r} is neither {TOKENS!r} nor {CONTRIBUTING!r}")
