"""How the rows of a micro-batch fall into chunks for the CPU's attention: rows that share a clean prefix.

A plan is built for each micro-batch, in many small operations: numpy's, which cost a fraction of torch's to start.
Tensors are only what comes in and what the plan hands out.

Dimensions: B sequences, S rows of the model's input, L clean tokens, N noisy rows, D head dimension, R rows of a chunk,
n sequences that have a chunk alike.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nld_train.objective.masks import cached_by_layout
from nld_train.objective.sequence import SequenceLayout, row_table

UNIT = 32
"""Of clean tokens of a chunk."""

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
    _elements: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)

    def elements(self, num_heads: int) -> tuple[Tensor, ...]:
        """int64 [rows * num_heads]: element (s * B + b) * num_heads + head by (chunk, sequence, head, row); its
        inverse, int64 [S * B * num_heads], in which rows of no chunk have some element of the last one; and which of
        the first are padding."""
        if num_heads not in self._elements:
            heads = np.arange(num_heads)[:, None]
            elements = self._of_heads(self.rows.numpy(), lambda rows: rows * num_heads + heads)
            places = np.arange(len(elements))
            padding = places[:0]
            inverse = np.full(self.num_rows * num_heads, len(elements) - 1)
            if self.is_padding is None:
                inverse[elements] = places
            else:
                is_padding = self._of_heads(self.is_padding.numpy(), lambda rows: rows.repeat(num_heads, axis=1))
                padding, needed = is_padding.nonzero()[0], (~is_padding).nonzero()[0]
                inverse[elements[needed]] = needed
            self._elements[num_heads] = tuple(torch.from_numpy(x) for x in (elements, inverse, padding))
        return self._elements[num_heads]

    def _of_heads(self, x: np.ndarray, to_heads: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """``x`` [rows in chunks], each chunk's as [n, 1, R] through ``to_heads``, which gives [n, heads, R]."""
        first_rows = np.prod(self.sizes, axis=1).cumsum()[:-1]
        return np.concatenate([
            to_heads(rows.reshape(num_sequences, 1, num_rows)).ravel()
            for (num_sequences, num_rows), rows in zip(self.sizes, np.split(x, first_rows), strict=True)
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
    table, num_noisy = _table(layout, num_sequences), layout.num_noisy_rows
    found, member_of_row = _found_members(layout, table, chunk_rows)
    chunks, numbers = _padded_chunks(found)
    member_sizes = np.array([
        (chunk.num_noisy_rows, chunk.stop - chunk.start) for chunk in chunks for _ in range(chunk.num_sequences)
    ])  # fmt: skip
    by_chunk, is_padding = _by_chunk(numbers, member_sizes, member_of_row, num_noisy)
    sizes = [(chunk.num_sequences, chunk.num_rows) for chunk in chunks]
    sequences = by_chunk // layout.num_rows
    rows = (by_chunk - sequences * layout.num_rows) * num_sequences + sequences
    of_padding = None if is_padding is None else torch.from_numpy(is_padding)
    others = np.flatnonzero(member_of_row.T < 0)
    queries = ChunkRows(sizes, torch.from_numpy(rows), of_padding, member_of_row.size, torch.from_numpy(others))
    noisy_keys = _noisy_rows(chunks, queries, member_sizes, num_sequences, num_noisy)
    return ChunkPlan(chunks, queries, noisy_keys, _allowed_pairs(chunks, table, by_chunk, is_padding))


class _Table(NamedTuple):
    """A row table's int64 [B, S], and ``places``, likewise: the clean token that a row stands for."""

    blocks: np.ndarray
    first_keys: np.ndarray
    end_keys: np.ndarray
    places: np.ndarray


def _table(layout: SequenceLayout, num_sequences: int) -> _Table:
    table = row_table(layout, num_sequences)
    first_keys = table.first_keys.numpy()
    places = first_keys + table.position_ids.numpy()
    return _Table(table.blocks.numpy(), first_keys, table.end_keys.numpy(), places)


def _noisy_rows(
    chunks: list[Chunk], queries: ChunkRows, member_sizes: np.ndarray, num_sequences: int, num_noisy: int
) -> ChunkRows:
    """The noisy ones; the first of the sequence stands for padding, whatever it is."""
    is_noisy = np.tile([True, False], len(member_sizes)).repeat(member_sizes.ravel())
    rows, is_padding = queries.rows.numpy()[is_noisy], None
    if queries.is_padding is not None:
        is_padding = queries.is_padding.numpy()[is_noisy]
        rows = np.where(is_padding, rows % num_sequences, rows)
    sizes = [(chunk.num_sequences, chunk.num_noisy_rows) for chunk in chunks]
    others, num_rows = queries.others.numpy(), num_noisy * num_sequences
    others = others[others < num_rows]
    of_padding = None if is_padding is None else torch.from_numpy(is_padding)
    return ChunkRows(sizes, torch.from_numpy(rows), of_padding, num_rows, torch.from_numpy(others))


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
    layout: SequenceLayout, table: _Table, chunk_rows: int
) -> tuple[dict[_Place, list[_Member]], np.ndarray]:
    """What each sequence has of each chunk (several that stand for the same tokens are one: fewer and longer calls),
    and int64 [B, S], the number of each row's member, -1 for padding."""
    num_noisy = layout.num_noisy_rows
    noisy_rows = (table.blocks[:, :num_noisy] >= 0).nonzero()  # their sequences and numbers; not padding
    boundaries, noisy_before = _noisy_blocks(layout, table, noisy_rows)
    found: dict[_Place, list[_Member]] = {}
    num_found = 0
    member_of_row = np.full(table.blocks.shape, -1)

    def add(sequence: int, num_noisy_rows: int, document_start: int, start: int, stop: int) -> None:
        nonlocal num_found
        copy = 0
        while (place := _Place(copy, document_start, start, stop)) in found and found[place][-1].sequence == sequence:
            copy += 1
        found.setdefault(place, []).append(_Member(sequence, num_noisy_rows, num_found))
        num_found += 1

    document_starts = table.first_keys[:, num_noisy:]
    for together in _alike(document_starts):
        documents = document_starts[together[0]]
        # Cuts that suit all of them: where none has a block, by their mean number of rows.
        may_cut, before = np.logical_and.reduce(boundaries[together]), noisy_before[together]
        mean_before = before.mean(axis=0)
        first = 0  # number of the range's first clean row
        for range_start, range_stop in layout.shard.ranges(layout.clean_length):
            last = first + range_stop - range_start
            begins_document = documents[first:last] == np.arange(range_start, range_stop)
            in_range = slice(first, last + 1)
            cuts = _chunk_cuts(may_cut[in_range], begins_document, mean_before[in_range], chunk_rows)
            num_noisy_rows = np.diff(before[:, first:][:, cuts])  # [sequences, chunks]
            numbers = num_found + np.arange(num_noisy_rows.size).reshape(-1, len(together)).T
            member_of_row[together, num_noisy + first : num_noisy + last] = numbers.repeat(np.diff(cuts), axis=1)
            for (start, stop), counts in zip(pairwise(cuts), num_noisy_rows.T.tolist(), strict=True):
                document_start = int(documents[first + start])
                for sequence, count in zip(together, counts, strict=True):
                    add(sequence, count, document_start, range_start + start, range_start + stop)
            first = last
    if _is_shard(layout):
        sequences, blocks = noisy_rows[0], table.blocks[noisy_rows]
        begins_block = (np.diff([sequences, blocks], prepend=-1) != 0).any(axis=0)
        member_of_row[noisy_rows] = num_found - 1 + begins_block.cumsum()
        first_rows = tuple(x[begins_block] for x in noisy_rows)
        sizes = np.diff(begins_block.nonzero()[0], append=len(begins_block))
        of_blocks = (first_rows[0], sizes, table.first_keys[first_rows], table.end_keys[first_rows])
        for sequence, size, document_start, start in zip(*(x.tolist() for x in of_blocks), strict=True):
            add(sequence, size, document_start, start, start)
    else:
        member_of_row[noisy_rows] = member_of_row[noisy_rows[0], num_noisy + table.places[noisy_rows]]
    return found, member_of_row


def _noisy_blocks(
    layout: SequenceLayout, table: _Table, noisy_rows: tuple[np.ndarray, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Of all clean rows, [B, L + 1]: bool, no noisy block goes on over this place; int64, noisy rows that stand for an
    earlier one. In a shard none does."""
    shape = (len(table.blocks), layout.num_clean_rows + 1)
    if _is_shard(layout):
        return np.ones(shape, dtype=bool), np.zeros(shape, dtype=np.int64)

    def num_before(places: np.ndarray) -> np.ndarray:
        """int64 [B, L + 1], noisy rows whose ``places`` are earlier ones."""
        numbers = noisy_rows[0] * shape[1] + places[noisy_rows] + 1
        return np.bincount(numbers, minlength=shape[0] * shape[1]).reshape(shape).cumsum(axis=1)

    # Rows of blocks that begin before a place are themselves before it, unless one of these blocks goes on over it.
    noisy_before = num_before(table.places)
    return num_before(table.end_keys) == noisy_before, noisy_before


def _padded_chunks(found: dict[_Place, list[_Member]]) -> tuple[list[Chunk], np.ndarray]:
    """Chunks of members with little padding, and int64 [members], their numbers in the chunks' order."""
    chunks: list[Chunk] = []
    numbers: list[int] = []
    first_row = first_noisy_row = 0
    for (_, document_start, start, stop), of_place in found.items():
        for members in _padded_alike(of_place, stop - start):
            sequences = [member.sequence for member in members]
            first, last = sequences[0], sequences[-1]
            chunk = Chunk(
                sequences=torch.from_numpy(np.array(sequences)),
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
    return chunks, np.array(numbers)


def _by_chunk(
    numbers: np.ndarray, member_sizes: np.ndarray, member_of_row: np.ndarray, num_noisy: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows (b * S + s) in the plan's order: member by member, noisy ones before clean ones, then in their own order;
    and which of them stand for padding, bool; None: none do. ``member_sizes`` int64 [members, 2]: both kinds' rows."""
    ranks = numbers.argsort()  # of members in the order in which they were found
    kinds = 2 * ranks[member_of_row]  # 2 * member + is_clean
    kinds[:, num_noisy:] += 1
    kinds[member_of_row < 0] = -1
    order = kinds.argsort(axis=None, kind="stable")[np.count_nonzero(kinds < 0) :]
    ends = member_sizes.cumsum()
    if len(order) == ends[-1]:  # members are full
        return order, None
    num_of_kind = np.bincount(kinds.ravel()[order], minlength=member_sizes.size)
    num_padding_before = ends - member_sizes.ravel() - (num_of_kind.cumsum() - num_of_kind)
    by_chunk = np.full(ends[-1], -1)
    by_chunk[np.arange(len(order)) + num_padding_before.repeat(num_of_kind)] = order
    is_padding = by_chunk < 0
    # A member's last row is clean, if it has any; its first is noisy, else.
    member_ends, num_rows = ends[1::2], member_sizes.sum(axis=1)
    stand_ins = np.where(is_padding[member_ends - 1], by_chunk[member_ends - num_rows], by_chunk[member_ends - 1])
    return np.where(is_padding, stand_ins.repeat(num_rows), by_chunk), is_padding


def _alike(document_starts: np.ndarray) -> list[list[int]]:
    """Sequences with the same documents, of int64 [B, L]."""
    found: dict[bytes, list[int]] = {}
    for sequence, starts in enumerate(document_starts):
        found.setdefault(starts.tobytes(), []).append(sequence)
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


def _chunk_cuts(
    is_boundary: np.ndarray, begins_document: np.ndarray, noisy_before: np.ndarray, chunk_rows: int
) -> list[int]:
    """Where the chunks of one sequence, or of some with the same documents, begin and end: from 0 to L.

    Args:
        is_boundary: bool [L + 1], no noisy block goes on over this place.
        begins_document: bool [L].
        noisy_before: float64 [L + 1], rows that stand for an earlier clean token; of several sequences their mean.
        chunk_rows: rows of a chunk, at most, unless a block is longer.
    """
    length = len(begins_document)
    places = is_boundary.nonzero()[0]
    rows_before = (places + noisy_before[places]).tolist()
    boundaries = places.tolist()  # from 0 to L
    document_starts = [*begins_document.nonzero()[0].tolist(), length]
    cuts = [0]
    number = 0  # of the last cut among the boundaries
    while (start := cuts[-1]) < length:
        last = length if begins_document[start] else document_starts[bisect_right(document_starts, start)]
        fits = bisect_right(rows_before, rows_before[number] + chunk_rows)
        number = max(min(fits, bisect_right(boundaries, last)) - 1, number + 1)
        end = boundaries[number]
        if end < last and not begins_document[end] and is_boundary[end + 1]:
            # Neither a document nor a block says where to end: in whole units of tokens, since kernels take a fifth
            # longer over an odd number of keys.
            whole = start + (end - start) // UNIT * UNIT
            found = bisect_right(boundaries, whole) - 1
            if boundaries[found] == whole > start:
                number = found
        cuts.append(boundaries[number])
    return cuts


def _allowed_pairs(chunks: list[Chunk], table: _Table, rows: np.ndarray, is_padding: np.ndarray | None) -> list[Tensor]:
    """See :class:`ChunkPlan`; ``rows``: b * S + s, chunk by chunk. Padding is a block of its own: nobody sees it, and
    it sees something."""
    blocks, first_keys, end_keys = (
        x.ravel()[rows].astype(np.int32) for x in (table.blocks, table.first_keys, table.end_keys)
    )
    if is_padding is not None:
        blocks[is_padding] = _PADDING_BLOCK
    allowed: list[Tensor] = []
    for chunk in chunks:
        last_row = chunk.first_row + chunk.num_sequences * chunk.num_rows
        block, first_key, end_key = (
            x[chunk.first_row : last_row].reshape(chunk.num_sequences, -1, 1) for x in (blocks, first_keys, end_keys)
        )
        pairs = np.empty((chunk.num_sequences, chunk.num_rows, chunk.num_rows), dtype=bool)
        clean = np.arange(chunk.start, chunk.stop, dtype=np.int32)
        of_clean = np.less(clean, end_key, out=pairs[..., : len(clean)])
        if first_key.max() > chunk.start:  # a document begins inside of it
            of_clean &= first_key <= clean
        np.equal(block, block[:, : chunk.num_noisy_rows].swapaxes(1, 2), out=pairs[..., len(clean) :])
        if len(pairs) > 1 and (pairs[1:] == pairs[0]).all():
            pairs = pairs[:1].copy()
        allowed.append(torch.from_numpy(pairs))
    return allowed
