"""Is a Megatron checkpoint the same model as a Hugging Face folder? Every tensor, then the logits."""

import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, Ministral3Config, Ministral3ForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging as transformers_logging

from nld_train.checkpoint.convert import Notify, Progress, hf_parts, warn
from nld_train.checkpoint.headers import text_config
from nld_train.checkpoint.hf_folder import HFFolder
from nld_train.checkpoint.manager import read_info
from nld_train.checkpoint.streaming import StoredParameters
from nld_train.checkpoint.weight_map import MINISTRAL3_FORM, WeightRule, weight_rules
from nld_train.config.schema import Device, ModelConfig, ParallelConfig
from nld_train.errors import CheckpointError
from nld_train.model.build import build_model
from nld_train.objective.sequence import SequenceLayout
from nld_train.platform.device import initialize_device
from nld_train.platform.topology import topology_of

LOGITS_TOLERANCE = 1e-4  # relative, of whole sequences in float32
_TEXTS = ("heapq.py", "textwrap.py", "bisect.py")  # of the interpreter's standard library
_LENGTH = 128  # tokens of a sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the report.

    Args:
        what: a parameter (over all layers, or the one that differs) or a sequence.
        compared: how much was.
        difference: largest absolute one of the weights; relative one of the logits.
        is_equal: within what is allowed.
    """

    what: str
    compared: str
    difference: float
    is_equal: bool


def verify_checkpoint(
    checkpoint: Path,
    folder: Path,
    *,
    with_logits: bool = True,
    progress: Progress | None = None,
    notify: Notify = warn,
) -> list[Row]:
    """Compare a checkpoint with a folder: every tensor, one at a time, then the logits of a few sequences.

    Tensors must be equal bit for bit; where the dtypes differ, after rounding the wider to the narrower. The logits are
    computed in float32 on the CPU, by Megatron's model from the checkpoint and by transformers (the folder's own code
    for the NLD form) from the folder: both models are then in memory, the rest needs that of one tensor.

    Raises:
        CheckpointError: one of the two cannot be read, or they describe models of different shapes.
    """
    info = read_info(checkpoint)
    stored = StoredParameters(checkpoint)
    rows: dict[str, Row] = {}
    with HFFolder(folder) as source:
        _check_same_shape(info.model, source.model, checkpoint, folder)
        rules = list(weight_rules(info.model))
        source.check(rules)
        for note in source.notes:
            notify(note)
        total = sum(torch.Size(shape).numel() for rule in rules for shape in rule.shapes)
        done = 0
        for rule in rules:
            ours = rule.split(stored.tensor(rule.megatron, rule.shape))
            for name, left, right in zip(rule.hf_names(source.form), ours, hf_parts(source, rule), strict=True):
                _add(rows, name, _compare(name, left, right))
                done += left.numel()
                if progress is not None:
                    progress(done, total)
        if not with_logits:
            return list(rows.values())
        sequences = _sequences(checkpoint, folder, info.tokenizer, info.model, notify)
        expected = _transformers_logits(source, rules, sequences)
    # Last: on a CPU, Megatron's model changes what CUDA names mean for the rest of the process.
    found = _megatron_logits(checkpoint, info.model, sequences)
    for (what, tokens), ours_, theirs in zip(sequences.items(), found, expected, strict=True):
        difference = ((ours_ - theirs).norm() / theirs.norm()).item()
        rows[what] = Row(
            what=f"logits of {what}",
            compared=f"{tokens.shape[1]} tokens",
            difference=difference,
            is_equal=difference < LOGITS_TOLERANCE,
        )
    return list(rows.values())


def _check_same_shape(ours: ModelConfig, theirs: ModelConfig, checkpoint: Path, folder: Path) -> None:
    free = ("attention_backend", "compile_pointwise", "layer_spec", "initializer_range")
    keys = [field.name for field in fields(ModelConfig) if field.name not in free]
    different = [
        f"{key} is {getattr(ours, key)} and {getattr(theirs, key)}"
        for key in keys
        if getattr(ours, key) != getattr(theirs, key)
    ]
    if different:
        raise CheckpointError(
            str(checkpoint),
            f"is of another model than {folder}/config.json: {'; '.join(different)}",
            "compare a checkpoint with the folder it came from or became",
        )


def _compare(name: str, left: Tensor, right: Tensor) -> Row:
    """``left`` and ``right`` at the coarser of their dtypes: rounding one of them must give the other."""
    is_equal = torch.equal(left.to(right.dtype), right) or torch.equal(left, right.to(left.dtype))
    difference = 0.0
    if not is_equal:
        difference = (left.float() - right.float()).abs().max().item()
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in (left, right)}
    return Row(
        what=name, compared=f"{left.numel():,} x {' and '.join(sorted(dtypes))}", difference=difference,
        is_equal=is_equal,
    )  # fmt: skip


def _add(rows: dict[str, Row], name: str, row: Row) -> None:
    """Equal tensors of all layers share a line; one that differs gets its own."""
    if not row.is_equal:
        rows[name] = row
        return
    parts = name.split(".")
    if "layers" in parts:
        parts[parts.index("layers") + 1] = "*"
    key = ".".join(parts)
    count = int(rows[key].compared.split()[0]) + 1 if key in rows else 1
    size = row.compared if count == 1 else f"tensors of {row.compared}"
    rows[key] = Row(
        what=key,
        compared=f"{count} {'tensor of ' if count == 1 else ''}{size}",
        difference=0.0,
        is_equal=True,
    )


def _sequences(checkpoint: Path, folder: Path, tokenizer: str, model: ModelConfig, notify: Notify) -> dict[str, Tensor]:
    """Name -> tokens int64 [1, L]: source text of this interpreter, or random ids where there is no tokenizer."""
    for place in (folder, checkpoint / tokenizer if tokenizer else None):
        if place is None or not (place / "tokenizer.json").exists():
            continue
        library = Path(sysconfig.get_paths()["stdlib"])
        encode = AutoTokenizer.from_pretrained(str(place), local_files_only=True)
        ids = {name: encode((library / name).read_text()).input_ids[:_LENGTH] for name in _TEXTS}
        largest = max(max(row) for row in ids.values())
        if largest < model.vocab_size:
            return {name: torch.tensor([row]) for name, row in ids.items()}
        notify(f"{place}: the tokenizer gives id {largest}, the vocabulary has {model.vocab_size} entries")
        break
    notify("no usable tokenizer: the logits are compared on random ids")
    generator = torch.Generator().manual_seed(0)
    return {
        f"random ids {number}": torch.randint(model.vocab_size, (1, _LENGTH), generator=generator)
        for number in range(1, 4)
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers."""
    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()


