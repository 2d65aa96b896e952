"""What the model reads: the clean tokens alone, or [noisy | clean].

In the plain case the noisy part is a whole copy, [noisy L | clean L]. It may also hold only some of the blocks (a noisy
fraction, the blocks with supervised tokens), two complementary copies, or blocks that start anew at each document;
then a :class:`RowTable` says what each row is.

Dimensions: B sequences, L clean tokens per sequence, N noisy rows, S = N + L rows of the model's input.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nld_train.objective.noise import Corruption


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
    """

    clean_length: int
    block_size: int
    has_noisy_half: bool
    table: RowTable | None = None

    def __post_init__(self) -> None:
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
            return self.table.blocks.shape[1] - self.clean_length
        return self.clean_length if self.has_noisy_half else 0

    @property
    def num_rows(self) -> int:
        """S."""
        return self.num_noisy_rows + self.clean_length

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


@dataclass(slots=True, kw_only=True)
class JointBatch:
    """One micro-batch as the model and the loss see it.

    ``tokens`` int64 [B, S]: the model's input. ``targets`` int64 [B, S]: on noisy rows the clean token of the same
    position (no shift), on clean rows the next token. ``diffusion_weights`` float64 [B, N] (None without a noisy
    part): the estimator's weight where the token is masked (1/p_mask for the recipe), else 0. ``ar_weights`` float64
    [B, L]: 1 where the next token is supervised, else 0. ``is_supervised`` bool [B, L]: the token itself is.
    ``mask_ratios`` float32 [B, N]: masked share of the row's block. ``sequence_ratios`` float64 [B]: masked share of
    each sequence's noised tokens.
    """

    layout: SequenceLayout
    tokens: Tensor
    targets: Tensor
    ar_weights: Tensor
    is_supervised: Tensor
    diffusion_weights: Tensor | None
    mask_ratios: Tensor | None
    sequence_ratios: Tensor | None

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
    )


def _row_table(corruption: Corruption | None, document_starts: Tensor | None, tokens: Tensor) -> RowTable:
    places = torch.arange(tokens.shape[1]).expand(tokens.shape)
    starts = torch.zeros_like(tokens) if document_starts is None else document_starts
    clean = RowTable(
        position_ids=places - starts, blocks=torch.full_like(tokens, -1), first_keys=starts, end_keys=places + 1
    )
    if corruption is None:
        return clean
    blocks, noisy_places = corruption.blocks, corruption.places
    row_numbers = torch.arange(blocks.shape[1]).expand(blocks.shape)
    is_padding = noisy_places < 0
    begins_block = torch.ones_like(is_padding)
    begins_block[:, 1:] = blocks[:, 1:] != blocks[:, :-1]
    first_rows = torch.where(begins_block, row_numbers, 0).cummax(dim=1).values
    block_starts = noisy_places.gather(1, first_rows)
    first_keys = starts.gather(1, noisy_places.clamp_min(0))
    noisy = RowTable(
        position_ids=torch.where(is_padding, 0, noisy_places - first_keys),
        blocks=torch.where(is_padding, -2 - row_numbers, blocks),
        first_keys=torch.where(is_padding, 0, first_keys),
        end_keys=torch.where(is_padding, 0, block_starts),
    )
    return RowTable(
        position_ids=torch.cat([noisy.position_ids, clean.position_ids], dim=1),
        blocks=torch.cat([noisy.blocks, clean.blocks], dim=1),
        first_keys=torch.cat([noisy.first_keys, clean.first_keys], dim=1),
        end_keys=torch.cat([noisy.end_keys, clean.end_keys], dim=1),
    )
