"""Attention backends against a softmax written out, in values and gradients; what a changed token may change."""

import gc
import inspect
import math
import random
import weakref
from collections.abc import Callable, Iterator
from dataclasses import astuple
from itertools import pairwise

import pytest
import torch
from megatron.core.transformer.attention import CoreAttentionBuilder
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nld_train.config.schema import AttentionBackend, RopeConfig
from nld_train.errors import ConfigError
from nld_train.model import attention as attention_module
from nld_train.model import chunk_plan as plan_module
from nld_train.model import chunked_attention as chunked_module
from nld_train.model.attention import (
    JointAttention,
    causal_attention,
    chunked_attention,
    dense_attention,
    flex_attention,
    joint_attention,
    resolve_backend,
)
from nld_train.model.native_attention import missing_for_native, native_attention
from nld_train.model.rope import RotaryEmbedding
from nld_train.objective.masks import dense_block_mask
from nld_train.objective.sequence import JointBatch, RowTable, SequenceLayout, Shard, row_table, shard_batch
from nld_train.testing.layouts import table_layout
from nld_train.testing.native import needs_native

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-6, torch.bfloat16: 1e-2}  # up to 0.3, 0.3 and 0.6 of it were seen
Attention = Callable[[Tensor, Tensor, Tensor, SequenceLayout], Tensor]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
NATIVE = pytest.param(native_attention, marks=needs_native, id="native_attention")


def finest(attention: Attention) -> torch.dtype:
    """That it computes in."""
    return torch.float32 if attention is native_attention else torch.float64


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def written_out(
    query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout, softmax_scale: float | None = None
) -> Tensor:
    """The slow, obvious reference; its mask is checked against the table in tests/objective/test_masks.py."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if softmax_scale is None else softmax_scale
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scale
    scores = scores.masked_fill(~dense_block_mask(layout, query.device), -math.inf)
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(dim=-1), value)


def make_inputs(
    layout: SequenceLayout, batch: int, heads: int, kv_heads: int, dim: int, *, dtype: torch.dtype, seed: int = 0
) -> Inputs:
    """query, key, value, output gradient; queries large enough for peaked, uneven probabilities."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, count, layout.num_rows, dim) for count in (heads, kv_heads, kv_heads, heads)]
    query, key, value, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    query, key, value = ((x * f).to(dtype).requires_grad_() for x, f in ((query, 3), (key, 1), (value, 1)))
    return query, key, value, grad.to(dtype)


def run(attention: Attention, inputs: Inputs, layout: SequenceLayout) -> list[Tensor]:
    *tensors, grad = inputs
    out = attention(*tensors, layout)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


def run_exactly(reference: Attention, inputs: Inputs, layout: SequenceLayout) -> list[Tensor]:
    """In float64, of the same (rounded) inputs."""
    *tensors, grad = (x.detach().double() for x in inputs)
    query, key, value = (x.requires_grad_() for x in tensors)
    return run(reference, (query, key, value, grad), layout)


def assert_close(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    """The error is measured against the tensor's norm or, where that is larger, the output's.

    The gradient of a score is p (dp - delta): a difference of two rounded numbers that are of the output's size. Where
    rows see one key, all of it cancels: the gradient of queries and keys is 0, and what is found is rounding.
    """
    out_norm = expected[0].double().norm()
    for name, a, b in zip(("out", "grad_query", "grad_key", "grad_value"), actual, expected, strict=True):
        assert a.dtype == dtype
        assert a.shape == b.shape
        error = ((a.double() - b.double()).norm() / torch.maximum(b.double().norm(), out_norm)).item()
        assert error < TOLERANCE[dtype], f"{name}: {error:.2e}"


def assert_equals_written_out(
    attention: Attention, layout: SequenceLayout, inputs: Inputs, reference: Attention = written_out
) -> None:
    assert_close(run(attention, inputs, layout), run_exactly(reference, inputs, layout), inputs[0].dtype)


# ------------------------------------------------------------------------------------------------ values and gradients

SHAPES = [  # L, block, B, H, K, D
    (8, 4, 2, 2, 2, 8),
    (8, 8, 1, 4, 1, 4),
    (96, 16, 2, 4, 2, 16),  # less than a chunk
    (128, 1, 1, 2, 1, 8),  # exactly one
    (256, 2, 1, 4, 4, 8),
    (160, 32, 2, 4, 1, 16),  # a short last chunk
    (240, 48, 1, 4, 2, 12),  # blocks that do not divide 128
    (320, 160, 1, 2, 1, 8),  # blocks larger than a chunk
    (640, 32, 1, 4, 2, 16),
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("length", "block_size", "batch", "heads", "kv_heads", "dim"), SHAPES)
@pytest.mark.parametrize("attention", [dense_attention, chunked_attention, NATIVE])
def test_joint_backends_equal_the_written_out_softmax(
    attention: Attention,
    length: int,
    block_size: int,
    batch: int,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
):
    layout = SequenceLayout(length, block_size, has_noisy_half=True)
    inputs = make_inputs(layout, batch, heads, kv_heads, dim, dtype=dtype)
    if dtype is torch.float64 and attention is native_attention:
        with pytest.raises(ValueError, match="float64"):
            attention(*inputs[:3], layout)
        return
    assert_equals_written_out(attention, layout, inputs)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("length", "_block", "batch", "heads", "kv_heads", "dim"), SHAPES[:6])
def test_causal_backends_equal_the_written_out_softmax(
    length: int, _block: int, batch: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
):
    layout = SequenceLayout(length, 1, has_noisy_half=False)
    inputs = make_inputs(layout, batch, heads, kv_heads, dim, dtype=dtype)
    plain: Attention = lambda query, key, value, _: causal_attention(query, key, value)  # noqa: E731
    native = (native_attention,) if dtype is not torch.float64 and missing_for_native() is None else ()
    for attention in (dense_attention, chunked_attention, plain, *native):
        assert_equals_written_out(attention, layout, inputs)


