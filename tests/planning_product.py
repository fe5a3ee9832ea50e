"""The product over which planning is proved, in two parts; and what must come out, by brute force.

*Paths*: schemes x hardware x expert kernels x dispatchers x phases x (tp, ep) x (groups, router bias, factor, shared
expert, renormalisation) x routers. Each is one phase of one mixture with one kernel and one dispatcher.

*Layers*: schemes x hardware x pairs of kernels x (tp, ep) x widths x routings x one or two layouts. Each is a whole
layer with attention: one kernel decodes and one prefills, with any dispatchers; weights are cut; both phases share what
a layer holds once. The cuts that are legal are those that `QuantTensor.shard` performs.

Beside the contracts of the catalogue stand some of kernels that nobody has, for what no real one does: orders of gate
and up, layouts and duties in other combinations, a shared expert among the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from moesaic.contracts.contract import FLOATS16, Contract, Duty, Need, Packed, Path
from moesaic.contracts.plan import MixtureNeed, MixturePath, ModelPlan, PerPhase, Phase, Wishes
from moesaic.contracts.scheme import ENCODINGS, FORMATS, SCHEMES
from moesaic.contracts.spec import GQASpec, LayerSpec, LinearSpec, MLPSpec, ModelSpec, MoESpec, RopeSpec, RouterSpec
from moesaic.errors import UnsupportedError
from moesaic.formats.base import QuantTensor
from moesaic.hardware import GPUS, Hardware
from moesaic.planning.mixture import find
from moesaic.planning.needs import WIRES
from moesaic.planning.plan import decide
from moesaic.planning.verify import Walk, verify, verify_model
from scripts.plan_fixtures import CPU
from tests.planning_search import Held, known, serves
from tests.planning_support import CATALOGUE

MACHINES: dict[str, Hardware] = {"cpu": CPU, **GPUS}
RANKS = ((1, 1), (2, 1), (8, 1), (1, 8), (2, 8), (8, 8))
"""(tp, ep)."""
SHARES = ((2048, 1), (1024, 1), (256, 1), (2048, 8))
"""What those are to one phase: (width of one rank's experts, ranks that share them); with ep 8, tp changes neither."""
ANY = Wishes(hypothetical=True)
GATES = {gate: replace(ANY, router_dtype=gate) for gate in sorted(FLOATS16)}


def standin(op: str, backend: str, path: Path, rank: int = 60, **fields: Any) -> Contract:
    every = {"formats": frozenset(FORMATS), "encodings": frozenset(ENCODINGS), "built": False}
    devices = frozenset({"cpu", "cuda"})
    return Contract(op, backend, devices, frozenset({"bfloat16"}), False, rank, path=path, **{**every, **fields})


WEIGH: frozenset[Duty] = frozenset({"weights", "reduce"})
SHARED: frozenset[Duty] = frozenset({"shared"})
FACTOR: frozenset[Duty] = frozenset({"factor"})
ROUTE: frozenset[Duty] = frozenset({"route"})
BF16 = frozenset({"bfloat16"})
STANDINS = (
    standin("experts", "fusing", Path(does=WEIGH, can=SHARED), gate_up="interleaved"),
    standin("experts", "sharing", Path(does=WEIGH | SHARED), gate_up="swapped"),
    standin("experts", "scaling", Path("slotted", "tokens", does=WEIGH, can=FACTOR), gate_up="swapped"),
    standin("experts", "routing", Path("sorted", "tokens", routes=True, does=WEIGH | ROUTE, can=FACTOR | SHARED),
            logits=BF16, renormalizes=frozenset({True}), group_scores=frozenset({"max"})),
    standin("experts", "worldly", Path(ids="global", can=WEIGH), packing="swizzled_128x4", gate_up="swapped"),
    standin("dispatch", "sorting", Path("tokens", "sorted", combines=frozenset({"sorted"}),
            combine_does=frozenset({"reduce"}), can=frozenset({"weights", "factor"}))),
)  # fmt: skip
Known = tuple[Contract, ...]
WHOLE: Known = (*CATALOGUE, *STANDINS)
KERNELS = tuple(sorted({c.backend for c in WHOLE if c.op == "experts"}))
DISPATCHERS = tuple(sorted({c.backend for c in WHOLE if c.op == "dispatch"}))
ROUTERS: dict[str, Contract | None] = {
    "ours": None,
    "late": standin("route", "late", Path(does=ROUTE)),
    "narrow": standin("route", "narrow", Path(does=ROUTE, can=FACTOR), logits=BF16, router_bias=BF16,
                      renormalizes=frozenset({False})),
}  # fmt: skip
"""In place of all routers of the catalogue, except for the first."""


@cache
def narrowed(kernel: str, dispatcher: str | None = None, router: str = "ours", packed: Packed | None = None) -> Known:
    """What a path can name of the catalogue, with one expert kernel (in one layout), dispatcher, kind of router."""
    keep, other = {"experts": kernel, "dispatch": dispatcher}, ROUTERS[router]
    some = [c for c in WHOLE if c.op in ("experts", "dispatch", "route", "finish")]
    some = [c for c in some if keep.get(c.op) in (None, c.backend) and (other is None or c.op != "route")]
    some = [c for c in some if packed is None or c.op != "experts" or c.packed == packed]
    return (*some, *([other] if other else []))


# --- paths -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PathCell:
    need: MixtureNeed
    kernel: str
    dispatcher: str
    router: str

    @property
    def catalogue(self) -> Known:
        return narrowed(self.kernel, self.dispatcher, self.router)


Flags = tuple[int, str | None, float, bool, bool]
FLAGS: tuple[Flags, ...] = tuple(itertools.product((0, 4), (None, "float32"), (1.0, 2.5), (False, True), (False, True)))
"""(groups kept, router bias, factor, shared expert, renormalised)."""
PHASES: tuple[tuple[Phase, int], ...] = (("decode", 64), ("prefill", 8192))
PATH_AXES: tuple[Sequence[Any], ...] = (KERNELS, DISPATCHERS, PHASES, SHARES, FLAGS, tuple(ROUTERS))
STRATA = tuple(itertools.product(sorted(SCHEMES), MACHINES))
"""(scheme, hardware): of each part of the product, what is counted together."""


def size_of(axes: Sequence[Sequence[Any]]) -> int:
    count = 1
    for axis in axes:
        count *= len(axis)
    return count


def path_cells(scheme: str, on: str, step: int = 1, first: int = 0) -> Iterator[PathCell]:
    """Every `step`th cell of a stratum."""
    for kernel, dispatcher, (phase, tokens), shares, flags, router in every(PATH_AXES, step, first):
        yield PathCell(path_need(asked(scheme, on), phase, tokens, shares, flags), kernel, dispatcher, router)


def path_need(base: MixtureNeed, phase: Phase, tokens: int, shares: tuple[int, int], flags: Flags) -> MixtureNeed:
    (width, ranks), (grouped, bias, factor, shared, renormalize) = shares, flags
    return replace(
        base, need=replace(base.need, capturable=base.need.device == "cuda" and phase == "decode"),
        groups_kept=grouped, router_bias=bias, factor=factor, shared=shared, renormalize=renormalize,
        scoring="sigmoid" if bias else "softmax", group_score="top2_sum" if bias else "max", ranks=ranks,
        width=width, phase=phase, tokens=tokens,
    )  # fmt: skip


def every(axes: Sequence[Sequence[Any]], step: int, first: int) -> Iterator[tuple[Any, ...]]:
    """Every `step`th element of the product, without making the others."""
    for index in range(first, size_of(axes), step):
        found, rest = [], index
        for axis in reversed(axes):
            rest, at = divmod(rest, len(axis))
            found.append(axis[at])
        yield tuple(reversed(found))


@cache
def asked(scheme: str, on: str) -> MixtureNeed:
    """DeepSeek-V3's mixture in a scheme, as far as the cells do not change it."""
    machine, of = MACHINES[on], SCHEMES[scheme]
    base = Need(machine.device, "bfloat16", False, machine.features, machine.arch,
                format=of.weight.name, encoding=of.activation.name)  # fmt: skip
    return MixtureNeed(
        need=base, static=of.activation.static, wires=WIRES[of.activation.name], scoring="sigmoid", factor=2.5,
        groups_kept=4, router_bias="float32", top_k=8, shared=True, hidden=7168, width=2048, ranks=1, phase="decode",
        tokens=64,
    )  # fmt: skip


def check_path(cell: PathCell, held: Held) -> str | None:
    """What is wrong; None where a plan is returned if and only if a chain exists, and is sound."""
    path, rejected = find(cell.need, cell.catalogue, ANY)
    if (path is not None) != known(cell.need, cell.catalogue, ANY, held):
        return f"planned {path}, which brute force denies" if path else f"refused ({rejected}), but a chain exists"
    if path is None:
        return None if rejected else "refused without a reason"
    return "; ".join(verify(path, cell.need, cell.catalogue, ANY)) or None


def serving(op: str, need: MixtureNeed) -> list[Contract]:
    """Those that could be a stage at all."""
    walk = Walk(MixturePath(()), need, (), ANY)
    return [contract for contract in WHOLE if contract.op == op and serves(contract, walk)]


def ask_paths(scheme: str, on: str, held: Held, told: set[object]) -> None:
    """All that the path cells of a stratum would ask. told: what the strata before have asked, in short: the cells of
    a kernel, a dispatcher and a router ask the same wherever the same contracts serve rows in the same encoding."""
    base = asked(scheme, on)
    for (phase, tokens), shares in itertools.product(PHASES, SHARES):
        need = path_need(base, phase, tokens, shares, FLAGS[0])
        pairs = [dict.fromkeys(each.backend for each in serving(op, need)) for op in ("experts", "dispatch")]
        for kernel, dispatcher, router in itertools.product(*pairs, ROUTERS):
            cell = PathCell(need, kernel, dispatcher, router)
            fit = tuple(not contract.misses(need.need) for contract in cell.catalogue)
            short = (kernel, dispatcher, router, need.need.encoding, need.static, phase, shares, fit)
            if short not in told:
                told.add(short)
                for flags in FLAGS:
                    known(path_need(base, phase, tokens, shares, flags), cell.catalogue, ANY, held)


# --- layers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerCell:
    scheme: str
    on: str
    kernels: tuple[str, str]
    tp: int
    ep: int
    width: int
    routing: tuple[str, bool, bool]
    two_layouts: bool

    @property
    def wishes(self) -> Wishes:
        return replace(ANY, experts=PerPhase(*self.kernels), tp=self.tp, ep=self.ep, two_layouts=self.two_layouts)


ROUTING = (("sigmoid", True, True), ("softmax", False, False))
"""(scoring, renormalised, shared expert): with groups, a bias and a factor, and without."""
LAYER_AXES: tuple[Sequence[Any], ...] = (KERNELS, KERNELS, RANKS, (2048, 768), ROUTING, (False, True))


def layer_cells(scheme: str, on: str, step: int = 1, first: int = 0) -> Iterator[LayerCell]:
    for decode, prefill, (tp, ep), width, routing, twice in every(LAYER_AXES, step, first):
        yield LayerCell(scheme, on, (decode, prefill), tp, ep, width, routing, twice)


@cache
def model(scheme: str, width: int, routing: tuple[str, bool, bool]) -> ModelSpec:
    """One layer: 16 query and 8 kv heads of 128, 256 experts, all in one scheme."""
    of, (scoring, renormalize, shared) = SCHEMES[scheme], routing

    def part(name: str, inputs: int, outputs: int) -> LinearSpec:
        return LinearSpec(name, inputs, outputs, scheme=of)

    rope = RopeSpec(128, 1e4)
    attention = GQASpec(16, 8, 128, 1.0, rope, part("q", 2048, 2048), part("k", 2048, 1024), part("v", 2048, 1024),
                        part("o", 2048, 2048))  # fmt: skip
    sigmoid = scoring == "sigmoid"
    router = RouterSpec(256, 8, scoring, "gate", "bias" if sigmoid else None, renormalize, 2.5 if sigmoid else 1.0,
                        8 if sigmoid else 1, 4 if sigmoid else 1, "top2_sum" if sigmoid else "max")  # type: ignore[arg-type]  # fmt: skip
    gate, up, down = part("gate_proj", 2048, width), part("up_proj", 2048, width), part("down_proj", width, 2048)
    beside = MLPSpec(gate, up, down) if shared else None
    mixture = MoESpec(router, gate, up, down, beside)
    return ModelSpec("proof", 2048, 1024, 1e-6, 4096, "embed", "norm", "head", False,
                     (LayerSpec(0, "a", "b", attention, mixture),))  # fmt: skip


def check_layer(cell: LayerCell, held: Held) -> tuple[str, str | None]:
    """(planned, or what stands in the way by brute force; what is wrong or None)."""
    machine, wishes = MACHINES[cell.on], cell.wishes
    spec = model(cell.scheme, cell.width, cell.routing)
    made = decide(spec, machine, WHOLE, wishes)
    verdict = expected(cell, held)
    if isinstance(made, ModelPlan) != (verdict == "planned"):
        return verdict, f"by brute force: {verdict}; but {made}"
    if isinstance(made, ModelPlan):
        graphs = made.base.capturable
        needs = [mixture_asked(cell, phase, tokens, graphs) for phase, tokens in PHASES]
        return verdict, "; ".join(verify_model(made, {0: needs}, WHOLE)) or None
    return verdict, None if made.refusal.what else "refused without a reason"


def mixture_asked(cell: LayerCell, phase: Phase, tokens: int, graphs: bool) -> MixtureNeed:
    base, (scoring, renormalize, shared) = asked(cell.scheme, cell.on), cell.routing
    (width, ranks), sigmoid = share(cell), scoring == "sigmoid"
    return replace(
        base, need=replace(base.need, capturable=graphs and phase == "decode"), hidden=2048,
        width=width, ranks=ranks, phase=phase, tokens=tokens,
        scoring=scoring, renormalize=renormalize, factor=2.5 if sigmoid else 1.0, groups_kept=4 if sigmoid else 0,
        router_bias="float32" if sigmoid else None, group_score="top2_sum" if sigmoid else "max", shared=shared,
    )  # fmt: skip


def share(cell: LayerCell) -> tuple[int, int]:
    """(width of one rank's experts, ranks that share them)."""
    return (cell.width // cell.tp, 1) if cell.ep == 1 else (cell.width, cell.ep)


def expected(cell: LayerCell, held: Held) -> str:
    """`planned`, or why there can be no plan."""
    if not dense_kernels(cell.scheme, cell.on):
        return "no dense kernel"
    if not legal(cell.scheme, cell.width, cell.tp, cell.ep, shared=cell.routing[2]):
        return "illegal cut"
    ways = (True, False) if MACHINES[cell.on].device == "cuda" else (False,)
    verdicts = [joint(cell, held, graphs) for graphs in ways]
    return "planned" if "planned" in verdicts else verdicts[-1]


def joint(cell: LayerCell, held: Held, graphs: bool) -> str:
    """Both phases, with one dtype of the gate; and with one layout of the weights, unless two are allowed."""
    key = (cell.scheme, cell.on, cell.kernels, *share(cell), cell.routing, cell.two_layouts, graphs)
    if key not in held:
        held[key] = both_phases(cell, held, graphs)
    return str(held[key])


def both_phases(cell: LayerCell, held: Held, graphs: bool) -> str:
    ways = [one_phase(cell, at, held, graphs) for at in range(len(PHASES))]
    if not all(ways):
        return "no path"
    if cell.two_layouts:
        ways = [frozenset((None, gate) for _, gate in way) for way in ways]
    return "planned" if ways[0] & ways[1] else "no common layout"


def one_phase(cell: LayerCell, at: int, held: Held, graphs: bool) -> frozenset[tuple[object, str]]:
    """(layout of the weights, dtype of the gate) of every way through a phase with the cell's kernel in it."""
    kernel, (phase, tokens) = cell.kernels[at], PHASES[at]
    key = ("phase", cell.scheme, cell.on, kernel, phase, *share(cell), cell.routing, graphs)
    if key not in held:
        need = mixture_asked(cell, phase, tokens, graphs)
        packings = {contract.packed for contract in serving("experts", need) if contract.backend == kernel}
        held[key] = frozenset(
            (packed, gate) for packed in packings for gate, wishes in GATES.items()
            if any(known(need, narrowed(kernel, each, packed=packed), wishes, held) for each in DISPATCHERS)
        )  # fmt: skip
    return held[key]  # type: ignore[return-value]


def ask_layers(scheme: str, on: str, held: Held) -> None:
    """All that the layer cells of a stratum would ask, and what some would that have no dense kernel or legal cut."""
    graphs = (True, False) if MACHINES[on].device == "cuda" else (False,)
    for kernel, (tp, ep), width, routing in itertools.product(KERNELS, RANKS, (2048, 768), ROUTING):
        cell = LayerCell(scheme, on, (kernel, kernel), tp, ep, width, routing, two_layouts=False)
        for at, captured in itertools.product(range(len(PHASES)), graphs):
            one_phase(cell, at, held, captured)


@cache
def dense_kernels(scheme: str, on: str) -> bool:
    """Whether everything beside the mixture has a kernel."""
    machine, of = MACHINES[on], SCHEMES[scheme]
    base = Need(machine.device, "bfloat16", False, machine.features, machine.arch)
    quantized = replace(base, format=of.weight.name, encoding=of.activation.name)
    asked = [(base, op) for op in ("linear", "encode", "rms_norm", "add_rms_norm", "rotate", "activate", "attend_paged",
                                   "attend_dense")]  # fmt: skip
    asked += [(replace(base, dtype="float32"), "linear"), (quantized, "encode")]
    asked += [(quantized, "linear_quant")] if of.quantized else []
    return all(any(c.op == op and not c.misses(need) for c in WHOLE) for need, op in asked)


@cache
def legal(scheme: str, width: int, tp: int, ep: int, *, shared: bool) -> bool:
    """Whether every weight of the layer can really be cut so: q, k, v and gate and up each by itself."""
    of, meta = SCHEMES[scheme], torch.empty(0, dtype=torch.bfloat16, device="meta")
    if ep > 1 and ep % tp:
        return False
    rows, columns = [(2048,), (1024,), (1024,)], [2048]
    if shared or ep == 1:
        rows, columns = [*rows, (width, width)], [*columns, width]
    try:
        for segments in rows:
            part = QuantTensor.empty(of.weight, segments, 2048, meta).shard("rows", 0, tp)
            if part.segments != tuple(each // tp for each in segments):
                return False
        for size in columns:
            QuantTensor.empty(of.weight, (2048,), size, meta).shard("columns", 0, tp)
    except UnsupportedError:
        return False
    return True
