"""DeepSeek-V3 / R1 (arXiv 2412.19437); `deepseek_v2.py` shares everything but the router.

Checkpoint quirks: the latent norms keep epsilon 1e-6 whatever `rms_norm_eps` says; rope pairs neighbours; the MTP
layers follow the last decoder layer as `model.layers.{num_hidden_layers + i}` and repeat the embedding and the head,
which the paper shares with the model (section 2.2), so the copies are not loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from moesaic.contracts.spec import DraftSpec, LayerSpec, LinearSpec, MLASpec, MLPSpec, ModelSpec, MoESpec, RouterSpec
from moesaic.errors import CheckpointError
from moesaic.models.fields import Fields, read_activation, read_dtype, read_rope, rope_fields, yarn_mscale


def describe(config: Mapping[str, Any]) -> ModelSpec:
    """config.json -> spec. Raises CheckpointError / UnsupportedError naming the field."""
    return describe_with(config, router)


def describe_with(config: Mapping[str, Any], read_router: Callable[[Fields, str], RouterSpec]) -> ModelSpec:
    fields = Fields(config)
    count, drafts = fields.count("num_hidden_layers"), fields.count("num_nextn_predict_layers", 0, least=0)
    blocks = tuple(block(fields, i, read_router) for i in range(count + drafts))
    first = [f"model.layers.{count + i}" for i in range(drafts)]
    copies = tuple(re.escape(name) + r"\.(embed_tokens|shared_head\.head)\.weight" for name in first)
    return ModelSpec(
        architecture=fields.text("model_type"),
        hidden=fields.integer("hidden_size"), vocab=fields.integer("vocab_size"),
        norm_eps=fields.number("rms_norm_eps", 1e-6, above=0), max_length=fields.integer("max_position_embeddings"),
        embed="model.embed_tokens", final_norm="model.norm", head="lm_head",
        tied=fields.flag("tie_word_embeddings", False), layers=blocks[:count],
        drafts=tuple(draft(fields, b, n) for b, n in zip(blocks[count:], first, strict=True)),
        checkpoint_dtype=read_dtype(fields), eos_token_ids=fields.integers("eos_token_id"),
        ignore=(r".*\.rotary_emb\.inv_freq", *copies),
    )  # fmt: skip


def block(fields: Fields, index: int, read_router: Callable[[Fields, str], RouterSpec]) -> LayerSpec:
    """Layers from `first_k_dense_replace` on are mixtures, MTP layers included."""
    name = f"model.layers.{index}"
    sparse = index >= fields.integer("first_k_dense_replace", 0, least=0)
    sparse = sparse and index % fields.integer("moe_layer_freq", 1) == 0
    dense_width = 0 if sparse else fields.integer("intermediate_size")
    return LayerSpec(
        index, f"{name}.input_layernorm", f"{name}.post_attention_layernorm", attention(fields, f"{name}.self_attn"),
        mixture(fields, f"{name}.mlp", read_router) if sparse else mlp(fields, f"{name}.mlp", dense_width),
    )  # fmt: skip


def attention(fields: Fields, name: str) -> MLASpec:
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    nope, rope_dim = fields.integer("qk_nope_head_dim"), fields.integer("qk_rope_head_dim")
    rank, v_dim = fields.integer("kv_lora_rank"), fields.integer("v_head_dim")
    bias = fields.flag("attention_bias", False)
    q_rank = fields.integer("q_lora_rank") if fields.has("q_lora_rank") else None
    rope = read_rope(fields, rope_dim, interleaved=fields.flag("rope_interleave", True))
    if rope.dim != rope_dim:
        raise fields.bad("partial_rotary_factor", "does not apply here: qk_rope_head_dim says what is rotated")
    scale = (nope + rope_dim) ** -0.5
    if rope.yarn and (all_dims := rope_fields(fields).number("mscale_all_dim", 0.0)):
        scale *= yarn_mscale(rope.yarn.factor, all_dims) ** 2
    q_out = heads * (nope + rope_dim)
    return MLASpec(
        heads=heads, kv_rank=rank, nope_dim=nope, rope_dim=rope_dim, v_dim=v_dim, scale=scale, rope=rope,
        q_a=LinearSpec(f"{name}.q_a_proj", hidden, q_rank, bias) if q_rank else None,
        q_a_norm=f"{name}.q_a_layernorm" if q_rank else None,
        q_b=LinearSpec(f"{name}.q_b_proj", q_rank, q_out) if q_rank else LinearSpec(f"{name}.q_proj", hidden, q_out),
        kv_a=LinearSpec(f"{name}.kv_a_proj_with_mqa", hidden, rank + rope_dim, bias),
        kv_a_norm=f"{name}.kv_a_layernorm", kv_b=LinearSpec(f"{name}.kv_b_proj", rank, heads * (nope + v_dim)),
        o=LinearSpec(f"{name}.o_proj", heads * v_dim, hidden, bias),
    )  # fmt: skip


def mlp(fields: Fields, name: str, width: int) -> MLPSpec:
    hidden = fields.integer("hidden_size")
    gate, up = (LinearSpec(f"{name}.{part}_proj", hidden, width) for part in ("gate", "up"))
    return MLPSpec(gate, up, LinearSpec(f"{name}.down_proj", width, hidden), read_activation(fields))


def mixture(fields: Fields, name: str, read_router: Callable[[Fields, str], RouterSpec]) -> MoESpec:
    width, shared = fields.integer("moe_intermediate_size"), fields.integer("n_shared_experts", 0, least=0)
    expert = mlp(fields, f"{name}.experts.{{e}}", width)
    return MoESpec(
        read_router(fields, f"{name}.gate"), expert.gate, expert.up, expert.down,
        mlp(fields, f"{name}.shared_experts", width * shared) if shared else None, expert.activation,
    )  # fmt: skip


def router(fields: Fields, name: str) -> RouterSpec:
    """Sigmoid scores; a bias that steers selection only; groups scored by their two best (section 2.1.2).

    Groups and factor have no safe default: implementations differ where they are missing, so they must be there.
    """
    experts, groups = fields.count("n_routed_experts"), fields.integer("n_group")
    top_k, top_groups = fields.integer("num_experts_per_tok"), fields.integer("topk_group")
    for kind, wanted in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if fields.text(kind, wanted) != wanted:
            raise fields.bad(kind, f"is {fields.text(kind)!r}, but this architecture routes by {wanted!r}")
    check_groups(fields, experts, groups, top_groups, top_k)
    return RouterSpec(
        experts, top_k, "sigmoid", f"{name}.weight", f"{name}.e_score_correction_bias",
        renormalize=fields.flag("norm_topk_prob", True), scale=fields.number("routed_scaling_factor"),
        groups=groups, top_groups=top_groups, group_score="top2_sum",
    )  # fmt: skip


def check_groups(fields: Fields, experts: int, groups: int, top_groups: int, top_k: int) -> None:
    """Groups must divide the experts, and the kept groups must hold top_k of them."""
    legal = experts % groups == 0 and top_groups <= groups and top_k <= top_groups * (experts // groups)
    if not legal or (groups > 1 and experts // groups < 2):
        raise CheckpointError(
            f"{experts} experts in {groups} groups cannot give {top_k} experts from {top_groups} groups",
            where=fields.file, remedy="Correct n_group, topk_group, n_routed_experts or num_experts_per_tok.",
        )  # fmt: skip


def draft(fields: Fields, layer: LayerSpec, name: str) -> DraftSpec:
    hidden = fields.integer("hidden_size")
    return DraftSpec(
        layer, f"{name}.enorm", f"{name}.hnorm", LinearSpec(f"{name}.eh_proj", 2 * hidden, hidden),
        f"{name}.shared_head.norm", f"{name}.embed_tokens", f"{name}.shared_head.head",
    )  # fmt: skip
