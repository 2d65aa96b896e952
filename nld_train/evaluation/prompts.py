"""The prompts that ship with the project, and those of a file: one JSON object per line, ``prompt`` or ``messages``."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nld_train.errors import DataError

PROMPTS = Path(__file__).resolve().parents[2] / "data" / "prompts"
CATEGORIES = ("coding", "math", "prose", "chat")
_REMEDY = 'write {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]} on each line'


@dataclass(frozen=True, slots=True)
class Prompt:
    """``token_ids`` int64 [P], P >= 1."""

    category: str
    text: str
    token_ids: Tensor


def load_prompts(
    tokenizer: PreTrainedTokenizerBase, paths: Sequence[Path] | None = None, limit: int | None = None
) -> list[Prompt]:
    """Read prompts; a file's name is their category.

    Args:
        tokenizer: of the model. Messages go through its chat template, or where it has none, their contents are joined
            by empty lines.
        paths: JSONL files; None: those that ship with the project.
        limit: at most so many of each file; None: all.

    Raises:
        DataError: a file or line cannot be used.
    """
    prompts = []
    for path in paths or [PROMPTS / f"{category}.jsonl" for category in CATEGORIES]:
        if not path.is_file():
            raise DataError(str(path), "is not a file", "name a JSONL file of prompts")
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(str(path), f"cannot be read as UTF-8 text: {error}", "name a JSONL file") from error
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        if not lines:
            raise DataError(str(path), "holds no prompt", _REMEDY)
        for number, line in lines[:limit]:
            text = _text(tokenizer, line, f"{path}: line {number}")
            ids = tokenizer(text, add_special_tokens=False).input_ids
            if not ids:
                raise DataError(f"{path}: line {number}", "the prompt has no tokens", "write at least one character")
            prompts.append(Prompt(path.stem, text, torch.tensor(ids)))
    return prompts


def _text(tokenizer: PreTrainedTokenizerBase, line: str, where: str) -> str:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(where, f"is not JSON: {error}", _REMEDY) from error
    if isinstance(fields, dict) and isinstance(fields.get("prompt"), str):
        return str(fields["prompt"])
    messages = fields.get("messages") if isinstance(fields, dict) else None
    if (
        not isinstance(messages, list)
        or not messages
        or not all(
            isinstance(message, dict)
            and isinstance(message.get("content"), str)
            and isinstance(message.get("role"), str)
            for message in messages
        )
    ):
        raise DataError(where, "has neither a text `prompt` nor `messages` of role and content", _REMEDY)
    if tokenizer.chat_template is None:
        return "\n\n".join(message["content"] for message in messages) + "\n\n"
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        remedy = "write the roles in the order that the template of the model expects"
        raise DataError(where, f"the chat template refuses these messages: {error}", remedy) from error
