"""The embedding's gradient: summed in fp32, in Megatron's buffer where there is one."""

import pytest
import torch
from torch import Tensor

from nld_train.config.schema import ParallelConfig
from nld_train.model.build import build_model
from nld_train.model.embedding import TokenEmbedding, _Lookup
from nld_train.platform.device import Platform
from nld_train.platform.topology import Topology
from nld_train.testing.ranks import RankPool
from nld_train.testing.steps import tiny_model

VOCAB, HIDDEN = 40, 24


def tokens_with_masks(num_masked: int = 700) -> Tensor:
    """int64 [2, 500]: most of them one token."""
    tokens = torch.randint(VOCAB, (1000,), generator=torch.Generator().manual_seed(1))
    tokens[:num_masked] = 3
    return tokens[torch.randperm(1000, generator=torch.Generator().manual_seed(2))].view(2, 500)


def gradient_of_rows(dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 500, HIDDEN, generator=torch.Generator().manual_seed(4)).to(dtype)


def gradients(dtype: torch.dtype, main_grad: torch.dtype | None) -> tuple[Tensor, Tensor, torch.nn.Parameter]:
    """Found, exact (float64), and the weight."""
    weight = torch.nn.Parameter(torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(3)).to(dtype))
    grad = gradient_of_rows(dtype)
    tokens = tokens_with_masks()
    if main_grad is not None:
        weight.main_grad = torch.ones(VOCAB, HIDDEN, dtype=main_grad)  # type: ignore[attr-defined]
    out = _Lookup.apply(tokens, weight)
    assert torch.equal(out, weight[tokens])
    out.backward(grad)
    exact = torch.zeros(VOCAB, HIDDEN, dtype=torch.float64).index_add_(0, tokens.flatten(), grad.flatten(0, 1).double())
    if main_grad is not None and getattr(weight, "grad_added_to_main_grad", False):
        return weight.main_grad - 1, exact, weight  # type: ignore[attr-defined]
    assert weight.grad is not None
    return weight.grad, exact, weight


@pytest.mark.parametrize("main_grad", [None, torch.float32])
def test_the_mask_tokens_gradient_is_not_summed_in_bf16(main_grad: torch.dtype | None) -> None:
    """torch's own way is off by some percent; a rounded result by 2^-9 at most."""
    found, exact, weight = gradients(torch.bfloat16, main_grad)
    torchs_own = torch.ops.aten.embedding_dense_backward(
        gradient_of_rows(torch.bfloat16), tokens_with_masks(), VOCAB, -1, False
    )
    assert (torchs_own[3].double() - exact[3]).norm() > 0.01 * exact[3].norm()
    for rows in (slice(3, 4), slice(None)):
        error = (found[rows].double() - exact[rows]).norm() / exact[rows].norm()
        assert error < (1e-5 if main_grad else 3e-3)
    assert (weight.grad is not None and weight.grad.is_sparse) == (main_grad is not None)


@pytest.mark.parametrize(("dtype", "main_grad"), [(torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_added_to_what_is_there(dtype: torch.dtype, main_grad: torch.dtype) -> None:
    found, exact, _ = gradients(dtype, main_grad)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4 if dtype is torch.float32 else 1e-11)


def test_a_buffer_of_another_dtype_is_left_to_megatron() -> None:
    found, exact, weight = gradients(torch.float64, torch.float32)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-11)
    assert weight.main_grad.eq(1).all()  # type: ignore[attr-defined]


def _embedded(topology: Topology, platform: Platform, parallel: ParallelConfig) -> tuple[str, Tensor]:
    model = build_model(tiny_model(), parallel, dtype=torch.float64, device=platform.device, seed=1)
    tokens = torch.arange(96).view(2, 48)
    with torch.no_grad():
        hidden = model.embedding(input_ids=tokens, position_ids=None)
    return type(model.embedding.word_embeddings).__name__, hidden


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_tensor_parallel_ranks_give_the_rows_of_one(
    one_rank: RankPool, two_ranks: RankPool, sequence_parallel: bool
) -> None:
    name, expected = one_rank.run(_embedded, ParallelConfig(), parallel=ParallelConfig())
    assert name == TokenEmbedding.__name__
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    _, found = two_ranks.run(_embedded, parallel, parallel=parallel)
    assert torch.equal(found, expected[:24] if sequence_parallel else expected)
