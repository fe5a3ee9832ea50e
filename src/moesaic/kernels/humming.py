"""Expert products by Humming (package `humming-kernels`), on Hopper: weights of 4 and 8 bits with BF16 or FP8 rows.

Its kernels find rows by number, block by block (place.py), and write results to the rows' own numbers; nothing is moved
and nothing waits for the device. Weights lie in an order of its own (`_humming/layout.py`): `pack` brings them into it
within their storage, `unpack` back. What the kernels do not know of is applied where we touch rows anyway, in FP32:
tensor-wide scales of NVFP4, biases, the activation, the encoding in between, the weighted sum (join_rows.py, weigh.py).

Rows in MXFP8 and NVFP4 are multiplied as the BF16 numbers that their codes stand for, and weights of these formats are
BF16 numbers too: that gives the products of a GPU with block-scaled tensor cores.

The library compiles its kernels when they are first used (about a second each) and keeps them in HUMMING_CACHE_DIR.
Which one it takes follows from the number of routed rows, rounded up to half a power of two so that they are few.

Letters: T tokens, A experts per token, R = T x A routed rows, E experts, N outputs, K contraction, I expert width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from moesaic.contracts.contract import Contract, Limits, path_of
from moesaic.contracts.scheme import Encoding, WeightFormat
from moesaic.contracts.spec import SILU
from moesaic.errors import UnsupportedError
from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import Rows
from moesaic.kernels._humming.pack import NAME, pack, unpack
from moesaic.kernels._humming.recipe import PAIRS, Recipe, recipe_of
from moesaic.kernels.exact import exact
from moesaic.kernels.installed import lacking
from moesaic.kernels.ops import ExpertWeights

__all__ = ["CONTRACTS", "experts", "pack", "probe", "unpack"]

CONTRACTS = (
    Contract(
        "experts", "humming", frozenset({"cuda"}), frozenset({"bfloat16"}), batch_invariant=False, rank=56,
        formats=frozenset(form for form, _ in PAIRS), encodings=frozenset(encoding for _, encoding in PAIRS),
        pairs=PAIRS, forms=frozenset(WeightFormat("int4", group, "bfloat16") for group in (32, 64, 128)),
        activations=frozenset({"silu", "swiglu_oai"}), expert_bias=True, arch=(90, 90), package="humming-kernels",
        versions=">=0.1.19,<0.2", packing=NAME, path=path_of("experts"),
        limits=Limits(hidden_multiple=128, width_multiple=128),
    ),
)  # fmt: skip
LOCKS = 8192
"""Counters of programs that share a tile: more than the largest grid of a Hopper GPU needs."""


def probe() -> str | None:
    """Multiplies rows of two experts in MXFP4. None where the result is right."""
    if not torch.cuda.is_available():
        return "finds no CUDA device"
    if reason := lacking("humming-kernels", CONTRACTS[0].versions, "humming"):
        return reason
    if torch.cuda.get_device_capability()[0] != 9:
        return "is used on Hopper GPUs only"
    try:
        library()
    except (ImportError, OSError) as error:
        return f"cannot be loaded ({error!s:.200}); pip install 'moesaic[humming]'"
    try:
        return None if tried() else "computes wrong results on this machine"
    except Exception as failure:  # whatever a compiler or driver raises, it is a reason, not a crash
        return f"fails on this machine: {failure!r:.200}"


@cache
def library() -> SimpleNamespace:
    """The parts of the package that are used."""
    import humming.config
    import humming.kernel.humming
    import humming.ops
    import humming.tune

    return SimpleNamespace(
        LayerConfig=humming.config.LayerConfig, launch=humming.ops.launch_kernel,
        prepare=humming.kernel.humming.HummingKernel.prepare_kernels, choose=humming.tune.get_heuristics_config,
    )  # fmt: skip


def tried() -> bool:
    """Experts whose weights are 1 and 4, up to where they are 0.5: of rows of ones."""
    form, device = WeightFormat("mxfp4"), torch.device("cuda")
    like = torch.empty(0, dtype=torch.bfloat16, device=device)
    w13 = QuantTensor.empty(form, (128, 128), 128, like, (2,))
    w2 = QuantTensor.empty(form, (128,), 128, like, (2,))
    for w in (w13, w2):
        w.parts["data"].fill_(0x22)  # ones
        w.parts["scale"][0], w.parts["scale"][1] = 127, 129
    w13.parts["data"][:, 128:] = 0x11  # halves
    ids = torch.tensor([[0], [1], [-1], [1]], dtype=torch.int32, device=device)
    x = Rows(Encoding("bf16"), {"data": torch.full((4, 128), 2.0**-7, device=device).bfloat16()}, torch.bfloat16)
    y = experts(x, pack(ExpertWeights(w13, w2, SILU, Encoding("bf16"))), ids, torch.ones(4, 1, device=device)).float()
    gate, up = torch.tensor([1.0, 4.0, 0.0, 4.0], device=device), torch.tensor([0.5, 2.0, 0.0, 2.0], device=device)
    scale = torch.tensor([1.0, 4.0, 0.0, 4.0], device=device)
    want = (torch.nn.functional.silu(gate) * up * 128 * scale)[:, None]
    return bool(((y - want).abs() <= 2**-6 * want).all())


@dataclass(frozen=True)
class Routed:
    """One call's routing: its places, made anew only where a kernel wants blocks of another height."""

    ids_TA: Tensor
    experts: int
    made: dict[int, Any]

    def places(self, height: int) -> Any:
        from moesaic.kernels._triton.place import place

        if height not in self.made:
            self.made[height] = place(self.ids_TA, self.experts, height)
        return self.made[height]


