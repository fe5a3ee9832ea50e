"""Draw what a GPU's benchmarks found, as SVG by hand: equal results give equal bytes on every machine.

docs/gpu-steps.svg: decoding steps over their floor. docs/gpu-experts.svg: for every shape and scheme the floor over the
time of a mixture layer, by kernel; 1 is the hardware's limit. Those of another device than an H100 end with its name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

Curve = Sequence[tuple[float, float]]
WIDTH, HEIGHT, LEFT, GAP, TOP = 330, 230, 50, 150, 60
"""Of a panel and what is around it, in pixels; names of the curves stand in the gap."""
COLOURS = ("#1f6f8b", "#b5541c", "#3a7d34", "#7a3e9d", "#a8871a", "#c2336b", "#555555", "#2b8fb3", "#8a5a2b", "#0b8f6a")
DASHES = ("", "6 3", "2 3", "8 2 2 2")
KERNELS = ("hopper", "humming", "deep_gemm", "triton", "hopper_invariant")
"""That have a colour of their own in all panels."""
LABEL = 13
"""Pixels per line of names."""
ROW, COLUMNS = TOP + HEIGHT + 50, 4
"""Pixels per row of panels; panels in a row."""


def svg(title: str, panels: Mapping[str, tuple[Mapping[str, Curve], float]], unit: str) -> str:
    """panels: by title, curves by name, and the most that y is drawn to, from 0 on; x is a logarithm.  unit: of x."""
    wide, high = LEFT + min(len(panels), COLUMNS) * (WIDTH + GAP), -(-len(panels) // COLUMNS) * ROW
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-family="sans-serif" font-size="11">',
        f'<rect width="{wide}" height="{high}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="20" font-size="14" fill="#111">{escape(title)}</text>',
    ]
    for i, (name, (curves, most)) in enumerate(panels.items()):
        place = f"translate({LEFT + i % COLUMNS * (WIDTH + GAP)},{TOP + i // COLUMNS * ROW})"
        parts += [f'<g transform="{place}">', *panel(name, curves, most, unit), "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def panel(title: str, curves: Mapping[str, Curve], most: float, unit: str) -> list[str]:
    parts = [f'<text x="{WIDTH / 2}" y="-12" text-anchor="middle" font-size="12">{escape(title)}</text>',
             f'<text x="{WIDTH / 2}" y="{HEIGHT + 34}" text-anchor="middle">{escape(unit)}</text>']  # fmt: skip
    for k in range(5):
        y = HEIGHT * (1 - k / 4)
        parts.append(f'<path d="M0 {y:.1f}H{WIDTH}" stroke="#ddd"/>')
        parts.append(f'<text x="-6" y="{y + 4:.1f}" text-anchor="end">{most * k / 4:g}</text>')
    at = sorted({x for curve in curves.values() for x, _ in curve})
    for x in at:
        parts.append(f'<text x="{across(x, at):.1f}" y="{HEIGHT + 16}" text-anchor="middle">{x:g}</text>')
    ends = spread([height(curve[-1][1], most) for curve in curves.values()])
    for i, ((name, curve), end) in enumerate(zip(curves.items(), ends, strict=True)):
        points = "L".join(f"{across(x, at):.1f} {height(y, most):.1f}" for x, y in curve)
        i = KERNELS.index(name) if name in KERNELS else i
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        stroke = f'stroke="{colour}" stroke-width="1.6" stroke-dasharray="{dash}"'
        parts.append(f'<path d="M{points}" fill="none" {stroke}/>')
        parts.append(f'<text x="{WIDTH + 6}" y="{end + 4:.1f}" fill="{colour}">{escape(name)}</text>')
    return parts


def across(x: float, at: Sequence[float]) -> float:
    low, high = math.log(at[0]), math.log(at[-1])
    return WIDTH * (math.log(x) - low) / (high - low) if high > low else WIDTH / 2


def height(y: float, most: float) -> float:
    return HEIGHT * (1 - min(max(y, 0.0), most) / most)


def spread(wanted: Sequence[float]) -> list[float]:
    """Places for names: as near to where they want to be as a line's height between them allows."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    found, before = [0.0] * len(wanted), -math.inf
    for i in order:
        before = found[i] = max(wanted[i], before + LABEL)
    return found


def steps(results: Iterable[Mapping[str, Any]]) -> str:
    """A panel of the steps over their floor, and one of the device's idle share."""
    over: dict[str, Curve] = {}
    idle: dict[str, Curve] = {}
    for result in results:
        name = f"{result['model']} {result['scheme']}{' kv fp8' * (result['kv'] == 'fp8')}"
        rows = [row for row in result["rows"] if "error" not in row]
        over[name] = [(row["batch"], row["step_over_floor"]) for row in rows]
        idle[name] = [(row["batch"], 100 * row["idle"]) for row in rows if "idle" in row]
    panels = {"time of a step / its floor": (kept(over), 4.0), "% of a step without a kernel": (kept(idle), 20.0)}
    return svg("Decoding", panels, "sequences")


def experts(results: Iterable[Mapping[str, Any]]) -> str:
    """A panel per shape and scheme, a curve per kernel."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in (row for result in results for row in result["rows"] if "ms" in row):
        curves = panels.setdefault(f"{row['scheme']}, {row['shape']}", {})
        curves.setdefault(row["backend"], []).append((row["tokens"], row["share"]))
    drawn = {title: ({name: sorted(curves[name]) for name in sorted(curves)}, 1.0) for title, curves in panels.items()}
    return svg("A mixture layer: floor / time", drawn, "tokens")


def kept(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    return {name: curve for name, curve in curves.items() if curve}
