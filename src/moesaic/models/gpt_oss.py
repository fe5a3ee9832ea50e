"""gpt-oss (arXiv 2508.10925): sliding and full attention by turns, with sinks; biased experts with a clamped SwiGLU.

Checkpoint quirks: all experts of a layer lie in one tensor per product, transposed, the columns of gate and up taking
turns; the router has a bias that is part of its logits, and weights are the softmax of the chosen logits alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesaic.contracts.spec import (
    Activation,
    FusedExperts,
    GQASpec,
    LayerSpec,
    LinearSpec,
    ModelSpec,
    MoESpec,
    RouterSpec,
)
from moesaic.models.fields import Fields, read_activation, read_dtype, read_rope

ATTENTION = {"sliding_attention": True, "full_attention": False}


def describe(config: Mapping[str, Any]) -> ModelSpec:
    """config.json -> spec. Raises CheckpointError / UnsupportedError naming the field."""
    fields = Fields(config)
    windows = read_windows(fields, fields.count("num_hidden_layers"))
    return ModelSpec(
        architecture=fields.text("model_type"),
        hidden=fields.integer("hidden_size"), vocab=fields.integer("vocab_size"),
        norm_eps=fields.number("rms_norm_eps", 1e-5, above=0), max_length=fields.integer("max_position_embeddings"),
        embed="model.embed_tokens", final_norm="model.norm", head="lm_head",
        tied=fields.flag("tie_word_embeddings", False),
        layers=tuple(block(fields, i, window) for i, window in enumerate(windows)),
        checkpoint_dtype=read_dtype(fields), eos_token_ids=fields.integers("eos_token_id"),
        ignore=(r".*\.rotary_emb\.inv_freq",),
    )  # fmt: skip


def read_windows(fields: Fields, count: int) -> list[int | None]:
    """The window of each layer. Without `layer_types`, every second layer slides, the first included."""
    kinds = fields.get("layer_types", ["full_attention" if i % 2 else "sliding_attention" for i in range(count)])
    if not isinstance(kinds, list) or len(kinds) != count or not all(kind in list(ATTENTION) for kind in kinds):
        raise fields.bad("layer_types", f"must name {' or '.join(ATTENTION)} for each of {count} layers")
    return [fields.integer("sliding_window") if ATTENTION[kind] else None for kind in kinds]


def block(fields: Fields, index: int, window: int | None) -> LayerSpec:
    name = f"model.layers.{index}"
    return LayerSpec(
        index, f"{name}.input_layernorm", f"{name}.post_attention_layernorm",
        attention(fields, f"{name}.self_attn", window), mixture(fields, f"{name}.mlp"),
    )  # fmt: skip


def attention(fields: Fields, name: str, window: int | None) -> GQASpec:
    """The rope settings have no safe default: `transformers` takes a missing one to mean YaRN."""
    hidden, heads, size = (fields.integer(each) for each in ("hidden_size", "num_attention_heads", "head_dim"))
    kv_heads, bias = fields.integer("num_key_value_heads"), fields.flag("attention_bias", True)
    if heads % kv_heads:
        raise fields.bad("num_key_value_heads", f"({kv_heads}) must divide num_attention_heads ({heads})")
    if not (fields.get("rope_parameters", None) or fields.get("rope_scaling", None)):
        raise fields.bad("rope_scaling", "is missing")
    counts = (("q", heads), ("k", kv_heads), ("v", kv_heads))
    q, k, v = (LinearSpec(f"{name}.{part}_proj", hidden, count * size, bias) for part, count in counts)
    return GQASpec(
        heads, kv_heads, size, size**-0.5, read_rope(fields, size, interleaved=False, default_theta=150000.0), q, k, v,
        LinearSpec(f"{name}.o_proj", heads * size, hidden, bias), window=window, sinks=f"{name}.sinks",
    )  # fmt: skip


def mixture(fields: Fields, name: str) -> MoESpec:
    hidden, width = fields.integer("hidden_size"), fields.integer("intermediate_size")
    experts, top_k = fields.count("num_local_experts"), fields.integer("num_experts_per_tok")
    if top_k > experts:
        raise fields.bad("num_experts_per_tok", f"({top_k}) exceeds num_local_experts ({experts})")
    read_activation(fields)  # the gate is a SiLU of another slope; any other name would mean another function
    limit, alpha = fields.number("swiglu_limit", 7.0, above=0), fields.number("swiglu_alpha", 1.702)
    gate, up = (LinearSpec(f"{name}.experts.{{e}}.{part}_proj", hidden, width, bias=True) for part in ("gate", "up"))
    both, down = f"{name}.experts.gate_up_proj", f"{name}.experts.down_proj"
    return MoESpec(
        RouterSpec(experts, top_k, "softmax_topk", f"{name}.router.weight", renormalize=False,
                   logit_bias=f"{name}.router.bias"),
        gate, up, LinearSpec(f"{name}.experts.{{e}}.down_proj", width, hidden, bias=True),
        activation=Activation("swiglu_oai", limit, alpha),
        fused=FusedExperts(both, down, (f"{both}_bias", f"{down}_bias"), transposed=True, interleaved=True),
    )  # fmt: skip
