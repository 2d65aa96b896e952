"""Rules on values and between values; all problems at once, each with the nearest value that works.

Types and names are the business of :mod:`nld_train.config.compose`. Rules that need torch (is there a GPU?) or the
content of files belong to the layers that read them.
"""

import difflib
import glob
import math
import re
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import reduce
from pathlib import Path
from typing import Any

from nld_train.config.schema import (
    AttentionBackend,
    BlendPart,
    Config,
    Device,
    DocumentMask,
    Normalization,
    ParallelConfig,
    Sampler,
    StageConfig,
    Stratify,
)
from nld_train.errors import Problem

# The tokenizer that is trained on a shipped corpus gives these ids to its special tokens and one to every byte.
SHIPPED_CORPORA = ("python_code", "python_prose", "stdlib")
SHIPPED_MASK_TOKEN_ID = 3
SHIPPED_CHATS = ("stdlib_chat",)
SHIPPED_MIN_VOCAB_SIZE = 5 + 256
_MANIFEST = "manifest.json"  # of a prepared corpus

MAX_SEED = 2**31 - 1  # Megatron's data sets seed numpy with 32 bits, and an epoch's number is added


def validate(config: Config, world_size: int | None) -> list[Problem]:
    """Check a typed configuration.

    Args:
        config: every mandatory value set.
        world_size: number of launched ranks; None leaves out what depends on the launch and on this machine's files
            (ranks, folders), so that a large run's configuration can be looked at anywhere.

    Returns:
        Every problem, in the order of the sections; empty if there is none.
    """
    problems = [
        *_finite(config, ""),
        *_run(config),
        *_model(config),
        *_objective(config),
        *_data(config),
        *_train(config),
        *_parallel(config),
        *_machine(config),
        *_optim(config),
        *_stages(config),
        *_checkpoint_export_wandb(config),
    ]
    if world_size is not None:
        # A layout that the run will choose is checked when it is known.
        problems += [*([] if config.parallel.auto else _launch(config, world_size)), *_paths(config)]
    elif not config.parallel.auto:
        problems += _batch(config, data_parallel_size=1)
    return problems


def layout_problems(config: Config, world_size: int) -> list[Problem]:
    """What keeps ``config.parallel`` from being the layout of ``world_size`` ranks; files are not looked at."""
    return [*_parallel(config), *_launch(config, world_size)]


# Helpers -------------------------------------------------------------------------------------------------------------


def _at_least(config: Config, minimum: float, *keys: str, why: str = "") -> list[Problem]:
    """``key >= minimum`` for each dotted key."""
    return [
        Problem(key, f"{value} is too small{why}", f"use {key}={minimum} or more")
        for key in keys
        if _is_number(value := _get(config, key)) and value < minimum
    ]


def _above_zero(config: Config, *keys: str) -> list[Problem]:
    return [
        Problem(key, f"{value} must be greater than 0", f"give a positive number, as in {key}={example}")
        for key, example in zip(keys, map(_schema_default, keys), strict=True)
        if _is_number(value := _get(config, key)) and value <= 0
    ]


def _is_number(value: Any) -> bool:
    """Not-finite numbers are reported once, by ``_finite``; the other rules pass over them."""
    return isinstance(value, int | float) and math.isfinite(value)


def _get(config: Config, key: str) -> Any:
    """Attribute by dotted key; ``stages.NAME.field`` goes through the dict."""
    return reduce(
        lambda node, name: node[name] if isinstance(node, dict) else getattr(node, name), key.split("."), config
    )


def _schema_default(key: str) -> Any:
    parent = StageConfig() if key.startswith("stages.") else _get(Config(), key.rpartition(".")[0])
    default = getattr(parent, key.rpartition(".")[2])
    return default if _is_number(default) else 1


def _finite(node: Any, prefix: str) -> Iterable[Problem]:
    """No NaN and no infinity anywhere."""
    if isinstance(node, float) and not math.isfinite(node):
        yield Problem(prefix, f"{node} is not a finite number", "give a finite number")
    elif isinstance(node, dict):
        for name, value in node.items():
            yield from _finite(value, f"{prefix}.{name}")
    elif is_dataclass(node):
        for item in fields(node):
            yield from _finite(getattr(node, item.name), f"{prefix}.{item.name}".lstrip("."))


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def nearest(value: float, candidates: Iterable[int]) -> int:
    """The candidate closest to ``value``; of two equally close ones the smaller."""
    return min(candidates, key=lambda candidate: (abs(candidate - value), candidate))


