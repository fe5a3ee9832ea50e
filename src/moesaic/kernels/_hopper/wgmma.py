"""Writes `wgmma.cuh`: the tensor-core product of a warp group for each number of columns that a kernel uses.

The instruction names every register of its result, so that its text depends on their number; C++ has no loop for that.
"""

from __future__ import annotations

from collections.abc import Iterable


def header(sizes: Iterable[int], kind: str) -> str:
    """sizes: columns (multiples of 8).  kind: of operands, e4m3, bf16 or f16.  d: one sum per two columns.

    `begin_`: a new sum; what d held does not matter, and the compiler is told so.
    """
    room = "float *d"
    codes = "u32 a0, u32 a1, u32 a2, u32 a3"
    made = [
        f"template <int N> DEVICE void multiply_stage({room}, u64 w, u64 x);",
        f"template <int N> DEVICE void multiply_shared({room}, u64 w, u64 x);",
        f"template <int N> DEVICE void multiply_registers({room}, {codes}, u64 x);",
        f"template <int N> DEVICE void begin_registers({room}, {codes}, u64 x);",
    ]
    for size in sizes:
        made.append(stage(size, kind, room))
        made.append(single(size, kind, f"multiply_shared<{size}>({room}, u64 w, u64 x)", "more", False))
        made.append(single(size, kind, f"multiply_registers<{size}>({room}, {codes}, u64 x)", "more", True))
        made.append(single(size, kind, f"begin_registers<{size}>({room}, {codes}, u64 x)", "first", True))
    return "#pragma once\n" + "\n".join(made) + "\n"


FLAGS = ".reg .pred first, more; setp.ne.b32 first, 0, 0; setp.eq.b32 more, 0, 0;"


def instruction(size: int, kind: str, w: str, x: str, more: str, from_registers: bool,
                columns: bool = False) -> str:  # fmt: skip
    """d += w x^T, or d = w x^T where `more` is false. w: 64 rows, by descriptor or in registers; x: `size` rows.

    columns: x lies transposed, element by element of K; 16-bit kinds only.
    """
    shape, types = f"m64n{size}k{32 if kind == 'e4m3' else 16}", f"{kind}.{kind}"
    flags = "1, 1" if kind == "e4m3" else f"1, 1, {int(columns)}" if from_registers else f"1, 1, 0, {int(columns)}"
    sums = ", ".join(f"%{i}" for i in range(size // 2))
    return f"wgmma.mma_async.sync.aligned.{shape}.f32.{types} {{{sums}}}, {w}, {x}, {more}, {flags};"


def sums_of(size: int, begin: bool) -> str:
    return ", ".join(f'"{"=" if begin else "+"}f"(d[{i}])' for i in range(size // 2))


def single(size: int, kind: str, signature: str, more: str, from_registers: bool, columns: bool = False,
           prefix: str = "template <> ") -> str:  # fmt: skip
    at = size // 2
    w = "{" + ", ".join(f"%{at + i}" for i in range(4)) + "}" if from_registers else f"%{at}"
    made = instruction(size, kind, w, f"%{at + (4 if from_registers else 1)}", more, from_registers, columns)
    inputs = '"r"(a0), "r"(a1), "r"(a2), "r"(a3)' if from_registers else '"l"(w)'
    return (
        f"{prefix}__device__ __forceinline__ void {signature} {{\n"
        f'    asm volatile("{{{FLAGS} {made}}}"\n'
        f'        : {sums_of(size, more == "first")}\n        : {inputs}, "l"(x));\n}}'
    )


def stage(size: int, kind: str, room: str) -> str:
    """A new sum of the four products that 128 bytes of K are, waited for: one statement, with nothing put between."""
    at = size // 2
    lines = [
        f"{FLAGS} .reg .b64 w<4>, x<4>;",
        f"mov.b64 w0, %{at}; mov.b64 x0, %{at + 1};",
        *(f"add.s64 w{k}, w0, {2 * k}; add.s64 x{k}, x0, {2 * k};" for k in (1, 2, 3)),
        "wgmma.fence.sync.aligned;",
        *(instruction(size, kind, f"w{k}", f"x{k}", "more" if k else "first", False) for k in range(4)),
        "wgmma.commit_group.sync.aligned;",
        "wgmma.wait_group.sync.aligned 0;",
    ]
    body = "\n".join(f'        "{line}\\n"' for line in lines)
    return (
        f"template <> __device__ __forceinline__ void multiply_stage<{size}>({room}, u64 w, u64 x) {{\n"
        f'    asm volatile("{{\\n"\n{body}\n        "}}\\n"\n'
        f'        : {sums_of(size, True)}\n        : "l"(w), "l"(x)\n        : "memory");\n}}'
    )
