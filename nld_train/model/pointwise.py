"""What stands between a layer's matrix products, in few passes over memory: RMSNorm and SwiGLU.

Each keeps its input alone for the backward pass, and computes the rest again there. Where the model's configuration
says so (:func:`compiles_pointwise`) the passes of one direction are compiled into one.

Dimensions: ``*`` rows, H hidden size, F half of what the first matrix of an MLP gives.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable

from nld_train.config.schema import CompilePointwise
from nld_train.platform.compilation import run_compiled


@dataclass
class DecoderConfig(TransformerConfig):
    """Megatron's configuration, and what of this project its layers are built with."""

    compile_pointwise: bool = False
    """Norm, SwiGLU and rotary embedding compiled (on a GPU the last is a kernel of its own in any case)."""


def compiles_pointwise(choice: CompilePointwise, device: torch.device) -> bool:
    """What ``model.compile_pointwise`` means on this device."""
    return choice is CompilePointwise.always or (choice is CompilePointwise.auto and device.type == "cuda")


def _form(passes: Callable[..., Any], x: Tensor, is_compiled: bool) -> Callable[..., Any]:
    """Of passes over rows, as they run on the device of ``x``."""
    if not is_compiled:
        return passes
    return _compiled_for_cuda(passes) if x.is_cuda else partial(_compiled_for_cpu, passes, x.shape[:-1])


@cache
def _compiled_for_cuda(passes: Callable[..., Any]) -> Callable[..., Any]:
    # The number of rows differs from one micro-batch to the next; it must not compile again.
    return torch.compile(passes, dynamic=True, fullgraph=True)


def _compiled_for_cpu(passes: Callable[..., Any], leading: torch.Size, *arguments: Any) -> Any:
    """Every tensor but the weight is [*, any], with ``leading`` for *; compiled once for [rows, any]."""
    given = [x.flatten(0, -2) if isinstance(x, Tensor) and x.dim() > 1 else x for x in arguments]
    found = run_compiled(passes, *given)
    if isinstance(found, Tensor):
        return found.unflatten(0, leading)
    return tuple(x.unflatten(0, leading) if x.dim() > 1 else x for x in found)


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
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float, is_compiled: bool) -> Tensor:
        ctx.is_compiled = is_compiled
        out, scale = _form(_normalize, hidden, is_compiled)(hidden, weight, eps)
        ctx.save_for_backward(hidden, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return *_form(_normalize_backward, grad_out, ctx.is_compiled)(grad_out, *ctx.saved_tensors), None, None


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm, as in transformers' Ministral3: statistics at least in fp32, weight applied after.

    Megatron's torch norm refuses sequence parallelism; this one marks its weight so that Megatron sums its gradient
    over tensor-parallel ranks.
    """

    def __init__(self, config: DecoderConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.is_compiled = config.compile_pointwise
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """[*, H] -> [*, H]"""
        return _RMSNorm.apply(hidden, self.weight, self.eps, self.is_compiled)


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
    def forward(ctx: Any, x: Tensor, is_compiled: bool) -> Tensor:
        ctx.is_compiled = is_compiled
        ctx.save_for_backward(x)
        return _form(_gate, x, is_compiled)(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        backward = _gate_backward_as_one if ctx.is_compiled else _gate_backward
        return _form(backward, grad_out, ctx.is_compiled)(grad_out, x), None


def swiglu(x: Tensor, *, is_compiled: bool = False) -> Tensor:
    """silu(gate) * up, of x [*, 2F] = [gate | up]: [*, F]."""
    return _SwiGLU.apply(x, is_compiled)


class GatedMLP(MLP):
    """Megatron's MLP with :func:`swiglu` between its matrices.

    Megatron's own way keeps silu(gate) and, because it adds an offset of 0, a copy of up as well.
    """

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        """[S, B, H] -> [S, B, H], and no bias; what else Megatron passes is for experts."""
        inside, _ = self.linear_fc1(hidden_states)
        out, bias = self.linear_fc2(swiglu(inside, is_compiled=self.config.compile_pointwise))
        return out, bias
