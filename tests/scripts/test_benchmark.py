"""The benchmark's harness: wrong results are not timed, ratios and files say what was measured."""

import json
import mmap
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nld_train.testing.benchmarks.comparison import Comparison, machine, run_comparison, write_json
from nld_train.testing.benchmarks.conversion import anonymous_bytes

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"


@pytest.fixture(scope="module")
def benchmark() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def scripted_measure(costs: dict[Any, list[float]]) -> Any:
    """Stands in for the clock: each call returns the next cost of the work it is given."""
    remaining = {work: iter(values) for work, values in costs.items()}
    return lambda work: next(remaining[work])


def test_rows_hold_medians_and_the_ratio_to_the_first_variant():
    def slow() -> list[torch.Tensor]:
        return [torch.ones(3)]

    def fast() -> list[torch.Tensor]:
        return [torch.ones(3) * (1 + 1e-7)]

    comparison = Comparison(
        title="t",
        variants={"slow": slow, "fast": fast},
        tolerance=1e-6,
        required={"fast": 2.5},
        measure=scripted_measure({slow: [99, 4, 6, 8], fast: [99, 2, 2, 2]}),
        unit_scale=1000,
    )
    base, row = run_comparison("s", comparison, rounds=3, warmup=1)
    assert (base.median, base.quartiles, base.ratio, base.passed) == (6000, (5000, 7000), 1.0, True)
    assert (row.median, row.ratio, row.ratio_quartiles, row.passed) == (2000, 3.0, (2.5, 3.5), True)
    row.required = 3.1
    assert not row.passed


@pytest.mark.parametrize("wrong", [1.1, float("nan")])
def test_a_variant_with_another_result_is_not_timed(wrong: float):
    comparison = Comparison(
        title="joint",
        variants={"right": lambda: [torch.ones(3)], "wrong": lambda: [torch.ones(3) * wrong]},
        tolerance=1e-2,
        measure=scripted_measure({}),
    )
    with pytest.raises(RuntimeError, match="joint: result 0 of 'wrong'"):
        run_comparison("s", comparison, rounds=1, warmup=0)


def test_results_are_stored_with_the_machine(tmp_path: Path):
    comparison = Comparison(title="t", variants={"a": lambda: [torch.ones(1)]}, tolerance=0.0)
    rows = run_comparison("s", comparison, rounds=2, warmup=0)
    path = tmp_path / "new" / "result.json"
    write_json(path, machine(False), rows)
    stored = json.loads(path.read_text())
    assert stored["machine"]["torch"] == torch.__version__
    assert [(row["variant"], row["ratio"], row["rounds"]) for row in stored["rows"]] == [("a", 1.0, 2)]
    assert stored["rows"][0]["median"] > 0
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def test_unknown_suites_are_refused_by_name(benchmark: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_info:
        benchmark["main"](["atention"])
    assert exit_info.value.code == 2
    assert "no suite 'atention': choose of attention" in capsys.readouterr().err


@pytest.mark.benchmark
def test_chunked_attention_is_faster_than_dense_as_required(tmp_path: Path):
    command = [sys.executable, str(SCRIPT), "attention", "--device", "cpu", "--check", "--json", tmp_path / "a.json"]
    root = SCRIPT.parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    finished = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.benchmark
@pytest.mark.timeout(900)
def test_conversion_is_half_as_fast_as_copying_and_small_in_memory(tmp_path: Path):
    command = [sys.executable, str(SCRIPT), "convert", "--check", "--rounds", "3", "--json", tmp_path / "a.json"]
    root = SCRIPT.parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    finished = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "peak anonymous memory" in finished.stdout


def test_anonymous_memory_of_a_process_is_read():
    before = anonymous_bytes(os.getpid())
    # Not from the heap, which may have that much to spare.
    with mmap.mmap(-1, 50_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        block.write(b"x" * 50_000_000)
        assert anonymous_bytes(os.getpid()) - before > 40_000_000
    assert anonymous_bytes(2**30) == 0


@pytest.mark.long
def test_a_conversion_runs_in_a_process_of_its_own_and_its_result_is_checked(tmp_path: Path):
    """Through an ordinary import: the child process imports the module again."""
    program = f"""
import sys
from nld_train.testing.benchmarks import conversion as benchmark
from pathlib import Path
from nld_train.config.schema import ModelConfig
if __name__ == "__main__":
    folder = Path({str(tmp_path)!r})
    shape = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=4, vocab_size=128)
    for name in ("hf", "other"):
        benchmark.write_random_folder(
            folder / name, ModelConfig(num_layers=1 + (name == "other"), hidden_size=8, ffn_hidden_size=8, **shape)
        )
    works = [
        benchmark.Conversion(benchmark.import_folder, folder / "hf", folder / "checkpoint"),
        benchmark.Conversion(benchmark.export_folder, folder / "checkpoint", folder / "out", original=folder / "hf"),
    ]
    for work in works:
        work()
        assert work.seconds > 0 and work.peak_bytes > 1e6
    try:
        benchmark.Conversion(benchmark.copy_files, folder / "hf", folder / "out", original=folder / "other")()
    except RuntimeError as error:
        print(error)
"""
    script = tmp_path / "program.py"
    script.write_text(program)
    root = SCRIPT.parents[1]
    finished = subprocess.run(
        [sys.executable, str(script)], cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert "hold other tensors" in finished.stdout
