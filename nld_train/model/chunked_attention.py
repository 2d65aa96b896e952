"""Block-masked attention on the CPU: only what the mask keeps, in chunks of rows that share a clean prefix.

Dimensions: B sequences, S rows of the model's input, L clean tokens, N noisy rows, H query heads, K key-value heads,
G = H / K query heads per key-value head, P parts that a group is taken in, D head dimension, R rows of a chunk, n
sequences that have a chunk alike.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nld_train.model.cpu_kernels import Kernel, kernel_for
from nld_train.objective.masks import cached_by_layout
from nld_train.objective.sequence import RowTable, SequenceLayout, row_table
from nld_train.platform.cpu import unredirected

JOINED_PREFIX = 1024
"""Clean tokens before a chunk that are taken in one call with the chunk's own rows; more are a call of their own, which
needs no mask, and a merge; unless the kernel takes all keys at once."""

_LARGEST_PADDING = 1.25
"""Rows of a sequence's part of a chunk, padding included, for one that is needed: at most."""

_PADDING_BLOCK = torch.iinfo(torch.int32).min  # no row's block


def chunked_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout, softmax_scale: float | None = None
) -> Tensor:
    """[B, H, S, D]: only what the mask keeps, on the CPU.

    Rows are taken in chunks, those that stand for clean tokens [start, stop) together: noisy and clean ones. They share
    their keys: all of the clean prefix [0, start), and their own under a small block mask. A long prefix is attended to
    without a mask, and the two partial results are merged by their log-sum-exp. The G query heads of a key-value head
    are folded into rows, so keys and values are never repeated. Exact, in any of the kernel's dtypes.

    Sequences of the same documents have the same chunks, whatever their noisy rows (see :class:`_Chunk`); padding rows
    get 0 and no gradient.
    """
    if query.device.type != "cpu":
        raise ValueError(f"chunked_attention runs on the CPU, the query is on {query.device}")
    scale = 1.0 / math.sqrt(query.shape[-1]) if softmax_scale is None else softmax_scale
    return _ChunkedAttention.apply(query, key, value, layout, scale)


