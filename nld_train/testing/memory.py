"""What a step really keeps in memory, counted tensor by tensor: the measurement behind ``config.memory``.

:func:`counted_bytes` and :func:`live_peak` are cases for :class:`nld_train.testing.ranks.RankPool`;
:func:`measured_peak` needs a GPU.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nld_train.config.schema import ParallelConfig
from nld_train.model.build import build_chunks, row_multiple
from nld_train.platform.device import Platform
from nld_train.platform.topology import Topology
from nld_train.testing.steps import StepCase, loader_batches
from nld_train.training.optimizer import build_optimizer, set_hyperparameters
from nld_train.training.run import connect, overlap, wrap_data_parallel
from nld_train.training.step import LossWeights, StepShape, run_microbatches

# Of a module's name, from the inside out: the part of the estimate that what it saves belongs to.
_PARTS = {
    "embedding": "head",
    "input_layernorm": "norms",
    "pre_mlp_layernorm": "norms",
    "final_layernorm": "norms",
    "self_attention": "attention",
    "mlp": "mlp",
    "output_layer": "head",
}
_OUTSIDE = "inputs"  # what the decoder itself saves: inputs of layers that are computed again


class _Saved:
    """One tensor in the hands of autograd; counted until autograd lets go of it."""

    def __init__(self, tensor: Tensor, counter: "SavedTensors") -> None:
        self.tensor = tensor
        self.counter = counter
        counter.take(tensor)

    def __del__(self) -> None:
        self.counter.release(self.tensor)


class SavedTensors:
    """Bytes of the distinct storages that autograd holds, by part, at the moment when they are most."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.now: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        parameters = [parameter for module in modules for parameter in module.parameters()]
        self._ignored = {p.untyped_storage()._cdata for p in parameters}
        self._ignored |= {p.main_grad.untyped_storage()._cdata for p in parameters}  # type: ignore[attr-defined]
        self._held: dict[int, tuple[int, str, int]] = {}  # storage -> times held, part, bytes
        self._stack: list[str] = []

    def take(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._ignored:
            return
        times, part, size = self._held.get(
            storage._cdata, (0, self._stack[-1] if self._stack else _OUTSIDE, storage.nbytes())
        )
        self._held[storage._cdata] = times + 1, part, size
        if times == 0:
            self.now[part] += size
            if self.now.total() > self.at_peak.total():
                self.at_peak = +self.now

    def release(self, tensor: Tensor) -> None:
        key = tensor.untyped_storage()._cdata
        if key in self._ignored:
            return
        times, part, size = self._held.pop(key)
        if times > 1:
            self._held[key] = times - 1, part, size
        else:
            self.now[part] -= size

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is saved inside the ``with`` block."""
        handles: list[Any] = []
        for name, module in [named for root in self.modules for named in root.named_modules()]:
            part = _PARTS.get(name.rpartition(".")[2])
            if part is not None:
                handles.append(module.register_forward_pre_hook(lambda *_, part=part: self._stack.append(part)))
                handles.append(module.register_forward_hook(lambda *_: self._stack.pop() and None))
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Saved(tensor, self), lambda saved: saved.tensor):
            yield
        for handle in handles:
            handle.remove()


def _step(topology: Topology, platform: Platform, case: StepCase, parallel: ParallelConfig) -> "_Step":
    models = build_chunks(case.model, parallel, dtype=case.dtype, device=platform.device, seed=case.seed)
    chunks = [
        wrap_data_parallel(model, **overlap(parallel, platform), is_first_chunk=model is models[0]) for model in models
    ]
    optimizer = build_optimizer(case.optim, chunks, case.dtype)
    connect(chunks, optimizer)
    return _Step(topology, platform, case, models, chunks, optimizer, row_multiple(parallel))


@dataclass(frozen=True, slots=True)
class _Step:
    """Everything of a training step, built once."""

    topology: Topology
    platform: Platform
    case: StepCase
    models: list[Any]
    chunks: list[Any]
    optimizer: Any
    row_multiple: int

    def gradients(self) -> None:
        case = self.case
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        num_microbatches = case.samples.shape[0] // (case.micro_batch_size * self.topology.data_parallel_size)
        run_microbatches(
            iter(loader_batches(case, self.topology, self.row_multiple)),
            self.chunks,
            StepShape(num_microbatches=num_microbatches, micro_batch_size=case.micro_batch_size, num_rows=None),
            objective=case.objective,
            weights=LossWeights(ar=case.ar_loss_weight, diffusion=case.diffusion_loss_weight),
            device=self.platform.device,
        )

    def update(self) -> None:
        set_hyperparameters(self.optimizer, self.case.optim, self.case.lr)
        self.optimizer.step()


def counted_bytes(
    topology: Topology, platform: Platform, case: StepCase, parallel: ParallelConfig
) -> list[dict[str, int]]:
    """Of every rank, the bytes of each part of a training step. Collective.

    Parameters, gradient buffers, the optimizer's state after a step, and what autograd holds at most during a whole
    global batch, micro-batches in flight and recomputed layers included.
    """
    step = _step(topology, platform, case, parallel)
    for _ in range(2):  # tables that are built once are there in the second step
        saved = SavedTensors(step.models)
        with saved.counting():
            step.gradients()
        step.update()
    parameters = [parameter for model in step.models for parameter in model.parameters()]
    counted = {
        "parameters": _distinct_bytes(parameters),
        "gradients": _distinct_bytes([p.main_grad for p in parameters]),
        "optimizer": _optimizer_bytes(step.optimizer, {p.untyped_storage()._cdata for p in parameters}),
        **saved.at_peak,
    }
    return gathered(counted)


def gathered(value: Any) -> list[Any]:
    """Every rank's value, by rank. Collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class LiveTensors(TorchDispatchMode):
    """Bytes of all storages that are alive, those that exist for a moment included, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, Any] = {}

    def add(self, tensor: Tensor) -> None:
        if tensor.is_sparse:  # the empty one that stands for the head's gradient
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self.now += size
            self._known[key] = weakref.ref(storage, lambda _: self._remove(key, size))

    def _remove(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        self.most = max(self.most, self.now)
        return result


def live_peak(topology: Topology, platform: Platform, case: StepCase, parallel: ParallelConfig) -> int:
    """Most bytes of this rank's tensors at any moment of a training step; what a kernel takes inside is not seen."""
    step = _step(topology, platform, case, parallel)
    step.gradients()
    step.update()
    live = LiveTensors()
    parameters = [parameter for model in step.models for parameter in model.parameters()]
    for tensor in [*parameters, *(p.main_grad for p in parameters), *_optimizer_tensors(step.optimizer)]:
        live.add(tensor)
    with live:
        step.gradients()
        step.update()
    return live.most


def measured_peak(topology: Topology, platform: Platform, case: StepCase, parallel: ParallelConfig) -> int:
    """Most bytes of tensors on this rank's GPU at any moment of a training step, after one that compiled and warmed up.

    Torch's own count (``max_memory_allocated``): without the CUDA context, NCCL and the allocator's losses, which the
    plan adds as ``machine.reserved_gb`` and ``machine.fragmentation``.
    """
    if not platform.is_cuda:
        raise ValueError("measured_peak needs a GPU: on the CPU torch does not count")
    step = _step(topology, platform, case, parallel)
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step.gradients()
        step.update()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _distinct_bytes(tensors: list[Tensor]) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _optimizer_bytes(optimizer: Any, weights: set[int]) -> int:
    """Moments and main weights, but for those that are the model's own."""
    return _distinct_bytes([x for x in _optimizer_tensors(optimizer) if x.untyped_storage()._cdata not in weights])


def _optimizer_tensors(optimizer: Any) -> list[Tensor]:
    tensors: list[Tensor] = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            tensors += group["params"]
        tensors += [x for state in part.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    return tensors
