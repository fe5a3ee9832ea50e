"""INT4 codes as groups of warps want them beside E4M3 rows (`hopper_invariant`), and back, within their storage.

A code n of a value v = n - 8 becomes the zigzag code of v: 2 v, or -2 v - 1 where v is negative. Beside a sign bit in
its lowest place stand then three bits of magnitude, and a kernel makes four such codes E4M3 with three instructions.
Places and scales stay as they are.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from moesaic.kernels.ops import ExpertWeights

NAME = "zigzag"
PAIRS = frozenset({("int4", "fp8_tensor"), ("int4", "fp8_token")})
"""Weight formats and encodings of rows for which codes are packed."""


def packing_of(w: ExpertWeights) -> str:
    """In which the kernels want these experts."""
    return NAME if (w.w13.form.name, w.between.name) in PAIRS else "plain"


def pack(w: ExpertWeights, before: ExpertWeights | None = None) -> ExpertWeights:
    """The same storage with other codes, where the kernels want them. before: what an earlier call returned."""
    if w.packing == "plain" and packing_of(w) == NAME:
        for codes in codes_of(w):
            codes.copy_(zigzag(codes))
    return replace(w, packing=packing_of(w))


def unpack(w: ExpertWeights) -> ExpertWeights:
    """The inverse."""
    if w.packing == NAME:
        for codes in codes_of(w):
            codes.copy_(unzigzag(codes))
    return replace(w, packing="plain")


def codes_of(w: ExpertWeights) -> list[Tensor]:
    """UINT8, an expert each: what passes through a copy at a time."""
    return [*w.w13.parts["data"], *w.w2.parts["data"]]


def zigzag(codes: Tensor) -> Tensor:
    """UINT8, two codes in a byte each."""
    values = codes ^ 0x88  # in two's complement
    return (values << 1 & 0xEE) ^ (values >> 3 & 0x11) * 15


def unzigzag(codes: Tensor) -> Tensor:
    signs = codes & 0x11
    return ((codes ^ signs * 15) >> 1 & 0x77 | signs << 3) ^ 0x88
