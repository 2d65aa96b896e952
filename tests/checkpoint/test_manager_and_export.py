"""Checkpoints load at other layouts, exports equal the training model, Hugging Face folders initialise it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from nld_train.checkpoint.convert import export_checkpoint, load_hf_weights
from nld_train.checkpoint.hf_folder import HFFolder
from nld_train.checkpoint.manager import (
    CheckpointInfo,
    CheckpointManager,
    complete_checkpoints,
    latest_checkpoint,
    read_info,
)
from nld_train.checkpoint.weight_map import MINISTRAL3_FORM, NLD_FORM, weight_rules
from nld_train.config.schema import CheckpointConfig, ModelConfig, ParallelConfig
from nld_train.errors import CheckpointError, ConfigError
from nld_train.model.build import build_chunks, build_model
from nld_train.objective.sequence import SequenceLayout
from nld_train.platform.device import Platform
from nld_train.platform.topology import Topology
from nld_train.testing.ranks import RankPool
from nld_train.testing.reference import transformers_model
from nld_train.testing.steps import StepCase, loader_batches, tiny_model, whole_tensors
from nld_train.training.optimizer import build_optimizer, set_hyperparameters
from nld_train.training.run import connect, overlap, wrap_data_parallel
from nld_train.training.step import LossWeights, StepShape, reduce_terms, run_microbatches

LENGTH = 32


def a_step(case: StepCase) -> StepCase:
    case.samples = torch.randint(4, 96, (4, LENGTH + 1), generator=torch.Generator().manual_seed(11))
    return case


def info_of(step: int, model: ModelConfig) -> CheckpointInfo:
    return CheckpointInfo(
        step=step,
        tokens=step * 128,
        stage="joint",
        samples=step * 4,
        dtype="float32",
        model=model,
        parallel={},
        config={"objective": {"mask_token_id": 3, "block_size": 4, "diffusion_loss_weight": 0.3}},
        metrics={"loss": 1.0},
        tokenizer="",
    )


def train_case(
    topology: Topology,
    platform: Platform,
    parallel: ParallelConfig,
    directory: str,
    load_step: int,
    num_steps: int,
    save: bool,
) -> dict[str, Tensor]:
    """Load step ``load_step`` (0: fresh), train ``num_steps``, save if asked; returns the whole parameters, and the sum
    of the losses of the last step."""
    case = a_step(StepCase(samples=torch.empty(0), model=tiny_model(num_layers=4), dtype=torch.float32))
    models = build_chunks(case.model, parallel, dtype=torch.float32, device=platform.device, seed=1)
    chunks = [wrap_data_parallel(model, **overlap(parallel, platform)) for model in models]
    optimizer = build_optimizer(case.optim, chunks, torch.float32)
    connect(chunks, optimizer)
    manager = CheckpointManager(Path(directory), CheckpointConfig(keep_last=2))
    if load_step:
        folder, damaged = manager.latest()
        assert not damaged
        assert folder is not None
        assert manager.load(folder, chunks, optimizer).step == load_step
    for _ in range(num_steps):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        terms = run_microbatches(
            iter(loader_batches(case, topology)),
            chunks,
            StepShape(num_microbatches=4 // topology.data_parallel_size, micro_batch_size=1, num_rows=2 * LENGTH),
            objective=case.objective,
            weights=LossWeights(diffusion=0.3),
            device=platform.device,
        )
        set_hyperparameters(optimizer, case.optim, 1e-3)
        optimizer.step()
    if save:
        manager.save(chunks, optimizer, info_of(load_step + num_steps, case.model))
    return whole_tensors(models, lambda p: p.detach()) | {"loss": reduce_terms(terms).loss_sum}


LAYOUTS = {
    "dp2": ParallelConfig(),
    "tp2": ParallelConfig(tensor_model_parallel_size=2),
    "pp2": ParallelConfig(pipeline_model_parallel_size=2),
    "pp2 x 2 virtual": ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
}


IN_SHORT = ("tp2", "pp2 x 2 virtual")


@pytest.mark.parametrize(
    "layout", [name if name in IN_SHORT else pytest.param(name, marks=pytest.mark.long) for name in LAYOUTS]
)
def test_resume_at_another_layout(one_rank: RankPool, two_ranks: RankPool, tmp_path: Path, layout: str) -> None:
    """Two steps here, two more there, equals four steps here: weights and optimizer state came along, both ways."""
    four = one_rank.run(train_case, ParallelConfig(), str(tmp_path), 0, 4, False)
    there = LAYOUTS[layout]
    one_rank.run(train_case, ParallelConfig(), str(tmp_path / "a"), 0, 2, True)
    found = two_ranks.run(train_case, there, str(tmp_path / "a"), 2, 2, False, parallel=there)
    two_ranks.run(train_case, there, str(tmp_path / "b"), 0, 2, True, parallel=there)
    back = one_rank.run(train_case, ParallelConfig(), str(tmp_path / "b"), 2, 2, False)
    same_training(found, four)
    same_training(back, four)


def same_training(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The last step's loss and the parameters after it."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.long
def test_four_ranks_pass_a_run_on_from_layout_to_layout(
    one_rank: RankPool, four_ranks: RankPool, tmp_path: Path
) -> None:
    """A step each at layouts with nothing in common, model chunks included, equals the steps of one process."""
    tensor = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    pipeline = {"pipeline_model_parallel_size": 2}
    layouts = [
        ParallelConfig(**tensor, **pipeline),  # type: ignore[arg-type]
        ParallelConfig(context_parallel_size=2),
        ParallelConfig(**tensor, **pipeline),  # type: ignore[arg-type]
        ParallelConfig(),
        ParallelConfig(**pipeline, virtual_pipeline_model_parallel_size=2),
        ParallelConfig(**pipeline, num_layers_in_last_pipeline_stage=1),
        ParallelConfig(**tensor, **pipeline, virtual_pipeline_model_parallel_size=2),  # type: ignore[arg-type]
    ]
    one_rank.run(train_case, ParallelConfig(), str(tmp_path / "one"), 0, 1, True)
    for step, parallel in enumerate(layouts):
        found = four_ranks.run(train_case, parallel, str(tmp_path / "four"), step, 1, True, parallel=parallel)
        if step:
            expected = one_rank.run(train_case, ParallelConfig(), str(tmp_path / "one"), step, 1, True)
            same_training(found, expected)


def test_a_checkpoint_holds_the_weights_after_the_step_when_gathering_is_overlapped(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    """As on GPUs: a rank's weights are stale between the step and the next forward pass, a checkpoint's are not."""
    tensors = []
    for overlaps in (False, True):
        directory = tmp_path / str(overlaps)
        parallel = ParallelConfig(overlap_grad_reduce=overlaps, overlap_param_gather=overlaps)
        two_ranks.run(train_case, parallel, str(directory), 0, 2, True)
        checkpoint = latest_checkpoint(directory)
        assert checkpoint is not None
        tensors.append(load_file(export_checkpoint(checkpoint, directory / "hf") / "model.safetensors"))
    for name, expected in tensors[0].items():
        assert torch.equal(tensors[1][name], expected), name


def test_resume_on_the_same_layout_is_bit_exact_and_old_checkpoints_go(one_rank: RankPool, tmp_path: Path) -> None:
    four = one_rank.run(train_case, ParallelConfig(), str(tmp_path / "x"), 0, 4, False)
    for done in (0, 1, 2):
        one_rank.run(train_case, ParallelConfig(), str(tmp_path), done, 1, True)
    (tmp_path / ".incomplete_step_00000009").mkdir()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000002", "step_00000003"]
    found = one_rank.run(train_case, ParallelConfig(), str(tmp_path), 3, 1, True)
    assert all(torch.equal(found[name], four[name]) for name in four)
    assert not list(tmp_path.glob(".incomplete*"))


def test_a_checkpoint_of_another_model_is_refused(one_rank: RankPool, tmp_path: Path) -> None:
    one_rank.run(train_case, ParallelConfig(), str(tmp_path), 0, 1, True)
    folder = latest_checkpoint(tmp_path)
    assert folder is not None
    message = one_rank.run(load_other_model, str(folder))
    assert "CheckpointError" in message
    assert str(folder) in message
    assert "remedy" in message


def load_other_model(topology: Topology, platform: Platform, folder: str) -> str:
    model = build_model(
        tiny_model(hidden_size=64), ParallelConfig(), dtype=torch.float32, device=platform.device, seed=1
    )
    wrapped = wrap_data_parallel(model)
    try:
        CheckpointManager(Path(folder).parent, CheckpointConfig()).load(Path(folder), [wrapped], None)
    except CheckpointError as error:
        return f"CheckpointError {error}"
    return "loaded"


def test_info_file_is_checked(one_rank: RankPool, tmp_path: Path) -> None:
    one_rank.run(train_case, ParallelConfig(), str(tmp_path), 0, 1, True)
    folder = latest_checkpoint(tmp_path)
    assert folder is not None
    assert read_info(folder).model.rope == tiny_model().rope
    path = folder / "checkpoint.json"
    good = path.read_text()
    for damaged, expected in (
        (good[:40], "cannot be read"),
        ("{}", "format_version"),
        (good.replace('"tokens"', '"tok"'), "keys"),
    ):
        path.write_text(damaged)
        with pytest.raises(CheckpointError, match=expected):
            read_info(folder)
    with pytest.raises(CheckpointError, match="not found"):
        read_info(tmp_path)


def clean_logits(
    topology: Topology, platform: Platform, config: ModelConfig, parallel: ParallelConfig, folder: str, tokens: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of the clean tokens after loading a Hugging Face folder (one pipeline stage), and the whole parameters."""
    chunks = build_chunks(config, parallel, dtype=torch.float32, device=platform.device, seed=99)
    load_hf_weights(chunks, config, Path(folder))
    whole = whole_tensors(chunks, lambda p: p.detach())
    if topology.pipeline_size > 1:
        return torch.empty(0), whole
    with torch.no_grad():
        return chunks[0](tokens, SequenceLayout(tokens.shape[1], 4, has_noisy_half=False)).contiguous(), whole


