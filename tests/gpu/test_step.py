"""Steps on a GPU by every kind of layer against the CPU, and what the host waits for in them. Run by
scripts/gpu_check.sh.

Each step runs in a process of its own: the CPU half of a comparison needs the compatibility mode, the CUDA half must
not have it.
"""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nld_train.objective.losses import LossTerms
from nld_train.testing.jobs import ROOT, importing_project

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch")


STEP_PROGRAM = """
import json, sys, torch
from nld_train.config.schema import Device, LayerSpec, ParallelConfig, Sampler, Stratify
from nld_train.platform.device import initialize_device
from nld_train.platform.topology import topology_of
from nld_train.testing.steps import StepCase, run_step, tiny_model

if __name__ == "__main__":
    device, layers, objective, rows, weights, out = sys.argv[1:]
    platform = initialize_device(Device(device))
    model = tiny_model(head_dim=64, hidden_size=128, num_attention_heads=4)
    samples = torch.randint(4, model.vocab_size, (4, 257), generator=torch.Generator().manual_seed(0))
    case = StepCase(samples=samples, model=model, micro_batch_size=2)
    case.objective.block_size = 32
    for name, value in json.loads(objective).items():
        setattr(case.objective, name, {"sampler": Sampler, "stratify": Stratify}.get(name, lambda x: x)(value))
    if rows == "documents_and_gaps":
        case.document_starts = torch.zeros(4, 256, dtype=torch.int64)
        case.document_starts[1, 100:] = 100
        case.document_starts[2, 33:] = 33
        case.is_supervised = torch.ones(4, 256, dtype=torch.bool)
        case.is_supervised[0, :200] = False
        case.is_supervised[3, 7:250] = False
    if rows == "ar":
        case.diffusion_loss_weight = 0.0
    initial = {} if weights == "-" else torch.load(weights)
    kinds = [("local", torch.float32), ("local", torch.bfloat16)]
    if not initial:  # the reference is computed by Megatron's own layers
        kinds += [(name, torch.bfloat16) for name in json.loads(layers)]
    results = {}
    with topology_of(ParallelConfig(), platform, seed=1) as topology:
        for layers, dtype in kinds:
            model.layer_spec = LayerSpec.local if layers == "local" else LayerSpec.transformer_engine
            case.is_fp8 = layers == "fp8"
            case.dtype = torch.float64 if initial else dtype
            result = run_step(topology, platform, case, ParallelConfig(), initial.get(dtype))
            results[layers, dtype] = {
                "terms": result.terms.to_vector().cpu(),
                "largest_weight": result.terms.largest_weight.cpu(),
                "gradients": {name: value.float().cpu() for name, value in result.gradients.items()},
                "parameters": {name: value.float().cpu() for name, value in result.parameters.items()},
            }
    torch.save(results, out)
"""


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm()).item()


OBJECTIVES: dict[str, tuple[dict[str, object], str]] = {
    "recipe": ({}, "plain"),
    "power_count": ({"sampler": "power_count", "stratify": "batch", "noisy_fraction": 0.5}, "plain"),
    "everything": (
        {"sampler": "power_count", "stratify": "batch", "noisy_fraction": 0.5, "complementary": True},
        "documents_and_gaps",
    ),
    "ar": ({}, "ar"),
}
TOLERANCES = {
    ("local", torch.float32): 5e-3,
    ("local", torch.bfloat16): 5e-2,
    ("transformer_engine", torch.bfloat16): 5e-2,
    # e4m3 rounds to 2^-4, e5m2 (of gradients) to 2^-3; in two layers.
    ("fp8", torch.bfloat16): 0.3,
}


