#!/usr/bin/env python
"""Draw the curves of a run: training and validation losses of both objectives over clean tokens, stages, learning rate.

Reads RUN_DIR/metrics.jsonl (a running or resumed run is fine) and writes RUN_DIR/metrics.png. The training loss is
shown as it was measured (pale) and as a moving average (inside each stage). The diffusion loss of single steps scatters
widely because a token is weighted by 1/p: the axis spans the smoothed AR curve, the validation points and 90% of the
smoothed diffusion curve.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nld_train.errors import DataError, NLDError
from nld_train.training.metrics import RunMetrics, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AR_COLOR = "#1f5fa8"
DIFFUSION_COLOR = "#c8541b"
TOKEN_UNITS = ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands"), (1.0, "tokens"))


def smooth(values: Sequence[float], half_width: int) -> np.ndarray:
    """Mean over a window around each point, without lag: float64, as long as ``values``.

    The window reaches ``half_width`` to both sides, at the beginning only as far as there are values before the point
    (a steep start is not averaged away), at the end as far as there are values after it. Values that are not finite are
    left out; a window without any gives not-a-number.
    """
    measured = np.asarray(values, dtype=np.float64)
    is_finite = np.isfinite(measured)
    sums = np.concatenate([[0.0], np.cumsum(np.where(is_finite, measured, 0.0))])
    counts = np.concatenate([[0], np.cumsum(is_finite)])
    index = np.arange(len(measured))
    reach = np.minimum(index, half_width)
    begin, end = index - reach, np.minimum(index + reach + 1, len(measured))
    count = counts[end] - counts[begin]
    return np.where(count > 0, (sums[end] - sums[begin]) / np.maximum(count, 1), np.nan)


def _numbers(records: Sequence[dict[str, Any]], name: str) -> list[float]:
    """The field as floats; null (not computed, or not finite) is not-a-number."""
    return [math.nan if record[name] is None else float(record[name]) for record in records]


def _by_stage(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["stage"], []).append(record)
    return groups


def _token_unit(max_tokens: float) -> tuple[float, str]:
    return next((unit for unit in TOKEN_UNITS if max_tokens >= unit[0]), TOKEN_UNITS[-1])


def _draw_losses(axes: "Axes", metrics: RunMetrics, unit: float) -> None:
    shown: list[float] = []
    for field, val_field, label, color in (
        ("ar_loss", "val_ar_loss", "AR", AR_COLOR),
        ("diffusion_loss", "val_diffusion_loss", "diffusion", DIFFUSION_COLOR),
    ):
        label_left: str | None = f"{label}, training"
        for records in _by_stage(metrics.steps).values():
            values = _numbers(records, field)
            if not any(map(math.isfinite, values)):
                continue
            tokens = [record["tokens"] / unit for record in records]
            curve = smooth(values, half_width=len(values) // 30)
            axes.plot(tokens, values, color=color, alpha=0.22, linewidth=0.7)
            axes.plot(tokens, curve, color=color, linewidth=1.8, label=label_left)
            label_left = None
            ordered = sorted(filter(math.isfinite, curve))
            shown += ordered if field == "ar_loss" else ordered[: math.ceil(0.9 * len(ordered))]
        if metrics.validations:
            tokens = [record["tokens"] / unit for record in metrics.validations]
            values = _numbers(metrics.validations, val_field)
            # No line between them: there are few where the loss falls fast, and a chord would hide that.
            axes.plot(
                tokens,
                values,
                color=color,
                label=f"{label}, validation",
                linestyle="none",
                marker="o",
                markersize=5,
                markerfacecolor="white",
                clip_on=False,
                zorder=3,
            )
            shown += filter(math.isfinite, values)
    if shown:
        low, high = min(shown), max(shown)
        margin = 0.05 * (high - low) + 1e-3
        axes.set_ylim(low - margin, high + margin)
    axes.set_ylabel("loss (nats per token)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)


def draw(metrics: RunMetrics, title: str) -> "Figure":
    """The figure: losses above, learning rate below, over the same tokens.

    Args:
        metrics: with at least one step record.
        title: of the figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    max_tokens = max(record["tokens"] for record in [*metrics.steps, *metrics.validations])
    unit, unit_name = _token_unit(max_tokens)
    figure, (losses, rate) = pyplot.subplots(
        2, 1, figsize=(9, 6), sharex=True, height_ratios=(4, 1), layout="constrained"
    )
    _draw_losses(losses, metrics, unit)
    rate.plot([record["tokens"] / unit for record in metrics.steps], _numbers(metrics.steps, "lr"), color="#444444")
    rate.set_ylabel("learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate.set_ylim(bottom=0)
    rate.set_xlabel("clean tokens consumed" + ("" if unit == 1.0 else f" ({unit_name})"))
    begin = 0.0
    for name, records in _by_stage(metrics.steps).items():
        if begin > 0:
            for axes in (losses, rate):
                axes.axvline(begin, color="#888888", linestyle="--", linewidth=1.0)
        losses.annotate(
            f" stage {name}",
            (begin, 0.0),
            xycoords=("data", "axes fraction"),
            xytext=(2, 5),
            textcoords="offset points",
        )
        begin = records[-1]["tokens"] / unit
    for axes in (losses, rate):
        axes.grid(True, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    rate.set_xlim(0, max_tokens / unit)
    return figure


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
    figure = draw(metrics, title)
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
