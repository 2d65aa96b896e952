"""The planner's arithmetic: against published figures, real batches, and a schedule that is walked through."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from nld_train.config.compose import compose, compose_unlaunched
from nld_train.config.memory import (
    estimate_memory,
    layers_of_stages,
    micro_batches_alive,
    num_parameters,
)
from nld_train.config.plan import Plan, choose_layout, evaluate, plan_layouts, step_time, table, to_dict
from nld_train.config.schema import Config, DocumentMask, ParallelConfig, Precision, Recompute
from nld_train.config.validate import validate
from nld_train.config.workload import flops_per_token, public_workload, workload, workloads
from nld_train.errors import ConfigError
from nld_train.objective.masks import dense_block_mask
from nld_train.objective.noise import NoiseSpec, corrupt
from nld_train.objective.sequence import build_joint_batch


@pytest.fixture(scope="module")
def recipe() -> Config:
    """The published stages at 8B, on one rank as far as ``parallel`` goes."""
    return compose_unlaunched(["experiment=nld_8b", "parallel=single"])


def of_size(size: str, *overrides: str) -> Config:
    return compose_unlaunched([f"experiment=nld_{size}", "parallel=single", *overrides])


# ------------------------------------------------------------------------------------------------------------ the work


@pytest.mark.parametrize(("size", "ar", "joint"), [("3b", 23.2, 46.4), ("8b", 51.1, 102.3), ("14b", 81.0, 162.1)])
def test_operations_of_the_public_recipe(size: str, ar: float, joint: float) -> None:
    """GFLOP per clean token at L 4096, B 32; the head on every row, no pruning."""
    config = of_size(size)
    found = [
        flops_per_token(config.model, work, prunes_last_layer=False) / 1e9
        for work in (workload(config, "ar"), public_workload(4096, 32))
    ]
    assert found == [pytest.approx(ar, abs=0.05), pytest.approx(joint, abs=0.05)]
    # Ours leaves out the head and the end of the last layer on noisy rows that are not masked.
    ours = flops_per_token(config.model, workload(config, "joint")) / 1e9
    per_row = 6 * config.model.vocab_size * config.model.hidden_size
    per_row += 6 * config.model.hidden_size * (4096 + 3 * config.model.ffn_hidden_size)
    assert joint - ours == pytest.approx(0.4995 * per_row / 1e9, abs=0.06)


CASES = [
    {},
    {"sampler": "uniform_count", "noisy_fraction": 0.5},
    {"sampler": "power_count", "noisy_fraction": 0.3},
    {"sampler": "bernoulli_per_block", "complementary": True, "noisy_fraction": 0.25},
    {"sampler": "position_weighted", "block_size": 64},
]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_rows_and_pairs_are_those_of_a_batch(changes: dict[str, object]) -> None:
    """Rows and mask of real batches; which blocks are chosen decides the pairs, so those are a mean."""
    length, num_sequences = 1024, 32
    options = [f"objective.{name}={str(value).lower()}" for name, value in changes.items()]
    config = of_size("3b", f"data.sequence_length={length}", *options)
    work = workload(config, "joint")
    objective = config.objective
    spec = NoiseSpec(
        mask_token_id=100,
        eps=objective.eps,
        seed=1,
        block_size=objective.block_size,
        sampler=objective.sampler.value,
        complementary=objective.complementary,
        noisy_fraction=objective.noisy_fraction,
        stratify="batch",  # the same expectation, less noise in this test
        global_batch_size=num_sequences,
    )
    tokens = torch.randint(1000, 2000, (num_sequences, length), generator=torch.Generator().manual_seed(0))
    corruption = corrupt(tokens, torch.arange(num_sequences), spec)
    batch = build_joint_batch(tokens, tokens, torch.ones_like(tokens), corruption, objective.block_size)
    assert work.noisy_rows == batch.layout.num_noisy_rows
    assert work.has_table == (batch.layout.table is not None)
    num_masked = (corruption.weights > 0).sum().item() / num_sequences
    assert work.weighted_rows - length == pytest.approx(num_masked, rel=0.06)
    pairs = dense_block_mask(batch.layout, torch.device("cpu")).sum().item()
    of_each = pairs if batch.layout.table is None else pairs / num_sequences
    assert work.pairs == pytest.approx(of_each, rel=1e-12 if batch.layout.table is None else 0.03)


def test_an_ar_stage_has_no_noisy_rows(recipe: Config) -> None:
    work = workload(recipe, "ar")
    assert (work.rows, work.noisy_rows, work.weighted_rows, work.has_table) == (4096, 0, 4096, False)


def test_documents_and_conversations_are_bounds(recipe: Config) -> None:
    data = replace(recipe.data, document_mask=DocumentMask.boundary)
    config = replace(recipe, data=data, objective=replace(recipe.objective, noisy_fraction=0.3))
    work = workload(config, "joint")
    assert work.is_bound
    assert work.has_table
    assert work.noisy_rows % 128 == 0
    assert 0.3 * 4096 <= work.noisy_rows <= 0.3 * 4096 + 32 + 128


# -------------------------------------------------------------------------------------------------------------- memory


def test_parameters_of_all_ranks_are_the_model(recipe: Config) -> None:
    """Published sizes; norms are on every tensor-parallel rank."""
    whole = num_parameters(recipe.model, ParallelConfig(), 0)
    assert whole == 34 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096) + 2 * 131072 * 4096 + 4096
    cut = ParallelConfig(
        tensor_model_parallel_size=4,
        pipeline_model_parallel_size=4,
        num_layers_in_first_pipeline_stage=9,
        num_layers_in_last_pipeline_stage=7,
    )
    norms = 69 * 4096
    of_stages = [num_parameters(recipe.model, cut, rank) for rank in range(4)]
    assert 4 * sum(of_stages) - 3 * norms == whole


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [(None, None, [10, 10, 10, 10]), (7, 9, [7, 12, 12, 9]), (None, 4, [12, 12, 12, 4]), (1, None, [1, 13, 13, 13])],
)
def test_layers_of_stages(first: int | None, last: int | None, expected: list[int]) -> None:
    parallel = ParallelConfig(
        pipeline_model_parallel_size=4,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
    )
    assert layers_of_stages(40, parallel) == expected


def most_alive(size: int, chunks: int, rank: int, num_micro_batches: int) -> float:
    """The order of Megatron's schedules walked through: warm-up, one forward one backward, cool-down."""
    total = num_micro_batches * chunks
    warm_up = size - rank - 1 if chunks == 1 else 2 * (size - rank - 1) + (chunks - 1) * size
    warm_up = min(warm_up, total)
    order = ["forward"] * warm_up + ["forward", "backward"] * (total - warm_up) + ["backward"] * warm_up
    alive = most = 0
    for direction in order:
        alive += 1 if direction == "forward" else -1
        most = max(most, alive)
    assert alive == 0
    return most / chunks


