"""Compare runs: final validation losses by what differs in their configurations, with standard errors over seeds.

No torch: reads each run's ``config.yaml`` and ``metrics.jsonl``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nld_train.errors import DataError
from nld_train.training.metrics import RunMetrics, read_metrics

_NOT_COMPARED = ("run.dir", "run.seed", "wandb", "export", "checkpoint", "data.num_workers", "train.log_interval")
LOSSES = ("val_ar_loss", "val_diffusion_loss")


@dataclass(frozen=True, slots=True)
class Run:
    """A run: its resolved configuration, flattened to dotted keys, and its records.

    One more key, ``stages``, holds the names of the stages.
    """

    folder: Path
    settings: Mapping[str, Any]
    metrics: RunMetrics

    @property
    def seed(self) -> int:
        return int(self.settings["run.seed"])

    @property
    def stages(self) -> list[str]:
        return str(self.settings["stages"]).split("+")

    @property
    def num_tokens(self) -> int:
        """Clean tokens of all stages."""
        return sum(int(self.settings[f"stages.{name}.tokens"]) for name in self.stages)

    def final(self, name: str) -> float:
        """The last validation's value; nan where it was not finite."""
        return _number(self.metrics.validations[-1][name])

    def work(self, tokens: int) -> float:
        """Work until ``tokens`` clean tokens were consumed, in tokens of an AR step.

        A clean token of an AR stage counts 1, one of a joint stage 1 + noisy_fraction for each noisy copy: the rows
        that pass through the layers. Attention and head are not counted apart.
        """
        rows = float(self.settings["objective.noisy_fraction"]) * (2 if self.settings["objective.complementary"] else 1)
        total, left = 0.0, tokens
        for name, stage_tokens in _stage_tokens(self.metrics).items():
            used = min(left, stage_tokens)
            is_joint = self.settings[f"stages.{name}.diffusion_loss_weight"] > 0
            total += used * (1.0 + rows * is_joint)
            left -= used
        return total


def _number(value: float | None) -> float:
    """A value of a record, in which null stands for a number that is not finite."""
    return math.nan if value is None else float(value)


def _stage_tokens(metrics: RunMetrics) -> dict[str, int]:
    """Clean tokens of each stage, in their order, from the records."""
    ends: dict[str, int] = {}
    for record in metrics.steps:
        ends[record["stage"]] = record["tokens"]
    begins = [0, *list(ends.values())[:-1]]
    return {name: end - begin for (name, end), begin in zip(ends.items(), begins, strict=True)}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        key: value for name, part in tree.items() for key, value in _flat(part, f"{prefix}.{name}".lstrip(".")).items()
    }


def load_run(folder: Path) -> Run:
    """Read a run's folder, that of a run under way, too.

    Raises:
        DataError: it has no configuration or no metrics of a step, or they are damaged.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        what = "does not exist" if folder.is_dir() else f"does not exist: {folder} is not a folder"
        raise DataError(str(path), what, "name folders of runs")
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        settings = {"stages": "+".join(tree["stages"])} | _flat(tree)
        int(settings["run.seed"])
        for name in tree["stages"]:
            int(settings[f"stages.{name}.tokens"])
    except (YAMLError, OmegaConfBaseException, KeyError, TypeError, ValueError) as error:
        raise DataError(str(path), f"is not a run's configuration: {error}", "restore the file") from error
    metrics = read_metrics(folder / "metrics.jsonl")
    if not metrics.steps:
        what = "holds no step record yet"
        raise DataError(str(folder / "metrics.jsonl"), what, "wait until the run has logged its first step")
    for record in (*metrics.steps, *metrics.validations):
        if missing := [name for name in ("stage", "tokens") if name not in record]:
            what = f"a record of step {record['step']} has no {' and no '.join(missing)}"
            raise DataError(str(folder / "metrics.jsonl"), what, "remove that line, or restore the file")
        if not isinstance(record["tokens"], int) or not isinstance(record["stage"], str):
            what = f"step {record['step']}: stage {record['stage']!r}, tokens {record['tokens']!r}; a name and a number"
            raise DataError(str(folder / "metrics.jsonl"), what, "remove that line, or restore the file")
    return Run(folder, settings, metrics)


def read_run(folder: Path) -> Run:
    """Read one finished run's folder.

    Raises:
        DataError: it has no configuration, no metrics, or no validation, or is not finished.
    """
    run = load_run(folder)
    if not run.metrics.validations:
        raise DataError(str(folder / "metrics.jsonl"), "holds no validation record", "wait until the run has validated")
    done = run.metrics.steps[-1]["tokens"]
    if done < run.num_tokens:
        raise DataError(
            str(folder),
            f"is not finished: {done:,} tokens of {run.num_tokens:,}",
            "finish the run (the same command goes on), or leave it out",
        )
    return run


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in the given folders: each is a run, or holds runs (a sweep).

    Raises:
        DataError: a folder holds none, or a run cannot be read.
    """
    found: list[Run] = []
    for folder in folders:
        if (folder / "config.yaml").is_file():
            found.append(read_run(folder))
            continue
        inside = sorted(path.parent for path in folder.glob("*/config.yaml"))
        if not inside:
            raise DataError(str(folder), "holds no run", "name a run's folder, or the run.dir of a sweep")
        found += [read_run(path) for path in inside]
    return found


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """Settings that are not the same in all runs that have them, in the order of the configuration.

    Places and seeds are left out. A stage that only some of the runs have shows in ``stages``.
    """
    keys = {key: None for run in runs for key in run.settings}
    return [
        key
        for key in keys
        if not any(key == name or key.startswith(f"{name}.") for name in _NOT_COMPARED)
        and len({str(run.settings[key]) for run in runs if key in run.settings}) > 1
    ]


