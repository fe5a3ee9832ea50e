"""The choice by measured times: what a table says is what is planned, bucket by bucket."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import Any

import pytest

from moesaic.assets import read_table, tuning_tables
from moesaic.contracts.contract import Contract, Need
from moesaic.contracts.contract import Path as Way
from moesaic.contracts.plan import MixtureNeed, ModelPlan, Phase, Wishes
from moesaic.contracts.scheme import SCHEMES
from moesaic.errors import CheckpointError
from moesaic.hardware import GPUS
from moesaic.kernels import registry
from moesaic.models.build import spec_of
from moesaic.planning.mixture import find
from moesaic.planning.plan import choose, plan
from moesaic.planning.timetable import interpolated
from moesaic.planning.tuning import UNTUNED, Tuning
from moesaic.planning.verify import verify
from scripts import plan_fixtures
from tests.planning_support import CATALOGUE, need

SHAPE = {"experts": 256, "hidden": 7168, "width": 2048, "top_k": 8}
FP8 = {"format": "fp8_block", "encoding": "fp8_group128"}
MEASURED = {  # tokens -> milliseconds
    16: {"triton": 1.0, "swift": 2.0, "wide": 9.0},
    64: {"triton": 2.0, "swift": 2.0, "wide": 9.0},
    1024: {"triton": 8.0, "swift": 4.0, "wide": 4.0},
    4096: {"triton": 20.0, "swift": 16.0, "wide": 8.0},
}
OTHERS = tuple(
    Contract("experts", name, frozenset({"cuda"}), frozenset({"bfloat16"}), False, rank, package=name,
             formats=frozenset({"fp8_block"}), encodings=frozenset({"fp8_group128"}),
             path=Way(does=frozenset({"weights", "reduce"})))
    for name, rank in (("swift", 60), ("wide", 61), ("unmeasured", 55))
)  # fmt: skip
KNOWN = (*(c for c in CATALOGUE if c.op != "experts" or c.backend == "triton"), *OTHERS)


def table(times: Mapping[int, Mapping[str, float]] = MEASURED, **changes: Any) -> dict[str, Any]:
    rows = [{**SHAPE, **FP8, "tokens": tokens, "ms": dict(ms)} for tokens, ms in times.items()]
    packages = {"triton": "triton 3.6.0", "swift": "swift 1.2.3", "wide": "wide 0.1"}
    return {"device": "h100", "packages": packages, "rows": rows} | changes


def wanted(tokens: int, phase: Phase = "prefill", **changes: Any) -> MixtureNeed:
    return need("fp8", tokens=tokens, phase=phase, experts=256, **changes)


def chosen(tuning: Tuning, asks: MixtureNeed, catalogue: tuple[Contract, ...] = KNOWN) -> str:
    path, rejected = find(asks, catalogue, Wishes(), tuning)
    assert path is not None, rejected
    assert not verify(path, asks, catalogue)
    return path.stage("experts").kernel


WINNERS = [(1, "triton"), (16, "triton"), (1024, "swift"), (4096, "wide"), (9000, "wide")]


@pytest.mark.parametrize(("tokens", "winner"), WINNERS)
def test_the_fastest_measured_kernel_is_planned(tokens: int, winner: str) -> None:
    tuning = Tuning.of([table()], "NVIDIA H100 80GB HBM3")
    assert chosen(tuning, wanted(tokens)) == winner
    assert chosen(UNTUNED, wanted(tokens)) == "triton", "without a table the contracts' ranks decide"


def test_a_table_is_of_one_device() -> None:
    for device, same in (("h100", True), ("NVIDIA H100 PCIe", True), ("NVIDIA H200", False), ("b200", False)):
        assert bool(Tuning.of([table()], device).points) == same, device


def test_measured_kernels_stand_behind_the_best_of_them_and_others_keep_their_ranks() -> None:
    """By the logarithms of their times: the best rank that one of them has is the fastest's."""
    tuning = Tuning.of([table()], "h100")
    kernels = [c for c in KNOWN if c.op == "experts"]
    ranked = [(c.backend, c.rank) for c in tuning.ranked(wanted(4096), kernels)]
    assert ranked == [("wide", 50), ("swift", 50 + log(2)), ("triton", 50 + log(2.5)), ("unmeasured", 55)]
    eager = replace(OTHERS[2], rank=1)
    assert chosen(tuning, wanted(4096), (*KNOWN[:-1], eager)) == "unmeasured", "a user's own backend comes as it asks"