def experts(x: Rows, w: ExpertWeights, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
    """Raises ValueError for weights that were not packed."""
    from moesaic.kernels._triton.join_rows import Extras
    from moesaic.kernels._triton.weigh import weigh

    w.must_be(NAME)
    if not ids_TA.numel():
        return x.data.new_empty(len(ids_TA), w.w2.shape[-2], dtype=x.dtype)
    routed = Routed(ids_TA.contiguous(), w.w13.shape[0], {})
    bias13, bias2 = w.biases or (None, None)
    values, scale, row = operand(x)
    both = product(values, scale, w.w13, x.encoding, routed)
    extras = Extras(bias13, w.w13.parts.get("global_scale"), row)
    values, scale, row = between(both, w, routed.ids_TA, extras)
    y = product(values, scale, w.w2, w.between, routed)
    return weigh(y, routed.ids_TA, weights_TA.contiguous(), None, Extras(bias2, w.w2.parts.get("global_scale"), row))


Operand = tuple[Tensor, Tensor | None, Tensor | None]
"""Rows as a kernel takes them; FP32 scales that it applies; scales of rows or of everything that are left to us."""


def operand(x: Rows) -> Operand:
    name, scale = x.encoding.name, x.parts.get("scale")
    if name == "bf16":
        return x.data.contiguous(), None, None
    if name in ("mxfp8", "nvfp4"):
        return exact(x), None, x.parts.get("global_scale")
    assert scale is not None
    return x.data, aligned(scale.reshape(1)) if name == "fp8_tensor" else scale.contiguous(), None


def aligned(scale: Tensor) -> Tensor:
    """On 16 bytes, as the launcher wants it: a calibrated scale may be an element of a larger tensor."""
    return scale if scale.data_ptr() % 16 == 0 else scale.clone()


def between(both_RJ: Tensor, w: ExpertWeights, ids_TA: Tensor, extras: Any) -> Operand:
    """[gate, up] rows of the first product -> activated and encoded rows for the second."""
    from moesaic.kernels import triton
    from moesaic.kernels._triton.join_rows import join_rows

    how, ids = w.between.name, ids_TA.flatten()
    fused = how if how in ("bf16", "mxfp8", "fp8_group128") else "wide"
    rows, scale = join_rows(both_RJ, ids, None, w.activation, fused, extras, ids_TA.shape[1], transposed=False)
    return (rows, scale, None) if fused == how else operand(triton.encode(rows, w.between, w.between_scale))


def product(x_MK: Tensor, scale: Tensor | None, w: QuantTensor, encoding: Encoding, routed: Routed) -> Tensor:
    """Rows of tokens [T, K], or routed rows [R, K], times their experts' weights -> BF16 [R, N].

    Rows of padding ids are undefined.
    """
    rows, (count, n, k) = routed.ids_TA.numel(), w.shape
    recipe = recipe_of(w.form, encoding)
    kernel, height = kernel_of(recipe, (count, n, k), ladder(rows), x_MK.device.index or 0)
    places = routed.places(height)
    y = torch.empty(rows, n, dtype=torch.bfloat16, device=x_MK.device)
    with torch.cuda.device(x_MK.device):
        library().launch(
            configs=kernel, inputs=x_MK, weight=w.parts["data"], weight_scale=w.parts["scale"],
            weight_scale_2=w.parts.get("fold"), input_scale=scale, outputs=y, sorted_ids=places.rows_P,
            expert_ids=places.expert_B, num_tokens_padded=places.total, locks=locks(x_MK.device),
            top_k=rows // len(x_MK),
        )  # fmt: skip
    return y


@lru_cache(maxsize=4096)
def kernel_of(recipe: Recipe, shape: tuple[int, int, int], rows: int, device: int) -> tuple[Tensor, int]:
    """(what names a compiled kernel to the launcher, rows of its blocks), as the library chooses for so many rows."""
    lib, layer = library(), layer_of(recipe, shape)
    chosen = lib.choose(layer, shape_m=rows, gemm_type="indexed", device=device)
    return lib.prepare(layer.to_str(), '{"gemm_type": "indexed"}', chosen, device), chosen["block_shape"][0]


@lru_cache(maxsize=256)
def layer_of(recipe: Recipe, shape: tuple[int, int, int]) -> Any:
    """Raises UnsupportedError where the library would read weights in another order than they are packed in."""
    count, n, k = shape
    layer = library().LayerConfig(
        sm_version=90, shape_n=n, shape_k=k, num_experts=count, c_dtype="bfloat16", **recipe.layer()
    )
    order = recipe.order
    theirs = (layer.use_flat_weight, layer.use_packed_k_layout, layer.use_fused_e8m0_scale, layer.use_raw_weight)
    if theirs != (order.flat, order.long, order.signs, False):
        raise UnsupportedError(f"Humming reads {recipe} in an unknown order", where="kernels/humming.py",
                               remedy="pip install 'moesaic[humming]', or use --experts triton.")  # fmt: skip
    return layer


def ladder(rows: int) -> int:
    """The next power of two, or three quarters of it, that is not less."""
    above = 1 << max(0, rows - 1).bit_length()
    return 3 * above // 4 if above >= 4 and rows <= 3 * above // 4 else above


@lru_cache(maxsize=16)
def locks(device: torch.device) -> Tensor:
    """All zero between calls. Calls on one device follow one another, so that one set serves them all."""
    return torch.zeros(LOCKS, dtype=torch.int32, device=device)
