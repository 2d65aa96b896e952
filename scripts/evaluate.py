#!/usr/bin/env python
"""What a trained model is worth: likelihood, decoding in all modes, distance to the speed of light, harness tasks.

    python scripts/evaluate.py --model runs/tiny/hf --suite likelihood decoding speed_of_light

The model is an exported folder or a training checkpoint (RUN/checkpoints/step_*, any parallel layout). Prints a
Markdown table for each suite, and writes <suite>.json and pictures into --out.

likelihood reads --text and --corpus, or else the held-out documents of the run that the model lies in. decoding and
speed_of_light continue the prompts of data/prompts, or --prompts, and with --held-out also beginnings of held-out
documents. harness needs lm-eval: pip install 'nld-train[eval]'.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from nld_train.errors import NLDError

_LINE_SECONDS = 10.0
"""Where the output is no terminal, progress is a line now and then."""
_MODES = ("ar", "diffusion", "linear", "quadratic")
_LEAST = {
    "documents": 1,
    "windows": 0,
    "max_length": 2,  # the first token is given
    "sweeps": 2,  # whose spread is the error
    "num_prompts": 1,
    "held_out": 0,
    "max_new_tokens": 1,
    "block_length": 1,
    "blocks": 1,
    "budget": 1,
    "limit": 1,
}
"""The smallest value of each option that is a number."""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="export or training checkpoint")
    parser.add_argument(
        "--suite",
        nargs="+",
        required=True,
        choices=("likelihood", "decoding", "speed_of_light", "harness", "all"),
        help="all: every one but harness",
    )
    parser.add_argument("--out", type=Path, help="folder of results (default: evaluation/ beside the model)")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="of a training checkpoint (default: its run's)"
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default: as stored")
    parser.add_argument("--seed", type=int, default=1234, help="of masks (default 1234)")
    group = parser.add_argument_group("likelihood")
    group.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE", help="UTF-8 text, a document each")
    group.add_argument("--corpus", type=Path, nargs="+", default=[], metavar="FOLDER", help="prepared corpora")
    group.add_argument("--documents", type=int, default=20, help="held-out documents in all (default 20)")
    group.add_argument("--windows", type=int, default=1, help="windows of each document, 0: all (default 1)")
    group.add_argument("--max-length", type=int, default=512, help="tokens of a window (default 512)")
    group.add_argument("--sweeps", type=int, default=2, help="of the bound over all counts, at least 2 (default 2)")
    group = parser.add_argument_group("likelihood and speed_of_light")
    group.add_argument("--block-sizes", type=int, nargs="+", default=[4, 8, 16, 32], help="default 4 8 16 32")
    group = parser.add_argument_group("decoding and speed_of_light")
    group.add_argument("--prompts", type=Path, nargs="+", default=[], metavar="FILE", help="JSONL; the name: category")
    group.add_argument("--num-prompts", type=int, help="of each category (default: all)")
    group.add_argument(
        "--held-out", type=int, default=0, metavar="N", help="and N documents of each corpus (default 0)"
    )
    group.add_argument("--max-new-tokens", type=int, default=64, help="decoding (default 64)")
    group.add_argument("--block-length", type=int, help="decoding (default: the model's block size)")
    group.add_argument("--thresholds", type=float, nargs="+", help="decoding (default 0.1 ... 0.95)")
    group.add_argument("--eos", default="none", metavar="none|auto|ID", help="decoding: stop token (default none)")
    group.add_argument("--blocks", type=int, default=2, help="speed_of_light: blocks after each prompt (default 2)")
    group.add_argument("--budget", type=int, default=5000, help="speed_of_light: forwards for a block (default 5000)")
    group = parser.add_argument_group("harness")
    group.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="tasks of lm-eval")
    group.add_argument("--task-folder", type=Path, metavar="FOLDER", help="YAML tasks; then only those from there")
    group.add_argument("--modes", nargs="+", choices=_MODES, default=["ar"], help="default ar")
    group.add_argument("--limit", type=int, help="documents of each task (default: all)")
    parsed = parser.parse_args(argv)
    for name, least in _LEAST.items():
        value = getattr(parsed, name)
        if value is not None and value < least:
            parser.error(f"argument --{name.replace('_', '-')}: {value}; it must be at least {least}")
    if min(parsed.block_sizes) < 1:
        parser.error(f"argument --block-sizes: {min(parsed.block_sizes)}; it must be at least 1")
    if parsed.eos not in ("none", "auto") and not parsed.eos.isdecimal():
        parser.error(f"argument --eos: {parsed.eos!r}; give none, auto or a token id")
    return parsed


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    # Imported here: --help does not wait for torch.
    import torch

    from nld_train.evaluation.suites import SUITES, Settings, evaluate

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        print(f"error: --device: {device!r} cannot be used ({why}); give cpu or cuda", file=sys.stderr)
        return 1
    settings = Settings(
        texts=arguments.text,
        corpora=arguments.corpus,
        num_texts=arguments.documents,
        num_windows=arguments.windows or None,
        max_length=arguments.max_length,
        block_sizes=arguments.block_sizes,
        num_sweeps=arguments.sweeps,
        seed=arguments.seed,
        prompts=arguments.prompts,
        num_prompts=arguments.num_prompts,
        num_held_out=arguments.held_out,
        max_new_tokens=arguments.max_new_tokens,
        block_length=arguments.block_length,
        num_blocks=arguments.blocks,
        budget=arguments.budget,
        tasks=arguments.tasks,
        task_folder=arguments.task_folder,
        modes=arguments.modes,
        limit=arguments.limit,
        **({"thresholds": arguments.thresholds} if arguments.thresholds else {}),
    )
    chosen = [
        suite for suite in SUITES if suite in arguments.suite or ("all" in arguments.suite and suite != "harness")
    ]
    out = arguments.out or arguments.model.resolve().parent / "evaluation"
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    try:
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
            tasks: dict[str, TaskID] = {}
            printed = time.monotonic()

            def advance(name: str, total: int) -> None:
                nonlocal printed
                if name not in tasks:
                    tasks[name] = progress.add_task(name, total=total)
                progress.advance(tasks[name])
                if not console.is_terminal and time.monotonic() - printed >= _LINE_SECONDS:
                    printed = time.monotonic()
                    console.print(f"{name}: {progress.tasks[-1].completed:.0f} of {total}", highlight=False)

            for suite, table in evaluate(
                arguments.model,
                chosen,
                settings,
                out,
                device=device,
                dtype={"fp32": torch.float32, "bf16": torch.bfloat16, None: None}[arguments.dtype],
                eos=arguments.eos,
                tokenizer_folder=arguments.tokenizer,
                on_step=advance,
                notify=lambda text: console.print(f"warning: {text}", markup=False, soft_wrap=True),
            ):
                print(f"\n## {suite.replace('_', ' ')}\n\n{table}", flush=True)
    except (NLDError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"\nwritten to {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
