"""How noisy the estimators of the diffusion loss are: mean and variance of loss and gradient over draws of the noise,
on fixed samples and a fixed model.

B sequences of L tokens; K draws.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from nld_train.checkpoint.manager import CheckpointManager, latest_checkpoint
from nld_train.config.compose import load_resolved
from nld_train.config.schema import (
    Config,
    Device,
    Normalization,
    ObjectiveConfig,
    ParallelConfig,
    Sampler,
    Stratify,
)
from nld_train.data.dataset import Sample
from nld_train.data.loader import TrainLoader
from nld_train.errors import CheckpointError
from nld_train.model.build import build_model
from nld_train.objective.normalize import means
from nld_train.platform.device import initialize_device
from nld_train.platform.topology import topology_of
from nld_train.training.data import prepare_blends, training_samples
from nld_train.training.run import connect, wrap_data_parallel
from nld_train.training.step import LossWeights, StepShape, noise_spec, reduce_terms, run_microbatches


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Of K draws: losses are means per supervised clean token in nats.

    Args:
        name: of the estimator.
        num_draws: K.
        loss_mean, loss_error: mean and its standard error.
        loss_variance: of one draw.
        gradient_variance: trace of the covariance of the gradient of one draw.
        masked_share: masked tokens by clean tokens.
        noisy_rows: noisy rows by clean tokens: what a step costs beyond an AR step.
        largest_weight: over all draws.
    """

    name: str
    num_draws: int
    loss_mean: float
    loss_error: float
    loss_variance: float
    gradient_variance: float
    masked_share: float
    noisy_rows: float
    largest_weight: float


def standard_estimators(objective: ObjectiveConfig) -> dict[str, ObjectiveConfig]:
    """The recipe's estimator first, then the others that estimate the same loss."""
    plain = replace(
        objective,
        sampler=Sampler.bernoulli,
        stratify=Stratify.none,
        shared_noise_level=False,
        complementary=False,
        noisy_fraction=1.0,
        normalization=Normalization.tokens,
    )
    found = {"bernoulli (recipe)": plain}
    for sampler in (Sampler.bernoulli, Sampler.bernoulli_per_block, Sampler.uniform_count, Sampler.power_count):
        for stratify in Stratify:
            if sampler is Sampler.bernoulli and stratify is Stratify.none:
                continue
            name = sampler.value + (", stratified" if stratify is Stratify.batch else "")
            found[name] = replace(plain, sampler=sampler, stratify=stratify)
    for sampler in (Sampler.uniform_count, Sampler.power_count):
        stratified = replace(plain, sampler=sampler, stratify=Stratify.batch)
        found[f"{sampler.value}, stratified, complementary"] = replace(stratified, complementary=True)
    for fraction in (0.5, 0.25):
        found[f"bernoulli, fraction {fraction:g}"] = replace(plain, noisy_fraction=fraction)
        found[f"power_count, stratified, fraction {fraction:g}"] = replace(
            plain, sampler=Sampler.power_count, stratify=Stratify.batch, noisy_fraction=fraction
        )
    return found


