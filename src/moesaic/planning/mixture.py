"""The path of a mixture layer: every legal chain of router, wire, dispatcher and expert kernel, best first.

A chain is built forwards from what travels: the rows' encoding, their layout, the id space of the expert ids; where two
stages differ, an adapter stands between them, at most `MAX_ADAPTERS` in a chain. Duties (see `contracts.Duty`) are
then given to exactly one owner each, or the chain is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from moesaic.contracts.contract import Contract, Duty, Rejection, listed
from moesaic.contracts.plan import ADAPTERS, Ids, MixtureNeed, MixturePath, Stage, Wishes
from moesaic.planning.fits import misses
from moesaic.planning.tuning import UNTUNED, Tuning

MAX_ADAPTERS = 2
BITS = {"bf16": 16.0, "float32": 32.0, "fp8_tensor": 8.0, "fp8_token": 8.0, "fp8_group128": 8.25, "mxfp8": 8.25,
        "nvfp4": 4.5}  # fmt: skip
"""Bits per element on the wire, scales included."""
EXACT_IN_BF16 = frozenset({"mxfp8"})
"""Encodings whose values are BF16 numbers (FP32 scales are not)."""


class Illegal(Exception):
    """This chain cannot be: the message says why."""


@dataclass
class Chain:
    """A chain under construction: stages so far, and what travels behind the last one."""

    need: MixtureNeed
    wishes: Wishes
    encoding: str = "bf16"
    layout: str = "tokens"
    ids: Ids = "none"
    stages: list[Stage] = field(default_factory=list)

    def add(self, stage: Stage) -> None:
        self.stages.append(stage)
        if stage.role not in ("gate", "cast"):
            self.encoding, self.layout, self.ids = stage.encoding, stage.layout, stage.ids
        if sum(each.role in ADAPTERS for each in self.stages) > MAX_ADAPTERS:
            raise Illegal(f"needs more than {MAX_ADAPTERS} adapters")

    def rows(self) -> int:
        """Rows behind the last stage: dispatch, sorting and slots hold one per chosen expert."""
        return self.need.tokens * (1 if self.layout == "tokens" else self.need.top_k)

    def cost(self) -> int:
        return sum(stage.nbytes for stage in self.stages)


Found = tuple[MixturePath | None, list[Rejection]]


def find(need: MixtureNeed, catalogue: Sequence[Contract], wishes: Wishes, tuning: Tuning = UNTUNED) -> Found:
    """The best path, and why every other kernel, dispatcher and pair of them was not taken."""
    rejected: list[Rejection] = []
    kernels, dispatchers = (able(op, need, catalogue, wishes, rejected) for op in ("experts", "dispatch"))
    kernels = tuning.ranked(need, kernels)
    best: dict[str, tuple[tuple[int, ...], MixturePath]] = {}
    for kernel in kernels:
        for dispatcher in dispatchers:
            name = f"{kernel.backend} with {dispatcher.backend}"
            for key, path in chains(need, (kernel, dispatcher), catalogue, wishes, rejected):
                if name not in best or key < best[name][0]:
                    best[name] = (key, path)
    if not best:
        return None, unique(rejected)
    first = min(best, key=lambda name: best[name][0])
    rejected = [Rejection(name, f"{first} is preferred") for name in best if name != first] + rejected
    return best[first][1], unique([each for each in rejected if each.candidate != first])


def able(op: str, need: MixtureNeed, catalogue: Sequence[Contract], wishes: Wishes,
         rejected: list[Rejection]) -> list[Contract]:  # fmt: skip
    """The contracts of an op that could serve by themselves, best rank first; the others are rejected."""
    found = []
    for contract in sorted((c for c in catalogue if c.op == op), key=lambda c: c.rank):
        if reason := misses(contract, need, wishes):
            rejected.append(Rejection(contract.backend, reason))
        else:
            found.append(contract)
    return found


def unique(rejected: list[Rejection]) -> list[Rejection]:
    """One rejection per candidate: variants of one backend are told together."""
    reasons: dict[str, dict[str, None]] = {}
    for each in rejected:
        reasons.setdefault(each.candidate, {})[each.reason] = None
    return [Rejection(name, "; ".join(said)) for name, said in reasons.items()]


def chains(need: MixtureNeed, pair: tuple[Contract, Contract], catalogue: Sequence[Contract], wishes: Wishes,
           rejected: list[Rejection]) -> Iterator[tuple[tuple[int, ...], MixturePath]]:  # fmt: skip
    """(sort key, path) of every legal chain of a kernel and a dispatcher: over wires, logit dtypes and sharing."""
    kernel, dispatcher = pair
    wires = dispatcher.encodings & (frozenset({wishes.wire}) if wishes.wire else dispatcher.encodings)
    refused = f"{dispatcher.backend} carries {listed(dispatcher.encodings)}, not {wishes.wire}"
    reasons: dict[str, None] = {} if wires else {refused: None}
    legal = False
    for wire in sorted(wires):
        for logits in logit_dtypes(kernel, wishes):
            for fused in (False, True):
                if fused and not (need.shared and "shared" in kernel.path.can | kernel.path.does):
                    continue
                chain = Chain(need, wishes)
                try:
                    path = build(chain, pair, (wire, logits, fused), catalogue)
                except Illegal as error:
                    reasons[str(error)] = None
                    continue
                legal = True
                yield (kernel.rank, dispatcher.rank, chain.cost(), len(path.adapters), fused), path
    if not legal:
        rejected.append(Rejection(f"{kernel.backend} with {dispatcher.backend}", "; ".join(reasons)))


def logit_dtypes(kernel: Contract, wishes: Wishes) -> tuple[str, ...]:
    """FP32 first: expert choice is discontinuous."""
    if wishes.router_dtype:
        return (wishes.router_dtype,)
    return ("float32", "bfloat16") if kernel.path.routes else ("float32",)


def build(chain: Chain, pair: tuple[Contract, Contract], how: tuple[str, str, bool],
          catalogue: Sequence[Contract]) -> MixturePath:  # fmt: skip
    (kernel, dispatcher), (wire, logits, fused) = pair, how
    choose_experts(chain, kernel, logits, catalogue)
    send(chain, dispatcher, wire)
    arrive(chain, kernel, dispatcher)
    chain.add(Stage("experts", kernel.backend, "bf16", kernel.path.emits, chain.ids, kernel.path.does))
    come_back(chain, dispatcher, catalogue)
    return assign(chain, kernel, dispatcher, fused)


def choose_experts(chain: Chain, kernel: Contract, logits: str, catalogue: Sequence[Contract]) -> None:
    """Gate and routing; a kernel that routes itself takes the logits."""
    need = chain.need
    chain.add(Stage("gate", "gate", logits))
    router = kernel if kernel.path.routes else best_router(need, logits, catalogue, chain.wishes)
    if logits not in router.logits:
        only = min(router.logits)
        chain.add(Stage("cast", "cast", only, exact=logits == "bfloat16", nbytes=6 * need.tokens))
    if need.router_bias and need.router_bias not in router.router_bias:
        raise Illegal(f"{router.backend} takes a router bias in {min(router.router_bias)}, not {need.router_bias}")
    if kernel.path.routes:
        if need.ranks > 1:
            raise Illegal("routes inside the kernel, so rows cannot be sent to other ranks before")
        return
    chain.add(Stage("route", router.backend, "bf16", ids="global", does=router.path.does))


def best_router(need: MixtureNeed, logits: str, catalogue: Sequence[Contract], wishes: Wishes) -> Contract:
    routers = [c for c in catalogue if c.op == "route" and not misses(c, need, wishes)]
    if not routers:
        raise Illegal("no router serves this layer")
    return min(routers, key=lambda c: (logits not in c.logits, c.rank))


def send(chain: Chain, dispatcher: Contract, wire: str) -> None:
    need, wishes = chain.need, chain.wishes
    if wire == "fp8_tensor" and need.ranks > 1 and not need.static:
        raise Illegal("a wire in fp8_tensor has one scale for all rows, and each rank would find its own")
    if wire not in need.wires and not wishes.lossy:
        raise Illegal(f"a wire in {wire} would round what the scheme keeps ({', '.join(sorted(need.wires))})")
    if wire != "bf16" and not dispatcher.path.encodes:
        chain.add(adapter(chain, "encode", wire))
    ids: Ids = "local" if need.ranks == 1 else dispatcher.path.ids
    sent = round(need.tokens * need.hidden * BITS[wire] / 8) * (need.top_k if need.ranks > 1 else 0)
    chain.add(Stage("dispatch", dispatcher.backend, wire, dispatcher.path.emits, ids, exact=wire in need.wires,
                    nbytes=sent))  # fmt: skip


def arrive(chain: Chain, kernel: Contract, dispatcher: Contract) -> None:
    """Adapters between what the dispatcher leaves and what the kernel takes."""
    need, wanted = chain.need, chain.need.need.encoding
    if chain.encoding != wanted:
        if chain.encoding == "bf16":
            chain.add(adapter(chain, "encode", wanted))
        elif (chain.encoding, wanted) == ("fp8_group128", "fp8_tensor"):
            chain.add(adapter(chain, "requantise", wanted))
        elif wanted == "bf16":
            chain.add(adapter(chain, "decode", wanted))
        else:
            raise Illegal(f"rows in {chain.encoding} cannot become {wanted}")
    if chain.layout != kernel.path.layout:
        if chain.layout != "tokens":
            raise Illegal(f"{dispatcher.backend} leaves {chain.layout} rows, the kernel takes {kernel.path.layout}")
        chain.add(adapter(chain, "gather", chain.encoding, kernel.path.layout))
    if need.ranks > 1 and chain.ids != kernel.path.ids:
        if chain.ids == "local":
            raise Illegal(f"{dispatcher.backend} leaves local expert ids, the kernel takes global ones")
        chain.add(Stage("localise", "localise", chain.encoding, chain.layout, "local", nbytes=8 * need.tokens))  # type: ignore[arg-type]


def adapter(chain: Chain, role: str, encoding: str, layout: str | None = None) -> Stage:
    """An adapter behind the chain: reads rows as they are and writes them as they shall be."""
    need = chain.need
    each = chain.rows() * need.hidden / 8
    rows_after = need.tokens * need.top_k if layout not in (None, "tokens") else chain.rows()
    nbytes = round(each * BITS[chain.encoding] + rows_after * need.hidden / 8 * BITS[encoding])
    asked = encoding == need.need.encoding or encoding in need.wires
    exact = role == "gather" or (chain.encoding in EXACT_IN_BF16 if role == "decode" else asked)
    if not exact and not chain.wishes.lossy:
        raise Illegal(f"{role} from {chain.encoding} to {encoding} would round what the scheme keeps")
    return Stage(role, role, encoding, layout or chain.layout, chain.ids, exact=exact, nbytes=nbytes)  # type: ignore[arg-type]


def come_back(chain: Chain, dispatcher: Contract, catalogue: Sequence[Contract]) -> None:
    """Rows of experts -> rows of tokens of this rank: a finishing sum where the way back does not do it."""
    if chain.layout not in dispatcher.path.combines:
        finishers = [c for c in catalogue if c.op == "finish" and not misses(c, chain.need, chain.wishes)]
        if not finishers or "tokens" not in dispatcher.path.combines:
            raise Illegal(f"{dispatcher.backend} takes no {chain.layout} rows back")
        best = min(finishers, key=lambda c: c.rank)
        chain.add(Stage("finish", best.backend, "bf16", "tokens", chain.ids, best.path.does))
    chain.add(Stage("combine", dispatcher.backend, "bf16", "tokens", "none", dispatcher.path.combine_does))


def assign(chain: Chain, kernel: Contract, dispatcher: Contract, fused: bool) -> MixturePath:
    """Every duty to one owner: those that cannot do otherwise first, then the kernel, then a stage of its own."""
    duties, need = chain.need.duties(), chain.need
    owned: list[Duty] = [duty for stage in chain.stages for duty in stage.does]
    extra: set[Duty] = {duty for duty in duties - set(owned) if duty in kernel.path.can and (duty != "shared" or fused)}
    stages = [
        Stage(s.role, s.kernel, s.encoding, s.layout, s.ids, (s.does | extra) & duties if s.role == "experts"
              else s.does & duties, s.exact, s.nbytes)
        for s in chain.stages
    ]  # fmt: skip
    left = duties - set(owned) - extra
    if "factor" in left:
        stages.append(Stage("scale", "scale", "bf16", does=frozenset({"factor"})))
    if "shared" in left:
        stages.append(Stage("shared", "shared", "bf16", does=frozenset({"shared"})))
    if lacking := left - {"factor", "shared"}:
        raise Illegal(f"nobody would do: {', '.join(sorted(lacking))}")
    twice = sorted({duty for duty in owned if duty in duties and owned.count(duty) > 1})
    if twice:
        raise Illegal(f"done twice: {', '.join(twice)}")
    late = any(s.role == "scale" for s in stages)
    return MixturePath(tuple(stages), (1 / need.factor if late else 1.0) if fused else None)
