"""What a run may be resumed with."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from nld_train.checkpoint.manager import CheckpointInfo
from nld_train.config.compose import to_dict
from nld_train.config.schema import Config, DataConfig, ModelConfig, RunConfig, Sampler, StageConfig, TrainConfig
from nld_train.errors import ConfigError
from nld_train.training.run_folder import check_resumable
from nld_train.training.stages import plan_stages

CHECKPOINT = Path("runs/some/checkpoints/step_00000006")


def _config() -> Config:
    """A stage of conversations (4 steps of 2 sequences of 16) and a joint one (10 steps of 4 of 8)."""
    return Config(
        run=RunConfig(dir="runs/some"),
        model=ModelConfig(
            num_layers=1,
            hidden_size=8,
            ffn_hidden_size=8,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
            vocab_size=512,
        ),
        train=TrainConfig(global_batch_size=4),
        data=DataConfig(corpus="stdlib", sequence_length=8),
        stages={
            "sft": StageConfig(
                diffusion_loss_weight=0.3,
                tokens=128,
                lr=1e-3,
                min_lr=1e-4,
                chat="stdlib_chat",
                sequence_length=16,
                global_batch_size=2,
            ),
            "joint": StageConfig(diffusion_loss_weight=0.3, tokens=320, lr=1e-3, min_lr=1e-4),
        },
    )


def _refused(step: int, stage: str, changed: Config) -> list[str]:
    """Keys that keep ``changed`` from going on at ``step`` of a run of :func:`_config`."""
    config = _config()
    info = CheckpointInfo(
        step=step, tokens=0, stage=stage, samples=0, dtype="float32", model=config.model, parallel={},
        config=to_dict(config), metrics={}, tokenizer="", corpus_hash="",
    )  # fmt: skip
    try:
        check_resumable(info, changed, plan_stages(changed), CHECKPOINT)
    except ConfigError as error:
        return [problem.location for problem in error.problems]
    return []


def _changed(stage: str, **values: Any) -> Config:
    config = deepcopy(_config())
    for name, value in values.items():
        setattr(config.stages[stage], name, value)
    return config


def test_the_same_run_goes_on() -> None:
    assert _refused(2, "sft", _config()) == []
    assert _refused(6, "joint", _config()) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("chat", None), ("chat", "other.jsonl"), ("sequence_length", 32), ("global_batch_size", 1), ("tokens", 100)],
)
def test_a_stage_that_is_over_keeps_what_later_steps_are_counted_by(field: str, value: object) -> None:
    """Else step 6 would be another step of the second stage, on other samples."""
    assert f"stages.sft.{field}" in _refused(6, "joint", _changed("sft", **{field: value}))


def test_the_middle_of_a_stage_keeps_its_samples_and_its_loss() -> None:
    changed = _changed("sft", chat="other.jsonl", chat_validation_samples=2, ar_loss_weight=0.0, sequence_length=15)
    assert set(_refused(2, "sft", changed)) == {
        "stages.sft.chat", "stages.sft.chat_validation_samples", "stages.sft.ar_loss_weight",
        "stages.sft.sequence_length",
    }  # fmt: skip
    assert _refused(2, "sft", _changed("sft", lr=1e-2, diffusion_loss_weight=0.5)) == []
    assert _refused(2, "sft", _changed("joint", ar_loss_weight=0.5, tokens=64)) == []


def test_the_objective_is_kept_but_for_alpha() -> None:
    config = _config()
    config.objective.sampler, config.objective.noisy_fraction = Sampler.uniform_count, 0.25
    config.objective.diffusion_loss_weight = 0.7
    assert set(_refused(6, "joint", config)) == {"objective.sampler", "objective.noisy_fraction"}
