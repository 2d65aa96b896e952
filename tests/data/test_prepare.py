"""Preparing a corpus: the split, the token files, the cache, several processes, damaged and foreign folders."""

import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from nld_train.config.schema import DataConfig
from nld_train.data.corpora import CORPORA, CorpusText, Document
from nld_train.data.files import sha256_of_file
from nld_train.data.prepare import prepare, prepare_text
from nld_train.data.prepared import TRAIN, VALIDATION, PreparedCorpus, open_prepared
from nld_train.data.progress import PrepareProgress, RichProgress
from nld_train.data.tokenizer import load_tokenizer
from nld_train.errors import DataError

VOCAB_SIZE = 400
EOS = 2
MASK = 3

MakeCorpus = Callable[..., CorpusText]
WriteCorpus = Callable[..., PreparedCorpus]


@pytest.fixture
def small(make_corpus: MakeCorpus) -> CorpusText:
    return make_corpus(30)


class Recorder(PrepareProgress):
    def __init__(self) -> None:
        self.messages: list[str] = []
        self.phases: dict[str, list[int]] = {}

    def phase(self, name: str, *, total_documents: int, total_bytes: int) -> None:
        self.phases[name] = [total_documents, total_bytes, 0, 0]

    def advance(self, documents: int, num_bytes: int, tokens: int = 0) -> None:
        last = list(self.phases.values())[-1]
        last[2] += documents
        last[3] += num_bytes

    def message(self, text: str) -> None:
        self.messages.append(text)


def _prepare(cache_dir: Path, corpus: CorpusText, progress: PrepareProgress | None = None) -> PreparedCorpus:
    return prepare_text(corpus, vocab_size=VOCAB_SIZE, validation_fraction=0.2, cache_dir=cache_dir, progress=progress)


def _texts(corpus: PreparedCorpus, part: str) -> list[str]:
    """The documents of a part, decoded; asserts that each ends with the end-of-text token and holds no other."""
    tokenizer = load_tokenizer(corpus.tokenizer_folder)
    texts = []
    dataset = IndexedDataset(str(corpus.prefix(part)))
    for index in range(len(dataset)):
        ids = dataset[index].tolist()
        assert ids[-1] == EOS
        assert EOS not in ids[:-1]
        texts.append(tokenizer.decode(ids[:-1]))
    return texts


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_documents_are_there_and_copies_never_straddle(corpus: PreparedCorpus, corpus_text: CorpusText) -> None:
    train, validation = _texts(corpus, TRAIN), _texts(corpus, VALIDATION)
    assert sorted([*train, *validation]) == sorted(document.text for document in corpus_text.documents)
    assert not set(train) & set(validation)
    assert len(set(train)) < len(train), "the corpus must hold copies for this test to mean anything"
    assert 0.05 < len(validation) / len(corpus_text.documents) < 0.4
    # Training keeps the corpus's order.
    assert train == [document.text for document in corpus_text.documents if document.text in set(train)]


def test_split_does_not_depend_on_names_or_order(
    corpus: PreparedCorpus, corpus_text: CorpusText, tmp_path: Path
) -> None:
    shuffled = list(corpus_text.documents)
    random.Random(1).shuffle(shuffled)
    renamed = tuple(Document(name=f"x{index}", text=document.text) for index, document in enumerate(shuffled))
    other = CorpusText(name="other", source="", documents=renamed, num_skipped=0)
    assert _texts(_prepare(tmp_path, other), VALIDATION) == _texts(corpus, VALIDATION)
    larger = prepare_text(other, vocab_size=VOCAB_SIZE, validation_fraction=0.5, cache_dir=tmp_path)
    assert set(_texts(corpus, VALIDATION)) < set(_texts(larger, VALIDATION))


