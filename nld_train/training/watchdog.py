"""Ends a rank that makes no progress, and leaves a picture of what it was doing."""

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import psutil

_READ_BYTES = 64 << 10  # between two looks; counting reads some hundred bytes itself


class Watchdog:
    """A thread that looks at the time of the last :meth:`mark`, while a block is :meth:`watching`.

    Args:
        timeout: seconds without a mark; 0: never.
        on_stall: called from the thread, with what is wrong; ends the process.
    """

    def __init__(self, timeout: float, on_stall: Callable[[str], None]) -> None:
        self._timeout = timeout
        self._on_stall = on_stall
        self._marked_at = time.monotonic()

    @contextmanager
    def watching(self, at_least: float = 0.0) -> Iterator[None]:
        """Until the block ends.

        Args:
            at_least: seconds; a longer limit, for a block that reads or writes large files: there what the process
                reads is progress, too, since what reads it knows nothing of marks.
        """
        ended = threading.Event()
        self.mark()
        if self._timeout > 0:
            reads = self._bytes_read if at_least else lambda: 0
            arguments = (max(self._timeout, at_least), reads, ended)
            threading.Thread(target=self._watch, args=arguments, name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    @property
    def marked_at(self) -> float:
        """When there was progress last, by ``time.monotonic``."""
        return self._marked_at

    def mark(self) -> None:
        """There is progress: a micro-batch, a step, a piece of a file. From any thread."""
        self._marked_at = time.monotonic()

    @staticmethod
    def _bytes_read() -> int:
        """By this process so far: into its buffers, and into the machine's memory for mapped files."""
        try:
            counters = psutil.Process().io_counters()
        except (OSError, psutil.Error):  # a kernel that does not count
            return 0
        return int(counters.read_chars + counters.read_bytes)

    def _watch(self, limit: float, reads: Callable[[], int], ended: threading.Event) -> None:
        asleep = min(1.0, limit / 4)
        looked_at = time.monotonic()
        num_read = reads()
        while not ended.wait(asleep):
            now = time.monotonic()
            if now - looked_at > asleep + limit / 2:
                self.mark()  # this process was stopped and goes on (SIGCONT, a suspended machine): it may yet progress
            looked_at = now
            before, num_read = num_read, reads()
            if num_read - before > _READ_BYTES:
                self.mark()
            if now - self._marked_at > limit:
                setting = "train.stall_timeout" if limit == self._timeout else "the limit while a run starts or ends"
                self._on_stall(f"no progress for {limit:g} s ({setting})")


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
