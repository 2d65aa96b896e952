"""Products with a weight, and Megatron's linear layers on the CPU made of them.

Megatron's own layers are left where tensor-parallel ranks exchange something inside of them, and on CUDA.

Dimensions: * rows, K inputs and N outputs of a layer (of this tensor-parallel rank's part).
"""

from functools import cache
from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor
from torch.autograd.function import once_differentiable

from nld_train.model.main_grad import added_to_main_grad, main_grad, sum_dtype
from nld_train.platform.cpu import cpu_info

ROW_UNIT = 32
"""oneDNN makes code for each number of rows, some 4 ms for a matrix: in fp32 it gets multiples of this alone, of which
a run soon has seen all that occur. Whole blocks of noisy rows come to them; the last layer's rows are padded."""

_HALF_ROW_UNIT = 8
"""Of rows in bf16, which oneDNN gets all: it takes a sixth longer over an odd number."""


@cache
def has_fast_onednn() -> bool:
    """oneDNN multiplies fp32 faster than MKL: on AMD's processors with AVX-512, where MKL does without it. (Asked once:
    ``torch.backends.mkldnn.flags`` changes nothing later.)"""
    info = cpu_info()
    is_there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return is_there and info.vendor == "AuthenticAMD" and "avx512f" in info.flags


@cache
def has_bf16_products() -> bool:
    """oneDNN multiplies bf16 here."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fp32_products() -> str:
    """By what they are computed on the CPU, for those who read it."""
    return f"oneDNN (multiples of {ROW_UNIT} rows), torch" if has_fast_onednn() else "torch"


def fast_rows(dtype: torch.dtype, device: torch.device) -> int:
    """A product of a multiple of so many rows is the faster one."""
    if device.type != "cpu":
        return 1
    if dtype is torch.bfloat16 and has_bf16_products():
        return _HALF_ROW_UNIT
    return ROW_UNIT if dtype is torch.float32 and has_fast_onednn() else 1


def _takes_onednn(x: Tensor) -> bool:
    """Of the rows of a product, [rows, any]; torch itself gives those in bf16 to it."""
    return x.dtype is torch.float32 and fast_rows(x.dtype, x.device) > 1 and len(x) % ROW_UNIT == 0


def times_transposed(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x [rows, K] @ weight.T, of weight [N, K] with any strides: [rows, N], written to ``out`` if that is given."""
    if not _takes_onednn(x):
        return torch.mm(x, weight.t(), out=out)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return product if out is None else out.copy_(product)


class _Linear(torch.autograd.Function):
    """x [*, K] @ weight.T. The weight's gradient goes straight to Megatron's ``weight.main_grad``, if there is one: in
    fp32 no tensor of the weight's size is made. A half-precision product is rounded, then added, as Megatron does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return times_transposed(x.flatten(0, -2), weight).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = None
        rows = grad.flatten(0, -2)
        if ctx.needs_input_grad[0]:
            of_x = times_transposed(rows, weight.t()).view(x.shape)
        if ctx.needs_input_grad[1]:
            total = main_grad(weight, sum_dtype(weight.dtype))
            if total is None:
                of_weight = torch.mm(rows.t(), x.flatten(0, -2))
            else:
                if total.dtype == weight.dtype:
                    total.addmm_(rows.t(), x.flatten(0, -2))
                else:
                    total.add_(torch.mm(rows.t(), x.flatten(0, -2)))
                of_weight = added_to_main_grad(weight)
        return of_x, of_weight


class _OnCPU:
    """Before Megatron's linear layer: its product is :class:`_Linear`."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        exchanges = kwargs["allreduce_dgrad"] or kwargs["sequence_parallel"]
        if input.is_cuda or exchanges or kwargs["bias"] is not None or not weight.requires_grad:
            return super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc,no-any-return]
        return _Linear.apply(input, weight)


class ColumnParallelLinear(_OnCPU, tensor_parallel.ColumnParallelLinear):
    """[*, K] -> [*, N], of a weight that is cut along N."""


class RowParallelLinear(_OnCPU, tensor_parallel.RowParallelLinear):
    """[*, K] -> [*, N], of a weight that is cut along K."""
