"""The loop: stages, steps, validation, checkpoints."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from nld_train.checkpoint.manager import CheckpointInfo, CheckpointManager, SaveResult, latest_checkpoint
from nld_train.config.compose import to_dict
from nld_train.config.schema import Config, DocumentMask, ObjectiveConfig, Precision, Sampler, Stratify
from nld_train.config.workload import flops_per_token, workload
from nld_train.data.dataset import SampleSource, SizedSource
from nld_train.data.loader import LoaderBatch, TrainLoader
from nld_train.errors import CheckpointError, TrainingError
from nld_train.model.build import row_multiple
from nld_train.objective.losses import LossTerms
from nld_train.objective.noise import NoiseSpec, num_noisy_rows
from nld_train.objective.normalize import means, shares
from nld_train.platform.device import peak_tflops
from nld_train.platform.topology import Topology
from nld_train.training.callbacks.base import Callback
from nld_train.training.faults import FaultHistory, samples_at_fault, skip_message, spike_message
from nld_train.training.inspection import ParameterSums, StepInspection
from nld_train.training.metrics import Lap, StepClock, step_record, validation_record
from nld_train.training.optimizer import gradient_norm, reset_moments, set_hyperparameters, step_with_norm
from nld_train.training.phases import PhaseTimers
from nld_train.training.schedule import learning_rate
from nld_train.training.stages import Stage, tokens_at
from nld_train.training.step import (
    LossWeights,
    MicroBatchLosses,
    StepShape,
    noise_spec,
    reduce_terms,
    run_microbatches,
)
from nld_train.training.stopping import Agreed, StepAgreement
from nld_train.training.supervision import Supervisor

VALIDATION_SEED = 0x76616C  # validation noise is the same in every run, stage and step


@dataclass(frozen=True, slots=True, kw_only=True)
class _StepResult:
    """Of one step: this rank's sums, learning rate, gradient norm before clipping, norms of the single terms, and what
    each of this rank's micro-batches brought."""

    terms: LossTerms
    lr: float
    grad_norm: float
    term_norms: dict[str, float]
    agreed: Agreed
    details: list[MicroBatchLosses]

    @property
    def is_skipped(self) -> bool:
        """Nothing was updated: a number was not finite. The same on every rank, since the norm is of all gradients, and
        a loss that is not finite has gradients that are not (the head sees to it)."""
        return not math.isfinite(self.grad_norm)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """How the loop ended: the newest checkpoint that it wrote (None: none) and of which step, and whether a signal
    stopped it."""

    checkpoint: Path | None
    saved_step: int
    last_step: int
    is_stopped: bool


