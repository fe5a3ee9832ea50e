"""The Hopper kernels as `--deterministic` runs them: a row's result never depends on the rows beside it.

Tiles of up to 32 rows are multiplied by warps, taller ones by groups of four warps, which add up in another order. Here
all are of the first kind, compiled so that no height changes a bit: a tile is as high as the rows ask, and prompts pay.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from moesaic.contracts.contract import Contract
from moesaic.kernels import hopper
from moesaic.kernels._hopper.variants import NARROW, TILES, variant_of
from moesaic.kernels.hopper import encode_later, probe

if TYPE_CHECKING:
    from torch import Tensor

    from moesaic.formats.encodings import Rows
    from moesaic.kernels.ops import ExpertWeights

__all__ = ["CONTRACTS", "encode_later", "experts", "probe"]
CONTRACTS: tuple[Contract, ...] = tuple(
    replace(each, backend="hopper_invariant", batch_invariant=True, rank=57)
    for each in hopper.CONTRACTS
    if each.op == "experts"
)


def experts(x: Rows, w: ExpertWeights, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
    """Raises UnsupportedError as `hopper.experts` does."""
    mean = ids_TA.numel() / w.w13.shape[0]
    tile = next((height for height in (8, 16) if height >= mean + 4 * mean**0.5), NARROW)
    variant = replace(variant_of(w.w13.form, x.encoding, TILES[tile]), one_order=True)
    return hopper.summed(*hopper.multiplied(variant, x, w, ids_TA, weights_TA))
