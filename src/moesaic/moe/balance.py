"""How evenly the experts are used: counts per layer and expert, on demand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Load:
    """Routed rows per expert of one layer. balance: busiest over mean, 1.0 is even."""

    layer: int
    counts: tuple[int, ...]

    @property
    def balance(self) -> float:
        return max(self.counts) * len(self.counts) / max(1, sum(self.counts))

    @property
    def dead(self) -> int:
        """Experts that no token chose."""
        return self.counts.count(0)


class LoadMeter:
    """Counts choices per expert; off until started, since it may cost an operation per layer and step.

    always: count although it is off: a step that is recorded to be played again cannot know.
    steps: how many were counted; whoever runs them keeps it.
    """

    def __init__(self, experts: Sequence[int], device: torch.device | None = None) -> None:
        """experts: the number of experts of each mixture layer, in layer order."""
        self.counts = [torch.zeros(count, dtype=torch.int64, device=device) for count in experts]
        self.on = self.always = False
        self.steps = 0

    def start(self) -> None:
        self.on, self.steps = True, 0
        for counts_E in self.counts:
            counts_E.zero_()

    def counters(self, layer: int) -> Tensor | None:
        """INT64 [E], to be added to, or None where nobody counts. layer: index among mixture layers."""
        return self.counts[layer] if self.on or self.always else None

    @contextmanager
    def counting(self) -> Iterator[None]:
        """`always`, for a while."""
        self.always = True
        try:
            yield
        finally:
            self.always = False

    def loads(self) -> tuple[Load, ...]:
        if not self.counts:
            return ()
        every = torch.cat(self.counts).cpu()  # one copy from the device
        found = every.split([len(counts_E) for counts_E in self.counts])
        return tuple(Load(i, tuple(counts_E.tolist())) for i, counts_E in enumerate(found))


def add_choices(counts_E: Tensor, ids_TA: Tensor) -> None:
    """Adds the choices to the counters. Padding ids (-1) are left out."""
    chosen = ids_TA.flatten()
    counts_E.index_add_(0, chosen.clamp(min=0).long(), (chosen >= 0).to(counts_E.dtype))
