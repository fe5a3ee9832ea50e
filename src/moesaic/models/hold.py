"""Which projections are held in another scheme than their checkpoint stores: at load, or in a file that is written.

Quantised are the projections of decoder layers (attention, feed-forward, shared and routed experts), those of draft
layers included. Never: `kv_b_proj` (the two attention paths contract it along different axes), the embedding, the head,
norms, routers, and the projection that joins a draft layer's two inputs. What stays out, and was stored quantised, is
decoded: a model then has one scheme and no second one by accident.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from moesaic.contracts.scheme import SCHEMES, UNQUANTIZED, Scheme
from moesaic.contracts.spec import LayerSpec, LinearSpec, MLASpec, ModelSpec, MoESpec
from moesaic.errors import OptionError, UnsupportedError
from moesaic.formats.base import QuantTensor, check_columns, format_of
from moesaic.formats.checkpoint import part_scheme, storable
from moesaic.formats.dialects.modules import change_linears, names_of, plain_modules

AS_STORED = "none"
_NAMED = 3  # how many modules a note lists


def scheme_named(name: str, option: str) -> Scheme:
    """Raises OptionError, listing the schemes, for a name that is none of them. option: where the name came from."""
    if name not in SCHEMES:
        raise OptionError(f"unknown scheme {name!r:.40}", where=option, remedy=f"Known: {', '.join(SCHEMES)}.")
    return SCHEMES[name]


def dynamic(scheme: Scheme) -> Scheme:
    """The same format and encoding, with scales that activations find for themselves."""
    if not scheme.activation.static:
        return scheme
    encoding = replace(scheme.activation, static=False)
    return next(each for each in SCHEMES.values() if (each.weight, each.activation) == (scheme.weight, encoding))


def hold_online(spec: ModelSpec, name: str | None) -> ModelSpec:
    """`--quantization NAME` at load; None and "none": as stored. Raises OptionError for an unknown name."""
    if name in (None, AS_STORED):
        return spec
    wanted = scheme_named(str(name), "--quantization")
    scheme = dynamic(wanted)
    if scheme == wanted:
        return hold(spec, scheme)
    note = (f"{wanted.name} needs scales of activations that nothing has measured at load: runs as {scheme.name} "
            f"(`moesaic quantize --calibrate` measures them)")  # fmt: skip
    return hold(replace(spec, notes=(*spec.notes, note)), scheme)


def as_stored(held: ModelSpec) -> ModelSpec:
    """The spec of a checkpoint that stores what `hold` holds."""
    written: ModelSpec = change_linears(held, lambda part, _: replace(part, scheme=part.runs, held=None))
    return written


def hold(spec: ModelSpec, scheme: Scheme, keep: Sequence[str] = (), experts_only: bool = False) -> ModelSpec:
    """The spec with `held` set on every projection, and notes on what was kept against the rule.

    scheme: of the model; what it means for one projection is for `part_scheme` to say.
    keep: patterns (fnmatch) of module names that stay unquantised. Gate, up and down of a layer's experts are one
    weight in memory: where one of them stays, all three do. Raises OptionError for a pattern that matches nothing, or
    some experts of a layer only, and for experts_only where there is no expert.
    """
    chooser = _Chooser(scheme, tuple(_Pattern(each) for each in keep), experts_only)
    for name in plain_modules(spec):  # to say of them that they stay is right, if needless
        chooser.asked(name)
    layers = tuple(chooser.layer(block) for block in spec.layers)
    drafts = tuple(
        replace(draft, block=chooser.layer(draft.block), join=chooser.never(draft.join)) for draft in spec.drafts
    )
    chooser.check()
    return replace(spec, layers=layers, drafts=drafts, notes=(*spec.notes, *chooser.notes()))


def decoded(part: LinearSpec) -> LinearSpec:
    """Held unquantised."""
    return replace(part, held=UNQUANTIZED if part.scheme.quantized else None)


def quantized(wide_NK: Tensor, scheme: Scheme) -> QuantTensor:
    """A projection as it is held in a scheme, whether it was quantised at load or read back from a file of ours."""
    return storable(scheme, QuantTensor.of(wide_NK, scheme.weight))


class _Pattern:
    def __init__(self, text: str) -> None:
        self.text, self.used = text, False
        self.compiled = re.compile(fnmatch.translate(text))

    def matches(self, name: str) -> bool:
        found = self.compiled.match(name) is not None
        self.used |= found
        return found


def divides(scheme: Scheme, part: LinearSpec) -> bool:
    """Whether the format's blocks divide the width."""
    form = scheme.weight
    try:
        check_columns(form, format_of(form).fields(form), part.inputs)
    except UnsupportedError:
        return False
    return True


