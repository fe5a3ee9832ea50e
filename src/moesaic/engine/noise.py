"""Counter-based exponential noise: a pure function of (seed, position, token id).

Nothing here has state, so a request repeats whatever runs beside it, after preemption, and for any subset of the
vocabulary that is looked at. All integers are SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014), in wrapping 64-bit arithmetic, which is the same on every device:

    stream(key)[i] = mix(key + (i + 1) * GAMMA)          the i-th output of a SplitMix64 generator started at `key`
    key(seed, position) = stream(stream(seed)[0])[position]
    word(seed, position, token) = stream(key)[token]

    uniform = ((word >> 12) + 1/2) / 2^52                exact in FP64, never 0 nor 1
    exponential = -log(uniform)                          FP64, so that devices can differ in the last of 53 bits only

Legend: R rows, K candidate tokens of a row.
"""

from __future__ import annotations

from torch import Tensor

_MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15
_STEPS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))  # (shift, multiplier); a last shift of 31 follows


def row_key(seed: int, position: int) -> int:
    """The unsigned 64-bit key of one row. `seed` may be any integer; it is taken modulo 2^64."""
    return _mix(_mix(seed + GAMMA) + (position + 1) * GAMMA)


def words(key_R: Tensor, token_RK: Tensor) -> Tensor:
    """The random 64-bit word of each (row, token), as int64 bits [R, K]. `token_RK` (int64) may be [1, K] or [K]."""
    word_RK = key_R[:, None] + (token_RK + 1) * _signed(GAMMA)
    for shift, multiplier in _STEPS:
        _xor_shifted_(word_RK, shift).mul_(_signed(multiplier))
    return _xor_shifted_(word_RK, 31)


def uniforms(key_R: Tensor, token_RK: Tensor) -> Tensor:
    """FP64 uniforms in the open interval (0, 1), [R, K]."""
    return _shifted(words(key_R, token_RK), 12).double().add_(0.5).mul_(2.0**-52)


def exponentials(key_R: Tensor, token_RK: Tensor) -> Tensor:
    """FP64 unit exponential noise [R, K], within [1.1e-16, 36.8]: argmax(p / noise) is a draw from p."""
    return uniforms(key_R, token_RK).log_().neg_()


def _mix(word: int) -> int:
    word &= _MASK
    for shift, multiplier in _STEPS:
        word = ((word ^ (word >> shift)) * multiplier) & _MASK
    return word ^ (word >> 31)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _shifted(word: Tensor, shift: int) -> Tensor:
    """Logical right shift: torch's `>>` on int64 copies the sign, the mask takes the copies away."""
    return (word >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def _xor_shifted_(word: Tensor, shift: int) -> Tensor:
    return word.bitwise_xor_(_shifted(word, shift))
