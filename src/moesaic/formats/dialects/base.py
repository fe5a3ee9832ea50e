"""What every dialect of `quantization_config` does: give each projection of a spec its scheme, and find its tensors.

A dialect file adds how its config is read, which scheme a projection has, and which tensors store it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch

from moesaic.contracts.scheme import SCHEMES, UNQUANTIZED, Encoding, Scheme, WeightFormat
from moesaic.contracts.spec import LinearSpec, ModelSpec, MoESpec
from moesaic.errors import CheckpointError, UnsupportedError
from moesaic.formats.dialects.exclusions import Entries, Found
from moesaic.formats.dialects.modules import change_linears, kv_b_parts, names_of, other_names, plain_modules
from moesaic.formats.dialects.source import FLOATS, FusedSource, Source

Stored = Mapping[str, torch.dtype]
"""The tensors of a checkpoint by name, with their dtypes."""

_NAMED = 5  # how many entries a note lists


class Settled(NamedTuple):
    """What is known once the checkpoint's headers are, too."""

    dialect: Dialect
    spec: ModelSpec
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Dialect:
    """A quantization_config, read.

    method: as the config calls it.  excluded: what it leaves unquantised.  targets: what it quantises, where it lists
    that.  remarks: what the user should know of the config itself.
    """

    method: str
    excluded: Entries = field(default_factory=Entries)
    remarks: tuple[str, ...] = ()
    targets: Entries = field(default_factory=Entries)

    ignore: ClassVar[tuple[str, ...]] = (r".*\.(k|v|q|kv|prob_output|output)_(scale|zero_point)",)
    """Regular expressions of checkpoint tensors that stand for nothing here: scales of a quantised KV cache."""

    def scheme(self, part: LinearSpec, expert: bool, found: Found) -> Scheme:
        """Of a projection that is not excluded.  found: the targets that it matches."""
        raise NotImplementedError

    def quantized_sources(self, part: LinearSpec, name: str) -> tuple[Source, ...]:
        """`sources` of a quantised projection."""
        raise NotImplementedError

    def expert_sources(self, layer: MoESpec) -> tuple[FusedSource, ...] | None:
        """The tensors that hold all experts of a layer, or None where each has its own, named by `sources`."""
        return None

    def sources(self, part: LinearSpec, name: str) -> tuple[Source, ...]:
        """The tensors of a projection except its bias.  part: with its scheme.  name: with the expert's number."""
        if part.scheme.quantized:
            return self.quantized_sources(part, name)
        return (Source(f"{name}.weight", "data", (part.outputs, part.inputs), FLOATS),)

    def apply(self, spec: ModelSpec) -> tuple[ModelSpec, tuple[str, ...]]:
        """The spec with a scheme on each projection, and notes for the user.

        Raises UnsupportedError where experts of one layer have different schemes, or the head is quantised.
        """
        chooser = _Chooser(self)
        new: ModelSpec = change_linears(spec, chooser.choose)
        for name in other_names(spec):
            chooser.meet(self.excluded.find(name), ())
        self._refuse_head(spec)
        return new, (*self.remarks, *chooser.notes(), *_kv_b_notes(new))

    def settle(self, spec: ModelSpec, stored: Stored) -> Settled:
        """Follows the checkpoint in what its config leaves open; `spec` has been through `apply`.

        Draft layers that are stored plain stay so, and int4 scales have the dtype in which they are stored.
        Raises UnsupportedError for a quantised embedding, head or router.
        """
        for name in plain_modules(spec):
            _refuse_quantized(name, stored)
        drafts, notes = [], []
        for draft in spec.drafts:
            new = change_linears(draft, lambda part, experts: _plain_where_stored(part, experts, stored))
            drafts.append(new)
            if new is not draft:
                notes.append(f"draft {draft.join.name.rpartition('.')[0]}: stored unquantised in part or whole, though "
                             f"quantization_config does not say so; kept as stored")  # fmt: skip
        spec = replace(spec, drafts=tuple(drafts))
        spec = change_linears(spec, lambda part, experts: self._with_scale_dtype(part, experts, stored))
        return Settled(self, spec, tuple(notes))

    def _with_scale_dtype(self, part: LinearSpec, experts: int, stored: Stored) -> LinearSpec:
        if part.scheme.weight.name != "int4":
            return part
        names = names_of(part, experts)
        scale = next(s.name for s in self.sources(part, names[0]) if s.field == "scale").removeprefix(names[0])
        dtypes = {stored[name + scale]: name for name in names if stored.get(name + scale) in FLOATS}
        if len(dtypes) > 1:
            (one, a), (other, b) = list(dtypes.items())[:2]
            raise CheckpointError(
                f"its scales are {one}, those of {b} {other}", where=a + scale, remedy="Download the checkpoint again."
            )
        return part if not dtypes else replace(part, scheme=with_scale_dtype(part.scheme, next(iter(dtypes))))

    def _refuse_head(self, spec: ModelSpec) -> None:
        """A target that names the head means it; one that names a class or many modules may not: `settle` looks."""
        named = [self.targets.entries[i] for i in self.targets.find(spec.head)]
        if spec.head in named and not self.excluded.find(spec.head):
            raise _quantized_module(spec.head)


