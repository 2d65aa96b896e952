"""Code that torch compiles for the CPU: made once, for any number of rows, and the same whatever comes first."""

import re

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._functorch import config as functorch
from torch._inductor import config as inductor
from torch._inductor.utils import run_and_get_code

from nld_train.platform import compilation
from nld_train.platform.compilation import run_compiled
from nld_train.platform.device import Platform
from nld_train.platform.topology import Topology
from nld_train.testing.fixtures import needs_compiler
from nld_train.testing.ranks import RankPool

pytestmark = needs_compiler
ROWS = (2, 3, 17, 700, 2048)


def scaled_and_summed(x: Tensor, weight: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Across a row, and over all rows, as a norm's backward pass does it."""
    scaled = x * weight * (factor / (1 + x.square().mean(-1, keepdim=True)))
    return scaled, (scaled * x).sum(0)


def rows_of(number: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    x, weight = (torch.randn(*sizes, generator=generator, dtype=torch.float64) for sizes in ((number, 40), (40,)))
    return x.to(dtype), weight.to(dtype)


def forget() -> None:
    torch._dynamo.reset()
    counters.clear()
    compilation._compiled.cache_clear()


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_rows_compile_once_and_the_code_does_not_depend_on_their_order() -> None:
    """Each is compiled by itself, without what the other has left in the cache. From two rows torch would make code for
    one thread."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found: list[dict[int, tuple[Tensor, Tensor]]] = []
        codes = []
        for order in (ROWS, ROWS[::-1]):
            forget()
            with inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
                _, (code,) = run_and_get_code(run_compiled, scaled_and_summed, *rows_of(order[0]), 0.5)
                codes.append(re.findall(r"cpp_pybinding\(.*?'''.*?'''", code, re.DOTALL))
                found.append({rows: run_compiled(scaled_and_summed, *rows_of(rows), 0.5) for rows in order})
            assert num_graphs() == 1
    finally:
        torch.set_num_threads(num_threads)
    assert codes[0] == codes[1]
    assert "#pragma omp parallel num_threads(2)" in "".join(codes[0])
    for rows in ROWS:
        for a, b, exact in zip(
            found[0][rows], found[1][rows], scaled_and_summed(*rows_of(rows, torch.float64), 0.5), strict=True
        ):
            assert torch.equal(a, b), rows
            assert (a - exact).norm() < 1e-6 * exact.norm()


def test_nothing_else_compiles_again() -> None:
    """Gradients, inference, strides, places in a larger tensor; and one row or none are not compiled."""
    forget()
    x, weight = rows_of(12)
    expected = run_compiled(scaled_and_summed, x, weight, 0.5)
    with torch.inference_mode():
        inference = (x.clone(), weight.clone())
    backing = torch.cat([weight[None], x, x])
    for given in (
        (x.clone().requires_grad_(), weight.clone().requires_grad_()),
        inference,
        (x.t().contiguous().t(), weight),
        (backing[1:13], backing[0]),
        (torch.stack([x, x], -1)[..., 1], weight),
    ):
        for a, b in zip(run_compiled(scaled_and_summed, *given, 0.5), expected, strict=True):
            assert torch.equal(a, b)
            assert not a.requires_grad
    with torch.inference_mode():
        run_compiled(scaled_and_summed, x, weight, 0.5)
    for number in (0, 1):
        for a, b in zip(
            run_compiled(scaled_and_summed, x[:number], weight, 0.5),
            scaled_and_summed(x[:number], weight, 0.5),
            strict=True,
        ):
            assert torch.equal(a, b)
    assert num_graphs() == 1


def compiled_here(topology: Topology, platform: Platform) -> tuple[Tensor, Tensor]:
    return run_compiled(scaled_and_summed, *rows_of(50), 0.5)


def test_where_cuda_means_the_cpu(one_rank: RankPool) -> None:
    for a, b in zip(one_rank.run(compiled_here), run_compiled(scaled_and_summed, *rows_of(50), 0.5), strict=True):
        assert torch.equal(a, b)
