"""Checkpoint.open on good, incomplete and hostile directories, and on things that are no checkpoint at all."""

from __future__ import annotations

import builtins
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import save_file

from moesaic.errors import CheckpointError, OptionError
from moesaic.models.checkpoint import MAX_CONFIG_BYTES, Checkpoint

CONFIG = {"model_type": "mixtral", "hidden_size": 4}
INDEX = "model.safetensors.index.json"


def make(directory: Path, shards: dict[str, dict[str, torch.Tensor]], *, index: bool = True, **files: object) -> Path:
    """A checkpoint directory; `files` adds or replaces JSON files by stem."""
    directory.mkdir(parents=True, exist_ok=True)
    for shard, tensors in shards.items():
        save_file(tensors, directory / shard)
    if index:
        weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for stem, value in {"config": CONFIG, **files}.items():
        (directory / f"{stem}.json").write_text(json.dumps(value))
    return directory


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    shards = {
        "model-00001-of-00002.safetensors": {"a": torch.arange(4.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)},
        "model-00002-of-00002.safetensors": {"c": torch.arange(3)},
    }
    return make(tmp_path / "model", shards, generation_config={"top_k": 5})


def edit_index(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def refused(directory: Path | str, message: str) -> CheckpointError:
    with pytest.raises(CheckpointError, match=message) as caught, Checkpoint.open(directory):
        pass
    assert caught.value.remedy
    assert str(caught.value).isprintable()
    return caught.value


def test_a_sharded_checkpoint(sharded: Path) -> None:
    with Checkpoint.open(str(sharded)) as checkpoint:
        assert checkpoint.path == sharded
        assert checkpoint.config == CONFIG
        assert checkpoint.generation_config == {"top_k": 5}
        assert [file.path.name[:11] for file in checkpoint.files] == ["model-00001", "model-00002"]
        assert checkpoint.nbytes == 4 * 4 + 4 * 2 + 3 * 8
        assert {name: stored.order for name, stored in checkpoint.tensors().items()} == {"a": 0, "b": 0, "c": 1}
        assert torch.equal(checkpoint.read("c"), torch.arange(3))
        dest = torch.empty(4)
        checkpoint.read_into("a", dest)
        assert torch.equal(dest, torch.arange(4.0))
        with pytest.raises(TypeError):
            checkpoint.tensors()["d"] = checkpoint.tensors()["a"]  # type: ignore[index]
        with pytest.raises(CheckpointError, match="no tensor named d"):
            checkpoint.read("d")


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    directory = make(tmp_path / "m", {"model.safetensors": {"w": torch.zeros(10)}}, index=False)
    header = json.dumps({"w": {"dtype": "U8", "shape": [1 << 40], "data_offsets": [0, 1 << 40]}}).encode()
    with (directory / "model.safetensors").open("wb") as file:  # sparse: a terabyte that could not be read
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 40))
    with Checkpoint.open(directory) as checkpoint:
        assert checkpoint.nbytes == 1 << 40


def test_single_file_and_files_without_an_index(tmp_path: Path) -> None:
    one = make(tmp_path / "one", {"model.safetensors": {"w": torch.zeros(1)}, "other.safetensors": {}}, index=False)
    with Checkpoint.open(one) as checkpoint:
        assert list(checkpoint.tensors()) == ["w"]
        assert checkpoint.generation_config == {}
    two = make(
        tmp_path / "two", {"b.safetensors": {"x": torch.zeros(1)}, "a.safetensors": {"y": torch.zeros(1)}}, index=False
    )
    with Checkpoint.open(two) as checkpoint:
        assert list(checkpoint.tensors()) == ["y", "x"]
    save_file({"y": torch.zeros(1)}, two / "c.safetensors")
    refused(two, r"c\.safetensors: y: this tensor is in a\.safetensors too")


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    refused(sharded, r"model-00002-of-00002\.safetensors: this shard, .* is missing")


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    refused(sharded, r"model-00002-of-00002\.safetensors: c: .*truncated")


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/x.safetensors",
        "..",
        ".",
        "",
        "a\\b.safetensors",
        "\0.safetensors",
    ],
)
def test_the_index_cannot_leave_the_directory(sharded: Path, shard: str) -> None:
    save_file({"a": torch.zeros(1)}, sharded.parent / "secret.safetensors")
    edit_index(sharded, lambda weight_map: weight_map.update(a=shard))
    refused(sharded, r"index\.json: a: its shard .* is not a plain file name")


def test_a_link_cannot_leave_the_directory(sharded: Path) -> None:
    outside = sharded.parent / "outside.safetensors"
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)
    refused(sharded, r"model-00002-of-00002\.safetensors: is a link that leaves the checkpoint")
    shard.unlink()
    shard.symlink_to(shard.name)
    refused(sharded, "model-00002-of-00002")
    shard.unlink()
    outside.rename(sharded / "inside")
    shard.symlink_to("inside")
    Checkpoint.open(sharded).close()
    (sharded / "config.json").rename(outside)
    (sharded / "config.json").symlink_to(outside)
    refused(sharded, r"config\.json: is a link that leaves")


@pytest.mark.parametrize("store", ["models--o--m/blobs", "blobs/ab"])
def test_a_hub_cache_links_into_its_blobs(sharded: Path, tmp_path: Path, store: str) -> None:
    snapshot = tmp_path / "hub" / "models--o--m" / "snapshots" / "0123"
    blobs = tmp_path / "hub" / store
    snapshot.mkdir(parents=True)
    blobs.mkdir(parents=True)
    for file in sharded.iterdir():
        (blobs / file.stem).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / file.stem, snapshot))
    with Checkpoint.open(snapshot) as checkpoint:
        assert torch.equal(checkpoint.read("c"), torch.arange(3))
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(sharded / "config.json")
    refused(snapshot, "leaves the checkpoint")


