"""A run, assembled on one screen: platform, data, model, optimizer, checkpoint, callbacks, loop, export."""

import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

from nld_train.checkpoint.convert import export_checkpoint, exported_step, load_hf_weights
from nld_train.checkpoint.manager import CheckpointInfo, CheckpointManager, read_info
from nld_train.config.compose import save_resolved, to_dict
from nld_train.config.schema import Config, Precision
from nld_train.data.dataset import TrainStream, ValidationSet
from nld_train.data.prepare import prepare
from nld_train.data.prepared import TRAIN, PreparedCorpus
from nld_train.data.progress import RichProgress
from nld_train.errors import ConfigError, DataError, Problem
from nld_train.evaluation.decoding import DecodingMode, continue_prompt, format_continuation, load_export
from nld_train.model.attention import resolve_backend
from nld_train.model.build import NLDModel, build_model
from nld_train.platform.device import Platform, initialize_device
from nld_train.platform.topology import Topology, topology_of
from nld_train.training.callbacks import build_callbacks
from nld_train.training.callbacks.base import Callback, CallbackList, RunInfo
from nld_train.training.optimizer import build_optimizer, choose_adam
from nld_train.training.stages import Stage, plan_stages, stage_of_step
from nld_train.training.trainer import Trainer

_DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}

# What a resumed run must share with its checkpoint: a change here would change which tokens and masks a step sees, or
# what its loss means in the middle of a curve.
_FIXED_ON_RESUME = (
    "run.seed",
    "model",
    "objective",
    "data.corpus",
    "data.sequence_length",
    "data.validation_fraction",
    "train.global_batch_size",
    "train.precision",
)
_FREE_ON_RESUME = ("model.attention_backend", "objective.diffusion_loss_weight")  # the stages hold the weights


def run(config: Config) -> None:
    """Train, resume or finish the run that ``config`` describes; export it at the end.

    Raises:
        NLDError: something in the configuration, the data or a checkpoint cannot be used.
    """
    platform = initialize_device(config.train.device)
    callbacks = CallbackList()
    try:
        with topology_of(config.parallel, platform, seed=config.run.seed) as topology:
            is_main = topology.is_main
            run_dir = Path(config.run.dir)
            if is_main:
                make_folder("run.dir", run_dir)
                make_folder("data.cache_dir", Path(config.data.cache_dir))
                lock_run_folder(run_dir)
            stages = plan_stages(config)
            manager = CheckpointManager(run_dir / "checkpoints", config.checkpoint)
            resume_from = manager.latest()
            resumed = read_info(resume_from) if resume_from is not None else None
            if resumed is not None and resume_from is not None:
                check_resumable(resumed, config, stages, resume_from)
            corpus = prepare_corpus(config, topology)
            if resumed is not None and resume_from is not None:
                check_same_corpus(resumed, corpus, resume_from)
            start_step = resumed.step if resumed is not None else 0
            is_finished = start_step == stages[-1].last_step
            if is_main and not is_finished:
                save_resolved(config, run_dir / "config.yaml")
                shutil.copytree(corpus.tokenizer_folder, run_dir / "tokenizer", dirs_exist_ok=True)
            stream = TrainStream(
                corpus,
                sequence_length=config.data.sequence_length,
                seed=config.run.seed,
                mask_token_id=config.objective.mask_token_id,
                cache_dir=Path(config.data.cache_dir),
            )
            first_sample = start_step * config.train.global_batch_size
            stream.build_index(first_sample, first_sample + config.train.global_batch_size)
            validation = ValidationSet(
                corpus,
                sequence_length=config.data.sequence_length,
                num_samples=config.train.validation_samples,
                mask_token_id=config.objective.mask_token_id,
            )

            dtype = _DTYPES[config.train.precision]
            model = build_model(
                config.model, config.parallel, dtype=dtype, device=platform.device, seed=config.run.seed
            )
            if config.init.hf_path is not None and resume_from is None:
                load_hf_weights(model, config.model, Path(config.init.hf_path))
            wrapped = wrap_data_parallel(model, overlap=platform.is_cuda)
            optimizer = build_optimizer(config.optim, [wrapped], dtype)
            connect(model, wrapped, optimizer)
            if resume_from is not None:
                manager.load(resume_from, wrapped, optimizer)

            if is_main:
                callbacks = build_callbacks(config)
            callbacks.on_run_start(describe(config, stages, start_step, platform, topology))
            trainer = Trainer(
                config=config,
                topology=topology,
                device=platform.device,
                stages=stages,
                model=wrapped,
                optimizer=optimizer,
                stream=stream,
                validation=validation,
                manager=manager,
                callbacks=callbacks,
                corpus=corpus,
                start_step=start_step,
            )
            checkpoint = trainer.train() or resume_from
        # The process groups are gone: no other rank waits, with a timeout, for what rank 0 still has to do.
        if is_finished:
            callbacks.on_message(f"this run is finished: step {start_step} is its last, nothing is left to train")
        if is_main and checkpoint is not None:
            finish(config, checkpoint, callbacks)
    finally:
        callbacks.on_run_end()


