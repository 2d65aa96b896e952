"""The fused head against full logits and torch's cross-entropy."""

import math
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import nld_train.model.head as head
from nld_train.config.schema import ParallelConfig
from nld_train.model.head import fused_linear_cross_entropy, gather_rows, select_weighted_rows
from nld_train.objective.noise import NoiseSpec, corrupt
from nld_train.objective.sequence import build_joint_batch
from nld_train.platform.cpu import bf16_operands
from nld_train.platform.device import Platform
from nld_train.platform.topology import Topology
from nld_train.testing.memory import LiveTensors
from nld_train.testing.ranks import RankPool


def inputs(rows: int, vocab: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden_states = torch.randn(rows, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64).mul(0.3).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator, dtype=torch.float64) * 5
    return hidden_states, weight, targets, weights


def set_rows(monkeypatch: pytest.MonkeyPatch, chunk: int, of_pass: int) -> None:
    monkeypatch.setattr(head, "chunk_rows", lambda dtype, device, num_local=1: chunk)
    monkeypatch.setattr(head, "pass_rows", lambda num_local, dtype, device: of_pass)


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.t()
    losses = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")
    return (losses * weights.to(losses.dtype)).sum(), losses


def give_main_grad(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What Megatron's DistributedDataParallel does to a parameter; the buffer does not start at zero here."""
    buffer = torch.full(weight.shape, 0.5, dtype=dtype)
    weight.main_grad = buffer  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    return buffer


@pytest.mark.parametrize("of_pass", [3, 8])  # rows that do not fill the last pass, and one pass
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 50])
def test_fused_equals_naive_in_float64(monkeypatch: pytest.MonkeyPatch, rows: int, of_pass: int) -> None:
    set_rows(monkeypatch, 8, of_pass)  # several chunks, and rows that do not fill the last
    arguments = inputs(rows, 37, 12, torch.float64)
    loss, row_losses, _ = fused_linear_cross_entropy(*arguments)
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


