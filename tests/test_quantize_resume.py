"""A quantisation that was killed, or stopped by the disk, goes on to the same bytes; any other is refused."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic.contracts.scheme import SCHEMES
from moesaic.errors import CapacityError, CheckpointError
from moesaic.formats.safetensors_file import SafetensorsFile
from moesaic.formats.safetensors_write import Entry, header_of
from moesaic.hardware import local_cpu
from moesaic.kernels.registry import Kernels
from moesaic.models.build import plan_here, spec_of
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.decoder import Decoder
from moesaic.models.loading import Slot
from moesaic.models.quantize import Recipe, prepare
from moesaic.models.quantize_files import is_kept
from moesaic.models.quantize_state import STATE, Workspace
from moesaic.models.quantize_write import Writer
from moesaic.models.weights import slots_of
from tests.cli_support import command, environment
from tests.quantize_support import bytes_of, quantize, quantized, tensors_of, write_source

SHARD = "100KiB"
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("resume") / "src", "qwen3_moe", num_hidden_layers=1)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted run writes."""
    out = quantized(source, tmp_path_factory.mktemp("resume") / "out", "mxfp8", "--shard-size", SHARD)
    assert len(list(out.glob("*.safetensors"))) == 5
    return bytes_of(out)


def kills(source: Path, directory: Path, *points: str) -> list[dict[str, Any]]:
    argv = [sys.executable, "-m", "tests.quantize_kills", str(source), str(directory), SHARD, *points]
    env = environment(PYTHONPATH=os.pathsep.join([str(ROOT / "src"), str(ROOT)]))
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_kills(found: list[dict[str, Any]], whole: dict[str, bytes]) -> None:
    first, *rest = found
    assert first["ended"] == 0
    assert bytes_of(Path(first["output"])) == whole
    for each in rest:
        assert each["ended"] == -signal.SIGKILL, each
        assert each["again"] == 0, each
        assert bytes_of(Path(each["output"])) == whole, each


