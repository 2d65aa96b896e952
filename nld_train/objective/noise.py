"""The noisy copy of a sequence: a pure function of (seed, place in the stream).

Nothing here is process state. Whoever knows the seed and a sample's place in the data stream gets the same mask, bit
for bit: a resumed run, a tensor-parallel peer, the first and the last pipeline stage, any data-parallel size. Samples
draw their own noise level t, so data-parallel ranks see different ratios in every step ("DP-rank varying mask
ratios", NLD technical report).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class NoiseSpec:
    """How tokens are chosen.

    Args:
        mask_token_id: id that replaces a chosen token.
        eps: smallest masking probability, p = (1 - eps) * t + eps.
        seed: of the run.
    """

    mask_token_id: int
    eps: float
    seed: int


@dataclass(slots=True)
class Corruption:
    """``noisy_tokens`` int64 [B, L] (x_t), ``is_noised`` bool [B, L], ``p_mask`` float64 [B, L] (chance of each)."""

    noisy_tokens: Tensor
    is_noised: Tensor
    p_mask: Tensor


def uniforms(seed: int, stream_position: int, count: int) -> np.ndarray:
    """``count`` float64 in [0, 1), a pure function of the arguments.

    Philox is counter-based, and its raw output is fixed by numpy's compatibility policy (the distributions are not),
    so the 53-bit fractions are built here.
    """
    raw = np.random.Philox(key=np.array([seed, stream_position], dtype=np.uint64)).random_raw(count)
    return (raw >> np.uint64(11)) * 2.0**-53


def corrupt(tokens: Tensor, stream_positions: Tensor, spec: NoiseSpec) -> Corruption:
    """Replace tokens by the mask token, as in the published recipe (sampler ``bernoulli``).

    One noise level t ~ U[0, 1) per sequence; every token is replaced with probability p = (1 - eps) * t + eps.

    Args:
        tokens: int64 [B, L], on the CPU.
        stream_positions: int64 [B], each sequence's place in the data stream.
        spec: see :class:`NoiseSpec`.
    """
    num_sequences, length = tokens.shape
    draws = torch.from_numpy(
        np.stack([uniforms(spec.seed, position, 1 + length) for position in stream_positions.tolist()])
    )
    p_mask = ((1.0 - spec.eps) * draws[:, :1] + spec.eps).expand(num_sequences, length)
    is_noised = draws[:, 1:] < p_mask
    noisy_tokens = torch.where(is_noised, spec.mask_token_id, tokens)
    return Corruption(noisy_tokens, is_noised, p_mask.contiguous())
