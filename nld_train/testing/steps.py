"""One training step on given samples at any parallel layout, with whole tensors as the result.

Cases for :class:`nld_train.testing.ranks.RankPool`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from nld_train.config.schema import (
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    ParallelConfig,
    RopeConfig,
    Sampler,
    Stratify,
)
from nld_train.data.loader import LoaderBatch
from nld_train.model.build import (
    NLDModel,
    build_chunks,
    build_model,
    global_parameter_name,
    partition_dim,
    row_multiple_of,
)
from nld_train.objective.losses import LossTerms
from nld_train.objective.noise import Corruption, corrupt
from nld_train.platform.device import Platform
from nld_train.platform.topology import Topology
from nld_train.training.optimizer import build_optimizer, set_hyperparameters
from nld_train.training.run import connect, overlap, wrap_data_parallel
from nld_train.training.step import LossWeights, StepShape, noise_spec, reduce_terms, run_microbatches


def tiny_model(**changes: object) -> ModelConfig:
    """Odd on purpose: head_dim is not hidden / heads, and the query scaling steps inside the sequence."""
    values: dict[str, object] = {
        "num_layers": 2,
        "hidden_size": 48,
        "ffn_hidden_size": 80,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 96,
        "max_position_embeddings": 4096,
        "rope": RopeConfig(original_max_position_embeddings=8),
    }
    return ModelConfig(**(values | changes))  # type: ignore[arg-type]


def tiny_recipe(**changes: object) -> ObjectiveConfig:
    """The recipe's estimator with blocks of 4."""
    values: dict[str, object] = {
        "block_size": 4,
        "mask_token_id": 3,
        "sampler": Sampler.bernoulli,
        "stratify": Stratify.none,
        "noisy_fraction": 1.0,
    }
    return ObjectiveConfig(**(values | changes))  # type: ignore[arg-type]


@dataclass(slots=True, kw_only=True)
class StepCase:
    """What to compute: a global batch of ``samples`` (tokens int64 [N, L + 1], noise by place in the stream).

    ``diffusion_loss_weight`` 0 is an AR step (no noisy part). ``is_supervised`` bool [N, L] and ``document_starts``
    int64 [N, L] as in a :class:`LoaderBatch`; the AR loss stays inside documents, where the next token is supervised.
    """

    samples: Tensor
    model: ModelConfig = field(default_factory=tiny_model)
    objective: ObjectiveConfig = field(default_factory=tiny_recipe)
    is_supervised: Tensor | None = None
    document_starts: Tensor | None = None
    corruption: Corruption | None = None  # of all samples; None: drawn by the objective's sampler
    first_position: int = 0  # of the samples in the stream
    diffusion_loss_weight: float = 0.3
    ar_loss_weight: float = 1.0
    micro_batch_size: int = 1
    dtype: torch.dtype = torch.float64
    is_fp8: bool = False
    seed: int = 1234
    num_optimizer_steps: int = 0  # 0: gradients only
    lr: float = 1e-3
    # AdamW's first steps are lr * sign(gradient) where eps is small: rounding of a gradient near 0 would decide its
    # sign. A large eps makes the update a smooth function of the gradient, so that layouts can be compared.
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(eps=1e-2))


@dataclass(slots=True, kw_only=True)
class StepResult:
    """Sums over the global batch and whole tensors by name in the whole model."""

    terms: LossTerms
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]


def loader_batches(case: StepCase, topology: Topology, row_multiple: int = 1) -> list[LoaderBatch]:
    """This rank's micro-batches, in the order of :class:`nld_train.data.loader.TrainLoader`."""
    spec = noise_spec(
        case.objective,
        seed=case.seed,
        global_batch_size=case.samples.shape[0],
        row_multiple=row_multiple,
    )
    per_round = case.micro_batch_size * topology.data_parallel_size
    batches = []
    for start in range(topology.data_parallel_rank * case.micro_batch_size, case.samples.shape[0], per_round):
        rows = torch.arange(start, start + case.micro_batch_size)
        text = case.samples[rows]
        tokens = text[:, :-1].contiguous()
        is_supervised = torch.ones_like(tokens, dtype=torch.bool)
        if case.is_supervised is not None:
            is_supervised = case.is_supervised[rows]
        # The token after the last one is supervised where that one is.
        loss_mask = torch.cat([is_supervised[:, 1:], is_supervised[:, -1:]], dim=1)
        document_starts = None
        if case.document_starts is not None:
            document_starts = case.document_starts[rows]
            loss_mask[:, :-1] &= document_starts[:, 1:] == document_starts[:, :-1]
            loss_mask[:, -1] = False
        positions = rows + case.first_position
        corruption = None
        if case.corruption is not None:
            corruption = Corruption(
                **{item.name: getattr(case.corruption, item.name)[rows] for item in fields(Corruption)}
            )
        elif case.diffusion_loss_weight:
            corruption = corrupt(tokens, positions, spec, is_supervised, document_starts)
        batches.append(
            LoaderBatch(
                tokens=tokens,
                labels=text[:, 1:].contiguous(),
                loss_mask=loss_mask.to(torch.float32),
                is_supervised=is_supervised,
                document_starts=document_starts,
                stream_positions=positions,
                corruption=corruption,
            )
        )
    return batches


