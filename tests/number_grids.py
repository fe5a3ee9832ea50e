"""Number formats written down from their standards, one code at a time: the oracle for casts and decoders.

Nothing here uses torch's own narrow types, nor the package.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def e4m3(code: int) -> float:
    """sign, 4 bits of exponent with bias 7, 3 of mantissa; exponent 0 is subnormal; S.1111.111 is NaN."""
    sign, exponent, mantissa = (-1.0 if code & 0x80 else 1.0), (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


E4M3 = [e4m3(code) for code in range(256)]


def nearest_code(x: Tensor, magnitudes: list[float]) -> Tensor:
    """INT64: the code of the magnitude next to |x|, ties to the even code, saturating. magnitudes ascend from code 0.

    In FP64, where the distances of FP32 numbers to both neighbours are exact.
    """
    grid, size = torch.tensor(magnitudes, dtype=torch.float64), x.double().abs()
    above = torch.searchsorted(grid, size).clamp_(1, len(grid) - 1)
    up, down = grid[above] - size, size - grid[above - 1]
    return torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, above - 1)


def every_bf16() -> Tensor:
    """All finite BF16 numbers, both zeros and the subnormals included, as FP32."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    return x[x.isfinite()]


def beside(x: Tensor) -> Tensor:
    """Each number with its two FP32 neighbours: [3 * len]."""
    return torch.cat((x, x.nextafter(torch.tensor(math.inf)), x.nextafter(torch.tensor(-math.inf))))
