"""The loop: stages, steps, validation, checkpoints."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from nld_train.checkpoint.manager import CheckpointInfo, CheckpointManager
from nld_train.config.compose import to_dict
from nld_train.config.schema import Config
from nld_train.data.dataset import TrainStream, ValidationSet
from nld_train.data.loader import LoaderBatch, TrainLoader
from nld_train.data.prepared import TRAIN, PreparedCorpus
from nld_train.errors import TrainingError
from nld_train.objective.noise import NoiseSpec
from nld_train.objective.normalize import means
from nld_train.platform.topology import Topology
from nld_train.training.callbacks.base import Callback
from nld_train.training.metrics import StepClock, step_record, validation_record
from nld_train.training.optimizer import reset_moments, set_hyperparameters, step_with_norm
from nld_train.training.schedule import learning_rate
from nld_train.training.stages import Stage
from nld_train.training.step import StepShape, run_microbatches

VALIDATION_SEED = 0x76616C  # validation noise is the same in every run, stage and step


@dataclass(slots=True, kw_only=True)
class Trainer:
    """One run, from ``start_step`` to its end. Every method is collective.

    Args:
        config: the whole configuration.
        topology: this process's place.
        device: where the model lives.
        stages: the run's stages.
        model: Megatron's data-parallel wrapper of this rank's part of the model.
        optimizer: Megatron's distributed optimizer.
        stream: training samples, addressed by their place in the stream.
        validation: held-out samples.
        manager: writes the checkpoints.
        callbacks: listeners; nobody on every rank but 0.
        corpus: its tokenizer and content are remembered in checkpoints.
        start_step: steps already done.
    """

    config: Config
    topology: Topology
    device: torch.device
    stages: Sequence[Stage]
    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    stream: TrainStream
    validation: ValidationSet
    manager: CheckpointManager
    callbacks: Callback
    corpus: PreparedCorpus
    start_step: int = 0

    def train(self) -> Path | None:
        """Run all remaining steps. Returns the last checkpoint written here (None when nothing was left to do)."""
        newest: Path | None = None
        tokens_per_step = self.stages[0].tokens_per_step
        clock = StepClock(self.start_step, self.start_step * tokens_per_step)
        saved_at = time.monotonic()
        final_step = self.stages[-1].last_step
        for stage in self.stages:
            if stage.last_step <= self.start_step:
                continue
            first = max(stage.first_step, self.start_step + 1)
            self.callbacks.on_stage_start(stage.info())
            if stage.config.reset_optimizer and first == stage.first_step:
                reset_moments(self.optimizer)
            with clock.paused():
                data = iter(self._train_loader(stage, first))
            for step in range(first, stage.last_step + 1):
                record = self._step(stage, step, data)
                if step % self.config.train.log_interval == 0 or step in (stage.first_step, stage.last_step):
                    lap = clock.lap(step, step * tokens_per_step)
                    self.callbacks.on_step(step_record(lap=lap, **record))
                self._check_finite(record)
                with clock.paused():
                    if self._validates_at(stage, step):
                        self.callbacks.on_validation(self._validate(stage, step))
                    if step == final_step or self._saves_at(step, saved_at):
                        newest = self._save(stage, step, record)
                        saved_at = time.monotonic()
        return newest

    def _train_loader(self, stage: Stage, first_step: int) -> TrainLoader:
        train = self.config.train
        return TrainLoader(
            self.stream,
            micro_batch_size=train.micro_batch_size,
            global_batch_size=train.global_batch_size,
            data_parallel_rank=self.topology.data_parallel_rank,
            data_parallel_size=self.topology.data_parallel_size,
            consumed_samples=(first_step - 1) * train.global_batch_size,
            num_steps=stage.last_step - first_step + 1,
            noise=self._noise(self.config.run.seed) if stage.is_joint else None,
            num_workers=self.config.data.num_workers,
        )

    def _noise(self, seed: int) -> NoiseSpec:
        objective = self.config.objective
        return NoiseSpec(mask_token_id=objective.mask_token_id, eps=objective.eps, seed=seed)

    def _step(self, stage: Stage, step: int, data: Iterator[LoaderBatch]) -> dict[str, Any]:
        """One optimizer step; returns the fields of its record that are not times."""
        train = self.config.train
        lr = learning_rate(stage.step_in_stage(step), stage.num_steps, stage.config)
        set_hyperparameters(self.optimizer, self.config.optim, lr)
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        shape = StepShape(
            num_microbatches=train.global_batch_size // (train.micro_batch_size * self.topology.data_parallel_size),
            micro_batch_size=train.micro_batch_size,
            num_rows=self.config.data.sequence_length * (2 if stage.is_joint else 1),
        )
        terms = run_microbatches(
            data,
            self.model,
            shape,
            objective=self.config.objective,
            diffusion_loss_weight=stage.config.diffusion_loss_weight,
            device=self.device,
        )
        grad_norm = step_with_norm(self.optimizer, self.config.optim)
        return {
            "step": step,
            "stage": stage.name,
            "tokens": step * stage.tokens_per_step,
            "means": means(terms, self.config.objective.normalization.value, stage.config.diffusion_loss_weight),
            "lr": lr,
            "grad_norm": grad_norm,
        }

    def _check_finite(self, record: dict[str, Any]) -> None:
        """Stop before a checkpoint of a model that is lost replaces the last good one.

        Raises:
            TrainingError: loss or gradient norm is not a finite number (the same on every rank).
        """
        for name, value in (("loss", record["means"]["loss"]), ("grad_norm", record["grad_norm"])):
            if not math.isfinite(value):
                raise TrainingError(
                    f"{self.config.run.dir}, step {record['step']}",
                    f"{name} is {value}; nothing was saved since the last checkpoint",
                    "lower the stage's lr or check the data, then start again: the last checkpoint is from before",
                )

    def _validates_at(self, stage: Stage, step: int) -> bool:
        interval = self.config.train.validation_interval
        return step in (stage.first_step, stage.last_step) or step % interval == 0

    def _validation_micro_batch_size(self) -> int:
        """The largest size up to training's that cuts this rank's share of the validation samples evenly."""
        share = len(self.validation) // self.topology.data_parallel_size
        return max(size for size in range(1, self.config.train.micro_batch_size + 1) if share % size == 0)

    @torch.no_grad()
    def _validate(self, stage: Stage, step: int) -> dict[str, Any]:
        """Both losses on the held-out samples, on noise that never changes, in every stage."""
        micro_batch_size = self._validation_micro_batch_size()
        loader = TrainLoader(
            self.validation,
            micro_batch_size=micro_batch_size,
            global_batch_size=len(self.validation),
            data_parallel_rank=self.topology.data_parallel_rank,
            data_parallel_size=self.topology.data_parallel_size,
            num_steps=1,
            noise=self._noise(VALIDATION_SEED),
        )
        self.model.eval()
        terms = run_microbatches(
            iter(loader),
            self.model,
            StepShape(
                num_microbatches=loader.num_micro_batches,
                micro_batch_size=micro_batch_size,
                num_rows=2 * self.config.data.sequence_length,
            ),
            objective=self.config.objective,
            diffusion_loss_weight=1.0,  # only the sums are read; they do not depend on it
            device=self.device,
            forward_only=True,
        )
        self.model.train()
        values = means(terms, "tokens", diffusion_loss_weight=1.0)
        return validation_record(
            step=step,
            stage=stage.name,
            tokens=step * stage.tokens_per_step,
            means={"ar_loss": values["ar_loss"], "diffusion_loss": values["diffusion_loss"]},
        )

    def _saves_at(self, step: int, saved_at: float) -> bool:
        """Due by steps, or by rank 0's clock (the same answer on every rank)."""
        checkpoint = self.config.checkpoint
        if checkpoint.interval_steps and step % checkpoint.interval_steps == 0:
            return True
        if not checkpoint.interval_seconds:
            return False
        due = torch.tensor([time.monotonic() - saved_at >= checkpoint.interval_seconds], device=self.device)
        if self.topology.world_size > 1:
            dist.broadcast(due, src=0)
        return bool(due.item())

    def _save(self, stage: Stage, step: int, record: dict[str, Any]) -> Path:
        parallel = self.config.parallel
        info = CheckpointInfo(
            step=step,
            tokens=step * stage.tokens_per_step,
            stage=stage.name,
            samples=step * self.config.train.global_batch_size,
            dtype=str(next(self.model.parameters()).dtype).removeprefix("torch."),
            model=self.config.model,
            parallel={
                "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
                "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
                "context_parallel_size": parallel.context_parallel_size,
                "data_parallel_size": self.topology.data_parallel_size,
            },
            config=to_dict(self.config),
            metrics={**record["means"], "lr": record["lr"], "grad_norm": record["grad_norm"]},
            tokenizer="../../tokenizer",  # of the run's folder, which may be moved as a whole
            corpus_hash=self.corpus.part_hash(TRAIN),
        )
        folder = self.manager.save(self.model, self.optimizer, info)
        self.callbacks.on_checkpoint(step, folder)
        return folder
