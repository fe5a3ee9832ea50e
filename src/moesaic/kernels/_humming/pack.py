"""Experts into the order in which Humming's kernels read them, and back, within their storage.

Bytes of a weight and of its scales stay where they are allocated, so that graphs that hold their addresses stay valid;
an expert at a time passes through a copy. Packing is a permutation but for one pair of formats: E2M1 codes that meet
FP8 rows lose the sign of a zero, and their scales become offsets from the smallest of their expert (`fold`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

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
from moesaic.kernels.in_place import all_or_none
from moesaic.kernels.ops import ExpertWeights

NAME = "humming"
REACH = 11
"""Powers of two that folded scales of an expert may span."""


def pack(w: ExpertWeights, before: ExpertWeights | None = None) -> ExpertWeights:
    """The same storage in the new order, and views of it in the shapes that the kernels take.

    before: what an earlier call made of this storage; what had to be allocated then is written anew.
    Raises UnsupportedError for scales that cannot be folded; then, as after any other error, nothing has been changed.
    """
    both = (w.w13, w.w2)
    for weight in both:
        check(weight, recipe_of(weight.form, w.between))
    olds = (None, None) if before is None else (before.w13.parts.get("fold"), before.w2.parts.get("fold"))
    stores = [
        Storage(weight, weight.parts["scale"], recipe_of(weight.form, w.between), fold_of(weight, w.between, old))
        for weight, old in zip(both, olds, strict=True)
    ]
    all_or_none([(partial(each.pack, e), partial(each.unpack, e)) for each in stores for e in range(each.experts)])
    w13, w2 = (each.packed() for each in stores)
    return replace(w, w13=w13, w2=w2, packing=NAME)


def unpack(w: ExpertWeights) -> ExpertWeights:
    """The inverse; after an error, too, nothing has been changed."""
    stores = [
        Storage(weight, upright(weight.parts["scale"]), recipe_of(weight.form, w.between), weight.parts.get("fold"))
        for weight in (w.w13, w.w2)
    ]
    all_or_none([(partial(each.unpack, e), partial(each.pack, e)) for each in stores for e in range(each.experts)])
    w13, w2 = (each.plain() for each in stores)
    return replace(w, w13=w13, w2=w2, packing="plain")


def check(w: QuantTensor, recipe: Recipe) -> None:
    if recipe.folds and w.parts["scale"].numel():
        low, high = w.parts["scale"].flatten(1).aminmax(dim=1)
        if bool((high.int() - low.int() > REACH).any()):
            raise UnsupportedError(
                f"block scales of an expert span more than 2^{REACH}, which FP8 rows leave no room for",
                where="kernels/humming.py", remedy="Use --experts triton.",
            )  # fmt: skip


def fold_of(w: QuantTensor, encoding: Encoding, old: Tensor | None) -> Tensor | None:
    """FP32 [E], half of each expert's smallest scale, where scales are folded. old: is written anew."""
    if not recipe_of(w.form, encoding).folds:
        return None
    low = w.parts["scale"].flatten(1).amin(1)
    fold = torch.empty(len(low), device=low.device) if old is None else old
    return fold.copy_(torch.ldexp(torch.full_like(fold, 0.5), low.int() - 127))


def upright(scale: Tensor) -> Tensor:
    """Of a packed weight [E, G, N], as the formats have its storage."""
    scale = scale.view(torch.uint8) if scale.dtype == torch.float8_e8m0fnu else scale
    return scale.view(len(scale), scale.shape[2], scale.shape[1])


@dataclass(frozen=True)
class Storage:
    """The bytes of a weight, in either order. scale: [E, N, G], as the formats have it.  fold: as `fold_of` returns."""

    w: QuantTensor
    scale: Tensor
    recipe: Recipe
    fold: Tensor | None

    @property
    def experts(self) -> int:
        return self.w.shape[0]

    @property
    def data(self) -> Tensor:
        """UINT8 [E, N, bytes of a row]."""
        return self.w.parts["data"].view(torch.uint8).view(*self.w.shape[:2], -1)

    @property
    def steps(self) -> int:
        order = self.recipe.order
        return self.w.columns // (16 if order.flat else order.columns)

    @property
    def blocks(self) -> bool:
        """Scales are not of groups of a row, and only change their axes."""
        return self.w.form.name == "fp8_block"

    def lowest(self, e: int) -> Tensor:
        """UINT8, an expert's smallest scale: 2^(low - 127) / 2 is 0.5 x 2^(low - 127)."""
        assert self.fold is not None
        return (torch.frexp(self.fold[e])[1] + 127).to(torch.uint8)

    def pack(self, e: int) -> None:
        codes, scale_NG = codes_of(self.data[e], self.recipe.order.bits), self.scale[e]
        if self.fold is not None:
            codes = codes.masked_fill(codes == 8, 0)  # -0: its exponent bits would be added to
            scale_NG = scale_NG + (1 - self.lowest(e))
        self.write(e, packed(codes, self.recipe.order), scale_NG.t() if self.blocks else packed_scales(scale_NG))

    def unpack(self, e: int) -> None:
        order, scale = self.recipe.order, self.scale[e]
        codes = codes_of(self.data[e].view(-1), order.bits).view(self.steps, -1)
        scale_GN = scale.view(scale.shape[1], scale.shape[0])
        scale_NG = scale_GN.t() if self.blocks else unpacked_scales(scale_GN)
        if self.fold is not None:
            scale_NG = scale_NG + (self.lowest(e) - 1)
        self.write(e, unpacked(codes, order, self.w.shape[1]), scale_NG)

    def write(self, e: int, codes: Tensor, scale: Tensor) -> None:
        """Over what they were computed from, which is read no more: nothing fails here that has begun."""
        flat, scale = codes.reshape(-1), scale.clone(memory_format=torch.contiguous_format)
        bytes_ = flat if self.recipe.order.bits == 8 else flat[0::2] | flat[1::2] << 4
        self.data[e].view(-1).copy_(bytes_)
        self.scale[e].view(-1).copy_(scale.view(-1))

    def packed(self) -> QuantTensor:
        scale, (_, rows, columns) = self.scale, self.w.shape
        typed = scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale
        parts = {
            **self.w.parts, "data": words(self.w.parts["data"], self.recipe.order, rows, columns),
            "scale": typed.view(len(scale), scale.shape[2], scale.shape[1]),
        }  # fmt: skip
        return replace(self.w, parts=parts | ({} if self.fold is None else {"fold": self.fold}))

    def plain(self) -> QuantTensor:
        codes = self.data.view(torch.float8_e4m3fn) if self.recipe.order.bits == 8 else self.data
        kept = {name: part for name, part in self.w.parts.items() if name != "fold"}
        return replace(self.w, parts={**kept, "data": codes, "scale": self.scale})


def words(data: Tensor, order: Order, rows: int, columns: int) -> Tensor:
    """INT32 view [E, ..] of a weight's bytes, in the shape that the launcher checks."""
    flat = data.view(torch.uint8).view(len(data), -1).view(torch.int32)
    return flat.view(len(data), rows if order.flat else columns // order.columns, -1)


def codes_of(data: Tensor, bits: int) -> Tensor:
    """UINT8, one code each, of bytes that hold one or (the first in the low nibble) two."""
    data = data.view(torch.uint8)
    return data if bits == 8 else torch.stack([data & 15, data >> 4], -1).flatten(-2)
