"""GLM-4.5 / 4.6 (arXiv 2508.06471): DeepSeek-V3's mixture and draft layers around grouped-query attention.

Checkpoint quirks: rope turns the first half of each head unless `partial_rotary_factor` says otherwise;
`attention_bias` is about q, k and v only; `use_qk_norm` tells the 355B model, which has per-head norms, from the Air.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moesaic.contracts.spec import GQASpec, LayerSpec, LinearSpec, ModelSpec
from moesaic.models.deepseek_v3 import draft, mixture, mlp, router
from moesaic.models.fields import Fields, read_dtype, read_rope


def describe(config: Mapping[str, Any]) -> ModelSpec:
    """config.json -> spec. Raises CheckpointError / UnsupportedError naming the field."""
    fields = Fields(config)
    count, drafts = fields.count("num_hidden_layers"), fields.count("num_nextn_predict_layers", 1, least=0)
    blocks = tuple(block(fields, i) for i in range(count + drafts))
    first = [f"model.layers.{count + i}" for i in range(drafts)]
    copies = tuple(re.escape(name) + r"\.(embed_tokens|shared_head\.head)\.weight" for name in first)
    return ModelSpec(
        architecture=fields.text("model_type"),
        hidden=fields.integer("hidden_size"), vocab=fields.integer("vocab_size"),
        norm_eps=fields.number("rms_norm_eps", 1e-5, above=0), max_length=fields.integer("max_position_embeddings"),
        embed="model.embed_tokens", final_norm="model.norm", head="lm_head",
        tied=fields.flag("tie_word_embeddings", False), layers=blocks[:count],
        drafts=tuple(draft(fields, b, n) for b, n in zip(blocks[count:], first, strict=True)),
        checkpoint_dtype=read_dtype(fields), eos_token_ids=fields.integers("eos_token_id"),
        ignore=(r".*\.rotary_emb\.inv_freq", *copies),
    )  # fmt: skip


def block(fields: Fields, index: int) -> LayerSpec:
    """Layers from `first_k_dense_replace` on are mixtures, draft layers included."""
    name = f"model.layers.{index}"
    sparse = index >= fields.integer("first_k_dense_replace", 1, least=0)
    return LayerSpec(
        index, f"{name}.input_layernorm", f"{name}.post_attention_layernorm", attention(fields, f"{name}.self_attn"),
        mixture(fields, f"{name}.mlp", router) if sparse
        else mlp(fields, f"{name}.mlp", fields.integer("intermediate_size")),
    )  # fmt: skip


def attention(fields: Fields, name: str) -> GQASpec:
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads")
    size = fields.integer("head_dim", hidden // heads)
    if heads % kv_heads:
        raise fields.bad("num_key_value_heads", f"({kv_heads}) must divide num_attention_heads ({heads})")
    bias, norms = fields.flag("attention_bias", False), fields.flag("use_qk_norm", False)
    counts = (("q", heads), ("k", kv_heads), ("v", kv_heads))
    q, k, v = (LinearSpec(f"{name}.{part}_proj", hidden, count * size, bias) for part, count in counts)
    return GQASpec(
        heads, kv_heads, size, size**-0.5, read_rope(fields, size, interleaved=False, default_part=0.5), q, k, v,
        LinearSpec(f"{name}.o_proj", heads * size, hidden),
        f"{name}.q_norm" if norms else None, f"{name}.k_norm" if norms else None,
    )  # fmt: skip
