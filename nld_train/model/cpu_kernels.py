"""Attention of a few rows to a few keys on the CPU, forward and backward, in two ways.

:data:`FLASH` is torch's kernel for any dtype. :data:`PRODUCTS` writes the scores out and leaves the work to matrix
products, which in bf16 are several times as fast as the kernel's small ones. Scores, softmax and sums are fp32 in both;
the second rounds probabilities to bf16 before they meet the values.

Dimensions: b sequences and key-value heads, P parts of a group of query heads, R rows, S keys, D head dimension.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from nld_train.platform.cpu import bf16_operands, cpu_info

_LONGEST = 2048
"""Clean tokens of a sequence up to which :data:`PRODUCTS` is taken."""

_SCORES = 1 << 21
"""Scores that exist at a time, unless one head has more: 8 MB, which stay in the caches."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One way to compute it.

    Args:
        forward: rows [b, P, R, D], keys and values [b, P, S, D] (P may have a stride of 0), additive mask ([R, S],
            [n, 1, R, S] for b / n heads in a row, or None), scale -> output [b, P, R, D] and log-sum-exp [b, P, R], at
            least fp32 (empty, of a kernel that takes all keys).
        backward: gradient of the output, rows, keys, values, output, log-sum-exp (both None if it takes all keys),
            mask, scale -> gradients of rows, keys and values. Output and log-sum-exp may be those of more keys.
        mask_dtype: of the mask, for inputs of a dtype.
        takes_all_keys: keys are always all that the rows see: nothing is merged, and the backward pass, which computes
            the softmax again, reads no result of the forward pass. P is 1. The mask [n, R / G, M] is of the last M
            keys (all others are seen), for b / n heads in a row and for each of G query heads folded into the rows.
        splits_groups: the backward pass hands out heads to threads, so each thread wants one: P > 1 where b is small.
    """

    forward: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    mask_dtype: Callable[[torch.dtype], torch.dtype]
    takes_all_keys: bool
    splits_groups: bool


def kernel_for(dtype: torch.dtype, clean_length: int) -> Kernel:
    """The faster one. On long sequences products win nothing, their scores grow, and each chunk has a shape of its own,
    for which oneDNN keeps what it has compiled."""
    is_short = clean_length <= _LONGEST
    return PRODUCTS if dtype is torch.bfloat16 and is_short and has_fast_bf16_products() else FLASH


@cache
def has_fast_bf16_products() -> bool:
    """oneDNN has kernels for them, and the processor multiplies bf16 several times as fast as fp32."""
    is_there = torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return is_there and multiplies_bf16_fast(cpu_info().flags)


def multiplies_bf16_fast(flags: frozenset[str]) -> bool:
    """Tile instructions (AMX), or bf16 instructions of full width.

    Zen 4 has the instruction at half width (2.2 times its fp32 rate, measured), and there torch's kernel is the faster
    one. What came after it, of AMD and of Intel, also has the VEX form of VNNI, which tells them apart.
    """
    return "amx_bf16" in flags or {"avx512_bf16", "avx_vnni"} <= flags


def _by_mask(mask: Tensor | None, *of_heads: Tensor) -> tuple[Tensor, ...]:
    """[b, P, ...] as [n, b / n * P, ...], where each mask is for b / n heads: torch repeats it without a copy."""
    if mask is None or mask.dim() == 2:
        return of_heads
    return tuple(x.unflatten(0, (len(mask), -1)).flatten(1, 2) for x in of_heads)


def _flash_of(rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    out, log_sum_exp = _flash(*_by_mask(mask, rows, keys, values), attn_mask=mask, scale=scale)
    return out.reshape(rows.shape), log_sum_exp.reshape(rows.shape[:-1])


def _flash_backward_of(
    grad: Tensor,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    of_all = _by_mask(mask, grad, rows, keys, values, out, log_sum_exp)
    of_rows, of_keys, of_values = _flash_backward(*of_all, 0.0, False, attn_mask=mask, scale=scale)
    return of_rows.reshape(rows.shape), of_keys.reshape(keys.shape), of_values.reshape(values.shape)


def _parts(rows: Tensor, keys: Tensor, mask: Tensor | None) -> Iterator[tuple[slice, Tensor | None]]:
    """Parts of the first dimension, and their masks: [1, R / G, M], or of each of the part's heads."""
    step = max(1, _SCORES // (rows.shape[1] * keys.shape[1]))
    for part in (slice(start, start + step) for start in range(0, len(rows), step)):
        of_part = mask
        if mask is not None and len(mask) > 1:
            of_part = mask[torch.arange(len(rows))[part] // (len(rows) // len(mask))]
        yield part, of_part


def _exact_factor(scale: float) -> float:
    """``scale`` if bf16 values can be multiplied by it without rounding, else 1."""
    return scale if math.frexp(scale)[0] == 0.5 else 1.0


def _probabilities(rows: Tensor, keys: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """fp32 [b, R, S] of bf16 rows [b, R, D] and keys [b, S, D]: no product and no score is rounded to bf16."""
    scores = torch.bmm(rows.float(), keys.float().mT)
    if scale != 1.0:
        scores.mul_(scale)
    if mask is not None:
        of_query_heads = scores.unflatten(1, (-1, mask.shape[1]))
        of_query_heads[..., scores.shape[-1] - mask.shape[-1] :].add_(mask[:, None])
    return torch.softmax(scores, dim=-1)


def _products(rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    rows, keys, values = (x.squeeze(1) for x in (rows, keys, values))
    factor = _exact_factor(scale)
    rows = rows * factor
    out = torch.empty_like(rows)
    with bf16_operands():
        for part, of_mask in _parts(rows, keys, mask):
            probabilities = _probabilities(rows[part], keys[part], of_mask, scale / factor).to(rows.dtype)
            torch.bmm(probabilities, values[part], out=out[part])
    return out[:, None], out.new_empty(0, dtype=torch.float32)


def _products_backward(
    grad: Tensor,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    _out: None,
    _log_sum_exp: None,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """With probabilities p, the gradient of the scores is p (dp - sum(p dp)), where dp = grad values^T."""
    grad, rows, keys, values = (x.squeeze(1) for x in (grad, rows, keys, values))
    factor = _exact_factor(scale)
    rows, scale = rows * factor, scale / factor
    of_rows, of_keys, of_values = (torch.empty_like(x) for x in (rows, keys, values))
    with bf16_operands():
        for part, of_mask in _parts(rows, keys, mask):
            q, k, g = rows[part], keys[part], grad[part]
            p = _probabilities(q, k, of_mask, scale)
            torch.bmm(p.to(g.dtype).mT, g, out=of_values[part])
            d = torch._softmax_backward_data(torch.bmm(g.float(), values[part].float().mT), p, -1, p.dtype)
            if scale != 1.0:
                d.mul_(scale)
            d = d.to(q.dtype)
            torch.bmm(d, k, out=of_rows[part])
            torch.bmm(d.mT, q, out=of_keys[part])
    return of_rows.mul_(factor)[:, None], of_keys[:, None], of_values[:, None]


FLASH = Kernel(
    forward=_flash_of,
    backward=_flash_backward_of,
    mask_dtype=lambda dtype: dtype,
    takes_all_keys=False,
    splits_groups=True,
)
PRODUCTS = Kernel(
    forward=_products,
    backward=_products_backward,
    mask_dtype=lambda dtype: torch.float32,
    takes_all_keys=True,
    splits_groups=False,
)