def other_layers() -> list[str]:
    """What can be used here besides Megatron's own layers."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if not HAVE_TE:
        return []
    return ["transformer_engine", *(["fp8"] if torch.cuda.get_device_capability() >= (8, 9) else [])]


def run_program(program: Path, *arguments: str, hide_gpu: bool = False) -> None:
    environment = importing_project() | ({"CUDA_VISIBLE_DEVICES": ""} if hide_gpu else {})
    subprocess.run([sys.executable, str(program), *arguments], cwd=ROOT, env=environment, check=True, timeout=280)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_step_equals_the_cpu(tmp_path: Path, objective: str) -> None:
    """Sums and every gradient of a step on CUDA, in fp32 and bf16, by all kinds of layers that are there, against the
    same weights in float64 on the CPU."""
    program = tmp_path / "step.py"
    program.write_text(STEP_PROGRAM)
    values, rows = OBJECTIVES[objective]
    case = [json.dumps(other_layers()), json.dumps(values), rows]
    run_program(program, "cuda", *case, "-", str(tmp_path / "cuda.pt"))
    found = torch.load(tmp_path / "cuda.pt")
    weights = {dtype: found["local", dtype]["parameters"] for dtype in (torch.float32, torch.bfloat16)}
    torch.save(weights, tmp_path / "weights.pt")
    run_program(program, "cpu", *case, str(tmp_path / "weights.pt"), str(tmp_path / "cpu.pt"), hide_gpu=True)
    by_dtype = torch.load(tmp_path / "cpu.pt")
    assert len(found) == 2 + len(other_layers())
    for (layers, dtype), result in found.items():
        expected, tolerance = by_dtype["local", dtype], TOLERANCES[layers, dtype]
        assert all(torch.equal(value, weights[dtype][name]) for name, value in result["parameters"].items())
        assert_same_terms(result, expected, min(tolerance, 5e-2), has_masks=objective != "ar")
        errors = {
            name: relative_error(result["gradients"][name], gradient)
            for name, gradient in expected["gradients"].items()
        }
        print(layers, dtype, {name: f"{error:.1e}" for name, error in errors.items()})
        assert max(errors.values()) < tolerance, f"{layers}, {dtype}: {errors}"
        if layers == "fp8":  # bf16 alone is some 0.5%
            assert errors["decoder.layers.0.mlp.linear_fc1.weight"] > 1.5e-2, "the products did not read FP8"


TRAINING_PROGRAM = """
import sys, torch
from nld_train.config.schema import Device, LayerSpec, OptimConfig, ParallelConfig
from nld_train.platform.device import initialize_device
from nld_train.platform.topology import topology_of
from nld_train.testing.steps import StepCase, run_step, tiny_model

if __name__ == "__main__":
    platform = initialize_device(Device.cuda)
    model = tiny_model(head_dim=64, hidden_size=128, num_attention_heads=4, num_layers=3)
    samples = torch.randint(4, model.vocab_size, (4, 257), generator=torch.Generator().manual_seed(0))
    losses = {}
    with topology_of(ParallelConfig(), platform, seed=1) as topology:
        for layers in ("local", *sys.argv[2:]):
            for num_steps in (1, 12):
                case = StepCase(samples=samples, model=model, micro_batch_size=2, dtype=torch.bfloat16)
                case.objective.block_size = 32
                case.num_optimizer_steps, case.lr, case.optim = num_steps, 3e-3, OptimConfig()
                model.layer_spec = LayerSpec.local if layers == "local" else LayerSpec.transformer_engine
                case.is_fp8 = layers == "fp8"
                losses[layers, num_steps] = float(run_step(topology, platform, case, ParallelConfig()).terms.loss_sum)
    torch.save(losses, sys.argv[1])
"""


@pytest.mark.skipif(not torch.cuda.is_available() or not other_layers(), reason="Transformer Engine is not installed")
def test_other_layers_learn_as_fast(tmp_path: Path) -> None:
    """Several steps of two micro-batches: FP8 copies of weights are renewed in each, gradients are added up once."""
    program = tmp_path / "training.py"
    program.write_text(TRAINING_PROGRAM)
    run_program(program, str(tmp_path / "losses.pt"), *other_layers())
    losses = torch.load(tmp_path / "losses.pt")
    print(losses)
    learned = losses["local", 1] - losses["local", 12]
    assert learned > 0.04 * losses["local", 1]
    for layers in other_layers():
        share = {"transformer_engine": 0.15, "fp8": 0.3}[layers]  # a stale weight learns nothing
        assert abs(losses[layers, 12] - losses["local", 12]) < share * learned, losses


WAITING_PROGRAM = """
import sys, torch
from nld_train.config.schema import Device, LayerSpec, ParallelConfig
from nld_train.platform.device import initialize_device
from nld_train.platform.topology import topology_of
from nld_train.testing.steps import StepCase, loader_batches, tiny_model
from nld_train.model.build import build_chunks
from nld_train.training.run import connect, wrap_data_parallel
from nld_train.training.step import LossWeights, StepShape, run_microbatches

