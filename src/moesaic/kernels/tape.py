"""Recording a stretch of native calls and making it again, without Python in between.

Recording runs the stretch as usual and notes what each native call was given. That is the whole stretch if and only if
no other kernel ran in it: torch's dispatcher tells, and where one did, nothing is recorded. Everything allocated in the
stretch is kept, so that the noted addresses stay good; whoever plays it fills the same inputs anew.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moesaic.kernels._native import library
from moesaic.kernels.cpu_native import Entry

EMPTY = frozenset({"aten::empty.memory_format", "aten::new_empty", "aten::empty_like", "aten::empty_strided"})


class Watch(TorchDispatchMode):
    """Notes what torch allocates, and any operator that is neither an allocation nor a view."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: list[Tensor] = []
        self.foreign: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.name() in EMPTY:
            self.kept.append(out)
        elif not func.is_view or not shares(out, args):
            self.foreign.add(func.name())
        return out


def shares(out: Any, args: Any) -> bool:
    """Whether an operator that may give a view did. `to` and `contiguous` copy where there is something to change."""
    held = {each.untyped_storage().data_ptr() for each in args if isinstance(each, Tensor)}
    given = out if isinstance(out, (list, tuple)) else (out,)
    return all(each.untyped_storage().data_ptr() in held for each in given)


class Tape:
    """Native calls in order. `nbytes`: of the tensors that are kept for it."""

    def __init__(self, calls: Sequence[tuple[int, bytes]], kept: Sequence[Tensor]) -> None:
        self.kept, self.count = list(kept), len(calls)
        self.nbytes = sum(tensor.nbytes for tensor in kept)
        self.arguments = [ctypes.create_string_buffer(packed, len(packed)) for _, packed in calls]
        flat = [word for (at, _), argument in zip(calls, self.arguments, strict=True)
                for word in (at, ctypes.addressof(argument))]  # fmt: skip
        self.records = (ctypes.c_void_p * len(flat))(*flat)
        self.again = library().replay

    def play(self) -> None:
        self.again(self.records, ctypes.c_int64(self.count))


def record(stretch: Callable[[], Tensor]) -> tuple[Tensor, Tape | None]:
    """The stretch's result, and its tape; None where a kernel of somebody else ran in it."""
    calls: list[tuple[int, bytes]] = []
    watch = Watch()
    with noting(calls), watch:
        result = stretch()
    return result, None if watch.foreign else Tape(calls, watch.kept)


@contextmanager
def noting(calls: list[tuple[int, bytes]]) -> Iterator[None]:
    """Within, every native call is appended: the address of its entry point, and its packed arguments."""
    Entry.note = calls.append
    for entry in Entry.every:
        entry.clear()
    try:
        yield
    finally:
        Entry.note = None
        for entry in Entry.every:
            entry.clear()
