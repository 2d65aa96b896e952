#!/usr/bin/env python
"""Compare runs: a table of final validation losses by what differs in their configurations, and a plot.

    python train.py -m experiment=ablation/alpha stages.joint.diffusion_loss_weight=0.1,0.3,1.0 run.seed=1,2
    python scripts/compare_runs.py runs/ablation/alpha --plot alpha.png

Each FOLDER is a run or a sweep's run.dir. Rows are means over seeds ± standard error; Δ is the difference from the
first row, seed by seed. Work counts rows that pass through the layers: 1 for a clean token of an AR stage, 1 +
objective.noisy_fraction of a joint one.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nld_train.errors import NLDError
from nld_train.evaluation.reports import (
    LOSSES,
    Run,
    comparison_table,
    differing_keys,
    find_runs,
    group_runs,
    mean_curve,
)


def draw(runs: Sequence[Run], keys: Sequence[str], path: Path) -> None:
    """Validation losses over work, one curve for each group, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(LOSSES), figsize=(12, 4.5), layout="constrained")
    for axis, name in zip(axes, LOSSES, strict=True):
        for values, members in group_runs(runs, keys).items():
            work, losses = mean_curve(members, name)
            label = ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in zip(keys, values, strict=True))
            axis.plot(work, losses, marker=".", linewidth=1.2, label=label)
        axis.set_xlabel("work, in clean tokens of an AR step")
        axis.set_ylabel(f"{name.removeprefix('val_').replace('_', ' ')} (validation), nats per token")
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=7)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a run, or a sweep's run.dir")
    parser.add_argument("--by", nargs="+", metavar="KEY", help="settings that make a row; default: all that differ")
    parser.add_argument(
        "--baseline",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="settings of the row that comes first",
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw validation losses over work")
    arguments = parser.parse_args(argv)
    for item in arguments.baseline:
        if "=" not in item:
            parser.error(f"--baseline {item}: give KEY=VALUE")
    try:
        runs = find_runs(arguments.folders)
        keys = differing_keys(runs) if arguments.by is None else arguments.by
        print(comparison_table(runs, keys, dict(item.split("=", 1) for item in arguments.baseline)))
        if arguments.plot is not None:
            draw(runs, keys, arguments.plot)
    except NLDError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
