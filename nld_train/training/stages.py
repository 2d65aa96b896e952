"""The stages of a run laid out on one line of steps.

Steps are counted from 1 over the whole run, so ``step`` alone says which stage it belongs to, how many clean tokens
were consumed and which learning rate applies: nothing about a stage has to be stored to resume in its middle.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nld_train.config.schema import Config, StageConfig
from nld_train.errors import ConfigError, Problem
from nld_train.training.callbacks.base import StageInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage and its place in the run.

    Args:
        index: 0 for the first stage.
        name: its key under ``stages``.
        config: objective weight, length and learning rate.
        first_step: first step of the stage, counted from 1 over the whole run.
        num_steps: steps of the stage, at least 1.
        tokens_per_step: clean tokens of one step, global_batch_size * sequence_length.
    """

    index: int
    name: str
    config: StageConfig
    first_step: int
    num_steps: int
    tokens_per_step: int

    @property
    def last_step(self) -> int:
        """Last step of the stage (included)."""
        return self.first_step + self.num_steps - 1

    @property
    def tokens(self) -> int:
        """Clean tokens the stage really consumes: the configured number rounded up to whole steps."""
        return self.num_steps * self.tokens_per_step

    @property
    def is_joint(self) -> bool:
        """True: the doubled sequence and both losses. False: the clean tokens alone and the AR loss."""
        return self.config.diffusion_loss_weight > 0

    def step_in_stage(self, step: int) -> int:
        """1 at the stage's first step, ``num_steps`` at its last."""
        if not self.first_step <= step <= self.last_step:
            raise ValueError(f"step {step} is not in stage {self.name} ({self.first_step}..{self.last_step})")
        return step - self.first_step + 1

    def info(self) -> StageInfo:
        """The stage as callbacks see it."""
        return StageInfo(
            name=self.name,
            diffusion_loss_weight=self.config.diffusion_loss_weight,
            first_step=self.first_step,
            last_step=self.last_step,
            tokens=self.tokens,
        )


def plan_stages(config: Config) -> tuple[Stage, ...]:
    """Lay the configured stages one after the other; each is rounded up to whole steps.

    Raises:
        ConfigError: no stage, or a stage without tokens (all of them at once).
    """
    if not config.stages:
        problem = Problem(
            "stages", "is empty: the run has nothing to do", "name at least one stage, e.g. +stage@stages.ar=ar"
        )
        raise ConfigError([problem])
    problems = [
        Problem(f"stages.{name}.tokens", f"is {stage.tokens}", "give the stage at least one token")
        for name, stage in config.stages.items()
        if stage.tokens < 1
    ]
    if problems:
        raise ConfigError(problems)
    tokens_per_step = config.train.global_batch_size * config.data.sequence_length
    stages: list[Stage] = []
    first_step = 1
    for index, (name, stage) in enumerate(config.stages.items()):
        num_steps = -(-stage.tokens // tokens_per_step)
        stages.append(
            Stage(
                index=index,
                name=name,
                config=stage,
                first_step=first_step,
                num_steps=num_steps,
                tokens_per_step=tokens_per_step,
            )
        )
        first_step += num_steps
    return tuple(stages)


def stage_of_step(stages: Sequence[Stage], step: int) -> Stage:
    """The stage that ``step`` (from 1, over the whole run) belongs to.

    Raises:
        ValueError: the run has no such step.
    """
    for stage in stages:
        if stage.first_step <= step <= stage.last_step:
            return stage
    raise ValueError(f"the run has steps 1..{stages[-1].last_step}, not {step}")
