#!/usr/bin/env bash
# The engine on a GPU: its benchmarks and its tests, in one go. Logs and results land in $OUT.
#
#   OUT=/tmp/out bash scripts/gpu_engine.sh [STAGE...]
#
# Stages: engine qwen kv lite nvfp4 route attention fused kernels schemes gemm experts, in that order where none is
# named. None needs another, and each has a time limit; what one has measured before it fails is kept. BUDGET: seconds
# for all of them (570); a stage begins only while some are left, so a second call may have to name the rest. While the
# engine's tests run, other processors compile what is timed later. Nothing need be installed but torch, Triton, transformers and pytest; packages in
# build/deps are found (pytest-xdist and hypothesis, say: pip install --target build/deps pytest-xdist).
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu-out}
PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-570}
CORES=$(nproc)
WORKERS=${WORKERS:-$((CORES < 16 ? (CORES + 1) / 2 : 8))}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH="src:.:build/deps${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
# The project's own settings want packages that a bare machine may lack, and turn warnings into failures.
printf '[pytest]\npythonpath = src .\nmarkers =\n  gpu: on a GPU\n  long: slow\n' >"$OUT/pytest.ini"
PYTEST=(-m pytest -m gpu -c "$OUT/pytest.ini" --rootdir . -p no:cacheprovider -p no:benchmark --tb=short
    -o faulthandler_timeout=100 --durations=6)
has() { "$PYTHON" -c "import $1" 2>/dev/null; }

stage() { # name, seconds, command...
    local name=$1 limit=$2 began=$SECONDS left=$((BUDGET - SECONDS)) rc
    shift 2
    if [ "$left" -lt 15 ]; then
        echo "== $name: no time left" | tee -a "$OUT/stages.log"
        return
    fi
    echo "== $name, after $began s: $*" | cut -c1-300 | tee -a "$OUT/stages.log"
    # Interrupted first: whoever is stopped says where, and what failed before.
    timeout -s INT -k 10 "$((limit < left ? limit : left))" "$@" >"$OUT/$name.log" 2>&1
    rc=$?
    echo "== $name: exit $rc, $((SECONDS - began)) s" | tee -a "$OUT/stages.log"
    show "$OUT/$name.log" $rc
    cp -f benchmarks/results/*h100*.json benchmarks/results/*h200*.json "$OUT/" 2>/dev/null
}

show() { # log, exit status: its tables, or its end
    grep -v -E '^\{' "$1" | grep -E '^\||^prompts|^(FAILED|ERROR)|^E  |passed|failed|skipped|differ|ready after' | cut -c1-200 | tail -n "${TAIL:-70}"
    [ "$2" = 0 ] || grep -v -E '^\{|^\|' "$1" | tail -n 12 | cut -c1-200
}

tests() { # name, seconds, workers, then what to select
    local name=$1 limit=$2 workers=$3
    shift 3
    if has xdist; then
        stage "$name" "$limit" "$PYTHON" "${PYTEST[@]}" -rfE -n "$workers" "$@"
    else
        stage "$name" "$limit" bash scripts/gpu_shards.sh "$workers" "$OUT/$name" "$PYTHON" "${PYTEST[@]}" -- "$@"
    fi
}

compile() { # model, scheme, kv, sizes...: as many as half the processors at once
    while [ "$(jobs -rp | wc -l)" -ge "$((CORES / 2))" ]; do sleep 0.2; done
    timeout 200 "$PYTHON" benchmarks/warm.py "$@" >>"$OUT/compile.log" 2>&1 &
}

compile_ahead() {
    local size
    for size in 1x1 64x1 8x1024 2x4096 256x1 32x1 16x1 4x1; do compile qwen3-30b-a3b fp8 bf16 $size; done
    for size in 1x1 16x1 64x1 4x2048 8x1024; do compile v2-lite fp8 bf16 $size; done
    for size in 1x1 32x1 64x1 8x1024; do compile qwen3-30b-a3b nvfp4_dynamic bf16 $size; done
    for size in 1x1 64x1 256x1 8x1024; do compile qwen3-30b-a3b fp8 fp8 $size; done
}

run() {
    case $1 in
    qwen) stage qwen 200 "$PYTHON" benchmarks/throughput.py ;;
    engine) tests engine 170 6 tests/test_engine_gpu.py ;;
    kv) stage kv 80 "$PYTHON" benchmarks/throughput.py --kv fp8 --batch 1 64 256 --prompts 0 ;;
    lite) stage lite 90 "$PYTHON" benchmarks/throughput.py --model v2-lite --batch 1 16 64 --prompts 8x2048 ;;
    nvfp4) stage nvfp4 90 "$PYTHON" benchmarks/throughput.py --scheme nvfp4_dynamic --batch 1 32 64 --prompts 0 ;;
    route) stage route 60 "$PYTHON" benchmarks/route.py ;;
    attention) stage attention 100 "$PYTHON" benchmarks/attention.py --backends triton hopper ;;
    fused) tests fused 150 "$WORKERS" tests/test_triton_fused.py tests/test_triton_invariant.py ;;
    kernels) tests kernels 240 "$WORKERS" tests/test_triton_gpu.py ;;
    schemes) OMP_NUM_THREADS=$((CORES / 2)) stage schemes 150 "$PYTHON" benchmarks/schemes_gpu.py --limit 3
        OMP_NUM_THREADS=$((CORES / 2)) stage schemes-kv8 60 "$PYTHON" benchmarks/schemes_gpu.py --limit 3 --kv fp8 \
            --schemes fp8,mxfp8 ;;
    gemm) stage gemm 150 "$PYTHON" benchmarks/gemm.py --backends triton hopper \
        --schemes bf16 fp8 mxfp8 nvfp4 wna16 --tokens 1 16 64 256 1024 4096 ;;
    experts) stage experts 240 "$PYTHON" benchmarks/experts.py --shapes small lite \
        --schemes bf16 fp8 mxfp8 nvfp4_dynamic mxfp4 wna16 w4afp8 ;;
    attention-sweep) TAIL=90 stage attention-sweep 120 "$PYTHON" benchmarks/attention.py --sweep ;;
    *) echo "no such stage: $1" >&2; return 2 ;;
    esac
}

{
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
    "$PYTHON" -c "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__)"
    echo "${MOESAIC_COMMIT:-$(git rev-parse HEAD)}"
    for name in xdist hypothesis pytest_timeout; do has $name && echo "has $name" || echo "no $name"; done
} 2>&1 | tee "$OUT/stages.log"
[ $# -gt 0 ] || compile_ahead &
for each in ${*:-engine qwen kv lite nvfp4 route attention fused kernels schemes gemm experts}; do
    run "$each"
done
echo "== all: $SECONDS s" | tee -a "$OUT/stages.log"
