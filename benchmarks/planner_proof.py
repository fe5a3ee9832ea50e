"""Does the planner return a plan if and only if a legal one exists? The whole product, by brute force.

    python benchmarks/planner_proof.py [--processes 2] [--minutes 30] [--state build/planner-proof]

What is compared stands in `tests/planning_product.py`: paths (one phase, one kernel, one dispatcher) and layers (both
phases, cut across ranks, one layout of the weights), in strata of one scheme on one piece of hardware; then the cells
that a CPU can run, built from their plans and held against the reference's (`tests/test_planning_cells.py`); and the
mutants of `tests/planning_mutants.py`. No cell is left out.

It is work in parts of seconds: first the questions, each asked once however many cells ask it; then the strata. Every
part leaves its counts in a small file of its own, so that a run that was ended, or whose `--minutes` are over (then it
exits with 3), goes on from there, on another machine too, if that has the files and the same source. The result is
written only when all parts are there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from benchmarks.machine import RESULTS, ROOT, describe, save
from moesaic.contracts.contract import Contract
from moesaic.contracts.plan import MixtureNeed, Wishes
from moesaic.contracts.scheme import SCHEMES
from tests.planning_mutants import ON, path_mutants, plan_mutants
from tests.planning_product import (
    ANY,
    DISPATCHERS,
    KERNELS,
    LAYER_AXES,
    MACHINES,
    PATH_AXES,
    STRATA,
    WHOLE,
    ask_layers,
    ask_paths,
    check_layer,
    check_path,
    layer_cells,
    path_cells,
    size_of,
)
from tests.planning_search import Held, Question, exists, known
from tests.test_planning_cells import KERNELS as CPU_KERNELS
from tests.test_planning_cells import LIMIT, configs, run_cell

RESULT = RESULTS / "planner-proof.json"
SOURCES = (
    "src/moesaic/planning", "src/moesaic/contracts", "src/moesaic/formats/sizes.py", "src/moesaic/hardware.py",
    "tests/planning_product.py", "tests/planning_search.py", "tests/planning_mutants.py",
)  # fmt: skip
RUN_SOURCES = (*SOURCES, *(f"src/moesaic/{room}" for room in ("formats", "kernels", "layers", "models", "moe")),
               "tests/test_planning_cells.py")  # fmt: skip
"""Those on which the cells that are run depend too."""
AXES = {
    "schemes": sorted(SCHEMES), "hardware": list(MACHINES), "schemes x hardware": len(STRATA),
    "expert kernels": list(KERNELS), "dispatchers": list(DISPATCHERS),
    "each stratum, paths": size_of(PATH_AXES), "each stratum, layers": size_of(LAYER_AXES),
}  # fmt: skip
SHOWN = 20
"""Mismatches that are kept in words."""
CHUNKS = 256
"""Parts into which the questions are dealt."""
KINDS = ("questions", "layers", "paths", "run", "mutants")
UNFINISHED = 3

Part = tuple[str, ...]
"""A kind, and which of its parts."""
Asked = tuple[MixtureNeed, Sequence[Contract], Wishes]


def fingerprint(sources: Sequence[str] = SOURCES) -> str:
    """Of everything that counts depend on: these sources, and every contract as data."""
    found = [file for name in sources for file in sorted([ROOT / name, *(ROOT / name).rglob("*")])]
    files = [file for file in found if file.suffix in (".py", ".h", ".cpp")]
    return sha256(b"\0".join([*(file.read_bytes() for file in files), text(WHOLE).encode()])).hexdigest()[:16]


def digest(question: Question) -> str:
    return sha256(text(question).encode()).hexdigest()[:20]


def text(value: object) -> str:
    """Equal values have equal texts, in every process."""
    if isinstance(value, frozenset):
        return f"{{{','.join(sorted(map(text, value)))}}}"
    if isinstance(value, tuple):
        return f"({','.join(map(text, value))})"
    if is_dataclass(value):
        return text(tuple(getattr(value, field.name) for field in fields(value)))
    return repr(value)


class Noted(Held):
    """Notes what is asked, and answers nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[Question, Asked] = {}

    def search(self, asked: Question, wanted: MixtureNeed, named: Sequence[Contract], wishes: Wishes) -> bool:
        self.asked[asked] = (wanted, named, wishes)
        return False


