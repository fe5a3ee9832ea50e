"""Between the training module and a released DeepSeek-V3 checkpoint: names, BF16, shards, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.model import Attention, Block, MoE, Shape, Tiny

SHARD_BYTES = 9 * 2**20
_ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


def _attention(prefix: str, attention: Attention) -> dict[str, Tensor]:
    out = {f"{prefix}.{name}.weight": getattr(attention, name) for name in _ATTENTION}
    out[f"{prefix}.q_a_layernorm.weight"] = attention.q_a_layernorm.weight
    out[f"{prefix}.kv_a_layernorm.weight"] = attention.kv_a_layernorm.weight
    return out


def _mlp(prefix: str, mlp: torch.nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{name}.weight": getattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")}


def _block(prefix: str, block: Block) -> dict[str, Tensor]:
    out = {
        f"{prefix}.input_layernorm.weight": block.input_layernorm.weight,
        f"{prefix}.post_attention_layernorm.weight": block.post_attention_layernorm.weight,
        **_attention(f"{prefix}.self_attn", block.self_attn),
    }
    moe = block.mlp
    if not isinstance(moe, MoE):
        return out | _mlp(f"{prefix}.mlp", moe)
    out |= {f"{prefix}.mlp.gate.weight": moe.router, f"{prefix}.mlp.gate.e_score_correction_bias": moe.bias}
    for e in range(moe.gate_up.shape[0]):
        out[f"{prefix}.mlp.experts.{e}.gate_proj.weight"] = moe.gate_up[e, 0]
        out[f"{prefix}.mlp.experts.{e}.up_proj.weight"] = moe.gate_up[e, 1]
        out[f"{prefix}.mlp.experts.{e}.down_proj.weight"] = moe.down[e]
    return out | _mlp(f"{prefix}.mlp.shared_experts", moe.shared)


def named_tensors(model: Tiny) -> dict[str, Tensor]:
    """Views of the model's own storage under their released names, in file order."""
    out = {"model.embed_tokens.weight": model.embed_tokens}
    for i, layer in enumerate(model.layers):
        out |= _block(f"model.layers.{i}", layer)
    out |= {"model.norm.weight": model.norm.weight, "lm_head.weight": model.lm_head}
    prefix = f"model.layers.{len(model.layers)}"
    out |= {
        f"{prefix}.embed_tokens.weight": model.embed_tokens,
        f"{prefix}.enorm.weight": model.mtp.enorm.weight,
        f"{prefix}.hnorm.weight": model.mtp.hnorm.weight,
        f"{prefix}.eh_proj.weight": model.mtp.eh_proj,
        **_block(prefix, model.mtp.block),
        f"{prefix}.shared_head.norm.weight": model.mtp.norm.weight,
        f"{prefix}.shared_head.head.weight": model.lm_head,
    }
    return out


def _stored(name: str, tensor: Tensor) -> Tensor:
    dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
    return tensor.detach().to("cpu", dtype).contiguous().clone()


def save(model: Tiny, config: dict[str, Any], folder: Path) -> None:
    """Write config.json, generation_config.json, the shards and their index; old shards are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    shards: list[dict[str, Tensor]] = [{}]
    used = total = 0
    for name, tensor in named_tensors(model).items():
        stored = _stored(name, tensor)
        size = stored.numel() * stored.element_size()
        if used + size > SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1][name] = stored
        used, total = used + size, total + size
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"],
                  "pad_token_id": config["pad_token_id"], "do_sample": False, "max_new_tokens": 512}  # fmt: skip
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    for name, value in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("model.safetensors.index.json", index),
    ):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def load(folder: Path, device: str = "cpu") -> Tiny:
    """The training module in FP32 with the exported (BF16-rounded) values. Every tensor must be there, and no other."""
    config = json.loads((folder / "config.json").read_text())
    model = Tiny(Shape.of(config))
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model-*.safetensors")):
        stored |= load_file(file)
    targets = named_tensors(model)
    if set(targets) != set(stored):
        raise ValueError(f"tensor names differ: {sorted(set(targets) ^ set(stored))[:5]}")
    for name, target in targets.items():
        target.copy_(stored[name])
    return model.to(device)
