"""Number formats on the device: E4M3, E2M1, UE8M0 and 4-bit codes, bit by bit (`formats/` is the law they follow).

`WIDE`: Triton's interpreter keeps BF16 as raw 16-bit integers, so there every product is taken in FP32 instead; the
operands are the same numbers, since all of them fit BF16.

Where no block scale follows, the assembly is marked impure on purpose: the compiler then decodes rows where they were
loaded, 16 bytes per thread, and moves the operands; otherwise it would move bytes, one by one, to where an operand's
register is. Block scales have the same effect, and for Blackwell impure code in front of them does not compile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

WIDE = tl.constexpr(bool(knobs.runtime.interpret))
E4M3_MAX = tl.constexpr(448.0)
E2M1_MAX = tl.constexpr(6.0)
TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal FP32 number
# The bits of a code, moved to where BF16 has them, are a number too small by a power of two; exact, since multipliers
# know subnormals. Half of that power goes into the operand's scale, half into the sum of the product: in between,
# values have 2^60 of room either way, and no weight comes near.
TINY_E4M3 = tl.constexpr(1.0 if WIDE.value else 2.0**-120)
TINY_E2M1 = tl.constexpr(1.0 if WIDE.value else 2.0**-126)


@triton.jit
def to_operand(x):
    """Any float -> what the tensor core multiplies."""
    if WIDE:
        return x.to(tl.float32)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def e8m0(u):
    """UE8M0 codes -> FP32: 2^(u - 127), NaN for 255; 0 is a subnormal, exactly 2^-127."""
    bits = u.to(tl.int32)
    bits = tl.where(bits == 255, 0x7FC00000, tl.where(bits == 0, 1 << 22, bits << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def e4m3(data, PURE: tl.constexpr):
    """E4M3 -> operands, TINY_E4M3 times what the codes stand for: as bits of BF16, shifted in pairs. Never NaN."""
    if WIDE:
        return data.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, d;
            prmt.b32 a, $2, 0, 0x1404;
            prmt.b32 b, $2, 0, 0x3424;
            shr.b32 c, a, 4;
            shr.b32 d, b, 4;
            and.b32 c, c, 0x07f007f0;
            and.b32 d, d, 0x07f007f0;
            lop3.b32 $0, a, 0x80008000, c, 0xEA;
            lop3.b32 $1, b, 0x80008000, d, 0xEA;
            }""",
            "=r,=r,r", [data], dtype=tl.bfloat16, is_pure=PURE, pack=4,
        )  # fmt: skip


@triton.jit
def e2m1(code):
    """4-bit E2M1 codes -> operands. The code's bits become the top of a number 2^126 too small, which is exact."""
    top = ((code & 8).to(tl.int16) << 12) | ((code & 7).to(tl.int16) << 6)
    if WIDE:
        return (top.to(tl.int32) << 16).to(tl.float32, bitcast=True) * 8.507059173023462e37
    else:
        return top.to(tl.bfloat16, bitcast=True) * tl.full((), 8.507059173023462e37, tl.bfloat16)


@triton.jit
def pairs(low, high):
    """[N, K] -> [N, 2 K], taking turns."""
    return tl.interleave(low, high)


@triton.jit
def e2m1_pairs(byte):
    """Two codes per byte, the first in the low nibble: [N, K] -> operands [N, 2 K], TINY_E2M1 times their values."""
    if WIDE:
        return pairs(e2m1(byte & 15), e2m1(byte >> 4))
    else:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, s, m;
            prmt.b32 a, $4, 0, 0x4140;
            prmt.b32 b, $4, 0, 0x4342;
            shl.b32 s, a, 12;
            shl.b32 m, a, 6;
            and.b32 m, m, 0x01c001c0;
            lop3.b32 $0, s, 0x80008000, m, 0xEA;
            shl.b32 s, b, 12;
            shl.b32 m, b, 6;
            and.b32 m, m, 0x01c001c0;
            lop3.b32 $1, s, 0x80008000, m, 0xEA;
            shl.b32 s, a, 8;
            shl.b32 m, a, 2;
            and.b32 m, m, 0x01c001c0;
            lop3.b32 $2, s, 0x80008000, m, 0xEA;
            shl.b32 s, b, 8;
            shl.b32 m, b, 2;
            and.b32 m, m, 0x01c001c0;
            lop3.b32 $3, s, 0x80008000, m, 0xEA;
            }""",
            "=r,=r,=r,=r,r", [byte], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip
        return pairs(low, high)


@triton.jit
def int4_pairs(byte):
    """Two codes n per byte -> operands 128 + n [N, 2 K]: BF16's bit pattern 0x4300 + n. The 128 is the caller's."""
    if WIDE:
        return pairs((byte & 15).to(tl.float32) + 128.0, (byte >> 4).to(tl.float32) + 128.0)
    else:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b;
            prmt.b32 a, $4, 0, 0x4140;
            prmt.b32 b, $4, 0, 0x4342;
            lop3.b32 $0, a, 0x000f000f, 0x43004300, 0xEA;
            lop3.b32 $1, b, 0x000f000f, 0x43004300, 0xEA;
            shr.b32 a, a, 4;
            shr.b32 b, b, 4;
            lop3.b32 $2, a, 0x000f000f, 0x43004300, 0xEA;
            lop3.b32 $3, b, 0x000f000f, 0x43004300, 0xEA;
            }""",
            "=r,=r,=r,=r,r", [byte], dtype=(tl.bfloat16, tl.bfloat16), is_pure=False, pack=4,
        )  # fmt: skip
        return pairs(low, high)


