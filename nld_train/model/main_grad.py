"""Gradients that a backward pass adds to Megatron's fp32 buffer itself: no tensor of the weight's size is made."""

import torch
from torch import Tensor


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of sums over values of ``dtype``: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def main_grad(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Megatron's gradient buffer; None for a parameter outside of DistributedDataParallel, or for another dtype."""
    if not hasattr(weight, "main_grad") or weight.main_grad.dtype != dtype:
        return None
    return weight.main_grad


def added_to_main_grad(weight: Tensor) -> Tensor:
    """What backward returns for a weight whose gradient it has added.

    Megatron wants to see some ``weight.grad`` (its hook counts parameters whose gradient is ready) and, by
    ``grad_added_to_main_grad``, not to add it: an empty sparse tensor is one without memory.
    """
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device, layout=torch.sparse_coo)
