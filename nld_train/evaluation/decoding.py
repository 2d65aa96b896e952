"""Continue a prompt with an exported checkpoint, in any of its decoding modes, and say what it cost."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging as transformers_logging

from nld_train.errors import CheckpointError

MODEL_TYPE = "nemotron_labs_diffusion"
_EXPORT_REMEDY = "give a folder written by the export: `hf` inside a run, or scripts/convert_checkpoint.py export"


class DecodingMode(StrEnum):
    """``ar``: one token per forward. ``diffusion``: blocks are denoised. ``linear``: diffusion drafts, AR verifies, in
    turns. ``quadratic``: the same in one forward."""

    ar = "ar"
    diffusion = "diffusion"
    linear = "linear"
    quadratic = "quadratic"


_METHODS = {
    DecodingMode.ar: "ar_generate",
    DecodingMode.diffusion: "generate",
    DecodingMode.linear: "linear_spec_generate",
    DecodingMode.quadratic: "quadratic_spec_generate",
}
_BLOCK_ARGUMENTS = frozenset({"block_length", "threshold", "steps_per_block", "diffusion_weight"})
_MODE_ARGUMENTS = {
    DecodingMode.ar: frozenset[str](),
    DecodingMode.diffusion: frozenset({"block_length", "threshold", "steps_per_block"}),
    DecodingMode.linear: frozenset({"block_length"}),
    DecodingMode.quadratic: frozenset({"block_length", "diffusion_weight"}),
}


class Continuation(TypedDict):
    """One prompt continued in one mode. ``text`` and ``token_ids`` are the new part only."""

    mode: str
    prompt: str
    text: str
    token_ids: list[int]
    num_tokens: int
    num_forwards: int  # evaluations of the decoder stack
    tokens_per_forward: float


def load_export(
    folder: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and the tokenizer of an exported folder, from disk only.

    The modeling code in the folder is run. transformers keeps a copy of it under a hash of the files; the class is
    taken from there and not through ``AutoModel``, which goes on with the modeling code it has seen first in a process
    as long as the configuration's code is the same.

    Args:
        folder: the exported Hugging Face folder.
        device: where the model goes.
        dtype: of the weights; None: as stored.

    Raises:
        CheckpointError: the folder is not an export, or its weights are not complete and readable.
    """
    folder = Path(folder)
    model_class_name = _check_folder(folder)
    with _no_progress_bar():
        try:
            model_class: Any = get_class_from_dynamic_module(model_class_name, folder, local_files_only=True)
            model, report = model_class.from_pretrained(
                folder,
                local_files_only=True,
                dtype="auto" if dtype is None else dtype,
                output_loading_info=True,
            )
        except (SafetensorError, OSError, ValueError, RuntimeError, ImportError) as error:
            raise CheckpointError(
                str(folder), f"the model cannot be loaded: {error}", "export the run again"
            ) from error
        # transformers only warns about these and goes on with random weights.
        for name in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if report[name]:
                tensors = ", ".join(str(key) for key in sorted(report[name])[:3])
                raise CheckpointError(
                    str(folder),
                    f"{len(report[name])} tensors are {name.split('_')[0]}: {tensors} ...",
                    "export the run again",
                )
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                str(folder), f"the tokenizer cannot be loaded: {error}", "export again with a tokenizer"
            ) from error
    return model.to(device).eval(), tokenizer


def decode(model: Any, prompt_ids: Tensor, mode: DecodingMode | str, **arguments: Any) -> tuple[Tensor, int]:
    """Call a mode's method of the model.

    Args:
        model: of :func:`load_export`.
        prompt_ids: int64 [B, P].
        mode: see :class:`DecodingMode`.
        **arguments: of any mode's method; what only other modes know is left out.

    Returns:
        (int64 [B, P + N]: prompt and new tokens; number of forward evaluations)

    Raises:
        ValueError: an argument is out of its range.
        CheckpointError: the folder's modeling file is of an older version and lacks the mode.
    """
    mode = DecodingMode(mode)
    method = getattr(model, _METHODS[mode], None)
    if method is None:
        raise CheckpointError(
            str(model.config._name_or_path), f"the modeling file has no {_METHODS[mode]}", "export the run again"
        )
    left_out = _BLOCK_ARGUMENTS - _MODE_ARGUMENTS[mode]
    output_ids, num_forwards = method(prompt_ids, **{k: v for k, v in arguments.items() if k not in left_out})
    return output_ids, num_forwards


