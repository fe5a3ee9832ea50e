"""Stream a checkpoint's tensors into parameters that are already allocated.

Bytes go from the file straight into the parameter's storage where dtype and memory order agree; elsewhere (another
dtype, a strided view, an accelerator) through one bounded staging buffer per reader. Peak memory is therefore the
parameters plus `READERS * STAGING_BYTES`. Everything that headers can show to be wrong (names, shapes, dtypes) is
reported before the first byte of data is read.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from moesaic.errors import CheckpointError
from moesaic.formats.safetensors_file import TensorInfo, printable
from moesaic.models.checkpoint import Checkpoint, StoredTensor

# Two readers: one copies out of the page cache while the other checks or converts. On two shared cores that was
# 1.0 to 1.5 times as fast as one reader; more would only add staging memory and break sequential reading.
READERS = 2
STAGING_BYTES = 16 << 20

# Only these are converted into one another. Integers and FP8 are codes of a quantised format: meaningless alone.
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_NAMED = 5  # how many tensors an error lists


@dataclass(frozen=True)
class Slot:
    """One destination. name: the tensor in the checkpoint.

    dest: a writable view into parameter storage, of the expected shape, on any device. A tensor may feed several
    slots; two slots must not overlap. optional: the checkpoint may lack the tensor; `dest` then stays as it is.
    """

    name: str
    dest: torch.Tensor
    optional: bool = False


@dataclass(frozen=True)
class Take:
    """One tensor that is handed over instead of copied: it must be converted, or is needed beside others.

    take: is called with the whole tensor, on the CPU as stored, in a reader's thread (two run at once), and may raise
    CheckpointError. shape, dtypes: what the checkpoint must hold; `also` are shapes that mean the same. index: where
    given, only that part along the first axis is read and handed over.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    take: Callable[[torch.Tensor], None]
    optional: bool = False
    index: int | None = None
    also: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class LoadReport:
    """What a load did. bytes: read from the checkpoint; tensors: distinct ones of the checkpoint."""

    seconds: float
    bytes: int
    tensors: int


# The bit patterns of NaN and infinity have the largest magnitudes: the positive ones are the top of the signed
# integers, the negative ones the top of the unsigned integers. Per dtype: (integer view, its first such pattern).
_NON_FINITE: dict[torch.dtype, tuple[tuple[type[np.integer[Any]], int], ...]] = {
    torch.bfloat16: ((np.int16, 0x7F80), (np.uint16, 0xFF80)),
    torch.float16: ((np.int16, 0x7C00), (np.uint16, 0xFC00)),
    torch.float32: ((np.int32, 0x7F80_0000), (np.uint32, 0xFF80_0000)),
    torch.float64: ((np.int64, 0x7FF0_0000_0000_0000), (np.uint64, 0xFFF0_0000_0000_0000)),
    torch.float8_e4m3fn: ((np.int8, 0x7F), (np.uint8, 0xFF)),
    torch.float8_e5m2: ((np.int8, 0x7C), (np.uint8, 0xFC)),
    torch.float8_e8m0fnu: ((np.uint8, 0xFF),),  # no sign bit; the last code is NaN
}


def load(
    checkpoint: Checkpoint,
    slots: Iterable[Slot | Take],
    *,
    ignore: Callable[[str], bool],
    progress: bool,
    check_finite: bool = True,
) -> LoadReport:
    """Fill every slot from the checkpoint; the destinations are written in place, in the order of the files' bytes.

    ignore: says of a tensor that no slot names that it is left out on purpose. progress: a bar on stderr.
    Raises CheckpointError naming the tensor: missing, unexpected, of another shape, of a dtype that does not convert,
    or (check_finite) with NaN, infinity, or a value that the destination's dtype cannot hold. The first three kinds
    are found before anything is written; after any error the destinations' contents are undefined.
    """
    began = time.perf_counter()
    jobs = match(checkpoint, list(slots), ignore)
    if any(isinstance(slot, Slot) and slot.dest.device.type == "meta" for _, slot in jobs):
        raise ValueError("a destination has no storage")
    total = sum(_nbytes(*job) for job in jobs)
    with _Progress(total if progress else None) as bar:
        _Readers(jobs, check_finite, bar.advance).run()
    return LoadReport(time.perf_counter() - began, total, len({stored.info.name for stored, _ in jobs}))


