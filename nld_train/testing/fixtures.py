"""pytest fixtures: pools of gloo ranks, started when first used and shared by the whole session."""

from collections.abc import Iterator

import pytest

from nld_train.testing.ranks import RankPool


@pytest.fixture(scope="session")
def one_rank() -> Iterator[RankPool]:
    """A process of its own, so that the CPU compatibility mode stays out of the test's process."""
    with RankPool(1) as pool:
        yield pool


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool
