"""Two 4-bit codes per byte along K, the even index in the low nibble."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor) -> Tensor:
    """UINT8 codes 0..15 `[..., K]`, contiguous -> UINT8 `[..., K/2]`."""
    pairs = codes.view(torch.int16)  # the odd code's low nibble is bit 8 of the pair
    return (pairs | (pairs >> 4)).to(torch.uint8)


def unpack(data: Tensor) -> Tensor:
    """UINT8 `[..., K/2]` -> UINT8 codes `[..., K]`."""
    pairs = data.to(torch.int16)
    return ((pairs | (pairs << 4)) & 0x0F0F).view(torch.uint8)


def look_up(data: Tensor, values: Tensor) -> Tensor:
    """UINT8 `[..., K/2]` -> values[code] `[..., K]`, for 16 values of FP32; one look-up per byte."""
    byte = torch.arange(256, device=data.device)
    pairs = torch.stack((values[byte & 15], values[byte >> 4]), -1).view(torch.int64).flatten()
    found = pairs.index_select(0, data.flatten().int()).view(torch.float32)
    return found.view(*data.shape[:-1], 2 * data.shape[-1])
