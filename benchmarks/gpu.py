"""Timing on a GPU, and the ceilings that times are held against. Shared by the GPU benchmarks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch

from benchmarks.machine import commit, installed
from moesaic.commands._measure import CACHE, time_calls, time_replays

__all__ = ["BF16", "CACHE", "FP8", "READ", "ceilings", "describe", "device_slug", "time_calls", "time_replays"]

READ, BF16, FP8 = 3.07e12, 747e12, 1261e12
"""Bytes read and products per second that one H100 80GB reached (8192^3 on random data); `ceilings` measures anew."""


def describe() -> dict[str, Any]:
    name = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": installed("triton")}
    return {"device": name, "commit": commit(), "versions": versions}


def device_slug() -> str:
    return torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-")


def ceilings() -> dict[str, float]:
    """Bytes read per second, and BF16 and FP8 products per second."""
    big = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_().view(torch.float32)
    read = time_calls([lambda: torch.amax(big.view(torch.int32))], 10)
    a = torch.randn(8192, 8192, device="cuda").bfloat16()
    bf16 = time_calls([lambda: a @ a], 10)
    e, one = a.to(torch.float8_e4m3fn), torch.ones((), device="cuda")
    fp8 = time_calls([lambda: torch._scaled_mm(e, e.t(), one, one, out_dtype=torch.bfloat16)], 10)
    work = 2 * 8192**3
    return {"read": 2**31 / read * 1e3, "bf16": work / bf16 * 1e3, "fp8": work / fp8 * 1e3}
