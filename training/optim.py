"""Muon for the matrices, Adam for the rest. Both are plain and small."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn


def orthogonalise(g: Tensor) -> Tensor:
    """Five quintic Newton-Schulz steps towards the nearest (semi-)orthogonal matrix, batched over [..., m, n]."""
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return x.mT if tall else x


class Muon:
    """Momentum, orthogonalised; matrices of one shape are stacked into one batch."""

    def __init__(self, params: list[nn.Parameter], momentum: float, weight_decay: float) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay
        groups: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
        for p in params:
            groups[tuple(p.shape[-2:])].append(p)
        self.groups = [(ps, [torch.zeros_like(p) for p in ps]) for ps in groups.values()]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for params, buffers in self.groups:
            grads = [p.grad for p in params]
            torch._foreach_lerp_(buffers, grads, 1 - self.momentum)
            nesterov = torch._foreach_lerp(grads, buffers, self.momentum)
            rows, cols = params[0].shape[-2:]
            update = orthogonalise(torch.cat([g.reshape(-1, rows, cols) for g in nesterov])).float()
            pieces = update.split([p.numel() // (rows * cols) for p in params])
            torch._foreach_mul_(params, 1 - lr * self.weight_decay)
            scale = lr * max(1.0, rows / cols) ** 0.5
            torch._foreach_add_(params, [u.view_as(p) for u, p in zip(pieces, params, strict=True)], alpha=-scale)


def build(model: nn.Module, settings: dict[str, Any]) -> tuple[Muon, torch.optim.AdamW]:
    """Matrices inside blocks go to Muon; embedding, head, router and norms to Adam with their own rates."""
    matrices, rates = [], defaultdict(list)
    for name, p in model.named_parameters():
        leaf = name.split(".")[-1]
        if leaf == "embed_tokens":
            rates[settings["embed_lr"]].append(p)
        elif leaf == "router":
            rates[settings["router_lr"]].append(p)
        elif p.ndim < 2 or leaf == "lm_head":
            rates[settings["adam_lr"]].append(p)
        else:
            matrices.append(p)
    adam = torch.optim.AdamW(
        [{"params": ps, "lr": lr, "base_lr": lr} for lr, ps in rates.items()],
        betas=tuple(settings["adam_betas"]),
        weight_decay=0.0,
        fused=next(model.parameters()).is_cuda,
    )
    return Muon(matrices, settings["muon_momentum"], settings["weight_decay"]), adam
