"""Files that ship with the package: the embedded model `tiny` and the prompts of `make run`."""

from __future__ import annotations

from pathlib import Path

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
