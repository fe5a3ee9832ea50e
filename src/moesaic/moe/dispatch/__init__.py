"""Dispatchers: one file each. A dispatcher sends rows to the ranks that hold their experts and brings results back."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Protocol

from torch import Tensor

from moesaic.contracts.contract import Contract
from moesaic.formats.encodings import Rows
from moesaic.moe.values import Dispatched, Routing


class Dispatcher(Protocol):
    """`combine` consumes exactly what `dispatch` returned."""

    def dispatch(self, x_TD: Tensor, routing: Routing, rows: Rows | None = None) -> Dispatched:
        """Rows for this rank's experts, with local expert ids. rows: x encoded, which nobody has to use."""
        ...

    def combine(self, y_TD: Tensor, sent: Dispatched) -> Tensor:
        """The experts' output -> one row per token of this rank, [T, D]."""
        ...


def contracts() -> tuple[Contract, ...]:
    """Of every dispatcher file of this folder."""
    files = sorted(Path(__file__).parent.glob("[a-z]*.py"))
    return tuple(import_module(f"moesaic.moe.dispatch.{file.stem}").CONTRACT for file in files)
