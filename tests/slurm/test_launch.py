"""slurm/launch.py: the ranks' variables, their exit status, and one SIGUSR1 each."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "slurm/launch.py"
SLURM = {
    "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8",
    "MASTER_ADDR": "localhost",
}  # fmt: skip

# A rank: deaf at first, as one that loads its libraries; then it counts what it gets for a second after the first.
RANK = """
import os, signal, sys, time
out = sys.argv[1] + os.environ["RANK"]
open(out + ".born", "w").close()
time.sleep(float(sys.argv[2]))
got = []
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from torchrun, when the other one has ended
signal.signal(signal.SIGUSR1, lambda *_: got.append(time.monotonic()))
open(out + ".listens", "w").close()
while not got or time.monotonic() < got[0] + 1:
    time.sleep(0.02)
variables = [os.environ[name] for name in ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")]
open(out, "w").write(" ".join([str(len(got)), *variables]))
sys.exit(75)
"""


def start(launcher: str, program: Path, *arguments: object, port: int = 0) -> "subprocess.Popen[str]":
    command = [sys.executable, str(LAUNCH), launcher, "2", str(program), *map(str, arguments)]
    return subprocess.Popen(
        command, env=os.environ | SLURM | {"MASTER_PORT": str(port)}, stderr=subprocess.PIPE, text=True
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "rank.py"
    path.write_text(RANK)
    return path


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_rank_that_is_still_loading_gets_the_signal_later_and_once(
    tmp_path: Path, program: Path, number: signal.Signals
) -> None:
    process = start("task", program, tmp_path / "out", 1)
    wait_for(tmp_path / "out5.born", process)
    process.send_signal(number)
    time.sleep(0.3)
    process.send_signal(number)
    assert process.wait(30) == 75
    assert (tmp_path / "out5").read_text() == "1 1 8 2"


def test_torchrun_survives_and_each_of_its_ranks_gets_one(tmp_path: Path, program: Path) -> None:
    process = start("torchrun", program, tmp_path / "out", 0, port=free_port())
    for rank in range(2):
        wait_for(tmp_path / f"out{rank}.listens", process)
    agent = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
    os.kill(agent, signal.SIGUSR1)  # where all processes of a task are signalled
    os.kill(agent, signal.SIGUSR2)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(60) == 75
    words = process.communicate()[1]
    assert "rank 0 has ended with status 75" in words
    assert "Traceback" not in words
    assert [(tmp_path / f"out{rank}").read_text() for rank in range(2)] == ["1 0 2 2", "1 1 2 2"]


def test_an_error_of_one_rank_is_the_status_of_its_node(tmp_path: Path) -> None:
    """Whatever the others end with, and although torchrun ends those that are left."""
    path = tmp_path / "rank.py"
    path.write_text("import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(3)\ntime.sleep(100)")
    process = start("torchrun", path, port=free_port())
    assert process.wait(60) == 3, process.communicate()[1]


@pytest.mark.parametrize(
    ("program_text", "status"),
    [("raise SystemExit(3)", 3), ("raise SystemExit(2)", 78), ("import os; os.kill(os.getpid(), 9)", 137)],
)
def test_the_exit_status_is_the_ranks(tmp_path: Path, program_text: str, status: int) -> None:
    path = tmp_path / "rank.py"
    path.write_text(program_text)
    assert start("task", path).wait(30) == status


def test_a_program_that_is_not_there_is_no_refusal(tmp_path: Path) -> None:
    """Python ends with 2, too; a node without the folder is not the configuration's fault."""
    assert start("task", tmp_path / "nowhere.py").wait(30) == 2
