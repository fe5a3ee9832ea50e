"""Published quantisation configs against what their checkpoints hold, worked out module by module by hand."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from moesaic.contracts.scheme import SCHEMES
from moesaic.contracts.spec import LinearSpec, ModelSpec, MoESpec
from moesaic.errors import CheckpointError, MoesaicError, UnsupportedError
from moesaic.formats.checkpoint import read_quantization
from moesaic.formats.dialects.modules import change_linears, linears, names_of
from tests import dialect_cases as cases
from tests.dialect_cases import compressed, describe, group, schemes


def applied(model: dict[str, Any], quantization: dict[str, Any] | None, sidecar: dict[str, Any] | None = None,
            **more: Any) -> tuple[ModelSpec, tuple[str, ...]]:  # fmt: skip
    config = {**model, **more, "quantization_config": quantization}
    dialect = read_quantization(config, sidecar)
    assert dialect
    return dialect.apply(describe(config))


def check(spec: ModelSpec, rules: list[tuple[str, str]]) -> None:
    """rules: (expression, scheme name), the first that matches a projection's whole name decides."""
    used = set()
    for name, scheme in schemes(spec).items():
        expected = next((rule for rule in rules if re.fullmatch(rule[0], name)), None)
        assert expected, f"no rule for {name}"
        assert scheme.name == expected[1], f"{name} is {scheme.name}, not {expected[1]}"
        assert scheme == SCHEMES[expected[1]]
        used.add(expected)
    assert used == set(rules)


def test_deepseek_v3_quantises_every_projection() -> None:
    """With no list at all: embedding, head, norms and routers are plain because of what they are."""
    spec, notes = applied(cases.DEEPSEEK, cases.DEEPSEEK_FP8)
    check(spec, [(".*", "fp8")])
    assert len(schemes(spec)) == 62 * 5 + 3 * 3 + 59 * 3 * (256 + 1) + 1
    assert [note.partition(":")[0] for note in notes] == ["kv_b_proj of 62 layers is stored as fp8_block"]


def test_deepseek_v31_says_what_it_does_not_do() -> None:
    _, notes = applied(cases.DEEPSEEK, {**cases.DEEPSEEK_FP8, "scale_fmt": "ue8m0"})
    assert any("scale_fmt ue8m0" in note for note in notes)


def test_qwen3_fp8_lists_norms_and_routers() -> None:
    """Entries that name what is no projection are no news."""
    spec, notes = applied(cases.QWEN, cases.QWEN_FP8)
    check(spec, [(".*", "fp8")])
    assert notes == ()


def test_minimax_fp8_lists_last_components() -> None:
    """`gate` is the router and not `gate_proj`; `e_score_correction_bias` is a tensor of the router."""
    spec, notes = applied(cases.DEEPSEEK, cases.MINIMAX_FP8)
    check(spec, [(".*", "fp8")])
    assert not any("matches nothing" in note for note in notes)


def test_autofp8_mixtral() -> None:
    spec, notes = applied(cases.MIXTRAL, cases.AUTO_FP8)
    check(spec, [(".*", "fp8_tensor_static")])
    assert notes == ()
    spec, _ = applied(cases.MIXTRAL, {**cases.AUTO_FP8, "activation_scheme": "dynamic"})
    check(spec, [(".*", "fp8_tensor")])


def test_kimi_k2_int4_quantises_routed_experts_only() -> None:
    spec, notes = applied(cases.KIMI, cases.KIMI_INT4)
    check(spec, [(r"model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj", "wna16_g32"), (".*", "bf16")])
    assert sum(s.quantized for s in schemes(spec).values()) == 60 * 384 * 3
    assert notes == ()


def test_nvidia_deepseek_r1_nvfp4_leaves_attention_and_draft() -> None:
    """The draft layer is plain while the layers before it are NVFP4; layer 6 is not layer 61."""
    spec, notes = applied(cases.DEEPSEEK, None, cases.NVIDIA_NVFP4)
    check(spec, [(r"model\.layers\.61\..*", "bf16"), (r".*\.self_attn\..*", "bf16"), (".*", "nvfp4")])
    assert schemes(spec)["model.layers.6.mlp.experts.61.up_proj"].name == "nvfp4"
    assert notes == ()