@pytest.mark.parametrize("layout", ["single", *LAYOUTS])
def test_hf_folder_to_megatron_equals_transformers(
    one_rank: RankPool, two_ranks: RankPool, tmp_path: Path, layout: str
) -> None:
    """init.hf_path: a folder written by transformers, at every layout; AR logits equal transformers' own."""
    config = tiny_model(num_layers=4)
    generator = torch.Generator().manual_seed(4)
    parameters = {
        rule.megatron: rule.join(tuple(torch.randn(shape, generator=generator) * 0.05 for shape in rule.shapes))
        for rule in weight_rules(config)
    }
    reference = transformers_model(config, parameters, torch.float32)
    reference.save_pretrained(tmp_path)
    tokens = torch.randint(4, 96, (2, LENGTH), generator=generator)
    parallel = LAYOUTS.get(layout, ParallelConfig())
    pool = one_rank if layout == "single" else two_ranks
    logits, whole = pool.run(clean_logits, config, parallel, str(tmp_path), tokens, parallel=parallel)
    assert set(whole) == set(parameters)
    for name, expected in parameters.items():
        assert torch.equal(whole[name], expected), name
    if not layout.startswith("pp2"):
        with torch.no_grad():
            expected_logits = reference(input_ids=tokens, use_cache=False).logits
        torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)


