"""The formats against libraries that nobody here wrote: torchao, compressed-tensors and transformers.

Each test records how many numbers it compared, as the property `compared`; to see them:
`pytest tests/test_formats_oracles.py -o junit_family=xunit1 --junitxml FILE`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moesaic.contracts.scheme import Encoding, WeightFormat
from moesaic.formats import blocks, e2m1, mx, nibbles, nv
from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import encode
from tests.number_grids import beside, every_bf16

Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def torchao() -> type:
    """Its MX and NVFP4 functions; its log lines about missing CUDA extensions are not ours to show."""
    logging.disable(logging.WARNING)
    try:
        from torchao.prototype.mx_formats import mx_tensor, nvfp4_tensor
        from torchao.prototype.mx_formats.config import ScaleCalculationMode
    finally:
        logging.disable(logging.NOTSET)

    class Torchao:
        to_mx, to_dtype = staticmethod(mx_tensor.to_mx), staticmethod(mx_tensor.to_dtype)
        nvfp4_quantize = staticmethod(nvfp4_tensor.nvfp4_quantize)
        per_tensor = staticmethod(nvfp4_tensor.per_tensor_amax_to_scale)
        mode = ScaleCalculationMode

    return Torchao


def same(record: Record, *pairs: tuple[Tensor, Tensor]) -> None:
    """Bit for bit equal as bytes; zeros may differ in sign only where both sides are floats."""
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        if ours.is_floating_point() and theirs.is_floating_point() and ours.element_size() > 1:
            assert torch.equal(ours.double().nan_to_num(12345.0), theirs.double().nan_to_num(12345.0))
        else:
            assert torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))
    record("compared", sum(ours.numel() for ours, _ in pairs))


def samples() -> Tensor:
    """BF16 numbers as FP32, [256, 512]: rows of very different size, heavy tails, zeros, powers of two, ties."""
    x = torch.randn(256, 512) * torch.logspace(-25, 25, 256)[:, None]
    x[32:64] *= torch.rand(32, 512) ** -2
    x[64:96] = torch.exp2(torch.randint(-20, 20, (32, 512)).float()) * x[64:96].sign()
    x[96:112] = torch.randint(-12, 13, (16, 512)) * 0.25
    x[112, :64], x[113] = 0, -0.0
    return x.bfloat16().float()


# --- torchao


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("form", "rule"), [("mxfp8", "ceil"), ("mxfp8", "floor"), ("mxfp4", "ceil"), ("mxfp4", "floor"), ("mxfp4", "even")]
)
def test_mx_quantiser(torchao: type, form: str, rule: mx.Rule, dtype: torch.dtype, record_property: Record) -> None:
    """Scales and codes. Of E4M3, torchao's EVEN is another rule than ours (from mantissa 1.9375 instead of 1.75)."""
    x = samples().to(dtype) if dtype == torch.bfloat16 else samples() * 1.0009765625
    kind = torch.float8_e4m3fn if form == "mxfp8" else torch.float4_e2m1fn_x2
    scale, data = torchao.to_mx(x, kind, 32, torchao.mode("rceil" if rule == "ceil" else rule))
    ours = QuantTensor.of(x, WeightFormat(form), rule=rule).parts
    same(record_property, (ours["scale"], scale.view(torch.uint8)), (ours["data"], data))


def test_torchaos_logarithm_is_what_ours_avoids(torchao: type) -> None:
    """One FP32 step above 6 x 2^6 the exponent must be 7; log2 in FP32 says 6, and the largest element saturates."""
    x = torch.zeros(1, 32)
    x[0, 0] = math.nextafter(6.0 * 64, math.inf) + 2**-15
    scale, _ = torchao.to_mx(x, torch.float4_e2m1fn_x2, 32, torchao.mode.RCEIL)
    assert scale.view(torch.uint8).item() - 127 == 6
    assert QuantTensor.of(x, WeightFormat("mxfp4")).parts["scale"].item() - 127 == 7


