"""Clean keys and values of all context-parallel ranks, gathered under the attention that needs them.

Noisy keys and values are needed inside their block only, and a block is on one rank: they never travel. What travels in
each layer is what AR training on the same clean tokens sends: the clean half's keys and values, and their gradients.

Key-value heads are taken in groups. While the attention of one group is computed, the next one's keys and values are on
their way; in the backward pass the gradients of one group travel under the attention of the other. Each group's
gathering is two autograd nodes for that: one begins it, the other waits and lays the keys out; backward they run the
other way round, and the *second* begins to send. The order in which autograd runs them is the same on every rank.

Dimensions: B sequences, N noisy rows of this rank, L clean tokens of a sequence, S = N + L / size, K key-value heads, G
of them in a group, D head dimension, P = ``shard.size``, W = L / (2 P) clean tokens of a chunk.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nld_train.objective.sequence import SequenceLayout, Shard

_NUM_GROUPS = 2

# The name of torch 2.13, which warns of the older one.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_traffic: list["Traffic"] = []


class Traffic:
    """Bytes that this rank has sent to others, by kind."""

    def __init__(self) -> None:
        self.gathered = 0
        self.scattered = 0


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what this rank sends while the block runs (for tests and measurements)."""
    traffic = Traffic()
    _traffic.append(traffic)
    try:
        yield traffic
    finally:
        _traffic.remove(traffic)


def gather_keys(
    key: Tensor, value: Tensor, layout: SequenceLayout, group: dist.ProcessGroup
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Key-value heads by groups, each with the clean tokens of all ranks. Collective.

    Everything is sent before the first group is returned, which does not wait for the second one.

    Args:
        key: [S, B, K, D] of this rank's rows, rotated.
        value: [S, B, K, D].
        layout: of this rank's rows.
        group: the context-parallel ranks, in the order of their shards.

    Returns:
        key-value heads of a group (a slice of K), their keys and values, each [B, G, N + L, D], the clean ones in the
        order of their places.
    """
    num_heads = key.shape[2]
    step = -(-num_heads // min(_NUM_GROUPS, num_heads))
    # Split, not sliced: the gradient of a slice is a whole tensor of zeros around it.
    parts = [
        part.split(step, dim=2)
        for x in (key, value)
        for part in x.split([layout.num_noisy_rows, layout.num_clean_rows])
    ]
    started = []
    for number, (noisy_key, clean_key, noisy_value, clean_value) in enumerate(zip(*parts, strict=True)):
        exchange = _Exchange(layout.shard, group)
        gathered = _Begin.apply(clean_key, clean_value, exchange)
        heads = slice(number * step, number * step + noisy_key.shape[2])
        started.append((heads, gathered, noisy_key, noisy_value, exchange))
    for heads, *arguments in started:
        yield heads, *_Finish.apply(*arguments)


class _Exchange:
    """One group of heads on its way: what both autograd nodes know, and the buffers in use until a wait."""

    def __init__(self, shard: Shard, group: dist.ProcessGroup) -> None:
        self.shard = shard
        self.group = group
        self._work: Any = None
        self._buffers: tuple[Tensor, ...] = ()

    def gather(self, own: Tensor) -> Tensor:
        """Begin to gather ``own`` (contiguous); returns the ranks' in a row, to be read after :meth:`wait`."""
        gathered = own.new_empty(self.shard.size * own.shape[0], *own.shape[1:])
        self._work = _all_gather_single(gathered, own, group=self.group, async_op=True)
        self._buffers = (own, gathered)
        for traffic in _traffic:
            traffic.gathered += (self.shard.size - 1) * own.nbytes
        return gathered

    def send_back(self, parts: Tensor) -> None:
        """Begin to send each rank its part of ``parts`` [P, ...] (contiguous)."""
        received = torch.empty_like(parts)
        self._work = dist.all_to_all_single(received, parts, group=self.group, async_op=True)
        self._buffers = (parts, received)
        for traffic in _traffic:
            traffic.scattered += (self.shard.size - 1) * parts[0].nbytes

    def wait(self) -> Tensor:
        """What was received last."""
        self._work.wait()
        received = self._buffers[-1]
        self._work, self._buffers = None, ()
        return received


class _Begin(torch.autograd.Function):
    """Pack this rank's clean keys and values and begin to gather them."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, exchange: _Exchange) -> Tensor:
        """[P * 2 chunks, 2 (key, value), W, B, G, D] that may not be read yet, from two of [L / P, B, G, D]."""
        ctx.exchange = exchange
        return exchange.gather(torch.stack([x.unflatten(0, (2, -1)) for x in (key, value)], dim=1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        """The sum over ranks of what came back. The argument is the buffer that was sent: not to be read or written."""
        received = ctx.exchange.wait()
        # Sent in the dtype of the keys, as by a reduce-scatter, but added up at least in fp32 and rounded once.
        dtype = torch.promote_types(received.dtype, torch.float32)
        total = received.sum(dim=0, dtype=dtype).to(received.dtype)
        return total[:, 0].flatten(0, 1), total[:, 1].flatten(0, 1), None


class _Finish(torch.autograd.Function):
    """Wait, and lay out [noisy | clean in the order of places]."""

    @staticmethod
    def forward(
        ctx: Any, gathered: Tensor, noisy_key: Tensor, noisy_value: Tensor, exchange: _Exchange
    ) -> tuple[Tensor, Tensor]:
        ctx.exchange, ctx.num_noisy = exchange, len(noisy_key)
        exchange.wait()
        by_rank = gathered.unflatten(0, (-1, 2))
        size, width = by_rank.shape[0], by_rank.shape[3]
        # In the memory order of Megatron's activations, rows first.
        laid_out = []
        for kind, noisy in enumerate((noisy_key, noisy_value)):
            rows = noisy.new_empty(ctx.num_noisy + 2 * size * width, *noisy.shape[1:])
            rows[: ctx.num_noisy] = noisy
            chunks = rows[ctx.num_noisy :].unflatten(0, (2 * size, width))
            chunks[:size] = by_rank[:, 0, kind]
            chunks[size:] = by_rank[:, 1, kind].flip(0)
            laid_out.append(rows.permute(1, 2, 0, 3))
        return laid_out[0], laid_out[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        size, num_noisy = ctx.exchange.shard.size, ctx.num_noisy
        grad_rows = [grad.permute(2, 0, 1, 3) for grad in grads]
        chunks = [rows[num_noisy:].unflatten(0, (2 * size, -1)) for rows in grad_rows]
        parts = chunks[0].new_empty(size, 2, 2, *chunks[0].shape[1:])
        for kind, of_kind in enumerate(chunks):
            parts[:, 0, kind] = of_kind[:size]
            parts[:, 1, kind] = of_kind[size:].flip(0)
        ctx.exchange.send_back(parts)
        return parts.flatten(0, 1), grad_rows[0][:num_noisy], grad_rows[1][:num_noisy], None
