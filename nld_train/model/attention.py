"""Block-masked attention: one Megatron core attention, several backends that give the same values.

``dense`` is torch's scaled_dot_product_attention under the whole mask. ``chunked`` (CPU) computes only what the mask
keeps. ``flex`` (CUDA) is flex_attention. Without a noisy half the mask is causal, and both fast backends use torch's
causal kernel.

Dimensions: B sequences, S rows of the model's input (L, or 2L with a noisy half), L clean tokens, H query heads, K
key-value heads, G = H / K query heads per key-value head, D head dimension.
"""

import math
from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import flex_attention as flex

from nld_train.config.schema import AttentionBackend
from nld_train.errors import ConfigError, Problem
from nld_train.model.rope import RotaryEmbedding
from nld_train.objective.masks import dense_block_mask, flex_block_mask
from nld_train.objective.sequence import SequenceLayout

CHUNK_ROWS = 128
"""Rows of each half that the chunked backend takes at a time: 256 and 1024 were slower."""

_cpu_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def resolve_backend(backend: AttentionBackend, device: torch.device) -> AttentionBackend:
    """What ``auto`` means on this device; the other backends are checked against it.

    Raises:
        ConfigError: the backend does not run on this device.
    """
    on_cuda = device.type == "cuda"
    if backend is AttentionBackend.auto:
        return AttentionBackend.flex if on_cuda else AttentionBackend.chunked
    if backend is AttentionBackend.chunked and on_cuda:
        reason = "is written for the CPU and the model is on a GPU"
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
        key: [B, K, S, D].
        value: [B, K, S, D].
        layout: what the S rows are.
        backend: not ``auto``.
        softmax_scale: 1 / sqrt(D) by default.

    Returns:
        [B, H, S, D]
    """
    if backend is AttentionBackend.dense:
        return dense_attention(query, key, value, layout, softmax_scale)
    if not layout.has_noisy_half:
        return causal_attention(query, key, value, softmax_scale)
    if backend is AttentionBackend.chunked:
        return chunked_attention(query, key, value, layout, softmax_scale)
    if backend is AttentionBackend.flex:
        return flex_attention(query, key, value, layout, softmax_scale)
    raise ValueError(f"attention backend {backend} is not resolved: see resolve_backend")


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout, softmax_scale: float | None = None
) -> Tensor:
    """[B, H, S, D]: every one of the S x S scores is computed, then masked. Runs anywhere."""
    mask = dense_block_mask(layout, query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=softmax_scale, enable_gqa=True)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float | None = None) -> Tensor:
    """[B, H, S, D]: plain causal attention, for a layout without a noisy half; keys and values are not repeated."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=softmax_scale, enable_gqa=True)


def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout, softmax_scale: float | None = None
) -> Tensor:
    """[B, H, S, D]: compiled flex_attention on CUDA, eager elsewhere (which torch cannot run backward)."""
    kernel = _compiled_flex_attention() if query.is_cuda else flex.flex_attention
    block_mask = flex_block_mask(layout, query.device)
    return kernel(query, key, value, block_mask=block_mask, scale=softmax_scale, enable_gqa=True)


@cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex.flex_attention, dynamic=False)


def chunked_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout, softmax_scale: float | None = None
) -> Tensor:
    """[B, H, S, D]: only what the mask keeps, on the CPU, for a layout with a noisy half.

    Rows are taken in chunks of whole blocks, rows [start, stop) of both halves at once. They share one unmasked
    attention to the clean prefix [0, start); what is left is the square of the chunk's own noisy and clean keys, under
    the small block mask. The two partial results are merged by their log-sum-exp. The G query heads of a key-value
    head are folded into rows, so keys and values are never repeated. Exact, in any of the kernel's dtypes.
    """
    if not layout.has_noisy_half:
        raise ValueError("chunked_attention is for a layout with a noisy half: use causal_attention")
    if query.device.type != "cpu":
        raise ValueError(f"chunked_attention runs on the CPU, the query is on {query.device}")
    scale = 1.0 / math.sqrt(query.shape[-1]) if softmax_scale is None else softmax_scale
    return _ChunkedAttention.apply(query, key, value, layout, scale)


