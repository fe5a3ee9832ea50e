"""Writing safetensors: shards of bounded size, one tensor in memory at a time, and the index over them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moesaic.formats.safetensors_file import DTYPES

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def shards(entries: Iterable[Entry], limit: int) -> list[list[Entry]]:
    """The entries in order, cut into runs of at most `limit` bytes each (a larger tensor gets a shard of its own)."""
    runs: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if runs[-1] and size + entry.nbytes > limit:
            runs.append([])
            size = 0
        runs[-1].append(entry)
        size += entry.nbytes
    return runs


def write_checkpoint(directory: Path, entries: Sequence[Entry], tensors: Iterator[torch.Tensor], limit: int) -> int:
    """Writes shards, then the index if there is more than one; returns how many shards.

    tensors: CPU tensors, one per entry in the entries' order, taken only when their turn has come; each must have the
    dtype and shape of its entry (ValueError). The directory exists; files of these names in it are replaced.
    """
    runs = shards(entries, limit)
    names = [f"model-{i:05}-of-{len(runs):05}.safetensors" for i in range(1, len(runs) + 1)]
    names = [SINGLE] if len(runs) == 1 else names
    for name, run in zip(names, runs, strict=True):
        write_file(directory / name, run, tensors)
    if len(runs) > 1:
        weight_map = {entry.name: name for name, run in zip(names, runs, strict=True) for entry in run}
        index = {"metadata": {"total_size": sum(entry.nbytes for entry in entries)}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    return len(runs)


def write_file(path: Path, entries: Sequence[Entry], tensors: Iterator[torch.Tensor]) -> None:
    """One file. Takes one tensor per entry from `tensors`."""
    with path.open("wb") as file:
        header = header_of(entries)
        file.write(len(header).to_bytes(8, "little") + header)
        for entry in entries:
            tensor = next(tensors)
            if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
                raise ValueError(f"{entry.name} is {tensor.dtype} {tuple(tensor.shape)}; announced was {entry}")
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def header_of(entries: Sequence[Entry]) -> bytes:
    """The JSON header, padded with spaces so that the data begins at a multiple of eight bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + entry.nbytes
        header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    return raw + b" " * (-len(raw) % 8)
