"""Routed rows in order of their expert, on the device: stable, without atomics, without the host knowing a count.

Row r of R = T x A is choice r % A of token r // A. Each expert's program reads all ids once: it counts those before its
own expert and those equal to it, so that programs need nothing of one another. Padding ids (-1) are in no list.

A *block* is up to BM rows of one expert: what one program of a grouped product works on. Their number is only known on
the device; there are entries for the largest possible number, unused ones with expert -1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels._triton.launch import cdiv, power


@dataclass(frozen=True)
class Blocks:
    """expert, first, last INT32 [B]: whose rows first <= r < last are. order INT32 [R] or None: where sorted row i came
    from (None: rows are where they are). total INT32 [1]: sorted rows. rows: entries of `order`, or slots."""

    expert_B: Tensor
    first_B: Tensor
    last_B: Tensor
    order_R: Tensor | None
    total: Tensor | None
    rows: int
    height: int


@triton.jit
def order_kernel(ids_ptr, order_ptr, ends_ptr, R, CHUNK: tl.constexpr):
    e = tl.program_id(0)
    before, same = tl.zeros([CHUNK], tl.int32), tl.zeros([CHUNK], tl.int32)
    for start in range(0, R, CHUNK):
        r = start + tl.arange(0, CHUNK)
        ids = tl.load(ids_ptr + r, r < R, -1)
        before += ((ids >= 0) & (ids < e)).to(tl.int32)
        same += (ids == e).to(tl.int32)
    base = tl.sum(before, 0)
    tl.store(ends_ptr + e, base + tl.sum(same, 0))
    for start in range(0, R, CHUNK):
        r = start + tl.arange(0, CHUNK)
        mine = tl.load(ids_ptr + r, r < R, -1) == e
        place = tl.cumsum(mine.to(tl.int32), 0)
        tl.store(order_ptr + base + place - 1, r, mine)
        base += tl.sum(mine.to(tl.int32), 0)


@triton.jit
def table_kernel(ends_ptr, table_ptr, E, B, BE: tl.constexpr, BB: tl.constexpr, HEIGHT: tl.constexpr):
    """Blocks of sorted rows: block b belongs to the first expert whose blocks end behind b."""
    e, b = tl.arange(0, BE), tl.program_id(0) * BB + tl.arange(0, BB)
    end = tl.load(ends_ptr + e, e < E, 0)
    start = tl.load(ends_ptr + e - 1, (e > 0) & (e < E), 0)
    blocks = tl.where(e < E, (end - start + HEIGHT - 1) // HEIGHT, 0)
    last = tl.cumsum(blocks, 0)
    behind = (last[None, :] <= b[:, None]).to(tl.int32)
    expert = tl.sum(behind, 1)
    mine = expert[:, None] == e[None, :]
    first_block = tl.sum(tl.where(mine, (last - blocks)[None, :], 0), 1)
    first = tl.sum(tl.where(mine, start[None, :], 0), 1) + (b - first_block) * HEIGHT
    final = tl.minimum(tl.sum(tl.where(mine, end[None, :], 0), 1), first + HEIGHT)
    used = expert < E
    tl.store(table_ptr + b, tl.where(used, expert, -1), b < B)
    tl.store(table_ptr + B + b, tl.where(used, first, 0), b < B)
    tl.store(table_ptr + 2 * B + b, tl.where(used, final, 0), b < B)


@triton.jit
def slots_kernel(counts_ptr, table_ptr, capacity, B, PER: tl.constexpr, BB: tl.constexpr, HEIGHT: tl.constexpr):
    """Blocks of slots: PER of each expert, of which counts[e] rows are in use."""
    b = tl.program_id(0) * BB + tl.arange(0, BB)
    expert, place = b // PER, (b % PER) * HEIGHT
    count = tl.load(counts_ptr + expert, b < B, 0).to(tl.int32)
    first = expert * capacity + place
    tl.store(table_ptr + b, tl.where(place < count, expert, -1), b < B)
    tl.store(table_ptr + B + b, first, b < B)
    tl.store(table_ptr + 2 * B + b, expert * capacity + tl.minimum(count, place + HEIGHT), b < B)


def sort(ids_TA: Tensor, experts: int, height: int) -> Blocks:
    """ids: INT32, -1 for padding, below `experts`. height: BM."""
    ids, rows = ids_TA.contiguous(), ids_TA.numel()
    touched = min(experts, rows)
    order, ends = ids.new_empty(rows), ids.new_empty(experts)
    table = ids.new_empty(3, max(1, (rows + touched * (height - 1)) // height))
    order_kernel[(experts,)](ids, order, ends, rows, CHUNK=min(1024, power(rows, 32)), num_warps=4)
    block = 16
    table_kernel[(cdiv(table.shape[1], block),)](
        ends, table, experts, table.shape[1], BE=power(experts), BB=block, HEIGHT=height, num_warps=4
    )
    return Blocks(table[0], table[1], table[2], order, ends[experts - 1 :], rows, height)


def single(ids_TA: Tensor, height: int) -> Blocks:
    """The choices of one token, a block each, as they are. Rows of padding ids count as in use, and hold anything."""
    ids, at = ids_TA.flatten(), numbers(ids_TA.numel(), ids_TA.device)
    return Blocks(ids, at[:-1], at[1:], None, at[-1:], ids.numel(), height)


@lru_cache(maxsize=64)
def numbers(count: int, device: torch.device) -> Tensor:
    """INT32 0..count, made once: a graph must be captured after a first run."""
    return torch.arange(count + 1, dtype=torch.int32, device=device)


def slots(counts_E: Tensor, capacity: int, height: int) -> Blocks:
    """Layout `slotted`: counts on the device, any integer dtype."""
    experts, per = len(counts_E), cdiv(capacity, height)
    table = torch.empty(3, experts * per, dtype=torch.int32, device=counts_E.device)
    slots_kernel[(cdiv(table.shape[1], 128),)](
        counts_E, table, capacity, table.shape[1], PER=per, BB=128, HEIGHT=height, num_warps=1
    )
    return Blocks(table[0], table[1], table[2], None, None, experts * capacity, height)
