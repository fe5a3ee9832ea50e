"""Does the planner return a plan if and only if a legal one exists? The whole product, by brute force; hours.

    python benchmarks/planner_proof.py [--state build/planner-proof] [--backwards] [--only mxfp8:h100] [--step N]

What is compared stands in `tests/planning_product.py`: paths (one phase, one kernel, one dispatcher) and layers (both
phases, cut across ranks, one layout of the weights), in strata of one scheme on one piece of hardware; then the cells
that a CPU can run, built from their plans and held against the reference's (`tests/test_planning_cells.py`); and the
mutants of `tests/planning_mutants.py`. The counts of each stratum go into a file of their own: a run that was ended
goes on from there, as long as the planner's source is the same, and a second process may work from the other end
(`--backwards`; run the first again when both have ended). The result is written only for the whole of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from benchmarks.machine import RESULTS, ROOT, describe, save
from moesaic.commands._plan_json import plain
from tests.planning_mutants import path_mutants, plan_mutants
from tests.planning_product import (
    ANY,
    DISPATCHERS,
    KERNELS,
    LAYER_AXES,
    PATH_AXES,
    STRATA,
    WHOLE,
    check_layer,
    check_path,
    layer_cells,
    path_cells,
    size_of,
)
from tests.planning_search import Held, known
from tests.test_planning_cells import KERNELS as CPU_KERNELS
from tests.test_planning_cells import LIMIT, configs, run_cell

RESULT = RESULTS / "planner-proof.json"
SOURCES = (
    "src/moesaic/planning", "src/moesaic/contracts", "src/moesaic/formats/sizes.py", "src/moesaic/hardware.py",
    "tests/planning_product.py", "tests/planning_search.py", "tests/planning_mutants.py",
)  # fmt: skip
AXES = {
    "schemes x hardware": len(STRATA), "each stratum, paths": size_of(PATH_AXES),
    "each stratum, layers": size_of(LAYER_AXES), "expert kernels": list(KERNELS), "dispatchers": list(DISPATCHERS),
}  # fmt: skip
SHOWN = 20
"""Mismatches that are kept in words."""


def fingerprint() -> str:
    """Of everything that the counts depend on: these sources, and every contract as data."""
    files = [file for name in SOURCES for file in sorted([ROOT / name, *(ROOT / name).glob("*.py")]) if file.is_file()]
    contracts = json.dumps([plain(each) for each in WHOLE]).encode()
    return sha256(b"\0".join([*(file.read_bytes() for file in files), contracts])).hexdigest()[:16]


class Proof:
    """Counts so far: a file for each stratum, in a folder of its own for each state of the source."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.held, self.found = folder / fingerprint(), Held(), list[str]()
        self.folder.mkdir(parents=True, exist_ok=True)

    def file(self, part: str, stratum: tuple[str, ...]) -> Path:
        return self.folder / f"{'-'.join((part, *stratum))}.json"

    def stratum(self, part: str, stratum: tuple[str, ...], step: int) -> None:
        """Once: what another process has counted, or an earlier run, is not counted again."""
        if (file := self.file(part, stratum)).exists():
            return
        began, asked, self.found = time.process_time(), self.asked(), []
        count = Counter({"paths": self.paths, "layers": self.layers, "run": self.run}[part](stratum, step))
        made = {"part": part, "count": dict(count), "seconds": time.process_time() - began,
                "questions": self.asked() - asked, "wrong": self.found}  # fmt: skip
        self.held = {key: answer for key, answer in self.held.items() if isinstance(answer, bool)}
        if step == 1:
            file.write_text(json.dumps(made), encoding="utf-8")
        print(f"{part} {' '.join(stratum)}: {dict(count)}, {made['seconds']:.0f} s of processor time", flush=True)

    def asked(self) -> int:
        """Questions that brute force was asked."""
        return sum(isinstance(answer, bool) for answer in self.held.values())

    def paths(self, stratum: tuple[str, ...], step: int) -> Iterable[str]:
        for cell in path_cells(stratum[0], stratum[1], step):
            if wrong := check_path(cell, self.held):
                self.wrong(cell, wrong)
            yield "planned" if known(cell.need, cell.catalogue, ANY, self.held) else "refused"

    def layers(self, stratum: tuple[str, ...], step: int) -> Iterable[str]:
        for cell in layer_cells(stratum[0], stratum[1], step):
            verdict, wrong = check_layer(cell, self.held)
            if wrong:
                self.wrong(cell, wrong)
            yield verdict

    def run(self, stratum: tuple[str, ...], step: int) -> Iterable[str]:
        """Every cell of a scheme that a CPU can run, in FP32 and BF16."""
        every = itertools.product(configs(), (*CPU_KERNELS, "reference"), LIMIT)
        for (name, config), kernel, dtype in itertools.islice(every, 0, None, step):
            try:
                yield "equal" if run_cell(name, config, stratum[0], kernel, dtype) else "refused"
            except AssertionError as error:
                self.wrong((name, stratum[0], kernel, dtype), str(error))
                yield "differs"

    def wrong(self, cell: object, what: str) -> None:
        self.found.append(f"{cell}: {what}"[:4000] if len(self.found) < SHOWN else "")
        print(f"MISMATCH {cell}: {what}", file=sys.stderr, flush=True)

    def all(self) -> list[dict[str, Any]]:
        return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(self.folder.glob("*.json"))]

    def total(self, part: str) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for each in self.all():
            counts.update(each["count"] if each["part"] == part else {})
        return dict(sorted(counts.items()))


