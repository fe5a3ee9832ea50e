"""Timing on a GPU, and the ceilings that times are held against. Shared by the GPU benchmarks."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch

from benchmarks.machine import commit, installed, keep, save
from moesaic.commands._measure import CACHE, time_calls, time_replays

__all__ = ["CACHE", "Report", "ceilings", "describe", "device_slug", "limits", "time_calls", "time_replays"]


class Limits(NamedTuple):
    """Bytes read, and products of BF16 and of FP8, per second."""

    read: float
    bf16: float
    fp8: float


REACHED = {"h100": Limits(3.07e12, 747e12, 1261e12), "h200": Limits(4.38e12, 798e12, 1483e12)}
"""What one of each reached (8192^3 on random data, rested)."""


@cache
def limits() -> Limits:
    """Of this machine's GPU; of one that REACHED does not name, measured by `ceilings`."""
    words = torch.cuda.get_device_name().lower().split()
    return next((each for word, each in REACHED.items() if word in words), None) or Limits(**ceilings())


def describe() -> dict[str, Any]:
    name = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": installed("triton")}
    return {"device": name, "commit": commit(), "versions": versions}


def device_slug() -> str:
    return torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-")


class Report:
    """A result that is written after every measurement: what came before a failure or a time limit is kept.

    name: of the file, which gets the device's behind it.  facts: what the result says of itself.
    """

    def __init__(self, name: str, facts: dict[str, Any]) -> None:
        self.name, self.result = f"{name}-{device_slug()}", {**facts, **describe()}
        self.failed = 0

    def measure(self, key: str, about: dict[str, Any], call: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """A row of the list `key`: what was asked, and what was found or how it failed; None where it failed."""
        try:
            row, found = call(), True
        except Exception as error:  # the other measurements still count
            traceback.print_exc()
            row, found, self.failed = {"error": f"{error!r:.300}"}, False, self.failed + 1
        self.result.setdefault(key, []).append({**about, **row})
        keep(self.name, self.result)
        return {**about, **row} if found else None

    def end(self) -> None:
        """Prints the whole; exits with 1 where anything failed."""
        save(self.name, self.result)
        sys.exit(bool(self.failed))


def ceilings() -> dict[str, float]:
    """Bytes read per second, and BF16 and FP8 products per second."""
    big = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_().view(torch.float32)
    read = time_calls([lambda: torch.amax(big.view(torch.int32))], 10)
    a = torch.randn(8192, 8192, device="cuda").bfloat16()
    bf16 = time_calls([lambda: a @ a], 10)
    e, one, fp8 = a.to(torch.float8_e4m3fn), torch.ones((), device="cuda"), bf16
    if torch.cuda.get_device_capability() >= (8, 9):  # FP8 products
        fp8 = time_calls([lambda: torch._scaled_mm(e, e.t(), one, one, out_dtype=torch.bfloat16)], 10)
    work = 2 * 8192**3
    return {"read": 2**31 / read * 1e3, "bf16": work / bf16 * 1e3, "fp8": work / fp8 * 1e3}
