"""Measuring expert kernels against one another, into a table that plans are made with (`planning/timetable.py`)."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moesaic.assets import read_table
from moesaic.commands._measure import Candidate, Case, Inputs, candidates, ops_of, packed, time_calls
from moesaic.contracts.contract import Contract
from moesaic.contracts.spec import ModelSpec, MoESpec
from moesaic.hardware import GPUS, Hardware
from moesaic.kernels.registry import backends
from moesaic.planning.needs import blocks_of, experts_scheme

Row = dict[str, Any]
Say = Callable[[str], None]
KEYS = ("format", "encoding", "experts", "hidden", "width", "top_k", "tokens")


def cases_of(spec: ModelSpec, ranks: int) -> list[Case]:
    """The different mixture layers of a model, as one of so many ranks holds them."""
    found: dict[Case, None] = {}
    for block in blocks_of(spec):
        if isinstance(mix := block.mlp, MoESpec):
            router = mix.router
            found[Case(experts_scheme(mix), router.experts // ranks, mix.gate.inputs, mix.intermediate, router.top_k,
                       mix.activation)] = None  # fmt: skip
    return list(found)


def word_of(name: str) -> str:
    """The word of a device's name that tables know it by: a known GPU's, else the last that numbers a model."""
    words = name.lower().split()
    models = [word for word in words if re.search(r"\d", word) and not re.fullmatch(r"\d+(gb|-core)|@?[\d.]+ghz", word)]
    return next((word for word in words if word in GPUS), models[-1] if models else max(words, key=len))


@dataclass
class Tuner:
    """One run. tokens: the numbers to measure at, ascending.  names: of the kernels (none: all but the reference)."""

    hardware: Hardware
    catalogue: Sequence[Contract]
    tokens: Sequence[int]
    names: Sequence[str]
    say: Say
    used: set[str] = field(default_factory=set)

    def rows(self, cases: Sequence[Case]) -> Iterator[list[Row]]:
        """The rows of one case after another."""
        begun = time.monotonic()
        for i, case in enumerate(cases):
            if i:
                left = (time.monotonic() - begun) / i * (len(cases) - i)
                self.say(f"{i} of {len(cases)} done, about {left / 60:.0f} minutes left")
            yield self.case(case)

    def case(self, case: Case) -> list[Row]:
        """Kernels that never pack weights come first."""
        found, rejected = candidates(case, self.hardware, self.catalogue, self.names)
        self.say(f"{case}: {', '.join(map(str, found)) or 'no kernel'}")
        for each in rejected:
            self.say(f"  not {each.candidate}: {each.reason}")
        times: dict[int, dict[Candidate, float]] = {tokens: {} for tokens in self.tokens}
        if found:
            w = case.weights(self.hardware.device)
            for candidate in sorted(found, key=lambda each: each.packer is not None):
                self.measure(case, candidate, w, times)
        asks = case.need(self.hardware, 1)
        head = {"format": asks.need.stored, "encoding": str(case.scheme.activation), "experts": case.experts,
                "hidden": case.hidden, "width": case.width, "top_k": case.top_k}  # fmt: skip
        return [head | row_of(tokens, each) for tokens, each in times.items() if each]

    def measure(self, case: Case, candidate: Candidate, w: Any, times: dict[int, dict[Candidate, float]]) -> None:
        """One kernel at every number of tokens. One that fails is told of, and left out from there on."""
        try:
            ops = ops_of(candidate, case, self.hardware, self.catalogue)
            with packed(w, candidate.packer) as ready:
                for tokens in (each for each in self.tokens if candidate.worth(case, each)):
                    inputs = Inputs.of(case, ready, tokens)
                    ms = time_calls(inputs.calls(case, ops, ready), device=self.hardware.device)
                    times[tokens][candidate] = ms
                    self.used.add(candidate.backend)
                    self.say(f"  {candidate}, {tokens} tokens: {ms:.4f} ms")
        except Exception as error:  # another package's kernel may raise anything; the others are measured all the same
            self.say(f"  {candidate} failed: {error!r:.200}")

    def table(self, rows: list[Row]) -> dict[str, Any]:
        return {"device": word_of(self.hardware.name), "packages": self.packages(), "rows": rows}

    def packages(self) -> dict[str, str]:
        """Of those that were measured: distribution and version."""
        found = {}
        for contract in self.catalogue:
            if contract.package and contract.backend in self.used:
                with suppress(PackageNotFoundError):  # a backend that needs nothing but a part of what is installed
                    found[contract.backend] = f"{contract.package} {version(contract.package)}"
        return found


def row_of(tokens: int, times: dict[Candidate, float]) -> Row:
    """Each backend's time with what it was fastest with."""
    ms: dict[str, float] = {}
    parameters: dict[str, dict[str, int]] = {}
    for candidate in sorted(times, key=lambda each: times[each]):
        if candidate.backend not in ms:
            ms[candidate.backend] = float(f"{times[candidate]:.5g}")
            if candidate.parameters and not adapts(candidate.backend):
                parameters[candidate.backend] = dict(candidate.parameters)
    return {"tokens": tokens, "ms": ms} | ({"parameters": parameters} if parameters else {})


def adapts(backend: str) -> bool:
    """Whether a kernel chooses its parameters in each call, better than a plan can for all calls of a cell."""
    return getattr(backends().get(backend), "ADAPTS", False)


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Both tables of one device: of what both measured the new one counts.

    Times that another version of a package gave are dropped: they cannot stand beside the new ones.
    """
    stale = {name for name, made in old["packages"].items() if new["packages"].get(name, made) != made}
    rows = {key_of(row): without(row, stale) for row in old["rows"]}
    for row in new["rows"]:
        key = key_of(row)
        rows[key] = joined(rows[key], row) if key in rows else row
    return {**new, "packages": old["packages"] | new["packages"], "rows": [row for row in rows.values() if row["ms"]]}


def key_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEYS)


def without(row: Row, names: set[str]) -> Row:
    return replaced(row, {k: v for k, v in row["ms"].items() if k not in names},
                    {k: v for k, v in row.get("parameters", {}).items() if k not in names})  # fmt: skip


def joined(old: Row, new: Row) -> Row:
    parameters = {k: v for k, v in old.get("parameters", {}).items() if k not in new["ms"]}
    return replaced(old, old["ms"] | new["ms"], parameters | new.get("parameters", {}))


def replaced(row: Row, ms: dict[str, float], parameters: dict[str, Any]) -> Row:
    head = {name: row[name] for name in KEYS}
    return head | {"ms": ms} | ({"parameters": parameters} if parameters else {})


def write(table: dict[str, Any], path: Path) -> None:
    """Adds to what the file holds, if it is there; at no moment is there half a file."""
    if path.exists():
        table = merged(read_table(path), table)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    lines = ",\n  ".join(json.dumps(row) for row in table["rows"])
    head = json.dumps({name: table[name] for name in ("device", "packages")})[:-1]
    partial.write_text(f'{head}, "rows": [\n  {lines}\n]}}\n', encoding="utf-8")
    partial.replace(path)