def measure(
    wrapped: DistributedDataParallel,
    samples: Sequence[Sample],
    objective: ObjectiveConfig,
    *,
    name: str,
    num_draws: int,
    seed: int,
    device: torch.device,
    on_draw: Callable[[], None] = lambda: None,
) -> Spread:
    """Diffusion loss and gradient of ``samples`` for ``num_draws`` seeds of the noise.

    The gradient's variance is tr Cov = (sum |g|^2 - |sum g|^2 / K) / (K - 1), in float64.

    Args:
        wrapped: the model, connected to Megatron's schedule.
        on_draw: called after each draw (a progress bar).
    """
    losses: list[float] = []
    square_sum, rows, masked, largest = 0.0, 0, 0.0, 0.0
    total: Tensor | None = None
    for draw in range(num_draws):
        loader = TrainLoader(
            samples,
            micro_batch_size=len(samples),
            global_batch_size=len(samples),
            num_steps=1,
            noise=noise_spec(objective, seed=seed + draw, global_batch_size=len(samples)),
        )
        [batch] = list(loader)
        assert batch.corruption is not None  # noise was asked for
        rows += int((batch.corruption.places >= 0).sum())
        wrapped.zero_grad_buffer()
        terms = run_microbatches(
            iter([batch]),
            [wrapped],
            StepShape(num_microbatches=1, micro_batch_size=len(samples), num_rows=None),
            objective=objective,
            weights=LossWeights(ar=0.0, diffusion=1.0),
            device=device,
        )
        terms = reduce_terms(terms)
        losses.append(means(terms, 1.0)["diffusion_loss"] or 0.0)
        masked += (terms.num_masked / terms.num_clean).item()
        largest = max(largest, terms.largest_weight.item())
        gradient = torch.cat([p.main_grad.reshape(-1) for p in wrapped.parameters()]).double()  # type: ignore[attr-defined]
        square_sum += gradient.square().sum().item()
        total = gradient if total is None else total.add_(gradient)
        on_draw()
    assert total is not None
    mean = math.fsum(losses) / num_draws
    variance = math.fsum((loss - mean) ** 2 for loss in losses) / (num_draws - 1)
    mean_square = total.square().sum().item() / num_draws
    gradient_variance = (square_sum - mean_square) / (num_draws - 1)
    return Spread(
        name=name,
        num_draws=num_draws,
        loss_mean=mean,
        loss_error=math.sqrt(variance / num_draws),
        loss_variance=variance,
        gradient_variance=gradient_variance,
        masked_share=masked / num_draws,
        noisy_rows=rows / (num_draws * len(samples) * samples[0]["tokens"].shape[0]),
        largest_weight=largest,
    )


def measure_run(
    run_dir: Path,
    *,
    num_draws: int,
    num_sequences: int,
    seed: int,
    only: Sequence[str] | None = None,
    on_draw: Callable[[str], None] = lambda name: None,
) -> Iterator[Spread]:
    """Measure the standard estimators on the newest checkpoint of a run, in one process, and samples of its corpus.

    Args:
        num_sequences: B.
        only: names of :func:`standard_estimators`; None: all.

    Raises:
        CheckpointError: the run has no checkpoint, or an estimator is unknown.
    """
    config = load_resolved(run_dir / "config.yaml")
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(str(run_dir / "checkpoints"), "holds no complete checkpoint", "name a run that has one")
    estimators = standard_estimators(config.objective)
    chosen: Mapping[str, ObjectiveConfig] = estimators
    if only is not None:
        unknown = [name for name in only if name not in estimators]
        if unknown:
            raise CheckpointError("--only", f"{unknown[0]!r} is unknown", f"choose of {', '.join(estimators)}")
        chosen = {name: estimators[name] for name in only}
    platform = initialize_device(Device.auto)
    with topology_of(ParallelConfig(), platform, seed=config.run.seed):
        samples = _unseen_samples(config, num_sequences)
        model = build_model(
            config.model, ParallelConfig(), dtype=torch.float32, device=platform.device, seed=config.run.seed
        )
        wrapped = wrap_data_parallel(model, use_distributed_optimizer=False)
        connect([wrapped], None)
        CheckpointManager(run_dir / "checkpoints", config.checkpoint).load(checkpoint, [wrapped], None)
        for name, objective in chosen.items():
            yield measure(
                wrapped,
                samples,
                objective,
                name=name,
                num_draws=num_draws,
                seed=seed,
                device=platform.device,
                on_draw=lambda name=name: on_draw(name),  # type: ignore[misc]
            )


def _unseen_samples(config: Config, num_sequences: int) -> list[Sample]:
    """Samples of an epoch that the run never reaches (its order differs; their tokens were seen in other company)."""
    stream = training_samples(config, prepare_blends(config, is_main=False).of_run, seed=config.run.seed + 1_000_003)
    return [stream[index] for index in range(num_sequences)]


def spread_table(spreads: Sequence[Spread]) -> str:
    """Markdown; variances relative to the first row's."""
    header = ["estimator", "loss", "loss variance", "gradient variance", "masked share", "noisy rows", "largest weight"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    first = spreads[0]
    for spread in spreads:
        cells = [
            spread.name,
            f"{spread.loss_mean:.4f} ± {spread.loss_error:.4f}",
            f"{spread.loss_variance / first.loss_variance:.3f}",
            f"{spread.gradient_variance / first.gradient_variance:.3f}",
            f"{spread.masked_share:.2f}",
            f"{spread.noisy_rows:.2f}",
            f"{spread.largest_weight:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
