"""The Hopper kernels as `--deterministic` runs them: a row's result never depends on the rows beside it.

16-bit products of warps (tiles of up to 32 rows) and of groups of four warps (taller ones) add up sixteen elements of K
at a time, with the same bits on a Hopper GPU (`tests/test_hopper_gpu.py` compares them); the variants here have them do
so in one order. Products of E4M3 codes, which only groups of four warps make, are those of tall tiles for all numbers
of rows; whether rows of x or of w come first in the tensor core does not change its bits either (the same test).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from moesaic.contracts.contract import Contract
from moesaic.kernels import hopper
from moesaic.kernels._hopper.variants import TILES, Variant, with_tile
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
    variant = in_one_order(hopper.chosen(x, w, ids_TA, 0))
    return hopper.weighted(variant, x, w, ids_TA, weights_TA)


def in_one_order(variant: Variant) -> Variant:
    """The kernel of the same rows whose bits are those of every other one made here."""
    if variant.codes and variant.tile.narrow:
        variant = with_tile(variant, TILES[64])
    return replace(variant, one_order=variant.tile.narrow)
