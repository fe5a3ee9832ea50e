"""Reading the JSON and text files of a checkpoint directory, which are untrusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moesaic.errors import CheckpointError

MAX_FILE_BYTES = 256 * 1024 * 1024  # the largest public tokenizer.json is near 35 MB


def read_text(path: Path) -> str:
    """The UTF-8 text of a file. Raises CheckpointError naming the file when it is unreadable or far too large."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise CheckpointError(
                f"larger than {MAX_FILE_BYTES} bytes", where=str(path), remedy="This is not a tokenizer file."
            )
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"not UTF-8 text (byte {error.start})", where=str(path), remedy="Download the file again."
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"cannot be read ({error.strerror})", where=str(path), remedy="Check the path and its permissions."
        ) from error


def parse_object(text: str, path: Path) -> dict[str, Any]:
    """The JSON object in `text`, which came from `path`. Raises CheckpointError when it is anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"malformed JSON ({error})", where=str(path), remedy="Download the file again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"must hold a JSON object, not {type(value).__name__}", where=str(path), remedy="Download the file again."
        )
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or an empty one when there is no such file."""
    return parse_object(read_text(path), path) if path.is_file() else {}
