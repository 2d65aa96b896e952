"""``metrics.jsonl``: every step exactly once, whatever happened to the process in between."""

import errno
import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

from nld_train.errors import NLDError
from nld_train.training.callbacks.base import Callback, RunInfo
from nld_train.training.metrics import encode_record, parse_lines

# EFBIG: a limit of this process, which is lifted as a disk is freed
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class JsonlWriter(Callback):
    """Writes each record as one line, handed to the kernel at once: a killed process loses none of them.

    On start it drops what a killed process wrote after the checkpoint that the run resumes from (those steps are
    computed again), and a torn last line. Before a checkpoint is complete the file is synced to the disk.

    While the disk is full (a checkpoint may be filling it, and is removed when that fails) records wait in memory, at
    most until then: a checkpoint whose records are not on file is not completed.

    Args:
        path: the file.
        say: takes a line for people when something was dropped.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path = path
        self._say = say
        self._file: FileIO | None = None
        self._waiting = b""

    def on_run_start(self, info: RunInfo) -> None:
        self._drop_after(info.start_step)
        self._file = self.path.open("ab", buffering=0)

    def _drop_after(self, last_step: int) -> None:
        if not self.path.exists():
            if last_step > 0:
                self._say(f"{self.path.name} is missing: the records of steps 1..{last_step} are lost")
            return
        data = self.path.read_bytes()
        parsed = parse_lines(data, self.path)
        kept = [line for record, line in zip(parsed.records, parsed.lines, strict=True) if record["step"] <= last_step]
        repaired = b"".join(kept)
        if repaired == data:
            return
        temporary = self.path.with_name(self.path.name + ".tmp")
        with temporary.open("wb") as file:
            file.write(repaired)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
        num_dropped = len(parsed.lines) - len(kept) + parsed.num_torn
        if num_dropped:
            self._say(f"{self.path.name}: dropped {num_dropped} lines after step {last_step}; those steps run again")

    def _opened(self) -> FileIO:
        if self._file is None:
            raise RuntimeError("JsonlWriter is used outside of a run: on_run_start first, nothing after on_run_end")
        return self._file

    def _write(self, record: dict[str, Any]) -> None:
        self._waiting += encode_record(record)
        self._flush(may_wait=True)

    def _flush(self, *, may_wait: bool) -> None:
        file = self._opened()
        try:
            while self._waiting:
                self._waiting = self._waiting[file.write(self._waiting) :]
        except OSError as failure:
            if may_wait and failure.errno in _DISK_FULL:
                return
            raise NLDError(
                str(self.path),
                f"cannot be written: {failure}",
                "free space or fix the folder's rights, then start the run again",
            ) from failure

    def on_step(self, record: dict[str, Any]) -> None:
        self._write(record)

    def on_validation(self, record: dict[str, Any]) -> None:
        self._write(record)

    def on_checkpoint_ready(self) -> None:
        self._flush(may_wait=False)
        os.fsync(self._opened().fileno())

    def on_run_end(self) -> None:
        if self._file is not None:
            self._flush(may_wait=False)
            self._file.close()
            self._file = None
