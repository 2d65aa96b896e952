"""From a corpus to token files: tokenizer, training and validation part, manifest; prepared once, found again."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from nld_train.config.schema import DataConfig
from nld_train.data.corpora import CORPORA, CorpusText, Document
from nld_train.data.files import found_or_built, sha256_of_file
from nld_train.data.prepared import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    TRAIN,
    VALIDATION,
    FileStats,
    Manifest,
    PartStats,
    PreparedCorpus,
    open_prepared,
)
from nld_train.data.progress import PrepareProgress
from nld_train.data.tokenizer import EOS_TOKEN_ID, encode_documents, save_tokenizer, train_tokenizer
from nld_train.errors import DataError


def prepare(
    corpus: str, data: DataConfig, vocab_size: int, *, mask_token_id: int, progress: PrepareProgress | None = None
) -> PreparedCorpus:
    """Find or build a corpus. Several processes may call this at once: one builds, the others wait.

    A shipped corpus is built under ``data.cache_dir``, in a folder named after its content and options, and rebuilt if
    that folder is damaged. A folder named by the user is never changed.

    Args:
        corpus: name of a shipped corpus, or the folder of a prepared one.
        data: ``cache_dir`` and ``validation_fraction`` are read.
        vocab_size: of the model. A shipped corpus is tokenised with exactly as many entries; the vocabulary of a
            prepared folder must not be larger.
        mask_token_id: ``objective.mask_token_id``; must not occur in the corpus.
        progress: told what happens.

    Raises:
        DataError: unknown corpus, damaged folder, vocabulary too small or too large, mask token in the data.
    """
    if corpus in CORPORA:
        prepared = prepare_text(
            CORPORA[corpus](),
            vocab_size=vocab_size,
            validation_fraction=data.validation_fraction,
            cache_dir=Path(data.cache_dir),
            progress=progress,
        )
    elif (Path(corpus) / MANIFEST_NAME).is_file():
        prepared = open_prepared(Path(corpus))
    else:
        raise DataError(
            "data.corpus",
            f"{corpus!r} is neither a shipped corpus nor a folder with a {MANIFEST_NAME}",
            f"use one of {', '.join(sorted(CORPORA))}, or the path of a prepared folder",
        )
    prepared.check_vocabulary(vocab_size)
    prepared.check_mask_token(mask_token_id)
    return prepared


def prepare_text(
    corpus: CorpusText,
    *,
    vocab_size: int,
    validation_fraction: float,
    cache_dir: Path,
    progress: PrepareProgress | None = None,
) -> PreparedCorpus:
    """Tokenise a corpus of text with a tokenizer trained on it; see :func:`prepare`."""
    progress = progress or PrepareProgress()
    options: dict[str, int | float | str] = {
        "tokenizer": "byte-level BPE",
        "vocab_size": vocab_size,
        "validation_fraction": validation_fraction,
    }
    content_hash = corpus.content_hash
    key = json.dumps([FORMAT_VERSION, corpus.name, content_hash, options], sort_keys=True)
    folder = cache_dir / f"{corpus.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def build(temporary: Path) -> None:
        _build(corpus, content_hash, options, vocab_size, validation_fraction, temporary, progress)

    return found_or_built(
        folder,
        open_folder=open_prepared,
        build=build,
        summary=_summary,
        damaged="the cached corpus is damaged and will be built again",
        progress=progress,
    )


def _summary(prepared: PreparedCorpus) -> str:
    train, validation = (prepared.manifest.parts[part] for part in (TRAIN, VALIDATION))
    return (
        f"corpus {prepared.name} ({prepared.manifest.source}): {train.documents} documents and {train.tokens:,} tokens "
        f"for training, {validation.documents} and {validation.tokens:,} held out, in {prepared.folder}"
    )


def _build(
    corpus: CorpusText,
    content_hash: str,
    options: dict[str, int | float | str],
    vocab_size: int,
    validation_fraction: float,
    folder: Path,
    progress: PrepareProgress,
) -> None:
    parts = split_documents(corpus, validation_fraction)
    train_texts = [document.text for document in parts[TRAIN]]
    progress.phase("training the tokenizer", total_documents=len(train_texts), total_bytes=_num_bytes(parts[TRAIN]))
    tokenizer = train_tokenizer(_reported(train_texts, progress), vocab_size=vocab_size, num_texts=len(train_texts))
    save_tokenizer(tokenizer, folder / "tokenizer")

    dtype = DType.optimal_dtype(vocab_size)
    counts = np.zeros(vocab_size, dtype=np.int64)
    stats = {}
    all_documents = [*parts[TRAIN], *parts[VALIDATION]]
    progress.phase("tokenising", total_documents=len(all_documents), total_bytes=_num_bytes(all_documents))
    for part, documents in parts.items():
        builder = IndexedDatasetBuilder(str(folder / f"{part}.bin"), dtype=dtype)
        num_tokens = 0
        texts = [document.text for document in documents]
        for text, tokens in zip(texts, encode_documents(tokenizer, texts, eos_token_id=EOS_TOKEN_ID), strict=True):
            counts += np.bincount(tokens, minlength=vocab_size)
            builder.add_document(tokens, [len(tokens)])
            num_tokens += len(tokens)
            progress.advance(1, len(text.encode("utf-8")))
        builder.finalize(str(folder / f"{part}.idx"))
        stats[part] = PartStats(documents=len(documents), tokens=num_tokens)
    np.save(folder / "token_counts.npy", counts)

    files = {
        path.relative_to(folder).as_posix(): FileStats(size=path.stat().st_size, sha256=sha256_of_file(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    Manifest(
        format_version=FORMAT_VERSION,
        corpus=corpus.name,
        source=corpus.source,
        content_hash=content_hash,
        text_bytes=_num_bytes(corpus.documents),
        num_skipped=corpus.num_skipped,
        options=options,
        vocab_size=vocab_size,
        eos_token_id=EOS_TOKEN_ID,
        dtype=np.dtype(dtype).name,
        parts=stats,
        files=files,
    ).write(folder / MANIFEST_NAME)


def split_documents(corpus: CorpusText, validation_fraction: float) -> dict[str, list[Document]]:
    """Training and validation documents, chosen by the hash of the text: copies of a text land on the same side.

    The training part keeps the corpus's order (it is shuffled when it is read). The validation part is in the order of
    the hashes, so that its first samples, which validation reads, are a sample of the corpus and not the letter A.

    Raises:
        DataError: one of the parts would be empty.
    """
    train, validation = [], []
    for document in corpus.documents:
        digest = hashlib.sha256(document.text.encode("utf-8")).digest()
        if int.from_bytes(digest[:8], "big") < validation_fraction * 2.0**64:
            validation.append((digest, document))
        else:
            train.append(document)
    if not train or not validation:
        raise DataError(
            "data.validation_fraction",
            f"{validation_fraction} leaves {len(train)} documents of corpus {corpus.name} for training and "
            f"{len(validation)} for validation",
            "choose a fraction between 0 and 1 that leaves documents on both sides",
        )
    validation.sort(key=lambda pair: (pair[0], pair[1].name))
    return {TRAIN: train, VALIDATION: [document for _, document in validation]}


def _num_bytes(documents: Iterable[Document]) -> int:
    return sum(len(document.text.encode("utf-8")) for document in documents)


def _reported(texts: Iterable[str], progress: PrepareProgress) -> Iterator[str]:
    for text in texts:
        yield text
        progress.advance(1, len(text.encode("utf-8")))
