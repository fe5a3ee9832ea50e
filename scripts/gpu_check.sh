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
	git rev-parse HEAD 2>/dev/null
} | tee "$OUT/machine.txt"
"$PY" -m pytest -m gpu -p no:benchmark -n "$WORKERS" --timeout 600 --durations=10 tests/test_triton_*.py 2>&1 | tee "$OUT/tests.log" || failed=1
for name in route experts gemm attention; do
	[ -f "benchmarks/$name.py" ] || continue
	"$PY" "benchmarks/$name.py" 2>&1 | tee "$OUT/$name.log" || failed=1
done
cp -r benchmarks/results "$OUT/" 2>/dev/null
exit $failed
