"""From a corpus to token files: tokenizer, training and validation part, manifest; prepared once, found again."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from nld_train.config.schema import DataConfig
from nld_train.data.corpora import CORPORA, CorpusSource, CorpusText
from nld_train.data.encoding import TextEncoder, check_encoder
from nld_train.data.files import found_or_built, sha256_of_folder
from nld_train.data.prepared import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    TRAIN,
    VALIDATION,
    WORK_FOLDER,
    PreparedCorpus,
    open_prepared,
)
from nld_train.data.progress import PrepareProgress
from nld_train.data.shards import finish, is_held_out, source_hash, write_shard
from nld_train.data.tokenizer import EOS_TOKEN_ID, copy_tokenizer, save_tokenizer, train_tokenizer
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
    elif (Path(corpus) / MANIFEST_NAME).is_file() or (Path(corpus) / WORK_FOLDER).is_dir():
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
    corpus: CorpusSource,
    *,
    vocab_size: int,
    validation_fraction: float,
    cache_dir: Path,
    progress: PrepareProgress | None = None,
) -> PreparedCorpus:
    """Tokenise a corpus of text with a tokenizer trained on it, or on it and others; see :func:`prepare`."""
    progress = progress or PrepareProgress()
    options: dict[str, int | float | str] = {
        "tokenizer": "byte-level BPE",
        "vocab_size": vocab_size,
        "validation_fraction": validation_fraction,
    }
    others = [CORPORA[name]() for name in corpus.tokenizer_corpora]
    hashes = [corpus.content_hash, *(other.content_hash for other in others)]
    key = json.dumps([FORMAT_VERSION, corpus.name, hashes, options], sort_keys=True)
    folder = cache_dir / f"{corpus.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def build(temporary: Path) -> None:
        text = corpus.read()
        if others:
            tokenizer_folder = _shared_tokenizer(others, vocab_size, validation_fraction, cache_dir, progress)
            copy_tokenizer(tokenizer_folder, temporary / "tokenizer")
        else:
            _train([text], vocab_size, validation_fraction, temporary / "tokenizer", progress)
        _build(text, corpus.content_hash, options, vocab_size, validation_fraction, temporary, progress)

    return found_or_built(
        folder,
        open_folder=open_prepared,
        build=build,
        summary=_summary,
        damaged="the cached corpus is damaged and will be built again",
        progress=progress,
    )


def _shared_tokenizer(
    corpora: Sequence[CorpusSource],
    vocab_size: int,
    validation_fraction: float,
    cache_dir: Path,
    progress: PrepareProgress,
) -> Path:
    """The tokenizer of several corpora: the same files whichever of them is prepared first."""
    hashes = [corpus.content_hash for corpus in corpora]
    key = json.dumps([FORMAT_VERSION, hashes, vocab_size, validation_fraction])
    folder = cache_dir / f"tokenizer-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def build(temporary: Path) -> None:
        made = temporary / "tokenizer"
        _train([corpus.read() for corpus in corpora], vocab_size, validation_fraction, made, progress)
        (temporary / "sha256").write_text(sha256_of_folder(made), encoding="utf-8")

    def open_folder(found: Path) -> Path:
        path = found / "sha256"
        if not path.is_file() or path.read_text(encoding="utf-8") != sha256_of_folder(found / "tokenizer"):
            raise DataError(str(found), "is not the tokenizer that was written there", "remove the folder")
        return found / "tokenizer"

    names = " and ".join(corpus.name for corpus in corpora)
    return found_or_built(
        folder,
        open_folder=open_folder,
        build=build,
        summary=lambda path: f"the tokenizer of {names}, in {path}",
        damaged="the cached tokenizer is damaged and will be trained again",
        progress=progress,
    )


def _train(
    corpora: Sequence[CorpusText], vocab_size: int, validation_fraction: float, folder: Path, progress: PrepareProgress
) -> None:
    texts = [
        document.text
        for corpus in corpora
        for document in corpus.documents
        if not is_held_out(source_hash(document), validation_fraction)
    ]
    if not texts:
        raise _nothing_left(corpora[0], validation_fraction)
    total = sum(len(text.encode("utf-8")) for text in texts)
    progress.phase("training the tokenizer", total_documents=len(texts), total_bytes=total)
    save_tokenizer(train_tokenizer(_reported(texts, progress), vocab_size=vocab_size), folder)


def _nothing_left(corpus: CorpusText, validation_fraction: float) -> DataError:
    return DataError(
        "data.validation_fraction",
        f"{validation_fraction} leaves 0 documents of corpus {corpus.name} for training",
        "choose a fraction between 0 and 1 that leaves documents on both sides",
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
    """One shard of all documents, with the tokenizer that is in ``folder``."""
    tokenizer_hash = sha256_of_folder(folder / "tokenizer")
    encoder = TextEncoder.from_folder(folder / "tokenizer")
    check_encoder(encoder, [])
    total = sum(len(document.text.encode("utf-8")) for document in corpus.documents)
    progress.phase("tokenising", total_documents=len(corpus.documents), total_bytes=total)
    record = write_shard(
        corpus.documents,
        encoder,
        folder=folder,
        number=0,
        eos_token_id=EOS_TOKEN_ID,
        vocab_size=vocab_size,
        validation_fraction=validation_fraction,
        tokenizer_hash=tokenizer_hash,
        report=progress.advance,
    )
    finish(
        folder,
        [record],
        corpus=corpus.name,
        source=corpus.source,
        content_hash=content_hash,
        inputs=[],
        num_skipped=corpus.num_skipped,
        options=options,
        vocab_size=vocab_size,
        eos_token_id=EOS_TOKEN_ID,
        tokenizer_hash=tokenizer_hash,
    )


def _reported(texts: Iterable[str], progress: PrepareProgress) -> Iterator[str]:
    for text in texts:
        yield text
        progress.advance(1, len(text.encode("utf-8")))
