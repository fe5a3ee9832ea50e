"""`int4` (WNA16): unsigned 4-bit codes n, two per byte, with a scale per `form.group` elements along K.

value = (n - 8) x scale, or (n - zero) x scale where the form has zero points. Exact in FP32 for scales of 16 bits.

The symmetric quantiser takes the smallest scale that leaves no element of a group farther than half a step from a
code: codes reach from -8 to 7, so -low / 8.5 or high / 7.5, whichever is larger. On Gaussian data in groups of 32 (128)
the relative error is 0.090 (0.106); amax / 7.5 gives 0.095 (0.111) and amax / 7 gives 0.097 (0.117).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moesaic.contracts.scheme import WeightFormat
from moesaic.errors import UnsupportedError
from moesaic.formats import blocks, nibbles
from moesaic.formats.base import Field, Rule

OFFSET = 8
_TOP = 15  # the largest code


def fields(form: WeightFormat) -> dict[str, Field]:
    if form.group <= 0 or form.group % 2:
        raise UnsupportedError(f"{form} with groups of {form.group}", remedy="Groups hold an even number of elements.")
    found = {"data": Field(torch.uint8, 1, 2), "scale": Field(_scale_dtype(form), 1, form.group)}
    if form.zero_points:
        found["zero"] = Field(torch.uint8, 1, form.group)
    return found


def quantize(w: Tensor, form: WeightFormat, rule: Rule = "ceil") -> dict[str, Tensor]:
    """The scale is rounded to its stored dtype before the codes are computed, so that they fit what is stored."""
    groups = blocks.split(w, form.group)
    low, high = groups.aminmax(dim=-1)
    if not form.zero_points:
        scale = _stored(torch.maximum(-low / (OFFSET + 0.5), high / (_TOP - OFFSET + 0.5)), form)
        return {"data": _codes(groups, scale, torch.full_like(low, OFFSET)), "scale": scale}
    low, high = low.clamp_max_(0), high.clamp_min_(0)  # 0 stays a code of its own
    scale = _stored((high - low) / _TOP, form)
    zero = blocks.divide(-low, scale.float()).round_().clamp_(0, _TOP)
    return {"data": _codes(groups, scale, zero), "scale": scale, "zero": zero.to(torch.uint8)}


def dequantize(parts: Mapping[str, Tensor], form: WeightFormat, shape: tuple[int, int]) -> Tensor:
    data = parts["data"]
    values = torch.arange(_TOP + 1, device=data.device, dtype=torch.float32)
    groups = blocks.split(nibbles.look_up(data, values if form.zero_points else values - OFFSET), form.group)
    if form.zero_points:
        groups.sub_(parts["zero"].float()[..., None])
    return groups.mul_(parts["scale"].float()[..., None]).flatten(-2)


def _codes(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    steps = blocks.divide(groups, scale.float()[..., None]).round_().add_(zero[..., None])
    return nibbles.pack(steps.clamp_(0, _TOP).to(torch.uint8).flatten(-2))


def _stored(scale: Tensor, form: WeightFormat) -> Tensor:
    """The scale as stored, never -0; where its dtype cannot hold it (float16), the largest that it can.

    That of a group with Inf becomes NaN, lest the limit hide it.
    """
    dtype = _scale_dtype(form)
    return scale.abs_().masked_fill_(scale == torch.inf, torch.nan).clamp_(max=torch.finfo(dtype).max).to(dtype)


def _scale_dtype(form: WeightFormat) -> torch.dtype:
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if form.scale_dtype not in dtypes:
        raise UnsupportedError(f"{form} with scales of {form.scale_dtype!r}", remedy=f"Use {', '.join(dtypes)}.")
    return dtypes[form.scale_dtype]
