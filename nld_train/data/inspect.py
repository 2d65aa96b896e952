"""What a prepared corpus is and holds, for people."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from nld_train.data.prepared import PreparedCorpus, open_prepared, verify
from nld_train.data.progress import RichProgress
from nld_train.data.tokenizer import load_tokenizer

_SAMPLE_TOKENS = 120


def inspect_corpus(
    folder: Path, *, num_samples: int, is_verified: bool = False, console: Console | None = None
) -> None:
    """Print counts, options, inputs, the lengths of documents, and documents spread over each part, decoded.

    Args:
        folder: a prepared corpus.
        num_samples: documents of each part.
        is_verified: hash every file as well.
        console: where to; default: the standard output.

    Raises:
        DataError: the folder is no corpus, or damaged; names the file.
    """
    console = console or Console()
    corpus = open_prepared(folder)
    manifest = corpus.manifest
    if is_verified:
        with RichProgress() as progress:
            total = sum(stats.size for stats in manifest.files.values())
            progress.phase("hashing", total_documents=0, total_bytes=total)
            verify(corpus, progress=progress)
    print_line = _printer(console)
    print_line(f"{manifest.corpus}: {manifest.source}")
    print_line(
        f"{manifest.text_bytes / 1e6:,.1f} MB of text, {manifest.num_skipped:,} empty or unreadable documents left out"
    )
    print_line(
        f"vocabulary {manifest.vocab_size}, tokens {manifest.dtype}, documents end with token {manifest.eos_token_id}"
    )
    for key, value in manifest.options.items():
        print_line(f"  {key}: {value}")
    for stats in manifest.inputs[:10]:
        print_line(f"  input {stats.name}: {stats.size:,} bytes, sha256 {stats.sha256[:16]}")
    if len(manifest.inputs) > 10:
        print_line(f"  and {len(manifest.inputs) - 10} more inputs")
    console.print(_table(corpus))
    counts = np.load(folder / "token_counts.npy")
    print_line(f"{int((counts > 0).sum()):,} of {len(counts):,} tokens occur")
    if is_verified:
        print_line(f"all {len(manifest.files)} files have the sha256 that the manifest lists")
    _print_samples(corpus, num_samples, console)


def _table(corpus: PreparedCorpus) -> Table:
    table = Table("part", "documents", "tokens", "shards", "tokens a document: median", "longest")
    for part, stats in corpus.manifest.parts.items():
        lengths = corpus.documents(part).sequence_lengths
        table.add_row(
            part,
            f"{stats.documents:,}",
            f"{stats.tokens:,}",
            str(len(corpus.manifest.shards[part])),
            f"{float(np.median(lengths)):,.0f}",
            f"{int(lengths.max()):,}",
        )
    return table


def _print_samples(corpus: PreparedCorpus, num_samples: int, console: Console) -> None:
    if not num_samples:
        return
    tokenizer = load_tokenizer(corpus.tokenizer_folder)
    print_line = _printer(console)
    for part in corpus.manifest.parts:
        documents = corpus.documents(part)
        for number in sorted({len(documents) * place // num_samples for place in range(num_samples)}):
            ids = documents.get(number)
            shown = tokenizer.decode(ids[:_SAMPLE_TOKENS].tolist())
            more = f" … ({len(ids) - _SAMPLE_TOKENS:,} more tokens)" if len(ids) > _SAMPLE_TOKENS else ""
            console.rule(f"{part}, document {number}: {len(ids):,} tokens", align="left")
            print_line(f"{shown}{more}")


def _printer(console: Console) -> Callable[[str], None]:
    return partial(console.print, highlight=False, markup=False, soft_wrap=True)
