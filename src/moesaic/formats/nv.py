"""NVFP4 blocks: 16 E2M1 elements along K share an E4M3 scale, and many blocks one FP32 scale above it.

value = E2M1 x scale x global_scale. The first product is exact (in BF16 too), so a value is rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.formats import blocks, e2m1, e4m3

GROUP = 16
PEAK = e4m3.MAX * e2m1.MAX
"""The largest E2M1 x scale; global_scale = amax / PEAK uses the whole range of the block scales."""

_TINY = torch.finfo(torch.float32).tiny


def global_scale(amax: Tensor) -> Tensor:
    """amax / PEAK, kept a normal number: 0 and subnormals would make its inverse, which others store, infinite."""
    return (amax / PEAK).clamp_min(_TINY)


def quantize(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """FP32 `[..., K]`, a scale that broadcasts to `[..., K/16]` -> packed `[..., K/2]`, E4M3 `[..., K/16]`.

    A block whose scale rounds to 0 is 0. Inf and NaN make a block's scale, and so the block, NaN or saturate it.
    """
    split = blocks.split(x, GROUP)
    scale = e4m3.cast((blocks.amax(split) / e2m1.MAX).div_(global_scale))
    return e2m1.quantize(blocks.divide(split, (scale.float() * global_scale)[..., None]).flatten(-2)), scale


def dequantize(data: Tensor, scale: Tensor, global_scale: Tensor) -> Tensor:
    """-> FP32 `[..., K]`. global_scale broadcasts to `[..., K]`."""
    values = blocks.split(e2m1.dequantize(data), GROUP)
    return values.mul_(scale.float()[..., None]).flatten(-2).mul_(global_scale)
