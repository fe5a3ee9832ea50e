"""One GGUF file, read without trusting it: metadata, and tensors dequantised to what torch computes with.

Layout (little-endian): magic, version, counts; key-value pairs; tensor entries (name, dimensions with the fastest
first, type, offset); padding; data. The header is read here, with every count checked against the bytes that are left;
only the arithmetic of the quantised types is left to the optional package `gguf`, and only for those.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from moesaic.errors import CheckpointError, OptionError, UnsupportedError
from moesaic.formats.safetensors_file import printable

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
MAX_HEADER_BYTES = 1 << 30
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16, 28: torch.float64}
_AGAIN = "Download the file again"


@dataclass(frozen=True)
class GGUFTensor:
    """kind: the type's number.  shape: rows first, as torch counts.  offset, nbytes: in the file."""

    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GGUFFile:
    """An open GGUF file. metadata: key to int, float, bool, str or a list of them.  tensors: by name, in file order.

    Raises CheckpointError for a file that is not what it claims, OptionError where the package `gguf` is needed and
    absent, UnsupportedError for a type that it cannot dequantise. Close it, or use it in a `with` block.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            reason = getattr(error, "strerror", None) or str(error)
            raise CheckpointError(f"cannot be opened ({reason})", where=str(path), remedy="Check the path") from None
        try:
            self.metadata, self.tensors = _read_header(self)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._map.close()

    def dtype(self, name: str) -> torch.dtype:
        """What `read` gives: the stored dtype, or float32 for a quantised type."""
        return _PLAIN.get(self.tensors[name].kind, torch.float32)

    def read(self, name: str) -> torch.Tensor:
        """A new CPU tensor. Quantised values come as the FP32 numbers that their codes stand for."""
        tensor = self.tensors[name]
        raw = np.frombuffer(self._map, np.uint8, tensor.nbytes, tensor.offset).copy()
        if tensor.kind in _PLAIN:
            return torch.from_numpy(raw).view(_PLAIN[tensor.kind]).reshape(tensor.shape)
        quants, kind = _gguf_package(str(self.path)), _known_kind(tensor.kind, self, name)
        try:
            values = quants.dequantize(raw.reshape(*tensor.shape[:-1], -1), kind)
        except NotImplementedError:
            raise UnsupportedError(
                f"no dequantisation is known for the type {kind.name}", where=f"{self.path}: {name}",
                remedy="Use a Q8_0, F16 or BF16 file of the model",
            ) from None  # fmt: skip
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).reshape(tensor.shape)

    def fail(self, what: str, remedy: str = _AGAIN) -> NoReturn:
        raise CheckpointError(what, where=str(self.path), remedy=remedy)


def _gguf_package(where: str) -> Any:
    """The module `gguf.quants`; its package also knows the types."""
    try:
        from gguf import quants
    except ImportError:
        raise OptionError(
            "a quantised GGUF file needs the package gguf, which is not installed", where=where,
            remedy="Run `pip install 'moesaic[convert]'`.",
        ) from None  # fmt: skip
    return quants


def _known_kind(number: int, file: GGUFFile, name: str) -> Any:
    quants = _gguf_package(str(file.path))
    try:
        return quants.GGMLQuantizationType(number)
    except ValueError:
        file.fail(f"{printable(name)} has the unknown type {number}")


def _block(number: int, file: GGUFFile, name: str) -> tuple[int, int]:
    """(values, bytes) of one block of a type."""
    if number in _PLAIN:
        return 1, _PLAIN[number].itemsize
    values, size = _gguf_package(str(file.path)).GGML_QUANT_SIZES[_known_kind(number, file, name)]
    return int(values), int(size)


class _Cursor:
    """Reads the header front to back; every read is checked against the end of the file."""

    def __init__(self, file: GGUFFile, data: mmap.mmap) -> None:
        self.file, self.data, self.at = file, data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            self.file.fail(f"the header leaves the file at byte {self.at}: it is truncated or damaged")
        if self.at + count > MAX_HEADER_BYTES:
            self.file.fail(f"the header is larger than {MAX_HEADER_BYTES} bytes")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        raw = self.take(self.number("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.file.fail(f"a string before byte {self.at} is not UTF-8")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            self.file.fail(f"a value at byte {self.at} has the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:  # in one piece: vocabularies have hundreds of thousands of entries
            code = _SCALARS[inner]
            return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize("<" + code))))
        if inner != _STRING:
            self.file.fail(f"an array at byte {self.at} has elements of type {inner}, which are not supported")
        return [self.text() for _ in range(count)]


def _read_header(file: GGUFFile) -> tuple[dict[str, Any], Mapping[str, GGUFTensor]]:
    cursor = _Cursor(file, file._map)
    if cursor.take(4) != MAGIC:
        file.fail("is not a GGUF file", "Give a GGUF file, or the directory of a safetensors checkpoint")
    version = cursor.number("I")
    if version not in VERSIONS:
        file.fail(f"has GGUF version {version}; versions 2 and 3 are known", "Convert it with a current llama.cpp")
    count, pairs = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = cursor.text()
        if key in metadata:
            file.fail(f"{printable(key)} appears twice in the metadata")
        metadata[key] = cursor.value(cursor.number("I"))
    entries = [_read_entry(cursor) for _ in range(count)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        file.fail("general.alignment must be a power of two")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, kind, shape, offset in entries:
        if name in tensors:
            file.fail(f"{printable(name)} appears twice among the tensors")
        tensors[name] = _placed(file, GGUFTensor(name, kind, shape, start + offset, 0))
    return metadata, tensors


def _read_entry(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    name, dimensions = cursor.text(), cursor.number("I")
    if dimensions > MAX_DIMENSIONS:
        cursor.file.fail(f"{printable(name)} has {dimensions} dimensions; the limit is {MAX_DIMENSIONS}")
    shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
    return name, cursor.number("I"), shape, cursor.number("Q")


def _placed(file: GGUFFile, tensor: GGUFTensor) -> GGUFTensor:
    """The tensor with its length, which must lie inside the file."""
    values, size = _block(tensor.kind, file, tensor.name)
    if not tensor.shape or tensor.shape[-1] % values:
        file.fail(f"{printable(tensor.name)} has rows of {tensor.shape[-1:]} values, not a multiple of {values}")
    nbytes = math.prod(tensor.shape) // values * size
    if tensor.offset + nbytes > len(file._map):
        file.fail(f"{printable(tensor.name)} ends behind the end of the file: it is truncated")
    return GGUFTensor(tensor.name, tensor.kind, tensor.shape, tensor.offset, nbytes)
