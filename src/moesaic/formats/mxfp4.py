"""`mxfp4`: E2M1, two per byte, with a power of two per 32 along K. value = E2M1 x 2^(u-127)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moesaic.contracts.scheme import WeightFormat
from moesaic.formats import e2m1, mx
from moesaic.formats.base import Field, Rule


def fields(form: WeightFormat) -> dict[str, Field]:
    return {"data": Field(torch.uint8, 1, 2), "scale": Field(torch.uint8, 1, mx.GROUP)}


def quantize(w: Tensor, form: WeightFormat, rule: Rule = "ceil") -> dict[str, Tensor]:
    data, scale = mx.quantize_e2m1(w, rule)
    return {"data": data, "scale": scale}


def dequantize(parts: Mapping[str, Tensor], form: WeightFormat, shape: tuple[int, int]) -> Tensor:
    return mx.dequantize(e2m1.dequantize(parts["data"]), parts["scale"])