@torch.no_grad()
def _transformers_logits(source: HFFolder, rules: list[WeightRule], sequences: dict[str, Tensor]) -> list[Tensor]:
    """Logits [1, L, V] in float32: the folder's own code, or transformers' Ministral3 with the folder's weights."""
    if source.architecture == "NemotronLabsDiffusionModel":
        try:
            with _quiet():
                model_class: Any = get_class_from_dynamic_module(
                    source.config["auto_map"]["AutoModel"], source.folder, local_files_only=True
                )
                model = model_class.from_pretrained(source.folder, local_files_only=True, dtype=torch.float32).eval()
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                str(source.folder),
                f"its own code does not load it: {type(error).__name__}: {error}",
                "export the folder again, or compare tensors only (--no-logits)",
            ) from error
        return [model(input_ids=tokens).logits for tokens in sequences.values()]
    # Not from_pretrained: it reads FP8 on some GPUs only. A tied head is a copy here.
    text = dict(text_config(source.config, source.folder / "config.json"))
    text.pop("quantization_config", None)
    config = Ministral3Config.from_dict(text | {"tie_word_embeddings": False, "dtype": "float32"})
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        reference: Any = Ministral3ForCausalLM(config)
    rotary = type(reference.model.rotary_emb)(config=config)
    reference = reference.to_empty(device="cpu").float().eval()
    reference.model.rotary_emb = rotary  # its buffers are computed, not loaded
    parameters = dict(reference.named_parameters())
    for rule in rules:
        for name, part in zip(rule.hf_names(MINISTRAL3_FORM), hf_parts(source, rule), strict=True):
            parameters.pop(name).copy_(part)
    if parameters:
        raise CheckpointError(
            str(source.folder), f"transformers' model has more parameters: {sorted(parameters)[:3]}", "report it"
        )
    return [reference(input_ids=tokens, use_cache=False).logits for tokens in sequences.values()]


@torch.no_grad()
def _megatron_logits(checkpoint: Path, config: ModelConfig, sequences: dict[str, Tensor]) -> list[Tensor]:
    """Logits [1, L, V] in float32 of the training model with the checkpoint's weights."""
    platform = initialize_device(Device.cpu)
    stored = StoredParameters(checkpoint)
    with topology_of(ParallelConfig(), platform, seed=0):
        model = build_model(config, ParallelConfig(), dtype=torch.float32, device=platform.device, seed=0)
        for name, parameter in model.named_parameters():
            parameter.copy_(stored.tensor(name, tuple(parameter.shape)))
        return [
            model(tokens, SequenceLayout(tokens.shape[1], 1, has_noisy_half=False)).contiguous()
            for tokens in sequences.values()
        ]
