"""A plan is returned if and only if a legal chain with at most two adapters exists; and mutants of plans are caught.

What is compared, and with what: `planning_product.py` and `planning_search.py`. Here are samples of the product; the
whole of it is `benchmarks/planner_proof.py`, whose counts are kept in benchmarks/results/planner-proof.json.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import machine, planner_proof
from benchmarks.planner_proof import Noted
from moesaic.contracts.plan import PerPhase, Wishes
from moesaic.contracts.scheme import SCHEMES
from moesaic.errors import UnsupportedError
from moesaic.formats.base import QuantTensor
from moesaic.formats.sizes import illegal_cut
from moesaic.planning import verify as verifier
from moesaic.planning.chain import MAX_ADAPTERS
from moesaic.planning.mixture import find
from moesaic.planning.verify import verify
from scripts import readme_tables
from tests import planning_search
from tests.planning_mutants import PATH_KINDS, PLAN_KINDS, path_mutants, plan_mutants
from tests.planning_product import (
    ANY,
    DISPATCHERS,
    KERNELS,
    LAYER_AXES,
    PATH_AXES,
    STRATA,
    ask_layers,
    ask_paths,
    check_layer,
    check_path,
    expected,
    layer_cells,
    path_cells,
    size_of,
)
from tests.planning_search import Held, exists, known, question
from tests.planning_support import CATALOGUE, need
from tests.test_planning_cells import configs


def some(index: int, step: int) -> dict[str, int]:
    """A stride that differs from stratum to stratum, so that all values of all axes meet."""
    return {"step": step, "first": index * 7919 % step}


def paths(step: int) -> Counter[str]:
    held = Held()
    count: Counter[str] = Counter()
    for i, stratum in enumerate(STRATA):
        for cell in path_cells(*stratum, **some(i, step)):
            assert check_path(cell, held) is None, cell
            count["planned" if known(cell.need, cell.catalogue, ANY, held) else "refused"] += 1
    return count


def layers(step: int) -> Counter[str]:
    held = Held()
    count: Counter[str] = Counter()
    for i, stratum in enumerate(STRATA):
        for cell in layer_cells(*stratum, **some(i, step)):
            verdict, wrong = check_layer(cell, held)
            assert wrong is None, (cell, wrong)
            count[verdict] += 1
    return count


def test_a_path_is_planned_if_and_only_if_a_chain_exists() -> None:
    assert planning_search.MAX_ADAPTERS == MAX_ADAPTERS == 2
    count = paths(20011)
    print(dict(count))
    assert count["planned"] > 5
    assert count["refused"] > 400


def test_a_layer_is_planned_if_and_only_if_both_phases_can_share_it_and_it_can_be_cut() -> None:
    count = layers(15013)
    print(dict(count))
    assert min(count[verdict] for verdict in ("planned", "no path", "no common layout", "illegal cut")) > 1


@pytest.mark.long
def test_the_same_for_many_more() -> None:
    print(dict(paths(499)), dict(layers(499)))


def test_equal_questions_have_equal_answers() -> None:
    """The search is asked once for needs that differ in nothing that it looks at. Asked with all that was left out, it
    says the same."""
    compared = 0
    for i, stratum in enumerate(STRATA):
        for cell in path_cells(*stratum, **some(i, 30011)):
            _, named = question(cell.need, cell.catalogue, ANY)
            if named and len(named) < len(cell.catalogue):
                assert exists(cell.need, named, ANY) == exists(cell.need, cell.catalogue, ANY), cell
                compared += 1
    assert compared > 20


def test_the_proof_is_able_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planner that never adapts rows, and one that is content with any layout of the weights, are found out."""
    with monkeypatch.context() as patch:
        patch.setattr("moesaic.planning.chain.MAX_ADAPTERS", 0)
        with pytest.raises(AssertionError, match="but a chain exists"):
            _paths_of_one_scheme("mxfp8")
    with monkeypatch.context() as patch:
        patch.setattr("moesaic.planning.plan.twice", lambda wishes: True)
        with pytest.raises(AssertionError, match="no common layout"):
            layers(15013)


def _paths_of_one_scheme(scheme: str) -> None:
    held = Held()
    for cell in path_cells(scheme, "cpu", 997):
        wrong = check_path(cell, held)
        assert wrong is None, wrong


def test_what_the_user_allows_to_be_rounded_widens_the_search_and_the_plans_alike() -> None:
    lossy, held = replace(ANY, lossy=True), Held()
    count: Counter[bool] = Counter()
    for i, stratum in enumerate(STRATA):
        for cell in path_cells(*stratum, **some(i, 37003)):
            path, _ = find(cell.need, cell.catalogue, lossy)
            assert (path is not None) == known(cell.need, cell.catalogue, lossy, held), cell
            assert path is None or verify(path, cell.need, cell.catalogue, lossy) == []
            count[path is not None] += 1
    assert count[True] > 10


