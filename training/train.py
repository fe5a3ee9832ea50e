"""Train `tiny` from scratch on one GPU, export it, and measure it.

    python -m training.train --out src/moesaic/assets/tiny

The run is boxed by time (`optim.seconds` in config.json): the learning rate follows the clock, so a slower
machine takes fewer steps and still ends annealed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.data import DataLoader

from training import export, optim
from training.data import ROOT, PackedRows
from training.evaluate import evaluate, show
from training.model import MoE, Shape, Tiny, packed_losses

Losses = tuple[Tensor, Tensor, Tensor, Tensor]


def document_mask(docs: Tensor) -> Callable[..., Tensor]:
    """Causal, and only inside one document."""

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (docs[b, q] == docs[b, k])

    return mask


def flex_losses(model: Tiny, rows: int, width: int) -> Callable[[Tensor], Losses]:
    """Compiled losses with block-sparse document attention."""
    docs = torch.zeros(rows, width, dtype=torch.int32, device="cuda")
    mask = document_mask(docs)
    make_mask = torch.compile(create_block_mask, dynamic=False)

    def losses(batch: Tensor, block_mask: Any) -> Losses:
        return packed_losses(model, batch, lambda _, q, k, v: flex_attention(q, k, v, block_mask=block_mask))

    compiled = torch.compile(losses, dynamic=False)

    def run(batch: Tensor) -> Losses:
        docs.copy_(batch[1])
        return compiled(batch, make_mask(mask, rows, None, width, width, device="cuda"))

    return run


def plain_losses(model: Tiny, compiled: bool) -> Callable[[Tensor], Losses]:
    """The same with a dense mask: slower, runs anywhere."""

    def losses(batch: Tensor) -> Losses:
        docs = batch[1]
        mask = (docs[:, None, :, None] == docs[:, None, None, :]).tril()
        return packed_losses(model, batch, lambda _, q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask))

    return torch.compile(losses, dynamic=False) if compiled else losses


def pick_losses(model: Tiny, sample: Tensor) -> tuple[str, Callable[[Tensor], Losses]]:
    """Flex attention where it compiles, otherwise the dense mask; a few trial steps decide."""
    if sample.device.type == "cpu":
        return "plain", plain_losses(model, compiled=False)
    try:
        run = flex_losses(model, *sample.shape[1:])
        for trial in range(4):
            began = time.time()
            with torch.autocast("cuda", torch.bfloat16):
                losses = run(sample)
            (losses[0] + losses[1]).backward()
            model.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            print(f"trial {trial}: {time.time() - began:.3f} s", flush=True)
        if time.time() - began > 0.3:
            raise RuntimeError("flex attention recompiles at every step")
        return "flex", run
    except Exception as error:  # a compiler's failures have no common type
        print(
            f"flex attention unavailable ({type(error).__name__}: {str(error)[:500]}); using the dense mask", flush=True
        )
        torch._dynamo.reset()
        model.zero_grad(set_to_none=True)
        return "plain", plain_losses(model, compiled=True)


def rate(progress: float, step: int, settings: dict[str, Any]) -> float:
    """Warm-up by steps, then constant at `peak`, then linear to zero over the last `decay_share` of the time."""
    return (
        settings["peak"]
        * min(1.0, (step + 1) / settings["warmup_steps"])
        * min(1.0, (1.0 - progress) / settings["decay_share"])
    )


class Trainer:
    """The loop's state: model, optimisers, log."""

    def __init__(self, config: dict[str, Any], device: str, out: Path, records: Path) -> None:
        self.config, self.device, self.out = config, device, out
        torch.manual_seed(config["data"]["seed"])
        self.model = Tiny(Shape.of(config["model"])).to(device)
        self.mixtures = [m for m in self.model.modules() if isinstance(m, MoE)]
        self.muon, self.adam = optim.build(self.model, config["optim"])
        records.mkdir(parents=True, exist_ok=True)
        self.log = (records / "log.jsonl").open("w", encoding="utf-8")
        self.losses: Callable[[Tensor], Losses] | None = None

    def step(self, batch: Tensor, factor: float) -> Losses:
        """One optimiser step, then the correction bias of each mixture moves towards balance."""
        settings = self.config["optim"]
        assert self.losses is not None
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            result = self.losses(batch)
        (result[0] + settings["mtp_weight"] * result[1]).backward()
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.adam.step()
        self.muon.step(settings["muon_lr"] * factor)
        self.model.zero_grad(set_to_none=True)
        loads = result[3]
        speed = settings["bias_speed"] * max(factor, 0.05)
        moves = speed * torch.sign(loads.mean(-1, keepdim=True) - loads)
        with torch.no_grad():
            for moe, move in zip(self.mixtures, moves, strict=True):
                moe.bias += move
        return result

    def run(self, loader: DataLoader) -> None:
        settings = self.config["optim"]
        stream = iter(loader)
        batch = next(stream).to(self.device)
        name, self.losses = pick_losses(self.model, batch)
        print(f"attention: {name}", flush=True)
        sums, loads = (
            torch.zeros(3, device=self.device),
            torch.zeros(len(self.mixtures), self.model.s.n_routed_experts, device=self.device),
        )
        tokens = step = 0
        began = saved = time.time()
        while True:
            progress = max((time.time() - began) / settings["seconds"], step / settings["max_steps"])
            factor = rate(progress, step, settings)
            if progress >= 1.0:
                break
            result = self.step(batch, factor)
            sums += torch.stack([r.detach() for r in result[:3]])
            loads += result[3]
            tokens, step = tokens + batch[0].numel(), step + 1
            batch = next(stream).to(self.device, non_blocking=True)
            every = 50 if step <= 1000 else 200
            if step % every == 0 or step == 1:
                self.write(step, tokens, time.time() - began, factor, sums / (1 if step == 1 else every), loads)
                sums.zero_()
                loads.zero_()
                if time.time() - saved > settings["save_seconds"]:
                    export.save(self.model, self.config["model"], self.out)
                    saved = time.time()
        export.save(self.model, self.config["model"], self.out)
        self.log.close()

    def write(self, step: int, tokens: int, seconds: float, factor: float, means: Tensor, loads: Tensor) -> None:
        """One line of the log."""
        loss, mtp, right = means.tolist()
        balance = (loads.max(-1)[0] / loads.mean(-1)).tolist()
        line = {"step": step, "tokens": tokens, "seconds": round(seconds, 1), "lr_factor": round(factor, 4),
                "loss": round(loss, 5), "mtp_loss": round(mtp, 5), "token_accuracy": round(right, 5),
                "load_max_over_mean": [round(b, 3) for b in balance]}  # fmt: skip
        self.log.write(json.dumps(line) + "\n")
        self.log.flush()
        if step % 200 == 0 or step == 1:
            print(json.dumps(line), flush=True)


