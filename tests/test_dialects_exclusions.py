"""Lists of modules: against the matchers of transformers and compressed-tensors, and by hand where those differ."""

from __future__ import annotations

import fnmatch
import time

import pytest
import torch
from compressed_tensors.utils.match import is_match
from transformers.quantizers.quantizers_utils import should_convert_module

from moesaic.errors import CheckpointError, UnsupportedError
from moesaic.formats.dialects.exclusions import Entries
from moesaic.formats.dialects.modules import linears, names_of, other_names
from tests import dialect_cases as cases

NAMES = [n for part, experts in linears(cases.describe({**cases.TINY, "num_hidden_layers": 12}))
         for n in names_of(part, experts)]  # fmt: skip
LINEAR = torch.nn.Linear(1, 1, device="meta")


def found(entry: str, name: str, *, strict: bool = False) -> bool:
    return bool(Entries([entry], strict=strict).find(name, "Linear"))


@pytest.mark.parametrize(
    "entry",
    ["Linear", "Embedding", "lm_head", "re:.*self_attn.*", "re:.*mlp.experts.*", r"re:.*layers\.1\..*", "re:.*proj$",
     "re:model.layers.1.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*", "re:.*gate$", "re:experts", "re:.*eh_proj",
     r"re:.*\.experts\.[13]\.", "model.layers.1", "mlp", "model.layers.11.self_attn.o_proj",
     "model.layers.3.mlp.experts.2.up_proj", r"re:.*\.(\d)\..*\1"],
)  # fmt: skip
def test_strict_is_what_compressed_tensors_matches(entry: str) -> None:
    entries = Entries([entry], strict=True)
    expected = [is_match(name, LINEAR, entry) for name in NAMES]
    assert [bool(entries.find(name, "Linear")) for name in NAMES] == expected


@pytest.mark.parametrize(
    "entry",
    ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.layers.1", "model.layers.11", "model.embed_tokens",
     "model.layers.3.mlp", "model.layers.3.mlp.experts", "model.layers.3.mlp.experts.2.up_proj", "lm_head", "o_proj",
     "model.layers.(2|4).mlp", "model.layers.12", "eh_proj", "model.layers.2.mlp.gate", "model"],
)  # fmt: skip
def test_loose_is_what_transformers_skips(entry: str) -> None:
    entries = Entries([entry])
    expected = [not should_convert_module(name, [entry]) for name in NAMES]
    assert [bool(entries.find(name)) for name in NAMES] == expected


@pytest.mark.parametrize("entry", ["*.self_attn.*", "*o_proj", "model.layers.1*", "*.experts.*.down_proj", "*",
                                   "model.layers.?.mlp.*", "*.mlp.experts.[0-2].*", "*layers.1.*"])  # fmt: skip
def test_wildcards_are_those_of_fnmatch(entry: str) -> None:
    entries = Entries([entry])
    assert [bool(entries.find(name)) for name in NAMES] == [fnmatch.fnmatchcase(name, entry) for name in NAMES]


def test_experts_are_found_as_one_by_one() -> None:
    """Asked for a whole layer, entries that tell experts apart and those that do not give the same answers."""
    lists = (["*.mlp.experts.*", "experts.3", "model.layers.2.mlp.experts.1", "*.[02].up_proj", "re:.*experts.2.up",
              "gate_up_proj", "model.layers.1.mlp.experts.gate_proj", "layers.2"])  # fmt: skip
    for strict in (False, True):
        entries, singles = Entries(lists, strict=strict), [Entries([entry], strict=strict) for entry in lists]
        for layer in (1, 2, 3):
            for last in ("gate_proj", "up_proj", "down_proj"):
                template = f"model.layers.{layer}.mlp.experts.{{e}}.{last}"
                each = list(entries.find_experts(template, 4, "Linear"))
                for e in range(4):
                    name = template.format(e=e)
                    apart = [i for i, one in enumerate(singles) if next(one.find_experts(name, 1, "Linear"))]
                    assert each[e] == tuple(apart)


