"""Rotary tables and query scaling, bit for bit against transformers' Ministral3."""

import dataclasses
import gc
import math
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import Ministral3Config
from transformers.models.ministral3.modeling_ministral3 import (
    Ministral3RotaryEmbedding,
    apply_rotary_pos_emb,
    get_llama_4_attn_scale,
)

from nld_train.config.schema import RopeConfig
from nld_train.model import rope
from nld_train.model.rope import RotaryEmbedding
from nld_train.objective.sequence import RowTable, SequenceLayout
from nld_train.platform import compilation
from nld_train.testing.fixtures import needs_compiler
from nld_train.testing.jobs import importing_project

CPU = torch.device("cpu")


def transformers_rope(config: RopeConfig, head_dim: int) -> Ministral3RotaryEmbedding:
    return Ministral3RotaryEmbedding(
        Ministral3Config(
            hidden_size=4 * head_dim,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=head_dim,
            rope_parameters={"rope_type": "yarn", **dataclasses.asdict(config)},
        )
    )


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("config", "head_dim"),
    [
        (RopeConfig(), 128),
        (RopeConfig(rope_theta=1e9), 128),
        (RopeConfig(), 16),
        (RopeConfig(), 6),
        (RopeConfig(), 80),
        (RopeConfig(rope_theta=1e9), 36),
        (RopeConfig(factor=1.0), 64),
        (RopeConfig(factor=0.25, original_max_position_embeddings=4096), 128),
        (RopeConfig(mscale=0.5, mscale_all_dim=2.0), 64),
        (RopeConfig(mscale=0.0), 64),
        (RopeConfig(rope_theta=2.0, original_max_position_embeddings=64), 64),
        (RopeConfig(beta_fast=3.0, beta_slow=2.9), 64),
        (RopeConfig(original_max_position_embeddings=6, beta_fast=4.0, rope_theta=1e4), 64),
    ],
    ids=str,
)
def test_tables_are_bit_equal_to_transformers(config: RopeConfig, head_dim: int, dtype: torch.dtype):
    length = 20001
    tables = RotaryEmbedding(config, head_dim).tables(length, CPU, dtype)
    positions = torch.arange(length)[None]
    cos, sin = transformers_rope(config, head_dim)(torch.empty(0, dtype=dtype), positions)
    assert_same_bits(tables.cos, cos[0])
    assert_same_bits(tables.sin, sin[0])


def test_mscale_changes_the_attention_factor():
    assert RotaryEmbedding(RopeConfig(), 64).attention_factor == 1.0
    unequal = RotaryEmbedding(RopeConfig(mscale=0.5, mscale_all_dim=2.0), 64)
    assert unequal.attention_factor == pytest.approx(1.1386294 / 1.5545177, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("original", "length"), [(16384, 16386), (10, 64), (7, 50)])
def test_query_scale_on_both_sides_of_its_steps(original: int, length: int, dtype: torch.dtype):
    config = RopeConfig(original_max_position_embeddings=original)
    scale = RotaryEmbedding(config, 64).tables(length, CPU, dtype).query_scale
    assert scale is not None
    expected = get_llama_4_attn_scale(torch.arange(length)[None], config.llama_4_scaling_beta, original)
    assert_same_bits(scale, expected[0, 0, :, 0].to(dtype))
    assert (scale[:original] == 1).all()
    assert scale[original] == torch.tensor(1 + 0.1 * math.log(2.0)).to(dtype)


def test_no_query_scale_within_the_original_length():
    assert RotaryEmbedding(RopeConfig(), 64).tables(16384, CPU, torch.float32).query_scale is None
    assert (
        RotaryEmbedding(RopeConfig(llama_4_scaling_beta=0.0), 64).tables(20000, CPU, torch.float32).query_scale is None
    )


