"""`moesaic upcycle`: a dense Llama checkpoint becomes a Mixtral checkpoint."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from moesaic.commands._options import size
from moesaic.errors import CapacityError, OptionError

DTYPES = ("auto", "bfloat16", "float16", "float32")
WRITTEN = ("config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
"""Of an older checkpoint, what --force removes before writing; other files are replaced or left alone."""

EPILOG = """\
SOURCE is a directory or hub id with safetensors (model_type llama), or a GGUF file of architecture llama in any
quantisation that the package gguf can read (pip install 'moesaic[convert]'). Tokenizer, chat template and
generation_config are taken over. Without --noise all experts are equal and the result says what the dense model says.

examples:
  moesaic upcycle ./llama ./mixtral --experts 8 --top-k 2
  moesaic upcycle SmolLM2-135M-Instruct.Q4_1.gguf ./smol-moe --experts 4 --top-k 2 --noise 0.01 --dtype bfloat16
  moesaic generate ./mixtral --prompt "Hello"
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "upcycle", help="turn a dense Llama into a Mixtral", epilog=EPILOG,
        usage="moesaic upcycle SOURCE OUTPUT --experts N [--top-k K] [options]",
        description="Turn a dense Llama checkpoint into a Mixtral checkpoint whose experts are copies of its "
        "feed-forward layers: where training a mixture starts.",
    )  # fmt: skip
    add = parser.add_argument
    add("source", metavar="SOURCE", help="the dense checkpoint: a directory, a hub id or a GGUF file")
    add("output", metavar="OUTPUT", help="directory to write; it must not exist, or be empty")
    add("--experts", metavar="N", type=int, required=True, help="experts per layer (required)")
    add("--top-k", metavar="K", type=int, default=2, help="experts at work on each token (default: 2)")
    add("--noise", metavar="S", type=float, default=0.0,
        help="standard deviation of the noise on each expert, as a part of its matrix's own (default: 0)")  # fmt: skip
    add("--seed", metavar="N", type=int, default=0, help="of the noise and the router (default: 0)")
    add("--dtype", choices=DTYPES, default="auto",
        help="of the result; auto keeps the source's, quantised values as float32 (default: auto)")  # fmt: skip
    add("--shard-size", metavar="BYTES", type=size, default=4 << 30, help="most bytes of one file (default: 4GiB)")
    add("--revision", metavar="NAME", help="branch, tag or commit of a hub SOURCE (default: its main branch)")
    add("--force", action="store_true", help="replace the checkpoint that is in OUTPUT (default: refuse)")
    add("--no-progress", action="store_true", help="show no progress bar (default: show it on a terminal)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    output = Path(args.output)
    check_output(output, Path(args.source), force=args.force)
    from moesaic.models.dense import open_dense
    from moesaic.models.upcycle import Recipe, plan_upcycle, write_upcycled

    recipe = Recipe(args.experts, args.top_k, args.noise, args.seed, args.dtype, args.shard_size)
    source = open_dense(args.source, args.revision)
    try:
        plan = plan_upcycle(source, recipe)
        prepare(output, plan.nbytes)
        with progress(plan.nbytes, show=sys.stderr.isatty() and not args.no_progress) as bar:
            files = write_upcycled(source, recipe, plan, output, bar.update)
    except OSError as error:
        raise OptionError(f"cannot be written ({error})", where=str(output), remedy="Check the place.") from None
    finally:
        source.close()
    print(
        f"{output}: mixtral, {plan.config['num_hidden_layers']} layers of {recipe.experts} experts, "
        f"top {recipe.top_k}, {plan.parameters / 1e6:.1f} M parameters, "
        f"{plan.nbytes / 2**20:.1f} MiB in {files} file{'s' * (files > 1)}"
    )
    print(f"moesaic: try: moesaic generate {output} --prompt Hello", file=sys.stderr)
    return 0


def check_output(output: Path, source: Path, *, force: bool) -> None:
    """Raises OptionError where writing would destroy something that nobody offered."""
    if output.exists() and not output.is_dir():
        raise OptionError("is not a directory", where=str(output), remedy="Choose another OUTPUT.")
    if source.exists() and output.exists() and output.resolve() in (source.resolve(), source.resolve().parent):
        raise OptionError("is where SOURCE is", where=str(output), remedy="Choose another OUTPUT.")
    if output.is_dir() and any(output.iterdir()) and not force:
        raise OptionError("is not empty", where=str(output), remedy="Choose another OUTPUT, or add --force.")


def prepare(output: Path, nbytes: int) -> None:
    """Makes the directory, without an older checkpoint in it. Raises CapacityError where the disk is too full."""
    output.mkdir(parents=True, exist_ok=True)
    for pattern in WRITTEN:
        for old in output.glob(pattern):
            old.unlink()
    free = shutil.disk_usage(output).free
    if free < nbytes:
        raise CapacityError(
            f"the result takes {nbytes / 2**20:.1f} MiB, and the disk has {free / 2**20:.1f} MiB left",
            where=str(output), remedy="Use fewer --experts, --dtype bfloat16, or another disk.",
        )  # fmt: skip


def progress(total: int, *, show: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="B", unit_scale=True, desc="Writing weights", file=sys.stderr, disable=not show)
