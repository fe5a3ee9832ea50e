"""Number formats on the device: E4M3, E2M1, UE8M0 and 4-bit codes, bit by bit (`formats/` is the law they follow).

`WIDE`: Triton's interpreter keeps BF16 as raw 16-bit integers, so there every product is taken in FP32 instead; the
operands are the same numbers, since all of them fit BF16.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

WIDE = tl.constexpr(bool(knobs.runtime.interpret))
E4M3_MAX = tl.constexpr(448.0)
E2M1_MAX = tl.constexpr(6.0)
TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal FP32 number


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
def e4m3(data):
    """E4M3 -> operands; never NaN. As bits of BF16 a code is a number 2^120 too small: shifted in pairs, and exact."""
    if WIDE:
        return data.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, d, up;
            mov.b32 up, 0x7b807b80;
            prmt.b32 a, $2, 0, 0x1404;
            prmt.b32 b, $2, 0, 0x3424;
            shr.b32 c, a, 4;
            shr.b32 d, b, 4;
            and.b32 c, c, 0x07f007f0;
            and.b32 d, d, 0x07f007f0;
            lop3.b32 a, a, 0x80008000, c, 0xEA;
            lop3.b32 b, b, 0x80008000, d, 0xEA;
            mul.rn.bf16x2 $0, a, up;
            mul.rn.bf16x2 $1, b, up;
            }""",
            "=r,=r,r", [data], dtype=tl.bfloat16, is_pure=True, pack=4,
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
def small_integer(n, zero):
    """n - zero as operands, for integers 0..15: 128 + n is BF16's bit pattern 0x4300 + n."""
    if WIDE:
        return n.to(tl.float32) - zero.to(tl.float32)
    else:
        high = (n.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True)
        low = (zero.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True)
        return high - low


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