def test_a_kernel_that_ignores_the_batch_is_not_preferred_by_noise() -> None:
    """`swift_invariant` is the code of `swift` for most sizes: only where the batch must not matter is it taken."""
    twin = replace(OTHERS[0], backend="swift_invariant", batch_invariant=True, rank=62)
    times = {tokens: {**ms, "swift_invariant": 0.99 * ms["swift"]} for tokens, ms in MEASURED.items()}
    tuning = Tuning.of([table(times, packages={})], "h100")
    for tokens, winner in WINNERS:
        assert chosen(tuning, wanted(tokens), (*KNOWN, twin)) == winner
    assert tuning.buckets(wanted(9000), ("swift", "swift_invariant")) == (9000,)
    alone = tuple(each for each in KNOWN if each.backend != "swift")
    assert chosen(tuning, wanted(1024), (*alone, twin)) == "swift_invariant", "who is without a twin counts as measured"
    same = wanted(1024)
    same = replace(same, need=replace(same.need, batch_invariant=True))
    assert set(tuning.costs(same, ("swift", "swift_invariant"))) == {"swift", "swift_invariant"}


@pytest.mark.parametrize(("wide", "layout", "taken"), [
    (8.0, "plain", ["triton", "swift", "triton", "swift"]),  # a cell that `wide` would have is `swift`'s
    (0.1, "tiles", ["wide", "wide"]),  # so much faster at the end that it is worth its slowness before
])  # fmt: skip
def test_one_layout_of_the_weights_is_taken_by_the_product_of_times(wide: float, layout: str, taken: list[str]) -> None:
    spec = spec_of(plan_fixtures.read("deepseek-v3-fp8").config)
    kernels = [replace(c, packing="tiles") if c.backend == "wide" else c for c in KNOWN if c.backend != "unmeasured"]
    times = MEASURED | {4096: {"triton": 20.0, "swift": 16.0, "wide": wide}}
    made = plan(spec, GPUS["h100"], kernels, Wishes(max_batch=256), tuning=Tuning.of([table(times)], "h100"))
    assert isinstance(made, ModelPlan)
    cells = next(each for each in made.layers if each.cells).cells
    assert {cell.packed.packing for cell in cells} == {layout}
    assert [cell.path.stage("experts").kernel for cell in cells] == taken


def test_buckets_end_where_the_winner_changes() -> None:
    """Held against the definition: at each number of tokens the fastest by interpolation, found one by one."""
    tuning, most = Tuning.of([table()], "h100"), 5000
    names = ("triton", "swift", "wide")

    def fastest(tokens: int) -> str:
        costs = tuning.costs(wanted(tokens), names)
        return min(costs, key=lambda name: costs[name])

    ends = tuning.buckets(wanted(most), names)
    turns = [n for n in range(1, most) if fastest(n) != fastest(n + 1)]
    assert list(ends) == [*turns, most]
    assert len(ends) == 3
    assert ends[0] in (63, 64)
    assert ends[1] == 1023 or ends[1] == 1024
    assert tuning.buckets(wanted(most), ("triton",)) == (most,)
    assert tuning.buckets(wanted(1), names) == (1,)
    assert UNTUNED.buckets(wanted(most), names) == (most,)


def test_times_between_measured_ones_lie_on_a_power_law() -> None:
    points = [(1.0, 2.0), (4.0, 8.0), (16.0, 8.0)]
    assert interpolated(points, 0.25) == 2.0
    assert interpolated(points, 2.0) == pytest.approx(4.0)
    assert interpolated(points, 4.0) == pytest.approx(8.0)
    assert interpolated(points, 9.0) == pytest.approx(8.0)
    assert interpolated(points, 32.0) == pytest.approx(16.0)


