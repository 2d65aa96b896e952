"""An exported folder against the public description of the format: what vLLM, SGLang and transformers look for.

Names, shapes and fields stand here a second time, written out, so that a change of the weight table or of the
configuration that other engines could not read is seen.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel

from nld_train.checkpoint.convert import export_checkpoint, hf_config
from nld_train.checkpoint.manager import CheckpointInfo, CheckpointManager, latest_checkpoint
from nld_train.checkpoint.weight_map import NLD_FORM, weight_rules
from nld_train.config.compose import compose
from nld_train.config.schema import CheckpointConfig, ModelConfig, ParallelConfig
from nld_train.model.build import build_model
from nld_train.platform.device import Platform
from nld_train.platform.topology import Topology
from nld_train.testing.ranks import RankPool
from nld_train.testing.steps import tiny_model
from nld_train.training.run import wrap_data_parallel

# The 3B: hidden 3072, ffn 9216, 32 query and 8 key-value heads of 128, 131072 entries.
TENSORS_OF_3B = {
    "encoder.embed_tokens.weight": (131072, 3072),
    "encoder.norm.weight": (3072,),
    "diffusion_head.weight": (131072, 3072),
}
TENSORS_OF_A_LAYER_OF_3B = {
    "encoder.layers.{}.input_layernorm.weight": (3072,),
    "encoder.layers.{}.self_attn.q_proj.weight": (4096, 3072),
    "encoder.layers.{}.self_attn.k_proj.weight": (1024, 3072),
    "encoder.layers.{}.self_attn.v_proj.weight": (1024, 3072),
    "encoder.layers.{}.self_attn.o_proj.weight": (3072, 4096),
    "encoder.layers.{}.post_attention_layernorm.weight": (3072,),
    "encoder.layers.{}.mlp.gate_proj.weight": (9216, 3072),
    "encoder.layers.{}.mlp.up_proj.weight": (9216, 3072),
    "encoder.layers.{}.mlp.down_proj.weight": (3072, 9216),
}
FIELDS_OF_3B: dict[str, Any] = {
    "architectures": ["NemotronLabsDiffusionModel"],
    "model_type": "nemotron_labs_diffusion",
    "vocab_size": 131072,
    "hidden_size": 3072,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "sliding_window": None,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "mask_token_id": 100,
    "block_size": 32,
    "dlm_paradigm": "bidirectional",
    "dlm_loss_weight": 0.3,
    "ar_loss_weight": 1.0,
    "dp_varying_mask_ratio": True,
    "dtype": "bfloat16",
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "max_position_embeddings": 262144,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
}
AUTO_CLASSES = {"AutoConfig", "AutoModel"}
METHODS = {
    "ar_generate": ["prompt_ids", "max_new_tokens", "temperature", "eos_token_id"],
    "generate": ["prompt_ids", "max_new_tokens", "block_length", "threshold"],
    "linear_spec_generate": ["prompt_ids", "max_new_tokens", "block_length"],
}


def names_of(num_layers: int) -> set[str]:
    layers = {pattern.format(number) for number in range(num_layers) for pattern in TENSORS_OF_A_LAYER_OF_3B}
    return set(TENSORS_OF_3B) | layers


def info_of(model: ModelConfig) -> CheckpointInfo:
    return CheckpointInfo(
        step=1,
        tokens=128,
        stage="joint",
        samples=4,
        dtype="float32",
        model=model,
        parallel={},
        config={"objective": {"mask_token_id": 3, "block_size": 4, "diffusion_loss_weight": 0.5}},
        metrics={},
        tokenizer="",
    )


def save(topology: Topology, platform: Platform, directory: str) -> None:
    config = tiny_model()
    model = build_model(config, ParallelConfig(), dtype=torch.float32, device=platform.device, seed=1)
    wrapped = wrap_data_parallel(model)
    CheckpointManager(Path(directory), CheckpointConfig()).save([wrapped], None, info_of(config))


@pytest.fixture(scope="module")
def exported(one_rank: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 export of a small model in several files."""
    directory = tmp_path_factory.mktemp("export")
    one_rank.run(save, str(directory))
    checkpoint = latest_checkpoint(directory)
    assert checkpoint is not None
    return export_checkpoint(checkpoint, directory / "hf", dtype=torch.bfloat16, max_shard_bytes=20_000)


