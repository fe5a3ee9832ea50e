"""DeepGEMM's backend around its products: everything but the products runs here, in Triton's interpreter.

`Products` stands for the library: it checks what the library's own host code asks of its arguments (shapes, strides,
dtypes, alignment; csrc/apis/gemm.hpp and csrc/utils/layout.hpp) and multiplies in FP64, leaving rows that are nobody's
undefined. The real ones run in tests/test_vendor_gpu.py.
"""

from __future__ import annotations

import ast
import contextlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.contracts.scheme import SCHEMES, Encoding
from moesaic.contracts.spec import SILU, Activation
from moesaic.errors import UnsupportedError
from moesaic.formats import encodings
from moesaic.formats.encodings import Rows
from moesaic.kernels import deep_gemm, installed, reference
from moesaic.kernels._triton.place import place
from moesaic.kernels.ops import ExpertWeights
from tests.compare import assert_rows_close
from tests.triton_support import device, expert_weights, in_double, randn, some_ids, weight

E4M3, BF16, FP32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32


class Products:
    """The functions of the library that are called, by their documented meaning."""

    def __init__(self) -> None:
        self.height = 0
        self.expected: list[int] = []
        self.made: list[Tensor] = []

    def set_mk_alignment_for_contiguous_layout(self, height: int) -> None:
        assert height in (64, 128)
        self.height = height

    def m_grouped_fp8_gemm_nt_contiguous(self, a: Any, b: Any, d: Tensor, ends: Tensor, use_psum_layout: bool,
                                         expected_m_for_psum_layout: int) -> None:  # fmt: skip
        self.contiguous(decoded(*a), decoded_blocks(*b), d, ends, use_psum_layout, expected_m_for_psum_layout)

    def m_grouped_bf16_gemm_nt_contiguous(self, a: Tensor, b: Tensor, d: Tensor, ends: Tensor, use_psum_layout: bool,
                                          expected_m_for_psum_layout: int) -> None:  # fmt: skip
        assert (a.dtype, b.dtype) == (BF16, BF16)
        assert a.shape[1] % 64 == 0
        self.contiguous(a.double(), b.double(), d, ends, use_psum_layout, expected_m_for_psum_layout)

    def contiguous(self, a: Tensor, b: Tensor, d: Tensor, ends: Tensor, psum: bool, expected: int) -> None:
        assert psum
        assert ends.dtype == torch.int32
        assert ends.is_contiguous()
        assert ends.shape == (len(b),)
        assert d.shape == (len(a), b.shape[1])
        assert len(a) % self.height == 0, "a tile reaches behind the rows"
        self.checked_output(d, expected)
        d.fill_(float("nan"))
        start = 0
        for e, end in enumerate(ends.tolist()):
            start = -(-start // self.height) * self.height
            d[start:end] = a[start:end] @ b[e].T
            start = end
        self.made.append(d)

    def m_grouped_fp8_fp4_gemm_nt_masked(self, a: Any, b: Any, d: Tensor, counts: Tensor, expected_m: int) -> None:
        self.masked(decoded(*a), decoded_blocks(*b), d, counts, expected_m)

    def m_grouped_bf16_gemm_nt_masked(self, a: Tensor, b: Tensor, d: Tensor, counts: Tensor, expected_m: int) -> None:
        assert (a.dtype, b.dtype) == (BF16, BF16)
        self.masked(a.double(), b.double(), d, counts, expected_m)

    def masked(self, a: Tensor, b: Tensor, d: Tensor, counts: Tensor, expected: int) -> None:
        assert counts.dtype == torch.int32
        assert counts.shape == (len(b),) == (len(a),)
        assert a.shape[1] % 128 == 0, "a tile reaches into the next expert's slots"
        assert d.shape == (*a.shape[:2], b.shape[1])
        self.checked_output(d, expected)
        d.fill_(float("nan"))
        for e, count in enumerate(counts.tolist()):
            d[e, :count] = a[e, :count] @ b[e].T
        self.made.append(d)

    def checked_output(self, d: Tensor, expected: int) -> None:
        assert d.dtype == BF16
        assert d.is_contiguous()
        assert d.shape[-1] % 8 == 0
        assert expected > 0
        self.expected.append(expected)

    def fp8_gemm_nt(self, a: Any, b: Any, d: Tensor) -> None:
        x, w = decoded(*a), decoded_blocks(b[0][None], b[1][None])[0]
        assert d.dtype == BF16
        assert d.stride(-1) == 1
        assert d.shape == (len(x), len(w))
        assert d.stride(0) % 8 == 0, "rows of a copy by hardware lie on 16 bytes"
        assert d.storage_offset() % 8 == 0
        d.copy_(x @ w.T)


def decoded(data: Tensor, scale: Tensor) -> Tensor:
    """Rows [.., M, K] with scales [.., M, G] that are dense along M, M rounded up to four."""
    assert data.dtype == E4M3
    assert data.is_contiguous()
    assert scale.dtype == FP32
    rows, size = data.shape[-2:]
    assert scale.shape == (*data.shape[:-1], -(-size // 128))
    assert scale.stride(-1) == -(-rows // 4) * 4
    assert scale.stride(-2) == 1 or rows == 1
    if scale.dim() == 3:
        assert scale.stride(0) == scale.stride(-1) * scale.shape[-1]
    return encodings.coder_of(Encoding("fp8_group128")).decode({"data": data, "scale": scale}).double()


def decoded_blocks(data: Tensor, scale: Tensor) -> Tensor:
    assert data.dtype == E4M3
    assert data.stride(-1) == 1
    n, k = data.shape[-2:]
    assert scale.shape == (len(data), -(-n // 128), -(-k // 128))
    assert (scale.stride(-1), scale.stride(-2)) == (1, scale.shape[-1])
    wide = scale.repeat_interleave(128, -2)[:, :n].repeat_interleave(128, -1)[..., :k]
    return data.double() * wide.double()


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Products:
    made = Products()
    monkeypatch.setattr(deep_gemm, "library", lambda: made)
    monkeypatch.setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())
    return made


def second(both_RJ: Tensor, w: ExpertWeights, ids_R: Tensor) -> Tensor:
    """FP64 [R, D] of the first product's rows as they are in BF16: bias, activation, encoding, second product."""
    bias13, bias2 = w.biases or (None, None)
    both = both_RJ.float() if bias13 is None else both_RJ.float() + bias13[ids_R.long()].float()
    hidden = encodings.encode(reference.activate(both, w.activation), w.between)
    return reference.expert_products(reference.row_values(in_double(hidden)), w.w2, ids_R, bias2)


@pytest.mark.parametrize("activation", [SILU, Activation("swiglu_oai")], ids=lambda a: a.kind)
@pytest.mark.parametrize("name", ["bf16", "fp8"])
@pytest.mark.parametrize(("tokens", "how"), [(1, ""), (13, ""), (16, "one expert"), (9, "holes")])
def test_experts(name: str, tokens: int, how: str, activation: Activation, products: Products) -> None:
    scheme = SCHEMES[name]
    w = expert_weights(scheme, (8, 256, 128), activation)
    ids = some_ids(tokens, 8, 3, how)
    weights = torch.rand(ids.shape, device=device())
    x = randn(tokens, 256)
    rows = encodings.encode(x, scheme.activation)
    used, flat = (ids >= 0).any(1), ids.flatten()
    routed = torch.where(flat >= 0)[0]
    for height in (0, 128):
        products.made.clear()
        y = deep_gemm.experts(rows, w, ids, weights, height)
        assert y.dtype == BF16
        places = place(ids, 8, height or 64).place_R[routed].long()
        values = reference.row_values(in_double(rows))[routed // 3]
        first, last = (each[places] for each in products.made)
        assert_rows_close(first, reference.expert_products(values, w.w13, flat[routed], None), 2**-7, "first product")
        bias = 0 if w.biases is None else w.biases[1][flat[routed].long()].double()
        assert_rows_close(last.double() + bias, second(first, w, flat[routed]), 2**-7, "second product")
        terms = (last.double() + bias) * weights.flatten()[routed, None].double()
        want = torch.zeros(tokens, 256, dtype=torch.float64, device=device()).index_add_(0, routed // 3, terms)
        assert_rows_close(y[used], want[used], 2**-7, "weighted sum")
        assert not y[~used].any()
    assert set(products.expected) == {deep_gemm.rounded(max(1, ids.numel() // 8))}


def test_no_tokens(products: Products) -> None:
    w = expert_weights(SCHEMES["fp8"], (8, 256, 128))
    rows = encodings.encode(randn(0, 256), Encoding("fp8_group128"))
    none = torch.empty(0, 3, dtype=torch.int32, device=device())
    y = deep_gemm.experts(rows, w, none, none.float())
    assert (y.shape, y.dtype) == ((0, 256), BF16)
    nobody = torch.full((4, 3), -1, dtype=torch.int32, device=device())
    rows = encodings.encode(randn(4, 256), Encoding("fp8_group128"))
    assert not deep_gemm.experts(rows, w, nobody, torch.ones(4, 3, device=device())).any()


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_slots(name: str, transposed: bool, products: Products) -> None:
    scheme, counts = SCHEMES[name], torch.tensor([0, 3, 128, 1])
    w = expert_weights(scheme, (4, 256, 128))
    x = randn(4, 128, 256)
    for e, count in enumerate(counts.tolist()):
        x[e, count:] = float("nan")
    rows = encodings.encode(x, scheme.activation)
    if transposed and "scale" in rows.parts:  # as a dispatcher that is not ours leaves them
        parts = {**rows.parts, "scale": rows.parts["scale"].transpose(1, 2).contiguous().transpose(1, 2)}
        rows = Rows(rows.encoding, parts, rows.dtype)
    y = deep_gemm.experts_slotted(rows, w, counts.to(device()))
    for e, count in enumerate(counts.tolist()):
        if count:
            mine = Rows(rows.encoding, {n: part[e, :count] for n, part in rows.parts.items()}, rows.dtype)
            ids = torch.full((count,), e, dtype=torch.int32, device=device())
            first = reference.expert_products(reference.row_values(in_double(mine)), w.w13, ids, None)
            assert_rows_close(products.made[0][e, :count], first, 2**-7, "first product")
            assert_rows_close(y[e, :count], second(products.made[0][e, :count], w, ids), 2**-7, "second product")
    odd = {n: part[:, :100] for n, part in rows.parts.items()}
    with pytest.raises(UnsupportedError, match="100 slots"):
        deep_gemm.experts_slotted(Rows(rows.encoding, odd, rows.dtype), w, counts)


@pytest.mark.parametrize("segments", [(256,), (384, 64), (128, 64, 256), (64, 64, 64), (136, 8)])
@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_dense(segments: tuple[int, ...], tokens: int, products: Products) -> None:
    w = weight(SCHEMES["fp8"], segments, 256)
    rows = encodings.encode(randn(tokens, 256), Encoding("fp8_group128"))
    for bias in (None, randn(sum(segments))):
        y = deep_gemm.linear_quant(rows, w, bias)
        assert_rows_close(y, reference.linear_quant(in_double(rows), w, bias), 2**-7)
    with pytest.raises(UnsupportedError, match="8 x 16"):
        deep_gemm.linear_quant(rows, weight(SCHEMES["fp8"], (12,), 256))


def test_segments_whose_blocks_follow_are_one_product() -> None:
    assert deep_gemm.spans((4096, 512, 512)) == [(0, 5120, 0)]
    assert deep_gemm.spans((1536, 576)) == [(0, 2112, 0)]
    assert deep_gemm.spans((576, 128, 64, 128)) == [(0, 576, 0), (576, 768, 5), (768, 896, 7)]


def test_our_calls_fit_their_signatures() -> None:
    """Read from the installed package's text: importing it needs a GPU's libraries."""
    spec = find_spec("deep_gemm")
    if spec is None or spec.origin is None:
        pytest.skip("sgl-deep-gemm is not installed")
    found: dict[str, list[str]] = {}
    names: dict[str, str] = {}
    for node in ast.walk(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            found[node.name] = [arg.arg for arg in node.args.args]
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Name):
            names[node.targets[0].id] = node.value.id
    grouped = ["a", "b", "d", "grouped_layout"]
    for name, first in {
        "m_grouped_fp8_gemm_nt_contiguous": grouped, "m_grouped_bf16_gemm_nt_contiguous": grouped,
        "m_grouped_fp8_fp4_gemm_nt_masked": ["a", "b", "d", "masked_m", "expected_m"],
        "m_grouped_bf16_gemm_nt_masked": ["a", "b", "d", "masked_m", "expected_m"], "fp8_gemm_nt": ["a", "b", "d"],
    }.items():  # fmt: skip
        taken = found[names.get(name, name)]
        assert taken[: len(first)] == first, name
        if first is grouped:
            assert {"use_psum_layout", "expected_m_for_psum_layout"} <= set(taken)
    layout = (Path(spec.origin).parent / "utils" / "layout.py").read_text(encoding="utf-8")
    assert "def set_mk_alignment_for_contiguous_layout(new_value: int)" in layout


# --- what is not there is a reason, never a crash ---


@pytest.mark.parametrize(
    ("found", "fits"),
    [("0.1.5", True), ("0.1.5.post1", True), ("0.1.6", True), ("0.1.4", False), ("0.2.0", False), ("0.2.0rc1", False),
     ("1.0", False)],
)  # fmt: skip
def test_versions(found: str, fits: bool) -> None:
    assert installed.within(found, ">=0.1.5,<0.2") == fits


def test_a_package_that_is_not_there_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed.lacking("no-such-package", ">=1,<2", "extra") == (
        "needs no-such-package, which is not installed; pip install 'moesaic[extra]'"
    )
    monkeypatch.setattr(installed, "version", lambda name: "0.3")
    reason = installed.lacking("sgl-deep-gemm", ">=0.1.5,<0.2", "deepgemm")
    assert reason == "needs sgl-deep-gemm >=0.1.5,<0.2, not 0.3; pip install 'moesaic[deepgemm]'"
    with pytest.raises(ValueError, match="range"):
        installed.within("1.0", "==1.0")


def test_the_compilers_library_is_found_where_torch_or_the_toolkit_has_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried: list[str] = []
    good = {str(tmp_path / "nvidia" / "cu13" / "lib" / "libnvrtc.so.13"), str(tmp_path / "lib64" / "libnvrtc.so.13")}

    def load(name: str) -> None:
        tried.append(name)
        if name not in good:
            raise OSError(name)

    monkeypatch.setattr(deep_gemm, "CDLL", load)
    monkeypatch.setattr(deep_gemm, "which", lambda _: str(tmp_path / "bin" / "nvcc"))
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    deep_gemm.load_compiler()
    assert tried == ["libnvrtc.so.13", str(tmp_path / "lib64" / "libnvrtc.so.13")]
    (tmp_path / "nvidia" / "cu13" / "lib").mkdir(parents=True)
    tried.clear()
    deep_gemm.load_compiler()
    assert tried == ["libnvrtc.so.13", str(tmp_path / "nvidia" / "cu13" / "lib" / "libnvrtc.so.13")]
    good.clear()
    deep_gemm.load_compiler()  # what is lacking is told by the package that needs it


@pytest.mark.parametrize("backend", ["deep_gemm", "humming"])
@pytest.mark.parametrize(
    ("error", "what"),
    [
        (ImportError("no module"), "cannot be loaded (no module)"),
        (OSError("undefined symbol: _Zxyz"), "undefined symbol: _Zxyz"),
        (RuntimeError("nvcc failed"), "fails on this machine: RuntimeError('nvcc failed')"),
        (None, "computes wrong results"),
    ],
)
def test_whatever_fails_in_a_probe_is_a_reason(
    backend: str, error: Exception | None, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import import_module

    module = import_module(f"moesaic.kernels.{backend}")

    def fails() -> bool:
        if error is not None:
            raise error
        return False

    assert module.probe() == "finds no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "lacking", lambda *_: "needs what is not installed")
    assert module.probe() == "needs what is not installed"
    monkeypatch.setattr(module, "lacking", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert module.probe() == "is used on Hopper GPUs only"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    loads = isinstance(error, (ImportError, OSError))
    monkeypatch.setattr(module, "library", fails if loads else lambda: None)
    monkeypatch.setattr(module, "tried", fails)
    assert what in module.probe()