@pytest.mark.parametrize("form", ["mxfp8", "mxfp4"])
def test_mx_decoder(torchao: type, form: str, record_property: Record) -> None:
    """Every code under every scale, NaN (255) and 2^-127 (0) included."""
    scale = torch.arange(256, dtype=torch.uint8).repeat_interleave(8 if form == "mxfp8" else 1).view(-1, 1)
    width = 32 if form == "mxfp8" else 16
    codes = torch.arange(256, dtype=torch.uint8).view(-1, width).repeat(256 if form == "mxfp8" else 1, 1)
    if form == "mxfp4":
        scale, codes = scale.repeat_interleave(16, 0), codes.repeat(256, 1)
    data, kind = codes, torch.float4_e2m1fn_x2
    if form == "mxfp8":
        data, kind = codes.view(torch.float8_e4m3fn), torch.float8_e4m3fn
    theirs = torchao.to_dtype(data, scale.view(torch.float8_e8m0fnu), kind, 32, torch.float32)
    ours = QuantTensor(WeightFormat(form), (len(data),), 32, {"data": data, "scale": scale}).dequantize()
    same(record_property, (ours, theirs))


def near_a_tie(quotient: Tensor) -> Tensor:
    """Where two FP32 quotients of the same numbers, each rounded up to three times, may round to different codes."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
    return ((quotient.abs()[..., None] / ties - 1).abs() <= 4 * 2**-24).any(-1)


def test_nvfp4_quantiser(torchao: type, record_property: Record) -> None:
    """Scales agree bit for bit; codes do too, except within rounding of a tie (torchao multiplies by a reciprocal)."""
    x = torch.cat([torch.randn(512, 1024) * size for size in (1e-5, 1.0, 300.0)]).bfloat16().float()
    for rows in x.split(512):
        weight = QuantTensor.of(rows, WeightFormat("nvfp4"))
        top = torchao.per_tensor(rows.abs().max())
        scale, data = torchao.nvfp4_quantize(rows, per_tensor_scale=top)
        total = weight.parts["scale"].double().mul(top.double()).repeat_interleave(16, 1)
        odd = nibbles.unpack(weight.parts["data"]) != nibbles.unpack(data)
        assert not odd[~near_a_tie(rows.double() / total)].any()
        assert odd.float().mean() < 1e-3
        same(record_property, (weight.parts["scale"], scale.view(torch.float8_e4m3fn)))
        same(record_property, (weight.parts["global_scale"], top.view(1)))
    record_property("compared", x.numel())


def test_static_nvfp4_encoding(torchao: type, record_property: Record) -> None:
    """A calibrated global scale that is too small: block scales saturate at 448, codes at 6."""
    x = torch.randn(37, 512).bfloat16()
    for amax in (2.0, 10.0):
        top = torch.tensor(amax / 2688)
        rows = encode(x, Encoding("nvfp4", static=True), top)
        scale, data = torchao.nvfp4_quantize(x, per_tensor_scale=top)
        total = rows.parts["scale"].double().mul(top.double()).repeat_interleave(16, 1)
        odd = nibbles.unpack(rows.data) != nibbles.unpack(data)
        assert not odd[~near_a_tie(x.double() / total)].any()
        same(record_property, (rows.parts["scale"], scale.view(torch.float8_e4m3fn)))
    record_property("compared", 2 * x.numel())


# --- compressed-tensors


def int4_args(form: WeightFormat) -> object:
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(
        num_bits=4, type="int", strategy="group", group_size=form.group, symmetric=not form.zero_points
    )


def test_e2m1_casts_and_packing(record_property: Record) -> None:
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
    from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4

    x = torch.cat((beside(every_bf16()), torch.zeros(2)))
    x = x[: len(x) // 32 * 32].view(-1, 32)
    values = cast_to_fp4(x.clone())
    packed = e2m1.quantize(x)
    same(record_property, (e2m1.dequantize(packed), values))
    same(record_property, (packed, pack_fp4_to_uint8(torch.copysign(values, x))))  # their cast loses the sign of -0
    every = torch.arange(256, dtype=torch.uint8).view(4, 64)
    same(record_property, (e2m1.dequantize(every), unpack_fp4_from_uint8(every, 4, 128, dtype=torch.float32)))


@pytest.mark.parametrize(("bits", "largest"), [(4, 6.0), (8, 448.0)])
def test_even_rule(bits: int, largest: float, record_property: Record) -> None:
    """Rounds up from mantissa 1.75 for E2M1 and E4M3 alike."""
    from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales

    amax = every_bf16()
    amax = beside(amax[(amax > 2.0**-110) & (amax < 2.0**127)])  # theirs overflows to a code of 0 beyond
    theirs = generate_mx_scales(amax.clone(), bits).to(torch.uint8)
    same(record_property, (mx.exponents(amax, largest, "even"), theirs))


def test_mx_scales_decode_alike_except_nan(record_property: Record) -> None:
    """compressed-tensors makes Inf of 255, the standard NaN; all others agree, 2^-127 included."""
    from compressed_tensors.compressors.mx_utils import decompress_mx_scale

    codes = torch.arange(256, dtype=torch.uint8)
    theirs, ours = decompress_mx_scale(codes).float(), mx.decode_scale(codes)
    same(record_property, (ours[:255], theirs[:255]))
    assert theirs[255] == math.inf
    assert ours[255].isnan()


@pytest.mark.parametrize("group", [32, 128])
def test_int4_codes_and_packing(group: int, record_property: Record) -> None:
    """With our scales: the same codes, and the same bytes as INT32 words, low nibble first, offset 8."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
    from compressed_tensors.quantization.lifecycle.forward import quantize

    form = WeightFormat("int4", group, "float32")
    w = torch.randn(48, 512) * torch.logspace(-4, 4, 48)[:, None]
    ours = QuantTensor.of(w, form).parts
    codes = quantize(w, ours["scale"], torch.zeros_like(ours["scale"]), int4_args(form), dtype=torch.int8)
    packed = pack_to_int32(codes, 4)
    same(record_property, (ours["data"], packed.view(torch.uint8)))
    unpacked = unpack_from_int32(ours["data"].view(torch.int32), 4, w.shape)
    values = unpacked.double() * ours["scale"].double().repeat_interleave(group, 1)
    same(record_property, (QuantTensor.of(w, form).dequantize(), values.float()))


