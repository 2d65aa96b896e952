"""Small corpora, and prepared folders written by hand, for the tests of the data layer."""

import random
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from nld_train.data.corpora import CorpusText, Document
from nld_train.data.files import sha256_of_file
from nld_train.data.prepare import prepare_text
from nld_train.data.prepared import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    TRAIN,
    VALIDATION,
    FileStats,
    Manifest,
    PartStats,
    PreparedCorpus,
    ShardStats,
    open_prepared,
)
from nld_train.data.shards import write_places

VOCAB_SIZE = 400
EOS = 2


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_corpus(num_documents: int = 80, seed: int = 0, name: str = "words") -> CorpusText:
    """Documents of 20 to 120 made-up words; every tenth is a copy of an earlier one under another name."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(200)]
    texts = [" ".join(rng.choices(words, k=rng.randint(20, 120))) + "\n" for _ in range(num_documents)]
    texts[10::10] = [texts[index - 7] for index in range(10, num_documents, 10)]
    documents = tuple(Document(name=f"{index:04d}", text=text) for index, text in enumerate(texts))
    return CorpusText(name=name, source="made up", documents=documents, num_skipped=0)


@pytest.fixture(scope="session", name="make_corpus")
def make_corpus_fixture() -> Callable[..., CorpusText]:
    return make_corpus


@pytest.fixture(scope="session")
def corpus_text() -> CorpusText:
    return make_corpus()


@pytest.fixture(scope="session")
def corpus(corpus_text: CorpusText, tmp_path_factory: pytest.TempPathFactory) -> PreparedCorpus:
    """A real prepared corpus; tests must not change it."""
    cache_dir = tmp_path_factory.mktemp("cache")
    return prepare_text(corpus_text, vocab_size=VOCAB_SIZE, validation_fraction=0.2, cache_dir=cache_dir)


@pytest.fixture
def write_corpus(tmp_path: Path) -> Callable[..., PreparedCorpus]:
    """Writes a prepared folder from token ids as they are, right or wrong, and opens it."""

    def write(
        train: Sequence[Sequence[int]],
        validation: Sequence[Sequence[int]] = ((5, 6, 7, EOS),),
        vocab_size: int = 100,
        folder: str = "by_hand",
        counts: np.ndarray | None = None,
    ) -> PreparedCorpus:
        path = tmp_path / folder
        path.mkdir()
        parts, shards = {}, {}
        for part, documents in ((TRAIN, train), (VALIDATION, validation)):
            builder = IndexedDatasetBuilder(str(path / f"{part}.bin"), dtype=np.uint16)
            for document in documents:
                builder.add_document(np.array(document), [len(document)])
            builder.finalize(str(path / f"{part}.idx"))
            num_tokens = sum(map(len, documents))
            parts[part] = PartStats(documents=len(documents), tokens=num_tokens)
            shards[part] = [ShardStats(name=part, documents=len(documents), tokens=num_tokens)]
            write_places(path, part, shards[part])
            content = (path / f"{part}.bin").read_bytes()
            blocks = [content[start : start + 4096] for start in range(0, len(content), 4096)]
            np.save(path / f"{part}.crc32.npy", np.array(list(map(zlib.crc32, blocks)), dtype=np.uint32))
        if counts is None:
            ids = np.concatenate([np.array(document, dtype=np.int64) for document in (*train, *validation)])
            counts = np.bincount(ids, minlength=vocab_size)
        else:  # a lie about which tokens there are, yet not about how many
            counts = counts.copy()
            counts[EOS] += sum(part.tokens for part in parts.values()) - counts.sum()
        np.save(path / "token_counts.npy", counts)
        files = {p.name: FileStats(size=p.stat().st_size, sha256=sha256_of_file(p)) for p in sorted(path.iterdir())}
        Manifest(
            format_version=FORMAT_VERSION,
            corpus=folder,
            source="by hand",
            content_hash="",
            text_bytes=0,
            num_skipped=0,
            options={},
            inputs=[],
            vocab_size=vocab_size,
            eos_token_id=EOS,
            tokenizer_hash="",
            dtype="uint16",
            parts=parts,
            shards=shards,
            files=files,
        ).write(path / MANIFEST_NAME)
        return open_prepared(path)

    return write
