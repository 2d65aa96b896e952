"""Convert checkpoints between Megatron and Hugging Face form, compare the two, and say what a folder is.

``import --hf FOLDER --out FOLDER``, ``export --checkpoint RUN/checkpoints/step_* --out FOLDER``, ``verify --checkpoint
FOLDER --hf FOLDER``, ``inspect FOLDER``; each has ``--help``.

Exit status: 0 done (verify: everything is equal), 1 a folder cannot be used (the error names the file and the remedy)
or verify found a difference, 2 wrong arguments.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from nld_train.errors import NLDError

_DTYPES = ("bf16", "fp32")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(text: str) -> int:
    """Bytes from ``5GB``, ``500MB`` or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB)?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS.get((match[2] or "").upper(), 1)) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; give one like 5GB, 500MB or a number of bytes")
    return size


@contextmanager
def byte_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar in bytes on stderr, where that is a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def to_megatron(arguments: argparse.Namespace) -> int:
    import torch

    from nld_train.checkpoint.convert import import_checkpoint

    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32, None: None}
    with byte_bar(f"writing {arguments.out}") as progress:
        import_checkpoint(
            arguments.hf,
            arguments.out,
            dtype=dtypes[arguments.dtype],
            overwrite=arguments.overwrite,
            progress=progress,
            notify=warn,
        )
    print(f"imported to {arguments.out}")
    return 0


def export(arguments: argparse.Namespace) -> int:
    import torch

    from nld_train.checkpoint.convert import export_checkpoint

    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32, None: None}
    with byte_bar(f"writing {arguments.out}") as progress:
        export_checkpoint(
            arguments.checkpoint,
            arguments.out,
            dtype=dtypes[arguments.dtype],
            max_shard_bytes=arguments.max_shard_size,
            tokenizer=arguments.tokenizer,
            overwrite=arguments.overwrite,
            progress=progress,
            notify=warn,
        )
    print(f"exported to {arguments.out}")
    return 0


def verify(arguments: argparse.Namespace) -> int:
    from nld_train.checkpoint.verification import verify_checkpoint

    with byte_bar("comparing") as progress:
        report = verify_checkpoint(
            arguments.checkpoint, arguments.hf, with_logits=not arguments.no_logits, progress=progress, notify=warn
        )
    table = Table(title=f"{arguments.checkpoint} against {arguments.hf}")
    for column in ("what", "compared", "largest difference", "result"):
        table.add_column(column, overflow="fold")
    for row in report:
        table.add_row(row.what, row.compared, f"{row.difference:.3g}", "equal" if row.is_equal else "DIFFERENT")
    console = Console()
    Console(width=max(console.width, 120)).print(table)
    return 0 if all(row.is_equal for row in report) else 1


def inspect(arguments: argparse.Namespace) -> int:
    from nld_train.checkpoint.inspection import inspect_folder

    facts = inspect_folder(arguments.folder)
    width = max(map(len, facts))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()))
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description="Convert checkpoints between Megatron and Hugging Face form.")
    commands = top.add_subparsers(dest="command", required=True)
    one = commands.add_parser(
        "import",
        help="Hugging Face folder -> Megatron checkpoint",
        description="Write a Megatron checkpoint that every tensor x pipeline layout loads from a folder of the "
        "Ministral3, Mistral3 (the vision tower is left out) or NLD form: single or sharded safetensors, tied or not, "
        "BF16, FP32, FP16, or FP8 with weight_scale_inv.",
    )
    one.add_argument("--hf", type=Path, required=True, help="folder to read")
    one.add_argument("--out", type=Path, required=True, help="folder to write; appears only when it is complete")
    one.add_argument("--dtype", choices=_DTYPES, help="of the written tensors (default: as stored)")
    one.add_argument("--overwrite", action="store_true", help="replace the checkpoint where it exists")
    one.set_defaults(run=to_megatron)
    one = commands.add_parser(
        "export",
        help="training checkpoint -> Hugging Face folder of the NLD form",
        description="Write a Hugging Face folder of the Nemotron-Labs-Diffusion form from a training checkpoint of any "
        "parallel layout: config, modeling code, tokenizer, generation_config, safetensors and a model card.",
    )
    one.add_argument("--checkpoint", type=Path, required=True, help="folder checkpoints/step_* of a run")
    one.add_argument("--out", type=Path, required=True, help="folder to write; appears only when it is complete")
    one.add_argument("--dtype", choices=_DTYPES, help="of the written tensors (default: as stored)")
    one.add_argument("--max-shard-size", type=parse_size, default=5 * 10**9, metavar="SIZE", help="default: 5GB")
    one.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="default: the one the run was trained with")
    one.add_argument("--overwrite", action="store_true", help="replace the folder where it exists")
    one.set_defaults(run=export)
    one = commands.add_parser(
        "verify",
        help="compare a Megatron checkpoint with a Hugging Face folder",
        description="Compare every tensor (exactly, or at the coarser dtype where they differ), then the logits of a "
        "few sequences in float32: Megatron's model against transformers. The logits need both models in memory.",
    )
    one.add_argument("--checkpoint", type=Path, required=True, help="Megatron checkpoint")
    one.add_argument("--hf", type=Path, required=True, help="Hugging Face folder")
    one.add_argument("--no-logits", action="store_true", help="compare tensors only (memory of one tensor)")
    one.set_defaults(run=verify)
    one = commands.add_parser(
        "inspect",
        help="say what a folder is",
        description="Form, sizes, dtype, parallel layout, step, tokens and stage of a run, a Megatron checkpoint or a "
        "Hugging Face folder, from headers alone.",
    )
    one.add_argument("folder", type=Path)
    one.set_defaults(run=inspect)
    return top


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except NLDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
