"""`moesaic bench`: measurements that a user can make."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.commands import _scripts
from moesaic.errors import OptionError, UnsupportedError

if TYPE_CHECKING:
    from moesaic.commands._load import Sample

EPILOG = """\
examples:
  moesaic bench serve --url http://127.0.0.1:8000 --model tiny --requests 200 --rate 10
  moesaic bench serve --url http://host:8000 --model mixtral --concurrency 64 --words 50:500 --tokens 100:300
  moesaic bench throughput --model qwen3-30b-a3b --scheme fp8 --batch 1 64
"""


def add_parser(subparsers: Any) -> None:
    bench = subparsers.add_parser("bench", help="measure a server, or kernels and models", epilog=EPILOG)
    what = bench.add_subparsers(title="measurements", metavar="WHAT", dest="what", required=True)
    add_serve(what)
    _scripts.add_parsers(what)


def add_serve(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "serve", help="a server under load", usage="moesaic bench serve --url URL [options]",
        description="Put load on any OpenAI-compatible server, and report throughput and latencies.",
    )  # fmt: skip
    add = parser.add_argument
    add("--url", metavar="URL", required=True, help="of the server, with or without /v1 (required)")
    add("--model", metavar="NAME", default="tiny", help="as the server calls it (default: tiny)")
    add("--requests", metavar="N", type=int, default=100, help="how many (default: 100)")
    add("--rate", metavar="R", type=float, help="per second, arriving at random (default: all at once)")
    add("--concurrency", metavar="N", type=int, default=64, help="streams at once (default: 64)")
    add("--words", metavar="A:B", type=span, default=(10, 100), help="words of a prompt, from A to B (default: 10:100)")
    add("--tokens", metavar="A:B", type=span, default=(16, 128), help="most new tokens, from A to B (default: 16:128)")
    add("--seed", metavar="N", type=int, default=0, help="of prompts and arrivals (default: 0)")
    add("--api-key-file", metavar="FILE", help="whose first line is the key (default: no key)")
    add("--json", metavar="FILE", help="write the summary and every request to this file (default: no file)")
    add("--plot", metavar="FILE", help="draw the latencies; needs matplotlib (default: no drawing)")
    parser.set_defaults(run=run)


def span(text: str) -> tuple[int, int]:
    """`A:B`, or `A` for both."""
    first, _, last = text.partition(":")
    try:
        low, high = int(first), int(last or first)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form A:B") from None
    if not 1 <= low <= high:
        raise argparse.ArgumentTypeError(f"{text!r} must be a range from 1 up")
    return low, high


def run(args: argparse.Namespace) -> int:
    from moesaic.commands import _load

    for name in ("requests", "concurrency"):
        if getattr(args, name) < 1:
            raise OptionError("must be positive", where=f"--{name}", remedy="Correct the value.")
    if args.rate is not None and not args.rate > 0:
        raise OptionError("must be positive", where="--rate", remedy="Correct the value.")
    key = Path(args.api_key_file).read_text(encoding="utf-8").split("\n")[0].strip() if args.api_key_file else None
    load = _load.Load(args.url, args.model, args.requests, args.rate, args.concurrency, args.words, args.tokens,
                      args.seed, key)  # fmt: skip
    samples, seconds = asyncio.run(_load.run(load))
    found = _load.summary(samples, seconds)
    show(found)
    for error in sorted({sample.error for sample in samples if sample.error})[:5]:
        print(f"moesaic: failed: {error}", file=sys.stderr)
    if args.json:
        each = [vars(sample) for sample in samples]
        Path(args.json).write_text(json.dumps({**found, "samples": each}, indent=1), encoding="utf-8")
    if args.plot:
        plot(samples, args.plot)
    print(json.dumps(found))
    return int(found["errors"] > 0)


def show(found: dict[str, Any]) -> None:
    print(f"{found['requests']} requests, {found['errors']} failed, {found['seconds']} s: "
          f"{found['requests_per_s']} requests/s, {found['tokens_per_s']} tokens/s")  # fmt: skip
    for name, title in (("ttft_ms", "first token"), ("itl_ms", "between tokens"), ("e2e_ms", "whole request")):
        parts = ", ".join(f"{place} {value:,.1f}" for place, value in found[name].items())
        print(f"{title + ', ms':<20} {parts}")


def plot(samples: list[Sample], path: str) -> None:
    """Three distributions, each the part of all that took at most so long."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError("needs matplotlib", where="--plot", remedy="pip install matplotlib") from None
    good = [sample for sample in samples if sample.error is None and sample.pieces]
    gaps = [b - a for s in good for a, b in zip(s.pieces, s.pieces[1:], strict=False)]
    first, whole = [s.pieces[0] for s in good], [s.took for s in good]
    values = {"first token": first, "between tokens": gaps, "whole request": whole}
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, (name, each) in zip(figure.subplots(1, 3), values.items(), strict=True):
        ordered = sorted(1e3 * value for value in each)
        axes.step(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], where="post")
        axes.set(title=name, xlabel="ms", ylim=(0, 1))
        axes.grid(alpha=0.3)
    figure.savefig(path)
