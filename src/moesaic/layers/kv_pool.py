"""The paged KV pool: for each layer one table of rows, a row being all that one token leaves behind for attention.

Rows have the dtype in which the model computes, or are bytes: then keys and values are in FP8 (formats/kv.py).
A slot is block * block_size + offset; who owns which block is `engine/blocks.py`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.contracts.spec import KVParts
from moesaic.formats import kv


class KVPool:
    """Rows [slots, width] per layer. Layers write the rows of the tokens they compute and read through slots."""

    def __init__(self, widths: Sequence[int], blocks: int, block_size: int, like: Tensor) -> None:
        """widths: elements per token of each layer, or bytes in FP8. `like` gives dtype and device. Rows start as
        zeros: a masked row is multiplied by a zero weight, and zero times an uninitialised NaN is NaN."""
        self.block_size = block_size
        self.layers = [like.new_zeros(blocks * block_size, width) for width in widths]

    def write(self, layer: int, slots_T: Tensor, rows_TW: Tensor, parts: KVParts) -> Tensor:
        """Stores one row per token and returns the layer's whole table [slots, width]."""
        table = self.layers[layer]
        return table.index_copy_(0, slots_T, kv.encode(rows_TW, parts) if table.dtype == torch.uint8 else rows_TW)

    @property
    def nbytes(self) -> int:
        return sum(table.nbytes for table in self.layers)


def block_bytes(widths: Sequence[int], block_size: int, itemsize: int) -> int:
    """Bytes that one block takes over all layers."""
    return sum(widths) * block_size * itemsize
