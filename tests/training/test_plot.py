"""scripts/plot_metrics.py on synthetic metrics: a picture with something in it, and clear errors."""

import importlib.util
import math
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from nld_train.errors import DataError
from nld_train.evaluation import curves
from nld_train.training.metrics import Lap, encode_record, read_metrics, step_record, validation_record

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "plot_metrics.py"
STEPS = {"ar": 200, "joint": 200}


@pytest.fixture(scope="module")
def plot_metrics() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plot_metrics", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def synthetic_records(seed: int = 0) -> list[dict[str, Any]]:
    """A run of two stages whose losses fall as they do in reality, the diffusion loss with heavy tails."""
    draw = random.Random(seed)
    records: list[dict[str, Any]] = []
    step = 0
    for stage, num_steps in STEPS.items():
        for inside in range(1, num_steps + 1):
            step += 1
            ar_loss = 8.3 * step**-0.18 + draw.gauss(0, 0.05)
            diffusion = 4.5 + 4 * math.exp(-inside / 60)
            noisy = diffusion * draw.lognormvariate(0, 0.35) * (10 if draw.random() < 0.01 else 1)
            diffusion_loss = noisy if stage == "joint" else None
            means = {
                "loss": ar_loss + 0.3 * (diffusion_loss or 0.0),
                "ar_loss": ar_loss,
                "diffusion_loss": diffusion_loss,
            }
            lr = 2e-3 * min(1.0, inside / 20, (num_steps - inside + 1) / 40)
            records.append(
                step_record(
                    step=step,
                    stage=stage,
                    tokens=4096 * step,
                    means=means,
                    lr=lr,
                    grad_norm=1.0,
                    lap=Lap(0.1, 4e4, 0.0),
                )
            )
            if inside in (1, num_steps) or step % 50 == 0:
                val_means = {
                    "ar_loss": 8.3 * step**-0.18 + 0.05,
                    "diffusion_loss": diffusion if stage == "joint" else 9.0,
                }
                records.append(validation_record(step=step, stage=stage, tokens=4096 * step, means=val_means))
    return records


def write_run(run_dir: Path, records: list[dict[str, Any]]) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").write_bytes(b"".join(map(encode_record, records)))
    return run_dir


def _pixels(path: Path) -> np.ndarray:
    from matplotlib import image

    return (image.imread(path)[..., :3] * 255).round().astype(int)


def _share(pixels: np.ndarray, color: str) -> float:
    """Share of the pixels that have exactly this colour."""
    rgb = [int(color[index : index + 2], 16) for index in (1, 3, 5)]
    return float((pixels == rgb).all(axis=-1).mean())


def test_draws_both_losses(tmp_path: Path, plot_metrics: ModuleType) -> None:
    run_dir = write_run(tmp_path / "tiny", synthetic_records())
    path = plot_metrics.plot_run(run_dir)
    assert path == run_dir / "metrics.png"
    assert sorted(file.name for file in run_dir.iterdir()) == ["metrics.jsonl", "metrics.png"]
    pixels = _pixels(path)
    assert pixels.shape[:2] == (900, 1350)
    both = (_share(pixels, curves.AR_COLOR), _share(pixels, curves.DIFFUSION_COLOR))
    assert min(both) > 1e-3, both
    ar_only = [record for record in synthetic_records() if record["stage"] == "ar" and "val_ar_loss" not in record]
    path = plot_metrics.plot_run(write_run(tmp_path / "ar", ar_only))
    assert _share(_pixels(path), curves.DIFFUSION_COLOR) == 0.0


def test_figure_says_what_it_shows(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, synthetic_records())
    figure = curves.draw_run(read_metrics(run_dir / "metrics.jsonl"), "a title")
    losses, rate = figure.axes
    assert figure.get_suptitle() == "a title"
    assert losses.get_ylabel() == "loss (nats per token)"
    assert rate.get_ylabel() == "learning rate"
    assert rate.get_xlabel() == "clean tokens consumed (millions)"
    assert [text.get_text() for text in losses.get_legend().get_texts()] == [
        "AR, training", "AR, validation", "diffusion, training", "diffusion, validation",
    ]  # fmt: skip
    assert [text.get_text() for text in losses.texts] == [" stage ar", " stage joint"]
    boundaries = [line.get_xdata()[0] for line in rate.lines if line.get_linestyle() == "--"]
    assert boundaries == [200 * 4096 / 1e6]
    # The smoothed diffusion curve starts with its stage.
    diffusion = next(line for line in losses.lines if line.get_label() == "diffusion, training")
    assert diffusion.get_xdata()[0] == 201 * 4096 / 1e6
    # Single steps far above their neighbours must not flatten the curves, and most of the curve is inside.
    curve = np.asarray(diffusion.get_ydata())
    top = losses.get_ylim()[1]
    assert top < curve.max()
    assert np.quantile(curve, 0.85) < top


