"""The ops as custom ops of torch, so that `torch.compile` traces through a model without looking into kernels.

    model = Decoder(spec, TracedKernels(plan), like, length)        # or build(..., kernels=TracedKernels(plan))
    compiled = torch.compile(model, fullgraph=True)

A custom op takes tensors and text. A call is taken apart into its tensors, in order, and a description of everything
else; the op puts it together again, and calls the backend. Its fake kernel (`fakes.py`) does the same with tensors that
have no memory, to say what comes out. `moesaic::change` is for ops that write into an argument: the KV cache, counters.
What a step knows of its sequences beyond their number is read from its tensors on a CPU; a GPU's kernels do not ask.
"""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from moesaic.contracts.plan import Parameters
from moesaic.contracts.scheme import Encoding, WeightFormat
from moesaic.contracts.spec import Activation, RouterSpec
from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import Rows
from moesaic.kernels.fakes import FAKES, ON_GPU
from moesaic.kernels.ops import (
    AttentionBatch,
    ExpertTerms,
    ExpertWeights,
    HeadNorms,
    KVView,
    Latent,
    Ops,
    Softmax,
    Span,
)  # fmt: skip
from moesaic.kernels.registry import NONE, Kernels, backends, own

PLAIN = (Encoding, WeightFormat, Activation, RouterSpec, KVView)
"""Values without tensors: taken apart into their fields."""
HELD = (QuantTensor, Rows, ExpertWeights, ExpertTerms, HeadNorms, Latent, Softmax)
"""Values with tensors in some of their fields."""
KINDS = {kind.__name__: kind for kind in (*PLAIN, *HELD, AttentionBatch)}
CHANGED = {"store_heads": (3,), "store_latent": (3,), "gate": (6,)}
"""Arguments that an op writes into."""
CONTIGUOUS = torch.contiguous_format
PARTS = {"bf16": ["data"], "nvfp4": ["data", "scale", "global_scale"]}
"""Of rows in an encoding; in the others: data and scale."""


