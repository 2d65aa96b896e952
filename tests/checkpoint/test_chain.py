"""The way of a checkpoint: made by transformers -> ``init.hf_path`` -> both stages -> export -> three modes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Ministral3Config, Ministral3ForCausalLM

from nld_train.checkpoint.weight_map import MINISTRAL3_FORM, NLD_FORM, weight_rules
from nld_train.config.schema import DataConfig
from nld_train.data.dataset import TrainStream
from nld_train.data.prepare import prepare
from nld_train.evaluation.decoding import DecodingMode, continue_prompt, load_export
from nld_train.testing.steps import tiny_model

ROOT = Path(__file__).parents[2]
ON_CPU = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # the layouts need more ranks than a machine may have GPUs
BATCH, LENGTH, SEED = 4, 32, 7
STEPS = {"ar": 3, "joint": 3}
MASK_TOKEN_ID = 3  # <mask> of the tokenizer that is trained on the corpus
# Not the values of any file in configs/: a table in code instead of the folder's own numbers would be seen. The query
# scaling steps at 10, 20 and 30, inside a sample.
SHAPE: dict[str, int | float] = {
    "num_layers": 2,
    "hidden_size": 40,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 640,
}
ROPE: dict[str, int | float] = {
    "rope_theta": 1e9,
    "factor": 16.0,
    "original_max_position_embeddings": 10,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Ministral3 folder as transformers writes it: tied, as the 3B base is; uneven attention, sharp logits."""
    config = Ministral3Config(
        vocab_size=SHAPE["vocab_size"],
        hidden_size=SHAPE["hidden_size"],
        intermediate_size=SHAPE["ffn_hidden_size"],
        num_hidden_layers=SHAPE["num_layers"],
        num_attention_heads=SHAPE["num_attention_heads"],
        num_key_value_heads=SHAPE["num_key_value_heads"],
        head_dim=SHAPE["head_dim"],
        max_position_embeddings=SHAPE["max_position_embeddings"],
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=None,
        rope_parameters={"rope_type": "yarn", **ROPE},
    )
    model = Ministral3ForCausalLM(config)
    generator = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if parameter.dim() == 1 else 0.2 * noise)
    folder = tmp_path_factory.mktemp("base") / "hf"
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    return folder


def train(run_dir: Path, base: Path, cache: Path, *extra: str, ranks: int = 1) -> list[dict[str, Any]]:
    """Run train.py from the folder's weights; returns the step records."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    overrides = {
        "run.dir": run_dir,
        "run.seed": SEED,
        "init.hf_path": base,
        **{f"model.{key}": value for key, value in SHAPE.items()},
        **{f"model.rope.{key}": value for key, value in ROPE.items()},
        "data": "stdlib",
        "data.cache_dir": cache,
        "data.sequence_length": LENGTH,
        "data.num_workers": 0,
        "objective.block_size": 8,
        "objective.mask_token_id": MASK_TOKEN_ID,
        "train.global_batch_size": BATCH,
        "train.micro_batch_size": 2,
        "train.validation_interval": 100,
        "train.validation_samples": 4,
        **{f"stages.{name}.tokens": steps * BATCH * LENGTH for name, steps in STEPS.items()},
        "export.prompt": "null",
    }
    result = subprocess.run(
        [*launcher, "train.py", *(f"{key}={value}" for key, value in overrides.items()), *extra],
        cwd=ROOT, env=ON_CPU, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base: Path, cache: Path) -> tuple[Path, list[dict[str, Any]]]:
    run_dir = tmp_path_factory.mktemp("runs") / "single"
    return run_dir, train(run_dir, base, cache)


@pytest.fixture(scope="module")
def first_batch(trained: object, cache: Path) -> tuple[Tensor, Tensor]:
    """Tokens and labels int64 [BATCH, LENGTH] of the run's first step."""
    data = DataConfig(corpus="stdlib", cache_dir=str(cache))
    corpus = prepare("stdlib", data, int(SHAPE["vocab_size"]), mask_token_id=MASK_TOKEN_ID)
    stream = TrainStream(corpus, sequence_length=LENGTH, seed=SEED, mask_token_id=MASK_TOKEN_ID, cache_dir=cache)
    samples = [stream[index] for index in range(BATCH)]
    return torch.stack([sample["tokens"] for sample in samples]), torch.stack([sample["labels"] for sample in samples])


