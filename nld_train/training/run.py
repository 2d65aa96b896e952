"""A run, assembled on one screen: platform, data, model, optimizer, checkpoint, callbacks, loop, export."""

import shutil
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

from nld_train.checkpoint.convert import export_checkpoint, exported_step, load_hf_weights
from nld_train.checkpoint.manager import CheckpointManager, read_info
from nld_train.config.compose import EXIT_BAD_CONFIG, EXIT_FAILED, save_resolved, to_dict
from nld_train.config.schema import AttentionBackend, Config, LayerSpec, ParallelConfig, Precision
from nld_train.config.validate import notices
from nld_train.errors import EXIT_RESTART, ConfigError
from nld_train.model.attention import resolve_backend
from nld_train.model.build import NLDModel, build_chunks, fuses_gradients
from nld_train.model.linear import fp32_products
from nld_train.model.native_attention import arithmetic, missing_for_native
from nld_train.model.pointwise import compiles_pointwise
from nld_train.platform.cpu import keep_freed_memory
from nld_train.platform.device import Platform, check_compiler, check_layer_spec, initialize_device, library_version
from nld_train.platform.topology import (
    COLLECTIVE_TIMEOUT,
    Topology,
    global_rank,
    topology_of,
    world_size_from_environment,
)
from nld_train.training.callbacks import build_callbacks
from nld_train.training.callbacks.base import Callback, CallbackList, RunInfo
from nld_train.training.data import open_data, prepare_blends, prepare_chats
from nld_train.training.faults import FaultHistory
from nld_train.training.layout import resolve_layout
from nld_train.training.optimizer import build_optimizer, choose_adam
from nld_train.training.replay import find_replay_point, replay
from nld_train.training.run_folder import check_same_data, find_resume_point, lock_run_folder, make_folder
from nld_train.training.stages import Stage, plan_stages, stage_of_step
from nld_train.training.stopping import StepAgreement
from nld_train.training.supervision import Supervisor
from nld_train.training.trainer import Trainer

_END_SECONDS = 120.0  # so long a stopped rank waits for what rank 0 has to close, Weights & Biases say
DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp8: torch.bfloat16}
"""Of parameters and activations."""