class _Chooser:
    """Asks a dialect about one projection after another, and remembers which entries meant something."""

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect
        self.excluded: set[int] = set()
        self.targeted: set[int] = set()

    def meet(self, excluded: Found, targeted: Found) -> None:
        self.excluded.update(excluded)
        self.targeted.update(targeted)

    def choose(self, part: LinearSpec, experts: int) -> LinearSpec:
        lists = (self.dialect.excluded, self.dialect.targets)
        if experts:
            each = list(zip(*(entries.find_experts(part.name, experts, "Linear", "FusedMoE") for entries in lists),
                            strict=True))  # fmt: skip
        else:
            each = [(lists[0].find(part.name, "Linear"), lists[1].find(part.name, "Linear"))]
        first = {found: e for e, found in reversed(list(enumerate(each)))}  # each distinct answer, where first given
        schemes: dict[Scheme, int] = {}
        for (excluded, targeted), e in first.items():
            self.meet(excluded, targeted)
            scheme = UNQUANTIZED if excluded else self.dialect.scheme(part, experts > 0, targeted)
            schemes[scheme] = min(e, schemes.get(scheme, e))
        if len(schemes) > 1:
            (one, a), (other, b) = list(schemes.items())[:2]
            raise UnsupportedError(
                f"{part.name.format(e=a)} is stored as {one.name} and {part.name.format(e=b)} as {other.name}; the "
                f"experts of one layer must agree",
                where="quantization_config", remedy="Use a checkpoint that quantises all experts of a layer alike.",
            )  # fmt: skip
        return replace(part, scheme=next(iter(schemes), UNQUANTIZED))

    def notes(self) -> list[str]:
        pairs = ((self.dialect.excluded, self.excluded), (self.dialect.targets, self.targeted))
        return [note for entries, used in pairs if (note := _unused(entries, used))]


def scheme_of(weight: WeightFormat, activation: Encoding) -> Scheme:
    """The scheme under the name that users know, or under one made of its parts."""
    usual = weight if weight.name != "int4" else replace(weight, scale_dtype="bfloat16", zero_points=False)
    for known in SCHEMES.values():
        if (known.weight, known.activation) == (usual, activation):
            return Scheme(known.name + "_asym" * weight.zero_points, weight, activation)
    return Scheme(f"{weight}{'_asym' * weight.zero_points}-{activation.name}", weight, activation)


def with_scale_dtype(scheme: Scheme, dtype: torch.dtype) -> Scheme:
    return replace(scheme, weight=replace(scheme.weight, scale_dtype=str(dtype).removeprefix("torch.")))


def kv_cache_remark(present: bool) -> tuple[str, ...]:
    return ("the KV cache stays unquantised: the checkpoint's scales for it are not used",) if present else ()


def _unused(entries: Entries, used: set[int]) -> str | None:
    left = [repr(entry) for i, entry in enumerate(entries.entries) if i not in used]
    if not left:
        return None
    more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
    return f"{entries.where}: matches nothing in this model: {', '.join(left[:_NAMED])}{more}"


def _kv_b_notes(spec: ModelSpec) -> list[str]:
    stored = [part.scheme.weight for part in kv_b_parts(spec) if part.scheme.quantized]
    forms = ", ".join(dict.fromkeys(map(str, stored)))
    why = "dequantised once and kept unquantised, since the two attention paths contract it along different axes"
    return [f"kv_b_proj of {len(stored)} layers is stored as {forms}: {why}"] if stored else []


def _plain_where_stored(part: LinearSpec, experts: int, stored: Stored) -> LinearSpec:
    if not part.scheme.quantized:
        return part
    names = names_of(part, experts)
    plain = [name for name in names if stored.get(f"{name}.weight") in FLOATS]
    if plain and len(plain) < len(names):
        raise CheckpointError(
            f"is stored unquantised, {next(name for name in names if name not in plain)} is not",
            where=plain[0], remedy="The experts of one layer must agree; download the checkpoint again.",
        )  # fmt: skip
    return replace(part, scheme=UNQUANTIZED) if plain else part


def _refuse_quantized(name: str, stored: Stored) -> None:
    scales = any(f"{name}.{suffix}" in stored for suffix in ("weight_packed", "weight_scale", "weight_scale_inv"))
    if scales or stored.get(f"{name}.weight", torch.float32) not in FLOATS:
        raise _quantized_module(name)


def _quantized_module(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"{name} is quantised; embeddings, output heads and routers are taken unquantised only",
        where="quantization_config", remedy="Use a release of the model that keeps it in BF16.",
    )  # fmt: skip
