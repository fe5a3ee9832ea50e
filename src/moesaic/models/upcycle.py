"""Upcycling (arXiv 2212.05055): a dense Llama becomes a Mixtral whose experts are copies of its feed-forward layers.

Mixtral renormalises the weights of the chosen experts to a sum of one, so whatever the router says, identical experts
give the dense model's output. Training then makes them differ; noise gives it something to start from.
One source tensor is in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic.errors import CheckpointError, MoesaicError, OptionError, UnsupportedError
from moesaic.formats.safetensors_write import Entry, write_checkpoint
from moesaic.models import mixtral
from moesaic.models.dense import DenseSource, check_entries
from moesaic.models.fields import Fields, rope_fields

ROUTER_STD = 0.02
EXPERT_PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@dataclass(frozen=True)
class Recipe:
    """experts, top_k: of the result.  noise: standard deviation of what is added to each expert's weights, as a part
    of that matrix's own.  seed: of noise and router.  dtype: of the result; `auto` keeps each tensor's own (quantised
    values become float32, which holds them exactly).  shard_bytes: most bytes of one file.
    """

    experts: int
    top_k: int
    noise: float = 0.0
    seed: int = 0
    dtype: str = "auto"
    shard_bytes: int = 4 << 30

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise OptionError(
                f"must be in [1, {self.experts}], the number of experts, not {self.top_k}", where="--top-k",
                remedy="2 is usual.",
            )  # fmt: skip
        if not 0 <= self.noise <= 1:
            raise OptionError(f"must be in [0, 1], not {self.noise}", where="--noise", remedy="0.01 is usual.")
        if self.shard_bytes < 1:
            raise OptionError("must be at least one byte", where="--shard-size", remedy="4GiB is usual.")


@dataclass(frozen=True)
class Planned:
    """One tensor of the result: what it is, and the source tensor that it is a copy of (None: a router)."""

    entry: Entry
    source: str | None
    expert: bool = False


@dataclass(frozen=True)
class Plan:
    """What an upcycling will write. config: the result's config.json."""

    config: Mapping[str, Any]
    tensors: tuple[Planned, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.entry.nbytes for tensor in self.tensors)

    @property
    def parameters(self) -> int:
        return sum(tensor.entry.nbytes // tensor.entry.dtype.itemsize for tensor in self.tensors)


def plan_upcycle(source: DenseSource, recipe: Recipe) -> Plan:
    """Checks the source and lists what will be written; reads no weights.

    Raises UnsupportedError for what a Mixtral cannot express, CheckpointError for a source that is not consistent.
    """
    config = mixtral_config(source, recipe)
    shapes = dense_shapes(Fields(config))
    check_entries(source, shapes)
    stored = source.entries()

    def entry(name: str, origin: str) -> Entry:
        dtype = stored[origin][0] if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
        return Entry(name, dtype, shapes[origin])

    tensors: list[Planned] = []
    for origin in shapes:
        head, _, tail = origin.partition(".mlp.")
        if not tail:
            tensors.append(Planned(entry(origin, origin), origin))
            continue
        block, part = f"{head}.block_sparse_moe", EXPERT_PARTS[tail.removesuffix(".weight")]
        if part == "w1":
            gate = Entry(f"{block}.gate.weight", entry("", origin).dtype, (recipe.experts, config["hidden_size"]))
            tensors.append(Planned(gate, None))
        names = (f"{block}.experts.{e}.{part}.weight" for e in range(recipe.experts))
        tensors += [Planned(entry(name, origin), origin, expert=True) for name in names]
    widest = max((t.entry.dtype for t in tensors if len(t.entry.shape) == 2), key=lambda dtype: dtype.itemsize)
    return Plan({**config, "torch_dtype": str(widest).removeprefix("torch.")}, tuple(tensors))


def write_upcycled(source: DenseSource, recipe: Recipe, plan: Plan, directory: Path,
                   advance: Callable[[int], None]) -> int:  # fmt: skip
    """Writes the checkpoint into an existing directory; returns the number of weight files.

    config.json comes last: a directory in which writing was interrupted is not taken for a checkpoint.
    advance: told the bytes of each tensor made. Raises CheckpointError for a weight that is not finite.
    """
    entries = [tensor.entry for tensor in plan.tensors]
    files = write_checkpoint(directory, entries, make_tensors(source, recipe, plan, advance), recipe.shard_bytes)
    source.write_side_files(directory)
    (directory / "config.json").write_text(json.dumps(plan.config, indent=2) + "\n", encoding="utf-8")
    return files


def make_tensors(source: DenseSource, recipe: Recipe, plan: Plan,
                 advance: Callable[[int], None]) -> Iterator[torch.Tensor]:  # fmt: skip
    """The plan's tensors in its order. Copies of one source tensor follow one another, so it is read once."""
    name, dense = "", torch.empty(0)
    for tensor in plan.tensors:
        if tensor.source is None:
            router = torch.randn(tensor.entry.shape, generator=generator(recipe.seed, tensor.entry.name)) * ROUTER_STD
            yield router.to(tensor.entry.dtype)
        else:
            if tensor.source != name:
                name, dense = tensor.source, read_finite(source, tensor.source, tensor.entry.dtype)
            yield perturbed(dense, recipe, tensor.entry.name) if tensor.expert and recipe.noise else dense
        advance(tensor.entry.nbytes)


def read_finite(source: DenseSource, name: str, dtype: torch.dtype) -> torch.Tensor:
    weight = source.read(name).to(dtype)
    low, high = torch.aminmax(weight)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise CheckpointError(
            f"{name} holds a value that is NaN or infinite in {str(dtype).removeprefix('torch.')}", where=source.where,
            remedy="Download the checkpoint again, or choose another --dtype.",
        )  # fmt: skip
    return weight


def perturbed(weight: torch.Tensor, recipe: Recipe, name: str) -> torch.Tensor:
    """The weight plus noise that depends on seed and name only, computed in FP32."""
    noise = torch.randn(weight.shape, generator=generator(recipe.seed, name))
    return (weight.float() + noise * (recipe.noise * weight.float().std())).to(weight.dtype)


def generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def mixtral_config(source: DenseSource, recipe: Recipe) -> dict[str, Any]:
    """config.json of the result. Llama's defaults are written out: Mixtral's own defaults are others."""
    fields = Fields(source.config, f"{source.where}: config.json")
    refuse_inexpressible(fields)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if hidden % heads and not fields.has("head_dim"):
        raise fields.bad("num_attention_heads", f"({heads}) must divide hidden_size ({hidden})")
    kept = {name: fields.values.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden, "intermediate_size": fields.integer("intermediate_size"),
        "num_hidden_layers": fields.integer("num_hidden_layers"), "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("num_key_value_heads", heads),
        "head_dim": fields.integer("head_dim", hidden // heads), "hidden_act": fields.text("hidden_act", "silu"),
        "max_position_embeddings": fields.integer("max_position_embeddings", 2048),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6), "sliding_window": None, "attention_dropout": 0.0,
        "tie_word_embeddings": fields.flag("tie_word_embeddings", False), **rope_settings(fields), **kept,
        "num_local_experts": recipe.experts, "num_experts_per_tok": recipe.top_k, "router_aux_loss_coef": 0.02,
        "output_router_logits": False, "router_jitter_noise": 0.0,
        "initializer_range": fields.number("initializer_range", 0.02), "use_cache": True,
    }  # fmt: skip
    try:
        mixtral.describe(config)  # refuses what our own Mixtral cannot run: a rope scaling, an activation
    except MoesaicError as error:
        raise type(error)(error.what, where=source.where, remedy=error.remedy) from None
    return config


def rope_settings(fields: Fields) -> dict[str, Any]:
    """The rope settings in the spelling that the source has."""
    theta = rope_fields(fields).number("rope_theta", 10000.0)
    if fields.has("rope_parameters"):
        return {"rope_theta": theta, "rope_parameters": {**fields.inner("rope_parameters").values, "rope_theta": theta}}
    return {"rope_theta": theta, "rope_scaling": fields.values.get("rope_scaling")}


def refuse_inexpressible(fields: Fields) -> None:
    """Raises UnsupportedError naming the field of a Llama that has no counterpart in a Mixtral."""
    odd = {
        "attention_bias": fields.flag("attention_bias", False),
        "mlp_bias": fields.flag("mlp_bias", False),
        "quantization_config": fields.has("quantization_config"),
        "partial_rotary_factor": fields.number("partial_rotary_factor", 1.0) != 1.0,
    }
    for name, wrong in odd.items():
        if wrong:
            raise UnsupportedError(
                f"{name} = {fields.values[name]!r:.60} cannot be expressed in a Mixtral", where=fields.file,
                remedy="Use a plain llama checkpoint in BF16, FP16 or FP32.",
            )  # fmt: skip


def dense_shapes(fields: Fields) -> dict[str, tuple[int, ...]]:
    """The tensors of a dense Llama with these sizes, layer by layer."""
    hidden, width, vocab = (fields.integer(name) for name in ("hidden_size", "intermediate_size", "vocab_size"))
    size = fields.integer("head_dim")
    q, kv = (fields.integer(name) * size for name in ("num_attention_heads", "num_key_value_heads"))
    layer = {
        "input_layernorm": (hidden,), "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, q), "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden), "mlp.down_proj": (hidden, width),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for index in range(fields.integer("num_hidden_layers")):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not fields.flag("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes
