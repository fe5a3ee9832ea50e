"""The native kernels: C++ that is compiled once per machine and loaded with ctypes.

Every entry point takes the address of a struct of eight-byte fields; the wrappers of `kernels/cpu_native.py` pack it.
The library lies in the cache folder under a name that says what it was made from (sources, compiler, flags, processor):
nothing stale is ever loaded, and several processes may build it at the same time.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

from moesaic.config import cache_folder
from moesaic.errors import UnsupportedError
from moesaic.hardware import local_cpu

COMPILERS = ("c++", "g++", "clang++")
# Products and sums may be fused into one instruction. The code is vectorised by hand: the compiler's own attempts at
# gluing scalars together (slp) put loop pointers into vector registers.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-tree-slp-vectorize", "-w",
         "-fPIC", "-shared")  # fmt: skip
TIMEOUT = 600
NAMES = ("rms_norm", "rotate", "activate", "route", "linear", "gate", "experts", "attend_paged", "attend_latent",
         "store_latent")  # fmt: skip
"""As `Name` in moesaic.cpp has them."""
RUNTIME = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier")


def sources() -> list[Path]:
    return sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".h", ".cpp"))


@cache
def library() -> ctypes.CDLL:
    """The loaded library, compiled first where the cache has none. Raises UnsupportedError where that is impossible."""
    path = build(cache_folder() / "native")
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise UnsupportedError(f"the native kernels cannot be loaded: {error}", where=str(path)) from error
    pointers = openmp()
    if pointers:
        found.use_threads(*pointers)
    return found


def spent() -> dict[str, float]:
    """Seconds spent in each entry point so far; `mlp` counts as `experts`, whose code it is."""
    each = (ctypes.c_int64 * len(NAMES))()
    library().spent(each)
    return {name: nanoseconds / 1e9 for name, nanoseconds in zip(NAMES, each, strict=True)}


def build(folder: Path) -> Path:
    """The library for this very machine in `folder`, compiled unless it is there."""
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise UnsupportedError(
            "there is no C++ compiler to build the native kernels with",
            where="PATH", remedy="Install g++ or clang++ (Debian, Ubuntu: apt install g++).",
        )  # fmt: skip
    path = folder / f"moesaic-{fingerprint(compiler)}.so"
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, made = tempfile.mkstemp(suffix=".so", prefix="building-", dir=folder)
        os.close(handle)
    except OSError as error:
        raise UnsupportedError(f"the native kernels cannot be stored: {error}", where=str(folder),
                               remedy="Name a writable folder in MOESAIC_CACHE.") from error  # fmt: skip
    if sys.stderr.isatty():
        print("moesaic: compiling the native CPU kernels for this processor (once)", file=sys.stderr, flush=True)
    try:
        compile_to(compiler, Path(made))
        os.replace(made, path)  # whoever was faster made the same
    finally:
        Path(made).unlink(missing_ok=True)
    return path


def compile_to(compiler: str, path: Path) -> None:
    main = next(each for each in sources() if each.suffix == ".cpp")
    try:
        done = subprocess.run([compiler, *FLAGS, str(main), "-o", str(path)], capture_output=True, text=True,
                              timeout=TIMEOUT, check=False)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnsupportedError(f"the native kernels cannot be compiled: {error}", where=compiler) from error
    if done.returncode:
        complaint = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
        raise UnsupportedError(f"the native kernels cannot be compiled: {complaint}", where=compiler,
                               remedy="A compiler of 2022 or newer is needed: g++ 12 or clang++ 15.")  # fmt: skip


def fingerprint(compiler: str) -> str:
    """Of everything that the library's bytes depend on."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    cpu = local_cpu()
    parts = [version.stdout, " ".join(FLAGS), cpu.name, " ".join(sorted(cpu.features))]
    parts += [f"{path.name}\n{path.read_text(encoding='utf-8')}" for path in sources()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def openmp() -> list[ctypes.c_void_p]:
    """Entries of the OpenMP runtime that torch has brought into this process; empty where it has none that we know.

    A second runtime would have threads of its own, which spin against torch's for the same cores.
    """
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    paths = dict.fromkeys(line.split(maxsplit=5)[-1] for line in lines if "omp" in line.rpartition("/")[2])
    home = str(Path(torch.__file__).parent)
    for path in sorted(paths, key=lambda name: not name.startswith(home)):
        try:
            runtime = ctypes.CDLL(path)
            return [ctypes.cast(getattr(runtime, name), ctypes.c_void_p) for name in RUNTIME]
        except (OSError, AttributeError):
            continue
    return []
