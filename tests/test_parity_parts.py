"""Parts at the sizes of released models, which the tiny models cannot have: routers and rotary frequencies.

Letters: T tokens, D hidden size, E experts, A experts per token.
"""

from __future__ import annotations

from copy import deepcopy
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moesaic.errors import CheckpointError
from moesaic.layers.rope import frequencies
from moesaic.models.build import spec_of
from moesaic.models.fields import Fields, read_rope
from tests.compare import assert_rows_close
from tests.parity_cases import BIASES
from tests.parity_run import set_biases

V3_SIZES = {"n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "hidden_size": 64}
GLM_SIZES = {
    "n_routed_experts": 160, "num_experts_per_tok": 8, "routed_scaling_factor": 2.5, "hidden_size": 64, "head_dim": 8,
}  # fmt: skip
V2_SIZES = {"n_routed_experts": 160, "num_experts_per_tok": 6, "n_group": 8, "topk_group": 3, "hidden_size": 64}
ROUTERS: dict[str, tuple[str, type[torch.nn.Module], dict[str, Any]]] = {
    "v3": ("deepseek_v3", DeepseekV3TopkRouter, V3_SIZES),
    "kimi": ("deepseek_v3", DeepseekV3TopkRouter, {
        **V3_SIZES, "n_routed_experts": 384, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827}),
    "glm": ("glm4_moe", Glm4MoeTopkRouter, GLM_SIZES),
    "glm in groups": ("glm4_moe", Glm4MoeTopkRouter, {
        **GLM_SIZES, "n_group": 8, "topk_group": 4, "norm_topk_prob": False}),
    "v3 not renormalised": ("deepseek_v3", DeepseekV3TopkRouter, {**V3_SIZES, "norm_topk_prob": False}),
    "v2": ("deepseek_v2", DeepseekV2TopkRouter, {
        **V2_SIZES, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0}),
    "v2 lite": ("deepseek_v2", DeepseekV2TopkRouter, {**V2_SIZES, "n_routed_experts": 64, "topk_method": "greedy"}),
    "qwen3": ("qwen3_moe", Qwen3MoeTopKRouter, {
        "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "hidden_size": 64}),
    "gpt-oss": ("gpt_oss", GptOssTopKRouter, {
        "num_local_experts": 128, "num_experts_per_tok": 4, "num_hidden_layers": 2, "hidden_size": 64}),
    "mixtral": ("mixtral", MixtralTopKRouter, {"num_local_experts": 8, "num_experts_per_tok": 2, "hidden_size": 64}),
}  # fmt: skip
WITH_BIAS = ("deepseek_v3", "glm4_moe")
BIASED = [(name, bias) for name in ROUTERS for bias in BIASES if bias == "small" or ROUTERS[name][0] in WITH_BIAS]


@pytest.mark.parametrize(("name", "bias"), BIASED)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@torch.inference_mode()
def test_routers(name: str, bias: str, backend: str) -> None:
    kind, router, sizes = ROUTERS[name]
    config = AutoConfig.for_model(kind, **sizes)
    gate = router(config)
    gate.weight.copy_(torch.randn_like(gate.weight) * 0.25)
    if kind == "gpt_oss":
        gate.bias.copy_(torch.randn_like(gate.bias))  # its logits hold it
    bias_E = getattr(gate, "e_score_correction_bias", None)
    if bias_E is not None:
        bias_E.copy_(0.1 * torch.randn(len(bias_E)))
        set_biases(torch.nn.ModuleDict({"gate": gate}), bias)
    x_TD = torch.randn(257, config.hidden_size)
    logits_TE, weights_TA, ids_TA = gate(x_TD)
    spec = next(layer.mlp.router for layer in spec_of(config.to_dict()).layers if hasattr(layer.mlp, "router"))
    ops = import_module(f"moesaic.kernels.{backend}")
    our_ids_TA, our_weights_TA = ops.route(logits_TE, bias_E, spec)
    ours_TE = torch.zeros_like(logits_TE).scatter_(1, our_ids_TA.long(), our_weights_TA)
    assert_rows_close(ours_TE, torch.zeros_like(logits_TE).scatter_(1, ids_TA, weights_TA), 1e-6, name)


YARN = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
ROPES: list[tuple[int, int, dict[str, Any]]] = [
    (64, 163840, {**YARN, "rope_theta": 10000.0, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_slow": 2}),
    (64, 163840, {**YARN, "rope_theta": 10000.0, "mscale": 0.707, "mscale_all_dim": 0.5}),
    (64, 262144, {**YARN, "rope_theta": 50000.0, "factor": 64.0, "mscale": 1.0, "mscale_all_dim": 1.0}),
    (64, 131072, {**YARN, "rope_theta": 5e4, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 1.0,
        "beta_slow": 1.0}),
    (128, 131072, {**YARN, "rope_theta": 1e6, "partial_rotary_factor": 0.5}),
    (128, 131072, {**YARN, "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}),
    (128, 131072, {**YARN, "rope_theta": 1e6, "attention_factor": 0.8, "truncate": False, "beta_fast": 8.0}),
    (64, 131072, {**YARN, "rope_theta": 150000.0, "factor": 32.0, "truncate": False}),
    (128, 32768, {"rope_type": "default", "rope_theta": 1e6}),
    (128, 32768, {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}),
]  # fmt: skip


@pytest.mark.parametrize(("dim", "length", "rope"), ROPES)
def test_rotary_frequencies(dim: int, length: int, rope: dict[str, Any]) -> None:
    config = AutoConfig.for_model(
        "mixtral", head_dim=dim, hidden_size=4 * dim, num_attention_heads=4, max_position_embeddings=length,
        rope_parameters=dict(rope),
    )  # fmt: skip
    spec = read_rope(Fields(config.to_dict()), dim, interleaved=False)
    if rope["rope_type"] == "default":
        wanted = rope["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        factor = 1.0
    else:
        wanted, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    torch.testing.assert_close(frequencies(spec).double(), wanted.double(), rtol=1e-6, atol=0)
    assert (spec.yarn or SimpleNamespace(attention_factor=1.0)).attention_factor == pytest.approx(factor, rel=1e-12)


FULL: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"num_hidden_layers": 4},
    "deepseek_v2": {"num_hidden_layers": 3, "num_experts_per_tok": 6},
    "kimi_k2": {"num_hidden_layers": 4},
    "glm4_moe": {"num_hidden_layers": 3},
    "qwen3_moe": {"num_hidden_layers": 3},
    "mixtral": {"num_hidden_layers": 3},
    "gpt_oss": {"num_hidden_layers": 3},
}
# Without its eos our engine asks the tokenizer. Where one of the others is wrong, names or shapes of tensors differ,
# and loading fails.
NOT_ASKED = {
    "model_type", "transformers_version", "eos_token_id", "n_shared_experts", "q_lora_rank", "num_key_value_heads",
    "first_k_dense_replace", "num_nextn_predict_layers",
}  # fmt: skip


@pytest.mark.parametrize("kind", FULL)
def test_a_field_that_is_missing_means_what_transformers_takes_it_to_mean(kind: str) -> None:
    """Or it is an error. A default of one's own would compute something else in silence."""
    full = AutoConfig.for_model(kind, **FULL[kind]).to_dict()
    wrong = []
    for name in sorted(set(full) - NOT_ASKED):
        short = {key: value for key, value in full.items() if key != name}
        try:
            ours = spec_of(short)
        except CheckpointError:
            continue
        meant = AutoConfig.for_model(**deepcopy(short)).to_dict()  # it writes into its arguments
        if ours != spec_of(meant):
            wrong.append(name)
    assert not wrong, wrong


ORIGINAL = {"factor": 4.0, "original_max_position_embeddings": 8192}
SPELLINGS: dict[str, dict[str, Any]] = {
    "theta alone": {"rope_theta": 5e5},
    "nothing": {},
    "an integer theta": {"rope_theta": 500000},
    "theta outside": {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}},
    "theta in two places": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", "rope_theta": 3e5, **ORIGINAL}},
    "null and empty": {"rope_theta": 5e5, "rope_scaling": {}},
    "null beside new": {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 7e4}},
    "no original length": {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 4.0}},
    "two names of the type": {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "rope_type": "yarn", **ORIGINAL}},
    "an extension added to a new config": {
        "rope_scaling": {"type": "yarn", "rope_theta": 5e5, **ORIGINAL},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "a part": {"rope_theta": 5e5, "partial_rotary_factor": 0.25},
    "a part inside": {"rope_parameters": {"rope_type": "default", "rope_theta": 7e4, "partial_rotary_factor": 0.25}},
    "a part in two places": {
        "partial_rotary_factor": 0.25,
        "rope_parameters": {"rope_type": "default", "rope_theta": 7e4, "partial_rotary_factor": 0.75}},
    "a part beside an extension": {
        "rope_theta": 5e5, "partial_rotary_factor": 0.25, "rope_scaling": {"rope_type": "yarn", **ORIGINAL}},
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("kind", ["qwen3_moe", "glm4_moe", "gpt_oss"])
def test_rope_settings_mean_what_transformers_takes_them_to_mean(kind: str, name: str) -> None:
    """However a config.json spells them; or they are an error."""
    config = AutoConfig.for_model(kind, num_hidden_layers=1).to_dict()
    del config["rope_parameters"]
    config |= SPELLINGS[name]
    meant = AutoConfig.for_model(**deepcopy(config)).to_dict()
    try:
        ours = spec_of(config)
    except CheckpointError:
        return
    assert ours.ropes == spec_of(meant).ropes
