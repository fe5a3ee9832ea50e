"""`fp8_token`: E4M3 with one FP32 scale per row, `[..., 1]`. value = data x scale, scale = amax / 448."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moesaic.formats import blocks, e4m3


def encode(x: Tensor, scale: None) -> dict[str, Tensor]:
    wide = x.float()
    found = blocks.amax(wide, keepdim=True) / e4m3.MAX
    return {"data": e4m3.cast(blocks.divide(wide, found)), "scale": found}


def decode(parts: Mapping[str, Tensor]) -> Tensor:
    return parts["data"].float().mul_(parts["scale"])
