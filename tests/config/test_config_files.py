"""Every YAML file composes, and the shipped experiments hold the recipe's numbers."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nld_train.config.compose import CONFIG_DIR, compose
from nld_train.config.schema import Normalization, Precision, Sampler

LARGE = ("nld_3b", "nld_8b", "nld_14b")
FILES = sorted(path.relative_to(CONFIG_DIR).with_suffix("") for path in CONFIG_DIR.glob("*/*.yaml"))


def large(name: str, corpus: Path, *overrides: str):
    """A large experiment on as many ranks as its tensor-parallel size."""
    return compose([f"experiment={name}", f"data.corpus={corpus}", *overrides], world_size=256)


def test_every_group_is_there():
    assert {file.parent.name for file in FILES} == {
        *("data", "experiment", "model", "objective", "optim", "parallel", "stage")
    }


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_file_composes(file: Path, tmp_path: Path):
    group, option = file.parent.name, file.name
    written = OmegaConf.load(CONFIG_DIR / f"{file}.yaml")
    choice, extra, world_size = f"{group}={option}", [], 1
    if group == "stage":
        choice = f"+stage@stages.extra={option}"
        extra = ["stages.extra.tokens=1", "stages.extra.lr=1e-3", "stages.extra.min_lr=0"]
        if option == "sft":
            extra.append("stages.extra.chat=stdlib_chat")
    elif choice == "parallel=auto":
        world_size = 8
    elif group == "parallel":
        world_size = written.tensor_model_parallel_size * written.pipeline_model_parallel_size
        world_size *= written.context_parallel_size
        extra = ["model.num_attention_heads=8", "model.num_key_value_heads=8"]
    elif group == "experiment" and option in LARGE:
        world_size = 256
    if option in (*LARGE, "prepared"):
        extra = [f"data.corpus={tmp_path}"]
    elif option == "blend":
        extra = ["++data.blend={code:{corpus:stdlib,weight:0.7}}"]
    config = compose([choice, *extra], world_size=world_size)

    if group == "experiment":
        assert config.run.dir == f"runs/{option}"
    elif group == "stage":
        assert list(config.stages) == ["ar", "joint", "extra"]
        assert config.stages["extra"].warmup_fraction == written.warmup_fraction
    elif group == "model":
        assert config.model.num_layers == written.num_layers
    elif choice == "parallel=auto":
        assert config.parallel.auto
    elif group == "parallel":
        assert config.parallel.tensor_model_parallel_size == written.tensor_model_parallel_size
        assert config.parallel.pipeline_model_parallel_size == written.pipeline_model_parallel_size
        assert config.parallel.context_parallel_size == written.context_parallel_size
    elif group == "objective":
        assert config.objective.normalization.name == written.normalization
    elif group == "optim":
        assert config.optim.beta2 == written.beta2
    else:
        assert config.data.corpus == {"prepared": str(tmp_path), "blend": None, "python": None}.get(option, option)


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "ffn", "theta", "tensor"),
    [
        ("nld_3b", 26, 3072, 9216, 1e6, 1),
        ("nld_8b", 34, 4096, 14336, 1e6, 4),
        ("nld_14b", 40, 5120, 16384, 1e9, 8),
    ],
)
def test_large_experiments_are_the_recipe(
    name: str, layers: int, hidden: int, ffn: int, theta: float, tensor: int, tmp_path: Path
):
    config = large(name, tmp_path)
    model, rope = config.model, config.model.rope
    assert (model.num_layers, model.hidden_size, model.ffn_hidden_size) == (layers, hidden, ffn)
    assert (model.num_attention_heads, model.num_key_value_heads, model.head_dim) == (32, 8, 128)
    assert (model.vocab_size, model.rms_norm_eps) == (131072, 1e-5)
    assert (rope.rope_theta, rope.factor, rope.original_max_position_embeddings) == (theta, 16.0, 16384)
    assert (rope.beta_fast, rope.beta_slow, rope.mscale, rope.mscale_all_dim) == (32.0, 1.0, 1.0, 1.0)
    assert rope.llama_4_scaling_beta == 0.1
    assert config.parallel.tensor_model_parallel_size == tensor
    assert (config.train.global_batch_size, config.data.sequence_length, config.train.micro_batch_size) == (
        512,
        4096,
        1,
    )
    assert config.train.precision is Precision.bf16
    optim = config.optim
    assert (optim.weight_decay, optim.beta2, optim.clip_grad) == (0.1, 0.95, 1.0)
    assert list(config.stages) == ["ar", "joint"]
    assert [stage.tokens for stage in config.stages.values()] == [10**12, 3 * 10**11]
    assert [stage.diffusion_loss_weight for stage in config.stages.values()] == [0.0, 0.3]
    assert {(stage.lr, stage.min_lr) for stage in config.stages.values()} == {(1e-5, 3e-6)}
    assert not any(stage.reset_optimizer for stage in config.stages.values())
    objective = config.objective
    assert (objective.block_size, objective.eps, objective.mask_token_id) == (32, 1e-3, 100)
    assert objective.sampler is Sampler.bernoulli
    assert objective.normalization is Normalization.tokens


def test_the_public_variant_of_the_objective(tmp_path: Path):
    objective = large("nld_8b", tmp_path, "objective=megatron_bridge").objective
    assert objective.block_size == 64
    assert objective.normalization is Normalization.contributing
    assert objective.diffusion_loss_weight == 0.3


def test_tiny_is_the_default_and_runs_anywhere():
    config = compose([])
    assert config.run.dir == "runs/tiny"
    assert config == compose(["experiment=tiny"])
    assert list(config.stages) == ["ar", "joint"]
    assert config.train.precision is Precision.fp32
    assert (config.objective.block_size, config.objective.mask_token_id) == (32, 3)
    assert {part.corpus: part.weight for part in config.data.blend.values()} == {
        "python_code": 0.7,
        "python_prose": 0.3,
    }
    assert 0 < config.checkpoint.interval_seconds <= 10
    assert config.export.prompt


def test_an_experiment_leaves_the_groups_to_the_command_line():
    config = compose(["experiment=nld_8b", "data=stdlib", "model=ministral3_tiny", "parallel=single",
                      "objective.mask_token_id=3", "data.corpus=stdlib"])  # fmt: skip
    assert config.model.num_layers == 4
    assert config.parallel.tensor_model_parallel_size == 1
    assert config.stages["ar"].tokens == 10**12


ABLATIONS = sorted(path.stem for path in (CONFIG_DIR / "experiment" / "ablation").glob("*.yaml"))


@pytest.mark.parametrize("name", [name for name in ABLATIONS if name not in ("base", "estimators")])
def test_every_ablation_composes_and_sees_as_many_tokens(name: str):
    config = compose([f"experiment=ablation/{name}"], world_size=1)
    assert config.run.dir.startswith("runs/ablation/")
    if name != "ar_base":
        assert sum(stage.tokens for stage in config.stages.values()) == 614_400
    assert config.objective.noisy_fraction == 1.0
    assert config.objective.sampler is Sampler.bernoulli


def test_ablation_rows_change_one_thing_each():
    """Table 1 of the report, row by row."""
    names = ("ar_loss", "block", "global_averaging", "two_stage", "varying_ratios")
    rows = {name: compose([f"experiment=ablation/{name}"], world_size=1) for name in names}
    block, averaged, varying = rows["block"], rows["global_averaging"], rows["varying_ratios"]
    two_stage, recipe = rows["two_stage"], rows["ar_loss"]
    assert (block.objective.normalization, averaged.objective.normalization) == (
        Normalization.sequence,
        Normalization.tokens,
    )
    assert [row.objective.shared_noise_level for row in (block, averaged, varying)] == [True, True, False]
    assert [list(row.stages) for row in (block, averaged, varying, two_stage, recipe)] == [
        ["joint"],
        ["joint"],
        ["joint"],
        ["ar", "joint"],
        ["ar", "joint"],
    ]
    weights = [(row.stages["joint"].ar_loss_weight, row.stages["joint"].diffusion_loss_weight) for row in rows.values()]
    assert weights == [(1.0, 0.3), (0.0, 1.0), (0.0, 1.0), (0.0, 1.0), (0.0, 1.0)]


def test_the_supervised_stage_has_the_recipes_rates():
    config = compose(["+stage@stages.sft=sft", "stages.sft.chat=stdlib_chat", "stages.sft.tokens=1000"])
    stage = config.stages["sft"]
    assert (stage.lr, stage.min_lr, stage.diffusion_loss_weight) == (2.5e-6, 2.5e-7, 0.3)
