"""DeepGEMM and Humming on a GPU (`-m gpu`), where they are installed: every stage against FP64. See vendor_support.py.

Shapes: E128 K2048 N768 (Qwen3-30B-A3B), and E256 K7168 N2048 (DeepSeek-V3) with fewer experts, at the row counts of
decoding and of prompts, ragged.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from moesaic.contracts.scheme import SCHEMES, Encoding, Scheme, WeightFormat
from moesaic.contracts.spec import Activation
from moesaic.formats.dummy import fill
from moesaic.kernels import deep_gemm, humming, reference, triton
from moesaic.kernels._humming.recipe import PAIRS
from moesaic.kernels.ops import ExpertWeights
from tests import vendor_support as support
from tests.compare import assert_rows_close
from tests.triton_support import expert_weights, in_double, randn, weight
from tests.vendor_support import Record, record, usable

__all__ = ["record"]
pytestmark = pytest.mark.gpu
OAI = Activation("swiglu_oai")
TINY, SMALL, LARGE = (8, 256, 128, 3), (128, 2048, 768, 8), (32, 7168, 2048, 8)
GROUPS = {"int4": 128}
PAIRED = {
    f"{form}+{rows}": Scheme(f"{form}+{rows}", WeightFormat(form, GROUPS.get(form, 0), "bfloat16"), Encoding(rows))
    for form, rows in sorted(PAIRS)
}
OTHERS = {
    "int4_g32+bf16": SCHEMES["wna16_g32"],
    "int4_g64+fp8_token": Scheme("", WeightFormat("int4", 64, "bfloat16"), Encoding("fp8_token")),
    "nvfp4 static": SCHEMES["nvfp4"], "w4afp8_static": SCHEMES["w4afp8_static"],
}  # fmt: skip
CASES = [(1, ""), (13, "holes"), (64, "one expert"), (257, "")]


@pytest.fixture(autouse=True)
def shared_memory() -> Iterator[None]:
    """Test processes share the device."""
    yield
    torch.cuda.empty_cache()


@pytest.fixture
def deep() -> None:
    usable(deep_gemm)


@pytest.fixture
def hum() -> None:
    usable(humming)


# --- DeepGEMM --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bf16", "fp8"])
@pytest.mark.parametrize(("tokens", "how"), [(0, ""), *CASES, (1031, "holes")])
def test_deep_gemm(name: str, tokens: int, how: str, deep: None, record: Record) -> None:
    support.check_deep_gemm(SCHEMES[name], tokens, SMALL, how, record)


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_deep_gemm_at_other_shapes(name: str, deep: None, record: Record) -> None:
    for tokens, shape, activation in ((61, LARGE, None), (5, TINY, OAI), (97, SMALL, OAI)):
        given = {"activation": activation} if activation else {}
        support.check_deep_gemm(SCHEMES[name], tokens, shape, "holes", record, **given)


def test_deep_gemm_adds_up_in_fp32(deep: None) -> None:
    """Over 7168 terms that cancel: the accumulator of FP8 tensor cores alone would be far off."""
    scheme, tokens = SCHEMES["fp8"], 128
    w = expert_weights(scheme, (2, 7168, 128))
    x = randn(tokens, 7168)
    x[:, 3584:] = -x[:, :3584] * (1 + 2**-5)
    for each in (w.w13.parts["data"], w.w13.parts["scale"]):
        half = each.shape[-1] // 2
        each[..., half:] = each[..., :half].clone()
    rows, ids = triton.encode(x, scheme.activation), torch.arange(tokens, device="cuda").int()[:, None] % 2
    from moesaic.kernels._triton.gather import gather
    from moesaic.kernels._triton.place import place

    places = place(ids, 2, 64)
    moved, scale = gather(rows.data, rows.parts["scale"], places)
    y = deep_gemm.product(moved, scale, w.w13, places.ends_E, 64, 64)[places.place_R.long()]
    values = reference.row_values(in_double(rows))
    exact = reference.expert_products(values, w.w13, ids.flatten(), None)
    half = reference.expert_products(values * (torch.arange(7168, device="cuda") < 3584), w.w13, ids.flatten(), None)
    error, limit = (y.double() - exact).norm(dim=-1), 2**-8 * exact.norm(dim=-1) + 2**-9 * half.norm(dim=-1)
    assert (exact.norm(dim=-1) < 0.05 * half.norm(dim=-1)).all(), "the terms cancel"
    assert (error <= limit).all(), (error / limit).max()


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_deep_gemm_in_slots(name: str, deep: None, record: Record) -> None:
    support.check_slots(SCHEMES[name], (32, 128, 2048, 768), [0, 128, 1, 17, 64, 33, *range(2, 28)], record)
    record.products.clear()
    record.joined.clear()
    support.check_slots(SCHEMES[name], (4, 256, 7168, 2048), [0, 256, 3, 131], record)


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_slots_of_both_backends_agree(name: str, deep: None) -> None:
    from moesaic.kernels._triton import experts as ours

    scheme, counts = SCHEMES[name], torch.tensor([5, 0, 128, 77], device="cuda", dtype=torch.int32)
    w, rows = expert_weights(scheme, (4, 2048, 768)), triton.encode(randn(4, 128, 2048), scheme.activation)
    theirs, mine = deep_gemm.experts_slotted(rows, w, counts), ours.experts_slotted(rows, w, counts)
    used = torch.arange(128, device="cuda") < counts[:, None]
    assert_rows_close(theirs[used], mine[used].double(), 2**-5, "two roundings in between, and codes a step apart")


@pytest.mark.parametrize(("segments", "columns"), [((4096, 512, 512), 2048), ((1536, 576), 7168), ((2048,), 4096),
                                                   ((136, 8), 256), ((64, 64, 64), 512)])  # fmt: skip
def test_deep_gemm_of_projections(segments: tuple[int, ...], columns: int, deep: None) -> None:
    w = weight(SCHEMES["fp8"], segments, columns)
    for tokens in (1, 33, 1031):
        rows = triton.encode(randn(tokens, columns), Encoding("fp8_group128"))
        for bias in (None, randn(sum(segments))):
            y = deep_gemm.linear_quant(rows, w, bias)
            assert_rows_close(y, reference.linear_quant(in_double(rows), w, bias), 2**-7, f"{tokens} rows")


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_rows_of_deep_gemm_in_other_batches(
    name: str, deep: None, record_property: Callable[[str, object], None]
) -> None:
    """Says whether a row's bits depend on the others; that they are close must hold."""
    w, rows, ids, weights = support.layer(SCHEMES[name], 512, SMALL)
    whole, same = deep_gemm.experts(rows, w, ids, weights), True
    for count in (1, 16, 100):
        part = replace(rows, parts={n: each[:count] for n, each in rows.parts.items()})
        y = deep_gemm.experts(part, w, ids[:count], weights[:count])
        assert_rows_close(y, whole[:count].double(), 2**-6)
        same &= torch.equal(y, whole[:count])
    record_property(f"deep_gemm {name}: rows keep their bits", same)


