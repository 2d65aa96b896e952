"""How one thing is measured against another: variants of one computation in interleaved rounds."""

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

Work = Callable[[], Sequence[Tensor]]
"""Does the computation once and returns its results (values and gradients)."""


def seconds(work: Work) -> float:
    """Wall time of one run, finished on the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@dataclass(slots=True, kw_only=True)
class Comparison:
    """Variants of one computation.

    Args:
        title: what is computed, at which shape and in which dtype.
        variants: name -> work; the first is the baseline.
        tolerance: largest relative distance, per returned tensor, from the baseline's result.
        required: variant -> smallest acceptable ratio to the baseline; others are only reported.
        measure: the quantity, smaller is better.
        unit: of the printed quantity.
        unit_scale: factor from what ``measure`` returns to ``unit``.
    """

    title: str
    variants: dict[str, Work]
    tolerance: float
    required: dict[str, float] = field(default_factory=dict)
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
            )
        )
    return rows


def check_equal(comparison: Comparison) -> None:
    """Raise where a variant's result is further than the tolerance from the baseline's."""
    names = list(comparison.variants)
    expected = comparison.variants[names[0]]()
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


def machine(keeps_memory: bool) -> dict[str, str | int]:
    """What the numbers depend on besides the code."""
    description: dict[str, str | int] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1),
        "threads": torch.get_num_threads(),
        "load_average": f"{os.getloadavg()[0]:.1f}",
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "as it was set"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "allocator": "keeps freed memory" if keeps_memory else os.environ.get("LD_PRELOAD", "as it was set"),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        description["gpu"] = torch.cuda.get_device_name()
        description["cuda"] = str(torch.version.cuda)
    return description


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def print_rows(rows: list[Row]) -> None:
    """One table per comparison, as soon as it is measured."""
    print(f"\n{rows[0].suite}: {rows[0].title}")
    for row in rows:
        low, high = row.quartiles
        verdict = ""
        if row.required is not None:
            verdict = f"  required {row.required:.2f}: {'yes' if row.passed else 'NO'}"
        print(
            f"  {row.variant:<24} {row.median:>9.2f} {row.unit} [{low:.2f}, {high:.2f}]"
            f"   x {row.ratio:.2f} [{row.ratio_quartiles[0]:.2f}, {row.ratio_quartiles[1]:.2f}]{verdict}",
            flush=True,
        )


def write_json(path: Path, description: dict[str, str | int], rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps({"machine": description, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    temporary.replace(path)
