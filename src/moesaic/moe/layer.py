"""The mixture layer: route -> dispatch -> experts -> combine, plus the shared expert. T tokens, D hidden size."""

from __future__ import annotations

from torch import Tensor

from moesaic.contracts.spec import MLPSpec, MoESpec
from moesaic.kernels.ops import Ops
from moesaic.layers.linear import Linear, Sources
from moesaic.moe.balance import LoadMeter
from moesaic.moe.dispatch import Dispatcher
from moesaic.moe.experts import Experts
from moesaic.moe.route import Router


class MLP:
    """A dense gated feed-forward; also the shared expert."""

    def __init__(self, spec: MLPSpec, ops: Ops, like: Tensor) -> None:
        self.ops = ops
        self.gate_up = Linear((spec.gate, spec.up), ops, like)
        self.down = Linear((spec.down,), ops, like)

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self.down(self.ops.silu_mul(self.gate_up(x_TD)))

    def sources(self) -> Sources:
        yield from self.gate_up.sources()
        yield from self.down.sources()


class MoELayer:
    """`place`: index among the model's mixture layers, for the load meter."""

    def __init__(self, spec: MoESpec, place: int, ops: Ops, dispatcher: Dispatcher, meter: LoadMeter,
                 like: Tensor) -> None:  # fmt: skip
        self.place, self.dispatcher, self.meter = place, dispatcher, meter
        self.route = Router(spec.router, spec.gate.inputs, ops, like)
        self.experts = Experts(spec, ops, like)
        self.shared = MLP(spec.shared, ops, like) if spec.shared else None

    def __call__(self, x_TD: Tensor) -> Tensor:
        routing = self.route(x_TD)
        self.meter.count(self.place, routing.ids_TA)
        sent = self.dispatcher.dispatch(x_TD, routing)
        y = self.experts(sent)
        y_TD = self.dispatcher.combine(y, sent)
        return y_TD if self.shared is None else y_TD + self.shared(x_TD)

    def sources(self) -> Sources:
        yield from self.route.sources()
        yield from self.experts.sources()
        if self.shared:
            yield from self.shared.sources()
