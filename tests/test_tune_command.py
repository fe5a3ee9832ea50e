"""`moesaic bench tune`: what it measures, what it writes, and that a plan then goes by it.

On the CPU, with real kernels and with some whose times are known.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moesaic.assets import read_table
from moesaic.commands import _measure, _tune
from moesaic.commands._measure import Candidate, Case, Inputs, candidates, packed
from moesaic.commands._tune import Tuner, merged, row_of, word_of
from moesaic.contracts.contract import Contract
from moesaic.contracts.scheme import SCHEMES
from moesaic.hardware import Hardware, local_cpu
from moesaic.kernels import registry
from moesaic.kernels.ops import ExpertWeights
from moesaic.kernels.registry import local_catalogue
from moesaic.models.build import spec_of
from moesaic.planning.tuning import Tuning
from scripts import plan_fixtures
from tests.cli_support import call

CASE = Case(SCHEMES["bf16"], 8, 64, 32, 2)
CPU = Hardware("AMD EPYC 9B14", "cpu", 2**40)


def test_it_measures_every_kernel_and_plans_go_by_the_table(tmp_path: Path) -> None:
    out = tmp_path / "of its own" / "table.json"
    argv = ["bench", "tune", "--device", "cpu", "--shape", "8x64x32x2", "--out", str(out)]
    done = call(*argv, "--scheme", "bf16", "fp8", "--tokens", "16", "1", "1")
    assert done.code == 0
    assert done.out == f"4 rows written to {out}\n"
    assert "not cpu_quant: takes weights in fp8_block" in done.err
    assert "deep_gemm, 1 tokens" not in done.err
    table = read_table(out)
    assert table["device"] == word_of(local_cpu().name)
    assert [(row["format"], row["encoding"], row["tokens"]) for row in table["rows"]] == [
        ("bf16", "bf16", 1), ("bf16", "bf16", 16), ("fp8_block", "fp8_group128", 1), ("fp8_block", "fp8_group128", 16),
    ]  # fmt: skip
    able = {each.backend for each in local_catalogue()
            if each.op == "experts" and each.misses(CASE.need(local_cpu(), 1).need) is None}  # fmt: skip
    assert set(table["rows"][0]["ms"]) == able - {"reference", *(c.backend for c in local_catalogue() if not c.built)}
    tuning, asks = Tuning.of([table], local_cpu().name), CASE.need(local_cpu(), 16)
    times = table["rows"][1]["ms"]
    assert {name: tuning.costs(asks, [name])[name] for name in times} == pytest.approx(times)
    others = {name: ms for name, ms in times.items() if name != "cpu_invariant"}
    assert tuning.costs(asks, times) == pytest.approx(others), "a twin stands behind its own"
    assert tuning.costs(replace(asks, need=replace(asks.need, dtype="float32")), able) == {}, "measured in BF16"

    assert call(*argv, "--scheme", "bf16", "--tokens", "4", "--kernels", "cpu").code == 0
    rows = read_table(out)["rows"]
    assert len(rows) == 5
    assert set(rows[-1]["ms"]) == {"cpu"}


def test_a_models_layers_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    model = Path(__file__).parent.parent / "src/moesaic/assets/tiny"
    assert call("bench", "tune", model, "--device", "cpu", "--tokens", "2", "--ep", "2", "--out", out).code == 0
    (row,) = read_table(out)["rows"]
    config = json.loads((model / "config.json").read_text())
    sizes = [config[name] for name in ("hidden_size", "moe_intermediate_size", "num_experts_per_tok")]
    assert [row[name] for name in ("hidden", "width", "top_k")] == sizes
    assert row["experts"] == config["n_routed_experts"] // 2


def test_the_layers_of_published_models() -> None:
    """GLM's draft holds its experts like its layers: one case. Kimi's are INT4 in groups of 32."""
    found = {name: _tune.cases_of(spec_of(plan_fixtures.read(name).config), 8)
             for name in ("deepseek-v3-fp8", "kimi-k2-int4", "gpt-oss-120b")}  # fmt: skip
    assert [str(case) for case in found["deepseek-v3-fp8"]] == ["fp8 E32 K7168 N2048 top8"]
    assert [case.scheme.weight.group for case in found["kimi-k2-int4"]] == [32]
    assert [case.activation.kind for case in found["gpt-oss-120b"]] == ["swiglu_oai"]


@pytest.mark.parametrize(
    ("name", "word"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA GeForce RTX 4090", "4090"),
     ("AMD EPYC 9B14 64-Core Processor", "9b14"), ("Intel(R) Xeon(R) CPU @ 2.20GHz", "intel(r)"), ("arm", "arm")],
)  # fmt: skip
def test_a_device_has_a_word(name: str, word: str) -> None:
    """By which its own tables are found again."""
    assert word_of(name) == word
    assert word_of(name) in name.lower().split()


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ((), "name a model, or shapes with schemes"),
        (("m", "--shape", "8x64x32x2", "--scheme", "bf16"), "name a model, or shapes with schemes"),
        (("--shape", "8x64x32x2"), "name a model, or shapes with schemes"),
        (("--shape", "8x64x32", "--scheme", "bf16"), "is not of the form EXPERTSxHIDDENxWIDTHxTOP_K"),
        (("--shape", "8x64x32x9", "--scheme", "bf16"), "has a size that cannot be"),
        (("--shape", "8x64x32x2", "--scheme", "bf16", "--tokens", "0"), "must be positive"),
        (("--shape", "8x64x32x2", "--scheme", "bf16", "--kernels", "fast"), "no such kernel: fast"),
    ],
)
def test_what_cannot_be_is_told(argv: tuple[str, ...], told: str) -> None:
    done = call("bench", "tune", *argv)
    assert done.code == 2
    assert told in done.err


# --- kernels whose times are known -----------------------------------------------------------------------------------


def ours(name: str, **changes: Any) -> Contract:
    kernel = next(each for each in local_catalogue() if each.op == "experts" and each.backend == "cpu")
    return replace(kernel, backend=name, **changes)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was called of `slow`; `odd`, fast with one of two settings; `packs`, which packs weights; and `fails`."""
    told: list[str] = []
    seconds = {"slow": 3e-3, "odd 64": 2e-3, "odd 128": 1e-3, "packs": 5e-4}

    def kernel(name: str) -> Any:
        def experts(x: Any, w: Any, ids: Any, weights: Any, **given: int) -> torch.Tensor:
            called = " ".join([name, *map(str, given.values())])
            told.append(f"{called} {w.packing}")
            time.sleep(seconds[called])
            return torch.zeros(len(ids), w.w2.shape[-2])

        return experts

    def fails(*_: Any) -> None:
        raise RuntimeError("no such symbol")

    def order(packing: str) -> Any:
        return lambda w, *_: (told.append(f"to {packing}"), replace(w, packing=packing))[1]

    made = {
        "slow": SimpleNamespace(experts=kernel("slow")),
        "odd": SimpleNamespace(experts=kernel("odd"), TUNABLE={"height": (64, 128)}),
        "packs": SimpleNamespace(experts=kernel("packs"), pack=order("tiles"), unpack=order("plain")),
        "fails": SimpleNamespace(experts=fails),
    }
    everything = dict(registry.backends()) | made
    for module in (registry, _measure):
        monkeypatch.setattr(module, "backends", lambda: everything)
    return told


