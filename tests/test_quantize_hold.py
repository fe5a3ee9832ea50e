"""Which projections are quantised: lists written by hand for small models, and every refusal."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from moesaic import LLM
from moesaic.contracts.scheme import SCHEMES, UNQUANTIZED, Scheme
from moesaic.contracts.spec import ModelSpec
from moesaic.errors import OptionError, UnsupportedError
from moesaic.formats.dialects.modules import change_linears, linears
from moesaic.models.build import spec_of
from moesaic.models.hold import dynamic, hold, hold_online
from tests.cli_support import call
from tests.cli_support import config as mixtral_config

V3: dict[str, Any] = {
    "model_type": "deepseek_v3", "vocab_size": 64, "hidden_size": 128, "intermediate_size": 160,
    "moe_intermediate_size": 64, "num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 2,
    "num_nextn_predict_layers": 1, "q_lora_rank": 96, "kv_lora_rank": 64, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32, "v_head_dim": 32, "num_key_value_heads": 2, "n_routed_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
}  # fmt: skip
ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")
DENSE = {f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")}
EXPERTS = {f"model.layers.{i}.mlp.experts.{{e}}.{part}_proj" for i in (1, 2) for part in ("gate", "up", "down")}
SHARED = {f"model.layers.{i}.mlp.shared_experts.{part}_proj" for i in (1, 2) for part in ("gate", "up", "down")}
ALL = {f"model.layers.{i}.self_attn.{name}" for i in (0, 1, 2) for name in ATTENTION} | DENSE | EXPERTS | SHARED
"""Layer 2 is the draft's."""


def held(spec: ModelSpec) -> dict[str, Scheme]:
    return {part.name: part.runs for part, _ in linears(spec) if part.runs.quantized}


def test_all_projections_of_layers_and_drafts_but_kv_b_and_the_join() -> None:
    spec = hold(spec_of(V3), SCHEMES["mxfp8"])
    assert held(spec) == dict.fromkeys(ALL, SCHEMES["mxfp8"])
    left = {part.name for part, _ in linears(spec)} - ALL
    assert left == {f"model.layers.{i}.self_attn.kv_b_proj" for i in (0, 1, 2)} | {"model.layers.2.eh_proj"}
    assert spec.notes == ()


def test_experts_only() -> None:
    assert set(held(hold(spec_of(V3), SCHEMES["mxfp8"], experts_only=True))) == EXPERTS


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (["*.o_proj"], "*.o_proj"),
        (["model.layers.1.*"], "model.layers.1.*"),
        (["model.layers.2.*"], "model.layers.2.*"),
        (["model.layers.0.self_attn.q_?_proj", "*shared_experts*"], "*layers.0.self_attn.q_[ab]_proj|*shared_experts*"),
        (["*experts.*.down_proj"], "*.mlp.experts.*"),  # gate and up stay with it
        (["lm_head", "*.kv_b_proj", "*.mlp.gate", "*embed*", "*.eh_proj"], "-"),  # they stay anyway
    ],
)  # fmt: skip
def test_keep(keep: list[str], kept: str) -> None:
    spec = hold(spec_of(V3), SCHEMES["mxfp8"], keep)
    assert set(held(spec)) == {name for name in ALL if not any(fnmatch.fnmatch(name, p) for p in kept.split("|"))}


@pytest.mark.parametrize(
    ("keep", "what"),
    [
        (["*.experts.3.*"], "matches 1 of the 4 experts"),
        (["*.experts.[12].up_proj"], "matches 2 of the 4 experts"),
        (["*.q_proj"], "'*.q_proj' matches no module"),
        (["*.o_proj", "model.layers.9.*"], "'model.layers.9.*' matches no module"),
        (["*"], "leaves nothing to quantise"),
    ],
)
def test_a_pattern_that_cannot_be_followed_is_refused(keep: Sequence[str], what: str) -> None:
    with pytest.raises((OptionError, UnsupportedError)) as error:
        hold(spec_of(V3), SCHEMES["mxfp8"], keep)
    assert what in error.value.what
    assert error.value.remedy


def test_experts_only_of_a_model_without_experts() -> None:
    dense = spec_of(V3 | {"first_k_dense_replace": 2, "num_nextn_predict_layers": 0})
    with pytest.raises(OptionError, match="no experts"):
        hold(dense, SCHEMES["mxfp8"], experts_only=True)