@pytest.mark.parametrize("attention", [chunked_attention, NATIVE])
def test_random_shapes(attention: Attention):
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # pytest shows it when the test fails
    rng = random.Random(seed)
    for _ in range(12):
        block_size = rng.randint(1, 70)
        length = block_size * rng.randint(1, max(1, 400 // block_size))
        layout = SequenceLayout(length, block_size, has_noisy_half=rng.random() < 0.7)
        kv_heads, dim = rng.randint(1, 3), rng.randint(1, 20)
        print(layout, kv_heads, dim)
        heads = kv_heads * rng.randint(1, 4)
        inputs = make_inputs(
            layout, rng.randint(1, 3), heads, kv_heads, dim, dtype=finest(attention), seed=rng.randrange(2**32)
        )
        assert_equals_written_out(attention, layout, inputs)


@pytest.mark.parametrize(
    ("attention", "dtype"),
    [
        (chunked_attention, torch.float64),
        (chunked_attention, torch.bfloat16),
        pytest.param(native_attention, torch.float32, marks=needs_native),
        pytest.param(native_attention, torch.bfloat16, marks=needs_native),
    ],
)
def test_any_strides_are_read(attention: Attention, dtype: torch.dtype):
    """Megatron's [S, B, H, D] seen as [B, H, S, D], value a slice of a fused projection, an expanded gradient."""
    layout = SequenceLayout(160, 32, has_noisy_half=True)
    inputs = make_inputs(layout, 2, 4, 2, 8, dtype=dtype)
    expected = run(attention, (*inputs[:3], inputs[3][:1, :1].expand_as(inputs[3]).contiguous()), layout)
    query, key = (x.detach().permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3).requires_grad_() for x in inputs[:2])
    value = torch.cat([inputs[2].detach()] * 3, dim=-1)[..., 8:16].requires_grad_()
    assert not any(x.is_contiguous() for x in (query, key, value))
    actual = run(attention, (query, key, value, inputs[3][:1, :1].expand_as(inputs[3])), layout)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    every_second = torch.stack([inputs[0].detach()] * 2, dim=-1).flatten(-2)[..., ::2].requires_grad_()
    assert every_second.stride(-1) == 2
    actual = run(attention, (every_second, key, value, inputs[3][:1, :1].expand_as(inputs[3])), layout)
    assert torch.equal(actual[0], expected[0])


def test_softmax_scale_reaches_every_backend():
    for has_noisy_half in (True, False):
        layout = SequenceLayout(160, 32, has_noisy_half)
        inputs = make_inputs(layout, 1, 2, 1, 8, dtype=torch.float64)
        expected = run(lambda q, k, v, la: written_out(q, k, v, la, 0.7), inputs, layout)
        in_fp32 = make_inputs(layout, 1, 2, 1, 8, dtype=torch.float32)
        native = (AttentionBackend.native,) if missing_for_native() is None else ()
        for backend in (AttentionBackend.dense, AttentionBackend.chunked, *native):
            attention: Attention = lambda q, k, v, la, b=backend: joint_attention(q, k, v, la, b, 0.7)  # noqa: E731
            assert_close(run(attention, inputs, layout), expected, torch.float64)
            assert_close(run(attention, in_fp32, layout), [x.float() for x in expected], torch.float32)


@pytest.mark.parametrize(("length", "block_size"), [(128, 32), (96, 16)])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_forward_equals_the_written_out_softmax(length: int, block_size: int):
    """Eager on the CPU: the mask, the scale and the grouping; torch has no backward for it here."""
    layout = SequenceLayout(length, block_size, has_noisy_half=True)
    query, key, value, _ = (x.detach() for x in make_inputs(layout, 2, 4, 2, 16, dtype=torch.float32))
    actual = flex_attention(query, key, value, layout, softmax_scale=0.3)
    expected = written_out(query, key, value, layout, softmax_scale=0.3)
    assert (actual - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("has_noisy_half", [True, False])
@pytest.mark.parametrize(("length", "block_size"), [(256, 32), (640, 16)])
def test_flex_and_causal_on_cuda(length: int, block_size: int, has_noisy_half: bool):
    layout = SequenceLayout(length, block_size, has_noisy_half)
    inputs = make_inputs(layout, 2, 4, 2, 64, dtype=torch.bfloat16)
    on_gpu = tuple(x.detach().cuda().requires_grad_() for x in inputs)
    actual = run(
        lambda q, k, v, la: joint_attention(q, k, v, la, AttentionBackend.flex),
        (*on_gpu[:3], on_gpu[3].detach()),
        layout,
    )
    expected = run_exactly(written_out, inputs, layout)
    assert_close([x.cpu() for x in actual], expected, torch.bfloat16)


@pytest.mark.parametrize("attention", [chunked_attention, NATIVE])
def test_long_rows_in_bf16_are_merged_and_accumulated_in_fp32(attention: Attention, monkeypatch: pytest.MonkeyPatch):
    """Rounding must not grow with the number of chunks or tiles: compared with that of one kernel over whole rows."""
    monkeypatch.setattr(chunked_module, "JOINED_PREFIX", 0)
    layout = SequenceLayout(1024, 32, has_noisy_half=True)
    inputs = make_inputs(layout, 1, 2, 1, 16, dtype=torch.bfloat16)
    expected = run_exactly(written_out, inputs, layout)

    def errors(attention: Attention) -> list[float]:
        return [
            ((a.double() - b).norm() / b.norm()).item()
            for a, b in zip(run(attention, inputs, layout), expected, strict=True)
        ]

    ours, dense = errors(attention), errors(dense_attention)
    # Two rounded partial results instead of one: up to sqrt(2). Merged with bf16 weights it would be 1.7.
    assert max(ours[0] / dense[0], ours[1] / dense[1]) < 1.42
    # Ten chunks add to a key's gradient. Summed in bf16 it would be 1.2.
    assert max(ours[2] / dense[2], ours[3] / dense[3]) < 1.0


# ------------------------------------------------------------------------------------------ a few rows to a few keys


def kernel_inputs(b: int, parts: int, rows: int, keys: int, dim: int) -> Inputs:
    """Rows, keys, values (shared by the parts) and a gradient of the output, bf16."""
    generator = torch.Generator().manual_seed(b + rows)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    key, value = (draw(b, 1, keys, dim).expand(-1, parts, -1, -1) for _ in range(2))
    return draw(b, parts, rows, dim), key, value, draw(b, parts, rows, dim)


def some_mask(num_masks: int, rows: int, keys: int) -> Tensor:
    """0 or -inf [num_masks, 1, rows, keys]; every row sees its first key."""
    hidden = torch.rand(num_masks, 1, rows, keys, generator=torch.Generator().manual_seed(rows)) < 0.5
    hidden[..., 0] = False
    return torch.zeros(hidden.shape).masked_fill_(hidden, -math.inf)


def kernel_written_out(
    rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    scores = scale * rows @ keys.mT + (0.0 if mask is None else mask.double())
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


def assert_near(found: Tensor, expected: Tensor, least: float | Tensor = 0.0) -> None:
    """Within what a rounding of the probabilities and of the result to bf16 brings, in a norm of ``least`` or more."""
    assert found.shape == expected.shape
    assert (found.double() - expected).norm() <= 6e-3 * max(expected.norm(), least)


@pytest.mark.parametrize("num_masks", [None, 1, 2, 6])
@pytest.mark.parametrize(("parts", "rows", "keys", "dim"), [(2, 40, 70, 16), (1, 1, 1, 8), (3, 65, 9, 24)])
@pytest.mark.parametrize("scale", [0.3, 0.25])
def test_kernel_equals_the_written_out_softmax(
    parts: int, rows: int, keys: int, dim: int, scale: float, num_masks: int | None
):
    """Six heads; a mask for each, for three, for all, or none."""
    mask = None if num_masks is None else some_mask(num_masks, rows, keys)
    *given, grad = kernel_inputs(6, parts, rows, keys, dim)
    exact = [x.double().clone().requires_grad_() for x in given]
    of_heads = None if mask is None else mask.repeat_interleave(6 // len(mask), 0)
    expected, log_sum_exp = kernel_written_out(*exact, of_heads, scale)
    expected_grads = torch.autograd.grad(expected, exact, grad.double())

    of_kernel = mask
    if mask is not None:
        of_kernel = mask.to(torch.bfloat16)[0, 0] if num_masks == 1 else mask.to(torch.bfloat16)
    out, found_log_sum_exp = chunked_module._flash_of(*given, of_kernel, scale)
    assert out.dtype is torch.bfloat16
    assert_near(out, expected)
    torch.testing.assert_close(found_log_sum_exp.double(), log_sum_exp, rtol=0, atol=1e-4)
    grads = chunked_module._flash_backward_of(grad, *given, out, found_log_sum_exp, of_kernel, scale)
    largest = max(x.norm() for x in expected_grads)
    for found, wanted in zip(grads, expected_grads, strict=True):
        assert found.dtype is torch.bfloat16
        assert_near(found, wanted, least=1e-2 * largest)


def test_gradients_of_a_part_of_the_keys():
    """With the output and the log-sum-exp of all keys, the gradients of two parts are those of the whole."""
    *given, grad = kernel_inputs(2, 2, 50, 60, 16)
    rows, keys, values = given
    exact = [x.double().clone().requires_grad_() for x in given]
    expected, log_sum_exp = kernel_written_out(*exact, None, 0.3)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    of_all = expected.detach().to(torch.bfloat16), log_sum_exp.detach().float()
    parts = [
        chunked_module._flash_backward_of(grad, rows, keys[:, :, part], values[:, :, part], *of_all, None, 0.3)
        for part in (slice(0, 25), slice(25, 60))
    ]
    assert_near(parts[0][0].double() + parts[1][0].double(), wanted[0])
    for of_parts, of_whole in zip(zip(*parts, strict=True), wanted, strict=True):
        if of_whole.shape != rows.shape:
            assert_near(torch.cat(of_parts, dim=2), of_whole)


# ------------------------------------------------------------------------------------------------- layouts with a table


def blocks_of(lengths: list[int], block_size: int) -> list[range]:
    """All blocks of a sequence of documents; they start anew at each."""
    stops = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [
        range(start, min(start + block_size, stop))
        for length, stop in zip(lengths, stops, strict=True)
        for start in range(stop - length, stop, block_size)
    ]


def masked_written_out(query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout) -> Tensor:
    """The reference, with 0 on padding rows."""
    return written_out(query, key, value, layout) * ~is_padding(layout)


def is_padding(layout: SequenceLayout) -> Tensor:
    assert layout.table is not None
    return (layout.table.blocks < -1)[:, None, :, None]


def assert_table_equals_written_out(
    attention: Attention,
    layout: SequenceLayout,
    *,
    dtype: torch.dtype,
    seed: int = 0,
    heads: int = 4,
    kv_heads: int = 2,
) -> None:
    """Values and gradients; the dense kernel lets padding rows see themselves: 0 there, and no gradient."""
    assert layout.table is not None
    *tensors, grad = make_inputs(layout, len(layout.table.blocks), heads, kv_heads, 8, dtype=dtype, seed=seed)
    if attention is dense_attention:
        is_seen = ~is_padding(layout)
        attention, grad = lambda *of: dense_attention(*of) * is_seen, grad * is_seen
    assert_equals_written_out(attention, layout, (*tensors, grad), masked_written_out)


DOCUMENTS = [[37, 1, 58, 23, 41], [160]]  # L = 160
BLOCKS = [blocks_of(lengths, 16) for lengths in DOCUMENTS]
TABLE_LAYOUTS: dict[str, tuple[list[list[int]], list[list[range]] | None]] = {
    "three documents": ([[37, 58, 65]], [blocks_of([37, 58, 65], 16)]),
    "rho 0.5, padding": (DOCUMENTS, [blocks[::2] for blocks in BLOCKS]),
    "rho 0.25": ([[160], [160]], [BLOCKS[1][1::4], BLOCKS[1][::4]]),
    "complementary": (DOCUMENTS, [blocks * 2 for blocks in BLOCKS]),
    "complementary, padding": ([DOCUMENTS[0]] * 2, [BLOCKS[0] * 2, BLOCKS[0] + BLOCKS[0][:7]]),
    "one copy twice": (DOCUMENTS, [blocks + blocks[1::3] for blocks in BLOCKS]),
    "last blocks": (DOCUMENTS, [blocks[-2:] for blocks in BLOCKS]),
    "nothing noisy in one": (DOCUMENTS, [[], BLOCKS[1]]),
    "one-token documents": ([[1] * 40, [1] * 20 + [20]], [blocks_of([1] * 40, 16), [range(20, 36)]]),
    "nothing but one-token documents": ([[1] * 160], [blocks_of([1] * 160, 16)]),  # no row sees two keys
    "no noisy rows": (DOCUMENTS, None),
    "no noisy rows, one-token documents": ([[1] * 7 + [30, 3]], None),
}


def set_chunk_rows(monkeypatch: pytest.MonkeyPatch, num_rows: int, joined: int) -> None:
    """``joined``: longest prefix that is taken with a chunk's own rows."""
    monkeypatch.setattr(chunked_module, "_chunk_rows", lambda *_: num_rows)
    monkeypatch.setattr(chunked_module, "JOINED_PREFIX", joined)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("joined", [0, 1024])
@pytest.mark.parametrize("chunk_rows", [8, 48, 128])  # less than a block, no divisor of L
@pytest.mark.parametrize("name", TABLE_LAYOUTS)
def test_chunked_attention_under_a_table(
    name: str, chunk_rows: int, joined: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    set_chunk_rows(monkeypatch, chunk_rows, joined)
    assert_table_equals_written_out(chunked_attention, table_layout(16, *TABLE_LAYOUTS[name]), dtype=dtype)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2), (6, 1)])
@pytest.mark.parametrize("name", TABLE_LAYOUTS)
def test_native_attention_under_a_table(name: str, heads: int, kv_heads: int, dtype: torch.dtype):
    layout = table_layout(16, *TABLE_LAYOUTS[name])
    assert_table_equals_written_out(native_attention, layout, dtype=dtype, heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("name", TABLE_LAYOUTS)
def test_dense_attention_under_a_table(name: str):
    assert_table_equals_written_out(dense_attention, table_layout(16, *TABLE_LAYOUTS[name]), dtype=torch.float64)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_attention_of_many_threads(dtype: torch.dtype):
    """Whatever the threads: the forward pass has the same bits, and the same number of them has the same bits again."""
    layout = table_layout(16, *TABLE_LAYOUTS["rho 0.5, padding"])
    inputs = make_inputs(layout, 2, 6, 3, 8, dtype=dtype)
    expected = run(native_attention, inputs, layout)
    for num_threads in (2, 4, 5, 12):
        torch.set_num_threads(num_threads)
        assert_table_equals_written_out(native_attention, layout, dtype=dtype, heads=6, kv_heads=3)
        out, *gradients = run(native_attention, inputs, layout)
        assert torch.equal(out, expected[0])
        assert torch.equal(gradients[0], expected[1])
        for a, b in zip(run(native_attention, inputs, layout), (out, *gradients), strict=True):
            assert torch.equal(a, b)


def test_groups_are_split_among_threads(monkeypatch: pytest.MonkeyPatch):
    """One key-value head and more threads: its queries come in 2, then in 4 parts, then 8 threads for 6 of them."""
    set_chunk_rows(monkeypatch, 32, 64)
    layout = table_layout(16, *TABLE_LAYOUTS["rho 0.5, padding"])
    for num_threads, heads in ((2, 4), (3, 4), (8, 6)):
        monkeypatch.setattr(torch, "get_num_threads", lambda num_threads=num_threads: num_threads)
        for dtype in (torch.float64, torch.bfloat16):
            assert_table_equals_written_out(chunked_attention, layout, dtype=dtype, heads=heads, kv_heads=1)


@pytest.mark.parametrize("seed", [1, None])  # the first guards what only some layouts show
@pytest.mark.parametrize("attention", [chunked_attention, NATIVE])
def test_random_tables(attention: Attention, seed: int | None, monkeypatch: pytest.MonkeyPatch):
    seed = random.randrange(2**32) if seed is None else seed
    print(f"seed {seed}")  # pytest shows it when the test fails
    rng = random.Random(seed)
    for _ in range(40):
        num_rows = rng.choice([1, 3, 16, 50, 100])
        set_chunk_rows(monkeypatch, num_rows, rng.choice([0, 7, 40, 1024]))
        length, block_size = rng.randint(2, 120), rng.choice([1, 2, 7, 16, 60])
        documents, noisy = [], []
        for _ in range(rng.randint(1, 3)):
            cuts = sorted({0, length, *rng.choices(range(length), k=rng.choice([0, 1, 4, 60]))})
            documents.append([stop - start for start, stop in pairwise(cuts)])
            share = rng.choice([0.1, 0.5, 1.0])
            noisy.append([
                block for _ in range(rng.choice([1, 2])) for block in blocks_of(documents[-1], block_size)
                if rng.random() < share
            ])  # fmt: skip
        layout = table_layout(block_size, documents, noisy if rng.random() < 0.8 else None)
        print(documents, noisy, block_size, num_rows)
        kv_heads = rng.randint(1, 2)
        assert_table_equals_written_out(
            attention,
            layout,
            dtype=finest(attention),
            seed=rng.randrange(2**32),
            heads=kv_heads * rng.randint(1, 3),
            kv_heads=kv_heads,
        )


@pytest.mark.parametrize("attention", [dense_attention, chunked_attention, NATIVE])
@pytest.mark.parametrize("has_noisy_half", [True, False])
def test_a_plain_layout_written_as_a_table_is_the_plain_one(attention: Attention, has_noisy_half: bool):
    plain = SequenceLayout(320, 32, has_noisy_half)
    table = table_layout(32, [[320]] * 2, [blocks_of([320], 32)] * 2 if has_noisy_half else None)
    assert table.table is not None
    for rows, of_plain in zip(astuple(table.table), astuple(row_table(plain, 2)), strict=True):
        assert torch.equal(rows, of_plain)
    inputs = make_inputs(plain, 2, 4, 2, 8, dtype=finest(attention))
    expected = run(dense_attention, inputs, plain)
    assert_close(run(attention, inputs, table), expected, finest(attention))


@pytest.mark.parametrize("is_noisy", [True, False])
@pytest.mark.parametrize("attention", [dense_attention, chunked_attention, NATIVE])
def test_packed_documents_are_the_documents_alone(
    attention: Attention, is_noisy: bool, monkeypatch: pytest.MonkeyPatch
):
    set_chunk_rows(monkeypatch, 32, 64)
    lengths = [45, 70, 21]
    packed = table_layout(16, [lengths], [blocks_of(lengths, 16)] if is_noisy else None)
    inputs = make_inputs(packed, 1, 4, 2, 8, dtype=finest(attention))
    together = run(attention, inputs, packed)
    for number, length in enumerate(lengths):
        alone = table_layout(16, [[length]], [blocks_of([length], 16)] if is_noisy else None)
        start = sum(lengths[:number])
        rows = [*range(start, start + length)]
        if is_noisy:
            rows += range(sum(lengths) + start, sum(lengths) + start + length)
        own = tuple(x.detach()[:, :, rows].requires_grad_() for x in inputs)
        expected = run(attention, (*own[:3], own[3].detach()), alone)
        assert_close([x[:, :, rows] for x in together], expected, finest(attention))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["rho 0.5, padding", "nothing noisy in one", "complementary, padding"])
@pytest.mark.parametrize("attention", [chunked_attention, NATIVE])
def test_padding_rows_touch_nothing(attention: Attention, name: str, poison: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan_module, "LARGEST_PADDING", 10.0)
    documents, noisy = TABLE_LAYOUTS[name]
    layout = table_layout(16, [documents[-1]] * 2, noisy)
    padding = is_padding(layout)
    assert padding.any()
    inputs = make_inputs(layout, 2, 4, 2, 8, dtype=finest(attention))
    clean = run(attention, inputs, layout)
    poisoned = tuple(x.detach().masked_fill(padding, poison).requires_grad_() for x in inputs)
    for a, b in zip(run(attention, (*poisoned[:3], poisoned[3].detach()), layout), clean, strict=True):
        assert torch.equal(a, b)
        assert (a.masked_select(padding) == 0).all()


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TABLE_LAYOUTS)
def test_native_attention_reads_nothing_that_it_has_not_written(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """What it works in, its results: bit for bit the same where they hold NaN before. 5 query heads make odd tiles."""
    layout = table_layout(16, *TABLE_LAYOUTS[name])
    inputs = make_inputs(layout, len(TABLE_LAYOUTS[name][0]), 5, 1, 7, dtype=dtype)
    expected = run(native_attention, inputs, layout)
    empty, new_empty = torch.empty, Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(math.nan))
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: new_empty(*args, **kwargs).fill_(math.nan))
    for a, b in zip(run(native_attention, inputs, layout), expected, strict=True):
        assert torch.equal(a, b)


