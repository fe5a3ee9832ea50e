"""Procedural tasks with worked steps: what `tiny` is trained on and what `moesaic eval` measures.

Train and test never share a prompt: the split is a function of the prompt itself (its SHA-256), so a
prompt belongs to exactly one split whatever the seed. Generators use only `random.Random` seeded with a
string, so the same call gives the same items in every process.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Literal

from moesaic.tasks import arithmetic, calendar, letters, lists, logic, stories
from moesaic.tasks.base import Item

__all__ = ["FAMILIES", "Item", "Split", "extract", "grade", "items", "split_of", "stream"]

Split = Literal["train", "test"]

FAMILIES: Mapping[str, Callable[[random.Random], Item]] = MappingProxyType(
    {
        "addition": arithmetic.addition,
        "subtraction": arithmetic.subtraction,
        "multiplication": arithmetic.multiplication,
        "chain": arithmetic.chain,
        "compare": arithmetic.compare,
        "units": arithmetic.units,
        "sort_numbers": lists.sort_numbers,
        "sort_words": lists.sort_words,
        "extreme": lists.extreme,
        "count_letter": letters.count_letter,
        "reverse_word": letters.reverse_word,
        "edge_letters": letters.edge_letters,
        "weekday": calendar.weekday,
        "clock": calendar.clock,
        "brackets": logic.brackets,
        "truth": logic.truth,
        "swaps": logic.swaps,
        "story": stories.story,
    }
)

_TEST_SHARE = 8  # one prompt in eight is held out
_MAX_TRIES = 200  # rejections in a row that mean a family has run dry


def split_of(prompt: str) -> Split:
    """The only split in which this prompt may appear."""
    return "test" if hashlib.sha256(prompt.encode()).digest()[0] % _TEST_SHARE == 0 else "train"


def stream(family: str, split: Split, rng: random.Random) -> Iterator[Item]:
    """Endless items of one family and split, with repeats possible. Raises KeyError on an unknown family."""
    generate = FAMILIES[family]
    while True:
        item = generate(rng)
        if split_of(item.prompt) == split:
            yield item


def items(family: str, split: Split, count: int, seed: int = 0) -> list[Item]:
    """`count` items with different prompts. The same arguments always give the same list.

    Raises KeyError on an unknown family, ValueError if the family has too few prompts for `count`.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    found: dict[str, Item] = {}
    tries = 0
    for item in stream(family, split, random.Random(f"{family}/{split}/{seed}")):
        if len(found) >= count:
            break
        tries = tries + 1 if item.prompt in found else 0
        if tries > _MAX_TRIES:
            raise ValueError(f"{family}/{split} has fewer than {count} different prompts; ask for at most {len(found)}")
        found.setdefault(item.prompt, item)
    return list(found.values())


def extract(completion: str) -> str | None:
    """The rest of the line after the last ``Answer:``, or None if there is none."""
    _, mark, tail = completion.rpartition("Answer:")
    if not mark:
        return None
    lines = tail.strip().splitlines()
    return lines[0].strip() if lines else ""


def grade(item: Item, completion: str) -> bool:
    """Exact match of the extracted answer."""
    return extract(completion) == item.answer
