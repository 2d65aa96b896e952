"""Import, export and import again are bit-exact in every form; bad folders are refused and leave nothing behind."""

import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from nld_train.checkpoint.checksums import CHECKSUM_FILE, read_checksums
from nld_train.checkpoint.convert import check_same_model, export_checkpoint, hf_config, import_checkpoint
from nld_train.checkpoint.headers import text_config
from nld_train.checkpoint.hf_folder import HFFolder
from nld_train.checkpoint.inspection import inspect_folder
from nld_train.checkpoint.manager import CheckpointInfo, CheckpointManager, read_info
from nld_train.checkpoint.streaming import StoredParameters
from nld_train.checkpoint.verification import verify_checkpoint
from nld_train.checkpoint.weight_map import (
    MINISTRAL3_FORM,
    MISTRAL3_FORM,
    MISTRAL3_MODULE_FORM,
    NLD_FORM,
    weight_rules,
)
from nld_train.config.schema import CheckpointConfig, ModelConfig, ParallelConfig, RopeConfig
from nld_train.errors import CheckpointError, ConfigError
from nld_train.model.build import build_model
from nld_train.platform.device import Platform
from nld_train.platform.topology import Topology
from nld_train.testing.ranks import RankPool, RankProcesses
from nld_train.testing.steps import StepCase, loader_batches, tiny_model, whole_tensors
from nld_train.training.run import connect, wrap_data_parallel
from nld_train.training.step import LossWeights, StepShape, reduce_terms, run_microbatches
from scripts.convert_checkpoint import main

ROOT = Path(__file__).parents[2]
MODEL = tiny_model(
    num_attention_heads=6,
    num_key_value_heads=2,
    hidden_size=50,
    ffn_hidden_size=70,
    vocab_size=107,
    rope=RopeConfig(  # no number is the default of anything
        rope_theta=3e5, factor=5.0, original_max_position_embeddings=8, beta_fast=7.0, beta_slow=2.0, mscale=0.75,
        mscale_all_dim=0.5, llama_4_scaling_beta=0.2,
    ),
)  # fmt: skip
OBJECTIVE = {"mask_token_id": 5, "block_size": 16, "diffusion_loss_weight": 0.7}
ARCHITECTURES = {
    "ministral3": ("Ministral3ForCausalLM", MINISTRAL3_FORM),
    "mistral3": ("Mistral3ForConditionalGeneration", MISTRAL3_FORM),
    "mistral3 modules": ("Mistral3ForConditionalGeneration", MISTRAL3_MODULE_FORM),
    "nld": ("NemotronLabsDiffusionModel", NLD_FORM),
}


def silent(text: str) -> None:
    del text


@dataclass(slots=True, kw_only=True)
class Folder:
    """A Hugging Face folder to write: change what shall be odd, then ``write``."""

    kind: str = "ministral3"
    model: ModelConfig = field(default_factory=lambda: MODEL)
    dtype: torch.dtype = torch.bfloat16
    is_tied: bool = False
    num_files: int = 1
    tensors: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        architecture, form = ARCHITECTURES[self.kind]
        generator = torch.Generator().manual_seed(8)
        for rule in weight_rules(self.model):
            for name, shape in zip(rule.hf_names(form), rule.shapes, strict=True):
                self.tensors[name] = (torch.randn(shape, generator=generator) * 0.3).to(self.dtype)
        if self.is_tied:
            del self.tensors[form["head"]]
        info = CheckpointInfo(
            step=0, tokens=0, stage="", samples=0, dtype="", model=self.model, parallel={}, config={}, metrics={},
            tokenizer="",
        )  # fmt: skip
        text = hf_config(info, self.dtype) | {"architectures": [architecture], "tie_word_embeddings": self.is_tied}
        self.config = text
        if self.kind == "nld":
            text |= {"mask_token_id": 5, "block_size": 16, "dlm_loss_weight": 0.7}
        if self.kind.startswith("mistral3"):
            del text["architectures"]
            # The top level says the opposite: only text_config counts.
            self.config = {
                "architectures": [architecture],
                "text_config": text,
                "tie_word_embeddings": not self.is_tied,
            }
            vision = "model." if self.kind == "mistral3 modules" else ""
            self.tensors[f"{vision}vision_tower.ln_pre.weight"] = torch.ones(3)
            self.tensors[f"{vision}multi_modal_projector.norm.weight"] = torch.ones(3)

    def write(self, path: Path) -> Path:
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(self.config))
        names = list(self.tensors)
        if self.num_files == 1:
            save_file(self.tensors, path / "model.safetensors")
            return path
        weight_map = {}
        for number in range(self.num_files):
            file = f"model-{number + 1:05d}-of-{self.num_files:05d}.safetensors"
            part = names[number :: self.num_files]
            save_file({name: self.tensors[name] for name in part}, path / file)
            weight_map |= dict.fromkeys(part, file)
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return path

    def quantise(self, block: list[int] | None) -> dict[str, Tensor]:
        """Turn every projection into FP8 with scales; returns the weights that a reader must see."""
        self.config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": block}
        expected = dict(self.tensors)
        for name, weight in list(self.tensors.items()):
            if not name.endswith("_proj.weight"):
                continue
            rows, columns = block or weight.shape
            scale = torch.rand(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns)) + 0.01
            full = scale.repeat_interleave(rows, 0)[: weight.shape[0]].repeat_interleave(columns, 1)
            full = full[:, : weight.shape[1]]
            eighth = (weight.float() / full).to(torch.float8_e4m3fn)
            expected[name] = (eighth.float() * full).bfloat16()
            self.tensors[name] = eighth
            self.tensors[f"{name}_scale_inv"] = scale if block else scale.reshape(())
            self.tensors[name.replace(".weight", ".activation_scale")] = torch.ones(())
        return expected


