"""Curves of runs over clean tokens, read from their ``metrics.jsonl``. No torch. Each function returns a figure."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nld_train.training.metrics import RunMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AR_COLOR = "#1f5fa8"
DIFFUSION_COLOR = "#c8541b"
LINEAR_COLOR = "#3a8a3f"
QUADRATIC_COLOR = "#7a3f98"
INK_COLOR, PALE_COLOR = "#444444", "#888888"
RUN_COLORS = ("#2a78c2", "#d0661f", "#3a9a55", "#a05bc0", "#c2455a", "#8a7a2a")
FAULTS = (("is_spike", "loss spikes", "v", "#9a8424"), ("is_skipped", "steps skipped", "X", "#c2455a"))
"""Field of a step record, its name, marker and colour."""
SHARE_COLORS = ("#2f7fd0", "#8a86a8", "#d9602a")
"""Of the masked share, from few to all; each is legible on white and on black."""
_LOSS_AT = {percent: f"diffusion_loss_at_{percent}" for percent in range(10, 101, 10)}
"""Fields of a step record by the upper end of the masked share, in percent."""
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
    """The field as floats; null or missing (not computed, or not finite) is not-a-number."""
    return [math.nan if record.get(name) is None else float(record[name]) for record in records]


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
    for name, label, marker, color in FAULTS:
        if tokens := [record["tokens"] / unit for record in metrics.steps if record.get(name)]:
            # At the upper edge: the loss of a spike is out of the figure, that of a skipped step is often no number.
            axes.vlines(tokens, 0, 1, transform=axes.get_xaxis_transform(), color=color, alpha=0.35, linewidth=0.8)
            edge = [0.985] * len(tokens)
            axes.plot(tokens, edge, marker, color=color, transform=axes.get_xaxis_transform(), label=label, zorder=4)
    axes.set_ylabel("loss (nats per token)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)


def draw_run(metrics: RunMetrics, title: str | None = None) -> "Figure":
    """The figure: losses above, learning rate below, over the same tokens.

    Args:
        metrics: with at least one step record.
        title: of the figure.
    """
    pyplot = _pyplot()
    max_tokens = max(record["tokens"] for record in [*metrics.steps, *metrics.validations])
    unit, unit_name = _token_unit(max_tokens)
    figure, (losses, rate) = pyplot.subplots(
        2, 1, figsize=(9, 6), sharex=True, height_ratios=(4, 1), layout="constrained"
    )
    _draw_losses(losses, metrics, unit)
    rate.plot([record["tokens"] / unit for record in metrics.steps], _numbers(metrics.steps, "lr"), color=INK_COLOR)
    rate.set_ylabel("learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate.set_ylim(bottom=0)
    rate.set_xlabel(_token_label(unit_name))
    _mark_stages(losses, metrics, unit, (losses, rate))
    for axes in (losses, rate):
        _tidy(axes)
    if title is not None:
        figure.suptitle(title)
    rate.set_xlim(0, max_tokens / unit)
    return figure


def draw_buckets(metrics: RunMetrics) -> "Figure | None":
    """Diffusion loss by the masked share of the block: over tokens, and with the accuracy at the end.

    The end is the last tenth of the steps with noisy blocks. None where there are no such steps.
    """
    noisy = [record for record in metrics.steps if any(record.get(name) is not None for name in _LOSS_AT.values())]
    if not noisy:
        return None
    pyplot = _pyplot()
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("share", SHARE_COLORS)
    unit, unit_name = _token_unit(noisy[-1]["tokens"])
    figure, (curves, ends) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    tail = noisy[-math.ceil(len(noisy) / 10) :]
    shares, losses, accuracies = [], [], []
    for percent, name in _LOSS_AT.items():
        values = _numbers(noisy, name)
        if not any(map(math.isfinite, values)):
            continue
        tokens = [record["tokens"] / unit for record in noisy]
        curve = smooth(values, half_width=len(values) // 12)
        curves.plot(tokens, curve, color=colors((percent - 10) / 90), linewidth=1.4, label=f"to {percent}%")
        at_end = [
            _mean(_numbers(tail, field)) for field in (name, name.replace("diffusion_loss_at", "diffusion_accuracy_at"))
        ]
        if math.isfinite(at_end[0]):
            shares.append(percent - 5)
            losses.append(at_end[0])
            accuracies.append(100 * at_end[1])
    curves.set_xlabel(_token_label(unit_name))
    curves.set_ylabel("nats per masked token")
    curves.legend(title="masked share", fontsize=7, title_fontsize=7, ncols=2, frameon=False)
    ends.plot(shares, losses, color=DIFFUSION_COLOR, marker="o", markersize=4)
    ends.set_xlabel("masked share of the block (%)")
    ends.set_ylabel("nats per masked token, at the end", color=DIFFUSION_COLOR)
    right = ends.twinx()
    right.plot(shares, accuracies, color=INK_COLOR, marker="s", markersize=4, linestyle="--")
    right.set_ylabel("accuracy at the end (%)")
    right.set_ylim(bottom=0)
    for axes in (curves, ends):
        _tidy(axes)
    return figure


def draw_speed(metrics: RunMetrics, resumed_after: Sequence[int] = ()) -> "Figure":
    """Clean tokens per second, and the seconds of a step by what they were spent on.

    Args:
        resumed_after: last finished steps of the checkpoints that the run was resumed from; marked.
    """
    pyplot = _pyplot()
    unit, unit_name = _token_unit(metrics.steps[-1]["tokens"])
    tokens = [record["tokens"] / unit for record in metrics.steps]
    figure, (rate, seconds) = pyplot.subplots(1, 2, figsize=(9, 3.3), layout="constrained")
    values = _numbers(metrics.steps, "tokens_per_second")
    rate.plot(tokens, values, color=INK_COLOR, alpha=0.3, linewidth=0.7)
    rate.plot(tokens, smooth(values, half_width=len(values) // 30), color=INK_COLOR, linewidth=1.6)
    rate.set_ylabel("clean tokens per second")
    fields = dict.fromkeys(name for record in metrics.steps for name in record if name.endswith("_seconds"))
    for number, name in enumerate(fields):
        spent = smooth(_numbers(metrics.steps, name), half_width=len(values) // 30)
        color = RUN_COLORS[number % len(RUN_COLORS)]
        seconds.plot(tokens, spent, color=color, linewidth=1.4, label=name.removesuffix("_seconds").replace("_", " "))
    seconds.set_ylabel("seconds of a step")
    seconds.legend(frameon=False, fontsize=7)
    places = {record["step"]: record["tokens"] / unit for record in metrics.steps}
    for step in resumed_after:
        for axes in (rate, seconds):
            axes.axvline(places.get(step, 0.0), color=PALE_COLOR, linestyle=":", linewidth=1.2)
    if resumed_after:
        rate.set_title("dotted: the run was resumed", fontsize=8)
    for axes in (rate, seconds):
        axes.set_ylim(bottom=0)
        axes.set_xlabel(_token_label(unit_name))
        _tidy(axes)
    _mark_stages(rate, metrics, unit, (rate, seconds))
    return figure


def draw_usage(metrics: RunMetrics) -> "Figure | None":
    """Share of the devices' peak that the model's operations take (MFU), and rank 0's memory. None where no record has
    either."""
    memory = [
        (name, label)
        for name, label in (("device_memory_gb", "device, the most so far"), ("host_memory_gb", "host"))
        if any(record.get(name) is not None for record in metrics.steps)
    ]
    has_mfu = any(record.get("mfu") is not None for record in metrics.steps)
    if not memory and not has_mfu:
        return None
    pyplot = _pyplot()
    unit, unit_name = _token_unit(metrics.steps[-1]["tokens"])
    tokens = [record["tokens"] / unit for record in metrics.steps]
    figure, panels = pyplot.subplots(1, has_mfu + bool(memory), figsize=(9, 3.0), layout="constrained", squeeze=False)
    free = list(panels[0])
    if has_mfu:
        axes = free.pop(0)
        values = [100 * value for value in _numbers(metrics.steps, "mfu")]
        axes.plot(tokens, values, color=INK_COLOR, alpha=0.3, linewidth=0.7)
        axes.plot(tokens, smooth(values, half_width=len(values) // 30), color=INK_COLOR, linewidth=1.6)
        axes.set_ylabel("MFU (% of the peak)")
    if memory:
        axes = free.pop(0)
        for (name, label), color in zip(memory, RUN_COLORS, strict=False):
            axes.plot(tokens, _numbers(metrics.steps, name), color=color, linewidth=1.4, label=label)
        axes.set_ylabel("memory of rank 0 (GiB)")
        axes.legend(frameon=False, fontsize=7)
    for axes in panels[0]:
        axes.set_ylim(bottom=0)
        axes.set_xlabel(_token_label(unit_name))
        _tidy(axes)
    _mark_stages(panels[0][0], metrics, unit, panels[0])
    return figure


def draw_validations(runs: Mapping[str, RunMetrics]) -> "Figure | None":
    """Validation losses of several runs over each other; None where none has validated."""
    validated = {name: metrics for name, metrics in runs.items() if metrics.validations}
    if not validated:
        return None
    pyplot = _pyplot()
    unit, unit_name = _token_unit(max(metrics.validations[-1]["tokens"] for metrics in validated.values()))
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for axes, field, label in zip(panels, ("val_ar_loss", "val_diffusion_loss"), ("AR", "diffusion"), strict=True):
        for number, (name, metrics) in enumerate(validated.items()):
            tokens = [record["tokens"] / unit for record in metrics.validations]
            color = RUN_COLORS[number % len(RUN_COLORS)]
            values = _numbers(metrics.validations, field)
            axes.plot(tokens, values, color=color, marker="o", markersize=3, linewidth=1.3, label=name)
        axes.set_ylabel(f"{label} validation loss (nats per token)")
        axes.set_xlabel(_token_label(unit_name))
        _tidy(axes)
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _tidy(axes: "Axes") -> None:
    axes.grid(True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _token_label(unit_name: str) -> str:
    return "clean tokens consumed" + ("" if unit_name == "tokens" else f" ({unit_name})")


def _mark_stages(named: "Axes", metrics: RunMetrics, unit: float, lined: "Sequence[Axes]") -> None:
    """Write the stages' names into one of the axes, and lines between them into all."""
    begin = 0.0
    for name, records in _by_stage(metrics.steps).items():
        if begin > 0:
            for axes in lined:
                axes.axvline(begin, color=PALE_COLOR, linestyle="--", linewidth=1.0)
        named.annotate(
            f" stage {name}",
            (begin, 0.0),
            xycoords=("data", "axes fraction"),
            xytext=(2, 5),
            textcoords="offset points",
        )
        begin = records[-1]["tokens"] / unit


def _mean(values: Sequence[float]) -> float:
    finite = list(filter(math.isfinite, values))
    return math.fsum(finite) / len(finite) if finite else math.nan
