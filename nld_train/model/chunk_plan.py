"""How the rows of a micro-batch fall into chunks for the CPU's attention: rows that share a clean prefix.

Dimensions: B sequences, S rows of the model's input, L clean tokens, N noisy rows, D head dimension, R rows of a chunk,
n sequences that have a chunk alike.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nld_train.objective.masks import cached_by_layout
from nld_train.objective.sequence import RowTable, SequenceLayout, row_table

LARGEST_PADDING = 1.25
"""Rows of a sequence's part of a chunk, padding included, for one that is needed: at most."""

_PADDING_BLOCK = torch.iinfo(torch.int32).min  # no row's block


@dataclass(frozen=True, slots=True)
class Chunk:
    """Clean tokens [start, stop) and the noisy rows that stand for them, R rows together, of n sequences alike. Or, in
    a shard, one noisy block that begins at start = stop. Sequences with fewer noisy rows than others have padding.

    No noisy block goes on over an end of a chunk, and neither does a document over an inner one that it does not begin:
    either the whole chunk sees the clean prefix [document_start, start), or it begins with a document and sees none.

    ``sequences``: int64 [n], rising; ``run``: the same as a slice, where they stand together, else None. ``first_row``:
    place of its rows (sequence by sequence, noisy rows, then clean ones) in the plan's order; ``first_noisy_row``: of
    its noisy rows among the noisy ones of that order.
    """

    sequences: Tensor
    run: slice | None
    num_sequences: int
    document_start: int
    start: int
    stop: int
    first_row: int
    first_noisy_row: int
    num_noisy_rows: int

    @property
    def num_rows(self) -> int:
        return self.num_noisy_rows + self.stop - self.start


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """Which rows of a tensor the chunks take, in which order.

    ``sizes``: of each chunk, n and its rows. ``rows`` int64 [rows in chunks]: s * B + b, chunk by chunk; where there is
    padding, some row of the same sequence and chunk. ``is_padding`` bool [rows in chunks]; None: none is. ``num_rows``:
    S * B. ``others`` int64: the rows in no chunk.
    """

    sizes: list[tuple[int, int]]
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
        of_chunks = x.split([num_sequences * num_rows for num_sequences, num_rows in self.sizes])
        return torch.cat([
            to_heads(rows.view(num_sequences, 1, num_rows)).flatten()
            for (num_sequences, num_rows), rows in zip(self.sizes, of_chunks, strict=True)
        ])  # fmt: skip

    def gather(self, x: Tensor, *, zero_padding: bool = False) -> Tensor:
        """[rows * heads, D] of x [B, heads, S, D], in the order of :meth:`elements`."""
        elements, _, padding = self.elements(x.shape[1])
        gathered = x.permute(2, 0, 1, 3).flatten(0, 2).index_select(0, elements)
        return gathered.index_fill_(0, padding, 0.0) if zero_padding and len(padding) > 0 else gathered

    def scatter(self, elements: Tensor, num_sequences: int, num_heads: int) -> Tensor:
        """Inverse of :meth:`gather`: [S, B, heads, D]; 0 on rows of no chunk."""
        if len(elements) == 0:  # padding alone
            return elements.new_zeros(self.num_rows // num_sequences, num_sequences, num_heads, elements.shape[-1])
        out = elements.index_select(0, self.elements(num_heads)[1]).view(self.num_rows, num_heads, -1)
        if self.others.numel() > 0:
            out.index_fill_(0, self.others, 0.0)
        return out.view(-1, num_sequences, num_heads, out.shape[-1])


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """How a micro-batch's rows fall into chunks: built once, used by all layers.

    ``queries``: of the S rows, all but padding. ``noisy_keys``: of the N noisy ones among the keys, likewise (what
    stands for padding is to be given as 0). ``allowed``: which of the chunk's own keys, clean tokens [start, stop) and
    then noisy rows, its rows see: bool [n, R, R], or [1, R, R] where all n are equal; those before are seen by all.
    """

    chunks: list[Chunk]
    queries: ChunkRows
    noisy_keys: ChunkRows
    allowed: list[Tensor]


@cached_by_layout
@torch.inference_mode(False)
def chunk_plan(layout: SequenceLayout, num_sequences: int, chunk_rows: int) -> ChunkPlan:
    """Chunks of about ``chunk_rows`` rows, noisy and clean ones; more where a block is longer."""
    table, num_noisy = row_table(layout, num_sequences), layout.num_noisy_rows
    found, member_of_row = _found_members(layout, table, chunk_rows)
    chunks, numbers = _padded_chunks(found)
    by_chunk, is_padding = _by_chunk(chunks, numbers, member_of_row, num_noisy)
    rows = by_chunk % layout.num_rows * num_sequences + by_chunk // layout.num_rows
    sizes = [(chunk.num_sequences, chunk.num_rows) for chunk in chunks]
    others = (member_of_row.t().flatten() < 0).nonzero().squeeze(1)
    queries = ChunkRows(sizes, rows, is_padding, member_of_row.numel(), others)
    noisy_keys = _noisy_rows(chunks, queries, num_sequences, num_noisy)
    return ChunkPlan(chunks, queries, noisy_keys, _allowed_pairs(chunks, table, by_chunk, is_padding))


def _noisy_rows(chunks: list[Chunk], rows: ChunkRows, num_sequences: int, num_noisy: int) -> ChunkRows:
    """The noisy ones; the first of the sequence stands for padding, whatever it is."""
    is_noisy = torch.cat([
        (torch.arange(chunk.num_rows) < chunk.num_noisy_rows).repeat(chunk.num_sequences) for chunk in chunks
    ])  # fmt: skip
    of_chunks, is_padding = rows.rows[is_noisy], None
    if rows.is_padding is not None:
        is_padding = rows.is_padding[is_noisy]
        of_chunks = torch.where(is_padding, of_chunks % num_sequences, of_chunks)
    sizes = [(chunk.num_sequences, chunk.num_noisy_rows) for chunk in chunks]
    others = rows.others[rows.others < num_noisy * num_sequences]
    return ChunkRows(sizes, of_chunks, is_padding, num_noisy * num_sequences, others)


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


def _padded_chunks(found: dict[_Place, list[_Member]]) -> tuple[list[Chunk], Tensor]:
    """Chunks of members with little padding, and int64 [members], their numbers in the chunks' order."""
    chunks: list[Chunk] = []
    numbers: list[int] = []
    first_row = first_noisy_row = 0
    for (_, document_start, start, stop), of_place in found.items():
        for members in _padded_alike(of_place, stop - start):
            sequences = [member.sequence for member in members]
            first, last = sequences[0], sequences[-1]
            chunk = Chunk(
                sequences=torch.tensor(sequences),
                run=slice(first, last + 1) if last - first + 1 == len(members) else None,
                num_sequences=len(members),
                document_start=document_start,
                start=start,
                stop=stop,
                first_row=first_row,
                first_noisy_row=first_noisy_row,
                num_noisy_rows=max(member.num_noisy_rows for member in members),
            )
            chunks.append(chunk)
            numbers += [member.number for member in members]
            first_row += len(members) * chunk.num_rows
            first_noisy_row += len(members) * chunk.num_noisy_rows
    return chunks, torch.tensor(numbers)


def _by_chunk(
    chunks: list[Chunk], numbers: Tensor, member_of_row: Tensor, num_noisy: int
) -> tuple[Tensor, Tensor | None]:
    """Rows (b * S + s) in the plan's order: member by member, noisy ones before clean ones, then in their own order;
    and which of them stand for padding, bool; None: none do."""
    member_rows = torch.tensor([
        (chunk.num_noisy_rows, chunk.num_rows) for chunk in chunks for _ in range(chunk.num_sequences)
    ])  # fmt: skip
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
        if largest + num_clean_rows > LARGEST_PADDING * (member.num_noisy_rows + num_clean_rows):
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


def _allowed_pairs(chunks: list[Chunk], table: RowTable, rows: Tensor, is_padding: Tensor | None) -> list[Tensor]:
    """See :class:`ChunkPlan`; ``rows``: b * S + s, chunk by chunk. Padding is a block of its own: nobody sees it, and
    it sees something."""
    blocks, first_keys, end_keys = (
        x.flatten()[rows].to(torch.int32) for x in (table.blocks, table.first_keys, table.end_keys)
    )
    if is_padding is not None:
        blocks = blocks.masked_fill(is_padding, _PADDING_BLOCK)
    allowed: list[Tensor] = []
    for chunk in chunks:
        last_row = chunk.first_row + chunk.num_sequences * chunk.num_rows
        block, first_key, end_key = (
            x[chunk.first_row : last_row].view(chunk.num_sequences, -1, 1) for x in (blocks, first_keys, end_keys)
        )
        pairs = torch.empty(chunk.num_sequences, chunk.num_rows, chunk.num_rows, dtype=torch.bool)
        clean = torch.arange(chunk.start, chunk.stop, dtype=torch.int32)
        torch.logical_and(first_key <= clean, clean < end_key, out=pairs[..., : len(clean)])
        torch.eq(block, block[:, : chunk.num_noisy_rows].mT, out=pairs[..., len(clean) :])
        allowed.append(pairs[:1].clone() if bool((pairs == pairs[:1]).all()) else pairs)
    return allowed
