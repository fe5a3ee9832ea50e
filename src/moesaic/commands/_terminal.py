"""What a terminal may be sent."""

from __future__ import annotations

import sys


def visible(text: str) -> str:
    """`text` as it is, unless it goes to a terminal: a model's words must not move the cursor or rename the window."""
    if not sys.stdout.isatty():
        return text
    return "".join(char if char in "\n\t" or char.isprintable() else ascii(char)[1:-1] for char in text)
