"""Linear layers on the CPU: values, gradients, and where the gradient of a weight goes."""

import pytest
import torch
from torch import Tensor

from nld_train.config.schema import ParallelConfig
from nld_train.model import linear
from nld_train.model.build import build_model
from nld_train.platform.cpu import CPUInfo
from nld_train.platform.device import Platform
from nld_train.platform.topology import Topology
from nld_train.testing.ranks import RankPool
from nld_train.testing.steps import tiny_model

IN, OUT = 24, 40
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("rows", [(32, 2), (64,), (33, 1), (7,)], ids=str)
@pytest.mark.parametrize("has_main_grad", [False, True])
def test_values_and_gradients(
    dtype: torch.dtype, rows: tuple[int, ...], has_main_grad: bool, fast_onednn: bool
) -> None:
    x = drawn(*rows, IN, seed=1).to(dtype).requires_grad_()
    weight = torch.nn.Parameter(drawn(OUT, IN, seed=2).to(dtype))
    grad = drawn(*rows, OUT, seed=3).to(dtype)
    if has_main_grad:
        weight.main_grad = torch.ones(OUT, IN, dtype=torch.promote_types(dtype, torch.float32))  # type: ignore[attr-defined]
    out = linear._Linear.apply(x, weight)
    out.backward(grad)
    assert out.dtype == dtype
    assert x.grad is not None
    assert weight.grad is not None
    of_weight = weight.grad
    if has_main_grad:
        assert weight.grad.is_sparse
        assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
        of_weight = weight.main_grad - 1  # type: ignore[attr-defined]
    exact_x, exact_weight, exact_grad = x.detach().double(), weight.detach().double(), grad.double()
    for found, exact in (
        (out, exact_x @ exact_weight.t()),
        (x.grad, exact_grad @ exact_weight),
        (of_weight, exact_grad.flatten(0, -2).t() @ exact_x.flatten(0, -2)),
    ):
        assert found.shape == exact.shape
        assert error(found.detach(), exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [0, 32, 40, 64])
def test_a_product_is_written_where_it_is_wanted(rows: int, fast_onednn: bool) -> None:
    """Of a weight as it is and transposed, and of rows that do not stand together."""
    weight = drawn(OUT, IN, seed=2).float()
    for x, w in (
        (drawn(rows, IN, seed=1).float(), weight),
        (drawn(rows, OUT, seed=1).float(), weight.t()),
        (drawn(IN, rows, seed=1).float().t(), weight),
    ):
        out = torch.full((rows + 2, len(w)), 7.0)
        returned = linear.times_transposed(x, w, out=out[1:-1])
        exact = x.double() @ w.double().t()
        torch.testing.assert_close(linear.times_transposed(x, w).double(), exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out[1:-1].double(), exact, rtol=1e-5, atol=1e-5)
        assert returned.data_ptr() == out[1:-1].data_ptr()
        assert out[0].eq(7).all()
        assert out[-1].eq(7).all()


def test_a_half_precision_gradient_is_what_megatron_adds() -> None:
    """The product rounded to bf16, then added in fp32: the same numbers as without main_grad, added by Megatron."""
    x, grad = drawn(64, IN, seed=1).bfloat16(), drawn(64, OUT, seed=3).bfloat16()
    weights = [torch.nn.Parameter(drawn(OUT, IN, seed=2).bfloat16()) for _ in range(2)]
    weights[1].main_grad = torch.full((OUT, IN), 0.125)  # type: ignore[attr-defined]
    for weight in weights:
        linear._Linear.apply(x, weight).backward(grad)
    assert weights[0].grad is not None
    assert torch.equal(weights[1].main_grad, 0.125 + weights[0].grad.float())  # type: ignore[attr-defined]


