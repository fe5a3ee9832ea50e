"""DeepSeek-V2 (arXiv 2405.04434): DeepSeek-V3's architecture with a softmax router and no correction bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesaic.contracts.spec import ModelSpec, RouterSpec
from moesaic.errors import UnsupportedError
from moesaic.models.deepseek_v3 import check_groups, describe_with
from moesaic.models.fields import Fields


def describe(config: Mapping[str, Any]) -> ModelSpec:
    """config.json -> spec. Raises CheckpointError / UnsupportedError naming the field."""
    return describe_with(config, router)


def router(fields: Fields, name: str) -> RouterSpec:
    """`greedy`: top-k of all; `group_limited_greedy`: of the groups with the largest maximum. Never renormalised."""
    method = fields.text("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise fields.bad("topk_method", f"is {method!r}; known are greedy and group_limited_greedy")
    if fields.flag("norm_topk_prob", False):
        raise UnsupportedError(
            "norm_topk_prob is true, which public implementations of deepseek_v2 compute differently",
            where=fields.file, remedy="Published checkpoints say false; set it so, or convert to deepseek_v3.",
        )  # fmt: skip
    experts, top_k = fields.count("n_routed_experts"), fields.integer("num_experts_per_tok")
    grouped = method == "group_limited_greedy"
    groups, top_groups = (fields.integer("n_group"), fields.integer("topk_group")) if grouped else (1, 1)
    check_groups(fields, experts, groups, top_groups, top_k)
    return RouterSpec(
        experts, top_k, "softmax", f"{name}.weight", renormalize=False, groups=groups, top_groups=top_groups,
        scale=fields.number("routed_scaling_factor", 1.0), group_score="max",
    )  # fmt: skip
