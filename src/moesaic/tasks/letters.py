"""Letter tasks: the word is spelled out first, because a tokenizer hides its letters."""

from __future__ import annotations

import random

from moesaic.tasks.base import Item, make
from moesaic.tasks.words import any_word


def count_letter(rng: random.Random) -> Item:
    """How often a letter occurs in a word; two times in three it does occur."""
    word = any_word(rng)
    letter = rng.choice(word) if rng.random() < 0.67 else rng.choice("abcdefghijklmnopqrstuvwxyz")
    prompt = rng.choice(
        [
            "How many times does the letter {l} appear in {w}?",
            "Count the letter {l} in the word {w}.",
            "How many {l}'s are in {w}?",
        ]
    ).format(l=letter, w=word)
    lines, seen = [f"Look for {letter} in {word}."], 0
    for char in word:
        seen += char == letter
        lines.append(f"{char}: {seen}")
    return make("count_letter", prompt, lines, seen)


def reverse_word(rng: random.Random) -> Item:
    """A word spelled backwards."""
    word = any_word(rng, max_letters=10)
    prompt = rng.choice(["Reverse the word {w}.", "Spell {w} backwards.", "Write {w} in reverse."]).format(w=word)
    lines = [f"Forwards: {' '.join(word)}", f"Backwards: {' '.join(reversed(word))}"]
    return make("reverse_word", prompt, lines, word[::-1])


def edge_letters(rng: random.Random) -> Item:
    """The first or the last letters of three to six words, joined."""
    words = [any_word(rng, max_letters=10) for _ in range(rng.randint(3, 6))]
    edge = rng.choice(["first", "last"])
    prompt = rng.choice(
        [
            "Take the {e} letter of each word and join them: {w}.",
            "Join the {e} letters of these words: {w}.",
            "What do the {e} letters of these words spell: {w}?",
        ]
    ).format(e=edge, w=", ".join(words))
    letters = [w[0] if edge == "first" else w[-1] for w in words]
    lines = [
        f"{word}: {' '.join(word)}, {edge} {letter}: {''.join(letters[: i + 1])}"
        for i, (word, letter) in enumerate(zip(words, letters, strict=True))
    ]
    return make("edge_letters", prompt, lines, "".join(letters))
