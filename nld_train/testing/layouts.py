"""Layouts with a table, written down by hand."""

import torch

from nld_train.objective.noise import Corruption
from nld_train.objective.sequence import SequenceLayout, build_joint_batch


def table_layout(block_size: int, documents: list[list[int]], noisy: list[list[range]] | None) -> SequenceLayout:
    """By way of build_joint_batch, per sequence: the lengths of its documents, the places of its noisy blocks."""
    starts = torch.tensor([[sum(d[:i]) for i, n in enumerate(d) for _ in range(n)] for d in documents])
    corruption = None
    if noisy is not None:
        rows = [[(place, number) for number, block in enumerate(blocks) for place in block] for blocks in noisy]
        num_rows = max(len(of_sequence) for of_sequence in rows)
        padded = torch.tensor([r + [(-1, -1)] * (num_rows - len(r)) for r in rows], dtype=torch.int64)
        places, blocks = padded.view(len(rows), num_rows, 2).unbind(2)
        corruption = Corruption(
            noisy_tokens=torch.zeros_like(places),
            places=places,
            blocks=blocks,
            weights=torch.zeros(places.shape, dtype=torch.float64),
            mask_ratios=torch.zeros(places.shape),
            sequence_ratios=torch.zeros(len(rows), dtype=torch.float64),
        )
    tokens = torch.zeros_like(starts)
    return build_joint_batch(tokens, tokens, tokens.bool(), corruption, block_size, document_starts=starts).layout
