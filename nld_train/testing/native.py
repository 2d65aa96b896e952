"""Tests of what the project compiles."""

import pytest

from nld_train.model.native_attention import missing_for_native

_MISSING = missing_for_native()
needs_native = pytest.mark.skipif(_MISSING is not None, reason=f"nothing compiles: {_MISSING}")