_Job = tuple[StoredTensor, Slot | Take]


def match(checkpoint: Checkpoint, slots: list[Slot | Take], ignore: Callable[[str], bool]) -> list[_Job]:
    """(source, slot) pairs sorted by place on disk, after checking names, shapes and dtypes.

    Destinations may be on the meta device here: so a model can be held against a checkpoint before it takes memory.
    """
    tensors = checkpoint.tensors()
    wanted = {slot.name for slot in slots}
    missing = dict.fromkeys(slot.name for slot in slots if slot.name not in tensors and not slot.optional)
    if missing:
        _report(checkpoint, list(missing), "the checkpoint lacks", "Check the architecture, or download it again")
    unexpected = [name for name in tensors if name not in wanted and not ignore(name)]
    if unexpected:
        _report(checkpoint, unexpected, "the model has no place for", "Check model_type and the sizes in config.json")
    jobs = [(tensors[slot.name], slot) for slot in slots if slot.name in tensors]
    for stored, slot in jobs:
        _check_fit(stored, slot)
    return sorted(jobs, key=lambda job: (job[0].order, job[0].info.offset))


def _report(checkpoint: Checkpoint, names: list[str], what: str, remedy: str) -> NoReturn:
    listed = ", ".join(printable(name) for name in names[:_NAMED])
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    raise CheckpointError(
        f"{what} {len(names)} tensor{'s' * (len(names) > 1)}: {listed}{more}",
        where=str(checkpoint.path),
        remedy=remedy,
    )


def _check_fit(stored: StoredTensor, slot: Slot | Take) -> None:
    info = stored.info
    shape = tuple(slot.dest.shape) if isinstance(slot, Slot) else slot.shape
    if info.shape not in (shape, *(slot.also if isinstance(slot, Take) else ())):
        raise CheckpointError(
            f"its shape is {list(info.shape)}; the model expects {list(shape)}",
            where=_where(stored),
            remedy="Check the sizes in config.json",
        )
    takes = slot.dtypes if isinstance(slot, Take) else (slot.dest.dtype,)
    allowed = FLOATS if isinstance(slot, Slot) and slot.dest.dtype in FLOATS else takes
    if info.dtype in allowed:
        return
    raise CheckpointError(
        f"its dtype is {_short(info.dtype)}; the model takes {', '.join(map(_short, allowed))} here",
        where=_where(stored),
        remedy="Use a checkpoint in one of these, or one whose quantization_config Moesaic knows",
    )


def _where(stored: StoredTensor) -> str:
    return f"{stored.file.path}: {printable(stored.info.name)}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Readers:
    """`READERS` threads that take jobs in order, each with its own staging buffer."""

    def __init__(self, jobs: list[_Job], check_finite: bool, advance: Callable[[int], None]) -> None:
        self._jobs = iter(enumerate(jobs))
        self._count = len(jobs)
        self._pinned = any(isinstance(slot, Slot) and slot.dest.device.type == "cuda" for _, slot in jobs)
        self._check, self._advance = check_finite, advance
        self._lock = threading.Lock()
        self._errors: list[tuple[int, Exception]] = []
        self._stop = False

    def run(self) -> None:
        """Raises the error of the earliest failing job: jobs are taken in order, and a taken job is finished."""
        with ThreadPoolExecutor(READERS, thread_name_prefix="moesaic-load") as pool:
            try:
                for future in [pool.submit(self._read_jobs) for _ in range(min(READERS, self._count))]:
                    future.result()
            finally:
                self._stop = True  # on Ctrl-C the readers finish their tensor and return
        if self._errors:
            raise min(self._errors, key=lambda pair: pair[0])[1]

    def _read_jobs(self) -> None:
        staging = _Staging(self._pinned)
        # Inference mode belongs to a thread; it admits writing to parameters that were made in either mode.
        with torch.inference_mode():
            while not self._stop:
                with self._lock:
                    index, job = next(self._jobs, (-1, None))
                if job is None:
                    return
                try:
                    for count in _serve(*job, staging, self._check):
                        with self._lock:
                            self._advance(count)
                except Exception as error:  # carried to `run`, which raises it in the caller's thread
                    self._stop = True
                    with self._lock:
                        self._errors.append((index, error))


