"""Callbacks: metrics.jsonl over kills and resumes, the display, train.log, Weights & Biases."""

import io
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from nld_train.config.schema import Config, RunConfig, WandbConfig, WandbMode
from nld_train.errors import DataError, NLDError
from nld_train.testing.wandb_server import WandbServer, wandb_server
from nld_train.training.callbacks import Callback, CallbackList, RunInfo, StageInfo, build_callbacks
from nld_train.training.callbacks.console import ConsoleDisplay, TimeLeft, format_count, format_duration, header_lines
from nld_train.training.callbacks.jsonl import JsonlWriter
from nld_train.training.callbacks.tensorboard import TensorboardWriter, crc32c
from nld_train.training.callbacks.wandb import WandbLogger, last_offline_step, load_or_create_run_id
from nld_train.training.metrics import Lap, read_metrics, step_record, validation_record

ROOT = Path(__file__).resolve().parents[2]
STAGES = (
    StageInfo(name="ar", diffusion_loss_weight=0.0, first_step=1, last_step=6, tokens=600),
    StageInfo(name="joint", diffusion_loss_weight=0.3, first_step=7, last_step=10, tokens=400),
)


def _info(run_dir: Path, start_step: int = 0) -> RunInfo:
    return RunInfo(
        run_dir=run_dir,
        start_step=start_step,
        num_steps=10,
        tokens_per_step=100,
        num_parameters=5_512_345,
        stages=STAGES,
        config={
            "model": {
                "num_layers": 4,
                "hidden_size": 256,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": 4096,
            }
        },
        backends={"device": "cpu", "attention": "chunked [noisy | clean]"},
    )


def _stage(step: int) -> StageInfo:
    return STAGES[0] if step <= 6 else STAGES[1]


def _step(step: int, loss: float | None = None) -> dict[str, Any]:
    is_joint = step > 6
    means = {
        "loss": 5.0 / step if loss is None else loss,
        "ar_loss": 4.0 / step,
        "diffusion_loss": 1.0 / step if is_joint else None,
    }
    return step_record(
        step=step,
        stage=_stage(step).name,
        tokens=100 * step,
        means=means,
        lr=1e-3,
        grad_norm=0.5,
        lap=Lap(0.1, 1e3, 0.0),
    )


def _validation(step: int) -> dict[str, Any]:
    means = {"ar_loss": 4.5 / step, "diffusion_loss": 6.0 / step}
    return validation_record(step=step, stage=_stage(step).name, tokens=100 * step, means=means)


def _play(callback: Callback, info: RunInfo, last_step: int, checkpoints: tuple[int, ...] = ()) -> None:
    """The events of a run from ``info.start_step`` to ``last_step``, without its end; validation each third step."""
    callback.on_run_start(info)
    for step in range(info.start_step + 1, last_step + 1):
        if step in (info.start_step + 1, 7):
            callback.on_stage_start(_stage(step))
        callback.on_step(_step(step))
        if step % 3 == 0:
            callback.on_validation(_validation(step))
        if step in checkpoints:
            callback.on_checkpoint(step, info.run_dir / f"step_{step}")


# --- metrics.jsonl ----------------------------------------------------------------------------------------------------


@pytest.fixture
def said() -> list[str]:
    return []


def test_jsonl_one_flushed_line_per_record(tmp_path: Path, said: list[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path, said.append)
    _play(writer, _info(tmp_path), 3)
    # The writer is still open: whatever is on file now survives a kill.
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        _step(1), _step(2), _step(3), _validation(3),
    ]  # fmt: skip
    writer.on_run_end()
    assert said == []
    with pytest.raises(RuntimeError, match="outside of a run"):
        writer.on_step(_step(4))


def test_jsonl_non_finite(tmp_path: Path, said: list[str]) -> None:
    writer = JsonlWriter(tmp_path / "metrics.jsonl", said.append)
    writer.on_run_start(_info(tmp_path))
    writer.on_step(_step(1, loss=math.nan))
    writer.on_run_end()
    record = read_metrics(tmp_path / "metrics.jsonl").steps[0]
    assert record["loss"] is None
    assert record["non_finite"] == {"loss": "nan"}


