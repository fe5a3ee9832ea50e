"""Good plans with one thing changed, of everything that a bug might change: the verifier must object to each.

Two sorts: mutants of a path, and mutants of a whole model's plan (what phases share, what was demanded, the cache).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from moesaic.contracts.contract import Choice, Need, Packed
from moesaic.contracts.plan import Cell, MixtureNeed, MixturePath, ModelPlan, PerPhase, Stage, Wishes
from moesaic.contracts.scheme import ENCODINGS, KV_FORMATS, SCHEMES
from moesaic.planning.mixture import find, options
from moesaic.planning.plan import plan
from moesaic.planning.verify import verify, verify_model
from tests.planning_product import (
    ANY,
    DISPATCHERS,
    KERNELS,
    MACHINES,
    PHASES,
    RANKS,
    WHOLE,
    LayerCell,
    asked,
    mixture_asked,
    model,
    narrowed,
)
from tests.planning_search import LAYOUTS

PATH_KINDS = {"owner dropped", "second owner", "stage dropped", "stage doubled", "layout swapped", "encoding changed",
              "id space flipped", "kernel unknown", "silent rounding", "shared weight"}  # fmt: skip
PLAN_KINDS = {"weights packed otherwise", "a second layout", "two gate dtypes", "cell dropped", "phases swapped",
              "bucket changed", "cache format changed", "cache unread", "kernel of an op", "demand overridden",
              "not built", "not capturable"}  # fmt: skip
ON = ("cpu", "h100", "b200")
PACKINGS = sorted({c.packed for c in WHOLE if c.op == "experts"} | {Packed("interleaved", "nowhere")})


# --- of a path -------------------------------------------------------------------------------------------------------


def of_path(path: MixturePath, wanted: MixtureNeed) -> Iterator[tuple[str, MixturePath]]:
    """(kind, the path with one thing changed)."""

    def put(i: int, *stage: Stage) -> MixturePath:
        return replace(path, stages=path.stages[:i] + stage + path.stages[i + 1 :])

    for i, stage in enumerate(path.stages):
        for duty in stage.does:
            yield "owner dropped", put(i, replace(stage, does=stage.does - {duty}))
        for duty in wanted.duties() - stage.does:
            yield "second owner", put(i, replace(stage, does=stage.does | {duty}))
        yield "stage dropped", put(i)
        yield "stage doubled", put(i, stage, stage)
        if stage.role not in ("gate", "cast"):
            for layout in set(LAYOUTS) - {stage.layout}:
                yield "layout swapped", put(i, replace(stage, layout=layout))  # type: ignore[arg-type]
            for code in set(ENCODINGS) - {stage.encoding}:
                yield "encoding changed", put(i, replace(stage, encoding=code))
        if stage.ids != "none":
            yield "id space flipped", put(i, replace(stage, ids="local" if stage.ids == "global" else "global"))
        if stage.role in ("route", "dispatch", "experts", "finish", "combine"):
            yield "kernel unknown", put(i, replace(stage, kernel="nobody"))
        yield "silent rounding", put(i, replace(stage, exact=False)) if stage.role != "cast" else put(i)
    for weight in {None, 1.0, 1 / 2.5, 2.5} - {path.shared_weight}:
        yield "shared weight", replace(path, shared_weight=weight)


def path_mutants(machines: Sequence[str] = ON) -> tuple[Counter[str], list[str]]:
    """(how many of each kind, those that were not caught) of every path that can be planned with one pair."""
    count: Counter[str] = Counter()
    missed = []
    for scheme, on, ranks in itertools.product(sorted(SCHEMES), machines, (1, 8)):
        wanted = replace(asked(scheme, on), ranks=ranks)
        for kernel, dispatcher in itertools.product(KERNELS, DISPATCHERS):
            catalogue = narrowed(kernel, dispatcher)
            path, _ = find(wanted, catalogue, ANY)
            for what, mutant in of_path(path, wanted) if path else ():
                count[what] += 1
                if not verify(mutant, wanted, catalogue, ANY):
                    missed.append(f"{what}: {kernel} with {dispatcher}, {scheme} on {on}: {mutant}")
    return count, missed


# --- of a plan -------------------------------------------------------------------------------------------------------

Needs = Mapping[int, list[MixtureNeed]]


def of_plan(made: ModelPlan, needs: Needs) -> Iterator[tuple[str, ModelPlan]]:
    """(kind, the plan with one thing changed)."""
    for i, layer in enumerate(made.layers):

        def put(*cells: Cell, i: int = i) -> ModelPlan:
            return replace(made, layers=(*made.layers[:i], replace(made.layers[i], cells=cells), *made.layers[i + 1 :]))

        one, two = layer.cells
        yield "cell dropped", put(one)
        yield "phases swapped", put(replace(one, phase=two.phase), replace(two, phase=one.phase))
        yield "bucket changed", put(one, replace(two, tokens=two.tokens * 2))
        for packed in PACKINGS:
            if packed != one.packed:
                yield "weights packed otherwise", put(replace(one, packed=packed), two)
                yield "weights packed otherwise", put(one, replace(two, packed=packed))
                yield "weights packed otherwise", put(replace(one, packed=packed), replace(two, packed=packed))
        for kind, cells in apart(made, layer.cells, needs[layer.layers[0]]):
            yield kind, replace(put(*cells), wishes=free(made.wishes))  # nobody demanded what this changes
        yield "cache unread", replace(made, layers=(*made.layers[:i], replace(layer, attention="nobody")))
    for kv in set(KV_FORMATS) - {made.kv}:
        yield "cache format changed", replace(made, kv=kv)
        yield "cache format changed", replace(made, wishes=replace(made.wishes, kv=kv))
    for need, choices in made.ops.items():
        for j, choice in enumerate(choices):
            for other in {"nobody", *others(choice, need)}:
                changed = (*choices[:j], replace(choice, chosen=other), *choices[j + 1 :])
                yield "kernel of an op", replace(made, ops={**made.ops, need: changed})
    yield from (("demand overridden", replace(made, wishes=wishes)) for wishes in demands(made))
    real = replace(made, wishes=replace(made.wishes, hypothetical=False))
    if unbuilt(made):
        yield "not built", real


def free(wishes: Wishes) -> Wishes:
    return replace(wishes, experts=None, dispatch=None, wire=None, router_dtype=None)


def others(choice: Choice, need: Need) -> set[str]:
    """Backends that do not serve a need at all."""
    named = [c for c in WHOLE if c.op == choice.op]
    return {c.backend for c in named} - {c.backend for c in named if not c.misses(need)}


def apart(made: ModelPlan, cells: tuple[Cell, ...], needs: list[MixtureNeed]) -> Iterator[tuple[str, tuple[Cell, ...]]]:
    """Cells of which each is right by itself, and both are not."""
    for at, need in enumerate(needs):
        held = options(need, WHOLE, free(made.wishes), wide=True)
        for (packed, gate), found in held.best.items():
            same = cells[at].packed == packed, cells[at].path.stage("gate").encoding == gate
            for _, path in list(found.values())[:2]:
                cell = replace(cells[at], path=path, packed=packed)
                both = (cell, cells[1]) if at == 0 else (cells[0], cell)
                if not same[0] and not made.wishes.two_layouts:
                    yield "a second layout", both
                if not same[1]:
                    yield "two gate dtypes", both
    if not capturable(cells[1].path, needs[0]):
        yield "not capturable", (replace(cells[0], path=cells[1].path, packed=cells[1].packed), cells[1])


def capturable(path: MixturePath, decode: MixtureNeed) -> bool:
    """Whether no kernel of a path is one that may not decode."""
    ops = {"dispatch": "dispatch", "experts": "experts", "route": "route"}
    return not decode.need.capturable or all(
        any(c.capturable for c in WHOLE if c.op == ops[stage.role] and c.backend == stage.kernel)
        for stage in path.stages if stage.role in ops
    )  # fmt: skip


def demands(made: ModelPlan) -> Iterator[Wishes]:
    """Wishes that the plan does not honour, in one phase or in both."""
    (cells,) = [layer.cells for layer in made.layers]
    for name, role in (("experts", "experts"), ("dispatch", "dispatch"), ("wire", "dispatch")):
        got = [cell.path.stage(role) for cell in cells]  # type: ignore[arg-type]
        had = [stage.encoding if name == "wire" else stage.kernel for stage in got]
        yield replace(made.wishes, **{name: "other"})
        yield replace(made.wishes, **{name: PerPhase(had[0], "other")})
        yield replace(made.wishes, **{name: PerPhase("other", had[1])})
    gate = cells[0].path.stage("gate").encoding
    yield replace(made.wishes, router_dtype="bfloat16" if gate == "float32" else "float32")


def unbuilt(made: ModelPlan) -> bool:
    """Whether a plan names any expert kernel or dispatcher that cannot run yet."""
    names = {stage.kernel for layer in made.layers for cell in layer.cells for stage in cell.path.stages
             if stage.role in ("experts", "dispatch")}  # fmt: skip
    built = {c.backend for c in WHOLE if c.built and c.op in ("experts", "dispatch")}
    return bool(names - built)


def plan_mutants(schemes: Sequence[str] = tuple(sorted(SCHEMES)),
                 machines: Sequence[str] = ON) -> tuple[Counter[str], list[str]]:  # fmt: skip
    """The same of plans of one layer: the best one, and one of each pair of kernels that differ."""
    count: Counter[str] = Counter()
    missed = []
    pairs = [("", ""), *((one, two) for one, two in itertools.product(KERNELS, KERNELS) if one < two)]
    for scheme, on, (tp, ep) in itertools.product(schemes, machines, RANKS[::3]):
        for pair in pairs:
            cell = LayerCell(scheme, on, pair, tp, ep, 2048, ("sigmoid", True, True), two_layouts=False)
            wishes = cell.wishes if pair[0] else replace(cell.wishes, experts=None)
            made = plan(model(scheme, 2048, cell.routing), MACHINES[on], WHOLE, wishes)
            if not isinstance(made, ModelPlan):
                continue
            needs = {0: [mixture_asked(cell, phase, tokens, made.base.capturable) for phase, tokens in PHASES]}
            assert verify_model(made, needs, WHOLE) == []
            for what, mutant in of_plan(made, needs):
                count[what] += 1
                if not verify_model(mutant, needs, WHOLE):
                    missed.append(f"{what}: {cell}")
    return count, missed
