"""Storage that is rewritten where it is, in steps: all of them, or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Step = tuple[Callable[[], None], Callable[[], None]]
"""What one does, and what undoes it. One that raises has changed nothing."""


def all_or_none(steps: Sequence[Step]) -> None:
    """Does them in order. Where one raises, those before it are undone, the last one first, and it is raised again,
    with a note if not all could be. An interrupt from outside may fall between a step and its being counted."""
    done = 0
    try:
        for there, _ in steps:
            there()
            done += 1
    except BaseException as error:
        for _, back in reversed(steps[:done]):
            try:
                back()
            except Exception as second:  # the others are undone all the same
                error.add_note(f"and could not be undone ({second!r:.200}): load the weights again")
        raise
