"""The CUDA paths against slow ones: attention, the head, one joint step, the main job. Run by scripts/gpu_check.sh.

Each step runs in a process of its own: the CPU half of a comparison needs the compatibility mode, the CUDA half must
not have it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from nld_train.config.schema import AttentionBackend
from nld_train.model import attention as attention_module
from nld_train.model.attention import joint_attention
from nld_train.model.head import CHUNK_ROWS, fused_linear_cross_entropy
from nld_train.objective.losses import LossTerms
from nld_train.objective.noise import NoiseSpec, corrupt
from nld_train.objective.sequence import SequenceLayout, build_joint_batch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch")

STEP_PROGRAM = """
import json, sys, torch
from nld_train.config.schema import Device, ParallelConfig, Sampler, Stratify
from nld_train.platform.device import initialize_device
from nld_train.platform.topology import topology_of
from nld_train.testing.steps import StepCase, run_step, tiny_model

if __name__ == "__main__":
    device, objective, rows, weights, out = sys.argv[1:]
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
    initial = {} if weights == "-" else torch.load(weights)
    results = {}
    with topology_of(ParallelConfig(), platform, seed=1) as topology:
        for dtype in (torch.float32, torch.bfloat16):
            case.dtype = torch.float64 if initial else dtype
            result = run_step(topology, platform, case, ParallelConfig(), initial.get(dtype))
            results[dtype] = {
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What makes a layout with a table: lengths of documents and supervised ranges, one list for each sequence."""

    length: int = 512
    documents: list[list[int]] | None = None
    supervised: list[list[range]] | None = None
    noisy_fraction: float = 1.0
    complementary: bool = False
    is_noisy: bool = True

    def layout(self) -> SequenceLayout:
        tokens = torch.arange(4, 4 + self.length).repeat(2, 1)
        starts = is_supervised = corruption = None
        if self.documents is not None:
            starts = torch.tensor([[sum(d[:i]) for i, n in enumerate(d) for _ in range(n)] for d in self.documents])
        if self.supervised is not None:
            is_supervised = torch.zeros_like(tokens, dtype=torch.bool)
            for sequence, ranges in enumerate(self.supervised):
                for part in ranges:
                    is_supervised[sequence, part.start : part.stop] = True
        if self.is_noisy:
            spec = NoiseSpec(
                mask_token_id=3, eps=1e-3, seed=0, block_size=32, noisy_fraction=self.noisy_fraction,
                complementary=self.complementary,
            )  # fmt: skip
            corruption = corrupt(tokens, torch.arange(2), spec, is_supervised, starts)
        labels, loss_mask = tokens, torch.ones_like(tokens)
        return build_joint_batch(tokens, labels, loss_mask, corruption, 32, document_starts=starts).layout


DOCUMENTS = [[100, 1, 211, 200], [512]]
TABLES = {
    "documents": Rows(documents=DOCUMENTS),
    "documents, no noisy rows": Rows(documents=DOCUMENTS, is_noisy=False),
    "fraction": Rows(noisy_fraction=0.5),
    "complementary": Rows(complementary=True),
    "supervised": Rows(supervised=[[range(400, 512)], [range(40, 60), range(70, 71)]]),
    "nothing supervised in one": Rows(supervised=[[range(300, 512)], []]),
    "no multiple of a tile": Rows(length=200, documents=[[77, 123], [200]]),
    "everything": Rows(
        documents=DOCUMENTS, supervised=[[range(90, 512)], [range(300, 420)]], noisy_fraction=0.5, complementary=True
    ),
}
HAVE_PADDING = {"supervised", "nothing supervised in one", "everything"}


def attend(layout: SequenceLayout, backend: AttentionBackend, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of query, key and value; padding rows get no gradient, as in a step."""
    *leaves, grad = (x.to(dtype) for x in inputs)
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = joint_attention(*leaves, layout, backend)
    if layout.table is not None:
        grad = grad * (layout.table.blocks >= -1)[:, None, :, None]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def attention_inputs(layout: SequenceLayout, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, layout.num_rows, 64) for heads in (4, 2, 2, 4)]
    return [torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes]


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 2e-2)])
def test_flex_under_a_table_equals_dense(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Values and gradients, against the dense kernel in float64 on the same device."""
    layout = TABLES[name].layout().to(torch.device("cuda"))
    assert layout.table is not None
    assert bool((layout.table.blocks < -1).any()) == (name in HAVE_PADDING)
    inputs = attention_inputs(layout, dtype)
    found = attend(layout, AttentionBackend.flex, inputs, dtype)
    expected = attend(layout, AttentionBackend.dense, inputs, torch.float64)
    for what, a, b in zip(("out", "query", "key", "value"), found, expected, strict=True):
        assert a.dtype == dtype
        assert relative_error(a, b) < tolerance, what


def test_other_numbers_of_rows_do_not_compile_again() -> None:
    """A supervised stage has another N in most micro-batches: after a few of them nothing is compiled any more."""
    torch._dynamo.reset()
    attention_module._compiled_flex_attention.cache_clear()
    compiled = []
    # Beyond the limit torch would quietly go on without the compiler, and write out all scores.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for num_supervised in (200, 500, 100, 300, 400, 1, 1000, 700, 900, 600, 128, 800):
            rows = Rows(length=1024, supervised=[[range(num_supervised)], [range(num_supervised // 2)]])
            layout = rows.layout().to(torch.device("cuda"))
            inputs = attention_inputs(layout, torch.bfloat16)
            found = attend(layout, AttentionBackend.flex, inputs, torch.bfloat16)
            expected = attend(layout, AttentionBackend.dense, inputs, torch.float64)
            for a, b in zip(found, expected, strict=True):
                assert relative_error(a, b) < 2e-2, num_supervised
            compiled.append(counters["stats"]["unique_graphs"])
    assert compiled[0] > 0
    assert compiled[-1] - compiled[0] <= 3, compiled
    assert compiled[-1] == compiled[3], compiled


# ------------------------------------------------------------------------------------------------------------ the head

HeadInputs = tuple[Tensor, Tensor, Tensor, Tensor]


def head_inputs(rows: int, vocab: int, hidden: int, dtype: torch.dtype) -> HeadInputs:
    """hidden, weight (leaves), targets, row weights."""
    generator = torch.Generator().manual_seed(rows)
    states = torch.randn(rows, hidden, generator=generator)
    weight = torch.randn(vocab, hidden, generator=generator) * 0.1
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator, dtype=torch.float64) * 5
    leaves = (x.to("cuda", dtype).requires_grad_() for x in (states, weight))
    return (*leaves, targets.cuda(), weights.cuda())


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> list[Tensor]:
    """Loss and gradients by autograd, those of the weight added to an fp32 buffer (fp64 for fp64 inputs)."""
    kind = torch.promote_types(hidden.dtype, torch.float32)
    main_grad = torch.zeros(weight.shape, dtype=kind, device=weight.device)
    losses = F.cross_entropy((hidden @ weight.t()).to(kind), targets, reduction="none")
    loss = (losses * weights.to(kind)).sum()
    loss.backward()
    main_grad.add_(weight.grad)
    return [loss.detach(), hidden.grad, main_grad]


def fused(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, num_parts: int = 1) -> list[Tensor]:
    """The same by the head, in several micro-batches."""
    main_grad = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    weight.main_grad = main_grad  # type: ignore[attr-defined]
    losses = []
    for part in torch.arange(len(targets), device=targets.device).chunk(num_parts):
        chosen = slice(int(part[0]), int(part[-1]) + 1)
        loss, _, _ = fused_linear_cross_entropy(hidden[chosen], weight, targets[chosen], weights[chosen])
        loss.backward()
        losses.append(loss.detach())
        assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
        weight.grad = None
    return [torch.stack(losses).sum(), hidden.grad, main_grad]


def copies(inputs: HeadInputs, dtype: torch.dtype) -> HeadInputs:
    hidden, weight = (x.detach().to(dtype, copy=True).requires_grad_() for x in inputs[:2])
    return hidden, weight, *inputs[2:]


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_collects_the_gradients_of_full_logits(dtype: torch.dtype, num_parts: int) -> None:
    """Several chunks of rows, the last not full, and several of the vocabulary."""
    rows = 2 * CHUNK_ROWS["cuda"] + 77
    inputs = head_inputs(rows, 20011, 256, dtype)
    exact = full_logits(*copies(inputs, torch.float64))
    found = fused(*copies(inputs, dtype), num_parts=num_parts)
    naive = full_logits(*copies(inputs, dtype))
    for what, ours, theirs, expected in zip(("loss", "hidden", "weight"), found, naive, exact, strict=True):
        error = relative_error(ours, expected)
        if dtype is torch.float32:
            assert error < 1e-5, f"{what}: {error:.1e}"
        else:  # both round the logits alike; 1% for sums in another order
            assert error <= 1.01 * relative_error(theirs, expected) + 1e-6, f"{what}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_needs_a_third_of_the_memory_of_full_logits(dtype: torch.dtype) -> None:
    """Peak of loss and gradients, with the weight and its fp32 gradient buffer."""

    def peak(compute: Callable[..., list[Tensor]]) -> int:
        inputs = head_inputs(2048, 131072, 1024, dtype)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        compute(*inputs)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    for compute in (fused, full_logits):
        compute(*head_inputs(32, 64, 64, dtype))  # workspaces of cuBLAS, which both have
    torch.cuda.empty_cache()
    ours, naive = peak(fused), peak(full_logits)
    print(f"{ours / 2**20:.0f} MiB, full logits {naive / 2**20:.0f} MiB")
    assert ours <= 0.35 * naive, f"{ours / 2**20:.0f} MiB, full logits {naive / 2**20:.0f} MiB"


HEAD_PROGRAM = """
import sys, torch
from nld_train.model.head import fused_linear_cross_entropy

hidden, weight = (torch.randn(16, 16, device="cuda").requires_grad_() for _ in range(2))
weight.main_grad = torch.zeros_like(weight)
targets, weights = torch.arange(16, device="cuda"), torch.ones(16, device="cuda")
loss, _, _ = fused_linear_cross_entropy(hidden, weight, targets, weights)
(loss * float(sys.argv[1])).backward()
torch.cuda.synchronize()
"""


@pytest.mark.parametrize(("scale", "is_refused"), [("1.0", False), ("0.5", True)])
def test_head_stops_the_device_at_a_scaled_loss(scale: str, is_refused: bool) -> None:
    """In a process of its own: an assertion on the device ends every use of it."""
    result = subprocess.run(
        [sys.executable, "-c", HEAD_PROGRAM, scale], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert (result.returncode != 0) == is_refused, result.stderr
    assert ("device-side assert" in result.stderr) == is_refused, result.stderr


# ------------------------------------------------------------------------------------------------------------ the step


@pytest.mark.parametrize(
    ("objective", "rows"),
    [
        ({}, "plain"),
        ({"sampler": "power_count", "stratify": "batch", "noisy_fraction": 0.5}, "plain"),
        (
            {"sampler": "power_count", "stratify": "batch", "noisy_fraction": 0.5, "complementary": True},
            "documents_and_gaps",
        ),
    ],
    ids=["recipe", "power_count", "everything"],
)
def test_joint_step_equals_the_cpu(tmp_path: Path, objective: dict[str, object], rows: str) -> None:
    """Sums and every gradient of a step on CUDA, in fp32 and bf16, against the same weights in float64 on the CPU."""
    program = tmp_path / "step.py"
    program.write_text(STEP_PROGRAM)

    def run(device: str, weights: str, out: str, hide_gpu: bool = False) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | ({"CUDA_VISIBLE_DEVICES": ""} if hide_gpu else {})
        arguments = [device, json.dumps(objective), rows, weights, out]
        subprocess.run([sys.executable, str(program), *arguments], cwd=ROOT, env=environment, check=True, timeout=280)

    run("cuda", "-", str(tmp_path / "cuda.pt"))
    found = torch.load(tmp_path / "cuda.pt")
    torch.save({dtype: result["parameters"] for dtype, result in found.items()}, tmp_path / "weights.pt")
    run("cpu", str(tmp_path / "weights.pt"), str(tmp_path / "cpu.pt"), hide_gpu=True)
    expected = torch.load(tmp_path / "cpu.pt")
    for dtype, tolerance in ((torch.float32, 5e-3), (torch.bfloat16, 5e-2)):
        assert_same_terms(found[dtype], expected[dtype], tolerance)
        for name, gradient in expected[dtype]["gradients"].items():
            error = relative_error(found[dtype]["gradients"][name], gradient)
            assert error < tolerance, f"{dtype}, {name}: {error:.1e}"


def assert_same_terms(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Losses within the tolerance, counts and weights exactly, correct predictions but for near ties."""
    ours, theirs = (LossTerms.from_vector(x["terms"], x["largest_weight"]) for x in (found, expected))
    assert theirs.num_masked > 0
    for item in fields(LossTerms):
        a, b = getattr(ours, item.name), getattr(theirs, item.name)
        if item.name in ("loss_sum", "ar_sum", "diffusion_sum", "bucket_sum"):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=0, msg=item.name)
        elif item.name.endswith("_correct"):
            counted = theirs.ar_count if item.name == "ar_correct" else theirs.bucket_count
            assert ((a - b).abs() <= 1 + tolerance * counted).all(), item.name
        else:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0, msg=item.name)


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
