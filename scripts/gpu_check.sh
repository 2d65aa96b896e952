#!/usr/bin/env bash
# Everything on one GPU without a network, in under 8 minutes: the CUDA paths against the CPU and against slow kernels, then
# training steps at the shape of the 3B: time, MFU, memory, and where the time goes. Ends with one table.
#   scripts/gpu_check.sh [PYTHON [PART ...]]     PYTHON has the project's dependencies (default: python3)
#                                                PART: tests profile (default: both), memory step layouts attention head
# A part fails where a result is wrong or it runs out of time. A ratio below the required one is only reported: ratios
# want a quiet machine and more rounds (scripts/benchmark.py --check). Logs and figures: runs/gpu_check.
set -u
cd "$(dirname "$0")/.."
python=${1:-python3}
parts=("${@:2}")
[ ${#parts[@]} -gt 0 ] || parts=(tests profile)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
out=runs/gpu_check
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || exit 1
"$python" -W ignore - <<'PY' || exit 1
import megatron.core, torch
from nld_train.config.schema import Device
from nld_train.platform.device import initialize_device

assert torch.cuda.is_available(), "torch sees no GPU"
print(f"torch {torch.__version__}, megatron-core {megatron.core.__version__}, {initialize_device(Device.cuda)}")
PY
summary=()
result=0

finished() { # PART STATUS SECONDS [WORDS]
    local verdict=passed
    [ "$2" -eq 124 ] && verdict="FAILED (out of time)"
    [ "$2" -eq 0 ] || [ "$2" -eq 124 ] || verdict="FAILED (exit $2)"
    [ "$2" -eq 0 ] || result=1
    summary+=("$(printf '%-24s %s%s, %d s' "$1" "$verdict" "${4:+, $4}" "$3")")
}

# Of each file of tests a process, all at once: most of their time is compiling, on the CPU's cores.
run_tests() {
    local file name status pids=() names=() start=$SECONDS
    for file in tests/gpu/test_*.py; do
        name=$(basename "$file" .py)
        [ "$name" = test_memory ] && continue # its own part: it wants the GPU's memory to itself
        timeout "$1" "$python" -m pytest -q -s -W ignore -p no:cacheprovider "$file" >"$out/$name.log" 2>&1 &
        pids+=($!)
        names+=("$name")
    done
    for index in "${!pids[@]}"; do
        wait "${pids[$index]}"
        status=$?
        name=${names[$index]}
        [ "$status" -eq 0 ] || tail -n 60 "$out/$name.log"
        finished "$name" "$status" $((SECONDS - start)) "$(grep -E '[0-9]+ (passed|failed|skipped)' "$out/$name.log" | tail -n 1 | sed 's/ in .*//')"
    done
}

run_command() { # PART SECONDS COMMAND ...
    local start=$SECONDS status words=
    timeout "$2" "${@:3}" 2>&1 | tee "$out/$1.log"
    status=${PIPESTATUS[0]}
    [[ $1 = profile || $1 = memory ]] || words="$(grep -c ': NO$' "$out/$1.log") required ratios missed"
    finished "$1" "$status" $((SECONDS - start)) "$words"
}

for part in "${parts[@]}"; do
    case $part in
    tests) run_tests 270 ;;
    profile) run_command profile 190 "$python" -W ignore -m nld_train.testing.benchmarks.profile --device cuda --json "$out/profile.json" ;;
    # The memory model's estimate beside torch's count, of each case.
    memory) run_command memory 300 "$python" -m pytest -q -s -W ignore tests/gpu/test_memory.py ;;
    step | layouts | attention | head)
        run_command "$part" 260 "$python" -W ignore scripts/benchmark.py "$part" --device cuda --rounds 3 --warmup 1 \
            --json "$out/$part.json" ;;
    *)
        echo "gpu_check: no part $part: choose of tests profile memory step layouts attention head" >&2
        exit 2 ;;
    esac
done
echo
if [[ " ${parts[*]} " = *" profile "* ]]; then
    sed -n '/^shares of/,$p' "$out/profile.log"
    echo
fi
printf '%s\n' "${summary[@]}"
if [ "$result" -eq 0 ]; then
    echo "gpu_check: passed"
else
    echo "gpu_check: FAILED"
fi
exit "$result"
