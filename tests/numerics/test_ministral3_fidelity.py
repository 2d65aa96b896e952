"""Logits of the clean half against transformers' Ministral3, from the same folder, on shapes that are odd on purpose.

L positions of a half, V vocabulary. The query scaling changes at every multiple of original_max_position_embeddings;
errors are looked at position by position, so that a step taken one position too early or too late is seen.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Ministral3ForCausalLM

from nld_train.checkpoint.convert import load_hf_weights
from nld_train.checkpoint.weight_map import weight_rules
from nld_train.config.schema import ModelConfig, ParallelConfig, RopeConfig
from nld_train.model.build import build_model
from nld_train.objective.sequence import SequenceLayout
from nld_train.platform.device import Platform
from nld_train.platform.topology import Topology
from nld_train.testing.ranks import RankPool
from nld_train.testing.reference import transformers_model
from nld_train.testing.steps import tiny_model

LENGTH, BLOCK = 48, 4
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
SHAPES: dict[str, ModelConfig] = {
    "heads 6/2": tiny_model(
        hidden_size=40, num_attention_heads=6, head_dim=10, rope=RopeConfig(original_max_position_embeddings=8)
    ),
    "theta 1e9": tiny_model(
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=24,
        rope=RopeConfig(original_max_position_embeddings=7, rope_theta=1e9),
    ),
    "one key-value head": tiny_model(
        num_layers=3,
        hidden_size=30,
        ffn_hidden_size=54,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=101,
        rms_norm_eps=1e-3,
        rope=RopeConfig(original_max_position_embeddings=11, factor=4.0, beta_fast=4.0),
    ),
    "attention factor": tiny_model(
        num_layers=1, rope=RopeConfig(original_max_position_embeddings=16, mscale=0.5, mscale_all_dim=2.0)
    ),
    "steps in every block": tiny_model(rope=RopeConfig(original_max_position_embeddings=3)),
}


def random_parameters(model: ModelConfig, *, is_tied: bool = False) -> dict[str, Tensor]:
    """fp32 parameters by Megatron's names; norms differ from 1, and scores are large enough for uneven attention."""
    generator = torch.Generator().manual_seed(6)
    parameters = {}
    for rule in weight_rules(model):
        parts = [torch.randn(shape, generator=generator) for shape in rule.shapes]
        parts = [1 + 0.2 * part if part.dim() == 1 else 0.3 * part for part in parts]
        parameters[rule.megatron] = rule.join(tuple(parts))
    if is_tied:
        parameters["output_layer.weight"] = parameters["embedding.word_embeddings.weight"]
    return parameters


def write_folder(model: ModelConfig, parameters: dict[str, Tensor], folder: Path, *, is_tied: bool = False) -> Path:
    """The folder as transformers writes it."""
    reference = transformers_model(model, parameters, torch.float32)
    if is_tied:
        untied = reference.state_dict()
        reference.config.tie_word_embeddings = True
        reference = Ministral3ForCausalLM(reference.config)
        reference.load_state_dict(untied)
    reference.save_pretrained(folder)
    return folder


def tokens_of(model: ModelConfig) -> Tensor:
    """int64 [2, 2L]: [noisy | clean], 3 in place of the mask token."""
    generator = torch.Generator().manual_seed(5)
    clean = torch.randint(4, model.vocab_size, (2, LENGTH), generator=generator)
    is_noised = torch.rand(clean.shape, generator=generator) < 0.5
    return torch.cat([clean.masked_fill(is_noised, 3), clean], dim=1)


