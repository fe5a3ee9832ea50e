"""The assembly that decodes weights, which the interpreter does not reach: run here instruction by instruction.

The text is taken from the kernels' source. Instructions as the PTX ISA defines them (prmt: selector nibbles choose
among the eight bytes of two registers, or with the top bit set repeat the sign; lop3: a truth table of three bits).
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from pathlib import Path

import moesaic.kernels
from moesaic.formats import e2m1, nibbles

SOURCE = (Path(moesaic.kernels.__file__).parent / "_triton" / "bits.py").read_text()
MASK = 0xFFFFFFFF


def assembly(function: str) -> list[list[str]]:
    """The instructions of a function, each as its words."""
    text = re.search(rf'def {function}\(.*?"""\{{(.*?)\}}"""', SOURCE, re.DOTALL)
    assert text, function
    lines = [line.strip() for line in text[1].split(";")]
    return [re.split(r"[\s,]+", line) for line in lines if line and not line.startswith(".reg")]


def prmt(a: int, b: int, selector: int) -> int:
    every = [(a >> 8 * i) & 255 for i in range(4)] + [(b >> 8 * i) & 255 for i in range(4)]
    found = 0
    for i in range(4):
        nibble = (selector >> 4 * i) & 15
        byte = every[nibble & 7]
        found |= ((255 if byte & 128 else 0) if nibble & 8 else byte) << 8 * i
    return found


def lop3(a: int, b: int, c: int, table: int) -> int:
    bits = ((table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32))
    return sum(bits)


COMPUTE: dict[str, Callable[..., int]] = {
    "prmt.b32": prmt, "lop3.b32": lop3, "and.b32": lambda a, b: a & b, "add.u32": lambda a, b: a + b & MASK,
    "shl.b32": lambda a, n: a << n & MASK, "shr.b32": lambda a, n: a >> n, "shr.u32": lambda a, n: a >> n,
}  # fmt: skip


def run(function: str, word: int, outputs: int) -> list[int]:
    """The output registers for one input register of four packed bytes."""
    registers = {f"${outputs}": word}
    for name, target, *operands in assembly(function):
        values = [registers[each] if each in registers else int(each, 0) for each in operands]
        registers[target] = COMPUTE[name](*values)
    return [registers[f"${i}"] for i in range(outputs)]


WORDS = [sum((4 * i + j) % 256 << 8 * (j ^ i % 4) for j in range(4)) for i in range(64)]
"""Every byte once, in every place of a word in turn."""


def bytes_of(word: int) -> Tensor:
    return torch.tensor([word >> 8 * i & 255 for i in range(4)], dtype=torch.uint8)


def bf16(*registers: int) -> Tensor:
    halves = [register >> 16 * i & 0xFFFF for register in registers for i in range(2)]
    return torch.tensor(halves).to(torch.uint16).view(torch.bfloat16).double()


def test_e4m3() -> None:
    for word in WORDS:
        codes = bytes_of(word)
        codes[(codes & 127) == 127] = 0  # NaNs: a checkpoint with one is refused
        word = sum(int(code) << 8 * i for i, code in enumerate(codes))
        assert torch.equal(bf16(*run("e4m3", word, 2)), codes.view(torch.float8_e4m3fn).double() * 2.0**-120)


def test_e2m1() -> None:
    for word in WORDS:
        a, b, c, d = run("e2m1_pairs", word, 4)
        values = e2m1.dequantize(bytes_of(word)).double() * 2.0**-126
        assert torch.equal(torch.stack([bf16(a, b), bf16(c, d)], 1).flatten(), values)


def test_int4() -> None:
    for word in WORDS:
        codes = nibbles.unpack(bytes_of(word)).double()
        a, b, c, d = run("int4_pairs", word, 4)
        assert torch.equal(torch.stack([bf16(a, b), bf16(c, d)], 1).flatten(), codes + 128)
        low, high = (bytes_of(register) for register in run("int4_e4m3_pairs", word, 2))
        assert torch.equal(torch.stack([low, high], 1).flatten().view(torch.float8_e4m3fn).double(), codes - 8)
