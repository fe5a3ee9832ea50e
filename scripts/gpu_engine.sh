#!/usr/bin/env bash
# The engine on a GPU: its tests, then its benchmarks; at most 8 minutes on 16 cores. Writes logs and results to $OUT.
#
#   OUT=/tmp/out bash scripts/gpu_engine.sh [STAGE...]       stages: tests engine qwen lite kv nvfp4 route attention schemes
set -u
OUT=${OUT:-gpu-out}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
export PYTHONPATH=src:. OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
WORKERS=${WORKERS:-8}
PYTEST=(-q -m gpu -p no:cacheprovider --durations=8)
if ! "$PYTHON" -c "import pytest_timeout" 2>/dev/null; then # the project's settings name it, strictly
    printf '[pytest]\npythonpath = src .\nmarkers =\n  gpu: on a GPU\n  long: slow\n' >"$OUT/pytest.ini"
    PYTEST+=(-c "$OUT/pytest.ini" --rootdir .)
fi

stage() { # name, seconds, command...
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    echo "== $name: $*" | tee -a "$OUT/stages.log"
    timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
    echo "== $name: exit $?, $((SECONDS - began)) s" | tee -a "$OUT/stages.log"
    tail -n "${TAIL:-25}" "$OUT/$name.log" | cut -c1-240
}

run() {
    case $1 in
    tests) stage tests 240 "$PYTHON" -m pytest "${PYTEST[@]}" -n "$WORKERS" \
        tests/test_triton_fused.py tests/test_triton_invariant.py tests/test_triton_gpu.py \
        -k "not experts and not slotted and not encodings" ;;
    engine) stage engine 240 "$PYTHON" -m pytest "${PYTEST[@]}" -rA -n 4 tests/test_engine_gpu.py ;;
    qwen) stage qwen 180 "$PYTHON" benchmarks/throughput.py ;;
    lite) stage lite 120 "$PYTHON" benchmarks/throughput.py --model v2-lite --batch 1 16 64 --prompts 8x2048 ;;
    kv) stage kv 120 "$PYTHON" benchmarks/throughput.py --kv fp8 --batch 1 64 256 --prompts 0 ;;
    nvfp4) stage nvfp4 120 "$PYTHON" benchmarks/throughput.py --scheme nvfp4_dynamic --batch 1 32 --prompts 0
        stage fp8-32 100 "$PYTHON" benchmarks/throughput.py --batch 32 --prompts 0 --no-profile ;;
    route) stage route 60 "$PYTHON" benchmarks/route.py ;;
    attention) stage attention 120 "$PYTHON" benchmarks/attention.py
        TAIL=60 stage attention-sweep 120 "$PYTHON" benchmarks/attention.py --sweep ;;
    schemes) stage schemes 200 "$PYTHON" benchmarks/schemes_gpu.py --limit 4
        stage schemes-kv8 100 "$PYTHON" benchmarks/schemes_gpu.py --limit 4 --kv fp8 --schemes fp8,mxfp8 ;;
    *) echo "no such stage: $1" >&2; exit 2 ;;
    esac
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$OUT/stages.log"
"$PYTHON" -c "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__)" | tee -a "$OUT/stages.log"
git rev-parse --short=12 HEAD 2>/dev/null | tee -a "$OUT/stages.log"
for each in ${*:-tests engine qwen lite kv route attention schemes nvfp4}; do
    run "$each"
    cp -f benchmarks/results/*h100*.json benchmarks/results/*h200*.json "$OUT/" 2>/dev/null
done
echo "== all: $SECONDS s" | tee -a "$OUT/stages.log"
