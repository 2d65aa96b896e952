"""Save and resume: what a checkpoint of a run holds, and the rule that a checkpoint is whole or absent.

``checkpoints/step_00001000/`` holds Megatron's distributed checkpoint (weights, optimizer state, in shards that load at
another parallel layout) and ``checkpoint.json`` (what it is, readable without torch). It is written under a temporary
name and renamed when everything is on disk, so a folder with the final name is complete.

No random-number state is kept: noise and sample order are pure functions of (seed, place in the stream) and the model
has no dropout, so step and seed say it all.
"""

import json
import os
import queue
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_origin

import megatron.core
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint import CheckpointException

from nld_train.checkpoint.headers import check_numbers
from nld_train.config.schema import CheckpointConfig, ModelConfig, RopeConfig
from nld_train.errors import CheckpointError

FORMAT_VERSION = 3
INFO_FILE = "checkpoint.json"
_PREFIX = "step_"
_TEMPORARY_PREFIX = ".incomplete_"


def _sharding() -> dict[str, Any]:
    """Megatron's sharding options; a new dict each time, since Megatron stores process groups in it.

    One key per layer (not one stacked tensor), so that a single layer can be read alone; optimizer state that loads
    at any tensor x pipeline x data parallel layout.
    """
    return {"non_homogeneous_layers": True, "distrib_optim_sharding_type": "fully_reshardable"}


def _weights(chunks: Sequence[DistributedDataParallel]) -> dict[str, dict[str, Any]]:
    """Sharded weights by the number of the model chunk. The number is no part of a stored key: a layer's key holds its
    number in the whole model."""
    return {str(i): chunk.module.sharded_state_dict(metadata=_sharding()) for i, chunk in enumerate(chunks)}


@dataclass(slots=True, kw_only=True)
class CheckpointInfo:
    """What ``checkpoint.json`` says.

    Args:
        step: finished optimizer steps of the run.
        tokens: clean tokens consumed since the start of the run.
        stage: name of the stage of the last finished step; "" for imported weights.
        samples: sequences consumed; the next step starts with this place of the data stream.
        dtype: of the stored weights ("float32", "bfloat16").
        model: the model's shape.
        parallel: layout of the run that wrote it (it loads at any other).
        config: the run's resolved configuration; empty for imported weights.
        metrics: last step's metrics.
        tokenizer: folder of the tokenizer the run was trained with, relative to the checkpoint; "" if unknown.
        blends: of each stage that reads corpora, by its name: their weights and hashes, and the hash of the whole.
        chat_hashes: of the conversations of each stage that has its own, by its name.
    """

    step: int
    tokens: int
    stage: str
    samples: int
    dtype: str
    model: ModelConfig
    parallel: dict[str, int]
    config: dict[str, Any]
    metrics: dict[str, Any]
    tokenizer: str
    blends: dict[str, dict[str, Any]] = field(default_factory=dict)
    chat_hashes: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    megatron_version: str = megatron.core.__version__


