"""Block-masked attention on the CPU: only what the mask keeps, in chunks of rows that share a clean prefix.

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
from nld_train.model.cpu_kernels import Kernel, kernel_for
from nld_train.model.main_grad import sum_dtype
from nld_train.objective.masks import cached_by_layout
from nld_train.objective.sequence import SequenceLayout
from nld_train.platform.cpu import unredirected

JOINED_PREFIX = 1024
"""Clean tokens before a chunk that are taken in one call with the chunk's own rows; more are a call of their own, which
needs no mask, and a merge; unless the kernel takes all keys at once."""


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


def _chunk_rows(dtype: torch.dtype, group: int, clean_length: int, kernel: Kernel) -> int:
    """Noisy and clean rows that are taken at a time, of heads in groups of ``group``: as measured.

    torch's kernel takes its rows (these, times the group) in tiles of 32, from 192 rows of 64, from 768 of 256. Small
    tiles cost more in half precision; 768 rows are many more pairs where groups are small and sequences short. In fp32
    more rows only cost more pairs.
    """
    if kernel.takes_all_keys:
        return 256
    if dtype.itemsize > 2:
        return 128
    is_long = group > 2 or group * clean_length >= 2048
    return max(128, -(-(768 if is_long else 192) // group))


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two sets of keys from the attention over each; weights stay in the lse's dtype."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = torch.exp(lse_a - lse)[..., None], torch.exp(lse_b - lse)[..., None]
    return (out_a * weight_a + out_b * weight_b).to(out_a.dtype), lse


@dataclass(frozen=True, slots=True)
class _Call:
    """A chunk as the kernel takes it.

    ``number``: of the chunk in the plan. ``mask``: additive, [G / P * R, own keys] (or [n, 1, G / P * R, own keys]);
    for a kernel that takes all keys [1 or n, R, R], of the last R keys. ``first_key``: the first clean token that is
    taken with the chunk's own rows, ``chunk.document_start`` or ``chunk.start``. ``fold``: (n * K, P, G / P * R).
    ``rows``, ``noisy_keys``: its elements of the queries and of the noisy keys.
    """

    chunk: Chunk
    number: int
    mask: Tensor
    first_key: int
    fold: tuple[int, int, int]
    rows: slice
    noisy_keys: slice


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
    kernel: Kernel,
    num_threads: int,
) -> _Calls:
    plan = chunk_plan(layout, num_sequences, chunk_rows)
    group = num_heads // num_kv_heads
    # As few parts as give each thread a head, where that is wanted.
    wanted = [parts for parts in range(1, group + 1) if group % parts == 0]
    calls: list[_Call] = []
    for number, (chunk, allowed) in enumerate(zip(plan.chunks, plan.allowed, strict=True)):
        heads, num_rows = chunk.num_sequences * num_kv_heads, chunk.num_rows
        parts = next((x for x in wanted if x * heads >= (num_threads if kernel.splits_groups else 1)), group)
        is_joined = chunk.start - chunk.document_start <= joined_prefix
        first_key = chunk.document_start if is_joined else chunk.start
        is_shared = kernel.takes_all_keys  # by all that is folded into rows
        joined, num_folded = (0, 1) if is_shared else (chunk.start - first_key, group // parts)
        mask = _additive(allowed, joined, num_folded, kernel.mask_dtype(dtype))
        if not is_shared:
            mask = mask[0] if len(mask) == 1 else mask[:, None]
        first_row, first_noisy = chunk.first_row * num_heads, chunk.first_noisy_row * num_kv_heads
        calls.append(
            _Call(
                chunk=chunk,
                number=number,
                mask=mask,
                first_key=first_key,
                fold=(heads, parts, group // parts * num_rows),
                rows=slice(first_row, first_row + heads * group * num_rows),
                noisy_keys=slice(first_noisy, first_noisy + heads * chunk.num_noisy_rows),
            )
        )
    return _Calls(plan, sorted(calls, key=lambda call: -call.chunk.stop))


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
        kernel = kernel_for(query.dtype, layout.clean_length)
        chunk_rows = _chunk_rows(query.dtype, num_heads // key.shape[1], layout.clean_length, kernel)
        joined_prefix = layout.clean_length if kernel.takes_all_keys else JOINED_PREFIX
        shape = (num_heads, key.shape[1], query.dtype)
        all_calls = _calls(layout, num_sequences, chunk_rows, joined_prefix, *shape, kernel, torch.get_num_threads())
        plan = all_calls.plan
        rows = plan.queries.gather(query)
        keys, values = _Keys(plan, key), _Keys(plan, value)
        outs: list[Tensor] = []
        log_sums_exp: list[Tensor] = []
        for call in all_calls.calls:
            of_chunk = rows[call.rows].view(*call.fold, dim)
            out, log_sum_exp = kernel.forward(of_chunk, keys.own(call), values.own(call), call.mask, scale)
            if call.first_key > call.chunk.document_start:
                prefix = keys.prefix(call), values.prefix(call)
                out, log_sum_exp = _merge(out, log_sum_exp, *kernel.forward(of_chunk, *prefix, None, scale))
            outs.append(out.reshape(-1, dim))
            log_sums_exp.append(log_sum_exp.flatten())
        out = plan.queries.scatter(all_calls.in_order(outs), num_sequences, num_heads).permute(1, 2, 0, 3)
        results = () if kernel.takes_all_keys else (out, all_calls.in_order(log_sums_exp))
        ctx.save_for_backward(query, key, value, *results)
        ctx.calls, ctx.kernel, ctx.scale = all_calls, kernel, scale
        return out

    @staticmethod
    @once_differentiable
    @unredirected
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *results = ctx.saved_tensors
        all_calls, kernel, scale = ctx.calls, ctx.kernel, ctx.scale
        plan = all_calls.plan
        num_sequences, num_heads, _, dim = query.shape
        rows, grad_out_rows = plan.queries.gather(query), plan.queries.gather(grad_out, zero_padding=True)
        result_rows = [plan.queries.gather(results[0]), results[1]] if results else []
        keys, values = _Keys(plan, key), _Keys(plan, value)
        grad_keys, grad_values = _KeyGradients(keys), _KeyGradients(values)
        grad_rows: list[Tensor] = []
        for call in all_calls.calls:
            grad, of_chunk = (x[call.rows].view(*call.fold, dim) for x in (grad_out_rows, rows))
            of_results = [x[call.rows].view(*call.fold, *x.shape[1:]) for x in result_rows] or [None, None]
            own = keys.own(call), values.own(call)
            of_rows, of_keys, of_values = kernel.backward(grad, of_chunk, *own, *of_results, call.mask, scale)
            grad_keys.add_own(call, of_keys)
            grad_values.add_own(call, of_values)
            if call.first_key > call.chunk.document_start:
                prefix = keys.prefix(call), values.prefix(call)
                more_rows, of_keys, of_values = kernel.backward(grad, of_chunk, *prefix, *of_results, None, scale)
                of_rows = of_rows + more_rows
                grad_keys.add_prefix(call, of_keys)
                grad_values.add_prefix(call, of_values)
            grad_rows.append(of_rows.reshape(-1, dim))
        grad_query = plan.queries.scatter(all_calls.in_order(grad_rows), num_sequences, num_heads)
        return grad_query.permute(1, 2, 0, 3), grad_keys.total(), grad_values.total(), None, None


class _Keys:
    """Keys (or values) of all chunks, never repeated: a group's parts share them by a stride of 0.

    A chunk's keys are clean tokens up to its end and its noisy rows. So that they stand in one piece without a copy of
    the clean ones, the noisy rows are written over the tokens behind them: calls go from the last tokens to the first,
    and those that follow need only tokens before their own end.

    Args:
        x: [B, K, N + L, D].
    """

    def __init__(self, plan: ChunkPlan, x: Tensor) -> None:
        num_noisy = plan.noisy_keys.num_rows // len(x)
        clean = x[:, :, num_noisy:]
        num_sequences, self.num_heads, self.length, dim = clean.shape
        self.plan = plan
        self.noisy = plan.noisy_keys.gather(x[:, :, :num_noisy], zero_padding=True)
        room = max(chunk.num_noisy_rows for chunk in plan.chunks)
        self.tokens = x.new_empty(num_sequences, self.num_heads, self.length + room, dim)
        self.tokens[:, :, : self.length] = clean

    def own(self, call: _Call) -> Tensor:
        """[n * K, P, own keys, D]: clean tokens from ``call.first_key``, then the chunk's noisy rows. Once per call."""
        chunk, dim = call.chunk, self.tokens.shape[-1]
        noisy = self.noisy[call.noisy_keys].view(chunk.num_sequences, self.num_heads, chunk.num_noisy_rows, dim)
        if chunk.run is None:
            clean = self.tokens[:, :, call.first_key : chunk.stop].index_select(0, chunk.sequences)
            own = torch.cat([clean, noisy], dim=2)
        else:
            tokens, end = self.tokens[chunk.run], chunk.stop + chunk.num_noisy_rows
            tokens[:, :, chunk.stop : end] = noisy
            own = tokens[:, :, call.first_key : end]
        return own.flatten(0, 1)[:, None].expand(-1, call.fold[1], -1, -1)

    def prefix(self, call: _Call) -> Tensor:
        """[n * K, P, start - document_start, D]"""
        chunk = call.chunk
        clean = self.tokens[:, :, chunk.document_start : chunk.start]
        clean = clean.index_select(0, chunk.sequences) if chunk.run is None else clean[chunk.run]
        return clean.flatten(0, 1)[:, None].expand(-1, call.fold[1], -1, -1)


