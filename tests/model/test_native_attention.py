"""The C++ kernel on other processors' instructions, and what Python tells it. Values: tests/model/test_attention.py."""

import ctypes

import pytest
import torch

from nld_train.model import native_attention as module
from nld_train.model.attention import dense_attention
from nld_train.model.native_attention import missing_for_native, native_attention
from nld_train.objective.sequence import SequenceLayout
from nld_train.platform.cpu import cpu_info
from nld_train.platform.native import NativeError, native_library
from nld_train.testing.layouts import table_layout
from nld_train.testing.native import needs_native

MACHINES = {
    "x86-64": "sse2",
    "sandybridge": "avx",
    "haswell": "avx2",
    "skylake-avx512": "avx512f",
    "cooperlake": "avx512_bf16",
}


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("machine", MACHINES)
def test_every_width_of_vectors(machine: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this processor has of them."""
    if MACHINES[machine] not in cpu_info().flags:
        pytest.skip(f"this processor has no {MACHINES[machine]}")
    library = native_library(module.SOURCE, machine)
    library.nld_room.restype = ctypes.c_int64
    monkeypatch.setattr(module, "_library", lambda: library)
    assert bool(library.nld_multiplies_bf16()) == (machine == "cooperlake")
    generator = torch.Generator().manual_seed(0)
    for dim in (3, 16, 72, 136):
        layout = SequenceLayout(96, 16, has_noisy_half=True)
        shapes = [(2, heads, 192, dim) for heads in (6, 2, 2, 6)]
        query, key, value, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
        found: list[torch.Tensor] = []
        expected: list[torch.Tensor] = []
        for attention, of_dtype, results in (
            (native_attention, dtype, found),
            (dense_attention, torch.float64, expected),
        ):
            tensors = [x.to(of_dtype).requires_grad_() for x in (query, key, value)]
            out = attention(*tensors, layout)
            results += [out.detach(), *torch.autograd.grad(out, tensors, grad.to(of_dtype))]
        for a, b in zip(found, expected, strict=True):
            assert (a.double() - b).norm() < (1e-6 if dtype is torch.float32 else 6e-3) * b.norm()


@needs_native
def test_arguments_of_other_sizes_are_refused() -> None:
    """The kernel would read what is not there."""
    layout = SequenceLayout(8, 4, has_noisy_half=True)
    query, key = torch.zeros(1, 4, 16, 8), torch.zeros(1, 2, 16, 8)
    native_attention(query, key, key, layout)
    for q, k, v in (
        (query, key.bfloat16(), key),
        (query[:, :3], key, key),
        (query, key[:, :, :15], key[:, :, :15]),
        (query[:, :, :15], key, key),
        (query, key, torch.zeros(1, 2, 16, 9)),
        (query, key.expand(2, -1, -1, -1), key.expand(2, -1, -1, -1)),
    ):
        with pytest.raises(ValueError, match="not the rows and keys of one attention over 16 rows"):
            native_attention(q, k, v, layout)
    of_two = table_layout(4, [[8], [8]], [[range(4), range(4, 8)]] * 2)
    with pytest.raises(ValueError, match="not the rows and keys of one attention over 16 rows"):
        native_attention(query, key, key, of_two)


def test_what_rows_see() -> None:
    """Ranges of keys; L = 6, documents of 4 and 2 tokens, blocks of 2, of which {2, 3} and {4, 5} are noisy in the
    first sequence and {0, 1} in the second, which has two rows of padding."""
    layout = table_layout(2, [[4, 2], [4, 2]], [[range(2, 4), range(4, 6)], [range(2)]])
    clean = [[4, 5, 0, 0], [4, 6, 0, 0], [4, 7, 0, 0], [4, 8, 0, 0], [8, 9, 0, 0], [8, 10, 0, 0]]
    first = [[4, 6, 0, 2], [4, 6, 0, 2], [8, 8, 2, 4], [8, 8, 2, 4]]
    second = [[4, 4, 0, 2], [4, 4, 0, 2], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert module._seen(layout, 2).tolist() == [first + clean, second + clean]
    # Two copies of a block that follow each other are two blocks.
    twice = table_layout(2, [[4]], [[range(2), range(2)]])
    assert module._seen(twice, 1)[0, :4, 2:].tolist() == [[0, 2], [0, 2], [2, 4], [2, 4]]
    assert module._seen(SequenceLayout(4, 2, has_noisy_half=False), 1)[0, 3].tolist() == [0, 4, 0, 0]


def test_what_rows_see_is_shared_by_layers() -> None:
    layout = SequenceLayout(64, 16, has_noisy_half=True)
    assert module._seen(layout, 2) is module._seen(SequenceLayout(64, 16, has_noisy_half=True), 2)


@needs_native
@pytest.mark.parametrize(
    ("num_sequences", "num_kv_heads", "num_threads", "parts"),
    [(1, 1, 2, 2), (1, 3, 2, 2), (2, 4, 2, 1), (1, 1, 1, 1), (1, 2, 3, 3), (1, 6, 4, 2), (2, 8, 4, 1)],
)
def test_rows_are_shared_out_as_threads_need(
    num_sequences: int, num_kv_heads: int, num_threads: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    query = torch.zeros(num_sequences, num_kv_heads, 8, 4)
    problem, _ = module._problem(SequenceLayout(8, 4, has_noisy_half=False), query, query, 1.0, False, {"query": query})
    assert (problem.parts, problem.threads) == (parts, num_threads)


def test_why_there_is_no_kernel_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise NativeError("a reason")

    monkeypatch.setattr(module, "_library", fails)
    missing_for_native.cache_clear()
    assert missing_for_native() == "a reason"
    missing_for_native.cache_clear()
