"""load() fills parameters exactly, and names the tensor that is missing, unexpected, misshapen, mistyped or NaN."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moesaic.errors import CheckpointError
from moesaic.models import loading
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.loading import LoadReport, Slot, load

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def keep_all(name: str) -> bool:
    return False


def make(directory: Path, *shards: dict[str, torch.Tensor]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "m"}))
    for number, tensors in enumerate(shards):
        save_file(tensors, directory / f"model-{number}.safetensors")
    return directory


def fill(
    directory: Path, *slots: Slot, ignore: loading.Callable[[str], bool] = keep_all, check_finite: bool = True
) -> LoadReport:
    with Checkpoint.open(directory) as checkpoint:
        return load(checkpoint, slots, ignore=ignore, progress=False, check_finite=check_finite)


def refused(directory: Path, message: str, *slots: Slot) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        fill(directory, *slots)
    assert caught.value.remedy
    assert str(directory) in str(caught.value)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("staging", [16, 24, 100, 1 << 20])
@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize("wanted", FLOATS)
def test_values_arrive_in_every_layout(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stored: torch.dtype,
    wanted: torch.dtype,
    staging: int,
    device: str,
) -> None:
    """Contiguous, transposed, column-sliced, scalar and empty destinations, in pieces smaller than a row."""
    monkeypatch.setattr(loading, "STAGING_BYTES", staging)
    shapes = {"plain": (5, 7), "turned": (7, 3, 2), "columns": (6, 4), "scalar": (), "empty": (3, 0), "one": (1, 1, 40)}
    source = {name: torch.randn(shape).to(stored) for name, shape in shapes.items()}
    make(tmp_path, dict(list(source.items())[:3]), dict(list(source.items())[3:]))
    wide = torch.full((6, 9), -1.0, dtype=wanted, device=device)
    dest = {name: torch.full(shape, -1.0, dtype=wanted, device=device) for name, shape in shapes.items()}
    dest["turned"] = torch.full((2, 3, 7), -1.0, dtype=wanted, device=device).permute(2, 1, 0)
    dest["columns"] = wide[:, 2:6]
    report = fill(tmp_path, *(Slot(name, tensor) for name, tensor in dest.items()))
    for name, tensor in dest.items():
        assert torch.equal(tensor.cpu(), source[name].to(wanted)), name
    assert torch.equal(wide[:, [0, 1, 6, 7, 8]].cpu(), torch.full((6, 5), -1.0, dtype=wanted))
    assert report.tensors == 6
    assert report.bytes == sum(tensor.nbytes for tensor in source.values())
    assert report.seconds > 0


@pytest.mark.parametrize("dtype", [*FP8, torch.uint8, torch.int32, torch.int64, torch.bool], ids=str)
def test_codes_are_copied_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    source = torch.randint(0, 2, (5, 6 * dtype.itemsize), dtype=torch.uint8).view(dtype)
    make(tmp_path, {"w": source})
    rows, columns = torch.empty(5, 6, dtype=dtype), torch.empty(6, 5, dtype=dtype).T
    fill(tmp_path, Slot("w", rows), Slot("w", columns))
    assert torch.equal(rows.view(torch.uint8), source.view(torch.uint8))
    assert torch.equal(columns.contiguous().view(torch.uint8), source.view(torch.uint8))


def test_one_tensor_feeds_several_slots_and_parts_of_one_parameter(tmp_path: Path) -> None:
    make(tmp_path, {"embed": torch.randn(6, 4)}, {"gate": torch.randn(3, 4), "up": torch.randn(3, 4)})
    gate_up = torch.nn.Parameter(torch.zeros(2, 6, 4))
    with torch.inference_mode():
        head = torch.zeros(6, 4)
    embed = torch.nn.Parameter(torch.zeros(6, 4, dtype=torch.bfloat16), requires_grad=False)
    with Checkpoint.open(tmp_path) as checkpoint:
        slots = [Slot("up", gate_up[1, 3:]), Slot("embed", head), Slot("gate", gate_up[1, :3]), Slot("embed", embed)]
        report = load(checkpoint, iter(slots), ignore=keep_all, progress=False)
        assert torch.equal(gate_up[1], torch.cat([checkpoint.read("gate"), checkpoint.read("up")]))
        assert torch.equal(head, checkpoint.read("embed"))
        assert torch.equal(embed, checkpoint.read("embed").bfloat16())
    assert not gate_up[0].any()
    assert gate_up.is_leaf
    assert gate_up.requires_grad
    assert report.tensors == 3


def test_files_are_read_from_front_to_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "READERS", 1)
    source = {f"t{i}": torch.randn(3) for i in range(12)}
    make(tmp_path, dict(list(source.items())[:7]), dict(list(source.items())[7:]))
    order = []
    with Checkpoint.open(tmp_path) as checkpoint:
        for file in checkpoint.files:
            read = file.read_bytes
            monkeypatch.setattr(
                file,
                "read_bytes",
                lambda info, start, view, read=read: (order.append(info.name), read(info, start, view)),
            )
        slots = [Slot(name, torch.empty(3)) for name in reversed(source)]
        load(checkpoint, slots, ignore=keep_all, progress=False)
        assert order == list(checkpoint.tensors())


def test_missing_tensors_are_listed_and_counted(tmp_path: Path) -> None:
    make(tmp_path, {"w": torch.zeros(2)})
    slots = [Slot(f"layers.{i}", torch.empty(2)) for i in range(8)]
    refused(tmp_path, r"lacks 8 tensors: layers\.0, .*layers\.4 and 3 more", Slot("w", torch.empty(2)), *slots)
    refused(tmp_path, r"lacks 1 tensor: layers\.7\.", Slot("w", torch.empty(2)), slots[7])


def test_unexpected_tensors_are_listed_unless_ignored(tmp_path: Path) -> None:
    make(tmp_path, {"w": torch.zeros(2), "rotary.inv_freq": torch.zeros(2), "extra\x1b": torch.zeros(1)})
    refused(tmp_path, r"no place for 2 tensors: .*extra\\x1b", Slot("w", torch.empty(2)))
    report = fill(tmp_path, Slot("w", torch.empty(2)), ignore=lambda name: name != "w")
    assert report.tensors == 1


def test_an_optional_slot_may_stay_empty(tmp_path: Path) -> None:
    make(tmp_path, {"w": torch.ones(2)})
    bias, weight = torch.full((2,), 7.0), torch.zeros(2)
    fill(tmp_path, Slot("b", bias, optional=True), Slot("w", weight, optional=True))
    assert bias.tolist() == [7.0, 7.0]
    assert weight.tolist() == [1.0, 1.0]


def test_a_wrong_shape_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    make(tmp_path, {"a": torch.ones(2), "w": torch.ones(4, 2)})
    first = torch.zeros(2)
    refused(tmp_path, r"model-0\.safetensors: w: its shape is \[4, 2\]; the model expects \[2, 4\]",
            Slot("a", first), Slot("w", torch.empty(2, 4)))  # fmt: skip
    assert not first.any()
    refused(tmp_path, r"w: its shape is \[4, 2\]; the model expects \[8\]",
            Slot("a", first), Slot("w", torch.empty(8)))  # fmt: skip


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        *((fp8, torch.bfloat16) for fp8 in FP8),
        (torch.int32, torch.float32),
        (torch.uint8, torch.bfloat16),
        (torch.bool, torch.float32),
        (torch.float32, torch.int32),
        (torch.bfloat16, torch.float8_e4m3fn),
        (torch.int32, torch.int64),
        (torch.uint8, torch.float8_e4m3fn),
    ],
    ids=str,
)
def test_a_wrong_dtype_is_never_converted(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    make(tmp_path, {"w": torch.zeros(4, stored.itemsize, dtype=torch.uint8).view(stored)})
    found, takes = str(stored).removeprefix("torch."), str(wanted).removeprefix("torch.")
    refused(
        tmp_path, rf"w: its dtype is {found}; the model takes .*{takes}", Slot("w", torch.empty(4, 1, dtype=wanted))
    )


def non_finite_codes(dtype: torch.dtype) -> list[int]:
    """By torch's own decoding, the 8- or 16-bit patterns that are NaN or infinite."""
    codes = torch.arange(256, dtype=torch.uint8) if dtype.itemsize == 1 else torch.arange(-(1 << 15), 1 << 15).short()
    return codes[~torch.isfinite(codes.view(dtype).float())].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, *FP8], ids=str)