# --- cuts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_cut_is_planned_if_and_only_if_the_weight_can_be_cut_so(scheme: str) -> None:
    """Gate and up apart, columns of down; where it is refused, the ways that are named are those that can be done."""
    form, meta = SCHEMES[scheme].weight, torch.empty(0, dtype=torch.bfloat16, device="meta")

    def cut(size: int, ways: int, axis: int) -> bool:
        segments, columns = ((size, size), 2048) if axis == 0 else ((2048,), size)
        try:
            weight = QuantTensor.empty(form, segments, columns, meta)
            part = weight.shard("columns" if axis else "rows", ways - 1, ways)
        except UnsupportedError:
            return False
        assert part.segments == ((size // ways, size // ways) if axis == 0 else (2048,))
        return True

    for size, ways, axis in itertools.product((96, 704, 768, 1408, 1536, 2048, 14336), (2, 3, 4, 6, 8, 16), (0, 1)):
        if axis and not cut(size, 1, 1):
            continue  # this width cannot be stored at all
        reason = illegal_cut(form, size, ways, axis)
        assert (reason is None) == cut(size, ways, axis), (size, ways, axis)
        if reason:
            named = reason.rpartition("legal: ")[2].removesuffix(" ways").split(", ")
            assert named == [str(n) for n in range(1, 129) if cut(size, n, axis)]


def test_static_scales_and_scales_of_whole_tensors_stay_with_every_part() -> None:
    for name, field in (("fp8_tensor", "scale"), ("nvfp4", "tensor_scale")):
        weight = QuantTensor.of(torch.randn(256, 256), SCHEMES[name].weight, (128, 128))
        whole = next(value for key, value in weight.parts.items() if value.numel() == 2)
        for axis in ("rows", "columns"):
            for rank in range(2):
                part = weight.shard(axis, rank, 2)  # type: ignore[arg-type]
                assert any(torch.equal(value, whole) for value in part.parts.values()), field


# --- mutants ---------------------------------------------------------------------------------------------------------


def test_mutants_of_good_paths_are_all_caught() -> None:
    count, missed = path_mutants()
    print(dict(count))
    assert missed == []
    assert set(count) == PATH_KINDS
    assert sum(count.values()) > 50_000


def test_mutants_of_good_plans_are_all_caught() -> None:
    count, missed = plan_mutants(schemes=("fp8", "mxfp8"), machines=("h100", "b200"))
    print(dict(count))
    assert missed == []
    assert set(count) == PLAN_KINDS
    assert sum(count.values()) > 2000


@pytest.mark.parametrize(
    ("rule", "kinds"),
    [("apart", {"a second layout"}), ("gates", {"two gate dtypes"}), ("packings", {"weights packed otherwise"})],
)
def test_a_verifier_without_a_rule_misses_its_mutants(
    rule: str, kinds: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rule of a layer is the only one that catches some mutant."""
    real = verifier.verify_layer
    says = {"apart": "held twice", "gates": "two dtypes", "packings": "does not take weights as"}[rule]

    def blind(*args: object) -> list[str]:
        return [each for each in real(*args) if says not in each]  # type: ignore[arg-type]

    monkeypatch.setattr(verifier, "verify_layer", blind)
    _, missed = plan_mutants(schemes=("mxfp8",), machines=("b200",))
    assert kinds & {each.partition(":")[0] for each in missed}


# --- wishes ----------------------------------------------------------------------------------------------------------


def test_wishes_are_honoured_or_refused() -> None:
    """A plan under wishes has what was wished for, in the phase for which it was; nothing is overridden."""
    for scheme, kernel, dispatcher in itertools.product(sorted(SCHEMES), KERNELS, DISPATCHERS):
        for wire in ("bf16", "mxfp8"):
            wishes = Wishes(PerPhase(kernel, "nobody"), PerPhase(dispatcher), wire, hypothetical=True)
            path, rejected = find(need(scheme, "b200", ranks=8), CATALOGUE, wishes)
            if path is None:
                assert rejected
                continue
            assert path.stage("experts").kernel == kernel
            assert path.stage("dispatch").kernel == dispatcher
            assert path.stage("dispatch").encoding == wire
        later, _ = find(need(scheme, "b200", ranks=8, phase="prefill"), CATALOGUE, wishes)
        assert later is None


# --- the whole ---


def test_what_is_asked_beforehand_is_all_that_cells_ask() -> None:
    noted, told, later = Noted(), set[object](), Noted()
    for stratum in STRATA[::31]:
        ask_paths(*stratum, noted, told)
        ask_layers(*stratum, noted)
    for i, stratum in enumerate(STRATA[::31]):
        for cell in path_cells(*stratum, **some(i, 211)):
            known(cell.need, cell.catalogue, ANY, later)
        for layer in layer_cells(*stratum, **some(i, 211)):
            expected(layer, later)
    assert len(later.asked) > 200
    assert set(later.asked) <= set(noted.asked)
    assert len({planner_proof.digest(question) for question in noted.asked}) == len(noted.asked)


def test_an_answer_is_found_by_its_question_and_not_sought_again() -> None:
    cell = next(cell for cell in path_cells("mxfp8", "h100") if question(cell.need, cell.catalogue, ANY)[1])
    asked, _ = question(cell.need, cell.catalogue, ANY)
    for answer in (True, False):
        held = planner_proof.Answered({planner_proof.digest(asked): answer})
        assert known(cell.need, cell.catalogue, ANY, held) == answer
        assert held.anew == 0
    lacking = planner_proof.Answered({})
    assert known(cell.need, cell.catalogue, ANY, lacking) == known(cell.need, cell.catalogue, ANY, Held())
    assert lacking.anew == 1


@pytest.mark.long
def test_a_run_that_was_ended_goes_on_and_the_result_is_of_all_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With little of everything: a stratum in which nothing can be planned, two questions, a configuration."""
    some_cells = [cell for cell in path_cells("mxfp8", "h100", 499) if question(cell.need, cell.catalogue, ANY)[1]][:2]
    monkeypatch.setattr(planner_proof, "STRATA", (("bf16", "mi300x"),))
    monkeypatch.setattr(planner_proof, "ON", ("cpu",))
    monkeypatch.setattr(planner_proof, "CHUNKS", 3)
    monkeypatch.setattr(planner_proof, "configs", lambda: itertools.islice(configs(), 1))
    monkeypatch.setattr(planner_proof, "ask_layers", lambda scheme, on, held: [
        known(cell.need, cell.catalogue, ANY, held) for cell in some_cells])  # fmt: skip
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    say, result = ["--state", str(tmp_path / "state")], tmp_path / "planner-proof.json"
    assert planner_proof.main([*say, "--minutes", "0"]) == planner_proof.UNFINISHED
    assert not list(tmp_path.rglob("*.json"))
    assert planner_proof.main(say) == 0
    made = json.loads(result.read_text())
    assert made["paths"] == {"refused": size_of(PATH_AXES)}
    assert sum(made["layers"].values()) == size_of(LAYER_AXES)
    assert made["run"]["equal"] > 2
    assert set(made["mutants"]) == PATH_KINDS | PLAN_KINDS
    assert (made["questions"], made["mismatches"], made["mutants_missed"]) == (2, 0, 0)
    assert "Disagreements: none" in readme_tables.planner_proof(made)
    result.unlink()
    next(tmp_path.rglob("layers-bf16-mi300x.json")).unlink()
    capsys.readouterr()
    assert planner_proof.main(say) == 0
    told = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if "processor time" in line]
    assert told == ["layers bf16 mi300x"]
    again = json.loads(result.read_text())
    assert all(again[key] == made[key] for key in made if not key.startswith("seconds"))


def test_several_processes_count_the_same(tmp_path: Path) -> None:
    say = ["--only", "mxfp8:b200", "--parts", "layers", "paths", "--step", "9973", "--state", str(tmp_path)]
    told = []
    for processes in ("1", "2"):
        command = [sys.executable, planner_proof.__file__, *say, "--processes", processes]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        told.append(sorted(line.partition("}")[0] for line in done.stdout.splitlines()))
    assert told[0] == told[1]
    assert len(told[0]) == 3
    assert not list(tmp_path.rglob("*.json")), "a sample is not kept"


@pytest.mark.skipif(not planner_proof.RESULT.exists(), reason="not run yet: python benchmarks/planner_proof.py")
def test_the_kept_result_is_of_the_whole_product_and_found_nothing() -> None:
    """Of the catalogue that it was run with: it takes long, and kernels come."""
    kept = json.loads(planner_proof.RESULT.read_text(encoding="utf-8"))
    assert kept["mismatches"] == 0
    assert set(kept["axes"]) == set(planner_proof.AXES)
    for part in ("paths", "layers"):
        cells = kept["axes"]["schemes x hardware"] * kept["axes"][f"each stratum, {part}"]
        assert sum(kept[part].values()) == cells > 10**6
    assert set(kept["mutants"]) == PATH_KINDS | PLAN_KINDS
    assert kept["mutants_missed"] == 0
