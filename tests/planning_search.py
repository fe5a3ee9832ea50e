"""Whether any legal chain exists, found without the planner: every stage that can be written down is tried, one after
another, and a chain is dropped as soon as the verifier's walk objects.

Equal questions are asked once: the walk looks at a need only through the duties, a few of its fields, and whether each
contract serves it, so that two needs with the same answers to those have the same chains (`question`). A test asks
some questions twice, once with all that is left out here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from moesaic.contracts.contract import Contract, Duty
from moesaic.contracts.plan import ADAPTERS, MixtureNeed, MixturePath, Stage, Wishes
from moesaic.contracts.scheme import ENCODINGS
from moesaic.planning.verify import Walk, verify

MAX_ADAPTERS = 2
LAYOUTS, IDS = ("tokens", "sorted", "slotted"), ("none", "global", "local")
NEXT = {
    "": ("gate",), "gate": ("cast", "route", "encode", "dispatch"), "cast": ("route", "encode", "dispatch"),
    "route": ("pack", "encode", "dispatch"), "pack": ("encode", "dispatch"),
    "encode": ("dispatch", "gather", "localise", "experts"),
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

Question = tuple[object, ...]


class Held(dict[Question, object]):
    """Answers by question, each asked once; and, under keys of their own, what is made of them."""

    def search(self, asked: Question, wanted: MixtureNeed, named: Sequence[Contract], wishes: Wishes) -> bool:
        """What is not held yet. asked: the same in short."""
        return exists(wanted, named, wishes)




class Recalling(Walk):
    """A walk that asks only once what does not depend on where a stage stands; those made of it share the answers."""

    def __init__(self, *of: Any) -> None:
        super().__init__(*of)
        self.asked: dict[tuple[str, frozenset[Duty], int], str | None] = {}

    def ever(self, stage: Stage, contract: Contract) -> str | None:
        key = (stage.role, stage.does, id(contract))
        if key not in self.asked:
            self.asked[key] = super().ever(stage, contract)
        return self.asked[key]


def subsets(duties: frozenset[Duty]) -> list[frozenset[Duty]]:
    every = sorted(duties)
    return [frozenset(some) for n in range(len(every) + 1) for some in itertools.combinations(every, n)]


def stages(role: str, walk: Walk) -> Iterator[Stage]:
    """Every stage of a role that can be written down for a walk's mixture."""
    wanted, catalogue = walk.need, walk.catalogue
    duties = subsets(wanted.duties() & OWNABLE.get(role, frozenset()))
    if role in ("gate", "cast"):
        yield from (Stage(role, role, dtype) for dtype in ("float32", "bfloat16"))  # type: ignore[arg-type]
    elif role in ("pack", "encode", "requantise", "decode", "gather", "localise"):
        for code, layout, ids in itertools.product(ENCODINGS, LAYOUTS, IDS):
            exact = not (role == "decode" and code == "bf16") and role != "pack"
            yield from (Stage(role, role, code, layout, ids, exact=e) for e in {True, exact})  # type: ignore[arg-type]
    elif role in ("scale", "shared"):
        yield Stage(role, role, "bf16", does=frozenset({"factor" if role == "scale" else "shared"}))  # type: ignore[arg-type]
    else:
        op = "dispatch" if role == "combine" else role
        for name, some in itertools.product(sorted({c.backend for c in catalogue if c.op == op}), duties):
            bare = Stage(role, name, "bf16", does=some)  # type: ignore[arg-type]
            if all(walk.ever(bare, c) for c in catalogue if c.op == op and c.backend == name):
                continue  # wherever it stands
            codes = ENCODINGS if role == "dispatch" else ("bf16",)
            for code, layout, ids in itertools.product(codes, LAYOUTS, IDS):
                yield replace(bare, encoding=code, layout=layout, ids=ids)  # type: ignore[arg-type]


