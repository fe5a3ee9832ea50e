"""Contracts of kernels and dispatchers that Moesaic knows and cannot run yet: data for `plan --hypothetical`.

Each entry states what the released package asks for, in the version range that it was checked against. An entry leaves
this file when its backend file arrives, which then declares it as built.
"""

from __future__ import annotations

from dataclasses import replace

from moesaic.contracts.contract import FLOATS16, Contract, Duty, Limits, Path

CUDA, BF16 = frozenset({"cuda"}), frozenset({"bfloat16"})
BLACKWELL, BLACKWELL_UP, HOPPER_UP, HOPPER = (100, 103), (100, 120), (90, 103), (90, 90)
WEIGH: frozenset[Duty] = frozenset({"weights", "reduce"})
ROUTE: frozenset[Duty] = frozenset({"route"})
FACTOR: frozenset[Duty] = frozenset({"factor"})
WEIGHTS: frozenset[Duty] = frozenset({"weights"})
SILU = frozenset({"silu"})
CLAMPED = frozenset({"silu", "swiglu_oai"})


def vendor(op: str, backend: str, rank: int, **fields: object) -> Contract:
    """A contract on CUDA in BF16 that is not built. Kernels choose their tiles by batch: none is batch-invariant."""
    return replace(Contract(op, backend, CUDA, BF16, False, rank, built=False), **fields)  # type: ignore[arg-type]


# --- FlashInfer's trtllm expert kernels: rows of the first product in the order up, gate; ids are global ---

_TRTLLM: dict[str, tuple[str, str, int, frozenset[str], frozenset[str]]] = {
    # variant: (format, encoding, multiple of the width, logits, activations)
    "fp8_block": ("fp8_block", "fp8_group128", 128, FLOATS16, SILU),
    "mxfp8": ("mxfp8", "mxfp8", 128, FLOATS16, CLAMPED),
    "nvfp4": ("nvfp4", "nvfp4", 64, FLOATS16, SILU),
    "mxfp4": ("mxfp4", "mxfp8", 64, FLOATS16, CLAMPED),
    "fp8_tensor": ("fp8_tensor", "fp8_tensor", 64, BF16, SILU),
    "bf16": ("bf16", "bf16", 64, FLOATS16, SILU),
}


def trtllm() -> list[Contract]:
    """Each variant four times: its own sigmoid routing, which applies the factor; its own softmax routing, which
    ignores it; and given routing, whose weights come scaled, as a pair or packed. The router bias is read as BF16,
    unchecked."""
    found = []
    for variant, (form, encoding, width, logits, kinds) in _TRTLLM.items():
        base = vendor(
            "experts", "flashinfer_trtllm", 20, arch=BLACKWELL, package="flashinfer-python", versions=">=0.6.8,<0.8",
            formats=frozenset({form}), encodings=frozenset({encoding}), logits=logits, activations=kinds,
            expert_bias=variant == "mxfp4", gate_up="swapped",
            packing="plain" if variant == "fp8_block" else "swizzled_128x4",
        )  # fmt: skip
        sizes = Limits(hidden_multiple=128, width_multiple=width, max_top_k=22, max_groups_kept=4)
        chooses: frozenset[Duty] = WEIGH | ROUTE
        own = Path(ids="global", routes=True, does=chooses)
        given = replace(base, limits=replace(sizes, max_groups_kept=None))
        found += [
            replace(given, path=Path(ids="global", does=WEIGH), versions=">=0.7,<0.8"),
            replace(given, rank=22, path=Path(ids="global", does=WEIGH, routing="packed")),
            replace(base, rank=21, scorings=frozenset({"sigmoid"}), router_bias=BF16, limits=sizes,
                    renormalizes=frozenset({True}), group_scores=frozenset({"top2_sum"}),
                    path=replace(own, does=own.does | FACTOR)),
            replace(base, rank=21, scorings=frozenset({"softmax", "softmax_topk"}), router_bias=BF16, groups=False,
                    limits=sizes, path=own),
        ]  # fmt: skip
    return found


# --- other expert kernels ---

_SORTED, _SLOTTED = Path("sorted", "sorted", align=128), Path("slotted", "slotted")
_FP8 = {"formats": frozenset({"fp8_block"}), "encodings": frozenset({"fp8_group128"})}
_HUMMING = frozenset(
    [(form, "bf16") for form in ("fp8_block", "fp8_tensor", "fp8_channel", "mxfp8", "mxfp4", "nvfp4", "int4")]
    + [("fp8_block", "fp8_group128"), ("mxfp8", "fp8_token"), ("mxfp4", "fp8_group128"), ("int4", "fp8_token")]
)


