"""A plan is returned if and only if a legal chain with at most two adapters exists; and mutants of plans are caught.

The search here knows nothing of how plans are made: it tries every stage that can be written down, one after another,
and drops a chain as soon as the verifier's walk objects. `make test-long` runs the whole product of cells.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace

import pytest

from moesaic.contracts.contract import Contract, Duty
from moesaic.contracts.plan import ADAPTERS, MixtureNeed, MixturePath, Stage, Wishes
from moesaic.contracts.scheme import ENCODINGS, SCHEMES
from moesaic.planning.mixture import MAX_ADAPTERS, find
from moesaic.planning.verify import Walk, verify
from tests.planning_support import CATALOGUE, HYPOTHETICAL, need

LAYOUTS, IDS = ("tokens", "sorted", "slotted"), ("none", "global", "local")
NEXT = {
    "": ("gate",), "gate": ("cast", "route", "encode", "dispatch"), "cast": ("route", "encode", "dispatch"),
    "route": ("encode", "dispatch"), "encode": ("dispatch", "gather", "localise", "experts"),
    "dispatch": ("encode", "requantise", "decode", "gather", "localise", "experts"),
    "requantise": ("gather", "localise", "experts"), "decode": ("encode", "gather", "localise", "experts"),
    "gather": ("encode", "requantise", "decode", "localise", "experts"),
    "localise": ("encode", "requantise", "decode", "gather", "experts"),
    "experts": ("finish", "combine"), "finish": ("combine",), "combine": ("scale", "shared"), "scale": ("shared",),
    "shared": (),
}  # fmt: skip


OWNABLE: dict[str, frozenset[Duty]] = {
    "route": frozenset({"route", "factor"}), "dispatch": frozenset(),
    "finish": frozenset({"weights", "reduce", "factor"}),
    "experts": frozenset({"route", "weights", "factor", "reduce", "shared"}),
    "combine": frozenset({"weights", "reduce", "factor"}),
}  # fmt: skip
"""What a stage of a role could own at all; anything else is tried by the mutants."""


def subsets(duties: frozenset[Duty]) -> list[frozenset[Duty]]:
    every = sorted(duties)
    return [frozenset(some) for n in range(len(every) + 1) for some in itertools.combinations(every, n)]


def stages(role: str, wanted: MixtureNeed, catalogue: Sequence[Contract]) -> Iterator[Stage]:
    """Every stage of a role that can be written down for this mixture."""
    duties = subsets(wanted.duties() & OWNABLE.get(role, frozenset()))
    if role in ("gate", "cast"):
        yield from (Stage(role, role, dtype) for dtype in ("float32", "bfloat16"))  # type: ignore[arg-type]
    elif role in ("encode", "requantise", "decode", "gather", "localise"):
        for code, layout, ids in itertools.product(ENCODINGS, LAYOUTS, IDS):
            exact = not (role == "decode" and code == "bf16")
            yield from (Stage(role, role, code, layout, ids, exact=e) for e in {True, exact})  # type: ignore[arg-type]
    elif role in ("scale", "shared"):
        yield Stage(role, role, "bf16", does=frozenset({"factor" if role == "scale" else "shared"}))  # type: ignore[arg-type]
    else:
        op = "dispatch" if role == "combine" else role
        able = {c.backend for c in catalogue if c.op == op and not c.misses(replace(wanted.need, capturable=False))}
        for name, some in itertools.product(sorted(able), duties):
            codes = ENCODINGS if role == "dispatch" else ("bf16",)
            for code, layout, ids in itertools.product(codes, LAYOUTS, IDS):
                yield Stage(role, name, code, layout, ids, some)  # type: ignore[arg-type]


def exists(wanted: MixtureNeed, catalogue: Sequence[Contract], lossy: bool = False) -> bool:
    """Whether any chain of at most MAX_ADAPTERS adapters passes the verifier."""
    table = {role: tuple(stages(role, wanted, catalogue)) for role in NEXT if role}
    if not table["experts"] or not table["dispatch"]:
        return False
    seen: set[tuple[object, ...]] = set()

    def grow(walk: Walk, role: str, adapters: int, made: tuple[Stage, ...]) -> bool:
        tally = tuple(sorted(walk.tally.items()))
        key = (role, adapters, walk.logits, walk.rows, walk.sent, "route" in walk.seen, tally)
        if key in seen:
            return False
        seen.add(key)
        if role in ("combine", "scale", "shared"):
            late = any("factor" in s.does and s.role == "scale" for s in made)
            fused = any("shared" in s.does and s.role == "experts" for s in made)
            weight = (1 / wanted.factor if late else 1.0) if fused else None
            if not verify(MixturePath(made, weight), wanted, catalogue, lossy):
                return True
        for after in NEXT[role]:
            count = adapters + (after in ADAPTERS)
            if count > MAX_ADAPTERS:
                continue
            for stage in table[after]:
                then = copy(walk)
                then.wrong, then.seen, then.tally = [], [*walk.seen], {**walk.tally}
                then.step(stage)
                good = not then.wrong and max(then.tally.values(), default=0) <= 1
                if good and grow(then, after, count, (*made, stage)):
                    return True
        return False

    return grow(Walk(MixturePath(()), wanted, catalogue, lossy), "", 0, ())


def narrowed(wanted: MixtureNeed, kernel: str, dispatcher: str) -> list[Contract]:
    """The catalogue with one expert kernel and one dispatcher."""
    keep = {"experts": kernel, "dispatch": dispatcher}
    return [c for c in CATALOGUE if keep.get(c.op, c.backend) == c.backend]


KERNELS = sorted({c.backend for c in CATALOGUE if c.op == "experts"})
DISPATCHERS = sorted({c.backend for c in CATALOGUE if c.op == "dispatch"})


def cells() -> Iterator[tuple[MixtureNeed, str, str]]:
    """schemes x kernels x dispatchers x hardware x phases x (grouped, router bias, factor, shared) x widths x ep."""
    flags = list(itertools.product((0, 4), (None, "float32"), (1.0, 2.5), (False, True)))
    axes = (sorted(SCHEMES), KERNELS, DISPATCHERS, ("cpu", "a100", "h100", "b200"), ((1, 2048), (8, 2048), (1, 96)),
            (("decode", 64), ("prefill", 8192)), flags)  # fmt: skip
    for scheme, kernel, dispatcher, on, (ranks, width), (phase, tokens), flag in itertools.product(*axes):
        grouped, bias, factor, shared = flag
        made = need(scheme, on, groups_kept=grouped, router_bias=bias, factor=factor, shared=shared, ranks=ranks,
                    width=width, phase=phase, tokens=tokens, scoring="sigmoid" if bias else "softmax")  # fmt: skip
        yield made, kernel, dispatcher


def compare(chosen: Iterator[tuple[MixtureNeed, str, str]]) -> Counter[str]:
    count: Counter[str] = Counter()
    for wanted, kernel, dispatcher in chosen:
        catalogue = narrowed(wanted, kernel, dispatcher)
        path, rejected = find(wanted, catalogue, HYPOTHETICAL)
        assert (path is not None) == exists(wanted, catalogue), (wanted, kernel, dispatcher, path, rejected)
        if path is not None:
            assert verify(path, wanted, catalogue) == [], path
        else:
            assert rejected, "a refusal names every reason"
        count["planned" if path else "refused"] += 1
    return count


def test_a_plan_is_returned_if_and_only_if_a_chain_exists() -> None:
    """Every 997th cell: the stride is prime to every axis, so that all values of all axes meet."""
    count = compare(itertools.islice(cells(), 0, None, 997))
    print(dict(count))
    assert count["planned"] > 5
    assert count["refused"] > 100


@pytest.mark.long
def test_the_same_for_the_whole_product() -> None:
    count = compare(cells())
    print(dict(count))
    assert count["planned"] > 2000


def mutants(path: MixturePath, wanted: MixtureNeed) -> Iterator[tuple[str, MixturePath]]:
    """(what was changed, the path with one thing changed) of everything that a bug might change."""

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


def test_mutants_of_good_plans_are_all_caught() -> None:
    count: Counter[str] = Counter()
    for scheme, on, ranks in itertools.product(sorted(SCHEMES), ("cpu", "h100", "b200"), (1, 8)):
        wanted = need(scheme, on, ranks=ranks)
        for kernel, dispatcher in itertools.product(KERNELS, DISPATCHERS):
            catalogue = narrowed(wanted, kernel, dispatcher)
            path, _ = find(wanted, catalogue, HYPOTHETICAL)
            if path is None:
                continue
            for what, mutant in mutants(path, wanted):
                count[what] += 1
                assert verify(mutant, wanted, catalogue), (what, kernel, dispatcher, scheme, mutant)
    print(dict(count))
    assert set(count) == {"owner dropped", "second owner", "stage dropped", "stage doubled", "layout swapped",
                          "encoding changed", "id space flipped", "kernel unknown", "silent rounding",
                          "shared weight"}  # fmt: skip
    assert sum(count.values()) > 2000


def test_wishes_are_honoured_or_refused() -> None:
    """A plan under wishes has what was wished for; nothing is overridden."""
    for scheme, kernel, dispatcher in itertools.product(sorted(SCHEMES), KERNELS, DISPATCHERS):
        for wire in ("bf16", "mxfp8"):
            wishes = Wishes(experts=kernel, dispatch=dispatcher, wire=wire, hypothetical=True)
            path, rejected = find(need(scheme, "b200", ranks=8), CATALOGUE, wishes)
            if path is None:
                assert rejected
                continue
            assert path.stage("experts").kernel == kernel
            assert path.stage("dispatch").kernel == dispatcher
            assert path.stage("dispatch").encoding == wire
