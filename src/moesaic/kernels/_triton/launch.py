"""What every launcher shares: block sizes as powers of two, and rows of tensors of any rank."""

from __future__ import annotations

import torch
from torch import Tensor


def power(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and `least`."""
    return max(least, 1 << max(0, n - 1).bit_length())


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def rows_of(x: Tensor) -> tuple[Tensor, int, int, int]:
    """`[..., D]` -> (itself with a dense last axis, outer stride, inner stride, inner rows).

    Row r lies at (r // inner) * outer + (r % inner) * stride. Slices of a fused product (heads of q, k, v) qualify as
    they are; what does not is copied.
    """
    if x.stride(-1) != 1 or x.dim() > 3:
        x = x.contiguous().view(-1, x.shape[-1])
    if x.dim() == 3:
        return x, x.stride(0), x.stride(1), x.shape[1]
    if x.dim() == 2:
        return x, x.stride(0), 0, 1
    return x, 0, 0, 1


def as_bytes(x: Tensor) -> Tensor:
    """The same storage as UINT8, for one-byte types."""
    return x.view(torch.uint8)
