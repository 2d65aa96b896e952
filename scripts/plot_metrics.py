#!/usr/bin/env python
"""Draw the curves of a run: training and validation losses of both objectives over clean tokens, stages, learning rate.

Reads RUN_DIR/metrics.jsonl (a running or resumed run is fine) and writes RUN_DIR/metrics.png. The training loss is
shown as it was measured (pale) and as a moving average (inside each stage). The diffusion loss of single steps scatters
widely because a token is weighted by 1/p: the axis spans the smoothed AR curve, the validation points and 90% of the
smoothed diffusion curve.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nld_train.errors import DataError, NLDError
from nld_train.evaluation.curves import draw_run
from nld_train.training.metrics import read_metrics


def plot_run(run_dir: Path, out: Path | None = None, title: str | None = None) -> Path:
    """Write the figure of a run and return its path.

    Args:
        run_dir: folder with ``metrics.jsonl``.
        out: a .png, .pdf or .svg; None: ``metrics.png`` in the run's folder.
        title: None: the folder's name and its last step.

    Raises:
        DataError: no metrics, no step among them, or a picture format that matplotlib does not write.
    """
    from matplotlib import pyplot

    path = run_dir / "metrics.jsonl"
    metrics = read_metrics(path)
    if not metrics.steps:
        raise DataError(str(path), "holds no step record yet", "wait until the run has logged its first step")
    out = run_dir / "metrics.png" if out is None else out
    if out.suffix not in {".png", ".pdf", ".svg"}:
        raise DataError(str(out), f"has the unknown picture format {out.suffix!r}", "name it .png, .pdf or .svg")
    if title is None:
        last = metrics.steps[-1]
        title = f"{run_dir.resolve().name}: {last['step']} steps, {last['tokens']:,} clean tokens"
    figure = draw_run(metrics, title)
    temporary = out.with_name(f".{out.name}.tmp")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(temporary, dpi=150, format=out.suffix[1:])
    pyplot.close(figure)
    temporary.replace(out)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a run, e.g. runs/tiny")
    parser.add_argument("--out", type=Path, help="picture to write (.png, .pdf, .svg); default RUN_DIR/metrics.png")
    parser.add_argument("--title", help="default: the folder's name and its last step")
    arguments = parser.parse_args(argv)
    try:
        print(plot_run(arguments.run_dir, arguments.out, arguments.title))
    except (NLDError, OSError) as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
