"""Plans executed on what ranks meet: rows that are padding, ranks that no token goes to, ranks without rows.

Each layer is built from its plan, for every expert kernel of a CPU. Two ranks are two layers that hold a half of the
experts each; a dispatcher hands them all rows, with ids of their own and -1 for experts that are not theirs. The
reference's plan of the whole layer says what must come out of both together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.contracts.plan import Phase, Wishes
from moesaic.contracts.scheme import SCHEMES
from moesaic.contracts.spec import ModelSpec
from moesaic.errors import MoesaicError
from moesaic.formats.encodings import Rows
from moesaic.hardware import local_cpu
from moesaic.kernels.ops import Ops
from moesaic.models.build import plan_here, spec_of
from moesaic.models.hold import hold
from moesaic.moe.layer import MoELayer
from moesaic.moe.values import Dispatched, Routing
from tests.test_planning_cells import DEEPSEEK, EXPERTS, HIDDEN, LIMIT, OSS, layer_of, same

GROUPED = DEEPSEEK | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "n_shared_experts": 2,
                      "norm_topk_prob": True}  # fmt: skip
CASES = [("bf16", GROUPED), ("bf16", OSS), ("fp8", GROUPED), ("mxfp8", GROUPED), ("nvfp4_dynamic", GROUPED),
         ("w4afp8_static", GROUPED), ("wna16", GROUPED), ("mxfp4", OSS)]  # fmt: skip
PHASES: tuple[Phase, ...] = ("decode", "prefill")


@dataclass(frozen=True)
class Half:
    """A rank's half of the experts: rows as they are, ids of its own, -1 for the others'."""

    rank: int

    def dispatch(self, x_TD: Tensor, routing: Routing, rows: Rows | None = None) -> Dispatched:
        first, count = self.rank * EXPERTS // 2, EXPERTS // 2
        mine = (routing.ids_TA >= first) & (routing.ids_TA < first + count)
        return Dispatched(x_TD, torch.where(mine, routing.ids_TA - first, -1), routing.weights_TA)

    def combine(self, y_TD: Tensor, sent: Dispatched) -> Tensor:
        return y_TD


def built(scheme: str, config: dict[str, Any], kernel: str, dtype: str) -> MoELayer | None:
    """A layer with the same numbers for every kernel; None where native kernels cannot be compiled."""
    spec: ModelSpec = spec_of(config)
    spec = hold(spec, SCHEMES[scheme]) if scheme != "bf16" else spec
    try:
        made = plan_here(spec, local_cpu(), dtype, Wishes(experts=kernel))
    except MoesaicError:
        if kernel != "cpu_native":
            raise
        return None
    return layer_of(spec, made, torch.empty(0, dtype=getattr(torch, dtype)), 1)


def half(layer: MoELayer, rank: int) -> MoELayer:
    """The layer that one of two ranks has; without the shared expert, which is added once."""
    part, w = slice(rank * EXPERTS // 2, (rank + 1) * EXPERTS // 2), layer.experts.weights
    biases = None if w.biases is None else (w.biases[0][part], w.biases[1][part])
    layer.experts.weights = replace(w, w13=w.w13[part], w2=w.w2[part], biases=biases)
    layer.dispatchers, layer.shared = {"local": Half(rank)}, None
    return layer


def prefer(layer: MoELayer, experts: list[int]) -> None:
    """Makes the router choose among these alone: their rows of the gate are what they were, the others' are shifted."""
    gate = layer.route
    bias_E = gate.bias_E if gate.bias_E is not None else gate.logit_bias_E
    assert bias_E is not None
    bias_E.fill_(-1e4)
    bias_E[experts] = 0.0


