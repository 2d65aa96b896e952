"""Each rule between values refuses what it should, names the nearest value that works, and that value works."""

import copy
import dataclasses
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import pytest

from nld_train.config.compose import compose
from nld_train.config.rules import nearest
from nld_train.config.schema import (
    AttentionBackend,
    CompilePointwise,
    Config,
    Device,
    DocumentMask,
    LayerSpec,
    Normalization,
    Precision,
    Sampler,
    Stratify,
)
from nld_train.config.validate import find_corpora, notices, validate
from nld_train.errors import ConfigError, Problem


@pytest.fixture(scope="module")
def tiny() -> Config:
    """The default on one corpus, which rules about corpora can be tried on."""
    return compose(["data=stdlib"])


def changed(config: Config, **values) -> Config:
    """A copy with ``section__field=value`` set."""
    config = copy.deepcopy(config)
    for path, value in values.items():
        *parents, name = path.split("__")
        node = config
        for parent in parents:
            node = node[parent] if isinstance(node, dict) else getattr(node, parent)
        setattr(node, name, value)
    return config


def at(problems: Iterable[Problem], location: str) -> Problem:
    found = [problem for problem in problems if problem.location == location]
    assert len(found) == 1, [str(problem) for problem in problems]
    return found[0]


def test_the_default_is_valid(tiny: Config):
    for config in (tiny, compose([])):
        assert validate(config, world_size=1) == []
        assert validate(config, world_size=2) == []
        assert validate(config, world_size=None) == []


NAN, INF = float("nan"), float("inf")
BAD_VALUES = [
    ("run.seed", -1),
    ("run.seed", 2**31),
    ("run.dir", " "),
    ("model.num_layers", 0),
    ("model.hidden_size", 0),
    ("model.ffn_hidden_size", -4),
    ("model.num_attention_heads", 0),
    ("model.num_key_value_heads", 0),
    ("model.head_dim", 0),
    ("model.head_dim", 63),
    ("model.vocab_size", 260),
    ("model.max_position_embeddings", 0),
    ("model.rms_norm_eps", 0.0),
    ("model.initializer_range", -0.1),
    ("model.rope.rope_theta", 0.0),
    ("model.rope.factor", 0.0),
    ("model.rope.factor", NAN),
    ("model.rope.original_max_position_embeddings", 0),
    ("model.rope.beta_fast", 1.0),
    ("model.rope.beta_slow", 0.0),
    ("model.rope.mscale", 0.0),
    ("model.rope.mscale_all_dim", 0.0),
    ("model.rope.llama_4_scaling_beta", -0.1),
    ("objective.block_size", 0),
    ("objective.block_size", 17),
    ("objective.block_size", 512),
    ("objective.mask_token_id", -1),
    ("objective.mask_token_id", 4096),
    ("objective.mask_token_id", 100),
    ("objective.eps", 0.0),
    ("objective.noisy_fraction", 0.0),
    ("objective.noisy_fraction", 1.5),
    ("objective.half_life_ratio", 0.0),
    ("train.term_norm_interval", -1),
    ("train.max_skipped_steps", -1),
    ("train.spike_threshold", -0.5),
    ("train.peak_tflops", 0.0),
    ("debug.replay_step", 0),
    ("stages.joint.ar_loss_weight", -1.0),
    ("stages.joint.sequence_length", 128),
    ("stages.joint.global_batch_size", 4),
    ("stages.joint.chat_validation_samples", -1),
    ("stages.joint.chat_validation_fraction", 1.0),
    ("objective.eps", 1.0),
    ("objective.eps", NAN),
    ("objective.diffusion_loss_weight", -0.3),
    ("objective.diffusion_loss_weight", INF),
    ("data.sequence_length", 0),
    ("data.sequence_length", 262144 + 16),
    ("data.corpus", ""),
    ("data.corpus", "stdlb"),
    ("data.corpus", "/no/such/folder"),
    ("data.cache_dir", ""),
    ("data.validation_fraction", 0.0),
    ("data.validation_fraction", 1.0),
    ("data.num_workers", -1),
    ("train.global_batch_size", 0),
    ("train.micro_batch_size", 0),
    ("train.micro_batch_size", 3),
    ("train.log_interval", 0),
    ("train.validation_interval", 0),
    ("train.validation_samples", 0),
    ("parallel.tensor_model_parallel_size", 0),
    ("parallel.pipeline_model_parallel_size", 0),
    ("parallel.context_parallel_size", 0),
    ("optim.beta1", 1.0),
    ("optim.beta2", -0.1),
    ("optim.eps", 0.0),
    ("optim.weight_decay", -1.0),
    ("optim.clip_grad", -1.0),
    ("optim.clip_grad", INF),
    ("stages.joint.diffusion_loss_weight", -1.0),
    ("stages.joint.tokens", 0),
    ("stages.joint.lr", 0.0),
    ("stages.joint.lr", NAN),
    ("stages.ar.min_lr", -1e-9),
    ("stages.ar.min_lr", 1.0),
    ("stages.ar.warmup_fraction", -0.1),
    ("stages.ar.warmup_fraction", 1.1),
    ("stages.ar.decay_fraction", 0.99),
    ("checkpoint.interval_steps", -1),
    ("checkpoint.interval_seconds", -1.0),
    ("checkpoint.interval_seconds", 0.0),
    ("checkpoint.keep_last", 0),
    ("init.hf_path", "/no/such/folder"),
    ("export.max_new_tokens", 0),
    ("export.prompt", ""),
    ("wandb.project", ""),
]


