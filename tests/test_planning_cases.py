"""What went wrong in the field, one named test each (kernels.md, last section): the plan must not be able to do it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moesaic.contracts.contract import Contract
from moesaic.contracts.plan import LayerPlan, MixtureNeed, ModelPlan, PerPhase, Refusal, Wishes
from moesaic.contracts.scheme import SCHEMES, Scheme
from moesaic.contracts.spec import ModelSpec
from moesaic.errors import OptionError
from moesaic.hardware import GPUS
from moesaic.kernels.registry import own as kept
from moesaic.models.build import refused as as_error
from moesaic.models.build import spec_of
from moesaic.models.hold import hold
from moesaic.models.wishes import wish_of
from moesaic.planning.chain import Chain, Parts, build
from moesaic.planning.mixture import find
from moesaic.planning.needs import under
from moesaic.planning.plan import plan
from moesaic.planning.verify import verify
from scripts import plan_fixtures, plan_golden
from tests.planning_product import model
from tests.planning_support import CATALOGUE, HYPOTHETICAL, need, path_of, roles
from tests.small_models import MODELS

TRTLLM = replace(HYPOTHETICAL, experts="flashinfer_trtllm")
QWEN = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "vocab_size": 1000, "num_hidden_layers": 2,
    "max_position_embeddings": 4096, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
    "intermediate_size": 6144,
}  # fmt: skip


def routing_itself(wanted: MixtureNeed, **wishes: str) -> list[str]:
    """The stages with a kernel that routes itself: the twin that is given routing is taken out of the catalogue."""
    own = [c for c in CATALOGUE if c.op != "experts" or c.path.routes]
    path, rejected = find(wanted, own, replace(TRTLLM, **wishes))
    assert path is not None, rejected
    return [f"{stage.role}:{stage.encoding}" for stage in path.stages]


def no_bias(scheme: str) -> MixtureNeed:
    """In-kernel routing reads a BF16 bias; ours is FP32, so these cases route without one."""
    return need(scheme, "b200", router_bias=None)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_logits_reach_a_kernel_that_takes_them_uncast(dtype: str) -> None:
    stages = routing_itself(no_bias("mxfp8"), router_dtype=dtype)
    assert f"gate:{dtype}" in stages
    assert not any(stage.startswith("cast") for stage in stages)


def test_a_kernel_that_takes_bf16_logits_only_gets_exactly_one_cast() -> None:
    stages = routing_itself(no_bias("fp8_tensor"), router_dtype="float32")
    assert [stage for stage in stages if stage.startswith(("gate", "cast"))] == ["gate:float32", "cast:bfloat16"]
    free = routing_itself(no_bias("fp8_tensor"))
    assert [stage for stage in free if stage.startswith(("gate", "cast"))] == ["gate:bfloat16"], "none if it may choose"


def test_an_fp32_bias_never_reaches_a_bf16_argument() -> None:
    own = [c for c in CATALOGUE if c.op != "experts" or c.path.routes]
    path, rejected = find(need("mxfp8", "b200"), own, TRTLLM)
    assert path is None
    assert any("router bias in bfloat16, not float32" in each.reason for each in rejected)
    assert "route" in roles(path_of(need("mxfp8", "b200"), TRTLLM)), "with the bias, we route and hand over the result"


def test_given_routing_gets_scaled_weights_and_in_kernel_routing_scales_itself() -> None:
    given = path_of(need("mxfp8", "b200"), TRTLLM)
    assert "factor" in given.stage("route").does
    assert "factor" not in given.stage("experts").does
    own = [c for c in CATALOGUE if c.op != "experts" or c.path.routes]
    inside, _ = find(no_bias("mxfp8"), own, TRTLLM)
    assert inside is not None
    assert roles(inside)[0] == "gate"
    assert not {"route", "scale", "cast"} & set(roles(inside)), "it is given raw logits"
    assert {"route", "factor"} <= inside.stage("experts").does
    softmax, _ = find(replace(no_bias("mxfp8"), scoring="softmax", groups_kept=0), own, TRTLLM)
    assert softmax is not None
    assert "factor" not in softmax.stage("experts").does, "its softmax routing ignores the factor"
    assert softmax.stage("scale").does == {"factor"}, "so somebody else must apply it"


def test_packed_routing_rounds_the_weights_and_needs_the_users_word() -> None:
    """The expert's number and its weight in BF16 in one integer: where a pair is taken, nobody packs."""
    pair = path_of(need("mxfp8", "b200"), TRTLLM)
    assert "pack" not in roles(pair)
    packed = [c for c in CATALOGUE if c.op != "experts" or c.path.routing == "packed"]
    path, rejected = find(need("mxfp8", "b200"), packed, TRTLLM)
    assert path is None
    assert any("would round the weights of the experts to BF16" in each.reason for each in rejected)
    path, _ = find(need("mxfp8", "b200"), packed, replace(TRTLLM, lossy=True))
    assert path is not None
    assert roles(path)[:3] == ["gate", "route", "pack"]
    assert not path.stage("pack").exact
    assert verify(path, need("mxfp8", "b200"), packed, replace(TRTLLM, lossy=True)) == []
    assert verify(pair, need("mxfp8", "b200"), packed, replace(TRTLLM, lossy=True)), "a pair is not what it takes"


