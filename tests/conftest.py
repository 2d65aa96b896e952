"""For all tests: one thread per process, and nothing from the network.

Set before torch is imported and inherited by every process a test starts; torch itself is not imported here, because
many tests do without it.
"""

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("WANDB_MODE", "offline")

pytest_plugins = ["nld_train.testing.fixtures"]
