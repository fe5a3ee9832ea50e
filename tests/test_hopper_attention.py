"""Decoding attention in CUDA C++ without a GPU: it compiles without spills, and Python's side agrees with it.

What it computes is tested on a GPU (test_hopper_attention_gpu.py).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from moesaic.contracts.contract import Need
from moesaic.contracts.scheme import Encoding
from moesaic.contracts.spec import KVParts
from moesaic.kernels import hopper, reference
from moesaic.kernels._hopper import attend_decode as decode
from moesaic.kernels._hopper import compile as code
from moesaic.kernels._hopper.attend_decode import DecodeC, Variant, cluster_of, encodes, serves
from moesaic.kernels._hopper.variants import SHARED
from moesaic.kernels.ops import AttentionBatch, KVView, Span
from tests.compare import assert_rows_close
from tests.hopper_layout import check_layouts
from tests.test_hopper import compiler, dump

__all__ = ["compiler"]
EVERY = [Variant(width, fp8, tall) for width in decode.WIDTHS for fp8 in (False, True) for tall in (False, True)]


@pytest.mark.parametrize("variant", EVERY, ids=str)
def test_compiles(variant: Variant, tmp_path: Path) -> None:
    """A variant that needs more shared memory than there is does not compile (attend_decode.cu)."""
    pytest.importorskip("triton")
    image = code.machine_code(variant.defines, main="attend_decode.cu")
    used = re.search(r"Function attend_decode:\s*REG:(\d+) STACK:(\d+)", dump("--dump-resource-usage", image, tmp_path))
    assert used is not None
    registers, stack = map(int, used.groups())
    assert registers * decode.WARPS * 32 * decode.PER_SM <= 65536
    assert stack == 0, "registers spill"
    text = dump("-sass", image, tmp_path)
    products = len(re.findall(r"\bHMMA\.16816\.F32\.BF16", text))
    assert products >= variant.width // 8 * 2, "a tile of 16 positions: so many products of scores, as many of values"
    assert "LDGSTS" in text, "rows are copied while others are multiplied"
    assert "ACQBULK" in text, "it waits for the kernel in front"


def test_arguments_lie_as_the_sources_have_them() -> None:
    check_layouts({"Decode": DecodeC}, "attend.cuh")


def test_what_it_serves() -> None:
    def served(heads: int, view: KVView, dtype: torch.dtype = torch.bfloat16, width: int = 1024) -> bool:
        return serves(torch.empty(2, heads, view.key_dim, dtype=dtype), torch.empty(4, width, dtype=dtype), view)

    four = KVView(4, 128, 512, 128)
    assert served(32, four)
    assert served(64, four)
    assert served(64, KVView(8, 64, 512, 64))
    assert not served(68, four), "17 heads per kv head"
    assert not served(32, four, torch.float32)
    assert not served(32, KVView(4, 96, 384, 96)), "another size"
    assert not served(16, KVView(1, 576, 0, 512)), "latents"
    assert not served(32, four, width=1020), "rows that do not begin at multiples of 16 bytes"
    assert serves(torch.empty(2, 32, 128, dtype=torch.bfloat16), torch.empty(4, KVParts((128,) * 8).fp8_bytes,
                  dtype=torch.uint8), four)  # fmt: skip


@pytest.mark.parametrize(("view", "counts"), [(KVView(2, 32, 64, 32), (1, 1, 9)), (KVView(1, 48, 0, 32), (1, 5)),
                                              (KVView(2, 64, 128, 64), (7, 20))], ids=str)  # fmt: skip
def test_what_is_left_to_triton(view: KVView, counts: tuple[int, ...]) -> None:
    """Other sizes and latents altogether, and prompts; in Triton's interpreter, against the twin in FP64."""
    if not pytest.importorskip("triton").knobs.runtime.interpret:
        pytest.skip("Triton compiles for a GPU in this run")
    torch.manual_seed(0)
    lengths = [count + 13 for count in counts]
    starts = [sum(counts[:s]) for s in range(len(counts))]
    spans = tuple(Span(*each) for each in zip(starts, counts, lengths, strict=True))
    slots_SL = torch.randperm(len(counts) * max(lengths)).view(len(counts), -1)
    batch = AttentionBatch.of(spans, sum(count == 1 for count in counts), slots_SL)
    pool = torch.randn(slots_SL.numel(), view.parts.width).bfloat16()
    q = torch.randn(sum(counts), 4 * view.kv_heads, view.key_dim).bfloat16()
    mine = hopper.attend_paged(q, pool, batch, view, 0.1, 8)
    theirs = reference.attend_paged(q.double(), pool.double(), batch, view, 0.1, 8)
    assert_rows_close(mine.flatten(1), theirs.flatten(1), 2**-7, str(view))


def test_what_it_encodes() -> None:
    wide, narrow = KVView(4, 128, 512, 128), KVView(8, 64, 512, 64)
    assert encodes(Encoding("fp8_group128"), wide)
    assert not encodes(Encoding("fp8_group128"), narrow), "a group is two heads"
    assert encodes(Encoding("mxfp8"), narrow)
    assert encodes(Encoding("fp8_tensor", True), narrow)
    assert encodes(Encoding("nvfp4", True), narrow)
    assert not encodes(Encoding("nvfp4"), wide), "a scale of a row above those of blocks"
    assert not encodes(Encoding("fp8_tensor"), wide), "a scale of all rows"
    assert not encodes(Encoding("fp8_token"), wide), "a scale of a row"


@pytest.mark.parametrize("items", [1, 4, 8, 63, 64, 256, 2048])
def test_clusters_fit(items: int) -> None:
    for longest in (1, 16, 64, 65, 1000, 1024, 131072):
        blocks = cluster_of(items, longest)
        assert blocks in (1, 2, 4, 8, 16)
        assert blocks == 1 or items * blocks <= decode.SPREAD
        assert blocks == 1 or longest > (blocks - 1) * decode.TILE * decode.WARPS, "a block without positions"


def test_clusters_that_were_measured_best() -> None:
    """Of 4 kv heads and 1,024 positions, in a graph with room for 4,112; and long contexts."""
    assert [cluster_of(4 * sequences, 4112) for sequences in (1, 2, 4, 16, 64)] == [8, 8, 8, 2, 1]
    assert cluster_of(4, 16384) == 16
    assert cluster_of(32, 4096) == 4


def test_contracts() -> None:
    heads = Need("cuda", "bfloat16", capturable=True, arch=90)
    for contract in (each for each in hopper.CONTRACTS if each.op.startswith("attend")):
        assert contract.misses(heads) is None
        assert contract.misses(Need("cuda", "bfloat16", arch=90, kv="fp8", sinks=True)) is None
        assert contract.misses(Need("cuda", "bfloat16", arch=90, latent=True))
        assert contract.misses(Need("cuda", "bfloat16", arch=100))
        assert contract.misses(Need("cuda", "bfloat16", arch=90, batch_invariant=True))


def test_shared_memory_is_that_of_the_blocks_of_a_processor() -> None:
    assert all(variant.defines["ROOM_LIMIT"] == SHARED[decode.PER_SM] for variant in EVERY)
