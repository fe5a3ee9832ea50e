"""`fp8_tensor`: E4M3 with one FP32 scale per segment. value = data x scale, scale = amax / 448."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moesaic.contracts.scheme import WeightFormat
from moesaic.formats import blocks, e4m3
from moesaic.formats.base import Field, Rule


def fields(form: WeightFormat) -> dict[str, Field]:
    return {"data": Field(torch.float8_e4m3fn, 1, 1), "scale": Field(torch.float32, 0, 0)}


def quantize(w: Tensor, form: WeightFormat, rule: Rule = "ceil") -> dict[str, Tensor]:
    scale = blocks.amax(w.flatten(-2), keepdim=True) / e4m3.MAX
    return {"data": e4m3.cast(blocks.divide(w, scale[..., None])), "scale": scale}


def dequantize(parts: Mapping[str, Tensor], form: WeightFormat, shape: tuple[int, int]) -> Tensor:
    return parts["data"].float().mul_(parts["scale"][..., None])
