"""Where a profiled step's time is said to go (nld_train.testing.benchmarks.profile)."""

import gc
import json
import multiprocessing
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from nld_train.config.schema import OptimConfig, ParallelConfig
from nld_train.model.build import build_model
from nld_train.platform.device import Platform
from nld_train.platform.topology import Topology
from nld_train.testing.benchmarks.profile import _STEP, PARTS, Profile, Results, measure_all, part_of, shares, verdicts
from nld_train.testing.benchmarks.step import OPTIMIZER_MARK, TrainingStep, loader_batch
from nld_train.testing.ranks import RankPool
from nld_train.testing.steps import tiny_model, tiny_recipe
from nld_train.training.step import LossWeights


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
        ("multi_tensor_apply_kernel", ["aten::_fused_adamw_", OPTIMIZER_MARK, _STEP], "optimizer"),
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
            with record_function(OPTIMIZER_MARK), torch.no_grad():
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
    update = event(OPTIMIZER_MARK, step, [kernel(OPTIMIZER_MARK, 20.0)])
    events = [
        step,
        update,
        event("aten::mm", step, [kernel("nvjet", 40.0)]),
        event("aten::mul", step, [kernel("elementwise", 10.0)]),
        event("aten::_fused_adamw_", update, [kernel("multi_tensor_apply", 20.0)]),
        on_device(_STEP, 0, 90, is_mark=True),
        on_device(OPTIMIZER_MARK, 70, 90, is_mark=True),
        on_device("nvjet", 0, 40),
        on_device("elementwise", 35, 45),
        on_device("from nowhere", 50, 55),
        on_device("multi_tensor_apply", 70, 90),
    ]
    found = shares(events, 100.0, is_cuda=True)
    expected = {"matrix products": 0.4, "pointwise": 0.1, "optimizer": 0.2, "unknown": 0.05, "idle": 0.3}
    assert found == pytest.approx(dict.fromkeys(PARTS, 0.0) | expected)


def measured(name: str, *, speed: float = 1.0, gigabytes: float = 1.0, mfu: float = 0.5) -> Profile:
    return Profile(
        name=name, layers=1, kernels={}, milliseconds=1.0, quartiles=(1.0, 1.0), tokens_per_second=speed, teraflops=1.0,
        mfu=mfu, memory_gb=10 + gigabytes, above_resident_gb=gigabytes, shares=dict.fromkeys(PARTS, 0.1),
    )  # fmt: skip


def refuses() -> Profile:
    raise RuntimeError("CUDA out of memory\nand more")


def dies() -> Profile:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def hangs() -> Profile:
    time.sleep(60)
    raise AssertionError


def kinds_in_a_process(
    path: Path,
    works: Mapping[str, Callable[[], Profile]],
    *,
    seconds: float | None = None,
    is_released: Callable[[], bool] = lambda: True,
) -> tuple[int | None, str]:
    """Exit status and what was printed, of a process that goes on with the kinds that the file does not have."""
    out = path.with_suffix(".out")

    def run() -> None:
        with out.open("w") as file:
            sys.stdout = file
            results = Results(path=path, names=list(works), machine={})
            results.go_on()
            until = None if seconds is None else time.time() + seconds
            status = measure_all(results, works, until=until, is_released=is_released)
        os._exit(status)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(30)
    assert process.exitcode is not None
    return process.exitcode, out.read_text()


def test_a_kind_that_fails_does_not_take_the_others_along(tmp_path: Path) -> None:
    """Raised, killed, or out of time: the rest is measured by the processes that follow, and everything is reported."""
    path = tmp_path / "profile.json"
    works: dict[str, Callable[[], Profile]] = {
        "a": lambda: measured("a"), "b": refuses, "c": lambda: measured("c"), "d": dies, "e": lambda: measured("e"),
    }  # fmt: skip
    status, out = kinds_in_a_process(path, works)
    assert status == 3
    assert "c: not measured yet" in out
    assert kinds_in_a_process(path, works)[0] == -signal.SIGKILL
    status, out = kinds_in_a_process(path, works)
    assert status == 1
    report = out[out.index("shares of the step") :].splitlines()
    assert report[2].split() == ["step", "a", "c", "e"]
    assert "b: FAILED: RuntimeError: CUDA out of memory" in report
    assert "d: FAILED: the process ended while it was measured" in report
    assert [found["name"] for found in json.loads(path.read_text())["profiles"]] == ["a", "c", "e"]


def test_out_of_time(tmp_path: Path) -> None:
    works = {"a": lambda: measured("a"), "b": hangs, "c": hangs}
    start = time.monotonic()
    status, out = kinds_in_a_process(tmp_path / "profile.json", works, seconds=1.0)
    assert time.monotonic() - start < 20
    assert status == 1
    assert "b: FAILED: out of time" in out
    assert "c: FAILED: out of time" in out
    assert out[out.index("shares of the step") :].splitlines()[2].split() == ["step", "a"]


def test_all_kinds_are_measured(tmp_path: Path) -> None:
    status, out = kinds_in_a_process(tmp_path / "profile.json", {"a": lambda: measured("a")}, seconds=20.0)
    assert status == 0
    assert "FAILED" not in out


def test_a_kind_that_leaves_memory_behind_ends_its_process(tmp_path: Path) -> None:
    path, works = tmp_path / "profile.json", {"a": lambda: measured("a"), "b": lambda: measured("b")}
    status, out = kinds_in_a_process(path, works, is_released=lambda: False)
    assert status == 3
    assert "a has left memory behind" in out
    assert kinds_in_a_process(path, works, is_released=lambda: False)[0] == 0


def test_what_is_asked_of_our_step() -> None:
    public = measured("joint, public recipe", speed=10.0, gigabytes=20.0)
    found = verdicts([public, measured("joint, recipe's noise", speed=12.5, gigabytes=12.5, mfu=0.44)])
    assert [line.rpartition(" ")[2] for line in found] == ["yes", "NO", "NO"]
    assert "1.25" in found[0]
    assert verdicts([measured("joint, recipe's noise")]) == []


def lost_tensors(topology: Topology, platform: Platform) -> tuple[int, int]:
    """Of the tensors of model, gradients and optimizer: those that are gone after release, and all."""
    model = build_model(tiny_model(), ParallelConfig(), dtype=torch.bfloat16, device=platform.device, seed=0)
    sample = loader_batch(torch.randint(4, 96, (1, 33)), tiny_recipe(), torch.ones(1, 32, dtype=torch.bool))
    step = TrainingStep(
        model, [sample], objective=tiny_recipe(), weights=LossWeights(diffusion=0.3), optim=OptimConfig(), lr=1e-3,
        overlapped={"overlap_grad_reduce": True, "overlap_param_gather": True},
    )  # fmt: skip
    step()
    inner: Any = step.optimizer
    states = [state for part in inner.chained_optimizers for state in part.optimizer.state.values()]
    tensors = [
        *model.parameters(),
        *(parameter.main_grad for parameter in model.parameters()),
        *(value for state in states for value in state.values()),
    ]
    del inner, states
    references = [weakref.ref(tensor) for tensor in tensors]
    del tensors, model
    gc.collect()
    assert all(reference() is not None for reference in references)
    step.release()
    return sum(reference() is None for reference in references), len(references)


def test_a_kind_leaves_no_memory_to_the_next(one_rank: RankPool) -> None:
    lost, count = one_rank.run(lost_tensors)
    assert lost == count > 40
