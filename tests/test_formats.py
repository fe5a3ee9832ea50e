"""The formats against their standards: every code, every edge, worked by hand or by enumeration. Other people's
libraries are asked in `test_formats_oracles.py`."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from moesaic.contracts.scheme import FORMATS, SCHEMES, WeightFormat
from moesaic.errors import CheckpointError, UnsupportedError
from moesaic.formats import e2m1, e4m3, mx, nibbles
from moesaic.formats.base import QuantTensor, format_of, nbytes_of
from tests.number_grids import E2M1, E4M3, beside, every_bf16, nearest_code

INT4 = WeightFormat("int4", 32, "bfloat16")
INT4_ZEROS = WeightFormat("int4", 128, "float16", zero_points=True)
FORMS = [*(WeightFormat(name) for name in FORMATS if name != "int4"), INT4, INT4_ZEROS]
QUANTIZED = [form for form in FORMS if form.name != "bf16"]
BLOCK_MAX = {"mxfp8": 448.0, "mxfp4": 6.0}


def one_by_one(data: Tensor, scale: Tensor, form: str) -> QuantTensor:
    return QuantTensor(WeightFormat(form), (data.shape[0],), scale.shape[1] * 32, {"data": data, "scale": scale})


# --- elements


def test_every_e4m3_code_decodes_to_its_value() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(8, 32)
    weight = one_by_one(codes.view(torch.float8_e4m3fn), torch.full((8, 1), 127, dtype=torch.uint8), "mxfp8")
    torch.testing.assert_close(weight.dequantize().flatten(), torch.tensor(E4M3), rtol=0, atol=0, equal_nan=True)


def test_every_e2m1_code_decodes_to_its_value_and_sign() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)  # every pair of codes: low nibble first
    values = one_by_one(codes, torch.full((16, 1), 127, dtype=torch.uint8), "mxfp4").dequantize().flatten()
    expected = torch.tensor([E2M1[code] for byte in range(256) for code in (byte & 15, byte >> 4)])
    assert torch.equal(values, expected)
    assert torch.equal(values.signbit(), expected.signbit())  # equal() does not tell -0 from 0


@pytest.mark.parametrize("cast", ["e4m3", "e2m1"])
def test_casts_round_every_bf16_number_and_its_fp32_neighbours_to_nearest_even(cast: str) -> None:
    magnitudes = E4M3[:127] if cast == "e4m3" else E2M1[:8]
    halfway = torch.tensor([(a + b) / 2 for a, b in pairwise(magnitudes)])
    x = torch.cat((beside(every_bf16()), beside(halfway), -beside(halfway)))
    expected = nearest_code(x, magnitudes) | (x.signbit().long() << (7 if cast == "e4m3" else 3))
    codes = e4m3.cast(x.clone()).view(torch.uint8) if cast == "e4m3" else e2m1.codes(x)
    assert torch.equal(codes.long(), expected)


def test_e2m1_by_hand() -> None:
    """Ties go to the even code; beyond 5 everything is 6; -0 keeps its sign."""
    x = torch.tensor([0.25, 0.2500001, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.0000005, 6.0, 1e30, -0.0, -0.25, -0.75, -7.0])
    codes = [0, 1, 2, 2, 4, 4, 6, 6, 7, 7, 7, 8, 8, 10, 15]
    assert e2m1.codes(x).tolist() == codes
    assert e2m1.quantize(torch.tensor([1.0, -6.0, 0.5, 3.0])).tolist() == [0xF2, 0x51]


def test_nibbles_unpack_what_they_pack() -> None:
    codes = torch.arange(256).add(torch.arange(3)[:, None]).remainder(16).to(torch.uint8).view(3, 2, 128)
    packed = nibbles.pack(codes)
    assert packed.shape == (3, 2, 64)
    assert torch.equal(packed & 15, codes[..., 0::2])
    assert torch.equal(packed >> 4, codes[..., 1::2])
    assert torch.equal(nibbles.unpack(packed), codes)


# --- the shared exponent


def test_ue8m0_decodes_exactly_at_both_ends() -> None:
    values = mx.decode_scale(torch.arange(256, dtype=torch.uint8))
    assert [values[u].item() for u in range(255)] == [2.0 ** (u - 127) for u in range(255)]
    assert values[255].isnan()


def exact_exponent(amax: float, largest: int, rule: str) -> int:
    """The rules in exact arithmetic, without logarithms."""
    value, emax = Fraction(amax), 8 if largest == 448 else 2
    if value == 0:
        return -127
    floor = math.frexp(amax)[1] - 1  # floor(log2(amax)), exactly
    if rule == "ceil":
        found = next(e for e in range(floor - 10, floor + 1) if value <= largest * Fraction(2) ** e)
    else:
        found = floor - emax + (rule == "even" and value >= Fraction(7, 4) * Fraction(2) ** floor)
    return max(-127, min(127, found))


@pytest.mark.parametrize("rule", ["ceil", "floor", "even"])
@pytest.mark.parametrize("largest", [448, 6])
def test_exponents_are_exact_at_powers_of_two_and_one_step_beside(rule: mx.Rule, largest: int) -> None:
    """A logarithm in FP32 fails this: log2(32 + 1 ulp) is 5."""
    powers = torch.tensor([2.0**k for k in range(-149, 128)])
    amax = torch.cat([beside(m * powers) for m in (1.0, 1.25, 1.5, 1.75)])
    amax = torch.cat((amax, torch.tensor([0.0, 1e-45, torch.finfo(torch.float32).max]))).abs()
    amax = amax[amax.isfinite()]
    expected = [exact_exponent(value, largest, rule) + 127 for value in amax.tolist()]
    assert mx.exponents(amax, float(largest), rule).tolist() == expected


def test_exponents_of_what_is_not_finite_are_nan() -> None:
    for rule in ("ceil", "floor", "even"):
        assert mx.exponents(torch.tensor([math.inf, math.nan]), 448.0, rule).tolist() == [255, 255]


@pytest.mark.parametrize("form", ["mxfp8", "mxfp4"])
def test_the_ceil_rule_never_saturates_and_floor_does(form: str) -> None:
    """The largest element of a block: 1.9 x 2^k is above the largest element's mantissa, so `floor` cuts it off."""
    w = torch.zeros(40, 32)
    w[:, 7] = 1.9 * torch.tensor([2.0**k for k in range(-20, 20)])
    ceil, floor = (QuantTensor.of(w, WeightFormat(form), rule=rule).dequantize() for rule in ("ceil", "floor"))
    step = 2**-4 if form == "mxfp8" else 2**-2  # half a step of the mantissa
    assert ((ceil[:, 7] - w[:, 7]).abs() <= step * w[:, 7]).all()
    assert torch.equal(floor[:, 7], (1.75 if form == "mxfp8" else 1.5) / 1.9 * w[:, 7])