def make_folder(key: str, path: Path) -> None:
    """Create a folder that the configuration names.

    Raises:
        ConfigError: it cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = Problem(key, f"{path} cannot be created ({error.strerror})", "name a folder that you may write to")
        raise ConfigError([problem]) from error


def lock_run_folder(run_dir: Path) -> None:
    """Hold ``run_dir`` for this process; the kernel lets go when it ends, however it ends.

    A record lock and not flock: loader workers are forked and would inherit the latter.

    Raises:
        ConfigError: another process holds it.
    """
    descriptor = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)  # kept open for the life of the process
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise ConfigError(
            [
                Problem(
                    "run.dir",
                    f"{run_dir} is in use by another run ({error.strerror})",
                    "wait for it or stop it, or use another run.dir",
                )
            ]
        ) from error


def prepare_corpus(config: Config, topology: Topology) -> PreparedCorpus:
    """Find or build the corpus: one process builds, the others wait for its file lock; rank 0 shows progress."""

    def call(progress: RichProgress | None) -> PreparedCorpus:
        return prepare(
            config.data, config.model.vocab_size, mask_token_id=config.objective.mask_token_id, progress=progress
        )

    if not topology.is_main:
        return call(None)
    with RichProgress() as progress:
        return call(progress)


def wrap_data_parallel(
    model: NLDModel, *, overlap: bool, use_distributed_optimizer: bool = True
) -> DistributedDataParallel:
    """Megatron's data parallelism; gradients are accumulated and reduced in fp32 (float64 for a float64 model).

    Args:
        overlap: reduce gradients during the backward pass, gather updated weights during the next forward pass.
        use_distributed_optimizer: each rank keeps the reduced gradient and the optimizer state of its share only;
            False: every rank keeps all gradients (to look at them).
    """
    is_double = next(model.parameters()).dtype is torch.float64
    return DistributedDataParallel(
        config=model.config,
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=not is_double,
            use_distributed_optimizer=use_distributed_optimizer,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap and use_distributed_optimizer,
        ),
        module=model,
    )


def connect(model: NLDModel, wrapped: DistributedDataParallel, optimizer: Any) -> None:
    """Tell Megatron's schedule how gradients are scaled, synchronised and finished."""
    config: Any = model.config
    config.finalize_model_grads_func = finalize_model_grads
    if optimizer is not None:
        config.grad_scale_func = optimizer.scale_loss
    if wrapped.ddp_config.overlap_grad_reduce:
        config.no_sync_func = wrapped.no_sync
        config.grad_sync_func = wrapped.start_grad_sync


def describe(
    config: Config, stages: tuple[Stage, ...], start_step: int, platform: Platform, topology: Topology
) -> RunInfo:
    """What the callbacks show at the start."""
    shape = config.model
    attention = (shape.num_attention_heads * 2 + shape.num_key_value_heads * 2) * shape.head_dim * shape.hidden_size
    per_layer = attention + 3 * shape.hidden_size * shape.ffn_hidden_size + 2 * shape.hidden_size
    return RunInfo(
        run_dir=Path(config.run.dir),
        start_step=start_step,
        num_steps=stages[-1].last_step,
        tokens_per_step=stages[0].tokens_per_step,
        num_parameters=shape.num_layers * per_layer + (2 * shape.vocab_size + 1) * shape.hidden_size,
        stages=tuple(stage.info() for stage in stages),
        config=to_dict(config),
        backends={
            "device": str(platform.device),
            "precision": config.train.precision.value,
            "attention": resolve_backend(shape.attention_backend, platform.device).value,
            "optimizer": choose_adam(),
            "ranks": f"{topology.world_size} (tensor {topology.tensor_parallel_size} x pipeline "
            f"{topology.pipeline_size} x data {topology.data_parallel_size}), {platform.distributed_backend}",
            "threads per rank": str(torch.get_num_threads()),
        },
    )


