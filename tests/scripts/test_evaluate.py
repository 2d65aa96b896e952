"""``scripts/evaluate.py``: all suites from a folder to tables, JSON and pictures; training checkpoints; refusals."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from nld_train.data.corpora import CorpusText, Document
from nld_train.data.prepare import prepare_text
from nld_train.data.prepared import TRAIN, VALIDATION
from nld_train.errors import DataError
from nld_train.evaluation import suites
from nld_train.evaluation.prompts import CATEGORIES
from nld_train.evaluation.tables import from_json, tables_of
from nld_train.testing.exports import make_model, quiet_and_single_threaded, write_export, write_tokenizer
from scripts.evaluate import parse_arguments

__all__ = ["make_model", "quiet_and_single_threaded", "write_export"]

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "evaluate.py"
SMALL = [
    "--num-prompts",
    "1",
    "--max-new-tokens",
    "6",
    "--block-sizes",
    "2",
    "4",
    "--blocks",
    "1",
    "--max-length",
    "24",
]


@pytest.fixture
def export(make_model, write_export, tmp_path):
    folder = write_export(make_model(vocab_size=264), tmp_path / "model" / "hf")
    write_tokenizer(folder)
    return folder


@pytest.fixture
def run_script(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return stopped.value.code, *capsys.readouterr()

    return run


def test_all_suites(export, run_script, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Half a page of text, which is long enough for a window or two of it.\n" * 2)
    code, out, err = run_script("--model", export, "--suite", "all", "--text", text, *SMALL)
    assert code == 0, err
    folder = export.parent / "evaluation"  # beside the model
    assert sorted(path.name for path in folder.iterdir()) == [
        "acceptance.png",
        "decoding.json",
        "likelihood.json",
        "likelihood.png",
        "speed_of_light.json",
        "speed_of_light.png",
        "threshold_curves.png",
    ]
    for picture in folder.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size > 10_000
    likelihood = json.loads((folder / "likelihood.json").read_text())
    # Of one document there is no spread: what is not finite is null in the file, and nan in the table of the report.
    assert likelihood["result"]["ar"]["error_over_texts"] is None
    assert "NaN" not in (folder / "likelihood.json").read_text()
    assert tables_of("likelihood", from_json(likelihood["result"]))[0].markdown() in out
    assert likelihood["model"] == str(export)
    assert likelihood["settings"]["max_length"] == 24
    assert likelihood["result"]["num_tokens"] == 23
    assert f"| AR | {likelihood['result']['ar']['nats_per_token']:.4f} |" in out
    assert [part["block_size"] for part in likelihood["result"]["diffusion"]] == [2, 4]
    rows = json.loads((folder / "decoding.json").read_text())["result"]
    assert {row["category"] for row in rows} == {"all", "coding", "math", "prose", "chat"}
    assert {row["mode"] for row in rows} == {"ar", "diffusion", "linear", "quadratic"}
    assert all(row["equals_ar"] == 1.0 for row in rows if row["mode"] in ("linear", "quadratic"))
    assert "| all (4) | quadratic |" in out
    limits = json.loads((folder / "speed_of_light.json").read_text())["result"]
    assert [row["block_length"] for row in limits] == [2] * 4 + [4] * 4
    assert "| 4 | compaction |" in out


def test_a_training_checkpoint_gives_what_its_export_gives(make_model, write_export, run_script, tmp_path):
    from nld_train.checkpoint.convert import import_checkpoint

    export = write_export(make_model(vocab_size=264), tmp_path / "hf")
    write_tokenizer(export)
    checkpoint = import_checkpoint(export, tmp_path / "checkpoints" / "step_00000000", notify=lambda text: None)
    (tmp_path / "text.txt").write_text("Some words to be scored.")
    results = []
    for number, model in enumerate((export, checkpoint)):
        out = tmp_path / f"out{number}"
        code, _, err = run_script(
            "--model", model, "--suite", "likelihood", "--text", tmp_path / "text.txt", "--block-sizes", "4",
            "--tokenizer", export, "--out", out,
        )  # fmt: skip
        assert code == 0, err
        results.append(json.loads((out / "likelihood.json").read_text())["result"])
    assert results[0]["ar"]["nats_per_token"] == results[1]["ar"]["nats_per_token"]
    assert results[0]["diffusion"][0]["nats_per_token"] == results[1]["diffusion"][0]["nats_per_token"]


def test_held_out_documents(export, tmp_path, monkeypatch):
    """They are the validation part's alone: prompts are the beginnings of those that are long enough."""
    texts = [f"Document {number}, which goes on for a while: " + "so it does, " * (number % 5) for number in range(60)]
    documents = tuple(Document(name=str(number), text=text) for number, text in enumerate(texts))
    corpus = prepare_text(
        CorpusText(name="numbers", source="made up", documents=documents, num_skipped=0),
        vocab_size=300,
        validation_fraction=0.3,
        cache_dir=tmp_path,
    )
    own = AutoTokenizer.from_pretrained(corpus.tokenizer_folder)
    parts = {
        part: [own.decode(ids.get(index).tolist(), skip_special_tokens=True) for index in range(len(ids))]
        for part in (TRAIN, VALIDATION)
        for ids in [corpus.documents(part)]
    }
    assert sorted(parts[TRAIN] + parts[VALIDATION]) == sorted(texts)
    settings = suites.Settings(corpora=[corpus.folder], num_prompts=1, num_held_out=3, num_texts=4)
    prompts = suites._prompts(AutoTokenizer.from_pretrained(export), settings, None)
    assert [prompt.category for prompt in prompts] == [*CATEGORIES, *[f"held-out {corpus.folder.name}"] * 3]
    long = [text for text in parts[VALIDATION] if len(text) > 64]  # one token for each byte
    assert [prompt.text for prompt in prompts[4:]] == [text[:64] for text in long[:3]]
    assert all(len(prompt.token_ids) == 64 for prompt in prompts[4:])
    assert len(suites._prompts(AutoTokenizer.from_pretrained(export), replace(settings, num_held_out=0), None)) == 4
    assert suites._documents(settings, None) == parts[VALIDATION][:4]
    monkeypatch.setattr(suites, "HELD_OUT_TOKENS", 1000)
    with pytest.raises(DataError, match="no held-out document is longer than 1000 tokens"):
        suites._prompts(own, settings, None)


