"""Block-masked attention: one Megatron core attention, several backends that give the same values.

``dense`` is torch's scaled_dot_product_attention under the whole mask. ``native`` and ``chunked`` (CPU) compute only
what the mask keeps, by a kernel of the project's own or by torch's. ``flex`` (CUDA) is flex_attention. Without a noisy
half the mask is causal, and torch has a kernel for it. A layout with a table (documents, some of the blocks, two
copies) has a mask of its own per sequence; so has a context-parallel rank's shard, whose rows attend to clean tokens of
all ranks.

Dimensions: B sequences, S rows of the model's input (L, or 2L with a noisy half), L clean tokens, N noisy rows, H query
heads, K key-value heads, G = H / K query heads per key-value head, D head dimension. There are N + L keys: the rows,
but in a shard, where clean rows are fewer.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from nld_train.config.schema import AttentionBackend
from nld_train.errors import ConfigError, Problem
from nld_train.model.chunked_attention import chunked_attention
from nld_train.model.context_parallel import gather_keys
from nld_train.model.native_attention import DTYPES as NATIVE_DTYPES
from nld_train.model.native_attention import missing_for_native, native_attention
from nld_train.model.rope import RotaryEmbedding
from nld_train.objective.masks import dense_block_mask, flex_block_mask
from nld_train.objective.sequence import SequenceLayout


def resolve_backend(backend: AttentionBackend, device: torch.device) -> AttentionBackend:
    """What ``auto`` means on this device; the other backends are checked against it.

    Raises:
        ConfigError: the backend does not run on this device.
    """
    on_cuda = device.type == "cuda"
    if backend is AttentionBackend.auto:
        if on_cuda:
            return AttentionBackend.flex
        return AttentionBackend.native if missing_for_native() is None else AttentionBackend.chunked
    if backend in (AttentionBackend.native, AttentionBackend.chunked) and on_cuda:
        reason = "is written for the CPU and the model is on a GPU"
    elif backend is AttentionBackend.native and (missing := missing_for_native()) is not None:
        reason = f"cannot be compiled here: {missing}"
    elif backend is AttentionBackend.flex and not on_cuda:
        reason = f"has no backward pass on {device.type}"
    else:
        return backend
    raise ConfigError([Problem("model.attention_backend", f"{backend.value} {reason}", "use auto or dense")])


def joint_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SequenceLayout,
    backend: AttentionBackend,
    softmax_scale: float | None = None,
) -> Tensor:
    """Attention under the layout's mask by the given (resolved) backend.

    Args:
        query: [B, H, S, D], any strides with a contiguous last dimension.
        key: [B, K, N + L, D].
        value: [B, K, N + L, D].
        layout: what the S rows are.
        backend: not ``auto``.
        softmax_scale: 1 / sqrt(D) by default.

    Returns:
        [B, H, S, D]
    """
    if backend is AttentionBackend.dense:
        return dense_attention(query, key, value, layout, softmax_scale)
    if backend is AttentionBackend.native:
        # Nothing but tests computes in float64.
        of_dtype = native_attention if query.dtype in NATIVE_DTYPES else chunked_attention
        return of_dtype(query, key, value, layout, softmax_scale)
    # In fp32 torch has no such kernel on a GPU for fewer key heads than query heads: it would write out all scores.
    is_fast = query.shape[1] == key.shape[1] or (backend is AttentionBackend.flex and query.dtype is not torch.float32)
    if layout.is_causal and is_fast:
        return causal_attention(query, key, value, softmax_scale)
    if backend is AttentionBackend.chunked:
        return chunked_attention(query, key, value, layout, softmax_scale)
    if backend is AttentionBackend.flex:
        return flex_attention(query, key, value, layout, softmax_scale)
    raise ValueError(f"attention backend {backend} is not resolved: see resolve_backend")


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout, softmax_scale: float | None = None
) -> Tensor:
    """[B, H, S, D]: every score of a row and a key is computed, then masked. Runs anywhere."""
    mask = dense_block_mask(layout, query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=softmax_scale, enable_gqa=True)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float | None = None) -> Tensor:
    """[B, H, S, D]: plain causal attention, for a layout without a noisy half; keys and values are not repeated."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=softmax_scale, enable_gqa=True)