@pytest.mark.parametrize(("key", "value"), BAD_VALUES, ids=lambda item: str(item))
def test_a_bad_value_is_refused_by_name(tiny: Config, key: str, value):
    problems = validate(changed(tiny, **{key.replace(".", "__"): value}), world_size=1)
    located = [problem for problem in problems if problem.location == key]
    # Both intervals at zero is reported at the first of the two.
    if key == "checkpoint.interval_seconds" and value == 0.0:
        located = [problem for problem in problems if problem.location == "checkpoint.interval_steps"]
    assert len(located) == 1, [str(problem) for problem in problems]
    assert located[0].remedy
    shown = f"{value:g}" if value == 0.0 and key.startswith("checkpoint") else str(value).strip()
    assert shown in located[0].message


BATCH_OF_3 = (
    "train.validation_samples=24",
    "train.global_batch_size=24",
)  # for three data-parallel ranks


SP = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
PP2 = ("parallel.pipeline_model_parallel_size=2",)
PP4 = ("parallel.pipeline_model_parallel_size=4", "train.micro_batch_size=1")
FIRST = "parallel.num_layers_in_first_pipeline_stage"
LAST = "parallel.num_layers_in_last_pipeline_stage"
VIRTUAL = "parallel.virtual_pipeline_model_parallel_size"


def remedied(overrides: list[str], key: str, world_size: int) -> None:
    """Doing what the remedy at ``key`` says makes the problem go away."""
    with pytest.raises(ConfigError) as caught:
        compose(overrides, world_size=world_size)
    remedy = at(caught.value.problems, key).remedy
    first = next(word.strip(",?") for word in remedy.split() if "=" in word and not word.startswith("`"))
    changed_key = first.partition("=")[0]
    compose([o for o in overrides if not o.startswith(f"{changed_key}=")] + [first], world_size=world_size)


