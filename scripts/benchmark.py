"""Measure how fast one thing is against another: python scripts/benchmark.py [SUITE ...] [--help].

Every row is a ratio between variants of the same computation, run in turn in the same process, so that whatever else
the machine does touches all of them. Before anything is timed, every variant must give the baseline's result.

It wants a quiet machine. OMP_WAIT_POLICY=passive is the default here, because threads that spin at the end of each
parallel region wait for threads that other processes keep from running, which punishes code with many small regions:
one busy neighbour on two cores turned a ratio of 2.8 into 0.4. On an idle machine spinning (OMP_WAIT_POLICY=active) is
some 5 to 15% faster. Where it is busy all the same, --cpu-time counts the CPU time of all threads: beside ten processes
on two cores wall times of the suite `scaling` were off by a factor of 3, its CPU times followed the model.

With --store the results are kept in docs/performance, and docs/performance.md and docs/step_cost.md are written anew.

A suite is a function that yields comparisons; its docstring is what docs/performance.md says of it. Add it to SUITES.
"""

import argparse
import inspect
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads OpenMP

import torch

from nld_train.errors import DataError
from nld_train.platform.cpu import keep_freed_memory
from nld_train.testing.benchmarks.attention import attention_suite, layouts_suite
from nld_train.testing.benchmarks.comparison import Row, Suite, cpu_seconds, print_rows, run_comparison, seconds
from nld_train.testing.benchmarks.conversion import convert_3b_suite, convert_suite
from nld_train.testing.benchmarks.cost_page import COST_PAGE, cost_page
from nld_train.testing.benchmarks.data import data_suite, prepare_suite
from nld_train.testing.benchmarks.engine import engine_suite
from nld_train.testing.benchmarks.head import head_suite
from nld_train.testing.benchmarks.parts import parts_suite
from nld_train.testing.benchmarks.results import (
    PAGE,
    RESULTS,
    machine,
    performance_page,
    read_results,
    store_results,
    stored_file,
)
from nld_train.testing.benchmarks.saving import checkpoint_suite
from nld_train.testing.benchmarks.step import memory_suite, scaling_suite, step_suite

SUITES: dict[str, Suite] = {  # in the order of docs/performance.md
    "step": step_suite,
    "memory": memory_suite,
    "engine": engine_suite,
    "scaling": scaling_suite,
    "parts": parts_suite,
    "attention": attention_suite,
    "layouts": layouts_suite,
    "head": head_suite,
    "data": data_suite,
    "prepare": prepare_suite,
    "checkpoint": checkpoint_suite,
    "convert": convert_suite,
    "convert-3b": convert_3b_suite,
}
DEFAULT_SUITES = ["attention", "layouts", "step", "data", "convert"]  # others take minutes; convert-3b writes 23 GB


def pages() -> dict[Path, str]:
    """What is written from stored results and formulas: file -> text."""
    words = {name: inspect.getdoc(suite) or "" for name, suite in SUITES.items()}
    return {PAGE: performance_page(RESULTS, words), COST_PAGE: cost_page(RESULTS)}


def write_docs() -> None:
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(f"written: {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen suites; 1 with --check where a required ratio is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)} (default: {' '.join(DEFAULT_SUITES)})"
    )
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds of each comparison (default 9)")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them that are not counted (default 2)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="of all threads, for wall time: where a machine is busy with other things",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where a GPU is visible")
    parser.add_argument("--only", metavar="REGEX", help="only comparisons whose title it is found in")
    parser.add_argument("--json", type=Path, help="result file, added to (default runs/benchmark/SUITE.json)")
    parser.add_argument("--store", action="store_true", help="keep the results in docs/performance, write its pages")
    parser.add_argument("--write-docs", action="store_true", help="write the pages from what is kept, measure nothing")
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
    if options.store and options.json is not None:
        parser.error("--store and --json each name a file: choose one")
    if options.only is not None:
        try:
            re.compile(options.only)
        except re.error as error:
            parser.error(f"--only {options.only}: {error}")
    if options.write_docs:
        write_docs()
        return 0
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.cpu_time and device.type != "cpu":
        parser.error("--cpu-time: a GPU's work is not CPU time; add --device cpu")

    # For both sides of every comparison, as train.py does. Suites that measure memory do so in processes of their own.
    description = machine(device.type == "cpu" and keep_freed_memory())
    print("\n".join(f"{key}: {value}" for key, value in description.items()))
    print("\nmedian [quartiles], then x = the baseline's value / this one's, median over rounds [quartiles]")
    rows: list[Row] = []
    titles: list[str] = []
    for name in names:
        path = options.json or (
            stored_file(name, description) if options.store else Path(f"runs/benchmark/{name}.json")
        )
        try:
            read_results(path)  # now, not after minutes
        except DataError as error:
            parser.error(str(error))
        for comparison in SUITES[name](device):
            titles.append(comparison.title)
            if options.only is None or re.search(options.only, comparison.title):
                if options.cpu_time and comparison.measure is seconds:
                    comparison = replace(comparison, measure=cpu_seconds, unit=f"CPU {comparison.unit}")
                measured = run_comparison(name, comparison, options.rounds, options.warmup)
                print_rows(measured)
                store_results(path, description, measured)
                rows += measured
        print(f"\nstored in {path}")
    if not rows:
        print(f"--only {options.only}: it is found in none of\n  " + "\n  ".join(titles), file=sys.stderr)
        return 2
    if options.store:
        write_docs()
    missed = [row for row in rows if not row.passed]
    return 1 if missed and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
