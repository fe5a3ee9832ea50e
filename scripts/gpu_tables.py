"""The tables and drawings of docs/gpu.md, from the results of the GPU benchmarks; see readme_tables.py.

A result file ends with the name of the device that it was measured on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moesaic.contracts.scheme import SCHEMES
from scripts import draw_gpu

Result = dict[str, Any]


def read(folder: Path, kind: str) -> list[Result]:
    """All results of a kind that were measured on a GPU."""
    files = sorted([*folder.glob(f"{kind}-*h100*.json"), *folder.glob(f"{kind}-*h200*.json")])
    return [json.loads(file.read_text()) for file in files]


def origin(result: Result) -> str:
    versions = result["versions"]
    return f"{result['device']}, torch {versions['torch']}, Triton {versions['triton']}, commit {result['commit']}."


def good(rows: Sequence[Result]) -> list[Result]:
    return [row for row in rows if "error" not in row]


def throughput(results: Sequence[Result]) -> Iterator[str]:
    for result in results:
        kv = ", KV cache in FP8" if result["kv"] == "fp8" else ""
        yield f"**{result['model']}, {result['scheme']}{kv}**, random weights. {origin(result)}\n"
        yield "| sequences | context | step ms | floor ms | step / floor | tokens/s | experts read | idle | kernels |"
        yield "|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
        for row in good(result["rows"]):
            seen = f"{row['idle']:.1%} | {row['kernels']}" if "idle" in row else " | "
            speed = f"{row['step_over_floor']:.2f} | {row['tokens_per_s']:,.0f}"
            yield (f"| {row['batch']} | {row['context']} | {row['step_ms']:.3f} | {row['floor_ms']:.3f} | {speed} | "
                   f"{row['experts_touched']:.0%} | {seen} |")  # fmt: skip
        alone = good(result.get("first") or [])
        if alone:
            said = ", ".join(f"{row['length']:,} tokens {row['ms']:.1f} ms" for row in alone)
            yield f"\nUntil a prompt that comes alone has its first token: {said}."
        for row in good(result.get("prompts") or []):
            yield (f"\nPrompts, {row['prompts']} x {row['length']} tokens: {row['tokens_per_s']:,.0f} tokens/s, "
                   f"{row['tflops']:.0f} TFLOPS counted on active parameters, {row['of_fp8_peak']:.0%} of FP8's peak.")
        yield ""


def experts(results: Sequence[Result]) -> Iterator[str]:
    for mine in by_device(results).values():
        for result, shown in zip(mine, once(mine), strict=True):
            yield from by_tokens([shown], "shape", "Milliseconds (floor / time) by tokens.")
            yield from choices(result)


def once(results: Sequence[Result]) -> list[Result]:
    """Each kernel's time where it was the fastest, of those that were measured more than once."""
    best: dict[tuple[Any, ...], float] = {}
    for row in (row for result in results for row in result["rows"] if "ms" in row):
        best[cell(row)] = min(row["ms"], best.get(cell(row), row["ms"]))
    return [{**result, "rows": [row for row in result["rows"] if "ms" in row and row["ms"] == best[cell(row)]]}
            for result in results]  # fmt: skip


def cell(row: Result) -> tuple[Any, ...]:
    return row["shape"], row["scheme"], row["backend"], row["tokens"]


def by_device(results: Sequence[Result]) -> dict[str, list[Result]]:
    """By the word that names the device in file names, an H100's first."""
    found: dict[str, list[Result]] = {"h100": [], "h200": []}
    for result in results:
        found["h200" if "H200" in result["device"] else "h100"].append(result)
    return {device: mine for device, mine in found.items() if mine}


def choices(result: Result) -> Iterator[str]:
    """What it costs to choose a tile without measuring, and what --deterministic costs."""
    rows = good(result["rows"])
    ruled = [(row["usual_ms"] / row["ms"] - 1, row) for row in rows if "usual_ms" in row]
    if ruled:
        worst, row = max(ruled, key=lambda each: each[0])
        near = sum(cost <= 0.15 for cost, _ in ruled)
        yield (f"The rule that chooses a tile is within 15% of the fastest tile in {near} of {len(ruled)} rows; at "
               f"worst {worst:.0%} slower ({named(row)}).\n")  # fmt: skip
    plain = {named(row): row["ms"] for row in rows if row["backend"] == "hopper"}
    same = [row for row in rows if row["backend"] == "hopper_invariant" and named(row) in plain and by_row(row)]
    if same:
        costs = {n: [row["ms"] / plain[named(row)] - 1 for row in same if row["tokens"] == n]
                 for n in sorted({row["tokens"] for row in same})}  # fmt: skip
        said = ", ".join(f"{n}: {min(each):+.0%} to {max(each):+.0%}" for n, each in costs.items())
        yield f"What `--deterministic` costs by tokens, over all schemes: {said}.\n"


def by_row(row: Result) -> bool:
    """Whether --deterministic takes the scheme: not where one scale spans all rows of a step."""
    scheme = SCHEMES.get(row["scheme"].split()[0])
    return scheme is None or scheme.activation.by_row


