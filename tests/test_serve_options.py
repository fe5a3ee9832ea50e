"""Where the server's options come from, and what is refused: no server is started here."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from moesaic.commands import serve
from moesaic.config import EngineConfig
from moesaic.errors import OptionError
from moesaic.serving import extra
from moesaic.serving.auth import Keys
from moesaic.serving.errors import HTTPError
from moesaic.serving.options import ServeConfig, resolve
from tests.cli_support import call


def test_every_option_has_a_flag_a_variable_and_a_place_in_the_file() -> None:
    assert set(serve.SERVE) == {field.name for field in fields(ServeConfig)}
    assert not {f.name for f in fields(ServeConfig)} & {f.name for f in fields(EngineConfig)}


def test_flag_before_environment_before_file_before_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("port: 1\nmax_queue: 2\nmax-n: 3\nkv_memory: 4MiB\nserved_model_name: [x, y]\nmodel: m\n")
    monkeypatch.setenv("MOESAIC_PORT", "11")
    monkeypatch.setenv("MOESAIC_MAX_QUEUE", "12")
    monkeypatch.setenv("MOESAIC_DETERMINISTIC", "yes")
    monkeypatch.setenv("MOESAIC_CACHE", "/somewhere")
    done = call("serve", "--config", file, "--port", "21", "--print-config", "--api-key", "top-secret")
    assert done.code == 0, done
    assert "top-secret" not in done.out
    shown = yaml.safe_load(done.out)
    expected = {"port": 21, "max_queue": 12, "max_n": 3, "kv_memory": 4 << 20, "served_model_name": ["x", "y"],
                "model": "m", "deterministic": True, "host": "127.0.0.1", "api_key": ["<hidden>"]}  # fmt: skip
    assert {name: shown[name] for name in expected} == expected
    told = dict(re.findall(r"^(\w+):.*# (\w+)$", done.out, re.MULTILINE))
    assert (told["port"], told["max_queue"], told["max_n"], told["host"]) == ("flag", "environment", "file", "default")
    # What it prints can be read again, and comes to the same.
    again = tmp_path / "again.yaml"
    again.write_text(done.out.replace("<hidden>", "top-secret"))
    monkeypatch.delenv("MOESAIC_PORT")
    assert yaml.safe_load(call("serve", "--config", again, "--print-config").out) == shown


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("prot: 1", "prot"), ("port: x", "port"), ("port: true", "port"), ("deterministic: 1", "deterministic"),
        ("[1]", "map options"), ("port: [", "cannot be read"), ("kv_memory: 3 apples", "apples"),
        ("model: 3", "model"), ("model: [a]", "model"), ("port: 1\nport: 2", "port is given twice"),
        ("max-queue: 1\nmax_queue: 2", "max_queue is given twice"), ("kv_memory: 1e400", "1e400"),
        ("max_body: 99999999999999999999T", "size"), ("api_key: ['<hidden>']", "--print-config"),
        ("port: 70000", "--port"), ("max_n: 0", "--max-n"), ("request_timeout: .inf", "--request-timeout"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    done = call("serve", "--config", file, "--print-config")
    assert done.code == 2
    assert told in done.error


@pytest.mark.parametrize(("name", "text"), [("PROT", "1"), ("PORT", "x"), ("DETERMINISTIC", "maybe")])
def test_a_wrong_variable_is_one_line(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    monkeypatch.setenv(f"MOESAIC_{name}", text)
    done = call("serve", "--print-config")
    assert done.code == 2
    assert f"MOESAIC_{name}" in done.error


def test_keys_come_from_both_places(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# a comment\n\nfrom-file\n")
    keys = Keys(ServeConfig(api_key=("given",), api_key_file=str(file)).keys())
    for key in ("given", "from-file"):
        keys.check("/v1/models", f"Bearer {key}".encode())
    for wrong in (None, b"Bearer", b"Bearer # a comment", b"bearer GIVEN", b"given"):
        with pytest.raises(HTTPError) as refused:
            keys.check("/v1/models", wrong)
        assert refused.value.status == 401
    keys.check("/health", None)
    for text in ("", "#\n", "a key with spaces\n", "ünï\n"):
        file.write_text(text)
        with pytest.raises(OptionError):
            ServeConfig(api_key_file=str(file)).keys()
    with pytest.raises(OptionError, match="No such file"):
        ServeConfig(api_key_file=str(tmp_path / "absent")).keys()


def test_an_unknown_option_of_any_source_is_an_error() -> None:
    with pytest.raises(OptionError, match="from the file"):
        resolve({"file": {"nonsense": 1}})


def test_a_missing_package_is_one_line_with_the_command_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extra, "PACKAGES", (*extra.PACKAGES, "no_such_package"))
    done = call("serve", "--print-config")
    assert done.code == 4
    assert "no_such_package" in done.error
    assert "pip install 'moesaic[serve]'" in done.error
