"""The records of a run: how they are built, what ``metrics.jsonl`` looks like, and how it is read back.

One JSON object per line. A step record holds ``step, stage, tokens, loss, ar_loss, diffusion_loss, lr, grad_norm``, the
times, rates and memory of :data:`TIMING_FIELDS`, ``is_spike`` (the loss stands out) and ``num_skipped_steps`` (of the
run so far). Of a step that was skipped because a number was not finite it says ``is_skipped`` (true), with
``suspect_samples`` (places in the stream) and, for each, the first of the ranks that read it (``suspect_ranks``).
A validation record holds ``step, stage, tokens, val_ar_loss, val_diffusion_loss`` and whatever else the validation
reports, each name with ``val_`` before it. Losses are means per token in nats; ``tokens`` counts the clean tokens
consumed since the start of the run; ``diffusion_loss`` is null in a stage with alpha = 0, ``ar_loss`` in one with
``ar_loss_weight`` 0.
A number that is not finite stands as null, and ``non_finite`` names it:
``{"loss": null, "non_finite": {"loss": "nan"}}``.

No torch here: whoever only reads metrics (a plot, a report) does not wait for it.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from nld_train.errors import DataError

Item = TypeVar("Item")

TIMING_FIELDS = frozenset(
    {
        "step_seconds",  # wall time of a step, of training alone
        "tokens_per_second",  # clean, of all ranks
        "mfu",  # needed operations by what the devices' peak allows in the time; null where no peak is known
        "data_seconds",  # of a step in which rank 0 waited for its micro-batches
        "forward_seconds",  # of a step, on rank 0, as the next two
        "backward_seconds",
        "optimizer_seconds",  # with the gradient's norm
        "checkpoint_seconds",  # in which training stood still for checkpoints since the last record, as the next
        "validation_seconds",
        "host_memory_gb",  # 2^30 bytes: resident, of rank 0's process
        "device_memory_gb",  # 2^30 bytes: the most that rank 0's GPU had allocated; null on a CPU
    }
)
"""Times, rates and memory: the only fields that may differ between two otherwise identical runs."""

PAUSES = ("checkpoint", "validation")
MEAN_FIELDS = ("loss", "ar_loss", "diffusion_loss")
VALIDATION_FIELDS = ("ar_loss", "diffusion_loss")


@dataclass(frozen=True, slots=True)
class Lap:
    """Rates since the last lap: ``step_seconds`` wall time of a step, ``tokens_per_second`` clean, of all ranks,
    ``data_seconds`` of a step in which this rank waited for its micro-batches; ``phase_seconds`` of a step in each
    phase; ``pause_seconds`` in which training stood still for something, since the last lap."""

    step_seconds: float
    tokens_per_second: float
    data_seconds: float
    phase_seconds: Mapping[str, float] = field(default_factory=dict)
    pause_seconds: Mapping[str, float] = field(default_factory=dict)


class PhaseSeconds(Protocol):
    """What a clock needs of :class:`nld_train.training.phases.PhaseTimers`."""

    def paused(self) -> AbstractContextManager[None]: ...

    def take(self) -> dict[str, float]: ...


class StepClock:
    """Wall time of training alone: what is done inside :meth:`paused` does not count.

    Args:
        step: last finished step (0 for a fresh run).
        tokens: clean tokens consumed until then.
        phases: of the steps; None: they are not told apart.
        now: a clock in seconds.
    """

    def __init__(
        self,
        step: int,
        tokens: int,
        phases: PhaseSeconds | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._now = now
        self._step = step
        self._tokens = tokens
        self._phases = phases
        self._waited = 0.0
        self._pauses = dict.fromkeys(PAUSES, 0.0)
        self._since = now()

    @contextmanager
    def paused(self, reason: str | None = None) -> Iterator[None]:
        """Around validation, checkpoints and whatever else is not a training step; ``reason`` is one of
        :data:`PAUSES`, if the time is to be told. Not one inside another."""
        start = self._now()
        try:
            with self._phases.paused() if self._phases is not None else nullcontext():
                yield
        finally:
            seconds = self._now() - start
            self._since += seconds
            if reason is not None:
                self._pauses[reason] += seconds

    def waiting(self, data: Iterator[Item]) -> Iterator[Item]:
        """The same items; the time until each of them is there counts as waiting."""
        while True:
            start = self._now()
            try:
                item = next(data)
            except StopIteration:
                return
            finally:
                self._waited += self._now() - start
            yield item

    def lap(self, step: int, tokens: int) -> Lap:
        """Rates since the last lap.

        Args:
            step: last finished step; later than that of the last lap.
            tokens: clean tokens consumed since the start of the run.
        """
        if step <= self._step:
            raise ValueError(f"a lap at step {step}, but the last one was at step {self._step}")
        now = self._now()
        seconds = max(now - self._since, 1e-9)  # a clock of coarse resolution may stand still
        num_steps = step - self._step
        phases = self._phases.take() if self._phases is not None else {}
        lap = Lap(
            seconds / num_steps,
            (tokens - self._tokens) / seconds,
            self._waited / num_steps,
            {name: value / num_steps for name, value in phases.items()},
            self._pauses,
        )
        self._step, self._tokens, self._since, self._waited = step, tokens, now, 0.0
        self._pauses = dict.fromkeys(PAUSES, 0.0)
        return lap


def step_record(
    *,
    step: int,
    stage: str,
    tokens: int,
    means: Mapping[str, float | None],
    lr: float,
    grad_norm: float,
    lap: Lap,
    usage: Mapping[str, float | None] | None = None,
    faults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The record of a logged step.

    Args:
        step: counted from 1 over the whole run.
        stage: name of the stage.
        tokens: clean tokens consumed since the start of the run, this step included.
        means: means per token in nats, already reduced over ranks: ``loss``, ``ar_loss``, ``diffusion_loss`` (None
            where alpha is 0) and any further metric.
        lr: learning rate of this step.
        grad_norm: global gradient norm before clipping.
        lap: from :meth:`StepClock.lap`.
        usage: ``mfu`` and memory.
        faults: ``is_spike``, ``num_skipped_steps``, and what is said of a step that was skipped.
    """
    return {
        "step": step,
        "stage": stage,
        "tokens": tokens,
        **{name: means[name] for name in MEAN_FIELDS},
        "lr": lr,
        "grad_norm": grad_norm,
        **(faults or {}),
        "step_seconds": lap.step_seconds,
        "tokens_per_second": lap.tokens_per_second,
        "data_seconds": lap.data_seconds,
        **{f"{name}_seconds": seconds for name, seconds in ({**lap.phase_seconds, **lap.pause_seconds}).items()},
        **(usage or {}),
        **{name: value for name, value in means.items() if name not in MEAN_FIELDS},
    }