def test_mx_blocks_by_hand() -> None:
    """amax 6 x 2^3 fits with exponent 3 (130); one step more needs 4 (131), and then 48 is 3 x 2^4 exactly."""
    w = torch.zeros(2, 32)
    w[0, :4] = torch.tensor([48.0, -24.0, 4.0, 0.0])
    w[1, :4] = torch.tensor([math.nextafter(48.0, 49.0) + 2**-18, -24.0, 4.0, 0.0])
    weight = QuantTensor.of(w, WeightFormat("mxfp4"))
    assert weight.parts["scale"].tolist() == [[130], [131]]
    assert weight.parts["data"][:, :2].tolist() == [[0xD7, 0x01], [0xB5, 0x00]]  # 6 -3 .5 0 | 3 -1.5 .25->0 0
    w8 = QuantTensor.of(w[:1], WeightFormat("mxfp8"))
    assert w8.parts["scale"].tolist() == [[124]]  # 48 = 384 x 2^-3; 448 x 2^-4 would be too small
    assert w8.parts["data"].float()[0, :3].tolist() == [384.0, -192.0, 32.0]


# --- what every format must hold to


@pytest.mark.parametrize("form", QUANTIZED, ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40, 1e-38, 1e-30, 1.0, 1e30, 1.6e38])
def test_finite_weights_of_any_size_stay_finite_and_zeros_stay_zero(form: WeightFormat, size: float) -> None:
    w = torch.randn(3, 256).clamp_(-1, 1) * size
    w[1] = 0
    w[2, 1:] = -0.0
    weight = QuantTensor.of(w, form)
    weight.check()
    values = weight.dequantize()
    assert values.isfinite().all()
    assert (values[w == 0] == 0).all()
    assert (values.abs() <= w.abs().max() * 1.25).all()  # a 4-bit scale may be rounded up