def stored(checkpoint: Path) -> dict[str, Tensor]:
    """Every parameter of a Megatron checkpoint."""
    parameters = StoredParameters(checkpoint)
    rules = weight_rules(read_info(checkpoint).model)
    return {rule.megatron: parameters.tensor(rule.megatron, rule.shape) for rule in rules}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype, name
        assert torch.equal(found[name], tensor), name


CASES = [
    *(Folder(kind=kind, is_tied=is_tied) for kind in ARCHITECTURES for is_tied in (False, True)),
    Folder(num_files=3, dtype=torch.float32),
    Folder(kind="mistral3", num_files=2, dtype=torch.float16),
]


@pytest.mark.parametrize(
    "source", CASES, ids=lambda c: f"{c.kind}-tied{c.is_tied}-{c.num_files}-{str(c.dtype).split('.')[1]}"
)
def test_import_export_import_is_bit_exact(source: Folder, tmp_path: Path) -> None:
    notes: list[str] = []
    progress: list[tuple[int, int]] = []
    first = import_checkpoint(
        source.write(tmp_path / "in"),
        tmp_path / "a",
        notify=notes.append,
        progress=lambda done, total: progress.append((done, total)),
    )
    info = read_info(first)
    assert (info.step, info.stage) == (0, "")
    assert info.config == ({"objective": OBJECTIVE} if source.kind == "nld" else {})
    assert info.dtype == str(source.dtype).removeprefix("torch.")
    assert ("2 tensors of the vision tower" in " ".join(notes)) == source.kind.startswith("mistral3")
    assert progress[-1][0] == progress[-1][1] > 0

    form = ARCHITECTURES[source.kind][1]
    head = source.tensors[form["decoder"] + "embed_tokens.weight" if source.is_tied else form["head"]]
    expected = {
        rule.megatron: rule.join(tuple(source.tensors.get(name, head) for name in rule.hf_names(form)))
        for rule in weight_rules(MODEL)
    }
    found = stored(first)
    same(found, expected)

    exported = export_checkpoint(first, tmp_path / "b", notify=notes.append, max_shard_bytes=20_000)
    assert "no run's history" in notes[-1]
    assert "no tokenizer" in notes[-2]
    card = (exported / "README.md").read_text()
    assert "losses: unknown" in card
    assert ("objective: unknown" in card) == (source.kind != "nld")
    config = json.loads((exported / "config.json").read_text())
    assert config["rope_parameters"] == text_config(source.config, tmp_path)["rope_parameters"]
    assert config["block_size"] == (OBJECTIVE["block_size"] if source.kind == "nld" else 32)
    same(stored(import_checkpoint(exported, tmp_path / "c", notify=silent)), found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "in"]


def newest(topology: Topology, platform: Platform, directory: str) -> str:
    """Where a start in this folder goes on, or why it does not."""
    try:
        return str(CheckpointManager(Path(directory), CheckpointConfig()).latest()[0])
    except CheckpointError as error:
        return str(error)


