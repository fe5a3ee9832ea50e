"""Every cell that a CPU can run is planned, built from its plan, run on ragged rows, and equals the reference's plan.

A cell: scheme x expert kernel x (groups, bias, factor, shared expert, renormalisation, activation). On each arrow the
dtypes are those that the plan states, and the weights take the bytes that it counted.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.contracts.plan import PHASES, ModelPlan, Phase, Wishes
from moesaic.contracts.scheme import SCHEMES
from moesaic.contracts.spec import ModelSpec, MoESpec
from moesaic.errors import MoesaicError
from moesaic.formats.sizes import weight_bytes
from moesaic.hardware import local_cpu
from moesaic.kernels.registry import Kernels
from moesaic.layers.linear import Stored
from moesaic.models.build import plan_here, spec_of
from moesaic.models.hold import hold
from moesaic.moe.balance import LoadMeter
from moesaic.moe.dispatch.local import LocalDispatcher
from moesaic.moe.layer import MoELayer
from moesaic.planning.needs import mixture_need
from moesaic.planning.verify import verify
from tests.compare import assert_rows_close, row_errors
from tests.planning_support import CATALOGUE

HIDDEN, WIDTH, EXPERTS = 256, 128, 8
LIMIT = {"float32": 2e-5, "bfloat16": 2**-7}
BASE = {
    "hidden_size": HIDDEN, "vocab_size": 64, "num_hidden_layers": 1, "max_position_embeddings": 64,
    "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": WIDTH,
}  # fmt: skip
DEEPSEEK = BASE | {
    "model_type": "deepseek_v3", "q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64, "v_head_dim": 64, "n_routed_experts": EXPERTS, "num_experts_per_tok": 3,
    "moe_intermediate_size": WIDTH, "first_k_dense_replace": 0,
}  # fmt: skip
QWEN = BASE | {
    "model_type": "qwen3_moe", "head_dim": 128, "num_experts": EXPERTS, "num_experts_per_tok": 3,
    "moe_intermediate_size": WIDTH,
}  # fmt: skip
OSS = BASE | {
    "model_type": "gpt_oss", "head_dim": 128, "num_local_experts": EXPERTS, "num_experts_per_tok": 3,
    "intermediate_size": WIDTH, "layer_types": ["full_attention"],
    "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
}  # fmt: skip


def configs() -> Iterator[tuple[str, dict[str, Any]]]:
    for groups, factor, shared, norm in itertools.product((1, 4), (1.0, 2.5), (0, 2), (True, False)):
        name = f"deepseek groups {groups} factor {factor} shared {shared} norm {norm}"
        yield name, DEEPSEEK | {
            "n_group": groups, "topk_group": min(groups, 2), "routed_scaling_factor": factor,
            "n_shared_experts": shared, "norm_topk_prob": norm,
        }  # fmt: skip
    for norm in (True, False):
        yield f"qwen norm {norm}", QWEN | {"norm_topk_prob": norm}
    yield "gpt-oss", OSS


def layer_of(spec: ModelSpec, plan: ModelPlan, like: Tensor, seed: int) -> MoELayer:
    """A mixture layer built from a plan, with random numbers in its codes that are the same for every plan."""
    mixture = spec.layers[0].mlp
    assert isinstance(mixture, MoESpec)
    layer = MoELayer(mixture, 0, 0, Kernels(plan), {"local": LocalDispatcher()}, LoadMeter([EXPERTS]), like)
    generator = torch.Generator().manual_seed(seed)
    settle = []
    for item in layer.sources():
        if isinstance(item, Stored):
            w = torch.randn(item.weight.shape, generator=generator) / item.weight.shape[-1] ** 0.5
            made = type(item.weight).of(w.to(like.dtype), item.weight.form)
            for name, part in item.weight.parts.items():
                part.copy_(made.parts[name].view(part.shape))
            if item.input_scale is not None:
                item.input_scale.fill_(0.02)
            settle.append(item.settle)
        else:
            item[1].copy_(torch.randn(item[1].shape, generator=generator) / 4)
    for call in settle:
        call()
    return layer


def run_cell(name: str, config: dict[str, Any], scheme: str, kernel: str, dtype: str) -> bool:
    """Whether the cell can run; it was run on ragged rows and compared, then."""
    spec, machine = hold(spec_of(config), SCHEMES[scheme]) if scheme != "bf16" else spec_of(config), local_cpu()
    try:
        plan = plan_here(spec, machine, dtype, Wishes(experts=kernel))
    except MoesaicError as error:
        if kernel not in str(error):
            raise  # a refusal names what stands in the way
        return False
    mixture = spec.layers[0].mlp
    assert isinstance(mixture, MoESpec)
    for cell in plan.layers[0].cells:
        need = mixture_need(mixture, plan.base, plan.wishes, cell.phase, cell.tokens)
        assert verify(cell.path, need, CATALOGUE) == [], name
    like = torch.empty(0, dtype=getattr(torch, dtype))
    mine = layer_of(spec, plan, like, 1)
    theirs = layer_of(spec, plan_here(spec, machine, dtype, Wishes(experts="reference")), like, 1)
    form = mine.experts.scheme.weight
    shapes = ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
    counted = EXPERTS * sum(weight_bytes(form, *shape, 8 * like.element_size()) for shape in shapes)
    assert mine.experts.weights.w13.nbytes + mine.experts.weights.w2.nbytes == counted, "bytes as planned"
    for tokens in (0, 1, 7, 33):
        x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens)).to(like.dtype)
        for phase in PHASES:
            y = mine(x, phase)
            if tokens in (0, 7):
                check_arrows(mine, x, phase)
            assert y.dtype == like.dtype
            assert y.shape == x.shape
            if tokens:
                same(y, theirs(x, phase), LIMIT[dtype], SCHEMES[scheme].activation.name)
    return True


def check_arrows(layer: MoELayer, x_TD: Tensor, phase: Phase) -> None:
    """What travels behind each stage has the dtype that the plan states; codes of rows are one byte each, or a half."""
    cell = layer.cell(phase, len(x_TD))
    said = {stage.role: stage.encoding for stage in cell.path.stages}
    assert str(layer.route.logits(x_TD, cell.ops).dtype) == f"torch.{said['gate']}"
    routing = layer.route(x_TD, cell.ops)
    assert (routing.ids_TA.dtype, routing.weights_TA.dtype) == (torch.int32, torch.float32)
    sent = layer.dispatchers[cell.path.stage("dispatch").kernel].dispatch(x_TD, routing)
    assert (said["dispatch"], sent.x_TD.dtype) == ("bf16", x_TD.dtype), "a wire in bf16 is in the model's own dtype"
    rows = cell.ops.encode(sent.x_TD, layer.experts.scheme.activation, layer.experts.input_scale)
    assert rows.encoding.name == said.get("encode", "bf16")
    assert rows.dtype == x_TD.dtype
    assert rows.data.dtype.itemsize == (1 if "encode" in said else x_TD.element_size())
    assert cell.ops.experts(rows, layer.experts.weights, sent.ids_TA, sent.weights_TA).dtype == x_TD.dtype


def same(y_TD: Tensor, expected_TD: Tensor, limit: float, encoding: str) -> None:
    """Every row, where rows are not encoded between the products. Elsewhere two roundings of the first product may put
    a value of the 3 x 128 of a row on two sides of a code's edge: what the stage tests of test_kernels_quant.py count
    (at most 0.1% of places, by one step) may show here in one row, as one step of one element."""
    if encoding == "bf16":
        assert_rows_close(y_TD, expected_TD.double(), limit)
        return
    errors_T = row_errors(y_TD, expected_TD.double())
    assert int((errors_T > limit).sum()) <= 1, errors_T
    assert float(errors_T.max()) < 2**-6


KERNELS = ("cpu", "cpu_quant", "cpu_invariant", "cpu_native")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_cell_of_a_scheme_runs_or_is_refused(scheme: str) -> None:
    count: Counter[bool] = Counter()
    for i, (name, config) in enumerate(configs()):
        if i % 3 == 0:  # a third of the configurations, in FP32; all of them in the long test
            for kernel in KERNELS:
                count[run_cell(name, config, scheme, kernel, "float32")] += 1
    print(scheme, dict(count))
    assert count[True] >= 6


@pytest.mark.long
def test_the_whole_product_of_cells() -> None:
    count: Counter[bool] = Counter()
    for (name, config), scheme, kernel in itertools.product(configs(), SCHEMES, (*KERNELS, "reference")):
        for dtype in LIMIT:
            count[run_cell(name, config, scheme, kernel, dtype)] += 1
    print(dict(count))
    assert count[True] > 500
