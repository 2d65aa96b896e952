"""What can end a run from outside of its loop, on one rank: signals, lost ranks, no progress, another rank's error."""

import os
import random
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Self

from nld_train.config.schema import Config
from nld_train.errors import EXIT_RESTART, ConfigError
from nld_train.platform.failures import is_of_the_machine
from nld_train.training.callbacks.heartbeat import Heartbeat
from nld_train.training.peers import Notice, Peers
from nld_train.training.stopping import StopSignals
from nld_train.training.watchdog import Watchdog, dump_stacks


class Supervisor:
    """Use as a context manager around a run, in the main thread.

    Where a peer is gone or nothing moves, no Python code can rely on the main thread: it may wait in a collective. So
    the process ends from a thread, at once (``os._exit``), without saving and without anybody's exit handlers; workers
    of the loader end with it.
    """

    FAILURE_SECONDS = 5.0
    """So long a rank has to end by itself when another one has failed: it often finds the same error."""
    LOSS_SECONDS = 5.0
    """So long an error of a collective waits for the news that a peer is gone."""
    STALL_SECONDS = 2.0
    """So long the others have to write their stacks."""
    END_SECONDS = 10.0
    """So long an end may take that writes to the run's folder, which may be what hangs."""
    FILE_SECONDS = 1800.0
    """The watchdog's limit before the first step and after the last one, unless ``train.stall_timeout`` is longer: a
    slow file server is no hang. As long as the others wait in a collective for this rank."""
    SPREAD_SECONDS = 1.0
    """In this time, at most, the ranks that have lost rank 0 look one after the other whether somebody has said so."""

    def __init__(self, config: Config, rank: int, world_size: int) -> None:
        self.run_dir = Path(config.run.dir)
        self._rank = rank
        self._world_size = world_size
        self.heartbeat = Heartbeat(self.run_dir, rank, world_size, writes=config.debug.replay_step is None)
        self.watchdog = Watchdog(config.train.stall_timeout, self._stalled)
        self.signals = StopSignals(config.train.stop_timeout, self._stop, lambda: self.watchdog.marked_at)
        self.peers = Peers(self._notice, self._lost)
        self._has_ended = threading.Event()
        self._ending = threading.Lock()

    def __enter__(self) -> Self:
        self.signals.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._has_ended.set()
        self.signals.__exit__(kind, error, trace)

    def reading_files(self) -> AbstractContextManager[None]:
        """Around what reads or writes large files before the first step, or after the last one."""
        return self.watchdog.watching(self.FILE_SECONDS)

    def failed(self, error: BaseException, status: int) -> None:
        """The main thread ends with an error: tell the others, unless the error is that one of them is gone."""
        if self._world_size > 1 and not isinstance(error, ConfigError):
            time.sleep(self.LOSS_SECONDS)  # a lost peer ends this process meanwhile
        if is_of_the_machine(error):
            self._end(EXIT_RESTART, f"{type(error).__name__}: {error}", "lost")
        message = f"{type(error).__name__}: {error}"
        self.heartbeat.state("failed", message)
        self.peers.tell("failed", status, message)

    def _stop(self, reason: str) -> None:
        self._end(EXIT_RESTART, f"{reason}: ended without saving", "stopped")

    def _lost(self, rank: int) -> None:
        self._end_in_time(EXIT_RESTART)
        if self._rank != 0:  # all of them see rank 0 go, one needs to write
            time.sleep(random.uniform(0.0, min(self.SPREAD_SECONDS, self._world_size / 1000)))
        self._end(EXIT_RESTART, f"rank {rank} is gone: ended without saving", "lost")

    def _stalled(self, reason: str) -> None:
        self._end_in_time(EXIT_RESTART)
        path = dump_stacks(self.run_dir, self._rank, reason)
        message = f"rank {self._rank}: {reason}; stacks in {path}"
        self.heartbeat.state("stalled", message)
        self.peers.tell("stalled", message=message)
        time.sleep(self.STALL_SECONDS)
        self._end(EXIT_RESTART, message, "stalled")  # again: a step may have ended meanwhile

    def _notice(self, notice: Notice) -> None:
        if notice.kind == "stalled":
            self._end_in_time(EXIT_RESTART)
            dump_stacks(self.run_dir, self._rank, notice.message)
            self._end(EXIT_RESTART, notice.message, "stalled" if self._rank == 0 else None)
        if self._has_ended.wait(self.FAILURE_SECONDS):
            return
        if self._rank == 0:
            self.heartbeat.state("failed", f"rank {notice.rank}: {notice.message}")
        self._end(notice.status, f"rank {notice.rank} has failed: {notice.message}", None)

    def _end(self, status: int, message: str, state: str | None) -> None:
        """Never returns. The first thread that comes here decides."""
        self._end_in_time(status)
        self._ending.acquire()
        try:
            # Not through sys.stderr, whose lock the main thread may hold.
            os.write(2, f"[rank {self._rank}] {message}\n".encode())
            if self._rank == 0 or state is not None:
                self.heartbeat.state(state, message)
        finally:
            os._exit(status)

    def _end_in_time(self, status: int) -> None:
        timer = threading.Timer(self.END_SECONDS, os._exit, [status])
        timer.daemon = True
        timer.start()
