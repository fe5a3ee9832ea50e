"""Planning a model: a pure function of its spec, the hardware, the catalogue of contracts and the user's wishes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Literal

from moesaic.contracts.contract import CACHE_OPS, EAGER, Choice, Contract, Need, Packed, Rejection
from moesaic.contracts.plan import (
    PHASES,
    Cell,
    LayerPlan,
    LinearPlan,
    MixtureNeed,
    MixturePath,
    ModelPlan,
    PerPhase,
    Phase,
    Refusal,
    Wishes,
)
from moesaic.contracts.spec import GQASpec, LayerSpec, MLASpec, ModelSpec, MoESpec
from moesaic.hardware import Hardware
from moesaic.planning.cost import block_bytes, experts_bytes, kv_bytes, pieces, weights
from moesaic.planning.cuts import illegal
from moesaic.planning.fits import UNBUILT
from moesaic.planning.mixture import How, Options, able, in_common, options, unique
from moesaic.planning.needs import (
    blocks_of,
    by_row_instead_of,
    experts_scheme,
    layer_needs,
    mixture_need,
    schemes_in,
    stacks_of,
    under,
)
from moesaic.planning.tuning import UNTUNED, Tuning

FUSED_OPS = frozenset({"add_norm_encode", "attend_encode", "attend_latent", "gate", "linear_terms", "mlp",
                       "store_heads", "store_latent", "top_two"})  # fmt: skip
"""Taken where a backend has them: layers compose the others."""
COMMON_OPS = ("linear", "encode", "rms_norm", "add_rms_norm", "rotate", "activate", "attend_paged", "attend_dense")
PREFILL = 8192
"""Tokens of one prefill step for which a path is planned."""
DEMANDS = {"experts": "experts", "dispatch": "dispatch", "wire": "dispatch", "router_dtype": "gate"}
"""Wishes for a mixture's path, and the stage that shows what they got."""


class Refused(Exception):
    """complete: gives the refusal with what takes time to find out: its kind, and the nearest plan that works."""

    def __init__(self, refusal: Refusal, complete: Callable[[], Refusal] | None = None) -> None:
        super().__init__(refusal.what)
        self.refusal, self.complete = refusal, complete or (lambda: refusal)