def test_documents_of_one_source_are_held_out_together(tmp_path: Path, make_corpus: MakeCorpus) -> None:
    """A corpus of summaries beside one of texts: a summary is held out exactly where its text is."""
    texts = make_corpus(60)
    summaries = tuple(
        Document(name=document.name, text=f"{document.text[:40]} summary", source=document.text)
        for document in texts.documents
    )
    whole = _prepare(tmp_path, texts)
    short = _prepare(tmp_path, CorpusText(name="summaries", source="", documents=summaries, num_skipped=0))
    held_out = [text[:40] for text in _texts(whole, VALIDATION)]
    assert sorted(text.removesuffix(" summary") for text in _texts(short, VALIDATION)) == sorted(held_out)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_both_parts_must_hold_something(corpus_text: CorpusText, fraction: float, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"data\.validation_fraction: {fraction} leaves"):
        prepare_text(corpus_text, vocab_size=VOCAB_SIZE, validation_fraction=fraction, cache_dir=tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_manifest_tells_the_truth(corpus: PreparedCorpus, corpus_text: CorpusText) -> None:
    manifest = corpus.manifest
    assert manifest.content_hash == corpus_text.content_hash
    assert manifest.text_bytes == sum(len(document.text.encode()) for document in corpus_text.documents)
    assert (manifest.vocab_size, manifest.eos_token_id, manifest.dtype) == (VOCAB_SIZE, EOS, "uint16")
    files = {path.relative_to(corpus.folder).as_posix() for path in corpus.folder.rglob("*") if path.is_file()}
    assert set(manifest.files) == files - {"manifest.json"}
    for name, stats in manifest.files.items():
        assert stats.size == (corpus.folder / name).stat().st_size
        assert stats.sha256 == sha256_of_file(corpus.folder / name)
    for part in (TRAIN, VALIDATION):
        dataset = IndexedDataset(str(corpus.prefix(part)))
        assert manifest.parts[part].documents == len(dataset)
        assert manifest.parts[part].tokens == sum(len(dataset[index]) for index in range(len(dataset)))
        assert np.array_equal(corpus.tokens(part), np.concatenate([dataset[index] for index in range(len(dataset))]))
    both = np.concatenate([corpus.tokens(TRAIN), corpus.tokens(VALIDATION)])
    assert np.array_equal(np.load(corpus.folder / "token_counts.npy"), np.bincount(both, minlength=VOCAB_SIZE))


def test_text_like_special_tokens_stays_text(tmp_path: Path, small: CorpusText) -> None:
    poison = Document(name="poison", text="a </s> b <mask> c <s> <pad> <unk></s>\n")
    corpus = CorpusText(name="poison", source="", documents=(*small.documents, poison), num_skipped=0)
    prepared = _prepare(tmp_path, corpus)
    assert poison.text in [*_texts(prepared, TRAIN), *_texts(prepared, VALIDATION)]
    counts = np.load(prepared.folder / "token_counts.npy")
    assert counts[:5].tolist() == [0, 0, len(corpus.documents), 0, 0]


def test_same_input_gives_the_same_bytes(tmp_path: Path, small: CorpusText) -> None:
    first, second = _prepare(tmp_path / "a", small), _prepare(tmp_path / "b", small)
    assert first.folder.name == second.folder.name
    assert _bytes(first.folder) == _bytes(second.folder)


def test_content_and_options_name_the_cache(tmp_path: Path, small: CorpusText) -> None:
    shorter = CorpusText(name="words", source="", documents=small.documents[:-1], num_skipped=0)
    folders = {
        prepare_text(text, vocab_size=size, validation_fraction=fraction, cache_dir=tmp_path).folder
        for text, size, fraction in [(small, 400, 0.2), (small, 399, 0.2), (small, 400, 0.3), (shorter, 400, 0.2)]
    }
    assert len(folders) == 4


def test_second_call_finds_the_first(tmp_path: Path, small: CorpusText) -> None:
    first, second = Recorder(), Recorder()
    built = _prepare(tmp_path, small, progress=first)
    before = built.prefix(TRAIN).with_suffix(".bin").stat()
    found = _prepare(tmp_path, small, progress=second)
    after = found.prefix(TRAIN).with_suffix(".bin").stat()
    assert found == built
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert [message.split()[0] for message in first.messages + second.messages] == ["prepared", "found"]
    assert not second.phases
    assert list(first.phases) == ["training the tokenizer", "tokenising"]
    for total_documents, total_bytes, documents, text_bytes in first.phases.values():
        assert (documents, text_bytes) == (total_documents, total_bytes)
        assert documents > 0


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "name", ["train-00000.bin", "validation.idx", "token_counts.npy", "train.starts.npy", "tokenizer/tokenizer.json"]
)
@pytest.mark.parametrize("damage", [_truncate, _flip, Path.unlink])
def test_damaged_cache_of_a_shipped_corpus_is_built_again(
    tmp_path: Path, small: CorpusText, name: str, damage: Callable[[Path], None]
) -> None:
    folder = _prepare(tmp_path, small).folder
    good = _bytes(folder)
    damage(folder / name)
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        open_prepared(folder)
    recorder = Recorder()
    assert _prepare(tmp_path, small, progress=recorder).folder == folder
    assert _bytes(folder) == good
    assert [message.split()[0] for message in recorder.messages] == ["the", "prepared"]
    assert name in recorder.messages[0]


def test_interrupted_preparation_leaves_nothing_behind(tmp_path: Path, small: CorpusText) -> None:
    class Interrupted(PrepareProgress):
        def phase(self, name: str, *, total_documents: int, total_bytes: int) -> None:
            if name == "tokenising":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _prepare(tmp_path, small, progress=Interrupted())
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


