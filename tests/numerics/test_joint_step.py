"""One joint step of the real engine against transformers with a dense mask and a loss written out by token."""

import pytest
import torch

from nld_train.checkpoint.weight_map import MINISTRAL3_FORM, weight_rules
from nld_train.config.schema import ParallelConfig
from nld_train.objective.noise import corrupt
from nld_train.testing.ranks import RankPool
from nld_train.testing.reference import dense_logits, joint_loss, reference_mask, transformers_model
from nld_train.testing.steps import StepCase, StepResult, run_logits, run_step, tiny_model, tiny_recipe
from nld_train.training.step import noise_spec

NUM_SEQUENCES, LENGTH, BLOCK = 4, 32, 4  # 128 tokens: a power of two, so 1/N is exact in Megatron's fp32 factor
OBJECTIVE = tiny_recipe(block_size=BLOCK)


def random_samples(num_sequences: int = NUM_SEQUENCES, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, tiny_model().vocab_size, (num_sequences, length + 1), generator=generator)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_joint_step_equals_transformers(one_rank: RankPool, dtype: torch.dtype, tolerance: float) -> None:
    """Loss and every parameter gradient (main_grad after finalize_model_grads), 2 micro-batches."""
    samples = random_samples()
    case = StepCase(samples=samples, objective=OBJECTIVE, micro_batch_size=NUM_SEQUENCES // 2, dtype=dtype)
    found: StepResult = one_rank.run(run_step, case, ParallelConfig())

    tokens, labels = samples[:, :-1], samples[:, 1:]
    noise = corrupt(tokens, torch.arange(NUM_SEQUENCES), noise_spec(OBJECTIVE, seed=case.seed, global_batch_size=4))
    reference = transformers_model(case.model, found.parameters, dtype)
    loss = joint_loss(
        reference,
        tokens,
        labels,
        noise.noisy_tokens,
        noise.weights,
        block_size=BLOCK,
        diffusion_loss_weight=0.3,
        divisor=tokens.numel(),
    )
    loss.backward()
    terms = found.terms
    assert relative_error((terms.ar_sum + 0.3 * terms.diffusion_sum) / terms.num_clean, loss.detach()) < tolerance

    expected = dict(reference.named_parameters())
    rules = list(weight_rules(case.model))
    assert {rule.megatron for rule in rules} == set(found.gradients)
    errors = {}
    for rule in rules:
        names = rule.hf_names(MINISTRAL3_FORM)
        for name, gradient in zip(names, rule.split(found.gradients[rule.megatron]), strict=True):
            errors[name] = relative_error(gradient, expected[name].grad)
    assert set(errors) == set(expected)
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] < tolerance, f"{worst}: {errors[worst]:.2e}"


def test_joint_logits_equal_transformers_and_halves_are_independent(one_rank: RankPool) -> None:
    """AR logits with and without the noisy half; what a changed clean or noisy token may change, and what not."""
    samples = random_samples(2)
    clean = samples[:, :-1]
    noise = corrupt(clean, torch.arange(2), noise_spec(OBJECTIVE, seed=5, global_batch_size=2))
    case = StepCase(samples=samples, objective=OBJECTIVE)

    def logits(noisy: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        rows = torch.cat([noisy, clean], dim=1)
        return one_rank.run(run_logits, case, ParallelConfig(), rows, True)

    base = logits(noise.noisy_tokens, clean)
    parameters = one_rank.run(run_step, case, ParallelConfig()).parameters
    reference = transformers_model(case.model, parameters, torch.float64)
    with torch.no_grad():
        expected = dense_logits(
            reference,
            torch.cat([noise.noisy_tokens, clean], dim=1),
            reference_mask(LENGTH, BLOCK),
            torch.arange(LENGTH).repeat(2),
        )
    assert relative_error(base, expected) < 1e-9

    alone = one_rank.run(run_logits, case, ParallelConfig(), clean, False)
    torch.testing.assert_close(base[:, LENGTH:], alone, rtol=1e-12, atol=1e-12)

    block = 3
    changed_clean = clean.clone()
    changed_clean[:, block * BLOCK + 1] = 4 + (changed_clean[:, block * BLOCK + 1] - 3) % 90
    after = logits(noise.noisy_tokens, changed_clean)
    difference = (after - base).abs().amax(dim=(0, 2))
    assert difference[: (block + 1) * BLOCK].max() == 0, "noisy rows of the same and earlier blocks"
    assert difference[(block + 1) * BLOCK : LENGTH].min() > 0, "noisy rows of later blocks see the clean token"

    changed_noisy = noise.noisy_tokens.clone()
    changed_noisy[:, block * BLOCK + 1] = 4 + (changed_noisy[:, block * BLOCK + 1] - 3) % 90
    difference = (logits(changed_noisy, clean) - base).abs().amax(dim=(0, 2))
    inside = torch.zeros(2 * LENGTH, dtype=torch.bool)
    inside[block * BLOCK : (block + 1) * BLOCK] = True
    assert difference[inside].min() > 0
    assert difference[~inside].max() == 0


def test_an_ar_step_is_the_ar_part_of_a_joint_step(one_rank: RankPool) -> None:
    """With alpha = 0 the clean tokens run alone, and the loss is transformers' own causal loss."""
    samples = random_samples()
    case = StepCase(samples=samples, objective=OBJECTIVE, diffusion_loss_weight=0.0, micro_batch_size=2)
    found: StepResult = one_rank.run(run_step, case, ParallelConfig())
    reference = transformers_model(case.model, found.parameters, torch.float64)
    logits = reference(input_ids=samples[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten())
    loss.backward()
    assert relative_error(found.terms.ar_sum / found.terms.num_clean, loss.detach()) < 1e-9
    assert found.terms.diffusion_sum == 0
    embedding = found.gradients["embedding.word_embeddings.weight"]
    assert relative_error(embedding, reference.model.embed_tokens.weight.grad) < 1e-9


@pytest.mark.parametrize("normalization", ["tokens", "contributing", "sequence"])
def test_global_averaging(one_rank: RankPool, two_ranks: RankPool, normalization: str) -> None:
    """1 rank x 4 micro-batches, 2 ranks x 2, 2 ranks x 1 of twice the size: the same gradients."""
    from nld_train.config.schema import Normalization

    objective = tiny_recipe(block_size=BLOCK, normalization=Normalization(normalization))
    samples = random_samples()
    seed = 7
    noise = corrupt(samples[:, :-1], torch.arange(4), noise_spec(objective, seed=seed, global_batch_size=4))
    shares = (noise.weights > 0).sum(1)
    assert shares.max() > 2 * shares.min(), f"masked counts must differ strongly: {shares.tolist()}"
    layouts = [(one_rank, 1), (two_ranks, 1), (two_ranks, 2)]
    results: list[StepResult] = [
        pool.run(
            run_step, StepCase(samples=samples, objective=objective, micro_batch_size=size, seed=seed), ParallelConfig()
        )
        for pool, size in layouts
    ]
    for other in results[1:]:
        torch.testing.assert_close(other.terms.to_vector(), results[0].terms.to_vector(), rtol=1e-12, atol=0)
        for name, gradient in results[0].gradients.items():
            assert relative_error(other.gradients[name], gradient) < 1e-6, name
