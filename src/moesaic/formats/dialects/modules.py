"""The projections of a model spec, for dialects that give each its scheme; and the names of everything else in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

from moesaic.contracts.spec import LinearSpec, MLASpec, ModelSpec, MoESpec

Change = Callable[[LinearSpec, int], LinearSpec]
"""(projection, experts) -> what to put in its place. experts: how many its name stands for by `{e}`; 0 where none."""

_ROUTED = ("gate", "up", "down")


def change_linears(node: Any, change: Change) -> Any:
    """The same spec (or any part of one) with every projection passed through `change`."""
    return _rebuilt(node, change, 0)


def _rebuilt(node: Any, change: Change, experts: int) -> Any:
    if isinstance(node, LinearSpec):
        return change(node, experts)
    if isinstance(node, tuple):
        new = tuple(_rebuilt(each, change, 0) for each in node)
        return new if any(a is not b for a, b in zip(new, node, strict=True)) else node
    if not is_dataclass(node) or isinstance(node, type):
        return node
    counts = dict.fromkeys(_ROUTED, node.router.experts) if isinstance(node, MoESpec) else {}
    changed = {}
    for each in fields(node):
        old = getattr(node, each.name)
        new = _rebuilt(old, change, counts.get(each.name, 0))
        if new is not old:
            changed[each.name] = new
    return replace(node, **changed) if changed else node


def linears(node: Any) -> Iterator[tuple[LinearSpec, int]]:
    """(projection, experts) of a spec or any part of one."""
    found: list[tuple[LinearSpec, int]] = []

    def note(part: LinearSpec, experts: int) -> LinearSpec:
        found.append((part, experts))
        return part

    change_linears(node, note)
    return iter(found)


def names_of(part: LinearSpec, experts: int) -> list[str]:
    return [part.name.format(e=e) for e in range(experts)] if experts else [part.name]


def kv_b_parts(spec: ModelSpec) -> list[LinearSpec]:
    """The projections that multi-head latent attention contracts along either axis (see `layers/mla.py`)."""
    blocks = [*spec.layers, *(draft.block for draft in spec.drafts)]
    return [block.attention.kv_b for block in blocks if isinstance(block.attention, MLASpec)]


def other_names(node: Any) -> Iterator[str]:
    """Names of modules and tensors that are no projection: norms, embedding, head, routers. May hold other strings."""
    if isinstance(node, str):
        yield node.removesuffix(".weight")
    elif isinstance(node, tuple):
        for each in node:
            yield from other_names(each)
    elif is_dataclass(node) and not isinstance(node, type | LinearSpec):
        for field in fields(node):
            yield from other_names(getattr(node, field.name))


def plain_modules(spec: ModelSpec) -> list[str]:
    """Modules with weights that run unquantised: the embedding, the head, the routers."""
    blocks = [*spec.layers, *(draft.block for draft in spec.drafts)]
    routers = [block.mlp.router.weight.removesuffix(".weight") for block in blocks if isinstance(block.mlp, MoESpec)]
    return [spec.embed, *([] if spec.tied else [spec.head]), *routers]
