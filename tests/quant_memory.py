"""How much memory do quantised weights take while they are made and multiplied? Run in a process of its own.

    python -m tests.quant_memory products FORMAT...     a dense weight, then experts, of each format
    python -m tests.quant_memory write FOLDER
    python -m tests.quant_memory model SCHEME FOLDER
    python -m tests.quant_memory dummy SCHEME FOLDER    a folder with a config.json alone

Prints a line of JSON for each: `bf16`, bytes of the weights in BF16; `held`, bytes that are meant to be in memory;
`growth`, by how much the process was larger at its peak than just before.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from moesaic.config import EngineConfig
from moesaic.contracts.scheme import Encoding, WeightFormat
from moesaic.contracts.spec import SILU
from moesaic.engine.forced import run_batch
from moesaic.engine.launch import launch
from moesaic.formats.base import QuantTensor
from moesaic.kernels import cpu_quant
from moesaic.kernels.ops import ExpertWeights
from moesaic.layers.linear import Stored
from moesaic.models.checkpoint import Checkpoint

PLAIN = Encoding("bf16")


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def growth_of(work: Callable[[], int]) -> dict[str, int]:
    """work: returns the bytes that it holds at its end."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = status_bytes("VmRSS")
    held = work()
    return {"held": held, "growth": status_bytes("VmHWM") - before}


def random_codes(form: str, segments: tuple[int, ...], columns: int, lead: tuple[int, ...] = ()) -> QuantTensor:
    """Random data, scales of one: made in place, or making it would be the peak."""
    group, dtype = (128, "bfloat16") if form == "int4" else (0, "float32")
    w = QuantTensor.empty(WeightFormat(form, group, dtype), segments, columns, torch.empty(0), lead)
    for name, part in w.parts.items():
        if name == "data":
            part.view(torch.int64).random_(-(1 << 62), 1 << 62)
        else:
            part.copy_(127) if part.dtype == torch.uint8 else part.copy_(torch.ones(()))
    return w


def linear(form: str, rows: int, columns: int) -> int:
    w = random_codes(form, (rows, rows // 2), columns)
    for dtype in (torch.float32, torch.bfloat16):
        cpu_quant.linear_quant(cpu_quant.encode(torch.randn(5, columns).to(dtype), PLAIN), w)
    return w.nbytes


def experts(form: str, count: int, width: int, hidden: int) -> int:
    w13 = random_codes(form, (width, width), hidden, (count,))
    w2 = random_codes(form, (hidden,), width, (count,))
    ids = torch.arange(2 * count, dtype=torch.int32).view(-1, 2) % count
    for dtype in (torch.float32, torch.bfloat16):
        rows = cpu_quant.encode(torch.randn(len(ids), hidden).to(dtype), PLAIN)
        cpu_quant.experts(rows, ExpertWeights(w13, w2, SILU, PLAIN), ids, torch.rand(len(ids), 2))
    return w13.nbytes + w2.nbytes


def write_model(folder: Path, layers: int, hidden: int, width: int) -> int:
    """A random Mixtral of eight experts, layer by layer; returns the bytes of its projections."""
    config = {
        "model_type": "mixtral", "hidden_size": hidden, "num_attention_heads": 8, "num_key_value_heads": 2,
        "intermediate_size": width, "num_hidden_layers": layers, "num_local_experts": 8, "num_experts_per_tok": 2,
        "vocab_size": 64, "max_position_embeddings": 64, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens": (64, hidden), "lm_head": (64, hidden), "model.norm": (hidden,)}
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.{norm}_layernorm": (hidden,) for norm in ("input", "post_attention")}
        shapes |= {f"{at}.self_attn.{p}_proj": (hidden if p in "qo" else hidden // 4, hidden) for p in "qkvo"}
        shapes[f"{at}.block_sparse_moe.gate"] = (8, hidden)
        for e in range(8):
            name = f"{at}.block_sparse_moe.experts.{e}"
            shapes |= {f"{name}.w1": (width, hidden), f"{name}.w2": (hidden, width), f"{name}.w3": (width, hidden)}
    tensors = {f"{name}.weight": torch.randn(shape, dtype=torch.bfloat16) / 8 for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return sum(tensor.nbytes for tensor in tensors.values())


def model(scheme: str, folder: Path) -> int:
    with Checkpoint.open(folder) as checkpoint:
        config = EngineConfig(quantization=scheme, progress=False, kv_memory=1 << 20)
        made = launch(checkpoint, config, None).built.model
    run_batch(made, [([1, 2, 3], [4, 5])])
    return made.nbytes()


def dummy(scheme: str, folder: Path, largest: dict[str, int]) -> int:
    """Random weights for a config.json; `layer`: bytes of one layer."""
    with Checkpoint.open(folder, weights=False) as checkpoint:
        config = EngineConfig(load_format="dummy", quantization=scheme, kv_memory=1 << 20, progress=False)
        model = launch(checkpoint, config, None).built.model
    each = (s.weight if isinstance(s, Stored) else s[1] for s in model.blocks[0].sources())
    largest["layer"] = sum(weight.nbytes for weight in each)
    return model.nbytes()


def main() -> None:
    torch.set_num_threads(1)
    kind, *names = sys.argv[1:]
    linear("mxfp4", 256, 256)  # loads what libraries load at first use
    if kind == "write":
        print(json.dumps({"bf16": write_model(Path(names[0]), 3, 1024, 1792)}))
    elif kind == "dummy":
        found: dict[str, int] = {}
        print(json.dumps(growth_of(partial(dummy, names[0], Path(names[1]), found)) | found))
    elif kind == "model":
        print(json.dumps(growth_of(partial(model, names[0], Path(names[1])))))
    for form in names if kind == "products" else ():
        print(json.dumps({"bf16": 2 * 12288 * 11264, **growth_of(partial(linear, form, 8192, 11264))}))
        print(json.dumps({"bf16": 2 * 16 * 3 * 1024 * 2816, **growth_of(partial(experts, form, 16, 1024, 2816))}))


if __name__ == "__main__":
    main()
