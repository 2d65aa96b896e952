"""Save and resume: what a checkpoint of a run holds, and the rule that a checkpoint is whole or absent.

``checkpoints/step_00001000/`` holds Megatron's distributed checkpoint (weights, optimizer state, in shards that load at
another parallel layout), ``checkpoint.json`` (what it is, readable without torch) and ``checksums.txt``. It is written
under a temporary name and renamed when everything is on disk, so a folder with the final name is complete. A run goes
on from the newest one whose files have their checksums.

No random-number state is kept: noise and sample order are pure functions of (seed, place in the stream) and the model
has no dropout, so step and seed say it all.
"""

import contextlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_origin

import megatron.core
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint import CheckpointException

from nld_train.checkpoint.checksums import CHECKSUM_FILE, Checksum, damage, read_checksums, write_checksums
from nld_train.checkpoint.headers import check_numbers
from nld_train.checkpoint.sharded import (
    METADATA_FILE,
    SHARDING_TYPE,
    FileWriting,
    Written,
    absent_keys,
    rank_state,
    stored_keys,
    write_common_files,
)
from nld_train.config.schema import CheckpointConfig, ModelConfig, RopeConfig
from nld_train.errors import CheckpointError, NLDError
from nld_train.platform.failures import is_of_the_machine

FORMAT_VERSION = 4
INFO_FILE = "checkpoint.json"
_PREFIX = "step_"
_TEMPORARY_PREFIX = ".incomplete_"
_DAMAGED_PREFIX = "damaged_"


def _sharding() -> dict[str, Any]:
    """Megatron's sharding options; a new dict each time, since Megatron stores process groups in it.

    One key per layer (not one stacked tensor), so that a single layer can be read alone; optimizer state that loads
    at any tensor x pipeline x data parallel layout.
    """
    return {"non_homogeneous_layers": True, "distrib_optim_sharding_type": SHARDING_TYPE}


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
    _check_version(raw, path)
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


def _check_version(raw: dict[str, Any], path: Path) -> None:
    if raw.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            str(path),
            f"format_version is {raw.get('format_version')!r}, expected {FORMAT_VERSION}",
            "read it with the version of nld_train that wrote it",
        )


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(str(path), reason, "use an older checkpoint of the run")


def info_to_dict(info: CheckpointInfo) -> dict[str, Any]:
    """Plain JSON types; whose kernels compute is a choice of the run, not of the weights: left out."""
    raw = asdict(info)
    for key in ("attention_backend", "compile_pointwise", "layer_spec"):
        raw["model"].pop(key)
    return raw


def complete_checkpoints(directory: Path) -> list[Path]:
    """All complete checkpoints of a run, oldest first."""
    found = [path for path in directory.glob(f"{_PREFIX}*") if path.is_dir() and path.name[len(_PREFIX) :].isdigit()]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name[len(_PREFIX) :])


def best_checkpoints(checkpoints: Sequence[Path], metric: str) -> list[Path]:
    """Those with a value of the metric (of a validation in their own step), the lowest first."""
    values: list[tuple[float, Path]] = []
    for path in checkpoints:
        with contextlib.suppress(CheckpointError):  # damaged: not the best of anything
            value = read_info(path).metrics.get(metric)
            values += [(value, path)] if isinstance(value, float) and math.isfinite(value) else []
    return [path for _, path in sorted(values)]


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint of a run; None where there is none."""
    found = complete_checkpoints(directory)
    return found[-1] if found else None


def _remove(folder: Path) -> None:
    """Remove a checkpoint; killed half-way, what is left does not look like one."""
    doomed = folder.parent / f"{_TEMPORARY_PREFIX}{folder.name}_{secrets.token_hex(4)}"
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _set_aside(checkpoint: Path) -> Path:
    """Give a damaged checkpoint a name under which nobody takes it for one."""
    aside = checkpoint.with_name(f"{_DAMAGED_PREFIX}{checkpoint.name}")
    if aside.exists():
        shutil.rmtree(aside)
    return checkpoint.rename(aside)


def _cause(error: BaseException) -> BaseException:
    """What went wrong on the first rank that failed."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return error


@dataclass(frozen=True, slots=True)
class SaveResult:
    """What became of a save, the same on every rank: where it is, or why there is none."""

    step: int
    folder: Path
    error: str | None


@dataclass(slots=True)
class _Saving:
    """A save under way: this rank's file, and what rank 0 adds."""

    folder: Path
    temporary: Path
    info: CheckpointInfo
    common: dict[str, Any]
    writing: FileWriting


