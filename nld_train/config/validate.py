"""Rules on values and between values; all problems at once, each with the nearest value that works.

Types and names are the business of :mod:`nld_train.config.compose`. Rules that need torch (is there a GPU?) or the
content of files belong to the layers that read them.
"""

import difflib
import glob
import math
import re
from collections.abc import Iterable
from dataclasses import fields
from enum import Enum
from pathlib import Path

from nld_train.config.layouts import batch_problems, launch_problems, parallel_problems
from nld_train.config.rules import (
    above_zero,
    at_least,
    compilation_problems,
    divisors,
    finite,
    multiple_of,
    nearest,
    schema_default,
)
from nld_train.config.schema import (
    AttentionBackend,
    BlendPart,
    Config,
    Device,
    DocumentMask,
    LayerSpec,
    Normalization,
    ParallelConfig,
    Precision,
    Sampler,
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
            (ranks, compiler, folders), so that a large run's configuration can be looked at anywhere.

    Returns:
        Every problem, in the order of the sections; empty if there is none.
    """
    problems = [
        *finite(config, ""),
        *_run(config),
        *_model(config),
        *_objective(config),
        *_data(config),
        *_train(config),
        *parallel_problems(config, world_size),
        *_machine(config),
        *_optim(config),
        *_stages(config),
        *_checkpoint_export_wandb(config),
    ]
    if world_size is not None:
        # A layout that the run will choose is checked when it is known.
        problems += [*([] if config.parallel.auto else launch_problems(config, world_size)), *_paths(config)]
        if config.train.device is Device.cpu:  # auto: decided where torch is known
            problems += compilation_problems(config)
    elif not config.parallel.auto:
        problems += batch_problems(config, data_parallel_size=1)
    return problems


# Sections ------------------------------------------------------------------------------------------------------------


def _run(config: Config) -> Iterable[Problem]:
    if not config.run.dir.strip():
        yield Problem("run.dir", "the folder's name is empty", "give a folder, as in run.dir=runs/mine")
    if not 0 <= config.run.seed <= MAX_SEED:
        yield Problem("run.seed", f"{config.run.seed} is not in 0..{MAX_SEED}", "use run.seed=1234, or any other there")


def _model(config: Config) -> Iterable[Problem]:
    model = config.model
    yield from at_least(
        config,
        1,
        *("model.num_layers", "model.hidden_size", "model.ffn_hidden_size", "model.num_attention_heads"),
        *("model.num_key_value_heads", "model.vocab_size", "model.max_position_embeddings"),
        "model.rope.original_max_position_embeddings",
    )
    yield from at_least(config, 2, "model.head_dim")
    yield from above_zero(
        config,
        *("model.rms_norm_eps", "model.initializer_range", "model.rope.rope_theta", "model.rope.factor"),
        *("model.rope.beta_fast", "model.rope.beta_slow", "model.rope.mscale", "model.rope.mscale_all_dim"),
    )
    yield from at_least(config, 0, "model.rope.llama_4_scaling_beta")
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
            f"use model.num_key_value_heads={nearest(groups, divisors(heads))}",
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
            "use model.attention_backend=auto",
        )
    yield from _transformer_engine(config)


def _transformer_engine(config: Config) -> Iterable[Problem]:
    """Whether it is installed is for :mod:`nld_train.platform.device` to say."""
    train, key = config.train, "model.layer_spec"
    if config.model.layer_spec is LayerSpec.transformer_engine:
        if train.device is Device.cpu:
            yield Problem(key, "transformer_engine needs a GPU (train.device=cpu)", f"use {key}=local")
        if train.precision is Precision.fp32:
            yield Problem(
                key,
                "transformer_engine multiplies fp32 matrices as TF32, which has 11 bits (train.precision=fp32)",
                f"use {key}=local, or train.precision=bf16",
            )
    elif train.precision is Precision.fp8:
        yield Problem(
            "train.precision",
            f"fp8, but {key}={config.model.layer_spec.value} has no FP8 products",
            f"use {key}=transformer_engine, or train.precision=bf16",
        )


def _objective(config: Config) -> Iterable[Problem]:
    objective, length = config.objective, config.data.sequence_length
    # Where blocks begin anew at each document, the last one of a document may be short.
    must_divide = length > 0 and config.data.document_mask is DocumentMask.none
    if objective.block_size < 1 or (must_divide and length % objective.block_size):
        why = "is too small" if objective.block_size < 1 else f"does not divide data.sequence_length={length}"
        remedy = f"use objective.block_size={nearest(objective.block_size, divisors(length)) if length > 0 else 32}"
        if 1 < objective.block_size < length:
            remedy += f", or data.sequence_length={multiple_of(length, objective.block_size)}"
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
    yield from at_least(config, 0, "objective.diffusion_loss_weight")
    if not 0 < objective.noisy_fraction <= 1 and math.isfinite(objective.noisy_fraction):
        yield Problem(
            "objective.noisy_fraction",
            f"{objective.noisy_fraction} is not in (0, 1]: the share of blocks that get a noisy copy",
            "use objective.noisy_fraction=1, or 0.5",
        )
    yield from above_zero(config, "objective.half_life_ratio")
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
    yield from at_least(config, 1, "data.sequence_length")
    yield from at_least(config, 0, "data.num_workers")
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
    yield from at_least(
        config,
        1,
        *("train.global_batch_size", "train.micro_batch_size", "train.log_interval"),
        *("train.validation_interval", "train.validation_samples"),
    )
    yield from at_least(config, 0, "train.term_norm_interval", "train.max_skipped_steps", "train.spike_threshold")
    yield from at_least(config, 1, "debug.replay_step")
    if config.train.peak_tflops is not None and config.train.peak_tflops <= 0:
        yield Problem(
            "train.peak_tflops",
            f"{config.train.peak_tflops} must be greater than 0",
            "give what the device's maker says, as in train.peak_tflops=989, or null",
        )
    log_interval, term_norm_interval = config.train.log_interval, config.train.term_norm_interval
    if log_interval >= 1 and term_norm_interval > 0 and term_norm_interval % log_interval:
        yield Problem(
            "train.term_norm_interval",
            f"{term_norm_interval} is no multiple of train.log_interval={log_interval}: some norms would go unseen",
            f"use train.term_norm_interval={multiple_of(term_norm_interval, log_interval)}",
        )


def _optim(config: Config) -> Iterable[Problem]:
    for key, value in (("optim.beta1", config.optim.beta1), ("optim.beta2", config.optim.beta2)):
        if not 0 <= value < 1 and math.isfinite(value):
            yield Problem(key, f"{value} is not in [0, 1)", f"use {key}={schema_default(key)}")
    yield from above_zero(config, "optim.eps")
    yield from at_least(config, 0, "optim.weight_decay", "optim.clip_grad")


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
        yield from above_zero(config, "parallel.memory_gb")
    yield from at_least(config, 1, "machine.gpus_per_node")
    yield from at_least(config, 0, "machine.reserved_gb", "machine.fragmentation", "machine.split_cost")
    rates = ("peak_tflops", "mfu", "nvlink_gb_per_s", "network_gb_per_s", "hbm_gb_per_s")
    yield from above_zero(config, *(f"machine.{name}" for name in rates))
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
        yield from at_least(config, 0, f"{key}.diffusion_loss_weight", f"{key}.ar_loss_weight")
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
        yield from at_least(config, 0, f"{key}.chat_validation_samples")
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
            yield from at_least(config, 1, f"{key}.{field}")
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
        yield from at_least(config, 1, f"{key}.tokens")
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
    yield from at_least(config, 0, "checkpoint.interval_steps", "checkpoint.interval_seconds")
    yield from at_least(config, 0, "checkpoint.keep_interval", "checkpoint.keep_best", "train.stall_timeout")
    yield from above_zero(config, "train.stop_timeout")
    yield from at_least(config, 1, "checkpoint.keep_last", "export.max_new_tokens")
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


# Launch and machine --------------------------------------------------------------------------------------------------


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
