"""The fused head against full logits and torch's cross-entropy."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nld_train.model.head as head
from nld_train.config.schema import ParallelConfig
from nld_train.model.head import fused_linear_cross_entropy, select_weighted_rows
from nld_train.objective.noise import NoiseSpec, corrupt
from nld_train.objective.sequence import build_joint_batch
from nld_train.platform.device import Platform
from nld_train.platform.topology import Topology
from nld_train.testing.ranks import RankPool


def inputs(rows: int, vocab: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden_states = torch.randn(rows, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64).mul(0.3).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator, dtype=torch.float64) * 5
    return hidden_states, weight, targets, weights


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.t()
    losses = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")
    return (losses * weights.to(losses.dtype)).sum(), losses


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 50])
def test_fused_equals_naive_in_float64(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setitem(head.CHUNK_ROWS, "cpu", 8)  # several chunks, and rows that do not fill the last
    arguments = inputs(rows, 37, 12, torch.float64)
    loss, row_losses = fused_linear_cross_entropy(*arguments)
    (2.5 * loss).backward()
    found = [argument.grad.clone() for argument in arguments[:2]]
    for argument in arguments[:2]:
        argument.grad = None
    expected_loss, expected_rows = naive(*arguments)
    (2.5 * expected_loss).backward()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(row_losses, expected_rows.detach(), rtol=1e-12, atol=1e-12)
    for gradient, argument in zip(found, arguments[:2], strict=True):
        torch.testing.assert_close(gradient, argument.grad, rtol=1e-12, atol=1e-12)


def test_bf16_error_is_that_of_naive_bf16() -> None:
    exact = inputs(300, 50, 16, torch.float64)
    exact_loss, _ = naive(*exact)
    exact_loss.backward()
    errors = {}
    for name, function in (("fused", fused_linear_cross_entropy), ("naive", naive)):
        arguments = tuple(a.detach().to(torch.bfloat16).requires_grad_() for a in exact[:2]) + exact[2:]
        loss, _ = function(*arguments)
        loss.backward()
        errors[name] = [
            ((a.grad.double() - e.grad).norm() / e.grad.norm()).item()
            for a, e in zip(arguments[:2], exact[:2], strict=True)
        ]
    for fused_error, naive_error in zip(errors["fused"], errors["naive"], strict=True):
        # Each chunk's weight gradient is rounded to bf16 before the fp32 sum: one rounding more than one large product.
        assert fused_error < 1.25 * naive_error


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets, weights = inputs(5, 11, 4, torch.float32)
    loss, _ = fused_linear_cross_entropy((hidden * 1e4).detach(), weight, targets, weights)
    expected, _ = naive((hidden * 1e4).detach(), weight, targets, weights)
    torch.testing.assert_close(loss, expected)


def test_without_grad_nothing_is_kept_for_backward() -> None:
    arguments = inputs(5, 11, 4, torch.float32)
    with torch.no_grad():
        loss, _ = fused_linear_cross_entropy(*arguments)
    assert loss.grad_fn is None
    torch.testing.assert_close(loss, naive(*arguments)[0].detach())


def test_selected_rows_are_those_with_weight() -> None:
    tokens = torch.arange(24).reshape(2, 12) + 10
    noise = corrupt(tokens, torch.arange(2), NoiseSpec(mask_token_id=3, eps=0.3, seed=1))
    loss_mask = torch.ones(2, 12)
    loss_mask[1, 4] = 0
    batch = build_joint_batch(tokens, tokens + 1, loss_mask, noise, 4)
    selected = select_weighted_rows(batch, 0.3)
    by_row = {
        int(row): (int(t), float(w))
        for row, t, w in zip(selected.rows, selected.targets, selected.weights, strict=True)
    }
    assert len(by_row) == int(noise.is_noised.sum()) + 23
    for sequence in range(2):
        for position in range(12):
            noisy_row, clean_row = position * 2 + sequence, (12 + position) * 2 + sequence
            token = int(tokens[sequence, position])
            if noise.is_noised[sequence, position]:
                assert by_row[noisy_row] == (token, pytest.approx(0.3 / float(noise.p_mask[sequence, position])))
            else:
                assert noisy_row not in by_row
            assert (clean_row in by_row) == bool(loss_mask[sequence, position])
            if clean_row in by_row:
                assert by_row[clean_row] == (token + 1, 1.0)


def split_head(topology: Topology, platform: Platform, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    from megatron.core import parallel_state

    hidden, weight, targets, weights = arguments
    rank, size = topology.tensor_parallel_rank, topology.tensor_parallel_size
    part = weight.chunk(size, dim=0)[rank].detach().clone().requires_grad_()
    hidden = hidden.detach().clone().requires_grad_()
    group = parallel_state.get_tensor_model_parallel_group()
    loss, row_losses = fused_linear_cross_entropy(
        hidden, part, targets, weights, first_vocab_id=rank * part.shape[0], group=group if size > 1 else None
    )
    loss.backward()
    parts = [torch.empty_like(part) for _ in range(size)]
    torch.distributed.all_gather(parts, part.grad, group=group)
    return [loss.detach(), row_losses, hidden.grad, torch.cat(parts)]


def test_two_tensor_parallel_ranks_equal_one(one_rank: RankPool, two_ranks: RankPool) -> None:
    arguments = tuple(argument.detach() for argument in inputs(30, 38, 12, torch.float64))
    expected = one_rank.run(split_head, arguments)
    found = two_ranks.run(split_head, arguments, parallel=ParallelConfig(tensor_model_parallel_size=2))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