@pytest.mark.parametrize(
    ("option", "value", "least"),
    [
        ("--documents", 0, 1),
        ("--windows", -1, 0),
        ("--max-length", 1, 2),
        ("--sweeps", 1, 2),
        ("--num-prompts", 0, 1),
        ("--held-out", -1, 0),
        ("--max-new-tokens", 0, 1),
        ("--block-length", 0, 1),
        ("--blocks", 0, 1),
        ("--budget", 0, 1),
        ("--limit", 0, 1),
        ("--block-sizes", 0, 1),
    ],
)
def test_numbers_that_are_too_small(capsys, option, value, least):
    required = ["--model", "m", "--suite", "decoding"]
    with pytest.raises(SystemExit) as stopped:
        parse_arguments([*required, option, str(value)])
    assert stopped.value.code == 2
    assert f"argument {option}: {value}; it must be at least {least}" in capsys.readouterr().err
    parse_arguments([*required, option, str(least)])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "{folder}/none", "--suite", "decoding"], 1, "is not a folder"),
        (["--model", "{export}", "--suite", "likelihood"], 1, "does not lie in the folder of a run"),
        (
            ["--model", "{export}", "--suite", "likelihood", "--text", "{folder}/none.txt"],
            1,
            "none.txt: cannot be read",
        ),
        (["--model", "{export}", "--suite", "decoding", "--thresholds", "1.5"], 1, "threshold: 1.5"),
        (["--model", "{export}", "--suite", "decoding", "--prompts", "{folder}/p.jsonl"], 1, "p.jsonl: is not a file"),
        (["--model", "{export}", "--suite", "decoding", "--held-out", "2"], 1, "--held-out: no corpus is named"),
        (
            ["--model", "{export}", "--suite", "decoding", "--out", "{export}/config.json/out"],
            1,
            "config.json/out cannot be a folder",
        ),
        (["--model", "{export}", "--suite", "decoding", "--eos", "x"], 2, "--eos: 'x'"),
        (["--model", "{export}", "--suite", "decoding", "--device", "abacus"], 1, "--device: 'abacus'"),
    ],
)
def test_refusals(export, run_script, tmp_path, arguments, code, message):
    found, _, err = run_script(*(argument.format(export=export, folder=tmp_path) for argument in arguments))
    assert found == code
    assert message in err
    assert not list(export.parent.glob("evaluation/*"))
