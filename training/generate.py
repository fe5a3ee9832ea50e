"""Batched greedy decoding with a key-value cache, and what is measured on its output.

Prompts are padded on the right; each row writes its next key at its own position, so no left padding is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        used = int(self.at.max()) + 1
        seen = torch.arange(used, device=self.at.device) <= self.at[:, None]
        return F.scaled_dot_product_attention(q, keys[:, :, :used], values[:, :, :used], attn_mask=seen[:, None, None])


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


@dataclass
class Replay:
    """What one forward pass over prompt + completion rows (the end mark included) shows."""

    loads: Tensor  # [moe layers, E], over all real tokens
    faithful: list[bool]  # per row: every completion token is the main model's own first choice
    drafts: list[list[bool]]  # per row and place: the MTP layer drafts the token after next


@torch.no_grad()
def replay(model: Tiny, rows: list[list[int]], starts: list[int], pad: int) -> Replay:
    """Score rows without decoding: greedy decoding gives a completion iff each of its tokens is the argmax there."""
    device = model.embed_tokens.device
    width = max(map(len, rows))
    tokens = torch.tensor([r + [pad] * (width - len(r)) for r in rows], device=device)
    place = torch.arange(width, device=device)
    sizes = torch.tensor([len(r) for r in rows], device=device)[:, None]
    first = torch.tensor(starts, device=device)[:, None] - 1
    rope = rope_table(model.s, place)
    h, loads = model.trunk(tokens, rope, causal, (place < sizes).flatten().float())
    same = model.logits(h).argmax(-1) == tokens.roll(-1, 1)
    outside = (place < first) | (place >= sizes - 1)
    h2, load = model.draft(tokens.roll(-1, 1), h, rope, causal, (place < sizes - 1).flatten().float())
    hits = (model.logits(h2).argmax(-1) == tokens.roll(-2, 1)).tolist()
    drafts = [hit[start - 1 : len(row) - 2] for hit, start, row in zip(hits, starts, rows, strict=True)]
    return Replay(torch.stack([*loads, load]), (same | outside).all(1).tolist(), drafts)


def speculate(hits: list[bool]) -> tuple[int, int]:
    """(drafted, accepted) of decoding with one draft a round: an accepted draft advances two tokens, else one."""
    at = drafted = accepted = 0
    while at < len(hits):
        drafted, accepted = drafted + 1, accepted + hits[at]
        at += 2 if hits[at] else 1
    return drafted, accepted


def end_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    return tokenizer.token_to_id(EOS), tokenizer.token_to_id(PAD)