def test_a_width_that_blocks_do_not_divide_stays_and_is_told() -> None:
    """INT4 in groups of 128: of this model's widths 128 is divided, 64, 96 and 160 are not."""
    spec = hold(spec_of(V3), SCHEMES["wna16"])
    inputs = {part.name: part.inputs for part, _ in linears(spec)}
    narrow = {name for name in ALL if inputs[name] % 128}
    assert narrow == {name for name in ALL if name.endswith(("q_b_proj", "o_proj", "down_proj"))}
    assert set(held(spec)) == ALL - narrow - EXPERTS, "an expert's three projections are one weight"
    (note,) = spec.notes
    assert "int4_g128 do not divide" in note
    assert "model.layers.0.self_attn.q_b_proj" in note
    assert " and 8 more (an expert's projections stay together)" in note, "3 q_b, 3 o, 5 down"
    with pytest.raises(UnsupportedError, match="nothing to quantise"):
        hold(spec_of(V3), SCHEMES["wna16"], experts_only=True)


def test_blocks_of_rows_and_columns_may_be_ragged() -> None:
    assert set(held(hold(spec_of(V3), SCHEMES["fp8"]))) == ALL


def test_w4afp8_means_experts_and_fp8_for_the_rest() -> None:
    wide = spec_of(V3 | {"moe_intermediate_size": 128})
    found = held(hold(wide, SCHEMES["w4afp8"]))
    assert {name for name, scheme in found.items() if scheme == SCHEMES["w4afp8"]} == EXPERTS
    assert {name for name, scheme in found.items() if scheme == SCHEMES["fp8"]} == ALL - EXPERTS


def stored_as(spec: ModelSpec, scheme: Scheme) -> ModelSpec:
    found: ModelSpec = change_linears(spec, lambda part, _: replace(part, scheme=scheme))
    return found


def test_what_was_stored_quantised_is_quantised_anew_or_decoded() -> None:
    fp8 = stored_as(spec_of(V3), SCHEMES["fp8"])
    spec = hold(fp8, SCHEMES["mxfp8"], ["*.o_proj"])
    assert {part.runs for part, _ in linears(spec) if part.name.endswith("o_proj")} == {UNQUANTIZED}
    assert {part.runs for part, _ in linears(spec) if "kv_b" in part.name or "eh_proj" in part.name} == {UNQUANTIZED}
    assert set(held(spec)) == {name for name in ALL if not name.endswith("o_proj")}
    assert spec.notes == ("stored as fp8_block and quantised anew as mxfp8: both errors add up",)
    decoded = hold(fp8, UNQUANTIZED)
    assert held(decoded) == {}
    assert decoded.notes == ()


def test_what_is_stored_in_the_scheme_is_left_alone() -> None:
    spec = hold(stored_as(spec_of(V3), SCHEMES["mxfp8"]), SCHEMES["mxfp8"])
    assert all(part.held is None for part, _ in linears(spec) if part.name in ALL)
    assert spec.notes == ()
    assert hold_online(spec_of(V3), None) == hold_online(spec_of(V3), "none") == spec_of(V3)


@pytest.mark.parametrize(
    ("static", "runs"),
    [("nvfp4", "nvfp4_dynamic"), ("fp8_tensor_static", "fp8_tensor"), ("w4afp8_static", "w4afp8")],
)
def test_online_a_static_scheme_runs_as_its_dynamic_variant_and_says_so(static: str, runs: str) -> None:
    assert dynamic(SCHEMES[static]) == SCHEMES[runs]
    spec = hold_online(spec_of(V3 | {"moe_intermediate_size": 128}), static)
    assert SCHEMES[runs] in held(spec).values()
    assert not any(scheme.activation.static for scheme in held(spec).values())
    assert f"runs as {runs}" in spec.notes[0]
    assert "moesaic quantize --calibrate" in spec.notes[0]


@pytest.mark.parametrize("name", [n for n, scheme in SCHEMES.items() if not scheme.activation.static])
def test_a_dynamic_scheme_is_its_own(name: str) -> None:
    assert dynamic(SCHEMES[name]) == SCHEMES[name]


def test_an_unknown_scheme_lists_those_there_are() -> None:
    with pytest.raises(OptionError) as error:
        LLM(quantization="int3", progress=False)
    assert error.value.where == "--quantization"
    assert all(name in str(error.value.remedy) for name in SCHEMES)
    for command in (("generate", "--prompt", "x", "--quantization"), ("quantize", "a", "b", "--scheme")):
        done = call(*command, "int3")
        assert done.code == 2
        assert "int3" in done.error
        assert all(name in done.error for name in SCHEMES)


def test_other_attention_and_experts_too() -> None:
    spec = hold(spec_of(mixtral_config(hidden_size=32, intermediate_size=64)), SCHEMES["mxfp4"])
    names = {f"self_attn.{part}_proj" for part in "qkvo"} | {f"block_sparse_moe.experts.{{e}}.w{i}" for i in (1, 2, 3)}
    assert set(held(spec)) == {f"model.layers.{i}.{name}" for i in (0, 1) for name in names}
