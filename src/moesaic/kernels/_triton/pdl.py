"""Programmatic dependent launch: a kernel may start while the one before it ends, and waits where it needs its results.

Between small kernels it hides the launch. A kernel launched with `options` must call `wait` in every program, before it
reads what another kernel wrote and before it writes anything: then, whenever it ends, all kernels before it have ended
too, so that what is behind it need not ask further back. Weights are never written by a kernel, so they may be read, or
moved into the cache, ahead of `wait`. Where the hardware or Triton does not have it, kernels run one after another.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton import knobs

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    BUILT = True
except ImportError:  # an older Triton: the branch that would call them is never compiled
    gdc_launch_dependents = gdc_wait = None
    BUILT = False

HOPPER = 9
"""Major compute capability from which on it exists."""
LINE = 128
"""Bytes of a cache line."""


@triton.jit
def wait(PDL: tl.constexpr):
    """Lets the next kernel start, and waits until the last one has ended."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def prefetch(row_ptr, row_ok, room, STEP: tl.constexpr, LINES: tl.constexpr):
    """Moves the first LINES cache lines of rows (pointers [N]) into the L2 cache. STEP: elements of a line; room: of
    a row."""
    line = tl.arange(0, LINES)[None, :] * STEP
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.ne.b32 p, $2, 0;
        @p prefetch.global.L2 [$1];
        mov.b32 $0, 0;
        }""",
        "=r,l,r", [(row_ptr[:, None] + line).to(tl.int64), (row_ok[:, None] & (line < room)).to(tl.int32)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


def options(device: torch.device) -> dict[str, bool]:
    """Launch arguments of a kernel with a parameter PDL, on a device (meta: being compiled for one)."""
    return {"PDL": True, "launch_pdl": True} if available(device) else {"PDL": False}


@lru_cache(maxsize=64)
def available(device: torch.device) -> bool:
    if not BUILT or knobs.runtime.interpret:
        return False
    return device.type == "meta" or (device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= HOPPER)
