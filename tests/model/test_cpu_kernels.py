"""Attention of a few rows to a few keys, both ways, against the written-out softmax in double precision."""

import math
import platform
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nld_train.model import cpu_kernels
from nld_train.model.cpu_kernels import FLASH, PRODUCTS, Kernel, has_fast_bf16_products, kernel_for
from nld_train.platform.cpu import bf16_operands, cpu_info

SCALE = 0.3
KERNELS = {"flash": FLASH, "products": PRODUCTS}


def inputs(b: int, parts: int, rows: int, keys: int, dim: int) -> list[Tensor]:
    """Rows, keys, values (shared by the parts) and a gradient of the output, bf16."""
    generator = torch.Generator().manual_seed(b + rows)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    key, value = (draw(b, 1, keys, dim).expand(-1, parts, -1, -1) for _ in range(2))
    return [draw(b, parts, rows, dim), key, value, draw(b, parts, rows, dim)]


def some_mask(b: int | None, rows: int, keys: int) -> Tensor:
    """0 or -inf; every row sees its first key."""
    shape = (rows, keys) if b is None else (b, 1, rows, keys)
    hidden = torch.rand(shape, generator=torch.Generator().manual_seed(rows)) < 0.5
    hidden[..., 0] = False
    return torch.zeros(shape).masked_fill_(hidden, -math.inf)