@needs_native
def test_scores_far_apart_and_large():
    """Some are 2^-1000 of their row's largest; where one key has all the weight, errors are no larger than torch's."""
    layout = SequenceLayout(256, 32, has_noisy_half=True)
    query, key, value, grad = make_inputs(layout, 1, 4, 2, 64, dtype=torch.float32)  # the scale is exact
    for factor in (30, 1000):
        inputs = ((query.detach() * factor).requires_grad_(), key, value, grad)
        expected = run_exactly(written_out, inputs, layout)
        for ours, torchs, b in zip(
            run(native_attention, inputs, layout), run(dense_attention, inputs, layout), expected, strict=True
        ):
            assert (ours.double() - b).norm() < 2 * (torchs.double() - b).norm()


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_longer_than_a_batch_of_scores(dtype: torch.dtype):
    """Some rows of a tile see nothing of its first 384 columns: those are of the block before."""
    layout = SequenceLayout(1350, 450, has_noisy_half=True)
    assert_equals_written_out(native_attention, layout, make_inputs(layout, 1, 2, 1, 8, dtype=dtype))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_attention_of_full_odd_tiles(dtype: torch.dtype):
    """25 tokens of 5 query heads."""
    layout = SequenceLayout(100, 25, has_noisy_half=True)
    assert_equals_written_out(native_attention, layout, make_inputs(layout, 2, 5, 1, 16, dtype=dtype))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_attention_under_a_gradient_that_is_one_number(dtype: torch.dtype):
    """As of a sum: all strides are 0."""
    layout = SequenceLayout(64, 16, has_noisy_half=True)
    query, key, value, _ = make_inputs(layout, 1, 2, 1, 8, dtype=dtype)
    memory = torch.arange(8.0).to(dtype)  # what stands behind the number is another one
    expected = run(native_attention, (query, key, value, torch.full_like(query, 3.0)), layout)
    for a, b in zip(
        run(native_attention, (query, key, value, memory[3].expand_as(query)), layout), expected, strict=True
    ):
        assert torch.equal(a, b)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(poison: float, dtype: torch.dtype):
    """In a query, a key or a value: whoever sees it has no finite result, and no gradient hides it."""
    layout = SequenceLayout(64, 16, has_noisy_half=True)
    for number in range(3):
        *tensors, grad = make_inputs(layout, 1, 2, 1, 8, dtype=dtype)
        tensors[number] = tensors[number].detach().index_fill(2, torch.tensor([70]), poison).requires_grad_()
        out, *gradients = run(native_attention, (*tensors, grad), layout)
        sees = [70] if number == 0 else [*range(16, 64), *range(70, 128)]
        assert not out[:, :, sees].isfinite().any()
        assert not gradients[0][:, :, sees].isfinite().any()


