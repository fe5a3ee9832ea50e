"""Draw training/loss.png from training/log.jsonl: losses, and the router's balance, over tokens.

python -m training.plot
"""

from __future__ import annotations

import json

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from training.data import ROOT


def main() -> None:
    lines = [json.loads(line) for line in (ROOT / "training/log.jsonl").read_text().splitlines()]
    offset, last, x = 0, 0, []
    for line in lines:
        if line["tokens"] < last:
            offset += last
        last = line["tokens"]
        x.append((offset + last) / 1e6)
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6.5), sharex=True, height_ratios=(2, 1))
    top.semilogy(x, [line["loss"] for line in lines], label="next token")
    top.semilogy(x, [line["mtp_loss"] for line in lines], label="token after next (MTP)")
    top.set_ylabel("cross-entropy (nats)")
    top.set_title("tiny: loss on fresh training documents (assistant tokens only)")
    top.legend()
    for layer, name in enumerate([*(f"layer {i}" for i in range(1, 5)), "MTP"]):
        bottom.plot(x, [line["load_max_over_mean"][layer] for line in lines], label=name, linewidth=1)
    bottom.set_ylabel("busiest / mean expert")
    bottom.set_xlabel("million tokens")
    bottom.set_ylim(1, 2)
    bottom.legend(ncols=5, fontsize=8)
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    if offset:
        for axes in (top, bottom):
            axes.axvline(offset / 1e6, color="grey", linestyle=":")
    figure.tight_layout()
    figure.savefig(ROOT / "training/loss.png", dpi=110)


if __name__ == "__main__":
    main()
