"""A token alone: its experts in one launch (single.cuh). A: experts per token, D: hidden size, I: expert width.

Its thread blocks wait for each other, one on each multiprocessor: two such launches must not run at the same time on
one GPU. On one stream, as an engine has it, they do not.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import count

import torch
from torch import Tensor

from moesaic.formats.encodings import Rows
from moesaic.kernels._hopper.driver import Module, TensorMap, launch, tensor_map
from moesaic.kernels._hopper.launch import (
    F32,
    I32,
    PTR,
    Maps,
    WeightC,
    is_aligned,
    loaded,
    processors,
    scales_of,
    up,
    weight_values,
)
from moesaic.kernels._hopper.variants import TILES, Variant
from moesaic.kernels.ops import ExpertWeights

WARPS, TILE_BYTES, AT_ONCE, MEETINGS, MOST_STAGES = 16, 2048, 2, 4096, 16
"""As single.cuh has the first four."""
SHARED = 232448 - 1024
LARGE = 128 * 2**20
"""Elements of a token's weights. Measured: 38 million (no gain) and 352 million (a tenth faster)."""
_calls = count()


class SingleC(ctypes.Structure):
    """Single in values.cuh."""

    _fields_ = (
        ("first", WeightC), ("second", WeightC), ("source", PTR), ("given", PTR), ("between", PTR), ("ids", PTR),
        ("weights", PTR), ("wide", PTR), ("out", PTR), ("given_group", I32), ("encoded", I32), ("top_k", I32),
        ("experts", I32), ("x_columns", I32), ("x_width", I32), ("h_columns", I32), ("h_width", I32), ("hidden", I32),
        ("units", I32), ("ring", I32), ("shared_tiles", I32), ("meeting", I32), ("limit", F32), ("alpha", F32),
    )  # fmt: skip


def widths(variant: Variant, w: ExpertWeights) -> tuple[int, int]:
    """Of stored rows of x and of h, in elements."""
    step = max(128, variant.elements)
    return up(w.w13.columns, step), up(w.w2.columns, step)


@dataclass(frozen=True)
class Room:
    """What a thread block has. units: columns of eight elements of y.  shared_tiles: tiles that a warp has a part of.
    ring: stages of a warp.  nbytes: of shared memory, as Places in single.cuh lays it out."""

    units: int
    shared_tiles: int
    ring: int
    nbytes: int


def room_of(variant: Variant, w: ExpertWeights, top_k: int, blocks: int) -> Room:
    x_width, h_width = widths(variant, w)
    units = -(-w.w2.segments[0] // 8 // blocks)
    tiles = max(-(-top_k * w.w2.columns // 8 // blocks), units * -(-top_k // 2))
    shared_tiles = -(-tiles // WARPS) + 1
    sizes = (2 * x_width, 2 * top_k * h_width, WARPS * AT_ONCE * 512, x_width // 32, top_k * (h_width // 32),
             top_k * units * 32, 64, WARPS * shared_tiles * 64, top_k * 4, top_k * 4)  # fmt: skip
    fixed = sum(up(size, 16) for size in sizes) + 3 * 16
    scales = 16 if variant.block_scales else 16 * variant.scale_bytes
    stage = WARPS * (TILE_BYTES + scales + 8)
    ring = min(MOST_STAGES, (SHARED - fixed) // stage)
    return Room(units, shared_tiles, ring, fixed + ring * stage)


def serves(variant: Variant, w: ExpertWeights, ids_TA: Tensor, blocks: int) -> bool:
    """Whether this kernel can run a call, adding up in an order of its own: it needs room for all of h, and scales that
    can be copied as they lie."""
    tokens, top_k = ids_TA.shape
    if tokens != 1 or variant.tile != TILES[8] or variant.one_order or not variant.aligned:
        return False
    if variant.form == 5 and variant.group < 128:
        return False
    return room_of(variant, w, top_k, blocks).ring >= 2


def pays(variant: Variant, w: ExpertWeights, ids_TA: Tensor, blocks: int) -> bool:
    """Whether it is also the fastest, as far as was measured: with 8-bit weights that take much longer to read than
    thread blocks to meet."""
    elements = ids_TA.shape[1] * w.w2.columns * (w.w13.columns * 2 + w.w2.segments[0])
    return variant.form in (1, 2) and elements >= LARGE and serves(variant, w, ids_TA, blocks)


@lru_cache(maxsize=4096)
def maps_of(first: int, second: int, shape: tuple[int, int, int], row_bytes: tuple[int, int]) -> tuple[TensorMap, ...]:
    """Of both weights, in tiles of eight rows of gate and eight of up, and of eight rows; see launch.weight_maps."""
    (experts, width, hidden), (k1, k2) = shape, row_bytes
    strides = (k1, width * k1, 8 * k1, 2 * width * k1)
    return (
        tensor_map(first, (k1, 8, 2, width // 8, experts), strides, (128, 8, 2, 1, 1)),
        tensor_map(second, (k2, hidden, experts), (k2, hidden * k2), (128, 8, 1)),
    )


@cache
def kernel(module: Module) -> ctypes.c_void_p:
    return module.function("single", SHARED)


def single(variant: Variant, x: Rows | Tensor, w: ExpertWeights, ids_1A: Tensor, weights_1A: Tensor,
           static: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(BF16 [1, D], the activated rows FP32 [A, up(I, 128 or 256)] of the choices that are not -1, in their order).

    x: a row that is encoded, or a plain one (static: the scale of a static encoding). ids INT32, weights FP32.
    """
    encoded = isinstance(x, Rows)
    source = x.parts.get("exact", x.data) if isinstance(x, Rows) else x
    source = source if is_aligned(source) else source.contiguous()
    scales = scales_of(variant, x) if isinstance(x, Rows) else static
    device = torch.cuda.current_device()
    blocks, top_k = processors(device), ids_1A.shape[1]
    room = room_of(variant, w, top_k, blocks)
    (x_width, h_width), (experts, _, hidden) = widths(variant, w), w.w13.shape
    wide = source.new_empty(top_k, h_width, dtype=torch.float32)
    out = source.new_empty(1, hidden, dtype=torch.bfloat16)
    parts = w.w13.parts["data"], w.w2.parts["data"]
    k1, k2 = (part.stride(1) * part.element_size() for part in parts)
    first, second = maps_of(parts[0].data_ptr(), parts[1].data_ptr(), (experts, w.w2.columns, hidden), (k1, k2))
    between, oai = w.between_scale, w.activation.kind == "swiglu_oai"
    arguments = SingleC(
        weight_values(variant, w.w13, w.biases[0] if w.biases else None, 0),
        weight_values(variant, w.w2, w.biases[1] if w.biases else None, 0), source.data_ptr(),
        None if scales is None else scales.data_ptr(), None if between is None else between.data_ptr(),
        ids_1A.data_ptr(), weights_1A.data_ptr(), wide.data_ptr(), out.data_ptr(),
        scales.stride(1) if scales is not None and scales.dim() == 2 else 0, encoded, top_k, experts,
        source.shape[1], x_width, w.w2.columns, h_width, hidden, room.units, room.ring,
        room.shared_tiles, next(_calls) % MEETINGS, w.activation.limit, w.activation.alpha if oai else 0.0,
    )  # fmt: skip
    launch(kernel(loaded(variant, device).module), blocks, 32 * WARPS, [Maps(first, second, first), arguments],
           room.nbytes)
    return out, wide