@dataclass(frozen=True)
class Planner:
    """What one call of `plan` works with."""

    spec: ModelSpec
    hardware: Hardware
    catalogue: tuple[Contract, ...]
    wishes: Wishes
    base: Need
    tuning: Tuning = UNTUNED

    def ops_for(self, need: Need, wanted: frozenset[str], ops: dict[Need, dict[str, Choice]]) -> None:
        """Chooses `wanted` under a need, once per need."""
        chosen = ops.setdefault(need, {})
        for op in sorted(wanted - set(chosen)):
            if op in FUSED_OPS and not any(c.op == op and c.built and not c.misses(need) for c in self.catalogue):
                continue
            chosen[op] = choose(op, need, self.catalogue, self.wishes)

    def layer(self, blocks: Sequence[LayerSpec]) -> LayerPlan:
        """Equal blocks, planned once."""
        block = blocks[0]
        self.check_cuts(block)
        self.check_rows(block)
        linears, dtype = [], self.base.dtype
        dense = (each for each in pieces(block, self.wishes, dtype) if each.role not in ("router", "experts"))
        for (role, scheme), held in groupby(dense, key=lambda each: (each.role, each.scheme)):
            op = "linear_quant" if scheme.quantized else "linear"
            kernel = choose(op, under(self.base, scheme), self.catalogue, self.wishes).chosen
            linears.append(LinearPlan(role, scheme, kernel, sum(each.nbytes for each in held)))
        attend = choose("attend_paged", replace(self.base, sinks=has_sinks(block)), self.catalogue, self.wishes)
        mixture = block.mlp if isinstance(block.mlp, MoESpec) else None
        cells = self.cells(block) if mixture else ()
        made = LayerPlan(tuple(b.index for b in blocks), attend.chosen, tuple(linears),
                         experts_scheme(mixture) if mixture else None, cells, 0)  # fmt: skip
        nbytes = block_bytes(block, self.spec.hidden, self.wishes, dtype, made.router_dtype)
        nbytes += (len(made.packed) - 1) * experts_bytes(block, self.wishes, dtype) if cells else 0
        return replace(made, nbytes=nbytes, derived=tuple(derived(block, made)))

    def cells(self, block: LayerSpec) -> tuple[Cell, ...]:
        """Decode up to the largest batch, prefill up to one long step, each cut where another kernel measures faster;
        all with what the layer holds once."""
        needs, here = self.needs(block), f"layer {block.index}"
        each, hows = self.ways(needs, self.wishes)
        if hows is None and not each[-1].best:
            need, held = needs[len(each) - 1], each[-1]
            form = f"{need.need.format} weights with {need.need.encoding} rows"
            what = f"no path for {form} on {self.hardware.name}"
            raise self.refused(block, what, f"{here}, {need.phase}", unique(held.rejected))
        if hows is None:
            what = "decode and prefill share one layout of the experts' weights, and no kernels of both take the same"
            raise self.refused(block, what, here, layouts(needs, each))
        cells: list[Cell] = []
        for need, held, how in zip(needs, each, hows, strict=True):
            path, rejected = held.taken(how)
            parameters = self.tuning.parameters(need, path.stage("experts").kernel)
            made = Cell(need.phase, need.tokens, path, rejected, how[0], parameters)
            if cells and alike(cells[-1], made):
                cells.pop()  # it ended where a kernel takes over that another layout of the weights would need
            cells.append(made)
        kernels = {cell.path.stage("experts").kernel: None for cell in cells}
        if self.wishes.deterministic and len(kernels) > 1:  # beside a prompt, decoding runs as that does
            what = f"experts by {' and '.join(kernels)}, as a step has prompts or not, which --deterministic forbids"
            raise Refused(Refusal(what, here, "impossible", (), f"--experts {next(iter(kernels))}"))
        return tuple(cells)

    def needs(self, block: LayerSpec) -> list[MixtureNeed]:
        """Of each phase and each number of tokens up to which one kernel is the fastest of those with its layout."""
        mixture, found = block.mlp, []
        assert isinstance(mixture, MoESpec)
        for phase, most in zip(PHASES, (self.wishes.max_batch, PREFILL), strict=True):
            whole = mixture_need(mixture, self.base, self.wishes, phase, most)
            kernels = able("experts", whole, self.catalogue, self.wishes.during(phase), [])
            layouts = {kernel.packed: [each.backend for each in kernels if each.packed == kernel.packed]
                       for kernel in kernels}  # fmt: skip
            ends = {most}.union(*(self.tuning.buckets(whole, names) for names in layouts.values()))
            found += [replace(whole, tokens=tokens) for tokens in sorted(ends)]
        return found

    def ways(self, needs: Sequence[MixtureNeed], wishes: Wishes) -> tuple[list[Options], list[How] | None]:
        """(options of each need up to one that has none, what is taken of them such that all can share)."""
        each: list[Options] = []
        for need in needs:
            each.append(options(need, self.catalogue, wishes, self.tuning))
            if not each[-1].best:
                return each, None
        if hows := in_common(each, twice(wishes)):
            return each, hows
        each = [options(need, self.catalogue, wishes, self.tuning, wide=True) for need in needs]
        return each, in_common(each, twice(wishes))

    def paths(self, block: LayerSpec, wishes: Wishes) -> list[MixturePath] | None:
        """Of each phase, under other wishes; None where there are none."""
        each, hows = self.ways(self.needs(block), wishes)
        return None if hows is None else [held.taken(how)[0] for held, how in zip(each, hows, strict=True)]

    def refused(self, block: LayerSpec, what: str, where: str, reasons: list[Rejection]) -> Refused:
        plain = Refusal(what, where, "impossible", tuple(reasons))
        return Refused(plain, lambda: self.advised(block, plain))

    def advised(self, block: LayerSpec, refusal: Refusal) -> Refusal:
        """With the nearest plan that works: weights held twice, one demand less, or all of them less."""
        known = not self.wishes.hypothetical and self.paths(block, replace(self.wishes, hypothetical=True))
        demands = dict.fromkeys(name for name in DEMANDS if getattr(self.wishes, name))
        ways = [{name: None} for name in demands] + [demands] * (len(demands) > 1)
        nearest = None
        if not self.wishes.two_layouts and self.paths(block, replace(self.wishes, two_layouts=True)):
            more = experts_bytes(block, self.wishes, self.base.dtype) / 2**30
            nearest = f"--two-layouts (a second copy of the experts, {more:.1f} GiB on a rank, of each such layer)"
        for way in ways if nearest is None else ():
            if works := self.paths(block, replace(self.wishes, **way)):
                phases = [need.phase for need in self.needs(block)]
                nearest = " ".join(option(name, phases, works) for name in way)
                break
        return replace(refusal, kind="not_built" if known else "impossible", nearest=nearest)

    def check_cuts(self, block: LayerSpec) -> None:
        if found := illegal(block, self.wishes):
            what, where, near = found
            raise Refused(Refusal(what, where, "impossible", (), near))

    def check_rows(self, block: LayerSpec) -> None:
        """A scale that spans the rows of a step makes each row's result depend on the others: no kernel can mend it."""
        if not self.wishes.deterministic:
            return
        for scheme in schemes_in(block):
            if not scheme.activation.by_row:
                what = f"{scheme.name} gives all rows of a step one scale, which --deterministic forbids"
                nearest = f"--quantization {by_row_instead_of(scheme)}, or a checkpoint with calibrated (static) scales"
                raise Refused(Refusal(what, f"layer {block.index}", "impossible", (), nearest))


