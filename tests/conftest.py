"""For all tests: one thread per process, and nothing from the network.

Set before torch is imported and inherited by every process a test starts; torch itself is not imported here, because
many tests do without it.
"""

import os
from pathlib import Path

import pytest

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("WANDB_MODE", "offline")

pytest_plugins = ["nld_train.testing.fixtures"]

SLOW_FILES = (
    "test_main_job.py",
    "slurm/test_runs.py",
    "hf_repo/test_decoding.py",
    "checkpoint/test_chain.py",
    "checkpoint/test_conversion.py",
    "training/test_trainer_metrics.py",
    "training/test_stopping.py",
    "training/test_faults.py",
    "data/test_corpora.py",
    "data/test_encoding.py",
    "distributed/test_layouts.py",
    "numerics/test_estimators.py",
    "scripts/test_prepare_data.py",
    "scripts/test_estimator_variance.py",
)
"""Begun first, by their time (--durations=0 shows it): xdist gives a file to one process, and the others would wait for
one that is begun last. It keeps this order with --no-loadscope-reorder."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent
    order = {folder / name: place for place, name in enumerate(SLOW_FILES)}
    if gone := [path for path in order if not path.is_file()]:
        raise pytest.UsageError(f"{__file__}: SLOW_FILES names {gone[0]}, which is not there")
    items.sort(key=lambda item: order.get(item.path, len(order)))
