"""Weights & Biases. The package is imported only when a run is really logged there."""

import os
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nld_train.config.schema import WandbConfig, WandbMode
from nld_train.errors import NLDError
from nld_train.training.callbacks.base import Callback, RunInfo

if TYPE_CHECKING:
    import wandb

RUN_ID_FILE = "wandb_run_id"


def load_or_create_run_id(run_dir: Path) -> str:
    """The run's id on Weights & Biases: made once, kept beside the run, the same after every resume.

    Raises:
        NLDError: the file holds something else.
    """
    path = run_dir / RUN_ID_FILE
    if path.exists():
        run_id = path.read_text(encoding="utf-8", errors="replace").strip()
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", run_id):
            raise NLDError(str(path), f"is not a run id: {run_id[:40]!r}", "remove the file to start a new curve")
        return run_id
    run_id = secrets.token_hex(4)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(run_id + "\n", encoding="utf-8")
    temporary.replace(path)
    return run_id


class WandbLogger(Callback):
    """Logs step and validation records on one step axis, each metric under its name in ``metrics.jsonl``.

    A run killed after its last checkpoint computes some steps twice. They come out equal, and wandb takes no row for a
    step it already has, so the curve stays one line. Offline, each start writes its own ``wandb/offline-run-*`` folder
    with the same run id; ``wandb sync`` uploads them.

    Args:
        config: mode offline or online, project, name.
        init_timeout: seconds to wait for the server.

    Raises:
        NLDError: ``on_run_start`` could not start the run (no API key, server out of reach).
    """

    def __init__(self, config: WandbConfig, init_timeout: float = 90.0) -> None:
        if config.mode is WandbMode.disabled:
            raise ValueError("WandbLogger is not built when wandb.mode=disabled")
        self._config = config
        self._init_timeout = init_timeout
        self._run: wandb.Run | None = None
        self._num_steps = 0
        self._last_step = 0

    def on_run_start(self, info: RunInfo) -> None:
        if info.start_step >= info.num_steps:
            return  # a finished run was started again: nothing will be logged
        import wandb

        settings = wandb.Settings(
            silent=True,  # the run has its own display
            console="off",  # train.log holds the output
            init_timeout=self._init_timeout,
            disable_git=True,
            disable_job_creation=True,
        )
        # wandb falls back to a temporary folder, without an error, where the given one is not writable
        if not os.access(info.run_dir, os.W_OK):
            raise NLDError(str(info.run_dir), "is not writable", "fix the folder's rights or choose another run.dir")
        try:
            self._run = wandb.init(
                project=self._config.project,
                name=self._config.name if self._config.name is not None else info.run_dir.name,
                id=load_or_create_run_id(info.run_dir),
                resume="allow",
                dir=info.run_dir,
                mode="offline" if self._config.mode is WandbMode.offline else "online",
                config=info.config,
                settings=settings,
            )
        except wandb.Error as failure:
            reason = str(failure).strip().splitlines()[0]
            raise NLDError(
                "wandb.mode",
                f"{self._config.mode.value}: Weights & Biases did not start: {reason}",
                "run `wandb login` and check the connection, or set wandb.mode=offline (or disabled)",
            ) from failure
        self._num_steps = info.num_steps
        self._last_step = info.start_step

    def _log(self, record: dict[str, Any]) -> None:
        if self._run is None:
            raise RuntimeError("WandbLogger is used outside of a run: on_run_start first, nothing after on_run_end")
        step = record["step"]
        values = {name: value for name, value in record.items() if name != "step" and value is not None}
        self._run.log(values, step=step)
        self._last_step = step

    def on_step(self, record: dict[str, Any]) -> None:
        self._log(record)

    def on_validation(self, record: dict[str, Any]) -> None:
        self._log(record)

    def on_run_end(self) -> None:
        if self._run is not None:
            import wandb

            self._run.finish(exit_code=0 if self._last_step >= self._num_steps else 1)
            self._run = None
            # finish() returns before wandb's own process has written the last records to its file
            wandb.teardown()
