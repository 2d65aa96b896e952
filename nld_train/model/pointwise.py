"""What stands between a layer's matrix products, in few passes over memory: RMSNorm and SwiGLU.

Each keeps its input alone for the backward pass, and computes the rest again there. On CUDA the passes of one direction
are compiled into one kernel.

Dimensions: ``*`` rows, H hidden size, F half of what the first matrix of an MLP gives.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable


def _on_device(passes: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    return _compiled(passes) if x.is_cuda else passes


@cache
def _compiled(passes: Callable[..., Any]) -> Callable[..., Any]:
    # The number of rows differs from one micro-batch to the next; it must not compile again.
    return torch.compile(passes, dynamic=True, fullgraph=True)


def _normalize(hidden: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm, and one over each row's root of the mean square [*, 1], at least in fp32."""
    values = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    scale = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    return (values * scale).to(hidden.dtype).mul_(weight), scale


def _normalize_backward(grad_out: Tensor, hidden: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """With n = x s, y = w n and g = dL/dy: dL/dw = sum over rows of g n, dL/dx = s (g w - n mean(g w n))."""
    normed = hidden * scale
    grad = grad_out.to(scale.dtype)
    product = grad * normed
    grad_weight = product.flatten(0, -2).sum(0)
    shared = product.mul_(weight).mean(-1, keepdim=True)
    grad_hidden = (grad * weight).addcmul_(normed, shared, value=-1).mul_(scale)
    return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scale = _on_device(_normalize, hidden)(hidden, weight, eps)
        ctx.save_for_backward(hidden, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return *_on_device(_normalize_backward, grad_out)(grad_out, *ctx.saved_tensors), None


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm, as in transformers' Ministral3: statistics at least in fp32, weight applied after.

    Megatron's torch norm refuses sequence parallelism; this one marks its weight so that Megatron sums its gradient
    over tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """[*, H] -> [*, H]"""
        return _RMSNorm.apply(hidden, self.weight, self.eps)


def _gate(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _gate_backward(grad_out: Tensor, x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    grad = torch.empty_like(x)
    grad_gate, grad_up = grad.chunk(2, dim=-1)
    # No buffer but the result. silu and its derivative are torch's own, so nothing differs from autograd's way.
    torch.mul(grad_out, up, out=grad_gate)
    torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
    torch.ops.aten.silu.out(gate, out=grad_up)
    grad_up.mul_(grad_out)
    return grad


def _gate_backward_as_one(grad_out: Tensor, x: Tensor) -> Tensor:
    """The same without writing into parts, which a compiler does not follow."""
    gate, up = x.chunk(2, dim=-1)
    return torch.cat([torch.ops.aten.silu_backward(grad_out * up, gate), F.silu(gate) * grad_out], dim=-1)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _on_device(_gate, x)(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _compiled(_gate_backward_as_one)(grad_out, x) if x.is_cuda else _gate_backward(grad_out, x)


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up, of x [*, 2F] = [gate | up]: [*, F]."""
    return _SwiGLU.apply(x)


class GatedMLP(MLP):
    """Megatron's MLP with :func:`swiglu` between its matrices.

    Megatron's own way keeps silu(gate) and, because it adds an offset of 0, a copy of up as well.
    """

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        """[S, B, H] -> [S, B, H], and no bias; what else Megatron passes is for experts."""
        inside, _ = self.linear_fc1(hidden_states)
        out, bias = self.linear_fc2(swiglu(inside))
        return out, bias
