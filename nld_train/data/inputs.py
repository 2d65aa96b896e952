"""Input files to documents: which bytes belong to which shard, and what stands where, for messages.

JSONL and text are read here, line by line, because an error has to say which line it is in and at which byte, and since
a range of bytes can be read alone. Parquet, Arrow and what is on the Hub are read by the ``datasets`` library.
"""

import glob
import gzip
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import zstandard

from nld_train.data.corpora import Document
from nld_train.errors import DataError

if TYPE_CHECKING:
    from datasets import IterableDataset

Item = TypeVar("Item")
Name = TypeVar("Name", str, Path)

MAX_LINE_BYTES = 512 << 20
"""A longer line is refused: it is held in memory."""

_CHUNK = 1 << 20
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


class Format(StrEnum):
    """What a file holds: a JSON object in each line; text; columns."""

    jsonl = "jsonl"
    txt = "txt"
    parquet = "parquet"
    arrow = "arrow"
    hub = "hub"


class SampleBy(StrEnum):
    """What is a document of a text file."""

    document = "document"
    line = "line"


_SUFFIXES = {
    ".jsonl": Format.jsonl,
    ".ndjson": Format.jsonl,
    ".txt": Format.txt,
    ".text": Format.txt,
    ".md": Format.txt,
    ".rst": Format.txt,
    ".parquet": Format.parquet,
    ".arrow": Format.arrow,
}
_COMPRESSIONS = (".gz", ".zst")


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """``name``: the path below the folder that all inputs share (or the name on the Hub); ``size``: bytes."""

    name: str
    path: Path
    format: Format
    size: int
    revision: str = ""  # on the Hub: the commit
    modified_ns: int = 0  # of a file: its time of modification, when it was found


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of input ``file`` that one shard reads: bytes [start, end) of a text file that is not compressed, row
    groups [start, end) of a Parquet file, shards [start, end) of a dataset on the Hub; else the whole file."""

    file: int
    start: int
    end: int
    size: int  # about so many bytes of input


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """What of the inputs is read.

    Args:
        text_field: of an object or row: its text.
        source_field: the text that it is taken from, by which it is held out; None: its text.
        sample_by: what is a document of a text file.
        split: of a dataset on the Hub.
        config_name: of a dataset on the Hub; empty: its default.
    """

    text_field: str = "text"
    source_field: str | None = None
    sample_by: SampleBy = SampleBy.document
    split: str = "train"
    config_name: str = ""


# ---------------------------------------------------------------------------------------------- which files


def find_inputs(names: Sequence[str], format_: Format | None = None) -> list[InputFile]:
    """The files that paths, patterns, folders and names on the Hub mean, in a fixed order.

    Args:
        names: as given by the user.
        format_: of all of them; None: by the suffix.

    Raises:
        DataError: a name means nothing, a suffix is not known, a file is meant twice.
    """
    paths: list[Path] = []
    hub: list[InputFile] = []
    for name in names:
        path = Path(name)
        if format_ is Format.hub:
            hub.append(_hub_input(name))
        elif path.is_dir():
            found = sorted(
                file
                for file in path.rglob("*")
                if file.is_file() and (format_ or _format_of(file)) and _is_visible(file.relative_to(path))
            )
            if not found:
                raise DataError(
                    name, "is a folder without input files", f"known are {', '.join(_SUFFIXES)}, + .gz, .zst"
                )
            paths += found
        elif path.is_file():
            paths.append(path)
        elif glob.has_magic(name):
            found = sorted(Path(file) for file in glob.glob(name, recursive=True) if Path(file).is_file())
            if not found:
                raise DataError(name, "matches no file", "correct the pattern")
            paths += found
        elif _HUB_NAME.fullmatch(name) and not _format_of(path):
            hub.append(_hub_input(name))
        else:
            raise DataError(name, "is neither a file, a folder, a pattern nor a name on the Hub", "correct the path")
    resolved = [path.resolve() for path in paths]
    if (twice := _first_twice(resolved)) is not None:
        raise DataError(str(twice), "is given twice", "name each input once")
    root = Path(os.path.commonpath([path.parent for path in resolved])) if resolved else Path()
    files = []
    for path in sorted(resolved):
        found_format = format_ or _format_of(path)
        if found_format is None:
            raise DataError(
                str(path),
                f"has an unknown suffix; known are {', '.join(_SUFFIXES)}, with .gz or .zst behind those of text",
                f"name the format with --format ({', '.join(Format)})",
            )
        stat = path.stat()
        files.append(
            InputFile(
                name=path.relative_to(root).as_posix(),
                path=path,
                format=found_format,
                size=stat.st_size,
                modified_ns=stat.st_mtime_ns,
            )
        )
    files += sorted(hub, key=lambda file: file.name)
    if (twice_named := _first_twice([file.name for file in files])) is not None:
        raise DataError(twice_named, "is the name of two inputs", "name each input once, under a name of its own")
    return files


def _first_twice(items: Sequence[Name]) -> Name | None:
    """The smallest of the items that occur more than once."""
    return min((item for item, count in Counter(items).items() if count > 1), default=None)


def _is_visible(path: Path) -> bool:
    return not any(part.startswith(".") for part in path.parts)


def check_unchanged(file: InputFile) -> None:
    """What is read must be what was found and hashed, hours before at the size of a large corpus.

    Raises:
        DataError: the file has another size or time of modification.
    """
    if file.format is Format.hub:
        return
    stat = file.path.stat()
    if (stat.st_size, stat.st_mtime_ns) != (file.size, file.modified_ns):
        raise DataError(str(file.path), "was changed while it was prepared", "prepare again, into an empty folder")


def _format_of(path: Path) -> Format | None:
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        found = _SUFFIXES.get(suffixes[-2]) if len(suffixes) > 1 else None
        return found if found in (Format.jsonl, Format.txt) else None
    return _SUFFIXES.get(path.suffix)


def _hub_input(name: str) -> InputFile:
    """The dataset at a commit: what is read after an interruption is what was read before it."""
    from huggingface_hub import HfApi

    repository, _, revision = name.partition("@")
    if Path(repository).is_dir():  # a folder that is laid out like a repository of the Hub
        return InputFile(name=Path(repository).name, path=Path(repository), format=Format.hub, size=0)
    try:
        commit = HfApi().dataset_info(repository, revision=revision or None).sha
    except Exception as error:  # no network, no such dataset, no access: the library has an exception for each
        raise DataError(
            name, f"is no file, and cannot be found on the Hub: {error}", "correct the path, or see to the network"
        ) from error
    return InputFile(name=repository, path=Path(repository), format=Format.hub, size=0, revision=commit or "")


# ---------------------------------------------------------------------------------------------- which shards


def plan_shards(files: Sequence[InputFile], options: ReadOptions, shard_bytes: int) -> list[list[Piece]]:
    """What each shard reads: about ``shard_bytes`` of input. A pure function of the files' sizes and the options.

    Raises:
        DataError: a file that cannot be opened; a column that is not there.
    """
    shards: list[list[Piece]] = []
    filled = 0
    for number, file in enumerate(files):
        for start, end, size in _cuts(file, options, shard_bytes):
            if not shards or filled + size > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(Piece(file=number, start=start, end=end, size=size))
            filled += size
    return shards


def _cuts(file: InputFile, options: ReadOptions, shard_bytes: int) -> list[tuple[int, int, int]]:
    if file.format is Format.parquet:
        return _row_groups(file, options, shard_bytes)
    if file.format is Format.hub:
        return [(number, number + 1, shard_bytes) for number in range(_dataset(file, options).num_shards)]
    can_cut = file.format is Format.jsonl or (file.format is Format.txt and options.sample_by is SampleBy.line)
    if not can_cut or file.path.suffix in _COMPRESSIONS:
        return [(0, file.size, file.size)]
    count = max(1, -(-file.size // shard_bytes))
    ends = [file.size * place // count for place in range(count + 1)]
    return [(start, end, end - start) for start, end in pairwise(ends)]


def _row_groups(file: InputFile, options: ReadOptions, shard_bytes: int) -> list[tuple[int, int, int]]:
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException

    try:
        with parquet.ParquetFile(file.path) as stream:
            metadata = stream.metadata
            names = list(stream.schema_arrow.names)
            sizes = [metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)]
    except (ArrowException, OSError) as error:
        raise DataError(str(file.path), f"is no Parquet file: {error}", "get or write the file again") from error
    _check_columns(file, options, names)
    cuts: list[tuple[int, int, int]] = []
    start = size = 0
    for number, of_group in enumerate(sizes):
        if number > start and size + of_group > shard_bytes:
            cuts.append((start, number, size))
            start, size = number, 0
        size += of_group
    return [*cuts, (start, len(sizes), size)] if sizes else []


def _check_columns(file: InputFile, options: ReadOptions, names: Sequence[str]) -> None:
    for flag, field in (("--text-field", options.text_field), ("--source-field", options.source_field)):
        if field is not None and field not in names:
            raise DataError(
                str(file.path), f"has no column {field!r}; it has {', '.join(names)}", f"name one of them with {flag}"
            )


# ---------------------------------------------------------------------------------------------- documents


class PieceReader:
    """The documents of a piece, in order. ``consumed``: bytes of input so far, for the progress.

    Args:
        file: the piece's.
        piece: what to read.
        options: which fields.

    Raises:
        DataError: on reading; names the file, the line or row, and where in it something is wrong.
    """

    def __init__(self, file: InputFile, piece: Piece, options: ReadOptions) -> None:
        self._file = file
        self._piece = piece
        self._options = options
        self.consumed = 0

    def __iter__(self) -> Iterator[Document]:
        if self._file.format is Format.txt:
            yield from self._unchanged(self._text())
            return
        for name, raw in self.records():
            if raw is None:
                yield Document(name=name, text="")  # counted as left out
                continue
            text = self._field(raw, self._options.text_field, "--text-field", name)
            source = None
            if self._options.source_field is not None:
                source = self._field(raw, self._options.source_field, "--source-field", name)
            yield Document(name=name, text=text, source=source)

    def records(self) -> Iterator[tuple[str, dict[str, Any] | None]]:
        """The objects or rows, each with the name of its place (made when it is printed); None: an empty line."""
        if self._file.format is Format.txt:
            raise DataError(str(self._file.path), "is text, without fields", "name JSONL, Parquet or Arrow files")
        yield from self._unchanged(self._json_lines() if self._file.format is Format.jsonl else self._rows())

    def _unchanged(self, items: Iterator[Item]) -> Iterator[Item]:
        check_unchanged(self._file)
        yield from items
        self.consumed = self._piece.size
        check_unchanged(self._file)

    def _json_lines(self) -> Iterator[tuple[str, dict[str, Any] | None]]:
        for line in self._lines():
            text = line.decode(self)
            if not text.strip():
                yield _lazy_name(self, line), None
                continue
            try:
                raw = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    line.name(self), f"is not JSON: {error}", "repair the line, or name another format with --format"
                ) from error
            if not isinstance(raw, dict):
                raise DataError(
                    line.name(self), f"is {_json_type(raw)}, not an object", "write one object in each line"
                )
            yield _lazy_name(self, line), raw

    def _field(self, raw: dict[str, Any], field: str, flag: str, name: str) -> str:
        value = raw.get(field)
        if isinstance(value, str):
            return value
        if field not in raw:
            raise DataError(
                str(name),
                f"has no field {field!r}; it has {', '.join(map(repr, raw)) or 'none'}",
                f"add the field, remove the line, or name another field with {flag}",
            )
        raise DataError(
            str(name), f"the field {field!r} is {_json_type(value)}, not text", "write text, or remove the line"
        )

    def _text(self) -> Iterator[Document]:
        if self._options.sample_by is SampleBy.line:
            for line in self._lines():
                yield Document(name=_lazy_name(self, line), text=line.decode(self).rstrip("\r\n"))
            return
        parts = []
        size = 0
        for chunk in self._chunks():
            size += len(chunk)
            if size > MAX_LINE_BYTES:
                raise DataError(
                    str(self._file.path),
                    f"is one document of more than {MAX_LINE_BYTES} bytes",
                    "take each line as a document (--sample-by line), or cut the file",
                )
            parts.append(chunk)
        line = _Line(b"".join(parts), 0)
        yield Document(name=str(self._file.path), text=line.decode(self))

    def _rows(self) -> Iterator[tuple[str, dict[str, Any] | None]]:
        from pyarrow import ArrowException

        number = 0
        try:
            dataset = _dataset(self._file, self._options)
            if self._file.format is Format.parquet:
                number = _rows_before(self._file, self._piece.start)
                shards = [
                    dataset.reshard().shard(num_shards=_num_row_groups(self._file), index=index)
                    for index in range(self._piece.start, self._piece.end)
                    if _num_rows(self._file, index) > 0  # the library refuses an empty row group
                ]
            elif self._file.format is Format.hub:
                shards = [
                    dataset.shard(num_shards=dataset.num_shards, index=index)
                    for index in range(self._piece.start, self._piece.end)
                ]
            else:
                shards = [dataset]
            for place, shard in enumerate(shards):
                for row in shard:
                    name = f"{self._file.path}: row {number}"
                    if self._file.format is Format.hub:
                        name = f"{self._file.name}: shard {self._piece.start + place}, row {number}"
                    yield name, row
                    number += 1
                self.consumed = self._piece.size * (place + 1) // len(shards)
        except (ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(
                str(self._file.path), f"cannot be read behind row {number}: {error}", "get or write the file again"
            ) from error

    def _lines(self) -> Iterator["_Line"]:
        """The lines that begin in the piece."""
        if self._file.path.suffix in _COMPRESSIONS:
            yield from self._compressed_lines()
            return
        with self._file.path.open("rb") as stream:
            offset = self._piece.start
            if offset:
                # The line that the byte before belongs to is the last one of the piece before.
                stream.seek(offset - 1)
                offset += len(self._line(stream, offset)) - 1
            while offset < self._piece.end:
                content = self._line(stream, offset)
                if not content:
                    return
                self.consumed += len(content)
                yield _Line(content, offset)
                offset += len(content)

    def _line(self, stream: Any, offset: int) -> bytes:
        content: bytes = stream.readline(MAX_LINE_BYTES + 1)
        if len(content) > MAX_LINE_BYTES:
            raise self._long_line(_Line(content, offset))
        return content

    def _long_line(self, line: "_Line") -> DataError:
        return DataError(line.name(self), f"is longer than {MAX_LINE_BYTES} bytes", "is this text? cut the line")

    def _compressed_lines(self) -> Iterator["_Line"]:
        number, offset, rest = 0, 0, b""
        for chunk in self._chunks():
            lines = _split(rest + chunk)
            rest = lines.pop()
            if len(rest) > MAX_LINE_BYTES:
                raise self._long_line(_Line(rest, offset, number + 1))
            for content in lines:
                number += 1
                yield _Line(content, offset, number)
                offset += len(content)
        if rest:
            yield _Line(rest, offset, number + 1)

    def _chunks(self) -> Iterator[bytes]:
        """The bytes of the whole file, decompressed."""
        path, text_bytes = self._file.path, 0
        kind = path.suffix
        with path.open("rb") as stream:
            if kind not in _COMPRESSIONS:
                while chunk := stream.read(_CHUNK):
                    self.consumed += len(chunk)
                    yield chunk
                return
            make = _gzip_decompressor if kind == ".gz" else _zstd_decompressor
            decompressor = None
            try:
                while data := stream.read(_CHUNK):
                    self.consumed += len(data)
                    while data:
                        decompressor = decompressor or make()
                        chunk = decompressor.decompress(data)
                        text_bytes += len(chunk)
                        if chunk:
                            yield chunk
                        data = decompressor.unused_data if decompressor.eof else b""
                        if decompressor.eof:
                            decompressor = None  # files may be put one behind the other
            except (zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
                raise DataError(
                    str(path),
                    f"is damaged: {error} (after {text_bytes} bytes of text, before offset {stream.tell()})",
                    "get the file again",
                ) from error
            if decompressor is not None or stream.tell() == 0:
                raise DataError(
                    str(path),
                    f"is cut short: its {kind[1:]} stream has no end (offset {self._file.path.stat().st_size}, after "
                    f"{text_bytes} bytes of text)",
                    "get the file again",
                )

    def line_number(self, offset: int) -> int:
        """Of the line that begins at a byte of an uncompressed file; counted from its beginning, for messages."""
        number, left = 1, offset
        with self._file.path.open("rb") as stream:
            while left and (chunk := stream.read(min(_CHUNK, left))):
                number += chunk.count(b"\n")
                left -= len(chunk)
        return number

    @property
    def path(self) -> Path:
        return self._file.path


def _split(data: bytes) -> list[bytes]:
    """Lines, cut behind newlines alone (``splitlines`` cuts at more), and what stands behind the last one."""
    lines = data.split(b"\n")
    return [*(line + b"\n" for line in lines[:-1]), lines[-1]]


@dataclass(slots=True)
class _Line:
    """Bytes that begin at ``offset`` of the text; ``number``: of the line, 0: not counted yet."""

    content: bytes
    offset: int
    number: int = 0

    def name(self, reader: PieceReader) -> str:
        return f"{reader.path}: line {self.number or reader.line_number(self.offset)}"

    def decode(self, reader: PieceReader) -> str:
        """The line as text, without a byte-order mark at the beginning of the file."""
        try:
            text = self.content.decode("utf-8")
        except UnicodeDecodeError as error:
            line = self.number or reader.line_number(self.offset)
            line += self.content.count(b"\n", 0, error.start)
            compressed = reader.path.suffix in _COMPRESSIONS
            raise DataError(
                f"{reader.path}: line {line}",
                f"is not UTF-8: byte {self.content[error.start]:#04x} at offset {self.offset + error.start} of the "
                f"{'decompressed text' if compressed else 'file'} ({error.reason})",
                "convert the file to UTF-8",
            ) from error
        return text.removeprefix("\ufeff") if self.offset == 0 else text


class _LazyName:
    """The name of a line, counted only when a message needs it."""

    def __init__(self, reader: PieceReader, line: _Line) -> None:
        self._reader = reader
        self._line = _Line(b"", line.offset, line.number)

    def __str__(self) -> str:
        return self._line.name(self._reader)


def _lazy_name(reader: PieceReader, line: _Line) -> str:
    return _LazyName(reader, line)  # type: ignore[return-value]  # whoever prints it calls str()


def _json_type(value: Any) -> str:
    return {type(None): "null", bool: "a boolean", str: "a string", dict: "an object", list: "a list"}.get(
        type(value), "a number"
    )


def _gzip_decompressor() -> Any:
    return zlib.decompressobj(wbits=31)


def _zstd_decompressor() -> Any:
    return zstandard.ZstdDecompressor().decompressobj()


# ---------------------------------------------------------------------------------------------- the datasets library


def _dataset(file: InputFile, options: ReadOptions) -> "IterableDataset":
    import datasets

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # what is wrong is said by our errors
    columns = [options.text_field, *([options.source_field] if options.source_field is not None else [])]
    try:
        if file.format is Format.hub:
            dataset = datasets.load_dataset(
                str(file.path),
                options.config_name or None,
                split=options.split,
                revision=file.revision or None,
                streaming=True,
            )
        elif file.format is Format.parquet:
            files = {"train": [str(file.path)]}
            dataset = datasets.load_dataset("parquet", data_files=files, split="train", columns=columns, streaming=True)
        else:
            dataset = datasets.load_dataset(
                "arrow", data_files={"train": [str(file.path)]}, split="train", streaming=True
            )
    except Exception as error:  # the library raises whatever its readers and the network raise
        raise DataError(str(file.path), f"cannot be read: {error}", "see to the file, the network, --split") from error
    if dataset.column_names is not None:
        _check_columns(file, options, dataset.column_names)
        dataset = dataset.select_columns(columns)
    return dataset


def _num_row_groups(file: InputFile) -> int:
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(file.path) as stream:
        return int(stream.num_row_groups)


def _num_rows(file: InputFile, row_group: int) -> int:
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(file.path) as stream:
        return int(stream.metadata.row_group(row_group).num_rows)


def _rows_before(file: InputFile, row_group: int) -> int:
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(file.path) as stream:
        return sum(stream.metadata.row_group(number).num_rows for number in range(row_group))
