"""Micro-batches for one data-parallel rank: read, checked and noised in worker processes.

B sequences in a micro-batch, L tokens in a sequence. Everything in a batch is on the CPU.
"""

import atexit
import contextlib
import ctypes
import itertools
import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nld_train.data.dataset import SampleSource
from nld_train.errors import ConfigError, DataError, Problem
from nld_train.objective.noise import Corruption, NoiseSpec, corrupt

_PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass(slots=True, kw_only=True)
class LoaderBatch:
    """One micro-batch.

    ``tokens`` and ``labels`` (the next tokens) int64 [B, L]; ``loss_mask`` float32 [B, L], 1 where the label is
    supervised; ``is_supervised`` bool [B, L], where the token is; ``document_starts`` int64 [B, L], place of the first
    token of each token's document, None where a sequence is one text; ``stream_positions`` int64 [B], each sample's
    place in the stream; ``corruption``: the noisy rows, None in a stage without the diffusion loss.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    is_supervised: Tensor
    document_starts: Tensor | None
    stream_positions: Tensor
    corruption: Corruption | None


class TrainLoader:
    """The micro-batches of one rank for one stage (or one validation pass), in order.

    With G = ``global_batch_size``, step k (counted from here) holds samples ``consumed_samples + [k*G, (k+1)*G)`` of
    the source; number ``(m * data_parallel_size + rank) * micro_batch_size + j`` of them is the j-th of micro-batch m
    of a rank. So a step holds the same samples with the same noise however it is cut. Iterating yields
    ``num_micro_batches`` batches per step, and can be stopped and begun again: it continues at ``consumed_samples``.

    Args:
        source: a :class:`~nld_train.data.dataset.TrainStream` or a :class:`~nld_train.data.dataset.ValidationSet`.
        micro_batch_size: B.
        global_batch_size: G, sequences of a step over all ranks.
        data_parallel_rank: of this process.
        data_parallel_size: ranks that share a global batch.
        consumed_samples: first sample of the source to read; any number.
        num_steps: steps until the iteration ends; None: it never ends. (It also keeps the workers from reading ahead,
            beyond the end of a stage.)
        noise: how the noisy copy is made; None: no noisy copy.
        num_workers: processes that read ahead; 0: read in this process.

    Raises:
        ConfigError: the global batch cannot be cut into micro-batches.
        DataError: while iterating, from the source.
    """

    def __init__(
        self,
        source: SampleSource,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        consumed_samples: int = 0,
        num_steps: int | None = None,
        noise: NoiseSpec | None = None,
        num_workers: int = 0,
    ) -> None:
        per_round = micro_batch_size * data_parallel_size
        if micro_batch_size < 1 or data_parallel_size < 1 or global_batch_size < 1 or global_batch_size % per_round:
            problem = Problem(
                "train.global_batch_size",
                f"{global_batch_size} is not a multiple of train.micro_batch_size {micro_batch_size} x data-parallel "
                f"size {data_parallel_size} = {per_round}",
                "choose sizes that divide (for a validation pass the global batch is train.validation_samples)",
            )
            raise ConfigError([problem])
        if not 0 <= data_parallel_rank < data_parallel_size or consumed_samples < 0 or num_workers < 0:
            raise ValueError(
                f"out of range: data_parallel_rank {data_parallel_rank} of {data_parallel_size}, "
                f"consumed_samples {consumed_samples}, num_workers {num_workers}"
            )
        self.num_micro_batches = global_batch_size // per_round
        self._consumed_samples = consumed_samples
        self._remaining_steps = num_steps
        self._global_batch_size = global_batch_size
        self._num_workers = num_workers
        self._batches = _MicroBatches(source, micro_batch_size, data_parallel_rank, data_parallel_size, noise)

    @property
    def consumed_samples(self) -> int:
        """The resume state: samples of the source in the steps whose micro-batches were all handed out."""
        return self._consumed_samples

    def __iter__(self) -> Iterator[LoaderBatch]:
        starts = _step_starts(self._consumed_samples, self._global_batch_size, self._remaining_steps)
        keys = ((start, micro_batch) for start in starts for micro_batch in range(self.num_micro_batches))
        for number, batch in enumerate(self._read(keys), start=1):
            if isinstance(batch, Problem):
                raise DataError(batch.location, batch.message, batch.remedy)
            if number % self.num_micro_batches == 0:
                self._consumed_samples += self._global_batch_size
                if self._remaining_steps is not None:
                    self._remaining_steps -= 1
            yield batch

    def _read(self, keys: Iterable[tuple[int, int]]) -> Iterable[LoaderBatch | Problem]:
        if self._num_workers == 0:
            return map(self._batches.__getitem__, keys)
        packed = DataLoader(
            _Packed(self._batches),
            sampler=keys,
            batch_size=None,  # an item is a whole micro-batch
            collate_fn=_as_it_is,
            num_workers=self._num_workers,
            # Forked workers start at once, with the files already mapped; torch gives each a single thread.
            multiprocessing_context="fork",
            worker_init_fn=_live_and_die_with_the_rank,
            # Its own generator: the default one would be advanced, differently in a run that was resumed.
            generator=torch.Generator(),
        )
        return map(_unpack, packed)


class _MicroBatches(Dataset[LoaderBatch | Problem]):
    """Micro-batches by (first sample of the step, number of the micro-batch): a pure function, in any process."""

    def __init__(
        self,
        source: SampleSource,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        noise: NoiseSpec | None,
    ) -> None:
        self._source = source
        self._micro_batch_size = micro_batch_size
        self._rank = data_parallel_rank
        self._data_parallel_size = data_parallel_size
        self._noise = noise

    def __getitem__(self, key: tuple[int, int]) -> LoaderBatch | Problem:
        """A DataError comes back as its problem: raised in a worker, it would arrive as a RuntimeError."""
        step_start, micro_batch = key
        first = step_start + (micro_batch * self._data_parallel_size + self._rank) * self._micro_batch_size
        try:
            samples = [self._source[index] for index in range(first, first + self._micro_batch_size)]
        except DataError as error:
            return error.problems[0]
        tokens = torch.stack([sample["tokens"] for sample in samples])
        positions = torch.tensor([sample["stream_position"] for sample in samples], dtype=torch.int64)
        is_supervised = torch.stack([sample["is_supervised"] for sample in samples])
        starts = [item for sample in samples if (item := sample["document_starts"]) is not None]
        document_starts = torch.stack(starts) if starts else None
        return LoaderBatch(
            tokens=tokens,
            labels=torch.stack([sample["labels"] for sample in samples]),
            loss_mask=torch.stack([sample["loss_mask"] for sample in samples]),
            is_supervised=is_supervised,
            document_starts=document_starts,
            stream_positions=positions,
            corruption=None
            if self._noise is None
            else corrupt(tokens, positions, self._noise, is_supervised, document_starts),
        )


def _live_and_die_with_the_rank(_worker: int) -> None:
    """Signals that a launcher sends to all processes of a job mean the rank, which ends its workers when it is time;
    when it is killed, the kernel ends them with it."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):  # not Linux: they look after their parent every few seconds
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@atexit.register
def _kill_workers() -> None:
    """Before multiprocessing asks the workers that are left to end, and waits: they do not listen to that signal."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


# The arrays of a batch by name; those of its noisy rows are prefixed.
_PackedBatch = dict[str, np.ndarray] | Problem
_NOISE_PREFIX = "corruption."


class _Packed(Dataset[_PackedBatch]):
    """Micro-batches as arrays: these travel through a pipe, while torch would open a shared file for every tensor,
    which costs more than the reading does."""

    def __init__(self, batches: _MicroBatches) -> None:
        self._batches = batches

    def __getitem__(self, key: tuple[int, int]) -> _PackedBatch:
        batch = self._batches[key]
        if isinstance(batch, Problem):
            return batch
        arrays = {
            item.name: getattr(batch, item.name).numpy()
            for item in fields(LoaderBatch)
            if item.name != "corruption" and getattr(batch, item.name) is not None
        }
        if batch.corruption is not None:
            arrays |= {
                _NOISE_PREFIX + item.name: getattr(batch.corruption, item.name).numpy() for item in fields(Corruption)
            }
        return arrays


def _unpack(packed: _PackedBatch) -> LoaderBatch | Problem:
    if isinstance(packed, Problem):
        return packed
    values: dict[str, Any] = {name: torch.from_numpy(array) for name, array in packed.items()}
    noise = {
        name.removeprefix(_NOISE_PREFIX): values.pop(name) for name in list(values) if name.startswith(_NOISE_PREFIX)
    }
    values.setdefault("document_starts", None)
    return LoaderBatch(**values, corruption=Corruption(**noise) if noise else None)


def _step_starts(first: int, step_size: int, num_steps: int | None) -> Iterable[int]:
    """First sample of each step."""
    if num_steps is None:
        return itertools.count(first, step_size)
    return range(first, first + num_steps * step_size, step_size)


def _as_it_is(item: Any) -> Any:
    return item
