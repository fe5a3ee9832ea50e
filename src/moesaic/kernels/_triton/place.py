"""Places of routed rows in a list that is sorted by expert, where each expert's rows begin at a multiple of a height.

Row r of R = T x A is choice r % A of token r // A. Found on the device without atomics, in two launches: each expert's
program numbers its own rows in the order of r; then places follow from the counts of the experts before. The host knows
only the largest possible number of places; which of them are in use is told by `ends` (the place behind each expert's
last row), or by `rows` (the row of a place, or R where there is none).
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels._triton.launch import cdiv, power


@dataclass(frozen=True)
class Places:
    """INT32 all. place [R]: of each routed row, -1 for padding ids.  ends [E].  count: places, a multiple of height.

    rows [count] and expert [count / height]: of each place and of each block of places; only up to `total` [1], which
    is the last end, rounded up.
    """

    place_R: Tensor
    ends_E: Tensor
    rows_P: Tensor
    expert_B: Tensor
    total: Tensor
    count: int
    height: int


@triton.jit
def rank_kernel(ids_ptr, rank_ptr, counts_ptr, R, CHUNK: tl.constexpr):
    e = tl.program_id(0)
    count = e * 0
    for start in range(0, R, CHUNK):
        r = start + tl.arange(0, CHUNK)
        mine = tl.load(ids_ptr + r, r < R, -1) == e
        before = tl.cumsum(mine.to(tl.int32), 0)
        tl.store(rank_ptr + r, count + before - 1, mine)
        count += tl.sum(mine.to(tl.int32), 0)
    tl.store(counts_ptr + e, count)


@triton.jit
def rounded(counts, HEIGHT: tl.constexpr):
    return (counts + HEIGHT - 1) // HEIGHT * HEIGHT


@triton.jit
def spread_kernel(ids_ptr, rank_ptr, counts_ptr, place_ptr, ends_ptr, rows_ptr, expert_ptr, total_ptr, R, E,
                  HEIGHT: tl.constexpr, BH: tl.constexpr, BE: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """The first E programs write what belongs to an expert, the others BR rows each."""
    j = tl.arange(0, BE)
    sizes = rounded(tl.load(counts_ptr + j, j < E, 0), HEIGHT)
    program = tl.program_id(0)
    if program < E:
        e = program
        start, count = tl.sum(tl.where(j < e, sizes, 0), 0), tl.load(counts_ptr + e)
        size = rounded(count, HEIGHT)
        tl.store(ends_ptr + e, start + count)
        empty = start + count + tl.arange(0, BH)  # less than a block of places
        tl.store(rows_ptr + empty, tl.zeros([BH], tl.int32) + R, empty < start + size)
        for block in range(start // HEIGHT, (start + size) // HEIGHT):
            tl.store(expert_ptr + block, e)
        if e == E - 1:
            tl.store(total_ptr, start + size)
    else:
        r = (program - E) * BR + tl.arange(0, BR)
        ids = tl.load(ids_ptr + r, r < R, -1)
        ok = (ids >= 0) & (r < R)
        starts = tl.sum(tl.where(j[None, :] < ids[:, None], sizes[None, :], 0), 1)
        place = tl.where(ok, starts + tl.load(rank_ptr + r, ok, 0), -1)
        tl.store(place_ptr + r, place, r < R)
        tl.store(rows_ptr + place, r, ok)


def place(ids_TA: Tensor, experts: int, height: int) -> Places:
    """ids: INT32 on the device, -1 for padding, below `experts`; not empty."""
    ids, rows = ids_TA.contiguous(), ids_TA.numel()
    count = cdiv(rows + min(experts, rows) * (height - 1), height) * height
    rank, at, counts, ends = (ids.new_empty(n) for n in (rows, rows, experts, experts))
    found, expert, total = (ids.new_empty(n) for n in (count, count // height, 1))
    rank_kernel[(experts,)](ids, rank, counts, rows, CHUNK=min(1024, power(rows, 32)), num_warps=4)
    block = 16
    spread_kernel[(experts + cdiv(rows, block),)](
        ids, rank, counts, at, ends, found, expert, total, rows, experts, HEIGHT=height, BH=power(height),
        BE=power(experts), BR=block, num_warps=4,
    )  # fmt: skip
    return Places(at, ends, found, expert, total, count, height)
