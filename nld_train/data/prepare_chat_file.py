"""Conversations of the user, in whichever files, to the one JSONL file that a supervised stage reads.

They are not tokenised here: that takes the chat template of the run's tokenizer, and ``nld_train.data.chat`` does it at
the start of a run, once, in its cache.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nld_train.data.chat import parse_conversation
from nld_train.data.inputs import InputFile, PieceReader, ReadOptions, plan_shards
from nld_train.data.progress import PrepareProgress
from nld_train.data.shards import write_file
from nld_train.errors import DataError


def write_conversations(
    out: Path,
    inputs: Sequence[InputFile],
    messages_field: str,
    read: ReadOptions,
    *,
    progress: PrepareProgress | None = None,
) -> int:
    """Check every conversation and write them, in order, to ``out``.

    Args:
        out: a new .jsonl file.
        inputs: files with objects or rows.
        messages_field: of an object or row: its list of messages, each with ``role`` and ``content``.

    Returns:
        how many there are.

    Raises:
        DataError: a line or row that is no conversation (which, and why); ``out`` exists; there is none.
    """
    progress = progress or PrepareProgress()
    if out.exists():
        raise DataError(str(out), "exists", "name a new file")
    if out.suffix != ".jsonl":
        raise DataError(str(out), "is no name of a JSONL file", "name a file with the suffix .jsonl")
    read = replace(read, text_field=messages_field, source_field=None)
    pieces = [piece for shard in plan_shards(inputs, read, 1 << 62) for piece in shard]
    progress.phase("checking conversations", total_documents=0, total_bytes=sum(piece.size for piece in pieces))
    count = 0

    def write(temporary: Path) -> None:
        nonlocal count
        with temporary.open("wb") as stream:
            for piece in pieces:
                reader, reported = PieceReader(inputs[piece.file], piece, read), 0
                for name, raw in reader.records():
                    if raw is None:
                        continue
                    if messages_field not in raw:
                        raise DataError(
                            str(name),
                            f"has no field {messages_field!r}; it has {', '.join(map(repr, raw)) or 'none'}",
                            "add the field, remove the line, or name another field with --messages-field",
                        )
                    line = json.dumps({"messages": raw[messages_field]}, ensure_ascii=False)
                    encoded = line.encode("utf-8", errors="surrogatepass")
                    parse_conversation(encoded, name)
                    stream.write(encoded + b"\n")
                    count += 1
                    progress.advance(1, reader.consumed - reported)
                    reported = reader.consumed
        if not count:
            raise DataError(
                str(out), "would be empty: the inputs hold no conversation", "name inputs with conversations"
            )

    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, write)
    return count
