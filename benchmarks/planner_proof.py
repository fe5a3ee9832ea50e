"""Does the planner return a plan if and only if a legal one exists? The whole product, by brute force; hours.

    python benchmarks/planner_proof.py [--state build/planner-proof.json] [--only mxfp8:h100] [--step N]

What is compared stands in `tests/planning_product.py`: paths (one phase, one kernel, one dispatcher) and layers (both
phases, cut across ranks, one layout of the weights), in strata of one scheme on one piece of hardware; then the cells
that a CPU can run, built from their plans and held against the reference's (`tests/test_planning_cells.py`); and the
mutants of `tests/planning_mutants.py`. After each stratum the counts go into the state file: a run that was ended goes
on from there, as long as the planner's source is the same. The result is written only for the whole of it.
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
    """Counts so far, in a file that outlives the process."""

    def __init__(self, file: Path) -> None:
        self.file, self.held = file, Held()
        self.state: dict[str, Any] = {"fingerprint": fingerprint(), "strata": {}, "wrong": []}
        self.state |= {"seconds": 0.0, "questions": 0}
        if file.exists():
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept["fingerprint"] != self.state["fingerprint"]:
                raise SystemExit(f"{file} is of another source tree: remove it to begin anew")
            self.state = kept

    def stratum(self, part: str, stratum: tuple[str, ...], step: int) -> None:
        name = " ".join((part, *stratum))
        if name in self.state["strata"]:
            return
        began, asked = time.process_time(), self.asked()
        count = Counter({"paths": self.paths, "layers": self.layers, "run": self.run}[part](stratum, step))
        self.state["strata"][name] = dict(count)
        seconds = time.process_time() - began
        self.state["seconds"] += seconds
        self.state["questions"] += self.asked() - asked
        self.held = {key: answer for key, answer in self.held.items() if isinstance(answer, bool)}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.state), encoding="utf-8")
        print(f"{name}: {dict(count)}, {seconds:.0f} s of processor time", flush=True)

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
        self.state["wrong"].append(f"{cell}: {what}"[:4000] if len(self.state["wrong"]) < SHOWN else "")
        print(f"MISMATCH {cell}: {what}", file=sys.stderr, flush=True)

    def total(self, part: str) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for name, count in self.state["strata"].items():
            counts.update(count if name.startswith(part) else {})
        return dict(sorted(counts.items()))


def mutants(run: Callable[[], tuple[Counter[str], list[str]]]) -> tuple[Counter[str], int]:
    count, missed = run()
    for each in missed[:SHOWN]:
        print(f"MISSED {each}", file=sys.stderr)
    return count, len(missed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, default=ROOT / "build" / "planner-proof.json", help="counts so far")
    parser.add_argument("--only", metavar="SCHEME:HARDWARE", help="one stratum; the result is not written")
    parser.add_argument("--step", type=int, default=1, help="every Nth cell; the result is not written unless 1")
    options = parser.parse_args()
    strata: list[tuple[str, ...]] = [tuple(options.only.split(":"))] if options.only else list(STRATA)
    each = (size_of(PATH_AXES) + size_of(LAYER_AXES)) // options.step
    print(f"{len(strata)} strata of {each:,} cells", flush=True)
    proof = Proof(options.state)
    for part in ("layers", "paths"):
        for stratum in strata:
            proof.stratum(part, stratum, options.step)
    for scheme in dict.fromkeys(stratum[0] for stratum in strata):
        proof.stratum("run", (scheme,), options.step)
    if options.only or options.step > 1:
        return int(bool(proof.state["wrong"]))
    found = [mutants(path_mutants), mutants(plan_mutants)]
    result = {
        **describe("torch"), "fingerprint": proof.state["fingerprint"], "seconds": round(proof.state["seconds"]),
        "axes": AXES, "paths": proof.total("paths"), "layers": proof.total("layers"), "run": proof.total("run"),
        "questions": proof.state["questions"],
        "mismatches": len(proof.state["wrong"]), "wrong": [each for each in proof.state["wrong"] if each],
        "mutants": dict(sorted((found[0][0] + found[1][0]).items())), "mutants_missed": found[0][1] + found[1][1],
    }  # fmt: skip
    for part in ("paths", "layers", "run", "mutants"):
        print(f"| {part} | " + ", ".join(f"{count:,} {what}" for what, count in result[part].items()) + " |")
    save(RESULT.stem, result)
    return int(bool(result["mismatches"] or result["mutants_missed"]))


if __name__ == "__main__":
    raise SystemExit(main())
