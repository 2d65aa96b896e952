"""The slow, obvious reference of a step: transformers' Ministral3, a dense mask, the loss written out by token."""

from typing import Any

import torch
from torch import Tensor
from transformers import Ministral3Config, Ministral3ForCausalLM

from nld_train.checkpoint.weight_map import MINISTRAL3_FORM, weight_rules
from nld_train.config.schema import ModelConfig


def reference_mask(length: int, block_size: int) -> Tensor:
    """bool [2L, 2L], True = may attend; the table of the objective, one entry at a time."""
    allowed = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for query in range(2 * length):
        for key in range(2 * length):
            query_is_noisy, key_is_noisy = query < length, key < length
            i, j = query % length, key % length
            if query_is_noisy and key_is_noisy:
                allowed[query, key] = i // block_size == j // block_size
            elif query_is_noisy:
                allowed[query, key] = j // block_size < i // block_size
            elif not key_is_noisy:
                allowed[query, key] = j <= i
    return allowed


class _DoubleRMSNorm(torch.nn.Module):
    """transformers' formula without its cast to fp32, for references in float64."""

    def __init__(self, weight: torch.nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps))


def transformers_model(model: ModelConfig, parameters: dict[str, Tensor], dtype: torch.dtype) -> Ministral3ForCausalLM:
    """Ministral3ForCausalLM with the weights of a Megatron model (by name in the whole model)."""
    rope = model.rope
    config = Ministral3Config(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.rms_norm_eps,
        tie_word_embeddings=False,
        pad_token_id=None,  # else torch's Embedding drops the gradient of that id
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": rope.rope_theta,
            "factor": rope.factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
            "max_position_embeddings": model.max_position_embeddings,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "mscale": rope.mscale,
            "mscale_all_dim": rope.mscale_all_dim,
            "llama_4_scaling_beta": rope.llama_4_scaling_beta,
        },
    )
    config._attn_implementation = "sdpa"
    built: Any = Ministral3ForCausalLM(config)
    built = built.to(dtype)
    state = {
        name: part
        for rule in weight_rules(model)
        for name, part in zip(rule.hf_names(MINISTRAL3_FORM), rule.split(parameters[rule.megatron]), strict=True)
    }
    built.load_state_dict(state, strict=True)
    if dtype is torch.float64:
        decoder = built.model
        decoder.norm = _DoubleRMSNorm(decoder.norm.weight, model.rms_norm_eps)
        for layer in decoder.layers:
            layer.input_layernorm = _DoubleRMSNorm(layer.input_layernorm.weight, model.rms_norm_eps)
            layer.post_attention_layernorm = _DoubleRMSNorm(layer.post_attention_layernorm.weight, model.rms_norm_eps)
    return built


def dense_logits(reference: Ministral3ForCausalLM, rows: Tensor, allowed: Tensor, position_ids: Tensor) -> Tensor:
    """Logits [B, S, V] of input rows under a dense mask bool [S, S]."""
    dtype = reference.lm_head.weight.dtype
    additive = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    mask = additive.expand(rows.shape[0], 1, *allowed.shape)
    return reference(
        input_ids=rows, attention_mask=mask, position_ids=position_ids.expand(rows.shape[0], -1), use_cache=False
    ).logits


def joint_loss(
    reference: Ministral3ForCausalLM,
    tokens: Tensor,
    labels: Tensor,
    noisy_tokens: Tensor,
    diffusion_weights: Tensor,
    *,
    block_size: int,
    diffusion_loss_weight: float,
    divisor: int,
) -> Tensor:
    """L = (sum_AR + alpha * sum_diff) / divisor over all sequences, one token at a time. Differentiable.

    Args:
        tokens, labels, noisy_tokens, diffusion_weights: [B, L], the weight of a token that is not masked being 0.
    """
    num_sequences, length = tokens.shape
    positions = torch.arange(length).repeat(2)
    logits = dense_logits(
        reference, torch.cat([noisy_tokens, tokens], dim=1), reference_mask(length, block_size), positions
    )
    total = logits.new_zeros(())
    for sequence in range(num_sequences):
        for position in range(length):
            ar_logits = logits[sequence, length + position]
            total = total - ar_logits.log_softmax(-1)[labels[sequence, position]]
            if diffusion_weights[sequence, position]:
                noisy_logits = logits[sequence, position]
                cross_entropy = -noisy_logits.log_softmax(-1)[tokens[sequence, position]]
                total = total + diffusion_loss_weight * cross_entropy * diffusion_weights[sequence, position]
    return total / divisor