@pytest.mark.parametrize("attention", [chunked_attention, NATIVE])
def test_noisy_rows_may_all_be_padding(attention: Attention):
    """As of a context rank that has none of the blocks."""
    clean = torch.arange(32)
    table = RowTable(
        position_ids=torch.cat([torch.zeros(2, dtype=torch.int64), clean])[None],
        blocks=torch.cat([torch.tensor([-2, -3]), torch.full((32,), -1)])[None],
        first_keys=torch.zeros(1, 34, dtype=torch.int64),
        end_keys=torch.cat([torch.zeros(2, dtype=torch.int64), clean + 1])[None],
    )
    layout = SequenceLayout(32, 16, has_noisy_half=True, table=table)
    assert_table_equals_written_out(attention, layout, dtype=finest(attention))


def test_chunks_cover_what_they_should():
    """Neither a document that began before a chunk nor a block goes on over its end, and it has at most 160 rows: whole
    units of clean tokens, but where that end lies or a block forbids it."""
    layout = table_layout(32, [[300, 68]], [[range(96, 140), range(300, 332)]])
    chunks = plan_module.chunk_plan(layout, 1, 160).chunks
    assert [(chunk.document_start, chunk.start, chunk.stop, chunk.num_noisy_rows) for chunk in chunks] == [
        (0, 0, 96, 0), (0, 96, 192, 44), (0, 192, 300, 0), (300, 300, 368, 32),
    ]  # fmt: skip
    layout = table_layout(32, [[100, 200]], [blocks_of([100, 200], 32)])
    chunks = plan_module.chunk_plan(layout, 1, 256).chunks
    assert [(chunk.document_start, chunk.start, chunk.stop) for chunk in chunks] == [
        (0, 0, 100), (100, 100, 228), (100, 228, 300),
    ]  # fmt: skip
    layout = table_layout(48, [[512]], [[range(48, 96)]])
    chunks = plan_module.chunk_plan(layout, 1, 90).chunks
    assert [(chunk.start, chunk.stop) for chunk in chunks][:3] == [(0, 48), (48, 96), (96, 160)]


