"""Where a profiled step's time is said to go (nld_train.testing.benchmarks.profile)."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from nld_train.testing.benchmarks.profile import _OPTIMIZER, _STEP, PARTS, part_of, shares


@pytest.mark.parametrize(
    ("kernel", "around", "part"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", ["aten::mm"], "matrix products"),
        ("aten::mm", ["aten::mm", "aten::matmul"], "matrix products"),
        ("sm90_xmma_gemm_bf16", ["aten::mm", "_FusedLinearCrossEntropy"], "head's products"),
        ("vectorized_elementwise_kernel", ["aten::exp_", "_FusedLinearCrossEntropy"], "head, the rest"),
        ("triton_tem_fused_flex_attention_backward_1", ["CompiledFunctionBackward"], "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", ["FusedAttnFuncBackward"], "attention"),
        ("gemm_inside", ["aten::bmm", "_ChunkedAttentionBackward"], "attention"),
        ("_rotate_row", ["_Rotate"], "rotary embedding"),
        ("Memcpy HtoD (Pinned -> Device)", ["aten::copy_"], "copies"),
        ("ncclDevKernel_AllReduce_Sum_f32", ["c10d::allreduce_"], "communication"),
        ("multi_tensor_apply_kernel", ["aten::_fused_adamw_", _OPTIMIZER, _STEP], "optimizer"),
        ("vectorized_elementwise_kernel", ["aten::mul"], "pointwise"),
    ],
)
def test_parts(kernel: str, around: list[str], part: str) -> None:
    assert part_of(kernel, around) == part


class _ToyAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x @ x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad @ grad


def test_shares_of_a_cpu_add_up() -> None:
    """Operators of the backward pass are found in what autograd runs for a function's gradient."""
    x, weight = torch.randn(300, 300, requires_grad=True), torch.randn(300, 300, requires_grad=True)

    def work() -> None:
        with record_function(_STEP):
            _ToyAttention.apply(x * 2).mm(weight).sum().backward()
            with record_function(_OPTIMIZER), torch.no_grad():
                (weight @ weight).add_(1)

    work()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    events = profiler.events()
    (wall,) = (event.time_range.elapsed_us() for event in events if event.name == _STEP)
    found = shares(events, wall, is_cuda=False)
    assert sum(found.values()) == pytest.approx(1, abs=1e-6)
    assert {part for part in PARTS if found[part] > 0} >= {"attention", "matrix products", "optimizer", "pointwise"}
    assert found["unknown"] == found["head's products"] == 0


def test_shares_of_a_gpu() -> None:
    """Kernels count where the operator that launched them stands; marked ranges and overlaps do not count twice."""

    def event(name: str, parent: Any = None, kernels: Any = (), **other: Any) -> Any:
        return SimpleNamespace(
            name=name, cpu_parent=parent, kernels=kernels, device_type=DeviceType.CPU, is_user_annotation=False, **other
        )

    def on_device(name: str, start: float, end: float, *, is_mark: bool = False) -> Any:
        return SimpleNamespace(
            name=name,
            device_type=DeviceType.CUDA,
            is_user_annotation=is_mark,
            time_range=SimpleNamespace(start=start, end=end),
        )

    def kernel(name: str, duration: float) -> Any:
        return SimpleNamespace(name=name, duration=duration)

    step = event(_STEP, kernels=[kernel(_STEP, 90.0)])
    update = event(_OPTIMIZER, step, [kernel(_OPTIMIZER, 20.0)])
    events = [
        step,
        update,
        event("aten::mm", step, [kernel("nvjet", 40.0)]),
        event("aten::mul", step, [kernel("elementwise", 10.0)]),
        event("aten::_fused_adamw_", update, [kernel("multi_tensor_apply", 20.0)]),
        on_device(_STEP, 0, 90, is_mark=True),
        on_device(_OPTIMIZER, 70, 90, is_mark=True),
        on_device("nvjet", 0, 40),
        on_device("elementwise", 35, 45),
        on_device("from nowhere", 50, 55),
        on_device("multi_tensor_apply", 70, 90),
    ]
    found = shares(events, 100.0, is_cuda=True)
    expected = {"matrix products": 0.4, "pointwise": 0.1, "optimizer": 0.2, "unknown": 0.05, "idle": 0.3}
    assert found == pytest.approx(dict.fromkeys(PARTS, 0.0) | expected)