@pytest.mark.parametrize(
    ("overrides", "key", "world_size"),
    [
        (["objective.block_size=0"], "objective.block_size", 1),
        (["objective.block_size=24"], "objective.block_size", 1),
        (["objective.block_size=5000"], "objective.block_size", 1),
        (["objective.mask_token_id=100"], "objective.mask_token_id", 1),
        (["objective.eps=0"], "objective.eps", 1),
        (["model.head_dim=63"], "model.head_dim", 1),
        (["model.num_key_value_heads=3"], "model.num_key_value_heads", 1),
        (["model.vocab_size=100"], "model.vocab_size", 1),
        (["model.rope.beta_fast=0.5"], "model.rope.beta_fast", 1),
        (["model.attention_backend=flex", "train.device=cpu"], "model.attention_backend", 1),
        (["model.layer_spec=transformer_engine", "train.device=cpu", "train.precision=bf16"], "model.layer_spec", 1),
        (["train.precision=fp8"], "train.precision", 1),
        (["model.max_position_embeddings=128"], "data.sequence_length", 1),
        (["train.micro_batch_size=3", "train.global_batch_size=4"], "train.micro_batch_size", 1),
        (["train.micro_batch_size=8", "train.global_batch_size=16"], "train.micro_batch_size", 4),
        (["train.micro_batch_size=3", "train.global_batch_size=7"], "train.micro_batch_size", 2),
        (["parallel.tensor_model_parallel_size=3", *BATCH_OF_3], "parallel.tensor_model_parallel_size", 6),
        (["parallel.pipeline_model_parallel_size=3", *BATCH_OF_3], "parallel.pipeline_model_parallel_size", 6),
        (["parallel.context_parallel_size=3", *BATCH_OF_3], "parallel.context_parallel_size", 6),
        (
            ["parallel.context_parallel_size=8", "objective.block_size=64", "train.micro_batch_size=1"],
            "parallel.context_parallel_size",
            8,
        ),
        (["parallel.sequence_parallel=true"], "parallel.sequence_parallel", 1),
        ([*SP, "data.sequence_length=255", "objective.block_size=15"], "data.sequence_length", 2),
        ([*SP, "data.sequence_length=33", "data.document_mask=boundary"], "data.sequence_length", 2),
        ([*PP2, "parallel.virtual_pipeline_model_parallel_size=1"], VIRTUAL, 2),
        (["parallel.virtual_pipeline_model_parallel_size=2"], VIRTUAL, 1),
        ([*PP2, "parallel.virtual_pipeline_model_parallel_size=3"], VIRTUAL, 2),
        ([*PP2, "parallel.virtual_pipeline_model_parallel_size=2", "model.num_layers=6"], VIRTUAL, 2),
        ([*PP2, "parallel.virtual_pipeline_model_parallel_size=2", "model.num_layers=2"], VIRTUAL, 2),
        (
            [
                *("parallel.pipeline_model_parallel_size=3", "parallel.virtual_pipeline_model_parallel_size=2"),
                *("model.num_layers=8", "train.micro_batch_size=1", *BATCH_OF_3),
            ],
            "parallel.pipeline_model_parallel_size",
            12,
        ),
        ([f"{FIRST}=1"], FIRST, 1),
        ([*PP2, f"{FIRST}=4"], FIRST, 2),
        ([*PP2, f"{LAST}=0"], LAST, 2),
        ([*PP2, f"{FIRST}=3", f"{LAST}=3"], FIRST, 2),
        ([*PP2, f"{FIRST}=1", "parallel.virtual_pipeline_model_parallel_size=2"], FIRST, 2),
        ([*PP4, f"{FIRST}=3"], FIRST, 4),
        ([*PP4, "train.micro_batch_size=4", "train.global_batch_size=8"], "train.global_batch_size", 4),
        (
            [
                *PP2,
                "parallel.virtual_pipeline_model_parallel_size=2",
                "train.micro_batch_size=2",
                "train.global_batch_size=6",
            ],
            "train.global_batch_size",
            2,
        ),
        (
            [*PP2, "parallel.virtual_pipeline_model_parallel_size=2", "train.validation_samples=31"],
            "train.validation_samples",
            2,
        ),
        (
            ["parallel.overlap_param_gather=true", "parallel.overlap_grad_reduce=false"],
            "parallel.overlap_param_gather",
            1,
        ),
        (["train.validation_samples=7"], "train.validation_samples", 2),
        (["optim.beta2=1"], "optim.beta2", 1),
        (["optim.eps=0"], "optim.eps", 1),
        (["data.validation_fraction=0"], "data.validation_fraction", 1),
        (["data=stdlib", "data.corpus=stdlb"], "data.corpus", 1),
        (["stages.ar.min_lr=1"], "stages.ar.min_lr", 1),
        (["stages.ar.decay_fraction=0.99"], "stages.ar.decay_fraction", 1),
        (["stages.ar.warmup_fraction=-0.2"], "stages.ar.warmup_fraction", 1),
        (["stages.ar.lr=0"], "stages.ar.lr", 1),
        (["checkpoint.interval_seconds=0"], "checkpoint.interval_steps", 1),
        (["checkpoint.keep_last=0"], "checkpoint.keep_last", 1),
        (["run.seed=-1"], "run.seed", 1),
    ],
    ids=lambda item: ",".join(item) if isinstance(item, list) else str(item),
)
def test_the_remedy_works(overrides: list[str], key: str, world_size: int):
    remedied(overrides, key, world_size)


