"""Shards: documents to Megatron's token files, and many shards to one corpus folder.

The work of a corpus is cut into shards that know nothing of each other. Each leaves, in the folder that is being built,

    train-00012.bin  .idx                         its training documents
    .preparing/validation-00012.bin  .idx         its held-out documents
    .preparing/00012.npz                          token counts, checksums, hashes of the held-out documents' sources
    .preparing/00012.json                         counts, sizes and hashes; written last: the shard is complete

and :func:`finish` makes the corpus of them: one validation file in the order of the hashes, the places of all
documents, and the manifest, which is written last of all. Nothing of it depends on who wrote which shard when.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from nld_train.data.corpora import Document
from nld_train.data.encoding import TextEncoder
from nld_train.data.files import fsync, sha256_of_file
from nld_train.data.prepared import (
    CHECKSUM_BYTES,
    DTYPE_CODES,
    FORMAT_VERSION,
    INDEX_HEADER,
    INDEX_MAGIC,
    MANIFEST_NAME,
    TRAIN,
    VALIDATION,
    WORK_FOLDER,
    FileStats,
    InputStats,
    Manifest,
    PartStats,
    ShardStats,
    read_index,
)
from nld_train.errors import DataError

MAX_DOCUMENT_BYTES = 256 << 20
"""Of UTF-8. A document is held in memory, and Megatron counts its tokens in 32 bits."""

# Documents are encoded in batches of about so much text: what a worker holds in memory.
_BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 2 << 20

_UINT16_VOCABULARY = 65500  # Megatron's own rule, so that its tools agree with the files; below 65536


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits, int32 elsewhere."""
    return np.dtype(np.uint16 if vocab_size < _UINT16_VOCABULARY else np.int32)


def source_hash(document: Document) -> int:
    """64 bits of the sha256 of the text that the document is taken from: equal on every machine, in every corpus."""
    source = document.text if document.source is None else document.source
    # Half of a surrogate pair is refused where the document is written; here it only must not be in the way.
    return int.from_bytes(hashlib.sha256(source.encode("utf-8", errors="surrogatepass")).digest()[:8], "big")


def is_held_out(hash_of_source: int, validation_fraction: float) -> bool:
    """Copies of a text, and all that is taken from one source, land on the same side, whichever corpus they are in."""
    return hash_of_source < validation_fraction * 2.0**64


