"""`--load-format dummy`: an architecture with random weights, from its config.json alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic import LLM, SamplingParams
from moesaic.config import KV_FORMATS, LOAD_FORMATS, EngineConfig
from moesaic.contracts import scheme
from moesaic.contracts.scheme import SCHEMES
from moesaic.errors import CheckpointError, OptionError
from moesaic.formats.base import QuantTensor
from moesaic.formats.dummy import fill
from moesaic.layers.linear import Stored
from moesaic.text.byte_tokenizer import byte_tokenizer
from tests.cli_support import call

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 600, "intermediate_size": 256, "num_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "max_position_embeddings": 512, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16", "attention_bias": False,
}  # fmt: skip
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


def folder_of(path: Path, **changes: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG | changes))
    return path


@pytest.mark.parametrize("options", [{}, {"quantization": "mxfp8"}, {"kv": "fp8"}, {"deterministic": True}], ids=str)
def test_it_runs_from_a_config_alone(tmp_path: Path, options: dict[str, Any]) -> None:
    llm = LLM(str(folder_of(tmp_path)), load_format="dummy", progress=False, **options)
    results = llm.generate(["Hello", [5, 599, 0]], GREEDY)
    assert [len(result.tokens) for result in results] == [5, 5]
    assert results[0].prompt_tokens == list(b"Hello")
    assert all(0 <= token < 600 for result in results for token in result.tokens)


def test_weights_have_the_scheme_that_the_config_names(tmp_path: Path) -> None:
    llm = LLM(str(folder_of(tmp_path, quantization_config=FP8)), load_format="dummy", progress=False)
    held = {str(item.weight.form) for item in llm.launched.built.model.sources() if isinstance(item, Stored)}
    assert held == {"fp8_block"}
    assert all(torch.isfinite(item[1]).all() for item in llm.launched.built.model.sources() if isinstance(item, tuple))
    assert len(llm.generate([[1, 2, 3]], GREEDY)[0].tokens) == 5


@pytest.mark.parametrize("name", ["wna16", "wna16_g32", "mxfp4", "nvfp4", "mxfp8", "fp8", "bf16"])
def test_random_weights_lean_to_no_side(name: str) -> None:
    """A mean would be a part that all rows' products have in common: they would choose the same experts."""
    for count in ((), (3,)):
        w = fill(QuantTensor.empty(SCHEMES[name].weight, (384,), 1024, torch.empty(0, dtype=torch.bfloat16), count))
        values = torch.stack([each.dequantize().double() for each in ([w[i] for i in range(3)] if count else [w])])
        error = values.std() / values.numel() ** 0.5
        assert values.mean().abs() < 6 * error
        assert 0.5 < values.std() * 1024**0.5 < 2


def test_the_command_line(tmp_path: Path) -> None:
    done = call("generate", str(folder_of(tmp_path)), "--load-format", "dummy", "--prompt", "Hi", "--max-tokens", "3",
                "--ignore-eos")  # fmt: skip
    assert done.code == 0, done
    assert "2 prompt tokens, 3 new" in done.out


def test_without_weights_nothing_else_is_taken_for_them(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no safetensors file"):
        LLM(str(folder_of(tmp_path)), progress=False)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        LLM(str(tmp_path / ".."), load_format="dummy", progress=False)
    with pytest.raises(OptionError, match="random"):
        EngineConfig(load_format="random")


def test_a_token_per_byte() -> None:
    tokenizer = byte_tokenizer(1000)
    for text in ("plain", "née ∑ 😀\n\t", ""):
        ids = tokenizer.encode(text)
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode([72, 999, 105]) == "H 999i"
    assert byte_tokenizer(190).encode("aé") == [97, 169], "bytes that such a model has no token for are left out"


def test_formats_are_named_alike_everywhere() -> None:
    """config.py may import no contracts."""
    assert KV_FORMATS == scheme.KV_FORMATS
    assert LOAD_FORMATS == ("safetensors", "dummy")


def test_random_weights_are_made_where_they_are_held(tmp_path: Path) -> None:
    """Peak memory is that of the weights and one layer, in a process of its own."""
    folder = folder_of(tmp_path, hidden_size=1024, moe_intermediate_size=512, num_experts=16, num_hidden_layers=6)
    command = [sys.executable, "-m", "tests.quant_memory", "dummy", "fp8", str(folder)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["held"] > 140e6
    assert found["growth"] <= found["held"] + found["layer"] + 16e6, found
