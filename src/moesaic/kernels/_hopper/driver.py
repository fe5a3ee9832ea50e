"""The CUDA driver through ctypes: modules, launches, and descriptors of tiles that the copy engine fetches.

Only what the kernels of this folder need. Launches go to torch's current stream and may be captured into a graph.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch

from moesaic.errors import UnsupportedError

_CLUSTER, _SERIALIZATION = 4, 6  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, ..._PROGRAMMATIC_STREAM_SERIALIZATION
_SHARED_LIMIT, _LARGE_CLUSTERS = 8, 14  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, ..._NON_PORTABLE_CLUSTER_...
_UINT8, _PROMOTE_256B = 0, 3
_SWIZZLES = {64: 2, 128: 3}
"""By the bytes of a row: those of 64 and of 128 bytes."""


class TensorMap(ctypes.Structure):
    """CUtensorMap: 128 opaque bytes, which the driver wants aligned to 64."""

    _fields_ = (("words", ctypes.c_uint64 * 16),)
    _align_ = 64


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    )  # fmt: skip


@cache
def library() -> ctypes.CDLL:
    """Raises UnsupportedError where there is no driver."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise UnsupportedError(f"the CUDA driver cannot be loaded: {error}", where="libcuda.so.1") from error


def call(name: str, *arguments: Any) -> None:
    """A driver function. Raises RuntimeError, as torch does for faults of a device, with the driver's word for it."""
    status = getattr(library(), name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        library().cuGetErrorString(status, ctypes.byref(text))
        said = text.value.decode() if text.value else f"error {status}"
        raise RuntimeError(f"the CUDA driver, {name}: {said}")


class Module:
    """Loaded machine code. Functions and globals are looked up by name."""

    def __init__(self, image: bytes) -> None:
        torch.cuda.current_stream()  # makes torch's context, in which the module lives
        self.handle, self.image = ctypes.c_void_p(), image
        call("cuModuleLoadData", ctypes.byref(self.handle), image)
        self.functions: dict[str, ctypes.c_void_p] = {}

    def function(self, name: str, shared: int = 0, large_clusters: bool = False) -> ctypes.c_void_p:
        """shared: bytes of dynamic shared memory that it will be launched with. large_clusters: of up to 16 blocks."""
        if name not in self.functions:
            found = ctypes.c_void_p()
            call("cuModuleGetFunction", ctypes.byref(found), self.handle, name.encode())
            if shared:
                call("cuFuncSetAttribute", found, _SHARED_LIMIT, shared)
            if large_clusters:
                call("cuFuncSetAttribute", found, _LARGE_CLUSTERS, 1)
            self.functions[name] = found
        return self.functions[name]

    def integer(self, name: str) -> int:
        """A global variable of four bytes."""
        address, size, value = ctypes.c_uint64(), ctypes.c_size_t(), ctypes.c_int()
        call("cuModuleGetGlobal_v2", ctypes.byref(address), ctypes.byref(size), self.handle, name.encode())
        call("cuMemcpyDtoH_v2", ctypes.byref(value), address, ctypes.c_size_t(4))
        return value.value


def launch(function: ctypes.c_void_p, grid: int, block: int, arguments: Sequence[Any], shared: int = 0,
           cluster: int = 1, ahead: bool = True) -> None:  # fmt: skip
    """In one dimension; it may begin before the kernel in front of it has ended: the kernels wait themselves.

    cluster: neighbouring blocks that run together.  ahead: False where it must not begin so early.
    """
    attributes = (_Attribute * 2)(_Attribute(id=_SERIALIZATION), _Attribute(id=_CLUSTER))
    attributes[0].value[0] = int(ahead)
    attributes[1].value[:3] = cluster, 1, 1
    stream = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())  # without an object for each launch
    config = _Config((grid, 1, 1), (block, 1, 1), shared, stream, attributes, 2 if cluster > 1 else 1)
    pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(each) for each in arguments))
    call("cuLaunchKernelEx", ctypes.byref(config), function, pointers, None)


def largest_cluster(function: ctypes.c_void_p, block: int, shared: int) -> int:
    """Blocks of the largest cluster, up to 16, that the current device can run at all; a power of two."""
    for blocks in (16, 8, 4, 2):
        attribute, found = _Attribute(id=_CLUSTER), ctypes.c_int()
        attribute.value[:3] = blocks, 1, 1
        config = _Config((blocks, 1, 1), (block, 1, 1), shared, None, ctypes.pointer(attribute), 1)
        call("cuOccupancyMaxActiveClusters", ctypes.byref(found), function, ctypes.byref(config))
        if found.value:
            return blocks
    return 1


def tensor_map(address: int, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> TensorMap:
    """Bytes in up to five axes, the first one dense. strides: bytes, of all axes but the first. box: of a tile.

    Rows of 64 and of 128 bytes arrive in shared memory with their 16-byte chunks exchanged (see `chunk_at` in room.cuh,
    `tile_descriptor` in base.cuh).
    """
    made, rank = aligned_map(), len(sizes)
    call(
        "cuTensorMapEncodeTiled", ctypes.byref(made), _UINT8, rank, ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*sizes), (ctypes.c_uint64 * (rank - 1))(*strides), (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*(1,) * rank), 0, _SWIZZLES[box[0]], _PROMOTE_256B, 0,
    )  # fmt: skip
    return made


described = lru_cache(maxsize=4096)(tensor_map)
"""Weights and pools stay where they are, and activations come back to where they were."""


def aligned_map() -> TensorMap:
    """ctypes honours `_align_` from Python 3.13 on only."""
    buffer = ctypes.create_string_buffer(ctypes.sizeof(TensorMap) + 64)
    made = TensorMap.from_buffer(buffer, -ctypes.addressof(buffer) % 64)
    return made
