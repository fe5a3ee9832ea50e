"""The mixture layer: route -> dispatch -> experts -> combine, plus the shared expert. T tokens, D hidden size."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from moesaic.contracts.contract import Packed, asks_of
from moesaic.contracts.plan import HELD, RUNS, MixturePath, Phase
from moesaic.contracts.spec import MLPSpec, MoESpec
from moesaic.errors import UnsupportedError
from moesaic.formats.encodings import Rows
from moesaic.kernels.ops import ExpertTerms
from moesaic.kernels.registry import BoundCell, Kernels
from moesaic.layers.linear import Linear, Sources, Taken
from moesaic.moe.balance import LoadMeter
from moesaic.moe.dispatch import Dispatcher
from moesaic.moe.experts import Experts
from moesaic.moe.route import Router


class MLP:
    """A dense gated feed-forward; also the shared expert."""

    def __init__(self, spec: MLPSpec, kernels: Kernels, like: Tensor) -> None:
        self.activation, self.ops = spec.activation, kernels.under(activation=spec.activation.kind)
        self.gate_up = Linear((spec.gate, spec.up), kernels, like)
        self.down = Linear((spec.down,), kernels, like)
        self.fused = hasattr(self.ops, "mlp") and self.gate_up.bare and self.down.bare

    @property
    def takes(self) -> Taken | None:
        return self.gate_up.takes

    def __call__(self, x_TD: Tensor, onto_TD: Tensor | None = None, rows: Rows | None = None) -> Tensor:
        """The feed-forward of x, added to `onto` where that is given. rows: x encoded."""
        if self.fused:
            return self.ops.mlp(x_TD, self.gate_up.weight_ND, self.down.weight_ND, self.activation, onto_TD)
        y_TD = self.down(self.ops.activate(self.gate_up(x_TD, rows), self.activation))
        return y_TD if onto_TD is None else onto_TD + y_TD

    def sources(self) -> Sources:
        yield from self.gate_up.sources()
        yield from self.down.sources()


class MoELayer:
    """`layer`: its index in the plan.  `place`: among the model's mixture layers, for the load meter.

    dispatchers: by the names that plans call them.
    """

    def __init__(self, spec: MoESpec, layer: int, place: int, kernels: Kernels, dispatchers: Mapping[str, Dispatcher],
                 meter: LoadMeter, like: Tensor) -> None:  # fmt: skip
        self.place, self.dispatchers, self.meter, of = place, dispatchers, meter, kernels.layer(layer)
        assert of.experts is not None
        asks = asks_of(of.experts) | {"activation": spec.activation.kind, "expert_bias": spec.gate.bias}
        self.cells = kernels.mixture(layer, **asks)
        for cell in self.cells:
            check_runs(cell.path, spec.shared is not None, of.packed, dispatchers)
        self.route = Router(spec.router, spec.gate.inputs, getattr(torch, of.router_dtype), like)
        self.experts = Experts(spec, of.experts, like, self.cells[0].packer)
        self.shared = MLP(spec.shared, kernels, like) if spec.shared else None
        self.sums = hasattr(kernels.ops, "add_norm_encode")

    @property
    def takes(self) -> Taken | None:
        return self.experts.takes

    def __call__(
        self, x_TD: Tensor, phase: Phase, live_T: Tensor | None = None, rows: Rows | None = None
    ) -> Tensor | ExpertTerms:
        """[T, D], or terms of that where norms add them up. live_T: 0 for rows that are padding.  rows: x encoded."""
        cell = self.cell(phase, len(x_TD))
        dispatcher = self.dispatchers[cell.path.stage("dispatch").kernel]
        routing = self.route(x_TD, cell.ops, live_T, self.meter.counters(self.place))
        sent = dispatcher.dispatch(x_TD, routing, rows)
        if self.leaves(cell):
            terms = self.experts.terms(sent, cell.ops)
            onto_TD = None if self.shared is None else self.shared(x_TD, rows=rows)
            return ExpertTerms(terms.y_RD, terms.ids_TA, terms.weights_TA, onto_TD)
        y = self.experts(sent, cell.ops)
        y_TD = dispatcher.combine(y, sent)
        return y_TD if self.shared is None else self.shared(x_TD, y_TD, rows)

    def leaves(self, cell: BoundCell) -> bool:
        """Whether the sum over a token's experts is left to the norm behind this layer: in decoding, where a launch is
        felt, and where nothing stands between the two, as another rank would."""
        local = cell.path.stage("dispatch").kernel == "local"
        return self.sums and local and cell.phase == "decode" and hasattr(cell.ops, "experts_terms")

    def cell(self, phase: Phase, tokens: int) -> BoundCell:
        """Of the phase's cells the first that is large enough; the last is planned for any number."""
        fitting = [cell for cell in self.cells if cell.phase == phase]
        return next((cell for cell in fitting if tokens <= cell.tokens), fitting[-1])

    def sources(self) -> Sources:
        yield from self.route.sources()
        yield from self.experts.sources()
        if self.shared:
            yield from self.shared.sources()


def check_runs(path: MixturePath, shared: bool, packed: Collection[Packed], dispatchers: Collection[str]) -> None:
    """Raises UnsupportedError unless `MoELayer` runs exactly this path: a plan is followed, or not at all."""
    roles = tuple(stage.role for stage in path.stages)
    encoded = ("encode",) * ("encode" in roles)
    runs = (*RUNS[:3], *encoded, *RUNS[4:6], *RUNS[6:] * shared)
    dispatcher, duties = path.stage("dispatch").kernel, path.stage("experts").does
    problem = None
    if roles != runs or not duties <= {"weights", "reduce"}:
        problem = f"the path {' -> '.join(map(str, path.stages))}"
    elif dispatcher not in dispatchers:
        problem = f"the dispatcher {dispatcher}"
    elif len(packed) > 1 or any(each.gate_up != HELD for each in packed):
        problem = f"expert weights packed as {' and '.join(map(str, packed))}"
    if problem:
        remedy = "Plan without hypothetical."
        raise UnsupportedError(f"{problem} is known, but not built into Moesaic yet", remedy=remedy)