def chunks_of(layout: SequenceLayout, chunk_rows: int) -> list[tuple[list[int], int, int, int]]:
    """Sequences, start, stop and noisy rows of each."""
    assert layout.table is not None
    plan = plan_module.chunk_plan(layout, len(layout.table.blocks), chunk_rows)
    return [(chunk.sequences.tolist(), chunk.start, chunk.stop, chunk.num_noisy_rows) for chunk in plan.chunks]


def test_sequences_of_the_same_documents_have_the_same_chunks():
    """Their mean number of noisy rows says where those end; who has fewer is padded, or stands apart."""
    layout = table_layout(16, [[64]] * 3, [[range(32, 48)], [range(32, 48)], [range(48, 64)]])
    assert chunks_of(layout, 32) == [([0, 1, 2], 0, 32, 0), ([0, 1], 32, 48, 16), ([2], 32, 48, 0),
                                     ([2], 48, 64, 16), ([0, 1], 48, 64, 0)]  # fmt: skip
    assert_table_equals_written_out(chunked_attention, layout, dtype=torch.float64)
    # 64 clean rows; with 16 noisy ones 1.25 as many, with 32 more than that.
    layout = table_layout(16, [[64]] * 3, [[], [range(16, 32)], [range(16), range(48, 64)]])
    assert chunks_of(layout, 100) == [([1, 2], 0, 64, 32), ([0], 0, 64, 0)]
    layout = table_layout(16, [[64]] * 3, [[], [range(16, 32)], []])
    assert chunks_of(layout, 100) == [([0, 1, 2], 0, 64, 16)]
    # Other documents: ends of their own.
    layout = table_layout(16, [[64], [40, 24], [64]], [[range(16)]] * 3)
    assert chunks_of(layout, 50) == [([0, 1, 2], 0, 32, 16), ([0, 2], 32, 64, 0), ([1], 32, 40, 0),
                                     ([1], 40, 64, 0)]  # fmt: skip


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_chunks_taken_together_may_differ(kv_heads: int, monkeypatch: pytest.MonkeyPatch):
    """Blocks at different places of the same chunk, or none there: masks of their own, and padding."""
    set_chunk_rows(monkeypatch, 80, 1024)
    monkeypatch.setattr(plan_module, "LARGEST_PADDING", 10.0)
    layout = table_layout(16, [[128]] * 3, [[range(16)], [range(16), range(16, 32)], [range(32, 48), range(80, 96)]])
    plan = plan_module.chunk_plan(layout, 3, 80)
    assert [chunk.sequences.tolist() for chunk in plan.chunks] == [[0, 1, 2]] * len(plan.chunks)
    assert [len(allowed) for allowed in plan.allowed] == [3, 3, 1]  # the last has no block in any of them
    assert plan.queries.is_padding is not None
    assert plan.queries.is_padding.any()
    assert_table_equals_written_out(chunked_attention, layout, dtype=torch.float64, heads=4, kv_heads=kv_heads)