def run(config: Config) -> int:
    """Train, resume or finish the run that ``config`` describes; export it at the end.

    Returns:
        0, or EXIT_RESTART where a signal has stopped it: the same command goes on.

    Raises:
        NLDError: something in the configuration, the data or a checkpoint cannot be used.
    """
    platform = initialize_device(config.train.device)
    check_layer_spec(config, platform)
    check_compiler(config, platform)
    resolve_backend(config.model.attention_backend, platform.device)
    keeps_memory = not platform.is_cuda and keep_freed_memory()
    callbacks = CallbackList()
    # The watchdog comes first.
    limit = max(config.train.stall_timeout, Supervisor.FILE_SECONDS)
    timeout = max(COLLECTIVE_TIMEOUT, timedelta(seconds=2 * limit))
    with Supervisor(config, global_rank(), world_size_from_environment()) as supervisor:
        try:
            config, layout_lines = resolve_layout(config, platform)
            with topology_of(config.parallel, platform, seed=config.run.seed, timeout=timeout) as topology:
                is_main = topology.is_main
                cpu_group = dist.new_group(backend="gloo", timeout=timeout)
                supervisor.peers.connect(cpu_group)
                run_dir = Path(config.run.dir)
                is_replay = config.debug.replay_step is not None
                writes = is_main and not is_replay  # a replay leaves the run's folder alone
                stages = plan_stages(config)
                if writes:
                    make_folder("run.dir", run_dir)
                    make_folder("data.cache_dir", Path(config.data.cache_dir))
                    lock_run_folder(run_dir)
                    supervisor.heartbeat.start(stages[-1].last_step)
                manager = CheckpointManager(
                    run_dir / "checkpoints", config.checkpoint, cpu_group, progress=supervisor.watchdog.mark
                )
                find = find_replay_point if is_replay else find_resume_point
                with supervisor.reading_files():
                    resume, damaged = find(manager, config, stages)
                blends = prepare_blends(config, is_main=is_main)
                chats = prepare_chats(config, blends.tokenizer_folder, is_main=is_main)
                if resume is not None:
                    check_same_data(resume.info, blends.of_stages, chats, stages, resume.checkpoint)
                start_step = resume.info.step if resume is not None else 0
                is_finished = start_step == stages[-1].last_step
                if writes and not is_finished:
                    save_resolved(config, run_dir / "config.yaml")
                    shutil.copytree(blends.tokenizer_folder, run_dir / "tokenizer", dirs_exist_ok=True)
                sources, validation, chat_validations = open_data(config, blends, chats, stages)
                if not is_finished:
                    stage = stage_of_step(stages, start_step + 1)
                    first_sample = stage.consumed_samples(start_step + 1)
                    sources[stage.name].build_index(first_sample, first_sample + stage.global_batch_size)

                dtype = DTYPES[config.train.precision]
                models = build_chunks(
                    config.model,
                    config.parallel,
                    dtype=dtype,
                    device=platform.device,
                    seed=config.run.seed,
                    is_fp8=config.train.precision is Precision.fp8,
                )
                if config.init.hf_path is not None and resume is None:
                    with supervisor.reading_files():
                        load_hf_weights(models, config.model, Path(config.init.hf_path))
                chunks = [
                    wrap_data_parallel(model, **overlap(config.parallel, platform), is_first_chunk=model is models[0])
                    for model in models
                ]
                optimizer = build_optimizer(config.optim, chunks, dtype)
                connect(chunks, optimizer)
                if resume is not None:
                    with supervisor.reading_files():
                        manager.load(resume.checkpoint, chunks, optimizer)

                if writes:
                    callbacks = build_callbacks(config)
                callbacks.on_run_start(describe(config, stages, start_step, platform, topology, keeps_memory))
                others = other_attention(config, platform, cpu_group)
                for line in [*layout_lines, *notices(config), *others, *damaged]:
                    callbacks.on_message(line)
                trainer = Trainer(
                    config=config,
                    topology=topology,
                    device=platform.device,
                    stages=stages,
                    chunks=chunks,
                    optimizer=optimizer,
                    sources=sources,
                    validation=validation,
                    chat_validations=chat_validations,
                    chat_hashes={name: chat.content_hash for name, chat in chats.items()},
                    manager=manager,
                    callbacks=callbacks,
                    blends={name: blend.describe() for name, blend in blends.of_stages.items()},
                    supervisor=supervisor,
                    agreement=StepAgreement(cpu_group),
                    history=FaultHistory.of_run(run_dir, start_step),
                    start_step=start_step,
                )
                if config.debug.replay_step is not None and resume is not None:
                    with supervisor.watchdog.watching():
                        for line in replay(trainer, config.debug.replay_step, resume.checkpoint):
                            if is_main:
                                print(line)
                    supervisor.peers.tell("done")
                    return 0
                with supervisor.watchdog.watching(), supervisor.signals.deferred():
                    result = trainer.train()
                if not result.is_stopped:
                    supervisor.peers.tell("done")
            # The process groups are gone: no other rank waits, with a timeout, for what rank 0 still has to do.
            if result.is_stopped:
                words = f"stopped by {supervisor.signals.requested or 'a signal to another rank'}"
                is_saved = result.saved_step == result.last_step
                where = "there" if is_saved else f"step {result.saved_step}: there is no newer checkpoint"
                words = f"{words} after step {result.last_step}; the same command goes on from {where}"
                callbacks.on_message(words)
                if is_main:
                    supervisor.heartbeat.state("stopped" if is_saved else None, words)
                ending, callbacks = callbacks, CallbackList()
                ending.on_run_end()
                supervisor.peers.end_after_main(_END_SECONDS)
                return EXIT_RESTART
            if is_finished:
                callbacks.on_message(f"this run is finished: step {start_step} is its last, nothing is left to train")
            checkpoint = result.checkpoint or (resume.checkpoint if resume is not None else None)
            if is_main and checkpoint is not None:
                finish(config, checkpoint, callbacks, supervisor)
            if is_main:  # the others end while it exports
                supervisor.heartbeat.state("finished")
            return 0
        except BaseException as error:
            supervisor.failed(error, EXIT_BAD_CONFIG if isinstance(error, ConfigError) else EXIT_FAILED)
            raise
        finally:
            callbacks.on_run_end()


