"""What a decoder layer is made of: Megatron's own layer, our norm, our SwiGLU and our attention core.

After the attention of the last layer only the rows that enter the loss go on.

Dimensions: B sequences, S rows of the model's input, R of the S * B rows that enter the loss, H hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from nld_train.model.attention import JointAttention
from nld_train.model.head import gather_rows
from nld_train.model.linear import ColumnParallelLinear, RowParallelLinear
from nld_train.model.pointwise import GatedMLP, RMSNorm
from nld_train.objective.sequence import SequenceLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderRows:
    """What the rows of one micro-batch are; travels down the decoder as ``attention_bias``.

    ``layout``: of the S rows. ``selected`` int64 [R]: index into the flattened [S, B], the rows that leave the last
    layer; None: all do. With sequence parallelism R is a multiple of the tensor-parallel size.
    """

    layout: SequenceLayout
    selected: Tensor | None


class DecoderAttention(JointAttention):
    """The attention core of a decoder layer; that of the last layer returns the selected rows alone."""

    def forward(self, *args: Any, attention_bias: Any = None, **kwargs: Any) -> Tensor:
        """As :meth:`JointAttention.forward`, with :class:`DecoderRows` as ``attention_bias``.

        Returns:
            [S, B, heads * head dimension]; in the last layer [R, 1, heads * head dimension] if rows are selected.
        """
        if not isinstance(attention_bias, DecoderRows):
            raise TypeError(f"the decoder needs DecoderRows as attention_bias, got {type(attention_bias).__name__}")
        out = super().forward(*args, attention_bias=attention_bias.layout, **kwargs)
        if attention_bias.selected is None or self.layer_number != self.config.num_layers:
            return out
        return gather_rows(out, attention_bias.selected)


class DecoderSelfAttention(SelfAttention):
    """Megatron's, whose values are copies: as views of the qkv product they would keep all of it for the backward pass.

    The queries in it are copied in any case, and the rotation copies the keys; but an attention that is recomputed
    keeps them as they come.
    """

    def get_query_key_value_tensors(self, *args: Any, split_qkv: bool = True, **kwargs: Any) -> Any:
        """As Megatron's."""
        tensors = super().get_query_key_value_tensors(*args, split_qkv=split_qkv, **kwargs)
        if not split_qkv:
            return tensors
        query, key, value, *rest = tensors
        if self.checkpoint_core_attention:
            key = key.contiguous()
        return query, key, value.contiguous(), *rest


class Residual:
    """Megatron's residual connection, to which only the selected rows of the residual go."""

    def __init__(self) -> None:
        self.select: Callable[[Tensor], Tensor] | None = None

    def __call__(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        add = get_bias_dropout_add(training, fused)
        select = self.select
        if select is None:
            return add
        return lambda branch, residual, dropout: add(branch, select(residual), dropout)


class DecoderLayer(TransformerLayer):
    """Megatron's layer; the last one goes on with the selected rows alone after its attention."""

    def forward(self, *args: Any, attention_bias: DecoderRows, **kwargs: Any) -> Any:
        """As Megatron's. The rows are those of this very call, also when Megatron calls again to recompute."""
        if self.layer_number != self.config.num_layers or attention_bias.selected is None:
            return super().forward(*args, attention_bias=attention_bias, **kwargs)
        self.self_attn_bda.select = partial(self._selected_of_residual, rows=attention_bias.selected)
        try:
            return super().forward(*args, attention_bias=attention_bias, **kwargs)
        finally:
            self.self_attn_bda.select = None

    def _selected_of_residual(self, residual: Tensor, rows: Tensor) -> Tensor:
        """[S, B, H] -> [R, 1, H]; with sequence parallelism this rank's share of both.

        A rank's equal share of the selected rows is not among its share of all rows: nearly all clean rows are
        selected and few of the noisy ones. So the residual is gathered once; in return the second half of the layer
        and the head exchange the selected rows alone.
        """
        if not self.config.sequence_parallel:
            return gather_rows(residual, rows)
        group = parallel_state.get_tensor_model_parallel_group()
        whole = gather_from_sequence_parallel_region(residual, group=group)
        return gather_rows(whole, rows.chunk(group.size())[group.rank()])


class LocalModules(LocalSpecProvider):
    """Megatron's linear layers (with our products on the CPU), our norm and our MLP, each alone, so that every
    parameter has a name of its own."""

    def column_parallel_linear(self) -> type:
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return RowParallelLinear

    def layer_norm(self, rms_norm: bool = True, for_qk: bool = False, has_residual: bool = False) -> type:
        return RMSNorm

    def mlp(self) -> Any:
        """Megatron's own entry, whose form differs between releases, with our module."""
        entry: Any = get_mlp_module_spec_for_backend(self)
        if isinstance(entry, ModuleSpec):
            return ModuleSpec(module=GatedMLP, submodules=entry.submodules)
        return partial(GatedMLP.as_mlp_submodule, **entry.keywords)


def decoder_layer_spec(core_attention: ModuleSpec, modules: LocalModules) -> ModuleSpec:
    """One pre-norm layer: RMSNorm, grouped-query attention, RMSNorm, SwiGLU.

    Args:
        core_attention: the module between the qkv and the output projection, a :class:`DecoderAttention`.
        modules: whose linear layers, norms and MLP.
    """
    return ModuleSpec(
        module=DecoderLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=modules.layer_norm(),
            self_attention=ModuleSpec(
                module=DecoderSelfAttention,
                # The block mask is ours; Megatron must not build one of its own.
                params={"attn_mask_type": AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=modules.column_parallel_linear(),
                    core_attention=core_attention,
                    linear_proj=modules.row_parallel_linear(),
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=Residual,
            pre_mlp_layernorm=modules.layer_norm(),
            mlp=modules.mlp(),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def decoder_spec(layer_spec: ModuleSpec, num_layers_here: int, modules: LocalModules) -> TransformerBlockSubmodules:
    """All layers of one pipeline stage and the final norm."""
    return TransformerBlockSubmodules(layer_specs=[layer_spec] * num_layers_here, layer_norm=modules.layer_norm())