def group_runs(runs: Sequence[Run], keys: Sequence[str]) -> dict[tuple[str, ...], list[Run]]:
    """Runs by the values of ``keys``, in the order of first appearance.

    Raises:
        DataError: two runs of a group have the same seed.
    """
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        members = groups.setdefault(tuple(str(run.settings.get(key)) for key in keys), [])
        if any(member.seed == run.seed for member in members):
            raise DataError(
                str(run.folder), f"is a second run of seed {run.seed} with the same {list(keys)}", "name each run once"
            )
        members.append(run)
    return {values: sorted(members, key=lambda run: run.seed) for values, members in groups.items()}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (not-a-number for a single value)."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def _shown(mean: float, error: float, sign: str = "") -> str:
    return f"{mean:{sign}.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")


def _ordered(groups: dict[tuple[str, ...], list[Run]], baseline: Mapping[str, str]) -> dict[tuple[str, ...], list[Run]]:
    """The groups by their values, numbers as numbers; first the one whose settings are the baseline's.

    Raises:
        DataError: no group has them, or several do.
    """

    def sort_key(values: tuple[str, ...]) -> list[tuple[int, float, str]]:
        return [(0, float(v), "") if v.replace(".", "", 1).isdigit() else (1, 0.0, v) for v in values]

    ordered = dict(sorted(groups.items(), key=lambda item: sort_key(item[0])))
    if not baseline:
        return ordered
    matching = [
        values
        for values, members in ordered.items()
        if all(str(members[0].settings.get(key)) == value for key, value in baseline.items())
    ]
    if len(matching) != 1:
        wanted = ", ".join(f"{key}={value}" for key, value in baseline.items())
        raise DataError("--baseline", f"{len(matching)} rows have {wanted}", "name settings that one row has")
    return {matching[0]: ordered[matching[0]], **ordered}


def comparison_table(
    runs: Sequence[Run], keys: Sequence[str] | None = None, baseline: Mapping[str, str] | None = None
) -> str:
    """A Markdown table: one row for each combination of ``keys`` (None: all that differ), means over its seeds.

    Work is relative to the first row's, the one whose settings are ``baseline``. The columns with a Δ are differences
    from the first row's runs with the same seed, mean ± standard error of the pairs.
    """
    keys = differing_keys(runs) if keys is None else list(keys)
    groups = _ordered(group_runs(runs, keys), baseline or {})
    first = next(iter(groups.values()))
    by_seed = {run.seed: run for run in first}
    base_work = first[0].work(first[0].metrics.steps[-1]["tokens"])
    names = [name.removeprefix("val_").replace("_", " ") for name in LOSSES]
    header = [*(key.rpartition(".")[2] for key in keys), "seeds", "clean tokens", "work"]
    header += [column for name in names for column in (name, f"Δ {name}")]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for values, members in groups.items():
        tokens = members[0].metrics.steps[-1]["tokens"]
        cells = [*values, ",".join(str(run.seed) for run in members), f"{tokens:,}"]
        cells.append(f"{members[0].work(tokens) / base_work:.2f}")
        for name in LOSSES:
            cells.append(_shown(*mean_and_error([run.final(name) for run in members])))
            pairs = [run.final(name) - by_seed[run.seed].final(name) for run in members if run.seed in by_seed]
            is_base = members is first
            cells.append("" if is_base or not pairs else _shown(*mean_and_error(pairs), sign="+"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_curve(runs: Sequence[Run], name: str) -> tuple[list[float], list[float]]:
    """Validation points of a group: work in tokens of an AR step, and the mean over its runs.

    Steps that not every run has validated are left out.
    """
    by_step = [{record["step"]: record for record in run.metrics.validations} for run in runs]
    steps = sorted(set.intersection(*(set(records) for records in by_step)))
    work = [runs[0].work(by_step[0][step]["tokens"]) for step in steps]
    return work, [math.fsum(_number(records[step][name]) for records in by_step) / len(runs) for step in steps]