def overlap(parallel: ParallelConfig, platform: Platform) -> dict[str, bool]:
    """Which communication is overlapped with computation: what the configuration says, else on GPUs all of it."""
    gradients, weights = parallel.overlap_grad_reduce, parallel.overlap_param_gather
    gradients = bool(platform.is_cuda or weights) if gradients is None else gradients  # not weights without gradients
    weights = platform.is_cuda and gradients if weights is None else weights
    return {"overlap_grad_reduce": gradients, "overlap_param_gather": weights}


def wrap_data_parallel(
    model: NLDModel,
    *,
    overlap_grad_reduce: bool = False,
    overlap_param_gather: bool = False,
    use_distributed_optimizer: bool = True,
    is_first_chunk: bool = True,
) -> DistributedDataParallel:
    """Megatron's data parallelism; gradients are accumulated and reduced in fp32 (float64 for a float64 model).

    Args:
        overlap_grad_reduce: reduce gradients during the backward pass.
        overlap_param_gather: gather updated weights during the next forward pass (of the distributed optimizer).
        use_distributed_optimizer: each rank keeps the reduced gradient and the optimizer state of its share only;
            False: every rank keeps all gradients (to look at them).
        is_first_chunk: of a pipeline rank's model chunks. The gradients of the others are reduced in one piece each:
            the backward pass of the chunks before them is still to come.
    """
    is_double = next(model.parameters()).dtype is torch.float64
    return DistributedDataParallel(
        config=model.config,
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=not is_double,
            use_distributed_optimizer=use_distributed_optimizer,
            overlap_grad_reduce=overlap_grad_reduce,
            overlap_param_gather=overlap_param_gather,
        ),
        module=model,
        disable_bucketing=not is_first_chunk,
    )


def connect(chunks: Sequence[DistributedDataParallel], optimizer: Any) -> None:
    """Tell Megatron's schedule how gradients are scaled, synchronised and finished."""
    config: Any = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    if optimizer is not None:
        config.grad_scale_func = optimizer.scale_loss
    if chunks[0].ddp_config.overlap_grad_reduce:
        # The interleaved schedule takes a function of each chunk, the others take one.
        no_sync, grad_sync = [chunk.no_sync for chunk in chunks], [chunk.start_grad_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
        config.grad_sync_func = grad_sync if len(chunks) > 1 else grad_sync[0]


def describe(
    config: Config,
    stages: tuple[Stage, ...],
    start_step: int,
    platform: Platform,
    topology: Topology,
    keeps_memory: bool,
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
            **chosen_kernels(config, platform),
            "ranks": f"{topology.world_size} (tensor {topology.tensor_parallel_size} x pipeline "
            f"{topology.pipeline_size} x context {topology.context_parallel_size} x data "
            f"{topology.data_parallel_size}), {platform.distributed_backend}",
            "recomputed": config.parallel.recompute_granularity.value,
            "threads per rank": str(torch.get_num_threads()),
            "allocator": "keeps freed memory" if keeps_memory else "as it was set",
        },
    )


def _first_line(text: str | None) -> str:
    return "" if text is None else text.partition("\n")[0]