def validation_record(*, step: int, stage: str, tokens: int, means: Mapping[str, float | None]) -> dict[str, Any]:
    """The record of a validation after ``step``; ``means`` has at least ``ar_loss`` and ``diffusion_loss``."""
    missing = [name for name in VALIDATION_FIELDS if name not in means]
    if missing:
        raise ValueError(f"validation means lack {missing}")
    return {"step": step, "stage": stage, "tokens": tokens, **{f"val_{name}": value for name, value in means.items()}}


def is_validation(record: Mapping[str, Any]) -> bool:
    """True for a validation record, False for a step record."""
    return "val_ar_loss" in record


def finite_values(record: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is null or not finite, the same of a record and of what was read back of it."""
    return {
        name: value
        for name, value in record.items()
        if value is not None and name != "non_finite" and not (isinstance(value, float) and not math.isfinite(value))
    }


def encode_record(record: Mapping[str, Any]) -> bytes:
    """One line of ``metrics.jsonl``, newline included; floats survive the round trip to the last bit."""
    non_finite = {
        name: str(value) for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)
    }
    if non_finite:
        record = {**record, **dict.fromkeys(non_finite), "non_finite": non_finite}
    return json.dumps(record, allow_nan=False).encode() + b"\n"


@dataclass(frozen=True, slots=True)
class ParsedLines:
    """Records, the bytes each stands in (newline included), and how many unreadable lines the end of the file had."""

    records: list[dict[str, Any]]
    lines: list[bytes]
    num_torn: int


def parse_lines(data: bytes, path: Path) -> ParsedLines:
    """Parse the bytes of a ``metrics.jsonl``.

    Unreadable lines at the end are the trace of a process that was killed while it wrote; they are left out. One that
    is followed by a good line was damaged in another way.

    Raises:
        DataError: an unreadable line with readable ones after it.
    """
    records: list[dict[str, Any]] = []
    lines: list[bytes] = []
    first_bad: int | None = None
    num_bad = 0
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line:
            continue
        try:
            record = json.loads(line)
            readable = isinstance(record, dict) and isinstance(record.get("step"), int)
        except ValueError:  # not JSON, or not UTF-8
            readable = False
        if not readable:
            first_bad = first_bad or number
            num_bad += 1
            continue
        if first_bad is not None:
            raise DataError(
                f"{path}:{first_bad}",
                "is not a metrics record, and good records follow it",
                "remove that line, or restore the file",
            )
        records.append(record)
        lines.append(line + b"\n")
    return ParsedLines(records, lines, num_bad)


def records_of(path: Path) -> Iterator[dict[str, Any]]:
    """The readable records of a ``metrics.jsonl``, one at a time, however long it is; none where there is no file."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            yield from parse_lines(line, path).records


@dataclass(frozen=True, slots=True)
class RunMetrics:
    """The records of a run in the order of the file."""

    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]


def read_metrics(path: Path) -> RunMetrics:
    """Read a ``metrics.jsonl``, that of a running run too (a half-written last line is left out).

    Raises:
        DataError: no such file, nothing in it, or a damaged line in its middle.
    """
    if not path.is_file():
        raise DataError(str(path), "does not exist", "give the folder of a run that has logged at least one step")
    records = parse_lines(path.read_bytes(), path).records
    if not records:
        raise DataError(str(path), "holds no record yet", "wait until the run has logged its first step")
    return RunMetrics(
        steps=[record for record in records if not is_validation(record)],
        validations=[record for record in records if is_validation(record)],
    )
