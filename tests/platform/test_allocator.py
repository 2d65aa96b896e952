"""What a process keeps of the memory that it freed."""

import os
import subprocess
import sys

import pytest

MEGABYTES = 400

_PROGRAM = f"""
import sys
import psutil
import torch
from nld_train.platform.cpu import keep_freed_memory
torch.ones(1)
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
before = psutil.Process().memory_info().rss
torch.ones({MEGABYTES} << 18)
print(kept, (psutil.Process().memory_info().rss - before) >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize(
    ("mode", "variables", "kept", "keeps"),
    [
        ("keep", {}, "True", True),
        ("default", {}, "None", False),
        ("keep", {"MALLOC_TRIM_THRESHOLD_": "131072"}, "False", False),  # the user's own setting wins
    ],
)
def test_freed_memory_is_kept(mode: str, variables: dict[str, str], kept: str, keeps: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, mode], env=environment | variables, capture_output=True, text=True, check=True
    )
    said, megabytes = done.stdout.split()
    assert said == kept
    assert (int(megabytes) > MEGABYTES * 0.9) == keeps
    assert int(megabytes) < MEGABYTES * 1.3
