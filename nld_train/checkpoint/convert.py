"""Conversion between Megatron checkpoints and Hugging Face folders, both through :mod:`.weight_map`."""

import glob
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nld_train.checkpoint.checksums import Checksum, write_checksums
from nld_train.checkpoint.hf_folder import HFFolder, write_safetensors_stream
from nld_train.checkpoint.manager import INFO_FILE, CheckpointInfo, read_info, sync_path, write_info
from nld_train.checkpoint.streaming import StoredParameters, write_parameters
from nld_train.checkpoint.weight_map import NLD_FORM, WeightRule, weight_rules
from nld_train.config.schema import ModelConfig, RopeConfig
from nld_train.errors import CheckpointError, ConfigError, Problem
from nld_train.model.build import NLDModel, global_parameter_name, tensor_parallel_slice

HF_REPO = Path(__file__).parent / "hf_repo"
_CONFIGURATION_MODULE = "configuration_nemotron_labs_diffusion"
_MODELING_MODULE = "modeling_nemotron_labs_diffusion"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tekken.json",
)

_SHAPE_KEYS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
)

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}

_STEP_METADATA = "nld_train_step"
_INCOMPLETE = ".incomplete_"

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

Notify = Callable[[str], None]
"""Called with what the user should know and no error says."""


def warn(text: str) -> None:
    """The default of ``notify``."""
    warnings.warn(text, stacklevel=3)


