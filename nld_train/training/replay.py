"""``debug.replay_step=N``: one step of a run again, from the nearest checkpoint before it, with every quantity printed.

Nothing is written into the run's folder, so it may be done beside a run that is under way. On the layout that made the
run, the record must come out equal to the last bit; where it does not, hardware or software are not what they were.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from nld_train.checkpoint.manager import CheckpointManager, complete_checkpoints, read_info
from nld_train.config.schema import Config
from nld_train.errors import ConfigError, Problem
from nld_train.training.inspection import ParameterSums, StepInspection, groups_of
from nld_train.training.metrics import TIMING_FIELDS, encode_record, is_validation, records_of
from nld_train.training.run_folder import ResumePoint, check_resumable
from nld_train.training.stages import Stage
from nld_train.training.step import MicroBatchLosses
from nld_train.training.trainer import Trainer


def find_replay_point(
    manager: CheckpointManager, config: Config, stages: tuple[Stage, ...]
) -> tuple[ResumePoint | None, list[str]]:
    """The nearest checkpoint before the step that is replayed (None is never returned), and no damaged ones: nothing
    in the folder is set aside. Collective.

    Raises:
        ConfigError: the run has no such step, or no checkpoint before it, or is not the one that is configured.
    """
    step, last_step = config.debug.replay_step, stages[-1].last_step
    assert step is not None
    directory = manager.directory
    found = [complete_checkpoints(directory) if dist.get_rank() == 0 else []]
    dist.broadcast_object_list(found, src=0)
    infos = {path: read_info(path) for path in found[0]}
    before = [path for path, info in infos.items() if info.step < step]
    if step > last_step or not before:
        steps = [info.step for info in infos.values()]
        if step > last_step:
            message, remedy = f"{step}, but the run ends with step {last_step}", f"use a step from 1 to {last_step}"
        elif steps:
            message = f"{step}, but there is no checkpoint from before it: {directory} has those of steps {steps}"
            remedy = f"use debug.replay_step={steps[0] + 1} or later (checkpoint.keep_last decides how many are kept)"
        else:
            message, remedy = (
                f"{step}, but there is no checkpoint in {directory}",
                "name the run.dir of a run that has one",
            )
        raise ConfigError([Problem("debug.replay_step", message, remedy)])
    checkpoint = max(before, key=lambda path: infos[path].step)
    check_resumable(infos[checkpoint], config, stages, checkpoint)
    return ResumePoint(checkpoint, infos[checkpoint]), []


def replay(trainer: Trainer, step: int, checkpoint: Path) -> Iterator[str]:
    """Run the steps after the trainer's first again, the last of them under inspection.

    Args:
        trainer: has loaded ``checkpoint``, and nobody listens to it.
        step: the one to look at.

    Returns:
        the lines to print, on every rank. Collective.
    """
    run_dir = Path(trainer.config.run.dir)
    inspection = StepInspection(trainer.chunks, trainer.optimizer)
    replayed, details, parameters = trainer.replay(step, inspection)
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, (_place_of_rank(), list(_micro_batch_lines(details))))
    recorded = None
    for record in records_of(run_dir / "metrics.jsonl"):
        if record["step"] == step and not is_validation(record):
            recorded = record
    yield f"step {step} ({replayed['stage']}) of {run_dir}, replayed from {checkpoint}"
    yield ""
    yield from _record_lines(recorded, replayed)
    for rank, (place, lines) in enumerate(of_ranks):
        if lines:
            yield f"\nmicro-batches of rank {rank} ({place})"
            yield from lines
    heads = ParameterSums.heads()
    yield "\nparameters"
    yield from _table(heads, {name: sums.columns() for name, sums in parameters.items()})
    yield "\nparameters added up"
    yield from _table(heads, {name: sums.columns() for name, sums in groups_of(parameters).items()})
    yield ""
    yield _verdict(recorded, replayed, step)


def _place_of_rank() -> str:
    return ", ".join(
        f"{name} {rank}"
        for name, rank in (
            ("tensor", parallel_state.get_tensor_model_parallel_rank()),
            ("pipeline", parallel_state.get_pipeline_model_parallel_rank()),
            ("context", parallel_state.get_context_parallel_rank()),
            ("data", parallel_state.get_data_parallel_rank()),
        )
    )


def _micro_batch_lines(details: Sequence[MicroBatchLosses]) -> Iterator[str]:
    """Sums in nats over this rank's rows; ``diffusion`` with the estimator's weights and without alpha."""
    for number, losses in enumerate(details):
        terms = losses.terms
        masked, clean = terms.num_masked.item(), terms.num_clean.item()
        yield (
            f"  {number}: loss {terms.loss_sum.item()!r} / {terms.divisor.item():.0f}, "
            f"AR {terms.ar_sum.item()!r} over {terms.ar_count.item():.0f} tokens "
            f"({terms.ar_correct.item():.0f} right), "
            f"diffusion {terms.diffusion_sum.item()!r} over {masked:.0f} masked of {clean:.0f} supervised tokens "
            f"({terms.bucket_correct.sum().item():.0f} right), largest weight {terms.largest_weight.item()!r}"
        )
        buckets = [f"{count:.0f}" for count in terms.bucket_count.tolist()]
        if masked:
            yield f"     masked tokens by the masked share of their block, 10% .. 100%: {' '.join(buckets)}"
        for position, loss in zip(losses.stream_positions.tolist(), losses.sequence_losses.tolist(), strict=True):
            yield f"     sample {position}: loss {loss!r}"


def _as_recorded(record: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from the file, without times."""
    read: dict[str, Any] = json.loads(encode_record(record))
    return {name: value for name, value in read.items() if name not in TIMING_FIELDS}


def _differences(recorded: Mapping[str, Any], replayed: Mapping[str, Any]) -> list[str]:
    found, now = _as_recorded(recorded), _as_recorded(replayed)
    return [name for name in {**found, **now} if name not in found or name not in now or found[name] != now[name]]


def _record_lines(recorded: Mapping[str, Any] | None, replayed: Mapping[str, Any]) -> Iterator[str]:
    now = _as_recorded(replayed)
    if recorded is None:
        yield from _table(("replayed",), {name: (repr(value),) for name, value in now.items()})
        return
    found, different = _as_recorded(recorded), set(_differences(recorded, replayed))
    rows = {
        name: (repr(found.get(name)), repr(now.get(name)), "DIFFERS" if name in different else "")
        for name in {**found, **now}
    }
    yield from _table(("recorded", "replayed", ""), rows)


def _verdict(recorded: Mapping[str, Any] | None, replayed: Mapping[str, Any], step: int) -> str:
    if recorded is None:
        return f"step {step} has no record in metrics.jsonl to compare with (train.log_interval, or not reached)"
    different = _differences(recorded, replayed)
    if not different:
        return "the replayed record equals the recorded one, to the last bit"
    return (
        f"the replayed record DIFFERS from the recorded one in {', '.join(different)}: another layout, device or "
        "version of the software, or a device that does not compute what it should"
    )


def _table(heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Iterator[str]:
    cells = [["", *heads], *([name, *values] for name, values in rows.items())]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads) + 1)]
    for row in cells:
        yield ("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip()
