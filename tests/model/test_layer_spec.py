"""The last layer's prune: after its attention only the rows with weight go on, and nothing else changes."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from nld_train.config.schema import LayerSpec, ParallelConfig, Precision, Recompute
from nld_train.model import build
from nld_train.model.build import NLDModel, build_model, fuses_gradients, row_multiple
from nld_train.model.head import WeightedRows, gather_rows, select_weighted_rows
from nld_train.model.layer_spec import DecoderRows
from nld_train.objective.noise import NoiseSpec, corrupt
from nld_train.objective.sequence import JointBatch, build_joint_batch
from nld_train.platform.device import Platform
from nld_train.platform.topology import Topology
from nld_train.testing.ranks import RankPool
from nld_train.testing.steps import tiny_model, whole_tensors
from nld_train.training.run import wrap_data_parallel

LENGTH, BLOCK = 16, 4
SEEDS = (1, 5)  # 26 and 35 rows of the loss


def micro_batch(seed: int) -> tuple[JointBatch, WeightedRows]:
    """Two sequences of [noisy 16 | clean 16]; the rows of the loss differ from seed to seed in place and number."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, tiny_model().vocab_size, (2, LENGTH), generator=generator)
    labels = tokens.roll(-1, dims=1)
    spec = NoiseSpec(mask_token_id=3, eps=1e-3, seed=seed, block_size=BLOCK)
    noise = corrupt(tokens, torch.arange(2) + seed, spec)
    loss_mask = torch.rand(tokens.shape, generator=generator) < 0.7
    batch = build_joint_batch(tokens, labels, loss_mask, noise, BLOCK)
    return batch, select_weighted_rows(batch, torch.cat([0.3 * noise.weights, loss_mask.double()], dim=1))


def small_model(platform: Platform, parallel: ParallelConfig) -> NLDModel:
    return build_model(tiny_model(), parallel, dtype=torch.float64, device=platform.device, seed=1)


def run_unpruned(model: NLDModel, batch: JointBatch, selected: WeightedRows) -> Any:
    hidden = model.embedding(input_ids=batch.tokens, position_ids=None)
    rows = DecoderRows(layout=batch.layout, selected=None)
    hidden = model.decoder(hidden_states=hidden, attention_mask=None, attention_bias=rows)
    return model.output_layer(gather_rows(hidden, selected.rows), selected)


def joint_step(topology: Topology, platform: Platform, prunes: bool, parallel: ParallelConfig) -> dict[str, Tensor]:
    """Losses and gradients of two micro-batches in a pipeline's order, the rows that the last MLP saw, and how often
    its attention core ran."""
    model = small_model(platform, parallel)
    mlp_rows: list[int] = []
    calls: list[None] = []
    last = model.decoder.layers[-1]
    last.self_attention.core_attention.register_forward_pre_hook(lambda *_: calls.append(None))
    last.mlp.register_forward_pre_hook(lambda _, inputs: mlp_rows.append(inputs[0].shape[:2].numel()))
    results = []
    for seed in SEEDS:
        batch, selected = micro_batch(seed)
        results.append(model(batch.tokens, batch.layout, selected) if prunes else run_unpruned(model, batch, selected))
    for loss, _, _ in results:  # both forwards first: what is recomputed must be its own micro-batch
        loss.backward()
    found = {f"loss {i}": loss.detach() for i, (loss, _, _) in enumerate(results)}
    found |= {f"row losses {i}": losses for i, (_, losses, _) in enumerate(results)}
    found |= {f"is_correct {i}": is_correct for i, (_, _, is_correct) in enumerate(results)}
    for parameter in model.parameters():
        if getattr(parameter, "sequence_parallel", False):  # each rank has the gradient from its own rows
            dist.all_reduce(parameter.grad, group=parallel_state.get_tensor_model_parallel_group())
    found |= whole_tensors([model], lambda p: p.grad)
    return found | {"mlp rows": torch.tensor(mlp_rows), "calls": torch.tensor(len(calls))}


CALLS = {Recompute.none: 2, Recompute.selective: 4, Recompute.full: 4}  # of two micro-batches


@pytest.mark.parametrize("recompute", list(Recompute))
def test_pruned_equals_unpruned(one_rank: RankPool, recompute: Recompute) -> None:
    expected = one_rank.run(joint_step, False, ParallelConfig())
    found = one_rank.run(joint_step, True, ParallelConfig(recompute_granularity=recompute))
    counts = [len(micro_batch(seed)[1].rows) for seed in SEEDS]
    assert counts[0] != counts[1]
    assert expected.pop("mlp rows").tolist() == [2 * 2 * LENGTH] * 2
    assert expected.pop("calls").item() == CALLS[Recompute.none]
    assert found.pop("mlp rows").tolist() == counts * (2 if recompute is Recompute.full else 1)
    assert found.pop("calls").item() == CALLS[recompute]
    same(found, expected)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-11, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("recompute", list(Recompute))
def test_two_tensor_parallel_ranks_prune_alike(
    one_rank: RankPool, two_ranks: RankPool, recompute: Recompute, sequence_parallel: bool
) -> None:
    """With sequence parallelism each with half of the selected rows, one of them padded."""
    expected = one_rank.run(joint_step, True, ParallelConfig())
    parallel = ParallelConfig(
        tensor_model_parallel_size=2, sequence_parallel=sequence_parallel, recompute_granularity=recompute
    )
    found = two_ranks.run(joint_step, True, parallel, parallel=parallel)
    counts = expected.pop("mlp rows").tolist()
    assert any(count % 2 for count in counts)
    here = [-(-count // 2) for count in counts] if sequence_parallel else counts
    assert found.pop("mlp rows").tolist() == here * (2 if recompute is Recompute.full else 1)
    expected.pop("calls"), found.pop("calls")
    same(found, expected)


def padded_step(
    topology: Topology, platform: Platform, parallel: ParallelConfig, function: str, multiple: int
) -> dict[str, Tensor]:
    """:func:`joint_step` with rows in multiples of so many, since this function of ``model.build`` says so."""
    with patch.object(build, function, lambda *_: multiple):
        return joint_step(topology, platform, True, parallel)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("function", ["row_multiple_of", "fast_rows"])
def test_rows_padded_for_products_change_nothing(
    one_rank: RankPool, two_ranks: RankPool, function: str, ranks: int
) -> None:
    """FP8: one rank takes 16 rows at a time; with sequence parallelism each of two has a share of 32. Products that are
    fast for 24 rows: of these together. (Both in float64 here.)"""
    expected = one_rank.run(joint_step, True, ParallelConfig())
    parallel = ParallelConfig(tensor_model_parallel_size=ranks, sequence_parallel=ranks > 1)
    multiple = row_multiple(parallel, Precision.fp8) if function == "row_multiple_of" else 24
    pool = one_rank if ranks == 1 else two_ranks
    found = pool.run(padded_step, parallel, function, multiple, parallel=parallel)
    counts = expected.pop("mlp rows").tolist()
    assert any(count % 16 for count in counts)
    assert multiple == (24 if function == "fast_rows" else 16 * ranks)
    assert found.pop("mlp rows").tolist() == [-(-count // multiple) * multiple // ranks for count in counts]
    same(found, expected)


def no_row_with_weight(topology: Topology, platform: Platform, parallel: ParallelConfig) -> None:
    model = small_model(platform, parallel)
    batch, selected = micro_batch(1)
    logits = model(batch.tokens, batch.layout)
    assert logits.shape == (2, 2 * LENGTH, tiny_model().vocab_size)
    _, row_losses, _ = model(batch.tokens, batch.layout, selected)
    of_rows = logits.transpose(0, 1).flatten(0, 1)[selected.rows]
    expected = torch.nn.functional.cross_entropy(of_rows, selected.targets, reduction="none")
    torch.testing.assert_close(row_losses, expected)
    nothing = replace(selected, rows=selected.rows[:0], targets=selected.targets[:0], weights=selected.weights[:0])
    loss, row_losses, _ = model(batch.tokens, batch.layout, nothing)
    loss.backward()
    assert loss == 0
    assert row_losses.shape == (0,)
    assert all(parameter.grad is not None and parameter.grad.eq(0).all() for parameter in model.parameters())


def test_sequence_parallel_logits_and_micro_batches_without_weight(two_ranks: RankPool) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    two_ranks.run(no_row_with_weight, parallel, parallel=parallel)


def test_gradients_are_fused_where_apex_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its kernel, in Megatron's own layers on a GPU; Transformer Engine's have one of their own."""
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    model = tiny_model()
    assert not fuses_gradients(model, torch.bfloat16, cuda)
    monkeypatch.setattr(build.megatron_layers, "_grad_accum_fusion_available", True)
    assert fuses_gradients(model, torch.bfloat16, cuda)
    assert not fuses_gradients(model, torch.bfloat16, cpu)
    assert not fuses_gradients(model, torch.float64, cuda)
    assert not fuses_gradients(replace(model, layer_spec=LayerSpec.transformer_engine), torch.bfloat16, cuda)


def other_calls(topology: Topology, platform: Platform) -> None:
    """Calls around a pruned one: logits have all rows, a micro-batch may have no row with weight, names stay."""
    model = small_model(platform, ParallelConfig())
    batch, selected = micro_batch(1)
    with torch.no_grad():
        before = model(batch.tokens, batch.layout)
        loss, row_losses, is_correct = model(batch.tokens, batch.layout, selected)
        after = model(batch.tokens, batch.layout)
    assert before.shape == (2, 2 * LENGTH, tiny_model().vocab_size)
    assert torch.equal(before, after)
    of_rows = before.transpose(0, 1).flatten(0, 1)[selected.rows]
    torch.testing.assert_close(
        row_losses, torch.nn.functional.cross_entropy(of_rows, selected.targets, reduction="none")
    )
    assert torch.equal(is_correct, of_rows.argmax(1) == selected.targets)

    nothing = replace(selected, rows=selected.rows[:0], targets=selected.targets[:0], weights=selected.weights[:0])
    loss, row_losses, _ = model(batch.tokens, batch.layout, nothing)
    loss.backward()
    assert loss == 0
    assert row_losses.shape == (0,)
    assert all(parameter.grad is not None and parameter.grad.eq(0).all() for parameter in model.parameters())
    layer = "decoder.layers.0."
    assert [
        name.removeprefix(layer) for name in model.state_dict() if name.startswith(layer) and "_extra" not in name
    ] == [
        "input_layernorm.weight",
        "self_attention.linear_proj.weight",
        "self_attention.linear_qkv.weight",
        "pre_mlp_layernorm.weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    ]


def test_logits_and_micro_batches_without_weight(one_rank: RankPool) -> None:
    one_rank.run(other_calls)


def through_data_parallelism(topology: Topology, platform: Platform, overlap: bool) -> list[Tensor]:
    """The head's gradient over two micro-batches: as a plain module, and in Megatron's buffer."""
    plain = small_model(platform, ParallelConfig())
    model = small_model(platform, ParallelConfig())
    wrapped = wrap_data_parallel(model, overlap_grad_reduce=overlap, use_distributed_optimizer=False)
    wrapped.zero_grad_buffer()
    for seed in SEEDS:
        batch, selected = micro_batch(seed)
        plain(batch.tokens, batch.layout, selected)[0].backward()
        loss = wrapped(batch.tokens, batch.layout, selected)[0]
        if overlap and seed == 1:
            with wrapped.no_sync():
                loss.backward()
        else:
            loss.backward()
    wrapped.finish_grad_sync()
    weight = model.output_layer.weight
    assert weight.grad_added_to_main_grad
    assert weight.grad is None
    found = weight.main_grad.clone()
    wrapped.zero_grad_buffer()
    assert not weight.grad_added_to_main_grad
    assert weight.main_grad.eq(0).all()
    return [found, plain.output_layer.weight.grad]


@pytest.mark.parametrize("overlap", [False, True])
def test_the_heads_gradient_reaches_megatrons_buffer_once(one_rank: RankPool, overlap: bool) -> None:
    found, expected = one_rank.run(through_data_parallelism, overlap)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