class _Staging:
    """`STAGING_BYTES` of host memory, allocated at first use; pinned where it feeds a GPU."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._bytes: torch.Tensor | None = None

    def get(self, nbytes: int) -> torch.Tensor:
        if self._bytes is None:
            self._bytes = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=self._pinned)
        return self._bytes[:nbytes]


def _serve(stored: StoredTensor, slot: Slot | Take, staging: _Staging, check: bool) -> Iterator[int]:
    """Read one tensor to where its slot wants it; yields the bytes read after each piece."""
    if isinstance(slot, Slot):
        yield from _fill(stored, slot.dest, staging, check)
        return
    shape, index = stored.info.shape, slot.index
    taken = torch.empty(shape if index is None else shape[1:], dtype=stored.info.dtype)
    yield from _fill(stored, taken, staging, check, (index or 0) * taken.numel())
    slot.take(taken)


def _nbytes(stored: StoredTensor, slot: Slot | Take) -> int:
    """What a job reads."""
    part = isinstance(slot, Take) and slot.index is not None
    return stored.info.nbytes // stored.info.shape[0] if part else stored.info.nbytes


def _fill(stored: StoredTensor, dest: torch.Tensor, staging: _Staging, check: bool, start: int = 0) -> Iterator[int]:
    """Read a tensor, from element `start` on, into `dest` piece by piece; yields the bytes read after each piece."""
    info, dest = stored.info, dest.detach()
    direct = dest.device.type == "cpu" and dest.dtype == info.dtype and dest.is_contiguous()
    if direct:
        dest = dest.view(-1)
    for piece, offset in _pieces(dest, STAGING_BYTES // info.dtype.itemsize):
        first, nbytes = start + offset, piece.numel() * info.dtype.itemsize
        raw = piece.view(torch.uint8) if direct else staging.get(nbytes)
        raw_bytes: NDArray[np.uint8] = raw.numpy()
        stored.file.read_bytes(info, first * info.dtype.itemsize, raw_bytes.data)
        if check and (at := _first_non_finite(raw_bytes, info.dtype)) is not None:
            _refuse_value(stored, first + at, "the weight at {} is NaN or infinite")
        if not direct:
            piece.copy_(raw.view(info.dtype).view(piece.shape))
            if check and _may_overflow(info, piece.dtype) and not _all_finite(piece):
                _refuse_value(stored, first, f"a weight at or after {{}} is too large for {_short(piece.dtype)}")
        yield nbytes


def _pieces(dest: torch.Tensor, limit: int) -> Iterator[tuple[torch.Tensor, int]]:
    """(view, index of its first element) of at most `limit` elements each, in row-major order of `dest`."""
    if dest.numel() == 0:
        return
    if dest.numel() <= limit:
        yield dest, 0
        return
    row = dest.numel() // dest.shape[0]
    step = max(limit // row, 1)
    for start in range(0, dest.shape[0], step):
        part = dest[start : start + step] if row <= limit else dest[start]
        yield from ((piece, start * row + first) for piece, first in _pieces(part, limit))


def _first_non_finite(raw: NDArray[np.uint8], dtype: torch.dtype) -> int | None:
    """Index of an element that is NaN or infinite, or None. Exact, and without a temporary: two maxima decide."""
    for view, first in _NON_FINITE.get(dtype, ()):
        codes = raw.view(view)
        if int(codes.max()) >= first:
            return int(codes.argmax())
    return None


def _may_overflow(info: TensorInfo, dest: torch.dtype) -> bool:
    return dest != info.dtype and torch.finfo(dest).max < torch.finfo(info.dtype).max


def _all_finite(piece: torch.Tensor) -> bool:
    """Whether a narrowed piece holds no infinity; NaN and infinity both survive into the extremes."""
    low, high = torch.aminmax(piece)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _refuse_value(stored: StoredTensor, element: int, what: str) -> NoReturn:
    """`what` with the index of the flat `element` in place of its braces."""
    index = [int(n) for n in np.unravel_index(element, stored.info.shape)]
    raise CheckpointError(
        what.format(index), where=_where(stored), remedy="Download the checkpoint again, or load it in another dtype"
    )


class _Progress:
    """A byte-counting bar on stderr, or nothing if `total` is None."""

    def __init__(self, total: int | None) -> None:
        self._bar = None
        if total is not None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights", file=sys.stderr)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)
