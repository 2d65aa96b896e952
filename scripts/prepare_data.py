"""Prepare text for training: tokenise files into a folder that a run can name, look at such folders.

    prepare_data.py prepare data/books --input 'books/*.jsonl.gz' --tokenizer tekken.json --workers 8
    prepare_data.py prepare data/web --input web/ --text-field content --tokenizer train:32000
    prepare_data.py prepare data/wiki --input owner/name@revision --tokenizer my_model/
    prepare_data.py prepare data/chat --input chat.parquet --messages-field conversation
    prepare_data.py inspect data/books --samples 5
    prepare_data.py index experiment=tiny data=prepared data.corpus=data/books

Interrupted, the same command goes on where it was; with other options or inputs it is refused. The number of workers
changes no byte.

Exit status: 0 done, 1 something in the data or the folder is wrong (the error names it and the remedy), 2 wrong
arguments.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from nld_train.errors import NLDError

FORMATS = ("jsonl", "txt", "parquet", "arrow", "hub")


def prepare(arguments: argparse.Namespace) -> int:
    from nld_train.data.inputs import Format, ReadOptions, SampleBy, find_inputs
    from nld_train.data.prepare_files import PrepareOptions, prepare_files
    from nld_train.data.progress import RichProgress

    inputs = find_inputs(arguments.input, Format(arguments.format) if arguments.format else None)
    read = ReadOptions(
        text_field=arguments.text_field,
        source_field=arguments.source_field,
        sample_by=SampleBy(arguments.sample_by),
        split=arguments.split,
        config_name=arguments.config_name,
    )
    if arguments.messages_field is not None:
        from nld_train.data.prepare_chat_file import write_conversations

        with RichProgress() as progress:
            count = write_conversations(arguments.out, inputs, arguments.messages_field, read, progress=progress)
        print(f"{count} conversations in {arguments.out}: name it in stages.X.chat")
        return 0
    options = PrepareOptions(
        name=arguments.name or arguments.out.absolute().name,
        tokenizer=arguments.tokenizer,
        read=read,
        validation_fraction=arguments.validation_fraction,
        shard_bytes=round(arguments.shard_mb * 1e6),
    )
    with RichProgress() as progress:
        corpus = prepare_files(arguments.out, inputs, options, workers=arguments.workers, progress=progress)
    for part, stats in corpus.manifest.parts.items():
        print(f"{part}: {stats.documents:,} documents, {stats.tokens:,} tokens")
    print(f"prepared in {corpus.folder}; use it with data=prepared data.corpus={corpus.folder}")
    return 0


def inspect(arguments: argparse.Namespace) -> int:
    from nld_train.data.inspect import inspect_corpus

    inspect_corpus(arguments.folder, num_samples=arguments.samples, is_verified=arguments.verify)
    return 0


def index(arguments: argparse.Namespace) -> int:
    from nld_train.config.compose import compose
    from nld_train.data.progress import RichProgress
    from nld_train.training.data import build_indices

    config = compose(arguments.overrides)
    with RichProgress() as progress:
        build_indices(config, progress)
    return 0


def parser() -> argparse.ArgumentParser:
    head = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = head.add_subparsers(dest="command", required=True)

    command = commands.add_parser("prepare", help="tokenise files into a folder", description="Tokenise files.")
    command.set_defaults(run=prepare)
    command.add_argument("out", type=Path, help="folder of the corpus; with --messages-field a .jsonl file")
    command.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="files, 'patterns*', folders, owner/name on the Hub"
    )
    command.add_argument("--format", choices=FORMATS, help="of all inputs (default: by the suffix)")
    fields = command.add_mutually_exclusive_group()
    fields.add_argument("--text-field", default="text", help="field or column of the text (default: text)")
    fields.add_argument("--messages-field", help="field or column of conversations: prepares those instead of text")
    command.add_argument("--source-field", help="field of the text that a document is taken from: held out by it")
    command.add_argument(
        "--sample-by",
        choices=["document", "line"],
        default="document",
        help="a text file is one document, or each line",
    )
    command.add_argument("--tokenizer", help="Hugging Face folder, tekken.json, or train:SIZE (on the text itself)")
    command.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    command.add_argument("--shard-mb", type=float, default=512.0, help="input of a shard in MB (default: 512)")
    command.add_argument(
        "--validation-fraction",
        type=float,
        default=0.005,
        help="share of the sources to hold out; the same in all corpora of a blend (default: 0.005)",
    )
    command.add_argument("--name", help="of the corpus (default: the folder's)")
    command.add_argument("--split", default="train", help="of a dataset on the Hub (default: train)")
    command.add_argument("--config-name", default="", help="of a dataset on the Hub")

    command = commands.add_parser("inspect", help="show a prepared corpus", description="Show a prepared corpus.")
    command.set_defaults(run=inspect)
    command.add_argument("folder", type=Path)
    command.add_argument("--samples", type=int, default=2, help="documents of each part to decode (default: 2)")
    command.add_argument("--verify", action="store_true", help="hash every file")

    command = commands.add_parser(
        "index",
        help="build the order of a run's samples ahead of time",
        description="Build the order of a run's samples ahead of time, with one process.",
    )
    command.set_defaults(run=index)
    command.add_argument("overrides", nargs="*", help="as train.py's: experiment=NAME data=prepared data.corpus=FOLDER")
    return head


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--inspect"]:  # as a flag, too
        argv[0] = "inspect"
    head = parser()
    arguments = head.parse_args(argv)
    if arguments.command == "prepare":
        if arguments.messages_field is None and arguments.tokenizer is None:
            head.error("prepare: --tokenizer is needed (a folder, a tekken.json, or train:SIZE)")
        if arguments.workers < 1 or not 1e-6 <= arguments.shard_mb < float("inf"):  # nan is neither
            head.error(
                f"prepare: --workers {arguments.workers} and --shard-mb {arguments.shard_mb} have to be positive"
            )
    try:
        return int(arguments.run(arguments))
    except NLDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
