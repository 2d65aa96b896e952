"""What a run may be resumed with."""

from copy import deepcopy
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from nld_train.checkpoint.manager import CheckpointInfo
from nld_train.config.compose import to_dict
from nld_train.config.schema import (
    BlendPart,
    Config,
    DataConfig,
    ModelConfig,
    RunConfig,
    Sampler,
    StageConfig,
    TrainConfig,
)
from nld_train.data.blend import Blend, BlendEntry
from nld_train.errors import ConfigError, DataError
from nld_train.training.run_folder import check_resumable, check_same_data
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
        config=to_dict(config), metrics={}, tokenizer="",
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


def test_imported_weights_are_no_run() -> None:
    info = CheckpointInfo(
        step=0, tokens=0, stage="", samples=0, dtype="float32", model=_config().model, parallel={}, config={},
        metrics={}, tokenizer="",
    )  # fmt: skip
    with pytest.raises(ConfigError, match="step_00000006 holds imported weights and no run"):
        check_resumable(info, _config(), plan_stages(_config()), CHECKPOINT)


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


def test_a_changed_blend_is_refused_and_a_new_stage_may_have_one() -> None:
    """Named by the part and what is different about it; only a stage that has not begun may change its blend."""
    own = {"code": BlendPart(corpus="one", weight=0.7), "prose": BlendPart(corpus="two", weight=0.3)}
    config = _config()
    config.data.corpus = "other"
    assert _refused(6, "joint", config) == ["data.corpus"]
    config = _config()
    config.data.corpus, config.data.blend = None, own
    assert set(_refused(6, "joint", config)) == {"data.corpus", "data.blend.code", "data.blend.prose"}
    assert set(_refused(6, "joint", _changed("joint", blend=own))) == {
        "stages.joint.blend.code", "stages.joint.blend.prose",
    }  # fmt: skip
    assert _refused(2, "sft", _changed("joint", blend=own)) == []
    config = _config()
    config.stages["anneal"] = StageConfig(diffusion_loss_weight=0.3, tokens=64, lr=1e-3, min_lr=0.0, blend=own)
    assert _refused(6, "joint", config) == []
    config.stages["joint"].blend = own
    assert all(key.startswith("stages.joint.blend.") for key in _refused(6, "joint", config))


@dataclass
class _Corpus:
    """What a blend's description asks a corpus for."""

    folder: Path
    tokens_hash: str

    def part_hash(self, part: str) -> str:
        return self.tokens_hash


def _blend(**parts: tuple[str, Fraction]) -> Blend:
    return Blend(
        entries=tuple(
            BlendEntry(name=name, weight=weight, corpora=(_Corpus(Path("data") / name, content),))  # type: ignore[arg-type]
            for name, (content, weight) in parts.items()
        )
    )


def test_changed_contents_are_refused_by_name() -> None:
    half, third, rest = Fraction(1, 2), Fraction(1, 3), Fraction(2, 3)
    config = _config()
    stages = plan_stages(config)
    kept = _blend(code=("a", half), prose=("b", half))
    info = CheckpointInfo(
        step=6, tokens=0, stage="joint", samples=0, dtype="float32", model=config.model, parallel={},
        config=to_dict(config), metrics={}, tokenizer="", blends={"joint": kept.describe()},
    )  # fmt: skip
    check_same_data(info, {"joint": kept}, {}, stages, CHECKPOINT)
    for changed, words in (
        (_blend(code=("a", third), prose=("b", rest)), ["part code is 1/3, it was 1/2", "part prose is 2/3"]),
        (_blend(code=("x", half), prose=("b", half)), ["tokens of part code (data/code)", "have hash"]),
        (_blend(code=("a", Fraction(1))), ["part prose has gone", "part code is 1, it was 1/2"]),
        (_blend(code=("a", half), prose=("b", half), more=("c", half)), ["part more has come"]),
    ):
        with pytest.raises(DataError) as caught:
            check_same_data(info, {"joint": changed}, {}, stages, CHECKPOINT)
        for word in words:
            assert word in str(caught.value)
        assert "new stage" in caught.value.problems[0].remedy
    info.step, info.stage, info.blends = 2, "sft", {}  # the joint stage has not begun: its blend is free
    check_same_data(info, {"joint": kept}, {}, stages, CHECKPOINT)