@pytest.mark.parametrize("chunks", [1, 2, 4])
@pytest.mark.parametrize(("size", "num_micro_batches"), [(2, 2), (4, 4), (4, 16), (8, 8), (8, 64)])
def test_micro_batches_alive(size: int, num_micro_batches: int, chunks: int) -> None:
    parallel = ParallelConfig(
        pipeline_model_parallel_size=size, virtual_pipeline_model_parallel_size=None if chunks == 1 else chunks
    )
    for rank in range(size):
        assert micro_batches_alive(parallel, rank, num_micro_batches) == most_alive(
            size, chunks, rank, num_micro_batches
        )
    assert micro_batches_alive(parallel, 0, 1) == 1


def test_what_each_size_saves(recipe: Config) -> None:
    """Each way of cutting takes from the parts that it cuts, and from no other."""
    work = workload(recipe, "joint")

    def bytes_of(data: int = 8, **changes: object) -> dict[str, int]:
        parallel = ParallelConfig(**changes)  # type: ignore[arg-type]
        estimate = estimate_memory(
            recipe.model, parallel, Precision.bf16, work, micro_batch_size=1, data_parallel_size=data
        )
        return estimate[0].bytes_of

    plain = bytes_of()
    assert plain["parameters"] * 2 == plain["gradients"]
    assert plain["optimizer"] * 8 == plain["parameters"] * 6
    assert bytes_of(data=16)["optimizer"] * 2 == plain["optimizer"]
    context = bytes_of(context_parallel_size=2, data=4)
    assert (context["parameters"], context["optimizer"]) == (plain["parameters"], plain["optimizer"])
    assert context["mlp"] == pytest.approx(plain["mlp"] / 2, rel=0.01)
    tensor, sequence = (
        bytes_of(tensor_model_parallel_size=4),
        bytes_of(tensor_model_parallel_size=4, sequence_parallel=True),
    )
    assert tensor["norms"] == plain["norms"]
    assert sequence["norms"] == pytest.approx(plain["norms"] / 4, rel=0.01)
    assert sequence["parameters"] == tensor["parameters"] == pytest.approx(plain["parameters"] / 4, rel=0.01)
    full = bytes_of(recompute_granularity=Recompute.full)
    selective = bytes_of(recompute_granularity=Recompute.selective)
    assert full["inputs"] / (8192 * 4096 * 2) in (33, 34)
    assert full["mlp"] < plain["mlp"] / 30
    assert plain["norms"] == selective["norms"]  # they keep their inputs alone in any case
    assert plain["attention"] > selective["attention"]  # the log-sum-exp: kernels without scores leave little to save