def named(row: Result) -> str:
    return f"{row['shape']} {row['scheme']}, {row['tokens']} tokens"


def gemm(results: Sequence[Result]) -> Iterator[str]:
    for terms, how in ((False, "encoding included"), (True, "products alone, in parts that their reader adds up")):
        mine = [result for result in results if bool(result.get("terms")) == terms]
        yield from by_tokens(mine, "projection", f"Milliseconds (floor / time) by tokens, {how}.")


def by_tokens(results: Sequence[Result], what: str, said: str) -> Iterator[str]:
    for result in results:
        rows = [row for row in result["rows"] if "ms" in row]
        sizes = sorted({row["tokens"] for row in rows})
        yield f"{said} {origin(result)}\n"
        yield f"| {what} | scheme | kernel | {' | '.join(map(str, sizes))} |"
        yield "|---|---|---|" + "--:|" * len(sizes)
        for head in dict.fromkeys((row["shape"], row["scheme"], row["backend"]) for row in rows):
            found = {row["tokens"]: row for row in rows if (row["shape"], row["scheme"], row["backend"]) == head}
            cells = [f"{found[n]['ms']:.4f} ({found[n]['share']:.2f})" if n in found else "" for n in sizes]
            yield f"| {' | '.join(head)} | {' | '.join(cells)} |"
        yield ""


def route(results: Sequence[Result]) -> Iterator[str]:
    for result in results:
        yield f"Microseconds. {origin(result)}\n"
        yield "| router | tokens | gate FP32 | gate BF16 | route | sort | route + sort |\n|---|--:|--:|--:|--:|--:|--:|"
        for row in good(result["rows"]):
            names = ("gate_fp32", "gate_bf16", "route", "sort", "route_sort")
            yield f"| {row['router']} | {row['tokens']} | {' | '.join(f'{row[name]:.1f}' for name in names)} |"
        yield "\n| requantised slots: experts | capacity | columns | rows | us | floor us | time / floor |"
        yield "|--:|--:|--:|--:|--:|--:|--:|"
        for row in good(result.get("requantise") or []):
            yield (f"| {row['experts']} | {row['capacity']} | {row['columns']} | {row['rows']} | {row['us']:.1f} | "
                   f"{row['floor_us']:.1f} | {row['time_over_floor']:.2f} |")  # fmt: skip
        yield ""


def attention(results: Sequence[Result]) -> Iterator[str]:
    for result in results:
        yield origin(result) + "\n"
        yield "| attention | by | phase | cache | sequences | length | ms | floor ms | floor / time |"
        yield "|---|---|---|---|--:|--:|--:|--:|--:|"
        for row in good(result["rows"]):
            by = row.get("backend", "triton")
            yield (f"| {row['what']} | {by} | {row['phase']} | {row['cache']} | {row['sequences']} | {row['length']} | "
                   f"{row['ms']:.4f} | {row['floor_ms']:.4f} | {row['share']:.2f} |")  # fmt: skip
        yield ""


def schemes(results: Sequence[Result]) -> Iterator[str]:
    for result in results:
        yield f"KV cache in {result['kv']}, {result['limit']} items per family. {origin(result)}\n"
        yield "| scheme | right | KL on the GPU | KL on the CPU | as far from the exact model |\n|---|--:|--:|--:|---|"
        for row in result["rows"]:
            if "kl" not in row:
                yield f"| {row['scheme']} | | | | {row.get('error', '')} |"
                continue
            cpu = "" if row["cpu_kl"] is None else f"{row['cpu_kl']:.1e}"
            said = {True: "yes", False: "**no**", None: ""}[row["agrees"]]
            yield (f"| {row['scheme']} | {row['right']} of {row['count']} | {row['kl']:.1e} ± {row['kl_error']:.0e} | "
                   f"{cpu} | {said} |")  # fmt: skip
        yield ""


TABLES: dict[str, Callable[[Sequence[Result]], Iterator[str]]] = {
    "throughput": throughput, "experts": experts, "gemm": gemm, "route": route, "attention": attention,
    "schemes": schemes,
}  # fmt: skip
DRAWINGS = {"throughput": ("gpu-steps", draw_gpu.steps),
            "experts": ("gpu-experts", lambda results: draw_gpu.experts(once(results)))}  # fmt: skip


def name_of(kind: str, device: str) -> str:
    return f"{DRAWINGS[kind][0]}{'' if device == 'h100' else '-' + device}.svg"


def tables(folder: Path) -> dict[str, str]:
    """By the name of their place in the page; what was never measured says so."""
    found = {}
    for kind, render in TABLES.items():
        results = read(folder, kind)
        devices = by_device(results) if kind in DRAWINGS else {}
        pictures = "".join(f"![{kind}, {device.upper()}]({name_of(kind, device)})\n\n" for device in devices)
        found[f"gpu-{kind}"] = pictures + "\n".join(render(results)) if results else "Not measured yet."
    return found


def drawings(folder: Path) -> dict[str, str]:
    """By file name; none of what was never measured."""
    return {name_of(kind, device): draw(mine) for kind, (_, draw) in DRAWINGS.items()
            for device, mine in by_device(read(folder, kind)).items()}  # fmt: skip
