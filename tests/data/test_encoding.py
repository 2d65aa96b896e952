"""Encoding: the fast path gives the reference's ids, special tokens in text stay text, what is not so is refused."""

import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from nld_train.data.encoding import HARD_CASES, TextEncoder, check_encoder
from nld_train.data.inputs import ReadOptions, find_inputs
from nld_train.data.prepare_files import PrepareOptions, prepare_files
from nld_train.data.prepared import TRAIN, VALIDATION, PreparedCorpus
from nld_train.data.tokenizer import convert_tekken, copy_tokenizer, load_tokenizer, save_tokenizer, train_tokenizer
from nld_train.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEKKEN = Path(str(resources.files("mistral_common"))) / "data" / "tekken_240911.json"


TEXTS = [f"{number} </s> [INST] <SPECIAL_100> {case}" for number, case in enumerate(HARD_CASES * 5)]


def _prepare(folder: Path, tokenizer: Path) -> PreparedCorpus:
    source = folder.with_suffix(".jsonl")
    source.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS), encoding="utf-8")
    options = PrepareOptions(name="x", tokenizer=str(tokenizer), read=ReadOptions(), validation_fraction=0.2)
    return prepare_files(folder, find_inputs([str(source)]), options)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> PreparedCorpus:
    """Prepared from the tekken.json, which is converted."""
    return _prepare(tmp_path_factory.mktemp("tekken") / "corpus", TEKKEN)


@pytest.fixture(scope="module")
def tekken(corpus: PreparedCorpus) -> Path:
    return corpus.tokenizer_folder


@pytest.fixture(scope="module")
def loaded(tekken: Path) -> "PreTrainedTokenizerBase":
    return load_tokenizer(tekken)


@pytest.fixture(scope="module")
def encoder(tekken: Path) -> TextEncoder:
    return TextEncoder.from_folder(tekken)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "tokenizer"
    save_tokenizer(train_tokenizer(["some words and more words"] * 3, vocab_size=263), folder)
    return folder


def test_tekken_is_fast_and_equal_to_the_reference(encoder: TextEncoder) -> None:
    assert encoder.is_fast
    assert encoder.vocab_size == 131072
    assert len(encoder.special_ids) == 1000
    source = Path(json.__file__).read_text(encoding="utf-8")
    texts = [*HARD_CASES, source, *(f"x{token} {token}y" for token in list(encoder.special_ids)[:50])]
    for text, fast, reference in zip(texts, encoder.encode(texts), encoder.encode_reference(texts), strict=True):
        assert np.array_equal(fast, reference), text[:40]
        assert fast.dtype == np.int64
    check_encoder(encoder, [source])


def test_text_that_overflows_the_fast_path_is_encoded_all_the_same(encoder: TextEncoder) -> None:
    text = "a" + " " * 1_500_000 + "b"
    (ids,) = encoder.encode([text])
    assert np.array_equal(ids, encoder.encode_reference([text])[0])
    assert 1000 < len(ids) < len(text)


def test_converted_folder_is_a_hugging_face_tokenizer(
    tekken: Path, encoder: TextEncoder, loaded: "PreTrainedTokenizerBase"
) -> None:
    assert loaded.is_fast
    assert len(loaded) == 131072
    tokens = (loaded.unk_token_id, loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id)
    assert tokens == (0, 1, 2, 11)
    assert encoder.end_token_id(tekken) == 2
    assert loaded.chat_template is not None
    assert not [path for path in tekken.iterdir() if str(TEKKEN.parent) in path.read_text(encoding="utf-8")]
    text = "naïve 日本語, don't\n    x = 1"
    assert loaded(text)["input_ids"] == encoder.encode([text])[0].tolist()
    assert loaded.decode(encoder.encode([text])[0]) == text


def test_tekken_json_beside_the_tokenizer_does_not_hide_it(
    tekken: Path, loaded: "PreTrainedTokenizerBase", tmp_path: Path
) -> None:
    copy_tokenizer(tekken, tmp_path / "model")
    (tmp_path / "model" / "tekken.json").write_bytes(TEKKEN.read_bytes())
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "ministral3"}))
    assert type(load_tokenizer(tmp_path / "model")) is type(loaded)


