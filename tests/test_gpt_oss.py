"""What gpt-oss brings beyond its parity cases: routing over the chosen, experts in common tensors, their MXFP4 form.

Letters: T tokens, E experts, I expert width, D hidden size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moesaic.config import EngineConfig
from moesaic.contracts.scheme import SCHEMES
from moesaic.contracts.spec import Activation, FusedExperts, LinearSpec, MoESpec, RouterSpec
from moesaic.engine.launch import Launched, launch
from moesaic.errors import CheckpointError
from moesaic.formats.base import QuantTensor
from moesaic.layers.linear import Together
from moesaic.models.build import spec_of
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.loading import LoadReport, Take, load
from moesaic.models.weights import common_sources, together_slots
from moesaic.moe.layer import MoELayer
from tests.checkpoints import random_model, save
from tests.compare import assert_rows_close
from tests.parity_run import Text, forced_logits

# --- routing ---------------------------------------------------------------------------------------------------------


def route_plainly(logits: list[float], top_k: int, scale: float) -> dict[int, float]:
    """Top-k of the logits, lower ids first where they tie; softmax over those alone."""
    ids = sorted(range(len(logits)), key=lambda e: (-logits[e], e))[:top_k]
    shares = [math.exp(logits[e] - logits[ids[0]]) for e in ids]
    return {e: scale * share / math.fsum(shares) for e, share in zip(ids, shares, strict=True)}


@pytest.mark.parametrize("backend", ["cpu", "cpu_invariant", "reference"])
@pytest.mark.parametrize(("experts", "top_k", "scale"), [(32, 4, 1.0), (128, 4, 1.0), (7, 1, 2.5), (5, 5, 1.0)])
@pytest.mark.parametrize("spread", [0.0, 1.0, 60.0])
@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_routing_over_the_chosen(
    backend: str, experts: int, top_k: int, scale: float, spread: float, tokens: int
) -> None:
    """spread 0: all tie. 60: in the softmax over all, most would be 0 and tie; the choice is by logits."""
    spec = RouterSpec(experts, top_k, "softmax_topk", "w", renormalize=False, scale=scale, logit_bias="b")
    logits_TE = torch.randn(tokens, experts) * spread - 3
    ids_TA, weights_TA = import_module(f"moesaic.kernels.{backend}").route(logits_TE, None, spec)
    assert (ids_TA.dtype, weights_TA.dtype) == (torch.int32, torch.float32)
    assert ids_TA.shape == weights_TA.shape == (tokens, top_k)
    for t in range(tokens):
        expected = route_plainly(logits_TE[t].tolist(), top_k, scale)
        assert ids_TA[t].tolist() == list(expected)
        assert weights_TA[t].tolist() == pytest.approx(list(expected.values()), rel=1e-5, abs=1e-30)


def test_a_row_is_routed_alike_beside_any_others() -> None:
    spec = RouterSpec(32, 4, "softmax_topk", "w", renormalize=False, logit_bias="b")
    logits_TE = torch.randn(300, 32)
    for backend in ("cpu_invariant", "reference"):
        route = import_module(f"moesaic.kernels.{backend}").route
        whole = route(logits_TE, None, spec)
        for start, stop in ((0, 1), (5, 8), (17, 48), (100, 300)):
            part = route(logits_TE[start:stop], None, spec)
            assert all(torch.equal(a[start:stop], b) for a, b in zip(whole, part, strict=True))


# --- experts in common tensors ---------------------------------------------------------------------------------------

EXPERTS, WIDTH, HIDDEN = 5, 3, 4


def layer(*, transposed: bool, interleaved: bool, bias: bool, experts: int = EXPERTS) -> MoESpec:
    gate, up = (LinearSpec(f"m.experts.{{e}}.{name}_proj", HIDDEN, WIDTH, bias) for name in ("gate", "up"))
    biases = ("m.gate_up_bias", "m.down_bias") if bias else None
    return MoESpec(
        RouterSpec(experts, 2, "softmax_topk", "m.router.weight"), gate, up,
        LinearSpec("m.experts.{e}.down_proj", WIDTH, HIDDEN, bias), activation=Activation("swiglu_oai"),
        fused=FusedExperts("m.gate_up", "m.down", biases, transposed, interleaved),
    )  # fmt: skip


def storage(spec: MoESpec, dtype: torch.dtype = torch.float32) -> Together:
    """Filled with NaN, so that what is not written shows."""
    empty, form = torch.empty(0, dtype=dtype), SCHEMES["bf16"].weight
    parts = {"gate": spec.gate, "up": spec.up, "down": spec.down}
    count = (spec.router.experts,)
    weights = {name: QuantTensor.empty(form, (p.outputs,), p.inputs, empty, count) for name, p in parts.items()}
    biases = {name: empty.new_empty(*count, p.outputs) for name, p in parts.items()} if spec.gate.bias else {}
    for each in (*(weight.plain for weight in weights.values()), *biases.values()):
        each.fill_(math.nan)
    return Together(spec, weights, biases)


def tensors_of(spec: MoESpec, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    assert spec.fused is not None
    both, down = (EXPERTS, 2 * WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
    if spec.fused.transposed:
        both, down = (EXPERTS, HIDDEN, 2 * WIDTH), (EXPERTS, WIDTH, HIDDEN)
    shapes: dict[str, tuple[int, ...]] = {"m.gate_up": both, "m.down": down}
    if spec.fused.biases:
        shapes |= {"m.gate_up_bias": (EXPERTS, 2 * WIDTH), "m.down_bias": (EXPERTS, HIDDEN)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def fill(path: Path, stored: dict[str, Tensor], into: Together) -> LoadReport:
    save_file(stored, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "m"}))
    sources = common_sources(into.spec, None)
    assert sources is not None
    with Checkpoint.open(path) as checkpoint:
        return load(checkpoint, together_slots(into, sources), ignore=lambda _: False, progress=False)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_each_number_goes_to_its_place(
    transposed: bool, interleaved: bool, bias: bool, held: torch.dtype, tmp_path: Path
) -> None:
    spec = layer(transposed=transposed, interleaved=interleaved, bias=bias)
    stored, into = tensors_of(spec), storage(spec, held)
    report = fill(tmp_path, stored, into)
    assert report.bytes == sum(each.numel() * 4 for each in stored.values())
    assert report.tensors == len(stored)

    def column(part: int, i: int) -> int:
        return 2 * i + part if interleaved else part * WIDTH + i

    for e in range(EXPERTS):
        both, down = stored["m.gate_up"][e], stored["m.down"][e]
        for i in range(WIDTH):
            for part, name in enumerate(("gate", "up")):
                at = column(part, i)
                row = both[:, at] if transposed else both[at]
                assert torch.equal(into.weights[name].plain[e, i], row.to(held))
                if bias:
                    assert into.biases[name][e, i] == stored["m.gate_up_bias"][e, at].to(held)
            row = down[i] if transposed else down[:, i]
            assert torch.equal(into.weights["down"].plain[e, :, i], row.to(held))
        if bias:
            assert torch.equal(into.biases["down"][e], stored["m.down_bias"][e].to(held))


def test_one_expert_at_a_time_is_read(tmp_path: Path) -> None:
    spec = layer(transposed=True, interleaved=True, bias=True)
    sources = common_sources(spec, None)
    assert sources is not None
    seen: list[tuple[str, int, tuple[int, ...]]] = []

    def spy(slot: Take) -> Take:
        return replace(slot, take=lambda tensor: seen.append((slot.name, int(slot.index or 0), tuple(tensor.shape))))

    stored = tensors_of(spec)
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "m"}))
    with Checkpoint.open(tmp_path) as checkpoint:
        slots = [spy(slot) for slot in together_slots(storage(spec), sources) if isinstance(slot, Take)]
        load(checkpoint, slots, ignore=lambda _: False, progress=False)
    wanted = [(name, e, tuple(each.shape[1:])) for name, each in stored.items() for e in range(EXPERTS)]
    assert sorted(seen) == sorted(wanted)


def broken(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {**tensors, name: change(tensors[name])}


def poisoned(*at: int) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor[at] = math.inf
        return tensor

    return change


HOSTILE: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "not transposed": (broken("m.gate_up", lambda t: t.transpose(1, 2).contiguous()), "m.gate_up: its shape is"),
    "an expert too few": (broken("m.down", lambda t: t[1:].contiguous()), "m.down: its shape is"),
    "flat": (broken("m.down", torch.flatten), "m.down: its shape is"),
    "integers": (broken("m.gate_up_bias", lambda t: t.int()), "m.gate_up_bias: its dtype is int32"),
    "infinite": (broken("m.gate_up", poisoned(4, 1, 5)), r"m.gate_up: the weight at \[4, 1, 5\] is NaN or infinite"),
    "infinite bias": (broken("m.down_bias", poisoned(3, 2)), r"m.down_bias: the weight at \[3, 2\] is NaN or infinite"),
    "missing": (lambda t: {k: v for k, v in t.items() if k != "m.down_bias"}, "lacks 1 tensor: m.down_bias"),
    "one more": (lambda t: {**t, "m.experts.0.gate_proj.weight": torch.zeros(1)}, "no place for 1 tensor"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_common_tensor_that_is_wrong(name: str, tmp_path: Path) -> None:
    change, message = HOSTILE[name]
    spec = layer(transposed=True, interleaved=True, bias=True)
    with pytest.raises(CheckpointError, match=message):
        fill(tmp_path, change(tensors_of(spec)), storage(spec))


def test_a_number_too_large_for_the_dtype(tmp_path: Path) -> None:
    spec = layer(transposed=True, interleaved=True, bias=True)
    stored = tensors_of(spec, torch.float64)
    stored["m.down"][2, 0, 0] = 1e300
    with pytest.raises(CheckpointError, match=r"m\.down: .*too large for float32"):
        fill(tmp_path, stored, storage(spec))


# --- the model -------------------------------------------------------------------------------------------------------

RELEASED: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 200002,
    "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
    "initializer_range": 0.02, "intermediate_size": 2880, "max_position_embeddings": 131072, "model_type": "gpt_oss",
    "layer_types": ["sliding_attention", "full_attention"] * 18, "num_attention_heads": 64, "num_experts_per_tok": 4,
    "num_hidden_layers": 36, "num_key_value_heads": 8, "num_local_experts": 128, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": False},
    "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
    "tie_word_embeddings": False, "transformers_version": "4.55.0.dev0", "use_cache": True, "vocab_size": 201088,
}  # fmt: skip
SMALL = {"num_hidden_layers": 24, "num_local_experts": 32, "layer_types": ["sliding_attention", "full_attention"] * 12}


@pytest.mark.parametrize(("config", "billions"), [(RELEASED, 116.83), (RELEASED | SMALL, 20.91)])
def test_the_released_sizes(config: dict[str, Any], billions: float) -> None:
    """Parameters in all, as the model card (arXiv 2508.10925, table 1) counts them."""
    spec = spec_of(config)
    total = 2 * spec.vocab * spec.hidden + spec.hidden
    for block in spec.layers:
        attention, mlp = block.attention, block.mlp
        assert isinstance(mlp, MoESpec)
        once = (attention.q, attention.k, attention.v, attention.o)  # type: ignore[union-attr]
        routed = (mlp.gate, mlp.up, mlp.down)
        total += sum(part.outputs * (part.inputs + 1) for part in once) + attention.heads + 2 * spec.hidden
        total += mlp.router.experts * (spec.hidden + 1 + sum(part.outputs * (part.inputs + 1) for part in routed))
    assert round(total / 1e9, 2) == billions


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a kind of attention": ({"layer_types": ["linear_attention"] * 36}, "layer_types"),
    "not a text": ({"layer_types": [{}] * 36}, "layer_types"),
    "too few": ({"layer_types": ["full_attention"]}, "layer_types"),
    "no window": ({"sliding_window": None}, "sliding_window"),
    "no rope settings": ({"rope_scaling": None}, "rope_scaling"),
    "heads": ({"num_key_value_heads": 7}, "num_key_value_heads"),
    "too many chosen": ({"num_experts_per_tok": 129}, "num_experts_per_tok"),
    "no clamp": ({"swiglu_limit": 0.0}, "swiglu_limit"),
    "an odd head": ({"head_dim": 63}, "even number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_config_that_cannot_be(name: str) -> None:
    change, message = WRONG[name]
    with pytest.raises(CheckpointError, match=message):
        spec_of(RELEASED | change)


def test_layers_slide_by_turns_where_nothing_is_said() -> None:
    spec = spec_of({key: value for key, value in RELEASED.items() if key != "layer_types"})
    assert spec == spec_of(RELEASED)


# --- MXFP4, as released ----------------------------------------------------------------------------------------------


def packed(model: PreTrainedModel, path: Path) -> Path:
    """Saves the model with random MXFP4 experts, and gives it their values, which `transformers` decodes."""
    save(model, path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    for name, weight in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = weight.shape
            blocks = torch.randint(256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
            scales = torch.randint(121, 124, blocks.shape[:-1], dtype=torch.uint8)
            weight.data.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
            del tensors[name]
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    torch.manual_seed(5)
    model = random_model("gpt_oss", 0, num_hidden_layers=2, num_local_experts=6)
    return model, packed(model, tmp_path_factory.mktemp("mxfp4"))


def start(path: Path, quantization: str | None = None) -> Launched:
    config = EngineConfig(dtype="float32", progress=False, kv_memory=8 << 20, quantization=quantization)
    with Checkpoint.open(path) as checkpoint:
        return launch(checkpoint, config, None)


def experts_of(ours: Launched) -> list[tuple[QuantTensor, QuantTensor]]:
    layers = [block.mlp for block in ours.built.model.blocks]
    assert all(isinstance(each, MoELayer) for each in layers)
    return [(each.experts.weights.w13, each.experts.weights.w2) for each in layers]  # type: ignore[union-attr]


def wanted_experts(model: PreTrainedModel) -> list[tuple[Tensor, Tensor]]:
    """w13 and w2 of each layer in FP32, cut by hand from what `transformers` holds."""
    weights = dict(model.named_parameters())
    found = []
    for i in range(model.config.num_hidden_layers):
        both = weights[f"model.layers.{i}.mlp.experts.gate_up_proj"].detach().transpose(1, 2)
        down = weights[f"model.layers.{i}.mlp.experts.down_proj"].detach().transpose(1, 2)
        found.append((torch.cat([both[:, 0::2], both[:, 1::2]], 1), down))
    return found


@torch.inference_mode()
def test_mxfp4_logits_equal_those_of_the_decoded_model(released: tuple[PreTrainedModel, Path]) -> None:
    model, path = released
    ids = torch.randint(256, (40,)).tolist()
    expected_LV = model(torch.tensor([ids]), use_cache=False).logits[0]
    ours = start(path)
    assert all(w13.form.name == w2.form.name == "mxfp4" for w13, w2 in experts_of(ours))
    logits_LV = forced_logits(ours, [Text(ids[:30], [*ids[30:], 0], expected_LV)], budget=17)[0]
    assert_rows_close(logits_LV, expected_LV, 1e-4)


@pytest.mark.parametrize("scheme", ["bf16", "mxfp8a16"])
def test_mxfp4_held_in_another_scheme(released: tuple[PreTrainedModel, Path], scheme: str) -> None:
    model, path = released
    for (w13, w2), (wide13, wide2) in zip(experts_of(start(path, scheme)), wanted_experts(model), strict=True):
        assert w13.form.name == w2.form.name == SCHEMES[scheme].weight.name
        assert torch.equal(w13.dequantize(), wide13)  # E2M1 with the same exponents fits into E4M3
        assert torch.equal(w2.dequantize(), wide2)


@pytest.mark.parametrize("scheme", ["mxfp8a16", "mxfp4"])
def test_plain_experts_quantised_at_load(scheme: str, tmp_path: Path) -> None:
    model = random_model("gpt_oss", 1, num_hidden_layers=2, num_local_experts=3)
    form = SCHEMES[scheme].weight
    ours = experts_of(start(save(model, tmp_path), scheme))
    for (w13, w2), (wide13, wide2) in zip(ours, wanted_experts(model), strict=True):
        for held, wide in ((w13, wide13), (w2, wide2)):
            assert held.form == form
            assert torch.equal(held.dequantize(), QuantTensor.of(wide, form, held.segments).dequantize())


def test_a_scale_that_is_not_a_number_is_found(released: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    _, path = released
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    tensors[name][4, 7, 0] = 255
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"down_proj_scales"):
        start(tmp_path)
