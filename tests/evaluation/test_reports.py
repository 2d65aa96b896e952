"""Tables over runs: grouping, means over seeds, paired differences, work."""

import json
import math
from pathlib import Path

import pytest
import yaml

from nld_train.errors import DataError
from nld_train.evaluation.reports import (
    comparison_table,
    differing_keys,
    find_runs,
    group_runs,
    mean_and_error,
    mean_curve,
)
from scripts import compare_runs


def write_run(
    folder: Path, *, seed: int, alpha: float, fraction: float = 1.0, ar: float = 3.0, diffusion: float = 4.0
) -> None:
    """A run of one AR step and two joint steps of 100 tokens."""
    folder.mkdir(parents=True)
    config = {
        "run": {"dir": str(folder), "seed": seed},
        "objective": {"noisy_fraction": fraction, "complementary": False},
        "stages": {
            "ar": {"diffusion_loss_weight": 0.0, "tokens": 100},
            "joint": {"diffusion_loss_weight": alpha, "tokens": 190},
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    records = [
        {"step": step, "stage": stage, "tokens": 100 * step, "loss": 1.0}
        for step, stage in ((1, "ar"), (2, "joint"), (3, "joint"))
    ]
    records += [
        {
            "step": step,
            "stage": "joint",
            "tokens": 100 * step,
            "val_ar_loss": ar + 1 - step / 3,
            "val_diffusion_loss": value,
        }
        for step, value in ((2, diffusion + 1), (3, diffusion))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for seed, shift in ((1, 0.0), (2, 0.5)):
        write_run(tmp_path / f"a{seed}", seed=seed, alpha=0.1, ar=3 + shift, diffusion=4 + shift)
        write_run(tmp_path / f"b{seed}", seed=seed, alpha=0.3, fraction=0.5, ar=2.9 + shift, diffusion=4.2 + shift)
    return tmp_path


def test_rows_are_means_over_seeds_and_differences_are_paired(sweep: Path) -> None:
    runs = find_runs([sweep])
    assert differing_keys(runs) == ["objective.noisy_fraction", "stages.joint.diffusion_loss_weight"]
    lines = comparison_table(runs).splitlines()
    assert lines[0].split(" | ")[:5] == ["| noisy_fraction", "diffusion_loss_weight", "seeds", "clean tokens", "work"]
    second, first = (line.strip("| ").split(" | ") for line in lines[2:])
    assert first[4:] == ["1.25", "3.2500 ± 0.2500", "+0.1000 ± 0.0000", "4.2500 ± 0.2500", "-0.2000 ± 0.0000"]
    lines = comparison_table(runs, baseline={"objective.noisy_fraction": "1.0"}).splitlines()
    first, second = (line.strip("| ").split(" | ") for line in lines[2:])
    assert first[:5] == ["1.0", "0.1", "1,2", "300", "1.00"]
    assert first[5] == "3.2500 ± 0.2500"
    assert second[:5] == ["0.5", "0.3", "1,2", "300", "0.80"]  # 100 + 200 * 1.5 of 100 + 200 * 2
    assert second[5:] == ["3.1500 ± 0.2500", "-0.1000 ± 0.0000", "4.4500 ± 0.2500", "+0.2000 ± 0.0000"]


def test_a_stage_of_some_runs_is_one_difference(sweep: Path) -> None:
    """And not one for each of its settings."""
    config = sweep / "a1/config.yaml"
    tree = yaml.safe_load(config.read_text())
    tree["stages"]["extra"] = {"diffusion_loss_weight": 0.3, "tokens": 10}
    config.write_text(yaml.safe_dump(tree, sort_keys=False))
    runs = find_runs([sweep / "a1", sweep / "a2"])
    assert differing_keys(runs) == ["stages"]
    assert list(group_runs(runs, ["stages"])) == [("ar+joint+extra",), ("ar+joint",)]


def test_two_noisy_copies_are_twice_the_noisy_rows(sweep: Path) -> None:
    config = sweep / "b1/config.yaml"
    config.write_text(config.read_text().replace("complementary: false", "complementary: true"))
    [run] = find_runs([sweep / "b1"])
    assert run.work(300) == 100 + 200 * (1 + 2 * 0.5)


def test_a_loss_that_is_not_finite_is_nan_in_the_table(sweep: Path) -> None:
    for folder in ("a1", "a2"):
        metrics = sweep / folder / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        lines[-1]["val_ar_loss"] = None
        metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = find_runs([sweep])
    assert "nan" in comparison_table(runs)
    _, curve = mean_curve([run for run in runs if run.folder.name.startswith("a")], "val_ar_loss")
    assert [math.isnan(value) for value in curve] == [False, True]


def test_a_run_that_is_not_finished_is_refused(sweep: Path) -> None:
    """Its last validation is of another step than the others'."""
    metrics = sweep / "b2/metrics.jsonl"
    lines = [line for line in metrics.read_text().splitlines() if json.loads(line)["step"] < 3]
    metrics.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"b2.*not finished: 200 tokens of 290"):
        find_runs([sweep])


def test_curves_are_over_work(sweep: Path) -> None:
    runs = group_runs(find_runs([sweep]), ["objective.noisy_fraction"])[("0.5",)]
    work, losses = mean_curve(runs, "val_diffusion_loss")
    assert work == [100 + 150, 100 + 300]
    assert losses == pytest.approx([5.45, 4.45])


def test_mean_and_error() -> None:
    mean, error = mean_and_error([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert error == pytest.approx(math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2 / 3))
    assert math.isnan(mean_and_error([1.0])[1])


def test_two_runs_of_one_seed_and_folders_without_runs_are_refused(sweep: Path, tmp_path: Path) -> None:
    write_run(sweep / "a1_again", seed=1, alpha=0.1)
    runs = find_runs([sweep])
    with pytest.raises(DataError, match=r"a1_again.*second run of seed 1"):
        group_runs(runs, differing_keys(runs))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"0 rows have run\.seed=7"):
        comparison_table(runs[1:], baseline={"run.seed": "7"})
    with pytest.raises(DataError, match="holds no run"):
        find_runs([tmp_path / "empty"])
    (sweep / "a1" / "metrics.jsonl").write_text('{"step": 1, "stage": "ar", "tokens": 1, "loss": 1.0}\n')
    with pytest.raises(DataError, match="holds no validation record"):
        find_runs([sweep / "a1"])


def test_the_script_prints_the_table_and_draws(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = sweep / "plot.png"
    assert compare_runs.main([str(sweep), "--by", "objective.noisy_fraction", "--plot", str(out)]) == 0
    assert capsys.readouterr().out.startswith("| noisy_fraction | seeds |")
    assert out.read_bytes().startswith(b"\x89PNG")
    assert compare_runs.main([str(sweep / "nothing")]) == 1
    assert "holds no run" in capsys.readouterr().err
