"""One training step: micro-batches through Megatron's schedule, one division, one optimizer step.

The forward step returns ``(loss_sum, num_tokens, sums)``. Megatron sums ``num_tokens`` over micro-batches and
data- and context-parallel ranks and divides the gradients once; the sums are reduced only when they are reported.
Context-parallel ranks read the same micro-batch, weigh its rows, and then take their own.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from itertools import islice, tee
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from nld_train.config.schema import ObjectiveConfig
from nld_train.data.loader import LoaderBatch
from nld_train.model.build import row_multiple_of
from nld_train.model.head import WeightedRows, select_weighted_rows
from nld_train.objective.losses import LossTerms, loss_terms
from nld_train.objective.noise import NoiseSpec
from nld_train.objective.normalize import num_tokens, row_weights
from nld_train.objective.sequence import JointBatch, Shard, build_joint_batch, shard_batch
from nld_train.platform.cpu import direct_calls


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What Megatron's schedule needs to know of a step.

    Args:
        num_microbatches: per data-parallel rank.
        micro_batch_size: B.
        num_rows: S, rows of the model's input over all context-parallel ranks (2L in a joint stage with whole noisy
            halves); None: micro-batches or ranks differ, and pipeline stages tell each other.
    """

    num_microbatches: int
    micro_batch_size: int
    num_rows: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LossWeights:
    """Factors of the two terms: L = ar * L_AR + diffusion * L_diff."""

    ar: float = 1.0
    diffusion: float


