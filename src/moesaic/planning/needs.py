"""From a model's spec to what each of its layers asks: the input of planning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

from moesaic.contracts.contract import Need, asks_of
from moesaic.contracts.plan import MixtureNeed, Phase, Wishes
from moesaic.contracts.scheme import SCHEMES, UNQUANTIZED, Scheme
from moesaic.contracts.spec import GQASpec, LayerSpec, LinearSpec, MLPSpec, ModelSpec, MoESpec

WIRES: dict[str, frozenset[str]] = {
    "bf16": frozenset({"bf16"}),
    "fp8_group128": frozenset({"bf16", "fp8_group128"}),
    "fp8_token": frozenset({"bf16", "fp8_token"}),
    "fp8_tensor": frozenset({"bf16", "fp8_tensor", "fp8_group128"}),
    "mxfp8": frozenset({"bf16", "mxfp8"}),
    "nvfp4": frozenset({"bf16", "nvfp4"}),
}
"""Encodings in which rows may travel that the experts will see in the key's encoding: itself, or one that is finer."""


def blocks_of(spec: ModelSpec) -> list[LayerSpec]:
    """Decoder blocks, then those of the drafts."""
    return [*spec.layers, *(draft.block for draft in spec.drafts)]


def stacks_of(block: LayerSpec) -> Iterator[tuple[str, tuple[LinearSpec, ...]]]:
    """(role, parts that are stacked into one matrix) of every dense projection, as `layers/` stacks them.

    `kv_b` is left out: it is held unquantised whatever its scheme.
    """
    at = block.attention
    if isinstance(at, GQASpec):
        yield "qkv", (at.q, at.k, at.v)
    else:
        yield "down", (at.q_a, at.kv_a) if at.q_a else (at.kv_a,)
        yield "q_b", (at.q_b,)
    yield "o", (at.o,)
    mlp = block.mlp if isinstance(block.mlp, MLPSpec) else block.mlp.shared
    if mlp is not None:
        yield "gate_up", (mlp.gate, mlp.up)
        yield "mlp_down", (mlp.down,)


def schemes_of(parts: tuple[LinearSpec, ...]) -> list[Scheme]:
    """The schemes in which the parts of one stack run, one for each run of equal ones."""
    return [scheme for scheme, _ in groupby(part.runs for part in parts)]


def experts_scheme(spec: MoESpec) -> Scheme:
    """As `moe/experts.py` holds them: one scheme, or unquantised where the projections differ."""
    schemes = {spec.gate.runs, spec.up.runs, spec.down.runs}
    return schemes.pop() if len(schemes) == 1 else UNQUANTIZED


def schemes_in(block: LayerSpec) -> list[Scheme]:
    """Every scheme that a layer runs in, its mixture's first."""
    routed = [experts_scheme(block.mlp)] if isinstance(block.mlp, MoESpec) else []
    return [*routed, *(scheme for _, parts in stacks_of(block) for scheme in schemes_of(parts))]


def by_row_instead_of(scheme: Scheme) -> str:
    """The nearest scheme whose rows have scales of their own and need no calibration: of the same weights if any is."""
    free = (each for each in SCHEMES.values() if each.activation.by_row and not each.activation.static)
    return next((each.name for each in free if each.weight == scheme.weight), "fp8_channel")


def layer_needs(block: LayerSpec, base: Need, router: str) -> Iterator[tuple[Need, frozenset[str]]]:
    """(need, the ops that will be called under it) of everything in a layer but its mixture's path.

    router: dtype in which the gate computes.
    """
    for _, parts in stacks_of(block):
        for scheme in schemes_of(parts):
            if scheme.quantized:
                yield under(base, scheme), frozenset({"encode", "linear_quant", "linear_terms"})
    if isinstance(block.attention, GQASpec) and getattr(block.attention, "sinks", None):
        yield replace(base, sinks=True), frozenset({"attend_paged", "attend_dense", "attend_encode"})
    mlp = block.mlp.shared if isinstance(block.mlp, MoESpec) else block.mlp
    if mlp is not None:
        yield replace(base, activation=mlp.activation.kind), frozenset({"activate", "mlp"})
    if isinstance(block.mlp, MoESpec):
        yield experts_need(block.mlp, base), frozenset({"encode"})
        yield replace(base, dtype=router), frozenset({"linear"})
        yield replace(base, logits=router), frozenset({"gate"})


def under(base: Need, scheme: Scheme) -> Need:
    return replace(base, **asks_of(scheme))


def experts_need(spec: MoESpec, base: Need) -> Need:
    need = under(base, experts_scheme(spec))
    return replace(need, activation=spec.activation.kind, expert_bias=spec.gate.bias)


def mixture_need(spec: MoESpec, base: Need, wishes: Wishes, phase: Phase, tokens: int) -> MixtureNeed:
    router, scheme = spec.router, experts_scheme(spec)
    need = replace(experts_need(spec, base), capturable=base.capturable and phase == "decode")
    return MixtureNeed(
        need=need, static=scheme.activation.static, wires=WIRES[scheme.activation.name],
        scoring=router.scoring, factor=router.scale, groups_kept=router.top_groups if router.groups > 1 else 0,
        router_bias="float32" if router.bias else None, top_k=router.top_k, shared=spec.shared is not None,
        hidden=spec.gate.inputs, width=spec.intermediate // (wishes.tp if wishes.ep == 1 else 1), ranks=wishes.ep,
        phase=phase, tokens=tokens, experts=router.experts // wishes.ep, renormalize=router.renormalize,
        group_score=router.group_score,
    )  # fmt: skip
