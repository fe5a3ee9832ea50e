"""What a kernel promises and what a build asks for, as data; and the record of why one was chosen.

A backend declares one `Contract` per op it implements. `kernels/registry.py` matches contracts with a `Need` once, when
a model is built. Nothing asks again at run time.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Contract:
    """One op of one backend.

    dtypes: activation dtypes it computes in, by name.  batch_invariant: a row's result does not depend on which other
    rows run beside it.  requires: hardware features by name (see `hardware.py`).  rank: lower is preferred.
    formats, encodings: of the weights and rows that it multiplies.  activations: kinds that it applies.
    expert_bias: takes experts with biases.  sinks: attention takes sink logits.
    """

    op: str
    backend: str
    devices: frozenset[str]
    dtypes: frozenset[str]
    batch_invariant: bool
    rank: int
    requires: frozenset[str] = frozenset()
    formats: frozenset[str] = frozenset({"bf16"})
    encodings: frozenset[str] = frozenset({"bf16"})
    activations: frozenset[str] = frozenset({"silu"})
    expert_bias: bool = False
    sinks: bool = False

    def misses(self, need: Need) -> str | None:
        """The first reason why this kernel cannot serve the need, or None where it can."""
        if need.device not in self.devices:
            return f"runs on {sorted(self.devices)}, not on {need.device}"
        if need.dtype not in self.dtypes:
            return f"computes in {sorted(self.dtypes)}, not in {need.dtype}"
        if need.batch_invariant and not self.batch_invariant:
            return "its result for a row depends on the other rows, which --deterministic forbids"
        if lacking := self.requires - need.features:
            return f"needs {sorted(lacking)}, which this hardware lacks"
        return self.misses_operands(need)

    def misses_operands(self, need: Need) -> str | None:
        """The same for what one layer brings; each op looks only at what it meets."""
        multiplies, routed = self.op in ("linear_quant", "experts"), self.op == "experts"
        if multiplies and need.format not in self.formats:
            return f"takes weights in {sorted(self.formats)}, not in {need.format}"
        if (multiplies or self.op == "encode") and need.encoding not in self.encodings:
            return f"takes rows in {sorted(self.encodings)}, not in {need.encoding}"
        if (routed or self.op == "activate") and need.activation not in self.activations:
            return f"applies {sorted(self.activations)}, not {need.activation}"
        if routed and need.expert_bias and not self.expert_bias:
            return "takes no expert biases"
        return "takes no attention sinks" if need.sinks and self.op.startswith("attend") and not self.sinks else None


@dataclass(frozen=True, slots=True)
class Need:
    """What one build asks of every op, and (from `format` on) what one layer asks of its own."""

    device: str
    dtype: str
    batch_invariant: bool = False
    features: frozenset[str] = frozenset()
    format: str = "bf16"
    encoding: str = "bf16"
    activation: str = "silu"
    expert_bias: bool = False
    sinks: bool = False


@dataclass(frozen=True, slots=True)
class Rejection:
    """A candidate that was not taken, and why."""

    candidate: str
    reason: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel taken for one op, and every one that was not."""

    op: str
    chosen: str
    rejected: tuple[Rejection, ...] = field(default=())

    def explain(self) -> str:
        """One line per candidate, the chosen one first."""
        lines = [f"{self.op}: {self.chosen}"]
        lines += [f"  not {r.candidate}: {r.reason}" for r in self.rejected]
        return "\n".join(lines)
