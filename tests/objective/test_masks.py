"""The block mask: against its drawing, against the table written as loops, and in its three forms."""

import pytest
import torch

from nld_train.objective.masks import block_mask_function, dense_block_mask, flex_block_mask
from nld_train.objective.sequence import SequenceLayout

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


def drawing() -> torch.Tensor:
    """bool [16, 16]: the picture in the docstring of block_mask_function."""
    lines = (block_mask_function.__doc__ or "").splitlines()
    rows = ["".join(line.split()[2:]) for line in lines if line.split()[:1] in (["noisy"], ["clean"])]
    picture = [row for row in rows if set(row) <= set("#.") and row]
    return torch.tensor([[mark == "#" for mark in row] for row in picture])


def test_mask_is_the_one_drawn_in_its_docstring():
    picture = drawing()
    assert picture.shape == (16, 16)
    assert torch.equal(dense_block_mask(SequenceLayout(8, 4, has_noisy_half=True), CPU), picture)


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
