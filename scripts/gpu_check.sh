#!/usr/bin/env bash
# Correctness of the CUDA paths on a machine with one GPU and no network, then how fast they are in a few rounds: 25
# minutes at most. Ends with one line for each part, and one for all: passed or not.
#   scripts/gpu_check.sh [PYTHON [PART ...]]     PYTHON has the project's dependencies (default: python3)
#                                                PART: tests memory step layouts attention (default: all of them)
# A part fails where a result is wrong or it runs out of time. A ratio below the required one is only reported: ratios
# want a quiet machine and more rounds (scripts/benchmark.py --check). The head's peak memory is one of the tests.
set -u
cd "$(dirname "$0")/.."
python=${1:-python3}
parts=("${@:2}")
[ ${#parts[@]} -gt 0 ] || parts=(tests memory step layouts attention)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || exit 1
"$python" - <<'PY' || exit 1
import megatron.core, torch
from nld_train.config.schema import Device
from nld_train.platform.device import initialize_device

assert torch.cuda.is_available(), "torch sees no GPU"
print(f"torch {torch.__version__}, megatron-core {megatron.core.__version__}, {initialize_device(Device.cuda)}")
PY
log=$(mktemp)
trap 'rm -f "$log"' EXIT
summary=()
result=0
for part in "${parts[@]}"; do
    start=$SECONDS
    case $part in
    tests) command=(timeout 720 "$python" -m pytest -q -W ignore --ignore tests/gpu/test_memory.py tests/gpu) ;;
    # The memory model's estimate beside torch's count, of each case.
    memory) command=(timeout 300 "$python" -m pytest -q -s -W ignore tests/gpu/test_memory.py) ;;
    step | layouts | attention)
        command=(timeout 260 "$python" scripts/benchmark.py "$part" --device cuda --rounds 3 --warmup 1) ;;
    *)
        echo "gpu_check: no part $part: choose of tests memory step layouts attention" >&2
        exit 2 ;;
    esac
    "${command[@]}" 2>&1 | tee "$log"
    status=${PIPESTATUS[0]}
    verdict=passed
    [ "$status" -eq 0 ] || { verdict="FAILED (exit $status)"; result=1; }
    [[ $part = tests || $part = memory ]] || verdict+=", $(grep -c ': NO$' "$log") required ratios missed"
    summary+=("$part: $verdict, $((SECONDS - start)) s")
done
echo
printf '%s\n' "${summary[@]}"
if [ "$result" -eq 0 ]; then
    echo "gpu_check: passed"
else
    echo "gpu_check: FAILED"
fi
exit "$result"
