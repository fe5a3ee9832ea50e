"""`--router-dtype`: the gate's weight, its product and the logits are in the dtype that was planned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moesaic import LLM, SamplingParams
from moesaic.contracts.plan import ModelPlan, Refusal, Wishes
from moesaic.errors import OptionError
from moesaic.hardware import local_cpu
from moesaic.kernels.registry import Kernels
from moesaic.models.build import plan_here, spec_of
from moesaic.models.decoder import Decoder
from moesaic.moe.layer import MoELayer
from moesaic.planning.plan import plan
from tests.cli_support import call
from tests.compare import assert_rows_close
from tests.planning_support import CATALOGUE
from tests.test_planning_cells import BASE, EXPERTS, HIDDEN, OSS, QWEN, layer_of
from tests.test_planning_cells import DEEPSEEK as GROUPLESS

GPT_OSS = OSS | {"num_hidden_layers": 1}
DEEPSEEK = GROUPLESS | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "n_shared_experts": 1,
                        "norm_topk_prob": True}  # fmt: skip
MIXTRAL = BASE | {"model_type": "mixtral", "num_local_experts": EXPERTS, "num_experts_per_tok": 3}
KERNELS = ("cpu", "cpu_native", "cpu_invariant", "reference")


def layer(config: dict[str, Any], dtype: str, **wishes: Any) -> MoELayer:
    spec = spec_of(config)
    made = plan_here(spec, local_cpu(), dtype, Wishes(**wishes))
    return layer_of(spec, made, torch.empty(0, dtype=getattr(torch, dtype)), 1)


def by(ops: Any, kernel: str) -> Any:
    """The same ops with gate and choice by one backend, composed."""
    from importlib import import_module
    from types import SimpleNamespace

    module = import_module(f"moesaic.kernels.{kernel}")
    return SimpleNamespace(linear=module.linear, route=module.route)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("router", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gate_computes_in_the_planned_dtype(dtype: str, router: str, deterministic: bool) -> None:
    """Weight, product and logits, whatever the model computes in; the product is the exact one, rounded once."""
    made = layer(DEEPSEEK, dtype, router_dtype=router, deterministic=deterministic)
    of, gate = getattr(torch, router), made.route
    assert (gate.weight_ED.dtype, gate.bias_E is not None and gate.bias_E.dtype) == (of, torch.float32)
    x_TD = torch.randn(33, HIDDEN).to(getattr(torch, dtype))
    for cell in made.cells:
        logits_TE = gate.logits(x_TD, cell.ops)
        assert logits_TE.dtype == of
        exact = x_TD.to(of).double() @ gate.weight_ED.double().T
        slack = 1e-6 * (x_TD.double().abs() @ gate.weight_ED.double().abs().T)
        half_step = exact.abs() * (2.0**-8 if router == "bfloat16" else 2.0**-23)
        assert bool(((logits_TE.double() - exact).abs() <= half_step + slack).all())
        assert hasattr(cell.ops, "gate") <= (router == "float32"), "the fused op computes in FP32 only"
        assert made.route(x_TD, cell.ops).weights_TA.dtype == torch.float32


@pytest.mark.parametrize("kernel", KERNELS)
def test_logits_that_are_equal_in_bf16_are_a_tie_only_there(kernel: str) -> None:
    """1 and 1 + 2^-9: FP32 prefers the second, BF16 cannot tell them apart, and ties go to the lower id."""
    first = {}
    for router in ("float32", "bfloat16"):
        made = layer(QWEN, "bfloat16", router_dtype=router)
        made.route.weight_ED.zero_()
        made.route.weight_ED[3, 0] = made.route.weight_ED[5, 0] = 1.0
        made.route.weight_ED[5, 1] = 2.0**-9
        x_TD = torch.zeros(2, HIDDEN, dtype=torch.bfloat16)
        x_TD[:, :2] = 1.0
        ids_TA = made.route(x_TD, by(made.cells[0].ops, kernel)).ids_TA
        first[router] = ids_TA[:, 0].tolist()
    assert first == {"float32": [5, 5], "bfloat16": [3, 3]}


ROUTERS = {"qwen3": (QWEN, Qwen3MoeTopKRouter), "mixtral": (MIXTRAL, MixtralTopKRouter),
           "gpt-oss": (GPT_OSS, GptOssTopKRouter)}  # fmt: skip


@pytest.mark.parametrize("name", ROUTERS)
@torch.inference_mode()
def test_a_bf16_gate_is_that_of_transformers_in_bf16(name: str) -> None:
    """Whose gates compute in the model's dtype. Sums in another order may round a logit to its neighbour; from the same
    logits the choice is the same, but where two of them are equal."""
    config, kind = ROUTERS[name]
    made = layer(config, "bfloat16", router_dtype="bfloat16")
    gate = kind(AutoConfig.for_model(**config)).to(torch.bfloat16)
    gate.weight.copy_(made.route.weight_ED)
    if made.route.logit_bias_E is not None:
        assert made.route.logit_bias_E.dtype == torch.bfloat16
        gate.bias.copy_(made.route.logit_bias_E)
    x_TD = torch.randn(257, HIDDEN).to(torch.bfloat16)
    logits_TE, weights_TA, ids_TA = gate(x_TD)
    for cell in made.cells:
        ours_TE = made.route.logits(x_TD, cell.ops)
        assert ours_TE.dtype == logits_TE.dtype == torch.bfloat16
        apart = (ours_TE.view(torch.int16).int() - logits_TE.view(torch.int16).int()).abs()
        assert int(apart.max()) <= 1
        assert float((apart == 0).float().mean()) > 0.97
        our_ids_TA, our_weights_TA = cell.ops.route(logits_TE, None, made.route.spec)
        ordered = logits_TE.sort(-1, descending=True).values
        untied_T = ordered[:, 2] > ordered[:, 3]
        assert int(untied_T.sum()) > 150
        one, other = (dense(*each)[untied_T] for each in ((our_ids_TA, our_weights_TA), (ids_TA, weights_TA.float())))
        assert_rows_close(one, other.double(), 2.0**-7)


def dense(ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
    return torch.zeros(len(ids_TA), EXPERTS).scatter_(1, ids_TA.long(), weights_TA)


def test_rows_do_not_depend_on_one_another_in_deterministic_mode() -> None:
    made = layer(DEEPSEEK, "bfloat16", router_dtype="bfloat16", deterministic=True)
    x_TD = torch.randn(40, HIDDEN).to(torch.bfloat16)
    for phase in ("decode", "prefill"):
        whole = made(x_TD, phase)  # type: ignore[arg-type]
        for t in (0, 7, 39):
            assert torch.equal(made(x_TD[t : t + 1], phase)[0], whole[t])  # type: ignore[arg-type]


def test_the_plan_counts_and_says_what_the_model_holds() -> None:
    spec, on = spec_of(DEEPSEEK), local_cpu()
    held = {}
    for router in ("float32", "bfloat16"):
        made = plan(spec, on, CATALOGUE, Wishes(router_dtype=router))
        assert isinstance(made, ModelPlan)
        assert {layer.router_dtype for layer in made.layers} == {router}
        model = Decoder(spec, Kernels(made), torch.empty(0, dtype=torch.bfloat16, device="meta"), 1)
        assert made.weight_bytes == model.nbytes()
        held[router] = made.weight_bytes
    assert held["float32"] - held["bfloat16"] == 2 * EXPERTS * HIDDEN


# --- refused where it cannot be --------------------------------------------------------------------------------------


def test_a_router_that_takes_no_bf16_logits_is_not_given_them_behind_the_users_back() -> None:
    """A cast would make them FP32 again, which nobody runs yet: refused, with what works."""
    wide = [replace(c, logits=frozenset({"float32"})) if c.op == "route" else c for c in CATALOGUE]
    made = plan(spec_of(DEEPSEEK), local_cpu(), wide, Wishes(router_dtype="bfloat16"))
    assert isinstance(made, Refusal)
    assert made.kind == "not_built"
    assert made.nearest == "--router-dtype float32"
    assert any("the stage cast is known, but not built" in each.reason for each in made.reasons)
    assert isinstance(plan(spec_of(DEEPSEEK), local_cpu(), wide, Wishes()), ModelPlan)


def test_a_gate_needs_a_product_in_its_dtype() -> None:
    """The kernel of dense products may know the model's dtype only; then the gate takes another, or is refused."""
    only = [replace(c, dtypes=frozenset({"float32"})) if c.op == "linear" else c for c in CATALOGUE]
    made = plan(spec_of(DEEPSEEK), local_cpu(), only, Wishes(router_dtype="bfloat16"), "float32")
    assert isinstance(made, Refusal)
    assert "linear" in made.what
    assert isinstance(plan(spec_of(DEEPSEEK), local_cpu(), only, Wishes(), "float32"), ModelPlan)
    narrow = [replace(c, dtypes=frozenset({"bfloat16"})) if (c.op, c.backend) == ("linear", "cpu_native") else c
              for c in CATALOGUE]  # fmt: skip
    mixed = plan(spec_of(DEEPSEEK), local_cpu(), narrow, Wishes())
    assert isinstance(mixed, ModelPlan)
    assert Kernels(mixed).chosen("linear", mixed.base) == "cpu_native"
    assert Kernels(mixed).chosen("linear", replace(mixed.base, dtype="float32")) == "cpu"


# --- from the outside ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_embedded_model_runs_with_bf16_gates(dtype: str) -> None:
    llm = LLM(progress=False, dtype=dtype, router_dtype="bfloat16")
    built = llm.launched.built
    mixtures = [block.mlp for block in built.model.blocks if isinstance(block.mlp, MoELayer)]
    assert mixtures
    assert all(mixture.route.weight_ED.dtype == torch.bfloat16 for mixture in mixtures)
    (result,) = llm.generate(["What is 12 + 30?"], SamplingParams(temperature=0, max_tokens=64))
    assert "Answer: 42" in result.text


def test_the_command_line_says_and_does_it() -> None:
    shown = call("plan", "--router-dtype", "bfloat16")
    assert (shown.code, shown.err) == (0, "")
    assert all("bfloat16" in line for line in shown.out.splitlines() if line.startswith("gate "))
    ran = call("generate", "--prompt", "What is 12 + 30?", "--max-tokens", "64", "--router-dtype", "bfloat16")
    assert ran.code == 0
    assert "Answer: 42" in ran.out
    with pytest.raises(OptionError, match="router-dtype"):
        LLM(progress=False, router_dtype="float16")