def test_modelopt_in_config_json_means_the_same() -> None:
    """As its exporter rewrites the sidecar: `ignore`, a KV cache scheme, config groups that repeat the algorithm."""
    said = cases.NVIDIA_NVFP4["quantization"]
    own = {
        "quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": said["exclude_modules"],
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "producer": {"name": "modelopt", "version": "0.33.0"},
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 16}}},
    }  # fmt: skip
    spec, notes = applied(cases.DEEPSEEK, own, cases.NVIDIA_NVFP4)
    assert spec == applied(cases.DEEPSEEK, None, cases.NVIDIA_NVFP4)[0]
    assert [note.partition(":")[0] for note in notes] == ["the KV cache stays unquantised"]


def test_gpt_oss_quantises_experts_only() -> None:
    """With its list or without: nothing but experts has this form."""
    spec, notes = applied(cases.GPT_OSS_20B, cases.GPT_OSS)
    check(spec, [(r".*\.experts\..*", "mxfp4"), (".*", "bf16")])
    assert notes == ()
    assert applied(cases.GPT_OSS_20B, {"quant_method": "mxfp4"}) == (spec, ())
    dialect, mlp = read_quantization({"quantization_config": cases.GPT_OSS}), spec.layers[23].mlp
    assert dialect
    assert isinstance(mlp, MoESpec)
    assert {source.name: source.shape for source in dialect.expert_sources(mlp) or ()} == {
        "model.layers.23.mlp.experts.gate_up_proj_blocks": (32, 5760, 90, 16),
        "model.layers.23.mlp.experts.gate_up_proj_scales": (32, 5760, 90),
        "model.layers.23.mlp.experts.gate_up_proj_bias": (32, 5760),
        "model.layers.23.mlp.experts.down_proj_blocks": (32, 2880, 90, 16),
        "model.layers.23.mlp.experts.down_proj_scales": (32, 2880, 90),
        "model.layers.23.mlp.experts.down_proj_bias": (32, 2880),
    }


def test_redhat_fp8_dynamic_and_nvfp4() -> None:
    spec, notes = applied(cases.QWEN, cases.REDHAT_FP8_DYNAMIC)
    check(spec, [(".*", "fp8_channel")])
    assert notes == ()
    spec, notes = applied(cases.QWEN, cases.REDHAT_NVFP4)
    check(spec, [(".*", "nvfp4")])
    assert notes == ()


def test_w4afp8_is_about_experts() -> None:
    spec, notes = applied(cases.DEEPSEEK, {"quant_method": "w4afp8", "activation_scheme": "dynamic"})
    check(spec, [(r".*\.experts\..*", "w4afp8_static"), (".*", "fp8")])
    assert [note.partition(" ")[0] for note in notes] == ["kv_b_proj"]


def test_mxfp8_in_two_spellings() -> None:
    for method in ("mxfp8", "fp8"):
        config = {"quant_method": method, "activation_scheme": "dynamic", "weight_block_size": [1, 32],
                  "modules_to_not_convert": ["lm_head", "model.layers.0.self_attn", "layers.47"]}  # fmt: skip
        spec, notes = applied(cases.QWEN, config)
        check(spec, [(r"model\.layers\.(0\.self_attn|47)\..*", "bf16"), (".*", "mxfp8")])
        assert notes == ()


def test_groups_by_name_expression_and_class() -> None:
    """The closest target decides: name before expression before class, whatever the order of the groups."""
    config = compressed(
        "mixed-precision", ["lm_head"],
        group(cases.CHANNEL, cases.TOKEN, "Linear", form="float-quantized"),
        group(cases.INT4_G128, None, "re:.*mlp.experts.*", form="pack-quantized"),
        group(cases.BLOCK, cases.GROUP128, "model.layers.2.self_attn.o_proj", form="float-quantized"),
        group(cases.MX4, None, "re:.*o_proj$", form="mxfp4-pack-quantized"),
    )  # fmt: skip
    spec, notes = applied(cases.QWEN, config)
    check(spec, [
        (r".*\.experts\..*", "wna16"), (r"model\.layers\.2\.self_attn\.o_proj", "fp8"), (r".*\.o_proj", "mxfp4"),
        (".*", "fp8_channel"),
    ])  # fmt: skip
    assert notes == ()


