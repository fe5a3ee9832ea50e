"""A quantization_config that nobody vouches for: typed access, errors that name the field, and what was never read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesaic.errors import CheckpointError, UnsupportedError

LISTS = ("ignored_layers", "modules_to_not_convert", "ignore", "exclude_modules")
"""The spellings of the list of modules that stay unquantised."""


class Section:
    """A JSON object. Reading a field marks it as known; null counts as absent."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, Mapping):
            raise CheckpointError(f"must be an object, not {values!r:.80}", where=where, remedy=_RESTORE)
        self.values, self.where = values, where
        self.read: set[str] = set()

    def get(self, name: str) -> Any:
        self.read.add(name)
        return self.values.get(name)

    def text(self, name: str, default: str = "") -> str:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.bad(name, f"must be a string, not {value!r:.80}")
        return value

    def integer(self, name: str) -> int | None:
        value = self.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self.bad(name, f"must be an integer, not {value!r:.80}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.bad(name, f"must be true or false, not {value!r:.80}")
        return value

    def texts(self, name: str) -> list[str]:
        value = self.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(each, str) and each.strip() for each in value):
            raise self.bad(name, f"must be a list of names, not {value!r:.80}")
        return value

    def exclusions(self) -> tuple[list[str], str]:
        """All lists of modules that stay unquantised, together, and the fields that they stood in."""
        present = [name for name in LISTS if self.texts(name)]
        entries = dict.fromkeys(entry for name in present for entry in self.texts(name))
        return list(entries), " and ".join(present)

    def inner(self, name: str) -> Section | None:
        value = self.get(name)
        return None if value is None else Section(value, f"{self.where}: {name}")

    def block(self, name: str) -> tuple[int, int] | None:
        """[rows, columns], or "128x128"."""
        value = self.get(name)
        if isinstance(value, str):
            value = [int(each) if each.isdecimal() else None for each in value.split("x")]
        if value is None:
            return None
        if not (isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)):
            raise self.bad(name, f"must be two positive integers, not {value!r:.80}")
        return value[0], value[1]

    def unread(self) -> list[str]:
        return [name for name, value in self.values.items() if name not in self.read and value not in (None, {}, [])]

    def bad(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{name} {what}", where=self.where, remedy=_RESTORE)

    def unsupported(self, name: str, known: str, value: object = None) -> UnsupportedError:
        """known: what could stand there.  value: what does, where it is not the field's own."""
        said = self.values.get(name) if value is None else value
        return UnsupportedError(
            f"{name} {said!r:.200} is not supported", where=self.where, remedy=f"Supported: {known}."
        )


_RESTORE = "Restore the file from the model's original repository."