@triton.jit
def int4_e4m3_pairs(byte):
    """Two codes n per byte -> n - 8 in E4M3 [N, 2 K], by table: magnitudes of n < 8 and of n >= 8, four at a time.

    t holds 0x7f where a nibble's top bit is clear: it selects the table, and its successor's top bit is the sign.
    """
    low, high = tl.inline_asm_elementwise(
        """{
        .reg .b32 c, h, a, b, t, u, v;
        and.b32 c, $2, 0x77777777;
        and.b32 h, $2, 0x88888888;
        prmt.b32 a, 0x4A4C4E50, 0x38404448, c;
        prmt.b32 b, 0x44403800, 0x4E4C4A48, c;
        prmt.b32 t, 0x0000007f, 0, h;
        lop3.b32 u, a, t, b, 0xE2;
        add.u32 t, t, 0x01010101;
        lop3.b32 u, t, 0x80808080, u, 0xEA;
        shr.b32 c, c, 16;
        shr.b32 h, h, 16;
        prmt.b32 a, 0x4A4C4E50, 0x38404448, c;
        prmt.b32 b, 0x44403800, 0x4E4C4A48, c;
        prmt.b32 t, 0x0000007f, 0, h;
        lop3.b32 v, a, t, b, 0xE2;
        add.u32 t, t, 0x01010101;
        lop3.b32 v, t, 0x80808080, v, 0xEA;
        prmt.b32 $0, u, v, 0x6420;
        prmt.b32 $1, u, v, 0x7531;
        }""",
        "=r,=r,r", [byte], dtype=(tl.uint8, tl.uint8), is_pure=False, pack=4,
    )  # fmt: skip
    return pairs(low, high).to(tl.float8e4nv, bitcast=True)


@triton.jit
def to_e4m3(x):
    """FP32 -> E4M3, to nearest even, saturating; NaN stays NaN."""
    x = tl.minimum(tl.maximum(x, -E4M3_MAX, propagate_nan=tl.PropagateNan.ALL), E4M3_MAX,
                   propagate_nan=tl.PropagateNan.ALL)  # fmt: skip
    if WIDE:
        x = on_e4m3_grid(x)  # the interpreter's own cast does not round to nearest
    return x.to(tl.float8e4nv)


@triton.jit
def on_e4m3_grid(x):
    """FP32 within +-448 -> the nearest E4M3 value, ties to even, in FP32."""
    bits = x.to(tl.int32, bitcast=True)
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF
    small = (tl.abs(x) + 24576.0) - 24576.0  # 1.5 x 2^14: one unit of its last place is 2^-9, the subnormal step
    small = small.to(tl.int32, bitcast=True) | (bits & -2147483648)
    found = tl.where(tl.abs(x) < 0.015625, small, normal).to(tl.float32, bitcast=True)
    return tl.where(x != x, x, found)


@triton.jit
def divide(x, scale):
    """x / scale as IEEE has it (Triton's `/` is approximate); 0 where the scale is 0."""
    x, scale = tl.broadcast(x, scale)
    return tl.where(scale == 0, 0.0, tl.div_rn(x, tl.where(scale == 0, 1.0, scale)))


@triton.jit
def mx_exponent(amax, CARRY: tl.constexpr, EMAX: tl.constexpr):
    """FP32 magnitudes -> UE8M0 codes by the `ceil` rule, read off the bits (formats/mx.py); 255 for Inf and NaN."""
    bits = amax.to(tl.int32, bitcast=True)
    exponent = ((bits + CARRY) >> 23) - 127 - EMAX
    code = tl.minimum(tl.maximum(exponent, -127), 127) + 127
    return tl.where(bits >= 0x7F800000, 255, code)


@triton.jit
def mx_inverse(code):
    """2^-e of UE8M0 codes; no block of finite numbers has the code 254, so the result is normal. NaN for 255."""
    return tl.where(code == 255, 0x7FC00000, (254 - code) << 23).to(tl.float32, bitcast=True)


@triton.jit
def to_e2m1(x):
    """FP32 -> codes 0..15, to nearest with ties to the even code, saturating: counts the midpoints below |x|.

    A midpoint belongs to the even neighbour: it counts as passed where the code below it is odd.
    """
    size = tl.abs(x)
    rank = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    rank += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
    rank += (size > 5.0).to(tl.int32)
    sign = (x.to(tl.int32, bitcast=True) >> 28) & 8
    return rank | sign


@triton.jit
def magnitude(x):
    """|x|, and +0 for -0."""
    return tl.abs(x)
