"""`moesaic bench NAME`: the measurements of kernels and models, which lie beside the package in its repository."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import moesaic
from moesaic.errors import UnsupportedError

SCRIPTS = {
    "experts": "mixture layers by scheme, shape and number of tokens, against their floor",
    "gemm": "dense products by scheme",
    "route": "the router, sorting tokens by expert, and the requantiser",
    "attention": "attention over the paged cache, decoding and prompts",
    "throughput": "whole models with random weights: prompts, decoding at several batches, and where the time goes",
}


def add_parsers(subparsers: Any) -> None:
    for name, what in SCRIPTS.items():
        parser = subparsers.add_parser(name, help=f"on a GPU, in a checkout: {what}", add_help=False)
        parser.parse_known_args = lambda args, namespace, own=parser: (whole(own, args), [])
        parser.set_defaults(run=run)


def whole(parser: argparse.ArgumentParser, args: list[str]) -> argparse.Namespace:
    """All arguments are the script's own, --help too."""
    return argparse.Namespace(run=parser.get_default("run"), rest=args)


def run(args: argparse.Namespace) -> int:
    root = Path(moesaic.__file__).resolve().parents[2]
    if not (root / "benchmarks" / f"{args.what}.py").is_file():
        raise UnsupportedError("this measurement is not part of the installed package", where=f"bench {args.what}",
                               remedy="Clone the repository, and install it with `pip install -e .`.")  # fmt: skip
    command = [sys.executable, "-m", f"benchmarks.{args.what}", *args.rest]
    return subprocess.run(command, cwd=root, check=False).returncode
