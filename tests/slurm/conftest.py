"""A cluster of three nodes for the tests that want one."""

from collections.abc import Iterator

import pytest

from nld_train.testing.slurm import Cluster, missing


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(f"no Slurm cluster can be started here: {reason}")
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), num_nodes=3)
    yield cluster
    cluster.stop()