def test_int4_with_zero_points(record_property: Record) -> None:
    """Scales, zero points and codes of the asymmetric quantiser; theirs are signed, ours offset by 8."""
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    form = WeightFormat("int4", 128, "float32", zero_points=True)
    w = torch.randn(48, 512) + torch.linspace(-2, 2, 48)[:, None]
    ours, args, groups = QuantTensor.of(w, form).parts, int4_args(form), w.view(48, 4, 128)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    codes = quantize(w, scale, zero, args, dtype=torch.int8)
    same(record_property, (ours["scale"], scale), (ours["zero"], (zero + 8).to(torch.uint8)))
    same(record_property, (nibbles.unpack(ours["data"]), (codes + 8).to(torch.uint8)))


FP8 = {
    "fp8_tensor": ({"strategy": "tensor"}, lambda w: (w.min(), w.max())),
    "fp8_channel": ({"strategy": "channel"}, lambda w: (w.amin(1, keepdim=True), w.amax(1, keepdim=True))),
    "fp8_block": (
        {"strategy": "block", "block_structure": [128, 128]},
        lambda w: [f(w.view(2, 128, 3, 128), (1, 3)) for f in (torch.amin, torch.amax)],
    ),
}


@pytest.mark.parametrize("form", FP8)
def test_fp8_quantisers(form: str, record_property: Record) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    fields, extremes = FP8[form]
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, **fields)
    w = torch.randn(256, 384) * torch.logspace(-3, 3, 384)
    scale, zero = calculate_qparams(*extremes(w), args)
    data = quantize(w, scale, zero, args, dtype=torch.float8_e4m3fn)
    ours = QuantTensor.of(w, WeightFormat(form)).parts
    same(record_property, (ours["scale"], scale.view_as(ours["scale"])), (ours["data"], data))


