"""FlashInfer's backend around its kernels: contracts and refusals, views of the pool, what is planned, and when.

`Xqa`, `Prompts` and `Latents` stand for the library, by its documented meaning of every argument, in FP64 and without
our code: a position is found as page and offset, from whatever indices and strides they are given. The real ones run in
tests/test_flashinfer_gpu.py; where the package is installed, a test here calls its signatures.
"""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.config import EngineConfig
from moesaic.contracts.contract import EAGER, Need
from moesaic.contracts.plan import ModelPlan, Refusal, Wishes
from moesaic.engine.launch import wishes_of
from moesaic.errors import UnsupportedError
from moesaic.hardware import GPUS
from moesaic.kernels import flashinfer, installed, traced
from moesaic.kernels.ops import AttentionBatch, KVView, Span
from moesaic.kernels.registry import catalogue, own
from moesaic.moe.dispatch import contracts
from moesaic.planning.plan import plan
from scripts import plan_fixtures
from scripts.plan_golden import spec_of
from tests import flashinfer_support as support
from tests.flashinfer_support import GQA, LATENT, OSS, check, paged

BF16 = torch.bfloat16


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, sinks: Tensor | None = None) -> Tensor:
    """Queries [T, H, K], the last of L positions; keys and values [L, G, .]. window: positions seen; 0 is all."""
    count, length, share = len(q), len(k), q.shape[1] // k.shape[1]
    scores = torch.einsum("thk,lhk->htl", q.double(), k.double().repeat_interleave(share, 1)) * scale
    at, seen = torch.arange(length - count, length)[:, None], torch.arange(length)[None]
    hidden = (seen > at) | (seen <= at - window if window else torch.zeros_like(seen > at))
    scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, count, 1)], -1)
    weights = scores.softmax(-1)[..., :length]
    return torch.einsum("htl,lhv->thv", weights, v.double().repeat_interleave(share, 1))


def context(pages: Tensor, of: Tensor, length: int) -> Tensor:
    """The first positions of the pages that are named."""
    return pages[of.long()].flatten(0, 1)[:length]


