"""What the GPU tests of the Hopper kernels share: a layer taken apart, every stage held against an oracle of its own.

Rows are stored in the order of K in which a thread reads codes; `element_at` says that order anew, from the layout of
operands in the tensor core's documentation, so that the sources' own function is checked by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import pytest
import torch
from torch import Tensor

from moesaic.contracts.scheme import Scheme
from moesaic.contracts.spec import SILU, Activation
from moesaic.formats import encodings
from moesaic.formats.encodings import Rows
from moesaic.kernels import hopper, hopper_invariant, reference, triton
from moesaic.kernels._hopper import launch
from moesaic.kernels._hopper.variants import Tile, Variant, variant_of
from moesaic.kernels.ops import ExpertWeights
from tests.compare import assert_rows_close
from tests.triton_support import device, expert_weights, in_double, randn, some_ids, sorted_rows, static_scale

LIMIT = 2**-7
FOUR_BIT, CODES8 = ("mxfp4", "nvfp4", "int4"), ("fp8_tensor", "fp8_token", "fp8_group128")


@pytest.fixture(autouse=True)
def on_hopper() -> Iterator[None]:
    """For every test of a file that imports it."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("is for Hopper GPUs only")
    torch.manual_seed(0)
    yield
    torch.cuda.empty_cache()


def element_at(scheme: Scheme, tile: Tile, position: int) -> int:
    """The element of K at a position of a stored row."""
    form, codes = scheme.weight.name, scheme.activation.name in CODES8
    if form == "bf16" or (form in ("fp8_block", "fp8_tensor", "fp8_channel") and codes):
        return position
    if tile.narrow:  # a decoder makes pairs half a word of codes apart
        half = 4 if form in FOUR_BIT else 2
        base, at = position - position % (2 * half), position % (2 * half)
        return base + at // 2 + at % 2 * half
    if form == "int4" and codes:  # a lane's word: the low half-bytes, then the high ones
        base, at = position - position % 32, position % 32
        return base + at % 16 // 4 * 8 + at % 4 * 2 + at // 16
    lane, step, pair = position % 8 // 2, position // 16, position % 16 // 8 * 2 + position % 2
    if form == "int4":
        return position - position % 32 + lane * 8 + step % 2 * 2 + pair // 2 + pair % 2 * 4
    if form in FOUR_BIT:
        step %= 8
        return position - position % 128 + lane * 32 + step // 2 * 8 + step % 2 * 2 + pair // 2 + pair % 2 * 4
    return position - position % 64 + lane * 16 + step % 4 * 4 + pair // 2 + pair % 2 * 2


def in_order(scheme: Scheme, tile: Tile, stored: Tensor, columns: int) -> Tensor:
    """Stored rows in FP32 in K's own order; what is stored behind the last column must be zero."""
    index = torch.tensor([element_at(scheme, tile, p) for p in range(stored.shape[1])], device=stored.device)
    assert len(index.unique()) == len(index)
    out = torch.empty(stored.shape, device=stored.device)
    out[:, index] = stored.float()
    assert not out[:, columns:].any(), "padding"
    return out[:, :columns]


@dataclass
class Layer:
    """One call's operands. order: the sorted rows of a stable sort by expert. invariant: of `hopper_invariant`."""

    scheme: Scheme
    tile: Tile
    w: ExpertWeights
    x: Tensor
    ids: Tensor
    weights: Tensor
    invariant: bool = False

    @staticmethod
    def of(scheme: Scheme, tokens: int, shape: tuple[int, int, int, int], tile: Tile, how: str = "usual",
           activation: Activation = SILU) -> Layer:  # fmt: skip
        experts, hidden, width, top_k = shape
        w = expert_weights(scheme, (experts, hidden, width), activation)
        ids = some_ids(tokens, experts, top_k, how)
        return Layer(scheme, tile, w, randn(tokens, hidden), ids, torch.rand(tokens, top_k, device=device()))

    @cached_property
    def held(self) -> ExpertWeights:
        """The weights as the variant wants them; those of other codes in storage of their own."""
        w13, w2 = (replace(each, parts={name: part.clone() for name, part in each.parts.items()})
                   for each in (self.w.w13, self.w.w2))  # fmt: skip
        return (hopper_invariant if self.invariant else hopper).pack(replace(self.w, w13=w13, w2=w2))

    @property
    def variant(self) -> Variant:
        made = variant_of(self.scheme.weight, self.scheme.activation, self.tile)
        return launch.fitted(replace(made, zigzag=self.held.packing == "zigzag"), self.held.w13, self.held.w2)

    @property
    def scale(self) -> Tensor | None:
        return static_scale(self.scheme.activation)

    def rows(self) -> Rows:
        return triton.encode(self.x, self.scheme.activation, self.scale)


def check_layer(layer: Layer) -> None:
    """Rows and their order bit for bit; each product against FP64; the encoding in between bit for bit; the sum."""
    v, w, ids = layer.variant, layer.w, layer.ids
    rows, order = layer.rows(), sorted_rows(ids)
    stored, routed = check_rows(layer, rows, order)
    if layer.scheme.activation.by_row:  # else the scale must be known first
        check_rows(layer, layer.x, order)
        stored, routed = launch.prepare(v, rows, ids, layer.held, layer.scale)
    at = routed.order_R[: len(order)].long()
    hidden, before = check_first(layer, stored, routed, rows, at)
    routed.counters[1] = 0  # items are handed out anew
    _, y, _ = launch.multiply(v, stored, layer.held, routed, 2, hidden)
    experts = ids.flatten()[at]
    wanted = reference.expert_products(before, w.w2, experts, w.biases[1] if w.biases else None)
    assert_rows_close(y[at], wanted, LIMIT, "second product")
    check_together(layer, rows, y, hidden.data, at)