def plan(spec: ModelSpec, hardware: Hardware, catalogue: Sequence[Contract], wishes: Wishes,
         dtype: str = "bfloat16", tuning: Tuning = UNTUNED) -> ModelPlan | Refusal:  # fmt: skip
    """How the model runs on `hardware`, or why it cannot. Pure: no tensor, no GPU, nothing read or remembered.

    On a GPU, decoding stands in CUDA graphs. Where some op has no kernel that could, it does not, and a note says so.
    tuning: what was measured on that hardware.
    """
    made = decide(spec, hardware, catalogue, wishes, dtype, tuning)
    return made if isinstance(made, ModelPlan) else made.complete()


def decide(spec: ModelSpec, hardware: Hardware, catalogue: Sequence[Contract], wishes: Wishes,
           dtype: str = "bfloat16", tuning: Tuning = UNTUNED) -> ModelPlan | Refused:  # fmt: skip
    """The same, without looking for what would work instead."""
    latent = any(isinstance(block.attention, MLASpec) for block in spec.layers)
    sizes = frozenset(at.kv_rank + at.rope_dim if isinstance(at, MLASpec) else at.head_dim
                      for at in (block.attention for block in blocks_of(spec)))  # fmt: skip
    base = Need(hardware.device, dtype, wishes.deterministic, hardware.features, hardware.arch, latent=latent,
                head_dims=sizes, kv=wishes.kv)  # fmt: skip
    planner, first = Planner(spec, hardware, tuple(catalogue), wishes, base, tuning), None
    if hardware.device == "cuda" and wishes.graphs:
        try:
            return planned(replace(planner, base=replace(base, capturable=True)))
        except Refused as refused:
            first = refused
    try:
        made = planned(planner)
    except Refused as refused:
        return refused if first is None else Refused(refused.refusal, partial(nearer, first, refused))
    return made if first is None else replace(made, notes=(*made.notes, eager(first.refusal)))


def nearer(first: Refused, second: Refused) -> Refusal:
    """Of the refusals with and without CUDA graphs the first that knows of something that works."""
    full = first.complete()
    return full if full.nearest else second.complete()


def eager(refusal: Refusal) -> str:
    """What is said of a plan whose decoding is not captured, by what refused one that would be."""
    names = ", ".join(each.candidate for each in refusal.reasons if EAGER in each.reason)
    return f"decoding does not stand in CUDA graphs: {f'{names} {EAGER}' if names else refusal.what}"


def planned(planner: Planner) -> ModelPlan:
    spec, base, wishes = planner.spec, planner.base, planner.wishes
    if wishes.tp > 1 and not wishes.hypothetical:
        what = "projections cut across ranks are known, but not built into Moesaic yet"
        raise Refused(Refusal(what, f"--tp {wishes.tp}", "not_built"))
    ops: dict[Need, dict[str, Choice]] = {}
    planner.ops_for(base, frozenset(COMMON_OPS) | FUSED_OPS - {"mlp", "linear_terms"}, ops)
    groups: dict[object, list[LayerSpec]] = {}
    for block in blocks_of(spec):
        groups.setdefault(kind_of(block), []).append(block)
    layers = []
    for blocks in groups.values():
        layers.append(planner.layer(blocks))
        for need, wanted in layer_needs(blocks[0], base, layers[-1].router_dtype):
            planner.ops_for(need, wanted, ops)
    for draft in spec.drafts:
        if draft.join.runs.quantized:
            planner.ops_for(under(base, draft.join.runs), frozenset({"encode", "linear_quant"}), ops)
    held = weights(spec, wishes, base.dtype) + sum(len(each.layers) * each.nbytes for each in layers)
    return ModelPlan(
        spec.architecture, planner.hardware.name, base, wishes, tuple(layers),
        {need: tuple(chosen.values()) for need, chosen in ops.items()}, spec.notes, held,
        sum(kv_bytes(block, wishes, base.dtype) for block in spec.layers),
        wishes.kv,
    )  # fmt: skip


def alike(one: Cell, other: Cell) -> bool:
    """Whether both run in the same way, whatever their numbers of tokens."""
    runs = [(cell.phase, cell.packed, cell.parameters, [replace(stage, nbytes=0) for stage in cell.path.stages])
            for cell in (one, other)]  # fmt: skip
    return runs[0] == runs[1]


def twice(wishes: Wishes) -> bool:
    """Whether weights may be held twice, which is known and not built."""
    return wishes.two_layouts and wishes.hypothetical


