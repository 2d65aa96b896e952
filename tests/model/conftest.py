"""Fixtures of the model's tests."""

import pytest
import torch

from nld_train.model import linear


@pytest.fixture(params=[False, True], ids=["torch", "oneDNN"])
def fast_onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """fp32 products by either library, whatever the processor."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no oneDNN here")
    monkeypatch.setattr(linear, "has_fast_onednn", lambda: request.param)
    return bool(request.param)
