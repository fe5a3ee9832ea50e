"""Expert and dense products by DeepGEMM (package `sgl-deep-gemm`), on Hopper: FP8 in blocks, and BF16.

Rows are sorted by expert into one list in which each expert's rows begin at a multiple of a tile's height (place.py,
gather.py); the host knows only how long that list can be, the kernel reads on the device where each expert's rows end,
and does no work behind them. So nothing waits for the device, and all of it can be captured into a graph. Weights are
read as they are stored: there is no second copy. Activation and encoding in between, and the weighted sum, are ours
(join_rows.py, weigh.py).

The library compiles its kernels with nvcc when they are first used, and keeps them in a folder (DG_JIT_CACHE_DIR).
Which one it takes follows from the mean rows per expert, given here in powers of two so that they are few.

Letters: T tokens, R routed rows, P places, E experts, C slots, K contraction, N outputs, G groups of 128 along K.
"""

from __future__ import annotations

from contextlib import suppress
from ctypes import CDLL
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from shutil import which
from typing import Any

import torch
from torch import Tensor

from moesaic.contracts.contract import Contract, Limits, path_of
from moesaic.contracts.scheme import WeightFormat
from moesaic.errors import UnsupportedError
from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import Rows
from moesaic.kernels.installed import lacking
from moesaic.kernels.ops import ExpertWeights

_EXPERTS = Contract(
    "experts", "deep_gemm", frozenset({"cuda"}), frozenset({"bfloat16"}), batch_invariant=False, rank=55,
    activations=frozenset({"silu", "swiglu_oai"}), expert_bias=True, arch=(90, 90), package="sgl-deep-gemm",
    versions=">=0.1.5,<0.2", path=path_of("experts"), limits=Limits(hidden_multiple=128, width_multiple=128),
)  # fmt: skip
_FP8: dict[str, Any] = {"formats": frozenset({"fp8_block"}), "encodings": frozenset({"fp8_group128"})}
CONTRACTS = (
    _EXPERTS,
    replace(_EXPERTS, **_FP8),
    replace(_EXPERTS, op="linear_quant", path=path_of("linear_quant"), limits=Limits(), **_FP8),
)
HEIGHTS = (64, 128)
"""Heights of a tile: of few rows, of many."""
TUNABLE = {"height": HEIGHTS}
"""What `moesaic bench tune` tries."""


def probe() -> str | None:
    """Multiplies two experts' rows. None where the result is right."""
    if not torch.cuda.is_available():
        return "finds no CUDA device"
    if reason := lacking("sgl-deep-gemm", _EXPERTS.versions, "deepgemm"):
        return reason
    if torch.cuda.get_device_capability()[0] != 9:
        return "is used on Hopper GPUs only"
    try:
        library()
    except (ImportError, OSError) as error:  # an ABI that is not this torch's, or a library that is not there
        return f"cannot be loaded ({error!s:.200}); a release is made for one of torch: pip install 'moesaic[deepgemm]'"
    except AssertionError:
        return "finds no CUDA toolkit to compile with; install one and set CUDA_HOME"
    try:
        return None if tried() else "computes wrong results on this machine"
    except Exception as failure:  # whatever a compiler or driver raises, it is a reason, not a crash
        return f"fails on this machine: {failure!r:.200}"


@cache
def library() -> Any:
    """The package. Raises OSError where a symbol is lacking, which would else end the process at the first call."""
    import tvm_ffi  # its library comes first: the next one needs it  # noqa: F401

    spec = find_spec("deep_gemm")
    if spec is None or spec.origin is None:
        raise ImportError("there is no module deep_gemm")
    load_compiler()
    CDLL(str(Path(spec.origin).parent / "_C.so"))  # resolves every symbol at once
    import deep_gemm

    return deep_gemm


