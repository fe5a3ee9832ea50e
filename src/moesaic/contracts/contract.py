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
    """

    op: str
    backend: str
    devices: frozenset[str]
    dtypes: frozenset[str]
    batch_invariant: bool
    rank: int
    requires: frozenset[str] = frozenset()

    def misses(self, need: Need) -> str | None:
        """The first reason why this kernel cannot serve the need, or None where it can."""
        if need.device not in self.devices:
            return f"runs on {sorted(self.devices)}, not on {need.device}"
        if need.dtype not in self.dtypes:
            return f"computes in {sorted(self.dtypes)}, not in {need.dtype}"
        if need.batch_invariant and not self.batch_invariant:
            return "its result for a row depends on the other rows, which --deterministic forbids"
        lacking = self.requires - need.features
        return f"needs {sorted(lacking)}, which this hardware lacks" if lacking else None


@dataclass(frozen=True, slots=True)
class Need:
    """What one build asks of every op."""

    device: str
    dtype: str
    batch_invariant: bool = False
    features: frozenset[str] = frozenset()


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
