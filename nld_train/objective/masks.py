"""Block masking: which row of the model's input may attend to which.

One predicate, three forms: a function of indices (what flex_attention wants), a dense boolean matrix (the reference and
small diagonal blocks), and flex_attention's BlockMask. The last two are built once per (layout, device) and shared by
all layers, so they must not be written to.

Dimensions: B block size here, L clean tokens of a sequence, S rows of the model's input (L, or 2L with a noisy half).
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from nld_train.objective.sequence import SequenceLayout

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query row, key row), integer tensors that broadcast -> bool tensor: True where attention is allowed."""

# Stage changes and validation alternate between two or three layouts; a dense mask of 2 x 4096 rows takes 64 MiB.
_CACHED_LAYOUTS = 8


def block_mask_function(layout: SequenceLayout) -> MaskFunction:
    """The rule itself; batch and head are ignored.

    A noisy row sees its own noisy block, both directions, and the clean tokens of earlier blocks; a clean row sees
    clean tokens up to itself. The clean half is therefore an ordinary causal run: without a noisy half this is the
    causal mask. For L = 8 and B = 4 (rows are queries, columns keys, # may attend)::

                     noisy     clean
                   01234567  01234567
        noisy  0   ####....  ........
        noisy  1   ####....  ........
        noisy  2   ####....  ........
        noisy  3   ####....  ........
        noisy  4   ....####  ####....
        noisy  5   ....####  ####....
        noisy  6   ....####  ####....
        noisy  7   ....####  ####....
        clean  0   ........  #.......
        clean  1   ........  ##......
        clean  2   ........  ###.....
        clean  3   ........  ####....
        clean  4   ........  #####...
        clean  5   ........  ######..
        clean  6   ........  #######.
        clean  7   ........  ########
    """
    length, block_size = layout.clean_length, layout.block_size

    def causal(batch: Tensor, head: Tensor, query_row: Tensor, key_row: Tensor) -> Tensor:
        return key_row <= query_row

    def block(batch: Tensor, head: Tensor, query_row: Tensor, key_row: Tensor) -> Tensor:
        query_is_clean, key_is_clean = query_row >= length, key_row >= length
        query_block, key_block = query_row % length // block_size, key_row % length // block_size
        own_noisy_block = ~query_is_clean & ~key_is_clean & (key_block == query_block)
        clean_prefix = ~query_is_clean & key_is_clean & (key_block < query_block)
        clean_causal = query_is_clean & key_is_clean & (key_row <= query_row)
        return own_noisy_block | clean_prefix | clean_causal

    return block if layout.has_noisy_half else causal


@lru_cache(maxsize=_CACHED_LAYOUTS)
@torch.inference_mode(False)  # a cached inference tensor could not be saved for a later backward pass
def dense_block_mask(layout: SequenceLayout, device: torch.device) -> Tensor:
    """bool [S, S] on ``device``, True where the row (query) may attend to the column (key). Shared: do not write."""
    rows = torch.arange(layout.num_rows, device=device)
    unused = rows.new_zeros(())
    return block_mask_function(layout)(unused, unused, rows[:, None], rows[None, :])


@lru_cache(maxsize=_CACHED_LAYOUTS)
@torch.inference_mode(False)
def flex_block_mask(layout: SequenceLayout, device: torch.device) -> BlockMask:
    """flex_attention's tile table of the same mask, for any batch size and number of heads."""
    return create_block_mask(
        block_mask_function(layout), B=None, H=None, Q_LEN=layout.num_rows, KV_LEN=layout.num_rows, device=device
    )