def tuner(say: Any = lambda _: None, names: tuple[str, ...] = ()) -> Tuner:
    others = [each for each in local_catalogue() if each.op != "experts"]
    kernels = [ours("packs", package="torch"), ours("slow"), ours("odd"), ours("fails"), ours("cannot", broken="why")]
    return Tuner(CPU, [*others, *kernels], (1, 4), names, say)


def test_settings_packing_and_failures(known: list[str]) -> None:
    said: list[str] = []
    run = tuner(said.append)
    (rows,) = run.rows([CASE])
    assert [set(row["ms"]) for row in rows] == [{"slow", "odd", "packs"}] * 2
    assert [row["parameters"] for row in rows] == [{"odd": {"height": 128}}] * 2
    assert all(row["ms"]["packs"] < row["ms"]["odd"] < row["ms"]["slow"] for row in rows)
    calls = [each for each in dict.fromkeys(known)]
    assert calls[-3:] == ["to tiles", "packs tiles", "to plain"], "after those that read the formats' own order"
    assert any("fails failed: RuntimeError('no such symbol')" in line for line in said)
    assert "  not cannot: why" in said
    table = run.table(rows)
    assert table["packages"] == {"packs": f"torch {torch.__version__}"}
    ranked = [ours("slow", rank=1), ours("odd", rank=2), ours("packs", rank=3)]
    best = Tuning.of([table], CPU.name).ranked(CASE.need(CPU, 1), ranked)
    assert [each.backend for each in best] == ["packs", "odd", "slow"]


