"""How one thing is measured against another: variants of one computation in interleaved rounds."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Work = Callable[[], Sequence[Tensor]]
"""Does the computation once and returns its results (values and gradients). They may be views of buffers that the same
work fills again: whoever keeps them copies them, outside of what is timed."""


def seconds(work: Work) -> float:
    """Wall time of one run, finished on the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def cpu_seconds(work: Work) -> float:
    """CPU time of one run, all threads of this process together: what other programs on the machine take is not in it,
    and neither is what threads lose that wait for each other asleep."""
    start = time.process_time()
    work()
    return time.process_time() - start


@dataclass(slots=True, kw_only=True)
class Comparison:
    """Variants of one computation.

    Args:
        title: what is computed, at which shape and in which dtype.
        variants: name -> work; the first is the baseline.
        tolerance: largest relative distance, per returned tensor, from the baseline's result.
        required: variant -> smallest acceptable ratio to the baseline; others are only reported.
        modelled: variant -> the ratio that counting operations gives.
        measure: the quantity, smaller is better.
        unit: of the printed quantity.
        unit_scale: factor from what ``measure`` returns to ``unit``.
    """

    title: str
    variants: dict[str, Work]
    tolerance: float
    required: dict[str, float] = field(default_factory=dict)
    modelled: dict[str, float] = field(default_factory=dict)
    measure: Callable[[Work], float] = seconds
    unit: str = "ms"
    unit_scale: float = 1e3


Suite = Callable[[torch.device], Iterator[Comparison]]


@dataclass(slots=True, kw_only=True)
class Row:
    """One variant's result; ``quartiles`` of the quantity, ``ratio`` the median over rounds of baseline / variant."""

    suite: str
    title: str
    variant: str
    unit: str
    median: float
    quartiles: tuple[float, float]
    ratio: float
    ratio_quartiles: tuple[float, float]
    required: float | None
    rounds: int
    modelled: float | None = None

    @property
    def passed(self) -> bool:
        return self.required is None or self.ratio >= self.required


def run_comparison(suite: str, comparison: Comparison, rounds: int, warmup: int) -> list[Row]:
    """Check that the variants agree, then measure them in interleaved rounds (each round starts with another one)."""
    check_equal(comparison)
    names = list(comparison.variants)
    values: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            value = comparison.measure(comparison.variants[name]) * comparison.unit_scale
            if turn >= warmup:
                values[name].append(value)
    baseline = values[names[0]]
    rows = []
    for name in names:
        ratios = [base / value for base, value in zip(baseline, values[name], strict=True)]
        rows.append(
            Row(
                suite=suite,
                title=comparison.title,
                variant=name,
                unit=comparison.unit,
                median=statistics.median(values[name]),
                quartiles=quartiles(values[name]),
                ratio=statistics.median(ratios),
                ratio_quartiles=quartiles(ratios),
                required=comparison.required.get(name),
                rounds=rounds,
                modelled=comparison.modelled.get(name),
            )
        )
    return rows


def check_equal(comparison: Comparison) -> None:
    """Raise where a variant's result is further than the tolerance from the baseline's."""
    names = list(comparison.variants)
    # Copied, since the next variant may fill the same buffers.
    expected = [result.clone() for result in comparison.variants[names[0]]()]
    for name in names[1:]:
        actual = comparison.variants[name]()
        for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
            distance = ((a.double() - b.double()).norm() / b.double().norm()).item()
            if not distance <= comparison.tolerance:  # a NaN fails, too
                raise RuntimeError(
                    f"{comparison.title}: result {index} of {name!r} is {distance:.1e} away from that of {names[0]!r} "
                    f"(tolerance {comparison.tolerance:.1e}); a wrong result is not worth timing"
                )


def quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def print_rows(rows: list[Row]) -> None:
    """One table per comparison, as soon as it is measured."""
    print(f"\n{rows[0].suite}: {rows[0].title}")
    for row in rows:
        low, high = row.quartiles
        verdict = ""
        if row.required is not None:
            verdict = f"  required {row.required:.2f}: {'yes' if row.passed else 'NO'}"
        if row.modelled is not None:
            verdict = f"  modelled {row.modelled:.2f}{verdict}"
        print(
            f"  {row.variant:<24} {row.median:>9.2f} {row.unit} [{low:.2f}, {high:.2f}]"
            f"   x {row.ratio:.2f} [{row.ratio_quartiles[0]:.2f}, {row.ratio_quartiles[1]:.2f}]{verdict}",
            flush=True,
        )