STEP = {"fp8_tensor": 2**-4, "fp8_channel": 2**-4, "fp8_block": 2**-4, "mxfp8": 2**-4, "mxfp4": 2**-2}
"""Half a step of the mantissa relative to an element: E4M3 2^-4, E2M1 2^-2."""


@pytest.mark.parametrize("form", [form for form in QUANTIZED if form.name in STEP], ids=str)
def test_each_element_is_within_half_a_step(form: WeightFormat) -> None:
    """|error| <= half a step of the element, or half the smallest step of its block."""
    w = torch.randn(130, 288) * torch.logspace(-3, 3, 288)
    values = QuantTensor.of(w, form).dequantize()
    amax = {"fp8_channel": w.abs().amax(1, keepdim=True), "fp8_tensor": w.abs().max()}.get(form.name)
    if amax is None:
        rows, columns = (128, 128) if form.name == "fp8_block" else (1, 32)
        amax = blockwise_amax(w, rows, columns)
    smallest = amax * (2**-10 / 448 * 2 if form.name != "mxfp4" else 0.25 / 6 * 2)  # a ceil exponent may double it
    assert ((values - w).abs() <= torch.maximum(w.abs() * STEP[form.name], smallest) * (1 + 1e-6)).all()


def blockwise_amax(w: Tensor, rows: int, columns: int) -> Tensor:
    """The amax of each element's block, the slow and plain way."""
    found = torch.empty_like(w)
    for top in range(0, w.shape[0], rows):
        for left in range(0, w.shape[1], columns):
            block = w[top : top + rows, left : left + columns]
            found[top : top + rows, left : left + columns] = block.abs().max()
    return found


def test_nvfp4_and_int4_are_within_half_a_step_of_their_own_scales() -> None:
    w = torch.randn(5, 256)
    nvfp4 = QuantTensor.of(w, WeightFormat("nvfp4"))
    scale = (nvfp4.parts["scale"].double() * nvfp4.parts["global_scale"].double()).repeat_interleave(16, 1)
    saturated = w.abs() > 6 * scale
    bound = torch.maximum(w.abs() * 0.25, 0.25 * scale)
    assert ((nvfp4.dequantize() - w).abs() <= bound * (1 + 1e-6))[~saturated].all()
    assert (w.abs() <= 6 * scale * (1 + 2**-4))[saturated].all()  # the block's scale was rounded down, by half a step
    for form in (INT4, INT4_ZEROS, WeightFormat("int4", 32, "float32")):
        int4 = QuantTensor.of(w, form)
        steps = int4.parts["scale"].float().repeat_interleave(form.group, 1)
        slack = 2**-8 * w.abs() + 0.5 * steps * form.zero_points  # of the rounded scale; of the rounded zero point
        assert ((int4.dequantize() - w).abs() <= 0.5 * steps * (1 + 1e-6) + slack).all()


def test_int4_by_hand() -> None:
    """Codes reach from -8 to 7: 8.5 steps below zero, 7.5 above."""
    w = torch.zeros(2, 32)
    w[0, :5] = torch.tensor([-17.0, 15.0, 3.0, 1.0, 2.0])  # scale max(17 / 8.5, 15 / 7.5) = 2; 3/2 and 1/2 are ties
    weight = QuantTensor.of(w, INT4)
    assert weight.parts["scale"].tolist() == [[2.0], [0.0]]
    # -8.5 -> -8, 7.5 -> 8 -> 7, 1.5 -> 2, .5 -> 0, 1: codes 0, 15, 10, 8, 9
    assert weight.parts["data"][0, :3].tolist() == [0xF0, 0x8A, 0x89]
    assert weight.parts["data"][1].tolist() == [0x88] * 16
    assert weight.dequantize()[0, :5].tolist() == [-16.0, 14.0, 4.0, 0.0, 2.0]


