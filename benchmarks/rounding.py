"""Which choice of rounding, and which layers, make the error of a number format?

    python benchmarks/rounding.py [--limit 28]

`tiny` in FP32 with the *values* that its weights would have in a format, so that all else is equal; the distance from
BF16 is taken along BF16's own answers. First the formats and, where there is a choice, the rules for their scales (see
`formats/mx.py`); then one format on some of the projections only; last, whole MXFP8 schemes whose rows of activations
take their exponents by each rule.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from moesaic.contracts.scheme import WeightFormat
from moesaic.engine.forced import Distance, Text, distance, forced_logits, means
from moesaic.formats import mx
from moesaic.formats.base import QuantTensor, Rule
from moesaic.formats.encodings import mxfp8 as mxfp8_rows
from moesaic.layers.linear import Stored
from moesaic.models.decoder import Decoder
from moesaic.tasks import FAMILIES

RULES: tuple[Rule, ...] = ("ceil", "floor", "even")
FORMATS: dict[str, tuple[WeightFormat, Rule]] = {
    **{f"mxfp8, {rule}": (WeightFormat("mxfp8"), rule) for rule in RULES},
    "fp8_block": (WeightFormat("fp8_block"), "ceil"),
    "fp8_tensor": (WeightFormat("fp8_tensor"), "ceil"),
    "fp8_channel": (WeightFormat("fp8_channel"), "ceil"),
    **{f"mxfp4, {rule}": (WeightFormat("mxfp4"), rule) for rule in RULES},
    "nvfp4": (WeightFormat("nvfp4"), "ceil"),
    "int4, groups of 128": (WeightFormat("int4", 128, "bfloat16"), "ceil"),
    "int4, groups of 32": (WeightFormat("int4", 32, "bfloat16"), "ceil"),
    "int4, groups of 128, zero points": (WeightFormat("int4", 128, "bfloat16", zero_points=True), "ceil"),
}
PLACES: dict[str, Callable[[str], bool]] = {
    "routed experts": lambda name: ".experts." in name,
    "shared experts and dense layers": lambda name: ".mlp." in name and ".experts." not in name,
    "attention but kv_b_proj": lambda name: ".self_attn." in name and "kv_b_proj" not in name,
    "kv_b_proj": lambda name: "kv_b_proj" in name,
    "embedding and head": lambda name: name in ("embed", "head"),
}


def usual(name: str) -> bool:
    """What `--quantization` quantises, draft layers apart (they have no part in these logits)."""
    return (".self_attn." in name and "kv_b_proj" not in name) or ".mlp." in name


class Weights:
    """The plain weights of a model by name, as views and as they were."""

    def __init__(self, model: Decoder) -> None:
        stored = [item for block in model.blocks for item in block.sources() if isinstance(item, Stored)]
        self.views = {item.name: item.weight.plain for item in stored}
        self.views |= {"embed": model.embed.weight_VD, "head": (model.head or model.embed).weight_VD}
        self.sound = {name: view.clone() for name, view in self.views.items()}

    def round(self, form: WeightFormat, rule: Rule, place: Callable[[str], bool]) -> float:
        """The values of a format in some places, the sound ones elsewhere. Returns the relative error of those."""
        square = total = 0.0
        for name, view in self.views.items():
            view.copy_(self.sound[name])
            if place(name):
                view.copy_(QuantTensor.of(self.sound[name], form, rule=rule).dequantize())
                square += float((view - self.sound[name]).double().square().sum())
                total += float(self.sound[name].double().square().sum())
        return float((square / total) ** 0.5)


@contextmanager
def rows_by(rule: Rule) -> Iterator[None]:
    """Rows encoded in MXFP8 take their exponents by a rule."""

    def encode(x: Tensor, scale: None) -> Mapping[str, Tensor]:
        data, found = mx.quantize_e4m3(x.float(), rule)
        return {"data": data, "scale": found}

    usual_encode = mxfp8_rows.encode
    setattr(mxfp8_rows, "encode", encode)  # noqa: B010  # a module's function, replaced on purpose
    try:
        yield
    finally:
        setattr(mxfp8_rows, "encode", usual_encode)  # noqa: B010


def measure(model: Decoder, texts: Sequence[Text], truth: Sequence[Tensor]) -> dict[str, Any]:
    """Distance per token, and how many answers would not be the same to the last token."""
    found, others = list[Distance](), 0
    for sound, logits, (_, answer) in zip(truth, forced_logits(model, texts), texts, strict=True):
        found.append(distance(sound, logits, answer))
        others += logits.argmax(-1).tolist() != list(answer)
    return {**means(found), "others": others}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=28, help="items per family")
    limit = parser.parse_args().limit
    path = str(embedded_model())
    llm = LLM(path, dtype="float32", progress=False)
    asked = of_families(llm, FAMILIES, limit)
    results = llm.generate([each.prompt for each in asked], SamplingParams(temperature=0, max_tokens=TASK_TOKENS))
    texts: list[Text] = [(each.prompt, result.tokens) for each, result in zip(asked, results, strict=True)]
    model = llm.launched.built.model
    truth = list(forced_logits(model, texts))
    rows: list[dict[str, Any]] = []
    print("| part | what | weights apart | logits apart | KL | log-prob | other answers |\n"
          "|---|---|---|---|---|---|---|")  # fmt: skip

    def add(part: str, what: str, error: float | None, on: Decoder) -> None:
        rows.append({"part": part, "what": what, "error": error, **measure(on, texts, truth)})
        row, shown = rows[-1], "" if error is None else f"{error:.2%}"
        print(f"| {part} | {what} | {shown} | {row['logits']:.2%} | {row['kl']:.1e} | {row['logprob']:.1e} | "
              f"{row['others']} |", flush=True)  # fmt: skip

    weights = Weights(model)
    for name, (form, rule) in FORMATS.items():
        add("weights", name, weights.round(form, rule, usual), model)
    for form_name in ("mxfp4", "nvfp4"):
        for name, place in PLACES.items():
            add(f"{form_name} only in", name, weights.round(WeightFormat(form_name), "ceil", place), model)
    for rule in RULES:
        with rows_by(rule):
            other = LLM(path, dtype="float32", quantization="mxfp8", progress=False).launched.built.model
            add("mxfp8 rows", rule, None, other)
    facts = {"what": "rounding", "model": "tiny", "dtype": "float32", "texts": len(texts)}
    save("rounding", {**facts, "tokens": sum(map(len, truth)), **describe("torch"), "rows": rows})


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
