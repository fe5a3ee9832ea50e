"""What other libraries write, this one reads: compressed-tensors' own compressors, transformers' gpt-oss and FP8 code.

Their decompressors are given FP32 scales where they compute in the dtype of the scales.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moesaic.contracts.scheme import SCHEMES
from moesaic.contracts.spec import LinearSpec, MLPSpec, MoESpec
from moesaic.formats.base import QuantTensor
from moesaic.formats.checkpoint import read_quantization
from tests import dialect_cases as cases
from tests.dialect_cases import compressed, group
from tests.dialect_load import dialect_for, fields_of, load, weight_of


def scheme_of(config: dict[str, Any]) -> tuple[Any, QuantizationScheme]:
    """compressed-tensors' compressor and scheme for a config's only group."""
    (only,) = config["config_groups"].values()
    return BaseCompressor.get_value_from_registry(config["format"]), QuantizationScheme.model_validate(only)


def compress(config: dict[str, Any], w_NK: Tensor, size: int = 0,
             dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:  # fmt: skip
    """size: columns that share a scale, 0 for all of them."""
    compressor, scheme = scheme_of(config)
    args = scheme.weights
    groups = w_NK.unflatten(1, (-1, size or w_NK.shape[1]))
    low, high = groups.amin(-1), groups.amax(-1)
    if args.strategy == "tensor":
        low, high = low.amin().reshape(1), high.amax().reshape(1)
    top = generate_gparam(w_NK.amin(), w_NK.amax()) if args.strategy == "tensor_group" else None
    scale, zero = calculate_qparams(low, high, args, global_scale=top)
    state = {"weight": w_NK, "weight_scale": scale.to(dtype), "weight_zero_point": zero}
    found = compressor.compress(state | ({"weight_global_scale": top} if top is not None else {}), scheme)
    return {key: tensor for key, tensor in found.items() if tensor is not None}


def decompress(config: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    compressor, scheme = scheme_of(config)
    scale = tensors["weight_scale"]
    wide = scale.float() if scale.is_floating_point() else scale
    weight: Tensor = compressor.decompress({**tensors, "weight_scale": wide}, scheme)["weight"]
    return weight


def weights(rows: int, columns: int) -> Tensor:
    return (torch.randn(rows, columns) * torch.logspace(-3, 1, rows)[:, None]).bfloat16()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("args", "rows"), [(cases.CHANNEL, cases.TOKEN), (cases.TENSOR, cases.TENSOR)])
def test_float_quantized(args: dict[str, Any], rows: dict[str, Any], dtype: torch.dtype) -> None:
    config = compressed("float-quantized", [], group(args, rows))
    tensors = compress(config, weights(77, 130), dtype=dtype)
    expected = decompress(config, tensors)
    static = {"input_scale": torch.tensor([0.37])} if args == cases.TENSOR else {}
    value, scale = load(config, {**tensors, **static}, 77, 130)
    assert torch.equal(value, expected)
    assert (scale.tolist() == static["input_scale"].tolist()) if static else scale is None


def test_float_quantized_blocks() -> None:
    """Even edges through their decompressor, ragged ones through what a block is."""
    config = compressed("float-quantized", [], group(cases.BLOCK, cases.GROUP128))
    for rows, columns in ((256, 384), (200, 300)):
        compressor, scheme = scheme_of(config)
        scale = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.5
        tensors = compressor.compress({"weight": weights(rows, columns).float(), "weight_scale": scale}, scheme)
        spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
        value, _ = load(config, tensors, rows, columns)
        assert torch.equal(value, tensors["weight"].float() * spread)
        if rows == 256:
            assert torch.equal(value, decompress(config, tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_pack_quantized(size: int, symmetric: bool, dtype: torch.dtype) -> None:
    """77 rows: the last word of the zero points, packed along rows, is padded."""
    args = {**cases.INT4_G32, "group_size": size, "symmetric": symmetric}
    config = compressed("pack-quantized", [], group(args))
    tensors = compress(config, weights(77, 384), size, dtype)
    assert ("weight_zero_point" in tensors) is not symmetric
    assert len(torch.unique(tensors["weight_packed"])) > 1000
    assert torch.equal(load(config, tensors, 77, 384)[0], decompress(config, tensors))


def test_pack_quantized_per_row() -> None:
    """One scale for all 180 columns of a row; the last of 23 words is padded."""
    args = {**cases.INT4_G32, "strategy": "channel", "group_size": None}
    config = compressed("pack-quantized", [], group(args))
    tensors = compress(config, weights(13, 180))
    assert tensors["weight_packed"].shape == (13, 23)
    assert torch.equal(load(config, tensors, 13, 180)[0], decompress(config, tensors))


@pytest.mark.parametrize("rows", [None, {**cases.NV4, "dynamic": "local"}], ids=["nvfp4a16", "nvfp4"])
def test_nvfp4_pack_quantized(rows: dict[str, Any] | None) -> None:
    """Their scale above the blocks is the inverse of ours; an inverse and a product are rounded: 2 x 2^-24."""
    config = compressed("nvfp4-pack-quantized", [], group(cases.NV4, rows))
    tensors = compress(config, weights(77, 160), 16, torch.float32)
    assert len(torch.unique(tensors["weight_packed"])) > 200
    codes = unpack_fp4_from_uint8(tensors["weight_packed"], 77, 160, dtype=torch.float32).double()
    expected = codes * tensors["weight_scale"].double().repeat_interleave(16, 1)
    expected /= tensors["weight_global_scale"].double()
    static = {"input_global_scale": torch.tensor([640.0])} if rows else {}
    value, scale = load(config, {**tensors, **static}, 77, 160)
    assert bool(((value.double() - expected).abs() <= expected.abs() * 2**-23).all())
    assert scale is None or scale.item() == torch.tensor(1 / 640.0).item()


def test_mxfp4_pack_quantized() -> None:
    config = compressed("mxfp4-pack-quantized", [], group(cases.MX4))
    compressor, scheme = scheme_of(config)
    scale = torch.exp2(torch.randint(-9, 5, (77, 5)).float())
    tensors = compressor.compress({"weight": weights(77, 160).float(), "weight_scale": scale}, scheme)
    codes = unpack_fp4_from_uint8(tensors["weight_packed"], 77, 160, dtype=torch.float32)
    assert torch.equal(load(config, tensors, 77, 160)[0], codes * scale.repeat_interleave(32, 1))


def test_mxfp8_quantized() -> None:
    config = compressed("mxfp8-quantized", [], group(cases.MX8, {**cases.MX8, "dynamic": True}))
    compressor, scheme = scheme_of(config)
    scale = torch.exp2(torch.randint(-9, 5, (77, 5)).float())
    tensors = compressor.compress({"weight": weights(77, 160).float(), "weight_scale": scale}, scheme)
    assert torch.equal(load(config, tensors, 77, 160)[0], decompress(config, tensors).float())


# --- transformers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu], ids=str)
def test_fp8_blocks(dtype: torch.dtype) -> None:
    """DeepSeek's scales are FP32, Qwen3's BF16, later ones powers of two: all are widened before they multiply."""
    data = weights(256, 384).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = (torch.rand(2, 3) + 0.1).to(dtype)
    expected = Fp8Dequantize(None)._dequantize_one(data, scale.float(), torch.float32)
    assert torch.equal(load(cases.DEEPSEEK_FP8, {"weight": data, "weight_scale_inv": scale}, 256, 384)[0], expected)


def mixture(experts: int, hidden: int, width: int) -> MoESpec:
    mlp: Any = cases.describe(cases.TINY).layers[1].mlp
    name, mxfp4 = "model.layers.1.mlp.experts.{e}.", SCHEMES["mxfp4"]
    gate, up = (LinearSpec(f"{name}{part}_proj", hidden, width, True, mxfp4) for part in ("gate", "up"))
    down = LinearSpec(f"{name}down_proj", width, hidden, True, mxfp4)
    return MoESpec(mlp.router.__class__(experts, 1, "softmax", "r"), gate, up, down, shared=MLPSpec(gate, up, down))


def test_gpt_oss_experts() -> None:
    """Against transformers' decoder, which returns [E, K, 2I] with gate and up in turn."""
    experts, hidden, width = 3, 96, 64
    dialect = read_quantization({"quantization_config": cases.GPT_OSS})
    assert dialect
    sources = dialect.expert_sources(mixture(experts, hidden, width))
    assert sources
    shapes = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}
    tensors, expected = {}, {}
    for part, (rows, columns) in shapes.items():
        base = f"model.layers.1.mlp.experts.{part}"
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(110, 140, (experts, rows, columns // 32), dtype=torch.uint8)
        tensors |= {f"{base}_blocks": blocks, f"{base}_scales": scales, f"{base}_bias": torch.randn(experts, rows)}
        expected[part] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
    assert {source.name for source in sources} == set(tensors)
    for e in range(experts):
        fields: dict[tuple[str, str], Tensor] = {}
        for source in sources:
            source.check(tensors[source.name])
            fields |= source.take(tensors[source.name], e)
        both, bias = expected["gate_up_proj"][e], tensors["model.layers.1.mlp.experts.gate_up_proj_bias"][e]
        for part, wanted in (("gate", both[0::2]), ("up", both[1::2]), ("down", expected["down_proj"][e])):
            weight = {"data": fields[part, "data"], "scale": fields[part, "scale"]}
            value = QuantTensor(SCHEMES["mxfp4"].weight, (wanted.shape[0],), wanted.shape[1], weight).dequantize()
            assert torch.equal(value, wanted)
        assert torch.equal(fields["gate", "bias"], bias[0::2])
        assert torch.equal(fields["up", "bias"], bias[1::2])


def test_gpt_oss_views_share_storage() -> None:
    """Dealing rows out copies nothing: an expert layer is hundreds of megabytes."""
    dialect = read_quantization({"quantization_config": cases.GPT_OSS})
    assert dialect
    for source in dialect.expert_sources(mixture(3, 96, 64)) or ():
        tensor = torch.zeros(source.shape, dtype=source.dtypes[0])
        for view in source.take(tensor, 1).values():
            assert view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


# --- by hand


def test_w4afp8_by_hand() -> None:
    """Byte 0xF8: low nibble 8 is -8, high nibble F is -1. The input scale goes by the older name."""
    config = {"quant_method": "w4afp8"}
    name = "model.layers.1.mlp.experts.2.down_proj"
    data = torch.tensor([[0xF8, 0x70, 0x21] + [0] * 61], dtype=torch.uint8).view(torch.int8)
    stored = {f"{name}.weight": data, f"{name}.weight_scale_inv": torch.tensor([[0.5]]),
              "model.layers.1.mlp.experts.2.w2.input_scale": torch.tensor(0.25)}  # fmt: skip
    base = "model.layers.1.mlp.experts"
    others = {f"{base}.{e}.{w}.input_scale": torch.tensor(1.0) for e in range(4) for w in ("w1", "w3")}
    dialect, part = dialect_for(config, 1, 128, {**stored, **others})
    fields = fields_of(dialect, part, stored)
    value = weight_of(part, fields).dequantize()
    assert value[0].tolist() == [-4.0, -0.5, 0.0, 3.5, 0.5, 1.0] + [0.0] * 122
    assert fields["input_scale"].tolist() == [0.25]
    assert part.scheme.name == "w4afp8_static"


@pytest.mark.parametrize(("algorithm", "extra"), [("NVFP4", {"input_scale": torch.tensor(0.125)}), ("W4A16_NVFP4", {})])
def test_modelopt_nvfp4_by_hand(algorithm: str, extra: dict[str, Tensor]) -> None:
    """Byte 0xA3: low nibble 3 is 1.5, high nibble A is -1; times 2 per block, times 0.25 for the tensor."""
    tensors = {
        "weight": torch.full((1, 8), 0xA3, dtype=torch.uint8), "weight_scale_2": torch.tensor(0.25),
        "weight_scale": torch.tensor([[2.0]]).to(torch.float8_e4m3fn), **extra,
    }  # fmt: skip
    value, scale = load({"quant_method": "modelopt", "quant_algo": algorithm}, tensors, 1, 16)
    assert value[0].tolist() == [0.75, -0.5] * 8
    assert scale is None if not extra else scale.tolist() == [0.125]


def test_modelopt_fp8_by_hand() -> None:
    """0x38 is 1.0 and 0xC0 is -2.0; per tensor, per row, per block with its axes kept, and MX."""
    data = torch.tensor([[0x38] * 32, [0xC0] * 32], dtype=torch.uint8).view(torch.float8_e4m3fn)
    cases_ = {
        "FP8": ({"weight_scale": torch.tensor(3.0), "input_scale": torch.tensor(0.5)}, [3.0, -6.0]),
        "FP8_PER_CHANNEL_PER_TOKEN": ({"weight_scale": torch.tensor([3.0, 5.0])}, [3.0, -10.0]),
        "FP8_PB_WO": ({"weight_scale": torch.tensor([[[[3.0]]]])}, [3.0, -6.0]),
        "MXFP8": ({"weight_scale": torch.tensor([[128], [126]], dtype=torch.uint8)}, [2.0, -1.0]),
    }
    for algorithm, (scales, first) in cases_.items():
        value, _ = load({"quant_method": "modelopt", "quant_algo": algorithm}, {"weight": data, **scales}, 2, 32)
        assert value.tolist() == [[first[0]] * 32, [first[1]] * 32]


def test_mxfp8_scales_as_bytes_or_as_what_they_are() -> None:
    config = {"quant_method": "mxfp8", "weight_block_size": [1, 32]}
    data = torch.full((1, 64), 1.5).to(torch.float8_e4m3fn)
    for scale in (torch.tensor([[127, 129]], dtype=torch.uint8), torch.tensor([[1.0, 4.0]]).to(torch.float8_e8m0fnu)):
        value, _ = load(config, {"weight": data, "weight_scale_inv": scale}, 1, 64)
        assert value[0].tolist() == [1.5] * 32 + [6.0] * 32
