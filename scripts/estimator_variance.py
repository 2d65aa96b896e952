#!/usr/bin/env python
"""Variance of the diffusion loss and of its gradient for each sampler, on a trained model of a run.

    python scripts/estimator_variance.py runs/tiny --draws 100

Everything but the noise is fixed: the newest checkpoint of RUN_DIR and --sequences samples of its corpus. Variances are
relative to the recipe's estimator (bernoulli), which comes first; with --only, to the first one named. Prints a
Markdown table.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from nld_train.errors import NLDError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a run with a checkpoint")
    parser.add_argument("--draws", type=int, default=100, metavar="K", help="draws for each estimator (default 100)")
    parser.add_argument("--sequences", type=int, default=8, metavar="B", help="sequences of a batch (default 8)")
    parser.add_argument("--seed", type=int, default=1, help="of the first draw (default 1)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="estimators to measure; default: all")
    arguments = parser.parse_args(argv)
    if arguments.draws < 2 or arguments.sequences < 1:
        parser.error("--draws must be at least 2 and --sequences at least 1")
    # Imported here: --help does not wait for torch.
    from nld_train.evaluation.estimators import measure_run, spread_table

    spreads = []
    try:
        with Progress(console=Console(stderr=True)) as progress:
            tasks: dict[str, int] = {}

            def advance(name: str) -> None:
                if name not in tasks:
                    tasks[name] = progress.add_task(name, total=arguments.draws)
                progress.advance(tasks[name])  # type: ignore[arg-type]

            for spread in measure_run(
                arguments.run_dir,
                num_draws=arguments.draws,
                num_sequences=arguments.sequences,
                seed=arguments.seed,
                only=arguments.only,
                on_draw=advance,
            ):
                spreads.append(spread)
    except NLDError as error:
        print(error, file=sys.stderr)
        return 1
    print(spread_table(spreads))
    return 0


if __name__ == "__main__":
    sys.exit(main())
