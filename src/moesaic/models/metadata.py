"""What planning needs of a checkpoint: its configuration and the headers of its weights, and no weight.

A directory is opened as the loader opens it (headers only). Of a hub model, config.json is downloaded, and each
safetensors file's header through range requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.errors import CheckpointError
from moesaic.models.checkpoint import CONFIG, MODELOPT_CONFIG, Checkpoint, is_hub_id, read_config_file


@dataclass(frozen=True)
class Metadata:
    """config: as `spec_of` takes it.  shapes: of every stored tensor; empty where a repository has no safetensors."""

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    nbytes: int


def read_metadata(model: str, revision: str | None = None) -> Metadata:
    """Raises CheckpointError for what is missing or malformed, or cannot be reached."""
    if Path(model).expanduser().exists() or not is_hub_id(model):
        with Checkpoint.open(model, revision) as checkpoint:
            stored = checkpoint.tensors()
            shapes = {name: each.info.shape for name, each in stored.items()}
            return Metadata(checkpoint.config, shapes, checkpoint.nbytes)
    return from_hub(model, revision)


def from_hub(model: str, revision: str | None) -> Metadata:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, NotASafetensorsRepoError

    try:
        config = read_config_file(Path(hf_hub_download(model, CONFIG, revision=revision)))
        if not config.get("quantization_config"):
            try:
                path = Path(hf_hub_download(model, MODELOPT_CONFIG, revision=revision))
                config["quantization_config"] = {"quant_method": "modelopt", **read_config_file(path)}
            except EntryNotFoundError:
                config.pop("quantization_config", None)
        try:
            files = HfApi().get_safetensors_metadata(model, revision=revision).files_metadata.values()
        except NotASafetensorsRepoError:
            return Metadata(config, {}, 0)
    except (HfHubHTTPError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"cannot be read from the hub ({first:.200})", where=model,
            remedy="Check the name and the connection, or give a directory.",
        ) from None  # fmt: skip
    shapes = {name: tuple(info.shape) for file in files for name, info in file.tensors.items()}
    nbytes = sum(info.data_offsets[1] - info.data_offsets[0] for file in files for info in file.tensors.values())
    return Metadata(config, shapes, nbytes)