def test_only_what_is_asked_for_is_measured(known: list[str]) -> None:
    (rows,) = tuner(names=("slow", "reference")).rows([CASE])
    assert set(rows[0]["ms"]) == {"slow"}
    found, rejected = candidates(CASE, CPU, local_catalogue())
    assert "reference" not in {each.backend for each in (*found, *map(lambda r: Candidate(r.candidate), rejected))}


def test_packed_weights_come_back_even_from_a_failure(known: list[str]) -> None:
    w = CASE.weights("cpu")

    def fail(w: ExpertWeights) -> None:
        assert w.packing == "tiles"
        raise ValueError("midway")

    with pytest.raises(ValueError, match="midway"), packed(w, Candidate("packs").packer) as ready:
        fail(ready)
    assert known == ["to tiles", "to plain"]


# --- inputs and tables -----------------------------------------------------------------------------------------------


def test_inputs_touch_more_than_caches_hold() -> None:
    """As many calls as read 200 MiB of weights, at most 16; each token's experts differ; weights sum to one."""
    case = Case(SCHEMES["bf16"], 32, 512, 512, 2)
    w = case.weights("cpu")
    each = 3 * 512 * 512 * 2
    for tokens, calls in ((1, 16), (16, -(-200 * 2**20 // (32 * each))), (64, -(-200 * 2**20 // (32 * each)))):
        inputs = Inputs.of(case, w, tokens)
        assert len(inputs.each) == calls
        for x, ids, weights in inputs.each:
            assert x.shape == (tokens, 512)
            assert all(len(set(row)) == 2 for row in ids.tolist())
            assert torch.allclose(weights.sum(-1), torch.ones(tokens))
    assert Inputs.of(case, w, 1).touched == 2
    same = Inputs.of(case, w, 4), Inputs.of(case, w, 4)
    assert all(torch.equal(a, b) for one, other in zip(*(i.each for i in same), strict=True)
               for a, b in zip(one, other, strict=True)), "every kernel gets the same"  # fmt: skip


def test_a_row_names_each_backends_best() -> None:
    times = {Candidate("a", (("h", 1),)): 2.0, Candidate("a", (("h", 2),)): 1.23456789, Candidate("b"): 3.0}
    assert row_of(7, times) == {"tokens": 7, "ms": {"a": 1.2346, "b": 3.0}, "parameters": {"a": {"h": 2}}}
    assert row_of(7, {Candidate("b"): 3.0}) == {"tokens": 7, "ms": {"b": 3.0}}


def row(tokens: int, **ms: float) -> dict[str, Any]:
    head = {"format": "bf16", "encoding": "bf16", "experts": 8, "hidden": 64, "width": 32, "top_k": 2}
    return head | {"tokens": tokens, "ms": ms}


def test_tables_are_merged_row_by_row() -> None:
    first = row(1, a=1.0, b=2.0, c=4.0) | {"parameters": {"a": {"h": 1}, "b": {"h": 2}}}
    old = {"device": "h100", "packages": {"a": "x 1.0", "b": "y 1.0"}, "rows": [first, row(2, a=1.0)]}
    new = {"device": "h100", "packages": {"a": "x 1.1"}, "rows": [row(1, c=3.0) | {"parameters": {"c": {"h": 3}}}]}
    made = merged(old, new)
    assert made["packages"] == {"a": "x 1.1", "b": "y 1.0"}
    assert made["rows"] == [row(1, b=2.0, c=3.0) | {"parameters": {"b": {"h": 2}, "c": {"h": 3}}}], (
        "times of another release of `a` are gone, and with them the row that had no other"
    )
    again = merged(made, {**new, "rows": [row(3, a=9.0)]})
    assert [each["tokens"] for each in again["rows"]] == [1, 3]


def test_parameters_of_a_kernel_that_adapts_are_left_to_it() -> None:
    times = {Candidate("hopper", (("tile", 8),)): 0.2, Candidate("hopper", (("tile", 64),)): 0.1,
             Candidate("deep_gemm", (("height", 64),)): 0.3}  # fmt: skip
    row = row_of(16, times)
    assert row["ms"] == {"hopper": 0.1, "deep_gemm": 0.3}
    assert row["parameters"] == {"deep_gemm": {"height": 64}}
