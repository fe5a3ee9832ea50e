"""Is a quantised product right? Each stage of `cpu_quant` against the reference in FP64 on the stage's own operands.

Letters as in kernels/ops.py; R routed rows, sorted by expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor

from moesaic.contracts.scheme import Encoding
from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import Rows
from moesaic.kernels import cpu_quant, reference
from moesaic.kernels.ops import ExpertWeights
from tests.compare import assert_rows_close

LIMIT = {torch.float32: 2e-5, torch.bfloat16: 2**-7}
encode, linear_quant, experts = cpu_quant.encode, cpu_quant.linear_quant, cpu_quant.experts


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    if actual.numel():
        assert_rows_close(actual, expected, LIMIT[dtype], what)


def in_fp64(x: Rows) -> Rows:
    """The same codes; products of them come out in FP64."""
    return replace(x, dtype=torch.float64)


def checked_linear(x: Rows, w: QuantTensor, bias_N: Tensor | None = None) -> Tensor:
    y_TN = linear_quant(x, w, bias_N)
    wanted = reference.linear_quant(in_fp64(x), w, None if bias_N is None else bias_N.double())
    close(y_TN, wanted, x.dtype, "linear")
    return y_TN


def checked_encode(x_TD: Tensor, encoding: Encoding, scale: Tensor | None = None) -> Rows:
    """The very codes of the reference."""
    rows = encode(x_TD, encoding, scale)
    wanted = reference.encode(x_TD, encoding, scale)
    assert rows.dtype == wanted.dtype
    assert rows.parts.keys() == wanted.parts.keys()
    assert all(same_bits(rows.parts[name], part) for name, part in wanted.parts.items())
    return rows


def checked_experts(x: Rows, w: ExpertWeights, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
    """The first product and the activation; the codes between; the second product on the kernel's own codes."""
    with watched_encoder() as seen:
        y_TD = experts(x, w, ids_TA, weights_TA)
    ((hidden_RI, between),) = seen
    tokens_R, places_R, ids_R = by_expert(ids_TA)
    bias13, bias2 = w.biases or (None, None)
    gate_up = reference.expert_products(reference.row_values(in_fp64(x))[tokens_R], w.w13, ids_R, bias13)
    wanted = reference.activate(gate_up, w.activation)
    close(hidden_RI, wanted, torch.float32, "the first product")
    check_codes(between, reference.encode(wanted, w.between, w.between_scale))
    y_RD = reference.expert_products(reference.row_values(in_fp64(between)), w.w2, ids_R, bias2)
    weighted_RD = y_RD * weights_TA[tokens_R, places_R, None].double()
    wanted = torch.zeros(y_TD.shape, dtype=torch.float64).index_add_(0, tokens_R, weighted_RD)
    close(y_TD, wanted, x.dtype, "the second product")
    return y_TD


def by_expert(ids_TA: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(token, place among its choices, expert) of each routed row, sorted by expert."""
    tokens_R, places_R = torch.where(ids_TA >= 0)
    order_R = ids_TA[tokens_R, places_R].argsort(stable=True)
    tokens_R, places_R = tokens_R[order_R], places_R[order_R]
    return tokens_R, places_R, ids_TA[tokens_R, places_R]


def check_codes(mine: Rows, theirs: Rows) -> None:
    """At most one step apart, in at most 0.1% of places; FP32 scales to FP32's accuracy."""
    assert mine.parts.keys() == theirs.parts.keys()
    for name, part in theirs.parts.items():
        if is_code(part):
            apart = steps_apart(mine.parts[name], part, packed=(mine.encoding.name, name) == ("nvfp4", "data"))
            assert apart.numel() == 0 or apart.max() <= 1, name
            assert apart.count_nonzero() <= 1e-3 * apart.numel(), name
        elif mine.encoding.name != "bf16":
            assert torch.allclose(mine.parts[name].double(), part.double(), rtol=1e-5, atol=0), name


def is_code(part: Tensor) -> bool:
    """Of a field: whether it holds codes, and not numbers."""
    return part.dtype in (torch.uint8, torch.float8_e4m3fn)


def steps_apart(a: Tensor, b: Tensor, packed: bool = False) -> Tensor:
    """How many steps of the number line lie between codes: E4M3, UE8M0 (UINT8), or two E2M1 per byte where packed."""
    return (ranks(a, packed) - ranks(b, packed)).abs()


def ranks(codes: Tensor, packed: bool) -> Tensor:
    """Position on the number line; +0 and -0 are the same number."""
    wide = codes.view(torch.uint8).to(torch.int64)
    if packed:
        wide = torch.stack([wide & 15, wide >> 4], -1)
    elif codes.dtype == torch.uint8:
        return wide
    sign = 8 if packed else 128
    return torch.where(wide >= sign, sign - wide, wide)


def bits(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


@contextmanager
def watched_encoder() -> Iterator[list[tuple[Tensor, Rows]]]:
    """What `cpu_quant` encodes, and into what, while the block runs."""
    seen: list[tuple[Tensor, Rows]] = []

    def watch(x: Tensor, encoding: Encoding, scale: Tensor | None = None) -> Rows:
        seen.append((x.clone(), encode(x, encoding, scale)))
        return seen[-1][1]

    with patch.object(cpu_quant, "encode", watch):
        yield seen
