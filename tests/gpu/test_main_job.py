"""The main job on a GPU, from the corpus to the exported checkpoint. Run by scripts/gpu_check.sh."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_main_job_on_a_gpu(tmp_path: Path, precision: str) -> None:
    """Both stages, checkpoint, export and the three decoding modes, as `make train` does it."""
    layers = "transformer_engine" if precision == "fp8" else "local"
    if precision == "fp8":
        from megatron.core.extensions.transformer_engine import HAVE_TE

        if not HAVE_TE or torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("FP8 is not here")
    run_dir = tmp_path / "run"
    subprocess.run(
        [
            sys.executable, "train.py", f"run.dir={run_dir}", f"data.cache_dir={tmp_path}/cache", "train.device=cuda",
            f"train.precision={precision}", f"model.layer_spec={layers}", "stages.ar.tokens=81920",
            "stages.joint.tokens=81920",
        ],
        cwd=ROOT, check=True, timeout=280,
    )  # fmt: skip
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [record["ar_loss"] for record in records if "ar_loss" in record]
    assert losses[-1] < losses[0] - 1
    assert (run_dir / "hf" / "config.json").is_file()
