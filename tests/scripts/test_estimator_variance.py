"""The script that measures the samplers, on a run of two steps."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.estimator_variance import main

ROOT = Path(__file__).parents[2]
ON_CPU = os.environ | {"CUDA_VISIBLE_DEVICES": ""}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=ON_CPU, capture_output=True, text=True, timeout=200, check=False
    )


def test_table_of_a_tiny_run(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    trained = run(
        "train.py",
        *("experiment=ablation/ar_loss", f"run.dir={run_dir}", f"data.cache_dir={cache}", "export.enabled=false"),
        *("model.num_layers=1", "model.hidden_size=16", "model.ffn_hidden_size=24", "model.num_attention_heads=2"),
        *("model.num_key_value_heads=1", "model.head_dim=8", "model.vocab_size=512", "data.sequence_length=64"),
        *("objective.block_size=8", "stages.ar.tokens=256", "stages.joint.tokens=256", "train.validation_samples=4"),
    )
    assert trained.returncode == 0, trained.stderr
    names = ["bernoulli (recipe)", "power_count, stratified", "power_count, stratified, fraction 0.5"]
    script = ["scripts/estimator_variance.py", str(run_dir), "--sequences", "4"]
    measured = run(*script, "--draws", "30", "--only", *names)
    assert measured.returncode == 0, measured.stderr
    rows = [line.strip("| ").split(" | ") for line in measured.stdout.splitlines()]
    assert [row[0] for row in rows[2:]] == names
    assert rows[2][2:4] == ["1.000", "1.000"]
    # The losses agree, the noise does not: an untrained model has one loss for every token, ln 512 or so.
    losses = [tuple(map(float, re.split(" ± ", row[1]))) for row in rows[2:]]
    for loss, error in losses[1:]:
        assert abs(loss - losses[0][0]) < 4.5 * (error**2 + losses[0][1] ** 2) ** 0.5
    assert float(rows[3][2]) < 0.15
    assert [row[5] for row in rows[2:]] == ["1.00", "1.00", "0.50"]
    assert float(rows[2][6]) > float(rows[3][6])

    # Refused before anything is measured, so that these need no process of their own.
    assert main([str(run_dir), "--only", "nothing"]) == 1
    assert "'nothing' is unknown" in capsys.readouterr().err
    assert main([str(tmp_path / "none")]) == 1
    assert "none" in capsys.readouterr().err
