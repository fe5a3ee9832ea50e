"""Tables of measured times, as data: what `moesaic bench tune` writes, and how a time is read between two entries.

    {"device": "h100", "packages": {"triton": "triton 3.6.0", ...}, "rows": [
        {"format": "fp8_block", "encoding": "fp8_group128", "experts": 128, "hidden": 2048, "width": 768, "top_k": 8,
         "tokens": 16, "ms": {"triton": 0.15, ...}, "parameters": {"deep_gemm": {"height": 64}}}, ...]}

device: a word of the device's name.  packages: backend -> distribution and version that were measured.  experts: of one
rank.  ms: milliseconds of a whole mixture layer by backend.  parameters: what a backend was fastest with, if anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, log
from typing import Any

from moesaic.contracts.plan import Parameters

Scheme = tuple[str, str]
"""Format, with its group where it has one, and encoding, as they print themselves."""
Shape = tuple[int, int, int, int]
"""Experts of a rank, hidden size, width of an expert, experts per token."""


@dataclass(frozen=True, slots=True)
class Point:
    """rows: the mean per expert.  ms, parameters: by backend."""

    rows: float
    ms: Mapping[str, float]
    parameters: Mapping[str, Parameters]


Points = Mapping[Scheme, Mapping[Shape, tuple[Point, ...]]]
"""Of one device; those of a shape in order of their rows."""


def points_of(tables: Iterable[Mapping[str, Any]], device: str, installed: Mapping[str, str]) -> Points:
    """The tables of a device; of two that measured the same, the later one counts.

    installed: versions by distribution. Times of a backend that was measured with another major or minor version than
    is installed are left out.
    """
    found: dict[Scheme, dict[Shape, dict[float, Point]]] = {}
    for table in tables:
        if table["device"] not in device.lower().split():
            continue
        stale = {name for name, made in table["packages"].items() if not same(made, installed)}
        for row in table["rows"]:
            shape: Shape = (row["experts"], row["hidden"], row["width"], row["top_k"])
            ms = {name: each for name, each in row["ms"].items() if name not in stale}
            chosen = {name: tuple(sorted(each.items())) for name, each in row.get("parameters", {}).items()}
            point = Point(mean(shape, row["tokens"]), ms, chosen)
            found.setdefault((row["format"], row["encoding"]), {}).setdefault(shape, {})[point.rows] = point
    return {scheme: {shape: tuple(each[rows] for rows in sorted(each)) for shape, each in shapes.items()}
            for scheme, shapes in found.items()}  # fmt: skip


def same(made: str, installed: Mapping[str, str]) -> bool:
    """Whether what was measured, `distribution version`, is what is installed here, if it is installed at all."""
    name, _, version = made.partition(" ")
    return installed.get(name, version).split(".")[:2] == version.split(".")[:2]


def mean(shape: Shape, tokens: float) -> float:
    """Rows per expert."""
    return max(tokens, 1) * shape[3] / shape[0]


def nearest(shapes: Mapping[Shape, tuple[Point, ...]], mine: Shape) -> tuple[Point, ...]:
    """The points of the shape that is nearest by the ratios of experts, hidden size and width."""

    def distance(other: Shape) -> float:
        return sum(abs(log(a / b)) for a, b in zip(mine[:3], other[:3], strict=True))

    return shapes[min(shapes, key=distance)] if shapes else ()


def interpolated(points: Sequence[tuple[float, float]], at: float) -> float:
    """Linear between the logarithms of both; continued flat to the left, in proportion to the right."""
    if at <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if at <= x1:
            return exp(log(y0) + log(y1 / y0) * log(at / x0) / log(x1 / x0))
    return points[-1][1] * at / points[-1][0]
