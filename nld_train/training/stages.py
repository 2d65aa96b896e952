"""The stages of a run laid out on one line of steps.

Steps are counted from 1 over the whole run, so ``step`` alone says which stage it belongs to, how many clean tokens
were consumed and which learning rate applies: nothing about a stage has to be stored to resume in its middle.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nld_train.config.blends import same_data
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
        sequence_length: L of its samples.
        global_batch_size: samples of one step.
        tokens_before: clean tokens of the stages before it.
        samples_before: samples of the stages before it that read the same data: the same blend; 0 with conversations.
        first_position: ``stream_position`` of the first sample of its data: 0 for the run's blend; else far from the
            run's and from other stages' positions, and the first of a global batch.
    """

    index: int
    name: str
    config: StageConfig
    first_step: int
    num_steps: int
    sequence_length: int
    global_batch_size: int
    tokens_before: int
    samples_before: int
    first_position: int

    @property
    def tokens_per_step(self) -> int:
        """Clean tokens of one step."""
        return self.global_batch_size * self.sequence_length

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

    def tokens_at(self, step: int) -> int:
        """Clean tokens consumed since the start of the run, after ``step`` of this stage."""
        return self.tokens_before + self.step_in_stage(step) * self.tokens_per_step

    def consumed_samples(self, step: int) -> int:
        """Samples of this stage's data read before ``step`` of this stage."""
        return self.samples_before + (self.step_in_stage(step) - 1) * self.global_batch_size

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
    stages: list[Stage] = []
    first_step, tokens_before = 1, 0
    # Of each blend: samples taken so far, and the position of its first one. The run's is there from the beginning.
    taken = {same_data(config.data, StageConfig()): 0}
    positions = dict.fromkeys(taken, 0)
    for index, (name, stage) in enumerate(config.stages.items()):
        sequence_length = stage.sequence_length or config.data.sequence_length
        global_batch_size = stage.global_batch_size or config.train.global_batch_size
        own_position = (1 << 61 if stage.chat is not None else 1 << 60) + (index << 48)
        own_position -= own_position % global_batch_size
        data = None if stage.chat is not None else same_data(config.data, stage)
        planned = Stage(
            index=index,
            name=name,
            config=stage,
            first_step=first_step,
            num_steps=-(-stage.tokens // (global_batch_size * sequence_length)),
            sequence_length=sequence_length,
            global_batch_size=global_batch_size,
            tokens_before=tokens_before,
            samples_before=0 if data is None else taken.setdefault(data, 0),
            first_position=own_position if data is None else positions.setdefault(data, own_position),
        )
        stages.append(planned)
        first_step += planned.num_steps
        tokens_before += planned.tokens
        if data is not None:
            taken[data] += planned.num_steps * global_batch_size
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


def tokens_at(stages: Sequence[Stage], step: int) -> int:
    """Clean tokens consumed since the start of the run, after ``step``; 0 before the first."""
    return stage_of_step(stages, step).tokens_at(step) if step else 0