def test_the_finite_check_is_exact_on_every_pattern(dtype: torch.dtype) -> None:
    integer = torch.uint8 if dtype.itemsize == 1 else torch.int16
    every = torch.arange(256, dtype=integer) if dtype.itemsize == 1 else torch.arange(-(1 << 15), 1 << 15).short()
    bad = set(non_finite_codes(dtype))
    good = torch.tensor([code for code in every.tolist() if code not in bad], dtype=integer)
    assert bad
    assert loading._first_non_finite(good.view(torch.uint8).numpy(), dtype) is None
    for code in bad:
        good[3] = code
        assert loading._first_non_finite(good.view(torch.uint8).numpy(), dtype) == 3


@given(values=st.lists(st.floats(width=32), min_size=1, max_size=9), double=st.booleans())
def test_the_finite_check_is_exact_in_32_and_64_bits(values: list[float], double: bool) -> None:
    dtype = torch.float64 if double else torch.float32
    tensor = torch.tensor(values, dtype=dtype)
    at = loading._first_non_finite(tensor.view(torch.uint8).numpy(), dtype)
    assert (at is None) == bool(torch.isfinite(tensor).all())
    assert at is None or not torch.isfinite(tensor[at])


@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, wanted: torch.dtype
) -> None:
    monkeypatch.setattr(loading, "STAGING_BYTES", 32)
    weight = torch.randn(9, 7).bfloat16()
    weight[6, 5] = value
    make(tmp_path, {"a": torch.zeros(2)}, {"layers.0.w": weight})
    dest = torch.empty(9, 7, dtype=wanted)
    slots = [Slot("a", torch.empty(2)), Slot("layers.0.w", dest)]
    refused(tmp_path, r"model-1\.safetensors: layers\.0\.w: the weight at \[6, 5\] is NaN or infinite", *slots)
    fill(tmp_path, *slots, check_finite=False)
    assert torch.equal(dest.nan_to_num(1.5), weight.to(wanted).nan_to_num(1.5))


