"""Weights & Biases. The package is imported only when a run is really logged there."""

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nld_train.config.schema import WandbConfig, WandbMode
from nld_train.errors import NLDError
from nld_train.training.callbacks.base import Callback, RunInfo
from nld_train.training.metrics import finite_values, records_of

if TYPE_CHECKING:
    import wandb

RUN_ID_FILE = "wandb_run_id"
LAST_STEP_FILE = "wandb_last_step"


def load_or_create_run_id(run_dir: Path) -> str:
    """The run's id on Weights & Biases: made once, kept beside the run, the same after every resume.

    Raises:
        NLDError: the file holds something else.
    """
    path = run_dir / RUN_ID_FILE
    if path.exists():
        run_id = path.read_text(encoding="utf-8", errors="replace").strip()
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", run_id):
            raise NLDError(str(path), f"is not a run id: {run_id[:40]!r}", "remove the file to start a new curve")
        return run_id
    run_id = secrets.token_hex(4)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(run_id + "\n", encoding="utf-8")
    temporary.replace(path)
    return run_id


def _offline_records(path: Path) -> Iterator[tuple[Any, int]]:
    """Whole records of an offline run's ``.wandb`` file, each with the place in the file where it ends.

    The file is a log as LevelDB writes it, after a header of 7 bytes: blocks of 32 KiB, in each of them chunks of
    CRC-32 (4 bytes), length (2), kind (1: a whole record; 2, 3, 4: the first, middle, last part of one) and data. What
    is left of a block, if it is less than a chunk's head, is padding. A record is a protobuf message.
    """
    from wandb.proto import wandb_internal_pb2

    block, head = 1 << 15, 7
    with path.open("rb") as file:
        file.seek(head)
        parts = b""
        while True:
            room = block - file.tell() % block
            if room < head:
                file.seek(room, os.SEEK_CUR)
            chunk = file.read(head)
            if len(chunk) < head:
                return
            length, kind = int.from_bytes(chunk[4:6], "little"), chunk[6]
            data = file.read(length)
            if kind not in (1, 2, 3, 4) or len(data) < length:
                return
            parts = data if kind in (1, 2) else parts + data
            if kind in (1, 4):
                record = wandb_internal_pb2.Record()
                record.ParseFromString(parts)
                yield record, file.tell()


def mend_offline_run(path: Path) -> int:
    """Make the file of a start that was killed one that ``wandb sync`` takes; the last step that it has a row of.

    wandb writes 32 KiB at a time. A killed start leaves half a record at the end, which makes ``wandb sync`` fail, or
    no record at all, which makes it refuse all starts of the run: the half is cut off, and a folder without any row is
    removed (its rows are in ``metrics.jsonl``).

    Args:
        path: of the ``.wandb`` file; nobody writes to it any more.
    """
    last_step = end = 0
    for record, end in _offline_records(path):  # noqa: B007 - the last end is what counts
        for item in record.history.item:
            if item.key == "_step" or list(item.nested_key) == ["_step"]:
                last_step = int(json.loads(item.value_json))
    if not last_step:
        shutil.rmtree(path.parent)
    elif end < path.stat().st_size:
        os.truncate(path, end)
    return last_step


def last_offline_step(run_dir: Path, run_id: str) -> int:
    """The last step that offline runs of an id have a row of, once they are mended; 0 where there is none.

    Files that were uploaded may be gone (``wandb clean``), so a start also notes what it found.
    """
    noted = run_dir / LAST_STEP_FILE
    last_step = int(noted.read_text()) if noted.exists() else 0
    for path in run_dir.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"):
        last_step = max(last_step, mend_offline_run(path))
    temporary = noted.with_name(noted.name + ".tmp")
    temporary.write_text(f"{last_step}\n", encoding="utf-8")
    temporary.replace(noted)
    return last_step


class WandbLogger(Callback):
    """Logs step and validation records on one step axis, each metric under its name in ``metrics.jsonl``.

    One run, one curve, whatever happened to the process: a start looks up the last step that Weights & Biases has (its
    server, or the offline files), takes the steps between that and its own beginning from ``metrics.jsonl``, and leaves
    out those that it computes a second time, which come out equal. Offline, each start writes its own
    ``wandb/offline-run-*`` folder with the same run id; ``wandb sync`` uploads them.

    Args:
        config: mode offline or online, project, name.
        init_timeout: seconds to wait for the server.

    Raises:
        NLDError: ``on_run_start`` could not start the run (no API key, server out of reach).
    """

    def __init__(self, config: WandbConfig, init_timeout: float = 90.0) -> None:
        if config.mode is WandbMode.disabled:
            raise ValueError("WandbLogger is not built when wandb.mode=disabled")
        self._config = config
        self._init_timeout = init_timeout
        self._run: wandb.Run | None = None
        self._num_steps = 0
        self._last_step = 0
        self._known_step = 0

    def on_run_start(self, info: RunInfo) -> None:
        if info.start_step >= info.num_steps:
            return  # a finished run was started again: nothing will be logged
        import wandb

        settings = wandb.Settings(
            silent=True,  # the run has its own display
            console="off",  # train.log holds the output
            init_timeout=self._init_timeout,
            disable_git=True,
            disable_job_creation=True,
        )
        # wandb falls back to a temporary folder, without an error, where the given one is not writable
        if not os.access(info.run_dir, os.W_OK):
            raise NLDError(str(info.run_dir), "is not writable", "fix the folder's rights or choose another run.dir")
        run_id = load_or_create_run_id(info.run_dir)
        is_offline = self._config.mode is WandbMode.offline
        if is_offline:
            self._known_step = last_offline_step(info.run_dir, run_id)
        try:
            self._run = wandb.init(
                project=self._config.project,
                name=self._config.name if self._config.name is not None else info.run_dir.name,
                id=run_id,
                resume="allow",
                dir=info.run_dir,
                mode="offline" if is_offline else "online",
                config=info.config,
                settings=settings,
            )
        except wandb.Error as failure:
            reason = str(failure).strip().splitlines()[0]
            raise NLDError(
                "wandb.mode",
                f"{self._config.mode.value}: Weights & Biases did not start: {reason}",
                "run `wandb login` and check the connection, or set wandb.mode=offline (or disabled)",
            ) from failure
        if not is_offline:
            self._known_step = self._run.starting_step - 1
        self._num_steps = info.num_steps
        for record in records_of(info.run_dir / "metrics.jsonl"):
            if record["step"] <= info.start_step:
                self._log(record)
        self._last_step = info.start_step

    def _log(self, record: dict[str, Any]) -> None:
        if self._run is None:
            raise RuntimeError("WandbLogger is used outside of a run: on_run_start first, nothing after on_run_end")
        self._last_step = step = record["step"]
        if step > self._known_step:
            self._run.log({name: value for name, value in finite_values(record).items() if name != "step"}, step=step)

    def on_step(self, record: dict[str, Any]) -> None:
        self._log(record)

    def on_validation(self, record: dict[str, Any]) -> None:
        self._log(record)

    def on_run_end(self) -> None:
        if self._run is not None:
            import wandb

            self._run.finish(exit_code=0 if self._last_step >= self._num_steps else 1)
            self._run = None
            # finish() returns before wandb's own process has written the last records to its file
            wandb.teardown()