def measure(model: Path, tokenizer: Path, device: str, count: int, out: Path) -> None:
    """Held-out accuracy of the exported files, in FP32 arithmetic."""
    report = evaluate(
        export.load(model, device).eval(), Tokenizer.from_file(str(tokenizer)), count, 2048 if device == "cuda" else 8
    )
    show(report)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "training/config.json")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "src/moesaic/assets/tiny/tokenizer.json")
    parser.add_argument("--out", type=Path, required=True, help="where the model goes")
    parser.add_argument("--records", type=Path, default=ROOT / "training", help="where log.jsonl and eval.json go")
    parser.add_argument("--resume", type=Path, help="start from an exported model instead of random weights")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=NUMBER", help="override settings of optim, e.g. seconds=60"
    )
    parser.add_argument("--evaluate", type=int, default=1000, help="held-out items per family afterwards (0: none)")
    args = parser.parse_args()
    config = json.loads(args.config.read_text())
    config["optim"] |= {key: float(value) for key, value in (pair.split("=") for pair in args.set)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    workers = min(14, max(1, (os.cpu_count() or 2) - 2)) if device == "cuda" else 1
    dataset = PackedRows(str(args.tokenizer), config["data"])
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, prefetch_factor=8, pin_memory=device == "cuda")
    trainer = Trainer(config, device, args.out, args.records)
    if args.resume:
        trainer.model.load_state_dict(export.load(args.resume).state_dict())
    trainer.run(loader)
    if args.evaluate:
        measure(args.out, args.tokenizer, device, args.evaluate, args.records / "eval.json")


if __name__ == "__main__":
    main()
