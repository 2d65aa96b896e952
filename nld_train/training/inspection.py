"""Every parameter of a step: its weights, its gradient before clipping, and what the optimizer changed.

The distributed optimizer gives each rank a shard of each parameter, in fp32; sums of the shards are added up over all
ranks, so the numbers are of whole parameters at any layout.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from torch import Tensor

from nld_train.model.build import global_parameter_name

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


@dataclass(slots=True)
class ParameterSums:
    """Of one parameter, or of several: numbers of elements, sums of squares, and what is not finite in the gradient."""

    num_elements: int = 0
    weight: float = 0.0
    gradient: float = 0.0
    update: float = 0.0
    largest_gradient: float = 0.0
    num_not_finite: int = 0

    def add(self, other: "ParameterSums") -> None:
        self.num_elements += other.num_elements
        self.weight += other.weight
        self.gradient += other.gradient
        self.update += other.update
        self.largest_gradient = max(self.largest_gradient, other.largest_gradient)
        self.num_not_finite += other.num_not_finite

    @classmethod
    def heads(cls) -> tuple[str, ...]:
        return ("elements", "weight norm", "gradient norm", "largest |gradient|", "not finite", "update norm")

    def columns(self) -> tuple[str, ...]:
        """Values under :meth:`heads`; norms are of the finite part where something is not finite."""
        norms = [math.sqrt(value) for value in (self.weight, self.gradient, self.update)]
        return (
            str(self.num_elements),
            f"{norms[0]:.9g}",
            f"{norms[1]:.9g}",
            f"{self.largest_gradient:.9g}",
            str(self.num_not_finite),
            f"{norms[2]:.9g}",
        )


class StepInspection:
    """Looks at the optimizer's shards right before and right after an update. Every method is collective.

    ``parameters``: what was found, of all parameters of the model by their names in it, the same on every rank.

    Args:
        chunks: this rank's model chunks.
        optimizer: Megatron's distributed optimizer.
    """

    parameters: dict[str, ParameterSums]

    def __init__(self, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
        self._optimizer = optimizer
        self._names = {
            parameter: global_parameter_name(chunk.module, name)
            for chunk in chunks
            for name, parameter in chunk.module.named_parameters()
        }
        self._before: dict[str, Tensor] = {}
        self._sums: dict[str, ParameterSums] = {}

    def _shards(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's share of the parameters (without what is a replica of another tensor-parallel rank's)."""
        inner: Any = self._optimizer
        for part in getattr(inner, "chained_optimizers", [inner]):
            for models, shards in (
                (part.model_float16_groups, part.shard_fp32_from_float16_groups),
                (part.model_fp32_groups, part.shard_fp32_groups),
            ):
                for model_group, shard_group in zip(models, shards, strict=True):
                    for parameter, shard in zip(model_group, shard_group, strict=True):
                        if param_is_not_tensor_parallel_duplicate(parameter):
                            yield self._names[parameter], shard

    @torch.no_grad()
    def before_update(self) -> None:
        """Gradients are complete and not clipped yet."""
        self._optimizer.prepare_grads()
        for name, shard in self._shards():
            self._before[name] = shard.clone()
            gradient = shard.grad if shard.grad is not None else torch.zeros_like(shard)
            is_finite = gradient.isfinite()
            finite = torch.where(is_finite, gradient, 0.0).to(torch.float64)
            self._sums[name] = ParameterSums(
                num_elements=shard.numel(),
                weight=shard.to(torch.float64).square().sum().item(),
                gradient=finite.square().sum().item(),
                largest_gradient=finite.abs().max().item() if shard.numel() else 0.0,
                num_not_finite=int((~is_finite).sum().item()),
            )

    @torch.no_grad()
    def after_update(self) -> None:
        """:attr:`parameters` are complete."""
        for name, shard in self._shards():
            self._sums[name].update = (shard - self._before[name]).to(torch.float64).square().sum().item()
        self._before.clear()
        of_ranks: list[dict[str, ParameterSums]] = [{}] * dist.get_world_size()
        dist.all_gather_object(of_ranks, self._sums)
        total: dict[str, ParameterSums] = {}
        for sums in of_ranks:
            for name, part in sums.items():
                total.setdefault(name, ParameterSums()).add(part)
        self.parameters = dict(sorted(total.items(), key=lambda item: _place(item[0])))


def _place(name: str) -> tuple[int, int, str]:
    """Embedding, layers by number, the rest."""
    layer = _LAYER.match(name)
    return (1, int(layer[1]), name) if layer is not None else (0 if name.startswith("embedding") else 2, 0, name)


def groups_of(parameters: dict[str, ParameterSums]) -> dict[str, ParameterSums]:
    """Added up: each layer, what has weight decay and what has not, and the whole model."""
    groups: dict[str, ParameterSums] = {}
    for name, sums in parameters.items():
        layer = _LAYER.match(name)
        kind = "all norms (no weight decay)" if "norm" in name else "all matrices (weight decay)"
        for group in ([f"layer {layer[1]}"] if layer is not None else []) + [kind, "the model"]:
            groups.setdefault(group, ParameterSums()).add(sums)
    return dict(sorted(groups.items(), key=lambda item: (not item[0].startswith("layer"), _numbers(item[0]))))


def _numbers(text: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]
