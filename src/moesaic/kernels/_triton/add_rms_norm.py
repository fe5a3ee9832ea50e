"""The sum with the residual and its norm, in one pass; see rms_norm.py."""

from __future__ import annotations

from torch import Tensor

from moesaic.kernels._triton.rms_norm import normalize


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, w_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return normalize(x_TD, residual_TD, w_D, eps)