class CheckpointManager:
    """Checkpoints of one run. One save is under way at a time.

    Args:
        directory: ``checkpoints`` in the run's folder.
        config: how they are written, and which are kept.
        group: of all ranks, for CPU objects; None: the default group.
        progress: called when a piece of a file was read or written, from any thread.
    """

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        group: dist.ProcessGroup | None = None,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.directory = directory
        self.config = config
        self._group = group
        self._progress = progress
        self._saving: _Saving | None = None
        self._token = ""

    def latest(self) -> tuple[Path | None, list[str]]:
        """Newest checkpoint that is complete and undamaged, the same answer on every rank. Collective.

        Damaged ones newer than that are renamed to ``damaged_step_*``, for somebody to look at. Where none is whole
        all keep their names, so that the next start does not take the run for a new one.

        Returns:
            the checkpoint (None where there is none at all), and for each damaged one what is wrong with it.

        Raises:
            CheckpointError: there are checkpoints, and all of them are damaged, or one is of another version.
        """
        damaged: dict[Path, str] = {}
        for checkpoint in reversed(self._from_main(lambda: complete_checkpoints(self.directory))):
            found = self._damage(checkpoint)
            if found:
                damaged[checkpoint] = "; ".join(found)
                continue
            moved = self._from_main(lambda: [_set_aside(path) for path in damaged])
            return checkpoint, [
                f"{path} is damaged and not used, now {aside.name}: {what}"
                for (path, what), aside in zip(damaged.items(), moved, strict=True)
            ]
        if damaged:
            raise CheckpointError(
                str(self.directory),
                "no checkpoint is undamaged: " + " | ".join(f"{path}: {what}" for path, what in damaged.items()),
                "restore one from a copy; to start anew, use another run.dir",
            )
        return None, []

    def _from_main(self, function: Callable[[], Any]) -> Any:
        """What rank 0 finds. Collective."""
        answer = [function() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(answer, src=0, group=self._group)
        return answer[0]

    def _damage(self, checkpoint: Path) -> list[str]:
        """What is wrong with the files of a checkpoint. Each rank reads some, the one that it loads first of all: the
        machine has it in memory then. Collective."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        try:
            expected = read_checksums(checkpoint)
        except FileNotFoundError:
            with contextlib.suppress(OSError, ValueError):  # of a version without checksums: that is no damage
                _check_version(json.loads((checkpoint / INFO_FILE).read_text()), checkpoint / INFO_FILE)
            found = [f"{CHECKSUM_FILE} is missing"]
        except (OSError, ValueError) as error:
            if is_of_the_machine(error):
                raise
            found = [f"{CHECKSUM_FILE} is not readable: {error}"]
        else:
            found = []
            for name, checksum in expected.items():
                writer = re.match(r"__(\d+)_", name)
                if int(writer[1] if writer else 0) % world_size == rank:
                    problem = damage(checkpoint / name, checksum)
                    found += [problem] if problem is not None else []
                    self._progress()
        of_ranks: list[list[str]] = [[]] * world_size
        dist.all_gather_object(of_ranks, found, group=self._group)
        return list(dict.fromkeys(problem for problems in of_ranks for problem in problems))

    def begin(
        self, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer | None, info: CheckpointInfo
    ) -> None:
        """Begin a save of the state after ``info.step`` steps; :meth:`finish` ends it. Collective.

        With ``checkpoint.asynchronous`` it returns when the state is copied to host memory, and a thread writes on.

        Args:
            chunks: this rank's part of the model.
            optimizer: has made at least one step (its state does not exist before); None: weights only.
        """
        if self._saving is not None:
            raise RuntimeError(f"a save of step {self._saving.info.step} is under way: finish it first")
        for chunk in chunks:
            if chunk.ddp_config.overlap_param_gather:
                # Updated weights are gathered in the next forward pass; until then a rank has only its share of them.
                chunk.start_param_sync(force_sync=True)
        # A name of its own for each start of the run: what a killed one left must not mix with its files.
        self._token = self._token or self._from_main(lambda: secrets.token_hex(4))
        folder = self.directory / f"{_PREFIX}{info.step:08d}"
        temporary = self.directory / f"{_TEMPORARY_PREFIX}{folder.name}_{self._token}"
        state = rank_state(_weights(chunks), optimizer)
        if self.config.asynchronous:
            state = state.copied()
        writing = FileWriting(temporary, state, in_background=self.config.asynchronous, progress=self._progress)
        self._saving = _Saving(folder, temporary, info, state.common, writing)

    @property
    def is_saving(self) -> bool:
        """A save is under way, or waits to be finished."""
        return self._saving is not None

    @property
    def is_writing(self) -> bool:
        """This rank's file is not complete yet."""
        return self._saving is not None and not self._saving.writing.is_done

    def finish(self, when_ready: Callable[[], None] = lambda: None) -> SaveResult:
        """End the save that :meth:`begin` began: wait for the files of all ranks, name the checkpoint, and remove those
        that need not be kept. Collective.

        A save that failed leaves nothing behind, and the other checkpoints as they were.

        Args:
            when_ready: called on rank 0 when everything is written, before the checkpoint gets its name; where it
                raises an NLDError the save has failed.
        """
        assert self._saving is not None
        saving, self._saving = self._saving, None
        written = saving.writing.result()
        of_ranks: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(written, of_ranks, dst=0, group=self._group)
        error = self._from_main(lambda: self._complete(saving, of_ranks or [], when_ready))
        return SaveResult(saving.info.step, saving.folder, error)

    def save(
        self, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer | None, info: CheckpointInfo
    ) -> Path:
        """:meth:`begin` and :meth:`finish`. Collective.

        Raises:
            CheckpointError: it could not be written.
        """
        self.begin(chunks, optimizer, info)
        result = self.finish()
        if result.error is not None:
            raise CheckpointError(str(result.folder), result.error, "free space or fix the folder, then start again")
        return result.folder

    def _complete(self, saving: _Saving, of_ranks: list[Written], when_ready: Callable[[], None]) -> str | None:
        """Rank 0, when all files are there: the common ones, the checksums, the name; what went wrong, if something."""
        errors = [written.error for written in of_ranks if written.error is not None]
        try:
            if errors:
                raise OSError("; ".join(errors))
            checksums = write_common_files(saving.temporary, saving.common, of_ranks)
            for written in of_ranks:
                checksums |= written.checksums
            write_info(saving.temporary, saving.info)
            checksums[INFO_FILE] = Checksum.of(saving.temporary / INFO_FILE)
            write_checksums(saving.temporary, checksums)
            sync_path(saving.temporary)
            when_ready()
            if saving.folder.exists():  # the same step again, from a run that was started over
                _remove(saving.folder)
            saving.temporary.rename(saving.folder)
            sync_path(self.directory)
        except (OSError, ValueError, NLDError) as error:
            shutil.rmtree(saving.temporary, ignore_errors=True)
            return str(error)
        self._remove_old()
        return None

    def _remove_old(self) -> None:
        """Those that no rule keeps, and what killed runs left."""
        found = complete_checkpoints(self.directory)
        kept = set(found[-self.config.keep_last :])
        if self.config.keep_interval:
            kept |= {path for path in found if _step(path) % self.config.keep_interval == 0}
        if self.config.keep_best:
            kept |= set(best_checkpoints(found, self.config.best_metric)[: self.config.keep_best])
        for path in found:
            if path not in kept:
                with contextlib.suppress(OSError):  # what cannot be removed now is tried again after the next save
                    _remove(path)
        for leftover in self.directory.glob(f"{_TEMPORARY_PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def load(
        self, folder: Path, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer | None
    ) -> CheckpointInfo:
        """Load weights, and optimizer state unless ``optimizer`` is None, at this run's parallel layout. Collective.

        Raises:
            CheckpointError: the checkpoint does not fit the model, or cannot be read.
            OSError, RuntimeError: as they came, where the machine has failed.
        """
        info = read_info(folder)
        weights = _weights(chunks)
        state: dict[str, Any] = {"model": weights}
        if optimizer is not None:
            state["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=True, metadata=_sharding())
        wanted = stored_keys(state)  # the loader changes what it is given
        try:
            loaded = dist_checkpointing.load(state, str(folder))
        # The loader raises a dozen types (torch's wrapper is not even an Exception); all mean that this folder cannot
        # be used here.
        except (Exception, CheckpointException) as error:
            cause = _cause(error)
            if is_of_the_machine(cause):
                raise cause from error
            where, what = folder, f"{type(cause).__name__}: {cause}"
            if absent := absent_keys(folder, wanted):
                others = f" (nor any of {len(absent) - 1} others)" if len(absent) > 1 else ""
                where, what = folder / METADATA_FILE, f"it lists no piece of tensor {absent[0]}{others}"
            raise CheckpointError(
                str(where),
                f"cannot be loaded: {what}",
                "check that model.* is the same as in its checkpoint.json; if the files are damaged, remove the "
                "folder: the run then resumes from the checkpoint before it",
            ) from error
        for number, chunk in enumerate(chunks):
            chunk.module.load_state_dict(loaded["model"][str(number)], strict=True)
        if optimizer is not None:
            optimizer.load_state_dict(loaded["optimizer"])
        return info
