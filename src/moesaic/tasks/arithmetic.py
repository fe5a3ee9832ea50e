"""Arithmetic with every step written out: carries, borrows, chains, decimals, units."""

from __future__ import annotations

import random

from moesaic.tasks.base import Item, make, pick_number


def _ask(rng: random.Random, sign: str, a: int, b: int, spoken: list[str]) -> str:
    """A question about ``a sign b``, in symbols or in one of the spoken forms."""
    symbols = ["What is {a} {s} {b}?", "Compute {a} {s} {b}.", "What is {a}{s}{b}?", "{a} {s} {b} = ?", "{a}{s}{b}"]
    return rng.choice(spoken if rng.random() < 0.5 else symbols).format(a=a, b=b, s=sign)


def _column(number: int, place: int) -> int:
    return number // 10**place % 10


def addition(rng: random.Random) -> Item:
    """Sum of two numbers of up to five digits, column by column from the right."""
    a, b = pick_number(rng, 1, 5), pick_number(rng, 1, 5)
    prompt = _ask(rng, "+", a, b, ["Add {a} and {b}.", "What is the sum of {a} and {b}?", "What is {a} plus {b}?"])
    lines, carry, done = ["Add column by column from the right."], 0, ""
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = _column(a, place), _column(b, place)
        total = x + y + carry
        done = f"{total % 10}{done}"
        lines.append(f"{x}+{y}+{carry}={total}, write {total % 10}, carry {total // 10}: {done}")
        carry = total // 10
    if carry:
        lines.append(f"carry {carry}: {carry}{done}")
    return make("addition", prompt, lines, a + b)


def subtraction(rng: random.Random) -> Item:
    """Difference (never negative) of two numbers of up to five digits, with borrows."""
    a, b = sorted((pick_number(rng, 1, 5), pick_number(rng, 1, 5)), reverse=True)
    prompt = _ask(rng, "-", a, b, ["Subtract {b} from {a}.", "How much is {a} minus {b}?", "What is {a} minus {b}?"])
    lines, borrow, done = ["Subtract column by column from the right."], 0, ""
    for place in range(len(str(a))):
        x, y = _column(a, place), _column(b, place)
        digit = x - y - borrow
        took = 1 if digit < 0 else 0
        lend = f"1{x}" if took else f"{x}"
        done = f"{digit % 10}{done}"
        lines.append(f"{lend}-{y}-{borrow}={digit % 10}, borrow {took}: {done}")
        borrow = took
    return make("subtraction", prompt, lines, a - b)


def multiplication(rng: random.Random) -> Item:
    """Product of a number of up to five digits and a single digit."""
    a, b = pick_number(rng, 2, 5), rng.randint(2, 9)
    prompt = _ask(rng, "*", a, b, ["Multiply {a} by {b}.", "What is {a} times {b}?", "How much is {a} times {b}?"])
    lines, carry, done = ["Multiply digit by digit from the right."], 0, ""
    for place in range(len(str(a))):
        x = _column(a, place)
        total = x * b + carry
        done = f"{total % 10}{done}"
        lines.append(f"{x}*{b}+{carry}={total}, write {total % 10}, carry {total // 10}: {done}")
        carry = total // 10
    if carry:
        lines.append(f"carry {carry}: {carry}{done}")
    return make("multiplication", prompt, lines, a * b)


def chain(rng: random.Random) -> Item:
    """Three to six operations applied in turn; values stay between 0 and 200."""
    value = rng.randint(1, 50)
    story, lines = [f"Start with {value}."], []
    for _ in range(rng.randint(3, 6)):
        kind = rng.choice(["add", "subtract", "multiply"])
        if kind == "multiply" and 1 <= value <= 40:
            n = rng.randint(2, 5)
            story.append(f"Multiply by {n}.")
            lines.append(f"{value} * {n} = {value * n}")
            value *= n
        elif (kind == "add" and value <= 150) or value == 0:
            n = rng.randint(1, 50)
            story.append(f"Add {n}.")
            lines.append(f"{value} + {n} = {value + n}")
            value += n
        else:
            n = rng.randint(1, min(value, 50))
            story.append(f"Subtract {n}.")
            lines.append(f"{value} - {n} = {value - n}")
            value -= n
    ask = rng.choice(["What is the result?", "What do you get?", "Which number is left?"])
    return make("chain", " ".join([*story, ask]), lines, value)


def compare(rng: random.Random) -> Item:
    """The larger or smaller of two different decimals: 9.11 is less than 9.9."""
    whole = pick_number(rng, 1, 2)
    other = whole if rng.random() < 0.7 else pick_number(rng, 1, 2)
    one, two = (f"{w}.{_decimals(rng)}" for w in (whole, other))
    width = max(len(one.split(".")[1]), len(two.split(".")[1]))
    keys = [_padded(one, width), _padded(two, width)]
    if keys[0] == keys[1]:
        return compare(rng)
    larger = rng.random() < 0.5
    word = rng.choice(["larger", "greater", "bigger"]) if larger else rng.choice(["smaller", "less"])
    ask = rng.choice(["Which is {w}, {a} or {b}?", "Which number is {w}: {a} or {b}?", "{a} or {b}, which is {w}?"])
    prompt = ask.format(w=word, a=one, b=two)
    first = (float(keys[0]) > float(keys[1])) == larger
    sign = ">" if float(keys[0]) > float(keys[1]) else "<"
    lines = [f"With {width} decimals: {keys[0]} and {keys[1]}."]
    lines += _compare_steps(keys[0], keys[1])
    lines += [f"So {one} {sign} {two}."]
    return make("compare", prompt, lines, one if first else two)


def _decimals(rng: random.Random) -> str:
    width = rng.randint(1, 3)
    return "".join(str(rng.randint(0, 9)) for _ in range(width - 1)) + str(rng.randint(1, 9))


def _padded(number: str, width: int) -> str:
    whole, decimals = number.split(".")
    return f"{whole}.{decimals.ljust(width, '0')}"


def _compare_steps(one: str, two: str) -> list[str]:
    whole1, dec1 = one.split(".")
    whole2, dec2 = two.split(".")
    if whole1 != whole2:
        return [f"{whole1} {'>' if int(whole1) > int(whole2) else '<'} {whole2}"]
    steps = [f"{whole1} = {whole2}"]
    for x, y in zip(dec1, dec2, strict=True):
        sign = "=" if x == y else (">" if x > y else "<")
        steps.append(f"{x} {sign} {y}")
        if sign != "=":
            break
    return steps


UNITS: tuple[tuple[str, str, int], ...] = (
    ("kilometers", "meters", 1000),
    ("meters", "centimeters", 100),
    ("centimeters", "millimeters", 10),
    ("kilograms", "grams", 1000),
    ("liters", "milliliters", 1000),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("feet", "inches", 12),
    ("yards", "feet", 3),
    ("dollars", "cents", 100),
    ("years", "months", 12),
)


def units(rng: random.Random) -> Item:
    """A mixed quantity expressed in its smaller unit."""
    big, small, factor = rng.choice(UNITS)
    n, extra = rng.randint(2, 30), rng.randint(1, factor - 1)
    prompt = rng.choice(
        [
            "How many {s} are {n} {b} and {e} {s}?",
            "Convert {n} {b} and {e} {s} to {s}.",
            "Express {n} {b} {e} {s} in {s}.",
        ]
    ).format(s=small, b=big, n=n, e=extra)
    lines = [
        f"There are {factor} {small} in the larger unit.",
        f"{n} * {factor} = {n * factor}",
        f"{n * factor} + {extra} = {n * factor + extra}",
    ]
    return make("units", prompt, lines, n * factor + extra)
