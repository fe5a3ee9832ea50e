"""All experts are here: nothing moves, global ids are local ids."""

from __future__ import annotations

from torch import Tensor

from moesaic.contracts.contract import FLOATS16, Contract, Limits, Path
from moesaic.formats.encodings import Rows
from moesaic.moe.values import Dispatched, Routing

CONTRACT = Contract("dispatch", "local", frozenset({"cpu", "cuda", "hip"}), FLOATS16, batch_invariant=True, rank=0,
                    encodings=frozenset({"bf16"}), path=Path(ids="global"), limits=Limits(max_ranks=1))  # fmt: skip


class LocalDispatcher:
    """Layout `tokens` on both sides. The experts already weighted and reduced, so combining is the identity."""

    def dispatch(self, x_TD: Tensor, routing: Routing, rows: Rows | None = None) -> Dispatched:
        return Dispatched(x_TD, routing.ids_TA, routing.weights_TA, rows)

    def combine(self, y_TD: Tensor, sent: Dispatched) -> Tensor:
        return y_TD


def make() -> LocalDispatcher:
    return LocalDispatcher()
