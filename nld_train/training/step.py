"""One training step: micro-batches through Megatron's schedule, one division, one optimizer step.

The forward step returns ``(loss_sum, num_tokens, sums)``. Megatron sums ``num_tokens`` over micro-batches and
data-parallel ranks and divides the gradients once; the sums are reduced only when they are reported.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nld_train.config.schema import ObjectiveConfig
from nld_train.data.loader import LoaderBatch
from nld_train.model.head import WeightedRows, select_weighted_rows
from nld_train.objective.losses import LossTerms, loss_terms
from nld_train.objective.normalize import num_tokens
from nld_train.objective.sequence import JointBatch, build_joint_batch


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What Megatron's schedule needs to know of a step.

    Args:
        num_microbatches: per data-parallel rank.
        micro_batch_size: B.
        num_rows: S, rows of the model's input (2L in a joint stage).
    """

    num_microbatches: int
    micro_batch_size: int
    num_rows: int


def _loss_function(
    batch: JointBatch, selected: WeightedRows, normalization: str, output: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Last pipeline stage: (weighted loss sum, this micro-batch's share of the divisor, sums as a vector)."""
    loss_sum, row_losses = output
    num_sequences, num_rows = batch.tokens.shape
    losses = torch.zeros(num_rows * num_sequences, dtype=row_losses.dtype, device=row_losses.device)
    losses.index_copy_(0, selected.rows, row_losses)
    terms = loss_terms(losses.view(num_rows, num_sequences).t(), batch)
    return loss_sum, num_tokens(batch, normalization), terms.to_vector()


def forward_step(
    data: Iterator[LoaderBatch],
    model: DistributedDataParallel,
    *,
    objective: ObjectiveConfig,
    diffusion_loss_weight: float,
    device: torch.device,
) -> tuple[Any, partial[tuple[Tensor, Tensor, Tensor]]]:
    """One micro-batch: read it, lay it out, run the model; what the schedule calls."""
    sample = next(data)
    batch = build_joint_batch(sample.tokens, sample.labels, sample.loss_mask, sample.corruption, objective.block_size)
    # Rows are chosen on the CPU: on a GPU the data-dependent count would stop the host.
    selected = select_weighted_rows(batch, diffusion_loss_weight).to(device)
    batch = batch.to(device)
    output = model(batch.tokens, batch.layout, selected)
    return output, partial(_loss_function, batch, selected, objective.normalization.value)


def _reduce_terms(collected: list[Tensor], device: torch.device) -> LossTerms:
    """Sum over micro-batches and data-parallel ranks; the same on every rank afterwards."""
    total = LossTerms.zeros(device).to_vector()
    for terms in collected:
        total += terms
    if parallel_state.is_pipeline_last_stage():
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(
            total,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return LossTerms.from_vector(total)


def run_microbatches(
    data: Iterator[LoaderBatch],
    model: DistributedDataParallel,
    shape: StepShape,
    *,
    objective: ObjectiveConfig,
    diffusion_loss_weight: float,
    device: torch.device,
    forward_only: bool = False,
) -> LossTerms:
    """Forward (and backward) of one global batch through Megatron's schedule.

    After it returns, ``main_grad`` holds d(sum of losses)/d(parameter) divided once by the global number of tokens.

    Returns:
        the sums over the global batch, equal on every rank.
    """
    collected: list[Tensor] = get_forward_backward_func()(
        forward_step_func=partial(
            forward_step,
            objective=objective,
            diffusion_loss_weight=diffusion_loss_weight,
            device=device,
        ),
        data_iterator=data,
        model=model,
        num_microbatches=shape.num_microbatches,
        seq_length=shape.num_rows,
        micro_batch_size=shape.micro_batch_size,
        forward_only=forward_only,
    )
    return _reduce_terms(collected, device)