# --- Humming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PAIRED, *OTHERS])
def test_humming(name: str, hum: None, record: Record) -> None:
    scheme = (PAIRED | OTHERS)[name]
    for tokens, how in ((0, ""), *CASES):
        support.check_humming(scheme, tokens, SMALL, how, record)


@pytest.mark.parametrize("name", ["nvfp4+nvfp4", "mxfp8+mxfp8", "fp8_block+fp8_group128", "mxfp4+fp8_group128",
                                  "int4+fp8_token", "mxfp4+bf16"])  # fmt: skip
def test_humming_at_other_shapes(name: str, hum: None, record: Record) -> None:
    for tokens, shape, activation in ((61, LARGE, None), (5, TINY, OAI), (1031, SMALL, OAI)):
        given = {"activation": activation} if activation else {}
        support.check_humming(PAIRED[name], tokens, shape, "holes", record, **given)


@pytest.mark.parametrize("name", [*PAIRED, *OTHERS])
def test_weights_are_packed_here_as_on_a_cpu(name: str, hum: None) -> None:
    w = expert_weights((PAIRED | OTHERS)[name], (4, 512, 256))
    before = copy.deepcopy((w.w13.parts, w.w2.parts))
    there = humming.pack(w)
    theirs = humming.pack(on_cpu(w, before))
    for mine, other in ((there.w13, theirs.w13), (there.w2, theirs.w2)):
        for part, each in mine.parts.items():
            assert torch.equal(bytes_of(each), bytes_of(other.parts[part])), part
    humming.unpack(there)
    folds = "fold" in there.w13.parts
    for mine, old in ((w.w13, before[0]), (w.w2, before[1])):
        for part, each in old.items():
            if not (folds and part == "data"):  # a folded -0 comes back as 0
                assert torch.equal(bytes_of(mine.parts[part]), bytes_of(each)), part


