"""The order in which Humming's kernels read weights on Hopper, as permutations, in pure torch.

A weight [N, K] is cut into blocks of 64 rows and so many columns; the codes of a block lie as the registers of the 32
threads of a warp take them. Every block is permuted alike, so one list of indices says all, and its inverse brings the
weight back bit for bit. Sizes in bytes do not change: packing happens within the storage, an expert at a time.

Written from what the package's repacking kernel computes (humming/include/humming/kernel/process.cuh, 0.1.19), and held
against it bit by bit in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

ROWS = 64


@dataclass(frozen=True, slots=True)
class Order:
    """How the codes of a weight lie.

    bits: of a code.  rows_bits: of an element of the rows that it will meet (16 or 8).  long: blocks span 64 columns
    instead of 256 / rows_bits.  transposed: the two halves of a register pair change places.  signs: a code's sign is
    laid out like this, its magnitude in order.  flat: not permuted but in chunks of 16 bytes, for equal widths.
    folded: INT4 codes n become n - 8 where that is not negative, else 15 - n.
    """

    bits: int
    rows_bits: int
    long: bool = False
    transposed: bool = False
    signs: bool = False
    flat: bool = False
    folded: bool = False

    @property
    def columns(self) -> int:
        """Of a block."""
        return 64 if self.long else 256 // self.rows_bits


def packed(codes_NK: Tensor, order: Order) -> Tensor:
    """UINT8 codes [N, K], one each -> UINT8 codes in packed order [K / columns, N * columns].

    N a multiple of 64, K of a block's columns (flat: of 16).
    """
    rows, size = codes_NK.shape
    if order.flat:
        return codes_NK.view(rows // ROWS, ROWS, size // 16, 16).permute(2, 0, 1, 3).reshape(size // 16, rows * 16)
    blocks = codes_NK.view(rows // ROWS, ROWS, size // order.columns, order.columns).permute(2, 0, 1, 3)
    blocks = blocks.reshape(size // order.columns, rows // ROWS, -1)
    values, signs = (index.to(codes_NK.device) for index in indices(order))
    top = 1 << (order.bits - 1)
    if order.folded:
        blocks = torch.where(blocks >= top, blocks - top, 2 * top - 1 - blocks)
    if not order.signs:
        return blocks[..., values].flatten(1)
    return ((blocks[..., values] & (top - 1)) | (blocks[..., signs] & top)).flatten(1)


def unpacked(packed_BJ: Tensor, order: Order, rows: int) -> Tensor:
    """The inverse."""
    steps = packed_BJ.shape[0]
    if order.flat:
        return packed_BJ.view(steps, rows // ROWS, ROWS, 16).permute(1, 2, 0, 3).reshape(rows, steps * 16)
    blocks = packed_BJ.view(steps, rows // ROWS, ROWS * order.columns)
    values, signs = (index.to(packed_BJ.device) for index in indices(order))
    top = 1 << (order.bits - 1)
    found = torch.empty_like(blocks)
    found[..., values] = blocks & (top - 1) if order.signs else blocks
    if order.signs:
        high = torch.empty_like(blocks)
        high[..., signs] = blocks & top
        found |= high
    if order.folded:
        found = torch.where(found < top, found + top, 2 * top - 1 - found)
    return found.view(steps, rows // ROWS, ROWS, -1).permute(1, 2, 0, 3).reshape(rows, -1)


@lru_cache(maxsize=16)
def indices(order: Order) -> tuple[Tensor, Tensor]:
    """INT64 [64 * columns], twice: for each code of a packed block, where in the block [64, columns] its magnitude
    and its sign come from."""
    wide, per = order.rows_bits, 32 // order.bits  # codes per word
    values, signs = (torch.empty(ROWS * order.columns, dtype=torch.int64) for _ in range(2))
    for thread in range(32):
        taken = registers(thread, order)
        for word in range(4 * order.bits):
            slab, at = place_of(word, thread, order)
            if slab:
                continue  # the other blocks of these 64 columns are alike
            for k in range(per):
                spread = (k % (per * wide // 32)) * (32 // wide) + k // (per * wide // 32)
                values[at * per + k] = taken[word * per + (k if order.signs else spread)]
                signs[at * per + k] = taken[word * per + spread]
    return values, signs


def registers(thread: int, order: Order) -> list[int]:
    """Indices, in a block, of the 128 codes of 64 x 64 that a thread takes, in the order of its registers.

    Its axes: steps along K; rows by four times the width; by 16; then two halves of rows and of columns; neighbours.
    """
    wide = order.rows_bits
    found: dict[tuple[int, ...], int] = {}
    for i in range(8):
        for j in range(wide // 2):
            for k in range(32 // wide):
                row, column = i * 8 + thread // 4, j * (128 // wide) + thread % 4 * (32 // wide) + k
                halves = (j % 2, i % 2) if order.transposed else (i % 2, j % 2)
                key = (j // 2, i * 8 // (wide * 4), i * 8 % (wide * 4) // 16, *halves, k)
                found[key] = row * order.columns + column % order.columns
    return [found[key] for key in sorted(found)]


def place_of(word: int, thread: int, order: Order) -> tuple[int, int]:
    """(block along K, word in the block) of a word of a thread's registers."""
    bits, per_row = order.bits, 16 * order.bits // order.rows_bits
    row, rest = divmod(word, per_row)
    j, k = divmod(rest, bits)
    if not order.long:
        return row, j * 32 * bits + thread * bits + k
    half = bits // 2
    return 0, (j * 2 + k // half) * 32 * bits + thread * bits + row * half + k % half


def packed_scales(scale_NG: Tensor) -> Tensor:
    """Scales of groups [N, G] -> [G, N], each 64 rows of the weight taken 8 apart."""
    groups = scale_NG.shape[1]
    return scale_NG.t().reshape(groups, -1, 8, 8).transpose(2, 3).reshape(groups, -1)


def unpacked_scales(scale_GN: Tensor) -> Tensor:
    groups = scale_GN.shape[0]
    return scale_GN.reshape(groups, -1, 8, 8).transpose(2, 3).reshape(groups, -1).t()
