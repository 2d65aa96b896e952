"""Attention of a few rows to a few keys on the CPU, forward and backward, in two ways.

:data:`FLASH` is torch's kernel for any dtype. :data:`PRODUCTS` writes the scores out and leaves the work to matrix
products, which in bf16 are several times as fast as the kernel's small ones. Scores,
softmax and sums are fp32 in both; the second rounds probabilities to bf16 before they meet the values.

Dimensions: b sequences and key-value heads, P parts of a group of query heads, R rows, S keys, D head dimension.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from nld_train.platform.cpu import bf16_operands

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
            [b, 1, R, S] or None), scale -> output [b, P, R, D] and log-sum-exp [b, P, R], at least fp32.
        backward: gradient of the output, rows, keys, values, output, log-sum-exp, mask, scale, ``is_whole`` ->
            gradients of rows, keys and values. Output and log-sum-exp may be those of more keys than these; not so
            if ``is_whole``.
        mask_dtype: of the mask, for inputs of a dtype.
        splits_groups: the backward pass hands out heads to threads, so each thread wants one: P > 1 where b is small.
    """

    forward: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    mask_dtype: Callable[[torch.dtype], torch.dtype]
    splits_groups: bool


def kernel_for(dtype: torch.dtype, clean_length: int) -> Kernel:
    """The faster one. On long sequences products win nothing, their scores grow, and each chunk has a shape of its own,
    for which oneDNN keeps what it has compiled."""
    is_short = clean_length <= _LONGEST
    return PRODUCTS if dtype is torch.bfloat16 and is_short and has_fast_bf16_products() else FLASH


@cache
def has_fast_bf16_products() -> bool:
    """oneDNN has kernels for them: with AVX-512, also where it has no instruction for bf16."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _flash_of(rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    out, log_sum_exp = _flash(rows, keys, values, attn_mask=mask, scale=scale)
    return out, log_sum_exp


def _flash_backward_of(
    grad: Tensor,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    mask: Tensor | None,
    scale: float,
    is_whole: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    of_rows, of_keys, of_values = _flash_backward(
        grad, rows, keys, values, out, log_sum_exp, 0.0, False, attn_mask=mask, scale=scale
    )
    return of_rows, of_keys, of_values


def _scores(rows: Tensor, keys: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """fp32 [b, P, R, S] of fp32 rows and keys that hold bf16 values: no product is rounded."""
    scores = torch.matmul(rows, keys.mT)
    return scores.mul_(scale) if mask is None else torch.add(mask, scores, alpha=scale, out=scores)


def _parts(num_scores: int, b: int) -> Iterator[slice]:
    """Of the first dimension; ``num_scores`` for one of it."""
    step = max(1, _SCORES // num_scores)
    return (slice(start, start + step) for start in range(0, b, step))


def _of_mask(mask: Tensor | None, part: slice) -> Tensor | None:
    return mask if mask is None or mask.dim() == 2 else mask[part]


def _products(rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    out = rows.new_empty(rows.shape)
    log_sum_exp = torch.empty(rows.shape[:-1], dtype=torch.float32)
    with bf16_operands():
        for part in _parts(rows[0, ..., 0].numel() * keys.shape[2], len(rows)):
            scores = _scores(rows[part].float(), keys[part].float(), _of_mask(mask, part), scale)
            probabilities = torch.softmax(scores, dim=-1)
            # The largest is exp(0) over the sum.
            torch.sub(scores.amax(-1), probabilities.amax(-1).log_(), out=log_sum_exp[part])
            out[part] = torch.matmul(probabilities.to(rows.dtype), values[part])
    return out, log_sum_exp


def _products_backward(
    grad: Tensor,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    mask: Tensor | None,
    scale: float,
    is_whole: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """With probabilities p = exp(s - lse) and d = p (grad values^T - grad . out): see Dao et al., FlashAttention,
    section 3.1, appendix B.2 (arXiv 2205.14135)."""
    of_rows, of_keys, of_values = (x.new_empty(x.shape) for x in (rows, keys, values))
    with bf16_operands():
        for part in _parts(rows[0, ..., 0].numel() * keys.shape[2], len(rows)):
            q, k, v, g = (x[part] for x in (rows, keys, values, grad))
            scores = _scores(q.float(), k.float(), _of_mask(mask, part), scale)
            # The same, and softmax is faster than exp.
            p = torch.softmax(scores, dim=-1) if is_whole else scores.sub_(log_sum_exp[part, ..., None]).exp_()
            of_values[part] = torch.matmul(p.to(g.dtype).mT, g)
            g = g.float()
            shared = (g * out[part]).sum(-1, keepdim=True)
            d = torch.matmul(g, v.float().mT).sub_(shared).mul_(p.mul_(scale)).to(q.dtype)
            of_rows[part] = torch.matmul(d, k)
            of_keys[part] = torch.matmul(d.mT, q)
    return of_rows, of_keys, of_values


FLASH = Kernel(forward=_flash_of, backward=_flash_backward_of, mask_dtype=lambda dtype: dtype, splits_groups=True)
PRODUCTS = Kernel(
    forward=_products, backward=_products_backward, mask_dtype=lambda dtype: torch.float32, splits_groups=False
)
