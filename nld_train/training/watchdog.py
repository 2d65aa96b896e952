"""Ends a rank that makes no progress, and leaves a picture of what it was doing."""

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self


class Watchdog:
    """A thread that looks at the time of the last :meth:`mark`; use as a context manager.

    Args:
        timeout: seconds without a mark; 0: never.
        on_stall: called from the thread, with what is wrong; ends the process.
    """

    def __init__(self, timeout: float, on_stall: Callable[[str], None]) -> None:
        self._timeout = timeout
        self._on_stall = on_stall
        self._marked_at = time.monotonic()
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self.mark()
        if self._timeout > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def mark(self) -> None:
        """There is progress: a micro-batch, a step, a piece of a file. From any thread."""
        self._marked_at = time.monotonic()

    def _watch(self) -> None:
        asleep = min(1.0, self._timeout / 4)
        looked_at = time.monotonic()
        while not self._ended.wait(asleep):
            now = time.monotonic()
            if now - looked_at > asleep + self._timeout / 2:
                self.mark()  # this process was stopped and goes on (SIGCONT, a suspended machine): it may yet progress
            looked_at = now
            if now - self._marked_at > self._timeout:
                self._on_stall(f"no progress for {self._timeout:g} s (train.stall_timeout)")


def dump_stacks(run_dir: Path, rank: int, reason: str) -> Path | None:
    """Write where all Python threads of this process are to ``stacks/`` in the run's folder; None: that cannot be."""
    path = run_dir / "stacks" / f"{datetime.now():%Y%m%d_%H%M%S}_rank{rank}.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            file.write(f"rank {rank}, pid {os.getpid()} on {socket.gethostname()}: {reason}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
    except OSError as error:
        print(f"[rank {rank}] stacks cannot be written to {path}: {error}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        return None
    return path
