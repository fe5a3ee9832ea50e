"""Whether one contract, by itself, can serve a mixture layer: the reasons that need no chain."""

from __future__ import annotations

from moesaic.contracts.contract import Contract, listed
from moesaic.contracts.plan import MixtureNeed, Wishes

UNBUILT = "is known, but not built into Moesaic yet"


def misses(contract: Contract, need: MixtureNeed, wishes: Wishes) -> str | None:
    """The first reason against it, or None. wishes: those of the need's phase."""
    wish = {"experts": wishes.experts, "dispatch": wishes.dispatch}.get(contract.op)
    if wish not in (None, contract.backend):
        return f"{wish} was asked for"
    unbuilt = None if contract.built or wishes.hypothetical else UNBUILT
    return contract.misses(need.need) or misses_sizes(contract, need) or misses_routing(contract, need) or unbuilt


def misses_sizes(contract: Contract, need: MixtureNeed) -> str | None:
    limits = contract.limits
    if need.hidden % limits.hidden_multiple:
        return f"needs a hidden size that is a multiple of {limits.hidden_multiple}, not {need.hidden}"
    if limits.hidden_in and need.hidden not in limits.hidden_in:
        return f"was compiled for hidden sizes {', '.join(map(str, sorted(limits.hidden_in)))}, not {need.hidden}"
    if contract.op == "experts" and need.width % limits.width_multiple:
        return f"needs an expert width that is a multiple of {limits.width_multiple}, not {need.width}"
    for most, of, what in ((limits.max_top_k, need.top_k, "experts per token"),
                           (limits.max_tokens, need.tokens, "tokens per rank"),
                           (limits.max_experts, need.experts, "experts per rank")):  # fmt: skip
        if most is not None and of > most:
            return f"takes at most {most} {what}, not {of}"
    if contract.op == "dispatch" and need.ranks < limits.min_ranks:
        return f"needs {limits.min_ranks} ranks or more, not {need.ranks}"
    if limits.max_ranks is not None and need.ranks > limits.max_ranks:
        return f"works on {limits.max_ranks} rank{'s' * (limits.max_ranks > 1)}, not {need.ranks}"
    return None


def misses_routing(contract: Contract, need: MixtureNeed) -> str | None:
    """Only of those that choose experts."""
    if not (contract.op == "route" or contract.path.routes):
        return None
    if need.scoring not in contract.scorings:
        return f"scores by {listed(contract.scorings)}, not by {need.scoring}"
    if need.groups_kept and not contract.groups:
        return "knows no groups of experts"
    if need.groups_kept and need.group_score not in contract.group_scores:
        return f"ranks groups by {listed(contract.group_scores)}, not by {need.group_score}"
    if need.renormalize not in contract.renormalizes:
        return f"{'never' if need.renormalize else 'always'} divides the weights by their sum"
    kept = contract.limits.max_groups_kept
    return f"keeps at most {kept} groups, not {need.groups_kept}" if kept and need.groups_kept > kept else None
