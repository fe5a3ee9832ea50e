"""Cutting weights: the parts are the same numbers as the same cut of the whole; an illegal cut is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.contracts.scheme import FORMATS, WeightFormat
from moesaic.errors import UnsupportedError
from moesaic.formats.base import QuantTensor, format_of
from moesaic.formats.shard import legal_counts, step_of

FORMS = [
    *(WeightFormat(name) for name in FORMATS if name != "int4"),
    WeightFormat("int4", 32, "bfloat16"),
    WeightFormat("int4", 128, "float32"),
    WeightFormat("int4", 32, "float16", zero_points=True),
]


def rows_of(whole: Tensor, segments: tuple[int, ...], rank: int, count: int) -> Tensor:
    """Part `rank` of each segment of the rows."""
    return torch.cat([part.chunk(count, -2)[rank] for part in whole.split(list(segments), -2)], -2)


@pytest.mark.parametrize("form", FORMS, ids=str)
@settings(max_examples=25)
@given(
    blocks=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    columns=st.integers(1, 2),
    count=st.integers(1, 4),
    lead=st.sampled_from([(), (1,), (2,)]),
)
def test_legal_cuts_give_the_numbers_of_the_whole(
    form: WeightFormat, blocks: list[int], columns: int, count: int, lead: tuple[int, ...]
) -> None:
    """Segments are whole blocks times the count, so that both cuts are legal."""
    unit = 128 if form.name == "fp8_block" else 1
    segments, width = tuple(unit * n * count for n in blocks), 128 * columns * count
    weight = QuantTensor.of(torch.randn(*lead, sum(segments), width), form, segments)
    whole = weight.dequantize()
    for rank in range(count):
        part = weight.shard("rows", rank, count)
        assert part.segments == tuple(rows // count for rows in segments)
        assert torch.equal(part.dequantize(), rows_of(whole, segments, rank, count))
        part = weight.shard("columns", rank, count)
        assert part.columns == width // count
        assert torch.equal(part.dequantize(), whole.chunk(count, -1)[rank])
        part.check()
    parts = [weight.shard("columns", rank, count) for rank in range(count)]
    assert torch.equal(torch.cat([part.dequantize() for part in parts], -1), whole)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_fields_of_parts_are_what_storage_of_that_size_would_be(form: WeightFormat) -> None:
    """A loader's storage for one rank has the shapes of the cut, and the parts own theirs."""
    weight = QuantTensor.of(torch.randn(2, 512 + 256, 512), form, (512, 256))
    for part in (weight.shard("rows", 1, 2), weight.shard("columns", 1, 2), weight.shard_experts(1, 2)):
        empty = QuantTensor.empty(form, part.segments, part.columns, torch.empty(0), tuple(part.shape[:-2]))
        for name, field in part.parts.items():
            assert (field.shape, field.dtype) == (empty.parts[name].shape, empty.parts[name].dtype)
            assert field.is_contiguous()
            assert field.untyped_storage().nbytes() == field.numel() * field.element_size()
            assert field.untyped_storage().data_ptr() != weight.parts[name].untyped_storage().data_ptr()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_experts_are_shared_out_in_order(form: WeightFormat, count: int) -> None:
    weight = QuantTensor.of(torch.randn(6, 8, 128), form, (4, 4))
    whole = weight.dequantize()
    parts = [weight.shard_experts(rank, count) for rank in range(count)]
    assert [part.shape for part in parts] == [(6 // count, 8, 128)] * count
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), whole)


def test_experts_that_cannot_be_shared_out_are_refused() -> None:
    weight = QuantTensor.of(torch.randn(6, 8, 128), WeightFormat("mxfp4"))
    with pytest.raises(UnsupportedError, match=r"6 experts cannot be cut in 4.*1, 2, 3, 6"):
        weight.shard_experts(0, 4)


def test_a_cut_inside_a_block_is_refused_with_the_legal_counts() -> None:
    """The design's example: an expert of 768 rows over 8 ranks would be 96 rows each."""
    gate_up = QuantTensor.of(torch.randn(1536, 128), WeightFormat("fp8_block"), (768, 768))
    message = r"768\+768 rows in blocks of 128 cannot be cut in 8.*cut in 1, 2, 3, 6: .* multiples of 128 rows"
    with pytest.raises(UnsupportedError, match=message):
        gate_up.shard("rows", 0, 8)
    assert gate_up.shard("rows", 5, 6).segments == (128, 128)
    down = QuantTensor.of(torch.randn(8, 768), WeightFormat("fp8_block"))
    with pytest.raises(UnsupportedError, match="768 columns in blocks of 128"):
        down.shard("columns", 0, 8)