def test_every_owner_is_single_whatever_the_scheme() -> None:
    for scheme in ("bf16", "fp8", "mxfp8", "nvfp4", "w4afp8"):
        for factor in (1.0, 2.5):
            for on in ("h100", "b200", "cpu"):
                path = path_of(need(scheme, on, factor=factor))
                done = [duty for stage in path.stages for duty in stage.does]
                assert len(done) == len(set(done))
                assert ("factor" in done) == (factor != 1.0)


def layers_in(*schemes: str) -> ModelSpec:
    """A model with one mixture layer in each scheme, of DeepSeek-V3's routing."""
    blocks = [model(scheme, 2048, ("sigmoid", True, True)).layers[0] for scheme in schemes]
    return replace(model("bf16", 2048, ("sigmoid", True, True)),
                   layers=tuple(replace(block, index=i) for i, block in enumerate(blocks)))  # fmt: skip


def planned(spec: ModelSpec, on: str, wishes: Wishes, more: tuple[Contract, ...] = ()) -> dict[int, LayerPlan]:
    made = plan(spec, GPUS[on], (*CATALOGUE, *more), wishes)
    assert isinstance(made, ModelPlan), made
    return {index: layer for layer in made.layers for index in layer.layers}


@pytest.mark.parametrize("on", ["h100", "b200"])
def test_unquantised_layers_inside_an_mxfp8_model_scale_exactly_once(on: str) -> None:
    """Whatever kernels the two sorts of layers get, and whoever of them routes inside."""
    spec = layers_in("mxfp8", "bf16", "mxfp8", "bf16")
    for catalogue in (CATALOGUE, tuple(c for c in CATALOGUE if c.op != "experts" or c.path.routes or not c.package)):
        made = plan(spec, GPUS[on], catalogue, HYPOTHETICAL)
        assert isinstance(made, ModelPlan)
        found = {index: layer for layer in made.layers for index in layer.layers}
        assert [found[i].experts.name for i in range(4)] == ["mxfp8", "bf16", "mxfp8", "bf16"]  # type: ignore[union-attr]
        for layer in made.layers:
            for cell in layer.cells:
                owners = [stage.role for stage in cell.path.stages if "factor" in stage.does]
                assert len(owners) == 1, owners


LOW_LATENCY = replace(HYPOTHETICAL, dispatch="deepep_low_latency")
FOR_DECODE = replace(HYPOTHETICAL, ep=8, dispatch=PerPhase("deepep_low_latency", "deepep"))


def test_one_model_sends_fp8_for_w4afp8_and_bf16_for_unquantised_and_weight_only_layers() -> None:
    """Low latency for decoding alone. No kernel that is known takes slots of rows for weight-only layers: one is made
    up here, for there must be something that could be sent wrongly."""
    slotted = next(c for c in CATALOGUE if c.backend == "deep_gemm_masked")
    weight_only = replace(slotted, backend="weight_only", formats=frozenset({"int4"}), encodings=frozenset({"bf16"}))
    found = planned(layers_in("w4afp8_static", "bf16", "wna16"), "h100", FOR_DECODE, (weight_only,))
    sent = {i: {cell.phase: cell.path for cell in layer.cells} for i, layer in found.items()}
    assert [sent[i]["decode"].stage("dispatch").kernel for i in range(3)] == ["deepep_low_latency"] * 3
    assert [sent[i]["prefill"].stage("dispatch").kernel for i in range(3)] == ["deepep"] * 3
    assert [sent[i]["decode"].stage("dispatch").encoding for i in range(3)] == ["fp8_group128", "bf16", "bf16"]
    assert sent[0]["decode"].stage("requantise").encoding == "fp8_tensor"
    assert sent[0]["prefill"].stage("dispatch").encoding == "bf16", "normal mode sends BF16 for it"
    for i in (1, 2):
        assert not {"encode", "requantise", "decode"} & set(roles(sent[i]["decode"]))
        assert all(stage.exact for stage in sent[i]["decode"].stages)


