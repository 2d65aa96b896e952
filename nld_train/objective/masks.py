"""Block masking: which row of the model's input may attend to which.

One predicate, three forms: a function of indices (what flex_attention wants), a dense boolean matrix (the reference and
small diagonal blocks), and flex_attention's BlockMask. The last two are built once per (layout, device) and shared by
all layers, so they must not be written to.

Dimensions: B sequences, L clean tokens of a sequence, N noisy rows, S = N + L rows of the model's input. Keys are the
rows; those of a context rank's shard are its N noisy rows and all L clean tokens.
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TypeVar, TypeVarTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils.weak import WeakIdKeyDictionary

from nld_train.objective.sequence import RowTable, SequenceLayout

Key = TypeVarTuple("Key")
Value = TypeVar("Value")

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query row, key row), integer tensors that broadcast -> bool tensor: True where attention is allowed."""

# Stage changes and validation alternate between two or three layouts; a dense mask of 2 x 4096 rows takes 64 MiB.
_CACHED_LAYOUTS = 8


def cached_by_layout(
    build: Callable[[SequenceLayout, *Key], Value],
) -> Callable[[SequenceLayout, *Key], Value]:
    """Every layer asks for the same thing: keep what ``build(layout, *hashable)`` returned.

    Equal layouts without a table share the last few results. Those of a layout with a table live as long as the table,
    so a micro-batch's are freed with it; a result must therefore not hold the table's own tensors.
    """
    of_plain = lru_cache(maxsize=_CACHED_LAYOUTS)(build)
    # A RowTable takes no weak references. Its ``end_keys`` stand for it: no two tables share them.
    of_tables = WeakIdKeyDictionary()

    @wraps(build)
    def cached(layout: SequenceLayout, *key: *Key) -> Value:
        if layout.table is None:
            return of_plain(layout, *key)
        results: dict[tuple[*Key], Value] = of_tables.setdefault(layout.table.end_keys, {})
        if key not in results:
            results[key] = build(layout, *key)
        return results[key]

    return cached


def block_mask_function(layout: SequenceLayout) -> MaskFunction:
    """The rule itself; head is ignored, and so is batch without a table.

    A noisy row sees its own noisy block, both directions, and the clean tokens of earlier blocks; a clean row sees
    clean tokens up to itself. The clean half is therefore an ordinary causal run: without a noisy half this is the
    causal mask. For L = 8 and blocks of 4 (rows are queries, columns keys, # may attend)::

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

    With a table the same holds inside each document, for the blocks that are there. L = 8, documents of 5 and 3 tokens,
    blocks of 2, of which {2, 3}, {4} and {7} are noisy, and a padding row (numbers are places)::

                     noisy  clean
                   2347-  01234567
        noisy  2   ##...  ##......
        noisy  3   ##...  ##......
        noisy  4   ..#..  ####....
        noisy  7   ...#.  .....##.
        noisy  -   ....#  ........
        clean  0   .....  #.......
        clean  1   .....  ##......
        clean  2   .....  ###.....
        clean  3   .....  ####....
        clean  4   .....  #####...
        clean  5   .....  .....#..
        clean  6   .....  .....##.
        clean  7   .....  .....###
    """
    if layout.table is not None:
        return _table_mask_function(layout.table, layout.num_noisy_rows, layout.clean_length)
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


def _table_mask_function(table: RowTable, num_noisy_rows: int, clean_length: int) -> MaskFunction:
    # Copies, as cached_by_layout wants them, and tensors only: a number that differs from micro-batch to micro-batch
    # would make torch.compile start again.
    blocks, first_keys, end_keys = (x.to(torch.int32) for x in (table.blocks, table.first_keys, table.end_keys))
    places = torch.arange(-num_noisy_rows, clean_length, dtype=torch.int32, device=blocks.device)
    # A shard has fewer rows than keys. Clean keys are told by their places; that all have block -1 does not matter.
    key_blocks = torch.nn.functional.pad(blocks, (0, len(places) - blocks.shape[1]), value=-1)

    def of_table(batch: Tensor, head: Tensor, query_row: Tensor, key_row: Tensor) -> Tensor:
        place = places[key_row]  # negative for noisy keys, which no range of clean ones contains
        is_own_block = (place < 0) & (blocks[batch, query_row] == key_blocks[batch, key_row])
        return is_own_block | (first_keys[batch, query_row] <= place) & (place < end_keys[batch, query_row])

    return of_table


@cached_by_layout
@torch.inference_mode(False)  # a cached inference tensor could not be saved for a later backward pass
def dense_block_mask(layout: SequenceLayout, device: torch.device) -> Tensor:
    """bool [S, S], or [B, 1, S, N + L] with a table (which lies on ``device``, as the mask does): True where the row
    (query) may attend to the column (key). Shared: do not write."""
    rows = torch.arange(layout.num_rows, device=device)
    keys = torch.arange(layout.num_keys, device=device)
    unused = rows.new_zeros(())
    if layout.table is None:
        return block_mask_function(layout)(unused, unused, rows[:, None], keys[None, :])
    sequences = torch.arange(layout.table.blocks.shape[0], device=device)[:, None, None, None]
    return block_mask_function(layout)(sequences, unused, rows[:, None], keys[None, :])


@cached_by_layout
@torch.inference_mode(False)
def flex_block_mask(layout: SequenceLayout, device: torch.device) -> BlockMask:
    """flex_attention's tile table of the same mask, for any number of heads, and any batch size without a table."""
    num_sequences = None if layout.table is None else layout.table.blocks.shape[0]
    return create_block_mask(
        block_mask_function(layout),
        B=num_sequences,
        H=None,
        Q_LEN=layout.num_rows,
        KV_LEN=layout.num_keys,
        device=device,
    )
