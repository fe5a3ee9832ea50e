"""What planning decides, as values: the stages of a mixture's path, a plan per layer, or a refusal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from moesaic.contracts.contract import Choice, Duty, GateUp, Layout, Need, Packed, Rejection
from moesaic.contracts.scheme import Scheme

Role = Literal["gate", "cast", "route", "pack", "encode", "dispatch", "requantise", "decode", "gather", "localise",
               "experts", "finish", "combine", "scale", "shared"]  # fmt: skip
ADAPTERS: frozenset[Role] = frozenset({"cast", "pack", "encode", "requantise", "decode", "gather", "localise"})
RUNS: tuple[Role, ...] = ("gate", "route", "dispatch", "encode", "experts", "combine", "shared")
"""The stages that `moe/layer.py` can run, in its order; paths with others can be planned only hypothetically."""
PLAIN = Packed()
HELD: GateUp = "halves"
"""The order of rows in which `moe/experts.py` holds expert weights; backends pack them themselves. The same goes for
others."""
Phase = Literal["decode", "prefill"]
PHASES: tuple[Phase, ...] = ("decode", "prefill")
Ids = Literal["none", "global", "local"]
Parameters = tuple[tuple[str, int], ...]
"""Keyword arguments with which a kernel is called, where it was measured fastest with them."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of a path, and what travels after it.

    kernel: the backend; of adapters and other stages of our own, their role.  encoding, layout, ids: of the rows behind
    this stage (for `gate` and `cast`, encoding is the dtype of the router logits).  does: the duties it discharges.
    exact: no value is rounded that was not asked to be.  nbytes: read and written, for an adapter.
    """

    role: Role
    kernel: str
    encoding: str
    layout: Layout = "tokens"
    ids: Ids = "none"
    does: frozenset[Duty] = frozenset()
    exact: bool = True
    nbytes: int = 0

    def __str__(self) -> str:
        does = f" [{', '.join(sorted(self.does))}]" if self.does else ""
        return f"{self.role} {self.kernel} -> {self.encoding} {self.layout}{does}"


@dataclass(frozen=True, slots=True)
class MixturePath:
    """The path of a mixture layer. shared_weight: of a shared expert that runs among the others, else None."""

    stages: tuple[Stage, ...]
    shared_weight: float | None = None

    @property
    def adapters(self) -> tuple[Stage, ...]:
        return tuple(stage for stage in self.stages if stage.role in ADAPTERS)

    def stage(self, role: Role) -> Stage:
        """The first stage of a role; StopIteration where there is none."""
        return next(stage for stage in self.stages if stage.role == role)


@dataclass(frozen=True, slots=True)
class MixtureNeed:
    """What one mixture layer asks of its path in one phase and token bucket.

    need: device, dtype, format, encoding, activation, biases.  wires: encodings in which its rows may travel between
    ranks without the user's word.  factor: `routed_scaling_factor`.  groups_kept: 0 where experts are not grouped.
    router_bias: dtype of the selection bias as stored in memory, or None.  width: of one rank's experts.
    ranks: that share the experts.  tokens: most rows of a rank in this bucket.  experts: of one rank.
    """

    need: Need
    static: bool
    wires: frozenset[str]
    scoring: str
    factor: float
    groups_kept: int
    router_bias: str | None
    top_k: int
    shared: bool
    hidden: int
    width: int
    ranks: int
    phase: Phase
    tokens: int
    experts: int = 0
    renormalize: bool = True
    group_score: str = "top2_sum"

    def duties(self) -> frozenset[Duty]:
        """What must be done exactly once."""
        base: set[Duty] = {"route", "weights", "reduce"}
        if self.factor != 1.0:
            base.add("factor")
        if self.shared:
            base.add("shared")
        return frozenset(base)


@dataclass(frozen=True, slots=True)
class PerPhase:
    """A wish of its own for each phase; None is free."""

    decode: str | None = None
    prefill: str | None = None

    def __str__(self) -> str:
        each = (("decode", self.decode), ("prefill", self.prefill))
        return ",".join(f"{phase}={name}" for phase, name in each if name)


Wish = str | PerPhase | None


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user demands of a plan; None is free. Each is honoured or refused, never overridden.

    experts, dispatch, wire: of every phase, or of each its own.  two_layouts: expert weights may be held twice, where
    the kernels of the phases want them packed differently.  graphs: on a GPU, decoding stands in CUDA graphs.
    lossy: roundings that the checkpoint's scheme does not ask for are allowed.  hypothetical: kernels that Moesaic
    knows and cannot run yet may be planned with.  kv: format of the KV cache.  linear: plain products if it has any.
    """

    experts: Wish = None
    dispatch: Wish = None
    wire: Wish = None
    router_dtype: str | None = None
    attention: str | None = None
    linear: str | None = None
    deterministic: bool = False
    lossy: bool = False
    hypothetical: bool = False
    max_batch: int = 64
    tp: int = 1
    ep: int = 1
    """Ranks that cut each projection, and ranks that share whole experts (with ep > 1, tp cuts the dense ones only)."""
    kv: str = "bf16"
    graphs: bool = True
    two_layouts: bool = False

    def during(self, phase: Phase) -> Wishes:
        """As they concern one phase: its own wishes, in place of those of each."""
        own = {name: getattr(wish, phase) for name in ("experts", "dispatch", "wire")
               if isinstance(wish := getattr(self, name), PerPhase)}  # fmt: skip
        return replace(self, **own) if own else self


