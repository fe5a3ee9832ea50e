"""Lists: sorting by repeated selection, and the largest or smallest element."""

from __future__ import annotations

import random

from moesaic.tasks.base import Item, make
from moesaic.tasks.words import WORDS


def sort_numbers(rng: random.Random) -> Item:
    """Three to eight different numbers below 100, sorted up or down."""
    numbers = rng.sample(range(100), rng.randint(3, 8))
    down = rng.random() < 0.4
    order = (
        rng.choice(["descending order", "from largest to smallest"])
        if down
        else rng.choice(["ascending order", "from smallest to largest"])
    )
    joined = ", ".join(map(str, numbers))
    where = f"in {order}" if "order" in order else order
    prompt = rng.choice(["Sort {n} {o}.", "Put these numbers {o}: {n}."]).format(n=joined, o=where)
    lines, left = [], list(numbers)
    while len(left) > 1:
        best = max(left) if down else min(left)
        left.remove(best)
        lines.append(f"{'largest' if down else 'smallest'} {best}, left {', '.join(map(str, left))}")
    return make("sort_numbers", prompt, lines, ", ".join(map(str, sorted(numbers, reverse=down))))


def sort_words(rng: random.Random) -> Item:
    """Three to six listed words in alphabetical order; their first three letters differ."""
    words: list[str] = []
    for word in rng.sample(WORDS, 12):
        if all(word[:3] != other[:3] for other in words):
            words.append(word)
    words = words[: rng.randint(3, 6)]
    prompt = rng.choice(
        ["Sort these words alphabetically: {w}.", "Put these words in alphabetical order: {w}."]
    ).format(w=", ".join(words))
    left = [f"{i} {word}" for i, word in enumerate(words, 1)]
    lines = ["Starts: " + ", ".join(f"{entry} {'-'.join(entry.split()[1][:3])}" for entry in left)]
    while len(left) > 1:
        best = min(left, key=lambda entry: entry.split()[1])
        left.remove(best)
        lines.append(f"first {'-'.join(best.split()[1][:3])} {best}, left {', '.join(left)}")
    return make("sort_words", prompt, lines, ", ".join(sorted(words)))


def extreme(rng: random.Random) -> Item:
    """The largest or smallest of four to nine different numbers below 1000."""
    numbers = rng.sample(range(1000), rng.randint(4, 9))
    largest = rng.random() < 0.5
    prompt = rng.choice(
        ["What is the {k} number in this list: {n}?", "Find the {k} of these numbers: {n}.", "Which is the {k}: {n}?"]
    ).format(k="largest" if largest else "smallest", n=", ".join(map(str, numbers)))
    best, lines = numbers[0], [f"Begin with {numbers[0]}."]
    for number in numbers[1:]:
        sign = ">" if number > best else "<"
        best = max(best, number) if largest else min(best, number)
        lines.append(f"{number} {sign} {lines[-1].split()[-1].rstrip('.')}, keep {best}")
    return make("extreme", prompt, lines, best)
