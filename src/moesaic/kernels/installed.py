"""Is an optional package here, in a version that its contracts were checked against?"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version


def lacking(package: str, versions: str, extra: str) -> str | None:
    """Why a package cannot be used, with what to install, or None. versions: like `>=0.1.5,<0.2`."""
    try:
        found = version(package)
    except PackageNotFoundError:
        return f"needs {package}, which is not installed; pip install 'moesaic[{extra}]'"
    if within(found, versions):
        return None
    return f"needs {package} {versions}, not {found}; pip install 'moesaic[{extra}]'"


def within(found: str, versions: str) -> bool:
    """By the numbers that a version begins with: a post-release counts as what it follows."""
    bounds = [re.fullmatch(r"(>=|<)([0-9.]+)", part.strip()) for part in versions.split(",")]
    if not all(bounds):
        raise ValueError(f"{versions!r} is not a range of versions")
    here = numbers(found)
    return all((here >= numbers(b[2])) == (b[1] == ">=") for b in bounds if b)


def numbers(text: str) -> tuple[int, ...]:
    """`0.1.5.post1` -> (0, 1, 5)."""
    match = re.match(r"[0-9]+(?:\.[0-9]+)*", text)
    return tuple(int(each) for each in match[0].split(".")) if match else ()
