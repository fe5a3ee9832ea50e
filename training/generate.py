"""Batched greedy decoding with a key-value cache, and what is measured on its output.

Prompts are padded on the right; each row writes its next key at its own position, so no left padding is needed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from training.data import BOS, EOS, PAD, ROLES
from training.model import Attention, Tiny, rope_table


def causal(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain causal attention; right padding is never seen by a real token."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Cache:
    """Keys and values [rows, H, length, dim] per attention module; `at` is where each row writes next."""

    def __init__(self, length: int) -> None:
        self.length, self.at = length, torch.empty(0)
        self.store: dict[Attention, tuple[Tensor, Tensor]] = {}

    def prefill(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        room = self.length - k.shape[2]
        self.store[attention] = (F.pad(k, (0, 0, 0, room)), F.pad(v, (0, 0, 0, room)))
        return causal(attention, q, k, v)

    def decode(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.store[attention]
        rows = torch.arange(len(self.at), device=self.at.device)
        keys[rows, :, self.at] = k[:, :, 0].to(keys.dtype)
        values[rows, :, self.at] = v[:, :, 0].to(values.dtype)
        seen = torch.arange(self.length, device=self.at.device) <= self.at[:, None]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[:, None, None])


def chat_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The chat template for a single user turn, with the generation prompt."""
    text = f"{BOS}{ROLES['user']}{prompt}{ROLES['assistant']}"
    return tokenizer.encode(text, add_special_tokens=False).ids


@torch.no_grad()
def greedy(model: Tiny, prompts: list[list[int]], ends: tuple[int, int], limit: int = 400) -> list[list[int]]:
    """Completions without the end mark. `ends` is (end id, pad id)."""
    device = model.embed_tokens.device
    end, pad = ends
    sizes = torch.tensor([len(p) for p in prompts], device=device)
    width = int(sizes.max())
    tokens = torch.tensor([p + [pad] * (width - len(p)) for p in prompts], device=device)
    cache = Cache(width + limit)
    real = torch.ones(tokens.numel(), device=device)
    h, _ = model.trunk(tokens, rope_table(model.s, torch.arange(width, device=device)), cache.prefill, real)
    last = model.logits(h[torch.arange(len(prompts), device=device), sizes - 1]).argmax(-1)
    out, done = [last], last == end
    for step in range(limit - 1):
        cache.at = sizes + step
        rope = tuple(t[:, None, None] for t in rope_table(model.s, cache.at))
        h, _ = model.trunk(last[:, None], rope, cache.decode, real[: len(prompts)])
        last = model.logits(h[:, 0]).argmax(-1)
        out.append(last)
        done |= last == end
        if step % 16 == 0 and bool(done.all()):
            break
    rows = torch.stack(out, 1).tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


@torch.no_grad()
def replay(model: Tiny, rows: list[list[int]], starts: list[int], pad: int) -> dict[str, Any]:
    """One teacher-forced pass over prompt + completion rows (the end mark included).

    Returns loads [moe layers, E] over all real tokens, and (drafted, accepted) of speculative decoding with one draft:
    each round the main model emits a token, the MTP layer drafts the next; an accepted draft advances two tokens.
    """
    device = model.embed_tokens.device
    width = max(map(len, rows))
    tokens = torch.tensor([r + [pad] * (width - len(r)) for r in rows], device=device)
    sizes = torch.tensor([len(r) for r in rows], device=device)
    inside = (torch.arange(width, device=device) < sizes[:, None]).float()
    rope = rope_table(model.s, torch.arange(width, device=device))
    h, loads = model.trunk(tokens, rope, causal, inside.flatten())
    drafting = inside * (torch.arange(width, device=device) < sizes[:, None] - 1)
    h2, load = model.draft(tokens.roll(-1, 1), h, rope, causal, drafting.flatten())
    drafts = model.logits(h2).argmax(-1).tolist()
    drafted = accepted = everywhere = right = 0
    for row, start, draft in zip(rows, starts, drafts, strict=True):
        hits = [draft[t] == row[t + 2] for t in range(start - 1, len(row) - 2)]
        everywhere, right = everywhere + len(hits), right + sum(hits)
        at = 0
        while at < len(hits):
            drafted += 1
            accepted += hits[at]
            at += 2 if hits[at] else 1
    return {"loads": torch.stack([*loads, load]), "drafted": drafted, "accepted": accepted, "places": everywhere, "right": right}


def end_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    return tokenizer.token_to_id(EOS), tokenizer.token_to_id(PAD)
