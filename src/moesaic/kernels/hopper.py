"""Kernels for Hopper, written in CUDA C++ (`_hopper/`): expert layers, expert choice, dense products, attention.

A call of `experts` is three launches: rows are sorted by expert while they are encoded; both products, the activation
and the encoding in between run in one persistent kernel; a token's results are weighted and summed. Weights are read
as they are stored, but for FP4, MXFP8, and FP8 beside 16-bit rows: their codes' bits change places at load (`pack`).
E4M3 rows meet the FP8 tensor cores (INT4 weights there only where rows are many); everything else is multiplied as the
BF16 or FP16 numbers that codes stand for, for all pairs of formats that tensor cores multiply.
A dense product of many rows in FP8 or INT4 is the second product of a layer with one expert; few rows, and dozens, meet
weights of 4 and 8 bits in kernels of their own (`dense.py`), and few rows those in BF16; all else is left to Triton, or
to the vendor's library.
Gate product and expert choice of few rows are one launch, by a cluster of thread blocks. Attention over heads is a
launch for sequences that decode and one for prompts; latents and other sizes are left to Triton.

NVRTC, which comes with torch, compiles a kernel at its first use; it is kept in the cache folder (`MOESAIC_CACHE`).

Letters: T tokens, A experts per token, R = T A routed rows, D hidden size.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.contracts.contract import Contract, Limits, path_of
from moesaic.contracts.scheme import ENCODINGS as ROWS
from moesaic.contracts.scheme import FORMATS as WEIGHTS
from moesaic.contracts.scheme import KV_FORMATS, Encoding, WeightFormat
from moesaic.contracts.spec import RouterSpec
from moesaic.errors import UnsupportedError
from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import Rows
from moesaic.kernels._hopper.pack import PACKINGS, Packings, by_packing, packing_of
from moesaic.kernels._hopper.pack import pack as pack
from moesaic.kernels._hopper.pack import unpack as unpack
from moesaic.kernels._hopper.variants import DENSE, TILES, Variant, tile_for, variant_of, with_tile
from moesaic.kernels.exact import exact
from moesaic.kernels.ops import AttentionBatch, ExpertTerms, ExpertWeights, KVView, Softmax, Span

if TYPE_CHECKING:
    from moesaic.kernels._hopper.launch import Routed, Stored

FORMS = frozenset(
    WeightFormat("int4", group, scale) for group, scale in product((32, 64, 128), ("bfloat16", "float16"))
)
"""Of INT4, which comes in groups of so many codes that have a scale together."""
MOST_EXPERTS = 512
"""On a rank: as prepare.cuh has it."""
CONTRACTS = (
    *(
        Contract(
            "experts", "hopper", frozenset({"cuda"}), frozenset({"bfloat16"}), batch_invariant=False, rank=45,
            formats=frozenset(form for form, _ in pairs), encodings=frozenset(encoding for _, encoding in pairs),
            pairs=pairs, packing=packing, forms=FORMS,
            activations=frozenset({"silu", "swiglu_oai"}), expert_bias=True, arch=(90, 90), path=path_of("experts"),
            limits=Limits(hidden_multiple=64, width_multiple=64, max_experts=MOST_EXPERTS),
        ) for packing, pairs in by_packing(PACKINGS)
    ),
    *(
        Contract(
            op, "hopper", frozenset({"cuda"}), frozenset({"bfloat16"}), batch_invariant=False, rank=45, arch=(90, 90),
            package="triton", versions=">=3.6,<3.8", path=path_of(op), logits=frozenset({"float32"}),
        ) for op in ("linear", "gate")
    ),
    *(
        Contract(
            op, "hopper", frozenset({"cuda"}), frozenset({"bfloat16"}), batch_invariant=False, rank=45,
            formats=frozenset(form for form, _ in DENSE), encodings=frozenset(encoding for _, encoding in DENSE),
            pairs=DENSE, forms=FORMS, arch=(90, 90), package="triton", versions=">=3.6,<3.8", path=path_of(op),
        ) for op in ("linear_quant", "linear_terms")
    ),
    *(
        Contract(
            op, "hopper", frozenset({"cuda"}), frozenset({"bfloat16"}), batch_invariant=False, rank=45,
            formats=frozenset(WEIGHTS), encodings=frozenset(ROWS), sinks=True, heads_only=True, arch=(90, 90),
            package="triton", versions=">=3.6,<3.8", path=path_of(op), kv=frozenset(KV_FORMATS),
        ) for op in ("attend_paged", "attend_encode")
    ),
)  # fmt: skip
TUNABLE = {"tile": tuple(TILES)}
"""What measurements try."""
ADAPTS = True
"""Plans leave the tile to each call: one for all numbers of tokens of a cell would be wrong for most of them."""


def worth(rows: float, tile: int) -> bool:
    """Whether a tile can be the fastest at so many rows per expert, about: neither far too low nor far too high."""
    return min(0.7 * rows, 64) <= TILES[tile].height <= max(64, 6 * rows + 8)


def usual(form: WeightFormat, encoding: Encoding, rows: int, experts: int, lone: int) -> dict[str, int]:
    """What a call chooses by itself for so many routed rows, of what TUNABLE names.

    lone: of a token alone, the elements of an expert's weights; else 0.
    """
    tile = tile_for(variant_of(form, encoding, TILES[8]), rows, experts, lone)
    return {"tile": next(key for key, each in TILES.items() if each == tile)}


def probe() -> str | None:
    """Multiplies rows of two experts, attends to two positions, chooses experts. None where the results are right."""
    if not torch.cuda.is_available():
        return "finds no CUDA device"
    if torch.cuda.get_device_capability() != (9, 0):
        return "is for Hopper GPUs only"
    try:
        return None if tried() and attended() and chose() else "computes wrong results on this machine"
    except UnsupportedError as error:
        return f"cannot be used: {error!s:.300}"
    except Exception as failure:  # whatever a compiler or driver raises, it is a reason, not a crash
        return f"fails on this machine: {failure!r:.200}"


def tried() -> bool:
    """Experts whose weights are 0.5 (up rows: 1) and 2, times rows of 2^-7."""
    from moesaic.contracts.spec import SILU

    form, like = WeightFormat("bf16"), torch.empty(0, dtype=torch.bfloat16, device="cuda")
    w13 = QuantTensor.empty(form, (64, 64), 64, like, (2,))
    w2 = QuantTensor.empty(form, (64,), 64, like, (2,))
    for w in (w13, w2):
        w.parts["data"][0], w.parts["data"][1] = 0.5, 2.0
    w13.parts["data"][0, 64:] = 1.0
    ids = torch.tensor([[0], [1], [-1], [1]], dtype=torch.int32, device="cuda")
    x = Rows(Encoding("bf16"), {"data": torch.full((4, 64), 2.0**-7, device="cuda").bfloat16()}, torch.bfloat16)
    y = experts(x, ExpertWeights(w13, w2, SILU, Encoding("bf16")), ids, torch.ones(4, 1, device="cuda")).float()
    gate, up = torch.tensor([0.25, 1.0, 0.0, 1.0], device="cuda"), torch.tensor([0.5, 1.0, 0.0, 1.0], device="cuda")
    want = torch.nn.functional.silu(gate) * up * 64 * torch.tensor([0.5, 2.0, 0.0, 2.0], device="cuda")
    return bool(((y - want[:, None]).abs() <= 2**-7 * want[:, None]).all())


def attended() -> bool:
    """Two values, of equal keys, whose mean is 2.5."""
    view, how = KVView(1, 64, 64, 64), Softmax(0.125)
    pool = torch.ones(2, 128, dtype=torch.bfloat16, device="cuda")
    pool[0, 64:], pool[1, 64:] = 1.0, 4.0
    batch = AttentionBatch.of((Span(0, 1, 2),), 1, torch.tensor([[1, 0]], device="cuda"))
    y = attend_paged(pool[:1, None, :64], pool, batch, view, how.scale)
    return bool((y == 2.5).all())


def chose() -> bool:
    """Experts 127 and 5, whose logits are 2 and 1."""
    w = torch.zeros(128, 128, device="cuda")
    w[127], w[5] = 2 / 128, 1 / 128
    ids, weights = gate(torch.ones(9, 128, device="cuda").bfloat16(), w, None, None, RouterSpec(128, 2, "softmax", "w"))
    wanted = torch.tensor([2.0, 1.0], device="cuda").softmax(0)
    return bool((ids == torch.tensor([127, 5], device="cuda")).all() and ((weights - wanted).abs() < 1e-5).all())


def encode_later(x_TD: Tensor, encoding: Encoding, scale: Tensor | None = None) -> Rows:
    """Rows as they are, which `experts` encodes while it sorts: one launch less, and the same codes.

    A scale that spans all rows must be known before the first one is encoded: those are encoded here.
    """
    if not encoding.by_row:
        from moesaic.kernels import triton

        rows: Rows = triton.encode(x_TD, encoding, scale)
        return rows
    return Rows(encoding, {"plain": x_TD} | ({} if scale is None else {"scale": scale}), x_TD.dtype)


def experts(x: Rows, w: ExpertWeights, ids_TA: Tensor, weights_TA: Tensor, tile: int = 0) -> Tensor:
    """tile: a key of TILES, or 0 for the one that the mean rows per expert suggest.

    Raises UnsupportedError for more than MOST_EXPERTS experts on a rank.
    """
    return weighted(chosen(x, w, ids_TA, tile), x, w, ids_TA, weights_TA)


def experts_terms(x: Rows, w: ExpertWeights, ids_TA: Tensor, weights_TA: Tensor, tile: int = 0) -> ExpertTerms:
    """As `experts`, but that the launch which sums a token's results is its reader's."""
    return multiplied(chosen(x, w, ids_TA, tile), x, w, ids_TA, weights_TA)[1]


def chosen(x: Rows, w: ExpertWeights, ids_TA: Tensor, tile: int, packings: Packings = PACKINGS) -> Variant:
    """packings: how each pair of formats is packed."""
    experts = len(w.w13.parts["data"])
    w.must_be(packing_of(w, packings))
    if x.encoding.name != w.between.name:
        raise ValueError(f"rows in {x.encoding.name}, and {w.between.name} between the products")
    if experts > MOST_EXPERTS:
        raise UnsupportedError(f"{experts} experts on one rank, of at most {MOST_EXPERTS}", where="hopper",
                               remedy="Use more ranks, or --experts triton (or triton_invariant).")  # fmt: skip
    variant = variant_of(w.w13.form, x.encoding, TILES[tile or 8])
    if tile:
        return variant
    return with_tile(variant, tile_for(variant, ids_TA.numel(), experts, read_by_one(w, ids_TA)))


def read_by_one(w: ExpertWeights, ids_TA: Tensor) -> int:
    """Of a token alone, the elements of an expert's weights; else 0."""
    _, columns, hidden = w.w13.shape
    return columns * hidden * 3 // 2 if len(ids_TA) == 1 else 0