class TokenWriter:
    """Writes ``<prefix>.bin`` and ``<prefix>.idx``; use as a context manager.

    Both are written under temporary names; on success they are on disk, and then renamed. Memory: 4 bytes a document,
    and 4 for each checksum.

    Args:
        prefix: path without the suffix.
        vocab_size: every id must be smaller: none can be wrapped by the dtype of the file.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self._paths = {suffix: prefix.with_name(f"{prefix.name}.{suffix}") for suffix in ("bin", "idx")}
        self._temporary = {suffix: temporary_name(path) for suffix, path in self._paths.items()}
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._lengths: list[int] = []
        self._bin = self._temporary["bin"].open("wb")
        self._sha256 = hashlib.sha256()
        self._checksums = array("I")
        self._block = 0, 0  # checksum and size of the one that is not full
        self.num_tokens = 0
        self.files: dict[str, FileStats] = {}
        """After success: size and hash of both, by the suffix."""

    @property
    def num_documents(self) -> int:
        return len(self._lengths)

    def __enter__(self) -> "TokenWriter":
        return self

    def add(self, tokens: np.ndarray, name: object) -> None:
        """Append a document of any integer dtype.

        Raises:
            DataError: an id is outside the vocabulary; ``name`` is the document's.
        """
        if len(tokens):
            smallest, largest = int(tokens.min()), int(tokens.max())
            if smallest < 0 or largest >= self._vocab_size:
                wrong = smallest if smallest < 0 else largest
                place = int(np.flatnonzero(tokens == wrong)[0])
                raise DataError(
                    str(name),
                    f"token {place} of the document is {wrong}, the vocabulary has {self._vocab_size} entries",
                    "use the tokenizer that the vocabulary belongs to",
                )
        data = tokens.astype(self._dtype).tobytes()
        self._bin.write(data)
        self._sha256.update(data)
        self._add_checksums(memoryview(data))
        self._lengths.append(len(tokens))
        self.num_tokens += len(tokens)

    def _add_checksums(self, data: memoryview) -> None:
        checksum, size = self._block
        while data:
            part, data = data[: CHECKSUM_BYTES - size], data[CHECKSUM_BYTES - size :]
            checksum, size = zlib.crc32(part, checksum), size + len(part)
            if size == CHECKSUM_BYTES:
                self._checksums.append(checksum)
                checksum = size = 0
        self._block = checksum, size

    @property
    def checksums(self) -> np.ndarray:
        """uint32: of each CHECKSUM_BYTES of the .bin file, and of what is left."""
        last, size = self._block
        return np.array([*self._checksums, *([last] if size else [])], dtype=np.uint32)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._bin.close()
            for path in self._temporary.values():
                path.unlink(missing_ok=True)

    def _finish(self) -> None:
        self._bin.close()
        lengths = np.array(self._lengths, dtype=np.int32)
        places = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=places[1:])
        header = INDEX_HEADER.pack(INDEX_MAGIC, 1, DTYPE_CODES[self._dtype.name], len(lengths), len(lengths) + 1)
        boundaries = np.arange(len(lengths) + 1, dtype=np.int64)
        index = b"".join([header, lengths.tobytes(), (places * self._dtype.itemsize).tobytes(), boundaries.tobytes()])
        self._temporary["idx"].write_bytes(index)
        self.files = {
            "bin": FileStats(size=self.num_tokens * self._dtype.itemsize, sha256=self._sha256.hexdigest()),
            "idx": FileStats(size=len(index), sha256=hashlib.sha256(index).hexdigest()),
        }
        for path in self._temporary.values():
            fsync(path)
        for suffix, path in self._temporary.items():
            path.rename(self._paths[suffix])


def temporary_name(path: Path) -> Path:
    """A name beside ``path`` that no other process uses; :func:`remove_temporary` knows it."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def remove_temporary(folder: Path) -> None:
    """Remove what killed processes left in a folder. Call it with the folder's lock held."""
    for path in folder.glob(".*.tmp-*"):
        if path.is_dir() and not path.is_symlink():  # a tokenizer that was being made
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file; on success it is on disk, and then renamed."""
    temporary = temporary_name(path)
    try:
        write(temporary)
        fsync(temporary)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def json_text(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def write_json(path: Path, value: Any) -> None:
    write_file(path, lambda temporary: temporary.write_text(json_text(value), encoding="utf-8"))


# ---------------------------------------------------------------------------------------------- one shard


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """``.preparing/00012.json``: what a complete shard holds. ``files``: by their path in the folder."""

    tokenizer_hash: str
    train_documents: int
    train_tokens: int
    validation_documents: int
    validation_tokens: int
    text_bytes: int
    num_skipped: int
    files: dict[str, FileStats]

    @classmethod
    def read(cls, path: Path) -> "ShardRecord":
        raw = json.loads(path.read_text(encoding="utf-8"))
        raw["files"] = {name: FileStats(**stats) for name, stats in raw["files"].items()}
        return cls(**raw)


def shard_name(part: str, number: int) -> str:
    return f"{part}-{number:05d}"


def _record_path(folder: Path, number: int) -> Path:
    return folder / WORK_FOLDER / f"{number:05d}.json"


def has_complete_shards(folder: Path) -> bool:
    """Whether a shard of a folder that is being prepared was finished."""
    return any((folder / WORK_FOLDER).glob("[0-9]*.json"))


def complete_shard(folder: Path, number: int) -> ShardRecord | None:
    """The record of a shard that is complete: every file is there, to the byte. None: it has to be written."""
    path = _record_path(folder, number)
    try:
        record = ShardRecord.read(path)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for name, stats in record.files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != stats.size or sha256_of_file(file) != stats.sha256:
            return None
    return record


def write_shard(
    documents: Iterable[Document],
    encoder: TextEncoder,
    *,
    folder: Path,
    number: int,
    eos_token_id: int,
    vocab_size: int,
    validation_fraction: float,
    tokenizer_hash: str,
    report: Callable[[int, int, int], None],
) -> ShardRecord:
    """Encode documents and write them as shard ``number`` of a folder. Documents without text are left out and counted.

    Args:
        documents: read once, in order.
        encoder: text to ids; every document is ended by ``eos_token_id``.
        report: told after each batch: documents, bytes of text, tokens.

    Raises:
        DataError: whatever the reader of the documents raises; a text that is no Unicode, or too long; an id outside
            the vocabulary.
    """
    work = folder / WORK_FOLDER
    work.mkdir(exist_ok=True)
    counts = np.zeros(vocab_size, dtype=np.int64)
    hashes: list[int] = []
    text_bytes = num_skipped = 0
    train_name, validation_name = shard_name(TRAIN, number), f"{WORK_FOLDER}/{shard_name(VALIDATION, number)}"
    with (
        TokenWriter(folder / train_name, vocab_size) as train,
        TokenWriter(folder / validation_name, vocab_size) as held,
    ):
        for batch in _batches(documents):
            sizes = [utf8_size(document) for document in batch]
            filled = [document for document, size in zip(batch, sizes, strict=True) if size]
            num_skipped += len(batch) - len(filled)
            before = train.num_tokens + held.num_tokens
            all_ended = [np.append(ids, eos_token_id) for ids in encoder.encode([document.text for document in filled])]
            for document, ended in zip(filled, all_ended, strict=True):
                hash_of_source = source_hash(document)
                if is_held_out(hash_of_source, validation_fraction):
                    held.add(ended, document.name)
                    hashes.append(hash_of_source)
                else:
                    train.add(ended, document.name)
            if all_ended:
                counts += np.bincount(np.concatenate(all_ended), minlength=vocab_size)
            text_bytes += sum(sizes)
            report(len(batch), sum(sizes), train.num_tokens + held.num_tokens - before)
    arrays = work / f"{number:05d}.npz"

    def save(path: Path) -> None:
        with path.open("wb") as stream:  # given a path, numpy would append .npz to it
            np.savez_compressed(
                stream, counts=counts, checksums=train.checksums, hashes=np.array(hashes, dtype=np.uint64)
            )

    write_file(arrays, save)
    files = {f"{train_name}.{suffix}": stats for suffix, stats in train.files.items()}
    files |= {f"{validation_name}.{suffix}": stats for suffix, stats in held.files.items()}
    files[f"{WORK_FOLDER}/{arrays.name}"] = FileStats(size=arrays.stat().st_size, sha256=sha256_of_file(arrays))
    record = ShardRecord(
        tokenizer_hash=tokenizer_hash,
        train_documents=train.num_documents,
        train_tokens=train.num_tokens,
        validation_documents=held.num_documents,
        validation_tokens=held.num_tokens,
        text_bytes=text_bytes,
        num_skipped=num_skipped,
        files=files,
    )
    fsync(folder)
    fsync(work)
    write_json(_record_path(folder, number), dataclasses.asdict(record))
    return record


def utf8_size(document: Document) -> int:
    """Bytes of the text in UTF-8.

    Raises:
        DataError: it cannot be written in UTF-8, or it is larger than is supported.
    """
    try:
        size = len(document.text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise DataError(
            str(document.name),
            f"character {error.start} of the text, {document.text[error.start]!r}, is half of a surrogate pair, "
            "which is no text",
            "repair the escapes of the file",
        ) from error
    if size > MAX_DOCUMENT_BYTES:
        raise DataError(
            str(document.name),
            f"is one document of {size} bytes, at most {MAX_DOCUMENT_BYTES} are supported",
            "cut the document, or take each line of a text file as a document (--sample-by line)",
        )
    return size


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


# ---------------------------------------------------------------------------------------------- all shards


def finish(
    folder: Path,
    records: list[ShardRecord],
    *,
    corpus: str,
    source: str,
    content_hash: str,
    inputs: list[InputStats],
    num_skipped: int,
    options: dict[str, int | float | str],
    vocab_size: int,
    eos_token_id: int,
    tokenizer_hash: str,
) -> None:
    """Make one corpus of the complete shards of a folder; ``tokenizer/`` is there. The manifest is written last, and
    then what only the preparation needed is removed.

    Args:
        records: of shard 0, 1, ...
        num_skipped: source files that were left out before there were documents.

    Raises:
        DataError: one of the parts is empty.
    """
    num_train = sum(record.train_documents for record in records)
    num_held_out = sum(record.validation_documents for record in records)
    if num_train + num_held_out == 0:
        raise DataError(str(folder), f"corpus {corpus} is empty: no input holds any text", "name inputs with text")
    if not num_train or not num_held_out:
        raise DataError(
            "data.validation_fraction",
            f"{options['validation_fraction']} leaves {num_train} documents of corpus {corpus} for training and "
            f"{num_held_out} for validation",
            "choose a fraction between 0 and 1 that leaves documents on both sides, or use more documents",
        )
    for path in folder.glob(f"{VALIDATION}.*"):
        path.unlink()
    files: dict[str, FileStats] = {}
    train_shards = []
    for number, record in enumerate(records):
        name = shard_name(TRAIN, number)
        if record.train_documents:
            stats = ShardStats(name=name, documents=record.train_documents, tokens=record.train_tokens)
            train_shards.append(stats)
            files |= {key: value for key, value in record.files.items() if not key.startswith(WORK_FOLDER)}
        else:
            for suffix in ("bin", "idx"):
                (folder / f"{name}.{suffix}").unlink(missing_ok=True)
    held = _merge_validation(folder, records, vocab_size)
    files |= {f"{VALIDATION}.{suffix}": stats for suffix, stats in held.files.items()}
    parts = {
        TRAIN: PartStats(documents=num_train, tokens=sum(shard.tokens for shard in train_shards)),
        VALIDATION: PartStats(documents=held.num_documents, tokens=held.num_tokens),
    }
    shards = {
        TRAIN: train_shards,
        VALIDATION: [ShardStats(name=VALIDATION, documents=held.num_documents, tokens=held.num_tokens)],
    }
    for part in (TRAIN, VALIDATION):
        write_places(folder, part, shards[part])
    counts = np.zeros(vocab_size, dtype=np.int64)
    checksums = []
    for number, record in enumerate(records):
        arrays = _arrays(folder, number)
        counts += arrays["counts"]
        if record.train_documents:
            checksums.append(arrays["checksums"])
    write_file(folder / "token_counts.npy", lambda path: _save(path, counts))
    write_file(folder / f"{TRAIN}.crc32.npy", lambda path: _save(path, np.concatenate(checksums)))
    write_file(folder / f"{VALIDATION}.crc32.npy", lambda path: _save(path, held.checksums))
    # Not all that is in the folder: what somebody else has put there is none of the corpus.
    of_parts = [f"{part}.{array}.npy" for part in (TRAIN, VALIDATION) for array in ("lengths", "starts", "crc32")]
    of_tokenizer = [path for path in sorted((folder / "tokenizer").rglob("*")) if path.is_file()]
    for path in [*(folder / name for name in of_parts), folder / "token_counts.npy", *of_tokenizer]:
        name = path.relative_to(folder).as_posix()
        files[name] = FileStats(size=path.stat().st_size, sha256=sha256_of_file(path))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        corpus=corpus,
        source=source,
        content_hash=content_hash,
        text_bytes=sum(record.text_bytes for record in records),
        num_skipped=num_skipped + sum(record.num_skipped for record in records),
        options=options,
        inputs=inputs,
        vocab_size=vocab_size,
        eos_token_id=eos_token_id,
        tokenizer_hash=tokenizer_hash,
        dtype=token_dtype(vocab_size).name,
        parts=parts,
        shards=shards,
        files=dict(sorted(files.items())),
    )
    fsync(folder)
    write_file(folder / MANIFEST_NAME, manifest.write)
    fsync(folder)
    shutil.rmtree(folder / WORK_FOLDER)


def write_places(folder: Path, part: str, shards: list[ShardStats]) -> None:
    """``<part>.lengths.npy`` and ``<part>.starts.npy`` from the indices of a part's shards, a shard at a time."""
    num_documents = sum(shard.documents for shard in shards)

    def lengths(path: Path) -> None:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.int32, shape=(num_documents,))
        place = 0
        for shard in shards:
            _, of_shard = read_index(folder / f"{shard.name}.idx")
            array[place : place + shard.documents] = of_shard
            place += shard.documents
        array.flush()

    def starts(path: Path) -> None:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.int64, shape=(num_documents + 1,))
        place = token = 0
        for shard in shards:
            _, of_shard = read_index(folder / f"{shard.name}.idx")
            array[place] = token
            np.cumsum(of_shard, dtype=np.int64, out=array[place + 1 : place + shard.documents + 1])
            array[place + 1 : place + shard.documents + 1] += token
            place += shard.documents
            token += shard.tokens
        array.flush()

    write_file(folder / f"{part}.lengths.npy", lengths)
    write_file(folder / f"{part}.starts.npy", starts)


