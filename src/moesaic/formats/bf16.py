"""`bf16`: an unquantised weight, in whatever float dtype the model has."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moesaic.contracts.scheme import WeightFormat
from moesaic.formats.base import Field, Rule


def fields(form: WeightFormat) -> dict[str, Field]:
    return {"data": Field(None, 1, 1)}


def quantize(w: Tensor, form: WeightFormat, rule: Rule = "ceil") -> dict[str, Tensor]:
    return {"data": w}


def dequantize(parts: Mapping[str, Tensor], form: WeightFormat, shape: tuple[int, int]) -> Tensor:
    return parts["data"].float()
