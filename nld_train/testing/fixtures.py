"""pytest fixtures, each shared by the whole session: a cache of corpora, and pools of gloo ranks, whose processes start
when first used."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nld_train.testing.ranks import RankPool, RankProcesses


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``data.cache_dir`` of the runs, also of those in other processes of pytest-xdist: the first one prepares a
    corpus, which takes longer than any run."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    (folder / "cache").mkdir(exist_ok=True)
    return folder / "cache"


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
