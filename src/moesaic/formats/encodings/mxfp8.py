"""`mxfp8`: E4M3 with a power of two (UE8M0) per 32 along K, `[..., K/32]`, exponents by the `ceil` rule."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moesaic.formats import mx


def encode(x: Tensor, scale: None) -> dict[str, Tensor]:
    data, found = mx.quantize_e4m3(x.float(), "ceil")
    return {"data": data, "scale": found}


def decode(parts: Mapping[str, Tensor]) -> Tensor:
    return mx.dequantize(parts["data"].float(), parts["scale"])
