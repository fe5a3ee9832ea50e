"""Why is MLA's kv_b_proj never quantised again? One model, two paths, and what each way of keeping it does to them.

    python benchmarks/kv_b_proj.py [--limit 28]

`tiny` (DeepSeek-V3's architecture) with all other projections in a scheme, along its own BF16 answers. kv_b_proj =
[W_k; W_v] per head is multiplied along the latent rank in the plain path (prefill), but W_k along the head in the
absorbed one (decoding), where a product of blocks needs scales along the head. Ways to keep it:

- `bf16`: as stored. Both paths multiply the same numbers: what is between them is rounding.
- `decoded`: stored in the scheme's format (blocks along the rank), decoded when loaded. The same holds.
- `quantised anew`: the plain path multiplies the stored codes; the absorbed one codes made of their values, with blocks
  along the head.
- `quantised anew, rows too`: what block-scaled products do: the rows of either path in the scheme's encoding as well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
from torch import Tensor

from benchmarks.machine import describe, save
from moesaic import LLM, SamplingParams
from moesaic.assets import embedded_model
from moesaic.commands.eval import TASK_TOKENS, of_families
from moesaic.contracts.scheme import SCHEMES, Scheme, WeightFormat
from moesaic.engine.forced import Text, distance, forced_logits, means
from moesaic.formats.base import QuantTensor
from moesaic.formats.encodings import encode
from moesaic.layers.mla import MLA
from moesaic.models.decoder import Decoder
from moesaic.tasks import FAMILIES

CASES = {"float32": ("mxfp8", "mxfp4a8", "nvfp4_dynamic"), "bfloat16": ("mxfp8",)}
WAYS = ("bf16", "decoded", "quantised anew", "quantised anew, rows too")
HEAD = (
    "| computed in | scheme | kv_b_proj | W_k that changes | by | KL between the paths | logits apart "
    "| KL from bf16, plain | absorbed |\n|---|---|---|---|---|---|---|---|---|"
)


def rounded(w: Tensor, form: WeightFormat) -> Tensor:
    """The values of a weight [N, K] in a format with blocks along K, in its own dtype."""
    return QuantTensor.of(w.float(), form).dequantize().to(w.dtype)


def along_head(w_HNR: Tensor, form: WeightFormat) -> Tensor:
    """W_k in a format as the absorbed product needs it: blocks along the head."""
    heads, head, rank = w_HNR.shape
    return rounded(w_HNR.transpose(1, 2).reshape(heads * rank, head), form).view(heads, rank, head).transpose(1, 2)


class Kept(MLA):
    """Attention whose absorbed path multiplies a W_k of its own, and whose kv_b_proj may meet encoded rows."""

    w_k_HNR: Tensor
    coded: Scheme | None

    def halves(self) -> tuple[Tensor, Tensor]:
        return self.w_k_HNR, super().halves()[1]

    def per_head(self, x_THK: Tensor, w_HNK: Tensor) -> Tensor:
        return super().per_head(self.rows(x_THK), w_HNK)

    def plain(self, q_nope_THN: Tensor, q_rope_THP: Tensor, context_LW: Tensor) -> Tensor:
        latent_LR, key_LP = context_LW.split((self.spec.kv_rank, self.spec.rope_dim), 1)
        return super().plain(q_nope_THN, q_rope_THP, torch.cat([self.rows(latent_LR), key_LP], 1))

    def rows(self, x: Tensor) -> Tensor:
        return x if self.coded is None else encode(x, self.coded.activation).decode().to(x.dtype)


class Paths:
    """The attention layers of a model, whose kv_b_proj can be kept in any of the WAYS."""

    def __init__(self, model: Decoder, scheme: Scheme) -> None:
        self.model, self.scheme = model, scheme
        self.layers: list[Kept] = []
        for block in model.blocks:
            layer: Any = block.attention
            layer.__class__ = Kept  # the same layer, with its weights
            layer.fused = False  # each path as it is written, whatever the length
            self.layers.append(layer)
        self.stored = [layer.kv_b.weight_ND.clone() for layer in self.layers]

    def keep(self, way: str) -> None:
        form = self.scheme.weight
        for layer, stored in zip(self.layers, self.stored, strict=True):
            layer.kv_b.weight_ND.copy_(stored if way == "bf16" else rounded(stored, form))
            w_k_HNR = MLA.halves(layer)[0]
            layer.w_k_HNR = along_head(w_k_HNR, form) if way.startswith("quantised anew") else w_k_HNR
            layer.coded = self.scheme if way.endswith("rows too") else None

    def logits(self, texts: Sequence[Text], absorbed: bool) -> list[Tensor]:
        for layer in self.layers:
            layer.one_path = absorbed
        return list(forced_logits(self.model, texts))

    def changed(self) -> tuple[float, float]:
        """(share of W_k's elements that differ between the paths, relative error in the Frobenius norm)."""
        pairs = [(layer.w_k_HNR.double(), MLA.halves(layer)[0].double()) for layer in self.layers]
        count = sum(int((a != b).sum()) for a, b in pairs) / sum(b.numel() for _, b in pairs)
        square = sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(b.square().sum()) for _, b in pairs)
        return count, square**0.5