def write_info(folder: Path, info: CheckpointInfo) -> None:
    """Write ``checkpoint.json``, and wait until it is on disk."""
    with (folder / INFO_FILE).open("w") as file:
        json.dump(info_to_dict(info), file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def sync_path(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_info(folder: Path) -> CheckpointInfo:
    """Read ``checkpoint.json`` of one checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged or of another format.
    """
    path = folder / INFO_FILE
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(str(path), "not found", "name a folder checkpoints/step_* of a run") from None
    except (OSError, ValueError) as error:  # neither text nor JSON, too
        raise CheckpointError(str(path), f"cannot be read: {error}", "use an older checkpoint of the run") from error
    if not isinstance(raw, dict):
        raise _damaged(path, f"holds a {type(raw).__name__}, not an object")
    if raw.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            str(path),
            f"format_version is {raw.get('format_version')!r}, expected {FORMAT_VERSION}",
            "read it with the version of nld_train that wrote it",
        )
    expected = {item.name for item in fields(CheckpointInfo)}
    if set(raw) != expected:
        raise _damaged(path, f"keys differ from the format: {sorted(set(raw) ^ expected)}")
    for item in fields(CheckpointInfo):
        kind: Any = dict if item.type is ModelConfig else get_origin(item.type) or item.type
        if not isinstance(raw[item.name], kind) or isinstance(raw[item.name], bool):
            raise _damaged(path, f"{item.name} is {raw[item.name]!r}, expected {kind.__name__}")
    try:
        model = ModelConfig(**(raw["model"] | {"rope": RopeConfig(**raw["model"]["rope"])}))
    except (KeyError, TypeError) as error:
        raise _damaged(path, f"model is not understood: {error}") from error
    check_numbers(model, path)
    check_numbers(model.rope, path)
    return CheckpointInfo(**(raw | {"model": model}))


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(str(path), reason, "use an older checkpoint of the run")


def info_to_dict(info: CheckpointInfo) -> dict[str, Any]:
    """Plain JSON types; the attention backend is a choice of the run, not of the weights, and is left out."""
    raw = asdict(info)
    raw["model"].pop("attention_backend")
    return raw


def complete_checkpoints(directory: Path) -> list[Path]:
    """All complete checkpoints of a run, oldest first."""
    found = [path for path in directory.glob(f"{_PREFIX}*") if path.is_dir() and path.name[len(_PREFIX) :].isdigit()]
    return sorted(found, key=lambda path: int(path.name[len(_PREFIX) :]))


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint of a run; None where there is none."""
    found = complete_checkpoints(directory)
    return found[-1] if found else None


def save_sharded(folder: Path, state: dict[str, Any], info: CheckpointInfo) -> None:
    """Write ``folder`` whole: every rank its shards, rank 0 the info, then one rename. Collective."""
    is_main = dist.get_rank() == 0
    # A name of its own each time: Megatron writes in a forked process, which may outlive a killed run for a moment and
    # must not meet the files of the run that was started again.
    name = [f"{_TEMPORARY_PREFIX}{folder.name}_{secrets.token_hex(4)}"]
    dist.broadcast_object_list(name, src=0)
    temporary = folder.parent / name[0]
    if is_main:
        temporary.mkdir(parents=True)
    dist.barrier()
    # Megatron hands the result of a write back through a server process, which outlives a killed run for ever. A save
    # that is waited for needs no more than a queue in this process.
    filesystem_async._results_queue = queue.Queue()
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)  # one file per rank
    dist_checkpointing.save(state, str(temporary), strategy, validate_access_integrity=True)
    dist.barrier()
    if is_main:
        write_info(temporary, info)
        sync_path(temporary)
        if folder.exists():  # the same step again, from a run that was started over
            _remove(folder)
        temporary.rename(folder)
        sync_path(folder.parent)
    dist.barrier()


def _remove(folder: Path) -> None:
    """Remove a checkpoint; killed half-way, what is left does not look like one."""
    doomed = folder.parent / f"{_TEMPORARY_PREFIX}{folder.name}_{secrets.token_hex(4)}"
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _cause(error: BaseException) -> str:
    """What went wrong on the first rank that failed, in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {error}"


class CheckpointManager:
    """Checkpoints of one run.

    Args:
        directory: ``checkpoints`` in the run's folder.
        config: how many to keep.
    """

    def __init__(self, directory: Path, config: CheckpointConfig) -> None:
        self.directory = directory
        self.config = config

    def latest(self) -> Path | None:
        """Newest complete checkpoint, the same answer on every rank (rank 0 looks). Collective."""
        answer: list[Path | None] = [latest_checkpoint(self.directory) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(answer, src=0)
        return answer[0]

    def save(
        self, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer | None, info: CheckpointInfo
    ) -> Path:
        """Save after ``info.step`` steps, then remove what ``keep_last`` no longer keeps. Collective.

        Args:
            chunks: this rank's part of the model.
            optimizer: has made at least one step (its state does not exist before); None: weights only.
        """
        folder = self.directory / f"{_PREFIX}{info.step:08d}"
        for chunk in chunks:
            if chunk.ddp_config.overlap_param_gather:
                # Updated weights are gathered in the next forward pass; until then a rank has only its share of them.
                chunk.start_param_sync(force_sync=True)
        weights = _weights(chunks)
        state: dict[str, Any] = {"model": weights}
        if optimizer is not None:
            state["optimizer"] = optimizer.sharded_state_dict(weights, metadata=_sharding())
        save_sharded(folder, state, info)
        if dist.get_rank() == 0:
            for old in complete_checkpoints(self.directory)[: -self.config.keep_last]:
                _remove(old)
            for leftover in self.directory.glob(f"{_TEMPORARY_PREFIX}*"):
                shutil.rmtree(leftover, ignore_errors=True)
        return folder

    def load(
        self, folder: Path, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer | None
    ) -> CheckpointInfo:
        """Load weights, and optimizer state unless ``optimizer`` is None, at this run's parallel layout. Collective.

        Raises:
            CheckpointError: the checkpoint does not fit the model, or cannot be read.
        """
        info = read_info(folder)
        weights = _weights(chunks)
        state: dict[str, Any] = {"model": weights}
        if optimizer is not None:
            state["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=True, metadata=_sharding())
        try:
            loaded = dist_checkpointing.load(state, str(folder))
        # The loader raises a dozen types (torch's wrapper is not even an Exception); all mean that this folder cannot
        # be used here.
        except (Exception, CheckpointException) as error:
            raise CheckpointError(
                str(folder),
                f"cannot be loaded: {_cause(error)}",
                "check that model.* is the same as in its checkpoint.json; if the files are damaged, remove the "
                "folder: the run then resumes from the checkpoint before it",
            ) from error
        for number, chunk in enumerate(chunks):
            chunk.module.load_state_dict(loaded["model"][str(number)], strict=True)
        if optimizer is not None:
            optimizer.load_state_dict(loaded["optimizer"])
        return info
