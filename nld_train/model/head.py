"""The output head and its cross-entropy: only rows with a weight, in chunks, gradients computed in the forward.

The head is the largest matrix of a small model and its logits the largest activation of any model. Two facts make it
cheap: the loss weights are known before the forward, so rows without weight never reach the head and each chunk's
gradient can be formed while its logits are at hand; and no more than one chunk of logits ever exists. The weight's
gradient is added to Megatron's own buffer chunk by chunk. What is done to logits one by one is done to a few rows at a
time, which stay in the caches from one operation to the next; half precision has only those rows in fp32.

Dimensions: R rows with weight, H hidden size, V vocabulary (V/tp rows of it on each tensor-parallel rank).
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable

from nld_train.config.workload import num_head_chunks
from nld_train.model.linear import ROW_UNIT, times_transposed
from nld_train.model.main_grad import added_to_main_grad, main_grad, sum_dtype
from nld_train.objective.sequence import JointBatch
from nld_train.platform.cpu import bf16_operands

_HALF_CHUNK_ROWS = {"cpu": 1024, "cuda": 2048}
_CHUNK_BYTES = 128 << 20
_PASS_BYTES = {"cpu": 2 << 20, "cuda": 32 << 20}  # in the dtype of sums; on the CPU of each thread
_PRODUCT_ROWS = {"cpu": 2048, "cuda": 8192}  # vocabulary rows of a half-precision weight gradient that exist at a time


def chunk_rows(dtype: torch.dtype, device: torch.device, num_local: int = 1) -> int:
    """Rows whose logits usually exist at a time. Each chunk reads the weight twice and moves the fp32 sum of its
    gradient once. In half precision 1024 rows take the memory of 512 in fp32; on CUDA it is twice that.

    Args:
        num_local: V/tp. On the CPU a chunk in fp32 usually has 128 MiB at most, fewer rows of more than 65536 logits,
            so that the head holds a third of what full logits would.
    """
    if dtype.itemsize == 2:
        return _HALF_CHUNK_ROWS[device.type]
    if device.type == "cpu":
        rows = min(512, _CHUNK_BYTES // (num_local * dtype.itemsize))
        return rows // ROW_UNIT * ROW_UNIT if rows > ROW_UNIT else max(1, rows)
    return 512


def _equal_chunks(num_rows: int, usual: int) -> list[slice]:
    """:func:`num_head_chunks`, nearly equal, of rows in a multiple that suits a product."""
    num_chunks = num_head_chunks(num_rows, usual)
    unit = ROW_UNIT if usual % ROW_UNIT == 0 else 1
    size = max(1, -(-num_rows // (num_chunks * unit))) * unit
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def pass_rows(num_local: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows that one operation after the other goes over: as many as stay in the caches, on CUDA not so few that
    launching takes longer than moving them.

    Args:
        num_local: V/tp.
        dtype: of the operands; what is counted are their values in the dtype of sums.
    """
    rows = max(1, _PASS_BYTES[device.type] // (num_local * sum_dtype(dtype).itemsize))
    return rows * torch.get_num_threads() if device.type == "cpu" else rows


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


def select_weighted_rows(batch: JointBatch, row_weights: Tensor) -> WeightedRows:
    """Pick the rows with weight from a batch on the CPU (on a GPU the count would force a synchronisation).

    Args:
        batch: tensors on the CPU.
        row_weights: float64 [B, S] on the CPU, factor of each row's cross-entropy in the loss.
    """
    weights = row_weights.t().reshape(-1)
    rows = weights.nonzero().squeeze(1)
    targets = batch.targets.t().reshape(-1)
    return WeightedRows(rows=rows, targets=targets.index_select(0, rows), weights=weights.index_select(0, rows))


def gather_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """[S, B, *] -> [R, 1, *]: the rows (int64 [R], of the flattened [S, B]) as one long sequence."""
    return hidden.flatten(0, 1).index_select(0, rows).unsqueeze(1)


def padded_to_multiple(rows: Tensor, multiple: int) -> Tensor:
    """``rows`` (int64 [R]) lengthened by the last of them to a multiple, at least one of it; by row 0 if there is none.

    A row that enters the loss anyway: of another one a number that is not finite would be in the gradient alone.
    """
    missing = max(1, -(-len(rows) // multiple)) * multiple - len(rows)
    last = rows[-1:] if len(rows) > 0 else rows.new_zeros(1)
    return torch.cat([rows, last.expand(missing)])


def _softmax_in_place(logits: Tensor, local_targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a rank's logits [rows, V/tp]. ``local_targets``: int64 [rows, 1].

    Returns:
        three of [rows]: the largest logit; the largest probability, which is one over the sum of exp(logit - largest
        logit); the target's logit.
    """
    maximum = logits.amax(dim=1)
    target_logits = logits.gather(1, local_targets).squeeze(1)
    return maximum, torch.softmax(logits, dim=1, out=logits).amax(dim=1), target_logits


def _cross_entropy_in_place(
    chunk: Tensor,
    local_targets: Tensor,
    is_local: Tensor,
    weights: Tensor,
    losses: Tensor,
    is_correct: Tensor,
    group: dist.ProcessGroup | None,
    *,
    needs_grad: bool,
) -> None:
    """Losses of a chunk of rows. Its logits become their gradient, or nothing of use.

    Args:
        chunk: [rows, V/tp], logits in the dtype of the operands.
        local_targets: int64 [rows, 1], the target's place among this rank's V/tp; 0 where it is not among them.
        is_local: bool [rows], the target is.
        weights: [rows], in the dtype of sums.
        losses: [rows], in the dtype of sums; written. The cross-entropy, not weighted.
        is_correct: bool [rows]; written.
        group: the ranks among which the vocabulary is split; two all-reduces.
        needs_grad: the gradient is wanted.
    """
    num_rows, num_local = chunk.shape
    step = pass_rows(num_local, chunk.dtype, chunk.device)
    passes = [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]
    scratch = None
    if chunk.dtype != losses.dtype:
        scratch = chunk.new_empty(min(step, num_rows), num_local, dtype=losses.dtype)

    def in_sum_dtype(rows: slice) -> Tensor:
        return chunk[rows] if scratch is None else scratch[: rows.stop - rows.start].copy_(chunk[rows])

    # The gradient follows at once, while the probabilities are at hand. With a group it waits for the other ranks,
    # which hear of a whole chunk at a time: what half precision has no place to keep is computed again.
    for span in [[rows] for rows in passes] if group is None else [passes]:
        parts = [_softmax_in_place(in_sum_dtype(rows), local_targets[rows]) for rows in span]
        local_maximum, largest, target_logits = (
            parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
        )
        of_span = slice(span[0].start, span[-1].stop)
        maximum = local_maximum
        if group is not None:
            maximum = maximum.clone()
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
        local_sum = (local_maximum - maximum).exp() / largest
        sums = torch.stack([local_sum, torch.where(is_local[of_span], target_logits - maximum, 0.0)])
        if group is not None:
            dist.all_reduce(sums, group=group)
        losses[of_span] = sums[0].log() - sums[1]
        is_correct[of_span] = sums[1] == 0  # the maximum was subtracted
        if not needs_grad:
            continue
        # d loss / d logits = weight * (softmax - onehot). A row whose loss is not finite has a gradient that is not (a
        # logit of the target that overflows to -inf would not see to it): the norm tells all ranks.
        of_rows = weights[of_span]
        scales = torch.where(losses[of_span].isfinite(), of_rows * (local_sum / sums[0]), math.nan).unsqueeze(1)
        of_targets = torch.where(is_local[of_span], -of_rows, 0.0).unsqueeze(1)
        for rows, scale, of_target in zip(span, scales.split(step), of_targets.split(step), strict=True):
            if scratch is None:
                probabilities = chunk[rows]
            elif len(span) == 1:
                probabilities = scratch[: rows.stop - rows.start]
            else:
                logits = in_sum_dtype(rows)
                probabilities = torch.softmax(logits, dim=1, out=logits)
            probabilities.mul_(scale).scatter_add_(1, local_targets[rows], of_target)
            if scratch is not None:
                chunk[rows] = probabilities


def _add_weight_gradient(total: Tensor, grad_logits: Tensor, hidden: Tensor, *, is_rounded_again: bool) -> None:
    """total [V/tp, H] += grad_logits.T @ hidden.

    Half-precision operands are multiplied as they are. On CUDA the product's fp32 sums are added. On the CPU torch
    rounds them to half precision first, as it does for every other layer: that is the error of a gradient computed at
    once. A total that will be rounded again gets them unrounded, at twice the time.

    Args:
        total: fp32 (fp64 for fp64 operands), updated in place.
        grad_logits: [rows, V/tp], in the dtype of ``hidden``.
        hidden: [rows, H].
        is_rounded_again: ``total`` will be.
    """
    if hidden.dtype == total.dtype:
        total.addmm_(grad_logits.t(), hidden)
        return
    step = _PRODUCT_ROWS[hidden.device.type]
    parts = [slice(start, start + step) for start in range(0, total.shape[0], step)]
    if hidden.device.type == "cpu" and is_rounded_again:
        hidden = hidden.to(total.dtype)
        with bf16_operands() if grad_logits.dtype is torch.bfloat16 else nullcontext():
            for part in parts:
                total[part].addmm_(grad_logits[:, part].t().to(total.dtype), hidden)
    else:
        # torch.mm's out_dtype (torch >= 2.8, CUDA) keeps the fp32 sums; it cannot add to its result.
        kept: dict[str, Any] = {} if hidden.device.type == "cpu" else {"out_dtype": total.dtype}
        for part in parts:
            total[part].add_(torch.mm(grad_logits[:, part].t(), hidden, **kept))


def _require_unit_gradient(grad_loss: Tensor) -> None:
    """Raise where the incoming gradient is not 1: the weight's gradient is in main_grad already, unscaled."""
    message = (
        "the gradient of the loss sum must be exactly 1, because the head has added its weight's gradient to main_grad "
        "in the forward: use calculate_per_token_loss=True, a loss scale of 1, and scale the row weights instead"
    )
    is_one = grad_loss == 1
    if is_one.device.type == "cpu":
        if not is_one:
            raise ValueError(f"{message} (found {grad_loss.item()})")
    else:
        torch._assert_async(is_one, message)  # the host does not wait; the device stops


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """sum_r weights[r] * CE(hidden[r] @ weight.T, targets[r]), the unweighted CE of each row, and who is right.

    With several tensor-parallel ranks each holds V/tp rows of ``weight``; maximum, normaliser and target logit are
    reduced over ``group``, and so is the gradient of ``hidden`` (once, after all chunks).

    The gradient of ``weight`` goes straight to Megatron's ``weight.main_grad``.
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
        needs_grad: bool,
        reduces_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        compute_dtype = sum_dtype(hidden.dtype)
        num_rows = len(targets)
        num_local = weight.shape[0]
        row_losses = torch.empty(num_rows, dtype=compute_dtype, device=hidden.device)
        is_correct = torch.empty(num_rows, dtype=torch.bool, device=hidden.device)
        weights = weights.to(compute_dtype)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = in_main_grad = None
        if needs_grad and weight.requires_grad:
            grad_weight = in_main_grad = main_grad(weight, compute_dtype)
            if grad_weight is None:
                grad_weight = torch.zeros(weight.shape, dtype=compute_dtype, device=weight.device)
        local_targets = targets - first_vocab_id
        is_local = (local_targets >= 0) & (local_targets < num_local)
        local_targets = torch.where(is_local, local_targets, 0).unsqueeze(1)
        # Rows of padding are multiplied with the others, since products want them, and that is all.
        for all_rows in _equal_chunks(len(hidden), chunk_rows(hidden.dtype, hidden.device, num_local)):
            rows = slice(all_rows.start, min(all_rows.stop, num_rows))
            if rows.stop <= rows.start:
                break
            chunk = of_rows = hidden[:0]  # what they hold is free for the next one
            chunk = times_transposed(hidden[all_rows], weight)
            of_rows = chunk[: rows.stop - rows.start]
            _cross_entropy_in_place(
                of_rows,
                local_targets[rows],
                is_local[rows],
                weights[rows],
                row_losses[rows],
                is_correct[rows],
                group,
                needs_grad=needs_grad,
            )
            if grad_hidden is not None:
                times_transposed(chunk, weight.t(), out=grad_hidden[all_rows])
                if grad_weight is not None:
                    _add_weight_gradient(grad_weight, of_rows, hidden[rows], is_rounded_again=in_main_grad is None)
        if grad_hidden is not None:
            grad_hidden[num_rows:] = 0.0
            if group is not None and reduces_grad:
                dist.all_reduce(grad_hidden, group=group)
            ctx.save_for_backward(grad_hidden, None if in_main_grad is not None else grad_weight)
            ctx.weight = weight
            ctx.is_in_main_grad = in_main_grad is not None
        ctx.mark_non_differentiable(row_losses, is_correct)
        return (row_losses * weights).sum(), row_losses, is_correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        weight = ctx.weight
        if ctx.is_in_main_grad:
            _require_unit_gradient(grad_loss)
            grad_weight = added_to_main_grad(weight)
        else:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
            if grad_weight is not None:
                grad_weight = grad_weight.mul_(grad_loss).to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def fused_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    first_vocab_id: int = 0,
    group: dist.ProcessGroup | None = None,
    reduces_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of cross-entropies, and the cross-entropy of each row, without ever holding all logits.

    Where ``weight.main_grad`` exists (Megatron's DistributedDataParallel; fp32, or fp64 for fp64 input), the forward
    adds the weight's gradient to it, chunk by chunk, and no other buffer of the weight's size exists. Then every
    forward with gradients must be followed by a backward whose gradient of the loss is exactly 1 before the buffer is
    used. Otherwise backward returns the gradient as usual, in the dtype of ``weight``.

    Args:
        hidden: [R, H], or more: rows behind those with a target have no loss and a gradient of 0.
        weight: [V/tp, H], the rows ``first_vocab_id`` ... of the head.
        targets: int64 [R], ids of the whole vocabulary.
        weights: [R], factor of each row; known before the forward, so gradients are formed in it.
        first_vocab_id: id of this rank's first vocabulary row.
        group: tensor-parallel group; None for one rank.
        reduces_grad: the gradient of ``hidden`` is summed over the group here; False: each rank returns its part of
            the sum, for a caller that adds them up.

    Returns:
        the weighted sum (differentiable with respect to ``hidden`` and ``weight``; fp32, or fp64 for fp64 input), the
        unweighted cross-entropy of each row [R] (no gradient), and bool [R]: the target's logit is the row's largest
        (or equals it).

    Raises:
        ValueError: in backward, the gradient went to ``main_grad`` and that of the loss is not 1 (on a GPU the device
            stops with an assertion instead, since the host does not wait for the number).
    """
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _FusedLinearCrossEntropy.apply(
        hidden, weight, targets, weights, first_vocab_id, group, needs_grad, reduces_grad
    )


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
            hidden: [R, 1, H], the selected rows alone (see :func:`gather_rows`), or more, as :func:`padded_to_multiple`
                gives them; for logits [S, B, H]. With sequence parallelism this rank's share of the rows.
            selected: the rows that enter the loss; None asks for logits.

        Returns:
            ``(loss, row_losses, is_correct)`` as :func:`fused_linear_cross_entropy`, or logits [B, S, V] gathered over
            tensor-parallel ranks.
        """
        if selected is None:
            logits, _ = super().forward(hidden)
            return logits.transpose(0, 1)
        rank = parallel_state.get_tensor_model_parallel_rank()
        is_parallel = parallel_state.get_tensor_model_parallel_world_size() > 1
        if self.sequence_parallel:
            # Its backward sums the ranks' parts of the gradient and gives each the rows of its share.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        return fused_linear_cross_entropy(
            hidden.squeeze(1),
            self.weight,
            selected.targets,
            selected.weights,
            first_vocab_id=rank * self.output_size_per_partition,
            group=self.tp_group if is_parallel else None,
            reduces_grad=not self.sequence_parallel,
        )
