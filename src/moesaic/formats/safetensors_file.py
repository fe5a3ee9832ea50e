"""One safetensors file, read without trusting it.

The file is an 8-byte little-endian header length, a JSON header, and the tensors' bytes. Everything that the header
claims is checked against the file's real size before a byte of data is read, so that a later read can neither leave
the file nor take part of another tensor. Data is read with `preadv` straight into the memory of the caller's tensor:
mapped pages would count as resident memory beside the parameters and double the peak of a load.
"""

from __future__ import annotations

import json
import math
import os
import stat
import weakref
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch

from moesaic.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64
_MAX_INT64 = 2**63 - 1
_LENGTH_BYTES = 8
_READ_BYTES = 1 << 30  # one preadv call moves at most 2 GiB - 4 KiB on Linux

DTYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
# Names which the format defines and Moesaic does not read; sub-byte types have no torch dtype to land in.
_UNSUPPORTED = ("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64")

_AGAIN = "Download the file again"
_REWRITE = "Download the file again, or write it anew with the safetensors library"


def printable(name: str, limit: int = 160) -> str:
    """`name` from an untrusted file for a message: no control characters or lone surrogates, bounded length."""
    cut = name if len(name) <= limit else name[:limit] + "..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)


def foreign_format(head: bytes) -> tuple[str, str] | None:
    """(what, remedy) if `head`, a file's first bytes, is that of another well-known kind of file; else None."""
    if head.startswith(b"GGUF"):
        return (
            "this is a GGUF file, not a safetensors checkpoint",
            "Give the directory or hub id of the model's safetensors checkpoint, or convert it with `moesaic upcycle`",
        )
    if head.startswith(b"PK") or (len(head) > 1 and head[0] == 0x80 and head[1] <= 5):
        return ("this is a pickle (PyTorch) file; pickle files are never loaded", "Convert it to safetensors")
    if head.startswith(b"version "):
        return ("this is a Git LFS pointer, not the file itself", "Run `git lfs pull` in the model's directory")
    return None


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. offset: bytes from the start of the file; nbytes: its length there."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile:
    """A checked, open safetensors file.

    Opening reads only the header; it raises CheckpointError, naming the file and the tensor, for anything that is not
    exactly what the format allows. Reads are positional on one descriptor and may run in several threads at once.
    Closed by `close()`, by leaving the `with` block, or when collected.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._fd = _open_regular(self.path)
        self._finalizer = weakref.finalize(self, os.close, self._fd)
        try:
            self._tensors, self.metadata = _read_header(self)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent. No read may be under way in another thread."""
        self._fd = -1
        self._finalizer()

    def names(self) -> tuple[str, ...]:
        """All tensors, in the order of their bytes in the file."""
        return tuple(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Raises CheckpointError if the file holds no such tensor."""
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(
                f"holds no tensor named {printable(name)}", where=str(self.path), remedy="Check the name in the index"
            ) from None

    def read(self, name: str) -> torch.Tensor:
        """A new CPU tensor with the stored dtype and shape."""
        info = self.info(name)
        dest = torch.empty(info.shape, dtype=info.dtype)
        self.read_into(name, dest)
        return dest

    def read_into(self, name: str, dest: torch.Tensor) -> None:
        """Fill `dest`, a contiguous CPU tensor of exactly the stored dtype and shape, in place.

        No conversion happens here (`models/loading.py` converts). Raises ValueError if `dest` does not fit.
        """
        info = self.info(name)
        if dest.dtype != info.dtype or tuple(dest.shape) != info.shape:
            raise ValueError(f"{name} is {info.dtype} {info.shape}; the destination {dest.dtype} {tuple(dest.shape)}")
        if dest.device.type != "cpu" or not dest.is_contiguous():
            raise ValueError(f"the destination of {name} must be a contiguous CPU tensor")
        if info.nbytes:
            self.read_bytes(info, 0, dest.detach().reshape(-1).view(torch.uint8).numpy().data)

    def read_bytes(self, info: TensorInfo, start: int, view: memoryview) -> None:
        """Fill `view` (writable bytes) with the tensor's bytes from `start` on; raises ValueError beyond its end."""
        if start < 0 or start + len(view) > info.nbytes:
            raise ValueError(f"{info.name} has {info.nbytes} bytes; asked for {start}..{start + len(view)}")
        self._fill(view, info.offset + start, printable(info.name))

    def _fill(self, view: memoryview, offset: int, what: str) -> None:
        if self._fd < 0:
            raise ValueError(f"{self.path} is closed")
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done : done + _READ_BYTES]], offset + done)
            except OSError as error:
                self._fail(f"cannot be read ({error.strerror})", what, "Check the disk, then download the file again")
            if count == 0:
                self._fail("the file became shorter while it was read", what, _AGAIN)
            done += count

    def _size(self) -> int:
        return os.fstat(self._fd).st_size

    def _fail(self, what: str, tensor: str | None = None, remedy: str = _REWRITE) -> NoReturn:
        where = f"{self.path}: {printable(tensor)}" if tensor is not None else str(self.path)
        raise CheckpointError(what, where=where, remedy=remedy) from None