class _ChunkedAttention(torch.autograd.Function):
    """The backward pass gives the kernel of each part the *merged* output and log-sum-exp: its probabilities are then
    those of the whole row, and the partial gradients simply add up."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout, scale: float) -> Tensor:
        num_sequences, num_heads, num_rows, dim = query.shape
        num_kv_heads, length = key.shape[1], layout.clean_length
        group = num_heads // num_kv_heads
        clean_key, clean_value = key[:, :, length:].contiguous(), value[:, :, length:].contiguous()
        # In the memory order of Megatron's [S, B, H * D], which the output projection saves, too: one copy is kept.
        out = query.new_empty(num_rows, num_sequences, num_heads, dim).permute(1, 2, 0, 3)
        log_sum_exp = query.new_empty(out.shape[:-1], dtype=_accumulation_dtype(query))
        for start, stop in _chunks(layout):
            rows = _gather(query, start, stop, num_kv_heads)
            own_key, own_value = (_gather(x, start, stop, num_kv_heads) for x in (key, value))
            mask = _diagonal_mask(stop - start, layout.block_size, group, query.dtype)
            part, part_lse = _cpu_flash(rows, own_key, own_value, attn_mask=mask, scale=scale)
            if start > 0:
                prefix = _cpu_flash(rows, clean_key[:, :, :start], clean_value[:, :, :start], scale=scale)
                part, part_lse = _merge(part, part_lse, *prefix)
            _chunk_view(out, start, stop, num_kv_heads).copy_(_as_halves(part, group))
            _chunk_view(log_sum_exp, start, stop, num_kv_heads).copy_(_as_halves(part_lse, group))
        ctx.save_for_backward(query, key, value, out, log_sum_exp)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, log_sum_exp = ctx.saved_tensors
        layout, scale = ctx.layout, ctx.scale
        num_kv_heads, length = key.shape[1], layout.clean_length
        group = query.shape[1] // num_kv_heads
        clean_key, clean_value = key[:, :, length:].contiguous(), value[:, :, length:].contiguous()
        grad_query = torch.empty_like(query)
        # A clean key collects a term from every later chunk: bf16 would lose the small ones.
        grad_key = torch.zeros_like(key, dtype=_accumulation_dtype(query))
        grad_value = torch.zeros_like(value, dtype=_accumulation_dtype(query))
        for start, stop in _chunks(layout):
            rows = _gather(query, start, stop, num_kv_heads)
            own_key, own_value = (_gather(x, start, stop, num_kv_heads) for x in (key, value))
            of_rows = [_gather(x, start, stop, num_kv_heads) for x in (grad_out, out)]
            lse = _gather(log_sum_exp, start, stop, num_kv_heads)
            mask = _diagonal_mask(stop - start, layout.block_size, group, query.dtype)
            grad_rows, grad_own_key, grad_own_value = _cpu_flash_backward(
                of_rows[0], rows, own_key, own_value, of_rows[1], lse, 0.0, False, attn_mask=mask, scale=scale
            )
            _chunk_view(grad_key, start, stop, num_kv_heads).add_(_as_halves(grad_own_key, 1))
            _chunk_view(grad_value, start, stop, num_kv_heads).add_(_as_halves(grad_own_value, 1))
            if start > 0:
                prefix_key, prefix_value = clean_key[:, :, :start], clean_value[:, :, :start]
                more_rows, grad_prefix_key, grad_prefix_value = _cpu_flash_backward(
                    of_rows[0], rows, prefix_key, prefix_value, of_rows[1], lse, 0.0, False, scale=scale
                )
                grad_rows = grad_rows + more_rows
                grad_key[:, :, length : length + start] += grad_prefix_key
                grad_value[:, :, length : length + start] += grad_prefix_value
            _chunk_view(grad_query, start, stop, num_kv_heads).copy_(_as_halves(grad_rows, group))
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def _chunks(layout: SequenceLayout) -> Iterator[tuple[int, int]]:
    """Ranges of rows of a half, whole blocks each, of at most CHUNK_ROWS (or one block); the last may be shorter."""
    step = max(CHUNK_ROWS // layout.block_size, 1) * layout.block_size
    for start in range(0, layout.clean_length, step):
        yield start, min(start + step, layout.clean_length)


def _chunk_view(x: Tensor, start: int, stop: int, num_kv_heads: int) -> Tensor:
    """View of rows [start, stop) of both halves: x [B, heads, 2L, ...] -> [B, K, heads / K, 2, stop - start, ...]."""
    return x.unflatten(2, (2, -1)).unflatten(1, (num_kv_heads, -1))[:, :, :, :, start:stop]


def _gather(x: Tensor, start: int, stop: int, num_kv_heads: int) -> Tensor:
    """Copy of those rows, with the query heads of a key-value head folded in: [B, K, heads / K * 2 * rows, ...]."""
    return _chunk_view(x, start, stop, num_kv_heads).flatten(2, 4).contiguous()


def _as_halves(x: Tensor, group: int) -> Tensor:
    """Inverse of the folding: [B, K, group * 2 * rows, ...] -> [B, K, group, 2, rows, ...]."""
    return x.unflatten(2, (group, 2, -1))


@lru_cache(maxsize=16)
def _diagonal_mask(num_rows: int, block_size: int, group: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [group * 2 * num_rows, 2 * num_rows] of a chunk against its own keys: 0 or -inf."""
    allowed = dense_block_mask(SequenceLayout(num_rows, block_size, has_noisy_half=True), torch.device("cpu"))
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -math.inf).repeat(group, 1)


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two sets of keys from the attention over each; weights stay in the lse's dtype."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = torch.exp(lse_a - lse)[..., None], torch.exp(lse_b - lse)[..., None]
    return (out_a * weight_a + out_b * weight_b).to(out_a.dtype), lse


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout != 0.0:
            raise ValueError(f"attention_dropout {dropout}: JointAttention has no dropout, set it to 0.0")
        if config.context_parallel_size != 1:
            raise ConfigError(
                [
                    Problem(
                        "parallel.context_parallel_size",
                        f"{config.context_parallel_size}: the attention does not split a sequence yet",
                        "set it to 1",
                    )
                ]
            )
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale
        self.rotary = rotary
        self.backend = backend

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
            attention_bias: the :class:`SequenceLayout` of the S rows.
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
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = joint_attention(query, key, value, layout, backend, self.softmax_scale)
        return out.permute(2, 0, 1, 3).flatten(2)
