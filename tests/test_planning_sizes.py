"""The torch-free sizes that plans are made with are those of the formats themselves."""

from __future__ import annotations

import pytest
import torch

from moesaic.contracts.scheme import SCHEMES, WeightFormat
from moesaic.formats.base import QuantTensor, format_of
from moesaic.formats.sizes import grain, illegal_cut, weight_bytes

FORMS = [*dict.fromkeys(scheme.weight for scheme in SCHEMES.values()), WeightFormat("int4", 128, "float16", True)]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (129, 256), (300, 1024)])
def test_bytes_are_those_of_the_storage(form: WeightFormat, rows: int, columns: int) -> None:
    like = torch.empty(0, dtype=torch.bfloat16)
    assert weight_bytes(form, rows, columns) == QuantTensor.empty(form, (rows,), columns, like).nbytes


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_grain_is_that_of_the_fields(form: WeightFormat) -> None:
    fields = format_of(form).fields(form).values()
    rows, columns = grain(form)
    assert all(rows % field.rows == 0 for field in fields if field.rows)
    assert all(columns % field.columns == 0 for field in fields if field.columns)
    assert rows == max(max(field.rows, 1) for field in fields)
    assert columns == max(max(field.columns, 1) for field in fields)


def test_a_cut_inside_a_block_names_the_legal_ones() -> None:
    """768 / 8 = 96 under blocks of 128: legal are 1, 2, 3 and 6 ways."""
    assert illegal_cut(WeightFormat("fp8_block"), 768, 8, 0) == (
        "768 / 8 = 96 cuts a block of 128 of fp8_block; legal: 1, 2, 3, 6 ways"
    )
    assert illegal_cut(WeightFormat("fp8_block"), 768, 6, 0) is None
    assert illegal_cut(WeightFormat("mxfp8"), 768, 8, 1) is None
    assert illegal_cut(WeightFormat("bf16"), 768, 7, 0) is not None