@pytest.mark.parametrize("torn", [b"", b'{"step": 9, "st', b"\x00\x00\x00"])
@pytest.mark.parametrize("checkpoint", [0, 1, 3, 6, 8])
def test_jsonl_resume_holds_every_step_once(tmp_path: Path, said: list[str], checkpoint: int, torn: bytes) -> None:
    whole = tmp_path / "whole.jsonl"
    writer = JsonlWriter(whole, said.append)
    _play(writer, _info(tmp_path), 10)
    writer.on_run_end()

    path = tmp_path / "metrics.jsonl"
    killed = JsonlWriter(path, said.append)
    _play(killed, _info(tmp_path), 8)
    with path.open("ab") as file:
        file.write(torn)
    resumed = JsonlWriter(path, said.append)
    _play(resumed, _info(tmp_path, start_step=checkpoint), 10)
    resumed.on_run_end()
    assert path.read_bytes() == whole.read_bytes()
    num_dropped = 8 - checkpoint + 2 - checkpoint // 3 + bool(torn)
    expected = f"metrics.jsonl: dropped {num_dropped} lines after step {checkpoint}; those steps run again"
    assert said == ([expected] if num_dropped else [])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "whole.jsonl"]


_KILLED_RUN = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_callbacks import _info, _step, _validation
from nld_train.training.callbacks.jsonl import JsonlWriter
run_dir = Path({run_dir!r})
writer = JsonlWriter(run_dir / "metrics.jsonl", print)
writer.on_run_start(_info(run_dir, start_step={start}))
step = {start}
while True:
    step += 1
    writer.on_step(_step(step))
    if step % 3 == 0:
        writer.on_validation(_validation(step))
    if step % 50 == 0:
        writer.on_checkpoint(step, run_dir / str(step))
        print(step, flush=True)
