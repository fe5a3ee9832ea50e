"""Training documents (chat-formatted tasks and chat turns), packed into rows of fixed length.

A row holds whole documents one after another; `docs` numbers them so that attention can stay inside each one,
and `learn` marks the tokens whose prediction is trained: the assistant's words and its end mark.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.utils.data import IterableDataset, get_worker_info

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))
sys.path.insert(0, str(ROOT))

from moesaic.tasks import FAMILIES, split_of, stream  # noqa: E402
from training import chat  # noqa: E402

Document = list[tuple[str, str]]  # (role, text)

BOS, EOS, PAD = "<|bos|>", "<|end|>", "<|pad|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIALS = [BOS, EOS, PAD, *ROLES.values()]


def casual(rng: random.Random, prompt: str) -> str:
    """One prompt in eight as people type it: no capital, no final mark. Never turns into a held-out prompt."""
    if rng.random() > 0.125:
        return prompt
    typed = prompt[0].lower() + prompt[1:] if rng.random() < 0.6 else prompt
    typed = typed.rstrip("?.") if rng.random() < 0.6 else typed
    return typed if split_of(typed) == "train" else prompt


def documents(rng: random.Random, settings: dict[str, Any]) -> Iterator[Document]:
    """An endless mixture: single tasks, chat turns, and dialogues of both. Only train-split prompts."""
    names = list(FAMILIES)
    weights = [settings["weights"].get(name, 1.0) for name in names]
    streams = {name: stream(name, "train", rng) for name in names}

    def task() -> tuple[str, str]:
        item = next(streams[rng.choices(names, weights)[0]])
        return casual(rng, item.prompt), item.worked

    while True:
        kind = rng.random()
        if kind < settings["chat_share"]:
            turns = [chat.turn(rng) for _ in range(rng.randint(1, 3))]
        elif kind < settings["chat_share"] + settings["dialogue_share"]:
            turns = [chat.turn(rng) if rng.random() < 0.25 else task() for _ in range(rng.randint(2, 4))]
        else:
            turns = [task()]
        document: Document = []
        if rng.random() < settings["system_share"]:
            document.append(("system", rng.choice(chat.SYSTEMS)))
        for user, assistant in turns:
            document += [("user", user), ("assistant", assistant)]
        yield document


def encode_documents(tokenizer: Tokenizer, batch: list[Document]) -> list[tuple[list[int], list[int]]]:
    """(ids, learn) per document; one call of the tokenizer for the whole batch."""
    ids_of = {token: tokenizer.token_to_id(token) for token in SPECIALS}
    texts = [text for document in batch for _, text in document]
    encoded = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    out = []
    for document in batch:
        ids, learn = [ids_of[BOS]], [0]
        for role, _ in document:
            body = next(encoded).ids
            if role == "assistant":
                body = [*body, ids_of[EOS]]
            ids += [ids_of[ROLES[role]], *body]
            learn += [0] + [int(role == "assistant")] * len(body)
        out.append((ids, learn))
    return out


class PackedRows(IterableDataset):
    """Batches of (tokens, docs, learn), each int16 [rows, row_tokens]; docs is 0 on padding."""

    def __init__(self, tokenizer_file: str, settings: dict[str, Any]) -> None:
        super().__init__()
        self.tokenizer_file, self.settings = tokenizer_file, settings

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        worker = info.id if info else 0
        torch.set_num_threads(1)
        tokenizer = Tokenizer.from_file(self.tokenizer_file)
        source = documents(random.Random(f"train/{self.settings['seed']}/{worker}"), self.settings)
        return self._pack(tokenizer, source)

    def _pack(self, tokenizer: Tokenizer, source: Iterator[Document]) -> Iterator[torch.Tensor]:
        rows, width = self.settings["rows_per_step"], self.settings["row_tokens"]
        ready: list[tuple[list[int], list[int]]] = []
        while True:
            out = torch.zeros(3, rows, width, dtype=torch.int16)
            out[0] = tokenizer.token_to_id(PAD)
            row, at, doc = 0, 0, 0
            while True:
                if not ready:
                    ready = encode_documents(tokenizer, [next(source) for _ in range(256)])
                ids, learn = ready[-1]
                if len(ids) > width:
                    ready.pop()
                    continue
                if at + len(ids) > width:
                    row, at, doc = row + 1, 0, 0
                    if row == rows:
                        break
                ready.pop()
                doc += 1
                piece = torch.tensor([ids, [doc] * len(ids), learn], dtype=torch.int16)
                out[:, row, at : at + len(ids)] = piece
                at += len(ids)
            yield out
