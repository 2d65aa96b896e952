"""From an exported folder to text: loading, the four modes on one prompt, the script, folders that are no export."""

import json
import re
import runpy
import subprocess
import sys

import pytest
import torch

from nld_train.errors import CheckpointError
from nld_train.evaluation.decoding import DecodingMode, continue_prompt, format_continuation, load_export
from nld_train.testing.exports import write_tokenizer
from nld_train.testing.jobs import ROOT, importing_project

SCRIPT = ROOT / "scripts" / "generate.py"
PROMPT = "def main"


@pytest.fixture
def export(make_model, write_export, tmp_path):
    folder = write_export(make_model(vocab_size=264, mask_token_id=5), tmp_path / "hf")
    write_tokenizer(folder)
    return folder


def test_continue_prompt_in_every_mode(export):
    model, tokenizer = load_export(export)
    results = {mode: continue_prompt(model, tokenizer, PROMPT, mode, max_new_tokens=24) for mode in DecodingMode}
    assert results["linear"]["token_ids"] == results["quadratic"]["token_ids"] == results["ar"]["token_ids"]
    prompt_ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    expected, num_forwards = model.generate(prompt_ids, max_new_tokens=24)
    assert results["diffusion"]["token_ids"] == expected[0, len(PROMPT) :].tolist()
    assert results["diffusion"]["num_forwards"] == num_forwards
    for mode, result in results.items():
        assert result["mode"] == mode
        assert result["num_tokens"] == len(result["token_ids"]) == 24
        assert result["tokens_per_forward"] == 24 / result["num_forwards"]
        assert result["text"] == tokenizer.decode(result["token_ids"])
        text = format_continuation(result)
        assert text.startswith(f"[{mode}] 24 tokens, {result['num_forwards']} forwards, ")
        assert text.endswith(PROMPT + result["text"])
    with pytest.raises(ValueError, match="prompt: ''"):
        continue_prompt(model, tokenizer, "", "ar")
    with pytest.raises(ValueError, match="cubic"):
        continue_prompt(model, tokenizer, PROMPT, "cubic")


def test_load_export_dtype(export):
    model, _ = load_export(export, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert load_export(export)[0].dtype == torch.float32  # as stored
    assert not model.training


def test_a_changed_modeling_file_is_loaded_anew(export):
    before, _ = load_export(export)
    code_file = export / "modeling_nemotron_labs_diffusion.py"
    code_file.write_text(code_file.read_text() + "\n\nNemotronLabsDiffusionModel.revision = 7\n")
    after, _ = load_export(export)
    assert not hasattr(before, "revision")
    assert after.revision == 7


def drop_tensor(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["diffusion_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncate_weights(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def set_field(key, value):
    def change(folder):
        fields = json.loads((folder / "config.json").read_text())
        fields[key] = value
        (folder / "config.json").write_text(json.dumps(fields))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not JSON"),
        (set_field("model_type", "ministral3"), "model_type is 'ministral3'"),
        (set_field("auto_map", {}), "auto_map names no AutoConfig"),
        (lambda folder: (folder / "modeling_nemotron_labs_diffusion.py").unlink(), "modeling.*missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded.*model.safetensors"),
        (truncate_weights, "cannot be loaded"),
        (drop_tensor, "1 tensors are missing: diffusion_head.weight"),
        (set_field("hidden_size", 16), "cannot be loaded|mismatched"),
        (set_field("block_size", 0), "block_size: 0"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer cannot be loaded"),
    ],
)
def test_a_folder_that_is_no_export_is_refused(export, damage, message):
    damage(export)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_export(export)
    assert str(export) in str(caught.value)
    assert "remedy: " in str(caught.value)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_export(tmp_path / "nothing")


def test_script(export):
    command = [sys.executable, str(SCRIPT), "--model", str(export), "--prompt", PROMPT, "--max-new-tokens", "12"]
    done = subprocess.run(command, capture_output=True, text=True, env=importing_project(), check=False)
    assert done.returncode == 0, done.stderr
    heads = re.findall(
        r"^\[(\w+)\] 12 tokens, (\d+) forwards, ([\d.]+) tokens per forward\ndef main", done.stdout, re.M
    )
    assert [mode for mode, _, _ in heads] == ["ar", "diffusion", "linear", "quadratic"]
    for _, num_forwards, rate in heads:
        assert float(rate) == pytest.approx(12 / int(num_forwards), abs=0.005)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "{folder}"], "has no config.json"),
        (["--model", "{export}", "--threshold", "2"], "threshold: 2.0"),
        (["--model", "{export}", "--eos", "9999"], "eos_token_id: 9999"),
        (["--model", "{export}", "--prompt", ""], "prompt: ''"),
    ],
)
def test_script_refuses(export, monkeypatch, capsys, arguments, message):
    places = {"folder": export.parent, "export": export}
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--prompt", PROMPT, *(a.format(**places) for a in arguments)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err


def test_script_stops_at_the_tokenizers_eos(export, monkeypatch, capsys):
    model, tokenizer = load_export(export)
    eos = continue_prompt(model, tokenizer, PROMPT, "ar", max_new_tokens=5)["token_ids"][2]
    fields = json.loads((export / "tokenizer_config.json").read_text())
    fields["eos_token"] = tokenizer.convert_ids_to_tokens(eos)
    (export / "tokenizer_config.json").write_text(json.dumps(fields))
    for choice in ("auto", str(eos)):
        arguments = ["--model", str(export), "--prompt", PROMPT, "--mode", "ar", "--eos", choice]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert stopped.value.code == 0
        assert capsys.readouterr().out.startswith("[ar] 3 tokens, 3 forwards, 1.00 tokens per forward\n")
