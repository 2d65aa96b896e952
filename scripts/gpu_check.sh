#!/usr/bin/env bash
# Correctness of the CUDA paths on a machine with one GPU and no network. Ends with one line: passed or not.
#   scripts/gpu_check.sh [PYTHON]     PYTHON has the project's dependencies (default: python3)
set -u
cd "$(dirname "$0")/.."
python=${1:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || exit 1
"$python" - <<'PY' || exit 1
import megatron.core, torch
from nld_train.config.schema import Device
from nld_train.platform.device import initialize_device

assert torch.cuda.is_available(), "torch sees no GPU"
print(f"torch {torch.__version__}, megatron-core {megatron.core.__version__}, {initialize_device(Device.cuda)}")
PY
if "$python" -m pytest -q -W ignore tests/gpu; then
    echo "gpu_check: passed"
else
    echo "gpu_check: FAILED"
    exit 1
fi
