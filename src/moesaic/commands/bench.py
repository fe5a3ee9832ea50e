"""`moesaic bench`: measurements that a user can make: of a server, and of the kernels on this machine."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.commands import _scripts
from moesaic.config import DEVICES, cache_folder
from moesaic.contracts.scheme import SCHEMES
from moesaic.errors import OptionError, UnsupportedError

if TYPE_CHECKING:
    from moesaic.commands._load import Sample
    from moesaic.commands._measure import Case

DEFAULT_CONCURRENCY = 64

EPILOG = """\
`moesaic bench serve --help` and `moesaic bench tune --help` tell the options.

examples:
  moesaic bench serve --url http://127.0.0.1:8000 --model tiny --requests 200 --rate 10
  moesaic bench serve --url http://host:8000 --chat --concurrency 64 --words 50:500 --tokens 100:300 --plot out.svg
  moesaic bench tune ./model
  moesaic bench throughput --model qwen3-30b-a3b --scheme fp8 --batch 1 64
"""
TUNE = """\
Plans then take, for each number of tokens, the kernel that was the fastest. Tables ship for some GPUs and shapes; a
shape that nobody measured is judged by the nearest one. Rows that a table has already are measured again.

examples:
  moesaic bench tune ./model                                   what this model needs, on this machine
  moesaic bench tune org/model --ep 8 --tokens 1 16 64 256
  moesaic bench tune --shape 128x2048x768x8 --scheme fp8 mxfp8 --out table.json
