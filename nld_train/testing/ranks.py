"""A pool of gloo ranks: processes that start once and run many cases.

Starting a process and importing torch and Megatron takes seconds, a case takes milliseconds. Each case gets process
groups of its own, which end with it: gloo keeps several threads for every group, and Megatron makes some twenty groups.
So the same processes serve cases of one, two and four ranks. The test's own process never enters the CPU compatibility
mode.
"""

import gc
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import torch

from nld_train.config.schema import Device, ParallelConfig
from nld_train.platform.device import Platform, initialize_device

Case = Callable[..., Any]
"""A module-level function ``case(topology, platform, *args)``; what rank 0 returns is the result."""

_START_TIMEOUT = 120.0  # seconds
_CASE_TIMEOUT = 240.0
_MAX_THREADS = 150


def _serve(rank: int, connection: Connection) -> None:
    """Body of one rank: answer cases until told to stop."""
    os.environ.update({"LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""})
    platform = initialize_device(Device.cpu)
    torch.set_num_threads(1)
    connection.send(("ready", None))
    while True:
        try:
            message = connection.recv()
        except EOFError:  # the test's process is gone
            os._exit(1)
        if message is None:
            break
        # Hundreds of thousands of objects of imported modules, at which every collection would look again.
        gc.collect()
        gc.freeze()
        answer = _answer(rank, platform, *message)
        _release_groups()
        connection.send(answer)


def _answer(
    rank: int,
    platform: Platform,
    case: Case,
    world_size: int,
    parallel: ParallelConfig,
    seed: int,
    store: str,
    args: tuple[Any, ...],
) -> tuple[str, Any]:
    """Run one case in process groups of its own."""
    import torch.distributed as dist

    from nld_train.platform.topology import initialize_topology, shutdown_topology

    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        topology = initialize_topology(parallel, platform, seed=seed)
        result = case(topology, platform, *args)
        return "ok", result if rank == 0 else None
    except BaseException:
        return "error", traceback.format_exc()
    finally:
        shutdown_topology()


def _release_groups() -> None:
    """End the threads of a case's process groups: a group's end with its last reference, and the case's objects hold
    some in cycles.

    One of these cycles is never collected, as it goes through nodes of autograd: a model's configuration holds the
    optimizer (``training.run.connect``), which holds the model.
    """
    from megatron.core.transformer import TransformerConfig

    for item in gc.get_objects():
        if issubclass(type(item), TransformerConfig):
            item.grad_scale_func = None
    gc.collect()


class RankProcesses:
    """The processes behind the pools, started when a case first needs them; use as a context manager.

    A failed case breaks its processes (the other ranks may wait for the failed one for ever): all are ended and the
    next case starts new ones.
    """

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        for connection in self._connections:
            connection.send(None)
        for process in self._processes:
            process.join(timeout=10)
        self._kill()

    def _start(self, world_size: int) -> None:
        """Until there are at least ``world_size`` of them."""
        context = multiprocessing.get_context("spawn")
        first = len(self._processes)
        for rank in range(first, world_size):
            ours, theirs = context.Pipe()
            # Not daemonic: the checkpoint writer starts a process of its own, which a daemon may not.
            process = context.Process(target=_serve, args=(rank, theirs))
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        for connection in self._connections[first:]:
            self._receive(connection, _START_TIMEOUT)

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._connections = [], []

    def _receive(self, connection: Connection, timeout: float) -> Any:
        try:
            if not connection.poll(timeout):
                raise TimeoutError(f"a rank did not answer in {timeout:.0f} s")
            status, value = connection.recv()
        except (EOFError, TimeoutError, ConnectionError) as error:
            self._kill()
            raise RuntimeError(f"a rank died or hangs: {error}") from error
        if status == "error":
            self._kill()
            raise RuntimeError(f"a rank raised:\n{value}")
        return value

    def run(self, world_size: int, case: Case, args: tuple[Any, ...], parallel: ParallelConfig, seed: int) -> Any:
        """See :meth:`RankPool.run`."""
        self._start(world_size)
        connections = self._connections[:world_size]
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            for connection in connections:
                connection.send((case, world_size, parallel, seed, store, args))
            results = [self._receive(connection, _CASE_TIMEOUT) for connection in connections]
        # Some of Megatron's caches keep groups alive all the same; processes with many threads are ended.
        if any(psutil.Process(process.pid).num_threads() > _MAX_THREADS for process in self._processes):
            self._stop()
        return results[0]


class RankPool:
    """The first ``world_size`` of some processes as gloo ranks."""

    def __init__(self, world_size: int, processes: RankProcesses) -> None:
        self.world_size = world_size
        self._processes = processes

    def run(self, case: Case, *args: Any, parallel: ParallelConfig | None = None, seed: int = 1234) -> Any:
        """Run one case on all ranks at a parallel layout and return rank 0's result.

        Args:
            case: module-level function, see :data:`Case`.
            args: picklable arguments of the case.
            parallel: layout; None: data parallel over all ranks.
            seed: of Megatron's RNG tracker.
        """
        return self._processes.run(self.world_size, case, args, parallel or ParallelConfig(), seed)