def test_tensor_parallel_size_divides_what_megatron_splits(tiny: Config):
    problem = at(validate(changed(tiny, parallel__tensor_model_parallel_size=3), world_size=3),
                 "parallel.tensor_model_parallel_size")  # fmt: skip
    assert "3 does not divide" in problem.message
    for part in ("model.num_attention_heads=4", "model.num_key_value_heads=2", "model.vocab_size=4096"):
        assert part in problem.message
    assert "ffn" not in problem.message  # 768 = 3 * 256
    config = changed(tiny, parallel__tensor_model_parallel_size=2, model__ffn_hidden_size=769)
    assert "model.ffn_hidden_size=769" in at(validate(config, 2), "parallel.tensor_model_parallel_size").message


def test_context_parallel_size_cuts_sequences_into_chunks_of_whole_blocks(tiny: Config):
    config = changed(tiny, data__sequence_length=256, objective__block_size=16, parallel__context_parallel_size=8)
    assert validate(config, world_size=8) == []
    config = changed(config, objective__block_size=32)
    problem = at(validate(config, world_size=8), "parallel.context_parallel_size")
    assert problem.message == "data.sequence_length=256 of blocks of 32 cannot be cut into 2 x 8 equal chunks"
    assert "use parallel.context_parallel_size=4 (what works here: 1, 2, 4)" in problem.remedy
    # Documents cut blocks anyway.
    assert validate(changed(config, data__document_mask=DocumentMask.boundary), world_size=8) == []
    config = changed(config, data__document_mask=DocumentMask.boundary, data__sequence_length=260)
    problem = at(validate(config, world_size=8), "parallel.context_parallel_size")
    assert "data.sequence_length=260 cannot be cut into 2 x 8" in problem.message
    assert "=2 (what works here: 1, 2, 5, 10, 13," in problem.remedy  # 10 does not divide 8 ranks
    problem = at(validate(config, world_size=None), "parallel.context_parallel_size")
    assert "=10 (what works here: 1, 2, 5, 10, 13," in problem.remedy
    stage = dataclasses.replace(next(iter(config.stages.values())), chat="stdlib_chat", sequence_length=36)
    config = changed(config, stages={**config.stages, "sft": stage}, parallel__context_parallel_size=5)
    problem = at(validate(config, world_size=None), "parallel.context_parallel_size")
    assert "stages.sft.sequence_length=36 cannot be cut" in problem.message
    assert "(what works here: 1, 2)" in problem.remedy
    # One without chunks of whole blocks at all.
    config = changed(tiny, data__sequence_length=32, objective__block_size=32, parallel__context_parallel_size=2)
    assert "=1 (what works here: 1)" in at(validate(config, world_size=None), "parallel.context_parallel_size").remedy


def test_ranks(tiny: Config):
    tensor = changed(tiny, parallel__tensor_model_parallel_size=2)
    assert validate(tensor, world_size=2) == validate(tensor, world_size=4) == []
    problem = at(validate(tensor, world_size=1), "parallel.tensor_model_parallel_size")
    assert "torchrun --nproc-per-node 2 train.py" in problem.remedy
    assert validate(tensor, world_size=3)[0].message.endswith("does not divide the 3 ranks that are launched")
    both = changed(tensor, parallel__pipeline_model_parallel_size=4, train__micro_batch_size=2)
    problem = at(validate(both, world_size=1), "parallel.pipeline_model_parallel_size")
    assert "torchrun --nproc-per-node 8 train.py" in problem.remedy
    assert validate(both, world_size=8) == []
    # Looking at a configuration needs no ranks.
    assert validate(both, world_size=None) == []


def test_the_launch_line_counts_with_the_sizes_that_work(tiny: Config):
    problems = validate(changed(tiny, parallel__tensor_model_parallel_size=3), world_size=1)
    assert [problem.location for problem in problems] == ["parallel.tensor_model_parallel_size"] * 2
    assert "parallel.tensor_model_parallel_size=2" in problems[0].remedy
    assert "torchrun --nproc-per-node 2 train.py" in problems[1].remedy