def weighted(variant: Variant, x: Rows, w: ExpertWeights, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
    """[T, D] by a variant. Of a token alone the kernel that makes the results adds them up, where it can."""
    from moesaic.kernels._hopper import launch

    if launch.sums(variant, ids_TA):
        weights = weights_TA.float().contiguous()
        with torch.cuda.device(ids_TA.device):
            variant, stored, routed = prepared(variant, x, w, ids_TA.to(torch.int32).contiguous())
            return launch.multiply(variant, stored, w, routed, weights=weights)[1]
    return summed(*multiplied(variant, x, w, ids_TA, weights_TA))


def multiplied(variant: Variant, x: Rows, w: ExpertWeights, ids_TA: Tensor,
               weights_TA: Tensor) -> tuple[Variant, ExpertTerms]:  # fmt: skip
    """What is to be weighted, and what computed it."""
    from moesaic.kernels._hopper import launch

    ids, weights = ids_TA.to(torch.int32).contiguous(), weights_TA.float().contiguous()
    if not ids.numel():
        return variant, ExpertTerms(ids.new_empty(0, w.w2.shape[-2], dtype=x.dtype), ids, weights)
    with torch.cuda.device(ids.device):
        variant, stored, routed = prepared(variant, x, w, ids)
        _, y_RD, _ = launch.multiply(variant, stored, w, routed)
    return variant, ExpertTerms(y_RD, ids, weights)


def prepared(variant: Variant, x: Rows, w: ExpertWeights, ids_TA: Tensor) -> tuple[Variant, Stored, Routed]:
    """The variant for these very weights; rows encoded, and sorted. On the current device; ids: INT32, not empty."""
    from moesaic.kernels._hopper import launch

    plain = x.parts.get("plain")
    variant, static = launch.fitted(variant, w.w13, w.w2), None if plain is None else x.parts.get("scale")
    given: Rows | Tensor = x if plain is None else plain
    if plain is None and x.encoding.name in ("mxfp8", "nvfp4"):
        given = Rows(x.encoding, {**x.parts, "exact": exact(x)}, x.dtype)
    return variant, *launch.prepare(variant, given, ids_TA, w, static)


def summed(variant: Variant, terms: ExpertTerms) -> Tensor:
    from moesaic.kernels._hopper import launch

    tokens, top_k = terms.ids_TA.shape
    if not tokens or not top_k:
        return terms.y_RD.new_empty(tokens, terms.y_RD.shape[1])
    with torch.cuda.device(terms.ids_TA.device):
        return launch.combine(variant, terms.y_RD, terms.ids_TA, terms.weights_TA)


def linear(x_TD: Tensor, w_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Few rows here; all else by the vendor's library.

    w and bias are read early: the kernel in front must not be what makes them (stored weights are ready).
    """
    from moesaic.kernels._hopper import dense

    if how := dense.plain_cut(x_TD, w_ND, bias_N):
        return dense.plain(x_TD, w_ND, bias_N, how)
    return F.linear(x_TD, w_ND, bias_N)


def linear_quant(x: Rows, w: QuantTensor, bias_N: Tensor | None = None) -> Tensor:
    """Few rows and dozens (not of FP8) here, and many of FP8 and INT4; all else by Triton."""
    terms_PTN = multiplied_densely(x, w, bias_N, terms=False)
    if terms_PTN is None:
        from moesaic.kernels import triton

        y: Tensor = triton.linear_quant(x, w, bias_N)
        return y
    if len(terms_PTN) > 1:
        from moesaic.kernels._triton.linear_quant import added_up

        terms_PTN = added_up(terms_PTN, x.dtype)[None]
    return terms_PTN.view(*x.data.shape[:-1], w.shape[-2])


def linear_terms(x: Rows, w: QuantTensor, bias_N: Tensor | None = None) -> Tensor:
    """The same as terms [P, T, N]: FP32, or one in BF16."""
    terms_PTN = multiplied_densely(x, w, bias_N)
    if terms_PTN is None:
        from moesaic.kernels import triton

        terms: Tensor = triton.linear_terms(x, w, bias_N)
        return terms
    return terms_PTN


def multiplied_densely(x: Rows, w: QuantTensor, bias_N: Tensor | None, terms: bool = True) -> Tensor | None:
    """[P, T, N] as `linear_terms` returns it, or None where Triton is to do it."""
    from moesaic.kernels._hopper import dense

    if how := dense.cut_of(x, w, bias_N, terms):
        return dense.products(x, w, bias_N, how)
    variant = dense.many_cut(x, w, bias_N)
    if variant is None:
        return None
    from moesaic.kernels._hopper import launch

    values = x.data.reshape(-1, w.columns)
    with torch.cuda.device(values.device):
        if w.form.name == "int4":
            return launch.linear(variant, launch.in_order(variant, dense.by_16_bytes(values)), w, bias_N)[None]
        scale = x.parts["scale"]
        scale = scale.reshape(len(values), -1) if scale.dim() else scale
        rows = launch.as_they_are(dense.by_16_bytes(values.contiguous()), scale)
        return launch.linear(variant, rows, w, bias_N)[None]


def gate(x_TD: Tensor, w_ED: Tensor, logit_bias_E: Tensor | None, bias_E: Tensor | None, spec: RouterSpec,
         live_T: Tensor | None = None, counts_E: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Few rows here, in one launch; all else by Triton."""
    from moesaic.kernels._hopper import gate as narrow

    if how := narrow.cut_here(x_TD, w_ED, logit_bias_E, spec):
        return narrow.gate(x_TD, w_ED, logit_bias_E, bias_E, spec, live_T, counts_E, how)
    from moesaic.kernels import triton

    chosen: tuple[Tensor, Tensor] = triton.gate(x_TD, w_ED, logit_bias_E, bias_E, spec, live_T, counts_E)
    return chosen


def attend_paged(q_THK: Tensor, pool_PW: Tensor, batch: AttentionBatch, view: KVView, scale: float,
                 window: int | None = None, sinks_H: Tensor | None = None) -> Tensor:  # fmt: skip
    from moesaic.kernels._hopper import attend

    return attend.attend_paged(q_THK, pool_PW, batch, view, Softmax(scale, window, sinks_H))


def attend_encode(q_THK: Tensor, pool_PW: Tensor, batch: AttentionBatch, view: KVView, how: Softmax,
                  encoding: Encoding, scale: Tensor | None = None) -> Rows:  # fmt: skip
    from moesaic.kernels._hopper import attend

    return attend.attend_encode(q_THK, pool_PW, batch, view, how, encoding, scale)
