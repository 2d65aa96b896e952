"""learning_rate: the three phases, their edges, and exactness at the ends."""

import itertools
import math

import pytest

from nld_train.config.schema import DecayStyle, StageConfig
from nld_train.training.schedule import Phases, learning_rate, phases

LR, MIN_LR = 1e-5, 3e-6


def _stage(
    warmup: float, decay: float, style: DecayStyle = DecayStyle.linear, lr: float = LR, min_lr: float = MIN_LR
) -> StageConfig:
    return StageConfig(
        diffusion_loss_weight=0.0,
        tokens=1,
        lr=lr,
        min_lr=min_lr,
        warmup_fraction=warmup,
        decay_fraction=decay,
        decay_style=style,
    )


def _curve(num_steps: int, stage: StageConfig) -> list[float]:
    return [learning_rate(step, num_steps, stage) for step in range(1, num_steps + 1)]


def test_by_hand_linear() -> None:
    curve = _curve(10, _stage(0.2, 0.4, lr=1.0, min_lr=0.2))
    assert curve == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2], rel=1e-15)


def test_by_hand_cosine() -> None:
    curve = _curve(10, _stage(0.2, 0.4, DecayStyle.cosine, lr=1.0, min_lr=0.2))
    half = math.sqrt(0.5)
    decay = [0.2 + 0.8 * 0.5 * (1 + half), 0.6, 0.2 + 0.8 * 0.5 * (1 - half), 0.2]
    assert curve == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 1.0, *decay], rel=1e-14)


@pytest.mark.parametrize("style", list(DecayStyle))
@pytest.mark.parametrize(
    ("num_steps", "warmup", "decay"),
    list(itertools.product([1, 2, 3, 7, 100, 1234], [0.0, 0.01, 0.1, 0.5], [0.0, 0.01, 0.1, 0.5])),
)
def test_shape(num_steps: int, warmup: float, decay: float, style: DecayStyle) -> None:
    stage = _stage(warmup, decay, style)
    plan = phases(num_steps, stage)
    assert plan.warmup + plan.stable + plan.decay == num_steps
    assert min(plan.warmup, plan.stable, plan.decay) >= 0
    curve = _curve(num_steps, stage)
    assert curve[0] > 0
    assert curve[-1] == (MIN_LR if decay > 0 else LR)
    assert max(curve) <= LR
    rise, fall = curve[: plan.warmup], curve[plan.warmup + plan.stable :]
    assert all(low < high for low, high in itertools.pairwise(rise))
    assert all(high > low for high, low in itertools.pairwise(fall))
    assert set(curve[plan.warmup : plan.warmup + plan.stable]) <= {LR}
    if plan.warmup:
        assert rise[-1] == LR
    # Continuity: no jump larger than one step of the ramp it belongs to (a cosine is at most pi/2 times as steep).
    for index, (before, after) in enumerate(itertools.pairwise([0.0, *curve] if plan.warmup else curve)):
        if after > before:
            assert after - before <= LR / plan.warmup * (1 + 1e-12), index
        elif after < before:
            assert before - after <= math.pi / 2 * (LR - MIN_LR) / plan.decay * (1 + 1e-12), index


def test_phases_round_to_whole_steps_and_the_warmup_gives_way() -> None:
    assert phases(1000, _stage(0.01, 0.1)) == Phases(warmup=10, stable=890, decay=100)
    assert phases(3, _stage(0.5, 0.5)) == Phases(warmup=1, stable=0, decay=2)
    assert phases(1, _stage(1.0, 0.01)) == Phases(warmup=0, stable=0, decay=1)
    assert phases(5, _stage(1.0, 0.0)) == Phases(warmup=5, stable=0, decay=0)
    assert phases(5, _stage(0.0, 1.0)) == Phases(warmup=0, stable=0, decay=5)


def test_a_stage_of_one_step() -> None:
    assert learning_rate(1, 1, _stage(0.01, 0.1)) == MIN_LR
    assert learning_rate(1, 1, _stage(0.01, 0.0)) == LR
    assert learning_rate(1, 1, _stage(1.0, 0.0)) == LR


def test_a_decay_to_nothing_ends_at_zero() -> None:
    for style in DecayStyle:
        assert learning_rate(50, 50, _stage(0.1, 0.5, style, min_lr=0.0)) == 0.0


def test_very_long_stage() -> None:
    num_steps = 500_000
    stage = _stage(0.01, 0.1, DecayStyle.cosine)
    assert learning_rate(5_000, num_steps, stage) == LR
    assert learning_rate(450_000, num_steps, stage) == LR
    assert LR * (1 - 1e-9) < learning_rate(450_001, num_steps, stage) <= LR
    assert learning_rate(num_steps, num_steps, stage) == MIN_LR


@pytest.mark.parametrize("step", [0, -1, 11])
def test_a_step_outside_the_stage_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=rf"1\.\.10, not {step}"):
        learning_rate(step, 10, _stage(0.1, 0.1))
