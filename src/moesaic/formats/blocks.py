"""Blocks along the last axis, their largest magnitudes, and division by scales: what the formats' arithmetic shares."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.errors import UnsupportedError


def split(x: Tensor, size: int) -> Tensor:
    """`[..., K]` -> a view `[..., K/size, size]`. Raises UnsupportedError where size does not divide K."""
    if x.shape[-1] % size:
        raise UnsupportedError(
            f"blocks of {size} do not divide a width of {x.shape[-1]}",
            remedy=f"Use a width that is a multiple of {size}, or leave this tensor unquantised.",
        )
    return x.unflatten(-1, (-1, size)) if x.shape[-1] else x.reshape(*x.shape[:-1], 0, size)


def amax(x: Tensor, keepdim: bool = False) -> Tensor:
    """The largest magnitude along the last axis, never -0, without a temporary of x's size; NaN where there is one."""
    low, high = x.aminmax(dim=-1, keepdim=keepdim)
    return torch.maximum(high, low.neg_()).abs_()


def divide(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale in new storage; 0 where the scale is 0, which says that x is 0 or too small to be stored."""
    return x / scale.masked_fill(scale == 0, torch.inf)
