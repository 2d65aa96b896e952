"""Stored results of the benchmark, and the page that is written from them.

A file of results is ``{"measurements": [{"machine": {...}, "rows": [...]}, ...]}``: rows that were measured together,
with what they depend on besides the code. A comparison that is measured again replaces the rows of its title.
"""

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import torch

from nld_train.errors import DataError
from nld_train.platform.cpu import cpu_info
from nld_train.testing.benchmarks.comparison import Row

_ROOT = Path(__file__).parents[3]
RESULTS = _ROOT / "docs" / "performance"
"""Results that are kept, and ``by_hand.md``."""
PAGE = _ROOT / "docs" / "performance.md"

_HEAD = """# Performance

Ratios, measured side by side in one process by `scripts/benchmark.py`; absolute times say more about the machine. Every
figure is the median of interleaved rounds [first and third quartile]; the ratio is that of the first variant of the
comparison to this one, round by round. *CPU ms* is CPU time of all threads (`--cpu-time`), for a machine that is busy
with other things. `scripts/benchmark.py --write-docs` writes this page from the results in
`docs/performance`, which `scripts/benchmark.py SUITE --store` measures (`--only REGEX`: single comparisons). A test
compares the two, so figures cannot be edited here. What a step costs on paper, and which part of it is where, is in
[step_cost.md](step_cost.md).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Rows of one call of the benchmark.

    Args:
        machine: of :func:`machine`.
        rows: in the order in which they were measured.
    """

    machine: Mapping[str, str | int]
    rows: Sequence[Row]


def machine(keeps_memory: bool) -> dict[str, str | int]:
    """What the numbers depend on.

    Args:
        keeps_memory: the allocator was told to keep freed memory.
    """
    description: dict[str, str | int] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": cpu_info().name or platform.processor() or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1),
        "threads": torch.get_num_threads(),
        "load_average": f"{os.getloadavg()[0]:.1f}",
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "as it was set"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "allocator": "keeps freed memory" if keeps_memory else os.environ.get("LD_PRELOAD", "as it was set"),
        "os": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron-core": version("megatron-core"),
    }
    if torch.cuda.is_available():
        description["gpu"] = torch.cuda.get_device_name()
        description["cuda"] = str(torch.version.cuda)
    return description