class _KeyGradients:
    """Sums of what the chunks give to each key. A clean key collects a term from its own and every later chunk of its
    document, at least in fp32; a noisy one has a term from its own chunk, in the dtype of the kernel."""

    def __init__(self, keys: _Keys) -> None:
        self.plan = keys.plan
        num_sequences, num_heads, _, dim = keys.tokens.shape
        dtype = sum_dtype(keys.tokens.dtype)
        self.clean = torch.zeros(num_sequences, num_heads, keys.length, dim, dtype=dtype)
        self.noisy = torch.empty_like(keys.noisy)

    def add_own(self, call: _Call, grad: Tensor) -> None:
        """``grad`` [n * K, P, own keys, D]."""
        total, chunk = self._over_parts(grad), call.chunk
        num_clean = chunk.stop - call.first_key
        if chunk.num_noisy_rows:
            noisy = total[:, num_clean:]
            self.noisy[call.noisy_keys].view(noisy.shape).copy_(noisy)
        self._add(chunk, slice(call.first_key, chunk.stop), total[:, :num_clean])

    def add_prefix(self, call: _Call, grad: Tensor) -> None:
        """``grad`` [n * K, P, start - document_start, D]."""
        self._add(call.chunk, slice(call.chunk.document_start, call.chunk.start), self._over_parts(grad))

    def _add(self, chunk: Chunk, tokens: slice, total: Tensor) -> None:
        total = total.unflatten(0, (chunk.num_sequences, -1))
        clean = self.clean[:, :, tokens]
        if chunk.run is None:
            clean.index_add_(0, chunk.sequences, total.to(clean.dtype))
        else:
            clean[chunk.run] += total

    def _over_parts(self, grad: Tensor) -> Tensor:
        """[n * K, P, keys, D] -> [n * K, keys, D]"""
        return grad.squeeze(1) if grad.shape[1] == 1 else grad.sum(1, dtype=self.clean.dtype)

    def total(self) -> Tensor:
        """[B, K, N + L, D] in Megatron's memory order."""
        num_sequences, num_heads, length, dim = self.clean.shape
        num_noisy = self.plan.noisy_keys.num_rows // num_sequences
        total = self.noisy.new_empty(num_noisy + length, num_sequences, num_heads, dim)
        if num_noisy:
            total[:num_noisy] = self.plan.noisy_keys.scatter(self.noisy, num_sequences, num_heads)
        total[num_noisy:] = self.clean.permute(2, 0, 1, 3)
        return total.permute(1, 2, 0, 3)