def continue_prompt(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    mode: DecodingMode | str,
    *,
    max_new_tokens: int = 64,
    block_length: int | None = None,
    threshold: float = 0.9,
    temperature: float = 0.0,
    eos_token_id: int | Sequence[int] | None = None,
    **others: Any,
) -> Continuation:
    """Continue ``prompt`` in one mode.

    Args:
        model: of :func:`load_export`.
        tokenizer: of :func:`load_export`.
        prompt: text; at least one token.
        mode: see :class:`DecodingMode`.
        max_new_tokens: at most this many.
        block_length: tokens per block (diffusion) or per draft (speculation); None: the model's block size.
        threshold: probability from which on a position is committed (diffusion only).
        temperature: 0: greedy.
        eos_token_id: where to stop; None: never.
        **others: of :func:`decode`.

    Raises:
        ValueError: an argument is out of its range, or the prompt is empty.
    """
    mode = DecodingMode(mode)
    prompt_ids = tokenizer(prompt, return_tensors="pt").input_ids.to(device=model.device, dtype=torch.int64)
    if prompt_ids.shape[1] == 0:
        raise ValueError(f"prompt: {prompt!r} has no tokens; give at least one character")
    output_ids, num_forwards = decode(
        model,
        prompt_ids,
        mode,
        max_new_tokens=max_new_tokens,
        block_length=block_length,
        threshold=threshold,
        temperature=temperature,
        eos_token_id=eos_token_id,
        **others,
    )
    token_ids = output_ids[0, prompt_ids.shape[1] :].tolist()
    return Continuation(
        mode=mode.value,
        prompt=prompt,
        text=str(tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)),
        token_ids=token_ids,
        num_tokens=len(token_ids),
        num_forwards=num_forwards,
        tokens_per_forward=len(token_ids) / num_forwards,
    )


def format_continuation(result: Continuation) -> str:
    """For people: a line with the figures, then prompt and continuation."""
    return (
        f"[{result['mode']}] {result['num_tokens']} tokens, {result['num_forwards']} forwards, "
        f"{result['tokens_per_forward']:.2f} tokens per forward\n{result['prompt']}{result['text']}"
    )


def _check_folder(folder: Path) -> str:
    """Refuse what is not an export before transformers is asked: it would look for the name on the network.

    Returns:
        ``file.Class`` of the model's code, as config.json's auto_map says.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise CheckpointError(str(folder), what, _EXPORT_REMEDY)
    try:
        fields = json.loads(config_file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(str(config_file), f"not JSON: {error}", "export the run again") from error
    model_type = fields.get("model_type") if isinstance(fields, dict) else None
    if model_type != MODEL_TYPE:
        raise CheckpointError(str(config_file), f"model_type is {model_type!r}, not {MODEL_TYPE!r}", _EXPORT_REMEDY)
    auto_map: dict[str, str] = fields.get("auto_map", {})
    for auto_class in ("AutoConfig", "AutoModel"):
        if auto_class not in auto_map:
            raise CheckpointError(str(config_file), f"auto_map names no {auto_class}", "export the run again")
        code_file = folder / f"{auto_map[auto_class].split('.')[0]}.py"
        if not code_file.is_file():
            raise CheckpointError(str(code_file), "missing; config.json's auto_map names it", "export the run again")
    return auto_map["AutoModel"]


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers draws one per loaded file, over whatever the caller shows."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()