def other_attention(config: Config, platform: Platform, group: dist.ProcessGroup) -> list[str]:
    """Which ranks choose another attention than rank 0 does, as each looks for a compiler on its own machine; for
    people. Collective."""
    if platform.is_cuda or config.model.attention_backend is not AttentionBackend.auto:
        return []
    found: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, missing_for_native(), group=group)
    return [
        f"rank {rank} computes attention by {'native' if missing is None else 'chunked'}, unlike rank 0: other last "
        f"digits ({_first_line(missing if missing is not None else found[0])})"
        for rank, missing in enumerate(found)
        if (missing is None) != (found[0] is None)
    ]


def chosen_kernels(config: Config, platform: Platform) -> dict[str, str]:
    """Device and arithmetic, and whose kernels compute what."""
    shape, precision, device = config.model, config.train.precision, platform.device
    by_transformer_engine = shape.layer_spec is LayerSpec.transformer_engine
    backend = resolve_backend(shape.attention_backend, device)
    attention = backend.value
    if backend is AttentionBackend.native and precision is not Precision.fp32:
        attention += f", {arithmetic()}"
    elif backend is AttentionBackend.chunked and shape.attention_backend is AttentionBackend.auto:
        attention += f" (not native: {_first_line(missing_for_native())})"
    if by_transformer_engine:
        attention += ", under a plain causal mask Transformer Engine's"
    gradients = (
        "the matrix product adds to the fp32 sum (Transformer Engine)" if by_transformer_engine else "one addition"
    )
    if fuses_gradients(shape, DTYPES[precision], device):
        gradients = "the matrix product adds to the fp32 sum (Apex)"
    products = {}
    if not platform.is_cuda:
        products = {"matrix products": fp32_products() if precision is Precision.fp32 else "torch"}
        if precision is Precision.fp32 and config.parallel.tensor_model_parallel_size == 1:
            gradients = "the matrix product adds to the sum"
    form = "compiled" if compiles_pointwise(shape.compile_pointwise, device) else "eager"
    installed = [
        f"{name} {library_version(package)}"
        for name, package, is_there in (
            ("Transformer Engine", "transformer-engine", platform.has_transformer_engine),
            ("Apex", "apex", platform.has_apex),
        )
        if is_there
    ]
    return {
        "device": f"{device}, {torch.cuda.get_device_name(device)}" if platform.is_cuda else str(device),
        "precision": precision.value,
        "layers": f"{shape.layer_spec.value}{', products in FP8' if precision is Precision.fp8 else ''}",
        "attention": attention,
        "norm and SwiGLU": f"Transformer Engine's, and {form}" if by_transformer_engine else form,
        "rotary embedding": "one kernel (Triton)" if platform.is_cuda else form,
        **products,
        "weight gradients": gradients,
        "optimizer": choose_adam(),
        "installed": ", ".join(
            [f"torch {torch.__version__}", f"megatron-core {library_version('megatron-core')}", *installed]
        ),
    }


def finish(config: Config, checkpoint: Path, callbacks: Callback, supervisor: Supervisor) -> None:
    """Export the last checkpoint, unless that was done, and continue the prompt from it in all modes (rank 0).

    The continuation is not watched: a large model on a CPU takes its time, and nothing is lost if it hangs.
    """
    if not config.export.enabled:
        return
    out = Path(config.run.dir) / "hf"
    if exported_step(out) != read_info(checkpoint).step:
        with supervisor.reading_files():
            mark = supervisor.watchdog.mark
            export_checkpoint(checkpoint, out, overwrite=True, progress=lambda done, total: mark())
        callbacks.on_message(f"exported to {out}")
    if config.export.prompt is not None:
        # Imports transformers, which takes a second of every start and is needed here alone.
        from nld_train.evaluation.decoding import DecodingMode, continue_prompt, format_continuation, load_export

        model, tokenizer = load_export(out)
        for mode in DecodingMode:
            result = continue_prompt(
                model, tokenizer, config.export.prompt, mode, max_new_tokens=config.export.max_new_tokens
            )
            callbacks.on_message(format_continuation(result))