def layouts(needs: Sequence[MixtureNeed], each: Sequence[Options]) -> list[Rejection]:
    """What every kernel of each phase takes."""
    found = [Rejection(f"{name}, {need.phase}", f"takes expert weights as {packed}") for need, held in
             zip(needs, each, strict=True) for (packed, _), pairs in held.best.items() for name in pairs]  # fmt: skip
    return unique(found)


def option(name: str, phases: Sequence[Phase], works: Sequence[MixturePath]) -> str:
    """The option that demands what these paths have. A phase whose cells have different kernels stays free."""
    flag, got = f"--{name.replace('_', '-')}", {"decode": set[str](), "prefill": set[str]()}
    for phase, path in zip(phases, works, strict=True):
        stage = path.stage(DEMANDS[name])  # type: ignore[arg-type]
        got[phase].add(stage.encoding if name in ("wire", "router_dtype") else stage.kernel)
    each = [names.copy().pop() if len(names) == 1 else None for names in got.values()]
    if not any(each):
        return f"no {flag}"
    return f"{flag} {each[0] if each[0] == each[1] else PerPhase(*each)}"


def derived(block: LayerSpec, made: LayerPlan) -> Iterator[str]:
    """What is made of the stored weights of a layer, and anew whenever they are written."""
    if isinstance(block.attention, MLASpec) and block.attention.kv_b.scheme.quantized:
        yield "kv_b decoded once"
    if made.experts and made.experts.activation.static:
        yield "one input scale per product, the largest of all experts on all ranks"
    for packed in made.packed:
        if packed != Packed():
            yield f"experts packed as {packed}" + " (a second copy)" * (len(made.packed) > 1)


def kind_of(block: LayerSpec) -> object:
    """Equal for blocks that are planned alike: everything but names and index."""
    mlp = block.mlp
    stacks = tuple((role, tuple(replace(part, name="") for part in parts)) for role, parts in stacks_of(block))
    routed: object = None
    if isinstance(mlp, MoESpec):
        router = replace(mlp.router, weight="", bias=mlp.router.bias and "", logit_bias=mlp.router.logit_bias and "")
        routed = (router, experts_scheme(mlp), mlp.intermediate, mlp.gate.bias)
    return (stacks, routed, mlp.activation, block.attention.window, has_sinks(block))


def has_sinks(block: LayerSpec) -> bool:
    return isinstance(block.attention, GQASpec) and bool(getattr(block.attention, "sinks", None))


def choose(op: str, need: Need, catalogue: Sequence[Contract], wishes: Wishes) -> Choice:
    """The best contract of an op, or the wished-for one; every other with its reason. Raises Refused."""
    wish = {"attend_paged": wishes.attention, "linear_quant": wishes.linear}.get(op)
    misses: dict[str, str | None] = {}
    for contract in sorted((c for c in catalogue if c.op == op), key=lambda c: (c.rank, not c.other_cache(need))):
        reason = contract.misses(need)
        if reason is None and not (contract.built or wishes.hypothetical):
            reason = UNBUILT
        if misses.get(contract.backend, "") is not None:  # of several variants of one backend, one that fits is enough
            if reason is None:
                misses.pop(contract.backend, None)  # it is preferred by that one's rank
            misses[contract.backend] = reason
    able = [name for name, miss in misses.items() if miss is None]
    if not able or (wish is not None and wish not in able):
        reasons = tuple(Rejection(name, miss) for name, miss in misses.items() if miss)
        of = f"over a cache in {need.kv}" if op in CACHE_OPS else f"of {need.format} weights with {need.encoding} rows"
        what = f"no kernel for {op} {of} in {need.dtype}"
        if wish is not None and able:
            what = f"{wish!r} cannot be used for {op}: {misses.get(wish) or 'there is no such backend'}"
        kind: Literal["impossible", "not_built"] = "not_built" if UNBUILT in misses.values() else "impossible"
        nearest = f"{able[0]} for {op}" if able else None
        if nearest is None and op in CACHE_OPS and need.kv != "bf16":
            plain = replace(need, kv="bf16")
            works = any(c.op == op and not c.misses(plain) and (c.built or wishes.hypothetical) for c in catalogue)
            nearest = "--kv bf16" if works else None
        raise Refused(Refusal(what, op, kind, reasons, nearest))
    attend, linear = wishes.attention, wishes.linear
    beside = {"attend_encode": attend, "attend_latent": attend, "linear_terms": linear, "linear": linear}.get(op)
    chosen = wish or (beside if beside in able else able[0])
    rejected = tuple(
        Rejection(name, miss or ("another was asked for" if wish else f"{chosen} is preferred"))
        for name, miss in misses.items() if name != chosen
    )  # fmt: skip
    return Choice(op, chosen, rejected)
