"""The numbers of quantised checkpoints: as online quantisation has them, as other libraries read them, as reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from moesaic.assets import embedded_model
from moesaic.contracts.scheme import SCHEMES, WeightFormat
from moesaic.formats import e2m1, nibbles
from moesaic.formats.base import QuantTensor
from moesaic.models.quantize_report import errors
from tests.quantize_support import (
    model_of,
    outputs,
    quantize,
    quantized,
    report_of,
    tensors_of,
    write_source,
)

DYNAMIC = [name for name, scheme in SCHEMES.items() if scheme.quantized and not scheme.activation.static]
COMPRESSED = [name for name in DYNAMIC if name not in ("fp8", "mxfp8", "w4afp8")]
KINDS = ("deepseek_v3", "qwen3_moe", "mixtral")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("sources")
    return {kind: write_source(path / kind, kind) for kind in KINDS}


@pytest.mark.parametrize("scheme", DYNAMIC)
def test_from_a_file_or_at_load_the_model_computes_the_same(
    scheme: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    """Each architecture meets a third of the schemes here, and all of them in the long test."""
    check_same(sources[KINDS[DYNAMIC.index(scheme) % 3]], tmp_path / "out", scheme)


@pytest.mark.parametrize("scheme", ["fp8", "nvfp4_dynamic", "wna16_g32"])
def test_the_embedded_model_too(scheme: str, tmp_path: Path) -> None:
    check_same(embedded_model(), tmp_path / "out", scheme)


@pytest.mark.long
@pytest.mark.parametrize("kind", [*KINDS, "tiny"])
@pytest.mark.parametrize("scheme", DYNAMIC)
def test_every_scheme_of_every_architecture(scheme: str, kind: str, sources: dict[str, Path], tmp_path: Path) -> None:
    check_same(embedded_model() if kind == "tiny" else sources[kind], tmp_path / "out", scheme)


def check_same(source: Path, output: Path, scheme: str) -> None:
    model = model_of(quantized(source, output, scheme), dtype="float32")
    online = model_of(source, dtype="float32", quantization=scheme)
    assert model.nbytes() == online.nbytes()
    assert torch.equal(outputs(model), outputs(online))
    plain = outputs(model_of(source, dtype="float32"))
    off = ((outputs(online) - plain).norm() / plain.norm()).item()
    assert 1e-3 < off < 0.5, "something was quantised, and nothing was lost"


def test_fp16_and_fp32_sources_and_one_that_was_fp8(sources: dict[str, Path], tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.float32):
        source = write_source(tmp_path / str(dtype), "mixtral", dtype)
        check_same(source, tmp_path / f"{dtype}-mxfp8", "mxfp8")
    fp8 = quantized(sources["deepseek_v3"], tmp_path / "fp8", "fp8")
    for scheme in ("mxfp4", "nvfp4_dynamic", "bf16"):
        done = quantize(fp8, tmp_path / scheme, scheme)
        assert ("stored as fp8_block and quantised anew" in done.err) == (scheme != "bf16")
        model, online = model_of(tmp_path / scheme), model_of(fp8, quantization=scheme)
        assert torch.equal(outputs(model), outputs(online))
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "bf16").values()} <= {torch.bfloat16, torch.float32}


def test_a_change_of_encoding_keeps_the_codes(sources: dict[str, Path], tmp_path: Path) -> None:
    """MXFP4 decoded and quantised again would move some: a block whose largest value is 4 can be scaled to end at 6."""
    once = quantized(sources["qwen3_moe"], tmp_path / "once", "mxfp4")
    again = quantized(once, tmp_path / "again", "mxfp4a8")
    first, second = tensors_of(once), tensors_of(again)
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {row["rms"] for row in report_of(again)["tensors"]} == {0.0}
    done = quantize(once, tmp_path / "same", "mxfp4")
    assert done.code == 2
    assert "is in mxfp4 already" in done.error
    assert not (tmp_path / "same").exists()


def test_experts_that_lie_together(tmp_path: Path) -> None:
    """gpt-oss: one tensor per layer and product in the source, and in MXFP4 releases; one per expert in the result."""
    source = write_source(tmp_path / "bf16", "gpt_oss")
    for scheme in ("mxfp4", "fp8_channel"):
        check_same(source, tmp_path / scheme, scheme)
    kept = quantized(source, tmp_path / "kept", "mxfp4", "--keep", "*.experts.*")
    before, after = tensors_of(source), tensors_of(kept)
    together = [name for name in before if ".experts." in name]
    assert len(together) == 4 * 2
    assert all(torch.equal(after[name], before[name]) for name in together)


# --- read by others


def decoded(path: Path, out: Path) -> dict[str, Tensor]:
    """By our own decoder: `--scheme bf16` of a config that says FP32 writes what it reads in FP32."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return tensors_of(quantized(path, out, "bf16"))


