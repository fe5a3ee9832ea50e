"""Writes a `transformers` Llama as llama.cpp's converter would: names, row order, tokenizer metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants
from transformers import LlamaForCausalLM

from tests.cli_support import TEMPLATE
from tests.text_support import tokenizer_json

GGUF_PARTS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
GGUF_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def gguf_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """The row order of llama.cpp, by its definition: row (head, half, i) goes to (head, i, half)."""
    size = weight.shape[0] // heads
    order = [h * size + half * (size // 2) + i for h in range(heads) for i in range(size // 2) for half in range(2)]
    return weight[order]


def write_gguf(path: Path, dense: LlamaForCausalLM, **changes: Any) -> Path:
    """A dense model as llama.cpp stores it: matrices in F32 or Q8_0. changes: to metadata; None removes."""
    config = dense.config
    tokenizer = json.loads(tokenizer_json("byte_level"))
    vocab = {**tokenizer["model"]["vocab"], **{t["content"]: t["id"] for t in tokenizer["added_tokens"]}}
    special = {t["id"]: t["special"] for t in tokenizer["added_tokens"]}
    quantised = changes.pop("quantised", False)
    fields: dict[str, Any] = {
        "llama.block_count": config.num_hidden_layers, "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size, "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps, "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": sorted(vocab, key=vocab.__getitem__),
        "tokenizer.ggml.token_type": [{None: 1, True: 3, False: 4}[special.get(i)] for i in range(len(vocab))],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": vocab["<s>"], "tokenizer.ggml.eos_token_id": vocab["</s>"],
        "tokenizer.ggml.add_bos_token": True, "tokenizer.chat_template": TEMPLATE,
    }  # fmt: skip
    writer = GGUFWriter(path, changes.pop("architecture", "llama"))
    for key, value in (fields | changes).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](key, value)
    for name, weight in gguf_tensors(dense).items():
        if quantised and weight.ndim == 2 and weight.shape[1] % 32 == 0:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quants.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(dense: LlamaForCausalLM) -> dict[str, np.ndarray]:
    found = {}
    for name, weight in dense.state_dict().items():
        array = weight.float().numpy()
        if "q_proj" in name:
            array = gguf_rows(array, dense.config.num_attention_heads)
        if "k_proj" in name:
            array = gguf_rows(array, dense.config.num_key_value_heads)
        if name.startswith("model.layers."):
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            found[f"blk.{layer}.{GGUF_PARTS[part]}.weight"] = array
        else:
            whole = {theirs: ours for ours, theirs in GGUF_WHOLE.items()}
            found[f"{whole[name.removesuffix('.weight')]}.weight"] = array
    return found