def test_a_remedy_looks_at_the_ranks_that_are_there(tiny: Config):
    """34 layers are nearer to 17 stages than to 2, but 64 ranks are not 17 times anything."""
    config = changed(tiny, model__num_layers=34, parallel__pipeline_model_parallel_size=16)
    key = "parallel.pipeline_model_parallel_size"
    assert f"use {key}=17 " in at(validate(config, world_size=None), key).remedy
    assert f"use {key}=17 " in at(validate(config, world_size=2 * 17), key).remedy
    assert f"use {key}=2 " in at(validate(config, world_size=64), key).remedy
    assert key not in [
        problem.location for problem in validate(changed(config, parallel__pipeline_model_parallel_size=2), 64)
    ]


def test_every_stage_of_a_pipeline_gets_micro_batches(tiny: Config):
    config = changed(tiny, parallel__pipeline_model_parallel_size=4, train__micro_batch_size=2)
    assert validate(config, world_size=4) == []
    problem = at(validate(config, world_size=8), "train.global_batch_size")
    assert "2 micro-batches of train.micro_batch_size=2 on each of 2 data-parallel ranks" in problem.message
    assert problem.remedy == "use train.global_batch_size=16, or train.micro_batch_size=1"


def test_interleaved_stages_of_uneven_ranks(tiny: Config):
    config = changed(
        tiny,
        model__num_layers=14,
        parallel__pipeline_model_parallel_size=4,
        parallel__virtual_pipeline_model_parallel_size=2,
        parallel__num_layers_in_first_pipeline_stage=2,
        train__micro_batch_size=2,
    )
    assert validate(config, world_size=4) == []  # 2 + 4 + 4 + 4
    config = changed(config, model__num_layers=12)
    problem = at(validate(config, world_size=4), "parallel.num_layers_in_first_pipeline_stage")
    assert problem.remedy == "use parallel.num_layers_in_first_pipeline_stage=6"


def test_data_parallel_ranks_share_the_global_batch(tiny: Config):
    config = changed(tiny, train__global_batch_size=16, train__micro_batch_size=8)
    assert validate(config, world_size=2) == []
    problem = at(validate(config, world_size=4), "train.micro_batch_size")
    assert "8 x 4 data-parallel ranks" in problem.message
    assert "train.global_batch_size=16" in problem.message
    # tensor-parallel ranks see the same sequences
    assert validate(changed(config, parallel__tensor_model_parallel_size=2), world_size=4) == []


def test_flex_is_for_gpus(tiny: Config):
    flex = changed(tiny, model__attention_backend=AttentionBackend.flex)
    assert validate(flex, 1) == []  # train.device=auto: decided where torch is known
    assert validate(changed(flex, train__device=Device.cuda), 1) == []
    assert at(validate(changed(flex, train__device=Device.cpu), 1), "model.attention_backend")


def test_transformer_engine_is_for_bf16_on_gpus(tiny: Config):
    engine = changed(tiny, model__layer_spec=LayerSpec.transformer_engine, train__precision=Precision.bf16)
    assert validate(engine, 1) == []  # train.device=auto: decided where torch is known
    for values in ({"train__device": Device.cpu}, {"train__precision": Precision.fp32}):
        assert "use model.layer_spec=local" in at(validate(changed(engine, **values), 1), "model.layer_spec").remedy


def test_compilation_on_a_cpu_needs_a_compiler(tiny: Config, monkeypatch: pytest.MonkeyPatch):
    always = changed(tiny, model__compile_pointwise=CompilePointwise.always, train__device=Device.cpu)
    monkeypatch.setenv("CXX", "/nowhere/c++")
    problem = at(validate(always, 1), "model.compile_pointwise")
    assert problem.message == "always, but there is no C++ compiler '/nowhere/c++'"
    assert "CXX" in problem.remedy
    assert "model.compile_pointwise=auto" in problem.remedy
    assert validate(always, None) == []  # on another machine
    assert validate(changed(always, train__device=Device.auto), 1) == []  # decided where torch is known
    assert validate(changed(always, model__compile_pointwise=CompilePointwise.auto), 1) == []
    monkeypatch.setenv("CXX", sys.executable)  # some program
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": "/nowhere/include"})
    assert "/nowhere/include holds no Python.h" in at(validate(always, 1), "model.compile_pointwise").message


