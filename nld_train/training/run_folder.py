"""The folder of a run: created, held by one process at a time, and resumed only by the same run."""

import fcntl
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nld_train.checkpoint.manager import CheckpointInfo, CheckpointManager, read_info
from nld_train.config.compose import to_dict
from nld_train.config.schema import Config
from nld_train.data.blend import Blend
from nld_train.data.chat import PreparedChat
from nld_train.errors import ConfigError, DataError, Problem
from nld_train.training.stages import Stage, stage_of_step

# What a resumed run must share with its checkpoint: a change here would change which tokens and masks a step sees, or
# what its loss means in the middle of a curve.
_FIXED_ON_RESUME = (
    "run.seed",
    "model",
    "objective",
    "data.corpus",
    "data.blend",
    "data.sequence_length",
    "data.validation_fraction",
    "data.document_mask",
    "train.global_batch_size",
    "train.precision",
)
_FIXED_IN_A_STAGE = (
    "blend",
    "chat",
    "chat_validation_samples",
    "chat_validation_fraction",
    "ar_loss_weight",
    "sequence_length",
    "global_batch_size",
)
# Of a stage that is over: what its steps and the samples they took are counted by.
_FIXED_AFTER_A_STAGE = ("tokens", "blend", "chat", "sequence_length", "global_batch_size")
# The stages hold the weights of the losses.
_FREE_ON_RESUME = (
    "model.attention_backend",
    "model.compile_pointwise",
    "model.layer_spec",
    "objective.diffusion_loss_weight",
)


_LOCK_SECONDS = 5.0  # a killed run may take a moment to be gone
_LOCK_SECONDS_AFTER_REQUEUE = 180.0  # of a node that was lost, a file server gives locks back when its lease is over


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """The newest complete and undamaged checkpoint of a run."""

    checkpoint: Path
    info: CheckpointInfo


def find_resume_point(
    manager: CheckpointManager, config: Config, stages: tuple[Stage, ...]
) -> tuple[ResumePoint | None, list[str]]:
    """Where the run goes on (None for a fresh one), and what to say of damaged checkpoints. Collective.

    Raises:
        ConfigError: the configuration describes another run than the checkpoint's.
        CheckpointError: all checkpoints are damaged.
    """
    checkpoint, damaged = manager.latest()
    if checkpoint is None:
        return None, damaged
    info = read_info(checkpoint)
    check_resumable(info, config, stages, checkpoint)
    return ResumePoint(checkpoint, info), damaged