def whole_tensors(models: Sequence[NLDModel], value_of: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """Gather every tensor- and pipeline-parallel part of what ``value_of`` gives for each parameter, by the parameter's
    name in the whole model. Collective; the same on every rank."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    whole: dict[str, Tensor] = {}
    named = [(global_parameter_name(m, name), value_of(p)) for m in models for name, p in m.named_parameters()]
    for name, value in named:
        if size == 1 or value.dim() == 1:
            whole[name] = value
            continue
        parts = [torch.empty_like(value) for _ in range(size)]
        dist.all_gather(parts, value.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
        if name.endswith("linear_fc1.weight"):  # every rank holds [gate; up] of its share
            halves = [part.chunk(2, dim=0) for part in parts]
            whole[name] = torch.cat([half[0] for half in halves] + [half[1] for half in halves])
        else:
            whole[name] = torch.cat(parts, dim=partition_dim(name))
    stages: list[dict[str, Tensor] | None] = [None] * parallel_state.get_pipeline_model_parallel_world_size()
    dist.all_gather_object(stages, whole, group=parallel_state.get_pipeline_model_parallel_group())
    return {name: tensor for stage in stages if stage is not None for name, tensor in stage.items()}


def run_step(
    topology: Topology,
    platform: Platform,
    case: StepCase,
    parallel: ParallelConfig,
    initial: dict[str, Tensor] | None = None,
) -> StepResult:
    """Gradients (main_grad after finalize_model_grads) of one step, or the parameters after several optimizer steps.

    Args:
        initial: parameters by name to start from (one rank); None: drawn from the case's seed.
    """
    models = build_chunks(
        case.model, parallel, dtype=case.dtype, device=platform.device, seed=case.seed, is_fp8=case.is_fp8
    )
    if initial is not None:
        with torch.no_grad():
            for name, parameter in models[0].named_parameters():
                parameter.copy_(initial[name])
    trains = case.num_optimizer_steps > 0
    chunks = [
        wrap_data_parallel(
            model,
            **overlap(parallel, platform),
            use_distributed_optimizer=trains,
            is_first_chunk=model is models[0],
        )
        for model in models
    ]
    optimizer = build_optimizer(case.optim, chunks, case.dtype) if trains else None
    connect(chunks, optimizer)
    shape = StepShape(
        num_microbatches=case.samples.shape[0] // (case.micro_batch_size * topology.data_parallel_size),
        micro_batch_size=case.micro_batch_size,
        num_rows=None,
    )
    for _ in range(max(1, case.num_optimizer_steps)):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        terms = run_microbatches(
            iter(loader_batches(case, topology, row_multiple_of(models[0].config))),
            chunks,
            shape,
            objective=case.objective,
            weights=LossWeights(ar=case.ar_loss_weight, diffusion=case.diffusion_loss_weight),
            device=platform.device,
        )
        if optimizer is not None:
            set_hyperparameters(optimizer, case.optim, case.lr)
            optimizer.step()
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    return StepResult(
        terms=reduce_terms(terms),
        gradients={} if trains else whole_tensors(models, lambda parameter: parameter.main_grad),
        parameters=whole_tensors(models, lambda parameter: parameter.detach()),
    )


def run_many_draws(topology: Topology, platform: Platform, case: StepCase, num_draws: int) -> tuple[Tensor, Tensor]:
    """Diffusion loss (sum per sequence) and its gradient for ``num_draws`` global batches of the same samples, each at
    other places of the stream (one rank).

    Returns:
        float64 [num_draws], and [num_draws, all parameters].
    """
    model = build_model(case.model, ParallelConfig(), dtype=case.dtype, device=platform.device, seed=case.seed)
    wrapped = wrap_data_parallel(model, use_distributed_optimizer=False)
    connect([wrapped], None)
    num_samples = case.samples.shape[0]
    losses, gradients = [], []
    for draw in range(num_draws):
        wrapped.zero_grad_buffer()
        moved = replace(case, first_position=draw * num_samples)
        terms = run_microbatches(
            iter(loader_batches(moved, topology)),
            [wrapped],
            StepShape(
                num_microbatches=num_samples // case.micro_batch_size,
                micro_batch_size=case.micro_batch_size,
                num_rows=None,
            ),
            objective=case.objective,
            weights=LossWeights(ar=0.0, diffusion=1.0),
            device=platform.device,
        )
        losses.append(terms.diffusion_sum / num_samples)
        gradient = torch.cat([p.main_grad.reshape(-1) for p in model.parameters()])  # type: ignore[attr-defined]
        gradients.append(gradient.double() * (terms.divisor / num_samples))
    return torch.stack(losses), torch.stack(gradients)


def run_logits(
    topology: Topology,
    platform: Platform,
    case: StepCase,
    parallel: ParallelConfig,
    tokens: Tensor,
    has_noisy_half: bool,
) -> Tensor:
    """Logits [B, S, V] of given input rows (one pipeline stage)."""
    from nld_train.objective.sequence import SequenceLayout

    model = build_model(case.model, parallel, dtype=case.dtype, device=platform.device, seed=case.seed)
    length = tokens.shape[1] // (2 if has_noisy_half else 1)
    layout = SequenceLayout(length, case.objective.block_size, has_noisy_half=has_noisy_half)
    with torch.no_grad():
        return model(tokens, layout).contiguous()
