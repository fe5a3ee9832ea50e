"""A drawing of latencies, as SVG by hand: for each kind, the part of all that took at most so long."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

WIDTH, HEIGHT, GAP = 260, 180, 50
"""Of one panel, and between panels, in pixels."""
POINTS = 400
"""Most corners of a curve: a million tokens need no million corners."""


def svg(title: str, curves: Sequence[tuple[str, Sequence[float]]]) -> str:
    """curves: name and values in milliseconds, in any order; one without values stays empty."""
    whole = GAP + len(curves) * (WIDTH + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{whole}" height="{HEIGHT + 100}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{whole}" height="{HEIGHT + 100}" fill="white"/>',
        f'<text x="{GAP}" y="20" font-size="13">{escape(title)}</text>',
    ]
    for i, (name, values) in enumerate(curves):
        parts += [f'<g transform="translate({GAP + i * (WIDTH + GAP)},50)">', *panel(name, sorted(values)), "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def panel(name: str, values: Sequence[float]) -> list[str]:
    """One set of axes; the horizontal one ends at the 99th percentile, lest one straggler hide all others."""
    parts = [f'<text x="{WIDTH / 2}" y="-8" text-anchor="middle">{escape(name)}</text>',
             f'<text x="{WIDTH / 2}" y="{HEIGHT + 32}" text-anchor="middle">ms</text>']  # fmt: skip
    for part in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = HEIGHT * (1 - part)
        parts.append(f'<path d="M0 {y:.1f}H{WIDTH}" stroke="#ddd"/>')
        parts.append(f'<text x="-6" y="{y + 4:.1f}" text-anchor="end">{part:.0%}</text>')
    if not values:
        return parts
    most = max(values[-(-99 * len(values) // 100) - 1], 1e-9)
    for part in (0.0, 0.5, 1.0):
        parts.append(f'<text x="{WIDTH * part:.1f}" y="{HEIGHT + 16}" text-anchor="middle">{most * part:.3g}</text>')
    corners = []
    for rank in range(0, len(values), max(1, len(values) // POINTS)):
        x = WIDTH * min(1.0, values[rank] / most)
        corners.append(f"{x:.1f} {HEIGHT * (1 - (rank + 1) / len(values)):.1f}")
    return [*parts, f'<path d="M{"L".join(corners)}" fill="none" stroke="#0b6" stroke-width="2"/>']