def test_spikes_and_skipped_steps_are_marked_where_they_were(tmp_path: Path) -> None:
    """Also where the loss is no number, and nothing of it enters the curves."""
    records = synthetic_records()
    of_step = {record["step"]: record for record in records if "loss" in record}
    of_step[40] |= {"is_spike": True}
    of_step[90] |= {"is_spike": False, "is_skipped": True, "loss": math.nan, "ar_loss": math.nan}
    figure = curves.draw_run(read_metrics(write_run(tmp_path, records) / "metrics.jsonl"))
    marks = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].lines if line.get_marker() in "vX"}
    assert marks == {"loss spikes": [40 * 4096 / 1e6], "steps skipped": [90 * 4096 / 1e6]}


def test_smooth() -> None:
    """Against the window written out point by point."""
    draw = random.Random(1)
    for length, half_width in ((1, 0), (1, 5), (7, 0), (7, 2), (50, 4), (5, 50)):
        values = [draw.choice([draw.gauss(0, 1), draw.gauss(0, 1), math.nan, math.inf]) for _ in range(length)]
        expected = []
        for index in range(length):
            reach = min(index, half_width)
            window = [value for value in values[index - reach : index + reach + 1] if math.isfinite(value)]
            expected.append(sum(window) / len(window) if window else math.nan)
        assert curves.smooth(values, half_width).tolist() == pytest.approx(expected, nan_ok=True, abs=1e-12)
    line = [3.0 - 0.5 * index for index in range(20)]
    assert curves.smooth(line, 3)[:-3] == pytest.approx(line[:-3]), "a straight line is kept: no lag"


def test_non_finite_and_torn_records_are_drawn_around(tmp_path: Path, plot_metrics: ModuleType) -> None:
    records = synthetic_records()
    records[10] = {**records[10], "loss": math.nan, "ar_loss": math.inf}
    run_dir = write_run(tmp_path, records)
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 401, "lo')
    assert plot_metrics.plot_run(run_dir, tmp_path / "sub" / "out.svg").read_text().startswith("<?xml")


def test_a_single_step_is_enough(tmp_path: Path, plot_metrics: ModuleType) -> None:
    plot_metrics.plot_run(write_run(tmp_path, synthetic_records()[:1]))
    assert (tmp_path / "metrics.png").stat().st_size > 5000


def test_errors(tmp_path: Path, plot_metrics: ModuleType) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl: does not exist"):
        plot_metrics.plot_run(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no record yet"):
        plot_metrics.plot_run(write_run(tmp_path / "empty", []))
    validations = [record for record in synthetic_records() if "val_ar_loss" in record]
    with pytest.raises(DataError, match="no step record yet"):
        plot_metrics.plot_run(write_run(tmp_path / "validation", validations))
    with pytest.raises(DataError, match=r"unknown picture format '\.bmpx'"):
        plot_metrics.plot_run(write_run(tmp_path / "run", synthetic_records()[:3]), tmp_path / "x.bmpx")


def test_command_line(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", synthetic_records())
    command = [sys.executable, str(SCRIPT)]
    root = SCRIPT.parents[1]
    done = subprocess.run(
        [*command, str(run_dir), "--out", str(tmp_path / "curve.png")],
        capture_output=True, text=True, cwd=root, env={"PYTHONPATH": str(root), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "curve.png")), done.stderr
    failed = subprocess.run(
        [*command, str(tmp_path)], capture_output=True, text=True, cwd=root, env={"PYTHONPATH": str(root)}
    )
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"{tmp_path / 'metrics.jsonl'}: does not exist")
    assert "Traceback" not in failed.stderr
