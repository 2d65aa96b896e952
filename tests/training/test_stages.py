"""plan_stages: whole steps, one line of steps over the run."""

import pytest

from nld_train.config.schema import BlendPart, Config, DataConfig, StageConfig, TrainConfig
from nld_train.errors import ConfigError
from nld_train.training.stages import plan_stages, stage_of_step, tokens_at


def _config(*tokens: int) -> Config:
    """Stages of the given tokens, alternately AR and joint; 4 sequences of 8 tokens: 32 tokens a step."""
    return Config(
        train=TrainConfig(global_batch_size=4),
        data=DataConfig(corpus="stdlib", sequence_length=8),
        stages={
            f"stage_{index}": StageConfig(diffusion_loss_weight=0.3 * (index % 2), tokens=count, lr=1e-3, min_lr=1e-4)
            for index, count in enumerate(tokens)
        },
    )


def test_tokens_are_rounded_up_to_whole_steps() -> None:
    stages = plan_stages(_config(1, 32, 33, 64))
    assert [stage.num_steps for stage in stages] == [1, 1, 2, 2]
    assert [stage.tokens for stage in stages] == [32, 32, 64, 64]
    assert [(stage.first_step, stage.last_step) for stage in stages] == [(1, 1), (2, 2), (3, 4), (5, 6)]
    assert [stage.index for stage in stages] == [0, 1, 2, 3]
    assert [stage.name for stage in stages] == ["stage_0", "stage_1", "stage_2", "stage_3"]
    assert [stage.is_joint for stage in stages] == [False, True, False, True]


def test_a_trillion_tokens_stay_exact() -> None:
    stages = plan_stages(_config(10**12 + 1))
    assert stages[0].num_steps == 10**12 // 32 + 1


def test_every_step_belongs_to_exactly_one_stage() -> None:
    stages = plan_stages(_config(100, 40, 1))
    assert [stage_of_step(stages, step).index for step in range(1, 8)] == [0, 0, 0, 0, 1, 1, 2]
    assert [stage_of_step(stages, step).step_in_stage(step) for step in range(1, 8)] == [1, 2, 3, 4, 1, 2, 1]
    for step in (0, 8):
        with pytest.raises(ValueError, match=rf"steps 1\.\.7, not {step}"):
            stage_of_step(stages, step)
    with pytest.raises(ValueError, match="step 5 is not in stage stage_0"):
        stages[0].step_in_stage(5)


def test_info_for_callbacks() -> None:
    info = plan_stages(_config(100, 40))[1].info()
    assert (info.name, info.diffusion_loss_weight) == ("stage_1", 0.3)
    assert (info.first_step, info.last_step, info.tokens) == (5, 6, 64)


def test_all_empty_stages_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="stages: is empty"):
        plan_stages(_config())
    with pytest.raises(ConfigError) as refused:
        plan_stages(_config(0, 32, -5))
    assert [problem.location for problem in refused.value.problems] == [
        "stages.stage_0.tokens",
        "stages.stage_2.tokens",
    ]
    assert "is -5" in refused.value.problems[1].message


def test_a_stage_with_conversations_counts_its_own_samples() -> None:
    config = _config(100, 40, 64)
    config.stages["stage_1"].chat = "stdlib_chat"
    config.stages["stage_1"].sequence_length = 20
    config.stages["stage_1"].global_batch_size = 3
    first, chat, last = plan_stages(config)
    assert (first.num_steps, chat.num_steps, last.num_steps) == (4, 1, 2)
    assert (chat.tokens_per_step, chat.tokens_before, last.tokens_before) == (60, 128, 188)
    assert tokens_at((first, chat, last), 0) == 0
    assert [tokens_at((first, chat, last), step) for step in (1, 4, 5, 6, 7)] == [32, 128, 188, 220, 252]
    assert [first.consumed_samples(step) for step in (1, 4)] == [0, 12]
    assert chat.consumed_samples(5) == 0
    assert last.consumed_samples(6) == 16  # of the corpus, which the conversations do not touch
    assert chat.first_position % 3 == 0  # its first batch is one to noise that is spread over a batch
    assert chat.first_position > 2**60
    assert first.first_position == last.first_position == 0


def test_stages_that_share_a_blend_go_on_where_the_last_one_stopped() -> None:
    """The run's, a stage's own, and one that says the same as another in other words."""
    config = _config(100, 40, 64, 32, 96)
    own = {"x": BlendPart(corpus="one", weight=0.7), "y": BlendPart(corpus="two", weight=0.3)}
    same = {"b": BlendPart(corpus="two", weight=3), "a": BlendPart(corpus="one", weight=7)}
    config.stages["stage_1"].blend = own
    config.stages["stage_3"].blend = same
    config.stages["stage_4"].blend = {"all": BlendPart(corpus="stdlib", weight=2)}  # the run's corpus
    stages = plan_stages(config)
    assert [stage.num_steps * 4 for stage in stages] == [16, 8, 8, 4, 12]
    assert [stage.samples_before for stage in stages] == [0, 0, 16, 8, 24]
    positions = [stage.first_position for stage in stages]
    assert positions[0] == positions[2] == positions[4] == 0
    assert positions[1] == positions[3] > 2**59  # noise that no other stage draws
    assert positions[1] % 4 == 0
    config.stages["stage_3"].blend["b"].weight = 4
    assert plan_stages(config)[3].samples_before == 0
    assert plan_stages(config)[3].first_position - positions[1] > 2**40