@dataclass(slots=True, kw_only=True)
class Trainer:
    """One run, from ``start_step`` to its end. Every method is collective.

    Args:
        config: the whole configuration.
        topology: this process's place.
        device: where the model lives.
        stages: the run's stages.
        chunks: this rank's part of the model, in Megatron's data-parallel wrapper: one chunk, or several with
            interleaved pipeline stages.
        optimizer: Megatron's distributed optimizer.
        sources: training samples of each stage, by its name.
        validation: held-out samples of the run's corpora.
        chat_validations: held-out conversations of each stage with chat, by its name.
        manager: writes the checkpoints.
        callbacks: listeners; nobody on every rank but 0.
        blends: what each stage that reads corpora reads, by its name; remembered in checkpoints.
        chat_hashes: content of the conversations of each stage with chat, remembered, too.
        supervisor: is told of progress, and knows of signals.
        agreement: of all ranks, after each step.
        history: of the run's faults until ``start_step``.
        start_step: steps already done.
    """

    config: Config
    topology: Topology
    device: torch.device
    stages: Sequence[Stage]
    chunks: Sequence[DistributedDataParallel]
    optimizer: MegatronOptimizer
    sources: Mapping[str, SampleSource]
    validation: SizedSource
    chat_validations: Mapping[str, SizedSource]
    manager: CheckpointManager
    callbacks: Callback
    blends: Mapping[str, Mapping[str, Any]]
    chat_hashes: Mapping[str, str]
    supervisor: Supervisor
    agreement: StepAgreement
    history: FaultHistory
    start_step: int = 0
    _timers: PhaseTimers = field(init=False)

    def __post_init__(self) -> None:
        self._timers = PhaseTimers(self.device)
        for chunk in self.chunks:
            chunk.config.timers = self._timers

    def train(self) -> TrainResult:
        """Run all remaining steps, or those until a signal asks to stop.

        Raises:
            CheckpointError: the last checkpoint could not be written.
        """
        newest: SaveResult | None = None
        clock = StepClock(self.start_step, tokens_at(self.stages, self.start_step), self._timers)
        saved_at = time.monotonic()
        final_step = self.stages[-1].last_step
        is_save_due = False
        for stage in self.stages:
            if stage.last_step <= self.start_step:
                continue
            first = max(stage.first_step, self.start_step + 1)
            with clock.paused():
                data = clock.waiting(self._begin(stage, first))
            for step in range(first, stage.last_step + 1):
                result = self._step(stage, step, data, saved_at)
                is_last = step == final_step or (result.agreed.stops and not result.is_skipped)
                # After a step that was skipped nobody knows whether the model is still good: a save, and a stop, wait
                # for one that was not, so that checkpoints of a model that is lost do not replace the last good ones.
                is_save_due = is_save_due or is_last or result.agreed.saves or self._saves_at(step)
                saves = is_save_due and not result.is_skipped
                record = self._record(stage, step, result) if self._logs_at(stage, step, result) or saves else {}
                if self._logs_at(stage, step, result):
                    self._report(self._full_record(stage, record, result, clock))
                if result.is_skipped:
                    self._check_skipped()
                self.supervisor.heartbeat.step(step, stage.name)
                validation: dict[str, Any] = {}
                if self._validates_at(stage, step):
                    with clock.paused("validation"):
                        validation = self._validate(stage, step)
                        self.callbacks.on_validation(validation)
                    if step == final_step and result.is_skipped:
                        saves = self._check_last(validation)
                with clock.paused("checkpoint"):
                    if self.manager.is_saving and (saves or is_last or not result.agreed.is_writing):
                        newest = self._finish_save() or newest
                    if saves:
                        saved_at, is_save_due = time.monotonic(), False
                        self._begin_save(stage, step, record, validation)
                        if is_last or not self.config.checkpoint.asynchronous:
                            newest = self._finish_save() or newest
                if is_last and step != final_step:
                    return self._result(newest, step, is_stopped=True)
        if self.start_step < final_step and (newest is None or newest.step != final_step):
            raise CheckpointError(
                str(self.manager.directory),
                f"the checkpoint of the last step, {final_step}, could not be written",
                "free space, then start the run again: it goes on from the checkpoint before",
            )
        return self._result(newest, final_step, is_stopped=False)

    def _result(self, newest: SaveResult | None, last_step: int, *, is_stopped: bool) -> TrainResult:
        return TrainResult(
            checkpoint=newest.folder if newest is not None else None,
            saved_step=newest.step if newest is not None else self.start_step,
            last_step=last_step,
            is_stopped=is_stopped,
        )

    def _watched(self, data: Iterable[LoaderBatch]) -> Iterator[LoaderBatch]:
        """The same micro-batches; each is progress."""
        for batch in data:
            self.supervisor.watchdog.mark()
            yield batch

    def _begin(self, stage: Stage, first_step: int) -> Iterator[LoaderBatch]:
        """A stage, or what is left of it. Returns this rank's micro-batches."""
        self.callbacks.on_stage_start(stage.info())
        self.supervisor.heartbeat.step(first_step - 1, stage.name)
        if stage.config.reset_optimizer and first_step == stage.first_step:
            reset_moments(self.optimizer)
        return self._watched(self._train_loader(stage, first_step))

    def _logs_at(self, stage: Stage, step: int, result: "_StepResult") -> bool:
        is_due = step % self.config.train.log_interval == 0 or step in (stage.first_step, stage.last_step)
        return is_due or result.is_skipped

    def _full_record(
        self, stage: Stage, record: dict[str, Any], result: "_StepResult", clock: StepClock
    ) -> dict[str, Any]:
        """The record of a logged step, with its times and its faults. Collective where the step was skipped."""
        step, loss = record["step"], record["means"]["loss"]
        is_spike = self.history.is_spike(stage.name, loss, self.config.train.spike_threshold)
        self.history.add({"step": step, "stage": stage.name, "loss": loss, "is_skipped": result.is_skipped})
        faults: dict[str, Any] = {"is_spike": is_spike, "num_skipped_steps": self.history.num_skipped}
        if result.is_skipped:
            samples = samples_at_fault(result.details)
            faults["is_skipped"] = True
            faults["suspect_samples"] = [position for position, _ in samples]
            faults["suspect_ranks"] = [rank for _, rank in samples]
        lap = clock.lap(step, record["tokens"])
        return step_record(lap=lap, usage=self._usage(stage, lap), faults=faults, **record)

    def _report(self, record: dict[str, Any]) -> None:
        """Hand a step's record over, and say what is wrong with it."""
        self.callbacks.on_step(record)
        if record["is_spike"]:
            self.callbacks.on_message(spike_message(record))
        if record.get("is_skipped"):
            self.callbacks.on_message(skip_message(record))

    def _check_skipped(self) -> None:
        """Collective.

        Raises:
            TrainingError: too many steps were skipped (on every rank).
        """
        if not self.history.skips_too_much(self.config.train.max_skipped_steps):
            return
        if self.manager.is_saving:
            self._finish_save()
        raise self.history.error(self.config, latest_checkpoint(self.manager.directory))

    def replay(
        self, last_step: int, inspection: StepInspection
    ) -> tuple[dict[str, Any], list[MicroBatchLosses], dict[str, ParameterSums]]:
        """Run the steps up to ``last_step`` again: no validation, no checkpoint, and nobody is told.

        Returns:
            the record of the last step, what its micro-batches brought, and sums of its parameters.
        """
        clock = StepClock(self.start_step, tokens_at(self.stages, self.start_step), self._timers)
        for stage in self.stages:
            if stage.last_step <= self.start_step:
                continue
            first = max(stage.first_step, self.start_step + 1)
            data = self._begin(stage, first)
            for step in range(first, stage.last_step + 1):
                is_last = step == last_step
                result = self._step(stage, step, data, math.inf, inspection if is_last else None)
                if is_last or self._logs_at(stage, step, result):
                    record = self._full_record(stage, self._record(stage, step, result), result, clock)
                if is_last:
                    return record, result.details, inspection.parameters
        raise ValueError(f"the run has no step {last_step} after step {self.start_step}")

    def _usage(self, stage: Stage, lap: Lap) -> dict[str, float | None]:
        """Share of the devices' peak, and this rank's memory."""
        peak, is_cuda = self.config.train.peak_tflops, self.device.type == "cuda"
        if peak is None and is_cuda and self.config.train.precision is not Precision.fp32:  # of fp8, too: bf16's
            peak = peak_tflops(torch.cuda.get_device_name(self.device))
        mfu = None
        if peak is not None:
            needed = flops_per_token(self.config.model, workload(self.config, stage.name)) * lap.tokens_per_second
            mfu = needed / (peak * 1e12 * self.topology.world_size)
        return {
            "mfu": mfu,
            "host_memory_gb": psutil.Process().memory_info().rss / 2**30,
            "device_memory_gb": torch.cuda.max_memory_allocated(self.device) / 2**30 if is_cuda else None,
        }

    def _check_last(self, validation: Mapping[str, Any]) -> bool:
        """The last step of a run was skipped, so no step after it shows whether the model is good: its validation does.
        Collective.

        Raises:
            TrainingError: it is not, or no step was ever made; nothing is saved.
        """
        step = validation["step"]
        bad = [name for name, value in validation.items() if isinstance(value, float) and not math.isfinite(value)]
        if bad or self.history.num_skipped == step:
            if self.manager.is_saving:
                self._finish_save()
            finding = f"{', '.join(bad)} of the model is not finite" if bad else "so was every step before it"
            raise TrainingError(
                f"{self.config.run.dir}, step {step}",
                f"the last step was skipped, and {finding}; nothing was saved since "
                f"{latest_checkpoint(self.manager.directory) or 'the start'}",
                "lower the last stage's lr or look at its data, then start again",
            )
        return True

    def _train_loader(self, stage: Stage, first_step: int) -> TrainLoader:
        return TrainLoader(
            self.sources[stage.name],
            micro_batch_size=self.config.train.micro_batch_size,
            global_batch_size=stage.global_batch_size,
            data_parallel_rank=self.topology.data_parallel_rank,
            data_parallel_size=self.topology.data_parallel_size,
            consumed_samples=stage.consumed_samples(first_step),
            num_steps=stage.last_step - first_step + 1,
            noise=self._noise(stage) if stage.is_joint else None,
            num_workers=self.config.data.num_workers,
        )

    def _noise(self, stage: Stage) -> NoiseSpec:
        return noise_spec(
            self.config.objective,
            seed=self.config.run.seed,
            global_batch_size=stage.global_batch_size,
            row_multiple=row_multiple(self.config.parallel, self.config.train.precision),
        )

    def _shape(self, stage: Stage) -> StepShape:
        """What a step of the stage is cut into; the rows of a micro-batch where all have as many."""
        train = self.config.train
        has_chat = stage.config.chat is not None
        has_documents = has_chat or self.config.data.document_mask is DocumentMask.boundary
        noisy_rows: int | None = 0
        if stage.is_joint:
            noisy_rows = num_noisy_rows(
                self._noise(stage), stage.sequence_length, has_documents=has_documents, has_gaps=has_chat
            )
        if self.topology.context_parallel_size > 1 and stage.is_joint:
            noisy_rows = None  # blocks are where they are: ranks may have more or fewer of them
        return StepShape(
            num_microbatches=stage.global_batch_size // (train.micro_batch_size * self.topology.data_parallel_size),
            micro_batch_size=train.micro_batch_size,
            num_rows=None if noisy_rows is None else noisy_rows + stage.sequence_length,
        )

    def _step(
        self,
        stage: Stage,
        step: int,
        data: Iterator[LoaderBatch],
        saved_at: float,
        inspection: StepInspection | None = None,
    ) -> "_StepResult":
        """One optimizer step, and what the ranks agree on meanwhile."""
        train = self.config.train
        shape = self._shape(stage)
        weights = LossWeights(ar=stage.config.ar_loss_weight, diffusion=stage.config.diffusion_loss_weight)
        term_norms: dict[str, float] = {}
        if stage.is_joint and train.term_norm_interval and step % train.term_norm_interval == 0:
            batches = list(islice(data, shape.num_microbatches))
            for name, alone in (("ar", replace(weights, diffusion=0.0)), ("diffusion", replace(weights, ar=0.0))):
                self._accumulate(iter(batches), shape, alone)
                term_norms[f"{name}_grad_norm"] = gradient_norm(self.optimizer)
            data = iter(batches)
        lr = learning_rate(stage.step_in_stage(step), stage.num_steps, stage.config)
        set_hyperparameters(self.optimizer, self.config.optim, lr)
        details: list[MicroBatchLosses] = []
        terms = self._accumulate(data, shape, weights, details)
        # On a GPU the backward pass is still under way here: nobody waits for the answer.
        self.agreement.begin(
            stops=self.supervisor.signals.requested is not None,
            saves=self.topology.is_main and self._is_time_to_save(saved_at),
            is_writing=self.manager.is_writing,
        )
        if inspection is not None:
            inspection.before_update()
        with self._timers.phase("optimizer"):
            grad_norm = step_with_norm(self.optimizer, self.config.optim)
        if inspection is not None:
            inspection.after_update()
        agreed = self.agreement.end()
        if agreed.stops:
            self.supervisor.signals.agreed()
        return _StepResult(
            terms=terms, lr=lr, grad_norm=grad_norm, term_norms=term_norms, details=details, agreed=agreed
        )

    def _accumulate(
        self,
        data: Iterator[LoaderBatch],
        shape: StepShape,
        weights: LossWeights,
        details: list[MicroBatchLosses] | None = None,
    ) -> LossTerms:
        """Gradients of one global batch, from zero."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return run_microbatches(
            data,
            self.chunks,
            shape,
            objective=self.config.objective,
            weights=weights,
            device=self.device,
            details=details,
        )

    def _record(self, stage: Stage, step: int, result: "_StepResult") -> dict[str, Any]:
        """The fields of a step's record that are not times. Collective: sums are reduced over ranks here."""
        terms = reduce_terms(result.terms)
        ar_loss_weight = stage.config.ar_loss_weight
        return {
            "step": step,
            "stage": stage.name,
            "tokens": stage.tokens_at(step),
            "means": means(terms, stage.config.diffusion_loss_weight, ar_loss_weight)
            | shares(terms, ar_loss_weight)
            | result.term_norms,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
        }

    def _validates_at(self, stage: Stage, step: int) -> bool:
        interval = self.config.train.validation_interval
        return step in (stage.first_step, stage.last_step) or step % interval == 0

    def _validate(self, stage: Stage, step: int) -> dict[str, Any]:
        """Both losses on held-out samples, on noise that never changes, in every stage and with every sampler."""
        values = self._validation_means(self.validation, self.config.data.sequence_length)
        if stage.name in self.chat_validations:
            chat = self._validation_means(self.chat_validations[stage.name], stage.sequence_length)
            values |= {f"chat_{name}": value for name, value in chat.items()}
        return validation_record(step=step, stage=stage.name, tokens=stage.tokens_at(step), means=values)

    @torch.no_grad()
    def _validation_means(self, samples: SizedSource, sequence_length: int) -> dict[str, float | None]:
        """AR and diffusion loss of all samples. The noise is the estimator with the least variance of those that
        estimate the recipe's loss, whatever the training objective is: curves of all runs can be compared."""
        share = len(samples) // self.topology.data_parallel_size
        # The largest size up to training's that cuts this rank's share evenly, with interleaved pipeline stages into
        # whole rounds of the pipeline.
        unit = self.topology.pipeline_size if len(self.chunks) > 1 else 1
        sizes = range(1, self.config.train.micro_batch_size + 1)
        micro_batch_size = max(size for size in sizes if share % (size * unit) == 0)
        objective = self.config.objective
        loader = TrainLoader(
            samples,
            micro_batch_size=micro_batch_size,
            global_batch_size=len(samples),
            data_parallel_rank=self.topology.data_parallel_rank,
            data_parallel_size=self.topology.data_parallel_size,
            num_steps=1,
            noise=noise_spec(
                ObjectiveConfig(
                    block_size=objective.block_size,
                    mask_token_id=objective.mask_token_id,
                    sampler=Sampler.uniform_count,
                    stratify=Stratify.batch,
                    noisy_fraction=1.0,
                ),
                seed=VALIDATION_SEED,
                global_batch_size=len(samples),
                row_multiple=row_multiple(self.config.parallel, self.config.train.precision),
            ),
        )
        for chunk in self.chunks:
            chunk.eval()
        terms = run_microbatches(
            self._watched(loader),
            self.chunks,
            StepShape(
                num_microbatches=loader.num_micro_batches,
                micro_batch_size=micro_batch_size,
                num_rows=None,
            ),
            objective=objective,
            weights=LossWeights(diffusion=1.0),  # only the sums are read; they do not depend on it
            device=self.device,
            forward_only=True,
        )
        for chunk in self.chunks:
            chunk.train()
        values = means(reduce_terms(terms), diffusion_loss_weight=1.0)
        return {"ar_loss": values["ar_loss"], "diffusion_loss": values["diffusion_loss"]}

    def _saves_at(self, step: int) -> bool:
        interval = self.config.checkpoint.interval_steps
        return interval > 0 and step % interval == 0

    def _is_time_to_save(self, saved_at: float) -> bool:
        seconds = self.config.checkpoint.interval_seconds
        return seconds > 0 and time.monotonic() - saved_at >= seconds

    def _begin_save(self, stage: Stage, step: int, record: dict[str, Any], validation: Mapping[str, Any]) -> None:
        parallel = self.config.parallel
        info = CheckpointInfo(
            step=step,
            tokens=stage.tokens_at(step),
            stage=stage.name,
            samples=stage.consumed_samples(step) + stage.global_batch_size,
            dtype=str(next(self.chunks[0].parameters()).dtype).removeprefix("torch."),
            model=self.config.model,
            parallel={
                "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
                "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
                "context_parallel_size": parallel.context_parallel_size,
                "data_parallel_size": self.topology.data_parallel_size,
            },
            config=to_dict(self.config),
            metrics={
                name: value if value is None or math.isfinite(value) else None
                for name, value in {
                    **record["means"],
                    "lr": record["lr"],
                    "grad_norm": record["grad_norm"],
                    **{name: value for name, value in validation.items() if name.startswith("val_")},
                }.items()
            },
            tokenizer="../../tokenizer",  # of the run's folder, which may be moved as a whole
            blends={name: dict(blend) for name, blend in self.blends.items()},
            chat_hashes=dict(self.chat_hashes),
        )
        self.manager.begin(self.chunks, self.optimizer, info)

    def _finish_save(self) -> SaveResult | None:
        """None where it could not be written: the run goes on, and the next save tries again."""
        result = self.manager.finish(self.callbacks.on_checkpoint_ready)
        if result.error is None:
            self.callbacks.on_checkpoint(result.step, result.folder)
            return result
        text = f"WARNING: the checkpoint of step {result.step} could not be written, the run goes on: {result.error}"
        self.callbacks.on_message(text)
        self.supervisor.heartbeat.warn(text)
        return None