def _open_regular(path: Path) -> int:
    """A read-only descriptor of a regular file. Non-blocking, so that a named pipe cannot hang the load."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot be opened ({reason})", where=str(path), remedy="Check the path") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError("is not a regular file", where=str(path), remedy="Give the path of a safetensors file")
    return fd


def _read_header(file: SafetensorsFile) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """All tensors in the order of their bytes, and the free-form metadata; raises CheckpointError."""
    size = file._size()
    if size == 0:
        file._fail("the file is empty", remedy=_AGAIN)
    head = bytearray(min(size, _LENGTH_BYTES + 1))
    file._fill(memoryview(head), 0, "header")
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    # A legitimate length may begin with the byte that begins a pickle, so what follows it decides.
    if (length > size or head[_LENGTH_BYTES:] != b"{") and (foreign := foreign_format(bytes(head))):
        file._fail(foreign[0], remedy=foreign[1])
    if size < _LENGTH_BYTES + 2:
        file._fail(f"{size} bytes are too few for a safetensors file", remedy=_AGAIN)
    if length > MAX_HEADER_BYTES:
        file._fail(f"the header claims {length} bytes; the limit is {MAX_HEADER_BYTES}")
    if length > size - _LENGTH_BYTES:
        file._fail(f"the header claims {length} bytes, but the file has only {size}: it is truncated", remedy=_AGAIN)
    if head[_LENGTH_BYTES:] != b"{":
        file._fail("the header does not begin with '{': this is not a safetensors file")
    raw = bytearray(length)
    file._fill(memoryview(raw), _LENGTH_BYTES, "header")
    header = _parse_json(file, raw)
    metadata = _check_metadata(file, header.pop("__metadata__", {}))
    data_start = _LENGTH_BYTES + length
    infos = [_check_entry(file, name, entry, data_start, size) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    _check_cover(file, infos, data_start, size)
    return {info.name: info for info in infos}, metadata


def _parse_json(file: SafetensorsFile, raw: bytearray) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                file._fail("appears twice in the header", key)
            result[key] = value
        return result

    try:
        text = raw.decode("utf-8")
        header = json.loads(text, object_pairs_hook=no_duplicates)
    except UnicodeDecodeError:
        file._fail("the header is not UTF-8")
    except (ValueError, RecursionError):  # ValueError also covers integers of too many digits
        file._fail("the header is not valid JSON")
    if not isinstance(header, dict):
        file._fail("the header is not a JSON object")
    for name in header:
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            file._fail("the name is not valid Unicode", name)
    return header


def _check_metadata(file: SafetensorsFile, value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        file._fail("must map strings to strings", "__metadata__")
    return value


def _check_entry(file: SafetensorsFile, name: str, entry: object, data_start: int, size: int) -> TensorInfo:
    """One header entry against the format and the file's size."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        file._fail("its header entry must have exactly dtype, shape and data_offsets", name)
    dtype = _check_dtype(file, name, entry["dtype"])
    shape = entry["shape"]
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        file._fail("its shape must be a list of non-negative integers", name)
    if len(shape) > MAX_DIMENSIONS:
        file._fail(f"its shape has {len(shape)} dimensions; the limit is {MAX_DIMENSIONS}", name)
    # Zero-sized dimensions count as one: torch computes strides from the others, and those must fit in 64 bits too.
    if max(shape, default=0) > _MAX_INT64 or math.prod(max(n, 1) for n in shape) * dtype.itemsize > _MAX_INT64:
        file._fail("its shape overflows 64 bits", name)
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        file._fail("its data_offsets must be two non-negative integers", name)
    begin, end = offsets
    if end > size - data_start:
        file._fail(
            f"its data would end at byte {data_start + end}, but the file has {size}: it is truncated", name, _AGAIN
        )
    nbytes = math.prod(shape) * dtype.itemsize
    if begin > end or end - begin != nbytes:
        file._fail(f"its data_offsets span {end - begin} bytes; its shape and dtype need {nbytes}", name)
    return TensorInfo(name, dtype, tuple(shape), data_start + begin, nbytes)


def _check_dtype(file: SafetensorsFile, name: str, dtype: object) -> torch.dtype:
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    shown = printable(dtype, 40) if isinstance(dtype, str) else f"of type {type(dtype).__name__}"
    if dtype in _UNSUPPORTED:
        known = ", ".join(DTYPES)
        file._fail(f"its dtype {shown} is not supported", name, f"Use a checkpoint stored as one of {known}")
    file._fail(f"its dtype {shown} is unknown", name)


def _check_cover(file: SafetensorsFile, infos: list[TensorInfo], data_start: int, size: int) -> None:
    """The tensors, sorted by offset, must cover the data exactly: no overlap, no hole, nothing behind them."""
    end = data_start
    if infos and infos[0].offset != end:
        file._fail(f"{infos[0].offset - end} bytes before it belong to no tensor", infos[0].name)
    for before, info in pairwise(infos):
        end = before.offset + before.nbytes
        if info.offset < end:
            file._fail(f"its data overlaps that of {printable(before.name)}", info.name)
        if info.offset > end:
            file._fail(f"{info.offset - end} bytes before it belong to no tensor", info.name)
    if infos:
        end = infos[-1].offset + infos[-1].nbytes
    if end != size:
        file._fail(f"{size - end} bytes at its end belong to no tensor")
