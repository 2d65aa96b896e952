"""What the model reads: the clean tokens alone, or the doubled sequence [noisy | clean].

Dimensions: B sequences, L clean tokens per sequence, S rows of the model's input (L, or 2L with a noisy half).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nld_train.objective.noise import Corruption


@dataclass(frozen=True, slots=True)
class SequenceLayout:
    """What each of the S rows of the model's input is; hashable, equal layouts share their masks and tables.

    Args:
        clean_length: L, clean tokens of a sequence.
        block_size: tokens of a diffusion block; divides L.
        has_noisy_half: True: rows 0..L-1 are the noisy copy, rows L..2L-1 the clean tokens. False: L clean rows.
    """

    clean_length: int
    block_size: int
    has_noisy_half: bool

    def __post_init__(self) -> None:
        if self.clean_length <= 0 or self.block_size <= 0 or self.clean_length % self.block_size:
            raise ValueError(
                f"block_size {self.block_size} must be positive and divide the sequence length {self.clean_length}"
            )

    @property
    def num_halves(self) -> int:
        return 2 if self.has_noisy_half else 1

    @property
    def num_rows(self) -> int:
        """S."""
        return self.num_halves * self.clean_length

    def position_ids(self, device: torch.device | str = "cpu") -> Tensor:
        """int64 [S]: the position of each row *inside its half*, 0..L-1 once or twice."""
        return torch.arange(self.clean_length, device=device).repeat(self.num_halves)


@dataclass(slots=True, kw_only=True)
class JointBatch:
    """One micro-batch as the model and the loss see it.

    ``tokens`` int64 [B, S]: the model's input. ``targets`` int64 [B, S]: on noisy rows the clean token of the same
    position (no shift), on clean rows the next token. ``diffusion_weights`` float64 [B, L] (None without a noisy
    half): 1/p_mask where the token was replaced, else 0. ``ar_weights`` float64 [B, L]: 1 where the next token is
    supervised, else 0.
    """

    layout: SequenceLayout
    tokens: Tensor
    targets: Tensor
    ar_weights: Tensor
    diffusion_weights: Tensor | None

    def row_weights(self, diffusion_loss_weight: float) -> Tensor:
        """float64 [B, S]: what each row's cross-entropy is multiplied by in L = L_AR + alpha * L_diff."""
        if self.diffusion_weights is None:
            return self.ar_weights
        return torch.cat([diffusion_loss_weight * self.diffusion_weights, self.ar_weights], dim=1)

    def to(self, device: torch.device) -> "JointBatch":
        """The same batch on ``device``."""
        return JointBatch(
            layout=self.layout,
            tokens=self.tokens.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            ar_weights=self.ar_weights.to(device, non_blocking=True),
            diffusion_weights=None
            if self.diffusion_weights is None
            else self.diffusion_weights.to(device, non_blocking=True),
        )


def build_joint_batch(
    tokens: Tensor, labels: Tensor, loss_mask: Tensor, corruption: Corruption | None, block_size: int
) -> JointBatch:
    """Lay out one micro-batch.

    Args:
        tokens: int64 [B, L], the clean tokens.
        labels: int64 [B, L], the next token of each position.
        loss_mask: float or bool [B, L], 1 where the next token is supervised.
        corruption: the noisy copy; None for a stage with alpha = 0, which runs the clean tokens alone.
        block_size: tokens of a diffusion block.
    """
    layout = SequenceLayout(tokens.shape[1], block_size, has_noisy_half=corruption is not None)
    ar_weights = loss_mask.to(torch.float64)
    if corruption is None:
        return JointBatch(layout=layout, tokens=tokens, targets=labels, ar_weights=ar_weights, diffusion_weights=None)
    return JointBatch(
        layout=layout,
        tokens=torch.cat([corruption.noisy_tokens, tokens], dim=1),
        targets=torch.cat([tokens, labels], dim=1),
        ar_weights=ar_weights,
        diffusion_weights=corruption.is_noised.to(torch.float64) / corruption.p_mask,
    )