class Xqa:
    """`flashinfer.xqa.xqa`: q [S, 1, H, K], lengths UINT32 [S, 1]; scores are q k q_scale / sqrt(K)."""

    PLACED = ("q", "k_cache", "v_cache", "page_table", "seq_lens", "output", "workspace_buffer", "semaphores",
              "num_kv_heads", "page_size")  # fmt: skip

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, *placed: Any, sinks: Tensor | None, q_scale: float, sliding_win_size: int) -> None:
        g = SimpleNamespace(**dict(zip(self.PLACED, placed, strict=True)))
        sequences, one, heads, size = g.q.shape
        assert one == 1
        assert isinstance(q_scale, float), "a tensor would be read as FP32"
        assert g.page_table.dtype == torch.int32
        assert (g.seq_lens.dtype, g.seq_lens.shape) == (torch.uint32, (sequences, 1))
        assert all(each.is_contiguous() for each in (g.q, g.output, g.page_table, g.seq_lens))
        assert g.output.shape == g.q.shape
        for each in (g.k_cache, g.v_cache):
            assert each.shape[1:] == (g.page_size, g.num_kv_heads, size)
            assert each.stride() == g.k_cache.stride()
            assert all(stride % size == 0 for stride in each.stride()[:3]), "strides are handed on in heads"
        assert g.semaphores.dtype == torch.uint32
        assert not g.semaphores.view(torch.int32).any()
        assert g.page_size in (16, 32, 64, 128)
        if sinks is not None:
            assert (sinks.shape, sinks.dtype) == ((g.num_kv_heads, heads // g.num_kv_heads), torch.float32)
        self.calls.append({"lengths": g.seq_lens, "table": g.page_table})
        for s, length in enumerate(g.seq_lens.view(torch.int32)[:, 0].tolist()):
            assert 0 < length <= g.page_table.shape[1] * g.page_size
            k, v = (context(each, g.page_table[s], length) for each in (g.k_cache, g.v_cache))
            flat = None if sinks is None else sinks.flatten()
            g.output[s] = attention(g.q[s], k, v, q_scale / math.sqrt(size), sliding_win_size, flat).to(BF16)


class Prompts:
    """`BatchPrefillWithPagedKVCacheWrapper`; with `sinks`, its heir `BatchAttentionWithAttentionSinkWrapper`."""

    sinks = False
    PLACED = ("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len", "num_qo_heads",
              "num_kv_heads", "head_dim_qk", "page_size")  # fmt: skip
    NAMED = ("head_dim_vo", "causal", "sm_scale", "window_left", "q_data_type", "kv_data_type", "seq_lens")

    def __init__(self, float_workspace_buffer: Tensor, backend: str, **fixed: Any) -> None:
        assert float_workspace_buffer.numel() >= 128 << 20
        assert backend == "fa3"
        self.fixed, self.plans = fixed, 0

    def plan(self, *placed: Any, **named: Any) -> None:
        assert set(named) == set(self.NAMED)
        g = SimpleNamespace(**dict(zip(self.PLACED, placed, strict=True)), **named)
        given = (g.qo_indptr, g.paged_kv_indptr, g.paged_kv_indices, g.paged_kv_last_page_len, g.seq_lens)
        assert all(each.dtype == torch.int32 and each.dim() == 1 for each in given)
        rows, pages, of, last, lengths = given
        assert len(rows) == len(pages) == len(last) + 1 == len(lengths) + 1
        assert len(of) == pages[-1]
        assert g.causal
        assert (g.q_data_type, g.kv_data_type) == (BF16, BF16)
        assert torch.equal((pages[1:] - pages[:-1] - 1) * g.page_size + last, lengths)
        assert ((last > 0) & (last <= g.page_size)).all()
        if self.sinks:
            assert self.fixed == {"q_data_type": BF16, "kv_data_type": BF16, "head_dim_qk": g.head_dim_qk,
                                  "head_dim_vo": g.head_dim_vo, "window_left": g.window_left}  # fmt: skip
        self.given, self.plans = given, self.plans + 1
        self.sizes = (g.num_qo_heads, g.num_kv_heads, g.head_dim_qk, g.head_dim_vo, g.page_size)
        self.scale, self.left = g.sm_scale, g.window_left

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *more: Any, out: Tensor) -> Tensor:
        heads, groups, key_dim, value_dim, page_size = self.sizes
        assert q.shape[1:] == (heads, key_dim)
        assert q.stride(-1) == 1
        assert out.shape == (len(q), heads, value_dim)
        for each, size in zip(paged_kv_cache, (key_dim, value_dim), strict=True):
            assert each.shape[1:] == (page_size, groups, size)
            assert each.stride() == paged_kv_cache[0].stride(), "one set of strides serves both"
        sinks, scale = more if self.sinks else (None, self.scale)
        assert bool(more) == self.sinks
        assert scale == self.scale
        rows, pages, of, _, lengths = (each.tolist() for each in self.given)
        assert rows[-1] == len(q)
        for s, length in enumerate(lengths):
            k, v = (context(each, torch.tensor(of[pages[s] : pages[s + 1]]), length) for each in paged_kv_cache)
            mine = slice(rows[s], rows[s + 1])
            out[mine] = attention(q[mine], k, v, scale, self.left + 1, sinks).to(BF16)
        return out


class PromptsWithSinks(Prompts):
    sinks = True


class Latents:
    """`BatchMLAPagedAttentionWrapper`: pages hold [latent, rotary key], queries the same; values are latents."""

    NAMED = ("metadata", "num_heads", "head_dim_ckv", "head_dim_kpe", "page_size", "causal", "sm_scale", "q_data_type",
             "kv_data_type")  # fmt: skip

    def __init__(self, float_workspace_buffer: Tensor, backend: str) -> None:
        assert backend == "fa3"
        self.plans = 0

    def plan(self, **named: Any) -> None:
        assert set(named) == set(self.NAMED)
        g = SimpleNamespace(**named)
        rows, pages, of, lengths = g.metadata
        assert all(each.dtype == torch.int32 for each in g.metadata)
        assert len(of) == pages[-1]
        assert g.causal
        assert (g.q_data_type, g.kv_data_type) == (BF16, BF16)
        assert 128 % g.num_heads == 0, "others may omit a key"
        self.rows, self.pages, self.of, self.lengths = rows.tolist(), pages.tolist(), of, lengths.tolist()
        self.ranks, self.scale, self.size = (g.head_dim_ckv, g.head_dim_kpe), g.sm_scale, g.page_size
        self.plans += 1

    def run(self, *, query: Tensor, kv_cache: Tensor, out: Tensor) -> Tensor:
        assert query.shape[2] == kv_cache.shape[2] == sum(self.ranks)
        assert kv_cache.shape[1] == self.size
        for s, length in enumerate(self.lengths):
            rows = context(kv_cache, self.of[self.pages[s] : self.pages[s + 1]], length)[:, None]
            mine = slice(self.rows[s], self.rows[s + 1])
            out[mine] = attention(query[mine], rows, rows[..., : self.ranks[0]], self.scale, 0).to(BF16)
        return out


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    made: list[Any] = []

    def kept(kind: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **named: (made.append(kind(*args, **named)), made[-1])[1]

    lib = SimpleNamespace(xqa=Xqa(), csr=lambda *tensors: tensors, Prompts=kept(Prompts), made=made,
                          PromptsWithSinks=kept(PromptsWithSinks), Latent=kept(Latents))  # fmt: skip
    monkeypatch.setattr(flashinfer, "library", lambda: lib)
    for cached in (flashinfer.kernels_of, flashinfer.workspace, flashinfer.counters):
        cached.cache_clear()
    yield lib
    for cached in (flashinfer.kernels_of, flashinfer.workspace, flashinfer.counters):
        cached.cache_clear()


# --- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize(("view", "heads", "window", "sinks"), [
    (GQA, 32, None, False), (GQA, 32, 20, False), (OSS, 64, None, True), (OSS, 64, 20, True), (LATENT, 16, None, False),
])  # fmt: skip
def test_decoding_and_ragged_prompts(view: KVView, heads: int, window: int | None, sinks: bool, block: int,
                                     library: Any) -> None:  # fmt: skip
    for lengths, counts in (((1, 33, 64, 65), (1, 1, 1, 1)), ((40,), (40,)), ((70, 5), (30, 5)),
                            ((17, 64, 90, 16, 3), (1, 1, 21, 16, 3))):  # fmt: skip
        check(view, heads, lengths, counts, block, window, sinks, "cpu")


