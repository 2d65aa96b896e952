"""A prepared corpus on disk: token files in Megatron's format, the tokenizer, and a manifest that vouches for them.

manifest.json
train-00000.bin  train-00000.idx ...    shards, Megatron indexed datasets; every document ends with the end token
validation.bin  validation.idx          documents that no training file holds, in the order of their sources' hashes
<part>.lengths.npy                      int32 [documents]: tokens of each document, over all shards of the part
<part>.starts.npy                       int64 [documents + 1]: tokens of the part before each document, and all
<part>.crc32.npy                        uint32: checksums of the .bin files, a number for each 4096 bytes of a shard
token_counts.npy                        int64 [vocabulary]: how often each token occurs, in both parts together
tokenizer/                              Hugging Face tokenizer folder

A corpus may have ten thousand shards: opening it looks at the sizes of the files and reads what stands once for all
shards. A shard's own index is compared with that when the shard is first read, or at once where there are few. Tokens
are compared with their checksums whenever they are read, so no byte that has changed is ever trained on.
"""

import dataclasses
import hashlib
import json
import struct
import zlib
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nld_train.data.files import sha256_of_file
from nld_train.errors import DataError

FORMAT_VERSION = 4
"""Raised whenever the same text and options give other files; part of every cache's name."""

MANIFEST_NAME = "manifest.json"
TRAIN = "train"
VALIDATION = "validation"

WORK_FOLDER = ".preparing"
"""In a folder that is being prepared: what is needed to go on after an interruption. A complete one has it no more."""

CHECKSUM_BYTES = 4096
"""Of a .bin file that have a checksum: a page, so that checking reads no more of the disk than reading does."""

# Files up to this size (bytes) are hashed whenever a corpus is opened; larger ones are checked by size and structure.
_HASH_LIMIT = 64 << 20
# Parts with more shards than this are neither hashed nor read when a corpus is opened, but on first use.
_EAGER_SHARDS = 16
# Memory maps hold file descriptors, of which a process has 1024 by default.
_MAX_OPEN_SHARDS = 256
_opened: OrderedDict[Path, np.ndarray] = OrderedDict()
"""Tokens of the shards that this process has mapped, of all corpora, the least recently opened first."""

INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
INDEX_MAGIC = b"MMIDIDX\x00\x00"
# Megatron's codes. They are written out here since importing Megatron takes seconds, in each preparing process.
DTYPE_CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}
_DTYPES = {code: np.dtype(name) for name, code in DTYPE_CODES.items()}
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
class InputStats:
    """An input file: its path below the folder that all inputs share, size in bytes, sha256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardStats:
    """``<name>.bin`` and ``<name>.idx``; the shards of a part follow one another."""

    name: str
    documents: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """``manifest.json``: what went in, how, and what came out. No times in it: the same input gives the same bytes."""

    format_version: int
    corpus: str
    source: str
    content_hash: str  # sha256 of what was read
    text_bytes: int
    num_skipped: int  # left out: empty documents, source files that are empty or undecodable
    options: dict[str, int | float | str]
    inputs: list[InputStats]
    vocab_size: int
    eos_token_id: int
    tokenizer_hash: str  # sha256_of_folder
    dtype: str  # of the .bin files
    parts: dict[str, PartStats]
    shards: dict[str, list[ShardStats]]  # of each part
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
            raw["shards"] = {name: [ShardStats(**shard) for shard in part] for name, part in raw["shards"].items()}
            raw["inputs"] = [InputStats(**stats) for stats in raw["inputs"]]
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

    def prefix(self, part: str, shard: int = 0) -> Path:
        """Path of a shard's .bin and .idx without the suffix; ``part`` is ``TRAIN`` or ``VALIDATION``."""
        return self.folder / self.manifest.shards[part][shard].name

    def num_tokens(self, part: str) -> int:
        return self.manifest.parts[part].tokens

    def part_hash(self, part: str) -> str:
        """sha256 over those of a part's .bin files: what an index over it is keyed by."""
        hashes = [self.manifest.files[f"{shard.name}.bin"].sha256 for shard in self.manifest.shards[part]]
        return hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    def documents(self, part: str) -> "TokenDocuments":
        """The documents of a part, as one sequence of documents."""
        return TokenDocuments(self, part)

    def tokens(self, part: str, shard: int = 0) -> np.ndarray:
        """All tokens of a shard, one document after the other: a read-only memory map [tokens].

        The validation part is one shard.
        """
        path = _with_suffix(self.prefix(part, shard), "bin")
        return np.memmap(path, dtype=self.manifest.dtype, mode="r")

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
        for part, shards in self.manifest.shards.items():
            for shard in range(len(shards)):
                positions = np.flatnonzero(self.tokens(part, shard) == mask_token_id)
                if not len(positions):
                    continue
                prefix = self.prefix(part, shard)
                _, lengths = read_index(_with_suffix(prefix, "idx"))
                document = int(np.searchsorted(np.cumsum(lengths, dtype=np.int64), positions[0], side="right"))
                raise DataError(
                    str(_with_suffix(prefix, "bin")),
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
    """The documents of a part, read through memory maps. A shard is mapped when it is read; a bounded number stays.
    What is read is compared with its checksums.

    Args:
        corpus: an opened corpus.
        part: ``TRAIN`` or ``VALIDATION``.

    Attributes:
        sequence_lengths: int32 [documents], tokens of each document.

    Raises:
        DataError: on reading, a shard whose files are not those that were prepared; names the file and the offset.
    """

    def __init__(self, corpus: PreparedCorpus, part: str) -> None:
        self.sequence_lengths = _load(corpus.folder / f"{part}.lengths.npy")
        self._starts = _load(corpus.folder / f"{part}.starts.npy")
        self._checksums = _load(corpus.folder / f"{part}.crc32.npy")
        self._corpus = corpus
        self._part = part
        shards = corpus.manifest.shards[part]
        self._first_documents = np.cumsum([0, *(shard.documents for shard in shards)]).tolist()
        self._first_tokens = np.cumsum([0, *(shard.tokens for shard in shards)]).tolist()
        item_size = np.dtype(corpus.manifest.dtype).itemsize
        self._first_checksums = np.cumsum([0, *(num_checksums(shard.tokens * item_size) for shard in shards)]).tolist()
        self._checked: set[int] = set()

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def get(self, document: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens [offset, offset + length) of a document (None: to its end), in the dtype of the files."""
        shard = bisect_right(self._first_documents, document) - 1
        before = self._first_tokens[shard]
        start, end = int(self._starts[document]) - before + offset, int(self._starts[document + 1]) - before
        return self.read(shard, start, end if length is None else min(end, start + length))

    def read(self, shard: int, start: int, end: int) -> np.ndarray:
        """Tokens [start, end) of a shard, whatever documents they belong to."""
        held = self._tokens(shard)
        self._check(shard, held, start, end)  # all that is asked for: a file that was cut short has less
        return held[start:end]

    def _check(self, shard: int, held: np.ndarray, start: int, end: int) -> None:
        """Compare tokens [start, end) of a shard, and what else is in their blocks, with the checksums."""
        content, first_checksum = held.view(np.uint8).data, self._first_checksums[shard]
        for block in range(start * held.itemsize // CHECKSUM_BYTES, num_checksums(end * held.itemsize)):
            offset = block * CHECKSUM_BYTES
            if zlib.crc32(content[offset : offset + CHECKSUM_BYTES]) != self._checksums[first_checksum + block]:
                raise DataError(
                    str(_with_suffix(self._corpus.prefix(self._part, shard), "bin")),
                    f"has changed since it was prepared: the {CHECKSUM_BYTES} bytes from offset {offset} do not have "
                    f"the checksum that {self._part}.crc32.npy lists",
                    f"{_REMEDY} (prepare_data.py inspect FOLDER --verify tells which of the two has changed)",
                )

    def _tokens(self, shard: int) -> np.ndarray:
        path = _with_suffix(self._corpus.prefix(self._part, shard), "bin")
        tokens = _opened.get(path)
        if shard not in self._checked:
            check_shard(self._corpus, self._part, shard, self.sequence_lengths, self._first_documents[shard])
            first, last = self._first_documents[shard], self._first_documents[shard + 1]
            if not np.array_equal(np.diff(self._starts[first : last + 1]), self.sequence_lengths[first:last]):
                raise DataError(
                    str(self._corpus.folder / f"{self._part}.starts.npy"),
                    f"does not agree with {self._part}.lengths.npy in documents {first} to {last - 1}",
                    _REMEDY,
                )
            self._checked.add(shard)
            tokens = None  # another file of that name may have been mapped before
        if tokens is None:
            # A plain view of the map: slices of a memmap cost microseconds each.
            tokens = np.asarray(self._corpus.tokens(self._part, shard)).view(np.ndarray)
            _opened.pop(path, None)
            while len(_opened) >= _MAX_OPEN_SHARDS:
                _opened.popitem(last=False)
            _opened[path] = tokens
        return tokens


def num_checksums(num_bytes: int) -> int:
    """Checksums of the first ``num_bytes`` of a .bin file."""
    return -(-num_bytes // CHECKSUM_BYTES)


def read_index(path: Path) -> tuple[np.dtype, np.ndarray]:
    """The dtype of the tokens and the length of each sequence (int32 [sequences]) from a Megatron .idx file.

    Read here and not by Megatron, whose reader answers a damaged file with a bare assertion.

    Raises:
        DataError: not an .idx file, or cut short.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        header = stream.read(INDEX_HEADER.size)
    if len(header) < INDEX_HEADER.size:
        raise DataError(str(path), f"is cut short: {size} bytes, the header alone has {INDEX_HEADER.size}", _REMEDY)
    magic, version, code, num_sequences, num_boundaries = INDEX_HEADER.unpack(header)
    if magic != INDEX_MAGIC or version != 1 or code not in _DTYPES:
        raise DataError(str(path), f"is not a Megatron index: it begins with {header[:18]!r}", _REMEDY)
    expected = INDEX_HEADER.size + 12 * num_sequences + 8 * num_boundaries  # int32 lengths, int64 offsets, boundaries
    if size != expected:
        raise DataError(
            str(path), f"holds {size} bytes, its header describes {expected} ({num_sequences} sequences)", _REMEDY
        )
    if num_sequences == 0:
        return _DTYPES[code], np.empty(0, dtype=np.int32)
    lengths = np.memmap(path, dtype=np.int32, mode="r", offset=INDEX_HEADER.size, shape=(num_sequences,))
    return _DTYPES[code], lengths


def open_prepared(folder: Path) -> PreparedCorpus:
    """Open a prepared corpus and check that its files are the ones that its manifest speaks of.

    Raises:
        DataError: naming the file that is missing, cut short, replaced or empty.
    """
    manifest_path = folder / MANIFEST_NAME
    if not manifest_path.is_file():
        if (folder / WORK_FOLDER).is_dir():
            raise DataError(
                str(folder), "is a corpus whose preparation was interrupted", "run the command that prepared it again"
            )
        raise DataError(str(folder), f"is not a prepared corpus: it has no {MANIFEST_NAME}", "name a prepared folder")
    manifest = Manifest.read(manifest_path)
    _check_manifest(manifest, manifest_path)
    for name, stats in manifest.files.items():
        try:
            size = (folder / name).stat().st_size
        except FileNotFoundError as error:
            raise DataError(str(folder / name), f"is missing; {MANIFEST_NAME} lists it", _REMEDY) from error
        if size != stats.size:
            raise _wrong_size(folder, name, size, manifest)
    corpus = PreparedCorpus(folder=folder, manifest=manifest)
    skipped: set[str] = set()
    for part, shards in manifest.shards.items():
        lengths = _check_places(corpus, part)
        if len(shards) > _EAGER_SHARDS:
            skipped |= {f"{shard.name}.{suffix}" for shard in shards for suffix in ("bin", "idx")}
            continue
        first = 0
        for number, shard in enumerate(shards):
            check_shard(corpus, part, number, lengths, first)
            first += shard.documents
    for name, stats in manifest.files.items():
        is_hashed = stats.size <= _HASH_LIMIT and name not in skipped
        if is_hashed and sha256_of_file(folder / name) != stats.sha256:
            raise DataError(str(folder / name), f"is not the file that {MANIFEST_NAME} lists (sha256 differs)", _REMEDY)
    _check_counts(corpus)
    return corpus


def verify(corpus: PreparedCorpus, *, progress: Any = None) -> None:
    """Hash every file of an opened corpus.

    Raises:
        DataError: naming the file that is not the one that the manifest lists.
    """
    for name, stats in corpus.manifest.files.items():
        path = corpus.folder / name
        if sha256_of_file(path) != stats.sha256:
            raise DataError(str(path), f"is not the file that {MANIFEST_NAME} lists (sha256 differs)", _REMEDY)
        if progress is not None:
            progress.advance(1, stats.size)


def check_shard(corpus: PreparedCorpus, part: str, shard: int, lengths: np.ndarray, first: int) -> None:
    """Compare a shard's index with its tokens, the manifest, and what the corpus says of its documents.

    Args:
        lengths: of all documents of the part, int32 [documents].
        first: number of the shard's first document among them.

    Raises:
        DataError: one of the files is another one's.
    """
    manifest, prefix = corpus.manifest, corpus.prefix(part, shard)
    bin_path, idx_path = _with_suffix(prefix, "bin"), _with_suffix(prefix, "idx")
    stats = manifest.shards[part][shard]
    try:
        dtype, found = read_index(idx_path)
        held = bin_path.stat().st_size
    except FileNotFoundError as error:
        raise DataError(str(error.filename), f"is missing; {MANIFEST_NAME} lists it", _REMEDY) from error
    if dtype.name != manifest.dtype:
        raise DataError(str(idx_path), f"describes {dtype.name} tokens, {MANIFEST_NAME} {manifest.dtype}", _REMEDY)
    described = int(found.sum(dtype=np.int64)) * dtype.itemsize
    if described != held:
        raise DataError(
            str(idx_path),
            f"is the index of another file: it describes {described} bytes, {bin_path} holds {held}",
            _REMEDY,
        )
    if (len(found), held // dtype.itemsize) != (stats.documents, stats.tokens):
        raise DataError(
            str(idx_path),
            f"describes {len(found)} documents and {held // dtype.itemsize} tokens, {MANIFEST_NAME} says "
            f"{stats.documents} and {stats.tokens}",
            _REMEDY,
        )
    expected = lengths[first : first + stats.documents]
    if not np.array_equal(found, expected):
        document = int(np.flatnonzero(found != expected)[0])
        raise DataError(
            str(idx_path),
            f"is the index of another file: its document {document} has {found[document]} tokens, "
            f"{part}.lengths.npy says {expected[document]}",
            _REMEDY,
        )


def _check_manifest(manifest: Manifest, path: Path) -> None:
    parts = {TRAIN, VALIDATION}
    missing = sorted(parts - set(manifest.parts)) or sorted(parts - set(manifest.shards))
    if not missing:
        needed = {f"{part}.{array}.npy" for part in parts for array in ("lengths", "starts", "crc32")}
        needed.add("token_counts.npy")
        for shards in manifest.shards.values():
            needed |= {f"{shard.name}.{suffix}" for shard in shards for suffix in ("bin", "idx")}
        missing = sorted(needed - set(manifest.files))
    if missing:
        raise DataError(str(path), f"says nothing of {', '.join(missing[:5])}", _REMEDY)
    if manifest.dtype not in ("uint16", "int32"):
        raise DataError(str(path), f"names the dtype {manifest.dtype!r}, tokens are uint16 or int32", _REMEDY)
    if not 0 <= manifest.eos_token_id < manifest.vocab_size:
        raise DataError(
            str(path),
            f"ends documents with token {manifest.eos_token_id}, the vocabulary has {manifest.vocab_size} entries",
            _REMEDY,
        )
    for part, stats in manifest.parts.items():
        shards = manifest.shards[part]
        total = PartStats(
            documents=sum(shard.documents for shard in shards), tokens=sum(shard.tokens for shard in shards)
        )
        if total != stats:
            raise DataError(
                str(path),
                f"gives the {part} part {stats.documents} documents and {stats.tokens} tokens, its shards have "
                f"{total.documents} and {total.tokens}",
                _REMEDY,
            )
        if stats.tokens == 0:
            name = f"{shards[0].name}.bin" if shards else str(path.name)
            raise DataError(
                str(path.parent / name), f"the {part} part is empty", "prepare the corpus again with more text"
            )
    if len(manifest.shards[VALIDATION]) != 1:
        raise DataError(str(path), "the validation part is not one shard", _REMEDY)


def _check_places(corpus: PreparedCorpus, part: str) -> np.ndarray:
    """Lengths of the part's documents; all arrays have the manifest's sizes and agree with it at every shard's ends."""
    stats, shards = corpus.manifest.parts[part], corpus.manifest.shards[part]
    lengths_path, starts_path = (corpus.folder / f"{part}.{name}.npy" for name in ("lengths", "starts"))
    lengths, starts = _load(lengths_path), _load(starts_path)
    if lengths.shape != (stats.documents,) or lengths.dtype != np.int32:
        raise DataError(
            str(lengths_path), f"holds {lengths.dtype} {lengths.shape}, not int32 {(stats.documents,)}", _REMEDY
        )
    if starts.shape != (stats.documents + 1,) or starts.dtype != np.int64:
        raise DataError(
            str(starts_path), f"holds {starts.dtype} {starts.shape}, not int64 {(stats.documents + 1,)}", _REMEDY
        )
    checksums_path, item_size = corpus.folder / f"{part}.crc32.npy", np.dtype(corpus.manifest.dtype).itemsize
    checksums, num = _load(checksums_path), sum(num_checksums(shard.tokens * item_size) for shard in shards)
    if checksums.shape != (num,) or checksums.dtype != np.uint32:
        raise DataError(str(checksums_path), f"holds {checksums.dtype} {checksums.shape}, not uint32 {(num,)}", _REMEDY)
    ends = np.cumsum([0, *(shard.documents for shard in shards)])
    if not np.array_equal(starts[ends], np.cumsum([0, *(shard.tokens for shard in shards)])):
        raise DataError(str(starts_path), f"is of another corpus: its shards are not those of {MANIFEST_NAME}", _REMEDY)
    return lengths


def _check_counts(corpus: PreparedCorpus) -> None:
    path = corpus.folder / "token_counts.npy"
    counts, manifest = _load(path), corpus.manifest
    beyond = np.flatnonzero(counts[manifest.vocab_size :])
    if len(beyond):
        token = manifest.vocab_size + int(beyond[0])
        raise DataError(
            str(path),
            f"counts token {token} {counts[token]} times; the vocabulary has {manifest.vocab_size} entries",
            "prepare the corpus again with the tokenizer that its tokens belong to",
        )
    total = sum(part.tokens for part in manifest.parts.values())
    if int(counts.sum()) != total:
        raise DataError(str(path), f"counts {int(counts.sum())} tokens, {MANIFEST_NAME} {total}", _REMEDY)


def _wrong_size(folder: Path, name: str, size: int, manifest: Manifest) -> DataError:
    what = f"holds {size} bytes, {MANIFEST_NAME} says {manifest.files[name].size}"
    for part, shards in manifest.shards.items():
        first = before = 0
        for shard in shards:
            if name == f"{shard.name}.bin" and size < manifest.files[name].size:
                try:
                    starts = _load(folder / f"{part}.starts.npy")[first : first + shard.documents + 1] - before
                except DataError:
                    break
                place = size // np.dtype(manifest.dtype).itemsize
                document = int(np.searchsorted(starts, place, side="right")) - 1
                what += f"; it ends at offset {size}, in document {document} of {shard.documents}"
            first += shard.documents
            before += shard.tokens
    return DataError(str(folder / name), what, _REMEDY)


def _load(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(str(path), f"cannot be read: {error}", _REMEDY) from error
    # A plain view of the map: taking elements of a memmap costs microseconds each.
    return np.asarray(array).view(np.ndarray)


def _with_suffix(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(f"{prefix.name}.{suffix}")
