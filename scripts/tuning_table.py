"""Makes the tables of measured times that ship with the package from the results of benchmarks/experts.py.

    python -m scripts.tuning_table [--check]     (--check: exit 1 where one of them is stale)

The benchmark and `moesaic bench tune` time the same calls in the same way; this spares measuring twice.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moesaic.commands._tune import adapts, key_of, merged, word_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS, TABLES = ROOT / "benchmarks" / "results", ROOT / "src" / "moesaic" / "assets" / "tuning"
DISTRIBUTIONS = {"triton": "triton", "deep_gemm": "sgl-deep-gemm", "humming": "humming-kernels"}
"""Backends that a package of its own gives, whose version a time stands for."""
SHAPE = re.compile(r"E(\d+) K(\d+) N(\d+) top(\d+)")


def table_of(result: dict[str, Any]) -> dict[str, Any]:
    """One result as a table. Rows that failed are left out."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for each in result["rows"]:
        found = SHAPE.fullmatch(each["shape"])
        if "ms" not in each or found is None:
            continue
        experts, hidden, width, top_k = map(int, found.groups())
        head = {"format": each["format"], "encoding": each["encoding"], "experts": experts, "hidden": hidden,
                "width": width, "top_k": top_k, "tokens": each["tokens"]}  # fmt: skip
        row = rows.setdefault(tuple(head.values()), {**head, "ms": {}})
        row["ms"][each["backend"]] = float(f"{each['ms']:.5g}")
        if each["parameters"] and not adapts(each["backend"]):
            row.setdefault("parameters", {})[each["backend"]] = each["parameters"]
    used = {name for row in rows.values() for name in row["ms"]}
    known = {name: package for name, package in DISTRIBUTIONS.items() if name in used}
    packages = {name: f"{package} {result['versions'][package]}" for name, package in known.items()}
    return {"device": word_of(result["device"]), "packages": packages, "rows": list(rows.values())}


def tables(results: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By device. Of two results that measured the same, the faster one counts: heat and noise only add to a time."""
    found: dict[str, dict[str, Any]] = {}
    for result in results:
        table = table_of(result)
        device = table["device"]
        if device in found:
            drop_slower(table, found[device])
            found[device] = merged(found[device], table)
        else:
            found[device] = table
    return found


def drop_slower(table: dict[str, Any], than: dict[str, Any]) -> None:
    """Takes times out of a table that another one beats."""
    known = {key_of(row): row["ms"] for row in than["rows"]}
    for row in table["rows"]:
        best = known.get(key_of(row), {})
        for name in [name for name, ms in row["ms"].items() if ms >= best.get(name, ms + 1)]:
            del row["ms"][name]
            row.get("parameters", {}).pop(name, None)


def text_of(table: dict[str, Any]) -> str:
    """A row per line."""
    rows = ",\n  ".join(json.dumps(row) for row in table["rows"])
    head = json.dumps({"device": table["device"], "packages": table["packages"]})[:-1]
    return f'{head}, "rows": [\n  {rows}\n]}}\n'


def outputs() -> dict[Path, str]:
    files = sorted(file for file in RESULTS.glob("experts-*.json"))
    made = tables(json.loads(file.read_text(encoding="utf-8")) for file in files)
    return {TABLES / f"{device}.json": text_of(table) for device, table in made.items()}


def main() -> int:
    stale = {path: text for path, text in outputs().items() if not path.exists() or path.read_text("utf-8") != text}
    if "--check" in sys.argv[1:]:
        return 1 if stale else 0
    for path, text in stale.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"wrote: {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
