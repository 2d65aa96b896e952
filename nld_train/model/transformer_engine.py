"""A decoder layer of NVIDIA Transformer Engine's parts; imported only where ``model.layer_spec`` asks for them.

Norm and linear layer stay two modules, so parameters, checkpoints and exports are those of the local spec, and a run
may go on with the other one. Checkpoints hold nothing else of a layer: FP8 scales come from the values at hand
(:data:`FP8_RECIPE`), so there is no history that a resumed run would need.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformer_engine.pytorch as te
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TERowParallelLinear,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nld_train.model.layer_spec import LocalModules

FP8_RECIPE = "tensorwise"
"""One scale per tensor, from its own largest value (current scaling); runs on Hopper, Ada and Blackwell.

Delayed scaling takes scales from earlier steps: state, which a checkpoint would have to hold at every layout. Blocks of
128 (``blockwise``) are native to Hopper alone and want rows in multiples of 128."""


class _OfLocalSpec:
    """Before Transformer Engine's linear layer: what a state dict holds is what Megatron's own has."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Its matrix product adds to main_grad itself. Not by Megatron's switch, which means Apex's kernel as well.
        self.fuse_wgrad_accumulation = True

    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, state: Any) -> None:
        """What another spec, or another version, has saved is not needed."""


class ColumnParallelLinear(_OfLocalSpec, TEColumnParallelLinear):  # type: ignore[misc]  # its base is not typed
    """[rows, in] -> [rows, out / tp]"""


class RowParallelLinear(_OfLocalSpec, TERowParallelLinear):  # type: ignore[misc]
    """[rows, in / tp] -> [rows, out]"""


class RMSNorm(te.RMSNorm):  # type: ignore[misc]
    """One kernel; the product with the weight is rounded once, that of the local spec's norm twice."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(
            hidden_size,
            eps=eps,
            sequence_parallel=config.sequence_parallel,
            dtype=config.params_dtype,
            device=torch.cuda.current_device(),
        )

    # The module's own: no entry in a state dict.
    get_extra_state = torch.nn.Module.get_extra_state
    set_extra_state = torch.nn.Module.set_extra_state


class TransformerEngineModules(LocalModules):
    """The same parts as the local spec, by other kernels."""

    def column_parallel_linear(self) -> type:
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return RowParallelLinear

    def layer_norm(self, rms_norm: bool = True, for_qk: bool = False, has_residual: bool = False) -> type:
        return RMSNorm


def causal_attention(config: TransformerConfig) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """FlashAttention (or cuDNN's kernel, as Transformer Engine chooses) for rows under the plain causal mask, shared by
    all layers: query [S, B, H, D], key and value [S, B, K, D] -> [S, B, H * D].

    None with context parallelism: a rank's rows are never those of a plain causal mask.
    """
    if config.context_parallel_size > 1:
        return None
    kernel = TEDotProductAttention(config, 1, AttnMaskType.causal, "self")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return kernel(query, key, value, None, AttnMaskType.causal)

    return attend