@pytest.mark.parametrize(
    ("entry", "name", "loose", "strict"),
    [
        # `model.` may be missing on either side, at the start only
        ("layers.3.mlp.up_proj", "model.layers.3.mlp.up_proj", True, True),
        ("model.layers.3.mlp.up_proj", "layers.3.mlp.up_proj", True, True),
        ("model.lm_head", "lm_head", True, True),
        ("model.mlp", "model.layers.0.mlp.up_proj", False, False),
        # components are whole
        ("layers.1", "model.layers.11.self_attn.o_proj", False, False),
        ("mlp.gate", "model.layers.0.mlp.gate_proj", False, False),
        ("mlp.gate", "model.layers.0.mlp.gate", True, False),
        ("gate", "model.layers.0.block_sparse_moe.gate", True, False),
        ("self_attn", "model.layers.0.self_attn.q_a_proj", True, False),
        ("experts", "model.layers.0.mlp.shared_experts.up_proj", False, False),
        # the names of fused modules
        ("model.layers.0.self_attn.qkv_proj", "model.layers.0.self_attn.k_proj", True, True),
        ("model.layers.0.self_attn.qkv_proj", "model.layers.0.self_attn.o_proj", False, False),
        ("qkv_proj", "model.layers.0.self_attn.v_proj", True, False),
        ("model.layers.0.mlp.gate_up_proj", "model.layers.0.mlp.up_proj", True, True),
        ("model.layers.0.mlp.gate_up_proj", "model.layers.0.mlp.down_proj", False, False),
        ("re:.*gate_up_proj", "model.layers.0.mlp.gate_proj", True, True),
        ("model.layers.0.self_attn.fused_qkv_a_proj_with_mqa", "model.layers.0.self_attn.q_a_proj", True, True),
        ("self_attn.fused_qkv_a_proj", "model.layers.0.self_attn.kv_a_proj_with_mqa", True, False),
        ("re:.*proj$", "model.layers.0.self_attn.kv_a_proj_with_mqa", False, False),
        # ModelOpt's wildcards
        ("model.layers.61*", "model.layers.61.self_attn.o_proj", True, False),
        ("model.layers.61*", "model.layers.6.self_attn.o_proj", False, False),
        ("layers.3.self_attn*", "model.layers.3.self_attn.kv_b_proj", True, False),
        ("model.layers.*.self_attn.*", "model.layers.3.self_attn.o_proj", True, False),
        # other ways of writing the same
        ("model.layers.0.self_attn.", "model.layers.0.self_attn.o_proj", True, False),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj", True, True),
    ],
)  # fmt: skip
def test_by_hand(entry: str, name: str, loose: bool, strict: bool) -> None:
    assert found(entry, name) is loose
    assert found(entry, name, strict=True) is strict


@pytest.mark.parametrize(
    "entry", ["model.layers.1.mlp.experts", "mlp.experts", "mlp.experts.gate_up_proj", "experts.*"]
)
def test_all_experts_at_once(entry: str) -> None:
    """`experts.*` has no start and is a wildcard: it is anchored, and so means nothing here."""
    each = list(Entries([entry]).find_experts("model.layers.1.mlp.experts.{e}.up_proj", 3))
    assert each == [(0,)] * 3 if entry != "experts.*" else [()] * 3
    assert not Entries([entry]).find("model.layers.1.mlp.shared_experts.up_proj")


def test_other_modules_have_names_too() -> None:
    """So that an entry that names one of them is not reported as meaning nothing."""
    names = set(other_names(cases.describe(cases.TINY)))
    assert {"lm_head", "model.embed_tokens", "model.norm", "model.layers.1.mlp.gate", "model.layers.2.enorm",
            "model.layers.1.mlp.gate.e_score_correction_bias", "model.layers.0.self_attn.kv_a_layernorm",
            "model.layers.0.input_layernorm", "model.layers.2.shared_head.head"} <= names  # fmt: skip
    assert not names & set(NAMES)


@pytest.mark.parametrize(
    "entry", ["re:(x+x+)+y", "re:(.*)*", "re:(a|b)+c", "re:" + ".*" * 7, "re:" + "a" * 600, "(a+)+$"]
)
def test_expressions_that_could_run_for_ever(entry: str) -> None:
    with pytest.raises(UnsupportedError, match="ignore: the expression"):
        Entries([entry], strict=True, where="ignore") if entry.startswith("re:") else Entries([entry], where="ignore")


def test_expressions_that_are_none() -> None:
    for entry in ("re:[", "re:a{99999999999999}", "model.layers.(0"):
        with pytest.raises(CheckpointError, match="ignored_layers"):
            Entries([entry], where="ignored_layers")


def test_the_costliest_expression_that_is_taken() -> None:
    """Polynomial, on names of modules: slow, not endless."""
    entries, began = Entries(["re:" + ".*e" * 6 + "x"]), time.perf_counter()
    assert not entries.find("model.layers.61.mlp.experts.255.gate_proj")
    assert time.perf_counter() - began < 1
