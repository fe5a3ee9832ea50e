"""Bad input from end to end, through `moesaic generate`: one line that names the culprit, a non-zero exit code."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic import LLM
from moesaic.errors import OptionError
from tests.cli_support import Done, call, spawn, write_model

CODE = {"option": 2, "checkpoint": 3, "unsupported": 4, "request": 5}
GATE = "model.layers.1.block_sparse_moe.gate.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture
def model(good: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    path = tmp_path / "model"
    path.mkdir()
    for file in good.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def refused(done: Done, kind: str, *culprits: str) -> None:
    """One line of stderr that names each culprit; nothing on stdout; the exit code of that kind of error."""
    for culprit in culprits:
        assert culprit in done.error
    assert done.code == CODE[kind], done
    assert done.out == ""
    assert "Traceback" not in done.error


def generate(model: Path | str, *argv: str | Path) -> Done:
    return call("generate", model, *(argv or ("--prompt", "hi")))


# --- safetensors -----------------------------------------------------------------------------------------------------


def write_header(file: Path, header: dict[str, Any], data: int) -> None:
    raw = json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(data))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def truncate_header(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def oversize_header(file: Path) -> None:
    file.write_bytes((1 << 40).to_bytes(8, "little") + file.read_bytes()[8:])


def overlap(file: Path) -> None:
    entry = {"dtype": "F32", "shape": [4]}
    header = {"a": entry | {"data_offsets": [0, 16]}, "b": entry | {"data_offsets": [8, 24]}}
    write_header(file, header, 24)


def overrun(file: Path) -> None:
    write_header(file, {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, 8)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (truncate, "truncated"), (truncate_header, "truncated"), (empty, "empty"), (oversize_header, "header"),
        (overlap, "overlap"), (overrun, "truncated"),
    ],
)  # fmt: skip
def test_a_damaged_safetensors_file(model: Path, damage: Callable[[Path], None], told: str) -> None:
    damage(model / "model.safetensors")
    refused(generate(model), "checkpoint", str(model / "model.safetensors"), told)


def shard(model: Path) -> dict[str, Any]:
    """Splits the weights in two, with an index, which is returned."""
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for part in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == part}, model / part)
    (model / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_a_missing_shard(model: Path) -> None:
    shard(model)
    assert generate(model, "--prompt", "hi", "--max-tokens", "1").code == 0
    (model / "part-1.safetensors").unlink()
    refused(generate(model), "checkpoint", "part-1.safetensors", "missing")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/outside.safetensors", "..", "sub/../x.safetensors"])
def test_an_index_that_leaves_the_directory(model: Path, name: str) -> None:
    index = shard(model)
    save_file({GATE: torch.zeros(4, 32)}, model.parent / "outside.safetensors")
    index["weight_map"][GATE] = name
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(generate(model), "checkpoint", "model.safetensors.index.json", GATE, name)


def replace(model: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors.pop(name)
    save_file(tensors if tensor is None else tensors | {name: tensor}, model / "model.safetensors")


def nan(value: float) -> torch.Tensor:
    tensor = torch.zeros(4, 32)
    tensor[2, 5] = value
    return tensor


@pytest.mark.parametrize(
    ("tensor", "told"),
    [
        (torch.zeros(4, 31), "[4, 31]"), (torch.zeros(32, 4), "[32, 4]"),
        (torch.zeros(4, 32, dtype=torch.int8), "int8"),
        (torch.zeros(4, 32).to(torch.float8_e4m3fn), "float8_e4m3fn"), (nan(torch.nan), "[2, 5]"),
        (nan(torch.inf), "[2, 5]"), (None, "lacks"),
    ],
    ids=["shape", "transposed", "dtype", "float8", "NaN", "infinite", "missing"],
)  # fmt: skip
def test_a_wrong_weight(model: Path, tensor: torch.Tensor | None, told: str) -> None:
    replace(model, GATE, tensor)
    refused(generate(model), "checkpoint", GATE, told)


def test_an_unexpected_weight(model: Path) -> None:
    save_file(load_file(model / "model.safetensors") | {"extra.bias": torch.zeros(3)}, model / "model.safetensors")
    refused(generate(model), "checkpoint", "extra.bias")


# --- the other files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff\xfe{}", b"GGUF\x03\x00"])
def test_a_bad_config(model: Path, content: bytes | None) -> None:
    (model / "config.json").unlink()
    if content is not None:
        (model / "config.json").write_bytes(content)
    refused(generate(model), "checkpoint", str(model / "config.json"))


def test_a_missing_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    refused(generate(model), "checkpoint", str(model), "tokenizer.json")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"model": {"type": "Magic"}}'])
def test_a_bad_tokenizer(model: Path, content: bytes) -> None:
    (model / "tokenizer.json").write_bytes(content)
    refused(generate(model), "checkpoint", str(model / "tokenizer.json"))


def change(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("kind", ["llama", "build", "../mixtral", "mixtral.x", ""])
def test_an_unknown_architecture(model: Path, kind: str) -> None:
    change(model, model_type=kind)
    done = generate(model)
    refused(done, "unsupported" if kind else "checkpoint", "config.json", "model_type", kind)


@pytest.mark.parametrize("quantisation", [{"quant_method": "magic"}, {"bits": 3}, "int3"])
def test_an_unknown_quantisation(model: Path, quantisation: Any) -> None:
    change(model, quantization_config=quantisation)
    done = generate(model)
    assert done.code in (CODE["unsupported"], CODE["checkpoint"])
    assert "quantization_config" in done.error


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", "32"), ("num_hidden_layers", -1), ("num_local_experts", 10**30), ("rms_norm_eps", None),
     ("num_experts_per_tok", 9), ("rope_theta", "NaN"), ("hidden_act", "swoosh"), ("vocab_size", 0)],
)  # fmt: skip
def test_a_wrong_field_of_the_config(model: Path, field: str, value: Any) -> None:
    change(model, **{field: value})
    done = generate(model)
    if field == "rms_norm_eps":
        assert done.code == 0, "null means the architecture's default"
        return
    assert done.code in (CODE["unsupported"], CODE["checkpoint"])
    assert field in done.error or str(value) in done.error


# --- not a checkpoint at all -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("model.gguf", b"GGUF\x03\x00\x00\x00" + bytes(64), "GGUF"), ("weights", b"GGUF\x03\x00\x00\x00", "GGUF"),
        ("model.pt", b"PK\x03\x04" + bytes(64), "pickle"), ("model.bin", b"\x80\x02}q\x00.", "pickle"),
        ("model.safetensors", b"\x80\x04\x95", "pickle"), ("notes.txt", b"hello", "not a directory"),
    ],
)  # fmt: skip
def test_a_file_given_as_a_model(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    refused(generate(tmp_path / name), "checkpoint", str(tmp_path / name), told)


def test_a_pickle_never_runs(model: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "boom"),)

    (model / "model.safetensors").unlink()
    torch.save(Bomb(), model / "pytorch_model.bin")
    refused(generate(model), "checkpoint", "pytorch_model.bin", "pickle")
    assert not (tmp_path / "boom").exists()


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    refused(generate(tmp_path / "nothing"), "checkpoint", str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    refused(generate(tmp_path / "empty"), "checkpoint", str(tmp_path / "empty"))
    assert generate("a" * 10_000).code == CODE["checkpoint"]


# --- prompts and options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [(), ("--raw",)])
def test_an_empty_prompt(good: Path, form: tuple[str, ...]) -> None:
    refused(generate(good, *form, "--prompt", ""), "request", "--prompt", "empty")
    refused(generate(good, *form, "--prompt", "fine", "--prompt", ""), "request", "--prompt 2", "empty")


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_a_file_without_prompts(good: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "none.txt").write_bytes(content)
    refused(generate(good, "--file", tmp_path / "none.txt"), "request", "none.txt", "no prompt")


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_a_file_that_is_not_utf_8(good: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"fine\ncaf\xe9\n")
    refused(generate(good, "--file", tmp_path / name), "request", str(tmp_path / name), "byte 8 ", "0xe9")


def test_a_file_that_cannot_be_read(good: Path, tmp_path: Path) -> None:
    refused(generate(good, "--file", tmp_path / "no.txt"), "request", str(tmp_path / "no.txt"))
    refused(generate(good, "--file", tmp_path), "request", str(tmp_path))


@pytest.mark.parametrize("form", [(), ("--raw",)])
@pytest.mark.parametrize("text", ["x", "word ", " ", "\u4f60"], ids=["letters", "words", "spaces", "wide"])
def test_a_prompt_of_ten_million_characters(good: Path, tmp_path: Path, form: tuple[str, ...], text: str) -> None:
    file = tmp_path / "long.txt"
    file.write_text("." + text * (10_000_000 // len(text)), encoding="utf-8")
    began = time.process_time()
    refused(generate(good, *form, "--file", file), "request", f"{file}:1", "tokens")
    assert time.process_time() - began < 10


def test_a_prompt_that_is_not_unicode(good: Path) -> None:
    refused(generate(good, "--prompt", "a\udc80"), "request", "--prompt", "Unicode")


def test_more_tokens_than_the_model_takes(good: Path) -> None:
    refused(generate(good, "--prompt", "hi", "--max-model-len", "100000"), "option", "--max-model-len", "256")
    done = generate(good, "--prompt", "hi", "--max-model-len", "256", "--kv-memory", "1K")
    assert done.code == 6
    assert "--kv-memory" in done.error


def test_an_unknown_option_of_the_python_api(good: Path) -> None:
    with pytest.raises(OptionError, match="max_modle_len"):
        LLM(str(good), max_modle_len=3)
    with pytest.raises(OptionError, match="--dtype"):
        LLM(str(good), dtype="int3")


# --- in a process of its own, where nothing can hide -----------------------------------------------------------------


def test_in_a_process(model: Path, tmp_path: Path) -> None:
    replace(model, GATE, nan(torch.nan))
    refused(spawn("generate", model, "--prompt", "hi"), "checkpoint", GATE, "NaN")
    (tmp_path / "p.txt").write_bytes(b"\xff")
    refused(spawn("generate", model, "--file", tmp_path / "p.txt"), "request", "p.txt", "byte 0 ")
    refused(spawn("generate", tmp_path / "p.txt", "--prompt", "x"), "checkpoint", "p.txt")