def test_int4_with_zero_points_by_hand() -> None:
    w = torch.zeros(1, 128)
    w[0, :3] = torch.tensor([-1.0, 6.5, 0.7])  # scale 7.5 / 15 = 0.5, zero = 2
    weight = QuantTensor.of(w, INT4_ZEROS)
    assert (weight.parts["scale"].item(), weight.parts["zero"].item()) == (0.5, 2)
    assert weight.parts["data"][0, :2].tolist() == [0xF0, 0x23]
    assert weight.dequantize()[0, :4].tolist() == [-1.0, 6.5, 0.5, 0.0]


def test_zero_is_a_code_of_groups_on_one_side_of_it() -> None:
    """Groups from 10 to 11 and from -11 to -10 reach to 0: scale 11 / 15, zero points 0 and 15."""
    w = torch.cat((torch.linspace(10, 11, 128), -torch.linspace(10, 11, 128))).view(1, 256)
    weight = QuantTensor.of(w, WeightFormat("int4", 128, "float32", zero_points=True))
    assert weight.parts["zero"].tolist() == [[0, 15]]
    assert weight.parts["scale"].tolist() == [[torch.tensor(11 / 15).item()] * 2]
    assert ((weight.dequantize() - w).abs() <= 11 / 30 * (1 + 1e-6)).all()


def test_int4_scales_are_rounded_before_the_codes() -> None:
    """Codes are the nearest to w / (the scale as stored): 1.01 rounds to 1.0078125 in BF16."""
    w = torch.linspace(-8.585, 7.575, 32)[None]  # 1.01 x (-8.5 .. 7.5)
    weight = QuantTensor.of(w, INT4)
    assert weight.parts["scale"].item() == 1.0078125
    codes = nibbles.unpack(weight.parts["data"])[0].double()
    assert torch.equal(codes, (w[0].double() / 1.0078125).round().clamp(-8, 7) + 8)


def test_nvfp4_by_hand() -> None:
    """amax 2688 makes the global scale 1: block scales 448 and 1, and every code as in the block's own units."""
    w = torch.zeros(1, 48)
    w[0, :2] = torch.tensor([2688.0, -448.0])
    w[0, 16:19] = torch.tensor([6.0, -0.5, 2.5])
    weight = QuantTensor.of(w, WeightFormat("nvfp4"))
    assert weight.parts["global_scale"].tolist() == [1.0]
    assert weight.parts["scale"].float().tolist() == [[448.0, 1.0, 0.0]]
    assert weight.parts["data"][0, [0, 8, 9]].tolist() == [0xA7, 0x97, 0x04]
    assert weight.dequantize()[0, [0, 1, 16, 17, 18]].tolist() == [2688.0, -448.0, 6.0, -0.5, 2.0]


