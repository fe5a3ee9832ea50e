"""`mxfp8`: E4M3 with a power of two per 32 along K. value = data x 2^(u-127)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moesaic.contracts.scheme import WeightFormat
from moesaic.formats import mx
from moesaic.formats.base import Field, Rule


def fields(form: WeightFormat) -> dict[str, Field]:
    return {"data": Field(torch.float8_e4m3fn, 1, 1), "scale": Field(torch.uint8, 1, mx.GROUP)}


def quantize(w: Tensor, form: WeightFormat, rule: Rule = "ceil") -> dict[str, Tensor]:
    data, scale = mx.quantize_e4m3(w, rule)
    return {"data": data, "scale": scale}


def dequantize(parts: Mapping[str, Tensor], form: WeightFormat, shape: tuple[int, int]) -> Tensor:
    return mx.dequantize(parts["data"].float(), parts["scale"])
