"""E2M1 elements: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; code = sign bit 8, then the rank 0..7."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.formats import nibbles

MAX = 6.0
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = (*_MAGNITUDES, *(-each for each in _MAGNITUDES))
"""By code. Code 8 is -0."""

_CHUNK = 1 << 18  # elements: the temporaries of a chunk stay in a CPU's cache


def quantize(x: Tensor) -> Tensor:
    """FP32 `[..., K]`, K even -> packed UINT8 `[..., K/2]`: to nearest, ties to the even code, saturating.

    NaN has no code here: formats mark it in the block's scale.
    """
    flat = x.flatten()
    if x.device.type == "cpu":
        packed = flat.new_empty(flat.numel() // 2, dtype=torch.uint8)
        for source, target in zip(flat.split(_CHUNK), packed.split(_CHUNK // 2), strict=False):
            target.copy_(nibbles.pack(codes(source)))
    else:
        packed = nibbles.pack(codes(flat))
    return packed.view(*x.shape[:-1], x.shape[-1] // 2)


def codes(x: Tensor) -> Tensor:
    """FP32 -> UINT8 codes 0..15, of the same shape.

    The grid has spacing 1/2 up to 2, then 1, then 2 from 4 on. Rounding |x| on each of these grids (torch rounds ties
    to even) and counting codes up to there gives three candidates, of which the smallest is right everywhere.
    """
    size = x.abs().clamp_(max=MAX)
    halves, ones = (size * 2).round_(), size.round().add_(2)
    rank = torch.minimum(torch.minimum(halves, ones), size.mul_(0.5).round_().add_(4))
    sign = (x.view(torch.int32) >> 28).bitwise_and_(8)
    return rank.to(torch.uint8).bitwise_or_(sign.to(torch.uint8))


def dequantize(data: Tensor) -> Tensor:
    """Packed UINT8 `[..., K/2]` -> FP32 `[..., K]`, exact."""
    return nibbles.look_up(data, torch.tensor(VALUES, device=data.device))
