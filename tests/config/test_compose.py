"""Composition: what can be set, what is refused, and that everything wrong is said at once."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from nld_train.config import compose as compose_module
from nld_train.config.command_help import all_keys
from nld_train.config.compose import Source, compose, load_resolved, save_resolved, to_dict
from nld_train.config.schema import AttentionBackend, Config, WandbMode
from nld_train.errors import ConfigError, Problem


def refused(*overrides: str, **options) -> dict[str, Problem]:
    """The problems of a command line by location; each has a message and a remedy."""
    with pytest.raises(ConfigError) as caught:
        compose(overrides, **options)
    assert all(problem.message and problem.remedy for problem in caught.value.problems)
    located = {problem.location: problem for problem in caught.value.problems}
    for problem in caught.value.problems:
        assert str(problem) in str(caught.value)
    return located


def test_overrides_are_typed():
    config = compose(
        ["run.dir=/x/y", "run.seed=7", "optim.weight_decay=0", "model.attention_backend=dense", "wandb.mode=offline"]
    )
    assert (config.run.dir, config.run.seed) == ("/x/y", 7)
    assert isinstance(config.optim.weight_decay, float)
    assert config.model.attention_backend is AttentionBackend.dense
    assert config.wandb.mode is WandbMode.offline


def test_stages_follow_the_objectives_weight_unless_they_have_their_own():
    assert compose(["objective.diffusion_loss_weight=0.5"]).stages["joint"].diffusion_loss_weight == 0.5
    config = compose(["objective.diffusion_loss_weight=0.5", "stages.joint.diffusion_loss_weight=0.1"])
    assert config.stages["joint"].diffusion_loss_weight == 0.1
    assert config.stages["ar"].diffusion_loss_weight == 0.0


def test_stages_are_added_and_removed():
    values = ["stages.anneal.tokens=500", "stages.anneal.lr=2e-4", "stages.anneal.min_lr=0"]
    config = compose(["+stage@stages.anneal=joint", *values])
    assert list(config.stages) == ["ar", "joint", "anneal"]
    assert (config.stages["anneal"].tokens, config.stages["anneal"].diffusion_loss_weight) == (500, 0.3)
    assert list(compose(["~stages.ar"]).stages) == ["joint"]
    assert compose(["stages.joint.tokens=1_000_000"]).stages["joint"].tokens == 1_000_000


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("model.hidden_sizes=1", "model.hidden_sizes", "did you mean model.hidden_size?"),
        ("+model.hidden_sizes=1", "model.hidden_sizes", "did you mean model.hidden_size?"),
        ("++model.rope.thetas=1", "model.rope.thetas", "--help"),
        ("hidden_size=1", "hidden_size", "did you mean model.hidden_size?"),
        ("optim.clip_grd=1", "optim.clip_grd", "did you mean optim.clip_grad?"),
        ("train.tensor_model_parallel_size=2", "train.tensor_model_parallel_size",
         "did you mean parallel.tensor_model_parallel_size?"),
        ("modle=ministral3_8b", "modle", "did you mean model?"),
        ("stages.joint.token=1", "stages.joint.token", "did you mean stages.joint.tokens?"),
        ("stages.jiont.tokens=1", "stages.jiont.tokens", "did you mean stages.joint.tokens?"),
        ("~stages.foo", "stages.foo", "ar, joint"),
        ("zzz.qqq=1", "zzz.qqq", "--help"),
        ("experiment=nld_8B", "experiment", "did you mean experiment=nld_8b?"),
        ("objective=recipe", "objective", "objective=default, objective=megatron_bridge, objective=nld_recipe"),
        ("model=null", "model", "model=ministral3_tiny"),
        ("+stage@stages.x=jiont", "stage", "did you mean stage=joint?"),
        ("stage@stages.x=joint", "stage@stages.x=joint", "+stage@stages.x=joint"),
        ("+run.seed=3", "+run.seed=3", "run.seed=3"),
        ("train.micro_batch_size=abc", "train.micro_batch_size", "give an integer"),
        ("train.micro_batch_size=true", "train.micro_batch_size", "give an integer"),
        ("train.micro_batch_size=null", "train.micro_batch_size", "give an integer"),
        ("train.micro_batch_size=1.5", "train.micro_batch_size", "give an integer"),
        ("train.micro_batch_size=[1]", "train.micro_batch_size", "give an integer"),
        ("stages.joint.tokens=1e6", "stages.joint.tokens", "stages.joint.tokens=1000000"),
        ("optim.beta1=x", "optim.beta1", "give a number"),
        ("export.enabled=perhaps", "export.enabled", "true or false"),
        ("train.precision=fp16", "train.precision", "one of fp32, bf16"),
        ("train.device=CPU", "train.device", "did you mean train.device=cpu?"),
        ("objective.sampler=gauss", "objective.sampler", "one of bernoulli"),
        ("train=5", "train", "set single keys"),
        ("objective.block_size=${nope.x}", "objective.block_size", "give the value itself"),
        ("run.dir=???", "run.dir", "run.dir=VALUE"),
        ("run.seed=1,2", "run.seed", "--multirun"),
        ("run.seed", "run.seed", "key=value"),
        ("a b=1", "a b=1", "key=value"),
        ("~run.dir", "~run.dir", "--help"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named(override: str, key: str, words: str):
    problems = refused(override)
    assert list(problems) == [key]
    assert words in problems[key].remedy
    value = override.partition("=")[2].strip("${}").replace("1e6", "1000000.0")
    assert value in problems[key].message or value in key


def test_everything_wrong_is_said_at_once():
    problems = refused(
        "experiment=nld_8b",
        "model.hidden_sizes=1",
        "objective.block_size=0",
        "train.precision=fp16",
        "stages.joint.tokens=many",
        "optim.beta1=2",
        "stages.x.lr=1",
        "run.seed=1,2",
        world_size=4,
    )
    assert set(problems) == {
        *("model.hidden_sizes", "objective.block_size", "train.precision", "stages.joint.tokens", "optim.beta1"),
        *("stages.x.lr", "run.seed", "data.corpus"),
    }


def test_an_unknown_experiment_does_not_hide_what_is_wrong_in_any_experiment():
    problems = refused("experiment=nope", "model.hidden_sizes=1", "train.device=GPU", "stages.any.lr=1", "run.seed=-1")
    # What depends on the experiment (its stages, its batch) is not judged against another experiment.
    assert set(problems) == {"experiment", "model.hidden_sizes", "train.device"}
    assert set(refused("experiment=nope", "run.seed=-1")) == {"experiment"}


def test_a_value_that_is_wrong_is_not_missing_too():
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=nld_3b", "data.corpus=[1]"])
    assert [problem.location for problem in caught.value.problems] == ["data.corpus"]
    assert "is not text" in caught.value.problems[0].message


def test_what_points_at_a_missing_value_is_no_second_problem():
    assert set(refused("experiment=nld_3b", "wandb.name=${data.corpus}")) == {"data.corpus"}


def test_missing_values_are_named_with_what_they_are():
    problems = refused("+stage@stages.x=joint")
    assert set(problems) == {"stages.x.tokens", "stages.x.lr", "stages.x.min_lr"}
    assert "clean tokens" in problems["stages.x.tokens"].message


def test_files_of_a_user_are_checked_like_the_command_line(tmp_path: Path):
    (tmp_path / "experiment").mkdir()
    mine = tmp_path / "experiment" / "mine.yaml"
    mine.write_text(
        "# @package _global_\ndefaults:\n  - /stage@stages.only: joint\n  - _self_\nrun:\n  dir: runs/mine\n"
        "stages:\n  only:\n    tokens: 5000\n    lr: 1.0e-3\n    min_lr: 0\nobjective:\n  mask_token_id: 3\n"
    )
    source = Source(extra_dir=tmp_path)
    config = compose(["experiment=mine"], source=source)
    assert (list(config.stages), config.run.dir) == (["only"], "runs/mine")

    mine.write_text(mine.read_text() + "  blok_size: 3\n  eps: big\nmodle:\n  num_layers: 2\n")
    problems = refused("experiment=mine", "run.seed=x", source=source)
    assert set(problems) == {"objective.blok_size", "objective.eps", "modle", "run.seed"}
    assert "objective.block_size" in problems["objective.blok_size"].remedy

    mine.write_text("a: [1\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        compose(["experiment=mine"], source=source)


def test_config_survives_the_file(tmp_path: Path):
    config = compose(["init.hf_path=null", "stages.ar.tokens=123", "export.prompt='a: \"b\" # c'"])
    path = tmp_path / "new" / "config.yaml"
    save_resolved(config, path)
    save_resolved(config, path)  # replaces
    assert load_resolved(path) == config
    assert [entry.name for entry in path.parent.iterdir()] == ["config.yaml"]
    plain = yaml.safe_load(path.read_text())
    assert plain == to_dict(config)
    assert plain["train"]["precision"] == "fp32"
    assert plain["stages"]["joint"]["diffusion_loss_weight"] == 0.3
    assert list(plain["stages"]) == ["ar", "joint"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "config.yaml"
    save_resolved(compose([]), path)
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(compose_module.os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_resolved(compose(["run.seed=9"]), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "there is no such file"),
        ("a: [1", "is not YAML"),
        ("- 1\n", "holds no sections"),
        ("model:\n  layers: 3\n", "model.layers"),
        ("run:\n  seed: x\n", "run.seed"),
        ("run:\n  seed: 1\n", "run.dir"),
    ],
)
def test_a_damaged_file_is_named(text: str | None, words: str, tmp_path: Path):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        load_resolved(path)
    assert str(path) in str(caught.value)


def test_a_composition_leaves_nothing_behind():
    first = compose([])
    refused("model.hidden_sizes=1")
    assert compose([]) == first


def test_every_key_says_what_it_is():
    assert [path for path, key in all_keys().items() if not key.comment] == []
    # and the table is complete: every leaf of a composed configuration is a key
    part = "{mine:{corpus:stdlib,weight:1}}"
    blends = ["data=blend", f"++data.blend={part}", f"++stages.joint.blend={part}"]
    plain = OmegaConf.create({**to_dict(compose(["~stages.ar", *blends]))})
    leaves = {re.sub(r"^stages\.joint", "stages.*", path).replace(".mine.", ".*.") for path in _leaves(plain, "")}
    assert leaves == set(all_keys())


def _leaves(node, prefix: str) -> list[str]:
    if not OmegaConf.is_dict(node):
        return [prefix]
    return [leaf for name in node for leaf in _leaves(node[name], f"{prefix}.{name}".lstrip("."))]


def test_the_schema_is_strict():
    assert all(
        dataclasses.is_dataclass(item.default_factory) for item in dataclasses.fields(Config) if item.name != "stages"
    )
    with pytest.raises(AttributeError):
        compose([]).model.hidden_sizes = 1  # slots
