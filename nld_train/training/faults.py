"""Faults in the numbers: steps that are skipped, whose samples were to blame, and spikes of the loss.

Everything here follows from the records in ``metrics.jsonl``: a run that is resumed reads them and goes on as if it had
never stopped.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nld_train.config.schema import Config
from nld_train.errors import TrainingError
from nld_train.training.metrics import is_validation, records_of
from nld_train.training.step import MicroBatchLosses

SKIP_WINDOW = 1000
"""Steps in which ``train.max_skipped_steps`` are counted. A faulty device spoils steps here and there, which a count of
steps in a row would never reach; a model that is lost spoils all of them, which any count reaches."""

SPIKE_WINDOW = 128
"""Records of the stage, those before the one in question, that a loss is compared with."""
MIN_SPIKE_RECORDS = 16
"""With fewer before it no loss is a spike."""
MIN_SPREAD = 1e-3
"""Smallest spread that is believed, as a share of the median: losses that hardly differ make no spike of the next."""


@dataclass(slots=True)
class FaultHistory:
    """What the step records of a run so far say of its faults; :meth:`add` takes the next one.

    Args:
        num_skipped: steps skipped since the start of the run.
        skipped: those of the last :data:`SKIP_WINDOW` steps.
        stage: of the last record.
        losses: finite ones of the last records of that stage.
    """

    num_skipped: int = 0
    skipped: deque[int] = field(default_factory=deque)
    stage: str = ""
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=SPIKE_WINDOW))

    @classmethod
    def of_records(cls, records: Iterable[dict[str, Any]], last_step: int) -> "FaultHistory":
        """Of the step records up to ``last_step``, as ``metrics.jsonl`` has them."""
        history = cls()
        for record in records:
            if not is_validation(record) and record["step"] <= last_step:
                history.add(record)
        return history

    @classmethod
    def of_run(cls, run_dir: Path, last_step: int) -> "FaultHistory":
        """Of a run that goes on after ``last_step``, the same on every rank (rank 0 reads). Collective."""
        history = [cls()]
        if dist.get_rank() == 0:
            history[0] = cls.of_records(records_of(run_dir / "metrics.jsonl"), last_step)
        dist.broadcast_object_list(history, src=0)
        return history[0]

    def add(self, record: dict[str, Any]) -> None:
        step, loss = record["step"], record["loss"]
        if record.get("is_skipped"):
            self.num_skipped += 1
            self.skipped.append(step)
        while self.skipped and self.skipped[0] <= step - SKIP_WINDOW:
            self.skipped.popleft()
        if record["stage"] != self.stage:
            self.stage = record["stage"]
            self.losses.clear()
        if loss is not None and math.isfinite(loss):
            self.losses.append(loss)

    def is_spike(self, stage: str, loss: float, threshold: float) -> bool:
        """The next loss stands out from those before it.

        It does when it is more than ``threshold`` spreads above their median. The spread is the median distance from
        that median, times 1.4826: of normal numbers the standard deviation, and unlike that not widened by the spikes
        themselves. So spikes may stay among the losses that the next ones are compared with.

        Args:
            stage: of the loss; the first records of a stage are never spikes.
            loss: of the next record.
            threshold: 0: nothing is a spike.
        """
        if not threshold or stage != self.stage or len(self.losses) < MIN_SPIKE_RECORDS or not math.isfinite(loss):
            return False
        median = statistics.median(self.losses)
        spread = 1.4826 * statistics.median(abs(other - median) for other in self.losses)
        return loss - median > threshold * max(spread, MIN_SPREAD * abs(median))

    def skips_too_much(self, max_skipped_steps: int) -> bool:
        """More than that many of the last :data:`SKIP_WINDOW` steps were skipped."""
        return len(self.skipped) > max_skipped_steps

    def error(self, config: Config, last_checkpoint: Path | None) -> TrainingError:
        """Why the run ends, and what there is: all checkpoints are from before the last steps that were skipped."""
        steps = ", ".join(map(str, list(self.skipped)[-5:]))
        saved = f"the last checkpoint, {last_checkpoint}, is from before" if last_checkpoint else "nothing is saved yet"
        return TrainingError(
            f"{config.run.dir}, step {self.skipped[-1]}",
            f"loss or gradient was not finite in {len(self.skipped)} of the last {SKIP_WINDOW} steps (the last ones: "
            f"{steps}), train.max_skipped_steps={config.train.max_skipped_steps}; {saved}",
            f"look at the samples that the messages name, and at debug.replay_step={self.skipped[-1]}; lower the "
            "stage's lr or mend the data, then start again",
        )


def samples_at_fault(details: Sequence[MicroBatchLosses]) -> list[tuple[int, int]]:
    """Who read the samples of a step whose loss is not finite: pairs of a stream position and a rank. Collective.

    Where every loss is finite and only the gradient was not, these are all samples of the step: gradients are sums.
    Of ranks that share a sample, the first one whose part of it is not finite stands for it.
    """
    bad, everything = [], []
    for losses in details:
        positions = losses.stream_positions.tolist()
        everything += positions
        is_finite = losses.sequence_losses.isfinite().tolist()
        bad += [position for position, finite in zip(positions, is_finite, strict=True) if not finite]
    of_ranks: list[tuple[list[int], list[int]]] = [([], [])] * dist.get_world_size()
    dist.all_gather_object(of_ranks, (bad, everything))
    index = 0 if any(bad for bad, _ in of_ranks) else 1
    first_rank: dict[int, int] = {}
    for rank, found in enumerate(of_ranks):
        for position in found[index]:
            first_rank.setdefault(position, rank)
    return sorted(first_rank.items())


def spike_message(record: Mapping[str, Any]) -> str:
    """One line for people."""
    return f"step {record['step']}: the loss, {record['loss']:.4f}, is a spike"


def skip_message(record: Mapping[str, Any]) -> str:
    """One line for people: what was skipped, and where to look."""
    step, loss, grad_norm = record["step"], record["loss"], record["grad_norm"]
    if math.isfinite(loss):
        cause = f"the gradient's norm is {grad_norm} and every loss is finite; in the step are"
    else:
        cause = f"the loss is {loss}, from"
    of_ranks: dict[int, list[int]] = {}
    for position, rank in zip(record["suspect_samples"], record["suspect_ranks"], strict=True):
        of_ranks.setdefault(rank, []).append(position)
    names = "; ".join(
        f"sample{'s' if len(positions) > 1 else ''} {_ranges(positions)} (rank {rank})"
        for rank, positions in of_ranks.items()
    )
    return f"step {step} skipped, nothing was updated: {cause} {names}"


def _ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 -> "1..3, 7"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("..".join(map(str, run)) for run in runs)