PLAIN, QUANTIZED = ("cpu", "cpu_invariant", "cpu_native", "reference"), ("cpu_quant", "reference")
CELLS = pytest.mark.parametrize(
    ("scheme", "config", "kernel", "dtype"),
    [(scheme, config, kernel, dtype) for scheme, config in CASES
     for kernel in (PLAIN if scheme == "bf16" else QUANTIZED) for dtype in LIMIT],
    ids=lambda each: each["model_type"] if isinstance(each, dict) else str(each),
)  # fmt: skip


def rows(tokens: int, dtype: str) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, HIDDEN, generator=generator).to(getattr(torch, dtype))


@CELLS
def test_padding_rows_get_nothing_and_change_nothing(
    scheme: str, config: dict[str, Any], kernel: str, dtype: str
) -> None:
    """A row that is padding leaves with its shared expert's output alone, whatever stands in it; the others leave as
    they do without it."""
    layer, oracle = built(scheme, config, kernel, dtype), built(scheme, config, "reference", dtype)
    if layer is None or oracle is None:
        pytest.skip("there is no C++ compiler")
    for tokens in (1, 7, 33):
        x_TD, padding = rows(tokens, dtype), torch.arange(tokens) % 3 == 1
        x_TD[padding] *= 100.0
        for phase in PHASES:
            y_TD, expected_TD = (padded(each, padding)(x_TD, phase) for each in (layer, oracle))
            same(y_TD, expected_TD, LIMIT[dtype], SCHEMES[scheme].activation.name)
            alone = torch.zeros_like(x_TD) if layer.shared is None else layer.shared(x_TD, torch.zeros_like(x_TD))
            assert torch.equal(y_TD[padding], alone[padding])
            kept = padded(oracle, padding[~padding])(x_TD[~padding], phase)
            if kept.numel():
                same(y_TD[~padding], kept, LIMIT[dtype], SCHEMES[scheme].activation.name)


def padded(layer: MoELayer, padding_T: Tensor) -> MoELayer:
    """The same layer, whose router marks padding: id -1 for every choice of such a row."""
    twin, real = MoELayer.__new__(MoELayer), layer.route
    twin.__dict__.update(layer.__dict__)

    def route(x_TD: Tensor, ops: Ops, *_: object) -> Routing:
        routing = real(x_TD, ops)
        return Routing(routing.ids_TA.masked_fill(padding_T[:, None], -1), routing.weights_TA)

    twin.route = route  # type: ignore[assignment]
    return twin


@CELLS
def test_a_rank_without_tokens_adds_nothing(scheme: str, config: dict[str, Any], kernel: str, dtype: str) -> None:
    """All tokens choose experts of the first rank; the second gets rows of which none are its own. Then the other way
    round, then both; and a rank that has no rows of its own at all."""
    whole = built(scheme, config, "reference", dtype)
    ranks = [built(scheme, config, kernel, dtype) for _ in range(2)]
    if whole is None or ranks[0] is None or ranks[1] is None:
        pytest.skip("there is no C++ compiler")
    halves = [half(layer, rank) for rank, layer in enumerate(ranks) if layer is not None]
    whole.shared = None
    for chosen in ([0, 1, 2, 3], [4, 5, 6, 7], list(range(EXPERTS))):
        for layer in (whole, *halves):
            prefer(layer, chosen)
        for tokens in (0, 1, 7, 33):
            x_TD = rows(tokens, dtype)
            for phase in PHASES:
                each = [layer(x_TD, phase) for layer in halves]
                assert [(y.shape, y.dtype) for y in each] == [(x_TD.shape, x_TD.dtype)] * 2
                for rank, y_TD in enumerate(each):
                    if not set(chosen) & set(range(rank * 4, rank * 4 + 4)):
                        assert not y_TD.any(), "nothing, and no NaN"
                if tokens:
                    total = (each[0].float() + each[1].float()).to(x_TD.dtype)
                    limit = LIMIT[dtype] * (2 if dtype == "bfloat16" else 1)  # two roundings, of the two halves
                    same(total, whole(x_TD, phase), limit, SCHEMES[scheme].activation.name)