def _commit() -> str:
    """Of the code that is measured; ``unknown`` outside of a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        changes = git("status", "--porcelain", "--", "nld_train", "scripts", "configs")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit} with changes" if changes else commit


def read_results(path: Path) -> list[Measurement]:
    """The measurements of a file; none where there is no file.

    Raises:
        DataError: it holds something else.
    """
    if not path.exists():
        return []
    try:
        measurements = json.loads(path.read_text(encoding="utf-8"))["measurements"]
        return [Measurement(machine=item["machine"], rows=[_row(row) for row in item["rows"]]) for item in measurements]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(str(path), f"no results of the benchmark ({error!r})", "remove it and measure again") from error


def _row(fields: dict[str, object]) -> Row:
    pairs = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return Row(**{**fields, **pairs})  # type: ignore[arg-type]  # JSON has lists for pairs


def store_results(path: Path, description: Mapping[str, str | int], rows: Sequence[Row]) -> None:
    """Add rows to a file; those of a comparison that is there already are replaced."""
    titles = {(row.suite, row.title) for row in rows}
    measurements = []
    for old in read_results(path):
        kept = [row for row in old.rows if (row.suite, row.title) not in titles]
        if kept:
            measurements.append(Measurement(machine=old.machine, rows=kept))
    if measurements and measurements[-1].machine == description:
        rows = [*measurements.pop().rows, *rows]
    measurements.append(Measurement(machine=description, rows=rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    content = {"measurements": [asdict(measurement) for measurement in measurements]}
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def stored_file(suite: str, description: Mapping[str, str | int]) -> Path:
    """Where results of a suite are kept: one file for the CPU, one for each kind of GPU."""
    gpu = str(description.get("gpu", ""))
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return RESULTS / (f"{suite}-{slug}.json" if slug else f"{suite}.json")


def performance_page(folder: Path, suites: Mapping[str, str]) -> str:
    """The page, from the results in ``folder``.

    Args:
        suites: what each suite measures (Markdown), in the order of the page.

    Raises:
        DataError: results of a suite that does not exist.
    """
    measurements = [(path, item) for path in sorted(folder.glob("*.json")) for item in read_results(path)]
    for path, item in measurements:
        for row in item.rows:
            if row.suite not in suites:
                raise DataError(
                    str(path), f"results of a suite {row.suite!r}", f"remove them: there is {', '.join(suites)}"
                )
    required = [row for _, item in measurements for row in item.rows if row.required is not None]
    missed = [row for row in required if not row.passed]
    lines = [_HEAD]
    if not any("gpu" in item.machine for _, item in measurements):
        lines.append(
            "**No GPU is among these results, and the CUDA paths have not been run.** `scripts/gpu_check.sh` checks\n"
            "and measures them on a machine with one.\n"
        )
    lines.append(f"Of {len(required)} ratios that are asked for, {len(required) - len(missed)} are reached. Missed:\n")
    lines += [
        f"- {row.suite}: {row.title}: {row.variant} {row.ratio:.2f} for {row.required:.2f}" for row in missed
    ] or ["- none"]
    for suite, words in suites.items():
        lines += ["", f"## {suite}", "", words, "", f"    python scripts/benchmark.py {suite}", ""]
        found = [
            (item.machine, rows)
            for _, item in measurements
            if (rows := [row for row in item.rows if row.suite == suite])
        ]
        if not found:
            lines.append("Not measured yet.")
        for description, rows in found:
            lines += [_conditions(description, rows), "", *_table(rows), ""]
    by_hand = folder / "by_hand.md"
    if by_hand.exists():
        lines += ["", by_hand.read_text(encoding="utf-8")]
    text = "\n".join(lines)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def _conditions(description: Mapping[str, str | int], rows: Sequence[Row]) -> str:
    rounds = sorted({row.rounds for row in rows})
    where = f"{description['gpu']}, CUDA {description['cuda']}; " if "gpu" in description else ""
    return (
        f"*{where}{description['cpus']} cores of {description['cpu']} ({description['cpu_capability']}), "
        f"{description['threads']} threads, OMP_WAIT_POLICY={description['omp_wait_policy']}, the allocator "
        f"{description['allocator']}, load {description['load_average']} at the beginning; {description['os']}, Python "
        f"{description['python']}, torch {description['torch']}"
        + (f", megatron-core {description['megatron-core']}" if "megatron-core" in description else "")
        + f"; {str(description['date'])[:10]}, commit {description['commit']}; "
        f"{' or '.join(map(str, rounds))} round{'' if rounds == [1] else 's'}.*"
    )


def _table(rows: Sequence[Row]) -> list[str]:
    """Markdown, a comparison after the other."""
    has_model = any(row.modelled is not None for row in rows)
    head = ["comparison", "variant", "measured", "ratio"] + (["modelled"] if has_model else []) + ["asked"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for title, group in groupby(rows, key=lambda row: row.title):
        for number, row in enumerate(group):
            asked = "" if row.required is None else f"{row.required:.2f}: {'reached' if row.passed else '**missed**'}"
            cells = [
                title if number == 0 else "",
                row.variant,
                f"{_number(row.median)} {row.unit} [{', '.join(map(_number, row.quartiles))}]",
                f"{row.ratio:.2f} [{', '.join(f'{ratio:.2f}' for ratio in row.ratio_quartiles)}]",
            ]
            cells += ["" if row.modelled is None else f"{row.modelled:.2f}"] if has_model else []
            lines.append(f"| {' | '.join([*cells, asked])} |")
    return lines


def _number(value: float) -> str:
    """Three significant digits at least, no exponent."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f}"
