"""Which expert kernel is the fastest, as measured: the order of the candidates for one cell of a plan.

Between measured numbers of tokens times are interpolated. A shape that nobody measured is judged by the nearest one
that was, at as many rows per expert.

The fastest of the measured kernels takes the best rank that one of them has; the others stand behind it by the
logarithms of their times. A kernel that was not measured keeps its own rank: without a table the contracts decide, and
a user's own backend is preferred as it asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import exp, log
from typing import Any

from moesaic.contracts.contract import Contract
from moesaic.contracts.plan import MixtureNeed, Parameters
from moesaic.contracts.scheme import Encoding
from moesaic.planning.timetable import Point, Points, Shape, interpolated, mean, nearest, points_of

SAME = "_invariant"


@dataclass(frozen=True)
class Tuning:
    """What was measured on one device."""

    points: Points = field(default_factory=dict)

    @staticmethod
    def of(tables: Iterable[Mapping[str, Any]], device: str, installed: Mapping[str, str] | None = None) -> Tuning:
        """device: its name.  installed: versions by distribution, where the device is this machine's."""
        return Tuning(points_of(tables, device, installed or {}))

    def near(self, need: MixtureNeed) -> tuple[Point, ...]:
        """The points of the need's shape, else of the nearest one; none where its scheme was never measured.

        All that is measured is measured with rows of a model that computes in BF16.
        """
        asks = need.need
        shapes = self.points.get((asks.stored, str(Encoding(asks.encoding, need.static))), {})
        return nearest(shapes, shape_of(need)) if need.experts and asks.dtype == "bfloat16" else ()

    def costs(self, need: MixtureNeed, backends: Iterable[str]) -> dict[str, float]:
        """Milliseconds, at the need's tokens, of those backends that were measured.

        Where results may not depend on the batch, neither may the choice: then their geometric mean over all sizes.
        Where they may, `NAME_invariant` is left to stand behind NAME, which nothing but noise would put in front.
        """
        points = self.near(need)
        names = [name for name in dict.fromkeys(backends) if any(name in point.ms for point in points)]
        if need.need.batch_invariant:
            common = [point.ms for point in points if all(name in point.ms for name in names)]
            return {name: exp(sum(log(ms[name]) for ms in common) / len(common)) for name in names if common}
        names = [name for name in names if not name.endswith(SAME) or name.removesuffix(SAME) not in names]
        each = {name: [(point.rows, point.ms[name]) for point in points if name in point.ms] for name in names}
        return {name: interpolated(times, mean(shape_of(need), need.tokens)) for name, times in each.items()}

    def ranked(self, need: MixtureNeed, kernels: Sequence[Contract]) -> list[Contract]:
        """The kernels with the ranks that they deserve here, best first.

        A layer takes the kernels with the least sum of ranks over its cells: so those with the least product of times.
        """
        costs = self.costs(need, [kernel.backend for kernel in kernels])
        best = min((kernel.rank for kernel in kernels if kernel.backend in costs), default=0)
        ranks = {name: best + log(ms / min(costs.values())) for name, ms in costs.items()}
        made = [replace(kernel, rank=ranks.get(kernel.backend, kernel.rank)) for kernel in kernels]
        return sorted(made, key=lambda kernel: kernel.rank)

    def buckets(self, need: MixtureNeed, backends: Iterable[str]) -> tuple[int, ...]:
        """The most tokens of each bucket, throughout which one backend is the fastest; need.tokens ends the last."""
        names, most = tuple(backends), need.tokens
        measured = {round(point.rows * need.experts / need.top_k) for point in self.near(need)}
        sizes = sorted({1, most, *(tokens for tokens in measured if 1 < tokens < most)})
        return (*(turn for low, high in pairwise(sizes) for turn in self.turns(need, names, low, high)), most)

    def turns(self, need: MixtureNeed, names: Sequence[str], low: int, high: int) -> list[int]:
        """Up to how many tokens, from low to high, one backend is the fastest before another takes over."""
        best = []
        for tokens in (low, high):
            costs = self.costs(replace(need, tokens=tokens), names)
            best.append(min(costs, key=lambda name: costs[name], default=None))
        if best[0] == best[1] or high - low <= 1:
            return [low] if best[0] != best[1] else []
        middle = (low + high) // 2
        return self.turns(need, names, low, middle) + self.turns(need, names, middle, high)

    def parameters(self, need: MixtureNeed, backend: str) -> Parameters:
        """What a backend was the fastest with, at the point nearest to the need."""
        points, rows = [p for p in self.near(need) if backend in p.ms], mean(shape_of(need), need.tokens)
        best = min(points, key=lambda point: abs(log(point.rows / rows)), default=None)
        return best.parameters.get(backend, ()) if best else ()


UNTUNED = Tuning()


def shape_of(need: MixtureNeed) -> Shape:
    return (need.experts, need.hidden, need.width, need.top_k)