"""


def test_jsonl_survives_kill_9(tmp_path: Path, said: list[str]) -> None:
    start = 0
    for _ in range(3):
        code = _KILLED_RUN.format(tests=str(Path(__file__).parent), run_dir=str(tmp_path), start=start)
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip().isdigit() and int(line) >= start + 100:
                    start = int(line)
                    break
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    writer = JsonlWriter(tmp_path / "metrics.jsonl", said.append)
    writer.on_run_start(_info(tmp_path, start_step=start))
    writer.on_run_end()
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert start >= 300
    assert [record["step"] for record in metrics.steps] == list(range(1, start + 1))
    assert [record["step"] for record in metrics.validations] == list(range(3, start + 1, 3))
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")


def test_jsonl_says_that_history_is_missing_and_names_damage(tmp_path: Path, said: list[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path, said.append)
    writer.on_run_start(_info(tmp_path, start_step=4))
    writer.on_run_end()
    assert said == ["metrics.jsonl is missing: the records of steps 1..4 are lost"]
    path.write_bytes(b'{"step": 1}\ngarbage\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        writer.on_run_start(_info(tmp_path, start_step=2))
    assert path.read_bytes() == b'{"step": 1}\ngarbage\n{"step": 2}\n'


def test_jsonl_records_wait_while_the_disk_is_full(tmp_path: Path, said: list[str]) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path, said.append)
    writer.on_run_start(_info(tmp_path))
    file = writer._file
    writer._file = open("/dev/full", "ab", buffering=0)  # type: ignore[assignment]  # noqa: SIM115 - a disk without space
    writer.on_step(_step(1))
    writer.on_step(_step(2))
    with pytest.raises(NLDError, match=r"metrics\.jsonl: cannot be written: .*No space left"):
        writer.on_checkpoint_ready()
    with pytest.raises(NLDError, match=r"metrics\.jsonl"):
        writer.on_run_end()
    writer._file = file  # there is space again
    writer.on_step(_step(3))
    writer.on_checkpoint_ready()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    writer.on_run_end()


# --- the display ------------------------------------------------------------------------------------------------------


class _Clock:
    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def _display(tmp_path: Path, terminal: bool, now: _Clock, width: int = 120) -> tuple[ConsoleDisplay, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, force_interactive=terminal, width=width, color_system=None)
    return ConsoleDisplay(tmp_path / "train.log", console=console, now=now), out


def _log_lines(tmp_path: Path) -> list[str]:
    """train.log without its time stamps, whose form is checked."""
    lines = (tmp_path / "train.log").read_text().splitlines()
    for line in lines:
        assert line[4] == line[7] == "-"
        assert line[13] == line[16] == ":"
    return [line[21:] for line in lines]


def test_plain_output_equals_the_log(tmp_path: Path) -> None:
    now = _Clock()
    display, out = _display(tmp_path, terminal=False, now=now, width=40)
    display.on_message("data: [cached]")
    _play(display, _info(tmp_path), 10, checkpoints=(5,))
    now.time = 3700.0
    display.on_run_end()
    lines = out.getvalue().splitlines()
    assert lines == _log_lines(tmp_path)
    assert "\x1b" not in out.getvalue()
    text = "\n".join(lines)
    assert lines[0] == "data: [cached]"  # square brackets are not taken for markup, and come before the run starts
    assert "attention  chunked [noisy | clean]" in lines
    assert "model      5.51M parameters: 4 layers, hidden 256, 4 query and 2 key-value heads, vocabulary 4096" in lines
    assert "stage ar (AR): steps 1..6" in lines
    assert "stage joint (joint, alpha 0.3): steps 7..10" in lines
    assert f"checkpoint of step 5: {tmp_path / 'step_5'}" in lines
    assert "validation after step 3 (ar): AR 1.5000  diffusion 2.0000" in lines
    assert (
        "step 10/10 (joint)  loss 0.5000  AR 0.4000  diffusion 0.1000  lr 1.00e-03  1.00k tokens/s  grad norm 0.500  "
        "0:00:00 left"
    ) in lines
    assert "loss 5.0000  AR 4.0000  diffusion -  lr" in text
    assert lines[-1] == "run finished: step 10 of 10 after 1:01:40"


def test_plain_output_is_sparse(tmp_path: Path) -> None:
    """The clock stands still: only the first and the last step of each stage get a line."""
    display, out = _display(tmp_path, terminal=False, now=_Clock())
    _play(display, _info(tmp_path), 10)
    shown = [line.split()[1] for line in out.getvalue().splitlines() if line.startswith("step ") and "/" in line]
    assert shown == ["1/10", "6/10", "7/10", "10/10"]


@pytest.mark.parametrize(("at", "pause"), [(0.0, 2.0), (100.0, 5.0), (1e6, 60.0)])
def test_plain_lines_come_at_growing_intervals(tmp_path: Path, at: float, pause: float) -> None:
    now = _Clock()
    display, out = _display(tmp_path, terminal=False, now=now)
    _play(display, _info(tmp_path), 1)
    now.time = at
    display._line_time = now.time
    shown = []
    for step, passed in ((2, 0.98 * pause), (3, 1.1 * pause)):
        out.truncate(0)
        now.time = at + passed
        display.on_step(_step(step))
        shown.append(bool(out.getvalue()))
    assert shown == [False, True]


def test_the_first_step_of_a_start_says_how_long_it_took(tmp_path: Path) -> None:
    display, out = _display(tmp_path, terminal=False, now=_Clock())
    _play(display, _info(tmp_path, start_step=4), 10)
    (line,) = [line for line in out.getvalue().splitlines() if "process began" in line]
    words = line.split()
    assert " ".join(words[:4] + words[5:]) == "step 5 was done s after the process began"
    assert float(words[4]) == pytest.approx(time.time() - psutil.Process().create_time(), abs=5)


def test_resume_appends_to_the_log_and_says_so(tmp_path: Path) -> None:
    now = _Clock()
    first, _ = _display(tmp_path, terminal=False, now=now)
    _play(first, _info(tmp_path), 4)
    first.on_run_end()
    second, _ = _display(tmp_path, terminal=False, now=now)
    _play(second, _info(tmp_path, start_step=4), 10)
    second.on_run_end()
    lines = _log_lines(tmp_path)
    assert lines.index("run stopped: step 4 of 10 after 0:00:00") < lines.index(
        f"run        {tmp_path} resumes after step 4 of 10"
    )
    assert lines[0] == f"run        {tmp_path} starts"
    assert lines[-1] == "run finished: step 10 of 10 after 0:00:00"


@pytest.mark.parametrize("width", [50, 120])
def test_live_display(tmp_path: Path, width: int) -> None:
    now = _Clock()
    display, out = _display(tmp_path, terminal=True, now=now, width=width)
    display.on_run_start(_info(tmp_path))
    display.on_stage_start(STAGES[0])
    before = out.getvalue()
    assert "0/6" in before
    assert "0/4" in before
    now.time = 8.0
    display.on_step(_step(4))
    drawn = out.getvalue()[len(before) :]
    assert "4/6" in drawn
    assert "0/4" in drawn
    assert "1.2500" in drawn
    assert "step 4/10 (ar)" in drawn
    # 2 s a step: two more AR steps, and four joint ones at twice that.
    assert "0:00:20 left" in drawn
    before = out.getvalue()
    display.on_step(_step(5))
    assert out.getvalue() == before, "redrawn within 0.1 s"
    display.on_validation(_validation(5))
    assert "validation after step 5 (ar)" in out.getvalue()[len(before) :].replace("\n", " ")
    display.on_run_end()
    assert out.getvalue().endswith("run stopped: step 5 of 10 after 0:00:08\n")
    assert display._live is None
    assert any(line.startswith("step 4/10 (ar)  loss 1.2500") for line in _log_lines(tmp_path))


def test_live_display_after_resume_shows_finished_stages(tmp_path: Path) -> None:
    display, out = _display(tmp_path, terminal=True, now=_Clock())
    _play(display, _info(tmp_path, start_step=8), 9)
    display.on_run_end()
    assert "6/6" in out.getvalue()
    assert "2/4" in out.getvalue()
    assert "3/4" in out.getvalue()


def test_live_display_ends_with_the_last_step(tmp_path: Path) -> None:
    display, out = _display(tmp_path, terminal=True, now=_Clock())
    _play(display, _info(tmp_path, start_step=9), 9)
    display.on_stage_start(STAGES[1])
    assert display._live is not None
    display.on_step(_step(10))
    assert display._live is None
    before = out.getvalue()
    assert "4/4" in before
    display.on_message("exported")
    assert out.getvalue()[len(before) :] == "exported\n"


def test_nan_is_shown_as_nan(tmp_path: Path) -> None:
    display, out = _display(tmp_path, terminal=False, now=_Clock())
    display.on_run_start(_info(tmp_path))
    display.on_stage_start(STAGES[0])
    display.on_step(_step(1, loss=math.nan))
    assert "loss nan  AR 4.0000" in out.getvalue()


def test_time_left(tmp_path: Path) -> None:
    now = _Clock()
    left = TimeLeft(_info(tmp_path), now)
    left.stage_started(STAGES[0], last_step=0)
    now.time = 3.0
    assert left.seconds(3) == pytest.approx(3 * 1.0 + 4 * 2.0)
    left.stage_started(STAGES[1], last_step=6)
    now.time = 3.0 + 1.5
    assert left.seconds(7) == pytest.approx(3 * 1.5)
    assert left.seconds(10) == 0.0


def test_header_names_model_stages_and_choices(tmp_path: Path) -> None:
    lines = header_lines(_info(tmp_path))
    assert lines[-3:] == [
        "  stage  alpha  steps  clean tokens",
        "  ar     0      1..6   600",
        "  joint  0.3    7..10  400",
    ]
    assert "length     10 steps of 100 clean tokens" in lines


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00k"), (12_345, "12.3k"), (123_456, "123k"), (999_999, "1.00M"),
     (5_512_345, "5.51M"), (3.4e9, "3.40B"), (1e12, "1.00T"), (1.3e15, "1300T")],
)  # fmt: skip
def test_format_count(value: float, text: str) -> None:
    assert format_count(value) == text


def test_format_duration() -> None:
    assert [format_duration(seconds) for seconds in (0, 59.6, 3661, 200_000)] == [
        "0:00:00", "0:01:00", "1:01:01", "2d 7:33:20",
    ]  # fmt: skip


# --- a list of callbacks ----------------------------------------------------------------------------------------------


class _Recorder(Callback):
    def __init__(self, name: str, heard: list[str], fails: bool = False) -> None:
        self.name, self.heard, self.fails = name, heard, fails

    def on_message(self, text: str) -> None:
        self.heard.append(f"{self.name}: {text}")

    def on_run_end(self) -> None:
        self.heard.append(f"{self.name} ends")
        if self.fails:
            raise OSError(self.name)


def test_every_callback_is_ended_even_if_one_fails() -> None:
    heard: list[str] = []
    callbacks = CallbackList([_Recorder("a", heard, fails=True), _Recorder("b", heard)])
    callbacks.on_message("hello")
    with pytest.raises(OSError, match="a"):
        callbacks.on_run_end()
    assert heard == ["a: hello", "b: hello", "a ends", "b ends"]


def test_list_passes_every_event_on() -> None:
    """A new event in Callback must not be forgotten in CallbackList."""
    events = {name for name in vars(Callback) if name.startswith("on_")}
    assert events <= vars(CallbackList).keys()


def test_build_callbacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Config(run=RunConfig(dir=str(tmp_path)))
    callbacks = build_callbacks(config)
    assert [type(callback) for callback in callbacks.callbacks] == [JsonlWriter, ConsoleDisplay]
    _play(callbacks, _info(tmp_path), 10)
    callbacks.on_run_end()
    assert len(read_metrics(tmp_path / "metrics.jsonl").steps) == 10
    assert "run finished" in (tmp_path / "train.log").read_text()
    assert "run finished" in capsys.readouterr().out
    config.wandb.mode = WandbMode.offline
    with_wandb = build_callbacks(config).callbacks
    assert [type(callback) for callback in with_wandb] == [JsonlWriter, WandbLogger, ConsoleDisplay]


# --- Weights & Biases -------------------------------------------------------------------------------------------------


def test_wandb_disabled_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from nld_train.config.schema import Config, RunConfig\n"
        "from nld_train.training.callbacks import build_callbacks\n"
        f"build_callbacks(Config(run=RunConfig(dir={str(tmp_path)!r})))\n"
        "assert 'wandb' not in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(ValueError, match="disabled"):
        WandbLogger(WandbConfig())


def _read_wandb_log(path: Path) -> Iterator[Any]:
    """Protobuf records of an offline run's .wandb file.

    The file is a LevelDB log with a header of 7 bytes: blocks of 32 KiB, in each chunks of crc32 (4 bytes), length (2),
    kind (1: whole record, 2: first part, 3: middle, 4: last), data; a rest of a block under 7 bytes is padding.
    """
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = 7, b""
    while position < len(data):
        room = 32768 - position % 32768
        if room < 7:
            position += room
            continue
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        kind = data[position + 6]
        if kind == 0:
            position += room
            continue
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def _history(path: Path) -> list[dict[str, Any]]:
    rows = []
    for record in _read_wandb_log(path):
        if record.WhichOneof("record_type") == "history":
            rows.append(
                {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            )
    return rows


@pytest.fixture
def wandb_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the user's own wandb settings, and no trace outside the test's folder."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.mark.usefixtures("wandb_environment")
def test_wandb_offline_writes_a_run_that_can_be_read_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    config = WandbConfig(mode=WandbMode.offline, project="a-project")
    for start_step, last_step in ((0, 7), (6, 10)):
        if start_step:
            time.sleep(1.1)  # wandb names the folder of a start after the second it happened in
        logger = WandbLogger(config)
        _play(logger, _info(run_dir, start_step=start_step), last_step)
        print("a line of the run")
        logger.on_run_end()
    files = sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
    run_id = (run_dir / "wandb_run_id").read_text().strip()
    assert [path.name for path in files] == [f"run-{run_id}.wandb"] * 2
    first, second = _history(files[0]), _history(files[1])
    assert [row["_step"] for row in first] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["_step"] for row in second] == [8, 9, 10], "step 7 is there already"
    for row in first + second:
        step = row["_step"]
        expected = {name: value for name, value in _step(step).items() if name != "step" and value is not None}
        if step % 3 == 0:
            expected |= {name: value for name, value in _validation(step).items() if name != "step"}
        assert {name: value for name, value in row.items() if not name.startswith("_")} == expected
    runs = [record.run for record in _read_wandb_log(files[0]) if record.WhichOneof("record_type") == "run"]
    assert (runs[0].project, runs[0].run_id, runs[0].display_name) == ("a-project", run_id, "run")
    config_items = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config_items["model"]["hidden_size"] == 256
    exits = [
        record.exit.exit_code
        for path in files
        for record in _read_wandb_log(path)
        if record.WhichOneof("record_type") == "exit"
    ]
    assert exits == [1, 0], "the first start did not reach the last step"
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("a line of the run\n" * 2, "")
    kinds = {record.WhichOneof("record_type") for path in files for record in _read_wandb_log(path)}
    assert "history" in kinds
    assert not kinds & {"output", "output_raw"}, "the run's own output is not captured"
    assert last_offline_step(run_dir, run_id) == 10
    for folder in run_dir.glob("wandb/offline-run-*"):
        shutil.rmtree(folder)  # uploaded, and cleaned up
    assert last_offline_step(run_dir, run_id) == 10


def _sync(run_dir: Path, server: WandbServer) -> None:
    """Upload all offline runs, with wandb's own command."""
    folders = sorted(map(str, run_dir.glob("wandb/offline-run-*")))
    command = [sys.executable, "-m", "wandb", "sync", "--yes", *folders]
    environment = os.environ | {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.usefixtures("wandb_environment")
def test_wandb_sync_of_a_run_with_two_requeues_uploads_one_curve(tmp_path: Path) -> None:
    """Killed after step 7 with a checkpoint of step 6, killed after step 8 with one of step 3, then finished.

    A killed process loses the last row, which waits for more of its step; the next start takes it from metrics.jsonl.
    """
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    code = (
        "import importlib.util, os, signal, sys, time\n"
        "from pathlib import Path\n"
        f"spec = importlib.util.spec_from_file_location('these_tests', {__file__!r})\n"
        "tests = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(tests)\n"
        "run_dir, start_step, last_step = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])\n"
        "config = tests.WandbConfig(mode=tests.WandbMode.offline)\n"
        "writer = tests.JsonlWriter(run_dir / 'metrics.jsonl', print)\n"
        "callbacks = tests.CallbackList([writer, tests.WandbLogger(config)])\n"
        "tests._play(callbacks, tests._info(run_dir, start_step=start_step), last_step)\n"
        "if last_step == 10:\n"
        "    callbacks.on_run_end()\n"
        "else:\n"
        "    time.sleep(0.5)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for start_step, last_step in ((0, 7), (6, 8), (3, 10)):
        command = [sys.executable, "-c", code, str(run_dir), str(start_step), str(last_step)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert result.returncode == (0 if last_step == 10 else -signal.SIGKILL), result.stderr
    with wandb_server() as server:
        _sync(run_dir, server)
    assert server.run_ids == {(run_dir / "wandb_run_id").read_text().strip()}
    assert [row["_step"] for row in server.history] == list(range(1, 11))
    for row in server.history:
        step = row["_step"]
        assert row["loss"] == _step(step)["loss"]
        assert row.get("val_ar_loss") == (_validation(step)["val_ar_loss"] if step % 3 == 0 else None)


@pytest.mark.usefixtures("wandb_environment")
def test_wandb_online_resumes_behind_the_steps_that_the_server_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        for start_step, last_step in ((0, 7), (6, 9), (3, 10)):
            writer = JsonlWriter(run_dir / "metrics.jsonl", lambda text: None)
            callbacks = CallbackList([writer, WandbLogger(WandbConfig(mode=WandbMode.online))])
            _play(callbacks, _info(run_dir, start_step=start_step), last_step)
            callbacks.on_run_end()
    assert [row["_step"] for row in server.history] == list(range(1, 11))
    assert [row["loss"] for row in server.history] == [_step(step)["loss"] for step in range(1, 11)]


@pytest.mark.usefixtures("wandb_environment")
def test_wandb_does_not_start_for_a_finished_run(tmp_path: Path) -> None:
    logger = WandbLogger(WandbConfig(mode=WandbMode.offline))
    logger.on_run_start(_info(tmp_path, start_step=10))
    logger.on_run_end()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("wandb_environment")
@pytest.mark.parametrize("api_key", [None, "0" * 40])
def test_wandb_online_without_a_server_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, api_key: str | None
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    if api_key is not None:
        monkeypatch.setenv("WANDB_API_KEY", api_key)
    logger = WandbLogger(WandbConfig(mode=WandbMode.online), init_timeout=2.0)
    with pytest.raises(NLDError, match=r"wandb\.mode: online: Weights & Biases did not start: (?s:.)*wandb login"):
        logger.on_run_start(_info(tmp_path))
    logger.on_run_end()


def test_wandb_run_id_is_kept(tmp_path: Path) -> None:
    run_id = load_or_create_run_id(tmp_path)
    assert len(run_id) == 8
    assert load_or_create_run_id(tmp_path) == run_id
    assert [path.name for path in tmp_path.iterdir()] == ["wandb_run_id"]
    (tmp_path / "wandb_run_id").write_text("")
    with pytest.raises(NLDError, match="is not a run id"):
        load_or_create_run_id(tmp_path)


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def _event_type() -> Any:
    """TensorBoard's ``Event`` as far as it is used, for the protobuf library to read."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="event.proto", package="t", syntax="proto3")
    for message, fields in {
        "Value": [("tag", 1, field.TYPE_STRING, ""), ("simple_value", 2, field.TYPE_FLOAT, "")],
        "Summary": [("value", 1, field.TYPE_MESSAGE, ".t.Value")],
        "SessionLog": [("status", 1, field.TYPE_INT32, "")],
        "Event": [
            ("wall_time", 1, field.TYPE_DOUBLE, ""),
            ("step", 2, field.TYPE_INT64, ""),
            ("file_version", 3, field.TYPE_STRING, ""),
            ("summary", 5, field.TYPE_MESSAGE, ".t.Summary"),
            ("session_log", 7, field.TYPE_MESSAGE, ".t.SessionLog"),
        ],
    }.items():
        added = file.message_type.add(name=message)
        for name, number, kind, type_name in fields:
            label = field.LABEL_REPEATED if message == "Summary" else field.LABEL_OPTIONAL
            added.field.add(name=name, number=number, type=kind, label=label, type_name=type_name or None)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Event"))


def _events(path: Path) -> Iterator[Any]:
    def unmasked(crc: bytes) -> int:
        value = (struct.unpack("<I", crc)[0] - 0xA282EAD8) % 2**32
        return (value >> 17 | value << 15) % 2**32

    data, position = path.read_bytes(), 0
    while position < len(data):
        (length,) = struct.unpack("<Q", data[position : position + 8])
        assert crc32c(data[position : position + 8]) == unmasked(data[position + 8 : position + 12])
        content = data[position + 12 : position + 12 + length]
        assert crc32c(content) == unmasked(data[position + 12 + length : position + 16 + length])
        event = _event_type()()
        event.ParseFromString(content)
        yield event
        position += 16 + length


def test_tensorboard_reads_what_is_written(tmp_path: Path) -> None:
    """Two starts: the second tells TensorBoard to forget what the first one wrote from its first step on."""
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C
    for start_step, last_step in ((0, 7), (6, 10)):
        writer = TensorboardWriter(tmp_path)
        _play(writer, _info(tmp_path, start_step=start_step), last_step)
        writer.on_step(_step(11, loss=math.nan))
        writer.on_run_end()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    for path, (first, last) in zip(files, ((1, 7), (7, 10)), strict=True):
        version, session, *events = _events(path)
        assert version.file_version == "brain.Event:2"
        assert (session.step, session.session_log.status) == (first, 1)
        rows: dict[int, dict[str, float]] = {}
        for event in events:
            assert abs(event.wall_time - time.time()) < 600
            rows.setdefault(event.step, {}).update({item.tag: item.simple_value for item in event.summary.value})
        assert list(rows) == [*range(first, last + 1), 11]
        for step in range(first, last + 1):
            expected = _step(step) | (_validation(step) if step % 3 == 0 else {})
            expected = {name: value for name, value in expected.items() if isinstance(value, float | int)}
            assert rows[step] == pytest.approx({name: v for name, v in expected.items() if name != "step"}, rel=1e-6)
        assert "loss" not in rows[11]
    finished = TensorboardWriter(tmp_path)
    finished.on_run_start(_info(tmp_path, start_step=10))
    finished.on_run_end()
    assert len(list(tmp_path.iterdir())) == 2