@pytest.mark.parametrize("has_noisy_half", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_apply_equals_transformers_in_values_and_gradients(dtype: torch.dtype, has_noisy_half: bool):
    """Including the rounding; the second half starts again at position 0."""
    config, head_dim = RopeConfig(original_max_position_embeddings=8, mscale=0.5), 16
    layout = SequenceLayout(24, 4, has_noisy_half)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    query, key = (random(layout.num_rows, 3, heads, head_dim).requires_grad_() for heads in (4, 2))
    grads = [random(layout.num_rows, 3, heads, head_dim) for heads in (4, 2)]
    rotated = RotaryEmbedding(config, head_dim).apply(query, key, layout)
    actual = [*rotated, *torch.autograd.grad(rotated, (query, key), grads)]

    positions = layout.position_ids()[None]
    cos, sin = transformers_rope(config, head_dim)(query, positions)
    query_t, key_t = (x.permute(1, 2, 0, 3) for x in (query, key))
    query_t, key_t = apply_rotary_pos_emb(query_t, key_t, cos, sin)
    query_t = query_t * get_llama_4_attn_scale(positions, config.llama_4_scaling_beta, 8).to(dtype)
    reference = [query_t.permute(2, 0, 1, 3), key_t.permute(2, 0, 1, 3)]
    reference += torch.autograd.grad(reference, (query, key), grads)
    for a, b in zip(actual, reference, strict=True):
        assert_same_bits(a, b)
    assert all(x.is_contiguous() for x in rotated)


def layout_at(position_ids: torch.Tensor, length: int) -> SequenceLayout:
    """Only the positions matter here."""
    unused = [torch.zeros_like(position_ids) for _ in range(3)]
    table = RowTable(position_ids, *unused)
    return SequenceLayout(length, 4, has_noisy_half=position_ids.shape[1] > length, table=table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_of_a_table_turn_as_rows_of_a_plain_layout_at_the_same_positions(dtype: torch.dtype):
    """Bit for bit, gradients too, with the steps of the query scale at multiples of 8."""
    rotary = RotaryEmbedding(RopeConfig(original_max_position_embeddings=8, mscale=0.5), 16)
    generator = torch.Generator().manual_seed(0)
    length, num_rows = 24, 31
    positions = torch.randint(length, (3, num_rows), generator=generator)
    query, key = (
        torch.randn(num_rows, 3, heads, 16, generator=generator).to(dtype).requires_grad_() for heads in (4, 2)
    )
    grads = [torch.randn(x.shape, generator=generator).to(dtype) for x in (query, key)]
    layout = layout_at(positions, length)
    rotated = rotary.apply(query, key, layout)
    actual = [*rotated, *torch.autograd.grad(rotated, (query, key), grads)]
    assert all(x.is_contiguous() for x in rotated)

    plain = SequenceLayout(length, 4, has_noisy_half=False)
    for row in range(num_rows):
        for sequence in range(3):
            place = positions[sequence, row]

            def alone(x: torch.Tensor, place=place, row=row, sequence=sequence) -> torch.Tensor:
                """[L, 1, heads, D] with the row at its position."""
                return torch.zeros(length, 1, *x.shape[2:], dtype=x.dtype).index_copy(
                    0, place[None], x[row, None, sequence, None]
                )

            rows = [alone(x.detach()).requires_grad_() for x in (query, key)]
            expected = list(rotary.apply(rows[0], rows[1], plain))
            expected += torch.autograd.grad(expected, rows, [alone(x) for x in grads])
            for a, b in zip(actual, expected, strict=True):
                assert_same_bits(a[row, sequence], b[place, 0])


def test_tables_of_rows_are_gathered_once_and_freed_with_their_positions():
    rotary = RotaryEmbedding(RopeConfig(), 8)
    with torch.inference_mode():
        layout = layout_at(torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0]]), 8)
        assert layout.table is not None
        tables = rotary.row_tables(layout.table, 8, torch.float32)
    assert not tables.cos.is_inference()
    assert rotary.row_tables(layout.table, 8, torch.float32) is tables
    assert rotary.row_tables(layout.table, 8, torch.bfloat16) is not tables
    assert tables.query_scale is None
    angles = rotary._angles(tables, 1)
    assert rotary._angles(tables, 1) is angles
    held = [weakref.ref(x) for x in (tables.cos, layout.table.position_ids, angles.sin)]
    del tables, layout, angles
    gc.collect()
    assert [x() for x in held] == [None] * 3


def test_apply_takes_strided_slices_of_a_fused_projection():
    layout = SequenceLayout(8, 4, has_noisy_half=True)
    fused = torch.randn(16, 2, 6 * 8, generator=torch.Generator().manual_seed(0))
    query, key, _ = (x.unflatten(-1, (2, 8)) for x in fused.chunk(3, dim=-1))
    assert not query.is_contiguous()
    rotary = RotaryEmbedding(RopeConfig(), 8)
    for a, b in zip(
        rotary.apply(query, key, layout), rotary.apply(query.contiguous(), key.contiguous(), layout), strict=True
    ):
        assert torch.equal(a, b)


def test_the_compiled_form_turns_one_copy_after_two_and_two_after_one(monkeypatch: pytest.MonkeyPatch):
    """As at a change of stages: layouts of one length share their tables, not the rows that the compiled form reads."""
    monkeypatch.setattr(rope, "run_compiled", lambda passes, *arguments: passes(*arguments))
    for order in ((True, False), (False, True)):
        eager, compiled = (RotaryEmbedding(RopeConfig(), 8, is_compiled=form) for form in (False, True))
        for has_noisy_half in order:
            layout = SequenceLayout(8, 4, has_noisy_half)
            query, key = (torch.randn(layout.num_rows, 3, heads, 8) for heads in (4, 2))
            found, expected = (form.apply(query, key, layout) for form in (compiled, eager))
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a, b)


COMPILED_IN = [torch.float32, *(pytest.param(x, marks=pytest.mark.long) for x in (torch.bfloat16, torch.float64))]