class Answered(Held):
    """With the answers that were found before. anew: how many were not."""

    def __init__(self, answers: Mapping[str, bool]) -> None:
        super().__init__()
        self.answers, self.anew = answers, 0

    def search(self, asked: Question, wanted: MixtureNeed, named: Sequence[Contract], wishes: Wishes) -> bool:
        found = self.answers.get(digest(asked))
        self.anew += found is None
        return super().search(asked, wanted, named, wishes) if found is None else found


class Proof:
    """Counts so far: a file for each part, in a folder of its own for each state of the sources."""

    def __init__(self, folder: Path, step: int, deadline: float) -> None:
        self.step, self.deadline = step, deadline
        self.folders = dict.fromkeys(KINDS, folder / fingerprint()) | {"run": folder / fingerprint(RUN_SOURCES)}
        for each in self.folders.values():
            each.mkdir(parents=True, exist_ok=True)
        self.device = describe()["device"]
        self.noted: list[tuple[Question, Asked]] = []
        self.held = Answered({})
        self.found: list[str] = []

    def file(self, part: Part) -> Path:
        return self.folders[part[0]] / f"{'-'.join(part)}.json"

    def read(self, kind: str) -> list[dict[str, Any]]:
        files = sorted(self.folders[kind].glob(f"{kind}-*.json"))
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]

    def one(self, part: Part) -> str | None:
        """Counts a part and keeps what it found, in words too; None where there is no time left for another."""
        if time.monotonic() > self.deadline:
            return None
        (kind, *names), began, self.found, before = part, time.process_time(), [], self.held.anew
        counted = Counter(getattr(self, kind)(*names))
        made = {"answers" if kind == "questions" else "count": dict(counted),
                "seconds": time.process_time() - began, "device": self.device, "wrong": self.found,
                "questions": self.held.anew - before}  # fmt: skip
        for key in [key for key, answer in self.held.items() if not isinstance(answer, bool)]:
            del self.held[key]  # it holds of this stratum alone
        if self.step == 1:
            draft = self.file(part).with_suffix(".part")
            draft.write_text(json.dumps(made), encoding="utf-8")
            draft.replace(self.file(part))
        said = f"{len(counted)} answers" if kind == "questions" else dict(counted)
        return f"{' '.join(part)}: {said}, {made['seconds']:.0f} s of processor time"

    def ask(self) -> None:
        """Finds every question that cells ask, without an answer to any."""
        noted, told = Noted(), set[object]()
        for stratum in STRATA:
            ask_paths(*stratum, noted, told)
            ask_layers(*stratum, noted)
        self.noted = list(noted.asked.items())
        print(f"{len(self.noted):,} different questions to the brute-force search", flush=True)

    def take(self) -> None:
        """Takes all answers that are there."""
        every = [each["answers"] for each in self.read("questions")]
        self.held = Answered({key: answer for answers in every for key, answer in answers.items()})

    # --- what parts do: what they yield is counted ---

    def questions(self, at: str) -> dict[str, bool]:
        return {digest(question): exists(*asked) for question, asked in self.noted[int(at) :: CHUNKS]}

    def paths(self, scheme: str, on: str) -> Iterator[str]:
        for cell in path_cells(scheme, on, self.step, self.first(scheme, on)):
            if wrong := check_path(cell, self.held):
                self.wrong(cell, wrong)
            yield "planned" if known(cell.need, cell.catalogue, ANY, self.held) else "refused"

    def layers(self, scheme: str, on: str) -> Iterator[str]:
        for cell in layer_cells(scheme, on, self.step, self.first(scheme, on)):
            verdict, wrong = check_layer(cell, self.held)
            if wrong:
                self.wrong(cell, wrong)
            yield verdict

    def first(self, scheme: str, on: str) -> int:
        """Other cells of each stratum, where only some are looked at, so that all values of all axes meet."""
        return sum(map(ord, scheme + on)) * 7919 % self.step

    def run(self, scheme: str, dtype: str) -> Iterator[str]:
        """Every cell of a scheme that a CPU can run, in FP32 or BF16."""
        every = itertools.product(configs(), (*CPU_KERNELS, "reference"))
        for (name, config), kernel in itertools.islice(every, 0, None, self.step):
            try:
                yield "equal" if run_cell(name, config, scheme, kernel, dtype) else "refused"
            except AssertionError as error:
                self.wrong((name, scheme, kernel, dtype), str(error))
                yield "differs"

    def mutants(self, sort: str, which: str) -> Counter[str]:
        count, missed = path_mutants((which,)) if sort == "paths" else plan_mutants((which,))
        for each in missed:
            self.wrong(which, each)
        return count

    def wrong(self, cell: object, what: str) -> None:
        self.found.append(f"{cell}: {what}"[:4000] if len(self.found) < SHOWN else "")
        print(f"WRONG {cell}: {what}", file=sys.stderr, flush=True)