def test_a_buffer_of_another_dtype_is_left_to_megatron() -> None:
    weight = torch.nn.Parameter(drawn(OUT, IN, seed=2))
    weight.main_grad = torch.zeros(OUT, IN)  # type: ignore[attr-defined]
    linear._Linear.apply(drawn(8, IN, seed=1), weight).sum().backward()
    assert weight.grad is not None
    assert not weight.grad.is_sparse
    assert not weight.main_grad.any()  # type: ignore[attr-defined]


def test_gradients_that_nobody_wants_are_not_computed() -> None:
    x, weight = drawn(8, IN, seed=1).requires_grad_(), drawn(OUT, IN, seed=2)
    weight.main_grad = torch.zeros(OUT, IN, dtype=torch.float64)  # type: ignore[attr-defined]
    linear._Linear.apply(x, weight).sum().backward()
    assert x.grad is not None
    assert not weight.main_grad.any()  # type: ignore[attr-defined]
    x = x.detach()
    weight.requires_grad_()
    linear._Linear.apply(x, weight).sum().backward()
    assert x.grad is None
    assert weight.main_grad.any()  # type: ignore[attr-defined]


def test_onednn_takes_whole_units_of_fp32_rows_on_the_cpu(fast_onednn: bool) -> None:
    def takes(rows: int, dtype: torch.dtype = torch.float32) -> bool:
        return linear._takes_onednn(torch.zeros(rows, IN, dtype=dtype))

    assert takes(64) is takes(32) is takes(0) is fast_onednn
    assert not any([takes(33), takes(31), takes(64, torch.float64), takes(64, torch.bfloat16)])
    assert not linear._takes_onednn(torch.zeros(64, IN, device="meta"))


@pytest.mark.parametrize(
    ("vendor", "flags", "is_fast"),
    [
        ("AuthenticAMD", "avx2 avx512f", True),
        ("AuthenticAMD", "avx2", False),  # not measured
        ("GenuineIntel", "avx2 avx512f", False),
        ("", "", False),
    ],
)
def test_which_processors_have_a_fast_onednn(
    monkeypatch: pytest.MonkeyPatch, vendor: str, flags: str, is_fast: bool
) -> None:
    monkeypatch.setattr(linear, "cpu_info", lambda: CPUInfo(vendor, "", "", frozenset(flags.split())))
    found = linear.has_fast_onednn.__wrapped__()
    assert found is (is_fast and torch.backends.mkldnn.is_available())


def layers_of(topology: Topology, platform: Platform, parallel: ParallelConfig) -> list[bool]:
    """Of the linear layers of a model: their product is ours (an output of ours remembers it)."""
    model = build_model(tiny_model(), parallel, dtype=torch.float64, device=platform.device, seed=1)
    layer = model.decoder.layers[0]
    attention, mlp = layer.self_attention, layer.mlp
    found = []
    for part in (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2):
        assert part.bias is None  # with one Megatron's own product would be taken
        out, _ = part(torch.zeros(4, 1, part.weight.shape[1], dtype=torch.float64))
        nodes, seen = [out.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                nodes += [before for before, _ in node.next_functions]
        found.append(any(type(node).__name__ == "_LinearBackward" for node in seen))
    return found


def test_layers_in_which_ranks_exchange_nothing_are_ours(one_rank: RankPool, two_ranks: RankPool) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    assert one_rank.run(layers_of, ParallelConfig()) == [True] * 4
    # A column-parallel layer sums the gradient of its input over the ranks.
    assert two_ranks.run(layers_of, parallel, parallel=parallel) == [False, True, False, True]


@pytest.mark.parametrize("has_bf16", [False, True])
def test_rows_of_a_fast_product(has_bf16: bool, fast_onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "has_bf16_products", lambda: has_bf16)
    cpu = torch.device("cpu")
    assert linear.fast_rows(torch.float32, cpu) == (32 if fast_onednn else 1)
    assert linear.fast_rows(torch.bfloat16, cpu) == (8 if has_bf16 else 1)
    assert linear.fast_rows(torch.float64, cpu) == 1
    assert linear.fast_rows(torch.bfloat16, torch.device("cuda")) == 1
