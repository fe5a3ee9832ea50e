"""Exact order and exact mass: what makes the sampler's results independent of the batch.

Floating-point sums depend on how a device splits them, and `topk` leaves equal values in any order. Here the order
is total (higher logit first, then lower token id) and probability mass is summed in integers, which is associative.

Legend: R rows, V vocabulary, K candidates of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ID_BITS = 32
_ID_MASK = (1 << _ID_BITS) - 1

# Rows are worked on in chunks of about this many logits: temporaries (8 bytes per logit) stay in the cache of a CPU,
# and within tens of megabytes on a GPU.
_CHUNK_CPU = 1 << 18
_CHUNK_DEVICE = 1 << 22


def order_keys(logits_RV: Tensor) -> Tensor:
    """int64 [R, V], all different in a row: a higher key is a higher FP32 logit, or an equal one with a lower id."""
    bits_RV = (logits_RV + 0.0).view(torch.int32)  # + 0.0: minus zero equals zero
    bits_RV = bits_RV ^ ((bits_RV >> 31) & 0x7FFFFFFF)  # as integers, negative floats run backwards
    id_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    return bits_RV.long().bitwise_left_shift_(_ID_BITS).add_(_ID_MASK - id_V)


def best(keys_RV: Tensor, count: int) -> Tensor:
    """The ids (int64 [R, K], K = min(count, V)) of the `count` first tokens of each row, best first."""
    if count >= keys_RV.shape[1]:
        top_RK = keys_RV.sort(dim=1, descending=True).values
    else:
        top_RK = keys_RV.topk(count, dim=1).values
    return _ID_MASK - (top_RK & _ID_MASK)


def mass_bits(vocab_size: int) -> int:
    """The fixed-point scale: a row whose tokens all have mass 2^bits sums to at most 2^62."""
    return 62 - vocab_size.bit_length()


def masses(weight: Tensor, bits: int) -> Tensor:
    """FP64 weights in [0, 1] as int64 fixed point, rounded down: off by less than 2^-bits."""
    return (weight * 2.0**bits).long()


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """How many rows to work on at once."""
    return max(1, (_CHUNK_CPU if device.type == "cpu" else _CHUNK_DEVICE) // vocab_size)