def load_compiler() -> None:
    """NVRTC, which the package links and torch loads late: by its name, else from torch's packages or the toolkit."""
    name = f"libnvrtc.so.{(torch.version.cuda or '').split('.')[0]}"
    nvcc, packages = which("nvcc"), Path(torch.__file__).parent.parent / "nvidia"
    toolkit = [Path(nvcc).resolve().parent.parent / "lib64"] if nvcc else []
    for path in (name, *(folder / name for folder in (*packages.glob("*/lib"), *toolkit))):
        with suppress(OSError):  # the last word is the package's own: it says which library it lacks
            CDLL(str(path))
            return


def tried() -> bool:
    """3 rows of the first expert and 5 of the second, times weights of ones."""
    from moesaic.kernels._triton.place import place

    ids = torch.tensor([0] * 3 + [1] * 5, dtype=torch.int32, device="cuda")[:, None]
    places = place(ids, 2, HEIGHTS[0])
    x = torch.ones(places.count, 128, device="cuda").to(torch.float8_e4m3fn)
    data = torch.ones(2, 128, 128, device="cuda").to(torch.float8_e4m3fn)
    w = QuantTensor(WeightFormat("fp8_block"), (128,), 128,
                    {"data": data, "scale": torch.tensor([[[0.5]], [[2.0]]], device="cuda")})  # fmt: skip
    y = product(x, torch.ones(1, places.count, device="cuda").t(), w, places.ends_E, places.height, 4)
    want = torch.tensor([64.0] * 3 + [256.0] * 5, device="cuda")[:, None]
    return bool((y[places.place_R.long()] == want).all())


