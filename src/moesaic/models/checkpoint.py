"""A checkpoint as Hugging Face lays it out: config.json, generation_config.json and safetensors files.

Opening reads headers only. Every name that the checkpoint supplies (a shard in the index, the target of a symbolic
link) must stay inside the checkpoint; the index and the files must agree about every tensor.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, NoReturn

import torch

from moesaic.errors import CheckpointError, OptionError
from moesaic.formats.safetensors_file import SafetensorsFile, TensorInfo, foreign_format, printable

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
MODELOPT_CONFIG = "hf_quant_config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_CONFIG_BYTES = 16 << 20
MAX_INDEX_BYTES = 100_000_000

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.tiktoken")
# Second copies of the weights, in the vendor's own layout, that some repositories carry.
_HUB_COPIES = ("*/*.safetensors", "consolidated*.safetensors")
_HUB_WEIGHTS = ("*.safetensors",)
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_AGAIN = "Download the checkpoint again"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor and the file that holds it. order: the file's place in `Checkpoint.files`."""

    info: TensorInfo
    file: SafetensorsFile
    order: int


class Checkpoint:
    """An open checkpoint: its configuration and the map of its tensors. Nobody mutates it after `open`.

    path: the directory.  config, generation_config: the JSON objects ({} where the optional second one is absent).
    files: in the order in which their names sort.  nbytes: of all tensors.
    """

    def __init__(
        self, path: Path, config: dict[str, Any], generation_config: dict[str, Any], files: tuple[SafetensorsFile, ...]
    ) -> None:
        self.path, self.config, self.generation_config, self.files = path, config, generation_config, files
        self._tensors = _merge(files)
        self.nbytes = sum(stored.info.nbytes for stored in self._tensors.values())

    @classmethod
    def open(cls, model: str | Path, revision: str | None = None, *, weights: bool = True) -> Checkpoint:
        """Open a directory, or a hub id `org/name` (at `revision`), which is downloaded if it is not in the cache.

        weights: without them only the configuration is looked at, and `tensors` is empty.
        Raises CheckpointError for whatever is missing, inconsistent or hostile, OptionError for a `revision` of a
        directory. Close it, or use it in a `with` block; the files stay open until then.
        """
        directory = _locate(model, revision, weights)
        try:
            names, weight_map = _weight_files(directory) if weights else ([], None)
            config, generation_config = _read_configs(directory)
        except OSError as error:
            _fail(directory, f"cannot be read ({_first_line(error)})", "Check the directory's permissions")
        files: list[SafetensorsFile] = []
        try:
            for name in names:
                files.append(SafetensorsFile(_inside(directory, name)))
            if weight_map is not None:
                _check_index(directory, weight_map, dict(zip(names, files, strict=True)))
            return cls(directory, config, generation_config, tuple(files))
        except BaseException:
            for file in files:
                file.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for file in self.files:
            file.close()

    def tensors(self) -> Mapping[str, StoredTensor]:
        """Read-only, in the order of the bytes: file after file, by offset within each."""
        return MappingProxyType(self._tensors)

    def read(self, name: str) -> torch.Tensor:
        """A new CPU tensor with the stored dtype and shape; raises CheckpointError if there is none of that name."""
        return self._stored(name).file.read(name)

    def read_into(self, name: str, dest: torch.Tensor) -> None:
        """Fill `dest`, as `SafetensorsFile.read_into` does."""
        self._stored(name).file.read_into(name, dest)

    def _stored(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            _fail(self.path, f"holds no tensor named {printable(name)}", "Check that the architecture matches")
        return self._tensors[name]


def is_hub_id(model: str) -> bool:
    """Whether it has the form `org/name`."""
    return _HUB_ID.fullmatch(model) is not None


def read_config_file(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size. Raises CheckpointError naming the file."""
    return _read_json(path, MAX_CONFIG_BYTES)


def _fail(where: Path | str, what: str, remedy: str) -> NoReturn:
    raise CheckpointError(what, where=str(where), remedy=remedy) from None


def _locate(model: str | Path, revision: str | None, weights: bool) -> Path:
    """The directory of the model; downloads a hub id. Says what a path is when it is no directory."""
    path = Path(model).expanduser()
    try:
        is_directory, exists = path.is_dir(), path.exists()
    except (OSError, ValueError):  # a name too long, or with a null byte
        is_directory = exists = False
    if is_directory:
        if revision is not None:
            raise OptionError(
                "a revision applies to a hub id, and this is a directory",
                where=str(path),
                remedy="Leave out the revision, or give the hub id",
            )
        return path
    if exists:
        _refuse_file(path)
    if isinstance(model, str) and _HUB_ID.fullmatch(model) and not _by_suffix(path):
        return _download(model, revision, weights)
    if known := _by_suffix(path):
        _fail(path, f"no such file; and {known[0]}", known[1])
    _fail(
        printable(str(model)),
        "no such directory",
        "Give a directory with config.json, or a hub id of the form org/name",
    )


def _refuse_file(path: Path) -> NoReturn:
    """A file was given where a directory is needed: say what it is."""
    try:
        with path.open("rb") if path.is_file() else io.BytesIO() as file:  # opening a named pipe would hang
            known = foreign_format(file.read(16))
    except OSError:
        known = None
    if known := known or _by_suffix(path):
        _fail(path, *known)
    if path.suffix == ".safetensors":
        _fail(path, "is a single file; the model needs its config.json too", f"Give the directory {path.parent}")
    _fail(path, "is not a directory", "Give a directory with config.json and safetensors files, or a hub id")


def _by_suffix(path: Path) -> tuple[str, str] | None:
    if path.suffix == ".gguf":
        return foreign_format(b"GGUF")
    if path.suffix in _PICKLES:
        return foreign_format(b"PK")
    return None


def _download(model: str, revision: str | None, weights: bool) -> Path:
    """The snapshot directory of a hub id, from the cache or the network; weights may be left out."""
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise OptionError(
            "no such directory, and huggingface_hub is not installed to look for it on the hub",
            where=model,
            remedy="Give a directory, or `pip install huggingface_hub`",
        ) from None
    try:
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=list(_HUB_FILES),
                ignore_patterns=list(_HUB_COPIES if weights else _HUB_WEIGHTS),
            )
        )
    except errors.GatedRepoError:
        _fail(model, "access to this model is gated", "Accept its licence on the hub, then run `hf auth login`")
    except errors.RepositoryNotFoundError:
        _fail(model, "no such directory, and no such model on the hub", "Check the name; log in if it is private")
    except errors.RevisionNotFoundError:
        _fail(model, f"has no revision {printable(str(revision))}", "Give a branch, a tag or a commit of the model")
    except errors.HFValidationError as error:
        raise OptionError(_first_line(error), where=model, remedy="Give a hub id of the form org/name") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        _fail(
            model,
            "no such directory, and the hub cannot be reached; the local cache does not hold the whole model",
            "Check the network, or give the path of a downloaded model",
        )
    except Exception as error:  # the hub client passes on its HTTP stack's own exceptions: all mean "not downloaded"
        _fail(model, f"the download failed: {_first_line(error)}", "Try again: finished files are kept")


def _first_line(error: Exception) -> str:
    return printable((str(error).splitlines() or [""])[0]) or type(error).__name__


def _inside(directory: Path, name: str) -> Path:
    """The path of the checkpoint's file `name`, whose links, if any, stay inside the checkpoint.

    A snapshot of the hub's cache consists of links into the cache's blobs, which are inside too.
    """
    path = directory / name
    roots = [directory]
    if directory.parent.name == "snapshots":
        repository = directory.parent.parent
        roots += [repository / "blobs", repository.parent / "blobs"]  # one per model, or shared by the whole cache
    try:
        target = path.resolve()
        safe = any(target.is_relative_to(root.resolve()) for root in roots)
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long, a null byte
        _fail(directory / printable(name), f"cannot be resolved ({_first_line(error)})", _AGAIN)
    if not safe:
        _fail(path, f"is a link that leaves the checkpoint, to {target}", "Put the file itself into the directory")
    return path


def _read_json(path: Path, limit: int) -> dict[str, Any]:
    try:
        if not path.is_file():
            _fail(path, "is missing or not a regular file", _AGAIN)
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        _fail(path, f"cannot be read ({error.strerror})", "Check the file's permissions")
    if len(raw) > limit:
        _fail(path, f"is larger than {limit} bytes", _AGAIN)
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        _fail(path, "is not UTF-8", _AGAIN)
    except json.JSONDecodeError as error:
        known = foreign_format(raw[:16])
        _fail(path, known[0] if known else f"is not valid JSON ({error})", known[1] if known else _AGAIN)
    except (ValueError, RecursionError):  # an integer of too many digits, nesting too deep
        _fail(path, "is not valid JSON", _AGAIN)
    if not isinstance(value, dict):
        _fail(path, "must hold a JSON object", _AGAIN)
    return value


def _read_configs(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json, which must name the architecture, and generation_config.json, {} where there is none.

    ModelOpt may describe the quantisation in a file of its own; it then counts as the config's `quantization_config`.
    """
    path = _inside(directory, CONFIG)
    if not path.exists():
        _fail(path, "is missing", "Give the directory of a Hugging Face checkpoint, which has a config.json")
    config = _read_json(path, MAX_CONFIG_BYTES)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        _fail(path, "has no model_type, which names the architecture", "Use the config.json that came with the model")
    modelopt = _inside(directory, MODELOPT_CONFIG)
    if not config.get("quantization_config") and modelopt.exists():
        config["quantization_config"] = {"quant_method": "modelopt", **_read_json(modelopt, MAX_CONFIG_BYTES)}
    generation = _inside(directory, GENERATION_CONFIG)
    return config, _read_json(generation, MAX_CONFIG_BYTES) if generation.exists() else {}


def _weight_files(directory: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the weight files, sorted, and the index's map from tensor to file where there is an index."""
    if (directory / INDEX).exists():
        weight_map = _read_index(_inside(directory, INDEX))
        names = sorted(set(weight_map.values()))
        for name in names:
            if not (directory / name).exists():
                _fail(directory / name, f"this shard, named in {INDEX}, is missing", _AGAIN)
        return names, weight_map
    if (directory / SINGLE).exists():
        return [SINGLE], None
    entries = sorted(directory.iterdir())
    names = [path.name for path in entries if path.suffix == ".safetensors"]
    if names:
        return names, None
    for path in entries:
        if known := _by_suffix(path):
            _fail(path, *known)
    _fail(directory, "holds no safetensors file", "Give the directory or hub id of a safetensors checkpoint")


def _read_index(path: Path) -> dict[str, str]:
    """The index's weight_map, each shard a plain file name of the same directory."""
    weight_map = _read_json(path, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        _fail(path, "has no weight_map", _AGAIN)
    for name, shard in weight_map.items():
        shown = f"{path}: {printable(name)}"
        if not isinstance(shard, str):
            _fail(shown, "its shard must be a string", _AGAIN)
        if shard in ("", ".", "..") or any(c in shard for c in "/\\:\0") or not shard.isprintable():
            _fail(shown, f"its shard {printable(shard)!r} is not a plain file name", "Do not use this checkpoint")
        if not shard.endswith(".safetensors"):
            _fail(shown, f"its shard {printable(shard)} is not a safetensors file", "Convert it to safetensors")
    return weight_map


def _check_index(directory: Path, weight_map: dict[str, str], files: dict[str, SafetensorsFile]) -> None:
    """Each tensor of the index is in its shard, and each tensor of a shard is in the index."""
    held = {shard: file.names() for shard, file in files.items()}
    placed = {(name, shard) for shard, names in held.items() for name in names}
    for name, shard in weight_map.items():
        if (name, shard) not in placed:
            _fail(directory / shard, f"holds no tensor {printable(name)}, which {INDEX} places there", _AGAIN)
    for shard, names in held.items():
        for name in names:
            if weight_map.get(name) != shard:
                _fail(directory / shard, f"holds {printable(name)}, which {INDEX} does not place there", _AGAIN)


def _merge(files: tuple[SafetensorsFile, ...]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for order, file in enumerate(files):
        for name in file.names():
            if name in tensors:
                other = tensors[name].file.path.name
                _fail(f"{file.path}: {printable(name)}", f"this tensor is in {other} too", "Keep one of the two files")
            tensors[name] = StoredTensor(file.info(name), file, order)
    return tensors
