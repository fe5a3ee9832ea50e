"""The ops as custom ops: models traced by torch.compile in one piece, and what each fake kernel says comes out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch._dynamo as dynamo
from torch import Tensor
from torch._subclasses import FakeTensorMode

from moesaic.contracts.contract import Contract
from moesaic.contracts.plan import ModelPlan, Parameters, Wishes
from moesaic.contracts.scheme import SCHEMES
from moesaic.contracts.spec import ModelSpec
from moesaic.engine.batch import make_input
from moesaic.engine.blocks import BlockManager
from moesaic.engine.feed import Feed
from moesaic.engine.params import SamplingParams
from moesaic.engine.request import Request
from moesaic.engine.scheduler import Scheduler, SchedulerConfig
from moesaic.hardware import GPUS, local_cpu
from moesaic.kernels import traced
from moesaic.kernels.ops import Ops
from moesaic.kernels.registry import NONE, Kernels, own
from moesaic.kernels.traced import Site, TracedKernels
from moesaic.layers.kv_pool import KVPool
from moesaic.layers.step import StepInput
from moesaic.models.build import plan_here, spec_of
from moesaic.models.decoder import Decoder
from moesaic.models.dummy import fill_model
from moesaic.models.hold import hold
from tests.planning_support import CATALOGUE
from tests.small_models import MODELS, alike

LONG = pytest.mark.long
Case = tuple[str, str, str, str]
"""Model, scheme, KV format, backend; `here` is whatever a plan for this CPU takes."""
CASES: tuple[Case, ...] = (
    ("heads with norms", "fp8", "bf16", "here"), ("latent", "bf16", "fp8", "here"),
    ("sinks and a window", "wna16", "fp8", "here"), ("latent", "mxfp8", "bf16", "reference"),
    ("heads with norms", "nvfp4", "bf16", "reference"), ("latent", "bf16", "bf16", "cpu_invariant"),
)  # fmt: skip
TRITON: tuple[Case, ...] = (
    ("heads with norms", "fp8", "fp8", "triton"), ("latent", "bf16", "fp8", "triton_invariant"),
    ("heads with norms", "fp8_tensor_static", "bf16", "triton"),
    ("latent", "mxfp8", "bf16", "triton"), ("latent, whole queries", "nvfp4", "fp8", "triton"),
    ("heads with norms", "fp8", "bf16", "triton_invariant"),
)  # fmt: skip
FUSED = {"heads with norms": {"gate", "store_heads", "experts_terms"},
         "latent": {"gate", "store_latent", "attend_latent", "experts_terms"}}  # fmt: skip
"""Of a Triton plan; the steps must call them."""


def planned(name: str, scheme: str, kv: str, backend: str) -> tuple[ModelSpec, ModelPlan]:
    plain = spec_of(MODELS[name])
    spec = plain if scheme == "bf16" else hold(plain, SCHEMES[scheme])
    wishes = Wishes(kv=kv, deterministic=backend.endswith("_invariant"))
    if backend == "here":
        return spec, plan_here(spec, local_cpu(), "float32", wishes)
    known = [trusted(each, backend) for each in CATALOGUE if each.backend in ("local", "gate")
             or backend.startswith(each.backend)]  # fmt: skip
    gpu = backend.startswith("triton")
    return spec, plan_here(spec, GPUS["h100"] if gpu else local_cpu(), "bfloat16" if gpu else "float32", wishes, known)


def trusted(contract: Contract, backend: str) -> Contract:
    """Experts taken for batch-invariant, which no test here turns on."""
    return replace(contract, batch_invariant=True) if contract.op == "experts" else contract


def steps(pool: KVPool, number: int = 5, prompts: int = 3) -> Iterator[StepInput]:
    """Two prompts, two steps of decoding, then chunks of a third, long one beside them."""
    blocks = BlockManager(24, pool.block_size, prefix_cache=False)
    limits = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=12, max_model_len=64)
    scheduler, feed = Scheduler(limits, blocks), Feed(4, pool.layers[0].device)
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    scheduler.add(Request("a", [5, 17, 33, 2, 9, 60, 51], params))
    scheduler.add(Request("b", [8, 3, 21], params))
    for at in range(number):
        if at == 3 and prompts == 3:
            scheduler.add(Request("c", list(range(3, 22)), params))
        step = scheduler.schedule()
        assert step is not None
        yield make_input(step, pool, feed)
        scheduler.commit(step, [7] * sum(chunk.sample for chunk in step.chunks))


def interpreted(case: Case) -> None:
    if case[3].startswith("triton") and not pytest.importorskip("triton").knobs.runtime.interpret:
        pytest.skip("runs on the device in the GPU ring")


def compiled(model: Decoder, backend: Any) -> Callable[[StepInput], Tensor]:
    dynamo.reset()
    return torch.compile(lambda at: model.scores(model(at)), fullgraph=True, backend=backend)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("case", "backend"), [
    (CASES[0], "aot_eager"), pytest.param(CASES[0], "eager", marks=LONG),
    *(pytest.param(case, "aot_eager", marks=LONG) for case in (*CASES[1:6], TRITON[0])),
], ids=str)  # fmt: skip
@torch.inference_mode()
def test_a_compiled_model_is_the_model(case: Case, backend: str) -> None:
    spec, plan = planned(*case)
    interpreted(case)
    like = torch.empty(0, dtype=getattr(torch, plan.base.dtype))
    model, plain = (Decoder(spec, kind(plan), like, 128) for kind in (TracedKernels, Kernels))
    fill_model(model)
    alike(model, plain)
    run, pools = compiled(model, backend), [each.pool(24, 4) for each in (model, plain)]
    for mine, theirs in zip(steps(pools[0]), steps(pools[1]), strict=True):
        assert torch.equal(run(mine), plain.scores(plain(theirs)))
        for one, other in zip(pools[0].layers, pools[1].layers, strict=True):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@torch.inference_mode()
def test_decoding_on_is_not_compiled_again() -> None:
    spec, plan = planned(*CASES[0])
    model, seen = fill_model(Decoder(spec, TracedKernels(plan), torch.empty(0), 128)), []

    def counting(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        seen.append(graph)
        return graph.forward

    run, counts = compiled(model, counting), []
    for at in steps(model.pool(24, 16), prompts=2, number=8):
        run(at)
        counts.append(len(seen))
    assert counts[1:] == [2] * 7, "a prompt's graph, then that of decoding"


class Checked(TracedKernels):
    """Holds every fake kernel to the real one, called as the custom op is."""

    def __init__(self, plan: ModelPlan) -> None:
        self.calls: Counter[str] = Counter()
        super().__init__(plan)

    def bind(self, chosen: Mapping[str, str], parameters: Mapping[str, Parameters] = NONE) -> Ops:
        sites = {op: Site(op, name, parameters.get(op, ())) for op, name in own(chosen).items()}
        return cast(Ops, SimpleNamespace(**{op: partial(self.check, site) for op, site in sites.items()}))

    def check(self, site: Site, *args: Any) -> Any:
        what, inputs, numbers, *changed = site.taken(args)
        with FakeTensorMode() as mode:
            unreal = [[mode.from_tensor(each) for each in held] for held in (inputs, *changed)]
            fakes = traced.fake(what, unreal[0], numbers, *unreal[1:])
        out = traced.run(what, inputs, numbers, *changed)
        mine, theirs = ([(each.shape, each.dtype, each.stride()) for each in held] for held in (fakes, out))
        assert mine == theirs, f"{site.op} of {site.backend}"
        self.calls[site.op] += 1
        return traced.together(site.backend, site.op, args, out)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("case", [
    *CASES, TRITON[0], *(pytest.param(each, marks=LONG) for each in TRITON[1:]),
], ids=str)  # fmt: skip
@torch.inference_mode()
def test_fakes_say_what_comes_out(case: Case) -> None:
    interpreted(case)
    spec, plan = planned(*case)
    dtype = getattr(torch, plan.base.dtype)
    like, one_path = torch.empty(0, dtype=dtype), plan.base.batch_invariant
    checked = Checked(plan)
    model = fill_model(Decoder(spec, checked, like, 128, one_path=one_path))
    plain = Decoder(spec, Kernels(plan), like, 128, one_path=one_path)
    alike(model, plain)
    pools = [each.pool(24, 4) for each in (model, plain)]
    for mine, theirs in zip(steps(pools[0], number=4), steps(pools[1], number=4), strict=True):
        assert torch.equal(model.scores(model(mine)), plain.scores(plain(theirs)))
    assert {"experts", "rms_norm", "top_two", "add_norm_encode"} & set(checked.calls)
    if case[3].startswith("triton"):
        assert FUSED[case[0].split(",")[0]] <= set(checked.calls)
