"""The output head and its cross-entropy: only rows with a weight, in chunks, gradients computed in the forward.

The head is the largest matrix of a small model and its logits the largest activation of any model. Two facts make it
cheap: the loss weights are known before the forward, so rows without weight never reach the head and each chunk's
gradient can be formed while its logits are at hand; and no more than one chunk of logits ever exists.

Dimensions: R rows with weight, H hidden size, V vocabulary (V/tp rows of it on each tensor-parallel rank).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable

from nld_train.objective.sequence import JointBatch

CHUNK_ROWS = {"cpu": 256, "cuda": 2048}  # rows of logits that exist at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedRows:
    """The rows of a micro-batch that enter the loss.

    ``rows`` int64 [R]: index into the flattened [S, B] (Megatron's order of activations). ``targets`` int64 [R].
    ``weights`` float64 [R]: factor of each row's cross-entropy in the loss.
    """

    rows: Tensor
    targets: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> "WeightedRows":
        return WeightedRows(
            rows=self.rows.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            weights=self.weights.to(device, non_blocking=True),
        )


def select_weighted_rows(batch: JointBatch, diffusion_loss_weight: float) -> WeightedRows:
    """Pick the rows with weight from a batch on the CPU (on a GPU the count would force a synchronisation).

    Args:
        batch: tensors on the CPU.
        diffusion_loss_weight: alpha.
    """
    weights = batch.row_weights(diffusion_loss_weight).t().reshape(-1)
    rows = weights.nonzero().squeeze(1)
    targets = batch.targets.t().reshape(-1)
    return WeightedRows(rows=rows, targets=targets.index_select(0, rows), weights=weights.index_select(0, rows))


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Softmax and sums run at least in fp32."""
    return torch.promote_types(dtype, torch.float32)


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """sum_r weights[r] * CE(hidden[r] @ weight.T, targets[r]) and the unweighted CE of each row.

    With several tensor-parallel ranks each holds V/tp rows of ``weight``; maximum, normaliser and target logit are
    reduced over ``group``, and so is the gradient of ``hidden`` (once, after all chunks).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        first_vocab_id: int,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        compute_dtype = _compute_dtype(hidden.dtype)
        num_rows = hidden.shape[0]
        num_local = weight.shape[0]
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        row_losses = torch.empty(num_rows, dtype=compute_dtype, device=hidden.device)
        weights = weights.to(compute_dtype)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros(weight.shape, dtype=compute_dtype, device=weight.device) if needs_grad else None
        chunk = CHUNK_ROWS[hidden.device.type]
        for start in range(0, num_rows, chunk):
            rows = slice(start, min(start + chunk, num_rows))
            logits = (hidden[rows] @ weight.t()).to(compute_dtype)
            local_targets = targets[rows] - first_vocab_id
            is_local = (local_targets >= 0) & (local_targets < num_local)
            local_targets = torch.where(is_local, local_targets, 0).unsqueeze(1)
            maximum = logits.amax(dim=1, keepdim=True)
            if group is not None:
                dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
            logits.sub_(maximum)
            target_logits = torch.where(is_local, logits.gather(1, local_targets).squeeze(1), 0.0)
            probabilities = logits.exp_()  # unnormalised until the division below
            sums = torch.stack([probabilities.sum(dim=1), target_logits])
            if group is not None:
                dist.all_reduce(sums, group=group)
            row_losses[rows] = sums[0].log() - sums[1]
            if grad_hidden is None or grad_weight is None:
                continue
            # d loss / d logits = weight * (softmax - onehot)
            probabilities.mul_((weights[rows] / sums[0]).unsqueeze(1))
            probabilities.scatter_add_(1, local_targets, torch.where(is_local, -weights[rows], 0.0).unsqueeze(1))
            grad_logits = probabilities.to(hidden.dtype)
            torch.mm(grad_logits, weight, out=grad_hidden[rows])
            if grad_logits.dtype == compute_dtype:
                grad_weight.addmm_(grad_logits.t(), hidden[rows])
            else:
                grad_weight.add_(grad_logits.t() @ hidden[rows])
        if grad_hidden is not None and grad_weight is not None:
            if group is not None:
                dist.all_reduce(grad_hidden, group=group)
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(row_losses)
        return (row_losses * weights).sum(), row_losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            grad_hidden * grad_loss.to(grad_hidden.dtype),
            grad_weight.mul_(grad_loss).to(ctx.weight_dtype),
            None,
            None,
            None,
            None,
        )


def fused_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    first_vocab_id: int = 0,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of cross-entropies, and the cross-entropy of each row, without ever holding all logits.

    Args:
        hidden: [R, H].
        weight: [V/tp, H], the rows ``first_vocab_id`` ... of the head.
        targets: int64 [R], ids of the whole vocabulary.
        weights: [R], factor of each row; known before the forward, so gradients are formed in it.
        first_vocab_id: id of this rank's first vocabulary row.
        group: tensor-parallel group; None for one rank.

    Returns:
        the weighted sum (differentiable with respect to ``hidden`` and ``weight``; fp32, or fp64 for fp64 input) and
        the unweighted cross-entropy of each row [R] (no gradient).
    """
    return _FusedLinearCrossEntropy.apply(hidden, weight, targets, weights, first_vocab_id, group)


class LossHead(tensor_parallel.ColumnParallelLinear):
    """Megatron's vocabulary-parallel output layer that returns losses instead of logits.

    Same parameter (``weight`` [V/tp, H]) and sharded state as the layer it extends.
    """

    def __init__(self, config: TransformerConfig, vocab_size: int) -> None:
        super().__init__(
            config.hidden_size,
            vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=True,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )

    def forward(self, hidden: Tensor, selected: WeightedRows | None = None) -> Any:
        """Loss of the selected rows, or all logits.

        Args:
            hidden: [S, B, H].
            selected: the rows that enter the loss; None asks for logits.

        Returns:
            ``(loss, row_losses)`` as :func:`fused_linear_cross_entropy`, or logits [B, S, V] gathered over
            tensor-parallel ranks.
        """
        if selected is None:
            logits, _ = super().forward(hidden)
            return logits.transpose(0, 1)
        rank = parallel_state.get_tensor_model_parallel_rank()
        is_parallel = parallel_state.get_tensor_model_parallel_world_size() > 1
        return fused_linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]).index_select(0, selected.rows),
            self.weight,
            selected.targets,
            selected.weights,
            first_vocab_id=rank * self.output_size_per_partition,
            group=self.tp_group if is_parallel else None,
        )
