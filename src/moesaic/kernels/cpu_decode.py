"""Codes -> the numbers that they stand for, on a CPU: tiles of weights small enough to stay in its cache, and rows.

A weight is decoded tile by tile, each when it is multiplied, and the tile is dropped: memory holds the codes only.
What is common to a whole output row (the scale of a tensor or of a channel, and a power of two that the decoding of
E4M3 leaves out) is not multiplied in here: it is the decoder's `factor`, for the result of the product.

torch's own cast from E4M3 is not vectorised: shifting the bits into an FP16 number, whose conversion to FP32 is, is
ten times as fast and exact for every code but NaN, which loading refuses in a weight (`QuantTensor.check`). Rows may
hold NaN, so theirs are looked up.

Letters: E experts, N rows of a weight, K columns, B blocks along K, T rows of activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from moesaic.formats import e2m1, fp8_block, int4, mx, nv
from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import Rows, fp8_group128

TILE = 1 << 19
"""Elements of a decoded tile: 2 MiB in FP32."""

_CODES = torch.arange(256, dtype=torch.uint8)
_E4M3 = _CODES.view(torch.float8_e4m3fn).float()
_UE8M0 = mx.decode_scale(_CODES)
_LEFT_OUT = 256.0  # an E4M3 number is 2^8 times the FP16 number whose exponent and mantissa it becomes


def _pairs(values: Tensor) -> Tensor:
    """16 FP32 values -> by byte, the two that its nibbles stand for, low nibble first, as one INT64."""
    codes = _CODES.int()
    return torch.stack((values[codes & 15], values[codes >> 4]), -1).view(torch.int64).flatten()


_E2M1 = _pairs(torch.tensor(e2m1.VALUES))
_INT4 = _pairs(torch.arange(16.0) - int4.OFFSET)
_UINT4 = _pairs(torch.arange(16.0))


# --- tiles of weights ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Decoder:
    """One format.  tile: (weight, some of its rows) -> FP32 `[*lead, rows, K]`.

    factor: FP32 `[*lead, N]`, `[*lead, 1]` or `[]`, to be multiplied into the columns of the product.
    bf16: tiles hold BF16 numbers, but for its subnormals (formats.md, "Exactness"), and the factor is a power of two.
    """

    tile: Callable[[QuantTensor, slice], Tensor]
    factor: Callable[[QuantTensor], Tensor | None]
    bf16: bool


def row_tiles(w: QuantTensor) -> Iterator[slice]:
    """The rows of a weight in tiles of at most TILE elements (or one row): a function of its shape alone."""
    rows, step = w.shape[-2], max(1, TILE // max(w.columns, 1))
    return (slice(at, min(at + step, rows)) for at in range(0, rows, step))


def experts_at_once(w: QuantTensor) -> int:
    """How many experts' weights a tile holds; 1 where one needs several tiles."""
    return max(1, TILE // max(w.shape[-2] * w.columns, 1))


def take_experts(w: QuantTensor, experts: list[int]) -> QuantTensor:
    """The codes of some experts, ascending: a view where they are neighbours, else a copy of codes."""
    if experts[-1] - experts[0] + 1 == len(experts):
        return w[experts[0] : experts[-1] + 1]
    index = torch.tensor(experts)
    return replace(w, parts={name: _select(part, index) for name, part in w.parts.items()})


def _select(part: Tensor, index: Tensor) -> Tensor:
    if part.dtype == torch.float8_e4m3fn:  # indexing is not implemented for it everywhere
        return part.view(torch.uint8).index_select(0, index).view(part.dtype)
    return part.index_select(0, index)


def _fp8(w: QuantTensor, rows: slice) -> Tensor:
    """FP32 values / 256: the sign goes to bit 15 of an FP16, exponent and mantissa to bits 13..7."""
    codes = w.parts["data"][..., rows, :].view(torch.int8).to(torch.int16)
    return codes.bitwise_left_shift_(7).bitwise_and_(-0x4080).view(torch.float16).float()


def _fp8_block(w: QuantTensor, rows: slice) -> Tensor:
    return _scaled(_fp8(w, rows), w.parts["scale"].index_select(-2, _block_of_row(w.segments)[rows]), fp8_block.BLOCK)


def _mxfp8(w: QuantTensor, rows: slice) -> Tensor:
    return _scaled(_fp8(w, rows), _look_up(_UE8M0, w.parts["scale"][..., rows, :]), mx.GROUP)


def _mxfp4(w: QuantTensor, rows: slice) -> Tensor:
    return _scaled(_nibbles(_E2M1, w, rows), _look_up(_UE8M0, w.parts["scale"][..., rows, :]), mx.GROUP)


def _nvfp4(w: QuantTensor, rows: slice) -> Tensor:
    return _scaled(_nibbles(_E2M1, w, rows), _look_up(_E4M3, w.parts["scale"][..., rows, :]), nv.GROUP)


def _int4(w: QuantTensor, rows: slice) -> Tensor:
    scale = w.parts["scale"][..., rows, :].float()
    if not w.form.zero_points:
        return _scaled(_nibbles(_INT4, w, rows), scale, w.form.group)
    values, zero = _nibbles(_UINT4, w, rows), w.parts["zero"][..., rows, :].float()
    values.unflatten(-1, (-1, w.form.group)).sub_(zero[..., None])
    return _scaled(values, scale, w.form.group)


def _nibbles(pairs: Tensor, w: QuantTensor, rows: slice) -> Tensor:
    return _look_up_pairs(pairs, w.parts["data"][..., rows, :])


@lru_cache(maxsize=256)
def _segment_of_row(segments: tuple[int, ...]) -> Tensor:
    return torch.repeat_interleave(torch.tensor(segments))


@lru_cache(maxsize=256)
def _block_of_row(segments: tuple[int, ...]) -> Tensor:
    """Of each row, which row of fp8_block's scales is its own: blocks start anew at every segment."""
    found, first = [], 0
    for rows in segments:
        found.append(torch.arange(rows) // fp8_block.BLOCK + first)
        first += -(-rows // fp8_block.BLOCK)
    return torch.cat(found)


def _none(w: QuantTensor) -> Tensor | None:
    return None


def _power(w: QuantTensor) -> Tensor:
    return torch.tensor(_LEFT_OUT)


def _by_channel(w: QuantTensor) -> Tensor:
    return w.parts["scale"] * _LEFT_OUT


def _by_segment(w: QuantTensor) -> Tensor:
    """From one number per segment to one per row."""
    scale = w.parts["global_scale"] if "global_scale" in w.parts else w.parts["scale"] * _LEFT_OUT
    return scale if len(w.segments) == 1 else scale.index_select(-1, _segment_of_row(w.segments))


WEIGHTS = {
    "fp8_tensor": Decoder(_fp8, _by_segment, bf16=False),
    "fp8_channel": Decoder(_fp8, _by_channel, bf16=False),
    "fp8_block": Decoder(_fp8_block, _power, bf16=False),
    "mxfp8": Decoder(_mxfp8, _power, bf16=True),
    "mxfp4": Decoder(_mxfp4, _none, bf16=True),
    "nvfp4": Decoder(_nvfp4, _by_segment, bf16=False),
    "int4": Decoder(_int4, _none, bf16=False),
}


# --- rows ------------------------------------------------------------------------------------------------------------

Decoded = tuple[Tensor, Tensor | None]
"""(FP32 values `[T, K]`, FP32 factor `[T, 1]` or `[]` or None): their product is what the codes stand for."""
Parts = dict[str, Tensor]


def decode_rows(x: Rows) -> Decoded:
    return ROWS[x.encoding.name](dict(x.parts))


def take_rows(x: Rows, index: slice) -> Rows:
    """A view of some rows; a factor of all rows stays."""
    return replace(x, parts={name: part[index] if part.ndim == 2 else part for name, part in x.parts.items()})


def in_bf16(x: Rows) -> bool:
    """Whether the values are BF16 numbers and there is no factor."""
    return x.encoding.name == "mxfp8" or (x.encoding.name == "bf16" and x.data.dtype == torch.bfloat16)


def _plain_rows(parts: Parts) -> Decoded:
    return parts["data"].float(), None


def _fp8_rows(parts: Parts) -> Decoded:
    return _look_up(_E4M3, parts["data"]), parts["scale"]


def _group128_rows(parts: Parts) -> Decoded:
    return _scaled(_look_up(_E4M3, parts["data"]), parts["scale"], fp8_group128.GROUP), None


def _mxfp8_rows(parts: Parts) -> Decoded:
    return _scaled(_look_up(_E4M3, parts["data"]), _look_up(_UE8M0, parts["scale"]), mx.GROUP), None


def _nvfp4_rows(parts: Parts) -> Decoded:
    values = _scaled(_look_up_pairs(_E2M1, parts["data"]), _look_up(_E4M3, parts["scale"]), nv.GROUP)
    return values, parts["global_scale"]


ROWS: dict[str, Callable[[Parts], Decoded]] = {
    "bf16": _plain_rows,
    "fp8_tensor": _fp8_rows,
    "fp8_token": _fp8_rows,
    "fp8_group128": _group128_rows,
    "mxfp8": _mxfp8_rows,
    "nvfp4": _nvfp4_rows,
}


# --- common to both --------------------------------------------------------------------------------------------------


def _scaled(values: Tensor, scale: Tensor, size: int) -> Tensor:
    """values `[..., K]`, overwritten, times scale `[..., B]`, each for `size` columns (the last for what is left)."""
    if values.shape[-1] % size:
        return values.mul_(scale.repeat_interleave(size, -1)[..., : values.shape[-1]])
    values.unflatten(-1, (scale.shape[-1], size)).mul_(scale[..., None])
    return values


def _look_up(table: Tensor, codes: Tensor) -> Tensor:
    """One FP32 value per byte."""
    return table.index_select(0, codes.reshape(-1).view(torch.uint8).int()).view(codes.shape)


def _look_up_pairs(pairs: Tensor, data: Tensor) -> Tensor:
    """UINT8 `[..., K/2]` -> FP32 `[..., K]`."""
    return pairs.index_select(0, data.flatten().int()).view(torch.float32).view(*data.shape[:-1], 2 * data.shape[-1])
