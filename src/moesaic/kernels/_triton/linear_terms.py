"""Products with quantised weights whose parts of K are left for the reader to add up; see linear_quant.py."""

from __future__ import annotations

from torch import Tensor

from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import Rows
from moesaic.kernels._triton.linear_quant import terms_of

WAVES = 4
"""Programs per multiprocessor: parts cost no kernel here."""


def linear_terms(x: Rows, w: QuantTensor, bias_N: Tensor | None = None) -> Tensor:
    return terms_of(x, w, bias_N, WAVES)