@pytest.mark.parametrize("has_main_grad", [False, True])
@pytest.mark.parametrize("padding", [1, 3, 20])  # in the last chunk; the whole of one; and of two
def test_rows_of_padding_have_no_loss_and_no_gradient(
    monkeypatch: pytest.MonkeyPatch, padding: int, has_main_grad: bool
) -> None:
    set_rows(monkeypatch, 8, 3)
    hidden, weight, targets, weights = inputs(21, 37, 12, torch.float64)
    loss, row_losses = naive(hidden, weight, targets, weights)
    expected = torch.autograd.grad(loss, (hidden, weight))
    padded = torch.cat([hidden.detach(), torch.full((padding, 12), 1e3, dtype=torch.float64)]).requires_grad_()
    buffer = give_main_grad(weight, torch.float64) if has_main_grad else None
    found, found_rows, is_correct = fused_linear_cross_entropy(padded, weight, targets, weights)
    found.backward()
    assert found_rows.shape == is_correct.shape == (21,)
    torch.testing.assert_close(found, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found_rows, row_losses.detach(), rtol=1e-12, atol=1e-12)
    assert padded.grad is not None
    assert not padded.grad[21:].any()
    torch.testing.assert_close(padded.grad[:21], expected[0], rtol=1e-12, atol=1e-12)
    of_weight = weight.grad if buffer is None else buffer - 0.5
    torch.testing.assert_close(of_weight, expected[1], rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("fast_onednn")
@pytest.mark.parametrize("rows", [64, 70])
def test_fp32_by_either_library(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """With rows of padding, as the last layer gives them."""
    set_rows(monkeypatch, 32, 3)
    hidden, weight, targets, weights = inputs(rows, 37, 12, torch.float32)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = torch.autograd.grad(naive(*exact, targets, weights)[0], exact)
    padded = torch.cat([hidden.detach(), hidden.detach()[: 96 - rows]]).requires_grad_()
    buffer = give_main_grad(weight, torch.float32)
    fused_linear_cross_entropy(padded, weight, targets, weights)[0].backward()
    assert padded.grad is not None
    for found, wanted in ((padded.grad[:rows], expected[0]), (buffer - 0.5, expected[1])):
        assert (found.double() - wanted).norm() < 1e-6 * wanted.norm()
    assert not padded.grad[rows:].any()


@pytest.mark.parametrize(
    ("rows", "usual", "sizes"),
    [
        (2048, 1024, [1024, 1024]),
        (1331, 1024, [1331]),  # 0.3 of a chunk has none of its own
        (1332, 1024, [672, 660]),
        (1152, 512, [576, 576]),
        (1185, 512, [416, 416, 353]),
        (1000, 333, [334, 334, 332]),  # no multiple was asked for
        (5, 1, [1] * 5),
        (0, 512, []),
    ],
)
def test_chunks_are_nearly_equal_and_share_what_is_left_over(rows: int, usual: int, sizes: list[int]) -> None:
    chunks = head._equal_chunks(rows, usual)
    assert [chunk.stop - chunk.start for chunk in chunks] == sizes
    assert [row for chunk in chunks for row in range(rows)[chunk]] == list(range(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_do_not_depend_on_the_rows_of_a_pass(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Bit for bit: rows have nothing to do with each other, and the matrix products are of a chunk in any case."""
    found = []
    for of_pass in (1, 3, 8, 100):
        set_rows(monkeypatch, 8, of_pass)
        hidden, weight, targets, weights = inputs(29, 37, 12, dtype)
        buffer = give_main_grad(weight, torch.float32)
        loss, row_losses, is_correct = fused_linear_cross_entropy(hidden, weight, targets, weights)
        loss.backward()
        found.append([loss.detach(), row_losses, is_correct, hidden.grad, buffer])
    for others in found[1:]:
        for ours, theirs in zip(found[0], others, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("of_pass", [3, 100])
def test_a_row_whose_loss_is_not_finite_has_a_gradient_that_is_not(
    monkeypatch: pytest.MonkeyPatch, of_pass: int
) -> None:
    """A target logit of -inf has an infinite loss and would have a finite gradient: nobody would notice by the norm."""
    set_rows(monkeypatch, 100, of_pass)
    hidden, weight, targets, weights = inputs(4, 11, 5, torch.float32)
    with torch.no_grad():
        hidden[2] = torch.tensor([1.0, 0, 0, 0, 0])
        weight[:, 0] = 0
        weight[targets[2], 0] = -math.inf
        hidden[[0, 1, 3], 0] = 0
    targets[[0, 1, 3]] = (targets[2] + 1) % 11
    loss, row_losses, _ = fused_linear_cross_entropy(hidden, weight, targets, weights)
    assert row_losses[2] == math.inf
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad[2].isnan().any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_main_grad_collects_the_gradients_of_two_micro_batches(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float
) -> None:
    set_rows(monkeypatch, 8, 3)
    hidden, weight, targets, weights = inputs(50, 37, 12, dtype)
    buffer = give_main_grad(weight, dtype)
    parts = [slice(0, 20), slice(20, 50)]
    losses = [fused_linear_cross_entropy(hidden[part], weight, targets[part], weights[part])[0] for part in parts]
    for loss in losses:  # both forwards before the first backward, as in a pipeline
        loss.backward()
        assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
        # Megatron's hook asks for some gradient; this one holds no memory.
        assert weight.grad.is_sparse
        assert weight.grad._nnz() == 0
        weight.grad = None
    found_hidden, hidden.grad = hidden.grad.clone(), None
    del weight.main_grad  # type: ignore[attr-defined]
    naive(hidden, weight, targets, weights)[0].backward()
    torch.testing.assert_close(buffer - 0.5, weight.grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found_hidden, hidden.grad, rtol=tolerance, atol=tolerance)


def test_main_grad_of_another_dtype_is_left_to_megatron() -> None:
    arguments = inputs(9, 37, 12, torch.float64)
    buffer = give_main_grad(arguments[1], torch.float32)
    fused_linear_cross_entropy(*arguments)[0].backward()
    found = arguments[1].grad.clone()
    assert buffer.eq(0.5).all()
    assert not arguments[1].grad_added_to_main_grad  # type: ignore[attr-defined]
    arguments[1].grad = None
    naive(*arguments)[0].backward()
    torch.testing.assert_close(found, arguments[1].grad, rtol=1e-12, atol=1e-12)


def test_a_scaled_loss_is_refused_where_the_gradient_is_in_main_grad_already() -> None:
    arguments = inputs(9, 37, 12, torch.float32)
    give_main_grad(arguments[1], torch.float32)
    loss, _, _ = fused_linear_cross_entropy(*arguments)
    with pytest.raises(ValueError, match=r"must be exactly 1.*found 0\.5"):
        (loss * 0.5).backward()


def test_a_head_without_gradient_gives_only_that_of_hidden() -> None:
    arguments = inputs(9, 37, 12, torch.float64)
    expected = torch.autograd.grad(naive(*arguments)[0], arguments[0])[0]
    arguments[1].requires_grad_(False)
    buffer = give_main_grad(arguments[1], torch.float64)
    fused_linear_cross_entropy(*arguments)[0].backward()
    torch.testing.assert_close(arguments[0].grad, expected, rtol=1e-12, atol=1e-12)
    assert arguments[1].grad is None
    assert buffer.eq(0.5).all()


@pytest.mark.parametrize("has_main_grad", [True, False])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_bf16_error_is_within_that_of_naive_bf16(
    monkeypatch: pytest.MonkeyPatch, has_main_grad: bool, seed: int
) -> None:
    """With main_grad the weight's gradient is never rounded to bf16; else it is rounded once, as the naive one's."""
    set_rows(monkeypatch, 32, 12)
    exact = inputs(300 + seed, 50, 16, torch.float64)
    naive(*exact)[0].backward()
    errors = {}
    for name in ("fused", "naive"):
        hidden, weight = (a.detach().to(torch.bfloat16).requires_grad_() for a in exact[:2])
        if name == "fused":
            if has_main_grad:
                give_main_grad(weight, torch.float32).zero_()
            fused_linear_cross_entropy(hidden, weight, *exact[2:])[0].backward()
        else:
            naive(hidden, weight, *exact[2:])[0].backward()
        of_weight = weight.main_grad if has_main_grad and name == "fused" else weight.grad  # type: ignore[attr-defined]
        errors[name] = [
            ((found.double() - e.grad).norm() / e.grad.norm()).item()
            for found, e in zip((hidden.grad, of_weight), exact[:2], strict=True)
        ]
    for fused_error, naive_error in zip(errors["fused"], errors["naive"], strict=True):
        assert fused_error <= naive_error


def test_the_setting_for_bf16_products_ends_with_the_head() -> None:
    arguments = inputs(9, 37, 12, torch.bfloat16)
    before = torch.backends.mkldnn.matmul.fp32_precision
    fused_linear_cross_entropy(*arguments)[0].backward()
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_products_of_bf16_values_are_fp32() -> None:
    """Where the CPU reads fp32 operands as bf16, too: neither products nor sums are rounded to it."""
    generator = torch.Generator().manual_seed(9)
    a, b = (torch.randn(64, 64, generator=generator).to(torch.bfloat16) for _ in range(2))
    with bf16_operands():
        found = a.float() @ b.float()
    exact = a.double() @ b.double()
    assert (found - exact).norm() < 1e-6 * exact.norm()


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets, weights = inputs(5, 11, 4, torch.float32)
    loss, _, _ = fused_linear_cross_entropy((hidden * 1e4).detach(), weight, targets, weights)
    expected, _ = naive((hidden * 1e4).detach(), weight, targets, weights)
    torch.testing.assert_close(loss, expected)


def test_without_grad_nothing_is_computed_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = inputs(5, 11, 4, torch.float32)
    buffer = give_main_grad(arguments[1], torch.float32)
    monkeypatch.setattr(head, "_add_weight_gradient", None)  # a call would fail
    with torch.no_grad():
        loss, _, _ = fused_linear_cross_entropy(*arguments)
    assert loss.grad_fn is None
    assert buffer.eq(0.5).all()
    torch.testing.assert_close(loss, naive(*arguments)[0].detach())


def test_correct_rows_are_those_whose_target_is_the_largest_logit() -> None:
    hidden, weight, targets, weights = inputs(50, 5, 12, torch.float64)
    is_correct = fused_linear_cross_entropy(hidden, weight, targets, weights)[2]
    assert is_correct.dtype == torch.bool
    assert not is_correct.requires_grad
    assert torch.equal(is_correct, (hidden @ weight.t()).argmax(1) == targets)
    assert 0 < is_correct.sum() < 50
    tied = torch.ones(3, 12, dtype=torch.float64)
    assert fused_linear_cross_entropy(tied, torch.ones_like(weight), targets[:3], weights[:3])[2].all()


class _LargestFp32(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, Tensor) and x.dtype is torch.float32:
                self.elements = max(self.elements, x.numel())
        return out


def test_half_precision_has_the_logits_of_one_pass_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    set_rows(monkeypatch, 64, 8)
    hidden, weight, targets, weights = inputs(100, 512, 4, torch.bfloat16)
    give_main_grad(weight, torch.float32)
    with _LargestFp32() as largest:
        fused_linear_cross_entropy(hidden, weight, targets, weights)[0].backward()
    assert largest.elements == 8 * 512


def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values, taken as those of a GPU. Nothing on the host may ask for a value."""
    chunk, of_pass, cuda = head.chunk_rows, head.pass_rows, torch.device("cuda")
    monkeypatch.setattr(head, "chunk_rows", lambda dtype, device, num_local=1: chunk(dtype, cuda))
    monkeypatch.setattr(head, "pass_rows", lambda num_local, dtype, device: of_pass(num_local, dtype, cuda))
    monkeypatch.setitem(head._PRODUCT_ROWS, "meta", head._PRODUCT_ROWS["cuda"])


def of_shape(rows: int, vocab: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.device("meta"):
        states, weight = (torch.empty(size, hidden, dtype=dtype, requires_grad=True) for size in (rows, vocab))
        weight.main_grad = torch.empty(weight.shape)  # type: ignore[attr-defined]
        return states, weight, torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_host_asks_for_no_value(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    on_meta(monkeypatch)
    loss, row_losses, _ = fused_linear_cross_entropy(*of_shape(5000, 32768, 16, dtype))
    loss.backward()
    assert row_losses.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_on_a_gpu_is_a_third_of_that_of_full_logits(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """All tensors that are alive at a time, with the weight and its buffer; what libraries take is not seen.
    tests/gpu/test_kernels.py measures it."""
    on_meta(monkeypatch)

    def peak(compute: Callable[..., tuple[Tensor, ...]]) -> int:
        with LiveTensors() as live:
            arguments = of_shape(2048, 131072, 1024, dtype)
            live.add(arguments[1].main_grad)  # type: ignore[attr-defined]
            compute(*arguments)[0].backward()
        return live.most

    assert peak(fused_linear_cross_entropy) <= 0.35 * peak(naive)


def test_selected_rows_are_those_with_weight() -> None:
    tokens = torch.arange(24).reshape(2, 12) + 10
    noise = corrupt(tokens, torch.arange(2), NoiseSpec(mask_token_id=3, eps=0.3, seed=1, block_size=4))
    loss_mask = torch.ones(2, 12)
    loss_mask[1, 4] = 0
    batch = build_joint_batch(tokens, tokens + 1, loss_mask, noise, 4)
    selected = select_weighted_rows(batch, torch.cat([0.3 * noise.weights, loss_mask.double()], dim=1))
    by_row = {
        int(row): (int(t), float(w))
        for row, t, w in zip(selected.rows, selected.targets, selected.weights, strict=True)
    }
    assert len(by_row) == int((noise.weights > 0).sum()) + 23
    for sequence in range(2):
        for position in range(12):
            noisy_row, clean_row = position * 2 + sequence, (12 + position) * 2 + sequence
            token = int(tokens[sequence, position])
            if noise.weights[sequence, position] > 0:
                assert by_row[noisy_row] == (token, pytest.approx(0.3 * float(noise.weights[sequence, position])))
            else:
                assert noisy_row not in by_row
            assert (clean_row in by_row) == bool(loss_mask[sequence, position])
            if clean_row in by_row:
                assert by_row[clean_row] == (token + 1, 1.0)


def test_gathered_rows_are_in_megatrons_order() -> None:
    hidden = torch.arange(24.0).reshape(3, 2, 4)  # [S, B, H]
    found = gather_rows(hidden, torch.tensor([1, 4]))
    assert torch.equal(found, torch.stack([hidden[0, 1], hidden[2, 0]]).unsqueeze(1))


def split_head(
    topology: Topology,
    platform: Platform,
    arguments: tuple[Tensor, ...],
    has_main_grad: bool,
    chunk: int = 100,
    of_pass: int = 100,
) -> list[Tensor]:
    """Loss, losses, who is right, gradients of hidden and of the whole weight, number of all-reduces."""
    from megatron.core import parallel_state

    hidden, weight, targets, weights = arguments
    rank, size = topology.tensor_parallel_rank, topology.tensor_parallel_size
    part = weight.chunk(size, dim=0)[rank].detach().clone().requires_grad_()
    hidden = hidden.detach().clone().requires_grad_()
    group = parallel_state.get_tensor_model_parallel_group()
    if has_main_grad:
        give_main_grad(part, torch.promote_types(part.dtype, torch.float32)).zero_()
    all_reduce = torch.distributed.all_reduce
    with (
        pytest.MonkeyPatch.context() as changes,
        patch.object(torch.distributed, "all_reduce", wraps=all_reduce) as calls,
    ):
        set_rows(changes, chunk, of_pass)
        loss, row_losses, is_correct = fused_linear_cross_entropy(
            hidden, part, targets, weights, first_vocab_id=rank * part.shape[0], group=group if size > 1 else None
        )
    loss.backward()
    gradient = part.main_grad if has_main_grad else part.grad  # type: ignore[attr-defined]
    parts = [torch.empty_like(gradient) for _ in range(size)]
    torch.distributed.all_gather(parts, gradient, group=group)
    return [loss.detach(), row_losses, is_correct, hidden.grad, torch.cat(parts), torch.tensor(calls.call_count)]


TENSOR_PARALLEL = ParallelConfig(tensor_model_parallel_size=2)


@pytest.mark.parametrize("has_main_grad", [True, False])
@pytest.mark.parametrize(("chunk", "of_pass"), [(100, 100), (8, 3), (8, 8)])
def test_two_tensor_parallel_ranks_equal_one(
    one_rank: RankPool, two_ranks: RankPool, has_main_grad: bool, chunk: int, of_pass: int
) -> None:
    arguments = tuple(argument.detach() for argument in inputs(30, 6, 12, torch.float64))
    *expected, none = one_rank.run(split_head, arguments, False)
    *found, num_calls = two_ranks.run(
        split_head, arguments, has_main_grad, chunk, of_pass, parallel=TENSOR_PARALLEL
    )  # fmt: skip
    assert 0 < expected[2].sum() < 30
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert none == 0
    assert num_calls == 2 * math.ceil(30 / chunk) + 1  # two of each chunk, however it is gone over


@pytest.mark.parametrize("of_pass", [3, 8])
def test_two_tensor_parallel_ranks_equal_one_in_bf16(one_rank: RankPool, two_ranks: RankPool, of_pass: int) -> None:
    """Logits are the same; gradients of them are rounded alike, unless the sum's order decides where to."""
    arguments = tuple(argument.detach() for argument in inputs(30, 6, 12, torch.bfloat16))
    *expected, _ = one_rank.run(split_head, arguments, True, 8, 8)
    *found, _ = two_ranks.run(split_head, arguments, True, 8, of_pass, parallel=TENSOR_PARALLEL)
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert torch.equal(found[2], expected[2])
    of_hidden, of_weight = (
        ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
        for ours, theirs in zip(found[3:], expected[3:], strict=True)
    )
    assert of_hidden < 4e-3  # a rank's part of it is rounded, too
    assert of_weight < 1e-4


def test_a_row_whose_loss_is_not_finite_tells_both_ranks(two_ranks: RankPool) -> None:
    hidden, weight, targets, weights = (x.detach() for x in inputs(30, 6, 12, torch.bfloat16))
    weight[:, 0] = 0
    weight[4, 0] = -3e38  # of the second rank; overflows in one row
    hidden[:, 0] = 0
    hidden[11, 0] = 100
    targets[11] = 4
    _, row_losses, _, of_hidden, of_weight, _ = two_ranks.run(
        split_head, (hidden, weight, targets, weights), True, 16, 3, parallel=TENSOR_PARALLEL
    )
    assert row_losses[11] == math.inf
    assert row_losses.isinf().sum() == of_hidden.isnan().any(dim=1).sum() == 1
    assert of_hidden[11].isnan().any()
    assert of_weight.isnan().all(dim=1).all()


def test_fp32_takes_fewer_rows_of_a_large_vocabulary_on_the_cpu() -> None:
    cpu = torch.device("cpu")
    assert [head.chunk_rows(torch.float32, cpu, size) for size in (8192, 65536, 131072, 1 << 40)] == [512, 512, 256, 1]
    # Whole units of rows, as products want them.
    assert [head.chunk_rows(torch.float32, cpu, size) for size in (100352, 128256, 151936)] == [320, 256, 192]
    assert head.chunk_rows(torch.bfloat16, cpu, 131072) == head.chunk_rows(torch.bfloat16, cpu)


def test_padding_repeats_a_row_that_enters_the_loss_anyway() -> None:
    rows = torch.tensor([3, 5, 9])
    assert head.padded_to_multiple(rows, 4).tolist() == [3, 5, 9, 9]
    assert head.padded_to_multiple(rows, 3).tolist() == [3, 5, 9]
    assert head.padded_to_multiple(rows[:0], 2).tolist() == [0, 0]