def experts(x: Rows, w: ExpertWeights, ids_TA: Tensor, weights_TA: Tensor, height: int = 0) -> Tensor:
    """height: of a tile, one of HEIGHTS, or 0 for the one that the mean rows per expert suggest."""
    from moesaic.kernels._triton.gather import gather
    from moesaic.kernels._triton.join_rows import Extras, join_rows
    from moesaic.kernels._triton.place import place
    from moesaic.kernels._triton.weigh import weigh

    w.must_be("plain")
    if not ids_TA.numel():
        return x.data.new_empty(len(ids_TA), w.w2.shape[-2], dtype=x.dtype)
    ids, (bias13, bias2) = ids_TA.contiguous(), w.biases or (None, None)
    count = w.w13.shape[0]
    mean = max(1, ids.numel() // count)
    places = place(ids, count, height or HEIGHTS[mean > 96])
    rows, scale = gather(x.data, x.parts.get("scale"), places)
    both = product(rows, scale, w.w13, places.ends_E, places.height, mean)
    how = "bf16" if scale is None else "fp8_group128"
    hidden, scale = join_rows(both, ids.flatten(), places.place_R, w.activation, how, Extras(bias13))
    y = product(hidden, scale, w.w2, places.ends_E, places.height, mean)
    return weigh(y, ids, weights_TA.contiguous(), places.place_R, Extras(bias2))


def product(x_PK: Tensor, scale_PG: Tensor | None, w: QuantTensor, ends_E: Tensor, height: int, mean: int) -> Tensor:
    """Rows times their experts' weights -> BF16 [P, N]; rows that are nobody's are undefined.

    scale: transposed, of FP8 rows.  ends: the place behind each expert's last row.  mean: rows per expert, about.
    """
    y = torch.empty(len(x_PK), w.shape[-2], dtype=torch.bfloat16, device=x_PK.device)
    lib, asks = library(), {"use_psum_layout": True, "expected_m_for_psum_layout": rounded(mean)}
    with torch.cuda.device(x_PK.device):
        lib.set_mk_alignment_for_contiguous_layout(height)
        if scale_PG is None:
            lib.m_grouped_bf16_gemm_nt_contiguous(x_PK, w.plain, y, ends_E, **asks)
        else:
            b = (w.parts["data"], w.parts["scale"])
            lib.m_grouped_fp8_gemm_nt_contiguous((x_PK, scale_PG), b, y, ends_E, **asks)
    return y


def experts_slotted(x: Rows, w: ExpertWeights, counts_E: Tensor, mean: int = 0) -> Tensor:
    """Layout `slotted`: rows [E, C, K] of which the first counts[e] are in use -> [E, C, K] in BF16, unweighted.

    Rows behind counts[e] of the result are undefined. mean: rows in use per expert, about, where the caller knows it.
    Raises UnsupportedError for a capacity that is no multiple of 128: a tile would reach into the next expert's slots.
    """
    from moesaic.kernels._triton.join_rows import Extras, join_slots

    capacity = x.data.shape[1]
    if capacity % HEIGHTS[-1]:
        raise UnsupportedError(f"{capacity} slots per expert are no multiple of {HEIGHTS[-1]}", where="deep_gemm",
                               remedy="Round the capacity up, or use --experts triton.")  # fmt: skip
    counts, scale = counts_E.to(torch.int32), x.parts.get("scale")
    if scale is not None and scale.stride() != (capacity * scale.shape[2], 1, capacity):
        scale = scale.transpose(1, 2).contiguous().transpose(1, 2)
    both = slotted_product(x.data, scale, w.w13, counts, mean)
    how = "bf16" if scale is None else "fp8_group128"
    hidden, scale = join_slots(both, counts, w.activation, how, Extras(w.biases[0] if w.biases else None))
    y = slotted_product(hidden, scale, w.w2, counts, mean)
    return y if w.biases is None else y + w.biases[1][:, None]


def slotted_product(x_ECK: Tensor, scale_ECG: Tensor | None, w: QuantTensor, counts_E: Tensor, mean: int) -> Tensor:
    """The same of slots. scale: transposed per expert."""
    experts_, capacity = x_ECK.shape[:2]
    y = torch.empty(experts_, capacity, w.shape[-2], dtype=torch.bfloat16, device=x_ECK.device)
    lib, expected = library(), rounded(mean or min(capacity, HEIGHTS[0]))
    with torch.cuda.device(x_ECK.device):
        if scale_ECG is None:
            lib.m_grouped_bf16_gemm_nt_masked(x_ECK, w.plain, y, counts_E, expected)
        else:
            b = (w.parts["data"], w.parts["scale"])
            lib.m_grouped_fp8_fp4_gemm_nt_masked((x_ECK, scale_ECG), b, y, counts_E, expected)
    return y


def linear_quant(x: Rows, w: QuantTensor, bias_N: Tensor | None = None) -> Tensor:
    """Raises UnsupportedError for sizes whose rows do not lie on 16 bytes."""
    from moesaic.kernels._triton.gather import transposed

    lead, (n, k) = x.data.shape[:-1], w.shape
    if k % 16 or any(rows % 8 for rows in w.segments):
        raise UnsupportedError(f"{n} x {k} is not in steps of 8 x 16", where="deep_gemm",
                               remedy="Plan without a wish for this kernel.")  # fmt: skip
    rows, data, scales = x.data.reshape(-1, k), w.parts["data"], w.parts["scale"]
    y = torch.empty(len(rows), n, dtype=torch.bfloat16, device=rows.device)
    if y.numel():
        scale = transposed(x.parts["scale"].reshape(len(rows), -1))
        with torch.cuda.device(rows.device):
            for start, stop, block in spans(w.segments):
                b = (data[start:stop], scales[block : block + -(-(stop - start) // 128)])
                library().fp8_gemm_nt((rows, scale), b, y[:, start:stop])
    y = y if bias_N is None else y + bias_N
    return y.to(x.dtype).view(*lead, n)


def spans(segments: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(first row, last row + 1, first block of 128) of consecutive segments whose blocks follow one another.

    Blocks start anew at each segment: behind one that ends within a block, another product begins.
    """
    found: list[tuple[int, int, int]] = []
    block = 0
    for rows, stop in zip(segments, accumulate(segments), strict=True):
        if found and (found[-1][1] - found[-1][0]) % 128 == 0:
            found[-1] = (found[-1][0], stop, found[-1][2])
        else:
            found.append((stop - rows, stop, block))
        block += -(-rows // 128)
    return found


def rounded(mean: int) -> int:
    """To a power of two, up."""
    return 1 << max(0, mean - 1).bit_length()
