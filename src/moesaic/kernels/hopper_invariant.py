"""The Hopper kernels as `--deterministic` runs them: a row's result never depends on the rows beside it.

16-bit products of warps (tiles of up to 32 rows) and of groups of four warps (taller ones) add up sixteen elements of K
at a time, with the same bits on a Hopper GPU (`tests/test_hopper_gpu.py` compares them); the variants here have them do
so in one order. Products of E4M3 codes, which only groups of four warps make, are those of tall tiles for all numbers
of rows; whether rows of x or of w come first in the tensor core does not change its bits either (the same test).
INT4 codes then always become E4M3, in fewer steps if they are zigzag codes: `pack` makes them that, too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from moesaic.contracts.contract import Contract
from moesaic.kernels import hopper
from moesaic.kernels._hopper.pack import INVARIANT_PACKINGS, by_packing, unpack
from moesaic.kernels._hopper.pack import pack_invariant as pack
from moesaic.kernels._hopper.variants import FORMATS, SMALL, TILES, Variant, with_tile
from moesaic.kernels.hopper import encode_later, probe

if TYPE_CHECKING:
    from torch import Tensor

    from moesaic.formats.encodings import Rows
    from moesaic.kernels.ops import ExpertWeights

__all__ = ["CONTRACTS", "encode_later", "experts", "pack", "probe", "unpack"]
CONTRACTS: tuple[Contract, ...] = tuple(
    replace(next(each for each in hopper.CONTRACTS if each.op == "experts"), backend="hopper_invariant",
            batch_invariant=True, rank=57, packing=packing, pairs=pairs, formats=frozenset(form for form, _ in pairs),
            encodings=frozenset(encoding for _, encoding in pairs))
    for packing, pairs in by_packing(INVARIANT_PACKINGS)
)  # fmt: skip


def experts(x: Rows, w: ExpertWeights, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
    """Raises UnsupportedError as `hopper.experts` does."""
    variant = hopper.chosen(x, w, ids_TA, 0, INVARIANT_PACKINGS)
    return hopper.weighted(in_one_order(variant, hopper.read_by_one(w, ids_TA)), x, w, ids_TA, weights_TA)


def in_one_order(variant: Variant, lone: int = 0) -> Variant:
    """The kernel of the same rows whose bits are those of every other one made here. lone: as in `tile_for`."""
    recoded = variant.form == FORMATS["int4"] and variant.codes
    if variant.codes and variant.tile.narrow:
        variant = with_tile(variant, TILES[18 if recoded and 0 < lone < SMALL else 64])
    return replace(variant, one_order=variant.tile.narrow, zigzag=recoded)
