"""Attention over the paged pool by FlashInfer (package `flashinfer-python`), on Hopper, over caches in BF16.

The pool is read where it lies: keys and values of a row side by side are two strided views, its blocks the pages.

Sequences that decode run in the XQA kernels, which find lengths and tables on the device: they can stand in a CUDA
graph. Prompts, and everything over MLA's latent cache, run in kernels that follow FlashAttention-3. Those share out
work on the host, from the step's spans: once per step, for all of its layers, and in no graph.

The library compiles a kernel with nvcc when it is first used (those for prompts take minutes), and keeps it in a folder
(FLASHINFER_WORKSPACE_BASE).

Letters as in ops.py; B positions of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from itertools import accumulate
from math import sqrt
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from moesaic.contracts.contract import Contract, path_of
from moesaic.errors import UnsupportedError
from moesaic.kernels.installed import lacking
from moesaic.kernels.ops import AttentionBatch, KVView, Span

_HEADS = Contract(
    "attend_paged", "flashinfer", frozenset({"cuda"}), frozenset({"bfloat16"}), batch_invariant=False, rank=60,
    arch=(90, 90), package="flashinfer-python", versions=">=0.7.2,<0.8", path=path_of("attend_paged"),
    heads_only=True, head_dims=frozenset({64, 128}),
)  # fmt: skip
LATENT = (512, 64)
"""Elements of a latent, and of the rotary key behind it."""
CONTRACTS = (
    # The library names its kernels with sinks by everything but the size of heads: one size only, gpt-oss's.
    replace(_HEADS, sinks=True, head_dims=frozenset({64})),
    replace(_HEADS, heads_only=False, latent_only=True, head_dims=frozenset({sum(LATENT)}), capturable=False),
    _HEADS,
)
READS_SPANS = True
"""On the host: a traced call must read them back from the device."""
BLOCKS = (16, 32, 64, 128)
MOST_SHARING = 32
"""Query heads of one kv head."""
WORKSPACE, COUNTERS = 128 << 20, 1 << 20
"""Bytes that kernels leave parts of results in, and numbers that they count those with."""


@dataclass(frozen=True)
class Shape:
    """What a planned kernel is compiled and planned for, beside the batch."""

    heads: int
    view: KVView
    block: int
    scale: float
    window: int | None
    sinks: bool

    def check(self) -> None:
        """Raises UnsupportedError for what no contract can say, since no plan knows of it."""
        what, view = None, self.view
        if self.block not in BLOCKS:
            what, remedy = f"blocks of {self.block} positions", f"Use --block-size {' or '.join(map(str, BLOCKS))}"
        elif self.heads % view.kv_heads or (self.heads // view.kv_heads > MOST_SHARING and not view.latent):
            what, remedy = f"{self.heads} query heads over {view.kv_heads}", "Drop the option"
        elif view.latent and ((view.value_dim, view.key_dim - view.value_dim) != LATENT or 128 % self.heads):
            what, remedy = f"{self.heads} heads over latents of {view.value_dim} in {view.key_dim}", "Drop the option"
        if what:
            raise UnsupportedError(f"FlashInfer attends with no {what}", where="--attention flashinfer",
                                   remedy=f"{remedy}, or use --attention triton.")  # fmt: skip


def probe() -> str | None:
    """Decodes two sequences. None where the result is right."""
    if not torch.cuda.is_available():
        return "finds no CUDA device"
    if reason := lacking("flashinfer-python", _HEADS.versions, "flashinfer"):
        return reason
    if torch.cuda.get_device_capability() != (9, 0):
        return "is used on Hopper GPUs only"
    try:
        library()
    except (ImportError, OSError, RuntimeError) as error:
        return f"cannot be loaded ({error!s:.200}); pip install 'moesaic[flashinfer]'"
    try:
        return None if tried() else "computes wrong results on this machine"
    except Exception as failure:  # whatever a compiler or driver raises, it is a reason, not a crash
        return f"fails on this machine: {failure!r:.200}; it needs ninja, and a CUDA toolkit in CUDA_HOME"


@cache
def library() -> SimpleNamespace:
    """The parts of the package that are used."""
    import flashinfer
    from flashinfer.mla import MLAPlanMetadata
    from flashinfer.xqa import xqa

    return SimpleNamespace(
        xqa=xqa, csr=MLAPlanMetadata.csr, Prompts=flashinfer.BatchPrefillWithPagedKVCacheWrapper,
        PromptsWithSinks=flashinfer.BatchAttentionWithAttentionSinkWrapper,
        Latent=flashinfer.mla.BatchMLAPagedAttentionWrapper,
    )  # fmt: skip


def tried() -> bool:
    """Contexts of 5 and 20 positions whose values are 1 and 3; what lies behind them in their blocks is larger."""
    view, device = KVView(1, 128, 128, 128), torch.device("cuda")
    pool = torch.full((48, 256), 100.0, device=device).bfloat16()
    pool[16:21], pool[32:48], pool[:4] = 1.0, 3.0, 3.0
    table = torch.tensor([[1, 0], [2, 0]], dtype=torch.int32, device=device)
    spans = (Span(0, 1, 5), Span(1, 1, 20))
    spans_S3 = torch.tensor([(s.start, s.count, s.length) for s in spans], device=device)
    q = torch.ones(2, 8, 128, device=device).bfloat16()
    y = attend_paged(q, pool, AttentionBatch(spans, 2, table, 16, spans_S3), view, 0.01)
    want = torch.tensor([1.0, 3.0], device=device)[:, None, None]
    return bool(((y - want).abs() <= 2**-6 * want).all())


def attend_paged(q_THK: Tensor, pool_PW: Tensor, batch: AttentionBatch, view: KVView, scale: float,
                 window: int | None = None, sinks_H: Tensor | None = None) -> Tensor:  # fmt: skip
    """Raises UnsupportedError for sizes that the kernels do not have."""
    shape = Shape(q_THK.shape[1], view, batch.block, scale, window, sinks_H is not None)
    shape.check()
    q = q_THK if q_THK.stride(-1) == 1 else q_THK.contiguous()
    out, decodes = q.new_empty(*q.shape[:2], view.value_dim), batch.decodes
    pages_NBW = pool_PW.unflatten(0, (-1, batch.block))
    with torch.cuda.device(q.device) if q.is_cuda else torch.no_grad():
        if view.latent:
            kernels_of(shape, q.device).planned(batch).run(query=q, kv_cache=pages_NBW, out=out)
            return out
        keys_values = split(pages_NBW, view)
        if decodes:
            decode(q[:decodes], keys_values, batch, shape, sinks_H, out[:decodes])
        if decodes < len(batch.spans):
            given = () if sinks_H is None else (sinks_H, scale)
            kernels_of(shape, q.device).planned(batch).run(q[decodes:], keys_values, *given, out=out[decodes:])
    return out


def split(pages_NBW: Tensor, view: KVView) -> tuple[Tensor, Tensor]:
    """Keys [N, B, G, K] and values [N, B, G, V], as views."""
    k = pages_NBW.narrow(2, 0, view.kv_heads * view.key_dim)
    v = pages_NBW.narrow(2, view.value_at, view.kv_heads * view.value_dim)
    return k.unflatten(2, (view.kv_heads, view.key_dim)), v.unflatten(2, (view.kv_heads, view.value_dim))


def decode(q_SHK: Tensor, keys_values: tuple[Tensor, Tensor], batch: AttentionBatch, shape: Shape,
           sinks_H: Tensor | None, out_SHV: Tensor) -> None:  # fmt: skip
    """Sequences of one row each, the first ones of the batch. The kernel divides by the root of the size of heads."""
    table_SB, lengths_S1 = tables_of(batch)
    groups = shape.view.kv_heads
    library().xqa(
        q_SHK.contiguous()[:, None], *keys_values, table_SB, lengths_S1, out_SHV[:, None], workspace(q_SHK.device),
        counters(q_SHK.device), groups, shape.block, sinks=None if sinks_H is None else sinks_H.view(groups, -1),
        q_scale=shape.scale * sqrt(shape.view.key_dim), sliding_win_size=shape.window or 0,
    )  # fmt: skip


def tables_of(batch: AttentionBatch) -> tuple[Tensor, Tensor]:
    """(blocks INT32, lengths UINT32 [S, 1]) of the sequences that decode; made once, by the first layer.

    A row that is padding has no context: it gets the first position of block 0, which belongs to nobody.
    """
    held = vars(batch)
    if "flashinfer" not in held:
        lengths_S1, table_SB = batch.spans_S3[: batch.decodes, 2:], batch.table_SB[: batch.decodes]
        held["flashinfer"] = (
            table_SB.to(torch.int32).masked_fill(lengths_S1 == 0, 0),
            lengths_S1.clamp(min=1).to(torch.int32).view(torch.uint32),
        )
    found: tuple[Tensor, Tensor] = held["flashinfer"]
    return found


@dataclass(frozen=True)
class Ragged:
    """Sequences as the library plans them. rows, pages [S + 1]: where queries and pages of each begin; last [S]:
    positions in its last page; lengths [S]: those and all before. On the host, INT32; of_pages: the blocks themselves,
    sequence by sequence, where the table is."""

    rows: Tensor
    pages: Tensor
    last: Tensor
    lengths: Tensor
    of_pages: Tensor

    @staticmethod
    def of(batch: AttentionBatch) -> Ragged:
        lengths, width = [span.length for span in batch.spans], batch.table_SB.shape[1]
        used = [-(-length // batch.block) for length in lengths]
        entries = torch.cat([torch.arange(s * width, s * width + count) for s, count in enumerate(used)])
        if batch.table_SB.is_cuda:  # copied without the host waiting
            entries = entries.pin_memory().to(batch.table_SB.device, non_blocking=True)
        last = [length - (count - 1) * batch.block for length, count in zip(lengths, used, strict=True)]
        rows, pages = (list(accumulate(each, initial=0)) for each in ([s.count for s in batch.spans], used))
        host = [torch.tensor(each, dtype=torch.int32) for each in (rows, pages, last, lengths)]
        of_pages = batch.table_SB.flatten().index_select(0, entries).to(torch.int32)
        return Ragged(host[0], host[1], host[2], host[3], of_pages)


class Planned:
    """A wrapper of the library, planned for the batch that it last ran.

    The library copies a plan to the device from pinned memory of its own, without waiting; so a plan waits for the copy
    of the one before, which is long done unless the host is more than a step ahead.
    """

    def __init__(self, wrapper: Any, plan: Callable[[Any, Ragged], None], prompts_only: bool) -> None:
        self.wrapper, self.plan, self.prompts_only = wrapper, plan, prompts_only
        self.batch: AttentionBatch | None = None
        self.copied = torch.cuda.Event() if torch.cuda.is_available() else None

    def planned(self, batch: AttentionBatch) -> Any:
        if self.batch is not batch:
            if self.copied is not None:
                self.copied.synchronize()
            self.batch = None  # where planning fails, nothing is planned
            self.plan(self.wrapper, Ragged.of(batch.prompts() if self.prompts_only else batch))
            self.batch = batch
            if self.copied is not None:
                self.copied.record()
        return self.wrapper


@lru_cache(maxsize=64)
def kernels_of(shape: Shape, device: torch.device) -> Planned:
    lib, view, given = library(), shape.view, workspace(device)
    if view.latent:
        return Planned(lib.Latent(given, backend="fa3"), partial(plan_latent, shape), prompts_only=False)
    left = -1 if shape.window is None else shape.window - 1
    plan = partial(plan_prompts, shape, left)
    if not shape.sinks:
        return Planned(lib.Prompts(given, backend="fa3"), plan, prompts_only=True)
    dtypes = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    wrapper = lib.PromptsWithSinks(given, backend="fa3", head_dim_qk=view.key_dim, head_dim_vo=view.value_dim,
                                   window_left=left, **dtypes)  # fmt: skip
    return Planned(wrapper, plan, prompts_only=True)


def plan_prompts(shape: Shape, left: int, wrapper: Any, batch: Ragged) -> None:
    """left: positions before a query that it sees; -1 for all."""
    view = shape.view
    wrapper.plan(
        batch.rows, batch.pages, batch.of_pages, batch.last, shape.heads, view.kv_heads, view.key_dim, shape.block,
        head_dim_vo=view.value_dim, causal=True, sm_scale=shape.scale, window_left=left, q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16, seq_lens=batch.lengths,
    )  # fmt: skip


def plan_latent(shape: Shape, wrapper: Any, batch: Ragged) -> None:
    wrapper.plan(
        metadata=library().csr(batch.rows, batch.pages, batch.of_pages, batch.lengths), num_heads=shape.heads,
        head_dim_ckv=LATENT[0], head_dim_kpe=LATENT[1], page_size=shape.block, causal=True, sm_scale=shape.scale,
        q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
    )  # fmt: skip


@lru_cache(maxsize=16)
def workspace(device: torch.device) -> Tensor:
    """Calls on one device follow one another, so that one serves them all."""
    return torch.empty(WORKSPACE, dtype=torch.uint8, device=device)


@lru_cache(maxsize=16)
def counters(device: torch.device) -> Tensor:
    """All zero between calls."""
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device).view(torch.uint32)
