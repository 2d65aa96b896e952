"""For all tests: one thread per process, and nothing from the network.

Set before torch is imported and inherited by every process a test starts; torch itself is not imported here, because
many tests do without it.
"""

import os

import pytest

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("WANDB_MODE", "offline")

pytest_plugins = ["nld_train.testing.fixtures"]

SLOW_FILES = (
    "tests/slurm/test_runs.py",
    "tests/test_main_job.py",
    "tests/training/test_trainer_metrics.py",
    "tests/training/test_faults.py",
    "tests/training/test_stopping.py",
    "tests/checkpoint/test_chain.py",
    "tests/distributed/test_context_parallel.py",
    "tests/scripts/test_estimator_variance.py",
)
"""A file is the work of one process; begun last, one of these would leave the other process idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(SLOW_FILES))
