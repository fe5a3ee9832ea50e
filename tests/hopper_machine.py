"""The Hopper expert kernels on a CPU: their sources, compiled for the host with a stand-in for what PTX does.

`hopper_host/base.cuh` says what such a run can show, and what it cannot. Everything else, the kernels and the Python
that launches them, is what runs on a GPU. A machine has three multiprocessors.
"""

from __future__ import annotations

import atexit
import ctypes
import platform
import subprocess
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from shutil import rmtree, which
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.contracts.scheme import Encoding
from moesaic.formats import encodings
from moesaic.formats.encodings import Rows
from moesaic.kernels import triton
from moesaic.kernels._hopper import compile as code
from moesaic.kernels._hopper import dense, gate, launch
from moesaic.kernels._hopper.driver import TensorMap, aligned_map
from moesaic.kernels._hopper.variants import Variant
from moesaic.kernels._native import COMPILERS
from moesaic.kernels.exact import exact

HOST = Path(__file__).parent / "hopper_host"
OPTIONS = ("-std=c++17", "-O1", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-w", "-shared", "-fPIC",
           "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error")  # fmt: skip
PROCESSORS = 3


@cache
def folder() -> Path:
    made = mkdtemp(prefix="hopper-")
    atexit.register(rmtree, made, ignore_errors=True)
    return Path(made)


@cache
def library(variant: Variant | dense.Variant | gate.Variant, main: str = "main.cpp") -> ctypes.CDLL:
    """The kernels of a variant. Fails where they do not compile."""
    here = folder() / f"{abs(hash(variant)):x}"
    here.mkdir()
    mine = {path.name: path.read_text() for path in HOST.iterdir()}
    for name, text in {**code.sources(), **mine}.items():
        # a block's memory is not a global variable here
        (here / name).write_text(text.replace("extern __shared__ __align__(1024) u8 memory[];", ""))
    defines = (f"-D{name}={value}" for name, value in variant.defines.items())
    made = here / "kernels.so"
    compiler = next(found for name in COMPILERS if (found := which(name)))
    done = subprocess.run([compiler, *OPTIONS, *defines, "-o", made, here / main], capture_output=True, text=True)
    assert not done.returncode, done.stderr[:4000]
    return ctypes.CDLL(str(made))


def loaded(variant: Variant, device: int) -> SimpleNamespace:
    kernels = library(variant)

    def named(name: str) -> tuple[ctypes.CDLL, str]:
        return kernels, name

    return SimpleNamespace(
        shared=kernels.room_size(), threads=kernels.thread_count(), experts=named("experts"),
        prepare=named("prepare"), prepare_encoded=named("prepare_encoded"), combine=named("combine"),
    )  # fmt: skip


def loaded_dense(variant: dense.Variant, device: int) -> SimpleNamespace:
    return SimpleNamespace(kernel=(library(variant, "dense.cpp"), "dense"))


def loaded_gate(variant: gate.Variant, device: int) -> SimpleNamespace:
    kernels = library(variant, "gate.cpp")
    return SimpleNamespace(kernel=(kernels, "gate"), shared=kernels.room_size(), most_blocks=gate.MOST_BLOCKS)


def start(kernel: tuple[ctypes.CDLL, str], grid: int, block: int, arguments: Sequence[Any], shared: int = 0,
          cluster: int = 1, ahead: bool = True) -> None:  # fmt: skip
    """As driver.launch. Fails where a kernel's threads wait for ever."""
    kernels, name = kernel
    assert cluster == 1 or name == "gate", "one thread block sorts"
    if name == "gate":
        kernels.begin_by_chance(grid + arguments[0].rows)
        stuck = kernels.run_gate(ctypes.byref(arguments[0]), grid, block, shared, cluster)
    elif name == "dense":
        kernels.begin_by_chance(grid + arguments[0].rows)
        stuck = kernels.run_dense(ctypes.byref(arguments[0]), grid, block, shared)
    elif name == "experts":
        given = arguments[1]
        kernels.begin_by_chance(grid + 31 * given.hidden + 17 * given.columns + 7 * given.top_k)
        stuck = kernels.run_experts(*map(ctypes.byref, arguments), grid, block, shared)
    elif name == "combine":
        stuck = kernels.run_combine(*arguments, grid)
    else:
        stuck = kernels.run_prepare(ctypes.byref(arguments[0]), grid, int(name == "prepare_encoded"))
    assert not stuck, f"threads of `{name}` wait for ever"


def tensor_map(address: int, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> TensorMap:
    """As driver.tensor_map, for base.cuh here."""
    made, padding = aligned_map(), (0,) * (5 - len(sizes))
    words = (address, len(sizes), *strides, *padding, *sizes, *padding, *box, *padding)
    made.words[:16] = words[:16]
    return made


def encode(x_TD: Tensor, encoding: Encoding, scale: Tensor | None = None) -> Rows:
    """As triton.encode, which leaves what codes stand for beside them."""
    rows = encodings.encode(x_TD, encoding, scale)
    if encoding.name in ("mxfp8", "nvfp4"):
        rows = Rows(encoding, {**rows.parts, "exact": exact(rows)}, rows.dtype)
    return rows


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """`hopper` and `hopper_invariant` run here."""
    if platform.machine() != "x86_64":
        pytest.skip("its fibers change stacks in x86-64's assembly")
    for name, value in {"loaded": loaded, "launch": start, "tensor_map": tensor_map, "described": tensor_map,
                        "processors": lambda _: PROCESSORS}.items():  # fmt: skip
        monkeypatch.setattr(launch, name, value)
    for module, value in ((dense, loaded_dense), (gate, loaded_gate)):
        monkeypatch.setattr(module, "loaded", value)
        monkeypatch.setattr(module, "launch", start)
    monkeypatch.setattr(triton, "encode", encode)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    torch.manual_seed(0)
