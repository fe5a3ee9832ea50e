"""The backends: their contracts as a catalogue to plan with, and their functions, bound as a plan says.

A backend is a file of this folder, or a module that another package announces under the entry point
`moesaic.kernels`. It has `CONTRACTS`, one function per op that it declares, and, where it needs more than torch,
`probe() -> str | None`: why it cannot run on this machine (it tries, rather than looks), or None.
One whose contracts for experts name a `packing` has `pack(w, before)` and `unpack(w)`: ExpertWeights into the order of
bytes that its kernels read, and back, within the storage that they have.
One on a CPU names in `TAPED` the ops that a tape can hold (`tape.py`): they call kernels only through `Entry`, or none,
and learn what differs from step to step only from tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any, cast

from moesaic.contracts.contract import Contract, Need
from moesaic.contracts.plan import LayerPlan, MixturePath, ModelPlan, Parameters, Phase
from moesaic.errors import UnsupportedError
from moesaic.kernels import declared
from moesaic.kernels.ops import PROMPTS, Ops

BACKENDS = (
    "cpu_native", "cpu", "cpu_invariant", "cpu_quant", "triton", "triton_invariant", "hopper",
    "hopper_invariant", "deep_gemm", "humming", "flashinfer", "reference",
)  # fmt: skip
"""Every backend file of this folder. Order does not matter: contracts carry their rank."""
ENTRY_POINTS = "moesaic.kernels"
IN_PLACE_OF = {"linear_terms": "linear_quant", "attend_encode": "attend_paged", "attend_latent": "attend_paged"}
NONE: Mapping[str, Parameters] = MappingProxyType({})
CHOOSES_AS = {"triton_invariant": "triton", "hopper": "triton"}
"""Backends whose `gate` takes the place of another one's `route`."""


@cache
def backends() -> Mapping[str, ModuleType]:
    """The backend modules by name, ours and those of installed packages. Raises UnsupportedError for one of those."""
    found = {name: import_module(f"moesaic.kernels.{name}") for name in BACKENDS}
    for point in entry_points(group=ENTRY_POINTS):
        if point.name in found:
            raise unusable(point, "bears the name of another backend")
        found[point.name] = announced(point)
    return found


def announced(point: EntryPoint) -> ModuleType:
    """A backend of another package, held against what a backend is."""
    try:
        module: ModuleType = point.load()
    except Exception as error:  # whatever a stranger's module raises when it is imported
        raise unusable(point, f"cannot be imported ({error!r:.200})") from error
    contracts = getattr(module, "CONTRACTS", None)
    if not isinstance(contracts, tuple) or not all(isinstance(each, Contract) for each in contracts):
        raise unusable(point, "has no tuple CONTRACTS of contracts")
    for contract in contracts:
        if contract.backend != point.name:
            raise unusable(point, f"declares a contract for {contract.backend!r:.80}")
        if contract.built and not callable(getattr(module, contract.op, None)):
            raise unusable(point, f"declares {contract.op} and has no function of that name")
        if lacking := [each for each in wanted(contract) if not callable(getattr(module, each, None))]:
            raise unusable(point, f"packs experts as {contract.packing!r:.80} and has no {lacking[0]}")
    return module


def wanted(contract: Contract) -> tuple[str, ...]:
    """What a backend with such a contract has besides the op."""
    return ("pack", "unpack") if contract.built and contract.op == "experts" and contract.packing != "plain" else ()


def unusable(point: EntryPoint, what: str) -> UnsupportedError:
    package = point.dist.name if point.dist else point.value
    where = f"entry point {point.name} of {package}"
    return UnsupportedError(f"the kernel backend {what}", where=where, remedy="Correct or uninstall the package.")


def catalogue() -> tuple[Contract, ...]:
    """Every contract, of built backends and of those that are only known. Nothing is probed: good for any hardware."""
    built = tuple(contract for module in backends().values() for contract in module.CONTRACTS)
    return built + declared.CONTRACTS


@cache
def local_catalogue() -> tuple[Contract, ...]:
    """The same for this machine: contracts of a backend that fails its probe carry the reason."""
    found: list[Contract] = []
    for module in backends().values():
        reason = probed(module)
        found += [replace(contract, broken=reason or "") for contract in module.CONTRACTS]
    return (*found, *declared.CONTRACTS)


def probed(module: ModuleType) -> str | None:
    """Why a backend cannot run here, or None. One whose probe itself fails cannot."""
    try:
        return cast("str | None", module.probe()) if hasattr(module, "probe") else None
    except Exception as error:  # a stranger's probe may raise anything, and another backend may do
        return f"fails its probe on this machine ({error!r:.200})"


