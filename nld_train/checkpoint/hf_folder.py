"""Hugging Face folders: what form one has, its tensors one at a time, and writing one as a stream.

Nothing here holds more than one tensor: tensors are read through safetensors' memory map and written straight into the
shard file, whose header is known in advance because all shapes are.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nld_train.checkpoint.headers import (
    INDEX_FILE,
    MISTRAL3,
    SINGLE_FILE,
    StoredTensor,
    check_numbers,
    locate_tensors,
    need,
    read_json,
    text_config,
)
from nld_train.checkpoint.streaming import StreamedFile, tensor_bytes
from nld_train.checkpoint.weight_map import (
    MINISTRAL3_FORM,
    MISTRAL3_FORM,
    MISTRAL3_MODULE_FORM,
    NLD_FORM,
    WeightRule,
)
from nld_train.config.schema import ModelConfig, RopeConfig
from nld_train.errors import CheckpointError

_SAFETENSORS_DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16"}
_TORCH_DTYPES = {word: dtype for dtype, word in _SAFETENSORS_DTYPES.items()} | {"F8_E4M3": torch.bfloat16}
_FP8 = "F8_E4M3"
_FP8_BLOCK = [128, 128]  # where quantization_config does not say
# The forms of each architecture; the folder's tensor names choose.
_FORMS: dict[str, tuple[Mapping[str, str], ...]] = {
    "Ministral3ForCausalLM": (MINISTRAL3_FORM,),
    MISTRAL3: (MISTRAL3_FORM, MISTRAL3_MODULE_FORM),
    "NemotronLabsDiffusionModel": (NLD_FORM,),
}
_VISION_PREFIXES = tuple(
    f"{parent}{part}." for parent in ("", "model.") for part in ("vision_tower", "multi_modal_projector")
)


def model_config_from_hf(config: Mapping[str, Any], path: Path) -> ModelConfig:
    """The model's shape from a text model's ``config.json``; every number is read, none assumed.

    Args:
        config: content of ``config.json``.
        path: of the file, for errors.
    """
    rope = need(config, "rope_parameters", path)
    if not isinstance(rope, dict):
        raise CheckpointError(
            str(path), f"rope_parameters is {rope!r}, expected an object", "download the folder again"
        )
    kind = rope.get("rope_type", rope.get("type"))
    if kind != "yarn":
        raise CheckpointError(
            str(path), f"rope_parameters.rope_type is {kind!r}, expected 'yarn'", "use a Ministral3 checkpoint"
        )
    if config.get("sliding_window") is not None:
        raise CheckpointError(
            str(path), f"sliding_window is {config['sliding_window']}, expected null", "use a Ministral3 checkpoint"
        )
    model = ModelConfig(
        num_layers=need(config, "num_hidden_layers", path),
        hidden_size=need(config, "hidden_size", path),
        ffn_hidden_size=need(config, "intermediate_size", path),
        num_attention_heads=need(config, "num_attention_heads", path),
        num_key_value_heads=need(config, "num_key_value_heads", path),
        head_dim=need(config, "head_dim", path),
        vocab_size=need(config, "vocab_size", path),
        max_position_embeddings=need(config, "max_position_embeddings", path),
        rms_norm_eps=need(config, "rms_norm_eps", path),
        initializer_range=config.get("initializer_range", 0.02),
        rope=RopeConfig(**{field.name: need(rope, field.name, path) for field in fields(RopeConfig)}),
    )
    check_numbers(model, path)
    check_numbers(model.rope, path)
    return model


class HFFolder:
    """A Hugging Face folder of a supported form, opened for reading; use as a context manager.

    Attributes:
        form: tensor-name prefixes (:mod:`nld_train.checkpoint.weight_map`).
        architecture: the one of config.json that was recognised.
        model: the model's shape.
        is_tied: the head shares the embedding.
        tensors: the language model's tensors, by name (with FP8 scales).
        notes: what of the folder is left out, in words for the user.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config_path = folder / "config.json"
        self.config = read_json(config_path)
        architectures = self.config.get("architectures") or []
        known = [name for name in architectures if name in _FORMS]
        if not known:
            raise CheckpointError(
                str(config_path),
                f"architectures is {architectures}, expected one of {sorted(_FORMS)}",
                "use a Ministral3 checkpoint (text or vision-language) or an exported NLD folder",
            )
        self.architecture: str = known[0]
        text = text_config(self.config, config_path)
        self.model = model_config_from_hf(text, config_path)
        self.is_tied = bool(text.get("tie_word_embeddings", False))
        quantization = self.config.get("quantization_config") or text.get("quantization_config")
        self._quantization: Mapping[str, Any] | None = quantization
        if quantization is not None and quantization.get("quant_method") != "fp8":
            raise CheckpointError(
                str(config_path),
                f"quantization_config is {quantization}: of quantised weights, only fp8 with weight_scale_inv is read",
                "use the BF16 release of the model (the base one)",
            )
        self.tensors = locate_tensors(folder)
        self.form = self._find_form()
        self.notes: list[str] = []
        if self.architecture == MISTRAL3:
            self._leave(_is_vision, "of the vision tower and its projector are left out: only the language model is")
        self._leave(self._is_activation_scale, "hold FP8 activation scales and are left out: only weights are")
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}

    def _find_form(self) -> Mapping[str, str]:
        """Of the architecture's forms the one whose embedding and head are there; else the first, for the errors."""
        forms = _FORMS[self.architecture]
        decoders = [form["decoder"] for form in forms if form["decoder"] + "embed_tokens.weight" in self.tensors]
        heads = [form["head"] for form in forms if form["head"] in self.tensors]
        return {"decoder": (decoders or [forms[0]["decoder"]])[0], "head": (heads or [forms[0]["head"]])[0]}

    def _leave(self, is_left: Any, why: str) -> None:
        left = [name for name in self.tensors if is_left(name)]
        for name in left:
            del self.tensors[name]
        if left:
            self.notes.append(f"{self.folder}: {len(left)} tensors {why} taken")

    def _is_activation_scale(self, name: str) -> bool:
        module, _, kind = name.rpartition(".")
        weight = self.tensors.get(f"{module}.weight")
        return kind == "activation_scale" and weight is not None and weight.dtype == _FP8

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
        """Names of the weights; scales of FP8 weights are not counted."""
        return {name for name in self.tensors if not self._is_scale(name)}

    def _is_scale(self, name: str) -> bool:
        weight = self.tensors.get(name.removesuffix("_scale_inv"))
        return name.endswith(".weight_scale_inv") and weight is not None and weight.dtype == _FP8

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds every weight exactly (FP8 counts as the bfloat16 it is dequantised to)."""
        found = torch.bfloat16
        words = [self.tensors[name].dtype for name in sorted(self.tensor_names)]
        for number, word in enumerate(words):
            dtype = _TORCH_DTYPES.get(word, torch.float32)
            found = dtype if number == 0 else torch.promote_types(found, dtype)
        return found

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
                    "use a complete folder of a supported form",
                )

    def check(self, rules: Iterable[WeightRule]) -> None:
        """Names, shapes and dtypes of the whole folder, before anything is read or written.

        Raises:
            CheckpointError: names file and tensor, expected and found.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for rule in rules:
            shapes.update(zip(rule.hf_names(self.form), rule.shapes, strict=True))
        self.check_names(set(shapes))
        for name, shape in shapes.items():
            self._check_tensor(self._stored_name(name), shape)

    def _embedding_name(self) -> str:
        return self.form["decoder"] + "embed_tokens.weight"

    def _stored_name(self, name: str) -> str:
        if name == self.form["head"] and name not in self.tensors and self.is_tied:
            return self._embedding_name()
        return name

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        stored = self.tensors.get(name)
        if stored is None:
            raise CheckpointError(str(self.folder), f"tensor {name} is missing", "download or export the folder again")
        path = str(self.folder / stored.file)
        if stored.dtype == _FP8 and f"{name}_scale_inv" not in self.tensors:
            raise CheckpointError(
                path,
                f"tensor {name} is stored as {_FP8}, but its scales {name}_scale_inv are missing "
                f"(quantization_config is {self._quantization})",
                "use a folder with the scales, or the BF16 release of the model (the base one)",
            )
        if stored.dtype not in _TORCH_DTYPES:
            raise CheckpointError(
                path,
                f"tensor {name} is stored as {stored.dtype}, expected one of {sorted(_TORCH_DTYPES)}",
                "use the BF16 release of the model (the base one)",
            )
        if stored.shape != shape:
            raise CheckpointError(
                path,
                f"tensor {name} has shape {stored.shape}, expected {shape} from config.json",
                "config.json and weights do not belong together",
            )
        if stored.dtype == _FP8:
            self._check_scale(name, shape)
        return stored

    def _block(self) -> list[int]:
        return list((self._quantization or {}).get("weight_block_size") or _FP8_BLOCK)

    def _check_scale(self, name: str, shape: tuple[int, ...]) -> None:
        """One scale for the tensor, or one for each block of a matrix."""
        scale = self.tensors[f"{name}_scale_inv"]
        path = str(self.folder / scale.file)
        if scale.dtype not in _SAFETENSORS_DTYPES.values():
            raise CheckpointError(
                path,
                f"tensor {name}_scale_inv is stored as {scale.dtype}, expected F32 or BF16",
                "use the BF16 release of the model (the base one)",
            )
        blocks = tuple(-(-rows // block) for rows, block in zip(shape, self._block(), strict=False))
        if scale.shape not in ((), (1,)) and (len(shape) != 2 or scale.shape != blocks):
            raise CheckpointError(
                path,
                f"tensor {name}_scale_inv has shape {scale.shape}, expected one scale or {blocks} for blocks of "
                f"{self._block()}",
                "config.json and weights do not belong together",
            )

    def _read(self, name: str) -> Tensor:
        file_name = self.tensors[name].file
        if file_name not in self._open:
            self._open[file_name] = self._stack.enter_context(self._reader(self.folder / file_name))
        return self._open[file_name].get_tensor(name)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor, checked against the expected shape; FP8 comes as bfloat16(weight * weight_scale_inv).

        A tied folder that is asked for its head gives the embedding; one that stores a head with other values is
        refused, since transformers would not read them.
        """
        stored_name = self._stored_name(name)
        stored = self._check_tensor(stored_name, shape)
        tensor = self._read(stored_name)
        if stored.dtype == _FP8:
            return self._dequantised(tensor, self._read(f"{stored_name}_scale_inv"))
        if name == self.form["head"] and stored_name == name and self.is_tied:
            embedding = self.tensor(self._embedding_name(), shape)
            if not torch.equal(tensor, embedding.to(tensor.dtype)):
                raise CheckpointError(
                    str(self.folder / stored.file),
                    f"tensor {name} differs from {self._embedding_name()}, but config.json ties them",
                    "set tie_word_embeddings to what the weights were trained with",
                )
        return tensor

    def _dequantised(self, weight: Tensor, scale: Tensor) -> Tensor:
        """weight * scale in float32, a block at a time along the rows, as bfloat16."""
        scale = scale.float()
        if scale.numel() == 1:
            return weight.float().mul_(scale.reshape(())).bfloat16()
        rows, columns = self._block()
        out = torch.empty(weight.shape, dtype=torch.bfloat16)
        for number, row_scale in enumerate(scale):
            part = slice(number * rows, (number + 1) * rows)
            factor = row_scale.repeat_interleave(columns)[: weight.shape[1]]
            out[part] = (weight[part].float() * factor).bfloat16()
        return out


def _is_vision(name: str) -> bool:
    return name.startswith(_VISION_PREFIXES)


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
        with StreamedFile(folder / file_name) as file:
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
                num_bytes = file.write(tensor_bytes(tensor))
                total += num_bytes
                yield num_bytes
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2))
