"""What is known of GPUs by their names, and what a configuration may ask for that is not there."""

from contextlib import nullcontext

import pytest
import torch

from nld_train.config.schema import Config, LayerSpec, Precision
from nld_train.errors import ConfigError
from nld_train.platform.device import Platform, check_layer_spec, peak_tflops


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
