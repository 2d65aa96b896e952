"""Hugging Face folders: what form one has, its tensors one at a time, and writing one as a stream.

Nothing here holds more than one tensor: tensors are read through safetensors' memory map and written straight into the
shard file, whose header is known in advance because all shapes are.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nld_train.checkpoint.weight_map import MINISTRAL3_FORM, NLD_FORM
from nld_train.config.schema import ModelConfig, RopeConfig
from nld_train.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_SAFETENSORS_DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16"}
_TEXT_ARCHITECTURES = {"Ministral3ForCausalLM": MINISTRAL3_FORM, "NemotronLabsDiffusionModel": NLD_FORM}


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


def _need(config: Mapping[str, Any], key: str, path: Path) -> Any:
    if key not in config:
        raise CheckpointError(str(path), f"lacks {key!r}", "the folder is not of a supported form; see docs")
    return config[key]


def model_config_from_hf(config: Mapping[str, Any], path: Path) -> ModelConfig:
    """The model's shape from a text model's ``config.json``; every number is read, none assumed.

    Args:
        config: content of ``config.json``.
        path: of the file, for errors.
    """
    rope = _need(config, "rope_parameters", path)
    kind = rope.get("rope_type", rope.get("type"))
    if kind != "yarn":
        raise CheckpointError(
            str(path), f"rope_parameters.rope_type is {kind!r}, expected 'yarn'", "use a Ministral3 checkpoint"
        )
    if config.get("sliding_window") is not None:
        raise CheckpointError(
            str(path), f"sliding_window is {config['sliding_window']}, expected null", "use a Ministral3 checkpoint"
        )
    return ModelConfig(
        num_layers=_need(config, "num_hidden_layers", path),
        hidden_size=_need(config, "hidden_size", path),
        ffn_hidden_size=_need(config, "intermediate_size", path),
        num_attention_heads=_need(config, "num_attention_heads", path),
        num_key_value_heads=_need(config, "num_key_value_heads", path),
        head_dim=_need(config, "head_dim", path),
        vocab_size=_need(config, "vocab_size", path),
        max_position_embeddings=_need(config, "max_position_embeddings", path),
        rms_norm_eps=_need(config, "rms_norm_eps", path),
        initializer_range=config.get("initializer_range", 0.02),
        rope=RopeConfig(**{field.name: _need(rope, field.name, path) for field in fields(RopeConfig)}),
    )


class HFFolder:
    """A Hugging Face folder of a supported form, opened for reading; use as a context manager.

    Attributes:
        form: tensor-name prefixes (:mod:`nld_train.checkpoint.weight_map`).
        model: the model's shape.
        is_tied: the head shares the embedding and is not stored.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config_path = folder / "config.json"
        self.config = read_json(config_path)
        architectures = self.config.get("architectures") or []
        known = [name for name in architectures if name in _TEXT_ARCHITECTURES]
        if not known:
            raise CheckpointError(
                str(config_path),
                f"architectures is {architectures}, expected one of {sorted(_TEXT_ARCHITECTURES)}",
                "use a Ministral3 text checkpoint or an exported NLD folder",
            )
        self.form: Mapping[str, str] = _TEXT_ARCHITECTURES[known[0]]
        self.model = model_config_from_hf(self.config, config_path)
        self.is_tied = bool(self.config.get("tie_word_embeddings", False))
        if self.config.get("quantization_config") is not None:
            raise CheckpointError(
                str(config_path),
                f"quantization_config is {self.config['quantization_config']}: quantised weights cannot be read",
                "use the BF16 release of the model (the base one)",
            )
        self._files = self._locate()
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}

    def _locate(self) -> dict[str, str]:
        """Tensor name -> file name."""
        index = self.folder / INDEX_FILE
        if index.exists():
            weight_map: dict[str, str] = _need(read_json(index), "weight_map", index)
            for name in sorted(set(weight_map.values())):
                if not (self.folder / name).exists():
                    raise CheckpointError(
                        str(self.folder / name), f"missing, but named in {INDEX_FILE}", "download it again"
                    )
            return weight_map
        single = self.folder / SINGLE_FILE
        if not single.exists():
            raise CheckpointError(
                str(single), f"not found, and no {INDEX_FILE} either", "name a folder with safetensors weights"
            )
        with self._reader(single) as file:
            return dict.fromkeys(file.keys(), SINGLE_FILE)

    @staticmethod
    def _reader(path: Path) -> Any:
        try:
            return safe_open(str(path), framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                str(path), f"is not a readable safetensors file: {error}", "download or export it again"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        self._open.clear()

    @property
    def tensor_names(self) -> set[str]:
        return set(self._files)

    def check_names(self, expected: set[str]) -> None:
        """Every tensor of the folder is known and every expected one is there (but for the head of a tied folder).

        Raises:
            CheckpointError: names some that are not.
        """
        missing = expected - self.tensor_names - ({self.form["head"]} if self.is_tied else set())
        unknown = self.tensor_names - expected
        for names, what in ((missing, "missing"), (unknown, "not part of the model that config.json describes")):
            if names:
                raise CheckpointError(
                    str(self.folder),
                    f"{len(names)} tensors are {what}: {', '.join(sorted(names)[:3])} ...",
                    "use a complete, unquantised checkpoint of a text model",
                )

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor, checked against the expected shape; the embedding where a tied folder is asked for its head."""
        if name == self.form["head"] and name not in self._files and self.is_tied:
            name = self.form["decoder"] + "embed_tokens.weight"
        if name not in self._files:
            raise CheckpointError(str(self.folder), f"tensor {name} is missing", "download or export the folder again")
        file_name = self._files[name]
        if file_name not in self._open:
            self._open[file_name] = self._stack.enter_context(self._reader(self.folder / file_name))
        handle = self._open[file_name]
        if name not in handle.keys():  # noqa: SIM118
            raise CheckpointError(
                str(self.folder / file_name), f"tensor {name} is missing", "download or export it again"
            )
        view = handle.get_slice(name)
        readable = sorted(_SAFETENSORS_DTYPES.values())
        if view.get_dtype() not in readable:
            raise CheckpointError(
                str(self.folder / file_name),
                f"tensor {name} is stored as {view.get_dtype()}, expected one of {readable}",
                "use the BF16 release of the model (the base one)",
            )
        found = tuple(view.get_shape())
        if found != shape:
            raise CheckpointError(
                str(self.folder / file_name),
                f"tensor {name} has shape {found}, expected {shape} from config.json",
                "config.json and weights do not belong together",
            )
        return handle.get_tensor(name)


def _plan_shards(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_shard_bytes: int
) -> list[dict[str, tuple[int, ...]]]:
    """Fill files in order; a tensor larger than the limit gets a file of its own."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += num_bytes
    return shards


def write_safetensors_stream(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
    metadata: Mapping[str, str] | None = None,
) -> Iterator[int]:
    """Write tensors into one or several safetensors files (with index), one tensor in memory at a time.

    Args:
        folder: exists already.
        shapes: of all tensors, in the order in which ``tensors`` yields them.
        tensors: (name, tensor of ``dtype``).
        dtype: of all tensors.
        max_shard_bytes: upper limit of a file's tensor bytes.
        metadata: further entries of each file's header.

    Yields:
        bytes written, after each tensor (for a progress bar).

    Raises:
        CheckpointError: a tensor is not the announced one.
    """
    shards = _plan_shards(shapes, dtype, max_shard_bytes)
    names = [
        SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    source = iter(tensors)
    total = 0
    for file_name, shard in zip(names, shards, strict=True):
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        offset = 0
        for name, shape in shard.items():
            num_bytes = torch.Size(shape).numel() * dtype.itemsize
            header[name] = {
                "dtype": _SAFETENSORS_DTYPES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + num_bytes],
            }
            offset += num_bytes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # tensor data starts 8-byte aligned
        with (folder / file_name).open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little"))
            file.write(encoded)
            for name, shape in shard.items():
                found_name, tensor = next(source)
                if found_name != name or tuple(tensor.shape) != shape or tensor.dtype != dtype:
                    raise CheckpointError(
                        str(folder / file_name),
                        f"expected {name} {shape} {dtype}, got {found_name} {tuple(tensor.shape)} {tensor.dtype}",
                        "this is a defect of the conversion; please report it",
                    )
                raw = tensor.contiguous().view(torch.uint8).reshape(-1).numpy().data
                file.write(raw)
                total += raw.nbytes
                yield raw.nbytes
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2))