def exists(wanted: MixtureNeed, catalogue: Sequence[Contract], wishes: Wishes) -> bool:
    """Whether any chain of at most MAX_ADAPTERS adapters passes the verifier."""
    start = Recalling(MixturePath(()), wanted, catalogue, wishes)
    table = {role: tuple(stages(role, start)) for role in NEXT if role}
    if not table["experts"] or not table["dispatch"]:
        return False
    seen: set[tuple[object, ...]] = set()

    def grow(walk: Walk, role: str, adapters: int, made: tuple[Stage, ...]) -> bool:
        tally = tuple(sorted(walk.tally.items()))
        told = tuple(each in walk.seen for each in ("route", "pack", "dispatch"))
        key = (role, adapters, walk.logits, walk.rows, walk.sent, told, tally)
        if key in seen:
            return False
        seen.add(key)
        if role in ("combine", "scale", "shared"):
            late = any("factor" in s.does and s.role == "scale" for s in made)
            fused = any("shared" in s.does and s.role == "experts" for s in made)
            weight = (1 / wanted.factor if late else 1.0) if fused else None
            if not verify(MixturePath(made, weight), wanted, catalogue, wishes):
                return True
        for after in NEXT[role]:
            count = adapters + (after in ADAPTERS)
            if count > MAX_ADAPTERS:
                continue
            for stage in table[after]:
                then = stepped(walk, stage)
                good = not then.wrong and max(then.tally.values(), default=0) <= 1
                if good and grow(then, after, count, (*made, stage)):
                    return True
        return False

    return grow(start, "", 0, ())


def stepped(walk: Walk, stage: Stage) -> Walk:
    """The walk one stage further; the walk itself stays as it is."""
    then = Walk.__new__(type(walk))
    then.__dict__.update(walk.__dict__)
    then.wrong, then.seen, then.tally = [], [*walk.seen], {**walk.tally}
    then.step(stage)
    return then


def question(wanted: MixtureNeed, catalogue: Sequence[Contract], wishes: Wishes) -> tuple[Question, list[Contract]]:
    """(equal for needs whose chains are the same but for names, the contracts that such a chain could name).

    Of backends that differ in nothing that the walk looks at, one is named. No contracts where there can be no chain.
    """
    walk = Walk(MixturePath(()), wanted, (), wishes)
    backends: dict[tuple[str, str], list[Contract]] = {}
    for op in ("experts", "dispatch", "route", "finish"):
        for each in catalogue:
            if each.op == op and serves(each, walk):
                backends.setdefault((op, each.backend), []).append(each)
        if op in ("experts", "dispatch") and not any(of == op for of, _ in backends):
            return (), []
    kinds = {(op, frozenset(sign(each, walk) for each in some)): some for (op, _), some in backends.items()}
    named = (wishes.lossy, wishes.hypothetical, wishes.router_dtype, wishes.wire)
    key = (wanted.need.encoding, wanted.static, wanted.ranks > 1, wanted.factor, wanted.shared,
           wanted.router_bias is None, frozenset(kinds), named)  # fmt: skip
    return key, [contract for some in kinds.values() for contract in some]


def serves(contract: Contract, walk: Walk) -> bool:
    """Whether this contract could be a stage at all."""
    stage = Stage("experts", contract.backend, "bf16")
    built = contract.built or walk.wishes.hypothetical
    return built and not contract.misses(walk.need.need) and walk.sizes(stage, contract) is None


def sign(contract: Contract, walk: Walk) -> object:
    """All that the walk asks of a contract that serves."""
    bias = walk.need.router_bias is None or walk.need.router_bias in contract.router_bias
    carried = contract.encodings if contract.op == "dispatch" else None
    return contract.path, contract.logits, carried, bias, walk.routes_so(contract)


def known(wanted: MixtureNeed, catalogue: Sequence[Contract], wishes: Wishes, held: Held) -> bool:
    """`exists`, asked once. Kernels and dispatchers that are demanded must be all that the catalogue has of them."""
    free = replace(wishes, experts=None, dispatch=None)
    asked, named = question(wanted, catalogue, free)
    if not named:
        return False
    if asked not in held:
        held[asked] = held.search(asked, wanted, named, free)
    return bool(held[asked])
