"""Small checkpoints to quantise, and what a model loaded from one computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from moesaic.config import EngineConfig
from moesaic.engine.drafts import whole_sequence
from moesaic.engine.launch import launch
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.decoder import Decoder
from tests.checkpoints import random_drafts, random_model, save
from tests.cli_support import TEMPLATE, Done, call
from tests.text_support import write_checkpoint

WIDE: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "hidden_size": 128, "intermediate_size": 160, "moe_intermediate_size": 128, "num_hidden_layers": 2,
        "q_lora_rank": 96, "kv_lora_rank": 32, "v_head_dim": 32, "n_routed_experts": 4, "n_shared_experts": 1,
        "num_nextn_predict_layers": 1,
    },
    "qwen3_moe": {
        "hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 32, "num_hidden_layers": 2, "num_experts": 5},
    "mixtral": {
        "hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 2, "num_local_experts": 3},
    "gpt_oss": {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_local_experts": 4},
}  # fmt: skip
"""Widths that are multiples of 128, but for some of deepseek_v3: 96 (q_b) and 160 (the dense down)."""
TOKENS = [(7 * i * i + 3 * i + 1) % 256 for i in range(37)]


def write_source(path: Path, kind: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """A random checkpoint with a tokenizer; deepseek_v3 has a draft layer."""
    model = random_model(kind, **{**WIDE[kind], **changes})
    drafts = random_drafts(model, 1) if kind == "deepseek_v3" else None
    write_checkpoint(path, "byte_level", chat_template=TEMPLATE)
    return save(model, path, dtype=dtype, drafts=drafts)


def quantize(source: Path, output: Path, scheme: str, *more: str) -> Done:
    return call("quantize", source, output, "--scheme", scheme, *more)


def quantized(source: Path, output: Path, scheme: str, *more: str) -> Path:
    done = quantize(source, output, scheme, *more)
    assert done.code == 0, done.err
    return output


def model_of(path: Path, **options: Any) -> Decoder:
    with Checkpoint.open(path) as checkpoint:
        return launch(checkpoint, EngineConfig(progress=False, max_model_len=64, **options), None).built.model


@torch.inference_mode()
def outputs(model: Decoder) -> Tensor:
    """Logits of the model over TOKENS, and of its first draft layer below them."""
    hidden_TD = model(whole_sequence(model, TOKENS))
    found = [model.logits(hidden_TD)]
    if model.drafts:
        found.append(model.logits(model.draft(0, whole_sequence(model, TOKENS[1:]), hidden_TD[:-1])))
    return torch.cat(found)


def tensors_of(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def report_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "quantization_report.json").read_text())
    return found


def bytes_of(path: Path) -> dict[str, bytes]:
    """Every file of a directory by its name."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
