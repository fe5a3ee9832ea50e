"""Mixtral (arXiv 2401.04088): grouped-query attention, optionally windowed; every layer a mixture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesaic.contracts.spec import GQASpec, LayerSpec, LinearSpec, ModelSpec, MoESpec, RouterSpec
from moesaic.models.fields import Fields, read_activation, read_dtype, read_rope


def describe(config: Mapping[str, Any]) -> ModelSpec:
    """config.json -> spec. Raises CheckpointError / UnsupportedError naming the field."""
    fields = Fields(config)
    return ModelSpec(
        architecture=fields.text("model_type"),
        hidden=fields.integer("hidden_size"), vocab=fields.integer("vocab_size"),
        norm_eps=fields.number("rms_norm_eps", 1e-5, above=0), max_length=fields.integer("max_position_embeddings"),
        embed="model.embed_tokens", final_norm="model.norm", head="lm_head",
        tied=fields.flag("tie_word_embeddings", False),
        layers=tuple(block(fields, i) for i in range(fields.count("num_hidden_layers"))),
        checkpoint_dtype=read_dtype(fields), eos_token_ids=fields.integers("eos_token_id"),
        ignore=(r".*\.rotary_emb\.inv_freq",),
    )  # fmt: skip


def block(fields: Fields, index: int) -> LayerSpec:
    name = f"model.layers.{index}"
    return LayerSpec(
        index, f"{name}.input_layernorm", f"{name}.post_attention_layernorm", attention(fields, f"{name}.self_attn"),
        mixture(fields, f"{name}.block_sparse_moe"),
    )  # fmt: skip


def attention(fields: Fields, name: str) -> GQASpec:
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    size = fields.integer("head_dim", hidden // heads)
    if heads % kv_heads:
        raise fields.bad("num_key_value_heads", f"({kv_heads}) must divide num_attention_heads ({heads})")
    counts = (("q", heads), ("k", kv_heads), ("v", kv_heads))
    q, k, v = (LinearSpec(f"{name}.{part}_proj", hidden, count * size) for part, count in counts)
    return GQASpec(
        heads, kv_heads, size, size**-0.5, read_rope(fields, size, interleaved=False, default_theta=1e6), q, k, v,
        LinearSpec(f"{name}.o_proj", heads * size, hidden),
        window=fields.integer("sliding_window") if fields.has("sliding_window") else None,
    )  # fmt: skip


def mixture(fields: Fields, name: str) -> MoESpec:
    """w1 is the gate, w3 the up, w2 the down projection. Softmax over the chosen is renormalised softmax over all."""
    hidden, width = fields.integer("hidden_size"), fields.integer("intermediate_size")
    experts, top_k = fields.count("num_local_experts"), fields.integer("num_experts_per_tok", 2)
    if top_k > experts:
        raise fields.bad("num_experts_per_tok", f"({top_k}) exceeds num_local_experts ({experts})")
    w1, w3 = (LinearSpec(f"{name}.experts.{{e}}.{part}", hidden, width) for part in ("w1", "w3"))
    route = RouterSpec(experts, top_k, "softmax", f"{name}.gate.weight", renormalize=True)
    return MoESpec(
        route, w1, w3, LinearSpec(f"{name}.experts.{{e}}.w2", width, hidden), activation=read_activation(fields)
    )
