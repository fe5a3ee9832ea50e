"""Dispatchers: one file each. A dispatcher sends rows to the ranks that hold their experts and brings results back."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
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
    return tuple(module.CONTRACT for module in modules())


def dispatchers() -> Mapping[str, Dispatcher]:
    """One of each, by the name that its contract has and plans call it."""
    return {module.CONTRACT.backend: module.make() for module in modules()}


def modules() -> list[ModuleType]:
    files = sorted(Path(__file__).parent.glob("[a-z]*.py"))
    return [import_module(f"moesaic.moe.dispatch.{file.stem}") for file in files]
