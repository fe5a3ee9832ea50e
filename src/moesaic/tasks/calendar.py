"""Clock and weekday arithmetic."""

from __future__ import annotations

import random

from moesaic.tasks.base import Item, make

DAYS: tuple[str, ...] = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def weekday(rng: random.Random) -> Item:
    """The weekday up to 300 days ahead or back: reduce modulo 7, then walk."""
    start, count, ahead = rng.randrange(7), rng.randint(2, 300), rng.random() < 0.6
    if ahead:
        ask = rng.choice(
            [
                "Today is {d}. What day is it in {n} days?",
                "If today is {d}, what day of the week will it be {n} days from now?",
                "What day comes {n} days after {d}?",
            ]
        )
    else:
        ask = rng.choice(["Today is {d}. What day was it {n} days ago?", "What day comes {n} days before {d}?"])
    weeks, rest = divmod(count, 7)
    step = 1 if ahead else -1
    walk = [DAYS[(start + step * i) % 7] for i in range(rest + 1)]
    lines = [
        f"{weeks} * 7 = {weeks * 7}",
        f"{count} - {weeks * 7} = {rest}",
        f"Move {rest} {'forward' if ahead else 'back'}: {walk[0]}"
        + "".join(f", {i} {d}" for i, d in enumerate(walk[1:], 1)),
    ]
    return make("weekday", ask.format(d=DAYS[start], n=count), lines, walk[-1])


def clock(rng: random.Random) -> Item:
    """A 24-hour clock time plus hours and minutes."""
    hour, minute = rng.randrange(24), rng.randrange(60)
    hours, minutes = rng.randint(1, 12), rng.randint(1, 59)
    prompt = rng.choice(
        [
            "It is {t}. What time is it in {h} hours and {m} minutes?",
            "What time is it {h} hours and {m} minutes after {t}?",
            "A train leaves at {t} and travels {h} hours and {m} minutes. When does it arrive?",
        ]
    ).format(t=f"{hour:02}:{minute:02}", h=hours, m=minutes)
    total, carry = minute + minutes, 0
    lines = [f"Minutes: {minute} + {minutes} = {total}"]
    if total >= 60:
        lines.append(f"{total} - 60 = {total - 60}, carry 1")
        total, carry = total - 60, 1
    end = hour + hours + carry
    lines.append(f"Hours: {hour} + {hours} + {carry} = {end}")
    if end >= 24:
        lines.append(f"{end} - 24 = {end - 24}")
        end -= 24
    return make("clock", prompt, lines, f"{end:02}:{total:02}")
