"""The one comparison of numbers with an oracle: the worst row decides, and anything that is not a number must agree.

An average hides a mis-routed token: 8 zeroed rows of 4,096 pass a global 1e-3 check. R rows, D columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def row_errors(actual: Tensor, expected: Tensor) -> Tensor:
    """||actual - expected|| / ||expected|| of each row of the last axis, FP64 [R].

    Infinite where a NaN or an infinity of either side is not at the same place, with the same sign, in the other, and
    where a row should be zero and is not. Raises AssertionError where the shapes differ.
    """
    assert actual.shape == expected.shape, f"shapes differ: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    a_RD, b_RD = (x.detach().to("cpu", torch.float64).reshape(-1, x.shape[-1]) for x in (actual, expected))
    odd_RD = ~(a_RD.isfinite() & b_RD.isfinite())
    same_RD = (a_RD == b_RD) | (a_RD.isnan() & b_RD.isnan())
    a_RD, b_RD = a_RD.masked_fill(odd_RD, 0.0), b_RD.masked_fill(odd_RD, 0.0)
    difference_R, norm_R = (a_RD - b_RD).norm(dim=-1), b_RD.norm(dim=-1)
    errors_R = torch.where(difference_R == 0, 0.0, difference_R / norm_R)
    return errors_R.masked_fill((odd_RD & ~same_RD).any(-1), math.inf)


def worst_row(actual: Tensor, expected: Tensor) -> float:
    """The largest row error; 0.0 of no rows."""
    errors_R = row_errors(actual, expected)
    return errors_R.max().item() if len(errors_R) else 0.0


def assert_rows_close(actual: Tensor, expected: Tensor, limit: float, what: str = "") -> float:
    """Asserts that every row's error is at most `limit`; returns the worst."""
    errors_R = row_errors(actual, expected)
    assert len(errors_R), f"{what}: there is nothing to compare"
    worst = int(errors_R.argmax())
    bad = int((errors_R > limit).sum())
    assert not bad, f"{what}: {bad} of {len(errors_R)} rows above {limit:.3g}; row {worst}: {errors_R[worst]:.3g}"
    return errors_R[worst].item()