def make_folder(key: str, path: Path) -> None:
    """Create a folder that the configuration names.

    Raises:
        ConfigError: it cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = Problem(key, f"{path} cannot be created ({error.strerror})", "name a folder that you may write to")
        raise ConfigError([problem]) from error


def lock_run_folder(run_dir: Path) -> None:
    """Hold ``run_dir`` for this process; the kernel lets go when it ends, however it ends.

    A record lock and not flock: loader workers are forked and would inherit the latter.

    Raises:
        ConfigError: another process holds it, and goes on to hold it.
    """
    descriptor = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)  # kept open for the life of the process
    is_requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    deadline = time.monotonic() + (_LOCK_SECONDS_AFTER_REQUEUE if is_requeued else _LOCK_SECONDS)
    while True:
        try:
            return fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            failure = error
        os.close(descriptor)
        raise ConfigError(
            [
                Problem(
                    "run.dir",
                    f"{run_dir} is in use by another run ({failure.strerror})",
                    "wait for it or stop it, or use another run.dir",
                )
            ]
        ) from failure


def check_resumable(info: CheckpointInfo, config: Config, stages: tuple[Stage, ...], checkpoint: Path) -> None:
    """Refuse to resume with another model, objective, data order or noise than the checkpoint was trained with.

    Stages that are not over yet may be changed, and new ones appended; learning rates and optimizer settings, too.

    Raises:
        ConfigError: every key that differs; or the checkpoint is of no run (imported weights).
    """
    saved, current = info.config, to_dict(config)
    if not info.stage:
        remedy = "start from the Hugging Face folder with init.hf_path, and use another run.dir"
        raise ConfigError([Problem("run.dir", f"{checkpoint} holds imported weights and no run", remedy)])
    new_blend = "use {key}={old} to resume it, give the new blend to a new stage, or use another run.dir to start anew"
    other_value = "use {key}={old} to resume it, or another run.dir to start anew"
    problems: list[Problem] = []

    def compare(key: str, old: Any, new: Any) -> None:
        if isinstance(old, dict) and isinstance(new, dict):
            for name in old.keys() | new.keys():
                compare(f"{key}.{name}", old.get(name), new.get(name))
        elif old != new and key not in _FREE_ON_RESUME:
            problems.append(
                Problem(
                    key,
                    f"is {new}, but the run in {checkpoint.parent.parent} was started with {old}",
                    (new_blend if ".blend" in key or key == "data.corpus" else other_value).format(key=key, old=old),
                )
            )

    def value(tree: dict[str, Any], key: str) -> Any:
        for part in key.split("."):
            tree = tree[part]
        return tree

    def compare_stage(stage: Stage, fields: Sequence[str]) -> None:
        for field in fields:
            old = saved["stages"][stage.name][field]
            compare(f"stages.{stage.name}.{field}", old, current["stages"][stage.name][field])

    for key in _FIXED_ON_RESUME:
        compare(key, value(saved, key), value(current, key))
    last_step = stages[-1].last_step
    if info.step > last_step:
        problems.append(
            Problem(
                "stages",
                f"end at step {last_step}, but {checkpoint} is of step {info.step}",
                "give the stages at least as many tokens as were trained, or use another run.dir to start anew",
            )
        )
    else:
        names, current_stage = list(saved["stages"]), stage_of_step(stages, info.step)
        if info.stage != current_stage.name or names[: current_stage.index] != [
            stage.name for stage in stages[: current_stage.index]
        ]:
            problems.append(
                Problem(
                    "stages",
                    f"{checkpoint} is of step {info.step} in stage {info.stage} of {names}; here that step is in stage "
                    f"{current_stage.name} of {[stage.name for stage in stages]}",
                    "keep the names and tokens of the stages that are over",
                )
            )
        for stage in stages[: current_stage.index]:
            if stage.name in saved["stages"]:
                compare_stage(stage, _FIXED_AFTER_A_STAGE)
        if current_stage.name in saved["stages"]:
            compare_stage(current_stage, _FIXED_IN_A_STAGE)
    if problems:
        raise ConfigError(problems)


def check_same_data(
    info: CheckpointInfo,
    blends: Mapping[str, Blend],
    chats: Mapping[str, PreparedChat],
    stages: Sequence[Stage],
    checkpoint: Path,
) -> None:
    """Refuse to go on with other training tokens, weights or conversations than the stages so far had.

    Args:
        blends: of each stage that reads corpora, by its name.
        chats: of each stage with conversations.

    Raises:
        DataError: naming the corpus that has changed (a shipped one does with the version of Python), come or gone,
            the weight that has, or the stage whose conversations have.
    """
    if info.stage in chats and info.chat_hashes.get(info.stage) != chats[info.stage].content_hash:
        raise DataError(
            f"stages.{info.stage}.chat",
            f"{chats[info.stage].manifest.source} has changed (or its tokenizer) since {checkpoint} was written",
            "resume with the run's conversations, or use another run.dir",
        )
    for stage in stages[: stage_of_step(stages, info.step).index + 1]:
        if stage.name not in blends or blends[stage.name].content_hash == info.blends[stage.name]["hash"]:
            continue
        raise DataError(
            f"stages.{stage.name}",
            f"reads another blend than when {checkpoint} was written: "
            f"{_blend_difference(info.blends[stage.name], blends[stage.name].describe())}",
            "resume with the run's corpora (shipped ones: with its version of Python), give the new blend to a new "
            "stage, or use another run.dir",
        )


def _blend_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Which parts of a blend are not the same, in words."""
    found = []
    for name in sorted(old["parts"].keys() | new["parts"].keys()):
        before, now = old["parts"].get(name), new["parts"].get(name)
        if before is None or now is None:
            found.append(f"part {name} has {'come' if before is None else 'gone'}")
            continue
        if before["hash"] != now["hash"]:
            found.append(
                f"the training tokens of part {name} ({', '.join(now['folders'])}) have hash {now['hash'][:16]}, they "
                f"had {before['hash'][:16]}"
            )
        if before["weight"] != now["weight"]:
            found.append(f"the weight of part {name} is {now['weight']}, it was {before['weight']}")
    return "; ".join(found) or "the rule of its order has changed with the version of this program"
