"""Measure how fast one thing is against another: python scripts/benchmark.py [SUITE ...] [--help].

Every row is a ratio between variants of the same computation, run in turn in the same process, so that whatever else
the machine does touches all of them. Before anything is timed, every variant must give the baseline's result.

It wants a quiet machine. OMP_WAIT_POLICY=passive is the default here, because threads that spin at the end of each
parallel region wait for threads that other processes keep from running, which punishes code with many small regions:
one busy neighbour on two cores turned a ratio of 2.8 into 0.4. On an idle machine spinning (OMP_WAIT_POLICY=active) is
some 5 to 15% faster.

A suite is a function that yields comparisons; add it to SUITES.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads OpenMP

import torch

from nld_train.platform.cpu import keep_freed_memory
from nld_train.testing.benchmarks.attention import attention_suite, layouts_suite
from nld_train.testing.benchmarks.comparison import Row, Suite, machine, print_rows, run_comparison, write_json
from nld_train.testing.benchmarks.conversion import convert_suite
from nld_train.testing.benchmarks.data import data_suite, prepare_suite
from nld_train.testing.benchmarks.head import head_suite
from nld_train.testing.benchmarks.saving import checkpoint_suite
from nld_train.testing.benchmarks.step import engine_suite, memory_suite, scaling_suite, step_suite

SUITES: dict[str, Suite] = {
    "attention": attention_suite,
    "layouts": layouts_suite,
    "step": step_suite,
    "data": data_suite,
    "convert": convert_suite,
    "prepare": prepare_suite,
    "memory": memory_suite,
    "engine": engine_suite,
    "scaling": scaling_suite,
    "head": head_suite,
    "checkpoint": checkpoint_suite,
    "convert-3b": partial(convert_suite, num_layers=26, vocab_size=131072),
}
DEFAULT_SUITES = ["attention", "layouts", "step", "data", "convert"]  # others take minutes; convert-3b writes 23 GB


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen suites; 1 with --check where a required ratio is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)} (default: {' '.join(DEFAULT_SUITES)})"
    )
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds of each comparison (default 9)")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them that are not counted (default 2)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where a GPU is visible")
    parser.add_argument("--json", type=Path, help="result file (default runs/benchmark/SUITES.json)")
    parser.add_argument("--check", action="store_true", help="exit 1 where a required ratio is missed")
    options = parser.parse_args(arguments)
    names: list[str] = options.suites or DEFAULT_SUITES
    for name in names:
        if name not in SUITES:
            parser.error(f"no suite {name!r}: choose of {', '.join(SUITES)}")
    if options.rounds < 1 or options.warmup < 0:
        parser.error(f"--rounds {options.rounds} must be at least 1, --warmup {options.warmup} at least 0")
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"--threads {options.threads} must be at least 1")
        torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    # For both sides of every comparison, as train.py does. Suites that measure memory do so in processes of their own.
    description = machine(device.type == "cpu" and keep_freed_memory())
    print("\n".join(f"{key}: {value}" for key, value in description.items()))
    print("\nmedian [quartiles], then x = the baseline's value / this one's, median over rounds [quartiles]")
    rows: list[Row] = []
    for name in names:
        for comparison in SUITES[name](device):
            measured = run_comparison(name, comparison, options.rounds, options.warmup)
            print_rows(measured)
            rows += measured
    path = options.json or Path("runs/benchmark") / f"{'-'.join(names)}.json"
    write_json(path, description, rows)
    print(f"\nwritten to {path}")
    missed = [row for row in rows if not row.passed]
    return 1 if missed and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
