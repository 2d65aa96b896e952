"""The block mask: against its drawing, against the table written as loops, and in its three forms."""

import gc
import weakref
from itertools import pairwise

import pytest
import torch

from nld_train.objective.masks import block_mask_function, cached_by_layout, dense_block_mask, flex_block_mask
from nld_train.objective.sequence import SequenceLayout
from nld_train.testing.layouts import table_layout

CPU = torch.device("cpu")


def may_attend(query_row: int, key_row: int, length: int, block_size: int) -> bool:
    """The table of the objective, one row of it per branch."""
    query_half, query_position = divmod(query_row, length)
    key_half, key_position = divmod(key_row, length)
    query_is_noisy, key_is_noisy = query_half == 0, key_half == 0
    if query_is_noisy and key_is_noisy:
        return query_position // block_size == key_position // block_size
    if query_is_noisy:
        return key_position // block_size < query_position // block_size
    if key_is_noisy:
        return False
    return key_position <= query_position


def drawing(size: int) -> torch.Tensor:
    """bool [size, size]: the picture with so many rows in the docstring of block_mask_function."""
    lines = (block_mask_function.__doc__ or "").splitlines()
    rows = ["".join(line.split()[2:]) for line in lines if line.split()[:1] in (["noisy"], ["clean"])]
    picture = [row for row in rows if set(row) <= set("#.") and len(row) == size]
    return torch.tensor([[mark == "#" for mark in row] for row in picture])


def test_mask_is_the_one_drawn_in_its_docstring():
    picture = drawing(16)
    assert picture.shape == (16, 16)
    assert torch.equal(dense_block_mask(SequenceLayout(8, 4, has_noisy_half=True), CPU), picture)


def test_mask_of_a_table_is_the_one_drawn_in_its_docstring():
    """The second sequence has a noisy row more, which makes the first's last row padding."""
    first, second = [range(2, 4), range(4, 5), range(7, 8)], [range(2), range(2, 4), range(4, 5)]
    layout = table_layout(2, [[5, 3], [5, 3]], [first, second])
    mask = dense_block_mask(layout, CPU)
    assert mask.shape == (2, 1, 13, 13)
    assert torch.equal(mask[0, 0], drawing(13))


TABLES = [  # block size, documents, noisy blocks
    (2, [[5, 3]], [[range(2, 4), range(4, 5), range(7, 8)]]),
    (4, [[7, 1, 1, 11], [20]], [[range(4), range(7, 8), range(9, 13)], [range(16, 20)]]),  # second: padding
    (3, [[9], [4, 5]], [[range(3), range(6, 9)] * 2, [range(3), range(3, 4)]]),  # two copies
    (3, [[9], [4, 5]], [[], [range(3)]]),
    (4, [[6, 4], [10]], None),
]


@pytest.mark.parametrize(("block_size", "documents", "noisy"), TABLES)
def test_mask_of_a_table_equals_the_rule_written_as_loops(block_size, documents, noisy):
    """From the documents and blocks themselves, not from the table that is built of them."""
    layout = table_layout(block_size, documents, noisy)
    mask = dense_block_mask(layout, CPU)
    num_noisy, length = layout.num_noisy_rows, layout.clean_length
    expected = torch.zeros(len(documents), 1, layout.num_rows, layout.num_rows, dtype=torch.bool)
    for sequence, lengths in enumerate(documents):
        bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        document = [number for number, (start, stop) in enumerate(pairwise(bounds)) for _ in range(start, stop)]
        blocks = [(block, place) for block in (noisy[sequence] if noisy else []) for place in block]
        numbers = [n for n, block in enumerate(noisy[sequence] if noisy else []) for _ in block]
        for row in range(layout.num_rows):
            for column in range(layout.num_rows):
                if row < num_noisy and row >= len(blocks):
                    allowed = row == column
                elif row < num_noisy and column < num_noisy:
                    allowed = column < len(blocks) and numbers[row] == numbers[column]
                elif row < num_noisy:
                    block, place = blocks[row]
                    allowed = document[place] == document[column - num_noisy] and column - num_noisy < block[0]
                else:
                    same = column >= num_noisy and document[row - num_noisy] == document[column - num_noisy]
                    allowed = same and column <= row
                expected[sequence, 0, row, column] = allowed
    assert length == sum(documents[0])
    assert torch.equal(mask, expected)
    assert mask.any(dim=-1).all()


def test_flex_mask_of_a_table_covers_exactly_the_tiles_with_an_allowed_pair():
    blocks = [range(start, min(start + 32, 200)) for start in range(0, 200, 32)]
    layout = table_layout(32, [[200, 120], [320]], [blocks, blocks[2:4]])
    dense = dense_block_mask(layout, CPU)
    padding = -layout.num_rows % 128
    padded = torch.nn.functional.pad(dense, (0, padding, 0, padding))
    tiles = padded.unflatten(2, (-1, 128)).unflatten(4, (-1, 128)).any(dim=5).any(dim=3)
    block_mask = flex_block_mask(layout, CPU)
    assert torch.equal(block_mask.to_dense().bool(), tiles)
    rows, head = torch.arange(layout.num_rows), torch.zeros((), dtype=torch.int64)
    sequences = torch.arange(2)[:, None, None]
    assert torch.equal(block_mask.mask_mod(sequences, head, rows[:, None], rows[None, :]), dense[:, 0])