@pytest.mark.parametrize(
    ("weights", "rows", "form", "expected"),
    [
        (cases.TENSOR, cases.TENSOR, "float-quantized", "fp8_tensor_static"),
        (cases.TENSOR, {**cases.TENSOR, "dynamic": True}, "float-quantized", "fp8_tensor"),
        (cases.CHANNEL, cases.TOKEN, "float-quantized", "fp8_channel"),
        (cases.BLOCK, cases.GROUP128, "float-quantized", "fp8"),
        ({**cases.BLOCK, "block_structure": "128x128"}, None, "naive-quantized", "fp8a16"),
        (cases.MX8, {**cases.MX8, "dynamic": True}, "mxfp8-quantized", "mxfp8"),
        (cases.MX8, None, "mxfp8-quantized", "mxfp8a16"),
        (cases.MX4, None, "mxfp4-pack-quantized", "mxfp4"),
        (cases.MX4, {**cases.MX8, "dynamic": True}, "mxfp4-pack-quantized", "mxfp4a8"),
        (cases.NV4, {**cases.NV4, "dynamic": "local"}, "nvfp4-pack-quantized", "nvfp4"),
        (cases.NV4, {**cases.NV4, "dynamic": True}, "nvfp4-pack-quantized", "nvfp4_dynamic"),
        (cases.NV4, None, "nvfp4-pack-quantized", "nvfp4a16"),
        (cases.INT4_G128, None, "pack-quantized", "wna16"),
        (cases.INT4_G32, None, "pack-quantized", "wna16_g32"),
        (cases.INT4_G128, cases.TOKEN, "pack-quantized", "w4afp8_token"),
    ],
)  # fmt: skip
def test_arguments(weights: dict[str, Any], rows: dict[str, Any] | None, form: str, expected: str) -> None:
    spec, _ = applied(cases.QWEN, compressed(form, [], group(weights, rows)))
    check(spec, [(".*", expected)])


def test_int4_with_zero_points_other_groups_and_other_scales() -> None:
    """What SCHEMES does not list still is a scheme: its parts are the checkpoint's."""
    weights = {**cases.INT4_G128, "symmetric": False, "group_size": 64}
    spec, _ = applied(cases.QWEN, compressed("pack-quantized", [], group(weights)), dtype="float16")
    scheme = schemes(spec)["model.layers.0.self_attn.q_proj"]
    form = scheme.weight
    assert (form.name, form.group, form.zero_points, form.scale_dtype) == ("int4", 64, True, "float16")
    assert scheme.name == "int4_g64_asym-bf16"
    per_row = {**cases.INT4_G128, "strategy": "channel", "group_size": None}
    spec, _ = applied(cases.QWEN, compressed("pack-quantized", [], group(per_row)))
    assert schemes(spec)["model.layers.0.mlp.experts.0.down_proj"].weight.group == 768
    assert schemes(spec)["model.layers.0.mlp.experts.0.gate_proj"].weight.group == 2048


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [("FP8", "fp8_tensor_static"), ("FP8_PER_CHANNEL_PER_TOKEN", "fp8_channel"), ("fp8_pb_wo", "fp8a16"),
     ("NVFP4", "nvfp4"), ("W4A16_NVFP4", "nvfp4a16"), ("MXFP8", "mxfp8")],
)  # fmt: skip
def test_modelopt_algorithms(algorithm: str, expected: str) -> None:
    sidecar = {"quantization": {"quant_algo": algorithm, "exclude_modules": ["lm_head", "*.self_attn.*"]}}
    spec, _ = applied(cases.QWEN, None, sidecar)
    check(spec, [(r".*\.self_attn\..*", "bf16"), (".*", expected)])


def test_modelopt_mixed_precision() -> None:
    """What no entry names is plain; the longest of several entries decides."""
    layers = {
        "model.layers.0.self_attn.q_proj": {"quant_algo": "FP8"},
        **{f"model.layers.1.mlp.experts.{e}.{p}_proj": {"quant_algo": "NVFP4", "group_size": 16}
           for e in range(128) for p in ("gate", "up", "down")},
        "model.layers.2.mlp.experts": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
        "model.layers.3": {"quant_algo": "MXFP8"},
        "model.layers.3.self_attn.qkv_proj": {"quant_algo": "FP8"},
    }  # fmt: skip
    config = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    spec, notes = applied(cases.QWEN, config)
    check(spec, [
        (r"model\.layers\.0\.self_attn\.q_proj", "fp8_tensor_static"), (r"model\.layers\.1\.mlp\..*", "nvfp4"),
        (r"model\.layers\.2\.mlp\..*", "nvfp4a16"), (r"model\.layers\.3\.self_attn\.[qkv]_proj", "fp8_tensor_static"),
        (r"model\.layers\.3\..*", "mxfp8"), (".*", "bf16"),
    ])  # fmt: skip
    assert notes == ()


