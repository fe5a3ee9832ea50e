"""`nvfp4`: packed E2M1 `[..., K/2]`, E4M3 scales per 16 `[..., K/16]`, and an FP32 global scale above them.

Static: the checkpoint's `input_scale`, shape []. Dynamic: amax / 2688 **of each row**, shape `[..., 1]`. The field's
dynamic variant takes the amax of the whole tensor, so that a row's codes depend on the batch that it travels in; ours
do not, and lose nothing by it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moesaic.formats import blocks, nv


def encode(x: Tensor, scale: Tensor | None) -> dict[str, Tensor]:
    wide = x.float()
    top = nv.global_scale(blocks.amax(wide, keepdim=True)) if scale is None else scale
    data, found = nv.quantize(wide, top)
    return {"data": data, "scale": found, "global_scale": top}


def decode(parts: Mapping[str, Tensor]) -> Tensor:
    return nv.dequantize(parts["data"], parts["scale"], parts["global_scale"])
