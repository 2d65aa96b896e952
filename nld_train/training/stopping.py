"""Signals that ask a run to stop, and what all ranks decide together after a step."""

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # Slurm's warning is SIGUSR1


class StopSignals:
    """Catches what asks a run to stop; use as a context manager, in the main thread.

    While :meth:`deferred`, a signal is noted, for the ranks to agree on at the end of a step (:attr:`requested`); when
    ``stop_timeout`` passes before that without progress, the process ends. (A long validation or a save may come before
    the next step ends: they are waited for as long as they get on.) At other times there is nothing to save and a
    signal ends the process. A second signal always does, with 128 + its number.

    Python runs signal handlers between two instructions of the main thread, which may be waiting in a collective for
    ever. So a thread reads what the kernel's handler wrote into a socket (``signal.set_wakeup_fd``).

    Args:
        stop_timeout: seconds.
        end: ends the process; called from the thread, with a reason.
        progress_at: when there was progress last, by ``time.monotonic``.
    """

    SAME_SIGNAL_SECONDS = 1.0
    """Launchers pass a signal on that the ranks have got themselves (Ctrl-C, ``scancel --full``): one request."""

    def __init__(self, stop_timeout: float, end: Callable[[str], None], progress_at: Callable[[], float]) -> None:
        self._stop_timeout = stop_timeout
        self._end = end
        self._progress_at = progress_at
        self._is_deferred = False
        self._first: tuple[str, float] | None = None  # name of the signal, when
        self._is_agreed = False
        self._old: dict[int, Any] = {}
        self._old_fd = -1

    def __enter__(self) -> Self:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        # The handlers do nothing: what counts is that a byte is written.
        self._old = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
        threading.Thread(target=self._watch, name="stop signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        self._writer.close()  # which ends the thread

    @property
    def requested(self) -> str | None:
        """Name of the signal that asked for a stop."""
        return self._first[0] if self._first is not None else None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While steps are trained: a signal waits for the end of the step. One that comes after the last step has
        nothing to wait for; the run ends by itself."""
        self._is_deferred = True
        try:
            yield
            self._is_agreed = True
        finally:
            self._is_deferred = False

    def agreed(self) -> None:
        """All ranks know: from here on saving takes the time that it takes."""
        self._is_agreed = True

    def _watch(self) -> None:
        while True:
            timeout = None
            if self._first is not None and not self._is_agreed:
                timeout = max(0.0, self._deadline(self._first[1]) - time.monotonic())
            if not select.select([self._reader], [], [], timeout)[0]:
                if not self._is_agreed and self._first is not None:
                    name, asked = self._first
                    if time.monotonic() >= self._deadline(asked):  # else there was progress meanwhile
                        self._end(f"no step ended after {name}, and no progress for {self._stop_timeout:g} s")
                continue
            numbers = self._reader.recv(64)
            if not numbers:
                return
            for number in numbers:
                if number in STOP_SIGNALS:
                    self._got(number)

    def _deadline(self, asked: float) -> float:
        return max(asked, self._progress_at()) + self._stop_timeout

    def _got(self, number: int) -> None:
        now, name = time.monotonic(), signal.Signals(number).name
        if self._first is None:
            self._first = (name, now)
            if not self._is_deferred:
                self._end(f"{name} while there was nothing to save")
        elif now - self._first[1] > self.SAME_SIGNAL_SECONDS:
            os._exit(128 + number)


@dataclass(frozen=True, slots=True)
class Agreed:
    """What the ranks decided: to stop, to save (by rank 0's clock), and that a rank's checkpoint file is not done."""

    stops: bool
    saves: bool
    is_writing: bool


class StepAgreement:
    """One all-reduce of three bytes between CPUs for each step, under way while the optimizer's step is.

    Args:
        group: gloo, of all ranks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._wishes = torch.zeros(3, dtype=torch.uint8)
        self._work: Any = None

    def begin(self, *, stops: bool, saves: bool, is_writing: bool) -> None:
        """What this rank wants; what one wants, all do."""
        self._wishes[:] = torch.tensor([stops, saves, is_writing])
        self._work = dist.all_reduce(self._wishes, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def end(self) -> Agreed:
        """The same on every rank."""
        self._work.wait()
        return Agreed(*(bool(wish) for wish in self._wishes.tolist()))