class Told(PrepareProgress):
    """Hands the first word of each message on, or kills its process when tokenising begins."""

    def __init__(self, words: Any, dies: bool) -> None:
        self.words = words
        self.dies = dies

    def phase(self, name: str, *, total_documents: int, total_bytes: int) -> None:
        if name == "tokenising" and self.dies:
            os.kill(os.getpid(), signal.SIGKILL)

    def message(self, text: str) -> None:
        self.words.put(text.split()[0])


def _start(cache_dir: Path, corpus: CorpusText, *, dies: bool) -> tuple[Any, Any]:
    """A process that prepares, and its messages with the folder at the end."""
    fork = multiprocessing.get_context("fork")  # a new interpreter would only import, for seconds
    words = fork.SimpleQueue()

    def body() -> None:
        words.put(str(_prepare(cache_dir, corpus, Told(words, dies)).folder))

    process = fork.Process(target=body)
    process.start()
    return process, words


def test_processes_at_once_and_a_killed_one(tmp_path: Path, small: CorpusText) -> None:
    killed, _ = _start(tmp_path, small, dies=True)
    killed.join(60)
    assert killed.exitcode == -9
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1, "the killed process left its remains"

    children = [_start(tmp_path, small, dies=False) for _ in range(2)]
    outputs = []
    for child, words in children:
        child.join(60)
        assert child.exitcode == 0
        outputs.append([words.get() for _ in iter(words.empty, True)])
    folder = _prepare(tmp_path / "alone", small).folder
    shared = tmp_path / folder.name
    assert {output[-1] for output in outputs} == {str(shared)}
    assert sorted(word for output in outputs for word in output if word in ("prepared", "found")) == [
        "found",
        "prepared",
    ]
    assert _bytes(shared) == _bytes(folder)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".") and path.is_dir()] == []


def test_vocabulary_beyond_uint16_is_not_wrapped(tmp_path: Path) -> None:
    rng = random.Random(0)
    # Words without a pattern: merges enough for 70,000 entries.
    text = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=8)) for _ in range(40_000)]
    documents = tuple(Document(name=str(n), text=" ".join(text[n * 400 : (n + 1) * 400])) for n in range(100))
    corpus = CorpusText(name="wide", source="", documents=documents, num_skipped=0)
    prepared = prepare_text(corpus, vocab_size=70_000, validation_fraction=0.1, cache_dir=tmp_path)
    assert prepared.manifest.dtype == "int32"
    assert prepared.tokens(TRAIN).max() > 65535
    assert set(_texts(prepared, TRAIN)) | set(_texts(prepared, VALIDATION)) == {document.text for document in documents}


# --- folders of the user ---


def _config(corpus: object, cache_dir: object = "unused") -> tuple[str, DataConfig]:
    return str(corpus), DataConfig(corpus=str(corpus), cache_dir=str(cache_dir))


def test_prepared_folder_is_used_as_it_is(corpus: PreparedCorpus) -> None:
    before = _bytes(corpus.folder)
    recorder = Recorder()
    opened = prepare(*_config(corpus.folder), 1000, mask_token_id=MASK, progress=recorder)
    assert opened == corpus
    assert _bytes(corpus.folder) == before
    assert not recorder.phases


def test_vocabulary_larger_than_the_models_is_refused(corpus: PreparedCorpus) -> None:
    with pytest.raises(DataError, match=r"model\.vocab_size: 399 is smaller .*: 400"):
        prepare(*_config(corpus.folder), 399, mask_token_id=MASK)


@pytest.mark.parametrize("name", ["nowhere", "Stdlib"])
def test_unknown_corpus_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=rf"data\.corpus: '{name}' is neither .*(?s:.*)stdlib"):
        prepare(*_config(name), VOCAB_SIZE, mask_token_id=MASK)


@pytest.fixture
def copy(corpus: PreparedCorpus, tmp_path: Path) -> Path:
    return Path(shutil.copytree(corpus.folder, tmp_path / "copy"))


def test_truncated_bin_is_named(copy: Path, corpus: PreparedCorpus) -> None:
    path = copy / "train-00000.bin"
    _truncate(path)
    size, last = path.stat().st_size, open_prepared(corpus.folder).manifest.parts[TRAIN].documents - 1
    expected = (
        rf"{path}: holds {size} bytes, manifest\.json says {size + 2}; it ends at offset {size}, in document {last} "
    )
    with pytest.raises(DataError, match=expected):
        prepare(*_config(copy), VOCAB_SIZE, mask_token_id=MASK)


