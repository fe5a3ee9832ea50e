"""Planning a hub model reads headers by range and no weight: against a server that speaks the hub's protocol."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session  # type: ignore[attr-defined]

from moesaic.errors import CheckpointError
from moesaic.models import metadata
from moesaic.models.metadata import read_metadata
from scripts import plan_fixtures
from tests.cli_support import environment, spawn

MODEL, COMMIT = "org/model", "c0ffee" * 6 + "c0ff"


@dataclass
class Hub:
    """What is served, how it misbehaves, and what was sent: (name, first byte, last byte) of each body."""

    folder: Path
    url: str = ""
    files: dict[str, Path] = field(default_factory=dict)
    ranges: bool = True
    gated: bool = False
    sent: list[tuple[str, int, int]] = field(default_factory=list)
    auth: set[str | None] = field(default_factory=set)

    def add(self, name: str) -> None:
        self.files[name] = self.folder / name

    def header_end(self, name: str) -> int:
        """The first byte of a file that is a weight's."""
        with self.files[name].open("rb") as file:
            return 8 + int.from_bytes(file.read(8), "little")


class Answers(BaseHTTPRequestHandler):
    """/api/models/ID/revision/R, HEAD and GET of /ID/resolve/R/FILE; weights lie elsewhere, as on the real one."""

    hub: Hub

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.hub.auth.add(self.headers.get("Authorization"))
        if self.hub.gated:
            self.answer(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        elif path.startswith(f"/api/models/{MODEL}"):
            if path.rpartition("/")[2] not in ("main", "model", COMMIT):
                return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": name} for name in self.hub.files]
            self.answer(200, json.dumps({"id": MODEL, "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith(f"/{MODEL}/resolve/{COMMIT}/") and (name := path.rpartition("/")[2]) in self.hub.files:
            if name.endswith(".safetensors"):
                return self.answer(302, b"", {"Location": f"{self.hub.url}/cdn/{name}", "X-Repo-Commit": COMMIT})
            self.file(name)
        elif path.startswith("/cdn/"):
            self.file(path.rpartition("/")[2])
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound" if path.startswith("/api") else "EntryNotFound"})

    def file(self, name: str) -> None:
        total = self.hub.files[name].stat().st_size
        asked, extra, status = self.headers.get("Range"), {}, 200
        first, last = 0, total - 1
        if asked and self.hub.ranges:
            start, _, end = asked.removeprefix("bytes=").partition("-")
            first, last, status = int(start), min(int(end), total - 1), 206
            extra["Content-Range"] = f"bytes {first}-{last}/{total}"
        with self.hub.files[name].open("rb") as file:
            file.seek(first)
            body = b"" if self.command == "HEAD" else file.read(min(last - first + 1, 1 << 20))
        if self.command == "GET":
            self.hub.sent.append((name, first, first + len(body) - 1))
        etag = {"ETag": f'"{sha1(name.encode()).hexdigest()}"', "X-Repo-Commit": COMMIT}
        self.answer(status, body, {**etag, **extra}, last - first + 1)

    def answer(self, status: int, body: bytes, headers: Any = (), length: int | None = None) -> None:
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Three shards of Mixtral; the hub client looks at the server, with a cache of its own."""
    fixture = plan_fixtures.shortened(plan_fixtures.read("mixtral-8x7b"), 4)
    held = Hub(tmp_path / "served")
    plan_fixtures.write(fixture, held.folder)
    for path in held.folder.iterdir():
        held.add(path.name)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Answers,), {"hub": held}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    held.url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", held.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", held.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    close_session()
    yield held
    close_session()
    server.shutdown()
    server.server_close()


def test_headers_come_and_no_weight_does(hub: Hub) -> None:
    found = read_metadata(MODEL)
    local = read_metadata(str(hub.folder))
    assert found == local
    shards = [name for name in hub.files if name.endswith(".safetensors")]
    assert len(shards) == 3
    got = {name: [(first, last) for each, first, last in hub.sent if each == name] for name in shards}
    for name in shards:
        assert sorted(got[name]) == [(0, 7), (8, hub.header_end(name) - 1)], "the length, the header, and nothing else"
    assert sum(last - first + 1 for _, first, last in hub.sent) < 200_000 < found.nbytes // 1000


def test_nothing_stays_but_the_small_files_of_the_hubs_own_cache(hub: Hub, tmp_path: Path) -> None:
    read_metadata(MODEL)
    cached = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert cached
    assert not [path for path in cached if path.name.endswith(".safetensors")]
    assert sum(path.stat().st_size for path in cached) < 200_000


def test_the_command_line_reaches_it_through_the_environment(hub: Hub, tmp_path: Path) -> None:
    environment_of = environment(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0")
    with pytest.MonkeyPatch.context() as patch:
        for key in ("HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE"):
            patch.setenv(key, environment_of[key])
        done = spawn("plan", MODEL, "--gpu", "h100", "--revision", "main")
    assert (done.code, done.err) == (0, ""), done
    assert f"{MODEL}: mixtral, 4 layers, on h100" in done.out
    assert all(last < hub.header_end(name) for name, _, last in hub.sent if name.endswith(".safetensors"))


@pytest.mark.parametrize("single", [True, False])
def test_a_model_without_an_index(hub: Hub, single: bool) -> None:
    """One file, or files that nothing lists; a vendor's second copy is not looked at."""
    for name in list(hub.files):
        if "index" in name or (single and "00001" not in name and name.endswith("safetensors")):
            del hub.files[name]
    kept = plan_fixtures.shortened(plan_fixtures.read("mixtral-8x7b"), 1)
    plan_fixtures.write_shard(hub.folder / "one.safetensors", kept.tensors)
    for name in [name for name in hub.files if name.endswith(".safetensors")]:
        del hub.files[name]
    hub.files["model.safetensors" if single else "weights.safetensors"] = hub.folder / "one.safetensors"
    hub.files["config.json"] = hub.folder / "small.json"
    plan_fixtures.put(hub.files["config.json"], kept.config)
    if single:
        hub.files["zz.safetensors"] = hub.folder / "config.json"
    assert read_metadata(MODEL).nbytes == kept.nbytes


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("ranges", "the server does not send parts of files"),
        ("gated", "access to this model is gated"),
        ("cut", "it is truncated"),
        ("length", "the header claims"),
        ("shape", "its shape and dtype need"),
        ("index", "holds no tensor model.norm.weight, which model.safetensors.index.json places there"),
        ("shard", "this shard, named in model.safetensors.index.json, is missing"),
        ("config", "has no model_type"),
        ("empty", "holds no safetensors file"),
    ],
)
def test_what_is_wrong_is_found_as_in_a_directory(hub: Hub, fault: str, says: str) -> None:
    """And where it is found is said in the model's name, not in that of a temporary directory."""
    spoil(hub, fault)
    with pytest.raises(CheckpointError) as caught:
        read_metadata(MODEL)
    assert says in str(caught.value)
    assert (caught.value.where or "").startswith(MODEL)


def spoil(hub: Hub, fault: str) -> None:
    first = hub.folder / "model-00001-of-000003.safetensors"
    with first.open("rb") as file:
        raw = file.read(hub.header_end(first.name))
    if fault in ("ranges", "gated"):
        setattr(hub, fault, fault == "gated")
    elif fault == "cut":
        with first.open("r+b") as file:
            file.truncate(first.stat().st_size - 4096)
    elif fault == "length":
        with first.open("r+b") as file:
            file.write((1 << 40).to_bytes(8, "little"))
    elif fault == "shape":
        with first.open("r+b") as file:
            file.write(raw.replace(b"[32000,4096]", b"[32001,4096]", 1))
    elif fault == "index":
        index = hub.folder / "model.safetensors.index.json"
        held = json.loads(index.read_text())
        held["weight_map"]["model.norm.weight"] = first.name
        index.write_text(json.dumps(held))
    elif fault == "shard":
        del hub.files[first.name]
    elif fault == "config":
        (hub.folder / "config.json").write_text("{}")
    elif fault == "empty":
        for name in [name for name in hub.files if name not in ("config.json",)]:
            del hub.files[name]


def test_a_name_or_revision_that_is_not_there(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="no such directory, and no such model on the hub"):
        read_metadata("org/other")
    with pytest.raises(CheckpointError, match="has no revision v7"):
        read_metadata(MODEL, "v7")
    assert read_metadata(MODEL, COMMIT).spec.architecture == "mixtral"


def test_a_file_of_absurd_size_is_not_imitated(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "MAX_FILE_BYTES", 1 << 20)
    with pytest.raises(CheckpointError, match="claims to have"):
        read_metadata(MODEL)


def test_without_the_hub_its_cache_serves(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was downloaded whole is planned offline; what was not is refused in one line."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="cannot be read from the hub"):
        read_metadata(MODEL)
    repository = tmp_path / "cache" / "models--org--model"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    hub.folder.rename(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    assert read_metadata(MODEL).spec.architecture == "mixtral"
    assert not hub.sent
