"""Chat: conversations from a JSONL file, as tokens with the answers marked, packed into sequences.

A line is ``{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}``. The
tokenizer's chat template turns it into text; what the assistant has to write is supervised, nothing else. L is the
sequence length. Conversations are never split, a sequence holds as many as fit and padding:

    tokens           <s>user hi </s> <s>assistant hello </s> | <s>user bye </s> <s>assistant ciao </s> | pad pad
    is_supervised     0  0   0   0    0    0       1     1      0   0   0   0    0    0       1    1      0   0
    loss_mask         0  0   0   0    0    1       1     0      0   0   0   0    0    1       1    0      0   0
    document_starts   0  0   0   0    0    0       0     0      8   8   8   8    8    8       8    8     16  16
"""

import dataclasses
import hashlib
import json
import logging
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
from tokenizers import Tokenizer

from nld_train.data.dataset import Sample, check_sample, validation_position
from nld_train.data.files import found_or_built, sha256_of_file
from nld_train.data.prepared import MANIFEST_NAME, FileStats
from nld_train.data.progress import PrepareProgress
from nld_train.data.tokenizer import load_tokenizer
from nld_train.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

CHAT_FORMAT_VERSION = 1
"""Raised whenever the same conversations and tokenizer give other files; part of every cache's name."""

SHIPPED_CHATS = {"stdlib_chat": Path(__file__).resolve().parents[2] / "data" / "chat" / "stdlib_chat.jsonl"}
"""The conversations that come with the project, by the name that a configuration may use for their path."""

_ROLES = ("system", "user", "assistant")
_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PRIVATE_USE = range(0xE000, 0xF900)
_ARRAYS = ("tokens", "is_supervised", "offsets", "hashes", "first_supervised")
# Files that decide what a tokenizer makes of a conversation; an exported model's folder holds many more.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
# Files up to this size (bytes) are hashed whenever a folder is opened; larger ones are checked by size.
_HASH_LIMIT = 64 << 20
_REMEDY = "remove the folder: it is prepared again"


class Message(TypedDict):
    """``role``: system, user or assistant; ``content``: text, not empty."""

    role: str
    content: str


# ---------------------------------------------------------------------------------------------- reading


def chat_path(name: str) -> Path:
    """The file that ``name`` means: shipped conversations, or a path.

    Raises:
        DataError: neither.
    """
    path = SHIPPED_CHATS.get(name, Path(name))
    if not path.is_file():
        raise DataError(
            name,
            "is neither a JSONL file of conversations nor the name of shipped ones",
            f"use one of {', '.join(sorted(SHIPPED_CHATS))}, or the path of a JSONL file",
        )
    return path


