"""Those who listen to a run: ``metrics.jsonl``, the display with ``train.log``, Weights & Biases, TensorBoard."""

from pathlib import Path

from nld_train.config.schema import Config, WandbMode
from nld_train.training.callbacks.base import Callback, CallbackList, RunInfo, StageInfo
from nld_train.training.callbacks.console import ConsoleDisplay
from nld_train.training.callbacks.jsonl import JsonlWriter
from nld_train.training.callbacks.tensorboard import TensorboardWriter
from nld_train.training.callbacks.wandb import WandbLogger

__all__ = ["Callback", "CallbackList", "RunInfo", "StageInfo", "build_callbacks"]


def build_callbacks(config: Config) -> CallbackList:
    """The callbacks of rank 0; ``run.dir`` must exist.

    The display comes last: where another one cannot start, the error does not meet a half-drawn picture.
    """
    run_dir = Path(config.run.dir)
    display = ConsoleDisplay(run_dir / "train.log")
    callbacks: list[Callback] = [JsonlWriter(run_dir / "metrics.jsonl", say=display.on_message)]
    if config.tensorboard.enabled:
        callbacks.append(TensorboardWriter(run_dir / "tensorboard"))
    if config.wandb.mode is not WandbMode.disabled:
        callbacks.append(WandbLogger(config.wandb))
    return CallbackList([*callbacks, display])