class Site:
    """One op of one backend, in place of its function. Only while something is traced does it go through torch."""

    def __init__(self, op: str, backend: str, parameters: Parameters = ()) -> None:
        self.op, self.backend, self.parameters = op, backend, parameters
        self.function: Callable[..., Any] = partial(getattr(backends()[backend], op), **dict(parameters))

    def __call__(self, *args: Any) -> Any:
        if not torch.compiler.is_compiling():
            return self.function(*args)
        call = self.taken(args)
        op = torch.ops.moesaic.change if self.op in CHANGED else torch.ops.moesaic.call
        return together(self.backend, self.op, args, op(*call))

    def taken(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of the custom op."""
        changed = CHANGED.get(self.op, ())
        inputs: list[Tensor] = []
        written: list[Tensor] = []
        numbers: list[int] = []
        said = [apart(arg, written if i in changed else inputs, numbers) for i, arg in enumerate(args)]
        what = f"[{self.op!r}, {self.backend!r}, {dict(self.parameters)}, {listed(said)}]"
        return (what, inputs, numbers, written) if changed else (what, inputs, numbers)


def apart(value: Any, tensors: list[Tensor], numbers: list[int]) -> str:
    """The description: a Python literal. Tensors and integers are appended to lists, and described by their places."""
    if value is None or isinstance(value, (bool, float, str)):
        return f"{value!r}"
    if isinstance(value, int):
        numbers.append(value)
        return f"['int', {len(numbers) - 1}]"
    if isinstance(value, Tensor):
        tensors.append(value)
        return f"['tensor', {len(tensors) - 1}]"
    if isinstance(value, torch.dtype):
        return f"['dtype', '{value}']"
    if isinstance(value, tuple):
        return f"['tuple', {listed([apart(each, tensors, numbers) for each in value])}]"
    if isinstance(value, Mapping):
        each = [f"[{name!r}, {apart(part, tensors, numbers)}]" for name, part in value.items()]
        return f"['dict', {listed(each)}]"
    if isinstance(value, AttentionBatch):
        held = (len(value.spans), value.decodes, max([span.count for span in value.spans]), value.block, value.table_SB,
                value.spans_S3, value.fresh_S)  # fmt: skip
        return f"['AttentionBatch', {listed([apart(each, tensors, numbers) for each in held])}]"
    for kind, kept in NAMES.items():
        if isinstance(value, KINDS[kind]):
            each = [f"[{name!r}, {apart(getattr(value, name), tensors, numbers)}]" for name in kept]
            return f"['{kind}', {listed(each)}]"
    raise TypeError(f"no op takes a {type(value)}")


def listed(said: list[str]) -> str:
    return f"[{', '.join(said)}]"


NAMES = {kind.__name__: tuple(field.name for field in fields(kind)) for kind in (*PLAIN, *HELD)}


def again(said: Any, tensors: Sequence[Tensor], numbers: Sequence[int]) -> Any:
    """The value of a description."""
    if not isinstance(said, list):
        return said
    kind, rest = said
    if kind == "tensor":
        return tensors[rest]
    if kind == "int":
        return numbers[rest]
    if kind == "dtype":
        return getattr(torch, rest.removeprefix("torch."))
    if kind == "tuple":
        return tuple(again(each, tensors, numbers) for each in rest)
    if kind == "dict":
        return {name: again(each, tensors, numbers) for name, each in rest}
    if kind == "AttentionBatch":
        count, decodes, most, block, table_SB, spans_S3, fresh_S = (again(each, tensors, numbers) for each in rest)
        spans = spans_of(spans_S3, count, most, table_SB.shape[1] * block)
        return AttentionBatch(spans, decodes, table_SB, block, spans_S3, fresh_S)
    return KINDS[kind](**{name: again(each, tensors, numbers) for name, each in rest})


def spans_of(spans_S3: Tensor, count: int, most: int, room: int) -> tuple[Span, ...]:
    """The spans where reading them does not wait for a device; else as many, each of the most rows and all the room:
    kernels only size their grids by them."""
    if spans_S3.device.type == "cpu" and not isinstance(spans_S3, FakeTensor):
        return tuple(Span(*each) for each in spans_S3.tolist())
    return (Span(0, most, room),) * count


def read(batch: AttentionBatch) -> AttentionBatch:
    """With the spans themselves, for which the host waits."""
    return replace(batch, spans=tuple(Span(*each) for each in batch.spans_S3.tolist()))


def together(backend: str, op: str, args: tuple[Any, ...], out: Sequence[Tensor]) -> Any:
    """What the op's function returns, of the tensors in it."""
    if op in ("encode", "attend_encode"):
        at = 1 if op == "encode" else 5
        return rows_of(backend, args[at], out, args[0].dtype, *args[at + 1 :])
    if op == "add_norm_encode":
        return out[0], rows_of(backend, args[4], out[2:], args[2].dtype, *args[5:]), out[1]
    if op == "experts_terms":
        return ExpertTerms(out[0], out[1], out[2])
    if op == "store_latent":
        return None
    return out[0] if len(out) == 1 or op == "store_heads" else tuple(out)


def rows_of(backend: str, encoding: Encoding, parts: Sequence[Tensor], dtype: torch.dtype,
            scale: Tensor | None = None) -> Rows:  # fmt: skip
    """scale: a static encoding's own, of which the op returned a copy: `suits` asks for that very tensor."""
    named = dict(zip(part_names(backend, encoding), parts, strict=True))
    if scale is not None:
        named["global_scale" if encoding.name == "nvfp4" else "scale"] = scale
    return Rows(encoding, named, dtype)


def part_names(backend: str, encoding: Encoding) -> list[str]:
    """Of rows in an encoding, as the backend leaves them. On a GPU they have one part more (`_triton/encode.py`)."""
    names = PARTS.get(encoding.name, ["data", "scale"])
    return [*names, "exact"] if backend in ON_GPU and encoding.name in ("mxfp8", "nvfp4") else names


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Of a result, in the order in which `together` expects them: those of rows last."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Rows):
        yield from value.parts.values()
    elif isinstance(value, ExpertTerms):
        yield from (value.y_RD, value.ids_TA, value.weights_TA)
    elif isinstance(value, tuple):
        for each in sorted(value, key=lambda each: isinstance(each, Rows)):
            yield from tensors_in(each)


def run(what: str, inputs: list[Tensor], numbers: list[int], changed: Sequence[Tensor] = ()) -> list[Tensor]:
    """Calls the backend. What comes out is contiguous, and storage of its own: that of an argument, or of another
    result, is copied, which custom ops may not share."""
    op, backend, parameters, args = put_together(what, inputs, numbers, changed)
    if getattr(backends()[backend], "READS_SPANS", False):
        args = [read(each) if isinstance(each, AttentionBatch) else each for each in args]
    out: list[Tensor] = []
    taken = {each.untyped_storage().data_ptr() for each in (*inputs, *changed)}
    value = getattr(backends()[backend], op)(*args, **parameters)
    for each in tensors_in(value):
        shared = each.untyped_storage().data_ptr() in taken
        out.append(each.clone(memory_format=CONTIGUOUS) if shared else each.contiguous())
        taken.add(out[-1].untyped_storage().data_ptr())
    return out


def fake(what: str, inputs: list[Tensor], numbers: list[int], changed: Sequence[Tensor] = ()) -> list[Tensor]:
    op, backend, _, args = put_together(what, inputs, numbers, changed)
    return [torch.empty_like(each, memory_format=CONTIGUOUS) for each in tensors_in(FAKES[op](backend, *args))]


def in_place(how: Callable[..., list[Tensor]], what: str, inputs: list[Tensor], numbers: list[int],
             changed: list[Tensor]) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Always two tensors: torch copies behind an op that writes only where it returns no list."""
    found = how(what, inputs, numbers, changed)
    empty = [inputs[0].new_empty(0) for _ in range(2 - len(found))]
    return found[0] if found else empty[1], found[1] if len(found) > 1 else empty[0]


def put_together(what: str, inputs: Sequence[Tensor], numbers: Sequence[int],
                 changed: Sequence[Tensor]) -> tuple[str, str, dict[str, int], list[Any]]:  # fmt: skip
    op, backend, parameters, said = literal(what)
    written = CHANGED.get(op, ())
    args = [again(each, changed if i in written else inputs, numbers) for i, each in enumerate(said)]
    return op, backend, parameters, args


@lru_cache(maxsize=65536)
def literal(what: str) -> Any:
    return literal_eval(what)


LIBRARY = torch.library.Library("moesaic", "FRAGMENT")
LIBRARY.define("call(str what, Tensor[] inputs, SymInt[] numbers) -> Tensor[]")
LIBRARY.define("change(str what, Tensor[] inputs, SymInt[] numbers, Tensor(a!)[] changed) -> (Tensor, Tensor)")
for name, one, other in (("call", run, fake), ("change", partial(in_place, run), partial(in_place, fake))):
    LIBRARY.impl(name, one, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moesaic::{name}", other, lib=LIBRARY)


class TracedKernels(Kernels):
    """The kernels of a plan, each a `Site`."""

    def bind(self, chosen: Mapping[str, str], parameters: Mapping[str, Parameters] = NONE) -> Ops:
        sites = {op: Site(op, name, parameters.get(op, ())) for op, name in own(chosen).items()}
        return cast(Ops, SimpleNamespace(**sites))
