"""Storage that is rewritten where it is, in steps: all of them, or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Step = tuple[Callable[[], None], Callable[[], None]]
"""What one does, and what undoes it. One that fails has changed nothing."""


def all_or_none(steps: Sequence[Step]) -> None:
    """Does them in order. Where one raises, those before it are undone, the last one first, and it is raised again."""
    done = 0
    try:
        for there, _ in steps:
            there()
            done += 1
    except BaseException:  # whoever is interrupted, too, leaves storage that still is what it is called
        for _, back in reversed(steps[:done]):
            back()
        raise
