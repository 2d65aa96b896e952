"""Block-masked attention on the CPU by torch's kernel: only what the mask keeps, in chunks of rows that share a clean
prefix.

Dimensions: B sequences, S rows of the model's input, L clean tokens, N noisy rows, H query heads, K key-value heads,
G = H / K query heads per key-value head, P parts that a group is taken in, D head dimension, R rows of a chunk, n
sequences that have a chunk alike.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nld_train.model.chunk_plan import Chunk, ChunkPlan, chunk_plan
from nld_train.model.main_grad import sum_dtype
from nld_train.objective.masks import cached_by_layout
from nld_train.objective.sequence import SequenceLayout
from nld_train.platform.cpu import unredirected

JOINED_PREFIX = 1024
"""Clean tokens before a chunk that are taken in one call with the chunk's own rows; more are a call of their own, which
needs no mask, and a merge."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def chunked_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout, softmax_scale: float | None = None
) -> Tensor:
    """[B, H, S, D]: only what the mask keeps, on the CPU.

    Rows are taken in chunks, those that stand for clean tokens [start, stop) together: noisy and clean ones. They share
    their keys: all of the clean prefix [0, start), and their own under a small block mask. A long prefix is attended to
    without a mask, and the two partial results are merged by their log-sum-exp. The G query heads of a key-value head
    are folded into rows, so keys and values are never repeated. Exact, in any of the kernel's dtypes.

    Sequences of the same documents have the same chunks, whatever their noisy rows (see
    :class:`~nld_train.model.chunk_plan.Chunk`); padding rows get 0 and no gradient.
    """
    if query.device.type != "cpu":
        raise ValueError(f"chunked_attention runs on the CPU, the query is on {query.device}")
    scale = 1.0 / math.sqrt(query.shape[-1]) if softmax_scale is None else softmax_scale
    return _ChunkedAttention.apply(query, key, value, layout, scale)


