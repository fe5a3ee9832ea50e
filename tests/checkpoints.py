"""Tiny random checkpoints in the Hugging Face layout, and the `transformers` model that each of them is.

Every weight is a BF16 number, whatever it is stored as: one model is then the oracle of FP32 and of BF16 runs. Only
the biases of expert selection are FP32 numbers, as in releases.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_layers import MtpModel
from transformers.models.deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
FP32_NAMES = ("e_score_correction_bias",)

SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
MLA: dict[str, Any] = {
    "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 24, "v_head_dim": 20, "num_key_value_heads": 4,
    "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
}  # fmt: skip
GQA: dict[str, Any] = {"num_key_value_heads": 2, "num_experts_per_tok": 2}
V3: dict[str, Any] = {**SIZES, **MLA, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0}
DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": V3,
    "kimi_k2": V3,
    "glm4_moe": {
        **SIZES, **GQA, "head_dim": 24, "moe_intermediate_size": 32, "n_routed_experts": 8, "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0},
    "deepseek_v2": {**SIZES, **MLA},
    "qwen3_moe": {**SIZES, **GQA, "head_dim": 24, "moe_intermediate_size": 32, "num_experts": 8},
    "mixtral": {**SIZES, **GQA, "intermediate_size": 32, "num_local_experts": 8},
    "gpt_oss": {
        **SIZES, **GQA, "intermediate_size": 32, "num_local_experts": 8, "head_dim": 24, "num_hidden_layers": 4,
        "sliding_window": 16},
}  # fmt: skip


class KimiK2Config(DeepseekV3Config):
    """`transformers` has no such type: the checkpoint's own (remote) code is DeepSeek-V3's under this name."""

    model_type = "kimi_k2"


class KimiK2ForCausalLM(DeepseekV3ForCausalLM):
    config_class = KimiK2Config


AutoConfig.register("kimi_k2", KimiK2Config)
AutoModelForCausalLM.register(KimiK2Config, KimiK2ForCausalLM)
register_checkpoint_conversion_mapping("kimi_k2", get_checkpoint_conversion_mapping("deepseek_v3"))


def random_model(model_type: str, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A `transformers` model in FP32 with random weights, computed by its plainest code path.

    config: fields that differ from the tiny `DEFAULTS` of the architecture.
    """
    settings = AutoConfig.for_model(model_type, **{**DEFAULTS[model_type], **config})
    model = AutoModelForCausalLM.from_config(
        settings, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    randomise(model, settings, seed)
    return model.eval()


def random_drafts(model: PreTrainedModel, count: int, seed: int = 1) -> MtpModel:
    """`count` random multi-token-prediction layers for a model, sharing its embedding and head."""
    drafts = MtpModel(model, count)
    randomise(drafts.layers, model.config, seed)
    return drafts.eval()


@torch.no_grad()
def randomise(module: nn.Module, config: PreTrainedConfig, seed: int) -> None:
    """Weights at which every part matters: activations of order 1, attention and routing neither flat nor one-hot.

    Norm weights differ from 1 and biases from 0, or an engine that ignores them would pass. Projections into the
    residual are divided by the root of their number, as models are initialised for training (GPT-2's rule): together
    they weigh as much as the embedding. Without that, layers magnify the rounding of the layers before. For the same
    reason the experts' own are divided by the routed scaling factor, which training would compensate too. With tied
    embeddings the final norm is negative, or each token would be answered with itself.
    """
    generator = torch.Generator().manual_seed(seed)
    into_residual, gates = ("o_proj.weight", "down_proj.weight", "experts.down_proj"), ("gate.weight", "router.weight")
    transposed = getattr(config, "model_type", "") == "gpt_oss"  # its experts are [E, inputs, outputs]
    depth = sum(name.endswith("o_proj.weight") for name, _ in module.named_parameters())
    factor = getattr(config, "routed_scaling_factor", 1.0)
    for name, weight in [*module.named_parameters(), *module.named_buffers()]:
        if "rotary" in name or "inv_freq" in name:
            continue
        noise = torch.randn(weight.shape, generator=generator)
        if "embed_tokens" in name:
            value = noise
        elif name.endswith("bias"):
            value = 0.1 * noise
        elif name.endswith("sinks"):
            value = 1 + noise
        elif weight.ndim > 1:
            gain = (2 * depth) ** -0.5 if name.endswith(into_residual) else 2.0 if name.endswith(gates) else 1.0
            gain = gain / factor if name.endswith("experts.down_proj") else gain
            value = gain * noise * weight.shape[-2 if transposed and weight.ndim == 3 else -1] ** -0.5
        else:
            sign = -1 if name == "model.norm.weight" and config.tie_word_embeddings else 1
            value = sign * (1 + 0.2 * noise)
        weight.copy_(value if name.endswith(FP32_NAMES) else value.bfloat16())


def save(
    model: PreTrainedModel, path: Path, *, dtype: torch.dtype = torch.float32, drafts: MtpModel | None = None,
    old: Mapping[str, Any] | None = None, shard: str = "1GB",
) -> Path:  # fmt: skip
    """Writes config.json and safetensors as released checkpoints have them.

    drafts: saved behind the last layer, with the copies of embedding and head that releases carry.
    old: where given, config.json is spelled as before transformers 5, with these fields added.
    """
    model.save_pretrained(path, max_shard_size=shard)
    for file in sorted(path.glob("*.safetensors")):
        tensors = {k: v if k.endswith(FP32_NAMES) else v.to(dtype) for k, v in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    if drafts is not None:
        add_drafts(model, drafts, path, dtype)
    config = json.loads((path / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    if old is not None:
        config = old_spelling(config) | dict(old)
    (path / "config.json").write_text(json.dumps(config, indent=1))
    return path


def add_drafts(model: PreTrainedModel, drafts: MtpModel, path: Path, dtype: torch.dtype) -> None:
    """One more shard with the draft layers under the names of released checkpoints, experts one by one."""
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(drafts.layers):
        name = f"model.layers.{model.config.num_hidden_layers + i}"
        for key, value in layer.state_dict().items():
            key = key.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
            if key.endswith("experts.gate_up_proj"):
                for e, expert in enumerate(value):
                    gate, up = expert.chunk(2)
                    tensors[f"{name}.mlp.experts.{e}.gate_proj.weight"] = gate
                    tensors[f"{name}.mlp.experts.{e}.up_proj.weight"] = up
            elif key.endswith("experts.down_proj"):
                tensors |= {f"{name}.mlp.experts.{e}.down_proj.weight": expert for e, expert in enumerate(value)}
            else:
                tensors[f"{name}.{key}"] = value
        main = model.state_dict()
        tensors[f"{name}.embed_tokens.weight"] = main["model.embed_tokens.weight"]
        tensors[f"{name}.shared_head.head.weight"] = main["lm_head.weight"]
    stored = {k: v if k.endswith(FP32_NAMES) else v.to(dtype) for k, v in tensors.items()}
    save_file({k: v.detach().clone() for k, v in stored.items()}, path / "drafts.safetensors", {"format": "pt"})
    write_index(path)


def write_index(path: Path) -> None:
    """Makes the directory's safetensors files, whatever they are called, the shards of one index."""
    single = path / "model.safetensors"
    if single.exists():
        single.rename(path / "model-first.safetensors")
    files = sorted(path.glob("*.safetensors"))
    weight_map = {name: file.name for file in files for name in load_file(file)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def old_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of transformers 4: rope_theta and rope_scaling (`type`), torch_dtype, num_experts."""
    config = dict(config)
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.46.3"
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts")
    return config
