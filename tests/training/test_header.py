"""What a run says of its kernels before it starts."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from nld_train.config.schema import AttentionBackend, Config, Device, Precision
from nld_train.errors import ConfigError
from nld_train.model import attention
from nld_train.platform.device import Platform
from nld_train.training import run as module
from nld_train.training.run import chosen_kernels, other_attention, run

CPU = Platform(device=torch.device("cpu"), distributed_backend="gloo", has_transformer_engine=False, has_apex=False)


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    for where in (attention, module):
        monkeypatch.setattr(where, "missing_for_native", lambda: "there is no compiler\nwhere one looked")


def test_why_attention_is_not_native_is_said_where_it_was_not_chosen() -> None:
    config = Config()
    assert chosen_kernels(config, CPU)["attention"] == "chunked (not native: there is no compiler)"
    config.model.attention_backend = AttentionBackend.chunked
    assert chosen_kernels(config, CPU)["attention"] == "chunked"


@pytest.mark.parametrize(
    ("is_pair", "words"), [(True, "native, bf16 operands (AVX512-BF16)"), (False, "native, fp32 operands")]
)
def test_native_says_how_it_multiplies_bf16(monkeypatch: pytest.MonkeyPatch, is_pair: bool, words: str) -> None:
    for where in (attention, module):
        monkeypatch.setattr(where, "missing_for_native", lambda: None)
    monkeypatch.setattr(
        "nld_train.model.native_attention._library", lambda: type("_", (), {"nld_multiplies_bf16": lambda _: is_pair})()
    )
    config = Config()
    config.train.precision = Precision.bf16
    assert chosen_kernels(config, CPU)["attention"] == words
    config.train.precision = Precision.fp32
    assert chosen_kernels(config, CPU)["attention"] == "native"


def test_ranks_with_another_attention_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def gathered(of_all: list[str | None], own: str | None, group: Any) -> None:
        of_all[:] = [None, "there is no compiler\nmore", None]

    monkeypatch.setattr(dist, "get_world_size", lambda _: 3)
    monkeypatch.setattr(dist, "all_gather_object", gathered)
    config = Config()
    [line] = other_attention(config, CPU, None)
    assert line.startswith("rank 1 computes attention by chunked, unlike rank 0")
    assert line.endswith("(there is no compiler)")
    config.model.attention_backend = AttentionBackend.chunked
    assert other_attention(config, CPU, None) == []


def test_native_attention_that_cannot_be_compiled_is_refused_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "initialize_device", lambda _: CPU)
    monkeypatch.setattr(module, "check_compiler", lambda *_: None)  # there is one, but not GCC
    monkeypatch.setattr(module, "Supervisor", None)
    config = Config()
    config.train.device = Device.cpu
    config.model.attention_backend = AttentionBackend.native
    with pytest.raises(ConfigError, match=r"model\.attention_backend: native cannot be compiled here: there is no"):
        run(config)
