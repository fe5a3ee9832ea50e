"""Fills the generated tables of the pages, and draws docs/accuracy.svg and docs/gpu-*.svg, from benchmarks/results.

    python -m scripts.readme_tables [--check]     (--check: exit 1 where one of them is stale)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moesaic.commands import _scheme_table
from scripts import draw_accuracy, gpu_tables

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/accuracy.md", "docs/gpu.md", "docs/operating.md", "docs/planner.md")
RESULTS = ROOT / "benchmarks" / "results"
PLOT = ROOT / "docs" / "accuracy.svg"


def cpu_generate(result: dict[str, Any]) -> str:
    """The speed table, with all that is needed to judge it."""
    lines = [
        f"`{result['model']}` in {result['dtype']}, greedy, {result['tokens']} new tokens per prompt, "
        f"prefill included; {result['device']}, {result['threads']} threads, torch {result['versions']['torch']}; "
        f"median of {result['repeats']} runs, in turn with `transformers` {result['versions']['transformers']} on the "
        "same files, prompts and lengths (`benchmarks/cpu_generate.py`).",
        "",
        "| batch | Moesaic, tokens/s | fastest of transformers | tokens/s | ratio | step in Python |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        peer = row["best_peer"]
        lines.append(
            f"| {row['batch']} | {row['moesaic']['median']:.0f} | {peer.removeprefix('transformers ')} | "
            f"{row['peers'][peer]['median']:.0f} | {row['ratio']:.1f}x | {row['overhead']:.0%} |"
        )
    return "\n".join(lines)


def schemes(result: dict[str, Any]) -> str:
    """What each number format costs."""
    return f"{_scheme_table.text(result)}\n\n{verdict(result['rows'])} {origin(result)}"


def verdict(rows: list[dict[str, Any]]) -> str:
    """Which schemes lose more than they may, and which may do so within their interval."""
    said = []
    for bits, bar in draw_accuracy.BARS.items():
        held = [row for row in rows if "difference" in row and draw_accuracy.bits(row) == bits]
        missed = [row["scheme"] for row in held if -100 * row["difference"] > bar]
        unsure = [row["scheme"] for row in held if row["scheme"] not in missed and -100 * row["interval"][0] > bar]
        said.append(f"{bits}-bit weights may lose {bar:g} points: {len(missed) or 'none'} of {len(held)} lose more")
        said[-1] += f" ({', '.join(missed)})" if missed else ""
        said[-1] += f" (the interval of {', '.join(unsure)} reaches beyond)" if unsure else ""
    return "; ".join(said) + "."


def sensitivity(result: dict[str, Any]) -> str:
    """What the two gauges say of broken kernels."""
    lines = [
        f"`{result['model']}`, {result['items']} items; computed in {result['dtype']} unless said. {origin(result)}",
        "",
        "| fault | accuracy | 95% interval | families that lose | KL, nats per token | logits apart | same token |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        low, high = row["accuracy_interval"]
        lines.append(
            f"| {row['fault']} | {row['accuracy']:.1%} | {low:.1%} to {high:.1%} | {row['lose']} of "
            f"{len(row['families'])} | {divergence(row)} | {row['logits']:.1e} | {row['same']:.3%} |"
        )
    return "\n".join(lines)


def kv_b_proj(result: dict[str, Any]) -> str:
    """The two paths of MLA for every way to keep kv_b_proj."""
    first = result["rows"][0]
    lines = [
        f"`{result['model']}`, along {first['tokens']:,} tokens of {first['texts']} answers. {origin(result)}",
        "",
        "| computed in | scheme | kv_b_proj | W_k that changes | by | KL between the paths | logits apart "
        "| KL from bf16, plain | absorbed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['dtype']} | {row['scheme']} | {row['way']} | {100 * row['w_k_elements']:.2g}% | "
            f"{row['w_k_error']:.1e} | {divergence(row['between'])} | {row['between']['logits']:.1e} | "
            f"{divergence(row['plain'])} | {divergence(row['absorbed'])} |"
        )
    return "\n".join(lines)


def rounding(result: dict[str, Any]) -> str:
    """Rounding rules, and layers."""
    lines = [
        f"`{result['model']}` in {result['dtype']}, along {result['tokens']:,} tokens of {result['texts']} answers. "
        f"{origin(result)}",
        "",
        "| part | what | weights apart | logits apart | KL | log-prob | answers that change |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        apart = "" if row["error"] is None else f"{row['error']:.2%}"
        lines.append(
            f"| {row['part']} | {row['what']} | {apart} | {row['logits']:.2%} | {divergence(row)} | "
            f"{row['logprob']:.1e} | {row['others']} |"
        )
    return "\n".join(lines)


def planner_proof(result: dict[str, Any]) -> str:
    """What was compared with brute force, what was run, and the mutants."""

    def row(what: str, part: str) -> str:
        counts = result[part]
        each = ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
        return f"| {what} | {sum(counts.values()):,} | {each} |"

    names = ("schemes", "hardware", "expert kernels", "dispatchers")
    schemes, machines, kernels, dispatchers = (len(result["axes"][name]) for name in names)
    return "\n".join([
        f"{schemes} schemes on {machines} kinds of hardware, {kernels} expert kernels and {dispatchers} dispatchers "
        f"(those of the catalogue, and some that nobody has); {result['questions']:,} different questions to the "
        f"brute-force search, {result['seconds'] / 60:.0f} minutes of processor time. Disagreements: "
        f"{result['mismatches'] or 'none'}; mutants that were missed: {result['mutants_missed'] or 'none'}. "
        f"{origin(result)}",
        "",
        "| what | cells | of them |",
        "|---|--:|---|",
        row("paths: one phase, one kernel, one dispatcher", "paths"),
        row("layers: both phases, cut across ranks", "layers"),
        row("built and run on a CPU, FP32 and BF16, ragged rows", "run"),
        row("mutants of good plans, by kind", "mutants"),
    ])  # fmt: skip


def serve_load(result: dict[str, Any]) -> str:
    """Many streams at once."""
    ttft, itl = result["ttft_ms"], result["itl_ms"]
    return (
        f"`moesaic serve {result['flags']}` with `{result['model']}`, {result['streams']} streams open at once for "
        f"{result['asked_seconds']:.0f} s: **{result['requests']:,} streams, {result['errors']} errors, "
        f"{result['incomplete']} incomplete, {result['different']} different** from the same request made by one "
        f"client; {result['tokens_per_s']:,.0f} tokens/s, first token after {ttft['p50'] / 1e3:.1f} s (median, the "
        f"queue included) and {ttft['p99'] / 1e3:.1f} s (99%), {itl['p50']:.0f} and {itl['p99']:.0f} ms between them; "
        f"threads of the engine: {result['threads']} (`benchmarks/serve_load.py`). {origin(result['source'])}"
    )


def serve_soak(result: dict[str, Any]) -> str:
    """Growth of the two processes."""
    rows, left = result["rows"], result["disconnects"]
    first, middle, last = rows[0], rows[len(rows) // 2], rows[-1]
    lines = [
        f"`moesaic serve {result['flags']}` with `{result['model']}`: {result['requests']:,} short requests, "
        f"{result['errors']} errors, after {result['warm_up']:,} to warm up; then, on a fresh server, "
        f"{left['count']:,} streams that their clients left; measured at rest (`benchmarks/serve_soak.py`). "
        f"{origin(result['source'])}",
        "",
        f"| process | MiB after warm-up | after {middle['requests']:,} | at the end | growth | by disconnects | "
        "descriptors before, after |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ("server", "engine"):
        held = f"{left['descriptors_before'][name]}, {left['descriptors_after'][name]}"
        lines.append(
            f"| {name} | {first[name] / 2**20:.1f} | {middle[name] / 2**20:.1f} | {last[name] / 2**20:.1f} | "
            f"**{result['growth'][name]:.2%}** | **{left['growth'][name]:.2%}** | {held} |"
        )
    return "\n".join(lines)


def serve_overhead(result: dict[str, Any]) -> str:
    """What a token costs beside the model."""
    lines = [
        f"Processor time per token at {result['streams']} streams, `{result['model']}`: {result['total_us']:.0f} us in "
        f"all, of {result['bound_us']:.0f} allowed; the server's parts by Python's profiler, scaled to what it costs "
        f"without (`benchmarks/serve_overhead.py`). {origin(result['source'])}",
        "",
        "| process | part | us per token |",
        "|---|---|---|",
    ]
    for part, share in result["server_shares"].items():
        lines.append(f"| server | {part} | {share * result['server_us']:.1f} |")
    lines += [f"| engine | {part} | {cost:.1f} |" for part, cost in result["engine_us"].items()]
    return "\n".join(lines)


def kv_format(result: dict[str, Any]) -> str:
    """The KV cache in FP8, and other ways to scale it."""
    sizes = result["bytes_per_token_and_layer"]
    lines = [
        f"`{result['model']}` in float32, {result['items']} items; {sizes['fp8']} bytes per token and layer instead of "
        f"{sizes['bf16']} in BF16. {origin(result)}",
        "",
        "| what is rounded, and how it is scaled | KL, nats per token | logits apart | same token | lost, gained |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"][1:]:
        lines.append(
            f"| {row['way']} | {divergence(row)} | {row['logits']:.2%} | {row['same']:.3%} | "
            f"{row['lost']}, {row['gained']} |"
        )
    return "\n".join(lines)


def divergence(row: dict[str, Any]) -> str:
    """With its standard error."""
    return f"{row['kl']:.1e} ± {row['kl_error']:.0e}"


def origin(result: dict[str, Any]) -> str:
    return f"{result['device']}, torch {result['versions']['torch']}, commit {result['commit']}."


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "cpu-generate": cpu_generate,
    "schemes": schemes,
    "sensitivity": sensitivity,
    "kv-b-proj": kv_b_proj,
    "rounding": rounding,
    "planner-proof": planner_proof,
    "serve-load": serve_load,
    "serve-soak": serve_soak,
    "serve-overhead": serve_overhead,
    "kv-format": kv_format,
}


def bodies() -> dict[str, str]:
    """Every table by its name; one without a result file is empty."""
    files = {name: RESULTS / f"{name}.json" for name in TABLES}
    made = {name: TABLES[name](json.loads(file.read_text())) if file.exists() else "" for name, file in files.items()}
    return made | gpu_tables.tables(RESULTS)


def filled(text: str) -> str:
    """A page with each of its tables made anew."""
    for name, body in bodies().items():
        begin, end = f"<!-- table:{name} begin -->", f"<!-- table:{name} end -->"
        if begin not in text:
            continue
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = f"{head}{begin}\n{body}{chr(10) * bool(body)}{end}{tail}"
    return text


def outputs() -> dict[Path, str]:
    """What the generated files should hold."""
    found = {ROOT / page: filled((ROOT / page).read_text(encoding="utf-8")) for page in PAGES}
    found |= {ROOT / "docs" / name: picture for name, picture in gpu_tables.drawings(RESULTS).items()}
    file = RESULTS / "schemes.json"
    return found | ({PLOT: draw_accuracy.svg(json.loads(file.read_text()))} if file.exists() else {})


def main() -> int:
    stale = [path for path, text in outputs().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        return 1 if stale else 0
    for path in stale:
        path.write_text(outputs()[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
