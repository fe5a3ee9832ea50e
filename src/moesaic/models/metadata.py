"""What planning needs of a checkpoint: its configuration and the headers of its weights, and no weight.

A directory is opened as the loader opens it. Of a hub model, the small files are downloaded, and of each safetensors
file the length of its header and the header, by range; they become a directory whose weights are a hole. So the hub's
files pass the very checks that local ones do.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

from moesaic.contracts.spec import ModelSpec
from moesaic.errors import CheckpointError
from moesaic.formats.safetensors_file import MAX_HEADER_BYTES, printable
from moesaic.models.build import stored_spec
from moesaic.models.checkpoint import (
    CONFIG,
    INDEX,
    MODELOPT_CONFIG,
    SINGLE,
    Checkpoint,
    is_hub_id,
    read_config_file,
)

READERS = 8
"""Headers that are fetched at once."""
TIMEOUT = 30.0
"""Seconds without an answer."""
MAX_FILE_BYTES = 1 << 42
"""Of a file that a hub may claim to have: it is imitated by a hole of that size."""


@dataclass(frozen=True)
class Metadata:
    """spec: by the config and what is stored.  nbytes: of all tensors."""

    spec: ModelSpec
    shapes: Mapping[str, tuple[int, ...]]
    nbytes: int


def read_metadata(model: str, revision: str | None = None) -> Metadata:
    """Raises CheckpointError for what is missing, malformed or out of reach, UnsupportedError for what is unknown."""
    if Path(model).expanduser().exists() or not is_hub_id(model):
        return of_checkpoint(model, revision)
    with TemporaryDirectory(prefix="moesaic-") as folder:
        at = fetch(model, revision, Path(folder))
        try:
            return of_checkpoint(str(at))
        except CheckpointError as error:
            where = (error.where or "").replace(str(at), model)
            raise CheckpointError(error.what, where=where, remedy=error.remedy) from None


def of_checkpoint(directory: str, revision: str | None = None) -> Metadata:
    with Checkpoint.open(directory, revision) as checkpoint:
        shapes = {name: each.info.shape for name, each in checkpoint.tensors().items()}
        return Metadata(stored_spec(checkpoint)[0], shapes, checkpoint.nbytes)


def fetch(model: str, revision: str | None, folder: Path) -> Path:
    """The directory of a hub model: in the cache where the hub is out of reach, else an imitation in `folder`."""
    try:
        from huggingface_hub import HfApi, errors, snapshot_download
    except ImportError:
        refuse(model, "no such directory, and huggingface_hub is not installed", "`pip install huggingface_hub`")
    try:
        info = HfApi().model_info(model, revision=revision, timeout=TIMEOUT)
        imitate(model, str(info.sha), [each.rfilename for each in info.siblings or ()], folder)
        return folder
    except errors.GatedRepoError:
        refuse(model, "access to this model is gated", "Accept its licence on the hub, then run `hf auth login`")
    except errors.RepositoryNotFoundError:
        refuse(model, "no such directory, and no such model on the hub", "Check the name; log in if it is private")
    except errors.RevisionNotFoundError:
        refuse(model, f"has no revision {printable(str(revision))}", "Give a branch, a tag or a commit of the model")
    except CheckpointError:
        raise
    except Exception as failure:  # the hub client passes on its HTTP stack's own exceptions
        try:
            return Path(snapshot_download(model, revision=revision, local_files_only=True))
        except (OSError, ValueError):
            first = printable((str(failure).splitlines() or [""])[0]) or type(failure).__name__
            refuse(model, f"cannot be read from the hub ({first})", "Check the connection, or give a directory")


def imitate(model: str, commit: str, files: list[str], folder: Path) -> None:
    """Small files as they are, and safetensors files with a header and a hole."""
    from huggingface_hub import hf_hub_download

    for name in (CONFIG, MODELOPT_CONFIG, INDEX):
        if name in files:
            held = Path(hf_hub_download(model, name, revision=commit))
            (folder / name).write_bytes(held.read_bytes())
    weights = [name for name in files if name.endswith(".safetensors") and "/" not in name]
    if INDEX in files:
        named = read_config_file(folder / INDEX).get("weight_map")
        weights = [name for name in weights if isinstance(named, dict) and name in set(map(str, named.values()))]
    elif SINGLE in files:
        weights = [SINGLE]
    with ThreadPoolExecutor(READERS) as pool:
        for done in [pool.submit(sketch, model, commit, name, folder / name) for name in weights]:
            done.result()


def sketch(model: str, commit: str, name: str, path: Path) -> None:
    """A file with the header of the hub's, and its size."""
    head, total = part(model, commit, name, 0, 8)
    length = int.from_bytes(head, "little")
    if length > min(MAX_HEADER_BYTES, total - 8):
        length = 0  # the length alone is found to be wrong when the file is opened
    header = part(model, commit, name, 8, length)[0] if length else b""
    if total > MAX_FILE_BYTES:
        refuse(f"{model}: {name}", f"claims to have {total} bytes", "Do not use this checkpoint")
    with path.open("wb") as file:
        file.write(head + header)
        file.truncate(total)


def part(model: str, commit: str, name: str, start: int, count: int) -> tuple[bytes, int]:
    """(bytes from `start` on, size of the file). Raises CheckpointError where the server sends anything else."""
    from huggingface_hub import hf_hub_url, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers, http_stream_backoff  # type: ignore[attr-defined]

    headers = build_hf_headers() | {"Range": f"bytes={start}-{start + count - 1}", "Accept-Encoding": "identity"}
    url, found = hf_hub_url(model, name, revision=commit), b""
    with http_stream_backoff("GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT) as response:
        hf_raise_for_status(response)
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        if response.status_code != 206 or not total.isdecimal():
            refuse(f"{model}: {name}", "the server does not send parts of files", "Download it, and give the directory")
        for piece in response.iter_bytes():
            found += piece
            if len(found) > count:
                break
    if len(found) != min(count, int(total) - start):
        refuse(f"{model}: {name}", f"{len(found)} bytes came for {count}", "Try again")
    return found, int(total)


def refuse(where: str, what: str, remedy: str) -> NoReturn:
    raise CheckpointError(what, where=where, remedy=remedy) from None
