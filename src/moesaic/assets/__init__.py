"""Files that ship with the package: the embedded model `tiny`, the prompts of `make run`, and measured times."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moesaic.errors import CheckpointError

HERE = Path(__file__).parent


def embedded_model() -> Path:
    """The directory of the model that is used when none is named. Raises CheckpointError where it was not shipped."""
    path = HERE / "tiny"
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        raise CheckpointError(
            "the embedded model is not part of this installation",
            where=str(path),
            remedy="Name a model (a directory or a hub id) on the command line.",
        )
    return path


def tuning_tables(own: Path | None = None) -> list[dict[str, Any]]:
    """Measured times (`planning/timetable.py`): those that ship, then the user's own, in a folder of their own.

    Raises CheckpointError for a file that is no such table.
    """
    return [read_table(path) for folder in (HERE / "tuning", own) if folder for path in sorted(folder.glob("*.json"))]


def read_table(path: Path) -> dict[str, Any]:
    try:
        table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        lacking = {"device", "packages", "rows"} - set(table) or missing_in(table["rows"])
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"cannot be read ({error})", where=str(path), remedy="Delete it and tune anew.") from None
    if lacking:
        raise CheckpointError(
            f"is no table of measured times: it lacks {', '.join(sorted(lacking))}",
            where=str(path), remedy="Delete it, and let `moesaic bench tune` write it anew.",
        )  # fmt: skip
    return table


def missing_in(rows: Iterable[dict[str, Any]]) -> set[str]:
    """Fields that some row lacks, and numbers that are not positive."""
    sizes = ("experts", "hidden", "width", "top_k", "tokens")
    lacking: set[str] = set()
    for row in rows:
        lacking |= {name for name in ("format", "encoding", "ms") if name not in row}
        lacking |= {f"a positive {name}" for name in sizes if not (isinstance(row.get(name), int) and row[name] > 0)}
        lacking |= {f"a time of {name}" for name, ms in row.get("ms", {}).items() if not 0 < float(ms) < float("inf")}
    return lacking
