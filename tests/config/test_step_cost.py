"""Costs on paper: against published figures, another count of the same operations, and bytes that real code moves."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nld_train.config.schema import ModelConfig
from nld_train.config.step_cost import (
    FORMULAS,
    OURS,
    OURS_CPU,
    OURS_FP32,
    OURS_SPLIT,
    PUBLIC,
    Kernels,
    Machine,
    PartCost,
    step_cost,
)
from nld_train.config.workload import flops_per_token, public_workload
from nld_train.model.head import chunk_rows, fused_linear_cross_entropy
from nld_train.platform.device import Platform
from nld_train.platform.topology import Topology
from nld_train.testing.benchmarks.cost_page import H100, SIZES, Size, levers, public_shares, saved_of_public, size_costs
from nld_train.testing.ranks import RankPool


@pytest.fixture(scope="module")
def sizes() -> dict[str, Size]:
    return {name: size_costs(name) for name in SIZES}


PUBLISHED = {  # GFLOP per clean token AR and joint; percent of attention, qkv and output, MLP, head on unmasked rows
    "3b": (23.2, 46.4, 11, 21, 57, 2.6),
    "8b": (51.1, 102.3, 7, 17, 70, 1.6),
    "14b": (81.0, 162.1, 5, 16, 75, 1.2),
}


@pytest.mark.parametrize("name", SIZES)
def test_published_figures_are_reproduced(sizes: dict[str, Size], name: str) -> None:
    size, (ar, joint, *percents, waste) = sizes[name], PUBLISHED[name]
    assert size.steps["AR"].gflop_per_token == pytest.approx(ar, abs=0.05)
    assert size.steps["public recipe"].gflop_per_token == pytest.approx(joint, abs=0.05)
    shares = public_shares(size)
    found = [100 * shares[part] for part in ("attention", "qkv and output projection", "MLP")]
    assert found == [pytest.approx(percent, abs=0.5) for percent in percents]
    assert 100 * shares["head on noisy rows that are not masked"] == pytest.approx(waste, abs=0.05)
    assert sum(shares.values()) - shares["head on noisy rows that are not masked"] == pytest.approx(1)


@pytest.mark.parametrize("name", SIZES)
def test_operations_are_those_of_the_workload(sizes: dict[str, Size], name: str) -> None:
    """Which counts them by layer, for the MFU and the planner."""
    for step in sizes[name].steps.values():
        prunes = step.name != "public recipe"
        counted = flops_per_token(sizes[name].config.model, step.work, prunes_last_layer=prunes) / 1e9
        assert step.gflop_per_token == pytest.approx(counted, rel=1e-12), step.name


def test_savings_and_levers_are_differences_of_whole_steps(sizes: dict[str, Size]) -> None:
    size = sizes["3b"]
    machine = size.machines[0]
    public, ours = (size.steps[name].seconds(machine) for name in ("public recipe", "joint, recipe"))
    assert 1 - sum(saved_of_public(size, machine).values()) == pytest.approx(ours / public)
    found = levers(size, machine)
    assert all(0 < share < 0.5 for share in found.values()), found


class _Traffic(TorchDispatchMode):
    """Bytes that operations read and write, each tensor once; those that only touch some elements are left out."""

    LEFT_OUT = ("gather", "scatter_add_", "empty", "detach")

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and not any(name in func.__name__ for name in self.LEFT_OUT):
            # What a copy goes to is not read.
            read = [x for x in args[func.__name__.startswith("copy_") :] if isinstance(x, Tensor)]
            written = [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor)]
            # The head returns an empty sparse gradient.
            dense = [x for x in read + written if x.layout is torch.strided]
            self.bytes += sum(x.numel() * x.element_size() for x in dense)
        return out


def traffic(function: Callable[[], Any]) -> int:
    with _Traffic() as counted:
        function()
    return counted.bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_of_a_product_are_those_of_a_linear_layer(dtype: torch.dtype) -> None:
    """With its gradient added to an fp32 sum, as Megatron's data parallelism does."""
    rows, hidden = 48, 64
    model = ModelConfig(
        num_layers=1, hidden_size=hidden, ffn_hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=128,
    )  # fmt: skip
    work = replace(public_workload(rows, 8), noisy_rows=0)
    inputs = torch.randn(rows, hidden, dtype=dtype, requires_grad=True)
    weight = torch.randn((4 + 2 * 2) * 16, hidden, dtype=dtype, requires_grad=True)
    total, grad = torch.zeros(weight.shape), torch.randn(rows, weight.shape[0], dtype=dtype)

    def step() -> None:
        torch.nn.functional.linear(inputs, weight).backward(grad)
        assert weight.grad is not None
        total.add_(weight.grad)

    expected = step_cost(model, work, replace(OURS, element_bytes=dtype.itemsize))["qkv"]
    assert traffic(step) == expected.bytes
    assert expected.apart_bytes == weight.numel() * (dtype.itemsize + 8)
    assert expected.flops == 3 * 2 * rows * weight.numel()