@pytest.fixture
def model_3b(tmp_path: Path) -> ModelConfig:
    return compose(["experiment=nld_3b", f"data.corpus={tmp_path}"], world_size=1).model


def test_names_and_shapes_of_3b(model_3b: ModelConfig) -> None:
    found = {
        name: shape
        for rule in weight_rules(model_3b)
        for name, shape in zip(rule.hf_names(NLD_FORM), rule.shapes, strict=True)
    }
    expected = dict(TENSORS_OF_3B)
    for number in range(26):
        expected |= {pattern.format(number): shape for pattern, shape in TENSORS_OF_A_LAYER_OF_3B.items()}
    assert found == expected
    assert len(found) == 237
    assert 2 * sum(torch.Size(shape).numel() for shape in found.values()) == 7_663_319_040  # bytes in bf16


def test_config_fields_of_3b(model_3b: ModelConfig) -> None:
    info = info_of(model_3b)
    info.config["objective"] = {"mask_token_id": 100, "block_size": 32, "diffusion_loss_weight": 0.3}
    found = hf_config(info, torch.bfloat16)
    assert {key: found.get(key, "absent") for key in FIELDS_OF_3B} == FIELDS_OF_3B


def test_config_fields_say_what_the_run_did(model_3b: ModelConfig) -> None:
    info = info_of(model_3b)
    info.config["objective"] = {"shared_noise_level": True}
    info.config["stages"] = {info.stage: {"ar_loss_weight": 0.0}}
    found = hf_config(info, torch.bfloat16)
    assert (found["ar_loss_weight"], found["dp_varying_mask_ratio"]) == (0.0, False)


def test_the_folder_holds_the_files_of_the_format(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert set(FIELDS_OF_3B) <= set(config)
    assert set(FIELDS_OF_3B["rope_parameters"]) == set(config["rope_parameters"])
    assert set(config["auto_map"]) >= AUTO_CLASSES
    for reference in config["auto_map"].values():
        module, class_name = reference.split(".")
        assert f"class {class_name}(" in (exported / f"{module}.py").read_text()
    own = (config["mask_token_id"], config["block_size"], config["dlm_loss_weight"])
    assert own == (3, 4, 0.5), "the run's own objective, not the defaults"
    generation = json.loads((exported / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)


def test_the_folder_holds_the_tensors_of_the_format(exported: Path) -> None:
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == names_of(tiny_model().num_layers)
    files = sorted(path.name for path in exported.glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    assert sorted(set(index["weight_map"].values())) == files
    total = 0
    for file_name in files:
        with safe_open(str(exported / file_name), framework="pt") as file:
            assert file.metadata()["format"] == "pt"  # transformers refuses a file without it
            assert set(file.keys()) == {name for name, home in index["weight_map"].items() if home == file_name}
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                assert tensor.dtype is torch.bfloat16, name
                total += tensor.nbytes
    assert index["metadata"]["total_size"] == total


def test_transformers_loads_it_with_the_methods_of_the_format(exported: Path) -> None:
    loaded_config = AutoConfig.from_pretrained(exported, trust_remote_code=True)
    assert loaded_config.model_type == "nemotron_labs_diffusion"
    assert loaded_config.rope_parameters["original_max_position_embeddings"] == 8
    model, report = AutoModel.from_pretrained(exported, trust_remote_code=True, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert set(model.state_dict()) == names_of(tiny_model().num_layers)
    for method, arguments in METHODS.items():
        assert list(inspect.signature(getattr(model, method)).parameters)[: len(arguments)] == arguments
        result = getattr(model, method)(torch.tensor([[5, 6, 7]]), max_new_tokens=4)
        output_ids, num_forwards = result
        assert output_ids.shape == (1, 7)
        assert output_ids[0, :3].tolist() == [5, 6, 7]
        assert isinstance(num_forwards, int)