def test_a_start_compares_an_import_with_its_checksums(one_rank: RankPool, tmp_path: Path) -> None:
    source = Folder().write(tmp_path / "in")
    (source / "tokenizer.json").write_text("{}")
    checkpoint = import_checkpoint(source, tmp_path / "checkpoints/step_00000000", notify=silent)
    names = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert "tokenizer/tokenizer.json" in names
    assert set(read_checksums(checkpoint)) == names - {CHECKSUM_FILE}
    assert one_rank.run(newest, str(checkpoint.parent)) == str(checkpoint)
    for name in sorted(names - {CHECKSUM_FILE}):
        good = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        found = one_rank.run(newest, str(checkpoint.parent))
        assert f"{Path(name).name} has another checksum" in found
        (checkpoint / name).write_bytes(good)


def test_vision_language_and_text_form_give_the_same_checkpoint(tmp_path: Path) -> None:
    checkpoints = []
    for number, kind in enumerate(("ministral3", "mistral3", "mistral3 modules", "nld")):
        folder = Folder(kind=kind, is_tied=True).write(tmp_path / f"{number}")
        checkpoints.append(stored(import_checkpoint(folder, tmp_path / f"{number}m", notify=silent)))
    for other in checkpoints[1:]:
        same(other, checkpoints[0])
    assert torch.equal(checkpoints[0]["output_layer.weight"], checkpoints[0]["embedding.word_embeddings.weight"])


def test_import_in_another_dtype(tmp_path: Path) -> None:
    source = Folder(dtype=torch.float32)
    folder = source.write(tmp_path / "in")
    narrow = import_checkpoint(folder, tmp_path / "a", dtype=torch.bfloat16)
    assert read_info(narrow).dtype == "bfloat16"
    assert torch.equal(stored(narrow)["output_layer.weight"], source.tensors["lm_head.weight"].bfloat16())
    source.tensors["model.norm.weight"] = source.tensors["model.norm.weight"].bfloat16()
    mixed = import_checkpoint(source.write(tmp_path / "mixed"), tmp_path / "b")
    assert read_info(mixed).dtype == "float32"  # holds both exactly


@pytest.mark.parametrize("block", [None, [16, 32], [128, 128]], ids=str)
@pytest.mark.parametrize("kind", ["ministral3", "mistral3"])
def test_fp8_is_dequantised(kind: str, block: list[int] | None, tmp_path: Path) -> None:
    source = Folder(kind=kind)
    expected = source.quantise(block)
    notes: list[str] = []
    found = stored(import_checkpoint(source.write(tmp_path / "in"), tmp_path / "out", notify=notes.append))
    form = ARCHITECTURES[kind][1]
    for rule in weight_rules(MODEL):
        whole = rule.join(tuple(expected[name] for name in rule.hf_names(form)))
        assert found[rule.megatron].dtype is torch.bfloat16
        assert torch.equal(found[rule.megatron], whole), rule.megatron
    assert "14 tensors hold FP8 activation scales" in notes[-1]


def load_whole(
    topology: Topology, platform: Platform, parallel: ParallelConfig, checkpoint: str
) -> tuple[dict[str, Tensor], Tensor]:
    """The whole parameters after loading, and the first step's loss terms as a vector, over the global batch."""
    samples = torch.randint(4, 96, (4, 33), generator=torch.Generator().manual_seed(11))
    case = StepCase(samples=samples, model=MODEL_TP, dtype=torch.float32)
    model = build_model(MODEL_TP, parallel, dtype=torch.float32, device=platform.device, seed=99)
    wrapped = wrap_data_parallel(model)
    connect([wrapped], None)
    CheckpointManager(Path(checkpoint).parent, CheckpointConfig()).load(Path(checkpoint), [wrapped], None)
    terms = run_microbatches(
        iter(loader_batches(case, topology)),
        [wrapped],
        StepShape(num_microbatches=4 // topology.data_parallel_size, micro_batch_size=1, num_rows=64),
        objective=case.objective,
        weights=LossWeights(diffusion=case.diffusion_loss_weight),
        device=platform.device,
    )
    parameters = whole_tensors([model], lambda p: p.detach())
    return parameters, reduce_terms(terms).to_vector()


MODEL_TP = tiny_model(hidden_size=50, ffn_hidden_size=70)


@pytest.mark.parametrize(
    ("tensor", "pipeline"),
    [(2, 1), (1, 2), pytest.param(2, 2, marks=pytest.mark.long)],
    ids=["tp2", "pp2", "tp2 x pp2"],
)
def test_an_import_loads_and_starts_from_the_same_loss_at_every_layout(
    one_rank: RankPool, rank_processes: RankProcesses, tmp_path: Path, tensor: int, pipeline: int
) -> None:
    source = Folder(model=MODEL_TP, dtype=torch.float32)
    checkpoint = import_checkpoint(source.write(tmp_path / "in"), tmp_path / "out")
    parameters, expected = one_rank.run(load_whole, ParallelConfig(), str(checkpoint))
    same(parameters, stored(checkpoint))
    parallel = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    pool = RankPool(tensor * pipeline, rank_processes)
    parameters, terms = pool.run(load_whole, parallel, str(checkpoint), parallel=parallel)
    same(parameters, stored(checkpoint))
    torch.testing.assert_close(terms, expected, rtol=1e-5, atol=0)


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size // 2)


def misplace_in_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][NORM] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))


