"""`moesaic plan`: how a model would run, on hardware that need not be here, and why."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import Any

from moesaic.assets import embedded_model
from moesaic.contracts.plan import Refusal, Wishes
from moesaic.contracts.scheme import SCHEMES
from moesaic.errors import OptionError
from moesaic.hardware import GPUS, Hardware, local_cpu

WIRE = ("bf16", "fp8_tensor", "fp8_token", "fp8_group128", "mxfp8", "nvfp4")
EPILOG = """\
Only config.json and the headers of the safetensors files are read; of a hub model through range requests. Kernels that
Moesaic knows and cannot run yet are planned with only under --hypothetical.

examples:
  moesaic plan                                        the embedded model on this machine
  moesaic plan deepseek-ai/DeepSeek-V3 --gpu h200 --tp 8 --ep 8 --hypothetical
  moesaic plan ./model --gpu h100 b200 --scheme mxfp8 --hypothetical
  moesaic plan ./model --gpu h100 --why flashinfer_trtllm
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "plan", help="show how a model would run, and why", epilog=EPILOG, usage="moesaic plan [MODEL] [options]",
        description="Show which kernels, formats, wires and adapters run each layer of a model, what it costs in "
        "memory, bytes and time, and what stands in the way.",
    )  # fmt: skip
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="a directory or hub id (default: the embedded model)")
    add("--gpu", metavar="NAME", nargs="+", default=["cpu"], help=f"{', '.join(GPUS)}, cpu (default: cpu, this one)")
    add("--tp", metavar="N", type=int, default=1, help="ranks that cut each projection (default: 1)")
    add("--ep", metavar="N", type=int, default=1, help="ranks that share the experts (default: 1)")
    add("--scheme", metavar="NAME", help="hold weights in this scheme, quantised at load (default: as stored)")
    add("--experts", metavar="NAME", help="demand this expert kernel (default: the best)")
    add("--dispatch", metavar="NAME", help="demand this dispatcher (default: the best)")
    add("--wire", choices=WIRE, help="demand this encoding between dispatch and experts (default: the cheapest)")
    add("--router-dtype", choices=("float32", "bfloat16"), help="demand this dtype of the router logits (default: what the kernel takes)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="that is computed in (default: bfloat16)")
    add("--max-batch", metavar="N", type=int, default=64, help="requests decoding at once (default: 64)")
    add("--context", metavar="N", type=int, default=4096, help="positions per request, for the costs (default: 4096)")
    add("--deterministic", action="store_true", help="only kernels whose rows do not depend on one another (default: any)")
    add("--lossy", action="store_true", help="allow roundings that the scheme does not ask for (default: refuse)")
    add("--hypothetical", action="store_true", help="plan with kernels that are not built yet, too (default: refuse)")
    add("--why", metavar="KERNEL", help="only say why this kernel or dispatcher was not taken (default: show all)")
    add("--json", action="store_true", help="print JSON (default: tables)")
    add("--revision", metavar="NAME", help="branch, tag or commit of a hub model (default: its main branch)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    machines = [machine(name) for name in args.gpu]
    for name in ("tp", "ep", "max_batch", "context"):
        if getattr(args, name) < 1:
            raise OptionError("must be at least 1", where=f"--{name.replace('_', '-')}", remedy="Correct the value.")
    if args.scheme is not None and args.scheme not in SCHEMES:
        raise OptionError(f"unknown scheme {args.scheme!r}", where="--scheme", remedy=f"Known: {', '.join(SCHEMES)}.")
    from moesaic.commands._plan_view import Report, show, why
    from moesaic.kernels.registry import catalogue, local_catalogue
    from moesaic.models.build import spec_of
    from moesaic.models.hold import hold_online
    from moesaic.models.metadata import read_metadata
    from moesaic.moe.dispatch import contracts
    from moesaic.planning.plan import plan

    model = args.model or str(embedded_model())
    metadata = read_metadata(model, args.revision)
    spec = hold_online(spec_of(metadata.config), args.scheme)
    wishes = wishes_of(args)
    code, printed = 0, []
    for hardware in machines:
        known = local_catalogue() if hardware.device == "cpu" else catalogue()
        made = plan(spec, hardware, (*known, *contracts()), wishes, args.dtype)
        report = Report(model, spec, hardware, made, args.context)
        if args.json:
            printed.append(report.as_json())
        elif args.why:
            print(why(report, args.why))
        else:
            show(report)
        code = code or (4 if isinstance(made, Refusal) else 0)
    if args.json:
        json.dump(printed if len(printed) > 1 else printed[0], sys.stdout, indent=1)
        print()
    return code


def machine(name: str) -> Hardware:
    if name == "cpu":
        return local_cpu()
    if name not in GPUS:
        raise OptionError(f"unknown hardware {name!r}", where="--gpu", remedy=f"Known: {', '.join(GPUS)}, cpu.")
    return GPUS[name]


def wishes_of(args: argparse.Namespace) -> Wishes:
    names = ("experts", "dispatch", "wire", "router_dtype", "deterministic", "lossy", "hypothetical", "max_batch",
             "tp", "ep")  # fmt: skip
    return replace(Wishes(), **{name: getattr(args, name) for name in names})


