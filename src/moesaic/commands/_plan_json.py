"""A plan as machines read it. The keys are described in docs/planner.md, and stay."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from moesaic.commands._plan_view import Report, named
from moesaic.contracts.plan import Refusal


def as_json(report: Report) -> dict[str, Any]:
    base = {
        "model": report.model, "architecture": report.spec.architecture, "hardware": report.hardware.name,
        "ranks": report.ranks, "wishes": plain(report.wishes),
        "notes": list(report.spec.notes if isinstance(report.made, Refusal) else report.plan.notes),
    }  # fmt: skip
    if isinstance(report.made, Refusal):
        return base | {"refusal": plain(report.made)}
    made = report.plan
    return base | {
        "dtype": made.base.dtype, "graphs": made.base.capturable,
        "layers": [plain(layer) | {"name": named(report, layer.layers)} for layer in made.layers],
        "ops": [{"format": need.format, "encoding": need.encoding, "activation": need.activation, "dtype": need.dtype,
                 "chosen": {choice.op: choice.chosen for choice in choices}} for need, choices in made.ops.items()],
        "memory": plain(report.fit) | {
            "kv_per_token": made.kv_bytes_per_token, "fits": not report.fit.lacking,
            "kv": made.kv, "fits_with_fp8_kv": report.fp8_kv is not None,
            "fits_on": {"tp": report.more.tp, "ep": report.more.ep} if report.more else None,
        },
        "steps": [{"phase": phase, "requests": requests} | plain(each) for phase, requests, each in report.steps()],
    }  # fmt: skip


def plain(value: Any) -> Any:
    """Dataclasses, sets and tuples as JSON values; sets sorted."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, (frozenset, set)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return value