@needs_compiler
@pytest.mark.parametrize("dtype", COMPILED_IN, ids=str)
def test_compiled_for_the_cpu(dtype: torch.dtype):
    """Of every layout, number of sequences and heads; the last two are slices of a fused projection. One graph, and one
    more where a row has a single head. Products are rounded once, and in float32 as before."""
    config = RopeConfig(original_max_position_embeddings=8)
    eager, compiled = RotaryEmbedding(config, 16), RotaryEmbedding(config, 16, is_compiled=True)
    generator = torch.Generator().manual_seed(0)
    torch._dynamo.reset()
    compilation._compiled.cache_clear()
    counters.clear()
    for length, num_sequences, heads, has_table in (
        (24, 3, (4, 2), False),
        (24, 3, (4, 2), True),
        (16, 1, (4, 2), False),
        (16, 1, (4, 2), True),
        (8, 2, (2, 1), True),
        (1, 1, (2, 2), False),
    ):
        positions = torch.randint(length, (num_sequences, 2 * length - 1), generator=generator)
        layout = layout_at(positions, length) if has_table else SequenceLayout(length, 1, length > 1)
        fused = torch.randn(layout.num_rows, num_sequences, sum(heads) * 16, generator=generator).to(dtype)
        query, key = (x.unflatten(-1, (-1, 16)).requires_grad_() for x in fused.split([16 * n for n in heads], dim=-1))
        grads = [torch.randn(x.permute(1, 2, 0, 3).shape, generator=generator).to(dtype) for x in (query, key)]
        grads = [x.permute(2, 0, 1, 3) for x in grads]
        found, expected = (
            [*rotated, *torch.autograd.grad(rotated, (query, key), grads)]
            for rotated in (form.apply(query, key, layout) for form in (compiled, eager))
        )
        for a, b in zip(found, expected, strict=True):
            assert (a - b).norm() <= (2 * torch.finfo(dtype).eps if dtype is torch.bfloat16 else 0) * b.norm()
        assert all(x.is_contiguous() for x in found[:2])
    assert counters["stats"]["unique_graphs"] == 2


def test_tables_are_shared_and_usable_for_training_after_inference_mode():
    rotary = RotaryEmbedding(RopeConfig(original_max_position_embeddings=2), 8)
    with torch.inference_mode():
        tables = rotary.tables(8, CPU, torch.float32)
    assert rotary.tables(8, CPU, torch.float32) is tables
    assert rotary.tables(8, CPU, torch.bfloat16) is not tables
    query = torch.randn(8, 1, 2, 8, requires_grad=True)
    rotated, _ = rotary.apply(query, query, SequenceLayout(8, 4, has_noisy_half=False))
    rotated.sum().backward()
    assert query.grad is not None


@pytest.mark.parametrize("head_dim", [0, -2, 7])
def test_odd_head_dimensions_are_refused(head_dim: int):
    with pytest.raises(ValueError, match=f"head_dim {head_dim}"):
        RotaryEmbedding(RopeConfig(), head_dim)


def test_rows_that_do_not_fit_the_layout_are_refused():
    rotary, layout = RotaryEmbedding(RopeConfig(), 8), SequenceLayout(8, 4, has_noisy_half=True)
    with pytest.raises(ValueError, match=r"\[8, 1, 2, 8\].*16"):
        rotary.apply(torch.zeros(8, 1, 2, 8), torch.zeros(8, 1, 2, 8), layout)
    with pytest.raises(ValueError, match="head dimension 8"):
        rotary.apply(torch.zeros(16, 1, 2, 4), torch.zeros(16, 1, 2, 4), layout)


KERNEL_PROGRAM = """
import torch
from nld_train.model import rope, rope_kernel

generator = torch.Generator().manual_seed(0)
for rows, length, sequences, heads, dim, has_table in (
    (64, 32, 2, 4, 16, False), (40, 40, 2, 3, 12, True), (70, 70, 1, 2, 16, True), (96, 96, 3, 5, 128, False),
):
    angles = torch.randn(length, sequences if has_table else 1, dim // 2, generator=generator).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    whole = torch.randn(rows, sequences, heads, 3 * dim, generator=generator)
    for x in (whole[..., :dim].contiguous(), whole[..., dim : 2 * dim]):
        for backward in (False, True):
            found = rope_kernel.rotate(x, cos, sin, backward=backward)
            assert found.is_contiguous()
            torch.testing.assert_close(found, rope._rotate(x, cos, -sin if backward else sin), rtol=1e-6, atol=1e-6)
"""


def test_the_kernel_for_gpus_rotates_alike(tmp_path: Path) -> None:
    """In Triton's interpreter, which needs no GPU; sizes that are no powers of two, strided rows."""
    pytest.importorskip("triton", reason="Triton comes with torch for GPUs")
    program = tmp_path / "kernel.py"
    program.write_text(KERNEL_PROGRAM)
    environment = importing_project() | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, str(program)], env=environment, check=True, timeout=120)
