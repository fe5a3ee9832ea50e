"""E4M3 elements (`float8_e4m3fn`): the cast that saturates."""

from __future__ import annotations

import torch
from torch import Tensor

MAX = 448.0
"""The largest finite E4M3 value: 1.75 x 2^8."""


def cast(x: Tensor) -> Tensor:
    """FP32 -> E4M3, to nearest even, saturating; NaN stays NaN. Overwrites x.

    The clamp is not optional: what torch's own cast does on overflow depends on its version.
    """
    return x.clamp_(-MAX, MAX).to(torch.float8_e4m3fn)
