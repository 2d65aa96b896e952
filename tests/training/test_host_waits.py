"""Nothing between the first forward and the last backward pass of a step asks a tensor for its values.

On a GPU each such question would make the host wait for the device. Here the same code runs on the CPU, where it can be
listened to; tests/gpu lets CUDA itself refuse.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nld_train.config.schema import AttentionBackend, ParallelConfig
from nld_train.model.build import build_model
from nld_train.platform.device import Platform
from nld_train.platform.topology import Topology
from nld_train.testing.ranks import RankPool
from nld_train.testing.steps import StepCase, loader_batches, tiny_model, tiny_recipe
from nld_train.training.run import wrap_data_parallel
from nld_train.training.step import LossWeights, _loss_function, lay_out, micro_batches, pinned

_QUESTIONS = {
    Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__bool__, Tensor.__int__, Tensor.__float__,
    Tensor.__index__, Tensor.nonzero, torch.nonzero, torch.equal, torch.allclose, torch.unique, torch.masked_select,
}  # fmt: skip
_WAITING_KERNELS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "repeat_interleave"}


class _Calls(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _QUESTIONS:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


class _Kernels(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        # A mask as an index is looked through for its places.
        if name in _WAITING_KERNELS or any(isinstance(i, Tensor) and i.dtype is torch.bool for i in indices):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def questions_of_a_step(topology: Topology, platform: Platform, case: StepCase) -> list[str]:
    model = build_model(case.model, ParallelConfig(), dtype=case.dtype, device=platform.device, seed=1)
    wrapped = wrap_data_parallel(model, use_distributed_optimizer=False)
    weights = LossWeights(diffusion=case.diffusion_loss_weight)
    found: list[str] = []
    for repetition in range(2):  # tables are built in the first
        wrapped.zero_grad_buffer()
        laid_out = list(
            micro_batches(
                loader_batches(case, topology),
                objective=case.objective,
                weights=weights,
                device=platform.device,
                row_multiple=1,
            )
        )
        del found[:]
        with _Calls(found), _Kernels(found):
            for batch, selected, positions in laid_out:
                output = wrapped(batch.tokens, batch.layout, selected)
                loss, _, _ = _loss_function(batch, selected, positions, case.objective.normalization.value, output)
                loss.backward()
        assert repetition or model.output_layer.weight.main_grad.count_nonzero() > 0
    return found


CASES = {
    "ar": (0.0, {}),
    "joint": (0.3, {}),
    "some of the blocks": (0.3, {"noisy_fraction": 0.5}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_host_waits_for_nothing(one_rank: RankPool, name: str) -> None:
    """But for the head's look at the loss's gradient, which on a GPU is an assertion of the device. (In a backward pass
    kernels are heard, calls are not.)"""
    alpha, objective = CASES[name]
    case = StepCase(
        samples=torch.randint(4, 96, (4, 33), generator=torch.Generator().manual_seed(0)),
        # As flex does and the CPU's chunks do not, the dense mask is made on the device.
        model=tiny_model(attention_backend=AttentionBackend.dense),
        objective=tiny_recipe(**objective),
        diffusion_loss_weight=alpha,
        micro_batch_size=2,
    )
    num_micro_batches = 2
    found = one_rank.run(questions_of_a_step, case)
    assert found == ["_local_scalar_dense"] * num_micro_batches


def test_a_micro_batch_travels_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of it: one that is not would make the host wait."""
    moved: list[Tensor] = []

    def pin_memory(tensor: Tensor) -> Tensor:
        moved.append(tensor.clone())
        return moved[-1]

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    case = StepCase(
        samples=torch.randint(4, 96, (2, 33)), objective=tiny_recipe(noisy_fraction=0.5), micro_batch_size=2
    )
    (sample,) = loader_batches(case, _OneRank())  # type: ignore[arg-type]
    batch = lay_out(sample, 4)
    copy = pinned(batch)
    assert copy.layout.table is not None
    tensors = [
        *(getattr(copy, name) for name in type(copy).__dataclass_fields__ if name != "layout"),
        *(getattr(copy.layout.table, name) for name in ("position_ids", "blocks", "first_keys", "end_keys")),
    ]
    assert len(tensors) == len(moved) == 12
    assert all(any(tensor is other for other in moved) for tensor in tensors)
    assert torch.equal(copy.tokens, batch.tokens)
    assert copy.layout.clean_length == batch.layout.clean_length


class _OneRank:
    data_parallel_size, data_parallel_rank = 1, 0
