"""Sequences that decode, attended over the paged pool in one launch (attend_decode.cu), results encoded where asked."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from moesaic.contracts.scheme import Encoding
from moesaic.kernels._hopper import compile as code
from moesaic.kernels._hopper.driver import Module, largest_cluster, launch
from moesaic.kernels._hopper.variants import SHARED
from moesaic.kernels.ops import AttentionBatch, KVView, Softmax

I32, I64, PTR, F32 = ctypes.c_int, ctypes.c_longlong, ctypes.c_void_p, ctypes.c_float
WIDTHS, MOST_HEADS = (64, 128), 16
"""Of a head; and query heads per kv head."""
ENCODINGS = {"bf16": 0, "fp8_tensor": 1, "fp8_group128": 2, "mxfp8": 3, "nvfp4": 4}
"""As attend.cuh numbers them."""
PARTS = ("data", "scale", "exact", "global_scale")
"""Of encoded rows, as Decode has them."""
TILE, WARPS, RING = 16, 4, 24576
"""Positions of a tile; warps of a block; bytes of tiles in flight per warp, about."""
PER_SM, SPREAD = 2, 132
"""Blocks per multiprocessor; and in how many a few contexts are cut, one for each: more share no more bandwidth."""
MOST_BLOCKS, LARGE = 16, 6144
"""Of a cluster; and from what room for positions on more than 8, which Hopper has beyond what CUDA promises: they take
longer to begin and to meet, and pay from about 2,000 positions on, a part of the room that graphs are captured for."""
LOG2E = 1.4426950408889634
PLAIN = Encoding("bf16")


class DecodeC(ctypes.Structure):
    """Decode in attend.cuh."""

    _fields_ = (("q", PTR), ("pool", PTR), ("table", PTR), ("spans", PTR), ("fresh", PTR), ("sinks", PTR),
                ("out", PTR), ("data", PTR), ("scale", PTR), ("exact", PTR), ("top", PTR), ("q_token", I64),
                ("q_head", I64), ("pool_row", I64), ("table_row", I64), ("value_at", I32), ("exponents_at", I32),
                ("groups", I32), ("repeat", I32), ("block", I32), ("wide_table", I32), ("window", I32),
                ("encoding", I32), ("factor", F32))  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """width: of a head.  fp8: the cache's format.  tall: more than 8 query heads per kv head."""

    width: int
    fp8: bool
    tall: bool

    @property
    def defines(self) -> dict[str, int]:
        stage = 2 * TILE * self.width * (1 if self.fp8 else 2) + (128 if self.fp8 else 0)
        return {"WIDTH": self.width, "FP8": int(self.fp8), "TALL": int(self.tall), "WARPS": WARPS,
                "STAGES": min(8, RING // stage), "BLOCKS_PER_SM": PER_SM, "ROOM_LIMIT": SHARED[PER_SM]}  # fmt: skip


class Loaded:
    """The compiled kernel of a variant."""

    def __init__(self, variant: Variant) -> None:
        self.module = Module(code.machine_code(variant.defines, main="attend_decode.cu"))
        self.shared, self.threads = self.module.integer("room_bytes"), self.module.integer("threads")
        self.kernel = self.module.function("attend_decode", self.shared, large_clusters=True)
        self.most_blocks = largest_cluster(self.kernel, self.threads, self.shared)


@cache
def loaded(variant: Variant, device: int) -> Loaded:
    """device: the current one, on which the code is loaded."""
    return Loaded(variant)


@dataclass(frozen=True)
class Target:
    """Where results go: rows in BF16, and, where they are encoded, the parts of that."""

    out: Tensor
    encoding: Encoding = PLAIN
    parts: dict[str, Tensor] | None = None


def serves(q_THK: Tensor, pool_PW: Tensor, view: KVView) -> bool:
    """Whether the kernel has these sizes, and can copy the pool's rows by 16 bytes."""
    repeat, left = divmod(q_THK.shape[1], view.kv_heads)
    size = view.key_dim
    sizes = size in WIDTHS and view.value_dim == size and not view.latent and not left and repeat <= MOST_HEADS
    aligned = pool_PW.data_ptr() % 16 == 0 and pool_PW.stride(0) * pool_PW.element_size() % 16 == 0
    formats = q_THK.dtype == torch.bfloat16 and pool_PW.dtype in (torch.bfloat16, torch.uint8)
    return sizes and aligned and formats and pool_PW.stride(1) == 1


def encodes(encoding: Encoding, view: KVView) -> bool:
    """Whether a head's elements can be encoded without looking at other heads."""
    whole = encoding.name != "fp8_group128" or view.value_dim == 128
    return encoding.name in ENCODINGS and encoding.by_row and whole and (encoding.static or encoding.name != "nvfp4")


def cluster_of(items: int, longest: int) -> int:
    """Blocks that share a context, a power of two: one per multiprocessor, each with a tile per warp at least."""
    most = MOST_BLOCKS if longest >= LARGE else 8
    most = min(most, SPREAD // items, -(-longest // (TILE * WARPS)))
    return 1 << max(0, most.bit_length() - 1)


def decode(q_THK: Tensor, pool_PW: Tensor, batch: AttentionBatch, view: KVView, how: Softmax, target: Target) -> None:
    """batch: sequences of one row each. Rows of the pool but the last ones of each sequence (`fresh_S`, or one) must
    have been there before the kernel in front of this one began: they are fetched while it runs."""
    q = q_THK if q_THK.stride(2) == 1 and not (q_THK.stride(0) % 2 or q_THK.stride(1) % 2) else q_THK.contiguous()
    table = batch.table_SB if batch.table_SB.stride(1) == 1 else batch.table_SB.contiguous()
    spans, repeat, size = batch.spans_S3.contiguous(), q.shape[1] // view.kv_heads, pool_PW.element_size()
    fresh = None if batch.fresh_S is None else batch.fresh_S.contiguous()
    sinks, parts = how.sinks_H, target.parts or {}
    sinks = None if sinks is None else sinks.float().contiguous()
    arguments = DecodeC(
        q.data_ptr(), pool_PW.data_ptr(), table.data_ptr(), spans.data_ptr(), pointer(fresh), pointer(sinks),
        target.out.data_ptr(), *(pointer(parts.get(name)) for name in PARTS), q.stride(0), q.stride(1),
        pool_PW.stride(0) * size, table.stride(0), view.value_at * size, view.parts.exponents_at,
        view.kv_heads, repeat, batch.block, table.dtype == torch.int64, how.window or 0,
        ENCODINGS[target.encoding.name], how.scale * LOG2E,
    )  # fmt: skip
    items = len(batch.spans) * view.kv_heads
    with torch.cuda.device(q.device):
        code = loaded(Variant(view.key_dim, size == 1, repeat > 8), torch.cuda.current_device())
        cluster = min(code.most_blocks, cluster_of(items, min(batch.longest, how.window or batch.longest)))
        launch(code.kernel, items * cluster, code.threads, [arguments], code.shared, cluster)


def pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
