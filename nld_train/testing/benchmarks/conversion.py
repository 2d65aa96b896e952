"""Conversions of checkpoints against copying, each in a process of its own whose memory is watched."""

import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from nld_train.checkpoint.manager import CheckpointInfo
from nld_train.config.schema import ModelConfig
from nld_train.testing.benchmarks.comparison import Comparison, Work


def without_results(work: Work) -> Sequence[Tensor]:
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
    """Import and export of a random folder of the 3B's width, against copying and syncing the same files. Each runs in
    a process of its own, timed after the imports; anonymous memory is `RssAnon`, polled every 5 ms, and the ratio is
    that of the 4 GB that it may take. The export of the import is compared with the source, bit by bit.

    A conversion can be faster than a copy because it does not fill the page cache: each piece is handed to the disk and
    forgotten (`checkpoint.streaming.StreamedFile`), where the copy waits for its dirty pages at the end."""
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
        if not all(work.peak_bytes for work in works.values()):
            return  # nothing was measured (--only)
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


def convert_3b_suite(device: torch.device) -> Iterator[Comparison]:
    """`convert` at the full size of the 3B: 26 layers, a vocabulary of 131072. Needs 23 GB of disk."""
    yield from convert_suite(device, num_layers=26, vocab_size=131072)
