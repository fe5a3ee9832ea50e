"""The last program of a group goes on with what all of them have written: no launch, and no waiting, in between.

Each counts itself once its results are stored; whoever finds all others counted reads them. The count is an atomic of
the whole GPU, with a barrier of the program's threads on either side of it: results stored before it are seen behind
it. Results must be read past the first cache (`.cg`), and the counter is zero again afterwards.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

COUNTERS = 1024


@triton.jit
def last_of(counter_ptr, count):
    """Whether this program is the last of `count` that call it with one counter."""
    tl.debug_barrier()
    before = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    tl.debug_barrier()
    if before == count - 1:
        tl.store(counter_ptr, 0)
    return before == count - 1


@lru_cache(maxsize=16)
def counters(device: torch.device) -> Tensor:
    """INT32, all zero between kernels: those of one device follow one another. Made at a first run, not in a graph."""
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)
