"""Word problems in our own templates: two to four steps, numbers below 1000."""
# ruff: noqa: E501

from __future__ import annotations

import random
from collections.abc import Callable

from moesaic.tasks.base import Item, make
from moesaic.tasks.words import NAMES

THINGS: tuple[str, ...] = (
    "apples", "books", "candles", "cards", "coins", "cookies", "eggs", "marbles", "oranges", "pencils",
    "roses", "shells", "stamps", "stickers", "toys",
)  # fmt: skip

Story = tuple[str, list[str], int]


def _gift(rng: random.Random, name: str, other: str, thing: str) -> Story:
    a, b = rng.randint(5, 90), rng.randint(2, 60)
    c = rng.randint(1, a + b - 1)
    text = f"{name} has {a} {thing}. {other} gives {name} {b} more. Then {name} loses {c}. How many {thing} does {name} have now?"
    return text, [f"After the gift: {a} + {b} = {a + b}", f"After the loss: {a + b} - {c} = {a + b - c}"], a + b - c


def _boxes(rng: random.Random, name: str, other: str, thing: str) -> Story:
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    c = rng.randint(1, a * b - 1)
    text = f"{name} buys {a} boxes with {b} {thing} each and gives {c} {thing} to {other}. How many {thing} are left?"
    return text, [f"In the boxes: {a} * {b} = {a * b}", f"Left: {a * b} - {c} = {a * b - c}"], a * b - c


def _twice(rng: random.Random, name: str, other: str, thing: str) -> Story:
    a, k = rng.randint(2, 40), rng.randint(2, 5)
    text = f"{name} has {a} {thing}. {other} has {k} times as many. How many {thing} do they have together?"
    return text, [f"{other}: {a} * {k} = {a * k}", f"Together: {a} + {a * k} = {a + a * k}"], a + a * k


def _more(rng: random.Random, name: str, other: str, thing: str) -> Story:
    a, b = rng.randint(2, 90), rng.randint(2, 60)
    text = f"{name} has {a} {thing}. {other} has {b} more than {name}. How many {thing} do they have together?"
    return text, [f"{other}: {a} + {b} = {a + b}", f"Together: {a} + {a + b} = {2 * a + b}"], 2 * a + b


def _share(rng: random.Random, name: str, other: str, thing: str) -> Story:
    k, each = rng.randint(2, 9), rng.randint(2, 12)
    used = rng.randint(1, 40)
    total = k * each + used
    text = f"{name} has {total} {thing}, keeps {used} and shares the rest equally among {k} friends. How many {thing} does each friend get?"
    return text, [f"To share: {total} - {used} = {k * each}", f"Each: {k * each} / {k} = {each}"], each


def _price(rng: random.Random, name: str, other: str, thing: str) -> Story:
    a, p = rng.randint(2, 12), rng.randint(2, 9)
    b, q = rng.randint(2, 12), rng.randint(2, 9)
    text = (
        f"{name} buys {a} pens at {p} dollars each and {b} bags at {q} dollars each. How many dollars does {name} pay?"
    )
    lines = [f"Pens: {a} * {p} = {a * p}", f"Bags: {b} * {q} = {b * q}", f"Total: {a * p} + {b * q} = {a * p + b * q}"]
    return text, lines, a * p + b * q


def _change(rng: random.Random, name: str, other: str, thing: str) -> Story:
    a, p = rng.randint(2, 9), rng.randint(2, 10)
    paid = 100 if a * p >= 50 or rng.random() < 0.3 else 50
    text = f"{name} buys {a} {thing} for {p} dollars each and pays with {paid} dollars. How many dollars does {name} get back?"
    return text, [f"Cost: {a} * {p} = {a * p}", f"Back: {paid} - {a * p} = {paid - a * p}"], paid - a * p


def _days(rng: random.Random, name: str, other: str, thing: str) -> Story:
    a, d, b = rng.randint(2, 15), rng.randint(2, 10), rng.randint(1, 60)
    text = f"{name} makes {a} {thing} a day for {d} days. {name} already had {b}. How many {thing} does {name} have in the end?"
    return text, [f"Made: {a} * {d} = {a * d}", f"In the end: {b} + {a * d} = {b + a * d}"], b + a * d


def _rows(rng: random.Random, name: str, other: str, thing: str) -> Story:
    r, s, k = rng.randint(2, 12), rng.randint(2, 12), rng.randint(2, 4)
    text = f"A hall has {r} rows of {s} seats. {k} seats in every row are taken by friends of {name}. How many seats are free?"
    if k >= s:
        return _rows(rng, name, other, thing)
    return text, [f"Free in a row: {s} - {k} = {s - k}", f"Free: {r} * {s - k} = {r * (s - k)}"], r * (s - k)


def _bus(rng: random.Random, name: str, other: str, thing: str) -> Story:
    a, b, c, d = rng.randint(10, 60), rng.randint(1, 9), rng.randint(1, 20), rng.randint(1, 9)
    text = f"A bus carries {a} people. At one stop {b} get off and {c} get on. At the next stop {d} get off. How many people are on the bus?"
    one, two = a - b, a - b + c
    if two < d:
        return _bus(rng, name, other, thing)
    return text, [f"{a} - {b} = {one}", f"{one} + {c} = {two}", f"{two} - {d} = {two - d}"], two - d


TEMPLATES: tuple[Callable[[random.Random, str, str, str], Story], ...] = (
    _gift, _boxes, _twice, _more, _share, _price, _change, _days, _rows, _bus,
)  # fmt: skip


def story(rng: random.Random) -> Item:
    """A word problem from one of ten templates."""
    name, other = rng.sample(NAMES, 2)
    text, lines, answer = rng.choice(TEMPLATES)(rng, name, other, rng.choice(THINGS))
    return make("story", text, lines, answer)
