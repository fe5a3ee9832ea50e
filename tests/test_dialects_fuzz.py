"""A quantization_config comes with the weights, from anyone: whatever it says, the answer is a spec or our error."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.errors import MoesaicError
from moesaic.formats.checkpoint import read_quantization
from moesaic.formats.dialects.modules import linears
from tests import dialect_cases as cases
from tests.dialect_cases import compressed, group

MIXED = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION",
         "quantized_layers": {"model.layers.0": {"quant_algo": "NVFP4", "group_size": 16}}}  # fmt: skip
GOOD: list[dict[str, Any]] = [
    {**cases.DEEPSEEK_FP8, "ignored_layers": ["lm_head"], "scale_fmt": "ue8m0"}, cases.MINIMAX_FP8, cases.KIMI_INT4,
    cases.REDHAT_NVFP4, cases.GPT_OSS, MIXED, {"quant_method": "w4afp8", "group_size": 128},
    compressed("mixed-precision", [], group(cases.BLOCK, cases.GROUP128, form="float-quantized"),
               group({**cases.INT4_G128, "scale_dtype": "bfloat16"}, None, "re:.*up_proj", form="pack-quantized")),
    {"quantization": {"quant_algo": "FP8", "exclude_modules": ["*x", "a[b-"]}, "quant_method": "modelopt"},
]  # fmt: skip
SPEC = cases.describe(cases.TINY)
names = st.sampled_from([
    "lm_head", "re:.*", "re:(", "re:[[a]", "model.layers.1", "*", "[", "", " ", "re:", "Linear", "(?i)model", "fp8",
    "int", "NVFP4", "group", "tensor_group", "float-quantized", "bfloat16", "x" * 3000, "re:" + "(" * 400, "{e}", "%s",
    "\ud800",
])  # fmt: skip
values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | names | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names | st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path] * bool(path) + [each for key, value in inner for each in places(value, (*path, key))]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_anything_is_read_or_refused(data: st.DataObject) -> None:
    """One or two fields of a good config replaced by anything, or added."""
    config = copy.deepcopy(data.draw(st.sampled_from(GOOD)))
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(places(config)))
        node: Any = config
        for key in path[:-1]:
            node = node[key]
        key = data.draw(st.just(path[-1]) | names) if isinstance(node, dict) else path[-1]
        node[key] = data.draw(values)
    sidecar = data.draw(st.none() | st.just({"quantization": config}) | st.dictionaries(names, values, max_size=2))
    dtype = data.draw(st.sampled_from(["bfloat16", "torch.float16", "int8", "no such", None, 3]))
    try:
        dialect = read_quantization({"quantization_config": config, "dtype": dtype}, sidecar)
        if dialect is None:
            return
        spec, notes = dialect.apply(SPEC)
        settled = dialect.settle(spec, {})
        for part, experts in linears(settled.spec):
            if experts and dialect.method == "mxfp4":
                continue
            assert settled.dialect.sources(part, part.name.format(e=0))
        assert all(isinstance(note, str) for note in notes)
    except MoesaicError as error:
        error.one_line()
