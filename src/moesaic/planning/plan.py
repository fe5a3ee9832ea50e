"""Planning a model: a pure function of its spec, the hardware, the catalogue of contracts and the user's wishes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from moesaic.contracts.contract import Choice, Contract, Need, Rejection
from moesaic.contracts.plan import Cell, LayerPlan, LinearPlan, MixtureNeed, ModelPlan, Refusal, Wishes
from moesaic.contracts.spec import GQASpec, LayerSpec, MLASpec, ModelSpec, MoESpec
from moesaic.formats.sizes import illegal_cut
from moesaic.hardware import Hardware
from moesaic.planning.cost import block_bytes, kv_bytes, pieces, weights
from moesaic.planning.fits import UNBUILT
from moesaic.planning.mixture import able, find
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

FUSED_OPS = frozenset({"gate", "store_latent", "attend_latent", "mlp"})
"""Taken where a backend has them: layers compose the others."""
COMMON_OPS = ("linear", "encode", "rms_norm", "add_rms_norm", "rotate", "activate", "route", "attend_paged",
              "attend_dense")  # fmt: skip
PREFILL = 8192
"""Tokens of one prefill step for which a path is planned."""


class Refused(Exception):
    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.what)
        self.refusal = refusal


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
        return LayerPlan(
            tuple(b.index for b in blocks), attend.chosen, tuple(linears),
            experts_scheme(mixture) if mixture else None, self.cells(mixture, block.index) if mixture else (),
            block_bytes(block, self.spec.hidden, self.wishes, dtype),
        )  # fmt: skip

    def cells(self, mixture: MoESpec, index: int) -> tuple[Cell, ...]:
        """Decode up to the largest batch, prefill up to one long step; cut where another kernel measures faster."""
        cells = []
        for phase, most in (("decode", self.wishes.max_batch), ("prefill", PREFILL)):
            whole = mixture_need(mixture, self.base, self.wishes, phase, most)  # type: ignore[arg-type]
            kernels = [kernel.backend for kernel in able("experts", whole, self.catalogue, self.wishes, [])]
            for tokens in self.tuning.buckets(whole, kernels):
                need = replace(whole, tokens=tokens)
                path, rejected = find(need, self.catalogue, self.wishes, self.tuning)
                if path is None:
                    raise Refused(self.refusal(need, index, rejected))
                parameters = self.tuning.parameters(need, path.stage("experts").kernel)
                cells.append(Cell(need.phase, tokens, path, tuple(rejected), parameters))
        return tuple(cells)

    def refusal(self, need: MixtureNeed, index: int, rejected: list[Rejection]) -> Refusal:
        """Why a mixture has no path; whether one is known that is not built; and what would work instead."""
        where = f"layer {index}, {need.phase}"
        free = replace(self.wishes, experts=None, dispatch=None, wire=None, router_dtype=None)
        works, _ = find(need, self.catalogue, free)
        kind = "not_built" if find(need, self.catalogue, replace(self.wishes, hypothetical=True))[0] else "impossible"
        nearest = None
        if works is not None:
            nearest = f"--experts {works.stage('experts').kernel} --dispatch {works.stage('dispatch').kernel}"
        form = f"{need.need.format} weights with {need.need.encoding} rows"
        return Refusal(f"no path for {form} on {self.hardware.name}", where, kind, tuple(rejected), nearest)  # type: ignore[arg-type]

    def check_cuts(self, block: LayerSpec) -> None:
        """Tensor parallelism cuts outputs of the first projections and inputs of the last, block by block."""
        ways = self.wishes.tp
        mixture = block.mlp if isinstance(block.mlp, MoESpec) else None
        if mixture and mixture.router.experts % self.wishes.ep:
            what = f"{mixture.router.experts} experts cannot be shared by {self.wishes.ep} ranks"
            raise Refused(Refusal(what, f"layer {block.index}", "impossible"))
        if ways == 1:
            return
        at = block.attention
        keys = at.kv_heads if isinstance(at, GQASpec) else ways  # where ranks are more, several hold the same ones
        if at.heads % ways or max(keys, ways) % min(keys, ways):
            what = f"--tp {ways}: {at.heads} query heads and {keys} of keys cannot be shared by {ways} ranks"
            raise Refused(Refusal(what, f"layer {block.index}", "impossible"))
        cut = mixture is not None and self.wishes.ep == 1  # expert parallelism keeps experts whole
        sides = [(mixture.gate, 0), (mixture.up, 0), (mixture.down, 1)] if mixture and cut else []
        sides += [(part, 1 if role in ("o", "mlp_down") else 0) for role, parts in stacks_of(block) for part in parts
                  if role != "down"]  # fmt: skip
        for part, axis in sides:
            size = part.inputs if axis else part.outputs
            pieces_of = min(ways, keys) if isinstance(at, GQASpec) and part in (at.k, at.v) else ways
            if reason := illegal_cut(part.runs.weight, size, pieces_of, axis):
                raise Refused(Refusal(f"--tp {ways}: {reason}", part.name, "impossible"))

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

    tuning: what was measured on that hardware.
    """
    latent = any(isinstance(block.attention, MLASpec) for block in spec.layers)
    base = Need(hardware.device, dtype, wishes.deterministic, hardware.features, hardware.arch, latent=latent)
    planner = Planner(spec, hardware, tuple(catalogue), wishes, base, tuning)
    try:
        return planned(planner)
    except Refused as refused:
        return refused.refusal