def test_prepared_with_tekken(corpus: PreparedCorpus, loaded: "PreTrainedTokenizerBase", tmp_path: Path) -> None:
    """From the tekken.json and from the converted folder: the same tokens, ended by </s>, none special, in 32 bits."""
    assert corpus.manifest.dtype == "int32"
    other = _prepare(tmp_path / "other", corpus.tokenizer_folder)
    assert other.manifest.tokenizer_hash == corpus.manifest.tokenizer_hash
    found = []
    for part in (TRAIN, VALIDATION):
        assert corpus.part_hash(part) == other.part_hash(part)
        documents = corpus.documents(part)
        for number in range(len(documents)):
            ids = documents.get(number)
            assert ids[-1] == 2
            assert ids[:-1].min() >= 1000
            found.append(loaded.decode(ids[:-1]))
    assert sorted(found) == sorted(TEXTS)


def test_other_tokenizers_use_the_tokenizers_library(small: Path) -> None:
    encoder = TextEncoder.from_folder(small)
    assert not encoder.is_fast
    check_encoder(encoder, ["some words"])
    assert TextEncoder.from_folder(small).encode(["</s>"])[0].min() > 4


def _changed(folder: Path, out: Path, change: object) -> TextEncoder:
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(raw)  # type: ignore[operator]
    copy_tokenizer(folder, out)
    (out / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    return TextEncoder.from_folder(out)


def test_a_fast_path_that_differs_is_refused(tekken: Path, tmp_path: Path) -> None:
    """Here: the tokenizers library has fewer merges than the vocabulary has ranks."""

    def cut(raw: dict) -> None:
        raw["model"]["merges"] = raw["model"]["merges"][:1000]

    encoder = _changed(tekken, tmp_path / "x", cut)
    assert encoder.is_fast
    with pytest.raises(
        DataError, match=r"tokenizer\.json: the fast path and the tokenizers library differ in .* token"
    ):
        check_encoder(encoder, ["unforeseeable concatenations"])


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.update(normalizer={"type": "NFC"}),
        lambda raw: raw["model"].update(ignore_merges=False),
        lambda raw: raw["added_tokens"][5].update(special=False),
        lambda raw: raw["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True),
    ],
)
def test_what_is_not_of_the_kind_has_no_fast_path(tekken: Path, tmp_path: Path, change: object) -> None:
    assert not _changed(tekken, tmp_path / "x", change).is_fast


def test_special_tokens_that_cannot_be_split_are_refused(small: Path, tmp_path: Path) -> None:
    """A special token that is also an ordinary one of the vocabulary."""

    def add(raw: dict) -> None:
        number = raw["model"]["vocab"]["w"]
        raw["added_tokens"].append({**raw["added_tokens"][2], "id": number, "content": "w"})

    encoder = _changed(small, tmp_path / "x", add)
    with pytest.raises(DataError, match=r"the text .* becomes the special token \d+: a corpus could end its own"):
        check_encoder(encoder, [])


def test_end_token_is_needed(small: Path, tmp_path: Path) -> None:
    copy_tokenizer(small, tmp_path / "x")
    path = tmp_path / "x" / "tokenizer_config.json"
    encoder = TextEncoder.from_folder(small)
    path.write_text(json.dumps({"eos_token": {"content": "<pad>"}}), encoding="utf-8")
    assert encoder.end_token_id(tmp_path / "x") == 4
    path.write_text(json.dumps({"eos_token": "<end>"}), encoding="utf-8")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: names the end token '<end>', which"):
        encoder.end_token_id(tmp_path / "x")
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=r"x: the tokenizer has no end-of-text token"):
        encoder.end_token_id(tmp_path / "x")


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(DataError, match=r"tekken\.json: is no tekken\.json: "):
        convert_tekken(tmp_path / "tekken.json", tmp_path / "out")
    with pytest.raises(DataError, match=r"has no tokenizer\.json"):
        copy_tokenizer(tmp_path, tmp_path / "out")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot be read"):
        TextEncoder.from_folder(tmp_path)
