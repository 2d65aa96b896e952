#!/usr/bin/env python
"""What srun starts: one of these per node, which runs torchrun, or one per rank, which runs the rank.

    launch.py torchrun RANKS_PER_NODE PROGRAM [ARGUMENT ...]
    launch.py task RANKS_PER_NODE PROGRAM [ARGUMENT ...]

SIGUSR2 or SIGTERM asks the ranks to stop: each gets SIGUSR1, once, as soon as it listens for it. A rank that is still
loading would lose the signal or die of it, and torchrun does not hand it on.
The exit status is that of the program: 128 + n for signal n, 78 for its 2, a configuration that it refuses.
MASTER_ADDR, MASTER_PORT and Slurm's variables are read.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

POLL_SECONDS = 0.2
EXIT_REFUSED = 78
"""EX_CONFIG: train.py has refused its configuration (its own status is 2). Nothing is started again."""


def main(arguments: Sequence[str]) -> int:
    launcher, *rest = arguments
    if launcher == "agent":
        return run_agent(rest)
    ranks_per_node, *program = rest
    asked: list[int] = []
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda number, _: asked.append(number))
    process = subprocess.Popen(
        [sys.executable, *(agent_options(int(ranks_per_node)) if launcher == "torchrun" else []), *program],
        env=os.environ | (rank_environment(int(ranks_per_node)) if launcher == "task" else {}),
        preexec_fn=ignore_user_signals,
    )
    told: set[int] = set()
    while True:
        try:
            status = process.wait(POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if asked:
                ask_to_stop([process.pid] if launcher == "task" else children(process.pid), told)
            continue
        # 2 is also how Python ends that finds no program: on one node without the folder, say.
        return EXIT_REFUSED if status == 2 and Path(program[0]).exists() else status if status >= 0 else 128 - status


def run_agent(arguments: Sequence[str]) -> int:
    """torchrun, with the exit status of its ranks: its own command ends with 1 and a traceback whatever they say."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(list(arguments)))
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in sorted(error.failures.items())}
        statuses = {rank: code if code >= 0 else 128 - code for rank, code in codes.items()}
        for rank, status in statuses.items():
            print(f"rank {rank} has ended with status {status}", file=sys.stderr)
        # An error counts before "start me again", and that before a signal: torchrun ends those that are left by one.
        return min(statuses.values())
    return 0


def agent_options(ranks_per_node: int) -> list[str]:
    """This file as torchrun on one of the job's nodes; the program follows."""
    return [
        *(__file__, "agent", "--max-restarts=0", f"--nproc-per-node={ranks_per_node}"),
        *(f"--nnodes={os.environ['SLURM_JOB_NUM_NODES']}", f"--node-rank={os.environ['SLURM_NODEID']}"),
        *(f"--master-addr={os.environ['MASTER_ADDR']}", f"--master-port={os.environ['MASTER_PORT']}"),
    ]


def rank_environment(ranks_per_node: int) -> dict[str, str]:
    """Of a task: the variables that torchrun sets for its ranks."""
    return {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "WORLD_SIZE": os.environ["SLURM_NTASKS"],
        "LOCAL_WORLD_SIZE": str(ranks_per_node),
    }


def ignore_user_signals() -> None:
    """In the program before it starts: where the tracking of processes sends a task's signals to all that it has
    started, they must not end torchrun. A rank that listens is not kept from it."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def children(pid: int) -> list[int]:
    """Processes that ``pid`` has started itself."""
    try:
        return [child.pid for child in psutil.Process(pid).children()]
    except psutil.NoSuchProcess:
        return []


def ask_to_stop(ranks: Sequence[int], told: set[int]) -> None:
    """Send SIGUSR1 to those that listen for it and are not in ``told`` yet."""
    for pid in ranks:
        if pid not in told and listens(pid):
            told.add(pid)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)


def listens(pid: int) -> bool:
    """Has the process a handler for SIGUSR1?"""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (signal.SIGUSR1 - 1) & 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