def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout, softmax_scale: float | None = None
) -> Tensor:
    """[B, H, S, D]: compiled flex_attention on CUDA, eager elsewhere (which torch cannot run backward)."""
    # The number of noisy rows differs from one table to the next; everything else is one shape per stage.
    kernel = _compiled_flex_attention(dynamic=layout.table is not None) if query.is_cuda else flex.flex_attention
    block_mask = flex_block_mask(layout, query.device)
    return kernel(query, key, value, block_mask=block_mask, scale=softmax_scale, enable_gqa=True)


@cache
def _compiled_flex_attention(*, dynamic: bool) -> Any:
    # fullgraph: where the compiler gives up torch would go on without it, and write out all scores.
    return torch.compile(flex.flex_attention, dynamic=dynamic, fullgraph=True)


class JointAttention(MegatronModule):
    """Core attention of a Megatron layer: rotary embedding, query scaling, block-masked attention. No parameters.

    The layout of the rows arrives as ``attention_bias``, which Megatron hands down by closure when it recomputes
    activations (see docs/architecture.md). Heads are those of this tensor-parallel rank.

    Args:
        config, layer_number, attn_mask_type, attention_type, attention_dropout, softmax_scale, cp_comm_type,
            pg_collection: as Megatron passes them to any core attention. Dropout must be 0; the mask type is unused,
            because the layout says what the mask is.
        rotary: shared by all layers.
        backend: may be ``auto``; resolved by the device of the queries.
        causal: (query [S, B, H, D], key and value [S, B, K, D]) -> [S, B, H * D], a kernel of another library in place
            of the backend's where the mask is the plain causal one; None: the backend's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        rotary: RotaryEmbedding,
        backend: AttentionBackend,
        causal: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout != 0.0:
            raise ValueError(f"attention_dropout {dropout}: JointAttention has no dropout, set it to 0.0")
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale
        self.rotary = rotary
        self.backend = backend
        self.causal = causal

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        /,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: SequenceLayout | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attention of one layer.

        Args:
            query: [S, B, H, D], not yet rotated.
            key: [S, B, K, D], not yet rotated.
            value: [S, B, K, D].
            attention_mask: unused, the layout says what the mask is.
            attn_mask_type: unused.
            attention_bias: the :class:`SequenceLayout` of the S rows; of a shard, keys and values of the other
                context-parallel ranks are gathered (collective).
            packed_seq_params: not supported, None.

        Returns:
            [S, B, H * D]

        Raises:
            TypeError: no layout, or packed sequences.
        """
        layout = attention_bias
        if not isinstance(layout, SequenceLayout):
            raise TypeError(
                f"JointAttention needs the SequenceLayout of its rows as attention_bias, got {type(layout).__name__}: "
                "call the decoder with attention_bias=batch.layout"
            )
        if packed_seq_params is not None:
            raise TypeError("JointAttention does not take packed_seq_params: sequences have one length")
        backend = resolve_backend(self.backend, query.device)
        query, key = self.rotary.apply(query, key, layout)
        if self.causal is not None and layout.is_causal:
            return self.causal(query, key, value)
        query = query.permute(1, 2, 0, 3)
        if layout.shard.size == 1:
            key, value = (x.permute(1, 2, 0, 3) for x in (key, value))
            out = joint_attention(query, key, value, layout, backend, self.softmax_scale)
        else:
            by_key_head = query.unflatten(1, (key.shape[2], -1))
            group = parallel_state.get_context_parallel_group()
            parts = [
                joint_attention(by_key_head[:, heads].flatten(1, 2), keys, values, layout, backend, self.softmax_scale)
                for heads, keys, values in gather_keys(key, value, layout, group)
            ]
            out = torch.cat(parts, dim=1)
        return out.permute(2, 0, 1, 3).flatten(2)
