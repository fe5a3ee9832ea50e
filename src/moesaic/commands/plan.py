"""`moesaic plan`: how a model would run, on hardware that need not be here, and why."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moesaic.assets import embedded_model, tuning_tables
from moesaic.config import cache_folder
from moesaic.contracts.contract import Contract
from moesaic.contracts.plan import ModelPlan, Refusal, Wishes
from moesaic.contracts.scheme import ENCODINGS, KV_FORMATS
from moesaic.contracts.spec import ModelSpec
from moesaic.errors import OptionError, UnsupportedError
from moesaic.hardware import GPUS, Hardware, local_cpu

if TYPE_CHECKING:
    from moesaic.commands._plan_view import Report

MOST_RANKS = 128
"""As far as it is sought how many ranks a model needs."""
EPILOG = """\
Only config.json and the headers of the safetensors files are read; of a hub model through range requests. Kernels that
Moesaic knows and cannot run yet are planned with only under --hypothetical.

examples:
  moesaic plan                                        the embedded model on this machine's CPU
  moesaic plan deepseek-ai/DeepSeek-V3 --gpu h200 --tp 8 --ep 8 --hypothetical
  moesaic plan ./model --gpu h100 b200 --scheme mxfp8 --hypothetical
  moesaic plan ./model --gpu h100 --why flashinfer_trtllm
  moesaic plan ./model --gpu h100 --ep 8 --hypothetical --dispatch decode=deepep_low_latency,prefill=deepep
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
    each = "decode=A,prefill=B for each phase its own"
    add("--experts", metavar="NAME", help=f"demand this expert kernel; {each} (default: the best)")
    add("--attention", metavar="NAME", help="demand this attention kernel (default: the best)")
    add("--dispatch", metavar="NAME", help=f"demand this dispatcher; {each} (default: the best)")
    wires = f"{', '.join(ENCODINGS)}; {each}"
    add("--wire", metavar="NAME",
        help=f"demand this encoding between dispatch and experts: {wires} (default: the cheapest)")  # fmt: skip
    add("--router-dtype", choices=("float32", "bfloat16"),
        help="demand this dtype of the router logits (default: what the kernel takes)")  # fmt: skip
    add("--kv", choices=KV_FORMATS, default="bf16",
        help="format of the KV cache (default: bf16, meaning the dtype that is computed in)")  # fmt: skip
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto",
        help="that is computed in (default: auto, bfloat16 where the hardware has it)")  # fmt: skip
    add("--max-batch", metavar="N", type=int, default=64, help="requests decoding at once (default: 64)")
    add("--context", metavar="N", type=int, default=4096, help="positions per request, for the costs (default: 4096)")
    add("--deterministic", action="store_true",
        help="only kernels whose rows do not depend on one another (default: any)")  # fmt: skip
    add("--lossy", action="store_true", help="allow roundings that the scheme does not ask for (default: refuse)")
    add("--two-layouts", action="store_true",
        help="hold expert weights twice where the phases' kernels want two layouts (default: refuse)")  # fmt: skip
    add("--no-graphs", dest="graphs", action="store_false",
        help="do not decode in CUDA graphs (default: where every kernel can stand in one)")  # fmt: skip
    add("--hypothetical", action="store_true", help="plan with kernels that are not built yet, too (default: refuse)")
    add("--why", metavar="KERNEL", help="only say why this kernel or dispatcher was not taken (default: show all)")
    add("--json", action="store_true", help="print JSON (default: tables)")
    add("--revision", metavar="NAME", help="branch, tag or commit of a hub model (default: its main branch)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    machines = [machine(name) for name in args.gpu]
    check(args)
    from moesaic.commands._plan_json import as_json
    from moesaic.commands._plan_view import check_known, show, why
    from moesaic.kernels.registry import catalogue, local_catalogue
    from moesaic.models.build import choose_dtype
    from moesaic.models.hold import hold_online
    from moesaic.models.metadata import read_metadata
    from moesaic.models.wishes import names_in
    from moesaic.moe.dispatch import contracts

    model, wishes = str(embedded_model()) if args.model is None else args.model, wishes_of(args)
    spec = hold_online(read_metadata(model, args.revision).spec, args.scheme)
    found = []
    for hardware in machines:
        known = (*(local_catalogue() if hardware.device == "cpu" else catalogue()), *contracts())
        asked = {"experts": names_in(wishes.experts), "dispatch": names_in(wishes.dispatch),
                 "attention": names_in(wishes.attention), "why": [args.why] if args.why else []}  # fmt: skip
        for option, names in asked.items():
            op = "attend_paged" if option == "attention" else option
            for name in names:
                check_known(name, (c.backend for c in known if op in (c.op, "why")), f"--{option}")
        for name in names_in(wishes.wire):
            check_known(name, ENCODINGS, "--wire")
        dtype = choose_dtype(args.dtype, spec, hardware)
        found.append(Asked(model, spec, hardware, known, dtype, args.context).report(wishes))
    if args.json:
        printed = [as_json(report) | ({"why": why(report, args.why)} if args.why else {}) for report in found]
        json.dump(printed if len(printed) > 1 else printed[0], sys.stdout, indent=1)
        print()
    for i, report in enumerate(() if args.json else found):
        print(*[""] * min(i, 1), sep="", end="\n" * min(i, 1))
        if args.why:
            print("\n".join(why(report, args.why)) or f"{args.why} has no part in this model's path")
        else:
            show(report)
    return UnsupportedError.exit_code if any(isinstance(report.made, Refusal) for report in found) else 0


@dataclass(frozen=True)
class Asked:
    """What plans are made of, but for the wishes."""

    model: str
    spec: ModelSpec
    hardware: Hardware
    known: Sequence[Contract]
    dtype: str
    context: int

    def report(self, wishes: Wishes) -> Report:
        """With the fewest ranks that would do, where it does not fit and more ranks can be had."""
        from moesaic.commands._plan_view import Report

        made = self.plan(wishes)
        report = Report(self.model, self.spec, self.hardware, wishes, made, self.context)
        if isinstance(made, Refusal) or not report.fit.lacking:
            return report
        more = None if self.hardware.device == "cpu" else self.enough(wishes)
        return replace(report, more=more, fp8_kv=self.in_fp8(wishes))

    def in_fp8(self, wishes: Wishes) -> Wishes | None:
        """The same wishes with an FP8 cache, if attention can read one here and everything would fit then."""
        from moesaic.planning.cost import fit

        for hypothetical in sorted({wishes.hypothetical, True}):
            less = replace(wishes, kv="fp8", hypothetical=hypothetical)
            made = self.plan(less) if wishes.kv == "bf16" else None
            if isinstance(made, ModelPlan):
                return None if fit(made, self.hardware, self.context).lacking else less
        return None

    def plan(self, wishes: Wishes) -> ModelPlan | Refusal:
        from moesaic.planning.plan import plan
        from moesaic.planning.tuning import Tuning

        tuning = Tuning.of(tuning_tables(cache_folder() / "tuning"), self.hardware.name)
        return plan(self.spec, self.hardware, self.known, wishes, self.dtype, tuning)

    def enough(self, wishes: Wishes) -> Wishes | None:
        """The same wishes on more ranks: what is as wide as all of them grows with them."""
        from moesaic.planning.cost import fit

        now = max(wishes.tp, wishes.ep)
        for count in range(now + 1, MOST_RANKS + 1):
            if any(block.attention.heads % count and wishes.tp == now for block in self.spec.layers):
                continue  # refused in any case: this only saves time
            tp = count if wishes.tp == now else wishes.tp
            wider = replace(wishes, tp=tp, ep=count if wishes.ep == now > 1 else wishes.ep, hypothetical=True)
            made = self.plan(wider)
            if isinstance(made, ModelPlan) and not fit(made, self.hardware, self.context).lacking:
                return wider
        return None


def check(args: argparse.Namespace) -> None:
    """What can be said of the options without a model."""
    from moesaic.models.hold import scheme_named

    for name in ("tp", "ep", "max_batch", "context"):
        if getattr(args, name) < 1:
            raise OptionError("must be at least 1", where=f"--{name.replace('_', '-')}", remedy="Correct the value.")
    if args.ep > 1 and args.ep % args.tp:
        raise OptionError(
            f"the {args.tp} ranks that cut projections must divide the {args.ep} that share experts",
            where="--ep", remedy="Use --ep 1 or a multiple of --tp.",
        )  # fmt: skip
    wishes_of(args)
    if args.scheme is not None:
        scheme_named(args.scheme, "--scheme")


def machine(name: str) -> Hardware:
    if name == "cpu":
        return local_cpu()
    if name not in GPUS:
        known = f"Known: {', '.join(GPUS)}, cpu. MODEL stands before --gpu."
        raise OptionError(f"unknown hardware {name!r:.80}", where="--gpu", remedy=known)
    return GPUS[name]


def wishes_of(args: argparse.Namespace) -> Wishes:
    """Raises OptionError for a wish for each phase that is none."""
    from moesaic.models.wishes import wish_of

    names = ("router_dtype", "kv", "deterministic", "lossy", "hypothetical", "max_batch", "tp", "ep", "graphs",
             "two_layouts")  # fmt: skip
    found: dict[str, Any] = {name: getattr(args, name) for name in names}
    found["attention"] = None if args.attention == "auto" else args.attention
    found |= {name: wish_of(getattr(args, name), f"--{name}") for name in ("experts", "dispatch", "wire")}
    return Wishes(**found)
