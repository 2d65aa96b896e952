"""What a folder is, from its JSON files and safetensors headers alone: no torch, no weights, done in a moment."""

import json
from math import prod
from pathlib import Path
from typing import Any

from nld_train.checkpoint.headers import INDEX_FILE, SINGLE_FILE, locate_tensors, read_json, text_config
from nld_train.errors import CheckpointError

# The same names as in checkpoint.manager, which imports Megatron.
_INFO_FILE = "checkpoint.json"
_INCOMPLETE = ".incomplete_"
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_KINDS = {
    "Ministral3ForCausalLM": "Hugging Face folder, text form (Ministral3)",
    "Mistral3ForConditionalGeneration": "Hugging Face folder, vision-language form (Mistral3)",
    "NemotronLabsDiffusionModel": "Hugging Face folder, NLD form",
}

Facts = dict[str, str]
"""Name -> value, in the order in which they are shown."""


def inspect_folder(folder: Path) -> Facts:
    """Say what a folder is: form, sizes, dtype, parallel layout, step, tokens, stage.

    Raises:
        CheckpointError: it is none of the known forms, not finished, or damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(str(folder), "is no folder", "name a run, a checkpoint or a Hugging Face folder")
    if folder.resolve().name.startswith(_INCOMPLETE):
        raise CheckpointError(str(folder), "is what an interrupted conversion or save left", "remove it")
    if (folder / _INFO_FILE).exists():
        return _checkpoint(folder)
    if (folder / "checkpoints").is_dir():
        return _run(folder)
    if (folder / "config.json").exists():
        return _hugging_face(folder)
    raise CheckpointError(
        str(folder),
        f"holds no {_INFO_FILE}, no checkpoints/ and no config.json",
        "name a run, a checkpoint or a Hugging Face folder",
    )


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}" if unit != "bytes" else f"{num_bytes} bytes"
        num_bytes /= 1000
    return f"{num_bytes:.2f} GB"


def _checkpoint(folder: Path) -> Facts:
    path = folder / _INFO_FILE
    info = read_json(path)
    try:
        model, parallel = info["model"], info["parallel"]
        layers, hidden = model["num_layers"], model["hidden_size"]
        heads = 2 * (model["num_attention_heads"] + model["num_key_value_heads"]) * model["head_dim"]
        per_layer = heads * hidden + 3 * hidden * model["ffn_hidden_size"] + 2 * hidden
        parameters = layers * per_layer + (2 * model["vocab_size"] + 1) * hidden
        layout = ", ".join(f"{key.removesuffix('_parallel_size')} {value}" for key, value in parallel.items())
        files = list(folder.glob("*.distcp"))
        weights = parameters * _ITEM_BYTES.get(info["dtype"], 0)
        on_disk = sum(file.stat().st_size for file in files)
        # Adam's state is at least twice as large as the weights.
        optimizer = "with" if on_disk > 2 * weights else "without"
        return {
            "form": "Megatron checkpoint" + ("" if info["config"] else " of imported weights"),
            "model": _shape(model),
            "parameters": _number(parameters),
            "tensors": f"{6 * layers + 3} parameters",
            "dtype": str(info["dtype"]),
            "weights": _size(weights),
            "files": f"{len(files)}, {_size(on_disk)}, {optimizer} optimizer state",
            "written by": layout or "one process (loads at every layout)",
            "step": _number(info["step"]),
            "tokens seen": _number(info["tokens"]),
            "stage": info["stage"] or "unknown",
            "tokenizer": info["tokenizer"] or "none",
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            str(path), f"lacks or misuses {error}", "use another checkpoint, or the version that wrote it"
        ) from error


def _shape(model: dict[str, Any]) -> str:
    return (
        f"{model['num_layers']} layers, hidden {model['hidden_size']}, ffn {model['ffn_hidden_size']}, heads "
        f"{model['num_attention_heads']}/{model['num_key_value_heads']} of {model['head_dim']}, vocabulary "
        f"{model['vocab_size']}"
    )


def _run(folder: Path) -> Facts:
    steps = sorted(
        path for path in (folder / "checkpoints").glob("step_*") if path.name.removeprefix("step_").isdigit()
    )
    facts = {
        "form": "run folder",
        "checkpoints": ", ".join(path.name for path in steps) or "none",
        "export": "hf" if (folder / "hf" / "config.json").exists() else "none",
    }
    if not steps:
        return facts
    latest = _checkpoint(steps[-1])
    return facts | {"latest checkpoint": str(steps[-1])} | {k: v for k, v in latest.items() if k != "form"}


def _hugging_face(folder: Path) -> Facts:
    path = folder / "config.json"
    config = read_json(path)
    architectures = config.get("architectures") or []
    known = [name for name in architectures if name in _KINDS]
    if not known:
        raise CheckpointError(
            str(path), f"architectures is {architectures}, expected one of {sorted(_KINDS)}", "inspect another folder"
        )
    text = text_config(config, path)
    try:
        shape = _shape(
            {
                "num_layers": text["num_hidden_layers"],
                "hidden_size": text["hidden_size"],
                "ffn_hidden_size": text["intermediate_size"],
                "num_attention_heads": text["num_attention_heads"],
                "num_key_value_heads": text["num_key_value_heads"],
                "head_dim": text["head_dim"],
                "vocab_size": text["vocab_size"],
            }
        )
    except KeyError as error:
        raise CheckpointError(str(path), f"lacks {error}", "download or export the folder again") from error
    tensors = locate_tensors(folder)
    dtypes = sorted({tensor.dtype for tensor in tensors.values()})
    quantization = config.get("quantization_config") or text.get("quantization_config")
    has_tokenizer = any((folder / name).exists() for name in ("tokenizer.json", "tekken.json"))
    return {
        "form": _KINDS[known[0]],
        "model": shape,
        "parameters": _number(sum(prod(tensor.shape) for name, tensor in tensors.items() if name.endswith("weight"))),
        "tensors": _number(len(tensors)),
        "dtype": ", ".join(dtypes) + (f" ({quantization.get('quant_method')})" if quantization else ""),
        "weights": _size(sum(tensor.num_bytes for tensor in tensors.values())),
        "files": _number(len({tensor.file for tensor in tensors.values()})),
        "head": "tied to the embedding" if text.get("tie_word_embeddings", False) else "of its own",
        "step": _exported_step(folder),
        "tokens seen": "see README.md" if (folder / "README.md").exists() else "unknown",
        "tokenizer": "included" if has_tokenizer else "none",
    }


def _exported_step(folder: Path) -> str:
    """The step that an export's safetensors header carries."""
    names = [SINGLE_FILE]
    if (folder / INDEX_FILE).exists():
        names = sorted(set(read_json(folder / INDEX_FILE)["weight_map"].values()))
    with (folder / names[0]).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return str((header.get("__metadata__") or {}).get("nld_train_step", "unknown"))
