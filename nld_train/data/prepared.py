"""A prepared corpus on disk: token files in Megatron's format, the tokenizer, and a manifest that vouches for them.

manifest.json
train.bin  train.idx              Megatron indexed dataset; every document ends with the end-of-text token
validation.bin  validation.idx    documents that no training file holds
token_counts.npy                  int64 [vocabulary]: how often each token occurs, in both parts together
tokenizer/                        Hugging Face tokenizer folder
"""

import dataclasses
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType

from nld_train.data.files import sha256_of_file
from nld_train.errors import DataError

FORMAT_VERSION = 2
"""Raised whenever the same text and options give other files; part of every cache's name."""

MANIFEST_NAME = "manifest.json"
TRAIN = "train"
VALIDATION = "validation"

# Files up to this size (bytes) are hashed whenever a corpus is opened; larger ones are checked by size and structure.
_HASH_LIMIT = 64 << 20

_INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_REMEDY = "prepare the corpus again, or copy the file again from where it was prepared"


@dataclass(frozen=True, slots=True, kw_only=True)
class PartStats:
    """Size of the training or the validation part; tokens include the end of each document."""

    documents: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStats:
    """Size in bytes and sha256 of one file of the folder."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """``manifest.json``: what went in, how, and what came out. No times in it: the same input gives the same bytes."""

    format_version: int
    corpus: str
    source: str
    content_hash: str  # sha256 of the text
    text_bytes: int
    num_skipped: int  # source files left out: empty or undecodable
    options: dict[str, int | float | str]
    vocab_size: int
    eos_token_id: int
    dtype: str  # of the .bin files
    parts: dict[str, PartStats]
    files: dict[str, FileStats]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Raises DataError: the file is missing, no JSON, of another format, or lacks a key."""
        try:
            raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(str(path), f"cannot be read: {error}", _REMEDY) from error
        if not isinstance(raw, dict) or raw.get("format_version") != FORMAT_VERSION:
            found = raw.get("format_version") if isinstance(raw, dict) else type(raw).__name__
            raise DataError(
                str(path),
                f"format_version is {found!r}, this version reads {FORMAT_VERSION}",
                "prepare the corpus again",
            )
        try:
            raw["parts"] = {name: PartStats(**part) for name, part in raw["parts"].items()}
            raw["files"] = {name: FileStats(**stats) for name, stats in raw["files"].items()}
            return cls(**raw)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(str(path), f"is not a manifest of a prepared corpus: {error}", _REMEDY) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedCorpus:
    """An opened and verified corpus folder."""

    folder: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        return self.manifest.corpus

    @property
    def vocab_size(self) -> int:
        return self.manifest.vocab_size

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / "tokenizer"

    def prefix(self, part: str) -> Path:
        """Path of a part's .bin and .idx without the suffix; ``part`` is ``TRAIN`` or ``VALIDATION``."""
        return self.folder / part

    def num_tokens(self, part: str) -> int:
        return self.manifest.parts[part].tokens

    def part_hash(self, part: str) -> str:
        """sha256 of a part's .bin: what an index over it is keyed by."""
        return self.manifest.files[f"{part}.bin"].sha256

    def documents(self, part: str) -> "TokenDocuments":
        """The documents of a part, as one sequence of documents."""
        path = self.prefix(part).with_suffix(".idx")
        return TokenDocuments(self.tokens(part), read_index(path)[1])

    def tokens(self, part: str) -> np.ndarray:
        """All tokens of a part, one document after the other: a read-only memory map [tokens]."""
        return np.memmap(self.prefix(part).with_suffix(".bin"), dtype=self.manifest.dtype, mode="r")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises DataError: the corpus has tokens that a model of ``vocab_size`` entries does not know."""
        if self.vocab_size > vocab_size:
            raise DataError(
                "model.vocab_size",
                f"{vocab_size} is smaller than the vocabulary of corpus {self.folder}: {self.vocab_size}",
                f"set model.vocab_size to at least {self.vocab_size}, or prepare the corpus with a smaller tokenizer",
            )

    def check_mask_token(self, mask_token_id: int) -> None:
        """The mask token must not be data: a model cannot tell it from a token to be predicted.

        Raises:
            DataError: it occurs; names the file and the document.
        """
        counts = np.load(self.folder / "token_counts.npy")
        if mask_token_id >= len(counts) or counts[mask_token_id] == 0:
            return
        for part in (TRAIN, VALIDATION):
            positions = np.flatnonzero(self.tokens(part) == mask_token_id)
            if len(positions):
                _, lengths = read_index(self.prefix(part).with_suffix(".idx"))
                document = int(np.searchsorted(np.cumsum(lengths, dtype=np.int64), positions[0], side="right"))
                raise DataError(
                    str(self.prefix(part).with_suffix(".bin")),
                    f"document {document} contains the mask token, objective.mask_token_id = {mask_token_id} "
                    f"(token {positions[0]} of the file; {counts[mask_token_id]} times in the corpus)",
                    "set objective.mask_token_id to an id that the tokenizer never gives to text (<mask> is 3 in the "
                    "tokenizers trained here, 100 in Tekken)",
                )
        raise DataError(
            str(self.folder / "token_counts.npy"),
            f"counts token {mask_token_id} {counts[mask_token_id]} times, the token files do not hold it",
            _REMEDY,
        )


class TokenDocuments:
    """The tokens of many documents, read through memory maps.

    Args:
        tokens: memory map [tokens], one document after the other.
        lengths: int32 [documents], tokens of each document.
    """

    def __init__(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        self.sequence_lengths = lengths
        self._tokens = tokens
        self._starts = np.concatenate([[0], lengths.cumsum(dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def get(self, document: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens [offset, offset + length) of a document (None: to its end), in the dtype of the files."""
        start, end = int(self._starts[document]) + offset, int(self._starts[document + 1])
        return self._tokens[start : end if length is None else start + length]


