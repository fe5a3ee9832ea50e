"""The mixture layer: route -> dispatch -> experts -> combine, plus the shared expert. T tokens, D hidden size."""

from __future__ import annotations

from torch import Tensor

from moesaic.contracts.plan import Phase
from moesaic.contracts.spec import MLPSpec, MoESpec
from moesaic.kernels.registry import Kernels
from moesaic.layers.linear import Linear, Sources
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

    def __call__(self, x_TD: Tensor, onto_TD: Tensor | None = None) -> Tensor:
        """The feed-forward of x, added to `onto` where that is given."""
        if self.fused:
            return self.ops.mlp(x_TD, self.gate_up.weight_ND, self.down.weight_ND, self.activation, onto_TD)
        y_TD = self.down(self.ops.activate(self.gate_up(x_TD), self.activation))
        return y_TD if onto_TD is None else onto_TD + y_TD

    def sources(self) -> Sources:
        yield from self.gate_up.sources()
        yield from self.down.sources()


class MoELayer:
    """`layer`: its index in the plan.  `place`: among the model's mixture layers, for the load meter."""

    def __init__(self, spec: MoESpec, layer: int, place: int, kernels: Kernels, dispatcher: Dispatcher,
                 meter: LoadMeter, like: Tensor) -> None:  # fmt: skip
        self.place, self.dispatcher, self.meter = place, dispatcher, meter
        self.route = Router(spec.router, spec.gate.inputs, kernels.ops, like)
        self.experts = Experts(spec, layer, kernels, like)
        self.shared = MLP(spec.shared, kernels, like) if spec.shared else None

    def __call__(self, x_TD: Tensor, phase: Phase) -> Tensor:
        routing = self.route(x_TD)
        self.meter.count(self.place, routing.ids_TA)
        sent = self.dispatcher.dispatch(x_TD, routing)
        y = self.experts(sent, phase)
        y_TD = self.dispatcher.combine(y, sent)
        return y_TD if self.shared is None else self.shared(x_TD, y_TD)

    def sources(self) -> Sources:
        yield from self.route.sources()
        yield from self.experts.sources()
        if self.shared:
            yield from self.shared.sources()
