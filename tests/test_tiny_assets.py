"""The shipped model: sizes, shapes, names, tokenizer, template, and that `transformers` loads and runs it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from moesaic.tasks import FAMILIES, grade, items

TINY = Path(__file__).resolve().parents[1] / "src/moesaic/assets/tiny"
MIB = 2**20


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return json.loads((TINY / "config.json").read_text())


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(TINY.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a mapping)
                assert name not in found
                found[name] = shard.get_tensor(name)
    return found


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(TINY)


def test_sizes(tensors: dict[str, torch.Tensor]) -> None:
    files = list(TINY.glob("*.safetensors"))
    assert all(file.stat().st_size <= 12 * MIB for file in files)
    assert sum(file.stat().st_size for file in files) <= 24 * MIB
    assert sum(t.numel() for t in tensors.values()) * 2 <= 24 * MIB


def test_index_names_every_tensor(tensors: dict[str, torch.Tensor]) -> None:
    index = json.loads((TINY / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert {f.name for f in TINY.glob("*.safetensors")} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    for name, file in index["weight_map"].items():
        with safe_open(TINY / file, framework="pt") as shard:
            assert name in shard.keys()  # noqa: SIM118
        break


def test_architecture(config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    widths = ["hidden_size", "q_lora_rank", "kv_lora_rank", "intermediate_size", "moe_intermediate_size", "vocab_size"]
    assert {key: config[key] % 128 for key in widths} == dict.fromkeys(widths, 0)
    assert heads * (config["qk_nope_head_dim"] + config["qk_rope_head_dim"]) % 128 == 0
    assert heads * config["v_head_dim"] % 128 == 0
    assert config["model_type"] == "deepseek_v3"
    assert config["n_routed_experts"] >= 16
    assert config["scoring_func"] == "sigmoid"
    assert config["topk_method"] == "noaux_tc"
    assert 1 <= config["topk_group"] < config["n_group"]
    assert config["norm_topk_prob"] is True
    assert config["routed_scaling_factor"] != 1
    assert config["n_shared_experts"] == config["first_k_dense_replace"] == config["num_nextn_predict_layers"] == 1
    assert config["max_position_embeddings"] >= 2048


def test_tensors_are_bf16_finite_and_biases_fp32(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        bias = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if bias else torch.bfloat16), name
        assert tensor.isfinite().all(), name
        assert tensor.float().abs().max() > 0, name
        assert not bias or tensor.unique().numel() > 1, f"{name} was never updated"


def test_mtp_layer_is_stored_as_in_a_released_checkpoint(
    config: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    prefix = f"model.layers.{config['num_hidden_layers']}."
    names = {n.removeprefix(prefix) for n in tensors if n.startswith(prefix)}
    extras = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight", "shared_head.head.weight"}
    block = {n.removeprefix("model.layers.1.") for n in tensors if n.startswith("model.layers.1.")}
    assert names == block | extras | {"embed_tokens.weight"}
    assert torch.equal(tensors[prefix + "embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors[prefix + "shared_head.head.weight"], tensors["lm_head.weight"])


def test_tokenizer_round_trips_any_text(config: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    rng = random.Random(0)
    texts = [
        "",
        " ",
        "\n\n  x\t",
        "naïve café",
        "数学 と 日本語",
        "👩‍👩‍👧‍👦🏳️‍🌈",
        "a\u0301\u200d\ufeff",
        "12,345.678",
        "\x00\x7f",
    ]
    for _ in range(300):
        points = [rng.choice((rng.randrange(0x20, 0x7F), rng.randrange(0x80, 0xD800), rng.randrange(0xE000, 0x110000)))
                  for _ in range(rng.randrange(40))]  # fmt: skip
        texts.append("".join(map(chr, points)))
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_every_digit_is_one_token() -> None:
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    tokens = tokenizer.encode("a 2048 is 9.11 and12").tokens
    assert [t for t in tokens if any(c.isdigit() for c in t)] == list("204891112")


def test_special_tokens(tokenizer: Any, config: dict[str, Any]) -> None:
    generation = json.loads((TINY / "generation_config.json").read_text())
    for name in ("bos", "eos", "pad"):
        assert getattr(tokenizer, f"{name}_token_id") == config[f"{name}_token_id"] == generation[f"{name}_token_id"]
    assert tokenizer.encode("hi") == Tokenizer.from_file(str(TINY / "tokenizer.json")).encode("hi").ids


def test_chat_template(tokenizer: Any) -> None:
    talk = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    reply = [{"role": "assistant", "content": "A"}, {"role": "user", "content": "V"}]
    render = tokenizer.apply_chat_template
    text = render(talk, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|system|>S<|user|>U<|assistant|>"
    text = render(talk + reply, tokenize=False, add_generation_prompt=False)
    assert text == "<|bos|><|system|>S<|user|>U<|assistant|>A<|end|><|user|>V"
    with pytest.raises(Exception, match="unknown role"):
        render([{"role": "tool", "content": "x"}], tokenize=False)


def test_card_and_licence() -> None:
    card = (TINY / "README.md").read_text()
    assert "<!-- eval:begin -->" in card
    assert "<!-- eval:end -->" in card
    assert all(f"| {family} |" in card for family in FAMILIES)
    assert "Apache License" in (TINY / "LICENSE").read_text()


def test_transformers_loads_it_and_solves_problems(tokenizer: Any, config: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, output_loading_info=True)
    assert type(model).__name__ == "DeepseekV3ForCausalLM"
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    prefix = f"model.layers.{config['num_hidden_layers']}."
    assert all(key.startswith(prefix) for key in info["unexpected_keys"])
    right = 0
    for family in ("chain", "units", "clock", "story"):
        (item,) = items(family, "test", 1, seed=11)
        chat = [{"role": "user", "content": item.prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=120, do_sample=False)
        text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += grade(item, text)
    assert right >= 3
