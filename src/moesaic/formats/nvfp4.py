"""`nvfp4`: E2M1, two per byte, an E4M3 scale per 16 along K, an FP32 scale per segment; see `formats/nv.py`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moesaic.contracts.scheme import WeightFormat
from moesaic.formats import blocks, nv
from moesaic.formats.base import Field, Rule


def fields(form: WeightFormat) -> dict[str, Field]:
    return {
        "data": Field(torch.uint8, 1, 2),
        "scale": Field(torch.float8_e4m3fn, 1, nv.GROUP),
        "global_scale": Field(torch.float32, 0, 0),
    }


def quantize(w: Tensor, form: WeightFormat, rule: Rule = "ceil") -> dict[str, Tensor]:
    top = nv.global_scale(blocks.amax(w.flatten(-2), keepdim=True))
    data, scale = nv.quantize(w, top[..., None])
    return {"data": data, "scale": scale, "global_scale": top}


def dequantize(parts: Mapping[str, Tensor], form: WeightFormat, shape: tuple[int, int]) -> Tensor:
    return nv.dequantize(parts["data"], parts["scale"], parts["global_scale"][..., None])
