"""The installed Humming package as an oracle on a CPU: its repacking kernel compiled for the host, its options for a
GPU that is not here. Tests skip where it, what it needs, or a compiler is not installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

HOST = """
#pragma once
#include <barrier>
#include <cassert>
#include <cstdint>
#include <thread>
#include <vector>
#define CUDA_INLINE inline
#define PRAGMA_UNROLL
#define CEIL_DIV(a, b) (((a) + (b) - 1) / (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define __global__
#define __shared__ static
struct Three { uint32_t x, y, z; };
inline thread_local Three threadIdx, blockIdx, gridDim, blockDim;
inline std::barrier<>* together;
inline void __syncthreads() { together->arrive_and_wait(); }
constexpr uint32_t static_next_power_of_2(uint32_t n) { uint32_t p = 1; while (p < n) p *= 2; return p; }
"""
MAIN = """
#include "%(header)s"
extern "C" void run(const uint32_t* in, uint32_t* out, uint32_t n, uint32_t k, uint32_t mode) {
  std::barrier<> barrier(32);
  together = &barrier;
  std::vector<std::thread> threads;
  for (uint32_t t = 0; t < 32; t++)
    threads.emplace_back([=] {
      for (uint32_t y = 0; y < k / 64; y++)
        for (uint32_t x = 0; x < n / 64; x++) {
          threadIdx = {t, 0, 0}, blockIdx = {x, y, 0}, gridDim = {n / 64, k / 64, 1}, blockDim = {32, 1, 1};
          weight_repack_nk<%(arguments)s>(in, out, nullptr, n, k, n, k, mode);
          __syncthreads();
        }
    });
  for (auto& thread : threads) thread.join();
}
"""


def package() -> Path:
    """The folder of the package, which is not imported for it."""
    spec = find_spec("humming")
    if spec is None or spec.origin is None:
        pytest.skip("humming-kernels is not installed")
    return Path(spec.origin).parent


def repacking(folder: Path, arguments: str) -> Callable[[Tensor, int, int, int], Tensor]:
    """Their kernel with these template arguments: (bytes, N, K, interleave mode) -> bytes."""
    header, compiler = package() / "include/humming/kernel/process.cuh", shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    (folder / "humming/utils").mkdir(parents=True)
    (folder / "humming/utils/all.cuh").write_text(HOST)
    (folder / "main.cpp").write_text(MAIN % {"header": header, "arguments": arguments})
    command = [compiler, "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread", f"-I{folder}",
               str(folder / "main.cpp"), "-o", str(folder / "main.so")]  # fmt: skip
    subprocess.run(command, check=True, timeout=300)
    run = ctypes.CDLL(str(folder / "main.so")).run

    def call(data: Tensor, n: int, k: int, mode: int) -> Tensor:
        data, out = data.contiguous(), torch.zeros_like(data.flatten())
        run(ctypes.c_void_p(data.data_ptr()), ctypes.c_void_p(out.data_ptr()), n, k, mode)
        return out

    return call


@contextlib.contextmanager
def hopper(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Any]:
    """The package, imported, where every device is an H100. Skips where its own requirements are not installed."""
    package()
    pytest.importorskip("cuda.bindings", reason="the package needs cuda-bindings")
    for name in ("CACHE_DIR", "TMP_DIR"):
        monkeypatch.setenv(f"HUMMING_{name}", str(folder))
    monkeypatch.setenv("HUMMING_DISABLE_PARALLEL_BUILD", "1")
    monkeypatch.setenv("HUMMING_TEST_TUNING_SOURCE", "none")
    import humming.device

    h100 = SimpleNamespace(
        index=0, name="NVIDIA H100 80GB HBM3", is_ppu=False, sm_count=132, sm_major=9, sm_minor=0, sm_version=90,
        max_registers_per_sm=65536, max_smem_size=232448, memory_bandwidth_gbps=3352.0,
        tensorcore_tops={"bfloat16": 989.0, "float16": 989.0, "float8e4m3": 1979.0},
    )  # fmt: skip
    extension = SimpleNamespace(_DeviceInfo=lambda index: h100)
    monkeypatch.setattr(humming.device, "_get_device_info_extension", lambda: extension)
    monkeypatch.setattr(humming.device.DeviceInfo, "_instances", {})
    monkeypatch.setattr(humming.device.current_device, "_value", h100)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())
    yield humming
