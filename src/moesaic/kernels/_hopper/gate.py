"""Gate product and expert choice of few rows in one launch (gate.cu)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from moesaic.contracts.spec import RouterSpec
from moesaic.kernels._hopper import compile as code
from moesaic.kernels._hopper.dense import even, pointer
from moesaic.kernels._hopper.driver import Module, largest_cluster, launch

I32, I64, PTR, F32 = ctypes.c_int, ctypes.c_longlong, ctypes.c_void_p, ctypes.c_float
SCORINGS = {"softmax": 0, "sigmoid": 1, "softmax_topk": 2}
"""As gate.cu numbers them."""
TILE, HEIGHT, STEP, WARPS = 16, 8, 64, 8
"""Experts of a block; rows of a cluster; elements of K that have a sum of their own; warps of a block."""
MOST_BLOCKS, MOST_CHOSEN, MOST_EXPERTS = 16, 32, 256
TOGETHER = 96
"""Blocks that run at one time, in clusters of 16, on a GPU of 132 multiprocessors in groups of 16 and more."""
MOST_ROWS, MOST_BYTES = 64, {32: 192 << 10, 64: 256 << 10}
"""Rows, and, by rows up to so many, bytes of weights for a block, up to which this takes less time than two launches
of Triton's (measured on an H200: docs/performance-log.md)."""


class GateC(ctypes.Structure):
    """Gate in gate.cu."""

    _fields_ = (("x", PTR), ("w", PTR), ("logit_bias", PTR), ("bias", PTR), ("live", PTR), ("counts", PTR),
                ("ids", PTR), ("weights", PTR), ("x_stride", I64), ("w_stride", I64), ("rows", I32), ("experts", I32),
                ("steps", I32), ("tiles", I32), ("splits", I32), ("top_k", I32), ("scoring", I32),
                ("renormalize", I32), ("scale", F32))  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """per_lane: experts of a lane where a warp chooses.  ahead: a warp's steps whose weights it holds in advance."""

    per_lane: int
    ahead: int

    @property
    def defines(self) -> dict[str, int]:
        return {"PER_LANE": self.per_lane, "AHEAD": self.ahead}


class Loaded:
    """The compiled kernel of a variant."""

    def __init__(self, variant: Variant) -> None:
        self.module = Module(code.machine_code(variant.defines, main="gate.cu"))
        self.shared = self.module.integer("room_bytes")
        self.kernel = self.module.function("gate", self.shared, large_clusters=True)
        self.most_blocks = largest_cluster(self.kernel, 32 * WARPS, self.shared)


@cache
def loaded(variant: Variant, device: int) -> Loaded:
    """device: the current one, on which the code is loaded."""
    return Loaded(variant)


@dataclass(frozen=True)
class Cut:
    """How a cluster shares out a product: tiles of experts, parts of K; blocks, of which some may have nothing."""

    tiles: int
    splits: int
    blocks: int

    def variant(self, experts: int, k: int) -> Variant:
        steps = -(-k // (STEP * WARPS * self.splits))
        return Variant(4 if experts <= 128 else 8, 1 << min(2, (steps - 1).bit_length()))


def cut_of(x_TD: Tensor, w_ED: Tensor, logit_bias_E: Tensor | None, spec: RouterSpec,
           most: int = MOST_BLOCKS) -> Cut | None:  # fmt: skip
    """None for what is not this kernel's, or faster elsewhere.  most: blocks of a cluster."""
    (experts, k), tokens = w_ED.shape, len(x_TD)
    if (x_TD.dtype, w_ED.dtype) != (torch.bfloat16, torch.float32) or x_TD.dim() != 2 or x_TD.shape[1] != k:
        return None
    if logit_bias_E is not None and logit_bias_E.dtype != torch.float32:
        return None
    if not 0 < tokens <= MOST_ROWS or spec.groups > 1 or spec.top_k > MOST_CHOSEN or experts > MOST_EXPERTS:
        return None
    if k % STEP or not (even(x_TD) and even(w_ED)):
        return None
    tiles, clusters = -(-experts // TILE), -(-tokens // HEIGHT)
    blocks, splits = 1 << (tiles - 1).bit_length(), 1
    while 2 * blocks <= min(most, TOGETHER // clusters) and k // STEP >= 2 * WARPS * splits:  # two steps for each warp
        blocks, splits = 2 * blocks, 2 * splits
    limit = next(room for rows, room in MOST_BYTES.items() if tokens <= rows)
    fits = 4 * TILE * k <= limit * splits and blocks * clusters <= TOGETHER and blocks <= most
    return Cut(tiles, splits, blocks) if fits else None


def cut_here(x_TD: Tensor, w_ED: Tensor, logit_bias_E: Tensor | None, spec: RouterSpec) -> Cut | None:
    """`cut_of` with clusters that x's device can run: parts of a GPU may have no 16 multiprocessors side by side."""
    how = cut_of(x_TD, w_ED, logit_bias_E, spec)
    if how is None:
        return None
    with torch.cuda.device(x_TD.device):
        most = loaded(how.variant(*w_ED.shape), torch.cuda.current_device()).most_blocks
    return how if how.blocks <= most else cut_of(x_TD, w_ED, logit_bias_E, spec, most)


def gate(x_TD: Tensor, w_ED: Tensor, logit_bias_E: Tensor | None, bias_E: Tensor | None, spec: RouterSpec,
         live_T: Tensor | None, counts_E: Tensor | None, how: Cut) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `gate` in ops.py. how: what `cut_of` returned.

    Weights and biases are read before the kernel in front has ended, unless that makes copies of biases.
    """
    if counts_E is not None and not (counts_E.dtype == torch.int64 and counts_E.is_contiguous()):
        raise ValueError("counts are dense, in INT64")
    tokens, (experts, k) = len(x_TD), w_ED.shape
    ids_TA = torch.empty(tokens, spec.top_k, dtype=torch.int32, device=x_TD.device)
    weights_TA = torch.empty(tokens, spec.top_k, dtype=torch.float32, device=x_TD.device)
    logit_bias, bias = as_read(logit_bias_E, torch.float32), as_read(bias_E, torch.float32)
    live = as_read(live_T, torch.int64)
    arguments = GateC(
        x_TD.data_ptr(), w_ED.data_ptr(), *map(pointer, (logit_bias, bias, live, counts_E)), ids_TA.data_ptr(),
        weights_TA.data_ptr(), x_TD.stride(0), w_ED.stride(0), tokens, experts, k // STEP, how.tiles, how.splits,
        spec.top_k, SCORINGS[spec.scoring], spec.renormalize, spec.scale,
    )  # fmt: skip
    with torch.cuda.device(x_TD.device):
        made = loaded(how.variant(experts, k), torch.cuda.current_device())
        grid = -(-tokens // HEIGHT) * how.blocks
        ahead = logit_bias is logit_bias_E and bias is bias_E
        launch(made.kernel, grid, 32 * WARPS, [arguments], made.shared, how.blocks, ahead)
    return ids_TA, weights_TA


def as_read(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype).contiguous()
