"""What is written is what is read, bit for bit; and compressed-tensors and transformers read it as well."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match
from torch import Tensor
from transformers import CompressedTensorsConfig, FineGrainedFP8Config
from transformers.quantizers.quantizers_utils import should_convert_module

from moesaic.contracts.scheme import SCHEMES, UNQUANTIZED, Scheme
from moesaic.contracts.spec import ModelSpec
from moesaic.errors import UnsupportedError
from moesaic.formats.base import QuantTensor
from moesaic.formats.checkpoint import (
    dialect_of,
    excluded_names,
    invertible,
    part_scheme,
    read_quantization,
    storable,
    to_checkpoint,
    write_config,
)
from moesaic.formats.dialects.modules import change_linears, linears, names_of
from tests import dialect_cases as cases
from tests.dialect_load import NAME, dialect_for, fields_of, weight_of

WRITTEN = [scheme for scheme in SCHEMES.values() if scheme.quantized]
ASYMMETRIC = replace(SCHEMES["wna16"], weight=replace(SCHEMES["wna16"].weight, zero_points=True))
HALF = replace(SCHEMES["wna16_g32"], weight=replace(SCHEMES["wna16_g32"].weight, scale_dtype="float16"))
ROWS, COLUMNS = 203, 384


def quantised(scheme: Scheme) -> QuantTensor:
    w = torch.randn(ROWS, COLUMNS) * torch.logspace(-3, 1, ROWS)[:, None]
    return storable(scheme, QuantTensor.of(w, scheme.weight))


def plainly(config: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from a file."""
    read: dict[str, Any] = json.loads(json.dumps(config))
    return read


@pytest.mark.parametrize("scheme", [*WRITTEN, ASYMMETRIC, HALF], ids=lambda s: f"{s.name}-{s.weight.scale_dtype}")
def test_reading_gives_back_what_was_written(scheme: Scheme) -> None:
    q = quantised(scheme)
    scale = invertible(torch.tensor([0.0123])) if scheme.activation.static else None
    tensors = to_checkpoint(scheme, q, NAME, scale)
    headers = dict(tensors)
    if dialect_of(scheme) == "w4afp8" and scale is not None:  # their other projections have one, too
        headers |= {f"{NAME.rpartition('.')[0]}.{w}.input_scale": scale for w in ("w1", "w3")}
    dialect, part = dialect_for(plainly(write_config(scheme)), ROWS, COLUMNS, headers)
    assert (part.scheme.weight, part.scheme.activation) == (scheme.weight, scheme.activation)
    fields = fields_of(dialect, part, tensors)
    found = weight_of(part, fields)
    assert set(found.parts) == set(q.parts)
    for key, value in q.parts.items():
        assert torch.equal(found.parts[key].contiguous().view(torch.uint8), value.contiguous().view(torch.uint8)), key
    assert (fields["input_scale"].item() == scale.item()) if scale is not None else "input_scale" not in fields


def their_value(config: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    """As compressed-tensors decodes it, in FP64; FP4 by its unpacker, since its decompressor computes in BF16."""
    read = QuantizationConfig.model_validate(config)
    (scheme,) = (each for each in read.config_groups.values() if not isinstance(each, list))
    scale = tensors["weight_scale"]
    if "weight_packed" in tensors and tensors["weight_packed"].dtype == torch.uint8:
        codes = unpack_fp4_from_uint8(tensors["weight_packed"], ROWS, COLUMNS, dtype=torch.float32).double()
        if scale.dtype == torch.uint8:
            return codes * torch.exp2(scale.double() - 127).repeat_interleave(32, 1)
        return codes * scale.double().repeat_interleave(16, 1) / tensors["weight_global_scale"].double()
    if scheme.weights and scheme.weights.strategy == "block":
        spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:ROWS, :COLUMNS]
        return (tensors["weight"].float() * spread).double()
    compressor = BaseCompressor.get_value_from_registry(str(read.format))
    wide = scale.float() if scale.is_floating_point() else scale
    value: Tensor = compressor.decompress({**tensors, "weight_scale": wide}, scheme)["weight"]
    return value.double()


@pytest.mark.parametrize(
    "scheme", [s for s in [*WRITTEN, ASYMMETRIC] if dialect_of(s) == "compressed-tensors"], ids=lambda s: s.name
)
def test_compressed_tensors_reads_it(scheme: Scheme) -> None:
    """Its config model, which forbids unknown fields; its decoder; transformers' wrapper of both."""
    config, q = plainly(write_config(scheme, ["lm_head"])), quantised(scheme)
    tensors = {key.removeprefix(f"{NAME}."): value for key, value in to_checkpoint(scheme, q, NAME).items()}
    theirs, ours = their_value(config, tensors), q.dequantize().double()
    limit = 2**-23 if scheme.weight.name == "nvfp4" else 0.0  # an inverse and a product, each rounded to 24 bits
    assert bool(((theirs - ours).abs() <= ours.abs() * limit).all())
    assert ours.abs().amax() > 1
    inner = CompressedTensorsConfig.from_dict(config).quantization_config
    assert inner.ignore == ["lm_head"]


