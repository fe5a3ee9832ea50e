"""The ways through a mixture layer: every legal chain of router, wire, dispatcher and expert kernel, best first.

What a layer holds once is common to its phases: the layout of its experts' weights, and the dtype of its gate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from moesaic.contracts.contract import Contract, Packed, Rejection, listed
from moesaic.contracts.plan import MixtureNeed, MixturePath, Wishes
from moesaic.planning.chain import Chain, Illegal, Parts, build, unsendable
from moesaic.planning.fits import misses
from moesaic.planning.tuning import UNTUNED, Tuning

Key = tuple[float, ...]
"""What is preferred is less: ranks of kernel and dispatcher, bytes moved by adapters, adapters, a fused shared expert,
rank of the router, a gate that rounds (expert choice is discontinuous)."""
How = tuple[Packed, str]
"""What is common to the phases of a layer: the layout of the experts' weights, and the dtype of the gate."""


@dataclass(frozen=True)
class Options:
    """The ways through one phase: for each `How` the best path of each pair of kernel and dispatcher."""

    best: dict[How, dict[str, tuple[Key, MixturePath]]]
    rejected: list[Rejection]
    routers: tuple[str, ...] = ()
    """Backends that could choose experts, best first; the others are rejected in `unable`."""
    unable: tuple[Rejection, ...] = ()

    def first(self, how: How) -> tuple[str, Key, MixturePath]:
        """(the pair, its key, its path) that is preferred among those of one `How`."""
        return min(((name, *found) for name, found in self.best[how].items()), key=lambda each: each[1])

    def taken(self, how: How) -> tuple[MixturePath, tuple[Rejection, ...]]:
        """The path, and why every other pair, kernel and dispatcher is not taken."""
        first, _, path = self.first(how)
        beaten = [Rejection(name, f"{first} is preferred") for name in self.best[how] if name != first]
        apart = [Rejection(name, unlike(other, how)) for other, found in self.best.items() for name in found
                 if name not in self.best[how]]  # fmt: skip
        chose = [stage.kernel for stage in path.stages if stage.role == "route"]
        idle = [Rejection(f"{name} as router", f"{chose[0]} is preferred" if chose else "the experts' kernel routes")
                for name in self.routers if name not in chose]  # fmt: skip
        every = unique([*beaten, *apart, *self.rejected, *idle, *self.unable])
        return path, tuple(each for each in every if each.candidate not in (first, path.stage("experts").kernel))


def unlike(other: How, how: How) -> str:
    if other[0] != how[0]:
        return f"takes expert weights as {other[0]}, and the layer holds them as {how[0]} for all phases"
    return f"is given logits in {other[1]}, and the layer's gate computes in {how[1]}"


def options(need: MixtureNeed, catalogue: Sequence[Contract], wishes: Wishes, tuning: Tuning = UNTUNED,
            wide: bool = False) -> Options:  # fmt: skip
    """The ways that there are.

    wide: also those with a gate in BF16 that neither the user nor a kernel asks for, as are taken where none is left.
    """
    wishes = wishes.during(need.phase)
    rejected: list[Rejection] = []
    of = {op: able(op, need, catalogue, wishes, rejected) for op in ("experts", "dispatch")}
    best: dict[How, dict[str, tuple[Key, MixturePath]]] = {}
    if not all(of.values()):
        return Options(best, rejected)
    of["experts"] = tuning.ranked(need, of["experts"])
    unable: list[Rejection] = []
    routers = able("route", need, catalogue, wishes, unable)
    unable = [Rejection(f"{each.candidate} as router", each.reason) for each in unable]
    rejected += unable if not routers else []
    of |= {"route": distinct(routers), "finish": distinct(able("finish", need, catalogue, wishes, []))}
    for kernel, dispatcher in product(of["experts"], of["dispatch"]):
        name, reasons, legal = f"{kernel.backend} with {dispatcher.backend}", dict[str, None](), False
        gates = ("float32", "bfloat16") if wide or kernel.path.routes else ("float32",)
        gates = (wishes.router_dtype,) if wishes.router_dtype else gates
        for parts in combinations(Chain(need, wishes), (kernel, dispatcher), of, gates, reasons):
            chain = Chain(need, wishes)
            try:
                path = build(chain, parts)
            except Illegal as error:
                reasons[str(error)] = None
                continue
            legal, found, key = True, best.setdefault((kernel.packed, parts.logits), {}), key_of(chain, parts)
            if name not in found or key < found[name][0]:
                found[name] = (key, path)
        if not legal:
            rejected.append(Rejection(name, "; ".join(reasons)))
    if not best and not wide:
        return options(need, catalogue, wishes, tuning, wide=True)
    return Options(best, rejected, tuple(dict.fromkeys(each.backend for each in routers)), tuple(unable))


