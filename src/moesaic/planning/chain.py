"""One chain of a mixture's path, built forwards from what travels: the encoding of rows, their layout, the id space.

Where two stages differ, an adapter stands between them, at most `MAX_ADAPTERS` in a chain. Duties (see
`contracts.Duty`) are then given to exactly one owner each, or the chain is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from moesaic.contracts.contract import Contract, Duty, Packed
from moesaic.contracts.plan import ADAPTERS, HELD, RUNS, Ids, MixtureNeed, MixturePath, Stage, Wishes
from moesaic.planning.fits import UNBUILT

MAX_ADAPTERS = 2
BITS = {"bf16": 16.0, "float32": 32.0, "fp8_tensor": 8.0, "fp8_token": 8.0, "fp8_group128": 8.25, "mxfp8": 8.25,
        "nvfp4": 4.5}  # fmt: skip
"""Bits per element on the wire, scales included."""
EXACT_IN_BF16 = frozenset({"mxfp8"})
"""Encodings whose values are BF16 numbers (FP32 scales are not)."""
ABLE: dict[str, frozenset[Duty]] = {
    "route": frozenset({"route", "factor"}), "experts": frozenset({"route", "weights", "factor", "reduce", "shared"}),
    "combine": frozenset({"weights", "reduce", "factor"}),
}  # fmt: skip
"""Duties that a stage of a role can take over at all, where its contract says so."""
REST: frozenset[Duty] = frozenset({"factor", "shared"})
"""Duties that have a stage of their own where nobody else takes them."""


class Illegal(Exception):
    """This chain cannot be: the message says why."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What one chain is made of. logits: dtype of the gate's product.  fused: the shared expert runs among the others.

    router: None where the kernel routes.  finisher: weighs and sums rows that the way back does not take as they are.
    """

    kernel: Contract
    dispatcher: Contract
    wire: str
    logits: str
    fused: bool
    router: Contract | None
    finisher: Contract | None


@dataclass
class Chain:
    """A chain under construction: stages so far, what travels behind the last one, duties that each could take over."""

    need: MixtureNeed
    wishes: Wishes
    encoding: str = "bf16"
    layout: str = "tokens"
    ids: Ids = "none"
    stages: list[Stage] = field(default_factory=list)
    can: list[frozenset[Duty]] = field(default_factory=list)
    adapters: int = 0

    def add(self, stage: Stage, can: frozenset[Duty] = frozenset()) -> None:
        self.stages.append(stage)
        self.can.append(can & ABLE[stage.role] if can else can)
        if stage.role not in ("gate", "cast"):
            self.encoding, self.layout, self.ids = stage.encoding, stage.layout, stage.ids
        self.adapters += stage.role in ADAPTERS
        if self.adapters > MAX_ADAPTERS:
            raise Illegal(f"needs more than {MAX_ADAPTERS} adapters")

    def rows(self) -> int:
        """Rows behind the last stage: dispatch, sorting and slots hold one per chosen expert."""
        return self.need.tokens * (1 if self.layout == "tokens" else self.need.top_k)

    def cost(self) -> int:
        return sum(stage.nbytes for stage in self.stages)


def build(chain: Chain, parts: Parts) -> MixturePath:
    kernel, dispatcher = parts.kernel, parts.dispatcher
    choose_experts(chain, parts)
    send(chain, dispatcher, parts.wire)
    arrive(chain, kernel, dispatcher)
    does = kernel.path.does
    chain.add(Stage("experts", kernel.backend, "bf16", kernel.path.emits, chain.ids, does), kernel.path.can)
    if parts.finisher:
        chain.add(Stage("finish", parts.finisher.backend, "bf16", "tokens", chain.ids, parts.finisher.path.does))
    back = dispatcher.path
    chain.add(Stage("combine", dispatcher.backend, "bf16", "tokens", "none", back.combine_does), back.can)
    path = assign(chain, parts.fused)
    if not chain.wishes.hypothetical and (part := unrun(path, kernel.packed)):
        raise Illegal(f"{part} {UNBUILT}")
    return path


def unrun(path: MixturePath, packed: Packed) -> str | None:
    """What of a path `moe/` cannot run, in words; None where it can run all stages, in its order."""
    if packed.gate_up != HELD:
        return f"the layout of weights {packed}"
    at = -1
    for stage in path.stages:
        if stage.role not in RUNS or RUNS.index(stage.role) <= at:
            return f"the stage {stage.role}"
        at = RUNS.index(stage.role)
        if stage.role == "experts" and (stage.layout != "tokens" or not stage.does <= {"weights", "reduce"}):
            return f"the stage {stage}"
    return None


def choose_experts(chain: Chain, parts: Parts) -> None:
    """Gate and routing; a kernel that routes itself takes the logits."""
    need, router = chain.need, parts.router or parts.kernel
    chain.add(Stage("gate", "gate", parts.logits))
    if parts.logits not in router.logits:
        only = min(router.logits)
        chain.add(Stage("cast", "cast", only, exact=parts.logits == "bfloat16", nbytes=6 * need.tokens))
    if need.router_bias and need.router_bias not in router.router_bias:
        raise Illegal(f"{router.backend} takes a router bias in {min(router.router_bias)}, not {need.router_bias}")
    if parts.router is None:
        if need.ranks > 1:
            raise Illegal("routes inside the kernel, so rows cannot be sent to other ranks before")
        return
    chain.add(Stage("route", router.backend, "bf16", ids="global", does=router.path.does), router.path.can)
    if parts.kernel.path.routing == "packed":
        if not chain.wishes.lossy:
            raise Illegal("takes routing packed, which would round the weights of the experts to BF16")
        chain.add(Stage("pack", "pack", "bf16", ids="global", exact=False, nbytes=12 * need.tokens * need.top_k))


def unsendable(chain: Chain, wire: str) -> str | None:
    """Why rows may not travel so, or None."""
    need, wishes = chain.need, chain.wishes
    if wire == "fp8_tensor" and need.ranks > 1 and not need.static:
        return "a wire in fp8_tensor has one scale for all rows, and each rank would find its own"
    if wire not in need.wires and not wishes.lossy:
        return f"a wire in {wire} would round what the scheme keeps ({', '.join(sorted(need.wires))})"
    return None


def send(chain: Chain, dispatcher: Contract, wire: str) -> None:
    """The wire is one that `unsendable` lets through."""
    need = chain.need
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
        if (chain.encoding, wanted) == ("fp8_group128", "fp8_tensor"):
            chain.add(adapter(chain, "requantise", wanted))
        else:
            if chain.encoding != "bf16":
                chain.add(adapter(chain, "decode", "bf16"))
            if wanted != "bf16":
                chain.add(adapter(chain, "encode", wanted))
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


def assign(chain: Chain, fused: bool) -> MixturePath:
    """Every duty to one owner: those that cannot do otherwise, then the first that can, then a stage of its own."""
    duties, need = chain.need.duties(), chain.need
    owned: list[Duty] = [duty for stage in chain.stages for duty in stage.does & duties]
    if twice := sorted({duty for duty in owned if owned.count(duty) > 1}):
        raise Illegal(f"done twice: {', '.join(twice)}")
    left = duties - set(owned)
    stages = []
    for stage, can in zip(chain.stages, chain.can, strict=True):
        extra = {duty for duty in left & can if duty != "shared" or fused}
        left -= extra
        does = (stage.does & duties) | extra
        stages.append(replace(stage, does=does) if does != stage.does else stage)
    if lacking := left - REST:
        raise Illegal(f"nobody would do: {', '.join(sorted(lacking))}")
    stages += [Stage(role, role, "bf16", does=frozenset({duty}))  # type: ignore[arg-type]
               for role, duty in (("scale", "factor"), ("shared", "shared")) if duty in left]  # fmt: skip
    late = any(s.role == "scale" for s in stages)
    return MixturePath(tuple(stages), (1 / need.factor if late else 1.0) if fused else None)
