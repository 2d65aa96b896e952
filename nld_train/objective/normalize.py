"""The only place that divides.

Losses are sums over the *global* batch, divided once: Megatron adds up :func:`num_tokens` over micro-batches and ranks
and divides the gradients by it; :func:`means` divides the reported sums by the same number. Averaging per micro-batch
or per sequence first would give other weights to tokens of sequences with few masks.
"""

import torch
from torch import Tensor

from nld_train.errors import DataError
from nld_train.objective.losses import (
    NUM_BUCKETS,
    LossTerms,
    count_ar_tokens,
    count_clean_tokens,
    count_masked_tokens,
)
from nld_train.objective.sequence import JointBatch

TOKENS = "tokens"
"""Both terms by the number of supervised clean tokens (technical report, Eq. 5)."""
CONTRIBUTING = "contributing"
"""Both terms by the number of AR tokens plus the number of masked tokens (public Megatron recipe)."""
SEQUENCE = "sequence"
"""Each sequence's AR sum by its AR tokens, its diffusion sum by its masked tokens, then the mean over sequences
(technical report, Eq. 4: what global averaging is compared with)."""


def row_weights(
    batch: JointBatch, normalization: str, diffusion_loss_weight: float, ar_loss_weight: float = 1.0
) -> Tensor:
    """float64 [B, S]: what each row's cross-entropy is multiplied by in the sum that :func:`num_tokens` divides.

    Args:
        batch: the micro-batch.
        normalization: :data:`TOKENS`, :data:`CONTRIBUTING` or :data:`SEQUENCE`.
        diffusion_loss_weight: alpha.
        ar_loss_weight: 1 in the recipe; 0 leaves the diffusion loss alone (ablations).
    """
    _check(normalization)
    ar_weights, diffusion_weights = batch.ar_weights, batch.diffusion_weights
    if normalization == SEQUENCE:
        ar_weights = ar_weights / ar_weights.count_nonzero(dim=1).clamp_min(1)[:, None]
        if diffusion_weights is not None:
            diffusion_weights = diffusion_weights / diffusion_weights.count_nonzero(dim=1).clamp_min(1)[:, None]
    if diffusion_weights is None:
        return ar_loss_weight * ar_weights
    return torch.cat([diffusion_loss_weight * diffusion_weights, ar_loss_weight * ar_weights], dim=1)


def num_tokens(batch: JointBatch, normalization: str) -> Tensor:
    """int32 scalar on the batch's device: what this micro-batch adds to the one divisor of the global batch.

    int32 because Megatron accumulates it in an int32 tensor. ``contributing`` without a noisy part (alpha = 0) is the
    number of AR tokens; ``sequence`` counts the sequences with a supervised token.
    """
    _check(normalization)
    if normalization == TOKENS:
        count = count_clean_tokens(batch)
    elif normalization == CONTRIBUTING:
        count = count_ar_tokens(batch) + count_masked_tokens(batch)
    else:
        count = batch.is_counted.sum()
    return count.to(torch.int32)


def means(terms: LossTerms, diffusion_loss_weight: float, ar_loss_weight: float = 1.0) -> dict[str, float | None]:
    """Reported means, in nats per token, of terms already summed over micro-batches and ranks.

    ``ar_loss`` and ``diffusion_loss`` are sums divided by the number of supervised clean tokens under *every*
    normalization, so that curves of runs can be laid over each other. ``diffusion_loss`` is None where alpha = 0 and
    nothing is masked (an AR step); validation of an AR stage has masked tokens and reports it. ``ar_loss`` is None
    where its weight is 0: rows without weight never reach the head. ``loss`` is the number whose gradient is followed:
    under ``tokens`` it is ``ar_loss_weight * ar_loss + diffusion_loss_weight * diffusion_loss`` literally.

    Args:
        terms: sums and counts of a global batch (or of a validation set).
        diffusion_loss_weight: alpha.
        ar_loss_weight: as in :func:`row_weights`.

    Raises:
        DataError: no token is supervised.
    """
    num_clean = terms.num_clean.item()
    if num_clean == 0:
        raise DataError(
            "loss_mask", "0 supervised tokens in the whole batch, so its loss has no mean", "check the data's loss mask"
        )
    has_diffusion = bool(diffusion_loss_weight) or terms.num_masked.item() > 0
    return {
        "loss": (terms.loss_sum / terms.divisor.clamp_min(1)).item(),
        "ar_loss": terms.ar_sum.item() / num_clean if ar_loss_weight else None,
        "diffusion_loss": terms.diffusion_sum.item() / num_clean if has_diffusion else None,
    }


def shares(terms: LossTerms, ar_loss_weight: float = 1.0) -> dict[str, float | None]:
    """Further metrics of the same terms; None where nothing was counted (of the AR loss: where its weight is 0).

    ``ar_accuracy`` and ``diffusion_accuracy``: share of supervised (masked) tokens that are the most probable one.
    ``masked_share``: masked tokens by supervised clean tokens. ``mask_ratio_std``: standard deviation over the
    sequences of the global batch of the masked share of their noised tokens, the spread of noise levels in one step.
    ``largest_weight``: the largest weight of a masked token. ``diffusion_loss_at_X`` and ``diffusion_accuracy_at_X``:
    mean unweighted cross-entropy and accuracy of masked tokens whose block is masked to at most X percent (and more
    than X - 10).
    """

    def ratio(total: float, count: float) -> float | None:
        return total / count if count else None

    ar_count, num_masked = terms.ar_count.item(), terms.num_masked.item()
    values = {"ar_accuracy": ratio(terms.ar_correct.item(), ar_count) if ar_loss_weight else None}
    if not num_masked:
        return values
    num_sequences = terms.num_sequences.item()
    mean_ratio = terms.ratio_sum.item() / num_sequences
    variance = max(0.0, terms.ratio_square_sum.item() / num_sequences - mean_ratio**2)
    values |= {
        "diffusion_accuracy": ratio(terms.bucket_correct.sum().item(), num_masked),
        "masked_share": ratio(num_masked, terms.num_clean.item()),
        "mask_ratio_std": variance**0.5,
        "largest_weight": terms.largest_weight.item(),
    }
    columns = zip(terms.bucket_sum.tolist(), terms.bucket_correct.tolist(), terms.bucket_count.tolist(), strict=True)
    for number, (loss, correct, count) in enumerate(columns, start=1):
        percent = 100 * number // NUM_BUCKETS
        values[f"diffusion_loss_at_{percent}"] = ratio(loss, count)
        values[f"diffusion_accuracy_at_{percent}"] = ratio(correct, count)
    return values


def _check(normalization: str) -> None:
    known = (TOKENS, CONTRIBUTING, SEQUENCE)
    if normalization not in known:
        raise ValueError(f"normalization {normalization!r} is none of {', '.join(known)}")