def test_native_attention_needs_a_compiler(tiny: Config, monkeypatch: pytest.MonkeyPatch):
    native = changed(tiny, model__attention_backend=AttentionBackend.native, train__device=Device.cpu)
    monkeypatch.setenv("CXX", "/nowhere/c++")
    problem = at(validate(native, 1), "model.attention_backend")
    assert problem.message == "native, but there is no C++ compiler '/nowhere/c++'"
    assert "CXX" in problem.remedy
    assert "model.attention_backend=auto" in problem.remedy
    monkeypatch.setenv("CXX", "")  # as if it were not set
    assert "''" not in "".join(problem.message for problem in validate(native, 1))
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert validate(native, None) == []  # on another machine
    assert validate(changed(native, model__attention_backend=AttentionBackend.auto), 1) == []
    monkeypatch.setenv("CXX", sys.executable)  # some program
    assert validate(native, 1) == []


def test_fp8_needs_the_layers_that_can(tiny: Config):
    problem = at(validate(changed(tiny, train__precision=Precision.fp8), 1), "train.precision")
    assert "use model.layer_spec=transformer_engine" in problem.remedy
    fp8 = changed(tiny, train__precision=Precision.fp8, model__layer_spec=LayerSpec.transformer_engine)
    assert validate(fp8, 1) == []


@pytest.mark.parametrize(
    ("values", "location", "remedy"),
    [
        ({"data__sequence_length": 264, "objective__block_size": 8}, "data.sequence_length", "=272"),
        ({"model__hidden_size": 100}, "model.hidden_size", "=96"),
        ({"model__ffn_hidden_size": 776}, "model.ffn_hidden_size", "=784"),
        (
            {"model__num_attention_heads": 3, "model__num_key_value_heads": 1, "model__head_dim": 10},
            "model.head_dim",
            "=16",
        ),
        (
            {
                "data__sequence_length": 16 * 17,
                "objective__block_size": 8,
                "parallel__tensor_model_parallel_size": 2,
                "parallel__sequence_parallel": True,
            },
            "data.sequence_length",
            "=288",
        ),
        ({"model__ffn_hidden_size": 784, "parallel__tensor_model_parallel_size": 2}, "model.ffn_hidden_size", "=800"),
    ],
)
def test_fp8_products_take_multiples(tiny: Config, values: dict[str, object], location: str, remedy: str):
    """Rows and widths of what each rank multiplies."""
    bf16 = changed(tiny, train__precision=Precision.bf16, model__layer_spec=LayerSpec.transformer_engine, **values)
    assert location not in [problem.location for problem in validate(bf16, None)]
    problem = at(validate(changed(bf16, train__precision=Precision.fp8), None), location)
    assert f"use {location}{remedy}, or train.precision=bf16" == problem.remedy


def test_another_corpus_may_have_any_mask_token(tiny: Config, tmp_path: Path):
    assert validate(changed(tiny, data__corpus=str(tmp_path), objective__mask_token_id=100), 1) == []


def test_init_needs_a_checkpoint(tiny: Config, tmp_path: Path):
    config = changed(tiny, init__hf_path=str(tmp_path))
    assert "holds no config.json" in at(validate(config, 1), "init.hf_path").message
    (tmp_path / "config.json").write_text("{}")
    assert validate(config, 1) == []
    assert validate(changed(tiny, init__hf_path="/no/such"), world_size=None) == []