def save_and_logits(
    topology: Topology, platform: Platform, parallel: ParallelConfig, directory: str, tokens: Tensor
) -> Tensor:
    config = tiny_model(num_layers=4)
    chunks = build_chunks(config, parallel, dtype=torch.float32, device=platform.device, seed=1)
    wrapped = [wrap_data_parallel(chunk, is_first_chunk=chunk is chunks[0]) for chunk in chunks]
    CheckpointManager(Path(directory), CheckpointConfig()).save(wrapped, None, info_of(1, config))
    if topology.pipeline_size > 1:
        return torch.empty(0)
    with torch.no_grad():
        return chunks[0](tokens, SequenceLayout(tokens.shape[1], 4, has_noisy_half=False)).contiguous()


@pytest.fixture(scope="module")
def exported(one_rank: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor, Tensor]:
    directory = tmp_path_factory.mktemp("export")
    tokens = torch.randint(4, 96, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    logits = one_rank.run(save_and_logits, ParallelConfig(), str(directory), tokens)
    checkpoint = latest_checkpoint(directory)
    assert checkpoint is not None
    return export_checkpoint(checkpoint, directory / "hf"), tokens, logits


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM])
def test_exported_logits_equal_the_training_model(exported: tuple[Path, Tensor, Tensor], auto_class: Any) -> None:
    folder, tokens, expected = exported
    model, report = auto_class.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        found = model(input_ids=tokens).logits
    assert ((found - expected).norm() / expected.norm()).item() < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_is_the_same_from_every_layout(
    exported: tuple[Path, Tensor, Tensor], two_ranks: RankPool, tmp_path: Path, layout: str
) -> None:
    folder, tokens, _ = exported
    parallel = LAYOUTS[layout]
    two_ranks.run(save_and_logits, parallel, str(tmp_path), tokens, parallel=parallel)
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    out = export_checkpoint(checkpoint, tmp_path / "hf")
    assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_export_names_shapes_and_shards(exported: tuple[Path, Tensor, Tensor], tmp_path: Path) -> None:
    folder, _, _ = exported
    tensors = load_file(folder / "model.safetensors")
    expected = {name for rule in weight_rules(tiny_model(num_layers=4)) for name in rule.hf_names(NLD_FORM)}
    assert set(tensors) == expected
    assert {"encoder.embed_tokens.weight", "encoder.norm.weight", "diffusion_head.weight"} < expected
    assert len(list(weight_rules(tiny_model(num_layers=26)))) == 159  # 26 x 6 + 3 Megatron parameters of the 3B
    assert sum(len(rule.hf) for rule in weight_rules(tiny_model(num_layers=26))) == 237

    checkpoint = latest_checkpoint(folder.parent)
    assert checkpoint is not None
    progress: list[tuple[int, int]] = []
    out = export_checkpoint(
        checkpoint,
        tmp_path / "sharded",
        dtype=torch.bfloat16,
        max_shard_bytes=20_000,
        progress=lambda done, total: progress.append((done, total)),
    )
    assert len(list(out.glob("model-*.safetensors"))) > 2
    assert progress[-1][0] == progress[-1][1] > 0
    with HFFolder(out) as sharded:
        assert sharded.tensor_names == expected
        for name, tensor in tensors.items():
            found = sharded.tensor(name, tuple(tensor.shape))
            assert found.dtype is torch.bfloat16
            assert torch.equal(found, tensor.bfloat16())
    model = AutoModel.from_pretrained(out, trust_remote_code=True)
    assert torch.equal(model.diffusion_head.weight, tensors["diffusion_head.weight"].bfloat16())

    with pytest.raises(CheckpointError, match="exists already"):
        export_checkpoint(checkpoint, out)
    assert not list(tmp_path.glob(".incomplete*"))