def test_a_low_latency_wire_is_fp8_and_requantised_for_w4afp8() -> None:
    path = path_of(need("w4afp8", ranks=8, width=2048), LOW_LATENCY)
    assert path.stage("dispatch").encoding == "fp8_group128"
    assert path.stage("requantise").encoding == "fp8_tensor"
    assert path.stage("experts").kernel == "cutlass_w4afp8"


@pytest.mark.parametrize("scheme", ["bf16", "wna16", "mxfp8a16"])
def test_the_same_wire_stays_bf16_for_unquantised_and_weight_only_layers(scheme: str) -> None:
    lossless, _ = find(need(scheme, ranks=8), CATALOGUE, LOW_LATENCY)
    if lossless is not None:
        assert lossless.stage("dispatch").encoding == "bf16"
        assert not [stage for stage in lossless.stages if not stage.exact]
    forced, rejected = find(need(scheme, ranks=8), CATALOGUE, replace(LOW_LATENCY, wire="fp8_group128"))
    assert forced is None, "a rounding that the scheme does not ask for needs the user's word"
    assert rejected


def test_the_way_back_of_low_latency_applies_the_weights_once() -> None:
    path = path_of(need("fp8", ranks=8), LOW_LATENCY)
    assert {"weights", "reduce"} <= path.stage("combine").does
    assert not path.stage("experts").does


def test_global_and_local_expert_ids_never_meet() -> None:
    """all_gather leaves global ids: a kernel that takes local ones gets an adapter, trtllm (global) gets none."""
    gather = replace(HYPOTHETICAL, dispatch="all_gather")
    takes_global = path_of(need("mxfp8", "b200", ranks=8), replace(gather, experts="flashinfer_trtllm"))
    assert "localise" not in roles(takes_global)
    for kernel in [c for c in CATALOGUE if c.op == "experts" and c.path.layout == "tokens" and c.path.ids == "local"]:
        wanted = need(on="h100", ranks=8)
        path, _ = find(wanted, CATALOGUE, replace(gather, experts=kernel.backend))
        assert path is None or "localise" in roles(path)
    ep = replace(HYPOTHETICAL, dispatch="all_to_all", experts="flashinfer_trtllm")
    path, rejected = find(need("mxfp8", "b200", ranks=8), CATALOGUE, ep)
    assert path is None
    assert any("local expert ids" in each.reason for each in rejected)


def test_a_bf16_draft_beside_an_nvfp4_target_keeps_bf16() -> None:
    """The released R1 in NVFP4, whose draft layer is stored in BF16: experts and wire are planned per layer."""
    spec = plan_golden.spec_of(plan_fixtures.read("deepseek-r1-nvfp4"))
    found = planned(spec, "b200", replace(HYPOTHETICAL, tp=8, ep=8))
    target, draft = found[60], found[61]
    assert [each.experts and each.experts.weight.name for each in (target, draft)] == ["nvfp4", "bf16"]
    for cell in target.cells:
        assert cell.path.stage("dispatch").encoding == "nvfp4"
    for cell in draft.cells:
        assert cell.path.stage("dispatch").encoding == "bf16"
        assert cell.path.stage("experts").encoding == "bf16"
        assert "encode" not in roles(cell.path)


def test_a_fused_shared_expert_weighs_one_or_one_over_the_factor() -> None:
    """One where the factor is in the weights, 1/factor where it is applied to the sum."""
    base = [c for c in CATALOGUE if c.op != "experts"]
    fusing = next(c for c in CATALOGUE if c.op == "experts" and c.backend == "reference")
    fusing = replace(fusing, path=replace(fusing.path, can=frozenset({"shared"})))
    routers = [c for c in base if c.op == "route"]
    late = [replace(c, path=replace(c.path, does=frozenset({"route"}))) for c in routers]
    rest = [c for c in base if c.op != "route"]
    for chosen, weight in ((routers, 1.0), (late, 1 / 2.5)):
        free, _ = find(need(on="cpu"), [*rest, *chosen, fusing], HYPOTHETICAL)
        assert free is not None
        assert free.shared_weight is None, "a kernel that can, and need not"
        parts = Parts(fusing, local(), "bf16", "float32", True, chosen[0], None)
        taken = build(Chain(need(on="cpu"), HYPOTHETICAL), parts)
        always = replace(fusing, path=replace(fusing.path, does=fusing.path.does | {"shared"}))
        forced, _ = find(need(on="cpu"), [*rest, *chosen, always], HYPOTHETICAL)
        for path in (taken, forced):
            assert path is not None
            assert "shared" in path.stage("experts").does
            assert path.shared_weight == weight
            assert ("factor" in path.stage("route").does) == (weight == 1.0)