def run(platform, topology, layers, fraction, alpha):
    spec = LayerSpec.local if layers == "local" else LayerSpec.transformer_engine
    shape = tiny_model(head_dim=64, hidden_size=128, num_attention_heads=4, layer_spec=spec)
    samples = torch.randint(4, shape.vocab_size, (6, 257), generator=torch.Generator().manual_seed(0))
    case = StepCase(samples=samples, model=shape, micro_batch_size=2, diffusion_loss_weight=alpha)
    case.objective.block_size, case.objective.noisy_fraction = 32, fraction
    (model,) = build_chunks(
        shape, ParallelConfig(), dtype=torch.bfloat16, device=platform.device, seed=1, is_fp8=layers == "fp8"
    )
    wrapped = wrap_data_parallel(model, overlap_grad_reduce=True, use_distributed_optimizer=False)
    connect([wrapped], None)
    finalize = wrapped.config.finalize_model_grads_func
    was_refusing = []

    def after_the_last_backward(*args, **kwargs):  # Megatron 0.16 asks for the number of tokens there
        was_refusing.append(torch.cuda.get_sync_debug_mode())
        torch.cuda.set_sync_debug_mode("default")
        return finalize(*args, **kwargs)

    wrapped.config.finalize_model_grads_func = after_the_last_backward
    for turn in range(3):  # kernels are compiled, and tables built, in the first
        wrapped.zero_grad_buffer()
        batches = loader_batches(case, topology)
        torch.cuda.synchronize()
        if turn == 2:
            torch.cuda.set_sync_debug_mode("error")
        run_microbatches(
            iter(batches), [wrapped], StepShape(num_microbatches=3, micro_batch_size=2, num_rows=None),
            objective=case.objective, weights=LossWeights(diffusion=alpha), device=platform.device,
        )
    assert was_refusing == [0, 0, 2], was_refusing


if __name__ == "__main__":
    platform = initialize_device(Device.cuda)
    with topology_of(ParallelConfig(), platform, seed=1) as topology:
        for fraction, alpha in ((1.0, 0.3), (0.5, 0.3), (1.0, 0.0)):
            run(platform, topology, sys.argv[1], fraction, alpha)
    try:  # the check itself: a question is refused
        torch.cuda.set_sync_debug_mode("error")
        torch.ones((), device="cuda").item()
    except RuntimeError:
        sys.exit(0)
    sys.exit("a question was not refused")
"""


@pytest.mark.parametrize("layers", ["local", "transformer_engine", "fp8"])
def test_the_host_waits_for_nothing(tmp_path: Path, layers: str) -> None:
    """Between the first forward and the last backward pass of a step; CUDA refuses what would wait."""
    if layers not in ("local", *other_layers()):
        pytest.skip(f"{layers}: not here")
    program = tmp_path / "waiting.py"
    program.write_text(WAITING_PROGRAM)
    run_program(program, layers)


def assert_same_terms(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, *, has_masks: bool
) -> None:
    """Losses within the tolerance, counts and weights exactly, correct predictions but for near ties."""
    ours, theirs = (LossTerms.from_vector(x["terms"], x["largest_weight"]) for x in (found, expected))
    assert (theirs.num_masked > 0) == has_masks
    for item in fields(LossTerms):
        a, b = getattr(ours, item.name), getattr(theirs, item.name)
        if item.name in ("loss_sum", "ar_sum", "diffusion_sum", "bucket_sum"):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=0, msg=item.name)
        elif item.name.endswith("_correct"):
            counted = theirs.ar_count if item.name == "ar_correct" else theirs.bucket_count
            assert ((a - b).abs() <= 1 + tolerance * counted).all(), item.name
        else:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0, msg=item.name)
