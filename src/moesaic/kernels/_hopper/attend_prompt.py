"""Attention of prompts on Hopper, as attend_prompt.cu computes it: for BF16 caches of keys and values of heads.

What it does not serve (an FP8 cache, latents, other head sizes, small blocks, few rows, narrow windows) runs in Triton.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from moesaic.kernels._hopper import compile as code
from moesaic.kernels._hopper import wgmma
from moesaic.kernels._hopper.driver import Module, described, launch
from moesaic.kernels._hopper.launch import processors
from moesaic.kernels._triton import attend_paged as triton
from moesaic.kernels._triton.attend_paged import Heads, Tables
from moesaic.kernels.ops import Softmax

I32, I64, PTR, F32 = ctypes.c_int, ctypes.c_longlong, ctypes.c_void_p, ctypes.c_float
SIZES, SMALLEST_BLOCK = (64, 128), 16
FEWEST, NARROW = 64, 1024
"""Fewer rows do not fill a warp group's; of narrow windows a block walks so few tiles that Triton is faster."""
TILE, LOG2E = 128, 1.4426950408889634


class Prompts(ctypes.Structure):
    """As in attend_prompt.cu."""

    _fields_ = (("table", PTR), ("spans", PTR), ("sinks", PTR), ("out", PTR), ("next", PTR), ("table_stride", I64),
                *((name, I32) for name in ("sequences", "heads", "repeat", "slots", "value_at", "window", "block_bits",
                                           "box_bits", "table_wide", "sinks_wide")), ("scale", F32))  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """turns: warp groups begin products in turns, which pays where tiles arrive faster than they are used: not from
    blocks of 16 positions, of which one warp begins the copies."""

    size: int
    turns: bool = True

    @property
    def defines(self) -> dict[str, int]:
        return {"HEAD": self.size, "TILE": TILE, "GROUPS": 2, "STAGES": 2, "TURNS": int(self.turns)}


def machine_code(variant: Variant) -> bytes:
    generated = {"products.cuh": products(TILE, variant.size)}
    return code.machine_code(variant.defines, main="attend_prompt.cu", generated=generated)


def products(tile: int, size: int) -> str:
    """The tensor-core products: of 64 queries and a tile of keys, and of weights in registers and values."""
    values = "values_more(float *d, u32 a0, u32 a1, u32 a2, u32 a3, u64 x)"
    made = (
        wgmma.single(tile, "bf16", "scores_begin(float *d, u64 w, u64 x)", "first", False, prefix=""),
        wgmma.single(tile, "bf16", "scores_more(float *d, u64 w, u64 x)", "more", False, prefix=""),
        wgmma.single(size, "bf16", values, "more", True, columns=True, prefix=""),
    )
    return "#pragma once\n" + "\n".join(made) + "\n"


class Loaded:
    def __init__(self, variant: Variant) -> None:
        self.module = Module(machine_code(variant))
        self.shared, self.threads = self.module.integer("room_bytes"), self.module.integer("threads")
        self.rows, self.function = self.module.integer("rows"), self.module.function("attend_prompt", self.shared)


@cache
def loaded(variant: Variant, device: int) -> Loaded:
    """device: the current one, on which the code is loaded."""
    return Loaded(variant)


def serves(q: Tensor, kv: Heads, tables: Tables) -> bool:
    bf16 = kv.exponents_at is None and q.dtype == kv.k.dtype == torch.bfloat16
    sizes = kv.key_dim == kv.value_dim and kv.key_dim in SIZES and kv.k.data_ptr() != kv.v.data_ptr()
    paged = tables.table_SB is not None and tables.spans_S3 is not None
    blocks = tables.block >= SMALLEST_BLOCK and tables.block & (tables.block - 1) == 0
    dense = q.stride(-1) == kv.k.stride(-1) == 1
    return bf16 and sizes and paged and blocks and dense and not any(size % 16 for size in (*boxes(q), *boxes(kv.k)))


def boxes(x: Tensor) -> tuple[int, ...]:
    """What the copy engine wants in multiples of 16 bytes."""
    return x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:-1])


def prefill(q: Tensor, kv: Heads, tables: Tables, how: Softmax, out: Tensor) -> None:
    """Sequences of several rows each, the last positions of their contexts."""
    if tables.longest >= FEWEST and (how.window is None or how.window >= NARROW) and serves(q, kv, tables):
        with torch.cuda.device(q.device):
            attend(q, kv, tables, how, out)
    else:
        triton.prefill(q, kv, tables, how, out)


def attend(q: Tensor, kv: Heads, tables: Tables, how: Softmax, out: Tensor) -> None:
    table, spans, size, heads = tables.table_SB, tables.spans_S3, kv.key_dim, q.shape[1]
    assert table is not None
    assert spans is not None
    box = min(tables.block, TILE)
    kernel = loaded(Variant(size, box >= 64), q.device.index)
    pool, q_bytes, sinks = kv.k, boxes(q), how.sinks_H
    items = tables.sequences * -(-tables.longest // kernel.rows) * heads
    blocks = min(items, processors(q.device.index))
    counter = q.new_zeros(1, dtype=torch.int32) if items > blocks else None
    given = Prompts(
        table.data_ptr(), spans.data_ptr(), pointer(sinks), out.data_ptr(), pointer(counter), table.stride(0),
        tables.sequences, heads, heads // kv.kv_heads, len(pool), (kv.v.data_ptr() - pool.data_ptr()) // 2,
        how.window or 0, tables.block.bit_length() - 1, box.bit_length() - 1, table.dtype == torch.int64,
        sinks is not None and sinks.dtype == torch.float32, how.scale * LOG2E,
    )  # fmt: skip
    rows = (pool.data_ptr(), (2 * pool.shape[1], len(pool)), (2 * pool.stride(0),))
    queries = described(q.data_ptr(), (2 * size, heads, len(q)), q_bytes[:0:-1], (128, 1, kernel.rows))
    maps = (queries, described(*rows, (128, box)), described(*rows, (128, 1)))
    launch(kernel.function, blocks, kernel.threads, (given, *maps), kernel.shared)


def pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