def test_reading_a_bad_folder_names_what_is_wrong(exported: tuple[Path, Tensor, Tensor], tmp_path: Path) -> None:
    import json
    import shutil

    folder, _, _ = exported

    def copy(name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    bad = copy("shape")
    tensors = load_file(bad / "model.safetensors")
    tensors["encoder.norm.weight"] = torch.ones(3)
    save_file(tensors, bad / "model.safetensors")
    with (
        HFFolder(bad) as opened,
        pytest.raises(CheckpointError, match=r"encoder\.norm\.weight has shape \(3,\), expected \(48,\)"),
    ):
        opened.tensor("encoder.norm.weight", (48,))
    with HFFolder(bad) as opened, pytest.raises(CheckpointError, match="nothing is missing"):
        opened.tensor("nothing", (1,))

    bad = copy("truncated")
    data = (bad / "model.safetensors").read_bytes()
    (bad / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        HFFolder(bad)

    bad = copy("architecture")
    config = json.loads((bad / "config.json").read_text())
    config["architectures"] = ["LlamaForCausalLM"]
    (bad / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="LlamaForCausalLM"):
        HFFolder(bad)
    (bad / "config.json").write_text("{not json")
    with pytest.raises(CheckpointError, match=r"config\.json.*not readable JSON"):
        HFFolder(bad)

    for kind, change in (("dtype", {}), ("quantised", {"quantization_config": {"quant_method": "fp8"}})):
        bad = copy(kind)
        tensors = load_file(bad / "model.safetensors")
        tensors["encoder.norm.weight"] = tensors["encoder.norm.weight"].to(torch.float8_e4m3fn)
        save_file(tensors, bad / "model.safetensors")
        config = json.loads((bad / "config.json").read_text())
        (bad / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match="F8_E4M3" if kind == "dtype" else "quantization_config"):
            HFFolder(bad).tensor("encoder.norm.weight", (48,))

    names = {name for rule in weight_rules(tiny_model(num_layers=4)) for name in rule.hf_names(NLD_FORM)}
    with HFFolder(folder) as opened:
        opened.check_names(names)
        with pytest.raises(CheckpointError, match=r"1 tensors are missing: other"):
            opened.check_names(names | {"other"})
        with pytest.raises(CheckpointError, match=r"1 tensors are not part of the model.*encoder\.norm"):
            opened.check_names(names - {"encoder.norm.weight"})

    bad = copy("no weights")
    (bad / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        HFFolder(bad)


def test_init_refuses_a_folder_of_another_shape(one_rank: RankPool, exported: tuple[Path, Tensor, Tensor]) -> None:
    message = one_rank.run(init_other_shape, str(exported[0]))
    assert "model.num_key_value_heads: is 4" in message
    assert "model.ffn_hidden_size: is 64" in message


def init_other_shape(topology: Topology, platform: Platform, folder: str) -> str:
    config = tiny_model(num_key_value_heads=4, ffn_hidden_size=64)
    model = build_model(config, ParallelConfig(), dtype=torch.float32, device=platform.device, seed=1)
    try:
        load_hf_weights([model], config, Path(folder))
    except ConfigError as error:
        return str(error)
    return "loaded"


def test_weight_rules_are_inverses() -> None:
    model = tiny_model(num_attention_heads=6, num_key_value_heads=2)
    generator = torch.Generator().manual_seed(0)
    for rule in weight_rules(model):
        parts = tuple(torch.randn(shape, generator=generator) for shape in rule.shapes)
        back = rule.split(rule.join(parts))
        assert all(torch.equal(a, b) for a, b in zip(parts, back, strict=True)), rule.megatron
        assert len(rule.hf_names(MINISTRAL3_FORM)) == len(rule.shapes)
