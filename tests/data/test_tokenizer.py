"""The tokenizer: exact size, exact round trip, no special id from text, and a folder that transformers loads."""

from pathlib import Path

import pytest
from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from nld_train.data.corpora import CorpusText
from nld_train.data.encoding import TextEncoder
from nld_train.data.tokenizer import (
    EOS_TOKEN_ID,
    MASK_TOKEN_ID,
    MIN_VOCAB_SIZE,
    SPECIAL_TOKENS,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from nld_train.errors import DataError

POISON = "x = '<mask>'  # </s> <s><pad><unk> <mask>\n</s>"
ODD_TEXTS = [
    "",
    " ",
    "\x00\x1f\x7f",
    "a\r\n\tb  \n",
    "naïve 日本語 🙂\u200d",
    "\ufeffbom",
    "   def f(x):\n\n\n",
    POISON,
]


@pytest.fixture(scope="module")
def tokenizer(corpus_text: CorpusText) -> Tokenizer:
    texts = [document.text for document in corpus_text.documents]
    return train_tokenizer(texts, vocab_size=400)


def _encoder(tokenizer: Tokenizer) -> TextEncoder:
    return TextEncoder(tokenizer.to_str(), "here")


def test_vocabulary_has_the_size_asked_for_and_the_special_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 400
    assert [tokenizer.token_to_id(token) for token in ("<unk>", "<s>", "</s>", "<mask>", "<pad>")] == [0, 1, 2, 3, 4]


def test_every_text_comes_back_exactly(tokenizer: Tokenizer) -> None:
    for text, ids in zip(ODD_TEXTS, _encoder(tokenizer).encode(ODD_TEXTS), strict=True):
        assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text


def test_text_never_becomes_a_special_id(tokenizer: Tokenizer) -> None:
    # The tokenizer as users load it does read them: otherwise this test would guard nothing.
    assert MASK_TOKEN_ID in tokenizer.encode(POISON).ids
    for ids in _encoder(tokenizer).encode([POISON, *SPECIAL_TOKENS.values()]):
        assert ids.min() >= len(SPECIAL_TOKENS)
    assert MASK_TOKEN_ID in tokenizer.encode(POISON).ids, "the caller's tokenizer was changed"


def test_folder_loads_in_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    loaded = load_tokenizer(tmp_path / "tokenizer")
    assert type(loaded) is type(AutoTokenizer.from_pretrained(tmp_path / "tokenizer"))
    for attribute, token in SPECIAL_TOKENS.items():
        assert getattr(loaded, attribute) == token
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.mask_token_id, loaded.pad_token_id) == (1, 2, 3, 4)
    assert len(loaded) == 400
    assert loaded.model_max_length == 262144
    text = "abc def , it 's (naïve)  \n"
    assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded(POISON, split_special_tokens=True)["input_ids"] == _encoder(tokenizer).encode([POISON])[0].tolist()


def test_chat_template_of_the_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " abc\n"},
        {"role": "assistant", "content": "def"},
        {"role": "user", "content": "ghi"},
    ]
    text = "<s>system\nBe brief.</s><s>user\nabc</s><s>assistant\ndef</s><s>user\nghi</s>"
    assert loaded.apply_chat_template(messages, tokenize=False) == text
    prompt = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == text + "<s>assistant\n"
    encoded = loaded.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    marked = [id_ for id_, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert marked == [*tokenizer.encode("def").ids, EOS_TOKEN_ID]
    with pytest.raises(TemplateError, match="unknown role tool"):
        loaded.apply_chat_template([{"role": "tool", "content": "1"}])


@pytest.mark.parametrize(("vocab_size", "message"), [(MIN_VOCAB_SIZE - 1, "too small"), (100_000, "has merges for")])
def test_impossible_vocabulary_is_refused(vocab_size: int, message: str) -> None:
    with pytest.raises(DataError, match=rf"model\.vocab_size: {vocab_size} .*{message}"):
        train_tokenizer(["some text"] * 3, vocab_size=vocab_size)


def test_missing_and_damaged_folders_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: has no tokenizer\.json"):
        load_tokenizer(tmp_path / "nowhere")
    save_tokenizer(tokenizer, tmp_path / "cut")
    path = tmp_path / "cut" / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8")[:1000], encoding="utf-8")
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot be read"):
        load_tokenizer(tmp_path / "cut")
