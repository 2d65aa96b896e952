"""The embedding of tokens, with a gradient that is summed in fp32.

Half of a noisy part is one token, the mask: its row of the gradient is a sum over thousands of rows, which torch's
kernel for the CPU takes in the dtype of the weights (in bf16 with an error of some percent).
"""

from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor
from torch.autograd.function import once_differentiable

from nld_train.model.main_grad import added_to_main_grad, main_grad, sum_dtype


class _Lookup(torch.autograd.Function):
    """weight[ids]. On the CPU the gradient goes straight to Megatron's ``weight.main_grad``, row by row, where there is
    one: nothing of the weight's size is filled or added."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight = weight
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        weight = ctx.weight
        dtype = sum_dtype(weight.dtype)
        total = main_grad(weight, dtype)
        ids, grad = ids.flatten(), grad.flatten(0, -2).to(dtype)
        if total is not None:
            total.index_add_(0, ids, grad)
            return None, added_to_main_grad(weight)
        of_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device).index_add_(0, ids, grad)
        return None, of_weight.to(weight.dtype)


class TokenEmbedding(tensor_parallel.VocabParallelEmbedding):
    """Megatron's vocabulary-parallel embedding: same parameter (``weight`` [V/tp, H]) and sharded state.

    On CUDA it is Megatron's altogether: the kernel there sums in fp32.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [B, S] -> [B, S, H]; with sequence parallelism this rank's share [S/tp, B, H]."""
        if self.weight.is_cuda:
            return super().forward(tokens)
        if self.tp_group.size() == 1:
            return _Lookup.apply(tokens, self.weight)
        ids = tokens - self.vocab_start_index
        is_other = (ids < 0) | (ids >= self.num_embeddings_per_partition)
        hidden = _Lookup.apply(ids.masked_fill(is_other, 0), self.weight).masked_fill(is_other[..., None], 0.0)
        if self.reduce_scatter_embeddings:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(
                hidden.transpose(0, 1).contiguous(), group=self.tp_group
            )
        return tensor_parallel.reduce_from_tensor_model_parallel_region(hidden, group=self.tp_group)