def promise_in_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["odd"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))


def halve_a_shape(folder: Path) -> None:
    """In the header, whose length stays."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"shape":[50]', b'"shape":[49]', 1))


def eighth(scale: Tensor) -> Callable[[dict[str, Tensor]], object]:
    name = "model.layers.0.self_attn.o_proj.weight"
    return lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": scale})


def rename_in_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00002", "model-00007"))


def retensor(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def reconfig(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


NORM = "model.norm.weight"
BAD: dict[str, tuple[int, Callable[[Path], object], str]] = {
    "truncated": (1, truncate, r"model\.safetensors: is not a readable safetensors.*has \d+ bytes, expected \d+"),
    "missing shard": (
        2,
        lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(),
        r"model-00002-of-00002\.safetensors: missing, but named in",
    ),
    "index names a missing file": (2, rename_in_index, r"model-00007-of-00002\.safetensors: missing, but named"),
    "missing tensor": (1, retensor(lambda tensors: tensors.pop(NORM)), r"1 tensors are missing: model\.norm\.weight"),
    "extra tensor": (
        1,
        retensor(lambda tensors: tensors.update(odd=torch.ones(1))),
        "1 tensors are not part of the model.*: odd",
    ),
    "vision in the text form": (
        1,
        retensor(lambda tensors: tensors.update({"vision_tower.x": torch.ones(1)})),
        r"1 tensors are not part of the model.*: vision_tower\.x",
    ),
    "number of another type": (
        1,
        reconfig(hidden_size="50"),
        r"config\.json: hidden_size of the model is '50', expected a",
    ),
    "not a number": (1, reconfig(rms_norm_eps=float("nan")), "rms_norm_eps of the model is nan, expected a number"),
    "no layers": (1, reconfig(num_hidden_layers=0), "num_layers of the model is 0, expected a whole number above 0"),
    "rope is no object": (
        1,
        reconfig(rope_parameters=None),
        r"config\.json: rope_parameters is None, expected an object",
    ),
    "another rope": (1, reconfig(rope_parameters={"rope_type": "llama3"}), "rope_type is 'llama3', expected 'yarn'"),
    "sliding window": (1, reconfig(sliding_window=4096), "sliding_window is 4096, expected null"),
    "index names another file": (2, misplace_in_index, r"model-0000\d-of-00002\.safetensors: .*model\.norm\.weight"),
    "index names an unknown tensor": (2, promise_in_index, r"00001-of-00002\.safetensors: tensor odd is missing, but"),
    "header with a wrong shape": (1, halve_a_shape, r"model\.safetensors: .*has 100 bytes, expected 98"),
    "fp8 scales of another shape": (
        1,
        retensor(eighth(torch.ones(3, 1))),
        r"o_proj\.weight_scale_inv has shape \(3, 1\), expected one scale or \(1, 1\) for blocks of \[128, 128\]",
    ),
    "fp8 scales of another dtype": (
        1,
        retensor(eighth(torch.ones(1, dtype=torch.int32))),
        r"o_proj\.weight_scale_inv is stored as I32, expected F32 or BF16",
    ),
    "wrong shape": (
        1,
        retensor(lambda tensors: tensors.update({NORM: torch.ones(3, dtype=torch.bfloat16)})),
        r"model\.safetensors: tensor model\.norm\.weight has shape \(3,\), expected \(50,\)",
    ),
    "unknown architecture": (1, reconfig(architectures=["LlamaForCausalLM"]), r"config\.json: .*LlamaForCausalLM"),
    "fp8 without scales": (
        1,
        retensor(lambda tensors: tensors.update({NORM: tensors[NORM].to(torch.float8_e4m3fn)})),
        r"model\.norm\.weight is stored as F8_E4M3, but its scales model\.norm\.weight_scale_inv are missing",
    ),
    "another quantisation": (1, reconfig(quantization_config={"quant_method": "awq"}), "quantization_config.*awq"),
    "integers": (1, retensor(lambda tensors: tensors.update({NORM: torch.ones(50, dtype=torch.int32)})), "as I32"),
    "not JSON": (1, lambda folder: (folder / "config.json").write_text("{oh"), r"config\.json: is not readable JSON"),
    "no config": (1, lambda folder: (folder / "config.json").unlink(), r"config\.json: not found"),
    "tied to another head": (1, reconfig(tie_word_embeddings=True), r"lm_head\.weight differs from model\.embed"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_refused_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    num_files, edit, message = BAD[name]
    folder = Folder(num_files=num_files).write(tmp_path / "in")
    edit(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        import_checkpoint(folder, tmp_path / "out")
    assert "remedy" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["model"].update(num_layers="2"), "num_layers of the model is '2'"),
        (lambda raw: raw["model"].update(odd=1), "model is not understood.*odd"),
        (lambda raw: raw["model"].pop("rope"), "model is not understood.*rope"),
        (lambda raw: raw["model"].update(num_key_value_heads=3), r"linear_qkv.weight has shape .*expected"),
        (lambda raw: raw.update(model=[]), "model is .*expected dict"),
        (lambda raw: raw.update(step="3"), "step is '3', expected int"),
        (lambda raw: raw.update(dtype="int8"), "dtype is 'int8', expected one of"),
        (lambda raw: raw.clear(), "format_version is None"),
        (lambda raw: b"\xff\xfe", "cannot be read: 'utf-8'"),
        (lambda raw: b"[1]", "holds a list"),
    ],
    ids=["type", "extra", "no rope", "other heads", "model", "step", "dtype", "empty", "not text", "list"],
)
def test_a_damaged_checkpoint_json_is_refused(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    checkpoint = import_checkpoint(Folder().write(tmp_path / "in"), tmp_path / "a")
    path = checkpoint / "checkpoint.json"
    raw = json.loads(path.read_text())
    content = change(raw)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(raw).encode())
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(checkpoint, tmp_path / "out", notify=silent)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "in"]


HEAD = "output_layer.weight"


def shards(*places: tuple[int, int]) -> Callable[[Any], None]:
    """The head's entry, as if stored in rows [start, end)."""

    def edit(metadata: Any) -> None:
        entry = metadata.state_dict_metadata[HEAD]
        width = entry.size[1]
        entry.chunks = [
            ChunkStorageMetadata(torch.Size([start, 0]), torch.Size([end - start, width])) for start, end in places
        ]

    return edit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shards((0, 54), (0, 53)), f"shards of tensor {HEAD} do not make up its shape"),
        (shards((0, 54), (55, 108)), f"shards of tensor {HEAD} do not make up its shape"),
        (shards((0, 54)), f"shards of tensor {HEAD} do not make up its shape"),
        (shards((0, 54), (54, 107)), r"tensor output_layer.weight is \(107, 50\) .*, expected \(54, 50\)"),
        (lambda metadata: setattr(metadata, "storage_data", None), r"\.metadata: is not readable"),
        (lambda metadata: metadata.state_dict_metadata.pop(HEAD), f"tensor {HEAD} is missing"),
        (
            lambda metadata: delattr(metadata.state_dict_metadata[HEAD], "properties"),
            f"entry of tensor {HEAD} is damaged",
        ),
    ],
    ids=["overlap", "outside", "too few", "stored whole", "no places", "missing", "no properties"],
)
def test_a_damaged_metadata_file_is_refused(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    checkpoint = import_checkpoint(Folder().write(tmp_path / "in"), tmp_path / "a")
    path = checkpoint / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(checkpoint, tmp_path / "out", notify=silent)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "in"]