def test_views_share_the_pool(library: Any) -> None:
    pool = torch.arange(4 * 16 * 24.0).view(64, 24)
    k, v = flashinfer.split(pool.unflatten(0, (-1, 16)), KVView(3, 4, 12, 4))
    assert (k.shape, v.shape) == ((4, 16, 3, 4), (4, 16, 3, 4))
    assert k.stride() == v.stride() == (16 * 24, 24, 4, 1)
    assert k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr() == pool.untyped_storage().data_ptr()
    for slot, head, element in ((0, 0, 0), (17, 2, 3), (63, 1, 2)):
        assert k[slot // 16, slot % 16, head, element] == slot * 24 + head * 4 + element
        assert v[slot // 16, slot % 16, head, element] == slot * 24 + 12 + head * 4 + element


def test_ragged_by_hand() -> None:
    """Two sequences: pages 3, 7, 2 with 35 positions, and page 5 with 16."""
    table = torch.tensor([[3, 7, 2, 0], [5, 0, 0, 0]], dtype=torch.int32)
    spans = (Span(0, 4, 35), Span(4, 16, 16))
    made = flashinfer.Ragged.of(AttentionBatch(spans, 0, table, 16, torch.zeros(2, 3, dtype=torch.int64)))
    assert made.rows.tolist() == [0, 4, 20]
    assert made.pages.tolist() == [0, 3, 4]
    assert made.last.tolist() == [3, 16]
    assert made.lengths.tolist() == [35, 16]
    assert made.of_pages.tolist() == [3, 7, 2, 5]


def test_a_plan_is_made_once_per_step(library: Any) -> None:
    """All layers of a step share it; another step, or another window, has its own."""
    batch, blocks = paged((40, 20, 30), (1, 20, 5), 16, "cpu")
    other, _ = paged((40, 20, 30), (1, 20, 5), 16, "cpu")
    pool, q = torch.randn(blocks * 16, support.width_of(GQA)).bfloat16(), torch.randn(26, 32, 128).bfloat16()
    for step, want in ((batch, 1), (batch, 1), (other, 2), (batch, 3)):
        flashinfer.attend_paged(q, pool, step, GQA, 0.1)
        assert [each.plans for each in library.made] == [want]
    flashinfer.attend_paged(q, pool, batch, GQA, 0.1, 8)
    assert [each.plans for each in library.made] == [3, 1]
    calls = library.xqa.calls
    assert calls[0]["table"] is calls[1]["table"]
    assert calls[0]["lengths"] is calls[1]["lengths"]
    assert calls[0]["table"] is not calls[2]["table"]


def test_a_failed_plan_is_made_again(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, blocks = paged((20,), (20,), 16, "cpu")
    pool, q = torch.randn(blocks * 16, support.width_of(GQA)).bfloat16(), torch.randn(20, 32, 128).bfloat16()
    flashinfer.attend_paged(q, pool, batch, GQA, 0.1)
    real, other = Prompts.plan, paged((20,), (20,), 16, "cpu")[0]
    monkeypatch.setattr(Prompts, "plan", lambda *args, **named: (_ for _ in ()).throw(RuntimeError("full")))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="full"):
            flashinfer.attend_paged(q, pool, other, GQA, 0.1)
    monkeypatch.setattr(Prompts, "plan", real)
    flashinfer.attend_paged(q, pool, batch, GQA, 0.1)
    assert library.made[0].plans == 2, "what was planned before the failure is gone"


def test_rows_that_are_padding(library: Any) -> None:
    """As a graph has them: no context, entries of an earlier owner in the table, and the longest span that may come."""
    batch, blocks = paged((33, 20, 47), (1, 1, 1), 16, "cpu")
    batch = support.with_lengths(batch, torch.tensor([33, 0, 47]), batch.table_SB.shape[1] * 16)
    pool = torch.randn(blocks * 16, support.width_of(GQA)).bfloat16()
    pool[:16] = 0
    pool.view(blocks, 16, -1)[batch.table_SB[1, :2].long()] = float("nan")
    y = flashinfer.attend_paged(torch.randn(3, 32, 128).bfloat16(), pool, batch, GQA, 0.1)
    assert library.xqa.calls[0]["lengths"].view(torch.int32).tolist() == [[33], [1], [47]]
    assert (y[1] == 0).all()
    assert y.isfinite().all()


def test_results_are_those_of_the_sequences_own_blocks(library: Any) -> None:
    """The oracle can fail: a table with two entries exchanged gives something else."""
    check(GQA, 32, (64, 40), (1, 7), 16, None, False, "cpu")
    batch, blocks = paged((64,), (1,), 16, "cpu")
    pool, q = torch.randn(blocks * 16, support.width_of(GQA)).bfloat16(), torch.randn(1, 32, 128).bfloat16()
    right = flashinfer.attend_paged(q, pool, batch, GQA, 0.1)
    table = batch.table_SB.clone()
    table[0, 3] = 0
    wrong = flashinfer.attend_paged(q, pool, replace(batch, table_SB=table), GQA, 0.1)
    assert not torch.equal(right, wrong)


@pytest.mark.parametrize(("view", "heads", "block", "match"), [
    (GQA, 32, 8, "blocks of 8 positions"), (GQA, 32, 1, "blocks of 1 positions"),
    (GQA, 256, 16, "256 query heads over 4"),
    (KVView(1, 576, 0, 448), 16, 16, "latents of 448 in 576"), (LATENT, 24, 16, "24 heads over latents"),
])  # fmt: skip
def test_sizes_that_no_contract_names(view: KVView, heads: int, block: int, match: str, library: Any) -> None:
    with pytest.raises(UnsupportedError, match=match) as caught:
        check(view, heads, (block,), (1,), block, None, False, "cpu")
    assert "--attention triton" in caught.value.remedy


def test_a_traced_call_reads_the_spans(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a custom op is told of no lengths; plans need them."""
    batch, blocks = paged((40, 20, 30), (1, 20, 5), 16, "cpu")
    pool, q = torch.randn(blocks * 16, support.width_of(GQA)).bfloat16(), torch.randn(26, 32, 128).bfloat16()
    call = traced.Site("attend_paged", "flashinfer").taken((q, pool, batch, GQA, 0.1))
    monkeypatch.setattr(traced, "spans_of", lambda _, count, most, room: (Span(0, most, room),) * count)
    (mine,) = traced.run(*call)
    assert torch.equal(mine, flashinfer.attend_paged(q, pool, batch, GQA, 0.1))


# --- contracts and plans ---------------------------------------------------------------------------------------------

HOPPER = Need("cuda", "bfloat16", arch=90, head_dims=frozenset({128}))


@pytest.mark.parametrize(("need", "reason"), [
    (HOPPER, None),
    (replace(HOPPER, capturable=True), None),
    (replace(HOPPER, head_dims=frozenset({64}), sinks=True, capturable=True), None),
    (replace(HOPPER, head_dims=frozenset({576}), latent=True), None),
    (replace(HOPPER, head_dims=frozenset({576}), latent=True, capturable=True), EAGER),
    (replace(HOPPER, head_dims=frozenset({320}), latent=True, capturable=True), "keys of 576 elements, not of 320"),
    (replace(HOPPER, sinks=True), "takes no attention sinks"),
    (replace(HOPPER, head_dims=frozenset({96})), "keys of 64 or 128 elements, not of 96"),
    (replace(HOPPER, kv="fp8"), "reads a KV cache in bf16, not in fp8"),
    (replace(HOPPER, arch=100), "compute capability 90 to 90, not 100"),
    (replace(HOPPER, dtype="float32"), "computes in bfloat16, not in float32"),
    (replace(HOPPER, batch_invariant=True), "--deterministic forbids"),
])  # fmt: skip
def test_what_is_served(need: Need, reason: str | None) -> None:
    ordered = sorted(flashinfer.CONTRACTS, key=lambda each: not each.other_cache(need))
    misses = [each.misses(need) for each in ordered]
    if reason is None:
        assert None in misses
    else:
        assert None not in misses
        assert reason in (misses[-1] or ""), "the reason that is shown is the last one"


CATALOGUE = (*catalogue(), *contracts())


def planned(name: str, **wishes: Any) -> ModelPlan | Refusal:
    return plan(spec_of(plan_fixtures.read(name)), GPUS["h100"], CATALOGUE, Wishes(**wishes))


def test_plans_take_it_where_it_is_asked_for() -> None:
    for name, notes in (("qwen3-235b-a22b-fp8", ()), ("gpt-oss-120b", ()), ("deepseek-v2-lite", (EAGER,))):
        usual, asked = planned(name), planned(name, attention="flashinfer")
        assert isinstance(usual, ModelPlan)
        assert isinstance(asked, ModelPlan), asked
        ours = "triton" if name == "deepseek-v2-lite" else "hopper"
        assert {layer.attention for layer in usual.layers} == {ours}, "ours, where nobody asks"
        assert {layer.attention for layer in asked.layers} == {"flashinfer"}
        assert asked.base.capturable == (not notes)
        assert all(any(note in said for said in asked.notes) for note in notes), asked.notes
        bound = own({choice.op: choice.chosen for choice in asked.ops[asked.base]})
        assert bound["attend_paged"] == "flashinfer"
        assert not {"attend_encode", "attend_latent"} & set(bound), "those are ways of another backend's attention"


@pytest.mark.parametrize(("name", "wishes", "reason"), [
    ("qwen3-235b-a22b-fp8", {"kv": "fp8"}, "reads a KV cache in bf16, not in fp8"),
    ("qwen3-235b-a22b-fp8", {"deterministic": True}, "--deterministic forbids"),
])  # fmt: skip
def test_plans_refuse_it_otherwise(name: str, wishes: dict[str, Any], reason: str) -> None:
    made = planned(name, attention="flashinfer", **wishes)
    assert isinstance(made, Refusal)
    assert reason in made.what
    assert made.nearest


def test_plans_know_the_sizes_of_heads() -> None:
    spec = spec_of(plan_fixtures.read("qwen3-235b-a22b-fp8"))
    last = spec.layers[-1]
    odd = replace(spec, layers=(*spec.layers[:-1], replace(last, attention=replace(last.attention, head_dim=96))))
    made = plan(odd, GPUS["h100"], CATALOGUE, Wishes(attention="flashinfer"))
    assert isinstance(made, Refusal)
    assert "keys of 64 or 128 elements, not of 96" in made.what


def test_the_option() -> None:
    assert wishes_of(EngineConfig()).attention is None
    assert wishes_of(EngineConfig(attention="flashinfer")).attention == "flashinfer"


# --- the package -----------------------------------------------------------------------------------------------------


def test_probe_without_a_gpu() -> None:
    if not torch.cuda.is_available():
        assert flashinfer.probe() == "finds no CUDA device"


def test_probe_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(installed, "version", lambda name: "0.6.14")
    assert flashinfer.probe() == "needs flashinfer-python >=0.7.2,<0.8, not 0.6.14; pip install 'moesaic[flashinfer]'"
    monkeypatch.setattr(installed, "version", lambda name: "0.7.2.post1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert flashinfer.probe() == "is used on Hopper GPUs only"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))

    def absent() -> None:
        raise ImportError("no such file")

    monkeypatch.setattr(flashinfer, "library", absent)
    assert flashinfer.probe() == "cannot be loaded (no such file); pip install 'moesaic[flashinfer]'"


def test_only_this_file_imports_it() -> None:
    root = Path(flashinfer.__file__).parent.parent
    found = []
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            found += [path.name for name in names if name.split(".")[0] == "flashinfer"]
    assert set(found) == {"flashinfer.py"}


@pytest.mark.skipif(find_spec("flashinfer") is None, reason="flashinfer-python is not installed")
def test_the_librarys_own_signatures_take_our_arguments() -> None:
    lib = flashinfer.library()
    assert {"sinks", "q_scale", "sliding_win_size"} <= set(inspect.signature(lib.xqa).parameters)
    inspect.signature(lib.csr).bind(*range(4))
    inspect.signature(lib.Latent).bind(None, backend="fa3")
    inspect.signature(lib.Prompts).bind(None, backend="fa3")
    for names, theirs in ((Prompts.NAMED, lib.Prompts.plan), (Latents.NAMED, lib.Latent.plan),
                          (("query", "kv_cache", "out"), lib.Latent.run), (("out",), lib.Prompts.run)):  # fmt: skip
        assert set(names) <= set(inspect.signature(theirs).parameters)
    given = {"q_data_type", "kv_data_type", "head_dim_qk", "head_dim_vo", "window_left", "backend"}
    assert given <= set(inspect.signature(lib.PromptsWithSinks).parameters)
    for placed, theirs in ((Xqa.PLACED, lib.xqa), (("self", *Prompts.PLACED), lib.Prompts.plan)):
        assert tuple(inspect.signature(theirs).parameters)[: len(placed)] == placed
