"""The check of encoded rows that the GPU tests of other packages' kernels rest on: what it passes and what it stops.

The rows are the kernel's own, in Triton's interpreter, and another computation of the same in FP32, which differs from
it in last bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from moesaic.contracts.scheme import Encoding
from moesaic.contracts.spec import SILU, Activation
from moesaic.formats import encodings
from moesaic.kernels import reference
from moesaic.kernels._triton.join_rows import join_rows
from tests.code_checks import LIMIT, activated, check_codes, rank
from tests.compare import row_errors
from tests.triton_support import device, randn

OAI, FP8, MX = Activation("swiglu_oai"), Encoding("fp8_group128"), Encoding("mxfp8")
ROWS, WIDTH = 96, 768


def both_of(rows: int = ROWS) -> Tensor:
    return randn(rows, 2 * WIDTH) * 1.5


def other(both: Tensor, how: Encoding, noise: float) -> tuple[Tensor, Tensor | None]:
    """As join_rows gives them, of values that are off by up to `noise`, relatively."""
    wide = reference.activate(both.double(), SILU)
    found = encodings.encode((wide * (1 + noise * (2 * torch.rand(wide.shape) - 1))).float(), how)
    return (found.data, found.parts["scale"]) if how is FP8 else (found.decode(), None)


def check(both: Tensor, rows: Tensor, scale: Tensor | None, how: Encoding, activation: Activation = SILU) -> None:
    wide, off = activated(both.double(), torch.zeros(both.shape, dtype=torch.float64), activation)
    check_codes(rows, scale, wide, off, how, "rows")


@pytest.mark.parametrize("activation", [SILU, OAI], ids=str)
@pytest.mark.parametrize("how", [FP8, MX], ids=str)
def test_the_kernels_rows_pass(how: Encoding, activation: Activation) -> None:
    both, ids = both_of(16).to(device()), torch.zeros(16, dtype=torch.int32, device=device())
    rows, scale = join_rows(both, ids, None, activation, how.name, transposed=False)
    check(both, rows, scale, how, activation)


@pytest.mark.parametrize("how", [FP8, MX], ids=str)
def test_another_computation_in_fp32_passes(how: Encoding) -> None:
    """Its codes differ at edges only; a single one of them may take its row past the limit on a row's error."""
    both = both_of(4096)
    rows, scale = other(both, how, 8 * 2.0**-24)
    check(both, rows, scale, how)
    if how is FP8:
        theirs = encodings.encode(reference.activate(both.double(), SILU).float(), how)
        same = theirs.data.view(torch.uint8) == rows.view(torch.uint8)
        assert scale is not None
        mine = encodings.Rows(how, {"data": rows, "scale": scale}, torch.float32).decode()
        errors = row_errors(mine, theirs.decode())
        single = (~same).sum(-1) == 1
        assert (errors[single] > LIMIT).any()
        assert errors.max() < 2**-5
    with pytest.raises(AssertionError, match="within FP32's reach"):
        check(both, *other(both, how, 2.0**-14), how)


def step(rows: Tensor, r: int, i: int) -> None:
    rows.view(torch.uint8)[r, i] += 1


def scale_bits(scale: Tensor, r: int, g: int, bits: int) -> None:
    scale.view(torch.int32)[r, g] += bits


FAULTS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "a code a step up": lambda rows, scale: step(rows, 3, 100),
    "the sign of a code": lambda rows, scale: rows.view(torch.uint8)[5, 700].bitwise_xor_(128),
    "NaN": lambda rows, scale: rows.view(torch.uint8)[5, 700].fill_(127),
    "the rows of another token": lambda rows, scale: rows.copy_(rows.roll(1, 0)),
    "two columns changed places": lambda rows, scale: rows.copy_(rows[:, [1, 0, *range(2, WIDTH)]]),
    "the scale of a neighbour": lambda rows, scale: scale[7, :2].copy_(scale[7, :2].flip(0)),
    "64 last bits of a scale": lambda rows, scale: scale_bits(scale, 7, 2, 64),
    "a scale of zero": lambda rows, scale: scale[7, 2].zero_(),
    "a scale of NaN": lambda rows, scale: scale[7, 2].fill_(float("nan")),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails(fault: str) -> None:
    both = both_of()
    rows, scale = other(both, FP8, 0.0)
    assert scale is not None
    check(both, rows, scale, FP8)
    FAULTS[fault](rows, scale)
    with pytest.raises(AssertionError, match=re.escape("within FP32's reach")):
        check(both, rows, scale, FP8)


def test_codes_of_a_wrong_scale_fail() -> None:
    """All of a group follow its scale: a scale of amax / 447 stored as amax / 448, and codes rounded twice, by BF16."""
    both = both_of()
    wide = reference.activate(both.double(), SILU).float()
    _, scale = other(both, FP8, 0.0)
    assert scale is not None
    at = wide / scale.repeat_interleave(128, -1)
    for faulty in (at * (447 / 448), at.bfloat16().float()):
        with pytest.raises(AssertionError, match="within FP32's reach"):
            check(both, faulty.to(torch.float8_e4m3fn), scale, FP8)


def test_an_exponent_too_high_fails() -> None:
    """MXFP8: a block with twice its scale has codes of half the size, of which some have lost a bit."""
    both = both_of()
    rows, _ = other(both, MX, 0.0)
    wide = reference.activate(both.double(), SILU).float().unflatten(-1, (-1, 32))
    power = torch.exp2(torch.floor(torch.log2(wide.abs().amax(-1, keepdim=True))) - 7)
    coarse = ((wide / power).to(torch.float8_e4m3fn).float() * power).flatten(-2)
    check(both, rows, None, MX)
    with pytest.raises(AssertionError, match="within FP32's reach"):
        check(both, coarse, None, MX)


def test_codes_are_ordered() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    real = ~values.float().isnan()
    found, at = values.float()[real].sort(stable=True)
    ranks = rank(values)[real][at]
    assert ((ranks.diff() == 1) | (found.diff() == 0)).all()
