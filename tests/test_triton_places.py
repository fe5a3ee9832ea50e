"""The kernels around products that are not ours (places, gathering, joining, weighing), in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moesaic.contracts.scheme import Encoding
from moesaic.contracts.spec import SILU, Activation
from moesaic.formats import encodings
from moesaic.kernels import reference
from moesaic.kernels._triton.gather import gather, transposed
from moesaic.kernels._triton.join_rows import Extras, join_rows, join_slots
from moesaic.kernels._triton.place import Places, place
from moesaic.kernels._triton.weigh import weigh
from tests.compare import assert_rows_close
from tests.triton_support import device, some_ids

OAI = Activation("swiglu_oai")
IDS = {
    "ragged": lambda: some_ids(23, 8, 3, ""),
    "one expert": lambda: some_ids(11, 8, 3, "one expert"),
    "holes": lambda: some_ids(13, 8, 3, "holes"),
    "one token": lambda: some_ids(1, 8, 3, ""),
    "nobody": lambda: torch.full((5, 2), -1, dtype=torch.int32, device=device()),
    "many": lambda: some_ids(350, 8, 3, "holes"),
}


def checked(ids: Tensor, experts: int, height: int) -> Places:
    """Held against a stable sort."""
    found, flat = place(ids, experts, height), ids.flatten().long().cpu()
    counts = torch.bincount(flat[flat >= 0], minlength=experts)
    sizes = (counts + height - 1) // height * height
    starts = sizes.cumsum(0) - sizes
    assert torch.equal(found.ends_E.cpu().long(), starts + counts)
    assert found.total.item() == sizes.sum()
    assert sizes.sum() <= found.count
    assert found.count % height == 0
    wanted = torch.full((int(sizes.sum()),), ids.numel())
    expert = torch.repeat_interleave(torch.arange(experts), sizes // height)
    where = torch.full((ids.numel(),), -1)
    for e in range(experts):
        rows = torch.where(flat == e)[0]
        where[rows] = starts[e] + torch.arange(len(rows))
        wanted[where[rows]] = rows
    assert torch.equal(found.place_R.cpu().long(), where)
    assert torch.equal(found.rows_P[: len(wanted)].cpu().long(), wanted)
    assert torch.equal(found.expert_B[: len(expert)].cpu().long(), expert)
    return found


@pytest.mark.parametrize("height", [8, 16, 24, 72, 128])
@pytest.mark.parametrize("name", IDS)
def test_places(name: str, height: int) -> None:
    checked(IDS[name](), 8, height)


@pytest.mark.parametrize("experts", [1, 2, 33, 300])
def test_places_of_any_number_of_experts(experts: int) -> None:
    checked(torch.randint(-1, experts, (17, 4), dtype=torch.int32, device=device()), experts, 16)


@pytest.mark.parametrize("name", [name for name in IDS if name not in ("nobody", "many")])
@pytest.mark.parametrize("size", [128, 384, 5000])
def test_gather(name: str, size: int) -> None:
    ids = IDS[name]()
    places = place(ids, 8, 64)
    x = torch.randn(len(ids), size, device=device())
    rows = encodings.encode(x, Encoding("fp8_group128"))
    y, scale = gather(rows.data, rows.parts["scale"], places)
    assert scale is not None
    assert scale.stride() == (1, places.count), "rows are dense"
    plain, none = gather(x.bfloat16(), None, places)
    assert none is None
    used = torch.where(places.place_R >= 0)[0]
    at, token = places.place_R[used].long(), used // ids.shape[1]
    assert torch.equal(y.view(torch.uint8)[at], rows.data.view(torch.uint8)[token])
    assert torch.equal(scale[at], rows.parts["scale"][token])
    assert torch.equal(plain[at], x.bfloat16()[token])


@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (4, 3), (37, 56), (64, 16)])
def test_transposed_scales(rows: int, groups: int) -> None:
    scale = torch.randn(rows, groups + 2, device=device())[:, :groups]
    found = transposed(scale)
    assert torch.equal(found, scale)
    assert found.stride() == (1, -(-rows // 4) * 4)
    assert transposed(found) is found


def expected(x: Tensor, e_R: Tensor, tokens_R: Tensor, activation: Activation, extras: Extras) -> Tensor:
    """FP32 [R, I] of rows with their experts."""
    gate, up = x.float().chunk(2, -1)
    if extras.top is not None:
        gate, up = gate * extras.top[e_R, :1], up * extras.top[e_R, 1:]
    if extras.row is not None:
        row = extras.row[tokens_R] if extras.row.numel() > 1 else extras.row
        gate, up = gate * row, up * row
    both = torch.cat([gate, up], -1)
    if extras.bias is not None:
        both = both + extras.bias[e_R].float()
    return reference.activate(both, activation)


def some_extras(experts: int, width: int, tokens: int, which: str) -> Extras:
    if which == "none":
        return Extras()
    bias = (torch.randn(experts, 2 * width, device=device()) / 2).bfloat16()
    row = torch.rand(tokens, 1, device=device()) + 0.5 if which == "rows" else torch.tensor(0.7, device=device())
    return Extras(bias, torch.rand(experts, 2, device=device()) + 0.5, row)


@pytest.mark.parametrize("which", ["none", "rows", "tensor"])
@pytest.mark.parametrize("how", ["bf16", "wide", "fp8_group128", "mxfp8"])
@pytest.mark.parametrize(
    ("name", "width", "activation"), [("ragged", 256, SILU), ("holes", 416, OAI), ("one token", 64, SILU)]
)
def test_join_at_places(name: str, width: int, activation: Activation, how: str, which: str) -> None:
    ids = IDS[name]()
    places = place(ids, 8, 16)
    x = (torch.randn(places.count, 2 * width, device=device()) * 3).bfloat16()
    extras = some_extras(8, width, len(ids), which)
    y, scale = join_rows(x, ids.flatten(), places.place_R, activation, how, extras, ids.shape[1])
    used = torch.where(ids.flatten() >= 0)[0]
    at = places.place_R[used].long()
    want = expected(x[at], ids.flatten()[used].long(), used // ids.shape[1], activation, extras)
    same_rows(y[at], None if scale is None else scale[at], want, how)
    if scale is not None:
        assert scale.stride() == (1, places.count)
        again, upright = join_rows(x, ids.flatten(), places.place_R, activation, how, extras, ids.shape[1], False)
        assert upright is not None
        assert upright.is_contiguous()
        assert torch.equal(upright[at], scale[at])
        assert torch.equal(again[at].view(torch.uint8), y[at].view(torch.uint8))


def same_rows(y: Tensor, scale: Tensor | None, want: Tensor, how: str) -> None:
    """The encoding of the activated rows: codes within one step, where the last bit of an exponential differs."""
    if how in ("bf16", "wide"):
        assert_rows_close(y, want, 2**-7 if how == "bf16" else 1e-6, how)
        return
    theirs = encodings.encode(want, Encoding(how))
    if how == "mxfp8":
        assert y.dtype == torch.bfloat16
        values, reach = y.float(), theirs.decode()
    else:
        assert scale is not None
        assert scale.dtype == torch.float32
        torch.testing.assert_close(scale, theirs.parts["scale"], rtol=1e-6, atol=0)
        values, reach = encodings.coder_of(Encoding(how)).decode({"data": y, "scale": scale}), theirs.decode()
    off = (values - reach).abs() > reach.abs() * 1e-5
    assert off.float().mean() <= 1e-3
    assert ((values - reach).abs() <= reach.abs() / 8 + 1e-3).all()


@pytest.mark.parametrize("how", ["bf16", "wide"])
def test_rows_of_padding_ids_are_zero_where_rows_keep_their_numbers(how: str) -> None:
    ids = IDS["holes"]()
    x = torch.full((ids.numel(), 256), float("nan"), device=device()).bfloat16()
    used = ids.flatten() >= 0
    x[used] = torch.randn(int(used.sum()), 256, device=device()).bfloat16()
    y, _ = join_rows(x, ids.flatten(), None, SILU, how)
    assert not y[~used].any()
    assert_rows_close(y[used], reference.activate(x[used].float(), SILU), 2**-7, how)


@pytest.mark.parametrize("how", ["bf16", "fp8_group128"])
def test_join_of_slots(how: str) -> None:
    counts, capacity, width = torch.tensor([0, 5, 16, 1]), 16, 256
    x = torch.full((4, capacity, 2 * width), float("nan"), device=device()).bfloat16()
    for e, count in enumerate(counts):
        x[e, :count] = torch.randn(int(count), 2 * width, device=device()).bfloat16()
    y, scale = join_slots(x, counts.to(device()), SILU, how)
    for e, count in enumerate(counts.tolist()):
        if count:
            want = reference.activate(x[e, :count].float(), SILU)
            same_rows(y[e, :count], None if scale is None else scale[e, :count], want, how)
    if scale is not None:
        assert scale.shape == (4, capacity, 2)
        assert scale.stride() == (2 * capacity, 1, capacity)


@pytest.mark.parametrize("which", ["none", "rows", "tensor"])
@pytest.mark.parametrize("name", [name for name in IDS if name != "many"])
@pytest.mark.parametrize("placed", [False, True])
def test_weigh(name: str, which: str, placed: bool) -> None:
    ids, size = IDS[name](), 200
    weights = torch.rand(ids.shape, device=device())
    places = place(ids, 8, 16).place_R if placed else None
    rows = len(ids.flatten()) if places is None else int(places.max()) + 1 or 1
    y = torch.randn(rows, size, device=device()).bfloat16()
    extras = Extras()
    if which != "none":
        row = torch.rand(ids.numel(), 1, device=device()) if which == "rows" else torch.tensor(0.7, device=device())
        bias = torch.randn(8, size, device=device()).bfloat16()
        extras = Extras(bias, torch.rand(8, 1, device=device()), row)
    out = weigh(y, ids, weights, places, extras)
    want = torch.zeros(len(ids), size, dtype=torch.float64)
    for t, a in (ids >= 0).nonzero().tolist():
        r, e = t * ids.shape[1] + a, int(ids[t, a])
        value = y[r if places is None else int(places[r])].double().cpu()
        if which != "none":
            assert extras.top is not None
            assert extras.row is not None
            assert extras.bias is not None
            row = extras.row[r] if which == "rows" else extras.row
            value = value * extras.top[e].cpu() * row.cpu() + extras.bias[e].double().cpu()
        want[t] += value * float(weights[t, a])
    assert out.dtype == torch.bfloat16
    assert_rows_close(out, want, 2**-7)