def decompress(config: dict[str, Any], stored: dict[str, Tensor], name: str) -> Tensor:
    """By compressed-tensors, told what config.json says. It computes in the dtype of the scales: those are widened.

    NVFP4 it rounds to BF16 whatever they are, so there its unpacker is followed by the definition in FP64.
    """
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    scheme = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    own = {key.removeprefix(name + "."): tensor for key, tensor in stored.items() if key.startswith(name + ".")}
    scale = own["weight_scale"]
    if "weight_global_scale" in own:
        rows, half = own["weight_packed"].shape
        codes = unpack_fp4_from_uint8(own["weight_packed"], rows, 2 * half, dtype=torch.float32).double()
        return codes * scale.double().repeat_interleave(16, 1) / own["weight_global_scale"].double()
    own["weight_scale"] = scale.float() if scale.is_floating_point() else scale
    weight: Tensor = compressor.decompress(own, scheme)["weight"]
    return weight


@pytest.mark.parametrize("scheme", COMPRESSED)
def test_compressed_tensors_decodes_every_weight_alike(scheme: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """Exactly; for NVFP4 within the rounding of an inverse and a product. MXFP4 comes in BF16, which holds it."""
    path = quantized(sources["qwen3_moe"], tmp_path / "q", scheme)
    config, stored = json.loads((path / "config.json").read_text())["quantization_config"], tensors_of(path)
    rows, ours = report_of(path)["tensors"], decoded(path, tmp_path / "decoded")
    assert len(rows) == 2 * (4 + 3 * 5)
    for row in rows:
        theirs = decompress(config, stored, row["name"])
        own = ours[row["name"] + ".weight"].to(theirs.dtype)
        torch.testing.assert_close(own, theirs, rtol=2**-22 if scheme.startswith("nvfp4") else 0, atol=0)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("scheme", ["fp8_tensor", "mxfp4", "wna16"])
def test_transformers_loads_the_whole_model_alike(scheme: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """INT4 in the BF16 of its scales. (Of NVFP4 and MXFP8 experts transformers loads wrong values, or none.)"""
    path = quantized(sources["qwen3_moe"], tmp_path / "q", scheme)
    how = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(path, quantization_config=how, dtype=torch.float32).state_dict()
    ours, rounded = decoded(path, tmp_path / "decoded"), torch.bfloat16 if scheme == "wna16" else torch.float32
    for i in (0, 1):
        name = f"model.layers.{i}"
        for part in "qkvo":
            dense = ours[f"{name}.self_attn.{part}_proj.weight"].to(rounded).float()
            assert torch.equal(theirs[f"{name}.self_attn.{part}_proj.weight"].float(), dense)
        for e in range(5):
            own = [ours[f"{name}.mlp.experts.{e}.{part}_proj.weight"].to(rounded) for part in ("gate", "up", "down")]
            assert torch.equal(theirs[f"{name}.mlp.experts.gate_up_proj"][e].float(), torch.cat(own[:2]).float())
            assert torch.equal(theirs[f"{name}.mlp.experts.down_proj"][e].float(), own[2].float())
        assert torch.equal(theirs[f"{name}.mlp.gate.weight"], ours[f"{name}.mlp.gate.weight"].float())


@pytest.mark.parametrize("scheme", ["fp8", "mxfp8", "w4afp8"])
def test_transformers_decodes_fp8_and_mxfp8_alike(scheme: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """Its decoder alone, tensor by tensor: loading a whole model in FP8 wants a package more. INT4 it has not."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    path = quantized(sources["mixtral"], tmp_path / "q", scheme)
    stored, ours, seen = tensors_of(path), decoded(path, tmp_path / "decoded"), 0
    for name, scale in stored.items():
        weight = name.removesuffix("_scale_inv")
        if name.endswith("weight_scale_inv") and stored[weight].dtype == torch.float8_e4m3fn:
            theirs = Fp8Dequantize(None)._dequantize_one(stored[weight], scale, torch.float32)
            assert torch.equal(ours[weight], theirs), name
            seen += 1
    assert seen == {"fp8": 2 * 13, "mxfp8": 2 * 13, "w4afp8": 2 * 4}[scheme]


# --- what the report says


@pytest.mark.parametrize("scheme", ["fp8_channel", "mxfp8a16", "nvfp4a16"])
def test_the_report_says_what_others_measure(scheme: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """Errors in FP64 between the source's tensors and those that compressed-tensors decodes; bytes from the files."""
    path = quantized(sources["qwen3_moe"], tmp_path / "q", scheme)
    config, report = json.loads((path / "config.json").read_text())["quantization_config"], report_of(path)
    before, after = tensors_of(sources["qwen3_moe"]), tensors_of(path)
    for row in report["tensors"]:
        w, q = before[row["name"] + ".weight"].double(), decompress(config, after, row["name"]).double()
        assert row["rms"] == pytest.approx(((q - w).norm() / w.norm()).item(), rel=1e-6)
        assert row["worst"] == pytest.approx((q - w).abs().max().item(), rel=1e-6)
        assert row["before"] == w.numel() * 2
        assert row["after"] == sum(t.nbytes for name, t in after.items() if name.startswith(row["name"] + "."))
    assert report["bytes"]["before"] == sum(tensor.nbytes for tensor in before.values())
    assert report["bytes"]["after"] == sum(tensor.nbytes for tensor in after.values())
    total = {each["kind"]: each for each in report["totals"]}
    assert set(total) == {"attention", "experts"}
    assert total["experts"]["weights"] == 2 * 3 * 5 * 128 * 128
    assert total["experts"]["before"] == 2 * total["experts"]["weights"]


@pytest.mark.parametrize(
    ("form", "inside", "outside"),
    [
        # Scales of 1: E4M3 ends at 448 in steps of 32, E2M1 at 6 in steps of 2, INT4 at -8 and 7.
        (WeightFormat("fp8_channel"), (464.0, -464.0, 448.0), (464.1, -465.0)),
        (WeightFormat("mxfp8"), (464.0, -464.0, 0.0), (464.1, -465.0)),
        (WeightFormat("mxfp4"), (7.0, -7.0, 6.0), (7.01, -7.5)),
        (WeightFormat("int4", 128, "bfloat16"), (7.5, -8.5, 0.0), (7.51, -8.51)),
    ],
    ids=str,
)
def test_saturation_by_hand(form: WeightFormat, inside: tuple[float, ...], outside: tuple[float, ...]) -> None:
    wide = torch.zeros(2, 128)
    wide[1, : len(inside)] = torch.tensor(inside)
    assert errors(wide, in_units(wide, form))[2] == 0
    wide[0, : len(outside)] = torch.tensor(outside)
    assert errors(wide, in_units(wide, form))[2] == len(outside) / 256


def test_a_tie_is_not_saturation() -> None:
    """Multiples of a quarter of FP8's widest step, under scales that are no powers of two: every fourth is a tie."""
    wide = torch.arange(-56, 57).float().repeat(999, 1) * torch.rand(999, 1)
    assert errors(wide, QuantTensor.of(wide, WeightFormat("fp8_channel")))[2] == 0


def in_units(wide: Tensor, form: WeightFormat) -> QuantTensor:
    """The codes nearest to values, at scales of 1."""
    weight = QuantTensor.of(wide, form)
    weight.parts["scale"].fill_(127 if weight.parts["scale"].dtype == torch.uint8 else 1)
    if form.name == "int4":
        weight.parts["data"].copy_(nibbles.pack((wide.round().clamp(-8, 7) + 8).to(torch.uint8)))
    elif form.name == "mxfp4":
        weight.parts["data"].copy_(nibbles.pack(e2m1.codes(wide)))
    else:
        weight.parts["data"].copy_(wide.clamp(-448, 448).to(torch.float8_e4m3fn))
    return weight


def test_errors_by_hand() -> None:
    weight = QuantTensor.of(torch.tensor([[4.0, 0.0], [0.0, 448.0]]), WeightFormat("fp8_tensor"))
    wide = torch.tensor([[4.0, 3.0], [-4.0, 448.0]])
    assert errors(wide, weight) == (pytest.approx(5 / (4**2 + 3**2 + 4**2 + 448**2) ** 0.5), 4.0, 0.0)
    assert errors(torch.zeros(2, 2), QuantTensor.of(torch.zeros(2, 2), WeightFormat("fp8_tensor"))) == (0.0, 0.0, 0.0)


def test_what_is_not_quantised_is_the_source_bit_for_bit(sources: dict[str, Path], tmp_path: Path) -> None:
    before = tensors_of(sources["deepseek_v3"])
    more = ("--experts-only", "--keep", "model.layers.2.*")  # the draft's experts
    after = tensors_of(quantized(sources["deepseek_v3"], tmp_path / "q", "fp8", *more))
    quantised = {name for name in before if name.startswith("model.layers.1.mlp.experts.")}
    assert len(quantised) == 3 * 4
    assert {name for name in after if name.endswith("_scale_inv")} == {f"{name}_scale_inv" for name in quantised}
    assert {name for name, tensor in after.items() if tensor.dtype == torch.float8_e4m3fn} == quantised
    for name in set(before) - quantised:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name]), name
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert "model.layers.2.mlp.experts.*.gate_proj" in config["quantization_config"]["modules_to_not_convert"]