def test_another_shape_is_judged_by_the_nearest_one_at_as_many_rows_per_expert() -> None:
    small = {"experts": 64, "hidden": 2048, "width": 1408, "top_k": 6}
    rows = [{**SHAPE, **FP8, "tokens": t, "ms": ms} for t, ms in MEASURED.items()]
    rows += [{**small, **FP8, "tokens": t, "ms": {"triton": 1.0, "swift": 2.0}} for t in (16, 4096)]
    tuning = Tuning.of([table(rows=rows)], "h100")
    assert chosen(tuning, wanted(4096)) == "wide"
    assert chosen(tuning, wanted(4096, hidden=4096, width=1024)) == "wide"
    near = replace(wanted(4096, hidden=2048, width=1408, top_k=6), experts=60)
    assert chosen(tuning, near) == "triton"
    half = replace(wanted(2048), experts=128)  # as many rows per expert as 4,096 tokens give to 256 experts
    assert tuning.costs(half, ["wide"]) == pytest.approx(tuning.costs(wanted(4096), ["wide"]))


def test_a_scheme_that_was_never_measured_is_left_to_the_ranks() -> None:
    tuning = Tuning.of([table()], "h100")
    assert tuning.costs(need("mxfp8", experts=256), ["triton"]) == {}
    assert tuning.buckets(need("mxfp8", experts=256), ["triton"]) == (64,)


def test_groups_and_static_scales_are_told_apart() -> None:
    int4 = {"format": "int4_g32", "encoding": "bf16", "tokens": 16, "ms": {"triton": 1.0}}
    nvfp4 = {"format": "nvfp4", "encoding": "nvfp4 (static)", "tokens": 16, "ms": {"triton": 2.0}}
    tuning = Tuning.of([table(rows=[SHAPE | int4, SHAPE | nvfp4])], "h100")
    one, two = {"triton": 1.0}, {"triton": 2.0}
    for name, found in (("wna16", {}), ("wna16_g32", one), ("nvfp4", two), ("nvfp4_dynamic", {})):
        scheme = SCHEMES[name]
        asks = need(name, experts=256, tokens=16, static=scheme.activation.static)
        asks = replace(asks, need=replace(asks.need, form=scheme.weight if scheme.weight.group else None))
        assert tuning.costs(asks, ["triton"]) == pytest.approx(found), name


def test_times_of_another_release_are_not_used() -> None:
    same, other = {"swift": "1.2.9", "wide": "0.1"}, {"swift": "1.3.0", "wide": "0.1"}
    assert set(Tuning.of([table()], "h100", same).costs(wanted(64), MEASURED[64])) == {"triton", "swift", "wide"}
    assert set(Tuning.of([table()], "h100", other).costs(wanted(64), MEASURED[64])) == {"triton", "wide"}


def test_a_users_own_table_counts_over_the_shipped_one() -> None:
    own = table({4096: {"triton": 1.0, "wide": 2.0}})
    assert chosen(Tuning.of([table(), own], "h100"), wanted(4096)) == "triton"
    assert chosen(Tuning.of([own, table()], "h100"), wanted(4096)) == "wide"


def test_a_choice_that_may_not_depend_on_the_batch_does_not() -> None:
    """Its cost is the mean of logarithms over all sizes; so is the winner."""
    tuning, names = Tuning.of([table()], "h100"), ("triton", "swift", "wide")
    costs = []
    for tokens in (1, 64, 5000):
        asks = wanted(tokens)
        asks = replace(asks, need=replace(asks.need, batch_invariant=True))
        costs.append(tuning.costs(asks, names))
        assert tuning.buckets(asks, names) == (tokens,)
    assert costs[0] == costs[1] == costs[2]
    means = {name: exp(sum(log(ms[name]) for ms in MEASURED.values()) / len(MEASURED)) for name in names}
    assert costs[0] == pytest.approx(means)


def test_parameters_come_from_the_nearest_point() -> None:
    made = table()
    made["rows"][0]["parameters"] = {"triton": {"height": 16}}
    made["rows"][3]["parameters"] = {"triton": {"height": 128, "stages": 3}}
    tuning = Tuning.of([made], "h100")
    assert tuning.parameters(wanted(8), "triton") == (("height", 16),)
    assert tuning.parameters(wanted(64), "triton") == ()
    assert tuning.parameters(wanted(9000), "triton") == (("height", 128), ("stages", 3))
    assert tuning.parameters(wanted(64), "reference") == ()


