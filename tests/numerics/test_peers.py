"""What the benchmark measures against computes the same loss and gradients as the engine's step."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from nld_train.config.schema import ObjectiveConfig, ParallelConfig
from nld_train.model.attention import resolve_backend
from nld_train.model.build import build_model
from nld_train.model.head import select_weighted_rows
from nld_train.objective.normalize import row_weights
from nld_train.platform.device import Platform
from nld_train.platform.topology import Topology
from nld_train.testing.benchmarks.comparison import Comparison, Work, check_equal
from nld_train.testing.benchmarks.step import STEP_RECIPE, EngineStep, loader_batch
from nld_train.testing.peers import PlainModel, PublicRecipeModel
from nld_train.testing.ranks import RankPool
from nld_train.testing.steps import StepCase, loader_batches, tiny_model, tiny_recipe
from nld_train.training.run import connect, wrap_data_parallel
from nld_train.training.step import LossWeights, StepShape, lay_out, run_microbatches

LENGTH, BLOCK = 32, 4


def gradients_of_all(topology: Topology, platform: Platform, case: StepCase) -> dict[str, dict[str, Tensor]]:
    """Loss sum and gradients (not yet divided) of one micro-batch: ours, the public recipe's, the plain loop's."""
    shape, device, objective = case.model, platform.device, case.objective
    (sample,) = loader_batches(case, topology)
    weights = LossWeights(diffusion=0.3)
    ours = build_model(shape, ParallelConfig(), dtype=torch.float64, device=device, seed=1)
    found: dict[str, dict[str, Tensor]] = {}
    for name, model in (
        ("ours", ours),
        ("public", PublicRecipeModel(shape, dtype=torch.float64, device=device, seed=1)),
    ):
        wrapped = wrap_data_parallel(model, use_distributed_optimizer=False)
        connect([wrapped], None)
        wrapped.zero_grad_buffer()
        step = StepShape(num_microbatches=1, micro_batch_size=len(sample.tokens), num_rows=None)
        terms = run_microbatches(iter([sample]), [wrapped], step, objective=objective, weights=weights, device=device)
        found[name] = {key: parameter.main_grad * terms.divisor for key, parameter in model.named_parameters()}
        found[name]["loss"] = terms.loss_sum
    plain = PlainModel(shape, dict(ours.named_parameters()), resolve_backend(shape.attention_backend, device))
    joint = lay_out(sample, objective.block_size)
    of_rows = row_weights(joint, objective.normalization.value, weights.diffusion, weights.ar)
    loss = plain(joint.tokens, joint.layout, select_weighted_rows(joint, of_rows))
    loss.backward()
    found["plain"] = {key: plain.get_parameter(name).grad for key, name in plain.names.items()}
    found["plain"]["loss"] = loss.detach()
    return found


def test_what_is_measured_against_takes_the_same_step(one_rank: RankPool) -> None:
    samples = torch.randint(4, tiny_model().vocab_size, (2, LENGTH + 1), generator=torch.Generator().manual_seed(2))
    objective: ObjectiveConfig = tiny_recipe(block_size=BLOCK, noisy_fraction=0.5)
    for case in (
        StepCase(samples=samples, objective=tiny_recipe(block_size=BLOCK), micro_batch_size=2),
        StepCase(samples=samples, objective=objective, micro_batch_size=2),
    ):
        found = one_rank.run(gradients_of_all, case)
        for peer in ("public", "plain"):
            assert set(found[peer]) == set(found["ours"])
            for name, expected in found["ours"].items():
                error = ((found[peer][name] - expected).norm() / expected.norm()).item()
                assert error < 1e-12, f"{peer}, {name}: {error:.1e}"


def whose_parts(topology: Topology, platform: Platform) -> list[tuple[str, str]]:
    """Norms and MLPs of the public recipe's model: module and class."""
    public = PublicRecipeModel(tiny_model(), dtype=torch.bfloat16, device=platform.device, seed=1)
    assert {parameter.dtype for parameter in public.parameters()} == {torch.bfloat16}
    parts = [
        part for layer in public.decoder.layers for part in (layer.input_layernorm, layer.pre_mlp_layernorm, layer.mlp)
    ]
    return [(type(part).__module__, type(part).__name__) for part in (*parts, public.decoder.final_layernorm)]


def test_on_the_cpu_the_public_recipe_has_the_public_norm_and_mlp(one_rank: RankPool) -> None:
    norm, mlp = ("torch.nn.modules.normalization", "RMSNorm"), ("megatron.core.transformer.mlp", "MLP")
    assert one_rank.run(whose_parts) == [norm, norm, mlp] * 2 + [norm]


def compared_engine_steps(topology: Topology, platform: Platform, spoils: bool) -> str:
    """What the step suite compares: the message of the refusal, empty if there is none.

    Args:
        spoils: one weight of the public recipe's model is another.
    """
    shape, device = replace(tiny_model(), vocab_size=1200), platform.device
    text = torch.randint(1000, shape.vocab_size, (2, 65), generator=torch.Generator().manual_seed(0))
    sample = loader_batch(text, STEP_RECIPE, torch.ones(2, 64, dtype=torch.bool))
    public = PublicRecipeModel(shape, dtype=torch.float32, device=device, seed=1)
    if spoils:
        with torch.no_grad():
            next(iter(public.decoder.layers)).mlp.linear_fc2.weight[0] *= 1.01
    ours = build_model(shape, ParallelConfig(), dtype=torch.float32, device=device, seed=1)
    steps = {"public recipe": EngineStep(public, device), "ours": EngineStep(ours, device)}
    variants: dict[str, Work] = {name: partial(step, sample) for name, step in steps.items()}
    try:
        check_equal(Comparison(title="t", variants=variants, tolerance=1e-4))
    except RuntimeError as error:
        return str(error)
    assert len(steps["ours"].gradients) == len(list(ours.parameters()))
    return ""


def test_the_step_suite_compares_gradients(one_rank: RankPool) -> None:
    assert one_rank.run(compared_engine_steps, False) == ""
    assert "is not worth timing" in one_rank.run(compared_engine_steps, True)
