"""The KV cache in FP8 (`fp8`): E4M3 codes with a power of two per part of a row, in the row itself.

A row is what one token leaves behind in one layer: the keys of all heads, then the values; or, for latent attention,
the latent, then the rotary key. Each coded *part* (contracts/spec.py: KVParts) is scaled by itself, token by token,
when it is written:

    codes of all coded parts | plain elements in BF16 | one UE8M0 exponent per part | zeros up to 16 bytes

- Per token and head, not per tensor: E4M3 keeps a relative precision of 2^-4 over 2^15 only, and heads, or tokens,
  differ by more. Nothing is calibrated, nothing saturates (exponents by the `ceil` rule of formats/mx.py), and a row
  never changes when others come.
- A power of two, not amax / 448: as precise, since codes are floating-point numbers; a byte instead of four; and exact
  for whoever multiplies by it: a code times its power is a BF16 number, and so is a weight of attention times a power.
- The rotary key stays in BF16: it is a ninth of a latent row, and rounding it costs more than rounding all the rest
  (benchmarks/kv_format.py).

Zeros give zeros, and a row of zero bytes is a row of zeros. A coded part that holds NaN or Inf is NaN as a whole.
Letters: T tokens, W elements of a row, X its bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.contracts.spec import KVParts
from moesaic.formats import e4m3, mx


def encode(rows_TW: Tensor, parts: KVParts) -> Tensor:
    """Any float rows -> UINT8 [T, X]."""
    *each, plain = rows_TW.float().split([*parts.coded, parts.plain], -1)
    codes, exponents = [], []
    for part in each:
        exponent = mx.exponents(part.abs().amax(-1, keepdim=True), e4m3.MAX, "ceil")
        codes.append(e4m3.cast(part * inverse(exponent)).view(torch.uint8))
        exponents.append(exponent)
    stored = torch.cat([*codes, plain.to(torch.bfloat16).view(torch.uint8), *exponents], -1)
    return torch.nn.functional.pad(stored, (0, parts.fp8_bytes - stored.shape[-1]))


def inverse(exponent: Tensor) -> Tensor:
    """2^-e of UE8M0 codes; no part of finite numbers has the code 254, so the result is normal. NaN for 255."""
    bits = (254 - exponent.int()) << 23
    return bits.masked_fill_(exponent == mx.NAN, 0x7FC00000).view(torch.float32)


def decode(rows: Tensor, parts: KVParts) -> Tensor:
    """UINT8 [..., X] -> FP32 [..., W]."""
    width, at = sum(parts.coded), parts.exponents_at
    values = rows[..., :width].view(torch.float8_e4m3fn).float()
    scales = mx.decode_scale(rows[..., at : at + len(parts.coded)])
    each = [part * scales[..., i : i + 1] for i, part in enumerate(values.split(list(parts.coded), -1))]
    return torch.cat([*each, rows[..., width:at].contiguous().view(torch.bfloat16).float()], -1)