def apart(first: Sequence[Tensor], second: Sequence[Tensor], texts: Sequence[Text]) -> dict[str, float]:
    return means([distance(a, b, text[1]) for a, b, text in zip(first, second, texts, strict=True)])


@dataclass(frozen=True)
class Truth:
    """What the BF16 model answers, and its logits along that."""

    dtype: str
    texts: list[Text]
    logits: list[Tensor]

    @staticmethod
    def of(dtype: str, limit: int) -> Truth:
        llm = LLM(str(embedded_model()), dtype=dtype, progress=False)
        asked = of_families(llm, FAMILIES, limit)
        results = llm.generate([each.prompt for each in asked], SamplingParams(temperature=0, max_tokens=TASK_TOKENS))
        texts: list[Text] = [(each.prompt, result.tokens) for each, result in zip(asked, results, strict=True)]
        return Truth(dtype, texts, list(forced_logits(llm.launched.built.model, texts)))


def measure(truth: Truth, name: str) -> list[dict[str, Any]]:
    """One row per way."""
    llm = LLM(str(embedded_model()), dtype=truth.dtype, quantization=name, progress=False)
    paths, texts = Paths(llm.launched.built.model, SCHEMES[name]), truth.texts
    rows = []
    for way in WAYS:
        paths.keep(way)
        count, error = paths.changed()
        plain, absorbed = paths.logits(texts, absorbed=False), paths.logits(texts, absorbed=True)
        rows.append({
            "way": way, "scheme": name, "dtype": truth.dtype, "texts": len(texts),
            "tokens": sum(map(len, truth.logits)),
            "w_k_elements": count, "w_k_error": error, "between": apart(plain, absorbed, texts),
            "plain": apart(truth.logits, plain, texts), "absorbed": apart(truth.logits, absorbed, texts),
        })  # fmt: skip
        print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    between, plain, absorbed = row["between"], row["plain"], row["absorbed"]
    return (
        f"| {row['dtype']} | {row['scheme']} | {row['way']} | {100 * row['w_k_elements']:.2g}% "
        f"| {row['w_k_error']:.1e} | {between['kl']:.1e} | {between['logits']:.1e} | {plain['kl']:.1e} "
        f"| {absorbed['kl']:.1e} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=28, help="items per family")
    limit = parser.parse_args().limit
    print(HEAD)
    rows = []
    for dtype, names in CASES.items():
        truth = Truth.of(dtype, limit)
        rows += [row for name in names for row in measure(truth, name)]
    save("kv-b-proj", {"what": "kv_b_proj", "model": "tiny", **describe("torch"), "rows": rows})


if __name__ == "__main__":
    main()