@pytest.mark.parametrize("device", DEVICES)
def test_a_weight_too_large_for_the_destination_is_named(tmp_path: Path, device: str) -> None:
    weight = torch.ones(3, 4)
    weight[2, 1] = 1e6
    make(tmp_path, {"w": weight})
    dest = torch.empty(3, 4, dtype=torch.float16, device=device)
    refused(tmp_path, r"w: a weight at or after \[0, 0\] is too large for float16", Slot("w", dest))
    weight[2, 1] = 65504
    make(tmp_path, {"w": weight})
    fill(tmp_path, Slot("w", dest))
    assert torch.equal(dest.cpu(), weight.half())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(bad=st.sets(st.integers(0, 30), min_size=1, max_size=4))
def test_with_several_bad_tensors_the_first_in_the_files_is_named(tmp_path: Path, bad: set[int]) -> None:
    source = {f"t{i:02}": torch.full((50,), float("nan") if i in bad else 1.0) for i in range(31)}
    make(tmp_path, source)
    refused(tmp_path, f": t{min(bad):02}: ", *(Slot(name, torch.empty(50)) for name in source))


def test_a_destination_without_storage_is_the_callers_mistake(tmp_path: Path) -> None:
    make(tmp_path, {"w": torch.zeros(2)})
    with pytest.raises(ValueError, match="no storage"):
        fill(tmp_path, Slot("w", torch.empty(2, device="meta")))


def test_the_bar_counts_bytes_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, {"w": torch.zeros(500)})
    for progress in (False, True):
        with Checkpoint.open(tmp_path) as checkpoint:
            load(checkpoint, [Slot("w", torch.empty(500))], ignore=keep_all, progress=progress)
        out, err = capsys.readouterr()
        assert not out
        assert ("Loading weights: 100%" in err and "2.00k/2.00k" in err) == progress
        assert progress or not err


def test_nothing_to_load(tmp_path: Path) -> None:
    make(tmp_path, {"w": torch.zeros(1)})
    assert fill(tmp_path, ignore=lambda name: True).bytes == 0
