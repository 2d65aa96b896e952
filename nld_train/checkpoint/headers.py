"""What a Hugging Face folder's JSON files and safetensors headers say, read by hand: no torch, no weights."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import inf, prod
from pathlib import Path
from typing import Any

from nld_train.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MISTRAL3 = "Mistral3ForConditionalGeneration"
_HEADER_LIMIT = 100_000_000  # bytes; that of the safetensors format
_ITEM_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "I64": 64, "I32": 32}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One entry of a safetensors header.

    Args:
        file: name inside the folder.
        dtype: in safetensors' words ("BF16").
        shape: of the tensor.
        num_bytes: of its data.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or an error that names it."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(str(path), "not found", "name a complete Hugging Face folder") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            str(path), f"is not readable JSON: {error}", "download or export the folder again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(str(path), f"holds a {type(value).__name__}, not an object", "download the folder again")
    return value


def need(config: Mapping[str, Any], key: str, path: Path) -> Any:
    """``config[key]``, or an error that names the file."""
    if key not in config:
        raise CheckpointError(str(path), f"lacks {key!r}", "the folder is not of a supported form; see docs")
    return config[key]


def check_numbers(section: Any, path: Path) -> None:
    """Whole numbers of a section (a dataclass) that was read from ``path`` are above 0, its others at least 0.

    Raises:
        CheckpointError: names the first that is not.
    """
    for field in fields(section):
        if field.type not in (int, float):
            continue
        value = getattr(section, field.name)
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if field.type is int and not (is_whole and value > 0):
            expected = "a whole number above 0"
        elif field.type is float and not ((is_whole or isinstance(value, float)) and 0 <= value < inf):
            expected = "a number of at least 0"
        else:
            continue
        raise CheckpointError(
            str(path), f"{field.name} of the model is {value!r}, expected {expected}", "use an undamaged folder"
        )


def text_config(config: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The language model's part of a ``config.json``: ``text_config`` of the vision-language form, else all of it.

    The vision-language form's own ``tie_word_embeddings`` is a default that nobody set; only ``text_config`` counts.
    """
    if MISTRAL3 not in (config.get("architectures") or []):
        return config
    part = need(config, "text_config", path)
    if not isinstance(part, dict):
        raise CheckpointError(str(path), f"text_config is {part!r}, expected an object", "download the folder again")
    return part


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors that one safetensors file announces; a file shorter or longer than that is refused.

    Raises:
        CheckpointError: names the file and what is wrong.
    """

    def refuse(reason: str) -> CheckpointError:
        return CheckpointError(
            str(path), f"is not a readable safetensors file: {reason}", "download or export it again"
        )

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_HEADER_LIMIT, size - 8):
                raise refuse(f"it has {size} bytes, its header announces {length} bytes of header")
            raw = json.loads(file.read(length))
        raw.pop("__metadata__", None)
        tensors = {}
        for name, entry in raw.items():
            start, end = entry["data_offsets"]
            tensors[name] = StoredTensor(path.name, entry["dtype"], tuple(entry["shape"]), end - start)
        data_bytes = max((entry["data_offsets"][1] for entry in raw.values()), default=0)
    except OSError as error:
        raise refuse(str(error)) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise refuse(f"its header is damaged ({error})") from error
    if 8 + length + data_bytes != size:
        raise refuse(f"it has {size} bytes, expected {8 + length + data_bytes} from its header")
    for name, tensor in tensors.items():
        bits = _ITEM_BITS.get(tensor.dtype)
        if bits is not None and prod(tensor.shape) * bits != tensor.num_bytes * 8:
            raise refuse(f"tensor {name} has {tensor.num_bytes} bytes, expected {prod(tensor.shape) * bits // 8}")
    return tensors


def locate_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder, single file or sharded, in the order of the files.

    Raises:
        CheckpointError: a file is missing or damaged, or index and files do not agree.
    """
    index = folder / INDEX_FILE
    if not index.exists():
        single = folder / SINGLE_FILE
        if not single.exists():
            raise CheckpointError(
                str(single), f"not found, and no {INDEX_FILE} either", "name a folder with safetensors weights"
            )
        return read_header(single)
    weight_map = need(read_json(index), "weight_map", index)
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(str(index), "weight_map is not an object of file names", "download it again")
    found: dict[str, StoredTensor] = {}
    for file_name in sorted(set(weight_map.values())):
        path = folder / file_name
        if os.path.basename(file_name) != file_name or not path.exists():
            raise CheckpointError(str(path), f"missing, but named in {INDEX_FILE}", "download it again")
        for name, tensor in read_header(path).items():
            if weight_map.get(name) != file_name:
                raise CheckpointError(
                    str(path),
                    f"holds tensor {name}, which {INDEX_FILE} places in {weight_map.get(name)}",
                    "index and files do not belong together; download the folder again",
                )
            found[name] = tensor
    for name, file_name in weight_map.items():
        if name not in found:
            raise CheckpointError(
                str(folder / file_name),
                f"tensor {name} is missing, but {INDEX_FILE} places it there",
                "download or export it again",
            )
    return found