def test_killed_at_several_points(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Before, within and after shards, between the last shard and config.json, and while tidying up."""
    found = kills(source, tmp_path, "1", "3", "8", "15", "24", "c1", "c9", "c19", "-13", "-6", "-2", "-1")
    check_kills(found, whole)
    stages = [each["left"] for each in found[1:]]
    assert any("model-00002-of-00005.safetensors.partial" in left for left in stages), "within a shard"
    assert any("model-00005-of-00005.safetensors" in left and "config.json" not in left for left in stages)
    assert any("config.json" in left and STATE in left for left in stages), "all but the tidying up"


@pytest.mark.long
def test_killed_everywhere(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """At each time that a run touches its output, and at each projection."""
    (first,) = kills(source, tmp_path / "whole")
    points = [*(str(i) for i in range(1, first["events"] + 1)), *(f"c{i}" for i in range(1, 20))]
    check_kills(kills(source, tmp_path / "killed", *points), whole)


def begin(source: Path, output: Path, limit: int, *more: str) -> None:
    """A run that cannot write a file of more bytes than that."""
    limited = command("quantize", source, output, "--scheme", "mxfp8", "--shard-size", SHARD, *more)
    done = subprocess.run(
        limited, env=environment(), capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == CapacityError.exit_code, done.stderr
    assert "the disk is full" in done.stderr
    assert "run the same command again" in done.stderr


def test_a_full_disk_is_told_and_then_taken_up(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """The kernel's own error, in the second shard or later. Then every option that matters, and the source."""
    sizes = [len(whole[f"model-0000{i}-of-00005.safetensors"]) for i in range(1, 6)]
    limit = next(max(sizes[:i]) for i in range(1, 5) if sizes[i] > max(sizes[:i]))
    shutil.copytree(source, tmp_path / "src")
    out = tmp_path / "out"
    begin(tmp_path / "src", out, limit)
    assert (out / "model-00001-of-00005.safetensors").exists()
    with pytest.raises(CheckpointError, match=r"config\.json: is missing"):
        Checkpoint.open(out)
    refused = {
        ("mxfp4", "--shard-size", SHARD): "scheme 'mxfp8', now 'mxfp4'",
        ("mxfp8", "--shard-size", "1MiB"): "shard_bytes 102400, now 1048576",
        ("mxfp8", "--shard-size", SHARD, "--keep", "*.o_proj"): "keep [], now ['*.o_proj']",
        ("mxfp8", "--shard-size", SHARD, "--experts-only"): "experts_only False, now True",
    }
    for options, what in refused.items():
        done = quantize(tmp_path / "src", out, *options)
        assert done.code == 2
        assert f"begun with other options: {what}" in done.error
        assert "remove it and begin again" in done.error
    os.utime(tmp_path / "src" / "model.safetensors")
    assert "source has changed" in quantize(tmp_path / "src", out, "mxfp8", "--shard-size", SHARD).error
    shutil.copystat(source / "model.safetensors", tmp_path / "src" / "model.safetensors")
    done = quantize(tmp_path / "src", out, "mxfp8", "--shard-size", SHARD)
    assert f"going on: {sizes.index(next(size for size in sizes if size > limit))} of 5 files are there" in done.err
    assert bytes_of(out) == whole


def test_a_run_that_wrote_nothing_yet_binds_nobody(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    begin(source, tmp_path / "out", 60_000)
    assert STATE in bytes_of(tmp_path / "out")
    quantized(source, tmp_path / "out", "mxfp4")
    assert "mxfp4" in (tmp_path / "out" / "config.json").read_text()
    assert not list((tmp_path / "out").glob("*.partial")), "of the file that was begun, too"


def test_no_room_is_known_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    """A source of more than the free space, all of it a hole in the file."""
    shutil.copytree(source, tmp_path / "src")
    hidden = 1 << 14
    wider = {"hidden_size": hidden, "vocab_size": shutil.disk_usage(tmp_path).free // (2 * hidden)}
    config = json.loads((source / "config.json").read_text()) | wider
    spec = spec_of(config)
    model = Decoder(spec, Kernels(plan_here(spec, local_cpu(), "float32")), torch.empty(0, device="meta"), 1)
    slots = [slot for slot in slots_of(model.sources(), None) if isinstance(slot, Slot)]
    entries = [Entry(slot.name, torch.bfloat16, tuple(slot.dest.shape)) for slot in slots]
    header = header_of(entries)
    with (tmp_path / "src" / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + sum(entry.nbytes for entry in entries))
    (tmp_path / "src" / "config.json").write_text(json.dumps(config))
    done = quantize(tmp_path / "src", tmp_path / "out", "mxfp8")
    assert done.code == CapacityError.exit_code
    assert "are still to be written" in done.error
    assert not list((tmp_path / "out").glob("*.safetensors*"))


def test_outputs_that_are_not_ours_are_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("x")
    (tmp_path / "download").mkdir()
    (tmp_path / "download" / "notes.partial").write_text("x")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / STATE).write_text("[1]")
    for name, what in (("file", "is not a directory"), ("full", "is not empty (it holds 'notes.txt')"),
                       ("download", "is not empty (it holds 'notes.partial')"),
                       ("odd", "not what an unfinished run leaves")):  # fmt: skip
        done = quantize(source, tmp_path / name, "mxfp8")
        assert done.code == 2
        assert what in done.error
    assert (tmp_path / "full" / "notes.txt").read_text() == "x"
    (tmp_path / "link").symlink_to(source)
    for same in (source, tmp_path / "link", source / ".." / source.name):
        assert "is SRC itself" in quantize(source, same, "mxfp8").error
    (tmp_path / "empty").mkdir()
    quantized(source, tmp_path / "empty", "mxfp8")
    assert "is not empty" in quantize(source, tmp_path / "empty", "mxfp8").error, "complete: not written again"


def test_two_at_once(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    fd = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    assert "another process is writing there" in quantize(source, tmp_path / "out", "mxfp8").error
    os.close(fd)
    quantized(source, tmp_path / "out", "mxfp8")


@pytest.mark.parametrize(
    ("tensor", "unit"),
    [
        ("model.layers.0.mlp.experts.3.up_proj.weight", "model.layers.0.mlp.experts.3.up_proj"),
        ("model.layers.0.self_attn.o_proj.weight_scale_inv", "model.layers.0.self_attn.o_proj"),
        ("model.norm.weight", "model.norm.weight"),
    ],
)
def test_one_wrong_bit_on_the_disk_is_found(source: Path, tmp_path: Path, tensor: str, unit: str) -> None:
    recipe = Recipe(SCHEMES["mxfp8"])
    with Checkpoint.open(source) as checkpoint, Workspace(tmp_path, recipe.options(checkpoint)):
        plan = prepare(checkpoint, recipe)
        writer = Writer(checkpoint, plan, {}, lambda _: None)
        (shard,) = plan.shards
        writer.write(shard, tmp_path)
        path = tmp_path / shard.name
        writer.verify(path, shard)
        with SafetensorsFile(path) as file:
            at = file.info(tensor).offset + 5
        raw = bytearray(path.read_bytes())
        raw[at] ^= 1
        path.write_bytes(raw)
        with pytest.raises(CheckpointError, match=f"{unit} is read back with other values"):
            writer.verify(path, shard)


def test_a_weight_that_is_no_number_is_named(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "src")
    tensors = tensors_of(source)
    name = "model.layers.0.mlp.experts.2.down_proj.weight"
    tensors[name][3, 4] = torch.nan
    save_file(tensors, tmp_path / "src" / "model.safetensors", {"format": "pt"})
    done = quantize(tmp_path / "src", tmp_path / "out", "mxfp8")
    assert done.code == CheckpointError.exit_code
    assert f"{name}: element [3, 4] is a NaN" in done.error
    done = quantize(tmp_path / "nowhere", tmp_path / "out2", "mxfp8")
    assert done.code == CheckpointError.exit_code
    assert not (tmp_path / "out2").exists()


def test_what_is_copied_and_what_is_not(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "src")
    kept = {"LICENSE": "l", "NOTICE.md": "n", "tokenizer.model": "t", "merges.txt": "m", "README.md": "r",
            "generation_config.json": '{"top_k": 3}', "tokenization_x.py": "pass"}  # fmt: skip
    left = {".hidden.json": "{}", "old.gguf": "x", "training_args.bin": "x"}
    for name, text in {**kept, **left}.items():
        (tmp_path / "src" / name).write_text(text)
    (tmp_path / "src" / "additional_chat_templates").mkdir()
    (tmp_path / "src" / "additional_chat_templates" / "tool.jinja").write_text("t")
    out = quantized(tmp_path / "src", tmp_path / "out", "mxfp4", "--shard-size", SHARD)
    written = bytes_of(out)
    for name in (*kept, "tokenizer.json", "tokenizer_config.json", "additional_chat_templates/tool.jinja"):
        assert written[name] == (tmp_path / "src" / name).read_bytes()
    assert not set(left) & set(written)
    before = json.loads((tmp_path / "src" / "config.json").read_text())
    after = json.loads(written["config.json"])
    assert after.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert after == before
    index = json.loads(written["model.safetensors.index.json"])
    stored = {name: file.name for file in out.glob("*.safetensors") for name in load_file(file)}
    assert index["weight_map"] == stored
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(out).values())
    assert not [name for name in written if name.endswith(".partial") or name == STATE]
    (tmp_path / "hf_quant_config.json").write_text("{}")
    assert not is_kept(tmp_path / "hf_quant_config.json"), "of a source that was quantised"
    (tmp_path / "secret").write_text("s")
    (tmp_path / "src" / "NOTICE").symlink_to(tmp_path / "secret")
    done = quantize(tmp_path / "src", tmp_path / "out3", "mxfp4")
    assert done.code == CheckpointError.exit_code
    assert "leaves the checkpoint" in done.error
