"""Small logic: brackets, chains of truth tellers, objects that change hands."""

from __future__ import annotations

import random
from itertools import pairwise

from moesaic.tasks.base import Item, make
from moesaic.tasks.words import NAMES

PAIRS = {"(": ")", "[": "]", "{": "}"}
OBJECTS: tuple[str, ...] = ("ball", "book", "coin", "cup", "hat", "key", "lamp", "map", "pen", "ring")


def _balanced(rng: random.Random, pairs: int) -> str:
    """A balanced string by random insertion of nested or adjacent pairs."""
    text = ""
    for _ in range(pairs):
        opening = rng.choice("([{")
        at = rng.randint(0, len(text))
        text = text[:at] + opening + PAIRS[opening] + text[at:]
    return text


def brackets(rng: random.Random) -> Item:
    """Is a bracket string balanced? The stack is written after each bracket."""
    text = _balanced(rng, rng.randint(2, 7))
    if rng.random() < 0.6:
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(["", *"()[]{}"]) + text[at + 1 :]
    shown = " ".join(text)
    prompt = rng.choice(
        ["Are these brackets balanced: {t}?", "Is this bracket sequence balanced: {t}?", "Check the brackets: {t}"]
    ).format(t=shown)
    lines, stack = [], []
    for char in text:
        if char in PAIRS:
            stack.append(char)
        elif stack and PAIRS[stack[-1]] == char:
            stack.pop()
        else:
            lines.append(f"{char} does not match")
            return make("brackets", prompt, lines, "no")
        lines.append(f"{char} stack {' '.join(stack) if stack else 'empty'}")
    lines.append("The stack is " + ("empty." if not stack else "not empty."))
    return make("brackets", prompt, lines, "no" if stack else "yes")


def truth(rng: random.Random) -> Item:
    """Who tells the truth in a chain where each speaker judges the one before."""
    people = rng.sample(NAMES, rng.randint(3, 6))
    honest = rng.random() < 0.5
    story = [f"{people[0]} {'tells the truth' if honest else 'lies'}."]
    lines = [f"{people[0]}: {'truth' if honest else 'lie'}"]
    for before, speaker in pairwise(people):
        claim = rng.random() < 0.5
        story.append(f"{speaker} says {before} {'tells the truth' if claim else 'lies'}.")
        right = claim == honest
        lines.append(
            f"{speaker}: {before} is {'truth' if honest else 'lie'}, "
            f"said {'truth' if claim else 'lie'}, so {'truth' if right else 'lie'}"
        )
        honest = right
    prompt = " ".join([*story, f"Does {people[-1]} tell the truth?"])
    return make("truth", prompt, lines, "yes" if honest else "no")


def swaps(rng: random.Random) -> Item:
    """Three or four people swap objects in turn; the holdings are written after each swap."""
    people = rng.sample(NAMES, rng.randint(3, 4))
    held = rng.sample(OBJECTS, len(people))
    story = ", ".join(f"{p} has the {o}" for p, o in zip(people, held, strict=True)) + "."
    lines = [_holdings(people, held)]
    moves = []
    for _ in range(rng.randint(2, 5)):
        i, j = rng.sample(range(len(people)), 2)
        before = f"{people[i]} {held[i]}, {people[j]} {held[j]}"
        held[i], held[j] = held[j], held[i]
        after = f"{people[i]} {held[i]}, {people[j]} {held[j]}"
        moves.append(f"{people[i]} and {people[j]} swap.")
        lines.append(f"{before}, so {after}: {_holdings(people, held)}")
    who = rng.randrange(len(people))
    lines.append(f"At the end: {people[who]} {held[who]}")
    prompt = " ".join([story, *moves, f"What does {people[who]} have at the end?"])
    return make("swaps", prompt, lines, held[who])


def _holdings(people: list[str], held: list[str]) -> str:
    return ", ".join(f"{p} {o}" for p, o in zip(people, held, strict=True))
