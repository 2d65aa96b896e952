"""What a step is measured against: the public recipe's way of computing it, and a training loop in plain PyTorch.

Both compute what :class:`nld_train.model.build.NLDModel` does, from the same weights; the benchmark checks that before
it times anything.

Dimensions: B sequences, S rows of the model's input, H hidden size, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from nld_train.config.schema import AttentionBackend, ModelConfig, ParallelConfig
from nld_train.model.attention import joint_attention
from nld_train.model.build import NLDModel, initialize_weights, transformer_config
from nld_train.model.head import WeightedRows, fused_linear_cross_entropy, gather_rows
from nld_train.model.layer_spec import DecoderAttention, DecoderRows, LocalModules
from nld_train.model.pointwise import compiles_pointwise
from nld_train.model.rope import RotaryEmbedding
from nld_train.objective.masks import cached_by_layout, dense_block_mask
from nld_train.objective.sequence import SequenceLayout


@cached_by_layout
def _additive_mask(layout: SequenceLayout, device: torch.device, dtype: torch.dtype) -> Tensor:
    allowed = dense_block_mask(layout, device)
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, -torch.inf)


@cached_by_layout
def _angles(layout: SequenceLayout, inverse_frequencies: Tensor, device: torch.device) -> Tensor:
    """fp32 [S, B, 1, D], or [S, 1, 1, D] without a table: what Megatron's rotary embedding hands to its layers."""
    if layout.table is None:
        positions = torch.arange(layout.clean_length, device=device).repeat(layout.num_halves)[:, None]
    else:
        positions = layout.table.position_ids.t()
    angles = positions[..., None].float() * inverse_frequencies.to(device)
    return torch.cat([angles, angles], dim=-1)[:, :, None]


class _RepeatedAttention(DecoderAttention):
    """One attention over all S rows under the dense mask, with keys and values repeated for the heads of a group, and
    Megatron's own rotary embedding (unfused), which takes sine and cosine in every layer."""

    def forward(self, *args: Any, attention_bias: Any = None, **_: Any) -> Tensor:
        """[S, B, H] of [S, B, heads, D], all of whose rows go on."""
        query, key, value = args[:3]
        layout = attention_bias.layout
        angles = _angles(layout, self.rotary.inverse_frequencies, query.device)
        factor = self.rotary.attention_factor
        query, key = (apply_rotary_pos_emb(x, angles, self.config, mscale=factor) for x in (query, key))
        query = self.rotary.scale(query, layout)
        group = query.shape[2] // key.shape[2]
        key, value = (x.repeat_interleave(group, dim=2) for x in (key, value))
        is_causal = layout.is_causal
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mask = None if is_causal else _additive_mask(layout, query.device, query.dtype)
        scale = self.softmax_scale
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale)
        return out.permute(2, 0, 1, 3).flatten(2)


class _StockModules(LocalModules):
    """Megatron's own linear layers, norm (torch's) and MLP (halves, silu, product, each written out)."""

    def column_parallel_linear(self) -> type:
        return LocalSpecProvider.column_parallel_linear(self)

    def row_parallel_linear(self) -> type:
        return LocalSpecProvider.row_parallel_linear(self)

    def layer_norm(self, rms_norm: bool = True, for_qk: bool = False, has_residual: bool = False) -> type:
        return LocalSpecProvider.layer_norm(self, rms_norm=True)

    def mlp(self) -> Any:
        return get_mlp_module_spec_for_backend(self)


