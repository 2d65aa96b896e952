"""A byte-level BPE tokenizer trained on the corpus itself, saved as a Hugging Face tokenizer folder."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

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


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, num_texts: int) -> Tokenizer:
    """Train a byte-level BPE: every text can be encoded and comes back exactly.

    Nothing is added around a text: no beginning-of-text token, since documents are only ended (by ``</s>``).

    Args:
        texts: the training documents.
        vocab_size: entries, special tokens included.
        num_texts: length of ``texts``.

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
    tokenizer.train_from_iterator(texts, trainer, length=num_texts)
    if tokenizer.get_vocab_size() != vocab_size:
        raise DataError(
            "model.vocab_size",
            f"{vocab_size} entries were asked for, but the corpus has merges for {tokenizer.get_vocab_size()} only",
            f"set model.vocab_size to at most {tokenizer.get_vocab_size()}, or use a larger corpus",
        )
    return tokenizer


def encode_documents(
    tokenizer: Tokenizer, texts: Sequence[str], *, eos_token_id: int, batch_size: int = 64
) -> Iterator[np.ndarray]:
    """Token ids of each text, ended by ``eos_token_id``: int64 [tokens + 1].

    Text that looks like a special token (``</s>``, ``<mask>``) is encoded as the characters it is made of: a corpus
    cannot end its own documents or mask its own tokens.
    """
    encoder = Tokenizer.from_str(tokenizer.to_str())
    encoder.encode_special_tokens = True  # "encode them as ordinary text"
    for start in range(0, len(texts), batch_size):
        for encoding in encoder.encode_batch_fast(texts[start : start + batch_size], add_special_tokens=False):
            yield np.array([*encoding.ids, eos_token_id], dtype=np.int64)


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

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises bare Exception for malformed JSON
        raise DataError(
            str(folder / "tokenizer.json"), f"cannot be read: {error}", "prepare the corpus again"
        ) from error
