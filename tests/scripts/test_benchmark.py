"""The benchmark's harness: wrong results are not timed, ratios and files say what was measured."""

import mmap
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nld_train.errors import DataError
from nld_train.testing.benchmarks.comparison import Comparison, Row, cpu_seconds, run_comparison, seconds
from nld_train.testing.benchmarks.conversion import anonymous_bytes
from nld_train.testing.benchmarks.results import machine, performance_page, read_results, store_results, stored_file
from nld_train.testing.jobs import ROOT, importing_project

SCRIPT = ROOT / "scripts" / "benchmark.py"


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


def test_results_in_one_buffer_are_compared_before_they_are_written_over():
    buffer = torch.ones(3)
    comparison = Comparison(
        title="shared",
        variants={"right": lambda: [buffer.fill_(1.0)], "wrong": lambda: [buffer.fill_(2.0)]},
        tolerance=1e-2,
        measure=scripted_measure({}),
    )
    with pytest.raises(RuntimeError, match="shared: result 0 of 'wrong'"):
        run_comparison("s", comparison, rounds=1, warmup=0)


def test_cpu_time_does_not_count_waiting():
    def work() -> list[torch.Tensor]:
        time.sleep(0.2)
        return []

    assert seconds(work) >= 0.2
    assert cpu_seconds(work) < 0.1


def row(title: str, ratio: float, *, variant: str = "a", required: float | None = None) -> Row:
    return Row(
        suite="s", title=title, variant=variant, unit="ms", median=2.0, quartiles=(1.0, 3.0), ratio=ratio,
        ratio_quartiles=(ratio, ratio), required=required, rounds=3, modelled=None,
    )  # fmt: skip


def test_results_are_stored_with_the_machine_and_replaced_by_title(tmp_path: Path):
    path, today = tmp_path / "new" / "result.json", machine(False)
    store_results(path, today, [row("first", 1.0), row("first", 2.0, variant="b")])
    store_results(path, today, [row("second", 3.0)])
    (stored,) = read_results(path)
    assert stored.machine == today
    assert stored.machine["torch"] == torch.__version__
    assert stored.rows == [row("first", 1.0), row("first", 2.0, variant="b"), row("second", 3.0)]
    later = {**today, "date": "later"}
    store_results(path, later, [row("first", 4.0)])
    old, new = read_results(path)
    assert (old.machine, old.rows) == (today, [row("second", 3.0)])
    assert (new.machine, new.rows) == (later, [row("first", 4.0)])
    store_results(path, later, [row("second", 5.0)])
    assert [item.machine["date"] for item in read_results(path)] == ["later"]
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    "content", ["{", '{"rows": []}', '{"measurements": [{"machine": {}, "rows": [{"suite": 1}]}]}']
)
def test_a_file_of_something_else_is_named(tmp_path: Path, content: str):
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"result\.json: no results of the benchmark"):
        read_results(path)


def test_each_kind_of_gpu_has_a_file_of_its_own():
    assert stored_file("step", {}).name == "step.json"
    assert stored_file("step", {"gpu": "NVIDIA H100 80GB HBM3"}).name == "step-nvidia-h100-80gb-hbm3.json"


def test_the_page_says_what_is_missed_and_where_it_was_measured(tmp_path: Path):
    description = {**machine(False), "commit": "abc1234", "gpu": "H200", "cuda": "13.0"}
    store_results(tmp_path / "s.json", description, [row("t", 1.0), row("t", 1.5, variant="b", required=1.6)])
    (tmp_path / "by_hand.md").write_text("## By hand\n\n42\n")
    page = performance_page(tmp_path, {"s": "What s is.", "other": "What other is."})
    assert "Of 1 ratios that are asked for, 0 are reached" in page
    assert "- s: t: b 1.50 for 1.60\n" in page
    assert "*H200, CUDA 13.0; " in page
    assert "commit abc1234; 3 rounds.*" in page
    assert "|  | b | 2.00 ms [1.00, 3.00] | 1.50 [1.50, 1.50] | 1.60: **missed** |" in page
    assert page.index("What s is.") < page.index("What other is.") < page.index("Not measured yet.") < page.index("42")
    with pytest.raises(DataError, match="results of a suite 's'"):
        performance_page(tmp_path, {"other": ""})


def test_the_pages_are_what_the_stored_results_give(benchmark: dict[str, Any]):
    for path, text in benchmark["pages"]().items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run scripts/benchmark.py --write-docs"


def test_single_comparisons_are_measured_again(
    benchmark: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def suite(_device: torch.device) -> Any:
        for title in ("joint, bf16", "AR, bf16"):
            yield Comparison(title=title, variants={"a": lambda: [torch.ones(1)]}, tolerance=0.0)

    monkeypatch.setitem(benchmark["SUITES"], "fake", suite)
    arguments = ["fake", "--rounds", "1", "--json", str(tmp_path / "r.json"), "--device", "cpu"]
    assert benchmark["main"](arguments) == 0
    (before,) = read_results(tmp_path / "r.json")
    assert benchmark["main"]([*arguments, "--only", "^AR"]) == 0
    rows = [stored for item in read_results(tmp_path / "r.json") for stored in item.rows]
    assert [stored.title for stored in rows] == ["joint, bf16", "AR, bf16"]
    assert rows[0] == before.rows[0]
    assert rows[1] != before.rows[1]
    assert [stored.unit for stored in rows] == ["ms", "ms"]
    assert benchmark["main"]([*arguments, "--only", "^AR", "--cpu-time"]) == 0
    assert [stored.unit for item in read_results(tmp_path / "r.json") for stored in item.rows] == ["ms", "CPU ms"]
    capsys.readouterr()
    assert benchmark["main"]([*arguments, "--only", "diffusion"]) == 2
    assert "--only diffusion: it is found in none of\n  joint, bf16\n  AR, bf16" in capsys.readouterr().err


def test_unknown_suites_are_refused_by_name(benchmark: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_info:
        benchmark["main"](["atention"])
    assert exit_info.value.code == 2
    assert "no suite 'atention': choose of step, memory" in capsys.readouterr().err


@pytest.mark.benchmark
def test_chunked_attention_is_faster_than_dense_as_required(tmp_path: Path):
    command = [sys.executable, str(SCRIPT), "attention", "--device", "cpu", "--check", "--json", tmp_path / "a.json"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=importing_project(), check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.benchmark
@pytest.mark.timeout(900)
def test_conversion_is_half_as_fast_as_copying_and_small_in_memory(tmp_path: Path):
    command = [sys.executable, str(SCRIPT), "convert", "--check", "--rounds", "3", "--json", tmp_path / "a.json"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=importing_project(), check=False)
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
    finished = subprocess.run(
        [sys.executable, str(script)], cwd=ROOT, env=importing_project(),
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert "hold other tensors" in finished.stdout
