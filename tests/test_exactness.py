"""What may be multiplied in BF16 without loss: the claims on which exact emulation stands, by enumeration.

DESIGN: MX and NVFP4 operands are exactly representable in BF16, so that a GPU without block-scaled tensor cores gets
the products of a native one. INT4 times its scale is not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.number_grids import E2M1, E4M3, every_bf16

CODES = torch.tensor([value for value in E4M3 if value == value], dtype=torch.float64)
FP4 = torch.tensor(E2M1, dtype=torch.float64)


def exact_in(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Where FP64 values survive a round trip. Both casts are of torch; BF16's is checked against bits below."""
    return values.to(dtype).double() == values


def test_bf16_holds_what_its_bits_say() -> None:
    """The oracle of this file, against a definition: BF16 is FP32 whose low 16 bits are zero."""
    x = torch.cat((every_bf16(), torch.randn(4096), torch.tensor([2.0**-133, 2.0**-134, 2.0**127 * 1.9999999])))
    by_bits = (x.view(torch.int32) & 0xFFFF) == 0
    assert torch.equal(exact_in(x.double(), torch.bfloat16), by_bits)


def test_e4m3_times_a_power_of_two_is_exact_in_bf16_from_minus_124_to_119_and_no_further() -> None:
    exact = {k for k in range(-160, 140) if exact_in(CODES * 2.0**k, torch.bfloat16).all()}
    assert exact == set(range(-124, 120))


def test_e4m3_times_a_power_of_two_stays_a_normal_bf16_from_minus_117() -> None:
    """Below, hardware that flushes subnormals would lose it: the smallest code is 2^-9, the smallest normal 2^-126."""
    normal = {k for k in range(-130, 120) if (CODES[CODES != 0] * 2.0**k).abs().min() >= 2.0**-126}
    assert min(normal) == -117


def test_e2m1_times_a_power_of_two_is_exact_in_bf16_from_minus_132_to_125() -> None:
    """MXFP4: every scale that UE8M0 can store, but for the largest."""
    exact = {k for k in range(-160, 140) if exact_in(FP4 * 2.0**k, torch.bfloat16).all()}
    assert exact == set(range(-132, 126))


def test_every_e2m1_times_every_e4m3_is_exact_in_bf16() -> None:
    """NVFP4 without its global scale: 16 x 254 products, of at most 2 x 4 bits of significand."""
    products = FP4[:, None] * CODES
    assert products.numel() == 16 * 254
    assert exact_in(products, torch.bfloat16).all()


def test_nvfp4_with_its_global_scale_is_not() -> None:
    """So the FP32 global scale belongs in the epilogue."""
    products = FP4[:, None] * CODES * torch.tensor(0.3 / 2688).double()
    assert not exact_in(products[products != 0], torch.bfloat16).any()


def test_products_of_two_decoded_operands_are_exact_in_fp32() -> None:
    """A BF16 tensor core forms exact products; those of block-scaled operands have the same value."""
    for values in (CODES, FP4, (FP4[:, None] * CODES).flatten().unique()):
        assert exact_in(values[:, None] * values, torch.float32).all()


def test_int4_is_exact_in_e4m3_and_its_scaled_value_is_not_exact_in_bf16() -> None:
    codes = torch.arange(-8, 8, dtype=torch.float64)
    assert exact_in(codes, torch.float8_e4m3fn).all()
    scale = torch.tensor(1.9921875, dtype=torch.float64)  # 255 / 128: all 8 bits of a BF16 significand
    assert exact_in(scale, torch.bfloat16)
    assert (7 * scale).item() == 13.9453125  # 1785 / 128 needs 11 bits
    assert (7 * scale).bfloat16().item() == 13.9375
    assert not exact_in(7 * scale, torch.bfloat16)
    scales = every_bf16().double()
    scales = scales[(scales.abs() > 2.0**-120) & (scales.abs() < 2.0**124)]
    assert exact_in(codes[:, None] * scales, torch.float32).all()  # so the accumulator may take it
