"""The comparison itself can fail, and for the right reasons."""

from __future__ import annotations

import math

import pytest
import torch

from tests.compare import assert_rows_close, row_errors, worst_row


def test_a_relative_error_by_hand() -> None:
    errors = row_errors(torch.tensor([[3.0, 4.5], [0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    assert errors.tolist() == [0.1, 0.0]


def test_one_zeroed_row_among_thousands_is_seen() -> None:
    expected = torch.randn(4096, 64)
    actual = expected.clone()
    actual[77] = 0
    assert (actual - expected).norm() / expected.norm() < 0.02
    assert worst_row(actual, expected) == 1.0
    with pytest.raises(AssertionError, match=r"1 of 4096 rows above 0\.5; row 77"):
        assert_rows_close(actual, expected, 0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_must_agree(value: float) -> None:
    plain, odd = torch.ones(2, 3), torch.ones(2, 3)
    odd[1, 2] = value
    for actual, expected in ((plain, odd), (odd, plain), (odd, -odd if value == value else plain)):
        assert worst_row(actual, expected) == math.inf
    assert row_errors(odd, odd).tolist() == [0.0, 0.0]


def test_an_error_beside_an_agreeing_infinity_still_counts() -> None:
    expected = torch.tensor([[math.inf, 1.0]])
    assert worst_row(torch.tensor([[math.inf, 3.0]]), expected) == 2.0


def test_a_row_that_should_be_zero() -> None:
    assert worst_row(torch.tensor([[0.0, 1e-30]]), torch.zeros(1, 2)) == math.inf


def test_no_rows_or_another_shape_is_no_agreement() -> None:
    with pytest.raises(AssertionError, match="nothing to compare"):
        assert_rows_close(torch.zeros(0, 4), torch.zeros(0, 4), 1.0)
    with pytest.raises(AssertionError, match="shapes differ"):
        worst_row(torch.zeros(1, 4), torch.zeros(4, 4))