def _multiple_of(value: int, unit: int) -> int:
    """The positive multiple of ``unit`` nearest to ``value``."""
    return max(1, (2 * value + unit) // (2 * unit)) * unit


# Sections ------------------------------------------------------------------------------------------------------------


def _run(config: Config) -> Iterable[Problem]:
    if not config.run.dir.strip():
        yield Problem("run.dir", "the folder's name is empty", "give a folder, as in run.dir=runs/mine")
    if not 0 <= config.run.seed <= MAX_SEED:
        yield Problem("run.seed", f"{config.run.seed} is not in 0..{MAX_SEED}", "use run.seed=1234, or any other there")


def _model(config: Config) -> Iterable[Problem]:
    model = config.model
    yield from _at_least(
        config,
        1,
        *("model.num_layers", "model.hidden_size", "model.ffn_hidden_size", "model.num_attention_heads"),
        *("model.num_key_value_heads", "model.vocab_size", "model.max_position_embeddings"),
        "model.rope.original_max_position_embeddings",
    )
    yield from _at_least(config, 2, "model.head_dim")
    yield from _above_zero(
        config,
        *("model.rms_norm_eps", "model.initializer_range", "model.rope.rope_theta", "model.rope.factor"),
        *("model.rope.beta_fast", "model.rope.beta_slow", "model.rope.mscale", "model.rope.mscale_all_dim"),
    )
    yield from _at_least(config, 0, "model.rope.llama_4_scaling_beta")
    if model.head_dim % 2:
        yield Problem(
            "model.head_dim",
            f"{model.head_dim} is odd: the rotary embedding turns pairs",
            f"use model.head_dim={model.head_dim + 1}",
        )
    heads, groups = model.num_attention_heads, model.num_key_value_heads
    if heads > 0 and groups > 0 and heads % groups:
        yield Problem(
            "model.num_key_value_heads",
            f"{groups} does not divide model.num_attention_heads={heads}",
            f"use model.num_key_value_heads={nearest(groups, _divisors(heads))}",
        )
    rope = model.rope
    if rope.beta_fast <= rope.beta_slow and rope.beta_fast > 0:
        yield Problem(
            "model.rope.beta_fast",
            f"{rope.beta_fast} is not greater than model.rope.beta_slow={rope.beta_slow}",
            "use model.rope.beta_fast=32 model.rope.beta_slow=1, or the checkpoint's values",
        )
    if model.attention_backend is AttentionBackend.flex and config.train.device is Device.cpu:
        yield Problem(
            "model.attention_backend",
            "flex has no backward pass on a CPU (train.device=cpu)",
            "use model.attention_backend=chunked, or auto",
        )


def _objective(config: Config) -> Iterable[Problem]:
    objective, length = config.objective, config.data.sequence_length
    # Where blocks begin anew at each document, the last one of a document may be short.
    must_divide = length > 0 and config.data.document_mask is DocumentMask.none
    if objective.block_size < 1 or (must_divide and length % objective.block_size):
        why = "is too small" if objective.block_size < 1 else f"does not divide data.sequence_length={length}"
        remedy = f"use objective.block_size={nearest(objective.block_size, _divisors(length)) if length > 0 else 32}"
        if 1 < objective.block_size < length:
            remedy += f", or data.sequence_length={_multiple_of(length, objective.block_size)}"
        yield Problem("objective.block_size", f"{objective.block_size} {why}", remedy)
    mask_token_id, vocab_size = objective.mask_token_id, config.model.vocab_size
    if not 0 <= mask_token_id < vocab_size:
        yield Problem(
            "objective.mask_token_id",
            f"{mask_token_id} is not in the vocabulary, 0..{vocab_size - 1} (model.vocab_size={vocab_size})",
            "give the id that the corpus' tokenizer reserves for the mask",
        )
    elif (shipped := _shipped_corpus(config)) and mask_token_id != SHIPPED_MASK_TOKEN_ID:
        yield Problem(
            "objective.mask_token_id",
            f"{mask_token_id} is an ordinary token in the tokenizer of {shipped}",
            f"use objective.mask_token_id={SHIPPED_MASK_TOKEN_ID}",
        )
    if not 0 < objective.eps < 1 and math.isfinite(objective.eps):
        yield Problem(
            "objective.eps",
            f"{objective.eps} is not between 0 and 1 (exclusive): the smallest masking probability",
            "use objective.eps=0.001",
        )
    elif objective.complementary and objective.eps >= 0.5:
        yield Problem(
            "objective.eps",
            f"{objective.eps}, but with objective.complementary=true probabilities are between eps and 1 - eps",
            "use objective.eps=0.001",
        )
    yield from _at_least(config, 0, "objective.diffusion_loss_weight")
    if not 0 < objective.noisy_fraction <= 1 and math.isfinite(objective.noisy_fraction):
        yield Problem(
            "objective.noisy_fraction",
            f"{objective.noisy_fraction} is not in (0, 1]: the share of blocks that get a noisy copy",
            "use objective.noisy_fraction=1, or 0.5",
        )
    yield from _above_zero(config, "objective.half_life_ratio")
    if objective.shared_noise_level and objective.sampler is not Sampler.bernoulli:
        yield Problem(
            "objective.shared_noise_level",
            f"True, but objective.sampler={objective.sampler.value} draws a level for each block",
            "use objective.shared_noise_level=false, or objective.sampler=bernoulli",
        )
    if objective.shared_noise_level and objective.stratify is not Stratify.none:
        yield Problem(
            "objective.stratify",
            f"{objective.stratify.value} spreads noise levels, but objective.shared_noise_level=true draws one",
            "use objective.stratify=none",
        )
    if objective.complementary and objective.sampler is Sampler.position_weighted:
        yield Problem(
            "objective.complementary",
            "True, but objective.sampler=position_weighted has no weights for a pair of copies",
            "use objective.complementary=false, or objective.sampler=power_count",
        )


def notices(config: Config) -> list[str]:
    """What is allowed and may surprise: one line each, for the run to say at its start."""
    objective = config.objective
    changed = [
        f"objective.{name}={value}"
        for name, value, is_changed in (
            ("sampler", objective.sampler.value, objective.sampler is not Sampler.bernoulli),
            ("complementary", "true", objective.complementary),
            ("noisy_fraction", objective.noisy_fraction, objective.noisy_fraction != 1),
        )
        if is_changed
    ]
    lines = []
    if changed and objective.normalization is not Normalization.tokens:
        lines.append(
            f"objective.normalization={objective.normalization.value} divides by counts that depend on "
            f"{', '.join(changed)}: the expected loss is not that of the recipe's sampler (it is with tokens)"
        )
    if objective.sampler is Sampler.position_weighted:
        lines.append("objective.sampler=position_weighted is a loss of its own, not another estimate of the recipe's")
    return lines


def _data(config: Config) -> Iterable[Problem]:
    data, model = config.data, config.model
    yield from _at_least(config, 1, "data.sequence_length")
    yield from _at_least(config, 0, "data.num_workers")
    if data.sequence_length > model.max_position_embeddings > 0:
        yield Problem(
            "data.sequence_length",
            f"{data.sequence_length} is longer than model.max_position_embeddings={model.max_position_embeddings}",
            f"use data.sequence_length={model.max_position_embeddings} or less",
        )
    if not 0 < data.validation_fraction < 1 and math.isfinite(data.validation_fraction):
        yield Problem(
            "data.validation_fraction",
            f"{data.validation_fraction} is not between 0 and 1 (exclusive)",
            "use data.validation_fraction=0.03",
        )
    if data.corpus is None and not data.blend:
        yield Problem(
            "data.corpus",
            "null, and data.blend is empty: the run reads nothing",
            f"use data.corpus={SHIPPED_CORPORA[0]}, or a folder, or name the parts of data.blend",
        )
    elif data.corpus is not None and data.blend:
        yield Problem(
            "data.blend",
            f"has parts ({', '.join(data.blend)}), and data.corpus={data.corpus}: the run reads one or the other",
            f"use data=prepared data.corpus={data.corpus} for the corpus alone, or data.corpus=null for the blend",
        )
    for key, part in _parts(config):
        yield from _part(config, key, part)
    if not data.cache_dir.strip():
        yield Problem("data.cache_dir", "the folder's name is empty", "use data.cache_dir=data/cache")
    if (shipped := _shipped_corpus(config)) and 0 < model.vocab_size < SHIPPED_MIN_VOCAB_SIZE:
        yield Problem(
            "model.vocab_size",
            f"{model.vocab_size} cannot hold the 256 bytes and 5 special tokens of {shipped}",
            f"use model.vocab_size={SHIPPED_MIN_VOCAB_SIZE} or more",
        )


def _parts(config: Config) -> Iterable[tuple[str, BlendPart]]:
    """Every part of every blend with its key; ``data.corpus`` is one."""
    if config.data.corpus is not None:
        yield "data", BlendPart(corpus=config.data.corpus, weight=1.0)
    for name, part in config.data.blend.items():
        yield f"data.blend.{name}", part
    for stage_name, stage in config.stages.items():
        for name, part in stage.blend.items():
            yield f"stages.{stage_name}.blend.{name}", part


def _shipped_corpus(config: Config) -> str | None:
    """``data.corpus=stdlib``: the first key that names a shipped corpus."""
    return next((f"{key}.corpus={part.corpus}" for key, part in _parts(config) if part.corpus in SHIPPED_CORPORA), None)


def _part(config: Config, key: str, part: BlendPart) -> Iterable[Problem]:
    name = key.rpartition(".")[2]
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
        yield Problem(key, f"{name!r} is not a plain name", "name the parts of a blend with letters, digits, _ and -")
    if not part.corpus.strip():
        yield Problem(f"{key}.corpus", "the name is empty", f"use {key}.corpus={SHIPPED_CORPORA[0]}, or a folder")
    if part.weight <= 0:  # one that is not finite is reported with all other numbers
        yield Problem(
            f"{key}.weight",
            f"{part.weight} must be greater than 0",
            f"give its share of the samples, as in {key}.weight=0.5, or remove the part: ~{key}",
        )


def _train(config: Config) -> Iterable[Problem]:
    yield from _at_least(
        config,
        1,
        *("train.global_batch_size", "train.micro_batch_size", "train.log_interval"),
        *("train.validation_interval", "train.validation_samples"),
    )
    yield from _at_least(config, 0, "train.term_norm_interval")
    log_interval, term_norm_interval = config.train.log_interval, config.train.term_norm_interval
    if log_interval >= 1 and term_norm_interval > 0 and term_norm_interval % log_interval:
        yield Problem(
            "train.term_norm_interval",
            f"{term_norm_interval} is no multiple of train.log_interval={log_interval}: some norms would go unseen",
            f"use train.term_norm_interval={_multiple_of(term_norm_interval, log_interval)}",
        )


def _optim(config: Config) -> Iterable[Problem]:
    for key, value in (("optim.beta1", config.optim.beta1), ("optim.beta2", config.optim.beta2)):
        if not 0 <= value < 1 and math.isfinite(value):
            yield Problem(key, f"{value} is not in [0, 1)", f"use {key}={_schema_default(key)}")
    yield from _above_zero(config, "optim.eps")
    yield from _at_least(config, 0, "optim.weight_decay", "optim.clip_grad")


def _machine(config: Config) -> Iterable[Problem]:
    parallel = config.parallel
    if parallel.auto:
        default = ParallelConfig()
        for item in fields(ParallelConfig):
            value = getattr(parallel, item.name)
            if item.name in ("auto", "memory_gb") or value == getattr(default, item.name):
                continue
            if not item.name.startswith("overlap"):
                yield Problem(
                    f"parallel.{item.name}",
                    f"{value.value if isinstance(value, Enum) else value}, but parallel.auto=true chooses the layout",
                    f"leave parallel.{item.name} out, or use parallel=single to choose all of it yourself",
                )
    if parallel.memory_gb is not None:
        yield from _above_zero(config, "parallel.memory_gb")
    yield from _at_least(config, 1, "machine.gpus_per_node")
    yield from _at_least(config, 0, "machine.reserved_gb", "machine.fragmentation", "machine.split_cost")
    rates = ("peak_tflops", "mfu", "nvlink_gb_per_s", "network_gb_per_s", "hbm_gb_per_s")
    yield from _above_zero(config, *(f"machine.{name}" for name in rates))
    if config.machine.mfu > 1:
        yield Problem("machine.mfu", f"{config.machine.mfu} is more than the whole peak", "use machine.mfu=0.4")


def _stages(config: Config) -> Iterable[Problem]:
    if not config.stages:
        yield Problem(
            "stages",
            "there is no stage, so there is nothing to train",
            "add one, as in +stage@stages.joint=joint stages.joint.tokens=1000000 "
            "stages.joint.lr=1e-3 stages.joint.min_lr=1e-4",
        )
    for name, stage in config.stages.items():
        key = f"stages.{name}"
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
            yield Problem(key, f"{name!r} is not a plain name", "name stages with letters, digits, _ and -")
            continue
        yield from _at_least(config, 0, f"{key}.diffusion_loss_weight", f"{key}.ar_loss_weight")
        if stage.diffusion_loss_weight == 0 == stage.ar_loss_weight:
            yield Problem(
                f"{key}.ar_loss_weight", f"0, and {key}.diffusion_loss_weight=0: no loss is left", "raise one of them"
            )
        if stage.chat is not None and stage.blend:
            yield Problem(
                f"{key}.blend",
                f"has parts ({', '.join(stage.blend)}), and {key}.chat={stage.chat}: a stage reads one or the other",
                f"use {key}.chat=null, or remove the blend: ~{key}.blend",
            )
        yield from _at_least(config, 0, f"{key}.chat_validation_samples")
        if stage.chat is None and stage.chat_validation_samples > 0:
            yield Problem(
                f"{key}.chat_validation_samples",
                f"{stage.chat_validation_samples}, but the stage has no conversations",
                f"use {key}.chat_validation_samples=0, or give it some with {key}.chat=FILE.jsonl",
            )
        fraction = stage.chat_validation_fraction
        if not 0 < fraction < 1 and math.isfinite(fraction):
            yield Problem(
                f"{key}.chat_validation_fraction",
                f"{fraction} is not between 0 and 1 (exclusive)",
                f"use {key}.chat_validation_fraction=0.05",
            )
        for field in ("sequence_length", "global_batch_size"):
            if getattr(stage, field) is None:
                continue
            yield from _at_least(config, 1, f"{key}.{field}")
            if stage.chat is None:
                section = "data" if field == "sequence_length" else "train"
                yield Problem(
                    f"{key}.{field}",
                    f"{getattr(stage, field)}, but the stage reads the run's corpus, whose samples all stages share",
                    f"set {section}.{field}, or give the stage its own data with {key}.chat=FILE.jsonl",
                )
        length = stage.sequence_length
        if length is not None and length > config.model.max_position_embeddings > 0:
            yield Problem(
                f"{key}.sequence_length",
                f"{length} is longer than model.max_position_embeddings={config.model.max_position_embeddings}",
                f"use {key}.sequence_length={config.model.max_position_embeddings} or less",
            )
        yield from _at_least(config, 1, f"{key}.tokens")
        if stage.lr <= 0:
            yield Problem(
                f"{key}.lr", f"{stage.lr} must be greater than 0", f"use a learning rate such as {key}.lr=1e-3"
            )
        elif not 0 <= stage.min_lr <= stage.lr and math.isfinite(stage.min_lr + stage.lr):
            value = 0 if stage.min_lr < 0 else stage.lr
            yield Problem(
                f"{key}.min_lr",
                f"{stage.min_lr} is not between 0 and {key}.lr={stage.lr}",
                f"use {key}.min_lr={value}",
            )
        warmup, decay = stage.warmup_fraction, stage.decay_fraction
        outside = [
            Problem(f"{key}.{field}", f"{value} is not between 0 and 1", f"use {key}.{field}={min(max(value, 0), 1):g}")
            for field, value in (("warmup_fraction", warmup), ("decay_fraction", decay))
            if not 0 <= value <= 1 and math.isfinite(value)
        ]
        yield from outside
        if not outside and warmup + decay > 1:
            yield Problem(
                f"{key}.decay_fraction",
                f"{decay} and {key}.warmup_fraction={warmup} are together more than the whole stage",
                f"use {key}.decay_fraction={1 - warmup:g} or less",
            )


def _checkpoint_export_wandb(config: Config) -> Iterable[Problem]:
    yield from _at_least(config, 0, "checkpoint.interval_steps", "checkpoint.interval_seconds")
    yield from _at_least(config, 1, "checkpoint.keep_last", "export.max_new_tokens")
    if config.checkpoint.interval_steps == 0 and config.checkpoint.interval_seconds == 0:
        yield Problem(
            "checkpoint.interval_steps",
            "0, and checkpoint.interval_seconds=0: the run would never be saved before its end",
            "use checkpoint.interval_steps=1000, or checkpoint.interval_seconds=600",
        )
    if config.export.prompt is not None and not config.export.prompt:
        yield Problem("export.prompt", "the text is empty", "give some text, or export.prompt=null for none")
    if not config.wandb.project.strip():
        yield Problem("wandb.project", "the name is empty", "use wandb.project=nld-train")


def _parallel(config: Config) -> Iterable[Problem]:
    yield from _at_least(config, 1, *(f"parallel.{name}_parallel_size" for name in _GROUPS))
    tensor, _, context = _sizes(config)
    is_alone = config.parallel.sequence_parallel and _working_tensor_size(config) == 1
    if tensor >= 1 and (left_over := [f"{key}={size}" for key, size in _split_by_tensor(config) if size % tensor]):
        yield Problem(
            "parallel.tensor_model_parallel_size",
            f"{tensor} does not divide {', '.join(left_over)}",
            f"use parallel.tensor_model_parallel_size={_working_tensor_size(config)} "
            f"{'parallel.sequence_parallel=false ' if is_alone else ''}"
            f"(what works for this model: {_listing(_tensor_sizes(config))})",
        )
    yield from _sequence_parallel(config)
    yield from _pipeline(config)
    if config.parallel.overlap_param_gather and config.parallel.overlap_grad_reduce is False:
        yield Problem(
            "parallel.overlap_param_gather",
            "True, but parallel.overlap_grad_reduce=false: Megatron overlaps both, gradients alone, or neither",
            "use parallel.overlap_param_gather=false",
        )
    uncut = [
        f"{key}={length}{f' of blocks of {unit}' if unit > 1 else ''}"
        for key, length, unit in _cut_by_context(config)
        if context > 1 and length % (2 * context * unit)
    ]
    if uncut:
        yield Problem(
            "parallel.context_parallel_size",
            f"{' and '.join(uncut)} cannot be cut into 2 x {context} equal chunks",
            f"use parallel.context_parallel_size={_working_context_size(config)} "
            f"(what works here: {_listing(_context_sizes(config))}), or another sequence length",
        )


_GROUPS = ("tensor_model", "pipeline_model", "context")


def _sequence_parallel(config: Config) -> Iterable[Problem]:
    tensor = config.parallel.tensor_model_parallel_size
    if not config.parallel.sequence_parallel or tensor < 1:
        return
    if tensor == 1:
        larger = next((size for size in _tensor_sizes(config) if size > 1), None)
        yield Problem(
            "parallel.sequence_parallel",
            "True shares rows among tensor-parallel ranks, and parallel.tensor_model_parallel_size=1",
            "use parallel.sequence_parallel=false"
            + (f", or parallel.tensor_model_parallel_size={larger}" if larger is not None else ""),
        )
        return
    has_whole_blocks = config.data.document_mask is DocumentMask.none and config.objective.block_size >= 1
    ranks = tensor * max(1, config.parallel.context_parallel_size)
    unit = math.lcm(ranks, config.objective.block_size) if has_whole_blocks else ranks
    for key, length in _sequence_lengths(config).items():
        if length >= 1 and length % ranks:
            by_context = f" x parallel.context_parallel_size={ranks // tensor}" if ranks > tensor else ""
            yield Problem(
                key,
                f"{length} rows cannot be shared out to parallel.tensor_model_parallel_size={tensor}{by_context} ranks "
                "(parallel.sequence_parallel=true)",
                f"use {key}={_multiple_of(length, unit)}, or parallel.sequence_parallel=false",
            )


def _pipeline(config: Config) -> Iterable[Problem]:
    """Layers over pipeline ranks and their chunks."""
    parallel, num_layers = config.parallel, config.model.num_layers
    pipeline, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    uneven = _ends(config)
    if pipeline < 1 or num_layers < 1:
        return
    if virtual is not None and (virtual < 2 or pipeline == 1):
        sizes = _pipeline_sizes(config) if virtual > 1 else []
        other = f", or parallel.pipeline_model_parallel_size={sizes[0]}" if sizes else ""
        yield Problem(
            "parallel.virtual_pipeline_model_parallel_size",
            f"{virtual} is too small: a pipeline rank has one chunk without it"
            if virtual < 2
            else f"{virtual}, but parallel.pipeline_model_parallel_size=1: there are no stages to interleave",
            f"use parallel.virtual_pipeline_model_parallel_size=null{other}",
        )
        return
    if uneven and pipeline == 1:
        for key, size in uneven.items():
            yield Problem(
                key, f"{size}, but parallel.pipeline_model_parallel_size=1: one rank has all layers", f"use {key}=null"
            )
        return
    if _layers_fit(config, pipeline, uneven.values()):
        return
    chunks = f" x {virtual} virtual stages" if virtual is not None else ""
    if not uneven and virtual is not None and num_layers % pipeline == 0:
        fitting = [size for size in _divisors(num_layers // pipeline) if size > 1]
        yield Problem(
            "parallel.virtual_pipeline_model_parallel_size",
            f"{virtual} does not divide the {num_layers // pipeline} layers of a pipeline rank "
            f"(model.num_layers={num_layers}, parallel.pipeline_model_parallel_size={pipeline})",
            f"use parallel.virtual_pipeline_model_parallel_size={nearest(virtual, fitting) if fitting else 'null'}",
        )
        return
    if not uneven and virtual is not None and not _pipeline_sizes(config):
        without = nearest(pipeline, _divisors(num_layers))
        yield Problem(
            "parallel.virtual_pipeline_model_parallel_size",
            f"{virtual}: no pipeline of model.num_layers={num_layers} has ranks with so many chunks each",
            "use parallel.virtual_pipeline_model_parallel_size=null"
            + (f" parallel.pipeline_model_parallel_size={without}" if without != pipeline else ""),
        )
        return
    if not uneven:
        yield Problem(
            "parallel.pipeline_model_parallel_size",
            f"{pipeline}{chunks} does not divide model.num_layers={num_layers}",
            f"use parallel.pipeline_model_parallel_size={_working_pipeline_size(config)} "
            f"(what works with as many layers in each stage: {_listing(_pipeline_sizes(config))}), or give the first "
            "and the last stage other numbers of layers (parallel.num_layers_in_first_pipeline_stage, ..._last_...)",
        )
        return
    yield Problem(
        next(iter(uneven)),
        f"{', '.join(f'{key}={size}' for key, size in uneven.items())}: the rest of model.num_layers={num_layers} does "
        f"not make {pipeline} pipeline ranks{chunks} of as many layers each",
        _uneven_remedy(config, uneven),
    )


def _ends(config: Config) -> dict[str, int]:
    """The configured numbers of layers of the first and of the last pipeline rank, by key."""
    parallel = config.parallel
    sizes = {
        "parallel.num_layers_in_first_pipeline_stage": parallel.num_layers_in_first_pipeline_stage,
        "parallel.num_layers_in_last_pipeline_stage": parallel.num_layers_in_last_pipeline_stage,
    }
    return {key: size for key, size in sizes.items() if size is not None}


def _layers_fit(config: Config, pipeline: int, ends: Iterable[int]) -> bool:
    """The layers fall into ``pipeline`` ranks, each of whole chunks with at least one layer, the others alike."""
    virtual = config.parallel.virtual_pipeline_model_parallel_size or 1
    if pipeline == 1:
        return virtual == 1
    sizes = list(ends)
    left, num_between = config.model.num_layers - sum(sizes), pipeline - len(sizes)
    if virtual < 1 or any(size < 1 or size % virtual for size in sizes):
        return False
    return left == 0 if num_between == 0 else left > 0 and left % (num_between * virtual) == 0


def _uneven_remedy(config: Config, uneven: dict[str, int]) -> str:
    """The nearest number of layers for one of the uneven stages that leaves the rest even."""
    fitting = [
        (abs(candidate - size), f"use {key}={candidate}")
        for key, size in uneven.items()
        for candidate in range(1, min(config.model.num_layers, 1000))
        if _layers_fit(config, config.parallel.pipeline_model_parallel_size, (uneven | {key: candidate}).values())
    ]
    return min(fitting)[1] if fitting else f"use {' '.join(f'{key}=null' for key in uneven)}"


def _pipeline_sizes(config: Config) -> list[int]:
    """What works for the layers and chunks of this configuration."""
    ends = _ends(config).values()
    return [
        size for size in range(1, min(max(1, config.model.num_layers), 1000) + 1) if _layers_fit(config, size, ends)
    ]


def _sizes(config: Config) -> tuple[int, int, int]:
    parallel = config.parallel
    return (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )


def _split_by_tensor(config: Config) -> list[tuple[str, int]]:
    """What Megatron cuts into equal parts, one for each tensor-parallel rank."""
    model = config.model
    sizes = [
        ("model.num_attention_heads", model.num_attention_heads),
        ("model.num_key_value_heads", model.num_key_value_heads),
        ("model.ffn_hidden_size", model.ffn_hidden_size),
        ("model.vocab_size", model.vocab_size),
    ]
    return [(key, size) for key, size in sizes if size >= 1]


def _tensor_sizes(config: Config) -> list[int]:
    return _divisors(math.gcd(*(size for _, size in _split_by_tensor(config))) or 1)


def _working_tensor_size(config: Config) -> int:
    return nearest(config.parallel.tensor_model_parallel_size, _tensor_sizes(config))


def _working_pipeline_size(config: Config) -> int:
    return nearest(config.parallel.pipeline_model_parallel_size, _pipeline_sizes(config) or [1])


def _cut_by_context(config: Config) -> list[tuple[str, int, int]]:
    """Sequence lengths that are cut into chunks for context-parallel ranks, and what a chunk must be a multiple of."""
    # Where there are documents, as in conversations, a block may go on beyond the chunk that it begins in.
    block_size = config.objective.block_size if config.data.document_mask is DocumentMask.none else 1
    units = {"data.sequence_length": block_size}
    lengths = [(key, length, units.get(key, 1)) for key, length in _sequence_lengths(config).items()]
    return [item for item in lengths if min(item[1:]) >= 1]


def _sequence_lengths(config: Config) -> dict[str, int]:
    """The run's sequence length and those that stages have of their own, by key."""
    of_stages = {
        f"stages.{name}.sequence_length": stage.sequence_length
        for name, stage in config.stages.items()
        if stage.sequence_length is not None
    }
    return {"data.sequence_length": config.data.sequence_length, **of_stages}


def _context_sizes(config: Config) -> list[int]:
    halves = [length // (2 * unit) for _, length, unit in _cut_by_context(config) if length % (2 * unit) == 0]
    return _divisors(math.gcd(*halves)) if halves and len(halves) == len(_cut_by_context(config)) else [1]


def _working_context_size(config: Config) -> int:
    return nearest(config.parallel.context_parallel_size, _context_sizes(config))


def _listing(values: list[int]) -> str:
    shown = ", ".join(map(str, values[:8]))
    return shown if len(values) <= 8 else f"{shown}, ..."


# Launch and machine --------------------------------------------------------------------------------------------------


def _launch(config: Config, world_size: int) -> Iterable[Problem]:
    tensor, pipeline, context = _sizes(config)
    model_parallel = tensor * pipeline * context
    if min(tensor, pipeline, context) >= 1 and world_size % model_parallel == 0:
        yield from _batch(config, world_size // model_parallel)
        return
    # A size that was refused above must not end in a launch line that would be refused again: count with the
    # values that the other remedies propose.
    ranks = _working_tensor_size(config) * _working_pipeline_size(config) * _working_context_size(config)
    if min(tensor, pipeline, context) >= 1 and world_size % ranks:
        key = max(
            ("parallel.tensor_model_parallel_size", tensor),
            ("parallel.pipeline_model_parallel_size", pipeline),
            ("parallel.context_parallel_size", context),
            key=lambda item: item[1],
        )[0]
        yield Problem(
            key,
            f"tensor {tensor} x pipeline {pipeline} x context {context} = {model_parallel} does not divide "
            f"the {world_size} {'rank that is' if world_size == 1 else 'ranks that are'} launched",
            f"start `torchrun --nproc-per-node {ranks} train.py ...`"
            if ranks > 1
            else "use " + " ".join(f"parallel.{name}_parallel_size=1" for name in _GROUPS),
        )
    yield from _batch(config, data_parallel_size=max(1, world_size // ranks))


def _batch(config: Config, data_parallel_size: int) -> Iterable[Problem]:
    yield from _validation_batch(config, data_parallel_size)
    totals = {"train.global_batch_size": config.train.global_batch_size}
    for name, stage in config.stages.items():
        if stage.global_batch_size is not None:
            totals[f"stages.{name}.global_batch_size"] = stage.global_batch_size
    for key, total in totals.items():
        yield from _batch_of(config.train.micro_batch_size, key, total, data_parallel_size)
        yield from _rounds(config, key, total, data_parallel_size)


def _rounds(config: Config, key: str, total: int, data_parallel_size: int) -> Iterable[Problem]:
    """Enough micro-batches for every pipeline stage; with interleaved stages whole rounds of them."""
    pipeline, micro = config.parallel.pipeline_model_parallel_size, config.train.micro_batch_size
    is_interleaved = config.parallel.virtual_pipeline_model_parallel_size is not None
    per_round = micro * data_parallel_size
    if pipeline < 2 or per_round < 1 or total < 1 or total % per_round:
        return
    count = total // per_round
    if count >= pipeline and not (is_interleaved and count % pipeline):
        return
    why = f"fewer than parallel.pipeline_model_parallel_size={pipeline}"
    if count >= pipeline:
        why = f"no multiple of parallel.pipeline_model_parallel_size={pipeline}, as interleaved stages need"
    smaller = [
        size
        for size in _divisors(total // data_parallel_size)
        if size < micro and total // data_parallel_size // size % pipeline == 0
    ]
    remedy = f"use {key}={_multiple_of(total, per_round * pipeline)}"
    if smaller:
        remedy += f", or train.micro_batch_size={smaller[-1]}"
    yield Problem(
        key,
        f"{total} is {count} micro-batch{'es' if count > 1 else ''} of train.micro_batch_size={micro} on each of "
        f"{data_parallel_size} data-parallel rank{'s' if data_parallel_size > 1 else ''}: {why}",
        remedy,
    )


def _batch_of(micro: int, key: str, total: int, data_parallel_size: int) -> Iterable[Problem]:
    if micro < 1 or total < 1 or total % (micro * data_parallel_size) == 0:
        return
    ranks = f" x {data_parallel_size} data-parallel ranks" if data_parallel_size > 1 else ""
    remedy = f"use {key}={_multiple_of(total, micro * data_parallel_size)}"
    if total % data_parallel_size == 0:
        remedy = f"use train.micro_batch_size={nearest(micro, _divisors(total // data_parallel_size))}, or {remedy[4:]}"
    yield Problem(
        "train.micro_batch_size",
        f"{micro}{ranks} {'do' if ranks else 'does'} not divide {key}={total}",
        remedy,
    )


def _validation_batch(config: Config, data_parallel_size: int) -> Iterable[Problem]:
    sizes = {"train.validation_samples": config.train.validation_samples}
    sizes |= {
        f"stages.{name}.chat_validation_samples": stage.chat_validation_samples for name, stage in config.stages.items()
    }
    # Interleaved pipeline stages work in rounds of as many micro-batches.
    parallel = config.parallel
    rounds = parallel.pipeline_model_parallel_size if parallel.virtual_pipeline_model_parallel_size is not None else 1
    unit = data_parallel_size * max(1, rounds)
    for key, samples in sizes.items():
        if samples >= 1 and samples % unit:
            stages = f" in rounds of {rounds} interleaved pipeline stages" if rounds > 1 else ""
            yield Problem(
                key,
                f"{samples} cannot be shared out to {data_parallel_size} data-parallel ranks{stages}",
                f"use {key}={_multiple_of(samples, unit)}",
            )


def _paths(config: Config) -> Iterable[Problem]:
    hf_path = config.init.hf_path
    if hf_path is not None and not (Path(hf_path) / "config.json").is_file():
        what = "holds no config.json" if Path(hf_path).is_dir() else "is not a folder"
        yield Problem(
            "init.hf_path",
            f"{hf_path} {what}",
            "give the folder of a Hugging Face checkpoint (Ministral3 or NLD), or null for random weights",
        )
    for key, part in _parts(config):
        if part.corpus.strip() and isinstance(found := find_corpora(f"{key}.corpus", part.corpus), Problem):
            yield found
    for name, stage in config.stages.items():
        if stage.chat is not None and stage.chat not in SHIPPED_CHATS and not Path(stage.chat).is_file():
            yield Problem(
                f"stages.{name}.chat",
                f"{stage.chat} is not a file",
                f'give a JSONL file of {{"messages": [...]}} lines, or {SHIPPED_CHATS[0]}, a small set of this project',
            )
    run_dir = Path(config.run.dir)
    if config.run.dir.strip() and run_dir.exists() and not run_dir.is_dir():
        yield Problem("run.dir", f"{run_dir} is a file", "give a folder, or a name that does not exist yet")


def find_corpora(key: str, corpus: str) -> list[str] | Problem:
    """What ``corpus`` stands for: a shipped name, or folders (several for a glob, sorted by name).

    A manifest.json stands for its folder. Everything that a glob matches must be one or the other: nothing is left out
    silently. Whether a folder holds a corpus is for those to say who open it.

    Args:
        key: where the name is from, for the problem.
    """
    if corpus in SHIPPED_CORPORA or Path(corpus).is_dir():
        return [corpus]
    remedy = f"use a shipped corpus ({', '.join(SHIPPED_CORPORA)}) or the folder of a prepared one"
    if glob.has_magic(corpus):
        matches = sorted(glob.glob(corpus, recursive=True))
        if not matches:
            return Problem(key, f"the pattern {corpus} matches nothing in {Path.cwd()}", remedy)
        folders = {path: Path(path).parent if Path(path).name == _MANIFEST else Path(path) for path in matches}
        for path, folder in folders.items():
            if not (folder / _MANIFEST).is_file():
                return Problem(
                    key,
                    f"the pattern {corpus} matches {path}, which is not a prepared corpus",
                    f"make it match prepared folders only, or their {_MANIFEST} files",
                )
        return sorted({str(folder) for folder in folders.values()})
    if Path(corpus).name == _MANIFEST:
        if Path(corpus).is_file():
            return [str(Path(corpus).parent)]
        return Problem(key, f"the file {corpus} does not exist", remedy)
    guess = difflib.get_close_matches(corpus, SHIPPED_CORPORA, n=1)
    return Problem(
        key,
        f"{corpus} is neither a shipped corpus nor a folder",
        f"did you mean {key}={guess[0]}? Else {remedy}" if guess else remedy,
    )
