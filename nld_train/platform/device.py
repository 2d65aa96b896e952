"""Which device this process computes on, and what is installed there."""

import importlib
import importlib.util
import os
import re
from dataclasses import dataclass
from importlib import metadata

import torch

from nld_train.config.rules import compilation_problems
from nld_train.config.schema import Config, Device, LayerSpec, Precision
from nld_train.errors import ConfigError, Problem
from nld_train.platform import cpu

_PEAK_TFLOPS = {
    "B300": 2250.0,
    "B200": 2250.0,
    "H20": 148.0,
    "H200": 989.0,
    "GH200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "A40": 150.0,
}
"""Dense bf16, 1e12 operations a second, from the makers' data sheets."""


def peak_tflops(name: str) -> float | None:
    """Of a GPU by the name that torch gives, 1e12 dense bf16 operations a second; None where it is not known."""
    for gpu in sorted(_PEAK_TFLOPS, key=len, reverse=True):
        # "NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"; "H20" is no part of "H200".
        if re.search(rf"\b{gpu}\b", name):
            return _PEAK_TFLOPS[gpu]
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """What was chosen for this process.

    Args:
        device: where parameters and activations live.
        distributed_backend: ``nccl`` or ``gloo``.
        has_transformer_engine: Megatron could import NVIDIA Transformer Engine.
        has_apex: NVIDIA Apex (built from source; PyPI's ``apex`` is another project) is installed.
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


def library_version(name: str) -> str:
    """Of an installed distribution, for people to read; Apex, built from source, may have none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _import_error() -> str:
    """Why not: its library, built for one version of torch, or a package that it needs may be what is missing."""
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "Megatron-Core does not find in it what it needs"


def missing_libraries(platform: Platform) -> list[str]:
    """What a GPU's run goes without, one line each, and why."""
    lines = []
    if not platform.has_transformer_engine:
        lines.append(f"Transformer Engine is not here, so its layers and FP8 are not looked at: {_import_error()}")
    if not platform.has_apex:
        lines.append("NVIDIA Apex is not here, so its fused kernels are not looked at")
    return lines


def check_layer_spec(config: Config, platform: Platform) -> None:
    """What ``model.layer_spec`` and ``train.precision`` ask for is here.

    Raises:
        ConfigError: Transformer Engine is asked for and there is no GPU, it is not installed, or the GPU has no FP8.
    """
    if config.model.layer_spec is not LayerSpec.transformer_engine:
        return
    key, problem = "model.layer_spec", None
    if not platform.is_cuda:
        problem = Problem(key, "transformer_engine needs a GPU, and the run is on the CPU", f"use {key}=local")
    elif not platform.has_transformer_engine:
        problem = Problem(
            key,
            f"transformer_engine, but NVIDIA Transformer Engine cannot be imported: {_import_error()}",
            f"use {key}=local, or install it, built for torch {torch.__version__}, with what it needs",
        )
    elif config.train.precision is Precision.fp8 and torch.cuda.get_device_capability(platform.device) < (8, 9):
        name = torch.cuda.get_device_name(platform.device)
        problem = Problem("train.precision", f"fp8, but {name} has no FP8 products", "use train.precision=bf16")
    if problem is not None:
        raise ConfigError([problem])


def check_compiler(config: Config, platform: Platform) -> None:
    """What ``model.compile_pointwise`` and ``model.attention_backend`` need on a CPU is here.

    Raises:
        ConfigError: it is not.
    """
    if not platform.is_cuda and (problems := list(compilation_problems(config))):
        raise ConfigError(problems)


_COMPILED_GRAPHS = 64


def _let_compile() -> None:
    """Of one function more graphs than torch's 8, at which a run would end: a stage, its validation without gradients,
    and every shape that is not counted as the same want one each."""
    from torch._dynamo import config  # heavy

    config.recompile_limit = max(config.recompile_limit, _COMPILED_GRAPHS)


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
        _let_compile()
        backend = "nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
        # Ranks of one machine share its cores; torchrun's default of one thread each leaves the others idle.
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))
        cpu.enter()
    from megatron.core.extensions.transformer_engine import HAVE_TE  # heavy, and any run imports it anyway

    return Platform(
        device=device,
        distributed_backend=backend,
        has_transformer_engine=HAVE_TE,
        has_apex=_has_nvidia_apex(),
    )