def test_a_sequence_does_not_see_what_it_is_taken_with(monkeypatch: pytest.MonkeyPatch):
    """A number that is not finite stays in its sequence, padding included: the step can be left out by its sample."""
    monkeypatch.setattr(plan_module, "LARGEST_PADDING", 10.0)
    layout = table_layout(16, [[128]] * 3, [[range(32, 48), range(80, 96)], [], [range(16)]])
    inputs = make_inputs(layout, 3, 4, 2, 8, dtype=torch.bfloat16)
    expected = run(chunked_attention, inputs, layout)
    for poisoned in range(3):
        given = [x.detach().clone() for x in inputs]
        for x in given:
            x[poisoned] = math.nan
        found = run(chunked_attention, (*(x.requires_grad_() for x in given[:3]), given[3]), layout)
        others = [sequence for sequence in range(3) if sequence != poisoned]
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a[others], b[others])


def test_masks_do_not_grow_with_the_heads():
    """Of two sequences with masks of their own: one for each sequence and head that is folded into rows."""
    layout = table_layout(16, [[128]] * 2, [[range(16)], [range(32, 48)]])
    calls = chunked_module._calls(layout, 2, 256, 128, 8, 2, torch.float32, 1).calls
    assert [tuple(call.mask.shape) for call in calls] == [(2, 1, 4 * 144, 144)]


def test_the_plan_is_shared_by_layers_and_freed_with_its_micro_batch():
    layout = table_layout(16, *TABLE_LAYOUTS["complementary"])
    plan = plan_module.chunk_plan(layout, 2, 128)
    assert plan_module.chunk_plan(layout, 2, 128) is plan
    run(chunked_attention, make_inputs(layout, 2, 4, 2, 8, dtype=torch.float32), layout)
    assert layout.table is not None
    held = [weakref.ref(x) for x in (plan.queries.rows, layout.table.end_keys)]
    del plan, layout
    gc.collect()
    assert [x() for x in held] == [None] * 2


def test_what_is_alike_in_all_sequences_is_kept_once():
    plan = plan_module.chunk_plan(SequenceLayout(256, 32, has_noisy_half=True), 8, 128)
    for chunk, allowed in zip(plan.chunks, plan.allowed, strict=True):
        assert allowed.shape == (1, chunk.num_rows, chunk.num_rows)
        assert allowed.untyped_storage().nbytes() == allowed.numel()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["rho 0.5, padding", "complementary", "no noisy rows"])
def test_flex_forward_under_a_table_equals_the_dense_one(name: str):
    layout = table_layout(16, *TABLE_LAYOUTS[name])
    query, key, value, _ = (x.detach() for x in make_inputs(layout, 2, 4, 2, 16, dtype=torch.float32))
    actual = joint_attention(query, key, value, layout, AttentionBackend.flex)
    expected = joint_attention(query, key, value, layout, AttentionBackend.dense)
    assert (actual - expected).norm() < 1e-5 * expected.norm()


# ---------------------------------------------------------------------------------------------------- who sees whom


@pytest.mark.parametrize("attention", [dense_attention, chunked_attention, NATIVE])
def test_clean_half_is_the_causal_run(attention: Attention):
    layout = SequenceLayout(320, 32, has_noisy_half=True)
    dtype = finest(attention)
    query, key, value, _ = make_inputs(layout, 2, 4, 2, 8, dtype=dtype)
    clean = (x[:, :, 320:] for x in (query, key, value))
    found, expected = attention(query, key, value, layout)[:, :, 320:], causal_attention(*clean)
    assert torch.allclose(found, expected, rtol=0, atol=1e-13 if dtype is torch.float64 else 2e-6)


