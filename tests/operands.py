"""Operands of ops, made from plain tensors."""

from __future__ import annotations

from torch import Tensor

from moesaic.contracts.scheme import UNQUANTIZED, Encoding
from moesaic.contracts.spec import SILU, Activation
from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import Rows
from moesaic.kernels.ops import ExpertWeights


def plain_rows(x_TD: Tensor) -> Rows:
    """Rows as they are."""
    return Rows(Encoding("bf16"), {"data": x_TD}, x_TD.dtype)


def expert_weights(w13_EID: Tensor, w2_EDI: Tensor, activation: Activation = SILU,
                   biases: tuple[Tensor, Tensor] | None = None) -> ExpertWeights:  # fmt: skip
    """Unquantised experts: gate rows then up rows, and the way down."""
    width, form = w13_EID.shape[1] // 2, UNQUANTIZED.weight
    w13 = QuantTensor(form, (width, width), w13_EID.shape[2], {"data": w13_EID})
    w2 = QuantTensor(form, (w2_EDI.shape[1],), w2_EDI.shape[2], {"data": w2_EDI})
    return ExpertWeights(w13, w2, activation, UNQUANTIZED.activation, biases=biases)
