"""Rotary position embeddings: frequencies (plain, linear, YaRN) and the table of angles.

Formulas: RoPE (Su et al. 2021, arXiv 2104.09864 eq. 34); YaRN (Peng et al. 2023, arXiv 2309.00071 sections 3.2, 3.4).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moesaic.contracts.spec import RopeSpec, Yarn


def frequencies(spec: RopeSpec) -> Tensor:
    """FP32 angular frequencies [dim / 2], radians per position."""
    exponent = torch.arange(0, spec.dim, 2, dtype=torch.float32) / spec.dim
    plain = 1.0 / (spec.theta**exponent)
    return yarn_blend(plain, spec.dim, spec.theta, spec.yarn) if spec.yarn else plain / spec.linear_factor


def yarn_blend(plain: Tensor, dim: int, theta: float, yarn: Yarn) -> Tensor:
    """Fast dimensions keep their frequency, slow ones are interpolated by `factor`, with a linear ramp between."""
    low, high = (
        dim * math.log(yarn.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (yarn.beta_fast, yarn.beta_slow)
    )
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = (high - low) or 0.001
    slow = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return plain / yarn.factor * slow + plain * (1 - slow)


class RopeTable:
    """cos and sin of every position up to a length, FP32 [length, dim / 2], scaled by YaRN's attention factor."""

    def __init__(self, spec: RopeSpec, length: int, device: torch.device) -> None:
        angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies(spec))
        factor = spec.yarn.attention_factor if spec.yarn else 1.0
        self.cos_LD = (angles.cos() * factor).to(device)
        self.sin_LD = (angles.sin() * factor).to(device)

    def at(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), each FP32 [T, dim / 2]."""
        return self.cos_LD.index_select(0, positions_T), self.sin_LD.index_select(0, positions_T)
