"""Convert checkpoints: ``python scripts/convert_checkpoint.py export --checkpoint RUN/checkpoints/step_* --out
FOLDER``.

Exit status: 0 done, 1 the checkpoint cannot be used (the error names the file and the remedy), 2 wrong arguments.
"""

import argparse
import re
import sys
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

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


def export(arguments: argparse.Namespace) -> None:
    import torch

    from nld_train.checkpoint.convert import export_checkpoint

    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32, None: None}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(f"writing {arguments.out}", total=None)
        export_checkpoint(
            arguments.checkpoint,
            arguments.out,
            dtype=dtypes[arguments.dtype],
            max_shard_bytes=arguments.max_shard_size,
            tokenizer=arguments.tokenizer,
            overwrite=arguments.overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(f"exported to {arguments.out}")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description="Convert checkpoints between Megatron and Hugging Face form.")
    commands = top.add_subparsers(dest="command", required=True)
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
    return top


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except NLDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
