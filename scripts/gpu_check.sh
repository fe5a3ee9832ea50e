#!/usr/bin/env bash
# Tests and measures everything that needs a GPU, in one go: bash scripts/gpu_check.sh [OUT] [WORKERS]
# Logs and results land in OUT (default: build/gpu). The first failure does not stop the rest; the exit status tells.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-build/gpu}
WORKERS=${2:-8}
PY=${PYTHON:-python3}
mkdir -p "$OUT"
export PYTHONPATH="src:.${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=0
{
	nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
	"$PY" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
	echo "${MOESAIC_COMMIT:-$(git rev-parse HEAD 2>/dev/null)}"
} | tee "$OUT/machine.txt"
"$PY" -m pytest -m gpu -p no:benchmark -n "$WORKERS" --timeout 600 --durations=10 tests/test_triton_*.py 2>&1 | tee "$OUT/tests.log" || failed=1
# Compiling takes a processor, not the GPU: all schemes at once, before anything is timed.
schemes=(bf16 fp8 mxfp8 nvfp4 mxfp4 w4afp8 wna16)
for scheme in "${schemes[@]}"; do
	timeout 150 "$PY" benchmarks/experts.py --compile --shapes small --schemes "$scheme" >/dev/null 2>&1 &
done
wait
bench() { # log, then the command
	timeout 150 "$PY" "${@:2}" 2>&1 | tee "$OUT/$1.log" || failed=1
}
bench route benchmarks/route.py
bench experts benchmarks/experts.py --shapes small --schemes "${schemes[@]}"
bench throughput benchmarks/throughput.py
bench attention benchmarks/attention.py
bench gemm benchmarks/gemm.py --schemes bf16 fp8 mxfp8 nvfp4 --tokens 1 64 1024
bench experts-large benchmarks/experts.py --shapes large --schemes fp8 mxfp8 nvfp4 w4afp8 --tokens 1 16 128 1024 4096
cp -r benchmarks/results "$OUT/" 2>/dev/null
exit $failed