@pytest.mark.parametrize("build", [dense_block_mask, flex_block_mask])
def test_masks_of_a_table_are_shared_by_layers_and_freed_with_it(build):
    layout = table_layout(4, [[20]], [[range(4)]])
    mask = build(layout, CPU)
    assert build(layout, CPU) is mask
    assert build(table_layout(4, [[20]], [[range(4)]]), CPU) is not mask
    table = layout.table
    assert table is not None
    held = [weakref.ref(x) for x in (mask, table.blocks, table.first_keys, table.end_keys)]
    del layout, mask, table
    gc.collect()
    assert [x() for x in held] == [None] * 4


def test_results_are_kept_by_layout_and_argument():
    calls = []
    cached = cached_by_layout(lambda layout, name: calls.append(name) or object())
    for layout in (SequenceLayout(8, 4, has_noisy_half=True), table_layout(4, [[20]], [[range(4)]])):
        assert cached(layout, "a") is cached(layout, "a")
        assert cached(layout, "a") is not cached(layout, "b")
    assert calls == ["a", "b"] * 2


@pytest.mark.parametrize(("length", "block_size"), [(8, 4), (8, 2), (8, 1), (8, 8), (12, 3), (96, 48), (40, 5)])
def test_dense_mask_equals_the_table(length: int, block_size: int):
    mask = dense_block_mask(SequenceLayout(length, block_size, has_noisy_half=True), CPU)
    table = [[may_attend(row, column, length, block_size) for column in range(2 * length)] for row in range(2 * length)]
    assert mask.dtype == torch.bool
    assert torch.equal(mask, torch.tensor(table))
    assert mask.any(dim=1).all()  # a row without keys would be NaN after the softmax


def test_without_noisy_half_the_mask_is_causal_and_equals_the_clean_corner():
    causal = dense_block_mask(SequenceLayout(24, 4, has_noisy_half=False), CPU)
    assert torch.equal(causal, torch.ones(24, 24, dtype=torch.bool).tril())
    assert torch.equal(causal, dense_block_mask(SequenceLayout(24, 4, has_noisy_half=True), CPU)[24:, 24:])


@pytest.mark.parametrize("has_noisy_half", [True, False])
@pytest.mark.parametrize(("length", "block_size"), [(256, 32), (320, 16), (1024, 32)])
def test_flex_tiles_cover_exactly_the_tiles_with_an_allowed_pair(length: int, block_size: int, has_noisy_half: bool):
    layout = SequenceLayout(length, block_size, has_noisy_half)
    block_mask = flex_block_mask(layout, CPU)
    dense = dense_block_mask(layout, CPU)
    tile = 128
    padding = -dense.shape[0] % tile
    padded = torch.nn.functional.pad(dense, (0, padding, 0, padding))
    tiles = padded.unflatten(0, (-1, tile)).unflatten(2, (-1, tile)).any(dim=3).any(dim=1)
    assert torch.equal(block_mask.to_dense()[0, 0].bool(), tiles)
    rows = torch.arange(layout.num_rows)
    batch = head = torch.zeros((), dtype=torch.int64)
    assert torch.equal(block_mask.mask_mod(batch, head, rows[:, None], rows[None, :]), dense)


def test_equal_layouts_share_one_mask():
    first = dense_block_mask(SequenceLayout(16, 4, has_noisy_half=True), CPU)
    again = dense_block_mask(SequenceLayout(16, 4, has_noisy_half=True), torch.device("cpu"))
    assert first is again
    assert dense_block_mask(SequenceLayout(16, 2, has_noisy_half=True), CPU) is not first
    layout = SequenceLayout(128, 4, has_noisy_half=True)
    assert flex_block_mask(layout, CPU) is flex_block_mask(SequenceLayout(128, 4, has_noisy_half=True), CPU)


def test_a_mask_first_built_in_inference_mode_is_an_ordinary_tensor():
    with torch.inference_mode():
        mask = dense_block_mask(SequenceLayout(20, 5, has_noisy_half=True), CPU)
    assert not mask.is_inference()


@pytest.mark.parametrize(("length", "block_size"), [(8, 3), (8, 0), (0, 4), (8, -4), (8, 16)])
def test_layout_refuses_blocks_that_do_not_divide_the_sequence(length: int, block_size: int):
    with pytest.raises(ValueError, match=f"block_size {block_size} .* {length}"):
        SequenceLayout(length, block_size, has_noisy_half=True)
