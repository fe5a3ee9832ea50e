"""Choosing a backend for every op, once, when a model is built; and being able to say why.

The choice is a function of contracts (data) and a need. A user's explicit wish that cannot be honoured is an error that
names the reason and what works; it is never overridden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any, cast

from moesaic.contracts.contract import Choice, Contract, Need, Rejection
from moesaic.errors import OptionError
from moesaic.kernels.ops import OP_NAMES, Ops

BACKENDS = ("cpu", "cpu_invariant", "reference")
"""Every backend file of this folder. Order does not matter: contracts carry their rank."""


@dataclass(frozen=True)
class Selection:
    """The chosen ops and the reason for each choice."""

    ops: Ops
    choices: tuple[Choice, ...]

    def explain(self) -> str:
        return "\n".join(choice.explain() for choice in self.choices)


class Kernels:
    """The ops of one model: chosen once for what every layer has in common, and anew for what a layer asks beyond it.

    Ops chosen for the same asks are the same object, whichever layer asked.
    """

    def __init__(self, need: Need, wishes: Mapping[str, str] | None = None) -> None:
        """`wishes`: op -> the backend that the user demands. Raises OptionError as `select` does."""
        self.need, self.wishes = need, wishes
        self._selections: dict[Need, Selection] = {}
        self.ops = self.under()

    def under(self, **asks: Any) -> Ops:
        """The ops for a layer. asks: fields of `Need` from `format` on. Raises OptionError where none serves it."""
        need = replace(self.need, **asks)
        if need not in self._selections:
            self._selections[need] = select(need, self.wishes)
        return self._selections[need].ops

    def explain(self) -> str:
        """Every op with its reasons; where layers ask for more, only the ops that are chosen otherwise for them."""
        base = self._selections[self.need]
        lines = [base.explain()]
        usual = {choice.op: choice.chosen for choice in base.choices}
        for need, selection in self._selections.items():
            other = [choice for choice in selection.choices if choice.chosen != usual.get(choice.op)]
            if other:
                lines.append(f"with {need.format} weights and {need.encoding} rows:")
                lines += [choice.explain() for choice in other]
        return "\n".join(lines)


def select(need: Need, wishes: Mapping[str, str] | None = None) -> Selection:
    """The best backend of each op for this need. `wishes` maps an op to the backend that the user demands.

    Raises OptionError for a wish that names no backend or one that cannot serve the need.
    """
    modules = {name: import_module(f"moesaic.kernels.{name}") for name in BACKENDS}
    wishes = wishes or {}
    ops = [op for op in OP_NAMES if op != "linear_quant" or need.format != "bf16"]
    choices = [choose(op, candidates(op, modules), need, wishes.get(op)) for op in ops]
    chosen = {choice.op: getattr(modules[choice.chosen], choice.op) for choice in choices}
    return Selection(cast(Ops, SimpleNamespace(**chosen)), tuple(choices))


def candidates(op: str, modules: Mapping[str, ModuleType]) -> list[Contract]:
    """The contracts of an op, best rank first."""
    every = (contract for module in modules.values() for contract in module.CONTRACTS if contract.op == op)
    return sorted(every, key=lambda contract: contract.rank)


def choose(op: str, contracts: list[Contract], need: Need, wish: str | None) -> Choice:
    """The first contract without a miss, or the wished-for one; every other with its reason."""
    misses = {contract.backend: contract.misses(need) for contract in contracts}
    able = [name for name, miss in misses.items() if miss is None]
    if wish is not None and wish not in able:
        reason = misses.get(wish) or f"there is no such backend for {op!r}"
        remedy = f"Works here: {', '.join(able)}."
        raise OptionError(f"{wish!r} cannot be used: {reason}", where=f"--{op}", remedy=remedy)
    if not able:
        raise OptionError(f"no kernel for {op!r}: {misses}", where=f"{need.device}/{need.dtype}")
    chosen = wish or able[0]
    rejected = tuple(
        Rejection(name, miss or ("another was asked for" if wish else f"{chosen} is preferred"))
        for name, miss in misses.items()
        if name != chosen
    )
    return Choice(op, chosen, rejected)
