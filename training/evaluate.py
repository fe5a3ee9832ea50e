"""Accuracy per family, router load and draft acceptance of an exported model, on held-out items.

python -m training.evaluate --model src/moesaic/assets/tiny --count 1000 --out training/eval.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from training.data import ROOT
from training.export import load
from training.generate import chat_ids, end_ids, greedy, replay, speculate
from training.model import Tiny

from moesaic.tasks import FAMILIES, grade, items  # isort: skip


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95% score interval of a proportion."""
    p, zz = right / count, z * z / count
    middle, half = p + zz / 2, z * math.sqrt(p * (1 - p) / count + zz / (4 * count))
    return (middle - half) / (1 + zz), (middle + half) / (1 + zz)


def evaluate(model: Tiny, tokenizer: Tokenizer, count: int, chunk: int) -> dict[str, Any]:
    """All families, `count` test items each, greedily; `chunk` rows at a time.

    Most completions are the reference solution word for word, which one forward pass can tell; only the others are
    decoded. The router load counts prompts with their reference solutions.
    """
    ends = end_ids(tokenizer)
    pool = [item for family in FAMILIES for item in items(family, "test", count)]
    pool.sort(key=lambda item: len(item.worked))
    right, failures, loads = dict.fromkeys(FAMILIES, 0), [], torch.zeros(1)
    drafted = accepted = exact = 0
    for start in range(0, len(pool), chunk):
        part = pool[start : start + chunk]
        prompts = [chat_ids(tokenizer, item.prompt) for item in part]
        worked = [tokenizer.encode(item.worked, add_special_tokens=False).ids for item in part]
        rows = [p + w + [ends[0]] for p, w in zip(prompts, worked, strict=True)]
        seen = replay(model, rows, [len(p) for p in prompts], ends[1])
        loads = loads.to(seen.loads.device) + seen.loads
        drafts = [d for d, ok in zip(seen.drafts, seen.faithful, strict=True) if ok]
        other = [i for i, ok in enumerate(seen.faithful) if not ok]
        for i, ok in enumerate(seen.faithful):
            right[part[i].family] += ok
        exact += len(part) - len(other)
        if other:
            completions = greedy(model, [prompts[i] for i in other], ends)
            rows = [prompts[i] + c + [ends[0]] for i, c in zip(other, completions, strict=True)]
            drafts += replay(model, rows, [len(prompts[i]) for i in other], ends[1]).drafts
            for i, text in zip(other, tokenizer.decode_batch(completions, skip_special_tokens=False), strict=True):
                good = grade(part[i], text)
                right[part[i].family] += good
                failures += [] if good else [dataclasses.asdict(part[i]) | {"got": text}]
        for hits in drafts:
            one, two = speculate(hits)
            drafted, accepted = drafted + one, accepted + two
    counts = {"drafted": drafted, "accepted": accepted, "exact_steps": exact / len(pool), "failures": failures}
    return _report(right, count, loads) | {"acceptance": accepted / drafted} | counts


def _report(right: dict[str, int], count: int, loads: torch.Tensor) -> dict[str, Any]:
    table = {}
    for family, n in right.items():
        low, high = (round(x, 4) for x in wilson(n, count))
        table[family] = {"right": n, "count": count, "accuracy": n / count, "low": low, "high": high}
    return {
        "families": table,
        "mean": sum(right.values()) / count / len(right),
        "max_over_mean": [round(x, 3) for x in (loads.max(-1)[0] / loads.mean(-1)).tolist()],
        "min_over_mean": [round(x, 3) for x in (loads.min(-1)[0] / loads.mean(-1)).tolist()],
    }


def show(report: dict[str, Any]) -> None:
    for family, row in report["families"].items():
        print(f"{family:16} {row['accuracy']:7.2%}  [{row['low']:.1%}, {row['high']:.1%}]  n={row['count']}")
    print(f"mean {report['mean']:.2%}  draft acceptance {report['acceptance']:.2%}")
    print(f"load max/mean {report['max_over_mean']}, min/mean {report['min_over_mean']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "src/moesaic/assets/tiny")
    parser.add_argument("--tokenizer", type=Path, help="default: the model's own tokenizer.json")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument(
        "--chunk", type=int, default=0, help="rows decoded together (default: 2048 on a GPU, 8 on a CPU)"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="arithmetic; the weights are BF16 values"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = Tokenizer.from_file(str(args.tokenizer or args.model / "tokenizer.json"))
    model, began = load(args.model, device).eval(), time.time()
    with torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        report = evaluate(model, tokenizer, args.count, args.chunk or (2048 if device == "cuda" else 8))
    report |= {"dtype": args.dtype, "device": device, "seconds": round(time.time() - began, 1)}
    show(report)
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
