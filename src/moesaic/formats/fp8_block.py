"""`fp8_block`: E4M3 with one FP32 scale per 128 x 128 block (DeepSeek-V3). value = data x scale, scale = amax / 448.

Blocks start at the segment's first row; the last block of rows and of columns may be smaller.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from moesaic.contracts.scheme import WeightFormat
from moesaic.formats import blocks, e4m3
from moesaic.formats.base import Field, Rule

BLOCK = 128


def fields(form: WeightFormat) -> dict[str, Field]:
    return {"data": Field(torch.float8_e4m3fn, 1, 1), "scale": Field(torch.float32, BLOCK, BLOCK)}


def quantize(w: Tensor, form: WeightFormat, rule: Rule = "ceil") -> dict[str, Tensor]:
    tiles = _tiles(w)
    scale = blocks.amax(blocks.amax(tiles).transpose(-1, -2)) / e4m3.MAX
    data = e4m3.cast(blocks.divide(tiles, scale[..., :, None, :, None]))
    return {"data": _crop(data, (w.shape[-2], w.shape[-1])), "scale": scale}


def dequantize(parts: Mapping[str, Tensor], form: WeightFormat, shape: tuple[int, int]) -> Tensor:
    tiles = _tiles(parts["data"].float())
    return _crop(tiles.mul_(parts["scale"][..., :, None, :, None]), shape)


def _tiles(x: Tensor) -> Tensor:
    """`[..., N, K]` -> `[..., N/128, 128, K/128, 128]`: a view where 128 divides both, else padded with zeros."""
    rows, columns = x.shape[-2:]
    if rows % BLOCK or columns % BLOCK:
        x = pad(x, (0, -columns % BLOCK, 0, -rows % BLOCK))
    tiles: Tensor = x.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    return tiles


def _crop(tiles: Tensor, shape: tuple[int, int]) -> Tensor:
    """`_tiles` undone."""
    whole = tiles.flatten(-4, -3).flatten(-2)
    return whole.narrow(-2, 0, shape[0]).narrow(-1, 0, shape[1]).contiguous()
