"""Two models on the same items: what one loses against the other. Standard library only.

Items that both solve, or both fail, say nothing of the difference; those that only one solves say everything. So does
the interval know them: for n items of which `gained` only the second solves and `lost` only the first,

    Z(d) = (gained - lost - n d) / sqrt(n (2 q + d (1 - d)))        q: the likeliest share of lost items if d is true

and the interval is every d with |Z(d)| <= z (Tango 1998, Stat. Med. 17:891, the score interval; unlike the simple one
it holds for few or no discordant items). The test is McNemar's, exact: under no difference an item that only one
solves is as likely the one's as the other's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959964


@dataclass(frozen=True, slots=True)
class Paired:
    """lost: solved by the first model only.  gained: by the second only.  count: of all items."""

    lost: int
    gained: int
    count: int

    @staticmethod
    def of(first: Sequence[bool], second: Sequence[bool]) -> Paired:
        """From the marks of the same items, in the same order. Raises ValueError where their numbers differ."""
        pairs = list(zip(first, second, strict=True))
        return Paired(sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs), len(pairs))

    @property
    def difference(self) -> float:
        """Accuracy of the second model minus the first's."""
        return (self.gained - self.lost) / self.count if self.count else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95% bounds of the difference; (-1, 1) of nothing."""
        if not self.count:
            return -1.0, 1.0
        return self._bound(-1.0, self.difference, Z95), self._bound(self.difference, 1.0, -Z95)

    @property
    def p_value(self) -> float:
        """Two-sided probability of a split at least as uneven as this if there is no difference."""
        total = self.lost + self.gained
        tail = sum(math.comb(total, k) for k in range(min(self.lost, self.gained) + 1))
        return min(1.0, 2 * tail / 2**total)

    def _bound(self, low: float, high: float, z: float) -> float:
        """Where the score, which falls as d grows, crosses z: by bisection to the last bits."""
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.score(middle) > z else (low, middle)
        return (low + high) / 2

    def score(self, d: float) -> float:
        """Z(d) of the head of this file."""
        n, b, c = self.count, self.gained, self.lost
        # dL/dq = 0 of the trinomial likelihood with the share of gained items fixed at q + d: 2n q^2 + s q - t = 0.
        s, t = (2 * n - b + c) * d - b - c, c * d * (1 - d)
        q = (math.sqrt(max(0.0, s * s + 8 * n * t)) - s) / (4 * n)
        variance, off = n * (2 * q + d * (1 - d)), b - c - n * d
        if variance > 0:
            return off / math.sqrt(variance)
        return math.copysign(math.inf, off) if off else 0.0
