"""What a decoder layer is made of: Megatron's own layer, our norm and our attention core."""

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm, as in transformers' Ministral3: statistics at least in fp32, weight applied after.

    Megatron's torch norm refuses sequence parallelism; this one marks its weight so that Megatron sums its gradient
    over tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        values = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * values.to(hidden.dtype)


def decoder_layer_spec(core_attention: ModuleSpec) -> ModuleSpec:
    """One pre-norm layer: RMSNorm, grouped-query attention, RMSNorm, SwiGLU.

    Args:
        core_attention: the module between the qkv and the output projection.
    """
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                # The block mask is ours; Megatron must not build one of its own.
                params={"attn_mask_type": AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=core_attention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            # The form of this entry differs between Megatron releases; Megatron's own helper gives the right one.
            mlp=get_mlp_module_spec_for_backend(LocalSpecProvider()),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def decoder_spec(layer_spec: ModuleSpec, num_layers_here: int) -> TransformerBlockSubmodules:
    """All layers of one pipeline stage and the final norm."""
    return TransformerBlockSubmodules(layer_specs=[layer_spec] * num_layers_here, layer_norm=RMSNorm)