@pytest.mark.parametrize("attention", [dense_attention, chunked_attention, NATIVE])
@pytest.mark.parametrize("position", [0, 31, 32, 127, 128, 200, 319])
def test_a_changed_clean_token_changes_no_noisy_row_of_its_own_or_an_earlier_block(attention: Attention, position: int):
    layout = SequenceLayout(320, 32, has_noisy_half=True)
    changed = changed_rows(attention, layout, 320 + position)
    next_block = (position // 32 + 1) * 32
    assert changed == {*range(next_block, 320), *range(320 + position, 640)}


@pytest.mark.parametrize("attention", [dense_attention, chunked_attention, NATIVE])
@pytest.mark.parametrize("position", [0, 31, 32, 127, 128, 319])
def test_a_changed_noisy_token_changes_nothing_outside_its_block(attention: Attention, position: int):
    layout = SequenceLayout(320, 32, has_noisy_half=True)
    start = position // 32 * 32
    assert changed_rows(attention, layout, position) == set(range(start, start + 32))


def changed_rows(attention: Attention, layout: SequenceLayout, row: int) -> set[int]:
    """Rows of the output that differ, in any bit, when query, key and value of one row change."""
    with torch.no_grad():
        query, key, value, _ = make_inputs(layout, 1, 2, 1, 8, dtype=finest(attention))
        before = attention(query, key, value, layout)
        for x in (query, key, value):
            x[:, :, row] += 0.5
        after = attention(query, key, value, layout)
    return set((before != after).any(dim=3).any(dim=1)[0].nonzero().flatten().tolist())


# ------------------------------------------------------------------------------------------------ a part of the rows


def random_layout(rng: random.Random, num_shards: int) -> SequenceLayout:
    """A plain one in half of the cases; else documents, whose blocks stick out over cuts."""
    block_size = rng.choice([1, 2, 4, 8])
    length = 2 * num_shards * block_size * rng.randint(1, 4)
    if rng.random() < 0.5:
        return SequenceLayout(length, block_size, has_noisy_half=rng.random() < 0.7)
    block_size = rng.choice([block_size, 7, 30])
    documents, noisy = [], []
    for _ in range(rng.randint(1, 3)):
        cuts = sorted({0, length, *rng.choices(range(length), k=rng.choice([0, 1, 4]))})
        documents.append([stop - start for start, stop in pairwise(cuts)])
        blocks = blocks_of(documents[-1], block_size) * rng.choice([1, 2])
        noisy.append([block for block in blocks if rng.random() < 0.7])
    return table_layout(block_size, documents, noisy if rng.random() < 0.8 else None)


@pytest.mark.parametrize("attention", [dense_attention, chunked_attention, NATIVE])
@pytest.mark.parametrize("num_shards", [2, 3, 8])
def test_shards_together_are_the_whole(attention: Attention, num_shards: int, monkeypatch: pytest.MonkeyPatch):
    """Each row's output in one shard; gradients of gathered keys and values add up to those of the whole."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # pytest shows it when the test fails
    rng = random.Random(seed)
    for _ in range(8):
        set_chunk_rows(monkeypatch, rng.choice([1, 5, 16, 100]), rng.choice([0, 7, 40, 1024]))
        layout = random_layout(rng, num_shards)
        num_sequences = 2 if layout.table is None else len(layout.table.blocks)
        query, key, value, grad = make_inputs(
            layout, num_sequences, 4, 2, 8, dtype=finest(attention), seed=rng.randrange(99)
        )
        if layout.table is not None:
            grad = grad * ~is_padding(layout)
        expected = run(dense_attention, (query, key, value, grad), layout)
        if layout.table is not None:
            expected[0] = expected[0] * ~is_padding(layout)
        found = [torch.zeros_like(x) for x in expected]
        for rank in range(num_shards):
            part, rows = shard_of_layout(layout, num_sequences, Shard(rank, num_shards))
            clean = torch.arange(layout.num_noisy_rows, layout.num_rows).expand(num_sequences, -1)
            keys = torch.cat([rows[:, : part.num_noisy_rows], clean], dim=1)[:, None, :, None]
            rows = rows[:, None, :, None]
            inputs = [
                x.detach().take_along_dim(index, dim=2).requires_grad_()
                for x, index in ((query, rows), (key, keys), (value, keys))
            ]
            of_part = grad.take_along_dim(rows, dim=2) * ~is_padding(part)
            out, grad_query, *of_keys = run(attention, (*inputs, of_part), part)
            for total, x in zip(found, (out * ~is_padding(part), grad_query * ~is_padding(part)), strict=False):
                total.scatter_add_(2, rows.expand_as(x), x)
            for total, x in zip(found[2:], of_keys, strict=True):
                total.scatter_add_(2, keys.expand_as(x), x)
        assert_close(found, expected, finest(attention))


def shard_of_layout(layout: SequenceLayout, num_sequences: int, shard: Shard) -> tuple[SequenceLayout, Tensor]:
    """A shard, and int64 [B, S]: which row of the whole each of its rows is."""
    shape = (num_sequences, layout.num_rows)
    rows = torch.arange(layout.num_rows).expand(shape)
    batch = JointBatch(
        layout=layout,
        tokens=rows,
        targets=rows,
        ar_weights=torch.ones(num_sequences, layout.clean_length, dtype=torch.float64),
        is_supervised=torch.ones(num_sequences, layout.clean_length, dtype=torch.bool),
        diffusion_weights=None,
        mask_ratios=None,
        sequence_ratios=None,
        is_counted=torch.ones(num_sequences, dtype=torch.bool),
    )
    part, _ = shard_batch(batch, torch.ones(shape, dtype=torch.float64), shard)
    return part.layout, part.tokens


# ------------------------------------------------------------------------------------------------ the Megatron module


def make_module(
    backend: AttentionBackend = AttentionBackend.auto, *, rope: RopeConfig | None = None, **overrides: float
) -> JointAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        **{"attention_dropout": 0.0, **overrides},
    )
    return JointAttention(
        config=config,
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        cp_comm_type=None,
        softmax_scale=None,
        pg_collection=None,
        rotary=RotaryEmbedding(RopeConfig(original_max_position_embeddings=50) if rope is None else rope, 8),
        backend=backend,
    )


def module_inputs(layout: SequenceLayout, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(layout.num_rows, 2, heads, 8, generator=generator, dtype=dtype).requires_grad_()
        for heads in (4, 2, 2)
    )
    return query, key, value


def test_module_is_built_and_called_as_megatron_does():
    """Keyword names of Megatron's builder protocol (make_module passes them), and nothing that enters a checkpoint."""
    protocol = set(inspect.signature(CoreAttentionBuilder.__call__).parameters) - {"self"}
    assert protocol <= set(inspect.signature(JointAttention.__init__).parameters)
    module = make_module()
    assert dict(module.state_dict()) == {}
    assert [*module.named_buffers()] == []


@pytest.mark.parametrize("has_noisy_half", [True, False])
@pytest.mark.parametrize("backend", [AttentionBackend.auto, AttentionBackend.dense, AttentionBackend.chunked])
def test_module_rotates_scales_and_attends(backend: AttentionBackend, has_noisy_half: bool):
    layout = SequenceLayout(160, 32, has_noisy_half)
    module = make_module(backend)
    query, key, value = module_inputs(layout)
    out = module(query, key, value, None, attn_mask_type=AttnMaskType.causal, attention_bias=layout)
    assert out.shape == (layout.num_rows, 2, 32)
    assert out.is_contiguous()

    # The same by complex numbers: dimension pair (d, d + 4) turns by position * frequency.
    positions = torch.arange(160).repeat(layout.num_halves)
    angles = (positions[:, None] * module.rotary.inverse_frequencies).double()
    turn = torch.polar(torch.ones_like(angles), angles)[:, None, None]

    def rotate(x: Tensor) -> Tensor:
        turned = torch.complex(x[..., :4], x[..., 4:]) * turn
        return torch.cat([turned.real, turned.imag], dim=-1)

    scale = 1 + 0.1 * torch.log(1 + (positions // 50).double())
    rotated = (rotate(query) * scale[:, None, None, None], rotate(key), value)
    expected = written_out(*(x.permute(1, 2, 0, 3) for x in rotated), layout).permute(2, 0, 1, 3).flatten(2)
    assert (out - expected).norm() < 1e-6 * expected.norm()  # tables are float32, as in transformers
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    gradients = torch.autograd.grad(out, (query, key, value), grad)
    for a, b in zip(gradients, torch.autograd.grad(expected, (query, key, value), grad), strict=True):
        assert (a - b).norm() < 1e-6 * b.norm()


@pytest.mark.parametrize("backend", [AttentionBackend.auto, AttentionBackend.dense])
def test_module_rotates_each_document_from_its_beginning(backend: AttentionBackend):
    """Packed documents are the documents alone, positions and query scale included."""
    lengths = [70, 90]
    layout = table_layout(32, [lengths] * 2, [blocks_of(lengths, 32)] * 2)
    module = make_module(backend)
    query, key, value = module_inputs(layout)
    together = module(query, key, value, None, attention_bias=layout)
    for start, length in ((0, 70), (70, 90)):
        rows = [*range(start, start + length), *range(160 + start, 160 + start + length)]
        alone = table_layout(32, [[length]] * 2, [blocks_of([length], 32)] * 2)
        expected = module(query[rows], key[rows], value[rows], None, attention_bias=alone)
        assert (together[rows] - expected).norm() < 1e-12 * expected.norm()
    assert together.shape == (320, 2, 32)
    assert together.is_contiguous()


@pytest.mark.parametrize("kind", ["joint", "causal", "table"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_recomputing_the_attention_gives_the_same_gradients(kind: str, dtype: torch.dtype):
    """As Megatron's recomputation does: tensors as arguments, the layout by closure."""
    layout = SequenceLayout(160, 32, has_noisy_half=kind == "joint")
    if kind == "table":
        layout = table_layout(16, *TABLE_LAYOUTS["rho 0.5, padding"])
    module = make_module()
    inputs = module_inputs(layout, dtype)

    def forward(*tensors: Tensor) -> Tensor:
        return module(*tensors, None, attention_bias=layout)

    stored = torch.autograd.grad(forward(*inputs).pow(2).sum(), inputs)
    recomputed = checkpoint(forward, *inputs, use_reentrant=False).pow(2).sum()
    for a, b in zip(torch.autograd.grad(recomputed, inputs), stored, strict=True):
        assert torch.equal(a, b)
    checkpoint(forward, *inputs, use_reentrant=True).pow(2).sum().backward()  # Megatron's own is of this kind
    for x, b in zip(inputs, stored, strict=True):
        assert torch.equal(x.grad, b)


def test_training_works_after_validation_in_inference_mode():
    layout = SequenceLayout(144, 16, has_noisy_half=True)
    module = make_module(rope=RopeConfig(original_max_position_embeddings=33))
    query, key, value = module_inputs(layout, torch.float32)
    with torch.inference_mode():
        first = module(query.detach(), key.detach(), value.detach(), None, attention_bias=layout)
    out = module(query, key, value, None, attention_bias=layout)
    assert torch.equal(first, out)
    out.sum().backward()
    assert query.grad is not None


def test_a_call_without_layout_or_with_packed_sequences_is_refused():
    layout = SequenceLayout(8, 4, has_noisy_half=True)
    module, inputs = make_module(), module_inputs(layout)
    with pytest.raises(TypeError, match=r"SequenceLayout .* got NoneType"):
        module(*inputs, None)
    with pytest.raises(TypeError, match="packed_seq_params"):
        module(*inputs, None, attention_bias=layout, packed_seq_params=object())
    with pytest.raises(ValueError, match=r"\[16, 2, 4, 8\].*S = 8"):
        module(*inputs, None, attention_bias=SequenceLayout(8, 4, has_noisy_half=False))


def test_dropout_is_refused():
    with pytest.raises(ValueError, match=r"attention_dropout 0\.1"):
        make_module(attention_dropout=0.1)


def test_backends_are_resolved_by_device(monkeypatch: pytest.MonkeyPatch):
    auto, dense, native, chunked, flex = AttentionBackend
    monkeypatch.setattr(attention_module, "missing_for_native", lambda: None)
    assert [resolve_backend(backend, CPU) for backend in (auto, native)] == [native, native]
    monkeypatch.setattr(attention_module, "missing_for_native", lambda: "no compiler")
    assert resolve_backend(auto, CPU) is chunked
    with pytest.raises(ConfigError, match=r"native cannot be compiled here: no compiler\n.*auto or dense"):
        resolve_backend(native, CPU)
    with pytest.raises(ConfigError, match=r"model\.attention_backend: native is written for the CPU"):
        resolve_backend(native, CUDA)
    assert resolve_backend(auto, CUDA) is flex
    assert [resolve_backend(dense, device) for device in (CPU, CUDA)] == [dense, dense]
    assert resolve_backend(chunked, CPU) is chunked
    assert resolve_backend(flex, CUDA) is flex
    with pytest.raises(
        ConfigError, match=r"model.attention_backend: flex has no backward pass on cpu\n.*auto or dense"
    ):
        resolve_backend(flex, CPU)
    with pytest.raises(ConfigError, match=r"model\.attention_backend: chunked is written for the CPU"):
        resolve_backend(chunked, CUDA)
    layout = SequenceLayout(8, 4, has_noisy_half=True)
    query, key, value, _ = make_inputs(layout, 1, 2, 1, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"auto.* not resolved"):
        joint_attention(query, key, value, layout, auto)


@pytest.mark.parametrize(
    ("dtype", "key_heads", "is_torch"),
    [(torch.bfloat16, 2, True), (torch.float32, 2, False), (torch.float32, 4, True), (torch.float64, 2, True)],
)
def test_whose_kernel_the_plain_causal_mask_has_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, key_heads: int, is_torch: bool
) -> None:
    """In fp32 torch's own way with fewer key heads than query heads is to write out all scores."""
    monkeypatch.setattr(attention_module, "causal_attention", lambda *_: "torch")
    monkeypatch.setattr(attention_module, "flex_attention", lambda *_: "flex")
    query, key = torch.zeros(1, 4, 8, 16, dtype=dtype), torch.zeros(1, key_heads, 8, 16, dtype=dtype)
    found = joint_attention(query, key, key, SequenceLayout(8, 4, has_noisy_half=False), AttentionBackend.flex)
    assert found == ("torch" if is_torch else "flex")
