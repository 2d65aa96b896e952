"""pytest fixtures, each shared by the whole session: a cache of corpora, and pools of gloo ranks, whose processes start
when first used. And what tests are skipped without."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nld_train.config.rules import missing_for_compilation
from nld_train.testing.ranks import RankPool, RankProcesses

_MISSING = missing_for_compilation()
needs_compiler = pytest.mark.skipif(_MISSING is not None, reason=f"nothing compiles: {_MISSING[0] if _MISSING else ''}")


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
