"""FusedAdam is AdamW, and its state has the form that Megatron saves and loads."""

import math

import pytest
import torch

from nld_train.platform.device import Platform
from nld_train.platform.topology import Topology
from nld_train.testing.ranks import RankPool
from nld_train.training.optimizer import FusedAdam


def test_steps_equal_torch_adamw() -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(5, 3, generator=generator), torch.randn(7, generator=generator)]
    ours, theirs = ([value.clone().requires_grad_() for value in start] for _ in range(2))
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    optimizers = [
        kind([{"params": values[:1], "weight_decay": 0.1}, {"params": values[1:], "weight_decay": 0.0}], **settings)
        for kind, values in ((FusedAdam, ours), (torch.optim.AdamW, theirs))
    ]
    for _ in range(4):
        for values, other in zip(ours, theirs, strict=True):
            values.grad = torch.randn(values.shape, generator=generator)
            other.grad = values.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for values, other, before in zip(ours, theirs, start, strict=True):
        torch.testing.assert_close(values, other, rtol=1e-6, atol=1e-7)
        assert not torch.equal(values, before)
    assert optimizers[0].param_groups[0]["step"] == 4
    assert set(optimizers[0].state[ours[0]]) == {"exp_avg", "exp_avg_sq"}


def decay_case(topology: Topology, platform: Platform) -> dict[str, float]:
    """Largest ratio of each parameter after a step with zero gradients to before."""
    from nld_train.config.schema import OptimConfig, ParallelConfig
    from nld_train.model.build import build_model
    from nld_train.testing.steps import tiny_model
    from nld_train.training.optimizer import build_optimizer, set_hyperparameters, step_with_norm
    from nld_train.training.run import connect, wrap_data_parallel

    model = build_model(tiny_model(), ParallelConfig(), dtype=torch.float32, device=platform.device, seed=1)
    wrapped = wrap_data_parallel(model)
    optim = OptimConfig(weight_decay=0.5, beta1=0.8, beta2=0.9, eps=1e-3, clip_grad=0)
    optimizer = build_optimizer(OptimConfig(clip_grad=0), [wrapped], torch.float32)
    connect([wrapped], optimizer)
    wrapped.zero_grad_buffer()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    set_hyperparameters(optimizer, optim, lr=0.1)
    assert step_with_norm(optimizer, optim) == 0.0
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.8, 0.9), 1e-3)}
    ratios = {name: float((p.detach() / before[name]).max()) for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.main_grad.fill_(0.5)  # type: ignore[attr-defined]
    count = sum(parameter.numel() for parameter in model.parameters())
    norm = step_with_norm(optimizer, optim)  # Megatron itself reports 0 where nothing is clipped
    assert abs(norm - 0.5 * count**0.5) < 1e-3 * norm
    return ratios


def test_matrices_decay_and_norms_do_not(one_rank: RankPool) -> None:
    for name, ratio in one_rank.run(decay_case).items():
        expected = 1.0 if name.endswith("layernorm.weight") else 1 - 0.1 * 0.5
        assert abs(ratio - expected) < 1e-6, name


def skip_case(topology: Topology, platform: Platform) -> tuple[list[float], list[bool]]:
    """Norms that :func:`step_with_norm` returns for good, not finite and good gradients, and which steps changed
    anything of weights, moments and step counts."""
    from nld_train.config.schema import OptimConfig, ParallelConfig
    from nld_train.model.build import build_model
    from nld_train.testing.steps import tiny_model
    from nld_train.training.optimizer import build_optimizer, set_hyperparameters, step_with_norm
    from nld_train.training.run import connect, wrap_data_parallel

    model = build_model(tiny_model(), ParallelConfig(), dtype=torch.bfloat16, device=platform.device, seed=1)
    wrapped = wrap_data_parallel(model)
    optim = OptimConfig(weight_decay=0.5)
    optimizer = build_optimizer(optim, [wrapped], torch.bfloat16)
    connect([wrapped], optimizer)

    def state() -> list[torch.Tensor]:
        parts = getattr(optimizer, "chained_optimizers", [optimizer])
        found = [parameter.detach() for parameter in model.parameters()]
        for inner in (part.optimizer for part in parts):
            found += [torch.tensor(group.get("step", 0)) for group in inner.param_groups]
            found += [parameter.detach() for group in inner.param_groups for parameter in group["params"]]
            found += [value for moments in inner.state.values() for value in moments.values()]
        return [tensor.clone() for tensor in found]

    norms, changes = [], []
    for value in (0.5, math.nan, -math.inf, 1e30, 0.5):  # 1e30: each is finite, their norm in fp32 is not
        wrapped.zero_grad_buffer()
        for parameter in model.parameters():
            parameter.main_grad.fill_(0.5)  # type: ignore[attr-defined]
        if topology.data_parallel_rank == 0:
            next(model.parameters()).main_grad.view(-1)[3] = value  # type: ignore[attr-defined]
        wrapped.finish_grad_sync()
        set_hyperparameters(optimizer, optim, lr=0.1)
        before = state()
        norms.append(step_with_norm(optimizer, optim))
        after = state()
        changes.append(len(before) != len(after) or not all(map(torch.equal, before, after)))
    return norms, changes


@pytest.mark.parametrize("ranks", ["one_rank", "two_ranks"])
def test_a_step_that_is_not_finite_changes_nothing(ranks: str, request: pytest.FixtureRequest) -> None:
    """With two ranks it is one element of one rank's gradient, and neither of them updates."""
    norms, changes = request.getfixturevalue(ranks).run(skip_case)
    assert [math.isfinite(norm) for norm in norms] == [True, False, False, False, True]
    assert changes == [True, False, False, False, True]


def reset_case(topology: Topology, platform: Platform) -> tuple[list[float], list[float]]:
    """Size of the moments and the step count, before and after a reset."""
    from nld_train.config.schema import OptimConfig, ParallelConfig
    from nld_train.model.build import build_model
    from nld_train.testing.steps import tiny_model
    from nld_train.training.optimizer import build_optimizer, reset_moments
    from nld_train.training.run import connect, wrap_data_parallel

    model = build_model(tiny_model(), ParallelConfig(), dtype=torch.float32, device=platform.device, seed=1)
    wrapped = wrap_data_parallel(model)
    optimizer = build_optimizer(OptimConfig(), [wrapped], torch.float32)
    connect([wrapped], optimizer)
    wrapped.zero_grad_buffer()
    for parameter in model.parameters():
        parameter.main_grad.fill_(0.1)  # type: ignore[attr-defined]
    optimizer.step()

    def state() -> list[float]:
        parts = getattr(optimizer, "chained_optimizers", [optimizer])
        inner = [part.optimizer for part in parts]
        moments = sum(float(value.abs().sum()) for one in inner for s in one.state.values() for value in s.values())
        steps = sum(group.get("step", 0) for one in inner for group in one.param_groups)
        return [moments, float(steps)]

    before = state()
    reset_moments(optimizer)
    return before, state()


def test_reset_moments(one_rank: RankPool) -> None:
    before, after = one_rank.run(reset_case)
    assert before[0] > 0
    assert before[1] > 0
    assert after == [0.0, 0.0]
