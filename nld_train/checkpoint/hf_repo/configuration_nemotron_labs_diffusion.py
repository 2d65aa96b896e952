"""Configuration of a Nemotron-Labs-Diffusion checkpoint: Ministral3's fields and those of the diffusion objective."""

from typing import Any

from transformers import Ministral3Config


class NemotronLabsDiffusionConfig(Ministral3Config):
    """A Ministral3 decoder with an untied head, trained to predict the next token and to denoise masked blocks.

    All fields of ``Ministral3Config`` (``rope_parameters`` holds the values the weights were trained with), and:

    Args:
        mask_token_id: id that stands for a position still to be filled; never produced by any decoding mode.
        block_size: tokens denoised together; the default block length of decoding.
        dlm_paradigm: attention inside a noisy block; published checkpoints say ``"bidirectional"``.
        dlm_loss_weight: weight of the diffusion loss in training (alpha).
        ar_loss_weight: weight of the next-token loss in training.
        dp_varying_mask_ratio: whether data-parallel ranks drew different noise levels in training.

    Raises:
        ValueError: tied embeddings, a sliding window, an impossible ``block_size`` or ``mask_token_id``.
    """

    model_type = "nemotron_labs_diffusion"

    mask_token_id: int = 100
    block_size: int = 32
    dlm_paradigm: str = "bidirectional"
    dlm_loss_weight: float | int | None = 0.3
    ar_loss_weight: float | int | None = 1.0
    dp_varying_mask_ratio: bool | None = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings: True; the output head of this model is never tied, set it to false")
        if self.sliding_window is not None:
            raise ValueError(
                f"sliding_window: {self.sliding_window}; this model attends to all positions, set it to null"
            )
        if self.block_size < 1:
            raise ValueError(f"block_size: {self.block_size}; it must be at least 1")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"mask_token_id: {self.mask_token_id}; it must be one of the ids 0..{self.vocab_size - 1} (vocab_size)"
            )


__all__ = ["NemotronLabsDiffusionConfig"]