def read_index(path: Path) -> tuple[type[np.number], np.ndarray]:
    """The dtype of the tokens and the length of each sequence (int32 [sequences]) from a Megatron .idx file.

    Read here and not by Megatron, whose reader answers a damaged file with a bare assertion.

    Raises:
        DataError: not an .idx file, or cut short.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        header = stream.read(_INDEX_HEADER.size)
    if len(header) < _INDEX_HEADER.size:
        raise DataError(str(path), f"is cut short: {size} bytes, the header alone has {_INDEX_HEADER.size}", _REMEDY)
    magic, version, code, num_sequences, num_boundaries = _INDEX_HEADER.unpack(header)
    known = {dtype.value for dtype in DType}
    if magic != _INDEX_MAGIC or version != 1 or code not in known:
        raise DataError(str(path), f"is not a Megatron index: it begins with {header[:18]!r}", _REMEDY)
    expected = _INDEX_HEADER.size + 12 * num_sequences + 8 * num_boundaries  # int32 lengths, int64 offsets, boundaries
    if size != expected:
        raise DataError(
            str(path), f"holds {size} bytes, its header describes {expected} ({num_sequences} sequences)", _REMEDY
        )
    if num_sequences == 0:
        return DType.dtype_from_code(code), np.empty(0, dtype=np.int32)
    lengths = np.memmap(path, dtype=np.int32, mode="r", offset=_INDEX_HEADER.size, shape=(num_sequences,))
    return DType.dtype_from_code(code), lengths


def open_prepared(folder: Path) -> PreparedCorpus:
    """Open a prepared corpus and check that its files are the ones that its manifest speaks of.

    Raises:
        DataError: naming the file that is missing, cut short, replaced or empty.
    """
    manifest_path = folder / MANIFEST_NAME
    if not manifest_path.is_file():
        raise DataError(str(folder), f"is not a prepared corpus: it has no {MANIFEST_NAME}", "name a prepared folder")
    manifest = Manifest.read(manifest_path)
    needed = {f"{part}.{suffix}" for part in (TRAIN, VALIDATION) for suffix in ("bin", "idx")} | {"token_counts.npy"}
    missing = sorted(needed - set(manifest.files)) or sorted({TRAIN, VALIDATION} - set(manifest.parts))
    if missing:
        raise DataError(str(manifest_path), f"says nothing of {', '.join(missing)}", _REMEDY)
    for name, stats in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise DataError(str(path), f"is missing; {MANIFEST_NAME} lists it", _REMEDY)
        size = path.stat().st_size
        if size != stats.size:
            raise DataError(str(path), f"holds {size} bytes, {MANIFEST_NAME} says {stats.size}", _REMEDY)
    for part, expected in manifest.parts.items():
        _check_part(folder, part, manifest, expected)
    for name, stats in manifest.files.items():
        if stats.size <= _HASH_LIMIT and sha256_of_file(folder / name) != stats.sha256:
            raise DataError(str(folder / name), f"is not the file that {MANIFEST_NAME} lists (sha256 differs)", _REMEDY)
    return PreparedCorpus(folder=folder, manifest=manifest)


def _check_part(folder: Path, part: str, manifest: Manifest, expected: PartStats) -> None:
    bin_path, idx_path = folder / f"{part}.bin", folder / f"{part}.idx"
    dtype, lengths = read_index(idx_path)
    if np.dtype(dtype).name != manifest.dtype:
        raise DataError(
            str(idx_path), f"describes {np.dtype(dtype).name} tokens, {MANIFEST_NAME} {manifest.dtype}", _REMEDY
        )
    described = int(lengths.sum(dtype=np.int64)) * np.dtype(dtype).itemsize
    held = bin_path.stat().st_size
    if described != held:
        raise DataError(
            str(idx_path),
            f"is the index of another file: it describes {described} bytes, {bin_path} holds {held}",
            _REMEDY,
        )
    found = PartStats(documents=len(lengths), tokens=held // np.dtype(dtype).itemsize)
    if found != expected:
        raise DataError(
            str(idx_path),
            f"describes {found.documents} documents and {found.tokens} tokens, {MANIFEST_NAME} says "
            f"{expected.documents} and {expected.tokens}",
            _REMEDY,
        )
    if found.tokens == 0:
        raise DataError(str(bin_path), f"the {part} part is empty", "prepare the corpus again with more text")
