"""What the model reads: the clean tokens alone, or [noisy | clean].

In the plain case the noisy part is a whole copy, [noisy L | clean L]. It may also hold only some of the blocks (a noisy
fraction, the blocks with supervised tokens), two complementary copies, or blocks that start anew at each document;
then a :class:`RowTable` says what each row is. With context parallelism each rank takes a part of the rows
(:func:`shard_batch`), and all of them attend to clean tokens of all ranks.

Dimensions: B sequences, L clean tokens per sequence, N noisy rows, S = N + L rows of the model's input; in a shard
S = N + L / size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from nld_train.objective.noise import Corruption

SHARD_ROW_MULTIPLE = 128
"""Where ranks and sequences have different numbers of noisy rows they are rounded up to it, so that shapes are few."""


@dataclass(frozen=True, slots=True)
class Shard:
    """The clean tokens of one of ``size`` context-parallel ranks.

    L is cut into 2 * size equal chunks, of which rank r takes number r and number r from the end: an early chunk sees
    few keys and a late one many, so each pair has as much work.
    """

    rank: int = 0
    size: int = 1

    def ranges(self, length: int) -> tuple[tuple[int, int], ...]:
        """[start, stop) of its clean tokens in a sequence of ``length``, in order."""
        if self.size == 1:
            return ((0, length),)
        width = length // (2 * self.size)
        return tuple((chunk * width, (chunk + 1) * width) for chunk in (self.rank, 2 * self.size - 1 - self.rank))

    def places(self, length: int) -> Tensor:
        """int64 [L / size]: its clean tokens."""
        return torch.cat([torch.arange(start, stop) for start, stop in self.ranges(length)])


WHOLE = Shard()


@dataclass(frozen=True, slots=True, eq=False)
class RowTable:
    """What each row of each sequence is and sees, where sequences differ; all int64 [B, S].

    A row may attend to the clean tokens ``first_keys <= place < end_keys`` and, if it is noisy, to the noisy rows of
    its own block. Rows of a block stand together, in the order of their places.

    ``position_ids``: position inside the document. ``blocks``: number of the noisy block, copies counted apart; -1 for
    clean rows; a padding row (no token stands behind it) has a negative number of its own and sees itself alone.
    ``first_keys``: first token of the document. ``end_keys``: first token of the block for a noisy row, the next
    token for a clean one.
    """

    position_ids: Tensor
    blocks: Tensor
    first_keys: Tensor
    end_keys: Tensor

    def to(self, device: torch.device) -> "RowTable":
        return RowTable(
            position_ids=self.position_ids.to(device, non_blocking=True),
            blocks=self.blocks.to(device, non_blocking=True),
            first_keys=self.first_keys.to(device, non_blocking=True),
            end_keys=self.end_keys.to(device, non_blocking=True),
        )


@dataclass(frozen=True, slots=True)
class SequenceLayout:
    """What each of the S rows of the model's input is; hashable, equal layouts share their masks and tables.

    Args:
        clean_length: L, clean tokens of a sequence.
        block_size: tokens of a diffusion block; divides L (with a table: the most tokens of a block).
        has_noisy_half: True: rows 0..L-1 are the noisy copy, rows L..2L-1 the clean tokens. False: L clean rows.
        table: None: every sequence is as above. Else rows 0..N-1 are noisy (N may be 0), the last L rows are clean, and
            the table says the rest; such a layout belongs to one micro-batch and equals only itself.
        shard: with a table, whose clean rows these are; the L / size of a context rank. Its rows attend to its own N
            noisy rows and to all L clean tokens: keys are [noisy N | clean L], in the order of places.
    """

    clean_length: int
    block_size: int
    has_noisy_half: bool
    table: RowTable | None = None
    shard: Shard = WHOLE

    def __post_init__(self) -> None:
        if self.table is None and self.shard != WHOLE:
            raise ValueError("a part of the rows needs a table: see shard_batch")
        if (
            self.clean_length <= 0
            or self.block_size <= 0
            or (self.table is None and self.clean_length % self.block_size)
        ):
            raise ValueError(
                f"block_size {self.block_size} must be positive and divide the sequence length {self.clean_length}"
            )

    @property
    def num_noisy_rows(self) -> int:
        """N."""
        if self.table is not None:
            return self.table.blocks.shape[1] - self.num_clean_rows
        return self.clean_length if self.has_noisy_half else 0

    @property
    def num_clean_rows(self) -> int:
        """L, or a shard's L / size."""
        return self.clean_length // self.shard.size

    @property
    def num_rows(self) -> int:
        """S."""
        return self.num_noisy_rows + self.num_clean_rows

    @property
    def num_keys(self) -> int:
        """N + L."""
        return self.num_noisy_rows + self.clean_length

    @property
    def is_causal(self) -> bool:
        """Its mask is the plain causal one: no noisy half, no table."""
        return self.table is None and not self.has_noisy_half

    @property
    def num_halves(self) -> int:
        """Of a layout without a table: how often positions 0..L-1 occur."""
        return 2 if self.has_noisy_half else 1

    def position_ids(self, device: torch.device | str = "cpu") -> Tensor:
        """int64 [S], or [B, S] with a table: each row's position in its document (0..L-1 once or twice without)."""
        if self.table is not None:
            return self.table.position_ids.to(device)
        return torch.arange(self.clean_length, device=device).repeat(self.num_halves)

    def to(self, device: torch.device) -> "SequenceLayout":
        """The same layout with its table on ``device``."""
        return self if self.table is None else replace(self, table=self.table.to(device))


