"""What scripts/gpu_vendor.sh found, in few lines: python -m scripts.vendor_summary OUT

The tests that failed, what tests tell of bits, and for each shape, format of weights and number of tokens the fastest
kernel beside the fastest of ours.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

OURS = "triton"


def tests(path: Path) -> Iterator[str]:
    suite = next(iter(ElementTree.parse(path).getroot().iter("testsuite")))
    yield "tests: " + ", ".join(f"{suite.get(name)} {name}" for name in ("tests", "failures", "errors", "skipped"))
    for case in suite.iter("testcase"):
        for kind in ("failure", "error"):
            for bad in case.iter(kind):
                first = (bad.get("message") or "").strip().splitlines()
                yield f"  {case.get('name')}: {first[0] if first else kind:.200}"
        for told in case.iter("property"):
            yield f"  {told.get('name')}: {told.get('value')}"


def rows(result: dict[str, Any]) -> Iterator[str]:
    """One line per shape, format and number of tokens; then the kernels that failed."""
    best: dict[tuple[str, str, int], dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        if "error" in row:
            continue
        found = best.setdefault((row["shape"], row["format"], row["tokens"]), {})
        side = "ours" if row["backend"] == OURS else "theirs"
        if side not in found or row["ms"] < found[side]["ms"]:
            found[side] = row
    for (shape, form, tokens), found in best.items():
        parts = [f"{row['backend']} {row['encoding']} {row['ms']:.4f} ({row['share']:.2f})" for row in found.values()]
        ratio = f", {found['theirs']['ms'] / found['ours']['ms']:.2f}" if len(found) == 2 else ""
        yield f"{shape} {form} {tokens}: {', '.join(parts)}{ratio}"
    for row in result["rows"]:
        if "error" in row:
            yield f"failed: {row['shape']} {row['scheme']} {row['backend']}: {row['error']:.200}"


def summary(folder: Path) -> Iterator[str]:
    if (folder / "tests.xml").exists():
        yield from tests(folder / "tests.xml")
    for path in sorted(folder.glob("experts-backends-*.json")):
        yield from rows(json.loads(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    print("\n".join(summary(Path(sys.argv[1]))))