@pytest.mark.parametrize("form", QUANTIZED, ids=str)
def test_values_are_the_exact_product_rounded_once(form: WeightFormat) -> None:
    w = torch.randn(2, 256) * torch.rand(2, 1)
    weight = QuantTensor.of(w, form)
    parts = {name: part.double() for name, part in weight.parts.items() if part.dtype != torch.uint8}
    codes = nibbles.unpack(weight.parts["data"]) if weight.parts["data"].dtype == torch.uint8 else None
    if form.name == "int4":
        zero = weight.parts["zero"].double().repeat_interleave(form.group, 1) if form.zero_points else 8
        exact = (codes.double() - zero) * parts["scale"].repeat_interleave(form.group, 1)
    elif form.name in ("mxfp4", "nvfp4"):
        scale = 2.0 ** (weight.parts["scale"].double() - 127) if form.name == "mxfp4" else parts["scale"]
        exact = torch.tensor(E2M1, dtype=torch.float64)[codes.long()]
        exact *= scale.repeat_interleave(256 // scale.shape[1], 1)
        exact *= parts.get("global_scale", torch.ones(1, dtype=torch.float64))
    else:
        scale = 2.0 ** (weight.parts["scale"].double() - 127) if form.name == "mxfp8" else parts["scale"]
        spread = {"fp8_block": 128, "mxfp8": 32}.get(form.name)
        scale = scale.repeat_interleave(spread, 1) if spread else scale.view(-1, 1)
        exact = torch.tensor(E4M3, dtype=torch.float64)[weight.parts["data"].view(torch.uint8).long()] * scale
    assert torch.equal(weight.dequantize(), exact.float())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_experts_and_segments_are_quantised_each_by_itself(form: WeightFormat) -> None:
    w = torch.randn(3, 200, 256) * torch.tensor([1e-3, 1.0, 50.0])[:, None, None]
    whole = QuantTensor.of(w, form, (72, 128))
    values = whole.dequantize()
    assert whole.shape == tuple(w.shape) == tuple(values.shape)
    for expert in range(3):
        assert torch.equal(whole[expert].dequantize(), values[expert])
        for index, rows in enumerate((slice(0, 72), slice(72, 200))):
            alone = QuantTensor.of(w[expert, rows], form)
            assert torch.equal(alone.dequantize(), values[expert, rows])
            assert torch.equal(whole.segment(index)[expert].dequantize(), values[expert, rows])
            for name, part in whole.segment(index)[expert].parts.items():
                assert torch.equal(raw(part), raw(alone.parts[name]))


def raw(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("lead", [(), (4,), (2, 3)])
@pytest.mark.parametrize("segments", [(131,), (5, 300, 7)])
def test_storage_has_the_shapes_of_the_quantiser_and_the_counted_bytes(
    form: WeightFormat, lead: tuple[int, ...], segments: tuple[int, ...]
) -> None:
    w = torch.randn(*lead, sum(segments), 384).bfloat16()
    made, empty = QuantTensor.of(w, form, segments), QuantTensor.empty(form, segments, 384, w, lead)
    shapes = [{name: (part.shape, part.dtype) for name, part in each.parts.items()} for each in (made, empty)]
    assert shapes[0] == shapes[1]
    assert all(part.is_contiguous() for part in made.parts.values())
    assert made.nbytes == empty.nbytes == nbytes_of(form, segments, 384, lead)


def test_bytes_by_hand() -> None:
    """One expert of DeepSeek-V3: gate and up 2 x 2048 x 7168."""
    n, elements = (2048, 2048), 4096 * 7168
    assert nbytes_of(WeightFormat("bf16"), n, 7168) == 2 * elements
    assert nbytes_of(WeightFormat("bf16"), n, 7168, dtype=torch.float32) == 4 * elements
    assert nbytes_of(WeightFormat("fp8_block"), n, 7168) == elements + 32 * 56 * 4
    assert nbytes_of(WeightFormat("fp8_tensor"), n, 7168) == elements + 2 * 4
    assert nbytes_of(WeightFormat("fp8_channel"), n, 7168) == elements + 4096 * 4
    assert nbytes_of(WeightFormat("mxfp8"), n, 7168, (256,)) == 256 * (elements + elements // 32)
    assert nbytes_of(WeightFormat("mxfp4"), n, 7168) == elements // 2 + elements // 32
    assert nbytes_of(WeightFormat("nvfp4"), n, 7168) == elements // 2 + elements // 16 + 2 * 4
    assert nbytes_of(INT4, n, 7168) == elements // 2 + elements // 32 * 2
    assert nbytes_of(WeightFormat("fp8_block"), (100, 200), 130) == 300 * 130 + (1 + 2) * 2 * 4


def test_fp8_block_takes_ragged_edges_and_others_refuse_them() -> None:
    w = torch.randn(131, 257)
    weight = QuantTensor.of(w, WeightFormat("fp8_block"))
    assert weight.parts["scale"].shape == (2, 3)
    values = weight.dequantize()
    corner = QuantTensor.of(w[128:, 256:].contiguous(), WeightFormat("fp8_block"))
    assert torch.equal(values[128:, 256:], corner.dequantize())
    for form in QUANTIZED:
        if form.name in ("mxfp8", "mxfp4", "nvfp4", "int4"):
            step = format_of(form).fields(form)["scale"].columns
            with pytest.raises(UnsupportedError, match=f"multiple of {step}"):
                QuantTensor.of(w, form)
            with pytest.raises(UnsupportedError, match=f"multiple of {step}"):
                nbytes_of(form, (131,), 257)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_source_is_left_alone(form: WeightFormat) -> None:
    w = torch.randn(130, 256)
    before = w.clone()
    QuantTensor.of(w, form).dequantize()
    assert torch.equal(w, before)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_never_becomes_finite(form: WeightFormat, odd: float) -> None:
    w = torch.randn(4, 256)
    w[2, 77] = odd
    assert not QuantTensor.of(w, form).dequantize()[2].isfinite().all()


def test_unknown_forms_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="fp3"):
        format_of(WeightFormat("fp3"))
    with pytest.raises(UnsupportedError, match="float8"):
        QuantTensor.of(torch.zeros(2, 32), WeightFormat("int4", 32, "float8"))
    with pytest.raises(UnsupportedError, match="groups of 0"):
        QuantTensor.of(torch.zeros(2, 32), WeightFormat("int4"))


def test_every_scheme_has_its_format_and_encoding() -> None:
    for scheme in SCHEMES.values():
        assert "data" in format_of(scheme.weight).fields(scheme.weight)


# --- what a checkpoint may not hold


def spoiled(form: WeightFormat, field: str, value: float | int) -> QuantTensor:
    """A good weight with one element of a field replaced: a float by value, a code by its byte."""
    weight = QuantTensor.of(torch.randn(2, 128, 256), form, (64, 64))
    part = weight.parts[field]
    if part.element_size() == 1:
        part.view(torch.uint8).view(-1)[-3] = int(value)
    else:
        part.view(-1)[-1] = value
    return weight


FAULTS = [
    ("fp8_tensor", "data", 0x7F, "NaN"),
    ("fp8_block", "data", 0xFF, "NaN"),
    ("mxfp8", "data", 0x7F, "NaN"),
    ("fp8_channel", "scale", math.nan, "NaN"),
    ("fp8_block", "scale", math.inf, "Inf"),
    ("fp8_tensor", "scale", -0.5, "negative number, -0.5"),
    ("fp8_block", "scale", 1e37, "overflow"),
    ("mxfp8", "scale", 255, "255"),
    ("mxfp4", "scale", 255, "255"),
    ("nvfp4", "scale", 0x7F, "NaN"),
    ("nvfp4", "scale", 0x81, "negative"),
    ("nvfp4", "scale", 0xFF, "NaN"),
    ("nvfp4", "global_scale", -1.0, "negative"),
    ("nvfp4", "global_scale", math.inf, "Inf"),
]


@pytest.mark.parametrize(("form", "field", "value", "message"), FAULTS)
def test_check_names_the_field(form: str, field: str, value: float, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        spoiled(WeightFormat(form), field, value).check("model.layers.3.gate")
    assert caught.value.where == "model.layers.3.gate"
    assert f"the {field} of" in caught.value.what


def test_check_of_int4() -> None:
    for field, value, message in (("scale", math.nan, "NaN"), ("scale", -1.0, "negative"), ("zero", 16, "above 15")):
        with pytest.raises(CheckpointError, match=message):
            spoiled(INT4_ZEROS, field, value).check()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_check_accepts_what_is_good(form: WeightFormat) -> None:
    QuantTensor.of(torch.randn(2, 128, 256), form, (64, 64)).check()
    QuantTensor.of(torch.zeros(2, 128, 256), form).check()
    QuantTensor.of(torch.zeros(0, 128, 256), form).check()


def test_check_accepts_every_finite_code() -> None:
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F] * 16, dtype=torch.uint8)
    data = codes.view(-1, 32).view(torch.float8_e4m3fn)
    scale = torch.arange(127, dtype=torch.uint8).view(1, 127)  # every E4M3 that is no NaN and not negative
    one_by_one(data, scale.view(127, 1), "mxfp8").check()
    parts = {"data": torch.arange(127 * 8).to(torch.uint8).view(1, -1), "scale": scale.view(torch.float8_e4m3fn)}
    QuantTensor(WeightFormat("nvfp4"), (1,), 127 * 16, {**parts, "global_scale": torch.ones(1)}).check()
