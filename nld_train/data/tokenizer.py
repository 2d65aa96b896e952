"""Tokenizer folders: a byte-level BPE trained on the corpus itself, a converted tekken.json, a copy of the user's."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nld_train.data.encoding import HARD_CASES, TextEncoder
from nld_train.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The library prints a warning into every worker that is forked after it ran in parallel, unless this is decided.
# The loader's workers never tokenise.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

SPECIAL_TOKENS = {
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "mask_token": "<mask>",
    "pad_token": "<pad>",
}
"""Special tokens in the order of their ids: 0, 1, 2, 3, 4."""

UNK_TOKEN_ID, BOS_TOKEN_ID, EOS_TOKEN_ID, MASK_TOKEN_ID, PAD_TOKEN_ID = range(5)

MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256
"""The special tokens and one token per byte."""

MODEL_MAX_LENGTH = 262144
"""Tokens; a hint for users of the folder, as in Ministral3."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that decide what a tokenizer makes of a text or a conversation; an exported model's folder holds many more."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception('unknown role ' ~ message['role']) -}}
    {%- endif -%}
    {{- bos_token ~ message['role'] ~ '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] | trim ~ eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] | trim ~ eos_token -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- bos_token ~ 'assistant\\n' -}}
{%- endif -%}
"""
"""``<s>role``, a newline, the text and ``</s>``, for every message; what an assistant has to write is marked.

``<s>`` never occurs in the corpus, so that it is free to begin a message. Texts are stripped: none begins with
whitespace that would merge with the newline of the header.
"""


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE: every text can be encoded and comes back exactly.

    Nothing is added around a text: no beginning-of-text token, since documents are only ended (by ``</s>``).

    Args:
        texts: the training documents.
        vocab_size: entries, special tokens included.

    Raises:
        DataError: ``vocab_size`` is smaller than the bytes need, or larger than the texts have merges for.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(
            "model.vocab_size",
            f"{vocab_size} is too small for a byte-level tokenizer",
            f"use at least {MIN_VOCAB_SIZE} ({len(SPECIAL_TOKENS)} special tokens and 256 bytes)",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise DataError(
            "model.vocab_size",
            f"{vocab_size} entries were asked for, but the corpus has merges for {tokenizer.get_vocab_size()} only",
            f"set model.vocab_size to at most {tokenizer.get_vocab_size()}, or use a larger corpus",
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a folder that ``AutoTokenizer.from_pretrained`` loads, in this and in older versions of transformers."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MODEL_MAX_LENGTH,
        "clean_up_tokenization_spaces": False,
        **SPECIAL_TOKENS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Load a Hugging Face tokenizer folder from disk (never from the network).

    Raises:
        DataError: there is no tokenizer in ``folder``, or it cannot be read.
    """
    if not (folder / "tokenizer.json").is_file():
        raise DataError(
            str(folder), "has no tokenizer.json", "name a Hugging Face tokenizer folder, or prepare the corpus again"
        )
    # Imported late: it takes seconds, and preparing a corpus does not need it.
    from transformers import AutoTokenizer

    # A tekken.json beside it makes transformers choose a tokenizer of mistral-common's, which is no fast one.
    options = {"mistral_format": False} if (folder / "tekken.json").is_file() else {}
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # the library raises bare Exception for malformed JSON
        raise DataError(
            str(folder / "tokenizer.json"), f"cannot be read: {error}", "prepare the corpus again"
        ) from error


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files that make a tokenizer from a Hugging Face folder, which may hold a whole model.

    Raises:
        DataError: there is no tokenizer.json.
    """
    if not (source / "tokenizer.json").is_file():
        raise DataError(
            str(source),
            "has no tokenizer.json",
            "name a Hugging Face folder with a fast tokenizer, a tekken.json, or train:SIZE",
        )
    folder.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def convert_tekken(path: Path, folder: Path) -> None:
    """Write a Hugging Face tokenizer folder from Mistral's tekken.json, and see that both give the same ids.

    Raises:
        DataError: it is no tekken.json, or the ids differ.
    """
    # Imported late: they take seconds.
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

    try:
        converted: Any = convert_tekken_tokenizer(str(path))
        original = Tekkenizer.from_file(path)
    except Exception as error:  # a wrong file ends in whichever exception comes first
        raise DataError(str(path), f"is no tekken.json: {error!r}", "name a tekken.json of Mistral's") from error
    encoder = TextEncoder(converted.backend_tokenizer.to_str(), str(path))
    for text, ids in zip(HARD_CASES, encoder.encode_reference(HARD_CASES), strict=True):
        if original.encode(text, bos=False, eos=False) != ids.tolist():
            raise DataError(
                str(path),
                f"the converted tokenizer and mistral-common differ in {text[:40]!r}",
                "install the versions of transformers and mistral-common that the project was tested with",
            )
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(converted.backend_tokenizer.to_str(pretty=True), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MODEL_MAX_LENGTH,
        "clean_up_tokenization_spaces": False,
        **{key: str(token) for key, token in sorted(converted.special_tokens_map.items()) if isinstance(token, str)},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if converted.chat_template:
        (folder / "chat_template.jinja").write_text(converted.chat_template, encoding="utf-8")