@pytest.mark.parametrize("name", ["fp8", "mxfp8"])
def test_transformers_reads_it(name: str) -> None:
    config = plainly(write_config(SCHEMES[name], ["lm_head"]))
    read = FineGrainedFP8Config.from_dict(config)
    assert read.weight_block_size == ([128, 128] if name == "fp8" else [1, 32])
    assert read.modules_to_not_convert == ["lm_head"]
    assert read.scale_fmt == ("float" if name == "fp8" else "ue8m0")


def test_an_empty_weight_is_written_and_read() -> None:
    for name in ("fp8", "fp8_tensor", "nvfp4", "wna16"):
        scheme = SCHEMES[name]
        q = storable(scheme, QuantTensor.of(torch.zeros(3, 128), scheme.weight))
        tensors = to_checkpoint(scheme, q, NAME, invertible(torch.ones(1)) if scheme.activation.static else None)
        dialect, part = dialect_for(write_config(scheme), 3, 128, tensors)
        assert weight_of(part, fields_of(dialect, part, tensors)).dequantize().count_nonzero() == 0


def test_what_cannot_be_written() -> None:
    scheme = SCHEMES["w4afp8"]
    form = replace(scheme.weight, zero_points=True)
    with pytest.raises(UnsupportedError, match="w4afp8"):
        to_checkpoint(scheme, QuantTensor.of(torch.ones(4, 128), form), NAME)
    with pytest.raises(ValueError, match="2 segments"):
        to_checkpoint(SCHEMES["fp8"], QuantTensor.of(torch.ones(4, 128), SCHEMES["fp8"].weight, (2, 2)), NAME)


def test_a_plain_weight_has_one_tensor() -> None:
    w = torch.randn(3, 5).bfloat16()
    tensors = to_checkpoint(SCHEMES["fp8"], QuantTensor.of(w, UNQUANTIZED.weight), NAME)
    assert list(tensors) == [f"{NAME}.weight"]
    assert tensors[f"{NAME}.weight"] is not None
    assert torch.equal(tensors[f"{NAME}.weight"], w)


def test_invertible_scales() -> None:
    """Of a million magnitudes: an inverse gives back the very number, which is the given one or its neighbour."""
    x = torch.exp2(torch.rand(1_000_000) * 200 - 100)
    y = invertible(x)
    assert torch.equal(y.reciprocal().reciprocal(), y)
    assert (y != x).any()
    below, above = x.nextafter(torch.tensor(0.0)), x.nextafter(torch.tensor(math.inf))
    assert bool(((y >= below) & (y <= above)).all())


# --- which modules stay out


def with_scheme(spec: ModelSpec, scheme: Scheme) -> ModelSpec:
    """All of it but attention in layer 0, all up projections of layer 1's experts, and what joins the draft."""
    plain = ("model.layers.0.self_attn", "model.layers.1.mlp.experts.{e}.up_proj", "model.layers.2.eh_proj")
    return change_linears(  # type: ignore[no-any-return]
        spec, lambda part, experts: part if part.name.startswith(plain)
        else replace(part, scheme=part_scheme(scheme, expert=experts > 0)),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["fp8", "mxfp8", "w4afp8", "nvfp4", "wna16"])
def test_excluded_modules_come_back(name: str) -> None:
    """Through a config and back, the same spec; and with no entry that means nothing."""
    scheme, spec = SCHEMES[name], cases.describe(cases.TINY)
    wanted = with_scheme(spec, scheme)
    dialect = read_quantization({"quantization_config": plainly(write_config(scheme, excluded_names(wanted)))})
    assert dialect
    found, notes = dialect.apply(spec)
    assert not any("matches nothing" in note for note in notes)
    static_or_not = {part.name: part.scheme.weight for part, _ in linears(found)}
    assert static_or_not == {part.name: part.scheme.weight for part, _ in linears(wanted)}
    assert {"lm_head", "model.layers.1.mlp.gate"} <= set(excluded_names(wanted))
    assert "lm_head" in excluded_names(replace(wanted, tied=True))  # others may count it among the projections


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_others_leave_out_the_same_modules(name: str) -> None:
    """By transformers' rule for FP8, by compressed-tensors' for the rest."""
    scheme = SCHEMES[name]
    wanted = with_scheme(cases.describe(cases.TINY), scheme)
    config = write_config(scheme, excluded_names(wanted))
    linear = torch.nn.Linear(1, 1, device="meta")
    named = [(n, part.scheme.quantized) for part, experts in linears(wanted) for n in names_of(part, experts)]
    for module, quantized in [*named, ("lm_head", False), ("model.layers.1.mlp.gate", False)]:
        if name == "fp8":
            assert should_convert_module(module, config["modules_to_not_convert"]) is quantized
        else:
            assert is_match(module, linear, ["Linear"], config["ignore"]) is quantized