def test_no_config_is_no_dialect() -> None:
    assert read_quantization(cases.QWEN) is None
    assert read_quantization({**cases.QWEN, "quantization_config": None}, None) is None


def test_experts_of_a_layer_must_agree() -> None:
    for config in (
        {**cases.DEEPSEEK_FP8, "modules_to_not_convert": ["model.layers.4.mlp.experts.7.down_proj"]},
        compressed("pack-quantized", [r"re:.*layers\.4\.mlp\.experts\.7\.down_proj"], group(cases.INT4_G32)),
    ):
        with pytest.raises(UnsupportedError) as caught:
            applied(cases.DEEPSEEK, config)
        assert "model.layers.4.mlp.experts.7.down_proj" in str(caught.value)
        assert "model.layers.4.mlp.experts.0.down_proj" in str(caught.value)


def test_unknown_fields_and_entries_are_told() -> None:
    config = {**cases.DEEPSEEK_FP8, "wavelets": 3, "modules_to_not_convert": ["model.layers.99.mlp", "vision_tower"]}
    _, notes = applied(cases.QWEN, config)
    assert "config.json: quantization_config: not known, and left aside: wavelets" in notes
    assert "modules_to_not_convert: matches nothing in this model: 'model.layers.99.mlp', 'vision_tower'" in notes


# --- what is refused, and the field that is named

CT = compressed("pack-quantized", [], group(cases.INT4_G32))


@pytest.mark.parametrize(
    ("config", "kind", "names"),
    [
        ({"quant_method": "awq"}, UnsupportedError, "'awq'"),
        ({"quant_method": 7}, CheckpointError, "quant_method"),
        ({"bits": 4}, CheckpointError, "quant_method"),
        ("fp8", CheckpointError, "object"),
        ({**cases.DEEPSEEK_FP8, "fmt": "e5m2"}, UnsupportedError, "fmt"),
        ({**cases.DEEPSEEK_FP8, "weight_block_size": [64, 64]}, UnsupportedError, "weight_block_size"),
        ({**cases.DEEPSEEK_FP8, "weight_block_size": [128, -1]}, CheckpointError, "weight_block_size"),
        ({**cases.DEEPSEEK_FP8, "weight_block_size": True}, CheckpointError, "weight_block_size"),
        ({**cases.DEEPSEEK_FP8, "activation_scheme": "static"}, UnsupportedError, "activation_scheme"),
        ({**cases.DEEPSEEK_FP8, "activation_scheme": "none"}, UnsupportedError, "activation_scheme"),
        ({**cases.DEEPSEEK_FP8, "expert_dtype": "fp4"}, UnsupportedError, "expert_dtype"),
        ({**cases.DEEPSEEK_FP8, "modules_to_convert": ["lm_head"]}, UnsupportedError, "modules_to_convert"),
        ({**cases.DEEPSEEK_FP8, "ignored_layers": "lm_head"}, CheckpointError, "ignored_layers"),
        ({**cases.DEEPSEEK_FP8, "ignored_layers": ["a", 3]}, CheckpointError, "ignored_layers"),
        ({**cases.DEEPSEEK_FP8, "ignored_layers": ["re:(" ]}, CheckpointError, "ignored_layers"),
        ({**cases.DEEPSEEK_FP8, "ignored_layers": ["re:(a+)+$"]}, UnsupportedError, "repeats a group"),
        ({**cases.DEEPSEEK_FP8, "quant_method": "mxfp8"}, UnsupportedError, "weight_block_size"),
        ({"quant_method": "w4afp8", "group_size": 64}, UnsupportedError, "group_size"),
        ({**CT, "config_groups": {}}, CheckpointError, "config_groups"),
        ({**CT, "config_groups": {"group_0": None}}, UnsupportedError, "weights"),
        ({**CT, "config_groups": {"W4A16": ["Linear"]}}, CheckpointError, "config_groups: W4A16"),
        ({**CT, "format": "marlin-24"}, UnsupportedError, "format 'marlin-24'"),
        ({**CT, "sparsity_config": {"format": "sparse-24-bitmask"}}, UnsupportedError, "sparsity_config"),
        ({**CT, "transform_config": {"config_groups": {"u": 1}}}, UnsupportedError, "transform_config"),
        (compressed("pack-quantized", [], group({**cases.INT4_G32, "actorder": "group"})),
         UnsupportedError, "actorder"),
        (compressed("pack-quantized", [], group({**cases.INT4_G32, "num_bits": 8})), UnsupportedError, "num_bits"),
        (compressed("pack-quantized", [], group({**cases.INT4_G32, "num_bits": "4"})), CheckpointError, "num_bits"),
        (compressed("int-quantized", [], group({**cases.CHANNEL, "type": "int"}, cases.TOKEN)),
         UnsupportedError, "int"),
        (compressed("float-quantized", [], group({**cases.CHANNEL, "symmetric": False})),
         UnsupportedError, "symmetric"),
        (compressed("float-quantized", [], group({**cases.CHANNEL, "dynamic": True})), UnsupportedError, "dynamic"),
        (compressed("mxfp4-pack-quantized", [], group(cases.MX4, {**cases.MX4, "dynamic": True})), UnsupportedError,
         "input_activations"),
        (compressed("float-quantized", [], group(cases.CHANNEL, {**cases.TOKEN, "type": "int"})), UnsupportedError,
         "input_activations"),
        (compressed("nvfp4-pack-quantized", [], group({**cases.NV4, "group_size": 32})),
         UnsupportedError, "group_size"),
        ({**CT, "config_groups": {"g": {**group(cases.INT4_G32), "output_activations": cases.TOKEN}}}, UnsupportedError,
         "output_activations"),
        (compressed("pack-quantized", [], group(cases.INT4_G32, None, "lm_head")), UnsupportedError, "lm_head"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, UnsupportedError, "NVFP4_AWQ"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}, UnsupportedError, "group_size"),
        ({"quant_method": "modelopt"}, UnsupportedError, "quant_algo"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, CheckpointError, "quantized_layers"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION",
          "quantized_layers": {"lm_head": {"quant_algo": "NVFP4"}}}, UnsupportedError, "lm_head"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION",
          "quantized_layers": {"model.layers.0": {"quant_algo": "W4A8_AWQ"}}}, UnsupportedError, "model.layers.0"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(config: Any, kind: type[MoesaicError], names: str) -> None:
    with pytest.raises(kind) as caught:
        applied(cases.QWEN, config)
    assert names in str(caught.value)
    assert caught.value.where
    assert caught.value.remedy


