"""The GPU backend: every op as Triton kernels (plain dense products: the vendor's library through torch).

The code of an op is `_triton/<op>.py`, found by name when a plan binds it, so that this file can be read, and its
contracts planned with, on a machine without Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

from moesaic.contracts.contract import FLOATS16, Contract, path_of
from moesaic.contracts.scheme import ENCODINGS, FORMATS, KV_FORMATS
from moesaic.kernels.ops import OP_NAMES

FUSED = ("gate", "store_latent", "attend_latent", "top_two", "linear_terms", "add_norm_encode", "store_heads",
         "attend_encode")  # fmt: skip
OPS = OP_NAMES + FUSED
PARTS = ("experts_terms",)
"""Of an op, under its contract: see `registry.own`."""
ROW_WISE = ("rms_norm", "add_rms_norm", "rotate", "activate", "route", "top_two", "add_norm_encode", "store_heads",
            "store_latent")  # fmt: skip
"""Computed by one program per row, in either float type; the others choose tiles by the number of rows."""
BF16 = frozenset({"bfloat16"})


def contract_of(op: str) -> Contract:
    row_wise = op in ROW_WISE
    return Contract(
        op, "triton", frozenset({"cuda"}), FLOATS16 if row_wise or op in ("linear", "encode") else BF16,
        batch_invariant=row_wise, rank=50, formats=frozenset(FORMATS), encodings=frozenset(ENCODINGS),
        activations=frozenset({"silu", "swiglu_oai"}), expert_bias=True, sinks=True, arch=(90, 103), package="triton",
        versions=">=3.6,<3.8", path=path_of(op), logits=FLOATS16, kv=frozenset(KV_FORMATS),
    )  # fmt: skip


# Rows are encoded one by one, but for a dynamic scale of the whole tensor, which no deterministic plan has.
CONTRACTS = tuple(replace(contract_of(op), batch_invariant=op in (*ROW_WISE, "encode")) for op in OPS)


def probe() -> str | None:
    """Runs a kernel. None where its result is right."""
    import torch

    if not torch.cuda.is_available():
        return "finds no CUDA device"
    try:
        from moesaic.kernels._triton.rms_norm import rms_norm

        y = rms_norm(torch.full((2, 16), 3.0, device="cuda"), torch.ones(16, device="cuda"), 0.0)
    except ImportError as missing:
        return f"cannot be imported ({missing}); install moesaic[gpu]"
    except Exception as failure:  # whatever a compiler or driver raises, it is a reason, not a crash
        return f"fails on this machine: {failure!r:.200}"
    return None if bool(((y - 1).abs() < 1e-5).all()) else "computes wrong results on this machine"


def __getattr__(name: str) -> Callable[..., Any]:
    if name not in OPS + PARTS:
        raise AttributeError(name)
    found: Callable[..., Any] = getattr(import_module(f"moesaic.kernels._triton.{name}"), name)
    return found
