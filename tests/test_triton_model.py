"""Whole models on the Triton kernels in the interpreter: the layers' fused paths, against the reference in FP64.

The kernels are held to 2^-7 one by one elsewhere. Here it is how layers put them together: a term, a residual, a scale
or a row that goes astray is an error of the order of one. Every expert is chosen (with weights of its own), so that
nothing turns on a near tie; what is left are roundings of BF16 in two layers.

Where rows or the cache are encoded, two sound models differ by what encoding costs: a last bit moves codes to the other
side of an edge, and from there all that follows. So the kernels are held against a model that encodes nothing, and must
be as near to it as the reference is that encodes as they do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from moesaic.contracts.plan import ModelPlan, Wishes
from moesaic.contracts.scheme import SCHEMES
from moesaic.contracts.spec import ModelSpec
from moesaic.engine.batch import make_input
from moesaic.engine.blocks import BlockManager
from moesaic.engine.feed import Feed
from moesaic.engine.params import SamplingParams
from moesaic.engine.request import Request
from moesaic.engine.scheduler import Scheduler, SchedulerConfig
from moesaic.formats.base import QuantTensor
from moesaic.hardware import GPUS, local_cpu
from moesaic.kernels import triton
from moesaic.kernels.registry import Kernels
from moesaic.layers.kv_pool import KVPool
from moesaic.layers.linear import Stored
from moesaic.models.build import spec_of
from moesaic.models.decoder import Decoder
from moesaic.models.dummy import fill_model
from moesaic.models.hold import hold
from moesaic.moe.layer import MoELayer
from moesaic.planning.plan import plan
from tests.compare import row_errors
from tests.planning_support import CATALOGUE
from tests.small_models import MODELS, alike

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
LIMIT = 2**-6
SCHEMES_HERE = ("bf16", "fp8", "mxfp8", "nvfp4")


@pytest.fixture(autouse=True)
def interpreted() -> None:
    from triton import knobs

    if not knobs.runtime.interpret:
        pytest.skip("runs on the device in the GPU ring")


def decoder(spec: ModelSpec, dtype: torch.dtype, backend: str, wishes: Wishes) -> Decoder:
    """On the CPU, with nothing but one backend's kernels."""
    known = [each for each in CATALOGUE if each.backend in (backend, "local", "gate")]
    if backend == "reference":  # computes in FP64 where it is given that
        made = plan(spec, local_cpu(), known, wishes, "float32")
    else:
        made = plan(spec, GPUS["h100"], known, wishes, "bfloat16")
    assert isinstance(made, ModelPlan), made
    return Decoder(spec, Kernels(made), torch.empty(0, dtype=dtype), 128, one_path=wishes.deterministic)


def filled(model: Decoder) -> Decoder:
    """Weights quantised from normal numbers: a code that falls to the other side of an edge is then one of many."""
    for item in fill_model(model).sources():
        if isinstance(item, Stored) and item.weight.form.name != "bf16":
            w = torch.randn(item.weight.shape) / item.weight.columns**0.5
            for name, part in QuantTensor.of(w, item.weight.form, item.weight.segments).parts.items():
                item.weight.parts[name].copy_(part)
    return model


def steps(models: tuple[Decoder, ...], deterministic: bool = False) -> Iterator[tuple[str, list[Tensor]]]:
    """Logits of each model for prompts, a decode, and a prompt's chunk beside a decode."""
    blocks = BlockManager(20, 4, prefix_cache=False)
    limits = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=12, max_model_len=64)
    scheduler, feed = Scheduler(limits, blocks), Feed(4, torch.device("cpu"))
    pools = [model.pool(20, 4) for model in models]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    scheduler.add(Request("a", [5, 17, 33, 2, 9, 60, 51], params))
    scheduler.add(Request("b", [8, 3, 21], params))
    for number in range(4):
        if number == 2:
            scheduler.add(Request("c", list(range(3, 22)), params))
        step = scheduler.schedule()
        assert step is not None
        logits = [run(model, pool, make_input(step, pool, feed)) for model, pool in zip(models, pools, strict=True)]
        kind = "decode" if step.decode else "mixed" if number else "prompts"
        yield f"{kind} {number}", logits
        scheduler.commit(step, [7] * sum(chunk.sample for chunk in step.chunks))


@torch.inference_mode()
def run(model: Decoder, pool: KVPool, inputs: Any) -> Tensor:
    return model.scores(model(inputs))


USUAL = (("heads with norms", "fp8", "fp8"), ("latent", "bf16", "fp8"))
ALL = [(name, scheme, kv) for name in MODELS for scheme in SCHEMES_HERE for kv in ("bf16", "fp8")]


@pytest.mark.parametrize(("name", "scheme", "kv"), USUAL)
def test_models(name: str, scheme: str, kv: str) -> None:
    check(name, scheme, kv)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("name", "scheme", "kv"), [each for each in ALL if each not in USUAL])
def test_all_models(name: str, scheme: str, kv: str) -> None:
    check(name, scheme, kv)


def check(name: str, scheme: str, kv: str) -> None:
    plain, wishes = spec_of(MODELS[name]), Wishes(kv=kv)
    spec = plain if scheme == "bf16" else hold(plain, SCHEMES[scheme])
    model = filled(decoder(spec, torch.bfloat16, "triton", wishes))
    twin = decoder(spec, torch.float64, "reference", wishes)
    wide = decoder(plain, torch.float64, "reference", Wishes())
    fused = {op for op in triton.FUSED if hasattr(model.kernels.ops, op)}
    assert {"gate", "add_norm_encode", "top_two", "store_heads", "store_latent"} <= fused
    cells = [(block.mlp, cell) for block in model.blocks if isinstance(block.mlp, MoELayer) for cell in block.mlp.cells]
    assert cells
    assert all(layer.leaves(cell) == (cell.phase == "decode") for layer, cell in cells)
    alike(model, twin)
    alike(model, wide)
    for what, (mine, theirs, exact) in steps((model, twin, wide)):
        cost, error = row_errors(theirs, exact).max().item(), row_errors(mine, exact).max().item()
        print(f"{name}, {scheme}, {kv}, {what}: {error:.4f} ({cost:.4f})")
        assert error < 1.5 * cost + LIMIT, what


def test_a_deterministic_layer_adds_up_for_itself() -> None:
    """Its experts are the invariant ones, whose sum is their own; the norms are the same fused ones."""
    spec = hold(spec_of(MODELS["heads with norms"]), SCHEMES["fp8"])
    known = [each for each in CATALOGUE if each.backend in ("triton", "triton_invariant", "local", "gate")]
    made = plan(spec, GPUS["h100"], known, Wishes(deterministic=True), "bfloat16")
    assert isinstance(made, ModelPlan), made
    model = Decoder(spec, Kernels(made), torch.empty(0, dtype=torch.bfloat16, device="meta"), 128, one_path=True)
    layers = [block.mlp for block in model.blocks if isinstance(block.mlp, MoELayer)]
    assert layers
    assert all(layer.sums and not layer.leaves(cell) for layer in layers for cell in layer.cells)
