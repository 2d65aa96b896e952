"""The one table between Megatron's parameters and Hugging Face tensors, used in both directions.

Dimensions: H hidden, A query heads, K key-value heads, D head dimension, F ffn, V vocabulary; G = A / K query heads
share one key-value head. Megatron stores per key-value head ``[q_1 .. q_G, k, v]`` in ``linear_qkv`` ([K * (G + 2) *
D, H]) and ``[gate; up]`` in ``linear_fc1`` ([2F, H]); Hugging Face stores each matrix apart.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nld_train.config.schema import ModelConfig

# Prefixes of the tensor names in the Hugging Face forms that can be read; NLD is the one that is written.
NLD_FORM = {"decoder": "encoder.", "head": "diffusion_head.weight"}
MINISTRAL3_FORM = {"decoder": "model.", "head": "lm_head.weight"}
# The vision-language form as published and as transformers writes it, and the names of its modules in memory, which
# other tools write.
MISTRAL3_FORM = {"decoder": "language_model.model.", "head": "language_model.lm_head.weight"}
MISTRAL3_MODULE_FORM = {"decoder": "model.language_model.", "head": "lm_head.weight"}


@dataclass(frozen=True, slots=True)
class WeightRule:
    """One Megatron parameter and the Hugging Face tensors that hold the same numbers.

    Args:
        megatron: name in the whole model (layers counted over all pipeline stages).
        hf: names without the form's decoder prefix; ``"head"`` stands for the form's head tensor.
        shapes: shapes of the Hugging Face tensors, in the order of ``hf``.
        join: Hugging Face tensors -> Megatron parameter.
        split: Megatron parameter -> Hugging Face tensors.
    """

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    join: Callable[[tuple[Tensor, ...]], Tensor]
    split: Callable[[Tensor], tuple[Tensor, ...]]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the Megatron parameter: the parts' rows together."""
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])

    def hf_names(self, form: Mapping[str, str]) -> tuple[str, ...]:
        return tuple(form["head"] if name == "head" else form["decoder"] + name for name in self.hf)


def _only(tensors: tuple[Tensor, ...]) -> Tensor:
    return tensors[0]


def _alone(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor,)


def join_qkv(tensors: tuple[Tensor, ...], num_key_value_heads: int, head_dim: int) -> Tensor:
    """(q [A*D, H], k [K*D, H], v [K*D, H]) -> [K*(G+2)*D, H], grouped by key-value head."""
    hidden = tensors[0].shape[1]
    grouped = [tensor.reshape(num_key_value_heads, -1, head_dim, hidden) for tensor in tensors]
    return torch.cat(grouped, dim=1).reshape(-1, hidden)


def split_qkv(qkv: Tensor, num_key_value_heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """Inverse of :func:`join_qkv`."""
    hidden = qkv.shape[1]
    grouped = qkv.reshape(num_key_value_heads, -1, head_dim, hidden)
    queries_per_group = grouped.shape[1] - 2
    parts = grouped.split([queries_per_group, 1, 1], dim=1)
    return tuple(part.reshape(-1, hidden).contiguous() for part in parts)


def _split_gate_up(fc1: Tensor) -> tuple[Tensor, ...]:
    return tuple(half.contiguous() for half in fc1.chunk(2, dim=0))


def weight_rules(model: ModelConfig) -> Iterator[WeightRule]:
    """Every parameter of the model, once, in the order of the forward pass."""
    h, f, v = model.hidden_size, model.ffn_hidden_size, model.vocab_size
    q_rows = model.num_attention_heads * model.head_dim
    kv_rows = model.num_key_value_heads * model.head_dim
    kv_heads, head_dim = model.num_key_value_heads, model.head_dim

    def same(megatron: str, hf: str, *shape: int) -> WeightRule:
        return WeightRule(megatron, (hf,), (shape,), _only, _alone)

    yield same("embedding.word_embeddings.weight", "embed_tokens.weight", v, h)
    for layer in range(model.num_layers):
        ours, theirs = f"decoder.layers.{layer}", f"layers.{layer}"
        yield same(f"{ours}.input_layernorm.weight", f"{theirs}.input_layernorm.weight", h)
        yield WeightRule(
            f"{ours}.self_attention.linear_qkv.weight",
            tuple(f"{theirs}.self_attn.{name}_proj.weight" for name in "qkv"),
            ((q_rows, h), (kv_rows, h), (kv_rows, h)),
            lambda tensors: join_qkv(tensors, kv_heads, head_dim),
            lambda tensor: split_qkv(tensor, kv_heads, head_dim),
        )
        yield same(f"{ours}.self_attention.linear_proj.weight", f"{theirs}.self_attn.o_proj.weight", h, q_rows)
        yield same(f"{ours}.pre_mlp_layernorm.weight", f"{theirs}.post_attention_layernorm.weight", h)
        yield WeightRule(
            f"{ours}.mlp.linear_fc1.weight",
            (f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight"),
            ((f, h), (f, h)),
            torch.cat,
            _split_gate_up,
        )
        yield same(f"{ours}.mlp.linear_fc2.weight", f"{theirs}.mlp.down_proj.weight", h, f)
    yield same("decoder.final_layernorm.weight", "norm.weight", h)
    yield same("output_layer.weight", "head", v, h)