def test_two_files_that_disagree() -> None:
    for own in (cases.DEEPSEEK_FP8, {"quant_method": "modelopt", "quant_algo": "FP8"}):
        with pytest.raises(CheckpointError, match=r"hf_quant_config\.json"):
            applied(cases.DEEPSEEK, own, cases.NVIDIA_NVFP4)


# --- what only the headers say


def headers(spec: ModelSpec, plain: str = "(?!)") -> dict[str, torch.dtype]:
    """As DeepSeek FP8 stores a spec; plain: an expression of the projections that are not quantised."""
    found = {f"{name}.weight": torch.bfloat16 for name in (spec.embed, spec.head)}
    for part, experts in linears(spec):
        for name in names_of(part, experts):
            quantized = not re.fullmatch(plain, name)
            found[f"{name}.weight"] = torch.float8_e4m3fn if quantized else torch.bfloat16
            found |= {f"{name}.weight_scale_inv": torch.float32} if quantized else {}
    return found


def test_a_draft_layer_that_is_stored_plain() -> None:
    """DeepSeek-V3 keeps `eh_proj` in BF16 and says so nowhere; ModelOpt's exports kept whole draft layers so."""
    dialect = read_quantization({"quantization_config": cases.DEEPSEEK_FP8})
    assert dialect
    spec, _ = dialect.apply(describe(cases.TINY))
    _, settled, notes = dialect.settle(spec, headers(spec, r".*\.eh_proj"))
    check(settled, [(r".*\.eh_proj", "bf16"), (".*", "fp8")])
    assert [note.partition(":")[0] for note in notes] == ["draft model.layers.2"]
    _, settled, notes = dialect.settle(spec, headers(spec, r"model\.layers\.2\..*"))
    check(settled, [(r"model\.layers\.2\..*", "bf16"), (".*", "fp8")])
    assert dialect.settle(spec, headers(spec)).notes == ()
    with pytest.raises(CheckpointError, match=r"experts\.3\.up_proj.* is stored unquantised"):
        dialect.settle(spec, headers(spec, r"model\.layers\.2\.mlp\.experts\.3\.up_proj"))