def _chunk_rows(dtype: torch.dtype, group: int, kernel: Kernel) -> int:
    """Noisy and clean rows that are taken at a time, of heads in groups of ``group``: as measured.

    torch's kernel takes its rows (these, times the group) in tiles of 32, from 192 rows of 64, from 768 of 256. In half
    precision small tiles cost up to twice as much; in the others more rows only cost more pairs.
    """
    if kernel.takes_all_keys:
        return 256
    if dtype.itemsize > 2:
        return 160
    return max(192, -(-768 // group)) if group > 2 else 192


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two sets of keys from the attention over each; weights stay in the lse's dtype."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = torch.exp(lse_a - lse)[..., None], torch.exp(lse_b - lse)[..., None]
    return (out_a * weight_a + out_b * weight_b).to(out_a.dtype), lse


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Clean tokens [start, stop) and the noisy rows that stand for them, R rows together, of n sequences alike. Or, in
    a shard, one noisy block that begins at start = stop. Sequences with fewer noisy rows than others have padding.

    No noisy block goes on over an end of a chunk, and neither does a document over an inner one that it does not begin:
    either the whole chunk sees the clean prefix [document_start, start), or it begins with a document and sees none.

    ``sequences``: int64 [n], rising. ``first_row``: place of its rows (sequence by sequence, noisy rows, then clean
    ones) in the plan's order. ``joined``: tokens of the prefix that are taken with the chunk's own rows: all or none.
    """

    sequences: Tensor
    document_start: int
    start: int
    stop: int
    first_row: int
    num_noisy_rows: int
    joined: int

    @property
    def has_long_prefix(self) -> bool:
        return self.start - self.document_start > self.joined

    @property
    def num_rows(self) -> int:
        return self.num_noisy_rows + self.stop - self.start

    def of(self, elements: Tensor, num_heads: int, *shape: int) -> Tensor:
        """This chunk's n * num_heads * R elements of a tensor in the order of :meth:`_ChunkRows.elements`: a view."""
        first, last = self.first_row * num_heads, (self.first_row + len(self.sequences) * self.num_rows) * num_heads
        return elements[first:last].view(*shape, *elements.shape[1:])


@dataclass(frozen=True, slots=True)
class _ChunkRows:
    """Which rows of a tensor the chunks take, in which order.

    ``rows`` int64 [rows in chunks]: s * B + b, chunk by chunk; where there is padding, some row of the same sequence
    and chunk. ``is_padding`` bool [rows in chunks]; None: none is. ``num_rows``: S * B. ``others`` int64: the rows in
    no chunk.
    """

    chunks: list[_Chunk]
    rows: Tensor
    is_padding: Tensor | None
    num_rows: int
    others: Tensor
    _elements: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def elements(self, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """int64 [rows * num_heads]: element (s * B + b) * num_heads + head by (chunk, sequence, head, row); its
        inverse, int64 [S * B * num_heads], in which rows of no chunk have some element of the last one; and which of
        the first are padding."""
        if num_heads not in self._elements:
            heads = torch.arange(num_heads)[:, None]
            elements = self._of_heads(self.rows, lambda rows: rows * num_heads + heads)
            places = torch.arange(len(elements))
            padding = places[:0]
            inverse = torch.full((self.num_rows * num_heads,), len(elements) - 1)
            if self.is_padding is None:
                inverse.scatter_(0, elements, places)
            else:
                is_padding = self._of_heads(self.is_padding, lambda rows: rows.expand(-1, num_heads, -1))
                padding, needed = is_padding.nonzero().squeeze(1), (~is_padding).nonzero().squeeze(1)
                inverse.scatter_(0, elements[needed], needed)
            self._elements[num_heads] = elements, inverse, padding
        return self._elements[num_heads]

    def _of_heads(self, x: Tensor, to_heads: Callable[[Tensor], Tensor]) -> Tensor:
        """``x`` [rows in chunks], each chunk's as [n, 1, R] through ``to_heads``, which gives [n, heads, R]."""
        of_chunks = x.split([len(chunk.sequences) * chunk.num_rows for chunk in self.chunks])
        return torch.cat([
            to_heads(rows.view(-1, 1, chunk.num_rows)).flatten()
            for chunk, rows in zip(self.chunks, of_chunks, strict=True)
        ])  # fmt: skip

    def gather(self, x: Tensor, *, is_gradient: bool = False) -> Tensor:
        """[rows * heads, D] of x [B, heads, S, D], in the order of :meth:`elements`; 0 on padding of a gradient."""
        elements, _, padding = self.elements(x.shape[1])
        gathered = x.permute(2, 0, 1, 3).flatten(0, 2).index_select(0, elements)
        return gathered.index_fill_(0, padding, 0.0) if is_gradient and len(padding) > 0 else gathered

    def scatter(self, elements: Tensor, like: Tensor) -> Tensor:
        """Inverse of :meth:`gather`, in Megatron's memory order; 0 on rows of no chunk."""
        num_sequences, num_heads, num_rows, dim = like.shape
        out = elements.index_select(0, self.elements(num_heads)[1]).view(self.num_rows, num_heads, dim)
        if self.others.numel() > 0:
            out.index_fill_(0, self.others, 0.0)
        return out.view(num_rows, num_sequences, num_heads, dim).permute(1, 2, 0, 3)


@dataclass(frozen=True, slots=True)
class _ChunkPlan:
    """How a micro-batch's rows fall into chunks: built once, used by all layers.

    ``queries``: of the S rows, all but padding. ``keys``: of the N + L keys; the same but for a shard, whose chunks
    hold only its own clean tokens (of the others they see prefixes). ``allowed``: the mask of each chunk against its
    own rows, bool [n, R, R], or [1, R, R] where all n are equal.
    """

    chunks: list[_Chunk]
    queries: _ChunkRows
    keys: _ChunkRows
    allowed: list[Tensor]
    _masks: dict[tuple[int, int, int, Kernel, torch.dtype], list[Tensor]] = field(default_factory=dict)

    def calls(
        self, num_heads: int, num_kv_heads: int, dtype: torch.dtype, kernel: Kernel
    ) -> Iterator[tuple[_Chunk, Tensor, int]]:
        """Each chunk, its additive mask [G / P * R, joined + R] (or [n, 1, G / P * R, joined + R]), and P, the
        parts its groups are taken in. For a kernel that takes all keys the mask is [1 or n, R, R], of its own rows."""
        group = num_heads // num_kv_heads
        # As few as give each thread a head, where that is wanted.
        wanted = [parts for parts in range(1, group + 1) if group % parts == 0]
        num_threads = torch.get_num_threads() if kernel.splits_groups else 1
        all_parts = [
            next((x for x in wanted if x * num_kv_heads * len(chunk.sequences) >= num_threads), group)
            for chunk in self.chunks
        ]
        dtype = kernel.mask_dtype(dtype)
        key = (num_heads, num_kv_heads, num_threads, kernel, dtype)
        if key not in self._masks:
            masks = [torch.zeros(x.shape, dtype=dtype).masked_fill_(~x, -math.inf) for x in self.allowed]
            if not kernel.takes_all_keys:
                masks = [
                    _repeated(mask, chunk.joined, group // parts)
                    for chunk, mask, parts in zip(self.chunks, masks, all_parts, strict=True)
                ]
            self._masks[key] = masks
        yield from zip(self.chunks, self._masks[key], all_parts, strict=True)


@cached_by_layout
@torch.inference_mode(False)
def _chunk_plan(layout: SequenceLayout, num_sequences: int, chunk_rows: int, joined_prefix: int) -> _ChunkPlan:
    """Chunks of about ``chunk_rows`` rows, noisy and clean ones; more where a block is longer. Prefixes of at most
    ``joined_prefix`` tokens are taken with a chunk's own rows."""
    table, num_noisy = row_table(layout, num_sequences), layout.num_noisy_rows
    found, member_of_row = _found_members(layout, table, chunk_rows)
    chunks, numbers = _padded_chunks(found, joined_prefix)
    by_chunk, is_padding = _by_chunk(chunks, numbers, member_of_row, num_noisy)
    sequences, rows = by_chunk // layout.num_rows, by_chunk % layout.num_rows
    others = (member_of_row.t().flatten() < 0).nonzero().squeeze(1)
    queries = keys = _ChunkRows(chunks, rows * num_sequences + sequences, is_padding, member_of_row.numel(), others)
    if _is_shard(layout):
        key_of_row = torch.cat([torch.arange(num_noisy), num_noisy + layout.shard.places(layout.clean_length)])
        key_rows, num_keys = key_of_row[rows] * num_sequences + sequences, layout.num_keys * num_sequences
        is_other = torch.ones(num_keys, dtype=torch.bool).index_fill_(0, key_rows, False)
        keys = _ChunkRows(chunks, key_rows, is_padding, num_keys, is_other.nonzero().squeeze(1))
    return _ChunkPlan(chunks, queries, keys, _allowed_pairs(chunks, table, by_chunk, is_padding, layout.clean_length))


class _Place(NamedTuple):
    """Of a chunk. ``copy``: of the same noisy block in the same sequence, as a chunk has one of each sequence."""

    copy: int
    document_start: int
    start: int
    stop: int


class _Member(NamedTuple):
    """What one sequence has of a chunk."""

    sequence: int
    num_noisy_rows: int
    number: int  # in the order in which they were found


def _is_shard(layout: SequenceLayout) -> bool:
    """A shard's noisy blocks need not stand for clean rows of it: each is a chunk without any."""
    return len(layout.shard.ranges(layout.clean_length)) > 1


def _found_members(
    layout: SequenceLayout, table: RowTable, chunk_rows: int
) -> tuple[dict[_Place, list[_Member]], Tensor]:
    """What each sequence has of each chunk (several that stand for the same tokens are one: fewer and longer calls),
    and int64 [B, S], the number of each row's member, -1 for padding."""
    num_noisy, length = layout.num_noisy_rows, layout.num_clean_rows
    is_noisy = table.blocks[:, :num_noisy] >= 0  # not padding
    places = table.first_keys[:, :num_noisy] + table.position_ids[:, :num_noisy]
    document_starts = table.first_keys[:, num_noisy:]
    is_shard = _is_shard(layout)
    boundaries, noisy_before = _noisy_blocks(table, places, is_noisy & (not is_shard), length)

    found: dict[_Place, list[_Member]] = {}
    num_found = 0
    member_of_row = torch.full(table.blocks.shape, -1)

    def add(sequence: int, num_noisy_rows: int, document_start: int, start: int, stop: int) -> None:
        nonlocal num_found
        copy = 0
        while (place := _Place(copy, document_start, start, stop)) in found and found[place][-1].sequence == sequence:
            copy += 1
        found.setdefault(place, []).append(_Member(sequence, num_noisy_rows, num_found))
        num_found += 1

    for together in _alike(document_starts):
        documents = document_starts[together[0]]
        # Ends that suit all of them: where none has a block, at their mean number of rows.
        may_end = boundaries[together].all(0).numpy()
        mean_before = noisy_before[together].double().mean(0).tolist()
        first = 0  # number of the range's first clean row
        for range_start, range_stop in layout.shard.ranges(layout.clean_length):
            last = first + range_stop - range_start
            begins_document = documents[first:last].numpy() == np.arange(range_start, range_stop)
            ends = _chunk_ends(may_end[first : last + 1], begins_document, mean_before[first : last + 1], chunk_rows)
            for start, stop in zip([0, *ends], ends, strict=False):
                counts = (noisy_before[together, first + stop] - noisy_before[together, first + start]).tolist()
                for sequence, num_noisy_rows in zip(together, counts, strict=True):
                    member_of_row[sequence, num_noisy + first + start : num_noisy + first + stop] = num_found
                    document_start = int(documents[first + start])
                    add(sequence, num_noisy_rows, document_start, range_start + start, range_start + stop)
            first = last
    for sequence in range(len(table.blocks) if num_noisy else 0):
        of_noisy, of_clean = member_of_row[sequence].split([num_noisy, length])
        rows = is_noisy[sequence].nonzero().squeeze(1)
        if is_shard:
            _, numbers_of_blocks, sizes = table.blocks[sequence, rows].unique_consecutive(
                return_inverse=True, return_counts=True
            )
            of_noisy[rows] = num_found + numbers_of_blocks
            first_rows = rows[sizes.cumsum(0) - sizes]
            starts, stops = (x[sequence, first_rows].tolist() for x in (table.first_keys, table.end_keys))
            for document_start, start, size in zip(starts, stops, sizes.tolist(), strict=True):
                add(sequence, size, document_start, start, start)
        else:
            of_noisy[rows] = of_clean[places[sequence, rows]]
    return found, member_of_row


def _noisy_blocks(table: RowTable, places: Tensor, is_noisy: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Of noisy rows that stand for ``places`` [B, N], where ``is_noisy``: bool [B, L + 1], no block goes on over this
    place; int64 [B, L + 1], rows that stand for an earlier one."""
    num_noisy = places.shape[1]
    # A noisy row crosses the boundaries between its block's first token and itself, (block start, place].
    crossings = torch.zeros(len(places), length + 2, dtype=torch.int64)
    num_copies = torch.zeros(len(places), length, dtype=torch.int64)
    if is_noisy.any():
        crossings.scatter_add_(1, table.end_keys[:, :num_noisy] + 1, is_noisy.long())
        crossings.scatter_add_(1, places + 1, -is_noisy.long())
        num_copies.scatter_add_(1, places, is_noisy.long())
    return crossings.cumsum(1)[:, : length + 1] == 0, F.pad(num_copies.cumsum(1), (1, 0))


def _padded_chunks(found: dict[_Place, list[_Member]], joined_prefix: int) -> tuple[list[_Chunk], Tensor]:
    """Chunks of members with little padding, and int64 [members], their numbers in the chunks' order."""
    chunks: list[_Chunk] = []
    numbers: list[int] = []
    first_row = 0
    for (_, document_start, start, stop), of_place in found.items():
        for members in _padded_alike(of_place, stop - start):
            prefix = start - document_start
            chunk = _Chunk(
                sequences=torch.tensor([member.sequence for member in members]),
                document_start=document_start,
                start=start,
                stop=stop,
                first_row=first_row,
                num_noisy_rows=max(member.num_noisy_rows for member in members),
                joined=prefix if prefix <= joined_prefix else 0,
            )
            chunks.append(chunk)
            numbers += [member.number for member in members]
            first_row += len(members) * chunk.num_rows
    return chunks, torch.tensor(numbers)


def _by_chunk(
    chunks: list[_Chunk], numbers: Tensor, member_of_row: Tensor, num_noisy: int
) -> tuple[Tensor, Tensor | None]:
    """Rows (b * S + s) in the plan's order: member by member, noisy ones before clean ones, then in their own order;
    and which of them stand for padding, bool; None: none do."""
    member_rows = torch.tensor([(chunk.num_noisy_rows, chunk.num_rows) for chunk in chunks for _ in chunk.sequences])
    member_ends = member_rows[:, 1].cumsum(0)
    member_starts = member_ends - member_rows[:, 1]
    bases = torch.stack([member_starts, member_starts + member_rows[:, 0]], dim=1).flatten()  # by 2 * member + is_clean
    ranks = torch.empty_like(numbers).scatter_(0, numbers, torch.arange(len(numbers)))
    kinds = 2 * ranks[member_of_row]
    kinds[:, num_noisy:] += 1
    kinds.masked_fill_(member_of_row < 0, -1)
    num_in_none = int((kinds < 0).sum())
    order = kinds.flatten().argsort(stable=True)[num_in_none:]
    sorted_kinds = kinds.flatten()[order]
    num_of_kind = sorted_kinds.bincount(minlength=2 * len(numbers))
    places = bases[sorted_kinds] + torch.arange(len(order)) - (num_of_kind.cumsum(0) - num_of_kind)[sorted_kinds]
    by_chunk = torch.full((int(member_ends[-1]),), -1).scatter_(0, places, order)
    if len(order) == len(by_chunk):
        return by_chunk, None
    is_padding = by_chunk < 0
    # A member's last row is clean, if it has any; its first is noisy, else.
    stand_ins = torch.where(by_chunk[member_ends - 1] < 0, by_chunk[member_starts], by_chunk[member_ends - 1])
    return torch.where(is_padding, stand_ins.repeat_interleave(member_rows[:, 1]), by_chunk), is_padding


def _alike(document_starts: Tensor) -> list[list[int]]:
    """Sequences with the same documents, of int64 [B, L]."""
    found: dict[bytes, list[int]] = {}
    for sequence, starts in enumerate(document_starts):
        found.setdefault(starts.numpy().tobytes(), []).append(sequence)
    return list(found.values())


def _padded_alike(members: list[_Member], num_clean_rows: int) -> Iterator[list[_Member]]:
    """Members that are padded to the same number of noisy rows, with little padding; by sequence."""
    together: list[_Member] = []
    for member in sorted(members, key=lambda member: -member.num_noisy_rows):
        largest = together[0].num_noisy_rows if together else 0
        if largest + num_clean_rows > _LARGEST_PADDING * (member.num_noisy_rows + num_clean_rows):
            yield sorted(together)
            together = []
        together.append(member)
    yield sorted(together)


def _chunk_ends(
    is_boundary: np.ndarray, begins_document: np.ndarray, noisy_before: Sequence[float], chunk_rows: int
) -> list[int]:
    """Where the chunks of one sequence, or of some with the same documents, end.

    Args:
        is_boundary: bool [L + 1], no noisy block goes on over this place.
        begins_document: bool [L].
        noisy_before: [L + 1], noisy rows that stand for an earlier clean token; of several sequences their mean.
        chunk_rows: rows of a chunk, at most, unless a block is longer.
    """
    length = len(begins_document)
    boundaries = is_boundary.nonzero()[0].tolist()
    rows_before = [place + noisy_before[place] for place in boundaries]
    document_starts = [*begins_document.nonzero()[0].tolist(), length]
    ends: list[int] = []
    start = 0
    while start < length:
        last = length if begins_document[start] else document_starts[bisect_right(document_starts, start)]
        fits = bisect_right(rows_before, start + noisy_before[start] + chunk_rows)
        end = boundaries[min(fits, bisect_right(boundaries, last)) - 1]
        start = end if end > start else boundaries[bisect_right(boundaries, start)]
        ends.append(start)
    return ends


def _allowed_pairs(
    chunks: list[_Chunk], table: RowTable, rows: Tensor, is_padding: Tensor | None, clean_length: int
) -> list[Tensor]:
    """Mask of each chunk against its own rows; ``rows``: b * S + s, chunk by chunk. Padding is a block of its own:
    nobody sees it, and it sees something."""
    blocks, first_keys, end_keys = (
        x.flatten()[rows].to(torch.int32)[:, None] for x in (table.blocks, table.first_keys, table.end_keys)
    )
    if is_padding is not None:
        blocks = blocks.masked_fill(is_padding[:, None], _PADDING_BLOCK)
    places = torch.arange(clean_length, dtype=torch.int32)
    allowed: list[Tensor] = []
    for chunk in chunks:
        num_sequences, num_rows, num_noisy = len(chunk.sequences), chunk.num_rows, chunk.num_noisy_rows
        block, first_key, end_key = (chunk.of(x, 1, num_sequences, num_rows) for x in (blocks, first_keys, end_keys))
        pairs = torch.empty(num_sequences, num_rows, num_rows, dtype=torch.bool)
        clean = places[chunk.start : chunk.stop]
        torch.eq(block, block[:, :num_noisy].mT, out=pairs[..., :num_noisy])
        torch.logical_and(first_key <= clean, clean < end_key, out=pairs[..., num_noisy:])
        allowed.append(pairs[:1] if bool((pairs == pairs[:1]).all()) else pairs)
    return allowed


def _repeated(mask: Tensor, joined: int, num_folded: int) -> Tensor:
    """Additive mask [n, R, R] with a 0 for each of the joined tokens, once for each query head that is folded into
    rows; [1, R, R] serves all sequences."""
    mask = F.pad(mask, (joined, 0)).repeat(1, num_folded, 1)
    return mask[0] if len(mask) == 1 else mask[:, None]


class _ChunkedAttention(torch.autograd.Function):
    """Key-value heads of all sequences stand where the kernel has its batch: [n * K, P, G / P * R, D], so that the P
    parts of a group give every thread a head of its own.

    The backward pass gives the kernel of each part the *merged* output and log-sum-exp: its probabilities are then
    those of the whole row, and the partial gradients simply add up.
    """

    @staticmethod
    @unredirected
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout, scale: float) -> Tensor:
        num_heads, num_kv_heads = query.shape[1], key.shape[1]
        kernel = kernel_for(query.dtype, layout.clean_length)
        chunk_rows = _chunk_rows(query.dtype, num_heads // num_kv_heads, kernel)
        joined_prefix = layout.clean_length if kernel.takes_all_keys else JOINED_PREFIX
        plan = _chunk_plan(layout, len(query), chunk_rows, joined_prefix)
        rows = plan.queries.gather(query)
        keys, values = _Keys(plan, key, layout), _Keys(plan, value, layout)
        outs: list[Tensor] = []
        log_sums_exp: list[Tensor] = []
        for chunk, mask, parts in plan.calls(num_heads, num_kv_heads, query.dtype, kernel):
            of_chunk = chunk.of(rows, num_heads, len(chunk.sequences) * num_kv_heads, parts, -1)
            own = keys.own(chunk, parts), values.own(chunk, parts)
            out, log_sum_exp = kernel.forward(of_chunk, *own, mask, scale)
            if chunk.has_long_prefix:
                prefix = keys.prefix(chunk, parts), values.prefix(chunk, parts)
                out, log_sum_exp = _merge(out, log_sum_exp, *kernel.forward(of_chunk, *prefix, None, scale))
            outs.append(out.flatten(0, 2))
            log_sums_exp.append(log_sum_exp.flatten())
        out = plan.queries.scatter(torch.cat(outs), query)
        results = () if kernel.takes_all_keys else (out, torch.cat(log_sums_exp))
        ctx.save_for_backward(query, key, value, *results)
        ctx.layout, ctx.plan, ctx.kernel, ctx.scale = layout, plan, kernel, scale
        return out

    @staticmethod
    @once_differentiable
    @unredirected
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *results = ctx.saved_tensors
        plan, kernel, scale = ctx.plan, ctx.kernel, ctx.scale
        num_heads, num_kv_heads = query.shape[1], key.shape[1]
        rows, grad_out_rows = plan.queries.gather(query), plan.queries.gather(grad_out, is_gradient=True)
        result_rows = [plan.queries.gather(results[0]), results[1]] if results else []
        keys, values = _Keys(plan, key, ctx.layout), _Keys(plan, value, ctx.layout)
        grad_keys, grad_values = (_KeyGradients(x) for x in (keys, values))
        grad_rows: list[Tensor] = []
        for chunk, mask, parts in plan.calls(num_heads, num_kv_heads, query.dtype, kernel):
            fold = (num_heads, len(chunk.sequences) * num_kv_heads, parts, -1)
            grad, of_chunk = chunk.of(grad_out_rows, *fold), chunk.of(rows, *fold)
            of_results = [chunk.of(x, *fold) for x in result_rows] or [None, None]
            own = keys.own(chunk, parts), values.own(chunk, parts)
            of_rows, of_keys, of_values = kernel.backward(grad, of_chunk, *own, *of_results, mask, scale)
            grad_keys.set_own(chunk, of_keys)
            grad_values.set_own(chunk, of_values)
            if chunk.has_long_prefix:
                prefix = keys.prefix(chunk, parts), values.prefix(chunk, parts)
                more_rows, of_keys, of_values = kernel.backward(grad, of_chunk, *prefix, *of_results, None, scale)
                of_rows = of_rows + more_rows
                grad_keys.add_prefix(chunk, of_keys)
                grad_values.add_prefix(chunk, of_values)
            grad_rows.append(of_rows.flatten(0, 2))
        grad_query = plan.queries.scatter(torch.cat(grad_rows), query)
        return grad_query, grad_keys.total(key), grad_values.total(value), None, None


class _Keys:
    """Keys (or values) of all chunks, never repeated: a group's parts share them by a stride of 0."""

    def __init__(self, plan: _ChunkPlan, x: Tensor, layout: SequenceLayout) -> None:
        self.plan = plan
        self.num_heads = x.shape[1]
        self.rows = plan.keys.gather(x)
        self.clean = x[:, :, layout.num_noisy_rows :].contiguous()

    def own(self, chunk: _Chunk, parts: int) -> Tensor:
        """[n * K, parts, joined + R, D]: the chunk's rows, behind the prefix if that is joined."""
        num_sequences = len(chunk.sequences)
        own = chunk.of(self.rows, self.num_heads, num_sequences * self.num_heads, 1, -1)
        if chunk.joined:
            own = torch.cat([self.prefix(chunk, 1), own], dim=2)
        return own.expand(-1, parts, -1, -1)

    def prefix(self, chunk: _Chunk, parts: int) -> Tensor:
        """[n * K, parts, start - document_start, D]"""
        clean = self.clean[:, :, chunk.document_start : chunk.start]
        if len(chunk.sequences) < len(clean):
            clean = clean.index_select(0, chunk.sequences)
        return clean.flatten(0, 1)[:, None].expand(-1, parts, -1, -1)


class _KeyGradients:
    """Sums of what the chunks give to each key. A clean key collects a term from every later chunk of its document, at
    least in fp32; from its own chunk a key has one, in the dtype of the kernel."""

    def __init__(self, keys: _Keys) -> None:
        self.keys = keys
        self.rows = torch.empty_like(keys.rows)
        self.clean = torch.zeros_like(keys.clean, dtype=_accumulation_dtype(keys.rows))

    def set_own(self, chunk: _Chunk, grad: Tensor) -> None:
        total, num_sequences = self._over_parts(grad), len(chunk.sequences)
        own = chunk.of(self.rows, self.keys.num_heads, num_sequences * self.keys.num_heads, -1)
        own.copy_(total[:, chunk.joined :])
        if chunk.joined:
            self._add(chunk, total[:, : chunk.joined])

    def add_prefix(self, chunk: _Chunk, grad: Tensor) -> None:
        self._add(chunk, self._over_parts(grad))

    def _add(self, chunk: _Chunk, total: Tensor) -> None:
        total = total.unflatten(0, (len(chunk.sequences), -1))
        clean = self.clean[:, :, chunk.document_start : chunk.start]
        if len(chunk.sequences) == len(clean):
            clean += total
        else:
            clean.index_add_(0, chunk.sequences, total.to(clean.dtype))

    def _over_parts(self, grad: Tensor) -> Tensor:
        """[n * K, parts, keys, D] -> [n * K, keys, D]"""
        return grad.squeeze(1) if grad.shape[1] == 1 else grad.sum(1, dtype=self.clean.dtype)

    def total(self, like: Tensor) -> Tensor:
        total = self.keys.plan.keys.scatter(self.rows, like)
        clean = total[:, :, -self.clean.shape[2] :]
        clean.copy_(clean + self.clean)
        return total