def mutants(run: Callable[[], tuple[Counter[str], list[str]]]) -> tuple[Counter[str], int]:
    count, missed = run()
    for each in missed[:SHOWN]:
        print(f"MISSED {each}", file=sys.stderr)
    return count, len(missed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, default=ROOT / "build" / "planner-proof", help="folder of counts so far")
    parser.add_argument("--only", metavar="SCHEME:HARDWARE", help="one stratum; the result is not written")
    parser.add_argument("--step", type=int, default=1, help="every Nth cell; nothing is kept unless 1")
    parser.add_argument("--backwards", action="store_true", help="last stratum first: for a second process")
    options = parser.parse_args()
    strata: list[tuple[str, ...]] = [tuple(options.only.split(":"))] if options.only else list(STRATA)
    each = (size_of(PATH_AXES) + size_of(LAYER_AXES)) // options.step
    print(f"{len(strata)} strata of {each:,} cells", flush=True)
    proof, todo = Proof(options.state), [(part, stratum) for part in ("layers", "paths") for stratum in strata]
    todo += [("run", (scheme,)) for scheme in dict.fromkeys(stratum[0] for stratum in strata)]
    for part, stratum in reversed(todo) if options.backwards else todo:
        proof.stratum(part, stratum, options.step)
    if options.only or options.step > 1 or options.backwards:
        return 0
    every, found = proof.all(), [mutants(path_mutants), mutants(plan_mutants)]
    wrong = [each for one in every for each in one["wrong"]]
    result = {
        **describe("torch"), "fingerprint": fingerprint(), "seconds": round(sum(one["seconds"] for one in every)),
        "axes": AXES, "paths": proof.total("paths"), "layers": proof.total("layers"), "run": proof.total("run"),
        "questions": sum(one["questions"] for one in every),
        "mismatches": len(wrong), "wrong": [each for each in wrong if each],
        "mutants": dict(sorted((found[0][0] + found[1][0]).items())), "mutants_missed": found[0][1] + found[1][1],
    }  # fmt: skip
    for part in ("paths", "layers", "run", "mutants"):
        print(f"| {part} | " + ", ".join(f"{count:,} {what}" for what, count in result[part].items()) + " |")
    save(RESULT.stem, result)
    return int(bool(result["mismatches"] or result["mutants_missed"]))


if __name__ == "__main__":
    raise SystemExit(main())
