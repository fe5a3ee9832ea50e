"""What a user writes of a plan -> what the planner is asked for."""

from __future__ import annotations

from moesaic.contracts.plan import PHASES, PerPhase, Wish
from moesaic.errors import OptionError


def wish_of(text: str | None, option: str) -> Wish:
    """`NAME`, `decode=NAME,prefill=NAME` or one of the two; None and `auto` are free. Raises OptionError for others."""
    if text in (None, "auto"):
        return None
    if "=" not in str(text):
        return text
    found: dict[str, str] = {}
    for part in str(text).split(","):
        phase, _, name = (each.strip() for each in part.partition("="))
        if phase not in PHASES or phase in found or not name:
            raise OptionError(f"{text!r:.80} is neither a name nor one for each phase", where=option,
                              remedy="Write NAME, or decode=NAME,prefill=NAME.")  # fmt: skip
        found[phase] = name
    return PerPhase(**{phase: name for phase, name in found.items() if name != "auto"})


def names_in(wish: Wish) -> list[str]:
    """Every name that is demanded."""
    each = (wish.decode, wish.prefill) if isinstance(wish, PerPhase) else (wish,)
    return [name for name in each if name]
