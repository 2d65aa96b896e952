"""RMSNorm and SwiGLU against their written-out forms, in values and gradients, and what they keep."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nld_train.config.schema import CompilePointwise
from nld_train.model import pointwise
from nld_train.model.pointwise import compiles_pointwise, swiglu
from nld_train.testing.fixtures import needs_compiler

EPS = 1e-5
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
COMPILED_IN = [torch.float32, *(pytest.param(x, marks=pytest.mark.long) for x in (torch.bfloat16, torch.float64))]


def norm_written_out(hidden: Tensor, weight: Tensor) -> Tensor:
    """transformers' Ministral3RMSNorm, in the dtype it is given where that is wider than fp32."""
    values = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * values.to(hidden.dtype)


def swiglu_written_out(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def norm(hidden: Tensor, weight: Tensor) -> Tensor:
    return pointwise._RMSNorm.apply(hidden, weight, EPS, False)


def compiled_norm(hidden: Tensor, weight: Tensor) -> Tensor:
    return pointwise._RMSNorm.apply(hidden, weight, EPS, True)


compiled_swiglu = partial(swiglu, is_compiled=True)


def inputs_of(function: Callable[..., Tensor], dtype: torch.dtype, rows: Sequence[int] = (5, 3)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(rows))
    shapes = [(*rows, 24), (24,)] if function in (norm, compiled_norm) else [(*rows, 48)]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) * 2 for shape in shapes]
    return [x.to(dtype).requires_grad_() for x in drawn]


def run(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    out = function(*inputs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


@pytest.mark.parametrize(("function", "slow"), [(norm, norm_written_out), (swiglu, swiglu_written_out)])
@pytest.mark.parametrize("rows", [(5, 3), (7,), (0, 1)], ids=str)
def test_values_and_gradients(
    function: Callable[..., Tensor], slow: Callable[..., Tensor], rows: Sequence[int]
) -> None:
    for dtype in DTYPES:
        inputs = inputs_of(function, dtype, rows)
        exact = [x.detach().double().requires_grad_() for x in inputs]
        found, written, expected = run(function, inputs), run(slow, inputs), run(slow, exact)
        assert torch.equal(found[0], written[0])  # as transformers rounds it
        for a, b, c in zip(found, written, expected, strict=True):
            assert a.dtype is dtype
            error, allowed = (a.double() - c).norm(), (b.double() - c).norm()
            assert error <= 1.1 * allowed + 1e-14 * c.norm(), (dtype, a.shape)


@needs_compiler
@pytest.mark.parametrize("dtype", COMPILED_IN, ids=str)
@pytest.mark.parametrize(
    ("function", "eager"), [(compiled_norm, norm), (compiled_swiglu, swiglu)], ids=["norm", "swiglu"]
)
def test_compiled_for_the_cpu(
    function: Callable[..., Tensor], eager: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    """As accurate as the other form, for any rows; those of the last layer are [R, 1], a gradient may be expanded."""
    rounding = 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps  # sums in another order
    for rows in ((5, 3), (4, 1), (1, 1), (0, 1), (7,), (40, 2)):
        inputs = inputs_of(function, dtype, rows)
        exact = [x.detach().double().requires_grad_() for x in inputs]
        found, other, expected = run(function, inputs), run(eager, inputs), run(eager, exact)
        for a, b, c in zip(found, other, expected, strict=True):
            assert a.dtype is dtype
            assert a.shape == b.shape
            error, allowed = (a.double() - c).norm(), (b.double() - c).norm()
            assert error <= 1.1 * allowed + rounding * c.norm(), rows
    inputs = inputs_of(function, dtype)
    sums = [torch.autograd.grad(form(*inputs).sum(), inputs) for form in (function, eager)]
    for a, b in zip(*sums, strict=True):
        assert (a - b).norm() <= 2 * torch.finfo(dtype).eps * b.norm()


@needs_compiler
def test_compiled_keeps_the_input_alone() -> None:
    for function in (compiled_norm, compiled_swiglu):
        test_only_the_input_is_kept(function, torch.float32)
    inputs = inputs_of(compiled_norm, torch.float32)
    before = [x.detach().clone() for x in inputs]
    run(compiled_norm, inputs)
    for a, b in zip(inputs, before, strict=True):
        assert torch.equal(a, b)


def test_where_they_are_compiled() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [compiles_pointwise(choice, cpu) for choice in CompilePointwise] == [False, True, False]
    assert [compiles_pointwise(choice, cuda) for choice in CompilePointwise] == [True, True, False]


@pytest.mark.parametrize("function", [norm, swiglu])
def test_gradients_by_differences(function: Callable[..., Tensor]) -> None:
    torch.autograd.gradcheck(function, inputs_of(function, torch.float64))


@pytest.mark.parametrize("function", [norm, swiglu])
def test_inputs_are_read_only_and_any_strides_are_taken(function: Callable[..., Tensor]) -> None:
    inputs = inputs_of(function, torch.float32)
    expected, before = run(function, inputs), [x.detach().clone() for x in inputs]
    for a, b in zip(inputs, before, strict=True):
        assert torch.equal(a, b)
    inputs[0] = inputs[0].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert not inputs[0].is_contiguous()
    for a, b in zip(run(function, inputs), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [norm, swiglu])
def test_only_the_input_is_kept(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """And of a norm one number per row."""
    inputs, kept = inputs_of(function, dtype), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        function(*inputs)
    given = {x.data_ptr() for x in inputs}
    assert [x.shape for x in kept if x.data_ptr() not in given] == (
        [(5, 3, 1)] if function in (norm, compiled_norm) else []
    )


def test_compiled_forms_are_the_same() -> None:
    """What CUDA runs, traced here without code: no graph break, and other numbers of rows do not trace anew."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    hidden, weight = (x.detach() for x in inputs_of(norm, torch.float32))
    (x,) = (x.detach() for x in inputs_of(swiglu, torch.float32))
    scale = torch.rand(5, 3, 1)
    for passes, arguments in (
        (pointwise._normalize, (hidden, weight, EPS)),
        (pointwise._normalize_backward, (hidden * 2, hidden, weight, scale)),
        (pointwise._gate, (x,)),
        (pointwise._gate_backward_as_one, (hidden * 2, x)),
    ):
        compiled = torch.compile(passes, dynamic=True, fullgraph=True, backend=counter)
        before = counter.frame_count
        for rows in (5, 4, 2):
            given = [x[:rows].clone() if isinstance(x, Tensor) and x.dim() > 1 else x for x in arguments]
            torch.testing.assert_close(compiled(*given), passes(*given), rtol=1e-5, atol=1e-5)
        assert counter.frame_count == before + 1, passes
    torch.testing.assert_close(
        pointwise._gate_backward_as_one(hidden * 2, x), pointwise._gate_backward(hidden * 2, x), rtol=0, atol=0
    )
