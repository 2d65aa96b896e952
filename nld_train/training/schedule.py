"""The learning rate: warmup-stable-decay (WSD), a pure function of the step inside the stage.

Nothing is stored and nothing is counted along, so a resumed run cannot disagree with an uninterrupted one.

::

    lr      ______________
           /              \\
          /                \\
    0    /                  \\  min_lr
         |-W-|--- stable --|-D-|
"""

import math
from dataclasses import dataclass

from nld_train.config.schema import DecayStyle, StageConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Phases:
    """Whole steps of each phase; they add up to the stage."""

    warmup: int
    stable: int
    decay: int


def phases(num_steps: int, stage: StageConfig) -> Phases:
    """Turn the fractions into steps.

    Fractions are rounded to the nearest step. A decay that is asked for has at least one step, so that the stage always
    ends at ``min_lr``; where rounding makes both phases together too long, the warm-up gives way.
    """
    decay = max(1, round(stage.decay_fraction * num_steps)) if stage.decay_fraction > 0 else 0
    warmup = min(round(stage.warmup_fraction * num_steps), num_steps - decay)
    return Phases(warmup=warmup, stable=num_steps - warmup - decay, decay=decay)


def learning_rate(step_in_stage: int, num_steps: int, stage: StageConfig) -> float:
    """Learning rate of one step.

    Linear from 0 over the warm-up (step 1 is already above 0, the last warm-up step has ``lr``), constant, then linear
    or cosine decay whose last step, the stage's last, has exactly ``min_lr``.

    Args:
        step_in_stage: 1 .. num_steps.
        num_steps: steps of the stage.
        stage: lr, min_lr, warmup_fraction, decay_fraction, decay_style.

    Raises:
        ValueError: the stage has no such step.
    """
    if not 1 <= step_in_stage <= num_steps:
        raise ValueError(f"step_in_stage must be 1..{num_steps}, not {step_in_stage}")
    plan = phases(num_steps, stage)
    if step_in_stage <= plan.warmup:
        return stage.lr * (step_in_stage / plan.warmup)
    decayed_steps = step_in_stage - plan.warmup - plan.stable
    if decayed_steps <= 0:
        return stage.lr
    progress = decayed_steps / plan.decay
    match stage.decay_style:
        case DecayStyle.linear:
            remaining = 1.0 - progress
        case DecayStyle.cosine:
            remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    return stage.min_lr + (stage.lr - stage.min_lr) * remaining
