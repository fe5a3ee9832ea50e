"""Dispatchers: one file each. A dispatcher sends rows to the ranks that hold their experts and brings results back."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from moesaic.moe.values import Dispatched, Routing


class Dispatcher(Protocol):
    """`combine` consumes exactly what `dispatch` returned."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        """Rows for this rank's experts, with local expert ids."""
        ...

    def combine(self, y_TD: Tensor, sent: Dispatched) -> Tensor:
        """The experts' output -> one row per token of this rank, [T, D]."""
        ...