def test_index_of_another_file_is_named(copy: Path, write_corpus: WriteCorpus) -> None:
    shutil.copy(copy / "validation.idx", copy / "train-00000.idx")
    with pytest.raises(DataError, match=r"copy/train-00000\.idx: holds .* manifest\.json says"):
        prepare(*_config(copy), VOCAB_SIZE, mask_token_id=MASK)
    # Same size, same number of documents: only the lengths inside betray it.
    one = write_corpus([[9, 9, EOS], [9, EOS]], folder="one")
    other = write_corpus([[9, 9, 9, EOS], [9, EOS]], folder="other")
    shutil.copy(other.folder / "train.idx", one.folder / "train.idx")
    with pytest.raises(DataError, match=r"one/train\.idx: is the index of another file: it describes 12 bytes"):
        open_prepared(one.folder)
    # Same total as well: the hash.
    swapped = write_corpus([[9, EOS], [9, 9, EOS]], folder="swapped")
    shutil.copy(swapped.folder / "train.idx", one.folder / "train.idx")
    with pytest.raises(
        DataError, match=r"one/train\.idx: is the index of another file: its document 0 has 2 tokens, .* says 3"
    ):
        open_prepared(one.folder)


def test_large_files_are_still_checked_by_structure(write_corpus: WriteCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without hashes (files above the limit), a file that contradicts the index or the manifest is found."""
    monkeypatch.setattr("nld_train.data.prepared._HASH_LIMIT", -1)
    folder = write_corpus([[9, 9, EOS], [9, EOS]]).folder
    index = folder / "train.idx"
    good = index.read_bytes()
    for damaged, message in [
        (b"MMIDIDY" + good[7:], "is not a Megatron index"),
        (good[:17] + bytes([99]) + good[18:], "is not a Megatron index"),
        (good[:17] + bytes([4]) + good[18:], "describes int32 tokens, manifest.json uint16"),
        (good[:18] + bytes([3]) + good[19:], "its header describes"),
        (good[:34] + bytes([4]) + good[35:], "is the index of another file"),
    ]:
        index.write_bytes(damaged)
        with pytest.raises(DataError, match=message) as caught:
            open_prepared(folder)
        assert caught.value.problems[0].location == str(index)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"format_version": 4', '"format_version": 7', "format_version is 7"),
        ('"eos_token_id"', '"eos"', "not a manifest .*eos"),
        ('"train-00000.bin"', '"other.bin"', r"says nothing of train-00000\.bin"),
        ("{", "", "cannot be read"),
    ],
)
def test_bad_manifest_is_named(copy: Path, old: str, new: str, message: str) -> None:
    path = copy / "manifest.json"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(DataError, match=rf"manifest\.json: .*{message}"):
        prepare(*_config(copy), VOCAB_SIZE, mask_token_id=MASK)


def test_mask_token_in_the_data_is_refused(write_corpus: WriteCorpus) -> None:
    folder = write_corpus([[9, 8, EOS], [8, EOS], [55, 7, 8, EOS], [55, EOS]], validation=[[9, 44, EOS]]).folder
    with pytest.raises(DataError, match=r"train\.bin: document 2 contains the mask token.* = 55 \(token 5 .* 2 times"):
        prepare(*_config(folder), 100, mask_token_id=55)
    with pytest.raises(DataError, match=r"validation\.bin: document 0 contains the mask token.* = 44 \(token 1 "):
        prepare(*_config(folder), 100, mask_token_id=44)
    for unused in (3, 99, 100, 5000):
        prepare(*_config(folder), 100, mask_token_id=unused)


def test_counted_token_beyond_the_vocabulary_is_refused(write_corpus: WriteCorpus) -> None:
    counts = np.zeros(103, dtype=np.int64)
    counts[101] = 2
    with pytest.raises(DataError, match=r"token_counts\.npy: counts token 101 2 times; the vocabulary has 100 entries"):
        write_corpus([[9, 101, 101, EOS]], counts=counts)
    with pytest.raises(DataError, match=r"token_counts\.npy: counts token 150 1 times"):
        write_corpus([[9, 150, EOS]], folder="other")


def test_empty_part_is_refused(write_corpus: WriteCorpus) -> None:
    with pytest.raises(DataError, match=r"validation\.bin"):
        write_corpus([[9, EOS]], validation=[[]])


# --- the shipped corpus ---


def test_standard_library(cache: Path) -> None:
    """The real thing, whole, as the runs read it: every document back to the letter."""
    with RichProgress() as progress:
        prepared = prepare(*_config("stdlib", cache), 512, mask_token_id=MASK, progress=progress)
    text = CORPORA["stdlib"]().read()
    assert prepared.manifest.source == text.source
    assert prepared.num_tokens(TRAIN) > 1_000_000
    assert prepared.num_tokens(VALIDATION) > 20_000
    assert sorted([*_texts(prepared, TRAIN), *_texts(prepared, VALIDATION)]) == sorted(d.text for d in text.documents)
    with pytest.raises(DataError, match=r"objective\.mask_token_id = 100 "):
        prepare(*_config("stdlib", cache), 512, mask_token_id=100)
