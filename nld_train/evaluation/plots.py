"""Figures of the evaluation suites. Each returns matplotlib's figure; :func:`save` writes it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nld_train.evaluation.curves import AR_COLOR, DIFFUSION_COLOR, LINEAR_COLOR, QUADRATIC_COLOR
from nld_train.evaluation.likelihood import LikelihoodResult
from nld_train.evaluation.modes import ALL, WayRow
from nld_train.evaluation.speed_of_light import LimitRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = {"ar": AR_COLOR, "diffusion": DIFFUSION_COLOR, "linear": LINEAR_COLOR, "quadratic": QUADRATIC_COLOR}


def figures(suite: str, result: Any) -> "dict[str, Figure]":
    """The figures of a suite's result by name; the harness has none."""
    if suite == "likelihood":
        return {"likelihood": likelihood_bars(result)}
    if suite == "decoding":
        return {"threshold_curves": threshold_curves(result), "acceptance": acceptance_histograms(result)}
    return {"speed_of_light": limit_bars(result)} if suite == "speed_of_light" else {}


def threshold_curves(rows: Sequence[WayRow]) -> "Figure":
    """Quality (AR likelihood of the output) against tokens per forward, a curve of thresholds for each category."""
    categories = list(dict.fromkeys(row["category"] for row in rows))
    figure, panels = _panels(len(categories), width=3.6, height=3.8)
    for axes, category in zip(panels, categories, strict=True):
        chosen = [row for row in rows if row["category"] == category]
        sweep = [row for row in chosen if "threshold" in row["way"]]
        points = [(row["tokens_per_forward"], row["ar_nats_per_token"]) for row in sweep]
        axes.plot(
            *zip(*points, strict=True), color=DIFFUSION_COLOR, marker="o", markersize=4, label="diffusion, thresholds"
        )
        for row, point in zip(sweep, points, strict=True):
            axes.annotate(
                f"{row['arguments']['threshold']:g}", point, fontsize=7, xytext=(3, 3), textcoords="offset points"
            )
        for mode, marker in (("ar", "s"), ("linear", "^"), ("quadratic", "D")):
            for row in (row for row in chosen if row["mode"] == mode):
                place = row["tokens_per_forward"], row["ar_nats_per_token"]
                axes.plot(*place, color=_COLORS[mode], marker=marker, linestyle="none", label=mode)
        axes.set_title(category)
        axes.set_xlabel("tokens per forward")
        axes.grid(True, alpha=0.25)
    panels[0].set_ylabel("AR nats per token of the output")
    panels[0].legend(frameon=False, fontsize=7)
    return figure


def acceptance_histograms(rows: Sequence[WayRow]) -> "Figure":
    """Tokens that a round settles, all categories together: speculation, and diffusion at threshold 0.9
    (or else at the first one measured)."""
    chosen = [row for row in rows if row["category"] == ALL and row["mode"] in ("linear", "quadratic")]
    sweep = [row for row in rows if row["category"] == ALL and "threshold" in row["way"]]
    chosen += [row for row in sweep if row["arguments"]["threshold"] == 0.9] or sweep[:1]
    figure, panels = _panels(len(chosen), width=4.0, height=3.4)
    for axes, row in zip(panels, chosen, strict=True):
        lengths = [int(length) for length in row["histogram"]]
        total = max(1, sum(row["histogram"].values()))
        axes.bar(lengths, [count / total for count in row["histogram"].values()], color=_COLORS[row["mode"]])
        axes.set_title(f"{row['way']}: mean {row['acceptance']:.2f}")
        axes.set_xlabel("tokens settled in a round")
        axes.grid(True, axis="y", alpha=0.25)
    panels[0].set_ylabel("share of rounds")
    return figure


def limit_bars(rows: Sequence[LimitRow]) -> "Figure":
    """Tokens per denoising step by block length: samplers beside the limits."""
    lengths = list(dict.fromkeys(row["block_length"] for row in rows))
    samplers = list(dict.fromkeys(row["sampler"] for row in rows))
    figure, (axes,) = _panels(1, width=7.0, height=4.0)
    width = 0.8 / len(samplers)
    for index, sampler in enumerate(samplers):
        heights = {row["block_length"]: row["acceptance"] for row in rows if row["sampler"] == sampler}
        places = [number + (index - (len(samplers) - 1) / 2) * width for number in range(len(lengths))]
        bars = axes.bar(places, [heights[length] for length in lengths], width=width, label=sampler)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_xlabel("block length")
    axes.set_ylabel("tokens per denoising step")
    axes.legend(frameon=False)
    axes.grid(True, axis="y", alpha=0.25)
    return figure


def likelihood_bars(result: LikelihoodResult) -> "Figure":
    """AR and the bound at each block size with standard errors over texts, and losses by masked share."""
    figure, (bars, curve) = _panels(2, width=4.8, height=3.8)
    names = ["AR", *(f"bound, {part['block_size']}" for part in result["diffusion"])]
    parts = [result["ar"], *result["diffusion"]]
    bars.bar(
        names,
        [part["bits_per_byte"] for part in parts],
        yerr=[part["error_over_texts"] * part["bits_per_byte"] / part["nats_per_token"] for part in parts],
        color=[AR_COLOR, *[DIFFUSION_COLOR] * len(result["diffusion"])],
        capsize=3,
    )
    bars.set_ylabel("bits per byte")
    bars.tick_params(axis="x", labelrotation=30)
    for part in result["diffusion"]:
        # One masked token in each whole block is 1/T of all masked; what is rarer is from blocks that are cut short.
        rarest = max(bucket["num_masked"] for bucket in part["buckets"]) / (2 * part["block_size"])
        buckets = [bucket for bucket in part["buckets"] if bucket["num_masked"] >= rarest]
        middles = [(bucket["low"] + bucket["high"]) / 2 for bucket in buckets]
        losses = [bucket["nats_per_masked_token"] for bucket in buckets]
        curve.plot(middles, losses, marker="o", markersize=3, label=f"blocks of {part['block_size']}")
    curve.axhline(result["ar"]["nats_per_token"], color=AR_COLOR, linestyle="--", linewidth=1.0, label="AR")
    curve.set_xlabel("masked share of the block")
    curve.set_ylabel("nats per masked token")
    curve.legend(frameon=False, fontsize=7)
    for axes in (bars, curve):
        axes.grid(True, axis="y", alpha=0.25)
    return figure


def save(figure: "Figure", out: Path) -> Path:
    """Write a PNG under its name when it is complete, and close the figure."""
    from matplotlib import pyplot

    temporary = out.with_name(f".{out.name}.tmp")
    figure.savefig(temporary, dpi=150, format="png")
    pyplot.close(figure)
    temporary.replace(out)
    return out


def _panels(count: int, *, width: float, height: float) -> "tuple[Figure, list]":  # type: ignore[type-arg]
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(width * count, height), squeeze=False, layout="constrained")
    return figure, list(axes[0])