def clean_logits(
    topology: Topology, platform: Platform, config: ModelConfig, dtype: torch.dtype, folder: str, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits [B, L, V] of the clean half after ``load_hf_weights``: beside the noisy half, and alone."""
    model = build_model(config, ParallelConfig(), dtype=dtype, device=platform.device, seed=99)
    load_hf_weights([model], config, Path(folder))
    clean = rows[:, LENGTH:]
    with torch.no_grad():
        joint = model(rows, SequenceLayout(LENGTH, BLOCK, has_noisy_half=True))[:, LENGTH:].contiguous()
        alone = model(clean, SequenceLayout(LENGTH, BLOCK, has_noisy_half=False)).contiguous()
    return joint, alone


@torch.no_grad()
def reference_logits(model: ModelConfig, parameters: dict[str, Tensor], dtype: torch.dtype, clean: Tensor) -> Tensor:
    return transformers_model(model, parameters, dtype)(input_ids=clean, use_cache=False).logits


def errors_by_position(found: Tensor, expected: Tensor) -> Tensor:
    """[L]: relative distance of the logits at each position."""
    assert found.dtype == expected.dtype
    return (found - expected).norm(dim=(0, 2)) / expected.norm(dim=(0, 2))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp64", "fp32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_clean_logits_equal_transformers(one_rank: RankPool, tmp_path: Path, shape: str, dtype: torch.dtype) -> None:
    model = SHAPES[shape]
    parameters, rows = random_parameters(model), tokens_of(model)
    folder = write_folder(model, parameters, tmp_path / "hf")
    clean = rows[:, LENGTH:]
    expected = reference_logits(model, parameters, dtype, clean)
    original = model.rope.original_max_position_embeddings
    both_sides = torch.tensor([p for step in range(original, LENGTH, original) for p in (step - 1, step)])
    assert len(both_sides) >= 4
    for found in one_rank.run(clean_logits, model, dtype, str(folder), rows):
        errors = errors_by_position(found, expected)
        assert errors[both_sides].max() < TOLERANCES[dtype], errors
        assert errors.max() < TOLERANCES[dtype], errors


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp64", "fp32"])
def test_a_tied_folder_gives_the_head_the_embedding(one_rank: RankPool, tmp_path: Path, dtype: torch.dtype) -> None:
    """Against transformers' untied model with equal weights, and in fp32 against the tied one as it loads itself."""
    model = SHAPES["heads 6/2"]
    parameters, rows = random_parameters(model, is_tied=True), tokens_of(model)
    folder = write_folder(model, parameters, tmp_path / "hf", is_tied=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    clean = rows[:, LENGTH:]
    expected = reference_logits(model, parameters, dtype, clean)
    if dtype is torch.float32:
        tied = Ministral3ForCausalLM.from_pretrained(folder, dtype=dtype)
        assert tied.lm_head.weight is tied.model.embed_tokens.weight
        with torch.no_grad():
            torch.testing.assert_close(tied(input_ids=clean, use_cache=False).logits, expected, rtol=0, atol=0)
    for found in one_rank.run(clean_logits, model, dtype, str(folder), rows):
        assert errors_by_position(found, expected).max() < TOLERANCES[dtype]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_comparison_sees_each_step_of_the_scaling(shape: str) -> None:
    """Without query scaling the logits differ from its first step on, with other frequencies they do, too, and far
    beyond the tolerances: a comparison that could not tell would prove nothing."""
    model = SHAPES[shape]
    parameters, clean = random_parameters(model), tokens_of(model)[:, LENGTH:]
    original = model.rope.original_max_position_embeddings
    expected = reference_logits(model, parameters, torch.float64, clean)

    def with_rope(**changes: float) -> ModelConfig:
        return dataclasses.replace(model, rope=dataclasses.replace(model.rope, **changes))

    unscaled = reference_logits(with_rope(llama_4_scaling_beta=0.0), parameters, torch.float64, clean)
    errors = errors_by_position(unscaled, expected)
    assert errors[:original].max() < 1e-12
    assert errors[original:].min() > 10 * TOLERANCES[torch.float32], errors

    stretched = reference_logits(with_rope(factor=2 * model.rope.factor), parameters, torch.float64, clean)
    assert errors_by_position(stretched, expected)[original:].min() > 10 * TOLERANCES[torch.float32]
