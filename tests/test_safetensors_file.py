"""SafetensorsFile against the safetensors package on good files, and against every kind of bad header."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from moesaic.errors import CheckpointError
from moesaic.formats.safetensors_file import DTYPES, MAX_HEADER_BYTES, SafetensorsFile, printable

SHARED_DIR = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def write(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """A file with this header (an object, or raw bytes) and data, whatever they are."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8), **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@st.composite
def tensor_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    names = draw(
        st.lists(st.text(min_size=1, max_size=12).filter(lambda n: n != "__metadata__"), max_size=5, unique=True)
    )
    tensors = {}
    for name in names:
        dtype = draw(st.sampled_from(sorted(DTYPES.values(), key=str)))
        shape = draw(st.lists(st.integers(0, 5), max_size=4))
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
        tensors[name] = raw.view(dtype).reshape(shape)
    return tensors


@SHARED_DIR
@given(tensors=tensor_dicts(), metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
def test_good_files_read_as_the_safetensors_package_reads_them(
    tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    path = tmp_path / "good.safetensors"
    save_file(tensors, path, metadata or None)  # the package writes invalid JSON for {} without tensors
    oracle = load_file(path)
    with SafetensorsFile(path) as file:
        assert set(file.names()) == set(oracle) == set(tensors)
        assert file.metadata == metadata
        for name, expected in oracle.items():
            got = file.read(name)
            assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
            assert bytes_of(got) == bytes_of(expected)
            info = file.info(name)
            assert path.read_bytes()[info.offset : info.offset + info.nbytes] == bytes_of(expected)


def test_names_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    header = {"late": entry("U8", [2], [1, 3]), "early": entry("U8", [1], [0, 1])}
    with SafetensorsFile(write(tmp_path / "x", header, b"abc")) as file:
        assert file.names() == ("early", "late")


def test_reads_from_many_threads_at_once(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(97, 13) for i in range(40)}
    save_file(tensors, tmp_path / "x")
    with SafetensorsFile(tmp_path / "x") as file, ThreadPoolExecutor(4) as pool:
        names = list(tensors) * 5
        assert all(torch.equal(got, tensors[n]) for n, got in zip(names, pool.map(file.read, names), strict=True))


def test_read_into_fills_the_view_and_nothing_else(tmp_path: Path) -> None:
    save_file({"w": torch.arange(6.0).reshape(2, 3)}, tmp_path / "x")
    storage = torch.nn.Parameter(torch.full((4, 3), -1.0))
    with SafetensorsFile(tmp_path / "x") as file:
        file.read_into("w", storage[1:3])
        assert storage.tolist() == [[-1.0] * 3, [0.0, 1.0, 2.0], [3.0, 4.0, 5.0], [-1.0] * 3]
        with pytest.raises(ValueError, match="destination"):
            file.read_into("w", torch.empty(2, 3, dtype=torch.float64))
        with pytest.raises(ValueError, match="contiguous"):
            file.read_into("w", torch.empty(3, 2).T)
        with pytest.raises(CheckpointError, match="no tensor named v"):
            file.read("v")
    with pytest.raises(ValueError, match="closed"):
        file.read("w")


BAD_ENTRIES: dict[str, tuple[object, str]] = {
    "overlap": (
        [("a", entry()), ("b", entry(offsets=[4, 12])), ("c", entry("U8", [4], [12, 16]))],
        "b: .* overlaps .* a",
    ),
    "hole": ([("a", entry()), ("b", entry("F32", [1], [12, 16]))], "b: 4 bytes before it"),
    "hole at the start": ([("a", entry(offsets=[8, 16]))], "a: 8 bytes before it"),
    "rest": ([("a", entry())], "8 bytes at its end"),
    "beyond the file": ([("a", entry(shape=[8], offsets=[0, 32]))], "a: .*truncated.* Download"),
    "span": ([("a", entry(shape=[3], offsets=[0, 16]))], "a: .*span 16 bytes.* need 12"),
    "reversed": ([("a", entry(offsets=[8, 0]))], "a: .*span -8"),
    "negative offset": ([("a", entry(offsets=[-8, 0]))], "a: its data_offsets"),
    "one offset": ([("a", entry(offsets=[8]))], "a: its data_offsets"),
    "float offset": ([("a", entry(offsets=[0, 8.0]))], "a: its data_offsets"),
    "negative size": ([("a", entry(shape=[-2]))], "a: its shape"),
    "boolean size": ([("a", entry("F64", [True]))], "a: its shape"),
    "shape is no list": ([("a", entry(shape=2))], "a: its shape"),
    "overflow": ([("a", entry(shape=[2**32, 2**32], offsets=[0, 0]))], "a: .*overflows"),
    "overflow beside zero": ([("a", entry(shape=[0, 2**62, 2**62], offsets=[0, 0]))], "a: .*overflows"),
    "overflow of one": ([("a", entry(shape=[0, 2**63], offsets=[0, 0]))], "a: .*overflows"),
    "dimensions": ([("a", entry(shape=[1] * 65, offsets=[0, 4]))], "a: .*65 dimensions"),
    "unknown dtype": ([("a", entry("F33"))], "a: its dtype F33 is unknown"),
    "no dtype": ([("a", entry(None))], "a: its dtype"),
    "list as dtype": ([("a", entry(["F32"]))], "a: its dtype"),
    "fp4": ([("a", entry("F4", [16]))], "a: its dtype F4 is not supported"),
    "fp6": ([("a", entry("F6_E2M3", [16]))], "a: its dtype F6_E2M3 is not supported"),
    "extra field": ([("a", entry(more=1))], "a: its header entry"),
    "no entry": ([("a", None)], "a: its header entry"),
    "duplicate": ([("a", entry()), ("a", entry(offsets=[8, 16]))], "a: appears twice"),
    "metadata": ([("__metadata__", {"k": 1})], "__metadata__: must map"),
    "metadata list": ([("__metadata__", [])], "__metadata__: must map"),
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_bad_entry_is_refused_by_name(tmp_path: Path, case: str) -> None:
    pairs, message = BAD_ENTRIES[case]
    body = ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in pairs)  # type: ignore[attr-defined]
    path = write(tmp_path / "bad.safetensors", f"{{{body}}}".encode(), bytes(16))
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsFile(path)
    assert str(caught.value).startswith(str(path))
    assert caught.value.remedy


BAD_HEADERS: dict[str, tuple[object, str]] = {
    "not an object": (b"[]", "not begin with '{'"),
    "leading space": (b" {}", "not begin with '{'"),
    "open": (b'{"a":', "not valid JSON"),
    "deep": (b'{"a":' + b"[" * 200_000, "not valid JSON"),
    "digits": (b'{"a":' + b"9" * 5000 + b"}", "not valid JSON"),
    "not utf-8": (b'{"\xff":1}', "not UTF-8"),
    "surrogate": (b'{"\\ud800":{}}', r"\\ud800: the name is not valid Unicode"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_header_is_refused(tmp_path: Path, case: str) -> None:
    header, message = BAD_HEADERS[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsFile(write(tmp_path / "bad.safetensors", header))
    assert str(caught.value).startswith(str(tmp_path / "bad.safetensors"))


def test_empty_short_and_oversized(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.touch()
    with pytest.raises(CheckpointError, match=r"x.safetensors: the file is empty. Download"):
        SafetensorsFile(path)
    for size in range(1, 10):
        path.write_bytes(b"\2\0\0\0\0\0\0\0{"[:size])
        with pytest.raises(CheckpointError, match=r"too few|truncated"):
            SafetensorsFile(path)
    with pytest.raises(CheckpointError, match=f"claims {2**63} bytes; the limit"):
        SafetensorsFile(write(path, b"{}", length=2**63))
    with pytest.raises(CheckpointError, match=r"claims 3 bytes.*truncated"):
        SafetensorsFile(write(path, b"{}", length=3))
    with path.open("wb") as file:  # sparse: the file really is that large
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{")
        file.truncate(MAX_HEADER_BYTES + 100)
    with pytest.raises(CheckpointError, match="the limit is 100000000"):
        SafetensorsFile(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = save({"a": torch.arange(5), "b": torch.ones(3, dtype=torch.bfloat16)})
    for size in range(len(whole)):
        path = tmp_path / "cut.safetensors"
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
            SafetensorsFile(path)


def test_other_kinds_of_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"GGUF\3\0\0\0" + bytes(64))
    with pytest.raises(CheckpointError, match="is a GGUF file"):
        SafetensorsFile(path)
    for protocol in range(2, 6):
        path.write_bytes(pickle.dumps({"w": [1.5] * 40}, protocol))
        with pytest.raises(CheckpointError, match=r"pickle files are never loaded\. Convert"):
            SafetensorsFile(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"x")
    with pytest.raises(CheckpointError, match="pickle files are never loaded"):
        SafetensorsFile(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        SafetensorsFile(path)
    with pytest.raises(CheckpointError, match="cannot be opened"):
        SafetensorsFile(tmp_path / "absent.safetensors")
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(CheckpointError, match="not a regular file"):
            SafetensorsFile(tmp_path / name)


@pytest.mark.parametrize("length", [0x80, 0x0280, 0x0580])
def test_a_header_whose_length_looks_like_a_pickle_is_fine(tmp_path: Path, length: int) -> None:
    raw = json.dumps({"a": entry()}).encode().ljust(length)
    with SafetensorsFile(write(tmp_path / "x", raw, bytes(8))) as file:
        assert file.read("a").tolist() == [0.0, 0.0]


def test_a_file_that_shrinks_after_opening_is_an_error(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(100)}, tmp_path / "x")
    with SafetensorsFile(tmp_path / "x") as file:
        os.truncate(tmp_path / "x", 200)
        with pytest.raises(CheckpointError, match="x: a: the file became shorter"):
            file.read("a")


def test_names_in_messages_are_harmless() -> None:
    assert printable("a\x1b[2J\ud800\nb") == r"a\x1b[2J\ud800\nb"
    assert len(printable("x" * 10_000)) < 200


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.integers()
    | st.floats()
    | st.sampled_from([*DTYPES, "F4", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape"]), inner, max_size=3),
    max_leaves=4,
)


def refused_cleanly_or_read_as_the_oracle_does(path: Path) -> None:
    """Either a CheckpointError that names the file, or the safetensors package accepts it too, with the same bytes."""
    try:
        file = SafetensorsFile(path)
    except CheckpointError as refusal:
        clean = str(refusal).startswith(str(path)) and str(refusal).isprintable() and refusal.remedy
    else:
        with file, safe_open(path, "pt") as oracle:
            same_names = set(oracle.keys()) == set(file.names())
            clean = same_names and all(bytes_of(oracle.get_tensor(n)) == bytes_of(file.read(n)) for n in file.names())
    assert clean


@SHARED_DIR
@given(data=st.data())
def test_fuzzed_headers_raise_only_checkpoint_errors(tmp_path: Path, data: st.DataObject) -> None:
    header: dict[str, Any] = {
        "a": entry("BF16", [2, 3], [0, 12]),
        "b": entry("U8", [4], [12, 16]),
        "c": entry("I64", [0], [16, 16]),
        "__metadata__": {"format": "pt"},
    }
    for _ in range(data.draw(st.integers(0, 3))):
        name = data.draw(st.sampled_from(list(header)))
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "whole", "inner", "near", "rename"]))
        if field == "rename":
            header[data.draw(st.text(max_size=3))] = header.pop(name)
        elif field == "whole" or not isinstance(header[name], dict):
            header[name] = data.draw(VALUES)
        elif field == "near":
            begin, end = data.draw(st.tuples(st.integers(0, 17), st.integers(0, 17)))
            header[name].update(dtype="U8", shape=[end - begin], data_offsets=[begin, end])
        elif field == "inner":
            header[name]["shape"] = [
                data.draw(st.integers(-1, 7)),
                data.draw(st.sampled_from([1, 2**31, 2**63, 2**64])),
            ]
        else:
            header[name] = {**header[name], field: data.draw(VALUES)}
    refused_cleanly_or_read_as_the_oracle_does(write(tmp_path / "fuzz.safetensors", header, bytes(range(16))))


@SHARED_DIR
@given(data=st.data())
def test_fuzzed_bytes_raise_only_checkpoint_errors(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(save({"a": torch.arange(5), "b": torch.ones(2, 3, dtype=torch.bfloat16)}, {"k": "v"}))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        how = data.draw(st.sampled_from(["byte", "json", "cut", "insert"]))
        if how == "byte":
            raw[at] = data.draw(st.integers(0, 255))
        elif how == "json":
            raw[at] = data.draw(st.sampled_from(b'0123456789-,:"[]{}.eE '))
        elif how == "cut":
            del raw[at : at + data.draw(st.integers(1, 20))]
        else:
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=5))
        if not raw:
            break
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(raw)
    refused_cleanly_or_read_as_the_oracle_does(path)