@pytest.mark.parametrize("module", ["model.embed_tokens", "lm_head", "model.layers.1.mlp.gate"])
def test_what_must_be_plain_is_refused_quantised(module: str) -> None:
    dialect = read_quantization({"quantization_config": cases.DEEPSEEK_FP8})
    assert dialect
    spec, _ = dialect.apply(describe(cases.TINY))
    with pytest.raises(UnsupportedError, match=re.escape(module)):
        dialect.settle(spec, {**headers(spec), f"{module}.weight": torch.float8_e4m3fn})


def test_int4_scales_have_the_dtype_that_is_stored() -> None:
    dialect = read_quantization({"quantization_config": cases.KIMI_INT4})
    assert dialect
    spec, _ = dialect.apply(describe(cases.TINY))
    names = [n for n, s in schemes(spec).items() if s.quantized]
    stored = {f"{name}.weight_scale": torch.float16 for name in names}
    _, settled, _ = dialect.settle(spec, stored)
    assert {s.weight.scale_dtype for s in schemes(settled).values() if s.quantized} == {"float16"}
    with pytest.raises(CheckpointError, match=re.escape(names[2])):
        dialect.settle(spec, {**stored, f"{names[2]}.weight_scale": torch.bfloat16})


def test_w4afp8_without_input_scales_is_dynamic() -> None:
    dialect = read_quantization({"quantization_config": {"quant_method": "w4afp8"}})
    assert dialect
    spec, _ = dialect.apply(describe(cases.TINY))
    experts = [n for n, s in schemes(spec).items() if s.weight.name == "int4"]
    older = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    names = [n.replace(last := n.rpartition(".")[2], older[last]) for n in experts]
    stored = {f"{n}.input_scale": torch.float32 for n in names}
    stored |= {f"{n}.weight_scale_inv": torch.bfloat16 for n in experts}
    assert dialect.settle(spec, stored).spec == spec
    dynamic = dialect.settle(spec, {})
    check(dynamic.spec, [(r".*\.experts\..*", "w4afp8"), (".*", "fp8")])
    assert "no expert has an input_scale" in dynamic.notes[0]
    del stored[f"{names[1]}.input_scale"]
    with pytest.raises(CheckpointError, match=rf"{re.escape(names[1])}\.input_scale: is missing"):
        dialect.settle(spec, stored)


def test_tensor_scales_go_by_two_names() -> None:
    dialect = read_quantization({"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}})
    assert dialect
    spec, _ = dialect.apply(describe(cases.TINY))
    name = "model.layers.0.self_attn.o_proj"
    part = cases.parts(spec)[name]
    fields = {s.name.removeprefix(name): s.field for s in dialect.sources(part, name)}
    assert fields == {".weight": "data", ".weight_scale": "scale", ".input_scale": "input_scale"}
    other = dialect.settle(spec, {f"{name}.weight_scale_inv": torch.float32}).dialect
    fields = {s.name.removeprefix(name): s.field for s in other.sources(part, name)}
    assert fields == {".weight": "data", ".weight_scale_inv": "scale", ".activation_scale": "input_scale"}


def test_a_spec_that_is_not_changed_is_the_same() -> None:
    spec = describe(cases.TINY)
    assert change_linears(spec, lambda part, experts: part) is spec
    renamed = change_linears(spec, lambda part, experts: LinearSpec(part.name + "!", part.inputs, part.outputs))
    assert set(schemes(renamed)) == {name + "!" for name in schemes(spec)}


def test_scales_of_the_kv_cache_are_left_aside() -> None:
    """As ModelOpt, compressed-tensors and AutoFP8 name them; nothing else is."""
    dialect = read_quantization({"quantization_config": cases.DEEPSEEK_FP8})
    assert dialect
    pattern = re.compile("|".join(dialect.ignore))
    base = "model.layers.3.self_attn."
    assert all(pattern.fullmatch(base + n) for n in ("k_proj.k_scale", "v_proj.v_scale", "k_scale", "attn.kv_scale"))
    assert not any(pattern.fullmatch(base + n) for n in ("k_proj.weight_scale", "k_proj.input_scale", "q_proj.weight"))
