"""Qwen3-MoE (arXiv 2505.09388): grouped-query attention with per-head norms; softmax routing; some layers dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesaic.contracts.spec import GQASpec, LayerSpec, LinearSpec, MLPSpec, ModelSpec, MoESpec, RouterSpec
from moesaic.models.fields import Fields, read_activation, read_dtype, read_rope


def describe(config: Mapping[str, Any]) -> ModelSpec:
    """config.json -> spec. Raises CheckpointError / UnsupportedError naming the field."""
    fields = Fields(config)
    return ModelSpec(
        architecture=fields.text("model_type"),
        hidden=fields.integer("hidden_size"), vocab=fields.integer("vocab_size"),
        norm_eps=fields.number("rms_norm_eps", 1e-6, above=0), max_length=fields.integer("max_position_embeddings"),
        embed="model.embed_tokens", final_norm="model.norm", head="lm_head",
        tied=fields.flag("tie_word_embeddings", False),
        layers=tuple(block(fields, i) for i in range(fields.count("num_hidden_layers"))),
        checkpoint_dtype=read_dtype(fields), eos_token_ids=fields.integers("eos_token_id"),
        ignore=(r".*\.rotary_emb\.inv_freq",),
    )  # fmt: skip


def block(fields: Fields, index: int) -> LayerSpec:
    """A layer is a mixture unless listed in `mlp_only_layers` or skipped by `decoder_sparse_step`."""
    name = f"model.layers.{index}"
    sparse = index not in fields.integers("mlp_only_layers")
    sparse = sparse and (index + 1) % fields.integer("decoder_sparse_step", 1) == 0
    return LayerSpec(
        index, f"{name}.input_layernorm", f"{name}.post_attention_layernorm", attention(fields, f"{name}.self_attn"),
        mixture(fields, f"{name}.mlp") if sparse else mlp(fields, f"{name}.mlp", fields.integer("intermediate_size")),
    )  # fmt: skip


def attention(fields: Fields, name: str) -> GQASpec:
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    size = fields.integer("head_dim", hidden // heads)
    bias = fields.flag("attention_bias", False)
    if heads % kv_heads:
        raise fields.bad("num_key_value_heads", f"({kv_heads}) must divide num_attention_heads ({heads})")
    windowed = fields.flag("use_sliding_window", False) and fields.has("sliding_window")
    return GQASpec(
        heads, kv_heads, size, size**-0.5, read_rope(fields, size, interleaved=False),
        LinearSpec(f"{name}.q_proj", hidden, heads * size, bias),
        LinearSpec(f"{name}.k_proj", hidden, kv_heads * size, bias),
        LinearSpec(f"{name}.v_proj", hidden, kv_heads * size, bias),
        LinearSpec(f"{name}.o_proj", heads * size, hidden, bias),
        f"{name}.q_norm", f"{name}.k_norm", fields.integer("sliding_window") if windowed else None,
    )  # fmt: skip


def mlp(fields: Fields, name: str, width: int) -> MLPSpec:
    hidden = fields.integer("hidden_size")
    gate, up = (LinearSpec(f"{name}.{part}_proj", hidden, width) for part in ("gate", "up"))
    return MLPSpec(gate, up, LinearSpec(f"{name}.down_proj", width, hidden), read_activation(fields))


def mixture(fields: Fields, name: str) -> MoESpec:
    count = "num_experts" if fields.has("num_experts") else "num_local_experts"  # as transformers 5 saves it
    experts, top_k = fields.count(count), fields.integer("num_experts_per_tok")
    if top_k > experts:
        raise fields.bad("num_experts_per_tok", f"({top_k}) exceeds num_experts ({experts})")
    expert = mlp(fields, f"{name}.experts.{{e}}", fields.integer("moe_intermediate_size"))
    route = RouterSpec(
        experts, top_k, "softmax", f"{name}.gate.weight", renormalize=fields.flag("norm_topk_prob", False)
    )
    return MoESpec(route, expert.gate, expert.up, expert.down, activation=expert.activation)
