"""Draw what number formats cost: docs/accuracy.svg from benchmarks/results/schemes.json, by `make docs`.

Two panels over the bytes of all weights: accuracy, with the 95% interval of the difference to the first row, and the
KL divergence from it. Written by hand, so that equal results give equal bytes on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

Row = dict[str, Any]

BARS = {8: 0.5, 4: 3.0}
"""Points that a scheme may lose, by the bits of its weights."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, GAP = 900, 320, 64, 60, 52, 40
EIGHT, FOUR, PLAIN = "#1f6f8b", "#b5541c", "#555555"
NEAR = 60  # pixels between points whose labels share a column
LABEL = 13  # pixels per line of labels


@dataclass(frozen=True)
class Axis:
    """From values to pixels. ticks: (value, text)."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def at(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)


def linear(values: Sequence[float], start: float, end: float, unit: str = "") -> Axis:
    """An axis that holds all values, with about six round ticks."""
    span = (max(values) - min(values)) or 1.0
    raw = span / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first, last = math.floor(min(values) / step + 1e-9), math.ceil(max(values) / step - 1e-9)
    digits = max(0, -math.floor(math.log10(step)))
    ticks = tuple((k * step, f"{k * step:.{digits}f}{unit}") for k in range(first, last + 1))
    return Axis(first * step, last * step, start, end, ticks)


def decades(values: Sequence[float], start: float, end: float) -> Axis:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high += high == low
    ticks = tuple((10.0**k, f"1e{k}") for k in range(low, high + 1))
    return Axis(10.0**low, 10.0**high, start, end, ticks, log=True)


def svg(report: Row) -> str:
    """The picture of a result file. Raises ValueError where it holds no scheme beside the first row."""
    first, *others = (row for row in report["rows"] if "error" not in row)
    if not others:
        raise ValueError("there is nothing to draw")
    total = TOP + 2 * HEIGHT + GAP
    sizes = [row["bytes"] / 2**20 for row in (first, *others)]
    x = linear([min(sizes) * 0.9, max(sizes) * 1.1], LEFT, WIDTH - RIGHT)
    tops = (TOP, TOP + HEIGHT + GAP)
    title = f"{report['model']}: {report['items']:,} items, computed in {report['dtype']}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{total}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="20" font-size="14" fill="#111">{escape(title)}</text>',
        *legend(),
        *accuracy(first, others, x, tops[0]),
        *divergence(others, x, tops[1]),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def legend() -> list[str]:
    """Colours and fillings, on the right of the title."""
    entries = [(EIGHT, True, "8-bit weights"), (FOUR, True, "4-bit weights"), (PLAIN, False, "weights only")]
    out = []
    for i, (colour, filled, text) in enumerate(entries):
        at = WIDTH - 360 + 120 * i
        out += [circle(at, 16, colour, filled, ""), f'<text x="{at + 9}" y="20" fill="#333">{text}</text>']
    return out


def accuracy(first: Row, others: Sequence[Row], x: Axis, top: int) -> list[str]:
    base = 100 * first["accuracy"]
    spans = [[min(100.0, base + 100 * bound) for bound in row["interval"]] for row in others]
    ends = [end for span in spans for end in span]
    shown = [(base - bar, f"{bar:g} points lost") for bar in BARS.values() if base - bar >= min(*ends, base - 0.6)]
    y = linear([*ends, base, base - 0.6], top + HEIGHT - 34, top + 8, "%")
    out = frame(x, y, top, "accuracy, with the 95% interval of its difference to bf16")
    for value, text in shown:
        out.append(rule(x, y.at(value), "#a3324a", text))
    for row, span in zip(others, spans, strict=True):
        low, high = map(y.at, span)
        at = x.at(row["bytes"] / 2**20)
        out.append(f'<path d="M{at} {low}V{high}" stroke="{colour_of(row)}" stroke-opacity="0.5"/>')
    return out + points([first, *others], x, lambda row: y.at(100 * row["accuracy"]), y)


def divergence(others: Sequence[Row], x: Axis, top: int) -> list[str]:
    y = decades([row["kl"] for row in others], top + HEIGHT - 34, top + 8)
    out = frame(x, y, top, "KL divergence from bf16, nats per token")
    return out + points(others, x, lambda row: y.at(row["kl"]), y)


def frame(x: Axis, y: Axis, top: int, title: str) -> list[str]:
    bottom, right = top + HEIGHT - 34, x.end
    out = [f'<text x="{LEFT}" y="{top - 2}" fill="#333">{escape(title)}</text>']
    for value, text in y.ticks:
        at = y.at(value)
        out.append(f'<path d="M{LEFT} {at}H{right}" stroke="#e3e5e8"/>')
        out.append(f'<text x="{LEFT - 6}" y="{at + 4}" text-anchor="end" fill="#555">{text}</text>')
    for value, text in x.ticks:
        out.append(f'<text x="{x.at(value)}" y="{bottom + 16}" text-anchor="middle" fill="#555">{text}</text>')
    out.append(f'<path d="M{LEFT} {top + 8}V{bottom}H{right}" fill="none" stroke="#888"/>')
    out.append(f'<text x="{right}" y="{bottom + 30}" text-anchor="end" fill="#333">MiB of weights</text>')
    return out


def rule(x: Axis, at: float, colour: str, text: str) -> str:
    return (
        f'<path d="M{LEFT} {at}H{x.end}" stroke="{colour}" stroke-dasharray="4 4"/>'
        f'<text x="{LEFT + 6}" y="{at - 4}" fill="{colour}">{text}</text>'
    )


def points(rows: Sequence[Row], x: Axis, height: Callable[[Row], float], y: Axis) -> list[str]:
    """The points, and their names in columns beside each cluster, joined by thin lines."""
    placed = sorted(((x.at(row["bytes"] / 2**20), height(row), row) for row in rows), key=lambda p: (p[0], p[1]))
    clusters: list[list[tuple[float, float, Row]]] = []
    for point in placed:
        if not clusters or point[0] - clusters[-1][-1][0] > NEAR:
            clusters.append([])
        clusters[-1].append(point)
    out = []
    for cluster in clusters:
        column = max(at for at, _, _ in cluster) + 26
        cluster.sort(key=lambda p: (p[1], p[2]["scheme"]))
        for (at, level, row), text_at in zip(cluster, spread([p[1] for p in cluster], y), strict=True):
            name = escape(row["scheme"])
            out.append(f'<path d="M{at} {level}L{column - 3} {text_at}" stroke="#bbb" stroke-width="0.7"/>')
            out.append(circle(at, level, colour_of(row), filled(row), name))
            out.append(f'<text x="{column}" y="{round(text_at + 4, 1)}" fill="{colour_of(row)}">{name}</text>')
    return out


def spread(levels: Sequence[float], y: Axis) -> list[float]:
    """Ascending heights for labels, a line apart, near the points and inside the panel."""
    found: list[float] = []
    for level in levels:
        found.append(max(level, found[-1] + LABEL) if found else max(level, y.end))
    over = found[-1] - (y.start - 4)
    for i in range(len(found) - 1, -1, -1):
        limit = found[i + 1] - LABEL if i + 1 < len(found) else y.start - 4
        found[i] = round(min(found[i], limit) if over > 0 else found[i], 1)
    return found


def circle(x: float, y: float, colour: str, full: bool, title: str) -> str:
    fill = colour if full else "#ffffff"
    text = f"<title>{title}</title>" if title else ""
    return f'<circle cx="{x}" cy="{y}" r="4" fill="{fill}" stroke="{colour}" stroke-width="1.5">{text}</circle>'


def colour_of(row: Row) -> str:
    return {4: FOUR, 8: EIGHT, 16: PLAIN}[bits(row)]


def bits(row: Row) -> int:
    """Of an expert's weight, by the name of its format."""
    form = str(row["experts"]).partition(" x ")[0].partition("_g")[0]
    return 16 if form == "bf16" else 4 if form.endswith("4") else 8


def filled(row: Row) -> bool:
    return " x " in row["experts"] or row["experts"] == "bf16"
