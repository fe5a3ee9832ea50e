"""Needs and catalogues for planning tests: the real contracts, and mixtures that are written down here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moesaic.contracts.contract import Contract, Need
from moesaic.contracts.plan import MixtureNeed, MixturePath, Refusal, Wishes
from moesaic.contracts.scheme import SCHEMES
from moesaic.hardware import GPUS, Hardware, local_cpu
from moesaic.kernels.registry import catalogue
from moesaic.moe.dispatch import contracts
from moesaic.planning.mixture import find
from moesaic.planning.needs import WIRES

CATALOGUE: tuple[Contract, ...] = (*catalogue(), *contracts())
HYPOTHETICAL = Wishes(hypothetical=True)


def hardware(name: str) -> Hardware:
    return GPUS[name] if name in GPUS else local_cpu()


def need(scheme: str = "bf16", on: str = "h100", **changes: Any) -> MixtureNeed:
    """DeepSeek-V3's mixture in a scheme, on one rank; `changes` replace its fields."""
    machine, of = hardware(on), SCHEMES[scheme]
    base = Need(machine.device, "bfloat16", False, machine.features, machine.arch,
                format=of.weight.name, encoding=of.activation.name)  # fmt: skip
    made = MixtureNeed(
        need=base, static=of.activation.static, wires=WIRES[of.activation.name], scoring="sigmoid", factor=2.5,
        groups_kept=4, router_bias="float32", top_k=8, shared=True, hidden=7168, width=2048, ranks=1,
        phase="decode", tokens=64,
    )  # fmt: skip
    return replace(made, **changes)


def path_of(wanted: MixtureNeed, wishes: Wishes = HYPOTHETICAL) -> MixturePath:
    path, rejected = find(wanted, CATALOGUE, wishes)
    assert path is not None, rejected
    return path


def roles(path: MixturePath) -> list[str]:
    return [stage.role for stage in path.stages]


def refused(result: object) -> Refusal:
    assert isinstance(result, Refusal)
    return result