def test_the_index_and_the_shards_must_agree(sharded: Path) -> None:
    edit_index(sharded, lambda weight_map: weight_map.update(ghost="model-00002-of-00002.safetensors"))
    refused(sharded, r"model-00002-of-00002\.safetensors: holds no tensor ghost")
    edit_index(sharded, lambda weight_map: [weight_map.pop(name) for name in ("ghost", "b")])
    refused(sharded, r"model-00001-of-00002\.safetensors: holds b, which")
    edit_index(sharded, lambda weight_map: weight_map.update(a="model-00002-of-00002.safetensors"))
    refused(sharded, r"model-00002-of-00002\.safetensors: holds no tensor a")


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    save_file({"c": torch.arange(3), "a": torch.zeros(4)}, sharded / "model-00002-of-00002.safetensors")
    refused(sharded, r"model-00002-of-00002\.safetensors: holds a, which")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"model_type": "x", "n": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b"[]", "must hold a JSON object"),
        (b'{"model_type": "\xff"}', "is not UTF-8"),
        (b"{}", "has no model_type"),
        (b'{"model_type": 3}', "has no model_type"),
        (b" " * (MAX_CONFIG_BYTES + 1), "is larger than"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_a_bad_config(sharded: Path, text: bytes, message: str) -> None:
    (sharded / "config.json").write_bytes(text)
    refused(sharded, rf"config\.json: .*{message}")


def test_missing_and_strange_json_files(sharded: Path) -> None:
    (sharded / "generation_config.json").write_text("[]")
    refused(sharded, r"generation_config\.json: must hold")
    (sharded / "config.json").unlink()
    refused(sharded, r"config\.json: is missing")
    os.mkfifo(sharded / "config.json")
    refused(sharded, r"config\.json: .*not a regular file")


@pytest.mark.parametrize("value", [None, [], {}, {"a": 1}, {"a": "pytorch_model.bin"}])
def test_a_bad_weight_map(sharded: Path, value: object) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": value}))
    refused(sharded, r"index\.json: ")


@pytest.mark.parametrize("how", ["file", "directory", "absent"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.gguf", b"GGUF\3\0\0\0", r"m\.gguf: .*GGUF file.*moesaic upcycle"),
        ("m.bin", b"PK\3\4", r"m\.bin: .*pickle files are never loaded"),
        ("m.pt", b"\x80\2}", r"m\.pt: .*pickle files are never loaded"),
        ("m.pth", b"", r"m\.pth: .*pickle files are never loaded"),
        ("m.pkl", b"", r"m\.pkl: .*pickle files are never loaded"),
    ],
)
def test_gguf_and_pickle_given_as_a_model(tmp_path: Path, how: str, name: str, content: bytes, message: str) -> None:
    if how != "absent":
        (tmp_path / name).write_bytes(content)
    refused(tmp_path if how == "directory" else tmp_path / name, message)


def test_other_things_given_as_a_model(tmp_path: Path, sharded: Path) -> None:
    refused(tmp_path / "nothing", "nothing: no such directory")
    refused("x" * 5000, "no such directory")
    refused("a\0b", "no such directory")
    refused(sharded / "model-00001-of-00002.safetensors", f"Give the directory {sharded}")
    refused(sharded / "config.json", "is not a directory")
    (tmp_path / "model.data").write_bytes(b"GGUF")
    refused(tmp_path / "model.data", "GGUF file")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "is not a directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty: holds no safetensors file")
    with pytest.raises(OptionError, match="revision applies to a hub id"):
        Checkpoint.open(sharded, "main")


def test_a_hub_id_is_downloaded(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def snapshot(model: str, **options: object) -> str:
        calls.append((model, options["revision"]))
        return str(sharded)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    Checkpoint.open("org/name", "v1").close()
    assert calls == [("org/name", "v1")]
    refused(Path("org/name"), "no such directory")  # a Path is never looked up on the network
    refused("org/name.gguf", "GGUF")
    assert len(calls) == 1


def http_error(kind: type[Exception]) -> Exception:
    """An error of the hub client, made without the response object of whichever HTTP library it is built on."""
    return kind.__new__(kind, "x")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error(hub_errors.GatedRepoError), "access to this model is gated. Accept"),
        (http_error(hub_errors.RepositoryNotFoundError), "no such model on the hub"),
        (http_error(hub_errors.RevisionNotFoundError), "has no revision v9"),
        (hub_errors.LocalEntryNotFoundError("x"), "the hub cannot be reached"),
        (hub_errors.OfflineModeIsEnabled("x"), "the hub cannot be reached"),
        (RuntimeError("timed\x1b out\nand more"), "the download failed: timed"),
        (OSError(28, "No space left on device"), "No space left"),
    ],
)
def test_a_failed_download(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(CheckpointError, match=f"org/name: .*{message}") as caught:
        Checkpoint.open("org/name", "v9")
    assert str(caught.value).isprintable()
    assert caught.value.remedy


def test_offline_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused("moesaic-tests/absent", "the hub cannot be reached")
    with pytest.raises(OptionError, match="org/name"):
        Checkpoint.open("org/na--me..x")


def test_without_the_hub_library(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name == "huggingface_hub":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(OptionError, match="huggingface_hub is not installed"):
        Checkpoint.open("org/name")