def parse_conversation(line: bytes, location: str) -> list[Message]:
    """The messages of one line of a JSONL file. Keys beside ``messages`` are left alone.

    Raises:
        DataError: at ``location`` is no conversation that has an answer; says what is wrong.
    """
    remedy = 'write {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
    if not line.strip():
        raise DataError(location, "the line is empty", "remove it")
    try:
        raw = json.loads(line.decode("utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one
        raise DataError(location, f"is not JSON in UTF-8: {error}", remedy) from error
    messages = raw.get("messages") if isinstance(raw, dict) else None
    if not isinstance(messages, list) or not messages:
        raise DataError(location, 'has no list of "messages", or an empty one', remedy)
    for number, message in enumerate(messages, start=1):
        _check_message(message, f"message {number}", location, remedy)
    if all(message["role"] != "assistant" for message in messages):
        raise DataError(location, "has no answer: no message is the assistant's", "add the answer, or remove the line")
    return messages


def _check_message(message: Any, name: str, location: str, remedy: str) -> None:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise DataError(location, f'{name} is not an object with "role" and "content"', remedy)
    unknown = sorted(message.keys() - {"role", "content"})
    if unknown:
        raise DataError(location, f"{name} has keys that would be lost: {', '.join(unknown)}", "remove them")
    if message["role"] not in _ROLES:
        raise DataError(location, f"{name} has the unknown role {message['role']!r}", f"use {', '.join(_ROLES)}")
    content = message["content"]
    if not isinstance(content, str):
        raise DataError(location, f"the content of {name} is {type(content).__name__}, not text", remedy)
    if not content.strip():
        raise DataError(location, f"the content of {name} is empty", "write the text, or remove the message")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(location, f"the content of {name} is not valid text: {error}", "repair the escapes") from error


def content_hash(messages: Sequence[Message]) -> int:
    """64 bits of the sha256 of what is said by whom: equal conversations are equal on every machine."""
    text = json.dumps([[message["role"], message["content"]] for message in messages])
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


# ---------------------------------------------------------------------------------------------- tokens and answers


class ChatEncoder:
    """Conversations to tokens and what of them is supervised.

    A template with ``{% generation %}`` says itself what the assistant writes. With any other, an answer is what
    messages[:i + 1] have beyond messages[:i] with the header of an answer, up to the last special token in it (the end
    of the turn; a newline that templates put after it is nobody's to predict).

    Special tokens are the template's alone: where a message spells one out, it is encoded as the characters that it is
    made of. (Added tokens that are not special, such as ``<think>`` of some tokenizers, are read as everywhere.)

    Args:
        tokenizer: a fast one, with a chat template.
        location: of the tokenizer, for messages.

    Raises:
        DataError: it has no chat template, or no id for padding.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", location: str) -> None:
        try:
            self._template = tokenizer.get_chat_template()
        except ValueError as error:
            raise DataError(
                location,
                f"the tokenizer has no chat template that could be used: {error}",
                "put a chat_template.jinja into the folder; a corpus prepared by an older version: prepare it again",
            ) from error
        padding = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        if padding == (None, None):
            raise DataError(
                location, "the tokenizer has neither a padding nor an end token", "name one in tokenizer_config.json"
            )
        self.pad_token_id: int = padding[1] if padding[0] is None else padding[0]
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self._template_tokens = tokenizer.special_tokens_map
        self._has_markers = _GENERATION_MARKER.search(self._template) is not None
        added = tokenizer.added_tokens_decoder
        self._special_ids = {
            **{token.content: number for number, token in added.items() if token.special},
            **dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)),
        }
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._encoder = _copy(tokenizer)
        self._plain_encoder = _copy(tokenizer)
        self._plain_encoder.encode_special_tokens = True  # "encode them as ordinary text"

    def encode(self, messages: Sequence[Message], location: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64 [tokens], and which of them the assistant has to write, bool [tokens].

        Args:
            messages: checked ones.
            location: file and line, for messages.

        Raises:
            DataError: the template refuses the conversation, or its answers cannot be told from the rest.
        """
        messages, mark = self._with_broken_specials(messages, location)
        text, spans = self._render(messages, location)
        ids, offsets = self._tokenize(text, mark, location)
        is_supervised = np.zeros(len(ids), dtype=bool)
        for first, end in spans:
            if mark is not None:
                first, end = (place - text.count(mark, 0, place) for place in (first, end))
            # A token that begins before the span and ends in it counts, as in transformers: " Yes" after "assistant:".
            is_supervised |= (offsets[:, 1] > first) & (offsets[:, 0] < end)
        if not self._has_markers:
            for number, message in enumerate(messages):
                if message["role"] == "assistant":
                    is_supervised[self._find_answer(messages, number, ids, mark, location)] = True
        if not is_supervised.any():
            raise DataError(
                location,
                "the tokenizer's chat template marks nothing as the assistant's",
                "write {% generation %} around what the assistant writes in the template, or remove the markers",
            )
        return ids, is_supervised

    def _find_answer(
        self, messages: Sequence[Message], number: int, ids: np.ndarray, mark: str | None, location: str
    ) -> slice:
        """The tokens of message ``number`` among ``ids``, those of the whole conversation."""
        if number == 0:
            raise DataError(
                location,
                "begins with an answer, which a template without {% generation %} cannot render",
                "begin with the user's message, or write {% generation %} into the template",
            )
        prompt, _ = self._render(messages[:number], location, add_generation_prompt=True)
        answered, _ = self._render(messages[: number + 1], location)
        prompt_ids, _ = self._tokenize(prompt, mark, location)
        answered_ids, offsets = self._tokenize(answered, mark, location)
        first, end = len(prompt_ids), len(answered_ids)
        if not (np.array_equal(prompt_ids, ids[:first]) and np.array_equal(answered_ids, ids[:end])):
            raise DataError(
                location,
                f"message {number + 1}, an answer, cannot be told from what is around it: the tokens up to it are not "
                "the beginning of the whole conversation's",
                "strip whitespace around the answer, split the conversation into one line per answer, or write "
                "{% generation %} around what the assistant writes in the chat template",
            )
        specials = np.flatnonzero(np.isin(ids[first:end], list(self._special_ids.values())))
        if len(specials):
            last = first + int(specials[-1])
            bare = answered if mark is None else answered.replace(mark, "")
            if not bare[offsets[last, 1] :].strip():
                end = last + 1
        return slice(first, end)

    def _with_broken_specials(self, messages: Sequence[Message], location: str) -> tuple[Sequence[Message], str | None]:
        """Special tokens that messages spell out get a character inside that no message has; None: there are none."""
        if not any(self._special.search(message["content"]) for message in messages):
            return messages, None
        mark = next(chr(c) for c in _PRIVATE_USE if all(chr(c) not in message["content"] for message in messages))

        def broken(content: str) -> str:
            while match := self._special.search(content):
                if len(match[0]) == 1:
                    raise _cannot_be_text(location)
                content = content[: match.start() + 1] + mark + content[match.start() + 1 :]
            return content

        return [Message(role=message["role"], content=broken(message["content"])) for message in messages], mark

    def _render(
        self, messages: Sequence[Message], location: str, *, add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and the places in it that the template marks as generated."""
        # Imported late, as the tokenizer is.
        from jinja2 import TemplateError
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template  # its types do not say that it takes more arguments
        try:
            (text,), spans = render(
                [list(messages)],
                chat_template=self._template,
                return_assistant_tokens_mask=self._has_markers,
                add_generation_prompt=add_generation_prompt,
                **self._template_tokens,
            )
        except (TemplateError, TypeError) as error:
            raise DataError(
                location,
                f"the tokenizer's chat template refuses the conversation: {error}",
                "change the conversation (order of roles, system message) or use another chat template",
            ) from error
        return text, spans[0] if self._has_markers else []

    def _tokenize(self, text: str, mark: str | None, location: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 [tokens], and where each token begins and ends in the text without marks, int64 [tokens, 2]."""
        if mark is None:
            encoding = self._encoder.encode(text, add_special_tokens=False)
            ids, offsets = encoding.ids, encoding.offsets
        else:
            # Between the template's special tokens everything is ordinary text. Whether this tokenizer can be cut there
            # is seen with the marks still in the text: both ways must give the same.
            if self._tokenize_pieces(text, "")[0] != self._encoder.encode(text, add_special_tokens=False).ids:
                raise _cannot_be_text(location)
            ids, offsets = self._tokenize_pieces(text, mark)
        return np.array(ids, dtype=np.int64), np.array(offsets, dtype=np.int64).reshape(-1, 2)

    def _tokenize_pieces(self, text: str, mark: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        place = cut = 0
        # None stands for the end: what is behind the last special token.
        for match in (*self._special.finditer(text), None):
            piece = text[cut : match.start() if match else None]
            piece = piece.replace(mark, "") if mark else piece
            encoding = self._plain_encoder.encode(piece, add_special_tokens=False)
            ids.extend(encoding.ids)
            offsets.extend((place + first, place + end) for first, end in encoding.offsets)
            place += len(piece)
            if match:
                ids.append(self._special_ids[match[0]])
                offsets.append((place, place + len(match[0])))
                place += len(match[0])
                cut = match.end()
        return ids, offsets


def _cannot_be_text(location: str) -> DataError:
    return DataError(
        location,
        "a message spells out a special token, which this tokenizer cannot encode as text",
        "remove the special token from the message",
    )


def _copy(tokenizer: "PreTrainedTokenizerBase") -> Tokenizer:
    """The tokenizer's own encoder, without what would cut a text, add to it, or move the offsets of whitespace."""
    backend: Tokenizer = tokenizer.backend_tokenizer
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.post_processor = None
    return copy


# ---------------------------------------------------------------------------------------------- on disk


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatManifest:
    """``manifest.json`` of prepared conversations: what went in and what came out."""

    format_version: int
    source: str  # name of the file
    file_sha256: str
    tokenizer_sha256: str
    vocab_size: int
    pad_token_id: int
    conversations: int
    tokens: int
    supervised_tokens: int
    files: dict[str, FileStats]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "ChatManifest":
        """Raises DataError: the file is missing, no JSON, of another format, or lacks a key."""
        try:
            raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            raw["files"] = {name: FileStats(**stats) for name, stats in raw["files"].items()}
            return cls(**raw)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(str(path), f"is not a manifest of prepared conversations: {error}", _REMEDY) from error


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PreparedChat:
    """Conversations as tokens, one after the other; read-only memory maps.

    ``tokens`` uint16 or int32 [tokens]; ``is_supervised`` bool [tokens]; ``offsets`` int64 [conversations + 1], where
    each begins; ``hashes`` uint64 [conversations], see :func:`content_hash`; ``first_supervised`` int64
    [conversations], how many tokens stand before the first supervised one.
    """

    folder: Path
    manifest: ChatManifest
    tokens: np.ndarray
    is_supervised: np.ndarray
    offsets: np.ndarray
    hashes: np.ndarray
    first_supervised: np.ndarray

    @property
    def content_hash(self) -> str:
        """sha256 over the conversations, the tokenizer and the format: what a checkpoint may remember."""
        return _key(self.manifest.file_sha256, self.manifest.tokenizer_sha256)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises DataError: there are tokens that a model of ``vocab_size`` entries does not know."""
        if self.manifest.vocab_size > vocab_size:
            raise DataError(
                "model.vocab_size",
                f"{vocab_size} is smaller than the vocabulary of {self.folder}: {self.manifest.vocab_size}",
                f"set model.vocab_size to at least {self.manifest.vocab_size}, or use another tokenizer",
            )


def prepare_chat(
    path: Path, tokenizer_folder: Path, cache_dir: Path, *, progress: PrepareProgress | None = None
) -> PreparedChat:
    """Tokenise a file of conversations, once. Several processes may call this at once: one works, the others wait.

    Args:
        path: JSONL, a conversation per line; see :func:`chat_path`.
        tokenizer_folder: Hugging Face tokenizer folder with a chat template.
        cache_dir: ``data.cache_dir``; the result is kept below it, in a folder named after the content of the file and
            of the tokenizer, and made again if that folder is damaged.
        progress: told what happens.

    Raises:
        DataError: a line that is no conversation (file, line and what is wrong with it); the file is empty or not
            there; no usable tokenizer or template.
    """
    progress = progress or PrepareProgress()
    if not path.is_file():
        raise DataError(str(path), "is not a file", "name a JSONL file of conversations")
    file_sha256, tokenizer_sha256 = sha256_of_file(path), tokenizer_hash(tokenizer_folder)
    folder = cache_dir / f"chat-{path.stem}-{_key(file_sha256, tokenizer_sha256)[:16]}"

    def build(temporary: Path) -> None:
        encoder = ChatEncoder(load_tokenizer(tokenizer_folder), str(tokenizer_folder))
        _build(path, encoder, file_sha256, tokenizer_sha256, temporary, progress)

    return found_or_built(
        folder,
        open_folder=open_chat,
        build=build,
        summary=_summary,
        damaged="the cached conversations are damaged and will be tokenised again",
        progress=progress,
    )


def open_chat(folder: Path) -> PreparedChat:
    """Open prepared conversations and check that the files are those that the manifest speaks of.

    Raises:
        DataError: naming the file that is missing, cut short or replaced.
    """
    manifest = ChatManifest.read(folder / MANIFEST_NAME)
    arrays: dict[str, np.ndarray] = {}
    for name in _ARRAYS:
        path = folder / f"{name}.npy"
        stats = manifest.files.get(path.name)
        if stats is None or not path.is_file():
            raise DataError(str(path), f"is missing, or {MANIFEST_NAME} does not list it", _REMEDY)
        size = path.stat().st_size
        if size != stats.size:
            raise DataError(str(path), f"holds {size} bytes, {MANIFEST_NAME} says {stats.size}", _REMEDY)
        if size <= _HASH_LIMIT and sha256_of_file(path) != stats.sha256:
            raise DataError(str(path), f"is not the file that {MANIFEST_NAME} lists (sha256 differs)", _REMEDY)
        try:
            arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(str(path), f"cannot be read: {error}", _REMEDY) from error
    return PreparedChat(folder=folder, manifest=manifest, **arrays)


def _summary(prepared: PreparedChat) -> str:
    manifest = prepared.manifest
    return (
        f"{manifest.conversations:,} conversations ({manifest.source}): {manifest.tokens:,} tokens, "
        f"{manifest.supervised_tokens:,} of them supervised, in {prepared.folder}"
    )


def _key(file_sha256: str, tokenizer_sha256: str) -> str:
    return hashlib.sha256(json.dumps([CHAT_FORMAT_VERSION, file_sha256, tokenizer_sha256]).encode()).hexdigest()


def tokenizer_hash(folder: Path) -> str:
    """sha256 over the files that decide what a tokenizer makes of a text; equal where none of them exists."""
    files = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    return hashlib.sha256(json.dumps([[file.name, sha256_of_file(file)] for file in files]).encode()).hexdigest()


def _build(
    path: Path,
    encoder: ChatEncoder,
    file_sha256: str,
    tokenizer_sha256: str,
    folder: Path,
    progress: PrepareProgress,
) -> None:
    with path.open("rb") as stream:
        num_lines = sum(1 for _ in stream)
    if num_lines == 0:
        raise DataError(str(path), "is empty", "name a file with conversations")
    progress.phase("tokenising conversations", total_documents=num_lines, total_bytes=path.stat().st_size)
    dtype = np.uint16 if encoder.vocab_size <= np.iinfo(np.uint16).max else np.int32
    offsets = np.zeros(num_lines + 1, dtype=np.int64)
    hashes = np.zeros(num_lines, dtype=np.uint64)
    first_supervised = np.zeros(num_lines, dtype=np.int64)
    num_supervised = 0
    with _NpyWriter(folder / "tokens.npy", dtype) as tokens, _NpyWriter(folder / "is_supervised.npy", bool) as marks:
        for number, line in enumerate(_lines(path)):
            location = f"{path}:{number + 1}"
            messages = parse_conversation(line, location)
            ids, is_supervised = encoder.encode(messages, location)
            tokens.append(ids)
            marks.append(is_supervised)
            offsets[number + 1] = offsets[number] + len(ids)
            hashes[number] = content_hash(messages)
            first_supervised[number] = is_supervised.argmax()
            num_supervised += int(is_supervised.sum())
            progress.advance(1, len(line))
    for name, array in (("offsets", offsets), ("hashes", hashes), ("first_supervised", first_supervised)):
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    ChatManifest(
        format_version=CHAT_FORMAT_VERSION,
        source=path.name,
        file_sha256=file_sha256,
        tokenizer_sha256=tokenizer_sha256,
        vocab_size=encoder.vocab_size,
        pad_token_id=encoder.pad_token_id,
        conversations=num_lines,
        tokens=int(offsets[-1]),
        supervised_tokens=num_supervised,
        files={
            file.name: FileStats(size=file.stat().st_size, sha256=sha256_of_file(file))
            for file in sorted(folder.iterdir())
        },
    ).write(folder / MANIFEST_NAME)


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        yield from stream


class _NpyWriter:
    """A one-dimensional .npy file written piece by piece; numpy's header leaves room for any length."""

    def __init__(self, path: Path, dtype: type[np.generic] | type[bool]) -> None:
        self._dtype = np.dtype(dtype)
        self._stream = path.open("wb")
        self._length = 0
        self._write_header()

    def __enter__(self) -> "_NpyWriter":
        return self

    def append(self, values: np.ndarray) -> None:
        self._stream.write(values.astype(self._dtype).tobytes())
        self._length += len(values)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.seek(0)
        self._write_header()
        self._stream.close()

    def _write_header(self) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._stream, header)


# ---------------------------------------------------------------------------------------------- sequences


def split_conversations(chat: PreparedChat, validation_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the conversations for training, in the file's order, and of those held out, in the order of hashes.

    Chosen by the hash of what is said, so that copies of a conversation land on the same side, whatever the tokenizer.

    Args:
        chat: prepared conversations.
        validation_fraction: share that is held out, 0 <= fraction < 1.
    """
    is_held_out = chat.hashes < validation_fraction * 2.0**64
    held_out = np.flatnonzero(is_held_out)
    return np.flatnonzero(~is_held_out), held_out[np.argsort(chat.hashes[held_out], kind="stable")]


def pack(lengths: Sequence[int], sequence_length: int) -> list[int]:
    """Cut a list of conversations into sequences, greedily: number of the first one of each sequence, and the end.

    Args:
        lengths: tokens of each conversation, at most ``sequence_length``.
        sequence_length: L, tokens.
    """
    starts = [0]
    filled = 0
    for number, length in enumerate(lengths):
        filled += length
        if filled > sequence_length:
            starts.append(number)
            filled = length
    return [*starts, len(lengths)]


class ChatStream:
    """Packed conversations, epoch after epoch, without an end: sample i for every i >= 0.

    Each epoch shuffles the conversations anew, with seed + epoch, and packs them in that order, so it is a pure
    function of (conversations, seed, sequence length). Epochs differ a little in their number of samples: to find
    sample i, all epochs before it are packed once (a fraction of a second for a million conversations each).

    Args:
        chat: prepared conversations.
        sequence_length: L, tokens. Longer conversations are cut off there; one whose answers all come later is left
            out. A warning says how many.
        seed: of the run.
        mask_token_id: must not occur; every sample is checked.
        first_position: ``stream_position`` of sample 0: samples of the stages before, so that no two stages share their
            noise.
        validation_fraction: share of the conversations that is held out for :class:`ChatValidation`.

    Raises:
        DataError: no conversation is left; on reading, a sample with a mask token or an id outside the vocabulary.
    """

    _MAX_OPEN_EPOCHS = 2  # a micro-batch may straddle two

    def __init__(
        self,
        chat: PreparedChat,
        *,
        sequence_length: int,
        seed: int,
        mask_token_id: int,
        first_position: int,
        validation_fraction: float,
    ) -> None:
        part, _ = split_conversations(chat, validation_fraction)
        self._conversations = _usable(chat, part, sequence_length)
        self._lengths = _lengths(chat, self._conversations, sequence_length)
        if not len(self._conversations):
            raise DataError(
                str(chat.folder),
                f"no conversation is left for training ({chat.manifest.conversations} in {chat.manifest.source})",
                "raise the stage's sequence_length, lower the fraction that is held out, or use more conversations",
            )
        num_cut = int((np.diff(chat.offsets)[self._conversations] > sequence_length).sum())
        num_left_out = len(part) - len(self._conversations)
        if num_cut or num_left_out:
            logger.warning(
                "%s: of %d conversations %d are cut off at %d tokens, %d are left out since no answer begins before it",
                chat.manifest.source,
                len(part),
                num_cut,
                sequence_length,
                num_left_out,
            )
        self._chat = chat
        self._sequence_length = sequence_length
        self._seed = seed
        self._mask_token_id = mask_token_id
        self._first_position = first_position
        self._ends: list[int] = []  # samples up to the end of each epoch
        self._epochs: dict[int, tuple[np.ndarray, list[int]]] = {}

    def __getitem__(self, index: int) -> Sample:
        if index < 0:
            raise IndexError(f"the stream of conversations starts at sample 0, asked for {index}")
        while not self._ends or self._ends[-1] <= index:
            self._epoch(len(self._ends))
        epoch = bisect_right(self._ends, index)
        place = index - (self._ends[epoch - 1] if epoch else 0)
        order, starts = self._epoch(epoch)
        return _packed_sample(
            self._chat,
            order[starts[place] : starts[place + 1]],
            sequence_length=self._sequence_length,
            stream_position=self._first_position + index,
            mask_token_id=self._mask_token_id,
            name=f"sample {index} of the stream of conversations",
        )

    def samples_in_epoch(self, epoch: int) -> int:
        """Number of sequences that the conversations fill in an epoch."""
        return len(self._epoch(epoch)[1]) - 1

    def build_index(self, start_sample: int, end_sample: int) -> None:
        """Pack every epoch up to sample ``end_sample``, so that loader processes that are forked later need not."""
        while not self._ends or self._ends[-1] < end_sample:
            self._epoch(len(self._ends))

    def _epoch(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """The conversations in the epoch's order, and where in it each sequence begins."""
        if epoch not in self._epochs:
            while len(self._epochs) >= self._MAX_OPEN_EPOCHS:
                del self._epochs[next(iter(self._epochs))]
            order = np.random.RandomState((self._seed + epoch) % 2**32).permutation(len(self._conversations))
            starts = pack(self._lengths[order].tolist(), self._sequence_length)
            self._epochs[epoch] = (self._conversations[order], starts)
            if epoch == len(self._ends):
                self._ends.append((self._ends[-1] if epoch else 0) + len(starts) - 1)
        return self._epochs[epoch]


class ChatValidation:
    """The first ``num_samples`` packed sequences of the held-out conversations: the same ones in every run.

    Args:
        chat: prepared conversations.
        sequence_length: L, tokens; see :class:`ChatStream`.
        num_samples: how many.
        mask_token_id: must not occur; every sample is checked.
        validation_fraction: as in :class:`ChatStream`.

    Raises:
        DataError: the held-out conversations do not fill ``num_samples`` sequences; on reading, as
            :class:`ChatStream`.
    """

    def __init__(
        self,
        chat: PreparedChat,
        *,
        sequence_length: int,
        num_samples: int,
        mask_token_id: int,
        validation_fraction: float,
    ) -> None:
        _, part = split_conversations(chat, validation_fraction)
        self._conversations = _usable(chat, part, sequence_length)
        lengths = _lengths(chat, self._conversations, sequence_length)
        self._starts = pack(lengths.tolist(), sequence_length) if len(lengths) else [0]
        available = len(self._starts) - 1
        if num_samples > available:
            raise DataError(
                "chat_validation_samples",
                f"{num_samples} sequences of {sequence_length} tokens were asked for, the {len(lengths)} held-out "
                f"conversations of {chat.manifest.source} (fraction {validation_fraction}) fill {available}",
                f"lower it to at most {available}, shorten the stage's sequence_length, hold out a larger fraction, "
                "or use more conversations",
            )
        self._chat = chat
        self._sequence_length = sequence_length
        self._num_samples = num_samples
        self._mask_token_id = mask_token_id

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._num_samples:
            raise IndexError(f"the validation set has samples 0..{self._num_samples - 1}, asked for {index}")
        return _packed_sample(
            self._chat,
            self._conversations[self._starts[index] : self._starts[index + 1]],
            sequence_length=self._sequence_length,
            stream_position=validation_position(index, len(self)),
            mask_token_id=self._mask_token_id,
            name=f"sample {index} of the held-out conversations",
        )


def _usable(chat: PreparedChat, conversations: np.ndarray, sequence_length: int) -> np.ndarray:
    """Those with a supervised token among their first ``sequence_length``."""
    return conversations[chat.first_supervised[conversations] < sequence_length]


def _lengths(chat: PreparedChat, conversations: np.ndarray, sequence_length: int) -> np.ndarray:
    return np.minimum(np.diff(chat.offsets)[conversations], sequence_length)


def _packed_sample(
    chat: PreparedChat,
    conversations: np.ndarray,
    *,
    sequence_length: int,
    stream_position: int,
    mask_token_id: int,
    name: str,
) -> Sample:
    """One sequence: each conversation a document, then padding, a document of its own. Where ``loss_mask`` is 0 a label
    means nothing: it is the next token whosever it is, and padding at the end."""
    tokens = np.full(sequence_length, chat.manifest.pad_token_id, dtype=np.int64)
    is_supervised = np.zeros(sequence_length, dtype=bool)
    loss_mask = np.zeros(sequence_length, dtype=np.float32)
    document_starts = np.zeros(sequence_length, dtype=np.int64)
    place = 0
    for conversation in conversations.tolist():
        first, last = chat.offsets[conversation : conversation + 2].tolist()
        length = min(last - first, sequence_length)
        end = place + length
        tokens[place:end] = chat.tokens[first : first + length]
        is_supervised[place:end] = chat.is_supervised[first : first + length]
        loss_mask[place : end - 1] = is_supervised[place + 1 : end]
        document_starts[place:end] = place
        place = end
    document_starts[place:] = place
    sample = Sample(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(np.append(tokens[1:], chat.manifest.pad_token_id)),
        loss_mask=torch.from_numpy(loss_mask),
        is_supervised=torch.from_numpy(is_supervised),
        document_starts=torch.from_numpy(document_starts),
        stream_position=stream_position,
    )
    check_sample(
        sample,
        location=str(chat.folder / "tokens.npy"),
        name=name,
        vocab_size=chat.manifest.vocab_size,
        mask_token_id=mask_token_id,
        preparation="the conversations",
    )
    return sample