def finish(config: Config, checkpoint: Path, callbacks: Callback) -> None:
    """Export the last checkpoint, unless that was done, and continue the prompt from it in all modes (rank 0)."""
    if not config.export.enabled:
        return
    out = Path(config.run.dir) / "hf"
    if exported_step(out) != read_info(checkpoint).step:
        export_checkpoint(checkpoint, out, overwrite=True)
        callbacks.on_message(f"exported to {out}")
    if config.export.prompt is not None:
        model, tokenizer = load_export(out)
        for mode in DecodingMode:
            result = continue_prompt(
                model, tokenizer, config.export.prompt, mode, max_new_tokens=config.export.max_new_tokens
            )
            callbacks.on_message(format_continuation(result))


def check_resumable(info: CheckpointInfo, config: Config, stages: tuple[Stage, ...], checkpoint: Path) -> None:
    """Refuse to resume with another model, objective, data order or noise than the checkpoint was trained with.

    Stages that are not over yet may be changed, and new ones appended; learning rates and optimizer settings, too.

    Raises:
        ConfigError: every key that differs.
    """
    saved, current = info.config, to_dict(config)
    problems: list[Problem] = []

    def compare(key: str, old: Any, new: Any) -> None:
        if isinstance(old, dict) and isinstance(new, dict):
            for name in old.keys() | new.keys():
                compare(f"{key}.{name}", old.get(name), new.get(name))
        elif old != new and key not in _FREE_ON_RESUME:
            problems.append(
                Problem(
                    key,
                    f"is {new}, but the run in {checkpoint.parent.parent} was started with {old}",
                    f"use {key}={old} to resume it, or another run.dir to start anew",
                )
            )

    def value(tree: dict[str, Any], key: str) -> Any:
        for part in key.split("."):
            tree = tree[part]
        return tree

    for key in _FIXED_ON_RESUME:
        compare(key, value(saved, key), value(current, key))
    last_step = stages[-1].last_step
    if info.step > last_step:
        problems.append(
            Problem(
                "stages",
                f"end at step {last_step}, but {checkpoint} is of step {info.step}",
                "give the stages at least as many tokens as were trained, or use another run.dir to start anew",
            )
        )
    else:
        names, current_stage = list(saved["stages"]), stage_of_step(stages, info.step)
        if info.stage != current_stage.name or names[: current_stage.index] != [
            stage.name for stage in stages[: current_stage.index]
        ]:
            problems.append(
                Problem(
                    "stages",
                    f"{checkpoint} is of step {info.step} in stage {info.stage} of {names}; here that step is in stage "
                    f"{current_stage.name} of {[stage.name for stage in stages]}",
                    "keep the names and tokens of the stages that are over",
                )
            )
        for stage in stages[: current_stage.index]:
            if stage.name in saved["stages"]:
                compare(f"stages.{stage.name}.tokens", saved["stages"][stage.name]["tokens"], stage.config.tokens)
    if problems:
        raise ConfigError(problems)


def check_same_corpus(info: CheckpointInfo, corpus: PreparedCorpus, checkpoint: Path) -> None:
    """Refuse to resume on other training tokens than the checkpoint saw.

    Raises:
        DataError: the corpus has changed (the shipped one does with the version of Python).
    """
    found = corpus.part_hash(TRAIN)
    if info.corpus_hash != found:
        raise DataError(
            str(corpus.folder),
            f"its training tokens have hash {found[:16]}, those of {checkpoint} had {info.corpus_hash[:16]}",
            "resume with the run's corpus (the shipped one: with its version of Python), or use another run.dir",
        )