def written_out(
    rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float = SCALE
) -> tuple[Tensor, Tensor]:
    scores = scale * rows @ keys.mT + (0.0 if mask is None else mask.double())
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Within what a rounding of the probabilities and of the result to bf16 brings."""
    assert found.shape == expected.shape
    assert (found.double() - expected).norm() <= 6e-3 * expected.norm()


@pytest.mark.parametrize("num_scores", [1 << 21, 1])  # all heads at once, and one by one
@pytest.mark.parametrize("of_mask", ["none", "shared", "own"])
@pytest.mark.parametrize(
    ("b", "parts", "rows", "keys", "dim"), [(3, 2, 40, 70, 16), (2, 1, 1, 1, 8), (1, 3, 65, 9, 24)]
)
@pytest.mark.parametrize("scale", [0.3, 0.25])  # the second is exact in bf16
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_values_and_gradients(
    kernel: Kernel,
    b: int,
    parts: int,
    rows: int,
    keys: int,
    dim: int,
    scale: float,
    of_mask: str,
    num_scores: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kernel.takes_all_keys:
        parts = 1
    monkeypatch.setattr(cpu_kernels, "_SCORES", num_scores)
    mask = None if of_mask == "none" else some_mask(b if of_mask == "own" else None, rows, keys)
    *given, grad = inputs(b, parts, rows, keys, dim)
    exact = [x.double().clone().requires_grad_() for x in given]
    expected, log_sum_exp = written_out(*exact, mask, scale)
    expected_grads = torch.autograd.grad(expected, exact, grad.double())

    of_kernel = None if mask is None else mask.to(kernel.mask_dtype(torch.bfloat16))
    if of_kernel is not None and kernel.takes_all_keys:
        of_kernel = of_kernel.view(-1, rows, keys)
    out, found_log_sum_exp = kernel.forward(*given, of_kernel, scale)
    assert out.dtype is torch.bfloat16
    assert_near(out, expected)
    if kernel.takes_all_keys:
        assert found_log_sum_exp.numel() == 0
        results: list[Tensor | None] = [None, None]
    else:
        torch.testing.assert_close(found_log_sum_exp.double(), log_sum_exp, rtol=0, atol=1e-4)
        results = [out, found_log_sum_exp]
    grads = kernel.backward(grad, *given, *results, of_kernel, scale)
    largest = max(x.norm() for x in expected_grads)
    for found, wanted in zip(grads, expected_grads, strict=True):
        assert found.dtype is torch.bfloat16
        assert (found.double() - wanted).norm() <= 6e-3 * max(wanted.norm(), 1e-2 * largest)


@pytest.mark.parametrize("num_scores", [1 << 21, 2 * 40 * 70, 1])  # the second cuts between heads of a sequence
@pytest.mark.parametrize("num_sequences", [1, 2])
def test_one_mask_serves_all_heads_of_a_sequence(
    num_sequences: int, num_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sequences of three key-value heads, four query heads folded into 40 rows; keys 0 to 59 are seen by all."""
    monkeypatch.setattr(cpu_kernels, "_SCORES", num_scores)
    *given, grad = inputs(6, 1, 40, 70, 16)
    mask = some_mask(num_sequences, 10, 10)[:, 0]
    whole = torch.nn.functional.pad(mask, (60, 0)).repeat(1, 4, 1).repeat_interleave(6 // num_sequences, 0)[:, None]
    exact = [x.double().clone().requires_grad_() for x in given]
    expected, _ = written_out(*exact, whole)
    out, _ = PRODUCTS.forward(*given, mask, SCALE)
    assert_near(out, expected)
    grads = PRODUCTS.backward(grad, *given, None, None, mask, SCALE)
    for found, wanted in zip(grads, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert (found.double() - wanted).norm() <= 6e-3 * wanted.norm()


def test_gradients_of_a_part_of_the_keys() -> None:
    """With the output and the log-sum-exp of all keys, the gradients of two parts are those of the whole."""
    *given, grad = inputs(2, 2, 50, 60, 16)
    rows, keys, values = given
    exact = [x.double().clone().requires_grad_() for x in given]
    expected, log_sum_exp = written_out(*exact, None)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    of_all = expected.detach().to(torch.bfloat16), log_sum_exp.detach().float()
    parts = [
        FLASH.backward(grad, rows, keys[:, :, part], values[:, :, part], *of_all, None, SCALE)
        for part in (slice(0, 25), slice(25, 60))
    ]
    assert_near(parts[0][0].double() + parts[1][0].double(), wanted[0])
    for of_parts, of_whole in zip(zip(*parts, strict=True), wanted, strict=True):
        if of_whole.shape != rows.shape:
            assert_near(torch.cat(of_parts, dim=2), of_whole)


def test_products_are_for_short_sequences_in_bf16_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "has_fast_bf16_products", lambda: True)
    assert kernel_for(torch.bfloat16, 2048) is PRODUCTS
    assert kernel_for(torch.bfloat16, 2049) is FLASH
    assert all(kernel_for(dtype, 8) is FLASH for dtype in (torch.float16, torch.float32, torch.float64))
    monkeypatch.setattr(cpu_kernels, "has_fast_bf16_products", lambda: False)
    assert kernel_for(torch.bfloat16, 8) is FLASH


@pytest.mark.parametrize(
    ("flags", "is_fast"),
    [
        ("avx512f avx512_bf16 avx512_vnni", False),  # Zen 4
        ("avx512f avx512_bf16 avx512_vnni avx_vnni", True),  # Zen 5
        ("avx512f amx_bf16 amx_tile", True),
        ("avx512f avx_vnni", False),
        ("", False),
    ],
)
def test_which_processors_multiply_bf16_fast(flags: str, is_fast: bool) -> None:
    assert cpu_kernels.multiplies_bf16_fast(frozenset(flags.split())) is is_fast
    if Path("/proc/cpuinfo").exists() and platform.machine() == "x86_64":
        assert {"fpu", "sse2"} <= cpu_info().flags


@pytest.mark.parametrize("scale", [0.3, 0.25])
def test_scores_are_not_rounded_to_bf16(scale: float) -> None:
    """Operands are bf16 values: where a CPU reads them as bf16 nothing is lost, and sums are fp32."""
    rows, keys, _, _ = inputs(1, 1, 64, 64, 64)
    with bf16_operands():
        found = cpu_kernels._probabilities(rows[:, 0], keys[:, 0], None, scale)
    exact = (scale * rows.double() @ keys.double().mT).softmax(-1)[:, 0]
    assert (found / exact - 1).abs().max() < 1e-4  # scores of up to 30: rounded to bf16 it would be 0.06
    assert isinstance(has_fast_bf16_products(), bool)


@pytest.mark.parametrize(("scale", "factor"), [(0.25, 0.25), (2.0, 2.0), (0.3, 1.0), (1 / math.sqrt(128), 1.0)])
def test_rows_are_scaled_where_that_rounds_nothing(scale: float, factor: float) -> None:
    assert cpu_kernels._exact_factor(scale) == factor