@dataclass
class _Chooser:
    """Decides about one projection after another. indivisible: those left out since their width is no multiple of the
    format's blocks.  again: formats of those that were quantised before.  taken: how many are quantised."""

    scheme: Scheme
    patterns: tuple[_Pattern, ...]
    experts_only: bool
    indivisible: list[str] = field(default_factory=list)
    again: list[str] = field(default_factory=list)
    taken: int = 0
    met_experts: bool = False

    def layer(self, block: LayerSpec) -> LayerSpec:
        attention, mlp = block.attention, block.mlp
        kv_b = attention.kv_b if isinstance(attention, MLASpec) else None
        attention = change_linears(attention, lambda part, _: self.never(part) if part == kv_b else self.dense(part))
        if isinstance(mlp, MoESpec):
            return replace(block, attention=attention, mlp=self.mixture(mlp))
        return replace(block, attention=attention, mlp=change_linears(mlp, lambda part, _: self.dense(part)))

    def mixture(self, spec: MoESpec) -> MoESpec:
        self.met_experts = True
        routed = (spec.gate, spec.up, spec.down)
        asked = [self.asked_experts(part, spec.router.experts) for part in routed]  # a list: every pattern sees all
        scheme = part_scheme(self.scheme, expert=True)
        narrow = [part.name for part in routed if not divides(scheme, part)]
        self.indivisible += [] if any(asked) else narrow
        stay = any(asked) or bool(narrow)
        shared = change_linears(spec.shared, lambda part, _: self.dense(part))
        gate, up, down = (decoded(part) if stay else self.take(part, scheme) for part in routed)
        return replace(spec, gate=gate, up=up, down=down, shared=shared)

    def never(self, part: LinearSpec) -> LinearSpec:
        self.asked(part.name)
        return decoded(part)

    def dense(self, part: LinearSpec) -> LinearSpec:
        if self.asked(part.name) or self.experts_only:
            return decoded(part)
        scheme = part_scheme(self.scheme, expert=False)
        if divides(scheme, part):
            return self.take(part, scheme)
        self.indivisible.append(part.name)
        return decoded(part)

    def asked(self, name: str) -> bool:
        """Whether a pattern says that it stays."""
        return any([pattern.matches(name) for pattern in self.patterns])  # a list: every pattern sees every name

    def asked_experts(self, part: LinearSpec, count: int) -> bool:
        found = False
        for pattern in self.patterns:
            matched = sum(pattern.matches(name) for name in names_of(part, count))
            if 0 < matched < count:
                raise OptionError(
                    f"{pattern.text!r:.80} matches {matched} of the {count} experts of {part.name}, "
                    f"and the experts of a layer are held in one scheme",
                    where="--keep", remedy=f"Name all of them, for example {part.name.format(e='*')!r}, or none.",
                )  # fmt: skip
            found |= matched > 0
        return found

    def take(self, part: LinearSpec, scheme: Scheme) -> LinearSpec:
        self.taken += 1
        if part.scheme == scheme:
            return replace(part, held=None)
        if part.scheme.quantized and scheme.quantized and part.scheme.weight != scheme.weight:
            self.again.append(str(part.scheme.weight))
        return replace(part, held=scheme)

    def check(self) -> None:
        for pattern in self.patterns:
            if not pattern.used:
                raise OptionError(
                    f"{pattern.text!r:.80} matches no module", where="--keep",
                    remedy="Names are those of the checkpoint without '.weight', such as 'model.layers.0.*'.",
                )  # fmt: skip
        if self.experts_only and not self.met_experts:
            raise OptionError("the model has no experts", where="--experts-only", remedy="Leave it out.")
        if not self.taken:
            raise UnsupportedError(
                f"{self.scheme.name} leaves nothing to quantise in this model",
                remedy="; ".join(self.notes()) or "Keep less.",
            )  # fmt: skip

    def notes(self) -> tuple[str, ...]:
        found = []
        if self.indivisible:
            listed, more = ", ".join(self.indivisible[:_NAMED]), len(self.indivisible) - _NAMED
            found.append(
                f"kept unquantised, since blocks of {self.scheme.weight} do not divide their width: {listed}"
                + (f" and {more} more" if more > 0 else "")
                + (" (an expert's projections stay together)" if "{e}" in "".join(self.indivisible) else "")
            )
        if self.again:
            stored = ", ".join(dict.fromkeys(self.again))
            found.append(f"stored as {stored} and quantised anew as {self.scheme.weight}: both errors add up")
        return tuple(found)
