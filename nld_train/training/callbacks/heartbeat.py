"""``heartbeat.json``: what a run does at the moment, for batch scripts (which decide on a requeue) and for people.

``state`` is ``starting``, ``running``, ``stopped`` (on a signal, with a checkpoint), ``finished``, ``stalled`` (ended
by a watchdog), ``lost`` (a rank or its machine is gone, and the others have ended) or ``failed`` (an error was
reported: never start it again unseen). ``running`` of a run whose processes have gone means that all of them were
killed.
"""

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

HEARTBEAT_FILE = "heartbeat.json"
_MIN_SECONDS = 1.0  # between two writes for steps alone
_UNDER_WAY = ("starting", "running")


def read_heartbeat(run_dir: Path) -> dict[str, Any] | None:
    """The last one; None where there is none that can be read."""
    try:
        found = json.loads((run_dir / HEARTBEAT_FILE).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


class Heartbeat:
    """Writes the file. Rank 0 does so from :meth:`start` on; another rank only to say that it ends the run.

    Args:
        run_dir: folder of the run.
        rank: of this process.
        world_size: ranks of the run.
        writes: False: this process does not touch the folder (a replay).
    """

    def __init__(self, run_dir: Path, rank: int, world_size: int, *, writes: bool = True) -> None:
        self._writes = writes
        self._run_dir = run_dir
        self._rank = rank
        self._fields: dict[str, Any] = {"world_size": world_size}
        self._written_at = 0.0
        self._has_started = False

    def start(self, num_steps: int) -> None:
        """``starting``: this process holds the run's folder (rank 0)."""
        previous = read_heartbeat(self._run_dir)
        self._fields |= {
            "step": 0 if previous is None else previous.get("step", 0),
            "num_steps": num_steps,
            "stage": "",
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "restarts": 0 if previous is None else previous.get("restarts", 0) + 1,
            "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        }
        self._has_started = True
        self.state("starting")

    def step(self, step: int, stage: str) -> None:
        """After each step, and with the last finished one before the first; written once a second (rank 0)."""
        self._fields |= {"step": step, "stage": stage}
        if self._has_started and time.monotonic() - self._written_at >= _MIN_SECONDS:
            self.state("running")

    def warn(self, text: str) -> None:
        """What somebody should look at; stays in the file until the run is started again."""
        self._fields["warning"] = text
        self.state(None)

    def state(self, state: str | None, message: str = "") -> None:
        """Write; None: only the message is new. Nothing happens where the folder is not this run's, and ``lost`` does
        not replace what another rank has said of the end.

        Never raises: a full disk is no reason to end a run.
        """
        if not self._writes:
            return
        fields = {**self._fields, "message": message, "time": time.time()}
        previous = read_heartbeat(self._run_dir) if self._rank != 0 or state == "lost" else None
        if state == "lost" and previous is not None and previous.get("state") not in _UNDER_WAY:
            return
        if self._rank != 0:
            if previous is None:
                return
            fields = {**previous, "message": message, "time": time.time()}
        elif not self._has_started:
            return
        if state is not None:
            fields["state"] = self._fields["state"] = state
        path = self._run_dir / HEARTBEAT_FILE
        temporary = path.with_name(f".{path.name}.{self._rank}.tmp")
        try:
            temporary.write_text(json.dumps(fields, sort_keys=True) + "\n")
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        self._written_at = time.monotonic()