def noise_spec(objective: ObjectiveConfig, *, seed: int, global_batch_size: int, row_multiple: int = 1) -> NoiseSpec:
    """How a stage's noisy rows are made.

    Args:
        seed: of the run.
        global_batch_size: samples of a step, over which ``stratify: batch`` spreads the noise levels.
        row_multiple: see :func:`nld_train.model.build.row_multiple`.
    """
    return NoiseSpec(
        mask_token_id=objective.mask_token_id,
        eps=objective.eps,
        seed=seed,
        block_size=objective.block_size,
        sampler=objective.sampler.value,
        stratify=objective.stratify.value,
        shared_noise_level=objective.shared_noise_level,
        complementary=objective.complementary,
        noisy_fraction=objective.noisy_fraction,
        half_life_ratio=objective.half_life_ratio,
        global_batch_size=global_batch_size,
        row_multiple=row_multiple,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatchLosses:
    """What one micro-batch of this rank brought; nothing of it was waited for.

    Args:
        stream_positions: int64 [B] on the CPU, each sample's place in the stream.
        sequence_losses: float64 [B], row weight x cross-entropy summed over each sequence's rows (of this
            context-parallel rank).
        terms: sums and counts.
    """

    stream_positions: Tensor
    sequence_losses: Tensor
    terms: LossTerms


def _loss_function(
    batch: JointBatch,
    selected: WeightedRows,
    stream_positions: Tensor,
    normalization: str,
    output: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, MicroBatchLosses]:
    """Last pipeline stage: (weighted loss sum, this micro-batch's share of the divisor, what is reported)."""
    loss_sum, row_losses, row_is_correct = output
    num_sequences, num_rows = batch.tokens.shape

    def of_all_rows(values: Tensor) -> Tensor:
        """[R] of the selected rows -> [B, S], zero elsewhere."""
        rows = values.new_zeros(num_rows * num_sequences)
        return rows.index_copy_(0, selected.rows, values).view(num_rows, num_sequences).t()

    divisor = num_tokens(batch, normalization)
    weighted = row_losses.to(torch.float64) * selected.weights
    terms = loss_terms(
        of_all_rows(row_losses),
        of_all_rows(row_is_correct),
        batch,
        loss_sum=weighted.sum(),  # in float64, unlike what backward starts at
        divisor=divisor,
    )
    losses = MicroBatchLosses(
        stream_positions=stream_positions, sequence_losses=of_all_rows(weighted).sum(dim=1), terms=terms
    )
    return loss_sum, divisor, losses


def lay_out(sample: LoaderBatch, block_size: int) -> JointBatch:
    """The rows of the model for a micro-batch as the loader gives it."""
    return build_joint_batch(
        sample.tokens,
        sample.labels,
        sample.loss_mask,
        sample.corruption,
        block_size,
        is_supervised=sample.is_supervised,
        document_starts=sample.document_starts,
    )


def micro_batches(
    data: Iterable[LoaderBatch],
    *,
    objective: ObjectiveConfig,
    weights: LossWeights,
    device: torch.device,
    row_multiple: int,
) -> Iterator[tuple[JointBatch, WeightedRows, Tensor]]:
    """This context-parallel rank's rows of each micro-batch, laid out on the device, those that enter the loss, and the
    samples' places in the stream."""
    shard = Shard(parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size())
    for sample in data:
        batch = lay_out(sample, objective.block_size)
        # Rows are chosen on the CPU: on a GPU the data-dependent count would stop the host.
        of_rows = row_weights(batch, objective.normalization.value, weights.diffusion, weights.ar)
        batch, of_rows = shard_batch(batch, of_rows, shard, row_multiple)
        selected = select_weighted_rows(batch, of_rows)
        if device.type == "cuda":
            # From memory that the system may move, a copy to the device would first wait for all that is under way.
            batch, selected = pinned(batch), pinned(selected)
        yield batch.to(device), selected.to(device), sample.stream_positions


Part = TypeVar("Part")


def pinned(part: Part) -> Part:
    """A dataclass of tensors, and of others like it, with the same numbers in page-locked memory."""
    if isinstance(part, Tensor):
        return part.pin_memory()  # type: ignore[return-value]
    if not is_dataclass(part) or isinstance(part, type):
        return part
    return replace(part, **{item.name: pinned(getattr(part, item.name)) for item in fields(part)})


def forward_step(
    data: Iterator[tuple[JointBatch, WeightedRows, Tensor]], model: DistributedDataParallel, *, normalization: str
) -> tuple[Any, partial[tuple[Tensor, Tensor, MicroBatchLosses]]]:
    """One micro-batch through one model chunk; what the schedule calls."""
    batch, selected, stream_positions = next(data)
    timers = get_model_config(model).timers
    if timers is not None:
        timers("forward-compute").start()  # again: the time until the data was there is no computation
    with direct_calls():
        output = model(batch.tokens, batch.layout, selected)
    return output, partial(_loss_function, batch, selected, stream_positions, normalization)


def reduce_terms(terms: LossTerms) -> LossTerms:
    """Sum over data- and context-parallel ranks; the same on every rank afterwards. Collective."""
    vector, largest_weight = terms.to_vector(), terms.largest_weight.clone()
    if parallel_state.is_pipeline_last_stage():
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        dist.all_reduce(vector, group=group)
        dist.all_reduce(largest_weight, op=dist.ReduceOp.MAX, group=group)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        for tensor in (vector, largest_weight):
            dist.broadcast(
                tensor,
                src=parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )
    return LossTerms.from_vector(vector, largest_weight)


def run_microbatches(
    data: Iterator[LoaderBatch],
    chunks: Sequence[DistributedDataParallel],
    shape: StepShape,
    *,
    objective: ObjectiveConfig,
    weights: LossWeights,
    device: torch.device,
    forward_only: bool = False,
    details: list[MicroBatchLosses] | None = None,
) -> LossTerms:
    """Forward (and backward) of one global batch through Megatron's schedule.

    Args:
        data: this rank's micro-batches, of which ``shape.num_microbatches`` are taken.
        chunks: this pipeline rank's model chunks. All of them get the same micro-batches in the same order, laid out
            once.
        details: gets what each micro-batch brought, in their order (nothing but on the last pipeline stage).

    After it returns, ``main_grad`` holds d(sum of losses)/d(parameter) divided once by the global number of tokens.

    Returns:
        the sums over this rank's micro-batches (zero but on the last pipeline stage); :func:`reduce_terms` adds up the
        ranks, where somebody wants to read them.
    """
    config = get_model_config(chunks[0])
    config.variable_seq_lengths = shape.num_rows is None
    taken = micro_batches(
        islice(data, shape.num_microbatches),
        objective=objective,
        weights=weights,
        device=device,
        row_multiple=row_multiple_of(config),
    )
    collected: list[MicroBatchLosses] = get_forward_backward_func()(
        forward_step_func=partial(forward_step, normalization=objective.normalization.value),
        data_iterator=list(tee(taken, len(chunks))),
        model=list(chunks),
        num_microbatches=shape.num_microbatches,
        seq_length=shape.num_rows or 0,  # not read where lengths vary
        micro_batch_size=shape.micro_batch_size,
        forward_only=forward_only,
    )
    if details is not None:
        details.extend(collected)
    return sum((losses.terms for losses in collected), start=LossTerms.zeros(device))
