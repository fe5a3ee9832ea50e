"""Architectures of two layers in which every expert is chosen, and weights shared between their models."""

from __future__ import annotations

from typing import Any

from moesaic.layers.linear import Stored
from moesaic.models.decoder import Decoder

COMMON: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 64, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "attention_bias": False, "num_attention_heads": 2,
}  # fmt: skip
LATENT: dict[str, Any] = {
    **COMMON, "num_key_value_heads": 2, "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64,
    "v_head_dim": 64, "intermediate_size": 128, "moe_intermediate_size": 128, "n_routed_experts": 2,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_shared_experts": 1, "norm_topk_prob": True,
    "routed_scaling_factor": 1.5, "n_group": 1, "topk_group": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "moe_layer_freq": 1, "num_nextn_predict_layers": 0,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "heads with norms": {
        **COMMON, "model_type": "qwen3_moe", "num_key_value_heads": 1, "head_dim": 64, "intermediate_size": 128,
        "moe_intermediate_size": 128, "num_experts": 2, "num_experts_per_tok": 2, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [0]},
    "latent": {**LATENT, "model_type": "deepseek_v3", "q_lora_rank": 128},
    "latent, whole queries": {**LATENT, "model_type": "deepseek_v3", "q_lora_rank": None},
    "sinks and a window": {
        **COMMON, "model_type": "gpt_oss", "num_key_value_heads": 1, "head_dim": 64, "intermediate_size": 128,
        "num_local_experts": 2, "num_experts_per_tok": 2, "sliding_window": 8, "attention_bias": True,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}},
}  # fmt: skip


def alike(model: Decoder, twin: Decoder) -> None:
    """Gives the twin the weights of the model: codes, or, where it has plain ones, what they stand for."""
    for mine, theirs in zip(model.sources(), twin.sources(), strict=True):
        if isinstance(mine, Stored) and isinstance(theirs, Stored):
            parts = mine.weight.parts
            if theirs.weight.form.name == "bf16" and mine.weight.form.name != "bf16":
                parts = {"data": mine.weight.dequantize()}
            for name, part in parts.items():
                theirs.weight.parts[name].copy_(part)
            if mine.input_scale is not None and theirs.input_scale is not None:
                theirs.input_scale.copy_(mine.input_scale)
            theirs.settle()
        else:
            theirs[1].copy_(mine[1])  # type: ignore[index]
