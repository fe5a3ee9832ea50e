"""A dense Llama-form checkpoint as the source of a conversion: one face for a directory and for a GGUF file."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from moesaic.errors import CheckpointError, UnsupportedError
from moesaic.formats.gguf_file import MAGIC
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.dense_gguf import GGUFSource

KEPT = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json", "additional_chat_templates",
    "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt",
)  # fmt: skip
"""What a converted checkpoint takes over from a directory as it is."""


class DenseSource(Protocol):
    """config: config.json of a `llama` model.  where: named in errors."""

    @property
    def where(self) -> str: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    def entries(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name (as Hugging Face has it) -> dtype that `read` gives, shape."""

    def read(self, name: str) -> torch.Tensor:
        """A new CPU tensor."""

    def write_side_files(self, directory: Path) -> None:
        """Tokenizer, chat template, generation_config, licence: what is beside the weights."""

    def close(self) -> None: ...


def open_dense(source: str, revision: str | None = None) -> DenseSource:
    """A directory or hub id with safetensors, or a GGUF file. Raises CheckpointError or UnsupportedError."""
    path = Path(source)
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                return GGUFSource(path)
    return DirectorySource(source, revision)


class DirectorySource:
    """A Hugging Face checkpoint."""

    def __init__(self, source: str, revision: str | None) -> None:
        self.checkpoint = Checkpoint.open(source, revision)
        self.where, self.config = str(self.checkpoint.path), self.checkpoint.config
        if (kind := self.config.get("model_type")) != "llama":
            self.close()
            raise UnsupportedError(
                f"model_type {kind!r:.60} cannot be upcycled", where=self.where, remedy="Give a dense llama checkpoint."
            )

    def entries(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {name: (stored.info.dtype, stored.info.shape) for name, stored in self.checkpoint.tensors().items()}

    def read(self, name: str) -> torch.Tensor:
        return self.checkpoint.read(name)

    def write_side_files(self, directory: Path) -> None:
        for name in KEPT:
            origin = self.checkpoint.path / name
            if origin.is_dir():
                shutil.copytree(origin, directory / name, dirs_exist_ok=True)
            elif origin.is_file():
                shutil.copyfile(origin, directory / name)

    def close(self) -> None:
        self.checkpoint.close()


def check_entries(source: DenseSource, expected: Mapping[str, tuple[int, ...]]) -> None:
    """The source holds exactly the tensors of a dense Llama, each of its shape and in floating point."""
    entries = source.entries()
    for name, shape in expected.items():
        if name not in entries:
            raise CheckpointError(f"lacks the tensor {name}", where=source.where, remedy="Download it again.")
        dtype, found = entries[name]
        if found != shape or not dtype.is_floating_point or dtype.itemsize < 2:
            short = str(dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{name} is {short} {list(found)}; expected is floating point {list(shape)}", where=source.where,
                remedy="Give an unquantised checkpoint whose config.json fits.",
            )  # fmt: skip
    extra = next((name for name in entries if name not in expected and not ignorable(name)), None)
    if extra is not None:
        raise UnsupportedError(
            f"holds {extra!r:.120}, for which a Mixtral has no place", where=source.where, remedy="Use a plain llama."
        )


def ignorable(name: str) -> bool:
    """Tables that old checkpoints store and every implementation computes; the copy of a tied head."""
    return name.endswith(".rotary_emb.inv_freq") or name == "lm_head.weight"
