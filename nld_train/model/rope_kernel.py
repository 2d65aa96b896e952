"""The rotation of rope as one CUDA kernel; imported only where rows are on a GPU (Triton comes with torch there)."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate_row(  # type: ignore[no-untyped-def]  # Triton reads annotations as its own types
    x,
    out,
    cos,
    sin,
    num_sequences,
    length,
    x_row,
    x_sequence,
    x_head,
    table_row,
    table_sequence,
    heads: tl.constexpr,
    half: tl.constexpr,
    direction: tl.constexpr,
    padded_heads: tl.constexpr,
    padded_half: tl.constexpr,
):
    """All heads of one row of one sequence; ``*_row``, ``*_sequence``, ``*_head`` are strides in elements."""
    program = tl.program_id(0)
    row = program // num_sequences
    sequence = program % num_sequences
    head = tl.arange(0, padded_heads)[:, None]
    dim = tl.arange(0, padded_half)[None, :]
    is_there = (head < heads) & (dim < half)
    # 64 bits: a long micro-batch has more than 2^31 elements.
    source = x + row.to(tl.int64) * x_row + sequence.to(tl.int64) * x_sequence + head * x_head + dim
    place = (row % length) * table_row + sequence * table_sequence + dim
    x1 = tl.load(source, mask=is_there).to(tl.float32)
    x2 = tl.load(source + half, mask=is_there).to(tl.float32)
    c = tl.load(cos + place, mask=dim < half).to(tl.float32)
    s = tl.load(sin + place, mask=dim < half).to(tl.float32) * direction
    target = out + program.to(tl.int64) * (2 * half * heads) + head * (2 * half) + dim
    tl.store(target, (x1 * c - x2 * s).to(out.dtype.element_ty), mask=is_there)
    tl.store(target + half, (x2 * c + x1 * s).to(out.dtype.element_ty), mask=is_there)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, backward: bool = False) -> Tensor:
    """Contiguous [S, B, heads, D], each number read, rounded and written once.

    Args:
        x: [S, B, heads, D], fp32 or bf16, any strides with a contiguous last dimension.
        cos, sin: [L, 1, D], the same in every half and sequence, or [S, B, D]; with the same strides.
        backward: by the opposite angle.
    """
    num_rows, num_sequences, heads, dim = x.shape
    if x.stride(3) != 1 or cos.stride() != sin.stride() or cos.stride(2) != 1:
        raise ValueError(f"strides of x {x.stride()}, cos {cos.stride()} and sin {sin.stride()} do not fit the kernel")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    _rotate_row[(num_rows * num_sequences,)](
        x,
        out,
        cos,
        sin,
        num_sequences,
        cos.shape[0],
        x.stride(0),
        x.stride(1),
        x.stride(2),
        cos.stride(0),
        cos.stride(1) if cos.shape[1] > 1 else 0,
        heads=heads,
        half=dim // 2,
        direction=-1.0 if backward else 1.0,
        padded_heads=triton.next_power_of_2(heads),
        padded_half=triton.next_power_of_2(dim // 2),
    )
    return out