"""
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def add_parser(subparsers: Any) -> None:
    bench = subparsers.add_parser(
        "bench", help="measure a server, or kernels and models", epilog=EPILOG,
        usage="moesaic bench WHAT [options]", description="Measure a server, or kernels and models on this machine.",
    )  # fmt: skip
    what = bench.add_subparsers(title="measurements", metavar="WHAT", dest="what", required=True)
    add_serve(what)
    add_tune(what)
    _scripts.add_parsers(what)


def add_serve(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "serve", help="put load on a server", epilog=EPILOG, usage="moesaic bench serve --url URL [options]",
        description="Put load on any OpenAI-compatible server, and report throughput and latencies.",
    )  # fmt: skip
    add = parser.add_argument
    add("--url", metavar="URL", required=True, help="of the server, with or without /v1 (required)")
    add("--model", metavar="NAME", help="as the server calls it (default: the first that it lists)")
    add("--chat", action="store_true", help="send conversations (default: plain prompts)")
    add("--requests", metavar="N", type=int, default=100, help="how many (default: 100)")
    add("--rate", metavar="R", type=float, help="per second, arriving at random (default: all at once)")
    add("--concurrency", metavar="N", type=int, help="streams at once (default: 64, with --rate any number)")
    add("--words", metavar="A:B", type=span, default=(10, 100), help="words of a prompt, from A to B (default: 10:100)")
    add("--tokens", metavar="A:B", type=span, default=(16, 128), help="most new tokens, from A to B (default: 16:128)")
    add("--seed", metavar="N", type=int, default=0, help="of prompts and arrivals (default: 0)")
    add("--timeout", metavar="SECONDS", type=float, default=600.0, help="for one request (default: 600)")
    add("--extra-body", metavar="JSON", type=json_object, default={},
        help="more fields of each request, such as '{\"ignore_eos\": true}' (default: none)")  # fmt: skip
    add("--api-key-file", metavar="FILE", help="whose first line is the key (default: no key)")
    add("--json", metavar="FILE", help="write the summary and every request to this file (default: no file)")
    add("--plot", metavar="FILE", help="draw the latencies as SVG (default: no drawing)")
    parser.set_defaults(run=run)


def add_tune(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "tune", help="measure expert kernels, for plans to choose by", epilog=TUNE,
        usage="moesaic bench tune [MODEL | --shape S --scheme NAME] [options]",
        description="Measure every expert kernel that can run here, and keep the times for plans to choose by.",
    )  # fmt: skip
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="a directory or hub id; only its config and headers are read")
    add("--shape", metavar="S", type=shape, nargs="+", default=[],
        help="experts of a rank x hidden size x width x experts per token, for want of a model (default: none)")
    add("--scheme", metavar="NAME", nargs="+", choices=tuple(SCHEMES), default=[],
        help="schemes to measure (default: the model's own)")  # fmt: skip
    add("--ep", metavar="N", type=int, default=1, help="ranks that share the model's experts (default: 1)")
    add("--tokens", metavar="N", type=int, nargs="+", default=TOKENS, help="of a step (default: 1 to 8192)")
    add("--kernels", metavar="NAME", nargs="+", default=[], help="to measure (default: all but the reference)")
    add("--device", choices=DEVICES, default="auto", help="auto, cpu or cuda (default: auto, a GPU if there is one)")
    add("--out", metavar="FILE", help="table to write or add to (default: the device's, in the cache folder)")
    add("--revision", metavar="NAME", help="branch, tag or commit of a hub model (default: its main branch)")
    parser.set_defaults(run=tune)


def shape(text: str) -> tuple[int, int, int, int]:
    try:
        experts, hidden, width, top_k = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form EXPERTSxHIDDENxWIDTHxTOP_K") from None
    if min(experts, hidden, width, top_k) < 1 or top_k > experts:
        raise argparse.ArgumentTypeError(f"{text!r} has a size that cannot be")
    return experts, hidden, width, top_k


def tune(args: argparse.Namespace) -> int:
    from moesaic.commands import _tune
    from moesaic.hardware import local
    from moesaic.kernels.registry import local_catalogue

    if bool(args.model) == bool(args.shape) or (args.shape and not args.scheme):
        raise OptionError("name a model, or shapes with schemes", where="bench tune", remedy="See its --help.")
    if min(*args.tokens, args.ep, 1) < 1:
        raise OptionError("must be positive", where="--tokens, --ep", remedy="Correct the value.")
    hardware, known = local(args.device), local_catalogue()
    if hardware is None:
        raise UnsupportedError("torch sees no GPU here", where="--device cuda", remedy="Use --device cpu.")
    if unknown := set(args.kernels) - {each.backend for each in known if each.op == "experts" and each.built}:
        names = ", ".join(sorted(unknown))
        raise OptionError(f"no such kernel: {names}", where="--kernels", remedy="See moesaic doctor.")
    tuner = _tune.Tuner(hardware, known, sorted(set(args.tokens)), args.kernels, partial(print, file=sys.stderr))
    path = Path(args.out) if args.out else cache_folder() / "tuning" / f"{_tune.word_of(hardware.name)}.json"
    count = 0
    for rows in tuner.rows(cases(args)):
        if rows:
            _tune.write(tuner.table(rows), path)  # after each case: what was interrupted is not lost
        count += len(rows)
    print(f"{count} rows written to {path}" if count else "nothing could be measured")
    return int(not count)


def cases(args: argparse.Namespace) -> list[Case]:
    from moesaic.commands._measure import Case
    from moesaic.commands._tune import cases_of
    from moesaic.models.hold import hold_online
    from moesaic.models.metadata import read_metadata

    if args.shape:
        return [Case(SCHEMES[name], *each) for each in args.shape for name in args.scheme]
    spec = read_metadata(args.model, args.revision).spec
    found = [case for name in args.scheme or [None] for case in cases_of(hold_online(spec, name), args.ep)]
    if not found or any(case.experts == 0 for case in found):
        what = "has no mixture layers, or fewer experts than ranks"
        raise OptionError(what, where=args.model, remedy="Name another model, or a smaller --ep.")
    return list(dict.fromkeys(found))


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


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


def run(args: argparse.Namespace) -> int:
    from moesaic.commands import _load

    for name in ("requests", "concurrency", "rate", "timeout"):
        value = getattr(args, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise OptionError("must be positive", where=f"--{name}", remedy="Correct the value.")
    writable(args.json, "--json")
    writable(args.plot, "--plot")
    load = _load.Load(
        args.url, args.model or "", args.requests, args.rate,
        args.concurrency or (None if args.rate else DEFAULT_CONCURRENCY), args.words, args.tokens, args.seed,
        key_of(args.api_key_file), args.chat, args.timeout, args.extra_body,
    )  # fmt: skip
    if not load.model:
        load = replace(load, model=asyncio.run(_load.first_model(load)))
    samples, seconds = asyncio.run(_load.run(load))
    found = {"model": load.model, "rate": load.rate, "concurrency": load.concurrency, "words": list(load.words),
             "max_tokens": list(load.tokens), "seed": load.seed, **_load.summary(samples, seconds)}  # fmt: skip
    show(found)
    for error in sorted({sample.error for sample in samples if sample.error})[:5]:
        print(f"moesaic: failed: {error}", file=sys.stderr)
    if args.json:
        each = [vars(sample) for sample in samples]
        Path(args.json).write_text(json.dumps({**found, "samples": each}, indent=1), encoding="utf-8")
    if args.plot:
        title = f"{load.model}: {found['requests_per_s']} requests/s, {found['tokens_per_s']} tokens/s"
        Path(args.plot).write_text(plot(samples, title), encoding="utf-8")
    print(json.dumps(found))
    return int(found["errors"] > 0)


def key_of(file: str | None) -> str | None:
    """The first line of a file. Raises OptionError where it cannot be read."""
    if file is None:
        return None
    try:
        return Path(file).read_text(encoding="utf-8").split("\n")[0].strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8"
        raise OptionError(f"{file} cannot be read ({reason})", where="--api-key-file", remedy="Name another.") from None


def writable(file: str | None, where: str) -> None:
    """Raises OptionError before the load is sent, not after."""
    try:
        if file is not None:
            Path(file).open("a").close()
    except OSError as error:
        raise OptionError(f"{file} cannot be written ({error.strerror})", where=where, remedy="Name another.") from None


def show(found: dict[str, Any]) -> None:
    whole = f", {found['not_streamed']} not streamed" if found["not_streamed"] else ""
    print(f"{found['requests']} requests, {found['errors']} failed{whole}, {found['seconds']} s: "
          f"{found['requests_per_s']} requests/s, {found['tokens_per_s']} tokens/s")  # fmt: skip
    for name, title in (("ttft_ms", "first token"), ("itl_ms", "between tokens"), ("e2e_ms", "whole request")):
        parts = ", ".join(f"{place} {value:,.1f}" for place, value in found[name].items())
        print(f"{title + ', ms':<20} {parts}")


def plot(samples: list[Sample], title: str) -> str:
    """Three distributions as SVG."""
    from moesaic.commands._latency_plot import svg

    good = [sample for sample in samples if sample.error is None]
    gaps = [b - a for s in good for a, b in zip(s.pieces, s.pieces[1:], strict=False)]
    first, whole = [s.pieces[0] for s in good if s.pieces], [s.took for s in good]
    curves = (("first token", first), ("between tokens", gaps), ("whole request", whole))
    return svg(title, [(name, [1e3 * value for value in values]) for name, values in curves])