def _chunk_rows(dtype: torch.dtype, group: int, clean_length: int) -> int:
    """Noisy and clean rows that are taken at a time, of heads in groups of ``group``: as measured.

    torch's kernel takes its rows (these, times the group) in tiles of 32, from 192 rows of 64, from 768 of 256. Small
    tiles cost more in half precision; 768 rows are many more pairs where groups are small and sequences short. In fp32
    more rows only cost more pairs.
    """
    if dtype.itemsize > 2:
        return 128
    is_long = group > 2 or group * clean_length >= 2048
    return max(128, -(-(768 if is_long else 192) // group))


def _by_mask(mask: Tensor | None, *of_heads: Tensor) -> tuple[Tensor, ...]:
    """[n * K, P, ...] as [n, K * P, ...], where each of n masks is for K heads: torch repeats it without a copy."""
    if mask is None or mask.dim() == 2:
        return of_heads
    return tuple(x.unflatten(0, (len(mask), -1)).flatten(1, 2) for x in of_heads)


def _flash_of(rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of a chunk's rows to M keys; scores, softmax and sums are at least fp32.

    Args:
        rows: [n * K, P, G / P * R, D].
        keys, values: [n * K, P, M, D]; P may have a stride of 0.
        mask: additive, in the dtype of the rows: [G / P * R, M], or [n, 1, G / P * R, M], each for K heads in a row.

    Returns:
        Output [n * K, P, G / P * R, D] and log-sum-exp [n * K, P, G / P * R], at least fp32.
    """
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
    """Gradients of rows, keys and values, in their shapes (keys' and values' for each of the P parts), from that of
    the output. ``out`` and ``log_sum_exp`` may be those of more keys. Shapes and mask as in :func:`_flash_of`."""
    of_all = _by_mask(mask, grad, rows, keys, values, out, log_sum_exp)
    of_rows, of_keys, of_values = _flash_backward(*of_all, 0.0, False, attn_mask=mask, scale=scale)
    return of_rows.reshape(rows.shape), of_keys.reshape(keys.shape), of_values.reshape(values.shape)


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two sets of keys from the attention over each; weights stay in the lse's dtype."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = torch.exp(lse_a - lse)[..., None], torch.exp(lse_b - lse)[..., None]
    return (out_a * weight_a + out_b * weight_b).to(out_a.dtype), lse


@dataclass(frozen=True, slots=True)
class _Call:
    """A chunk as the kernel takes it.

    ``number``: of the chunk in the plan. ``mask``: additive, [G / P * R, own keys] (or [n, 1, G / P * R, own keys]).
    ``first_key``: the first clean token that is taken with the chunk's own rows, ``chunk.document_start`` or
    ``chunk.start``. ``fold``: (n * K, P, G / P * R). ``rows``, ``noisy_keys``: its elements of the queries and of the
    noisy keys. ``heads``: of the B * K, those of its sequences, as a slice where they stand together, else int64
    [n * K].
    """

    chunk: Chunk
    number: int
    mask: Tensor
    first_key: int
    fold: tuple[int, int, int]
    rows: slice
    noisy_keys: slice
    heads: slice | Tensor


@dataclass(frozen=True, slots=True)
class _Calls:
    """All chunks of a micro-batch, from the last clean tokens to the first (see :class:`_Keys`)."""

    plan: ChunkPlan
    calls: list[_Call]

    def in_order(self, results: list[Tensor]) -> Tensor:
        """Results of the calls, joined in the plan's order."""
        ordered: list[Tensor] = [results[0]] * len(results)
        for call, result in zip(self.calls, results, strict=True):
            ordered[call.number] = result
        return torch.cat(ordered)


@cached_by_layout
@torch.inference_mode(False)
def _calls(
    layout: SequenceLayout,
    num_sequences: int,
    chunk_rows: int,
    joined_prefix: int,
    num_heads: int,
    num_kv_heads: int,
    dtype: torch.dtype,
    num_threads: int,
) -> _Calls:
    plan = chunk_plan(layout, num_sequences, chunk_rows)
    group = num_heads // num_kv_heads
    divisors = [parts for parts in range(1, group + 1) if group % parts == 0]
    calls: list[_Call] = []
    for number, (chunk, allowed) in enumerate(zip(plan.chunks, plan.allowed, strict=True)):
        heads, num_rows = chunk.num_sequences * num_kv_heads, chunk.num_rows
        # The backward pass hands out heads to threads: as few parts as give each thread one.
        parts = next((x for x in divisors if x * heads >= num_threads), group)
        is_joined = chunk.start - chunk.document_start <= joined_prefix
        first_key = chunk.document_start if is_joined else chunk.start
        mask = _additive(allowed, chunk.start - first_key, group // parts, dtype)
        first_row, first_noisy = chunk.first_row * num_heads, chunk.first_noisy_row * num_kv_heads
        calls.append(
            _Call(
                chunk=chunk,
                number=number,
                mask=mask[0] if len(mask) == 1 else mask[:, None],
                first_key=first_key,
                fold=(heads, parts, group // parts * num_rows),
                rows=slice(first_row, first_row + heads * group * num_rows),
                noisy_keys=slice(first_noisy, first_noisy + heads * chunk.num_noisy_rows),
                heads=_of_sequences(chunk, num_kv_heads),
            )
        )
    return _Calls(plan, sorted(calls, key=lambda call: -call.chunk.stop))


def _of_sequences(chunk: Chunk, num_heads: int) -> slice | Tensor:
    """Of heads [B * num_heads], those of the chunk's sequences."""
    if chunk.run is not None:
        return slice(chunk.run.start * num_heads, chunk.run.stop * num_heads)
    return (chunk.sequences[:, None] * num_heads + torch.arange(num_heads)).flatten()


def _additive(allowed: Tensor, joined: int, num_folded: int, dtype: torch.dtype) -> Tensor:
    """[n, num_folded * R, joined + R] of bool [n, R, R]: 0 or -inf, once for each query head that is folded into rows,
    with a 0 for each of the joined tokens."""
    num_masks, num_rows, _ = allowed.shape
    mask = torch.zeros(num_masks, num_folded, num_rows, joined + num_rows, dtype=dtype)
    mask[..., joined:] = torch.where(allowed, mask.new_zeros(()), -math.inf)[:, None]
    return mask.flatten(1, 2)


class _ChunkedAttention(torch.autograd.Function):
    """Key-value heads of all sequences stand where the kernel has its batch: [n * K, P, G / P * R, D], so that the P
    parts of a group give every thread a head of its own.

    The backward pass gives the kernel of each part the *merged* output and log-sum-exp: its probabilities are then
    those of the whole row, and the partial gradients simply add up.
    """

    @staticmethod
    @unredirected
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout, scale: float) -> Tensor:
        num_sequences, num_heads, _, dim = query.shape
        chunk_rows = _chunk_rows(query.dtype, num_heads // key.shape[1], layout.clean_length)
        shape = (num_heads, key.shape[1], query.dtype)
        all_calls = _calls(layout, num_sequences, chunk_rows, JOINED_PREFIX, *shape, torch.get_num_threads())
        plan = all_calls.plan
        rows = plan.queries.gather(query)
        keys = _Keys(plan, key, value)
        outs: list[Tensor] = []
        log_sums_exp: list[Tensor] = []
        for call in all_calls.calls:
            of_chunk = rows[call.rows].view(*call.fold, dim)
            out, log_sum_exp = _flash_of(of_chunk, *keys.own(call), call.mask, scale)
            if call.first_key > call.chunk.document_start:
                of_prefix = _flash_of(of_chunk, *keys.prefix(call), None, scale)
                out, log_sum_exp = _merge(out, log_sum_exp, *of_prefix)
            outs.append(out.reshape(-1, dim))
            log_sums_exp.append(log_sum_exp.flatten())
        out = plan.queries.scatter(all_calls.in_order(outs), num_sequences, num_heads).permute(1, 2, 0, 3)
        ctx.save_for_backward(query, key, value, out, all_calls.in_order(log_sums_exp))
        ctx.calls, ctx.scale = all_calls, scale
        return out

    @staticmethod
    @once_differentiable
    @unredirected
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, log_sum_exp = ctx.saved_tensors
        all_calls, scale = ctx.calls, ctx.scale
        plan = all_calls.plan
        num_sequences, num_heads, _, dim = query.shape
        rows, grad_out_rows = plan.queries.gather(query), plan.queries.gather(grad_out, zero_padding=True)
        results = plan.queries.gather(out), log_sum_exp
        keys = _Keys(plan, key, value)
        grad_keys = _KeyGradients(keys)
        grad_rows: list[Tensor] = []
        for call in all_calls.calls:
            grad, of_chunk = (x[call.rows].view(*call.fold, dim) for x in (grad_out_rows, rows))
            of_out, of_sums = (x[call.rows].view(*call.fold, *x.shape[1:]) for x in results)
            of_rows, *of_keys = _flash_backward_of(grad, of_chunk, *keys.own(call), of_out, of_sums, call.mask, scale)
            grad_keys.add_own(call, of_keys)
            if call.first_key > call.chunk.document_start:
                more, *of_keys = _flash_backward_of(grad, of_chunk, *keys.prefix(call), of_out, of_sums, None, scale)
                of_rows = of_rows + more
                grad_keys.add_prefix(call, of_keys)
            grad_rows.append(of_rows.reshape(-1, dim))
        grad_query = plan.queries.scatter(all_calls.in_order(grad_rows), num_sequences, num_heads)
        return grad_query.permute(1, 2, 0, 3), *grad_keys.totals(), None, None


class _Keys:
    """Keys and values of all chunks, never repeated: a group's parts share them by a stride of 0.

    A chunk's keys are clean tokens up to its end and its noisy rows. So that they stand in one piece without a copy of
    the clean ones, the noisy rows are written over the tokens behind them: calls go from the last tokens to the first,
    and those that follow need only tokens before their own end.

    Args:
        key, value: [B, K, N + L, D].
    """

    def __init__(self, plan: ChunkPlan, key: Tensor, value: Tensor) -> None:
        self.num_sequences, self.num_heads, num_rows, dim = key.shape
        num_noisy = plan.noisy_keys.num_rows // self.num_sequences
        self.plan = plan
        self.length = num_rows - num_noisy
        both = (key, value)
        self.noisy = torch.stack([plan.noisy_keys.gather(x[:, :, :num_noisy], zero_padding=True) for x in both])
        room = max(chunk.num_noisy_rows for chunk in plan.chunks)
        tokens = key.new_empty(2, self.num_sequences, self.num_heads, self.length + room, dim)
        for of_tensor, x in zip(tokens, both, strict=True):
            of_tensor[:, :, : self.length] = x[:, :, num_noisy:]
        self.tokens = tokens.flatten(1, 2)  # [2, B * K, L and more, D]

    def own(self, call: _Call) -> tuple[Tensor, Tensor]:
        """Two of [n * K, P, own keys, D]: clean tokens from ``call.first_key``, then the chunk's noisy rows. Once for
        each call."""
        stop, num_noisy = call.chunk.stop, call.chunk.num_noisy_rows
        noisy = self.noisy[:, call.noisy_keys].view(2, call.fold[0], num_noisy, self.tokens.shape[-1])
        if isinstance(call.heads, Tensor):
            return self._of_parts(torch.cat([self._clean(call, call.first_key, stop), noisy], dim=2), call)
        self.tokens[:, call.heads, stop : stop + num_noisy] = noisy
        return self._of_parts(self._clean(call, call.first_key, stop + num_noisy), call)

    def prefix(self, call: _Call) -> tuple[Tensor, Tensor]:
        """Two of [n * K, P, start - document_start, D]"""
        return self._of_parts(self._clean(call, call.chunk.document_start, call.chunk.start), call)

    def _clean(self, call: _Call, first: int, last: int) -> Tensor:
        """[2, n * K, last - first, D]"""
        return self.tokens[:, call.heads, first:last]

    def _of_parts(self, both: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
        keys, values = both[:, :, None].expand(-1, -1, call.fold[1], -1, -1).unbind()
        return keys, values


class _KeyGradients:
    """Sums of what the chunks give to each key and value. A clean one collects a term from its own and every later
    chunk of its document, at least in fp32; a noisy one has a term from its own chunk, in the dtype of the kernel."""

    def __init__(self, keys: _Keys) -> None:
        self.keys = keys
        dtype = sum_dtype(keys.tokens.dtype)
        _, num_heads, _, dim = keys.tokens.shape
        self.clean = torch.zeros(2, num_heads, keys.length, dim, dtype=dtype)
        self.noisy = torch.empty_like(keys.noisy)

    def add_own(self, call: _Call, grads: list[Tensor]) -> None:
        """``grads``: two of [n * K, P, own keys, D]."""
        num_clean = call.chunk.stop - call.first_key
        for clean, noisy, grad in zip(self.clean, self.noisy, grads, strict=True):
            total = self._over_parts(grad)
            if call.chunk.num_noisy_rows:
                of_noisy = total[:, num_clean:]
                noisy[call.noisy_keys].view(of_noisy.shape).copy_(of_noisy)
            self._add(clean, call, slice(call.first_key, call.chunk.stop), total[:, :num_clean])

    def add_prefix(self, call: _Call, grads: list[Tensor]) -> None:
        """``grads``: two of [n * K, P, start - document_start, D]."""
        tokens = slice(call.chunk.document_start, call.chunk.start)
        for clean, grad in zip(self.clean, grads, strict=True):
            self._add(clean, call, tokens, self._over_parts(grad))

    def _add(self, clean: Tensor, call: _Call, tokens: slice, total: Tensor) -> None:
        """To [B * K, L, D]. (An assignment by ``+=`` would copy the sum onto itself.)"""
        if isinstance(call.heads, Tensor):
            clean[:, tokens].index_add_(0, call.heads, total.to(clean.dtype))
        else:
            clean[call.heads, tokens].add_(total)

    def _over_parts(self, grad: Tensor) -> Tensor:
        """[n * K, P, keys, D] -> [n * K, keys, D]"""
        return grad.squeeze(1) if grad.shape[1] == 1 else grad.sum(1, dtype=self.clean.dtype)

    def totals(self) -> tuple[Tensor, Tensor]:
        """Of keys and of values [B, K, N + L, D], each in Megatron's memory order."""
        of_keys, of_values = map(self._total, self.clean, self.noisy)
        return of_keys, of_values

    def _total(self, clean: Tensor, noisy: Tensor) -> Tensor:
        num_sequences, num_heads, length = self.keys.num_sequences, self.keys.num_heads, self.keys.length
        num_noisy = self.keys.plan.noisy_keys.num_rows // num_sequences
        total = noisy.new_empty(num_noisy + length, num_sequences, num_heads, noisy.shape[-1])
        if num_noisy:
            total[:num_noisy] = self.keys.plan.noisy_keys.scatter(noisy, num_sequences, num_heads)
        total[num_noisy:] = clean.unflatten(0, (num_sequences, num_heads)).permute(2, 0, 1, 3)
        return total.permute(1, 2, 0, 3)