@dataclass(frozen=True, slots=True)
class Refusal:
    """There is no plan. kind: `impossible`, or `not_built` where only kernels that Moesaic cannot run yet would do.

    reasons: one per candidate.  nearest: a plan that works, in words, or None.
    """

    what: str
    where: str
    kind: Literal["impossible", "not_built"]
    reasons: tuple[Rejection, ...] = ()
    nearest: str | None = None


@dataclass(frozen=True, slots=True)
class Cell:
    """A mixture's plan for one phase, up to so many tokens of a rank; with every candidate that was not taken.

    packed: how its kernel finds the experts' weights.  parameters: with which it is called.
    """

    phase: Phase
    tokens: int
    path: MixturePath
    rejected: tuple[Rejection, ...] = ()
    packed: Packed = PLAIN
    parameters: Parameters = ()


@dataclass(frozen=True, slots=True)
class LinearPlan:
    """Dense projections of one scheme: their role in the layer, the kernel, and how wide they are."""

    role: str
    scheme: Scheme
    kernel: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Equal layers. cells: empty for a dense layer.  nbytes: of the weights of one of them, on one rank.

    derived: what is made of the stored weights when they are loaded, and anew whenever they are.
    """

    layers: tuple[int, ...]
    attention: str
    linears: tuple[LinearPlan, ...]
    experts: Scheme | None
    cells: tuple[Cell, ...]
    nbytes: int
    derived: tuple[str, ...] = ()

    @property
    def packed(self) -> tuple[Packed, ...]:
        """Every way in which the experts' weights are held: one, or two by the user's word."""
        return tuple(dict.fromkeys(cell.packed for cell in self.cells))

    @property
    def router_dtype(self) -> str:
        """Of the gate's weight and of the logits: one for all phases."""
        return self.cells[0].path.stage("gate").encoding if self.cells else "float32"


@dataclass(frozen=True)
class ModelPlan:
    """How a model runs. base: what every layer asks.  ops: for each need of a layer, the choice for each op that it
    calls; kernels are bound from it. kv: format of the cache.  Weights in bytes per rank."""

    architecture: str
    hardware: str
    base: Need
    wishes: Wishes
    layers: tuple[LayerPlan, ...]
    ops: Mapping[Need, tuple[Choice, ...]]
    notes: tuple[str, ...] = ()
    weight_bytes: int = 0
    kv_bytes_per_token: int = 0
    kv: str = "bf16"

    def explain(self) -> str:
        """Every choice with the reasons against the others; where layers ask for more, what is chosen otherwise."""
        lines = [choice.explain() for choice in self.ops[self.base]]
        usual = {choice.op: choice.chosen for choice in self.ops[self.base]}
        for need, choices in self.ops.items():
            other = [choice.explain() for choice in choices if choice.chosen != usual.get(choice.op)]
            gate = need.dtype != self.base.dtype or need.logits != self.base.logits
            what = "the gate's product" if gate else f"{need.format} weights and {need.encoding} rows"
            if other:
                lines += [f"with {what}:", *other]
        for layer in self.layers:
            for cell in layer.cells:
                named = " -> ".join(f"{stage.role} {stage.kernel}" for stage in cell.path.stages)
                op = f"experts, layers {span(layer.layers)}, {cell.phase}"
                lines += [f"path, layers {span(layer.layers)}, {cell.phase}: {named}"]
                lines += [Choice(op, cell.path.stage("experts").kernel, cell.rejected).explain()]
        return "\n".join(lines)


def span(layers: tuple[int, ...]) -> str:
    """`3`, `1-5`, `0, 4-6`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
