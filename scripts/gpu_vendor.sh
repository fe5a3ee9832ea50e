#!/usr/bin/env bash
# Tests and measures the expert kernels on a Hopper GPU: our own in CUDA C++, DeepGEMM and Humming (not installed for it):
#
#   bash scripts/gpu_vendor.sh WHEELS [OUT] [WORKERS]
#
# WHEELS: a folder with wheels for this Python of sgl-deep-gemm, apache-tvm-ffi and humming-kernels, and of what they
# need and is not installed (cuda-bindings, cuda-pathfinder, tabulate, packaging, filelock), as `pip download --no-deps
# -d WHEELS ...` leaves them. They are unpacked into build/vendor, where compiled kernels are kept as well. Needs a CUDA
# toolkit (CUDA_HOME, else /usr/local/cuda) and about six minutes with 16 processors.
# Logs and results land in OUT (default: build/vendor/out). ONLY=tests or ONLY=bench leaves the other out. The first
# failure does not stop the rest; the exit status tells.
set -uo pipefail
WHEELS=$(cd "${1:?WHEELS: a folder with wheels}" && pwd)
cd "$(dirname "$0")/.."
OUT=${2:-build/vendor/out}
WORKERS=${3:-12}
PY=${PYTHON:-python3}
WORK=$PWD/build/vendor
mkdir -p "$OUT" "$WORK/tmp"
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
export PATH="$CUDA_HOME/bin:$PATH"
export PYTHONPATH="src:.:$WORK/packages${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export HUMMING_CACHE_DIR="$WORK/humming" HUMMING_TMP_DIR="$WORK/tmp" DG_JIT_CACHE_DIR="$WORK/deep_gemm"
export HUMMING_TEST_TUNING_SOURCE=none # or, under pytest, it chooses other kernels than a user gets
ls "$CUDA_HOME"/lib64/libnvrtc.so* >/dev/null 2>&1 || export HUMMING_COMPILER=${HUMMING_COMPILER:-nvcc}
failed=0
began=$SECONDS
for wheel in "$WHEELS"/*.whl; do
	name=$(basename "$wheel" | cut -d- -f1 | tr _ -)
	"$PY" -c "from importlib.metadata import version; version('$name')" 2>/dev/null ||
		"$PY" -m pip install --quiet --no-index --no-deps --target "$WORK/packages" "$wheel" || failed=1
done
{
	nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
	"$PY" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
	"$CUDA_HOME/bin/nvcc" --version | tail -1
	echo "${MOESAIC_COMMIT:-$(git rev-parse HEAD 2>/dev/null)}"
} 2>&1 | tee "$OUT/machine.txt"
step() { # seconds, log, then the command
	echo "== $2, after $((SECONDS - began)) s"
	timeout "$1" "${@:3}" >"$OUT/$2.log" 2>&1 || { failed=1; tail -5 "$OUT/$2.log"; }
}
step 120 doctor "$PY" -m moesaic doctor
grep '^kernels' "$OUT/doctor.log"
if [ "${ONLY:-tests}" = tests ]; then
	step 240 tests "$PY" -m pytest -m gpu -q -p no:benchmark -n "$WORKERS" --timeout 200 --junitxml "$OUT/tests.xml" \
		--durations=8 tests/test_hopper_gpu.py tests/test_hopper_attention_gpu.py tests/test_hopper_prompt_gpu.py \
		tests/test_vendor_gpu.py
	tail -30 "$OUT/tests.log" | cut -c1-200
fi
schemes=(bf16 fp8 mxfp8 mxfp8a16 nvfp4 nvfp4_dynamic nvfp4a16 mxfp4 mxfp4a8 wna16 w4afp8 w4afp8_token)
peers=(mxfp8+fp8_token mxfp4+fp8_token mxfp4+fp8_group128)
large=(fp8 mxfp8 nvfp4 mxfp4 wna16 w4afp8)
compile() { # log, then options
	while [ "$(jobs -rp | wc -l)" -ge 14 ]; do wait -n; done
	timeout 200 "$PY" benchmarks/experts.py --compile --backends triton hopper deep_gemm humming "${@:2}" >"$OUT/$1.log" 2>&1 &
}
if [ "${ONLY:-bench}" = bench ]; then
	# Compiling takes processors, not the GPU: all schemes at once, before anything is timed.
	echo "== compile, after $((SECONDS - began)) s"
	for scheme in "${schemes[@]}" "${peers[@]}"; do
		compile "compile-small-$scheme" --shapes small --schemes "$scheme"
	done
	for scheme in "${large[@]}"; do
		compile "compile-large-$scheme" --shapes large --tokens 1 16 128 1024 4096 16384 --schemes "$scheme"
	done
	dense=(benchmarks/gemm.py --schemes fp8 --backends triton deep_gemm --tokens 1 64 1024 4096)
	timeout 200 "$PY" "${dense[@]}" >"$OUT/compile-gemm.log" 2>&1 &
	wait
	step 120 experts-small "$PY" benchmarks/experts.py --backends triton hopper deep_gemm humming --shapes small \
		--schemes "${schemes[@]}" "${peers[@]}" --name experts-backends-small
	step 120 experts-large "$PY" benchmarks/experts.py --backends triton hopper deep_gemm humming --shapes large \
		--schemes "${large[@]}" --tokens 1 16 128 1024 4096 16384 --name experts-backends-large
	step 60 gemm "$PY" "${dense[@]}"
	grep '^|' "$OUT/gemm.log"
	cp benchmarks/results/experts-backends-*.json "$OUT/" 2>/dev/null
fi
echo "== summary, after $((SECONDS - began)) s"
"$PY" -m scripts.vendor_summary "$OUT"
exit $failed
