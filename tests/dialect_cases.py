"""Published quantisation configs, typed in as the models' repositories have them, and the models that they are of."""

from __future__ import annotations

from typing import Any

from moesaic.contracts.scheme import Scheme
from moesaic.contracts.spec import LinearSpec, ModelSpec
from moesaic.formats.dialects.modules import linears, names_of
from moesaic.models import deepseek_v3, gpt_oss, mixtral, qwen3_moe

DEEPSEEK = {
    "model_type": "deepseek_v3", "num_hidden_layers": 61, "num_nextn_predict_layers": 1, "hidden_size": 7168,
    "vocab_size": 129280, "max_position_embeddings": 163840, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "n_shared_experts": 1, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    "routed_scaling_factor": 2.5, "first_k_dense_replace": 3, "num_attention_heads": 128, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rms_norm_eps": 1e-6,
}  # fmt: skip
KIMI = {**DEEPSEEK, "n_routed_experts": 384, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "num_attention_heads": 64, "num_nextn_predict_layers": 0, "routed_scaling_factor": 2.827}  # fmt: skip
QWEN = {
    "model_type": "qwen3_moe", "num_hidden_layers": 48, "hidden_size": 2048, "vocab_size": 151936, "head_dim": 128,
    "max_position_embeddings": 40960, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
    "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4, "norm_topk_prob": True,
}  # fmt: skip
MIXTRAL = {
    "model_type": "mixtral", "num_hidden_layers": 32, "hidden_size": 4096, "vocab_size": 32000, "num_local_experts": 8,
    "max_position_embeddings": 32768, "intermediate_size": 14336, "num_experts_per_tok": 2, "num_attention_heads": 32,
    "num_key_value_heads": 8,
}  # fmt: skip
GPT_OSS_20B = {
    "model_type": "gpt_oss", "num_hidden_layers": 24, "hidden_size": 2880, "vocab_size": 201088, "head_dim": 64,
    "max_position_embeddings": 131072, "intermediate_size": 2880, "num_local_experts": 32, "num_experts_per_tok": 4,
    "num_attention_heads": 64, "num_key_value_heads": 8, "sliding_window": 128, "rope_theta": 150000,
    "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                     "original_max_position_embeddings": 4096},
}  # fmt: skip
TINY = {**DEEPSEEK, "num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "num_attention_heads": 3, "q_lora_rank": 128, "kv_lora_rank": 128, "vocab_size": 99}  # fmt: skip


def describe(config: dict[str, Any]) -> ModelSpec:
    known = {"deepseek_v3": deepseek_v3, "qwen3_moe": qwen3_moe, "mixtral": mixtral, "gpt_oss": gpt_oss}
    return known[config["model_type"]].describe(config)


def schemes(spec: ModelSpec) -> dict[str, Scheme]:
    """Of every projection, experts one by one."""
    return {name: part.scheme for part, experts in linears(spec) for name in names_of(part, experts)}


def parts(spec: ModelSpec) -> dict[str, LinearSpec]:
    return {name: part for part, experts in linears(spec) for name in names_of(part, experts)}


def group(weights: dict[str, Any], rows: dict[str, Any] | None = None, *targets: str, form: str = "") -> dict[str, Any]:
    usual = {"dynamic": False, "symmetric": True, "actorder": None, "block_structure": None, "group_size": None,
             "observer": "minmax", "observer_kwargs": {}}  # fmt: skip
    found = {
        "targets": list(targets) or ["Linear"], "weights": {**usual, **weights},
        "input_activations": {**usual, **rows} if rows else None, "output_activations": None,
    }  # fmt: skip
    return found | ({"format": form} if form else {})


def compressed(form: str, ignore: list[str], *groups: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed", "ignore": ignore,
        "kv_cache_scheme": None, "global_compression_ratio": None, "sparsity_config": {}, "transform_config": {},
        "version": "0.12.3", "config_groups": {f"group_{i}": each for i, each in enumerate(groups)}, **more,
    }  # fmt: skip


FLOAT8, FLOAT4 = {"num_bits": 8, "type": "float"}, {"num_bits": 4, "type": "float"}
INT4_G32 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
INT4_G128 = {**INT4_G32, "group_size": 128}
CHANNEL, TOKEN = {**FLOAT8, "strategy": "channel"}, {**FLOAT8, "strategy": "token", "dynamic": True}
BLOCK = {**FLOAT8, "strategy": "block", "block_structure": [128, 128]}
GROUP128 = {**FLOAT8, "strategy": "group", "group_size": 128, "dynamic": True}
TENSOR = {**FLOAT8, "strategy": "tensor"}
MX8 = {**FLOAT8, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
MX4 = {**FLOAT4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
NV4 = {**FLOAT4, "strategy": "tensor_group", "group_size": 16}

DEEPSEEK_FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
QWEN_FP8 = {
    **DEEPSEEK_FP8,
    "modules_to_not_convert": ["lm_head", *(
        f"model.layers.{i}.{name}" for i in range(48)
        for name in ("input_layernorm", "mlp.gate", "post_attention_layernorm")
    )],
}  # fmt: skip
MINIMAX_FP8 = {**DEEPSEEK_FP8, "fmt": "float8_e4m3fn",
               "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"]}  # fmt: skip
AUTO_FP8 = {
    "activation_scheme": "static", "quant_method": "fp8",
    "ignored_layers": ["lm_head", *(f"model.layers.{i}.block_sparse_moe.gate" for i in range(32))],
}  # fmt: skip
KIMI_INT4 = compressed(
    "pack-quantized",
    ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
    group(INT4_G32),
)
REDHAT_FP8_DYNAMIC = compressed(
    "float-quantized", ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(48))], group(CHANNEL, TOKEN)
)
REDHAT_NVFP4 = compressed(
    "nvfp4-pack-quantized", ["lm_head", "re:.*mlp.gate$"], group(NV4, {**NV4, "dynamic": "local"})
)
NVIDIA_NVFP4 = {
    "producer": {"name": "modelopt", "version": "0.29.0"},
    "quantization": {
        "quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16,
        "exclude_modules": ["lm_head", "model.layers.61*", *(f"model.layers.{i}.self_attn*" for i in range(61)),
                            *(f"model.layers.{i}.mlp.gate" for i in range(3, 61))],
    },
}  # fmt: skip
GPT_OSS = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
    ],
}  # fmt: skip
