"""`fp8_tensor`: E4M3 with one FP32 scale (shape []) for all rows. value = data x scale.

Static: the calibrated scale of the checkpoint; larger rows saturate. Dynamic: amax / 448 over the whole tensor, as the
field defines it. The dynamic codes of a row therefore depend on the rows beside it: **not batch-invariant**; for the
same request to give the same tokens use a static scale or `fp8_token`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moesaic.formats import blocks, e4m3


def encode(x: Tensor, scale: Tensor | None) -> dict[str, Tensor]:
    wide = x.float()
    if scale is None:
        scale = blocks.amax(wide.flatten()) / e4m3.MAX if x.numel() else wide.new_zeros(())
    return {"data": e4m3.cast(blocks.divide(wide, scale)), "scale": scale}


def decode(parts: Mapping[str, Tensor]) -> Tensor:
    return parts["data"].float().mul_(parts["scale"])