def check_rows(layer: Layer, given: Rows | Tensor, order: Tensor) -> tuple[launch.Stored, launch.Routed]:
    rows, tile = layer.rows(), layer.tile
    stored, routed = launch.prepare(layer.variant, given, layer.ids, layer.held, layer.scale)
    at = routed.order_R[: len(order)].long()
    if len(layer.x) > 1:  # a single token's choices stay in their own order
        assert torch.equal(layer.ids.flatten()[at], layer.ids.flatten()[order])
    assert torch.equal(at.sort().values, order.sort().values)
    wanted = rows.parts.get("exact", rows.data).float()
    assert torch.equal(in_order(layer.scheme, tile, stored.data, layer.x.shape[1]), wanted)
    how = layer.scheme.activation
    if how.name == "fp8_group128":
        assert stored.scales is not None
        assert torch.equal(stored.scales[:, : rows.parts["scale"].shape[1]], rows.parts["scale"])
    if how.name == "fp8_token" or (how.name == "nvfp4" and not how.static):
        part = rows.parts["scale" if how.name == "fp8_token" else "global_scale"].flatten()
        assert stored.scales is not None
        assert torch.equal(stored.scales.flatten()[: len(part)], part)
    return stored, routed


def check_first(layer: Layer, stored: launch.Stored, routed: launch.Routed, rows: Rows,
                at: Tensor) -> tuple[launch.Stored, Tensor]:  # fmt: skip
    """-> (activated rows as they are stored, the same as FP64 numbers)."""
    w, how, count, width = layer.w, layer.scheme.activation, len(at), layer.w.w2.columns
    hidden, _, wide = launch.multiply(layer.variant, stored, layer.held, routed, 1, wide=True)
    assert wide is not None
    values = reference.row_values(in_double(rows))[at // layer.ids.shape[1]]
    both = reference.expert_products(values, w.w13, layer.ids.flatten()[at], w.biases[0] if w.biases else None)
    assert_rows_close(wide[:count, :width], reference.activate(both, w.activation), LIMIT, "first product")
    mine = in_order(layer.scheme, layer.tile, hidden.data[:count], width).cpu().double()
    given = None if w.between_scale is None else w.between_scale.cpu()
    codes = encodings.encode(wide[:count, :width].cpu(), how, given)
    if how.name == "bf16":
        scales = torch.ones(1)
        assert torch.equal(mine.float(), wide[:count, :width].cpu().bfloat16().float())
    elif how.name == "fp8_group128":
        assert hidden.scales is not None
        scales = (hidden.scales if layer.tile.narrow else hidden.scales.t())[:count].cpu()
        assert torch.equal(scales[:, : codes.parts["scale"].shape[1]], codes.parts["scale"])
        scales = scales.repeat_interleave(128, 1)[:, :width]
    elif how.name == "mxfp8":
        scales = torch.ones(1)
    else:
        assert hidden.scales is not None
        each = hidden.scales.flatten()[: count if hidden.scale_row else 1].cpu()
        scales = each[:, None] if len(each) > 1 else each
    if how.name != "bf16":
        assert torch.equal(mine.float() * scales, codes.decode()), "encoding"
    return hidden, (mine * scales.double()).to(device())


def check_together(layer: Layer, rows: Rows, y: Tensor, hidden: Tensor, at: Tensor) -> None:
    """Both products in one launch give the same bits; then the weighted sum, in FP64."""
    v, (tokens, top_k), count = layer.variant, layer.ids.shape, len(at)
    stored, routed = launch.prepare(v, rows, layer.ids, layer.held, layer.scale)
    again, both, _ = launch.multiply(v, stored, layer.held, routed)
    now = routed.order_R[:count].long()
    place = torch.empty(tokens * top_k, dtype=torch.long, device=device())
    place[at] = torch.arange(count, device=device())
    assert torch.equal(again.data[:count].float(), hidden[:count].float()[place[now]])
    assert torch.equal(both[now], y[now])
    out = launch.combine(v, both, layer.ids, layer.weights)
    full = torch.zeros(tokens * top_k, both.shape[1], dtype=torch.float64, device=device())
    full[now] = both[now].double()
    kept = (layer.weights * (layer.ids >= 0)).double()
    assert_rows_close(out, (full.view(tokens, top_k, -1) * kept[..., None]).sum(1), LIMIT, "sum")


def check_sum(layer: Layer) -> None:
    """Of a token alone: whoever adds up its results, `experts` or `combine`, the bits are the same."""
    rows = hopper.encode_later(layer.x, layer.scheme.activation, layer.scale)
    apart = hopper.summed(*hopper.multiplied(layer.variant, rows, layer.held, layer.ids, layer.weights))
    torch.full_like(apart, float("nan"))  # in whose place the next result may lie
    for _ in range(3):
        assert torch.equal(hopper.weighted(layer.variant, rows, layer.held, layer.ids, layer.weights), apart)
