"""Encoded rows of a kernel that activates and encodes at once, held against what it encoded: to the last bit.

Two kernels that compute in FP32 differ in the last bits of a value, and an encoder turns that into a whole step where
the value lies at the edge between two codes. A step of E4M3 is up to an eighth of its value, so one such code of one
large element takes a row past any limit on its error; and the mean over a row says nothing of a code that is wrong
where there is no edge. So each value is given an interval that FP32 cannot leave, and each code and each scale must be
one of that interval. Everything here is computed in FP64; rows [R, K] or [R, 2K], groups [R, G, S].
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.contracts.scheme import Encoding
from moesaic.contracts.spec import Activation
from moesaic.formats import blocks, e4m3, mx
from moesaic.kernels import reference
from tests.compare import assert_rows_close

LIMIT = 2**-7
FLIPPED = 1e-3
"""Of codes, how many may be a step away where the value before differs in its last bits."""
HALF = 2.0**-24
"""The relative error of one rounding to FP32."""
LEAST = 2.0**-120
"""Below it FP32's exponential, its quotient and its product with a scale run out of exponents."""
SIZES = {"fp8_group128": 128, "mxfp8": 32}


def activated(both: Tensor, off: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """[gate, up] rows -> what they become, and how far FP32 may be from it. off: how far it may be from `both`.

    The activation itself: of exp, the roundings of its argument z (at most 4: alpha, alpha gate, log2 e, their product)
    cost |z| times each, and ex2.approx two units in the last place; as many the quotient; then five roundings.
    """
    (gate, up), (gate_off, up_off) = both.chunk(2, -1), off.chunk(2, -1)
    wide, alpha = reference.activate(both, activation), 1.0
    if activation.kind == "swiglu_oai":
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit) + 1
        alpha = activation.alpha
    half = (gate * torch.sigmoid(alpha * gate)).abs()
    own = wide.abs() * HALF * (4 * (alpha * gate).abs() + 13)
    return wide, own + 1.1 * gate_off * up.abs() + half * up_off + LEAST  # no slope of x sigmoid(alpha x) is above 1.1


def check_codes(rows: Tensor, scale: Tensor | None, wide: Tensor, off: Tensor, how: Encoding, what: str) -> None:
    """rows, scale: a kernel's, as join_rows.py describes them. wide, off: of `activated`."""
    if how.name == "bf16":
        assert_rows_close(rows, wide, LIMIT, what)
        return
    mine, wide, off = (blocks.split(each.cpu().double(), SIZES[how.name]) for each in (rows, wide, off))
    low, high = (wide.abs() - off).clamp(min=0).amax(-1), (wide.abs() + off).amax(-1)
    if how.name == "fp8_group128":
        assert scale is not None
        found = scale.cpu().double()
        at_least, at_most = (each / e4m3.MAX for each in (low * (1 - 2 * HALF), high * (1 + 2 * HALF)))
        wrong = int((~((at_least <= found) & (found <= at_most))).sum())
        assert not wrong, f"{what}: {wrong} of {found.numel()} scales are of no amax within FP32's reach"
        good, flipped = within(mine, wide, off, found)
    else:
        tried = [within(mine / power[..., None], wide, off, power) for power in powers(low, high)]
        good = tried[0][0] | tried[1][0]
        flipped = torch.where(tried[0][0][..., None], tried[0][1], tried[1][1])
    wrong = int((~good).sum())
    assert not wrong, f"{what}: {wrong} of {good.numel()} groups have codes of no value within FP32's reach"
    share = flipped.double().mean().item()
    assert share <= FLIPPED, f"{what}: {share:.2%} of codes differ"


def within(codes: Tensor, wide: Tensor, off: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Whether all codes of a group are of values as near as `off`, and none two steps away; which differ at all.

    codes: their values.  scale: of each group, as the kernel has it. Its division rounds once more.
    """
    zero, scale = (scale == 0)[..., None], scale.masked_fill(scale == 0, 1.0)[..., None]
    at = (wide / scale).masked_fill(zero, 0.0)
    reach = (off / scale + 2 * HALF * at.abs()).masked_fill(zero, 0.0)
    low, mid, high, same = (e4m3.cast(each.float()) for each in (at - reach, at, at + reach, codes))
    steps = (rank(same) - rank(mid)).abs()
    good = (low.double() <= codes) & (codes <= high.double()) & (same.double() == codes) & (steps <= 1)
    return good.all(-1), codes != mid.double()


def rank(codes: Tensor) -> Tensor:
    """The place of each E4M3 code in their order."""
    bits = codes.view(torch.uint8).int()
    return torch.where(bits >= 128, 128 - bits, bits)


def powers(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """MXFP8's scales of amax at either end: they differ only where the edge between two powers of two lies between."""
    first, second = (mx.decode_scale(mx.exponents(each.float(), e4m3.MAX, "ceil")).double() for each in (low, high))
    return first, second