def _merge_validation(folder: Path, records: list[ShardRecord], vocab_size: int) -> TokenWriter:
    """The held-out documents of all shards in the order of their sources' hashes, so that the first samples, which
    validation reads, are a sample of the corpus. Memory: 24 bytes a document; the tokens are read through maps."""
    sizes = [record.validation_documents for record in records]
    hashes = np.concatenate([_arrays(folder, number)["hashes"] for number in range(len(records))])
    shard_of = np.repeat(np.arange(len(records)), sizes)
    document_of = np.concatenate([np.arange(size) for size in sizes])
    dtype = token_dtype(vocab_size)
    opened: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def shard(number: int) -> tuple[np.ndarray, np.ndarray]:
        if number not in opened:
            while len(opened) >= 128:  # maps hold file descriptors
                del opened[next(iter(opened))]
            prefix = folder / WORK_FOLDER / shard_name(VALIDATION, number)
            _, lengths = read_index(prefix.with_name(f"{prefix.name}.idx"))
            starts = np.concatenate([[0], lengths.cumsum(dtype=np.int64)])
            opened[number] = (np.memmap(prefix.with_name(f"{prefix.name}.bin"), dtype=dtype, mode="r"), starts)
        return opened[number]

    with TokenWriter(folder / VALIDATION, vocab_size) as writer:
        for place in np.argsort(hashes, kind="stable").tolist():
            tokens, starts = shard(int(shard_of[place]))
            document = int(document_of[place])
            writer.add(tokens[starts[document] : starts[document + 1]], f"{folder}: held-out document {place}")
    return writer


def _arrays(folder: Path, number: int) -> Any:
    return np.load(folder / WORK_FOLDER / f"{number:05d}.npz", allow_pickle=False)


def _save(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as stream:  # given a path, numpy would append .npy to it
        np.save(stream, array, allow_pickle=False)
