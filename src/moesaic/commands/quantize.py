"""`moesaic quantize`: a checkpoint in another number format."""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.commands._options import size
from moesaic.commands._prompts import Ask, from_file
from moesaic.contracts.scheme import SCHEMES
from moesaic.errors import OptionError

if TYPE_CHECKING:
    from moesaic.models.checkpoint import Checkpoint
    from moesaic.models.quantize import Calibrate, Recipe
    from moesaic.models.quantize_plan import Plan

EPILOG = f"""\
SRC is a directory or hub id in BF16, FP16 or FP32, or already quantised, such as the FP8 releases. DST gets the
weights, a config.json that other engines read, tokenizer, templates and licence, and quantization_report.json.

schemes: {", ".join(SCHEMES)}

Never quantised: embedding, head, norms, routers, kv_b_proj. A run that was interrupted goes on where it was when the
same command is given again. With bf16 a quantised checkpoint is decoded.

examples:
  moesaic quantize ./model ./model-mxfp8 --scheme mxfp8
  moesaic quantize org/model ./model-w4 --scheme wna16 --experts-only --keep 'model.layers.0.*'
  moesaic quantize ./model ./model-nvfp4 --scheme nvfp4 --calibrate prompts.jsonl
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "quantize", help="write a checkpoint in another number format", epilog=EPILOG,
        usage="moesaic quantize SRC DST --scheme S [options]",
        description="Quantise a checkpoint, one weight at a time, and check what was written.",
    )  # fmt: skip
    add = parser.add_argument
    add("source", metavar="SRC", help="the checkpoint: a directory or a hub id")
    add("output", metavar="DST", help="directory to write; it must not exist, or be what an interrupted run left")
    add("--scheme", metavar="S", required=True, help="format of weights and encoding of activations (required)")
    add("--keep", metavar="PATTERN", action="append", default=[],
        help="modules to leave unquantised, such as 'model.layers.0.*'; repeatable (default: none)")  # fmt: skip
    add("--experts-only", action="store_true", help="quantise nothing but the routed experts (default: off)")
    add("--calibrate", metavar="FILE",
        help="prompts to run the source on, for schemes with static activation scales: one per line, or .jsonl with "
        '"prompt" or "messages" (default: none)')  # fmt: skip
    add("--calibrate-tokens", metavar="TOKENS", type=int, default=2048,
        help="most tokens of a calibration prompt; the rest is cut off (default: 2048)")  # fmt: skip
    add("--shard-size", metavar="BYTES", type=size, default=4 << 30, help="most bytes of one file (default: 4GiB)")
    add("--revision", metavar="NAME", help="branch, tag or commit of a hub SRC (default: its main branch)")
    add("--no-progress", action="store_true", help="show no progress bars (default: show them on a terminal)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    output = Path(args.output)
    recipe = recipe_of(args)
    if Path(args.source).exists() and output.resolve() == Path(args.source).resolve():
        raise OptionError("is SRC itself", where=str(output), remedy="Choose another DST.")
    from moesaic.models.checkpoint import Checkpoint
    from moesaic.models.quantize import prepare, quantize
    from moesaic.models.quantize_files import taken_over
    from moesaic.models.quantize_report import table
    from moesaic.models.quantize_state import Workspace

    show = sys.stderr.isatty() and not args.no_progress
    with Checkpoint.open(args.source, args.revision) as source:
        plan = prepare(source, recipe)
        for note in plan.spec.notes:
            print(f"moesaic: note: {note}", file=sys.stderr)
        calibrate = calibration(args, source, plan, show=show)
        with Workspace(output, recipe.options(source)) as work, bar(plan.before, "Quantising", "B", show) as shown:
            if work.done:
                print(f"moesaic: going on: {len(work.done)} of {len(plan.shards)} files are there", file=sys.stderr)
            rows = quantize(source, plan, work, calibrate, shown.update)
    print(table(rows, taken_over(plan)))
    print(f"{output}: {plan.scheme.name}, {plan.after / 2**20:.1f} MiB in {len(plan.shards)} files")
    print(f"moesaic: try: moesaic generate {output} --prompt Hello", file=sys.stderr)
    return 0


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The options, checked before torch is imported as far as that goes."""
    if args.scheme not in SCHEMES:
        raise OptionError(
            f"unknown scheme {args.scheme!r:.40}", where="--scheme", remedy=f"Known: {', '.join(SCHEMES)}."
        )
    if args.calibrate_tokens < 1:
        raise OptionError("must be at least 1", where="--calibrate-tokens", remedy="2048 is usual.")
    digest = None
    if args.calibrate is not None:
        asked = [(ask.prompt, ask.messages) for ask in from_file(args.calibrate)]
        digest = hashlib.sha256(repr((args.calibrate_tokens, asked)).encode()).hexdigest()
    from moesaic.models.quantize import Recipe

    return Recipe(SCHEMES[args.scheme], tuple(args.keep), args.experts_only, args.shard_size, digest)


def calibration(args: argparse.Namespace, source: Checkpoint, plan: Plan, *, show: bool) -> Calibrate:
    """What runs the source model on the prompts, when it is called."""

    def run_prompts() -> dict[str, float]:
        from moesaic.engine.calibrate import calibrate

        sequences = tokens_of(source, from_file(args.calibrate), args.calibrate_tokens)
        with bar(sum(map(len, sequences)), "Calibrating", "token", show) as shown:
            return calibrate(source, sequences, shown.update)

    return run_prompts


def tokens_of(source: Checkpoint, asks: list[Ask], limit: int) -> list[list[int]]:
    """Prompts as they are, conversations through the chat template; each cut off at the limit."""
    from moesaic.text.chat import ChatTemplate
    from moesaic.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_directory(source.path)
    template = ChatTemplate.from_directory(source.path, tokenizer.special_tokens)
    found = []
    for ask in asks:
        if ask.messages is not None:
            ids = tokenizer.encode(template.render(ask.messages), add_special_tokens=False)
        else:
            ids = tokenizer.encode(ask.prompt) if isinstance(ask.prompt, str) else list(ask.prompt)
        found.append(ids[:limit])
    return found


def bar(total: int, what: str, unit: str, show: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, unit_scale=True, desc=what, file=sys.stderr, disable=not show)
