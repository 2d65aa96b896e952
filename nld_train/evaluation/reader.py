"""A text read once by an exported model, and noisy rows evaluated against it.

L clean tokens read, N noisy rows of one forward, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


class CleanPrefix:
    """Clean tokens in a cache; noisy rows see as much of them as they may, and leave no trace.

    Args:
        model: an exported model, see :func:`nld_train.evaluation.decoding.load_export`.

    Attributes:
        num_tokens: L, clean tokens read so far.
        num_forwards: evaluations of the decoder stack so far.
    """

    def __init__(self, model: Any) -> None:
        self.num_tokens = 0
        self.num_forwards = 0
        self._model = model
        self._cache = DynamicCache(config=model.config)

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """Read int64 [n] left to right; fp32 log-probabilities [n, V] of what follows each of them."""
        self.num_forwards += 1
        # Not `cache`: code in a folder may be older than that name, and would leave the cache empty without a word.
        logits = self._model(tokens[None], past_key_values=self._cache, use_cache=True).logits[0]
        self.num_tokens += len(tokens)
        return self._log_probabilities(logits)

    @torch.no_grad()
    def denoise(self, tokens: Tensor, places: Tensor, blocks: Tensor, num_seen: Tensor) -> Tensor:
        """Evaluate noisy rows in one forward.

        Args:
            tokens: int64 [N], the mask token where a row is open.
            places: int64 [N], position of each row in the text.
            blocks: int64 [N], rows of the same block see one another.
            num_seen: int64 [N], so many of the clean tokens a row sees, from the first on.

        Returns:
            fp32 log-probabilities [N, V] of the rows' own tokens
        """
        self.num_forwards += 1
        clean = torch.arange(self.num_tokens, device=tokens.device)
        allowed = torch.cat([clean[None, :] < num_seen[:, None], blocks[:, None] == blocks[None, :]], dim=1)
        logits = self._model(
            tokens[None],
            attention_mask=allowed[None, None],
            position_ids=places[None],
            past_key_values=self._cache,
            use_cache=True,
        ).logits[0]
        self._cache.crop(-len(tokens))
        return self._log_probabilities(logits)

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        """As in decoding, the mask token is never an answer."""
        logits = logits.float()
        logits[:, self._model.config.mask_token_id] = -torch.inf
        return logits.log_softmax(dim=-1)
