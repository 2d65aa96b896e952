"""Where the time of a step goes: marks between its phases, read when the device is done with them.

On a GPU a mark is an event in the stream, so nothing waits for it; on a CPU it is the clock.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

PHASES = ("forward", "backward", "optimizer")
_MEGATRON_TIMERS = {"forward-compute": "forward", "backward-compute": "backward"}


class _Timer(Protocol):
    """What Megatron's schedule calls."""

    def start(self, barrier: bool = False) -> None: ...

    def stop(self, barrier: bool = False) -> None: ...


class _NoTimer:
    def start(self, barrier: bool = False) -> None: ...

    def stop(self, barrier: bool = False) -> None: ...


class _PhaseTimer:
    """Started again before it is stopped, it begins anew."""

    def __init__(self, mark: Callable[[], Any], add: Callable[[Any, Any], None]) -> None:
        self._mark, self._add = mark, add
        self._start: Any = None

    def start(self, barrier: bool = False) -> None:
        self._start = self._mark()

    def stop(self, barrier: bool = False) -> None:
        if self._start is not None:
            self._add(self._start, self._mark())
            self._start = None


class PhaseTimers:
    """Seconds of forward passes, backward passes and optimizer steps on this rank; Megatron's ``config.timers``.

    Forward and backward are computation and tensor- and context-parallel communication; a pipeline rank's waiting for
    others, and gradients that are reduced after the last backward pass, are in none of them.

    Args:
        device: of the model.
        now: a clock in seconds, for a CPU.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self._is_cuda = device.type == "cuda"
        self._now = now
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._pending: list[tuple[str, Any, Any]] = []
        self._none = _NoTimer()
        self._timers = {name: _PhaseTimer(self._mark, self._adder(name)) for name in PHASES}
        self._is_paused = False

    def __call__(self, name: str, log_level: int | None = None) -> _Timer:
        """The timer of that name, of Megatron's names; one that does nothing where it is not of interest."""
        phase = _MEGATRON_TIMERS.get(name)
        return self._none if phase is None or self._is_paused else self._timers[phase]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around forward passes that are not training."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around a phase that is not one of Megatron's."""
        self._timers[name].start()
        yield
        self._timers[name].stop()
        self._collect()

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call."""
        self._collect()
        seconds, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return seconds

    def _mark(self) -> Any:
        if not self._is_cuda:
            return self._now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _adder(self, name: str) -> Callable[[Any, Any], None]:
        def add(start: Any, end: Any) -> None:
            if self._is_cuda:
                self._pending.append((name, start, end))
            else:
                self._seconds[name] += end - start

        return add

    def _collect(self) -> None:
        """Events that have passed; the others are left for the next time, and nobody waits for them."""
        pending, self._pending = self._pending, []
        for name, start, end in pending:
            if end.query():
                self._seconds[name] += start.elapsed_time(end) / 1e3
            else:
                self._pending.append((name, start, end))
