"""Block-masked attention on the CPU by a kernel of the project's own, native_attention.cpp: only what the mask keeps.

Dimensions: B sequences, S rows of the model's input, L clean tokens, N noisy rows, H query heads, K key-value heads, D
head dimension.
"""

import ctypes
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nld_train.objective.masks import cached_by_layout
from nld_train.objective.sequence import SequenceLayout, row_table
from nld_train.platform.cpu import unredirected
from nld_train.platform.native import NativeError, native_library

SOURCE = Path(__file__).with_suffix(".cpp")
DTYPES = (torch.float32, torch.bfloat16)


class _Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("sequence", "head", "row")]


_TENSORS = ("query", "key", "value", "grad_out", "out", "grad_query", "grad_key", "grad_value")


class _Problem(ctypes.Structure):
    """Field for field that of native_attention.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("sequences", "heads", "kv_heads", "rows", "noisy_rows", "keys", "dim")),
        *((name, ctypes.c_int64) for name in ("threads", "parts")),
        ("seen", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in _TENSORS),
        ("log_sum_exp", ctypes.c_void_p),
        *((f"of_{name}", _Strides) for name in _TENSORS),
        ("room", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("is_bf16", ctypes.c_int32),
    ]


@cache
def _library() -> ctypes.CDLL:
    library = native_library(SOURCE)
    library.nld_room.restype = ctypes.c_int64
    library.nld_forward.restype = library.nld_backward.restype = None
    return library


def arithmetic() -> str:
    """Of what is multiplied in bf16, for those who read it."""
    return "bf16 operands (AVX512-BF16)" if _library().nld_multiplies_bf16() else "fp32 operands"


@cache
def missing_for_native() -> str | None:
    """Why the kernel cannot be used here; None: it can. Compiles it."""
    try:
        _library()
    except NativeError as error:
        return str(error)
    return None


def native_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout, softmax_scale: float | None = None
) -> Tensor:
    """[B, H, S, D]: only what the mask keeps, on the CPU, in fp32 or bf16.

    Every row of a layout sees two ranges of keys: clean tokens of its document, and the noisy rows of its block. The
    kernel is given these, for each row; padding rows get 0 and no gradient. Scores, softmax and sums over keys and over
    rows are fp32; with AVX512-BF16 operands of products are bf16, else fp32, too.

    Args:
        query: [B, H, S, D], any strides.
        key: [B, K, N + L, D].
        value: [B, K, N + L, D].

    Raises:
        ValueError: not on the CPU, another dtype, or shapes that are not these.
        NativeError: the kernel cannot be compiled here.
    """
    if query.device.type != "cpu" or query.dtype not in DTYPES:
        raise ValueError(f"native_attention takes {DTYPES} on the CPU, not {query.dtype} on {query.device}")
    num_sequences, num_heads, num_rows, dim = query.shape
    of_keys = (num_sequences, key.shape[1], layout.num_keys, dim)
    is_alike = query.dtype == key.dtype == value.dtype and key.shape == value.shape == of_keys
    of_layout = num_sequences if layout.table is None else len(layout.table.blocks)
    if not is_alike or (num_sequences, num_rows) != (of_layout, layout.num_rows) or num_heads % key.shape[1]:
        given = ", ".join(f"{x.dtype} {list(x.shape)}" for x in (query, key, value))
        raise ValueError(f"not the rows and keys of one attention over {layout.num_rows} rows: {given}")
    scale = 1.0 / math.sqrt(query.shape[-1]) if softmax_scale is None else softmax_scale
    return _NativeAttention.apply(query, key, value, layout, scale)


@cached_by_layout
@torch.inference_mode(False)
def _seen(layout: SequenceLayout, num_sequences: int) -> Tensor:
    """int32 [B, S, 4]: first and end of the clean tokens and of the noisy rows that a row sees, as numbers of keys; a
    padding row sees none."""
    table, num_noisy = row_table(layout, num_sequences), layout.num_noisy_rows
    blocks = table.blocks.numpy()
    seen = np.zeros((*blocks.shape, 4), dtype=np.int32)
    seen[..., 0] = table.first_keys.numpy() + num_noisy
    seen[..., 1] = table.end_keys.numpy() + num_noisy
    if num_noisy > 0:
        noisy = blocks[:, :num_noisy]
        changes = np.ones((len(noisy), num_noisy + 1), dtype=bool)
        changes[:, 1:-1] = noisy[:, 1:] != noisy[:, :-1]
        places = np.arange(num_noisy + 1, dtype=np.int32)
        seen[:, :num_noisy, 2] = np.maximum.accumulate(np.where(changes, places, 0), axis=1)[:, :-1]
        ends = np.where(changes, places, num_noisy)[:, ::-1]
        seen[:, :num_noisy, 3] = np.minimum.accumulate(ends, axis=1)[:, ::-1][:, 1:]
        seen[:, :num_noisy][noisy < 0] = 0
    return torch.from_numpy(seen)


def _problem(
    layout: SequenceLayout, query: Tensor, key: Tensor, scale: float, is_backward: bool, tensors: dict[str, Tensor]
) -> tuple[_Problem, list[Tensor]]:
    """For the library, with tensors that must outlive the call."""
    num_sequences, num_heads, num_rows, dim = query.shape
    num_kv_heads, num_threads = key.shape[1], torch.get_num_threads()
    seen = _seen(layout, num_sequences)
    num_units = num_sequences * num_kv_heads
    problem = _Problem(
        sequences=num_sequences,
        heads=num_heads,
        kv_heads=num_kv_heads,
        rows=num_rows,
        noisy_rows=layout.num_noisy_rows,
        keys=key.shape[2],
        dim=dim,
        threads=num_threads,
        # As few as give every thread the same, unless there are many for each anyway.
        parts=1 if num_units >= 4 * num_threads else num_threads // math.gcd(num_units, num_threads),
        seen=seen.data_ptr(),
        scale=scale,
        is_bf16=query.dtype is torch.bfloat16,
    )
    for name, x in tensors.items():
        setattr(problem, name, x.data_ptr())
        if name != "log_sum_exp":
            setattr(problem, f"of_{name}", _Strides(*x.stride()[:3]))
    room = torch.empty(_library().nld_room(ctypes.byref(problem), is_backward), dtype=torch.float32)
    problem.room = room.data_ptr()
    return problem, [seen, room, *tensors.values()]


def _with_rows_in_a_piece(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_like(x: Tensor) -> Tensor:
    """[B, heads, rows, D] in Megatron's memory order."""
    num_sequences, num_heads, num_rows, dim = x.shape
    return x.new_empty(num_rows, num_sequences, num_heads, dim).permute(1, 2, 0, 3)


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    @unredirected
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout, scale: float) -> Tensor:
        query, key, value = (_with_rows_in_a_piece(x) for x in (query, key, value))
        out = _empty_like(query)
        log_sum_exp = torch.empty(query.shape[:3], dtype=torch.float32)
        tensors = {"query": query, "key": key, "value": value, "out": out, "log_sum_exp": log_sum_exp}
        problem, _alive = _problem(layout, query, key, scale, False, tensors)
        _library().nld_forward(ctypes.byref(problem))
        ctx.save_for_backward(query, key, value, out, log_sum_exp)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    @once_differentiable
    @unredirected
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, log_sum_exp = ctx.saved_tensors
        grad_query, grad_key, grad_value = (_empty_like(x) for x in (query, key, value))
        tensors = {
            "query": query,
            "key": key,
            "value": value,
            "out": out,
            "log_sum_exp": log_sum_exp,
            "grad_out": _with_rows_in_a_piece(grad_out),
            "grad_query": grad_query,
            "grad_key": grad_key,
            "grad_value": grad_value,
        }
        problem, _alive = _problem(ctx.layout, query, key, ctx.scale, True, tensors)
        _library().nld_backward(ctypes.byref(problem))
        return grad_query, grad_key, grad_value, None, None