class PublicRecipeModel(NLDModel):
    """The step of NVIDIA's public Megatron recipe, re-stated: one attention over [noisy | clean] with repeated keys and
    values, all rows through the whole last layer and the head, all logits as [B, S, V], their cross-entropy in fp32,
    and only then the choice of the rows that count.

    Its embedding and rotary embedding are Megatron's own, on the CPU its norm and its MLP, too. On CUDA these two are
    ours, compiled, since there the public recipe has fused ones. The rest of its layers, noise and engine are ours
    everywhere, and its parameters have the same names, so that a ratio shows these differences alone.
    """

    def __init__(self, model: ModelConfig, *, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        config = transformer_config(
            model, ParallelConfig(), dtype, compile_pointwise=compiles_pointwise(model.compile_pointwise, device)
        )
        modules = _StockModules() if device.type == "cpu" else LocalModules()
        super().__init__(config, model, AttentionBackend.dense, vp_stage=None, modules=modules)
        stock = LanguageModelEmbedding(
            config, model.vocab_size, model.max_position_embeddings, position_embedding_type="none"
        )
        self.embedding.word_embeddings = stock.word_embeddings
        for layer in self.decoder.layers:
            core = layer.self_attention.core_attention
            layer.self_attention.core_attention = _RepeatedAttention(
                config,
                core.layer_number,
                AttnMaskType.no_mask,
                "self",
                softmax_scale=core.softmax_scale,
                rotary=core.rotary,
                backend=AttentionBackend.dense,
            )
        self.to(device, dtype)  # torch's norm is in fp32 until then, as Megatron's engine has it
        initialize_weights(self, seed=seed, std=model.initializer_range)

    def forward(self, tokens: Tensor, layout: SequenceLayout, selected: WeightedRows | None = None) -> Any:
        """As :meth:`NLDModel.forward`; who is right is not computed (False everywhere)."""
        hidden = self.embedding(input_ids=tokens, position_ids=None)
        rows = DecoderRows(layout=layout, selected=None)
        hidden = self.decoder(hidden_states=hidden, attention_mask=None, attention_bias=rows)
        logits = self.output_layer(hidden, None)
        if selected is None:
            return logits
        logits = logits.contiguous()
        num_sequences, num_rows = tokens.shape
        targets = tokens.new_zeros(num_rows * num_sequences).index_copy(0, selected.rows, selected.targets)
        targets = targets.view(num_rows, num_sequences).t().flatten()
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
        of_rows = losses.view(num_sequences, num_rows).t().flatten().index_select(0, selected.rows)
        loss = (of_rows * selected.weights.to(of_rows.dtype)).sum()
        return loss, of_rows.detach(), torch.zeros_like(selected.rows, dtype=torch.bool)


class PlainModel(torch.nn.Module):
    """The same model without Megatron: parameters, torch functions, and the attention and the head of this project.

    Args:
        model: shape.
        parameters: of a Megatron model on one rank, by name; copied.
        backend: resolved attention backend.
    """

    def __init__(self, model: ModelConfig, parameters: Mapping[str, Tensor], backend: AttentionBackend) -> None:
        super().__init__()
        self.shape = model
        self.backend = backend
        self.rotary = RotaryEmbedding(model.rope, model.head_dim)
        self.names = {name: name.replace(".", "/") for name in parameters}
        for name, value in parameters.items():
            self.register_parameter(self.names[name], torch.nn.Parameter(value.detach().clone()))

    def _of(self, name: str) -> Tensor:
        return self.get_parameter(self.names[name])

    def _norm(self, hidden: Tensor, name: str) -> Tensor:
        return F.rms_norm(hidden, hidden.shape[-1:], self._of(name), self.shape.rms_norm_eps)

    def forward(self, tokens: Tensor, layout: SequenceLayout, selected: WeightedRows) -> Tensor:
        """Weighted loss sum of a micro-batch; ``tokens`` int64 [B, S]."""
        shape = self.shape
        hidden = F.embedding(tokens.t(), self._of("embedding.word_embeddings.weight"))
        for number in range(shape.num_layers):
            layer = f"decoder.layers.{number}."
            normed = self._norm(hidden, f"{layer}input_layernorm.weight")
            qkv = F.linear(normed, self._of(f"{layer}self_attention.linear_qkv.weight"))
            qkv = qkv.view(*qkv.shape[:2], shape.num_key_value_heads, -1, shape.head_dim)
            query, key, value = qkv[..., :-2, :].flatten(2, 3), qkv[..., -2, :], qkv[..., -1, :]
            query, key = self.rotary.apply(query, key, layout)
            query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            out = joint_attention(query, key, value, layout, self.backend)
            out = out.permute(2, 0, 1, 3).flatten(2)
            if number == shape.num_layers - 1:
                out, hidden = gather_rows(out, selected.rows), gather_rows(hidden, selected.rows)
            hidden = hidden + F.linear(out, self._of(f"{layer}self_attention.linear_proj.weight"))
            normed = self._norm(hidden, f"{layer}pre_mlp_layernorm.weight")
            gate, up = F.linear(normed, self._of(f"{layer}mlp.linear_fc1.weight")).chunk(2, dim=-1)
            hidden = hidden + F.linear(F.silu(gate) * up, self._of(f"{layer}mlp.linear_fc2.weight"))
        hidden = self._norm(hidden, "decoder.final_layernorm.weight").squeeze(1)
        head = self._of("output_layer.weight")
        loss, _, _ = fused_linear_cross_entropy(hidden, head, selected.targets, selected.weights)
        return loss