def planned(planner: Planner) -> ModelPlan:
    spec, base, wishes = planner.spec, planner.base, planner.wishes
    if wishes.tp > 1 and not wishes.hypothetical:
        what = "projections cut across ranks are known, but not built into Moesaic yet"
        raise Refused(Refusal(what, f"--tp {wishes.tp}", "not_built"))
    ops: dict[Need, dict[str, Choice]] = {}
    planner.ops_for(base, frozenset(COMMON_OPS) | FUSED_OPS - {"mlp"}, ops)
    groups: dict[object, list[LayerSpec]] = {}
    for block in blocks_of(spec):
        groups.setdefault(kind_of(block), []).append(block)
    layers = []
    for blocks in groups.values():
        layers.append(planner.layer(blocks))
        for need, wanted in layer_needs(blocks[0], base):
            planner.ops_for(need, wanted - {"experts"}, ops)
    for draft in spec.drafts:
        if draft.join.runs.quantized:
            planner.ops_for(under(base, draft.join.runs), frozenset({"encode", "linear_quant"}), ops)
    return ModelPlan(
        spec.architecture, planner.hardware.name, base, wishes, tuple(layers),
        {need: tuple(chosen.values()) for need, chosen in ops.items()}, spec.notes,
        weights(spec, wishes, base.dtype), sum(kv_bytes(block, wishes, base.dtype) for block in spec.layers),
    )  # fmt: skip


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
    wish = {"experts": wishes.experts, "attend_paged": wishes.attention, "linear_quant": wishes.linear}.get(op)
    misses: dict[str, str | None] = {}
    for contract in sorted((c for c in catalogue if c.op == op), key=lambda c: c.rank):
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
        what = f"no kernel for {op} of {need.format} weights with {need.encoding} rows in {need.dtype}"
        if wish is not None and able:
            what = f"{wish!r} cannot be used for {op}: {misses.get(wish) or 'there is no such backend'}"
        kind: Literal["impossible", "not_built"] = "not_built" if UNBUILT in misses.values() else "impossible"
        raise Refused(Refusal(what, op, kind, reasons, f"{able[0]} for {op}" if able else None))
    chosen = wish or able[0]
    rejected = tuple(
        Rejection(name, miss or ("another was asked for" if wish else f"{chosen} is preferred"))
        for name, miss in misses.items() if name != chosen
    )  # fmt: skip
    return Choice(op, chosen, rejected)