def test_fp8_token_encoding(record_property: Record) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="token", dynamic=True)
    x = (torch.randn(1, 61, 384) * torch.logspace(-3, 3, 61)[:, None]).bfloat16()
    scale, zero = compute_dynamic_scales_and_zp(x.float(), args, torch.nn.Module())
    data = quantize(x.float(), scale, zero, args, dtype=torch.float8_e4m3fn)
    ours = encode(x, Encoding("fp8_token"))
    same(record_property, (ours.parts["scale"], scale), (ours.data, data))


def test_nvfp4_of_compressed_tensors(record_property: Record) -> None:
    """Its scales under the inverse convention, widened: the values that our fields give after inverting in FP32."""
    from compressed_tensors.compressors.nvfp4.helpers import quantize_and_pack_fp4, unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
    )
    w = torch.randn(64, 512)
    inverse = generate_gparam(w.min(), w.max())
    groups = w.view(64, 32, 16)
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=inverse)
    packed = quantize_and_pack_fp4(w, scale, global_scale=inverse)
    theirs = unpack_fp4_from_uint8(packed, 64, 512, dtype=torch.float32).double()
    theirs = theirs * scale.double().repeat_interleave(16, 1) / inverse.double()
    ours = nv.dequantize(packed, scale.to(torch.float8_e4m3fn), 1 / inverse)
    assert ((ours - theirs).abs() <= 2**-23 * theirs.abs()).all()  # the inverse is rounded, then the product
    direct = QuantTensor.of(w, WeightFormat("nvfp4")).parts
    assert ((1 / inverse - direct["global_scale"]).abs() <= 2**-23 * direct["global_scale"]).all()
    odd = direct["scale"].float() != scale.float()
    off = blocks.amax(groups).double() / 6 * inverse.double() / scale.double() - 1
    assert odd.float().mean() < 1e-2
    assert (off[odd].abs() > 2**-5 - 2**-9).all()  # half a step away from the code: a tie
    record_property("compared", theirs.numel() + scale.numel())


# --- transformers


def test_fp8_block_dequantiser(record_property: Record) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = QuantTensor.of(torch.randn(384, 512) * torch.logspace(-3, 3, 512), WeightFormat("fp8_block"))
    theirs = Fp8Dequantize(None)._dequantize_one(weight.parts["data"], weight.parts["scale"], torch.float32)
    same(record_property, (weight.dequantize(), theirs))


@pytest.mark.parametrize("form", ["mxfp8", "mxfp4"])
def test_mx_dequantiser_of_transformers(form: str, record_property: Record) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    parts = QuantTensor.of(samples(), WeightFormat(form)).parts
    data = parts["data"].view(torch.int8) if form == "mxfp4" else parts["data"]
    theirs = Fp8Dequantize(None)._dequantize_one(data, parts["scale"], torch.float32)
    same(record_property, (QuantTensor(WeightFormat(form), (256,), 512, parts).dequantize(), theirs))


def test_gpt_oss_dequantiser(record_property: Record) -> None:
    """`*_blocks` [E, N, K/32, 16] and `*_scales` [E, N, K/32]; theirs comes back as [E, K, N]. Every byte."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    data = torch.randint(0, 256, (3, 50, 4, 16), dtype=torch.uint8)
    data[0, :4] = torch.arange(256, dtype=torch.uint8).view(4, 4, 16)
    scale = torch.randint(77, 178, (3, 50, 4), dtype=torch.uint8)
    theirs = convert_moe_packed_tensors(data, scale, dtype=torch.float32)
    weight = QuantTensor(WeightFormat("mxfp4"), (50,), 128, {"data": data.flatten(-2), "scale": scale})
    same(record_property, (weight.dequantize().mT.contiguous(), theirs))
