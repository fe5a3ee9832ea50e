"""Where a block may be cut: heads whole, experts shared out equally, projections between blocks of their format.

Tensor parallelism cuts the outputs of first projections (q, k, v and gate and up each by itself) and the inputs of last
ones, and with it the scales of their blocks; scales of a whole tensor stay with every part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from moesaic.contracts.plan import Wishes
from moesaic.contracts.scheme import WeightFormat
from moesaic.contracts.spec import GQASpec, LayerSpec, MoESpec
from moesaic.formats.sizes import illegal_cut
from moesaic.planning.needs import experts_scheme, stacks_of


def illegal(block: LayerSpec, wishes: Wishes) -> tuple[str, str, str | None] | None:
    """(what, where, the nearest numbers of ranks that are legal) of a block that cannot be cut so; None if it can."""
    if (found := problem(block, wishes)) is None:
        return None
    ways = [replace(wishes, tp=n) for n in range(wishes.tp - 1, 0, -1)] if wishes.tp > 1 else []
    ways += [replace(wishes, ep=n) for n in range(wishes.ep - 1, 0, -1)] if wishes.ep > 1 else []
    near = next((each for each in ways if problem(block, each) is None), None)
    if near is None:
        return (*found, None)
    return (*found, f"--tp {near.tp}" if near.tp != wishes.tp else f"--ep {near.ep}")


def problem(block: LayerSpec, wishes: Wishes) -> tuple[str, str] | None:
    """(what, where), or None."""
    tp, ep, here = wishes.tp, wishes.ep, f"layer {block.index}"
    if ep > 1 and ep % tp:
        return f"the {tp} ranks that cut projections must divide the {ep} that share experts", "--ep"
    if isinstance(block.mlp, MoESpec) and block.mlp.router.experts % ep:
        return f"{block.mlp.router.experts} experts cannot be shared by {ep} ranks", here
    at = block.attention
    keys = at.kv_heads if isinstance(at, GQASpec) else tp  # where ranks are more, several hold the same ones
    if at.heads % tp or max(keys, tp) % min(keys, tp):
        return f"--tp {tp}: {at.heads} query heads and {keys} of keys cannot be shared by {tp} ranks", here
    for name, form, size, axis, ways in sides(block, wishes):
        if ways > 1 and (reason := illegal_cut(form, size, ways, axis)):
            return f"--tp {tp}: {reason}", name
    return None


def sides(block: LayerSpec, wishes: Wishes) -> Iterator[tuple[str, WeightFormat, int, int, int]]:
    """(name, format, elements, axis, ways) of each side that is cut: axis 0 outputs, 1 inputs."""
    at, mlp, tp = block.attention, block.mlp, wishes.tp
    if isinstance(mlp, MoESpec) and wishes.ep == 1:  # expert parallelism keeps experts whole
        form = experts_scheme(mlp).weight
        for part, size, axis in ((mlp.gate, mlp.gate.outputs, 0), (mlp.up, mlp.up.outputs, 0),
                                 (mlp.down, mlp.down.inputs, 1)):  # fmt: skip
            yield part.name, form, size, axis, tp
    for role, parts in stacks_of(block):
        for part in parts if role != "down" else ():
            last = role in ("o", "mlp_down")
            few = isinstance(at, GQASpec) and part in (at.k, at.v)
            ways = min(tp, at.kv_heads) if few and isinstance(at, GQASpec) else tp
            yield part.name, part.runs.weight, part.inputs if last else part.outputs, int(last), ways
