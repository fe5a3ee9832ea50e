"""A GGUF file of architecture `llama` as a dense checkpoint: names, row order, config.json, tokenizer files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moesaic.errors import CheckpointError, UnsupportedError
from moesaic.formats.gguf_file import GGUFFile, GGUFTensor
from moesaic.models.fields import Fields
from moesaic.text.gguf_tokenizer import tokenizer_files

BLOCK = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class GGUFSource:
    """A GGUF file of architecture `llama`, its names and the order of its rows turned back into Hugging Face's.

    llama.cpp rotates neighbouring pairs of a head's values, Hugging Face the two halves of a head, so the converter to
    GGUF interleaves the rows of each query and key head: row (half, i) went to (i, half). `read` reverses that.
    """

    def __init__(self, path: Path) -> None:
        self.where, self.file = str(path), GGUFFile(path)
        try:
            self.fields = Fields(self.file.metadata, self.where)
            self.config = gguf_config(self.fields, self.file.tensors)
            self.side_files = tokenizer_files(self.file.metadata, self.where)
            self.names = {hugging_face_name(name, self.where): name for name in self.file.tensors}
        except BaseException:
            self.close()
            raise

    def entries(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {ours: (self.file.dtype(name), self.file.tensors[name].shape) for ours, name in self.names.items()}

    def read(self, name: str) -> torch.Tensor:
        tensor = self.file.read(self.names[name])
        heads = {"q": "num_attention_heads", "k": "num_key_value_heads"}
        for part, count in heads.items():
            if name.endswith(f".self_attn.{part}_proj.weight"):
                return by_halves(tensor, self.config[count])
        return tensor

    def write_side_files(self, directory: Path) -> None:
        ids = {name: self.config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        files = {**self.side_files, "generation_config.json": {k: v for k, v in ids.items() if v is not None}}
        for name, value in files.items():
            (directory / name).write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")

    def close(self) -> None:
        self.file.close()


def by_halves(weight_OI: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from (i, half) order back to (half, i). O output rows, I inputs."""
    rows, inputs = weight_OI.shape
    return weight_OI.view(heads, rows // heads // 2, 2, inputs).transpose(1, 2).reshape(rows, inputs)


def hugging_face_name(name: str, where: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`. Raises UnsupportedError for what has none."""
    stem = name.removesuffix(".weight")
    parts = stem.split(".", 2)
    if stem in WHOLE and name.endswith(".weight"):
        return f"{WHOLE[stem]}.weight"
    if len(parts) == 3 and parts[0] == "blk" and parts[1].isdecimal() and parts[2] in BLOCK and name != stem:
        return f"model.layers.{int(parts[1])}.{BLOCK[parts[2]]}.weight"
    raise UnsupportedError(
        f"holds {name!r:.80}, which a dense llama without biases and rope factors does not have", where=where,
        remedy="Use another model.",
    )  # fmt: skip


def gguf_config(fields: Fields, tensors: Mapping[str, GGUFTensor]) -> dict[str, Any]:
    """config.json of the model. Raises UnsupportedError for what plain Llama is not."""
    if "token_embd.weight" not in tensors:
        raise CheckpointError("lacks the tensor token_embd.weight", where=fields.file, remedy="Download it again.")
    if (kind := fields.text("general.architecture")) != "llama":
        raise UnsupportedError(f"architecture {kind!r:.60} cannot be upcycled", where=fields.file, remedy="Use llama.")
    hidden, heads = fields.integer("llama.embedding_length"), fields.integer("llama.attention.head_count")
    if hidden % heads:
        raise fields.bad("llama.attention.head_count", f"({heads}) must divide the embedding length ({hidden})")
    size = fields.integer("llama.attention.key_length", hidden // heads)
    scaling = fields.text("llama.rope.scaling.type", "none")
    odd = {
        "llama.expert_count": fields.integer("llama.expert_count", 0, least=0) > 0,
        "llama.rope.dimension_count": fields.integer("llama.rope.dimension_count", size) != size,
        "llama.attention.value_length": fields.integer("llama.attention.value_length", size) != size,
        "llama.rope.scaling.type": scaling not in ("none", "linear"),
        "llama.attention.scale": fields.has("llama.attention.scale"),
    }
    for name, wrong in odd.items():
        if wrong:
            raise UnsupportedError(
                f"{name} = {fields.values[name]!r:.60} cannot be expressed in a Mixtral", where=fields.file,
                remedy="Use a plain llama model.",
            )  # fmt: skip
    rope: dict[str, Any] = {"rope_theta": fields.number("llama.rope.freq_base", 10000.0)}
    if scaling == "linear":
        rope["rope_scaling"] = {"rope_type": "linear", "factor": fields.number("llama.rope.scaling.factor")}
    return {
        "model_type": "llama", "hidden_size": hidden, "num_attention_heads": heads, "head_dim": size,
        "num_key_value_heads": fields.integer("llama.attention.head_count_kv", heads),
        "intermediate_size": fields.integer("llama.feed_forward_length"),
        "num_hidden_layers": fields.integer("llama.block_count"),
        "vocab_size": tensors["token_embd.weight"].shape[0], "tie_word_embeddings": "output.weight" not in tensors,
        "max_position_embeddings": fields.integer("llama.context_length"), **rope,
        "rms_norm_eps": fields.number("llama.attention.layer_norm_rms_epsilon"), "hidden_act": "silu",
        "bos_token_id": fields.values.get("tokenizer.ggml.bos_token_id"), "eos_token_id": ends(fields),
        "pad_token_id": fields.values.get("tokenizer.ggml.padding_token_id"),
    }  # fmt: skip


def ends(fields: Fields) -> int | list[int] | None:
    """The end of the text and, where it is another token, the end of a turn."""
    ids = [fields.values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    found = list(dict.fromkeys(i for i in ids if isinstance(i, int)))
    return found[0] if len(found) == 1 else found or None
