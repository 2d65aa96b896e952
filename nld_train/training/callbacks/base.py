"""What a run tells the outside: the events of a run, and the interface of those who listen.

Callbacks live on rank 0 only. They receive finished numbers (already reduced over ranks) and never touch the model.

The order is fixed, and resuming relies on it: the record of step k, then its validation record, then the checkpoint of
step k (which may be complete some steps later). Whatever was recorded for a step <= k is therefore on file when the
checkpoint of k exists, and a run that resumes from it records k + 1 next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class StageInfo:
    """One stage as the outside sees it. Steps are counted over the whole run; ``last_step`` is included."""

    name: str
    diffusion_loss_weight: float
    first_step: int
    last_step: int
    tokens: int  # clean tokens of this stage


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What is known when a run starts or resumes."""

    run_dir: Path
    start_step: int  # last finished step; 0 for a fresh run
    num_steps: int
    tokens_per_step: int
    num_parameters: int
    stages: tuple[StageInfo, ...]
    config: dict[str, Any]  # the resolved configuration
    backends: dict[str, str]  # what was chosen: device, attention, optimizer, ...


class Callback:
    """Does nothing; override what you need.

    A ``record`` is what :mod:`nld_train.training.metrics` builds: plain Python numbers, not-a-number included as it is
    (``metrics.jsonl`` writes that as null and says so in ``non_finite``).
    """

    def on_run_start(self, info: RunInfo) -> None: ...

    def on_stage_start(self, stage: StageInfo) -> None: ...

    def on_step(self, record: dict[str, Any]) -> None: ...

    def on_validation(self, record: dict[str, Any]) -> None: ...

    def on_checkpoint_ready(self) -> None:
        """All files of a checkpoint are written, and it gets its name next: what was recorded has to be on file.

        Raises:
            NLDError: it is not; the checkpoint is then given up, and the run goes on.
        """

    def on_checkpoint(self, step: int, path: Path) -> None: ...

    def on_message(self, text: str) -> None:
        """A line for people: where the data came from, that a finished run was started again, ... Any time."""

    def on_run_end(self) -> None:
        """Always the last call, after an error too (call it in ``finally``); the last step was then not reached."""


class CallbackList(Callback):
    """Tells each of several callbacks, in order; an empty one is what ranks other than 0 hold."""

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        self.callbacks = tuple(callbacks)

    def on_run_start(self, info: RunInfo) -> None:
        for callback in self.callbacks:
            callback.on_run_start(info)

    def on_stage_start(self, stage: StageInfo) -> None:
        for callback in self.callbacks:
            callback.on_stage_start(stage)

    def on_step(self, record: dict[str, Any]) -> None:
        for callback in self.callbacks:
            callback.on_step(record)

    def on_validation(self, record: dict[str, Any]) -> None:
        for callback in self.callbacks:
            callback.on_validation(record)

    def on_checkpoint_ready(self) -> None:
        for callback in self.callbacks:
            callback.on_checkpoint_ready()

    def on_checkpoint(self, step: int, path: Path) -> None:
        for callback in self.callbacks:
            callback.on_checkpoint(step, path)

    def on_message(self, text: str) -> None:
        for callback in self.callbacks:
            callback.on_message(text)

    def on_run_end(self) -> None:
        """Every callback is ended, even when one of them fails; the first failure is raised afterwards."""
        failures: list[Exception] = []
        for callback in self.callbacks:
            try:
                callback.on_run_end()
            except Exception as failure:
                failures.append(failure)
        if failures:
            raise failures[0]