def on_cpu(w: ExpertWeights, parts: tuple[dict[str, Tensor], dict[str, Tensor]]) -> ExpertWeights:
    both = (replace(each, parts={n: part.cpu() for n, part in old.items()})
            for each, old in zip((w.w13, w.w2), parts, strict=True))  # fmt: skip
    w13, w2 = both
    return replace(w, w13=w13, w2=w2)


def bytes_of(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8).cpu()


# --- both ------------------------------------------------------------------------------------------------------------

Layer = Callable[[], Tensor]


def capture(layer: Layer) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer()
    return graph, out


GRAPHED = [("deep_gemm", SCHEMES["bf16"]), ("deep_gemm", SCHEMES["fp8"]),
           *[("humming", PAIRED[name]) for name in ("nvfp4+nvfp4", "fp8_block+fp8_group128", "mxfp4+fp8_token",
                                                    "mxfp4+fp8_group128")]]  # fmt: skip


@pytest.mark.parametrize(("backend", "scheme"), GRAPHED, ids=str)
def test_a_graph_follows_new_rows_routings_and_weights(backend: str, scheme: Scheme, record: Record) -> None:
    """Rows, ids and weights of the sum are written into what was captured; then the layer is loaded anew.

    Its output is held against a fresh call's on a copy of the new weights, and that call's stages against FP64: from
    end to end nothing can be asked of FP64, since where BF16 rounds the first product at all, NVFP4 scales and codes of
    the rows between go a step apart, and 2% to 8% of such a row is another.
    """
    module = {"deep_gemm": deep_gemm, "humming": humming}[backend]
    usable(module)
    w, _, ids, weights = support.layer(scheme, 40, SMALL)
    x, plain = randn(40, SMALL[1]), w
    w = humming.pack(w) if backend == "humming" else w
    run: Layer = lambda: module.experts(triton.encode(x, scheme.activation), w, ids, weights)  # noqa: E731
    graph, out = capture(run)
    for how in ("one expert", "holes", ""):
        x.copy_(randn(40, SMALL[1]))
        ids.copy_(support.some_ids(40, SMALL[0], SMALL[3], how))
        weights.copy_(torch.rand_like(weights))
        graph.replay()
        assert_rows_close(out, run().double(), 2**-6, how)
    if backend == "humming":
        humming.unpack(w)
    for each in (plain.w13, plain.w2):
        fill(each, 1.5)
    fresh = copy.deepcopy(plain)
    if backend == "humming":
        humming.pack(plain, w)
    graph.replay()
    given = (triton.encode(x, scheme.activation), ids, weights)
    same = support.fresh_call(module, fresh, given, record)
    assert_rows_close(out, same.double(), 2**-6, "the new weights")


@pytest.mark.parametrize("module", [deep_gemm, humming], ids=["deep_gemm", "humming"])
def test_another_stream_gives_the_same(module: object, request: pytest.FixtureRequest) -> None:
    usable(module)  # type: ignore[arg-type]
    w, rows, ids, weights = support.layer(SCHEMES["fp8"], 40, SMALL)
    w = humming.pack(w) if module is humming else w
    first = module.experts(rows, w, ids, weights)  # type: ignore[attr-defined]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # what does not wait for this stream reads what is not there yet
        late = replace(rows, parts={name: part.clone() for name, part in rows.parts.items()})
        second = module.experts(late, w, ids, weights)  # type: ignore[attr-defined]
    stream.synchronize()
    assert_rows_close(second, first.double(), 2**-6)
