"""A tiny Mixtral with a tokenizer and a chat template, and ways to call the command line, here or in a process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from moesaic.cli import main
from tests.text_support import tokenizer_json, write_checkpoint

SRC = Path(__file__).resolve().parents[1] / "src"
HIDDEN, HEADS, KV, SIZE, WIDTH, EXPERTS, LAYERS, LENGTH = 32, 4, 2, 8, 48, 4, 2, 256
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|user|>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant: {% endif %}"
)
VOCAB = Tokenizer.from_str(tokenizer_json("byte_level")).get_vocab_size()


def config(**changes: Any) -> dict[str, Any]:
    fields = {
        "model_type": "mixtral", "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": KV,
        "head_dim": SIZE, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS, "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2, "vocab_size": VOCAB, "max_position_embeddings": LENGTH, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "torch_dtype": "float32", "sliding_window": None, "tie_word_embeddings": False,
    }  # fmt: skip
    return fields | changes


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) > 1 else 1)

    found = {"model.embed_tokens.weight": random(VOCAB, HIDDEN) * 4, "lm_head.weight": random(VOCAB, HIDDEN) * 3}
    found["model.norm.weight"] = torch.ones(HIDDEN)
    for i in range(LAYERS):
        name = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{name}.{norm}.weight"] = torch.ones(HIDDEN)
        for part, rows in (("q", HEADS * SIZE), ("k", KV * SIZE), ("v", KV * SIZE), ("o", HIDDEN)):
            found[f"{name}.self_attn.{part}_proj.weight"] = random(rows, HIDDEN)
        found[f"{name}.block_sparse_moe.gate.weight"] = random(EXPERTS, HIDDEN)
        for e in range(EXPERTS):
            for part, shape in (("w1", (WIDTH, HIDDEN)), ("w2", (HIDDEN, WIDTH)), ("w3", (WIDTH, HIDDEN))):
                found[f"{name}.block_sparse_moe.experts.{e}.{part}.weight"] = random(*shape)
    return found


def write_model(directory: Path, *, chat: bool = True, **changes: Any) -> Path:
    """A complete checkpoint. changes: to config.json."""
    write_checkpoint(directory, "byte_level", chat_template=TEMPLATE if chat else None)
    (directory / "config.json").write_text(json.dumps(config(**changes)))
    save_file(weights(), directory / "model.safetensors")
    return directory


@dataclass
class Done:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """Its one line of stderr, which must be an error message."""
        assert self.err.startswith("moesaic: error: "), self
        assert self.err.count("\n") == 1, self
        assert self.err.endswith("\n"), self
        return self.err.strip()


def call(*argv: str | Path, stdin: bytes = b"") -> Done:
    """The command in this process. An exception that it should have turned into an exit code comes out."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    given = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(sys, "stdin", given):
        code = main([str(arg) for arg in argv])
    return Done(code, *(stream.buffer.getvalue().decode() for stream in (out, err)))  # type: ignore[attr-defined]


def command(*argv: str | Path) -> list[str]:
    return [sys.executable, "-m", "moesaic", *map(str, argv)]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error", **more}


def spawn(*argv: str | Path, stdin: bytes = b"", timeout: float = 120) -> Done:
    """The command in a process of its own."""
    done = subprocess.run(
        command(*argv), input=stdin, capture_output=True, timeout=timeout, env=environment(), check=False
    )
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())
