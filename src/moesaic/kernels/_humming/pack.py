"""Experts into the order in which Humming's kernels read them, and back, within their storage.

Bytes of a weight and of its scales stay where they are allocated, so that graphs that hold their addresses stay valid;
an expert at a time passes through a copy. Packing is a permutation but for one pair of formats: E2M1 codes that meet
FP8 rows lose the sign of a zero, and their scales become offsets from the smallest of their expert (`fold`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moesaic.contracts.scheme import Encoding
from moesaic.errors import UnsupportedError
from moesaic.formats.base import QuantTensor
from moesaic.kernels._humming.layout import (
    Order,
    packed,
    packed_scales,
    unpacked,
    unpacked_scales,
)
from moesaic.kernels._humming.recipe import Recipe, recipe_of
from moesaic.kernels.ops import ExpertWeights

NAME = "humming"
REACH = 11
"""Powers of two that folded scales of an expert may span."""


def pack(w: ExpertWeights, before: ExpertWeights | None = None) -> ExpertWeights:
    """The same storage in the new order, and views of it in the shapes that the kernels take.

    before: what an earlier call made of this storage; what had to be allocated then is written anew.
    Raises UnsupportedError for scales that cannot be folded; then nothing has been changed.
    """
    both = (w.w13, w.w2)
    for weight in both:
        check(weight, recipe_of(weight.form, w.between))
    folds = (None, None) if before is None else (before.w13.parts.get("fold"), before.w2.parts.get("fold"))
    w13, w2 = (packed_weight(weight, w.between, fold) for weight, fold in zip(both, folds, strict=True))
    return replace(w, w13=w13, w2=w2, packing=NAME)


def unpack(w: ExpertWeights) -> ExpertWeights:
    """The inverse."""
    w13, w2 = (unpacked_weight(weight, w.between) for weight in (w.w13, w.w2))
    return replace(w, w13=w13, w2=w2, packing="plain")


def check(w: QuantTensor, recipe: Recipe) -> None:
    if recipe.folds and w.parts["scale"].numel():
        low, high = w.parts["scale"].flatten(1).aminmax(dim=1)
        if bool((high.int() - low.int() > REACH).any()):
            raise UnsupportedError(
                f"block scales of an expert span more than 2^{REACH}, which FP8 rows leave no room for",
                where="kernels/humming.py", remedy="Use --experts triton.",
            )  # fmt: skip


def packed_weight(w: QuantTensor, encoding: Encoding, fold: Tensor | None) -> QuantTensor:
    recipe, (count, rows, columns) = recipe_of(w.form, encoding), w.shape
    data, scale = w.parts["data"], w.parts["scale"]
    parts = {**w.parts, "data": words(data, recipe.order, rows, columns)}
    if recipe.folds:
        low = scale.flatten(1).amin(1)
        parts["fold"] = torch.empty(count, device=scale.device) if fold is None else fold
        parts["fold"].copy_(torch.ldexp(torch.full_like(parts["fold"], 0.5), low.int() - 127))
    for e in range(count):
        codes = codes_of(data[e], recipe.order.bits)
        if recipe.folds:
            codes = codes.masked_fill(codes == 8, 0)  # -0: its exponent bits would be added to
            scale[e] += 1 - low[e]
        write(data[e], packed(codes, recipe.order), recipe.order.bits)
        moved = scale[e].t() if w.form.name == "fp8_block" else packed_scales(scale[e])
        scale[e].view(-1).copy_(moved.reshape(-1))
    typed = scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale
    parts["scale"] = typed.view(count, scale.shape[2], scale.shape[1])
    return replace(w, parts=parts)


def unpacked_weight(w: QuantTensor, encoding: Encoding) -> QuantTensor:
    recipe, (count, rows, columns) = recipe_of(w.form, encoding), w.shape
    order, scale = recipe.order, w.parts["scale"]
    data = w.parts["data"].view(torch.uint8).view(count, rows, columns * order.bits // 8)
    if scale.dtype == torch.float8_e8m0fnu:
        scale = scale.view(torch.uint8)
    upright = scale.view(count, scale.shape[2], scale.shape[1])
    for e in range(count):
        write(data[e], unpacked(codes_of(data[e].view(-1), order.bits).view(steps(order, columns), -1), order, rows),
              order.bits)  # fmt: skip
        moved = scale[e].t() if w.form.name == "fp8_block" else unpacked_scales(scale[e])
        upright[e].copy_(moved.clone())
        if recipe.folds:
            low = torch.frexp(w.parts["fold"][e])[1] + 127  # 2^(low - 127) / 2 = 0.5 x 2^(low - 127)
            upright[e] += (low - 1).to(torch.uint8)
    codes = data.view(torch.float8_e4m3fn) if order.bits == 8 else data
    parts = {name: part for name, part in w.parts.items() if name != "fold"}
    return replace(w, parts={**parts, "data": codes, "scale": upright})


def steps(order: Order, columns: int) -> int:
    return columns // (16 if order.flat else order.columns)


def words(data: Tensor, order: Order, rows: int, columns: int) -> Tensor:
    """INT32 view [E, ..] of a weight's bytes, in the shape that the launcher checks."""
    flat = data.view(torch.uint8).view(len(data), -1).view(torch.int32)
    return flat.view(len(data), rows, -1) if order.flat else flat.view(len(data), steps(order, columns), -1)


def codes_of(data: Tensor, bits: int) -> Tensor:
    """UINT8, one code each, of bytes that hold one or (the first in the low nibble) two."""
    data = data.view(torch.uint8)
    return data if bits == 8 else torch.stack([data & 15, data >> 4], -1).flatten(-2)


def write(data: Tensor, codes: Tensor, bits: int) -> None:
    """Writes codes over the bytes that they came from."""
    codes = codes.reshape(-1)
    bytes_ = codes if bits == 8 else codes[0::2] | codes[1::2] << 4
    data.view(torch.uint8).view(-1).copy_(bytes_)
