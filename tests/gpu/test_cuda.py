"""The CUDA paths against the CPU's: attention, one joint step, the main job. Run by scripts/gpu_check.sh.

Each step runs in a process of its own: the CPU half of a comparison needs the compatibility mode, the CUDA half must
not have it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nld_train.config.schema import AttentionBackend
from nld_train.model.attention import joint_attention
from nld_train.objective.sequence import SequenceLayout

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch")

STEP_PROGRAM = """
import sys, torch
from nld_train.config.schema import Device, ParallelConfig
from nld_train.platform.device import initialize_device
from nld_train.platform.topology import topology_of
from nld_train.testing.steps import StepCase, run_step, tiny_model

if __name__ == "__main__":
    device, dtype, weights, out = sys.argv[1:]
    platform = initialize_device(Device(device))
    model = tiny_model(head_dim=64, hidden_size=128, num_attention_heads=4)
    samples = torch.randint(4, model.vocab_size, (4, 257), generator=torch.Generator().manual_seed(0))
    case = StepCase(samples=samples, model=model, micro_batch_size=2, dtype=getattr(torch, dtype))
    case.objective.block_size = 32
    with topology_of(ParallelConfig(), platform, seed=1) as topology:
        initial = None if weights == "-" else torch.load(weights)
        result = run_step(topology, platform, case, ParallelConfig(), initial)
    torch.save(
        {
            "terms": result.terms.to_vector().cpu(),
            "gradients": {name: value.float().cpu() for name, value in result.gradients.items()},
            "parameters": {name: value.float().cpu() for name, value in result.parameters.items()},
        },
        out,
    )
"""


@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=["mha", "gqa"])
@pytest.mark.parametrize("has_noisy_half", [True, False], ids=["joint", "causal"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 2e-2)])
def test_flex_equals_dense(heads: tuple[int, int], has_noisy_half: bool, dtype: torch.dtype, tolerance: float) -> None:
    """Values and gradients, against the dense reference in float64 on the CPU."""
    layout = SequenceLayout(512, 32, has_noisy_half=has_noisy_half)
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, count, layout.num_rows, 64) for count in (heads[0], heads[1], heads[1], heads[0])]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    results = []
    for backend, device, kind in (
        (AttentionBackend.flex, "cuda", dtype),
        (AttentionBackend.dense, "cpu", torch.float64),
    ):
        query, key, value, grad = (x.to(device=device, dtype=kind) for x in inputs)
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        out = joint_attention(*leaves, layout, backend)
        out.backward(grad)
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for found, expected in zip(*results, strict=True):
        assert found is not None
        assert expected is not None
        difference = (found.cpu().double() - expected).norm() / expected.norm()
        assert difference < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 5e-3), ("bfloat16", 5e-2)])
def test_joint_step_equals_the_cpu(tmp_path: Path, dtype: str, tolerance: float) -> None:
    """Loss sums and every gradient of a step on CUDA against the same weights in float64 on the CPU."""
    program = tmp_path / "step.py"
    program.write_text(STEP_PROGRAM)

    def run(*arguments: str, hide_gpu: bool = False) -> None:
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if hide_gpu else {})
        subprocess.run([sys.executable, str(program), *arguments], cwd=ROOT, env=environment, check=True, timeout=280)

    run("cuda", dtype, "-", str(tmp_path / "cuda.pt"))
    found = torch.load(tmp_path / "cuda.pt")
    torch.save(found["parameters"], tmp_path / "weights.pt")
    run("cpu", "float64", str(tmp_path / "weights.pt"), str(tmp_path / "cpu.pt"), hide_gpu=True)
    expected = torch.load(tmp_path / "cpu.pt")
    torch.testing.assert_close(found["terms"], expected["terms"], rtol=tolerance, atol=0)
    for name, gradient in expected["gradients"].items():
        difference = (found["gradients"][name] - gradient).norm() / gradient.norm()
        assert difference < tolerance, f"{name}: {difference:.1e}"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_main_job_on_a_gpu(tmp_path: Path, precision: str) -> None:
    """Both stages, checkpoint, export and the three decoding modes, as `make train` does it."""
    run_dir = tmp_path / "run"
    subprocess.run(
        [
            sys.executable, "train.py", f"run.dir={run_dir}", f"data.cache_dir={tmp_path}/cache", "train.device=cuda",
            f"train.precision={precision}", "stages.ar.tokens=81920", "stages.joint.tokens=81920",
        ],
        cwd=ROOT, check=True, timeout=280,
    )  # fmt: skip
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [record["ar_loss"] for record in records if "ar_loss" in record]
    assert losses[-1] < losses[0] - 1
    assert (run_dir / "hf" / "config.json").is_file()