def test_run_dir_is_a_folder(tiny: Config, tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file" in at(validate(changed(tiny, run__dir=str(file)), 1), "run.dir").message
    assert validate(changed(tiny, run__dir=str(tmp_path)), 1) == []


def test_stages_exist_and_have_plain_names(tiny: Config):
    config = copy.deepcopy(tiny)
    config.stages["bad name"] = config.stages.pop("ar")
    assert at(validate(config, 1), "stages.bad name")
    config.stages.clear()
    assert at(validate(config, 1), "stages")


def test_nearest():
    assert [nearest(value, [1, 2, 4, 8]) for value in (-3, 0, 3, 5, 6, 7, 100)] == [1, 1, 2, 4, 4, 8, 8]


def test_samplers_that_do_not_go_together_are_refused(tiny: Config):
    pair = changed(tiny, objective__complementary=True, objective__sampler=Sampler.position_weighted)
    assert "position_weighted" in at(validate(pair, world_size=1), "objective.complementary").message
    shared = changed(tiny, objective__shared_noise_level=True, objective__sampler=Sampler.power_count)
    assert "power_count" in at(validate(shared, world_size=1), "objective.shared_noise_level").message
    spread = changed(
        tiny,
        objective__shared_noise_level=True,
        objective__sampler=Sampler.bernoulli,
        objective__stratify=Stratify.batch,
    )
    assert "batch" in at(validate(spread, world_size=1), "objective.stratify").message


def test_other_divisors_with_other_estimators_are_spoken_of(tiny: Config):
    recipe = changed(
        tiny,
        objective__sampler=Sampler.bernoulli,
        objective__noisy_fraction=1.0,
        objective__normalization=Normalization.contributing,
    )
    assert notices(recipe) == []
    [line] = notices(changed(recipe, objective__noisy_fraction=0.5))
    assert "contributing" in line
    assert "objective.noisy_fraction=0.5" in line
    assert notices(changed(recipe, objective__noisy_fraction=0.5, objective__normalization=Normalization.tokens)) == []
    assert "loss of its own" in notices(changed(recipe, objective__sampler=Sampler.position_weighted))[-1]


def test_blocks_need_not_divide_a_sequence_of_documents(tiny: Config):
    config = changed(tiny, objective__block_size=17)
    assert at(validate(config, world_size=1), "objective.block_size")
    assert validate(changed(config, data__document_mask=DocumentMask.boundary), world_size=1) == []


def test_a_stage_with_conversations_has_its_own_shape(tiny: Config, tmp_path: Path):
    chat = changed(tiny, stages__joint__chat="stdlib_chat", stages__joint__sequence_length=512)
    assert validate(chat, world_size=1) == []
    uneven = changed(chat, stages__joint__global_batch_size=6)
    assert "stages.joint.global_batch_size=6" in at(validate(uneven, world_size=1), "train.micro_batch_size").message
    missing = changed(chat, stages__joint__chat=str(tmp_path / "none.jsonl"))
    assert "is not a file" in at(validate(missing, world_size=1), "stages.joint.chat").message
    samples = changed(chat, stages__joint__chat_validation_samples=3)
    assert at(validate(samples, world_size=2), "stages.joint.chat_validation_samples")
    long = changed(chat, stages__joint__sequence_length=10**6)
    assert "max_position_embeddings" in at(validate(long, world_size=1), "stages.joint.sequence_length").message


def test_two_copies_need_probabilities_on_both_sides(tiny: Config):
    config = changed(tiny, objective__eps=0.6)
    assert validate(config, world_size=1) == []
    config = changed(config, objective__complementary=True)
    assert "1 - eps" in at(validate(config, world_size=1), "objective.eps").message


def test_norms_of_terms_that_no_record_would_show_are_refused(tiny: Config):
    config = changed(tiny, train__log_interval=10, train__term_norm_interval=25)
    assert "train.term_norm_interval=30" in at(validate(config, world_size=1), "train.term_norm_interval").remedy
    assert validate(changed(config, train__term_norm_interval=30), world_size=1) == []


def test_a_stage_without_conversations_holds_none_out(tiny: Config):
    config = changed(tiny, stages__joint__chat_validation_samples=2)
    assert "no conversations" in at(validate(config, world_size=1), "stages.joint.chat_validation_samples").message


def test_a_stage_without_any_loss_is_refused(tiny: Config):
    config = changed(tiny, stages__ar__ar_loss_weight=0.0)
    assert "no loss is left" in at(validate(config, world_size=1), "stages.ar.ar_loss_weight").message


def blended(tmp_path: Path, *weights: float, key: str = "data.blend", more: tuple[str, ...] = ()) -> list[str]:
    """Overrides of a blend of folders, named a, b, ..."""
    parts = []
    for name, weight in zip("abcdef", weights, strict=False):
        (tmp_path / name).mkdir(exist_ok=True)
        parts.append(f"{name}:{{corpus:'{tmp_path / name}',weight:{weight}}}")
    corpus = ["data=blend"] if key == "data.blend" else []
    return [*corpus, f"++{key}={{{','.join(parts)}}}", *more]


def refusals(overrides: list[str]) -> dict[str, Problem]:
    with pytest.raises(ConfigError) as caught:
        compose(overrides, world_size=1)
    return {problem.location: problem for problem in caught.value.problems}


def test_a_blend_composes(tmp_path: Path):
    config = compose([*blended(tmp_path, 0.7, 3), *blended(tmp_path, 1, key="stages.joint.blend")], world_size=1)
    assert [(name, part.weight) for name, part in config.data.blend.items()] == [("a", 0.7), ("b", 3.0)]
    assert list(config.stages["joint"].blend) == ["a"]
    assert config.stages["ar"].blend == {}


def test_weights_that_mean_nothing_are_refused_at_once(tmp_path: Path):
    stage = blended(tmp_path, -1, key="stages.joint.blend")
    found = refusals([*blended(tmp_path, 0, -0.5, "nan", "inf", 1), *stage])
    assert set(found) == {*(f"data.blend.{name}.weight" for name in "abcd"), "stages.joint.blend.a.weight"}
    assert "0.0 must be greater than 0" in found["data.blend.a.weight"].message
    assert "nan is not a finite number" in found["data.blend.c.weight"].message


def test_one_corpus_or_a_blend(tmp_path: Path):
    both = refusals(["data.corpus=stdlib"])  # beside the default's
    assert set(both) == {"data.blend"}
    neither = refusals(["data=blend"])
    assert set(neither) == {"data.corpus"}
    compose(["data=prepared", f"data.corpus={tmp_path}"], world_size=1)  # what the first remedy says
    chat = refusals([*blended(tmp_path, 1, key="stages.joint.blend"), "stages.joint.chat=stdlib_chat"])
    assert set(chat) == {"stages.joint.blend"}


def test_names_of_parts_are_plain(tmp_path: Path):
    part = f"{{corpus:'{tmp_path}',weight:1}}"
    assert set(refusals(["data=blend", f"++data.blend={{9a:{part}}}"])) == {"data.blend.9a"}


def test_corpora_that_are_not_there(tmp_path: Path):
    (tmp_path / "web-0").mkdir()
    names = {"a": tmp_path / "x" / "manifest.json", "b": tmp_path / "no-*", "c": tmp_path / "web-*", "d": "stdlb"}
    parts = ",".join(f"{name}:{{corpus:'{corpus}',weight:1}}" for name, corpus in names.items())
    found = refusals(["data=blend", f"++data.blend={{{parts}}}"])
    assert set(found) == {f"data.blend.{name}.corpus" for name in names}
    for name, words in zip(
        "abcd", ("manifest.json does not exist", "matches nothing", "web-0, which is not", "neither"), strict=True
    ):
        assert words in found[f"data.blend.{name}.corpus"].message
    assert "did you mean data.blend.d.corpus=stdlib?" in found["data.blend.d.corpus"].remedy
    for number in range(2):
        (tmp_path / f"web-{number}").mkdir(exist_ok=True)
        (tmp_path / f"web-{number}" / "manifest.json").touch()
    pattern = f"++data.blend={{c:{{corpus:'{tmp_path}/web-*',weight:1}}}}"
    compose(["data=blend", pattern, "objective.mask_token_id=100"], world_size=1)
    assert find_corpora("", f"{tmp_path}/web-*") == [f"{tmp_path}/web-0", f"{tmp_path}/web-1"]
    assert find_corpora("", f"{tmp_path}/web-*/manifest.json") == [f"{tmp_path}/web-0", f"{tmp_path}/web-1"]
    assert find_corpora("", f"{tmp_path}/web-1/manifest.json") == [f"{tmp_path}/web-1"]


def test_a_shipped_corpus_in_a_blend_has_its_rules(tmp_path: Path):
    part = "++data.blend={a:{corpus:stdlib,weight:1}}"
    found = refusals(["data=blend", part, "objective.mask_token_id=100", "model.vocab_size=200"])
    assert "data.blend.a.corpus=stdlib" in found["objective.mask_token_id"].message
    assert "data.blend.a.corpus=stdlib" in found["model.vocab_size"].message


def test_a_part_alone_is_answered_with_how_to_write_it():
    found = refusals(["data=blend", "+data.blend.code.corpus=stdlib"])
    assert "'++data.blend={NAME: {corpus: FOLDER, weight: 1}}'" in found["+data.blend.code.corpus=stdlib"].remedy
    misspelt = refusals(["data=blend", "++data.blend={a:{corpus:stdlib,wieght:1}}"])
    assert "did you mean data.blend.a.weight?" in misspelt["data.blend.a.wieght"].remedy