@dataclass(frozen=True)
class BoundCell:
    """What a mixture runs with in one phase, up to so many tokens: its path, and the ops that the path names (`linear`
    in the gate's dtype; `gate`, where product and choice are one op)."""

    phase: Phase
    tokens: int
    path: MixturePath
    ops: Ops
    packer: ModuleType | None = None
    """The backend whose order of bytes the weights must have (`pack`, `unpack`), where that is not the formats' own."""


class Kernels:
    """The functions that a plan chose. Layers that ask for the same get the same object."""

    def __init__(self, plan: ModelPlan) -> None:
        self.plan = plan
        self._bound: dict[Any, Ops] = {}
        self.ops = self.under()

    def under(self, **asks: Any) -> Ops:
        """The ops for a layer. asks: fields of `Need` from `format` on. KeyError: no such layer was planned."""
        need = replace(self.plan.base, **asks)
        if need not in self._bound:
            chosen = {choice.op: choice.chosen for choice in self.plan.ops[self.plan.base]}
            chosen |= {choice.op: choice.chosen for choice in self.plan.ops[need]}
            self._bound[need] = self.bind(chosen)
        return self._bound[need]

    def bind(self, chosen: Mapping[str, str], parameters: Mapping[str, Parameters] = NONE) -> Ops:
        """op -> backend, as an object with the functions."""
        return bind(own(chosen), parameters)

    def layer(self, layer: int) -> LayerPlan:
        """The plan of a layer by its index; StopIteration where there is none."""
        return next(each for each in self.plan.layers if layer in each.layers)

    def mixture(self, layer: int, **asks: Any) -> tuple[BoundCell, ...]:
        """The cells of a mixture layer, in the plan's order: of each phase the smallest first."""
        base, of = self.plan.base, self.layer(layer)
        chosen = {
            "encode": self.chosen("encode", replace(base, **asks)),
            "linear": self.chosen("linear", replace(base, dtype=of.router_dtype)),
        }
        gate, bound = self.chosen("gate", replace(base, logits=of.router_dtype)), []
        for cell in of.cells:
            names = {**chosen, **{role: cell.path.stage(role).kernel for role in ("route", "experts")}}
            if CHOOSES_AS.get(gate, gate) == names["route"]:
                names["gate"] = gate
            key = (*names.items(), cell.parameters)
            if key not in self._bound:
                self._bound[key] = self.bind(names, dict.fromkeys(("experts", "experts_terms"), cell.parameters))
            packer = backends()[names["experts"]] if cell.packed.packing != "plain" else None
            bound.append(BoundCell(cell.phase, cell.tokens, cell.path, self._bound[key], packer))
        return tuple(bound)

    @property
    def taped(self) -> bool:
        """Whether a tape can hold every op that a decoding step calls."""
        return all(op in getattr(backends()[name], "TAPED", ()) for op, name in self.decoding())

    def decoding(self) -> Iterator[tuple[str, str]]:
        """(op, backend) of whatever a step that only decodes may call."""
        base = {choice.op: choice.chosen for choice in self.plan.ops[self.plan.base]}
        for choices in self.plan.ops.values():
            chosen = own(base | {choice.op: choice.chosen for choice in choices})
            yield from ((op, name) for op, name in chosen.items() if op not in PROMPTS)
        for cell in (cell for layer in self.plan.layers for cell in layer.cells if cell.phase == "decode"):
            yield from ((role, cell.path.stage(role).kernel) for role in ("route", "experts"))

    def chosen(self, op: str, need: Need) -> str:
        """The backend of an op under a need; empty where there is none, as for a fused op that nobody has."""
        return next((choice.chosen for choice in self.plan.ops[need] if choice.op == op), "")


def bind(chosen: Mapping[str, str], parameters: Mapping[str, Parameters] = NONE) -> Ops:
    """op -> backend, as an object with the functions; those that were measured fastest with parameters get them. A
    backend of experts that encodes rows while it sorts them has `encode_later`, which leaves them to it."""
    found: dict[str, Any] = {}
    for op, name in chosen.items():
        function, given = getattr(backends()[name], op), dict(parameters.get(op, ()))
        found[op] = partial(function, **given) if given else function
    if "experts" in chosen:
        found["encode"] = getattr(backends()[chosen["experts"]], "encode_later", found.get("encode"))
    return cast(Ops, SimpleNamespace(**found))


def own(chosen: Mapping[str, str]) -> dict[str, str]:
    """op -> backend, without the fused ops that take the place of an op for which another backend was chosen; with
    `experts_terms`, which is of the contract for experts, where their backend has it."""
    kept = {op: name for op, name in chosen.items() if chosen.get(IN_PLACE_OF.get(op, op)) == name}
    if "experts" in kept and hasattr(backends()[kept["experts"]], "experts_terms"):
        kept["experts_terms"] = kept["experts"]
    return kept
