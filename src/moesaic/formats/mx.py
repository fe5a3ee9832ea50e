"""OCP MX: blocks of 32 elements along K that share a power of two, stored as UE8M0 (u stands for 2^(u-127)).

The exponent e of a block is a choice, and libraries differ; with emax = floor(log2(largest element)):

- `ceil` (ours): the smallest e with amax <= largest x 2^e, so that nothing saturates. NVIDIA's rule ("RCEIL").
- `floor`: floor(log2(amax)) - emax, the OCP text's. Magnitudes above the largest element saturate.
- `even`: the same, but rounded up from mantissa 1.75; compressed-tensors' rule, for either element type.

Each is read off the bits of amax in integers: a logarithm in FP32 is wrong one step beside a power of two.
A block that holds Inf or NaN gets u = 255 (NaN), and is NaN as a whole. u = 0 is 2^-127 exactly, an FP32 subnormal.

Legend: B blocks, each of GROUP elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.formats import blocks, e2m1, e4m3
from moesaic.formats.base import Rule

GROUP = 32
NAN = 255
_BIAS, _MANTISSA = 127, 23
_EMAX = {e4m3.MAX: 8, e2m1.MAX: 2}
_CARRY: dict[tuple[Rule, float], int] = {
    ("ceil", e4m3.MAX): 0x1FFFFF,  # carries if the mantissa is above 1.75
    ("ceil", e2m1.MAX): 0x3FFFFF,  # above 1.5
    ("floor", e4m3.MAX): 0,
    ("floor", e2m1.MAX): 0,
    ("even", e4m3.MAX): 0x200000,  # from 1.75 up
    ("even", e2m1.MAX): 0x200000,
}
"""Added to the bits of amax before its exponent is read."""


def quantize_e4m3(x: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """FP32 `[..., K]` -> E4M3 `[..., K]`, UE8M0 `[..., K/32]`."""
    scaled, scale = _scaled(x, e4m3.MAX, rule)
    return e4m3.cast(scaled).flatten(-2), scale


def quantize_e2m1(x: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """FP32 `[..., K]` -> packed E2M1 `[..., K/2]`, UE8M0 `[..., K/32]`."""
    scaled, scale = _scaled(x, e2m1.MAX, rule)
    return e2m1.quantize(scaled.flatten(-2)), scale


def dequantize(values: Tensor, scale: Tensor) -> Tensor:
    """values: FP32 `[..., K]`, overwritten. Exact, unless the product overflows or is below 2^-126."""
    return blocks.split(values, GROUP).mul_(decode_scale(scale)[..., None]).flatten(-2)


def decode_scale(scale: Tensor) -> Tensor:
    """UE8M0 codes (UINT8) -> FP32, from bits; 255 -> NaN, 0 -> 2^-127."""
    bits = scale.int() << _MANTISSA
    return bits.masked_fill_(scale == 0, 1 << 22).masked_fill_(scale == NAN, 0x7FC00000).view(torch.float32)


def exponents(amax: Tensor, largest: float, rule: Rule) -> Tensor:
    """FP32 magnitudes of blocks -> UE8M0 codes (UINT8) by a rule; see the head of this file.

    largest: of the element type, 448 (mantissa 1.75) or 6 (mantissa 1.5).
    """
    bits = amax.view(torch.int32)
    exponent = ((bits + _CARRY[rule, largest]) >> _MANTISSA).sub_(_BIAS + _EMAX[largest])
    codes = exponent.clamp_(-_BIAS, _BIAS).add_(_BIAS)
    return codes.masked_fill_(bits >= 0x7F800000, NAN).to(torch.uint8)


def _scaled(x: Tensor, largest: float, rule: Rule) -> tuple[Tensor, Tensor]:
    """x / 2^e as `[..., B, 32]` in new storage, and the codes of e `[..., B]`."""
    split = blocks.split(x, GROUP)
    scale = exponents(blocks.amax(split), largest, rule)
    # 2^-e has the code 254 - u. No block of finite FP32 numbers has u = 254, so the code stays above 0.
    inverse = ((254 - scale.int()) << _MANTISSA).masked_fill_(scale == NAN, 0x7FC00000).view(torch.float32)
    return split * inverse[..., None], scale
