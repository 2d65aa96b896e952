"""flex_attention on a GPU against the dense kernel in float64, under all layouts. Run by scripts/gpu_check.sh."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from nld_train.config.schema import AttentionBackend
from nld_train.model import attention as attention_module
from nld_train.model.attention import joint_attention
from nld_train.objective.noise import NoiseSpec, corrupt
from nld_train.objective.sequence import SequenceLayout, build_joint_batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch")


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
    with torch._dynamo.config.patch(recompile_limit=8):
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
