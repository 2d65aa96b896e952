"""pytest fixtures: pools of gloo ranks, whose processes start when first used and are shared by the whole session."""

from collections.abc import Iterator

import pytest

from nld_train.testing.ranks import RankPool, RankProcesses


@pytest.fixture(scope="session")
def rank_processes() -> Iterator[RankProcesses]:
    with RankProcesses() as processes:
        yield processes


@pytest.fixture(scope="session")
def one_rank(rank_processes: RankProcesses) -> RankPool:
    """A process of its own, so that the CPU compatibility mode stays out of the test's process."""
    return RankPool(1, rank_processes)


@pytest.fixture(scope="session")
def two_ranks(rank_processes: RankProcesses) -> RankPool:
    return RankPool(2, rank_processes)


@pytest.fixture(scope="session")
def four_ranks(rank_processes: RankProcesses) -> RankPool:
    return RankPool(4, rank_processes)
