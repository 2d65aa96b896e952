"""What a person sees: the header of a run, live progress on a terminal, plain lines elsewhere, and ``train.log``."""

import contextlib
import math
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import psutil
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from nld_train.training.callbacks.base import Callback, RunInfo, StageInfo

JOINT_STEP_COST = 2.0
"""A joint step in units of an AR step: it runs 2L rows instead of L. Only for the time left of stages not yet begun."""


def format_count(value: float) -> str:
    """Three or four significant digits with a suffix: 950, 12.4k, 5.51M, 1.20T."""
    if abs(value) < 999.5:
        return f"{value:.0f}"
    units = ((1e3, "k"), (1e6, "M"), (1e9, "B"), (1e12, "T"))
    divisor, suffix = next((unit for unit in units if abs(value) < unit[0] * 999.5), units[-1])
    scaled = value / divisor
    digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
    return f"{scaled:.{digits}f}{suffix}"


def format_duration(seconds: float) -> str:
    """h:mm:ss, days in front where there are any."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hour}:{minute:02d}:{second:02d}"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def losses_text(record: dict[str, Any]) -> str:
    """``loss 4.1200  AR 3.2100  diffusion 3.0333  lr 1.00e-03  12.4k tokens/s``."""
    return (
        f"loss {_loss(record['loss'])}  AR {_loss(record['ar_loss'])}  diffusion {_loss(record['diffusion_loss'])}  "
        f"lr {record['lr']:.2e}  {format_count(record['tokens_per_second'])} tokens/s"
    )


def validation_text(record: dict[str, Any]) -> str:
    """One line for a validation record."""
    return (
        f"validation after step {record['step']} ({record['stage']}): AR {_loss(record['val_ar_loss'])}  "
        f"diffusion {_loss(record['val_diffusion_loss'])}"
    )


def header_lines(info: RunInfo) -> list[str]:
    """Model, stages and what was chosen, as plain text."""
    model = info.config["model"]
    rows = [("stage", "alpha", "steps", "clean tokens")] + [
        (
            stage.name,
            f"{stage.diffusion_loss_weight:g}",
            f"{stage.first_step}..{stage.last_step}",
            format_count(stage.tokens),
        )
        for stage in info.stages
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    begins = "starts" if info.start_step == 0 else f"resumes after step {info.start_step} of {info.num_steps}"
    facts = {
        "run": f"{info.run_dir} {begins}",
        "model": f"{format_count(info.num_parameters)} parameters: {model['num_layers']} layers, "
        f"hidden {model['hidden_size']}, {model['num_attention_heads']} query and {model['num_key_value_heads']} "
        f"key-value heads, vocabulary {model['vocab_size']}",
        "length": f"{info.num_steps} steps of {format_count(info.tokens_per_step)} clean tokens",
        **info.backends,
    }
    name_width = max(map(len, facts))
    return [
        *(f"{name:<{name_width}}  {fact}" for name, fact in facts.items()),
        *(
            "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ),
    ]


class TimeLeft:
    """Estimates the rest of the run from the wall time of the steps seen by this process (pauses included).

    A stage that has run predicts itself; one that has not, from the latest one by :data:`JOINT_STEP_COST`.
    """

    def __init__(self, info: RunInfo, now: Callable[[], float]) -> None:
        self._stages = info.stages
        self._now = now
        self._seconds_per_step: dict[str, float] = {}
        self._current: StageInfo | None = None
        self._from_step = info.start_step
        self._from_time = now()

    def stage_started(self, stage: StageInfo, last_step: int) -> None:
        """``last_step``: the last finished step of the run."""
        self._current, self._from_step, self._from_time = stage, last_step, self._now()

    def seconds(self, step: int) -> float:
        """Seconds left after ``step``, the one just finished."""
        if self._current is None:
            raise RuntimeError("no stage has started")
        self._seconds_per_step[self._current.name] = (self._now() - self._from_time) / max(1, step - self._from_step)
        return sum(
            max(0, stage.last_step - max(step, stage.first_step - 1)) * self._step_seconds(stage)
            for stage in self._stages
        )

    def _step_seconds(self, stage: StageInfo) -> float:
        if stage.name in self._seconds_per_step:
            return self._seconds_per_step[stage.name]
        assert self._current is not None
        return self._seconds_per_step[self._current.name] * _relative_cost(stage) / _relative_cost(self._current)


def _relative_cost(stage: StageInfo) -> float:
    return JOINT_STEP_COST if stage.diffusion_loss_weight > 0 else 1.0


class ConsoleDisplay(Callback):
    """The run's voice. Everything but the moving picture also goes to ``train.log``, with the time.

    On a terminal: one bar per stage, and the losses below. Elsewhere (a file, a batch system): a line at the first and
    the last step of every stage, and in between each time 5% of the time so far has passed, but at least every minute
    and at most every two seconds. ``train.log`` gets those lines in either case.

    The picture is drawn from ``on_step`` and never from a thread of its own: loader processes are forked while a run is
    under way, and a fork must not meet a lock held by another thread.

    Args:
        log_path: ``train.log``; appended to.
        console: where to show; None: standard output.
        now: a clock in seconds.
    """

    MIN_LINE_SECONDS = 2.0
    MAX_LINE_SECONDS = 60.0
    LINE_SHARE = 0.05
    MIN_REFRESH_SECONDS = 0.1

    def __init__(
        self, log_path: Path, console: Console | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._log_path = log_path
        self._log: TextIO | None = None
        self._console = Console() if console is None else console
        self._now = now
        self._started = now()
        self._line_time = -math.inf
        self._refresh_time = -math.inf
        self._info: RunInfo | None = None
        self._stage: StageInfo | None = None
        self._time_left: TimeLeft | None = None
        self._last_step = 0
        self._has_stepped = False
        self._live: Live | None = None
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def _write_log(self, text: str) -> None:
        if self._log is None:
            self._log_path.parent.mkdir(parents=True, exist_ok=True)
            self._log = self._log_path.open("a", encoding="utf-8")
        stamp = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError):  # a full disk: the lines wait in memory
            for line in text.splitlines():
                self._log.write(f"{stamp}  {line}\n")
            self._log.flush()

    def _show(self, text: str, style: str = "") -> None:
        # Text, not a string: square brackets in a message are no markup. soft_wrap: a log line stays one line.
        self._console.print(Text(text, style=style), soft_wrap=True)

    def _say(self, text: str, style: str = "") -> None:
        self._write_log(text)
        self._show(text, style)

    def on_message(self, text: str) -> None:
        self._say(text)

    def on_run_start(self, info: RunInfo) -> None:
        self._info = info
        self._last_step = info.start_step
        self._started = self._now()
        self._time_left = TimeLeft(info, self._now)
        for line in header_lines(info):
            self._say(line)

    def on_stage_start(self, stage: StageInfo) -> None:
        info, time_left = self._running()
        self._stage = stage
        time_left.stage_started(stage, self._last_step)
        objective = f"joint, alpha {stage.diffusion_loss_weight:g}" if stage.diffusion_loss_weight > 0 else "AR"
        self._say(f"stage {stage.name} ({objective}): steps {stage.first_step}..{stage.last_step}", style="bold")
        if self._console.is_interactive and self._live is None:
            self._start_live(info)

    def _running(self) -> tuple[RunInfo, TimeLeft]:
        if self._info is None or self._time_left is None:
            raise RuntimeError("ConsoleDisplay is used outside of a run: on_run_start first")
        return self._info, self._time_left

    def _start_live(self, info: RunInfo) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=40),
            MofNCompleteColumn(),
            auto_refresh=False,
            console=self._console,
        )
        for stage in info.stages:
            num_steps = stage.last_step - stage.first_step + 1
            self._tasks[stage.name] = self._progress.add_task(stage.name, total=num_steps)
        self._advance(self._last_step)
        self._live = Live(self._progress, console=self._console, auto_refresh=False)
        self._live.start(refresh=True)

    def _advance(self, step: int) -> None:
        info, _ = self._running()
        assert self._progress is not None
        for stage in info.stages:
            completed = min(max(step - stage.first_step + 1, 0), stage.last_step - stage.first_step + 1)
            self._progress.update(self._tasks[stage.name], completed=completed)

    def on_step(self, record: dict[str, Any]) -> None:
        info, time_left = self._running()
        assert self._stage is not None
        step = record["step"]
        is_first = self._last_step < self._stage.first_step
        is_last = step >= self._stage.last_step
        self._last_step = step
        left = time_left.seconds(step)
        head = f"step {step}/{info.num_steps} ({record['stage']})"
        tail = f"{format_duration(left)} left"
        now = self._now()
        pause = min(max((now - self._started) * self.LINE_SHARE, self.MIN_LINE_SECONDS), self.MAX_LINE_SECONDS)
        if is_first or is_last or now - self._line_time >= pause:
            self._line_time = now
            line = f"{head}  {losses_text(record)}  grad norm {record['grad_norm']:.3f}  {tail}"
            self._write_log(line)
            if self._live is None:
                self._show(line)
        if not self._has_stepped:
            self._has_stepped = True
            seconds = time.time() - psutil.Process().create_time()  # imports count
            self._say(f"step {step} was done {seconds:.1f} s after the process began", style="dim")
        if self._live is not None and (is_last or now - self._refresh_time >= self.MIN_REFRESH_SECONDS):
            self._refresh_time = now
            self._advance(step)
            assert self._progress is not None
            self._live.update(Group(self._progress, Text(f"{head}  {tail}\n{losses_text(record)}")), refresh=True)
        if step >= info.num_steps:
            self._stop_live()  # what follows (the export, a prompt continued) is text

    def on_validation(self, record: dict[str, Any]) -> None:
        self._say(validation_text(record), style="green")

    def on_checkpoint(self, step: int, path: Path) -> None:
        self._say(f"checkpoint of step {step}: {path}", style="dim")

    def _stop_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def on_run_end(self) -> None:
        self._stop_live()
        if self._info is not None:
            reached = self._last_step >= self._info.num_steps
            elapsed = format_duration(self._now() - self._started)
            where = f"step {self._last_step} of {self._info.num_steps} after {elapsed}"
            self._say(f"run finished: {where}" if reached else f"run stopped: {where}", style="bold")
        if self._log is not None:
            with contextlib.suppress(OSError):
                self._log.close()
            self._log = None