def others() -> list[Contract]:
    deep = {"arch": HOPPER_UP, "package": "sgl-deep-gemm", "versions": ">=0.1.5,<0.2",
            "limits": Limits(hidden_multiple=128, width_multiple=128)}  # fmt: skip
    humming = vendor(
        "experts", "humming", 40, package="humming-kernels", versions=">=0.1.19,<0.2", pairs=_HUMMING,
        formats=frozenset(form for form, _ in _HUMMING), encodings=frozenset(code for _, code in _HUMMING),
        path=Path("tokens", "sorted", can=WEIGHTS), packing="int32 tiles",
    )  # fmt: skip
    return [
        # Of rows as a dispatcher leaves them, sorted or in slots; `deep_gemm` sorts and reduces tokens itself.
        vendor("experts", "deep_gemm_contiguous", 30, **deep, **_FP8, path=_SORTED, capturable=False),
        vendor("experts", "deep_gemm_contiguous", 30, **deep, path=_SORTED, capturable=False),
        vendor("experts", "deep_gemm_masked", 31, **deep, **_FP8, path=_SLOTTED),
        vendor("experts", "deep_gemm_masked", 31, **deep, path=_SLOTTED),
        replace(humming, arch=(75, 89)),
        replace(humming, arch=BLACKWELL_UP),
        vendor("experts", "cutlass_w4afp8", 35, arch=HOPPER, formats=frozenset({"int4"}),
               encodings=frozenset({"fp8_tensor"}), path=_SLOTTED,
               limits=Limits(hidden_multiple=512, width_multiple=128)),
        vendor("linear_quant", "deep_gemm", 30, **{**deep, "arch": BLACKWELL}, **_FP8),
        vendor("linear_quant", "cutlass_scaled_mm", 32, arch=(89, 103),
               formats=frozenset({"fp8_tensor", "fp8_channel"}), encodings=frozenset({"fp8_tensor", "fp8_token"})),
        vendor("linear_quant", "flashinfer_mm", 33, arch=BLACKWELL, package="flashinfer-python",
               formats=frozenset({"mxfp8", "nvfp4"}), encodings=frozenset({"mxfp8", "nvfp4"}),
               pairs=frozenset({("mxfp8", "mxfp8"), ("nvfp4", "nvfp4")})),
        vendor("attend_paged", "flashinfer", 30, arch=(80, 89), package="flashinfer-python", sinks=True),
        vendor("attend_paged", "flashinfer", 30, arch=BLACKWELL_UP, package="flashinfer-python", sinks=True),
        vendor("attend_paged", "flash_mla", 29, arch=(90, 100), package="flash-mla", latent_only=True),
        vendor("attend_dense", "flash_attention", 30, arch=(80, 100), package="flash-attn"),
        vendor("finish", "weigh_and_sum", 10, path=Path("sorted", "tokens", does=WEIGH)),
    ]  # fmt: skip


# --- dispatchers between ranks ---

_DEEPEP_HIDDEN = frozenset({2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192})
_FREE = frozenset({"bf16", "fp8_tensor", "fp8_token", "fp8_group128", "mxfp8", "nvfp4"})


def dispatchers() -> list[Contract]:
    many = Limits(min_ranks=2)
    deep = Limits(min_ranks=2, hidden_in=_DEEPEP_HIDDEN, max_top_k=11)
    back = Path(emits="slotted", combines=frozenset({"slotted"}), combine_does=WEIGH, encodes=True)
    wires = frozenset({"bf16", "fp8_group128"})
    return [
        vendor("dispatch", "all_gather", 40, encodings=_FREE, limits=many, path=Path(ids="global")),
        vendor("dispatch", "all_to_all", 30, encodings=_FREE, limits=many, capturable=False),
        vendor("dispatch", "all_to_all_low_latency", 25, encodings=wires, path=back,
               limits=replace(many, max_tokens=256)),
        vendor("dispatch", "deepep", 20, encodings=wires, capturable=False, limits=deep, arch=HOPPER_UP,
               package="deep_ep", path=Path(counts="host")),
        vendor("dispatch", "deepep_low_latency", 15, encodings=wires, limits=replace(deep, max_tokens=128),
               arch=HOPPER_UP, package="deep_ep", path=back),
    ]  # fmt: skip


CONTRACTS: tuple[Contract, ...] = (*trtllm(), *others(), *dispatchers())