@torch.no_grad()
def transformers_loss(folder: Path, batch: tuple[Tensor, Tensor]) -> float:
    """Mean next-token cross-entropy in nats of transformers' model as it loads the folder itself."""
    tokens, labels = batch
    logits = Ministral3ForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=tokens).logits
    return torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), labels.flatten()).item()


def test_the_first_ar_loss_equals_transformers(
    trained: tuple[Path, list[dict[str, Any]]], first_batch: tuple[Tensor, Tensor], base: Path, tmp_path: Path
) -> None:
    _, records = trained
    expected = transformers_loss(base, first_batch)
    assert abs(expected - math.log(512)) > 0.1, "weights this small would give any model the same loss"
    assert records[0]["step"] == 1
    assert records[0]["ar_loss"] == pytest.approx(expected, rel=1e-5)

    # The comparison can tell: the same weights without the query scaling have another loss.
    model = Ministral3ForCausalLM.from_pretrained(base)
    model.config.rope_parameters["llama_4_scaling_beta"] = 0.0
    model.save_pretrained(tmp_path)
    assert transformers_loss(tmp_path, first_batch) != pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("tensor", "pipeline"),
    [
        pytest.param(2, 1, id="tp2"),
        pytest.param(1, 2, id="pp2", marks=pytest.mark.long),
        pytest.param(2, 2, id="tp2 x pp2", marks=pytest.mark.long),
    ],
)
def test_every_layout_starts_from_the_same_loss(
    trained: tuple[Path, list[dict[str, Any]]],
    first_batch: tuple[Tensor, Tensor],
    base: Path,
    cache: Path,
    tmp_path: Path,
    tensor: int,
    pipeline: int,
) -> None:
    records = train(
        tmp_path,
        base,
        cache,
        f"parallel.tensor_model_parallel_size={tensor}",
        f"parallel.pipeline_model_parallel_size={pipeline}",
        *(f"stages.{name}.tokens={BATCH * LENGTH}" for name in STEPS),
        "export.enabled=false",
        ranks=tensor * pipeline,
    )
    assert records[0]["ar_loss"] == pytest.approx(transformers_loss(base, first_batch), rel=1e-5)
    assert records[0]["ar_loss"] == pytest.approx(trained[1][0]["ar_loss"], rel=1e-5)


def test_both_stages_ran_and_the_export_decodes_in_three_modes(
    trained: tuple[Path, list[dict[str, Any]]], base: Path
) -> None:
    run_dir, records = trained
    assert [record["stage"] for record in records] == ["ar"] * STEPS["ar"] + ["joint"] * STEPS["joint"]
    assert records[-1]["diffusion_loss"] > 0

    config = json.loads((run_dir / "hf/config.json").read_text())
    base_config = json.loads((base / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    for key in ROPE:
        assert config["rope_parameters"][key] == base_config["rope_parameters"][key], key
    assert config["max_position_embeddings"] == base_config["max_position_embeddings"]
    assert config["mask_token_id"] == MASK_TOKEN_ID

    before, after = load_file(base / "model.safetensors"), load_file(run_dir / "hf/model.safetensors")
    for rule in weight_rules(tiny_model(**SHAPE)):
        for old_name, new_name in zip(rule.hf_names(MINISTRAL3_FORM), rule.hf_names(NLD_FORM), strict=True):
            old = before.get(old_name, before["model.embed_tokens.weight"])
            moved = ((after[new_name] - old).norm() / old.norm()).item()
            assert moved < 0.5, f"{new_name} is not what {old_name} was trained to"
            assert moved > 0 or new_name.endswith("norm.weight"), new_name
    embedding, head = after["encoder.embed_tokens.weight"], after["diffusion_head.weight"]
    assert not torch.equal(embedding, head), "embedding and head are trained apart"

    model, tokenizer = load_export(run_dir / "hf")
    results = {mode: continue_prompt(model, tokenizer, "def main(", mode, max_new_tokens=16) for mode in DecodingMode}
    for result in results.values():
        assert result["num_tokens"] == 16
        assert 0 < result["num_forwards"] <= 2 * 16 + 1
        assert MASK_TOKEN_ID not in result["token_ids"]
    assert results[DecodingMode.linear]["token_ids"] == results[DecodingMode.ar]["token_ids"]