# ------------------------------------------------------------------------------------------------------------- layouts


@pytest.fixture(scope="module")
def plans(recipe: Config) -> list[Plan]:
    return plan_layouts(recipe, 64, 80.0)


def test_the_best_comes_first_and_fits(plans: list[Plan]) -> None:
    fitting = [plan for plan in plans if plan.fits]
    assert len(fitting) >= 4
    assert plans[: len(fitting)] == fitting
    seconds = [plan.run_seconds for plan in fitting]
    assert all(a <= b * 1.01 for a, b in pairwise(seconds))
    assert all(plan.needed_gb <= 80 for plan in fitting)
    sizes = {
        (
            p.parallel.tensor_model_parallel_size,
            p.parallel.pipeline_model_parallel_size,
            p.parallel.context_parallel_size,
        )
        for p in plans
    }
    assert len(sizes) == len(plans)
    for plan in plans:
        tensor, pipeline, context = (
            plan.parallel.tensor_model_parallel_size,
            plan.parallel.pipeline_model_parallel_size,
            plan.parallel.context_parallel_size,
        )
        assert tensor * pipeline * context * plan.data_parallel_size == 64
        assert tensor <= 8


def test_the_overrides_choose_the_layout(plans: list[Plan]) -> None:
    """What is printed composes to the same layout and is accepted for as many ranks."""
    for plan in [plan for plan in plans if plan.fits][:5]:
        config = compose_unlaunched(["experiment=nld_8b", *plan.overrides])
        assert replace(config.parallel, memory_gb=plan.parallel.memory_gb) == plan.parallel
        assert not [p for p in validate(config, world_size=64) if p.location not in ("data.corpus",)]


def test_step_time_is_arithmetic(recipe: Config) -> None:
    """8 ranks of one node, data parallel: operations over the rate; communication hidden but for what is longer."""
    work = workload(recipe, "joint")
    time = step_time(recipe, ParallelConfig(), work, 8)
    operations = flops_per_token(recipe.model, work) * 512 * 4096
    assert time.compute == pytest.approx(operations / 8 / (989e12 * 0.4))
    assert (time.tensor, time.context, time.bubble, time.pipeline) == (0, 0, 0, 0)
    assert 0 <= time.data < 0.2
    half_as_fast = replace(recipe, machine=replace(recipe.machine, mfu=0.2))
    assert step_time(half_as_fast, ParallelConfig(), work, 8).compute == pytest.approx(2 * time.compute)
    full = ParallelConfig(recompute_granularity=Recompute.full)
    assert step_time(recipe, full, work, 8).compute == pytest.approx(time.compute * 4 / 3, rel=0.03)
    tensor = step_time(recipe, ParallelConfig(tensor_model_parallel_size=8), work, 1)
    # 4 all-reduces of 8192 x 4096 bf16 in each of 34 layers, 512 micro-batches.
    assert tensor.tensor == pytest.approx(512 * 34 * 4 * 2 * 7 / 8 * 8192 * 4096 * 2 / 350e9)
    pipeline = step_time(recipe, ParallelConfig(pipeline_model_parallel_size=2), work, 4)
    assert pipeline.bubble == pytest.approx(pipeline.compute / 128)
    interleaved = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    assert step_time(recipe, interleaved, work, 4).bubble == pytest.approx(pipeline.bubble / 2)


