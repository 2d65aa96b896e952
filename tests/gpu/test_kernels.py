"""The head and the rotation of rope on a GPU against slow ways of computing them. Run by scripts/gpu_check.sh."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nld_train.model.head import chunk_rows, fused_linear_cross_entropy
from nld_train.model.rope import _Rotate

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch")


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_table", [False, True])
def test_rotation_equals_the_cpu(dtype: torch.dtype, has_table: bool) -> None:
    """Values and gradients at strides as Megatron gives them; one rounding in place of three."""
    generator = torch.Generator().manual_seed(0)
    num_rows, length, num_sequences, heads, dim = (200, 200 if has_table else 100, 3, 5, 96)
    x, grad = (torch.randn(num_rows, num_sequences, heads, 2 * dim, generator=generator).to(dtype) for _ in range(2))
    angles = torch.randn(length, num_sequences if has_table else 1, dim // 2, generator=generator).repeat(1, 1, 2)
    tables = angles.cos().to(dtype), angles.sin().to(dtype)
    results = []
    for device, kind in (("cuda", dtype), ("cpu", dtype), ("cpu", torch.float64)):
        leaf = x.to(device, kind)[..., :dim].requires_grad_()
        out = _Rotate.apply(leaf, *(table.to(device, kind) for table in tables))
        out.backward(grad.to(device, kind)[..., :dim])
        results.append([out.detach().cpu(), leaf.grad.cpu()])
    for ours, theirs, exact in zip(*results, strict=True):
        assert ours.is_contiguous()
        assert relative_error(ours, exact) <= 1.01 * relative_error(theirs, exact) + 1e-7


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
    rows = 2 * chunk_rows(dtype, torch.device("cuda")) + 77
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
