"""Codes of weights as the Hopper kernels want them, and back, within their storage; scales stay as they are.

FP4, MXFP8, and FP8 beside 16-bit rows: a kernel makes operands of the codes in 32 bits by taking out bits where they
lie, after few rotations. What a rotation is to serve at once must lie as it does in the operand: so the 32 bits change
places. Of eight FP4 codes BF16 operands are made with 9 instructions instead of 15 then (`decode_e2m1`), halves with 9
instead of 11 (`decode_e2m1_halves`), of four E4M3 codes BF16 ones with 5 instead of 7 (`decode_e4m3`).

INT4, beside E4M3 rows and for `hopper_invariant` only: a code n of a value v = n - 8 becomes the zigzag code of v:
2 v, or -2 v - 1 where v is negative. Beside a sign bit in its lowest place stand then three bits of magnitude, and a
kernel makes four such codes E4M3 with three instructions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from moesaic.kernels._hopper.variants import PAIRS
from moesaic.kernels.in_place import all_or_none
from moesaic.kernels.ops import ExpertWeights

Packings = Mapping[tuple[str, str], str]
Change = Callable[[Tensor], Tensor]
"""Of some rows of codes, UINT8."""
PACKINGS: Packings = {
    ("mxfp4", "bf16"): "e2m1_bf16", ("mxfp4", "mxfp8"): "e2m1_bf16", ("nvfp4", "bf16"): "e2m1_bf16",
    ("nvfp4", "nvfp4"): "e2m1_halves", ("mxfp8", "mxfp8"): "e4m3_bf16", ("mxfp8", "bf16"): "e4m3_bf16",
    **{(f"fp8_{kind}", "bf16"): "e4m3_bf16" for kind in ("tensor", "channel", "block")},
}  # fmt: skip
"""Weight format and encoding of rows -> how codes are packed, where they are."""
INVARIANT_PACKINGS: Packings = {**PACKINGS, ("int4", "fp8_tensor"): "zigzag", ("int4", "fp8_token"): "zigzag"}
"""The same of `hopper_invariant`."""
AT_ONCE = 1 << 24
"""Bytes of codes that are rewritten together; copies take up to four times as many meanwhile."""


def by_packing(packings: Packings) -> list[tuple[str, frozenset[tuple[str, str]]]]:
    """All pairs that the kernels multiply, by how they are packed."""
    found: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for pair in sorted(PAIRS):
        found[packings.get(pair, "plain")].add(pair)
    return [(name, frozenset(pairs)) for name, pairs in sorted(found.items())]


def packing_of(w: ExpertWeights, packings: Packings = PACKINGS) -> str:
    return packings.get((w.w13.form.name, w.between.name), "plain")


def pack(w: ExpertWeights, before: ExpertWeights | None = None) -> ExpertWeights:
    """The same storage with other codes, where `hopper` wants them. before: what an earlier call returned."""
    return packed(w, packing_of(w))


def pack_invariant(w: ExpertWeights, before: ExpertWeights | None = None) -> ExpertWeights:
    """The same for `hopper_invariant`."""
    return packed(w, packing_of(w, INVARIANT_PACKINGS))


def packed(w: ExpertWeights, name: str) -> ExpertWeights:
    if w.packing == "plain" and name != "plain":
        rewrite(w, *WAYS[name])
        return replace(w, packing=name)
    return w


def unpack(w: ExpertWeights) -> ExpertWeights:
    """The inverse of both."""
    if w.packing != "plain":
        rewrite(w, *reversed(WAYS[w.packing]))
    return replace(w, packing="plain")


def rewrite(w: ExpertWeights, change: Change, back: Change) -> None:
    """All codes, or, where that fails, none of them."""
    every = [data.view(torch.uint8).view(-1, data.shape[-1]) for data in (w.w13.parts["data"], w.w2.parts["data"])]
    pieces = [some for rows in every for some in rows.split(max(1, AT_ONCE // rows.shape[1]))]

    def write(some: Tensor, change: Change) -> None:
        some.copy_(change(some))

    all_or_none([(partial(write, some, change), partial(write, some, back)) for some in pieces])


def moved(codes: Tensor, places: Sequence[int]) -> Tensor:
    """codes: UINT8 [..., 4 n], words of 32 bits. Bit i of each goes to bit places[i]."""
    words = codes.view(torch.int32)
    masks: dict[int, int] = defaultdict(int)
    for bit, place in enumerate(places):
        masks[place - bit] |= 1 << place
    out = torch.zeros_like(words)
    for by, mask in masks.items():
        out |= (words << by if by > 0 else words >> -by).bitwise_and_(signed(mask))
    return out.view(torch.uint8)


def signed(bits: int) -> int:
    """As INT32."""
    return bits - (bits >> 31 << 32)


def places_bf16(bits: Sequence[int], rotations: Sequence[Sequence[int]]) -> Iterator[int]:
    """Operand i of a word holds code i in its lower half and code i + len(rotations) in its upper one: bits where BF16
    has them (`bits`, from a code's lowest one up), before the word was rotated to the right by rotations[i]."""
    for half in (0, 16):
        for of_code in rotations:
            yield from ((half + place + by) % 32 for place, by in zip(bits, of_code, strict=True))


E2M1 = (6, 7, 8, 15), ((0, 0, 8, 0), (2,) * 4, (12,) * 4, (6,) * 4)
E4M3 = (4, 5, 6, 7, 8, 9, 10, 15), ((0,) * 8, (8, 8, 8, 4, 8, 8, 8, 4))
"""Of each: places of a code's bits in BF16, and rotations."""


def places_halves() -> Iterator[int]:
    """A byte still holds two codes: the first where the upper byte of a half has it, the other in the bits between."""
    for byte in range(4):
        yield from (8 * byte + place for place in (1, 2, 3, 7, 4, 5, 6, 0))


def inverse(places: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(places)), key=lambda bit: places[bit]))


def zigzag(codes: Tensor) -> Tensor:
    """UINT8, two codes in a byte each."""
    values = codes ^ 0x88  # in two's complement
    return (values << 1 & 0xEE) ^ (values >> 3 & 0x11) * 15


def unzigzag(codes: Tensor) -> Tensor:
    signs = codes & 0x11
    return ((codes ^ signs * 15) >> 1 & 0x77 | signs << 3) ^ 0x88


def moves(places: Iterator[int]) -> tuple[Change, Change]:
    there = tuple(places)
    return partial(moved, places=there), partial(moved, places=inverse(there))


WAYS = {
    "e2m1_bf16": moves(places_bf16(*E2M1)),
    "e2m1_halves": moves(places_halves()),
    "e4m3_bf16": moves(places_bf16(*E4M3)),
    "zigzag": (zigzag, unzigzag),
}
"""There, and back."""
