"""Which device this process computes on, and what is installed there."""

import importlib.util
import os
from dataclasses import dataclass

import torch

from nld_train.config.schema import Device
from nld_train.errors import ConfigError, Problem
from nld_train.platform import cpu


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """What was chosen for this process.

    Args:
        device: where parameters and activations live.
        distributed_backend: ``nccl`` or ``gloo``.
        has_transformer_engine: NVIDIA Transformer Engine can be imported.
        has_apex: NVIDIA Apex (built from source; PyPI's ``apex`` is another project) can be imported.
    """

    device: torch.device
    distributed_backend: str
    has_transformer_engine: bool
    has_apex: bool

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"


def _has_nvidia_apex() -> bool:
    # PyPI's "apex" is an unrelated package; NVIDIA's has a multi_tensor_apply sub-package.
    return (
        importlib.util.find_spec("apex") is not None and importlib.util.find_spec("apex.multi_tensor_apply") is not None
    )


def initialize_device(choice: Device) -> Platform:
    """Choose the device, and on the CPU let Megatron's CUDA names mean the CPU (:mod:`nld_train.platform.cpu`).

    Raises:
        ConfigError: ``train.device=cuda`` and no GPU is visible.
    """
    has_gpu = torch.cuda.is_available()
    if choice is Device.cuda and not has_gpu:
        raise ConfigError(
            [
                Problem(
                    "train.device",
                    "cuda, but no GPU is visible to torch",
                    "use train.device=auto or cpu, or check the driver",
                )
            ]
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if has_gpu and choice is not Device.cpu:
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                [
                    Problem(
                        "train.device",
                        f"local rank {local_rank} has no GPU of its own: {torch.cuda.device_count()} are visible",
                        f"launch with --nproc-per-node {torch.cuda.device_count()}, or use train.device=cpu",
                    )
                ]
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
        # Ranks of one machine share its cores; torchrun's default of one thread each leaves the others idle.
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))
        cpu.enter()
    return Platform(
        device=device,
        distributed_backend=backend,
        has_transformer_engine=importlib.util.find_spec("transformer_engine") is not None,
        has_apex=_has_nvidia_apex(),
    )
