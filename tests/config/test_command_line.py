"""``python train.py`` as a user starts it: real processes, real exit statuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]

# Runs train.py's own main and says afterwards whether something heavy was imported.
WATCHED = """
import runpy, sys
sys.path.insert(0, {root!r})
sys.argv = [{train!r}, *sys.argv[1:]]
try:
    runpy.run_path({train!r}, run_name="__main__")
finally:
    print("HEAVY:", sorted({{"torch", "megatron", "numpy", "transformers"}} & set(sys.modules)), file=sys.stderr)
"""

# A training script whose run only writes what it was given.
RECORDER = """
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from nld_train.config.compose import main, save_resolved
from nld_train.errors import ConfigError, DataError, Problem

def run(config):
    if config.run.seed == 13:
        raise DataError("corpus.bin", "is torn", "prepare it again")
    if config.run.seed == 14:
        raise ConfigError([Problem("train.device", "no GPU here", "use train.device=cpu")])
    if config.run.seed == 15:
        raise KeyboardInterrupt
    save_resolved(config, Path(config.run.dir) / "config.yaml")
    print("trained", os.getpid())

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], run))
"""


def launch(cwd: Path, *arguments: str, script: str = WATCHED, **environment: str) -> subprocess.CompletedProcess[str]:
    program = cwd / "program.py"
    program.write_text(script.format(root=str(ROOT), train=str(ROOT / "train.py")))
    clean = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    return subprocess.run(
        [sys.executable, str(program), *arguments],
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def left_behind(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} - {"program.py"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model.hidden_sizes=1"], ["model.hidden_sizes", "=1", "did you mean model.hidden_size?"]),
        (["objective.block_size=0"], ["objective.block_size", "0 is too small", "objective.block_size=1"]),
        (
            ["train.micro_batch_size=3", "train.global_batch_size=4"],
            ["train.micro_batch_size", "3 does not divide train.global_batch_size=4", "train.micro_batch_size=2"],
        ),
        (
            ["parallel.tensor_model_parallel_size=3"],
            ["parallel.tensor_model_parallel_size", "3 does not divide", "=2", "torchrun --nproc-per-node 2"],
        ),
        (["experiment=nld_9b"], ["nld_9b", "experiment=nld_14b, experiment=nld_3b, experiment=nld_8b"]),
        (["experiment=nld_3b"], ["data.corpus", "???", "data.corpus=VALUE"]),
        (["--cfg", "job", "model.hidden_sizes=1"], ["did you mean model.hidden_size?"]),
        (["--help", "model.hidden_sizes=1"], ["did you mean model.hidden_size?"]),
        (["--multirun", "objective.block_size=8,0", "run.sed=1"], ["0 is too small", "did you mean run.seed?"]),
        (["--config-dir", "nowhere"], ["--config-dir", "nowhere is not a folder"]),
    ],
    ids=lambda item: " ".join(item[:2]) if item and item[0] else "",
)
def test_a_refusal_is_quick_and_clear(arguments: list[str], words: list[str], tmp_path: Path):
    result = launch(tmp_path, *arguments)
    assert result.returncode == 2, result.stderr
    for word in ("remedy:", *words):
        assert word in result.stderr
    assert "Traceback" not in result.stderr
    assert "HEAVY: []" in result.stderr
    assert result.stdout == ""
    assert left_behind(tmp_path) == set()


def test_only_rank_zero_speaks(tmp_path: Path):
    first = launch(tmp_path, "objective.block_size=0", RANK="0", WORLD_SIZE="2")
    second = launch(tmp_path, "objective.block_size=0", RANK="1", WORLD_SIZE="2")
    assert first.returncode == second.returncode == 2
    assert "objective.block_size" in first.stderr
    assert "objective.block_size" not in second.stderr


def test_cfg_job_prints_the_recipe_anywhere(tmp_path: Path):
    result = launch(tmp_path, "experiment=nld_8b", "--cfg", "job", "--resolve")
    assert result.returncode == 0, result.stderr
    assert "HEAVY: []" in result.stderr
    printed = yaml.safe_load(result.stdout)
    assert printed["model"]["num_layers"] == 34
    assert printed["parallel"]["tensor_model_parallel_size"] == 4
    assert printed["data"]["corpus"] == "???"
    assert (printed["train"]["global_batch_size"], printed["data"]["sequence_length"]) == (512, 4096)
    assert [stage["tokens"] for stage in printed["stages"].values()] == [10**12, 3 * 10**11]
    assert [stage["diffusion_loss_weight"] for stage in printed["stages"].values()] == [0.0, 0.3]
    assert (printed["stages"]["joint"]["lr"], printed["stages"]["joint"]["min_lr"]) == (1e-5, 3e-6)
    assert left_behind(tmp_path) == set()


def test_help_shows_groups_keys_and_examples(tmp_path: Path):
    result = launch(tmp_path, "--help")
    assert result.returncode == 0, result.stderr
    for line in ("experiment: nld_14b, nld_3b, nld_8b, small, tiny", "objective: default, megatron_bridge, nld_recipe"):
        assert line in result.stdout
    for text in (
        "objective.block_size=32",
        "stages.joint.tokens=",
        "alpha of the joint stages",
        "auto|dense|native|chunked|flex",
        "init.hf_path=null",
        "python train.py experiment=nld_8b --cfg job",
    ):
        assert text in result.stdout
    # Whoever asks for help may have a bad value on the line.
    assert launch(tmp_path, "--help", "objective.block_size=0").returncode == 0
    assert "objective.block_size=32" in launch(tmp_path, "--help", "experiment=nld_8b").stdout.partition("Keys")[2]


def test_a_run_gets_the_typed_configuration_and_hydra_leaves_nothing(tmp_path: Path):
    result = launch(tmp_path, "run.dir=out", "stages.joint.tokens=77", script=RECORDER)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("trained")
    assert left_behind(tmp_path) == {"out"}
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == {"config.yaml"}
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["stages"]["joint"]["tokens"] == 77


@pytest.mark.parametrize(
    ("seed", "status", "words"),
    [(13, 1, "corpus.bin: is torn"), (14, 2, "train.device: no GPU here"), (15, 130, "continues from the last")],
)
def test_errors_of_a_run_are_text_and_a_status(seed: int, status: int, words: str, tmp_path: Path):
    result = launch(tmp_path, f"run.seed={seed}", script=RECORDER)
    assert result.returncode == status
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    on_rank_1 = launch(tmp_path, f"run.seed={seed}", script=RECORDER, RANK="1", WORLD_SIZE="2")
    assert on_rank_1.returncode == status
    assert words in on_rank_1.stderr
    assert ("[rank 1]" in on_rank_1.stderr) == (seed != 15)


def test_a_sweep_runs_each_job_in_its_own_process_and_folder(tmp_path: Path):
    result = launch(tmp_path, "--multirun", "objective.block_size=8,16", "run.dir=sweep", script=RECORDER)
    assert result.returncode == 0, result.stderr
    pids = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("trained")]
    assert len(set(pids)) == 2
    assert left_behind(tmp_path) == {"sweep"}
    configs = {path.parent.name: yaml.safe_load(path.read_text()) for path in tmp_path.glob("sweep/*/config.yaml")}
    assert {name: config["objective"]["block_size"] for name, config in configs.items()} == {
        "objective.block_size=8": 8,
        "objective.block_size=16": 16,
    }


def test_a_failed_job_does_not_stop_the_sweep(tmp_path: Path):
    result = launch(tmp_path, "--multirun", "run.seed=13,1", "run.dir=sweep", script=RECORDER)
    assert result.returncode == 1
    assert "corpus.bin: is torn" in result.stderr
    assert "failed: sweep/run.seed=13 (exit status 1)" in result.stderr
    assert (tmp_path / "sweep" / "run.seed=1" / "config.yaml").is_file()


def test_a_sweep_is_not_for_many_ranks(tmp_path: Path):
    result = launch(tmp_path, "--multirun", "run.seed=1,2", WORLD_SIZE="2", RANK="0")
    assert result.returncode == 2
    assert "--multirun: cannot be used with 2 launched ranks" in result.stderr


def test_a_users_folder_of_configurations(tmp_path: Path):
    folder = tmp_path / "mine" / "model"
    folder.mkdir(parents=True)
    (folder / "nano.yaml").write_text(
        "num_layers: 1\nhidden_size: 8\nffn_hidden_size: 16\nnum_attention_heads: 2\nnum_key_value_heads: 2\n"
        "head_dim: 4\nvocab_size: 300\n"
    )
    result = launch(tmp_path, "--config-dir", "mine", "model=nano", "run.dir=out", script=RECORDER)
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["model"]["num_layers"] == 1


def test_a_broken_launcher_is_named(tmp_path: Path):
    result = launch(tmp_path, WORLD_SIZE="two")
    assert result.returncode == 2
    assert "environment variable WORLD_SIZE: 'two' is not a number" in result.stderr
