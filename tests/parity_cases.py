"""The configurations whose logits must equal those of `transformers`; together they turn every switch.

A case is data: what differs from the tiny defaults of `checkpoints.py`, and how the checkpoint is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BIASES = ("small", "negative", "swallow")


@dataclass(frozen=True)
class Case:
    """name: unique.  model_type, config: what `checkpoints.random_model` takes.

    bias: of expert selection. `small` is of the size of the score differences; `negative` is far below zero, so that
    masking a group with 0 instead of -inf would choose from it; `swallow` is so large that it alone decides.
    stored: dtype of the file.  shard: maximum size of a file.  old: extra fields of a config.json in the spelling of
    transformers 4.  drafts: MTP layers saved.  seed: of the weights; chosen so that the
    greedy text is varied, and that it and the expert choices are decided by more than an FP32 rounding.
    """

    name: str
    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    bias: str = "small"
    stored: str = "float32"
    shard: str = "1GB"
    old: Mapping[str, Any] | None = None
    drafts: int = 0
    seed: int = 0

    def __str__(self) -> str:
        return self.name


def yarn(**fields: Any) -> dict[str, Any]:
    """A YaRN extension from 64 positions: the tests reach positions on both sides of that."""
    return {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64, **fields}


LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
GROUPS = {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2}
# Fields of released configs that say what is so anyway, or nothing about the computation.
RELEASED_V3 = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "ep_size": 1, "seq_aux": True}
RELEASED_V2 = {"scoring_func": "softmax", "moe_layer_freq": 1, "seq_aux": True, "norm_topk_prob": False}

V3 = [
    Case("v3 plain", "deepseek_v3", {
        "q_lora_rank": None, "first_k_dense_replace": 0, "routed_scaling_factor": 1.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, seed=1),
    Case("v3 as released", "deepseek_v3", {
        **GROUPS, "q_lora_rank": 24, "num_nextn_predict_layers": 1,
        "rope_parameters": yarn(mscale=1.0, mscale_all_dim=1.0, beta_fast=32, beta_slow=1)},
        stored="bfloat16", shard="100KB", old=RELEASED_V3, drafts=1, seed=1),
    Case("v3 two mscales, two shared", "deepseek_v3", {
        "q_lora_rank": 24, "first_k_dense_replace": 2, "n_shared_experts": 2, "norm_topk_prob": False,
        "rope_parameters": yarn(mscale=0.707, mscale_all_dim=1.3)}),
    Case("v3 attention factor, half rope, biases, tied", "deepseek_v3", {
        "q_lora_rank": 24, "rope_interleave": False, "attention_bias": True, "tie_word_embeddings": True,
        "rope_parameters": yarn(attention_factor=1.3)}, seed=3),
    Case("v3 negative bias", "deepseek_v3", {**GROUPS, "q_lora_rank": None}, bias="negative", seed=2),
    Case("v3 swallowing bias", "deepseek_v3", {
        **GROUPS, "q_lora_rank": 24, "topk_group": 3, "routed_scaling_factor": 1.0}, bias="swallow", seed=1),
    Case("v3 half rope, biases without q-LoRA", "deepseek_v3", {
        "q_lora_rank": None, "rope_interleave": False, "attention_bias": True, "norm_topk_prob": False,
        "routed_scaling_factor": 1.0, "n_shared_experts": 2}),
    Case("v3 yarn without mscale", "deepseek_v3", {
        "q_lora_rank": 24, "rope_parameters": yarn(beta_fast=4.0, beta_slow=0.5, truncate=False)}, seed=1),
    Case("v3 yarn with mscale_all_dim alone", "deepseek_v3", {
        "q_lora_rank": None, "num_nextn_predict_layers": 1, "rope_parameters": yarn(mscale_all_dim=0.8)},
        old={}),
    Case("v3 every group kept", "deepseek_v3", {
        **GROUPS, "topk_group": 4, "q_lora_rank": 24, "n_shared_experts": 1, "num_hidden_layers": 4,
        "num_nextn_predict_layers": 2}, drafts=2, stored="bfloat16"),
]  # fmt: skip

V2 = [
    Case("v2 lite as released", "deepseek_v2", {
        "q_lora_rank": None, "n_shared_experts": 2, "topk_method": "greedy",
        "rope_parameters": yarn(mscale=0.707, mscale_all_dim=0.707)},
        stored="bfloat16", old={**RELEASED_V2, "n_group": 1, "topk_group": 1}),
    Case("v2 as released", "deepseek_v2", {
        **GROUPS, "q_lora_rank": 24, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0,
        "rope_parameters": yarn(mscale=0.707, mscale_all_dim=0.707)}, stored="bfloat16", old=RELEASED_V2),
    Case("v2 greedy, biases, tied", "deepseek_v2", {
        "q_lora_rank": 24, "topk_method": "greedy", "attention_bias": True, "tie_word_embeddings": True,
        "first_k_dense_replace": 0, "n_shared_experts": 1, "routed_scaling_factor": 2.5}, seed=4),
    Case("v2 groups without q-LoRA", "deepseek_v2", {
        **GROUPS, "topk_group": 3, "q_lora_rank": None, "topk_method": "group_limited_greedy", "n_shared_experts": 1,
        "first_k_dense_replace": 2, "rope_parameters": yarn(attention_factor=0.9)}),
]  # fmt: skip

KIMI = [
    Case("kimi as released", "kimi_k2", {
        "q_lora_rank": 24, "n_routed_experts": 16, "num_experts_per_tok": 4, "routed_scaling_factor": 2.827,
        "n_shared_experts": 1,
        "rope_parameters": yarn(rope_theta=50000.0, mscale=1.0, mscale_all_dim=1.0, beta_fast=1.0, beta_slow=1.0)},
        stored="bfloat16", shard="100KB", old={**RELEASED_V3, "pretraining_tp": 1, "aux_loss_alpha": 0.001}),
    Case("kimi thinking, biases that choose", "kimi_k2", {
        "q_lora_rank": 24, "n_routed_experts": 16, "num_experts_per_tok": 4, "routed_scaling_factor": 2.827,
        "n_shared_experts": 1, "rms_norm_eps": 1e-5, "num_hidden_layers": 4,
        "rope_parameters": yarn(rope_theta=50000.0, mscale=1.0, mscale_all_dim=1.0)}, bias="swallow"),
]  # fmt: skip

GLM4 = [
    Case("glm as released", "glm4_moe", {
        "use_qk_norm": True, "attention_bias": True, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}},
        stored="bfloat16", shard="100KB", old={}, drafts=1),
    Case("glm air as released", "glm4_moe", {
        "use_qk_norm": False, "attention_bias": True, "num_key_value_heads": 1, "num_experts_per_tok": 3,
        "num_nextn_predict_layers": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}},
        stored="bfloat16", old={}, seed=1),
    Case("glm groups, two shared, tied", "glm4_moe", {
        **GROUPS, "first_k_dense_replace": 2, "n_shared_experts": 2, "norm_topk_prob": False, "use_qk_norm": True,
        "tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 16}, seed=7),
    Case("glm negative bias, whole rope", "glm4_moe", {
        **GROUPS, "topk_group": 3, "first_k_dense_replace": 0, "routed_scaling_factor": 2.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
        bias="negative"),
    Case("glm swallowing bias, quarter rope with yarn", "glm4_moe", {
        **GROUPS, "head_dim": 32, "use_qk_norm": True, "rope_parameters": yarn(partial_rotary_factor=0.25)},
        bias="swallow"),
    Case("glm default part, linear rope, two drafts", "glm4_moe", {
        "use_qk_norm": True, "num_hidden_layers": 4, "num_nextn_predict_layers": 2,
        "rope_parameters": dict(LINEAR)},  # transformers writes into it
        drafts=2, seed=1),
]  # fmt: skip

QWEN3 = [
    Case("qwen3 renormalised", "qwen3_moe", {"norm_topk_prob": True}, stored="bfloat16"),
    Case("qwen3 multi-query, dense layer, tied", "qwen3_moe", {
        "norm_topk_prob": False, "num_key_value_heads": 1, "mlp_only_layers": [1], "tie_word_embeddings": True},
        seed=1),
    Case("qwen3 every second layer, biases", "qwen3_moe", {
        "norm_topk_prob": True, "num_key_value_heads": 4, "num_hidden_layers": 4, "decoder_sparse_step": 2,
        "attention_bias": True, "head_dim": 16}),
    Case("qwen3 sliding window", "qwen3_moe", {
        "norm_topk_prob": True, "use_sliding_window": True, "sliding_window": 16, "head_dim": 40}, seed=1),
    Case("qwen3 as released, yarn", "qwen3_moe", {
        "norm_topk_prob": True, "num_experts_per_tok": 3, "mlp_only_layers": [],
        "rope_parameters": yarn(rope_theta=1000000.0)}, stored="bfloat16", shard="100KB",
        old={"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 3}, seed=1),
]  # fmt: skip

MIXTRAL = [
    Case("mixtral as released", "mixtral", {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
        stored="bfloat16", old={"sliding_window": None, "router_jitter_noise": 0.0}),
    Case("mixtral sliding window", "mixtral", {"sliding_window": 16, "head_dim": 24}, seed=1),
    Case("mixtral window of 1 block + 1, tied", "mixtral", {
        "sliding_window": 17, "tie_word_embeddings": True, "num_key_value_heads": 4, "num_experts_per_tok": 3}),
    Case("mixtral multi-query, top-1, linear rope", "mixtral", {
        "num_key_value_heads": 1, "num_experts_per_tok": 1, "num_local_experts": 5, "rope_parameters": LINEAR}, seed=1),
]  # fmt: skip

GPT_OSS = [
    Case("gpt-oss as released", "gpt_oss", {
        "num_local_experts": 16, "num_experts_per_tok": 4,
        "rope_parameters": yarn(rope_theta=150000.0, truncate=False)},
        stored="bfloat16", shard="100KB", old={"initial_context_length": 64, "experts_per_token": 4}),
    Case("gpt-oss narrow clamp, window of 1 block + 1", "gpt_oss", {
        "swiglu_limit": 0.75, "swiglu_alpha": 1.0, "sliding_window": 17, "num_key_value_heads": 1, "head_dim": 16,
        "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}}, seed=15),
    Case("gpt-oss wide window, no attention bias, top-1", "gpt_oss", {
        "sliding_window": 200, "attention_bias": False, "num_key_value_heads": 4, "num_experts_per_tok": 1,
        "num_local_experts": 5, "rope_parameters": dict(LINEAR)}),
    Case("gpt-oss full first, two of three slide", "gpt_oss", {
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "num_hidden_layers": 3,
        "num_experts_per_tok": 3, "rope_parameters": yarn(rope_theta=150000.0)}, stored="bfloat16"),
]  # fmt: skip

CASES: dict[str, list[Case]] = {
    "deepseek_v3": V3, "deepseek_v2": V2, "kimi_k2": KIMI, "glm4_moe": GLM4, "qwen3_moe": QWEN3, "mixtral": MIXTRAL,
    "gpt_oss": GPT_OSS,
}  # fmt: skip
EVERY = [case for cases in CASES.values() for case in cases]