def key_of(chain: Chain, parts: Parts) -> Key:
    ranks = (parts.kernel.rank, parts.dispatcher.rank)
    last = (parts.fused, parts.router.rank if parts.router else 0, parts.logits != "float32")
    return (*ranks, chain.cost(), chain.adapters, *last)


def combinations(start: Chain, pair: tuple[Contract, Contract], of: dict[str, list[Contract]], gates: Sequence[str],
                 reasons: dict[str, None]) -> Iterator[Parts]:  # fmt: skip
    """Over wires, dtypes of the gate, ways of the shared expert, routers and finishers; where there are none, why."""
    (kernel, dispatcher), need, wishes = pair, start.need, start.wishes
    wires = sorted(dispatcher.encodings & (frozenset({wishes.wire}) if wishes.wire else dispatcher.encodings))
    if not wires:
        reasons[f"{dispatcher.backend} carries {listed(dispatcher.encodings)}, not {wishes.wire}"] = None
    refused = {wire: reason for wire in wires if (reason := unsendable(start, wire))}
    if len(refused) == len(wires):
        reasons |= dict.fromkeys(refused.values())
    own, always = "shared" in kernel.path.can | kernel.path.does, "shared" in kernel.path.does
    ways = [fused for fused in (False, True) if not need.shared or (own if fused else not always)]
    routers: Sequence[Contract | None] = [None] if kernel.path.routes else of["route"]
    if not routers:
        reasons["no router serves this layer"] = None
    finishers: Sequence[Contract | None] = [None]
    if kernel.path.emits not in dispatcher.path.combines:
        finishers = of["finish"] if "tokens" in dispatcher.path.combines else ()
        if not finishers:
            reasons[f"{dispatcher.backend} takes no {kernel.path.emits} rows back"] = None
    for wire, logits in product([wire for wire in wires if wire not in refused], gates):
        for fused, router, finisher in product(ways if need.shared else (False,), routers, finishers):
            yield Parts(kernel, dispatcher, wire, logits, fused, router, finisher)


def find(need: MixtureNeed, catalogue: Sequence[Contract], wishes: Wishes,
         tuning: Tuning = UNTUNED) -> tuple[MixturePath | None, list[Rejection]]:  # fmt: skip
    """The best path of one phase by itself, and why every other kernel, dispatcher and pair of them was not taken."""
    held = options(need, catalogue, wishes, tuning)
    if not held.best:
        return None, unique(held.rejected)
    path, rejected = held.taken(min(held.best, key=lambda how: held.first(how)[1]))
    return path, list(rejected)


def in_common(each: Sequence[Options], two_layouts: bool) -> list[How] | None:
    """For each phase how it runs, such that all share what a layer holds once; None where they cannot.

    The least sum of keys over the phases is preferred. two_layouts: each may have its own layout of the weights.
    """
    found: list[tuple[Key, list[How]]] = []
    for logits in dict.fromkeys(dtype for held in each for _, dtype in held.best):
        mine = [[how for how in held.best if how[1] == logits] for held in each]
        shared = [how for how in mine[0] if all(how in others for others in mine)]
        ways = [[how] * len(each) for how in shared]
        if two_layouts and all(mine):
            ways.append([min(hows, key=lambda how: held.first(how)[1]) for held, hows in zip(each, mine, strict=True)])
        for hows in ways:
            keys = [held.first(how)[1] for held, how in zip(each, hows, strict=True)]
            found.append((tuple(map(sum, zip(*keys, strict=True))), hows))
    return min(found, key=lambda way: way[0])[1] if found else None


def able(op: str, need: MixtureNeed, catalogue: Sequence[Contract], wishes: Wishes,
         rejected: list[Rejection]) -> list[Contract]:  # fmt: skip
    """The contracts of an op that could serve alone, best rank first; of other backends those for the pair say why."""
    asked = [(each, misses(each, need, wishes)) for each in sorted(catalogue, key=lambda c: c.rank) if each.op == op]
    fit, pair = {each.backend for each, reason in asked if not reason}, (need.need.format, need.need.encoding)
    near = {each.backend for each, _ in asked if pair in (each.pairs or ())}
    for each, reason in asked:
        if reason and each.backend not in fit and (pair in (each.pairs or ()) or each.backend not in near):
            rejected.append(Rejection(each.backend, reason))
    return [each for each, reason in asked if not reason]


def distinct(contracts: Sequence[Contract]) -> list[Contract]:
    """Without those that differ from a better one in nothing that a chain asks."""
    found: dict[object, Contract] = {}
    for each in contracts:
        found.setdefault((each.logits, each.router_bias, each.path), each)
    return list(found.values())


def unique(rejected: Sequence[Rejection]) -> list[Rejection]:
    """One rejection per candidate: variants of one backend are told together."""
    reasons: dict[str, dict[str, None]] = {}
    for each in rejected:
        reasons.setdefault(each.candidate, {})[each.reason] = None
    return [Rejection(name, "; ".join(said)) for name, said in reasons.items()]
