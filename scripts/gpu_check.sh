#!/usr/bin/env bash
# Everything on one GPU without a network, in under 8 minutes: the CUDA paths against the CPU and against slow kernels, then
# training steps at the shape of the 3B: time, MFU, memory, and where the time goes. Ends with one table.
#   scripts/gpu_check.sh [PYTHON [PART ...]]     PYTHON has the project's dependencies, "dev" included (default: python3)
#                                                PART: tests profile (default: both), memory step layouts attention head
# A part fails where a result is wrong or it runs out of time. A ratio below the required one is only reported: ratios
# want a quiet machine and more rounds (scripts/benchmark.py --check). Logs and figures: runs/gpu_check.
set -u
cd "$(dirname "$0")/.."
python=${1:-python3}
parts=("${@:2}")
[ ${#parts[@]} -gt 0 ] || parts=(tests profile)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
# A graph has three kernels at most; a pool for each core in each of a dozen processes is slower than none.
export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-4}
out=runs/gpu_check
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || echo "nvidia-smi does not answer: torch is asked"
"$python" -W ignore - <<'PY' || { echo "gpu_check: FAILED: no GPU that torch can use, or a dependency is missing"; exit 1; }
import megatron.core, torch
from nld_train.config.schema import Device
from nld_train.platform.device import initialize_device, missing_libraries

platform = initialize_device(Device.cuda)
print(f"torch {torch.__version__}, megatron-core {megatron.core.__version__}, {torch.cuda.get_device_name()}")
print("\n".join(missing_libraries(platform) or ["Transformer Engine and Apex are here"]))
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

# Of each file of tests a process, all at once, and of those whose tests are programs of their own as many as they have:
# most of the time is compiling, on the CPU's cores.
run_tests() { # SECONDS
    local file name index status processes pids=() names=() start=$SECONDS
    for file in tests/gpu/test_*.py; do
        name=$(basename "$file" .py)
        processes=0
        case $name in
        test_memory) continue ;; # its own part: it wants the GPU's memory to itself
        test_main_job) processes=3 ;;
        test_step) processes=8 ;;
        esac
        timeout -k 10 "$1" "$python" -m pytest -q -rA -n "$processes" -W ignore -p no:cacheprovider "$file" \
            >"$out/$name.log" 2>&1 &
        pids+=($!)
        names+=("$name")
    done
    for index in "${!pids[@]}"; do
        wait "${pids[$index]}"
        status=$?
        name=${names[$index]}
        [ "$status" -eq 0 ] || tail -n 60 "$out/$name.log"
        finished "$name" "$status" $((SECONDS - start)) \
            "$(grep -E '[0-9]+ (passed|failed|skipped)' "$out/$name.log" | tail -n 1 | sed 's/ in .*//')"
    done
}

# A kind of step that fails ends its process, since what comes after it on the same GPU could not be trusted; the next
# process takes those that are left.
run_profile() { # SECONDS
    local start=$SECONDS left status=124 more=()
    : >"$out/profile.log"
    rm -f "$out/profile.json"
    while left=$(($1 - SECONDS + start)) && [ "$left" -gt 30 ]; do
        timeout -k 10 "$left" "$python" -W ignore -m nld_train.testing.benchmarks.profile --device cuda \
            --warmup 2 --rounds 4 --profiled 1 --json "$out/profile.json" --until $(($(date +%s) + left - 5)) \
            "${more[@]}" 2>&1 | tee -a "$out/profile.log"
        status=${PIPESTATUS[0]}
        more=(--go-on)
        [ "$status" -eq 3 ] || [ "$status" -gt 128 ] || break # 3: others are left; more than 128: it was killed
    done
    finished profile "$status" $((SECONDS - start)) "$(last_report | grep -c ': NO$') required figures missed"
}

last_report() { # of several processes the last one's: it has all
    grep -q '^shares of' "$out/profile.log" && tac "$out/profile.log" | sed '/^shares of/q' | tac
}

run_command() { # PART SECONDS COMMAND ...
    local start=$SECONDS status words=
    timeout -k 10 "$2" "${@:3}" 2>&1 | tee "$out/$1.log"
    status=${PIPESTATUS[0]}
    [ "$1" = memory ] || words="$(grep -c ': NO$' "$out/$1.log") required figures missed"
    finished "$1" "$status" $((SECONDS - start)) "$words"
}

for part in "${parts[@]}"; do
    case $part in
    tests) run_tests 260 ;;
    # What is left of 465 s after the tests; not less where other parts came before it.
    profile) run_profile $((SECONDS < 265 ? 465 - SECONDS : 200)) ;;
    # The memory model's estimate beside torch's count, of each case.
    memory) run_command memory 300 "$python" -m pytest -q -rA -n 4 -W ignore tests/gpu/test_memory.py ;;
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
    last_report
    echo
fi
printf '%s\n' "${summary[@]}"
if [ "$result" -eq 0 ]; then
    echo "gpu_check: passed"
else
    echo "gpu_check: FAILED"
fi
exit "$result"
