"""Runs every parity case and writes the table of docs/parity.md and benchmarks/results/parity-cpu.json.

The cases and the two sides are those of tests/test_parity_logits.py, which holds the limits; this prints the numbers.

    python -m scripts.parity_table [--only PART]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tests.parity_cases import EVERY, Case
from tests.parity_run import DECODE, HalfRun, errors, forced_logits, generate, make_oracle, run_bf16, start

REPO = Path(__file__).resolve().parent.parent
TABLE, RESULT = REPO / "docs" / "parity.md", REPO / "benchmarks" / "results" / "parity-cpu.json"
PACKAGES = ("torch", "transformers", "safetensors", "numpy")


@dataclass(frozen=True)
class Row:
    """The numbers of one case. forced, free: BF16 with the oracle's experts, and as it is."""

    case: Case
    prefill: float
    decode: float
    ragged: float
    greedy: bool
    forced: HalfRun
    free: HalfRun
    seconds: float

    def numbers(self) -> dict[str, Any]:
        return {
            "case": self.case.name, "architecture": self.case.model_type, "fp32_prefill": self.prefill,
            "fp32_decode": self.decode, "fp32_ragged_chunked": self.ragged, "greedy_identical": self.greedy,
            "bf16_oracle_experts": self.forced.errors.worst, "bf16_other_choices": len(self.forced.other),
            "bf16_choices": self.forced.choices, "bf16_widest_tie": max(self.forced.other, default=0.0),
            "bf16_free_before_any_other_choice": self.free.before, "bf16_free_share_within": self.free.within,
            "seconds": round(self.seconds, 2),
        }  # fmt: skip


def measure(case: Case, path: Path) -> Row:
    began = time.perf_counter()
    oracle = make_oracle(case, path)
    ours = start(oracle, "float32")
    alone = errors(oracle, forced_logits(ours, oracle.texts[:1]))
    ragged = errors(oracle, forced_logits(ours, oracle.texts, budget=13)).worst
    greedy = generate(ours, oracle.texts[0].prompt, DECODE) == oracle.texts[0].forced
    forced, free = run_bf16(oracle, force=True), run_bf16(oracle, force=False)
    return Row(case, alone.prefill, alone.decode, ragged, greedy, forced, free, time.perf_counter() - began)


def markdown(rows: list[Row]) -> str:
    head = (
        "| case | FP32 prefill | FP32 decode | FP32 ragged, chunked | greedy text | BF16 | other choices, widest tie "
        "| BF16 free: before one | within 2^-6 |\n|---|---|---|---|---|---|---|---|---|\n"
    )
    lines = [
        f"| {r.case.name} | {r.prefill:.1e} | {r.decode:.1e} | {r.ragged:.1e} "
        f"| {'identical' if r.greedy else 'DIFFERS'} "
        f"| {r.forced.errors.worst:.4f} | {len(r.forced.other)} of {r.forced.choices}, "
        f"{max(r.forced.other, default=0.0):.4f} | {r.free.before:.4f} | {r.free.within:.1%} |"
        for r in rows
    ]
    return f"{INTRODUCTION}\n{head}{chr(10).join(lines)}\n\n{versions_line()}\n"


INTRODUCTION = """# Parity with `transformers`

Written by `python -m scripts.parity_table`; the limits are asserted by `tests/test_parity_logits.py`, and
`tests/test_parity_drafts.py` does the same for multi-token-prediction layers.

Each case is a tiny random model whose weights are BF16 numbers; `tests/parity_cases.py` says what it switches.
Numbers are the relative error ||ours - theirs|| / ||theirs|| of the **worst row** of logits, against `transformers` in
FP32 with its plainest code (eager attention, eager experts, no cache).

- **FP32 prefill, decode** (limit 1e-4): a prompt of 53 tokens in one step, then 64 tokens one by one through our cache,
  forced along the oracle's own greedy text.
- **FP32 ragged, chunked** (limit 1e-4): that text and five more (prompts of 1, 2, 17, 31, 48 tokens) together, 13
  tokens a step.
- **greedy text**: 64 tokens through the whole engine.
- **BF16** (limit 2^-6 = 0.0156): all six texts, with the experts that the oracle chose; no row is left out.
- **other choices, widest tie**: how often our own BF16 choice of experts would have been another one (token x layer),
  and the largest margin at which it was: the relative error of the gate's input that turns the choice. Must be below
  2^-6, and in at most 3 of 100.
- **BF16 free**: nothing is forced. *Before one*: the worst of the rows that no other choice of experts can have
  touched, neither their own nor an earlier token's (limit 2^-6). *Within 2^-6*: share of all rows, none left out (at
  least 90%).
"""


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def versions_line() -> str:
    return ", ".join(f"{name} {number}" for name, number in versions().items()) + f"; {cpu_name()}."


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure parity with transformers; write docs/parity.md.")
    parser.add_argument("--only", help="cases whose name contains this; prints, writes nothing")
    options = parser.parse_args(arguments)
    rows = []
    for case in EVERY:
        if options.only and options.only not in case.name:
            continue
        with tempfile.TemporaryDirectory() as path:
            rows.append(measure(case, Path(path)))
        print(json.dumps(rows[-1].numbers()), file=sys.stderr)
    if options.only:
        return 0
    report = {"device": cpu_name(), "versions": versions(), "threads": torch.get_num_threads()}
    report |= {"cases": [row.numbers() for row in rows]}
    TABLE.write_text(markdown(rows), encoding="utf-8")
    RESULT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(TABLE.read_text(encoding="utf-8"))
    keys = ("fp32_prefill", "fp32_decode", "bf16_oracle_experts")
    worst = {key: max(row.numbers()[key] for row in rows) for key in keys}
    print(json.dumps({**worst, "greedy_identical": all(row.greedy for row in rows), "cases": len(rows)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
