"""Records, the step clock, and metrics.jsonl read back."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nld_train.errors import DataError
from nld_train.training.metrics import (
    TIMING_FIELDS,
    Lap,
    StepClock,
    encode_record,
    is_validation,
    parse_lines,
    read_metrics,
    step_record,
    validation_record,
)
from nld_train.training.phases import PhaseTimers

MEANS: dict[str, float | None] = {"loss": 4.1, "ar_loss": 3.2, "diffusion_loss": 3.0}


class _Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def rates(lap: Lap) -> tuple[float, float, float]:
    return lap.step_seconds, lap.tokens_per_second, lap.data_seconds


def test_step_record_has_the_promised_fields() -> None:
    means = {**MEANS, "masked_share": 0.5}
    phases = {"forward": 0.1, "backward": 0.2, "optimizer": 0.05}
    record = step_record(
        step=3,
        stage="joint",
        tokens=96,
        means=means,
        lr=1e-3,
        grad_norm=0.7,
        lap=Lap(0.5, 64.0, 0.01, phases, {"checkpoint": 2.0, "validation": 3.0}),
        usage={"mfu": 0.4, "host_memory_gb": 1.5, "device_memory_gb": None},
        faults={"is_spike": False, "num_skipped_steps": 2},
    )
    assert record == {
        "step": 3,
        "stage": "joint",
        "tokens": 96,
        "loss": 4.1,
        "ar_loss": 3.2,
        "diffusion_loss": 3.0,
        "lr": 1e-3,
        "grad_norm": 0.7,
        "is_spike": False,
        "num_skipped_steps": 2,
        "step_seconds": 0.5,
        "tokens_per_second": 64.0,
        "data_seconds": 0.01,
        "forward_seconds": 0.1,
        "backward_seconds": 0.2,
        "optimizer_seconds": 0.05,
        "checkpoint_seconds": 2.0,
        "validation_seconds": 3.0,
        "mfu": 0.4,
        "host_memory_gb": 1.5,
        "device_memory_gb": None,
        "masked_share": 0.5,
    }
    assert record.keys() >= TIMING_FIELDS
    assert not is_validation(record)


def test_step_record_refuses_means_without_a_loss() -> None:
    with pytest.raises(KeyError, match="diffusion_loss"):
        step_record(
            step=1,
            stage="ar",
            tokens=1,
            means={"loss": 1.0, "ar_loss": 1.0},
            lr=1.0,
            grad_norm=1.0,
            lap=Lap(1.0, 1.0, 0.0),
        )


def test_validation_record() -> None:
    record = validation_record(step=3, stage="joint", tokens=96, means=MEANS)
    assert record == {
        "step": 3, "stage": "joint", "tokens": 96, "val_loss": 4.1, "val_ar_loss": 3.2, "val_diffusion_loss": 3.0,
    }  # fmt: skip
    assert is_validation(record)
    with pytest.raises(ValueError, match="diffusion_loss"):
        validation_record(step=3, stage="joint", tokens=96, means={"ar_loss": 1.0})


def test_clock_measures_training_alone() -> None:
    now = _Clock()
    clock = StepClock(step=10, tokens=1000, now=now)
    now.time += 4.0
    with clock.paused():
        now.time += 50.0
    now.time += 2.0
    assert rates(clock.lap(12, 1300)) == (3.0, 50.0, 0.0)
    now.time += 1.0
    assert rates(clock.lap(13, 1400)) == (1.0, 100.0, 0.0)
    with pytest.raises(ValueError, match="step 13"):
        clock.lap(13, 1400)


def test_waiting_for_data_is_counted_per_step() -> None:
    """The time until an item is there and not what is done with it; also of the one that never comes."""
    now = _Clock()
    clock = StepClock(step=0, tokens=0, now=now)

    def slow(delays: list[float]) -> Iterator[float]:
        for delay in delays:
            now.time += delay
            yield delay
        now.time += 0.5

    data = clock.waiting(slow([3.0, 1.0, 2.0]))
    for expected in (3.0, 1.0):
        assert next(data) == expected
        now.time += 10.0
    assert rates(clock.lap(2, 10)) == (12.0, 10 / 24, 2.0)
    assert list(data) == [2.0]
    assert rates(clock.lap(3, 20)) == (2.5, 4.0, 2.5)


def test_clock_pauses_when_the_pause_fails() -> None:
    now = _Clock()
    clock = StepClock(step=0, tokens=0, now=now)

    def fail() -> None:
        with clock.paused():
            now.time += 50.0
            raise OSError

    with pytest.raises(OSError):  # noqa: PT011 - ours, raised above
        fail()
    now.time += 2.0
    assert rates(clock.lap(1, 10)) == (2.0, 5.0, 0.0)


def test_pauses_and_phases_are_told_apart() -> None:
    """Seconds of a phase are those of a step; a pause is told as a whole, once, and is no part of a step."""
    now = _Clock()
    timers = PhaseTimers(torch.device("cpu"), now=now)
    clock = StepClock(0, 0, timers, now=now)

    def compute() -> None:
        for name, seconds in (("forward-compute", 1.0), ("backward-compute", 2.0), ("forward-backward", 0.5)):
            timers(name, log_level=2).start()
            now.time += seconds
            timers(name).stop()

    for _ in range(2):
        timers("forward-compute").start()
        now.time += 9.0  # waiting for data: the forward pass starts the timer again when it has them
        compute()
        with timers.phase("optimizer"):
            now.time += 0.25
        with clock.paused("validation"):
            now.time += 30.0
            compute()
    with clock.paused("checkpoint"):
        now.time += 70.0
    lap = clock.lap(2, 10)
    assert lap.step_seconds == 9.0 + 3.5 + 0.25
    assert lap.phase_seconds == {"forward": 1.0, "backward": 2.0, "optimizer": 0.25}
    assert lap.pause_seconds == {"checkpoint": 70.0, "validation": 2 * 33.5}
    assert sum(clock.lap(3, 20).phase_seconds.values()) == 0
    assert sum(clock.lap(4, 20).pause_seconds.values()) == 0


def test_floats_survive_to_the_last_bit() -> None:
    values = [0.1, 1 / 3, 1e-300, 123456789.123456789, math.pi]
    line = encode_record({"step": 1, **{str(index): value for index, value in enumerate(values)}})
    assert line.endswith(b"}\n")
    assert line.count(b"\n") == 1
    read = json.loads(line)
    assert [read[str(index)] for index in range(len(values))] == values


def test_non_finite_numbers_are_null_and_named() -> None:
    record = {"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": -math.inf, "ar_loss": 1.0, "other": None}
    line = encode_record(record)
    assert b"NaN" not in line
    assert b"Infinity" not in line
    assert json.loads(line) == {
        "step": 1, "loss": None, "grad_norm": None, "lr": None, "ar_loss": 1.0, "other": None,
        "non_finite": {"loss": "nan", "grad_norm": "inf", "lr": "-inf"},
    }  # fmt: skip
    assert math.isnan(record["loss"])  # type: ignore[arg-type]  # the caller's record is left alone
    assert "non_finite" not in json.loads(encode_record({"step": 1, "loss": 1.0}))
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode_record({"step": 1, "ratios": [math.nan]})  # never a line that other readers refuse


@pytest.mark.parametrize(
    ("tail", "num_torn"),
    [(b'{"step": 3, "lo', 1), (b"\x00" * 40, 1), (b'{"step"', 1), (b"12", 1), (b'{"stage": 1}', 1), (b"x\n\ny\n", 2)],
)
def test_a_torn_tail_is_left_out(tail: bytes, num_torn: int) -> None:
    good = b'{"step": 1}\n{"step": 2}\n'
    parsed = parse_lines(good + tail, Path("m"))
    assert [record["step"] for record in parsed.records] == [1, 2]
    assert b"".join(parsed.lines) == good
    assert parsed.num_torn == num_torn


def test_a_last_line_without_its_newline_is_whole() -> None:
    parsed = parse_lines(b'{"step": 1}\n{"step": 2}', Path("m"))
    assert b"".join(parsed.lines) == b'{"step": 1}\n{"step": 2}\n'
    assert parsed.num_torn == 0


def test_damage_in_the_middle_is_named() -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: is not a metrics record"):
        parse_lines(b'{"step": 1}\n{"st\n{"step": 3}\n', Path("metrics.jsonl"))


def test_read_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(DataError, match="does not exist"):
        read_metrics(path)
    path.touch()
    with pytest.raises(DataError, match="holds no record yet"):
        read_metrics(path)
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 1, "val_ar_loss": 3.0}\n{"step": 2, "lo')
    metrics = read_metrics(path)
    assert metrics.steps == [{"step": 1, "loss": 2.0}]
    assert metrics.validations == [{"step": 1, "val_ar_loss": 3.0}]