@pytest.mark.parametrize(
    ("form", "legal", "illegal"),
    [("bf16", 8, 7), ("fp8_tensor", 96, 5), ("mxfp8", 24, 48), ("mxfp4", 24, 48), ("nvfp4", 48, 96), ("int4", 6, 8)],
)
def test_columns_are_cut_between_groups_and_bytes(form: str, legal: int, illegal: int) -> None:
    """768 columns: 24 blocks of 32, 48 of 16, 6 groups of 128."""
    kind = WeightFormat(form, 128 if form == "int4" else 0)
    weight = QuantTensor.of(torch.randn(4, 768), kind)
    assert weight.shard("columns", legal - 1, legal).columns == 768 // legal
    with pytest.raises(UnsupportedError, match=f"cannot be cut in {illegal}"):
        weight.shard("columns", 0, illegal)


def test_segments_of_unlike_sizes_are_cut_each_by_itself() -> None:
    """q, k, v of 64, 16, 16 rows: rank 1 of 2 holds rows 32..64, 72..80, 88..96 and all three tensor scales."""
    w = torch.arange(96.0)[:, None].expand(96, 32) * torch.tensor([1.0, 10.0])[:, None, None]
    for form in ("fp8_tensor", "nvfp4", "fp8_channel"):
        weight = QuantTensor.of(w, WeightFormat(form), (64, 16, 16))
        part = weight.shard("rows", 1, 2)
        rows = [*range(32, 64), *range(72, 80), *range(88, 96)]
        assert torch.equal(part.dequantize(), weight.dequantize()[:, rows])
    with pytest.raises(UnsupportedError, match=r"64\+16\+16 rows cannot be cut in 32.*1, 2, 4, 8, 16:"):
        weight.shard("rows", 0, 32)


def test_every_segment_must_divide() -> None:
    """64 + 24 rows: 3 divides the smaller one only."""
    weight = QuantTensor.of(torch.randn(88, 32), WeightFormat("mxfp8"), (64, 24))
    with pytest.raises(UnsupportedError, match=r"64\+24 rows cannot be cut in 3.*1, 2, 4, 8:"):
        weight.shard("rows", 0, 3)


def test_one_segment_that_cannot_be_cut_refuses_the_weight() -> None:
    weight = QuantTensor.of(torch.randn(256 + 384, 128), WeightFormat("fp8_block"), (256, 384))
    with pytest.raises(UnsupportedError, match=r"256\+384 rows .* cut in 1: "):
        weight.shard("rows", 0, 2)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_legal_counts_are_those_that_succeed(form: WeightFormat) -> None:
    weight = QuantTensor.of(torch.randn(256 + 512, 256), form, (256, 512))
    fields = format_of(form).fields(form).values()
    for axis, sizes in (("rows", weight.segments), ("columns", (weight.columns,))):
        legal = legal_counts(sizes, step_of(fields, axis))
        for count in range(1, 260):
            if count in legal:
                assert weight.shard(axis, count - 1, count).nbytes <= weight.nbytes
            else:
                with pytest.raises(UnsupportedError):
                    weight.shard(axis, 0, count)


def test_a_ragged_weight_may_stay_whole_but_not_be_cut() -> None:
    weight = QuantTensor.of(torch.randn(200, 200), WeightFormat("fp8_block"))
    assert weight.shard("rows", 0, 1) is weight
    assert weight.shard("columns", 0, 1) is weight
    with pytest.raises(UnsupportedError, match="cut in 1:"):
        weight.shard("rows", 0, 2)


@pytest.mark.parametrize(("rank", "count"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_of_its_group_is_a_mistake_of_the_caller(rank: int, count: int) -> None:
    weight = QuantTensor.of(torch.randn(4, 4, 128), WeightFormat("bf16"))
    for cut in (lambda: weight.shard("rows", rank, count), lambda: weight.shard_experts(rank, count)):
        with pytest.raises(ValueError, match="rank"):
            cut()