def hf_config(info: CheckpointInfo, dtype: torch.dtype) -> dict[str, Any]:
    """``config.json`` of the exported folder, with the rope fields the weights were trained with."""
    model, rope = info.model, info.model.rope
    objective = info.config.get("objective", {})
    stage = info.config.get("stages", {}).get(info.stage, {})
    return {
        "architectures": ["NemotronLabsDiffusionModel"],
        "model_type": "nemotron_labs_diffusion",
        "auto_map": {
            "AutoConfig": f"{_CONFIGURATION_MODULE}.NemotronLabsDiffusionConfig",
            "AutoModel": f"{_MODELING_MODULE}.NemotronLabsDiffusionModel",
            "AutoModelForCausalLM": f"{_MODELING_MODULE}.NemotronLabsDiffusionModel",
        },
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": model.initializer_range,
        "rms_norm_eps": model.rms_norm_eps,
        "attention_dropout": 0.0,
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
        "use_cache": True,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,  # Ministral3's default would freeze that row of the embedding in further training
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": rope.rope_theta,
            "factor": rope.factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
            "max_position_embeddings": model.max_position_embeddings,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "mscale": rope.mscale,
            "mscale_all_dim": rope.mscale_all_dim,
            "llama_4_scaling_beta": rope.llama_4_scaling_beta,
        },
        "mask_token_id": objective.get("mask_token_id", 100),
        "block_size": objective.get("block_size", 32),
        "dlm_paradigm": "bidirectional",
        "dlm_loss_weight": objective.get("diffusion_loss_weight", 0.3),
        "ar_loss_weight": stage.get("ar_loss_weight", 1.0),
        "dp_varying_mask_ratio": not objective.get("shared_noise_level", False),
    }


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    tokenizer: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    notify: Notify = warn,
) -> Path:
    """Write a Hugging Face folder of the NLD form from a training checkpoint of any parallel layout.

    One process, one tensor in memory at a time; the folder appears under its name only when it is complete.

    Args:
        checkpoint: ``checkpoints/step_*`` of a run.
        out: the folder to write.
        dtype: of the written tensors; None: as stored.
        max_shard_bytes: upper limit of one safetensors file.
        tokenizer: folder whose tokenizer files are copied; None: the one the run was trained with.
        overwrite: replace ``out`` where it exists.
        progress: called with (bytes done, bytes in all).
        notify: told what the folder will lack; None of it stops the export.

    Raises:
        CheckpointError: the checkpoint is not complete or ``out`` exists.
    """
    info = read_info(checkpoint)
    _check_target(out, overwrite, f"{_MODELING_MODULE}.py", "exported folder")
    source = tokenizer or (Path(os.path.normpath(checkpoint / info.tokenizer)) if info.tokenizer else None)
    tokenizer_files = _tokenizer_files(source) if source is not None else []
    if not tokenizer_files:
        notify(f"{checkpoint} has no tokenizer: the export has none either, until you name one with --tokenizer")
    if not info.config:
        notify(
            f"{checkpoint} has no run's history (imported weights): mask_token_id, block_size and the loss weight in "
            "config.json are the recipe's defaults, and the model card says what is unknown"
        )
    elif not info.step:
        notify(f"{checkpoint} has no run's history (imported weights): the model card says what is unknown")
    if info.dtype not in _DTYPES:
        raise CheckpointError(
            str(checkpoint / INFO_FILE),
            f"dtype is {info.dtype!r}, expected one of {sorted(_DTYPES)}",
            "train in one of them",
        )
    dtype = dtype or _DTYPES[info.dtype]
    rules = list(weight_rules(info.model))
    shapes = {name: shape for rule in rules for name, shape in zip(rule.hf_names(NLD_FORM), rule.shapes, strict=True)}
    stored = StoredParameters(checkpoint)
    total = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for rule in rules:
            parts = rule.split(stored.tensor(rule.megatron, rule.shape))
            for name, part in zip(rule.hf_names(NLD_FORM), parts, strict=True):
                yield name, part.to(dtype)

    with _whole_or_absent(out) as temporary:
        done = 0
        for num_bytes in write_safetensors_stream(
            temporary,
            shapes,
            tensors(),
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            metadata={_STEP_METADATA: str(info.step)},
        ):
            done += num_bytes
            if progress is not None:
                progress(done, total)
        config = hf_config(info, dtype)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        generation = {
            "bos_token_id": config["bos_token_id"],
            "eos_token_id": config["eos_token_id"],
            "do_sample": False,
        }
        (temporary / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        for module in (_CONFIGURATION_MODULE, _MODELING_MODULE):
            shutil.copyfile(HF_REPO / f"{module}.py", temporary / f"{module}.py")
        for file in tokenizer_files:
            shutil.copyfile(file, temporary / file.name)
        (temporary / "README.md").write_text(_model_card(info, dtype, has_tokenizer=bool(tokenizer_files)))
    return out


def import_checkpoint(
    folder: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    notify: Notify = warn,
) -> Path:
    """Write a Megatron checkpoint, loadable at every parallel layout, from a Hugging Face folder.

    One process, one parameter in memory at a time; the folder appears under its name only when it is complete. Its
    step is 0 and it has no run's configuration (the NLD form knows its mask token and block size, which are kept); the
    tokenizer's files are copied into it.

    Args:
        folder: of a form that :class:`HFFolder` reads.
        out: the checkpoint to write.
        dtype: of the written parameters; None: as stored (FP8: bfloat16).
        overwrite: replace ``out`` where it exists.
        progress: called with (bytes done, bytes in all).
        notify: told which tensors of the folder are left out.

    Raises:
        CheckpointError: the folder cannot be used, or ``out`` exists.
    """
    _check_target(out, overwrite, INFO_FILE, "checkpoint")
    with HFFolder(folder) as source:
        rules = list(weight_rules(source.model))
        source.check(rules)
        for note in source.notes:
            notify(note)
        chosen = dtype or source.dtype
        tokenizer_files = [folder / name for name in _TOKENIZER_FILES if (folder / name).exists()]
        info = CheckpointInfo(
            step=0,
            tokens=0,
            stage="",
            samples=0,
            dtype=str(chosen).removeprefix("torch."),
            model=source.model,
            parallel={},
            config=_objective(source),
            metrics={},
            tokenizer="tokenizer" if tokenizer_files else "",
        )
        total = sum(torch.Size(shape).numel() for rule in rules for shape in rule.shapes) * chosen.itemsize

        def parameters() -> Iterator[tuple[str, Tensor]]:
            for rule in rules:
                yield rule.megatron, rule.join(hf_parts(source, rule)).to(chosen)

        with _whole_or_absent(out) as temporary:
            if tokenizer_files:
                (temporary / "tokenizer").mkdir()
                for file in tokenizer_files:
                    shutil.copyfile(file, temporary / "tokenizer" / file.name)
            done = 0
            checksums: dict[str, Checksum] = {}
            for num_bytes in write_parameters(temporary, parameters(), source.model.num_layers, checksums):
                done += num_bytes
                if progress is not None:
                    progress(done, total)
            write_info(temporary, info)
            for path in [temporary / INFO_FILE, *temporary.glob("tokenizer/*")]:
                checksums[str(path.relative_to(temporary))] = Checksum.of(path)
            write_checksums(temporary, checksums)
    return out


def _objective(source: HFFolder) -> dict[str, Any]:
    """What the NLD form says of how the weights were trained; {} for the others."""
    if source.architecture != "NemotronLabsDiffusionModel":
        return {}
    keys = {
        "mask_token_id": "mask_token_id",
        "block_size": "block_size",
        "diffusion_loss_weight": "dlm_loss_weight",
    }
    known = {ours: source.config[theirs] for ours, theirs in keys.items() if theirs in source.config}
    return {"objective": known} if known else {}


def hf_parts(source: HFFolder, rule: WeightRule) -> tuple[Tensor, ...]:
    """The folder's tensors that make up one parameter."""
    names = rule.hf_names(source.form)
    return tuple(source.tensor(name, shape) for name, shape in zip(names, rule.shapes, strict=True))


@contextmanager
def _whole_or_absent(out: Path) -> Iterator[Path]:
    """A folder under a temporary name; synced and renamed to ``out`` at the end, removed where anything fails.

    Raises:
        CheckpointError: in place of an OSError.
    """
    out = out.resolve()  # of a link, the folder it names is replaced
    # A name of its own each time: two conversions to one folder must not write into the same files.
    temporary = out.parent / f"{_INCOMPLETE}{out.name}_{secrets.token_hex(4)}"
    try:
        for leftover in out.parent.glob(f"{_INCOMPLETE}{glob.escape(out.name)}_{'?' * 8}"):
            shutil.rmtree(leftover, ignore_errors=True)  # of a conversion that was killed
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            sync_path(path)
        _replace(temporary, out)
    except OSError as error:
        raise CheckpointError(str(out), f"cannot be written: {error}", "free space or name another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def exported_step(folder: Path) -> int | None:
    """Step of the checkpoint that a folder was exported from; None where there is no such export."""
    for path in sorted(folder.glob("*.safetensors"))[:1]:
        try:
            with safe_open(str(path), framework="pt") as file:
                step = (file.metadata() or {}).get(_STEP_METADATA)
        except SafetensorError:  # damaged: as good as none
            return None
        return int(step) if step is not None else None
    return None


def _check_target(out: Path, overwrite: bool, marker: str, kind: str) -> None:
    """An existing folder is replaced only when that was asked for, and only if it is of the same kind or empty."""
    if not out.exists():
        return
    if not overwrite:
        raise CheckpointError(str(out), "exists already", "name another folder or pass --overwrite")
    is_same = out.is_dir() and (out / marker).exists()
    if not is_same and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(str(out), f"exists and is no {kind}", "name another folder, or remove it yourself")


def _tokenizer_files(source: Path) -> list[Path]:
    found = [source / name for name in _TOKENIZER_FILES if (source / name).exists()]
    if not found:
        raise CheckpointError(str(source), "holds no tokenizer files", "name a tokenizer folder with --tokenizer")
    return found


def _replace(temporary: Path, out: Path) -> None:
    """Rename onto ``out``; an older folder there is moved aside first and removed last."""
    old = out.parent / f".old_{out.name}"
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    temporary.rename(out)
    sync_path(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _model_card(info: CheckpointInfo, dtype: torch.dtype, *, has_tokenizer: bool) -> str:
    """README.md of the folder: what was trained, on how much, with which losses."""
    objective = info.config.get("objective")
    lines = [
        "---",
        "library_name: transformers",
        "tags: [nemotron_labs_diffusion, diffusion-language-model]",
        "---",
        "# Joint autoregressive and diffusion language model",
        "",
        f"- parameters stored as {str(dtype).removeprefix('torch.')}; {info.model.num_layers} layers, hidden size "
        f"{info.model.hidden_size}, vocabulary {info.model.vocab_size}",
        f"- optimizer steps: {info.step}; clean tokens: {info.tokens}; last stage: {info.stage or 'unknown'}",
        f"- last metrics: `{json.dumps(info.metrics)}`" if info.metrics else "- losses: unknown (no run's history)",
        f"- objective: `{json.dumps(objective)}`" if objective else "- objective: unknown (no run's history)",
    ]
    if not has_tokenizer:
        lines.append("- no tokenizer is included")
    lines += [
        "",
        "```python",
        "from transformers import AutoModel, AutoTokenizer",
        "",
        'model = AutoModel.from_pretrained("this folder", trust_remote_code=True)',
        'tokenizer = AutoTokenizer.from_pretrained("this folder", trust_remote_code=True)',
        'prompt_ids = tokenizer("def main(", return_tensors="pt").input_ids',
        "output_ids, num_forwards = model.linear_spec_generate(prompt_ids, max_new_tokens=64)",
        "output_ids, num_forwards = model.quadratic_spec_generate(prompt_ids, max_new_tokens=64)",
        "```",
        "",
        "`ar_generate`, `generate` (diffusion) and both kinds of speculation return the output ids with the prompt and",
        "the number of forward evaluations.",
    ]
    if info.config:
        lines += ["", "## Configuration of the run", "", "```json", json.dumps(info.config, indent=2), "```"]
    return "\n".join(lines) + "\n"


def check_same_model(folder: HFFolder, model: ModelConfig) -> None:
    """The configured model must be the folder's: every difference is reported.

    Raises:
        ConfigError: some ``model.*`` value differs from the folder's config.json.
    """
    problems = []
    pairs = [(key, getattr(model, key), getattr(folder.model, key)) for key in _SHAPE_KEYS]
    pairs += [
        (f"rope.{field.name}", getattr(model.rope, field.name), getattr(folder.model.rope, field.name))
        for field in fields(RopeConfig)
    ]
    for key, ours, theirs in pairs:
        if ours != theirs:
            problems.append(
                Problem(
                    f"model.{key}",
                    f"is {ours}, but {folder.folder}/config.json has {theirs}",
                    f"use model.{key}={theirs}",
                )
            )
    if problems:
        raise ConfigError(problems)


@torch.no_grad()
def load_hf_weights(models: Sequence[NLDModel], config: ModelConfig, folder: Path) -> None:
    """Initialise this rank's part of the model (its chunks) from a Hugging Face folder (``init.hf_path``).

    Every rank reads only the tensors of its own layers, one at a time. Norms, embedding and head take the model's
    dtype; a tied folder gives the head a copy of the embedding. Rank 0 warns about what is left out (a vision tower).
    """
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    rules = {rule.megatron: rule for rule in weight_rules(config)}
    with HFFolder(folder) as source:
        check_same_model(source, config)
        source.check(rules.values())
        if dist.get_rank() == 0:
            for note in source.notes:
                warn(note)
        for model in models:
            for local_name, parameter in model.named_parameters():
                name = global_parameter_name(model, local_name)
                whole = rules[name].join(hf_parts(source, rules[name]))
                parameter.copy_(tensor_parallel_slice(name, whole, rank, size))