def test_the_folder_that_a_link_names_is_replaced(tmp_path: Path) -> None:
    folder = Folder().write(tmp_path / "in")
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    for _ in range(2):
        import_checkpoint(folder, tmp_path / "out", overwrite=True)
        assert read_info(tmp_path / "real").step == 0
        assert (tmp_path / "out").is_symlink()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "real"]


def test_two_conversions_to_one_folder_do_not_mix(tmp_path: Path) -> None:
    """The second starts in the middle of the first, which ends in the middle of the second: the first fails."""
    wide, narrow = Folder(dtype=torch.float32).write(tmp_path / "wide"), Folder().write(tmp_path / "narrow")
    out = tmp_path / "out"
    first_is_half, second_is_half = threading.Event(), threading.Event()

    def in_the_middle(reached: threading.Event, wait: Callable[[], object]) -> Callable[[int, int], None]:
        def progress(done: int, total: int) -> None:
            if done > total / 2 and not reached.is_set():
                reached.set()
                wait()

        return progress

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(
            import_checkpoint, wide, out, progress=in_the_middle(first_is_half, lambda: second_is_half.wait(60))
        )
        assert first_is_half.wait(60)
        import_checkpoint(narrow, out, progress=in_the_middle(second_is_half, lambda: first.exception(60)))
        with pytest.raises(CheckpointError, match="cannot be written"):
            first.result()
    same(stored(out), stored(import_checkpoint(narrow, tmp_path / "expected")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "narrow", "out", "wide"]


def test_a_run_with_another_rope_is_refused(tmp_path: Path) -> None:
    with HFFolder(Folder().write(tmp_path / "in")) as source:
        check_same_model(source, MODEL)
        for field_ in fields(RopeConfig):
            rope = replace(MODEL.rope, **{field_.name: getattr(MODEL.rope, field_.name) + 1})
            with pytest.raises(ConfigError, match=rf"model\.rope\.{field_.name}"):
                check_same_model(source, replace(MODEL, rope=rope))


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    folder = Folder().write(tmp_path / "in")
    out = import_checkpoint(folder, tmp_path / "out")
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(CheckpointError, match="exists already"):
        import_checkpoint(folder, out)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        import_checkpoint(folder, folder, overwrite=True)
    import_checkpoint(folder, out, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    folder = Folder().write(tmp_path / "in")
    (folder / "tokenizer.json").write_text("{}")
    checkpoint = import_checkpoint(folder, tmp_path / "a")
    shutil.rmtree(folder)
    exported = export_checkpoint(checkpoint, tmp_path / "b", notify=silent)
    assert (exported / "tokenizer.json").read_text() == "{}"


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_named_and_leaves_nothing(small_disk: Path, tmp_path: Path) -> None:
    folder = Folder().write(tmp_path / "in")
    with pytest.raises(CheckpointError, match="No space left on device"):
        import_checkpoint(folder, small_disk / "out")
    assert not list(small_disk.iterdir())
    checkpoint = import_checkpoint(folder, tmp_path / "a")
    with pytest.raises(CheckpointError, match="No space left on device"):
        export_checkpoint(checkpoint, small_disk / "out", notify=silent)
    assert not list(small_disk.iterdir())


def slow_import(folder: Path, out: Path, is_ready: Event) -> None:
    is_ready.set()
    import_checkpoint(folder, out, progress=lambda done, total: time.sleep(0.02))


def kill_one_conversion(folder: Path, out: Path, delay: float) -> None:
    """kill -9 after ``delay`` seconds of work, then what is there is whole or has no finished name."""
    fork = multiprocessing.get_context("fork")  # a new interpreter would only import, for seconds
    is_ready = fork.Event()
    process = fork.Process(target=slow_import, args=(folder, out, is_ready))
    process.start()
    assert is_ready.wait(120)
    time.sleep(delay)
    process.kill()
    process.join()
    names = {path.name for path in out.parent.iterdir()} - {folder.name}
    assert all(name == out.name or name.startswith(f".incomplete_{out.name}_") for name in names), names
    if out.exists():
        same(stored(out), stored(import_checkpoint(folder, out.parent / "whole")))
        shutil.rmtree(out.parent / "whole")
        shutil.rmtree(out)


@pytest.mark.parametrize("count", [3, pytest.param(20, marks=[pytest.mark.long, pytest.mark.timeout(900)])])
def test_kill_at_a_random_moment(count: int, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    folder = Folder().write(tmp_path / "in")
    for _ in range(count):
        kill_one_conversion(folder, tmp_path / "out", chance.uniform(0.0, 0.5))
    out = import_checkpoint(folder, tmp_path / "out")  # and what a killed one left is no hindrance
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert read_info(out).step == 0


VERIFY = """
import sys
from scripts.convert_checkpoint import main
for folder in sys.argv[2:]:
    print("status", main(["verify", "--checkpoint", sys.argv[1], "--hf", folder]))
"""


def test_verify_says_equal_and_names_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The vision-language form in, the NLD form out, then one number changed."""
    folder = str(Folder(kind="mistral3", is_tied=True).write(tmp_path / "in"))
    checkpoint, exported = str(tmp_path / "ck"), str(tmp_path / "hf")
    assert main(["import", "--hf", folder, "--out", checkpoint]) == 0
    assert "vision tower" in capsys.readouterr().err
    assert main(["export", "--checkpoint", checkpoint, "--out", exported]) == 0
    assert "warning" in capsys.readouterr().err
    name = "encoder.layers.1.self_attn.k_proj.weight"
    changed = Path(shutil.copytree(exported, tmp_path / "changed"))
    tensors = load_file(changed / "model.safetensors")
    tensors[name][3, 4] += 0.25
    save_file(tensors, changed / "model.safetensors")

    # In one process of its own, where the model may be on the CPU.
    done = subprocess.run(
        [sys.executable, "-c", VERIFY, checkpoint, folder, exported, str(changed)],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    of_source, of_export, of_changed, rest = re.split(r"status (?=\d)", done.stdout)
    assert (of_export[0], of_changed[0], rest) == ("0", "0", "1\n")
    assert "random ids" in of_source
    assert "logits" in of_export
    assert "DIFFERENT" not in of_source + of_export
    different = [line for line in of_changed.splitlines() if "DIFFERENT" in line]
    assert len(different) == 4  # the tensor and the three sequences
    assert name in different[0]


def test_verify_at_another_dtype_and_of_fp8(tmp_path: Path) -> None:
    source = Folder(dtype=torch.float32)
    folder = source.write(tmp_path / "in")
    checkpoint = import_checkpoint(folder, tmp_path / "a", dtype=torch.bfloat16)
    assert all(row.is_equal for row in verify_checkpoint(checkpoint, folder, with_logits=False))
    eighth = Folder()
    eighth.quantise([16, 32])
    folder = eighth.write(tmp_path / "fp8")
    checkpoint = import_checkpoint(folder, tmp_path / "b", notify=silent)
    assert all(row.is_equal for row in verify_checkpoint(checkpoint, folder, with_logits=False, notify=silent))
    other = Folder(model=tiny_model()).write(tmp_path / "other")
    with pytest.raises(CheckpointError, match="vocab_size is 107 and 96"):
        verify_checkpoint(checkpoint, other)


def test_inspect_reads_headers_only(tmp_path: Path) -> None:
    folder = Folder(kind="mistral3", is_tied=True, num_files=2).write(tmp_path / "in")
    checkpoint = import_checkpoint(folder, tmp_path / "run" / "checkpoints" / "step_00000000", notify=silent)
    exported = export_checkpoint(checkpoint, tmp_path / "hf", notify=silent)
    facts = inspect_folder(folder)
    assert facts["form"] == "Hugging Face folder, vision-language form (Mistral3)"
    assert (facts["head"], facts["files"]) == ("tied to the embedding", "2")
    facts = inspect_folder(checkpoint)
    assert facts["form"] == "Megatron checkpoint of imported weights"
    numbers = sum(tensor.numel() for tensor in stored(checkpoint).values())
    assert (facts["parameters"], facts["dtype"], facts["step"]) == (f"{numbers:,}", "bfloat16", "0")
    assert facts["tensors"] == f"{len(stored(checkpoint))} parameters"
    assert "without optimizer state" in facts["files"]
    assert inspect_folder(tmp_path / "run")["latest checkpoint"] == str(checkpoint)
    facts = inspect_folder(exported)
    assert (facts["form"], facts["step"]) == ("Hugging Face folder, NLD form", "0")
    for bad, message in ((tmp_path, "holds no"), (tmp_path / "none", "is no folder")):
        with pytest.raises(CheckpointError, match=message):
            inspect_folder(bad)
    (tmp_path / ".incomplete_x").mkdir()
    with pytest.raises(CheckpointError, match="interrupted"):
        inspect_folder(tmp_path / ".incomplete_x")
    program = (
        "import sys; from scripts.convert_checkpoint import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, "inspect", str(exported)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