PROOF: Proof
"""That of this process: what a forked one inherits is not sent to it."""


def work(part: Part) -> str | None:
    return PROOF.one(part)


def done(parts: Iterable[Part], processes: int) -> bool:
    """Counts what is not counted yet. Whether all of it is, then."""
    todo = [part for part in parts if not PROOF.file(part).exists()]
    if processes == 1:
        told = map(work, todo)
        return all([show(line) for line in told])
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        return all([show(line) for line in pool.imap_unordered(work, todo)])


def show(line: str | None) -> bool:
    if line:
        print(line, flush=True)
    return line is not None


def parts_of(kind: str, strata: Sequence[Part]) -> Iterator[Part]:
    schemes = dict.fromkeys(scheme for scheme, _ in strata)
    names: dict[str, Iterable[Part]] = {
        "questions": ((f"{at:03}",) for at in range(CHUNKS)),
        "layers": strata, "paths": strata, "run": itertools.product(schemes, LIMIT),
        "mutants": [*itertools.product(["paths"], ON), *itertools.product(["plans"], schemes)],
    }  # fmt: skip
    yield from ((kind, *each) for each in names[kind])


def result_of(proof: Proof) -> dict[str, Any]:
    every = [each for kind in KINDS for each in proof.read(kind)]
    seconds: Counter[str] = Counter()
    for each in every:
        seconds[each["device"]] += each["seconds"]
    totals = {}
    for kind in KINDS[1:]:
        count: Counter[str] = Counter()
        for each in proof.read(kind):
            count.update(each["count"])
        totals[kind] = dict(sorted(count.items()))
    wrong = {kind: [each for one in proof.read(kind) for each in one["wrong"]] for kind in KINDS}
    missed = wrong.pop("mutants")
    return {
        **describe("torch"), "fingerprint": fingerprint(), "seconds": round(seconds.total()),
        "seconds_on": {device: round(spent) for device, spent in seconds.items()}, "axes": AXES, **totals,
        "questions": sum(len(each.get("answers", ())) + each["questions"] for each in every),
        "mismatches": sum(map(len, wrong.values())),
        "wrong": [each for found in wrong.values() for each in found if each],
        "mutants_missed": len(missed), "missed": [each for each in missed if each],
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    global PROOF
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1, help="as many as there are cores")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after them no further part is begun")
    parser.add_argument("--state", type=Path, default=ROOT / "build" / "planner-proof", help="folder of counts so far")
    parser.add_argument("--parts", nargs="+", choices=KINDS, default=KINDS, help="those alone")
    parser.add_argument("--only", metavar="SCHEME:HARDWARE", help="one stratum; the result is not written")
    parser.add_argument("--step", type=int, default=1, help="every Nth cell; nothing is kept unless 1")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    PROOF = Proof(options.state, options.step, time.monotonic() + 60 * options.minutes)
    strata: Sequence[Part] = [tuple(options.only.split(":"))] if options.only else STRATA
    whole = not options.only and options.step == 1
    print(f"{len(strata)} strata of {(size_of(PATH_AXES) + size_of(LAYER_AXES)) // options.step:,} cells", flush=True)
    complete = True
    if whole and "questions" in options.parts:
        if not all(PROOF.file(part).exists() for part in parts_of("questions", strata)):
            PROOF.ask()
        complete = done(parts_of("questions", strata), options.processes)
    PROOF.take()
    rest = [part for kind in KINDS[1:] if kind in options.parts for part in parts_of(kind, strata)]
    if not complete or not done(rest, options.processes):
        print("not all of it is done: say the same again to go on", flush=True)
        return UNFINISHED
    if not whole or not all(PROOF.file(part).exists() for kind in KINDS for part in parts_of(kind, strata)):
        return 0
    result = result_of(PROOF)
    for part in KINDS[1:]:
        print(f"| {part} | " + ", ".join(f"{count:,} {what}" for what, count in result[part].items()) + " |")
    save(RESULT.stem, result)
    return int(bool(result["mismatches"] or result["mutants_missed"]))


if __name__ == "__main__":
    raise SystemExit(main())
