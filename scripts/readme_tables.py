"""Fills the generated tables of README.md from benchmarks/results/*.json.

    python -m scripts.readme_tables [--check]     (--check: exit 1 where README.md is stale)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def cpu_generate(result: dict[str, Any]) -> str:
    """The speed table, with all that is needed to judge it."""
    lines = [
        f"`{result['model']}` in {result['dtype']}, greedy, {result['tokens']} new tokens per prompt, "
        f"prefill included; {result['device']}, {result['threads']} threads, torch {result['versions']['torch']}; "
        f"median of {result['repeats']} runs, in turn with `transformers` {result['versions']['transformers']} on the "
        "same files, prompts and lengths (`benchmarks/cpu_generate.py`).",
        "",
        "| batch | Moesaic, tokens/s | fastest of transformers | tokens/s | ratio | step outside torch operators |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        peer = row["best_peer"]
        lines.append(
            f"| {row['batch']} | {row['moesaic']['median']:.0f} | {peer.removeprefix('transformers ')} | "
            f"{row['peers'][peer]['median']:.0f} | {row['ratio']:.1f}x | {row['overhead']:.0%} |"
        )
    return "\n".join(lines)


TABLES = {"cpu-generate": cpu_generate}


def filled(text: str) -> str:
    """The README with every table made anew; a table without a result file stays empty."""
    for name, render in TABLES.items():
        begin, end = f"<!-- table:{name} begin -->", f"<!-- table:{name} end -->"
        file = ROOT / "benchmarks" / "results" / f"{name}.json"
        body = render(json.loads(file.read_text())) + "\n" if file.exists() else ""
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = f"{head}{begin}\n{body}{end}{tail}"
    return text


def main() -> int:
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = filled(old)
    if "--check" in sys.argv[1:]:
        return 0 if new == old else 1
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