def row_table(layout: SequenceLayout, num_sequences: int) -> RowTable:
    """The layout's own table; for one without, what it would be, of ``num_sequences`` that are all alike."""
    if layout.table is not None:
        return layout.table
    places = torch.arange(layout.clean_length)
    blocks = places // layout.block_size
    zeros = torch.zeros_like(places)
    rows = torch.stack([places, zeros - 1, zeros, places + 1])
    if layout.has_noisy_half:
        rows = torch.cat([torch.stack([places, blocks, zeros, blocks * layout.block_size]), rows], dim=1)
    position_ids, of_blocks, first_keys, end_keys = (x.expand(num_sequences, -1).clone() for x in rows)
    return RowTable(position_ids=position_ids, blocks=of_blocks, first_keys=first_keys, end_keys=end_keys)


@dataclass(slots=True, kw_only=True)
class JointBatch:
    """One micro-batch as the model and the loss see it.

    ``tokens`` int64 [B, S]: the model's input. ``targets`` int64 [B, S]: on noisy rows the clean token of the same
    position (no shift), on clean rows the next token. ``diffusion_weights`` float64 [B, N] (None without a noisy
    part): the estimator's weight where the token is masked (1/p_mask for the recipe), else 0. ``ar_weights`` float64
    [B, L]: 1 where the next token is supervised, else 0. ``is_supervised`` bool [B, L]: the token itself is.
    ``mask_ratios`` float32 [B, N]: masked share of the row's block. ``sequence_ratios`` float64 [B]: masked share of
    each sequence's noised tokens. ``is_counted`` bool [B]: the sequence has supervised tokens. In a shard clean rows
    are L / size, and what is counted by sequence is counted on the first rank: the last two are 0 on the others.
    """

    layout: SequenceLayout
    tokens: Tensor
    targets: Tensor
    ar_weights: Tensor
    is_supervised: Tensor
    diffusion_weights: Tensor | None
    mask_ratios: Tensor | None
    sequence_ratios: Tensor | None
    is_counted: Tensor

    def to(self, device: torch.device) -> "JointBatch":
        """The same batch on ``device``."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return JointBatch(
            layout=self.layout.to(device),
            tokens=self.tokens.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            ar_weights=self.ar_weights.to(device, non_blocking=True),
            is_supervised=self.is_supervised.to(device, non_blocking=True),
            diffusion_weights=moved(self.diffusion_weights),
            mask_ratios=moved(self.mask_ratios),
            sequence_ratios=moved(self.sequence_ratios),
            is_counted=self.is_counted.to(device, non_blocking=True),
        )


def build_joint_batch(
    tokens: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    corruption: Corruption | None,
    block_size: int,
    *,
    is_supervised: Tensor | None = None,
    document_starts: Tensor | None = None,
) -> JointBatch:
    """Lay out one micro-batch.

    Args:
        tokens: int64 [B, L], the clean tokens.
        labels: int64 [B, L], the next token of each position.
        loss_mask: float or bool [B, L], 1 where the next token is supervised.
        corruption: the noisy rows; None for a stage with alpha = 0, which runs the clean tokens alone.
        block_size: tokens of a diffusion block.
        is_supervised: bool [B, L], the token itself is supervised; None: all are.
        document_starts: int64 [B, L], place of the first token of each token's document; None: a sequence is one text.
    """
    length = tokens.shape[1]
    ar_weights = loss_mask.to(torch.float64)
    if is_supervised is None:
        is_supervised = torch.ones_like(tokens, dtype=torch.bool)
    if corruption is None:
        rows, targets = tokens, labels
    else:
        noisy_targets = tokens.gather(1, corruption.places.clamp_min(0))
        rows = torch.cat([corruption.noisy_tokens, tokens], dim=1)
        targets = torch.cat([noisy_targets, labels], dim=1)
    is_plain = document_starts is None and (corruption is None or corruption.is_whole(length, block_size))
    table = None if is_plain else _row_table(corruption, document_starts, tokens)
    return JointBatch(
        layout=SequenceLayout(length, block_size, has_noisy_half=corruption is not None, table=table),
        tokens=rows,
        targets=targets,
        ar_weights=ar_weights,
        is_supervised=is_supervised,
        diffusion_weights=None if corruption is None else corruption.weights,
        mask_ratios=None if corruption is None else corruption.mask_ratios,
        sequence_ratios=None if corruption is None else corruption.sequence_ratios,
        is_counted=is_supervised.any(dim=1),
    )


def shard_batch(
    batch: JointBatch, row_weights: Tensor, shard: Shard, row_multiple: int = 1
) -> tuple[JointBatch, Tensor]:
    """The rows of one context-parallel rank, and their weights; all ranks' together are the batch's, each row once.

    Clean rows are those of the shard's places. Noisy blocks are shared out by their work, each as a whole, so that no
    noisy row ever needs a noisy row of another rank (see :func:`share_blocks`). Ranks may have different numbers of
    noisy rows, and at least one, if only of padding; of a plain batch whose blocks divide the chunks all have L / size,
    and they are those of its places.

    Args:
        batch: whole, on the CPU.
        row_weights: float64 [B, S], from :func:`nld_train.objective.normalize.row_weights`: normalization by sequence
            needs the whole sequence.
        shard: whose rows; the whole one returns the arguments.
        row_multiple: the number of noisy rows is rounded up to a multiple of it, as that of the batch is.

    Raises:
        ValueError: L cannot be cut into 2 * size chunks.
    """
    if shard == WHOLE:
        return batch, row_weights
    layout = batch.layout
    length, num_noisy = layout.clean_length, layout.num_noisy_rows
    if length % (2 * shard.size):
        raise ValueError(f"{length} clean tokens cannot be cut into 2 x {shard.size} equal chunks")
    table = _plain_table(layout, len(batch.tokens)) if layout.table is None else layout.table
    places = shard.places(length)
    is_own = _ranks_of_noisy_rows(table, num_noisy, shard.size) == shard.rank
    num_own = 0
    if num_noisy > 0:
        unit = row_multiple if layout.table is None else math.lcm(row_multiple, SHARD_ROW_MULTIPLE)
        num_own = min(max(1, math.ceil(int(is_own.sum(dim=1).max()) / unit)) * unit, num_noisy)
    order = is_own.byte().argsort(dim=1, descending=True, stable=True)[:, :num_own]
    is_padding = ~is_own.gather(1, order)
    rows = torch.cat([order, (num_noisy + places).expand(len(order), -1)], dim=1)
    padding = torch.cat([is_padding, torch.zeros_like(rows[:, num_own:], dtype=torch.bool)], dim=1)

    def own(x: Tensor, fill: float | Tensor = 0) -> Tensor:
        """Rows of x [B, S], ``fill`` where they are padding."""
        return torch.where(padding, fill, x.gather(1, rows))

    def own_noisy(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.gather(1, order).masked_fill_(is_padding, 0)

    is_first = shard.rank == 0
    sharded = JointBatch(
        layout=replace(
            layout,
            table=RowTable(
                position_ids=own(table.position_ids),
                blocks=own(table.blocks, -2 - torch.arange(rows.shape[1])),
                first_keys=own(table.first_keys),
                end_keys=own(table.end_keys),
            ),
            shard=shard,
        ),
        tokens=batch.tokens.gather(1, rows),
        targets=batch.targets.gather(1, rows),
        ar_weights=batch.ar_weights[:, places],
        is_supervised=batch.is_supervised[:, places],
        diffusion_weights=own_noisy(batch.diffusion_weights),
        mask_ratios=own_noisy(batch.mask_ratios),
        sequence_ratios=None if batch.sequence_ratios is None else batch.sequence_ratios * is_first,
        is_counted=batch.is_counted & is_first,
    )
    return sharded, own(row_weights)


def share_blocks(work: Sequence[int], num_ranks: int) -> list[int]:
    """The rank of each of a sequence's noisy blocks, given what each costs, in the order of their places.

    A rank has a run of blocks from the front and one from the back, as of the clean tokens, so that blocks that stand
    together in its rows see nearly the same keys (which attention kernels that work on tiles live on). From the
    outermost rank to the innermost, each takes its share of the blocks that are left, up to rounding, so divided
    between its two runs that their work is nearest to its share of the work that is left.
    """
    before = list(accumulate(work, initial=0))
    ranks: list[int] = []
    of_back: list[int] = []
    front, back = 0, len(work)
    for rank in range(num_ranks):
        num_left, num_sharing = back - front, num_ranks - rank
        share = (before[back] - before[front]) / num_sharing
        candidates = []
        for total in sorted({num_left // num_sharing, -(-num_left // num_sharing)}):
            for num_front in range(max(0, total // 2 - 1), min(total, total // 2 + 2) + 1):
                num_back = total - num_front
                taken = before[front + num_front] - before[front] + before[back] - before[back - num_back]
                candidates.append((abs(taken - share), total, num_front))
        _, total, num_front = min(candidates)
        num_back = total - num_front
        ranks += [rank] * num_front
        of_back += [rank] * num_back
        front, back = front + num_front, back - num_back
    return ranks + of_back[::-1]


def _ranks_of_noisy_rows(table: RowTable, num_noisy: int, num_ranks: int) -> Tensor:
    """int64 [B, N]: which context-parallel rank holds each noisy row; -1 for padding."""
    ranks = torch.full_like(table.blocks[:, :num_noisy], -1)
    for sequence, blocks in enumerate(table.blocks[:, :num_noisy]):
        rows = (blocks >= 0).nonzero().squeeze(1)
        _, members, sizes = blocks[rows].unique_consecutive(return_inverse=True, return_counts=True)
        first_rows = rows[sizes.cumsum(0) - sizes]
        starts = table.end_keys[sequence, first_rows]
        work = sizes * (starts - table.first_keys[sequence, first_rows] + sizes)  # query-key pairs
        by_place = starts.argsort(stable=True)  # two copies of a block stand far apart
        of_blocks = torch.empty_like(by_place)
        of_blocks[by_place] = torch.tensor(share_blocks(work[by_place].tolist(), num_ranks), dtype=torch.int64)
        ranks[sequence, rows] = of_blocks[members]
    return ranks


def _plain_table(layout: SequenceLayout, num_sequences: int) -> RowTable:
    """What :func:`build_joint_batch` would write for a layout without a table."""
    places = torch.arange(layout.clean_length)
    starts, numbers = torch.zeros_like(places), places // layout.block_size
    rows = [(places, torch.full_like(places, -1), starts, places + 1)]
    if layout.has_noisy_half:
        rows.insert(0, (places, numbers, starts, numbers * layout.block_size))
    position_ids, blocks, first_keys, end_keys = (
        torch.cat(parts).expand(num_sequences, -1) for parts in zip(*rows, strict=True)
    )
    return RowTable(position_ids=position_ids, blocks=blocks, first_keys=first_keys, end_keys=end_keys)


def _row_table(corruption: Corruption | None, document_starts: Tensor | None, tokens: Tensor) -> RowTable:
    """Of a micro-batch, on the CPU: many small operations, which cost less as numpy's than as torch's."""
    places = np.tile(np.arange(tokens.shape[1]), (len(tokens), 1))
    starts = np.zeros_like(places) if document_starts is None else document_starts.numpy()
    # In the order of the table's fields.
    of_rows: list[np.ndarray] = [places - starts, np.full_like(places, -1), starts, places + 1]
    if corruption is not None:
        blocks, noisy_places = corruption.blocks.numpy(), corruption.places.numpy()
        sequences, rows = np.arange(len(blocks))[:, None], np.arange(blocks.shape[1])
        begins_block = np.ones_like(blocks, dtype=bool)
        begins_block[:, 1:] = blocks[:, 1:] != blocks[:, :-1]
        first_rows = np.maximum.accumulate(np.where(begins_block, rows, 0), axis=1)
        noisy_starts, block_starts = starts[sequences, noisy_places], noisy_places[sequences, first_rows]
        of_noisy = (noisy_places - noisy_starts, blocks, noisy_starts, block_starts)
        of_padding: tuple[int | np.ndarray, ...] = (0, -2 - rows, 0, 0)
        is_padding = noisy_places < 0
        of_rows = [
            np.concatenate([np.where(is_padding, padding, noisy), clean], axis=1)
            for padding, noisy, clean in zip(of_padding, of_noisy, of_rows, strict=True)
        ]
    position_ids, numbers, first_keys, end_keys = (torch.from_numpy(x) for x in of_rows)
    return RowTable(position_ids=position_ids, blocks=numbers, first_keys=first_keys, end_keys=end_keys)