def head_traffic(rows: int, hidden: int, vocabulary: int, dtype: torch.dtype, group: dist.ProcessGroup | None) -> int:
    inputs = torch.randn(rows, hidden).to(dtype).requires_grad_()
    weight = torch.nn.Parameter(torch.randn(vocabulary, hidden).to(dtype))
    weight.main_grad = torch.zeros(vocabulary, hidden)  # type: ignore[attr-defined]
    targets, weights = torch.randint(vocabulary, (rows,)), torch.ones(rows)

    def step() -> None:
        loss, _, _ = fused_linear_cross_entropy(inputs, weight, targets, weights, group=group)
        loss.backward()

    return traffic(step)


def head_cost(rows: int, hidden: int, vocabulary: int, kernels: Kernels) -> float:
    model = ModelConfig(
        num_layers=1, hidden_size=hidden, ffn_hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=vocabulary,
    )  # fmt: skip
    work = replace(public_workload(rows, 8), weighted_rows=float(rows))
    parts = step_cost(model, work, kernels)
    return parts["head"].bytes + parts["cross-entropy"].bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_of_the_head_are_those_of_its_code(dtype: torch.dtype) -> None:
    """On the CPU; on CUDA the product of the weight's gradient is written in fp32."""
    shape = 2 * chunk_rows(dtype, torch.device("cpu")), 64, 4096
    expected = head_cost(*shape, OURS_CPU if dtype is torch.bfloat16 else OURS_FP32)
    assert head_traffic(*shape, dtype, None) == pytest.approx(expected, rel=0.01)


def head_traffic_of_a_group(topology: Topology, platform: Platform, rows: int, dtype: torch.dtype) -> int:
    """Of one rank, which exchanges with itself what it would with others."""
    return head_traffic(rows, 64, 4096, dtype, parallel_state.get_tensor_model_parallel_group())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_of_a_split_head_are_those_of_its_code(one_rank: RankPool, dtype: torch.dtype) -> None:
    rows = 2 * chunk_rows(dtype, torch.device("cpu"))
    kernels = replace(OURS_CPU, logit_bytes=OURS_SPLIT.logit_bytes) if dtype is torch.bfloat16 else OURS_FP32
    found = one_rank.run(head_traffic_of_a_group, rows, dtype)
    assert found == pytest.approx(head_cost(rows, 64, 4096, kernels), rel=0.01)


def test_the_kernels_of_the_model_are_those_of_the_code() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert OURS.head_chunk_rows == OURS_SPLIT.head_chunk_rows == chunk_rows(torch.bfloat16, cuda)
    assert OURS_CPU.head_chunk_rows == chunk_rows(torch.bfloat16, cpu)
    assert OURS_FP32.head_chunk_rows == chunk_rows(torch.float32, cuda) == chunk_rows(torch.float32, cpu)


def test_a_roofline_is_the_slower_of_two_and_then_what_only_moves() -> None:
    machine = Machine(name="m", flops_per_s=10.0, bytes_per_s=5.0, network_bytes_per_s=2.0)
    assert PartCost(flops=30, bytes=10).seconds(machine) == 3
    assert PartCost(flops=10, bytes=10).seconds(machine) == 2
    assert PartCost(flops=30, bytes=15, apart_bytes=5).seconds(machine) == 4
    assert PartCost(network_bytes=6).seconds(machine) == 3


def test_each_part_has_a_formula(sizes: dict[str, Size]) -> None:
    assert list(sizes["3b"].steps["AR"].parts) == list(FORMULAS)


def test_several_sequences_share_weights_and_steps(sizes: dict[str, Size]) -> None:
    model, work = sizes["3b"].config.model, sizes["3b"].steps["joint, recipe"].work
    one = step_cost(model, work, PUBLIC, data_parallel_size=4, sequences_per_step=8)
    two = step_cost(
        model, work, PUBLIC, data_parallel_size=4, sequences_per_step=16, sequences_per_micro_batch=2
    )  # fmt: skip
    assert two["optimizer"].bytes == one["optimizer"].bytes / 2
    assert two["gradient reduction"].network_bytes == one["gradient reduction"].network_bytes / 2
    weights = model.num_layers * model.hidden_size * 48 * 128
    assert one["qkv"].bytes - two["qkv"].bytes == weights * (3 * 2 + 10) / 2
    assert one["qkv"].flops == two["qkv"].flops
    assert one["head"].seconds(H100) >= two["head"].seconds(H100)
