"""The memory model against torch's own count on a GPU, run by scripts/gpu_check.sh; a process for each step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nld_train.testing.jobs import ROOT, importing_project

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch")

PROGRAM = """
import json, sys, torch
from nld_train.config.memory import estimate_memory
from nld_train.config.schema import *
from nld_train.config.workload import workload
from nld_train.platform.device import initialize_device
from nld_train.platform.topology import topology_of
from nld_train.testing.memory import measured_peak
from nld_train.testing.steps import StepCase, tiny_model, tiny_recipe

if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    platform = initialize_device(Device.cuda)
    model = tiny_model(
        num_layers=settings["layers"], hidden_size=2048, ffn_hidden_size=6144, num_attention_heads=16,
        num_key_value_heads=4, head_dim=128, vocab_size=settings["vocab"],
    )
    objective = tiny_recipe(
        block_size=32, noisy_fraction=settings["fraction"], sampler=Sampler.uniform_count, stratify=Stratify.batch
    )
    length, num_samples, micro = settings["length"], 8, settings["micro"]
    precision = Precision(settings["precision"])
    generator = torch.Generator().manual_seed(0)
    case = StepCase(
        samples=torch.randint(4, model.vocab_size, (num_samples, length + 1), generator=generator), model=model,
        objective=objective, diffusion_loss_weight=settings["alpha"], micro_batch_size=micro,
        dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[precision.value],
    )
    config = Config(
        model=model, objective=objective, data=DataConfig(corpus="stdlib", sequence_length=length),
        stages={"s": StageConfig(diffusion_loss_weight=settings["alpha"], tokens=1, lr=1.0, min_lr=0.1)},
    )
    config.train.global_batch_size = num_samples
    parallel = ParallelConfig(recompute_granularity=Recompute(settings["recompute"]))
    (rank,) = estimate_memory(
        model, parallel, precision, workload(config, "s"), micro_batch_size=micro, data_parallel_size=1
    )
    with topology_of(parallel, platform, seed=1) as topology:
        peak = measured_peak(topology, platform, case, parallel)
    print(json.dumps({"estimated": rank.total, "measured": peak, "parts": rank.bytes_of}))
"""

PLAIN = {
    "layers": 8, "vocab": 32768, "length": 2048, "micro": 2, "alpha": 0.3, "fraction": 1.0, "precision": "bf16",
    "recompute": "none",
}  # fmt: skip
CASES = {
    "joint": {},
    "ar": {"alpha": 0.0, "length": 4096},
    "half of the blocks": {"fraction": 0.5},
    "fp32": {"precision": "fp32"},
    "long": {"length": 8192, "micro": 1},
    "large vocabulary": {"vocab": 131072, "layers": 4},
    "recomputed": {"recompute": "full", "length": 4096},
    "recomputed attention and norms": {"recompute": "selective", "length": 4096},
}


@pytest.mark.parametrize("name", CASES)
def test_peak_is_as_estimated(tmp_path: Path, name: str) -> None:
    """Within 15% of the largest number of allocated bytes in a whole step."""
    program = tmp_path / "peak.py"
    program.write_text(PROGRAM)
    finished = subprocess.run(
        [sys.executable, str(program), json.dumps(PLAIN | CASES[name])],
        cwd=ROOT,
        env=importing_project(),
        check=True,
        timeout=280,
        stdout=subprocess.PIPE,
        text=True,
    )
    found = json.loads(finished.stdout.splitlines()[-1])
    ratio = found["estimated"] / found["measured"]
    parts = ", ".join(f"{part} {size / 2**30:.2f}" for part, size in found["parts"].items() if size)
    print(f"{name}: estimated {ratio:.3f} of the measured {found['measured'] / 2**30:.2f} GB ({parts})")
    assert 0.85 <= ratio <= 1.15, found
