"""The parity cases do turn every switch, and a switch turned the wrong way does not go unnoticed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from moesaic.contracts.spec import GQASpec, LayerSpec, MLASpec, ModelSpec, MoESpec
from moesaic.models.build import architectures, spec_of
from tests.checkpoints import random_model, save
from tests.parity_cases import CASES, EVERY, Case
from tests.parity_run import Oracle, errors, forced_logits, make_oracle, start


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[ModelSpec]]:
    """Per architecture, what our engine reads from the config of each case."""
    found: dict[str, list[ModelSpec]] = {}
    for case in EVERY:
        path = tmp_path_factory.mktemp("config")
        save(random_model(case.model_type, **case.config), path, old=case.old)
        found.setdefault(case.model_type, []).append(spec_of(json.loads((path / "config.json").read_text())))
    return found


def test_every_architecture_has_cases() -> None:
    assert sorted(CASES) == architectures()
    assert len({case.name for case in EVERY}) == len(EVERY)
    assert all(case.model_type == model_type for model_type, cases in CASES.items() for case in cases)


def mixture(spec: ModelSpec) -> MoESpec:
    return next(layer.mlp for layer in spec.layers if isinstance(layer.mlp, MoESpec))


def dense(spec: ModelSpec) -> tuple[int, ...]:
    return tuple(layer.index for layer in spec.layers if not isinstance(layer.mlp, MoESpec))


def gqa(spec: ModelSpec) -> GQASpec:
    assert isinstance(spec.layers[0].attention, GQASpec)
    return spec.layers[0].attention


def gqa_of(layer: LayerSpec) -> GQASpec:
    assert isinstance(layer.attention, GQASpec)
    return layer.attention


def mla(spec: ModelSpec) -> MLASpec:
    assert isinstance(spec.layers[0].attention, MLASpec)
    return spec.layers[0].attention


DEEPSEEK_MIXTURE: dict[str, tuple[Callable[[ModelSpec], Any], set[Any]]] = {
    "dense first": (lambda s: dense(s), {(), (0,), (0, 1)}),
    "shared experts": (lambda s: mixture(s).shared.gate.outputs // mixture(s).gate.outputs, {1, 2}),  # type: ignore[union-attr]
    "grouped": (lambda s: mixture(s).router.groups, {1, 4}),
    "kept groups": (lambda s: mixture(s).router.top_groups, {1, 2, 3}),
    "factor": (lambda s: mixture(s).router.scale, {1.0, 2.5}),
}
DEEPSEEK: dict[str, tuple[Callable[[ModelSpec], Any], set[Any]]] = {
    "q-LoRA": (lambda s: mla(s).q_a is not None, {False, True}),
    "yarn": (lambda s: mla(s).rope.yarn is not None, {False, True}),
    "attention bias": (lambda s: mla(s).kv_a.bias, {False, True}),
    "tied": (lambda s: s.tied, {False, True}),
} | DEEPSEEK_MIXTURE
GROUPED: dict[str, tuple[Callable[[ModelSpec], Any], set[Any]]] = {
    "query heads per kv head": (lambda s: gqa(s).heads // gqa(s).kv_heads, {1, 2, 4}),
    "window": (lambda s: gqa(s).window is not None, {False, True}),
    "head size is hidden / heads": (lambda s: gqa(s).head_dim == s.hidden // gqa(s).heads, {False, True}),
    "tied": (lambda s: s.tied, {False, True}),
}
SWITCHES = {
    "deepseek_v3": DEEPSEEK | {
        "renormalised": (lambda s: mixture(s).router.renormalize, {False, True}),
        "interleaved rope": (lambda s: mla(s).rope.interleaved, {False, True}),
        "draft layers": (lambda s: len(s.drafts), {0, 1, 2}),
    },
    "deepseek_v2": DEEPSEEK,
    "kimi_k2": {
        "yarn": (lambda s: mla(s).rope.yarn is not None, {True}),
        "grouped": (lambda s: mixture(s).router.groups, {1}),
    },
    "glm4_moe": GROUPED | {
        "window": (lambda s: gqa(s).window is not None, {False}),
        "norms of heads": (lambda s: (bool(gqa(s).q_norm), bool(gqa(s).k_norm)), {(False, False), (True, True)}),
        "attention bias": (lambda s: (gqa(s).q.bias, gqa(s).o.bias), {(False, False), (True, False)}),
        "rotated part": (lambda s: gqa(s).rope.dim / gqa(s).head_dim, {0.25, 0.5, 1.0}),
        "yarn": (lambda s: gqa(s).rope.yarn is not None, {False, True}),
        "renormalised": (lambda s: mixture(s).router.renormalize, {False, True}),
        "draft layers": (lambda s: len(s.drafts), {0, 1, 2}),
    } | DEEPSEEK_MIXTURE,
    "qwen3_moe": GROUPED | {
        "renormalised": (lambda s: mixture(s).router.renormalize, {False, True}),
        "attention bias": (lambda s: gqa(s).q.bias, {False, True}),
        "dense": (lambda s: dense(s), {(), (1,), (0, 2)}),
    },
    "mixtral": GROUPED,
    "gpt_oss": GROUPED | {
        "windows": (lambda s: tuple(w.window for w in map(gqa_of, s.layers)), {
            (16, None, 16, None), (17, None, 17, None), (200, None, 200, None), (None, 16, 16)}),
        "attention bias": (lambda s: (gqa(s).q.bias, gqa(s).o.bias), {(False, False), (True, True)}),
        "yarn": (lambda s: s.ropes[0].yarn and s.ropes[0].yarn.truncate, {None, False, True}),
        "chosen": (lambda s: mixture(s).router.top_k, {1, 2, 3, 4}),
        "clamp and slope": (lambda s: (mixture(s).activation.limit, mixture(s).activation.alpha), {
            (7.0, 1.702), (0.75, 1.0)}),
    },
}  # fmt: skip


@pytest.mark.parametrize(("kind", "switch"), [(k, s) for k, switches in SWITCHES.items() for s in switches])
def test_every_position_of_every_switch_is_in_a_case(specs: dict[str, list[ModelSpec]], kind: str, switch: str) -> None:
    read, wanted = SWITCHES[kind][switch]
    assert {read(spec) for spec in specs[kind]} >= wanted


def pick(part: str) -> Case:
    return next(case for case in EVERY if part in case.name)


WRONG: list[tuple[str, str, Any]] = [
    ("v3 as released", "norm_topk_prob", False),
    ("v3 as released", "routed_scaling_factor", 1.0),
    ("v3 as released", "n_group", 2),
    ("v3 as released", "topk_group", 3),
    ("v3 as released", "num_experts_per_tok", 3),
    ("v3 as released", "rope_interleave", False),
    ("v3 as released", "rope_theta", 11000.0),
    ("v3 as released", "rope_scaling", None),
    ("v3 two mscales", "rope_parameters.mscale", 1.3),
    ("v3 two mscales", "rope_parameters.mscale_all_dim", 0.707),
    ("v3 attention factor", "rope_parameters.attention_factor", 1.2),
    ("v3 yarn without", "rope_parameters.beta_fast", 32.0),
    ("v3 yarn without", "rope_parameters.truncate", True),
    ("v3 yarn without", "rope_parameters.original_max_position_embeddings", 128),
    ("v3 plain", "rms_norm_eps", 0.01),
    ("kimi as released", "rope_scaling.beta_fast", 32.0),
    ("kimi as released", "routed_scaling_factor", 2.5),
    ("glm as released", "partial_rotary_factor", 1.0),
    ("glm as released", "routed_scaling_factor", 1.0),
    ("glm as released", "rms_norm_eps", 0.01),
    ("glm groups", "norm_topk_prob", True),
    ("glm groups", "topk_group", 3),
    ("v2 as released", "topk_method", "greedy"),
    ("v2 groups without", "routed_scaling_factor", 2.0),
    ("qwen3 renormalised", "norm_topk_prob", False),
    ("qwen3 renormalised", "rms_norm_eps", 0.01),
    ("qwen3 sliding", "sliding_window", 17),
    ("qwen3 sliding", "use_sliding_window", False),
    ("mixtral sliding", "sliding_window", 15),
    ("mixtral as released", "rope_theta", 10000.0),
    ("mixtral multi-query", "rope_parameters.factor", 3.0),
    ("gpt-oss as released", "layer_types", ["full_attention", "sliding_attention"] * 2),
    ("gpt-oss as released", "sliding_window", 17),
    ("gpt-oss as released", "rope_scaling.truncate", True),
    ("gpt-oss as released", "num_experts_per_tok", 3),
    ("gpt-oss narrow", "swiglu_limit", 7.0),
    ("gpt-oss narrow", "swiglu_alpha", 1.702),
    ("gpt-oss narrow", "sliding_window", 16),
    ("gpt-oss wide", "sliding_window", 40),
]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Oracle]:
    return cache(lambda name: make_oracle(pick(name), tmp_path_factory.mktemp("right")))


@pytest.mark.parametrize(("name", "field", "value"), WRONG)
def test_a_wrong_switch_is_seen(
    name: str, field: str, value: Any, tmp_path: Path, oracle: Callable[[str], Oracle]
) -> None:
    """The same weights under a config.json that differs in one field: far outside the tolerance: cases can fail."""
    right = oracle(name)
    shutil.copytree(right.path, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    *outer, last = field.split(".")
    inner = config[outer[0]] if outer else config
    assert inner[last] != value
    inner[last] = value
    file.write_text(json.dumps(config))
    found = errors(right, forced_logits(start(replace(right, path=tmp_path), "float32"), right.texts[:1]))
    assert found.prefill > 1e-3
    assert found.decode > 1e-3
