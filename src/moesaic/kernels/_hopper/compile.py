"""Machine code for the kernels of this folder: made by NVRTC (which comes with torch) at first use, kept on disk.

A file in the cache folder bears a name that says what it was made from: sources, options, compiler. Nothing stale is
loaded, and several processes may compile at the same time.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import site
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import MappingProxyType

from moesaic.config import cache_folder
from moesaic.errors import UnsupportedError
from moesaic.kernels._hopper import wgmma

ARCH = "sm_90a"
NONE: Mapping[str, str] = MappingProxyType({})
OPTIONS = (f"--gpu-architecture={ARCH}", "--std=c++17")


@cache
def sources() -> dict[str, str]:
    """The files of this folder by name; a `.cu` is compiled, and includes the others."""
    folder = Path(__file__).parent
    files = (path for path in sorted(folder.iterdir()) if path.suffix in (".cuh", ".cu"))
    return {path.name: path.read_text(encoding="utf-8") for path in files}


@cache
def nvrtc() -> ctypes.CDLL:
    """Raises UnsupportedError, with what to install, where it is not found."""
    for name in candidates():
        try:
            for part in Path(name).parent.glob("libnvrtc-builtins.so*") if "/" in name else ():
                ctypes.CDLL(str(part))  # which it would look for where the system does
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise UnsupportedError("NVRTC, CUDA's run-time compiler, is not found", where="libnvrtc.so",
                           remedy="Install a torch with CUDA, or nvidia-cuda-nvrtc.")  # fmt: skip


def candidates() -> Iterable[str]:
    """Beside torch's own libraries first (they match its CUDA), then wherever the system looks."""
    folders = [*site.getsitepackages(), *(path for path in sys.path if path.endswith("site-packages"))]
    for folder in dict.fromkeys(folders):
        found = sorted(Path(folder).glob("nvidia/*/lib/libnvrtc.so.*"), reverse=True)
        yield from (str(path) for path in found if ".alt." not in path.name)
    yield from ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


def version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def machine_code(defines: Mapping[str, int], sizes: Iterable[int] = (), main: str = "hopper.cu",
                 generated: Mapping[str, str] = NONE) -> bytes:  # fmt: skip
    """The kernels for one set of compile-time constants. sizes: numbers of columns that products come in.
    generated: further headers by name."""
    kind = "e4m3" if defines.get("ROWS8") else "f16" if defines.get("HALVES") else "bf16"
    headers = {**sources(), "wgmma.cuh": wgmma.header(sizes, kind), **generated}
    options = (*OPTIONS, *(f"-D{name}={value}" for name, value in sorted(defines.items())))
    texts = (f"{name}\n{text}" for name, text in sorted(headers.items()))
    made_from = "\0".join((repr(version()), main, *options, *texts))
    path = cache_folder() / "hopper" / f"{hashlib.sha256(made_from.encode()).hexdigest()[:24]}.cubin"
    with suppress(OSError):
        return path.read_bytes()
    code = compiled(headers, options, main)
    keep(path, code)
    return code


def keep(path: Path, code: bytes) -> None:
    """Where nothing can be stored, the code is good for this process all the same."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, made = tempfile.mkstemp(prefix="building-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(code)
            os.replace(made, path)
        finally:
            Path(made).unlink(missing_ok=True)
    except OSError as error:
        print(f"moesaic: kernels cannot be kept in {path.parent}: {error}", file=sys.stderr)


def compiled(headers: Mapping[str, str], options: tuple[str, ...], main: str = "hopper.cu") -> bytes:
    """`main`, which may include the other ones. Raises UnsupportedError with the compiler's own words."""
    library, program = nvrtc(), ctypes.c_void_p()
    names = [name for name in headers if name != main]
    texts = (ctypes.c_char_p * len(names))(*(headers[name].encode() for name in names))
    includes = (ctypes.c_char_p * len(names))(*(name.encode() for name in names))
    check(library.nvrtcCreateProgram(ctypes.byref(program), headers[main].encode(), main.encode(), len(names),
                                     texts, includes))  # fmt: skip
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = library.nvrtcCompileProgram(program, len(options), given)
        if status:
            raise UnsupportedError(f"the kernels cannot be compiled: {log_of(program)[:2000]}", where="NVRTC")
        size = ctypes.c_size_t()
        check(library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        code = ctypes.create_string_buffer(size.value)
        check(library.nvrtcGetCUBIN(program, code))
        return code.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def log_of(program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    nvrtc().nvrtcGetProgramLogSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    nvrtc().nvrtcGetProgramLog(program, text)
    return text.value.decode(errors="replace")


def check(status: int) -> None:
    if status:
        nvrtc().nvrtcGetErrorString.restype = ctypes.c_char_p
        raise UnsupportedError(f"NVRTC: {nvrtc().nvrtcGetErrorString(status).decode()}", where="NVRTC")
