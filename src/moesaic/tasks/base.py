"""One task item, and the small helpers that every generator uses."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """A question, its worked solution (ends with ``Answer: <answer>``) and the bare answer."""

    family: str
    prompt: str
    worked: str
    answer: str


Generator = Callable[[random.Random], Item]


def make(family: str, prompt: str, lines: Sequence[str], answer: str | int) -> Item:
    """Assemble an item; ``lines`` are the worked steps, one a line."""
    worked = "\n".join([*lines, f"Answer: {answer}"])
    return Item(family, prompt, worked, str(answer))


def pick_number(rng: random.Random, min_digits: int, max_digits: int) -> int:
    """A number whose digit count, not its value, is uniform: short numbers are as common as long ones."""
    digits = rng.randint(min_digits, max_digits)
    low = 0 if digits == 1 else 10 ** (digits - 1)
    return rng.randint(low, 10**digits - 1)
