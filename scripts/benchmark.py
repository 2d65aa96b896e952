"""Measure how fast one thing is against another: python scripts/benchmark.py [SUITE ...] [--help].

Every row is a ratio between variants of the same computation, run in turn in the same process, so that whatever else
the machine does touches all of them. Before anything is timed, every variant must give the baseline's result.

It wants a quiet machine. OMP_WAIT_POLICY=passive is the default here, because threads that spin at the end of each
parallel region wait for threads that other processes keep from running, which punishes code with many small regions:
one busy neighbour on two cores turned a ratio of 2.8 into 0.4. On an idle machine spinning (OMP_WAIT_POLICY=active) is
some 5 to 15% faster.

A suite is a function that yields comparisons; add it to SUITES.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import resources
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads OpenMP

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from nld_train.checkpoint.checksums import read_checksums
from nld_train.checkpoint.manager import CheckpointInfo, CheckpointManager
from nld_train.config.schema import (
    AttentionBackend,
    CheckpointConfig,
    Device,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    ParallelConfig,
    RopeConfig,
    Sampler,
    Stratify,
)
from nld_train.data.corpora import CORPORA
from nld_train.data.encoding import TextEncoder
from nld_train.data.loader import LoaderBatch
from nld_train.data.tokenizer import convert_tekken, load_tokenizer
from nld_train.model.attention import joint_attention, resolve_backend
from nld_train.model.build import build_model
from nld_train.objective.noise import Corruption, corrupt
from nld_train.objective.sequence import SequenceLayout, build_joint_batch
from nld_train.platform.cpu import keep_freed_memory
from nld_train.platform.device import initialize_device
from nld_train.platform.topology import topology_of
from nld_train.training.optimizer import build_optimizer, set_hyperparameters
from nld_train.training.run import connect, wrap_data_parallel
from nld_train.training.step import LossWeights, StepShape, lay_out, noise_spec, run_microbatches

Work = Callable[[], Sequence[Tensor]]
"""Does the computation once and returns its results (values and gradients)."""


# --------------------------------------------------------------------------------------------------------- the harness


def seconds(work: Work) -> float:
    """Wall time of one run, finished on the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@dataclass(slots=True, kw_only=True)
class Comparison:
    """Variants of one computation.

    Args:
        title: what is computed, at which shape and in which dtype.
        variants: name -> work; the first is the baseline.
        tolerance: largest relative distance, per returned tensor, from the baseline's result.
        required: variant -> smallest acceptable ratio to the baseline; others are only reported.
        measure: the quantity, smaller is better.
        unit: of the printed quantity.
        unit_scale: factor from what ``measure`` returns to ``unit``.
    """

    title: str
    variants: dict[str, Work]
    tolerance: float
    required: dict[str, float] = field(default_factory=dict)
    measure: Callable[[Work], float] = seconds
    unit: str = "ms"
    unit_scale: float = 1e3


@dataclass(slots=True, kw_only=True)
class Row:
    """One variant's result; ``quartiles`` of the quantity, ``ratio`` the median over rounds of baseline / variant."""

    suite: str
    title: str
    variant: str
    unit: str
    median: float
    quartiles: tuple[float, float]
    ratio: float
    ratio_quartiles: tuple[float, float]
    required: float | None
    rounds: int

    @property
    def passed(self) -> bool:
        return self.required is None or self.ratio >= self.required


def run_comparison(suite: str, comparison: Comparison, rounds: int, warmup: int) -> list[Row]:
    """Check that the variants agree, then measure them in interleaved rounds (each round starts with another one)."""
    check_equal(comparison)
    names = list(comparison.variants)
    values: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            value = comparison.measure(comparison.variants[name]) * comparison.unit_scale
            if turn >= warmup:
                values[name].append(value)
    baseline = values[names[0]]
    rows = []
    for name in names:
        ratios = [base / value for base, value in zip(baseline, values[name], strict=True)]
        rows.append(
            Row(
                suite=suite,
                title=comparison.title,
                variant=name,
                unit=comparison.unit,
                median=statistics.median(values[name]),
                quartiles=quartiles(values[name]),
                ratio=statistics.median(ratios),
                ratio_quartiles=quartiles(ratios),
                required=comparison.required.get(name),
                rounds=rounds,
            )
        )
    return rows


def check_equal(comparison: Comparison) -> None:
    """Raise where a variant's result is further than the tolerance from the baseline's."""
    names = list(comparison.variants)
    expected = comparison.variants[names[0]]()
    for name in names[1:]:
        actual = comparison.variants[name]()
        for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
            distance = ((a.double() - b.double()).norm() / b.double().norm()).item()
            if not distance <= comparison.tolerance:  # a NaN fails, too
                raise RuntimeError(
                    f"{comparison.title}: result {index} of {name!r} is {distance:.1e} away from that of {names[0]!r} "
                    f"(tolerance {comparison.tolerance:.1e}); a wrong result is not worth timing"
                )


def quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def machine(keeps_memory: bool) -> dict[str, str | int]:
    """What the numbers depend on besides the code."""
    description: dict[str, str | int] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1),
        "threads": torch.get_num_threads(),
        "load_average": f"{os.getloadavg()[0]:.1f}",
        "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "allocator": "keeps freed memory" if keeps_memory else os.environ.get("LD_PRELOAD", "as it was set"),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        description["gpu"] = torch.cuda.get_device_name()
        description["cuda"] = str(torch.version.cuda)
    return description


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def print_rows(rows: list[Row]) -> None:
    """One table per comparison, as soon as it is measured."""
    print(f"\n{rows[0].suite}: {rows[0].title}")
    for row in rows:
        low, high = row.quartiles
        verdict = ""
        if row.required is not None:
            verdict = f"  required {row.required:.2f}: {'yes' if row.passed else 'NO'}"
        print(
            f"  {row.variant:<24} {row.median:>9.2f} {row.unit} [{low:.2f}, {high:.2f}]"
            f"   x {row.ratio:.2f} [{row.ratio_quartiles[0]:.2f}, {row.ratio_quartiles[1]:.2f}]{verdict}",
            flush=True,
        )


def write_json(path: Path, description: dict[str, str | int], rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps({"machine": description, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    temporary.replace(path)


# ---------------------------------------------------------------------------------------------------------- the suites


def forward_backward(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def attention_inputs(
    layout: SequenceLayout, batch: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """query, key, value (leaves) and the output's gradient, in Megatron's order."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(layout.num_rows, batch, count, dim, generator=generator)
        .to(device=device, dtype=dtype)
        .permute(1, 2, 0, 3)
        .requires_grad_(index < 3)
        for index, count in enumerate((heads, kv_heads, kv_heads, heads))
    ]


def attention_suite(device: torch.device) -> Iterator[Comparison]:
    """Forward and backward of the attention alone, joint (doubled sequence) and AR (causal), in Megatron's order."""
    fast = resolve_backend(AttentionBackend.auto, device)
    shapes = [  # L, batch, query heads, key-value heads, head dimension
        (512, 4, 4, 1, 64),
        (1024, 2, 8, 2, 64),
    ]
    for length, batch, heads, kv_heads, dim in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            # Two roundings to bf16 (2^-9 each) of results that agree; gradients of keys add up rounded terms.
            tolerance = 1e-5 if dtype is torch.float32 else 2e-2
            for has_noisy_half in (True, False):
                layout = SequenceLayout(length, 32, has_noisy_half)
                *inputs, grad = attention_inputs(layout, batch, heads, kv_heads, dim, dtype, device)

                def ours(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, backend: AttentionBackend) -> Tensor:
                    return joint_attention(q, k, v, layout, backend)

                def sdpa_repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True)

                functions: dict[str, Callable[..., Tensor]]
                if has_noisy_half:
                    functions = {
                        backend.value: partial(ours, layout=layout, backend=backend)
                        for backend in (AttentionBackend.dense, fast)
                    }
                    required = {fast.value: 1.3} if length == 1024 else {}
                else:
                    causal = partial(ours, layout=layout, backend=fast)
                    functions = {"sdpa, repeated heads": sdpa_repeated, "causal": causal}
                    required = {}
                kind = "joint" if has_noisy_half else "AR"
                shape = f"L {length}, batch {batch}, heads {heads}/{kv_heads}, head dim {dim}"
                yield Comparison(
                    title=f"{kind}, {str(dtype).removeprefix('torch.')}, {shape}, on {device.type}",
                    variants={
                        name: partial(forward_backward, function, inputs, grad) for name, function in functions.items()
                    },
                    tolerance=tolerance,
                    required=required,
                )


def table_layout(
    batch: int,
    length: int,
    block_size: int,
    *,
    noisy_fraction: float = 1.0,
    prompt: float = 0.0,
    num_documents: int = 1,
) -> SequenceLayout:
    """A layout with a table: of the blocks after the prompt, the same number in each sequence, chosen at random.

    Args:
        noisy_fraction: share of those blocks.
        prompt: share of the sequence that is never noisy.
        num_documents: equal parts of the sequence, whole blocks each; the prompt is the beginning of the first.
    """
    generator = torch.Generator().manual_seed(0)
    num_blocks = length // block_size
    first = round(prompt * num_blocks)
    chosen = round(noisy_fraction * (num_blocks - first))
    blocks = torch.stack(
        [first + torch.randperm(num_blocks - first, generator=generator)[:chosen].sort().values for _ in range(batch)]
    )
    places = (blocks[:, :, None] * block_size + torch.arange(block_size)).flatten(1)
    tokens = torch.zeros(batch, length, dtype=torch.int64)
    corruption = Corruption(
        noisy_tokens=torch.zeros_like(places),
        places=places,
        blocks=blocks.repeat_interleave(block_size, dim=1),
        weights=torch.zeros(places.shape, dtype=torch.float64),
        mask_ratios=torch.zeros(places.shape),
        sequence_ratios=torch.zeros(batch, dtype=torch.float64),
    )
    document = num_blocks // num_documents * block_size
    starts = (torch.arange(length) // document).clamp_max(num_documents - 1) * document
    return build_joint_batch(
        tokens, tokens, tokens.bool(), corruption, block_size, document_starts=starts.repeat(batch, 1)
    ).layout


def layouts_suite(device: torch.device) -> Iterator[Comparison]:
    """Forward and backward of the attention under layouts with a table, against the plain joint one and the AR one.

    They compute different things, so each is compared with the dense backend first and returns nothing afterwards. At
    a noisy share rho a step may take 1.10 * (1 + rho) / 2 of the plain one's time.
    """
    fast = resolve_backend(AttentionBackend.auto, device)
    for length, batch, heads, kv_heads, dim in ((512, 4, 4, 1, 64), (1024, 2, 8, 2, 64)):
        layouts = {
            "plain joint": SequenceLayout(length, 32, has_noisy_half=True),
            "rho 0.5": table_layout(batch, length, 32, noisy_fraction=0.5),
            "rho 0.25": table_layout(batch, length, 32, noisy_fraction=0.25),
            "4 documents": table_layout(batch, length, 32, num_documents=4),
            "AR": SequenceLayout(length, 32, has_noisy_half=False),
            "90% prompt": table_layout(batch, length, 32, prompt=0.9),
        }
        for dtype in (torch.float32, torch.bfloat16):
            shape = f"L {length}, batch {batch}, heads {heads}/{kv_heads}, head dim {dim}, on {device.type}"
            title = f"layouts, {str(dtype).removeprefix('torch.')}, {shape}"
            works: dict[str, Work] = {}
            for name, on_cpu in layouts.items():
                layout = on_cpu.to(device)
                *inputs, grad = attention_inputs(layout, batch, heads, kv_heads, dim, dtype, device)
                backends = {
                    backend.value: partial(
                        forward_backward, partial(joint_attention, layout=layout, backend=backend), inputs, grad
                    )
                    for backend in (AttentionBackend.dense, fast)
                }
                tolerance = 1e-5 if dtype is torch.float32 else 2e-2
                check_equal(Comparison(title=f"{title}, {name}", variants=dict(backends), tolerance=tolerance))
                works[name] = partial(_without_results, backends[fast.value])
            baselines: dict[str, dict[str, float]] = {
                "plain joint": {"rho 0.5": 1 / (1.1 * 0.75), "rho 0.25": 1 / (1.1 * 0.625), "4 documents": 1.0},
                "AR": {"90% prompt": 1 / 1.25},
            }
            for baseline, required in baselines.items():
                variants = {name: works[name] for name in (baseline, *required)}
                yield Comparison(
                    title=f"{title}, against {baseline}", variants=variants, tolerance=0, required=required
                )


def _without_results(work: Work) -> Sequence[Tensor]:
    work()
    return []


def copy_files(source: Path, out: Path) -> None:
    """What a conversion is measured against: the same bytes, read, written and synced."""
    out.mkdir()
    for file in source.iterdir():
        with file.open("rb") as reader, (out / file.name).open("wb") as writer:
            shutil.copyfileobj(reader, writer, 16 << 20)
            writer.flush()
            os.fsync(writer.fileno())


def import_folder(source: Path, out: Path) -> None:
    from nld_train.checkpoint.convert import import_checkpoint

    import_checkpoint(source, out)


def export_folder(source: Path, out: Path) -> None:
    from nld_train.checkpoint.convert import export_checkpoint

    export_checkpoint(source, out)


def _convert_in_child(connection: Connection, convert: Callable[[Path, Path], None], source: Path, out: Path) -> None:
    """Body of the process: everything is imported when the clock starts."""
    import nld_train.checkpoint.convert  # noqa: F401

    connection.send("ready")
    connection.recv()
    start = time.perf_counter()
    convert(source, out)
    connection.send(time.perf_counter() - start)


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that is no mapped file; 0 where it is over."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return 1024 * int(fields.get("RssAnon", "0").split()[0])


class Conversion:
    """One conversion, each time in a new process; ``seconds`` of the last run, ``peak_bytes`` anonymous of all runs.

    Args:
        convert: (source, out) -> None, a function of this module.
        source: what is read.
        out: what is written; removed before each run.
        original: folder whose tensors the first run's result is compared with, bit by bit; None: not compared.
    """

    def __init__(
        self, convert: Callable[[Path, Path], None], source: Path, out: Path, original: Path | None = None
    ) -> None:
        self.convert, self.source, self.out, self.original = convert, source, out, original
        self.seconds = 0.0
        self.peak_bytes = 0

    def __call__(self) -> Sequence[Tensor]:
        shutil.rmtree(self.out, ignore_errors=True)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_convert_in_child, args=(theirs, self.convert, self.source, self.out))
        process.start()
        theirs.close()
        try:
            ours.recv()
            ours.send("go")
            while not ours.poll(0.005):
                self.peak_bytes = max(self.peak_bytes, anonymous_bytes(process.pid or 0))
            self.seconds = ours.recv()
        except EOFError:
            raise RuntimeError(f"{self.convert} of {self.source} failed; its error stands above") from None
        finally:
            process.join()
        if self.original is not None:
            assert_same_tensors(self.out, self.original)
            self.original = None
        return []


def assert_same_tensors(found: Path, expected: Path) -> None:
    """Both folders hold the same tensors to the last bit."""
    homes = [
        {name: file for path in sorted(folder.glob("*.safetensors")) for file in [path] for name in _names(path)}
        for folder in (found, expected)
    ]
    if homes[0].keys() != homes[1].keys():
        raise RuntimeError(f"{found} and {expected} hold other tensors: a wrong result is not worth timing")
    for name in homes[1]:
        pair = []
        for home in homes:
            with safe_open(str(home[name]), framework="pt") as file:
                pair.append(file.get_tensor(name))
        if pair[0].dtype != pair[1].dtype or not torch.equal(pair[0], pair[1]):
            raise RuntimeError(f"{name} of {found} is not that of {expected}: a wrong result is not worth timing")


def _names(path: Path) -> list[str]:
    with safe_open(str(path), framework="pt") as file:
        return list(file.keys())


def write_random_folder(folder: Path, model: ModelConfig) -> int:
    """A bf16 folder of the NLD form with random weights; returns the bytes of its tensors."""
    from nld_train.checkpoint.convert import hf_config
    from nld_train.checkpoint.hf_folder import write_safetensors_stream
    from nld_train.checkpoint.manager import CheckpointInfo
    from nld_train.checkpoint.weight_map import NLD_FORM, weight_rules

    shapes = {
        name: shape
        for rule in weight_rules(model)
        for name, shape in zip(rule.hf_names(NLD_FORM), rule.shapes, strict=True)
    }
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    # Each tensor is a window of one random pool, at a place of its own: drawing all of them would take minutes.
    pool = torch.randn(max(sizes) + len(sizes), dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    tensors = (
        (name, pool[place : place + size].view(shape))
        for place, (size, (name, shape)) in enumerate(zip(sizes, shapes.items(), strict=True))
    )
    folder.mkdir()
    num_bytes = sum(
        write_safetensors_stream(folder, shapes, tensors, dtype=torch.bfloat16, max_shard_bytes=5_000_000_000)
    )
    info = CheckpointInfo(
        step=0, tokens=0, stage="", samples=0, dtype="bfloat16", model=model, parallel={}, config={}, metrics={},
        tokenizer="",
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(hf_config(info, torch.bfloat16)))
    return num_bytes


def convert_suite(_device: torch.device, *, num_layers: int = 2, vocab_size: int = 32768) -> Iterator[Comparison]:
    """Import and export of a folder of the 3B's width, in time against copying the files, and in anonymous memory."""
    parent = Path("runs/benchmark")
    parent.mkdir(parents=True, exist_ok=True)
    model = ModelConfig(
        num_layers=num_layers, hidden_size=3072, ffn_hidden_size=9216, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=vocab_size,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=parent) as name:
        folder = Path(name)
        source, checkpoint = folder / "hf", folder / "checkpoint"
        size = f"{write_random_folder(source, model) / 1e9:.2f} GB in bf16"
        works = {
            "copy and sync": Conversion(copy_files, source, folder / "out", original=source),
            "import": Conversion(import_folder, source, checkpoint),
            # Reads what the import has left: equal to the source, it vouches for both.
            "export": Conversion(export_folder, checkpoint, folder / "out", original=source),
        }

        def measured(work: Work) -> float:
            work()
            assert isinstance(work, Conversion)
            return work.seconds

        yield Comparison(
            title=f"time, {size}",
            variants=dict(works),
            tolerance=0.0,
            required={"import": 0.5, "export": 0.5},
            measure=measured,
            unit="s",
            unit_scale=1.0,
        )
        peaks: dict[str, float] = {"4 GB": 4e9} | {name: work.peak_bytes for name, work in works.items()}
        nothing: dict[str, Work] = {name: partial(list[Tensor]) for name in peaks}
        by_work = {id(nothing[name]): peak for name, peak in peaks.items()}
        yield Comparison(
            title=f"peak anonymous memory, {size}",
            variants=nothing,
            tolerance=0.0,
            required={"import": 1.0, "export": 1.0},
            measure=lambda work: by_work[id(work)],
            unit="MB",
            unit_scale=1e-6,
        )


HEAD_SHAPE = (2048, 131072, 1024)  # rows with weight, vocabulary, hidden size


def head_step(_source: Path, out: Path, *, is_fused: bool, dtype: torch.dtype) -> None:
    """Loss and gradients of the output head with Megatron's fp32 gradient buffer; writes what is compared."""
    from nld_train.model.head import fused_linear_cross_entropy

    num_rows, vocab_size, hidden_size = HEAD_SHAPE
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, hidden_size, generator=generator).to(dtype).requires_grad_()
    weight = torch.nn.Parameter(torch.empty(vocab_size, hidden_size, dtype=dtype).normal_(0, 0.02, generator=generator))
    targets = torch.randint(vocab_size, (num_rows,), generator=generator)
    weights = torch.rand(num_rows, generator=generator, dtype=torch.float64)
    main_grad = torch.zeros(weight.shape)
    if is_fused:
        weight.main_grad = main_grad  # type: ignore[attr-defined]
        loss, _, _ = fused_linear_cross_entropy(hidden, weight, targets, weights)
        loss.backward()
    else:
        log_probabilities = F.log_softmax((hidden @ weight.t()).float(), dim=1)
        loss = -(log_probabilities.gather(1, targets[:, None]).squeeze(1) * weights.float()).sum()
        del log_probabilities
        loss.backward()
        assert weight.grad is not None
        main_grad.add_(weight.grad)
    weight.grad = None
    out.mkdir()
    torch.save([loss.detach(), hidden.grad, main_grad[::64].clone()], out / "result.pt")


def head_suite(device: torch.device) -> Iterator[Comparison]:
    """Peak anonymous memory of the head's forward and backward, against full logits and autograd, on the CPU."""
    if device.type != "cpu":
        raise SystemExit("the head suite reads the memory of processes: use --device cpu")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            runs = {
                variant: Conversion(
                    partial(head_step, is_fused=variant == "fused", dtype=dtype), folder, folder / "out"
                )
                for variant in ("full logits", "fused")
            }

            def work(run: Conversion) -> Sequence[Tensor]:
                run.peak_bytes = 0
                run()
                results: list[Tensor] = torch.load(run.out / "result.pt")
                return results

            works: dict[str, Work] = {variant: partial(work, run) for variant, run in runs.items()}
            by_work = {id(works[variant]): run for variant, run in runs.items()}

            def peak(work: Work, by_work: dict[int, Conversion] = by_work) -> float:
                work()
                return by_work[id(work)].peak_bytes

            num_rows, vocab_size, hidden_size = HEAD_SHAPE
            shape = f"{num_rows} rows, V {vocab_size}, H {hidden_size}"
            yield Comparison(
                title=f"peak anonymous memory, {str(dtype).removeprefix('torch.')}, {shape}, with weight and main_grad",
                variants=works,
                tolerance=tolerance,
                required={"fused": 1 / 0.35},
                measure=peak,
                unit="MB",
                unit_scale=1e-6,
            )


Suite = Callable[[torch.device], Iterator[Comparison]]
# (hidden, layers, ffn, heads, key-value heads, vocabulary, L, B) on the CPU and on a GPU
STEP_SHAPES = {
    "cpu": [(256, 4, 768, 4, 2, 8192, 512, 2), (384, 6, 1152, 6, 2, 32768, 1024, 1)],
    "cuda": [(2048, 8, 6144, 16, 4, 131072, 4096, 1)],
}


def loader_batch(text: Tensor, objective: ObjectiveConfig | None, is_supervised: Tensor) -> LoaderBatch:
    """A micro-batch of tokens int64 [B, L + 1]; ``objective`` None: an AR step."""
    tokens, positions = text[:, :-1].contiguous(), torch.arange(len(text))
    corruption = None
    if objective is not None:
        # One draw must stand for many: the recipe masks anything from nothing to everything. Of these, the one whose
        # masked share is nearest to their mean.
        specs = (noise_spec(objective, seed=seed, global_batch_size=len(text)) for seed in range(64))
        draws = [corrupt(tokens, positions, spec, is_supervised) for spec in specs]
        num_masked = torch.tensor([(draw.weights > 0).sum().item() for draw in draws])
        corruption = draws[int((num_masked - num_masked.float().mean()).abs().argmin())]
    return LoaderBatch(
        tokens=tokens,
        labels=text[:, 1:].contiguous(),
        loss_mask=is_supervised.float(),
        is_supervised=is_supervised,
        document_starts=None,
        stream_positions=positions,
        corruption=corruption,
    )


def step_suite(device: torch.device) -> Iterator[Comparison]:
    """Forward and backward of a whole step: a fraction of the blocks against all of them, and a supervised step whose
    sequences are 90% prompt against its AR part. The losses differ by construction; tests compare them."""
    platform_ = initialize_device(Device(device.type))
    recipe = ObjectiveConfig(sampler=Sampler.bernoulli, stratify=Stratify.none, noisy_fraction=1.0)
    with topology_of(ParallelConfig(), platform_, seed=0):
        for hidden, layers, ffn, heads, kv_heads, vocab, length, batch in STEP_SHAPES[device.type]:
            model_config = ModelConfig(
                num_layers=layers,
                hidden_size=hidden,
                ffn_hidden_size=ffn,
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
                head_dim=hidden // heads,
                vocab_size=vocab,
                rope=RopeConfig(),
            )
            text = torch.randint(1000, vocab, (batch, length + 1), generator=torch.Generator().manual_seed(0))
            everything = torch.ones(batch, length, dtype=torch.bool)
            answers = everything.clone()
            answers[:, : length * 9 // 10] = False

            batches = {
                "recipe": loader_batch(text, recipe, everything),
                "fraction 0.5": loader_batch(text, replace(recipe, noisy_fraction=0.5), everything),
                "fraction 0.25": loader_batch(text, replace(recipe, noisy_fraction=0.25), everything),
                "power count": loader_batch(text, replace(recipe, sampler=Sampler.power_count), everything),
                "AR": loader_batch(text, None, everything),
            }
            supervised = {"AR": loader_batch(text, None, answers), "joint": loader_batch(text, recipe, answers)}
            for dtype in (torch.float32, torch.bfloat16):
                model = build_model(model_config, ParallelConfig(), dtype=dtype, device=device, seed=0)
                wrapped = wrap_data_parallel(model, use_distributed_optimizer=False)
                connect([wrapped], None)
                shape = StepShape(num_microbatches=1, micro_batch_size=batch, num_rows=None)

                def step(sample: LoaderBatch, wrapped: Any = wrapped, shape: StepShape = shape) -> Sequence[Tensor]:
                    wrapped.zero_grad_buffer()
                    weights = LossWeights(diffusion=0.3)
                    run_microbatches(iter([sample]), [wrapped], shape, objective=recipe, weights=weights, device=device)
                    return []

                size = f"hidden {hidden}, {layers} layers, V {vocab}, L {length}, batch {batch}, on {device.type}"
                name = str(dtype).removeprefix("torch.")
                yield Comparison(
                    title=f"joint step, {name}, {size}",
                    variants={key: partial(step, sample) for key, sample in batches.items()},
                    tolerance=0.0,
                    required={"fraction 0.5": 2 / (1.1 * 1.5), "fraction 0.25": 2 / (1.1 * 1.25)},
                )
                yield Comparison(
                    title=f"supervised step at 90% prompt, {name}, {size}",
                    variants={key: partial(step, sample) for key, sample in supervised.items()},
                    tolerance=0.0,
                    required={"joint": 1 / 1.25},
                )


LOADER_LENGTH, LOADER_BATCHES = 4096, 48
TOKENS_PER_SECOND = 2e6  # that one loader worker has to reach


def data_suite(_device: torch.device) -> Iterator[Comparison]:
    """What one loader worker needs for a token, in this process, against what it may: samples of the default corpora
    read, noised and packed for the pipe; with the doubled sequence laid out, which is the trainer's work, too."""
    from nld_train.config.compose import compose
    from nld_train.data.loader import _MicroBatches, _Packed, _unpack
    from nld_train.training.data import prepare_blends, training_samples

    works: dict[str, Work] = {"2M tokens/s": partial(list[Tensor])}
    for has_documents in (False, True):
        mask = "boundary" if has_documents else "none"
        config = compose([f"data.sequence_length={LOADER_LENGTH}", f"data.document_mask={mask}"], world_size=1)
        stream = training_samples(config, prepare_blends(config, is_main=False).of_run)
        stream.build_index(0, LOADER_BATCHES)
        for name, objective in (
            ("reading alone", None),
            ("default", config.objective),
            (
                "recipe",
                replace(config.objective, sampler=Sampler.bernoulli, stratify=Stratify.none, noisy_fraction=1.0),
            ),
        ):
            noise = None if objective is None else noise_spec(objective, seed=0, global_batch_size=512)
            packed = _Packed(_MicroBatches(stream, 1, 0, 1, noise))

            block_size = config.objective.block_size

            def work(
                packed: _Packed = packed, block_size: int = block_size, *, is_laid_out: bool = False
            ) -> Sequence[Tensor]:
                for number in range(LOADER_BATCHES):
                    arrays = packed[0, number]
                    if is_laid_out:
                        sample = _unpack(arrays)
                        assert isinstance(sample, LoaderBatch)
                        lay_out(sample, block_size)
                return []

            name += ", documents" if has_documents else ""
            works[name] = work
            if objective is not None:
                works[f"{name}, laid out"] = partial(work, is_laid_out=True)
    limit = works["2M tokens/s"]

    def measured(work: Work) -> float:
        return 1 / TOKENS_PER_SECOND if work is limit else seconds(work) / (LOADER_BATCHES * LOADER_LENGTH)

    yield Comparison(
        title=f"a worker's time for a token, L {LOADER_LENGTH}; the ratio is to the requirement",
        variants=works,
        tolerance=0.0,
        required={name: 1.0 for name in works if name != "2M tokens/s"},
        measure=measured,
        unit="ns",
        unit_scale=1e9,
    )


def prepare_suite(device: torch.device, *, megabytes: int = 100) -> Iterator[Comparison]:
    """Text in JSONL to a prepared corpus, with the Tekken tokenizer that mistral-common ships, against the plain call
    of the Hugging Face tokenizer on texts in memory. Both use all cores; ours starts, reads, hashes and writes files.
    The results that are compared are the counts of every token."""
    tekken = Path(str(resources.files("mistral_common"))) / "data" / "tekken_240911.json"
    modules = [document.text for document in CORPORA["stdlib"]().read().documents]
    rng = random.Random(0)
    texts: list[str] = []
    size = 0
    while size < megabytes * 10**6:
        module = rng.choice(modules)
        start = rng.randrange(len(module))
        texts.append(module[start : start + rng.randrange(500, 8000)])
        size += len(texts[-1].encode("utf-8"))
    workers = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="benchmark_prepare_") as name:
        folder = Path(name)
        convert_tekken(tekken, folder / "tokenizer")
        # The plain call makes special ids of texts that spell special tokens: there the two are not to agree.
        special = re.compile("|".join(map(re.escape, TextEncoder.from_folder(folder / "tokenizer").special_ids)))
        texts = [text for text in texts if not special.search(text)]
        with (folder / "texts.jsonl").open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        tokenizer = load_tokenizer(folder / "tokenizer")
        eos = tokenizer.eos_token_id

        def call() -> Sequence[Tensor]:
            counts = np.zeros(len(tokenizer), dtype=np.int64)
            for start in range(0, len(texts), 1000):
                ids = tokenizer(texts[start : start + 1000])["input_ids"]
                counts += np.bincount(np.concatenate(ids), minlength=len(counts))
            counts[eos] += len(texts)
            return [torch.from_numpy(counts)]

        def prepare() -> Sequence[Tensor]:
            shutil.rmtree(folder / "out", ignore_errors=True)
            command = [sys.executable, str(Path(__file__).with_name("prepare_data.py")), "prepare", str(folder / "out")]
            command += ["--input", str(folder / "texts.jsonl"), "--tokenizer", str(folder / "tokenizer")]
            command += ["--workers", str(workers), "--shard-mb", str(megabytes / (4 * workers))]
            subprocess.run(command, check=True, capture_output=True)
            return [torch.from_numpy(np.load(folder / "out" / "token_counts.npy"))]

        yield Comparison(
            title=f"{size / 1e6:.0f} MB of text to tokens, Tekken, {workers} cores",
            variants={"Hugging Face call": call, "prepare_data.py": prepare},
            tolerance=0.0,
            required={"prepare_data.py": 3.0},
            unit="s",
            unit_scale=1.0,
        )


@dataclass(slots=True)
class Save:
    """A checkpoint of one state; ``seconds`` is how long the training waits for it, ``folder`` where it is."""

    manager: CheckpointManager
    begin: Callable[[], None]
    seconds: float = 0.0

    def __call__(self) -> Sequence[Tensor]:
        start = time.perf_counter()
        self.begin()
        waited = time.perf_counter() - start
        while self.manager.is_writing:
            time.sleep(0.01)  # the steps in between
        start = time.perf_counter()
        result = self.manager.finish()
        self.seconds = waited + time.perf_counter() - start
        assert result.error is None, result.error
        checksums = read_checksums(result.folder)
        return [torch.tensor(checksums["__0_0.distcp"].crc32, dtype=torch.float64)]


def checkpoint_suite(device: torch.device) -> Iterator[Comparison]:
    """How long the training waits for a save: until everything is on disk, or until the state is copied."""
    model = ModelConfig(
        num_layers=3, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=8, num_key_value_heads=8,
        head_dim=128, vocab_size=16384,
    )  # fmt: skip
    platform = initialize_device(Device(device.type))
    parent = Path("runs/benchmark")
    parent.mkdir(parents=True, exist_ok=True)
    with (
        topology_of(ParallelConfig(), platform, seed=1),
        tempfile.TemporaryDirectory(dir=parent) as folder,
    ):
        built = build_model(model, ParallelConfig(), dtype=torch.bfloat16, device=device, seed=1)
        chunks = [wrap_data_parallel(built)]
        optimizer = build_optimizer(OptimConfig(), chunks, torch.bfloat16)
        connect(chunks, optimizer)
        for parameter in built.parameters():
            parameter.main_grad.normal_()  # type: ignore[attr-defined]
        set_hyperparameters(optimizer, OptimConfig(), 1e-3)
        optimizer.step()
        info = CheckpointInfo(
            step=1, tokens=0, stage="", samples=0, dtype="bfloat16", model=model, parallel={}, config={}, metrics={},
            tokenizer="",
        )  # fmt: skip
        variants = {}
        for name in ("synchronous", "asynchronous"):
            config = CheckpointConfig(asynchronous=name == "asynchronous")
            manager = CheckpointManager(Path(folder) / name, config)
            variants[name] = Save(manager, partial(manager.begin, chunks, optimizer, info))
        variants["synchronous"]()
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.distcp")) / 1e9

        def measured(work: Work) -> float:
            work()
            assert isinstance(work, Save)
            return work.seconds

        yield Comparison(
            title=f"the training waits for a checkpoint of {size:.2f} GB, one rank",
            variants=dict(variants),
            tolerance=0.0,
            required={"asynchronous": 5.0},
            measure=measured,
            unit="s",
            unit_scale=1.0,
        )


SUITES: dict[str, Suite] = {
    "attention": attention_suite,
    "layouts": layouts_suite,
    "step": step_suite,
    "data": data_suite,
    "convert": convert_suite,
    "prepare": prepare_suite,
    "head": head_suite,
    "checkpoint": checkpoint_suite,
    "convert-3b": partial(convert_suite, num_layers=26, vocab_size=131072),
}
DEFAULT_SUITES = ["attention", "layouts", "step", "data", "convert"]  # others take minutes; convert-3b writes 23 GB


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen suites; 1 with --check where a required ratio is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)} (default: {' '.join(DEFAULT_SUITES)})"
    )
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds of each comparison (default 9)")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them that are not counted (default 2)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where a GPU is visible")
    parser.add_argument("--json", type=Path, help="result file (default runs/benchmark/SUITES.json)")
    parser.add_argument("--check", action="store_true", help="exit 1 where a required ratio is missed")
    options = parser.parse_args(arguments)
    names: list[str] = options.suites or DEFAULT_SUITES
    for name in names:
        if name not in SUITES:
            parser.error(f"no suite {name!r}: choose of {', '.join(SUITES)}")
    if options.rounds < 1 or options.warmup < 0:
        parser.error(f"--rounds {options.rounds} must be at least 1, --warmup {options.warmup} at least 0")
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"--threads {options.threads} must be at least 1")
        torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    # For both sides of every comparison, as train.py does. Suites that measure memory do so in processes of their own.
    description = machine(device.type == "cpu" and keep_freed_memory())
    print("\n".join(f"{key}: {value}" for key, value in description.items()))
    print("\nmedian [quartiles], then x = the baseline's value / this one's, median over rounds [quartiles]")
    rows: list[Row] = []
    for name in names:
        for comparison in SUITES[name](device):
            measured = run_comparison(name, comparison, options.rounds, options.warmup)
            print_rows(measured)
            rows += measured
    path = options.json or Path("runs/benchmark") / f"{'-'.join(names)}.json"
    write_json(path, description, rows)
    print(f"\nwritten to {path}")
    missed = [row for row in rows if not row.passed]
    return 1 if missed and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