def test_the_plan_of_a_model_is_cut_where_another_kernel_wins() -> None:
    spec = spec_of(plan_fixtures.read("deepseek-v3-fp8").config)
    made_table = table()
    made_table["rows"][-1]["parameters"] = {"wide": {"height": 128}}
    made = plan(spec, GPUS["h100"], KNOWN, Wishes(max_batch=256), tuning=Tuning.of([made_table], "h100"))
    assert isinstance(made, ModelPlan)
    layer = next(each for each in made.layers if each.cells)
    cells = [(c.phase, c.path.stage("experts").kernel, dict(c.parameters)) for c in layer.cells]
    assert cells == [
        ("decode", "triton", {}), ("decode", "swift", {}),
        ("prefill", "triton", {}), ("prefill", "swift", {}), ("prefill", "wide", {"height": 128}),
    ]  # fmt: skip
    assert [c.tokens for c in layer.cells] == sorted(c.tokens for c in layer.cells[:2]) + sorted(
        c.tokens for c in layer.cells[2:]
    )
    assert layer.cells[1].tokens == 256
    assert layer.cells[-1].tokens == 8192
    forced = plan(spec, GPUS["h100"], KNOWN, Wishes(experts="swift"), tuning=Tuning.of([table()], "h100"))
    assert isinstance(forced, ModelPlan)
    assert {c.path.stage("experts").kernel for each in forced.layers for c in each.cells} == {"swift"}


def test_parameters_reach_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    class Backend:
        @staticmethod
        def experts(x: int, height: int = 0) -> tuple[int, int]:
            return x, height

    monkeypatch.setattr(registry, "backends", lambda: {"mine": Backend})
    ops: Any = registry.bind({"experts": "mine"}, {"experts": (("height", 64),)})
    assert ops.experts(1) == (1, 64)
    assert registry.bind({"experts": "mine"}).experts is Backend.experts


def test_what_ships_can_be_read() -> None:
    for each in tuning_tables():
        assert each["device"] in GPUS
        assert each["rows"]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "cannot be read"),
        ("[]", "lacks device, packages, rows"),
        ("{}", "lacks device, packages, rows"),
        (json.dumps({"device": "h100", "rows": []}), "lacks packages"),
        (json.dumps(table(rows=[{**SHAPE, **FP8, "ms": {}}])), "a positive tokens"),
        (json.dumps(table(rows=[{**SHAPE, **FP8, "tokens": 0, "ms": {}}])), "a positive tokens"),
        (json.dumps(table({16: {"triton": -1.0}})), "a time of triton"),
        (json.dumps(table(rows=[{**SHAPE, "tokens": 1, "ms": {}}])), "encoding, format"),
    ],
)
def test_a_file_that_is_no_table_is_named(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(CheckpointError) as error:
        read_table(path)
    assert what in str(error.value)
    assert "mine.json" in str(error.value)
    with pytest.raises(CheckpointError):
        tuning_tables(tmp_path)


def test_a_backend_is_preferred_by_the_rank_of_its_variant_that_fits() -> None:
    """DeepGEMM's projections are known for Blackwell, at a good rank, and built for Hopper, behind Triton's."""
    need = Need("cuda", "bfloat16", arch=90, format="fp8_block", encoding="fp8_group128")
    ranks = [("deep_gemm", 30, (100, 103)), ("triton", 50, (90, 103)), ("deep_gemm", 55, (90, 90))]
    known = [Contract("linear_quant", name, frozenset({"cuda"}), frozenset({"bfloat16"}), False, rank, arch=arch,
                      formats=frozenset({"fp8_block"}), encodings=frozenset({"fp8_group128"}))
             for name, rank, arch in ranks]  # fmt: skip
    made = choose("linear_quant", need, known, Wishes())
    assert (made.chosen, [each.candidate for each in made.rejected]) == ("triton", ["deep_gemm"])
    assert choose("linear_quant", need, known, Wishes(linear="deep_gemm")).chosen == "deep_gemm"
    assert choose("linear_quant", replace(need, arch=100), known, Wishes()).chosen == "deep_gemm"
