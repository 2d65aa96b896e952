"""What is known of GPUs by their names, and what a configuration may ask for that is not there."""

import platform as machine
import sys
import sysconfig
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from nld_train.config.schema import CompilePointwise, Config, Device, LayerSpec, Precision
from nld_train.errors import ConfigError
from nld_train.platform.cpu import cpu_info
from nld_train.platform.device import (
    Platform,
    check_compiler,
    check_layer_spec,
    initialize_device,
    missing_libraries,
    peak_tflops,
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H20", 148.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A40", 150.0),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_tflops(name: str, expected: float | None) -> None:
    assert peak_tflops(name) == expected


def platform(device: str, *, has_transformer_engine: bool) -> Platform:
    return Platform(
        device=torch.device(device),
        distributed_backend="nccl",
        has_transformer_engine=has_transformer_engine,
        has_apex=False,
    )


@pytest.mark.parametrize(
    ("device", "is_installed", "precision", "found"),
    [
        ("cpu", True, Precision.bf16, r"model.layer_spec: transformer_engine needs a GPU.*\n.*=local"),
        (
            "cuda",
            False,
            Precision.bf16,
            r"model.layer_spec: .* cannot be imported: ModuleNotFoundError: No module.*\n.*=local",
        ),
        ("cuda", True, Precision.bf16, None),
        ("cuda", True, Precision.fp8, r"train.precision: fp8, but Some A100 has no FP8 products\n.*=bf16"),
    ],
)
def test_transformer_engine_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, device: str, is_installed: bool, precision: Precision, found: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some A100")
    config = Config()
    config.train.precision = precision
    here = platform(device, has_transformer_engine=is_installed)
    check_layer_spec(config, here)  # local needs none of it
    config.model.layer_spec = LayerSpec.transformer_engine
    with pytest.raises(ConfigError, match=found) if found is not None else nullcontext():
        check_layer_spec(config, here)


def test_compilation_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where train.device=auto has become the CPU; on a GPU it is torch's own business."""
    config = Config()
    config.model.compile_pointwise = CompilePointwise.always
    monkeypatch.setenv("CXX", "/nowhere/c++")
    check_compiler(config, platform("cuda", has_transformer_engine=False))
    with pytest.raises(ConfigError, match=r"model.compile_pointwise: always, but .*/nowhere/c\+\+.*\n.*CXX.*=auto"):
        check_compiler(config, platform("cpu", has_transformer_engine=False))
    monkeypatch.setenv("CXX", sys.executable)  # some program
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    (tmp_path / "Python.h").touch()
    check_compiler(config, platform("cpu", has_transformer_engine=False))
    monkeypatch.setenv("CXX", "/nowhere/c++")
    check_compiler(Config(), platform("cpu", has_transformer_engine=False))


def test_on_a_gpu_functions_may_have_many_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled as they are, with fullgraph, one more than the limit ends the run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    with torch._dynamo.config.patch(recompile_limit=8):
        assert initialize_device(Device.cuda).is_cuda
        assert torch._dynamo.config.recompile_limit >= 64


def test_what_is_not_installed_is_said() -> None:
    lines = missing_libraries(platform("cuda", has_transformer_engine=False))
    assert len(lines) == 2
    assert "ModuleNotFoundError" in lines[0]
    assert len(missing_libraries(platform("cuda", has_transformer_engine=True))) == 1


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists() or machine.machine() != "x86_64", reason="needs Linux on x86-64")
def test_what_the_processor_can_do_is_read() -> None:
    assert {"fpu", "sse2"} <= cpu_info().flags


NEOVERSE = """\
processor\t: 0
BogoMIPS\t: 2000.00
Features\t: fp asimd bf16
CPU implementer\t: 0x41
CPU architecture: 8
CPU part\t: 0xd4f

processor\t: 1
"""


def test_what_a_processor_without_a_name_can_do_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """aarch64: libraries in a home that two kinds of machines share are told apart by this."""
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: NEOVERSE)
    assert cpu_info.__wrapped__() == ("0x41", "", "0xd4f", {"fp", "asimd", "bf16"})
