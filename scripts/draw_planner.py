"""Draw the paths of three mixtures as they are planned: docs/planner.svg.

    python -m scripts.draw_planner            write it
    python -m scripts.draw_planner --check    exit 1 if it is stale
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

from moesaic.contracts.plan import ADAPTERS, MixturePath, ModelPlan, Stage, Wishes
from moesaic.hardware import GPUS
from moesaic.kernels.registry import catalogue
from moesaic.moe.dispatch import contracts
from moesaic.planning.plan import plan
from scripts import plan_fixtures, plan_golden

FILE = Path(__file__).resolve().parents[1] / "docs" / "planner.svg"
SHOWN = (
    ("Qwen3-30B-A3B", "BF16, on a processor", "qwen3-30b-a3b", "cpu", 1),
    ("DeepSeek-V3", "MXFP8, decoding on 8 x b200", "deepseek-v3-mxfp8", "b200", 8),
    ("DeepSeek-R1", "W4AFP8, decoding on 8 x h100", "deepseek-r1-w4afp8", "h100", 8),
)
"""(model, how, fixture, hardware, ranks)."""
COLUMN, BOX, HEIGHT, PITCH, TOP, LEFT = 272, 236, 40, 72, 76, 16


def path_of(fixture: str, gpu: str, ranks: int) -> MixturePath:
    """Of the last layer that is no draft, decoding."""
    hardware = plan_fixtures.CPU if gpu == "cpu" else GPUS[gpu]
    spec = plan_golden.spec_of(plan_fixtures.read(fixture))
    known, wishes = (*catalogue(), *contracts()), Wishes(tp=ranks, ep=ranks, hypothetical=gpu != "cpu")
    made = plan(spec, hardware, known, wishes)
    assert isinstance(made, ModelPlan), made
    layer = next(each for each in made.layers if len(spec.layers) - 1 in each.layers)
    return next(cell.path for cell in layer.cells if cell.phase == "decode")


def svg() -> str:
    paths = [path_of(fixture, gpu, ranks) for _, _, fixture, gpu, ranks in SHOWN]
    width, longest = LEFT + COLUMN * len(SHOWN), max(len(path.stages) for path in paths)
    height = TOP + PITCH * longest + 4
    body = [head(width, height)]
    for i, ((model, how, *_), path) in enumerate(zip(SHOWN, paths, strict=True)):
        left = LEFT + COLUMN * i
        body.append(text(left, 46, model, 14, "#111") + text(left, 62, how, 12, "#555"))
        for j, stage in enumerate(path.stages):
            body.append(box(left, TOP + PITCH * j, stage))
            if j + 1 < len(path.stages):
                body.append(arrow(left, TOP + PITCH * j + HEIGHT, stage))
    return "\n".join([*body, "</svg>"]) + "\n"


def head(width: int, height: int) -> str:
    said = "A box is a stage; dashed ones are adapters. Green: what it does exactly once. An arrow says what travels."
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="ui-sans-serif, system-ui, sans-serif">\n'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#555"/></marker></defs>\n'
        + text(LEFT, 22, said, 12, "#333")
    )


def text(x: int, y: int, said: str, size: int, fill: str, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}" text-anchor="{anchor}">{escape(said)}</text>'


def box(x: int, y: int, stage: Stage) -> str:
    dashed = ' stroke-dasharray="5 3"' if stage.role in ADAPTERS else ""
    frame = (f'<rect x="{x}" y="{y}" width="{BOX}" height="{HEIGHT}" rx="5" fill="#f6f7f9" stroke="#1f6f8b" '
             f'stroke-width="1.5"{dashed}/>')  # fmt: skip
    by = "" if stage.kernel == stage.role else f"by {stage.kernel}"
    return (
        frame + text(x + 10, y + 17, stage.role, 13, "#111") + text(x + BOX - 10, y + 17, by, 11, "#555", "end")
        + text(x + 10, y + 33, ", ".join(sorted(stage.does)), 11, "#2e7d4f")
    )  # fmt: skip


def arrow(x: int, y: int, stage: Stage) -> str:
    """What travels behind a stage: logits behind the gate, rows with the ids of their experts behind the others."""
    logits = stage.role in ("gate", "cast")
    said = f"logits in {stage.encoding}" if logits else f"{stage.encoding}, {stage.layout}"
    said += "" if stage.ids == "none" else f", {stage.ids} ids"
    line = f'<path d="M{x + 24} {y} V{y + PITCH - HEIGHT - 2}" stroke="#555" fill="none" marker-end="url(#tip)"/>'
    return line + text(x + 36, y + 21, said, 11, "#333")


def main(arguments: list[str] | None = None) -> int:
    fresh = svg()
    stale = not FILE.exists() or FILE.read_text(encoding="utf-8") != fresh
    if stale and "--check" not in (sys.argv[1:] if arguments is None else arguments):
        FILE.write_text(fresh, encoding="utf-8")
        print(f"wrote: {FILE}")
        return 0
    return int(stale)


if __name__ == "__main__":
    raise SystemExit(main())