def local() -> Contract:
    return next(c for c in CATALOGUE if c.op == "dispatch" and c.backend == "local")


def test_flashinfer_trtllm_on_an_h100_is_an_error_that_names_what_works() -> None:
    wishes = replace(HYPOTHETICAL, experts="flashinfer_trtllm")
    made = plan(spec_of(QWEN), GPUS["h100"], CATALOGUE, wishes)
    assert isinstance(made, Refusal)
    error = as_error(made, wishes)
    assert isinstance(error, OptionError)
    assert "compute capability 100 to 103, not 90" in str(error)
    assert "Works here: --experts" in str(error)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("name", ["heads with norms", "latent"])
def test_a_gpu_alone_has_a_deterministic_plan_for_every_scheme_that_can_have_one(name: str, scheme: Scheme) -> None:
    """Of our own kernels: packages may be missing."""
    spec = spec_of(MODELS[name]) if not scheme.quantized else hold(spec_of(MODELS[name]), scheme)
    own = [each for each in CATALOGUE if each.backend.startswith("triton") or each.op == "dispatch"]
    made = plan(spec, GPUS["h100"], own, Wishes(deterministic=True))
    if not scheme.activation.by_row:
        assert isinstance(made, Refusal)
        assert "--deterministic forbids" in made.what
        return
    assert isinstance(made, ModelPlan), made
    assert {cell.path.stage("experts").kernel for layer in made.layers for cell in layer.cells} == {"triton_invariant"}


def test_deterministic_experts_are_of_one_kernel() -> None:
    """A row that decodes beside a prompt takes the prompt's kernel: two that add up differently would tell."""
    usual = plan(spec_of(QWEN), GPUS["h100"], CATALOGUE, Wishes(deterministic=True))
    assert isinstance(usual, ModelPlan), usual
    assert len({cell.path.stage("experts").kernel for layer in usual.layers for cell in layer.cells}) == 1
    for asked in ("decode=triton_invariant", "decode=triton_invariant,prefill=hopper_invariant"):
        made = plan(spec_of(QWEN), GPUS["h100"], CATALOGUE,
                    Wishes(deterministic=True, experts=wish_of(asked, "--experts")))  # fmt: skip
        assert isinstance(made, Refusal)
        assert "--deterministic forbids" in made.what
        assert made.nearest == "--experts triton_invariant"
    alone = plan(spec_of(QWEN), GPUS["h100"], CATALOGUE, Wishes(deterministic=True, experts="triton_invariant"))
    assert isinstance(alone, ModelPlan)


def test_dense_products_that_are_asked_for_come_with_their_fused_form() -> None:
    """DeepGEMM has none: parts that it does not make are not left to another one."""
    spec = hold(spec_of(QWEN), SCHEMES["fp8"])
    for asked, fused in ((None, "hopper"), ("triton", "triton"), ("hopper", "hopper"), ("deep_gemm", None)):
        made = plan(spec, GPUS["h100"], CATALOGUE, Wishes(linear=asked))
        assert isinstance(made, ModelPlan), made
        scheme = next(each.scheme for each in made.layers[0].linears if each.scheme.name == "fp8")
        chosen = kept({choice.op: choice.chosen for choice in made.ops[under(made.base, scheme)]})
        assert chosen["linear_quant"] == (asked or "hopper")
        assert chosen.get("linear_terms") == fused
        plain = next(choice.chosen for choice in made.ops[made.base] if choice.op == "linear")
        assert plain == (fused or "hopper"), "DeepGEMM has none of these either"


def test_attention_that_is_asked_for_comes_with_its_fused_forms() -> None:
    for asked in (None, "triton"):
        made = plan(spec_of(QWEN), GPUS["h100"], CATALOGUE, Wishes(attention=asked))
        assert isinstance(made, ModelPlan), made
        chosen = kept({choice.op: choice.chosen for choice in made.ops[made.base]})
        assert chosen["attend_paged"] == chosen["attend_encode"] == (asked or "hopper")