def test_slow_networks_are_felt(recipe: Config) -> None:
    work = workload(recipe, "ar")
    config = replace(recipe, train=replace(recipe.train, global_batch_size=64))
    slow = replace(config, machine=replace(config.machine, network_gb_per_s=1.0))
    assert step_time(slow, ParallelConfig(), work, 64).data > 3 * step_time(config, ParallelConfig(), work, 64).data


def test_a_model_that_fits_nowhere_is_refused(recipe: Config) -> None:
    with pytest.raises(ConfigError) as refused:
        choose_layout(recipe, 1, 80.0)
    (problem,) = refused.value.problems
    assert "no layout of 1 rank with 80.0 GB fits" in problem.message
    assert "most of it: optimizer, 95." in problem.message or "most of it: optimizer, 94." in problem.message
    assert "more GPUs" in problem.remedy
    long = replace(recipe, data=replace(recipe.data, sequence_length=262144))
    with pytest.raises(ConfigError, match="most of it: activations") as refused:
        choose_layout(long, 8, 40.0)
    assert "data.sequence_length" in refused.value.problems[0].remedy


def test_ranks_that_do_not_divide_the_batch(recipe: Config) -> None:
    with pytest.raises(ConfigError) as refused:
        choose_layout(replace(recipe, model=replace(recipe.model, num_layers=3)), 7, 80.0)
    problems = {problem.location: problem for problem in refused.value.problems}
    assert all("no layout of 7 ranks is possible" in problem.message for problem in problems.values())
    assert "global_batch_size=511" in problems["train.micro_batch_size"].remedy
    assert "validation_samples=511" in problems["train.validation_samples"].remedy


def test_the_largest_stage_decides(recipe: Config) -> None:
    plan = evaluate(recipe, workloads(recipe), ParallelConfig(tensor_model_parallel_size=4), 64, 80.0)
    assert plan.memory_stage == "joint"
    alone = replace(recipe, stages={"ar": recipe.stages["ar"]})
    assert evaluate(alone, workloads(alone), plan.parallel, 64, 80.0).needed_gb < plan.needed_gb


def test_table_and_json(recipe: Config, plans: list[Plan]) -> None:
    lines = table(plans, 3)
    assert lines[0].split()[:6] == ["TP", "SP", "PP", "CP", "DP", "recompute"]
    assert [line.split()[0] for line in lines[1:4]] == ["1", "2", "3"]
    assert lines[4].startswith("and ")
    small = table([plan for plan in plan_layouts(recipe, 64, 30.0) if not plan.problems])
    assert any("GB of 30.0; most of it: activations" in line or "most of it: gradients" in line for line in small)
    text = json.dumps([to_dict(plan) for plan in plans])
    first = json.loads(text)[0]
    assert first["fits"]
    assert first["needed_gb"] == pytest.approx(sum(first["bytes"].values()) * 1.05 / 2**30 + 4)


# ---------------------------------------------------------------------------------------------------------------- auto


def test_auto_leaves_no_size_to_the_user() -> None:
    with pytest.raises(ConfigError) as refused:
        compose(["parallel=auto", "parallel.tensor_model_parallel_size=2"], world_size=2)
    assert [problem.location for problem in refused.value.problems] == ["parallel.tensor_model_parallel_size"]
    assert compose(["parallel=auto"], world_size=2).parallel.auto


def test_auto_is_not_refused_for_a_layout_that_it_would_not_choose() -> None:
    """8 sequences cannot be shared by 16 data-parallel ranks; two tensor-parallel ones for each sequence can."""
    config = compose(["parallel=auto", "train.micro_batch_size=1"], world_size=16)
    roomy = replace(config.machine, reserved_gb=0.0)
    plan = choose_layout(replace(config, machine=roomy), 16, 1.0)
    assert plan.data_parallel_size <= 8


@pytest.mark.parametrize(
    "setting", ["machine.mfu=1.5", "machine.mfu=0", "machine.gpus_per_node=0", "parallel.memory_gb=0"]
)
def test_machines_that_cannot_be(setting: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose([setting], world_size=1)
    assert [problem.location for problem in refused.value.problems] == [setting.partition("=")[0]]
