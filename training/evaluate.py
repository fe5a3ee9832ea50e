"""Accuracy per family, router load and draft acceptance of an exported model, on held-out items.

    python -m training.evaluate --model src/moesaic/assets/tiny --count 1000 --out training/eval.json
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from training.data import ROOT
from training.export import load
from training.generate import chat_ids, end_ids, greedy, replay
from training.model import Tiny

from moesaic.tasks import FAMILIES, grade, items  # isort: skip


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95% score interval of a proportion."""
    p, zz = right / count, z * z / count
    middle, half = p + zz / 2, z * math.sqrt(p * (1 - p) / count + zz / (4 * count))
    return (middle - half) / (1 + zz), (middle + half) / (1 + zz)


def evaluate(model: Tiny, tokenizer: Tokenizer, count: int, chunk: int) -> dict[str, Any]:
    """All families, `count` test items each, greedily; `chunk` rows at a time."""
    ends = end_ids(tokenizer)
    pool = [item for family in FAMILIES for item in items(family, "test", count)]
    pool.sort(key=lambda item: len(item.worked))
    right, failures = dict.fromkeys(FAMILIES, 0), []
    totals: dict[str, Any] = {}
    exact = 0
    for start in range(0, len(pool), chunk):
        part = pool[start : start + chunk]
        prompts = [chat_ids(tokenizer, item.prompt) for item in part]
        completions = greedy(model, prompts, ends)
        texts = tokenizer.decode_batch(completions, skip_special_tokens=False)
        for item, text in zip(part, texts, strict=True):
            right[item.family] += grade(item, text)
            exact += text == item.worked
            if not grade(item, text) and len(failures) < 4000:
                failures.append({"family": item.family, "prompt": item.prompt, "want": item.worked, "got": text})
        rows = [p + c + [ends[0]] for p, c in zip(prompts, completions, strict=True)]
        seen = replay(model, rows, [len(p) for p in prompts], ends[1])
        totals = {k: totals.get(k, 0) + v for k, v in seen.items()}
    return _report(right, count, totals) | {"exact_steps": exact / len(pool), "failures": failures}


def _report(right: dict[str, int], count: int, totals: dict[str, Any]) -> dict[str, Any]:
    table = {}
    for family, n in right.items():
        low, high = wilson(n, count)
        table[family] = {"right": n, "count": count, "accuracy": n / count, "low": round(low, 4), "high": round(high, 4)}
    loads = totals["loads"]
    return {
        "families": table,
        "mean": sum(right.values()) / count / len(right),
        "max_over_mean": (loads.max(-1)[0] / loads.mean(-1)).tolist(),
        "min_over_mean": (loads.min(-1)[0] / loads.mean(-1)).tolist(),
        "acceptance": totals["accepted"] / totals["drafted"],
        "drafted": totals["drafted"],
        "accepted": totals["accepted"],
        "draft_accuracy_everywhere": totals["right"] / totals["places"],
    }


def show(report: dict[str, Any]) -> None:
    for family, row in report["families"].items():
        print(f"{family:16} {row['accuracy']:7.2%}  [{row['low']:.1%}, {row['high']:.1%}]  n={row['count']}")
    print(f"mean {report['mean']:.2%}  draft acceptance {report['acceptance']:.2%}")
    print("load max/mean", [round(x, 2) for x in report["max_over_mean"]], "min/mean", [round(x, 2) for x in report["min_over_mean"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "src/moesaic/assets/tiny")
    parser.add_argument("--tokenizer", type=Path, help="default: the model's own tokenizer.json")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--chunk", type=int, default=0, help="rows decoded together (default: 2048 on a GPU, 64 on a CPU)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="arithmetic; the weights are BF16 values")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = Tokenizer.from_file(str(args.tokenizer or args.model / "tokenizer.json"))
    model, began = load(args.model, device).eval(), time.time()
    with torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        report = evaluate(model, tokenizer, args.count, args.chunk or (2048 if device == "cuda" else 64))
    report |= {"dtype": args.dtype, "device": device, "seconds": round(time.time() - began, 1)}
    show(report)
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
