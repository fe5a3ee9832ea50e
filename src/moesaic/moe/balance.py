"""How evenly the experts are used: counts per layer and expert, on demand."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Counts choices per expert; off until started, since it costs an operation per layer and step."""

    def __init__(self, experts: Sequence[int]) -> None:
        """experts: the number of experts of each mixture layer, in layer order."""
        self.counts = [torch.zeros(count, dtype=torch.int64) for count in experts]
        self.on = False

    def start(self) -> None:
        self.on = True
        for counts_E in self.counts:
            counts_E.zero_()

    def count(self, layer: int, ids_TA: Tensor) -> None:
        """layer: index among mixture layers. Padding ids (-1) are left out."""
        if self.on:
            counts_E = self.counts[layer]
            counts_E += torch.bincount(ids_TA[ids_TA >= 0], minlength=len(counts_E)).to(counts_E.device)

    def loads(self) -> tuple[Load, ...]:
        return tuple(Load(i, tuple(counts_E.tolist())) for i, counts_E in enumerate(self.counts))
