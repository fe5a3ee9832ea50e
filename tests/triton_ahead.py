"""Compiles kernels for a GPU that is not here: every launch of a call on `meta` tensors, as PTX and machine code.

Meta tensors have shapes and no memory, so the launchers run at production shapes, and with them every choice of tile,
stage and warp that they make; a launcher that waited for a value of the device would fail here. Run as a program:

    python tests/triton_ahead.py ARCH CASE...       prints one JSON object per compiled kernel
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moesaic.contracts.scheme import SCHEMES, Encoding, Scheme
from moesaic.contracts.spec import SILU, Activation, RouterSpec
from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import Rows
from moesaic.kernels.ops import AttentionBatch, ExpertTerms, ExpertWeights, HeadNorms, KVView, Latent, Softmax, Span

PRODUCTS = r"(wgmma|tcgen05|mma)\.(?:mma_async|mma|sync)\S*?\.(e4m3|bf16|tf32|kind::\w+)\b"
LIKE = torch.empty(0, dtype=torch.bfloat16, device="meta")


class NoDevice:
    """Triton's view of a machine that has the target's compiler and nothing else."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_device_interface(self) -> Any:
        return torch.cpu


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def collect(arch: int, call: Callable[[], object], measure: bool = True) -> list[dict[str, Any]]:
    """Everything that a call would launch, compiled. measure: what each takes of a processor, too."""
    found: list[dict[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=(1, 1, 1), warmup=True, **kwargs)
        found.append(report(self.fn.__name__, kernel) if measure else {"kernel": self.fn.__name__})
        return kernel

    driver.set_active(NoDevice(arch))
    JITFunction.run = compile_only  # type: ignore[method-assign]
    try:
        call()
    finally:
        JITFunction.run = run  # type: ignore[method-assign]
    return found


def report(name: str, kernel: Any) -> dict[str, Any]:
    """shared bytes; registers and spilled bytes per thread; which tensor-core instructions the PTX has."""
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    products = sorted(set(re.findall(PRODUCTS, ptx)))
    return {
        "kernel": name, "shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps,
        "pdl": ("griddepcontrol.wait" in ptx, kernel.metadata.launch_pdl),
        "registers": int(re.search(r"REG:(\d+)", usage)[1]), "stack": int(re.search(r"STACK:(\d+)", usage)[1]),  # type: ignore[index]
        "products": [f"{op} {kind}" for op, kind in products if kind],
    }  # fmt: skip


def weight(scheme: Scheme, segments: tuple[int, ...], columns: int, *lead: int) -> QuantTensor:
    return QuantTensor.empty(scheme.weight, segments, columns, LIKE, lead)


def static_scale(encoding: Encoding) -> Tensor | None:
    return meta(dtype=torch.float32) if encoding.static else None


def encoded(tokens: int, size: int, encoding: Encoding) -> Rows:
    from moesaic.kernels._triton.encode import encode

    return encode(meta(tokens, size), encoding, static_scale(encoding))


def experts(name: str, tokens: int, shape: tuple[int, int, int, int] = (128, 2048, 768, 8), oai: bool = False,
            invariant: bool = False) -> None:  # fmt: skip
    from moesaic.kernels import triton_invariant
    from moesaic.kernels._triton.experts import experts

    (count, hidden, width, top_k), scheme = shape, SCHEMES[name]
    activation = Activation("swiglu_oai") if oai else SILU
    biases = (meta(count, 2 * width), meta(count, hidden)) if oai else None
    w = ExpertWeights(weight(scheme, (width, width), hidden, count), weight(scheme, (hidden,), width, count),
                      activation, scheme.activation, static_scale(scheme.activation), biases)  # fmt: skip
    ids = meta(tokens, top_k, dtype=torch.int32)
    call = triton_invariant.experts if invariant else experts
    call(encoded(tokens, hidden, scheme.activation), w, ids, meta(tokens, top_k, dtype=torch.float32))


def linear_quant(name: str, tokens: int) -> None:
    from moesaic.kernels._triton.linear_quant import linear_quant

    scheme = SCHEMES[name]
    linear_quant(encoded(tokens, 2048, scheme.activation), weight(scheme, (4096, 512, 512), 2048))


def batch_of(sequences: int, count: int) -> AttentionBatch:
    spans = tuple(Span(s * count, count, 1024) for s in range(sequences))
    table, spans_S3 = meta(sequences, 64, dtype=torch.int32), meta(sequences, 3, dtype=torch.int64)
    return AttentionBatch(spans, sequences if count == 1 else 0, table, 16, spans_S3)


def pool_of(view: KVView, fp8: bool) -> Tensor:
    return meta(65536, view.parts.fp8_bytes, dtype=torch.uint8) if fp8 else meta(65536, view.parts.width)


def attend(view: KVView, heads: int, sequences: int, count: int, window: int | None = None, fp8: bool = False) -> None:
    from moesaic.kernels._triton.attend_paged import attend_paged

    sinks = meta(heads, dtype=torch.float32) if window else None
    q = meta(sequences * count, heads, view.key_dim)
    attend_paged(q, pool_of(view, fp8), batch_of(sequences, count), view, 0.1, window, sinks)


def check_parts(backend: str, terms_PTN: Tensor, x: Rows, w: QuantTensor) -> None:
    """As many parts as the fake of the op says there are."""
    from moesaic.kernels.fakes import FAKES

    wanted = FAKES["linear_terms"](backend, x, w)
    assert (terms_PTN.shape, terms_PTN.dtype) == (wanted.shape, wanted.dtype), backend


def fused(tokens: int, name: str) -> None:
    """What stands between the products of a decoding step, for an encoding."""
    from moesaic.kernels._triton.add_norm_encode import add_norm_encode
    from moesaic.kernels._triton.attend_encode import attend_encode
    from moesaic.kernels._triton.gate import gate
    from moesaic.kernels._triton.linear_terms import linear_terms
    from moesaic.kernels._triton.store_heads import store_heads
    from moesaic.kernels._triton.top_two import top_two

    scheme = SCHEMES[name]
    encoding, static, angle = scheme.activation, static_scale(scheme.activation), meta(tokens, 64, dtype=torch.float32)
    terms, hidden = meta(4, tokens, 2048, dtype=torch.float32), meta(tokens, 2048)
    _, rows, _ = add_norm_encode(terms, hidden, meta(2048), 1e-6, encoding, static)
    results, ids = meta(tokens * 8, 2048), meta(tokens, 8, dtype=torch.int32)
    for onto in (None, hidden):
        of_experts = ExpertTerms(results, ids, meta(tokens, 8, dtype=torch.float32), onto)
        add_norm_encode(of_experts, hidden, meta(2048), 1e-6, encoding, static)
    w = weight(scheme, (4096, 512, 512), 2048)
    x = linear_terms(rows, w)
    check_parts("triton", x, rows, w)
    norms = HeadNorms(meta(128), meta(128), 1e-6, False, torch.bfloat16)
    q = store_heads(x, norms, (angle, angle), pool_of(GROUPED, False), meta(tokens, dtype=torch.int64), GROUPED)
    attend_encode(q, pool_of(GROUPED, False), batch_of(tokens, 1), GROUPED, Softmax(0.1), encoding, static)
    live, counts = meta(tokens, dtype=torch.int64), meta(128, dtype=torch.int64)
    spec = RouterSpec(128, 8, "softmax", "w")
    gate(hidden, meta(128, 2048, dtype=torch.float32), None, None, spec, live, counts)
    top_two(meta(tokens, 151936))


def fused_latent(tokens: int, fp8: bool) -> None:
    from moesaic.kernels._triton.attend_latent import attend_latent
    from moesaic.kernels._triton.store_latent import store_latent

    angles, pool = (meta(tokens, 32, dtype=torch.float32),) * 2, pool_of(LATENT, fp8)
    w = Latent(meta(128, 128, 512), meta(128, 128, 512), meta(512), 1e-6, 0.1, True, 1536)
    store_latent(meta(tokens, 2112), w, angles, pool, meta(tokens, dtype=torch.int64))
    attend_latent(meta(tokens, 128, 192), w, angles, pool, batch_of(tokens, 1))


def invariant(name: str) -> None:
    """The kernels of deterministic mode, for prompts; none asks how many rows there are."""
    from moesaic.kernels import triton_invariant as backend

    scheme = SCHEMES[name]
    if not scheme.quantized:
        backend.linear(meta(48, 2048), meta(151936, 2048))
    else:
        x, w = encoded(48, 2048, scheme.activation), weight(scheme, (4096, 512, 512), 2048)
        backend.linear_quant(x, w)
        check_parts("triton_invariant", backend.linear_terms(x, w), x, w)
    experts(name, 48, invariant=True)
    backend.gate(meta(48, 2048), meta(128, 2048, dtype=torch.float32), None, None, RouterSpec(128, 8, "softmax", "w"))
    q, batch = meta(48, 32, 128), batch_of(3, 16)
    backend.attend_encode(q, pool_of(GROUPED, False), batch, GROUPED, Softmax(0.1), scheme.activation)
    w_latent = Latent(meta(128, 128, 512), meta(128, 128, 512), meta(512), 1e-6, 0.1, True, 1536)
    angles = (meta(48, 32, dtype=torch.float32),) * 2
    backend.attend_latent(meta(48, 128, 192), w_latent, angles, pool_of(LATENT, True), batch)


def gate(tokens: int) -> None:
    from moesaic.kernels._triton.linear import linear

    linear(meta(tokens, 7168, dtype=torch.float32), meta(256, 7168, dtype=torch.float32))


def row_wise(tokens: int) -> None:
    from moesaic.kernels._triton.activate import activate
    from moesaic.kernels._triton.add_rms_norm import add_rms_norm
    from moesaic.kernels._triton.requantize import requantize_slots
    from moesaic.kernels._triton.rotate import rotate
    from moesaic.kernels._triton.route import route

    add_rms_norm(meta(tokens, 7168), meta(tokens, 7168), meta(7168), 1e-6)
    rotate(meta(tokens, 32, 128), meta(tokens, 64, dtype=torch.float32), meta(tokens, 64, dtype=torch.float32), False)
    activate(meta(tokens, 4096), SILU)
    spec = RouterSpec(256, 8, "sigmoid", "w", "b", True, 2.5, 8, 4, "top2_sum")
    for logits in (torch.float32, torch.bfloat16):
        route(meta(tokens, 256, dtype=logits), meta(256, dtype=torch.float32), spec)
    slots = meta(8, 64, 2048, dtype=torch.float8_e4m3fn)
    requantize_slots(slots, meta(8, 64, 16, dtype=torch.float32), meta(8, dtype=torch.int32),
                     meta(dtype=torch.float32))  # fmt: skip


def around(tokens: int) -> None:
    """What stands around products that are not ours, of DeepSeek-V3's mixture."""
    from moesaic.kernels._triton.gather import gather, transposed
    from moesaic.kernels._triton.join_rows import Extras, join_rows, join_slots
    from moesaic.kernels._triton.place import place
    from moesaic.kernels._triton.weigh import weigh

    (count, hidden, width, top_k), floats = DEEPSEEK, torch.float32
    ids = meta(tokens, top_k, dtype=torch.int32)
    places = place(ids, count, 64)
    gather(meta(tokens, hidden, dtype=torch.float8_e4m3fn), meta(tokens, hidden // 128, dtype=floats), places)
    gather(meta(tokens, hidden), None, places)
    transposed(meta(tokens, hidden // 128, dtype=floats))
    extras = Extras(meta(count, 2 * width), meta(count, 2, dtype=floats), meta(tokens, 1, dtype=floats))
    for how in ("bf16", "wide", "fp8_group128", "mxfp8"):
        join_rows(meta(places.count, 2 * width), ids.flatten(), places.place_R, SILU, how)
        join_rows(meta(tokens * top_k, 2 * width), ids.flatten(), None, Activation("swiglu_oai"), how, extras, top_k)
        join_slots(meta(count, 128, 2 * width), meta(count, dtype=torch.int32), SILU, how)
    last = Extras(meta(count, hidden), meta(count, 1, dtype=floats), meta(tokens * top_k, 1, dtype=floats))
    for more, at in ((Extras(), places.place_R), (last, None)):
        weigh(meta(places.count, hidden), ids, meta(tokens, top_k, dtype=floats), at, more)


LATENT, GROUPED = KVView(1, 576, 0, 512), KVView(4, 128, 512, 128)
DEEPSEEK = (256, 7168, 2048, 8)
CASES: dict[str, Callable[[], object]] = {
    "row wise": lambda: row_wise(64),
    "around": lambda: around(128),
    "gate": lambda: gate(16),
    "latent decode": lambda: attend(LATENT, 128, 8, 1),
    "latent prefill": lambda: attend(LATENT, 128, 1, 256),
    "grouped decode": lambda: attend(GROUPED, 32, 64, 1),
    "grouped prefill": lambda: attend(GROUPED, 32, 1, 256),
    "latent decode fp8": lambda: attend(LATENT, 128, 8, 1, fp8=True),
    "latent prefill fp8": lambda: attend(LATENT, 128, 1, 256, fp8=True),
    "grouped decode fp8": lambda: attend(GROUPED, 32, 64, 1, fp8=True),
    "grouped prefill fp8": lambda: attend(GROUPED, 32, 1, 256, fp8=True),
    "fused latent": lambda: fused_latent(16, False),
    "fused latent fp8": lambda: fused_latent(16, True),
    "invariant bf16": lambda: invariant("bf16"),
    "invariant fp8": lambda: invariant("fp8"),
    "sinks": lambda: attend(KVView(8, 64, 512, 64), 64, 8, 1, 128),
    "sinks prefill": lambda: attend(KVView(8, 64, 512, 64), 64, 1, 512, 128),
    "oai": lambda: experts("mxfp4", 16, (128, 2880, 2880, 4), True),
}
for _name in SCHEMES:
    if SCHEMES[_name].activation.by_row and SCHEMES[_name].quantized:
        for _tokens in (1, 64):
            CASES[f"fused {_name} {_tokens}"] = lambda name=_name, tokens=_tokens: fused(tokens, name)
    for _tokens in (1, 64, 256, 1024, 4096):
        CASES[f"experts {_name} {_tokens}"] = lambda name=_name, tokens=_tokens: experts(name, tokens)
        if _name != "bf16":
            CASES[f"linear {_name} {_tokens}"] = lambda name=_name, tokens=_tokens: linear_quant(name, tokens)


def main(arch: int, names: list[str]) -> None:
    for name in names or CASES:
        for each in collect(arch, CASES[name]):
            print(json.dumps({"case": name, **each}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
